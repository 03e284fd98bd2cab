//! Numbering over made-up hierarchies: which bus answers depends on what the bridges hold.

use alloc::vec;
use alloc::vec::Vec;
use core::cell::RefCell;

use super::*;
use crate::pci::config::Width;

const VENDOR_AND_DEVICE: u32 = 0x1234_1b36;
const MULTIFUNCTION_BRIDGE: u32 = 0x0081_0000;

/// A function with what is behind it.
struct Device {
    device: u8,
    function: u8,
    /// None for an endpoint.
    bridge: Option<Behind>,
}

struct Behind {
    /// Primary, secondary and subordinate bus.
    numbers: [u8; 3],
    /// Whether the numbers can be written.
    takes_numbers: bool,
    bus: Vec<Device>,
}

fn endpoint(device: u8) -> Device {
    Device { device, function: 0, bridge: None }
}

fn bridge(device: u8, bus: Vec<Device>) -> Device {
    numbered_bridge(device, [0; 3], bus)
}

fn numbered_bridge(device: u8, numbers: [u8; 3], bus: Vec<Device>) -> Device {
    Device { device, function: 0, bridge: Some(Behind { numbers, takes_numbers: true, bus }) }
}

/// Root buses, by number.
struct Hierarchy {
    roots: RefCell<Vec<(u8, Vec<Device>)>>,
    range: BusRange,
}

impl Hierarchy {
    fn new(roots: Vec<(u8, Vec<Device>)>) -> Self {
        Self { roots: RefCell::new(roots), range: BusRange { segment: 0, first: 0, last: 255 } }
    }

    fn with_last(mut self, last: u8) -> Self {
        self.range.last = last;
        self
    }

    /// Runs `act` on the function that answers at an address.
    fn route<T>(&self, address: PciAddress, act: impl FnOnce(&mut Device) -> T) -> Option<T> {
        let mut roots = self.roots.borrow_mut();
        let bus = roots.iter_mut().find_map(|(number, bus)| find(bus, *number, address.bus()))?;
        let same = |f: &&mut Device| (f.device, f.function) == (address.device(), address.function());
        bus.iter_mut().find(same).map(act)
    }

    /// Secondary and subordinate bus of every bridge, in depth-first order.
    fn numbers(&self) -> Vec<(u8, u8)> {
        fn collect(bus: &[Device], into: &mut Vec<(u8, u8)>) {
            for behind in bus.iter().filter_map(|device| device.bridge.as_ref()) {
                into.push((behind.numbers[1], behind.numbers[2]));
                collect(&behind.bus, into);
            }
        }
        let mut all = Vec::new();
        self.roots.borrow().iter().for_each(|(_, bus)| collect(bus, &mut all));
        all
    }
}

fn find(bus: &mut Vec<Device>, number: u8, wanted: u8) -> Option<&mut Vec<Device>> {
    if number == wanted {
        return Some(bus);
    }
    bus.iter_mut().filter_map(|device| device.bridge.as_mut()).find_map(|behind| {
        let [_, secondary, subordinate] = behind.numbers;
        let leads = secondary != 0 && (secondary..=subordinate).contains(&wanted);
        leads.then(|| find(&mut behind.bus, secondary, wanted)).flatten()
    })
}

impl ConfigSpace for Hierarchy {
    fn read(&self, address: PciAddress, at: u16, width: Width) -> u32 {
        let word = self.route(address, |device| match (at & !3, &device.bridge) {
            (offset::VENDOR, _) => VENDOR_AND_DEVICE,
            // Header type, with the mark of several functions.
            (0x0c, Some(_)) => MULTIFUNCTION_BRIDGE,
            (0x0c, None) => MULTIFUNCTION_BRIDGE & !0x0001_0000,
            (offset::PRIMARY_BUS, Some(behind)) => {
                let [primary, secondary, subordinate] = behind.numbers;
                u32::from_le_bytes([primary, secondary, subordinate, 0])
            }
            _ => 0,
        });
        let shift = u32::from(at & 3) * 8;
        word.map_or(width.all_ones(), |word| word >> shift & width.all_ones())
    }

    fn write(&self, address: PciAddress, at: u16, width: Width, value: u32) {
        assert_eq!(width, Width::Byte, "only bus numbers are written");
        self.route(address, |device| {
            let behind = device.bridge.as_mut().expect("only bridges are written to");
            if behind.takes_numbers {
                behind.numbers[usize::from(at - offset::PRIMARY_BUS)] = value as u8;
            }
        });
    }

    fn buses(&self) -> Vec<BusRange> {
        vec![self.range]
    }
}

#[test]
fn bridges_are_numbered_depth_first() {
    let space = Hierarchy::new(vec![(
        0,
        vec![
            endpoint(1),
            bridge(2, vec![bridge(0, vec![endpoint(0)]), bridge(1, vec![])]),
            bridge(3, vec![endpoint(0)]),
        ],
    )]);
    assert_eq!(number(&space), Numbering { numbered: 4, closed: vec![] });
    assert_eq!(space.numbers(), [(1, 3), (2, 2), (3, 3), (4, 4)]);
    assert_eq!(number(&space), Numbering::default(), "numbers that are there stay");
}

#[test]
fn every_function_of_a_device_may_be_a_bridge() {
    let mut second = bridge(2, vec![]);
    second.function = 5;
    let space = Hierarchy::new(vec![(0, vec![bridge(2, vec![]), second])]);
    assert_eq!(number(&space).numbered, 2);
    assert_eq!(space.numbers(), [(1, 1), (2, 2)]);
}

#[test]
fn further_root_buses_keep_their_numbers() {
    let many = (1..=20).map(|device| bridge(device, vec![])).collect();
    let space = Hierarchy::new(vec![(0, many), (16, vec![endpoint(0), bridge(1, vec![endpoint(0)])])]);
    let numbering = number(&space);
    assert_eq!(numbering.numbered, 16);
    assert_eq!(numbering.closed.len(), 5, "five of twenty find no number below 16");
    assert_eq!(space.numbers()[14..], [(15, 15), (0, 0), (0, 0), (0, 0), (0, 0), (0, 0), (17, 17)]);
}

#[test]
fn good_numbers_of_firmware_stay() {
    let good = || {
        vec![
            numbered_bridge(1, [0, 1, 4], vec![numbered_bridge(0, [1, 3, 4], vec![])]),
            numbered_bridge(2, [0, 8, 9], vec![]),
            // Firmware leaves some closed.
            bridge(3, vec![]),
        ]
    };
    let space = Hierarchy::new(vec![(0, good())]);
    assert_eq!(number(&space), Numbering::default());
    assert_eq!(space.numbers(), [(1, 4), (3, 4), (8, 9), (0, 0)]);
    assert_eq!(number(&Hierarchy::new(vec![(0, vec![endpoint(0)])])), Numbering::default());
}

#[test]
fn contradictions_are_numbered_afresh() {
    let contradictions = [
        // Two claim a bus.
        vec![numbered_bridge(1, [0, 1, 4], vec![]), numbered_bridge(2, [0, 4, 5], vec![])],
        vec![numbered_bridge(1, [0, 1, 4], vec![]), numbered_bridge(2, [0, 1, 4], vec![])],
        // Upwards.
        vec![numbered_bridge(1, [0, 3, 2], vec![])],
        // More than the bridge above passes on.
        vec![numbered_bridge(1, [0, 1, 2], vec![numbered_bridge(0, [1, 2, 3], vec![])])],
        vec![numbered_bridge(1, [0, 1, 2], vec![numbered_bridge(0, [1, 1, 1], vec![])])],
        vec![numbered_bridge(1, [0, 1, 255], vec![])],
    ];
    for bus in contradictions {
        let space = Hierarchy::new(vec![(0, bus)]).with_last(7);
        assert!(number(&space).numbered > 0, "{:?}", space.numbers());
        assert_eq!(number(&space), Numbering::default(), "{:?}", space.numbers());
    }
}

#[test]
fn a_bridge_that_takes_no_numbers_stays_closed() {
    let mut broken = bridge(1, vec![endpoint(0)]);
    broken.bridge.as_mut().expect("a bridge").takes_numbers = false;
    let space = Hierarchy::new(vec![(0, vec![broken, bridge(2, vec![])])]);
    let numbering = number(&space);
    assert_eq!(numbering, Numbering { numbered: 1, closed: vec![PciAddress::new(0, 0, 1, 0)] });
    assert_eq!(space.numbers(), [(0, 0), (1, 1)]);
}

#[test]
fn a_chain_that_is_too_long_ends_at_the_last_bus() {
    let mut bus = vec![endpoint(0)];
    for _ in 0..300 {
        bus = vec![bridge(1, bus)];
    }
    let space = Hierarchy::new(vec![(0, bus)]);
    let numbering = number(&space);
    assert_eq!((numbering.numbered, numbering.closed.len()), (255, 1));
    assert_eq!(number(&space), Numbering::default());
}

/// Whatever the registers hold at first: afterwards the numbers agree, and a second look changes nothing.
#[test]
fn numbering_holds_its_promises_for_random_hierarchies() {
    fn random_bus(random: &mut fastrand::Rng, depth: u32) -> Vec<Device> {
        let mut devices: Vec<u8> = (0..random.u8(0..6)).map(|_| random.u8(0..32)).collect();
        devices.sort_unstable();
        devices.dedup();
        let mut device = |device| {
            if depth == 0 || random.bool() {
                return endpoint(device);
            }
            let numbers = if random.bool() { [0; 3] } else { [0; 3].map(|_| random.u8(..)) };
            let bus = random_bus(random, depth - 1);
            numbered_bridge(device, numbers, bus)
        };
        devices.drain(..).map(&mut device).collect()
    }
    for seed in 0..60 {
        let mut random = fastrand::Rng::with_seed(seed);
        let roots = vec![(0, random_bus(&mut random, 4)), (random.u8(1..200), random_bus(&mut random, 3))];
        let space = Hierarchy::new(roots);
        let first = number(&space);
        let second = number(&space);
        assert!(second.numbered == 0 || first.closed == second.closed, "seed {seed}: {first:?} {second:?}");
        assert!(is_numbered(&space, space.range) || !first.closed.is_empty(), "seed {seed}");
    }
}
