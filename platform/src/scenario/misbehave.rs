//! Guests that end badly, and guests that the harness must not believe.

use alloc::vec::Vec;
use core::hint::black_box;

use crate::power::{self, ExitCode};
use crate::println;
use crate::report::Report;

/// Panics.
pub(super) fn panic() -> ! {
    panic!("asked for by the command line")
}

/// Reads where nothing is mapped.
pub(super) fn page_fault() -> ! {
    // SAFETY: not sound, and not meant to be: nothing is mapped there, and the fault is what is tested.
    let value = unsafe { (0x0000_7123_4567_8000 as *const u64).read_volatile() };
    println!("read {value:#x}");
    power::exit(ExitCode::Fail)
}

/// Writes to its own code.
pub(super) fn write_code() -> ! {
    // SAFETY: not sound, and not meant to be: code is not writable, and the fault is what is tested.
    unsafe { (write_code as *mut u8).write_volatile(0) };
    power::exit(ExitCode::Fail)
}

/// Runs over the end of its stack.
pub(super) fn stack_overflow() -> ! {
    println!("{}", deeper(1));
    power::exit(ExitCode::Fail)
}

#[expect(unconditional_recursion, reason = "running over the stack is what is tested")]
fn deeper(depth: u64) -> u64 {
    let frame = [depth; 64];
    deeper(black_box(frame)[3] + 1) + black_box(frame)[7]
}

/// Prints nothing at all, and never ends.
pub(super) fn silent() -> ! {
    loop {
        core::hint::spin_loop();
    }
}

/// Begins, and never ends.
pub(super) fn half() -> ! {
    let mut report = Report::start(2);
    let numbers: Vec<u64> = (0..1000).collect();
    report.check("half.heap", numbers.iter().sum::<u64>() == 499_500, "a thousand numbers");
    loop {
        core::hint::spin_loop();
    }
}

/// Passes everything, and says something that the protocol does not know.
pub(super) fn babble() -> ! {
    let mut report = Report::start(1);
    report.check("babble.talks", true, "an unknown line follows");
    println!("@@ applause please");
    report.end()
}
