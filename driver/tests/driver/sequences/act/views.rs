//! Views of endpoints: what device drivers map their memory through.

use std::ptr::NonNull;

use virtio_iommu::{
    Direction, DmaDevice, DmaError, EndpointOptions, Iova, MapError, OpenError, PhysAddr, PhysSegment,
};
use virtio_iommu_model::AccessKind;

use super::super::check::same;
use super::super::op::Segment;
use super::super::reference::{Expected, Memory, Owner};
use super::super::world::{Failed, OpenView, Shared, View, World};
use super::{Done, NOTHING, PHYS, judge, judge_in, pick};

/// Why a domain of which not all is known may have no room.
const NO_ROOM: &[&str] = &["IovaExhausted"];

fn direction(which: u8) -> Direction {
    [Direction::ToDevice, Direction::FromDevice, Direction::Both][usize::from(which) % 3]
}

impl World {
    pub(super) fn open(&mut self, endpoint: usize, slot: u8, bounce: u64, low: bool) -> Done {
        let Some(to) = self.at(slot) else { return Ok(None) };
        let (granule, limit) = (self.reference.granule, self.limit(low));
        let bounce_bytes = (bounce * granule) as usize;
        let options = EndpointOptions { limit: Iova::new(limit), bounce_bytes, ..Default::default() };
        let (was_at, was_sure) = (self.reference.place[endpoint], !self.reference.unsure[endpoint]);
        let opened = self.viommu().open(self.id(endpoint), self.domain(slot), options);
        if let Err(OpenError::Attach(_)) = opened {
            self.attached(endpoint, to, &opened, "Attach(")?;
            return NOTHING;
        }
        self.attached(endpoint, to, &Ok::<(), ()>(()), "")?;
        let view = match opened {
            Ok(view) => view,
            Err(error) => {
                let OpenError::Dma(DmaError::Map(error)) = error else {
                    return Err(format!("opening came to {error:?}"));
                };
                self.not_opened(endpoint, to, (bounce > 0, limit), error)?;
                // It is detached again if it was attached by this, which takes a request.
                if !was_sure || (was_at.is_none() && self.was_hit()) {
                    self.reference.doubt(endpoint, to);
                } else if was_at.is_none() {
                    self.reference.leave(endpoint);
                }
                return NOTHING;
            }
        };
        self.check_placed(to, view.faulting_iova(), granule, limit)?;
        let faulting = (view.faulting_iova().get(), view.faulting_iova().get() + granule - 1);
        let space = &mut self.reference.spaces[to];
        space.faulting.push(faulting);
        space.handles += 1;
        let bounce = if bounce > 0 { Some(self.find_bounce(to, &view, bounce_bytes)?) } else { None };
        self.views.push(OpenView { endpoint, space: to, bounce, faulting, limit, shares: Vec::new(), view });
        Ok(Some(vec![faulting]))
    }

    /// An endpoint was attached, and its view could not be made: no room for the granule that faults, or for bounce pages.
    fn not_opened(
        &mut self,
        endpoint: usize,
        to: usize,
        (bounce, limit): (bool, u64),
        error: MapError,
    ) -> Result<(), Failed> {
        let granule = self.reference.granule;
        if self.is_sure(to) && self.is_known(endpoint) {
            let result: Result<(), MapError> = Err(error);
            // Of bounce pages it is not known whether there is room beside the granule that faults.
            let exhausted = matches!(error, MapError::IovaExhausted { .. });
            let predicted = match self.predict_room(to, granule, limit) {
                Ok(()) if exhausted && (bounce || self.reference.spaces[to].leaky) => Err("IovaExhausted"),
                Ok(()) if bounce => self.predict_parts(to, 1),
                predicted => predicted,
            };
            judge(&result, predicted)?;
        }
        self.not_mapped(to, error, Memory::Platform)
    }

    /// Where the bounce pages of a new view are: only its driver's buffers tell.
    fn find_bounce(&mut self, to: usize, view: &View, len: usize) -> Result<u64, Failed> {
        let mut buffer = [0u8; 1];
        let buffer = NonNull::from(&mut buffer[..]);
        // SAFETY: the buffer is the test's, and no endpoint does anything meanwhile.
        let iova = unsafe { view.share(buffer, Direction::ToDevice) }.map_err(|error| error.to_string())?;
        // SAFETY: just shared.
        unsafe { view.unshare(iova, buffer, Direction::ToDevice) };
        self.check_placed(to, iova, len as u64, view.limit().get())?;
        let found = view.domain().translate(iova).ok_or("bounce pages without a record")?;
        same("bounce pages", (found.range.start(), found.range.len_bytes()), (iova, Some(len as u64)))?;
        let whose = (Owner::Bounce, Memory::Platform);
        self.mapped(to, (iova.get(), len as u64), found.phys.get(), 3, whose);
        Ok(iova.get())
    }

    pub(super) fn close(&mut self, view: u8) -> Done {
        let Some(which) = pick(self.views.len(), view) else { return Ok(None) };
        let OpenView { endpoint, space, bounce, faulting, shares, view, .. } = self.views.swap_remove(which);
        for Shared { iova, mut buffer, direction } in shares {
            // SAFETY: the buffer that was shared there, and no endpoint does anything meanwhile.
            unsafe { view.unshare(Iova::new(iova), NonNull::from(&mut buffer[..]), direction) };
        }
        let closed = view.close();
        let sure = self.is_sure(space);
        // Where the bypass is open the pages are unmapped before the endpoint is detached, else after.
        let unmapped_first = !self.reference.closed;
        let predict = |world: &Self| {
            let space = &world.reference.spaces[space];
            bounce.map_or(Ok(()), |first| space.predict_unmap(first, space.maps[&first].last))
        };
        let before = predict(self);
        let moved = self.reference.place[endpoint] != Some(space);
        if moved {
            judge(&closed, Ok(()))?;
        } else {
            self.detached(endpoint, closed)?;
        }
        let gone = if unmapped_first { before } else { predict(self) }.is_ok();
        let mut touched = vec![faulting];
        if let Some(first) = bounce {
            let last = self.reference.spaces[space].maps[&first].last;
            touched.extend(match sure && gone {
                true => self.unmapped(space, first, last)?,
                false => self.leaving(space, first, last),
            });
        }
        self.reference.spaces[space].faulting.retain(|range| *range != faulting);
        self.released(space);
        Ok(Some(touched))
    }

    /// Drops a view without closing it.
    pub(super) fn forget(&mut self, view: u8) -> Done {
        let Some(which) = pick(self.views.len(), view) else { return Ok(None) };
        let OpenView { space, bounce, view, .. } = self.views.swap_remove(which);
        drop(view);
        let mut touched = Vec::new();
        if let Some(first) = bounce {
            let (last, claimed) = {
                let map = &self.reference.spaces[space].maps[&first];
                (map.last, map.claimed)
            };
            // What the device does not have takes no request, and goes at once.
            touched = match self.is_sure(space) && !claimed {
                true => self.unmapped(space, first, last)?,
                false => self.leaving(space, first, last),
            };
        }
        self.released(space);
        Ok(Some(touched))
    }

    pub(super) fn scatter(&mut self, view: u8, segments: &[Segment], which: u8) -> Done {
        let Some(view) = pick(self.views.len(), view) else { return Ok(None) };
        let (at, limit, granule) = (self.views[view].space, self.views[view].limit, self.reference.granule);
        let direction = direction(which);
        let list: Vec<_> = segments.iter().map(|part| physical(*part, granule)).collect();
        let runs = runs(&list, granule);
        let len = runs.iter().map(|(_, len)| len).sum();
        let mut iovas = vec![Iova::new(0); list.len()];
        // SAFETY: nobody's memory.
        let mapped = unsafe { self.views[view].view.map_scatter(&list, direction, &mut iovas) };
        if self.is_sure(at) {
            // The first is looked at before there are addresses for all.
            let predicted = self.predict_parts(at, 1).and_then(|()| self.predict_room(at, len, limit));
            let predicted = predicted.and_then(|()| self.predict_parts(at, runs.len()));
            judge_in(&mapped, "Map(", self.tolerate(at, &mapped, NO_ROOM, predicted))?;
        }
        let mapping = match mapped {
            Ok(mapping) => mapping,
            Err(DmaError::Map(error)) => return self.not_mapped(at, error, Memory::Nowhere).and(NOTHING),
            Err(error) => return Err(format!("a list came to {error:?}")),
        };
        let first = mapping.iova().get() & !(granule - 1);
        self.check_placed(at, Iova::new(first), len, limit)?;
        let (mut next, mut touched) = (first, Vec::new());
        for (phys, len) in &runs {
            let whose = (Owner::Handle, Memory::Nowhere);
            touched.push(self.mapped(at, (next, *len), *phys, direction.prot().bits(), whose));
            next += len;
        }
        for (segment, iova) in list.iter().zip(&iovas) {
            let record = self.reference.spaces[at].mapping_at(iova.get());
            let phys = record.map(|(first, map)| iova.get() - first + map.phys);
            same("where a segment is", phys, Some(segment.phys.get()))?;
        }
        self.mappings.push((at, (first, next - 1), mapping));
        Ok(Some(touched))
    }

    pub(super) fn adopt(&mut self, view: u8, pages: u64, which: u8) -> Done {
        let Some(view) = pick(self.views.len(), view) else { return Ok(None) };
        let (at, limit) = (self.views[view].space, self.views[view].limit);
        let (len, direction) = (pages * self.reference.granule, direction(which));
        let (held, phys) = self.machine.lend(len);
        let adopted = self.views[view].view.adopt(held, direction);
        // The memory is the driver's, or comes back at once.
        let mapped = match adopted {
            Ok(mapping) => Ok(mapping),
            Err((error, back)) => {
                let kept = matches!(error, DmaError::Map(MapError::Quarantined { .. }));
                same("memory comes back from what failed", back.is_some(), !kept)?;
                if let Some(back) = back {
                    same("it went back already", self.machine.is_lent_back(phys), false)?;
                    self.machine.take_returned(back);
                }
                Err(error)
            }
        };
        if self.is_sure(at) {
            let predicted = self.predict_parts(at, 1).and_then(|()| self.predict_room(at, len, limit));
            judge_in(&mapped, "Map(", self.tolerate(at, &mapped, NO_ROOM, predicted))?;
        }
        let mapping = match mapped {
            Ok(mapping) => mapping,
            Err(DmaError::Map(error)) => return self.not_mapped(at, error, Memory::Lent).and(NOTHING),
            Err(error) => return Err(format!("adopting came to {error:?}")),
        };
        self.check_placed(at, mapping.iova(), len, limit)?;
        let whose = (Owner::Handle, Memory::Lent);
        let place = (mapping.iova().get(), len);
        let range = self.mapped(at, place, phys.get(), direction.prot().bits(), whose);
        self.mappings.push((at, range, mapping));
        Ok(Some(vec![range]))
    }

    pub(super) fn unmap_one(&mut self, which: u8) -> Done {
        let Some(which) = pick(self.mappings.len(), which) else { return Ok(None) };
        if self.view_of(self.mappings[which].0).is_none() {
            return Ok(None);
        }
        let (at, range, mapping) = self.mappings.swap_remove(which);
        let view = self.view_of(at).expect("just looked");
        let unmapped = view.unmap(mapping);
        self.ended(at, range, unmapped.map(drop))
    }

    pub(super) fn alloc(&mut self, view: u8, pages: u64) -> Done {
        let Some(which) = pick(self.views.len(), view) else { return Ok(None) };
        let (at, limit) = (self.views[which].space, self.views[which].limit);
        let len = pages * self.reference.granule;
        let before = self.machine.outstanding();
        // Not whole granules, which the driver makes of it.
        let memory = self.views[which].view.alloc_coherent(len as usize - 1);
        if self.is_sure(at) {
            let predicted = self.predict_parts(at, 1).and_then(|()| self.predict_room(at, len, limit));
            judge_in(&memory, "Map(", self.tolerate(at, &memory, NO_ROOM, predicted))?;
        }
        let memory = match memory {
            Ok(memory) => memory,
            Err(DmaError::Map(error)) => {
                let kept = usize::from(matches!(error, MapError::Quarantined { .. }));
                same("blocks of memory after a failure", self.machine.outstanding(), before + kept)?;
                return self.not_mapped(at, error, Memory::Platform).and(NOTHING);
            }
            Err(error) => return Err(format!("{len:#x} coherent bytes: {error:?}")),
        };
        self.check_placed(at, memory.iova(), len, limit)?;
        let phys = memory.ptr().addr().get() as u64;
        let whose = (Owner::Coherent, Memory::Platform);
        let range = self.mapped(at, (memory.iova().get(), len), phys, 3, whose);
        self.coherent.push((at, memory));
        Ok(Some(vec![range]))
    }

    pub(super) fn free(&mut self, which: u8) -> Done {
        let Some(which) = pick(self.coherent.len(), which) else { return Ok(None) };
        if self.view_of(self.coherent[which].0).is_none() {
            return Ok(None);
        }
        let (at, memory) = self.coherent.swap_remove(which);
        let first = memory.iova().get();
        let last = self.reference.spaces[at].maps[&first].last;
        let view = self.view_of(at).expect("just looked");
        let freed = view.free_coherent(memory);
        self.ended(at, (first, last), freed.map(drop))
    }

    /// Lends the endpoint a buffer through its bounce pages, where it finds what was in the buffer, or zeros.
    pub(super) fn share(&mut self, view: u8, len: usize, which: u8) -> Done {
        let Some(view) = pick(self.views.len(), view) else { return Ok(None) };
        let OpenView { endpoint, space, bounce, shares, view: device, .. } = &mut self.views[view];
        let granule = self.reference.granule;
        let (mut buffer, direction) = (vec![0x5a; len], direction(which));
        // SAFETY: the buffer is the test's, and the endpoint does nothing meanwhile.
        let shared = unsafe { device.share(NonNull::from(&mut buffer[..]), direction) };
        let pages = bounce.map(|first| (first, self.reference.spaces[*space].maps[&first].last));
        let free = |at: u64| {
            let inside =
                pages.is_some_and(|(first, last)| first <= at && at.saturating_add(len as u64 - 1) <= last);
            let meets = |other: &Shared| {
                at - other.iova.min(at) < other.buffer.len() as u64
                    && other.iova - at.min(other.iova) < len as u64
            };
            inside && !shares.iter().any(meets)
        };
        let all = pages.map_or(0..0, |(first, last)| first..last + 1);
        let fits = all.step_by(granule as usize).any(free);
        if !judge(&shared, if fits { Ok(()) } else { Err("NoBounce") })? {
            return NOTHING;
        }
        let iova = shared.map_err(|error| error.to_string())?.get();
        same("a shared buffer has its pages for itself", free(iova), true)?;
        let (endpoint, id) = (*endpoint, self.reference.endpoints[*endpoint].id);
        let (space, there) = (*space, self.reference.place[endpoint]);
        shares.push(Shared { iova, buffer, direction });
        if there == Some(space) && self.is_known(endpoint) {
            let found = self.machine.dma_read(virtio_iommu::EndpointId::new(id), iova, len);
            let seen = if direction == Direction::FromDevice { 0 } else { 0x5a };
            same("what the endpoint finds", found, Ok(vec![seen; len]))?;
        }
        NOTHING
    }

    /// Takes a buffer back, with what the endpoint wrote there if it was to write.
    pub(super) fn unshare(&mut self, which: u8) -> Done {
        let lent = self.views.iter().enumerate();
        let all: Vec<_> =
            lent.flat_map(|(view, lent)| (0..lent.shares.len()).map(move |share| (view, share))).collect();
        let Some((view, share)) = pick(all.len(), which).map(|which| all[which]) else { return Ok(None) };
        let (endpoint, space) = (self.views[view].endpoint, self.views[view].space);
        let Shared { iova, mut buffer, direction } = self.views[view].shares.swap_remove(share);
        let mut expected = None;
        if self.reference.place[endpoint] == Some(space) && self.is_known(endpoint) {
            let reaches = self.reference.expected(endpoint, iova, AccessKind::Write);
            same("bounce pages are mapped", matches!(reaches, Expected::Memory(_)), true)?;
            let written = self.machine.dma_write(self.id(endpoint), iova, &vec![0xa5; buffer.len()]);
            same("the endpoint writes", written, Ok(()))?;
            expected = Some(if direction == Direction::ToDevice { 0x5a } else { 0xa5 });
        }
        // SAFETY: the buffer that was shared, and the endpoint is done.
        unsafe { self.views[view].view.unshare(Iova::new(iova), NonNull::from(&mut buffer[..]), direction) };
        if let Some(expected) = expected {
            same("what came back", buffer.iter().all(|byte| *byte == expected), true)?;
        }
        NOTHING
    }
}

fn physical(part: Segment, granule: u64) -> PhysSegment {
    let unit = granule / 16;
    let phys = PHYS + u64::from(part.phys) * granule + u64::from(part.start) * unit;
    PhysSegment { phys: PhysAddr::new(phys), len: (u64::from(part.len) * unit) as usize }
}

/// Whole granules around each segment, those that touch in memory together: address and length. A list that touches from end
/// to end is one segment.
fn runs(segments: &[PhysSegment], granule: u64) -> Vec<(u64, u64)> {
    let end = |segment: &PhysSegment| segment.phys.get() + segment.len as u64;
    let around = |start: u64, end: u64| {
        let first = start / granule * granule;
        (first, end.next_multiple_of(granule) - first)
    };
    if segments.windows(2).all(|pair| end(&pair[0]) == pair[1].phys.get())
        && let [first, ..] = segments
        && let [.., last] = segments
    {
        return vec![around(first.phys.get(), end(last))];
    }
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for segment in segments {
        let (first, len) = around(segment.phys.get(), end(segment));
        match runs.last_mut() {
            Some((start, before)) if *start + *before == first => *before += len,
            _ => runs.push((first, len)),
        }
    }
    runs
}
