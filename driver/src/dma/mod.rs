//! What device drivers use: memory for DMA, by the endpoint's own addresses.

mod bounce;
mod device;
mod endpoint;
mod held;
mod msi;
mod operations;
mod scatter;
mod segments;

pub use device::{CoherentMemory, DmaDevice, DmaMapping, PhysSegment, Unmapped};
pub use endpoint::Endpoint;
pub use held::HeldMemory;
pub(crate) use held::Release;
pub use msi::MsiDoorbell;
pub use segments::{DmaSegment, DmaSegments};
