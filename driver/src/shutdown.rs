//! The global bypass, and the end of the driver.

use crate::error::{BypassError, DetachError, RequestError, StartError};
use crate::exchange::Shared;
use crate::id::EndpointId;
use crate::platform::Platform;
use crate::recover::{Pause, RecoverError};
use crate::start::{give_back, reset};
use crate::transport::DeviceStatus;
use crate::viommu::Viommu;
use crate::wire::config::offset;
use crate::wire::feature::Features;
use core::fmt;
use core::sync::atomic::Ordering;

/// How the driver leaves endpoints at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// Reaching nothing, where the device has BYPASS_CONFIG; the next driver has to attach them.
    Blocked,
    /// As before the driver started: in no domain, and the bypass as it was found.
    AsFound,
}

/// The driver could not be shut down in order. It is shut down all the same: no request is sent any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ShutdownError {
    /// An endpoint could not be detached; the others were tried.
    Detach(DetachError),
    /// The bypass could not be written.
    Bypass(BypassError),
    /// The device did not finish its reset: the memory of its queues is lost.
    Reset(StartError),
    /// A recovery is under way. The driver goes on, without the endpoints that were detached already.
    Recovering,
}

impl fmt::Display for ShutdownError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Detach(error) => error.fmt(f),
            Self::Bypass(error) => error.fmt(f),
            Self::Reset(error) => error.fmt(f),
            Self::Recovering => f.write_str("a recovery is under way"),
        }
    }
}

impl core::error::Error for ShutdownError {}

impl<P: Platform> Viommu<P> {
    /// Reads the bypass (virtio 1.4, IOMMU device, `bypass` of the configuration): 1 when endpoints that are not
    /// attached reach all of memory, else 0. The other bits of the field are ignored.
    ///
    /// # Errors
    /// [`BypassError`].
    pub fn read_bypass(&self) -> Result<u8, BypassError> {
        if !self.features().contains(Features::BYPASS_CONFIG) {
            return Err(BypassError::NoFeature);
        }
        if self.is_shut_down() {
            return Err(BypassError::ShutDown);
        }
        let value = self.shared.transport.read_config_u8(offset::BYPASS);
        value.map(|value| value & 1).map_err(BypassError::Access)
    }

    /// Lets endpoints that are not attached reach all of memory.
    ///
    /// # Errors
    /// [`BypassError`].
    ///
    /// # Safety
    /// No endpoint that is not attached does DMA, or all that it may do is to memory that is meant for it.
    pub unsafe fn open_bypass(&self) -> Result<(), BypassError> {
        self.read_bypass()?;
        let _pause = self.pause()?;
        self.expect_bypass();
        self.write_bypass(1)
    }

    /// No recovery resets the device meanwhile.
    fn pause(&self) -> Result<Pause<'_, P>, BypassError> {
        Pause::new(&self.shared).map_err(|error| match error {
            RecoverError::ShutDown => BypassError::ShutDown,
            _ => BypassError::Recovering,
        })
    }

    /// Takes note that unattached endpoints may reach memory. Before the device is told, since what is released
    /// on the strength of a closed bypass must not be any more.
    fn expect_bypass(&self) {
        let mut state = self.shared.state.lock();
        (state.engine.bypass_closed, state.bypass_due) = (false, false);
        drop(state);
        self.shared.live.store(false, Ordering::Release);
    }

    fn is_shut_down(&self) -> bool {
        self.shared.state.lock().dead == Some(RequestError::ShutDown)
    }

    /// Blocks endpoints that are not attached. [`Staged::go_live`](crate::Staged::go_live) does.
    ///
    /// # Errors
    /// [`BypassError`].
    pub fn close_bypass(&self) -> Result<(), BypassError> {
        self.read_bypass()?;
        let _pause = self.pause()?;
        self.write_bypass(0)?;
        self.shared.state.lock().engine.close_bypass();
        self.shared.live.store(true, Ordering::Release);
        Ok(())
    }

    pub(crate) fn write_bypass(&self, wrote: u8) -> Result<(), BypassError> {
        // Reading first tells a device without the feature.
        self.read_bypass()?;
        // A recovery that failed left the device without features.
        if !self.shared.transport.status().contains(DeviceStatus::FEATURES_OK) {
            return Err(BypassError::NotStarted);
        }
        self.shared.transport.write_config_u8(offset::BYPASS, wrote).map_err(BypassError::Access)?;
        let reads = self.read_bypass()?;
        if reads == wrote { Ok(()) } else { Err(BypassError::Stuck { wrote, reads }) }
    }

    /// Detaches all endpoints, leaves the bypass as asked, and resets the device. No request is sent after this, by
    /// any handle, and a second call does nothing. Memory that is still mapped goes back when its handles are
    /// unmapped, as far as the device confirmed that its domain died.
    ///
    /// # Errors
    /// [`ShutdownError`], the first of what went wrong.
    ///
    /// # Safety
    /// With [`Leave::AsFound`] no endpoint does DMA any more, or what it may reach then is meant for it.
    pub unsafe fn shutdown(&self, leave: Leave) -> Result<(), ShutdownError> {
        if self.is_shut_down() {
            return Ok(());
        }
        let shared = &self.shared;
        if shared.state.lock().paused {
            return Err(ShutdownError::Recovering);
        }
        let mut result = Ok(());
        let mut done: Option<EndpointId> = None;
        // Bounded: each round goes to a higher number.
        while let Some(endpoint) = { shared.state.lock().engine.next_attached(done) } {
            done = Some(endpoint);
            if let Err(error) = self.detach(endpoint) {
                result = result.and(Err(ShutdownError::Detach(error)));
            }
        }
        // No recovery finds the bypass open, or brings the device back.
        let _pause = match Pause::new(shared) {
            Ok(pause) => pause,
            Err(RecoverError::ShutDown) => return result,
            Err(_) => return Err(ShutdownError::Recovering),
        };
        let bypass = match leave {
            Leave::AsFound => shared.bypass_found,
            Leave::Blocked => shared.bypass_found.and(Some(0)),
        };
        if let Some(bypass) = bypass {
            if bypass != 0 {
                self.expect_bypass();
            }
            if let Err(error) = self.write_bypass(bypass) {
                result = result.and(Err(ShutdownError::Bypass(error)));
            }
        }
        shared.end(RequestError::ShutDown);
        match reset(&*shared.transport, &shared.platform, &shared.options) {
            Ok(()) => shared.forgotten.store(true, Ordering::Release),
            Err(error) => result = result.and(Err(ShutdownError::Reset(error))),
        }
        result
    }
}

impl<P: Platform> Drop for Shared<P> {
    /// Gives the queues' memory back if the device forgot them. Else it stays the device's for ever.
    fn drop(&mut self) {
        if !self.forgotten.load(Ordering::Acquire) {
            return;
        }
        let state = self.state.get_mut();
        for ring in [state.requests.ring(), state.events.ring()] {
            give_back(&self.platform, ring.memory().region());
        }
    }
}
