//! The model as the device of a run, with what goes wrong next.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arbitrary::Arbitrary;
use virtio_iommu::transport::{DeviceStatus, InterruptCause, QueueAddresses, Transport, TransportError};
use virtio_iommu::{DmaMemory, EndpointId};
use virtio_iommu_model::{
    Access, AccessKind, Config, Device, Endpoint, Execute, FaultReason, GuestMemory, Inject, Release,
    ReservedRegion, isr,
};

use crate::kernel::{World, call_out};
use crate::ram::Ram;
use crate::session::ENDPOINTS;

/// Something that goes wrong. Nothing of it is a lie: a driver that looks closely can stay safe.
///
/// What is executed and then answered with a status that says it was not, and the reverse, is left out, since no
/// driver can see through that.
#[derive(Clone, Copy, Debug, Arbitrary)]
pub enum Misbehaviour {
    /// The next request is executed now and answered when it is released.
    HoldAnswer,
    /// The next request is executed and answered when it is released.
    Hold,
    /// The next request is well.
    Pass,
    /// The next request is answered after the others of its doorbell, last first.
    Defer,
    /// The next request is never answered.
    Forget {
        /// Whether it is executed.
        executed: bool,
    },
    /// The next request is not executed, and refused.
    Refuse(u8),
    /// The next request is executed, and its status says nothing.
    Unclear(u8),
    /// The next request is executed, and the used length is too short.
    Short(u8),
    /// The next request is given back as it is.
    Unwritten,
    /// The next request is answered twice.
    Twice,
    /// At the next request the device asks for a reset.
    NeedsReset,
    /// Reserved bytes of the next answer are set.
    Noise([u8; 3]),
    /// Held requests are answered.
    Release(u8),
    /// Held requests are answered at the next poll of a wait.
    ReleaseSoon(u8),
    /// An endpoint does DMA.
    Access {
        /// The endpoint.
        endpoint: u8,
        /// The granule, counted from the first address.
        page: u8,
    },
    /// Bytes come as an event.
    Event([u8; 24]),
    /// The next reset takes its time, or the configuration changes while it is read.
    Slow {
        /// Reads of the status.
        reset: u8,
        /// Reads of the generation.
        generation: u8,
    },
    /// The kernel forgets everything and starts the driver anew.
    Restart {
        /// Whether the whole machine is reset.
        system_reset: bool,
    },
}

struct State {
    device: Device,
    soon: Option<Release>,
    /// Whether every request was, or will be, answered, so that nothing stays in quarantine.
    answered_all: bool,
}

/// The device, and its memory.
pub struct Truthful {
    ram: Ram,
    state: Mutex<State>,
    strict: bool,
}

fn release(which: u8) -> Release {
    match which % 5 {
        0 => Release::All,
        1 => Release::AllReversed,
        2 => Release::Oldest,
        3 => Release::Newest,
        _ => Release::Nth(usize::from(which) / 5 % 8),
    }
}

impl Truthful {
    /// A device that was just switched on, with endpoints of several kinds.
    pub fn new(config: Config) -> Self {
        let strict = config.quirks == Config::default().quirks;
        let base = *config.input_range.start();
        let mut device = Device::new(config);
        for (at, endpoint) in ENDPOINTS.iter().enumerate() {
            let mut endpoint = Endpoint::new(endpoint.get());
            if at % 2 == 0 {
                endpoint.reserved.push(ReservedRegion::msi(0xfee0_0000, 0xfeef_ffff));
            }
            if at == 3 {
                endpoint.reserved.push(ReservedRegion::reserved(base + 0x4000, base + 0x4fff));
            }
            device.add_endpoint(endpoint);
        }
        let state = Mutex::new(State { device, soon: None, answered_all: true });
        Self { ram: Ram::default(), state, strict }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn memory(&self) -> Ram {
        self.ram.clone()
    }

    /// Takes note of what is to go wrong.
    pub fn misbehave(&self, what: Misbehaviour) {
        let mut guard = self.state();
        let state = &mut *guard;
        let device = &mut state.device;
        let inject = match what {
            Misbehaviour::HoldAnswer => Inject::Hold(Execute::Now),
            Misbehaviour::Hold => Inject::Hold(Execute::AtRelease),
            Misbehaviour::Pass => Inject::Pass,
            Misbehaviour::Defer => Inject::Defer,
            Misbehaviour::Forget { executed } => {
                state.answered_all = false;
                Inject::Drop(if executed { Execute::Now } else { Execute::AtRelease })
            }
            Misbehaviour::Refuse(status) => Inject::Refuse(status.max(1)),
            Misbehaviour::Unclear(status) => Inject::Status(match status {
                0..8 => 1,
                8 => 3,
                other => other,
            }),
            Misbehaviour::Short(len) => Inject::UsedLen(u32::from(len % 4)),
            Misbehaviour::Unwritten => Inject::Unwritten,
            Misbehaviour::Twice => {
                state.answered_all = false;
                Inject::Twice
            }
            Misbehaviour::NeedsReset => {
                state.answered_all = false;
                Inject::NeedsReset
            }
            Misbehaviour::Noise(bytes) => Inject::TailReserved(bytes),
            Misbehaviour::Release(which) => {
                device.release(release(which), &mut self.memory());
                return;
            }
            Misbehaviour::ReleaseSoon(which) => {
                state.soon = Some(release(which));
                return;
            }
            Misbehaviour::Access { endpoint, page } => {
                let id = ENDPOINTS[usize::from(endpoint) % ENDPOINTS.len()];
                let granule = device.config().granule().unwrap_or(1);
                let iova = device.config().input_range.start() + u64::from(page % 32) * granule;
                let mut byte = [0];
                let _ = device.access(&mut self.memory(), id.get(), iova, Access::Read(&mut byte));
                return;
            }
            Misbehaviour::Event(record) => return device.push_event(&mut self.memory(), &record),
            Misbehaviour::Slow { reset, generation } => {
                device.inject.slow_reset = u32::from(reset % 4);
                device.inject.generation_changes = u32::from(generation % 4);
                return;
            }
            Misbehaviour::Restart { .. } => return,
        };
        device.inject.push(inject);
    }

    /// From now on nothing goes wrong.
    pub fn behave(&self) {
        let mut state = self.state();
        state.device.inject.script.clear();
        state.soon = None;
    }

    /// Answers everything that is held.
    pub fn release_all(&self) {
        self.state().device.release(Release::All, &mut self.memory());
    }

    /// The machine is reset.
    pub fn system_reset(&self) {
        self.state().device.system_reset();
    }

    /// Whether every request was answered, by a device that does all that it has to.
    pub fn answered_all(&self) -> bool {
        self.state().answered_all && self.strict
    }

    /// What an endpoint asks the device for, beside plain accesses.
    pub fn with<R>(&self, work: impl FnOnce(&mut Device, &mut Ram) -> R) -> R {
        work(&mut self.state().device, &mut self.memory())
    }

    /// Where an access would arrive. It is cached, and not reported.
    ///
    /// # Panics
    /// When the way leads through a table that is none.
    pub fn reached(
        &self,
        endpoint: EndpointId,
        pasid: Option<u32>,
        iova: u64,
        kind: AccessKind,
    ) -> Option<u64> {
        let from = (endpoint.get(), pasid);
        match self.with(|device, ram| device.translate_context(ram, from, iova, kind)) {
            Ok(phys) => Some(phys),
            Err(FaultReason::Unknown) => {
                panic!("{endpoint}, PASID {pasid:x?}: at {iova:#x} the device walks what is no table")
            }
            Err(_) => None,
        }
    }

    /// Checks that the driver broke no rule.
    ///
    /// # Panics
    /// When it did.
    pub fn check_rules(&self) {
        let state = self.state();
        let device = &state.device;
        let violations: Vec<_> = device.violations().collect();
        assert!(violations.is_empty(), "the driver broke a rule: {violations:?}");
        assert_eq!(device.crash(), None, "the driver crashed the device");
        assert_eq!(device.ring_error(), None, "the driver broke a ring");
    }

    /// Checks what holds after each step.
    ///
    /// # Panics
    /// When it does not.
    pub fn check(&self) {
        self.check_rules();
        let state = self.state();
        let device = &state.device;
        for domain in device.domains() {
            for mapping in device.mappings(domain) {
                let len = mapping.virt_last - mapping.virt_first + 1;
                let live = self.ram.is_live(mapping.phys_first, len as usize);
                assert!(live, "{mapping:x?} of domain {domain} leads to memory that went back");
            }
        }
    }
}

impl World for Truthful {
    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn relax(&self) {
        let mut state = self.state();
        if let Some(which) = state.soon.take() {
            state.device.release(which, &mut self.memory());
        }
    }

    fn check_gone(&self, memory: DmaMemory) {
        let state = self.state();
        let (first, last) = (memory.phys.get(), memory.phys.get() + (memory.len as u64 - 1));
        for domain in state.device.domains() {
            for mapping in state.device.mappings(domain) {
                let end = mapping.phys_first + (mapping.virt_last - mapping.virt_first);
                let meets = mapping.phys_first <= last && first <= end;
                assert!(
                    !meets,
                    "memory {first:#x}..={last:#x} goes back, and domain {domain} has {mapping:x?}"
                );
            }
        }
    }

    fn check_reached(&self, endpoint: EndpointId, iova: u64, memory: DmaMemory) {
        let mut state = self.state();
        // Not the last byte: QEMU may take it for one of the next mapping.
        for offset in [0, memory.len as u64 - 2] {
            let (mut found, mut expected) = ([0], [1]);
            let read = state.device.access(
                &mut self.memory(),
                endpoint.get(),
                iova + offset,
                Access::Read(&mut found),
            );
            let _ = self.ram.read(memory.phys.get() + offset, &mut expected);
            assert_eq!(read, Ok(()), "endpoint {endpoint} at {iova:#x} + {offset:#x}");
            assert_eq!(found, expected, "endpoint {endpoint} at {iova:#x} + {offset:#x}");
        }
    }
}

/// The device's registers.
pub struct ModelTransport(pub Arc<Truthful>);

impl ModelTransport {
    fn with<R>(&self, work: impl FnOnce(&mut Device) -> R) -> R {
        work(&mut self.0.state().device)
    }

    fn read<const N: usize>(&self, offset: usize) -> Result<[u8; N], TransportError> {
        self.with(|device| {
            let mut bytes = [0; N];
            device.read_config(offset, &mut bytes);
            let fits = offset + N <= device.config_len();
            if fits { Ok(bytes) } else { Err(TransportError::ConfigTooShort { needed: offset + N }) }
        })
    }
}

impl Transport for ModelTransport {
    fn device_features(&self) -> u64 {
        self.with(|device| device.device_features())
    }

    fn set_driver_features(&self, features: u64) {
        self.with(|device| device.set_driver_features(features));
    }

    fn status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(self.with(Device::read_status))
    }

    fn set_status(&self, status: DeviceStatus) {
        self.with(|device| device.set_status(status.bits()));
    }

    fn config_generation(&self) -> u32 {
        self.with(Device::config_generation)
    }

    fn read_config_u8(&self, offset: usize) -> Result<u8, TransportError> {
        self.read(offset).map(|[byte]| byte)
    }

    fn read_config_u32(&self, offset: usize) -> Result<u32, TransportError> {
        self.read(offset).map(u32::from_le_bytes)
    }

    fn write_config_u8(&self, offset: usize, value: u8) -> Result<(), TransportError> {
        self.with(|device| device.write_config(offset, &[value]));
        Ok(())
    }

    fn max_queue_size(&self, queue: u16) -> u16 {
        self.with(|device| device.queue_max_size(queue))
    }

    fn enable_queue(&self, queue: u16, size: u16, addresses: QueueAddresses) -> Result<(), TransportError> {
        let QueueAddresses { descriptors, driver_area, device_area } = addresses;
        let set = self.with(|device| {
            device.set_queue(queue, size, descriptors.get(), driver_area.get(), device_area.get())
        });
        set.map_err(|_| TransportError::NoQueue { queue })
    }

    fn notify(&self, queue: u16) {
        call_out("a doorbell");
        self.0.state().device.notify(queue, &mut self.0.memory());
    }

    fn acknowledge_interrupt(&self) -> InterruptCause {
        let cause = self.with(Device::take_isr);
        InterruptCause { queue: cause & isr::QUEUE != 0, config: cause & isr::CONFIG != 0 }
    }
}
