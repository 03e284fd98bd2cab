//! What the boot loader hands over: tables and trees, read from memory that it filled.

pub mod device_tree;
pub mod start_info;
pub mod zero_page;
