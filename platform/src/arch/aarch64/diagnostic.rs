//! A port that does nothing, which this architecture lacks: the figures of `cargo xtask bench` are made on x86_64.

/// Does nothing.
pub fn write(_: u8) {}
