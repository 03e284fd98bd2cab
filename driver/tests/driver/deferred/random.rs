//! Random churn with a device that fails now and then: what came back is mapped nowhere.

use std::collections::BTreeSet;

use super::*;
use crate::support::Rng;
use virtio_iommu::PhysSegment;
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

/// A buffer that is mapped now.
struct Live {
    segments: Vec<PhysSegment>,
    direction: Direction,
    mapping: DmaMapping,
    iovas: Vec<Iova>,
}

impl Live {
    /// Every page: where the endpoint finds it, and where it is.
    fn pages(&self) -> impl Iterator<Item = (u64, u64)> {
        self.segments.iter().zip(&self.iovas).flat_map(|(segment, iova)| {
            (0..segment.len as u64 / PAGE)
                .map(|page| (iova.get() + page * PAGE, segment.phys.get() + page * PAGE))
        })
    }

    /// Its mappings: segments that touch share one.
    fn runs(&self) -> usize {
        let touch = |pair: &&[PhysSegment]| pair[0].phys.get() + pair[0].len as u64 == pair[1].phys.get();
        self.segments.len() - self.segments.windows(2).filter(touch).count()
    }
}

/// Buffers and lists of their owner's, which share pages, mapped again and again. Fails when the endpoint reaches anything
/// but what is mapped, and what waits, in any order of things; when it may do more or less with it; or when the counts of
/// what waits are wrong.
#[test]
fn what_is_mapped_again_is_there_and_the_rest_goes() {
    let (mut mapped, mut came_back) = (0, 0);
    for seed in 0..80 {
        let mut random = Rng::new(seed);
        let bounds = DeferredBounds {
            mappings: 2 + random.below(24) as usize,
            bytes: (4 + random.below(60)) * PAGE,
            age_ns: 1_000 + random.below(4_000_000),
        };
        let domain = DomainOptions { mappings: 40, ..policy(bounds) };
        let opened = Opened::new(Config::default(), domain, EndpointOptions::default());
        let memory = opened.machine.memory(16 * PAGE);
        let buffers: Vec<_> = (0..5).map(|_| buffer(memory.phys, &mut random)).collect();
        let (mut live, mut seen): (Vec<Live>, _) = (Vec::new(), BTreeSet::new());
        for _ in 0..150 {
            let mut flushed = false;
            match random.below(16) {
                0..=5 => {
                    let segments = buffers[random.below(buffers.len() as u64) as usize].clone();
                    let direction = [Direction::Both, Direction::FromDevice][random.below(4) as usize / 3];
                    let mut iovas = vec![Iova::new(0); segments.len()];
                    // SAFETY: nobody but the test uses the memory.
                    let map = || unsafe { opened.endpoint.map_scatter(&segments, direction, &mut iovas) };
                    let (mapping, requests, _) = opened.machine.traffic(map);
                    if let Ok(mapping) = mapping {
                        mapped += 1;
                        came_back += usize::from(requests == 0);
                        live.push(Live { segments, direction, mapping, iovas });
                    }
                }
                6..=11 if !live.is_empty() => {
                    let ended = live.swap_remove(random.below(live.len() as u64) as usize);
                    let _ = opened.endpoint.unmap(ended.mapping);
                }
                12 => flushed = opened.endpoint.flush().is_ok(),
                13 => {
                    opened.machine.pass_time(random.below(200_000));
                    opened.machine.release(Release::All);
                    opened.viommu.poll();
                    opened.viommu.reclaim();
                }
                14 if random.below(4) == 0 => {
                    opened.machine.inject([TROUBLE[random.below(TROUBLE.len() as u64) as usize]]);
                }
                15 if random.below(20) == 0 => {
                    opened.machine.device().inject.script.clear();
                    opened.machine.release(Release::All);
                    opened.machine.device().fail();
                    // SAFETY: the endpoint does what the test says.
                    unsafe { opened.viommu.recover() }.unwrap();
                }
                _ => {}
            }
            for live in &live {
                for (iova, phys) in live.pages() {
                    seen.insert(iova);
                    let byte = random.below(256) as u8;
                    opened.machine.dma_write(EP, iova, &[byte]).unwrap();
                    let page = phys - memory.phys.get();
                    assert_eq!(bytes_of(&memory)[page as usize], byte, "seed {seed}: {iova:#x}");
                    let reads = opened.machine.dma_read(EP, iova, 1).is_ok();
                    assert_eq!(reads, live.direction == Direction::Both, "seed {seed}: {iova:#x}");
                }
            }
            opened.machine.take_violations();
            let quarantined = opened.viommu.stats().quarantined_mappings;
            let waiting = opened.domain.stats().deferred_mappings as usize;
            let records = live.iter().map(Live::runs).sum::<usize>() + waiting + quarantined;
            assert_eq!(opened.domain.mapping_count(), records, "seed {seed}: {waiting} wait");
            if flushed && quarantined == 0 {
                let there: BTreeSet<_> = live.iter().flat_map(Live::pages).map(|(iova, _)| iova).collect();
                let reached = |iova: &u64| opened.machine.dma_write(EP, *iova, &[0]).is_ok();
                let reached: BTreeSet<_> = seen.iter().copied().filter(reached).collect();
                assert_eq!(reached, there, "seed {seed}: after a flush");
                opened.machine.take_violations();
            }
        }
        opened.machine.device().inject.script.clear();
        opened.machine.release(Release::All);
        opened.viommu.poll();
        for ended in live {
            let _ = opened.endpoint.unmap(ended.mapping);
        }
        let _ = opened.endpoint.flush();
        opened.viommu.reclaim();
        assert_eq!(opened.endpoint.flush(), Ok(()), "seed {seed}");
        assert_eq!((opened.domain.mapping_count(), opened.mapped_on_device()), (0, vec![]), "seed {seed}");
    }
    println!("{mapped} were mapped, {came_back} of them again");
    assert!(came_back > mapped / 8 && came_back < mapped / 2);
}

/// One to three pieces of one or two pages of the memory, which is 16.
fn buffer(phys: PhysAddr, random: &mut Rng) -> Vec<PhysSegment> {
    let count = 1 + random.below(3);
    let piece = |_| PhysSegment {
        phys: PhysAddr::new(phys.get() + random.below(8) * 2 * PAGE),
        len: (1 + random.below(2) as usize) * PAGE as usize,
    };
    (0..count).map(piece).collect()
}
