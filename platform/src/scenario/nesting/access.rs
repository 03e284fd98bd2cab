//! Accesses of `edu`, allowed and blocked, and who is told of them.

use alloc::format;
use alloc::string::String;

use virtio_iommu::contexts::nested::{NestedFault, SpaceId, Why};
use virtio_iommu::{Iova, Prot};

use super::page::Page;
use super::picture::Verdict;
use super::{SCRATCH, World, text};
use crate::guest::PassedOn;

/// The length of an access. Each four bytes make a fault record in QEMU.
const LEN: usize = 16;
/// Where in the page: clear of its edges, where QEMU's look-up is wrong.
pub(super) const OFFSET: u64 = 0x200;
/// Where in `edu`'s buffer it reads to.
const READ_TO: usize = 2048;
/// What `edu` writes, and what it is to read.
const SENT: u8 = 0xee;
/// What the memory holds that `edu` must not see or change.
const SECRET: u8 = 0xc3;
/// What `edu`'s buffer holds where nothing may arrive.
const MARKER: u8 = 0x5a;

/// What `edu` tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Write,
    Read,
}

impl Way {
    pub(super) const ALL: [Self; 2] = [Self::Write, Self::Read];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }

    pub(super) fn other(self) -> Self {
        match self {
            Self::Read => Self::Write,
            Self::Write => Self::Read,
        }
    }

    pub(super) fn prot(self) -> Prot {
        match self {
            Self::Read => Prot::READ,
            Self::Write => Prot::WRITE,
        }
    }
}

/// Which level is to be to blame: the granule there, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Blame {
    pub space: SpaceId,
    pub address: u64,
    pub why: Why,
}

impl World {
    /// Tries what is allowed, at a granule that leads to `page`, and sees that it works and faults nothing.
    pub(super) fn allowed(
        &mut self,
        what: &'static str,
        way: Way,
        iova: u64,
        page: &mut dyn Page,
    ) -> Result<(), String> {
        let row = self.row(what, way, iova);
        self.forget_faults();
        let mut bytes = [0; LEN];
        match way {
            Way::Write => {
                page.fill(SECRET);
                self.set_buffer(0, SENT)?;
                self.edu.copy_out(0, iova + OFFSET, LEN).map_err(text)?;
                page.read(OFFSET as usize, &mut bytes);
            }
            Way::Read => {
                page.write(OFFSET as usize, &[SENT; LEN]);
                self.edu.copy_in(iova + OFFSET, READ_TO, LEN).map_err(text)?;
                self.look_into_buffer(&mut bytes)?;
            }
        }
        if bytes != [SENT; LEN] {
            return Err(format!("{what}: the allowed {} at {iova:#x} does not work", way.name()));
        }
        if let Some(passed) = self.nested.pass_faults_on().first() {
            return Err(format!("{what}: the allowed {} at {iova:#x} faults: {}", way.name(), passed.fault));
        }
        self.rows.push(row);
        Ok(())
    }

    /// Tries what must be blocked: `page` is where it would arrive. The guest's driver is told in its own addresses, and
    /// `blame` is who is to blame.
    pub(super) fn blocked(
        &mut self,
        what: &'static str,
        way: Way,
        iova: u64,
        page: &mut dyn Page,
        blame: Blame,
    ) -> Result<String, String> {
        let mut row = self.row(what, way, iova);
        page.fill(SECRET);
        match way {
            Way::Write => self.set_buffer(0, SENT)?,
            Way::Read => self.set_buffer(READ_TO, MARKER)?,
        }
        self.forget_faults();
        match way {
            Way::Write => self.edu.copy_out(0, iova + OFFSET, LEN).map_err(text)?,
            Way::Read => self.edu.copy_in(iova + OFFSET, READ_TO, LEN).map_err(text)?,
        }
        if !page.all_bytes_are(SECRET) {
            return Err(format!("{what}: memory changed through {iova:#x}"));
        }
        let passed = self.nested.pass_faults_on();
        for PassedOn { fault, nested } in &passed {
            let blamed = nested.as_ref().is_some_and(|nested| self.is_blame(nested, iova, blame));
            if fault.endpoint != self.id || !blamed {
                return Err(format!("{what}: a fault that says something else: {fault}, {nested:?}"));
            }
        }
        let told = self.told(what, iova)?;
        if passed.is_empty() || told != passed.len() {
            return Err(format!("{what}: {} faults, of which the guest knows {told}", passed.len()));
        }
        if way == Way::Read {
            let mut bytes = [0; LEN];
            self.look_into_buffer(&mut bytes)?;
            // Zeros are what QEMU's bus delivers for an access that failed.
            if bytes != [MARKER; LEN] && bytes != [0; LEN] {
                return Err(format!("{what}: edu learned {:02x?}", &bytes[..8]));
            }
        }
        let level = if blame.space == self.child { "child" } else { "parent" };
        let verdict = Verdict::Blocked { level, why: blame.why };
        let detail =
            format!("{} at {iova:#x}: {verdict}; the guest is told of {told} at {iova:#x}", way.name());
        row.verdict = verdict;
        self.rows.push(row);
        Ok(detail)
    }

    fn is_blame(&self, nested: &NestedFault, iova: u64, blame: Blame) -> bool {
        let inside = |address: Iova, granule: u64| {
            let at = granule + OFFSET;
            (at..at + LEN as u64).contains(&address.get())
        };
        nested.seen.space == self.child
            && inside(nested.seen.address, iova)
            && nested.blamed.space == blame.space
            && inside(nested.blamed.address, blame.address)
            && nested.why == blame.why
    }

    /// How many faults the guest's driver was told, all of them in its own words.
    fn told(&self, what: &str, iova: u64) -> Result<usize, String> {
        let at = iova + OFFSET;
        let mut told = 0;
        self.driver.poll();
        while let Some(fault) = self.driver.next_fault() {
            let inside = fault.address.is_some_and(|address| (at..at + LEN as u64).contains(&address.get()));
            if fault.endpoint != self.id || !inside || fault.domain != Some(self.domain.id()) {
                return Err(format!("{what}: the guest is told something else: {fault}"));
            }
            told += 1;
        }
        Ok(told)
    }

    /// Polls both drivers, and passes over what they are told.
    pub(super) fn forget_faults(&self) {
        self.nested.pass_faults_on();
        self.driver.poll();
        while self.driver.next_fault().is_some() {}
    }

    /// Sets a part of `edu`'s buffer, through memory of the guest's.
    fn set_buffer(&mut self, offset: usize, byte: u8) -> Result<(), String> {
        self.scratch.write(OFFSET as usize, &[byte; LEN]);
        self.edu.copy_in(SCRATCH + OFFSET, offset, LEN).map_err(text)
    }

    /// What is in it where `edu` reads to.
    fn look_into_buffer(&mut self, bytes: &mut [u8; LEN]) -> Result<(), String> {
        self.scratch.fill(0);
        self.edu.copy_out(READ_TO, SCRATCH + OFFSET, LEN).map_err(text)?;
        self.scratch.read(OFFSET as usize, bytes);
        Ok(())
    }
}
