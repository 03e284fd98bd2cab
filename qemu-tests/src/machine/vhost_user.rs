//! An IOMMU that another process serves.

use std::path::Path;

use super::arguments::Arguments;

/// Bytes of its configuration, with the registers of its agents.
const CONFIG_BYTES: u32 = 128;

/// The arguments that make it, of the kind of vhost-user device that can be any, and that share all of the memory with
/// whoever serves it.
pub(super) fn arguments(arguments: &mut Arguments, socket: &Path, memory_mib: u32) {
    arguments.words(&format!("-object memory-backend-memfd,id=memory,size={memory_mib}M,share=on"));
    arguments.words("-machine memory-backend=memory");
    arguments.words("-chardev").joined("socket,id=iommu,path=", socket);
    arguments.words(&format!(
        "-device vhost-user-test-device-pci,addr=1,chardev=iommu,virtio-id=23,num_vqs=2,vq_size=256,config_size={CONFIG_BYTES}"
    ));
}
