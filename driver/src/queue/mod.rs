//! The two queues of the device, over the ring: requests in slots, events in buffers.
//!
//! Sans-IO: no lock, no clock, no doorbell. Whoever calls `publish` and gets `true` rings it.

mod batch;
mod event;
mod request;
mod slot;

pub(crate) use batch::Batch;
pub(crate) use event::{Event, EventQueue};
pub(crate) use request::{Answer, Completion, RequestQueue};
pub(crate) use slot::Outcome;
