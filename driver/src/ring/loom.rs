//! The queues against a device on another thread, in every interleaving (I13). Run by `cargo xtask test`.
//!
//! Ring entries, descriptors and buffers are plain memory to loom: what no index orders is a data race. Whoever sleeps
//! blocks, so that a doorbell or an interrupt that got lost is a deadlock. What loom cannot show:
//! - A `SeqCst` fence is modelled as one: fences are in one order, and each sees all that happened before the ones
//!   before it, and all that was stored in what those threads read. That is more than the language promises; so a
//!   fence may stand in for an acquire or release that is missing, but only where the other side has one in between too.
//! - The doorbell is memory here; that the architecture's barrier orders memory with registers is not shown.

use super::*;
use crate::addr::PhysAddr;
use crate::engine::Op;
use crate::id::{DomainId, EndpointId};
use crate::options::DomainKind;
use crate::platform::DmaMemory;
use crate::queue::{Batch, Event, EventQueue, RequestQueue};
use crate::shared_memory::Cells;
use crate::wire::fault::{Fault, RECORD_LEN};
use crate::wire::request::Request;
use ::loom::model::Builder;
use ::loom::sync::mpsc::{Receiver, Sender, channel};
use ::loom::thread;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::mem::ManuallyDrop;
use core::ptr::NonNull;
use std::sync::atomic::AtomicUsize;

/// Tries every interleaving of `test` with at most so many preemptions, and says how many there were.
pub(crate) fn explore(name: &str, preemptions: usize, test: impl Fn() + Send + Sync + 'static) {
    let count = Arc::new(AtomicUsize::new(0));
    let mut builder = Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(preemptions));
    let counted = Arc::clone(&count);
    builder.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        test();
    });
    std::println!("{name}: {} interleavings", count.load(Ordering::Relaxed));
}

/// The same in both modes of suppression.
pub(crate) fn explore_both(
    name: &str,
    preemptions: usize,
    test: impl Fn(Suppression) + Copy + Send + Sync + 'static,
) {
    for suppression in [Suppression::Flags, Suppression::EventIndex] {
        explore(&std::format!("{name}, {suppression:?}"), preemptions, move || test(suppression));
    }
}

/// What somebody sleeps by: a doorbell, an interrupt line, a task. Loom's channel, since its `Notify` also wakes for
/// nothing, which takes many times the time.
pub(crate) struct Bell {
    rope: Sender<()>,
    /// Not emptied after a test failed: then loom runs no more.
    clapper: ManuallyDrop<Receiver<()>>,
}

// SAFETY: loom runs one thread at a time, and one thread waits.
unsafe impl Sync for Bell {}

impl Bell {
    pub(crate) fn new() -> Self {
        let (rope, clapper) = channel();
        Self { rope, clapper: ManuallyDrop::new(clapper) }
    }

    pub(crate) fn ring(&self) {
        self.rope.send(()).unwrap();
    }

    /// Sleeps until it rang since the last time, how often does not matter.
    pub(crate) fn wait(&self) {
        self.clapper.recv().unwrap();
        while self.clapper.try_recv().is_ok() {}
    }
}

impl Drop for Bell {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: once, and nobody uses it any more.
            unsafe { ManuallyDrop::drop(&mut self.clapper) };
        }
    }
}

/// Memory for a queue, which only its tracked cells stand for.
pub(crate) fn memory(phys: u64, len: usize) -> DmaMemory {
    DmaMemory { phys: PhysAddr::new(phys), ptr: NonNull::<u64>::dangling().cast(), len }
}

/// The device's end of a queue. It orders its own accesses as the standard asks.
pub(crate) struct Device {
    cells: Arc<Cells>,
    phys: u64,
    layout: Layout,
    size: u16,
    suppression: Suppression,
    seen: u16,
    used: u16,
}

/// A chain that the device took.
pub(crate) struct Taken {
    head: u16,
    /// The bytes of the readable descriptor.
    pub request: Vec<u8>,
    /// Where the writable one points, and its length.
    answer: (usize, usize),
}

impl Device {
    pub(crate) fn of(ring: &Ring) -> Self {
        Self {
            cells: ring.memory.share(),
            phys: ring.memory.phys(0).get(),
            layout: ring.layout,
            size: ring.size,
            suppression: ring.suppression,
            seen: 0,
            used: 0,
        }
    }

    fn has_more(&self) -> bool {
        self.cells.load(self.layout.avail + 2, Ordering::Acquire) != self.seen
    }

    /// Where a descriptor points, its length, its flags, and the next one.
    fn descriptor(&self, index: u16) -> (usize, usize, u16, u16) {
        let mut bytes = [0; DESC_LEN];
        self.cells.read(DESC_LEN * usize::from(index), &mut bytes);
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let address = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        let len = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
        ((address - self.phys) as usize, len as usize, u16_at(12), u16_at(14))
    }

    /// The next chain, if there is one.
    pub(crate) fn take(&mut self) -> Option<Taken> {
        if !self.has_more() {
            return None;
        }
        let entry = usize::from(self.seen % self.size);
        let head = self.cells.load(self.layout.avail + 4 + 2 * entry, Ordering::Relaxed);
        self.seen = self.seen.wrapping_add(1);
        let (mut at, mut len, mut flags, next) = self.descriptor(head);
        let mut request = Vec::new();
        if flags & DESC_NEXT != 0 {
            request = vec![0; len];
            self.cells.read(at, &mut request);
            (at, len, flags, _) = self.descriptor(next);
        }
        assert_eq!(flags, DESC_WRITE, "the last descriptor is for the answer");
        Some(Taken { head, request, answer: (at, len) })
    }

    /// Gives a chain back with its answer, and says whether an interrupt is due.
    pub(crate) fn complete(&mut self, taken: &Taken, answer: &[u8]) -> bool {
        let (at, len) = taken.answer;
        assert!(answer.len() <= len);
        self.cells.write(at, answer);
        let entry = self.layout.used + 4 + USED_ELEM_LEN * usize::from(self.used % self.size);
        self.cells.write(entry, &u32::from(taken.head).to_le_bytes());
        self.cells.write(entry + 4, &(answer.len() as u32).to_le_bytes());
        self.show_used(self.used.wrapping_add(1))
    }

    /// Says that entries up to `index` are used, whatever they hold, and says whether an interrupt is due.
    pub(crate) fn show_used(&mut self, index: u16) -> bool {
        let old = core::mem::replace(&mut self.used, index);
        self.cells.store(self.layout.used + 2, self.used, Ordering::Release);
        fence(Ordering::SeqCst);
        let relaxed = |offset| self.cells.load(offset, Ordering::Relaxed);
        match self.suppression {
            Suppression::Flags => relaxed(self.layout.avail) & AVAIL_NO_INTERRUPT == 0,
            Suppression::EventIndex => {
                let event = relaxed(self.layout.avail + 4 + 2 * usize::from(self.size));
                crossed(event, old, self.used)
            }
        }
    }

    /// Wants no doorbell for a while. With an index it does not want one anyway, but for the next entry.
    fn stay_awake(&self) {
        if self.suppression == Suppression::Flags {
            self.cells.store(self.layout.used, USED_NO_NOTIFY, Ordering::Relaxed);
        }
    }

    /// Asks for the doorbell, looks again, and says whether there is nothing to do until it rings.
    fn may_sleep(&self) -> bool {
        match self.suppression {
            Suppression::Flags => self.cells.store(self.layout.used, 0, Ordering::Relaxed),
            Suppression::EventIndex => {
                let avail_event = self.layout.used + 4 + USED_ELEM_LEN * usize::from(self.size);
                self.cells.store(avail_event, self.seen, Ordering::Relaxed);
            }
        }
        fence(Ordering::SeqCst);
        !self.has_more()
    }

    /// Hands over so many chains, and sleeps until the doorbell rings whenever there is none.
    pub(crate) fn serve(&mut self, count: usize, doorbell: &Bell, mut each: impl FnMut(&mut Self, Taken)) {
        let mut done = 0;
        loop {
            self.stay_awake();
            while let Some(taken) = self.take() {
                each(self, taken);
                done += 1;
            }
            if done == count {
                return;
            }
            if self.may_sleep() {
                doorbell.wait();
            }
        }
    }
}

/// The answer of a device that did what it was asked to.
pub(crate) const OK: [u8; 4] = [0; 4];

fn request(endpoint: u32) -> Request {
    let (domain, endpoint) = (DomainId::new(1), EndpointId::new(endpoint));
    Request::Attach { domain, endpoint, kind: DomainKind::Translated }
}

fn bytes(endpoint: u32) -> Vec<u8> {
    request(endpoint).encode().to_bytes()
}

fn request_queue(size: u16, suppression: Suppression) -> (RequestQueue, Device) {
    // SAFETY: accessed by nobody.
    let memory = unsafe { SharedMemory::new(memory(0x10_0000, RequestQueue::memory_len(size, 0))) };
    let queue = RequestQueue::new(memory, size, suppression, 0);
    let device = Device::of(queue.ring());
    (queue, device)
}

/// Submits a request for this endpoint, and says whether the doorbell is due.
fn send(queue: &mut RequestQueue, endpoint: u32) -> (Batch, bool) {
    let mut batch = Batch::default();
    assert!(queue.submit(&request(endpoint), Op::None, &mut batch));
    (batch, queue.publish())
}

/// What the device can see is complete: entry, descriptors, request; and what the driver takes is, too: entry and
/// answer.
///
/// Fails with a relaxed store in `publish`, with a relaxed load in `used_index`, with the index stored before the
/// entry, and with the entry published before the request is written.
#[test]
fn what_an_index_covers_is_complete() {
    explore_both("complete", 3, |suppression| {
        let (mut queue, mut device) = request_queue(4, suppression);
        let device = thread::spawn(move || {
            let mut seen = Vec::new();
            for _ in 0..2 {
                if let Some(taken) = device.take() {
                    seen.push(taken.request.clone());
                    device.complete(&taken, &OK);
                }
            }
            seen
        });
        let mut answered = 0;
        for endpoint in [7, 9] {
            let _ = send(&mut queue, endpoint);
            if let Some(completion) = queue.complete() {
                assert_eq!(completion.outcome, Ok(()));
                answered += 1;
            }
        }
        let seen = device.join().unwrap();
        assert_eq!(seen, [bytes(7), bytes(9)][..seen.len()]);
        while let Some(completion) = queue.complete() {
            assert_eq!(completion.outcome, Ok(()));
            answered += 1;
        }
        assert_eq!((answered, queue.stray()), (seen.len(), 0));
    });
}

/// A device that goes to sleep is rung for what it did not see.
///
/// Fails without the fence in `publish`.
#[test]
fn no_doorbell_is_lost() {
    explore_both("doorbell", 3, |suppression| {
        let (mut queue, mut device) = request_queue(4, suppression);
        let doorbell = Arc::new(Bell::new());
        let rung = Arc::clone(&doorbell);
        let device = thread::spawn(move || {
            let mut seen = Vec::new();
            device.serve(2, &rung, |_, taken| seen.push(taken.request));
            seen
        });
        for endpoint in [7, 9] {
            if send(&mut queue, endpoint).1 {
                doorbell.ring();
            }
        }
        assert_eq!(device.join().unwrap(), [bytes(7), bytes(9)]);
    });
}

/// An owner who asks for interrupts, looks again, and sleeps, gets one for what he did not see.
///
/// Fails without the second look in `pop`, or its fence, and where `pop` does not move the wish on; with flags,
/// without the fences in both `pop` and `set_interrupts`. That in `set_interrupts` alone can be left out: a look
/// that finds nothing has its own.
#[test]
fn no_interrupt_is_lost() {
    explore_both("interrupt", 3, |suppression| {
        let (mut queue, mut device) = request_queue(4, suppression);
        for endpoint in [7, 9] {
            let _ = send(&mut queue, endpoint);
        }
        let interrupt = Arc::new(Bell::new());
        let line = Arc::clone(&interrupt);
        let device = thread::spawn(move || {
            while let Some(taken) = device.take() {
                if device.complete(&taken, &OK) {
                    line.ring();
                }
            }
        });
        let mut answered = 0;
        queue.want_interrupts(Interrupts::Wanted);
        loop {
            while let Some(completion) = queue.complete() {
                assert_eq!(completion.outcome, Ok(()));
                answered += 1;
            }
            if answered == 2 {
                break;
            }
            interrupt.wait();
        }
        device.join().unwrap();
    });
}

/// One slot for two requests, one after the other, with both sides asleep in between: the driver wants interrupts
/// only while it sleeps.
///
/// Fails like the tests before.
#[test]
fn rounds_through_one_slot() {
    explore_both("rounds", 2, |suppression| {
        let (mut queue, mut device) = request_queue(2, suppression);
        let (doorbell, interrupt) = (Arc::new(Bell::new()), Arc::new(Bell::new()));
        let (rung, line) = (Arc::clone(&doorbell), Arc::clone(&interrupt));
        let device = thread::spawn(move || {
            let mut seen = Vec::new();
            device.serve(2, &rung, |device, taken| {
                seen.push(taken.request.clone());
                if device.complete(&taken, &OK) {
                    line.ring();
                }
            });
            seen
        });
        for endpoint in [7, 9] {
            let (mut batch, due) = send(&mut queue, endpoint);
            if due {
                doorbell.ring();
            }
            loop {
                if queue.complete().is_some() {
                    break;
                }
                queue.want_interrupts(Interrupts::Wanted);
                if queue.complete().is_some() {
                    break;
                }
                interrupt.wait();
            }
            queue.want_interrupts(Interrupts::Unwanted);
            assert_eq!(queue.take(&mut batch), Some(Ok(())));
        }
        assert_eq!(device.join().unwrap(), [bytes(7), bytes(9)]);
    });
}

/// Events: the queue's owner wants an interrupt for each that he did not see, always.
///
/// Fails without the second look in `pop`, or its fence.
#[test]
fn no_event_is_lost() {
    explore_both("event", 3, |suppression| {
        // SAFETY: accessed by nobody.
        let memory = unsafe { SharedMemory::new(memory(0x20_0000, EventQueue::memory_len(2))) };
        let mut queue = EventQueue::new(memory, 2, suppression);
        let _ = queue.publish();
        let mut device = Device::of(queue.ring());
        let interrupt = Arc::new(Bell::new());
        let line = Arc::clone(&interrupt);
        let record = |endpoint: u8| {
            let mut record = [0; RECORD_LEN];
            (record[0], record[8]) = (2, endpoint);
            record
        };
        let device = thread::spawn(move || {
            for endpoint in [7, 9] {
                let buffer = device.take().expect("both buffers are posted");
                if device.complete(&buffer, &record(endpoint)) {
                    line.ring();
                }
            }
        });
        for endpoint in [7, 9] {
            let event = loop {
                match queue.next() {
                    Some(event) => break event,
                    None => interrupt.wait(),
                }
            };
            assert_eq!(event, Event::Fault(Fault::decode(&record(endpoint)).unwrap()));
        }
        device.join().unwrap();
    });
}
