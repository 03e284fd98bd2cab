//! The peer on the network: a server on this host's loopback, which the guest reaches as its gateway.
//!
//! ```text
//! guest connects
//!   server -> guest    FETCHED_BYTES of one pattern, whose SHA-256 is on the kernel's command line
//!   guest -> server    SENT_BYTES of another, then the end of its side
//!   server             compares, closes, and remembers
//! ```
//!
//! One connection is served at a time. The server ends when it is told to, and never later than at its own limit.

use std::fmt;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::disk::{pattern, sha256};
use crate::protocol::Value;

/// Bytes that the guest fetches.
pub const FETCHED_BYTES: usize = 4 * 1024 * 1024;
/// Bytes that it sends back.
pub const SENT_BYTES: usize = 4 * 1024 * 1024;
/// What the seed is combined with for what the guest fetches: "FETC".
pub const FETCHED_SEED: u64 = 0x4645_5443;
/// And for what it sends: "SENT".
pub const SENT_SEED: u64 = 0x5345_4e54;
/// The value by which the guest says how many transfers it completed.
pub const TRANSFERS: &str = "net.rounds";

/// How often the server looks whether it is to end.
const TICK: Duration = Duration::from_millis(20);
/// How long a connection may stand still.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whether anybody is there for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// The server.
    Listening,
    /// Somebody who takes connections, and says nothing.
    Silent,
    /// Nobody: connections to the port are refused.
    Refusing,
}

/// What came of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// Everything went out and the right bytes came back.
    Complete,
    /// It ended otherwise; how.
    Broken(String),
}

/// A server in a thread of its own.
#[derive(Debug)]
pub struct Server {
    /// Its port on the loopback.
    pub port: u16,
    /// SHA-256 of what it sends, in lower-case hex.
    pub sha256: String,
    stop: Arc<AtomicBool>,
    /// Of a silent one: the system takes connections, up to a few.
    _silent: Option<TcpListener>,
    thread: Option<JoinHandle<Vec<Transfer>>>,
}

impl Server {
    /// Starts the server of `seed`, which ends after `limit` at the latest.
    ///
    /// # Errors
    ///
    /// When there is no port to be had.
    pub fn start(seed: u64, peer: Peer, limit: Option<Duration>) -> Result<Self> {
        let no_port = "cannot listen on the loopback";
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context(no_port)?;
        listener.set_nonblocking(true).context(no_port)?;
        let port = listener.local_addr().context(no_port)?.port();
        let fetched = pattern(seed ^ FETCHED_SEED, FETCHED_BYTES);
        let sha256 = sha256(&fetched);
        let stop = Arc::new(AtomicBool::new(false));
        let until = Until { stop: Arc::clone(&stop), at: limit.map(|limit| Instant::now() + limit) };
        let (mut silent, mut thread) = (None, None);
        match peer {
            Peer::Listening => thread = Some(thread::spawn(move || serve(&listener, &fetched, seed, &until))),
            Peer::Silent => silent = Some(listener),
            Peer::Refusing => drop(listener),
        }
        Ok(Self { port, sha256, stop, _silent: silent, thread })
    }

    /// Ends the server and says what came of each connection.
    #[must_use]
    pub fn stop(mut self) -> Vec<Transfer> {
        self.stop.store(true, Ordering::Relaxed);
        let died = |_| vec![Transfer::Broken("the server's thread died".to_owned())];
        self.thread.take().map_or_else(Vec::new, |thread| thread.join().unwrap_or_else(died))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The thread sees it within a tick, and nobody waits for it.
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Says how what the guest claims differs from what the server saw. Empty when they agree.
#[must_use]
pub fn differences(claimed: &[Value], seen: &[Transfer]) -> Vec<String> {
    let claimed = claimed.iter().find(|value| value.name == TRANSFERS).map_or(0, |value| value.number);
    let complete = seen.iter().filter(|transfer| **transfer == Transfer::Complete).count() as u64;
    let broken = seen.iter().filter_map(|transfer| match transfer {
        Transfer::Complete => None,
        Transfer::Broken(how) => Some(format!("the server's connection with the guest: {how}")),
    });
    let mut differences: Vec<String> = broken.collect();
    if claimed != complete {
        let words = format!("the guest claims {TRANSFERS} {claimed}, but the server completed {complete}");
        differences.push(words);
    }
    differences
}

/// When to end.
struct Until {
    stop: Arc<AtomicBool>,
    at: Option<Instant>,
}

impl Until {
    fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed) || self.at.is_some_and(|at| Instant::now() >= at)
    }
}

fn serve(listener: &TcpListener, fetched: &[u8], seed: u64, until: &Until) -> Vec<Transfer> {
    let wanted = pattern(seed ^ SENT_SEED, SENT_BYTES);
    let mut transfers = Vec::new();
    while !until.is_over() {
        match listener.accept() {
            Ok((stream, _)) => transfers.push(match transfer(&stream, fetched, &wanted, until) {
                Ok(()) => Transfer::Complete,
                Err(how) => Transfer::Broken(how.to_string()),
            }),
            // Nobody is there yet, or somebody went away again.
            Err(_) => thread::sleep(TICK),
        }
    }
    transfers
}

/// Why a connection did not complete.
enum Broken {
    Io(&'static str, io::Error),
    StandsStill(&'static str),
    Stopped(&'static str),
    Wrong { offset: usize },
    Short { len: usize },
    Long,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(doing, error) => write!(f, "{doing} failed: {error}"),
            Self::StandsStill(doing) => write!(f, "{doing} stood still for {} s", PATIENCE.as_secs()),
            Self::Stopped(doing) => write!(f, "{doing} was not finished when the guest ended"),
            Self::Wrong { offset } => write!(f, "byte {offset:#x} from the guest is wrong"),
            Self::Short { len } => write!(f, "the guest sent {len} bytes instead of {SENT_BYTES}"),
            Self::Long => write!(f, "the guest sent more than {SENT_BYTES} bytes"),
        }
    }
}

fn transfer(mut stream: &TcpStream, fetched: &[u8], wanted: &[u8], until: &Until) -> Result<(), Broken> {
    const SENDING: &str = "sending to the guest";
    const RECEIVING: &str = "receiving from the guest";
    let prepare = || {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(TICK))?;
        stream.set_write_timeout(Some(TICK))
    };
    prepare().map_err(|error| Broken::Io(SENDING, error))?;
    let mut sent = 0;
    while sent < fetched.len() {
        sent += patiently(SENDING, until, || stream.write(&fetched[sent..]))?;
    }
    let (mut received, mut buffer) = (0, vec![0; 64 * 1024]);
    loop {
        let len = patiently(RECEIVING, until, || stream.read(&mut buffer))?;
        if len == 0 {
            return if received == wanted.len() { Ok(()) } else { Err(Broken::Short { len: received }) };
        }
        let expected = wanted.get(received..received + len).ok_or(Broken::Long)?;
        if let Some(at) = buffer[..len].iter().zip(expected).position(|(found, wanted)| found != wanted) {
            return Err(Broken::Wrong { offset: received + at });
        }
        received += len;
    }
}

/// Does a step that times out after a tick, again and again until it is done, or patience or time ends.
fn patiently(
    doing: &'static str,
    until: &Until,
    mut step: impl FnMut() -> io::Result<usize>,
) -> Result<usize, Broken> {
    let since = Instant::now();
    loop {
        match step() {
            Ok(len) => return Ok(len),
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => {}
                _ => return Err(Broken::Io(doing, error)),
            },
        }
        if until.is_over() {
            return Err(Broken::Stopped(doing));
        }
        if since.elapsed() > PATIENCE {
            return Err(Broken::StandsStill(doing));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Shutdown;

    const SEED: u64 = 7;

    fn server() -> Server {
        Server::start(SEED, Peer::Listening, Some(Duration::from_secs(30))).unwrap()
    }

    fn connect(server: &Server) -> TcpStream {
        TcpStream::connect((Ipv4Addr::LOCALHOST, server.port)).unwrap()
    }

    /// Plays the guest, which sends `bytes` back, and returns once the server closed.
    fn exchange(server: &Server, bytes: &[u8]) -> Vec<u8> {
        let mut stream = connect(server);
        let mut fetched = vec![0; FETCHED_BYTES];
        stream.read_exact(&mut fetched).unwrap();
        // A server that has seen enough may break off before everything is out.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
        fetched
    }

    fn broken(transfers: &[Transfer]) -> &str {
        match transfers {
            [Transfer::Broken(how)] => how,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn right_transfers_are_complete_and_counted() {
        let server = server();
        let sent = pattern(SEED ^ SENT_SEED, SENT_BYTES);
        for _ in 0..2 {
            assert_eq!(sha256(&exchange(&server, &sent)), server.sha256);
        }
        let seen = server.stop();
        assert_eq!(seen, [Transfer::Complete, Transfer::Complete]);
        let claim = |number| [Value { name: TRANSFERS.into(), number, unit: "transfers".into() }];
        assert!(differences(&claim(2), &seen).is_empty());
        assert_eq!(differences(&claim(3), &seen).len(), 1);
        assert_eq!(differences(&[], &seen).len(), 1, "a guest that claims nothing must not have been there");
    }

    #[test]
    fn wrong_short_and_long_answers_are_named() {
        let good = pattern(SEED ^ SENT_SEED, SENT_BYTES);
        let mut wrong = good.clone();
        wrong[0x1234] ^= 1;
        let long = [&good[..], &[0]].concat();
        for (bytes, words) in [
            (&wrong[..], "byte 0x1234"),
            (&good[1..], "byte 0x0"),
            (&good[..5], "sent 5 bytes"),
            (&long, "more than"),
        ] {
            let server = server();
            exchange(&server, bytes);
            let seen = server.stop();
            assert!(broken(&seen).contains(words), "{seen:?} does not say {words}");
            assert_eq!(differences(&[], &seen).len(), 1);
        }
    }

    #[test]
    fn a_guest_that_goes_silent_does_not_keep_the_server() {
        let server = server();
        let stream = connect(&server);
        thread::sleep(5 * TICK);
        let since = Instant::now();
        let seen = server.stop();
        assert!(since.elapsed() < PATIENCE / 2, "{:?}", since.elapsed());
        assert!(broken(&seen).contains("not finished"), "{seen:?}");
        drop(stream);
    }

    #[test]
    fn the_limit_ends_it_without_being_told() {
        let server = Server::start(SEED, Peer::Listening, Some(5 * TICK)).unwrap();
        let (port, since) = (server.port, Instant::now());
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok() {
            assert!(since.elapsed() < PATIENCE, "it still listens");
            thread::sleep(TICK);
        }
        drop(server);
    }

    #[test]
    fn nobody_is_at_the_port_of_a_refusing_one() {
        let server = Server::start(SEED, Peer::Refusing, None).unwrap();
        let error = TcpStream::connect((Ipv4Addr::LOCALHOST, server.port)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        assert!(server.stop().is_empty());
    }

    #[test]
    fn a_silent_one_takes_connections() {
        let server = Server::start(SEED, Peer::Silent, None).unwrap();
        let mut stream = connect(&server);
        stream.set_read_timeout(Some(5 * TICK)).unwrap();
        let error = stream.read(&mut [0]).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
        assert!(server.stop().is_empty());
    }
}
