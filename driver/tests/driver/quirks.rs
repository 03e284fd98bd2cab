//! Devices as they are: the same life on each, with nothing made for one of them.

use virtio_iommu::{Direction, DmaDevice, DomainOptions, EndpointOptions, Introduction};
use virtio_iommu_model::{Config, Detach, Quirks, feature};

use crate::support::{EP, EP2, Machine, PAGE};

fn devices() -> [Config; 6] {
    [
        Config::default(),
        Config::qemu_7_2(),
        Config::qemu_10(),
        Config::qemu_11_1(),
        Config::cloud_hypervisor(),
        Config::crosvm(),
    ]
}

#[test]
fn one_life_on_every_device() {
    for config in devices() {
        let machine = Machine::new(config.clone());
        let staged = machine.start().unwrap();
        let can_detach = config.quirks.detach != Detach::Unsupported;
        let expected = if can_detach { Introduction::Known } else { Introduction::CannotDetach };
        for endpoint in [EP, EP2] {
            assert_eq!(staged.introduce(endpoint), Ok(expected));
        }
        let viommu = staged.go_live().unwrap();
        let outside = machine.memory(PAGE).phys.get();
        let enforces = !config.quirks.permissions_ignored;
        for id in [EP, EP2] {
            assert!(!machine.reaches(id, outside));
            let domain = viommu.create_domain(DomainOptions::default()).unwrap();
            let options = EndpointOptions { bounce_bytes: 4096, ..EndpointOptions::default() };
            let endpoint = viommu.open(id, &domain, options).unwrap();
            for _ in 0..3 {
                let (held, phys) = machine.lend(2 * PAGE);
                let mapping = endpoint.adopt(held, Direction::FromDevice).unwrap();
                let at = mapping.iova().get();
                machine.dma_write(id, at, &[1]).unwrap();
                // Not the last byte, which QEMU takes to the next mapping (QEMU.md, page-edge bug).
                machine.dma_write(id, at + 2 * PAGE - 2, &[2]).unwrap();
                assert_eq!(machine.dma_read(id, at, 1).is_err(), enforces);
                endpoint.unmap(mapping).unwrap();
                assert!(machine.dma_write(id, at, &[3]).is_err());
                assert!(machine.is_lent_back(phys));
            }
            assert!(!machine.reaches(id, outside));
            assert_eq!(endpoint.close().is_ok(), can_detach);
            viommu.reclaim();
            assert_eq!(machine.outstanding(), 2, "the two queues");
            assert!(!machine.reaches(id, outside));
        }
    }
}

/// Each deviation alone must not make a difference to a driver that keeps the rules.
#[test]
fn failures_are_understood_with_and_without_a_used_length() {
    for failure_used_len_zero in [false, true] {
        let quirks = Quirks { failure_used_len_zero, ..Quirks::default() };
        let (machine, viommu, _domain) =
            Machine::attached(Config { max_domains: 1, quirks, ..Config::default() });
        let second = viommu.create_domain(DomainOptions::default()).unwrap();
        let error = viommu.attach(EP2, &second).unwrap_err().to_string();
        assert_eq!(error, "endpoint 0x9: the device answered NOMEM");
        assert_eq!(machine.device().domain_of(EP2.get()), None);
    }
}

#[test]
fn a_device_without_optional_features() {
    let features = feature::VERSION_1 | feature::MAP_UNMAP;
    let config = Config { features, bypass: false, ..Config::default() };
    let (machine, viommu, domain) = Machine::attached(config);
    let memory = machine.memory(PAGE);
    assert_eq!(viommu.reserved_regions(EP).unwrap().len(), 0);
    assert_eq!(machine.device().counters().probe, 0);
    // SAFETY: nobody but the test uses the memory. Below the MSI window, of which the driver cannot know here.
    let at = unsafe { domain.map(memory.phys, PAGE, crate::support::RW, virtio_iommu::Iova::new(0xffff)) };
    assert!(machine.reaches(EP, at.unwrap().get()));
}
