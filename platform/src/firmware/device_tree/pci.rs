//! PCI host bridges in the device tree: where configuration space is, and which addresses reach the bus.
//!
//! ```text
//! reg               configuration space, from the first bus of bus-range on
//! bus-range         first and last bus; all that configuration space has room for where it is absent
//! linux,pci-domain  the segment; bridges are counted where it is absent
//! ranges            3 cells of PCI address (the first says which space), the CPU's address, 2 cells of length
//! ```
//! (binding *pci-host-ecam-generic*)

use alloc::format;
use alloc::vec::Vec;

use super::{DeviceTree, DeviceTreeError, Node};
use crate::pci::ecam::{BUS_BYTES, EcamArea};
use crate::range::PhysRange;

/// What the kernel can drive.
pub const COMPATIBLE: &str = "pci-host-ecam-generic";
/// The most bridges that are taken; each is a segment.
const MAX_BRIDGES: usize = 16;
/// The most entries of `ranges` that are looked at.
const MAX_RANGES: usize = 64;

/// Bits of the first cell of a PCI address: which space it is in.
const SPACE: u32 = 0x0300_0000;
const SPACE_MEMORY_32: u32 = 0x0200_0000;
const SPACE_MEMORY_64: u32 = 0x0300_0000;

/// A host bridge.
#[derive(Clone, Debug)]
pub struct HostBridge<'m> {
    /// Its node, which says what its functions are behind, and where their interrupts go.
    pub node: Node<'m>,
    /// Its configuration space.
    pub area: EcamArea,
    /// The memory that it passes on to its bus, at the same addresses there.
    pub windows: Vec<PhysRange>,
}

/// The host bridges, in the tree's order.
///
/// # Errors
///
/// [`DeviceTreeError::Absent`] when there is none, [`DeviceTreeError::Property`] when one cannot be understood.
pub fn host_bridges<'m>(tree: &DeviceTree<'m>) -> Result<Vec<HostBridge<'m>>, DeviceTreeError> {
    let nodes = tree.compatible(COMPATIBLE).take(MAX_BRIDGES).enumerate();
    let bridges = nodes.map(|(index, node)| read(node, index)).collect::<Result<Vec<_>, _>>()?;
    if bridges.is_empty() {
        return Err(DeviceTreeError::Absent { compatible: COMPATIBLE });
    }
    Ok(bridges)
}

fn read(node: Node<'_>, index: usize) -> Result<HostBridge<'_>, DeviceTreeError> {
    let registers = node.registers()?;
    let space = *registers.first().ok_or_else(|| node.wrong("reg", "names no configuration space"))?;
    let room = space.len_bytes() / BUS_BYTES;
    if room == 0 {
        return Err(node.wrong("reg", format!("has no room for a bus in {space}")));
    }
    let (first, last) = match node.cells("bus-range").as_deref() {
        None => (0, u32::try_from(room - 1).unwrap_or(u32::MAX).min(0xff)),
        Some([first, last]) => (*first, *last),
        Some(cells) => return Err(node.wrong("bus-range", format!("has {} cells instead of 2", cells.len()))),
    };
    let bad_buses =
        || node.wrong("bus-range", format!("is {first:#x}..={last:#x}, and {space} has room for {room:#x}"));
    let first_bus = u8::try_from(first).map_err(|_| bad_buses())?;
    let last_bus = u8::try_from(last).map_err(|_| bad_buses())?;
    let count = u64::from(last_bus.checked_sub(first_bus).ok_or_else(bad_buses)?) + 1;
    let range = PhysRange::from_len(space.start(), count * BUS_BYTES).filter(|range| space.contains(*range));
    let segment = node.cell("linux,pci-domain").unwrap_or(index as u32);
    let area = EcamArea {
        segment: u16::try_from(segment)
            .map_err(|_| node.wrong("linux,pci-domain", format!("is {segment:#x}, more than 16 bits")))?,
        first_bus,
        last_bus,
        range: range.ok_or_else(bad_buses)?,
    };
    let windows = windows(&node)?;
    Ok(HostBridge { node, area, windows })
}

/// The memory entries of `ranges`.
fn windows(node: &Node<'_>) -> Result<Vec<PhysRange>, DeviceTreeError> {
    let Some(cells) = node.cells("ranges") else {
        return Err(node.wrong("ranges", "is absent or not made of cells"));
    };
    let parent_cells = node.parent().and_then(|parent| parent.cell("#address-cells")).unwrap_or(2);
    let parent_cells = match parent_cells {
        count @ (1 | 2) => count as usize,
        count => return Err(node.wrong("ranges", format!("is on a bus with addresses of {count} cells"))),
    };
    let entry_cells = 3 + parent_cells + 2;
    if !cells.len().is_multiple_of(entry_cells) {
        return Err(
            node.wrong("ranges", format!("has {} cells, which are no entries of {entry_cells}", cells.len()))
        );
    }
    let number = |cells: &[u32]| cells.iter().fold(0, |value: u64, cell| value << 32 | u64::from(*cell));
    let mut windows = Vec::new();
    for entry in cells.chunks_exact(entry_cells).take(MAX_RANGES) {
        let (bus, rest) = entry.split_at(3);
        let (cpu, len_bytes) = rest.split_at(parent_cells);
        if !matches!(bus[0] & SPACE, SPACE_MEMORY_32 | SPACE_MEMORY_64) {
            continue;
        }
        let Some(on_bus) = PhysRange::from_len(number(&bus[1..]), number(len_bytes)) else { continue };
        let cpu =
            PhysRange::from_len(number(cpu), on_bus.len_bytes()).and_then(|range| node.to_physical(range));
        // Where the two differ, BARs would hold other addresses than the CPU uses, which the kernel does not do.
        match cpu {
            Some(cpu) if cpu == on_bus => windows.push(cpu),
            _ => log::warn!(
                "{}: PCI memory {on_bus} has another address for the CPU, and is not used",
                node.name()
            ),
        }
    }
    Ok(windows)
}
