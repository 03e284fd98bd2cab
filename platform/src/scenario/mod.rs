//! What the kernel can be asked to do, by name.
//!
//! ```text
//! default       real I/O through the IOMMU, then attacks on it                 \
//! devices       every device at work, with figures                             |
//! bridge        the unmodified drivers of `virtio-drivers`                     |
//! soak          all devices at once, for a while                               | each ends PASS
//! policies      what is reached after unmapping, under each policy              |
//! nvme          an NVMe disk: requests mapped one by one, in batches, from a   |
//!               pool; what they took; attacks                                  |
//! block         the same with a virtio disk, by the kernel's own driver        |
//! block-direct  that driver on a machine without an IOMMU                      |
//! interrupts    faults and answers wake a CPU that sleeps                      |
//! messages      endpoints interrupt by MSI and MSI-X, translated and blocked   |
//! smp           mapping from four CPUs at once, during a storm of faults         |
//! groups        devices that can be kept apart, or else only together          |
//! hot-plug      a device comes and goes, twice                                 |
//! two-iommus    each of two IOMMUs knows its own endpoints and faults alone    |
//! nesting       a guest's virtio-iommu on the machine's; feature `contexts`    |
//! contexts      contexts by PASID, on a device of the draft in software; same  /
//! bench         counts instructions, and says nothing about right or wrong
//! bench-direct  what of it there is on a machine without an IOMMU
//! bench-contexts  contexts and nesting, with a device in software; feature `contexts`
//! leak          frees memory that is still mapped                  } each ends FAIL at the one check
//! early         frees memory before its UNMAP was answered         } that such a bug must fail
//! lie           a transport that turns every failure into success  }
//! panic, page-fault, overflow, write-code      end by an exception
//! silent, half, babble                         guests that the harness must not believe
//! ```

mod attack;
mod bench;
mod block;
mod bridge;
#[cfg(feature = "contexts")]
mod contexts;
mod default;
mod defect;
mod devices;
mod groups;
mod hot_plug;
mod interrupts;
mod messages;
mod misbehave;
#[cfg(feature = "contexts")]
mod nesting;
mod nvme;
mod policies;
mod scatter;
mod setup;
mod show;
mod smp;
mod soak;
mod storage;
mod tamper;
mod two_iommus;
mod work;

use alloc::string::String;
use core::fmt;

use crate::boot::BootInfo;
use crate::println;
use crate::report::{Outcome, Report};

/// The words that the kernel understands on its command line.
const KNOWN: &[&str] = &[
    "scenario",
    "seed",
    "disk.sha256",
    "nvme.sha256",
    "net.port",
    "net.sha256",
    "policy",
    "hide",
    "viot",
    "iommu",
    "ecam",
    // Where the device of the draft is.
    "device",
    "queue",
    // How x86_64 is entered.
    "entry",
    "log",
    // How long devices work, and how much.
    "soak.seconds",
    "mapped",
    "pooled",
    // What is measured.
    "bench",
    "operations",
    "warm-up",
    "live",
    "only",
];

/// Runs the scenario that the command line names.
pub fn run(info: &BootInfo) -> ! {
    let name = info.command_line.get("scenario").unwrap_or("default");
    // Before anything is printed: this guest prints nothing.
    if name == "silent" {
        misbehave::silent();
    }
    if let Some(word) = info.command_line.unknown(KNOWN) {
        refuse(format_args!("the kernel does not know the word `{word}` on its command line"));
    }
    match name {
        "default" => default::run(info),
        "devices" => devices::run(info),
        "bridge" => bridge::run(info),
        "soak" => soak::run(info),
        "policies" => policies::run(info),
        "nvme" => nvme::run(info),
        "block" => block::run(info),
        "block-direct" => block::direct(info),
        "messages" => messages::run(info),
        "smp" => smp::run(info),
        "groups" => groups::run(info),
        "hot-plug" => hot_plug::run(info),
        "two-iommus" => two_iommus::run(info),
        #[cfg(feature = "contexts")]
        "nesting" => nesting::run(info),
        #[cfg(feature = "contexts")]
        "contexts" => contexts::run(info),
        #[cfg(not(feature = "contexts"))]
        "nesting" | "contexts" | "bench-contexts" => {
            refuse(format_args!("the scenario `{name}` is in kernels with the feature `contexts`"))
        }
        "interrupts" => interrupts::run(info),
        "leak" => defect::leak(info),
        "early" => defect::early(info),
        "lie" => defect::lie(info),
        "bench" => bench::run(info),
        "bench-direct" => bench::direct(info),
        #[cfg(feature = "contexts")]
        "bench-contexts" => bench::contexts(info),
        "panic" => misbehave::panic(),
        "page-fault" => misbehave::page_fault(),
        "overflow" => misbehave::stack_overflow(),
        "write-code" => misbehave::write_code(),
        "half" => misbehave::half(),
        "babble" => misbehave::babble(),
        unknown => refuse(format_args!(
            "there is no scenario `{unknown}`; there are: default devices bridge soak policies nvme block block-direct \
             interrupts messages smp groups hot-plug two-iommus nesting contexts bench bench-direct bench-contexts leak early lie \
             panic page-fault overflow write-code silent half babble"
        )),
    }
}

/// Ends the run before it began, with the one check that says why.
fn refuse(why: impl fmt::Display) -> ! {
    let mut report = Report::start(1);
    report.check("scenario", Outcome::Fail, why);
    report.end()
}

/// Ends a run that cannot go on: one check fails, and the rest of the plan does not happen.
fn give_up(mut report: Report, check: &str, why: impl fmt::Display) -> ! {
    report.check(check, Outcome::Fail, why);
    println!();
    report.end()
}

/// What the command line lacks, or has wrong.
fn word<'a>(info: &'a BootInfo, key: &str) -> Result<&'a str, String> {
    info.command_line
        .get(key)
        .ok_or_else(|| alloc::format!("the command line lacks `{key}=`, which `cargo xtask run` gives"))
}
