//! Drivers of devices.

pub mod edu;
pub mod virtio;
