//! What all requests have in common: D-08 and D-09.

use virtio_iommu::{Introduction, Options};
use virtio_iommu_model::{Config, Inject, Quirks, Request};

use super::{AT, map_at, new_domain, one_slot, unmap, whole_life};
use crate::support::{EP, Machine, PAGE, RW};

/// How many of the five types there are.
fn types_in(requests: &[Request]) -> usize {
    let kinds: [fn(&Request) -> bool; 5] = [
        |request| matches!(request, Request::Attach { .. }),
        |request| matches!(request, Request::Detach { .. }),
        |request| matches!(request, Request::Map { .. }),
        |request| matches!(request, Request::Unmap { .. }),
        |request| matches!(request, Request::Probe { .. }),
    ];
    kinds.iter().filter(|is_kind| requests.iter().any(is_kind)).count()
}

// Seen to fail with a 1 in `Head::new`'s reserved bytes, and with a `finish` that takes a tail whose reserved bytes are
// not 0 for no answer.
#[test]
fn d08_reserved_is_zero_in_heads_and_ignored_in_tails() {
    for tail_reserved in [[0; 3], [1, 0, 0], [0, 0, 0x80], [0xff; 3]] {
        for options in [Machine::options(), one_slot()] {
            let quirks = Quirks { tail_reserved, ..Quirks::default() };
            let machine = Machine::new(Config { quirks, ..Config::default() });
            whole_life(&machine, options);
            assert_eq!(types_in(&machine.requests()), 5);
            assert!(machine.entries().iter().all(|entry| entry.head_reserved == [0; 3]));
        }
    }
}

/// One machine for each request and each kind of answer: a life up to that request, which then has to fail.
fn answered(answer: Inject, options: Options) {
    // PROBE.
    let machine = Machine::new(Config::default());
    let staged = machine.start_with(options).unwrap();
    machine.inject([answer]);
    staged.introduce(EP).unwrap_err();
    assert_eq!(staged.reserved_regions(EP), None, "{answer:?}");
    drop(staged);

    // ATTACH. A PROBE went before, with an answer that says OK and lies in the same slot.
    let machine = Machine::new(Config::default());
    let staged = machine.start_with(options).unwrap();
    assert_eq!(staged.introduce(EP), Ok(Introduction::Known));
    let viommu = staged.go_live().unwrap();
    let domain = new_domain(&viommu);
    let before = viommu.stats();
    machine.inject([answer]);
    viommu.attach(EP, &domain).unwrap_err();
    assert_eq!(viommu.stats().attaches, before.attaches);
    let memory = machine.memory(PAGE);
    map_at(&domain, AT, memory.phys, PAGE, RW).unwrap_err();

    // MAP, then UNMAP, then DETACH.
    let machine = Machine::new(Config::default());
    let staged = machine.start_with(options).unwrap();
    staged.introduce(EP).unwrap();
    let viommu = staged.go_live().unwrap();
    let domain = new_domain(&viommu);
    viommu.attach(EP, &domain).unwrap();
    let memory = machine.memory(2 * PAGE);
    map_at(&domain, AT, memory.phys, PAGE, RW).unwrap();
    machine.inject([answer]);
    map_at(&domain, AT + PAGE, memory.phys, PAGE, RW).unwrap_err();
    assert_eq!(viommu.stats().maps, 1);
    machine.inject([answer]);
    unmap(&domain, AT, PAGE).unwrap_err();
    assert_eq!((viommu.stats().unmaps, domain.translate(virtio_iommu::Iova::new(AT)).is_some()), (0, true));
    let before = viommu.stats();
    machine.inject([answer]);
    viommu.detach(EP).unwrap_err();
    assert_eq!(viommu.stats().detaches, before.detaches);
}

// Seen to fail with a `judge` that looks at the status alone.
#[test]
fn d09_a_used_length_of_zero_is_a_failure() {
    for options in [Machine::options(), one_slot()] {
        // The status byte says OK, and only the length says that it is not this request's.
        answered(Inject::UsedLen(0), options);
        // Nothing is written at all: what is there is what was there before.
        answered(Inject::Unwritten, options);
    }
}
