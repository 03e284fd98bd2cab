//! The console: text for people and protocol lines for the host, on the machine's first serial port.
//!
//! Owns the lock that keeps lines whole, the [`println!`](crate::println) macro and the `log` crate's logger. Promises that writing never
//! waits for ever: when the lock cannot be had, because the code that prints is what failed, the text goes out anyway.

use core::fmt::{self, Write};

use log::{LevelFilter, Log, Metadata, Record};
use spin::Mutex;

use crate::arch;

/// How often the lock is tried before the text goes out without it.
///
/// Larger than the time for a long line on one CPU would need no bound at all: there, who holds the lock is ourselves.
const LOCK_TRIES: u32 = 1_000_000;

static LOCK: Mutex<()> = Mutex::new(());

/// A writer onto the serial port.
#[derive(Clone, Copy, Debug, Default)]
pub struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        arch::console::write_bytes(text.as_bytes());
        Ok(())
    }
}

/// Prints formatted text in one piece, for [`println!`](crate::println).
pub fn print(args: fmt::Arguments<'_>) {
    let guard = (0..LOCK_TRIES).find_map(|_| {
        let guard = LOCK.try_lock();
        if guard.is_none() {
            core::hint::spin_loop();
        }
        guard
    });
    // The console itself cannot fail; a `Display` that does loses only its own rest.
    let _ = Console.write_fmt(args);
    drop(guard);
}

/// Prints formatted text at once, whoever holds the lock: for panics and exceptions.
pub fn print_now(args: fmt::Arguments<'_>) {
    let _ = Console.write_fmt(args);
}

/// Prints a line on the console, like the standard library's.
#[macro_export]
macro_rules! println {
    () => { $crate::console::print(format_args!("\n")) };
    ($($arg:tt)*) => { $crate::console::print(format_args!("{}\n", format_args!($($arg)*))) };
}

struct Logger;

impl Log for Logger {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let level = record.level().as_str();
        print(format_args!("[{level}] {}: {}\n", record.target(), record.args()));
    }

    fn flush(&self) {}
}

/// Makes the console the `log` crate's logger, at the level "warn".
pub fn init_logger() {
    // A second call changes nothing, and has nothing to report to.
    if log::set_logger(&Logger).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
}

/// Sets which log records are printed: `error`, `warn`, `info`, `debug`, `trace` or `off`.
///
/// # Errors
///
/// The word itself when it names no level.
pub fn set_log_level(word: &str) -> Result<(), UnknownLevel<'_>> {
    log::set_max_level(word.parse().map_err(|_| UnknownLevel(word))?);
    Ok(())
}

/// A word that names no log level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownLevel<'a>(pub &'a str);

impl fmt::Display for UnknownLevel<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "command line: log={} is none of error, warn, info, debug, trace, off", self.0)
    }
}

impl core::error::Error for UnknownLevel<'_> {}
