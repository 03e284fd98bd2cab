//! From a list of segments to as few runs of granules as possible.

use super::PhysSegment;
use crate::addr::{Iova, IovaRange, PhysAddr};
use crate::error::MapError;
use crate::exchange::Run;
use crate::rounds;

/// The whole granules around a segment.
#[inline(always)]
pub(crate) fn rounded(segment: PhysSegment, granule: u64) -> Result<Run, MapError> {
    let run = Run { phys: segment.phys, len: segment.len as u64 };
    match is_rounded(run, granule) {
        true => Ok(run),
        false => round(run, granule),
    }
}

/// Whether it is whole granules already, at least one.
#[inline(always)]
pub(super) fn is_rounded(run: Run, granule: u64) -> bool {
    let phys = run.phys.get();
    // Neither empty nor beyond 2^64 - 2.
    (phys | run.len) & (granule - 1) == 0 && phys.wrapping_add(run.len) > phys
}

#[inline(never)]
fn round(Run { phys, len }: Run, granule: u64) -> Result<Run, MapError> {
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

/// The runs of a list: segments that touch in physical space share one. Each segment was looked at by [`survey`], which
/// counts the same; one that is none ends the list.
#[derive(Clone)]
pub(super) struct Runs<'a> {
    pub segments: core::slice::Iter<'a, PhysSegment>,
    pub granule: u64,
}

impl Iterator for Runs<'_> {
    type Item = Run;

    #[inline(always)]
    fn next(&mut self) -> Option<Run> {
        let mut run = rounded(*self.segments.next()?, self.granule).ok()?;
        while let Some(next) = self.segments.as_slice().first() {
            // Ends are multiples of the granule, so that only a rounded one touches: most do not, and are not rounded for it.
            let start = next.phys.get() & !(self.granule - 1);
            if start != end(run) {
                break;
            }
            let Ok(next) = rounded(*next, self.granule) else { break };
            run.len = run.len.saturating_add(next.len);
            self.segments.next();
        }
        Some(run)
    }
}

/// Where a run ends. One that ends with the last granule of all touches the first: as a run it wraps, and is refused.
#[inline(always)]
fn end(run: Run) -> u64 {
    run.phys.get().wrapping_add(run.len)
}

/// What a list comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    /// The bytes of IOVA that it takes.
    pub len: u64,
    /// How many [`Runs`] it has.
    pub runs: usize,
}

/// A list of segments that are all as long: whole granules, none of which ends beyond the last address. Most lists of pages
/// are, and there is no more to be looked at.
#[derive(Clone)]
pub(super) struct Pages<'a> {
    segments: core::slice::Iter<'a, PhysSegment>,
    page: u64,
}

impl<'a> Pages<'a> {
    /// `None` where it is another list, or anything is wrong with it, which [`survey`] has the words for.
    #[inline(always)]
    pub(super) fn of(segments: &'a [PhysSegment], granule: u64) -> Option<Self> {
        let page = segments.first()?.len as u64;
        let mut bits = page;
        let alike = rounds::all(segments, |segment| {
            bits |= segment.phys.get();
            segment.len as u64 == page
        });
        // No address is above all of their bits.
        let whole = bits & (granule - 1) == 0 && page >= 2 && bits.checked_add(page).is_some();
        (alike && whole).then(|| Self { segments: segments.iter(), page })
    }

    /// The bytes of IOVA that it takes, and how many runs it has at most.
    #[inline(always)]
    pub(super) fn extent(&self) -> Option<Extent> {
        let runs = self.segments.len();
        Some(Extent { len: self.page.checked_mul(runs as u64)?, runs })
    }
}

/// The runs of the list: pages that touch share one.
impl Iterator for Pages<'_> {
    type Item = Run;

    #[inline(always)]
    fn next(&mut self) -> Option<Run> {
        let phys = self.segments.next()?.phys;
        let mut len = self.page;
        while let Some(next) = self.segments.as_slice().first()
            && next.phys.get() == phys.get().wrapping_add(len)
        {
            len += self.page;
            self.segments.next();
        }
        Some(Run { phys, len })
    }
}

/// All of a list as whole granules, if each segment begins where the one before it ends: so far as its first and its last
/// address go. What it leads to is what the segments name and nothing else; whether one of them is empty, or they go round all
/// addresses, [`place_alike`] says.
#[inline(always)]
pub(super) fn as_touching(segments: &[PhysSegment], granule: u64) -> Option<PhysSegment> {
    let start = segments.first()?.phys.get();
    let mut next = start;
    let touch = rounds::all(segments, |segment| {
        let begins = segment.phys.get() == next;
        next = next.wrapping_add(segment.len as u64);
        begins
    });
    if !touch {
        return None;
    }
    // Neither empty, nor beyond the last address.
    let len = next.checked_sub(start).filter(|len| *len > 0)?;
    let whole = (start | len) & (granule - 1) == 0;
    whole.then_some(PhysSegment { phys: PhysAddr::new(start), len: usize::try_from(len).ok()? })
}

/// Where each segment of a list of so many bytes is, if they are all as long: most lists of pages. False where they are not, or
/// one of them is empty, or they are longer together.
#[inline(always)]
pub(super) fn place_alike((start, len): (Iova, usize), segments: &[PhysSegment], iovas: &mut [Iova]) -> bool {
    let page = segments.first().map_or(0, |first| first.len);
    let (mut next, mut longest) = (start.get(), 0);
    rounds::change_with(iovas, segments, |iova, segment| {
        *iova = Iova::new(next);
        // Behind the last one it may be the end of all addresses.
        next = next.wrapping_add(page as u64);
        longest |= segment.len;
    });
    // None is longer than all of their bits: if together they are as long as if each were, each is.
    longest.checked_mul(segments.len()) == Some(len)
}

/// All of a list as one run of whole granules, if each segment begins where the one before it ends: two that share a granule
/// then share it at the device too. `None` where it is another list, or anything is wrong with it, which [`survey`] has the
/// words for.
#[inline]
pub(super) fn as_one(segments: &[PhysSegment], granule: u64) -> Option<PhysSegment> {
    let (first, others) = segments.split_first()?;
    let start = first.phys.get();
    let mut next = start.wrapping_add(first.len as u64);
    let goes_on = next > start;
    let touch = others.iter().all(|segment| {
        let begins = segment.phys.get() == next;
        let end = next.wrapping_add(segment.len as u64);
        // Neither empty, nor beyond the last address.
        let goes_on = end > next;
        next = end;
        begins && goes_on
    });
    if !(goes_on && touch) {
        return None;
    }
    let mask = granule - 1;
    let start = start & !mask;
    let len = (((next - 1) | mask) - start).checked_add(1)?;
    Some(PhysSegment { phys: PhysAddr::new(start), len: usize::try_from(len).ok()? })
}

/// Where each segment of such a list is, which is mapped at `range`.
#[inline]
pub(super) fn place_one(range: IovaRange, segments: &[PhysSegment], granule: u64, iovas: &mut [Iova]) {
    let offset = segments.first().map_or(0, |first| first.phys.get() & (granule - 1));
    let mut next = range.start().get() + offset;
    for (segment, iova) in segments.iter().zip(iovas) {
        *iova = Iova::new(next);
        // Behind the last one it may be the end of all addresses.
        next = next.wrapping_add(segment.len as u64);
    }
}

/// Looks at each segment once. Where each lies in the addresses of the list goes to `offsets`, which are as many.
pub(super) fn survey(
    segments: &[PhysSegment],
    granule: u64,
    offsets: &mut [Iova],
) -> Result<Extent, MapError> {
    let mut extent = Extent { len: 0, runs: 0 };
    // What most lists are made of, and no more than has to be looked at.
    let (mut bits, mut last) = (0, None);
    for (segment, offset) in segments.iter().zip(&mut *offsets) {
        let (phys, len) = (segment.phys.get(), segment.len as u64);
        let (end, total) = (phys.checked_add(len), extent.len.checked_add(len));
        let (Some(end), Some(total), true) = (end, total, len > 0) else {
            return survey_any(segments, granule, offsets);
        };
        bits |= phys | len;
        extent.runs += usize::from(last != Some(phys));
        last = Some(end);
        *offset = Iova::new(extent.len);
        extent.len = total;
    }
    match bits & (granule - 1) {
        0 => Ok(extent),
        _ => survey_any(segments, granule, offsets),
    }
}

/// The same for segments that are not whole granules.
#[inline(never)]
fn survey_any(segments: &[PhysSegment], granule: u64, offsets: &mut [Iova]) -> Result<Extent, MapError> {
    let mut extent = Extent { len: 0, runs: 0 };
    let mut last = None;
    for (segment, offset) in segments.iter().zip(offsets) {
        let run = rounded(*segment, granule)?;
        extent.runs += usize::from(last != Some(run.phys.get()));
        last = Some(end(run));
        *offset = Iova::new(extent.len + (segment.phys.get() - run.phys.get()));
        let wraps = MapError::PhysicalWraps { phys: run.phys, len: run.len };
        extent.len = extent.len.checked_add(run.len).ok_or(wraps)?;
    }
    Ok(extent)
}

/// Turns offsets into the addresses of `range`, which is as long as [`survey`] said.
pub(super) fn place(range: IovaRange, offsets: &mut [Iova]) {
    for offset in offsets {
        *offset = Iova::new(range.start().get() + offset.get());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    fn runs(segments: &[PhysSegment]) -> Runs<'_> {
        Runs { segments: segments.iter(), granule: 0x1000 }
    }

    fn segment(phys: u64, len: usize) -> PhysSegment {
        PhysSegment { phys: PhysAddr::new(phys), len }
    }

    #[test]
    fn touching_segments_share_a_run() {
        let list = [segment(0x1000, 0x1000), segment(0x2000, 0x800), segment(0x8000, 1), segment(0x9000, 16)];
        let runs: Vec<_> = runs(&list).map(|run| (run.phys.get(), run.len)).collect();
        assert_eq!(runs, [(0x1000, 0x2000), (0x8000, 0x2000)]);
        let mut offsets = [Iova::new(0); 4];
        assert_eq!(survey(&list, 0x1000, &mut offsets), Ok(Extent { len: 0x4000, runs: 2 }));
        assert_eq!(offsets.map(Iova::get), [0, 0x1000, 0x2000, 0x3000]);
    }

    /// Fails when a segment is left out, or its address is not where its bytes are.
    #[test]
    fn a_list_that_touches_is_one_run() {
        for count in 1..20 {
            // The first may begin, and the last may end, within a granule.
            for (head, tail) in [(0, 0), (0x200, 0), (0, 0x30), (0xff0, 0xffe)] {
                let mut list: Vec<_> =
                    (1..=count).map(|page| segment(page as u64 * 0x1000, 0x1000)).collect();
                list[0] = segment(0x1000 + head as u64, 0x1000 - head);
                list[count - 1].len -= tail.min(list[count - 1].len - 1);
                let whole = as_one(&list, 0x1000).unwrap();
                assert_eq!((whole.phys.get(), whole.len), (0x1000, count * 0x1000));
                let range = IovaRange::from_len(Iova::new(0x8_0000), whole.len as u64).unwrap();
                let mut iovas: Vec<_> = (0..count).map(|_| Iova::new(0)).collect();
                place_one(range, &list, 0x1000, &mut iovas);
                for (segment, iova) in list.iter().zip(iovas) {
                    assert_eq!(iova.get() - 0x8_0000, segment.phys.get() - 0x1000);
                }
            }
        }
    }

    /// Every list of up to four segments of these lengths, each of which goes on where the one before it ends, or elsewhere.
    fn lists() -> impl Iterator<Item = Vec<PhysSegment>> {
        let lens = [0, 1, 0x800, 0x1000, 0x3000, usize::MAX / 2 + 1, usize::MAX - 0xfff];
        let kinds = 2 * lens.len();
        (1..=4u32).flat_map(move |count| (0..kinds.pow(count)).map(move |number| (count, number))).map(
            move |(count, mut number)| {
                let mut next = 0x8000u64;
                let mut list = Vec::new();
                for _ in 0..count {
                    let (len, elsewhere) = (lens[number % kinds / 2], number % 2 == 1);
                    number /= kinds;
                    let phys = if elsewhere { next.wrapping_add(0x5000) } else { next };
                    next = phys.wrapping_add(len as u64);
                    list.push(segment(phys, len));
                }
                list
            },
        )
    }

    /// Fails when what is looked at shortly is not what a look at each segment finds.
    #[test]
    fn lists_of_pages_are_what_they_seem() {
        let (mut touching, mut pages) = (0, 0);
        for list in lists() {
            let (mut quick, mut slow) = ([Iova::new(0); 4], [Iova::new(0); 4]);
            let (quick, slow) = (&mut quick[..list.len()], &mut slow[..list.len()]);
            let at = Iova::new(0x10_0000);
            if let Some(one) = as_touching(&list, 0x1000)
                && place_alike((at, one.len), &list, quick)
            {
                assert_eq!(as_one(&list, 0x1000), Some(one), "{list:?}");
                place_one(IovaRange::from_len(at, one.len as u64).unwrap(), &list, 0x1000, slow);
                assert_eq!(quick, slow, "{list:?}");
                touching += 1;
            }
            if let Some(of_pages) = Pages::of(&list, 0x1000)
                && let Some(extent) = of_pages.extent()
            {
                let surveyed = survey(&list, 0x1000, slow).unwrap();
                let all: Vec<_> = of_pages.collect();
                assert_eq!((surveyed.len, surveyed.runs), (extent.len, all.len()), "{list:?}");
                assert!(all.len() <= extent.runs && all.iter().copied().eq(runs(&list)), "{list:?}");
                assert!(place_alike((at, extent.len as usize), &list, quick), "{list:?}");
                place(IovaRange::from_len(at, extent.len).unwrap(), slow);
                assert_eq!(quick, slow, "{list:?}");
                pages += 1;
            }
        }
        assert!(touching >= 8 && pages >= 30, "{touching} {pages}");
    }

    /// Fails when any segment passes that is empty, lies elsewhere, or ends where addresses do.
    #[test]
    fn any_other_list_is_not() {
        let good: Vec<_> = (0..20).map(|index| segment(index as u64 * 0x1000, 0x1000)).collect();
        assert!(as_one(&good, 0x1000).is_some() && as_one(&[], 0x1000).is_none());
        for index in 0..good.len() {
            for change in [
                |segment: &mut PhysSegment| segment.len = 0,
                |segment: &mut PhysSegment| segment.len += 1,
                |segment: &mut PhysSegment| segment.len = usize::MAX,
                |segment: &mut PhysSegment| segment.phys = PhysAddr::new(segment.phys.get() + 0x1000),
            ] {
                let mut bad = good.clone();
                change(&mut bad[index]);
                let alone = index + 1 == bad.len() && bad[index].len == 0x1001;
                assert_eq!(as_one(&bad, 0x1000).is_some(), alone, "the last one may be of any length");
            }
        }
        // The first would be as well as any.
        let top = segment(u64::MAX - 0xfff, 0x1000);
        assert_eq!((as_one(&[top], 0x1000), as_one(&[top, segment(0, 0x1000)], 0x1000)), (None, None));
        let halves = [segment(0x1000, 0x800), segment(0x1800, 0x800)];
        let whole = segment(0x1000, 0x1000);
        assert_eq!(as_one(&halves, 0x1000), Some(whole), "two in one granule, which are mapped together");
        // Half of all addresses, twice, and then what looks like a list again.
        let half = usize::MAX / 2 + 1;
        assert_eq!(as_one(&[segment(0, half), segment(half as u64, half), segment(0, 0x1000)], 0x1000), None);
    }

    #[test]
    fn segments_of_one_page_are_mapped_each() {
        let list = [segment(0x1100, 0x10), segment(0x1200, 0x10)];
        let range = IovaRange::from_len(Iova::new(0x10000), 0x2000).unwrap();
        let mut iovas = [Iova::new(0); 2];
        assert_eq!(survey(&list, 0x1000, &mut iovas), Ok(Extent { len: 0x2000, runs: 2 }));
        place(range, &mut iovas);
        assert_eq!(iovas, [Iova::new(0x10100), Iova::new(0x11200)]);
        assert_eq!(runs(&list).count(), 2);
    }

    #[test]
    fn the_end_of_memory_is_an_error() {
        assert!(matches!(rounded(segment(u64::MAX, 2), 0x1000), Err(MapError::PhysicalWraps { .. })));
        assert_eq!(rounded(segment(0, 0), 0x1000), Err(MapError::Empty));
        let top = segment(u64::MAX - 0xfff, 0x1000);
        assert_eq!(rounded(top, 0x1000).map(|run| run.len), Ok(0x1000), "the last granule");
        // What goes on from there at 0 is a run that wraps.
        let list = [top, segment(0, 0x1000)];
        let extent = survey(&list, 0x1000, &mut [Iova::new(0); 2]);
        assert_eq!(extent, Ok(Extent { len: 0x2000, runs: 1 }));
        assert!(runs(&list).all(|run| !run.is_whole(0x1000)));
    }
}
