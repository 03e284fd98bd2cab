//! The three ways over made-up machines.

use alloc::string::String;
use alloc::vec::Vec;

use virtio_iommu::EndpointId;
use virtio_iommu::transport::pci::{DEVICE_ID, VENDOR_ID};

use super::{Place, Source, Topology, device_tree, table, viot};
use crate::firmware::device_tree::pci::host_bridges;
use crate::firmware::device_tree::tests::{Writer, with_tree};
use crate::iommu::BringUpError;
use crate::pci::fake::{FakeFunction, FakeSpace};
use crate::pci::{Pci, PciAddress};

fn at(bus: u8, device: u8) -> PciAddress {
    PciAddress::new(0, bus, device, 0)
}

fn id(number: u32) -> EndpointId {
    EndpointId::new(number)
}

/// An IOMMU at 00:01.0, an endpoint at 00:02.0, one at 10:00.0 below another root.
fn machine() -> Pci<FakeSpace> {
    Pci::scan(FakeSpace::new([
        (at(0, 1), FakeFunction::endpoint(VENDOR_ID, DEVICE_ID)),
        (at(0, 2), FakeFunction::endpoint(1, 1)),
        (at(16, 0), FakeFunction::endpoint(1, 2)),
    ]))
}

/// A tree with one host bridge whose `iommu-map` is this, an IOMMU on virtio-mmio with phandle 5, and one on PCI with
/// phandle 6 at `function`.
fn tree(map: &[u32], function: u32) -> Vec<u8> {
    let root = Writer::default().begin("").cells("#address-cells", &[2]).cells("#size-cells", &[2]);
    let mmio = root
        .begin("virtio_mmio@10001000")
        .text("compatible", "virtio,mmio")
        .cells("reg", &[0, 0x1000_1000, 0, 0x1000])
        .cells("#iommu-cells", &[1])
        .cells("phandle", &[5])
        .end();
    let bridge = mmio
        .begin("pcie@30000000")
        .text("compatible", "pci-host-ecam-generic")
        .cells("reg", &[0, 0x3000_0000, 0, 0x1000_0000])
        .cells("#address-cells", &[3])
        .cells("#size-cells", &[2])
        .bytes("ranges", &[])
        .cells("iommu-map", map);
    let iommu = bridge
        .begin("virtio_iommu@1,0")
        .text("compatible", "virtio,pci-iommu")
        .cells("reg", &[function << 8, 0, 0, 0, 0])
        .cells("#iommu-cells", &[1])
        .cells("phandle", &[6])
        .end();
    iommu.end().begin("stranger").cells("phandle", &[7]).end().end().finish()
}

fn by_tree(map: &[u32], function: u32) -> Result<Vec<Topology>, BringUpError> {
    with_tree(&tree(map, function), |tree| {
        device_tree::read(&machine(), tree, &host_bridges(tree).expect("a good bridge"))
    })
}

#[test]
fn an_iommu_on_pci_is_found_by_the_tree() {
    let found = by_tree(&[0, 6, 0, 8, 9, 6, 9, 0xfff7], 8).expect("a good tree");
    let expected = Topology {
        source: Source::DeviceTree,
        place: Place::Pci(at(0, 1)),
        own: None,
        behind: alloc::vec![(at(0, 2), id(0x10)), (at(16, 0), id(0x1000))],
    };
    assert_eq!(found, core::slice::from_ref(&expected));
    let with_itself = by_tree(&[0, 6, 0, 0x1_0000], 8).expect("a good tree");
    assert_eq!(with_itself, [Topology { own: Some(id(8)), ..expected }]);
}

#[test]
fn two_iommus_share_a_bridge() {
    let found = by_tree(&[0, 5, 0x100, 0x1000, 0x1000, 6, 0, 0x100], 8).expect("a good tree");
    let [mmio, pci] = &found[..] else { panic!("{found:?}") };
    assert_eq!(mmio.place, Place::Mmio(0x1000_1000));
    assert_eq!(mmio.behind, [(at(0, 1), id(0x108)), (at(0, 2), id(0x110))]);
    assert_eq!((pci.place, &pci.behind[..]), (Place::Pci(at(0, 1)), &[(at(16, 0), id(0))][..]));
}

#[test]
fn trees_that_name_no_iommu_are_refused() {
    let property = |map: &[u32], function| match by_tree(map, function) {
        Err(BringUpError::DeviceTree(error)) => alloc::format!("{error}"),
        other => panic!("{other:?}"),
    };
    assert!(property(&[0, 6, 0], 8).contains("iommu-map"), "cut short");
    assert!(property(&[0, 9, 0, 0x1_0000], 8).contains("phandle 0x9"), "a phandle of nobody");
    assert!(property(&[0, 7, 0, 0x1_0000], 8).contains("stranger"), "another kind of node");
    let nobody = by_tree(&[0x8000, 6, 0, 1], 8);
    assert!(matches!(nobody, Err(BringUpError::NoTopology { source: Source::DeviceTree, .. })), "{nobody:?}");
    // The node names a function that is no IOMMU, and one that is not there.
    for function in [0x10, 0x18] {
        let error = by_tree(&[0, 6, 0, 0x1_0000], function);
        assert!(matches!(error, Err(BringUpError::NotThere { .. })), "{error:?}");
    }
}

#[test]
fn the_command_line_names_one_for_everything() {
    let pci = table::read(&machine(), "pci:00:01.0").expect("there");
    assert_eq!((pci.place, pci.own), (Place::Pci(at(0, 1)), Some(id(8))));
    assert_eq!(pci.behind, [(at(0, 2), id(0x10)), (at(16, 0), id(0x1000))]);
    let mmio = table::read(&machine(), "mmio:0x10001000").expect("anywhere");
    assert_eq!((mmio.place, mmio.own, mmio.behind.len()), (Place::Mmio(0x1000_1000), None, 3));
    assert_eq!(
        table::read(&machine(), "pci:00:02.0"),
        Err(BringUpError::NotThere { place: Place::Pci(at(0, 2)) })
    );
    assert_eq!(table::read(&machine(), "isa:1"), Err(BringUpError::Word { word: String::from("isa:1") }));
}

/// A VIOT with an IOMMU on PCI, one in memory, and a range of PCI functions behind each.
fn viot_table(iommu: u16) -> Vec<u8> {
    let mut table = b"VIOT".to_vec();
    table.resize(36, 0);
    table.extend([4, 0, 48, 0]);
    table.resize(48, 0);
    // Both IOMMUs, at 48 and 64: PCI segment and function; an address.
    table.extend([3, 0, 16, 0, 0, 0]);
    table.extend(iommu.to_le_bytes());
    table.resize(64, 0);
    table.extend([4, 0, 16, 0, 0, 0, 0, 0]);
    table.extend(0x1000_1000u64.to_le_bytes());
    // Ranges: first endpoint, segments, first and last function, the IOMMU's node.
    for (endpoint, first, last, node) in [(0u32, 0u16, 0xfffu16, 48u16), (0x7000, 0x1000, 0x1fff, 64)] {
        table.extend([1, 0, 24, 0]);
        table.extend(endpoint.to_le_bytes());
        table.extend([0; 4]);
        table.extend(first.to_le_bytes());
        table.extend(last.to_le_bytes());
        table.extend(node.to_le_bytes());
        table.resize(table.len() + 6, 0);
    }
    let len = table.len() as u32;
    table[4..8].copy_from_slice(&len.to_le_bytes());
    table[9] = table.iter().fold(0, |sum: u8, byte| sum.wrapping_sub(*byte));
    table
}

#[test]
fn viot_names_several() {
    let found = viot::read(&machine(), Ok(&viot_table(8))).expect("a good table");
    let [pci, mmio] = &found[..] else { panic!("{found:?}") };
    assert_eq!((pci.place, pci.own), (Place::Pci(at(0, 1)), Some(id(8))));
    assert_eq!(pci.behind, [(at(0, 2), id(0x10))]);
    assert_eq!((mmio.place, &mmio.behind[..]), (Place::Mmio(0x1000_1000), &[(at(16, 0), id(0x7000))][..]));
    let elsewhere = viot::read(&machine(), Ok(&viot_table(0x10)));
    assert!(matches!(elsewhere, Err(BringUpError::WrongPlace { .. })), "{elsewhere:?}");
    let absent = viot::read(&machine(), Err(String::from("absent")));
    assert!(matches!(absent, Err(BringUpError::NoTopology { source: Source::Viot, .. })), "{absent:?}");
    let none = Pci::scan(FakeSpace::new([]));
    assert_eq!(viot::read(&none, Err(String::from("absent"))), Err(BringUpError::NoDevice));
}
