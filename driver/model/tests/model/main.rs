//! The model through its public face, driven by raw request bytes.

mod bypass;
mod contexts;
mod dma;
mod injection;
mod qtest_cases;
mod quirks;
mod rig;
mod ring;
mod rules_domain;
mod rules_mapping;
mod rules_probe;
mod transport;
mod unmap_examples;
mod walks;
