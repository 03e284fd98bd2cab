//! Page requests: what endpoints ask for, collected by group, and the answers.
//!
//! ```text
//!   fault with page_request ---> PageGroups::take ---> Complete(group) ---> map each page ---> Viommu::respond
//!                                      '- Waiting (more of the group come), Refused (answer it at once)
//! ```

use super::pasid::PageGroupId;
use crate::addr::Iova;
use crate::wire::fault::{Fault, FaultAccess};
use alloc::vec::Vec;

/// The answer to a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageAnswer {
    /// The accesses are tried again.
    Success,
    /// They end with an error; the endpoint may ask again.
    Invalid,
    /// They end with an error, and the endpoint stops asking.
    Failure,
}

impl PageAnswer {
    pub(super) fn code(self) -> u16 {
        match self {
            Self::Success => 0,
            Self::Invalid => 1,
            Self::Failure => 2,
        }
    }
}

/// One page that an endpoint asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageWanted {
    /// An address in it.
    pub address: Iova,
    /// What for.
    pub access: FaultAccess,
}

/// Page requests that get one answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageGroup {
    /// What the answer names.
    pub id: PageGroupId,
    /// The pages, in the order in which they were asked for.
    pub pages: Vec<PageWanted>,
    /// Faults that were taken in since its first request.
    age: u64,
    /// It has more pages than there is room for: it is refused with its last request.
    overflowed: bool,
}

/// What became of a fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Taken {
    /// It asks for nothing.
    NotARequest,
    /// More of its group are to come.
    Waiting,
    /// Its group is complete: map its pages, and answer it.
    Complete(PageGroup),
    /// There is no room for it, or it does not say which page. Where it is the last one, its group is to be answered with
    /// [`PageAnswer::Invalid`]; before that the device takes no answer.
    Refused(PageGroupId),
}

/// Groups of which more is to come. Bounded: endpoints ask for as much as they like.
#[derive(Debug)]
pub struct PageGroups {
    groups: Vec<PageGroup>,
    max_groups: usize,
    max_pages: usize,
}

impl PageGroups {
    /// Room for `max_groups` incomplete groups of `max_pages` pages.
    pub fn new(max_groups: usize, max_pages: usize) -> Self {
        Self { groups: Vec::with_capacity(max_groups), max_groups, max_pages }
    }

    /// Takes a fault in. Allocates.
    ///
    /// A group of one never takes room. One that finds none is refused until its last request, which is then taken for all
    /// of it: the endpoint asks again for the others.
    pub fn take(&mut self, fault: &Fault) -> Taken {
        let Some(id) = fault.page_request else { return Taken::NotARequest };
        for group in &mut self.groups {
            group.age = group.age.saturating_add(1);
        }
        let same =
            |group: &PageGroup| PageGroupId { last: false, ..group.id } == PageGroupId { last: false, ..id };
        let page = fault.address.map(|address| PageWanted { address, access: fault.access });
        let Some(at) = self.groups.iter().position(same) else { return self.begin(id, page) };
        let group = &mut self.groups[at];
        match page {
            Some(page) if group.pages.len() < self.max_pages => group.pages.push(page),
            _ => group.overflowed = true,
        }
        if !id.last {
            return Taken::Waiting;
        }
        let group = self.groups.swap_remove(at);
        match group.overflowed {
            true => Taken::Refused(id),
            false => Taken::Complete(PageGroup { id, ..group }),
        }
    }

    /// The first request of a group.
    fn begin(&mut self, id: PageGroupId, page: Option<PageWanted>) -> Taken {
        let overflowed = page.is_none();
        let group = PageGroup { id, pages: page.into_iter().collect(), age: 0, overflowed };
        match id.last {
            true if overflowed => Taken::Refused(id),
            true => Taken::Complete(group),
            false if self.groups.len() < self.max_groups => {
                self.groups.push(group);
                Taken::Waiting
            }
            false => Taken::Refused(id),
        }
    }

    /// Takes out a group whose last request did not come while `faults` others did: its record was lost. The device
    /// takes no answer to it before its last one.
    pub fn take_overdue(&mut self, faults: u64) -> Option<PageGroup> {
        let at = self.groups.iter().position(|group| group.age >= faults)?;
        Some(self.groups.swap_remove(at))
    }

    /// Groups of which more is to come.
    pub fn waiting(&self) -> usize {
        self.groups.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contexts::Pasid;
    use crate::id::EndpointId;
    use crate::wire::fault::FaultReason;

    fn request(group: u16, address: u64, last: bool) -> Fault {
        let endpoint = EndpointId::new(8);
        Fault {
            reason: FaultReason::Mapping,
            access: FaultAccess::READ,
            endpoint,
            address: Some(Iova::new(address)),
            domain: None,
            tag: None,
            pasid: Pasid::new(1),
            page_request: Some(PageGroupId { endpoint, pasid: Pasid::new(1), group, last }),
        }
    }

    fn pages(taken: Taken) -> Vec<u64> {
        match taken {
            Taken::Complete(group) => group.pages.iter().map(|page| page.address.get()).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn groups_are_told_apart_and_end_with_their_last() {
        let mut groups = PageGroups::new(2, 3);
        assert_eq!(groups.take(&request(1, 0x1000, false)), Taken::Waiting);
        assert_eq!(groups.take(&request(2, 0x2000, false)), Taken::Waiting);
        assert_eq!(pages(groups.take(&request(3, 0x3000, true))), [0x3000]);
        assert_eq!(groups.take(&request(1, 0x1001, false)), Taken::Waiting);
        assert_eq!(pages(groups.take(&request(1, 0x4000, true))), [0x1000, 0x1001, 0x4000]);
        assert_eq!(groups.waiting(), 1);
        let fault = Fault { page_request: None, ..request(2, 0, true) };
        assert_eq!(groups.take(&fault), Taken::NotARequest);
    }

    #[test]
    fn floods_find_an_end() {
        let mut groups = PageGroups::new(2, 2);
        let refused = |taken| matches!(taken, Taken::Refused(_));
        for group in 0..100 {
            assert_eq!(refused(groups.take(&request(group, 0, false))), group >= 2);
        }
        // More pages than there is room for: all of it is refused, with its last.
        for address in 1..4 {
            assert_eq!(groups.take(&request(0, address, false)), Taken::Waiting);
        }
        assert!(refused(groups.take(&request(0, 4, true))));
        assert_eq!(groups.waiting(), 1);
        let nowhere = Fault { address: None, ..request(9, 0, true) };
        assert!(refused(groups.take(&nowhere)));
    }

    #[test]
    fn a_last_that_never_comes_is_noticed() {
        let mut groups = PageGroups::new(2, 2);
        groups.take(&request(1, 0, false));
        for _ in 0..3 {
            assert_eq!(groups.take_overdue(3), None);
            groups.take(&request(2, 0, true));
        }
        assert_eq!(groups.take_overdue(3).map(|group| group.id.group), Some(1));
        assert_eq!(groups.waiting(), 0);
    }
}
