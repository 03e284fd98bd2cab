//! A socket, and one front end at it.

use std::path::Path;

use anyhow::{Context as _, Result, anyhow};
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error, VhostUserDaemon};
use virtio_iommu_model::Device;

use crate::memory::Memory;
use crate::protocol::Served;

/// A socket that listens. It goes away with the value.
pub struct Server {
    listener: Listener,
    backend: Served,
}

/// How a front end left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It closed the socket, be it between messages or in one.
    Closed,
    /// It was shown the door: it said what cannot be.
    Refused(String),
}

impl Server {
    /// Listens at `path`, where nothing is yet.
    ///
    /// # Errors
    ///
    /// When there can be no socket.
    pub fn listen(path: &Path, device: Device) -> Result<Self> {
        let listener =
            Listener::new(path, false).with_context(|| format!("no socket at {}", path.display()))?;
        Ok(Self { listener, backend: Served::new(device) })
    }

    /// The backend, for a look while it serves and after.
    pub fn backend(&self) -> Served {
        self.backend.clone()
    }

    /// Serves the first front end that comes, until it goes. Blocks without a bound, since it is the front end that ends it.
    ///
    /// # Errors
    ///
    /// When serving is not possible at all.
    pub fn serve(mut self) -> Result<End> {
        let daemon =
            VhostUserDaemon::new("vhost-user-iommu".to_owned(), self.backend.clone(), Memory::none().0);
        let mut daemon = daemon.map_err(|error| anyhow!("{error}"))?;
        daemon.start(&mut self.listener).map_err(|error| anyhow!("{error}"))?;
        let end = match daemon.wait() {
            Ok(()) => Ok(End::Closed),
            Err(Error::HandleRequest(VhostUserError::Disconnected | VhostUserError::PartialMessage)) => {
                Ok(End::Closed)
            }
            Err(Error::HandleRequest(error)) => Ok(End::Refused(error.to_string())),
            Err(error) => Err(anyhow!("{error}")),
        };
        for handler in daemon.get_epoll_handlers() {
            handler.send_exit_event();
        }
        end
    }
}
