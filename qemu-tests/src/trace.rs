//! QEMU's trace as a witness: what its IOMMU really was asked.
//!
//! The log has a line per event. Requests of the IOMMU appear as
//!
//! ```text
//! virtio_queue_notify vdev V n 0 vq Q          one kick
//! virtqueue_pop vq Q elem E in_num 1 out_num 1   one request is taken
//! virtio_iommu_map domain=1 virt_start=...     what it was
//! ```
//!
//! Every device has a queue 0. The IOMMU's is the one whose `virtqueue_pop` stands directly before a `virtio_iommu_*`
//! event; QEMU takes and serves a request without anything in between. Its event queue is another `vq`, and does not count.
//! Where a machine has several IOMMUs, what all of them were asked counts together.
//!
//! Each number is of *accepted* requests, as far as the log tells:
//!
//! - `map` is logged once the request was accepted.
//! - `attach` and `detach` are logged before QEMU looks at them. An accepted one switches the endpoint's address space, so
//!   that the next line is `virtio_iommu_switch_address_space` for that endpoint; a refused one does not.
//! - `unmap` is logged before too, and nothing later tells. A refused UNMAP counts: a guest that passes must have none.
//!
//! Detaching that QEMU does by itself, when an ATTACH moves an endpoint, is another event
//! (`virtio_iommu_detach_endpoint_from_domain` in later versions, none in 7.2), and not enabled.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

#[cfg(test)]
mod tests;

/// The events that are read here. Not `virtio_iommu_translate`: it writes a line for every four bytes of DMA.
pub const EVENTS: [&str; 7] = [
    "virtio_iommu_attach",
    "virtio_iommu_detach",
    "virtio_iommu_map",
    "virtio_iommu_switch_address_space",
    "virtio_iommu_unmap",
    "virtio_queue_notify",
    "virtqueue_pop",
];

/// What QEMU saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// ATTACH requests that were accepted.
    pub attach: u64,
    /// DETACH requests that were accepted.
    pub detach: u64,
    /// MAP requests that were accepted.
    pub map: u64,
    /// UNMAP requests, refused ones included.
    pub unmap: u64,
    /// Kicks of the IOMMU's request queue.
    pub kicks: u64,
    /// Requests that were taken from it, of any type.
    pub pops: u64,
}

impl Counts {
    /// Reads the trace of a machine with so many IOMMUs in `path`.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, or says something that does not fit together.
    pub fn read(path: &Path, iommus: usize) -> Result<Self> {
        let bytes = fs::read(path).with_context(|| format!("cannot read QEMU's trace {}", path.display()))?;
        Self::parse(&String::from_utf8_lossy(&bytes), iommus)
            .with_context(|| format!("in QEMU's trace {}", path.display()))
    }

    /// Counts the events in `text`. Lines that are not one of the events are skipped: QEMU's log may hold others.
    ///
    /// # Errors
    ///
    /// When an event of an IOMMU has no `virtqueue_pop` before it, or more queues than `iommus` would have to be an IOMMU's.
    pub fn parse(text: &str, iommus: usize) -> Result<Self> {
        let mut reader = Reader { iommus, ..Reader::default() };
        for (index, line) in text.lines().enumerate() {
            let (event, arguments) = event_of(line);
            reader.event(event, arguments).with_context(|| format!("line {}", index + 1))?;
        }
        Ok(reader.finish())
    }
}

/// Takes the events one by one.
#[derive(Default)]
struct Reader<'a> {
    counts: Counts,
    kicks: BTreeMap<&'a str, u64>,
    pops: BTreeMap<&'a str, u64>,
    last_pop: Option<&'a str>,
    /// How many IOMMUs there are.
    iommus: usize,
    /// Their request queues, as far as they are known.
    queues: Vec<&'a str>,
    /// The ATTACH or DETACH in the line before, of which is not known yet whether it was accepted.
    undecided: Option<Undecided>,
}

struct Undecided {
    kind: Kind,
    endpoint: i64,
}

enum Kind {
    Attach,
    Detach,
}

impl<'a> Reader<'a> {
    fn event(&mut self, event: &str, arguments: &'a str) -> Result<()> {
        // Only the very next event can tell.
        let undecided = self.undecided.take();
        match event {
            "virtio_queue_notify" => {
                *self.kicks.entry(queue_in(arguments)?).or_default() += 1;
                return Ok(());
            }
            "virtqueue_pop" => {
                let queue = queue_in(arguments)?;
                self.last_pop = Some(queue);
                *self.pops.entry(queue).or_default() += 1;
                return Ok(());
            }
            "virtio_iommu_switch_address_space" => {
                match undecided.filter(|request| device_in(arguments) == Some(request.endpoint)) {
                    Some(Undecided { kind: Kind::Attach, .. }) => self.counts.attach += 1,
                    Some(Undecided { kind: Kind::Detach, .. }) => self.counts.detach += 1,
                    None => {}
                }
                return Ok(());
            }
            "virtio_iommu_map" => self.counts.map += 1,
            "virtio_iommu_unmap" => self.counts.unmap += 1,
            "virtio_iommu_attach" => self.undecided = Some(Undecided::read(Kind::Attach, arguments)?),
            "virtio_iommu_detach" => self.undecided = Some(Undecided::read(Kind::Detach, arguments)?),
            _ => {
                self.undecided = undecided;
                return Ok(());
            }
        }
        self.learn_queue(event)
    }

    /// The queue of a request of the IOMMU is the one that was taken from just before.
    fn learn_queue(&mut self, event: &str) -> Result<()> {
        let Some(pop) = self.last_pop else { bail!("{event} without a virtqueue_pop before it") };
        if self.queues.contains(&pop) {
            return Ok(());
        }
        if self.queues.len() == self.iommus {
            bail!("{event} came from queue {pop}, earlier ones from {}", self.queues.join(" and "));
        }
        self.queues.push(pop);
        Ok(())
    }

    fn finish(self) -> Counts {
        let of =
            |counts: &BTreeMap<&str, u64>| self.queues.iter().filter_map(|queue| counts.get(queue)).sum();
        Counts { kicks: of(&self.kicks), pops: of(&self.pops), ..self.counts }
    }
}

impl Undecided {
    fn read(kind: Kind, arguments: &str) -> Result<Self> {
        let endpoint =
            arguments.split_whitespace().find_map(|word| word.strip_prefix("endpoint=")?.parse().ok());
        Ok(Self { kind, endpoint: endpoint.with_context(|| format!("no endpoint in `{arguments}`"))? })
    }
}

/// The queue in `... vq Q ...`.
fn queue_in(arguments: &str) -> Result<&str> {
    let mut words = arguments.split_whitespace();
    words.find(|word| *word == "vq");
    words.next().with_context(|| format!("no queue in `{arguments}`"))
}

/// The endpoint of the PCI function in `Device 00:04.0 switching ...`.
fn device_in(arguments: &str) -> Option<i64> {
    let (bus, rest) = arguments.strip_prefix("Device ")?.split_once(':')?;
    let (slot, rest) = rest.split_once('.')?;
    let function = rest.split(' ').next()?;
    let number = |digits| i64::from_str_radix(digits, 16).ok();
    Some(number(bus)? << 8 | number(slot)? << 3 | number(function)?)
}

/// The name of the event in a line, and the rest. A `PID@TIME:` before the name is dropped.
fn event_of(line: &str) -> (&str, &str) {
    let (first, rest) = line.split_once(' ').unwrap_or((line, ""));
    match first.split_once(':') {
        Some((stamp, event)) if stamp.contains('@') => (event, rest),
        _ => (first, rest),
    }
}
