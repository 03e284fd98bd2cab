//! The device tree: found, bounded, checked, and walked.
//!
//! The `dtoolkit` crate reads the bytes; here is what a kernel asks of them: nodes by what they are compatible with or by
//! phandle, with their registers at physical addresses, translated by the `ranges` of each bus above.
//!
//! A tree that is not whole is refused as one. What is wrong inside of a property is said with the node's name and the
//! property's, and a node that cannot be understood hides no other.
//!
//! Bounds: a tree has at most [`MAX_BYTES`], is at most [`MAX_DEPTH`] nodes deep, and of a list no more is taken than
//! its user says.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use dtoolkit::fdt::{Fdt, FdtNode};
use dtoolkit::standard::{NodeStandard, Range};
use dtoolkit::{Node as _, Property as _};

pub mod boot;
pub mod interrupts;
pub mod pci;

use crate::memory::physical::PhysicalMemory;
use crate::range::PhysRange;

/// The longest tree that is accepted. Linux takes no more either.
pub const MAX_BYTES: usize = 2 << 20;
/// The most nodes on the way from the root to one, both included.
pub const MAX_DEPTH: usize = 16;

/// The first four bytes, and the length of the header.
const MAGIC: u32 = 0xd00d_feed;
const HEADER_BYTES: usize = 40;

/// A device tree, or a node of it, that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceTreeError {
    /// An address at which no memory can be reached.
    Unreachable {
        /// The address.
        phys: u64,
        /// How many bytes should be there.
        len_bytes: usize,
    },
    /// It begins with something else.
    Magic {
        /// Where it should be.
        phys: u64,
        /// The first four bytes.
        found: u32,
    },
    /// A length that is shorter than the header, or beyond the bound.
    Length {
        /// Where the tree lies.
        phys: u64,
        /// The length that it states.
        len_bytes: usize,
    },
    /// The bytes are no tree.
    Malformed {
        /// Where the tree lies.
        phys: u64,
        /// What is wrong.
        reason: String,
    },
    /// No node says where RAM is.
    NoMemory,
    /// There is no node that is compatible with this.
    Absent {
        /// What was looked for.
        compatible: &'static str,
    },
    /// A property is not what its binding says.
    Property {
        /// The node's name.
        node: String,
        /// The property.
        property: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

impl fmt::Display for DeviceTreeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable { phys, len_bytes } => {
                write!(f, "device tree: {len_bytes:#x} bytes at {phys:#x} cannot be reached")
            }
            Self::Magic { phys, found } => {
                write!(f, "no device tree at {phys:#x}: it begins with {found:#x} instead of {MAGIC:#x}")
            }
            Self::Length { phys, len_bytes } => {
                write!(f, "the device tree at {phys:#x} states a length of {len_bytes:#x} bytes")
            }
            Self::Malformed { phys, reason } => write!(f, "the device tree at {phys:#x} is broken: {reason}"),
            Self::NoMemory => f.write_str("the device tree has no memory node with RAM in it"),
            Self::Absent { compatible } => {
                write!(f, "the device tree has no node that is compatible with `{compatible}`")
            }
            Self::Property { node, property, reason } => {
                write!(f, "device tree: `{property}` of {node} {reason}")
            }
        }
    }
}

impl core::error::Error for DeviceTreeError {}

/// A device tree that is whole.
#[derive(Clone, Copy, Debug)]
pub struct DeviceTree<'m> {
    fdt: Fdt<'m>,
}

impl<'m> DeviceTree<'m> {
    /// Reads and checks the tree at `phys`.
    ///
    /// # Errors
    ///
    /// [`DeviceTreeError`], of the whole tree.
    pub fn read(memory: &'m impl PhysicalMemory, phys: u64) -> Result<Self, DeviceTreeError> {
        let unreachable = |len_bytes| DeviceTreeError::Unreachable { phys, len_bytes };
        let header = memory.bytes(phys, HEADER_BYTES).ok_or(unreachable(HEADER_BYTES))?;
        let word =
            |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        if word(0) != MAGIC {
            return Err(DeviceTreeError::Magic { phys, found: word(0) });
        }
        let len_bytes = word(4) as usize;
        if !(HEADER_BYTES..=MAX_BYTES).contains(&len_bytes) {
            return Err(DeviceTreeError::Length { phys, len_bytes });
        }
        let bytes = memory.bytes(phys, len_bytes).ok_or(unreachable(len_bytes))?;
        let malformed = |reason| DeviceTreeError::Malformed { phys, reason };
        let fdt = Fdt::new(bytes).map_err(|error| malformed(error.to_string()))?;
        Ok(Self { fdt })
    }

    /// Where the tree itself lies, for keeping it: `phys` is where it was read from.
    pub fn range(&self, phys: u64) -> Option<PhysRange> {
        PhysRange::from_len(phys, self.fdt.data().len() as u64)
    }

    /// Every node, each before its children. Nodes below [`MAX_DEPTH`] are left out.
    pub fn nodes(&self) -> impl Iterator<Item = Node<'m>> + use<'m> {
        let mut waiting = alloc::vec![Node { path: alloc::vec![self.fdt.root()] }];
        core::iter::from_fn(move || {
            let node = waiting.pop()?;
            if node.path.len() < MAX_DEPTH {
                let first = waiting.len();
                waiting.extend(node.children());
                // The last one is taken first.
                waiting[first..].reverse();
            }
            Some(node)
        })
    }

    /// The nodes that are in use and compatible with `name`, in the tree's order.
    pub fn compatible(&self, name: &'static str) -> impl Iterator<Item = Node<'m>> + use<'m> {
        self.nodes().filter(move |node| node.is_compatible(name) && node.is_in_use())
    }

    /// The node at a path of names, without their unit addresses, from the root.
    pub fn at(&self, path: &[&str]) -> Option<Node<'m>> {
        let root = Node { path: alloc::vec![self.fdt.root()] };
        path.iter().try_fold(root, |node, name| node.child(name))
    }

    /// The node with a phandle.
    pub fn by_phandle(&self, phandle: u32) -> Option<Node<'m>> {
        self.nodes().find(|node| node.phandle() == Some(phandle))
    }

    /// The areas that the tree's own list reserves.
    pub fn reservations(&self) -> impl Iterator<Item = PhysRange> + use<'m> {
        let entries = self.fdt.memory_reservations();
        entries.filter_map(|entry| PhysRange::from_len(entry.address(), entry.size()))
    }
}

/// A node, with the way to it from the root.
#[derive(Clone, Debug)]
pub struct Node<'m> {
    /// From the root to the node itself: never empty.
    path: Vec<FdtNode<'m>>,
}

impl<'m> Node<'m> {
    fn own(&self) -> FdtNode<'m> {
        self.path[self.path.len() - 1]
    }

    /// Whether the two are one node of one tree.
    pub fn is(&self, other: &Self) -> bool {
        let place = |node: &Self| node.own().name().as_ptr();
        place(self) == place(other)
    }

    /// Its name with its unit address, such as `pci@30000000`; the root has none.
    pub fn name(&self) -> &'m str {
        let node = self.own();
        let name: &'m str = dtoolkit::Node::name(&node);
        name
    }

    /// The nodes below.
    pub fn children(&self) -> impl Iterator<Item = Self> + '_ {
        let own = self.own();
        let children: Vec<_> = own.children().collect();
        children.into_iter().map(|child| {
            let mut path = self.path.clone();
            path.push(child);
            Self { path }
        })
    }

    /// The node below with this name, without its unit address.
    pub fn child(&self, name: &str) -> Option<Self> {
        self.children().find(|child| child.name().split('@').next() == Some(name))
    }

    /// The node above.
    pub fn parent(&self) -> Option<Self> {
        let (_, above) = self.path.split_last()?;
        (!above.is_empty()).then(|| Self { path: above.to_vec() })
    }

    /// Whether its `status` is absent or `okay`.
    pub fn is_in_use(&self) -> bool {
        self.text("status").is_none_or(|status| matches!(status, "okay" | "ok"))
    }

    /// Whether one of its `compatible` names is this one.
    pub fn is_compatible(&self, name: &str) -> bool {
        NodeStandard::is_compatible(&self.own(), name)
    }

    /// The bytes of a property.
    pub fn bytes(&self, property: &str) -> Option<&'m [u8]> {
        let own = self.own();
        own.property(property)?.value_as::<&'m [u8]>().ok()
    }

    /// A property as text, up to its first zero.
    pub fn text(&self, property: &str) -> Option<&'m str> {
        let bytes = self.bytes(property)?;
        core::str::from_utf8(bytes.split(|byte| *byte == 0).next()?).ok()
    }

    /// A property of one cell.
    pub fn cell(&self, property: &str) -> Option<u32> {
        Some(u32::from_be_bytes(self.bytes(property)?.try_into().ok()?))
    }

    /// A property as cells of 32 bits; `None` when it is absent or not made of whole ones.
    pub fn cells(&self, property: &str) -> Option<Vec<u32>> {
        let (cells, rest) = self.bytes(property)?.as_chunks::<4>();
        rest.is_empty().then(|| cells.iter().map(|cell| u32::from_be_bytes(*cell)).collect())
    }

    /// The number by which other nodes name it.
    pub fn phandle(&self) -> Option<u32> {
        self.cell("phandle")
    }

    /// Its registers, or its memory, at physical addresses. An entry that is empty, or that a bus above does not pass on,
    /// is left out.
    ///
    /// # Errors
    ///
    /// [`DeviceTreeError::Property`] when `reg` is not made of whole entries.
    pub fn registers(&self) -> Result<Vec<PhysRange>, DeviceTreeError> {
        let wrong = |error: &dyn fmt::Display| self.wrong("reg", error.to_string());
        let Some(entries) = self.own().reg().map_err(|error| wrong(&error))? else { return Ok(Vec::new()) };
        let mut found = Vec::new();
        for entry in entries {
            let address: u64 = entry.address().map_err(|error| wrong(&error))?;
            let len_bytes: u64 = entry.size().map_err(|error| wrong(&error))?;
            found.extend(PhysRange::from_len(address, len_bytes).and_then(|range| self.to_physical(range)));
        }
        Ok(found)
    }

    /// The error of one of its properties.
    pub fn wrong(&self, property: &'static str, reason: impl Into<String>) -> DeviceTreeError {
        DeviceTreeError::Property { node: String::from(self.name()), property, reason: reason.into() }
    }

    /// Addresses of its parent's bus as physical ones. A bus without `ranges` passes nothing on, one with an empty one
    /// everything.
    pub fn to_physical(&self, range: PhysRange) -> Option<PhysRange> {
        // The root's addresses are physical; from each bus below it a range goes up one level.
        let buses = &self.path[..self.path.len() - 1];
        buses.iter().skip(1).rev().try_fold(range, |range, bus| {
            let own = bus.property("ranges")?.value_as::<&[u8]>().ok()?;
            if own.is_empty() {
                return Some(range);
            }
            bus.ranges().ok()??.find_map(|entry| translate(entry, range))
        })
    }
}

/// A range of a bus by one entry of its `ranges`, on the bus above.
fn translate(entry: Range<'_>, range: PhysRange) -> Option<PhysRange> {
    let child: u64 = entry.child_bus_address().ok()?;
    let parent: u64 = entry.parent_bus_address().ok()?;
    let within = PhysRange::from_len(child, entry.length().ok()?)?;
    if !within.contains(range) {
        return None;
    }
    PhysRange::from_len(parent.checked_add(range.start() - child)?, range.len_bytes())
}

#[cfg(test)]
pub(crate) mod tests;
