//! What accesses without a PASID meet.

use core::fmt;

/// What accesses without a PASID meet in a domain whose contexts are the guest's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anonymous {
    /// They are blocked.
    Blocked,
    /// They reach all of memory by its physical addresses: no protection at all.
    Bypasses,
    /// They use the context of PASID 0, once there is one.
    Pasid0,
}

impl Anonymous {
    /// Bits 2:1 of ATTACH's flags (PROTOCOL X-set; this project's own). 0 would be the default context.
    pub(crate) fn attach_flags(self) -> u32 {
        let value = match self {
            Self::Blocked => 1,
            Self::Bypasses => 2,
            Self::Pasid0 => 3,
        };
        value << 1
    }

    /// What a table of context descriptors calls it.
    pub(crate) fn s1dss(self) -> u8 {
        match self {
            Self::Blocked => 0,
            Self::Bypasses => 1,
            Self::Pasid0 => 2,
        }
    }
}

impl fmt::Display for Anonymous {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Blocked => "blocked",
            Self::Bypasses => "bypasses",
            Self::Pasid0 => "uses PASID 0",
        })
    }
}
