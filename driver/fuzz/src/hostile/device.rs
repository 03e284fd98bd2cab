//! The device: what it does when it is heard of, and its registers.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arbitrary::Arbitrary;
use virtio_iommu::transport::{DeviceStatus, InterruptCause, QueueAddresses, Transport, TransportError};
use virtio_iommu::{DmaMemory, EndpointId};
use virtio_iommu_model::GuestMemory;

use super::account::{Account, Said};
use super::rings::{Pending, Queue};
use crate::kernel::{World, call_out};
use crate::ram::Ram;

/// What a device is made of.
#[derive(Clone, Debug, Arbitrary)]
pub struct Setup {
    /// Features that differ from those of a good device.
    features: u64,
    /// The configuration, if it is not a good one.
    config: Option<[u8; 40]>,
    /// Bytes that the configuration ends early.
    config_short: u8,
    /// Sizes of the queues, if they are not good ones.
    sizes: Option<[u16; 2]>,
    /// What a PROBE returns.
    properties: Vec<u8>,
    /// How often a reset does not end, the generation changes, and enabling a queue fails.
    slow: (u8, u8, u8),
    /// Whether the driver soon runs out of memory.
    pub few_blocks: bool,
    /// What it does while it is brought up.
    pub early: Vec<Action>,
}

/// Something that the device does when it is heard of next.
#[derive(Clone, Copy, Debug, Arbitrary)]
pub enum Action {
    /// Nothing more this time.
    Stop,
    /// Keeps the oldest request that it does not keep yet.
    Keep,
    /// Forgets that it keeps any.
    Unkeep,
    /// Answers one request.
    Answer {
        /// Which, counted from the oldest.
        which: u8,
        /// The status; 0xff leaves what is there.
        status: u8,
        /// The used length.
        len: Len,
    },
    /// Puts an entry into the used ring of the requests.
    Used {
        /// Its id: small most of the time.
        id: u32,
        /// Its length.
        len: u32,
    },
    /// Moves the used index of a queue, past entries that nobody wrote.
    Jump {
        /// The queue.
        queue: bool,
        /// How far.
        by: u16,
    },
    /// Sends an event.
    Event {
        /// How far the entry's id is off.
        off: u16,
        /// The used length.
        len: u8,
        /// What is in the buffer.
        record: [u8; 24],
    },
    /// Sets status bits.
    Status(u8),
    /// Changes a byte of the configuration.
    Config {
        /// Where.
        at: u8,
        /// To what.
        value: u8,
    },
    /// Says when it wants the doorbell.
    Suppress {
        /// The queue.
        queue: bool,
        /// The used ring's flags.
        flags: u16,
        /// The index.
        event: u16,
    },
    /// Writes anywhere in a queue's memory. From then on its word is not known.
    Scribble {
        /// The queue.
        queue: bool,
        /// Where, in bytes from the descriptors.
        at: u16,
        /// What.
        bytes: [u8; 4],
    },
}

/// A used length.
#[derive(Clone, Copy, Debug, Arbitrary)]
pub enum Len {
    /// All of the writable part.
    Whole,
    /// One byte less.
    Short,
    /// Any.
    Any(u32),
    /// None.
    Zero,
}

struct State {
    setup: Setup,
    config: [u8; 40],
    status: u8,
    sticky: u8,
    /// Whether the driver saw the end of a reset, after which the device has no queue.
    forgotten: bool,
    queues: [Option<Queue>; 2],
    pending: Vec<Pending>,
    buffers: VecDeque<u16>,
    script: VecDeque<Action>,
    account: Account,
    /// Whether what the device said is known.
    known: bool,
    /// Whether it is known which event buffers it has.
    buffers_known: bool,
}

/// The device, and its memory.
pub struct Hostile {
    ram: Ram,
    state: Mutex<State>,
}

/// MAP_UNMAP and VERSION_1, without which no driver can start, and what QEMU offers beside.
const FEATURES: u64 = 0x101_3000_0077;
const CONFIG_LEN: usize = 40;
const CONFIG_BYPASS: usize = 36;
const BYPASS_CONFIG: u64 = 1 << 6;
/// Actions in a row, so that a script does not run for ever.
const MAX_ACTIONS: usize = 64;

fn good_config() -> [u8; CONFIG_LEN] {
    let mut config = [0; CONFIG_LEN];
    config[..8].copy_from_slice(&(!0xfffu64).to_le_bytes());
    config[16..24].copy_from_slice(&0x7f_ffff_ffffu64.to_le_bytes());
    config[28..32].fill(0xff);
    config[32] = 64;
    config[CONFIG_BYPASS] = 1;
    config
}

impl Hostile {
    /// A device that was just switched on.
    pub fn new(setup: Setup) -> Self {
        let state = State {
            config: setup.config.unwrap_or_else(good_config),
            setup,
            status: 0,
            sticky: 0,
            forgotten: true,
            queues: [None, None],
            pending: Vec::new(),
            buffers: VecDeque::new(),
            script: VecDeque::new(),
            account: Account::default(),
            known: true,
            buffers_known: true,
        };
        Self { ram: Ram::default(), state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds to what the device is about to do.
    pub fn push(&self, action: Action) {
        self.state().script.push_back(action);
    }

    fn heard(&self) {
        self.state().act(&mut self.ram.clone());
    }
}

impl State {
    /// Takes in what the driver made available.
    fn look(&mut self, ram: &Ram) {
        // What was scribbled over need not make sense.
        if !self.known {
            return;
        }
        if let Some(queue) = &mut self.queues[0] {
            // Bounded by what the driver has.
            while let Some(head) = queue.next(ram) {
                let request = queue.request(ram, head);
                let owned = self.pending.iter().any(|pending| pending.head == head);
                assert!(!owned, "descriptor {head} belongs to the device, and is used again");
                self.account.asked(request.ask);
                self.pending.push(request);
            }
        }
        if let Some(queue) = &mut self.queues[1] {
            while let Some(head) = queue.next(ram) {
                let owned = self.buffers_known && self.buffers.contains(&head);
                assert!(!owned, "event buffer {head} was posted twice");
                self.buffers.push_back(head);
            }
        }
    }

    fn act(&mut self, ram: &mut Ram) {
        self.look(ram);
        for _ in 0..MAX_ACTIONS {
            let Some(action) = self.script.pop_front() else { return self.answer_all(ram) };
            match action {
                Action::Stop => return,
                Action::Keep => {
                    if let Some(request) = self.pending.iter_mut().find(|request| !request.kept) {
                        request.kept = true;
                    }
                }
                Action::Unkeep => self.pending.iter_mut().for_each(|request| request.kept = false),
                Action::Answer { which, status, len } => {
                    if let Some(at) = usize::from(which).checked_rem(self.pending.len()) {
                        self.answer(ram, at, Some(status).filter(|status| *status != 0xff), len);
                    }
                }
                Action::Used { id, len } => self.claim(ram, if id >> 24 == 0xff { id } else { id % 20 }, len),
                Action::Jump { queue, by } => {
                    if let Some(queue) = &mut self.queues[usize::from(queue)] {
                        queue.jump(ram, by);
                        // Entries of before are new again.
                        (self.known, self.buffers_known) = (false, false);
                    }
                }
                Action::Event { off, len, record } => self.event(ram, off, len, &record),
                Action::Status(bits) => self.sticky |= bits & DeviceStatus::NEEDS_RESET.bits(),
                Action::Config { at, value } => self.config[usize::from(at) % CONFIG_LEN] = value,
                Action::Suppress { queue, flags, event } => {
                    if let Some(queue) = &self.queues[usize::from(queue)] {
                        queue.suppress(ram, flags, event);
                    }
                }
                Action::Scribble { queue, at, bytes } => {
                    if let Some(queue) = &self.queues[usize::from(queue)] {
                        (self.known, self.buffers_known) = (false, false);
                        let _ = ram.write(queue.addresses.descriptors.get() + u64::from(at % 4096), &bytes);
                    }
                }
            }
        }
    }

    /// Does what a good device does, with all requests that are not kept.
    fn answer_all(&mut self, ram: &mut Ram) {
        while let Some(at) = self.pending.iter().position(|request| !request.kept) {
            self.answer(ram, at, Some(0), Len::Whole);
        }
    }

    fn answer(&mut self, ram: &mut Ram, at: usize, status: Option<u8>, len: Len) {
        let request = self.pending.remove(at);
        let writable = request.writable.1;
        let used_len = match len {
            Len::Whole => writable,
            Len::Short => writable - 1,
            Len::Any(len) => len,
            Len::Zero => 0,
        };
        let room = writable as usize - 4;
        let properties = &self.setup.properties[..self.setup.properties.len().min(room)];
        let _ = ram.write(request.writable.0, properties);
        let said = request.write_answer(ram, status, used_len);
        self.say(&request, said);
        if let Some(queue) = &mut self.queues[0] {
            queue.put(ram, request.head.into(), used_len);
        }
    }

    /// Puts an entry into the ring without a look at what it answers.
    fn claim(&mut self, ram: &mut Ram, id: u32, len: u32) {
        let found = self.pending.iter().position(|request| u32::from(request.head) == id);
        if let Some(at) = found {
            let request = self.pending.remove(at);
            let said = request.write_answer(ram, None, len);
            self.say(&request, said);
        }
        if let Some(queue) = &mut self.queues[0] {
            queue.put(ram, id, len);
        }
    }

    fn say(&mut self, request: &Pending, said: Said) {
        self.account.answered(request.ask, said);
    }

    fn event(&mut self, ram: &mut Ram, off: u16, len: u8, record: &[u8; 24]) {
        let Some(queue) = &mut self.queues[1] else { return };
        let Some(head) = self.buffers.pop_front() else { return };
        if self.known {
            let (at, room) = queue.buffer(ram, head);
            // Room for the draft's fault record, which is longer; this device writes the standard's.
            assert_eq!(room, 48, "the length of an event buffer");
            let _ = ram.write(at, record);
        }
        let id = u32::from(head.wrapping_add(off));
        if off != 0 {
            // Another buffer, or none, comes back in its place.
            self.buffers_known = false;
        }
        queue.put(ram, id, len.into());
    }
}

impl World for Hostile {
    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn relax(&self) {
        self.heard();
    }

    fn check_gone(&self, memory: DmaMemory) {
        let mut state = self.state();
        state.look(&self.ram);
        let (first, last) = (memory.phys.get(), memory.phys.get() + (memory.len as u64 - 1));
        for queue in state.queues.iter().flatten() {
            assert!(state.forgotten || !queue.meets(first, last), "a queue's memory went back too early");
        }
        if state.known
            && let Some(how) = state.account.reaching(first, last)
        {
            panic!("memory {first:#x}..={last:#x} went back, and is reached by {how}");
        }
    }

    fn check_reached(&self, _: EndpointId, _: u64, _: DmaMemory) {}
}

/// The device's registers.
pub struct HostileTransport(pub Arc<Hostile>);

impl HostileTransport {
    fn read<const N: usize>(&self, offset: usize) -> Result<[u8; N], TransportError> {
        let state = self.0.state();
        let len = CONFIG_LEN - usize::from(state.setup.config_short) % 8;
        let bytes = state.config[..len].get(offset..).and_then(|rest| rest.first_chunk());
        bytes.copied().ok_or(TransportError::ConfigTooShort { needed: offset + N })
    }
}

impl Transport for HostileTransport {
    fn device_features(&self) -> u64 {
        FEATURES ^ (self.0.state().setup.features & !0x1_0000_0004)
    }

    fn set_driver_features(&self, features: u64) {
        let offered = self.device_features();
        assert_eq!(features & !offered, 0, "features that were not offered");
    }

    fn status(&self) -> DeviceStatus {
        let mut state = self.0.state();
        if state.status == 0 && !state.setup.slow.0.is_multiple_of(16) {
            state.setup.slow.0 -= 1;
            return DeviceStatus::from_bits_retain(0x0f);
        }
        if state.status == 0 {
            (state.forgotten, state.sticky) = (true, 0);
            state.queues = [None, None];
            return DeviceStatus::empty();
        }
        DeviceStatus::from_bits_retain(state.status | state.sticky)
    }

    fn set_status(&self, status: DeviceStatus) {
        self.0.state().status = status.bits();
    }

    fn config_generation(&self) -> u32 {
        let mut state = self.0.state();
        state.setup.slow.1 = state.setup.slow.1.saturating_sub(1);
        u32::from(state.setup.slow.1 % 64)
    }

    fn read_config_u8(&self, offset: usize) -> Result<u8, TransportError> {
        self.read(offset).map(|[byte]| byte)
    }

    fn read_config_u32(&self, offset: usize) -> Result<u32, TransportError> {
        self.read(offset).map(u32::from_le_bytes)
    }

    fn write_config_u8(&self, offset: usize, value: u8) -> Result<(), TransportError> {
        assert_eq!(offset, CONFIG_BYPASS, "the only field that drivers write");
        assert!(self.device_features() & BYPASS_CONFIG != 0, "bypass was written without its feature");
        let _: [u8; 1] = self.read(offset)?;
        let mut state = self.0.state();
        state.config[offset] = value;
        state.account.set_closed(value == 0);
        Ok(())
    }

    fn max_queue_size(&self, queue: u16) -> u16 {
        self.0.state().setup.sizes.map_or(256, |sizes| sizes[usize::from(queue) % 2])
    }

    fn enable_queue(&self, queue: u16, size: u16, addresses: QueueAddresses) -> Result<(), TransportError> {
        let mut state = self.0.state();
        if state.setup.slow.2 % 8 == 1 + queue as u8 {
            return Err(TransportError::NoQueue { queue });
        }
        assert!(size.is_power_of_two() && size >= 2, "a queue of {size}");
        state.queues[usize::from(queue)] = Some(Queue::new(size, addresses));
        state.forgotten = false;
        Ok(())
    }

    fn notify(&self, queue: u16) {
        call_out("a doorbell");
        if queue == 0 {
            self.0.heard();
        }
    }

    fn acknowledge_interrupt(&self) -> InterruptCause {
        let bits = self.0.state().script.len();
        InterruptCause { queue: bits & 1 != 0, config: bits & 2 != 0 }
    }
}
