//! The messages of vhost-user, each as what it means to the device.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VringRwLock};
use virtio_iommu_model::Device;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use crate::backend::{Backend, QUEUES};
use crate::memory::Memory;

/// The feature bit by which front ends learn of protocol features, which is none of the device's.
const PROTOCOL_FEATURES: u64 = 1 << 30;

/// A backend that two threads serve: one takes messages, the other doorbells. Clones are handles to the same one.
#[derive(Clone)]
pub struct Served(Arc<Mutex<Backend>>);

impl Served {
    pub(crate) fn new(device: Device) -> Self {
        Self(Arc::new(Mutex::new(Backend::new(device))))
    }

    /// The backend. As long as it is held, the front end waits.
    pub fn lock(&self) -> MutexGuard<'_, Backend> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VhostUserBackend for Served {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        usize::from(QUEUES)
    }

    fn max_queue_size(&self) -> usize {
        let backend = self.lock();
        (0..QUEUES).map(|queue| usize::from(backend.device().queue_max_size(queue))).min().unwrap_or(0)
    }

    fn features(&self) -> u64 {
        self.lock().device().device_features() | PROTOCOL_FEATURES
    }

    fn acked_features(&self, features: u64) {
        self.lock().arrive(features & !PROTOCOL_FEATURES);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    fn reset_device(&self) {
        self.lock().reset();
    }

    /// The model reads that out of the features.
    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.lock().read_config(offset as usize, size as usize)
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        let inside = self.lock().write_config(offset as usize, bytes);
        if inside { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }

    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        self.lock().memory = Memory(memory);
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    /// A front end that stops one ring is about to stop the other.
    fn stop_vring(&self, _queue: u32) -> io::Result<()> {
        self.lock().reset();
        Ok(())
    }

    /// Never fails, since that would end the thread, and nobody would hear of it.
    fn handle_event(&self, event: u16, _: EventSet, vrings: &[VringRwLock], _: usize) -> io::Result<()> {
        if event < QUEUES {
            self.lock().notify(event, vrings);
        }
        Ok(())
    }
}
