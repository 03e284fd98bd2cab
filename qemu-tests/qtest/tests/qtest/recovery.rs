//! QEMU's device reset under way, by queue and as a whole, and what real accesses find afterwards.

use qtest::{EDU, EDU2, Machine};
use virtio_iommu::{DmaDevice as _, DomainOptions, EndpointOptions, Features, Recovered};

use crate::Case;
use crate::support::{Dma, bring_up, faults, options, pattern};

pub(crate) const CASES: &[Case] = &[
    ("recovery/a_queue_reset_keeps_what_is_mapped", a_queue_reset_keeps_what_is_mapped),
    ("recovery/everything_comes_back_after_a_device_reset", everything_comes_back_after_a_device_reset),
    ("recovery/a_group_goes_together", a_group_goes_together),
    ("recovery/a_suspended_endpoint_is_blocked", a_suspended_endpoint_is_blocked),
];

fn a_queue_reset_keeps_what_is_mapped(machine: &Machine) {
    let viommu = bring_up(machine, options(), &[EDU]);
    assert!(viommu.features().contains(Features::RING_RESET));
    let dma = Dma::open(&viommu, &machine.edu, EDU);
    let memory = dma.endpoint.alloc_coherent(0x2000).unwrap();
    // More than once, and with requests in between: the ring's indices begin anew.
    for round in 0..3 {
        viommu.reset_queues().unwrap();
        let data = pattern(round, 500);
        dma.write(memory.iova(), &data);
        assert_eq!(dma.read(memory.iova(), 500), Some(data), "round {round}");
        for _ in 0..40 {
            let more = dma.endpoint.alloc_coherent(0x1000).unwrap();
            dma.endpoint.free_coherent(more).unwrap();
        }
    }
    let at = memory.iova();
    dma.endpoint.free_coherent(memory).unwrap();
    assert_eq!(dma.read(at, 16), None);
    assert!(!faults(&viommu).is_empty(), "the event queue was left alone");
    dma.close();
}

fn everything_comes_back_after_a_device_reset(machine: &Machine) {
    let viommu = bring_up(machine, options(), &[EDU, EDU2]);
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    let shared = [(EDU, &machine.edu), (EDU2, &machine.edu2)]
        .map(|(id, edu)| Dma::open_in(&viommu, &domain, edu, id, EndpointOptions::default()));
    let memory = shared[0].endpoint.alloc_coherent(0x1000).unwrap();
    let gone = shared[0].endpoint.alloc_coherent(0x1000).unwrap();
    let gone_at = gone.iova();
    shared[0].endpoint.free_coherent(gone).unwrap();
    for round in 0..3 {
        let (id, data) = (domain.id(), pattern(round, 300));
        // SAFETY: both devices are idle.
        let recovered = unsafe { viommu.recover() }.unwrap();
        assert_eq!(recovered, Recovered { endpoints: 2, ..Recovered::default() });
        assert_ne!(domain.id(), id, "on some versions the old domain survived the reset");
        shared[0].write(memory.iova(), &data);
        assert_eq!(shared[1].read(memory.iova(), 300), Some(data), "round {round}");
        assert_eq!(shared[1].read(gone_at, 16), None);
        assert!(!faults(&viommu).is_empty());
    }
    let more = shared[1].endpoint.alloc_coherent(0x1000).unwrap();
    shared[1].endpoint.free_coherent(more).unwrap();
    shared[0].endpoint.free_coherent(memory).unwrap();
    shared.into_iter().for_each(Dma::close);
    assert_eq!(viommu.stats().quarantined_mappings, 0);
}

fn a_group_goes_together(machine: &Machine) {
    let viommu = bring_up(machine, options(), &[EDU, EDU2]);
    viommu.group(&[EDU, EDU2]).unwrap();
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    let first = Dma::open_in(&viommu, &domain, &machine.edu, EDU, EndpointOptions::default());
    assert_eq!(viommu.stats().attaches, 4, "two of them while they were introduced");
    let second = Dma::open_in(&viommu, &domain, &machine.edu2, EDU2, EndpointOptions::default());
    let memory = first.endpoint.alloc_coherent(0x1000).unwrap();
    let data = pattern(9, 64);
    first.write(memory.iova(), &data);
    assert_eq!(second.read(memory.iova(), 64), Some(data.clone()));
    second.close();
    assert_eq!(first.read(memory.iova(), 64), Some(data));
    first.endpoint.free_coherent(memory).unwrap();
    first.close();
    assert_eq!(viommu.stats().detaches, 4);
}

fn a_suspended_endpoint_is_blocked(machine: &Machine) {
    let viommu = bring_up(machine, options(), &[EDU]);
    let dma = Dma::open(&viommu, &machine.edu, EDU);
    let memory = dma.endpoint.alloc_coherent(0x1000).unwrap();
    let data = pattern(5, 64);
    dma.write(memory.iova(), &data);
    viommu.suspend(EDU).unwrap();
    dma.write(memory.iova(), &pattern(6, 64));
    assert!(!faults(&viommu).is_empty());
    viommu.resume(EDU).unwrap();
    assert_eq!(dma.read(memory.iova(), 64), Some(data), "nothing was written meanwhile");
    dma.endpoint.free_coherent(memory).unwrap();
    dma.close();
}
