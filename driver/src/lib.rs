//! A guest-side driver for the virtio-iommu, for kernels that are not Linux.
//!
//! A virtio-iommu stands between endpoints (devices that do DMA) and memory. Endpoints are attached to
//! *domains*, and reach only what is *mapped* there, by addresses that mean nothing outside of it (IOVAs). What
//! they try beyond that is blocked, and reported as a *fault*.
//!
//! ```text
//!   device driver ---- DmaDevice: map, unmap, coherent memory, bounce pages
//!                          |
//!   kernel -------- Viommu: domains, attachment, faults       a lock, a clock, waiting
//!                          |
//!                   engine and queue                          records and requests: no lock, no clock
//!                          |
//!                   wire, ring, transport                     bytes, virtqueue, registers
//! ```
//!
//! # How a kernel uses it
//! 1. Implement [`Platform`]: a lock, memory for DMA, and a clock if there is one.
//! 2. Find the device and its endpoints, for instance by [`topology::viot`]; turn bus mastering off for all
//!    functions but the IOMMU.
//! 3. [`Viommu::start`] it over a [`transport`], [`introduce`](Staged::introduce) the endpoints, and
//!    [`go_live`](Staged::go_live).
//! 4. [`open`](Viommu::open) each endpoint in a domain, turn its bus mastering on, and give its driver the
//!    [`Endpoint`] as `&dyn` [`DmaDevice`], or run unmodified `virtio-drivers` devices through [`bridge`].
//!
//! ```no_run
//! use virtio_iommu::{DmaDevice, Domain, EndpointId, EndpointOptions, Options, Platform, Viommu};
//! # fn bring_up<P: Platform>(
//! #     transport: virtio_iommu::transport::pci::PciTransport, platform: P,
//! # ) -> Result<(), Box<dyn core::error::Error>> {
//! let disk = EndpointId::pci(0, 0, 2, 0);
//! let staged = Viommu::start(transport, platform, Options::default())?;
//! staged.introduce(disk)?;
//! let viommu = staged.go_live()?;
//! let domain = viommu.create_domain(Default::default())?;
//! let dma = viommu.open(disk, &domain, EndpointOptions::default())?;
//! // Bus mastering of the disk goes on here.
//! let ring = dma.alloc_coherent(4096)?;
//! println!("the disk finds its ring at {}", ring.iova());
//! # Ok(()) }
//! ```
//!
//! # Blocking and async
//! Each operation blocks, polling with a deadline, and has a twin that is a future: [`Domain::map_async`],
//! [`Viommu::attach_async`], [`Endpoint::adopt_async`] and so on. For those the kernel calls
//! [`on_interrupt`](Viommu::on_interrupt) in its handler and [`poll`](Viommu::poll) outside of it, which wakes whose
//! answer is there, and now and then `poll` for the sake of deadlines. A future that is dropped leaves its request
//! with the device, and what it touches in quarantine.
//!
//! # What it promises
//! Memory goes back to its owner only when the device confirmed that no endpoint reaches it any more. A request
//! that times out keeps its slot, its addresses and its memory in quarantine. Every wait has a deadline, and
//! nothing that the device writes is trusted.
//!
//! The crate's README, which is also the module `guide` of this documentation, shows a kernel's first isolated device, for
//! three kinds of kernels, and the way from one domain for all devices to one for each.
#![no_std]
#![cfg_attr(docsrs, feature(doc_cfg))]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod addr;
mod attachment;
mod barrier;
#[cfg(feature = "bench")]
#[doc(hidden)]
pub mod bench;
pub mod bridge;
#[cfg(feature = "contexts")]
pub mod contexts;
mod dma;
mod domain;
mod engine;
mod error;
mod exchange;
mod fault;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
mod id;
mod introduce;
mod lock;
mod mappings;
mod options;
mod platform;
mod prot;
mod queue;
mod recover;
mod ring;
mod rounds;
#[cfg_attr(loom, path = "shared_memory/tracked.rs")]
mod shared_memory;
mod shutdown;
mod start;
mod suspend;
mod sync;
#[cfg(test)]
mod test_memory;
pub mod topology;
pub mod transport;
mod viommu;
mod wire;

/// The crate's README. Its examples are compiled as tests.
#[cfg(all(any(doc, doctest), feature = "virtio-drivers", feature = "spin"))]
#[doc = include_str!("../README.md")]
pub mod guide {}

pub use addr::{Iova, IovaRange, PhysAddr};
pub use attachment::{MoveError, OpenError};
pub use dma::{
    Bidirectional, Bounced, BouncedAccess, CoherentMemory, CpuAccess, CpuWrites, DeviceWrites, DmaDevice,
    DmaDirection, DmaMapping, DmaPool, DmaSegment, DmaSegments, Endpoint, FromDevice, HeldMemory,
    MsiDoorbell, PhysSegment, PoolBuffer, Streaming, ToDevice, Unmapped,
};
pub use domain::Domain;
pub use engine::DomainStats;
pub use error::{
    AttachError, BypassError, DetachError, DmaError, DomainError, GroupError, MapError, RequestError,
    StartError, UnmapError,
};
pub use fault::FaultCounts;
pub use id::{DomainId, EndpointId};
pub use introduce::Introduction;
#[cfg(feature = "lock_api")]
pub use lock::LockApi;
pub use lock::RawLock;
#[cfg(feature = "spin")]
pub use lock::SpinNotInInterrupts;
pub use mappings::{MappingStatus, Mappings, Translation};
pub use options::{
    DeferredBounds, DomainKind, DomainOptions, EndpointOptions, FaultLimit, Options, UnmapPolicy,
};
pub use platform::{DmaMemory, Platform};
pub use prot::{Direction, Prot};
pub use recover::{RecoverError, Recovered};
pub use shutdown::{Leave, ShutdownError};
pub use start::{Staged, Unattached};
pub use viommu::{Interrupt, Stats, Viommu};
pub use wire::fault::{Fault, FaultAccess, FaultReason};
pub use wire::feature::Features;
pub use wire::property::{ReservedKind, ReservedRegion};
pub use wire::request::Status;
