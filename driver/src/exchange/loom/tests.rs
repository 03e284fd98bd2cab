//! What is tried in every interleaving.

use super::*;
use crate::error::RequestError;

/// Whoever sleeps is woken when his answer is there, and the page goes back after it, once.
///
/// Fails without the second look in `InFlight::sleep`, without its wish for interrupts, without the wake in
/// `Viommu::poll`, and, as a race for the page, with a relaxed load in `Ring::used_index`.
#[test]
fn an_answer_wakes_who_waits_for_it() {
    explore_both("answer", 3, |suppression| {
        let (world, device) = world(suppression, 1);
        world.map_page();
        let device = world.spawn(device, 1);
        assert_eq!(run(world.domain.unmap_range(at())), Ok(()));
        assert_eq!(world.page.returned(), 1);
        device.join().unwrap();
        world.assert_clean();
    });
}

/// An interrupt that comes while another one's poll is under way makes for one more poll.
///
/// Fails with `interrupted` cleared after the queues were looked at.
#[test]
fn an_interrupt_during_a_poll_is_not_lost() {
    explore_both("interrupt during a poll", 2, |suppression| {
        let (world, mut device) = world(suppression, 2);
        let (first, second) = (submit(world.shared()), submit(world.shared()));
        let bottom_half = Arc::new(Bell::new());
        let (viommu, page, wake) = (world.viommu.clone(), Arc::clone(&world.page), Arc::clone(&bottom_half));
        let device = thread::spawn(move || {
            while let Some(taken) = device.take() {
                if answer(&mut device, &taken, &page) && viommu.on_interrupt() == Interrupt::Wake {
                    wake.ring();
                }
            }
        });
        let (viommu, ends) = (world.viommu.clone(), Arc::new(AtomicBool::new(false)));
        let (woken, ended) = (Arc::clone(&bottom_half), Arc::clone(&ends));
        let poller = thread::spawn(move || {
            while !ended.load(Ordering::Acquire) {
                woken.wait();
                viommu.poll();
            }
        });
        assert_eq!(run(world.shared().finish(second)), Ok(()));
        assert_eq!(run(world.shared().finish(first)), Ok(()));
        ends.store(true, Ordering::Release);
        bottom_half.ring();
        device.join().unwrap();
        poller.join().unwrap();
        world.assert_clean();
    });
}

/// Two waiters, each of whom may drain the other's answer.
///
/// Fails with nobody woken in `InFlight::look`, and where the last look of the one takes the wish for interrupts
/// from the other, who sleeps (`rest_if_nobody_sleeps` without its question).
#[test]
fn a_waiter_who_drains_the_others_answer_wakes_him() {
    explore_both("two waiters", 2, |suppression| {
        let (world, device) = world(suppression, 2);
        let (mine, his) = (submit(world.shared()), submit(world.shared()));
        let device = world.spawn(device, 2);
        let viommu = world.viommu.clone();
        let other = thread::spawn(move || run(viommu.shared.finish(his)));
        assert_eq!(run(world.shared().finish(mine)), Ok(()));
        assert_eq!(other.join().unwrap(), Ok(()));
        device.join().unwrap();
        world.assert_clean();
    });
}

/// Two waiters for one slot.
///
/// Fails without `slot_due`, with nobody woken in `InFlight::look`, and without the second look in `sleep_for_slot`.
#[test]
fn a_slot_that_comes_free_wakes_who_waits_for_it() {
    explore_both("slot", 2, |suppression| {
        let (world, device) = world(suppression, 1);
        let device = world.spawn(device, 2);
        let viommu = world.viommu.clone();
        let other = thread::spawn(move || run(request(&viommu.shared)));
        assert_eq!(run(request(world.shared())), Ok(()));
        assert_eq!(other.join().unwrap(), Ok(()));
        device.join().unwrap();
        world.assert_clean();
    });
}

/// Who is dropped with the slot's request in flight, or asleep at the head of those who wait, leaves the slot to
/// the next.
///
/// Fails like the test before, with a slot that is free as soon as its request is given up, and with nobody woken where
/// that is.
#[test]
fn a_slot_goes_past_who_was_dropped() {
    explore_both("dropped holder", 2, |suppression| {
        let (world, device) = world(suppression, 1);
        let mut holder = std::boxed::Box::pin(request(world.shared()));
        assert!(poll_once(holder.as_mut()).is_pending());
        let device = world.spawn(device, 2);
        let viommu = world.viommu.clone();
        let other = thread::spawn(move || run(request(&viommu.shared)));
        drop(holder);
        assert_eq!(other.join().unwrap(), Ok(()));
        device.join().unwrap();
        world.assert_clean();
    });
    explore_both("dropped sleeper", 2, |suppression| {
        let (world, device) = world(suppression, 1);
        let batch = submit(world.shared());
        let mut first = std::boxed::Box::pin(request(world.shared()));
        assert!(poll_once(first.as_mut()).is_pending());
        let device = world.spawn(device, 2);
        let viommu = world.viommu.clone();
        let other = thread::spawn(move || run(request(&viommu.shared)));
        drop(first);
        assert_eq!(run(world.shared().finish(batch)), Ok(()));
        assert_eq!(other.join().unwrap(), Ok(()));
        device.join().unwrap();
        world.assert_clean();
    });
}

/// An UNMAP that is dropped against its answer: the page goes back once, after the answer, by whoever is left.
///
/// Fails, as a race for the page, with the mapping let go of in `Engine::lose`; and with a slot that is free as
/// soon as its request is given up.
#[test]
fn a_dropped_unmap_gives_the_page_back_once() {
    explore_both("dropped UNMAP", 3, |suppression| {
        let (world, device) = world(suppression, 1);
        world.map_page();
        let device = world.spawn(device, 1);
        let mut unmapping = std::boxed::Box::pin(world.domain.unmap_range(at()));
        let _ = poll_once(unmapping.as_mut());
        drop(unmapping);
        world.viommu.poll();
        device.join().unwrap();
        world.viommu.poll();
        assert_eq!(world.page.returned(), 1);
        world.assert_clean();
    });
}

/// Who looks once does not read an answer that is not there yet, though another's is.
///
/// Fails with the status read before the used entry's id is looked at, in `RequestQueue::take_one`.
#[test]
fn who_looks_once_leaves_others_answers_alone() {
    explore_both("two who look once", 2, |suppression| {
        let (world, device) = world(suppression, 2);
        let his = submit(world.shared());
        let device = world.spawn(device, 2);
        let viommu = world.viommu.clone();
        let other = thread::spawn(move || run(viommu.shared.finish(his)));
        let (key, mut page) = (world.domain.key(), held());
        let whole = Run { phys: PhysAddr::new(Page::PHYS), len: 0x1000 };
        let (shared, placement) = (world.shared(), Placement::up_to(Iova::new(u64::MAX)));
        let place = Place::Anywhere { len: 0x1000, placement, parts: 1 };
        let mapped = run(async {
            match exchange::map_first(shared, key, (whole, Spot::Within(placement)), READ, &mut page) {
                Ok(mapped) => Ok(mapped.range),
                Err(sent) => {
                    let runs = core::iter::once(whole);
                    exchange::map(shared, key, place, runs, READ, &mut page, sent).await
                }
            }
        });
        assert!(mapped.is_ok() && page.is_none());
        assert_eq!(other.join().unwrap(), Ok(()));
        device.join().unwrap();
        assert_eq!((world.viommu.stats().maps, world.viommu.stats().quarantined_mappings), (1, 0));
    });
}

/// A MAP that is dropped against its answer leaves the page mapped and in quarantine, unless it was done.
///
/// Fails with the mapping let go of in `Engine::lose`, or when the late answer is settled.
#[test]
fn a_dropped_map_keeps_the_page_until_it_is_reclaimed() {
    explore_both("dropped MAP", 3, |suppression| {
        let (world, device) = world(suppression, 1);
        let device = world.spawn(device, 1);
        let key = world.domain.key();
        let (mut page, run) = (held(), Run { phys: PhysAddr::new(Page::PHYS), len: 0x1000 });
        let runs = core::iter::once(run);
        let mut mapping = std::boxed::Box::pin(async {
            let (shared, place) = (world.shared(), Place::At(at()));
            exchange::map(shared, key, place, runs, READ, &mut page, None).await
        });
        let mapped = poll_once(mapping.as_mut());
        drop(mapping);
        world.viommu.poll();
        let mut device = device.join().unwrap();
        world.viommu.poll();
        let stuck = usize::from(mapped.is_pending());
        assert_eq!((world.viommu.stats().quarantined_mappings, world.page.returned()), (stuck, 0));

        let mut unmapping = pin!(async {
            match mapped {
                Poll::Ready(result) => {
                    assert_eq!(result, Ok(at()));
                    world.domain.unmap_range(at()).await
                }
                Poll::Pending => exchange::reclaim(world.shared(), key, at()).await,
            }
        });
        assert!(poll_once(unmapping.as_mut()).is_pending());
        assert_eq!(world.page.returned(), 0);
        let taken = device.take().unwrap();
        answer(&mut device, &taken, &world.page);
        assert_eq!(poll_once(unmapping.as_mut()), Poll::Ready(Ok(())));
        assert_eq!(world.page.returned(), 1);
        world.assert_clean();
    });
}

/// A doorbell that somebody else rings is rung for what it was due for.
///
/// Fails without `memory_before_doorbell`, and with a relaxed swap in `Shared::ring`. The release in
/// `State::publish` can be left out: the fence in `Ring::publish` comes before it.
#[test]
fn who_sees_the_doorbell_sees_the_request() {
    explore_both("doorbell of another", 3, |suppression| {
        let (world, mut device) = world_with(suppression, 1, Some(AtomicBool::new(false)));
        let doorbell = Arc::clone(&world.doorbell);
        let device = thread::spawn(move || {
            // Not a fence: loom's also acquires what the threads before this one read.
            if doorbell.register.as_ref().unwrap().load(Ordering::Acquire) {
                assert!(device.take().is_some(), "rung for nothing");
            }
        });
        let viommu = world.viommu.clone();
        let other = thread::spawn(move || viommu.shared.ring());
        let _ = submit(world.shared());
        world.shared().ring();
        other.join().unwrap();
        device.join().unwrap();
        assert!(world.doorbell.register.as_ref().unwrap().load(Ordering::Relaxed), "not rung at all");
    });
}

/// Whoever waits when the device asks for a reset, or the driver ends, is woken: for an answer, and for a slot.
///
/// Failed as long as who fell asleep after that was not woken: the end comes between his look and his sleep.
#[test]
fn the_end_wakes_all() {
    for why in [RequestError::NeedsReset, RequestError::ShutDown] {
        explore("end", 3, move || {
            let (world, _device) = world(Suppression::Flags, 1);
            let viommu = world.viommu.clone();
            let other = thread::spawn(move || viommu.shared.end(why));
            assert!(run(request(world.shared())).is_err());
            other.join().unwrap();
        });
        explore("end without a slot", 3, move || {
            let (world, _device) = world(Suppression::Flags, 1);
            let _ = submit(world.shared());
            let viommu = world.viommu.clone();
            let other = thread::spawn(move || viommu.shared.end(why));
            assert_eq!(run(request(world.shared())), Err(why));
            other.join().unwrap();
        });
    }
}

/// Whoever waits when the device breaks the ring is woken, too.
///
/// Failed as long as the poll that found it woke nobody; fails without the wish for interrupts in `sleep_for_slot`.
#[test]
fn a_broken_ring_wakes_all() {
    let broken = RequestError::RingBroken { used_index: 0x4000, expected_at_most: 1 };
    explore_both("broken ring", 3, move |suppression| {
        let (world, mut device) = world(suppression, 1);
        let viommu = world.viommu.clone();
        let other = thread::spawn(move || {
            if device.show_used(0x4000) {
                interrupt(&viommu);
            }
        });
        assert!(run(request(world.shared())).is_err());
        other.join().unwrap();
        assert_eq!(world.shared().state.lock().dead, Some(broken));
    });
    explore_both("broken ring without a slot", 3, move |suppression| {
        let (world, mut device) = world(suppression, 1);
        let _ = submit(world.shared());
        let viommu = world.viommu.clone();
        let other = thread::spawn(move || {
            if device.show_used(0x4000) {
                interrupt(&viommu);
            }
        });
        assert_eq!(run(request(world.shared())), Err(broken));
        other.join().unwrap();
    });
}
