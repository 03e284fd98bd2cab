//! The network above a card: `smoltcp`'s TCP/IP stack, fed by [`Net`].
//!
//! Nothing here waits. [`Network::poll`] does a bounded amount of work, and whoever calls it keeps the deadlines.

use alloc::vec;
use alloc::vec::Vec;
use core::fmt;
use core::net::Ipv4Addr;

use smoltcp::iface::{Config, Interface, PollIngressSingleResult, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{dhcpv4, icmp, tcp};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, Icmpv4Packet, Icmpv4Repr, IpAddress, IpCidr, Ipv4Cidr};

use crate::devices::virtio::VirtioError;
use crate::devices::virtio::net::{FRAME_BYTES, Net};
use crate::time;

/// Frames that one poll takes in at most, and rounds of sending.
const FRAMES_OF_A_POLL: usize = 64;
/// Bytes of each buffer of a connection.
const CONNECTION_BYTES: usize = 64 * 1024;
/// The number by which our echo requests are known, and what they carry.
const ECHO_IDENT: u16 = 0x1e55;
const ECHO: [u8; 32] = *b"echo of a kernel with an IOMMU..";
/// The first local port of a connection; each takes the next.
const FIRST_PORT: u16 = 49_152;

/// Why the network does not go on.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum NetworkError {
    /// The card failed.
    Card(VirtioError),
    /// The machine has no clock, by which the stack sends again what was lost.
    NoClock,
    /// There is no address yet, or no gateway.
    NoAddress,
    /// The stack does not take an echo request.
    Echo(icmp::SendError),
    /// The stack does not begin a connection.
    Connect(tcp::ConnectError),
    /// The peer refused the connection, or broke it off.
    Closed,
}

impl fmt::Display for NetworkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Card(error) => error.fmt(f),
            Self::NoClock => f.write_str("network: the machine has no clock"),
            Self::NoAddress => f.write_str("network: there is no address or no gateway"),
            Self::Echo(error) => write!(f, "network: echo request: {error}"),
            Self::Connect(error) => write!(f, "network: {error}"),
            Self::Closed => f.write_str("network: connection refused or broken off by the peer"),
        }
    }
}

impl core::error::Error for NetworkError {}

impl From<VirtioError> for NetworkError {
    fn from(error: VirtioError) -> Self {
        Self::Card(error)
    }
}

/// What DHCP gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The card's address.
    pub address: Ipv4Cidr,
    /// The way to everybody else.
    pub gateway: Ipv4Addr,
}

/// A card with its TCP/IP stack, and at most one connection.
pub struct Network {
    card: Card,
    interface: Interface,
    sockets: SocketSet<'static>,
    dhcp: SocketHandle,
    echo: SocketHandle,
    connection: Option<SocketHandle>,
    lease: Option<Lease>,
    next_port: u16,
}

impl Network {
    /// A stack over `net`, which asks for an address as soon as it is polled. `seed` is what its random numbers are
    /// made from.
    ///
    /// # Errors
    ///
    /// [`NetworkError::NoClock`].
    pub fn new(net: Net, seed: u64) -> Result<Self, NetworkError> {
        let mut config = Config::new(EthernetAddress(net.mac_address()).into());
        config.random_seed = seed;
        let mut card = Card { net, failure: None };
        let interface = Interface::new(config, &mut card, now()?);
        let mut sockets = SocketSet::new(vec![]);
        let dhcp = sockets.add(dhcpv4::Socket::new());
        let packets = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 1024]);
        let echo = sockets.add(icmp::Socket::new(packets(), packets()));
        let connection = None;
        Ok(Self { card, interface, sockets, dhcp, echo, connection, lease: None, next_port: FIRST_PORT })
    }

    /// Takes in what arrived and sends what is due, a bounded amount of both.
    ///
    /// # Errors
    ///
    /// [`NetworkError`], when the card failed.
    pub fn poll(&mut self) -> Result<(), NetworkError> {
        let now = now()?;
        let Self { card, interface, sockets, .. } = self;
        interface.poll_maintenance(now);
        for _ in 0..FRAMES_OF_A_POLL {
            if interface.poll_ingress_single(now, card, sockets) == PollIngressSingleResult::None {
                break;
            }
        }
        for _ in 0..FRAMES_OF_A_POLL {
            if interface.poll_egress(now, card, sockets) == PollResult::None {
                break;
            }
        }
        if let Some(failure) = self.card.failure.take() {
            return Err(failure.into());
        }
        match self.sockets.get_mut::<dhcpv4::Socket<'_>>(self.dhcp).poll() {
            Some(dhcpv4::Event::Configured(config)) => {
                let (address, router) = (config.address, config.router);
                self.configure(router.map(|gateway| Lease { address, gateway }));
            }
            Some(dhcpv4::Event::Deconfigured) => self.configure(None),
            None => {}
        }
        Ok(())
    }

    fn configure(&mut self, lease: Option<Lease>) {
        self.lease = lease;
        self.interface.update_ip_addrs(|addresses| {
            addresses.clear();
            // There is room for one, as it was emptied.
            addresses.extend(lease.map(|lease| IpCidr::Ipv4(lease.address)));
        });
        self.interface.routes_mut().remove_default_ipv4_route();
        if let Some(lease) = lease {
            // The table is empty, so it has room.
            let _ = self.interface.routes_mut().add_default_ipv4_route(lease.gateway);
        }
    }

    /// What DHCP gave, if it did yet.
    pub fn lease(&self) -> Option<Lease> {
        self.lease
    }

    /// Sends an echo request to the gateway, numbered `number`.
    ///
    /// # Errors
    ///
    /// [`NetworkError::NoAddress`], [`NetworkError::Echo`].
    pub fn send_echo(&mut self, number: u16) -> Result<(), NetworkError> {
        let gateway = self.lease.ok_or(NetworkError::NoAddress)?.gateway;
        let socket = self.sockets.get_mut::<icmp::Socket<'_>>(self.echo);
        if !socket.is_open() {
            // It is bound once, to a number that is not 0.
            let _ = socket.bind(icmp::Endpoint::Ident(ECHO_IDENT));
        }
        let request = Icmpv4Repr::EchoRequest { ident: ECHO_IDENT, seq_no: number, data: &ECHO };
        let packet =
            socket.send(request.buffer_len(), IpAddress::Ipv4(gateway)).map_err(NetworkError::Echo)?;
        request.emit(&mut Icmpv4Packet::new_unchecked(packet), &ChecksumCapabilities::default());
        Ok(())
    }

    /// Whether the gateway's answer to echo request `number` is there, with what the request carried.
    pub fn has_echo(&mut self, number: u16) -> bool {
        let Some(lease) = self.lease else { return false };
        let socket = self.sockets.get_mut::<icmp::Socket<'_>>(self.echo);
        // Bounded by the socket's buffer.
        while let Ok((bytes, from)) = socket.recv() {
            let packet = Icmpv4Packet::new_checked(bytes);
            let reply =
                packet.and_then(|packet| Icmpv4Repr::parse(&packet, &ChecksumCapabilities::default()));
            let wanted = Icmpv4Repr::EchoReply { ident: ECHO_IDENT, seq_no: number, data: &ECHO };
            if from == IpAddress::Ipv4(lease.gateway) && reply == Ok(wanted) {
                return true;
            }
        }
        false
    }

    /// Begins a connection to a port of the gateway, in place of the last one.
    ///
    /// # Errors
    ///
    /// [`NetworkError::NoAddress`], [`NetworkError::Connect`].
    pub fn connect(&mut self, port: u16) -> Result<(), NetworkError> {
        let gateway = self.lease.ok_or(NetworkError::NoAddress)?.gateway;
        self.disconnect();
        let buffer = || tcp::SocketBuffer::new(vec![0; CONNECTION_BYTES]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        let local = self.next_port;
        self.next_port = local.checked_add(1).unwrap_or(FIRST_PORT);
        socket.connect(self.interface.context(), (gateway, port), local).map_err(NetworkError::Connect)?;
        self.connection = Some(self.sockets.add(socket));
        Ok(())
    }

    /// Forgets the connection.
    pub fn disconnect(&mut self) {
        if let Some(handle) = self.connection.take() {
            self.sockets.remove(handle);
        }
    }

    /// Where the connection is: whether the peer answered yet.
    ///
    /// # Errors
    ///
    /// [`NetworkError::Closed`], when there is none any more.
    pub fn is_connected(&mut self) -> Result<bool, NetworkError> {
        match self.connection()?.state() {
            tcp::State::Closed => Err(NetworkError::Closed),
            tcp::State::SynSent => Ok(false),
            _ => Ok(true),
        }
    }

    /// Copies what the peer sent to `bytes`: how many, 0 when there is nothing now, or `None` when the peer has sent
    /// everything.
    ///
    /// # Errors
    ///
    /// [`NetworkError::Closed`].
    pub fn receive(&mut self, bytes: &mut [u8]) -> Result<Option<usize>, NetworkError> {
        match self.connection()?.recv_slice(bytes) {
            Ok(len) => Ok(Some(len)),
            Err(tcp::RecvError::Finished) => Ok(None),
            Err(tcp::RecvError::InvalidState) => Err(NetworkError::Closed),
        }
    }

    /// Sends as many of `bytes` as there is room for now, and says how many.
    ///
    /// # Errors
    ///
    /// [`NetworkError::Closed`].
    pub fn send(&mut self, bytes: &[u8]) -> Result<usize, NetworkError> {
        self.connection()?.send_slice(bytes).map_err(|tcp::SendError::InvalidState| NetworkError::Closed)
    }

    /// Tells the peer that nothing more comes. It may still send.
    ///
    /// # Errors
    ///
    /// [`NetworkError::Closed`].
    pub fn finish_sending(&mut self) -> Result<(), NetworkError> {
        self.connection()?.close();
        Ok(())
    }

    fn connection(&mut self) -> Result<&mut tcp::Socket<'static>, NetworkError> {
        let handle = self.connection.ok_or(NetworkError::Closed)?;
        Ok(self.sockets.get_mut(handle))
    }

    /// The card, without its stack.
    pub fn into_card(self) -> Net {
        self.card.net
    }
}

fn now() -> Result<Instant, NetworkError> {
    let now = time::now_ns().ok_or(NetworkError::NoClock)?;
    Ok(Instant::from_micros((now / 1000) as i64))
}

/// The card as the stack wants to have it, whose calls cannot fail: the first failure is kept.
struct Card {
    net: Net,
    failure: Option<VirtioError>,
}

impl Card {
    /// What `result` holds, unless it, or anything before it, failed.
    fn keep<T>(&mut self, result: Result<T, VirtioError>) -> Option<T> {
        match result {
            Ok(value) => self.failure.is_none().then_some(value),
            Err(error) => {
                self.failure.get_or_insert(error);
                None
            }
        }
    }
}

impl Device for Card {
    type RxToken<'a> = Arrived;
    type TxToken<'a> = Sender<'a>;

    fn receive(&mut self, now: Instant) -> Option<(Arrived, Sender<'_>)> {
        // Without room for an answer the frame waits.
        self.transmit(now)?;
        let frame = self.net.receive();
        let frame = self.keep(frame)??;
        Some((Arrived(frame), Sender(self)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sender<'_>> {
        let can_send = self.net.can_send();
        self.keep(can_send)?.then_some(Sender(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME_BYTES;
        capabilities
    }
}

/// A frame that came in.
struct Arrived(Vec<u8>);

impl RxToken for Arrived {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

/// The right to send one frame.
struct Sender<'a>(&'a mut Card);

impl TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, fill: F) -> R {
        let mut frame = vec![0; len];
        let result = fill(&mut frame);
        let sent = self.0.net.send(&frame);
        self.0.keep(sent);
        result
    }
}
