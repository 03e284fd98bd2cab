//! Boots kernel images in QEMU and decides whether what they claim is true.
//!
//! ```text
//! boot ----> machine, device_tree, disk, server   what is put together before the start
//!   |
//!   '------> process           the running QEMU: lines, a deadline, an end that always comes
//!              |
//!              '-> protocol    what the guest claims          \
//!                  trace       what QEMU saw                   \
//!                  disk        what is in the image afterwards  > outcome
//!                  server      what came over the network      /
//!                  console     what came out of the console   /
//! ```
//!
//! While it runs, `hot_plug` does what the guest asks for, by QEMU's monitor (`qmp`), and `vhost_user` has a process
//! beside it that serves the IOMMU, and afterwards says what that was asked.
//!
//! `bench` reads what a measuring guest states beside its checks, and the trace to it.
//!
//! The guest is not trusted. It passes only if it printed a complete protocol, QEMU ended with the status that fits
//! it, QEMU's own trace has the same numbers ([`witness`]), the disk image holds what it says it wrote, and the server
//! and the console got what it says it sent.
//! `cargo xtask run` and `tests/machine.rs` use this library alike.

pub mod bench;
pub mod boot;
pub mod console;
mod device_tree;
pub mod disk;
mod firmware;
mod hot_plug;
pub mod machine;
pub mod process;
pub mod protocol;
pub mod qemu;
mod qmp;
pub mod server;
mod socket;
pub mod trace;
mod vhost_user;
pub mod witness;
