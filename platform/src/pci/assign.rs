//! Addresses for BARs that firmware gave none.
//!
//! An address that a BAR has is kept if it can be: aligned, in reach, inside the window of the bridge above, clear of
//! RAM, of configuration space and of BARs before it. All others get an address:
//!
//! ```text
//! on a root bus     below 4 GiB, highest first; for a 64-bit BAR that finds no room there, above, lowest first
//! behind a bridge   inside its window; for 64-bit prefetchable BARs the prefetchable one, if there is room
//! ```
//!
//! Which addresses a host passes on to its bus the device tree says. Of an ACPI machine only its AML does, which the
//! kernel does not run: there it is what is above RAM and below configuration space, if there is room, else anywhere.
//! Just below configuration space is inside of the window on QEMU's machines, with and without firmware, and on
//! cloud-hypervisor and crosvm. Windows of bridges that firmware left open stay as they are; `window` opens the others.

use alloc::vec::Vec;
use core::cmp::Reverse;
use core::fmt;

use pci_types::PciAddress;

use super::bar::{self, Bar, BarKind, Prefetch};
use super::config::ConfigSpace;
use super::function::{Function, bridge_above};
use crate::memory::frames::FRAME_BYTES;
use crate::memory::map::MemoryMap;
use crate::range::{PhysRange, RangeSet};

const HIGHEST_32: u64 = u32::MAX as u64;
/// From the interrupt controllers to the reset vector, a PC has fixed devices here.
const FIXED_DEVICES: u64 = 0xfec0_0000;

/// The addresses that a host's own bus can be given, and those that no BAR may be at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostWindow {
    /// The segment whose bus it is; none for all.
    segment: Option<u16>,
    free: RangeSet,
    forbidden: RangeSet,
    /// Where to look first.
    below_ecam: Option<PhysRange>,
    highest: u64,
}

impl HostWindow {
    /// The window of a bridge that passes `windows` on, in a machine with this memory map, with configuration space of
    /// all segments at `ecam`, whose CPU reaches `highest`.
    pub fn of_bridge(
        segment: u16,
        windows: impl IntoIterator<Item = PhysRange>,
        map: &MemoryMap,
        ecam: impl IntoIterator<Item = PhysRange>,
        highest: u64,
    ) -> Self {
        let mut forbidden = map.ram();
        ecam.into_iter().for_each(|range| forbidden.insert(range));
        let mut free: RangeSet = windows.into_iter().collect();
        forbidden.iter().for_each(|range| free.remove(range));
        map.regions().iter().for_each(|region| free.remove(region.range));
        // A BAR at address 0 is one that has none.
        PhysRange::from_len(0, FRAME_BYTES).into_iter().for_each(|range| free.remove(range));
        PhysRange::new(highest.saturating_add(1), u64::MAX).into_iter().for_each(|range| free.remove(range));
        Self { segment: Some(segment), free, forbidden, below_ecam: None, highest }
    }

    /// A guess at the windows of a machine that does not say them: one with this memory map, with configuration space
    /// at `ecam`, whose CPU reaches `highest`.
    pub fn new(map: &MemoryMap, ecam: impl IntoIterator<Item = PhysRange>, highest: u64) -> Self {
        let ecam: RangeSet = ecam.into_iter().collect();
        let mut forbidden = map.ram();
        ecam.iter().for_each(|range| forbidden.insert(range));
        let lowest_ecam = ecam.iter().next().filter(|range| range.start() <= HIGHEST_32);
        let below_ecam = lowest_ecam.and_then(|range| PhysRange::new(0, range.start().checked_sub(1)?));

        let ram_top = |bound: u64| {
            let below = map
                .ram()
                .iter()
                .filter(|range| range.start() <= bound)
                .map(|range| range.last().min(bound))
                .max();
            below.unwrap_or(0)
        };
        let mut free: RangeSet = PhysRange::new(0, highest).into_iter().collect();
        let taken = [
            PhysRange::new(0, ram_top(HIGHEST_32)),
            PhysRange::new(FIXED_DEVICES, HIGHEST_32),
            PhysRange::new(HIGHEST_32 + 1, ram_top(u64::MAX)),
        ];
        taken.into_iter().flatten().for_each(|range| free.remove(range));
        forbidden.iter().for_each(|range| free.remove(range));
        map.regions().iter().for_each(|region| free.remove(region.range));
        Self { segment: None, free, forbidden, below_ecam, highest }
    }

    /// Whether it is the window of a function's bus, or of a bus above.
    pub(super) fn serves(&self, function: &Function) -> bool {
        self.segment.is_none_or(|segment| segment == function.address.segment())
    }

    /// The addresses that are left of it, where `used` are taken.
    pub(super) fn left(&self, used: &RangeSet) -> RangeSet {
        let mut left = self.free.clone();
        used.iter().for_each(|range| left.remove(range));
        left
    }

    /// The parts of it in the order in which they are looked at for something below 4 GiB.
    pub(super) fn low_parts(&self) -> impl Iterator<Item = PhysRange> {
        let low = PhysRange::new(0, self.highest.min(HIGHEST_32));
        [self.below_ecam, low].into_iter().flatten()
    }

    /// The part of it above 4 GiB.
    pub(super) fn high_part(&self) -> Option<PhysRange> {
        PhysRange::new(HIGHEST_32 + 1, self.highest)
    }
}

/// Why a BAR has no address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AssignReason {
    /// The window has no room for it.
    NoRoom,
    /// The register did not take the address.
    Refused {
        /// What was written.
        wrote: u64,
        /// What it reads as.
        reads: u64,
    },
}

/// A BAR that could not be given an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AssignError {
    /// The function.
    pub function: PciAddress,
    /// The BAR's number.
    pub bar: u8,
    /// Its length.
    pub len_bytes: u64,
    /// What was wrong.
    pub reason: AssignReason,
}

impl fmt::Display for AssignError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PCI function {}: BAR {} of {:#x} bytes ", self.function, self.bar, self.len_bytes)?;
        match self.reason {
            AssignReason::NoRoom => f.write_str("has no address, and the window it must be in has no room"),
            AssignReason::Refused { wrote, reads } => {
                write!(f, "was given address {wrote:#x} and reads as {reads:#x}")
            }
        }
    }
}

impl core::error::Error for AssignError {}

/// Gives addresses to the BARs of all functions that need one: 32-bit ones first, which have less choice, and the largest
/// of each width first, which leaves the fewest gaps.
pub(super) fn assign(
    config: &impl ConfigSpace,
    functions: &mut [Function],
    host: &HostWindow,
) -> Vec<AssignError> {
    let mut used = RangeSet::new();
    let mut waiting = Vec::new();
    for at in (0..functions.len()).filter(|at| host.serves(&functions[*at])).collect::<Vec<_>>() {
        for index in 0..functions[at].bars.len() {
            let bar = functions[at].bars[index];
            match bar.range() {
                _ if bar.kind == BarKind::Io => {}
                Some(range)
                    if may_keep(functions, &functions[at], &bar, range, host) && !used.overlaps(range) =>
                {
                    used.insert(range);
                }
                _ => waiting.push((at, index)),
            }
        }
    }
    waiting.sort_by_key(|(at, index)| order(&functions[*at].bars[*index]));

    let mut errors = Vec::new();
    for (at, index) in waiting {
        let (address, bar) = (functions[at].address, functions[at].bars[index]);
        let outcome = match find_room(functions, &functions[at], &bar, host, &used) {
            None => Err(AssignReason::NoRoom),
            Some(range) => match bar::write_address(config, address, &bar, range.start()) {
                reads if reads == range.start() => Ok(range),
                reads => Err(AssignReason::Refused { wrote: range.start(), reads }),
            },
        };
        functions[at].bars[index].address = outcome.ok().map(PhysRange::start);
        match outcome {
            Ok(range) => used.insert(range),
            Err(reason) => errors.push(AssignError {
                function: address,
                bar: bar.index,
                len_bytes: bar.len_bytes,
                reason,
            }),
        }
    }
    errors
}

/// The order in which BARs get their addresses.
pub(super) fn order(bar: &Bar) -> impl Ord + use<> {
    (bar.kind == BarKind::Memory64, Reverse(bar.len_bytes))
}

/// What a BAR's address is a multiple of. No two functions share a page.
pub(super) fn alignment(bar: &Bar) -> u64 {
    bar.len_bytes.max(FRAME_BYTES)
}

/// Whether a BAR belongs into a bridge's prefetchable window.
pub(super) fn prefers_prefetchable(bar: &Bar) -> bool {
    bar.kind == BarKind::Memory64 && bar.prefetch == Prefetch::Allowed
}

/// Whether a BAR's address is one that it can work at.
fn may_keep(
    functions: &[Function],
    function: &Function,
    bar: &Bar,
    range: PhysRange,
    host: &HostWindow,
) -> bool {
    let in_reach = range.last() <= highest_for(bar, host);
    let window = match bridge_above(functions, function.address).and_then(|above| above.bridge) {
        Some(bridge) => {
            [bridge.memory, bridge.prefetchable].into_iter().flatten().any(|window| window.contains(range))
        }
        None => true,
    };
    in_reach && window && range.start().is_multiple_of(bar.len_bytes) && !host.forbidden.overlaps(range)
}

fn highest_for(bar: &Bar, host: &HostWindow) -> u64 {
    match bar.kind {
        BarKind::Memory64 => host.highest,
        BarKind::Memory32 | BarKind::Io => host.highest.min(HIGHEST_32),
    }
}

fn find_room(
    functions: &[Function],
    function: &Function,
    bar: &Bar,
    host: &HostWindow,
    used: &RangeSet,
) -> Option<PhysRange> {
    let align = alignment(bar);
    let bounds = PhysRange::new(0, highest_for(bar, host))?;
    let above = bridge_above(functions, function.address);
    let available = |window: &mut RangeSet| {
        used.iter().for_each(|range| window.remove(range));
        windows_of_others(functions, function).for_each(|range| window.remove(range));
    };
    if let Some(bridge) = above.and_then(|above| above.bridge) {
        let windows = match bar.prefetch {
            _ if prefers_prefetchable(bar) => [bridge.prefetchable, bridge.memory],
            Prefetch::Allowed => [bridge.memory, bridge.prefetchable],
            Prefetch::NotAllowed => [bridge.memory, None],
        };
        return windows.into_iter().flatten().find_map(|window| {
            let mut window: RangeSet = [window].into_iter().collect();
            available(&mut window);
            window.find(bar.len_bytes, align, bounds)
        });
    }
    let mut window = host.free.clone();
    available(&mut window);
    let high = host.high_part().filter(|_| bar.kind == BarKind::Memory64);
    let find_low = |bounds| window.find_last(bar.len_bytes, align, bounds);
    host.low_parts().find_map(find_low).or_else(|| window.find(bar.len_bytes, align, high?))
}

/// The windows of all bridges but those that lead to the function.
fn windows_of_others<'f>(
    functions: &'f [Function],
    function: &Function,
) -> impl Iterator<Item = PhysRange> + 'f {
    let (segment, bus) = (function.address.segment(), function.address.bus());
    let bridges = functions.iter().filter(move |other| {
        let leads = other.bridge.is_some_and(|bridge| bridge.leads_to(bus));
        !(leads && other.address.segment() == segment)
    });
    bridges.filter_map(|other| other.bridge).flat_map(|bridge| [bridge.memory, bridge.prefetchable]).flatten()
}
