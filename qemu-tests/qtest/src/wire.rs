//! QEMU's `qtest` protocol: one line to QEMU, one line back.

use std::io::{BufRead as _, BufReader, ErrorKind, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// How long QEMU may take for one command. It needs microseconds, unless it hangs.
const COMMAND_LIMIT: Duration = Duration::from_secs(5);

/// A connection to QEMU. Commands of several threads do not mix.
///
/// After the first command that fails all others fail too: reads give all ones, as those of a device that is
/// gone. [`failure`](Self::failure) then says what happened.
#[derive(Debug)]
pub(crate) struct Wire(Mutex<Connection>);

#[derive(Debug)]
struct Connection {
    stream: BufReader<UnixStream>,
    deadline: Instant,
    commands: u64,
    failure: Option<String>,
    line: String,
}

/// How wide an access is. The value is the number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Width {
    Byte = 1,
    Word = 2,
    Long = 4,
    Quad = 8,
}

impl Width {
    fn letter(self) -> char {
        match self {
            Self::Byte => 'b',
            Self::Word => 'w',
            Self::Long => 'l',
            Self::Quad => 'q',
        }
    }

    fn ones(self) -> u64 {
        u64::MAX >> (64 - 8 * self as u32)
    }
}

impl Wire {
    /// Talks over `stream` until `deadline`.
    pub(crate) fn new(stream: UnixStream, deadline: Instant) -> Self {
        let stream = BufReader::new(stream);
        Self(Mutex::new(Connection { stream, deadline, commands: 0, failure: None, line: String::new() }))
    }

    /// Reads memory or a register by its guest-physical address.
    pub(crate) fn read(&self, address: u64, width: Width) -> u64 {
        let reply = self.lock().send(format_args!("read{} {address:#x}", width.letter()));
        reply.map_or(width.ones(), |value| value & width.ones())
    }

    /// Writes memory or a register by its guest-physical address.
    pub(crate) fn write(&self, address: u64, width: Width, value: u64) {
        self.lock().send(format_args!("write{} {address:#x} {value:#x}", width.letter()));
    }

    /// Selects a register by one port, and reads it by another.
    pub(crate) fn read_selected(&self, select: (u16, u32), data: u16) -> u32 {
        let mut connection = self.lock();
        connection.send(format_args!("outl {:#x} {:#x}", select.0, select.1));
        connection.send(format_args!("inl {data:#x}")).map_or(u32::MAX, |value| value as u32)
    }

    /// Selects a register by one port, and writes it by another.
    pub(crate) fn write_selected(&self, select: (u16, u32), data: u16, value: u32) {
        let mut connection = self.lock();
        connection.send(format_args!("outl {:#x} {:#x}", select.0, select.1));
        connection.send(format_args!("outl {data:#x} {value:#x}"));
    }

    /// Commands that were sent.
    pub(crate) fn commands(&self) -> u64 {
        self.lock().commands
    }

    /// Why QEMU does not answer any more, if so.
    pub(crate) fn failure(&self) -> Option<String> {
        self.lock().failure.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection {
    /// Sends a command and returns the value of its answer, 0 if it has none; `None` once something went wrong.
    fn send(&mut self, command: std::fmt::Arguments<'_>) -> Option<u64> {
        if self.failure.is_some() {
            return None;
        }
        self.line.clear();
        // Writing to a string does not fail.
        let _ = std::fmt::Write::write_fmt(&mut self.line, format_args!("{command}\n"));
        match self.exchange() {
            Ok(value) => Some(value),
            Err(error) => {
                self.failure = Some(format!("QEMU and `{command}`: {error:#}"));
                None
            }
        }
    }

    fn exchange(&mut self) -> Result<u64> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!("the machine's time is over");
        }
        self.commands += 1;
        let stream = self.stream.get_mut();
        stream.set_read_timeout(Some(left.min(COMMAND_LIMIT)))?;
        stream.write_all(self.line.as_bytes()).context("cannot send")?;
        loop {
            self.line.clear();
            match self.stream.read_line(&mut self.line) {
                Ok(0) => bail!("QEMU ended"),
                Ok(_) => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    bail!("no answer; QEMU hangs")
                }
                Err(error) => return Err(error).context("cannot read the answer"),
            }
            let line = self.line.trim_end();
            if let Some(value) = line.strip_prefix("OK") {
                return parse(value.trim_start());
            }
            if !line.starts_with("IRQ ") {
                bail!("it answered `{line}`");
            }
        }
    }
}

fn parse(value: &str) -> Result<u64> {
    if value.is_empty() {
        return Ok(0);
    }
    let digits = value.strip_prefix("0x").unwrap_or(value);
    u64::from_str_radix(digits, 16).with_context(|| format!("`{value}` is not a number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Wire, BufReader<UnixStream>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Wire::new(ours, Instant::now() + Duration::from_secs(20)), BufReader::new(theirs))
    }

    #[test]
    fn a_read_is_one_line_each_way() {
        let (wire, mut qemu) = pair();
        qemu.get_mut().write_all(b"IRQ raise 3\nOK 0x00000000010000ed\n").unwrap();
        assert_eq!(wire.read(0xfea0_0000, Width::Long), 0x0100_00ed);
        let mut line = String::new();
        qemu.read_line(&mut line).unwrap();
        assert_eq!((line.as_str(), wire.failure()), ("readl 0xfea00000\n", None));
    }

    #[test]
    fn a_dead_qemu_reads_as_ones_and_says_why() {
        let (wire, qemu) = pair();
        drop(qemu);
        assert_eq!(wire.read(0x1000, Width::Word), 0xffff);
        assert_eq!(wire.read(0x1000, Width::Quad), u64::MAX);
        assert!(wire.failure().unwrap().contains("readw 0x1000"));
    }

    #[test]
    fn a_refusal_is_a_failure() {
        let (wire, mut qemu) = pair();
        qemu.get_mut().write_all(b"FAIL Unknown command 'writeb'\n").unwrap();
        wire.write(0, Width::Byte, 7);
        assert!(wire.failure().unwrap().contains("Unknown command"));
    }
}
