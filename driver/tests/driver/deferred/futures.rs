//! Deferred unmapping, and flushes, as futures: late, dropped, and several at a time.

use super::*;
use crate::support::Task;
use virtio_iommu_model::{Execute, Inject, Release};

const HOLD: Inject = Inject::Hold(Execute::AtRelease);

/// Every other one of so many pages, deferred, so that each takes a request. What stays is first.
fn every_other(opened: &Opened, count: usize) -> (Vec<DmaMapping>, Vec<virtio_iommu::PhysAddr>) {
    let both: Vec<_> = (0..count).map(|_| (opened.adopt().0, opened.adopt())).collect();
    let defer = |(kept, (mapping, phys))| {
        defer(opened, mapping);
        (kept, phys)
    };
    both.into_iter().map(defer).unzip()
}

fn back(opened: &Opened, pages: &[virtio_iommu::PhysAddr]) -> usize {
    pages.iter().filter(|phys| opened.machine.is_lent_back(**phys)).count()
}

/// Fails when a flush gives back before the answer, or is not woken by it.
#[test]
fn a_flush_sleeps_until_its_answers_are_there() {
    let opened = opened(LOOSE);
    let (_kept, pages) = every_other(&opened, 3);
    opened.machine.inject([HOLD; 3]);
    let mut task = Task::new(opened.endpoint.flush_async());
    task.sleep();
    opened.machine.release(Release::Oldest);
    opened.viommu.poll();
    task.sleep();
    opened.machine.release(Release::All);
    opened.viommu.on_interrupt();
    assert_eq!(opened.domain.stats().mapped_bytes, 5 * PAGE, "nobody looked yet");
    opened.viommu.poll();
    assert!(task.wakes() > 0);
    assert_eq!((task.finish(), back(&opened, &pages)), (Ok(()), 3));
}

/// Fails when `Flush` forgets what it did not send, or what is in flight counts as done.
#[test]
fn a_flush_that_is_dropped_leaves_what_it_took_in_quarantine() {
    for queue_size in [2, 4, 256] {
        let options = virtio_iommu::Options { queue_size, ..Machine::options() };
        let machine = Machine::new(Config::default());
        let opened = Opened::on(machine, options, policy(LOOSE), EndpointOptions::default());
        let (kept, pages) = every_other(&opened, 5);
        opened.machine.inject([HOLD]);
        let mut task = Task::new(opened.endpoint.flush_async());
        task.sleep();
        drop(task);
        assert_eq!(back(&opened, &pages), 0);
        assert!(opened.endpoint.flush().is_err(), "it is known that a flush did not end well");
        // Meanwhile the domain goes on.
        if queue_size > 2 {
            let (mapping, _) = opened.adopt();
            defer(&opened, mapping);
        }
        opened.machine.release(Release::All);
        opened.viommu.poll();
        opened.viommu.reclaim();
        assert_eq!(opened.endpoint.flush(), Ok(()));
        assert_eq!((back(&opened, &pages), opened.domain.mapping_count()), (5, kept.len()));
    }
}

#[test]
fn what_is_dropped_before_it_was_polled_does_what_it_says() {
    let opened = opened(LOOSE);
    let (mapping, phys) = opened.adopt();
    defer(&opened, mapping);
    drop(opened.endpoint.flush_async());
    assert_eq!(opened.domain.stats().deferred_mappings, 1, "a flush that did not begin");
    opened.endpoint.flush().unwrap();
    assert!(opened.machine.is_lent_back(phys));
    // An unmapping took its mapping with it, as a strict one does.
    let (mapping, phys) = opened.adopt();
    drop(opened.endpoint.unmap_async(mapping));
    assert_eq!(opened.viommu.stats().quarantined_mappings, 1);
    assert_eq!((opened.viommu.reclaim(), opened.machine.is_lent_back(phys)), (1, true));
}

/// Fails when a second flush does not wait for what the first one has under way.
#[test]
fn a_flush_waits_for_one_that_is_under_way() {
    let opened = opened(LOOSE);
    let (_kept, pages) = every_other(&opened, 2);
    opened.machine.inject([HOLD; 2]);
    let mut first = Task::new(opened.endpoint.flush_async());
    first.sleep();
    let (mapping, late) = opened.adopt();
    defer(&opened, mapping);
    let mut second = Task::new(opened.domain.flush_async());
    second.sleep();
    assert_eq!((back(&opened, &pages), opened.machine.is_lent_back(late)), (0, false));
    opened.machine.release(Release::All);
    opened.viommu.poll();
    assert_eq!(first.finish(), Ok(()));
    drop(first);
    assert!(second.wakes() > 0, "the first one's end wakes the second");
    assert_eq!((second.finish(), back(&opened, &pages)), (Ok(()), 2));
    assert!(opened.machine.is_lent_back(late));
}

/// Fails when the end of a dropped flush wakes nobody.
#[test]
fn a_flush_that_is_dropped_lets_the_next_one_go_on() {
    let opened = opened(LOOSE);
    let (_kept, _) = every_other(&opened, 2);
    opened.machine.inject([HOLD; 2]);
    let mut first = Task::new(opened.endpoint.flush_async());
    first.sleep();
    let (mapping, late) = opened.adopt();
    defer(&opened, mapping);
    let mut second = Task::new(opened.domain.flush_async());
    second.sleep();
    drop(first);
    assert!(second.wakes() > 0);
    assert!(second.finish().is_err(), "of the first one's");
    assert!(opened.machine.is_lent_back(late));
}

/// An unmapping that reaches the bound waits for its flush, and is as good as its own when it is dropped.
#[test]
fn an_unmapping_that_flushes_and_is_dropped_loses_nothing() {
    let opened = opened(DeferredBounds { mappings: 2, ..LOOSE });
    let (first, first_phys) = opened.adopt();
    let (second, second_phys) = opened.adopt();
    defer(&opened, first);
    opened.machine.inject([HOLD]);
    let mut task = Task::new(opened.endpoint.unmap_async(second));
    task.sleep();
    drop(task);
    opened.machine.release(Release::All);
    opened.viommu.poll();
    assert_eq!(back(&opened, &[first_phys, second_phys]), 2);
    assert_eq!(opened.endpoint.flush(), Ok(()));
}

/// A mapping that flushed what was old, and is dropped there, is not lost.
#[test]
fn a_mapping_that_flushes_and_is_dropped_is_in_quarantine() {
    let opened = opened(DeferredBounds { age_ns: 1, ..LOOSE });
    let (old, _) = opened.adopt();
    defer_old(&opened, old);
    opened.machine.pass_time(10);
    let (held, phys) = opened.machine.lend(PAGE);
    opened.machine.inject([Inject::Pass, HOLD]);
    let mut task = Task::new(opened.endpoint.adopt_async(held, Direction::Both));
    assert!(task.poll().is_pending(), "it waits for the flush");
    drop(task);
    opened.machine.release(Release::All);
    opened.viommu.poll();
    assert_eq!(opened.viommu.reclaim(), 1);
    assert!(opened.machine.is_lent_back(phys));
    assert_eq!(opened.domain.mapping_count(), 0);
}

/// The clock stands still between two polls, so that what is deferred is not old yet.
fn defer_old(opened: &Opened, mapping: DmaMapping) {
    defer(opened, mapping);
}
