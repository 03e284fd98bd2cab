//! What device drivers use: memory for DMA, by the endpoint's own addresses.

mod bounce;
mod cpu;
mod device;
mod endpoint;
mod held;
mod lists;
mod msi;
mod operations;
mod pool;
mod scatter;
mod segments;
mod slots;
mod stream;

pub use device::{CoherentMemory, DmaDevice, DmaMapping, PhysSegment, Unmapped};
pub use endpoint::Endpoint;
pub use held::HeldMemory;
pub(crate) use held::{Kept, Release};
pub use msi::MsiDoorbell;
pub use pool::{DmaPool, PoolBuffer};
pub(crate) use scatter::rounded;
pub use segments::{DmaSegment, DmaSegments};
pub use stream::{
    Bidirectional, Bounced, BouncedAccess, CpuAccess, CpuWrites, DeviceWrites, DmaDirection, FromDevice,
    Streaming, ToDevice,
};
