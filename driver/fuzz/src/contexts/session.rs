//! The kernel's side: handles of the driver, what it was told, and what must follow from that.

mod check;
mod mappings;
mod pages;

use virtio_iommu::contexts::table::{ArmGranule, NotPresent, PageTable, TableFormat, TableOptions};
use virtio_iommu::contexts::{
    Anonymous, ContextError, Contexts, ContextsOptions, MappedContext, OwnedContext, PageGroup, PageGroups,
    Pasid,
};
use virtio_iommu::{AttachError, DomainOptions, EndpointId, Iova, Prot, Viommu};

use super::nest::Spaces;
use super::op::Op;
use super::reach::{BLOCK, Reach};
use crate::kernel::Kernel;
use crate::session::ENDPOINTS;
use crate::trace;
use crate::truthful::world::Truthful;

/// Endpoints that are attached to domains with contexts; the others are for nested spaces.
const MEMBERS: [EndpointId; 2] = [ENDPOINTS[0], ENDPOINTS[1]];
/// PASIDs that contexts are made for.
const PASIDS: u32 = 2;
const MAX_DOMAINS: usize = 3;
const MAX_CONTEXTS: usize = 6;
/// The most polls of one operation. The longest unmaps all shadows.
const MAX_RELAXED: usize = 2_000;
/// Where memory is that is mapped. No access is made, so that it need not exist.
const MEMORY: u64 = 1 << 40;
/// How much each mapping has for itself.
const EACH: u64 = 4 * BLOCK;
const GROUPS: usize = 4;
const PAGES_OF_GROUP: usize = 3;

type Viommus = Viommu<Kernel<Truthful>>;

/// Where an endpoint is, as the driver said: in which of the domains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Nowhere,
    In(usize),
    Unsure,
}

struct Domain {
    contexts: Contexts<Kernel<Truthful>>,
    /// What accesses without a PASID meet where there is a default context.
    default: Reach,
    /// What is mapped there.
    mapped: Vec<(Iova, u64)>,
}

struct Context {
    domain: usize,
    pasid: u32,
    reach: Reach,
    handle: Handle,
}

enum Handle {
    Mapped(MappedContext<Kernel<Truthful>>),
    Owned(Box<OwnedContext<Kernel<Truthful>, Viommus>>),
    /// It was dropped, and the context stays with the device.
    None,
}

/// A driver that is up, and everything that was made with it.
pub struct Session {
    kernel: Kernel<Truthful>,
    viommu: Viommus,
    domains: Vec<Domain>,
    contexts: Vec<Context>,
    places: [Place; MEMBERS.len()],
    groups: PageGroups,
    complete: Vec<PageGroup>,
    spaces: Spaces,
    mappings: u64,
}

fn pick(count: usize, which: u8) -> Option<usize> {
    usize::from(which).checked_rem(count)
}

fn prot(write: bool) -> Prot {
    if write { Prot::READ | Prot::WRITE } else { Prot::READ }
}

impl Session {
    /// A session with a driver that was just started.
    pub fn new(kernel: Kernel<Truthful>, viommu: Viommus) -> Option<Self> {
        let _ = kernel.take_relaxed();
        let mut session = Self {
            spaces: Spaces::new(viommu.clone())?,
            kernel,
            viommu,
            domains: Vec::new(),
            contexts: Vec::new(),
            places: [Place::Nowhere; MEMBERS.len()],
            groups: PageGroups::new(GROUPS, PAGES_OF_GROUP),
            complete: Vec::new(),
            mappings: 0,
        };
        // An endpoint in a domain with a context of each kind, so that most inputs have something to work on.
        session.create(1);
        session.attach(0, 0);
        session.add_mapped(0, 0);
        session.add_owned(0, 1, 0);
        Some(session)
    }

    /// Does one operation.
    ///
    /// # Panics
    /// When it waits too long.
    pub fn run(&mut self, op: Op) {
        self.act(op);
        trace("    ", &self.places);
        let relaxed = self.kernel.take_relaxed();
        assert!(relaxed <= MAX_RELAXED, "{op:?} polled {relaxed} times");
    }

    fn act(&mut self, op: Op) {
        match op {
            Op::Create { anonymous } => self.create(anonymous),
            Op::Attach { endpoint, domain } => self.attach(endpoint, domain),
            Op::Detach { endpoint } => self.detach(endpoint),
            Op::AddMapped { domain, pasid } => self.add_mapped(domain, pasid),
            Op::AddOwned { domain, pasid, format } => self.add_owned(domain, pasid, format),
            Op::Map { context, at, pages, write } => {
                if let Some(context) = pick(self.contexts.len(), context) {
                    self.map(context, at, pages, write);
                }
            }
            Op::Unmap { context, at, pages } => self.unmap(context, at, pages),
            Op::UnmapLater { context, at, pages } => self.unmap_later(context, at, pages),
            Op::Invalidate { context } => self.invalidate(context),
            Op::InvalidateAll { domain } => {
                if let Some(at) = pick(self.domains.len(), domain) {
                    trace("    ", &self.domains[at].contexts.invalidate_all());
                }
            }
            Op::Remove { context } => self.remove(context),
            Op::Forget { context } => {
                if let Some(at) = pick(self.contexts.len(), context) {
                    self.contexts[at].handle = Handle::None;
                }
            }
            Op::MapDefault { domain, at, pages } => self.map_default(domain, at, pages),
            Op::UnmapDefault { domain, which } => self.unmap_default(domain, which),
            Op::Ask { endpoint, pasid, at, group, last } => self.ask(endpoint, pasid, at, group, last),
            Op::Answer { context, code } => self.answer(context, code),
            Op::Overdue { faults } => {
                let overdue = self.groups.take_overdue(faults.into());
                self.complete.extend(overdue.filter(|_| self.complete.len() < GROUPS));
            }
            Op::Support { endpoint } => {
                let id = MEMBERS[usize::from(endpoint) % MEMBERS.len()];
                trace("    ", &self.viommu.context_support(id));
            }
            Op::Nest(op) => {
                let fresh = self.fresh();
                self.spaces.run(op, fresh);
            }
            Op::Poll => self.poll(),
            Op::Reclaim => {
                self.viommu.reclaim();
            }
        }
    }

    /// Memory that no other mapping has.
    fn fresh(&mut self) -> u64 {
        self.mappings += 1;
        MEMORY + EACH * self.mappings
    }

    fn create(&mut self, anonymous: u8) {
        if self.domains.len() >= MAX_DOMAINS {
            return;
        }
        let choices = [None, Some(Anonymous::Blocked), Some(Anonymous::Bypasses), Some(Anonymous::Pasid0)];
        let anonymous = choices[usize::from(anonymous) % choices.len()];
        let domain = DomainOptions { mappings: 8, ..DomainOptions::default() };
        let options = ContextsOptions { anonymous, domain, max_contexts: PASIDS as usize };
        if let Ok(contexts) = self.viommu.create_contexts(options) {
            self.domains.push(Domain { contexts, default: Reach::default(), mapped: Vec::new() });
        }
    }

    fn attach(&mut self, endpoint: u8, domain: u8) {
        let at = usize::from(endpoint) % MEMBERS.len();
        let Some(domain) = pick(self.domains.len(), domain) else { return };
        let attached = self.viommu.attach(MEMBERS[at], self.domains[domain].contexts.domain());
        trace("    ", &attached);
        self.places[at] = match attached {
            Ok(()) => Place::In(domain),
            // Sent nothing: it is where it was.
            Err(AttachError::Busy(_)) => self.places[at],
            Err(_) => {
                self.domains[domain].default.unsettle();
                let there = |context: &&mut Context| context.domain == domain;
                self.contexts.iter_mut().filter(there).for_each(|context| context.reach.doom());
                Place::Unsure
            }
        };
        self.bury();
    }

    fn detach(&mut self, endpoint: u8) {
        let at = usize::from(endpoint) % MEMBERS.len();
        let detached = self.viommu.detach(MEMBERS[at]);
        trace("    ", &detached);
        self.places[at] = if detached.is_ok() { Place::Nowhere } else { Place::Unsure };
        self.bury();
    }

    /// Contexts end with the last endpoint of their domain, and are made again with the next one. Where one may be there
    /// still, they may be, too.
    fn bury(&mut self) {
        for context in &mut self.contexts {
            let inside = self.places.contains(&Place::In(context.domain));
            // One that was dropped is nobody's to make again.
            let dropped = matches!(context.handle, Handle::None);
            if !inside && (dropped || self.places.contains(&Place::Unsure)) {
                context.reach.doom();
            }
        }
    }

    /// Nothing is known of who is in a domain.
    fn doubt(&mut self, domain: usize) {
        for place in self.places.iter_mut().filter(|place| **place == Place::In(domain)) {
            *place = Place::Unsure;
        }
        self.domains[domain].default.unsettle();
        self.bury();
    }

    fn has_room(&self) -> bool {
        self.contexts.len() < MAX_CONTEXTS
    }

    fn add_mapped(&mut self, domain: u8, pasid: u8) {
        let pasid = u32::from(pasid) % PASIDS;
        let (Some(domain), true) = (pick(self.domains.len(), domain), self.has_room()) else { return };
        let Some(number) = Pasid::new(pasid) else { return };
        match self.domains[domain].contexts.add_mapped(number) {
            Ok(context) => self.add(domain, pasid, Handle::Mapped(context)),
            Err(error) => {
                trace("    ", &error);
                self.not_added(domain, pasid);
            }
        }
    }

    fn add_owned(&mut self, domain: u8, pasid: u8, format: u8) {
        let pasid = u32::from(pasid) % PASIDS;
        let (Some(domain), true) = (pick(self.domains.len(), domain), self.has_room()) else { return };
        let Some(number) = Pasid::new(pasid) else { return };
        let formats = [
            TableFormat::X86_64,
            TableFormat::Sv39,
            TableFormat::Sv48,
            TableFormat::Arm { granule: ArmGranule::K4, input_bits: 39 },
        ];
        let cached = if format & 0x80 == 0 { NotPresent::NeverCached } else { NotPresent::MayBeCached };
        let options = TableOptions { not_present: cached, output_bits: 48, ..TableOptions::default() };
        let format = formats[usize::from(format) % formats.len()];
        let Ok(table) = PageTable::new(format, self.viommu.clone(), options) else { return };
        match self.domains[domain].contexts.add_owned(number, table, pasid as u16) {
            Ok(context) => self.add(domain, pasid, Handle::Owned(Box::new(context))),
            Err(not_added) => {
                trace("    ", &not_added.error);
                self.not_added(domain, pasid);
                if let Some(table) = not_added.table {
                    // SAFETY: the driver says that the device does not walk it.
                    unsafe { table.free() };
                }
            }
        }
    }

    /// A context that was dropped makes room for the next one of its PASID.
    fn add(&mut self, domain: usize, pasid: u32, handle: Handle) {
        let same = |context: &Context| (context.domain, context.pasid) == (domain, pasid);
        self.contexts.retain(|context| !same(context) || !matches!(context.handle, Handle::None));
        assert!(!self.contexts.iter().any(same), "PASID {pasid} has a context, and was given again");
        self.contexts.push(Context { domain, pasid, reach: Reach::default(), handle });
    }

    /// One that was dropped may be gone although the next one was not added.
    fn not_added(&mut self, domain: usize, pasid: u32) {
        let same = |context: &&mut Context| (context.domain, context.pasid) == (domain, pasid);
        for context in self.contexts.iter_mut().filter(same) {
            if matches!(context.handle, Handle::None) {
                context.reach.doom();
            }
        }
    }

    fn remove(&mut self, context: u8) {
        let Some(at) = pick(self.contexts.len(), context) else { return };
        let Context { domain, pasid, mut reach, handle } = self.contexts.swap_remove(at);
        let left: Option<(Handle, ContextError)> = match handle {
            Handle::Mapped(mapped) => {
                mapped.remove().err().map(|(mapped, error)| (Handle::Mapped(mapped), error))
            }
            Handle::Owned(owned) => {
                owned.remove().err().map(|(owned, error)| (Handle::Owned(Box::new(owned)), error))
            }
            Handle::None => return self.contexts.push(Context { domain, pasid, reach, handle }),
        };
        if let Some((handle, error)) = left {
            trace("    ", &error);
            reach.doom();
            self.contexts.push(Context { domain, pasid, reach, handle });
        }
    }
}
