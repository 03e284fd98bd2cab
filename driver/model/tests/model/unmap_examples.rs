//! The standard's seven examples of UNMAP, byte for byte (PROTOCOL 2.3).

use crate::rig::{BUFFERS, EP, OK, RANGE, READ, Rig};

type Range = (u64, u64);

fn example(mappings: &[Range], unmap: Range, status: u8, left: &[Range]) {
    let mut rig = Rig::byte_granule();
    assert_eq!(rig.attach(1, EP), OK);
    for (index, (first, last)) in mappings.iter().enumerate() {
        assert_eq!(rig.map(1, *first, *last, BUFFERS + 0x1000 * index as u64, READ), OK);
    }
    assert_eq!(rig.unmap(1, unmap.0, unmap.1), status);
    assert_eq!(rig.ranges(1), left);
}

#[test]
fn example_1_nothing_mapped() {
    example(&[], (0, 4), OK, &[]);
}

#[test]
fn example_2_exactly_one() {
    example(&[(0, 9)], (0, 9), OK, &[]);
}

#[test]
fn example_3_two_adjacent() {
    example(&[(0, 4), (5, 9)], (0, 9), OK, &[]);
}

#[test]
fn example_4_half_of_one() {
    example(&[(0, 9)], (0, 4), RANGE, &[(0, 9)]);
}

#[test]
fn example_5_first_of_two() {
    example(&[(0, 4), (5, 9)], (0, 4), OK, &[(5, 9)]);
}

#[test]
fn example_6_spills_over_the_end() {
    example(&[(0, 4)], (0, 9), OK, &[]);
}

#[test]
fn example_7_over_a_hole() {
    example(&[(0, 4), (10, 14)], (0, 14), OK, &[]);
}
