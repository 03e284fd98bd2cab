//! QEMU and its imitation by the model, kept in step.

use std::collections::VecDeque;

use qtest::{Answer, EDU, Machine, ModelPeer, Peer, QemuPeer, Ram, Request, Requester, Transfer};
use virtio_iommu_model::{Access, AccessError, Config, Device, Endpoint};

use super::generate::{Op, PATTERN_LEN, TARGET, TARGET_LEN};
use crate::support::{ENDPOINTS, imitation, pattern};

/// What a PROBE without enough room is answered.
const DEVERR: u8 = 3;
/// Operations that a failure is shown with.
const SHOWN: usize = 24;

/// What came of an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    Answer(Answer),
    Nothing,
}

/// Two devices that get the same operations.
pub(super) struct Pair<'a> {
    machine: &'a Machine,
    qemu: (QemuPeer<'a>, Requester),
    pub(super) like: (ModelPeer, Requester),
    /// What was done last, for the report.
    pub(super) history: VecDeque<String>,
    pub(super) operations: u64,
    /// Accesses that reached memory, that were refused, and that bypassed to where nothing is.
    pub(super) accesses: [u64; 3],
    data: Vec<u8>,
}

/// A model with the machine's endpoints, its log off.
pub(super) fn model(config: Config) -> (ModelPeer, Requester) {
    let mut device = Device::new(Config { log_limit: 0, ..config });
    for endpoint in ENDPOINTS {
        device.add_endpoint(Endpoint::x86(endpoint.get()));
    }
    let mut peer = ModelPeer::new(device);
    let requester = Requester::start(&mut peer);
    (peer, requester)
}

impl<'a> Pair<'a> {
    pub(super) fn new(machine: &'a Machine) -> Self {
        let mut peer = QemuPeer::new(machine);
        let requester = Requester::start(&mut peer);
        let data = pattern(0xdead, PATTERN_LEN);
        // Nothing is attached yet: the devices reach memory as it is.
        machine.ram().write(Ram::HEAP, &data);
        for edu in [&machine.edu, &machine.edu2] {
            edu.transfer(Transfer::FromMemory, Ram::HEAP, 0, PATTERN_LEN);
        }
        Self {
            machine,
            qemu: (peer, requester),
            like: model(imitation(machine.version()).0),
            history: VecDeque::new(),
            operations: 0,
            accesses: [0; 3],
            data,
        }
    }

    /// The imitation's state, which is QEMU's as long as they agree.
    pub(super) fn device(&self) -> &Device {
        &self.like.0.device
    }

    /// Does one operation on both.
    ///
    /// # Errors
    /// What differs.
    pub(super) fn apply(&mut self, op: &Op) -> Result<Seen, String> {
        self.operations += 1;
        let (seen, like) = match op {
            Op::Request(request) => {
                let ours = self.qemu.1.send(&mut self.qemu.0, request);
                let like = self.like.1.send(&mut self.like.0, request);
                (Seen::Answer(ours), Seen::Answer(like))
            }
            Op::Reset => {
                self.qemu.1 = Requester::start(&mut self.qemu.0);
                self.like.1 = Requester::start(&mut self.like.0);
                (Seen::Nothing, Seen::Nothing)
            }
            Op::Bypass(value) => {
                self.qemu.0.write_bypass(*value);
                self.like.0.write_bypass(*value);
                (Seen::Nothing, Seen::Nothing)
            }
            Op::Access { endpoint, transfer, iova, offset, len } => {
                self.access(*endpoint, *transfer, *iova, *offset, *len)?;
                (Seen::Nothing, Seen::Nothing)
            }
        };
        if self.history.len() == SHOWN {
            self.history.pop_front();
        }
        self.history.push_back(format!("{op:x?} -> {}", short(&seen)));
        match alike(&seen, &like) {
            true => Ok(seen),
            false => Err(format!("QEMU: {}, the model: {}", short(&seen), short(&like))),
        }
    }

    /// Lets both endpoints do an access, and compares memory and the fault record.
    fn access(
        &mut self,
        endpoint: u32,
        transfer: Transfer,
        iova: u64,
        offset: usize,
        len: usize,
    ) -> Result<(), String> {
        let edu = if endpoint == EDU.get() { &self.machine.edu } else { &self.machine.edu2 };
        edu.transfer(transfer, iova, offset, len);
        let (peer, requester) = &mut self.like;
        let mut buffer = vec![0; len];
        let access = match transfer {
            Transfer::FromMemory => Access::Read(&mut buffer),
            Transfer::ToMemory => Access::Write(&self.data[offset..offset + len]),
        };
        let outcome = peer.device.access(&mut peer.memory, endpoint, iova, access);
        let expected = requester.next_event(peer);
        self.accesses[match &outcome {
            Ok(()) => 0,
            Err(AccessError::Fault(_)) => 1,
            Err(AccessError::NotMemory(_)) => 2,
        }] += 1;
        // One record for each piece of the access: the first counts, and the rest says the same.
        let (peer, requester) = &mut self.qemu;
        let found = requester.next_event(peer);
        while requester.next_event(peer).is_some() {}
        if found != expected {
            return Err(format!(
                "fault records differ: QEMU {found:x?}, the model {expected:x?}, {outcome:?}"
            ));
        }
        // An access that faults midway may have written its first bytes in one and not in the other.
        if matches!(outcome, Err(AccessError::Fault(_))) && transfer == Transfer::ToMemory && len > 1 {
            let bytes = self.machine.ram().bytes(TARGET, TARGET_LEN);
            self.like.0.write(TARGET, &bytes);
            return Ok(());
        }
        self.compare_memory()
    }

    /// Compares what mappings lead to.
    fn compare_memory(&self) -> Result<(), String> {
        let found = self.machine.ram().bytes(TARGET, TARGET_LEN);
        let mut expected = vec![0; TARGET_LEN];
        self.like.0.read(TARGET, &mut expected);
        // The quick way first: this is half a MiB each time.
        if found == expected {
            return Ok(());
        }
        match found.iter().zip(&expected).position(|(found, expected)| found != expected) {
            None => Ok(()),
            Some(at) => Err(format!(
                "memory at {:#x} is {:#x} with QEMU and {:#x} with the model",
                TARGET + at as u64,
                found[at],
                expected[at]
            )),
        }
    }

    /// Detaches everything, so that no domain is left.
    ///
    /// # Errors
    /// What differs.
    pub(super) fn clean(&mut self) -> Result<(), String> {
        for endpoint in ENDPOINTS {
            if let Some(domain) = self.device().domain_of(endpoint.get()) {
                self.apply(&Op::Request(Request::detach(domain, endpoint.get())))?;
            }
        }
        assert_eq!(self.device().domains().count(), 0);
        Ok(())
    }
}

/// Whether two answers are the same, with what lies behind the used length. There QEMU 10 leaves properties
/// that it had written before it found that there was no room for all; nobody may look at them.
fn alike(seen: &Seen, like: &Seen) -> bool {
    match (seen, like) {
        (
            Seen::Answer(Answer::Used { len, written }),
            Seen::Answer(like @ Answer::Used { len: like_len, written: expected }),
        ) if like.status() == Some(DEVERR) => {
            let used = *len as usize;
            len == like_len && written.get(..used) == expected.get(..used)
        }
        _ => seen == like,
    }
}

fn short(seen: &Seen) -> String {
    match seen {
        Seen::Nothing => "done".to_owned(),
        Seen::Answer(Answer::Unanswered { status }) => format!("no answer, device status {status:#x}"),
        Seen::Answer(answer @ Answer::Used { len, written }) => {
            let shown = &written[..written.len().min(32)];
            format!("status {:?}, used length {len}, {shown:x?}", answer.status())
        }
    }
}
