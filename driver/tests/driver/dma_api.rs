//! An endpoint as the backend of the `dma-api` crate.

use std::alloc::Layout;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use dma_api::{
    CoherentArray, DeviceDma, DmaAddr, DmaAllocHandle, DmaCoherency, DmaConstraints, DmaDirection,
    DmaDomainId, DmaError, DmaMapHandle, DmaOp,
};
use virtio_iommu::bridge::dma_api_0_10::{Failure, IommuDma};
use virtio_iommu::{DmaMemory, DomainOptions, EndpointOptions, MapError, PhysAddr, UnmapError, Viommu};
use virtio_iommu_model::{Config, Execute, Inject, Release};

use crate::support::{EP, Machine, PAGE, POISON, TestPlatform, outside};

/// The kernel's own backend: the machine's memory, poisoned, by physical addresses.
#[derive(Default)]
struct Kernel {
    machine: Mutex<Option<Arc<Machine>>>,
    /// Blocks that it gave, by kind: contiguous and coherent.
    given: [AtomicUsize; 2],
    back: [AtomicUsize; 2],
    flushed: AtomicUsize,
    invalidated: AtomicUsize,
    /// Physical addresses that allocations were synchronized by.
    synced: Mutex<Vec<u64>>,
}

impl Kernel {
    fn alloc(&self, kind: usize, layout: Layout) -> Option<DmaAllocHandle> {
        outside(|| {
            let memory = self.machine.lock().unwrap().as_ref()?.memory(layout.size() as u64);
            crate::support::fill(&memory, POISON);
            self.given[kind].fetch_add(1, Ordering::Relaxed);
            assert!(memory.phys.get().is_multiple_of(layout.align() as u64), "the machine aligns to 64 KiB");
            // SAFETY: a fresh block.
            Some(unsafe { DmaAllocHandle::new(memory.ptr, memory.ptr, memory.phys.get().into(), layout) })
        })
    }

    fn dealloc(&self, kind: usize, handle: DmaAllocHandle) {
        outside(|| {
            let phys = PhysAddr::new(handle.dma_addr().as_u64());
            let memory = DmaMemory { phys, ptr: handle.allocation_ptr(), len: handle.size() };
            self.machine.lock().unwrap().as_ref().unwrap().give_back(memory);
            self.back[kind].fetch_add(1, Ordering::Relaxed);
        });
    }

    /// Blocks that are out: contiguous and coherent.
    fn out(&self) -> (usize, usize) {
        let out =
            |kind: usize| self.given[kind].load(Ordering::Relaxed) - self.back[kind].load(Ordering::Relaxed);
        (out(0), out(1))
    }
}

impl DmaOp for Kernel {
    fn page_size(&self) -> usize {
        PAGE as usize
    }
    unsafe fn alloc_contiguous(&self, constraints: DmaConstraints, layout: Layout) -> Option<DmaAllocHandle> {
        assert_eq!(constraints.addr_mask, u64::MAX, "the device's mask is not for physical addresses");
        self.alloc(0, layout)
    }
    unsafe fn dealloc_contiguous(&self, handle: DmaAllocHandle) {
        self.dealloc(0, handle);
    }
    unsafe fn alloc_coherent(&self, _constraints: DmaConstraints, layout: Layout) -> Option<DmaAllocHandle> {
        self.alloc(1, layout)
    }
    unsafe fn dealloc_coherent(&self, handle: DmaAllocHandle) -> Result<(), DmaError> {
        self.dealloc(1, handle);
        Ok(())
    }
    unsafe fn map_streaming(
        &self,
        _constraints: DmaConstraints,
        _addr: NonNull<u8>,
        _size: NonZeroUsize,
        _direction: DmaDirection,
    ) -> Result<DmaMapHandle, DmaError> {
        unreachable!("buffers bounce")
    }
    unsafe fn unmap_streaming(&self, _handle: DmaMapHandle) {
        unreachable!("buffers bounce")
    }
    fn flush(&self, _addr: NonNull<u8>, _size: usize) {
        self.flushed.fetch_add(1, Ordering::Relaxed);
    }
    fn invalidate(&self, _addr: NonNull<u8>, _size: usize) {
        self.invalidated.fetch_add(1, Ordering::Relaxed);
    }
    fn sync_alloc_for_device(&self, handle: &DmaAllocHandle, _: usize, _: usize, _: DmaDirection) {
        outside(|| self.synced.lock().unwrap().push(handle.dma_addr().as_u64()));
    }
}

/// A machine, its kernel's backend, and ours over it. Backends live for ever; the machine ends with the test.
struct World {
    machine: Arc<Machine>,
    viommu: Viommu<TestPlatform>,
    kernel: &'static Kernel,
    backend: &'static IommuDma<TestPlatform>,
}

impl Drop for World {
    fn drop(&mut self) {
        *self.kernel.machine.lock().unwrap() = None;
    }
}

fn world(bounce_bytes: usize) -> World {
    let (machine, viommu) = Machine::live(Config::default());
    let machine = Arc::new(machine);
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    let endpoint = viommu.open(EP, &domain, EndpointOptions { bounce_bytes, ..Default::default() }).unwrap();
    let kernel: &'static Kernel = Box::leak(Box::default());
    *kernel.machine.lock().unwrap() = Some(Arc::clone(&machine));
    World { machine, viommu, kernel, backend: Box::leak(Box::new(IommuDma::new(endpoint, kernel))) }
}

impl World {
    fn device(&self, constraints: DmaConstraints) -> DeviceDma {
        self.backend.device(DmaCoherency::Coherent, constraints)
    }
}

const ANY: DmaConstraints = DmaConstraints::new(u64::MAX);

#[test]
fn allocations_are_the_kernels_mapped_cleared_and_given_back() {
    let world = world(0);
    let device = world.device(ANY);
    assert!(matches!(device.info().domain(), DmaDomainId::Translated(_)));
    assert_eq!(device.page_size(), 4096);
    let mut ring: CoherentArray<u8> = device.coherent_array_zero(100).unwrap();
    let at = ring.dma_addr().as_u64();
    ring.set_cpu(3, 7);
    assert_eq!(world.machine.dma_read(EP, at, 4).unwrap(), [0, 0, 0, 7]);
    // What else is in the granule was the kernel's.
    assert_eq!(world.machine.dma_read(EP, at, PAGE as usize).unwrap()[100..], [0; PAGE as usize - 100]);
    world.machine.dma_write(EP, at + 1, &[9]).unwrap();
    assert_eq!(ring.read_cpu(1), Some(9));
    let mut data =
        device.contiguous_array_zero_with_align::<u64>(1024, 64, DmaDirection::Bidirectional).unwrap();
    data.set_cpu(0, 5);
    assert_eq!(world.machine.dma_read(EP, data.dma_addr().as_u64(), 1).unwrap(), [5]);
    assert_eq!(world.kernel.out(), (2, 0));
    drop((ring, data));
    assert_eq!(world.kernel.out(), (0, 0));
    assert!(!world.machine.reaches(EP, at));
    assert_eq!(world.backend.take_failure(), None);
}

/// Fails when the caches of a device that is not coherent are left alone, or the kernel is given the device's addresses.
#[test]
fn caches_are_the_kernels_business_by_its_own_addresses() {
    let world = world(4 * PAGE as usize);
    let device = world.backend.device(DmaCoherency::NonCoherent, ANY);
    let ring: CoherentArray<u32> = device.coherent_array_zero(4).unwrap();
    assert_eq!(world.kernel.out(), (0, 1), "its coherent memory");
    let data = device.contiguous_array_zero::<u8>(64, DmaDirection::ToDevice).unwrap();
    data.prepare_for_device(0..64);
    let synced = world.kernel.synced.lock().unwrap().clone();
    assert_eq!(synced, [data.as_ptr().addr().get() as u64], "physical, as its memory is here");
    assert_ne!(synced, [data.dma_addr().as_u64()]);
    let mut buffer = [1_u8; 32];
    let before = world.kernel.flushed.load(Ordering::Relaxed);
    let map = device.map_streaming_slice_for_device(&mut buffer, 1, DmaDirection::Bidirectional).unwrap();
    assert!(world.kernel.flushed.load(Ordering::Relaxed) > before + 1, "after zeroing, and after copying");
    map.complete_for_cpu(0..32);
    assert_eq!(world.kernel.invalidated.load(Ordering::Relaxed), 1);
    drop((map, data, ring));
    assert_eq!(world.kernel.out(), (0, 0));
}

#[test]
fn streaming_mappings_bounce_through_pages_that_are_mapped_already() {
    let world = world(4 * PAGE as usize);
    let device = world.device(ANY);
    let mut buffer = [3_u8; 100];
    let (map, requests, _) = world.machine.traffic(|| {
        device.map_streaming_slice_for_device(&mut buffer, 1, DmaDirection::Bidirectional).unwrap()
    });
    assert_eq!(requests, 0);
    let at = map.dma_addr().as_u64();
    assert_eq!(world.machine.dma_read(EP, at, 101).unwrap()[98..], [3, 3, 0], "and not its neighbours");
    world.machine.dma_write(EP, at + 50, &[4]).unwrap();
    assert_eq!(map.read_cpu(50), Some(3), "not before it is synchronized");
    map.complete_for_cpu(0..100);
    assert_eq!(map.read_cpu(50), Some(4));
    drop(map);
    // The next one does not see what this one left there.
    let mut next = [0_u8; 100];
    let map = device.map_streaming_slice(&mut next, 1, DmaDirection::FromDevice).unwrap();
    assert_eq!(map.dma_addr().as_u64(), at, "the same pages");
    map.complete_for_cpu(0..100);
    assert_eq!(map.to_vec_cpu(), [0; 100]);
}

/// Fails when pages that do not meet the constraints are taken, or fresh ones are not given back.
#[test]
fn streaming_mappings_get_fresh_pages_where_the_others_do_not_fit() {
    let world = world(4 * PAGE as usize);
    let before = world.viommu.stats().quarantined_mappings;
    for constraints in [DmaConstraints::new(0xff_ffff), ANY.with_align(0x10_0000)] {
        let device = world.device(constraints);
        let mut buffer = [6_u8; 5000];
        let map = device.map_streaming_slice_for_device(&mut buffer, 1, DmaDirection::ToDevice).unwrap();
        let at = map.dma_addr().as_u64();
        assert!(at + 4999 <= constraints.addr_mask && at.is_multiple_of(constraints.align as u64));
        assert_eq!(world.machine.dma_read(EP, at + 4999, 1).unwrap(), [6]);
        assert!(world.machine.dma_write(EP, at, &[1]).is_err(), "to the device only");
        assert_eq!(world.kernel.out(), (1, 0));
        drop(map);
        assert_eq!((world.kernel.out(), world.machine.reaches(EP, at)), ((0, 0), false));
    }
    assert_eq!(world.viommu.stats().quarantined_mappings, before);
}

#[test]
fn constraints_are_met_or_named() {
    let world = world(0);
    for bits in [24, 32, 39, 48, 64] {
        let mask = u64::MAX >> (64 - bits);
        let data =
            world.device(DmaConstraints::new(mask)).contiguous_box_zero::<[u8; 8192]>(DmaDirection::ToDevice);
        let at = data.unwrap().dma_addr().as_u64();
        assert!(at + 8191 <= mask, "{at:#x} with {bits} bits");
    }
    // Each next one would lie across the boundary if nothing saw to it.
    let device = world.device(ANY.with_boundary(0x4000).with_max_segment_size(0x3000));
    let blocks: Vec<_> =
        (0..8).map(|_| device.contiguous_array_zero::<u8>(0x3000, DmaDirection::ToDevice).unwrap()).collect();
    for block in &blocks {
        let at = block.dma_addr().as_u64();
        assert_eq!(at / 0x4000, (at + 0x2fff) / 0x4000, "{at:#x}");
    }
    let fails = |constraints, len| {
        let mut buffer = vec![0_u8; len];
        let error = world.device(constraints).map_streaming_slice(&mut buffer, 1, DmaDirection::ToDevice);
        let error = error.err().unwrap();
        assert_eq!(world.backend.take_failure(), Some(Failure::Constraints(error.clone())));
        error
    };
    assert_eq!(fails(ANY.with_max_segment_size(99), 100), DmaError::SegmentTooLarge { size: 100, max: 99 });
    let crossing = DmaError::BoundaryCross { addr: DmaAddr::from(0), size: 4097, boundary: 4096 };
    assert_eq!(fails(ANY.with_boundary(4096), 4097), crossing);
    let odd = DmaConstraints { align: 3, ..ANY };
    let mut byte = [0_u8; 2];
    assert!(
        world.device(odd).map_streaming_slice(&mut byte, 1, DmaDirection::ToDevice).is_err(),
        "no layout"
    );
    // Below the mask there is nothing.
    let nowhere = DmaConstraints::new(0xfff);
    let none = world.device(nowhere).contiguous_array_zero::<u8>(1, DmaDirection::ToDevice);
    assert_eq!(none.err(), Some(DmaError::NoMemory));
    let failure = world.backend.take_failure();
    assert!(
        matches!(failure, Some(Failure::Map(virtio_iommu::DmaError::Map(MapError::IovaExhausted { .. })))),
        "{failure:?}"
    );
    drop(blocks);
    assert_eq!(world.kernel.out(), (0, 0), "what was not mapped went back");
}

/// Fails when `allocate` gives the memory of an unclear MAP back, or keeps that of a refused one.
#[test]
fn memory_that_cannot_be_mapped_goes_back_unless_it_may_be() {
    let world = world(0);
    let device = world.device(ANY);
    world.machine.inject([Inject::Refuse(8)]);
    assert_eq!(device.coherent_array_zero::<u8>(1).err(), Some(DmaError::NoMemory));
    assert_eq!(world.kernel.out(), (0, 0));
    let failure = world.backend.take_failure().unwrap().to_string();
    assert!(failure.contains("NOMEM"), "{failure}");

    world.machine.inject([Inject::Hold(Execute::Now)]);
    assert_eq!(device.coherent_array_zero::<u8>(1).err(), Some(DmaError::NoMemory));
    assert_eq!(world.kernel.out(), (1, 0), "the device may have it");
    world.machine.release(Release::All);
    world.viommu.poll();
    world.viommu.reclaim();
    assert_eq!(world.kernel.out(), (0, 0));

    let none = device.coherent_array_zero::<u8>(0);
    assert!(none.is_err(), "nothing is not mapped");
    *world.kernel.machine.lock().unwrap() = None;
    assert_eq!(device.coherent_array_zero::<u8>(1).err(), Some(DmaError::NoMemory));
    assert_eq!(world.backend.take_failure(), Some(Failure::NoMemory { len: PAGE as usize }));
}

/// Fails when memory goes back whatever came of its UNMAP.
#[test]
fn memory_whose_release_is_not_confirmed_is_in_quarantine() {
    let world = world(0);
    for (coherency, out) in [(DmaCoherency::Coherent, (1, 0)), (DmaCoherency::NonCoherent, (0, 1))] {
        let device = world.backend.device(coherency, ANY);
        let ring: CoherentArray<u8> = device.coherent_array_zero(16).unwrap();
        let at = ring.dma_addr().as_u64();
        world.machine.inject([Inject::Hold(Execute::AtRelease)]);
        drop(ring);
        assert_eq!(world.kernel.out(), out);
        assert!(world.machine.reaches(EP, at));
        let failure = world.backend.take_failure();
        assert!(matches!(failure, Some(Failure::Unmap(UnmapError::Request { .. }))), "{failure:?}");
        world.machine.release(Release::All);
        world.viommu.poll();
        assert_eq!((world.kernel.out(), world.machine.reaches(EP, at)), ((0, 0), false));
    }
    // And the backend's own word for it.
    let layout = Layout::from_size_align(64, 8).unwrap();
    // SAFETY: released once below.
    let handle = unsafe { world.backend.alloc_coherent(ANY, layout) }.unwrap();
    world.machine.inject([Inject::Hold(Execute::AtRelease)]);
    // SAFETY: as above.
    let released = unsafe { world.backend.dealloc_coherent(handle) };
    assert_eq!(released, Err(DmaError::CoherentReleaseFailed));
    world.machine.release(Release::All);
    world.viommu.poll();
    assert_eq!(world.kernel.out(), (0, 0));
}
