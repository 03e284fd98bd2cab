//! The driver against a device that writes anything into the rings, the configuration and its status.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = virtio_iommu_fuzz::hostile::run(data);
});
