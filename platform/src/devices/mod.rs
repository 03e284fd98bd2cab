//! Drivers of devices.

pub mod block;
pub mod dma;
pub mod edu;
pub mod entropy;
pub mod network;
pub mod nvme;
pub mod storage;
pub mod virtio;
