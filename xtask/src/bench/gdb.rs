//! The part of gdb's remote protocol that stepping through a guest takes.
//!
//! A packet is `$DATA#SUM`, and each is acknowledged by a `+`.

use std::io::{BufReader, ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// How long QEMU may take to open its socket, and the guest to come to a breakpoint.
const START_LIMIT: Duration = Duration::from_secs(20);
const STOP_LIMIT: Duration = Duration::from_secs(300);
/// Longer packets are not believed.
const PACKET_BYTES: usize = 1 << 16;

/// The registers that are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Registers {
    pub(super) rip: u64,
    pub(super) rsp: u64,
    /// The first two arguments of a C function.
    pub(super) arguments: [u64; 2],
}

impl Registers {
    /// Reads the answer to `g`: sixteen general registers, then `rip`, each as eight bytes, low byte first.
    fn parse(text: &str) -> Option<Self> {
        let register = |index: usize| {
            let digits = text.get(16 * index..16 * index + 16)?;
            u64::from_str_radix(digits, 16).ok().map(u64::swap_bytes)
        };
        Some(Self { rip: register(16)?, rsp: register(7)?, arguments: [register(5)?, register(4)?] })
    }
}

/// A guest that stopped, and can be told to go on.
pub(super) struct Guest {
    stream: UnixStream,
    answers: BufReader<UnixStream>,
}

impl Guest {
    /// Connects to the socket that QEMU opens at `path`.
    ///
    /// # Errors
    ///
    /// When QEMU does not open it in time.
    pub(super) fn connect(path: &Path) -> Result<Self> {
        let started = Instant::now();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if started.elapsed() > START_LIMIT => {
                    return Err(error).with_context(|| format!("QEMU opened no {}", path.display()));
                }
                Err(_) => thread::sleep(Duration::from_millis(20)),
            }
        };
        stream.set_read_timeout(Some(STOP_LIMIT))?;
        let answers = BufReader::new(stream.try_clone()?);
        Ok(Self { stream, answers })
    }

    /// Makes the guest stop whenever it comes to `address`.
    pub(super) fn break_at(&mut self, address: u64) -> Result<()> {
        self.expect_ok(&format!("Z0,{address:x},1"))
    }

    /// Goes on to the next breakpoint behind this instruction. False if the machine ended before.
    pub(super) fn go_on(&mut self) -> Result<bool> {
        // A breakpoint at this instruction would stop it at once.
        Ok(self.step()? && self.stopped("c")?)
    }

    /// Executes one instruction, of a repeated one a single round.
    pub(super) fn step(&mut self) -> Result<bool> {
        self.stopped("s")
    }

    /// The registers.
    pub(super) fn registers(&mut self) -> Result<Registers> {
        let answer = self.ask("g")?;
        Registers::parse(&answer).with_context(|| format!("QEMU's registers are `{answer}`"))
    }

    /// `len` bytes of memory.
    pub(super) fn memory(&mut self, address: u64, len: u64) -> Result<Vec<u8>> {
        let answer = self.ask(&format!("m{address:x},{len:x}"))?;
        let byte = |index| u8::from_str_radix(answer.get(index..index + 2)?, 16).ok();
        let bytes = (0..answer.len()).step_by(2).map(byte).collect::<Option<Vec<u8>>>();
        bytes.with_context(|| format!("QEMU's memory at {address:#x} is `{answer}`"))
    }

    fn stopped(&mut self, command: &str) -> Result<bool> {
        let answer = self.ask(command)?;
        match answer.as_bytes().first() {
            Some(b'S' | b'T') => Ok(true),
            Some(b'W' | b'X') => Ok(false),
            _ => bail!("QEMU answers `{answer}` to `{command}`"),
        }
    }

    fn expect_ok(&mut self, command: &str) -> Result<()> {
        match self.ask(command)?.as_str() {
            "OK" => Ok(()),
            answer => bail!("QEMU answers `{answer}` to `{command}`"),
        }
    }

    fn ask(&mut self, command: &str) -> Result<String> {
        let sum = command.bytes().fold(0_u8, u8::wrapping_add);
        self.stream.write_all(format!("${command}#{sum:02x}").as_bytes())?;
        let mut data = Vec::new();
        while self.byte()? != b'$' {}
        loop {
            match self.byte()? {
                b'#' => break,
                byte => data.push(byte),
            }
            if data.len() > PACKET_BYTES {
                bail!("QEMU's answer to `{command}` does not end");
            }
        }
        self.byte()?;
        self.byte()?;
        // After its last packet QEMU does not wait for this.
        let _ = self.stream.write_all(b"+");
        Ok(String::from_utf8_lossy(&data).into_owned())
    }

    fn byte(&mut self) -> Result<u8> {
        let mut byte = [0];
        match self.answers.read_exact(&mut byte) {
            Ok(()) => Ok(byte[0]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                bail!("the guest did not stop within {} s", STOP_LIMIT.as_secs())
            }
            Err(error) => Err(error).context("QEMU closed the debugger's connection"),
        }
    }
}

impl Drop for Guest {
    /// Ends a machine that would wait for commands for ever. One that ended already does not read this.
    fn drop(&mut self) {
        let _ = self.stream.write_all(b"$k#6b");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_found_by_their_place() {
        let text: String = (0..24_u64).map(|index| format!("{:016x}", index.swap_bytes())).collect();
        let read = Registers::parse(&text).unwrap();
        assert_eq!(read, Registers { rip: 16, rsp: 7, arguments: [5, 4] });
        assert!(Registers::parse(&text[..270]).is_none());
        assert!(Registers::parse("E01").is_none());
    }
}
