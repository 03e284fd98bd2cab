//! What device drivers use: memory for DMA, by the endpoint's own addresses.

mod bounce;
mod device;
mod endpoint;
mod held;
mod msi;
mod scatter;

pub use device::{CoherentMemory, DmaDevice, DmaMapping, PhysSegment};
pub use endpoint::Endpoint;
pub use held::HeldMemory;
pub(crate) use held::Release;
pub use msi::MsiDoorbell;
