//! Page requests of the draft: accesses that wait for the driver to map what they need (PROTOCOL 5.5).
//!
//! ```text
//!   endpoint: request_page (group 3), request_page (group 3, last) ---> two fault records with PAGE_REQ
//!   driver:   maps, then PAGE_RESP (group 3, success)              ---> take_page_answers: try again
//! ```

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::device::Device;
use crate::dma::Stop;
use crate::fault::{Access, AccessError, AccessKind, Fault, FaultReason};
use crate::memory::GuestMemory;
use crate::number::{Status, flag};
use crate::record::{LIST_LIMIT, push_bounded};
use crate::request::Request;

/// One request for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRequest {
    /// Who asks.
    pub endpoint: u32,
    /// For which context.
    pub pasid: Option<u32>,
    /// For which address.
    pub address: u64,
    /// What for.
    pub kind: AccessKind,
    /// The group that it belongs to.
    pub group: u16,
    /// Whether it is the last one of it.
    pub last: bool,
}

/// What the driver answered to a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageAnswer {
    /// Who had asked.
    pub endpoint: u32,
    /// For which context.
    pub pasid: Option<u32>,
    /// The group.
    pub group: u16,
    /// 0 success, 1 invalid, 2 failure. The device says 1 itself when the context went away.
    pub code: u16,
}

/// Why a page request, or an access that would make one, was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageError {
    /// As many groups wait as can, or the driver has not negotiated the draft.
    NoRoom,
    /// It was sent: the access is to be tried again after the answer.
    Waiting,
    /// No mapping would help.
    Access(AccessError),
}

/// Groups that wait for an answer, and answers that wait for the endpoint.
#[derive(Clone, Debug, Default)]
pub(crate) struct PageRequests {
    waiting: Vec<Group>,
    answers: VecDeque<PageAnswer>,
}

#[derive(Clone, Copy, Debug)]
struct Group {
    endpoint: u32,
    pasid: Option<u32>,
    group: u16,
    complete: bool,
}

impl Device {
    /// Asks the driver for a page. Nothing is checked: endpoints ask for what they like, and for the same again.
    ///
    /// # Errors
    ///
    /// [`PageError::NoRoom`]; it is counted.
    pub fn request_page(&mut self, mem: &mut dyn GuestMemory, page: PageRequest) -> Result<(), PageError> {
        let PageRequest { endpoint, pasid, address, kind, group, last } = page;
        let active = self.iommu.active(crate::number::feature::ATTACH_TABLE);
        let same =
            |other: &&mut Group| (other.endpoint, other.pasid, other.group) == (endpoint, pasid, group);
        let room = active && self.pages.waiting.len() < self.iommu.config.page_groups;
        match self.pages.waiting.iter_mut().find(same) {
            Some(known) => known.complete |= last,
            None if room => {
                self.pages.waiting.push(Group { endpoint, pasid, group, complete: last });
            }
            None => {
                self.counters.page_requests_dropped += 1;
                return Err(PageError::NoRoom);
            }
        }
        let fault =
            Fault { reason: FaultReason::Mapping, kind: Some(kind), endpoint, address: Some(address), pasid };
        self.push_fault(mem, &fault, Some((group, last)));
        Ok(())
    }

    /// An access that asks for a page, a group of one, where nothing is mapped.
    ///
    /// # Errors
    ///
    /// [`PageError::Waiting`] when it asked.
    pub fn access_or_request(
        &mut self,
        mem: &mut dyn GuestMemory,
        (endpoint, pasid): (u32, Option<u32>),
        iova: u64,
        access: Access<'_>,
        group: u16,
    ) -> Result<(), PageError> {
        let (address, kind, denied) = match self.try_access(mem, (endpoint, pasid), iova, access) {
            Ok(()) => return Ok(()),
            Err(Stop::NotMemory(error)) => return Err(PageError::Access(error.into())),
            Err(Stop::Denied(address, kind, denied)) => (address, kind, denied),
        };
        let helps = denied.reason == FaultReason::Mapping && self.iommu.has_context(endpoint, pasid);
        if !helps {
            return Err(PageError::Access(self.refuse(mem, (endpoint, pasid), address, kind, denied)));
        }
        self.request_page(mem, PageRequest { endpoint, pasid, address, kind, group, last: true })?;
        Err(PageError::Waiting)
    }

    /// Answers that came since the last call, oldest first.
    pub fn take_page_answers(&mut self) -> Vec<PageAnswer> {
        self.pages.answers.drain(..).collect()
    }

    /// Groups that wait for an answer.
    pub fn waiting_groups(&self) -> usize {
        self.pages.waiting.len()
    }

    /// PAGE_RESP.
    pub(crate) fn respond(&mut self, request: &Request) -> Status {
        let Request::PageResponse { endpoint, flags, pasid, group, code, reserved } = *request else {
            return Status::Unsupp;
        };
        if flags & !flag::PASID_VALID != 0 || code > 2 || reserved != 0 {
            return Status::Inval;
        }
        if !self.iommu.endpoints.contains_key(&endpoint) {
            return Status::NoEnt;
        }
        let pasid = (flags & flag::PASID_VALID != 0).then_some(pasid);
        let same = |other: &Group| (other.endpoint, other.pasid, other.group) == (endpoint, pasid, group);
        let Some(at) = self.pages.waiting.iter().position(same) else {
            return Status::NoEnt;
        };
        // Not before the last of the group.
        if !self.pages.waiting[at].complete {
            return Status::Inval;
        }
        self.pages.waiting.swap_remove(at);
        let answer = PageAnswer { endpoint, pasid, group, code };
        push_bounded(&mut self.pages.answers, answer, LIST_LIMIT);
        Status::Ok
    }

    /// Groups whose context went away are answered by the device itself.
    pub(crate) fn drop_orphaned_groups(&mut self) {
        let iommu = &self.iommu;
        let PageRequests { waiting, answers } = &mut self.pages;
        waiting.retain(|group| {
            let alive = iommu.has_context(group.endpoint, group.pasid);
            if !alive {
                let Group { endpoint, pasid, group, .. } = *group;
                push_bounded(answers, PageAnswer { endpoint, pasid, group, code: 1 }, LIST_LIMIT);
            }
            alive
        });
    }
}
