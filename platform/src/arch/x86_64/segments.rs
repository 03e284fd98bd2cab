//! The segment descriptors and the task state, which long mode needs for one thing: a stack of its own for double faults.

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

/// Loads the descriptors and the task state.
pub fn init() {
    let task_state = TASK_STATE.call_once(|| {
        let mut task_state = TaskStateSegment::new();
        task_state.interrupt_stack_table[usize::from(FAULT_STACK_INDEX)] =
            VirtAddr::new_truncate(image::fault_stack_top());
        task_state
    });
    let segments = SEGMENTS.call_once(|| {
        let mut table = GlobalDescriptorTable::new();
        let code = table.append(Descriptor::kernel_code_segment());
        let data = table.append(Descriptor::kernel_data_segment());
        let task = table.append(Descriptor::tss_segment(task_state));
        Segments { table, code, data, task }
    });
    segments.table.load();
    // SAFETY: the selectors name a 64-bit code segment, a flat data segment and an available task state in the table
    // just loaded, which is static.
    unsafe {
        CS::set_reg(segments.code);
        SS::set_reg(segments.data);
        DS::set_reg(segments.data);
        ES::set_reg(segments.data);
        load_tss(segments.task);
    }
}
