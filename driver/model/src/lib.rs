//! An independent software virtio-iommu *device*: the peer that drivers are tested against.
//!
//! It was written from the standard's text and shares no code and no constant with any driver, so that a mistake on one side
//! is not cancelled out by the same mistake on the other. It is strict by default: where the standard leaves a choice, it takes
//! the one that a careless driver would notice. [`Quirks`] make it behave as known devices do, [`Injection`] makes it
//! misbehave on demand.
//!
//! ```text
//!  driver under test                       test
//!     | features, status, config, queues,    | add_endpoint, access, translate,
//!     | notify, interrupts                   | inject, release, log, violations
//!     v                                      v
//!  +--------------------------- Device -----------------------------+
//!  | transport -> ring -> process -> iommu (domains, mappings)      |
//!  |                         dma  ---^   `-> event queue            |
//!  +----------------------------- GuestMemory ----------------------+
//! ```
//!
//! Nothing that a driver can do makes it panic, loop without bound, or allocate without bound. A malformed ring makes it
//! set NEEDS_RESET. Rules of the standard are cited as R-01 to R-51 (device) and D-01 to D-41 (driver), the numbers that this
//! project's notes give to the normative clauses of virtio 1.2 to 1.4, section "IOMMU device".
//!
//! # Examples
//!
//! ```
//! use virtio_iommu_model::{Access, Config, Device, Endpoint, VecMemory};
//!
//! let mut mem = VecMemory::new(0x8000_0000, 0x1000);
//! let mut device = Device::new(Config::default());
//! device.add_endpoint(Endpoint::new(8));
//! // No driver has come yet, and the device was made to bypass until one does.
//! assert!(device.access(&mut mem, 8, 0x8000_0010, Access::Write(&[1, 2])).is_ok());
//! assert_eq!(mem.bytes()[0x10..0x12], [1, 2]);
//! ```

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod backend;
mod bytes;
mod chain;
mod check;
mod config;
mod device;
mod dma;
mod domain;
mod endpoint;
mod execute;
mod fault;
mod inject;
mod iommu;
mod memory;
mod met;
mod number;
mod page;
mod process;
mod queues;
mod quirks;
mod record;
mod request;
mod ring;
mod transport;
pub mod walk;

pub use backend::Backend;
pub use config::Config;
pub use device::Device;
pub use domain::Mapping;
pub use endpoint::{ContextProperties, Endpoint, ReservedRegion};
pub use fault::{Access, AccessError, AccessKind, Doorbell, Fault, FaultReason};
pub use inject::{Execute, Inject, Injection, Random, Release};
pub use iommu::Crash;
pub use memory::{GuestMemory, OutOfMemoryRange, VecMemory};
pub use number::{EVENT_QUEUE, REQUEST_QUEUE, Status, device_status, feature, flag};
pub use page::{PageAnswer, PageError, PageRequest};
pub use queues::isr;
pub use quirks::{Detach, FaultStyle, LastAddress, Quirks, ShortProbe};
pub use record::{Answer, ConfigWrite, Counters, LogEntry, Violation};
pub use request::Request;
pub use ring::{QueueError, RingError};
