//! Child processes that always end.
//!
//! Each child leads a process group of its own and is killed as a group with SIGKILL: QEMU can hang on a bad request and
//! then ignores SIGTERM. A child dies at its deadline, when its handle is dropped, and, after
//! [`end_children_on_interrupt`], when this process is interrupted. Standard input is always empty.

mod group;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io::{BufRead as _, BufReader, Read};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, ExitStatus, Output};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

pub use self::group::end_children_on_interrupt;

/// Longer lines are cut into pieces of this length.
const LINE_BYTES: u64 = 64 * 1024;
/// A child that prints more than this is ended.
const OUTPUT_BYTES: usize = 16 * 1024 * 1024;
/// How often the end of a child is looked for while it prints nothing.
const TICK: Duration = Duration::from_millis(20);
/// How long to read on after a child ended while something else keeps its output open.
const GRACE: Duration = Duration::from_millis(500);

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// By itself, with this status.
    Exit(i32),
    /// By this signal, which did not come from here.
    Signal(i32),
    /// It was killed here after this time.
    Deadline(Duration),
    /// It was killed here because it printed more than anyone will read.
    Flood,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exit(status) => write!(f, "ended with status {status}"),
            Self::Signal(signal) => write!(f, "was ended by signal {signal}"),
            Self::Deadline(limit) => write!(f, "was killed at its deadline of {} s", limit.as_secs_f64()),
            Self::Flood => write!(f, "was killed after printing {} MiB", OUTPUT_BYTES >> 20),
        }
    }
}

/// A running child, read line by line.
#[derive(Debug)]
pub struct Process {
    child: Child,
    started: Instant,
    lines: Receiver<String>,
    stderr: Option<JoinHandle<Vec<u8>>>,
    reaped: Option<ExitStatus>,
}

impl Process {
    /// Starts `command` with empty input and both outputs piped.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn start(command: &mut Command) -> Result<Self> {
        let mut child = group::spawn(command)?;
        let (sender, lines) = sync_channel(256);
        if let Some(stdout) = child.stdout.take() {
            thread::spawn(move || send_lines(stdout, &sender));
        }
        let stderr = child.stderr.take().map(read_to_end);
        Ok(Self { child, started: Instant::now(), lines, stderr, reaped: None })
    }

    /// Hands each line to `observer` until the child ends or `limit` has passed since it started.
    ///
    /// Lines come without their end, and with odd bytes replaced.
    pub fn follow(&mut self, limit: Option<Duration>, observer: &mut dyn FnMut(&str)) -> Ended {
        let mut seen_bytes = 0;
        let mut ended_at: Option<Instant> = None;
        loop {
            let received = self.lines.recv_timeout(TICK);
            if let Ok(line) = &received {
                seen_bytes += line.len() + 1;
                observer(line);
            } else if self.has_ended() {
                let since = *ended_at.get_or_insert_with(Instant::now);
                if received == Err(RecvTimeoutError::Disconnected) || since.elapsed() > GRACE {
                    return self.status();
                }
            } else if received == Err(RecvTimeoutError::Disconnected) {
                // It closed its output and runs on.
                thread::sleep(TICK);
            }
            if seen_bytes > OUTPUT_BYTES {
                self.kill();
                return Ended::Flood;
            }
            if let Some(limit) = limit.filter(|limit| ended_at.is_none() && self.started.elapsed() > *limit) {
                self.kill();
                return Ended::Deadline(limit);
            }
        }
    }

    /// Time since the start.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// What the child wrote to its standard error. Ends the child if it still runs.
    pub fn into_stderr(mut self) -> String {
        self.kill();
        let Some(reader) = self.stderr.take() else { return String::new() };
        let since = Instant::now();
        while !reader.is_finished() && since.elapsed() < GRACE {
            thread::sleep(Duration::from_millis(2));
        }
        if !reader.is_finished() {
            return String::new();
        }
        String::from_utf8_lossy(&reader.join().unwrap_or_default()).into_owned()
    }

    fn has_ended(&mut self) -> bool {
        self.reaped = self.reaped.or_else(|| group::reap(&mut self.child));
        self.reaped.is_some()
    }

    fn status(&self) -> Ended {
        match self.reaped.map(|status| (status.code(), status.signal())) {
            Some((Some(code), _)) => Ended::Exit(code),
            Some((None, Some(signal))) => Ended::Signal(signal),
            Some((None, None)) | None => Ended::Signal(0),
        }
    }

    /// Kills the whole group and waits until the child is gone.
    fn kill(&mut self) {
        if !self.has_ended() {
            self.reaped = group::kill(&mut self.child);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Runs `command` to its end and returns what it printed.
///
/// # Errors
///
/// When it cannot be started or does not end within `limit`.
pub fn capture(command: &mut Command, limit: Duration) -> Result<Output> {
    let mut stdout = String::new();
    let mut process = Process::start(command)?;
    let ended = process.follow(Some(limit), &mut |line| {
        stdout.push_str(line);
        stdout.push('\n');
    });
    let status = match (ended, process.reaped) {
        (Ended::Exit(_) | Ended::Signal(_), Some(status)) => status,
        _ => bail!("{} {ended}", command.get_program().to_string_lossy()),
    };
    Ok(Output { status, stdout: stdout.into_bytes(), stderr: process.into_stderr().into_bytes() })
}

/// Runs `command`, which talks to the user itself, to its end.
///
/// # Errors
///
/// When it cannot be started or does not end within `limit`.
pub fn run(command: &mut Command, limit: Option<Duration>) -> Result<ExitStatus> {
    let mut child = group::spawn_talking(command)?;
    let started = Instant::now();
    loop {
        if let Some(status) = group::reap(&mut child) {
            return Ok(status);
        }
        if let Some(limit) = limit.filter(|limit| started.elapsed() > *limit) {
            group::kill(&mut child);
            bail!("{} {}", command.get_program().to_string_lossy(), Ended::Deadline(limit));
        }
        thread::sleep(TICK);
    }
}

fn send_lines(stdout: impl Read, sender: &SyncSender<String>) {
    let mut reader = BufReader::new(stdout);
    let mut line = Vec::new();
    loop {
        line.clear();
        match reader.by_ref().take(LINE_BYTES).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {
                let text = String::from_utf8_lossy(&line);
                if sender.send(text.trim_end_matches(['\r', '\n']).to_owned()).is_err() {
                    return;
                }
            }
        }
    }
}

/// Reads all of a stream, but keeps no more than [`OUTPUT_BYTES`].
fn read_to_end(mut stream: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut kept = Vec::new();
        let mut piece = [0; 4096];
        loop {
            match stream.read(&mut piece) {
                Ok(0) | Err(_) => return kept,
                Ok(count) if kept.len() < OUTPUT_BYTES => kept.extend_from_slice(&piece[..count]),
                Ok(_) => {}
            }
        }
    })
}
