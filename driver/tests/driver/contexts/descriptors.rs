//! Contexts by a table of context descriptors in the guest's memory.

use virtio_iommu::contexts::table::{ArmGranule, ContextDescriptors, ContextTable, TableFormat};
use virtio_iommu::contexts::{Anonymous, ContextError};
use virtio_iommu::{Iova, RequestError, Status};
use virtio_iommu_model::Inject;

use super::{attached, pasid, range, reaches, table, write};
use crate::support::{RW, bytes_of};

const ARM: TableFormat = TableFormat::Arm { granule: ArmGranule::K4, input_bits: 48 };

#[test]
fn contexts_come_and_go_by_their_descriptors() {
    for arrangement in
        [ContextDescriptors::Linear, ContextDescriptors::TwoLevel4K, ContextDescriptors::TwoLevel64K]
    {
        let (machine, viommu, contexts) = attached(Some(Anonymous::Pasid0));
        let descriptors = ContextTable::new(arrangement, 8, viommu.clone()).unwrap();
        let mut contexts = contexts.attach_descriptors(descriptors).map_err(|refused| refused.error).unwrap();
        let memory = machine.memory(0x2000);
        // The device looks, finds none, and remembers that.
        assert!(!reaches(&machine, Some(70), 0x1000) && !reaches(&machine, None, 0x1000));
        let mut added = Vec::new();
        for (number, asid) in [(0, 1), (70, 2)] {
            let mut context = contexts.add(pasid(number), table(&viommu, ARM), asid).unwrap();
            // SAFETY: the test's own memory.
            unsafe { context.map(Iova::new(0x1000), memory.phys, 0x2000, RW) }.unwrap();
            added.push(context);
        }
        write(&machine, Some(70), 0x1000, &[5]).unwrap();
        write(&machine, None, 0x2000, &[6]).unwrap();
        assert_eq!((bytes_of(&memory)[0], bytes_of(&memory)[0x1000]), (5, 6), "{arrangement:?}");
        assert_eq!(contexts.unmap(&mut added[1], range(0x1000, 0x1000)), Ok(0x1000));
        assert!(!reaches(&machine, Some(70), 0x1000) && reaches(&machine, Some(70), 0x2000));
        let before = machine.outstanding();
        let last = added.pop().unwrap();
        let pages = last.table().pages();
        contexts.remove(last).map_err(|(_, error)| error).unwrap();
        assert_eq!(machine.outstanding(), before - pages);
        assert!(!reaches(&machine, Some(70), 0x2000) && reaches(&machine, None, 0x2000));
    }
}

#[test]
fn what_is_refused_comes_back() {
    let (machine, viommu, contexts) = attached(None);
    let descriptors = ContextTable::new(ContextDescriptors::Linear, 4, viommu.clone()).unwrap();
    // A domain with a default context.
    let refused = contexts.attach_descriptors(descriptors).unwrap_err();
    assert_eq!(refused.error, ContextError::DescriptorsRefused(RequestError::Refused(Status::Inval)));
    assert!(refused.table.is_some());

    let (machine2, viommu, contexts) = attached(Some(Anonymous::Blocked));
    let descriptors = ContextTable::new(ContextDescriptors::Linear, 4, viommu.clone()).unwrap();
    let mut contexts = contexts.attach_descriptors(descriptors).map_err(|refused| refused.error).unwrap();
    let not_added = contexts.add(pasid(1), table(&viommu, TableFormat::Sv39), 1).unwrap_err();
    assert_eq!(not_added.error, ContextError::NotArm { pasid: pasid(1) });
    assert!(contexts.add(pasid(16), table(&viommu, ARM), 1).unwrap_err().table.is_some());
    // Not confirmed: the device may have read the descriptor.
    machine2.inject([Inject::Refuse(3)]);
    let not_added = contexts.add(pasid(1), table(&viommu, ARM), 1).unwrap_err();
    assert!(not_added.table.is_none());
    // The PASID is not lost with it.
    let again = contexts.add(pasid(1), table(&viommu, ARM), 2).unwrap();
    contexts.remove(again).map_err(|(_, error)| error).unwrap();
    let context = contexts.add(pasid(2), table(&viommu, ARM), 1).unwrap();
    machine2.inject([Inject::Refuse(3)]);
    let (context, _error) = contexts.remove(context).unwrap_err();
    contexts.remove(context).map_err(|(_, error)| error).unwrap();
    drop(machine);
}
