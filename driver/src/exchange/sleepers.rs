//! Who sleeps, and who is to be woken.

use super::State;
use crate::engine::DomainKey;
use crate::error::RequestError;
use crate::ring::Interrupts;
use alloc::collections::VecDeque;
use core::task::Waker;

/// Someone who waits for a slot, or for the area of PROBE and a slot.
pub(super) struct Waiting {
    waker: Waker,
    need: Need,
}

/// Those who wait for a slot, and when the first deadline of all sleepers passes.
pub(crate) struct Sleepers {
    pub(super) waiting: VecDeque<Waiting>,
    /// The earliest deadline of those who went to sleep since the last alarm; `None` without sleepers or clock.
    alarm_ns: Option<u64>,
}

/// Sleepers that wait for a slot. One more does not sleep, but is polled again at once.
const MAX_WAITING: usize = 64;

impl Sleepers {
    /// Allocates.
    pub(crate) fn new() -> Self {
        Self { waiting: VecDeque::with_capacity(MAX_WAITING), alarm_ns: None }
    }

    /// Whether anybody waits for a slot.
    pub(super) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Returns the waker, where it is there already or there is no room for it.
    pub(super) fn push(&mut self, waker: Waker, need: Need) -> Result<(), (Waker, bool)> {
        if self.waiting.iter().any(|known| known.need == need && known.waker.will_wake(&waker)) {
            return Err((waker, true));
        }
        if self.waiting.len() == MAX_WAITING {
            return Err((waker, false));
        }
        self.waiting.push_back(Waiting { waker, need });
        Ok(())
    }

    pub(super) fn set_alarm(&mut self, ends_ns: Option<u64>) {
        self.alarm_ns = match (self.alarm_ns, ends_ns) {
            (Some(set), Some(ends)) => Some(set.min(ends)),
            (set, ends) => set.or(ends),
        };
    }
}

/// What an operation needs to send a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    Slot,
    /// A slot and PROBE's area.
    Probe,
    /// A slot, and that nobody flushes this domain.
    Flush(DomainKey),
    /// A slot, also while all others wait for the end of a recovery.
    RecoverySlot,
    RecoveryProbe,
}

impl State {
    /// Whether a request can be sent now.
    pub(crate) fn can_send(&self, need: Need) -> bool {
        let probe = matches!(need, Need::Probe | Need::RecoveryProbe);
        let flushing = matches!(need, Need::Flush(key) if self.engine.is_flushing(key));
        !flushing && !self.has_to_wait(need) && self.requests.can_submit(probe)
    }

    /// Whether a recovery has to end first. Only a shutdown is final.
    pub(super) fn has_to_wait(&self, need: Need) -> bool {
        let recovering = matches!(need, Need::RecoverySlot | Need::RecoveryProbe);
        self.paused && !recovering && self.dead != Some(RequestError::ShutDown)
    }
}

/// Who is to be woken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wake {
    Nobody,
    /// Whose answer is there, and, where a slot is free, who waits for one.
    Due,
    /// All who sleep: they find out why.
    All,
}

impl State {
    /// Whom [`Shared::wake`] has to wake after the ring was drained or a slot came free. All, when it turned out
    /// broken.
    #[inline]
    pub(crate) fn wake_due(&mut self) -> Wake {
        let asleep = self.requests.sleepers() > 0 || !self.sleepers.waiting.is_empty();
        if asleep || self.requests.broken().is_some() { self.wake_due_of_many() } else { Wake::Nobody }
    }

    #[cold]
    fn wake_due_of_many(&mut self) -> Wake {
        if self.dead.is_none() && self.requests.broken().is_some() {
            self.dead = self.requests.broken();
            return Wake::All;
        }
        let slot_due = self.sleepers.waiting.iter().any(|one| self.can_send(one.need));
        if self.requests.has_due() || slot_due { Wake::Due } else { Wake::Nobody }
    }

    /// The next of those who wait for a slot and can have one, or of all.
    pub(super) fn take_waiting(&mut self, all: bool) -> Option<Waker> {
        let called = |one: &Waiting| all || self.can_send(one.need);
        let index = self.sleepers.waiting.iter().position(called)?;
        self.sleepers.waiting.remove(index).map(|one| one.waker)
    }

    /// Whether nothing is answered any more. Nobody falls asleep then: all who slept were woken.
    pub(super) fn is_hopeless(&self) -> bool {
        self.dead.is_some() || self.requests.broken().is_some()
    }

    /// Without sleepers the device need not interrupt: whoever blocks looks by himself.
    #[inline]
    pub(super) fn rest_if_nobody_sleeps(&mut self) {
        if self.requests.sleepers() == 0 && self.sleepers.waiting.is_empty() {
            self.requests.want_interrupts(Interrupts::Unwanted);
        }
    }

    /// The same for a poll by the embedder, at this time: deadlines pass for those who sleep, too.
    pub(crate) fn wake_due_at(&mut self, now_ns: Option<u64>) -> Wake {
        let asleep = self.requests.sleepers() > 0 || !self.sleepers.waiting.is_empty();
        let passed = match (now_ns, self.sleepers.alarm_ns) {
            (Some(now), Some(alarm)) => now >= alarm,
            (Some(_), None) => false,
            // Without a clock a deadline is a number of polls, so each counts.
            (None, _) => true,
        };
        if !asleep || !passed {
            return self.wake_due();
        }
        self.sleepers.alarm_ns = None;
        Wake::All
    }
}
