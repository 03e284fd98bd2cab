//! What an access through one context may reach, by the driver's word, at a few addresses that are all tried.

use virtio_iommu::{IovaRange, Prot};
use virtio_iommu_model::AccessKind;

const PAGE: u64 = 4096;
/// What a table maps by one block where it can.
pub const BLOCK: u64 = 2 << 20;
/// The blocks whose pages are tried.
const BLOCKS: u64 = 2;
/// The first of their addresses.
const FIRST: u64 = 0x4000_0000;
/// The pages of each.
const PAGES: [u64; 4] = [0, 1, 2, 511];
/// Lengths of ranges, in pages: within a block, over its end, a block, two.
const LENGTHS: [u64; 8] = [1, 2, 3, 510, 511, 512, 513, 1024];

/// The addresses that are tried.
pub const POINTS: usize = (BLOCKS as usize) * PAGES.len();

/// The address of a point.
pub fn point(at: usize) -> u64 {
    FIRST + BLOCK * (at / PAGES.len()) as u64 + PAGE * PAGES[at % PAGES.len()]
}

/// A range that begins at a point: its first address and its length.
pub fn range(at: u8, pages: u8) -> (u64, u64) {
    (point(usize::from(at) % POINTS), PAGE * LENGTHS[usize::from(pages) % LENGTHS.len()])
}

/// What is known of one point.
#[derive(Clone, Debug, Default)]
struct Point {
    /// Where it leads, and what is allowed.
    expected: Option<(u64, Prot)>,
    /// Where it may lead as well.
    also: Vec<u64>,
}

/// What is known of a context.
#[derive(Clone, Debug)]
pub struct Reach {
    points: [Point; POINTS],
    /// Whether what is expected is reached, and not only nothing else.
    sure: bool,
    /// Whether the context may go, or have gone, at any time.
    doomed: bool,
}

impl Default for Reach {
    fn default() -> Self {
        Self { points: Default::default(), sure: true, doomed: false }
    }
}

impl Reach {
    fn inside(&mut self, range: IovaRange) -> impl Iterator<Item = (u64, &mut Point)> {
        let (first, last) = (range.start().get(), range.last().get());
        let all = self.points.iter_mut().enumerate().map(|(at, known)| (point(at), known));
        all.filter(move |(address, _)| (first..=last).contains(address))
    }

    /// A range was mapped.
    pub fn map(&mut self, range: IovaRange, phys: u64, prot: Prot) {
        for (address, point) in self.inside(range) {
            point.expected = Some((phys + (address - range.start().get()), prot));
        }
    }

    /// A range may have been mapped.
    pub fn may_map(&mut self, range: IovaRange, phys: u64) {
        for (address, point) in self.inside(range) {
            point.also.push(phys + (address - range.start().get()));
        }
    }

    /// Nothing in a range is mapped.
    pub fn unmap(&mut self, range: IovaRange) {
        self.inside(range).for_each(|(_, point)| *point = Point::default());
    }

    /// What a range is mapped to may be reached still, or not.
    pub fn doubt(&mut self, range: IovaRange) {
        for (_, point) in self.inside(range) {
            point.also.extend(point.expected.take().map(|(phys, _)| phys));
        }
    }

    /// From now on what is expected need not be reached.
    pub fn unsettle(&mut self) {
        self.sure = false;
    }

    /// From now on the context may be gone.
    pub fn doom(&mut self) {
        self.doomed = true;
    }

    /// All that is expected is reached, and nothing else.
    pub fn settle(&mut self) {
        self.sure = true;
        self.points.iter_mut().for_each(|point| point.also.clear());
    }

    /// Whether an access that leads to `found` is one that may be.
    pub fn allows(&self, at: usize, kind: AccessKind, found: Option<u64>) -> bool {
        let Point { expected, also } = &self.points[at];
        let needed = match kind {
            AccessKind::Read => Prot::READ,
            AccessKind::Write => Prot::WRITE,
        };
        let expected = expected.filter(|(_, prot)| prot.contains(needed)).map(|(phys, _)| phys);
        match found {
            Some(found) => expected == Some(found) || also.contains(&found),
            None => expected.is_none() || !self.sure || self.doomed,
        }
    }
}
