//! Faults between the event queue and whoever fetches them.

use crate::queue::Event;
use crate::wire::fault::Fault;
use alloc::collections::VecDeque;

/// Faults that wait to be fetched, in a list of fixed capacity.
pub(crate) struct FaultBacklog {
    waiting: VecDeque<Fault>,
    capacity: usize,
    pub(crate) counts: FaultCounts,
}

/// Fault records by what became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultCounts {
    /// Records that the device delivered and that say something.
    pub delivered: u64,
    /// Of those, records that found no room and were only counted.
    pub dropped: u64,
    /// Records that the standard says to ignore, or that are too short.
    pub malformed: u64,
}

impl FaultBacklog {
    /// Room for `capacity` faults. Allocates.
    pub(crate) fn new(capacity: usize) -> Self {
        Self { waiting: VecDeque::with_capacity(capacity), capacity, counts: FaultCounts::default() }
    }

    /// Takes an event in. Returns the fault, to be counted for its endpoint.
    pub(crate) fn push(&mut self, event: Event) -> Option<Fault> {
        let Event::Fault(fault) = event else {
            self.counts.malformed += 1;
            return None;
        };
        self.counts.delivered += 1;
        if self.waiting.len() < self.capacity {
            self.waiting.push_back(fault);
        } else {
            self.counts.dropped += 1;
        }
        Some(fault)
    }

    pub(crate) fn pop(&mut self) -> Option<Fault> {
        self.waiting.pop_front()
    }
}
