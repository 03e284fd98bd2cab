//! The device's formats, byte by byte. No state, no unsafe, nothing that can fail on a device's account but by
//! saying so.
//!
//! Everything is little-endian. Ranges are inclusive, and `end` is the standard's word for the last address.
#![forbid(unsafe_code)]

pub(crate) mod config;
pub(crate) mod fault;
pub(crate) mod feature;
pub(crate) mod property;
pub(crate) mod request;
