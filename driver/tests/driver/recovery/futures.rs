//! Operations that a recovery, or a reset of the queue, finds half-way.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use virtio_iommu::{Direction, DmaDevice, DmaError, MapError, RequestError, UnmapError};
use virtio_iommu_model::{Config, Execute, Inject};

use super::{Bench, bench};
use crate::support::{EP, PAGE};

/// A future that somebody polls, and how often it was woken.
pub(super) struct Task<'a, T> {
    future: Option<Pin<Box<dyn Future<Output = T> + 'a>>>,
    woken: Arc<Count>,
}

#[derive(Default)]
struct Count(AtomicUsize);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl<'a, T> Task<'a, T> {
    /// Polls it for the first time.
    pub(super) fn start(future: impl Future<Output = T> + 'a) -> Self {
        let mut task = Self { future: Some(Box::pin(future)), woken: Arc::default() };
        assert!(task.poll().is_none(), "it is done already");
        task
    }

    pub(super) fn poll(&mut self) -> Option<T> {
        let waker = Waker::from(Arc::clone(&self.woken));
        match self.future.as_mut()?.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(result) => {
                self.future = None;
                Some(result)
            }
            Poll::Pending => None,
        }
    }

    pub(super) fn is_woken(&self) -> bool {
        self.woken.0.load(Ordering::Relaxed) > 0
    }
}

/// How a device gets its requests back.
fn both(bench: &Bench, round: usize) {
    if round == 0 {
        bench.recover().unwrap();
    } else {
        bench.viommu.reset_queues().unwrap();
        bench.viommu.reclaim();
    }
}

/// Fails when a list that is rolled back, or dropped, takes what it finds at its addresses for its own: its memory was
/// free, and given to somebody else, before it was polled again.
#[test]
fn i02_a_map_that_was_overtaken_leaves_its_addresses_to_others() {
    for (round, dropped) in [(0, false), (0, true), (1, false), (1, true)] {
        let bench = bench(Config::default());
        let (held, phys) = bench.machine.lend(PAGE);
        bench.machine.inject([Inject::Drop(Execute::AtRelease)]);
        let mut task = Task::start(bench.endpoint.adopt_async(held, Direction::Both));
        let free = bench.domain.mapping_count();
        both(&bench, round);
        assert!(task.is_woken());
        assert!(bench.machine.is_lent_back(phys));
        assert_eq!(bench.domain.mapping_count(), free - 2, "with what was stuck");
        let other = bench.endpoint.alloc_coherent(PAGE as usize).unwrap();
        assert_eq!(other.iova().get(), bench.stuck_at, "where the allocator looks first");
        let third = bench.endpoint.alloc_coherent(PAGE as usize).unwrap();
        if dropped {
            drop(task);
        } else {
            let Some(Err((DmaError::Map(error), None))) = task.poll() else { panic!("it has an end") };
            assert!(matches!(error, MapError::Quarantined { error: RequestError::Reset, .. }), "{error}");
        }
        for memory in [other, third] {
            assert!(bench.machine.reaches(EP, memory.iova().get()));
            assert_eq!(bench.viommu.reclaim(), 0);
            bench.endpoint.free_coherent(memory).unwrap();
        }
    }
}

/// Fails when an unmapping that is dropped after its end gives up what is at its addresses by then.
#[test]
fn i02_an_unmap_that_was_overtaken_leaves_its_addresses_to_others() {
    for (round, dropped) in [(0, false), (0, true), (1, false), (1, true)] {
        let bench = bench(Config::default());
        let (held, phys) = bench.machine.lend(PAGE);
        let mapping = bench.endpoint.adopt(held, Direction::Both).unwrap();
        bench.machine.inject([Inject::Drop(Execute::AtRelease)]);
        let mut task = Task::start(bench.endpoint.unmap_async(mapping));
        both(&bench, round);
        assert!(task.is_woken() && bench.machine.is_lent_back(phys));
        let others = [(); 2].map(|()| bench.endpoint.alloc_coherent(PAGE as usize).unwrap());
        if dropped {
            drop(task);
        } else {
            let unmapped = task.poll().unwrap();
            assert!(matches!(unmapped, Err(UnmapError::Request { error: RequestError::Reset, .. })));
        }
        for memory in others {
            assert_eq!(bench.viommu.reclaim(), 0);
            assert!(bench.machine.reaches(EP, memory.iova().get()));
            bench.endpoint.free_coherent(memory).unwrap();
        }
    }
}
