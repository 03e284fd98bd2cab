//! The draft's contexts (PROTOCOL 5.8): what a domain has for each PASID, and for accesses without one.
//!
//! `attach` adds and removes contexts, `map` has MAP and UNMAP in one, `invalidate` what is cached, `translate` where
//! accesses go. Every number is written here a second time, as everywhere in the model.

mod attach;
mod invalidate;
mod map;
mod translate;

use alloc::collections::BTreeMap;

use crate::domain::Domain;
use crate::number::flag;
use crate::walk::{Cache, DescriptorTable, Found, Table};

/// What accesses without a PASID meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Anonymous {
    /// The default context, driven by MAP and UNMAP.
    Mapped,
    /// Nothing: they are blocked.
    Blocked,
    /// They bypass.
    Bypass,
    /// The context of PASID 0.
    Zero,
}

impl Anonymous {
    pub(crate) fn from_flags(flags: u32) -> Self {
        match (flags & flag::ATTACH_ANONYMOUS) >> 1 {
            0 => Self::Mapped,
            1 => Self::Blocked,
            2 => Self::Bypass,
            _ => Self::Zero,
        }
    }

    /// What a table of context descriptors calls it (S1DSS); none where MAP and UNMAP drive it.
    fn s1dss(self) -> Option<u8> {
        match self {
            Self::Mapped => None,
            Self::Blocked => Some(0),
            Self::Bypass => Some(1),
            Self::Zero => Some(2),
        }
    }
}

/// A context that was added by its PASID.
#[derive(Clone, Debug)]
pub(crate) enum Context {
    /// Driven by MAP_CONTEXT and UNMAP_CONTEXT. Of the domain only the mappings count.
    Mapped(Domain),
    /// A table in guest memory.
    Owned(Owned),
}

/// A table in guest memory, and what is cached of it.
#[derive(Clone, Debug)]
pub(crate) struct Owned {
    table: Table,
    /// Of Arm's tables.
    asid: Option<u16>,
    cache: Cache,
}

/// A table of context descriptors in guest memory, and what is cached of it.
#[derive(Clone, Debug)]
pub(crate) struct Descriptors {
    table: DescriptorTable,
    /// Descriptors by PASID; also that there is none.
    found: BTreeMap<u32, Option<Found>>,
    /// Translations by PASID, which outlive the descriptor.
    caches: BTreeMap<u32, Cache>,
}

impl Descriptors {
    fn new(table: DescriptorTable) -> Self {
        Self { table, found: BTreeMap::new(), caches: BTreeMap::new() }
    }
}
