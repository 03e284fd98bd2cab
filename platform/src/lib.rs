//! A small kernel, and the library that it is made of: everything that the virtio-iommu driver needs from a kernel, and
//! nothing more.
//!
//! One address space; one CPU, unless a scenario starts the others; the kernel polls, unless a scenario sleeps until an
//! interrupt comes. What differs between architectures is in [`arch`]; the
//! rest also builds on a host, where its logic is tested.
//!
//! ```text
//! boot        entry, memory map, heap, page tables, then the binary's main function
//! memory      frames, DMA pages, mapping of registers
//! acpi        tables by RSDT or XSDT; MCFG, MADT
//! firmware    what the boot loader hands over: start info, device tree
//! image       where the kernel itself lies
//! pci         configuration space, functions, BARs, capabilities, bus mastering
//! interrupts  handlers of devices' lines and messages
//! cpus        the other CPUs, as a team
//! devices     drivers of test devices
//! machine     all of the above, discovered in order
//! iommu       the virtio-iommu: what its driver needs, and bring-up
//! guest       a guest of this kernel, with a virtio-iommu in software (feature `contexts`)
//! scenario    what the kernel can be asked to do
//! report      the line protocol to the host
//! ```

#![cfg_attr(target_os = "none", no_std)]

extern crate alloc;

pub mod acpi;
pub mod arch;
pub mod boot;
pub mod command_line;
pub mod console;
pub mod cpus;
pub mod devices;
pub mod firmware;
#[cfg(feature = "contexts")]
pub mod guest;
#[cfg(target_os = "none")]
pub mod image;
pub mod interrupts;
pub mod iommu;
pub mod lock;
pub mod machine;
pub mod memory;
pub mod mmio;
#[cfg(target_os = "none")]
mod panic;
pub mod pci;
pub mod power;
pub mod range;
pub mod report;
pub mod scenario;
pub mod time;
