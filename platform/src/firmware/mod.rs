//! What the boot loader hands over.

pub mod start_info;
