//! What a device tree says at boot: RAM, what of it is taken, the command line.

use alloc::vec::Vec;

use super::{DeviceTree, DeviceTreeError, Node};
use crate::boot::BootInfo;
use crate::command_line::CommandLine;
use crate::memory::map::{MemoryMap, Region, RegionKind};
use crate::memory::physical::PhysicalMemory;
use crate::range::PhysRange;

/// The most regions of a memory map that are read.
const MAX_REGIONS: usize = 1024;

/// Reads the tree at `phys`.
///
/// # Errors
///
/// [`DeviceTreeError`]. A command line or a first disk that is not as it should be is none: it counts as absent.
pub fn read(memory: &impl PhysicalMemory, phys: u64) -> Result<BootInfo, DeviceTreeError> {
    let tree = DeviceTree::read(memory, phys)?;
    let chosen = tree.at(&["chosen"]);
    let command_line = chosen.as_ref().and_then(|node| node.text("bootargs")).unwrap_or("");
    let modules = chosen.as_ref().and_then(first_disk);
    Ok(BootInfo {
        command_line: CommandLine::from_bytes(command_line.as_bytes()),
        memory_map: memory_map(&tree)?,
        rsdp: None,
        device_tree: tree.range(phys),
        modules: modules.into_iter().collect(),
    })
}

/// The node of the serial port that the tree names as the console's: `stdout-path`, a path or an alias, before a colon.
pub fn console<'m>(tree: &DeviceTree<'m>) -> Option<Node<'m>> {
    let path = tree.at(&["chosen"])?.text("stdout-path")?.split(':').next()?;
    let path = if path.starts_with('/') { path } else { tree.at(&["aliases"])?.text(path)? };
    let root = tree.nodes().next()?;
    let names = path.split('/').filter(|name| !name.is_empty());
    names.into_iter().try_fold(root, |node, name| {
        let child = node.children().find(|child| child.name() == name);
        child.or_else(|| node.child(name))
    })
}

fn memory_map(tree: &DeviceTree<'_>) -> Result<MemoryMap, DeviceTreeError> {
    let mut regions = Vec::new();
    for node in tree.nodes().filter(|node| node.text("device_type") == Some("memory") && node.is_in_use()) {
        let ranges = node.registers()?;
        regions.extend(ranges.into_iter().map(|range| Region { range, kind: RegionKind::Ram }));
    }
    let reserved = |range| Region { range, kind: RegionKind::Reserved };
    regions.extend(tree.reservations().take(MAX_REGIONS).map(reserved));
    for node in tree.at(&["reserved-memory"]).iter().flat_map(Node::children) {
        // One without `reg` is a wish for memory somewhere, and the kernel has nobody to grant it to.
        regions.extend(node.registers()?.into_iter().map(reserved));
    }
    // Those that reserve come last: of a list that is too long no RAM is taken that somebody claims.
    let surplus = regions.len().saturating_sub(MAX_REGIONS);
    let map = MemoryMap::new(regions.split_off(surplus));
    if map.ram().iter().next().is_none() {
        return Err(DeviceTreeError::NoMemory);
    }
    Ok(map)
}

/// Where the loader put a first disk: cells of 32 or 64 bits, the end after the last byte.
fn first_disk(chosen: &Node<'_>) -> Option<PhysRange> {
    let number = |property| match *chosen.cells(property)? {
        [low] => Some(u64::from(low)),
        [high, low] => Some(u64::from(high) << 32 | u64::from(low)),
        _ => None,
    };
    let (start, end) = (number("linux,initrd-start")?, number("linux,initrd-end")?);
    PhysRange::new(start, end.checked_sub(1)?)
}
