//! A front end, as small as one can be: a server to talk to, memory that both share, and the guest's side of it.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend as _};
use vhost::{VhostBackend as _, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_iommu_vhost::{End, Served, Server, draft, window};
use vm_memory::{Bytes as _, FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The guest's memory.
pub(crate) const BASE: u64 = 0x4000_0000;
const LEN: usize = 8 << 20;
/// The first address that is none.
pub(crate) const OUTSIDE: u64 = BASE + LEN as u64;
/// The agents.
pub(crate) const AGENT: u32 = 8;
pub(crate) const OTHER_AGENT: u32 = 9;
/// Tells front ends of protocol features; none of the device's.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// Nothing here takes as long.
const PATIENCE: Duration = Duration::from_secs(20);

/// Where the driver has a ring.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ring {
    pub(crate) size: u16,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
}

/// A server on a thread of its own.
pub(crate) struct Running {
    pub(crate) path: PathBuf,
    pub(crate) backend: Served,
    end: Receiver<anyhow::Result<End>>,
}

impl Running {
    pub(crate) fn start() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("vhost-{}-{number}.sock", std::process::id()));
        let server = Server::listen(&path, draft([AGENT, OTHER_AGENT])).unwrap();
        let backend = server.backend();
        let (sender, end) = channel();
        thread::spawn(move || sender.send(server.serve()));
        Self { path, backend, end }
    }

    /// How the front end left, which it has to have.
    pub(crate) fn end(&self) -> anyhow::Result<End> {
        self.end.recv_timeout(PATIENCE).expect("the server goes on without a front end")
    }
}

/// A front end that is connected, with memory.
pub(crate) struct Vmm {
    frontend: Frontend,
    pub(crate) memory: GuestMemoryMmap,
    /// Memory that nobody has yet.
    free: Mutex<u64>,
    pub(crate) kicks: [EventFd; 2],
    pub(crate) calls: [EventFd; 2],
}

impl Vmm {
    pub(crate) fn connect(running: &Running) -> Self {
        let stream = UnixStream::connect(&running.path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut frontend = Frontend::from_stream(stream, 2);
        frontend.set_owner().unwrap();
        assert_ne!(frontend.get_features().unwrap() & PROTOCOL_FEATURES, 0);
        let offered = frontend.get_protocol_features().unwrap();
        assert!(offered.contains(VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK));
        frontend.set_protocol_features(offered).unwrap();
        // Each message is answered when it is done.
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let events = || [EventFd::new(EFD_NONBLOCK).unwrap(), EventFd::new(EFD_NONBLOCK).unwrap()];
        let free = Mutex::new(BASE);
        Self { frontend, memory: memfd(LEN as u64), free, kicks: events(), calls: events() }
    }

    pub(crate) fn frontend(&self) -> Frontend {
        self.frontend.clone()
    }

    /// What the device offers.
    pub(crate) fn features(&self) -> u64 {
        self.frontend.get_features().unwrap() & !PROTOCOL_FEATURES
    }

    /// Does what a VMM does when the driver says DRIVER_OK.
    pub(crate) fn start(&self, features: u64, rings: [Ring; 2]) -> Result<(), vhost::Error> {
        let mut frontend = self.frontend();
        frontend.set_features(features | PROTOCOL_FEATURES)?;
        let region = self.memory.iter().next().unwrap();
        frontend.set_mem_table(&[VhostUserMemoryRegionInfo::from_guest_region(region)?])?;
        for (at, ring) in rings.iter().enumerate() {
            frontend.set_vring_num(at, ring.size)?;
            frontend.set_vring_base(at, 0)?;
            frontend.set_vring_addr(at, &self.place(ring))?;
            frontend.set_vring_call(at, &self.calls[at])?;
            frontend.set_vring_kick(at, &self.kicks[at])?;
        }
        (0..2).try_for_each(|at| frontend.set_vring_enable(at, true))
    }

    /// And when the driver resets the device.
    pub(crate) fn stop(&self) {
        for at in 0..2 {
            assert_eq!(self.frontend.get_vring_base(at).unwrap(), 0);
        }
    }

    /// A ring by this process's addresses, as the protocol wants it; what is outside of memory stays as it is.
    fn place(&self, ring: &Ring) -> VringConfigData {
        let host = |address: u64| {
            self.memory.get_host_address(GuestAddress(address)).map_or(address, |pointer| pointer as u64)
        };
        VringConfigData {
            queue_max_size: 256,
            queue_size: ring.size,
            flags: 0,
            desc_table_addr: host(ring.descriptors),
            used_ring_addr: host(ring.used),
            avail_ring_addr: host(ring.available),
            log_addr: None,
        }
    }

    pub(crate) fn read_config(&self, offset: usize, len: usize) -> Result<Vec<u8>, vhost::Error> {
        let flags = VhostUserConfigFlags::empty();
        let read = self.frontend().get_config(offset as u32, len as u32, flags, &vec![0; len]);
        read.map(|(_, bytes)| bytes)
    }

    pub(crate) fn write_config(&self, offset: usize, bytes: &[u8]) -> Result<(), vhost::Error> {
        self.frontend().set_config(offset as u32, VhostUserConfigFlags::WRITABLE, bytes)
    }

    /// Zeroed memory of the guest's, for good.
    pub(crate) fn allocate(&self, len: u64, align: u64) -> Option<u64> {
        let mut free = self.free.lock().unwrap();
        let at = free.checked_next_multiple_of(align)?;
        *free = at.checked_add(len).filter(|end| *end <= OUTSIDE)?;
        Some(at)
    }

    /// A write of an agent's, by its registers; what came of it.
    pub(crate) fn agent_writes(&self, agent: u32, pasid: Option<u32>, iova: u64, byte: u8) -> u32 {
        let mut registers = [0; window::OUTCOME - window::ENDPOINT];
        let mut set = |at: usize, bytes: &[u8]| {
            registers[at - window::ENDPOINT..][..bytes.len()].copy_from_slice(bytes);
        };
        set(window::ENDPOINT, &agent.to_le_bytes());
        set(window::PASID, &pasid.unwrap_or(window::NO_PASID).to_le_bytes());
        set(window::IOVA, &iova.to_le_bytes());
        set(window::DATA, &[byte; window::DATA_LEN]);
        set(window::COMMAND, &window::command::WRITE.to_le_bytes());
        self.write_config(window::WINDOW + window::ENDPOINT, &registers).unwrap();
        let outcome = self.read_config(window::WINDOW + window::OUTCOME, 4).unwrap();
        u32::from_le_bytes(outcome.try_into().unwrap())
    }

    pub(crate) fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

/// Memory in a file that has no name.
pub(crate) fn memfd(len: u64) -> GuestMemoryMmap {
    let file: OwnedFd = memfd_create("guest", MFdFlags::empty()).unwrap();
    let file = std::fs::File::from(file);
    file.set_len(len).unwrap();
    let regions = [(GuestAddress(BASE), LEN, Some(FileOffset::new(file, 0)))];
    GuestMemoryMmap::from_ranges_with_files(regions).unwrap()
}

/// Waits until something is so.
pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let started = std::time::Instant::now();
    while !is_so() {
        assert!(started.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        thread::sleep(Duration::from_millis(1));
    }
}
