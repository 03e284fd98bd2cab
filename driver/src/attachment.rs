//! Attaching endpoints to domains, alone or with those that they cannot be isolated from.

use crate::dma::Endpoint;
use crate::domain::Domain;
use crate::error::{AttachError, DetachError, DmaError, GroupError};
use crate::exchange::{self, Need, Sent};
use crate::id::EndpointId;
use crate::options::EndpointOptions;
use crate::platform::Platform;
use crate::viommu::Viommu;
use core::fmt;

impl<P: Platform> Viommu<P> {
    /// Attaches an endpoint to a domain (virtio 1.4, IOMMU device, ATTACH request). [`open`](Self::open) does, and
    /// gives the view that a device driver wants.
    ///
    /// An endpoint that the driver does not know yet is probed first. Attaching it again to its own domain sends
    /// nothing. What the domain had mapped before it lost its last endpoint is mapped again. Its reserved regions stay
    /// out of the domain's addresses, also after it left. All endpoints of its [`group`](Self::group) are attached with
    /// it. Turn its bus mastering on only after this succeeded. Allocates when it probes.
    ///
    /// # Errors
    /// [`AttachError`]. The endpoint's bus mastering must then stay off.
    pub fn attach(&self, endpoint: EndpointId, domain: &Domain<P>) -> Result<(), AttachError> {
        match exchange::attach_first(&self.shared, endpoint, domain.key()) {
            Ok(()) => Ok(()),
            Err(sent) => self.attach_rest(endpoint, domain, sent),
        }
    }

    /// What is left after the first step.
    #[cold]
    fn attach_rest(
        &self,
        endpoint: EndpointId,
        domain: &Domain<P>,
        sent: Option<usize>,
    ) -> Result<(), AttachError> {
        if let Some(slot) = sent {
            let answered = self.shared.block_on(self.shared.wait_for(slot).outcome());
            answered.map_err(|error| AttachError::Request { endpoint, error })?;
        }
        // It sends nothing where that attached the endpoint, and does what else there is to do.
        self.shared.block_on(self.attach_async(endpoint, domain))
    }

    /// [`attach`](Self::attach) as a future. Dropped before its end it leaves the endpoint attached, or in a state that
    /// is unknown until the device answers.
    ///
    /// # Errors
    /// As for [`attach`](Self::attach).
    pub async fn attach_async(&self, endpoint: EndpointId, domain: &Domain<P>) -> Result<(), AttachError> {
        self.attach_known(endpoint, domain).await.map(|_| ())
    }

    async fn attach_known(&self, endpoint: EndpointId, domain: &Domain<P>) -> Result<Sent, AttachError> {
        let needed = self.shared.state.lock().engine.needs_introduction(endpoint)?;
        if needed {
            let mut reserved = self.probe(endpoint, Need::Probe).await?;
            self.shared.state.lock().engine.introduce(endpoint, &mut reserved);
        }
        let fresh = { !self.shared.state.lock().engine.group_is_in(endpoint, domain.key()) };
        let mut sent = Sent::Nothing;
        let mut done = None;
        // Bounded: each round goes to a higher number.
        while let Some(member) = { self.shared.state.lock().engine.next_of_group(endpoint, done) } {
            done = Some(member);
            match self.shared.attach(member, domain.key()).await {
                Ok(Sent::Nothing) => {}
                Ok(Sent::Request) => sent = Sent::Request,
                Err(error) => {
                    if fresh {
                        self.undo_attach(endpoint, domain).await;
                    }
                    return Err(error);
                }
            }
        }
        self.shared.state.lock().engine.want(endpoint, true);
        Ok(sent)
    }

    /// Not all of a group could be attached, so that none is to be.
    async fn undo_attach(&self, endpoint: EndpointId, domain: &Domain<P>) {
        let mut done = None;
        // Bounded: each round goes to a higher number.
        while let Some(member) = { self.shared.state.lock().engine.next_of_group(endpoint, done) } {
            done = Some(member);
            if !self.shared.is_attached(member, domain.key()) {
                continue;
            }
            self.shared.state.lock().engine.want(member, false);
            if let Err(error) = self.shared.detach(member).await {
                log::error!("endpoint {member} of a group stays attached: {error}");
            }
        }
    }

    /// Makes a group of endpoints whose accesses the device cannot tell apart, such as all that share the number of
    /// a PCIe-to-PCI bridge: they are in one domain, or in none (virtio 1.4, IOMMU device, driver requirements of
    /// ATTACH). Attaching one attaches all, that number included; they are detached when the last one is that was
    /// asked for.
    ///
    /// # Errors
    /// [`GroupError`]: each has to be known, in no domain and in no group.
    pub fn group(&self, members: &[EndpointId]) -> Result<(), GroupError> {
        self.shared.state.lock().engine.group(members)
    }

    /// Attaches an endpoint to a domain and gives its view of it, with bounce pages if asked for: what the
    /// endpoint's driver maps its memory through. There may be several views; closing one detaches for all.
    /// Allocates.
    ///
    /// # Errors
    /// [`OpenError`]. Where only the bounce pages failed, the endpoint is detached again if this attached it.
    pub fn open(
        &self,
        endpoint: EndpointId,
        domain: &Domain<P>,
        options: EndpointOptions,
    ) -> Result<Endpoint<P>, OpenError> {
        self.shared.block_on(self.open_async(endpoint, domain, options))
    }

    /// [`open`](Self::open) as a future. Dropped before its end it leaves the endpoint as
    /// [`attach_async`](Self::attach_async) does.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub async fn open_async(
        &self,
        endpoint: EndpointId,
        domain: &Domain<P>,
        options: EndpointOptions,
    ) -> Result<Endpoint<P>, OpenError> {
        let sent = self.attach_known(endpoint, domain).await.map_err(OpenError::Attach)?;
        self.shared.state.lock().engine.set_tag(endpoint, options.tag);
        let opened = Endpoint::new(self.clone(), endpoint, domain.clone(), options).await;
        if opened.is_err()
            && sent == Sent::Request
            && let Err(error) = self.detach_async(endpoint).await
        {
            log::error!("endpoint {endpoint} stays attached: {error}");
        }
        opened.map_err(OpenError::Dma)
    }

    /// Detaches an endpoint from its domain (virtio 1.4, IOMMU device, DETACH request). One that the device does
    /// not know any more, since it was unplugged, is detached, and a suspended one is it already. One of a
    /// [`group`](Self::group) stays as long as another one of it is asked for.
    ///
    /// If it was the last one and the bypass is known to be closed, the domain is dead: what was in quarantine is
    /// free, and live mappings stay recorded. Unmapping them takes no request then, and attaching an endpoint
    /// maps them again. Where the bypass is not known to be closed, unmap first.
    ///
    /// # Errors
    /// [`DetachError`]. The endpoint then counts as attached.
    pub fn detach(&self, endpoint: EndpointId) -> Result<(), DetachError> {
        match exchange::detach_first(&self.shared, endpoint) {
            Ok(true) => Ok(()),
            Ok(false) => {
                self.collect();
                Ok(())
            }
            Err(sent) => self.detach_rest(endpoint, sent),
        }
    }

    /// What is left after the first step.
    #[cold]
    fn detach_rest(&self, endpoint: EndpointId, sent: Option<usize>) -> Result<(), DetachError> {
        let Some(slot) = sent else { return self.shared.block_on(self.detach_async(endpoint)) };
        let outcome = self.shared.block_on(self.shared.wait_for(slot).outcome());
        let detached = self.shared.detached(endpoint, outcome);
        self.collect();
        detached
    }

    /// [`detach`](Self::detach) as a future. Dropped before its end it leaves the endpoint in a state that is
    /// unknown until the device answers, if the request was sent.
    ///
    /// # Errors
    /// As for [`detach`](Self::detach).
    pub async fn detach_async(&self, endpoint: EndpointId) -> Result<(), DetachError> {
        let (suspended, wanted) = {
            let engine = &mut self.shared.state.lock().engine;
            (engine.end_suspension(endpoint).is_some(), engine.want(endpoint, false))
        };
        if suspended || wanted {
            return Ok(());
        }
        let detached = self.detach_group(endpoint).await;
        self.collect();
        detached
    }

    /// The endpoint was unplugged: detaches it, and probes whatever comes back under its number before that is
    /// attached.
    ///
    /// # Errors
    /// [`DetachError::Request`]: it then counts as attached.
    pub fn forget(&self, endpoint: EndpointId) -> Result<(), DetachError> {
        match self.detach(endpoint) {
            Ok(()) | Err(DetachError::NotAttached(_)) => {}
            Err(error) => return Err(error),
        }
        self.shared.state.lock().engine.mark_stale(endpoint);
        Ok(())
    }

    /// Detaches an endpoint and all of its group. The first error; the others are tried.
    async fn detach_group(&self, endpoint: EndpointId) -> Result<(), DetachError> {
        let mut result = Ok(());
        let mut done = None;
        // Bounded: each round goes to a higher number.
        while let Some(member) = { self.shared.state.lock().engine.next_of_group(endpoint, done) } {
            done = Some(member);
            match self.shared.detach(member).await {
                Err(DetachError::NotAttached(_)) if member != endpoint => {}
                detached => result = result.and(detached),
            }
        }
        result
    }

    /// Moves an endpoint, and all of its [`group`](Self::group), to another domain: detaches it, and attaches it
    /// there. In between it reaches nothing, if the bypass is closed. Its old domain keeps its mappings for its
    /// other endpoints, and for when it gets one again.
    ///
    /// # Errors
    /// [`MoveError`], which says whether the endpoint is where it was, or nowhere.
    pub fn move_endpoint(&self, endpoint: EndpointId, to: &Domain<P>) -> Result<(), MoveError> {
        self.shared.block_on(self.move_endpoint_async(endpoint, to))
    }

    /// [`move_endpoint`](Self::move_endpoint) as a future. Dropped before its end it leaves the endpoint in either
    /// domain, or in none.
    ///
    /// # Errors
    /// As for [`move_endpoint`](Self::move_endpoint).
    pub async fn move_endpoint_async(&self, endpoint: EndpointId, to: &Domain<P>) -> Result<(), MoveError> {
        if self.shared.is_attached(endpoint, to.key()) {
            // Where it is already, but maybe not what it had mapped there.
            return self.attach_async(endpoint, to).await.map_err(MoveError::Attach);
        }
        // All of its group, whoever else wants them where they are.
        self.detach_group(endpoint).await.map_err(MoveError::Detach)?;
        self.collect();
        self.attach_async(endpoint, to).await.map_err(MoveError::Attach)
    }
}

/// An endpoint could not be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MoveError {
    /// It could not be detached, and is where it was.
    Detach(DetachError),
    /// It was detached, and could not be attached: it is in no domain.
    Attach(AttachError),
}

impl fmt::Display for MoveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Detach(error) => write!(f, "not moved: {error}"),
            Self::Attach(error) => write!(f, "left its domain, and did not get into the other: {error}"),
        }
    }
}

impl core::error::Error for MoveError {}

/// An endpoint could not be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OpenError {
    /// It could not be attached.
    Attach(AttachError),
    /// Its bounce pages could not be had.
    Dma(DmaError),
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Attach(error) => error.fmt(f),
            Self::Dma(error) => write!(f, "bounce pages: {error}"),
        }
    }
}

impl core::error::Error for OpenError {}
