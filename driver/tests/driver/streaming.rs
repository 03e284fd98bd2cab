//! Memory that goes back and forth, in place or through bounce pages.

use virtio_iommu::{
    Bidirectional, Bounced, DeferredBounds, DmaDevice, DmaDirection, DmaError, DomainOptions,
    EndpointOptions, FromDevice, MapError, Streaming, ToDevice, UnmapError, UnmapPolicy, Unmapped,
};
use virtio_iommu_model::{Config, Inject};

use crate::support::{EP, Opened, PAGE, POISON};

fn opened() -> Opened {
    let bounce = EndpointOptions { bounce_bytes: 0x8000, ..EndpointOptions::default() };
    Opened::new(Config::default(), DomainOptions::default(), bounce)
}

fn device(opened: &Opened) -> &dyn DmaDevice {
    &opened.endpoint
}

/// Fails when the mapping allows more, or less, than the type says.
#[test]
fn the_type_says_what_the_endpoint_may_do() {
    fn check<D: DmaDirection>(opened: &Opened, reads: bool, writes: bool) {
        let stream = Streaming::<D>::alloc(device(opened), 100).unwrap();
        let at = stream.iova().get();
        assert_eq!(stream.len_bytes() as u64, PAGE);
        assert_eq!(opened.machine.reaches(EP, at), reads);
        assert_eq!(opened.machine.dma_write(EP, at + PAGE - 1, &[1]).is_ok(), writes);
        assert_eq!(stream.unmap(), Ok(Unmapped::Now));
        assert!(!opened.machine.reaches(EP, at) && opened.machine.dma_write(EP, at, &[1]).is_err());
    }
    let opened = opened();
    let before = opened.machine.outstanding();
    check::<ToDevice>(&opened, true, false);
    check::<FromDevice>(&opened, false, true);
    check::<Bidirectional>(&opened, true, true);
    assert_eq!(opened.machine.outstanding(), before);
}

#[test]
fn cpu_and_endpoint_take_turns() {
    let opened = opened();
    let mut to = Streaming::<ToDevice>::alloc(device(&opened), 64).unwrap();
    to.cpu().bytes_mut()[..4].copy_from_slice(b"ping");
    to.cpu().write(4, b"!").unwrap();
    assert_eq!(opened.machine.dma_read(EP, to.iova().get(), 6).unwrap(), b"ping!\0");

    let mut from = Streaming::<FromDevice>::alloc(device(&opened), 64).unwrap();
    opened.machine.dma_write(EP, from.iova().get(), b"pong").unwrap();
    let cpu = from.cpu();
    let mut bytes = [0; 4];
    cpu.read(0, &mut bytes).unwrap();
    // SAFETY: the endpoint does what the test says.
    assert_eq!((&bytes, unsafe { &cpu.bytes()[..4] }), (b"pong", &b"pong"[..]));
    assert!(matches!(cpu.read(PAGE as usize, &mut bytes), Err(DmaError::OutOfBounds { .. })));
    drop(cpu);

    let mut both = Streaming::<Bidirectional>::alloc(device(&opened), 64).unwrap();
    // SAFETY: as above.
    unsafe { both.cpu().bytes_mut()[0] = 3 };
    opened.machine.dma_write(EP, both.iova().get() + 1, &[4]).unwrap();
    let cpu = both.cpu();
    // SAFETY: as above.
    assert_eq!(unsafe { &cpu.bytes()[..2] }, [3, 4]);
    drop(cpu);
    for stream in [to.unmap(), from.unmap(), both.unmap()] {
        stream.unwrap();
    }
}

/// Fails when lent memory comes back early, twice, or not at all.
#[test]
fn lent_memory_comes_back_when_it_is_unmapped_or_was_refused() {
    let opened = opened();
    let (held, phys) = opened.machine.lend(2 * PAGE);
    let mut stream = Streaming::<Bidirectional>::adopt(device(&opened), held).unwrap();
    stream.cpu().write(2 * PAGE as usize - 1, &[7]).unwrap();
    let last = stream.iova().get() + 2 * PAGE - 1;
    assert_eq!(opened.machine.dma_read(EP, last, 1).unwrap(), [7]);
    assert!(!opened.machine.is_lent_back(phys));
    stream.unmap().unwrap();
    assert!(opened.machine.is_lent_back(phys));

    let (held, phys) = opened.machine.lend(PAGE);
    opened.machine.inject([Inject::Refuse(8)]);
    let (error, back) = Streaming::<ToDevice>::adopt(device(&opened), held).unwrap_err();
    assert!(matches!(error, DmaError::Map(MapError::Request { .. })));
    assert_eq!(back.unwrap().memory().phys, phys);
}

/// Fails when a failure, or a drop, gives the memory back although the endpoint reaches it.
#[test]
fn what_was_not_unmapped_is_in_quarantine() {
    for dropped in [false, true] {
        let opened = opened();
        let (held, phys) = opened.machine.lend(PAGE);
        let stream = Streaming::<FromDevice>::adopt(device(&opened), held).unwrap();
        let at = stream.iova().get();
        if dropped {
            let ((), requests, _) = opened.machine.traffic(|| drop(stream));
            assert_eq!(requests, 0, "a drop never waits");
        } else {
            opened.machine.inject([Inject::Refuse(4)]);
            assert!(matches!(stream.unmap(), Err(UnmapError::Request { .. })));
        }
        opened.viommu.poll();
        opened.machine.dma_write(EP, at, &[1]).unwrap();
        assert!(!opened.machine.is_lent_back(phys) && opened.machine.is_live(phys));
        assert_eq!(opened.viommu.stats().quarantined_mappings, 1);
        assert_eq!(opened.viommu.reclaim(), 1);
        assert!(opened.machine.dma_write(EP, at, &[1]).is_err() && opened.machine.is_lent_back(phys));
    }
}

#[test]
fn in_a_domain_that_defers_the_memory_stays_away_until_the_flush() {
    let unmap = UnmapPolicy::Deferred(DeferredBounds::default());
    let domain = DomainOptions { unmap, ..DomainOptions::default() };
    let opened = Opened::new(Config::default(), domain, EndpointOptions::default());
    let (held, phys) = opened.machine.lend(PAGE);
    let stream = Streaming::<FromDevice>::adopt(device(&opened), held).unwrap();
    assert_eq!(stream.unmap(), Ok(Unmapped::AtFlush));
    assert!(!opened.machine.is_lent_back(phys));
    opened.endpoint.flush().unwrap();
    assert!(opened.machine.is_lent_back(phys));
}

/// Fails when bounce pages hold more than the buffer, or what comes back is more than the buffer.
#[test]
fn what_lies_beside_a_borrowed_buffer_stays_invisible() {
    let opened = opened();
    let mut array = [0xee_u8; 300];
    let (_, requests, _) = opened.machine.traffic(|| {
        let bounced = Bounced::<ToDevice>::new(device(&opened), &array[100..200]).unwrap();
        let at = bounced.iova().get();
        assert_eq!(at % PAGE, 0, "no other buffer's granule");
        assert_eq!(opened.machine.dma_read(EP, at, 100).unwrap(), [0xee; 100]);
        // Not even by reading on to the end of the page.
        let rest = opened.machine.dma_read(EP, at + 100, PAGE as usize - 100).unwrap();
        assert!(rest.iter().all(|byte| *byte == 0));
        drop(bounced);

        let bounced = Bounced::<FromDevice>::new(device(&opened), &mut array[100..200]).unwrap();
        let at = bounced.iova().get();
        assert_eq!(opened.machine.dma_read(EP, at, 100).unwrap(), [0; 100], "nothing of it goes there");
        opened.machine.dma_write(EP, at, &[5; PAGE as usize]).unwrap();
        assert_eq!(bounced.finish(), [5; 100]);
    });
    assert_eq!(requests, 0);
    assert_eq!((array[99], array[100], array[199], array[200]), (0xee, 5, 5, 0xee));
}

/// Fails when a sync point copies in the wrong direction, or not at all.
#[test]
fn copies_are_made_at_the_sync_points_and_only_there() {
    let opened = opened();
    let mut buffer = [1_u8; 8];
    let mut bounced = Bounced::<Bidirectional>::new(device(&opened), &mut buffer).unwrap();
    let at = bounced.iova().get();
    opened.machine.dma_write(EP, at, &[2]).unwrap();
    let mut cpu = bounced.cpu();
    assert_eq!(cpu.bytes()[..2], [2, 1]);
    // In the CPU's turn neither sees what the other does.
    opened.machine.dma_write(EP, at + 2, &[9]).unwrap();
    cpu.bytes_mut()[1] = 3;
    assert_eq!(cpu.bytes()[..3], [2, 3, 1]);
    assert_eq!(opened.machine.dma_read(EP, at, 3).unwrap(), [2, 1, 9]);
    drop(cpu);
    assert_eq!(opened.machine.dma_read(EP, at, 3).unwrap(), [2, 3, 1]);
    opened.machine.dma_write(EP, at + 7, &[4]).unwrap();
    assert_eq!(bounced.finish(), [2, 3, 1, 1, 1, 1, 1, 4]);

    // From the device the CPU gets, and gives nothing.
    let mut bounced = Bounced::<FromDevice>::new(device(&opened), &mut buffer).unwrap();
    let at = bounced.iova().get();
    opened.machine.dma_write(EP, at, &[6]).unwrap();
    assert_eq!(bounced.cpu().bytes()[..2], [6, 0]);
    opened.machine.dma_write(EP, at, &[7]).unwrap();
    assert_eq!(bounced.cpu().bytes()[0], 7);
    // What is dropped is not copied back.
    opened.machine.dma_write(EP, at, &[8]).unwrap();
    drop(bounced);
    assert_eq!(buffer[0], 7);
}

#[test]
fn bounce_pages_come_back_from_every_end() {
    let opened = opened();
    let mut large = vec![0; 0x8000];
    for _ in 0..3 {
        let bounced = Bounced::<FromDevice>::new(device(&opened), &mut large).unwrap();
        let mut small = [0; 1];
        let none = Bounced::<FromDevice>::new(device(&opened), &mut small).map(drop);
        assert_eq!(none, Err(DmaError::NoBounce { len: 1 }));
        assert_eq!(bounced.finish().len(), 0x8000);
        drop(Bounced::<ToDevice>::new(device(&opened), &large).unwrap());
    }
}

/// What the endpoint's memory was, when it is freed, is poisoned by these tests' platform: a late access shows.
#[test]
fn memory_of_the_platform_goes_back_once() {
    let opened = opened();
    let before = opened.machine.outstanding();
    let stream = Streaming::<Bidirectional>::alloc(device(&opened), 1).unwrap();
    assert_eq!(opened.machine.outstanding(), before + 1);
    let phys = opened.domain.translate(stream.iova()).unwrap().phys;
    stream.unmap().unwrap();
    assert!(!opened.machine.is_live(phys) && POISON != 0);
    assert_eq!(opened.machine.outstanding(), before);
}
