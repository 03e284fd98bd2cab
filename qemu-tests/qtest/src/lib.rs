//! The driver in a host process, the device in QEMU.
//!
//! ```text
//!   test -- driver -- PciTransport -- safe-mmio -- Window --.
//!     |       |                                             | readl, writew, ... over a socket
//!     |       '-- HostPlatform -- Ram ====== one file ======+======== guest RAM ---- QEMU: virtio-iommu
//!     |                                                     |                          |
//!     '-- Requester (raw requests), Edu (accesses) ---------'                          '- edu, edu
//! ```
//!
//! QEMU runs with `-qtest`, which lets a process read and write the guest's registers and ports, and with a
//! processor that halts at once, so that no firmware gets in the way. The guest's RAM is a file that this
//! process maps too. The driver is the one that kernels link, byte for byte: only what a register access does
//! is exchanged, by `safe-mmio`'s `custom-mmio`.
//!
//! [`Requester`] sends what the driver never would, to QEMU and to the model alike ([`Peer`]).

mod edu;
mod function;
mod machine;
mod mmio;
mod peer;
mod platform;
mod ram;
mod requester;
mod wire;

pub use edu::{Edu, Transfer};
pub use function::Function;
pub use machine::{EDU, EDU2, HOST_BRIDGE, IOMMU, Machine};
pub use peer::{ModelPeer, Peer, QemuPeer};
pub use platform::HostPlatform;
pub use ram::Ram;
pub use requester::{Answer, Request, Requester};
