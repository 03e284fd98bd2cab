//! The architectures that there are machines for, and what the harness has to know of each.

use super::Iommu;
use crate::protocol::Statuses;

/// An architecture that there is a machine for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Arch {
    /// QEMU's `q35`; with an IOMMU on virtio over MMIO, its `microvm`, which has slots for that.
    X86_64,
    /// QEMU's `virt` for Arm, with a GICv3.
    Aarch64,
    /// QEMU's `virt` for RISC-V, with OpenSBI.
    Riscv64,
}

/// The file that QEMU loads as the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Image {
    /// The ELF file, as the linker made it.
    Elf,
    /// A flat image with the header of arm64's boot protocol: for an ELF file QEMU passes no device tree.
    Arm64,
}

impl Arch {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::X86_64, Self::Aarch64, Self::Riscv64];

    /// The name, as the kernel prints it and the command line takes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
            Self::Riscv64 => "riscv64",
        }
    }

    /// The Rust target that its kernel is built for.
    #[must_use]
    pub fn target(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-unknown-none",
            Self::Aarch64 => "aarch64-unknown-none",
            Self::Riscv64 => "riscv64gc-unknown-none-elf",
        }
    }

    /// The name of its QEMU.
    #[must_use]
    pub fn qemu(self) -> &'static str {
        match self {
            Self::X86_64 => "qemu-system-x86_64",
            Self::Aarch64 => "qemu-system-aarch64",
            Self::Riscv64 => "qemu-system-riscv64",
        }
    }

    /// What its kernel is handed to QEMU as.
    #[must_use]
    pub fn image(self) -> Image {
        match self {
            Self::X86_64 | Self::Riscv64 => Image::Elf,
            Self::Aarch64 => Image::Arm64,
        }
    }

    /// The statuses that QEMU ends with when the guest ends it.
    ///
    /// The debug-exit device of x86 makes `value << 1 | 1` of the kernel's value, semihosting leaves it as it is, and so
    /// does RISC-V's test finisher, which has a word of its own for success. A power-off is 0 everywhere.
    #[must_use]
    pub fn statuses(self) -> Statuses {
        match self {
            Self::X86_64 => Statuses { pass: 33, fail: 35, panic: 37 },
            Self::Aarch64 => Statuses { pass: 16, fail: 17, panic: 18 },
            Self::Riscv64 => Statuses { pass: 0, fail: 17, panic: 18 },
        }
    }

    /// The arguments that make the bare machine for such an IOMMU.
    pub(super) fn machine(self, iommu: Iommu) -> &'static str {
        match self {
            Self::X86_64 if iommu == Iommu::Mmio => {
                "-M microvm,pcie=on,acpi=on,isa-serial=on,rtc=on,pit=on,pic=on -accel tcg \
                 -device isa-debug-exit,iobase=0xf4,iosize=4"
            }
            Self::X86_64 => "-M q35 -accel tcg -device isa-debug-exit,iobase=0xf4,iosize=4",
            Self::Aarch64 => {
                "-M virt,gic-version=3 -cpu cortex-a72 -accel tcg -semihosting-config enable=on,target=native"
            }
            Self::Riscv64 => "-M virt -accel tcg",
        }
    }
}
