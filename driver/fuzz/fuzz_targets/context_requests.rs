//! Requests of the draft and of the standard, right and wrong, to a device of the draft, alone and with nested spaces behind it.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = virtio_iommu_fuzz::requests::run(data);
});
