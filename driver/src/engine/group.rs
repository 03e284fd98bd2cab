//! Endpoints that cannot be isolated from each other, and are in one domain or in none (D-13).

use super::{DomainKey, EndpointRecord, Engine};
use crate::error::GroupError;
use crate::id::EndpointId;

impl Engine {
    /// Makes a group of endpoints that are known, in no domain, and in no group.
    pub(crate) fn group(&mut self, members: &[EndpointId]) -> Result<(), GroupError> {
        for id in members {
            let endpoint = self.endpoint(*id).ok_or(GroupError::Unknown(*id))?;
            if endpoint.domain().is_some() || endpoint.suspended.is_some() {
                return Err(GroupError::Attached(*id));
            }
            if endpoint.group.is_some() {
                return Err(GroupError::Grouped(*id));
            }
        }
        for id in members {
            if let Some(endpoint) = self.endpoint_mut(*id) {
                endpoint.group = members.first().copied();
            }
        }
        Ok(())
    }

    /// The next endpoint, after `after`, that is attached and detached with this one: itself, where it has no group.
    pub(crate) fn next_of_group(&self, id: EndpointId, after: Option<EndpointId>) -> Option<EndpointId> {
        let Some(group) = self.endpoint(id).and_then(|endpoint| endpoint.group) else {
            return after.is_none().then_some(id);
        };
        let next = |record: &&EndpointRecord| Some(record.id) > after && record.group == Some(group);
        self.endpoints.iter().find(next).map(|record| record.id)
    }

    /// Takes note of whether the embedder wants the endpoint attached. True while it wants one of its group.
    pub(crate) fn want(&mut self, id: EndpointId, wanted: bool) -> bool {
        let Some(endpoint) = self.endpoint_mut(id) else { return wanted };
        endpoint.wanted = wanted;
        let Some(group) = endpoint.group else { return wanted };
        self.endpoints.iter().any(|record| record.group == Some(group) && record.wanted)
    }

    /// Whether the endpoint, or one of its group, is in this domain, or may be.
    pub(crate) fn group_is_in(&self, id: EndpointId, key: DomainKey) -> bool {
        let Some(endpoint) = self.endpoint(id) else { return false };
        let same = |record: &&EndpointRecord| {
            record.id == id || (record.group.is_some() && record.group == endpoint.group)
        };
        self.endpoints.iter().filter(same).any(|record| record.domain() == Some(key))
    }

    /// Another endpoint of the group that is, or may be, in another domain than this.
    pub(super) fn group_elsewhere(&self, at: usize, key: DomainKey) -> Option<EndpointId> {
        let endpoint = &self.endpoints[at];
        let group = endpoint.group?;
        let elsewhere = |record: &&EndpointRecord| {
            let other = record.group == Some(group) && record.id != endpoint.id;
            other && record.domain().is_some_and(|domain| domain != key)
        };
        self.endpoints.iter().find(elsewhere).map(|record| record.id)
    }
}
