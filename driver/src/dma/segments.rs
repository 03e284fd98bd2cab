//! From a list that was mapped to the segments that the endpoint is given.

use super::PhysSegment;
use crate::addr::Iova;

/// A contiguous part of the endpoint's address space, as its descriptors take it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaSegment {
    /// Where it starts for the endpoint.
    pub iova: Iova,
    /// Its length in bytes, not 0.
    pub len: u64,
}

/// The segments of a list, or of one mapping, in order: merged where one ends where the next begins, however they lie
/// in memory, and split so that none is longer or crosses a boundary.
#[derive(Clone, Debug)]
pub struct DmaSegments<'a> {
    list: &'a [PhysSegment],
    iovas: &'a [Iova],
    /// What is merged and not handed out yet.
    rest: Option<DmaSegment>,
    /// Not 0.
    max_segment: u64,
    boundary: Option<u64>,
}

impl<'a> DmaSegments<'a> {
    pub(super) fn new(
        list: &'a [PhysSegment],
        iovas: &'a [Iova],
        max_segment: u64,
        boundary: Option<u64>,
    ) -> Self {
        Self { list, iovas, rest: None, max_segment: max_segment.max(1), boundary }
    }
}

impl DmaSegments<'static> {
    pub(super) fn of_one(iova: Iova, len: u64, max_segment: u64, boundary: Option<u64>) -> Self {
        let rest = (len > 0).then_some(DmaSegment { iova, len });
        Self { rest, ..Self::new(&[], &[], max_segment, boundary) }
    }
}

impl DmaSegments<'_> {
    /// The next of the list, as it was mapped.
    fn peek(&self) -> Option<DmaSegment> {
        let (segment, iova) = (self.list.first()?, self.iovas.first()?);
        Some(DmaSegment { iova: *iova, len: segment.len as u64 })
    }

    fn advance(&mut self) {
        (self.list, self.iovas) = (&self.list[1..], &self.iovas[1..]);
    }
}

impl Iterator for DmaSegments<'_> {
    type Item = DmaSegment;

    fn next(&mut self) -> Option<DmaSegment> {
        let mut merged = match self.rest.take() {
            Some(rest) => rest,
            None => self.peek().inspect(|_| self.advance())?,
        };
        // Bounded by the list: each round takes one off it.
        while let Some(next) =
            self.peek().filter(|next| merged.iova.checked_add(merged.len) == Some(next.iova))
        {
            merged.len = merged.len.saturating_add(next.len);
            self.advance();
        }
        // Multiples of the boundary start at 0, so that the distance to the next is in the low bits.
        let to_boundary = self.boundary.map_or(u64::MAX, |boundary| boundary - merged.iova.get() % boundary);
        let len = merged.len.min(self.max_segment).min(to_boundary);
        if len < merged.len {
            self.rest = merged.iova.checked_add(len).map(|iova| DmaSegment { iova, len: merged.len - len });
        }
        Some(DmaSegment { len, ..merged })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::PhysAddr;
    use alloc::vec::Vec;

    fn list(parts: &[(u64, usize)]) -> (Vec<PhysSegment>, Vec<Iova>) {
        let segment = |(at, len): &(u64, usize)| {
            (PhysSegment { phys: PhysAddr::new(at ^ 0xff_0000), len: *len }, Iova::new(*at))
        };
        parts.iter().map(segment).unzip()
    }

    fn split(parts: &[(u64, usize)], max_segment: u64, boundary: Option<u64>) -> Vec<(u64, u64)> {
        let (segments, iovas) = list(parts);
        let all = DmaSegments::new(&segments, &iovas, max_segment, boundary);
        all.map(|segment| (segment.iova.get(), segment.len)).collect()
    }

    #[test]
    fn what_touches_is_one_segment() {
        let parts = [(0x1800, 0x800), (0x2000, 0x1000), (0x3000, 0x10), (0x5000, 4)];
        assert_eq!(split(&parts, u64::MAX, None), [(0x1800, 0x1810), (0x5000, 4)]);
        assert_eq!(split(&[], u64::MAX, None), []);
    }

    #[test]
    fn segments_end_at_the_longest_and_at_the_boundary() {
        let parts = [(0x1800, 0x800), (0x2000, 0x1000)];
        assert_eq!(
            split(&parts, 0x700, None),
            [(0x1800, 0x700), (0x1f00, 0x700), (0x2600, 0x700), (0x2d00, 0x300)]
        );
        assert_eq!(split(&parts, u64::MAX, Some(0x1000)), [(0x1800, 0x800), (0x2000, 0x1000)]);
        assert_eq!(split(&parts, 0x900, Some(0x1000)), [(0x1800, 0x800), (0x2000, 0x900), (0x2900, 0x700)]);
    }

    #[test]
    fn the_top_of_the_address_space_is_the_end() {
        let top = u64::MAX - 0xfff;
        assert_eq!(split(&[(top, 0x1000)], 0x800, Some(1 << 32)), [(top, 0x800), (top + 0x800, 0x800)]);
        let one = DmaSegments::of_one(Iova::new(0xff), 2, u64::MAX, Some(0x100));
        assert_eq!(one.map(|segment| segment.len).collect::<Vec<_>>(), [1, 1]);
    }
}
