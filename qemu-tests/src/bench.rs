//! What the kernel's `bench` scenario states, and what QEMU's trace says to it.
//!
//! A row of the scenario states `NAME.operations`, and either `NAME.instructions` or, with `bench=count`, `NAME.section`.
//! It then writes that number to port 0x80 before each stretch, and 0 after it, so that the trace itself says what belongs
//! to which row:
//!
//! ```text
//! memory_region_ops_write cpu 0 mr M addr 0x80 value 0x2 size 1 name 'ioport80'         section 2 begins
//! memory_region_ops_write cpu 0 mr M addr A value 0 size 2 name '...-virtio-iommu'      an access of the IOMMU's registers
//! virtio_queue_notify ...                                                               and the rest as in `trace`
//! memory_region_ops_write cpu 0 mr M addr 0x80 value 0x0 size 1 name 'ioport80'         it ends
//! ```
//! Where the device is software in the guest, QEMU's is asked nothing. The guest then states `NAME.requests` and `NAME.kicks`
//! itself, and of its instructions `NAME.within.1`, which are that device's and all that it calls, `NAME.within.2`, which are
//! those that it calls, and so on.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

use crate::protocol::Value;
use crate::trace::Counts;

/// The scenario's name.
pub const SCENARIO: &str = "bench";
/// The name of the one that measures the same disk on a machine without an IOMMU.
pub const DIRECT: &str = "bench-direct";
/// What QEMU has to trace besides the events of [`trace`](crate::trace).
pub const EVENTS: [&str; 2] = ["memory_region_ops_read", "memory_region_ops_write"];
/// The name of the one that measures contexts and nesting, on devices in software.
pub const CONTEXTS: &str = "bench-contexts";

/// One nanosecond of the guest's time is one instruction, and waiting takes none: two runs do not differ, as long as no
/// device answers by itself.
pub const ICOUNT: &str = "-icount shift=0,sleep=off";
/// Words for the kernel of a run that is traced: few operations, since each is several lines, but as many as a domain
/// defers between two flushes. It takes [`ICOUNT`] too, so that no flush comes from the time that a trace takes.
pub const COUNT: &str = "bench=count operations=256 warm-up=256 live=1000";
/// CPUs of the machine of that run. All but one row have but one at work.
pub const COUNT_CPUS: u32 = 4;

/// What the operations of one name took in instructions, as the guest states.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timed {
    /// The name.
    pub name: String,
    /// How many operations there were.
    pub operations: u64,
    /// What all of them took.
    pub instructions: u64,
}

/// What the operations of one name asked of the device, as QEMU saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// The name.
    pub name: String,
    /// How many operations there were, as the guest states.
    pub operations: u64,
    /// Requests of any type, refused ones included.
    pub requests: u64,
    /// What they were, as far as they were accepted; kicks too.
    pub counts: Counts,
    /// Accesses of the IOMMU's registers, the doorbell being one.
    pub accesses: u64,
}

/// The instructions that a guest states.
#[must_use]
pub fn timed(values: &[Value]) -> Vec<Timed> {
    let stated = stated(values, "instructions");
    stated.map(|(name, operations, instructions)| Timed { name, operations, instructions }).collect()
}

/// The requests that QEMU saw in the sections that a guest states.
///
/// # Errors
///
/// When the trace cannot be read, or a section that the guest states is not in it.
pub fn asked(values: &[Value], trace: &Path) -> Result<Vec<Asked>> {
    let bytes = fs::read(trace).with_context(|| format!("cannot read QEMU's trace {}", trace.display()))?;
    let sections = sections(&String::from_utf8_lossy(&bytes));
    let one = |(name, operations, number): (String, u64, u64)| {
        let section = sections.get(&number).with_context(|| format!("{name} is not in QEMU's trace"))?;
        let mut counts = Counts::parse(&section.events, 1).with_context(|| format!("in {name}"))?;
        let mut requests = counts.pops;
        if let (Some(own), Some(kicks)) =
            (stated_of(values, &name, "requests"), stated_of(values, &name, "kicks"))
        {
            if counts != Counts::default() {
                bail!("{name} has a device in software, and asked QEMU's: {counts:?}");
            }
            (requests, counts.kicks) = (own, kicks);
        }
        Ok(Asked { name, operations, requests, counts, accesses: section.accesses })
    };
    let asked = stated(values, "section").map(one).collect::<Result<Vec<_>>>()?;
    if asked.is_empty() {
        bail!("the guest states no section of QEMU's trace");
    }
    Ok(asked)
}

/// What the instructions of a row are made of: those of the driver, of the device below it in software, of what that calls,
/// and so on, by turns.
#[must_use]
pub fn layers(values: &[Value], row: &Timed) -> Vec<u64> {
    let within = (1..).map_while(|at| stated_of(values, &row.name, &format!("within.{at}")));
    let bounds: Vec<u64> = [row.instructions].into_iter().chain(within).collect();
    let inner = bounds.iter().skip(1).chain([&0]);
    bounds.iter().zip(inner).map(|(whole, within)| whole.saturating_sub(*within)).collect()
}

/// The number of `NAME.WHAT`.
fn stated_of(values: &[Value], name: &str, what: &str) -> Option<u64> {
    let value = values.iter().find(|value| value.name.strip_prefix(name) == Some(&format!(".{what}")));
    value.map(|value| value.number)
}

/// Each `NAME.WHAT` with its `NAME.operations`.
fn stated<'v>(values: &'v [Value], what: &'v str) -> impl Iterator<Item = (String, u64, u64)> + 'v {
    values.iter().filter_map(move |value| {
        let name = value.name.strip_suffix(what)?.strip_suffix('.')?;
        Some((name.to_owned(), stated_of(values, name, "operations")?, value.number))
    })
}

/// All stretches of one section.
#[derive(Default)]
struct Section {
    /// The lines of the trace.
    events: String,
    accesses: u64,
}

fn sections(trace: &str) -> BTreeMap<u64, Section> {
    let mut sections: BTreeMap<u64, Section> = BTreeMap::new();
    let mut open = 0;
    for line in trace.lines() {
        match Access::read(line) {
            Some(Access { region: "ioport80", value, write: true }) => {
                open = value;
                sections.entry(value).or_default();
            }
            Some(access) if open != 0 && access.region.ends_with("-virtio-iommu") => {
                sections.entry(open).or_default().accesses += 1;
            }
            None if open != 0 => {
                let section = sections.entry(open).or_default();
                section.events.push_str(line);
                section.events.push('\n');
            }
            _ => {}
        }
    }
    sections
}

/// A line about an access of a register.
struct Access<'l> {
    region: &'l str,
    value: u64,
    write: bool,
}

impl<'l> Access<'l> {
    fn read(line: &'l str) -> Option<Self> {
        let (_, access) = line.split_once("memory_region_ops_")?;
        let (_, region) = access.split_once(" name '")?;
        let (_, value) = access.split_once(" value 0x")?;
        let value = u64::from_str_radix(value.split(' ').next()?, 16).ok()?;
        Some(Self { region: region.strip_suffix('\'')?, value, write: access.starts_with("write") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "\
memory_region_ops_write cpu 0 mr 0x1 addr 0x80 value 0x1 size 1 name 'ioport80'
memory_region_ops_write cpu 0 mr 0x2 addr 0xfebf7000 value 0x0 size 2 name 'virtio-pci-notify-virtio-iommu'
virtio_queue_notify vdev 0x3 n 0 vq 0xa
virtqueue_pop vq 0xa elem 0x4 in_num 1 out_num 1
virtio_iommu_map domain=7 virt_start=0x1000 virt_end=0x1fff phys_start=0x1000 flags=3
virtqueue_pop vq 0xa elem 0x4 in_num 1 out_num 1
virtio_iommu_map domain=7 virt_start=0x2000 virt_end=0x2fff phys_start=0x2000 flags=3
memory_region_ops_write cpu 0 mr 0x1 addr 0x80 value 0x0 size 1 name 'ioport80'
memory_region_ops_read cpu 0 mr 0x2 addr 0xfebf7000 value 0x0 size 2 name 'virtio-pci-common-virtio-iommu'
virtio_queue_notify vdev 0x3 n 0 vq 0xa
memory_region_ops_write cpu 0 mr 0x1 addr 0x80 value 0x2 size 1 name 'ioport80'
memory_region_ops_read cpu 0 mr 0x5 addr 0x3fd value 0x60 size 1 name 'serial'
memory_region_ops_write cpu 0 mr 0x1 addr 0x80 value 0x0 size 1 name 'ioport80'
";

    fn value(name: &str, number: u64) -> Value {
        Value { name: name.into(), number, unit: "x".into() }
    }

    fn written(name: &str) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
        fs::write(&path, TRACE).unwrap();
        path
    }

    #[test]
    fn a_section_holds_what_lies_between_its_marks() {
        let path = written("bench-sections");
        let values = [
            value("two.section", 1),
            value("two.operations", 2),
            value("none.operations", 9),
            value("none.section", 2),
        ];
        let asked = asked(&values, &path).unwrap();
        fs::remove_file(path).unwrap();
        let counts = Counts { map: 2, kicks: 1, pops: 2, ..Counts::default() };
        let two = Asked { name: "two".into(), operations: 2, requests: 2, counts, accesses: 1 };
        let none =
            Asked { name: "none".into(), operations: 9, requests: 0, counts: Counts::default(), accesses: 0 };
        assert_eq!(asked, [two, none]);
    }

    #[test]
    fn a_section_that_is_not_there_is_named() {
        let path = written("bench-missing");
        let error = asked(&[value("gone.section", 3), value("gone.operations", 1)], &path).unwrap_err();
        assert!(error.to_string().contains("gone is not in"), "{error}");
        assert!(asked(&[], &path).is_err());
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn instructions_come_with_their_operations() {
        let values = [value("a.operations", 10), value("a.instructions", 5000), value("b.instructions", 1)];
        let timed = timed(&values);
        assert_eq!(timed, [Timed { name: "a".into(), operations: 10, instructions: 5000 }]);
    }

    #[test]
    fn a_device_in_software_has_its_requests_stated_and_qemus_none() {
        let path = written("bench-software");
        let stated = |section| {
            let kicks = value("soft.kicks", 3);
            [value("soft.section", section), value("soft.operations", 2), value("soft.requests", 4), kicks]
        };
        let soft = asked(&stated(2), &path).unwrap();
        assert_eq!((soft[0].requests, soft[0].counts.kicks, soft[0].accesses), (4, 3, 0));
        let error = asked(&stated(1), &path).unwrap_err();
        fs::remove_file(path).unwrap();
        assert!(error.to_string().contains("asked QEMU's"), "{error}");
    }

    #[test]
    fn layers_are_what_lies_between_two_bounds() {
        let row = Timed { name: "deep".into(), operations: 1, instructions: 100 };
        let values = [value("deep.within.1", 70), value("deep.within.2", 20), value("deeper.within.3", 5)];
        assert_eq!(layers(&values, &row), [30, 50, 20]);
        assert_eq!(layers(&[], &row), [100]);
    }
}
