//! The draft extension: page tables, and contexts over the model.

mod adding;
mod descriptors;
mod futures;
mod late;
mod mapped;
mod nested;
mod owned;
mod pages;
mod recovery;
mod refusals;
mod tables;

use virtio_iommu::contexts::table::{ArmGranule, PageTable, TableFormat, TableOptions};
use virtio_iommu::contexts::{Anonymous, Contexts, ContextsOptions, Pasid};
use virtio_iommu::{IovaRange, Options, Viommu};
use virtio_iommu_model::{Access, AccessError, Config};

use crate::support::{EP, EP2, Machine, TestPlatform};

/// Formats of tables that the device walks, one of each kind and granule.
const FORMATS: [TableFormat; 6] = [
    TableFormat::X86_64,
    TableFormat::Sv39,
    TableFormat::Sv48,
    TableFormat::Arm { granule: ArmGranule::K4, input_bits: 48 },
    TableFormat::Arm { granule: ArmGranule::K16, input_bits: 48 },
    TableFormat::Arm { granule: ArmGranule::K64, input_bits: 48 },
];

fn pasid(number: u32) -> Pasid {
    Pasid::new(number).unwrap()
}

fn options() -> Options {
    Options { accept_contexts: true, ..Machine::options() }
}

/// A machine with a device of the draft, and a driver that wants it.
fn live() -> (Machine, Viommu<TestPlatform>) {
    let machine = Machine::new(Config::contexts());
    let staged = machine.start_with(options()).unwrap();
    for endpoint in [EP, EP2] {
        staged.introduce(endpoint).unwrap();
    }
    let viommu = staged.go_live().unwrap();
    (machine, viommu)
}

/// The same with [`EP`] in a domain with contexts.
fn attached(anonymous: Option<Anonymous>) -> (Machine, Viommu<TestPlatform>, Contexts<TestPlatform>) {
    let (machine, viommu) = live();
    let options = ContextsOptions { anonymous, ..ContextsOptions::default() };
    let contexts = viommu.create_contexts(options).unwrap();
    viommu.attach(EP, contexts.domain()).unwrap();
    machine.device().clear_log();
    (machine, viommu, contexts)
}

fn table(viommu: &Viommu<TestPlatform>, format: TableFormat) -> PageTable<Viommu<TestPlatform>> {
    PageTable::new(format, viommu.clone(), TableOptions::default()).unwrap()
}

fn write(machine: &Machine, pasid: Option<u32>, iova: u64, bytes: &[u8]) -> Result<(), AccessError> {
    let access = Access::Write(bytes);
    machine.with_device(|device, ram| device.access_context(ram, EP.get(), pasid, iova, access))
}

fn reaches(machine: &Machine, pasid: Option<u32>, iova: u64) -> bool {
    let mut byte = [0];
    let access = Access::Read(&mut byte);
    machine.with_device(|device, ram| device.access_context(ram, EP.get(), pasid, iova, access)).is_ok()
}

fn range(start: u64, len: u64) -> IovaRange {
    tables::range(start, len)
}
