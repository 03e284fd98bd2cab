//! Bringing the device up: features, configuration, queues, and what is left behind when it fails.

use virtio_iommu::transport::{DeviceStatus, TransportError};
use virtio_iommu::{
    BypassError, DomainOptions, EndpointId, Features, Introduction, Iova, Options, Platform, ReservedKind,
    StartError, Unattached,
};
use virtio_iommu_model::{
    Config, Endpoint, Execute, Inject, Quirks, Request, ReservedRegion, device_status, feature,
};

use crate::support::{EP, EP2, Machine, PAGE, POLLS, RW};

const CORE: u64 = feature::VERSION_1 | feature::MAP_UNMAP;

/// Starts, expects the error, and that nothing is left: the device failed or reset, no memory with the driver.
fn refused(machine: &Machine, options: Options) -> StartError {
    let error = machine.start_with(options).err().expect("the driver started");
    assert_eq!(machine.outstanding(), 0, "memory is left with the driver after {error}");
    assert_ne!(machine.device().status() & device_status::FAILED, 0, "not marked as failed after {error}");
    assert!(!machine.device().is_running());
    error
}

fn refused_config(config: Config) -> StartError {
    refused(&Machine::new(config), Machine::options())
}

#[test]
fn d01_d05_exactly_the_useful_features_are_accepted() {
    let optional = [
        feature::INPUT_RANGE,
        feature::DOMAIN_RANGE,
        feature::BYPASS,
        feature::PROBE,
        feature::MMIO,
        feature::BYPASS_CONFIG,
        feature::RING_EVENT_IDX,
        feature::RING_INDIRECT_DESC,
        feature::ACCESS_PLATFORM,
        feature::ORDER_PLATFORM,
        feature::RING_RESET,
        1 << 42 | 1 << 7 | 1 << 35,
    ];
    let unwanted = feature::BYPASS | feature::RING_INDIRECT_DESC | 1 << 42 | 1 << 7 | 1 << 35;
    for subset in 0..1u64 << optional.len() {
        let chosen = optional.iter().enumerate().filter(|(bit, _)| subset & 1 << bit != 0);
        let features = chosen.fold(CORE, |features, (_, bit)| features | bit);
        let machine = Machine::new(Config { features, queue_sizes: [4, 4], ..Config::default() });
        let staged = machine.start().unwrap();
        assert_eq!(machine.device().negotiated_features(), features & !unwanted, "offered {features:#x}");
        assert_eq!(staged.features().bits(), features & !unwanted);
    }
}

#[test]
fn d06_without_map_unmap_it_fails_gracefully() {
    let features = feature::VERSION_1 | feature::PROBE;
    let error = refused_config(Config { features, ..Config::default() });
    assert_eq!(error, StartError::MissingFeatures { missing: Features::MAP_UNMAP, offered: features });
}

#[test]
fn a_legacy_device_is_refused() {
    let error = refused_config(Config { features: feature::MAP_UNMAP, ..Config::default() });
    assert!(matches!(error, StartError::MissingFeatures { missing: Features::VERSION_1, .. }));
}

#[test]
fn features_that_the_device_takes_back() {
    let machine = Machine::new(Config::default());
    machine.device().inject.refuse_features_ok = 1;
    assert!(matches!(refused(&machine, Machine::options()), StartError::FeaturesRefused { .. }));
    // It was the device's mood: the next try works.
    assert!(machine.start().is_ok());
}

#[test]
fn a_second_life_that_the_device_does_not_allow() {
    let machine = Machine::new(Config::crosvm());
    drop(machine.start().unwrap());
    let error = machine.start().err().unwrap();
    assert!(matches!(error, StartError::FeaturesRefused { .. }));
}

#[test]
fn a_reset_that_never_ends_is_bounded() {
    for machine in [Machine::new(Config::default()), Machine::clockless(Config::default())] {
        machine.device().inject.slow_reset = u32::MAX;
        let error = machine.start().err().unwrap();
        assert_eq!(error, StartError::ResetTimedOut { status: DeviceStatus::ACKNOWLEDGE });
        assert!((POLLS - 1..=POLLS).contains(&machine.relaxed()), "{} polls", machine.relaxed());
        assert_eq!(machine.outstanding(), 0);
        assert_ne!(machine.device().status() & device_status::FAILED, 0);
    }
}

#[test]
fn a_slow_reset_is_waited_for() {
    let machine = Machine::new(Config::default());
    machine.device().inject.slow_reset = POLLS as u32 - 2;
    assert!(machine.start().is_ok());
}

#[test]
fn configurations_that_cannot_be() {
    let inverted = Config { input_range: core::ops::RangeInclusive::new(9, 8), ..Config::default() };
    let inverted_domains = Config { domain_range: core::ops::RangeInclusive::new(7, 5), ..Config::default() };
    for (config, field) in [
        (Config { page_size_mask: 0, ..Config::default() }, "page_size_mask"),
        (Config { probe_size: u32::MAX, ..Config::default() }, "probe_size"),
        (Config { probe_size: 64 * 1024 + 1, ..Config::default() }, "probe_size"),
        (inverted, "input_range"),
        (Config { input_range: 0..=0xffe, ..Config::default() }, "input_range"),
        (Config { input_range: u64::MAX - 0xfff..=u64::MAX, ..Config::default() }, "input_range"),
        (inverted_domains, "domain_range"),
    ] {
        let error = refused_config(config);
        assert!(matches!(error, StartError::BadConfig { field: found, .. } if found == field), "{error}");
    }
}

#[test]
fn a_configuration_of_36_bytes_has_no_bypass() {
    let features = Config::default().features & !feature::BYPASS_CONFIG;
    let machine = Machine::new(Config { features, config_len: 36, ..Config::default() });
    let viommu = machine.bring_up();
    assert_eq!(viommu.unattached(), Unattached::BlockedByDevice);
    assert_eq!(machine.device().config_writes().len(), 0);
}

#[test]
fn a_configuration_that_ends_too_early() {
    for (config_len, needed) in [(4, 8), (20, 24), (33, 36)] {
        let error = refused_config(Config { config_len, ..Config::default() });
        assert_eq!(error, StartError::Config(TransportError::ConfigTooShort { needed }));
    }
    // Offers the field, and does not have it: an error, and no window that is thought to be closed.
    let machine = Machine::new(Config { config_len: 36, ..Config::default() });
    let error = machine.start().unwrap().go_live().unwrap_err();
    assert_eq!(error, StartError::Bypass(BypassError::Access(TransportError::ConfigTooShort { needed: 37 })));
    assert_eq!(machine.take_violations().len(), 0, "nothing is written where nothing is");
}

#[test]
fn a_configuration_that_keeps_changing() {
    let machine = Machine::new(Config::default());
    machine.device().inject.generation_changes = u32::MAX;
    assert_eq!(refused(&machine, Machine::options()), StartError::ConfigUnstable);
    machine.device().inject.generation_changes = 3;
    assert!(machine.start().is_ok(), "a change or two are waited out");
}

#[test]
fn one_domain_number_is_enough() {
    let machine = Machine::new(Config { domain_range: 7..=7, ..Config::default() });
    let viommu = machine.bring_up();
    assert_eq!(viommu.domain_range(), (7, 7));
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    viommu.attach(EP, &domain).unwrap();
    assert_eq!(machine.device().domain_of(EP.get()), Some(7));
}

#[test]
fn ranges_count_only_when_negotiated() {
    let config = Config { input_range: 0x10_0000..=0x1f_ffff, domain_range: 5..=6, ..Config::default() };
    let machine = Machine::new(config.clone());
    let staged = machine.start().unwrap();
    assert_eq!(staged.input_range().start(), Iova::new(0x10_0000));
    assert_eq!(staged.input_range().last(), Iova::new(0x1f_ffff));
    assert_eq!(staged.domain_range(), (5, 6));

    let features = config.features & !(feature::INPUT_RANGE | feature::DOMAIN_RANGE);
    let machine = Machine::new(Config { features, ..config });
    let staged = machine.start().unwrap();
    assert_eq!(staged.domain_range(), (0, u32::MAX));
    assert_eq!(staged.input_range().start(), Iova::new(0));
    assert_eq!(staged.input_range().last(), Iova::new(u64::MAX - PAGE), "never the last granule (I5)");
}

#[test]
fn queues_that_are_too_small() {
    for (sizes, queue, size) in [([0, 256], 0, 0), ([1, 256], 0, 1), ([256, 0], 1, 0), ([256, 1], 1, 1)] {
        let error = refused_config(Config { queue_sizes: sizes, ..Config::default() });
        assert_eq!(error, StartError::QueueTooSmall { queue, size });
    }
    let machine = Machine::new(Config::default());
    let options = Options { queue_size: 1, ..Machine::options() };
    assert_eq!(refused(&machine, options), StartError::QueueTooSmall { queue: 0, size: 1 });
}

#[test]
fn the_smallest_queues_work() {
    let machine = Machine::new(Config { queue_sizes: [2, 2], ..Config::default() });
    let viommu = machine.bring_up();
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    viommu.attach(EP, &domain).unwrap();
    let memory = machine.memory(PAGE);
    // SAFETY: nobody but the test uses the memory.
    unsafe { domain.map_at(Iova::new(PAGE), memory.phys, PAGE, RW) }.unwrap();
    assert!(machine.reaches(EP, PAGE));
}

#[test]
fn queue_sizes_are_rounded_down() {
    let machine = Machine::new(Config::default());
    let options = Options { queue_size: 100, ..Machine::options() };
    let viommu = machine.start_with(options).unwrap();
    // 64 descriptors, 32 slots: the 33rd request of a batch waits for the next round.
    viommu.introduce(EP).unwrap();
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    viommu.attach(EP, &domain).unwrap();
    assert!(machine.device().queue_enabled(0));
}

#[test]
fn memory_that_runs_out_at_each_step() {
    for left in 0..2 {
        let machine = Machine::new(Config::default());
        machine.limit_allocations(left);
        assert!(matches!(refused(&machine, Machine::options()), StartError::NoMemory { .. }));
    }
    let machine = Machine::new(Config::default());
    machine.limit_allocations(2);
    assert!(machine.start().is_ok(), "two blocks are all that starting takes");
}

#[test]
fn a_queue_that_cannot_be_enabled() {
    for queue in [0, 1] {
        let machine = Machine::new(Config::default());
        machine.refuse_queue(queue);
        let error = refused(&machine, Machine::options());
        assert_eq!(error, StartError::Queue(TransportError::NoQueue { queue }));
    }
}

#[test]
fn a_device_that_needs_a_reset_at_driver_ok() {
    let machine = Machine::new(Config::default());
    machine.at_driver_ok(|device| device.fail());
    assert_eq!(refused(&machine, Machine::options()), StartError::NeedsReset);
}

/// Fails when `run` gives the queues back without looking at how the reset ended.
#[test]
fn queues_that_the_device_may_still_use_are_not_given_back() {
    let machine = Machine::new(Config::default());
    machine.at_driver_ok(|device| {
        device.fail();
        device.inject.slow_reset = u32::MAX;
    });
    assert_eq!(machine.start().err(), Some(StartError::NeedsReset));
    assert_eq!(machine.outstanding(), 2);
}

#[test]
fn i09_d02_d03_bypass_is_closed_by_one_byte_of_zero() {
    let machine = Machine::new(Config::default());
    let staged = machine.start().unwrap();
    let memory = machine.memory(PAGE);
    assert_eq!(staged.unattached(), Unattached::Bypasses);
    assert!(machine.reaches(EP, memory.phys.get()), "the device bypasses until told");
    staged.introduce(EP).unwrap();
    assert_eq!(machine.device().config_writes().len(), 0, "introducing closes nothing");

    let viommu = staged.go_live().unwrap();
    assert_eq!(viommu.unattached(), Unattached::Blocked);
    let writes: Vec<_> = machine.device().config_writes().copied().collect();
    assert_eq!(writes.len(), 1);
    assert_eq!((writes[0].offset, writes[0].len_bytes, writes[0].value), (36, 1, 0));
    assert!(!machine.reaches(EP, memory.phys.get()));
}

/// DEVICES 3.6: a device whose field reads 0 and that bypasses until it is written.
#[test]
fn bypass_is_written_whatever_it_reads() {
    let machine = Machine::new(Config::cloud_hypervisor());
    let staged = machine.start().unwrap();
    let memory = machine.memory(PAGE);
    assert!(machine.reaches(EP, memory.phys.get()));
    let _viommu = staged.go_live().unwrap();
    assert!(!machine.reaches(EP, memory.phys.get()));
}

#[test]
fn d04_other_bits_of_bypass_are_ignored() {
    let quirks = Quirks { bypass_read_noise: 0xfe, ..Quirks::default() };
    let machine = Machine::new(Config { quirks, ..Config::default() });
    assert!(machine.start().unwrap().go_live().is_ok());
    let quirks = Quirks { bypass_read_noise: 0xff, ..Quirks::default() };
    let machine = Machine::new(Config { quirks, ..Config::default() });
    let error = machine.start().unwrap().go_live().unwrap_err();
    assert_eq!(error, StartError::Bypass(BypassError::Stuck { wrote: 0, reads: 1 }));
}

#[test]
fn d07_probe_comes_before_the_first_attach() {
    let (introduced, direct) = (Machine::new(Config::default()), Machine::new(Config::default()));
    introduced.start().unwrap().introduce(EP).unwrap();
    let viommu = direct.start().unwrap().go_live().unwrap();
    viommu.attach(EP, &viommu.create_domain(DomainOptions::default()).unwrap()).unwrap();
    for machine in [introduced, direct] {
        let requests = machine.requests();
        assert!(matches!(requests[0], Request::Probe { endpoint: 8, reserved_zero: true }), "{requests:?}");
        assert!(matches!(requests[1], Request::Attach { endpoint: 8, flags: 0, reserved: 0, .. }));
    }
}

#[test]
fn introducing_twice_sends_nothing() {
    let machine = Machine::new(Config::default());
    let staged = machine.start().unwrap();
    assert_eq!(staged.introduce(EP), Ok(Introduction::Known));
    let (again, requests, _) = machine.traffic(|| staged.introduce(EP));
    assert_eq!((again, requests), (Ok(Introduction::Known), 0));
}

#[test]
fn an_endpoint_that_the_device_does_not_know() {
    for features in [Config::default().features, CORE] {
        let machine = Machine::new(Config { features, ..Config::default() });
        let staged = machine.start().unwrap();
        assert_eq!(staged.introduce(EndpointId::new(77)), Ok(Introduction::Unknown));
        assert_eq!(machine.device().domains().count(), 0);
        assert_eq!(staged.introduce(EP), Ok(Introduction::Known), "its number is free again");
    }
}

/// Fails when `needs_introduction` does not look at `own_endpoint`.
#[test]
fn i10_the_iommus_own_endpoint_is_refused() {
    let machine = Machine::new(Config::default());
    let options = Options { own_endpoint: Some(EP), ..Machine::options() };
    let staged = machine.start_with(options).unwrap();
    assert_eq!(staged.introduce(EP), Err(StartError::OwnEndpoint(EP)));
    let domain = staged.create_domain(DomainOptions::default()).unwrap();
    let error = staged.attach(EP, &domain).unwrap_err();
    assert_eq!(error, virtio_iommu::AttachError::OwnEndpoint(EP));
    assert_eq!(machine.requests(), []);
}

#[test]
fn more_endpoints_than_records() {
    let machine = Machine::new(Config::default());
    let staged = machine.start_with(Options { max_endpoints: 1, ..Machine::options() }).unwrap();
    staged.introduce(EP).unwrap();
    assert_eq!(staged.introduce(EP2), Err(StartError::TooManyEndpoints { limit: 1 }));
}

#[test]
fn d29_to_d35_d40_reserved_regions_are_read_from_any_list() {
    let machine = Machine::new(Config::default());
    let mut endpoint = Endpoint::x86(EP.get());
    endpoint.reserved.push(ReservedRegion { subtype: 9, first: 0x5000, last: 0x5fff });
    endpoint.raw_before = vec![0xff, 0x07, 3, 0, 1, 2, 3]; // an unknown type
    endpoint.raw_before.extend([0x01, 0x10, 0, 0]); // reserved bits of the type set
    endpoint.raw_after = vec![1, 0]; // half a header
    machine.device().add_endpoint(endpoint);
    let viommu = machine.bring_up();
    let regions = viommu.reserved_regions(EP).unwrap();
    let found: Vec<_> =
        regions.iter().map(|r| (r.range.start().get(), r.range.last().get(), r.kind)).collect();
    let expected = [(0xfee0_0000, 0xfeef_ffff, ReservedKind::Msi), (0x5000, 0x5fff, ReservedKind::Reserved)];
    assert_eq!(found, expected);
}

/// I12: fails when `introduce` sends no sweep.
#[test]
fn i12_domains_of_an_earlier_life_are_gone() {
    for config in [Config::qemu_10(), Config::qemu_11_1(), Config::qemu_7_2(), Config::cloud_hypervisor()] {
        let machine = Machine::new(config);
        let memory = machine.memory(PAGE);
        for life in 0..3 {
            let viommu = machine.bring_up();
            for endpoint in [EP, EP2] {
                let domain = viommu.create_domain(DomainOptions::default()).unwrap();
                viommu.attach(endpoint, &domain).unwrap();
                let before = domain.id();
                // SAFETY: nobody but the test uses the memory.
                let iova = unsafe { domain.map(memory.phys, PAGE, RW, crate::support::ANYWHERE) };
                assert!(machine.reaches(endpoint, iova.unwrap().get()), "life {life}");
                assert_eq!(domain.id(), before, "no other number was needed");
            }
            // The driver goes without a word.
        }
    }
}

/// A device that cannot detach keeps the endpoint in the scratch domain, whose number is then not used again.
#[test]
fn a_device_that_cannot_detach() {
    let quirks = Quirks { detach: virtio_iommu_model::Detach::Unsupported, ..Quirks::default() };
    let machine = Machine::new(Config { quirks, ..Config::default() });
    let staged = machine.start().unwrap();
    assert_eq!(staged.introduce(EP), Ok(Introduction::CannotDetach));
    let scratch = machine.device().domain_of(EP.get()).unwrap();
    let viommu = staged.go_live().unwrap();
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    assert_ne!(domain.id().get(), scratch);
    viommu.attach(EP, &domain).unwrap();
    assert_eq!(machine.device().domain_of(EP.get()), Some(domain.id().get()));
}

#[test]
fn a_sweep_that_goes_unanswered_keeps_its_number() {
    for script in [
        vec![Inject::Pass, Inject::Drop(Execute::Now)],
        vec![Inject::Pass, Inject::Pass, Inject::Drop(Execute::AtRelease)],
    ] {
        let machine = Machine::new(Config::default());
        let staged = machine.start().unwrap();
        machine.inject(script);
        assert!(matches!(staged.introduce(EP), Err(StartError::Endpoint { .. })));
        let scratch = machine.device().domain_of(EP.get()).unwrap();
        let domain = staged.create_domain(DomainOptions::default()).unwrap();
        assert_ne!(domain.id().get(), scratch);
        assert_eq!(staged.stats().abandoned_requests, 1);
    }
}

#[test]
fn the_platform_can_have_no_clock() {
    let machine = Machine::clockless(Config::default());
    assert_eq!(machine.platform().now_ns(), None);
    let (machine, _viommu, _domain) = machine.attach_one();
    assert_eq!(machine.relaxed(), 0, "a model answers at once");
}
