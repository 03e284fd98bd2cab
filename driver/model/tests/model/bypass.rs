//! who bypasses, and when.

use virtio_iommu_model::{AccessKind, Config, Device, Endpoint, FaultReason, Quirks, feature};

use crate::rig::{BUFFERS, EP, OK, Rig};

fn passes(device: &Device) -> bool {
    let result = device.translate(EP, BUFFERS, AccessKind::Write);
    assert_eq!(result.is_ok(), device.bypasses(EP));
    assert!(matches!(result, Ok(BUFFERS) | Err(FaultReason::Domain | FaultReason::Mapping)));
    result.is_ok()
}

fn with_endpoint(config: Config) -> Device {
    let mut device = Device::new(config);
    device.add_endpoint(Endpoint::new(EP));
    device
}

const NO_CONFIG: u64 = !feature::BYPASS_CONFIG;

#[test]
fn r12_unattached_before_any_negotiation_goes_by_config() {
    for bypass in [false, true] {
        let config = Config { bypass, ..Config::default() };
        assert_eq!(passes(&with_endpoint(config.clone())), bypass);
        let absent = Config { features: config.features & NO_CONFIG, ..config };
        assert!(!passes(&with_endpoint(absent)));
    }
}

#[test]
fn r12_unattached_after_negotiation_goes_by_config_even_if_not_accepted() {
    for bypass in [false, true] {
        let config = Config { bypass, ..Config::default() };
        let all = config.features;
        assert_eq!(passes(&Rig::with_features(config.clone(), all).device), bypass);
        assert_eq!(passes(&Rig::with_features(config, all & NO_CONFIG).device), bypass);
    }
}

#[test]
fn r12_old_bypass_feature_counts_only_when_negotiated() {
    let features = Config::default().features & NO_CONFIG | feature::BYPASS;
    let config = Config { features, ..Config::default() };
    assert!(!passes(&with_endpoint(config.clone())));
    assert!(passes(&Rig::with_features(config.clone(), features).device));
    assert!(!passes(&Rig::with_features(config.clone(), features & !feature::BYPASS).device));
    let mut rig = Rig::new(config);
    assert_eq!(rig.attach(1, EP), OK);
    assert!(!passes(&rig.device));
    rig.device.set_status(0);
    assert!(!passes(&rig.device));
}

#[test]
fn r12_attached_goes_by_the_domain_whatever_the_config() {
    for bypass in [false, true] {
        let mut rig = Rig::new(Config { bypass, ..Config::default() });
        assert_eq!(rig.attach(1, EP), OK);
        assert!(!passes(&rig.device));
        assert_eq!(rig.attach_bypass(2, EP), OK);
        assert!(passes(&rig.device));
        assert_eq!(rig.detach(2, EP), OK);
        assert_eq!(passes(&rig.device), bypass);
    }
}

#[test]
fn r04_bypass_survives_device_reset_and_system_reset_restores_it() {
    let mut rig = Rig::new(Config::default());
    assert_eq!(rig.attach(1, EP), OK);
    rig.device.write_config(36, &[0]);
    rig.device.set_status(0);
    assert!(!passes(&rig.device));
    rig.device.system_reset();
    assert!(passes(&rig.device));
}

#[test]
fn r05_bypass_reads_0_or_1_whatever_is_written() {
    let mut rig = Rig::new(Config::default());
    for value in [0, 2, 0xff, 1] {
        rig.device.write_config(36, &[value]);
        let mut byte = [0xee];
        rig.device.read_config(36, &mut byte);
        assert!(byte[0] <= 1);
    }
    assert_eq!(rig.rules_broken(), ["D-03", "D-03"]);
}

#[test]
fn config_writes_of_other_widths_and_fields_are_recorded_and_ignored() {
    let mut rig = Rig::new(Config::default());
    rig.device.write_config(36, &[0, 0, 0, 0]);
    rig.device.write_config(0, &[1]);
    rig.device.write_config(usize::MAX, &[1; 100]);
    rig.device.write_config(36, &[0]);
    let writes: Vec<_> = rig.device.config_writes().map(|w| (w.offset, w.len_bytes, w.accepted)).collect();
    assert_eq!(writes, [(36, 4, false), (0, 1, false), (usize::MAX, 100, false), (36, 1, true)]);
    assert_eq!(rig.rules_broken(), ["D-02", "D-02", "D-02"]);
    assert!(!passes(&rig.device));
}

#[test]
fn bypass_cannot_be_written_without_negotiation() {
    let mut device = with_endpoint(Config::default());
    device.write_config(36, &[0]);
    assert!(passes(&device));
    let config = Config { config_len: 36, ..Config::default() };
    let mut rig = Rig::new(config);
    rig.device.write_config(36, &[0]);
    assert!(passes(&rig.device));
}

#[test]
fn bypass_until_written_and_read_noise() {
    let quirks = Quirks { bypass_until_written: true, bypass_read_noise: 0xfe, ..Quirks::default() };
    let mut rig = Rig::new(Config { bypass: false, quirks, ..Config::default() });
    assert!(passes(&rig.device));
    let mut byte = [0];
    rig.device.read_config(36, &mut byte);
    assert_eq!(byte, [0xfe]);
    rig.device.write_config(36, &[0]);
    assert!(!passes(&rig.device));
}
