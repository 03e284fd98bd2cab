//! What a device must have mapped, by the requests that it said it carried out, read a second time.

use std::collections::{BTreeMap, BTreeSet};

use virtio_iommu_model::{AccessKind, Device, VecMemory};

const PAGE: u64 = 4096;
const OK: u8 = 0;
/// The bits of a PASID that endpoints have.
const PASID_BITS: u32 = 20;
const READ: u32 = 1;
const WRITE: u32 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mapping {
    last: u64,
    phys: u64,
    flags: u32,
}

/// Mappings by their first address.
type Mappings = BTreeMap<u64, Mapping>;

#[derive(Debug)]
enum Context {
    Mapped(Mappings),
    /// A table of the guest's, whose walks are not followed here.
    Owned,
}

#[derive(Debug, Default)]
struct Domain {
    flags: u32,
    members: BTreeSet<u32>,
    default: Mappings,
    contexts: BTreeMap<u32, Context>,
    /// Whether the guest has a table of descriptors.
    described: bool,
}

/// The account.
#[derive(Debug)]
pub struct Account {
    domains: BTreeMap<u32, Domain>,
    /// Whether the draft was negotiated. If not, what DETACH has for a PASID is reserved, and ignored.
    draft: bool,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// The length of a request, where it is one of the standard's or of the draft's.
pub fn length(kind: u8, draft: bool) -> Option<usize> {
    match (kind, draft) {
        (1 | 2, _) => Some(20),
        (3, _) => Some(36),
        (4, _) => Some(28),
        (5, _) => Some(72),
        (6, true) => Some(84),
        (7, true) => Some(60),
        (8, true) => Some(28),
        (0x43, true) => Some(40),
        (0x44, true) => Some(32),
        _ => None,
    }
}

impl Account {
    /// Of a device without domains.
    pub fn new(draft: bool) -> Self {
        Self { draft, domains: BTreeMap::new() }
    }

    /// Takes note of a request that is long enough, and of its status.
    ///
    /// # Panics
    /// When the device carried out what it must not.
    pub fn answered(&mut self, bytes: &[u8], status: u8) {
        if status != OK {
            return;
        }
        match bytes[0] {
            1 => self.attach(word(bytes, 4), word(bytes, 8), word(bytes, 12)),
            2 if self.draft && word(bytes, 12) & 1 != 0 => {
                let domain = self.with_member(word(bytes, 4), word(bytes, 8));
                assert!(!domain.described, "a context was taken out of a table of descriptors");
                assert!(domain.contexts.remove(&word(bytes, 16)).is_some(), "no such context was removed");
            }
            2 => self.leave(word(bytes, 8)),
            3 => {
                let (range, phys) = ((long(bytes, 8), long(bytes, 16)), long(bytes, 24));
                map(self.default(word(bytes, 4)), range, phys, word(bytes, 32));
            }
            4 => unmap(self.default(word(bytes, 4)), (long(bytes, 8), long(bytes, 16))),
            6 => self.attach_table(bytes),
            0x43 => {
                let (range, phys) = ((long(bytes, 16), long(bytes, 24)), long(bytes, 32));
                map(self.context(word(bytes, 4), word(bytes, 8)), range, phys, word(bytes, 12));
            }
            0x44 => {
                unmap(self.context(word(bytes, 4), word(bytes, 8)), (long(bytes, 16), long(bytes, 24)));
            }
            _ => {}
        }
    }

    fn attach(&mut self, to: u32, endpoint: u32, flags: u32) {
        let inside = |domain: &Domain| domain.members.contains(&endpoint);
        if self.domains.get(&to).is_some_and(inside) {
            return;
        }
        self.leave(endpoint);
        let domain = self.domains.entry(to).or_insert_with(|| Domain { flags, ..Domain::default() });
        assert_eq!(domain.flags, flags, "a domain is of one kind");
        domain.members.insert(endpoint);
    }

    fn leave(&mut self, endpoint: u32) {
        for domain in self.domains.values_mut() {
            domain.members.remove(&endpoint);
        }
        self.domains.retain(|_, domain| !domain.members.is_empty());
    }

    fn attach_table(&mut self, bytes: &[u8]) {
        let (format, pasid) = (bytes[16], word(bytes, 20));
        let domain = self.with_member(word(bytes, 4), word(bytes, 8));
        assert!(!domain.described && domain.flags & 1 == 0, "{domain:?}");
        if format == 2 {
            assert!(domain.contexts.is_empty() && domain.flags & 6 != 0, "{domain:?}");
            domain.described = true;
            return;
        }
        assert!(pasid >> PASID_BITS == 0, "PASID {pasid:#x}");
        let context = if format == 0 { Context::Mapped(Mappings::new()) } else { Context::Owned };
        assert!(domain.contexts.insert(pasid, context).is_none(), "PASID {pasid:#x} had a context");
    }

    fn with_member(&mut self, domain: u32, endpoint: u32) -> &mut Domain {
        let found = self.domains.get_mut(&domain).expect("the domain has endpoints");
        assert!(found.members.contains(&endpoint), "the endpoint is in the domain");
        found
    }

    fn default(&mut self, domain: u32) -> &mut Mappings {
        let found = self.domains.get_mut(&domain).expect("the domain has endpoints");
        assert_eq!(found.flags, 0, "the domain has a default context");
        &mut found.default
    }

    fn context(&mut self, domain: u32, pasid: u32) -> &mut Mappings {
        let found = self.domains.get_mut(&domain).expect("the domain has endpoints");
        match found.contexts.get_mut(&pasid) {
            Some(Context::Mapped(mappings)) => mappings,
            other => panic!("PASID {pasid} is {other:?}"),
        }
    }

    /// Tries what lies at and around every mapping, for every endpoint.
    ///
    /// # Panics
    /// When the device has something else.
    pub fn check(&self, device: &mut Device, memory: &VecMemory) {
        for domain in self.domains.values() {
            for endpoint in &domain.members {
                if domain.flags == 0 {
                    check(device, memory, (*endpoint, None), &domain.default);
                }
                for (pasid, context) in &domain.contexts {
                    if let Context::Mapped(mappings) = context {
                        check(device, memory, (*endpoint, Some(*pasid)), mappings);
                    }
                }
            }
        }
    }

    /// Whether the endpoint is in a domain with a default context, and where an address there leads.
    pub fn lookup(&self, endpoint: u32, address: u64, kind: AccessKind) -> Option<u64> {
        let inside = |domain: &&Domain| domain.flags == 0 && domain.members.contains(&endpoint);
        lookup(&self.domains.values().find(inside)?.default, address, kind)
    }
}

fn map(mappings: &mut Mappings, (first, last): (u64, u64), phys: u64, flags: u32) {
    assert!(
        first < last && first.is_multiple_of(PAGE) && (last + 1).is_multiple_of(PAGE),
        "{first:x} {last:x}"
    );
    assert!(phys.is_multiple_of(PAGE) && phys.checked_add(last - first).is_some(), "{phys:x}");
    assert!(flags & !7 == 0, "flags {flags:x}");
    let overlaps = mappings.range(..=last).any(|(_, other)| other.last >= first);
    assert!(!overlaps, "{first:x}..={last:x} overlaps");
    mappings.insert(first, Mapping { last, phys, flags });
}

fn unmap(mappings: &mut Mappings, (first, last): (u64, u64)) {
    assert!(first <= last, "{first:x} {last:x}");
    mappings.retain(|start, mapping| {
        let meets = *start <= last && first <= mapping.last;
        assert!(!meets || first <= *start && mapping.last <= last, "{mapping:x?} was split");
        !meets
    });
}

fn lookup(mappings: &Mappings, address: u64, kind: AccessKind) -> Option<u64> {
    let (first, mapping) =
        mappings.range(..=address).next_back().filter(|(_, found)| address <= found.last)?;
    let needed = if kind == AccessKind::Read { READ } else { WRITE };
    (mapping.flags & needed != 0).then(|| mapping.phys + (address - first))
}

fn check(device: &mut Device, memory: &VecMemory, from: (u32, Option<u32>), mappings: &Mappings) {
    let around = |(first, mapping): (&u64, &Mapping)| {
        [Some(*first), first.checked_sub(1), Some(mapping.last), mapping.last.checked_add(1)]
    };
    for address in mappings.iter().flat_map(around).flatten().chain([0]) {
        for kind in [AccessKind::Read, AccessKind::Write] {
            let found = device.translate_context(memory, from, address, kind).ok();
            assert_eq!(found, lookup(mappings, address, kind), "{from:x?} at {address:#x}, {kind:?}");
        }
    }
}
