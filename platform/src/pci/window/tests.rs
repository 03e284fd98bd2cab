//! Windows over made-up machines without firmware, and with some.

use alloc::vec::Vec;

use crate::memory::map::{MemoryMap, Region, RegionKind};
use crate::pci::assign::HostWindow;
use crate::pci::bar::BarKind;
use crate::pci::config::offset;
use crate::pci::fake::{FakeFunction, FakeSpace};
use crate::pci::function::Function;
use crate::pci::{Pci, PciAddress};
use crate::range::{PhysRange, RangeSet};

const LOW: (u64, u64) = (0x4000_0000, 0x7fff_ffff);
const HIGH: (u64, u64) = (0x4_0000_0000, 0x7_ffff_ffff);
const ECAM: (u64, u64) = (0x3000_0000, 0x3fff_ffff);
const HIGHEST: u64 = (1 << 38) - 1;

fn at(bus: u8, device: u8) -> PciAddress {
    PciAddress::new(0, bus, device, 0)
}

fn range((start, last): (u64, u64)) -> PhysRange {
    PhysRange::new(start, last).expect("a test's range is not empty")
}

/// As QEMU's riscv64 machine has it.
fn host() -> HostWindow {
    let ram = Region { range: range((0x8000_0000, 0x8fff_ffff)), kind: RegionKind::Ram };
    let map = MemoryMap::new(alloc::vec![ram]);
    HostWindow::of_bridge(0, [range(LOW), range(HIGH)], &map, [range(ECAM)], HIGHEST)
}

/// A port with bus numbers and closed windows whose registers can be written.
fn port(secondary: u8, subordinate: u8) -> FakeFunction {
    FakeFunction::bridge(secondary, subordinate, 0, 0)
        .with_register(offset::MEMORY_BASE, 0, 0xfff0_fff0)
        .with_register(offset::PREFETCH_BASE, 0x0001_0001, 0xfff0_fff0)
        .with_register(offset::PREFETCH_BASE_UPPER, 0, u32::MAX)
        .with_register(offset::PREFETCH_LIMIT_UPPER, 0, u32::MAX)
}

/// The same as a slot for hot-plug.
fn slot(secondary: u8) -> FakeFunction {
    port(secondary, secondary)
        .with(offset::STATUS, &[0x10])
        .with(offset::CAPABILITIES, &[0x40])
        .with(0x40, &[0x10, 0, 0x42, 1])
        .with(0x54, &[0x40])
}

type Ends = Option<(u64, u64)>;

fn windows(function: &Function) -> (Ends, Ends) {
    let bridge = function.bridge.expect("a bridge");
    let [memory, prefetchable] =
        [bridge.memory, bridge.prefetchable].map(|window| window.map(|range| (range.start(), range.last())));
    (memory, prefetchable)
}

#[test]
fn windows_hold_what_is_behind() {
    let mut pci = Pci::scan(FakeSpace::new([
        (at(0, 1), port(1, 2)),
        (at(1, 0), port(2, 2)),
        (at(2, 0), FakeFunction::endpoint(1, 1).with_bar32(0, 0, 0x1000).with_bar64(2, 0, 0x4000)),
        (at(1, 1), FakeFunction::endpoint(1, 2).with_bar32(0, 0, 0x20_0000)),
        // Nothing behind it.
        (at(0, 2), port(3, 3)),
        (at(0, 3), slot(4)),
    ]));
    assert_eq!(pci.assign_bars(&host()), []);
    let of = |address| windows(pci.at(address).expect("found"));
    // 1 MiB for the inner window, and 2 MiB for the BAR at a multiple of that.
    assert_eq!(of(at(0, 1)), (Some((0x7fc0_0000, 0x7fff_ffff)), Some((0x4_0000_0000, 0x4_000f_ffff))));
    assert_eq!(of(at(1, 0)), (Some((0x7fc0_0000, 0x7fcf_ffff)), Some((0x4_0000_0000, 0x4_000f_ffff))));
    assert_eq!(of(at(0, 2)), (None, None));
    assert_eq!(of(at(0, 3)), (Some((0x7fa0_0000, 0x7fbf_ffff)), None));
    let again = Pci::scan(pci.config());
    for address in [at(0, 1), at(1, 0), at(0, 2), at(0, 3)] {
        assert_eq!(windows(again.at(address).expect("found")), of(address), "the registers hold them");
    }
}

#[test]
fn without_wide_bridges_everything_goes_below() {
    let narrow = port(1, 1).with_register(offset::PREFETCH_BASE, 0, 0);
    let mut pci = Pci::scan(FakeSpace::new([
        (at(0, 1), narrow),
        (at(1, 0), FakeFunction::endpoint(1, 1).with_bar64(0, 0, 0x4000)),
    ]));
    assert_eq!(pci.assign_bars(&host()), []);
    assert_eq!(windows(pci.at(at(0, 1)).expect("found")), (Some((0x7ff0_0000, 0x7fff_ffff)), None));
}

#[test]
fn what_fits_nowhere_is_named_and_hides_nothing() {
    let mut pci = Pci::scan(FakeSpace::new([
        (at(0, 1), port(1, 1)),
        (at(1, 0), FakeFunction::endpoint(1, 1).with_bar32(0, 0, 0x8000_0000)),
        (at(0, 2), port(2, 2)),
        (at(2, 0), FakeFunction::endpoint(1, 1).with_bar32(0, 0, 0x1000)),
    ]));
    let errors = pci.assign_bars(&host());
    assert_eq!(errors.iter().map(|error| error.function).collect::<Vec<_>>(), [at(1, 0)]);
    assert_eq!(windows(pci.at(at(0, 2)).expect("found")).0, Some((0x7ff0_0000, 0x7fff_ffff)));
}

#[test]
fn other_segments_are_left_alone() {
    let other = PciAddress::new(1, 0, 1, 0);
    let space = FakeSpace::with_buses(
        [(other, FakeFunction::endpoint(1, 1).with_bar32(0, 0, 0x1000))],
        &[crate::pci::config::BusRange { segment: 1, first: 0, last: 0 }],
    );
    let mut pci = Pci::scan(space);
    assert_eq!(pci.assign_bars(&host()), []);
    assert_eq!(pci.at(other).expect("found").bars[0].address, None);
}

/// Whatever is behind the ports of a switch, everything gets an address, inside of every window on the way, and nothing
/// overlaps.
#[test]
fn windows_are_just_large_enough_for_random_hierarchies() {
    for seed in 0..100 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut functions = alloc::vec![(at(0, 1), port(1, 6)), (at(1, 0), port(2, 6))];
        for device in 0..4 {
            functions.push((at(2, device), port(3 + device, 3 + device)));
        }
        for bus in [0, 1, 3, 4, 5, 6] {
            for device in 8..random.u8(8..11) {
                functions.push((at(bus, device), random_endpoint(&mut random)));
            }
        }
        let mut pci = Pci::scan(FakeSpace::new(functions));
        assert_eq!(pci.assign_bars(&host()), [], "seed {seed}");
        let mut used = RangeSet::new();
        for function in pci.functions() {
            for bar in &function.bars {
                let range = bar.range().expect("assigned");
                assert!(!used.overlaps(range), "seed {seed}: {bar} overlaps another");
                used.insert(range);
                let mut at = function.address;
                while let Some(bridge) = pci.bridge_above(at) {
                    let (memory, prefetchable) = windows(bridge);
                    let inside = [memory, prefetchable].into_iter().flatten();
                    assert!(
                        inside.map(self::range).any(|window| window.contains(range)),
                        "seed {seed}: {bar} of {} is outside of {}",
                        function.address,
                        bridge.address
                    );
                    at = bridge.address;
                }
                assert!(self::range(LOW).contains(range) || self::range(HIGH).contains(range), "seed {seed}");
                assert!(bar.kind == BarKind::Memory64 || self::range(LOW).contains(range), "seed {seed}");
            }
        }
    }
}

fn random_endpoint(random: &mut fastrand::Rng) -> FakeFunction {
    let mut function = FakeFunction::endpoint(1, 1);
    let mut index = 0;
    while index < 6 {
        let len_log2 = random.u32(4..23);
        function = match random.u8(0..4) {
            0 if index < 5 => {
                index += 1;
                function.with_bar64(index - 1, 0, 1 << len_log2)
            }
            // 64 bits, not prefetchable.
            1 if index < 5 => {
                index += 1;
                let mask = !((1u64 << len_log2) - 1);
                let at = offset::BAR0 + 4 * (index - 1);
                function.with_register(at, 4, mask as u32).with_register(at + 4, 0, (mask >> 32) as u32)
            }
            _ => function.with_bar32(index, 0, 1 << len_log2),
        };
        index += random.u16(1..3);
    }
    function
}
