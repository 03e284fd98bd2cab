//! Nesting: address spaces whose targets are addresses of another one, for a kernel that offers an IOMMU to a guest of its
//! own, which may do the same.
//!
//! ```text
//!   space 2   child of 1   iova -> addresses of 1      an inner guest's inner guest maps here
//!   space 1   child of 0   iova -> addresses of 0      an inner guest maps here
//!   space 0   a root       addresses -> memory         the kernel says what memory the guest has
//!
//!   an endpoint attached to space 2:  a domain of the IOMMU with iova -> memory, the shadow of all three
//! ```
//! This needs nothing of the draft: any virtio-iommu will do. A space that an endpoint is attached to has a domain, in which
//! every mapping of the space is *shadowed*: composed with the mappings of all spaces above. What is mapped nowhere above has no shadow yet, and gets one when it is mapped there.
//!
//! I14: a mapping is made when all of its shadows are, and taken away, at whatever level, only after the device confirmed
//! that each shadow composed from it is gone. All requests of a change go with one doorbell, for as many as the ring takes.
//! When one fails the change is taken back.
//!
//! Each mapping of each level can go alone, and an UNMAP cannot split. [`Merging`] says whether shadows are cut where a
//! mapping of any level ends, or longer at the price of faults when a part goes.

mod compose;
mod error;
mod hardware;
mod mappings;
mod send;
mod shadows;

pub use compose::{Level, Merging, NestedFault, Why};
pub use error::NestError;

use crate::addr::{Iova, IovaRange, PhysAddr};
use crate::id::EndpointId;
use crate::options::DomainOptions;
use crate::platform::Platform;
use crate::prot::Prot;
use crate::viommu::Viommu;
use crate::wire::fault::Fault;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::fmt;
use hardware::Hardware;
use mappings::{Entry, Mappings};

/// The deepest that spaces can be nested, a root included.
pub const MAX_DEPTH: usize = 8;

/// Names a space of one [`Nest`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpaceId(u32);

/// An address space.
struct Space<P: Platform> {
    parent: Option<SpaceId>,
    mappings: Mappings,
    /// The domain that shadows it, while an endpoint is attached.
    hardware: Option<Hardware<P>>,
}

/// Nested address spaces over one IOMMU.
///
/// Dropping it leaves endpoints attached, and what they reach mapped.
pub struct Nest<P: Platform> {
    viommu: Viommu<P>,
    granule: u64,
    merging: Merging,
    spaces: BTreeMap<SpaceId, Space<P>>,
    next: u32,
}

impl<P: Platform> Nest<P> {
    /// No spaces yet, and [`Merging::Never`].
    pub fn new(viommu: Viommu<P>) -> Self {
        let granule = viommu.granule();
        Self { viommu, granule, merging: Merging::default(), spaces: BTreeMap::new(), next: 0 }
    }

    /// Chooses for shadows that are made from now on. Those that there are stay as they are.
    pub fn set_merging(&mut self, merging: Merging) {
        self.merging = merging;
    }

    /// What all addresses and lengths are multiples of, at every level: that of the IOMMU below. A device that is offered to
    /// a guest has a `page_size_mask` without smaller ones, or what the guest maps by them is
    /// [`NestError::Misaligned`].
    pub fn granule(&self) -> u64 {
        self.granule
    }

    /// Adds an empty space that maps to memory.
    pub fn add_root(&mut self) -> SpaceId {
        self.add(None)
    }

    /// Adds an empty space that maps to addresses of another one.
    ///
    /// # Errors
    /// [`NestError::NoSpace`], and [`NestError::TooDeep`] below [`MAX_DEPTH`] spaces.
    pub fn add_child(&mut self, parent: SpaceId) -> Result<SpaceId, NestError> {
        match self.path(parent)?.len() {
            depth if depth >= MAX_DEPTH => Err(NestError::TooDeep { limit: MAX_DEPTH }),
            _ => Ok(self.add(Some(parent))),
        }
    }

    fn add(&mut self, parent: Option<SpaceId>) -> SpaceId {
        let id = SpaceId(self.next);
        self.next += 1;
        self.spaces.insert(id, Space { parent, mappings: Mappings::default(), hardware: None });
        id
    }

    /// Forgets a space and what is mapped in it.
    ///
    /// # Errors
    /// [`NestError::InUse`] with an endpoint attached to it, or a child.
    pub fn remove(&mut self, space: SpaceId) -> Result<(), NestError> {
        let known = self.space(space)?;
        let parent = self.spaces.values().any(|other| other.parent == Some(space));
        if known.hardware.is_some() || parent {
            return Err(NestError::InUse { space });
        }
        self.spaces.remove(&space);
        Ok(())
    }

    /// What is mapped in a space, in ascending order: the addresses, where they lead, and what is allowed.
    ///
    /// # Errors
    /// [`NestError::NoSpace`].
    pub fn mappings(
        &self,
        space: SpaceId,
    ) -> Result<impl Iterator<Item = (IovaRange, u64, Prot)> + '_, NestError> {
        Ok(self.space(space)?.mappings.iter().map(|entry| (entry.range, entry.target, entry.prot)))
    }

    /// How many mappings the device has for a space, all levels composed.
    pub fn shadows(&self, space: SpaceId) -> usize {
        self.spaces.get(&space).and_then(|space| space.hardware.as_ref()).map_or(0, Hardware::len)
    }

    /// Whether the device may lack a shadow, or have one too many, since a request failed: after [`NestError::Stuck`], and
    /// where it refused to map again what is left of a merged shadow. See [`mend`](Self::mend).
    pub fn is_lacking(&self) -> bool {
        self.spaces.values().any(|space| space.hardware.as_ref().is_some_and(|hardware| hardware.lacking))
    }

    /// Makes good what requests that failed left behind: shadows that are stuck are unmapped, and all that levels allow is
    /// mapped. Sends nothing where nothing [is lacking](Self::is_lacking). Waits for the device. Allocates.
    ///
    /// # Errors
    /// [`NestError::Stuck`], [`NestError::Shadow`]: something is lacking still.
    pub fn mend(&mut self) -> Result<(), NestError> {
        let unstuck = self.unmap_stuck();
        for space in self.spaces.values_mut() {
            // A space that its last endpoint left, with what was stuck then.
            space.hardware.take_if(|hardware| hardware.endpoints.is_empty() && hardware.len() == 0);
        }
        unstuck.and(self.complete_all())
    }

    /// Maps memory in a root, which is where a kernel says what memory its guest has. Shadows of what spaces below have
    /// mapped there are made. Waits for the device. Allocates.
    ///
    /// # Errors
    /// [`NestError`]. Unless it is [`NestError::Stuck`] nothing is mapped.
    ///
    /// # Safety
    /// Whatever is attached to the root, or to a space below it, may do with the memory what `prot` allows, from now
    /// until it was unmapped with success; also after [`NestError::Stuck`].
    pub unsafe fn map_memory(
        &mut self,
        root: SpaceId,
        iova: Iova,
        phys: PhysAddr,
        len: u64,
        prot: Prot,
    ) -> Result<(), NestError> {
        if self.space(root)?.parent.is_some() {
            return Err(NestError::NotARoot { space: root });
        }
        self.insert(root, iova, phys.get(), len, prot)
    }

    /// Maps addresses of the parent in a child. Nothing needs to be mapped there: what is has a shadow when this returns.
    /// Safe, since nothing can be reached by it that the roots do not have. Waits for the device. Allocates.
    ///
    /// # Errors
    /// [`NestError`]. Unless it is [`NestError::Stuck`] nothing is mapped.
    pub fn map(
        &mut self,
        child: SpaceId,
        iova: Iova,
        target: Iova,
        len: u64,
        prot: Prot,
    ) -> Result<(), NestError> {
        if self.space(child)?.parent.is_none() {
            return Err(NestError::NotAChild { space: child });
        }
        self.insert(child, iova, target.get(), len, prot)
    }

    fn insert(
        &mut self,
        space: SpaceId,
        iova: Iova,
        target: u64,
        len: u64,
        prot: Prot,
    ) -> Result<(), NestError> {
        let entry = self.check(iova, target, len, prot)?;
        if let Some(other) = self.space(space)?.mappings.overlapping(entry.range).next() {
            return Err(NestError::Mapped { range: other.range });
        }
        self.space_mut(space)?.mappings.insert(entry);
        let Err(error) = self.make_shadows(space, entry.range) else { return Ok(()) };
        // There were none before, so that all that go are those that were made.
        match self.drop_shadows(space, &[entry.range]) {
            Ok(_) => {
                self.space_mut(space)?.mappings.remove(entry.range);
                Err(error)
            }
            Err(_) => Err(NestError::Stuck { range: entry.range }),
        }
    }

    fn check(&self, iova: Iova, target: u64, len: u64, prot: Prot) -> Result<Entry, NestError> {
        let granule = self.granule;
        for value in [iova.get(), target, len] {
            if !value.is_multiple_of(granule) {
                return Err(NestError::Misaligned { value, granule });
            }
        }
        if !Prot::all().contains(prot) || !prot.intersects(Prot::READ | Prot::WRITE) {
            return Err(NestError::Prot { prot });
        }
        // One byte cannot be mapped, with a granule of one.
        if len < 2 {
            return Err(NestError::Empty);
        }
        let wraps = NestError::Wraps { iova, target, len };
        let range = IovaRange::from_len(iova, len).ok_or(wraps)?;
        match target.checked_add(len - 1) {
            Some(_) => Ok(Entry { range, target, prot }),
            None => Err(wraps),
        }
    }

    /// Unmaps whole mappings in the range, which may have holes, in a space of any level, after each shadow that was
    /// composed from them is gone. Waits for the device.
    ///
    /// # Errors
    /// [`NestError::Splits`], and [`NestError::Stuck`]: the mappings stay. Shadows that were gone by then are mapped again, as far
    /// as the device takes them. Try again.
    pub fn unmap(&mut self, space: SpaceId, range: IovaRange) -> Result<(), NestError> {
        let met: Vec<Entry> = self.space(space)?.mappings.overlapping(range).collect();
        if let Some(entry) = met.iter().find(|entry| !range.contains(entry.range)) {
            return Err(NestError::Splits { mapping: entry.range });
        }
        let ranges: Vec<IovaRange> = met.iter().map(|entry| entry.range).collect();
        let gone = match self.drop_shadows(space, &ranges) {
            Ok(gone) => gone,
            Err(error) => {
                // As before, but for what is stuck; what the caller is told is that.
                let _ = self.complete_all();
                return Err(error);
            }
        };
        for entry in met {
            self.space_mut(space)?.mappings.remove(entry.range);
        }
        self.remake(&gone);
        Ok(())
    }

    /// Attaches an endpoint to a space, whose mappings it uses from then on. Waits for the device. Allocates.
    ///
    /// # Errors
    /// [`NestError`]. The endpoint's bus mastering must then stay off.
    pub fn attach(&mut self, endpoint: EndpointId, space: SpaceId) -> Result<(), NestError> {
        if self.space(space)?.hardware.is_none() {
            let domain = self.viommu.create_domain(DomainOptions::default()).map_err(NestError::Domain)?;
            self.space_mut(space)?.hardware = Some(Hardware::new(domain));
        }
        let viommu = self.viommu.clone();
        let hardware = self.hardware_mut(space)?;
        if hardware.endpoints.contains(&endpoint) {
            return Ok(());
        }
        let attached = viommu.attach(endpoint, &hardware.domain);
        if attached.is_ok() {
            hardware.endpoints.push(endpoint);
        }
        let first = hardware.endpoints.len() == 1;
        let result = match attached {
            Ok(()) if first => self.complete(space),
            Ok(()) => return Ok(()),
            Err(error) => Err(NestError::Attach(error)),
        };
        if result.is_err() {
            // As it was before; what stays is the first error.
            let _ = self.detach_from(endpoint, space);
        }
        result
    }

    /// Detaches an endpoint from its space. Shadows go with the last one. Waits for the device.
    ///
    /// # Errors
    /// [`NestError::NotAttached`], [`NestError::Detach`], and [`NestError::Stuck`] where the endpoint left and the device
    /// may still have shadows: [`mend`](Self::mend).
    pub fn detach(&mut self, endpoint: EndpointId) -> Result<(), NestError> {
        let space = self.space_of(endpoint).ok_or(NestError::NotAttached { endpoint })?;
        self.detach_from(endpoint, space)
    }

    fn detach_from(&mut self, endpoint: EndpointId, space: SpaceId) -> Result<(), NestError> {
        let viommu = self.viommu.clone();
        let hardware = self.hardware_mut(space)?;
        if hardware.endpoints.contains(&endpoint) {
            viommu.detach(endpoint).map_err(NestError::Detach)?;
            hardware.endpoints.retain(|other| *other != endpoint);
        }
        if hardware.endpoints.is_empty() {
            // In a domain without endpoints it takes no request, where the bypass is closed.
            self.unmap_all(space)?;
            self.space_mut(space)?.hardware = None;
        }
        Ok(())
    }

    /// The space that an endpoint is attached to.
    pub fn space_of(&self, endpoint: EndpointId) -> Option<SpaceId> {
        let attached = |space: &Space<P>| {
            space.hardware.as_ref().is_some_and(|hardware| hardware.endpoints.contains(&endpoint))
        };
        self.spaces.iter().find(|(_, space)| attached(space)).map(|(id, _)| *id)
    }

    /// What a fault means in the endpoint's own space, and which level is to blame. `None` for an endpoint that is not
    /// attached here, without an address, and where by now every level allows it.
    pub fn explain(&self, fault: &Fault) -> Option<NestedFault> {
        let space = self.space_of(fault.endpoint)?;
        compose::explain(&|id| self.level(id), space, fault.address?, fault.access)
    }

    fn space(&self, space: SpaceId) -> Result<&Space<P>, NestError> {
        self.spaces.get(&space).ok_or(NestError::NoSpace { space })
    }

    fn space_mut(&mut self, space: SpaceId) -> Result<&mut Space<P>, NestError> {
        self.spaces.get_mut(&space).ok_or(NestError::NoSpace { space })
    }

    fn hardware(&self, space: SpaceId) -> Option<&Hardware<P>> {
        self.spaces.get(&space)?.hardware.as_ref()
    }

    fn hardware_mut(&mut self, space: SpaceId) -> Result<&mut Hardware<P>, NestError> {
        self.space_mut(space)?.hardware.as_mut().ok_or(NestError::NoSpace { space })
    }

    fn level(&self, space: SpaceId) -> Option<compose::View<'_>> {
        let known = self.spaces.get(&space)?;
        Some(compose::View { mappings: &known.mappings, parent: known.parent })
    }

    /// From a space up to its root.
    fn path(&self, space: SpaceId) -> Result<Vec<SpaceId>, NestError> {
        let mut path = [space].to_vec();
        let mut next = self.space(space)?.parent;
        // Bounded: a parent is older than its child.
        while let Some(parent) = next {
            path.push(parent);
            next = self.space(parent)?.parent;
        }
        Ok(path)
    }
}

impl<P: Platform> fmt::Debug for Nest<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nest").field("spaces", &self.spaces.len()).finish_non_exhaustive()
    }
}
