//! Contexts by SMMUv3's tables of context descriptors: an agent's PASID picks a descriptor in the guest's memory, which leads
//! to a page table.
//!
//! ```text
//!   agent --- domain --- descriptors --+-- PASID 0     a table of VMSAv8-64, also for accesses without a PASID
//!                                      +-- PASID 1     its neighbour
//!                                      '-- PASID 70    in the second level's next table, where there is one
//! ```

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use virtio_iommu::contexts::table::TableOptions;
use virtio_iommu::contexts::table::{ArmGranule, ContextDescriptors, ContextTable, PageTable, TableFormat};
use virtio_iommu::contexts::{Anonymous, ContextsOptions, DescribedContext, DescriptorContexts, Pasid};
use virtio_iommu::{Iova, PhysAddr, Viommu};

use super::access::SECRET;
use super::space::{GuestPage, READ_WRITE};
use super::{OTHER_AGENT, OWN, PAGE, SHARED, World, picture, text};
use crate::guest::Guest;
use crate::report::Report;

/// How descriptors are arranged.
#[derive(Clone, Copy)]
pub(super) struct Arrangement {
    descriptors: ContextDescriptors,
    /// Bits of a PASID.
    bits: u32,
    /// The PASID that is far from the first ones.
    far: u32,
    /// For the names of checks.
    word: &'static str,
    /// For people.
    pub(super) name: &'static str,
}

const ARRANGEMENTS: [Arrangement; 3] = [
    Arrangement {
        descriptors: ContextDescriptors::Linear,
        bits: 7,
        far: 70,
        word: "linear",
        name: "linear, 128 descriptors",
    },
    Arrangement {
        descriptors: ContextDescriptors::TwoLevel4K,
        bits: 10,
        far: 70,
        word: "two-level-4k",
        name: "two levels, 16 times 64",
    },
    Arrangement {
        descriptors: ContextDescriptors::TwoLevel64K,
        bits: 11,
        far: 1100,
        word: "two-level-64k",
        name: "two levels, 2 times 1024",
    },
];

/// Checks of [`run`].
pub(super) const CHECKS: usize = 4 * ARRANGEMENTS.len();

/// A domain of the other agent, whose contexts are found by descriptors.
struct Domain {
    contexts: DescriptorContexts<Guest, Viommu<Guest>>,
    added: Vec<Described>,
}

struct Described {
    pasid: u32,
    context: DescribedContext<Viommu<Guest>>,
    /// What [`SHARED`] leads to.
    page: GuestPage,
    /// What only this context maps.
    own: GuestPage,
}

impl Described {
    fn own_address(&self) -> u64 {
        OWN + u64::from(self.pasid) * PAGE
    }
}

/// One check of an arrangement.
type Check = fn(&World, &mut Domain, Arrangement) -> Result<String, String>;

/// Tries each arrangement.
pub(super) fn run(world: &mut World, report: &mut Report) -> Result<(), String> {
    let mut lines = Vec::new();
    for arrangement in ARRANGEMENTS {
        let mut domain = world.attach_descriptors(arrangement)?;
        let checks: [(&str, Check); 4] = [
            ("walked", World::descriptors_walked),
            ("others", World::descriptors_apart),
            ("reset", World::descriptors_after_reset),
            ("removed", World::descriptors_removed),
        ];
        for (name, check) in checks {
            let done = check(world, &mut domain, arrangement);
            report.check_result(&format!("{}.{name}", arrangement.word), done, ToString::to_string);
            if name == "walked" {
                let pasids = [0, 1, arrangement.far, arrangement.far + 1];
                lines.push(picture::by_descriptors(world, arrangement, &pasids));
            }
        }
        world.end_descriptors(domain)?;
    }
    picture::descriptors(&lines);
    Ok(())
}

impl World {
    fn attach_descriptors(&self, arrangement: Arrangement) -> Result<Domain, String> {
        let options = ContextsOptions { anonymous: Some(Anonymous::Pasid0), ..ContextsOptions::default() };
        let contexts = self.driver.create_contexts(options).map_err(text)?;
        self.driver.attach(OTHER_AGENT, contexts.domain()).map_err(text)?;
        let table = ContextTable::new(arrangement.descriptors, arrangement.bits, self.driver.clone());
        let attached = contexts.attach_descriptors(table.map_err(text)?);
        let contexts = attached.map_err(|not_attached| text(not_attached.error))?;
        Ok(Domain { contexts, added: Vec::new() })
    }

    /// The device finds no descriptor, and remembers that. Then it is told of one, and walks the table that it leads to.
    fn descriptors_walked(&self, domain: &mut Domain, arrangement: Arrangement) -> Result<String, String> {
        for pasid in [0, 1, arrangement.far] {
            self.blocked(OTHER_AGENT, Some(pasid), SHARED)?;
            let format = TableFormat::Arm { granule: ArmGranule::K4, input_bits: 48 };
            let table = PageTable::new(format, self.driver.clone(), TableOptions::default()).map_err(text)?;
            let number = Pasid::new(pasid).ok_or("no PASID")?;
            let added = domain.contexts.add(number, table, pasid as u16 + 1);
            let context = added.map_err(|not_added| text(not_added.error))?;
            let (page, own) = (GuestPage::new(&self.guest)?, GuestPage::new(&self.guest)?);
            let mut described = Described { pasid, context, page, own };
            let places = [(SHARED, described.page.address), (described.own_address(), described.own.address)];
            for (iova, phys) in places {
                // SAFETY: a page of the guest's that is used by nothing but these accesses.
                let mapped =
                    unsafe { described.context.map(Iova::new(iova), PhysAddr::new(phys), PAGE, READ_WRITE) };
                mapped.map_err(text)?;
            }
            domain.added.push(described);
        }
        self.each_has_its_own(domain)?;
        Ok(format!("PASIDs 0, 1 and {} were absent, and arrive at their own pages", arrangement.far))
    }

    /// Each context's access changes its own page, and no other; without a PASID it is that of PASID 0.
    fn each_has_its_own(&self, domain: &Domain) -> Result<(), String> {
        let zero = domain.added.iter().find(|one| one.pasid == 0).map(|one| (None, one));
        for (by, one) in domain.added.iter().map(|one| (Some(one.pasid), one)).chain(zero) {
            domain.added.iter().for_each(|other| other.page.fill(SECRET));
            self.write(OTHER_AGENT, by, SHARED)?;
            self.read(OTHER_AGENT, by, SHARED)?;
            let whole = |other: &&Described| other.pasid != one.pasid && !other.page.is_whole();
            if let Some(changed) = domain.added.iter().find(whole) {
                return Err(format!("PASID {}: the page of PASID {} changed", one.pasid, changed.pasid));
            }
        }
        self.no_fault()
    }

    /// What one context maps no other reaches.
    fn descriptors_apart(&self, domain: &mut Domain, arrangement: Arrangement) -> Result<String, String> {
        let mut blocked = 0;
        for one in &domain.added {
            // The control is by the context that has it.
            self.write(OTHER_AGENT, Some(one.pasid), one.own_address())?;
            one.own.fill(SECRET);
            for other in [0, 1, arrangement.far, arrangement.far + 1] {
                if other != one.pasid {
                    self.blocked(OTHER_AGENT, Some(other), one.own_address())?;
                    blocked += 1;
                }
            }
            if !one.own.is_whole() {
                return Err(format!("the page of PASID {} changed", one.pasid));
            }
        }
        Ok(format!("{blocked} accesses to pages of other PASIDs, blocked and reported with their PASID"))
    }

    /// The device is reset, forgets all tables, and is told again.
    fn descriptors_after_reset(
        &self,
        domain: &mut Domain,
        _arrangement: Arrangement,
    ) -> Result<String, String> {
        self.reset()?;
        self.each_has_its_own(domain)?;
        Ok("the device was reset, told of the table again, and finds each page".into())
    }

    /// What is taken out of the table is out of reach, and the rest is not.
    fn descriptors_removed(&self, domain: &mut Domain, _arrangement: Arrangement) -> Result<String, String> {
        let far = domain.added.pop().ok_or("no context")?;
        let Described { pasid, context, page, own } = far;
        let pages = (self.guest.pages_taken(), context.table().pages());
        self.write(OTHER_AGENT, Some(pasid), SHARED)?;
        domain.contexts.remove(context).map_err(|(_, error)| text(error))?;
        page.fill(SECRET);
        let blocked = self.blocked(OTHER_AGENT, Some(pasid), SHARED)?;
        if !page.is_whole() || self.guest.pages_taken() + pages.1 != pages.0 {
            return Err("memory changed, or is not back".into());
        }
        for page in [page, own] {
            self.guest.free(page.address, 1);
        }
        self.each_has_its_own(domain)?;
        Ok(format!("{blocked}; the others arrive"))
    }

    /// All of it goes: the table of descriptors when no endpoint uses it.
    fn end_descriptors(&self, mut domain: Domain) -> Result<(), String> {
        for Described { context, page, own, .. } in domain.added {
            domain.contexts.remove(context).map_err(|(_, error)| text(error))?;
            for page in [page, own] {
                self.guest.free(page.address, 1);
            }
        }
        self.driver.detach(OTHER_AGENT).map_err(text)?;
        domain.contexts.free().map_err(|_| "the device still has the table of descriptors".into())
    }
}
