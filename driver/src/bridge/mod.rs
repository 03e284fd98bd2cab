//! Other crates' DMA interfaces over this driver.

pub mod slot;
#[cfg(feature = "virtio-drivers")]
pub mod virtio_drivers;
