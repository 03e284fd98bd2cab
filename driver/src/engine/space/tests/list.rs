//! Lists that are made in one go.

use super::*;
use crate::engine::Placement;
use crate::engine::mapping::MappingState;
use crate::engine::mapping::MappingState::{
    Deferred, Live, Mapping, Quarantined, QuarantinedInFlight, Unmapping,
};
use crate::exchange::{Mapped, Run};

fn run(pages: u64) -> Run {
    Run { phys: PhysAddr::new(0x10_0000 * (1 + pages)), len: pages * GRANULE }
}

/// Makes a list of parts of so many pages, and confirms all of it but those that are left out.
fn make(space: &mut Space, parts: &[u64], left_out: &[usize]) -> (IovaRange, Vec<Mapped>) {
    let len = parts.iter().sum::<u64>() * GRANULE;
    let range = space.allocate(len, GRANULE, ANYWHERE, parts.len()).unwrap().unwrap();
    let mut rest = Mapped { range, record: MappingHandle::UNKNOWN };
    let mut made: Vec<Mapped> = Vec::new();
    loop {
        let begun = space.begin_parts(rest, (purpose(), ListId::new(7)), usize::MAX).expect("it was taken");
        let runs = parts[made.len()..].iter().map(|pages| run(*pages));
        let before = made.len();
        let (count, behind) = begun.make(runs, |part, _| made.push(part));
        assert!(count > 0 && made.len() == before + count);
        let Some(behind) = behind else { break };
        space.check();
        rest = behind;
    }
    for (at, part) in made.iter().enumerate().filter(|(at, _)| !left_out.contains(at)) {
        assert!(space.confirm_part(part.record, part.range), "{at}");
    }
    space.check();
    (range, made)
}

/// Makes as many parts of a page as there are slots for, at addresses that were taken. What is left of those.
fn make_some(space: &mut Space, rest: Mapped, slots: usize) -> Option<Mapped> {
    let left = space.order.granules(rest.range) as usize;
    let parts = space.begin_parts(rest, (purpose(), ListId::new(7)), slots).expect("it was taken");
    let mut made = Vec::new();
    let (count, rest) = parts.make((0..left).map(|_| run(1)), |part, _| made.push(part));
    assert_eq!(count, slots.min(left));
    for part in made {
        assert!(space.confirm_part(part.record, part.range));
    }
    space.check();
    rest
}

fn unmap(space: &mut Space, range: IovaRange) {
    let first = space.begin_unmap(range, MappingHandle::UNKNOWN).expect("all live");
    assert!(space.end_unmapped_plain(first, range) || space.end_unmapped_run(first, range));
    space.check();
}

fn states(space: &Space, range: IovaRange) -> Vec<MappingState> {
    space.iter_in(range).map(|record| record.state).collect()
}

fn is_whole(space: &Space, range: IovaRange) -> bool {
    space.find(range.start()).is_some_and(|first| space.whole_list(first, range).is_some())
}

#[test]
fn a_list_is_made_and_unmapped_in_one_step() {
    let mut space = space(pages(1, 1000), 100);
    for parts in [&[1, 2, 1][..], &[1; 2], &[1; 64]] {
        let free = space.free_ranges();
        for _ in 0..3 {
            let (range, made) = make(&mut space, parts, &[]);
            let ranges: Vec<_> = space.iter_in(range).map(|record| (record.range, record.phys)).collect();
            let expected = made.iter().zip(parts).map(|(part, pages)| (part.range, run(*pages).phys));
            assert_eq!(ranges, expected.collect::<Vec<_>>());
            assert!(is_whole(&space, range));
            let room = space.order.room();
            assert!(!space.end_unmapped_run(made[0].record, range), "nobody unmaps it");
            let first = space.begin_unmap(range, MappingHandle::UNKNOWN).expect("all live");
            assert_eq!(states(&space, range), alloc::vec![Unmapping; parts.len()]);
            assert!(space.begin_unmap(range, first).is_none(), "twice");
            assert!(space.end_unmapped_run(first, range));
            assert_eq!(space.order.room(), room + parts.len() - 1);
            assert!(!space.end_unmapped_run(first, range), "twice");
            assert!(space.is_empty());
            space.check();
        }
        assert!(space.magazines.drain(&mut space.order) || space.free_ranges() == free);
        space.check();
    }
}

/// Fails when a list counts as confirmed that does not wait for that, or is another one.
#[test]
fn a_list_is_confirmed_once() {
    let mut space = space(pages(1, 1000), 100);
    let (range, made) = make(&mut space, &[1, 2, 1], &[0, 1, 2]);
    assert_eq!(states(&space, range), [Mapping; 3]);
    let part = IovaRange::new(range.start(), made[1].range.last()).unwrap();
    assert_eq!(
        (space.confirm_list(made[0].record, part), space.confirm_list(made[1].record, range)),
        (None, None)
    );
    assert_eq!(states(&space, range), [Mapping; 3]);
    assert_eq!(space.confirm_list(made[0].record, range), Some(3));
    assert_eq!(states(&space, range), [Live; 3]);
    assert_eq!(space.confirm_list(made[0].record, range), None, "twice");
    space.begin_unmap(range, made[0].record).expect("all live");
    assert_eq!(space.confirm_list(made[0].record, range), None, "it is on its way out");
    assert_eq!(states(&space, range), [Unmapping; 3]);
}

/// Ranges that were given back lately keep their records. Fails when a list begins that has none for its parts.
#[test]
fn a_list_begins_where_there_are_records_for_it() {
    let mut space = space(pages(1, 1000), 2);
    let mut refused = 0;
    for pages in (2..30).rev() {
        let range = live(&mut space, pages);
        unmap(&mut space, range);
        let wanted = (2 * GRANULE, Placement::ANYWHERE);
        match space.begin_list(wanted, (purpose(), ListId::new(1)), (2, 2)) {
            Some(parts) => {
                let whole = parts.whole();
                let (count, rest) = parts.make([run(1), run(1)].into_iter(), |_, _| {});
                assert!(count == 2 && rest.is_none(), "{count}");
                assert_eq!(space.confirm_list(whole.record, whole.range), Some(2));
                unmap(&mut space, whole.range);
            }
            None => refused += 1,
        }
        space.check();
    }
    assert!(refused > 0);
}

/// A list of more parts than may lie behind one record, and one that ends early.
#[test]
fn a_long_list_is_made_in_several_goes() {
    let mut space = space(pages(1, 1000), 300);
    let (range, _) = make(&mut space, &[1; 130], &[]);
    assert!(!is_whole(&space, range));
    let first = space.begin_unmap(range, MappingHandle::UNKNOWN).expect("all live");
    assert!(space.end_unmapped_run(first, range));
    space.check();
    let range = space.allocate(4 * GRANULE, GRANULE, ANYWHERE, 4).unwrap().unwrap();
    let rest = Mapped { range, record: MappingHandle::UNKNOWN };
    let parts = space.begin_parts(rest, (purpose(), ListId::new(1)), 9).expect("taken");
    let mut made = Vec::new();
    let (count, rest) = parts.make([run(1), run(4)].into_iter(), |part, _| made.push(part));
    assert_eq!((count, made.len()), (1, 1), "the other is longer than what is left");
    let made = made[0];
    let rest = rest.expect("three pages");
    assert_eq!(rest.range.start(), Iova::new(made.range.last().get() + 1));
    space.check();
    space.release(rest.range, 3);
    assert!(space.remove(made.range.start()).is_none());
    space.check();
}

/// Fails when a part that waits for its answer, or is something else by now, is unmapped with the list.
#[test]
fn a_list_that_is_not_all_live_is_not_unmapped() {
    let mut space = space(pages(1, 100), 20);
    let (range, _) = make(&mut space, &[1; 5], &[3]);
    assert!(space.begin_unmap(range, MappingHandle::UNKNOWN).is_none());
    assert_eq!(states(&space, range), [Live, Live, Live, Mapping, Live], "as before");
    assert!(space.iter_in(range).all(|record| record.owned || record.state == Mapping));
    space.retain_in(range, None, |_| false);
    let (range, made) = make(&mut space, &[1; 5], &[]);
    let stuck = Quarantined;
    space.change(made[2].record, made[2].range.start(), |record| record.state = stuck);
    assert!(!is_whole(&space, range));
    assert!(space.begin_unmap(range, MappingHandle::UNKNOWN).is_none());
    assert_eq!(states(&space, range), [Live, Live, stuck, Live, Live]);
    space.check();
}

/// Whatever happens to a part by itself, the list is looked at part by part from then on. Fails when any of these does not
/// count.
#[test]
fn a_list_is_not_whole_once_a_part_was_touched() {
    type Touch = fn(&mut Space, &[Mapped]);
    let touches: [Touch; 6] = [
        |space, made| _ = space.change(made[1].record, made[1].range.start(), |_| {}),
        |space, made| _ = space.remove(made[4].range.start()),
        |space, made| space.retain_in(made[0].range, None, |_| true),
        |space, made| space.visit(made[0].record, made[1].range.last(), |_| {}),
        |space, made| {
            // The first one alone, and one in the middle.
            for part in [made[0], made[2]] {
                let record = space.begin_unmap(part.range, part.record).expect("live");
                assert!(
                    space.end_unmapped_plain(record, part.range)
                        || space.end_unmapped_run(record, part.range)
                );
            }
        },
        |space, made| {
            let range = IovaRange::new(made[3].range.start(), made[4].range.last()).unwrap();
            space.begin_unmap(range, MappingHandle::UNKNOWN).expect("both are live");
        },
    ];
    for (at, touch) in touches.iter().enumerate() {
        let mut space = space(pages(1, 100), 20);
        let (range, made) = make(&mut space, &[1; 5], &[]);
        assert!(is_whole(&space, range));
        touch(&mut space, &made);
        assert!(!is_whole(&space, range), "{at}");
        space.check();
        // And is not taken for one that comes later.
        let (other, _) = make(&mut space, &[2, 2], &[]);
        assert!(is_whole(&space, other) && !is_whole(&space, range), "{at}");
    }
}

/// Fails when the answer to a list's UNMAP is believed although something became of a part meanwhile.
#[test]
fn a_part_that_changed_while_its_list_was_unmapped_is_not_freed_with_it() {
    let mut space = space(pages(1, 100), 20);
    let (range, made) = make(&mut space, &[1; 5], &[]);
    let first = space.begin_unmap(range, MappingHandle::UNKNOWN).expect("all live");
    space.change(made[3].record, made[3].range.start(), |record| {
        record.state = QuarantinedInFlight;
    });
    assert!(!space.end_unmapped_run(first, range));
    assert_eq!(space.len(), 5);
    space.check();
}

/// Records of parts that went with their list still say where they were. Fails when they are believed.
#[test]
fn a_part_that_went_with_its_list_is_not_found() {
    let mut space = space(pages(1, 4), 8);
    // At each address once, so that it is known which record was there.
    let singles: Vec<_> = (0..4).map(|_| map(&mut space, GRANULE)).collect();
    for (range, _) in singles.iter().rev() {
        space.remove(range.start());
    }
    let (range, made) = make(&mut space, &[1; 4], &[]);
    let again = |(single, part): (&(IovaRange, MappingHandle), &Mapped)| *single == (part.range, part.record);
    assert!(singles.iter().rev().zip(&made).all(again), "else this shows nothing");
    let first = space.begin_unmap(range, MappingHandle::UNKNOWN).expect("all live");
    assert!(space.end_unmapped_run(first, range));
    for part in &made {
        assert!(space.get(part.range.start()).is_none() && space.handle(part.range.start()).is_none());
        assert!(space.begin_unmap(part.range, part.record).is_none());
        assert!(space.defer(part.record, part.range).is_none());
        assert!(!space.confirm_part(part.record, part.range));
    }
}

/// Single mappings and lists in one run, as a flush has them.
#[test]
fn a_run_is_flushed_as_a_whole_or_not_at_all() {
    let mut space = space(pages(1, 100), 20);
    let (list, made) = make(&mut space, &[1; 3], &[]);
    let (single, handle) = map(&mut space, GRANULE);
    assert!(space.confirm_part(handle, single));
    assert_eq!(single.last().get() + 1, list.start().get(), "else they are no run");
    let defer = |space: &mut Space| {
        [(single, handle), (list, MappingHandle::UNKNOWN)].map(|(range, handle)| {
            let (record, (count, _)) = space.defer(handle, range).expect("live");
            assert_eq!(count, if range == list { 3 } else { 1 });
            Mapped { range, record }
        })
    };
    let run = defer(&mut space);
    assert_eq!(states(&space, IovaRange::WHOLE), [Deferred; 4]);
    assert!(space.iter_from(Iova::new(0)).all(|record| !record.owned));
    assert!(!space.end_flush(&run), "nothing was sent");
    let mut broken = run;
    broken[1].range = single;
    assert!(!space.begin_flush(&broken), "the second is not what it is said to be");
    assert_eq!(states(&space, IovaRange::WHOLE), [Deferred; 4], "nor is the first begun then");
    assert!(space.begin_flush(&run));
    assert!(!space.begin_flush(&run), "twice");
    assert_eq!(states(&space, IovaRange::WHOLE), [Unmapping; 4]);
    // One is not what it was.
    space.change(made[1].record, made[1].range.start(), |record| record.state = Deferred);
    assert!(!space.end_flush(&run));
    assert_eq!(space.len(), 4);
    space.retain_all(|record| {
        (record.state, record.owned) = (Live, true);
        true
    });
    assert!(space.defer(MappingHandle::UNKNOWN, list).is_none(), "it is not known to be whole");
    space.retain_in(list, None, |_| false);
    // All are as they should be.
    let (again, _) = make(&mut space, &[1; 3], &[]);
    assert_eq!(again, list);
    let run = defer(&mut space);
    assert!(space.begin_flush(&run) && space.end_flush(&run));
    assert!(space.is_empty());
    space.check();
}

/// A list that finds fewer slots than it has parts is made in several goes, of records that were those of another list. Fails
/// when what was noted of that is taken for a note of this one, which then ends with as many parts as the other had.
#[test]
fn a_list_of_several_goes_has_no_note() {
    let one_by_one = (2..8).flat_map(|before| (2..8).map(move |parts| (before, parts)));
    let lists = one_by_one.flat_map(|(before, parts)| (1..4).map(move |slots| (before, parts, slots)));
    for ((before, parts, slots), between) in lists.flat_map(|list| (0..4).map(move |between| (list, between)))
    {
        let mut space = space(pages(1, 2000), 100);
        // Addresses that were given back lately: the list's own record is none of the other list's.
        let kept = live(&mut space, parts);
        unmap(&mut space, kept);
        let (range, _) = make(&mut space, &alloc::vec![1; before], &[]);
        unmap(&mut space, range);
        let range = space.allocate(parts * GRANULE, GRANULE, ANYWHERE, parts as usize).unwrap().unwrap();
        let mut rest = Some(Mapped { range, record: MappingHandle::UNKNOWN });
        let (mut others, mut goes) = (Vec::new(), 0);
        while let Some(left) = rest {
            rest = make_some(&mut space, left, if goes == 0 { slots.max(2) } else { slots });
            goes += 1;
            // Meanwhile somebody else maps, for good or for a while, with records that the other list had.
            if between > 0 {
                others.push(live(&mut space, 300 + goes));
            }
            if between == 2 || between == 3 && goes == 2 {
                others.drain(..).for_each(|other| unmap(&mut space, other));
            }
            let whole = is_whole(&space, range);
            assert_eq!(whole, goes == 1 && rest.is_none(), "{before} {parts} {slots} {between}");
        }
        assert_eq!(space.len(), parts as usize + others.len());
        unmap(&mut space, range);
        assert_eq!(space.len(), others.len(), "all of its parts are gone, and no other");
        others.into_iter().for_each(|other| unmap(&mut space, other));
        assert!(space.is_empty());
    }
}

/// A live mapping of so many pages.
fn live(space: &mut Space, pages: u64) -> IovaRange {
    let (range, handle) = map(space, pages * GRANULE);
    assert!(space.confirm_part(handle, range));
    range
}
