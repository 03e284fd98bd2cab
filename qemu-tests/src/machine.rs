//! What a machine is made of, and the QEMU arguments that make it.
//!
//! Devices have fixed PCI slots, so that output is the same from run to run, and devices that are added by hand
//! take later ones: 00:01.0 IOMMU, 00:02.0 disk, 00:03.0 entropy, 00:04.0 `edu`, 00:05.0 network, 00:06.0 NVMe disk,
//! 00:07.0 console. All but the IOMMU can be behind bridges instead ([`Place`]).

mod arch;
mod arguments;
mod need;
mod place;
mod vhost_user;

use std::ffi::OsString;
use std::ops::RangeInclusive;
use std::path::PathBuf;

pub use self::arch::{Arch, Image};
pub use self::need::Need;
pub use self::place::Place;

use self::arguments::Arguments;
use crate::device_tree::Claim;
use crate::hot_plug;
use crate::trace;

/// The slots of the endpoints.
const DISK: u8 = 2;
const RNG: u8 = 3;
const EDU: u8 = 4;
const NET: u8 = 5;
const NVME: u8 = 6;
const CONSOLE: u8 = 7;

/// The first function of the second root bus, where each has an IOMMU.
const APART: u16 = 0x1000;

/// The machine's virtio-iommu.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Iommu {
    /// A `virtio-iommu-pci` at 00:01.0.
    Pci,
    /// A `virtio-iommu-device` in the first slot for virtio over MMIO, for all of PCI.
    Mmio,
    /// Two of them, in the first two slots: one for the root bus, one for a second root bus from 0x10 on, where an `edu` is.
    TwoMmio,
    /// One of the draft at 00:01.0, which another process serves over vhost-user. Only that process's own agents are behind it.
    VhostUser,
    /// None; the other devices stay where they are.
    Off,
}

impl Iommu {
    /// What the device tree has to be told of it. The one on PCI it knows by itself, and x86_64 has none.
    pub(crate) fn claims(self, arch: Arch) -> Vec<Claim> {
        match self {
            _ if arch == Arch::X86_64 => Vec::new(),
            Self::Pci | Self::VhostUser | Self::Off => Vec::new(),
            Self::Mmio => vec![Claim { slot: 0, functions: 0..=0xffff }],
            Self::TwoMmio => vec![
                Claim { slot: 0, functions: 0..=APART - 1 },
                Claim { slot: 1, functions: APART..=0xffff },
            ],
        }
    }

    /// The words by which the kernel is told what firmware does not say. `microvm` has its PCI host in AML alone, and says
    /// nothing of the IOMMU in the first of its slots. Of one that has no function behind it no firmware says anything.
    pub(crate) fn words(self, arch: Arch) -> &'static str {
        match (arch, self) {
            (_, Self::VhostUser) => "device=bus",
            (Arch::X86_64, Self::Mmio) => "ecam=0xe0000000 iommu=mmio:0xfeb00000",
            _ => "",
        }
    }

    /// How many there are that are QEMU's own.
    #[must_use]
    pub fn count(self) -> usize {
        match self {
            Self::Off | Self::VhostUser => 0,
            Self::Pci | Self::Mmio => 1,
            Self::TwoMmio => 2,
        }
    }

    /// The arguments that make it. By default the slots have the layout of before virtio 1.0, and an I/O thread takes the
    /// doorbell at its leisure.
    fn arguments(self) -> &'static str {
        match self {
            Self::Pci => "-device virtio-iommu-pci,addr=1",
            Self::Mmio => {
                "-global virtio-mmio.force-legacy=false -global virtio-mmio.ioeventfd=false \
                 -device virtio-iommu-device,bus=virtio-mmio-bus.0,primary-bus=pcie.0"
            }
            Self::TwoMmio => {
                "-global virtio-mmio.force-legacy=false -global virtio-mmio.ioeventfd=false \
                 -device pxb-pcie,id=apart,bus_nr=16,bus=pcie.0,addr=0x9 \
                 -device virtio-iommu-device,bus=virtio-mmio-bus.0,primary-bus=pcie.0 \
                 -device virtio-iommu-device,bus=virtio-mmio-bus.1,primary-bus=apart \
                 -device pcie-root-port,id=apart-port,bus=apart,chassis=9 \
                 -device edu,dma_mask=0xffffffffffffffff,bus=apart-port"
            }
            // Its arguments name a socket.
            Self::VhostUser | Self::Off => "",
        }
    }
}

/// Whether QEMU waits for a debugger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gdb {
    /// It starts at once.
    Off,
    /// It listens on port 1234 and does not start the guest before it is told to.
    Wait,
}

/// One machine, ready to be started.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Its architecture.
    pub arch: Arch,
    /// Its IOMMU.
    pub iommu: Iommu,
    /// Addresses that the IOMMU on PCI reserves.
    pub reserved: Vec<RangeInclusive<u64>>,
    /// The socket at which an IOMMU over vhost-user is served.
    pub vhost_user: Option<PathBuf>,
    /// Where the other devices are.
    pub place: Place,
    /// How many CPUs there are.
    pub cpus: u32,
    /// The image of the disk; none leaves the device out.
    pub disk: Option<PathBuf>,
    /// The image of the NVMe disk; none leaves the device out.
    pub nvme: Option<PathBuf>,
    /// Where what comes out of the console goes; none throws it away.
    pub console: Option<PathBuf>,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// The kernel image, as [`Arch::image`] says.
    pub kernel: PathBuf,
    /// The kernel's command line.
    pub cmdline: String,
    /// The device tree that QEMU hands over instead of its own.
    pub device_tree: Option<PathBuf>,
    /// Where QEMU opens its monitor. There is an empty root port for what is plugged in through it.
    pub monitor: Option<PathBuf>,
    /// Where QEMU writes its trace; none switches it off.
    pub trace: Option<PathBuf>,
    /// Arguments for QEMU that come last.
    pub extra: Vec<OsString>,
    /// Whether to wait for a debugger.
    pub gdb: Gdb,
}

impl Machine {
    /// The default machine with this kernel: an IOMMU on PCI, no bridges, no disks, one CPU, 256 MiB, no trace.
    #[must_use]
    pub fn new(arch: Arch, kernel: PathBuf) -> Self {
        Self {
            arch,
            iommu: Iommu::Pci,
            reserved: Vec::new(),
            vhost_user: None,
            place: Place::RootBus,
            cpus: 1,
            disk: None,
            nvme: None,
            console: None,
            memory_mib: 256,
            kernel,
            cmdline: String::new(),
            device_tree: None,
            monitor: None,
            trace: None,
            extra: Vec::new(),
            gdb: Gdb::Off,
        }
    }

    /// The arguments for the architecture's QEMU.
    #[must_use]
    pub fn arguments(&self) -> Vec<OsString> {
        let mut arguments = Arguments::default();
        arguments.words(self.arch.machine(self.iommu));
        arguments.words("-smp").word(self.cpus.to_string());
        arguments.words("-m").word(self.memory_mib.to_string());
        arguments.words("-nodefaults -no-reboot -display none -serial stdio");
        if self.reserved.is_empty() {
            arguments.words(self.iommu.arguments());
        } else {
            arguments.words("-device").word(self.with_reserved());
        }
        if let Some(socket) = &self.vhost_user {
            vhost_user::arguments(&mut arguments, socket, self.memory_mib);
        }
        self.devices(&mut arguments);
        if let Some(monitor) = &self.monitor {
            for word in hot_plug::arguments(self.arch, monitor) {
                arguments.word(word);
            }
        }
        if let Some(file) = &self.trace {
            arguments.words("-D").word(file);
            for event in trace::EVENTS {
                arguments.words("-trace").word(event);
            }
        }
        match self.gdb {
            Gdb::Wait => arguments.words("-s -S"),
            Gdb::Off => &mut arguments,
        };
        if let Some(tree) = &self.device_tree {
            arguments.words("-dtb").word(tree);
        }
        arguments.words("-kernel").word(&self.kernel);
        arguments.words("-append").word(&self.cmdline);
        arguments.all(&self.extra);
        arguments.finish()
    }

    /// The IOMMU on PCI with what it reserves. A list has no other form than this.
    fn with_reserved(&self) -> String {
        let region =
            |region: &RangeInclusive<u64>| format!("\"{:#x}:{:#x}:0\"", region.start(), region.end());
        let regions: Vec<String> = self.reserved.iter().map(region).collect();
        let list = regions.join(",");
        format!("{{\"driver\":\"virtio-iommu-pci\",\"addr\":\"0x1\",\"reserved-regions\":[{list}]}}")
    }

    /// The devices but for the IOMMU, which must be there before them.
    fn devices(&self, arguments: &mut Arguments) {
        let mut slots = vec![RNG, EDU, NET, CONSOLE];
        slots.extend(self.disk.as_ref().map(|_| DISK));
        slots.extend(self.nvme.as_ref().map(|_| NVME));
        arguments.words(&self.place.bridges(&slots));
        // Without the first a virtio device goes around the IOMMU, and QEMU wants the second beside it.
        let virtio = |slot| format!("iommu_platform=on,disable-legacy=on,{}", self.place.of(slot));
        let device = |words: &str, place: &str| format!("-device {words},{place}");
        if let Some(disk) = &self.disk {
            arguments.words("-drive").joined("if=none,id=disk,format=raw,file=", disk);
            arguments.words(&device("virtio-blk-pci,drive=disk", &virtio(DISK)));
        }
        arguments.words("-object rng-builtin,id=entropy");
        arguments.words(&device("virtio-rng-pci,rng=entropy", &virtio(RNG)));
        arguments.words(&device("edu,dma_mask=0xffffffffffffffff", &self.place.of(EDU)));
        if let Some(nvme) = &self.nvme {
            arguments.words("-drive").joined("if=none,id=nvme,format=raw,file=", nvme);
            arguments.words(&device("nvme,drive=nvme,serial=0", &self.place.of(NVME)));
        }
        arguments.words("-netdev user,id=net");
        arguments.words(&device("virtio-net-pci,netdev=net,romfile=", &virtio(NET)));
        match &self.console {
            Some(file) => arguments.words("-chardev").joined("file,id=console,path=", file),
            None => arguments.words("-chardev null,id=console"),
        };
        arguments.words(&device("virtio-serial-pci", &virtio(CONSOLE)));
        arguments.words("-device virtconsole,chardev=console");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(machine: &Machine) -> String {
        let words: Vec<String> =
            machine.arguments().iter().map(|word| word.to_string_lossy().into_owned()).collect();
        words.join(" ")
    }

    #[test]
    fn the_default_machine_has_every_device_in_its_slot() {
        let mut machine = Machine::new(Arch::X86_64, "kernel".into());
        machine.disk = Some("disk.img".into());
        machine.nvme = Some("nvme.img".into());
        machine.console = Some("console.txt".into());
        machine.cmdline = "scenario=default seed=0x1".into();
        let line = joined(&machine);
        for part in [
            "virtio-iommu-pci,addr=1",
            "addr=0x2",
            "virtio-rng-pci,rng=entropy",
            "addr=0x3",
            "edu,dma_mask=0xffffffffffffffff,bus=pcie.0,addr=0x4",
            "file=nvme.img",
            "nvme,drive=nvme,serial=0,bus=pcie.0,addr=0x6",
            "virtio-net-pci,netdev=net",
            "addr=0x5",
            "file,id=console,path=console.txt",
            "virtio-serial-pci",
            "addr=0x7",
        ] {
            assert!(line.contains(part), "{part} is missing in {line}");
        }
        assert!(machine.arguments().contains(&OsString::from("scenario=default seed=0x1")));
        assert!(!line.contains("-trace") && !line.contains("-S"));
    }

    #[test]
    fn bridges_come_before_what_is_behind_them() {
        let mut machine = Machine::new(Arch::X86_64, "kernel".into());
        machine.place = Place::RootPorts;
        let line = joined(&machine);
        let at = |part: &str| line.find(part).unwrap_or_else(|| panic!("{part} is missing in {line}"));
        assert!(at("virtio-iommu-pci,addr=1") < at("pcie-root-port,id=port4"));
        assert!(at("pcie-root-port,id=port4") < at("edu,dma_mask=0xffffffffffffffff,bus=port4"));
        assert!(!line.contains("port2") && !line.contains("port6"), "no disk, no port for it: {line}");
    }

    #[test]
    fn a_served_iommu_shares_the_memory() {
        let mut machine = Machine::new(Arch::X86_64, "kernel".into());
        machine.iommu = Iommu::VhostUser;
        machine.vhost_user = Some("a,b.sock".into());
        let line = joined(&machine);
        assert!(line.contains("size=256M,share=on") && line.contains("path=a,,b.sock"), "{line}");
        assert!(line.contains("vhost-user-test-device-pci,addr=1") && !line.contains("virtio-iommu-pci"));
    }

    #[test]
    fn reserved_regions_are_a_list() {
        let mut machine = Machine::new(Arch::Riscv64, "kernel".into());
        machine.reserved = vec![0x10_0000..=0x1f_ffff, 0..=0xfff];
        let expected = "{\"driver\":\"virtio-iommu-pci\",\"addr\":\"0x1\",\
            \"reserved-regions\":[\"0x100000:0x1fffff:0\",\"0x0:0xfff:0\"]}";
        assert!(machine.arguments().contains(&OsString::from(expected)), "{}", joined(&machine));
    }

    #[test]
    fn devices_can_be_left_out() {
        let mut machine = Machine::new(Arch::X86_64, "kernel".into());
        machine.iommu = Iommu::Off;
        let line = joined(&machine);
        assert!(!line.contains("virtio-iommu") && !line.contains("virtio-blk") && !line.contains("nvme"));
    }

    #[test]
    fn extra_arguments_come_last_and_a_trace_names_its_events() {
        let mut machine = Machine::new(Arch::X86_64, "kernel".into());
        machine.trace = Some("trace.log".into());
        machine.extra = vec!["-device".into(), "pci-testdev".into()];
        let line = joined(&machine);
        assert!(line.contains("-D trace.log -trace virtio_iommu_attach"));
        assert!(line.ends_with("-device pci-testdev"));
        assert!(!line.contains("translate"));
    }

    #[test]
    fn commas_in_a_path_are_doubled() {
        let mut machine = Machine::new(Arch::X86_64, "kernel".into());
        machine.disk = Some("a,b.img".into());
        assert!(joined(&machine).contains("file=a,,b.img"));
    }
}
