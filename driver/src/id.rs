//! Identifiers of endpoints and domains.

use core::fmt;

/// Names an endpoint: one source of DMA, as the firmware's topology table numbers it.
///
/// For PCI this is by convention the segment in bits 31:16 and bus, device, function below. An `EndpointId`
/// does not prove that the endpoint exists: the device answers `NOENT` to an unknown one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointId(u32);

impl EndpointId {
    /// Names the endpoint with this number, from a topology table.
    pub const fn new(id: u32) -> Self {
        Self(id)
    }

    /// The endpoint of a PCI function under the usual numbering. `device` is 0..=31 and `function` 0..=7;
    /// higher bits are cut off.
    pub const fn pci(segment: u16, bus: u8, device: u8, function: u8) -> Self {
        let bdf = (bus as u32) << 8 | ((device & 0x1f) as u32) << 3 | (function & 7) as u32;
        Self((segment as u32) << 16 | bdf)
    }

    /// The number that goes into requests.
    pub const fn get(self) -> u32 {
        self.0
    }
}

/// The number of a domain in requests, inside the device's domain range.
///
/// The driver picks it. A number is reused only after the last DETACH of its former domain completed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DomainId(u32);

impl DomainId {
    pub(crate) const fn new(id: u32) -> Self {
        Self(id)
    }

    /// The number that goes into requests.
    pub const fn get(self) -> u32 {
        self.0
    }
}

macro_rules! show_hex {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
    };
}
show_hex!(EndpointId);
show_hex!(DomainId);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pci_numbering() {
        assert_eq!(EndpointId::pci(0, 0, 2, 0).get(), 0x10);
        assert_eq!(EndpointId::pci(2, 0xff, 31, 7).get(), 0x2ffff);
    }
}
