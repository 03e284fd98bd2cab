//! Other crates' DMA interfaces over this driver.

#[cfg(feature = "virtio-drivers")]
pub mod virtio_drivers;
