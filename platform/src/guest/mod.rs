//! A guest inside this kernel: memory with addresses of its own, and a virtio-iommu that is software.
//!
//! ```text
//!   the guest's driver, a Viommu<Guest>
//!        | rings in the guest's memory, registers by calls        memory   Guest: guest-physical addresses over frames
//!        v
//!   the model of the device                                       device   VirtualIommu: the model, and the way to it
//!        | each ATTACH, MAP and UNMAP, before it is answered
//!        v
//!   spaces nested in the guest's memory                           nested   NestedIommu: what it carries them out by
//!        | shadows
//!        v
//!   this kernel's driver, a Viommu<KernelPlatform> -> the machine's virtio-iommu
//! ```
//! Without the lower half the device's endpoints are software too, and do DMA through the model alone.

mod device;
mod memory;
mod nested;
mod work;

pub use device::VirtualIommu;
pub use memory::{Guest, NoMemory};
pub use nested::{NestedIommu, PassedOn};
pub use work::Work;
