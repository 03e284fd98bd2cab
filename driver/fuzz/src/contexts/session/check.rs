//! What is reached, against what was said.

use virtio_iommu::contexts::Anonymous;
use virtio_iommu_model::AccessKind;

use super::{Domain, MEMBERS, PASIDS, Place, Session};
use crate::contexts::reach::{POINTS, point};

impl Session {
    /// Tries each address by each PASID for each endpoint.
    ///
    /// # Panics
    /// When one is reached that must not be, or is not that must, or when the driver broke a rule.
    pub fn check(&self) {
        let world = self.kernel.world();
        world.check_rules();
        for (place, endpoint) in self.places.iter().zip(MEMBERS) {
            for pasid in [None].into_iter().chain((0..=PASIDS).map(Some)) {
                for at in 0..POINTS {
                    for kind in [AccessKind::Read, AccessKind::Write] {
                        let found = world.reached(endpoint, pasid, point(at), kind);
                        let inside = |domain| self.allows(domain, pasid, at, kind, found);
                        let fits = match *place {
                            Place::Nowhere => found.is_none(),
                            Place::In(domain) => inside(domain),
                            Place::Unsure => found.is_none() || (0..self.domains.len()).any(inside),
                        };
                        let at = point(at);
                        assert!(
                            fits,
                            "{endpoint}, {place:?}, PASID {pasid:?} at {at:#x}, {kind:?}: reaches {found:x?}"
                        );
                    }
                }
            }
        }
        self.spaces.check(world);
    }

    /// Whether an access from inside of a domain may lead there.
    fn allows(
        &self,
        domain: usize,
        pasid: Option<u32>,
        at: usize,
        kind: AccessKind,
        found: Option<u64>,
    ) -> bool {
        let Domain { contexts, default, .. } = &self.domains[domain];
        let pasid = match (pasid, contexts.anonymous()) {
            (Some(pasid), _) => pasid,
            (None, None) => return default.allows(at, kind, found),
            (None, Some(Anonymous::Blocked)) => return found.is_none(),
            (None, Some(Anonymous::Bypasses)) => return found == Some(point(at)),
            (None, Some(Anonymous::Pasid0)) => 0,
        };
        let context = self.contexts.iter().find(|context| (context.domain, context.pasid) == (domain, pasid));
        context.map_or(found.is_none(), |context| context.reach.allows(at, kind, found))
    }
}
