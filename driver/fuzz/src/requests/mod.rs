//! A driver that sends anything, on a device of the draft: each request, and each way to get it wrong.
//!
//! The device is the model, alone or with nested spaces behind it. It answers every request at once, with a status unless the
//! request is none; carries out nothing that breaks a rule; and has mapped what it said, as a second reading of the same bytes
//! has it. With nested spaces the machine's device has all of that, and no more than the guest's memory.

pub mod account;
pub mod form;
pub mod guest;
pub mod nested;

use arbitrary::{Arbitrary, Result, Unstructured};
use virtio_iommu_model::{Access, AccessKind, Config, PageRequest, feature};

use crate::session::ENDPOINTS;
use crate::trace;
use account::{Account, length};
use form::{Damage, Form};
use guest::{Answer, Guest, MAX_REQUEST, TABLE_PAGES, TABLES};
use nested::Outer;

const PAGE: u64 = 4096;
/// The most steps of one input: after each everything is tried.
const MAX_STEPS: usize = 100;
/// The longest writable part that is answered.
const MAX_ROOM: usize = 65_536;
/// The highest status.
const NOMEM: u8 = 8;

/// One step of an input.
#[derive(Clone, Debug, Arbitrary)]
enum Step {
    /// A request that makes sense, and what is wrong with it.
    Formed { form: Form, damage: Damage, cut: u8, room: Room },
    /// Any bytes.
    Bytes { bytes: Vec<u8>, cut: u8, room: Room },
    /// An entry of a table.
    Entry { page: u8, index: u16, to: u8, bits: u16, high: u8 },
    /// An endpoint does DMA.
    Access { endpoint: u8, pasid: Option<u8>, address: u64, len: u8, write: bool },
    /// An endpoint asks for a page.
    Ask { endpoint: u8, pasid: Option<u8>, page: u8, group: u8, last: bool },
    /// The machine is reset. Whether the next driver takes the draft.
    Restart { draft: bool },
}

/// The room for an answer.
#[derive(Clone, Copy, Debug, Arbitrary)]
enum Room {
    Tail,
    Properties,
    Any(u8),
    TooLarge,
}

impl Room {
    fn bytes(self) -> usize {
        match self {
            Self::Tail => 4,
            Self::Properties => 516,
            Self::Any(bytes) => bytes.into(),
            Self::TooLarge => MAX_ROOM + 1,
        }
    }
}

/// A guest, what its device must have, and what is around it.
struct Run {
    guest: Guest,
    account: Account,
    draft: bool,
    outer: Option<Outer>,
}

/// Runs an input.
///
/// # Errors
/// When the bytes are too few for a set-up.
///
/// # Panics
/// When the device does not keep its promises.
pub fn run(data: &[u8]) -> Result<()> {
    let mut input = Unstructured::new(data);
    let nested = bool::arbitrary(&mut input)?;
    let config = Config { log_limit: 0, page_groups: 4, bypass: false, ..Config::contexts() };
    let features = config.features;
    let mut guest = Guest::new(config, features);
    let outer = if nested { Outer::new() } else { None };
    if let Some(outer) = &outer {
        guest.device.set_backend(outer.backend());
    }
    let mut run = Run { guest, account: Account::new(true), draft: true, outer };
    for _ in 0..MAX_STEPS {
        let Ok(step) = Step::arbitrary(&mut input) else { break };
        trace("step", &step);
        run.step(step);
        run.account.check(&mut run.guest.device, &run.guest.memory);
        if let Some(outer) = &run.outer {
            outer.check(&run.account);
        }
        if input.is_empty() {
            break;
        }
    }
    Ok(())
}

impl Run {
    fn step(&mut self, step: Step) {
        match step {
            Step::Formed { form, damage, cut, room } => {
                let mut bytes = form.encode();
                damage.apply(&mut bytes);
                self.send(&bytes, cut.into(), room.bytes());
            }
            Step::Bytes { bytes, cut, room } => self.send(&bytes, cut.into(), room.bytes()),
            Step::Entry { page, index, to, bits, high } => {
                let at = TABLES + PAGE * (u64::from(page) % TABLE_PAGES) + 8 * u64::from(index % 512);
                let to = TABLES + PAGE * (u64::from(to) % TABLE_PAGES);
                // x86-64 and Arm have addresses in place, RISC-V two bits lower.
                let to = if high & 1 == 0 { to } else { to >> 2 };
                let entry = to | u64::from(bits & 0xfff) | u64::from(high & !1) << 56;
                self.guest.put(at, &entry.to_le_bytes());
            }
            Step::Access { endpoint, pasid, address, len, write } => {
                let endpoint = ENDPOINTS[usize::from(endpoint) % ENDPOINTS.len()].get();
                let mut bytes = vec![0x3c; len.into()];
                let access = if write { Access::Write(&bytes.clone()) } else { Access::Read(&mut bytes) };
                let (device, memory) = (&mut self.guest.device, &mut self.guest.memory);
                trace(
                    "    ",
                    &device.access_context(memory, endpoint, pasid.map(u32::from), address, access),
                );
            }
            Step::Ask { endpoint, pasid, page, group, last } => {
                let request = PageRequest {
                    endpoint: ENDPOINTS[usize::from(endpoint) % ENDPOINTS.len()].get(),
                    pasid: pasid.map(|pasid| u32::from(pasid % 4)),
                    address: PAGE * u64::from(page),
                    kind: AccessKind::Read,
                    group: u16::from(group % 8),
                    last,
                };
                let (device, memory) = (&mut self.guest.device, &mut self.guest.memory);
                trace("    ", &device.request_page(memory, request));
                assert!(device.waiting_groups() <= device.config().page_groups);
            }
            Step::Restart { draft } => self.restart(draft),
        }
    }

    /// Endpoints are detached before, as a backend wants it.
    fn restart(&mut self, draft: bool) {
        for endpoint in ENDPOINTS.map(|endpoint| endpoint.get()) {
            if let Some(domain) = self.guest.device.domain_of(endpoint) {
                let mut detach = vec![0; 20];
                detach[0] = 2;
                detach[4..8].copy_from_slice(&domain.to_le_bytes());
                detach[8..12].copy_from_slice(&endpoint.to_le_bytes());
                self.send(&detach, 0, 4);
            }
        }
        let offered = self.guest.device.config().features;
        self.guest.restart(if draft { offered } else { offered & !feature::ATTACH_TABLE });
        (self.account, self.draft) = (Account::new(draft), draft);
    }

    fn send(&mut self, bytes: &[u8], cut: usize, room: usize) {
        let bytes = &bytes[..bytes.len().min(MAX_REQUEST)];
        let waiting = self.guest.device.waiting_groups();
        let answer = self.guest.send(bytes, cut, room);
        trace("    ", &answer.status());
        let kind = bytes.first().and_then(|kind| length(*kind, self.draft));
        let Some(len) = kind.filter(|_| bytes.len() >= 4 && (4..=MAX_ROOM).contains(&room)) else {
            assert!(answer.is_untouched(), "what is no request was answered: {answer:?}");
            return;
        };
        let status = whole(&answer, room);
        let refused = status != 0;
        assert!(refused || bytes.len() >= len, "a request that is too short was carried out");
        if bytes.len() >= len {
            self.account.answered(bytes, status);
        }
        let answered = bytes[0] == 8 && !refused;
        let groups = self.guest.device.waiting_groups();
        assert!(!answered || groups + 1 == waiting, "a group that does not wait was answered");
        assert!(answered || bytes[0] < 3 || groups == waiting, "groups went from {waiting} to {groups}");
    }
}

/// The status of an answer that is written whole.
fn whole(answer: &Answer, room: usize) -> u8 {
    assert_eq!(answer.used_len as usize, room, "the length of an answer");
    let status = answer.status().expect("it was written");
    assert!(status <= NOMEM && answer.bytes[room - 3..] == [0; 3], "{answer:?}");
    status
}
