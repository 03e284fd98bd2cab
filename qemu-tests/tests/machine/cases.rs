//! The cases: a scenario, the machines it runs on, and how it must end.

use std::ops::RangeInclusive;
use std::time::Duration;

use qemu_tests::bench;
use qemu_tests::boot::{DEADLINE, DEFAULT_SCENARIO, DiskDevice};
use qemu_tests::machine::{Arch, Iommu, Place};
use qemu_tests::protocol::Reason;
use qemu_tests::qemu::{OLDEST, Version};
use qemu_tests::server::Peer;

use crate::column::Column;
use crate::counts;
use crate::expect::Expect;

/// How long to wait for a guest that will never say anything.
const SILENCE: Duration = Duration::from_secs(5);

/// The columns that a case is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum On {
    /// All of them, but that with an IOMMU over vhost-user.
    Every,
    /// That one.
    VhostUser,
    /// All of some architectures.
    EveryOf(&'static [Arch]),
    /// One for each architecture: IOMMU on PCI, newest QEMU.
    Home,
    /// Those of some architectures.
    HomeOf(&'static [Arch]),
    /// The same with the IOMMU on virtio over MMIO.
    MmioOf(&'static [Arch]),
    /// All but those of one machine.
    EveryBut(Arch, Iommu),
}

impl On {
    pub(crate) fn includes(self, column: &Column) -> bool {
        // Nothing of the machine is behind that IOMMU.
        if column.iommu == Iommu::VhostUser {
            return self == Self::VhostUser;
        }
        match self {
            Self::Every => true,
            Self::VhostUser => false,
            Self::EveryOf(archs) => archs.contains(&column.arch),
            Self::Home => column.newest && column.iommu == Iommu::Pci,
            Self::EveryBut(arch, iommu) => (column.arch, column.iommu) != (arch, iommu),
            Self::HomeOf(archs) => Self::Home.includes(column) && archs.contains(&column.arch),
            Self::MmioOf(archs) => {
                column.newest && column.iommu == Iommu::Mmio && archs.contains(&column.arch)
            }
        }
    }
}

/// A machine whose kernel is entered at EL2.
const EL2: &str = "-machine virtualization=on";

/// What has options for the widths of addresses and of pages.
const NEWER: Version = Version { major: 10, minor: 0, micro: 0 };

const GRANULE_64K: &str = "-global virtio-iommu-pci.granule=64k";

/// Where ACPI's tables say what is behind the IOMMU.
const ACPI: On = On::HomeOf(&[Arch::X86_64]);

/// One case.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    /// The columns that it is in.
    pub(crate) on: On,
    pub(crate) scenario: &'static str,
    /// Instead of the column's.
    pub(crate) iommu: Option<Iommu>,
    pub(crate) place: Place,
    pub(crate) reserved: &'static [RangeInclusive<u64>],
    /// Where older QEMUs lack an option.
    pub(crate) since: Version,
    pub(crate) cpus: u32,
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
    /// A scenario on one machine of each architecture.
    fn new(name: &'static str, scenario: &'static str, expect: Expect) -> Self {
        Self {
            name,
            on: On::Home,
            scenario,
            iommu: None,
            place: Place::RootBus,
            reserved: &[],
            since: OLDEST,
            cpus: 1,
            disk: DiskDevice::Present,
            peer: Peer::Listening,
            words: "",
            extra: "",
            deadline: DEADLINE,
            expect,
        }
    }

    /// A scenario that passes on every machine.
    fn every(name: &'static str, scenario: &'static str) -> Self {
        Self { on: On::Every, ..Self::new(name, scenario, Expect::Pass) }
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
    cases.extend(interrupts());
    cases.extend(places());
    cases.extend(groups());
    cases.extend(draft());
    cases.extend(from_el2());
    cases.extend(options());
    cases.extend(queues());
    cases.extend(counted());
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
        Case::every("default", DEFAULT_SCENARIO),
        Case::every("devices", "devices"),
        Case::every("bridge", "bridge"),
        Case { cpus: 4, ..Case::every("smp", "smp") },
        Case::every("policies", "policies"),
        Case::every("hot-plug", "hot-plug"),
        Case { words: "soak.seconds=5", ..Case::every("soak", "soak") },
        Case { extra: "-device pci-testdev", ..Case::default("default-with-testdev", Expect::Pass) },
        // In 64-bit mode with a Linux zero page, as loaders without PVH enter.
        Case { words: "entry=zero-page", on: ACPI, ..Case::default("by-zero-page", Expect::Pass) },
        Case { words: deferred, ..Case::new("devices-deferred", "devices", Expect::Pass) },
        Case { words: "soak.seconds=5 policy=deferred", ..Case::new("soak-deferred", "soak", Expect::Pass) },
    ]
}

/// Disks by the kernel's own drivers. Each scenario holds every request against what it may ask of the IOMMU.
fn disks() -> Vec<Case> {
    // No indirect descriptors: short chains, and fewer of them. Transfers of four pages at most.
    let (chains, short) = ("-global virtio-blk-pci.indirect_desc=off", "-global nvme.mdts=2");
    vec![
        Case::every("nvme", "nvme"),
        Case { extra: short, ..Case::new("nvme-short-transfers", "nvme", Expect::Pass) },
        Case::every("block", "block"),
        Case { extra: chains, ..Case::new("block-without-indirect", "block", Expect::Pass) },
        Case { iommu: Some(Iommu::Off), ..Case::new("block-direct", "block-direct", Expect::Pass) },
    ]
}

/// Interrupts: the IOMMU's own by its line everywhere, those of endpoints by messages where a controller takes some.
fn interrupts() -> Vec<Case> {
    let refused = Expect::FailNaming(&["a PLIC takes no messages"]);
    // Where the lines of microvm's slots go only its AML says.
    let untold = Expect::FailNaming(&["interrupts.line", "AML"]);
    vec![
        Case { on: On::EveryBut(Arch::X86_64, Iommu::Mmio), ..Case::every("interrupts", "interrupts") },
        Case { on: On::MmioOf(&[Arch::X86_64]), ..Case::new("interrupts", "interrupts", untold) },
        Case { on: On::EveryOf(&[Arch::X86_64, Arch::Aarch64]), ..Case::every("messages", "messages") },
        Case { on: On::HomeOf(&[Arch::Riscv64]), ..Case::new("messages", "messages", refused) },
    ]
}

/// Devices that can be kept apart, and devices that cannot.
fn groups() -> Vec<Case> {
    let (apart, together): (&[&str], &[&str]) =
        (&["@@ check groups.reach ok", "blocked"], &["@@ check groups.reach ok", "together"]);
    let case = |name, place, words| Case { place, ..Case::new(name, "groups", Expect::PassNaming(words)) };
    vec![
        case("groups-root-bus", Place::RootBus, apart),
        case("groups-root-ports", Place::RootPorts, apart),
        case("groups-functions", Place::Functions, together),
        case("groups-switch", Place::Switch, together),
        Case { on: On::Every, ..case("groups-pci-bridge", Place::PciBridge, together) },
    ]
}

/// Nested domains, by which `edu` reaches memory through two levels, and the draft's contexts, on a model of the
/// device: in the kernel, and on a bus.
fn draft() -> Vec<Case> {
    let on_bus = &["@@ check device ok", "a virtio-iommu at 0000:00:01.0"];
    // The guest is offered no smaller pages than the machine's IOMMU can map.
    let coarse = Expect::PassNaming(&["guest:", "granule 0x10000, as here"]);
    vec![
        Case::every("nesting", "nesting"),
        Case { extra: GRANULE_64K, since: NEWER, ..Case::new("nesting-granule-64k", "nesting", coarse) },
        Case::every("contexts", "contexts"),
        Case { on: On::VhostUser, ..Case::new("contexts", "contexts", Expect::PassNaming(on_bus)) },
    ]
}

/// Devices behind bridges. What is behind a bypassing root bus no IOMMU knows, and the kernel says so.
fn places() -> Vec<Case> {
    let two_roots = On::HomeOf(&[Arch::X86_64, Arch::Aarch64]);
    let behind = |name, place| Case { place, ..Case::default(name, Expect::Pass) };
    vec![
        behind("root-ports", Place::RootPorts),
        behind("switch", Place::Switch),
        Case { on: two_roots, ..behind("second-root", Place::SecondRoot) },
        Case {
            on: two_roots,
            place: Place::BypassingRoot,
            ..Case::default("bypassing-root", Expect::FailNaming(&["the IOMMU does not know the function"]))
        },
    ]
}

/// Kernels that are entered at EL2, on each of their CPUs.
fn from_el2() -> Vec<Case> {
    let entered = |case| Case { on: On::HomeOf(&[Arch::Aarch64]), extra: EL2, ..case };
    vec![
        entered(Case::default("from-el2", Expect::Pass)),
        entered(Case { cpus: 4, ..Case::new("smp-from-el2", "smp", Expect::Pass) }),
    ]
}

/// What the IOMMU can be told to be.
fn options() -> Vec<Case> {
    let option = |name, extra| Case { extra, ..Case::default(name, Expect::Pass) };
    let width =
        |name, extra, words| Case { extra, since: NEWER, ..Case::default(name, Expect::PassNaming(words)) };
    let mmio = On::MmioOf(&[Arch::Aarch64, Arch::Riscv64]);
    vec![
        // Where nothing bypasses at first, SeaBIOS waits for its own SATA disks for ever.
        Case {
            on: On::HomeOf(&[Arch::X86_64]),
            ..option("boot-bypass-off", "-global virtio-iommu-pci.boot-bypass=off -machine sata=off")
        },
        Case {
            on: On::HomeOf(&[Arch::Aarch64, Arch::Riscv64]),
            ..option("boot-bypass-off", "-global virtio-iommu-pci.boot-bypass=off")
        },
        width("aw-bits-32", "-global virtio-iommu-pci.aw-bits=32", &["input range", "0x0..=0xffffffff"]),
        width("aw-bits-48", "-global virtio-iommu-pci.aw-bits=48", &["input range", "0x0..=0xffffffffffff"]),
        // All but the last granule, whose last byte no request can name.
        width("aw-bits-64", "-global virtio-iommu-pci.aw-bits=64", &["input range", "..=0xffffffffffffefff"]),
        width("granule-64k", GRANULE_64K, &["granule", "0x10000 bytes"]),
        // The driver has no packed ring, and declines.
        option("packed-offered", "-global virtio-iommu-pci.packed=on"),
        option("no-queue-reset", "-global virtio-iommu-pci.queue_reset=off"),
        // Over PCI QEMU lets the IOMMU reach its own rings through itself, which it does not survive.
        Case {
            on: mmio,
            extra: "-global virtio-iommu-device.iommu_platform=on",
            ..Case::default("access-platform", Expect::PassNaming(&["features", "ACCESS_PLATFORM"]))
        },
        // Elsewhere the machine reserves what it needs, and takes no more.
        Case {
            on: On::HomeOf(&[Arch::Riscv64]),
            since: NEWER,
            reserved: &[0x10_0000..=0x1f_ffff],
            ..Case::default("reserved", Expect::PassNaming(&["0x10", "0x100000..=0x1fffff"]))
        },
        Case {
            on: On::MmioOf(&[Arch::Aarch64]),
            iommu: Some(Iommu::TwoMmio),
            ..Case::new("two-iommus", "two-iommus", Expect::Pass)
        },
    ]
}

/// How deep the IOMMU's queues are. Over PCI the device has 256 at most, which is what the driver takes without a word.
fn queues() -> Vec<Case> {
    let mmio = |name, words, traced| Case {
        on: On::MmioOf(&[Arch::Aarch64, Arch::Riscv64]),
        words,
        extra: "-trace virtio_mmio_write_offset",
        ..Case::default(name, Expect::PassTracing(traced))
    };
    vec![
        mmio("queue-256", "queue=256", &["virtio_mmio_write offset 0x38 value 0x100"]),
        mmio("queue-1024", "queue=1024", &["virtio_mmio_write offset 0x38 value 0x400"]),
        Case { words: "queue=1024", ..Case::default("queue-1024", Expect::Pass) },
        Case {
            words: "queue=65536",
            ..Case::default("queue-too-deep", Expect::FailNaming(&["queue=65536"]))
        },
    ]
}

/// What the operations ask of the device, which does not differ between architectures. Instructions are no matter for a test.
fn counted() -> Vec<Case> {
    // The clock is as in `bench::ICOUNT`.
    let extra = "-icount shift=0,sleep=off -trace memory_region_ops_read -trace memory_region_ops_write";
    let case = |name, scenario, judge| {
        let counted = Case::new(name, scenario, Expect::Counts(judge));
        Case { on: On::HomeOf(&[Arch::X86_64]), words: bench::COUNT, extra, ..counted }
    };
    vec![
        Case { cpus: bench::COUNT_CPUS, ..case("bench-counts", bench::SCENARIO, counts::judge) },
        case("bench-counts-contexts", bench::CONTEXTS, counts::judge_contexts),
    ]
}

/// Wrong uses of the driver, each of which one check must notice.
fn caught() -> Vec<Case> {
    vec![
        Case::new("leak", "leak", Expect::OnlyFailedCheck("leak.freed-memory-untouched")),
        Case::new("early", "early", Expect::OnlyFailedCheck("early.freed-memory-untouched")),
        Case::new("lie", "lie", Expect::OnlyFailedCheck("lie.refused-attach-is-reported")),
    ]
}

/// Machines and command lines that lack something: a clear line, an orderly end.
fn bad_input() -> Vec<Case> {
    let naming = Expect::FailNaming;
    let one_queue = "-global nvme.max_ioqpairs=1";
    vec![
        Case { iommu: Some(Iommu::Off), ..Case::default("iommu-off", naming(&["no virtio-iommu"])) },
        Case { disk: DiskDevice::Absent, ..Case::default("no-disk", naming(&["disk"])) },
        Case { disk: DiskDevice::Absent, ..Case::new("no-nvme", "nvme", naming(&["NVMe", "010802"])) },
        Case {
            extra: one_queue,
            ..Case::new("nvme-one-queue", "nvme", Expect::OnlyFailedCheck("nvme.attached"))
        },
        Case { words: "hide=VIOT", on: ACPI, ..Case::default("no-viot", naming(&["VIOT"])) },
        Case { words: "viot=cut", on: ACPI, ..Case::default("viot-cut", naming(&["VIOT"])) },
        Case { words: "viot=stray", on: ACPI, ..Case::default("viot-stray", naming(&["VIOT"])) },
        Case { words: "policy=lazy", ..Case::new("unknown-policy", "devices", naming(&["policy=lazy"])) },
        Case { words: "soak.seconds=0", ..Case::new("soak-of-nothing", "soak", naming(&["soak.seconds=0"])) },
        Case::new("unknown-scenario", "no-such-scenario", naming(&["no-such-scenario"])),
    ]
}

/// A network that is not what the guest needs: one check fails, within the deadline.
fn bad_network() -> Vec<Case> {
    let case = |name, words: &'static [&'static str]| Case::new(name, "devices", Expect::FailNaming(words));
    let (refused, silence) =
        (&["FAIL", "net", "connecting", "refused"], &["FAIL", "net", "fetching", "nothing moved"]);
    let digest = &["FAIL", "net", "fetching", "SHA-256", "instead of 00"];
    vec![
        Case { peer: Peer::Refusing, ..case("server-refuses", refused) },
        Case { peer: Peer::Silent, ..case("server-is-silent", silence) },
        Case { words: "net.sha256=00", ..case("server-sends-another-file", digest) },
        Case { words: "net.port=65536", ..case("server-has-no-port", &["FAIL", "net.port"]) },
    ]
}

/// Guests that crash, and guests that misbehave towards the harness.
fn broken_guests() -> Vec<Case> {
    let silent =
        Expect::Because(|reason| matches!(reason, Reason::NothingPrinted), "the guest printed nothing");
    let half = Expect::Because(|reason| matches!(reason, Reason::NoEnd), "the guest stopped without an end");
    let fault = |archs, words| Case {
        on: On::HomeOf(archs),
        ..Case::new("fault", "page-fault", Expect::Panic(words))
    };
    let babble = Expect::Because(|reason| matches!(reason, Reason::UnknownLine(_)), "an unknown line");
    vec![
        Case::new("panic", "panic", Expect::Panic(&["panic at ", ".rs:"])),
        fault(&[Arch::X86_64], &["exception 14", " at 0x", "rax ", "rsp "]),
        fault(&[Arch::Aarch64], &["exception 0: ", "data abort", "read at 0x", "x30 ", "spsr "]),
        fault(&[Arch::Riscv64], &["exception 0xd: load page fault, at 0x", "address 0x", "ra  ", "sstatus "]),
        Case { deadline: SILENCE, ..Case::new("silent", "silent", silent) },
        Case { deadline: SILENCE, ..Case::new("stops-half-way", "half", half) },
        Case::new("unknown-line", "babble", babble),
    ]
}
