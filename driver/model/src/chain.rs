//! One descriptor chain: a readable part followed by a writable part, each in any number of pieces.

use alloc::vec::Vec;

use crate::memory::{GuestMemory, OutOfMemoryRange};

/// One descriptor's buffer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    pub(crate) addr: u64,
    pub(crate) len: u32,
}

impl Segment {
    fn overlaps(&self, other: &Segment) -> bool {
        let last = |segment: &Segment| segment.addr.saturating_add(u64::from(segment.len) - 1);
        self.addr <= last(other) && other.addr <= last(self)
    }
}

/// One chain that the device has popped. No segment is empty.
#[derive(Clone, Debug)]
pub(crate) struct Chain {
    /// Index of the first descriptor, which names the chain in the used ring.
    pub(crate) head: u16,
    pub(crate) readable: Vec<Segment>,
    pub(crate) writable: Vec<Segment>,
}

impl Chain {
    /// A chain without buffers.
    pub(crate) fn new(head: u16) -> Self {
        Self { head, readable: Vec::new(), writable: Vec::new() }
    }

    pub(crate) fn readable_len(&self) -> u64 {
        total(&self.readable)
    }

    pub(crate) fn writable_len(&self) -> u64 {
        total(&self.writable)
    }

    /// Reads the first bytes of the readable part, at most `max`.
    pub(crate) fn read(&self, mem: &dyn GuestMemory, max: usize) -> Result<Vec<u8>, OutOfMemoryRange> {
        let mut bytes = Vec::new();
        for segment in &self.readable {
            let wanted = (max - bytes.len()).min(segment.len as usize);
            let start = bytes.len();
            bytes.resize(start + wanted, 0);
            mem.read(segment.addr, &mut bytes[start..])?;
            if bytes.len() == max {
                break;
            }
        }
        Ok(bytes)
    }

    /// Writes `data` at the start of the writable part; what lies past its end is cut off.
    pub(crate) fn write(&self, mem: &mut dyn GuestMemory, data: &[u8]) -> Result<(), OutOfMemoryRange> {
        let mut rest = data;
        for segment in &self.writable {
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at(rest.len().min(segment.len as usize));
            mem.write(segment.addr, now)?;
            rest = later;
        }
        Ok(())
    }

    /// Whether the device could still write memory that `other` uses, or read memory that `other` writes.
    pub(crate) fn conflicts_with(&self, other: &Chain) -> bool {
        let meet = |a: &[Segment], b: &[Segment]| a.iter().any(|x| b.iter().any(|y| x.overlaps(y)));
        meet(&self.writable, &other.writable)
            || meet(&self.writable, &other.readable)
            || meet(&self.readable, &other.writable)
    }
}

fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.len)).sum()
}
