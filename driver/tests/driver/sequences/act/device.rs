//! What the device does late, and what is not about one domain: the global bypass, answers, the quarantine.

use virtio_iommu::DetachError;
use virtio_iommu_model::Release;

use super::super::check::same;
use super::super::reference::Memory;
use super::super::world::{Failed, World};
use super::{Done, NOTHING, judge};

impl World {
    /// The driver takes in exactly the fault records that the device delivered, and all late answers.
    pub(super) fn poll(&mut self) -> Done {
        let delivered = self.machine.device().counters().events - self.before.events;
        self.faults += self.viommu().poll();
        same("fault records", self.faults, delivered)?;
        same("fault records by kind", self.viommu().stats().faults.delivered, delivered)?;
        self.trouble.late = 0;
        self.let_go()?;
        self.compare_memory()?;
        NOTHING
    }

    pub(super) fn release(&mut self, which: Release) -> Done {
        let released = self.machine.release(which);
        self.trouble.late += released as u64;
        Ok((released > 0).then(Vec::new))
    }

    pub(super) fn reclaim(&mut self) -> Done {
        let reclaimed = self.viommu().reclaim();
        let (mut certain, mut possible, mut touched) = (0, 0, Vec::new());
        for at in 0..self.reference.spaces.len() {
            let maps = &self.reference.spaces[at].maps;
            let leaving: Vec<_> = maps
                .iter()
                .filter(|(_, map)| map.is_leaving())
                .map(|(first, map)| (*first, map.last))
                .collect();
            if leaving.is_empty() {
                continue;
            }
            possible += leaving.len();
            if self.is_sure(at) {
                for (first, last) in leaving {
                    if self.reference.spaces[at].predict_unmap(first, last).is_ok() {
                        certain += 1;
                        touched.extend(self.unmapped(at, first, last)?);
                    }
                }
                self.reference.settle(at);
            }
        }
        let in_doubt = self.reference.spaces.iter().any(|space| space.in_doubt);
        let most = if in_doubt { possible } else { certain };
        if !(certain..=most).contains(&reclaimed) {
            return Err(format!("{reclaimed} mappings reclaimed, expected {certain} to {most}"));
        }
        Ok(Some(touched))
    }

    pub(super) fn set_bypass(&mut self, open: bool) -> Done {
        let result = match open {
            // SAFETY: the endpoints do nothing but what the test has them do.
            true => unsafe { self.viommu().open_bypass() },
            false => self.viommu().close_bypass(),
        };
        if !judge(&result, if self.has_bypass() { Ok(()) } else { Err("NoFeature") })? {
            return NOTHING;
        }
        (self.reference.bypass, self.reference.closed) = (open, !open);
        let without: Vec<_> = (0..self.reference.spaces.len())
            .filter(|at| self.reference.spaces[*at].endpoints.is_empty())
            .collect();
        let touched = without.iter().flat_map(|at| self.some_of(Some(*at))).collect();
        if !open {
            for at in without {
                self.reference.settle(at);
            }
            // What was kept while they might bypass goes back to its owners.
            self.poll()?;
        }
        Ok(Some(touched))
    }

    /// The device answers everything, and the kernel finds out what is left: after that there is no doubt, and nothing
    /// in quarantine.
    pub(super) fn settle(&mut self, attach: bool) -> Done {
        self.machine.device().inject.script.clear();
        self.trouble.pending = None;
        self.trouble.delay.store(0, std::sync::atomic::Ordering::Relaxed);
        if self.has_bypass() {
            self.set_bypass(false)?;
        }
        self.machine.release(Release::AllReversed);
        self.poll()?;
        for endpoint in 0..self.reference.place.len() {
            self.find_out(endpoint, attach)?;
        }
        let mut touched = self.reclaim()?.unwrap_or_default();
        self.poll()?;
        if self.trouble.lost > 0 {
            return Ok(Some(touched));
        }
        same("requests given up", self.viommu().stats().abandoned_requests, 0)?;
        for at in 0..self.reference.spaces.len() {
            let unsure = self.reference.spaces[at].endpoints.iter().any(|at| self.reference.unsure[*at]);
            if self.reference.spaces[at].in_doubt && !unsure {
                touched.extend(self.clear_up(at)?);
            }
        }
        self.compare_memory()?;
        Ok(Some(touched))
    }

    /// Where an endpoint is that may be in its domain, or not.
    fn find_out(&mut self, endpoint: usize, attach: bool) -> Result<(), Failed> {
        let (Some(at), true) = (self.reference.place[endpoint], self.reference.unsure[endpoint]) else {
            return Ok(());
        };
        if attach
            && !self.reference.unplugged[endpoint]
            && let Some(domain) = self.handle(at)
        {
            let attached = self.viommu().attach(self.id(endpoint), domain);
            if attached.is_ok() {
                self.reference.reserve(endpoint, at);
                self.reference.join(endpoint, at);
                return Ok(());
            }
        }
        match self.viommu().detach(self.id(endpoint)) {
            Ok(()) => self.reference.leave(endpoint),
            // Which says that it is detached, unless an answer is still owed.
            Err(DetachError::NotAttached(_)) if self.trouble.lost == 0 => self.reference.leave(endpoint),
            Err(_) if self.trouble.lost > 0 || !self.can_detach() => {}
            Err(error) => return Err(format!("endpoint {endpoint} cannot be found: {error:?}")),
        }
        Ok(())
    }

    /// Ends the doubt about a domain, of which the device answered all and the driver reclaimed what it could.
    fn clear_up(&mut self, at: usize) -> Result<Vec<(u64, u64)>, Failed> {
        let (closed, space) = (self.reference.closed, &self.reference.spaces[at]);
        let (dead, held) = (space.endpoints.is_empty(), space.handles > 0);
        // Of a domain that nobody holds the driver says nothing: then the device tells.
        let leaving: Vec<_> = space
            .maps
            .iter()
            .filter(|(_, map)| map.is_leaving())
            .map(|(first, map)| (*first, map.last))
            .collect();
        // What the device lost with the domain cannot be unmapped, as long as the driver does not know that it did.
        if self.reference.config.quirks.empty_unmap_unwritten {
            if !held && !leaving.is_empty() {
                return Ok(Vec::new());
            }
            self.never_mapped(at);
        } else if held && (closed || !dead) {
            same("what is left in quarantine", leaving, Vec::new())?;
        } else if closed || !dead {
            for (first, last) in leaving {
                self.unmapped(at, first, last)?;
            }
        } else if !held {
            self.tell_by_memory(at);
            if self.reference.spaces[at].maps.values().any(|map| map.memory == Memory::Nowhere) {
                return Ok(Vec::new());
            }
        }
        let space = &mut self.reference.spaces[at];
        space.in_doubt = false;
        for map in space.maps.values_mut().filter(|map| !map.is_lost) {
            map.claimed = !dead || !closed;
        }
        self.reference.settle(at);
        Ok(self.ranges_of(at))
    }

    /// What a domain that nobody holds still has, as far as memory that went back tells.
    fn tell_by_memory(&mut self, at: usize) {
        let mut maps = std::mem::take(&mut self.reference.spaces[at].maps);
        maps.retain(|_, map| self.is_held(map));
        self.reference.spaces[at].maps = maps;
    }

    /// What the device never mapped stays in quarantine where it does not answer an UNMAP of nothing.
    fn never_mapped(&mut self, at: usize) {
        let device = self.machine.device();
        let space = &mut self.reference.spaces[at];
        for (first, map) in space.maps.iter_mut().filter(|(_, map)| map.is_leaving()) {
            let there = device.mappings(space.id).any(|found| found.virt_first == *first);
            (map.claimed, map.is_lost) = (there, !there);
        }
    }
}
