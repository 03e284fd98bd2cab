//! Shared virtual memory: a context whose table is filled when endpoints ask for it.

use virtio_iommu::contexts::table::TableFormat;
use virtio_iommu::contexts::{Anonymous, PageAnswer, PageGroups, Taken};
use virtio_iommu::{Iova, RequestError, Status};
use virtio_iommu_model::{
    Access, AccessKind, Config, PageAnswer as Answered, PageError, PageRequest, feature,
};

use super::{attached, pasid, table};
use crate::support::{EP, Machine, PAGE, RW, bytes_of};

fn ask(machine: &Machine, address: u64, group: u16, last: bool) -> Result<(), PageError> {
    let request =
        PageRequest { endpoint: EP.get(), pasid: Some(3), address, kind: AccessKind::Read, group, last };
    machine.with_device(|device, ram| device.request_page(ram, request))
}

#[test]
fn an_endpoint_walks_through_a_process_page_by_page() {
    let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
    let mut process = contexts.add_owned(pasid(3), table(&viommu, TableFormat::X86_64), 0).unwrap();
    let memory = machine.memory(8 * PAGE);
    let mut groups = PageGroups::new(4, 4);
    let base = 0x40_0000;
    for step in 0..8 {
        let (iova, byte) = (base + PAGE * step, [step as u8 + 1]);
        let access = |machine: &Machine| {
            let access = Access::Write(&byte);
            let from = (EP.get(), Some(3));
            machine.with_device(|device, ram| device.access_or_request(ram, from, iova, access, step as u16))
        };
        assert_eq!(access(&machine), Err(PageError::Waiting));
        viommu.poll();
        let fault = viommu.next_fault().unwrap();
        assert_eq!(fault.pasid, Some(pasid(3)));
        let Taken::Complete(group) = groups.take(&fault) else { panic!("{fault:?}") };
        for page in &group.pages {
            let offset = page.address.get() & !(PAGE - 1);
            let phys = memory.phys.checked_add(offset - base).unwrap();
            // SAFETY: the test's own memory.
            unsafe { process.map(Iova::new(offset), phys, PAGE, RW) }.unwrap();
        }
        viommu.respond(group.id, PageAnswer::Success).unwrap();
        let answers = machine.device().take_page_answers();
        let expected = Answered { endpoint: EP.get(), pasid: Some(3), group: step as u16, code: 0 };
        assert_eq!(answers, [expected]);
        assert_eq!(access(&machine), Ok(()));
        assert_eq!(bytes_of(&memory)[(PAGE * step) as usize], step as u8 + 1);
    }
    assert_eq!(viommu.next_fault(), None);
}

#[test]
fn groups_are_answered_once_whole_and_while_their_context_lives() {
    let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
    let context = contexts.add_mapped(pasid(3)).unwrap();
    let mut groups = PageGroups::new(4, 4);
    for (address, last) in [(0x1000, false), (0x1000, false), (0x2000, true)] {
        ask(&machine, address, 7, last).unwrap();
    }
    ask(&machine, 0x9000, 8, true).unwrap();
    viommu.poll();
    let mut complete = Vec::new();
    while let Some(fault) = viommu.next_fault() {
        match groups.take(&fault) {
            Taken::Complete(group) => complete.push(group),
            Taken::Waiting => {}
            other => panic!("{other:?}"),
        }
    }
    let sizes: Vec<_> = complete.iter().map(|group| (group.id.group, group.pages.len())).collect();
    assert_eq!(sizes, [(7, 3), (8, 1)]);
    viommu.respond(complete[0].id, PageAnswer::Failure).unwrap();
    let gone = Err(RequestError::Refused(Status::NoEnt));
    assert_eq!(viommu.respond(complete[0].id, PageAnswer::Failure), gone);
    // The device answers what is left when the context goes.
    context.remove().map_err(|(_, error)| error).unwrap();
    assert_eq!(viommu.respond(complete[1].id, PageAnswer::Success), gone);
    let codes: Vec<_> = machine.device().take_page_answers().iter().map(|answer| answer.code).collect();
    assert_eq!(codes, [2, 1]);
}

#[test]
fn a_last_in_group_that_never_comes_holds_nothing_up() {
    let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
    let _context = contexts.add_mapped(pasid(3)).unwrap();
    let mut groups = PageGroups::new(1, 4);
    ask(&machine, 0x1000, 7, false).unwrap();
    for group in 0..4 {
        ask(&machine, 0x1000, 20 + group, true).unwrap();
    }
    viommu.poll();
    let mut complete = 0;
    while let Some(fault) = viommu.next_fault() {
        complete += usize::from(matches!(groups.take(&fault), Taken::Complete(_)));
    }
    assert_eq!((complete, groups.waiting()), (4, 1));
    let overdue = groups.take_overdue(4).unwrap();
    // The device takes no answer to half a group, and says so.
    let early = viommu.respond(overdue.id, PageAnswer::Invalid);
    assert_eq!(early, Err(RequestError::Refused(Status::Inval)));
}

#[test]
fn a_flood_of_requests_finds_bounds_on_both_sides() {
    let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
    let _context = contexts.add_mapped(pasid(3)).unwrap();
    let mut groups = PageGroups::new(8, 2);
    let sent = (0..1000).filter(|group| ask(&machine, 0x1000, *group, false).is_ok()).count();
    assert_eq!(sent, Config::contexts().page_groups);
    viommu.poll();
    let mut refused = 0;
    while let Some(fault) = viommu.next_fault() {
        refused += usize::from(matches!(groups.take(&fault), Taken::Refused(_)));
    }
    assert_eq!((groups.waiting(), refused), (8, sent - 8));
}

#[test]
fn without_the_draft_records_say_nothing_of_contexts() {
    let config =
        Config { features: Config::contexts().features & !feature::ATTACH_TABLE, ..Config::contexts() };
    let (machine, viommu) = Machine::live(config);
    let mut record = [0; 48];
    record[..16].copy_from_slice(&[2, 0, 0, 0, 0x32, 7, 0, 0, 8, 0, 0, 0, 5, 0, 0, 0]);
    machine.push_event(&record);
    viommu.poll();
    let fault = viommu.next_fault().unwrap();
    assert_eq!((fault.pasid, fault.page_request), (None, None));
    let group = virtio_iommu::contexts::PageGroupId { endpoint: EP, pasid: None, group: 1, last: true };
    assert_eq!(viommu.respond(group, PageAnswer::Success), Err(RequestError::NotHandled));
}
