//! The cases: a scenario, the machine it runs on, and how it must end.

use std::time::Duration;

use qemu_tests::bench;
use qemu_tests::boot::{DEADLINE, DEFAULT_SCENARIO, DiskDevice};
use qemu_tests::machine::Iommu;
use qemu_tests::protocol::Reason;
use qemu_tests::server::Peer;

use crate::counts;
use crate::expect::Expect;

/// How long to wait for a guest that will never say anything.
const SILENCE: Duration = Duration::from_secs(5);

/// One case.
pub(crate) struct Case {
    /// `ARCHITECTURE/NAME`.
    pub(crate) name: &'static str,
    pub(crate) scenario: &'static str,
    pub(crate) iommu: Iommu,
    /// Of every kind.
    pub(crate) disk: DiskDevice,
    pub(crate) peer: Peer,
    /// More words for the kernel.
    pub(crate) words: &'static str,
    /// More arguments for QEMU.
    pub(crate) extra: &'static str,
    pub(crate) deadline: Duration,
    pub(crate) expect: Expect,
}

impl Case {
    fn new(name: &'static str, scenario: &'static str, expect: Expect) -> Self {
        let (iommu, disk, peer) = (Iommu::Pci, DiskDevice::Present, Peer::Listening);
        Self { name, scenario, iommu, disk, peer, words: "", extra: "", deadline: DEADLINE, expect }
    }

    /// The default scenario.
    fn default(name: &'static str, expect: Expect) -> Self {
        Self::new(name, DEFAULT_SCENARIO, expect)
    }
}

/// Every case.
pub(crate) fn all() -> Vec<Case> {
    let mut cases = whole_path();
    cases.extend(disks());
    cases.push(counted());
    cases.extend(caught());
    cases.extend(bad_input());
    cases.extend(bad_network());
    cases.extend(broken_guests());
    cases
}

/// What must work.
fn whole_path() -> Vec<Case> {
    let deferred = "policy=deferred";
    vec![
        Case::default("x86_64/default", Expect::Pass),
        Case { extra: "-device pci-testdev", ..Case::default("x86_64/default-with-testdev", Expect::Pass) },
        Case::new("x86_64/devices", "devices", Expect::Pass),
        Case::new("x86_64/bridge", "bridge", Expect::Pass),
        Case { words: deferred, ..Case::new("x86_64/devices-deferred", "devices", Expect::Pass) },
        Case::new("x86_64/policies", "policies", Expect::Pass),
        Case { words: "soak.seconds=5", ..Case::new("x86_64/soak", "soak", Expect::Pass) },
        Case {
            words: "soak.seconds=5 policy=deferred",
            ..Case::new("x86_64/soak-deferred", "soak", Expect::Pass)
        },
    ]
}

/// Disks by the kernel's own drivers. Each scenario holds every request against what it may ask of the IOMMU.
fn disks() -> Vec<Case> {
    // No indirect descriptors: short chains, and fewer of them. Transfers of four pages at most.
    let (chains, short) = ("-global virtio-blk-pci.indirect_desc=off", "-global nvme.mdts=2");
    vec![
        Case::new("x86_64/nvme", "nvme", Expect::Pass),
        Case { extra: short, ..Case::new("x86_64/nvme-short-transfers", "nvme", Expect::Pass) },
        Case::new("x86_64/block", "block", Expect::Pass),
        Case { extra: chains, ..Case::new("x86_64/block-without-indirect", "block", Expect::Pass) },
        Case { iommu: Iommu::Off, ..Case::new("x86_64/block-direct", "block-direct", Expect::Pass) },
    ]
}

/// What the operations ask of the device. Instructions are no matter for a test.
fn counted() -> Case {
    // The clock is as in `bench::ICOUNT`.
    let extra = "-icount shift=0,sleep=off -trace memory_region_ops_read -trace memory_region_ops_write";
    let counted = Case::new("x86_64/bench-counts", bench::SCENARIO, Expect::Counts(counts::judge));
    Case { words: bench::COUNT, extra, ..counted }
}

/// Wrong uses of the driver, each of which one check must notice.
fn caught() -> Vec<Case> {
    vec![
        Case::new("x86_64/leak", "leak", Expect::OnlyFailedCheck("leak.freed-memory-untouched")),
        Case::new("x86_64/early", "early", Expect::OnlyFailedCheck("early.freed-memory-untouched")),
        Case::new("x86_64/lie", "lie", Expect::OnlyFailedCheck("lie.refused-attach-is-reported")),
    ]
}

/// Machines and command lines that lack something: a clear line, an orderly end.
fn bad_input() -> Vec<Case> {
    let naming = Expect::FailNaming;
    let one_queue = "-global nvme.max_ioqpairs=1";
    vec![
        Case { iommu: Iommu::Off, ..Case::default("x86_64/iommu-off", naming(&["no virtio-iommu"])) },
        Case { disk: DiskDevice::Absent, ..Case::default("x86_64/no-disk", naming(&["disk"])) },
        Case { disk: DiskDevice::Absent, ..Case::new("x86_64/no-nvme", "nvme", naming(&["NVMe", "010802"])) },
        Case {
            extra: one_queue,
            ..Case::new("x86_64/nvme-one-queue", "nvme", Expect::OnlyFailedCheck("nvme.attached"))
        },
        Case { words: "hide=VIOT", ..Case::default("x86_64/no-viot", naming(&["VIOT"])) },
        Case { words: "viot=cut", ..Case::default("x86_64/viot-cut", naming(&["VIOT"])) },
        Case { words: "viot=stray", ..Case::default("x86_64/viot-stray", naming(&["VIOT"])) },
        Case {
            words: "policy=lazy",
            ..Case::new("x86_64/unknown-policy", "devices", naming(&["policy=lazy"]))
        },
        Case {
            words: "soak.seconds=0",
            ..Case::new("x86_64/soak-of-nothing", "soak", naming(&["soak.seconds=0"]))
        },
        Case::new("x86_64/unknown-scenario", "no-such-scenario", naming(&["no-such-scenario"])),
    ]
}

/// A network that is not what the guest needs: one check fails, within the deadline.
fn bad_network() -> Vec<Case> {
    let case = |name, words: &'static [&'static str]| Case::new(name, "devices", Expect::FailNaming(words));
    let (refused, silence) =
        (&["FAIL", "net", "connecting", "refused"], &["FAIL", "net", "fetching", "nothing moved"]);
    let digest = &["FAIL", "net", "fetching", "SHA-256", "instead of 00"];
    vec![
        Case { peer: Peer::Refusing, ..case("x86_64/server-refuses", refused) },
        Case { peer: Peer::Silent, ..case("x86_64/server-is-silent", silence) },
        Case { words: "net.sha256=00", ..case("x86_64/server-sends-another-file", digest) },
        Case { words: "net.port=65536", ..case("x86_64/server-has-no-port", &["FAIL", "net.port"]) },
    ]
}

/// Guests that crash, and guests that misbehave towards the harness.
fn broken_guests() -> Vec<Case> {
    let silent =
        Expect::Because(|reason| matches!(reason, Reason::NothingPrinted), "the guest printed nothing");
    let half = Expect::Because(|reason| matches!(reason, Reason::NoEnd), "the guest stopped without an end");
    let babble = Expect::Because(|reason| matches!(reason, Reason::UnknownLine(_)), "an unknown line");
    vec![
        Case::new("x86_64/panic", "panic", Expect::Panic(&["panic at ", ".rs:"])),
        Case::new("x86_64/fault", "page-fault", Expect::Panic(&["exception 14", " at 0x", "rax ", "rsp "])),
        Case { deadline: SILENCE, ..Case::new("x86_64/silent", "silent", silent) },
        Case { deadline: SILENCE, ..Case::new("x86_64/stops-half-way", "half", half) },
        Case::new("x86_64/unknown-line", "babble", babble),
    ]
}
