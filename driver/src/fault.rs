//! Faults between the event queue and whoever fetches them.

use crate::options::FaultLimit;
use crate::wire::fault::Fault;
use alloc::collections::VecDeque;
use core::task::Waker;

/// Faults that wait to be fetched, in a list of fixed capacity.
pub(crate) struct FaultBacklog {
    waiting: VecDeque<Fault>,
    capacity: usize,
    /// Whom the next fault wakes.
    pub(crate) waker: Option<Waker>,
    pub(crate) counts: FaultCounts,
}

/// Fault records by what became of them: all that were delivered were fetched, wait, or are in one of the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultCounts {
    /// Records that the device delivered and that say something.
    pub delivered: u64,
    /// Of those, records that found no room and were only counted.
    pub dropped: u64,
    /// Of those, records of endpoints that had their share, and were only counted.
    pub limited: u64,
    /// Records that the standard says to ignore, or that are too short.
    pub malformed: u64,
}

impl FaultBacklog {
    /// Room for `capacity` faults. Allocates.
    pub(crate) fn new(capacity: usize) -> Self {
        let waiting = VecDeque::with_capacity(capacity);
        Self { waiting, capacity, waker: None, counts: FaultCounts::default() }
    }

    /// Takes a fault in, which is `kept` unless there is no room.
    pub(crate) fn push(&mut self, fault: Fault, kept: bool) {
        self.counts.delivered += 1;
        if !kept {
            self.counts.limited += 1;
        } else if self.waiting.len() < self.capacity {
            self.waiting.push_back(fault);
        } else {
            self.counts.dropped += 1;
        }
    }

    pub(crate) fn pop(&mut self) -> Option<Fault> {
        self.waiting.pop_front()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

/// How many faults there were since the window began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct FaultWindow {
    began_ns: u64,
    faults: u32,
}

impl FaultWindow {
    /// Counts one more, in a new window if the last one is over, and returns how many there are in it.
    pub(crate) fn count(&mut self, now_ns: Option<u64>, limit: FaultLimit) -> u32 {
        let now = now_ns.unwrap_or(0);
        let over = now.saturating_sub(self.began_ns) >= limit.window_ns;
        if self.faults == 0 || (now_ns.is_some() && over) {
            *self = Self { began_ns: now, faults: 0 };
        }
        self.faults = self.faults.saturating_add(1);
        self.faults
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_begins_with_its_first_fault() {
        let limit = FaultLimit { records: 2, window_ns: 100 };
        let mut window = FaultWindow::default();
        let counts = [500, 501, 599, 600, 650, 710].map(|now| window.count(Some(now), limit));
        assert_eq!(counts, [1, 2, 3, 1, 2, 1]);
    }

    #[test]
    fn without_a_clock_a_window_does_not_end_by_itself() {
        let limit = FaultLimit { records: 2, window_ns: 0 };
        let mut window = FaultWindow::default();
        assert_eq!([(); 3].map(|()| window.count(None, limit)), [1, 2, 3]);
    }
}
