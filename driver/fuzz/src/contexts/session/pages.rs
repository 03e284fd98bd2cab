//! Page requests: endpoints ask, and the kernel answers or does not.

use virtio_iommu::RequestError;
use virtio_iommu::contexts::{PageAnswer, PageGroupId, Taken};
use virtio_iommu_model::{AccessKind, PageRequest};

use super::{GROUPS, MEMBERS, PAGES_OF_GROUP, PASIDS, Session, pick};
use crate::contexts::reach::{POINTS, point};
use crate::trace;

impl Session {
    /// An endpoint asks for a page, whatever there is.
    pub(super) fn ask(&mut self, endpoint: u8, pasid: u8, at: u8, group: u8, last: bool) {
        let page = PageRequest {
            endpoint: MEMBERS[usize::from(endpoint) % MEMBERS.len()].get(),
            pasid: (pasid > 0).then(|| u32::from(pasid) % (PASIDS + 1)),
            address: point(usize::from(at) % POINTS),
            kind: AccessKind::Read,
            group: u16::from(group % 8),
            last,
        };
        let asked = self.kernel.world().with(|device, ram| device.request_page(ram, page));
        trace("    ", &asked);
        self.poll();
    }

    pub(super) fn poll(&mut self) {
        self.viommu.poll();
        // Bounded by the backlog.
        while let Some(fault) = self.viommu.next_fault() {
            assert!(!fault.to_string().is_empty());
            match self.groups.take(&fault) {
                Taken::Complete(group) => {
                    assert!(group.pages.len() <= PAGES_OF_GROUP, "{group:?}");
                    if self.complete.len() < GROUPS {
                        self.complete.push(group);
                    }
                }
                Taken::Refused(id) if id.last => drop(self.respond(id, PageAnswer::Invalid)),
                Taken::Refused(_) | Taken::Waiting | Taken::NotARequest => {}
            }
            assert!(self.groups.waiting() <= GROUPS);
        }
    }

    fn respond(&self, id: PageGroupId, answer: PageAnswer) -> Result<(), RequestError> {
        let done = self.viommu.respond(id, answer);
        trace("    ", &done);
        done
    }

    /// Maps what a group asks for where a context can, and answers it.
    pub(super) fn answer(&mut self, context: u8, code: u8) {
        let Some(group) = self.complete.pop() else { return };
        if let Some(context) = pick(self.contexts.len(), context) {
            for page in &group.pages {
                let at = (0..POINTS).position(|at| point(at) == page.address.get()).unwrap_or(0);
                self.map(context, at as u8, 0, true);
            }
        }
        let answer = [PageAnswer::Success, PageAnswer::Invalid, PageAnswer::Failure][usize::from(code) % 3];
        let _ = self.respond(group.id, answer);
    }
}
