//! From a list of segments to as few runs of granules as possible.

use super::PhysSegment;
use crate::addr::{IovaRange, PhysAddr};
use crate::error::MapError;
use crate::exchange::Run;

/// The whole granules around a segment.
pub(super) fn rounded(segment: PhysSegment, granule: u64) -> Result<Run, MapError> {
    let (phys, len) = (segment.phys, segment.len as u64);
    if len == 0 {
        return Err(MapError::Empty);
    }
    let wraps = MapError::PhysicalWraps { phys, len };
    let mask = granule - 1;
    let last = phys.checked_add(len - 1).ok_or(wraps)?.get() | mask;
    let start = phys.get() & !mask;
    let len = (last - start).checked_add(1).ok_or(wraps)?;
    Ok(Run { phys: PhysAddr::new(start), len })
}

/// The runs of a list: segments that touch in physical space share one. Each segment was checked by
/// [`rounded`]; one that was not ends the list.
#[derive(Clone)]
pub(super) struct Runs<'a> {
    pub segments: &'a [PhysSegment],
    pub granule: u64,
}

impl Iterator for Runs<'_> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        let (first, mut rest) = self.segments.split_first()?;
        let mut run = rounded(*first, self.granule).ok()?;
        while let Some((segment, after)) = rest.split_first() {
            let Ok(next) = rounded(*segment, self.granule) else { break };
            if run.phys.checked_add(run.len) != Some(next.phys) {
                break;
            }
            run.len += next.len;
            rest = after;
        }
        self.segments = rest;
        Some(run)
    }
}

/// The bytes of IOVA that a list takes.
pub(super) fn total_len(segments: &[PhysSegment], granule: u64) -> Result<u64, MapError> {
    segments.iter().try_fold(0u64, |total, segment| {
        let run = rounded(*segment, granule)?;
        total.checked_add(run.len).ok_or(MapError::PhysicalWraps { phys: run.phys, len: run.len })
    })
}

/// Gives each segment its address in `range`, which is as long as [`total_len`] says.
pub(super) fn place(segments: &[PhysSegment], granule: u64, range: IovaRange, iovas: &mut [crate::Iova]) {
    let mut at = range.start().get();
    for (segment, iova) in segments.iter().zip(iovas) {
        let Ok(run) = rounded(*segment, granule) else { return };
        *iova = crate::Iova::new(at + (segment.phys.get() - run.phys.get()));
        at += run.len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Iova;
    use alloc::vec::Vec;

    fn segment(phys: u64, len: usize) -> PhysSegment {
        PhysSegment { phys: PhysAddr::new(phys), len }
    }

    #[test]
    fn touching_segments_share_a_run() {
        let list = [segment(0x1000, 0x1000), segment(0x2000, 0x800), segment(0x8000, 1), segment(0x9000, 16)];
        let runs: Vec<_> =
            Runs { segments: &list, granule: 0x1000 }.map(|run| (run.phys.get(), run.len)).collect();
        assert_eq!(runs, [(0x1000, 0x2000), (0x8000, 0x2000)]);
        assert_eq!(total_len(&list, 0x1000), Ok(0x4000));
    }

    #[test]
    fn segments_of_one_page_are_mapped_each() {
        let list = [segment(0x1100, 0x10), segment(0x1200, 0x10)];
        let range = IovaRange::from_len(Iova::new(0x10000), 0x2000).unwrap();
        let mut iovas = [Iova::new(0); 2];
        place(&list, 0x1000, range, &mut iovas);
        assert_eq!(iovas, [Iova::new(0x10100), Iova::new(0x11200)]);
        assert_eq!(Runs { segments: &list, granule: 0x1000 }.count(), 2);
    }

    #[test]
    fn the_end_of_memory_is_an_error() {
        assert!(matches!(rounded(segment(u64::MAX, 2), 0x1000), Err(MapError::PhysicalWraps { .. })));
        assert_eq!(rounded(segment(0, 0), 0x1000), Err(MapError::Empty));
    }
}
