//! Adding and removing contexts, and mapping in them: the checks and marks before a request is sent.

use super::{ContextEffect, ContextKey, ContextRecord, ContextState, Record, first_in};
use crate::addr::{IovaRange, PhysAddr};
use crate::contexts::{ContextError, ContextMapError, ContextRequest, ContextUnmapError};
use crate::contexts::{Pasid, TableDescription};
use crate::engine::mapping::{MappingState, Purpose};
use crate::engine::tag::Tag;
use crate::engine::{DomainKey, Engine, GENERATIONS, Op, Space};
use crate::prot::Prot;
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

impl Engine {
    /// Records a context, whose request is then sent in any case. Takes `space`, unless there is an error.
    pub(crate) fn begin_context(
        &mut self,
        key: DomainKey,
        (pasid, table): (Option<Pasid>, TableDescription),
        space: &mut Option<Box<Space>>,
        limit: usize,
    ) -> Result<(ContextRequest, ContextKey), ContextError> {
        let endpoint = self.member(key).filter(|_| self.is_settled(key)).ok_or(ContextError::NoEndpoint)?;
        let domain = self.domain_mut(key).ok_or(ContextError::NoEndpoint)?;
        let taken = |record: &ContextRecord| {
            record.pasid == pasid && (record.state != ContextState::Gone || record.late > 0)
        };
        if domain.contexts().any(taken) {
            return Err(match pasid {
                Some(pasid) => ContextError::Taken { pasid },
                None => ContextError::HasDescriptors,
            });
        }
        let free = domain.contexts.iter().position(Option::is_none);
        let index = free.unwrap_or(domain.contexts.len());
        let many =
            pasid.is_some() && domain.contexts().filter(|record| record.pasid.is_some()).count() >= limit;
        if many || index == domain.contexts.capacity() {
            return Err(ContextError::TooMany { limit });
        }
        if free.is_none() {
            // Within the capacity: allocates nothing.
            domain.contexts.push(None);
        }
        let generation = GENERATIONS.fetch_add(1, Ordering::Relaxed);
        let (state, space) = (ContextState::There, space.take());
        domain.contexts[index] =
            Some(ContextRecord { generation, pasid, table, space, state, owned: true, late: 0 });
        let request = ContextRequest::AttachTable { endpoint, pasid, table };
        Ok((request, ContextKey { domain: key, index: index as u32, generation }))
    }

    /// Whether it has an endpoint, and is not being told again of what the device lost.
    fn is_settled(&self, key: DomainKey) -> bool {
        self.domain(key).is_some_and(|domain| domain.attached() > 0 && !domain.is_in_transition())
    }

    /// Begins to remove a context. `None` where that takes no request.
    pub(crate) fn begin_removal(&mut self, key: ContextKey) -> Result<Option<ContextRequest>, ContextError> {
        let Some((_, record)) = self.context(key) else { return Ok(None) };
        let pasid = record.pasid;
        let reached = self.reach_context(key).map_err(|error| ContextError::of(pasid, error))?;
        if reached.is_none() {
            if let Some(record) = self.context_mut(key) {
                record.state = ContextState::Gone;
            }
            return Ok(None);
        }
        let (endpoint, pasid) = self.member(key.domain).zip(pasid).ok_or(ContextError::NoEndpoint)?;
        Ok(Some(ContextRequest::DetachPasid { endpoint, pasid }))
    }

    /// How many records a mapped context lacks for one more mapping.
    pub(crate) fn context_lacks(&self, key: ContextKey) -> usize {
        let space = self.context(key).and_then(|(_, record)| record.space.as_ref());
        space.map_or(0, |space| space.lacks(space.len() + 1))
    }

    /// Adds the records that a context [lacks](Self::context_lacks). They come back if they are not needed, to be dropped
    /// outside of the lock.
    pub(crate) fn grow_context(&mut self, key: ContextKey, spare: Vec<Record>) -> Option<Vec<Record>> {
        match self.context_mut(key).and_then(|record| record.space.as_mut()) {
            Some(space) => space.grow(space.len() + 1, spare),
            None => Some(spare),
        }
    }

    /// Records a mapping in a mapped context, whose request is then sent in any case. Refuses what must never be sent (I5).
    pub(crate) fn begin_context_map(
        &mut self,
        key: ContextKey,
        (range, phys, prot): (IovaRange, PhysAddr, Prot),
    ) -> Result<(ContextRequest, Op), ContextMapError> {
        let geometry = self.geometry;
        let mmio = prot.contains(Prot::MMIO) && !geometry.mmio_flag;
        if mmio || !Prot::all().contains(prot) || !prot.intersects(Prot::READ | Prot::WRITE) {
            return Err(ContextMapError::Prot { prot });
        }
        let free = self.unreserved_in(key.domain, range);
        if !geometry.usable.contains(range) || free != Some(range) {
            return Err(ContextMapError::Unusable { range });
        }
        let there = self.reach_context(key).map_err(ContextMapError::Refused)?.is_some();
        if !there || !self.is_settled(key.domain) {
            return Err(ContextMapError::NoEndpoint);
        }
        let list = self.begin_list();
        let record = self.context_mut(key).ok_or(ContextMapError::NoEndpoint)?;
        let (Some(pasid), Some(space)) = (record.pasid, record.space.as_mut()) else {
            return Err(ContextMapError::NoEndpoint);
        };
        if let Some(met) = first_in(space, range) {
            return Err(ContextMapError::InUse { range: met.range });
        }
        if space.is_full() || !matches!(space.take(range), Ok(true)) {
            return Err(ContextMapError::NoRecord);
        }
        let purpose = Purpose { prot, tag: Tag::NONE };
        if space.insert(range, phys, (purpose, list), &mut None).is_none() {
            return Err(ContextMapError::NoRecord);
        }
        let op = Op::Context { context: key, effect: ContextEffect::Map(range) };
        Ok((ContextRequest::Map { pasid, range, phys, prot }, op))
    }

    /// Marks the mappings in a range of a mapped context, which may have holes, as being unmapped. `None` where that takes
    /// no request.
    pub(crate) fn begin_context_unmap(
        &mut self,
        key: ContextKey,
        range: IovaRange,
    ) -> Result<Option<(ContextRequest, Op)>, ContextUnmapError> {
        let there = self.reach_context(key).map_err(ContextUnmapError::Request)?.is_some();
        let Some(record) = self.context_mut(key) else { return Ok(None) };
        let (Some(pasid), Some(space)) = (record.pasid, record.space.as_mut()) else { return Ok(None) };
        let Some(first) = first_in(space, range) else { return Ok(None) };
        let (start, mut last) = (first.range.start(), first.range.last());
        if start < range.start() {
            return Err(ContextUnmapError::Splits { mapping: first.range });
        }
        let met = space.iter_from(start).take_while(|record| record.range.start() <= range.last());
        for record in met {
            let mapping = record.range;
            if !range.contains(mapping) {
                return Err(ContextUnmapError::Splits { mapping });
            }
            if !matches!(record.state, MappingState::Live | MappingState::Quarantined) {
                return Err(ContextUnmapError::InFlight { mapping });
            }
            last = mapping.last();
        }
        let Some(covered) = IovaRange::new(start, last) else { return Ok(None) };
        space.retain_in(covered, None, |record| {
            (record.state, record.owned) = (MappingState::Unmapping, false);
            there
        });
        if !there {
            return Ok(None);
        }
        let op = Op::Context { context: key, effect: ContextEffect::Unmap(covered) };
        Ok(Some((ContextRequest::Unmap { pasid, range: covered }, op)))
    }
}
