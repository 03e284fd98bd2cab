use std::sync::{Arc, Mutex};
use std::vec;
use std::vec::Vec;

use virtio_iommu::transport::{InterruptCause, QueueAddresses, TransportError};

use super::ring::{INDIRECT, NEXT, WRITE};
use super::slots::STATUS_NONE;
use super::*;
use crate::devices::storage::{Buffer, finish};

/// Registers of a disk; what it does with memory is [`Disk`].
#[derive(Clone, Default)]
struct Fake(Arc<Mutex<Registers>>);

#[derive(Default)]
struct Registers {
    features: u64,
    accepted: u64,
    status: u8,
    /// What a reset leaves in the status.
    after_reset: u8,
    config: [u32; 4],
    generation: u32,
    /// Whether each look at the generation changes it.
    restless: bool,
    rung: usize,
}

impl Transport for Fake {
    fn device_features(&self) -> u64 {
        self.0.lock().unwrap().features
    }

    fn set_driver_features(&self, features: u64) {
        self.0.lock().unwrap().accepted = features;
    }

    fn status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(self.0.lock().unwrap().status)
    }

    fn set_status(&self, status: DeviceStatus) {
        let mut registers = self.0.lock().unwrap();
        registers.status = if status.is_empty() { registers.after_reset } else { status.bits() };
    }

    fn config_generation(&self) -> u32 {
        let mut registers = self.0.lock().unwrap();
        registers.generation += u32::from(registers.restless);
        registers.generation
    }

    fn read_config_u8(&self, _: usize) -> Result<u8, TransportError> {
        Err(TransportError::Unsupported)
    }

    fn read_config_u32(&self, offset: usize) -> Result<u32, TransportError> {
        let config = self.0.lock().unwrap().config;
        config.get(offset / 4).copied().ok_or(TransportError::ConfigTooShort { needed: offset + 4 })
    }

    fn write_config_u8(&self, _: usize, _: u8) -> Result<(), TransportError> {
        Err(TransportError::Unsupported)
    }

    fn max_queue_size(&self, _: u16) -> u16 {
        16
    }

    fn enable_queue(&self, _: u16, _: u16, _: QueueAddresses) -> Result<(), TransportError> {
        Ok(())
    }

    fn notify(&self, _: u16) {
        self.0.lock().unwrap().rung += 1;
    }

    fn acknowledge_interrupt(&self) -> InterruptCause {
        InterruptCause { queue: false, config: false }
    }
}

const SIZE: u16 = 16;
const LIMITS: Limits =
    Limits { sector_bytes: 512, sectors: 64, max_bytes: 8192, max_pieces: 4, depth: 2, batch: 2 };

/// The other side of a ring, which reads memory where descriptors say: the test's own.
struct Rig {
    block: Block<'static>,
    fake: Fake,
    /// The next available entry to look at, and the next used one to write.
    seen: u16,
    used: u16,
}

/// A request's tag, and what became of it.
type Done = (u64, Result<(), StorageError>);

/// A request as the device finds it.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    head: u16,
    kind: u32,
    sector: u64,
    /// Address, length and whether the device writes, of each part of the data.
    data: Vec<(u64, u32, bool)>,
    status: u64,
}

impl Rig {
    fn new(chains: Chains) -> Self {
        let fake = Fake::default();
        let ring = Ring::new(Coherent::leak(Ring::len_bytes(SIZE)), SIZE);
        let slots = Coherent::leak(Slots::len_bytes(chains, LIMITS));
        let block = Block::in_memory(Box::new(fake.clone()), Dma::Direct, ring, (slots, chains), LIMITS);
        Self { block, fake, seen: 0, used: 0 }
    }

    fn submit(&mut self, operation: Operation, tag: u64, len_bytes: usize) {
        let buffer = Buffer::Premapped(Coherent::leak(8192));
        let mut requests = vec![Request { tag, sector: tag, len_bytes, buffer }];
        self.block.submit(operation, &mut requests).expect("room for a request");
    }

    /// Takes the next chain from the available ring and follows it.
    fn take(&mut self) -> Found {
        let addresses = self.block.ring.addresses();
        let avail = addresses.driver_area.get();
        assert_ne!(peek::<u16>(avail + 2), self.seen, "something is available");
        let head = peek::<u16>(avail + 4 + 2 * u64::from(self.seen % SIZE));
        self.seen = self.seen.wrapping_add(1);
        let mut table = addresses.descriptors.get();
        let mut index = head;
        let (address, len, flags, _) = descriptor(table, index);
        let mut room = u32::from(SIZE);
        if flags & INDIRECT != 0 {
            (table, index, room) = (address, 0, len / 16);
        }
        let mut parts = Vec::new();
        loop {
            assert!(u32::from(index) < room, "descriptor {index} of a table of {room}");
            let (address, len, flags, next) = descriptor(table, index);
            parts.push((address, len, flags & WRITE != 0));
            if flags & NEXT == 0 {
                break;
            }
            index = next;
        }
        let (header, status) = (parts.remove(0), parts.pop().expect("a status"));
        assert_eq!((header.1, header.2, status.1, status.2), (16, false, 1, true));
        Found { head, kind: peek(header.0), sector: peek(header.0 + 8), data: parts, status: status.0 }
    }

    /// The device says that it is done with a chain.
    fn done(&mut self, id: u32, len: u32) {
        let used = self.block.ring.addresses().device_area.get();
        let entry = used + 4 + 8 * u64::from(self.used % SIZE);
        poke(entry, id);
        poke(entry + 4, len);
        self.used = self.used.wrapping_add(1);
        poke(used + 2, self.used);
    }

    fn complete(&mut self) -> Result<Option<Done>, StorageError> {
        Ok(self.block.complete()?.map(|done| (done.tag, done.result)))
    }
}

/// Reads what the driver wrote: its memory is the test's, by the same addresses.
fn peek<T: Copy>(address: u64) -> T {
    // SAFETY: leaked memory of the rig, at an offset inside of it.
    unsafe { (address as *const T).read_unaligned() }
}

fn poke<T>(address: u64, value: T) {
    // SAFETY: as for `peek`; no reference points there.
    unsafe { (address as *mut T).write_unaligned(value) };
}

fn descriptor(table: u64, index: u16) -> (u64, u32, u16, u16) {
    let at = table + 16 * u64::from(index);
    (peek(at), peek(at + 8), peek(at + 12), peek(at + 14))
}

#[test]
fn what_is_answered_is_seen_without_taking_it() {
    let mut rig = Rig::new(Chains::Indirect);
    rig.submit(Operation::Read, 1, 512);
    rig.submit(Operation::Read, 2, 512);
    assert_eq!(rig.block.answered(), 0);
    for answered in [1, 2] {
        let found = rig.take();
        poke(found.status, STATUS_OK);
        rig.done(found.head.into(), 513);
        assert_eq!(rig.block.answered(), answered);
    }
    assert_eq!(rig.complete(), Ok(Some((1, Ok(())))));
    assert_eq!(rig.block.answered(), 0, "taken with the first, and kept");
    assert_eq!(rig.complete(), Ok(Some((2, Ok(())))));
}

#[test]
fn chains_are_header_data_and_status_and_slots_are_used_again() {
    for chains in [Chains::Indirect, Chains::Direct] {
        let mut rig = Rig::new(chains);
        for tag in 0..40 {
            let write = tag % 3 == 0;
            let operation = if write { Operation::Write } else { Operation::Read };
            rig.submit(operation, tag, 1024);
            let found = rig.take();
            assert_eq!((found.kind, found.sector), (u32::from(write), tag), "{chains:?}");
            let [(_, 1024, device_writes)] = found.data[..] else { panic!("{chains:?}: {found:x?}") };
            assert_eq!(device_writes, !write);
            assert_eq!(peek::<u8>(found.status), STATUS_NONE, "the last status does not stand for this one");
            assert_eq!(rig.complete(), Ok(None));
            poke(found.status, STATUS_OK);
            rig.done(found.head.into(), if write { 1 } else { 1025 });
            assert_eq!(rig.complete(), Ok(Some((tag, Ok(())))), "{chains:?}");
        }
        assert_eq!((rig.block.strays(), rig.fake.0.lock().unwrap().rung), (Strays::default(), 40));
    }
}

#[test]
fn lengths_and_statuses_are_looked_at() {
    for (status, len, wanted) in [
        (STATUS_OK, 512, Err(StorageError::Length { sector: 5, wrote: 512, expected: 513 })),
        (STATUS_OK, u32::MAX, Err(StorageError::Length { sector: 5, wrote: u32::MAX, expected: 513 })),
        (1, 513, Err(StorageError::Refused { sector: 5, status: 1 })),
        (STATUS_NONE, 513, Err(StorageError::Refused { sector: 5, status: 0xff })),
        (STATUS_OK, 513, Ok(())),
    ] {
        let mut rig = Rig::new(Chains::Indirect);
        rig.submit(Operation::Read, 5, 512);
        let found = rig.take();
        poke(found.status, status);
        rig.done(found.head.into(), len);
        assert_eq!(rig.complete(), Ok(Some((5, wanted))));
    }
}

#[test]
fn chains_that_are_not_in_flight_are_counted() {
    for (chains, wrong) in
        [(Chains::Indirect, [1, 2, u32::MAX]), (Chains::Direct, [1, CHAIN.into(), 0x1_0000])]
    {
        let mut rig = Rig::new(chains);
        rig.submit(Operation::Read, 5, 512);
        rig.submit(Operation::Read, 6, 512);
        let (first, second) = (rig.take(), rig.take());
        poke(second.status, STATUS_OK);
        rig.done(second.head.into(), 513);
        assert_eq!(rig.complete(), Ok(Some((6, Ok(())))));
        // What is said now, the second is said twice among it, is in the place of the first's answer.
        rig.done(wrong[0], 513);
        assert_eq!(rig.complete(), Ok(None), "{chains:?}");
        assert_eq!((rig.block.strays().unknown_id, rig.block.in_flight()), (1, 1));
        // And then the device has said as much as it was given.
        rig.done(first.head.into(), 513);
        let broken = StorageError::Broken { what: "used index", value: 3 };
        assert_eq!(rig.complete(), Err(broken), "{chains:?}");
        for id in wrong {
            assert_eq!(rig.block.slots.of_head(id).and_then(|slot| rig.block.in_flight.started(slot)), None);
        }
    }
}

#[test]
fn an_index_that_jumps_ends_the_device() {
    let mut rig = Rig::new(Chains::Indirect);
    rig.submit(Operation::Read, 5, 512);
    let used = rig.block.ring.addresses().device_area.get();
    poke(used + 2, 0x8000u16);
    let broken = StorageError::Broken { what: "used index", value: 0x8000 };
    assert_eq!(rig.complete(), Err(broken));
    poke(used + 2, 0u16);
    assert_eq!(rig.complete(), Err(broken), "for good");
    let mut more = vec![];
    assert_eq!(rig.block.submit(Operation::Read, &mut more), Err(broken));
    assert_eq!(rig.block.in_flight(), 1, "what it has stays with it until a reset");
    let mut done = Vec::new();
    rig.block.close(&mut done).expect("a reset");
    assert_eq!(done[0].result, Err(StorageError::Cancelled));
}

#[test]
fn a_device_that_asks_for_no_doorbell_gets_none() {
    let mut rig = Rig::new(Chains::Indirect);
    poke(rig.block.ring.addresses().device_area.get(), 1u16);
    rig.submit(Operation::Read, 5, 512);
    assert_eq!((rig.take().sector, rig.fake.0.lock().unwrap().rung), (5, 0));
}

#[test]
fn a_device_that_answers_nothing_is_given_up() {
    let mut rig = Rig::new(Chains::Indirect);
    rig.submit(Operation::Read, 5, 512);
    rig.fake.0.lock().unwrap().status = 0xf;
    let mut done = Vec::new();
    assert_eq!(finish(&mut rig.block, &mut done), Err(StorageError::Timeout { in_flight: 1 }));
    for status in [0x4f, 0, 0xff] {
        rig.fake.0.lock().unwrap().status = status;
        let broken = StorageError::Broken { what: "device status", value: status.into() };
        assert_eq!(finish(&mut rig.block, &mut done), Err(broken), "{status:#x} is not waited for");
    }
    assert!(done.is_empty());
    // A late answer still counts.
    let found = rig.take();
    poke(found.status, STATUS_OK);
    rig.done(found.head.into(), 513);
    assert_eq!(finish(&mut rig.block, &mut done), Ok(()));
    assert_eq!((done.len(), done[0].tag), (1, 5));
}

fn registers(change: impl FnOnce(&mut Registers)) -> Fake {
    let fake = Fake::default();
    change(&mut fake.0.lock().unwrap());
    fake
}

#[test]
fn only_what_is_known_is_accepted_and_what_is_needed_must_be_there() {
    let fake = registers(|registers| registers.features = u64::MAX);
    assert_eq!(negotiate(&fake, F_VERSION_1 | F_ACCESS_PLATFORM).unwrap(), KNOWN);
    assert_eq!(fake.0.lock().unwrap().accepted, KNOWN);
    for offered in [0, F_VERSION_1, F_ACCESS_PLATFORM] {
        let fake = registers(|registers| registers.features = offered);
        let refused = negotiate(&fake, F_VERSION_1 | F_ACCESS_PLATFORM);
        assert!(matches!(refused, Err(BlockError::Unsupported { value, .. }) if value == offered));
    }
}

#[test]
fn limits_are_the_devices_within_our_own() {
    let of = |features, config, restless| {
        let fake = registers(|registers| (registers.config, registers.restless) = (config, restless));
        limits(&fake, features, Chains::Indirect, 256)
    };
    let known = of(F_SEG_MAX | F_SIZE_MAX, [7, 1, 4096, 12], false).unwrap();
    assert_eq!((known.sectors, known.max_bytes, known.max_pieces), (1 << 32 | 7, 4096, 12));
    let wild = of(F_SEG_MAX, [7, 0, 0, u32::MAX], false).unwrap();
    assert_eq!((wild.max_bytes, wild.max_pieces, wild.depth), (MAX_BYTES, MAX_PIECES.into(), DEPTH.into()));
    assert_eq!(of(F_SEG_MAX, [7, 0, 0, 0], false).unwrap().max_pieces, 1);
    assert_eq!(of(0, [7, 0, 0, 99], false).unwrap().max_pieces, 1);
    assert!(of(F_SIZE_MAX, [7, 0, 511, 0], false).is_err());
    assert!(of(0, [7, 0, 0, 0], true).is_err(), "a configuration that never rests");
    let fake = Fake::default();
    assert!(limits(&fake, 0, Chains::Direct, CHAIN / 2).is_err(), "a queue without room for one chain");
}

#[test]
fn a_device_that_is_not_reset_is_given_up() {
    let fake = registers(|registers| (registers.status, registers.after_reset) = (7, 3));
    let status = DeviceStatus::from_bits_retain(3);
    assert_eq!(reset(&fake), Err(BlockError::ResetTimeout { status }));
}
