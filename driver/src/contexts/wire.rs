//! Formats of the draft's requests and of what fault records have behind the standard's (PROTOCOL 5.8, the X-set).
//!
//! ```text
//!   byte            0     4           8            12      16           18     20      24 ...
//!   ATTACH_TABLE    6     domain      endpoint     flags   format le16  body   pasid   body up to 84
//!   DETACH          2     domain      endpoint     flags   pasid
//!   PAGE_RESP       8     endpoint    flags        pasid   group le16   code   reserved up to 28
//!   MAP_CONTEXT     0x43  domain      pasid        flags   virt_start          24 virt_end   32 phys_start
//!   UNMAP_CONTEXT   0x44  domain      pasid        resvd   virt_start          24 virt_end
//!   INVALIDATE      7     gran, type  flags le16   domain  pasid               24 archid     32 start  40 pages  48 granule
//! ```

use super::pages::PageAnswer;
use super::pasid::{PageGroupId, Pasid};
use super::table::{ArmRegisters, ContextTable, PageTable, TableFormat, TableMemory};
use crate::addr::{IovaRange, PhysAddr};
use crate::id::{DomainId, EndpointId};
use crate::prot::Prot;
use crate::wire::fault::{Fault, RECORD_LEN};

const TYPE_DETACH: u8 = 2;
const TYPE_ATTACH_TABLE: u8 = 6;
const TYPE_INVALIDATE: u8 = 7;
const TYPE_PAGE_RESP: u8 = 8;
const TYPE_MAP_CONTEXT: u8 = 0x43;
const TYPE_UNMAP_CONTEXT: u8 = 0x44;

const FORMAT_MAPPED: u16 = 0;
const FORMAT_ARM: u16 = 1;
const FORMAT_SMMU_V3: u16 = 2;
const FORMAT_VTD: u16 = 4;
const FORMAT_RISCV: u16 = 5;

/// The flag of ATTACH_TABLE, DETACH and PAGE_RESP that says that the PASID counts.
const PASID_VALID: u32 = 1;

const GRANULARITY_DOMAIN: u16 = 1;
const GRANULARITY_PASID: u16 = 2;
const GRANULARITY_ADDRESS: u16 = 4;
const CACHES_IOTLB: u16 = 1;
/// What endpoints cache of translations themselves (ATS).
const CACHES_ENDPOINT: u16 = 2;
const CACHES_PASID: u16 = 4;
const INVALIDATE_PASID: u16 = 1;
const INVALIDATE_LEAF: u16 = 4;

/// Words that the longest of the requests fits in.
const WORDS: usize = 11;

/// The device-readable part of a request, in words of the device's byte order. The device reads `len` of their bytes.
pub(crate) struct Encoded {
    pub words: [u64; WORDS],
    pub len: usize,
}

/// A request of the draft.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ContextRequest {
    /// Without a PASID it is a table of context descriptors.
    AttachTable {
        endpoint: EndpointId,
        pasid: Option<Pasid>,
        table: TableDescription,
    },
    DetachPasid {
        endpoint: EndpointId,
        pasid: Pasid,
    },
    Map {
        pasid: Pasid,
        range: IovaRange,
        phys: PhysAddr,
        prot: Prot,
    },
    Unmap {
        pasid: Pasid,
        range: IovaRange,
    },
    Invalidate(Invalidate),
    PageResponse {
        group: PageGroupId,
        answer: PageAnswer,
    },
}

/// What is to be forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Invalidate {
    /// Everything of the domain.
    Domain,
    /// All translations of a context.
    Context { pasid: Pasid, leaf_only: bool },
    /// A PASID's descriptor, and all translations that came by it.
    Descriptor { pasid: Pasid },
    /// Translations of `pages` pages of 2^`granule` bytes.
    Pages { pasid: Pasid, start: u64, pages: u64, granule: u8, leaf_only: bool },
}

/// What ATTACH_TABLE says of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TableDescription {
    Mapped,
    Arm { asid: u16, registers: ArmRegisters },
    Vtd { root: PhysAddr },
    Riscv { mode: u8, root: PhysAddr },
    Descriptors { s1fmt: u8, s1dss: u8, s1cdmax: u32, root: PhysAddr },
}

impl TableDescription {
    pub(super) fn of<M: TableMemory>(table: &PageTable<M>, asid: u16) -> Self {
        let root = table.root();
        match (table.format(), table.arm_registers()) {
            (_, Some(registers)) => Self::Arm { asid, registers },
            (TableFormat::Sv39, _) => Self::Riscv { mode: 8, root },
            (TableFormat::Sv48, _) => Self::Riscv { mode: 9, root },
            _ => Self::Vtd { root },
        }
    }

    pub(super) fn of_descriptors<M: TableMemory>(table: &ContextTable<M>, s1dss: u8) -> Self {
        let (s1fmt, s1cdmax) = (table.arrangement().s1fmt(), table.pasid_bits());
        Self::Descriptors { s1fmt, s1dss, s1cdmax, root: table.root() }
    }
}

/// Bytes of a request that are filled in by offset.
struct Bytes([u8; 8 * WORDS]);

impl Bytes {
    fn new(kind: u8) -> Self {
        let mut bytes = [0; 8 * WORDS];
        bytes[0] = kind;
        Self(bytes)
    }

    fn put<const N: usize>(mut self, at: usize, field: [u8; N]) -> Self {
        self.0[at..at + N].copy_from_slice(&field);
        self
    }

    fn half(self, at: usize, value: u16) -> Self {
        self.put(at, value.to_le_bytes())
    }

    fn word(self, at: usize, value: u32) -> Self {
        self.put(at, value.to_le_bytes())
    }

    fn long(self, at: usize, value: u64) -> Self {
        self.put(at, value.to_le_bytes())
    }

    fn range(self, at: usize, range: IovaRange) -> Self {
        self.long(at, range.start().get()).long(at + 8, range.last().get())
    }

    fn of_len(self, len: usize) -> Encoded {
        let mut words = [0; WORDS];
        for (word, bytes) in words.iter_mut().zip(self.0.as_chunks::<8>().0) {
            *word = u64::from_ne_bytes(*bytes);
        }
        Encoded { words, len }
    }
}

impl ContextRequest {
    /// What the device reads. Requests that name no domain ignore it.
    pub(super) fn encode(&self, domain: DomainId) -> Encoded {
        let domain = domain.get();
        match *self {
            Self::AttachTable { endpoint, pasid, table } => {
                let bytes = Bytes::new(TYPE_ATTACH_TABLE).word(4, domain).word(8, endpoint.get());
                let bytes = match pasid {
                    Some(pasid) => bytes.word(12, PASID_VALID).word(20, pasid.get()),
                    None => bytes,
                };
                table.put(bytes).of_len(84)
            }
            Self::DetachPasid { endpoint, pasid } => Bytes::new(TYPE_DETACH)
                .word(4, domain)
                .word(8, endpoint.get())
                .word(12, PASID_VALID)
                .word(16, pasid.get())
                .of_len(20),
            Self::Map { pasid, range, phys, prot } => Bytes::new(TYPE_MAP_CONTEXT)
                .word(4, domain)
                .word(8, pasid.get())
                .word(12, prot.bits())
                .range(16, range)
                .long(32, phys.get())
                .of_len(40),
            Self::Unmap { pasid, range } => Bytes::new(TYPE_UNMAP_CONTEXT)
                .word(4, domain)
                .word(8, pasid.get())
                .range(16, range)
                .of_len(32),
            Self::Invalidate(what) => what.put(Bytes::new(TYPE_INVALIDATE).word(12, domain)).of_len(60),
            Self::PageResponse { group, answer } => {
                let flags = if group.pasid.is_some() { PASID_VALID } else { 0 };
                Bytes::new(TYPE_PAGE_RESP)
                    .word(4, group.endpoint.get())
                    .word(8, flags)
                    .word(12, group.pasid.map_or(0, Pasid::get))
                    .half(16, group.group)
                    .half(18, answer.code())
                    .of_len(28)
            }
        }
    }
}

impl TableDescription {
    fn put(self, bytes: Bytes) -> Bytes {
        match self {
            Self::Mapped => bytes.half(16, FORMAT_MAPPED),
            Self::Arm { asid, registers } => bytes
                .half(16, FORMAT_ARM)
                .half(18, asid)
                .long(24, registers.tcr)
                .long(32, registers.ttbr0)
                .long(48, registers.mair),
            // The address width of tables with four levels.
            Self::Vtd { root } => bytes.half(16, FORMAT_VTD).long(24, root.get()).word(40, 48),
            Self::Riscv { mode, root } => {
                bytes.half(16, FORMAT_RISCV).put(18, [mode]).long(24, root.get() >> 12)
            }
            Self::Descriptors { s1fmt, s1dss, s1cdmax, root } => {
                bytes.half(16, FORMAT_SMMU_V3).put(18, [s1fmt, s1dss]).word(20, s1cdmax).long(24, root.get())
            }
        }
    }
}

impl Invalidate {
    fn put(self, bytes: Bytes) -> Bytes {
        let translations = CACHES_IOTLB | CACHES_ENDPOINT;
        let leaf = |leaf_only| if leaf_only { INVALIDATE_LEAF } else { 0 };
        match self {
            Self::Domain => bytes.half(4, GRANULARITY_DOMAIN).half(6, translations | CACHES_PASID),
            Self::Context { pasid, leaf_only } => bytes
                .half(4, GRANULARITY_PASID)
                .half(6, translations)
                .half(8, INVALIDATE_PASID | leaf(leaf_only))
                .word(16, pasid.get()),
            Self::Descriptor { pasid } => bytes
                .half(4, GRANULARITY_PASID)
                .half(6, translations | CACHES_PASID)
                .half(8, INVALIDATE_PASID)
                .word(16, pasid.get()),
            Self::Pages { pasid, start, pages, granule, leaf_only } => bytes
                .half(4, GRANULARITY_ADDRESS)
                .half(6, translations)
                .half(8, INVALIDATE_PASID | leaf(leaf_only))
                .word(16, pasid.get())
                .long(32, start)
                .long(40, pages)
                .put(48, [granule]),
        }
    }
}

const FLAG_LAST: u32 = 1 << 4;
const FLAG_PAGE_REQUEST: u32 = 1 << 5;
const FLAG_PASID: u32 = 1 << 9;
const FLAG_GROUP: u32 = 1 << 10;

impl Fault {
    /// Adds what a record of the draft says of contexts. A PASID that none can be, and a page request without a group,
    /// which could not be answered, are ignored.
    pub(crate) fn with_context(mut self, record: &[u8; RECORD_LEN], rest: Option<&[u8; 24]>) -> Self {
        let Some(rest) = rest else { return self };
        let word =
            |at: usize| u32::from_le_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]]);
        let flags = word(4);
        let says = |flag| flags & flag != 0;
        self.pasid = says(FLAG_PASID).then(|| Pasid::new(word(12))).flatten();
        let unnamed = says(FLAG_PASID) && self.pasid.is_none();
        if says(FLAG_PAGE_REQUEST) && says(FLAG_GROUP) && !unnamed {
            self.page_request = Some(PageGroupId {
                endpoint: self.endpoint,
                pasid: self.pasid,
                group: u16::from_le_bytes([rest[0], rest[1]]),
                last: says(FLAG_LAST),
            });
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Iova;
    use alloc::vec::Vec;

    const DOMAIN: DomainId = DomainId::new(0x0403_0201);
    const ENDPOINT: EndpointId = EndpointId::new(0x0807_0605);

    fn pasid() -> Pasid {
        Pasid::new(0xc_0b0a).unwrap()
    }

    fn bytes(request: ContextRequest) -> Vec<u8> {
        let Encoded { words, len } = request.encode(DOMAIN);
        let all: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert!(all[len..].iter().all(|byte| *byte == 0));
        all[..len].to_vec()
    }

    /// The bytes that are not zero, with their places: vectors from PROTOCOL 5.8's offsets.
    fn set(request: ContextRequest) -> (usize, Vec<(usize, u8)>) {
        let bytes = bytes(request);
        (bytes.len(), bytes.iter().copied().enumerate().filter(|(_, byte)| *byte != 0).collect())
    }

    #[test]
    fn attach_table_of_each_format() {
        let with =
            |table| set(ContextRequest::AttachTable { endpoint: ENDPOINT, pasid: Some(pasid()), table });
        let head = [(0, 6), (4, 1), (5, 2), (6, 3), (7, 4), (8, 5), (9, 6), (10, 7), (11, 8), (12, 1)];
        let number = [(20, 0x0a), (21, 0x0b), (22, 0x0c)];
        let expect = |format: &[(usize, u8)], body: &[(usize, u8)]| {
            let mut all = [&head, format, &number, body].concat();
            all.sort_unstable();
            (84, all)
        };
        assert_eq!(with(TableDescription::Mapped), expect(&[], &[]));
        let vtd = TableDescription::Vtd { root: PhysAddr::new(0x12_3000) };
        assert_eq!(with(vtd), expect(&[(16, 4)], &[(25, 0x30), (26, 0x12), (40, 48)]));
        let riscv = TableDescription::Riscv { mode: 9, root: PhysAddr::new(0x12_3000) };
        assert_eq!(with(riscv), expect(&[(16, 5), (18, 9)], &[(24, 0x23), (25, 1)]));
        let registers = ArmRegisters { tcr: 0x11, ttbr0: 0x2200, mair: 0x04ff };
        let arm = TableDescription::Arm { asid: 0x77, registers };
        assert_eq!(with(arm), expect(&[(16, 1), (18, 0x77)], &[(24, 0x11), (33, 0x22), (48, 0xff), (49, 4)]));
        let root = PhysAddr::new(0x12_3000);
        let table = TableDescription::Descriptors { s1fmt: 2, s1dss: 1, s1cdmax: 12, root };
        let descriptors = set(ContextRequest::AttachTable { endpoint: ENDPOINT, pasid: None, table });
        // As the others up to the flags, which say that there is no PASID.
        let rest = [(16, 2), (18, 2), (19, 1), (20, 12), (25, 0x30), (26, 0x12)];
        assert_eq!(descriptors, (84, [&head[..9], &rest[..]].concat()));
    }

    #[test]
    fn detach_map_and_unmap() {
        let detach = bytes(ContextRequest::DetachPasid { endpoint: ENDPOINT, pasid: pasid() });
        assert_eq!(detach, [2, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 1, 0, 0, 0, 0x0a, 0x0b, 0x0c, 0]);
        let range = IovaRange::new(Iova::new(0x10), Iova::new(0x2f)).unwrap();
        let (phys, prot) = (PhysAddr::new(0x4000), Prot::READ | Prot::WRITE);
        let map = set(ContextRequest::Map { pasid: pasid(), range, phys, prot });
        let head = |kind| [(0, kind), (4, 1), (5, 2), (6, 3), (7, 4), (8, 0x0a), (9, 0x0b), (10, 0x0c)];
        assert_eq!(map, (40, [&head(0x43)[..], &[(12, 3), (16, 0x10), (24, 0x2f), (33, 0x40)]].concat()));
        let unmap = set(ContextRequest::Unmap { pasid: pasid(), range });
        assert_eq!(unmap, (32, [&head(0x44)[..], &[(16, 0x10), (24, 0x2f)]].concat()));
    }

    #[test]
    fn invalidate_of_each_granularity() {
        let with = |what| set(ContextRequest::Invalidate(what));
        let head = |granularity, caches| vec_of(&[(0, 7), (4, granularity), (6, caches)]);
        let domain = vec_of(&[(12, 1), (13, 2), (14, 3), (15, 4)]);
        let number = vec_of(&[(16, 0x0a), (17, 0x0b), (18, 0x0c)]);
        let expect = |parts: &[Vec<(usize, u8)>]| {
            let mut all = parts.concat();
            all.sort_unstable();
            (60, all)
        };
        assert_eq!(with(Invalidate::Domain), expect(&[head(1, 7), domain.clone()]));
        let context = Invalidate::Context { pasid: pasid(), leaf_only: true };
        let flags = |value| vec_of(&[(8, value)]);
        assert_eq!(with(context), expect(&[head(2, 3), flags(5), domain.clone(), number.clone()]));
        let descriptor = Invalidate::Descriptor { pasid: pasid() };
        assert_eq!(with(descriptor), expect(&[head(2, 7), flags(1), domain.clone(), number.clone()]));
        let pages =
            Invalidate::Pages { pasid: pasid(), start: 0x20_0000, pages: 2, granule: 21, leaf_only: false };
        let rest = vec_of(&[(34, 0x20), (40, 2), (48, 21)]);
        assert_eq!(with(pages), expect(&[head(4, 3), flags(1), domain, number, rest]));
    }

    fn vec_of(fields: &[(usize, u8)]) -> Vec<(usize, u8)> {
        fields.to_vec()
    }

    #[test]
    fn page_responses() {
        let group = PageGroupId { endpoint: ENDPOINT, pasid: Some(pasid()), group: 0x1234, last: true };
        let request = ContextRequest::PageResponse { group, answer: PageAnswer::Failure };
        let endpoint = [(0, 8), (4, 5), (5, 6), (6, 7), (7, 8)];
        let number = [(8, 1), (12, 0x0a), (13, 0x0b), (14, 0x0c)];
        let rest = [(16, 0x34), (17, 0x12), (18, 2)];
        assert_eq!(set(request), (28, [&endpoint[..], &number, &rest].concat()));
        let group = PageGroupId { pasid: None, ..group };
        let request = ContextRequest::PageResponse { group, answer: PageAnswer::Failure };
        assert_eq!(set(request), (28, [&endpoint[..], &rest].concat()));
    }

    #[test]
    fn records_of_the_draft_decode_and_nonsense_is_ignored() {
        let mut record = [0; 24];
        record[..16].copy_from_slice(&[2, 0, 0, 0, 0x32, 7, 0, 0, 8, 0, 0, 0, 5, 0, 0, 0]);
        let mut rest = [0; 24];
        rest[..2].copy_from_slice(&[3, 1]);
        let decode = |record: &[u8; 24], rest| Fault::decode(record).unwrap().with_context(record, rest);
        let fault = decode(&record, Some(&rest));
        assert_eq!(fault.pasid, Pasid::new(5));
        let group = fault.page_request.unwrap();
        assert_eq!(
            (group.endpoint.get(), group.pasid, group.group, group.last),
            (8, Pasid::new(5), 0x103, true)
        );
        // A record of the standard's length says nothing of contexts, whatever its flags and reserved bytes.
        let short = decode(&record, None);
        assert_eq!((short.pasid, short.page_request), (None, None));
        record[15] = 1;
        let beyond = decode(&record, Some(&rest));
        assert_eq!((beyond.pasid, beyond.page_request), (None, None));
        record[5] = 3;
        assert_eq!(decode(&record, Some(&rest)).page_request, None);
    }
}
