//! The platform-level interrupt controller (RISC-V PLIC specification 1.0.0).
//!
//! ```text
//! 0x00_0000 + 4 s         priority of source s; 0 is never
//! 0x00_2000 + 0x80 c      which sources context c takes, a bit for each
//! 0x20_0000 + 0x1000 c    the priority that a source must be above
//!                  + 4    read: the source that waits, or 0; write: it is served
//! ```
//! A context is one privilege level of one hart. The device tree lists all of them, by the interrupt of the hart that
//! each makes.

use alloc::format;

use crate::arch::interrupts;
use crate::firmware::device_tree::{DeviceTree, DeviceTreeError, Node};
use crate::interrupts::InterruptError;
use crate::memory::map_registers;
use crate::mmio::Mmio;

const COMPATIBLE: [&str; 2] = ["sifive,plic-1.0.0", "riscv,plic0"];
/// The interrupt of a hart by which S-mode's context comes.
const EXTERNAL: u32 = 9;
/// The most sources that a PLIC has, and the most contexts.
const MAX_SOURCES: u32 = 1023;
const MAX_CONTEXTS: usize = 15872;

const ENABLES: usize = 0x2000;
const ENABLE_BYTES: usize = 0x80;
const CONTEXTS: usize = 0x20_0000;
const CONTEXT_BYTES: usize = 0x1000;
const CLAIM: usize = 4;

/// The controller, as one hart sees it.
#[derive(Debug)]
pub(super) struct Plic {
    registers: Mmio,
    context: usize,
    sources: u32,
}

impl Plic {
    /// Finds the controller and this hart's context, and turns every source off.
    pub(super) fn start(tree: &DeviceTree<'_>, hart: u64) -> Result<Self, InterruptError> {
        let none = |reason| InterruptError::NoController { reason };
        let of_tree = |error: DeviceTreeError| none(format!("{error}"));
        let node = COMPATIBLE.iter().find_map(|name| tree.compatible(name).next());
        let node = node.ok_or(DeviceTreeError::Absent { compatible: COMPATIBLE[0] }).map_err(of_tree)?;
        let range = node.registers().map_err(of_tree)?.first().copied();
        let range = range.ok_or_else(|| of_tree(node.wrong("reg", "is empty")))?;
        let sources = node.cell("riscv,ndev").unwrap_or(0).min(MAX_SOURCES);
        let context = context_of(tree, &node, hart).ok_or_else(|| {
            of_tree(node.wrong("interrupts-extended", format!("names no context of hart {hart}")))
        })?;
        let needed = CONTEXTS + (context + 1) * CONTEXT_BYTES;
        if (needed as u64) > range.len_bytes() {
            return Err(of_tree(node.wrong("reg", format!("has no room for context {context} in {range}"))));
        }
        // SAFETY: firmware says that the controller's registers are there; no reference is made of them.
        let registers = unsafe { map_registers(range.start(), range.len_bytes()) };
        let plic = Self { registers: registers.map_err(InterruptError::Registers)?, context, sources };
        (1..=sources).for_each(|source| plic.disable(source));
        plic.registers.write32(CONTEXTS + context * CONTEXT_BYTES, 0);
        Ok(plic)
    }

    /// Lets a source come.
    pub(super) fn enable(&self, source: u32) -> Result<(), InterruptError> {
        if !(1..=self.sources).contains(&source) {
            return Err(InterruptError::NoLine { number: source });
        }
        self.registers.write32(4 * source as usize, 1);
        self.set(source, |word, bit| word | bit);
        Ok(())
    }

    /// Stops a source.
    pub(super) fn disable(&self, source: u32) {
        if (1..=self.sources).contains(&source) {
            self.set(source, |word, bit| word & !bit);
        }
    }

    /// A source that waits, which does not come again until [`complete`](Self::complete).
    pub(super) fn claim(&self) -> Option<u32> {
        let source = self.registers.read32(CONTEXTS + self.context * CONTEXT_BYTES + CLAIM);
        (source != 0).then_some(source)
    }

    /// Says that a source was served.
    pub(super) fn complete(&self, source: u32) {
        self.registers.write32(CONTEXTS + self.context * CONTEXT_BYTES + CLAIM, source);
    }

    fn set(&self, source: u32, change: impl Fn(u32, u32) -> u32) {
        let at = ENABLES + self.context * ENABLE_BYTES + source as usize / 32 * 4;
        let saved = interrupts::save_and_disable();
        self.registers.write32(at, change(self.registers.read32(at), 1 << (source % 32)));
        interrupts::restore(saved);
    }
}

/// The place in `interrupts-extended` of a hart's external interrupt: pairs of an interrupt controller inside of a hart and
/// its interrupt's number.
fn context_of(tree: &DeviceTree<'_>, node: &Node<'_>, hart: u64) -> Option<usize> {
    let cells = node.cells("interrupts-extended")?;
    let (pairs, _) = cells.as_chunks::<2>();
    pairs.iter().take(MAX_CONTEXTS).position(|[phandle, interrupt]| {
        let of_hart = || {
            let cpu = tree.by_phandle(*phandle)?.parent()?;
            let reg = cpu.cells("reg")?;
            Some(reg.iter().fold(0, |id, cell| id << 32 | u64::from(*cell)))
        };
        *interrupt == EXTERNAL && of_hart() == Some(hart)
    })
}
