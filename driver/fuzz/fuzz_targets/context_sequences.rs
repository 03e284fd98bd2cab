//! Operations on contexts and nested spaces, over the model, which answers late, badly, or not at all.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = virtio_iommu_fuzz::contexts::run(data);
});
