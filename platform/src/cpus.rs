//! The other CPUs: which there are, and a team of them that works together.
//!
//! A CPU of the team waits, spinning, for work; all do the same piece, each with its own index. There is nothing else that
//! belongs to a CPU: interrupts of devices come to the first one, and what the kernel shares is behind locks.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicUsize, Ordering};

use spin::{Mutex, Once};

use crate::acpi::madt;
use crate::arch::cpus::{self as arch, Stacks, StartError};
use crate::firmware::device_tree::{DeviceTree, Node};
use crate::machine::Firmware;
use crate::memory::frames::{self, FRAME_BYTES, OutOfFrames};
use crate::memory::phys_to_virt;
use crate::range::PhysRange;
use crate::time::Deadline;

/// The most CPUs of a team, the first one included.
pub const MAX_CPUS: usize = 16;
/// The frames of a CPU's stack, and of its stack for exceptions. No page below them is unmapped: what runs over the first
/// damages nothing but the second.
const STACK_FRAMES: usize = 32;
const FAULT_STACK_FRAMES: usize = 8;

/// What every CPU of a team does; it gets its index, 0 for the first one.
pub type Work = Arc<dyn Fn(usize) + Send + Sync>;

/// A team that could not be had, or that did not finish.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CpuError {
    /// Firmware does not say which CPUs there are.
    Unknown {
        /// Why not.
        reason: String,
    },
    /// There are fewer than wanted.
    TooFew {
        /// How many there are.
        count: usize,
        /// How many are wanted.
        wanted: usize,
    },
    /// No memory for a stack.
    Memory(OutOfFrames),
    /// One did not start.
    Start(StartError),
    /// Some are still at work.
    Late {
        /// How many are done.
        done: usize,
        /// Of how many.
        count: usize,
    },
}

impl fmt::Display for CpuError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown { reason } => write!(f, "firmware does not say which CPUs there are: {reason}"),
            Self::TooFew { count, wanted } => {
                write!(
                    f,
                    "the machine has {count} CPUs and {wanted} are wanted; start QEMU with `-smp {wanted}`"
                )
            }
            Self::Memory(error) => write!(f, "no stack for a CPU: {error}"),
            Self::Start(error) => error.fmt(f),
            Self::Late { done, count } => write!(f, "{done} of {count} CPUs are done in time"),
        }
    }
}

impl core::error::Error for CpuError {}

/// What the CPUs of the machine are known by, the ones that can be used, each once.
///
/// # Errors
///
/// [`CpuError::Unknown`].
pub fn ids(firmware: &Firmware) -> Result<Vec<u64>, CpuError> {
    let mut ids: Vec<u64> = match firmware {
        Firmware::Acpi(tables) => {
            let madt = tables.find(madt::SIGNATURE).and_then(madt::parse);
            let madt = madt.map_err(|error| CpuError::Unknown { reason: error.to_string() })?;
            madt.cpus.into_iter().map(u64::from).collect()
        }
        Firmware::DeviceTree { tree, .. } => of_tree(tree)?,
    };
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

fn of_tree(tree: &DeviceTree<'_>) -> Result<Vec<u64>, CpuError> {
    let unknown = |reason: &str| CpuError::Unknown { reason: format!("device tree: {reason}") };
    let node = tree.at(&["cpus"]).ok_or_else(|| unknown("there is no node `cpus`"))?;
    let is_one = |node: &Node<'_>| node.text("device_type") == Some("cpu") && node.is_in_use();
    let id = |node: Node<'_>| match node.cells("reg").as_deref() {
        Some([low]) => Ok(u64::from(*low)),
        Some([high, low]) => Ok(u64::from(*high) << 32 | u64::from(*low)),
        _ => Err(unknown(&format!("`reg` of {} is not one or two cells", node.name()))),
    };
    node.children().filter(is_one).map(id).collect()
}

/// Work, and how far it got.
struct Board {
    /// Counts pieces of work; a CPU that saw a number waits for the next.
    round: AtomicUsize,
    work: Mutex<Option<Work>>,
    done: AtomicUsize,
}

static BOARD: Board = Board { round: AtomicUsize::new(0), work: Mutex::new(None), done: AtomicUsize::new(0) };

/// Both stacks of each CPU, by its index.
static STACKS: [Once<PhysRange>; MAX_CPUS] = [const { Once::new() }; MAX_CPUS];

/// CPUs that wait for work, with this one at their head.
#[derive(Debug)]
pub struct Team {
    count: usize,
}

impl Team {
    /// Starts as many CPUs as are missing to `wanted`. To be called once.
    ///
    /// # Errors
    ///
    /// [`CpuError`]; CPUs that are started then go on waiting.
    pub fn start(firmware: &Firmware, wanted: usize) -> Result<Self, CpuError> {
        let ids = ids(firmware)?;
        let wanted = wanted.min(MAX_CPUS);
        if ids.len() < wanted {
            return Err(CpuError::TooFew { count: ids.len(), wanted });
        }
        let others = ids.into_iter().filter(|id| *id != arch::own_id());
        for (index, id) in (1..wanted).zip(others) {
            let stacks = allocate_stacks(index).map_err(CpuError::Memory)?;
            // SAFETY: the frames were just allocated, and are never given back.
            unsafe { arch::start(id, index, stacks, wait_for_work) }.map_err(CpuError::Start)?;
        }
        Ok(Self { count: wanted })
    }

    /// How many there are, this one included.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Has every CPU do a piece of work, this one too, and waits until all are done.
    ///
    /// # Errors
    ///
    /// [`CpuError::Late`] for those that are not done in time after this CPU is; the team can then not be used any more.
    pub fn run(&mut self, work: Work, timeout_ns: u64) -> Result<(), CpuError> {
        BOARD.done.store(0, Ordering::Relaxed);
        *BOARD.work.lock() = Some(Arc::clone(&work));
        BOARD.round.fetch_add(1, Ordering::Release);
        work(0);
        let others = self.count - 1;
        let mut deadline = Deadline::after_ns(timeout_ns);
        while BOARD.done.load(Ordering::Acquire) < others {
            if deadline.expired() {
                let done = BOARD.done.load(Ordering::Acquire) + 1;
                return Err(CpuError::Late { done, count: self.count });
            }
            core::hint::spin_loop();
        }
        *BOARD.work.lock() = None;
        Ok(())
    }
}

/// What another CPU does for good.
fn wait_for_work(index: usize) -> ! {
    let mut seen = 0;
    loop {
        let round = BOARD.round.load(Ordering::Acquire);
        if round == seen {
            core::hint::spin_loop();
            continue;
        }
        seen = round;
        let work = BOARD.work.lock().clone();
        if let Some(work) = work {
            work(index);
        }
        BOARD.done.fetch_add(1, Ordering::Release);
    }
}

/// Where the stacks of the other CPUs lie, each with the one for exceptions: what a report may look into.
pub fn stacks() -> impl Iterator<Item = PhysRange> {
    STACKS.iter().filter_map(|stacks| stacks.get().copied())
}

/// Stacks of a CPU's own, the one for exceptions below the other.
fn allocate_stacks(index: usize) -> Result<Stacks, OutOfFrames> {
    let count = STACK_FRAMES + FAULT_STACK_FRAMES;
    let bottom = phys_to_virt(frames::allocate(count, 1)?).addr() as u64;
    if let Some((place, range)) =
        STACKS.get(index).zip(PhysRange::from_len(bottom, count as u64 * FRAME_BYTES))
    {
        place.call_once(|| range);
    }
    let fault_top = bottom + FAULT_STACK_FRAMES as u64 * FRAME_BYTES;
    Ok(Stacks { top: fault_top + STACK_FRAMES as u64 * FRAME_BYTES, fault_top })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firmware::device_tree::tests::{Writer, with_tree};

    #[test]
    fn the_tree_lists_cpus_that_are_in_use() {
        let cpu = |tree: Writer, name: &str, reg: &[u32], status: &str| {
            let node = tree.begin(name).text("device_type", "cpu").text("status", status);
            node.cells("reg", reg).end()
        };
        let root = || Writer::default().begin("").begin("cpus");
        let tree =
            cpu(cpu(cpu(root(), "cpu@1", &[1], "okay"), "cpu@0", &[0], "disabled"), "cpu@2", &[1, 2], "okay");
        let tree = tree.begin("cpu-map").end().end().end().finish();
        with_tree(&tree, |tree| assert_eq!(of_tree(tree), Ok(alloc::vec![1, 0x1_0000_0002])));
        let broken = cpu(root(), "cpu@0", &[0, 0, 0], "okay").end().end().finish();
        with_tree(&broken, |tree| assert!(matches!(of_tree(tree), Err(CpuError::Unknown { .. }))));
        let none = Writer::default().begin("").end().finish();
        with_tree(&none, |tree| assert!(matches!(of_tree(tree), Err(CpuError::Unknown { .. }))));
    }
}
