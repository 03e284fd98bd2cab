//! Random churn with a device that fails now and then: what came back is mapped nowhere.

use super::*;
use crate::support::Rng;
use virtio_iommu_model::{Execute, Inject, Release};

const TROUBLE: [Inject; 7] = [
    Inject::Refuse(4),
    Inject::Refuse(5),
    Inject::Unwritten,
    Inject::Status(0x99),
    Inject::Hold(Execute::Now),
    Inject::Hold(Execute::AtRelease),
    Inject::UsedLen(0),
];

/// Fails when anything goes back before its UNMAP was confirmed, in any order of things.
#[test]
fn what_came_back_is_mapped_nowhere() {
    for seed in 0..60 {
        let mut random = Rng::new(seed);
        let bounds = DeferredBounds {
            mappings: 1 + random.below(12) as usize,
            bytes: (1 + random.below(20)) * PAGE,
            age_ns: 1_000 + random.below(100_000),
        };
        let domain = DomainOptions { mappings: 20, ..policy(bounds) };
        let opened = Opened::new(Config::default(), domain, EndpointOptions::default());
        let mut live: Vec<DmaMapping> = Vec::new();
        let mut lent = Vec::new();
        for _ in 0..150 {
            match random.below(12) {
                0..=3 => {
                    let (held, phys) = opened.machine.lend(PAGE);
                    match opened.endpoint.adopt(held, Direction::Both) {
                        Ok(mapping) => {
                            live.push(mapping);
                            lent.push(phys);
                        }
                        Err((_, Some(held))) => opened.machine.take_returned(held),
                        Err((_, None)) => lent.push(phys),
                    }
                }
                4..=8 if !live.is_empty() => {
                    let mapping = live.swap_remove(random.below(live.len() as u64) as usize);
                    let _ = opened.endpoint.unmap(mapping);
                }
                9 => drop(opened.endpoint.flush()),
                10 => {
                    opened.machine.pass_time(random.below(50_000));
                    opened.machine.release(Release::All);
                    opened.viommu.poll();
                    opened.viommu.reclaim();
                }
                _ if random.below(2) == 0 => {
                    opened.machine.inject([TROUBLE[random.below(TROUBLE.len() as u64) as usize]]);
                }
                _ => {}
            }
            let mapped = opened.mapped_on_device();
            for phys in lent.iter().filter(|phys| opened.machine.is_lent_back(**phys)) {
                assert!(!mapped.contains(&phys.get()), "seed {seed}: {phys} went back, and is mapped");
            }
            assert!(live.iter().all(|mapping| opened.domain.translate(mapping.iova()).is_some()));
        }
        opened.machine.device().inject.script.clear();
        opened.machine.release(Release::All);
        opened.viommu.poll();
        for mapping in live {
            let _ = opened.endpoint.unmap(mapping);
        }
        let _ = opened.endpoint.flush();
        opened.viommu.reclaim();
        assert_eq!(opened.endpoint.flush(), Ok(()), "seed {seed}");
        assert!(lent.iter().all(|phys| opened.machine.is_lent_back(*phys)), "seed {seed}: memory is kept");
        assert_eq!((opened.domain.mapping_count(), opened.mapped_on_device()), (0, vec![]), "seed {seed}");
    }
}
