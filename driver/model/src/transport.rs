//! The face that a virtio transport shows to the driver: features, status, configuration space.

use crate::device::Device;
use crate::number::{CONFIG_BYPASS, CONFIG_LEN, device_status, feature};
use crate::page::PageRequests;
use crate::record::{ConfigWrite, LIST_LIMIT, push_bounded};

impl Device {
    /// Virtio device ID.
    pub const DEVICE_ID: u32 = 23;

    /// Features that are offered.
    pub fn device_features(&self) -> u64 {
        self.iommu.config.features & !feature::RING_PACKED
    }

    /// Takes the driver's features; ignored once FEATURES_OK is set.
    pub fn set_driver_features(&mut self, features: u64) {
        if self.status & device_status::FEATURES_OK != 0 {
            self.violate("core", "features were written after FEATURES_OK", None);
            return;
        }
        self.driver_features = features;
    }

    /// Features that the driver wrote.
    pub fn driver_features(&self) -> u64 {
        self.driver_features
    }

    /// Features in force: what the driver wrote, once FEATURES_OK is set; else 0.
    pub fn negotiated_features(&self) -> u64 {
        self.iommu.negotiated
    }

    /// Device status, for tests; a transport uses [`read_status`](Self::read_status).
    pub fn status(&self) -> u8 {
        self.status
    }

    /// Device status as the driver reads it, which injection can hold back after a reset.
    pub fn read_status(&mut self) -> u8 {
        if self.status == 0 && self.inject.slow_reset > 0 {
            self.inject.slow_reset -= 1;
            return device_status::ACKNOWLEDGE;
        }
        self.status
    }

    /// Takes the driver's status. 0 resets the device.
    ///
    /// FEATURES_OK does not stick when the features are not a subset of those offered, when VERSION_1 is missing, or when
    /// ACCESS_PLATFORM is offered and not accepted.
    pub fn set_status(&mut self, status: u8) {
        if status == 0 {
            self.device_reset();
            return;
        }
        let sticky = self.status & device_status::NEEDS_RESET;
        if self.status & !device_status::NEEDS_RESET & !status != 0 {
            self.violate("core", "a status bit was cleared without a reset", None);
        }
        let mut new = status & !device_status::NEEDS_RESET;
        let newly = new & !self.status;
        if newly & device_status::FEATURES_OK != 0 && !self.accept_features() {
            new &= !device_status::FEATURES_OK;
        }
        if newly & device_status::DRIVER_OK != 0 && new & device_status::FEATURES_OK == 0 {
            self.violate("core", "DRIVER_OK without FEATURES_OK", None);
            new &= !device_status::DRIVER_OK;
        }
        self.status = new | sticky;
    }

    fn accept_features(&mut self) -> bool {
        if self.inject.refuse_features_ok > 0 {
            self.inject.refuse_features_ok -= 1;
            return false;
        }
        let (offered, taken) = (self.device_features(), self.driver_features);
        let subset = taken & !offered == 0;
        let platform = (offered & !taken) & feature::ACCESS_PLATFORM == 0;
        let spent = self.iommu.config.quirks.single_life && self.lived_before;
        let good = subset && platform && taken & feature::VERSION_1 != 0 && !spent;
        if good {
            self.iommu.negotiated = taken;
        }
        good
    }

    /// Resets the device: queues, features and status go; domains too unless a quirk keeps them; `bypass` stays.
    pub(crate) fn device_reset(&mut self) {
        self.lived_before |= self.status & device_status::DRIVER_OK != 0;
        self.status = 0;
        self.driver_features = 0;
        self.iommu.negotiated = 0;
        self.rings = [None, None];
        self.forget_requests();
        self.held_events.clear();
        self.pending_interrupts = [false; 2];
        self.pending_config_interrupt = false;
        self.probed.clear();
        self.ring_error = None;
        self.counters.resets += 1;
        if !self.iommu.config.quirks.domains_survive_reset {
            self.iommu.clear_domains();
        }
        self.pages = PageRequests::default();
    }

    /// Length of the configuration space in bytes.
    pub fn config_len(&self) -> usize {
        self.iommu.config.config_len
    }

    /// Generation of the configuration; takes `&mut` since injection can make it change at each read.
    pub fn config_generation(&mut self) -> u32 {
        if self.inject.generation_changes > 0 {
            self.inject.generation_changes -= 1;
            self.generation = self.generation.wrapping_add(1);
        }
        self.generation
    }

    /// Reads the configuration space. Bytes past its end read 0.
    pub fn read_config(&self, offset: usize, buf: &mut [u8]) {
        let noise = self.iommu.config.quirks.bypass_read_noise;
        let mut space = self.iommu.config.space(self.iommu.bypass);
        space[CONFIG_BYPASS] |= noise;
        let end = self.config_len().min(CONFIG_LEN);
        buf.fill(0);
        let source = space[..end].get(offset..).unwrap_or(&[]);
        let len = source.len().min(buf.len());
        buf[..len].copy_from_slice(&source[..len]);
    }

    /// Writes the configuration space. Each write is recorded; only one of a single byte at 36, of 0 or 1, with BYPASS_CONFIG
    /// negotiated, has an effect.
    pub fn write_config(&mut self, offset: usize, data: &[u8]) {
        let mut value = [0; 8];
        let len = data.len().min(8);
        value[..len].copy_from_slice(&data[..len]);
        let accepted = self.try_write_bypass(offset, data);
        let record =
            ConfigWrite { offset, len_bytes: data.len(), value: u64::from_le_bytes(value), accepted };
        push_bounded(&mut self.config_writes, record, LIST_LIMIT);
    }

    fn try_write_bypass(&mut self, offset: usize, data: &[u8]) -> bool {
        let (CONFIG_BYPASS, &[value]) = (offset, data) else {
            self.violate("D-02", "a configuration write other than one byte of bypass", None);
            return false;
        };
        let present = self.config_len() > CONFIG_BYPASS && self.iommu.config.offers(feature::BYPASS_CONFIG);
        let negotiated = present && self.iommu.negotiated & feature::BYPASS_CONFIG != 0;
        if !negotiated {
            self.violate("D-02", "bypass was written without BYPASS_CONFIG negotiated", None);
        }
        if value > 1 {
            self.violate("D-03", "bypass was written with a value other than 0 and 1", None);
        }
        if negotiated && value <= 1 {
            self.iommu.write_bypass(value == 1);
            return true;
        }
        if self.iommu.config.quirks.bad_bypass_write_stops && value != self.iommu.bypass {
            self.fail();
        }
        false
    }
}
