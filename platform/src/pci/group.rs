//! Which functions can be kept apart, and which only together.
//!
//! An IOMMU sees what reaches the root. Two functions whose requests can meet below are one group: what one may do the
//! other may, too. They meet
//!
//! ```text
//! on a conventional bus                        the bridge to PCI Express gives all of them one number
//! below a root port without isolation          which may pass requests on sideways
//! below a switch with a port without           whose requests get in to all the other ports
//! inside of a device of several functions      unless each of them is isolated
//! ```
//! Isolation is Access Control Services (PCI Express Base Specification, 6.12): ports that have them are told by `isolate`
//! to send everything up, and not to believe in foreign numbers. Bridges are in no group: they do no DMA but messages.
//!
//! A function with a cache of translations (Address Translation Services) would go past all of this with the addresses in
//! it: `isolate` turns that off, whoever turned it on.

use alloc::vec::Vec;

use pci_types::PciAddress;

use super::capability;
use super::config::ConfigSpace;
use super::function::{Function, bridge_above};
use super::requester::{Kind, kind};

/// The extended capability of Access Control Services; what it can do, and what it is to do.
const ACS: u16 = 0x0d;
const CAN: u16 = 4;
const CONTROL: u16 = 6;
/// Requests from foreign numbers are refused; requests and completions between functions go up, and what comes up from
/// below goes on.
const ISOLATING: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 4;

/// The extended capability of Address Translation Services, its control register, and the bit that turns it on.
const ATS: u16 = 0x0f;
const ATS_CONTROL: u16 = 6;
const ATS_ENABLE: u16 = 1 << 15;

/// Functions that cannot be kept apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// By address. Never none; one alone is isolated.
    pub members: Vec<PciAddress>,
}

/// Turns isolation on in every function that can be isolated, bridges included, and caches of translations off.
pub(super) fn isolate(config: &impl ConfigSpace, functions: &[Function]) {
    for address in functions.iter().map(|function| function.address) {
        if let Some(at) = find(config, address, ACS) {
            let able = config.read16(address, at + CAN) & ISOLATING;
            let control = config.read16(address, at + CONTROL);
            config.write16(address, at + CONTROL, control | able);
        }
        if let Some(at) = find(config, address, ATS) {
            let control = config.read16(address, at + ATS_CONTROL);
            config.write16(address, at + ATS_CONTROL, control & !ATS_ENABLE);
        }
    }
}

/// Every function that is no bridge, in its group. Groups and members come by address.
pub(super) fn groups(config: &impl ConfigSpace, functions: &[Function]) -> Vec<Group> {
    let mut found: Vec<(PciAddress, Group)> = Vec::new();
    for function in functions.iter().filter(|function| !function.is_bridge()) {
        let meeting = meeting(config, functions, function);
        match found.iter_mut().find(|(at, _)| *at == meeting) {
            Some((_, group)) => group.members.push(function.address),
            None => found.push((meeting, Group { members: alloc::vec![function.address] })),
        }
    }
    found.into_iter().map(|(_, group)| group).collect()
}

/// Where requests of a function meet those of its group last: itself, or a bridge above; of a device whose functions are
/// not isolated from each other, the first one that is not.
fn meeting(config: &impl ConfigSpace, functions: &[Function], function: &Function) -> PciAddress {
    let mut meeting = function;
    let mut at = function.address;
    // A path crosses each bus once at most, whatever bus numbers the bridges claim.
    for _ in 0..=u8::MAX {
        let Some(bridge) = bridge_above(functions, at) else { break };
        if !is_isolating_port(config, functions, bridge) {
            meeting = bridge;
        }
        at = bridge.address;
    }
    let same_device = |other: &&Function| {
        let place = |address: PciAddress| (address.segment(), address.bus(), address.device());
        place(other.address) == place(meeting.address)
    };
    let device = functions.iter().filter(same_device);
    if device.clone().count() == 1 || is_isolated(config, meeting.address) {
        return meeting.address;
    }
    let first = device.into_iter().find(|other| !is_isolated(config, other.address));
    first.map_or(meeting.address, |first| first.address)
}

/// Whether a bridge keeps what is below it apart from all else.
fn is_isolating_port(config: &impl ConfigSpace, functions: &[Function], port: &Function) -> bool {
    match kind(config, port.address) {
        Kind::Port => is_isolated(config, port.address),
        // A lower port that does not send up what it gets lets it in to all the others.
        Kind::UpstreamPort => {
            let inside = port.bridge.map(|bridge| bridge.secondary_bus);
            let below = functions.iter().filter(|other| {
                let address = other.address;
                address.segment() == port.address.segment() && Some(address.bus()) == inside
            });
            below.filter(|other| other.bridge.is_some()).all(|lower| is_isolated(config, lower.address))
        }
        Kind::ExpressToPci | Kind::Conventional => false,
    }
}

/// Whether a function was told to isolate itself, in all that it can do.
fn is_isolated(config: &impl ConfigSpace, function: PciAddress) -> bool {
    find(config, function, ACS).is_some_and(|at| {
        let able = config.read16(function, at + CAN) & ISOLATING;
        config.read16(function, at + CONTROL) & able == able
    })
}

fn find(config: &impl ConfigSpace, function: PciAddress, id: u16) -> Option<u16> {
    let all = capability::list_extended(config, function);
    all.into_iter().find(|one| one.id == id).map(|one| one.offset)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::Pci;
    use crate::pci::config::offset;
    use crate::pci::fake::{FakeFunction, FakeSpace};

    const ROOT: u8 = 4;
    const UPPER: u8 = 5;
    const LOWER: u8 = 6;
    const TO_PCI: u8 = 7;

    fn at(bus: u8, device: u8, function: u8) -> PciAddress {
        PciAddress::new(0, bus, device, function)
    }

    fn endpoint() -> FakeFunction {
        FakeFunction::endpoint(1, 1)
    }

    fn bridge(secondary: u8, subordinate: u8, kind: u8) -> FakeFunction {
        FakeFunction::bridge(secondary, subordinate, 0, 0)
            .with(offset::STATUS, &[0x10])
            .with(offset::CAPABILITIES, &[0x40])
            .with(0x40, &[0x10, 0, kind << 4])
    }

    /// With isolation, off at first.
    fn isolating(function: FakeFunction) -> FakeFunction {
        function.with_register(offset::EXTENDED_CAPABILITIES, 0x0001_000d, 0).with_register(
            offset::EXTENDED_CAPABILITIES + CAN,
            0x1f,
            0x001f_0000,
        )
    }

    fn multifunction(function: FakeFunction) -> FakeFunction {
        function.with(offset::HEADER_TYPE, &[0x80])
    }

    fn groups_of(functions: Vec<(PciAddress, FakeFunction)>) -> Vec<Vec<PciAddress>> {
        let pci = Pci::scan(FakeSpace::new(functions));
        pci.isolate();
        pci.groups().into_iter().map(|group| group.members).collect()
    }

    #[test]
    fn ports_isolate_what_is_below_if_they_can() {
        let groups = groups_of(alloc::vec![
            (at(0, 1, 0), isolating(bridge(1, 1, ROOT))),
            (at(0, 2, 0), bridge(2, 2, ROOT)),
            (at(0, 3, 0), endpoint()),
            (at(1, 0, 0), endpoint()),
            (at(2, 0, 0), endpoint()),
            (at(2, 1, 0), endpoint()),
        ]);
        assert_eq!(
            groups,
            [alloc::vec![at(0, 3, 0)], alloc::vec![at(1, 0, 0)], alloc::vec![at(2, 0, 0), at(2, 1, 0)]]
        );
    }

    #[test]
    fn caches_of_translations_are_turned_off() {
        let at = at(0, 1, 0);
        let caching = endpoint().with_register(offset::EXTENDED_CAPABILITIES, 0x0001_000f, 0).with_register(
            offset::EXTENDED_CAPABILITIES + 4,
            0x8003_0020,
            0x801f_0000,
        );
        let pci = Pci::scan(FakeSpace::new([(at, caching)]));
        pci.isolate();
        assert_eq!(pci.config().read32(at, offset::EXTENDED_CAPABILITIES + 4), 0x0003_0020);
    }

    /// A switch with two lower ports, the second of which may lack isolation.
    fn switch(second: FakeFunction) -> Vec<(PciAddress, FakeFunction)> {
        alloc::vec![
            (at(0, 1, 0), isolating(bridge(1, 4, ROOT))),
            (at(1, 0, 0), bridge(2, 4, UPPER)),
            (at(2, 0, 0), isolating(bridge(3, 3, LOWER))),
            (at(2, 1, 0), second),
            (at(3, 0, 0), endpoint()),
            (at(4, 0, 0), endpoint()),
        ]
    }

    #[test]
    fn a_switch_keeps_apart_only_if_every_lower_port_does() {
        let apart = groups_of(switch(isolating(bridge(4, 4, LOWER))));
        assert_eq!(apart, [alloc::vec![at(3, 0, 0)], alloc::vec![at(4, 0, 0)]]);
        let together = groups_of(switch(bridge(4, 4, LOWER)));
        assert_eq!(together, [alloc::vec![at(3, 0, 0), at(4, 0, 0)]]);
    }

    #[test]
    fn functions_of_a_device_are_together_unless_isolated() {
        let groups = groups_of(alloc::vec![
            (at(0, 1, 0), multifunction(endpoint())),
            (at(0, 1, 1), isolating(endpoint())),
            (at(0, 1, 2), endpoint()),
            (at(0, 2, 0), multifunction(isolating(endpoint()))),
            (at(0, 2, 1), isolating(endpoint())),
        ]);
        assert_eq!(
            groups,
            [
                alloc::vec![at(0, 1, 0), at(0, 1, 2)],
                alloc::vec![at(0, 1, 1)],
                alloc::vec![at(0, 2, 0)],
                alloc::vec![at(0, 2, 1)],
            ]
        );
    }

    #[test]
    fn a_bus_of_conventional_pci_is_one_group_whatever_is_above() {
        let groups = groups_of(alloc::vec![
            (at(0, 1, 0), isolating(bridge(1, 3, ROOT))),
            (at(1, 0, 0), isolating(bridge(2, 3, TO_PCI))),
            (at(2, 1, 0), endpoint()),
            (at(2, 2, 0), FakeFunction::bridge(3, 3, 0, 0)),
            (at(3, 5, 0), endpoint()),
        ]);
        assert_eq!(groups, [alloc::vec![at(2, 1, 0), at(3, 5, 0)]]);
    }
}
