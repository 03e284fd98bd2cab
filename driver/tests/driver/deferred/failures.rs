//! Devices that refuse, forget, or are late with the UNMAP of a flush.

use std::sync::{Arc, Mutex};

use super::*;
use virtio_iommu::RequestError;
use virtio_iommu_model::{Execute, Inject, Release};

/// Fails when a flush takes a failure for a success, forgets it, or gives back what is in doubt.
#[test]
fn what_is_not_confirmed_stays_and_every_flush_says_so() {
    let answers = [
        Inject::Refuse(4),
        Inject::Unwritten,
        Inject::UsedLen(0),
        Inject::Status(0x99),
        Inject::Hold(Execute::Now),
        Inject::Hold(Execute::AtRelease),
    ];
    for answer in answers {
        for hit in 0..3 {
            let opened = opened(LOOSE);
            // Three requests, with what stays between them.
            let mut kept = Vec::new();
            let pages: Vec<_> = (0..3)
                .map(|_| {
                    kept.push(opened.adopt().0);
                    let (mapping, phys) = opened.adopt();
                    let at = mapping.iova();
                    defer(&opened, mapping);
                    (at, phys)
                })
                .collect();
            opened.machine.device().inject.pass(hit);
            opened.machine.inject([answer]);
            let before = opened.viommu.stats().requests;
            let error = opened.endpoint.flush();
            let requests = opened.viommu.stats().requests - before;
            assert_eq!(requests, 3, "{answer:?}: a failure does not stop the others");
            let Err(UnmapError::Request { range, .. }) = error else { panic!("{answer:?}: {error:?}") };
            // In the order of their addresses: from the last that was mapped on.
            for (index, (at, phys)) in pages.iter().rev().enumerate() {
                assert_eq!(opened.machine.is_lent_back(*phys), index != hit, "{answer:?} at {hit}");
                assert_eq!(range.start() == *at, index == hit);
            }
            let (at, phys) = pages[2 - hit];
            assert_eq!(opened.viommu.stats().quarantined_mappings, 1);
            // SAFETY: refused before anything is sent.
            let reused = unsafe { opened.domain.map_at(at, phys, PAGE, RW) };
            assert!(matches!(reused, Err(MapError::InUse(_))), "I2");
            // Nothing waits any more, and whoever asks later is told all the same.
            for _ in 0..2 {
                let (again, requests, _) = opened.machine.traffic(|| opened.domain.flush());
                assert!(again.is_err() && requests == 0, "{answer:?}");
            }
            assert!(kept.iter().all(|mapping| opened.reaches(mapping.iova())));

            opened.machine.release(Release::All);
            opened.viommu.poll();
            opened.viommu.reclaim();
            assert_eq!(opened.endpoint.flush(), Ok(()), "{answer:?}: it is over");
            assert!(opened.machine.is_lent_back(phys) && !opened.reaches(at));
            assert_eq!(opened.domain.mapping_count(), 3);
        }
    }
}

/// Fails when a RANGE for several is not followed by each by itself, or its failures are forgotten.
#[test]
fn after_range_each_mapping_goes_by_itself() {
    for second in [None, Some(Inject::Refuse(4)), Some(Inject::Hold(Execute::AtRelease))] {
        let opened = opened(LOOSE);
        let pages: Vec<_> = (0..4)
            .map(|_| {
                let (mapping, phys) = opened.adopt();
                defer(&opened, mapping);
                phys
            })
            .collect();
        opened.machine.inject([Inject::Refuse(5)].into_iter().chain(second));
        let before = opened.viommu.stats().requests;
        let flushed = opened.endpoint.flush();
        assert_eq!(opened.viommu.stats().requests - before, 5, "{second:?}");
        let back = pages.iter().filter(|phys| opened.machine.is_lent_back(**phys)).count();
        let failed = usize::from(second.is_some());
        assert_eq!((flushed.is_err(), back), (second.is_some(), 4 - failed), "{second:?}");
        assert_eq!(opened.viommu.stats().quarantined_mappings, failed);
        opened.machine.release(Release::All);
        opened.viommu.poll();
        opened.viommu.reclaim();
        assert_eq!((opened.endpoint.flush(), opened.domain.mapping_count()), (Ok(()), 0));
    }
}

/// The unlucky one whose unmapping reached the bound is not blamed for others, and nobody's memory is lost or given away.
#[test]
fn a_flush_by_a_bound_that_fails_is_found_out_by_a_flush() {
    let opened = opened(DeferredBounds { mappings: 2, ..LOOSE });
    let (first, first_phys) = opened.adopt();
    let (second, second_phys) = opened.adopt();
    defer(&opened, first);
    opened.machine.inject([Inject::Refuse(4)]);
    assert_eq!(opened.endpoint.unmap(second), Ok(Unmapped::AtFlush));
    assert!(![first_phys, second_phys].iter().any(|phys| opened.machine.is_lent_back(*phys)));
    let inval = RequestError::Refused(virtio_iommu::Status::Inval);
    let flushed = opened.endpoint.flush();
    assert!(matches!(flushed, Err(UnmapError::Request { error, .. }) if error == inval), "{flushed:?}");
    assert_eq!(opened.viommu.reclaim(), 2);
    assert_eq!(opened.endpoint.flush(), Ok(()));
    assert!([first_phys, second_phys].iter().all(|phys| opened.machine.is_lent_back(*phys)));
}

/// Fails when a list that is rolled back takes what is deferred, or live, beside it, or leaves anything of its own.
#[test]
fn a_list_that_is_rolled_back_leaves_its_neighbours_alone() {
    const COUNT: u64 = 5;
    for position in 0..COUNT as usize {
        let opened = opened(LOOSE);
        let (live, live_phys) = opened.adopt();
        let (waiting, waiting_phys) = opened.adopt();
        let waits_at = waiting.iova();
        defer(&opened, waiting);
        let segments = apart(opened.machine.memory(2 * COUNT * PAGE).phys, COUNT);
        let mut iovas = [Iova::new(0); COUNT as usize];
        let before = opened.mapped_on_device();
        opened.machine.device().inject.pass(position);
        opened.machine.inject([Inject::Refuse(8)]);
        // SAFETY: nobody but the test uses the memory.
        let failed = unsafe { opened.endpoint.map_scatter(&segments, Direction::Both, &mut iovas) };
        let Err(virtio_iommu::DmaError::Map(MapError::Request { range, .. })) = failed else {
            panic!("{failed:?}")
        };
        // Right below what waits, from the bottom up.
        assert_eq!(range.start().get(), waits_at.get() - (COUNT - position as u64) * PAGE);
        assert_eq!((opened.mapped_on_device(), opened.domain.mapping_count()), (before, 2));
        assert!(opened.reaches(live.iova()) && opened.reaches(waits_at));
        assert!(![live_phys, waiting_phys].iter().any(|phys| opened.machine.is_lent_back(*phys)));
        assert_eq!(opened.viommu.stats().quarantined_mappings, 0);
        // Its addresses are free, all of them.
        // SAFETY: as above.
        let list = unsafe { opened.endpoint.map_scatter(&segments, Direction::Both, &mut iovas) }.unwrap();
        assert!(list.iova().get() < waits_at.get());
        opened.endpoint.flush().unwrap();
        assert!(opened.machine.is_lent_back(waiting_phys) && iovas.iter().all(|at| opened.reaches(*at)));
    }
}

/// Memory goes back when the device confirms, not before, and not only when somebody looks at the flush.
#[test]
fn a_late_answer_gives_the_memory_back() {
    let opened = opened(LOOSE);
    let (mapping, phys) = opened.adopt();
    let at = mapping.iova();
    defer(&opened, mapping);
    opened.machine.inject([Inject::Hold(Execute::AtRelease)]);
    assert!(opened.endpoint.flush().is_err());
    assert!(opened.reaches(at) && !opened.machine.is_lent_back(phys));
    assert_eq!(opened.viommu.reclaim(), 0, "the device owes an answer");
    opened.machine.release(Release::All);
    assert!(!opened.machine.is_lent_back(phys));
    opened.viommu.poll();
    assert!(!opened.reaches(at) && opened.machine.is_lent_back(phys));
    assert_eq!(opened.endpoint.flush(), Ok(()));
}

/// An answer that is never given, and a device that asks for a reset: bounded, and nothing comes back.
#[test]
fn a_device_that_stopped_keeps_what_waits() {
    for stop in [Inject::Drop(Execute::AtRelease), Inject::NeedsReset] {
        let opened = opened(LOOSE);
        let (mapping, phys) = opened.adopt();
        defer(&opened, mapping);
        opened.machine.inject([stop]);
        assert!(opened.endpoint.flush().is_err());
        let (more, more_phys) = match stop {
            Inject::NeedsReset => (None, phys),
            _ => {
                let (mapping, phys) = opened.adopt();
                (Some(mapping), phys)
            }
        };
        if let Some(mapping) = more {
            defer(&opened, mapping);
            assert!(opened.endpoint.flush().is_err(), "of the first");
            assert!(opened.machine.is_lent_back(more_phys), "the second was confirmed");
        }
        opened.viommu.poll();
        assert!(!opened.machine.is_lent_back(phys));
    }
}

/// Fails when what is being reclaimed is in no doubt any more: the device has not confirmed it, and may refuse again.
#[test]
fn a_flush_while_something_is_reclaimed_promises_nothing() {
    let opened = opened(LOOSE);
    let (mapping, phys) = opened.adopt();
    let at = mapping.iova();
    defer(&opened, mapping);
    opened.machine.inject([Inject::Refuse(4)]);
    assert!(opened.endpoint.flush().is_err());
    // Its UNMAP is under way, and refused in the end.
    opened.machine.inject([Inject::Hold(Execute::AtRelease)]);
    let (domain, meanwhile) = (opened.domain.clone(), Arc::new(Mutex::new(None)));
    let flushed = Arc::clone(&meanwhile);
    opened.machine.on_relax(move |_, _| {
        flushed.lock().unwrap().get_or_insert_with(|| domain.flush());
    });
    assert_eq!(opened.viommu.reclaim(), 0, "it timed out");
    let flushed = meanwhile.lock().unwrap().take().unwrap();
    assert!(flushed.is_err() && opened.reaches(at), "{flushed:?}");
    assert!(opened.endpoint.flush().is_err(), "the failure is remembered");
    opened.machine.release(Release::All);
    opened.viommu.poll();
    assert_eq!((opened.endpoint.flush(), opened.machine.is_lent_back(phys)), (Ok(()), true));
}
