//! The request queue: pops chains, has requests executed, answers them, and applies injection on the way.

use alloc::vec;
use alloc::vec::Vec;

use crate::chain::Chain;
use crate::device::Device;
use crate::execute::{Reply, Stop};
use crate::inject::{Execute, Inject, Release};
use crate::memory::GuestMemory;
use crate::number::{REQUEST_QUEUE, feature};
use crate::record::LIST_LIMIT;
use crate::ring::RingError;

/// Requests handled in one notification. A driver that adds requests meanwhile is heard again at its next kick.
const MAX_REQUESTS_PER_KICK: usize = 65_536;

/// Requests that can be held back at a time. Further ones are answered at once.
const MAX_HELD: usize = 1024;

/// A request that waits for its release.
#[derive(Clone, Debug)]
pub(crate) struct HeldRequest {
    chain: Chain,
    /// The reply, if it was executed.
    reply: Option<Reply>,
}

impl Device {
    /// Handles every available request.
    pub(crate) fn drain_requests(&mut self, mem: &mut dyn GuestMemory) {
        let mut deferred = Vec::new();
        for _ in 0..MAX_REQUESTS_PER_KICK {
            match self.next_request(mem) {
                Ok(Some(chain)) => self.take_request(chain, &mut deferred, mem),
                Ok(None) => break,
                Err(error) => self.ring_failed(error),
            }
            if !self.is_running() {
                break;
            }
        }
        while let Some(held) = deferred.pop()
            && self.is_running()
        {
            self.answer_held(held, mem);
        }
    }

    /// Pops a chain. When there is none, asks for a kick and looks once more, as EVENT_IDX wants it.
    fn next_request(&mut self, mem: &mut dyn GuestMemory) -> Result<Option<Chain>, RingError> {
        let indirect = self.iommu.negotiated & feature::RING_INDIRECT_DESC != 0;
        let event_idx = self.event_idx();
        let Some(ring) = self.rings[usize::from(REQUEST_QUEUE)].as_mut() else {
            return Ok(None);
        };
        if let Some(chain) = ring.pop(mem, indirect)? {
            return Ok(Some(chain));
        }
        if event_idx {
            ring.request_kick(mem)?;
        }
        ring.pop(mem, indirect)
    }

    fn take_request(&mut self, chain: Chain, deferred: &mut Vec<HeldRequest>, mem: &mut dyn GuestMemory) {
        self.check_reuse(&chain);
        let mut inject = self.inject.next();
        let full = self.held.len().max(deferred.len()) >= MAX_HELD;
        if full && matches!(inject, Inject::Hold(_) | Inject::Defer) {
            inject = Inject::Pass;
        }
        if inject == Inject::Hold(Execute::AtRelease) {
            return self.held.push(HeldRequest { chain, reply: None });
        }
        let Ok(mut reply) = self.reply_to(&chain, inject, mem) else {
            return self.fail();
        };
        let mut id = u32::from(chain.head);
        match inject {
            Inject::Hold(_) => return self.held.push(HeldRequest { chain, reply: Some(reply) }),
            Inject::Defer => return deferred.push(HeldRequest { chain, reply: Some(reply) }),
            Inject::Drop(_) => return self.remember_dropped(chain),
            Inject::Status(status) => reply.set_status(status),
            Inject::TailReserved(reserved) => reply.set_tail_reserved(reserved),
            Inject::UsedLen(len) => reply.used_len = len,
            Inject::UsedId(other) => id = other,
            _ => {}
        }
        self.answer(&chain, id, &reply, mem);
        match inject {
            Inject::Twice => self.answer(&chain, id, &reply, mem),
            Inject::UsedJump(count) => self.jump_used(count, mem),
            _ => {}
        }
    }

    /// Executes a request, or does what is injected instead.
    fn reply_to(&mut self, chain: &Chain, inject: Inject, mem: &dyn GuestMemory) -> Result<Reply, Stop> {
        match inject {
            Inject::NeedsReset => self.note(chain, inject, mem).and(Err(Stop)),
            Inject::Unwritten | Inject::Drop(Execute::AtRelease) => {
                self.note(chain, inject, mem).map(|()| Reply::UNWRITTEN)
            }
            Inject::Refuse(status) => {
                self.note(chain, inject, mem).map(|()| Reply::refusal(chain.writable_len(), status))
            }
            _ => self.execute(chain, inject, mem),
        }
    }

    /// Reports a chain whose memory or descriptors an unanswered request still owns.
    fn check_reuse(&mut self, chain: &Chain) {
        let owned = self.held.iter().map(|held| &held.chain).chain(&self.dropped);
        let mut reused = false;
        for other in owned {
            reused |= other.head == chain.head || other.conflicts_with(chain);
        }
        if reused {
            self.violate("core", "a request reuses what an unanswered request owns", Some(self.requests));
        }
    }

    fn remember_dropped(&mut self, chain: Chain) {
        if self.dropped.len() < LIST_LIMIT {
            self.dropped.push(chain);
        }
    }

    /// Answers held requests and returns how many they were. Raises the interrupt once for all.
    ///
    /// Nothing happens while the device is not running; a reset of device or queue has forgotten them.
    pub fn release(&mut self, which: Release, mem: &mut dyn GuestMemory) -> usize {
        if !self.is_running() {
            return 0;
        }
        let len = self.held.len();
        let mut released = match which {
            Release::All | Release::AllReversed => core::mem::take(&mut self.held),
            Release::Oldest if len > 0 => vec![self.held.remove(0)],
            Release::Newest if len > 0 => vec![self.held.remove(len - 1)],
            Release::Nth(index) if index < len => vec![self.held.remove(index)],
            Release::Oldest | Release::Newest | Release::Nth(_) => Vec::new(),
        };
        if which == Release::AllReversed {
            released.reverse();
        }
        let count = released.len();
        for held in released {
            self.answer_held(held, mem);
        }
        self.interrupt_if_due(REQUEST_QUEUE, mem);
        count
    }

    /// Answers every held request that was not executed with this status, and forgets it. Returns how many they were.
    pub fn refuse_held(&mut self, status: u8, mem: &mut dyn GuestMemory) -> usize {
        if !self.is_running() {
            return 0;
        }
        let (refused, kept) =
            core::mem::take(&mut self.held).into_iter().partition(|held| held.reply.is_none());
        self.held = kept;
        let refused: Vec<HeldRequest> = refused;
        let count = refused.len();
        for held in refused {
            if let Ok(reply) = self.reply_to(&held.chain, Inject::Refuse(status), mem) {
                self.answer(&held.chain, u32::from(held.chain.head), &reply, mem);
            }
        }
        self.interrupt_if_due(REQUEST_QUEUE, mem);
        count
    }

    fn answer_held(&mut self, held: HeldRequest, mem: &mut dyn GuestMemory) {
        let reply = match held.reply {
            Some(reply) => Ok(reply),
            None => self.execute(&held.chain, Inject::Hold(Execute::AtRelease), mem),
        };
        match reply {
            Ok(reply) => self.answer(&held.chain, u32::from(held.chain.head), &reply, mem),
            Err(Stop) => self.fail(),
        }
    }

    fn answer(&mut self, chain: &Chain, id: u32, reply: &Reply, mem: &mut dyn GuestMemory) {
        let Some(ring) = self.rings[usize::from(REQUEST_QUEUE)].as_mut() else {
            return;
        };
        let written = chain.write(mem, &reply.bytes).map_err(RingError::from);
        let pushed = written.and_then(|()| ring.push_used(mem, id, reply.used_len));
        if let Err(error) = pushed {
            self.ring_failed(error);
        }
    }

    fn jump_used(&mut self, count: u16, mem: &mut dyn GuestMemory) {
        let ring = self.rings[usize::from(REQUEST_QUEUE)].as_mut();
        if let Some(Err(error)) = ring.map(|ring| ring.skip_used(mem, count)) {
            self.ring_failed(error);
        }
    }
}
