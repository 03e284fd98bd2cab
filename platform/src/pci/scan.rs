//! Finding every function.
//!
//! Every bus of every segment is looked at, and not only those that bridges lead to: a host may have root buses that no
//! bridge mentions. That is 8192 reads for a segment of 256 buses.

use alloc::vec::Vec;

use pci_types::{HeaderType, PciAddress};

use super::bar;
use super::config::{ConfigSpace, offset};
use super::function::{Bridge, Class, Function};
use crate::range::PhysRange;

/// The devices of a bus.
pub(super) const DEVICES: u8 = 32;
const FUNCTIONS: u8 = 8;
const MULTIFUNCTION: u8 = 0x80;
const BRIDGE_HEADER: u8 = 1;
const NO_FUNCTION: u16 = 0xffff;
/// Vendor numbers that stand for no function. A bus that is being reset may read as zeros.
const ABSENT: [u16; 2] = [NO_FUNCTION, 0];

/// The BARs of a function with each layout of configuration space.
const ENDPOINT_BARS: u8 = 6;
const BRIDGE_BARS: u8 = 2;

/// Finds every function, by address.
pub(super) fn scan(config: &impl ConfigSpace) -> Vec<Function> {
    let mut functions = Vec::new();
    for range in config.buses() {
        for bus in range.first..=range.last {
            functions.extend(scan_bus(config, range.segment, bus));
        }
    }
    functions.sort_by_key(|function| function.address);
    // Two MCFG entries may cover the same bus.
    functions.dedup_by_key(|function| function.address);
    functions
}

/// Finds the functions of one bus.
pub(super) fn scan_bus(config: &impl ConfigSpace, segment: u16, bus: u8) -> Vec<Function> {
    (0..DEVICES).flat_map(|device| scan_device(config, segment, bus, device)).collect()
}

fn scan_device(
    config: &impl ConfigSpace,
    segment: u16,
    bus: u8,
    device: u8,
) -> impl Iterator<Item = Function> {
    present(config, segment, bus, device).map(|address| read_function(config, address))
}

/// The functions of a device that are there.
pub(super) fn present(
    config: &impl ConfigSpace,
    segment: u16,
    bus: u8,
    device: u8,
) -> impl Iterator<Item = PciAddress> {
    let address = move |function| PciAddress::new(segment, bus, device, function);
    let several =
        is_present(config, address(0)) && config.read8(address(0), offset::HEADER_TYPE) & MULTIFUNCTION != 0;
    let count = if several { FUNCTIONS } else { 1 };
    (0..count).map(address).filter(|address| is_present(config, *address))
}

/// Whether a function that is there is a bridge to another bus.
pub(super) fn is_bridge(config: &impl ConfigSpace, address: PciAddress) -> bool {
    config.read8(address, offset::HEADER_TYPE) & !MULTIFUNCTION == BRIDGE_HEADER
}

/// Whether a function is there.
pub(super) fn is_present(config: &impl ConfigSpace, address: PciAddress) -> bool {
    !ABSENT.contains(&config.read16(address, offset::VENDOR))
}

fn read_function(config: &impl ConfigSpace, address: PciAddress) -> Function {
    let [revision, interface, sub, base] = config.read32(address, offset::REVISION).to_le_bytes();
    let header = match config.read8(address, offset::HEADER_TYPE) & !MULTIFUNCTION {
        0 => HeaderType::Endpoint,
        BRIDGE_HEADER => HeaderType::PciPciBridge,
        2 => HeaderType::CardBusBridge,
        other => HeaderType::Unknown(other),
    };
    let bar_count = match header {
        HeaderType::Endpoint => ENDPOINT_BARS,
        HeaderType::PciPciBridge => BRIDGE_BARS,
        _ => 0,
    };
    let subsystem = (header == HeaderType::Endpoint)
        .then(|| (config.read16(address, offset::SUBSYSTEM), config.read16(address, offset::SUBSYSTEM + 2)));
    Function {
        address,
        vendor: config.read16(address, offset::VENDOR),
        device: config.read16(address, offset::DEVICE),
        revision,
        class: Class { base, sub, interface },
        header,
        subsystem,
        bridge: (header == HeaderType::PciPciBridge).then(|| read_bridge(config, address)),
        bars: bar::read_all(config, address, bar_count),
    }
}

/// Reads what a bridge passes on.
pub(super) fn read_bridge(config: &impl ConfigSpace, address: PciAddress) -> Bridge {
    let upper = |offset| u64::from(config.read32(address, offset)) << 32;
    // The lowest digit of the prefetchable base says whether the upper halves are there.
    let wide = config.read16(address, offset::PREFETCH_BASE) & 0xf == 1;
    let (upper_base, upper_limit) =
        if wide { (upper(offset::PREFETCH_BASE_UPPER), upper(offset::PREFETCH_LIMIT_UPPER)) } else { (0, 0) };
    Bridge {
        secondary_bus: config.read8(address, offset::SECONDARY_BUS),
        subordinate_bus: config.read8(address, offset::SUBORDINATE_BUS),
        memory: read_window(config, address, offset::MEMORY_BASE, 0, 0),
        prefetchable: read_window(config, address, offset::PREFETCH_BASE, upper_base, upper_limit),
    }
}

/// A window of a bridge, in units of 1 MiB; `None` when it is closed. One at address 0 was never opened.
fn read_window(
    config: &impl ConfigSpace,
    address: PciAddress,
    base_offset: u16,
    upper_base: u64,
    upper_limit: u64,
) -> Option<PhysRange> {
    let megabytes = |offset| u64::from(config.read16(address, offset) & 0xfff0) << 16;
    let base = upper_base | megabytes(base_offset);
    let limit = upper_limit | megabytes(base_offset + 2) | 0xf_ffff;
    PhysRange::new(base, limit).filter(|range| range.start() != 0)
}
