//! The device's configuration space.

use core::mem::{offset_of, size_of};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The layout of the whole space (virtio 1.4, IOMMU device, device configuration layout).
///
/// Devices from before 1.2 end at `bypass`. A field is valid only when its feature was negotiated.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[doc(alias = "virtio_iommu_config")]
pub(crate) struct ConfigSpace {
    pub page_size_mask: U64,
    pub input_start: U64,
    pub input_end: U64,
    pub domain_start: U32,
    pub domain_end: U32,
    pub probe_size: U32,
    pub bypass: u8,
    pub reserved: [u8; 3],
}

const _: () = assert!(size_of::<ConfigSpace>() == 40);

/// Where each field lies, in bytes.
pub(crate) mod offset {
    use super::*;
    pub(crate) const PAGE_SIZE_MASK: usize = offset_of!(ConfigSpace, page_size_mask);
    pub(crate) const INPUT_START: usize = offset_of!(ConfigSpace, input_start);
    pub(crate) const INPUT_END: usize = offset_of!(ConfigSpace, input_end);
    pub(crate) const DOMAIN_START: usize = offset_of!(ConfigSpace, domain_start);
    pub(crate) const DOMAIN_END: usize = offset_of!(ConfigSpace, domain_end);
    pub(crate) const PROBE_SIZE: usize = offset_of!(ConfigSpace, probe_size);
    pub(crate) const BYPASS: usize = offset_of!(ConfigSpace, bypass);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_the_standard_says() {
        use offset::*;
        let all = [PAGE_SIZE_MASK, INPUT_START, INPUT_END, DOMAIN_START, DOMAIN_END, PROBE_SIZE, BYPASS];
        assert_eq!(all, [0, 8, 16, 24, 28, 32, 36]);
    }

    #[test]
    fn a_hand_written_space_decodes() {
        let bytes: [u8; 40] = [
            0x00, 0xf0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, // mask ~0xfff
            0x00, 0x10, 0, 0, 0, 0, 0, 0, // input start 0x1000
            0xff, 0xff, 0xff, 0xff, 0x7f, 0, 0, 0, // input end 2^39 - 1
            5, 0, 0, 0, // domain start
            7, 0, 0, 0, // domain end
            0x00, 0x02, 0, 0, // probe size 512
            1, 0xaa, 0xbb, 0xcc, // bypass and reserved bytes
        ];
        let space = ConfigSpace::read_from_bytes(&bytes).unwrap();
        assert_eq!(space.page_size_mask.get(), !0xfff);
        assert_eq!((space.input_start.get(), space.input_end.get()), (0x1000, 0x7f_ffff_ffff));
        assert_eq!((space.domain_start.get(), space.domain_end.get()), (5, 7));
        assert_eq!((space.probe_size.get(), space.bypass, space.reserved), (512, 1, [0xaa, 0xbb, 0xcc]));
    }
}
