//! The device tree of a machine whose IOMMU is on virtio over MMIO.
//!
//! QEMU's own tree has a plain `virtio,mmio` node in such a machine, and says nothing of what the IOMMU stands in front of.
//! So QEMU starts once to write its tree to a file, the tree gets what is missing, and QEMU boots with that:
//!
//! ```text
//! virtio_mmio@a000000 { compatible = "virtio,mmio"; #iommu-cells = <1>; phandle = <P>; ... }
//! pcie@10000000 { iommu-map = <0 P 0 0x10000>; ... }
//! ```

use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use dtoolkit::Node as _;
use dtoolkit::fdt::Fdt;
use dtoolkit::model::{DeviceTree, DeviceTreeNode, DeviceTreeProperty};
use dtoolkit::standard::NodeStandard as _;

use crate::machine::{Gdb, Machine};
use crate::process;
use crate::qemu::Qemu;

/// How long QEMU may take to write its tree.
const DEADLINE: Duration = Duration::from_secs(20);
/// Deeper trees are not believed.
const DEPTH: usize = 16;

/// An IOMMU, and what it stands in front of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    /// The number of its slot for virtio over MMIO.
    pub(crate) slot: usize,
    /// The PCI functions, by their requester IDs, which are their endpoints too.
    pub(crate) functions: RangeInclusive<u16>,
}

/// Lets `qemu` write the tree of `machine`, adds the claims of its IOMMUs, and returns the file in `directory`.
///
/// # Errors
///
/// When QEMU writes no tree, or one that lacks a slot or a PCI host.
pub(crate) fn describe(qemu: &Qemu, machine: &Machine, directory: &Path) -> Result<PathBuf> {
    let own = directory.join("qemu.dtb");
    let patched = directory.join("patched.dtb");
    if own.exists() {
        fs::remove_file(&own).with_context(|| format!("cannot replace {}", own.display()))?;
    }
    let bare = Machine { trace: None, gdb: Gdb::Off, ..machine.clone() };
    let mut dump = Command::new(&qemu.path);
    dump.args(bare.arguments()).arg("-machine").arg(format!("dumpdtb={}", own.display()));
    let output = process::capture(&mut dump, DEADLINE).context("QEMU was to write its device tree")?;
    let bytes = fs::read(&own).map_err(|_| {
        let said = String::from_utf8_lossy(&output.stderr);
        anyhow!("QEMU did not write its device tree: {}", said.lines().next().unwrap_or("it said nothing"))
    })?;
    let tree =
        patch(&bytes, &machine.iommu.claims(machine.arch)).context("in the device tree that QEMU wrote")?;
    fs::write(&patched, tree).with_context(|| format!("cannot write {}", patched.display()))?;
    Ok(patched)
}

/// Adds the claims to a tree.
fn patch(bytes: &[u8], claims: &[Claim]) -> Result<Vec<u8>> {
    let fdt = Fdt::new(without_padding(bytes)).map_err(|error| anyhow!("{error}"))?;
    let mut tree = DeviceTree::from_fdt(&fdt);
    let mut slots = Vec::new();
    let mut hosts = Vec::new();
    let mut phandle = 0;
    let mut visit = |path: &[String], node: &DeviceTreeNode| {
        phandle = phandle.max(node.phandle().ok().flatten().unwrap_or(0));
        if node.is_compatible("virtio,mmio") {
            slots.push((unit_address(node.name()), path.to_vec()));
        } else if node.is_compatible("pci-host-ecam-generic") {
            hosts.push(path.to_vec());
        }
    };
    walk(&tree.root, &mut Vec::new(), &mut visit)?;
    slots.sort();
    let [host] = hosts.as_slice() else { bail!("it has {} PCI hosts instead of one", hosts.len()) };
    let mut map = Vec::new();
    for claim in claims {
        let slot = slots.get(claim.slot);
        let (_, path) = slot.with_context(|| format!("it has {} slots for virtio over MMIO", slots.len()))?;
        phandle =
            phandle.checked_add(1).filter(|next| *next != u32::MAX).context("it has no phandle left")?;
        let (first, last) = (u32::from(*claim.functions.start()), u32::from(*claim.functions.end()));
        map.extend([first, phandle, first, last - first + 1]);
        let node = at(&mut tree.root, path)?;
        set(node, "#iommu-cells", &[1])?;
        set(node, "phandle", &[phandle])?;
    }
    set(at(&mut tree.root, host)?, "iommu-map", &map)?;
    Ok(tree.to_dtb())
}

/// The tree alone: some versions of QEMU write all of the buffer that the tree is in.
fn without_padding(bytes: &[u8]) -> &[u8] {
    let total = bytes.get(4..8).and_then(|total| total.try_into().ok()).map_or(0, u32::from_be_bytes);
    bytes.get(..total as usize).unwrap_or(bytes)
}

/// Calls `visit` for each node with its path.
fn walk(
    node: &DeviceTreeNode,
    path: &mut Vec<String>,
    visit: &mut dyn FnMut(&[String], &DeviceTreeNode),
) -> Result<()> {
    ensure!(path.len() < DEPTH, "it is deeper than {DEPTH} nodes");
    visit(path, node);
    for child in node.children() {
        path.push(child.name().to_owned());
        walk(child, path, visit)?;
        path.pop();
    }
    Ok(())
}

/// The node at `path`.
fn at<'t>(root: &'t mut DeviceTreeNode, path: &[String]) -> Result<&'t mut DeviceTreeNode> {
    let mut node = root;
    for name in path {
        node = node.child_mut(name).with_context(|| format!("it lost its node {name}"))?;
    }
    Ok(node)
}

/// Sets a property to these cells.
fn set(node: &mut DeviceTreeNode, name: &str, cells: &[u32]) -> Result<()> {
    let bytes: Vec<u8> = cells.iter().flat_map(|cell| cell.to_be_bytes()).collect();
    let property = DeviceTreeProperty::new(name, bytes).map_err(|error| anyhow!("{name}: {error}"))?;
    node.add_property(property);
    Ok(())
}

/// The number in `NAME@NUMBER`; nodes without come first.
fn unit_address(name: &str) -> u64 {
    let digits = name.split_once('@').map_or("", |(_, digits)| digits);
    u64::from_str_radix(digits, 16).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use dtoolkit::Property as _;

    use super::*;

    /// A tree like that of QEMU's machines: slots in any order, one PCI host.
    fn tree(soc: bool) -> DeviceTree {
        let node = |name: &str, compatible: &str, phandle: Option<u32>| {
            let mut node = DeviceTreeNode::new(name).unwrap();
            node.add_property(DeviceTreeProperty::new("compatible", compatible).unwrap());
            if let Some(phandle) = phandle {
                set(&mut node, "phandle", &[phandle]).unwrap();
            }
            node
        };
        let mut nodes = DeviceTreeNode::new("soc").unwrap();
        for name in ["virtio_mmio@a000200", "virtio_mmio@a000000", "virtio_mmio@10000000"] {
            nodes.add_child(node(name, "virtio,mmio", None));
        }
        nodes.add_child(node("pcie@10000000", "pci-host-ecam-generic", None));
        nodes.add_child(node("intc@8000000", "arm,gic-v3", Some(0x8002)));
        let mut tree = DeviceTree::new();
        if soc {
            tree.root.add_child(nodes);
        } else {
            tree.root = DeviceTreeNode::new("").unwrap();
            for child in nodes.children() {
                tree.root.add_child(child.clone());
            }
        }
        tree
    }

    fn all() -> Vec<Claim> {
        vec![Claim { slot: 0, functions: 0..=0xffff }]
    }

    fn cells(tree: &DeviceTree, path: &str, name: &str) -> Vec<u32> {
        let node = tree.find_node(path).unwrap();
        let property = node.property(name).unwrap();
        property.value().chunks(4).map(|cell| u32::from_be_bytes(cell.try_into().unwrap())).collect()
    }

    fn patched(tree: &DeviceTree, claims: &[Claim]) -> DeviceTree {
        let bytes = patch(&tree.to_dtb(), claims).unwrap();
        DeviceTree::from_fdt(&Fdt::new(&bytes).unwrap())
    }

    #[test]
    fn the_lowest_slot_gets_all_of_pci() {
        for (soc, root) in [(false, ""), (true, "/soc")] {
            let patched = patched(&tree(soc), &all());
            let slot = format!("{root}/virtio_mmio@a000000");
            assert_eq!(cells(&patched, &slot, "#iommu-cells"), [1]);
            assert_eq!(cells(&patched, &slot, "phandle"), [0x8003]);
            let host = format!("{root}/pcie@10000000");
            assert_eq!(cells(&patched, &host, "iommu-map"), [0, 0x8003, 0, 0x1_0000]);
        }
    }

    #[test]
    fn what_was_there_stays() {
        let before = tree(true);
        let mut after = patched(&before, &all());
        let path = ["soc".to_owned(), "virtio_mmio@a000000".to_owned()];
        let slot = at(&mut after.root, &path).unwrap();
        slot.remove_property("#iommu-cells").unwrap();
        slot.remove_property("phandle").unwrap();
        at(&mut after.root, &["soc".to_owned(), "pcie@10000000".to_owned()])
            .unwrap()
            .remove_property("iommu-map")
            .unwrap();
        assert_eq!(after, before);
    }

    #[test]
    fn padding_after_the_tree_is_dropped() {
        let mut bytes = tree(true).to_dtb();
        bytes.resize(bytes.len() + 4096, 0);
        assert!(patch(&bytes, &all()).is_ok());
    }

    #[test]
    fn two_iommus_share_the_functions() {
        let claims = [Claim { slot: 0, functions: 0..=0xfff }, Claim { slot: 1, functions: 0x1000..=0xffff }];
        let patched = patched(&tree(false), &claims);
        assert_eq!(cells(&patched, "/virtio_mmio@a000200", "phandle"), [0x8004]);
        let map = [0, 0x8003, 0, 0x1000, 0x1000, 0x8004, 0x1000, 0xf000];
        assert_eq!(cells(&patched, "/pcie@10000000", "iommu-map"), map);
    }

    #[test]
    fn a_tree_that_lacks_something_is_refused() {
        let error =
            |tree: &DeviceTree, claims: &[Claim]| format!("{:#}", patch(&tree.to_dtb(), claims).unwrap_err());
        let mut no_host = tree(false);
        no_host.root.remove_child("pcie@10000000");
        assert!(error(&no_host, &all()).contains("0 PCI hosts"));
        let fourth = [Claim { slot: 3, functions: 0..=0 }];
        assert!(error(&tree(false), &fourth).contains("3 slots"));
        assert!(patch(b"no tree", &all()).is_err());
        let mut full = tree(false);
        set(&mut full.root, "phandle", &[u32::MAX - 1]).unwrap();
        assert!(error(&full, &all()).contains("phandle"));
    }
}
