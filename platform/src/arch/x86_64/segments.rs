//! The segment descriptors and the task state, which long mode needs for one thing: a stack of its own for double faults.

use alloc::boxed::Box;

use spin::Once;
use x86_64::VirtAddr;
use x86_64::instructions::segmentation::{CS, DS, ES, SS, Segment};
use x86_64::instructions::tables::load_tss;
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable, SegmentSelector};
use x86_64::structures::tss::TaskStateSegment;

use crate::image;

/// The entry of the task state's stack table that double faults use.
pub const FAULT_STACK_INDEX: u16 = 0;

struct Segments {
    table: GlobalDescriptorTable,
    code: SegmentSelector,
    data: SegmentSelector,
    task: SegmentSelector,
}

static TASK_STATE: Once<TaskStateSegment> = Once::new();
static SEGMENTS: Once<Segments> = Once::new();

/// Loads the descriptors and the task state of the first CPU.
pub fn init() {
    let task_state = TASK_STATE.call_once(|| task_state(image::fault_stack_top()));
    SEGMENTS.call_once(|| Segments::new(task_state)).load();
}

/// Loads descriptors and a task state of another CPU's own: a task state that is in use cannot be loaded once more.
/// `fault_stack_top` is one past the last byte of its stack for double faults.
pub(super) fn init_cpu(fault_stack_top: u64) {
    let task_state = Box::leak(Box::new(task_state(fault_stack_top)));
    Box::leak(Box::new(Segments::new(task_state))).load();
}

fn task_state(fault_stack_top: u64) -> TaskStateSegment {
    let mut task_state = TaskStateSegment::new();
    task_state.interrupt_stack_table[usize::from(FAULT_STACK_INDEX)] =
        VirtAddr::new_truncate(fault_stack_top);
    task_state
}

impl Segments {
    fn new(task_state: &'static TaskStateSegment) -> Self {
        let mut table = GlobalDescriptorTable::new();
        let code = table.append(Descriptor::kernel_code_segment());
        let data = table.append(Descriptor::kernel_data_segment());
        let task = table.append(Descriptor::tss_segment(task_state));
        Self { table, code, data, task }
    }

    fn load(&'static self) {
        self.table.load();
        // SAFETY: the selectors name a 64-bit code segment, a flat data segment and an available task state in the table
        // just loaded, which is static.
        unsafe {
            CS::set_reg(self.code);
            SS::set_reg(self.data);
            DS::set_reg(self.data);
            ES::set_reg(self.data);
            load_tss(self.task);
        }
    }
}
