//! Pools of buffers that are mapped once.

use std::collections::BTreeSet;
use std::thread;

use virtio_iommu::{
    DeferredBounds, Direction, DmaDevice, DmaError, DmaPool, DomainOptions, EndpointOptions, MapError,
    UnmapError, UnmapPolicy, Unmapped,
};
use virtio_iommu_model::{Config, Inject};

use crate::support::{EP, Opened, PAGE, heap_uses};

fn opened() -> Opened {
    Opened::new(Config::default(), DomainOptions::default(), EndpointOptions::default())
}

/// Fails when a pool maps more than once, or a buffer costs anything.
#[test]
fn one_request_for_all_and_none_for_each() {
    let opened = opened();
    let make = || DmaPool::new(&opened.endpoint, 100, 1500, Direction::Both).unwrap();
    let (pool, requests, kicks) = opened.machine.traffic(make);
    assert_eq!((requests, kicks), (1, 1));
    let churn = || {
        for round in 0..1000 {
            let mut one = pool.take().unwrap();
            let other = pool.take().unwrap();
            assert_ne!(one.iova(), other.iova());
            one.write(0, &[round as u8]).unwrap();
        }
    };
    let (((), uses), requests, kicks) = opened.machine.traffic(|| heap_uses(churn));
    assert_eq!((requests, kicks, uses), (0, 0, 0));
    assert_eq!((pool.out(), pool.count(), pool.buffer_len()), (0, 100, 1500));
    let (closed, requests, _) = opened.machine.traffic(|| pool.close());
    assert_eq!((closed, requests), (Ok(Unmapped::Now), 1));
    assert_eq!((opened.machine.outstanding(), opened.domain.mapping_count()), (2, 0));
}

/// Fails when an index is handed out twice, an address is not the buffer's, or exhaustion is anything but `None`.
#[test]
fn buffers_run_out_do_not_overlap_and_come_back() {
    for (count, len) in [(1, 1), (7, 64), (130, 65), (300, 4096)] {
        let opened = opened();
        let pool = DmaPool::new(&opened.endpoint, count, len, Direction::Both).unwrap();
        let mut buffers: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!((buffers.len(), pool.out()), (count, count));
        assert!(pool.take().is_none());
        let starts: BTreeSet<_> = buffers.iter().map(|buffer| buffer.iova().get()).collect();
        let apart = starts.iter().zip(starts.iter().skip(1)).all(|(one, next)| next - one >= len as u64);
        assert!(starts.len() == count && apart);
        for (index, buffer) in buffers.iter_mut().enumerate() {
            assert_eq!(buffer.len_bytes(), len);
            buffer.write(0, &vec![index as u8; len]).unwrap();
        }
        for (index, buffer) in buffers.iter().enumerate() {
            let seen = opened.machine.dma_read(EP, buffer.iova().get(), len).unwrap();
            assert_eq!(seen, vec![index as u8; len], "what the endpoint sees is what was written there");
        }
        let gone = buffers.swap_remove(count / 2).iova();
        assert_eq!(pool.take().map(|buffer| buffer.iova()), Some(gone));
    }
}

#[test]
fn the_cpu_reads_and_writes_inside_only() {
    let opened = opened();
    let pool = DmaPool::new(&opened.endpoint, 2, 100, Direction::Both).unwrap();
    let (mut one, other) = (pool.take().unwrap(), pool.take().unwrap());
    one.write(0, &[1; 100]).unwrap();
    opened.machine.dma_write(EP, one.iova().get() + 99, &[7]).unwrap();
    let mut bytes = [0; 2];
    one.read(98, &mut bytes).unwrap();
    assert_eq!(bytes, [1, 7]);
    let outside = |offset, len| Err(DmaError::OutOfBounds { offset, len, size: 100 });
    assert_eq!(one.read(99, &mut bytes), outside(99, 2));
    assert_eq!(one.write(101, &[]), outside(101, 0));
    assert_eq!(one.write(usize::MAX, &[0; 2]), outside(usize::MAX, 2));
    // SAFETY: the endpoint does what the test says.
    unsafe {
        one.bytes_mut()[0] = 5;
        assert_eq!((one.bytes()[0], one.bytes().len(), other.bytes()), (5, 100, &[0; 100][..]));
    }
}

/// What the policy does not promise: the endpoint reaches buffers that nobody has.
#[test]
fn the_endpoint_reaches_all_buffers_all_the_time() {
    let opened = opened();
    let pool = DmaPool::new(&opened.endpoint, 4, 64, Direction::Both).unwrap();
    let mut buffer = pool.take().unwrap();
    buffer.write(0, b"secret").unwrap();
    let at = buffer.iova().get();
    drop(buffer);
    assert_eq!(opened.machine.dma_read(EP, at, 6).unwrap(), b"secret");
    pool.close().unwrap();
    assert!(!opened.machine.reaches(EP, at));
}

#[test]
fn a_pool_is_mapped_for_its_direction() {
    let opened = opened();
    let pool = DmaPool::new(&opened.endpoint, 4, 64, Direction::ToDevice).unwrap();
    let at = pool.take().unwrap().iova().get();
    assert!(opened.machine.reaches(EP, at) && opened.machine.dma_write(EP, at, &[1]).is_err());
}

/// Fails when memory of a pool goes back while a buffer is out, or is lost for good.
#[test]
fn a_pool_that_goes_with_buffers_out_is_in_quarantine() {
    for closed in [false, true] {
        let opened = opened();
        let pool = DmaPool::new(&opened.endpoint, 4, 64, Direction::Both).unwrap();
        let first = pool.take().unwrap();
        let at = first.iova();
        let _ = first.into_raw();
        let gone = pool.take().unwrap();
        std::mem::forget(gone);
        assert_eq!(pool.out(), 2);
        if closed {
            let base = at;
            assert_eq!(pool.close(), Err(UnmapError::BuffersOut { iova: base, buffers: 2 }));
        } else {
            drop(pool);
        }
        // The endpoint may be at it still.
        opened.machine.dma_write(EP, at.get(), &[1]).unwrap();
        opened.viommu.poll();
        assert_eq!((opened.machine.outstanding(), opened.viommu.stats().quarantined_mappings), (3, 1));
        assert_eq!(opened.viommu.reclaim(), 1);
        assert!(!opened.reaches(at));
        assert_eq!(opened.machine.outstanding(), 2);
    }
}

#[test]
fn raw_buffers_are_found_by_their_number_and_by_no_other() {
    let opened = opened();
    let pool = DmaPool::new(&opened.endpoint, 70, 64, Direction::Both).unwrap();
    let mut buffers: Vec<_> = (0..66).map(|_| pool.take().unwrap()).collect();
    let mut last = buffers.pop().unwrap();
    last.write(0, b"kept").unwrap();
    let iova = last.iova();
    let number = last.into_raw();
    for wrong in (66..70).chain([70, 127, 128, usize::MAX]).filter(|wrong| *wrong != number) {
        // SAFETY: nothing is made of a number that is nobody's.
        assert!(unsafe { pool.from_raw(wrong) }.is_none(), "{wrong}");
    }
    // SAFETY: from `into_raw`, once.
    let again = unsafe { pool.from_raw(number) }.unwrap();
    assert_eq!(again.iova(), iova);
    let mut bytes = [0; 4];
    again.read(0, &mut bytes).unwrap();
    assert_eq!((&bytes, pool.out()), (b"kept", 66));
    drop(again);
    assert_eq!(pool.out(), 65);
}

#[test]
fn pools_that_cannot_be_had() {
    let opened = opened();
    opened.machine.inject([Inject::Refuse(8)]);
    let refused = DmaPool::new(&opened.endpoint, 4, 64, Direction::Both).unwrap_err();
    assert!(matches!(refused, DmaError::Map(MapError::Request { .. })));
    assert_eq!(opened.machine.outstanding(), 2, "given back at once");
    for (count, len) in [(usize::MAX, 64), (2, usize::MAX), (1, usize::MAX - 1)] {
        assert!(DmaPool::new(&opened.endpoint, count, len, Direction::Both).is_err());
    }
    opened.machine.limit_allocations(0);
    let none = DmaPool::new(&opened.endpoint, 4, 64, Direction::Both).unwrap_err();
    assert_eq!(none, DmaError::NoMemory { len: 256 });
    let _ = DmaPool::new(&opened.endpoint, 0, 0, Direction::Both).unwrap_err();
}

/// A pool in a domain that defers: one range like any other when it ends.
#[test]
fn a_pool_ends_as_its_domain_unmaps() {
    let unmap = UnmapPolicy::Deferred(DeferredBounds::default());
    let domain = DomainOptions { unmap, ..DomainOptions::default() };
    let opened = Opened::new(Config::default(), domain, EndpointOptions::default());
    let pool = DmaPool::new(&opened.endpoint, 4, 64, Direction::Both).unwrap();
    let at = pool.take().unwrap().iova();
    assert_eq!(pool.close(), Ok(Unmapped::AtFlush));
    assert!(opened.reaches(at) && opened.machine.outstanding() == 3);
    opened.endpoint.flush().unwrap();
    assert!(!opened.reaches(at) && opened.machine.outstanding() == 2);
}

/// Fails when two threads get one buffer.
#[test]
fn threads_take_and_give_back() {
    let opened = opened();
    let pool = DmaPool::new(&opened.endpoint, 70, 64, Direction::Both).unwrap();
    thread::scope(|scope| {
        for me in 1..=4u8 {
            let pool = &pool;
            scope.spawn(move || {
                for round in 0..3000 {
                    let mut mine: Vec<_> = (0..round % 25).map_while(|_| pool.take()).collect();
                    for buffer in &mut mine {
                        buffer.write(0, &[me; 64]).unwrap();
                    }
                    for buffer in &mine {
                        let mut bytes = [0; 64];
                        buffer.read(0, &mut bytes).unwrap();
                        assert_eq!(bytes, [me; 64]);
                    }
                }
            });
        }
    });
    assert_eq!(pool.out(), 0);
    assert!(pool.take().unwrap().iova().get().is_multiple_of(64));
    assert_eq!(PAGE, opened.endpoint.granule());
}
