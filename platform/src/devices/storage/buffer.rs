//! Memory for the data of requests.

use alloc::vec::Vec;

use virtio_iommu::{DmaError, Iova, PhysAddr, PhysSegment, UnmapError};

use super::super::dma::{Coherent, Dma};
use crate::memory::dma::DmaPages;
use crate::memory::frames::FRAME_BYTES;

/// Memory that a request owns until it is completed.
#[derive(Debug)]
#[must_use = "dropping premapped memory leaves it mapped"]
pub enum Buffer {
    /// Frames wherever they lie, which the device reaches only while the request is in flight: a mapping and an
    /// unmapping for each.
    Frames(Frames),
    /// Memory that the device reaches all the time: nothing is asked of the IOMMU for a request.
    Premapped(Coherent),
    /// Memory that somebody else answers for.
    Elsewhere(Elsewhere),
}

/// Whole frames, run by run.
#[derive(Debug)]
pub struct Frames {
    runs: Vec<DmaPages>,
    /// The same, as the list that is mapped.
    segments: Vec<PhysSegment>,
    len: usize,
}

/// An address that somebody else has mapped, or has not.
#[derive(Clone, Copy, Debug)]
pub struct Elsewhere {
    iova: Iova,
    len: usize,
}

impl Buffer {
    /// A buffer of these frames.
    pub fn frames(runs: Vec<DmaPages>) -> Self {
        let segment = |run: &DmaPages| PhysSegment { phys: PhysAddr::new(run.phys()), len: run.len_bytes() };
        let segments: Vec<_> = runs.iter().map(segment).collect();
        let len = segments.iter().map(|segment| segment.len).sum();
        Self::Frames(Frames { runs, segments, len })
    }

    /// A buffer in memory that is mapped now, and stays mapped until it is [freed](Self::free).
    ///
    /// # Errors
    ///
    /// [`DmaError`].
    pub fn premapped(dma: Dma<'_>, len_bytes: usize) -> Result<Self, DmaError> {
        dma.alloc(len_bytes).map(Self::Premapped)
    }

    /// A buffer at an address of the device's own.
    ///
    /// # Safety
    ///
    /// Until its requests are completed the device may read and write whatever it reaches there.
    pub unsafe fn elsewhere(iova: Iova, len_bytes: usize) -> Self {
        Self::Elsewhere(Elsewhere { iova, len: len_bytes })
    }

    /// Gives the memory back.
    ///
    /// # Errors
    ///
    /// [`UnmapError`]: premapped memory is in quarantine.
    pub fn free(self, dma: Dma<'_>) -> Result<(), UnmapError> {
        match self {
            Self::Frames(_) | Self::Elsewhere(_) => Ok(()),
            Self::Premapped(memory) => dma.free(memory),
        }
    }

    /// Its length in bytes.
    pub fn len_bytes(&self) -> usize {
        match self {
            Self::Frames(frames) => frames.len,
            Self::Premapped(memory) => memory.len_bytes(),
            Self::Elsewhere(elsewhere) => elsewhere.len,
        }
    }

    /// What has to be mapped for its first `len_bytes` bytes.
    pub(super) fn segments(&self, len_bytes: usize) -> impl Iterator<Item = PhysSegment> {
        let all = match self {
            Self::Frames(frames) => frames.segments.as_slice(),
            Self::Premapped(_) | Self::Elsewhere(_) => &[],
        };
        let mut left = len_bytes;
        all.iter().map_while(move |segment| {
            let len = segment.len.min(left);
            left -= len;
            (len > 0).then_some(PhysSegment { len, ..*segment })
        })
    }

    /// Where the device finds it, if that does not take a mapping.
    pub(super) fn fixed(&self) -> Option<Iova> {
        match self {
            Self::Frames(_) => None,
            Self::Premapped(memory) => Some(memory.iova()),
            Self::Elsewhere(elsewhere) => Some(elsewhere.iova),
        }
    }

    /// Copies bytes to its start, as many as fit, and says how many. There is no way into memory elsewhere.
    pub fn write(&mut self, bytes: &[u8]) -> usize {
        match self {
            Self::Frames(frames) => {
                let mut left = bytes;
                for run in &mut frames.runs {
                    let (part, rest) = left.split_at(left.len().min(run.len_bytes()));
                    run.write(0, part);
                    left = rest;
                }
                bytes.len() - left.len()
            }
            Self::Premapped(memory) => {
                let len = bytes.len().min(memory.len_bytes());
                memory.copy_in(0, &bytes[..len]);
                len
            }
            Self::Elsewhere(_) => 0,
        }
    }

    /// Copies its first bytes out, as many as there are, and says how many.
    pub fn read(&self, bytes: &mut [u8]) -> usize {
        match self {
            Self::Frames(frames) => {
                let mut done = 0;
                for run in &frames.runs {
                    let len = (bytes.len() - done).min(run.len_bytes());
                    run.read(0, &mut bytes[done..done + len]);
                    done += len;
                }
                done
            }
            Self::Premapped(memory) => {
                let len = bytes.len().min(memory.len_bytes());
                memory.copy_out(0, &mut bytes[..len]);
                len
            }
            Self::Elsewhere(_) => 0,
        }
    }
}

/// `count` frames of which no two touch, so that each takes a request of the IOMMU and an entry of the device's list.
///
/// # Errors
///
/// [`OutOfFrames`](crate::memory::frames::OutOfFrames), of twice as many.
pub fn scattered(count: usize) -> Result<Vec<DmaPages>, crate::memory::frames::OutOfFrames> {
    let mut frames = (0..2 * count).map(|_| DmaPages::allocate(1)).collect::<Result<Vec<_>, _>>()?;
    frames.sort_by_key(DmaPages::phys);
    let mut apart: Vec<DmaPages> = Vec::with_capacity(count);
    for frame in frames {
        let touches = apart.last().is_some_and(|last| last.phys() + FRAME_BYTES == frame.phys());
        if apart.len() < count && !touches {
            apart.push(frame);
        }
    }
    Ok(apart)
}
