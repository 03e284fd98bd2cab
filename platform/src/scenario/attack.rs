//! `edu` reaches for memory that it must not have.
//!
//! Each attack is tried in both directions. Just before it the same address is used in a way that is allowed,
//! so that a blocked attack is not a broken device. Proof is memory that did not change, a buffer of `edu` that
//! did not learn anything, *and* a fault that names `edu` and the address.

use alloc::format;
use alloc::string::{String, ToString};
use core::fmt;

use virtio_iommu::{DmaDevice, Domain, EndpointId, Fault, Iova, PhysAddr, Prot};

use super::setup::Opened;
use crate::devices::edu::{BUFFER_BYTES, Edu};
use crate::iommu::{Iommu, KernelPlatform};
use crate::memory::dma::DmaPages;
use crate::memory::frames::{FRAME_BYTES, OutOfFrames};
use crate::println;
use crate::report::Report;

/// The length of an access. Each four bytes make a fault record in QEMU.
pub(super) const LEN: usize = 64;
/// Where in the page: clear of its edges, where QEMU's look-up is wrong.
pub(super) const OFFSET: u64 = 0x200;
/// Where in `edu`'s buffer attacks read to, and allowed accesses do not.
const MARKED: usize = 2048;

/// What `edu` writes.
pub(super) const ATTACK: u8 = 0xee;
/// What `edu`'s buffer holds where nothing may arrive.
const MARKER: u8 = 0x5a;
/// What the memory holds that `edu` must not see or change.
pub(super) const SECRET: u8 = 0xc3;
pub(super) const PAGE: u64 = 4096;

/// Checks that [`run`] makes.
pub(super) const CHECKS: usize = Kind::ALL.len() * Way::ALL.len();

/// Why the memory is out of reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Nothing is mapped: the attacker knows the physical address and tries that.
    Unmapped,
    /// Mapped, but for the other direction only.
    OtherDirection,
    /// It was mapped until a moment ago.
    JustUnmapped,
    /// Mapped at this very address, in another endpoint's domain.
    OtherDomain,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Unmapped, Self::OtherDirection, Self::JustUnmapped, Self::OtherDomain];

    fn name(self) -> &'static str {
        match self {
            Self::Unmapped => "unmapped",
            Self::OtherDirection => "other-direction",
            Self::JustUnmapped => "just-unmapped",
            Self::OtherDomain => "other-domain",
        }
    }
}

/// What the attacker tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Read,
    Write,
}

impl Way {
    const ALL: [Self; 2] = [Self::Write, Self::Read];

    fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Read => Self::Write,
            Self::Write => Self::Read,
        }
    }

    fn prot(self) -> Prot {
        match self {
            Self::Read => Prot::READ,
            Self::Write => Prot::WRITE,
        }
    }
}

/// The attacker and its victims.
pub(super) struct Arena<'a> {
    pub iommu: &'a Iommu,
    pub edu: &'a mut Edu,
    pub attacker: &'a Opened,
    /// Another endpoint's domain.
    pub other: &'a Domain<KernelPlatform>,
}

/// Tries everything. Makes [`CHECKS`] checks.
pub(super) fn run(mut arena: Arena<'_>, report: &mut Report) {
    println!();
    println!("edu reaches for memory that it must not have:");
    for kind in Kind::ALL {
        for way in Way::ALL {
            let name = format!("attack.{}.{}", kind.name(), way.name());
            let blocked = arena.attack(kind, way);
            report.check_result(&name, blocked, ToString::to_string);
        }
    }
}

/// An attack that was blocked and reported.
struct Blocked {
    iova: Iova,
    way: Way,
    fault: Fault,
    records: usize,
}

impl fmt::Display for Blocked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { iova, way, fault, records } = self;
        write!(f, "{} at {iova} blocked; {records} records, first: {fault}", way.name())
    }
}

/// Memory that takes the smallest mapping that there is.
pub(super) fn granule(iommu: &Iommu) -> Result<DmaPages, OutOfFrames> {
    granules(iommu, 1)
}

/// Memory for so many of them.
pub(super) fn granules(iommu: &Iommu, count: usize) -> Result<DmaPages, OutOfFrames> {
    // A granule below a frame's length makes no smaller memory.
    let frames = (iommu.viommu.granule() / FRAME_BYTES).max(1) as usize;
    DmaPages::allocate_aligned(count * frames, frames)
}

impl Arena<'_> {
    /// Sets one attack up, sees that the address works where it may, attacks, and looks at the damage.
    fn attack(&mut self, kind: Kind, way: Way) -> Result<Blocked, String> {
        let mut page = granule(self.iommu).map_err(text)?;
        page.fill(SECRET);
        let phys = PhysAddr::new(page.phys());
        let len = self.iommu.viommu.granule();
        let limit = self.attacker.endpoint.limit();
        let domain = &self.attacker.domain;

        // SAFETY: `page` is ours until the end of this function, where every mapping of it was unmapped with
        // success; on any error it is leaked below.
        let prepared = unsafe {
            match kind {
                Kind::Unmapped => {
                    let iova = Iova::new(phys.get());
                    domain.map_at(iova, phys, len, Prot::READ | Prot::WRITE).map(|()| iova)
                }
                Kind::OtherDirection => domain.map(phys, len, way.other().prot(), limit),
                Kind::JustUnmapped => domain.map(phys, len, Prot::READ | Prot::WRITE, limit),
                Kind::OtherDomain => self
                    .other
                    .map(phys, len, Prot::READ | Prot::WRITE, limit)
                    .and_then(|iova| domain.map_at(iova, phys, len, Prot::READ | Prot::WRITE).map(|()| iova)),
            }
        };
        let result = prepared.map_err(text).and_then(|iova| self.attack_at(kind, way, iova, &mut page));
        if result.is_err() {
            // It may still be mapped: nobody gets it any more.
            page.into_raw();
        }
        result
    }

    fn attack_at(
        &mut self,
        kind: Kind,
        way: Way,
        iova: Iova,
        page: &mut DmaPages,
    ) -> Result<Blocked, String> {
        let at = iova.get() + OFFSET;
        let len = self.iommu.viommu.granule();
        let domain = &self.attacker.domain;
        let allowed = if kind == Kind::OtherDirection { way.other() } else { way };
        self.control(allowed, at, page)?;
        page.fill(SECRET);
        if way == Way::Read {
            self.mark()?;
        }
        if kind != Kind::OtherDirection {
            // SAFETY: our own mapping, made by `attack`.
            unsafe { domain.unmap(iova, len) }.map_err(text)?;
        }

        self.drain_faults();
        match way {
            Way::Write => self.edu.copy_out(0, at, LEN),
            Way::Read => self.edu.copy_in(at, MARKED, LEN),
        }
        .map_err(text)?;

        if !page.all_bytes_are(SECRET) {
            return Err(format!("memory changed through {iova}"));
        }
        if way == Way::Read {
            self.check_marker(iova)?;
        }
        let (fault, records) = self.expect_fault(at)?;
        // SAFETY: our own mappings, made by `attack`.
        unsafe {
            match kind {
                Kind::OtherDirection => domain.unmap(iova, len).map_err(text)?,
                Kind::OtherDomain => self.other.unmap(iova, len).map_err(text)?,
                Kind::Unmapped | Kind::JustUnmapped => {}
            }
        }
        Ok(Blocked { iova, way, fault, records })
    }

    /// Writes where that is allowed, and sees that it works and faults nothing. `edu`'s buffer is full of [`ATTACK`] then.
    pub(super) fn write_allowed(&mut self, at: u64, page: &mut DmaPages) -> Result<(), String> {
        self.control(Way::Write, at, page)
    }

    /// Uses the address in a way that is allowed, and sees that it works and faults nothing.
    fn control(&mut self, way: Way, at: u64, page: &mut DmaPages) -> Result<(), String> {
        self.drain_faults();
        let mut bytes = [0; LEN];
        match way {
            Way::Write => {
                self.fill_buffer(ATTACK)?;
                self.edu.copy_out(0, at, LEN).map_err(text)?;
                page.read(OFFSET as usize, &mut bytes);
            }
            Way::Read => {
                page.write(OFFSET as usize, &[ATTACK; LEN]);
                self.edu.copy_in(at, 0, LEN).map_err(text)?;
                self.look_into_buffer(0, &mut bytes)?;
            }
        }
        if bytes != [ATTACK; LEN] {
            return Err(format!("the allowed {} at {at:#x} does not work", way.name()));
        }
        match self.next_fault() {
            None => Ok(()),
            Some(fault) => Err(format!("the allowed {} at {at:#x} faults: {fault}", way.name())),
        }
    }

    /// Fills `edu`'s buffer through coherent memory.
    pub(super) fn fill_buffer(&mut self, byte: u8) -> Result<(), String> {
        self.through_memory(|edu, iova, ptr| {
            // SAFETY: fresh coherent memory of this length, and the device is idle.
            unsafe { ptr.write_bytes(byte, BUFFER_BYTES) };
            edu.copy_in(iova, 0, BUFFER_BYTES).map_err(text)
        })
    }

    fn mark(&mut self) -> Result<(), String> {
        self.through_memory(|edu, iova, ptr| {
            // SAFETY: fresh coherent memory of this length, and the device is idle.
            unsafe { ptr.write_bytes(MARKER, LEN) };
            edu.copy_in(iova, MARKED, LEN).map_err(text)
        })
    }

    /// What `edu`'s buffer holds from `offset`.
    fn look_into_buffer(&mut self, offset: usize, bytes: &mut [u8]) -> Result<(), String> {
        let len = bytes.len();
        self.through_memory(|edu, iova, ptr| {
            edu.copy_out(offset, iova, len).map_err(text)?;
            for (index, byte) in bytes.iter_mut().enumerate() {
                // SAFETY: inside the coherent memory; volatile, since the device wrote it.
                *byte = unsafe { ptr.add(index).read_volatile() };
            }
            Ok(())
        })
    }

    /// Lends a page of coherent memory, by the address that `edu` uses and the kernel's.
    fn through_memory(
        &mut self,
        work: impl FnOnce(&mut Edu, u64, *mut u8) -> Result<(), String>,
    ) -> Result<(), String> {
        let endpoint = &self.attacker.endpoint;
        let memory = endpoint.alloc_coherent(BUFFER_BYTES).map_err(text)?;
        let done = work(self.edu, memory.iova().get(), memory.ptr().as_ptr());
        endpoint.free_coherent(memory).map_err(text)?;
        done
    }

    /// A read that was blocked taught `edu` nothing: where it read to there is still the marker, or the zeros
    /// that QEMU's bus delivers for an access that failed, and not one byte of the secret.
    fn check_marker(&mut self, iova: Iova) -> Result<(), String> {
        let mut bytes = [0; LEN];
        self.look_into_buffer(MARKED, &mut bytes)?;
        if bytes == [MARKER; LEN] || bytes == [0; LEN] {
            return Ok(());
        }
        Err(format!("edu learned {:02x?} by a read at {iova}", &bytes[..8]))
    }

    pub(super) fn drain_faults(&self) {
        while self.next_fault().is_some() {}
    }

    pub(super) fn next_fault(&self) -> Option<Fault> {
        self.iommu.viommu.poll();
        self.iommu.viommu.next_fault()
    }

    /// The fault of an access of [`LEN`] bytes at `at`, and how many records it made.
    pub(super) fn expect_fault(&self, at: u64) -> Result<(Fault, usize), String> {
        let attacker: EndpointId = self.attacker.id;
        let mut first = None;
        let mut records = 0;
        while let Some(fault) = self.next_fault() {
            let inside = fault.address.is_some_and(|address| (at..at + LEN as u64).contains(&address.get()));
            if fault.endpoint != attacker || !inside {
                return Err(format!("a fault that nobody caused: {fault}"));
            }
            first.get_or_insert(fault);
            records += 1;
        }
        first.map(|fault| (fault, records)).ok_or_else(|| "blocked, but no fault was reported".into())
    }
}

fn text(error: impl fmt::Display) -> String {
    error.to_string()
}
