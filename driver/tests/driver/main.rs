//! The driver through its public face, over the independent model of its device.

mod asynchronous;
mod attach;
#[cfg(feature = "virtio-drivers")]
mod bridge;
mod conformance;
mod constraints;
#[cfg(feature = "contexts")]
mod contexts;
mod deferred;
mod dma;
#[cfg(feature = "dma-api-0_10")]
mod dma_api;
mod each;
mod faults;
mod groups;
mod hostile_device;
mod identity;
mod ladder;
mod lists;
mod locks;
mod map;
mod mappings;
mod msi;
mod peer;
mod pools;
mod quirks;
mod recovery;
mod regressions;
mod sequences;
mod shutdown;
mod start;
mod streaming;
mod stress;
mod support;
mod suspend;
mod tags;
mod timeouts;

#[global_allocator]
static HEAP: support::WatchedHeap = support::WatchedHeap;
