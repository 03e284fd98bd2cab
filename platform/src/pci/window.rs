//! Memory windows of bridges, where no firmware opened any.
//!
//! A bridge passes on two ranges: one below 4 GiB, and a prefetchable one, which may be above. Both are whole MiB. How large
//! they must be is found by a rehearsal: what is behind the bridge is put into a window without an end, in the very
//! order in which assignment will do it, and the end is where the last one ends.
//!
//! ```text
//! memory         everything but what is below; 2 MiB at least for a slot in which a device may be plugged later
//! prefetchable   64-bit prefetchable BARs, where every bridge on the way has such a window with 64 bits
//! ```
//! A bridge whose window firmware opened, or behind which nothing needs one, stays as it is.

use alloc::vec::Vec;
use core::cmp::Reverse;

use super::assign::{HostWindow, alignment, order, prefers_prefetchable};
use super::bar::{Bar, BarKind};

use super::config::{ConfigSpace, offset};
use super::function::{Bridge, Function, bridge_above};
use super::slot::Slot;
use crate::range::{PhysRange, RangeSet};

const WINDOW_BYTES: u64 = 1 << 20;
/// What a slot gets in which nothing is plugged yet, as firmware does.
const SLOT_BYTES: u64 = 2 << 20;
/// Where a rehearsal ends: more than any window can hold.
const REHEARSAL_BYTES: u64 = 1 << 52;

/// Which of the two windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Memory,
    Prefetchable,
}

const KINDS: [Kind; 2] = [Kind::Memory, Kind::Prefetchable];

impl Kind {
    fn window(self, bridge: &Bridge) -> Option<PhysRange> {
        match self {
            Self::Memory => bridge.memory,
            Self::Prefetchable => bridge.prefetchable,
        }
    }

    fn window_mut(self, bridge: &mut Bridge) -> &mut Option<PhysRange> {
        match self {
            Self::Memory => &mut bridge.memory,
            Self::Prefetchable => &mut bridge.prefetchable,
        }
    }
}

/// How much a window must hold; of nothing, nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Need {
    len_bytes: u64,
    align: u64,
}

/// A closed bridge, by its place among the functions, and what its windows must hold.
#[derive(Clone, Copy, Debug)]
struct Closed {
    at: usize,
    secondary: u8,
    needs: [Option<Need>; 2],
}

impl Closed {
    /// The order in which windows beside each other get their addresses: those with the least choice first.
    fn order(&self, kind: Kind) -> impl Ord + use<> {
        (Reverse(self.needs[kind as usize].map(|need| need.align)), Reverse(self.secondary))
    }
}

/// Opens the windows of closed bridges that need one, as far as there is room.
pub(super) fn open(config: &impl ConfigSpace, functions: &mut [Function], host: &HostWindow) {
    let mut closed: Vec<Closed> = (0..functions.len())
        .filter(|at| host.serves(&functions[*at]))
        .filter_map(|at| {
            let bridge = functions[at].bridge?;
            let is_closed = bridge.memory.is_none() && bridge.prefetchable.is_none();
            (bridge.secondary_bus != 0 && is_closed).then_some(Closed {
                at,
                secondary: bridge.secondary_bus,
                needs: [None; 2],
            })
        })
        .collect();
    let wide = closed.iter().all(|bridge| is_wide(config, &functions[bridge.at]));
    let is_slot = |bridge: &Closed| Slot::of(config, &functions[bridge.at]).is_some();

    // Numbers grow downwards, so that what is behind a bridge is rehearsed before it.
    closed.sort_by_key(|bridge| Reverse(bridge.secondary));
    for index in 0..closed.len() {
        let least = if is_slot(&closed[index]) { SLOT_BYTES } else { 0 };
        let needs = KINDS.map(|kind| need(functions, &closed, index, kind, wide));
        let [memory, prefetchable] = needs;
        let memory = match memory {
            Some(need) => Some(Need { len_bytes: need.len_bytes.max(least), ..need }),
            None => (least != 0).then_some(Need { len_bytes: least, align: WINDOW_BYTES }),
        };
        closed[index].needs = [memory, prefetchable];
    }

    // Outer bridges first; beside each other in the order of the rehearsal.
    let depths: Vec<usize> = closed.iter().map(|bridge| depth(functions, &functions[bridge.at])).collect();
    let mut outer_first: Vec<(usize, Closed)> = depths.into_iter().zip(closed).collect();
    for kind in KINDS {
        outer_first.sort_by_key(|(depth, bridge)| (*depth, bridge.order(kind)));
        for (_, closed) in &outer_first {
            let Some(need) = closed.needs[kind as usize] else { continue };
            let found = find(functions, &functions[closed.at], need, kind, host);
            if let Some(bridge) = &mut functions[closed.at].bridge {
                *kind.window_mut(bridge) = found;
            }
        }
    }
    for (_, closed) in outer_first {
        write(config, functions, closed.at);
    }
}

/// What is behind a bridge, without what is behind further ones.
fn behind<'f>(functions: &'f [Function], bridge: &Function) -> impl Iterator<Item = &'f Function> {
    let (address, secondary) = (bridge.address, bridge.bridge.map(|bridge| bridge.secondary_bus));
    functions.iter().filter(move |function| {
        function.address.segment() == address.segment() && Some(function.address.bus()) == secondary
    })
}

fn depth(functions: &[Function], function: &Function) -> usize {
    let mut address = function.address;
    // A path crosses each bus once at most.
    let above = core::iter::from_fn(|| {
        address = bridge_above(functions, address)?.address;
        Some(())
    });
    above.take(usize::from(u8::MAX)).count()
}

/// Which window a BAR goes into, if any.
fn kind_of(bar: &Bar, wide: bool) -> Option<Kind> {
    match bar.kind {
        BarKind::Io => None,
        _ if wide && prefers_prefetchable(bar) => Some(Kind::Prefetchable),
        BarKind::Memory32 | BarKind::Memory64 => Some(Kind::Memory),
    }
}

/// Puts everything that is behind a bridge into a window without an end.
fn need(functions: &[Function], closed: &[Closed], index: usize, kind: Kind, wide: bool) -> Option<Need> {
    let bridge = &functions[closed[index].at];
    let behind: Vec<&Function> = behind(functions, bridge).collect();
    let is_behind = |other: &&Closed| behind.iter().any(|f| f.address == functions[other.at].address);
    let mut inner: Vec<&Closed> = closed.iter().filter(is_behind).collect();
    inner.sort_by_key(|other| other.order(kind));
    let windows = inner.iter().filter_map(|other| other.needs[kind as usize]);
    let mut bars: Vec<Bar> = behind.iter().flat_map(|function| &function.bars).copied().collect();
    bars.retain(|bar| kind_of(bar, wide) == Some(kind));
    bars.sort_by_key(order);
    let bars = bars.iter().map(|bar| Need { len_bytes: bar.len_bytes, align: alignment(bar) });
    let pieces: Vec<Need> = windows.chain(bars).collect();

    let align = pieces.iter().map(|need| need.align).max()?.max(WINDOW_BYTES);
    // The window begins at a multiple of its alignment, so that where makes no difference.
    let space = PhysRange::from_len(align, REHEARSAL_BYTES.checked_sub(align)?)?;
    let mut free: RangeSet = [space].into_iter().collect();
    let mut last = align;
    for piece in pieces {
        let place = free.find(piece.len_bytes, piece.align, space)?;
        free.remove(place);
        last = last.max(place.last());
    }
    Some(Need { len_bytes: (last + 1 - align).next_multiple_of(WINDOW_BYTES), align })
}

/// Room for a window, in that of the bridge above or of the host.
fn find(
    functions: &[Function],
    function: &Function,
    need: Need,
    kind: Kind,
    host: &HostWindow,
) -> Option<PhysRange> {
    let above = bridge_above(functions, function.address);
    let is_above = |other: &Function| {
        other.bridge.is_some_and(|bridge| bridge.leads_to(function.address.bus()))
            && other.address.segment() == function.address.segment()
    };
    let mut used = RangeSet::new();
    for other in functions.iter().filter(|other| !is_above(other)) {
        let windows = other.bridge.map(|bridge| [bridge.memory, bridge.prefetchable]);
        windows.into_iter().flatten().flatten().for_each(|range| used.insert(range));
        // Addresses that will not stay are in the way of nobody for long, but nothing is lost by going around them.
        other.bars.iter().filter_map(Bar::range).for_each(|range| used.insert(range));
    }
    if let Some(bridge) = above.and_then(|above| above.bridge) {
        let window = kind.window(&bridge)?;
        let mut left: RangeSet = [window].into_iter().collect();
        used.iter().for_each(|range| left.remove(range));
        return left.find(need.len_bytes, need.align, window);
    }
    let left = host.left(&used);
    let low = || host.low_parts().find_map(|part| left.find_last(need.len_bytes, need.align, part));
    match kind {
        Kind::Memory => low(),
        Kind::Prefetchable => {
            host.high_part().and_then(|part| left.find(need.len_bytes, need.align, part)).or_else(low)
        }
    }
}

/// Writes both windows of a bridge, closed where there is none, and remembers what the registers then say.
fn write(config: &impl ConfigSpace, functions: &mut [Function], at: usize) {
    let address = functions[at].address;
    let above = bridge_above(functions, address).map(|above| above.bridge);
    let Some(bridge) = functions[at].bridge else { return };
    // What the bridge above turned out not to pass on, this one cannot.
    let [memory, prefetchable] = KINDS.map(|kind| {
        kind.window(&bridge).filter(|range| match above {
            Some(above) => {
                above.and_then(|above| kind.window(&above)).is_some_and(|outer| outer.contains(*range))
            }
            None => true,
        })
    });
    // Closed is a base above the limit.
    let megabytes = |range: Option<PhysRange>| match range {
        Some(range) => ((range.start() >> 16) as u16 & 0xfff0, (range.last() >> 16) as u16 & 0xfff0),
        None => (0xfff0, 0),
    };
    let (base, limit) = megabytes(memory);
    config.write16(address, offset::MEMORY_BASE, base);
    config.write16(address, offset::MEMORY_BASE + 2, limit);
    let (base, limit) = megabytes(prefetchable);
    let upper = |address: Option<u64>| address.map_or(0, |address| (address >> 32) as u32);
    config.write16(address, offset::PREFETCH_BASE, base);
    config.write16(address, offset::PREFETCH_BASE + 2, limit);
    config.write32(address, offset::PREFETCH_BASE_UPPER, upper(prefetchable.map(PhysRange::start)));
    config.write32(address, offset::PREFETCH_LIMIT_UPPER, upper(prefetchable.map(PhysRange::last)));
    let found = super::scan::read_bridge(config, address);
    // A register that did not take its window passes on something else, which nothing may be put into.
    let as_written = |found: Option<PhysRange>, wanted: Option<PhysRange>| found.filter(|_| found == wanted);
    functions[at].bridge = Some(Bridge {
        memory: as_written(found.memory, memory),
        prefetchable: as_written(found.prefetchable, prefetchable),
        ..found
    });
}

/// Whether a bridge has a prefetchable window of 64 bits.
fn is_wide(config: &impl ConfigSpace, function: &Function) -> bool {
    config.read16(function.address, offset::PREFETCH_BASE) & 0xf == 1
}

#[cfg(test)]
mod tests;
