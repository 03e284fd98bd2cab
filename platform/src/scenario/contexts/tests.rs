//! The guest and its agents need no machine.

use alloc::boxed::Box;
use alloc::vec;

use super::*;
use crate::memory::frames::{self, FRAME_BYTES};
use crate::memory::virt_to_phys;
use crate::range::PhysRange;
use crate::report::Outcome;

#[test]
fn all_contexts_pass_on_a_host_too() {
    let frame = FRAME_BYTES as usize;
    let memory: &'static mut [u8] = Box::leak(vec![0; 4 * GUEST_PAGES * frame].into_boxed_slice());
    let start = virt_to_phys(memory.as_ptr()).next_multiple_of(FRAME_BYTES);
    let range = PhysRange::from_len(start, (memory.len() - frame) as u64).expect("memory that is not empty");
    // SAFETY: leaked, and used by nothing else.
    unsafe { frames::add(range) };
    let mut report = Report::start(CHECKS_OF_GUEST);
    let place = Place::in_software().expect("memory for a guest");
    try_all(place, &mut report).expect("what each check takes");
    assert_eq!(report.finish(), Outcome::Pass);
}
