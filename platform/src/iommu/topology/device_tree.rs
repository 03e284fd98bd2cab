//! By the device tree: `iommu-map` of each PCI host bridge, and the nodes that it names.

use alloc::format;
use alloc::string::ToString;
use alloc::vec::Vec;

use virtio_iommu::topology::fdt::{IommuMap, Phandle};
use virtio_iommu::transport::pci::{DEVICE_ID, VENDOR_ID};

use super::{Place, Source, Topology};
use crate::firmware::device_tree::pci::HostBridge;
use crate::firmware::device_tree::{DeviceTree, Node};
use crate::iommu::BringUpError;
use crate::pci::config::ConfigSpace;
use crate::pci::function::Function;
use crate::pci::{Pci, PciAddress};

const PCI_COMPATIBLE: &str = "virtio,pci-iommu";
const MMIO_COMPATIBLE: &str = "virtio,mmio";
const MAP: &str = "iommu-map";
const MASK: &str = "iommu-map-mask";

/// Reads the tree.
///
/// # Errors
///
/// [`BringUpError::NoDevice`], [`BringUpError::NoTopology`], [`BringUpError::DeviceTree`] or
/// [`BringUpError::NotThere`].
pub(super) fn read<C: ConfigSpace>(
    pci: &Pci<C>,
    tree: &DeviceTree<'_>,
    bridges: &[HostBridge<'_>],
) -> Result<Vec<Topology>, BringUpError> {
    let mut found: Vec<(Phandle, Topology)> = Vec::new();
    for bridge in bridges {
        let Some(bytes) = bridge.node.bytes(MAP) else { continue };
        let map = IommuMap::new(bytes, bridge.node.bytes(MASK));
        let map = map.map_err(|error| {
            BringUpError::DeviceTree(bridge.node.wrong(MAP, format!("is broken: {error}")))
        })?;
        let inside = |function: &&Function| function.address.segment() == bridge.area.segment;
        for function in pci.functions().iter().filter(inside) {
            let Some((iommu, id)) = map.endpoint_of(pci.requester(function.address).into()) else { continue };
            let at = match found.iter().position(|(phandle, _)| *phandle == iommu) {
                Some(at) => at,
                None => {
                    let place = place(pci, tree, bridges, &bridge.node, iommu)?;
                    let topology =
                        Topology { source: Source::DeviceTree, place, own: None, behind: Vec::new() };
                    found.push((iommu, topology));
                    found.len() - 1
                }
            };
            let topology = &mut found[at].1;
            if topology.place == Place::Pci(function.address) {
                topology.own = Some(id);
            } else {
                topology.behind.push((function.address, id));
            }
        }
    }
    if found.is_empty() {
        let device = pci.with_id(VENDOR_ID, DEVICE_ID).next().ok_or(BringUpError::NoDevice)?;
        let reason = format!("no {MAP} has a function of this machine");
        let place = Place::Pci(device.address);
        return Err(BringUpError::NoTopology { place, source: Source::DeviceTree, reason });
    }
    Ok(found.into_iter().map(|(_, topology)| topology).collect())
}

/// Where the IOMMU is that a map names.
fn place<C: ConfigSpace>(
    pci: &Pci<C>,
    tree: &DeviceTree<'_>,
    bridges: &[HostBridge<'_>],
    naming: &Node<'_>,
    phandle: Phandle,
) -> Result<Place, BringUpError> {
    let wrong = |reason| BringUpError::DeviceTree(naming.wrong(MAP, reason));
    let node =
        tree.by_phandle(phandle.get()).ok_or_else(|| wrong(format!("names {phandle}, which no node has")))?;
    if node.is_compatible(MMIO_COMPATIBLE) {
        let registers = node.registers().map_err(BringUpError::DeviceTree)?;
        let first =
            registers.first().ok_or_else(|| BringUpError::DeviceTree(node.wrong("reg", "is empty")))?;
        return Ok(Place::Mmio(first.start()));
    }
    if !node.is_compatible(PCI_COMPATIBLE) {
        return Err(wrong(format!("names {}, which is no virtio-iommu", node.name())));
    }
    let address = pci_address(&node, bridges).ok_or_else(|| {
        BringUpError::DeviceTree(node.wrong("reg", "is no function of a PCI host bridge".to_string()))
    })?;
    let is_one = |function: &&Function| (function.vendor, function.device) == (VENDOR_ID, DEVICE_ID);
    pci.at(address).filter(is_one).ok_or(BringUpError::NotThere { place: Place::Pci(address) })?;
    Ok(Place::Pci(address))
}

/// The function of a node below a host bridge: the first cell of its `reg` holds bus, device and function from bit 8 on.
fn pci_address(node: &Node<'_>, bridges: &[HostBridge<'_>]) -> Option<PciAddress> {
    let above = node.parent()?;
    let bridge = bridges.iter().find(|bridge| bridge.node.is(&above))?;
    let [_, bus, device_function, _] = node.cells("reg")?.first()?.to_be_bytes();
    Some(PciAddress::new(bridge.area.segment, bus, device_function >> 3, device_function & 7))
}
