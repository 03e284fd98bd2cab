//! The kernel's panic: message and place at once, then the end of the machine.

use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::arch::backtrace;
use crate::console::print_now;
use crate::power::{self, ExitCode};

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    static PANICKING: AtomicBool = AtomicBool::new(false);
    if PANICKING.swap(true, Ordering::Relaxed) {
        print_now(format_args!("\npanic while panicking\n"));
        power::exit(ExitCode::Panic);
    }
    match info.location() {
        Some(place) => print_now(format_args!("\npanic at {place}: {}\n", info.message())),
        None => print_now(format_args!("\npanic: {}\n", info.message())),
    }
    print_now(format_args!("  called from"));
    backtrace::here().for_each(|address| print_now(format_args!(" {address:#x}")));
    print_now(format_args!("\n"));
    power::exit(ExitCode::Panic)
}
