//! What a device is made with: features, ranges, limits, and its configuration space as bytes.

use core::ops::RangeInclusive;

use crate::number::{CONFIG_BYPASS, CONFIG_LEN, feature};
use crate::quirks::Quirks;

/// The properties of one device.
///
/// The default is strict and modern: the features that QEMU offers, 4 KiB granule, 39 input bits, every domain ID, 512
/// bytes of properties, bypass at boot.
///
/// # Examples
///
/// ```
/// use virtio_iommu_model::{Config, Device};
///
/// let config = Config { domain_range: 5..=7, ..Config::default() };
/// let device = Device::new(config);
/// assert_eq!(device.status(), 0);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Features that are offered, [`feature`]. RING_PACKED is never offered.
    pub features: u64,
    /// The lowest bit is the granule. R-03 wants one bit set; 0 makes a device that drivers must refuse.
    pub page_size_mask: u64,
    /// IOVAs that can be mapped, when INPUT_RANGE is offered.
    pub input_range: RangeInclusive<u64>,
    /// Domain IDs that can be used, when DOMAIN_RANGE is offered.
    pub domain_range: RangeInclusive<u32>,
    /// Bytes of properties in a PROBE.
    pub probe_size: u32,
    /// `bypass` after a system reset (R-04).
    pub bypass: bool,
    /// Length of the configuration space: 40, or 36 as before virtio 1.2.
    pub config_len: usize,
    /// Largest sizes of the request queue and the event queue; 0 means that the queue is not there.
    pub queue_sizes: [u16; 2],
    /// Whether a domain takes more than one endpoint; UNSUPP if not (R-16).
    pub shared_domains: bool,
    /// NOMEM beyond this many domains.
    pub max_domains: usize,
    /// NOMEM beyond this many mappings in one domain.
    pub max_mappings: usize,
    /// Fault records kept while no event buffer is posted; further ones are dropped (R-50).
    pub held_events: usize,
    /// Requests that the log keeps; 0 turns it off.
    pub log_limit: usize,
    /// Groups of page requests that can wait for an answer, on a device of the draft; more are dropped.
    pub page_groups: usize,
    /// Deviations from the standard.
    pub quirks: Quirks,
}

/// What QEMU offers by default, bit for bit.
const QEMU_FEATURES: u64 = feature::INPUT_RANGE
    | feature::DOMAIN_RANGE
    | feature::MAP_UNMAP
    | feature::PROBE
    | feature::MMIO
    | feature::BYPASS_CONFIG
    | feature::RING_INDIRECT_DESC
    | feature::RING_EVENT_IDX
    | feature::VERSION_1
    | feature::RING_RESET;

impl Default for Config {
    fn default() -> Self {
        Self {
            features: QEMU_FEATURES,
            page_size_mask: !0xfff,
            input_range: 0..=(1 << 39) - 1,
            domain_range: 0..=u32::MAX,
            probe_size: 512,
            bypass: true,
            config_len: CONFIG_LEN,
            queue_sizes: [256, 256],
            shared_domains: true,
            max_domains: 65_536,
            max_mappings: 1 << 20,
            held_events: 0,
            log_limit: 65_536,
            page_groups: 32,
            quirks: Quirks::default(),
        }
    }
}

impl Config {
    /// A device of the draft with contexts, which no VMM has by itself (PROTOCOL 5.8): strict, as the default, with its
    /// feature bit.
    pub fn contexts() -> Self {
        Self { features: QEMU_FEATURES | feature::ATTACH_TABLE, ..Self::default() }
    }

    /// QEMU 10.0 on q35.
    pub fn qemu_10() -> Self {
        Self { quirks: Quirks::qemu_10(), ..Self::default() }
    }

    /// QEMU 7.2: 64 input bits.
    pub fn qemu_7_2() -> Self {
        Self { quirks: Quirks::qemu_7_2(), input_range: 0..=u64::MAX, ..Self::default() }
    }

    /// QEMU 11.1 on q35.
    pub fn qemu_11_1() -> Self {
        Self { quirks: Quirks::qemu_11_1(), ..Self::default() }
    }

    /// A device like cloud-hypervisor 54's.
    pub fn cloud_hypervisor() -> Self {
        Self {
            features: feature::MAP_UNMAP | feature::PROBE | feature::BYPASS_CONFIG | feature::VERSION_1,
            page_size_mask: 0x20_1000,
            probe_size: 24,
            bypass: false,
            quirks: Quirks::cloud_hypervisor(),
            ..Self::default()
        }
    }

    /// A device like crosvm's, with a feature bit that virtio 1.3 does not know.
    pub fn crosvm() -> Self {
        Self {
            features: feature::INPUT_RANGE
                | feature::MAP_UNMAP
                | feature::PROBE
                | feature::MMIO
                | feature::RING_EVENT_IDX
                | feature::VERSION_1
                | 1 << 42,
            input_range: 0..=u64::MAX,
            probe_size: 24,
            bypass: false,
            quirks: Quirks::crosvm(),
            ..Self::default()
        }
    }

    /// Whether every feature of the mask is offered.
    pub fn offers(&self, features: u64) -> bool {
        self.features & !feature::RING_PACKED & features == features
    }

    /// The smallest page, or `None` for a mask of 0 (against R-03).
    pub fn granule(&self) -> Option<u64> {
        (self.page_size_mask != 0).then(|| 1 << self.page_size_mask.trailing_zeros())
    }

    /// The configuration space (PROTOCOL 1.2). Fields whose feature is not offered read 0.
    pub(crate) fn space(&self, bypass: u8) -> [u8; CONFIG_LEN] {
        let mut space = [0; CONFIG_LEN];
        space[..8].copy_from_slice(&self.page_size_mask.to_le_bytes());
        if self.offers(feature::INPUT_RANGE) {
            space[8..16].copy_from_slice(&self.input_range.start().to_le_bytes());
            space[16..24].copy_from_slice(&self.input_range.end().to_le_bytes());
        }
        if self.offers(feature::DOMAIN_RANGE) {
            space[24..28].copy_from_slice(&self.domain_range.start().to_le_bytes());
            space[28..32].copy_from_slice(&self.domain_range.end().to_le_bytes());
        }
        if self.offers(feature::PROBE) {
            space[32..36].copy_from_slice(&self.probe_size.to_le_bytes());
        }
        if self.offers(feature::BYPASS_CONFIG) {
            space[CONFIG_BYPASS] = bypass;
        }
        space
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_offers_what_qemu_does() {
        assert_eq!(Config::default().features, 0x101_3000_0077);
    }

    #[test]
    fn space_has_fields_at_their_offsets() {
        let space = Config { domain_range: 5..=7, ..Config::default() }.space(1);
        assert_eq!(space[..8], (!0xfff_u64).to_le_bytes());
        assert_eq!(space[16..24], 0x7f_ffff_ffff_u64.to_le_bytes());
        assert_eq!(space[24..32], [5, 0, 0, 0, 7, 0, 0, 0]);
        assert_eq!(space[32..40], [0, 2, 0, 0, 1, 0, 0, 0]);
    }
}
