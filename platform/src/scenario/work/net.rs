//! The network by `virtio-drivers` and `smoltcp`. The first round begins with an address from DHCP and an echo from the
//! gateway; each fetches a file from the harness's server, and sends another back.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use fastrand::Rng;
use sha2::{Digest, Sha256};

use super::{Bench, Done, Work};
use crate::devices::network::Network;
use crate::devices::virtio::net::{BOUNCE_BYTES, Net, NetSlot};
use crate::devices::virtio::{self, NETWORK, Undroppable, VENDOR};
use crate::pci::function::{BusMaster, Function};
use crate::scenario::default::text;
use crate::scenario::setup::Opened;
use crate::scenario::show::{Worker, hex};
use crate::scenario::word;
use crate::time::Deadline;

/// Bytes that are fetched in a round, and bytes that are sent. The server has the same numbers.
const FETCHED_BYTES: usize = 4 << 20;
const SENT_BYTES: usize = 4 << 20;
/// What makes the seed of what is sent from that of the run: the letters of SENT.
const SENT_SEED: u64 = 0x5345_4e54;

/// How long the network may stand still.
const PATIENCE_NS: u64 = 8_000_000_000;
/// Bytes that are made and sent, or received and digested, at a time: the generator's words are of eight.
const PART_BYTES: usize = 16 * 1024;

struct NetWork {
    worker: Worker,
    function: Function,
    network: Undroppable<Network>,
    port: u16,
    /// SHA-256 that the fetched file must have.
    expected: String,
    seed: u64,
    phase: Phase,
    due: Deadline,
    buffer: Vec<u8>,
    done: Done,
}

/// Where a round is.
enum Phase {
    /// Waits for an address.
    Address,
    /// Waits for the gateway's echo.
    Echo,
    /// Is to connect.
    Idle,
    /// Waits for the peer.
    Connecting,
    /// Has received this many bytes.
    Fetching(Sha256, usize),
    /// Has sent this many bytes; the buffer holds those from the second number on that were made, to its end.
    Sending(Rng, usize, usize),
    /// Sent everything, and waits for the peer to close.
    Closing,
}

impl Phase {
    fn name(&self) -> &'static str {
        match self {
            Self::Address => "waiting for an address",
            Self::Echo => "waiting for the gateway's echo",
            Self::Idle | Self::Connecting => "connecting",
            Self::Fetching(..) => "fetching",
            Self::Sending(..) => "sending",
            Self::Closing => "waiting for the server to close",
        }
    }
}

pub(in crate::scenario) fn open(bench: &Bench<'_>) -> Result<Box<dyn Work>, String> {
    let function = bench.find(VENDOR, NETWORK, "network card")?;
    let expected = word(bench.info, "net.sha256")?.to_string();
    word(bench.info, "net.port")?;
    let port = bench.info.command_line.number("net.port").map_err(text)?;
    let port = port.and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0);
    let port = port.ok_or("net.port= is not a port")?;
    let Opened { id, domain, endpoint } = bench.open(function, BOUNCE_BYTES, "net")?;
    NetSlot::fill(endpoint).map_err(|_| "its slot is filled already")?;
    let net = Net::new(bench.machine, function).map_err(text)?;
    let network = Network::new(net, bench.seed).map_err(text)?;
    bench.machine.pci.set_bus_master(function.address, BusMaster::On);
    Ok(Box::new(NetWork {
        worker: Worker { id, address: function.address, name: "virtio-net", domain },
        function: function.clone(),
        network: Undroppable::new(network),
        port,
        expected,
        seed: bench.seed ^ SENT_SEED,
        phase: Phase::Address,
        due: Deadline::after_ns(PATIENCE_NS),
        buffer: vec![0; PART_BYTES],
        done: Done::default(),
    }))
}

impl NetWork {
    /// The next phase, if there is one; and whether anything moved.
    fn go_on(&mut self) -> Result<(Option<Phase>, bool), String> {
        let Self { network, buffer, done, .. } = self;
        let next = |phase| Ok((Some(phase), true));
        match &mut self.phase {
            Phase::Address if network.lease().is_some() => {
                network.send_echo(1).map_err(text)?;
                next(Phase::Echo)
            }
            Phase::Echo if network.has_echo(1) => next(Phase::Idle),
            Phase::Idle => {
                network.connect(self.port).map_err(text)?;
                next(Phase::Connecting)
            }
            Phase::Connecting if network.is_connected().map_err(text)? => {
                next(Phase::Fetching(Sha256::new(), 0))
            }
            Phase::Address | Phase::Echo | Phase::Connecting => Ok((None, false)),
            Phase::Fetching(digest, received) => {
                let room = PART_BYTES.min(FETCHED_BYTES - *received);
                let len = network.receive(&mut buffer[..room]).map_err(text)?;
                let len = len.ok_or_else(|| format!("the server sent {received} bytes only"))?;
                digest.update(&buffer[..len]);
                *received += len;
                done.from_device += len as u64;
                if *received < FETCHED_BYTES {
                    return Ok((None, len != 0));
                }
                let digest = hex(&digest.finalize_reset());
                if digest != self.expected {
                    return Err(format!("the file has SHA-256 {digest} instead of {}", self.expected));
                }
                next(Phase::Sending(Rng::with_seed(self.seed), 0, PART_BYTES))
            }
            Phase::Sending(rng, sent, at) => {
                if *at == PART_BYTES {
                    rng.fill(buffer);
                    *at = 0;
                }
                let len = network.send(&buffer[*at..]).map_err(text)?;
                (*sent, *at) = (*sent + len, *at + len);
                done.to_device += len as u64;
                if *sent < SENT_BYTES {
                    return Ok((None, len != 0));
                }
                network.finish_sending().map_err(text)?;
                next(Phase::Closing)
            }
            Phase::Closing => match network.receive(&mut buffer[..1]).map_err(text)? {
                Some(0) => Ok((None, false)),
                Some(_) => Err("the server sent more than its file".into()),
                None => {
                    network.disconnect();
                    done.rounds += 1;
                    next(Phase::Idle)
                }
            },
        }
    }
}

impl Work for NetWork {
    fn worker(&self) -> &Worker {
        &self.worker
    }

    fn done(&self) -> Done {
        self.done
    }

    fn detail(&self) -> String {
        self.network.lease().map_or_else(String::new, |lease| {
            format!("{} by DHCP, {} echoes, SHA-256 {}", lease.address, lease.gateway, self.expected)
        })
    }

    fn step(&mut self) -> Result<(), String> {
        self.network.poll().map_err(text)?;
        let (next, moved) = self.go_on().map_err(|error| format!("{}: {error}", self.phase.name()))?;
        if moved {
            self.due = Deadline::after_ns(PATIENCE_NS);
        } else if self.due.expired() {
            let seconds = PATIENCE_NS / 1_000_000_000;
            return Err(format!("{}: nothing moved for {seconds} s", self.phase.name()));
        }
        if let Some(next) = next {
            self.phase = next;
        }
        Ok(())
    }

    fn close(self: Box<Self>, bench: &Bench<'_>) -> Result<(), String> {
        let Self { function, network, .. } = *self;
        let card = Undroppable::new(Undroppable::into_inner(network).into_card());
        // SAFETY: the slot's only driver, of this function; the slot was filled when it was opened.
        unsafe { virtio::close::<_, NetSlot>(bench.machine, &function, card) }
    }
}

// Each part is made whole, and the last one ends with what is sent.
const _: () = assert!(SENT_BYTES.is_multiple_of(PART_BYTES) && PART_BYTES.is_multiple_of(8));
