//! The model of a virtio-iommu as a vhost-user backend: a device that a VMM has on a real bus, with the draft's contexts.
//!
//! ```text
//!   guest    driver                  what drives the agents
//!              | rings in memory       | registers behind the configuration
//!   ===========|=======================|=============================== virtio-pci
//!   VMM        '-- eventfds, memfd     '-- GET_CONFIG, SET_CONFIG
//!              |                       |
//!   here     backend: the model <--- window: agents that do DMA
//!              | DMA of agents, translated
//!            memory: the guest's own
//! ```
//!
//! A VMM needs a vhost-user device whose kind can be chosen, as QEMU 11's `vhost-user-test-device-pci` is. It cannot
//! let the DMA of its other devices be translated out here, so that endpoints live here too: agents, which a guest
//! tells through a [`window`] what to access. What they read and write is the guest's memory, by the translation that
//! the guest's driver set up.
//!
//! To a backend a guest that resets its device looks the same as a VMM that pauses: the rings stop. It takes both for a reset.

#![cfg(target_os = "linux")]
#![forbid(unsafe_code)]

mod backend;
mod config;
mod memory;
mod protocol;
mod server;
pub mod window;

pub use backend::{Backend, CONFIG_LEN, Requests, draft};
pub use protocol::Served;
pub use server::{End, Server};
