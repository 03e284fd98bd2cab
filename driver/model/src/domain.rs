//! One domain: its mappings, kept as the units that MAP made.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use crate::iommu::context::{Anonymous, Context, Descriptors};
use crate::met::MetOrder;

/// One mapping, made by one MAP and removed whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First IOVA.
    pub virt_first: u64,
    /// Last IOVA.
    pub virt_last: u64,
    /// Guest-physical address of the first byte.
    pub phys_first: u64,
    /// Flag bits of the MAP.
    pub flags: u32,
}

/// An UNMAP would split a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WouldSplit;

/// One domain. Mappings never overlap and never merge.
#[derive(Clone, Debug)]
pub(crate) struct Domain {
    pub(crate) bypass: bool,
    /// What accesses without a PASID meet; `Mapped` but on a device of the draft.
    pub(crate) anonymous: Anonymous,
    /// Contexts by PASID.
    pub(crate) contexts: BTreeMap<u32, Context>,
    /// The guest's table of context descriptors, in place of those.
    pub(crate) descriptors: Option<Descriptors>,
    /// Class of its endpoints.
    pub(crate) class: u32,
    /// Endpoints attached; the domain ends with the last one.
    pub(crate) endpoints: usize,
    mappings: BTreeMap<u64, Mapping>,
    /// The order in which QEMU meets them, on a device with that quirk.
    met: Option<MetOrder>,
    /// Inverted ranges that were taken by a device with that quirk, as (start, end).
    pub(crate) inverted: Vec<(u64, u64)>,
}

impl Domain {
    /// An empty domain without endpoints.
    pub(crate) fn new(bypass: bool, class: u32, met: Option<MetOrder>) -> Self {
        Self {
            bypass,
            anonymous: Anonymous::Mapped,
            contexts: BTreeMap::new(),
            descriptors: None,
            class,
            endpoints: 0,
            mappings: BTreeMap::new(),
            met,
            inverted: Vec::new(),
        }
    }

    /// The same domain with another rule for accesses without a PASID.
    pub(crate) fn with_anonymous(anonymous: Anonymous, domain: Self) -> Self {
        Self { anonymous, ..domain }
    }

    pub(crate) fn mappings(&self) -> impl Iterator<Item = &Mapping> {
        self.mappings.values()
    }

    pub(crate) fn len(&self) -> usize {
        self.mappings.len()
    }

    /// A mapping that has an address in the range. With `last < first`, one that holds both ends.
    pub(crate) fn overlap(&self, first: u64, last: u64) -> Option<&Mapping> {
        let (_, mapping) = self.mappings.range(..=last).next_back()?;
        (mapping.virt_last >= first).then_some(mapping)
    }

    /// The mapping that holds an IOVA.
    pub(crate) fn lookup(&self, iova: u64) -> Option<&Mapping> {
        self.overlap(iova, iova)
    }

    /// The mapping that a lookup with a range meets first: QEMU's choice if the order is kept, else one with
    /// the first address.
    pub(crate) fn first_met(&self, first: u64, last: u64) -> Option<&Mapping> {
        match &self.met {
            Some(met) => met.find((first, last)).and_then(|(start, _)| self.mappings.get(&start)),
            None => self.lookup(first).or_else(|| self.overlap(first, last)),
        }
    }

    /// Adds a mapping that overlaps none.
    pub(crate) fn insert(&mut self, mapping: Mapping) {
        self.mappings.insert(mapping.virt_first, mapping);
        if let Some(met) = &mut self.met {
            met.insert((mapping.virt_first, mapping.virt_last));
        }
    }

    /// Removes every mapping within the range, or none at all, and returns how many there were; `first <= last`.
    ///
    /// Where the order is kept, mappings go one by one as they are met, until one would be split.
    pub(crate) fn unmap(&mut self, first: u64, last: u64) -> Result<usize, WouldSplit> {
        if self.met.is_some() {
            return self.unmap_as_met(first, last);
        }
        let edges = [self.lookup(first), self.lookup(last)];
        if edges.iter().flatten().any(|edge| edge.virt_first < first || edge.virt_last > last) {
            return Err(WouldSplit);
        }
        let covered: Vec<u64> = self.mappings.range(first..=last).map(|(start, _)| *start).collect();
        for start in &covered {
            self.mappings.remove(start);
        }
        Ok(covered.len())
    }

    fn unmap_as_met(&mut self, first: u64, last: u64) -> Result<usize, WouldSplit> {
        let mut removed = 0;
        while let Some(mapping) = self.first_met(first, last).copied() {
            if mapping.virt_first < first || mapping.virt_last > last {
                return Err(WouldSplit);
            }
            self.mappings.remove(&mapping.virt_first);
            if let Some(met) = &mut self.met {
                met.remove((mapping.virt_first, mapping.virt_last));
            }
            removed += 1;
        }
        Ok(removed)
    }
}
