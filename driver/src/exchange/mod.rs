//! Operations: begun in the engine, sent, waited for and settled, with the lock held only in between.
//!
//! Each is written once, as a future. Whoever blocks polls it until it is done ([`Shared::block_on`]); an executor
//! polls it when a waker says so. Dropping one leaves what is in flight with the device, and what nobody owns any
//! more in quarantine.

mod attach;
mod each;
mod flush;
mod list;
#[cfg(all(test, loom))]
mod loom;
mod map;
mod quick;
mod revive;
mod sleepers;
mod state;
mod unmap;
mod wait;

pub(crate) use attach::{attach_first, detach_first};
pub(crate) use each::{map_each, unmap_each, unmap_each_now};
pub(crate) use flush::{flush, flush_all_the_same, flush_due, unmap_by_policy};
pub(crate) use list::map_list_first;
pub(crate) use map::{Place, Run, map};
pub(crate) use quick::{Mapped, SentMap, defer_first, map_first, unmap_first};
pub(crate) use revive::{revive_list, revive_one};
pub(crate) use sleepers::{Need, Sleepers, Wake};
pub(crate) use state::{Access, State, StateLock};
pub(crate) use unmap::{Owned, reclaim, unmap};
pub(crate) use wait::{Deadline, InFlight};

use crate::barrier;
use crate::dma::{HeldMemory, Release};
use crate::engine::{Attachment, DomainKey, DomainRecord, Op};
use crate::id::EndpointId;
use crate::options::Options;
use crate::platform::Platform;
use crate::queue::Batch;
use crate::sync::{AtomicBool, AtomicUsize, Ordering};
use crate::transport::{DoorbellCell, Transport};
use crate::wire::request::Request;
use alloc::boxed::Box;

/// The queues' numbers.
pub(crate) const REQUEST_QUEUE: u16 = 0;
pub(crate) const EVENT_QUEUE: u16 = 1;

/// One IOMMU, shared by all handles.
pub(crate) struct Shared<P: Platform> {
    pub platform: P,
    /// Declared before the transport that it belongs to, so that it goes first.
    pub request_doorbell: DoorbellCell,
    pub transport: Box<dyn Transport>,
    pub options: Options,
    /// The smallest mapping.
    pub granule: u64,
    pub state: StateLock<P::Lock>,
    /// Whether the request queue's doorbell is due. Rung by whoever comes first, so that requests are not held
    /// up by a submitter that was interrupted before it rang: with EVENT_IDX the device asks only once.
    pub doorbell: AtomicBool,
    /// How often it was rung.
    pub kicks: AtomicUsize,
    /// Whether the bypass was closed, as far as the device has one.
    pub live: AtomicBool,
    /// What the bypass was when the driver started.
    pub bypass_found: Option<u8>,
    /// Whether the device confirmed a reset after which it has no queues.
    pub forgotten: AtomicBool,
    /// Set by an interrupt, cleared by a poll.
    pub interrupted: AtomicBool,
    /// The same for an interrupt that the configuration, or the device's status, caused.
    pub changed: AtomicBool,
}

/// Whether an operation took a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    Nothing,
    Request,
}

impl<P: Platform> Shared<P> {
    /// Notes a doorbell that the device wants, to be rung by [`ring`](Self::ring) when the lock is dropped. Called under the
    /// lock.
    #[inline(always)]
    pub(crate) fn note_doorbell(&self) {
        self.doorbell.store(true, Ordering::Release);
    }

    /// Counts a request for its domain, and notes the doorbell where the device wants it. Called under the lock.
    #[inline(always)]
    pub(crate) fn note_sent(&self, domain: &mut DomainRecord, wanted: bool) {
        domain.counts.requests += 1;
        if wanted {
            domain.counts.kicks += 1;
            self.note_doorbell();
        }
    }

    /// Rings the request queue's doorbell if it is due. Called without the lock.
    #[inline]
    pub(crate) fn ring(&self) {
        if self.doorbell.swap(false, Ordering::AcqRel) {
            self.kicks.fetch_add(1, Ordering::Relaxed);
            barrier::memory_before_doorbell();
            if !self.request_doorbell.ring(REQUEST_QUEUE) {
                self.notify();
            }
        }
    }

    /// For transports without a doorbell of one store.
    #[cold]
    fn notify(&self) {
        self.transport.notify(REQUEST_QUEUE);
    }

    /// Submits one request and publishes it. Called under the lock.
    #[inline(always)]
    pub(crate) fn submit_one(&self, state: &mut State, request: &Request, op: Op) -> Batch {
        let mut batch = Batch::default();
        state.submit(request, op, &mut batch);
        state.publish(op.domain(), &self.doorbell);
        batch
    }

    /// Whether the device confirmed that the endpoint is in this domain.
    pub(crate) fn is_attached(&self, endpoint: EndpointId, key: DomainKey) -> bool {
        let state = self.state.lock();
        let record = state.engine.endpoint(endpoint);
        record.is_some_and(|record| record.attachment == Attachment::Attached(key))
    }

    /// Whether the endpoint is in no domain for certain.
    pub(crate) fn is_detached(&self, endpoint: EndpointId) -> bool {
        let state = self.state.lock();
        let record = state.engine.endpoint(endpoint);
        record.is_some_and(|record| record.attachment == Attachment::Detached)
    }

    /// Gives memory back that no device reaches any more. Called without the lock.
    pub(crate) fn release(&self, held: HeldMemory) {
        let (memory, release) = held.into_parts();
        match release {
            // SAFETY: the memory came from `dma_alloc` with this alignment, and its record, which was the only
            // thing that held it, said that the device cannot reach it any more.
            Release::Platform { align } => unsafe { self.platform.dma_free(memory, align) },
            // SAFETY: whoever made the held memory promised that this takes it back, and it is called once.
            Release::Hook(hook) => unsafe { hook(memory) },
        }
    }
}
