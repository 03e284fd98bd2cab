//! The contexts, each of its kind, and the pages that they map.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;

use virtio_iommu::contexts::table::{ArmGranule, PageTable, TableFormat, TableOptions};
use virtio_iommu::contexts::{Contexts, MappedContext, OwnedContext, Pasid};
use virtio_iommu::{Domain, Iova, PhysAddr, Prot, Viommu};
use virtio_iommu_model::GuestMemory as _;

use super::access::{LEN, OFFSET, SECRET};
use super::{OWN, PAGE, READ_ONLY, SHARED, page_range, text};
use crate::guest::Guest;

pub(super) const READ_WRITE: Prot = Prot::READ.union(Prot::WRITE);

/// What a context is, which says its PASID too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Default,
    X86,
    RiscV,
    Arm,
    Mapped,
}

impl Kind {
    pub(super) const ALL: [Self; 5] = [Self::Default, Self::X86, Self::RiscV, Self::Arm, Self::Mapped];
    pub(super) const OWNED: [Self; 3] = [Self::X86, Self::RiscV, Self::Arm];

    pub(super) fn pasid(self) -> Option<u32> {
        match self {
            Self::Default => None,
            Self::X86 => Some(1),
            Self::RiscV => Some(2),
            Self::Arm => Some(3),
            Self::Mapped => Some(4),
        }
    }

    /// For the names of checks.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Default => "anonymous",
            Self::X86 => "x86-64",
            Self::RiscV => "sv39",
            Self::Arm => "vmsa",
            Self::Mapped => "mapped",
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Default => "no PASID",
            Self::X86 => "PASID 1, x86-64 table",
            Self::RiscV => "PASID 2, Sv39 table",
            Self::Arm => "PASID 3, VMSAv8-64 table",
            Self::Mapped => "PASID 4, MAP and UNMAP",
        }
    }

    pub(super) fn is_owned(self) -> bool {
        Self::OWNED.contains(&self)
    }
}

/// A page of the guest's memory.
pub(super) struct GuestPage {
    guest: Guest,
    pub address: u64,
}

impl GuestPage {
    pub(super) fn new(guest: &Guest) -> Result<Self, String> {
        Ok(Self { guest: guest.clone(), address: guest.allocate(1, 1).map_err(text)? })
    }

    pub(super) fn fill(&self, byte: u8) {
        self.guest.fill(self.address, PAGE as usize, byte);
    }

    /// Puts what an agent is to read.
    pub(super) fn put(&self, byte: u8) {
        self.guest.fill(self.address + OFFSET, LEN, byte);
    }

    /// Whether an access left this where it arrives, and only there.
    pub(super) fn holds(&self, byte: u8) -> bool {
        let mut bytes = [0; PAGE as usize];
        let inside = OFFSET as usize..OFFSET as usize + LEN;
        let expected = |at: usize| if inside.contains(&at) { byte } else { SECRET };
        self.guest.read(self.address, &mut bytes).is_ok()
            && bytes.iter().enumerate().all(|(at, byte)| *byte == expected(at))
    }

    /// Whether nothing changed since it was filled with [`SECRET`].
    pub(super) fn is_whole(&self) -> bool {
        self.guest.all_bytes_are(self.address, PAGE as usize, SECRET)
    }
}

/// A context of the domain.
pub(super) struct Space {
    pub kind: Kind,
    handle: Handle,
    /// What [`SHARED`] leads to, and [`READ_ONLY`].
    pub page: GuestPage,
    /// What only this context maps.
    pub own: GuestPage,
}

enum Handle {
    Default(Domain<Guest>),
    Owned(Box<OwnedContext<Guest, Viommu<Guest>>>),
    Mapped(MappedContext<Guest>),
}

impl Space {
    /// Adds a context to a domain, with nothing mapped.
    pub(super) fn add(
        kind: Kind,
        contexts: &Contexts<Guest>,
        driver: &Viommu<Guest>,
        guest: &Guest,
    ) -> Result<Self, String> {
        let pasid = kind.pasid().and_then(Pasid::new);
        let owned = |format, asid| {
            let table = PageTable::new(format, driver.clone(), TableOptions::default()).map_err(text)?;
            let pasid = pasid.ok_or("a table without a PASID")?;
            let added = contexts.add_owned(pasid, table, asid);
            added.map(|context| Handle::Owned(Box::new(context))).map_err(|not_added| text(not_added.error))
        };
        let handle = match kind {
            Kind::Default => Handle::Default(contexts.domain().clone()),
            Kind::X86 => owned(TableFormat::X86_64, 0)?,
            Kind::RiscV => owned(TableFormat::Sv39, 0)?,
            Kind::Arm => owned(TableFormat::Arm { granule: ArmGranule::K4, input_bits: 48 }, 3)?,
            Kind::Mapped => {
                Handle::Mapped(contexts.add_mapped(pasid.ok_or("a context without a PASID")?).map_err(text)?)
            }
        };
        Ok(Self { kind, handle, page: GuestPage::new(guest)?, own: GuestPage::new(guest)? })
    }

    /// Maps what all contexts have, and the page that only this one has, the `at`th.
    pub(super) fn map_all(&mut self, at: usize) -> Result<(), String> {
        self.map_shared()?;
        self.map(READ_ONLY, self.page.address, Prot::READ)?;
        self.map(OWN + at as u64 * PAGE, self.own.address, READ_WRITE)
    }

    /// Maps its page for [`SHARED`].
    pub(super) fn map_shared(&mut self) -> Result<(), String> {
        self.map(SHARED, self.page.address, READ_WRITE)
    }

    /// Maps a page of the guest's.
    pub(super) fn map(&mut self, iova: u64, phys: u64, prot: Prot) -> Result<(), String> {
        let (iova, phys) = (Iova::new(iova), PhysAddr::new(phys));
        // SAFETY: a page of the guest's that is used by nothing but these accesses, and through the guest's memory.
        unsafe {
            match &mut self.handle {
                Handle::Default(domain) => domain.map_at(iova, phys, PAGE, prot).map_err(text),
                Handle::Owned(context) => context.map(iova, phys, PAGE, prot).map_err(text),
                Handle::Mapped(context) => context.map(iova, phys, PAGE, prot).map_err(text),
            }
        }
    }

    /// Unmaps a page, and whatever that takes.
    pub(super) fn unmap(&mut self, iova: u64) -> Result<(), String> {
        let range = page_range(iova)?;
        match &mut self.handle {
            // SAFETY: `map` mapped it.
            Handle::Default(domain) => unsafe { domain.unmap(Iova::new(iova), PAGE) }.map_err(text),
            Handle::Owned(context) => context.unmap(range).map(drop).map_err(text),
            Handle::Mapped(context) => context.unmap(range).map_err(text),
        }
    }

    pub(super) fn owned(&mut self) -> Result<&mut OwnedContext<Guest, Viommu<Guest>>, String> {
        match &mut self.handle {
            Handle::Owned(context) => Ok(&mut **context),
            Handle::Default(_) | Handle::Mapped(_) => Err(format!("{} is no table", self.kind.name())),
        }
    }

    /// What the context is, for people.
    pub(super) fn describe(&self) -> String {
        match &self.handle {
            Handle::Default(_) => "the default context: MAP and UNMAP".into(),
            Handle::Mapped(_) => "a mapped context: MAP and UNMAP with its PASID".into(),
            Handle::Owned(context) => {
                let table = context.table();
                format!(
                    "an owned context: a table of {} pages, root at {}, {} bytes mapped",
                    table.pages(),
                    table.root(),
                    table.mapped_bytes()
                )
            }
        }
    }

    /// Removes it from the domain, and frees its pages. The default context cannot go: its mappings do.
    pub(super) fn remove(self) -> Result<(), String> {
        let Self { handle, page, own, .. } = self;
        match handle {
            Handle::Default(domain) => {
                let mappings: alloc::vec::Vec<_> = domain.mappings().map(|mapping| mapping.range).collect();
                for range in mappings {
                    let len = range.len_bytes().ok_or("a mapping without a length")?;
                    // SAFETY: `map` mapped it.
                    unsafe { domain.unmap(range.start(), len) }.map_err(text)?;
                }
            }
            Handle::Owned(context) => context.remove().map_err(|(_, error)| text(error))?,
            Handle::Mapped(context) => context.remove().map_err(|(_, error)| text(error))?,
        }
        for page in [page, own] {
            page.guest.free(page.address, 1);
        }
        Ok(())
    }
}
