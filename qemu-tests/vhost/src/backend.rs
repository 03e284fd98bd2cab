//! The device that is served: the model, its rings as a front end sets them up, and its agents.

use std::fmt;

use vhost_user_backend::{VringRwLock, VringT as _};
use virtio_iommu_model::{Config, Device, Endpoint, device_status, feature};
use virtio_queue::QueueT as _;

use crate::config::Known;
use crate::memory::Memory;
use crate::window::{WINDOW, WINDOW_LEN, Window};

/// The queues: requests and events.
pub(crate) const QUEUES: u16 = 2;
/// The length of the configuration space, with the window.
pub const CONFIG_LEN: usize = WINDOW + WINDOW_LEN;

/// A device of the draft, with these endpoints: what it offers as in the standard, but for the reset of single queues,
/// which vhost-user has no message for.
pub fn draft(endpoints: impl IntoIterator<Item = u32>) -> Device {
    let config = Config::contexts();
    let mut device = Device::new(Config { features: config.features & !feature::RING_RESET, ..config });
    for endpoint in endpoints {
        device.add_endpoint(Endpoint::new(endpoint));
    }
    device
}

/// The device, with what of it is on its way to and from a front end.
pub struct Backend {
    device: Device,
    window: Window,
    known: Known,
    pub(crate) memory: Memory,
    /// The rings, as the front end has set them up; known from the first event on.
    vrings: Vec<VringRwLock>,
    /// What went wrong first.
    trouble: Option<String>,
}

/// What the device was asked. DETACH is not here: of a context it is the draft's, and of an endpoint the standard's, by
/// the same number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Requests {
    /// ATTACH requests.
    pub attach: u64,
    /// MAP requests.
    pub map: u64,
    /// UNMAP requests.
    pub unmap: u64,
    /// Requests of any type.
    pub requests: u64,
    /// Fault records that were delivered.
    pub faults: u64,
    /// Rules that the driver broke.
    pub violations: u64,
}

impl Requests {
    /// The numbers with their names.
    pub fn named(&self) -> [(&'static str, u64); 6] {
        let Self { attach, map, unmap, requests, faults, violations } = *self;
        [
            ("attach", attach),
            ("map", map),
            ("unmap", unmap),
            ("requests", requests),
            ("faults", faults),
            ("violations", violations),
        ]
    }
}

impl fmt::Display for Requests {
    /// A line for each number, the name first.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.named().iter().try_for_each(|(name, number)| writeln!(f, "{name} {number}"))
    }
}

impl Backend {
    /// Serves a device that no driver has touched.
    pub fn new(device: Device) -> Self {
        Self {
            device,
            window: Window::new(),
            known: Known::nothing(CONFIG_LEN),
            memory: Memory::none(),
            vrings: Vec::new(),
            trouble: None,
        }
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What went wrong first, in one line: a driver that the device cannot work for, rings that cannot be.
    pub fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    /// What the device was asked so far.
    pub fn requests(&self) -> Requests {
        let counters = self.device.counters();
        Requests {
            attach: counters.attach,
            map: counters.map,
            unmap: counters.unmap,
            requests: counters.ok + counters.failed + counters.unwritten,
            faults: counters.events,
            violations: self.device.violations().len() as u64,
        }
    }

    /// A driver comes, with these features. Front ends say so when it is ready.
    pub(crate) fn arrive(&mut self, features: u64) {
        let found = device_status::ACKNOWLEDGE | device_status::DRIVER;
        self.device.set_status(0);
        self.device.set_status(found);
        self.device.set_driver_features(features);
        self.device.set_status(found | device_status::FEATURES_OK);
        if self.device.status() & device_status::FEATURES_OK == 0 {
            self.note(format!("the device does not work with the features {features:#x}"));
        }
    }

    /// The driver resets the device, or goes.
    pub(crate) fn reset(&mut self) {
        self.device.set_status(0);
    }

    /// The doorbell of a queue, and what a front end says at the start in place of one.
    pub(crate) fn notify(&mut self, queue: u16, vrings: &[VringRwLock]) {
        if self.vrings.is_empty() {
            self.vrings = vrings.to_vec();
        }
        self.start_rings();
        if self.device.queue_enabled(queue) {
            self.device.notify(queue, &mut self.memory);
        }
        self.tell();
    }

    /// What a front end reads of the configuration space; nothing, which refuses, beyond its end.
    pub(crate) fn read_config(&mut self, offset: usize, len: usize) -> Vec<u8> {
        let mut space = [0; CONFIG_LEN];
        self.device.read_config(0, &mut space[..WINDOW]);
        space[WINDOW..].copy_from_slice(&self.window.registers());
        let Some(end) = offset.checked_add(len).filter(|end| *end <= CONFIG_LEN) else { return Vec::new() };
        self.known.told(offset, &space[offset..end]);
        space[offset..end].to_vec()
    }

    /// What a front end writes there. Whether that is inside.
    pub(crate) fn write_config(&mut self, offset: usize, bytes: &[u8]) -> bool {
        let Some(written) = self.known.written(offset, bytes) else { return false };
        for (at, byte) in written {
            match at.checked_sub(WINDOW) {
                Some(at) => self.window.write(at, byte),
                None if at < self.device.config_len() => self.device.write_config(at, &[byte]),
                None => {}
            }
        }
        self.window.run(&mut self.device, &mut self.memory);
        self.tell();
        true
    }

    /// Sets up the rings that the front end has ready, and lets the device run.
    fn start_rings(&mut self) {
        for (index, vring) in (0..QUEUES).zip(&self.vrings) {
            let state = vring.get_ref();
            let queue = state.get_queue();
            if self.device.queue_enabled(index) || !queue.ready() {
                continue;
            }
            let (descriptors, available, used) = (queue.desc_table(), queue.avail_ring(), queue.used_ring());
            if let Err(error) = self.device.set_queue(index, queue.size(), descriptors, available, used) {
                note(&mut self.trouble, format!("queue {index} cannot be set up: {error:?}"));
            }
        }
        let status = self.device.status();
        if status & device_status::FEATURES_OK != 0 {
            self.device.set_status(status | device_status::DRIVER_OK);
        }
    }

    /// After the device did something: interrupts go to the front end, and trouble is noted.
    fn tell(&mut self) {
        for (index, vring) in (0..QUEUES).zip(&self.vrings) {
            if self.device.take_queue_interrupt(index)
                && let Err(error) = vring.signal_used_queue()
            {
                note(&mut self.trouble, format!("queue {index} cannot interrupt: {error}"));
            }
        }
        if let Some(error) = self.device.ring_error() {
            self.note(format!("the driver's rings cannot be: {error:?}; the device needs a reset"));
        }
    }

    fn note(&mut self, what: String) {
        note(&mut self.trouble, what);
    }
}

/// Keeps the first trouble.
fn note(trouble: &mut Option<String>, what: String) {
    trouble.get_or_insert(what);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::window::{COMMAND, OUTCOME, outcome};

    #[test]
    fn configuration_is_the_devices_and_the_windows() {
        let mut backend = Backend::new(draft([8]));
        let space = backend.read_config(0, CONFIG_LEN);
        assert_eq!(space[..8], (!0xfff_u64).to_le_bytes());
        assert_eq!(space[WINDOW..WINDOW + 4], *b"AGNT");
        assert_eq!(backend.read_config(WINDOW - 2, 4), [0, 0, b'A', b'G']);
        for (offset, len) in [(CONFIG_LEN, 1), (CONFIG_LEN - 1, 2), (usize::MAX, 2)] {
            assert!(backend.read_config(offset, len).is_empty());
            assert!(!backend.write_config(offset, &vec![0; len]));
        }
    }

    #[test]
    fn of_a_whole_space_only_what_is_new_reaches_the_device() {
        let mut backend = Backend::new(draft([8]));
        let mut copy = backend.read_config(0, CONFIG_LEN);
        copy[WINDOW + COMMAND] = 99;
        assert!(backend.write_config(0, &copy));
        assert_eq!(backend.device().config_writes().len(), 0);
        assert_eq!(backend.read_config(WINDOW + OUTCOME, 4), outcome::UNKNOWN.to_le_bytes());
        copy[36] = 0;
        assert!(backend.write_config(0, &copy));
        assert_eq!(backend.device().config_writes().len(), 1);
    }

    #[test]
    fn single_queues_cannot_be_reset() {
        assert_eq!(draft([]).device_features() & feature::RING_RESET, 0);
        assert_ne!(draft([]).device_features() & feature::ATTACH_TABLE, 0);
    }
}
