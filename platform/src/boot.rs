//! From the architecture's entry to the kernel's main function.
//!
//! The order matters: what firmware left in RAM is found before any memory is handed out, so that none of it can be; the page
//! tables come from frames below what the boot loader's or the boot page tables map; only then is the rest of RAM used.

use alloc::vec::Vec;

use crate::command_line::CommandLine;
use crate::memory::map::MemoryMap;
use crate::range::PhysRange;

/// What the boot loader said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootInfo {
    /// The command line.
    pub command_line: CommandLine,
    /// The memory map.
    pub memory_map: MemoryMap,
    /// The physical address of the ACPI root pointer.
    pub rsdp: Option<u64>,
    /// Where the device tree lies.
    pub device_tree: Option<PhysRange>,
    /// Where further files lie that the boot loader loaded. They are kept out of the allocators.
    pub modules: Vec<PhysRange>,
}

#[cfg(target_os = "none")]
pub use kernel::start;

#[cfg(target_os = "none")]
mod kernel {
    use alloc::vec::Vec;

    use super::BootInfo;
    use crate::acpi::Tables;
    use crate::arch::{boot as entry, mmu};
    use crate::console::set_log_level;
    use crate::image;
    use crate::memory::frames::{self, FRAME_BYTES};
    use crate::memory::heap;
    use crate::memory::physical::PhysicalMemory;
    use crate::power::{self, ExitCode};
    use crate::println;
    use crate::range::{PhysRange, RangeSet};

    unsafe extern "Rust" {
        /// The kernel's main function, which the binary defines with [`entry!`](crate::entry).
        safe fn kernel_main(info: BootInfo) -> !;
    }

    /// Sets memory up and goes on to the kernel's main function. `reachable` is what the boot page tables map, and
    /// `memory` reads it.
    pub fn start(info: BootInfo, memory: &impl PhysicalMemory, reachable: PhysRange) -> ! {
        if let Some(word) = info.command_line.get("log")
            && let Err(error) = set_log_level(word)
        {
            println!("{error}");
            power::exit(ExitCode::Fail);
        }
        let taken = taken(&info, memory);
        let usable = info.memory_map.usable(&taken);
        let Some((heap, now, later)) = divide(&usable, reachable) else {
            println!(
                "cannot boot: no {} bytes of contiguous RAM for the heap; give the machine more memory",
                heap::size_for(0)
            );
            power::exit(ExitCode::Fail);
        };
        // SAFETY: `divide` made the parts disjoint, of RAM that firmware's map leaves to us and nothing else was given.
        unsafe {
            heap::extend(heap);
            now.iter().for_each(|range| frames::add(range));
        }
        if let Err(error) = mmu::init(&info.memory_map) {
            println!("cannot boot: {error}");
            power::exit(ExitCode::Fail);
        }
        // SAFETY: as above; `mmu::init` mapped this part too.
        later.iter().for_each(|range| unsafe { frames::add(range) });
        kernel_main(info)
    }

    /// The ranges of RAM that are in use already.
    fn taken(info: &BootInfo, memory: &impl PhysicalMemory) -> Vec<PhysRange> {
        let mut taken = info.modules.clone();
        taken.extend(entry::firmware_memory());
        taken.push(image::whole());
        taken.extend(info.device_tree);
        // A machine with a device tree is not searched for tables that nobody mentioned.
        if info.rsdp.is_some() || info.device_tree.is_none() {
            // A machine without good tables boots as well; who needs them reports what is wrong.
            let tables = Tables::find_all(memory, info.rsdp).ok();
            taken.extend(tables.iter().flat_map(Tables::ranges));
        }
        taken
    }

    /// Divides usable RAM into the heap, frames that are reachable now, and frames that the kernel's own page tables
    /// will reach.
    fn divide(usable: &RangeSet, reachable: PhysRange) -> Option<(PhysRange, RangeSet, RangeSet)> {
        let mut now = usable.clone();
        PhysRange::new(reachable.last().checked_add(1)?, u64::MAX)
            .into_iter()
            .for_each(|above| now.remove(above));
        let mut later = usable.clone();
        later.remove(reachable);
        PhysRange::new(mmu::highest_reachable_address() + 1, u64::MAX)
            .into_iter()
            .for_each(|above| later.remove(above));

        let largest = now.iter().max_by_key(|range| range.len_bytes())?;
        let wanted = heap::size_for(usable.len_bytes());
        // The rest of the largest part stays for frames, the page tables' first of all.
        let len_bytes = wanted.min(largest.len_bytes() / 2) & !(FRAME_BYTES - 1);
        let heap = PhysRange::from_len(largest.start(), len_bytes)?;
        now.remove(heap);
        (len_bytes >= heap::size_for(0).min(wanted)).then_some((heap, now, later))
    }
}

/// Makes a function of the kernel binary the kernel's main function: `fn(BootInfo) -> !`.
#[macro_export]
macro_rules! entry {
    ($main:path) => {
        #[unsafe(no_mangle)]
        extern "Rust" fn kernel_main(info: $crate::boot::BootInfo) -> ! {
            $main(info)
        }
    };
}
