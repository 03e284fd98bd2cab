//! Random operations, most of them at the edges of what there is.

use fastrand::Rng;
use qemu_tests::qemu::Version;
use qtest::{EDU, EDU2, Edu, Request, Transfer};
use virtio_iommu::EndpointId;
use virtio_iommu_model::{Device, Mapping};

use crate::support::{ENDPOINTS, PAGE};

/// What a sequence is made of.
#[derive(Clone, Debug)]
pub(super) enum Op {
    /// A request.
    Request(Request),
    /// The device is reset and brought up again.
    Reset,
    /// `bypass` is written.
    Bypass(u8),
    /// `edu` accesses memory.
    Access { endpoint: u32, transfer: Transfer, iova: u64, offset: usize, len: usize },
}

/// Whether a sequence has accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accesses {
    With,
    Without,
}

/// Where the mappings are, so close that they meet.
const WINDOW: u64 = 0x4000_0000;
const WINDOW_PAGES: u64 = 48;
/// Where they lead: memory that is compared byte by byte.
pub(super) const TARGET: u64 = 0x40_0000;
pub(super) const TARGET_LEN: usize = 0x8_0000;
/// In the lower half of the device's buffer is a pattern; what it reads goes to the upper one.
pub(super) const PATTERN_LEN: usize = 2048;

const MSI: (u64, u64) = (0xfee0_0000, 0xfeef_ffff);
/// Endpoints that are in no machine.
const ABSENT: [u32; 3] = [444, 1, 0x30];

/// Makes operations that fit the state of a device.
pub(super) struct Generator {
    pub(super) rng: Rng,
    version: Version,
}

impl Generator {
    pub(super) fn new(seed: u64, version: Version) -> Self {
        Self { rng: Rng::with_seed(seed), version }
    }

    /// The next operation. `device` is in the state that QEMU's is thought to be in.
    pub(super) fn next(&mut self, device: &Device, accesses: Accesses) -> Op {
        match self.rng.u32(0..1000) {
            0..5 => Op::Reset,
            5..15 => Op::Bypass(u8::from(self.one_in(3))),
            15..75 if accesses == Accesses::With => self.access(device),
            15..150 => Op::Request(self.attach(device)),
            150..220 => Op::Request(self.detach(device)),
            220..580 => Op::Request(self.map(device)),
            580..920 => Op::Request(self.unmap(device)),
            920..950 => Op::Request(Request::Probe { endpoint: self.endpoint() }),
            _ => Op::Request(self.raw(device)),
        }
    }

    fn one_in(&mut self, count: u32) -> bool {
        self.rng.u32(0..count) == 0
    }

    fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.rng.usize(0..items.len())]
    }

    fn endpoint(&mut self) -> u32 {
        if self.one_in(20) { self.pick(&ABSENT) } else { self.pick(&ENDPOINTS).get() }
    }

    /// A domain, mostly one that exists.
    fn domain(&mut self, device: &Device) -> u32 {
        let existing: Vec<u32> = device.domains().collect();
        if existing.is_empty() || self.one_in(12) {
            return self.pick(&[0, 1, 2, 3, 0x8000_0000, u32::MAX]);
        }
        self.pick(&existing)
    }

    fn attach(&mut self, device: &Device) -> Request {
        let domain = if self.rng.bool() { self.domain(device) } else { self.rng.u32(0..4) };
        let flags = match self.rng.u32(0..20) {
            0 => self.pick(&[2, 3, 1 << 31]),
            1 | 2 => 1,
            _ => 0,
        };
        let reserved = if self.one_in(25) { 1 << self.rng.u32(0..32) } else { 0 };
        Request::Attach { domain, endpoint: self.endpoint(), flags, reserved }
    }

    fn detach(&mut self, device: &Device) -> Request {
        let mut endpoint = self.endpoint();
        if device.domain_of(endpoint).is_none() && !self.one_in(4) {
            let attached = |endpoint: &u32| device.domain_of(*endpoint).is_some();
            endpoint = ENDPOINTS.map(EndpointId::get).into_iter().find(attached).unwrap_or(endpoint);
        }
        let own = device.domain_of(endpoint).filter(|_| !self.one_in(4));
        let domain = own.unwrap_or_else(|| self.domain(device));
        let reserved = if self.one_in(10) { self.rng.u64(..) } else { 0 };
        Request::Detach { domain, endpoint, reserved }
    }

    fn map(&mut self, device: &Device) -> Request {
        let domain = self.domain(device);
        let first = WINDOW + PAGE * self.rng.u64(0..WINDOW_PAGES);
        let len = PAGE * self.rng.u64(1..5);
        let phys = TARGET + PAGE * self.rng.u64(0..64);
        let flags = self.pick(&[1, 2, 3, 3, 3, 7, 0]);
        let good = (first, first + len - 1, phys, flags);
        let (first, last, phys, flags) = match self.rng.u32(0..40) {
            0 => (first + 0x800, good.1, phys, flags),
            1 => (first, good.1 - 0x7ff, phys, flags),
            2 => (first, good.1, phys + 0x10, flags),
            3 => (first, good.1, phys, self.pick(&[8, 9, 1 << 31])),
            4 => (first, first, phys, flags),
            5 => (1 << 39, (1 << 39) + len - 1, phys, flags),
            6 => ((1 << 39) - PAGE, (1 << 39) + PAGE - 1, phys, flags),
            7 => (MSI.0, MSI.0 + len - 1, phys, flags),
            8 => (MSI.1 - PAGE + 1, MSI.1 + PAGE, phys, flags),
            9 => (first, first + 2 * PAGE - 1, u64::MAX - PAGE + 1, flags),
            10 => (u64::MAX - len + 1, u64::MAX, phys, flags),
            11 => {
                return self.map_at_an_edge(device, domain).unwrap_or(Request::map(
                    domain,
                    (first, good.1),
                    phys,
                    3,
                ));
            }
            _ => good,
        };
        Request::map(domain, (first, last), phys, flags)
    }

    /// A mapping that touches another one, or overlaps it by little.
    fn map_at_an_edge(&mut self, device: &Device, domain: u32) -> Option<Request> {
        let near = self.mapping(device, domain)?;
        let after = near.virt_last.checked_add(1)?;
        let (first, last) = match self.rng.u32(0..4) {
            0 => (after, after.checked_add(PAGE - 1)?),
            1 => (near.virt_last, near.virt_last.checked_add(PAGE)?),
            2 => (near.virt_first.checked_sub(PAGE)?, near.virt_first - 1),
            _ => (near.virt_first.checked_sub(PAGE)?, near.virt_first),
        };
        Some(Request::map(domain, (first, last), TARGET, 3))
    }

    fn mapping(&mut self, device: &Device, domain: u32) -> Option<Mapping> {
        let mappings: Vec<Mapping> = device.mappings(domain).collect();
        (!mappings.is_empty()).then(|| self.pick(&mappings))
    }

    fn unmap(&mut self, device: &Device) -> Request {
        let domain = self.domain(device);
        let window = WINDOW + PAGE * self.rng.u64(0..WINDOW_PAGES);
        let (Some(one), Some(two)) = (self.mapping(device, domain), self.mapping(device, domain)) else {
            return Request::unmap(domain, (window, window + PAGE - 1));
        };
        let (low, high) = if one.virt_first <= two.virt_first { (one, two) } else { (two, one) };
        let whole = (low.virt_first, high.virt_last);
        let (first, last) = match self.rng.u32(0..40) {
            0..16 => (one.virt_first, one.virt_last),
            16..24 => whole,
            24..27 => (whole.0.saturating_sub(PAGE), whole.1.saturating_add(PAGE)),
            27..30 => (whole.0, whole.1 - (high.virt_last - high.virt_first) / 2),
            30..33 => (whole.0 + (low.virt_last - low.virt_first).div_ceil(2), whole.1),
            33 => (one.virt_first, one.virt_first),
            34 => (0, u64::MAX),
            35 => (0, (1 << 39) - 1),
            36 => (u64::MAX - PAGE + 1, u64::MAX),
            // Inverted. Never a MAP like this: QEMU 7.2 and 10.0 would hang at the next UNMAP of it.
            37 => (whole.0 + 2, whole.0 + 1),
            _ => (window, window + 4 * PAGE - 1),
        };
        let reserved = if self.one_in(30) { self.rng.u32(1..) } else { 0 };
        Request::Unmap { domain, first, last, reserved }
    }

    /// A request that is too short, too long, or of no known type. All have head and tail: without, the
    /// device stops.
    fn raw(&mut self, device: &Device) -> Request {
        let probe = Request::Probe { endpoint: self.endpoint() };
        let request = match self.rng.u32(0..5) {
            0 => self.attach(device),
            1 => self.detach(device),
            2 => self.map(device),
            3 => self.unmap(device),
            _ => probe.clone(),
        };
        let is_probe = request == probe;
        let mut readable = request.readable();
        let (fits, more) = if is_probe { (516, 1024) } else { (4, 64) };
        let mut writable = fits;
        match self.rng.u32(0..5) {
            0 => readable.truncate(self.rng.usize(4..readable.len())),
            1 => readable[0] = self.pick(&[0, 6, 0x42, 0xff]),
            2 => readable.extend([0xee; 12]),
            3 => writable = more,
            // QEMU 7.2 would abort.
            _ if is_probe && self.version.major > 7 => writable = self.rng.u32(4..516),
            _ => readable[1..4].fill(0x77),
        }
        Request::Raw { readable, writable }
    }

    /// An access at an edge of something, by an endpoint that can.
    fn access(&mut self, device: &Device) -> Op {
        // What leads to other places is not compared, and could be registers.
        let good = |mapping: &Mapping| leads_to_target(mapping) && in_window(mapping);
        let candidates: Vec<(u32, Option<Mapping>)> = [EDU, EDU2]
            .map(EndpointId::get)
            .into_iter()
            .flat_map(|endpoint| {
                let domain = device.domain_of(endpoint).into_iter();
                domain.flat_map(|domain| device.mappings(domain)).map(move |mapping| (endpoint, mapping))
            })
            .filter(|(_, mapping)| good(mapping))
            .map(|(endpoint, mapping)| (endpoint, Some(mapping)))
            .collect();
        if candidates.is_empty() && !self.one_in(8) {
            let mappable = device.domains().any(|domain| !device.is_bypass_domain(domain));
            return Op::Request(if mappable { self.map(device) } else { self.attach(device) });
        }
        let any = [(EDU.get(), None), (EDU2.get(), None)];
        let somewhere = candidates.is_empty() || self.one_in(6);
        let (endpoint, mapping) = self.pick(if somewhere { &any } else { &candidates });
        let transfer = self.pick(&[Transfer::FromMemory, Transfer::ToMemory]);
        let len = self.pick(&[1, 2, 4, 4]);
        let (start, end) = match mapping {
            Some(mapping) => (mapping.virt_first, mapping.virt_last),
            None => (WINDOW, WINDOW + PAGE - 1),
        };
        let aligned = |address: u64| address & !(len as u64 - 1);
        let iova = match self.rng.u32(0..5) {
            0 => aligned(start),
            1 => aligned(end),
            2 => aligned(start - 1),
            3 => aligned(end + 1),
            _ => aligned(self.rng.u64(start..=end)),
        };
        // While it bypasses, the address is a physical one: there is no memory there, and nothing else.
        let from = if transfer == Transfer::ToMemory { 0 } else { PATTERN_LEN };
        let offset = from + self.rng.usize(0..Edu::BUFFER_LEN - PATTERN_LEN - len);
        Op::Access { endpoint, transfer, iova, offset, len }
    }
}

fn leads_to_target(mapping: &Mapping) -> bool {
    let last = mapping.phys_first.checked_add(mapping.virt_last - mapping.virt_first);
    mapping.phys_first >= TARGET && last.is_some_and(|last| last < TARGET + TARGET_LEN as u64)
}

fn in_window(mapping: &Mapping) -> bool {
    mapping.virt_first >= WINDOW && mapping.virt_last < WINDOW + PAGE * (WINDOW_PAGES + 8)
}
