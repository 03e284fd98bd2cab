//! Domains, and which endpoints are in them.

use std::fmt::Debug;

use virtio_iommu::{DetachError, DomainKind, DomainOptions, MoveError};

use super::super::check::same;
use super::super::reference::{Predicted, Space};
use super::super::world::{Failed, MAPPINGS, World};
use super::{Done, NOTHING, judge, judge_in};

/// Why a domain of which not all is known may refuse an endpoint.
const NO_ROOM: &[&str] = &["ReservedInUse"];

impl World {
    pub(super) fn create(&mut self, identity: bool) -> Done {
        let Some(slot) = self.slots.iter().position(Option::is_none) else { return Ok(None) };
        // What waits to go back to its owner keeps its domain's number.
        self.poll()?;
        let (first, last) = self.viommu().domain_range();
        let kind = if identity { DomainKind::Identity } else { DomainKind::Translated };
        let created = self.viommu().create_domain(DomainOptions {
            kind,
            mappings: MAPPINGS,
            ..DomainOptions::default()
        });
        let has_bypass = self.has_bypass();
        let predict = |in_use: usize, retired: usize| match in_use {
            _ if identity && !has_bypass => Err("NoIdentity"),
            16.. => Err("TooMany"),
            _ if (in_use + retired) as u64 > u64::from(last - first) => Err("IdsExhausted"),
            _ => Ok(()),
        };
        let spaces = self.reference.spaces.iter().filter(|space| !space.gone);
        let in_use = spaces.clone().count();
        // Nobody holds it, and nothing tells whether it is still there.
        let unsure = &self.reference.unsure;
        let perhaps_gone = |space: &&Space| {
            space.in_doubt && space.handles == 0 && space.endpoints.iter().all(|endpoint| unsure[*endpoint])
        };
        let least = in_use - spaces.filter(perhaps_gone).count();
        let retired = self.reference.retired;
        let at_best = judge(&created, predict(least, retired));
        at_best.or_else(|_| judge(&created, predict(in_use, retired)))?;
        let Ok(domain) = created else { return NOTHING };
        let id = domain.id().get();
        let same_id = |space: &Space| !space.gone && space.id == id;
        if let Some(other) = self.reference.spaces.iter().position(same_id) {
            let there = self.machine.device().domains().any(|domain| domain == id);
            let gone = perhaps_gone(&&self.reference.spaces[other]) && !there;
            same("the number is nobody else's", gone, true)?;
            self.reference.forget(other);
        }
        self.slots[slot] = Some((self.reference.spaces.len(), domain));
        self.reference.spaces.push(Space { id, identity, handles: 1, ..Space::default() });
        NOTHING
    }

    pub(super) fn drop_handle(&mut self, slot: u8) -> Done {
        let Some(slot) = self.slot(slot) else { return Ok(None) };
        let Some((at, domain)) = self.slots[slot].take() else { return Ok(None) };
        drop(domain);
        let before = self.ranges_of(at);
        self.released(at);
        Ok(Some(before))
    }

    /// Whether it is known where an endpoint is, and what is there.
    pub(super) fn is_known(&self, endpoint: usize) -> bool {
        let at = self.reference.place[endpoint];
        !self.reference.unsure[endpoint] && at.is_none_or(|at| !self.reference.spaces[at].in_doubt)
    }

    pub(super) fn attach(&mut self, endpoint: usize, slot: u8) -> Done {
        let Some(to) = self.at(slot) else { return Ok(None) };
        let attached = self.viommu().attach(self.id(endpoint), self.domain(slot));
        let touched = Some(self.some_of(Some(to)));
        self.attached(endpoint, to, &attached, "")?;
        Ok(touched)
    }

    /// Compares what attaching came to, and takes note. Its error may be inside of another.
    pub(super) fn attached<T: Debug, E: Debug>(
        &mut self,
        endpoint: usize,
        to: usize,
        result: &Result<T, E>,
        around: &str,
    ) -> Result<(), Failed> {
        let owed = self.machine.device().held() as u64 + self.trouble.lost;
        if owed > 0 && result.as_ref().is_err_and(|error| format!("{error:?}").contains("NoSlot")) {
            // It has to be probed again, and the device still has an earlier PROBE.
            return Ok(());
        }
        let sure = self.is_known(endpoint) & self.is_sure(to);
        let mut predicted = Ok(());
        if sure {
            let holes = self.reference.spaces[to].holes.clone();
            predicted = self.reference.predict_attach(endpoint, to);
            predicted = self.tolerate(to, result, NO_ROOM, predicted);
            if predicted == Err("ReservedInUse") {
                self.reference.spaces[to].holes = holes;
            }
            judge_in(result, around, predicted)?;
        } else if result.is_ok() {
            // One that failed may have come as far as that, or not further than its PROBE.
            self.reference.reserve(endpoint, to);
        }
        match result {
            Ok(_) => self.reference.join(endpoint, to),
            Err(_) if self.was_hit() => {
                self.reference.spaces[to].leaky = true;
                self.reference.doubt(endpoint, to);
            }
            // As it was. A domain without endpoints had one for a moment.
            Err(_) if predicted == Err("Request") && !self.reference.unplugged[endpoint] => {
                self.reference.settle(to);
                self.poll()?;
            }
            Err(_) if sure => {}
            // It may have been there for a moment, or not.
            Err(_) => {
                let space = &mut self.reference.spaces[to];
                space.leaky = true;
                space.in_doubt |= space.endpoints.is_empty();
            }
        }
        Ok(())
    }

    /// What detaching comes to.
    pub(super) fn predict_detach(&self, endpoint: usize) -> Predicted {
        match self.reference.place[endpoint] {
            None => Err("NotAttached"),
            Some(_) if self.can_detach() => Ok(()),
            Some(_) => Err("Request"),
        }
    }

    pub(super) fn detach(&mut self, endpoint: usize) -> Done {
        let touched = self.some_of(self.reference.place[endpoint]);
        let detached = self.viommu().detach(self.id(endpoint));
        self.detached(endpoint, detached)?;
        Ok(Some(touched))
    }

    /// Compares what detaching came to, and takes note.
    pub(super) fn detached(
        &mut self,
        endpoint: usize,
        result: Result<(), DetachError>,
    ) -> Result<(), Failed> {
        let hit = self.was_hit();
        if !hit && !self.reference.unsure[endpoint] {
            judge(&result, self.predict_detach(endpoint))?;
        }
        match (result, self.reference.place[endpoint]) {
            (Ok(()), _) => self.reference.leave(endpoint),
            (Err(_), Some(at)) if hit => self.reference.doubt(endpoint, at),
            (Err(_), _) => {}
        }
        Ok(())
    }

    pub(super) fn move_endpoint(&mut self, endpoint: usize, slot: u8) -> Done {
        let Some(to) = self.at(slot) else { return Ok(None) };
        let mut touched = self.some_of(self.reference.place[endpoint]);
        touched.extend(self.some_of(Some(to)));
        let moved = self.viommu().move_endpoint(self.id(endpoint), self.domain(slot));
        if self.reference.place[endpoint] == Some(to) && !self.reference.unsure[endpoint] {
            judge(&moved, Ok(()))?;
        } else if let Err(MoveError::Detach(error)) = moved {
            self.detached(endpoint, Err(error))?;
        } else if self.was_hit() {
            // Either request may have been; the domain that it left is as it should be then.
            if let Some(from) = self.reference.place[endpoint] {
                self.reference.spaces[from].in_doubt = true;
            }
            self.reference.leave(endpoint);
            self.attached(endpoint, to, &moved, "Attach(")?;
        } else {
            self.detached(endpoint, Ok(()))?;
            self.attached(endpoint, to, &moved, "Attach(")?;
        }
        Ok(Some(touched))
    }

    /// The endpoint is gone, and the kernel tells the driver.
    pub(super) fn unplug(&mut self, endpoint: usize) -> Done {
        let ready = self.can_detach() && self.is_known(endpoint) && self.trouble.pending.is_none();
        if self.reference.unplugged[endpoint] || !ready {
            return Ok(None);
        }
        let id = self.id(endpoint);
        self.machine.device().remove_endpoint(id.get());
        self.reference.unplugged[endpoint] = true;
        let touched = self.some_of(self.reference.place[endpoint]);
        let forgotten = self.viommu().forget(id);
        judge(&forgotten, Ok(()))?;
        self.reference.leave(endpoint);
        Ok(Some(touched))
    }
}
