//! Ending the machine: through SiFive's test finisher, which takes a code, or else through the firmware.

use core::arch::asm;
use core::hint;
use core::ptr::NonNull;

use spin::Once;

use crate::firmware::device_tree::DeviceTree;
use crate::mmio::Mmio;
use crate::power::ExitCode;
use crate::range::PhysRange;

/// QEMU's status is 0 for the first and the code in the upper half for the second.
const FINISH_PASS: u32 = 0x5555;
const FINISH_FAIL: u32 = 0x3333;
/// How long the finisher is given, in turns of a loop: a second or more.
const FINISH_SPINS: u32 = 500_000_000;
const COMPATIBLE: &str = "sifive,test0";
const REGISTER_BYTES: u64 = 4;

/// The finisher's registers; `None` inside where the machine has none.
static FINISHER: Once<Option<Mmio>> = Once::new();

/// Looks for the finisher in the tree.
pub(super) fn find(tree: &DeviceTree<'_>) {
    FINISHER.call_once(|| {
        let registers =
            tree.compatible(COMPATIBLE).find_map(|node| node.registers().ok()?.first().copied())?;
        let base = NonNull::new(registers.start() as *mut u8)?;
        let fits = registers.len_bytes() >= REGISTER_BYTES && registers.start().is_multiple_of(8);
        // SAFETY: firmware says that the finisher is there. Translation is off now, and `mmu::init` maps it for good.
        fits.then(|| unsafe { Mmio::new(base, REGISTER_BYTES as usize) })
    });
}

/// The finisher's registers, to be mapped.
pub(super) fn registers() -> Option<PhysRange> {
    let finisher = FINISHER.get()?.as_ref()?;
    PhysRange::from_len(finisher.base().addr().get() as u64, REGISTER_BYTES)
}

/// Ends the machine with `code`. Without a finisher the firmware turns the machine off, and the verdict is on the console
/// only; where it cannot, the CPU stops with interrupts off.
pub fn exit(code: ExitCode) -> ! {
    super::interrupts::save_and_disable();
    if let Some(Some(finisher)) = FINISHER.get() {
        finisher.write32(
            0,
            match code {
                ExitCode::Pass => FINISH_PASS,
                other => u32::from(other.value()) << 16 | FINISH_FAIL,
            },
        );
        // The machine goes on for a moment, and a second word would replace the first: the firmware has none but success.
        for _ in 0..FINISH_SPINS {
            hint::spin_loop();
        }
    }
    // It returns only where it failed.
    let _ = sbi_rt::system_reset(sbi_rt::Shutdown, sbi_rt::NoReason);
    halt()
}

/// Stops the CPU with interrupts off.
pub fn halt() -> ! {
    super::interrupts::save_and_disable();
    loop {
        // SAFETY: sleeping has no effect on memory.
        unsafe { asm!("wfi", options(nomem, nostack, preserves_flags)) };
    }
}
