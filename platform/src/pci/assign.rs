//! Addresses for BARs that firmware gave none.
//!
//! An address that a BAR has is kept if it can be: aligned, in reach, inside the window of the bridge above, clear of
//! RAM, of configuration space and of BARs before it. All others get an address:
//!
//! ```text
//! on a root bus     below 4 GiB, above RAM: below configuration space if there is room, else anywhere, highest first;
//!                   for a 64-bit BAR that finds no room there, above 4 GiB and RAM, lowest first
//! behind a bridge   inside its window; the prefetchable one for prefetchable BARs if there is room
//! ```
//!
//! Which addresses a host passes on to its bus only its AML says, which the kernel does not run. Just below configuration
//! space is inside of the window on QEMU's machines, with and without firmware, and on cloud-hypervisor and crosvm.
//! Bridges' own windows are as firmware left them.

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
    free: RangeSet,
    forbidden: RangeSet,
    /// Where to look first.
    below_ecam: Option<PhysRange>,
    highest: u64,
}

impl HostWindow {
    /// The window of a machine with this memory map, with configuration space at `ecam`, whose CPU reaches `highest`.
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
        Self { free, forbidden, below_ecam, highest }
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
    for at in 0..functions.len() {
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
    waiting.sort_by_key(|(at, index)| {
        let bar = functions[*at].bars[*index];
        (bar.kind == BarKind::Memory64, Reverse(bar.len_bytes))
    });

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
    let align = bar.len_bytes.max(FRAME_BYTES);
    let low = PhysRange::new(0, HIGHEST_32)?;
    let bounds = PhysRange::new(0, highest_for(bar, host))?;
    let above = bridge_above(functions, function.address);
    let available = |window: &mut RangeSet| {
        used.iter().for_each(|range| window.remove(range));
        windows_of_others(functions, function).for_each(|range| window.remove(range));
    };
    if let Some(bridge) = above.and_then(|above| above.bridge) {
        let prefetchable = bridge.prefetchable.filter(|_| bar.prefetch == Prefetch::Allowed);
        return [prefetchable, bridge.memory].into_iter().flatten().find_map(|window| {
            let mut window: RangeSet = [window].into_iter().collect();
            available(&mut window);
            window.find(bar.len_bytes, align, bounds)
        });
    }
    let mut window = host.free.clone();
    available(&mut window);
    let high = match bar.kind {
        BarKind::Memory64 => PhysRange::new(HIGHEST_32 + 1, bounds.last()),
        BarKind::Memory32 | BarKind::Io => None,
    };
    let lows = [host.below_ecam, Some(low)].into_iter().flatten();
    let find_low = |bounds| window.find_last(bar.len_bytes, align, bounds);
    lows.into_iter().find_map(find_low).or_else(|| window.find(bar.len_bytes, align, high?))
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
