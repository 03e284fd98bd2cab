//! The kernel's main function: what the machine has, and checks of what the kernel is made of.

extern crate alloc;

use alloc::vec::Vec;

use platform::acpi::{madt, mcfg};
use platform::boot::BootInfo;
use platform::devices::edu::{self, Edu};
use platform::machine::Machine;
use platform::memory::dma::DmaPages;
use platform::memory::frames::{self, FRAME_BYTES};
use platform::pci::config::{ConfigSpace, offset};
use platform::pci::function::{BusMaster, MemoryDecode};
use platform::power::{self, ExitCode};
use platform::println;
use platform::report::{Outcome, Report};

platform::entry!(main);

fn main(info: BootInfo) -> ! {
    match info.command_line.get("scenario") {
        Some("panic") => panic!("asked for by the command line"),
        Some("fault") => read_unmapped(),
        Some("overflow") => println!("{}", overflow(1)),
        Some("write-code") => write_code(),
        Some("lost-heap") => drop(core::hint::black_box(Vec::<u8>::with_capacity(1 << 40))),
        _ => {}
    }
    show_memory(&info);
    let mut report = Report::start(6);
    check_heap(&mut report);
    check_frames(&mut report);
    let Some(machine) = report.check_result("acpi", Machine::discover(&info), |m| {
        alloc::format!("{} tables", m.tables.iter().count())
    }) else {
        report.end();
    };
    let machine = if info.command_line.get("scenario") == Some("unassigned") {
        unassign_and_rediscover(machine, &info)
    } else {
        machine
    };
    show_machine(&machine);
    let quiesced = machine.pci.quiesce_all();
    let masters = machine
        .pci
        .functions()
        .iter()
        .filter(|f| !f.is_bridge() && machine.pci.bus_master(f.address) == BusMaster::On);
    let masters = masters.count();
    report.check(
        "quiet",
        masters == 0,
        format_args!("{quiesced} functions had bus mastering on, {masters} have it now"),
    );
    check_edu(&mut report, &machine);
    report.end()
}

fn check_heap(report: &mut Report) {
    let numbers: Vec<u64> = (0..100_000).collect();
    let sum: u64 = numbers.iter().sum();
    report.check("heap", sum == 4_999_950_000, format_args!("{} bytes used", numbers.len() * 8));
}

fn check_frames(report: &mut Report) {
    let before = frames::usage();
    let mut ok = true;
    for align in [1, 2, 512] {
        match DmaPages::allocate_aligned(3, align) {
            Ok(mut pages) => {
                ok &= pages.all_bytes_are(0) && pages.phys().is_multiple_of(align as u64 * FRAME_BYTES);
                pages.fill(0xa5);
            }
            Err(error) => {
                println!("{error}");
                ok = false;
            }
        }
    }
    ok &= frames::usage() == before;
    report.check("frames", ok, format_args!("{} frames, {} used", before.total, before.used));
}

fn check_edu(report: &mut Report, machine: &Machine) {
    let Some(function) = machine.pci.with_id(edu::VENDOR, edu::DEVICE).next() else {
        report.check("edu", Outcome::Fail, "no edu device");
        report.check("edu-dma", Outcome::Fail, "no edu device");
        return;
    };
    let registers = match machine.map_bar(function, 0) {
        Ok(registers) => registers,
        Err(error) => {
            report.check("edu", Outcome::Fail, error);
            return;
        }
    };
    let edu = Edu::new(registers).and_then(|mut edu| edu.check_liveness(0x1234_5678).map(|()| edu));
    let Some(mut edu) =
        report.check_result("edu", edu, |edu| alloc::format!("identification {:#x}", edu.identification()))
    else {
        return;
    };
    machine.pci.set_bus_master(function.address, BusMaster::On);
    let copied = DmaPages::allocate(2).ok().is_some_and(|mut pages| {
        pages.write(0, &[0x5a; 4096]);
        let start = platform::time::now_ns();
        let done =
            edu.copy_in(pages.phys(), 0, 4096).and_then(|()| edu.copy_out(0, pages.phys() + 4096, 4096));
        println!("edu: {done:?} from {start:?} to {:?} ns", platform::time::now_ns());
        let mut back = [0; 4096];
        pages.read(4096, &mut back);
        back == [0x5a; 4096]
    });
    machine.pci.set_bus_master(function.address, BusMaster::Off);
    report.check("edu-dma", copied, "4096 bytes in and out, untranslated");
}

fn show_memory(info: &BootInfo) {
    println!("command line: {}", info.command_line.as_str());
    for region in info.memory_map.regions() {
        println!("memory {:<12} {}", region.kind, region.range);
    }
    println!("frames: {:?}", frames::usage());
    println!("clock: {:?} Hz", platform::arch::clock::tick_hz());
    println!("highest physical address: {:#x}", platform::arch::mmu::highest_physical_address());
}

fn show_machine(machine: &Machine) {
    for table in machine.tables.iter() {
        println!("ACPI {} at {:#x}, {} bytes", table.signature, table.phys, table.bytes.len());
    }
    machine.tables.broken().for_each(|error| println!("{error}"));
    println!("{:x?}", machine.tables.find(mcfg::SIGNATURE).and_then(mcfg::parse));
    println!("{:x?}", machine.tables.find(madt::SIGNATURE).and_then(madt::parse));
    for function in machine.pci.functions() {
        println!(
            "PCI {} {:04x}:{:04x} class {}",
            function.address, function.vendor, function.device, function.class
        );
        function.bars.iter().for_each(|bar| println!("    {bar}"));
        if let Some(bridge) = function.bridge {
            println!("    {bridge:x?}");
        }
        println!("    {:x?}", machine.pci.capabilities(function.address));
        println!("    {:x?}", machine.pci.extended_capabilities(function.address));
    }
    machine.unassigned.iter().for_each(|error| println!("{error}"));
}

/// Takes every memory BAR's address away, as on a machine without firmware, and discovers the machine again.
fn unassign_and_rediscover(machine: Machine, info: &BootInfo) -> Machine {
    for function in machine.pci.functions().iter().filter(|function| !function.is_bridge()) {
        machine.pci.set_memory_decode(function.address, MemoryDecode::Off);
        for bar in function.bars.iter().filter(|bar| bar.range().is_some()) {
            machine.pci.config().write32(function.address, offset::BAR0 + 4 * u16::from(bar.index), 0);
        }
    }
    match Machine::discover(info) {
        Ok(machine) => machine,
        Err(error) => {
            println!("{error}");
            power::exit(ExitCode::Fail)
        }
    }
}

fn read_unmapped() {
    // SAFETY: not sound, and not meant to be: nothing is mapped there, and the fault is what is tested.
    let value = unsafe { (0x0000_7123_4567_8000 as *const u64).read_volatile() };
    println!("read {value:#x}");
    power::exit(ExitCode::Fail)
}

fn write_code() {
    // SAFETY: not sound, and not meant to be: code is not writable, and the fault is what is tested.
    unsafe { (write_code as *mut u8).write_volatile(0) };
    power::exit(ExitCode::Fail)
}

#[expect(unconditional_recursion, reason = "running over the stack is what is tested")]
fn overflow(depth: u64) -> u64 {
    let frame = [depth; 64];
    overflow(core::hint::black_box(frame)[3] + 1) + core::hint::black_box(frame)[7]
}
