//! Bringing the device up, in the order that leaves no window.
//!
//! ```text
//!   reset -> ACKNOWLEDGE, DRIVER -> features -> FEATURES_OK, read back -> configuration -> queues -> DRIVER_OK
//!         -> Staged: unattached endpoints still do as they did
//!         -> introduce: PROBE each endpoint; attach and detach it once, so that domains of an earlier life die
//!         -> go_live: bypass = 0. From here an endpoint reaches only what is mapped for it.
//! ```
//! The embedder keeps bus mastering off for every function but the IOMMU until its endpoint is attached.

use crate::addr::{Iova, IovaRange};
use crate::barrier;
use crate::engine::{Engine, Geometry, Limits};
use crate::error::{BypassError, StartError};
use crate::exchange::{Deadline, EVENT_QUEUE, REQUEST_QUEUE, Shared, State, StateLock};
use crate::options::Options;
use crate::platform::{DmaMemory, Platform};
use crate::queue::{EventQueue, RequestQueue};
use crate::ring::{ALIGN, Ring, Suppression};
use crate::shared_memory::SharedMemory;
use crate::sync::{AtomicBool, AtomicUsize, Ordering};
use crate::transport::{DeviceStatus, DoorbellCell, QueueAddresses, Transport, TransportError};
use crate::viommu::Viommu;
use crate::wire::config::offset;
use crate::wire::feature::Features;
use alloc::boxed::Box;
use alloc::sync::Arc;
use core::ops::Deref;

/// The most bytes of properties that the driver takes: `probe_size` is the device's word.
const MAX_PROBE_SIZE: u32 = 64 * 1024;
/// How often the configuration is read again when it changes meanwhile.
const MAX_CONFIG_READS: usize = 16;

/// A started IOMMU that has not closed its bypass yet. Endpoints can be attached and mapped already.
///
/// Dropping it leaves the device as it is.
pub struct Staged<P: Platform>(pub(crate) Viommu<P>);

impl<P: Platform> Deref for Staged<P> {
    type Target = Viommu<P>;
    fn deref(&self) -> &Viommu<P> {
        &self.0
    }
}

/// What an endpoint that is not attached can reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unattached {
    /// Nothing: the driver closed the bypass.
    Blocked,
    /// Nothing, by the standard: the device has no bypass that is in effect.
    BlockedByDevice,
    /// All of memory: [`Staged::go_live`] was not called yet, or the legacy BYPASS was accepted.
    Bypasses,
}

/// Resets and starts a virtio-iommu.
///
/// On an error the device is reset again, or marked as failed where it does not answer. Memory that it may
/// still reach is then not given back.
pub(crate) fn start<P: Platform>(
    transport: Box<dyn Transport>,
    platform: P,
    options: Options,
) -> Result<Staged<P>, StartError> {
    match negotiate(&*transport, &platform, &options) {
        Ok((geometry, features, probe_size)) => {
            run(transport, platform, options, geometry, features, probe_size)
        }
        Err(error) => {
            transport.set_status(transport.status() | DeviceStatus::FAILED);
            Err(error)
        }
    }
}

pub(crate) fn negotiate<P: Platform>(
    transport: &dyn Transport,
    platform: &P,
    options: &Options,
) -> Result<(Geometry, Features, u32), StartError> {
    reset(transport, platform, options)?;
    let mut status = DeviceStatus::ACKNOWLEDGE;
    transport.set_status(status);
    status |= DeviceStatus::DRIVER;
    transport.set_status(status);

    let offered = transport.device_features();
    let mut features = Features::from_bits_truncate(offered) & Features::ACCEPTED;
    features
        .set(Features::RING_RESET, features.contains(Features::RING_RESET) && transport.can_reset_queues());
    let legacy = Features::from_bits_truncate(offered).contains(Features::BYPASS);
    let superseded = features.contains(Features::BYPASS_CONFIG);
    features.set(Features::BYPASS, options.accept_legacy_bypass && legacy && !superseded);
    #[cfg(feature = "contexts")]
    features.set(Features::CONTEXTS, options.accept_contexts && offered & Features::CONTEXTS.bits() != 0);
    if !features.contains(Features::REQUIRED) {
        return Err(StartError::MissingFeatures { missing: Features::REQUIRED - features, offered });
    }
    transport.set_driver_features(features.bits());
    status |= DeviceStatus::FEATURES_OK;
    transport.set_status(status);
    // The device takes the bit back when it cannot work with what was accepted.
    if !transport.status().contains(DeviceStatus::FEATURES_OK) {
        return Err(StartError::FeaturesRefused { asked: features });
    }
    let (geometry, probe_size) = read_config(transport, features)?;
    Ok((geometry, features, probe_size))
}

pub(crate) fn reset<P: Platform>(
    transport: &dyn Transport,
    platform: &P,
    options: &Options,
) -> Result<(), StartError> {
    transport.set_status(DeviceStatus::empty());
    let mut deadline = Deadline::new();
    loop {
        let status = transport.status();
        if status.is_empty() {
            return Ok(());
        }
        if deadline.passed(platform, options) {
            return Err(StartError::ResetTimedOut { status });
        }
        platform.relax();
    }
}

/// Reads and checks the configuration. Fields count only when their feature was negotiated.
fn read_config(transport: &dyn Transport, features: Features) -> Result<(Geometry, u32), StartError> {
    for _ in 0..MAX_CONFIG_READS {
        let generation = transport.config_generation();
        let config = read_config_once(transport, features).map_err(StartError::Config)?;
        if transport.config_generation() == generation {
            return check_config(config, features);
        }
    }
    Err(StartError::ConfigUnstable)
}

struct Config {
    page_size_mask: u64,
    input_range: (u64, u64),
    domain_range: (u32, u32),
    probe_size: u32,
}

fn read_config_once(transport: &dyn Transport, features: Features) -> Result<Config, TransportError> {
    let u64_at = |offset| {
        let low = transport.read_config_u32(offset)?;
        let high = transport.read_config_u32(offset + 4)?;
        Ok(u64::from(low) | u64::from(high) << 32)
    };
    let mut config = Config {
        page_size_mask: u64_at(offset::PAGE_SIZE_MASK)?,
        input_range: (0, u64::MAX),
        domain_range: (0, u32::MAX),
        probe_size: 0,
    };
    if features.contains(Features::INPUT_RANGE) {
        config.input_range = (u64_at(offset::INPUT_START)?, u64_at(offset::INPUT_END)?);
    }
    if features.contains(Features::DOMAIN_RANGE) {
        config.domain_range = (
            transport.read_config_u32(offset::DOMAIN_START)?,
            transport.read_config_u32(offset::DOMAIN_END)?,
        );
    }
    if features.contains(Features::PROBE) {
        config.probe_size = transport.read_config_u32(offset::PROBE_SIZE)?;
    }
    Ok(config)
}

fn check_config(config: Config, features: Features) -> Result<(Geometry, u32), StartError> {
    let bad = |field, value| Err(StartError::BadConfig { field, value });
    if config.page_size_mask == 0 {
        return bad("page_size_mask", 0);
    }
    let granule = 1 << config.page_size_mask.trailing_zeros();
    let (start, end) = config.input_range;
    let Some(usable) = usable_range(start, end, granule) else {
        return bad("input_range", start);
    };
    if config.domain_range.0 > config.domain_range.1 {
        return bad("domain_range", config.domain_range.0.into());
    }
    if config.probe_size > MAX_PROBE_SIZE {
        return bad("probe_size", config.probe_size.into());
    }
    let geometry = Geometry {
        granule,
        usable,
        domain_ids: config.domain_range,
        mmio_flag: features.contains(Features::MMIO),
    };
    Ok((geometry, config.probe_size))
}

/// The whole granules of the input range, without the last one of the 64-bit space (I5).
fn usable_range(start: u64, end: u64, granule: u64) -> Option<IovaRange> {
    let mask = granule - 1;
    let first = start.checked_add(mask)? & !mask;
    let last = if end & mask == mask { end } else { (end & !mask).checked_sub(1)? };
    let last = if last == u64::MAX { u64::MAX.checked_sub(granule)? } else { last };
    IovaRange::new(Iova::new(first), Iova::new(last))
}

/// Sets up the queues and starts the device.
fn run<P: Platform>(
    transport: Box<dyn Transport>,
    platform: P,
    options: Options,
    geometry: Geometry,
    features: Features,
    probe_size: u32,
) -> Result<Staged<P>, StartError> {
    let suppression =
        if features.contains(Features::EVENT_IDX) { Suppression::EventIndex } else { Suppression::Flags };
    let fail = |transport: &dyn Transport, error| {
        transport.set_status(transport.status() | DeviceStatus::FAILED);
        Err(error)
    };

    let (request_memory, size) = match queue_memory(&*transport, &platform, &options, REQUEST_QUEUE, |size| {
        RequestQueue::memory_len(size, probe_size as usize)
    }) {
        Ok(memory) => memory,
        Err(error) => return fail(&*transport, error),
    };
    let requests = RequestQueue::new(request_memory, size, suppression, probe_size as usize);
    let (event_memory, size) =
        match queue_memory(&*transport, &platform, &options, EVENT_QUEUE, EventQueue::memory_len) {
            Ok(memory) => memory,
            Err(error) => {
                give_back(&platform, requests.ring().memory().region());
                return fail(&*transport, error);
            }
        };
    let mut events = EventQueue::new(event_memory, size, suppression);
    #[cfg(feature = "contexts")]
    events.read_long_records(features.contains(Features::CONTEXTS));

    let enable = |queue, ring: &Ring| enable(&*transport, queue, ring.size(), ring.addresses());
    let started = enable(REQUEST_QUEUE, requests.ring())
        .and_then(|()| enable(EVENT_QUEUE, events.ring()))
        .and_then(|()| set_running(&*transport));
    if let Err(error) = started {
        // The device knows the rings: they are free only after it forgot them.
        if reset(&*transport, &platform, &options).is_ok() {
            give_back(&platform, requests.ring().memory().region());
            give_back(&platform, events.ring().memory().region());
        } else {
            log::error!("the IOMMU does not finish its reset: its queues' memory is lost");
        }
        return fail(&*transport, error);
    }
    if events.publish() {
        barrier::memory_before_doorbell();
        transport.notify(EVENT_QUEUE);
    }

    let bypass_found = match features.contains(Features::BYPASS_CONFIG) {
        true => transport.read_config_u8(offset::BYPASS).ok().map(|value| value & 1),
        false => None,
    };
    let limits = Limits::new(&options);
    let engine = Engine::new(geometry, limits, options.own_endpoint);
    let state = State::new(engine, requests, events, options.fault_backlog);
    // SAFETY: `Shared` has both, and drops the transport last.
    let request_doorbell = unsafe { DoorbellCell::new(transport.doorbell(REQUEST_QUEUE)) };
    let shared = Arc::new(Shared {
        platform,
        request_doorbell,
        transport,
        options,
        granule: geometry.granule,
        state: StateLock::new(state),
        doorbell: AtomicBool::new(false),
        kicks: AtomicUsize::new(0),
        live: AtomicBool::new(false),
        bypass_found,
        forgotten: AtomicBool::new(false),
        interrupted: AtomicBool::new(false),
        changed: AtomicBool::new(false),
    });
    Ok(Staged(Viommu::new(shared, features, geometry, probe_size as usize)))
}

fn queue_memory<P: Platform>(
    transport: &dyn Transport,
    platform: &P,
    options: &Options,
    queue: u16,
    len: impl Fn(u16) -> usize,
) -> Result<(SharedMemory, u16), StartError> {
    let size = transport.max_queue_size(queue).min(options.queue_size).min(1 << 15);
    let size = if size == 0 { 0 } else { 1 << size.ilog2() };
    if size < 2 {
        return Err(StartError::QueueTooSmall { queue, size });
    }
    let len = len(size);
    let memory = platform.dma_alloc(len, ALIGN).ok_or(StartError::NoMemory { len })?;
    // SAFETY: the platform gave it to us alone, valid and aligned.
    Ok((unsafe { SharedMemory::new(memory) }, size))
}

/// Gives a queue's memory back. The device does not know it, or forgot it by a reset.
pub(crate) fn give_back<P: Platform>(platform: &P, memory: DmaMemory) {
    // SAFETY: from `dma_alloc` with this alignment, and used by nobody any more.
    unsafe { platform.dma_free(memory, ALIGN) };
}

pub(crate) fn enable(
    transport: &dyn Transport,
    queue: u16,
    size: u16,
    addresses: QueueAddresses,
) -> Result<(), StartError> {
    transport.enable_queue(queue, size, addresses).map_err(StartError::Queue)
}

/// Sets DRIVER_OK.
pub(crate) fn set_running(transport: &dyn Transport) -> Result<(), StartError> {
    transport.set_status(transport.status() | DeviceStatus::DRIVER_OK);
    match transport.status().contains(DeviceStatus::NEEDS_RESET) {
        true => Err(StartError::NeedsReset),
        false => Ok(()),
    }
}

impl<P: Platform> Staged<P> {
    /// Closes the bypass: from now on an endpoint that is not attached reaches nothing, unless the embedder had the
    /// legacy BYPASS accepted.
    ///
    /// # Errors
    /// [`StartError::Bypass`]: unattached endpoints then reach all of memory, so that no bus mastering may be turned
    /// on.
    pub fn go_live(self) -> Result<Viommu<P>, StartError> {
        match self.0.close_bypass() {
            // Without the feature unattached endpoints should be blocked too, but that is not known (I1).
            Ok(()) | Err(BypassError::NoFeature) => {}
            Err(error) => return Err(StartError::Bypass(error)),
        }
        self.0.shared.live.store(true, Ordering::Release);
        Ok(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usable_range_is_whole_granules_without_the_very_last() {
        let range = |start, last| IovaRange::new(Iova::new(start), Iova::new(last));
        assert_eq!(usable_range(0, u64::MAX, 0x1000), range(0, u64::MAX - 0x1000));
        assert_eq!(usable_range(0, u64::MAX, 1), range(0, u64::MAX - 1));
        assert_eq!(usable_range(0, 0x7f_ffff_ffff, 0x1000), range(0, 0x7f_ffff_ffff));
        assert_eq!(usable_range(0x1800, 0x3fff, 0x1000), range(0x2000, 0x3fff));
        assert_eq!(usable_range(0x1000, 0x37ff, 0x1000), range(0x1000, 0x2fff));
        assert_eq!(usable_range(0x2000, 0x1fff, 0x1000), None);
        assert_eq!(usable_range(0, 0x7ff, 0x1000), None);
        assert_eq!(usable_range(u64::MAX - 5, u64::MAX, 0x1000), None);
        assert_eq!(usable_range(0, u64::MAX, 1 << 63), range(0, (1 << 63) - 1));
    }
}
