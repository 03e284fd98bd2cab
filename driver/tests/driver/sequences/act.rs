//! Each operation: what the reference says will come of it, what came of it, and the comparison.

use std::fmt::Debug;

use virtio_iommu::{
    Direction, DmaDevice, Domain, DomainOptions, EndpointOptions, Iova, PhysAddr, PhysSegment, Prot,
};

use super::check::same;
use super::op::{Op, Place, Segment};
use super::reference::{Owner, Predicted, Space};
use super::world::{Failed, MAPPINGS, OpenView, View, World};
use crate::support::TestPlatform;

/// Where the memory lies that the test maps. It is not there: accesses end in [`super::check`].
const PHYS: u64 = 1 << 40;

/// What an operation did: `None` where there was nothing to do it to, else the mappings that it touched.
type Done = Result<Option<Vec<(u64, u64)>>, Failed>;

/// Mapped, or refused as predicted.
const NOTHING: Done = Ok(Some(Vec::new()));

/// One of many, by a number that knows not how many there are.
fn pick(count: usize, which: u8) -> Option<usize> {
    usize::from(which).checked_rem(count)
}

/// Whether it came as predicted; true if it succeeded.
fn judge<T: Debug, E: Debug>(result: &Result<T, E>, predicted: Result<(), &str>) -> Result<bool, Failed> {
    match (result, predicted) {
        (Ok(_), Ok(())) => Ok(true),
        (Err(error), Err(expected)) if format!("{error:?}").starts_with(expected) => Ok(false),
        _ => Err(format!("came to {result:x?}, expected {predicted:?}")),
    }
}

impl World {
    /// Runs one operation and compares. Whether there was anything to do it to.
    pub(super) fn run(&mut self, op: Op) -> Result<bool, Failed> {
        let Some(touched) = self.act(op)? else { return Ok(false) };
        self.refresh_ids();
        self.compare(&touched)?;
        Ok(true)
    }

    /// A domain's number can change when it takes over an endpoint that cannot leave its own.
    fn refresh_ids(&mut self) {
        for at in 0..self.reference.spaces.len() {
            if let Some(id) = self.handle(at).map(|domain| domain.id().get()) {
                self.reference.spaces[at].id = id;
            }
        }
    }

    fn act(&mut self, op: Op) -> Done {
        match op {
            Op::Nothing => Ok(None),
            Op::Create => self.create(),
            Op::Drop { slot } => self.drop_handle(slot),
            Op::Attach { endpoint, slot } => self.attach(endpoint.into(), slot),
            Op::Detach { endpoint } => self.detach(endpoint.into()),
            Op::Move { endpoint, slot } => self.move_endpoint(endpoint.into(), slot),
            Op::Map { slot, pages, phys, prot, low } => self.map(slot, pages.into(), phys.into(), prot, low),
            Op::MapAt { slot, place, pages, phys, prot } => {
                self.map_at(slot, place, pages.into(), phys.into(), prot)
            }
            Op::Unmap { slot, which, neighbours } => self.unmap(slot, which, neighbours),
            Op::UnmapOther { slot, which, skip, pages } => {
                self.unmap_other(slot, which, skip.into(), pages.into())
            }
            Op::Open { endpoint, slot, bounce, low } => self.open(endpoint.into(), slot, bounce.into(), low),
            Op::Close { view } => self.close(view),
            Op::Forget { view } => self.forget(view),
            Op::Scatter { view, segments, used, direction } => {
                self.scatter(view, &segments[..usize::from(used).clamp(1, 4)], direction)
            }
            Op::UnmapList { which } => self.unmap_list(which),
            Op::Alloc { view, pages } => self.alloc(view, pages.into()),
            Op::Free { which } => self.free(which),
            Op::Share { view, len } => self.share(view, len.into()),
            Op::Poll => self.poll(),
            Op::Reclaim => self.reclaim(),
            Op::Restart { orderly } => self.restart(orderly).map(Some),
        }
    }

    /// The slots that have a domain, counted through.
    fn slot(&self, slot: u8) -> Option<usize> {
        let full = || (0..self.slots.len()).filter(|slot| self.slots[*slot].is_some());
        pick(full().count(), slot).and_then(|which| full().nth(which))
    }

    /// The domain in a slot.
    fn at(&self, slot: u8) -> Option<usize> {
        self.slot(slot).and_then(|slot| self.slots[slot].as_ref()).map(|(at, _)| *at)
    }

    fn domain(&self, slot: u8) -> &Domain<TestPlatform> {
        let held = self.slot(slot).and_then(|slot| self.slots[slot].as_ref());
        held.map(|(_, domain)| domain).expect("the slot was looked at")
    }

    /// Low addresses are few, so that they run out.
    fn limit(&self, low: bool) -> u64 {
        let usable = self.reference.usable;
        if low { usable.0 + 24 * self.reference.granule - 1 } else { usable.1 }
    }

    fn create(&mut self) -> Done {
        let Some(slot) = self.slots.iter().position(Option::is_none) else { return Ok(None) };
        // What waits to go back to its owner keeps its domain's number.
        self.poll()?;
        let (first, last) = self.viommu().domain_range();
        let in_use = self.reference.spaces.iter().filter(|space| !space.gone).count();
        let options = DomainOptions { mappings: MAPPINGS, ..DomainOptions::default() };
        let created = self.viommu().create_domain(options);
        let predicted = match in_use {
            16.. => Err("TooMany"),
            _ if in_use as u64 > u64::from(last - first) => Err("IdsExhausted"),
            _ => Ok(()),
        };
        judge(&created, predicted)?;
        if let Ok(domain) = created {
            let id = domain.id().get();
            let unique = self.reference.spaces.iter().all(|space| space.gone || space.id != id);
            same("the number is nobody else's", unique, true)?;
            self.slots[slot] = Some((self.reference.spaces.len(), domain));
            self.reference.spaces.push(Space { id, handles: 1, ..Space::default() });
        }
        NOTHING
    }

    fn drop_handle(&mut self, slot: u8) -> Done {
        let Some(slot) = self.slot(slot) else { return Ok(None) };
        let Some((at, domain)) = self.slots[slot].take() else { return Ok(None) };
        drop(domain);
        let before = self.ranges_of(at);
        self.released(at);
        Ok(Some(before))
    }

    fn ranges_of(&self, at: usize) -> Vec<(u64, u64)> {
        self.reference.spaces[at].maps.iter().map(|(first, map)| (*first, map.last)).collect()
    }

    /// What is touched when an endpoint comes or goes: its domain's mappings, of which a few will do.
    fn some_of(&self, at: Option<usize>) -> Vec<(u64, u64)> {
        at.map_or(Vec::new(), |at| self.ranges_of(at).into_iter().take(2).collect())
    }

    /// A domain of which the test does not know all that is taken may lack room for reserved regions too.
    fn tolerate<T: Debug, E: Debug>(
        &self,
        at: usize,
        result: &Result<T, E>,
        predicted: Predicted,
    ) -> Predicted {
        let why = ["ReservedInUse", "InUse", "IovaExhausted"];
        let leaky = self.reference.spaces[at].leaky && predicted.is_ok();
        let error = result.as_ref().err().map(|error| format!("{error:?}"));
        let known = why.into_iter().find(|why| error.as_ref().is_some_and(|error| error.contains(why)));
        if leaky && let Some(why) = known { Err(why) } else { predicted }
    }

    fn attach(&mut self, endpoint: usize, slot: u8) -> Done {
        let Some(to) = self.at(slot) else { return Ok(None) };
        let predicted = self.reference.predict_attach(endpoint, to);
        let attached = self.viommu().attach(self.id(endpoint), self.domain(slot));
        let predicted = self.tolerate(to, &attached, predicted);
        if judge(&attached, predicted)? {
            self.reference.join(endpoint, to);
        }
        Ok(Some(self.some_of(Some(to))))
    }

    /// What detaching comes to.
    fn predict_detach(&self, endpoint: usize) -> Predicted {
        match self.reference.place[endpoint] {
            None => Err("NotAttached"),
            Some(_) if self.can_detach() => Ok(()),
            Some(_) => Err("Request"),
        }
    }

    fn detach(&mut self, endpoint: usize) -> Done {
        let touched = self.some_of(self.reference.place[endpoint]);
        let detached = self.viommu().detach(self.id(endpoint));
        if judge(&detached, self.predict_detach(endpoint))? {
            self.reference.leave(endpoint);
        }
        Ok(Some(touched))
    }

    fn move_endpoint(&mut self, endpoint: usize, slot: u8) -> Done {
        let Some(to) = self.at(slot) else { return Ok(None) };
        let mut touched = self.some_of(self.reference.place[endpoint]);
        touched.extend(self.some_of(Some(to)));
        let moved = self.viommu().move_endpoint(self.id(endpoint), self.domain(slot));
        if self.reference.place[endpoint] == Some(to) {
            judge(&moved, Ok(()))?;
            return Ok(Some(touched));
        }
        if let Err(why) = self.predict_detach(endpoint) {
            judge(&moved, Err(&format!("Detach({why}")))?;
            return Ok(Some(touched));
        }
        self.reference.leave(endpoint);
        let predicted = self.reference.predict_attach(endpoint, to);
        match self.tolerate(to, &moved, predicted) {
            Ok(()) => {
                judge(&moved, Ok(()))?;
                self.reference.join(endpoint, to);
            }
            Err(why) => {
                judge(&moved, Err(&format!("Attach({why}")))?;
            }
        }
        Ok(Some(touched))
    }

    /// What mapping in so many parts comes to, wherever it goes.
    fn predict_parts(&self, at: usize, parts: usize) -> Predicted {
        let space = &self.reference.spaces[at];
        if space.endpoints.is_empty() {
            return Err("NoEndpoint");
        }
        if space.maps.len() + parts > MAPPINGS { Err("NoRecord") } else { Ok(()) }
    }

    fn predict_room(&self, at: usize, len: u64, limit: u64) -> Predicted {
        let (space, reference) = (&self.reference.spaces[at], &self.reference);
        let room = space.has_room(len, reference.usable, reference.granule, limit);
        if room { Ok(()) } else { Err("IovaExhausted") }
    }

    fn predict_prot(&self, prot: u8) -> Predicted {
        if prot & 3 == 0 {
            return Err("NoPermission");
        }
        let mmio = self.reference.config.offers(virtio_iommu_model::feature::MMIO);
        if prot & 4 != 0 && !mmio { Err("NoMmioFlag") } else { Ok(()) }
    }

    fn map(&mut self, slot: u8, pages: u64, phys: u64, prot: u8, low: bool) -> Done {
        let Some(at) = self.at(slot) else { return Ok(None) };
        let granule = self.reference.granule;
        let (len, phys, limit) = (pages * granule, PHYS + phys * granule, self.limit(low));
        let flags = Prot::from_bits_retain(prot.into());
        // SAFETY: nobody's memory.
        let mapped = unsafe { self.domain(slot).map(PhysAddr::new(phys), len, flags, Iova::new(limit)) };
        let predicted = self.predict_prot(prot).and_then(|()| self.predict_parts(at, 1));
        let predicted = predicted.and_then(|()| self.predict_room(at, len, limit));
        judge(&mapped, self.tolerate(at, &mapped, predicted))?;
        let Ok(iova) = mapped else { return NOTHING };
        self.check_placed(at, iova, len, limit)?;
        Ok(Some(vec![self.mapped(at, iova.get(), len, phys, prot.into(), Owner::Raw)]))
    }

    fn map_at(&mut self, slot: u8, place: Place, pages: u64, phys: u64, prot: u8) -> Done {
        let Some(at) = self.at(slot) else { return Ok(None) };
        let (granule, usable) = (self.reference.granule, self.reference.usable);
        let (len, phys) = (pages * granule, PHYS + phys * granule);
        let first = match place {
            Place::Low(granules) => usable.0 + u64::from(granules) * granule,
            Place::Msi(granules) => 0xfee0_0000 + u64::from(granules) * granule - 8 * granule,
            Place::High(granules) => usable.1 + 1 - u64::from(granules) * granule,
            Place::Odd(granules) => usable.0 + u64::from(granules) * granule + 1,
        };
        let flags = Prot::from_bits_retain(prot.into());
        // SAFETY: nobody's memory.
        let mapped = unsafe { self.domain(slot).map_at(Iova::new(first), PhysAddr::new(phys), len, flags) };
        let last = first.checked_add(len - 1).filter(|last| *last <= usable.1);
        let space = &self.reference.spaces[at];
        let predicted = match last {
            _ if !first.is_multiple_of(granule) => Err("Misaligned"),
            None => Err("OutsideInputRange"),
            Some(last) => self
                .predict_prot(prot)
                .and_then(|()| self.predict_parts(at, 1))
                .and_then(|()| if space.is_free((first, last)) { Ok(()) } else { Err("InUse") }),
        };
        let touched = vec![(first, last.unwrap_or(first))];
        if judge(&mapped, self.tolerate(at, &mapped, predicted))? {
            self.mapped(at, first, len, phys, prot.into(), Owner::Raw);
        }
        Ok(Some(touched))
    }

    fn unmap(&mut self, slot: u8, which: u8, neighbours: u8) -> Done {
        let Some(at) = self.at(slot) else { return Ok(None) };
        let maps = &self.reference.spaces[at].maps;
        let raw: Vec<u64> =
            maps.iter().filter(|(_, map)| map.owner == Owner::Raw).map(|(first, _)| *first).collect();
        let Some(first) = pick(raw.len(), which).map(|which| raw[which]) else { return Ok(None) };
        let mut last = maps[&first].last;
        for _ in 0..neighbours {
            let next = last.checked_add(1).and_then(|next| maps.get(&next));
            let Some(next) = next.filter(|next| next.owner == Owner::Raw) else { break };
            last = next.last;
        }
        // SAFETY: the test made the mappings.
        let unmapped = unsafe { self.domain(slot).unmap(Iova::new(first), last - first + 1) };
        judge(&unmapped, Ok(()))?;
        Ok(Some(self.unmapped(at, first, last)))
    }

    /// Tries to unmap what is not made of whole mappings, most of the time.
    fn unmap_other(&mut self, slot: u8, which: u8, skip: u64, pages: u64) -> Done {
        let Some(at) = self.at(slot) else { return Ok(None) };
        let (granule, space) = (self.reference.granule, &self.reference.spaces[at]);
        let firsts: Vec<u64> = space.maps.keys().copied().collect();
        let Some(which) = pick(firsts.len(), which) else { return Ok(None) };
        let Some(first) = firsts[which].checked_add(skip * granule) else { return Ok(None) };
        let len = pages * granule;
        let predicted = match first.checked_add(len.max(1) - 1) {
            Some(last) if len > 0 => space.predict_unmap(first, last),
            _ => Err("NotMapped"),
        };
        if predicted.is_ok() {
            return Ok(None);
        }
        // SAFETY: nothing is unmapped.
        let unmapped = unsafe { self.domain(slot).unmap(Iova::new(first), len) };
        judge(&unmapped, predicted)?;
        NOTHING
    }

    fn open(&mut self, endpoint: usize, slot: u8, bounce: u64, low: bool) -> Done {
        let Some(to) = self.at(slot) else { return Ok(None) };
        let (granule, limit) = (self.reference.granule, self.limit(low));
        let bounce_bytes = (bounce * granule) as usize;
        let options = EndpointOptions { limit: Iova::new(limit), bounce_bytes, ..Default::default() };
        let was_there = self.reference.place[endpoint] == Some(to);
        let parked = self.reference.place[endpoint].is_some();
        let predicted = self.reference.predict_attach(endpoint, to);
        let opened = self.viommu().open(self.id(endpoint), self.domain(slot), options);
        if let Err(why) = self.tolerate(to, &opened, predicted) {
            let why = if predicted.is_ok() { "" } else { why };
            judge(&opened, Err(&format!("Attach({why}")))?;
            return NOTHING;
        }
        self.reference.join(endpoint, to);
        let room = self.predict_room(to, granule, limit);
        let pages = if bounce > 0 { self.predict_parts(to, 1) } else { Ok(()) };
        // The addresses for both: one granule that faults, and then the pages.
        let view = match opened {
            Ok(view) => view,
            Err(error) => {
                let error = format!("{error:?}");
                let expected = match (room, pages) {
                    (Err(why), _) | (_, Err(why)) => error.contains(why),
                    _ => error.contains("IovaExhausted"),
                };
                same(&format!("opening came to {error}, expected"), expected, true)?;
                // The granule that faults is not given back.
                self.reference.spaces[to].leaky |= room.is_ok();
                if !was_there && !parked {
                    self.reference.leave(endpoint);
                }
                return NOTHING;
            }
        };
        same("room for what was opened", (room.is_ok(), pages.is_ok()), (true, true))?;
        self.check_placed(to, view.faulting_iova(), granule, limit)?;
        let faulting = (view.faulting_iova().get(), view.faulting_iova().get() + granule - 1);
        let space = &mut self.reference.spaces[to];
        space.faulting.push(faulting);
        space.handles += 1;
        let bounce = if bounce > 0 { Some(self.find_bounce(to, &view, bounce_bytes)?) } else { None };
        self.views.push(OpenView { endpoint, space: to, bounce, faulting, limit, view });
        Ok(Some(vec![faulting]))
    }

    /// Where the bounce pages of a new view are: only its driver's buffers tell.
    fn find_bounce(&mut self, to: usize, view: &View, len: usize) -> Result<u64, Failed> {
        let mut buffer = [0u8; 1];
        let buffer = std::ptr::NonNull::from(&mut buffer[..]);
        // SAFETY: the buffer is the test's, and no endpoint does anything meanwhile.
        let iova = unsafe { view.share(buffer, Direction::ToDevice) }.map_err(|error| error.to_string())?;
        // SAFETY: just shared.
        unsafe { view.unshare(iova, buffer, Direction::ToDevice) };
        self.check_placed(to, iova, len as u64, view.limit().get())?;
        let found = view.domain().translate(iova).ok_or("bounce pages without a record")?;
        same("bounce pages", (found.range.start(), found.range.len_bytes()), (iova, Some(len as u64)))?;
        self.mapped(to, iova.get(), len as u64, found.phys.get(), 3, Owner::Bounce);
        Ok(iova.get())
    }

    fn close(&mut self, view: u8) -> Done {
        let Some(which) = pick(self.views.len(), view) else { return Ok(None) };
        let OpenView { endpoint, space, bounce, faulting, view, .. } = self.views.swap_remove(which);
        // One that was moved, or detached, meanwhile stays as it is.
        let here = self.reference.place[endpoint] == Some(space);
        let predicted = if here { self.predict_detach(endpoint) } else { Ok(()) };
        judge(&view.close(), predicted)?;
        let mut touched = vec![faulting];
        if let Some(first) = bounce {
            let last = self.reference.spaces[space].maps[&first].last;
            touched.extend(self.unmapped(space, first, last));
        }
        self.reference.spaces[space].faulting.retain(|range| *range != faulting);
        if here && predicted.is_ok() {
            self.reference.leave(endpoint);
        }
        self.released(space);
        Ok(Some(touched))
    }

    /// Drops a view without closing it.
    fn forget(&mut self, view: u8) -> Done {
        let Some(which) = pick(self.views.len(), view) else { return Ok(None) };
        let OpenView { space, bounce, view, .. } = self.views.swap_remove(which);
        drop(view);
        let maps = &mut self.reference.spaces[space].maps;
        if let Some(map) = bounce.and_then(|first| maps.get_mut(&first)) {
            map.owner = Owner::Quarantine;
        }
        self.released(space);
        NOTHING
    }

    fn scatter(&mut self, view: u8, segments: &[Segment], direction: u8) -> Done {
        let Some(which) = pick(self.views.len(), view) else { return Ok(None) };
        let (at, limit, granule) = (self.views[which].space, self.views[which].limit, self.reference.granule);
        let direction =
            [Direction::ToDevice, Direction::FromDevice, Direction::Both][usize::from(direction) % 3];
        let list: Vec<_> = segments.iter().map(|part| physical(*part, granule)).collect();
        let runs = runs(&list, granule);
        let len = runs.iter().map(|(_, len)| len).sum();
        let mut iovas = vec![Iova::new(0); list.len()];
        let endpoint = &self.views[which].view;
        // SAFETY: nobody's memory.
        let mapped = unsafe { endpoint.map_scatter(&list, direction, &mut iovas) };
        let predicted = self.predict_room(at, len, limit);
        let predicted = predicted.and_then(|()| self.predict_parts(at, runs.len()));
        let mapping = match self.tolerate(at, &mapped, predicted) {
            Ok(()) => mapped.map_err(|error| format!("a list of {runs:x?}: {error}"))?,
            Err(why) => {
                judge(&mapped, Err(&format!("Map({why}")))?;
                return NOTHING;
            }
        };
        let first = mapping.iova().get() & !(granule - 1);
        self.check_placed(at, Iova::new(first), len, limit)?;
        let (mut next, mut touched) = (first, Vec::new());
        for (phys, len) in &runs {
            touched.push(self.mapped(at, next, *len, *phys, direction.prot().bits(), Owner::List));
            next += len;
        }
        for (segment, iova) in list.iter().zip(&iovas) {
            let record = self.reference.spaces[at].mapping_at(iova.get());
            let phys = record.map(|(first, map)| iova.get() - first + map.phys);
            same("where a segment is", phys, Some(segment.phys.get()))?;
        }
        self.lists.push((at, (first, next - 1), mapping));
        Ok(Some(touched))
    }

    /// A view of a domain, whichever endpoint's.
    fn view_of(&self, at: usize) -> Option<&View> {
        self.views.iter().find(|view| view.space == at).map(|view| &view.view)
    }

    fn unmap_list(&mut self, which: u8) -> Done {
        let Some(which) = pick(self.lists.len(), which) else { return Ok(None) };
        if self.view_of(self.lists[which].0).is_none() {
            return Ok(None);
        }
        let (at, (first, last), mapping) = self.lists.swap_remove(which);
        let unmapped = self.view_of(at).map(|view| view.unmap(mapping));
        same("unmapping a list", unmapped, Some(Ok(())))?;
        Ok(Some(self.unmapped(at, first, last)))
    }

    fn alloc(&mut self, view: u8, pages: u64) -> Done {
        let Some(which) = pick(self.views.len(), view) else { return Ok(None) };
        let (at, limit) = (self.views[which].space, self.views[which].limit);
        let len = pages * self.reference.granule;
        let before = self.machine.outstanding();
        // Not whole granules, which the driver makes of it.
        let memory = self.views[which].view.alloc_coherent(len as usize - 1);
        let predicted = self.predict_room(at, len, limit).and_then(|()| self.predict_parts(at, 1));
        let memory = match self.tolerate(at, &memory, predicted) {
            Ok(()) => memory.map_err(|error| format!("{len:#x} coherent bytes: {error}"))?,
            Err(why) => {
                judge(&memory, Err(&format!("Map({why}")))?;
                same("blocks of memory after a failure", self.machine.outstanding(), before)?;
                return NOTHING;
            }
        };
        self.check_placed(at, memory.iova(), len, limit)?;
        let phys = memory.ptr().addr().get() as u64;
        let range = self.mapped(at, memory.iova().get(), len, phys, 3, Owner::Coherent);
        self.coherent.push((at, memory));
        Ok(Some(vec![range]))
    }

    fn free(&mut self, which: u8) -> Done {
        let Some(which) = pick(self.coherent.len(), which) else { return Ok(None) };
        if self.view_of(self.coherent[which].0).is_none() {
            return Ok(None);
        }
        let (at, memory) = self.coherent.swap_remove(which);
        let first = memory.iova().get();
        let map = self.reference.spaces[at].maps[&first];
        let freed = self.view_of(at).map(|view| view.free_coherent(memory));
        same("freeing", freed, Some(Ok(())))?;
        same("freed memory is alive", self.machine.is_live(PhysAddr::new(map.phys)), false)?;
        Ok(Some(self.unmapped(at, first, map.last)))
    }

    /// Lends the endpoint a buffer through its bounce pages, and takes it back.
    fn share(&mut self, view: u8, len: usize) -> Done {
        let Some(which) = pick(self.views.len(), view) else { return Ok(None) };
        let OpenView { space, bounce, view, .. } = &self.views[which];
        let mut buffer = vec![0x5a; len];
        let buffer = std::ptr::NonNull::from(&mut buffer[..]);
        let pages = bounce.map(|first| (first, self.reference.spaces[*space].maps[&first].last));
        let fits = pages.is_some_and(|(first, last)| last - first >= len as u64 - 1);
        // SAFETY: the buffer is the test's, and the endpoint does nothing meanwhile.
        let shared = unsafe { view.share(buffer, Direction::Both) };
        if judge(&shared, if fits { Ok(()) } else { Err("NoBounce") })?
            && let (Ok(iova), Some((first, last))) = (shared, pages)
        {
            let inside = iova.get() >= first && iova.get() + (len as u64 - 1) <= last;
            same("a shared buffer in its pages", inside, true)?;
            // SAFETY: just shared.
            unsafe { view.unshare(iova, buffer, Direction::Both) };
        }
        NOTHING
    }

    /// The driver takes in exactly the fault records that the device delivered.
    fn poll(&mut self) -> Done {
        let delivered = self.machine.device().counters().events - self.faults.0;
        self.faults.1 += self.viommu().poll();
        same("fault records", self.faults.1, delivered)?;
        NOTHING
    }

    fn reclaim(&mut self) -> Done {
        let spaces = self.reference.spaces.iter();
        let quarantined: Vec<(usize, u64, u64, u64)> = spaces
            .enumerate()
            .flat_map(|(at, space)| space.maps.iter().map(move |(first, map)| (at, *first, map)))
            .filter(|(_, _, map)| map.owner == Owner::Quarantine)
            .map(|(at, first, map)| (at, first, map.last, map.phys))
            .collect();
        same("reclaimed", self.viommu().reclaim(), quarantined.len())?;
        let mut touched = Vec::new();
        for (at, first, last, phys) in quarantined {
            same("reclaimed memory is alive", self.machine.is_live(PhysAddr::new(phys)), false)?;
            touched.extend(self.unmapped(at, first, last));
        }
        Ok(Some(touched))
    }
}

fn physical(part: Segment, granule: u64) -> PhysSegment {
    let unit = granule / 16;
    let phys = PHYS + u64::from(part.phys) * granule + u64::from(part.start) * unit;
    PhysSegment { phys: PhysAddr::new(phys), len: (u64::from(part.len) * unit) as usize }
}

/// Whole granules around each segment, those that touch in memory together: address and length.
fn runs(segments: &[PhysSegment], granule: u64) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for segment in segments {
        let first = segment.phys.get() / granule * granule;
        let len = (segment.phys.get() + segment.len as u64).next_multiple_of(granule) - first;
        match runs.last_mut() {
            Some((start, before)) if *start + *before == first => *before += len,
            _ => runs.push((first, len)),
        }
    }
    runs
}
