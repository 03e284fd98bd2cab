//! Features, status, configuration space and queues as a transport shows them.

use virtio_iommu_model::{Config, Device, QueueError, device_status, feature, isr};

use crate::rig::{BUFFERS, EP, OK, READ, Rig, attach};

use device_status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET};

fn accepts(config: Config, features: u64) -> bool {
    let mut device = Device::new(config);
    device.set_status(ACKNOWLEDGE | DRIVER);
    device.set_driver_features(features);
    device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
    let accepted = device.status() & FEATURES_OK != 0;
    assert_eq!(device.negotiated_features(), if accepted { features } else { 0 });
    accepted
}

#[test]
fn features_ok_sticks_only_for_a_right_subset() {
    let config = Config::default();
    let platform = Config { features: config.features | feature::ACCESS_PLATFORM, ..config.clone() };
    assert!(accepts(config.clone(), config.features));
    assert!(accepts(config.clone(), feature::VERSION_1));
    assert!(!accepts(config.clone(), config.features & !feature::VERSION_1));
    assert!(!accepts(config.clone(), config.features | feature::BYPASS));
    assert!(!accepts(platform.clone(), config.features));
    assert!(accepts(platform.clone(), platform.features));
}

#[test]
fn features_ok_can_be_refused_by_injection_and_packed_is_never_offered() {
    let mut device = Device::new(Config { features: u64::MAX, ..Config::default() });
    assert_eq!(device.device_features() & feature::RING_PACKED, 0);
    device.set_driver_features(device.device_features());
    device.inject.refuse_features_ok = 1;
    device.set_status(FEATURES_OK);
    assert_eq!(device.status() & FEATURES_OK, 0);
    device.set_status(FEATURES_OK);
    assert_eq!(device.status() & FEATURES_OK, FEATURES_OK);
}

#[test]
fn driver_ok_needs_features_ok_and_features_freeze() {
    let mut device = Device::new(Config::default());
    device.set_status(ACKNOWLEDGE | DRIVER | DRIVER_OK);
    assert_eq!(device.status() & DRIVER_OK, 0);
    device.set_driver_features(feature::VERSION_1);
    device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
    device.set_driver_features(0);
    assert_eq!(device.driver_features(), feature::VERSION_1);
    assert_eq!(device.violations().count(), 2);
}

#[test]
fn nothing_happens_before_driver_ok() {
    let mut rig = Rig::new(Config::default());
    rig.device.set_status(0);
    rig.kick(0);
    rig.device.set_driver_features(Config::default().features);
    rig.device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
    let queue = &rig.requests;
    rig.device.set_queue(0, 256, queue.desc, queue.avail, queue.used).unwrap();
    rig.submit(0, &attach(1, EP, 0, 0), 4);
    rig.kick(0);
    assert_eq!(rig.take_used(0), None);
    rig.device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    rig.kick(0);
    assert_eq!(rig.take_used(0), Some((0, 4)));
    assert_eq!(rig.rules_broken(), ["core", "core", "D-07"]);
}

#[test]
fn needs_reset_sticks_until_reset() {
    let mut device = Device::new(Config::default());
    device.set_status(ACKNOWLEDGE | NEEDS_RESET);
    assert_eq!(device.status(), ACKNOWLEDGE); // not the driver's to set
    device.fail();
    device.fail();
    device.set_status(ACKNOWLEDGE | DRIVER);
    assert_eq!(device.status(), ACKNOWLEDGE | DRIVER | NEEDS_RESET);
    assert_eq!(device.take_isr(), isr::CONFIG);
    assert_eq!(device.counters().config_interrupts, 1);
    device.set_status(0);
    assert_eq!(device.status(), 0);
}

#[test]
fn config_space_has_its_length_and_generation() {
    let mut device = Device::new(Config { config_len: 36, ..Config::default() });
    let mut space = [0xee; 48];
    device.read_config(0, &mut space);
    assert_eq!(space[33], 2);
    assert_eq!(space[36..], [0; 12]);
    device.read_config(usize::MAX, &mut space);
    assert_eq!(space, [0; 48]);
    let generation = device.config_generation();
    device.change_config(|config| config.probe_size = 100);
    assert_eq!(device.config_generation(), generation + 1);
    assert!(device.take_config_interrupt());
    device.inject.generation_changes = 2;
    let seen: Vec<_> = (0..4).map(|_| device.config_generation()).collect();
    assert_eq!(seen, [generation + 2, generation + 3, generation + 3, generation + 3]);
}

#[test]
fn fields_without_their_feature_read_0() {
    let device = Device::new(Config::cloud_hypervisor());
    let mut space = [0xee; 40];
    device.read_config(0, &mut space);
    assert_eq!(space[..8], 0x20_1000_u64.to_le_bytes());
    assert_eq!(space[8..32], [0; 24]);
    assert_eq!(space[32..40], [24, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn queues_check_sizes_and_addresses() {
    let mut device = Device::new(Config { queue_sizes: [64, 0], ..Config::default() });
    assert_eq!([0, 1, 2].map(|queue| device.queue_max_size(queue)), [64, 0, 0]);
    assert_eq!(device.set_queue(0, 0, 0, 0, 0), Err(QueueError::Size(0)));
    assert_eq!(device.set_queue(0, 48, 0, 0, 0), Err(QueueError::Size(48)));
    assert_eq!(device.set_queue(0, 128, 0, 0, 0), Err(QueueError::Size(128)));
    assert_eq!(device.set_queue(0, 64, 8, 0, 0), Err(QueueError::Alignment));
    assert_eq!(device.set_queue(0, 64, 0, 1, 0), Err(QueueError::Alignment));
    assert_eq!(device.set_queue(0, 64, 0, 0, 2), Err(QueueError::Alignment));
    assert_eq!(device.set_queue(1, 64, 0, 0, 0), Err(QueueError::NoSuchQueue));
    assert_eq!(device.set_queue(9, 64, 0, 0, 0), Err(QueueError::NoSuchQueue));
    assert_eq!(device.set_queue(0, 64, 0, 0, 0), Ok(()));
    assert!(device.queue_enabled(0) && !device.queue_enabled(1) && !device.queue_enabled(9));
}

#[test]
fn a_queue_reset_keeps_domains() {
    let mut rig = Rig::new(Config::default());
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.map(1, 0, 0xfff, BUFFERS, READ), OK);
    rig.device.reset_queue(0);
    rig.device.reset_queue(9);
    assert!(!rig.device.queue_enabled(0));
    let queue = &mut rig.requests;
    (queue.next_avail, queue.seen_used) = (0, 0);
    rig.device.set_queue(0, 256, queue.desc, queue.avail, queue.used).unwrap();
    rig.mem.bytes_mut()[..0x1_0000].fill(0);
    assert_eq!(rig.unmap(1, 0, 0xfff), OK);
}

/// A driver that writes anything anywhere must not make the device panic or loop.
#[test]
fn random_bytes_in_rings_do_no_harm() {
    let mut seed = 0x1234_5678_9abc_def1_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for config in [Config::default(), Config::qemu_10(), Config::cloud_hypervisor(), Config::crosvm()] {
        for _ in 0..300 {
            let mut rig = Rig::new(config.clone());
            for _ in 0..20 {
                let at = rig.slot((random() % 4) as u16);
                let request: Vec<u8> = (0..72).map(|_| (random() % 8) as u8 * (random() % 2) as u8).collect();
                rig.poke(at, &request);
                let pieces: Vec<_> = (0..1 + random() % 4)
                    .map(|_| (at + random() % 64, (random() % 90) as u32, (random() % 8) as u16))
                    .collect();
                let head = (random() % 250) as u16;
                rig.write_chain(0, head, &pieces);
                rig.make_available(0, head);
                if random() % 4 == 0 {
                    let byte = crate::rig::BASE + random() % 0x2_0000;
                    rig.poke(byte, &[random() as u8]);
                }
                rig.kick((random() % 3) as u16);
                let mut buf = [0; 16];
                let access = virtio_iommu_model::Access::Read(&mut buf);
                rig.device
                    .access(&mut rig.mem, (random() % 10) as u32, random() >> (random() % 64), access)
                    .ok();
            }
        }
    }
}
