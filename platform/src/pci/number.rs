//! Bus numbers, where no firmware gave any.
//!
//! A bridge leads to no bus before its two numbers are written: the bus behind it, and the last one behind that. What
//! firmware numbered stays, since its tables name functions by these numbers. Where no bridge has a number, or two
//! contradict each other, all of a segment are numbered afresh, in depth-first order:
//!
//! ```text
//! close every bridge    what still answers then is a root bus; some hosts have several
//! from each root bus    the next number for each bridge, up to the next root bus
//! ```
//!
//! Bounds: a bus is entered once, since each takes a number, and there are 256. A bridge for which no number is left,
//! or that does not take one, stays closed.

use alloc::vec::Vec;

use pci_types::PciAddress;

use super::config::{BusRange, ConfigSpace, offset};
use super::scan;

/// What became of a machine's bus numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Numbering {
    /// Bridges that were given numbers.
    pub numbered: usize,
    /// Bridges that stay closed: what is behind them cannot be reached.
    pub closed: Vec<PciAddress>,
}

/// A bridge with what its registers hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Numbers {
    bridge: PciAddress,
    secondary: u8,
    subordinate: u8,
}

impl Numbers {
    fn read(config: &impl ConfigSpace, bridge: PciAddress) -> Self {
        Self {
            bridge,
            secondary: config.read8(bridge, offset::SECONDARY_BUS),
            subordinate: config.read8(bridge, offset::SUBORDINATE_BUS),
        }
    }

    /// Whether one is behind the other.
    fn contains(&self, other: &Self) -> bool {
        self.secondary <= other.secondary && other.subordinate <= self.subordinate
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.secondary <= other.subordinate && other.secondary <= self.subordinate
    }
}

/// Numbers the buses of every segment that needs it.
pub(super) fn number(config: &impl ConfigSpace) -> Numbering {
    let mut numbering = Numbering::default();
    for range in config.buses() {
        if !is_numbered(config, range) {
            number_range(config, range, &mut numbering);
        }
    }
    numbering
}

/// Whether some bridge has numbers, or there is none, and no two contradict each other.
fn is_numbered(config: &impl ConfigSpace, range: BusRange) -> bool {
    let all: Vec<_> = buses(range).flat_map(|bus| bridges(config, range.segment, bus)).collect();
    let bridges: Vec<_> = all.iter().map(|bridge| Numbers::read(config, *bridge)).collect();
    let open: Vec<_> = bridges.into_iter().filter(|numbers| numbers.secondary != 0).collect();
    if open.is_empty() {
        return all.is_empty();
    }
    let downwards = |n: &Numbers| {
        n.bridge.bus() < n.secondary && n.secondary <= n.subordinate && n.subordinate <= range.last
    };
    let agree = |(index, one): (usize, &Numbers)| {
        open[..index].iter().all(|other| match (one.contains(other), other.contains(one)) {
            _ if !one.overlaps(other) => true,
            // One that is behind another is on a bus behind it, too.
            (true, false) => (one.secondary..=one.subordinate).contains(&other.bridge.bus()),
            (false, true) => (other.secondary..=other.subordinate).contains(&one.bridge.bus()),
            _ => false,
        })
    };
    open.iter().all(downwards) && open.iter().enumerate().all(agree)
}

/// A bus on the way down.
struct Level {
    bus: u8,
    /// The bridge that leads to it; none to a root bus.
    above: Option<PciAddress>,
    /// The bridges on it that have no numbers yet, the first one last.
    waiting: Vec<PciAddress>,
}

fn number_range(config: &impl ConfigSpace, range: BusRange, numbering: &mut Numbering) {
    // Upwards: what a bridge leads to is looked at only if it is not closed before. That is well: it is closed when
    // the bus it is on gets its number.
    buses(range).for_each(|bus| close_all(config, range.segment, bus));
    let is_root = |bus: &u8| {
        (0..scan::DEVICES)
            .any(|device| scan::is_present(config, PciAddress::new(range.segment, *bus, device, 0)))
    };
    let roots: Vec<u8> = buses(range).filter(is_root).collect();
    for (index, root) in roots.iter().enumerate() {
        let last = roots.get(index + 1).map_or(range.last, |next| next - 1);
        number_below(config, range.segment, *root, last, numbering);
    }
}

/// Numbers everything below a root bus, with the numbers after its own up to `last`.
fn number_below(config: &impl ConfigSpace, segment: u16, root: u8, last: u8, numbering: &mut Numbering) {
    let enter = |bus, above| {
        close_all(config, segment, bus);
        let mut waiting = bridges(config, segment, bus);
        waiting.reverse();
        Level { bus, above, waiting }
    };
    let mut used = root;
    let mut levels = alloc::vec![enter(root, None)];
    while let Some(level) = levels.last_mut() {
        let Some(bridge) = level.waiting.pop() else {
            if let Some(bridge) = level.above {
                config.write8(bridge, offset::SUBORDINATE_BUS, used);
            }
            levels.pop();
            continue;
        };
        let opened = used < last && open(config, bridge, level.bus, used + 1, last);
        if !opened {
            close(config, bridge);
            numbering.closed.push(bridge);
            continue;
        }
        used += 1;
        numbering.numbered += 1;
        levels.push(enter(used, Some(bridge)));
    }
}

/// Gives a bridge its numbers, and says whether it took them.
fn open(config: &impl ConfigSpace, bridge: PciAddress, primary: u8, secondary: u8, subordinate: u8) -> bool {
    config.write8(bridge, offset::PRIMARY_BUS, primary);
    config.write8(bridge, offset::SUBORDINATE_BUS, subordinate);
    config.write8(bridge, offset::SECONDARY_BUS, secondary);
    Numbers::read(config, bridge) == Numbers { bridge, secondary, subordinate }
}

fn close(config: &impl ConfigSpace, bridge: PciAddress) {
    config.write8(bridge, offset::SECONDARY_BUS, 0);
    config.write8(bridge, offset::SUBORDINATE_BUS, 0);
}

fn close_all(config: &impl ConfigSpace, segment: u16, bus: u8) {
    bridges(config, segment, bus).into_iter().for_each(|bridge| close(config, bridge));
}

fn buses(range: BusRange) -> impl Iterator<Item = u8> {
    range.first..=range.last
}

/// The bridges on a bus that lead to another one.
fn bridges(config: &impl ConfigSpace, segment: u16, bus: u8) -> Vec<PciAddress> {
    let functions = (0..scan::DEVICES).flat_map(|device| scan::present(config, segment, bus, device));
    functions.filter(|function| scan::is_bridge(config, *function)).collect()
}

#[cfg(test)]
mod tests;
