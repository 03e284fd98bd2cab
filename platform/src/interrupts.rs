//! Interrupts of devices: which line, and what happens when it comes.
//!
//! ```text
//! firmware          device tree or a PCI register: where a device's line goes         `Machine::line_of`
//! this module       the handlers of each line, and of each message                    `connect`, `connect_message`
//! arch::interrupts  the controller: lines on and off, sleeping, calling `dispatch`
//! ```
//!
//! A handler runs with interrupts off, on the CPU that took the interrupt, in the middle of anything. It takes no lock but
//! [`InterruptsOff`](crate::lock::InterruptsOff), and waits for nothing. Lines are shared: each of a line's handlers looks
//! at its own device. A line that comes again and again without being anybody's is turned off, so that a device that
//! nobody drives cannot stop the machine.

use alloc::boxed::Box;
use alloc::string::String;
use core::fmt;
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use spin::Once;

use crate::arch::interrupts as controller;
use crate::memory::MapRegistersError;
use crate::pci::message::Message;

/// How many handlers there can be.
const MAX_HANDLERS: usize = 32;
/// How often a line may come in a row and be nobody's.
const MAX_STRAY: u32 = 1000;

/// What makes a line come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// The device, as long as it wants something.
    Level,
    /// A change of the line.
    Edge,
}

/// A line, by the number that the architecture's controller knows it by: an input of the 8259s, a source of the PLIC, an
/// interrupt of the GIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line {
    /// The number.
    pub number: u32,
    /// What makes it come.
    pub trigger: Trigger,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let trigger = match self.trigger {
            Trigger::Level => "level",
            Trigger::Edge => "edge",
        };
        write!(f, "line {} ({trigger})", self.number)
    }
}

/// Whether an interrupt was a handler's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// It was.
    Mine,
    /// It was not: another device pulled the line.
    NotMine,
}

/// A controller, or a line, that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum InterruptError {
    /// The machine has no controller that the kernel can drive.
    NoController {
        /// What it lacks.
        reason: String,
    },
    /// The controller's registers could not be mapped.
    Registers(MapRegistersError),
    /// The controller has no such line.
    NoLine {
        /// The line's number.
        number: u32,
    },
    /// Firmware does not say where the device's line goes.
    NotConnected {
        /// Why not.
        reason: String,
    },
    /// There are too many handlers.
    TooManyHandlers,
}

impl fmt::Display for InterruptError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoController { reason } => write!(f, "no interrupt controller: {reason}"),
            Self::Registers(error) => write!(f, "interrupt controller: {error}"),
            Self::NoLine { number } => write!(f, "the interrupt controller has no line {number:#x}"),
            Self::NotConnected { reason } => write!(f, "no interrupt line: {reason}"),
            Self::TooManyHandlers => write!(f, "more than {MAX_HANDLERS} interrupt handlers"),
        }
    }
}

impl core::error::Error for InterruptError {}

struct Handler {
    number: u32,
    handle: Box<dyn Fn() -> Claim + Send + Sync>,
}

/// Filled in order and never emptied, so that [`dispatch`] needs no lock.
static HANDLERS: [Once<Handler>; MAX_HANDLERS] = [const { Once::new() }; MAX_HANDLERS];
static CONNECTED: AtomicUsize = AtomicUsize::new(0);
/// Interrupts in a row that were nobody's.
static STRAY: AtomicU32 = AtomicU32::new(0);

/// Has `handle` called when the line comes, and turns the line on. It stays so.
///
/// # Errors
///
/// [`InterruptError::TooManyHandlers`] or [`InterruptError::NoLine`].
pub fn connect(line: Line, handle: impl Fn() -> Claim + Send + Sync + 'static) -> Result<(), InterruptError> {
    add_handler(line.number, Box::new(handle))?;
    controller::enable(line)
}

/// Has `handle` called when a function says by a message that one of its events happened, and gives the message: what
/// the function is to write, at a physical address. No other function or event shares it.
///
/// `requester` is the function's number on its bus, by [`Pci::requester`](crate::pci::Pci::requester).
///
/// # Errors
///
/// [`InterruptError::TooManyHandlers`], [`InterruptError::NotConnected`], or [`InterruptError::NoController`] where none
/// takes messages.
pub fn connect_message(
    segment: u16,
    requester: u16,
    event: u16,
    handle: impl Fn() + Send + Sync + 'static,
) -> Result<Message, InterruptError> {
    let (number, message) = controller::message(segment, requester, event)?;
    let claimed = move || {
        handle();
        Claim::Mine
    };
    add_handler(number, Box::new(claimed))?;
    Ok(message)
}

fn add_handler(number: u32, handle: Box<dyn Fn() -> Claim + Send + Sync>) -> Result<(), InterruptError> {
    let place = CONNECTED.fetch_add(1, Ordering::Relaxed);
    let place = HANDLERS.get(place).ok_or(InterruptError::TooManyHandlers)?;
    place.call_once(|| Handler { number, handle });
    Ok(())
}

/// What the controller is to do with a line that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Let it come again.
    KeepOn,
    /// Turn it off: it is nobody's.
    TurnOff,
}

/// Calls the handlers of a line, for the architecture's interrupt entry.
pub fn dispatch(number: u32) -> Next {
    let handlers = HANDLERS.iter().filter_map(Once::get).filter(|handler| handler.number == number);
    // All of them: two devices may pull a line at once.
    let claimed = handlers.filter(|handler| (handler.handle)() == Claim::Mine).count();
    if claimed != 0 {
        STRAY.store(0, Ordering::Relaxed);
        return Next::KeepOn;
    }
    match STRAY.fetch_add(1, Ordering::Relaxed) {
        stray if stray < MAX_STRAY => Next::KeepOn,
        _ => {
            STRAY.store(0, Ordering::Relaxed);
            Next::TurnOff
        }
    }
}

/// Sleeps until `is_done` says so, or `deadline_ns` has passed; says whether it is done. Between two looks the CPU takes an
/// interrupt.
pub fn sleep_until(deadline_ns: u64, mut is_done: impl FnMut() -> bool) -> bool {
    loop {
        // Off before the look: what comes after it ends the sleep.
        let saved = controller::save_and_disable();
        let done = is_done();
        let over = crate::time::now_ns().is_none_or(|now| now >= deadline_ns);
        if !done && !over {
            controller::wait_until(deadline_ns);
        }
        controller::restore(saved);
        if done || over {
            return done;
        }
    }
}

#[cfg(test)]
mod tests {
    use alloc::sync::Arc;

    use super::*;

    #[test]
    fn handlers_share_a_line_and_strays_turn_it_off() {
        let calls = Arc::new(AtomicUsize::new(0));
        for claim in [Claim::Mine, Claim::NotMine] {
            let calls = Arc::clone(&calls);
            let handler = move || {
                calls.fetch_add(1, Ordering::Relaxed);
                claim
            };
            connect(Line { number: 5, trigger: Trigger::Level }, handler).expect("a host takes any line");
        }
        assert_eq!(dispatch(5), Next::KeepOn);
        assert_eq!(calls.load(Ordering::Relaxed), 2);
        for _ in 0..MAX_STRAY {
            assert_eq!(dispatch(6), Next::KeepOn);
        }
        assert_eq!(dispatch(6), Next::TurnOff);
        assert_eq!((dispatch(6), calls.load(Ordering::Relaxed)), (Next::KeepOn, 2));
    }

    #[test]
    fn sleep_ends_by_the_deadline_at_the_latest() {
        let now = crate::time::now_ns().expect("a host has a clock");
        assert!(!sleep_until(now + 1_000_000, || false));
        let mut looks = 0;
        assert!(sleep_until(now + 60_000_000_000, || {
            looks += 1;
            looks == 3
        }));
    }
}
