//! The stand-in for a machine where the library runs in a host process.
//!
//! There is a clock and a console. There is no physical memory, no device and no power switch: what would map or find
//! one fails as it would on a machine that has none.

/// The name in the line protocol.
pub const NAME: &str = "host";

/// Return addresses on the stack: none, since the standard library has its own backtraces.
pub mod backtrace {
    /// Nothing.
    pub fn here() -> impl Iterator<Item = u64> {
        core::iter::empty()
    }
}

/// The monotonic clock, by the standard library.
pub mod clock {
    use std::sync::LazyLock;
    use std::time::Instant;

    static START: LazyLock<Instant> = LazyLock::new(Instant::now);

    /// Nanoseconds since the first call.
    pub fn now_ns() -> Option<u64> {
        u64::try_from(START.elapsed().as_nanos()).ok()
    }

    /// Nanoseconds too.
    pub fn ticks() -> u64 {
        now_ns().unwrap_or(0)
    }

    /// The clock's rate: nanoseconds.
    pub fn tick_hz() -> Option<u64> {
        Some(1_000_000_000)
    }
}

/// The console, on standard output.
pub mod console {
    use std::io::Write;

    /// Writes bytes; a closed standard output loses them.
    pub fn write_bytes(bytes: &[u8]) {
        let _ = std::io::stdout().write_all(bytes);
    }
}

/// Other CPUs, which a process leaves to its system.
pub mod cpus {
    use core::fmt;

    /// Where a CPU's stacks end.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Stacks {
        /// One past the stack's last byte.
        pub top: u64,
        /// The same of the stack for exceptions.
        pub fault_top: u64,
    }

    /// What a CPU does once it arrived; it gets its index.
    pub type Main = fn(usize) -> !;

    /// Why no CPU was started.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    #[non_exhaustive]
    pub enum StartError {
        /// A process has none.
        NoMachine,
    }

    impl fmt::Display for StartError {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a host process starts no CPUs")
        }
    }

    impl core::error::Error for StartError {}

    /// What this CPU is known by.
    pub fn own_id() -> u64 {
        0
    }

    /// Refuses.
    ///
    /// # Errors
    ///
    /// Always [`StartError::NoMachine`].
    ///
    /// # Safety
    ///
    /// None is needed here.
    pub unsafe fn start(_id: u64, _index: usize, _stacks: Stacks, _main: Main) -> Result<(), StartError> {
        Err(StartError::NoMachine)
    }
}

/// A port for nobody.
pub mod diagnostic {
    /// Does nothing.
    pub fn write(_: u8) {}
}

/// Interrupts, which a process does not have.
pub mod interrupts {
    use crate::interrupts::{InterruptError, Line, Trigger};
    use crate::machine::Firmware;
    use crate::pci::message::Message;

    /// Nothing.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Saved;

    /// Does nothing.
    pub fn save_and_disable() -> Saved {
        Saved
    }

    /// Does nothing.
    pub fn restore(_: Saved) {}

    /// Finds none.
    ///
    /// # Errors
    ///
    /// Always [`InterruptError::NoController`].
    pub fn init(_: &Firmware) -> Result<(), InterruptError> {
        Err(InterruptError::NoController { reason: "a host process takes no interrupts".into() })
    }

    /// One cell: the number of a line that comes by its level.
    pub fn line(specifier: &[u32]) -> Option<Line> {
        match *specifier {
            [number] => Some(Line { number, trigger: Trigger::Level }),
            _ => None,
        }
    }

    /// Does nothing.
    ///
    /// # Errors
    ///
    /// None.
    pub fn enable(_: Line) -> Result<(), InterruptError> {
        Ok(())
    }

    /// Does nothing.
    pub fn disable(_: u32) {}

    /// None: this machine's controller takes no messages.
    ///
    /// # Errors
    ///
    /// Always [`InterruptError::NoController`].
    pub fn message(_segment: u16, _requester: u16, _event: u16) -> Result<(u32, Message), InterruptError> {
        Err(InterruptError::NoController { reason: "a host process takes no interrupts".into() })
    }

    /// Lets other threads run.
    pub fn wait_until(_: u64) {
        std::thread::yield_now();
    }
}

pub mod mmu;

/// Ending the process.
pub mod power {
    use crate::power::ExitCode;

    /// Ends the process with QEMU's status for the code.
    pub fn exit(code: ExitCode) -> ! {
        std::process::exit(i32::from(code.value()) << 1 | 1)
    }
}
