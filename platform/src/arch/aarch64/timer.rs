//! The generic timer's interrupt, for sleeping no longer than was asked.

use core::arch::asm;
use core::sync::atomic::{AtomicU32, Ordering};

use super::{clock, interrupts};
use crate::firmware::device_tree::DeviceTree;
use crate::interrupts::Line;

const COMPATIBLE: &str = "arm,armv8-timer";
/// Its interrupts in the device tree: secure, non-secure, virtual, hypervisor's; three cells each.
const VIRTUAL: usize = 2;
const CELLS: usize = 3;

/// CNTV_CTL_EL0: the timer is on.
const ENABLE: u64 = 1;

/// The number of the interrupt; 0 for none, which is never its.
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// The line of the virtual timer.
pub(super) fn line(tree: &DeviceTree<'_>) -> Option<Line> {
    let cells = tree.compatible(COMPATIBLE).next()?.cells("interrupts")?;
    interrupts::line(cells.chunks_exact(CELLS).nth(VIRTUAL)?)
}

/// Says that the line is on, so that there is something to wait for.
pub(super) fn use_interrupt(number: u32) {
    NUMBER.store(number, Ordering::Relaxed);
}

/// Whether an interrupt is the timer's.
pub(super) fn is_own(number: u32) -> bool {
    number == NUMBER.load(Ordering::Relaxed)
}

/// Has this CPU interrupted at a time; `false` where that is not possible.
pub(super) fn start(at_ns: u64) -> bool {
    let count = clock::count_at(at_ns).filter(|_| NUMBER.load(Ordering::Relaxed) != 0);
    if let Some(count) = count {
        // SAFETY: this CPU's own timer, which nothing else uses.
        unsafe {
            asm!(
                "msr cntv_cval_el0, {count}",
                "msr cntv_ctl_el0, {control}",
                "isb",
                count = in(reg) count,
                control = in(reg) ENABLE,
                options(nomem, nostack, preserves_flags),
            );
        }
    }
    count.is_some()
}

/// Stops it, and its interrupt with it.
pub(super) fn stop() {
    // SAFETY: as above.
    unsafe { asm!("msr cntv_ctl_el0, xzr", "isb", options(nomem, nostack, preserves_flags)) };
}
