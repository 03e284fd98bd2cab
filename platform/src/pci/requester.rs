//! By which number an IOMMU sees a function's DMA.
//!
//! On PCI Express a request carries the function's own number. On a conventional bus it carries none, and the bridge that
//! takes it over to PCI Express puts in one for all that is behind it:
//!
//! ```text
//! PCIe-to-PCI bridge    bus behind it, device 0, function 0
//! any other bridge      the bridge's own number; a conventional bridge does not say more
//!   from a conventional bus
//! ```
//! (PCI Express to PCI/PCI-X Bridge Specification 1.0, 2.3)
//!
//! Several functions with one number are one endpoint: they share a domain, and nothing keeps them apart.

use pci_types::PciAddress;

use super::capability;
use super::config::ConfigSpace;
use super::function::{Function, bridge_above};

/// The PCI Express capability, and the type of device in bits 4 to 7 of its flags at offset 2.
const EXPRESS: u8 = 0x10;
const EXPRESS_FLAGS: u16 = 2;

/// What a bridge has on its two sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// PCI Express on both: a root port, or one of the ports at the lower end of a switch.
    Port,
    /// PCI Express on both: the upper end of a switch.
    UpstreamPort,
    /// PCI Express above, conventional PCI below.
    ExpressToPci,
    /// Conventional PCI above.
    Conventional,
}

/// The number that the root of the hierarchy sees: bus, device and function in 16 bits.
pub(super) fn requester(config: &impl ConfigSpace, functions: &[Function], address: PciAddress) -> u16 {
    let mut seen = bdf(address);
    let mut at = address;
    // A path crosses each bus once at most, whatever bus numbers the bridges claim.
    for _ in 0..=u8::MAX {
        let Some(above) = bridge_above(functions, at) else { break };
        let secondary = above.bridge.map_or(0, |bridge| bridge.secondary_bus);
        match kind(config, above.address) {
            Kind::Port | Kind::UpstreamPort => {}
            Kind::ExpressToPci => seen = u16::from(secondary) << 8,
            Kind::Conventional => seen = bdf(above.address),
        }
        at = above.address;
    }
    seen
}

fn bdf(address: PciAddress) -> u16 {
    u16::from(address.bus()) << 8 | u16::from(address.device()) << 3 | u16::from(address.function())
}

/// What a bridge has on its two sides, by its own word.
pub(super) fn kind(config: &impl ConfigSpace, bridge: PciAddress) -> Kind {
    let capabilities = capability::list(config, bridge);
    let Some(express) = capabilities.iter().find(|capability| capability.id == EXPRESS) else {
        return Kind::Conventional;
    };
    match config.read16(bridge, express.offset + EXPRESS_FLAGS) >> 4 & 0xf {
        4 | 6 => Kind::Port,
        5 => Kind::UpstreamPort,
        7 => Kind::ExpressToPci,
        // From PCI to PCI Express, and what is not known: what is behind passes a conventional bus.
        _ => Kind::Conventional,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::Pci;
    use crate::pci::config::offset;
    use crate::pci::fake::{FakeFunction, FakeSpace};

    fn at(bus: u8, device: u8, function: u8) -> PciAddress {
        PciAddress::new(0, bus, device, function)
    }

    fn bridge(secondary: u8, subordinate: u8, express: Option<u8>) -> FakeFunction {
        let bridge = FakeFunction::bridge(secondary, subordinate, 0, 0);
        match express {
            None => bridge,
            Some(kind) => bridge
                .with(offset::STATUS, &[0x10])
                .with(offset::CAPABILITIES, &[0x40])
                .with(0x40, &[EXPRESS, 0, kind << 4]),
        }
    }

    #[test]
    fn ports_pass_numbers_on_and_bridges_to_pci_replace_them() {
        let endpoint = || FakeFunction::endpoint(1, 1);
        let pci = Pci::scan(FakeSpace::new([
            (at(0, 1, 0), bridge(1, 2, Some(4))),
            (at(1, 0, 0), bridge(2, 2, Some(5))),
            (at(2, 3, 1), endpoint()),
            (at(0, 2, 0), bridge(3, 5, Some(4))),
            (at(3, 0, 0), bridge(4, 5, Some(7))),
            (at(4, 1, 0), endpoint()),
            (at(4, 2, 0), bridge(5, 5, None)),
            (at(5, 7, 0), endpoint()),
            (at(0, 3, 0), bridge(6, 6, None)),
            (at(6, 1, 0), endpoint()),
        ]));
        assert_eq!(pci.requester(at(0, 2, 0)), 0x10);
        assert_eq!(pci.requester(at(2, 3, 1)), 0x219);
        assert_eq!(pci.requester(at(4, 1, 0)), 0x400, "behind a bridge to PCI");
        assert_eq!(pci.requester(at(5, 7, 0)), 0x400, "behind a bridge behind it");
        assert_eq!(pci.requester(at(6, 1, 0)), 0x18, "behind a conventional bridge on the root bus");
    }

    #[test]
    fn bridges_that_claim_each_other_end_no_loop() {
        let pci = Pci::scan(FakeSpace::new([
            (at(0, 1, 0), bridge(1, 255, Some(4))),
            (at(1, 0, 0), bridge(1, 255, Some(7))),
            (at(2, 0, 0), bridge(1, 3, None)),
        ]));
        pci.functions().iter().for_each(|function| {
            pci.requester(function.address);
        });
    }
}
