//! Waiting with a bound: the monotonic clock, deadlines and busy waits.
//!
//! A machine whose clock could not be calibrated has no `now_ns`; every wait here then counts polls instead, so that it
//! still ends.

use crate::arch;

/// What one poll is taken to last when there is no clock.
///
/// Too short on purpose: a wait then lasts longer than asked, and never ends before the device could answer.
const ASSUMED_POLL_NS: u64 = 5;

/// Nanoseconds since the clock was set up, monotonic; `None` on a machine whose clock could not be calibrated.
pub fn now_ns() -> Option<u64> {
    arch::clock::now_ns()
}

/// Waits at least `duration_ns`, spinning.
pub fn busy_wait_ns(duration_ns: u64) {
    let mut deadline = Deadline::after_ns(duration_ns);
    while !deadline.expired() {
        core::hint::spin_loop();
    }
}

/// A point in time after which a wait gives up.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    at_ns: Option<u64>,
    polls_left: u64,
}

impl Deadline {
    /// A deadline `timeout_ns` from now.
    pub fn after_ns(timeout_ns: u64) -> Self {
        Self {
            at_ns: now_ns().map(|now| now.saturating_add(timeout_ns)),
            polls_left: timeout_ns / ASSUMED_POLL_NS + 1,
        }
    }

    /// Whether the deadline has passed. To be called once per poll, since without a clock the calls are what is counted.
    pub fn expired(&mut self) -> bool {
        self.polls_left = self.polls_left.saturating_sub(1);
        match (self.at_ns, now_ns()) {
            (Some(at), Some(now)) => now >= at,
            _ => self.polls_left == 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_passes() {
        let before = now_ns().expect("a host has a clock");
        busy_wait_ns(2_000_000);
        assert!(now_ns().expect("a host has a clock") - before >= 2_000_000);
    }

    #[test]
    fn without_a_clock_polls_are_counted() {
        let mut deadline = Deadline { at_ns: None, polls_left: 3 };
        assert_eq!([(); 3].map(|()| deadline.expired()), [false, false, true]);
        assert!(deadline.expired());
    }
}
