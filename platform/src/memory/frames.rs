//! The frame allocator: physically contiguous, naturally aligned runs of 4 KiB frames.
//!
//! A buddy system from a crate, behind a lock, with a record of what is out: freeing what is not allocated is refused,
//! and a test can assert that nothing leaked. Frames are reachable at [`phys_to_virt`].

use alloc::collections::BTreeMap;
use core::alloc::Layout;
use core::fmt;

use buddy_system_allocator::FrameAllocator;
use spin::Mutex;

use super::phys_to_virt;
use crate::range::PhysRange;

/// The size of a frame.
pub const FRAME_BYTES: u64 = 4096;

/// Runs have fewer than 2^`ORDERS` frames: up to 64 GiB.
const ORDERS: usize = 25;

/// How many single frames are kept at hand.
const HANDY: usize = 8;

struct Frames {
    buddy: FrameAllocator<ORDERS>,
    /// First frame number -> the layout that it was allocated with, in frames.
    live: BTreeMap<usize, Layout>,
    handy: Handy,
    total: usize,
    used: usize,
}

static FRAMES: Mutex<Frames> = Mutex::new(Frames {
    buddy: FrameAllocator::new(),
    live: BTreeMap::new(),
    handy: Handy { frames: [NO_FRAME; HANDY], known: 0, free: 0 },
    total: 0,
    used: 0,
});

/// In a place that has no frame.
const NO_FRAME: usize = usize::MAX;

/// Single frames that were freed lately. They come and go without a look at the buddy system and the record of runs.
struct Handy {
    /// Their numbers. `known` has bits for the places that have one.
    frames: [usize; HANDY],
    known: u8,
    /// Which of them are not out.
    free: u8,
}

impl Handy {
    /// The place of a frame that is known, whether it is out or not.
    fn place_of(&self, frame: usize) -> Option<u8> {
        self.frames.iter().position(|known| *known == frame).map(|at| 1 << at)
    }

    /// Gives one of them out.
    fn take(&mut self) -> Option<usize> {
        let at = self.free.trailing_zeros() as usize;
        let frame = *self.frames.get(at)?;
        self.free &= self.free - 1;
        Some(frame)
    }

    /// Keeps a frame that nobody has. False where there is no place for it.
    fn keep(&mut self, frame: usize) -> bool {
        let at = (!self.known).trailing_zeros() as usize;
        let Some(place) = self.frames.get_mut(at) else { return false };
        *place = frame;
        (self.known, self.free) = (self.known | 1 << at, self.free | 1 << at);
        true
    }

    /// Forgets one that is not out.
    fn forget(&mut self) -> Option<usize> {
        let at = self.free.trailing_zeros() as usize;
        let place = self.frames.get_mut(at)?;
        let bit = 1 << at;
        (self.known, self.free) = (self.known & !bit, self.free & !bit);
        Some(core::mem::replace(place, NO_FRAME))
    }

    fn count_out(&self) -> usize {
        (self.known & !self.free).count_ones() as usize
    }
}

impl Frames {
    /// Takes a run from the buddy system, which gets back what is kept at hand if it has none otherwise.
    fn take_run(&mut self, layout: Layout) -> Option<usize> {
        let first = self.buddy.alloc_aligned(layout).or_else(|| {
            // Bounded by the places.
            while let Some(frame) = self.handy.forget() {
                self.buddy.dealloc_aligned(frame, SINGLE);
            }
            self.buddy.alloc_aligned(layout)
        })?;
        self.used += run_length(layout);
        Some(first)
    }

    fn allocate(&mut self, layout: Layout) -> Option<usize> {
        if layout == SINGLE
            && let Some(frame) = self.handy.take()
        {
            self.used += 1;
            return Some(frame);
        }
        let first = self.take_run(layout)?;
        self.live.insert(first, layout);
        Some(first)
    }

    /// False where no run starts there.
    fn free(&mut self, first: usize) -> bool {
        if let Some(bit) = self.handy.place_of(first) {
            let was_out = self.handy.free & bit == 0;
            self.handy.free |= bit;
            self.used -= usize::from(was_out);
            return was_out;
        }
        let Some(layout) = self.live.remove(&first) else { return false };
        self.used -= run_length(layout);
        if layout != SINGLE || !self.handy.keep(first) {
            self.buddy.dealloc_aligned(first, layout);
        }
        true
    }
}

/// How many frames there are, and how many are out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Frames that the allocator was given.
    pub total: usize,
    /// Frames that are allocated, with what rounding up to powers of two costs.
    pub used: usize,
    /// Runs that are allocated and can be freed.
    pub live_runs: usize,
}

/// No free run of frames is large enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfFrames {
    /// How many frames were asked for.
    pub count: usize,
    /// Their alignment, in frames.
    pub align: usize,
}

impl fmt::Display for OutOfFrames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "no {} contiguous frames of {FRAME_BYTES} bytes, aligned to {}, are free",
            self.count, self.align
        )
    }
}

impl core::error::Error for OutOfFrames {}

/// An address that was freed and is not the start of an allocated run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotAllocated {
    /// The address.
    pub phys: u64,
}

impl fmt::Display for NotAllocated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x} was freed and is not the start of an allocated run of frames", self.phys)
    }
}

impl core::error::Error for NotAllocated {}

/// Gives RAM to the allocator.
///
/// # Safety
///
/// The range must be mapped, writable RAM that nothing else uses, now or later.
pub unsafe fn add(range: PhysRange) {
    let Some(range) = range.shrink_to(FRAME_BYTES) else { return };
    let first = frame_number(range.start());
    let count = frame_number(range.len_bytes());
    let mut frames = FRAMES.lock();
    frames.buddy.add_frame(first, first + count);
    frames.total += count;
}

/// Allocates `count` contiguous frames, zeroed, aligned to `align` frames, and gives the physical address of the first.
///
/// `align` is rounded up to a power of two, and the run too: it is aligned to its own rounded size at least.
///
/// # Errors
///
/// [`OutOfFrames`], also for `count` 0.
pub fn allocate(count: usize, align: usize) -> Result<u64, OutOfFrames> {
    let error = OutOfFrames { count, align };
    let layout = run_layout(count, align).ok_or(error)?;
    let first = { FRAMES.lock().allocate(layout) }.ok_or(error)?;
    // SAFETY: the frames were just allocated, and hold as many bytes.
    Ok(unsafe { zeroed(first, count) })
}

/// Zeroes frames, and gives the physical address of the first.
///
/// # Safety
///
/// They are RAM that [`add`]'s caller gave away, and the caller's alone.
unsafe fn zeroed(first: usize, count: usize) -> u64 {
    let phys = first as u64 * FRAME_BYTES;
    // SAFETY: the caller's promise.
    unsafe { phys_to_virt(phys).write_bytes(0, count * FRAME_BYTES as usize) };
    phys
}

/// Allocates a zeroed frame that is never given back, and is not counted as a live run.
///
/// # Errors
///
/// [`OutOfFrames`].
pub fn allocate_permanent() -> Result<u64, OutOfFrames> {
    let first = { FRAMES.lock().take_run(SINGLE) }.ok_or(OutOfFrames { count: 1, align: 1 })?;
    // SAFETY: the frame was just allocated.
    Ok(unsafe { zeroed(first, 1) })
}

/// Gives a run back.
///
/// # Errors
///
/// [`NotAllocated`] when no run starts there; nothing changes then.
///
/// # Safety
///
/// Nothing may use the run any more, neither a reference nor a device.
pub unsafe fn free(phys: u64) -> Result<(), NotAllocated> {
    let freed = phys.is_multiple_of(FRAME_BYTES) && FRAMES.lock().free(frame_number(phys));
    if freed { Ok(()) } else { Err(NotAllocated { phys }) }
}

/// What is there and what is out.
pub fn usage() -> Usage {
    let frames = FRAMES.lock();
    Usage { total: frames.total, used: frames.used, live_runs: frames.live.len() + frames.handy.count_out() }
}

fn frame_number(phys: u64) -> usize {
    (phys / FRAME_BYTES) as usize
}

/// A layout that counts frames instead of bytes, as the buddy system takes it; `None` when no run can be that large.
fn run_layout(count: usize, align: usize) -> Option<Layout> {
    let largest = 1usize << (ORDERS - 1);
    if count == 0 || count > largest || align > largest {
        return None;
    }
    Layout::from_size_align(count, align.max(1).next_power_of_two()).ok()
}

/// The layout of a single frame.
const SINGLE: Layout = Layout::new::<u8>();

fn run_length(layout: Layout) -> usize {
    layout.size().next_power_of_two().max(layout.align())
}

#[cfg(test)]
mod tests {
    use std::alloc::{alloc_zeroed, dealloc};

    use super::*;

    /// One test, since the allocator is one for the process. The "RAM" is memory of the host's allocator.
    #[test]
    fn runs_are_zeroed_aligned_counted_and_freed_once() {
        let frame = FRAME_BYTES as usize;
        let layout = Layout::from_size_align(64 * frame, 64 * frame).expect("a valid layout");
        // SAFETY: the layout is not empty.
        let memory = unsafe { alloc_zeroed(layout) };
        let start = memory.addr() as u64;
        // SAFETY: the memory was just allocated for this, and is freed only after everything was given back.
        unsafe { add(PhysRange::from_len(start, 64 * FRAME_BYTES).expect("not empty")) };
        assert_eq!(usage(), Usage { total: 64, used: 0, live_runs: 0 });

        let run = allocate(3, 8).expect("64 frames are free");
        assert!(run.is_multiple_of(8 * FRAME_BYTES));
        assert_eq!(usage(), Usage { total: 64, used: 8, live_runs: 1 });
        // SAFETY: three frames from `run` on are ours.
        unsafe { phys_to_virt(run).write_bytes(0xaa, 3 * frame) };
        // SAFETY: as above; nobody uses the run.
        assert_eq!(unsafe { free(run + FRAME_BYTES) }, Err(NotAllocated { phys: run + FRAME_BYTES }));
        // SAFETY: as above.
        assert_eq!(unsafe { free(run + 1) }, Err(NotAllocated { phys: run + 1 }));
        // SAFETY: as above.
        assert_eq!(unsafe { free(run) }, Ok(()));
        // SAFETY: as above; the second time it must be refused.
        assert_eq!(unsafe { free(run) }, Err(NotAllocated { phys: run }));

        // A single frame is kept at hand, is known by what was done with it last, and does not hinder longer runs.
        let single = allocate(1, 1).expect("all frames are free");
        for _ in 0..3 {
            // SAFETY: the frame is ours; the second time it must be refused.
            assert_eq!(unsafe { free(single) }, Ok(()));
            // SAFETY: as above.
            assert_eq!(unsafe { free(single) }, Err(NotAllocated { phys: single }));
            assert_eq!(usage(), Usage { total: 64, used: 0, live_runs: 0 });
            assert_eq!(allocate(1, 1), Ok(single));
            assert_eq!(usage(), Usage { total: 64, used: 1, live_runs: 1 });
        }
        let singles: std::vec::Vec<_> =
            (0..2 * HANDY).map(|_| allocate(1, 1).expect("63 are free")).collect();
        // SAFETY: all are ours.
        assert!(singles.iter().all(|single| unsafe { free(*single) }.is_ok()));
        assert_eq!(usage(), Usage { total: 64, used: 1, live_runs: 1 });
        // SAFETY: as above.
        assert_eq!(unsafe { free(single) }, Ok(()));
        let whole = allocate(64, 1).expect("all frames are free again, and merged");
        // SAFETY: the run is ours and 64 frames long.
        let bytes = unsafe { core::slice::from_raw_parts(phys_to_virt(whole), 64 * frame) };
        assert!(bytes.iter().all(|byte| *byte == 0), "frames are zeroed when allocated again");
        assert_eq!(allocate(1, 1), Err(OutOfFrames { count: 1, align: 1 }));
        // SAFETY: `bytes` is not used any more.
        assert_eq!(unsafe { free(whole) }, Ok(()));

        for (count, align) in [(0, 1), (65, 1), (usize::MAX, 1), (1, usize::MAX)] {
            assert_eq!(allocate(count, align), Err(OutOfFrames { count, align }));
        }
        assert_eq!(usage(), Usage { total: 64, used: 0, live_runs: 0 });
        let all = allocate(64, 64).expect("all frames are free");
        assert_eq!(all, start);
        // The run stays allocated, so that no other test is handed memory that is freed now.
        // SAFETY: allocated above with this layout.
        unsafe { dealloc(memory, layout) };
    }
}
