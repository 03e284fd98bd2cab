//! The virtio-iommu in this kernel: what the driver needs of it, and the order of bring-up.
//!
//! This is the worked example of how to embed the driver, from top to bottom: a [`Platform`] of three methods, and the
//! order of bring-up. What firmware says about endpoints is read in [`topology`], and the device's registers are mapped in
//! `registers`.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ptr::NonNull;

use virtio_iommu::transport::Transport;
use virtio_iommu::{
    DmaMemory, EndpointId, Introduction, Options, PhysAddr, Platform, SpinNotInInterrupts, StartError, Viommu,
};

use crate::machine::Machine;
use crate::memory::frames::{self, FRAME_BYTES};
use crate::memory::phys_to_virt;
use crate::pci::PciAddress;
use crate::pci::function::{BusMaster, Function};
use crate::time;

mod error;
mod group;
pub mod interrupt;
mod registers;
pub mod topology;

pub use error::BringUpError;
pub use registers::transport;
#[cfg(feature = "contexts")]
pub use registers::transport_apart;
use topology::{Place, Source, Topology};

/// This kernel, as the driver sees it: frames, a spin lock (handlers of interrupts do not map, unmap or poll), a clock.
#[derive(Clone, Copy, Debug)]
pub struct KernelPlatform;

// SAFETY: the frame allocator gives zeroed, mapped, contiguous frames to one owner at a time.
unsafe impl Platform for KernelPlatform {
    type Lock = SpinNotInInterrupts;

    fn dma_alloc(&self, len: usize, align: usize) -> Option<DmaMemory> {
        let frame = FRAME_BYTES as usize;
        let count = len.div_ceil(frame);
        let phys = frames::allocate(count, align.div_ceil(frame)).ok()?;
        Some(DmaMemory {
            phys: PhysAddr::new(phys),
            ptr: NonNull::new(phys_to_virt(phys))?,
            len: count * frame,
        })
    }

    unsafe fn dma_free(&self, memory: DmaMemory, _align: usize) {
        // SAFETY: the driver gives back what it got, once, when no device reaches it.
        if let Err(error) = unsafe { frames::free(memory.phys.get()) } {
            log::error!("{error}");
        }
    }

    fn now_ns(&self) -> Option<u64> {
        time::now_ns()
    }
}

/// A function of the machine whose DMA goes through the IOMMU.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    /// Where it is.
    pub address: PciAddress,
    /// What the IOMMU calls it.
    pub id: EndpointId,
    /// What became of introducing it.
    pub introduction: Introduction,
}

/// The IOMMU, live, and what is behind it.
#[derive(Debug)]
pub struct Iommu {
    /// The driver.
    pub viommu: Viommu<KernelPlatform>,
    /// Where the device is.
    pub place: Place,
    /// Who said what is behind it.
    pub source: Source,
    /// Its own endpoint number, which is never attached.
    pub own: Option<EndpointId>,
    /// The functions behind it.
    pub members: Vec<Member>,
}

impl Iommu {
    /// The endpoint of a function, if the IOMMU knows it.
    pub fn endpoint(&self, function: &Function) -> Option<EndpointId> {
        let known = |member: &&Member| {
            member.address == function.address && member.introduction != Introduction::Unknown
        };
        self.members.iter().find(known).map(|member| member.id)
    }
}

/// Puts something before a transport, as a test may want to.
pub type Wrap<'w> = &'w dyn Fn(Box<dyn Transport>) -> Box<dyn Transport>;

/// Brings an IOMMU up, in the order that leaves no window.
///
/// Bus mastering is off everywhere but on bridges and IOMMUs, by [`Pci::quiesce_all`](crate::pci::Pci::quiesce_all), and
/// goes on for this IOMMU now; after this an endpoint reaches nothing until it is attached.
///
/// # Errors
///
/// [`BringUpError`]; the IOMMU's bus mastering is off then.
pub fn bring_up(
    machine: &Machine,
    found: &Topology,
    options: Options,
    wrap: Option<Wrap<'_>>,
) -> Result<Iommu, BringUpError> {
    let set_bus_master = |state| match found.place {
        Place::Pci(address) => machine.pci.set_bus_master(address, state),
        Place::Mmio(_) => {}
    };
    set_bus_master(BusMaster::On);
    let options = Options { own_endpoint: found.own, ..options };
    let live = match (found.place, wrap) {
        (place, Some(wrap)) => start(wrap(registers::any(machine, place)?), options, &found.behind),
        (Place::Pci(address), None) => start(registers::pci(machine, address)?, options, &found.behind),
        (Place::Mmio(base), None) => start(registers::mmio(base)?, options, &found.behind),
    };
    let (viommu, members) = live.inspect_err(|_| set_bus_master(BusMaster::Off))?;
    Ok(Iommu { viommu, place: found.place, source: found.source, own: found.own, members })
}

/// Starts the device, makes what is behind it known, and closes the bypass.
fn start(
    transport: impl Transport + 'static,
    options: Options,
    behind: &[(PciAddress, EndpointId)],
) -> Result<(Viommu<KernelPlatform>, Vec<Member>), StartError> {
    let staged = Viommu::start(transport, KernelPlatform, options)?;
    let mut members = Vec::new();
    for &(address, id) in behind {
        let introduction = staged.introduce(id)?;
        members.push(Member { address, id, introduction });
    }
    Ok((staged.go_live()?, members))
}
