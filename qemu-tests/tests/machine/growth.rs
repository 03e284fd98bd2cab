//! What a request of a disk asks of the IOMMU, by QEMU's word alone.
//!
//! Two boots of the same scenario differ in nothing but the number of requests. What QEMU saw more of in the second is
//! what these requests took.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Failed;
use qemu_tests::boot::Boot;
use qemu_tests::trace::Counts;

use crate::column::{Column, Host};

/// Requests in the first boot, and in the second.
const FEW: u64 = 64;
const MANY: u64 = 192;

/// A kind of requests and what each of them takes.
pub(crate) struct Growth {
    pub(crate) name: &'static str,
    scenario: &'static str,
    /// QEMU's event for a read of the disk, which proves that there were more of them.
    event: &'static str,
    /// The word that says how many there are.
    word: &'static str,
    maps: u64,
    unmaps: u64,
    kicks: u64,
}

/// Every kind.
pub(crate) fn all() -> Vec<Growth> {
    let nvme = |name, word, [maps, unmaps, kicks]: [u64; 3]| Growth {
        name,
        scenario: "nvme",
        event: "pci_nvme_read",
        word,
        maps,
        unmaps,
        kicks,
    };
    let block = |name, word, counts| Growth {
        scenario: "block",
        event: "virtio_blk_handle_read",
        ..nvme(name, word, counts)
    };
    // A page that is mapped for its request: one MAP by one doorbell, one UNMAP by another.
    let (mapped, pooled) = ([1, 1, 2], [0, 0, 0]);
    vec![
        nvme("nvme-each-mapped", "mapped", mapped),
        nvme("nvme-each-pooled", "pooled", pooled),
        block("block-each-mapped", "mapped", mapped),
        block("block-each-pooled", "pooled", pooled),
    ]
}

impl Growth {
    pub(crate) fn run(&self, column: &Column, host: &Host) -> Result<(), Failed> {
        self.compare(column, host).map_err(|error| format!("{error:#}").into())
    }

    fn compare(&self, column: &Column, host: &Host) -> Result<()> {
        let (few, few_reads) = self.boot(column, host, FEW)?;
        let (many, many_reads) = self.boot(column, host, MANY)?;
        // The disk is opened twice, and each time as many are made.
        let more = 2 * (MANY - FEW);
        let grown = [
            ("reads", few_reads, many_reads, 1),
            ("MAPs", few.map, many.map, self.maps),
            ("UNMAPs", few.unmap, many.unmap, self.unmaps),
            ("kicks", few.kicks, many.kicks, self.kicks),
            ("ATTACHes", few.attach, many.attach, 0),
        ];
        for (what, few, many, each) in grown {
            ensure!(
                many == few + more * each,
                "{more} more requests: {what} went from {few} to {many}, instead of {each} more for each"
            );
        }
        Ok(())
    }

    /// What QEMU saw of the IOMMU, and how many reads of the disk.
    fn boot(&self, column: &Column, host: &Host, requests: u64) -> Result<(Counts, u64)> {
        let directory = column.directory(self.name).join(requests.to_string());
        let mut machine = column.machine(host, self.scenario);
        machine.extra = vec!["-trace".into(), self.event.into()];
        let trace = directory.join("trace.log");
        machine.trace = Some(trace.clone());
        let mut boot = Boot::new(machine, self.scenario, &directory);
        boot.words = format!("{}={requests}", self.word);
        let outcome = boot.run(&host.qemu, &mut |_| {})?;
        ensure!(outcome.passed(), "with {requests} requests: {}", outcome.summary());
        let log = fs::read(&trace).with_context(|| format!("cannot read {}", trace.display()))?;
        let log = String::from_utf8_lossy(&log);
        let reads = log.lines().filter(|line| line.contains(&format!("{} ", self.event))).count() as u64;
        Ok((outcome.seen.context("QEMU's trace was not looked at")?, reads))
    }
}
