//! Requests with fields that make sense most of the time, and what may be wrong with their bytes.

use arbitrary::Arbitrary;

use super::guest::{TABLE_PAGES, TABLES};
use crate::session::ENDPOINTS;

const PAGE: u64 = 4096;

/// A request. Small numbers stand for domains, endpoints, PASIDs, and pages.
#[derive(Clone, Copy, Debug, Arbitrary)]
#[expect(missing_docs, reason = "each names a request, with its fields")]
pub enum Form {
    Attach { domain: u8, endpoint: u8, flags: u8 },
    Detach { domain: u8, endpoint: u8 },
    DetachPasid { domain: u8, endpoint: u8, pasid: u8 },
    Map { domain: u8, page: u8, pages: u8, target: u8, flags: u8 },
    Unmap { domain: u8, page: u8, pages: u8 },
    Probe { endpoint: u8 },
    AttachTable { domain: u8, endpoint: u8, pasid: u8, format: u8, table: u8 },
    Invalidate { domain: u8, pasid: u8, granularity: u8, flags: u8, page: u8, pages: u8, granule: u8 },
    PageResponse { endpoint: u8, pasid: Option<u8>, group: u8, code: u8 },
    MapContext { domain: u8, pasid: u8, page: u8, pages: u8, target: u8, flags: u8 },
    UnmapContext { domain: u8, pasid: u8, page: u8, pages: u8 },
}

/// What is wrong with it.
#[derive(Clone, Copy, Debug, Arbitrary)]
pub enum Damage {
    /// Nothing.
    None,
    /// One byte differs.
    Byte {
        /// Where.
        at: u8,
        /// By which bits.
        bits: u8,
    },
    /// It ends early.
    Short(u8),
    /// More follows.
    Long(u16),
}

/// The bytes of a request while it is put together.
struct Bytes(Vec<u8>);

impl Bytes {
    fn new(kind: u8, len: usize) -> Self {
        let mut bytes = vec![0; len];
        bytes[0] = kind;
        Self(bytes)
    }

    fn put(mut self, at: usize, field: &[u8]) -> Self {
        self.0[at..at + field.len()].copy_from_slice(field);
        self
    }

    fn word(self, at: usize, value: u32) -> Self {
        self.put(at, &value.to_le_bytes())
    }

    fn long(self, at: usize, value: u64) -> Self {
        self.put(at, &value.to_le_bytes())
    }

    /// First and last address of pages.
    fn range(self, at: usize, page: u8, pages: u8) -> Self {
        let first = PAGE * u64::from(page % 16);
        self.long(at, first).long(at + 8, first + PAGE * (1 + u64::from(pages % 4)) - 1)
    }
}

fn domain(number: u8) -> u32 {
    u32::from(number % 3) + 1
}

fn endpoint(number: u8) -> u32 {
    ENDPOINTS.get(usize::from(number % 5)).map_or(0x77, |endpoint| endpoint.get())
}

fn pasid(number: u8) -> u32 {
    u32::from(number % 4)
}

impl Form {
    /// The readable part.
    pub fn encode(self) -> Vec<u8> {
        let bytes = match self {
            Self::Attach { domain: to, endpoint: who, flags } => {
                Bytes::new(1, 20).word(4, domain(to)).word(8, endpoint(who)).word(12, u32::from(flags % 16))
            }
            Self::Detach { domain: from, endpoint: who } => {
                Bytes::new(2, 20).word(4, domain(from)).word(8, endpoint(who))
            }
            Self::DetachPasid { domain: from, endpoint: who, pasid: number } => {
                let bytes = Bytes::new(2, 20).word(4, domain(from)).word(8, endpoint(who));
                bytes.word(12, 1).word(16, pasid(number))
            }
            Self::Map { domain: to, page, pages, target, flags } => {
                let bytes = Bytes::new(3, 36).word(4, domain(to)).range(8, page, pages);
                bytes.long(24, target_of(target)).word(32, u32::from(flags % 8))
            }
            Self::Unmap { domain: from, page, pages } => {
                Bytes::new(4, 28).word(4, domain(from)).range(8, page, pages)
            }
            Self::Probe { endpoint: who } => Bytes::new(5, 72).word(4, endpoint(who)),
            Self::AttachTable { domain: to, endpoint: who, pasid: number, format, table } => {
                let bytes = Bytes::new(6, 84).word(4, domain(to)).word(8, endpoint(who));
                attach_table(
                    bytes,
                    pasid(number),
                    format % 7,
                    TABLES + PAGE * (u64::from(table) % TABLE_PAGES),
                )
            }
            Self::Invalidate { domain: of, pasid: number, granularity, flags, page, pages, granule } => {
                let granularity = [1u16, 2, 4, u16::from(granularity)][usize::from(granularity % 4)];
                let bytes = Bytes::new(7, 60).put(4, &granularity.to_le_bytes()).put(6, &[1 + flags / 64]);
                let bytes = bytes.put(8, &[flags % 8]).word(12, domain(of)).word(16, pasid(number));
                let bytes = bytes.long(32, PAGE * u64::from(page % 16)).long(40, 1 << (pages % 64));
                bytes.put(48, &[[12, granule][usize::from(granule % 2)]])
            }
            Self::PageResponse { endpoint: who, pasid: number, group, code } => {
                let bytes = Bytes::new(8, 28).word(4, endpoint(who)).word(8, u32::from(number.is_some()));
                bytes.word(12, number.map_or(0, pasid)).put(16, &[group % 8]).put(18, &[code % 4])
            }
            Self::MapContext { domain: to, pasid: number, page, pages, target, flags } => {
                let bytes = Bytes::new(0x43, 40).word(4, domain(to)).word(8, pasid(number));
                bytes.word(12, u32::from(flags % 8)).range(16, page, pages).long(32, target_of(target))
            }
            Self::UnmapContext { domain: from, pasid: number, page, pages } => {
                Bytes::new(0x44, 32).word(4, domain(from)).word(8, pasid(number)).range(16, page, pages)
            }
        };
        bytes.0
    }
}

/// Where a mapping leads: to one of the pages that a guest of the nested run has, or beside them.
fn target_of(target: u8) -> u64 {
    super::nested::GUEST + PAGE * u64::from(target % 12)
}

fn attach_table(bytes: Bytes, pasid: u32, format: u8, table: u64) -> Bytes {
    let bytes = bytes.put(16, &[format]);
    let owned = |bytes: Bytes| bytes.word(12, 1).word(20, pasid);
    match format {
        // T0SZ 25, EPD1, IPS 5.
        1 => owned(bytes).long(24, 25 | 1 << 23 | 5 << 32).long(32, table).long(48, 0x04ff),
        2 => bytes.put(18, &[(pasid % 3) as u8]).word(20, 6).long(24, table),
        3 => owned(bytes).long(24, table),
        4 => owned(bytes).long(24, table).word(40, 48),
        5 => owned(bytes).put(18, &[8 + (pasid % 3) as u8]).long(24, table / PAGE),
        _ => owned(bytes),
    }
}

impl Damage {
    /// Does it.
    pub fn apply(self, bytes: &mut Vec<u8>) {
        match self {
            Self::None => {}
            Self::Byte { at, bits } => {
                let at = usize::from(at) % bytes.len().max(1);
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= bits;
                }
            }
            Self::Short(len) => bytes.truncate(usize::from(len) % (bytes.len() + 1)),
            Self::Long(len) => bytes.resize(bytes.len() + usize::from(len), 0xa5),
        }
    }
}
