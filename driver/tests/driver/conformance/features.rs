//! Feature bits and the configuration space: D-01 to D-06.

use virtio_iommu::{BypassError, Features, Leave, StartError, Unattached};
use virtio_iommu_model::{Answer, Config, ConfigWrite, Quirks, Request, Status, device_status, feature};

use super::{AT, CORE, map_at, unmap, whole_life, without};
use crate::support::{EP, Machine, PAGE, RW};

fn config_writes(machine: &Machine) -> Vec<ConfigWrite> {
    machine.device().config_writes().copied().collect()
}

// Seen to fail without DOMAIN_RANGE in `Features::ACCEPTED`.
#[test]
fn d01_input_range_domain_range_and_probe_are_accepted_when_offered() {
    let useful = [feature::INPUT_RANGE, feature::DOMAIN_RANGE, feature::PROBE];
    let all = useful.iter().fold(0, |all, bit| all | bit);
    for subset in 0..1u32 << useful.len() {
        let chosen = useful.iter().enumerate().filter(|(index, _)| subset & 1 << index != 0);
        let offered = chosen.fold(CORE | feature::BYPASS_CONFIG, |features, (_, bit)| features | bit);
        let machine = Machine::new(Config { features: offered, ..Config::default() });
        let staged = machine.start().unwrap();
        let accepted = machine.device().negotiated_features();
        assert_eq!(accepted & all, offered & all, "offered {offered:#x}");
        assert_eq!(staged.features().bits() & all, offered & all);
    }
}

// Seen to fail with a `read_bypass`, which goes before each write, that does not look at BYPASS_CONFIG.
#[test]
fn d02_bypass_is_the_only_field_that_is_written_and_only_when_negotiated() {
    let machine = Machine::new(Config::default());
    whole_life(&machine, Machine::options());
    let writes = config_writes(&machine);
    assert!(writes.len() > 3);
    assert!(writes.iter().all(|write| (write.offset, write.len_bytes) == (36, 1)), "{writes:?}");

    let no_bypass = without(feature::BYPASS_CONFIG);
    let legacy = Config { features: no_bypass.features | feature::BYPASS, ..no_bypass.clone() };
    for config in [no_bypass.clone(), legacy, Config { config_len: 36, ..no_bypass }] {
        let machine = Machine::new(config);
        let staged = machine.start().unwrap();
        assert_eq!(staged.close_bypass(), Err(BypassError::NoFeature));
        // SAFETY: the endpoints do no DMA.
        assert_eq!(unsafe { staged.open_bypass() }, Err(BypassError::NoFeature));
        whole_life(&machine, Machine::options());
        assert_eq!(config_writes(&machine), []);
    }
    // Offered, and not negotiated in the end.
    let machine = Machine::new(Config::default());
    machine.device().inject.refuse_features_ok = 1;
    machine.start().err().unwrap();
    assert_eq!(config_writes(&machine), []);
}

// Seen to fail with a `write_bypass` that keeps the other bits as it read them.
#[test]
fn d03_bypass_is_written_as_zero_or_one_whatever_it_reads() {
    for bypass in [false, true] {
        for bypass_read_noise in [0, 0x02, 0x80, 0xfe, 0xff] {
            let quirks = Quirks { bypass_read_noise, ..Quirks::default() };
            let machine = Machine::new(Config { bypass, quirks, ..Config::default() });
            let mut expected = vec![0];
            if let Ok(viommu) = machine.start().unwrap().go_live() {
                // SAFETY: the endpoints do no DMA.
                unsafe {
                    viommu.open_bypass().unwrap();
                    viommu.shutdown(Leave::AsFound).unwrap();
                }
                expected.extend([1, bypass.into()]);
            } else {
                assert_eq!(bypass_read_noise, 0xff, "bit 0 stays at 1");
            }
            let values: Vec<_> = config_writes(&machine).iter().map(|write| write.value).collect();
            assert_eq!(values, expected, "at first {bypass}, with {bypass_read_noise:#x} in what is read");
        }
    }
}

// Seen to fail with a `read_bypass` that gives all of the byte.
#[test]
fn d04_bits_1_to_7_of_bypass_are_ignored_when_it_is_read() {
    for bypass_read_noise in (1..8).map(|bit| 1 << bit).chain([0xfe]) {
        let quirks = Quirks { bypass_read_noise, ..Quirks::default() };
        let machine = Machine::new(Config { quirks, ..Config::default() });
        let viommu = machine.start().unwrap().go_live().unwrap();
        assert_eq!((viommu.unattached(), viommu.read_bypass()), (Unattached::Blocked, Ok(0)));
        assert!(!machine.reaches(EP, machine.memory(PAGE).phys.get()));
        // SAFETY: the endpoints do no DMA but what the test asks for.
        unsafe { viommu.open_bypass() }.unwrap();
        assert_eq!(viommu.read_bypass(), Ok(1));
    }
}

// Seen to fail without MAP_UNMAP in `Features::REQUIRED`, and so in what is accepted.
#[test]
fn d05_where_map_unmap_is_negotiated_both_requests_are_sent() {
    // A device that has nothing else, and the smallest queues.
    let config = Config { features: CORE, bypass: false, queue_sizes: [2, 2], ..Config::default() };
    let (machine, _viommu, domain) = Machine::attached(config);
    assert_eq!(machine.device().negotiated_features(), CORE);
    let memory = machine.memory(PAGE);
    map_at(&domain, AT, memory.phys, PAGE, RW).unwrap();
    assert!(machine.reaches(EP, AT));
    unmap(&domain, AT, PAGE).unwrap();
    assert!(!machine.reaches(EP, AT));
    let entries = machine.entries();
    assert!(matches!(entries[0].request, Request::Map { .. }) && entries.len() == 2);
    assert!(matches!(entries[1].request, Request::Unmap { .. }));
    assert!(entries.iter().all(|entry| entry.answer == Answer::Status(Status::Ok)));

    // Where no request can be sent the device is not left with the feature in use.
    let machine = Machine::new(Config { queue_sizes: [1, 256], ..Config::default() });
    assert_eq!(machine.start().err(), Some(StartError::QueueTooSmall { queue: 0, size: 1 }));
    assert!(!machine.device().is_running());
}

// Seen to fail without MAP_UNMAP in `Features::REQUIRED`.
#[test]
fn d06_a_device_without_map_unmap_is_given_up_gracefully() {
    for offered in [feature::VERSION_1, Config::default().features & !feature::MAP_UNMAP, !feature::MAP_UNMAP]
    {
        let machine = Machine::new(Config { features: offered & !feature::RING_PACKED, ..Config::default() });
        let offered = machine.device().device_features();
        let error = machine.start().err();
        assert_eq!(error, Some(StartError::MissingFeatures { missing: Features::MAP_UNMAP, offered }));
        assert_eq!(machine.outstanding(), 0, "memory was taken and not given back");
        assert_eq!((machine.requests(), config_writes(&machine)), (vec![], vec![]));
        let device = machine.device();
        let bits = device_status::FAILED | device_status::FEATURES_OK | device_status::DRIVER_OK;
        assert_eq!(device.status() & bits, device_status::FAILED);
        assert!(!device.queue_enabled(0) && !device.queue_enabled(1));
    }
}
