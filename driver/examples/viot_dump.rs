//! Prints an ACPI VIOT: of a file, or of a table that is built in.
//!
//! `cargo run -p virtio-iommu --example viot_dump [FILE]`, where Linux has `/sys/firmware/acpi/tables/VIOT`.

use std::error::Error;

use virtio_iommu::topology::viot::{Endpoints, IommuPlace, PciFunction, Viot};

fn main() -> Result<(), Box<dyn Error>> {
    let bytes = match std::env::args_os().nth(1) {
        Some(path) => std::fs::read(path)?,
        None => built_in(),
    };
    let viot = Viot::parse(&bytes)?;
    for iommu in viot.iommus() {
        match iommu.place {
            IommuPlace::Pci(place) => println!("IOMMU {:#x}: PCI function {place}", iommu.node),
            IommuPlace::Mmio(base) => println!("IOMMU {:#x}: registers at {base:#x}", iommu.node),
        }
    }
    for endpoints in viot.endpoints() {
        match endpoints {
            Endpoints::PciRange { start, first, last, iommu } => {
                println!("functions {first} to {last}: endpoints from {start} of IOMMU {iommu:#x}");
            }
            Endpoints::Mmio { id, base, iommu } => {
                println!("device at {base:#x}: endpoint {id} of IOMMU {iommu:#x}");
            }
        }
    }
    for iommu in viot.iommus() {
        let IommuPlace::Pci(place) = iommu.place else { continue };
        if let Some((own, _)) = viot.pci_endpoint(place) {
            println!("endpoint {own} is the IOMMU {:#x} itself, and never attached", iommu.node);
        }
    }
    let disk = PciFunction::new(0, 0, 2, 0);
    match viot.pci_endpoint(disk) {
        Some((endpoint, iommu)) => println!("{disk} is endpoint {endpoint} of IOMMU {:#x}", iommu.node),
        None => println!("{disk} is behind no IOMMU"),
    }
    Ok(())
}

/// What firmware says about a machine with an IOMMU at 00:01.0, all of bus 0 behind it, and a device that is not on PCI.
fn built_in() -> Vec<u8> {
    let mut table = b"VIOT".to_vec();
    table.extend(112_u32.to_le_bytes());
    table.resize(36, 0); // The rest of an ACPI header, which the parser leaves to the kernel.
    table.extend([3_u16.to_le_bytes(), 48_u16.to_le_bytes()].concat()); // Nodes, and where they start.
    table.resize(48, 0);

    table.extend([3, 0, 16, 0]); // A virtio-iommu on PCI: segment 0, 00:01.0.
    table.extend([0_u16.to_le_bytes(), 8_u16.to_le_bytes()].concat());
    table.resize(64, 0);

    table.extend([1, 0, 24, 0]); // Functions: endpoints from 0 on, segments 0 to 0, 00:00.0 to 00:1f.7.
    table.extend(0_u32.to_le_bytes());
    table.extend([0_u16, 0, 0, 0xff, 48].map(u16::to_le_bytes).concat());
    table.resize(88, 0);

    table.extend([2, 0, 24, 0]); // A device by its registers: endpoint 0x10000.
    table.extend(0x1_0000_u32.to_le_bytes());
    table.extend(0xc000_0000_u64.to_le_bytes());
    table.extend(48_u16.to_le_bytes());
    table.resize(112, 0);
    table
}
