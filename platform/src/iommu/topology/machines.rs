//! Machines as other VMMs make them, from the boot loader's word to what is behind the IOMMU: generated tables and
//! configuration spaces, after what was seen on cloud-hypervisor 54 and on crosvm.

use alloc::vec::Vec;

use virtio_iommu::EndpointId;
use virtio_iommu::transport::pci::{DEVICE_ID, VENDOR_ID};

use super::{Place, Topology, viot};
use crate::acpi::tests::{pointers64, root_pointer, table};
use crate::acpi::{Signature, Tables, mcfg};
use crate::boot::BootInfo;
use crate::firmware::{start_info, zero_page};
use crate::memory::physical::Image;
use crate::pci::assign::HostWindow;
use crate::pci::config::{BusRange, ConfigSpace, offset};
use crate::pci::fake::{FakeFunction, FakeSpace};
use crate::pci::function::MemoryDecode;
use crate::pci::{Pci, PciAddress};
use crate::range::PhysRange;

/// The highest address of a CPU with 40 bits.
const HIGHEST: u64 = (1 << 40) - 1;

fn at(device: u8) -> PciAddress {
    PciAddress::new(0, 0, device, 0)
}

/// Root pointer of revision 2 at `rsdp`, and tables at these places.
fn put_tables(image: &mut Image, rsdp: u64, tables: &[(u64, Vec<u8>)]) {
    let xsdt = tables[0].0 - 0x1000;
    let places: Vec<u64> = tables.iter().map(|(place, _)| *place).collect();
    image.put(rsdp, &root_pointer(2, 0, xsdt));
    image.put(xsdt, &table(b"XSDT", &pointers64(&places)));
    tables.iter().for_each(|(place, bytes)| image.put(*place, bytes));
}

fn mcfg_table(base: u64, last_bus: u8) -> Vec<u8> {
    let mut body = alloc::vec![0; 8];
    body.extend(base.to_le_bytes());
    body.extend([0, 0, 0, last_bus, 0, 0, 0, 0]);
    table(b"MCFG", &body)
}

/// An IOMMU on PCI, and a range of one function for each endpoint: number and function.
fn viot_table(iommu: u16, endpoints: &[(u32, u16)]) -> Vec<u8> {
    let count = 1 + endpoints.len() as u16;
    let mut body = Vec::new();
    body.extend(count.to_le_bytes());
    body.extend([48, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    body.extend([3, 0, 16, 0, 0, 0]);
    body.extend(iommu.to_le_bytes());
    body.extend([0; 8]);
    for (id, function) in endpoints {
        body.extend([1, 0, 24, 0]);
        body.extend(id.to_le_bytes());
        body.extend([0; 4]);
        body.extend(function.to_le_bytes());
        body.extend(function.to_le_bytes());
        body.extend([48, 0, 0, 0, 0, 0, 0, 0]);
    }
    table(b"VIOT", &body)
}

/// All of discovery but the registers, and that it changed no address that was there.
fn discover(
    image: &Image,
    info: &BootInfo,
    functions: Vec<(PciAddress, FakeFunction)>,
) -> (Pci<FakeSpace>, Topology) {
    let tables = Tables::find_all(image, info.rsdp).expect("a good image");
    let areas = tables.find(mcfg::SIGNATURE).and_then(mcfg::parse).expect("a good MCFG");
    let buses: Vec<_> = areas
        .iter()
        .map(|area| BusRange { segment: area.segment, first: area.first_bus, last: area.last_bus })
        .collect();
    let mut pci = Pci::scan(FakeSpace::with_buses(functions, &buses));
    let before = addresses(&pci);
    let window = HostWindow::new(&info.memory_map, areas.iter().map(|area| area.range), HIGHEST);
    assert_eq!(pci.assign_bars(&window), []);
    assert_eq!(addresses(&pci), before);
    assert_eq!(pci.config().careless_writes.get(), 0);
    let viot = tables.find(Signature(*b"VIOT")).expect("there");
    let found = viot::read(&pci, Ok(viot)).expect("a good VIOT");
    let [topology] = &found[..] else { panic!("{found:?}") };
    (pci, topology.clone())
}

fn addresses<C: ConfigSpace>(pci: &Pci<C>) -> Vec<Option<u64>> {
    pci.functions().iter().flat_map(|function| &function.bars).map(|bar| bar.address).collect()
}

/// PVH, XSDT in a hole of the memory map, tables at any byte, one bus, BARs near the top of physical space with decoding off,
/// a range for each device and for one that is not there.
#[test]
fn a_machine_as_cloud_hypervisor_makes_it() {
    let mut image = Image::default();
    let entry = |start: u64, len: u64, kind: u32| {
        [&start.to_le_bytes()[..], &len.to_le_bytes(), &kind.to_le_bytes(), &[0; 4]].concat()
    };
    let mut info = Vec::new();
    [0x336e_c578u32, 1, 0, 0].iter().for_each(|word| info.extend(word.to_le_bytes()));
    [0u64, 0x8000, 0xa_0000, 0x7000].iter().for_each(|word| info.extend(word.to_le_bytes()));
    [3u32, 0].iter().for_each(|word| info.extend(word.to_le_bytes()));
    image.put(0x6000, &info);
    let map = [entry(0, 0xa_0000, 1), entry(0x10_0000, 0xff0_0000, 1), entry(0xe800_0000, 0x1000_0000, 2)];
    image.put(0x7000, &map.concat());
    image.put(0x8000, b"scenario=default\0");
    let viot = viot_table(8, &[(8, 8), (0x10, 0x10), (0x28, 0x28)]);
    put_tables(&mut image, 0xa_0000, &[(0xa_1003, mcfg_table(0xe800_0000, 0)), (0xa_2001, viot)]);

    let top = HIGHEST - 0xff_ffff;
    let iommu = FakeFunction::endpoint(VENDOR_ID, DEVICE_ID)
        .with(offset::REVISION + 1, &[0, 0xff, 0xff])
        .with_bar64(0, top, 0x8_0000);
    let disk = FakeFunction::endpoint(0x1af4, 0x1042).with_bar64(0, top - 0x8_0000, 0x8_0000);
    let info = start_info::read(&image, 0x6000).expect("a good start info");
    let (pci, topology) = discover(&image, &info, alloc::vec![(at(1), iommu), (at(2), disk)]);
    assert_eq!((topology.place, topology.own), (Place::Pci(at(1)), Some(EndpointId::new(8))));
    assert_eq!(topology.behind, [(at(2), EndpointId::new(0x10))], "what is not there is left out");
    assert_eq!(pci.config().read16(at(1), offset::COMMAND), 0);
    pci.set_memory_decode(at(1), MemoryDecode::On);
    assert_eq!(pci.config().read16(at(1), offset::COMMAND), 2);
}

/// A Linux zero page without a root pointer, which is in the BIOS area; 64 buses; BARs of 32 bits with decoding on; endpoint
/// numbers that are no functions'.
#[test]
fn a_machine_as_crosvm_makes_it() {
    let mut image = Image::default();
    let range = |start, len| PhysRange::from_len(start, len).expect("not empty");
    let regions =
        [(range(0, 0xa_0000), 1), (range(0x10_0000, 0xff0_0000), 1), (range(0xf400_0000, 0x400_0000), 2)];
    image.put(0x7000, &zero_page::write(0x2_0000, 0, regions.into_iter()));
    image.put(0x2_0000, b"scenario=default\0");
    let viot = viot_table(8, &[(0x1_0010, 0x10)]);
    put_tables(&mut image, 0xe_0000, &[(0xe_2000, viot), (0xe_3000, mcfg_table(0xf400_0000, 63))]);

    let iommu = FakeFunction::endpoint(VENDOR_ID, DEVICE_ID)
        .with(offset::REVISION + 1, &[0, 6, 8])
        .with_command(2)
        .with_bar32(0, 0x8000_0000, 0x8000);
    let disk = FakeFunction::endpoint(0x1af4, 0x1042).with_command(2).with_bar32(0, 0x8000_8000, 0x8000);
    let info = zero_page::read(&image, 0x7000).expect("a good zero page");
    assert_eq!((info.rsdp, info.command_line.as_str()), (None, "scenario=default"));
    let (pci, topology) = discover(&image, &info, alloc::vec![(at(1), iommu), (at(2), disk)]);
    assert_eq!((topology.place, topology.own), (Place::Pci(at(1)), None));
    assert_eq!(topology.behind, [(at(2), EndpointId::new(0x1_0010))]);
    assert_eq!(pci.config().read16(at(1), offset::COMMAND), 2, "decoding is as it was");
}
