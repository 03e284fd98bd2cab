//! The virtio-iommu in this kernel: what the driver needs of it, and the order of bring-up.
//!
//! This is the worked example of how to embed the driver: a [`Platform`] of three methods, the registers, and
//! the endpoints that firmware names.

use alloc::string::String;
use alloc::vec::Vec;
use core::ptr::NonNull;

use virtio_iommu::topology::viot::{IommuPlace, PciFunction, Viot};
use virtio_iommu::transport::Transport;
use virtio_iommu::transport::pci::{
    CapabilityError, DEVICE_ID, PciTransport, Region, Regions, Structure, VENDOR_ID, VirtioCapabilities,
};
use virtio_iommu::{
    DmaMemory, EndpointId, Introduction, Options, PhysAddr, Platform, SpinNotInInterrupts, StartError, Viommu,
};

use crate::machine::Machine;
use crate::memory::frames::{self, FRAME_BYTES};
use crate::memory::phys_to_virt;
use crate::pci::PciAddress;
use crate::pci::config::ConfigSpace;
use crate::pci::function::{BusMaster, Function};
use crate::time;

mod error;

pub use error::BringUpError;

/// This kernel, as the driver sees it: frames, a spin lock (no interrupts, so it cannot be interrupted), a clock.
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
    pub address: PciAddress,
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

/// Finds the IOMMU by VIOT and brings it up, in the order that leaves no window.
///
/// Bus mastering is off everywhere but on bridges from the first step on, and on for the IOMMU from the second;
/// after this an endpoint reaches nothing until it is attached. `wrap` can put something before the transport.
///
/// # Errors
///
/// [`BringUpError`]; bus mastering stays off.
pub fn bring_up<T: Transport + 'static>(
    machine: &Machine,
    viot: Result<&[u8], String>,
    options: Options,
    wrap: impl FnOnce(PciTransport) -> T,
) -> Result<Iommu, BringUpError> {
    machine.pci.quiesce_all();
    let device = machine.pci.with_id(VENDOR_ID, DEVICE_ID).next().ok_or(BringUpError::NoDevice)?;
    let viot = viot.map_err(|reason| BringUpError::NoTopology { device: device.address, reason })?;
    let viot = Viot::parse(viot).map_err(BringUpError::Viot)?;
    let (function, node) = find(machine, &viot)?;
    let own = viot.pci_endpoint(place(function)).map(|(id, _)| id);

    let transport = transport(machine, function)?;
    machine.pci.set_bus_master(function.address, BusMaster::On);
    let options = Options { own_endpoint: own, ..options };
    let live = start(machine, &viot, (function, node), options, wrap(transport));
    let (viommu, members) = live.map_err(|error| {
        machine.pci.set_bus_master(function.address, BusMaster::Off);
        BringUpError::Start(error)
    })?;
    Ok(Iommu { viommu, address: function.address, own, members })
}

fn start<T: Transport + 'static>(
    machine: &Machine,
    viot: &Viot<'_>,
    (iommu, node): (&Function, u16),
    options: Options,
    transport: T,
) -> Result<(Viommu<KernelPlatform>, Vec<Member>), StartError> {
    let staged = Viommu::start(transport, KernelPlatform, options)?;
    let mut members = Vec::new();
    for function in machine.pci.functions().iter().filter(|function| function.address != iommu.address) {
        let Some((id, behind)) = viot.pci_endpoint(place(function)) else { continue };
        // Another IOMMU has the others, and would have to be brought up by itself.
        if behind.node != node {
            continue;
        }
        let introduction = staged.introduce(id)?;
        members.push(Member { address: function.address, id, introduction });
    }
    Ok((staged.go_live()?, members))
}

/// The function where VIOT says that the first IOMMU is, and its node.
fn find<'m>(machine: &'m Machine, viot: &Viot<'_>) -> Result<(&'m Function, u16), BringUpError> {
    let named = viot.iommus().next();
    let reason = || String::from("it names no IOMMU");
    let Some(named) = named else {
        let device = machine.pci.with_id(VENDOR_ID, DEVICE_ID).next().ok_or(BringUpError::NoDevice)?;
        return Err(BringUpError::NoTopology { device: device.address, reason: reason() });
    };
    let wrong = BringUpError::WrongPlace { place: named.place };
    let IommuPlace::Pci(at) = named.place else { return Err(wrong) };
    let function = machine.pci.with_id(VENDOR_ID, DEVICE_ID).find(|function| place(function) == at);
    Ok((function.ok_or(wrong)?, named.node))
}

fn place(function: &Function) -> PciFunction {
    PciFunction { segment: function.address.segment(), bdf: function.bdf() }
}

/// Maps the structures of a modern virtio function and turns its memory decoding on.
///
/// # Errors
///
/// [`BringUpError`], of its capabilities and regions.
pub fn transport(machine: &Machine, function: &Function) -> Result<PciTransport, BringUpError> {
    let config = machine.pci.config();
    let found = VirtioCapabilities::read(|offset| config.read32(function.address, offset));
    let found = found.map_err(BringUpError::Capabilities)?;
    let region = |structure: Structure| {
        let bar = machine.map_bar(function, structure.bar).map_err(BringUpError::Bar)?;
        let (offset, len) = (structure.offset as usize, structure.len as usize);
        let inside = offset.checked_add(len).is_some_and(|end| end <= bar.len_bytes());
        if !inside {
            return Err(BringUpError::StructureOutside(structure));
        }
        // SAFETY: inside the BAR's mapping, by the check above.
        Ok(Region { ptr: unsafe { bar.base().add(offset) }, len })
    };
    let regions = Regions {
        common: region(found.common)?,
        notify: region(found.notify)?,
        notify_multiplier: found.notify_multiplier,
        isr: region(found.isr)?,
        device: region(found.device.ok_or(BringUpError::Capabilities(CapabilityError::Missing(4)))?)?,
    };
    // SAFETY: mapped for good with decoding on, and the caller has the device for itself.
    unsafe { PciTransport::new(regions) }.map_err(BringUpError::Region)
}
