use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use virtio_iommu::Iova;

use super::*;
use crate::devices::storage::Buffer;
use crate::mmio::Registers;

/// Registers that forget everything; doorbells go there.
struct Nowhere;

impl Registers for Nowhere {
    fn read32(&self, _: usize) -> u32 {
        0
    }

    fn write32(&self, _: usize, _: u32) {}

    fn read64(&self, _: usize) -> u64 {
        1 << 37 | 63
    }

    fn write64(&self, _: usize, _: u64) {}
}

const ENTRIES: u16 = 4;
const LIMITS: Limits =
    Limits { sector_bytes: 512, sectors: 64, max_bytes: 16 * 4096, max_pieces: 16, depth: 3, batch: 3 };

/// A queue with a device of the test's own.
struct Rig {
    controller: Controller,
    queue: IoQueue,
    /// Where the device writes next, and its phase.
    at: u16,
    phase: u16,
}

impl Rig {
    fn new() -> Self {
        let controller = Controller::new(Box::new(Nowhere), 0x2000).expect("registers");
        let doorbells = controller.doorbells(1, 0x2000).expect("inside");
        let pair =
            Pair::new(1, ENTRIES, Coherent::leak(4 * COMMAND_BYTES), Coherent::leak(4 * COMPLETION_BYTES));
        let lists = Coherent::leak(3 * IoQueue::list_bytes(LIMITS));
        let queue = IoQueue::new(pair, doorbells, 1, lists, LIMITS);
        Self { controller, queue, at: 0, phase: 1 }
    }

    fn submit(&mut self, tag: u64) {
        let buffer = Buffer::Premapped(Coherent::leak(4096));
        let mut requests = vec![Request { tag, sector: tag, len_bytes: 512, buffer }];
        self.queue
            .submit(&self.controller, Dma::Direct, Operation::Read, &mut requests, None)
            .expect("room for a request");
    }

    /// The command at a place of the submission queue, as the device sees it.
    fn command(&self, at: u16) -> Command {
        self.queue.pair.submissions.read(usize::from(at) * COMMAND_BYTES)
    }

    /// The device writes a completion.
    fn post(&mut self, queue: u16, command: u16, status: u16) {
        let completion = Completion {
            result: 0.into(),
            reserved: 0.into(),
            submission_head: 0xffff.into(),
            submission_queue: queue.into(),
            command: command.into(),
            status: (status << 1 | self.phase).into(),
        };
        self.queue.pair.completions.write(usize::from(self.at) * COMPLETION_BYTES, completion);
        self.at = (self.at + 1) % ENTRIES;
        if self.at == 0 {
            self.phase ^= 1;
        }
    }

    fn complete(&mut self) -> Option<(u64, Result<(), StorageError>)> {
        let done = self.queue.complete(&self.controller, Dma::Direct);
        done.map(|done| (done.tag, done.result))
    }
}

#[test]
fn both_rings_go_round() {
    let mut rig = Rig::new();
    for tag in 0..50 {
        rig.submit(tag);
        assert_eq!(rig.complete(), None, "round {tag}: nothing is done yet");
        let command = rig.command((tag % u64::from(ENTRIES)) as u16);
        assert_eq!(command.arguments[0].get(), tag as u32);
        rig.post(1, command.id.get(), 0);
        assert_eq!(rig.complete(), Some((tag, Ok(()))));
    }
    assert_eq!(rig.queue.strays(), Strays::default());
}

#[test]
fn completions_that_make_no_sense_are_counted_and_end_nothing() {
    let mut rig = Rig::new();
    rig.submit(7);
    let id = rig.command(0).id.get();
    for wrong in [id + 1, id + 2, 3, 0xffff] {
        rig.post(1, wrong, 0);
        assert_eq!(rig.complete(), None);
    }
    rig.post(2, id, 0);
    rig.post(0xffff, id, 0);
    assert_eq!(rig.complete(), None);
    assert_eq!((rig.queue.strays(), rig.queue.in_flight()), (Strays { unknown_id: 4, wrong_queue: 2 }, 1));

    rig.post(1, id, 0x4004);
    rig.post(1, id, 0);
    let refused = StorageError::Refused { sector: 7, status: 0x4004 };
    assert_eq!(rig.complete(), Some((7, Err(refused))), "the first answer counts");
    assert_eq!(rig.complete(), None);
    assert_eq!(rig.queue.strays(), Strays { unknown_id: 5, wrong_queue: 2 });
}

#[test]
fn a_ring_full_of_new_completions_is_taken_once() {
    let mut rig = Rig::new();
    rig.submit(1);
    // More than were asked for, and one round further on than the driver is.
    for _ in 0..ENTRIES {
        rig.post(1, 9, 0);
    }
    assert_eq!(rig.complete(), None);
    assert_eq!(rig.queue.strays().unknown_id, u64::from(ENTRIES));
    assert_eq!(rig.complete(), None);
    assert_eq!(rig.queue.strays().unknown_id, u64::from(ENTRIES));
}

#[test]
fn pages_are_said_as_the_controller_reads_them() {
    let bytes = IoQueue::list_bytes(LIMITS);
    let mut lists = Coherent::leak(2 * bytes);
    let piece = |iova, len| Piece { iova: Iova::new(iova), len };
    let mut said = |pieces: &[Piece]| {
        let [first, second] = pages(&mut lists, bytes, pieces);
        let listed: Vec<u64> = (0..16).map(|at| lists.read(bytes + 8 * at)).collect();
        assert!((0..bytes).all(|at| lists.read::<u8>(at) == 0), "another slot's list was written");
        (first, second, listed, lists.iova_at(bytes).get())
    };
    let (first, second, ..) = said(&[piece(0x5000, 512)]);
    assert_eq!((first, second), (0x5000, 0));
    let (first, second, ..) = said(&[piece(0x5200, 4096)]);
    assert_eq!((first, second), (0x5200, 0x6000), "the second page from its start");
    let (first, second, ..) = said(&[piece(0x5000, 4096), piece(0x9000, 512)]);
    assert_eq!((first, second), (0x5000, 0x9000));

    let (first, second, listed, list) = said(&[piece(0x5000, 8192), piece(0x1_0000_0000, 8192)]);
    assert_eq!((first, second), (0x5000, list));
    assert_eq!(listed[..3], [0x6000, 0x1_0000_0000, 0x1_0000_1000]);
    let (_, second, listed, list) = said(&[piece(0x5200, 16 * 4096)]);
    assert_eq!(second, list);
    let all: Vec<u64> = (6..22).map(|page| page * 0x1000).collect();
    assert_eq!(listed, all, "the longest request, from the middle of a page");
}
