//! The kernel's side of a run: handles of the driver, what it was told, and what must follow from that.

use virtio_iommu::{
    AttachError, CoherentMemory, DeferredBounds, Direction, DmaDevice, DmaError, DmaMapping, DmaMemory,
    Domain, DomainOptions, Endpoint, EndpointId, EndpointOptions, Iova, Leave, MapError, MoveError,
    OpenError, PhysAddr, PhysSegment, Prot, UnmapPolicy, Unmapped, Viommu,
};

use crate::kernel::{Kernel, World, lend};
use crate::op::Op;
use crate::trace;

/// The endpoints that there are.
pub const ENDPOINTS: [EndpointId; 4] =
    [EndpointId::new(8), EndpointId::new(9), EndpointId::new(0x100), EndpointId::new(0x101)];

const MAX_VIEWS: usize = 4;
const MAX_MAPPINGS: usize = 24;
/// The most polls of one operation. The longest detaches all endpoints one by one, and waits for a reset.
const MAX_RELAXED: usize = 2_000;
/// The largest granule that is mapped here.
const MAX_GRANULE: u64 = 1 << 16;

/// Counts domains over their whole life, so that one is not taken for another.
type Key = usize;

/// Where an endpoint is, as the driver said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Nowhere,
    In(Key),
    /// An error says that it may be anywhere.
    Unsure,
}

/// A raw mapping that the driver says is there.
struct Raw {
    key: Key,
    iova: u64,
    memory: DmaMemory,
    /// Whether endpoints may read it.
    readable: bool,
}

struct View<W: World> {
    key: Key,
    endpoint: usize,
    view: Endpoint<Kernel<W>>,
}

/// A mapping by a view.
struct Owned {
    key: Key,
    mapping: Mapping,
}

enum Mapping {
    Adopted(DmaMapping),
    Coherent(CoherentMemory),
    /// With the memory, which is the session's.
    List(DmaMapping, Vec<DmaMemory>),
}

/// A driver that is up, and everything that was made with it.
pub struct Session<W: World> {
    kernel: Kernel<W>,
    viommu: Viommu<Kernel<W>>,
    slots: [Option<(Key, Domain<Kernel<W>>)>; 4],
    views: Vec<View<W>>,
    raw: Vec<Raw>,
    owned: Vec<Owned>,
    /// The session's memory that was unmapped, and is its own again after a flush of the domain.
    deferred: Vec<(Key, DmaMemory)>,
    places: [Place; ENDPOINTS.len()],
    next_key: Key,
    granule: u64,
    shut_down: bool,
}

fn pick(count: usize, which: u8) -> Option<usize> {
    usize::from(which).checked_rem(count)
}

impl<W: World> Session<W> {
    /// A session with a driver that was just started.
    pub fn new(kernel: Kernel<W>, viommu: Viommu<Kernel<W>>) -> Self {
        let granule = viommu.granule();
        Self {
            kernel,
            viommu,
            slots: Default::default(),
            views: Vec::new(),
            raw: Vec::new(),
            owned: Vec::new(),
            deferred: Vec::new(),
            places: [Place::Nowhere; ENDPOINTS.len()],
            next_key: 0,
            granule,
            shut_down: false,
        }
    }

    /// The driver.
    pub fn viommu(&self) -> &Viommu<Kernel<W>> {
        &self.viommu
    }

    /// Does one operation and checks what follows from its result.
    ///
    /// # Panics
    /// When something does not.
    pub fn run(&mut self, op: Op) {
        self.act(op);
        trace("    ", &self.places);
        let relaxed = self.kernel.take_relaxed();
        assert!(relaxed <= MAX_RELAXED, "{op:?} polled {relaxed} times");
        self.check_reached();
    }

    /// What is mapped in a domain is reached by those that are in it, as long as the driver answers for it.
    fn check_reached(&self) {
        if self.shut_down {
            return;
        }
        for (at, place) in self.places.iter().enumerate() {
            let Place::In(key) = place else { continue };
            for raw in self.raw.iter().filter(|raw| raw.key == *key && raw.readable) {
                self.kernel.world().check_reached(ENDPOINTS[at], raw.iova, raw.memory);
            }
        }
    }

    fn act(&mut self, op: Op) {
        match op {
            Op::Create { deferred } => self.create(deferred),
            Op::Drop { slot } => drop(self.slots[usize::from(slot) % 4].take()),
            Op::Attach { endpoint, slot } => self.attach(endpoint, slot),
            Op::Detach { endpoint } => self.detach(endpoint),
            Op::Move { endpoint, slot } => self.move_endpoint(endpoint, slot),
            Op::Map { slot, pages, prot, low } => self.map(slot, pages, prot, low),
            Op::MapAt { slot, page, pages, prot } => self.map_at(slot, page, pages, prot),
            Op::MapIdentity { slot, pages } => self.map_identity(slot, pages),
            Op::Unmap { which, neighbours } => self.unmap(which, neighbours),
            Op::UnmapOther { slot, page, pages } => self.unmap_other(slot, page, pages),
            Op::Open { endpoint, slot, bounce, low } => self.open(endpoint, slot, bounce, low),
            Op::Close { view } => self.close(view),
            Op::Forget { view } => {
                pick(self.views.len(), view).map(|at| self.views.swap_remove(at));
            }
            Op::Adopt { view, pages } => self.adopt(view, pages),
            Op::Alloc { view, pages } => self.alloc(view, pages),
            Op::Scatter { view, segments, used } => {
                self.scatter(view, &segments[..1 + usize::from(used) % 4])
            }
            Op::Release { which } => self.release(which),
            Op::Flush { slot } => {
                if let Some((key, domain)) = self.slot(slot) {
                    self.flush(key, &domain);
                }
            }
            Op::Share { view, len } => self.share(view, len),
            Op::Reserve { slot, mappings } => {
                if let Some((_, domain)) = &self.slots[usize::from(slot) % 4] {
                    domain.reserve(mappings.into());
                }
            }
            Op::Poll => self.poll(),
            Op::Reclaim => drop(self.viommu.reclaim()),
            Op::Interrupt => drop(self.viommu.on_interrupt()),
            Op::Bypass => drop(self.viommu.read_bypass()),
            Op::Shutdown { as_found } => self.shut_down(as_found),
        }
    }

    fn poll(&self) {
        self.viommu.poll();
        // Bounded by the backlog.
        while let Some(fault) = self.viommu.next_fault() {
            assert!(!fault.to_string().is_empty());
        }
        let stats = self.viommu.stats();
        assert!(stats.quarantined_mappings > 0 || stats.quarantined_bytes == 0, "{stats:?}");
    }

    fn shut_down(&mut self, as_found: bool) {
        let leave = if as_found { Leave::AsFound } else { Leave::Blocked };
        // SAFETY: endpoints do DMA only when they are made to.
        let _ = unsafe { self.viommu.shutdown(leave) };
        self.places = [Place::Unsure; ENDPOINTS.len()];
        self.shut_down = true;
    }

    /// Whether the driver was shut down, after which endpoints may reach anything.
    pub fn is_shut_down(&self) -> bool {
        self.shut_down
    }

    /// Creates a domain, one in two of which defers unmapping until 1 to 8 mappings wait.
    fn create(&mut self, deferred: u8) {
        let Some(free) = self.slots.iter().position(Option::is_none) else { return };
        let bounds = DeferredBounds {
            mappings: 1 + usize::from(deferred / 2 % 8),
            bytes: self.granule.saturating_mul(8),
            ..DeferredBounds::default()
        };
        let unmap =
            if deferred.is_multiple_of(2) { UnmapPolicy::Strict } else { UnmapPolicy::Deferred(bounds) };
        let options = DomainOptions { mappings: 8, unmap, ..DomainOptions::default() };
        if let Ok(domain) = self.viommu.create_domain(options) {
            self.slots[free] = Some((self.next_key, domain));
            self.next_key += 1;
        }
    }

    fn endpoint(endpoint: u8) -> (usize, EndpointId) {
        let at = usize::from(endpoint) % ENDPOINTS.len();
        (at, ENDPOINTS[at])
    }

    fn slot(&self, slot: u8) -> Option<(Key, Domain<Kernel<W>>)> {
        self.slots[usize::from(slot) % 4].clone()
    }

    /// A handle of a domain, if there is any.
    fn handle(&self, key: Key) -> Option<Domain<Kernel<W>>> {
        let own = self.slots.iter().flatten().find(|(of, _)| *of == key).map(|(_, domain)| domain);
        own.or_else(|| self.views.iter().find(|view| view.key == key).map(|view| view.view.domain())).cloned()
    }

    fn attach(&mut self, endpoint: u8, slot: u8) {
        let Some((key, domain)) = self.slot(slot) else { return };
        let (at, id) = Self::endpoint(endpoint);
        let attached = self.viommu.attach(id, &domain);
        trace("    ", &attached);
        self.places[at] = match attached {
            Ok(()) => Place::In(key),
            // Sent nothing: it is where it was.
            Err(AttachError::Busy(_)) => self.places[at],
            Err(error) => self.not_attached(key, error),
        };
    }

    fn detach(&mut self, endpoint: u8) {
        let (at, id) = Self::endpoint(endpoint);
        let detached = self.viommu.detach(id);
        trace("    ", &detached);
        self.places[at] = if detached.is_ok() { Place::Nowhere } else { Place::Unsure };
    }

    fn move_endpoint(&mut self, endpoint: u8, slot: u8) {
        let Some((key, domain)) = self.slot(slot) else { return };
        let (at, id) = Self::endpoint(endpoint);
        self.places[at] = match self.viommu.move_endpoint(id, &domain) {
            Ok(()) => Place::In(key),
            Err(MoveError::Attach(error)) => self.not_attached(key, error),
            Err(_) => Place::Unsure,
        };
    }

    /// Mappings of a domain that could not be mapped again may be in quarantine: they are not the session's any more.
    fn not_attached(&mut self, key: Key, error: AttachError) -> Place {
        if matches!(error, AttachError::Replay { .. }) {
            self.raw.retain(|raw| raw.key != key);
        }
        Place::Unsure
    }

    /// Memory of the session's own, whole granules.
    fn memory(&self, pages: u8) -> Option<DmaMemory> {
        if self.granule > MAX_GRANULE || self.raw.len() + self.owned.len() >= MAX_MAPPINGS {
            return None;
        }
        let granule = self.granule.max(2) as usize;
        let memory = self.kernel.world().ram().alloc(granule * (1 + usize::from(pages) % 4), granule)?;
        // SAFETY: a fresh block.
        unsafe { memory.ptr.as_ptr().write_bytes(memory.phys.get() as u8 | 1, memory.len) };
        Some(memory)
    }

    fn give_up(&self, memory: DmaMemory) {
        self.kernel.world().check_gone(memory);
        self.kernel.world().ram().free(memory);
    }

    fn limit(&self, low: bool) -> Iova {
        let range = self.viommu.input_range();
        let few = range.start().checked_add(self.granule.saturating_mul(16)).unwrap_or(range.last());
        if low { few } else { Iova::new(u64::MAX) }
    }

    fn prot(prot: u8) -> Prot {
        // The endpoint both reads and writes, in most of the mappings, so that it can be tried.
        if prot >= 0xf0 { Prot::from_bits_retain(u32::from(prot & 15)) } else { Prot::READ | Prot::WRITE }
    }

    fn map(&mut self, slot: u8, pages: u8, prot: u8, low: bool) {
        let Some((key, domain)) = self.slot(slot) else { return };
        let Some(memory) = self.memory(pages) else { return };
        let (len, limit) = (memory.len as u64, self.limit(low));
        // SAFETY: the memory is the session's, which uses it no more.
        let mapped = unsafe { domain.map(memory.phys, len, Self::prot(prot), limit) };
        self.take_note(key, memory, Self::prot(prot), mapped);
    }

    fn map_at(&mut self, slot: u8, page: u8, pages: u8, prot: u8) {
        let Some((key, domain)) = self.slot(slot) else { return };
        let Some(memory) = self.memory(pages) else { return };
        let start = self.viommu.input_range().start().get();
        let iova = Iova::new(start.saturating_add(self.granule.saturating_mul(u64::from(page % 32))));
        // SAFETY: as in `map`.
        let mapped = unsafe { domain.map_at(iova, memory.phys, memory.len as u64, Self::prot(prot)) };
        self.take_note(key, memory, Self::prot(prot), mapped.map(|()| iova));
    }

    fn take_note(&mut self, key: Key, memory: DmaMemory, prot: Prot, mapped: Result<Iova, MapError>) {
        trace("    ", &mapped);
        match mapped {
            Ok(iova) => {
                let readable = prot.contains(Prot::READ);
                self.raw.push(Raw { key, iova: iova.get(), memory, readable });
            }
            // The device may have it: the memory is lost.
            Err(MapError::Quarantined { .. }) => self.doubt(key),
            Err(error) => {
                if matches!(error, MapError::Request { .. }) {
                    self.doubt(key);
                }
                self.give_up(memory);
            }
        }
    }

    /// A domain whose MAP was refused may have tried another number, and lost endpoints on the way.
    fn doubt(&mut self, key: Key) {
        for place in self.places.iter_mut().filter(|place| **place == Place::In(key)) {
            *place = Place::Unsure;
        }
    }

    fn map_identity(&mut self, slot: u8, pages: u8) {
        let Some((key, domain)) = self.slot(slot) else { return };
        let Some(memory) = self.memory(pages) else { return };
        let prot = Prot::READ | Prot::WRITE;
        // SAFETY: as in `map`.
        let mapped = unsafe { domain.map_identity(memory.phys, memory.len as u64, prot) };
        match mapped {
            // Whole, if the first byte and the last are in one mapping.
            Ok(()) => {
                let iova = memory.phys.get();
                let whole = domain.translate(Iova::new(iova)).map(|to| to.range.len_minus_one());
                if whole == Some(memory.len as u64 - 1) {
                    self.raw.push(Raw { key, iova, memory, readable: true });
                }
            }
            // What came before stays mapped.
            Err(_) => self.doubt(key),
        }
    }

    fn unmap(&mut self, which: u8, neighbours: u8) {
        let Some(first) = pick(self.raw.len(), which) else { return };
        let mut run = vec![self.raw.swap_remove(first)];
        let key = run[0].key;
        for _ in 0..neighbours % 4 {
            let end = run.last().map(|raw| raw.iova + raw.memory.len as u64);
            let next = self.raw.iter().position(|raw| raw.key == key && Some(raw.iova) == end);
            let Some(next) = next else { break };
            run.push(self.raw.swap_remove(next));
        }
        // Without a handle nobody can unmap them.
        let Some(domain) = self.handle(key) else { return };
        let len = run.iter().map(|raw| raw.memory.len as u64).sum();
        // SAFETY: mapped by the session.
        let unmapped = unsafe { domain.unmap(Iova::new(run[0].iova), len) };
        trace("    ", &unmapped);
        // Else it is in quarantine, and the memory is lost.
        if unmapped.is_ok() {
            run.iter().for_each(|raw| self.give_up(raw.memory));
        }
    }

    /// Tries to unmap what is most often nothing, or a part.
    fn unmap_other(&mut self, slot: u8, page: u8, pages: u8) {
        let Some((key, domain)) = self.slot(slot) else { return };
        let start = self.viommu.input_range().start().get();
        let first = start.saturating_add(self.granule.saturating_mul(u64::from(page % 32)));
        let len = self.granule.saturating_mul(u64::from(pages % 4));
        let meets = |raw: &Raw| {
            raw.key == key && raw.iova < first.saturating_add(len) && first < raw.iova + raw.memory.len as u64
        };
        let whole =
            |raw: &Raw| raw.iova >= first && raw.iova + raw.memory.len as u64 <= first.saturating_add(len);
        let touched = self.raw.iter().any(|raw| meets(raw) && whole(raw));
        // What is unmapped by this would have to be found again: only what can but fail is tried.
        if touched
            || self.owned.iter().any(|owned| owned.key == key)
            || self.views.iter().any(|view| view.key == key)
        {
            return;
        }
        // SAFETY: at most mappings that the session made and lost are unmapped.
        let _ = unsafe { domain.unmap(Iova::new(first), len) };
    }

    fn open(&mut self, endpoint: u8, slot: u8, bounce: u8, low: bool) {
        let Some((key, domain)) = self.slot(slot) else { return };
        if self.views.len() >= MAX_VIEWS {
            return;
        }
        let (at, id) = Self::endpoint(endpoint);
        let bounce_bytes = usize::from(bounce % 3) * self.granule.min(MAX_GRANULE) as usize;
        let options = EndpointOptions { limit: self.limit(low), bounce_bytes, ..EndpointOptions::default() };
        match self.viommu.open(id, &domain, options) {
            Ok(view) => {
                self.places[at] = Place::In(key);
                self.views.push(View { key, endpoint: at, view });
            }
            Err(error) => {
                self.doubt(key);
                self.places[at] = match error {
                    OpenError::Attach(error) => self.not_attached(key, error),
                    _ => Place::Unsure,
                };
            }
        }
    }

    fn close(&mut self, view: u8) {
        let Some(at) = pick(self.views.len(), view) else { return };
        let View { endpoint, view, .. } = self.views.swap_remove(at);
        self.places[endpoint] = if view.close().is_ok() { Place::Nowhere } else { Place::Unsure };
    }

    fn view(&self, view: u8) -> Option<&View<W>> {
        pick(self.views.len(), view).map(|at| &self.views[at])
    }

    fn adopt(&mut self, view: u8, pages: u8) {
        let Some(memory) = self.memory(pages) else { return };
        let Some(View { key, view, .. }) = self.view(view) else {
            return self.kernel.world().ram().free(memory);
        };
        let key = *key;
        match view.adopt(lend(memory), Direction::Both) {
            Ok(mapping) => self.owned.push(Owned { key, mapping: Mapping::Adopted(mapping) }),
            Err((_, back)) => {
                self.doubt(key);
                if let Some(held) = back {
                    self.give_up(held.into_memory());
                }
            }
        }
    }

    fn alloc(&mut self, view: u8, pages: u8) {
        if self.granule > MAX_GRANULE || self.raw.len() + self.owned.len() >= MAX_MAPPINGS {
            return;
        }
        let len = self.granule as usize * (1 + usize::from(pages) % 4);
        let Some(View { key, view, .. }) = self.view(view) else { return };
        let key = *key;
        match view.alloc_coherent(len) {
            Ok(memory) => {
                // SAFETY: the driver promises memory that is valid as long as it is not freed.
                unsafe { memory.ptr().as_ptr().write_bytes(0x5a, memory.len_bytes()) };
                self.owned.push(Owned { key, mapping: Mapping::Coherent(memory) });
            }
            Err(_) => self.doubt(key),
        }
    }

    fn scatter(&mut self, view: u8, segments: &[u8]) {
        let Some(View { key, view, .. }) = self.view(view) else { return };
        let key = *key;
        let memory: Vec<DmaMemory> = segments.iter().filter_map(|pages| self.memory(*pages)).collect();
        let part = |(memory, odd): (&DmaMemory, &u8)| {
            let skip = usize::from(odd >> 4) * memory.len / 32;
            PhysSegment { phys: PhysAddr::new(memory.phys.get() + skip as u64), len: memory.len - skip }
        };
        let list: Vec<PhysSegment> = memory.iter().zip(segments).map(part).collect();
        let mut iovas = vec![Iova::new(0); list.len()];
        // SAFETY: the memory is the session's.
        match unsafe { view.map_scatter(&list, Direction::Both, &mut iovas) } {
            Ok(mapping) => self.owned.push(Owned { key, mapping: Mapping::List(mapping, memory) }),
            Err(DmaError::Map(MapError::Quarantined { .. })) => self.doubt(key),
            Err(_) => {
                self.doubt(key);
                memory.into_iter().for_each(|memory| self.give_up(memory));
            }
        }
    }

    fn release(&mut self, which: u8) {
        let Some(at) = pick(self.owned.len(), which) else { return };
        let Owned { key, mapping } = self.owned.swap_remove(at);
        let Some(View { view, .. }) = self.views.iter().find(|view| view.key == key) else { return };
        let (result, memory) = match mapping {
            Mapping::Adopted(mapping) => (view.unmap(mapping), Vec::new()),
            Mapping::Coherent(memory) => (view.free_coherent(memory), Vec::new()),
            Mapping::List(mapping, memory) => (view.unmap(mapping), memory),
        };
        match result {
            Ok(Unmapped::Now) => memory.into_iter().for_each(|memory| self.give_up(memory)),
            Ok(Unmapped::AtFlush) => {
                self.deferred.extend(memory.into_iter().map(|memory| (key, memory)));
            }
            Err(_) => {}
        }
    }

    /// What was deferred is the session's own again when a flush succeeds.
    fn flush(&mut self, key: Key, domain: &Domain<Kernel<W>>) {
        let flushed = domain.flush();
        trace("    ", &flushed);
        if flushed.is_ok() {
            let back = self.deferred.extract_if(.., |(of, _)| *of == key);
            let back: Vec<DmaMemory> = back.map(|(_, memory)| memory).collect();
            back.into_iter().for_each(|memory| self.give_up(memory));
        }
    }

    fn share(&self, view: u8, len: u16) {
        let Some(View { view, .. }) = self.view(view) else { return };
        let mut buffer = vec![0x11; 1 + usize::from(len)];
        let pointer = std::ptr::NonNull::from(&mut buffer[..]);
        for direction in [Direction::ToDevice, Direction::FromDevice, Direction::Both] {
            // SAFETY: the buffer is nobody else's.
            if let Ok(iova) = unsafe { view.share(pointer, direction) } {
                // SAFETY: the buffer is the one that was shared.
                unsafe { view.unshare(iova, pointer, direction) };
            }
        }
    }

    /// Ends the session in order, as far as the device lets it.
    pub fn end(mut self) {
        while !self.owned.is_empty() {
            self.release(0);
        }
        while !self.raw.is_empty() {
            self.unmap(0, 0);
        }
        while !self.views.is_empty() {
            self.close(0);
        }
        for slot in 0..self.slots.len() as u8 {
            self.act(Op::Flush { slot });
        }
        self.viommu.poll();
        self.viommu.reclaim();
    }
}
