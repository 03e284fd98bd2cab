//! Scan, BARs, assignment and capabilities over made-up configuration spaces.

use alloc::vec::Vec;

use super::assign::{AssignError, AssignReason, HostWindow};
use super::bar::{BarKind, Prefetch};
use super::config::{BusRange, ConfigSpace, offset};
use super::fake::{BUS_MASTER, FakeFunction, FakeSpace, MEMORY_ENABLE};
use super::function::{BusMaster, MemoryDecode};
use super::{Pci, PciAddress};
use crate::memory::map::{MemoryMap, Region, RegionKind};
use crate::range::{PhysRange, RangeSet};

const HIGHEST: u64 = (1 << 40) - 1;

fn at(bus: u8, device: u8, function: u8) -> PciAddress {
    PciAddress::new(0, bus, device, function)
}

fn range(start: u64, last: u64) -> PhysRange {
    PhysRange::new(start, last).expect("a test's range is not empty")
}

/// RAM of 256 MiB, and 2 GiB more above 4 GiB; a reserved corner at the top, as QEMU has it.
fn memory_map() -> MemoryMap {
    let region = |start, last, kind| Region { range: range(start, last), kind };
    MemoryMap::new(alloc::vec![
        region(0, 0xfff_ffff, RegionKind::Ram),
        region(0xfffc_0000, 0xffff_ffff, RegionKind::Reserved),
        region(0x1_0000_0000, 0x1_7fff_ffff, RegionKind::Ram),
        region(0xfd_0000_0000, HIGHEST, RegionKind::Reserved),
    ])
}

const ECAM: (u64, u64) = (0xb000_0000, 0xbfff_ffff);

fn host() -> HostWindow {
    HostWindow::new(&memory_map(), [range(ECAM.0, ECAM.1)], HIGHEST)
}

fn addresses<C: ConfigSpace>(pci: &Pci<C>, function: PciAddress) -> Vec<Option<u64>> {
    pci.at(function).expect("the function was found").bars.iter().map(|bar| bar.address).collect()
}

#[test]
fn every_function_of_every_bus_and_segment_is_found() {
    let multifunction = FakeFunction::endpoint(1, 1).with(offset::HEADER_TYPE, &[0x80]);
    let other_segment = PciAddress::new(3, 2, 0, 0);
    let space = FakeSpace::with_buses(
        [
            (at(0, 3, 0), multifunction),
            (at(0, 3, 2), FakeFunction::endpoint(1, 2)),
            // Answers at every function number, but has one function.
            (at(0, 4, 0), FakeFunction::endpoint(1, 3)),
            (at(0, 4, 1), FakeFunction::endpoint(1, 3)),
            // On a root bus that no bridge mentions, at its last place.
            (at(16, 31, 0), FakeFunction::endpoint(1, 4)),
            // Without function 0 there is no device.
            (at(0, 5, 1), FakeFunction::endpoint(1, 5)),
            (other_segment, FakeFunction::endpoint(1, 6)),
            (PciAddress::new(3, 9, 0, 0), FakeFunction::endpoint(1, 7)),
        ],
        &[
            BusRange { segment: 0, first: 0, last: 255 },
            BusRange { segment: 0, first: 16, last: 16 },
            BusRange { segment: 3, first: 2, last: 2 },
        ],
    );
    let pci = Pci::scan(space);
    let found: Vec<_> = pci.functions().iter().map(|function| function.address).collect();
    assert_eq!(found, [at(0, 3, 0), at(0, 3, 2), at(0, 4, 0), at(16, 31, 0), other_segment]);
    assert_eq!(pci.with_id(1, 4).next().expect("found").bdf(), 0x10f8);
}

#[test]
fn bars_of_every_kind_are_sized_with_decoding_off() {
    let near_top = 0xff_ff00_0000;
    let function = FakeFunction::endpoint(1, 1)
        .with_command(MEMORY_ENABLE | BUS_MASTER)
        .with_bar32(0, 0xfea0_0000, 0x1000)
        .with_bar64(1, near_top, 0x8_0000)
        // The upper half of an I/O BAR is fixed here.
        .with_register(offset::BAR0 + 12, 0xc041, 0xffe0)
        .with_register(offset::BAR0 + 16, 6, 0xffff_f000)
        // A 64-bit BAR without room for its upper half.
        .with_register(offset::BAR0 + 20, 4, 0xffff_f000);
    let pci = Pci::scan(FakeSpace::new([(at(0, 1, 0), function)]));
    assert_eq!(pci.config().careless_writes.get(), 0);
    assert_eq!(pci.config().read16(at(0, 1, 0), offset::COMMAND), MEMORY_ENABLE | BUS_MASTER);

    let bars = &pci.functions()[0].bars;
    let shape: Vec<_> =
        bars.iter().map(|bar| (bar.index, bar.kind, bar.prefetch, bar.address, bar.len_bytes)).collect();
    assert_eq!(
        shape,
        [
            (0, BarKind::Memory32, Prefetch::NotAllowed, Some(0xfea0_0000), 0x1000),
            (1, BarKind::Memory64, Prefetch::Allowed, Some(near_top), 0x8_0000),
            (3, BarKind::Io, Prefetch::NotAllowed, Some(0xc040), 0x20),
        ]
    );
    assert_eq!(bars[1].range(), Some(range(near_top, near_top + 0x7_ffff)));
    assert_eq!(bars[2].range(), None);
}

#[test]
fn good_addresses_are_kept_whether_decoding_is_on_or_off() {
    let near_top = FakeFunction::endpoint(1, 1).with_bar64(0, 0xff_ff00_0000, 0x8_0000);
    let low = FakeFunction::endpoint(1, 2).with_command(MEMORY_ENABLE).with_bar32(0, 0xfea0_0000, 0x10_0000);
    let mut pci = Pci::scan(FakeSpace::new([(at(0, 1, 0), near_top), (at(0, 2, 0), low)]));
    assert_eq!(pci.assign_bars(&host()), []);
    assert_eq!(addresses(&pci, at(0, 1, 0)), [Some(0xff_ff00_0000)]);
    assert_eq!(addresses(&pci, at(0, 2, 0)), [Some(0xfea0_0000)]);
    assert_eq!(pci.config().careless_writes.get(), 0);
    assert_eq!(pci.config().read16(at(0, 1, 0), offset::COMMAND), 0);
    pci.set_memory_decode(at(0, 1, 0), MemoryDecode::On);
    assert_eq!(pci.config().read16(at(0, 1, 0), offset::COMMAND), MEMORY_ENABLE);
}

#[test]
fn bars_without_an_address_get_one_of_their_window() {
    let function = FakeFunction::endpoint(1, 1).with_bar32(0, 0, 0x10_0000).with_bar64(2, 0, 0x4000);
    let mut pci = Pci::scan(FakeSpace::new([(at(0, 1, 0), function)]));
    assert_eq!(addresses(&pci, at(0, 1, 0)), [None, None]);
    assert_eq!(pci.assign_bars(&host()), []);
    assert_eq!(addresses(&pci, at(0, 1, 0)), [Some(0xaff0_0000), Some(0xafef_c000)]);
    let again = Pci::scan(pci.config());
    assert_eq!(addresses(&again, at(0, 1, 0)), addresses(&pci, at(0, 1, 0)), "the registers hold them");
}

#[test]
fn addresses_that_cannot_work_are_replaced() {
    let unusable = [
        0x20_0000u64,  // RAM
        ECAM.0,        // configuration space
        HIGHEST + 1,   // out of the CPU's reach
        0x1_4000_0000, // RAM above 4 GiB
        !0xfff,        // what a register holds after sizing gone wrong
    ];
    for address in unusable {
        let function = FakeFunction::endpoint(1, 1).with_bar64(0, address, 0x1000);
        let mut pci = Pci::scan(FakeSpace::new([(at(0, 1, 0), function)]));
        assert_eq!(pci.assign_bars(&host()), [], "{address:#x}");
        assert_eq!(addresses(&pci, at(0, 1, 0)), [Some(0xafff_f000)], "{address:#x}");
    }
    let twice = || FakeFunction::endpoint(1, 1).with_bar32(0, 0xfea0_0000, 0x1000);
    let mut pci = Pci::scan(FakeSpace::new([(at(0, 1, 0), twice()), (at(0, 2, 0), twice())]));
    assert_eq!(pci.assign_bars(&host()), []);
    assert_eq!(addresses(&pci, at(0, 1, 0)), [Some(0xfea0_0000)]);
    assert_eq!(addresses(&pci, at(0, 2, 0)), [Some(0xafff_f000)]);
}

#[test]
fn a_machine_without_room_above_four_gigabytes_uses_what_is_below() {
    let host = HostWindow::new(&memory_map(), [], u32::MAX.into());
    let function = FakeFunction::endpoint(1, 1).with_bar64(0, 0, 0x4000).with_bar64(2, 0, 1 << 33);
    let mut pci = Pci::scan(FakeSpace::new([(at(0, 1, 0), function)]));
    let too_large =
        AssignError { function: at(0, 1, 0), bar: 2, len_bytes: 1 << 33, reason: AssignReason::NoRoom };
    assert_eq!(pci.assign_bars(&host), [too_large]);
    assert_eq!(addresses(&pci, at(0, 1, 0)), [Some(0xfebf_c000), None]);
}

#[test]
fn what_does_not_fit_below_configuration_space_goes_elsewhere() {
    let function = FakeFunction::endpoint(1, 1)
        .with_bar32(0, 0, 1 << 31)
        .with_bar32(1, 0, 1 << 29)
        .with_bar64(2, 0, 1 << 33);
    let mut pci = Pci::scan(FakeSpace::new([(at(0, 1, 0), function)]));
    let too_large =
        AssignError { function: at(0, 1, 0), bar: 0, len_bytes: 1 << 31, reason: AssignReason::NoRoom };
    assert_eq!(pci.assign_bars(&host()), [too_large]);
    assert_eq!(addresses(&pci, at(0, 1, 0)), [None, Some(0x8000_0000), Some(0x2_0000_0000)]);
    let at_the_bottom =
        HostWindow::new(&memory_map(), [range(0, 0xfff_ffff), range(1 << 40, 1 << 41)], HIGHEST);
    let mut pci =
        Pci::scan(FakeSpace::new([(at(0, 1, 0), FakeFunction::endpoint(1, 1).with_bar32(0, 0, 0x1000))]));
    assert_eq!(pci.assign_bars(&at_the_bottom), []);
    assert_eq!(addresses(&pci, at(0, 1, 0)), [Some(0xfebf_f000)]);
}

#[test]
fn behind_a_bridge_addresses_come_from_its_window() {
    let space = || {
        FakeSpace::new([
            (at(0, 1, 0), FakeFunction::bridge(1, 2, 0xfe00, 0xfe10)),
            // Inside of the first, with the lower half of its window.
            (at(1, 0, 0), FakeFunction::bridge(2, 2, 0xfe00, 0xfe00)),
            (
                at(1, 1, 0),
                FakeFunction::endpoint(1, 1).with_bar32(0, 0, 0x1000).with_bar32(1, 0xc000_0000, 0x1000),
            ),
            (at(2, 0, 0), FakeFunction::endpoint(1, 2).with_bar64(0, 0, 0x1000).with_bar32(2, 0, 0x20_0000)),
        ])
    };
    let mut pci = Pci::scan(space());
    assert_eq!(pci.bridge_above(at(2, 0, 0)).map(|bridge| bridge.address), Some(at(1, 0, 0)));
    assert_eq!(pci.bridge_above(at(1, 1, 0)).map(|bridge| bridge.address), Some(at(0, 1, 0)));
    assert_eq!(pci.bridge_above(at(0, 1, 0)), None);
    let too_large =
        AssignError { function: at(2, 0, 0), bar: 2, len_bytes: 0x20_0000, reason: AssignReason::NoRoom };
    assert_eq!(pci.assign_bars(&host()), [too_large]);
    assert_eq!(addresses(&pci, at(1, 1, 0)), [Some(0xfe10_0000), Some(0xfe10_1000)]);
    assert_eq!(addresses(&pci, at(2, 0, 0)), [Some(0xfe00_0000), None]);

    pci.set_bus_master(at(2, 0, 0), BusMaster::On);
    pci.set_memory_decode(at(2, 0, 0), MemoryDecode::On);
    for address in [at(2, 0, 0), at(1, 0, 0), at(0, 1, 0)] {
        assert_eq!(pci.config().read16(address, offset::COMMAND), MEMORY_ENABLE | BUS_MASTER, "{address}");
    }
    assert_eq!(pci.bus_master(at(1, 1, 0)), BusMaster::Off);
}

#[test]
fn pins_turn_at_each_bridge() {
    let with_pin = |pin| FakeFunction::endpoint(1, 1).with(offset::INTERRUPT_PIN, &[pin]);
    let pci = Pci::scan(FakeSpace::new([
        (at(0, 1, 0), FakeFunction::bridge(1, 2, 0, 0)),
        (at(1, 3, 0), FakeFunction::bridge(2, 2, 0, 0)),
        (at(2, 2, 0), with_pin(1)),
        (at(1, 1, 0), with_pin(4)),
        (at(0, 2, 0), with_pin(2)),
        (at(0, 3, 0), with_pin(0)),
        (at(0, 4, 0), with_pin(5)),
    ]));
    // A at device 2 is C behind the inner bridge, and that at device 3 is B behind the outer one.
    assert_eq!(pci.pin_at_root(at(2, 2, 0)), Some((at(0, 1, 0), 2)));
    assert_eq!(pci.pin_at_root(at(1, 1, 0)), Some((at(0, 1, 0), 1)));
    assert_eq!(pci.pin_at_root(at(0, 2, 0)), Some((at(0, 2, 0), 2)));
    assert_eq!(pci.pin_at_root(at(0, 3, 0)), None);
    assert_eq!(pci.pin_at_root(at(0, 4, 0)), None);
}

#[test]
fn bridges_that_claim_each_other_end_no_loop() {
    let pci = Pci::scan(FakeSpace::new([
        (at(0, 1, 0), FakeFunction::bridge(1, 255, 0, 0)),
        (at(1, 0, 0), FakeFunction::bridge(0, 255, 0, 0)),
        (at(2, 0, 0), FakeFunction::bridge(1, 3, 0, 0)),
    ]));
    pci.set_bus_master(at(2, 0, 0), BusMaster::On);
    assert_eq!(pci.bus_master(at(0, 1, 0)), BusMaster::On);
}

#[test]
fn a_register_that_does_not_take_its_address_is_named() {
    // Its upper bits are fixed at 0.
    let function = FakeFunction::endpoint(1, 1).with_register(offset::BAR0, 0, 0x0fff_f000);
    let mut pci = Pci::scan(FakeSpace::new([(at(0, 1, 0), function)]));
    let reason = AssignReason::Refused { wrote: 0xafff_f000, reads: 0x0fff_f000 };
    assert_eq!(
        pci.assign_bars(&host()),
        [AssignError { function: at(0, 1, 0), bar: 0, len_bytes: 0x1000, reason }]
    );
    assert_eq!(addresses(&pci, at(0, 1, 0)), [None]);
}

#[test]
fn quiescing_spares_bridges() {
    let host_bridge = FakeFunction::endpoint(0x8086, 0x29c0).with(offset::REVISION + 2, &[0, 6]);
    let pci = Pci::scan(FakeSpace::new([
        (at(0, 0, 0), host_bridge.with_command(BUS_MASTER)),
        (at(0, 1, 0), FakeFunction::bridge(1, 1, 0xfe00, 0xfe00).with_command(BUS_MASTER | MEMORY_ENABLE)),
        (at(0, 2, 0), FakeFunction::endpoint(1, 1).with_command(MEMORY_ENABLE)),
        (at(1, 0, 0), FakeFunction::endpoint(1, 2).with_command(BUS_MASTER | MEMORY_ENABLE)),
    ]));
    assert_eq!(pci.quiesce_all(), 1);
    let commands: Vec<_> =
        pci.functions().iter().map(|f| pci.config().read16(f.address, offset::COMMAND)).collect();
    assert_eq!(commands, [BUS_MASTER, BUS_MASTER | MEMORY_ENABLE, MEMORY_ENABLE, MEMORY_ENABLE]);
    assert_eq!(pci.quiesce_all(), 0);
}

#[test]
fn capabilities_are_listed_and_loops_end() {
    let listed = |function: FakeFunction| {
        let pci = Pci::scan(FakeSpace::new([(at(0, 1, 0), function)]));
        pci.capabilities(at(0, 1, 0)).iter().map(|c| (c.id, c.offset)).collect::<Vec<_>>()
    };
    let base = || FakeFunction::endpoint(1, 1).with(offset::STATUS, &[0x10]);
    assert_eq!(
        listed(FakeFunction::endpoint(1, 1).with(offset::CAPABILITIES, &[0x40]).with(0x40, &[9, 0])),
        []
    );
    // Reserved low bits of a pointer are ignored.
    let good = base().with(offset::CAPABILITIES, &[0x41]).with(0x40, &[9, 0x50]).with(0x50, &[0x11, 0]);
    assert_eq!(listed(good), [(9, 0x40), (0x11, 0x50)]);
    let looping = base().with(offset::CAPABILITIES, &[0x40]).with(0x40, &[9, 0x50]).with(0x50, &[5, 0x40]);
    assert_eq!(listed(looping), [(9, 0x40), (5, 0x50)]);
    let into_header = base().with(offset::CAPABILITIES, &[0x40]).with(0x40, &[9, 0x10]);
    assert_eq!(listed(into_header), [(9, 0x40)]);
    assert_eq!(listed(base().with(offset::CAPABILITIES, &[0x40]).with(0x40, &[0xff, 0xff])), []);
}

#[test]
fn extended_capabilities_are_listed_and_loops_end() {
    let listed = |function: FakeFunction| {
        let pci = Pci::scan(FakeSpace::new([(at(0, 1, 0), function)]));
        pci.extended_capabilities(at(0, 1, 0)).iter().map(|c| (c.id, c.version, c.offset)).collect::<Vec<_>>()
    };
    let header = |id: u32, version: u32, next: u32| (id | version << 16 | next << 20).to_le_bytes();
    assert_eq!(listed(FakeFunction::endpoint(1, 1)), []);
    assert_eq!(listed(FakeFunction::endpoint(1, 1).with(0x100, &[0xff; 4])), []);
    let looping =
        FakeFunction::endpoint(1, 1).with(0x100, &header(0xf, 1, 0xffc)).with(0xffc, &header(0x1b, 2, 0x100));
    assert_eq!(listed(looping), [(0xf, 1, 0x100), (0x1b, 2, 0xffc)]);
}

/// Whatever firmware left in the BARs: afterwards no two overlap, none touches RAM or configuration space, each is
/// aligned and in reach, and the registers hold what the list says.
#[test]
fn assignment_holds_its_promises_for_random_machines() {
    for seed in 0..300 {
        let mut random = fastrand::Rng::with_seed(seed);
        let functions: Vec<_> =
            (0..random.u8(1..20)).map(|device| (at(0, device, 0), random_function(&mut random))).collect();
        let bus = BusRange { segment: 0, first: 0, last: 0 };
        let mut pci = Pci::scan(FakeSpace::with_buses(functions, &[bus]));
        let errors = pci.assign_bars(&host());
        assert_eq!(pci.config().careless_writes.get(), 0, "seed {seed}");
        let mut used = RangeSet::new();
        for function in pci.functions() {
            for bar in &function.bars {
                let Some(range) = bar.range() else {
                    assert!(
                        errors.iter().any(|e| (e.function, e.bar) == (function.address, bar.index)),
                        "seed {seed}"
                    );
                    continue;
                };
                assert!(range.start().is_multiple_of(bar.len_bytes), "seed {seed}: {bar}");
                assert!(range.last() <= HIGHEST, "seed {seed}: {bar}");
                assert!(
                    bar.kind == BarKind::Memory64 || range.last() <= u32::MAX.into(),
                    "seed {seed}: {bar}"
                );
                assert!(!used.overlaps(range), "seed {seed}: {bar} overlaps another");
                assert!(!memory_map().ram().overlaps(range), "seed {seed}: {bar} overlaps RAM");
                assert!(
                    range.last() < ECAM.0 || range.start() > ECAM.1,
                    "seed {seed}: {bar} overlaps configuration space"
                );
                used.insert(range);
            }
        }
        let again = Pci::scan(pci.config());
        for (function, found) in pci.functions().iter().zip(again.functions()) {
            for (bar, found) in function.bars.iter().zip(&found.bars) {
                assert!(bar.address.is_none() || bar.address == found.address, "seed {seed}");
            }
        }
    }
}

fn random_function(random: &mut fastrand::Rng) -> FakeFunction {
    let mut function = FakeFunction::endpoint(1, 1).with_command(random.u16(0..8));
    let mut index = 0;
    while index < 6 {
        let len_log2 = random.u32(4..31);
        let address = if random.bool() { 0 } else { random.u64(..) >> random.u32(16..34) };
        let wide = random.bool() && index < 5;
        function = if wide {
            function.with_bar64(index, address >> len_log2 << len_log2, 1 << len_log2)
        } else {
            function.with_bar32(index, (address as u32) >> len_log2 << len_log2, 1 << len_log2)
        };
        index += random.u16(1..4) + u16::from(wide);
    }
    function
}
