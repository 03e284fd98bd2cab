//! A transport on which a test can do something at each step, and that can misbehave where the model does not.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_iommu::transport::{DeviceStatus, InterruptCause, QueueAddresses, Transport, TransportError};
use virtio_iommu::{DomainOptions, EndpointOptions, Viommu};
use virtio_iommu_model::Config;

use super::Bench;
use crate::support::{EP, EP2, Machine, TestPlatform};

/// What the driver does to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Status(DeviceStatus),
    WriteConfig,
    Enable(u16),
    ResetQueue(u16),
    Notify(u16),
}

type Work = Box<dyn FnMut(Step) + Send>;

#[derive(Default)]
struct State {
    work: Option<Work>,
    steps: Vec<Step>,
    /// Whether a queue's reset does not end.
    endless: bool,
    /// The largest size of a queue, if not the model's.
    max_size: Option<u16>,
    /// The queue that is refused.
    refused: Option<u16>,
    /// Where each queue's used ring is.
    used: [u64; 2],
}

/// The test's hand on the transport.
#[derive(Clone, Default)]
pub(super) struct Hooks(Arc<Mutex<State>>);

impl Hooks {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs before each step from now on, but not before those that it makes itself.
    pub(super) fn at_each(&self, work: impl FnMut(Step) + Send + 'static) {
        self.state().work = Some(Box::new(work));
    }

    pub(super) fn stop(&self) {
        self.state().work = None;
    }

    pub(super) fn set_endless(&self, endless: bool) {
        self.state().endless = endless;
    }

    pub(super) fn set_max_size(&self, max_size: Option<u16>) {
        self.state().max_size = max_size;
    }

    pub(super) fn refuse(&self, queue: Option<u16>) {
        self.state().refused = queue;
    }

    /// Where a queue's used ring is.
    pub(super) fn used_ring(&self, queue: u16) -> u64 {
        self.state().used[usize::from(queue)]
    }

    pub(super) fn take_steps(&self) -> Vec<Step> {
        std::mem::take(&mut self.state().steps)
    }

    fn step(&self, step: Step) {
        let work = {
            let mut state = self.state();
            state.steps.push(step);
            state.work.take()
        };
        if let Some(mut work) = work {
            work(step);
            self.state().work = Some(work);
        }
    }
}

struct Hooked {
    inner: Box<dyn Transport>,
    hooks: Hooks,
    can_reset_queues: bool,
}

impl Transport for Hooked {
    fn device_features(&self) -> u64 {
        self.inner.device_features()
    }

    fn set_driver_features(&self, features: u64) {
        self.inner.set_driver_features(features);
    }

    fn status(&self) -> DeviceStatus {
        self.inner.status()
    }

    fn set_status(&self, status: DeviceStatus) {
        self.hooks.step(Step::Status(status));
        self.inner.set_status(status);
    }

    fn config_generation(&self) -> u32 {
        self.inner.config_generation()
    }

    fn read_config_u8(&self, offset: usize) -> Result<u8, TransportError> {
        self.inner.read_config_u8(offset)
    }

    fn read_config_u32(&self, offset: usize) -> Result<u32, TransportError> {
        self.inner.read_config_u32(offset)
    }

    fn write_config_u8(&self, offset: usize, value: u8) -> Result<(), TransportError> {
        self.hooks.step(Step::WriteConfig);
        self.inner.write_config_u8(offset, value)
    }

    fn max_queue_size(&self, queue: u16) -> u16 {
        let max_size = self.hooks.state().max_size;
        max_size.unwrap_or_else(|| self.inner.max_queue_size(queue))
    }

    fn enable_queue(&self, queue: u16, size: u16, addresses: QueueAddresses) -> Result<(), TransportError> {
        self.hooks.step(Step::Enable(queue));
        let mut state = self.hooks.state();
        state.used[usize::from(queue)] = addresses.device_area.get();
        let refused = state.refused == Some(queue);
        drop(state);
        if refused {
            Err(TransportError::NoQueue { queue })
        } else {
            self.inner.enable_queue(queue, size, addresses)
        }
    }

    fn can_reset_queues(&self) -> bool {
        self.can_reset_queues
    }

    fn reset_queue(&self, queue: u16) -> Result<(), TransportError> {
        self.hooks.step(Step::ResetQueue(queue));
        let endless = self.hooks.state().endless;
        if endless { Ok(()) } else { self.inner.reset_queue(queue) }
    }

    fn queue_is_reset(&self, queue: u16) -> Result<bool, TransportError> {
        self.inner.queue_is_reset(queue)
    }

    fn notify(&self, queue: u16) {
        self.hooks.step(Step::Notify(queue));
        self.inner.notify(queue);
    }

    fn acknowledge_interrupt(&self) -> InterruptCause {
        self.inner.acknowledge_interrupt()
    }
}

/// A driver that is up, over such a transport.
pub(super) fn live(config: Config, can_reset_queues: bool) -> (Machine, Viommu<TestPlatform>, Hooks) {
    let machine = Machine::new(config);
    let hooks = Hooks::default();
    let transport = Hooked { inner: Box::new(machine.transport()), hooks: hooks.clone(), can_reset_queues };
    let staged = Viommu::start(transport, machine.platform(), Machine::options()).unwrap();
    for endpoint in [EP, EP2] {
        staged.introduce(endpoint).unwrap();
    }
    (machine, staged.go_live().unwrap(), hooks)
}

/// A [`Bench`] over such a transport.
pub(super) fn bench(config: Config) -> (Bench, Hooks) {
    let (machine, viommu, hooks) = live(config, true);
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    let endpoint = viommu.open(EP, &domain, EndpointOptions::default()).unwrap();
    let bench = Bench::furnish(machine, viommu, domain, endpoint);
    hooks.take_steps();
    (bench, hooks)
}
