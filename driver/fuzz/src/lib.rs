//! What fuzz targets of the driver stand on: memory, a kernel, and a session that runs operations.
//!
//! ```text
//!   Op ----> Session (handles of the driver, what it was told) ----> driver
//!               |                                                      | Transport, Kernel
//!               '--- asks: may it go back? is it reached? ---> World --'
//!                                                                |
//!                                      hostile: device that writes anything, and an account of what it said
//!                                      truthful: virtio-iommu-model, and what it really has mapped
//! ```
//! `contexts` has operations and a session of its own over the truthful device; `requests` turns it round, and tries the model.
//!
//! An input is a set-up and a list of steps, decoded by `arbitrary`: operations on the driver, and what the device is
//! to do when it is heard of next. Everything runs in one thread, so that an input does the same each time.

pub mod contexts;
pub mod hostile;
pub mod kernel;
pub mod op;
pub mod ram;
pub mod requests;
pub mod session;
pub mod truthful;

use std::fmt::Debug;
use std::sync::OnceLock;

use arbitrary::Arbitrary;

/// The most steps of one input.
pub const MAX_STEPS: usize = 400;

/// One step of an input.
#[derive(Clone, Debug, Arbitrary)]
pub enum Step<D> {
    /// The kernel does something.
    Op(op::Op),
    /// The device will.
    Device(D),
}

/// Shows what a run does, where `FUZZ_TRACE` is set: for looking at one input.
pub fn trace(what: &str, value: &dyn Debug) {
    static WANTED: OnceLock<bool> = OnceLock::new();
    if *WANTED.get_or_init(|| std::env::var_os("FUZZ_TRACE").is_some()) {
        eprintln!("{what} {value:x?}");
    }
}
