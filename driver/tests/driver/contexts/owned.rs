//! Contexts that are a page table: what is invalidated, in which order, and what happens where it is left out.

use virtio_iommu::contexts::table::{NotPresent, PageTable, TableFormat, TableMapError, TableOptions};
use virtio_iommu::contexts::{Anonymous, OwnedMapError, OwnedUnmapError};
use virtio_iommu::{Iova, RequestError, Status};
use virtio_iommu_model::{Execute, Inject, Release, Request};

use super::{FORMATS, attached, pasid, range, reaches, table, write};
use crate::support::{Machine, RW, bytes_of};

const MIB: u64 = 1 << 20;

/// (first address, bytes, whether only leaf entries) of each INVALIDATE in the log.
fn invalidations(machine: &Machine) -> Vec<(u64, u64, bool)> {
    let ranges = machine.requests().into_iter().filter_map(|request| match request {
        Request::Invalidate { granularity: 4, virt_start, pages, granule, flags, .. } => {
            Some((virt_start, pages << granule, flags & 4 != 0))
        }
        _ => None,
    });
    ranges.collect()
}

#[test]
fn the_device_walks_tables_of_every_format() {
    for format in FORMATS {
        let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
        let before = machine.outstanding();
        let mut context = contexts.add_owned(pasid(7), table(&viommu, format), 3).unwrap();
        let granule = context.table().granule();
        let memory = machine.memory(2 * granule);
        // SAFETY: the test's own memory.
        unsafe { context.map(Iova::new(4 * granule), memory.phys, 2 * granule, RW) }.unwrap();
        write(&machine, Some(7), 5 * granule, &[9]).unwrap();
        assert_eq!(bytes_of(&memory)[granule as usize], 9, "{format:?}");
        assert!(!reaches(&machine, Some(7), 6 * granule) && !reaches(&machine, Some(8), 4 * granule));
        assert_eq!(context.unmap(range(4 * granule, granule)), Ok(granule));
        assert!(!reaches(&machine, Some(7), 4 * granule) && reaches(&machine, Some(7), 5 * granule));
        assert_eq!(context.unmap(range(0, 8 * granule)), Ok(granule));
        assert!(!reaches(&machine, Some(7), 5 * granule));
        context.remove().map_err(|(_, error)| error).unwrap();
        assert_eq!(machine.outstanding(), before, "{format:?}");
    }
}

#[test]
fn without_the_invalidation_the_device_still_has_the_old_translation() {
    for format in FORMATS {
        let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
        let mut context = contexts.add_owned(pasid(7), table(&viommu, format), 3).unwrap();
        let granule = context.table().granule();
        let memory = machine.memory(2 * granule);
        // SAFETY: the test's own memory.
        unsafe { context.map(Iova::new(granule), memory.phys, 2 * granule, RW) }.unwrap();
        assert!(reaches(&machine, Some(7), granule));
        context.unmap_later(range(granule, granule)).unwrap();
        assert!(reaches(&machine, Some(7), granule), "{format:?}: stale, as nobody told it");
        // Nor can anything else be mapped there yet.
        // SAFETY: refused.
        let again = unsafe { context.map(Iova::new(granule), memory.phys, granule, RW) };
        assert_eq!(again, Err(OwnedMapError::Table(TableMapError::Stale { range: range(granule, granule) })));
        context.invalidate().unwrap();
        assert!(!reaches(&machine, Some(7), granule));
        // SAFETY: the test's own memory.
        unsafe { context.map(Iova::new(granule), memory.phys, granule, RW) }.unwrap();
    }
}

#[test]
fn exactly_what_changed_is_invalidated_with_one_doorbell() {
    let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
    let mut context = contexts.add_owned(pasid(7), table(&viommu, TableFormat::X86_64), 0).unwrap();
    let memory = machine.memory(2 * MIB + 0x8000);
    // SAFETY: the test's own memory.
    unsafe {
        for at in [0x1000, 0x3000, 0x4000, 0x5000] {
            context.map(Iova::new(at), memory.phys, 0x1000, RW).unwrap();
        }
    }
    context.unmap_later(range(0x1000, 0x1000)).unwrap();
    context.unmap_later(range(0x3000, 0x2000)).unwrap();
    machine.device().clear_log();
    let (result, requests, kicks) = machine.traffic(|| context.invalidate());
    assert_eq!((result, requests, kicks), (Ok(()), 3, 1));
    let expected = [(0x1000, 0x1000, true), (0x3000, 0x1000, true), (0x4000, 0x1000, true)];
    assert_eq!(invalidations(&machine), expected);
    assert_eq!(machine.traffic(|| context.invalidate()), (Ok(()), 0, 0));
    // The last page of its table, which goes along.
    machine.device().clear_log();
    let pages = machine.outstanding();
    context.unmap(range(0x5000, 0x1000)).unwrap();
    assert_eq!(invalidations(&machine), [(0, 512 << 30, false)]);
    assert_eq!(machine.outstanding(), pages - 3);
}

#[test]
fn pages_of_a_table_wait_for_the_answer() {
    let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
    let mut context = contexts.add_owned(pasid(7), table(&viommu, TableFormat::Sv39), 0).unwrap();
    let memory = machine.memory(0x1000);
    // SAFETY: the test's own memory.
    unsafe { context.map(Iova::new(0x1000), memory.phys, 0x1000, RW) }.unwrap();
    let pages = machine.outstanding();
    for inject in [Inject::Refuse(3), Inject::Hold(Execute::AtRelease)] {
        machine.inject([inject]);
        let error = match inject {
            Inject::Refuse(_) => RequestError::Refused(Status::DevErr),
            _ => RequestError::TimedOut,
        };
        let failed = match context.table().mapped_bytes() {
            0 => context.invalidate(),
            _ => context.unmap(range(0x1000, 0x1000)).map(drop).map_err(|error| match error {
                OwnedUnmapError::Invalidate(error) => error,
                other => panic!("{other:?}"),
            }),
        };
        assert_eq!(failed, Err(error));
        assert_eq!(machine.outstanding(), pages, "nothing is free yet");
        assert!(!context.table().stale().is_empty());
    }
    // Late: nobody waits for it any more, and it says nothing about what is stale now.
    machine.release(Release::All);
    viommu.poll();
    assert_eq!(machine.outstanding(), pages);
    context.invalidate().unwrap();
    assert_eq!(machine.outstanding(), pages - 2);
}

#[test]
fn a_context_that_could_not_be_removed_keeps_its_table() {
    let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
    let context = contexts.add_owned(pasid(7), table(&viommu, TableFormat::X86_64), 0).unwrap();
    let pages = machine.outstanding();
    machine.inject([Inject::Refuse(3)]);
    let (context, _error) = context.remove().unwrap_err();
    assert_eq!(machine.outstanding(), pages);
    context.remove().map_err(|(_, error)| error).unwrap();
    assert_eq!(machine.outstanding(), pages - 1);
}

#[test]
fn a_device_that_caches_absence_is_told_of_new_mappings() {
    let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
    let options = TableOptions { not_present: NotPresent::MayBeCached, ..TableOptions::default() };
    let table = PageTable::new(TableFormat::X86_64, viommu.clone(), options).unwrap();
    let mut context = contexts.add_owned(pasid(7), table, 0).unwrap();
    let memory = machine.memory(0x1000);
    machine.device().clear_log();
    // SAFETY: the test's own memory.
    unsafe { context.map(Iova::new(0x1000), memory.phys, 0x1000, RW) }.unwrap();
    assert_eq!(invalidations(&machine), [(0x1000, 0x1000, false)]);
    assert!(reaches(&machine, Some(7), 0x1000));
    // Also while something else is stale.
    context.unmap_later(range(0x1000, 0x1000)).unwrap();
    // SAFETY: as above.
    unsafe { context.map(Iova::new(1 << 40), memory.phys, 0x1000, RW) }.unwrap();
    assert!(context.table().stale().is_empty() && !reaches(&machine, Some(7), 0x1000));
}

#[test]
fn very_many_ranges_are_one_request_for_the_context() {
    let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
    let mut context = contexts.add_owned(pasid(7), table(&viommu, TableFormat::X86_64), 0).unwrap();
    let memory = machine.memory(0x1000);
    for page in 0..80u64 {
        // SAFETY: the test's own memory.
        unsafe { context.map(Iova::new(0x2000 * page), memory.phys, 0x1000, RW) }.unwrap();
        assert!(reaches(&machine, Some(7), 0x2000 * page));
    }
    for page in 0..79 {
        context.unmap_later(range(0x2000 * page, 0x1000)).unwrap();
    }
    assert!(reaches(&machine, Some(7), 0));
    let (result, requests, kicks) = machine.traffic(|| context.invalidate());
    assert_eq!((result, requests, kicks), (Ok(()), 1, 1));
    assert!(!(0..79).any(|page| reaches(&machine, Some(7), 0x2000 * page)));
    assert!(reaches(&machine, Some(7), 0x2000 * 79));
}

#[test]
fn everything_of_a_domain_can_be_invalidated() {
    let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
    let mut context = contexts.add_owned(pasid(7), table(&viommu, TableFormat::X86_64), 0).unwrap();
    let memory = machine.memory(0x2000);
    // SAFETY: the test's own memory.
    unsafe { context.map(Iova::new(0x1000), memory.phys, 0x2000, RW) }.unwrap();
    assert!(reaches(&machine, Some(7), 0x1000));
    context.unmap_later(range(0x1000, 0x1000)).unwrap();
    contexts.invalidate_all().unwrap();
    assert!(!reaches(&machine, Some(7), 0x1000));
}
