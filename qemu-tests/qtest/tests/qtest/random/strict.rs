//! QEMU against the strict model: a sequence ends at the first difference, which has to be a known one.

use std::time::Instant;

use qtest::{Answer, Machine, ModelPeer, Peer as _, Request, Requester};
use virtio_iommu::EndpointId;
use virtio_iommu_model::{Config, Device, Mapping};

use super::expected::{DIFFERENCES, Difference, Event, Shows, Status, Versions};
use super::generate::{Accesses, Generator, Op};
use super::pair::{Pair, Seen, model};
use super::{DEFAULT_SEED, SEED, SEQUENCES, fail, number};
use crate::support::{ENDPOINTS, imitation};

pub(super) fn only_listed_differences(machine: &Machine) {
    let (seed, sequences) = (number(SEED, DEFAULT_SEED) ^ 0x57c1, number(SEQUENCES, 2_500));
    let name = imitation(machine.version()).1;
    let since = Instant::now();
    let mut pair = Pair::new(machine);
    let mut generator = Generator::new(seed, machine.version());
    let mut used = [0u64; DIFFERENCES.len()];
    for sequence in 0..sequences {
        let strict = Config { quirks: Default::default(), ..pair.device().config().clone() };
        let mut strict = Strict(model(strict));
        for _ in 0..generator.rng.u32(20..140) {
            let op = generator.next(pair.device(), Accesses::Without);
            match step(&mut pair, &mut strict, &op) {
                Ok(None) => {}
                Ok(Some(row)) => {
                    used[row] += 1;
                    break;
                }
                Err(difference) => fail(&pair, seed, sequence, &difference),
            }
        }
        if let Err(difference) = pair.clean() {
            fail(&pair, seed, sequence, &difference);
        }
    }
    println!(
        "QEMU {} and the strict model: seed {seed:#x}, {sequences} sequences, {} operations, {:.1} s; differences:",
        machine.version(),
        pair.operations,
        since.elapsed().as_secs_f64()
    );
    let mut unused = Vec::new();
    for (difference, count) in DIFFERENCES.iter().zip(used) {
        let expected = match difference.versions {
            Versions::All => true,
            Versions::Later => name != "QEMU 7.2",
            Versions::Earlier => name != "QEMU 11.1",
        };
        println!("  {count:5}  {}", difference.what);
        if expected != (count > 0) {
            unused.push(difference.what);
        }
    }
    assert_eq!(unused, [""; 0], "listed for this version and not met, or the other way round");
}

/// The strict model and its queue.
struct Strict((ModelPeer, Requester));

impl Strict {
    fn device(&self) -> &Device {
        &self.0.0.device
    }

    fn send(&mut self, request: &Request) -> Answer {
        self.0.1.send(&mut self.0.0, request)
    }
}

/// Does one operation on all three. Returns the known difference that it met.
fn step(pair: &mut Pair<'_>, strict: &mut Strict, op: &Op) -> Result<Option<usize>, String> {
    let request = match op {
        Op::Request(request) => Some(request),
        _ => None,
    };
    if let Op::Bypass(value) = op {
        strict.0.0.write_bypass(*value);
        return pair.apply(op).map(|_| None);
    }
    let possible: Vec<usize> = {
        let event = Event::new(request, strict.device());
        (0..DIFFERENCES.len()).filter(|row| (DIFFERENCES[*row].applies)(&event)).collect()
    };
    let found = pair.apply(op)?;
    let expected = match request {
        Some(request) => Seen::Answer(strict.send(request)),
        None => {
            strict.0.1 = Requester::start(&mut strict.0.0);
            Seen::Nothing
        }
    };
    let ours = (status_and_length(&found), status_and_length(&expected));
    let other_state = state_difference(pair.device(), strict.device());
    if ours.0 == ours.1 && other_state.is_none() {
        return Ok(None);
    }
    let known =
        possible.into_iter().find(|row| shows(&DIFFERENCES[*row], ours.0, ours.1, other_state.is_some()));
    let Some(row) = known else {
        return Err(format!("not listed: QEMU {found:x?}, the strict model {expected:x?}, {other_state:x?}"));
    };
    if let (Shows::State(_), Some(witness)) = (DIFFERENCES[row].shows, other_state) {
        // That QEMU's state is what its imitation says is seen by one more request.
        let ours = pair.apply(&Op::Request(witness.clone()))?;
        let theirs = Seen::Answer(strict.send(&witness));
        if status_and_length(&ours) == status_and_length(&theirs) {
            return Err(format!("{witness:x?} should have shown a difference: {ours:x?}"));
        }
    }
    Ok(Some(row))
}

fn shows(difference: &Difference, qemu: (Status, u32), strict: (Status, u32), state: bool) -> bool {
    match difference.shows {
        Shows::Status(theirs, ours) => qemu.0 != strict.0 && theirs.contains(&qemu.0) && strict.0 == ours,
        Shows::State(status) => state && qemu.0 == strict.0 && qemu.0 == status,
        Shows::Length => qemu.0 == strict.0 && qemu.1 < strict.1 && !state,
    }
}

/// The status of an answer and its used length. A reset counts as one that is OK.
fn status_and_length(seen: &Seen) -> (Status, u32) {
    match seen {
        Seen::Nothing => (Some(0), 0),
        Seen::Answer(answer @ Answer::Used { len, .. }) => (answer.status(), *len),
        Seen::Answer(Answer::Unanswered { .. }) => (None, u32::MAX),
    }
}

/// A request that two devices in these states answer differently, or `None` if the states are the same.
fn state_difference(qemu: &Device, strict: &Device) -> Option<Request> {
    for endpoint in ENDPOINTS.map(EndpointId::get) {
        let (ours, theirs) = (qemu.domain_of(endpoint), strict.domain_of(endpoint));
        if ours != theirs {
            return ours.or(theirs).map(|domain| Request::detach(domain, endpoint));
        }
    }
    for domain in qemu.domains() {
        let ours: Vec<Mapping> = qemu.mappings(domain).collect();
        let theirs: Vec<Mapping> = strict.mappings(domain).collect();
        let only =
            |some: &[Mapping], others: &[Mapping]| some.iter().find(|one| !others.contains(one)).copied();
        if let Some(one) = only(&ours, &theirs).or_else(|| only(&theirs, &ours)) {
            return Some(Request::map(domain, (one.virt_first, one.virt_last), one.phys_first, 3));
        }
    }
    None
}
