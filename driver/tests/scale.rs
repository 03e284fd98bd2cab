//! A million mappings at a time: what they take, and that they all come back.
//!
//! `LIVE=n` keeps so many alive instead of a million, or instead of a few thousand without optimization.

#[path = "driver/support/mod.rs"]
#[expect(dead_code, unused_imports, reason = "made for all tests of the driver")]
mod support;

use std::alloc::{GlobalAlloc, Layout};
use std::collections::HashSet;
use std::env;
use std::sync::atomic::{AtomicUsize, Ordering};

use support::{ANYWHERE, EP, Machine, PAGE, RW, Rng, WatchedHeap, heap_uses, outside};
use virtio_iommu::{Domain, DomainOptions, Iova, MappingStatus};
use virtio_iommu_model::Config;

/// Counts the bytes that are allocated, the tests' own included.
struct CountedHeap;

static BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: passed on as it is.
unsafe impl GlobalAlloc for CountedHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { WatchedHeap.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        BYTES.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { WatchedHeap.dealloc(ptr, layout) };
    }
}

#[global_allocator]
static HEAP: CountedHeap = CountedHeap;

fn live() -> usize {
    let few = if cfg!(debug_assertions) { 20_000 } else { 1_000_000 };
    env::var("LIVE").map_or(few, |text| text.parse().expect("LIVE is a number"))
}

/// The only test of this process, since it counts all of its heap. Fails when records, which take 88 bytes, grow by 8, when
/// free addresses take memory of their own, and when mapping or unmapping allocates.
#[test]
fn a_million_mappings_take_96_bytes_each_and_come_back_as_one_range() {
    let live = live();
    let machine = Machine::new(Config::default());
    let viommu = machine.bring_up();
    let before = BYTES.load(Ordering::Relaxed);
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    domain.reserve(live);
    let bytes = BYTES.load(Ordering::Relaxed) - before;
    viommu.attach(EP, &domain).unwrap();
    let memory = machine.memory(PAGE);

    let mut mapped: Vec<Iova> = Vec::with_capacity(live);
    let ((), uses) = heap_uses(|| {
        for _ in 0..live {
            // SAFETY: nobody but the test uses the memory.
            let at = unsafe { domain.map(memory.phys, PAGE, RW, ANYWHERE) }.unwrap();
            mapped.push(at);
            forget_log(&machine);
        }
    });
    assert_eq!(uses, 0, "mapping allocates nothing");
    assert_eq!(domain.mapping_count(), live);
    let distinct: HashSet<_> = mapped.iter().map(|at| at.get()).collect();
    assert!(distinct.len() == live && !distinct.contains(&0));
    let dense = mapped.iter().zip(&mapped[1..]).all(|(high, low)| low.get() + PAGE == high.get());
    assert!(dense, "from the top down, without holes");

    let mut rng = Rng::new(0x5eed);
    for at in (1..live).rev() {
        mapped.swap(at, rng.below(at as u64 + 1) as usize);
    }
    let (last, rest) = mapped.split_last().unwrap();
    let ((), uses) = heap_uses(|| {
        for at in rest {
            // SAFETY: mapped above.
            unsafe { domain.unmap(*at, PAGE) }.unwrap();
            forget_log(&machine);
        }
    });
    assert_eq!(uses, 0, "unmapping allocates nothing");
    assert_eq!(left(&domain), [*last]);
    // SAFETY: mapped above.
    unsafe { domain.unmap(*last, PAGE) }.unwrap();
    // What came back in pieces is one range.
    let (lowest, len) = (*mapped.iter().min().unwrap(), live as u64 * PAGE);
    let physical = virtio_iommu::PhysAddr::new(0);
    // SAFETY: no endpoint uses it.
    unsafe { domain.map_at(lowest, physical, len, RW) }.unwrap();

    let each = bytes as f64 / live as f64;
    println!("{live} mappings: {each:.2} bytes each");
    // Records for what is reserved and for what endpoints take, which do not depend on their number, count among few.
    let fixed = if live < 1_000_000 { (64 + 256) * 96 } else { 0 };
    assert!(bytes < 96 * live + fixed, "{each:.2} bytes each");
}

/// The model keeps all requests.
fn forget_log(machine: &Machine) {
    outside(|| machine.device().clear_log());
}

fn left(domain: &Domain<support::TestPlatform>) -> Vec<Iova> {
    let mappings = domain.mappings().inspect(|mapping| assert_eq!(mapping.status, MappingStatus::Mapped));
    mappings.map(|mapping| mapping.range.start()).collect()
}
