//! What a page table should say: a plain list of what is mapped.

use virtio_iommu::Prot;

/// One run of addresses with one translation. The last address is inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) start: u64,
    pub(super) last: u64,
    pub(super) phys: u64,
    pub(super) prot: Prot,
}

impl Run {
    fn meets(&self, start: u64, last: u64) -> bool {
        self.start <= last && start <= self.last
    }
}

#[derive(Default)]
pub(super) struct Reference {
    pub(super) runs: Vec<Run>,
}

impl Reference {
    pub(super) fn is_free(&self, start: u64, last: u64) -> bool {
        !self.runs.iter().any(|run| run.meets(start, last))
    }

    pub(super) fn map(&mut self, run: Run) {
        self.runs.push(run);
    }

    /// Cuts a range out, and returns how many bytes of it were mapped.
    pub(super) fn unmap(&mut self, start: u64, last: u64) -> u64 {
        let before = self.bytes();
        let mut kept = Vec::new();
        for run in self.runs.drain(..) {
            if !run.meets(start, last) {
                kept.push(run);
                continue;
            }
            if run.start < start {
                kept.push(Run { last: start - 1, ..run });
            }
            if run.last > last {
                kept.push(Run { start: last + 1, phys: run.phys + (last + 1 - run.start), ..run });
            }
        }
        self.runs = kept;
        before - self.bytes()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.runs.iter().map(|run| run.last - run.start + 1).sum()
    }

    /// Where an address goes, and what is allowed there.
    pub(super) fn lookup(&self, address: u64) -> Option<(u64, Prot)> {
        let run = self.runs.iter().find(|run| run.meets(address, address))?;
        Some((run.phys + (address - run.start), run.prot))
    }
}
