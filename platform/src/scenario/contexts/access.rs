//! Accesses of agents, and the faults that the driver is told.

use alloc::format;
use alloc::string::String;

use virtio_iommu::{EndpointId, Fault};
use virtio_iommu_model::Access;

use super::World;
use super::agents::Stopped;

/// Where in a page, and how much.
pub(super) const OFFSET: u64 = 0x200;
pub(super) const LEN: usize = 16;
/// What an agent writes, and what it is to read.
pub(super) const SENT: u8 = 0xee;
/// What memory holds that must not be seen or changed.
pub(super) const SECRET: u8 = 0xc3;

impl World {
    /// One access of an agent, by the address of a page.
    pub(super) fn access(
        &self,
        agent: EndpointId,
        pasid: Option<u32>,
        iova: u64,
        access: Access<'_>,
    ) -> Result<(), Stopped> {
        self.agents.access(agent, pasid, iova + OFFSET, access)
    }

    /// Writes where that is allowed.
    pub(super) fn write(&self, agent: EndpointId, pasid: Option<u32>, iova: u64) -> Result<(), String> {
        let written = self.access(agent, pasid, iova, Access::Write(&[SENT; LEN]));
        written.map_err(|error| format!("the allowed write at {iova:#x}, {}, ends by {error:?}", by(pasid)))
    }

    /// Reads where that is allowed, and where [`SENT`] is.
    pub(super) fn read(&self, agent: EndpointId, pasid: Option<u32>, iova: u64) -> Result<(), String> {
        let mut bytes = [0; LEN];
        match self.access(agent, pasid, iova, Access::Read(&mut bytes)) {
            Ok(()) if bytes == [SENT; LEN] => Ok(()),
            other => {
                Err(format!("the allowed read at {iova:#x}, {}, gives {other:?}, {bytes:02x?}", by(pasid)))
            }
        }
    }

    /// A write that must be blocked, and reported with agent, address and PASID.
    pub(super) fn blocked(&self, agent: EndpointId, pasid: Option<u32>, iova: u64) -> Result<String, String> {
        self.forget_faults();
        match self.access(agent, pasid, iova, Access::Write(&[SENT; LEN])) {
            Err(Stopped::Blocked) => {}
            Ok(()) => return Err(format!("the write at {iova:#x}, {}, arrived", by(pasid))),
            Err(other) => return Err(format!("the write at {iova:#x}, {}, ends by {other:?}", by(pasid))),
        }
        let Some(fault) = self.next_fault() else {
            return Err(format!("the write at {iova:#x}, {}, was blocked and not reported", by(pasid)));
        };
        let told = (fault.endpoint, fault.pasid.map(|pasid| pasid.get()), fault.address.map(|at| at.get()));
        if told != (agent, pasid, Some(iova + OFFSET)) {
            return Err(format!("a fault of something else: {fault}, {told:?}"));
        }
        self.no_fault()?;
        Ok(format!("write at {iova:#x} blocked and reported, {}", by(pasid)))
    }

    pub(super) fn no_fault(&self) -> Result<(), String> {
        self.next_fault().map_or(Ok(()), |fault| Err(format!("a fault that nobody caused: {fault}")))
    }

    pub(super) fn next_fault(&self) -> Option<Fault> {
        self.driver.poll();
        self.driver.next_fault()
    }

    pub(super) fn forget_faults(&self) {
        while self.next_fault().is_some() {}
    }
}

/// Which context, for people.
fn by(pasid: Option<u32>) -> String {
    pasid.map_or_else(|| "no PASID".into(), |pasid| format!("PASID {pasid}"))
}
