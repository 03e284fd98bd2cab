//! The kernel's main function.

use platform::boot::BootInfo;
use platform::scenario;

platform::entry!(main);

fn main(info: BootInfo) -> ! {
    scenario::run(&info)
}
