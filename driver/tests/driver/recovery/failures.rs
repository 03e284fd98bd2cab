//! Recoveries that fail: the driver stays dead and says so, nothing is given back, and the next one may succeed.

use virtio_iommu::transport::{DeviceStatus, TransportError};
use virtio_iommu::{
    BypassError, DmaDevice, Iova, Leave, MapError, RecoverError, Recovered, RequestError, ShutdownError,
    StartError, Unattached,
};
use virtio_iommu_model::{Config, Inject, device_status, feature};

use super::hooked::{self, Hooks};
use super::{Bench, bench};
use crate::support::{EP, Machine, PAGE, RW};

type Sabotage = fn(&Machine, &Hooks);
type Failure = (&'static str, Sabotage, fn(&RecoverError) -> bool, Sabotage);

/// What goes wrong, whether it is what the driver says, and how it is mended.
const FAILURES: [Failure; 11] = [
    (
        "a reset that does not end",
        |machine, _| machine.device().inject.slow_reset = u32::MAX,
        |error| matches!(error, RecoverError::Start(StartError::ResetTimedOut { .. })),
        |machine, _| machine.device().inject.slow_reset = 0,
    ),
    (
        "features refused",
        |machine, _| machine.device().inject.refuse_features_ok = 1,
        |error| matches!(error, RecoverError::Start(StartError::FeaturesRefused { .. })),
        |_, _| {},
    ),
    (
        "another input range",
        |machine, _| machine.device().change_config(|config| config.input_range = 0..=(1 << 30) - 1),
        |error| matches!(error, RecoverError::Changed { .. }),
        |machine, _| machine.device().change_config(|config| config.input_range = 0..=(1 << 39) - 1),
    ),
    (
        "a feature less",
        |machine, _| machine.device().change_config(|config| config.features &= !feature::MMIO),
        |error| matches!(error, RecoverError::Changed { .. }),
        |machine, _| machine.device().change_config(|config| config.features |= feature::MMIO),
    ),
    (
        "other properties",
        |machine, _| machine.device().change_config(|config| config.probe_size = 1024),
        |error| matches!(error, RecoverError::Changed { .. }),
        |machine, _| machine.device().change_config(|config| config.probe_size = 512),
    ),
    (
        "a configuration that changes all the time",
        |machine, _| machine.device().inject.generation_changes = u32::MAX,
        |error| matches!(error, RecoverError::Start(StartError::ConfigUnstable)),
        |machine, _| machine.device().inject.generation_changes = 0,
    ),
    (
        "a smaller queue",
        |_, hooks| hooks.set_max_size(Some(128)),
        |error| matches!(error, RecoverError::Start(StartError::QueueTooSmall { queue: 0, size: 128 })),
        |_, hooks| hooks.set_max_size(Some(512)),
    ),
    (
        "a queue less",
        |_, hooks| hooks.refuse(Some(1)),
        |error| {
            let refused = StartError::Queue(TransportError::NoQueue { queue: 1 });
            *error == RecoverError::Start(refused)
        },
        |_, hooks| hooks.refuse(None),
    ),
    (
        "a reset asked for at once",
        |machine, _| machine.at_driver_ok(|device| device.fail()),
        |error| *error == RecoverError::Start(StartError::NeedsReset),
        |_, _| {},
    ),
    (
        "a bypass that is stuck",
        |machine, _| machine.device().change_config(|config| config.quirks.bypass_read_noise = 1),
        |error| *error == RecoverError::Bypass(BypassError::Stuck { wrote: 0, reads: 1 }),
        |machine, _| machine.device().change_config(|config| config.quirks.bypass_read_noise = 0),
    ),
    (
        "a reset asked for in the middle",
        |machine, _| machine.inject([Inject::Pass, Inject::Pass, Inject::NeedsReset]),
        |error| *error == RecoverError::NeedsReset,
        |_, _| {},
    ),
];

fn assert_dead(bench: &Bench) {
    let at = Iova::new(0x10_0000);
    let (mapped, requests, kicks) = bench.machine.traffic(|| {
        // SAFETY: nobody but the test uses the memory.
        unsafe { bench.domain.map_at(at, bench.machine.memory(PAGE).phys, PAGE, RW) }
    });
    // Where the last recovery lost all endpoints, it is not worth asking the device.
    let why = matches!(mapped, Err(MapError::NotSent(RequestError::NeedsReset) | MapError::NoEndpoint));
    assert!(why, "{mapped:?}");
    assert_eq!((requests, kicks), (0, 0));
    assert!(bench.viommu.detach(EP).is_err());
    let (_, requests, kicks) = bench.machine.traffic(|| (bench.viommu.poll(), bench.viommu.reclaim()));
    assert_eq!((requests, kicks), (0, 0));
    assert_eq!(bench.viommu.reset_queues(), Err(RecoverError::NeedsReset), "that does not help");
    assert!(!bench.machine.is_lent_back(bench.stuck) && !bench.machine.is_lent_back(bench.live_phys));
}

/// Fails when a failed recovery leaves the driver alive, gives anything back, or keeps the next one from its work; when
/// a reset of the queues revives a driver that only `recover` can; when a bypass counts as closed that is not.
#[test]
fn i01_after_a_failed_recovery_nothing_moves_until_one_succeeds() {
    for (name, sabotage, is_expected, mend) in FAILURES {
        for config in [Config::default(), Config::qemu_10()] {
            let (mut bench, hooks) = hooked::bench(config);
            bench.fail();
            let blocks = bench.machine.outstanding();
            for _ in 0..2 {
                sabotage(&bench.machine, &hooks);
                let polls = bench.machine.relaxed();
                let error = bench.recover().unwrap_err();
                assert!(is_expected(&error), "{name}: {error}");
                assert!(bench.machine.relaxed() - polls < 1000, "{name}: bounded");
                assert_dead(&bench);
                assert_eq!(bench.machine.outstanding(), blocks, "{name}");
                if matches!(error, RecoverError::Bypass(_)) {
                    assert_eq!(bench.viommu.unattached(), Unattached::Bypasses);
                }
            }
            mend(&bench.machine, &hooks);
            let recovered = bench.recover().unwrap();
            assert_eq!(recovered, Recovered { endpoints: 2, detached: 0, lost: vec![] }, "{name}");
            assert_eq!(bench.viommu.unattached(), Unattached::Blocked);
            let outside = bench.machine.memory(PAGE).phys.get();
            assert!(!bench.machine.reaches(EP, outside));
            assert!(bench.machine.is_lent_back(bench.stuck), "{name}");
            bench.assert_works();
            assert_eq!(bench.machine.outstanding(), blocks, "{name}");
        }
    }
}

/// Fails when a shutdown after it writes to a device that is not started, or loses the queues' memory.
#[test]
fn after_a_failed_recovery_the_driver_can_be_shut_down() {
    for (name, sabotage, _, mend) in FAILURES {
        let (bench, hooks) = hooked::bench(Config::qemu_10());
        bench.fail();
        sabotage(&bench.machine, &hooks);
        bench.recover().unwrap_err();
        let stuck = bench.machine.device().inject.slow_reset > 0;
        // SAFETY: endpoints of a test do DMA only when it says so.
        let left = unsafe { bench.viommu.shutdown(Leave::AsFound) };
        assert!(matches!(left, Err(ShutdownError::Detach(_))), "{name}: {left:?}");
        // SAFETY: as above.
        assert_eq!(unsafe { bench.viommu.recover() }, Err(RecoverError::ShutDown));
        assert_eq!(bench.viommu.reset_queues(), Err(RecoverError::ShutDown));
        mend(&bench.machine, &hooks);
        let Bench { machine, endpoint, domain, viommu, .. } = bench;
        drop((endpoint, domain, viommu));
        // A device that does not end its reset has them for ever.
        assert_eq!(machine.outstanding(), if stuck { 2 } else { 0 }, "{name}");
    }
}

/// Fails when the bypass is written to a device that has no features.
#[test]
fn a_bypass_that_cannot_be_written_is_not() {
    let bench = bench(Config::qemu_10());
    bench.fail();
    bench.machine.device().inject.refuse_features_ok = 1;
    bench.recover().unwrap_err();
    let writes = bench.machine.device().config_writes().len();
    assert_eq!(bench.viommu.close_bypass(), Err(BypassError::NotStarted));
    assert_eq!(bench.machine.device().config_writes().len(), writes);
    assert_eq!(bench.viommu.unattached(), Unattached::Bypasses);
    bench.recover().unwrap();
    assert_eq!(bench.viommu.unattached(), Unattached::Blocked);
}

/// Fails when a device that is well cannot be reset, or a second reset loses what the first brought back.
#[test]
fn a_device_that_is_well_can_be_recovered_too() {
    let mut bench = bench(Config::qemu_11_1());
    for _ in 0..3 {
        assert_eq!(bench.recover().unwrap(), Recovered { endpoints: 2, detached: 0, lost: vec![] });
        assert!(bench.machine.is_lent_back(bench.stuck));
    }
    bench.assert_works();
    // It is what the driver says of it that counts.
    let status = bench.machine.device().status();
    assert_eq!(status & (device_status::NEEDS_RESET | device_status::FAILED), 0);
    assert_ne!(status & DeviceStatus::DRIVER_OK.bits(), 0);
    assert!(bench.endpoint.alloc_coherent(1).is_ok());
}
