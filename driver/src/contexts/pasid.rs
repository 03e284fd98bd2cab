//! Numbers of contexts, and of groups of page requests.

use crate::id::EndpointId;
use core::fmt;

/// The number of a context in its domain, which an endpoint's accesses carry: a process address space identifier.
///
/// At most 20 bits, as PCIe has them. Holding one does not prove that there is such a context.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pasid(u32);

impl Pasid {
    /// Names a PASID, or `None` above 20 bits.
    pub const fn new(pasid: u32) -> Option<Self> {
        if pasid >> 20 == 0 { Some(Self(pasid)) } else { None }
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Pasid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for Pasid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pasid({self})")
    }
}

/// Names a group of page requests of one endpoint in one context, which gets one answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageGroupId {
    /// Who asks.
    pub endpoint: EndpointId,
    /// For which context; `None` without a PASID.
    pub pasid: Option<Pasid>,
    /// The endpoint's number for the group. It uses numbers again after the answer.
    pub group: u16,
    /// Whether the request that this came with is the last one of the group.
    pub last: bool,
}
