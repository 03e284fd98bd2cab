//! The agents: what does DMA through the device, and how this kernel tells it to.
//!
//! Beside a device that is software in this kernel they are its endpoints. Beside one on a bus they are out there with
//! it, and take commands through registers that lie behind the device's configuration (`qemu-tests/vhost/src/window.rs`
//! says how).

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use virtio_iommu::EndpointId;
use virtio_iommu_model::{Access, AccessError, PageError};

use super::access::LEN;
use crate::guest::VirtualIommu;
use crate::mmio::Mmio;

/// The ways to the agents.
pub(super) enum Agents {
    /// The device is in this kernel.
    Software(VirtualIommu),
    /// It is on a bus.
    Window(Window),
}

/// Why an access did not happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stopped {
    /// The IOMMU refused it.
    Blocked,
    /// It asked for a page, and waits for the answer.
    Waiting,
    /// The IOMMU let it through to where no memory is.
    NotMemory,
    /// As many accesses wait for pages as can.
    NoRoom,
    /// The agent does not do what it is told.
    Unclear(u32),
}

impl From<AccessError> for Stopped {
    fn from(error: AccessError) -> Self {
        match error {
            AccessError::Fault(_) => Self::Blocked,
            AccessError::NotMemory(_) => Self::NotMemory,
        }
    }
}

impl From<PageError> for Stopped {
    fn from(error: PageError) -> Self {
        match error {
            PageError::NoRoom => Self::NoRoom,
            PageError::Waiting => Self::Waiting,
            PageError::Access(error) => error.into(),
        }
    }
}

/// An answer that an agent got: the group, and 0 where it is to try again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Answered {
    pub group: u16,
    pub code: u16,
}

impl Agents {
    /// One access through a context.
    pub(super) fn access(
        &self,
        agent: EndpointId,
        pasid: Option<u32>,
        iova: u64,
        access: Access<'_>,
    ) -> Result<(), Stopped> {
        match self {
            Self::Software(device) => device
                .with(|device, guest| device.access_context(guest, agent.get(), pasid, iova, access))
                .map_err(Stopped::from),
            Self::Window(window) => match access {
                Access::Write(data) => window.write(agent, pasid, iova, data, WRITE),
                Access::Read(buf) => window.read(agent, pasid, iova, buf),
            },
        }
    }

    /// A write that waits for a page where none is.
    pub(super) fn touch(
        &self,
        agent: EndpointId,
        pasid: Option<u32>,
        iova: u64,
        data: &[u8; LEN],
        group: u16,
    ) -> Result<(), Stopped> {
        match self {
            Self::Software(device) => device
                .with(|device, guest| {
                    let (from, access) = ((agent.get(), pasid), Access::Write(data));
                    device.access_or_request(guest, from, iova, access, group)
                })
                .map_err(Stopped::from),
            Self::Window(window) => {
                window.0.write32(GROUP, group.into());
                window.write(agent, pasid, iova, data, WRITE_OR_ASK)
            }
        }
    }

    /// The answers that came since the last look.
    pub(super) fn take_answers(&self) -> Vec<Answered> {
        match self {
            Self::Software(device) => {
                let answers = device.with(|device, _| device.take_page_answers());
                answers.iter().map(|answer| Answered { group: answer.group, code: answer.code }).collect()
            }
            Self::Window(window) => {
                // There are never more than the groups that were asked for, one by one.
                let next = || window.run(TAKE_ANSWER).is_ok().then(|| window.0.read32(ANSWER));
                let answers = core::iter::from_fn(next).take(ANSWERS);
                answers.map(|word| Answered { group: word as u16, code: (word >> 16) as u16 }).collect()
            }
        }
    }

    /// Rules that the device saw this kernel's driver break.
    pub(super) fn violations(&self) -> usize {
        match self {
            Self::Software(device) => device.with(|device, _| device.violations().len()),
            Self::Window(window) => window.0.read32(VIOLATIONS) as usize,
        }
    }

    /// The device, where it is in this kernel.
    pub(super) fn software(&self) -> Option<&VirtualIommu> {
        match self {
            Self::Software(device) => Some(device),
            Self::Window(_) => None,
        }
    }

    /// What the device is, for people.
    pub(super) fn device(&self) -> &'static str {
        match self {
            Self::Software(_) => "a virtio-iommu in software",
            Self::Window(_) => "a virtio-iommu on a bus",
        }
    }
}

/// No more answers are taken at a time.
const ANSWERS: usize = 16;

/// Where the registers begin in the configuration, and how many bytes they are.
pub(super) const WINDOW: usize = 64;
const WINDOW_LEN: usize = 64;

const SIGNATURE: usize = 0x00;
const ENDPOINT: usize = 0x04;
const PASID: usize = 0x08;
const GROUP: usize = 0x0c;
const IOVA: usize = 0x10;
const DATA: usize = 0x18;
const COMMAND: usize = 0x28;
const OUTCOME: usize = 0x2c;
const ANSWER: usize = 0x30;
const VIOLATIONS: usize = 0x34;

const READ: u32 = 1;
const WRITE: u32 = 2;
const WRITE_OR_ASK: u32 = 3;
const TAKE_ANSWER: u32 = 4;

/// The agents' registers.
pub(super) struct Window(Mmio);

impl Window {
    /// Takes what lies behind a device's configuration for it, if it is.
    pub(super) fn new(registers: Mmio) -> Result<Self, String> {
        let len = registers.len_bytes();
        if len < WINDOW_LEN {
            return Err(format!("{len} bytes behind the configuration: no agents"));
        }
        match registers.read32(SIGNATURE).to_le_bytes() {
            [b'A', b'G', b'N', b'T'] => Ok(Self(registers)),
            other => Err(format!("{other:02x?} behind the configuration: no agents")),
        }
    }

    fn write(
        &self,
        agent: EndpointId,
        pasid: Option<u32>,
        iova: u64,
        data: &[u8],
        command: u32,
    ) -> Result<(), Stopped> {
        for (at, word) in data.chunks_exact(4).take(LEN / 4).enumerate() {
            let word = word.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte));
            self.0.write32(DATA + 4 * at, word);
        }
        self.aim(agent, pasid, iova);
        self.run(command)
    }

    fn read(&self, agent: EndpointId, pasid: Option<u32>, iova: u64, buf: &mut [u8]) -> Result<(), Stopped> {
        self.aim(agent, pasid, iova);
        self.run(READ)?;
        for (at, word) in buf.chunks_exact_mut(4).take(LEN / 4).enumerate() {
            word.copy_from_slice(&self.0.read32(DATA + 4 * at).to_le_bytes());
        }
        Ok(())
    }

    fn aim(&self, agent: EndpointId, pasid: Option<u32>, iova: u64) {
        self.0.write32(ENDPOINT, agent.get());
        self.0.write32(PASID, pasid.unwrap_or(u32::MAX));
        self.0.write32(IOVA, iova as u32);
        self.0.write32(IOVA + 4, (iova >> 32) as u32);
    }

    /// Gives a command, which is done when the store is, or at the latest before the look at what came of it.
    fn run(&self, command: u32) -> Result<(), Stopped> {
        self.0.write32(COMMAND, command);
        match self.0.read32(OUTCOME) {
            1 => Ok(()),
            2 => Err(Stopped::Blocked),
            3 => Err(Stopped::Waiting),
            4 => Err(Stopped::NotMemory),
            5 => Err(Stopped::NoRoom),
            other => Err(Stopped::Unclear(other)),
        }
    }
}
