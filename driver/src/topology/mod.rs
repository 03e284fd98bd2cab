//! Which endpoints are behind which IOMMU, as firmware says.
//!
//! Parsers over bytes that the kernel found: zero-copy, no allocation, no panic whatever the bytes are.
#![forbid(unsafe_code)]

pub mod fdt;
pub mod viot;
