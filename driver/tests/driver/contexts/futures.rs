//! The operations of contexts as futures: they do what their blocking twins do, answered at once or later; and when they are
//! dropped, or the device ends, nothing is lost and nothing given back too early.

use std::future::Future;
use std::task::Poll;

use virtio_iommu::contexts::table::{ArmGranule, ContextDescriptors, ContextTable, NotPresent, PageTable};
use virtio_iommu::contexts::table::{TableFormat, TableOptions};
use virtio_iommu::contexts::{Anonymous, Contexts, ContextsOptions, DescribedContext, DescriptorContexts};
use virtio_iommu::contexts::{MappedContext, OwnedContext, PageAnswer, PageGroupId};
use virtio_iommu::{Interrupt, Iova, PhysAddr, Viommu};
use virtio_iommu_model::{Access, AccessKind, Execute, Inject, PageRequest, Random, Release};

use super::{attached, pasid, range, table};
use crate::support::{EP, EP2, Machine, PAGE, RW, Task, TestPlatform};

const ARM: TableFormat = TableFormat::Arm { granule: ArmGranule::K4, input_bits: 48 };
/// What operations map, unmap, and the PASID that they add.
const NEW: Iova = Iova::new(4 * PAGE);
const ADDED: u32 = 8;

type Driver = Viommu<TestPlatform>;

/// A domain of [`EP`] with a context of each kind, and one of [`EP2`] with a table of descriptors. Each has a page mapped.
struct Parts {
    mapped: Option<MappedContext<TestPlatform>>,
    owned: Option<OwnedContext<TestPlatform, Driver>>,
    described: Option<DescribedContext<Driver>>,
    descriptors: DescriptorContexts<TestPlatform, Driver>,
    contexts: Contexts<TestPlatform>,
    viommu: Driver,
    phys: PhysAddr,
}

fn parts() -> (Machine, Parts) {
    let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
    let phys = machine.memory(PAGE).phys;
    let mut mapped = contexts.add_mapped(pasid(5)).unwrap();
    // So that mapping takes a request too.
    let options = TableOptions { not_present: NotPresent::MayBeCached, ..TableOptions::default() };
    let x86 = PageTable::new(TableFormat::X86_64, viommu.clone(), options).unwrap();
    let mut owned = contexts.add_owned(pasid(7), x86, 0).unwrap();
    let other = viommu.create_contexts(ContextsOptions::default()).unwrap();
    viommu.attach(EP2, other.domain()).unwrap();
    let descriptors = ContextTable::new(ContextDescriptors::Linear, 4, viommu.clone()).unwrap();
    let mut descriptors = other.attach_descriptors(descriptors).map_err(|refused| refused.error).unwrap();
    let mut described = descriptors.add(pasid(3), table(&viommu, ARM), 3).unwrap();
    // SAFETY: the test's own memory, which is never reused.
    unsafe {
        mapped.map(Iova::new(PAGE), phys, PAGE, RW).unwrap();
        owned.map(Iova::new(PAGE), phys, PAGE, RW).unwrap();
        described.map(Iova::new(PAGE), phys, PAGE, RW).unwrap();
    }
    let (endpoint, kind) = (EP.get(), AccessKind::Read);
    let page = PageRequest { endpoint, pasid: Some(5), address: 0x9000, kind, group: 1, last: true };
    machine.with_device(|device, ram| device.request_page(ram, page)).unwrap();
    viommu.poll();
    let (mapped, owned, described) = (Some(mapped), Some(owned), Some(described));
    (machine, Parts { mapped, owned, described, descriptors, contexts, viommu, phys })
}

#[derive(Clone, Copy)]
enum Way {
    Blocking,
    Asynchronous,
}

/// What came of an operation; what it made goes.
fn word<T, E: std::fmt::Debug>(result: Result<T, E>) -> String {
    result.map_or_else(|error| format!("{error:?}"), |_| "Ok".into())
}

fn done<'a, T, E: std::fmt::Debug>(result: Result<T, E>) -> Task<'a, String> {
    let word = word(result);
    Task::new(async { word })
}

fn later<'a, T, E: std::fmt::Debug>(
    future: impl Future<Output = Result<T, E>> + Send + 'a,
) -> Task<'a, String> {
    Task::new(async { word(future.await) })
}

type Start = fn(&mut Parts, Way) -> Task<'_, String>;

/// Every operation, by name.
const KINDS: [(&str, Start); 14] = [
    ("support", |parts, way| match way {
        Way::Blocking => done(parts.viommu.context_support(EP)),
        Way::Asynchronous => later(parts.viommu.context_support_async(EP)),
    }),
    ("add mapped", |parts, way| match way {
        Way::Blocking => done(parts.contexts.add_mapped(pasid(ADDED))),
        Way::Asynchronous => later(parts.contexts.add_mapped_async(pasid(ADDED))),
    }),
    ("add owned", |parts, way| {
        let table = table(&parts.viommu, TableFormat::Sv39);
        match way {
            Way::Blocking => done(parts.contexts.add_owned(pasid(ADDED), table, 0)),
            Way::Asynchronous => later(parts.contexts.add_owned_async(pasid(ADDED), table, 0)),
        }
    }),
    ("invalidate all", |parts, way| match way {
        Way::Blocking => done(parts.contexts.invalidate_all()),
        Way::Asynchronous => later(parts.contexts.invalidate_all_async()),
    }),
    ("map in a mapped one", |Parts { mapped, phys, .. }, way| {
        let context = mapped.as_mut().unwrap();
        match way {
            // SAFETY: the test's own memory, which is never reused.
            Way::Blocking => done(unsafe { context.map(NEW, *phys, PAGE, RW) }),
            // SAFETY: as above.
            Way::Asynchronous => later(unsafe { context.map_async(NEW, *phys, PAGE, RW) }),
        }
    }),
    ("unmap in a mapped one", |parts, way| match way {
        Way::Blocking => done(parts.mapped.as_mut().unwrap().unmap(range(0, 8 * PAGE))),
        Way::Asynchronous => later(parts.mapped.as_mut().unwrap().unmap_async(range(0, 8 * PAGE))),
    }),
    ("remove a mapped one", |parts, way| {
        let context = parts.mapped.take().unwrap();
        match way {
            Way::Blocking => done(context.remove()),
            Way::Asynchronous => later(context.remove_async()),
        }
    }),
    ("map in an owned one", |Parts { owned, phys, .. }, way| {
        let context = owned.as_mut().unwrap();
        match way {
            // SAFETY: the test's own memory, which is never reused.
            Way::Blocking => done(unsafe { context.map(NEW, *phys, PAGE, RW) }),
            // SAFETY: as above.
            Way::Asynchronous => later(unsafe { context.map_async(NEW, *phys, PAGE, RW) }),
        }
    }),
    ("unmap in an owned one", |parts, way| match way {
        Way::Blocking => done(parts.owned.as_mut().unwrap().unmap(range(0, 8 * PAGE))),
        Way::Asynchronous => later(parts.owned.as_mut().unwrap().unmap_async(range(0, 8 * PAGE))),
    }),
    ("remove an owned one", |parts, way| {
        let context = parts.owned.take().unwrap();
        match way {
            Way::Blocking => done(context.remove()),
            Way::Asynchronous => later(context.remove_async()),
        }
    }),
    ("add by a descriptor", |parts, way| {
        let table = table(&parts.viommu, ARM);
        match way {
            Way::Blocking => done(parts.descriptors.add(pasid(ADDED), table, 4)),
            Way::Asynchronous => later(parts.descriptors.add_async(pasid(ADDED), table, 4)),
        }
    }),
    ("unmap in a described one", |Parts { descriptors, described, .. }, way| {
        let context = described.as_mut().unwrap();
        match way {
            Way::Blocking => done(descriptors.unmap(context, range(0, 8 * PAGE))),
            Way::Asynchronous => later(descriptors.unmap_async(context, range(0, 8 * PAGE))),
        }
    }),
    ("remove a described one", |Parts { descriptors, described, .. }, way| {
        let context = described.take().unwrap();
        match way {
            Way::Blocking => done(descriptors.remove(context)),
            Way::Asynchronous => later(descriptors.remove_async(context)),
        }
    }),
    ("respond", |parts, way| {
        let group = PageGroupId { endpoint: EP, pasid: Some(pasid(5)), group: 1, last: true };
        match way {
            Way::Blocking => done(parts.viommu.respond(group, PageAnswer::Success)),
            Way::Asynchronous => later(parts.viommu.respond_async(group, PageAnswer::Success)),
        }
    }),
];

/// What endpoints reach, by PASID and page.
fn reach(machine: &Machine) -> Vec<(u32, u64)> {
    let contexts = [(EP, 5), (EP, 7), (EP, ADDED), (EP2, 3), (EP2, ADDED)];
    let places = contexts.into_iter().flat_map(|context| (0..8).map(move |page| (context, page)));
    let reaches = |((endpoint, pasid), page): &((virtio_iommu::EndpointId, u32), u64)| {
        let from = (endpoint.get(), Some(*pasid), page * PAGE);
        let access = Access::Write(&[1]);
        machine.with_device(|device, ram| device.access_context(ram, from.0, from.1, from.2, access)).is_ok()
    };
    places.filter(reaches).map(|((_, pasid), page)| (pasid, page)).collect()
}

/// What it cost, and what is left of it.
fn cost(machine: &Machine, viommu: &Driver) -> String {
    let mut counters = machine.device().take_counters();
    (counters.interrupts, counters.suppressed) = Default::default();
    format!("{counters:?} {:?} {} {:?}", viommu.stats(), machine.outstanding(), reach(machine))
}

fn hold_all(machine: &Machine) {
    machine.device().inject.random = Some(Random::new(0, 1, vec![Inject::Hold(Execute::AtRelease)]));
}

fn hold_none(machine: &Machine) {
    machine.device().inject.random = None;
}

/// The answers come, and the interrupt's handler has the driver look.
fn serve(machine: &Machine, viommu: &Driver) {
    assert!(machine.release(Release::All) > 0, "nothing was asked");
    assert_eq!(viommu.on_interrupt(), Interrupt::Wake);
    viommu.poll();
}

/// What came of an operation whose answers come after it slept.
fn served(machine: &Machine, viommu: &Driver, task: &mut Task<'_, String>) -> String {
    let mut rounds = 0;
    loop {
        match task.poll() {
            Poll::Ready(word) => return word,
            Poll::Pending => rounds += 1,
        }
        assert_eq!(task.wakes(), rounds - 1, "woken without an answer");
        serve(machine, viommu);
        assert_eq!(task.wakes(), rounds, "not woken");
    }
}

/// Fails when a future sends what its twin does not.
#[test]
fn futures_do_what_blocking_calls_do() {
    for (name, start) in KINDS {
        let run = |way, later| {
            let (machine, mut parts) = parts();
            let viommu = parts.viommu.clone();
            machine.device().take_counters();
            if later {
                hold_all(&machine);
            }
            let word = served(&machine, &viommu, &mut start(&mut parts, way));
            hold_none(&machine);
            (word, cost(&machine, &viommu))
        };
        let blocking = run(Way::Blocking, false);
        assert_eq!(blocking.0, "Ok", "{name}");
        assert_eq!(run(Way::Asynchronous, false), blocking, "{name}");
        assert_eq!(run(Way::Asynchronous, true), blocking, "{name}, answered later");
    }
}

/// After whatever happened all contexts can be used and removed, and the PASID of one that was on its way can be added.
/// What endpoints reach after that.
fn clean_up(machine: &Machine, mut parts: Parts, name: &str) -> Vec<(u32, u64)> {
    let all = range(0, 8 * PAGE);
    if let Some(mut context) = parts.mapped.take() {
        context.unmap(all).unwrap();
        context.remove().map_err(|(_, error)| error).unwrap();
    } else {
        let added = parts.contexts.add_mapped(pasid(5)).unwrap();
        added.remove().map_err(|(_, error)| error).unwrap();
    }
    if let Some(mut context) = parts.owned.take() {
        context.unmap(all).unwrap();
        context.remove().map_err(|(_, error)| error).unwrap();
    } else {
        let added = parts.contexts.add_mapped(pasid(7)).unwrap();
        added.remove().map_err(|(_, error)| error).unwrap();
    }
    if let Some(mut context) = parts.described.take() {
        parts.descriptors.unmap(&mut context, all).unwrap();
        parts.descriptors.remove(context).map_err(|(_, error)| error).unwrap();
    }
    let added = parts.contexts.add_mapped(pasid(ADDED)).unwrap();
    added.remove().map_err(|(_, error)| error).unwrap();
    let stats = parts.viommu.stats();
    assert_eq!((stats.abandoned_requests, stats.quarantined_mappings), (0, 0), "{name}");
    reach(machine)
}

/// Runs `test` for each operation, in its first, second ... sleep.
fn in_each_sleep(test: impl Fn(&str, Machine, Parts, Start, usize) -> bool) {
    for (name, start) in KINDS {
        for sleep in 0.. {
            let (machine, parts) = parts();
            hold_all(&machine);
            if !test(name, machine, parts, start, sleep) {
                assert!(sleep > 0, "{name} never slept");
                break;
            }
        }
    }
}

/// Lets a task sleep once more than it is served. False if it was done before.
fn sleeps(machine: &Machine, viommu: &Driver, task: &mut Task<'_, String>, served: usize) -> bool {
    for time in 0..=served {
        if time > 0 {
            serve(machine, viommu);
        }
        if task.poll().is_ready() {
            return false;
        }
    }
    true
}

/// Fails when dropping one gives memory or a PASID back, leaves what is stale under way for ever, or takes a context for
/// gone; or when its late answer is not settled.
#[test]
fn a_future_that_is_dropped_leaves_its_request_with_the_device() {
    for drained in [false, true] {
        in_each_sleep(|name, machine, mut parts, start, sleep| {
            let viommu = parts.viommu.clone();
            let mut task = start(&mut parts, Way::Asynchronous);
            if !sleeps(&machine, &viommu, &mut task, sleep) {
                return false;
            }
            hold_none(&machine);
            if drained {
                serve(&machine, &viommu);
            }
            let (in_flight, blocks) = ({ machine.device().held() }, machine.outstanding());
            drop(task);
            assert_eq!(viommu.stats().abandoned_requests, in_flight as u64, "{name}");
            assert_eq!(machine.outstanding(), blocks, "{name}: memory went back");
            machine.release(Release::AllReversed);
            viommu.poll();
            assert_eq!(machine.outstanding(), blocks, "{name}: memory went back late");
            assert_eq!(clean_up(&machine, parts, name), [], "{name}");
            true
        });
    }
}

/// Fails when a claim or a record is made before there is a slot.
#[test]
fn a_future_that_is_dropped_before_it_was_sent_leaves_nothing() {
    for (name, start) in KINDS {
        let (machine, mut parts) = parts();
        let before = reach(&machine);
        let (_, requests, _) = machine.traffic(|| drop(start(&mut parts, Way::Asynchronous)));
        assert_eq!(requests, 0, "{name}");
        assert_eq!(reach(&machine), before, "{name}");
        // What was to be removed went with the future, as if it had been dropped.
        let left = if parts.described.is_none() { &[(3, 1)][..] } else { &[] };
        assert_eq!(clean_up(&machine, parts, name), left, "{name}");
    }
}

/// Fails when nobody is woken, or what was in flight at the end of the device is told again.
#[test]
fn the_end_of_the_device_ends_futures_and_a_recovery_brings_the_contexts_back() {
    in_each_sleep(|name, machine, mut parts, start, sleep| {
        let viommu = parts.viommu.clone();
        let before = reach(&machine);
        let mut task = start(&mut parts, Way::Asynchronous);
        if !sleeps(&machine, &viommu, &mut task, sleep) {
            return false;
        }
        hold_none(&machine);
        let slept = task.wakes();
        machine.device().fail();
        // SAFETY: the model ends what was in flight with its reset.
        let recovered = unsafe { viommu.recover() }.unwrap();
        assert_eq!((recovered.endpoints, recovered.lost.len()), (2, 0), "{name}");
        assert!(task.wakes() > slept, "{name} is not woken");
        let word = served(&machine, &viommu, &mut task);
        assert!(word.contains("Reset"), "{name}: {word}");
        drop(task);
        let after = reach(&machine);
        assert!(after.iter().all(|place| before.contains(place) || place.1 == 4), "{name}: {after:?}");
        // An operation that makes something or reads takes nothing away.
        let ends = name.contains("unmap") || name.contains("remove");
        assert!(ends || before.iter().all(|place| after.contains(place)), "{name}: {after:?}");
        assert_eq!(clean_up(&machine, parts, name), [], "{name}");
        true
    });
}
