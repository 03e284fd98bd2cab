//! Which QEMU can make a machine.

use super::{Arch, Iommu};
use crate::qemu::{OLDEST, Version};

/// What a machine needs of QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need {
    /// The oldest version that can make it.
    pub oldest: Version,
    /// What is missing in those before.
    pub why: &'static str,
}

impl Need {
    /// What a machine needs, or why no QEMU has it.
    ///
    /// # Errors
    ///
    /// Where there is no such machine.
    pub fn of(arch: Arch, iommu: Iommu) -> Result<Self, &'static str> {
        let newer = Version { major: 10, minor: 0, micro: 0 };
        match (arch, iommu) {
            (Arch::X86_64, Iommu::TwoMmio) => Err("microvm has no second root bus (pxb-pcie)"),
            (Arch::Riscv64, Iommu::TwoMmio) => Err("riscv's virt has no second root bus (pxb-pcie)"),
            (Arch::Riscv64, Iommu::Pci) => {
                Ok(Self { oldest: newer, why: "no virtio-iommu-pci on riscv's virt before 10.0" })
            }
            (_, Iommu::VhostUser) => Ok(Self {
                oldest: Version { major: 11, minor: 0, micro: 0 },
                why: "no vhost-user device of any kind (vhost-user-test-device-pci) before 11.0",
            }),
            _ => Ok(Self { oldest: OLDEST, why: "its virtio-iommu lacks what the scenarios need" }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_machine_can_be_made_by_some_qemu_or_says_why_not() {
        let oldest = |arch, iommu| Need::of(arch, iommu).map(|need| need.oldest.major);
        assert_eq!(oldest(Arch::X86_64, Iommu::Pci), Ok(7));
        assert!(oldest(Arch::X86_64, Iommu::TwoMmio).unwrap_err().contains("microvm"));
        for iommu in [Iommu::Pci, Iommu::Mmio, Iommu::Off] {
            assert_eq!(oldest(Arch::X86_64, iommu), Ok(7));
            assert_eq!(oldest(Arch::Aarch64, iommu), Ok(7));
        }
        assert_eq!(oldest(Arch::Riscv64, Iommu::Pci), Ok(10));
        assert_eq!(oldest(Arch::Riscv64, Iommu::Mmio), Ok(7));
        assert_eq!(oldest(Arch::X86_64, Iommu::VhostUser), Ok(11));
    }
}
