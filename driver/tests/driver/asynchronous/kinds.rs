//! Every operation that there is as a future, with what it needs.

use std::fmt::Debug;

use virtio_iommu::{Direction, DmaDevice, EndpointOptions, Iova};

use super::{AT, Bench, UNKNOWN};
use crate::support::{ANYWHERE, EP2, PAGE, RW, Task};

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Blocking,
    Asynchronous,
}

pub(super) type Start = Box<dyn for<'a> Fn(&'a Bench, Way) -> Task<'a, String>>;

/// One operation. Its result is what can be compared of it, as text.
pub(super) struct Kind {
    pub(super) name: &'static str,
    /// Prepares, and gives the operation as a future that was not polled yet.
    pub(super) start: Start,
}

/// Prepares, then blocks or makes a future. The future must not be wrapped before it is made: what it does when it is
/// dropped at once would be lost.
fn kind<S: Send + 'static>(
    name: &'static str,
    prepare: impl Fn(&Bench) -> S + 'static,
    blocking: impl Fn(&Bench, S) -> String + Send + Copy + 'static,
    asynchronous: impl for<'a> Fn(&'a Bench, S) -> Task<'a, String> + 'static,
) -> Kind {
    let start: Start = Box::new(move |bench, way| {
        let prepared = prepare(bench);
        match way {
            Way::Blocking => Task::new(async move { blocking(bench, prepared) }),
            Way::Asynchronous => asynchronous(bench, prepared),
        }
    });
    Kind { name, start }
}

fn show(result: impl Debug) -> String {
    format!("{result:?}")
}

/// Like `async move { show(future.await) }`, with the future made outside.
macro_rules! shown {
    ($future:expr) => {{
        let future = $future;
        Task::new(async move { show(future.await) })
    }};
    ($future:expr, $as:expr) => {{
        let future = $future;
        Task::new(async move { show(future.await.map($as).map_err(drop)) })
    }};
}

fn bounce() -> EndpointOptions {
    EndpointOptions { bounce_bytes: 4096, ..EndpointOptions::default() }
}

const SEGMENTS: usize = 6;

/// Leaves the other domain dead, with two mappings.
fn with_dead_domain(bench: &Bench) {
    bench.viommu.attach(EP2, &bench.other).unwrap();
    for page in [0, 2] {
        let iova = Iova::new(AT.get() + page * PAGE);
        // SAFETY: the test's own memory, which is never reused.
        unsafe { bench.other.map_at(iova, bench.phys(page), PAGE, RW) }.unwrap();
        bench.kept.lock().unwrap().push((iova, PAGE));
    }
    bench.viommu.detach(EP2).unwrap();
}

pub(super) fn kinds() -> Vec<Kind> {
    let mut kinds = of_viommu();
    kinds.extend(of_domain());
    kinds.extend(of_endpoint());
    kinds
}

fn of_viommu() -> Vec<Kind> {
    vec![
        kind(
            "attach",
            |_| (),
            |bench, ()| show(bench.viommu.attach(EP2, &bench.other)),
            |bench, ()| shown!(bench.viommu.attach_async(EP2, &bench.other)),
        ),
        kind(
            "attach an endpoint that is not known",
            |_| (),
            |bench, ()| show(bench.viommu.attach(UNKNOWN, &bench.other)),
            |bench, ()| shown!(bench.viommu.attach_async(UNKNOWN, &bench.other)),
        ),
        kind(
            "attach to a domain that died",
            with_dead_domain,
            |bench, ()| show(bench.viommu.attach(EP2, &bench.other)),
            |bench, ()| shown!(bench.viommu.attach_async(EP2, &bench.other)),
        ),
        kind(
            "detach",
            |bench| bench.viommu.attach(EP2, &bench.other).unwrap(),
            |bench, ()| show(bench.viommu.detach(EP2)),
            |bench, ()| shown!(bench.viommu.detach_async(EP2)),
        ),
        kind(
            "move_endpoint",
            |bench| bench.viommu.attach(EP2, &bench.domain).unwrap(),
            |bench, ()| show(bench.viommu.move_endpoint(EP2, &bench.other)),
            |bench, ()| shown!(bench.viommu.move_endpoint_async(EP2, &bench.other)),
        ),
        kind(
            "open",
            |_| (),
            |bench, ()| {
                show(bench.viommu.open(EP2, &bench.other, bounce()).map(|opened| opened.faulting_iova()))
            },
            |bench, ()| {
                let future = bench.viommu.open_async(EP2, &bench.other, bounce());
                Task::new(async move { show(future.await.map(|opened| opened.faulting_iova())) })
            },
        ),
    ]
}

fn of_domain() -> Vec<Kind> {
    vec![
        kind(
            "Domain::map",
            |_| (),
            // SAFETY: the test's own memory, which is never reused, and its own mappings.
            |bench, ()| show(unsafe { bench.domain.map(bench.phys(0), PAGE, RW, ANYWHERE) }),
            // SAFETY: the test's own memory, which is never reused, and its own mappings.
            |bench, ()| shown!(unsafe { bench.domain.map_async(bench.phys(0), PAGE, RW, ANYWHERE) }),
        ),
        kind(
            "Domain::map_at",
            |_| (),
            // SAFETY: the test's own memory, which is never reused, and its own mappings.
            |bench, ()| show(unsafe { bench.domain.map_at(AT, bench.phys(0), PAGE, RW) }),
            // SAFETY: the test's own memory, which is never reused, and its own mappings.
            |bench, ()| shown!(unsafe { bench.domain.map_at_async(AT, bench.phys(0), PAGE, RW) }),
        ),
        kind(
            "Domain::unmap",
            // SAFETY: the test's own memory, which is never reused, and its own mappings.
            |bench| unsafe { bench.domain.map_at(AT, bench.phys(0), PAGE, RW) }.unwrap(),
            // SAFETY: the test's own memory, which is never reused, and its own mappings.
            |bench, ()| show(unsafe { bench.domain.unmap(AT, PAGE) }),
            // SAFETY: the test's own memory, which is never reused, and its own mappings.
            |bench, ()| shown!(unsafe { bench.domain.unmap_async(AT, PAGE) }),
        ),
    ]
}

fn of_endpoint() -> Vec<Kind> {
    let both = Direction::Both;
    vec![
        kind(
            "alloc_coherent",
            |_| (),
            |bench, ()| show(bench.endpoint.alloc_coherent(100).map(|memory| memory.iova())),
            |bench, ()| shown!(bench.endpoint.alloc_coherent_async(100), |memory| memory.iova()),
        ),
        kind(
            "free_coherent",
            |bench| bench.endpoint.alloc_coherent(100).unwrap(),
            |bench, memory| show(bench.endpoint.free_coherent(memory)),
            |bench, memory| shown!(bench.endpoint.free_coherent_async(memory)),
        ),
        kind(
            "adopt",
            Bench::lend,
            move |bench, held| show(bench.endpoint.adopt(held, both).map(|m| m.iova()).map_err(drop)),
            move |bench, held| shown!(bench.endpoint.adopt_async(held, both), |mapping| mapping.iova()),
        ),
        kind(
            "Endpoint::map",
            |_| (),
            // SAFETY: the test's own memory, which is never reused, and its own mappings.
            move |bench, ()| show(unsafe { bench.endpoint.map(bench.phys(0), 9, both) }.map(|m| m.iova())),
            move |bench, ()| {
                // SAFETY: the test's own memory, which is never reused, and its own mappings.
                shown!(unsafe { bench.endpoint.map_async(bench.phys(0), 9, both) }, |mapping| mapping.iova())
            },
        ),
        kind(
            "map_resource",
            |_| (),
            move |bench, ()| {
                // SAFETY: the test's own memory, which is never reused, and its own mappings.
                let mapped = unsafe { bench.endpoint.map_resource(bench.phys(0), 9, both) };
                show(mapped.map(|mapping| mapping.iova()))
            },
            move |bench, ()| {
                // SAFETY: the test's own memory, which is never reused, and its own mappings.
                let future = unsafe { bench.endpoint.map_resource_async(bench.phys(0), 9, both) };
                shown!(future, |mapping| mapping.iova())
            },
        ),
        kind(
            "map_scatter",
            |bench| bench.segments(SEGMENTS as u64),
            move |bench, segments| {
                let mut iovas = [Iova::new(0); SEGMENTS];
                // SAFETY: the test's own memory, which is never reused, and its own mappings.
                let mapped = unsafe { bench.endpoint.map_scatter(&segments, both, &mut iovas) };
                show(mapped.map(|mapping| (mapping.iova(), iovas)))
            },
            move |bench, segments| {
                Task::new(async move {
                    let mut iovas = [Iova::new(0); SEGMENTS];
                    // SAFETY: the test's own memory, which is never reused, and its own mappings.
                    let mapping = unsafe { bench.endpoint.map_scatter_async(&segments, both, &mut iovas) };
                    let mapped = mapping.await;
                    show(mapped.map(|mapping| (mapping.iova(), iovas)))
                })
            },
        ),
        kind(
            "Endpoint::unmap",
            move |bench| bench.endpoint.adopt(bench.lend(), both).map_err(|(error, _)| error).unwrap(),
            |bench, mapping| show(bench.endpoint.unmap(mapping)),
            |bench, mapping| shown!(bench.endpoint.unmap_async(mapping)),
        ),
        kind(
            "unmap a list",
            move |bench| {
                let mut iovas = [Iova::new(0); SEGMENTS];
                let segments = bench.segments(SEGMENTS as u64);
                // SAFETY: the test's own memory, which is never reused, and its own mappings.
                unsafe { bench.endpoint.map_scatter(&segments, both, &mut iovas) }.unwrap()
            },
            |bench, mapping| show(bench.endpoint.unmap(mapping)),
            |bench, mapping| shown!(bench.endpoint.unmap_async(mapping)),
        ),
    ]
}
