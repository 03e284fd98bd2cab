//! Other crates' DMA interfaces over this driver.

#[cfg(feature = "dma-api-0_10")]
pub mod dma_api_0_10;
pub mod slot;
#[cfg(feature = "virtio-drivers")]
pub mod virtio_drivers;
