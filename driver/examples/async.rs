//! Operations as futures: two mappings under way at once, answers that come late, wakers, and a future that is dropped.
//!
//! `cargo run -p virtio-iommu --example async`

#[expect(dead_code, reason = "no device does DMA here")]
mod support;

use std::error::Error;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use support::{DISK, Machine};
use virtio_iommu::{Direction, DmaDevice, DomainOptions, EndpointOptions, Platform};
use virtio_iommu_model::{Execute, Inject};

/// What an executor does when a task can go on: here it counts.
#[derive(Default)]
struct Bell(AtomicUsize);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let (machine, viommu) = Machine::start()?;
    let domain = viommu.create_domain(DomainOptions::default())?;
    let disk = viommu.open(DISK, &domain, EndpointOptions::default())?;
    let page = machine.dma_alloc(4096, 4096).ok_or("no memory")?;
    let bell = Arc::new(Bell::default());
    let waker = Waker::from(Arc::clone(&bell));
    let mut context = Context::from_waker(&waker);

    // The device takes its time.
    machine.iommu().inject.script.extend([Inject::Hold(Execute::AtRelease); 2]);
    let mut ring = pin!(disk.alloc_coherent_async(4096));
    // SAFETY: a fresh page, which nobody else uses.
    let mut buffer = pin!(unsafe { disk.map_async(page.phys, page.len, Direction::Both) });
    let waiting =
        (ring.as_mut().poll(&mut context).is_pending(), buffer.as_mut().poll(&mut context).is_pending());
    println!("both are sent and wait: {waiting:?}");
    viommu.poll();
    println!("wake-ups so far: {}", bell.0.load(Ordering::Relaxed));

    // It answers, and interrupts. The handler takes no lock; what it wakes calls `poll`.
    let answered = machine.answer();
    println!("the device answered {answered}: {:?}", viommu.on_interrupt());
    viommu.poll();
    println!("wake-ups now: {}", bell.0.load(Ordering::Relaxed));
    let Poll::Ready(ring) = ring.as_mut().poll(&mut context) else { return Err("the ring waits".into()) };
    let Poll::Ready(buffer) = buffer.as_mut().poll(&mut context) else {
        return Err("the buffer waits".into());
    };
    let (ring, buffer) = (ring?, buffer?);
    println!("the ring is at {}, the buffer at {}", ring.iova(), buffer.iova());

    // A task that is cancelled leaves its request with the device, and what it touches in quarantine.
    machine.iommu().inject.script.push_back(Inject::Hold(Execute::AtRelease));
    {
        let mut dropped = pin!(disk.unmap_async(buffer));
        assert!(dropped.as_mut().poll(&mut context).is_pending());
    }
    println!("dropped while unmapping: {} mapping in quarantine", viommu.stats().quarantined_mappings);
    machine.answer();
    viommu.poll();
    println!("after the answer: {}", viommu.stats().quarantined_mappings);

    disk.free_coherent(ring)?;
    Ok(())
}
