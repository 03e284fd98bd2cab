//! Operations, as data: small numbers, which stand for whatever there is when the operation's turn comes.

use proptest::prelude::{Just, Strategy, any};
use proptest::prop_oneof;

/// One operation. `slot` and `endpoint` are one of four, `view` and `which` count through what there is, `pages` and
/// `place` are in granules.
#[derive(Clone, Copy, Debug)]
pub(super) enum Op {
    /// What other operations shrink to.
    Nothing,
    Create,
    Drop {
        slot: u8,
    },
    Attach {
        endpoint: u8,
        slot: u8,
    },
    Detach {
        endpoint: u8,
    },
    Move {
        endpoint: u8,
        slot: u8,
    },
    Map {
        slot: u8,
        pages: u8,
        phys: u8,
        prot: u8,
        low: bool,
    },
    MapAt {
        slot: u8,
        place: Place,
        pages: u8,
        phys: u8,
        prot: u8,
    },
    Unmap {
        slot: u8,
        which: u8,
        neighbours: u8,
    },
    UnmapOther {
        slot: u8,
        which: u8,
        skip: u8,
        pages: u8,
    },
    Open {
        endpoint: u8,
        slot: u8,
        bounce: u8,
        low: bool,
    },
    Close {
        view: u8,
    },
    Forget {
        view: u8,
    },
    Scatter {
        view: u8,
        segments: [Segment; 4],
        used: u8,
        direction: u8,
    },
    UnmapList {
        which: u8,
    },
    Alloc {
        view: u8,
        pages: u8,
    },
    Free {
        which: u8,
    },
    Share {
        view: u8,
        len: u16,
    },
    Poll,
    Reclaim,
    Restart {
        orderly: bool,
    },
}

/// Where [`Op::MapAt`] maps.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    /// In granules from the first address that can be mapped.
    Low(u8),
    /// In granules around the start of the MSI window, which is the 8th.
    Msi(u8),
    /// In granules down from the last that can be mapped; 0 is beyond.
    High(u8),
    /// One byte off.
    Odd(u8),
}

/// Part of a scatter list: a granule of memory, and 16ths of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    pub(super) phys: u8,
    pub(super) start: u8,
    pub(super) len: u8,
}

fn place() -> impl Strategy<Value = Place> {
    prop_oneof![
        10 => (0..20u8).prop_map(Place::Low),
        3 => (4..12u8).prop_map(Place::Msi),
        2 => (0..6u8).prop_map(Place::High),
        1 => (0..20u8).prop_map(Place::Odd),
    ]
}

fn segment() -> impl Strategy<Value = Segment> {
    (0..8u8, 0..16u8, 1..40u8).prop_map(|(phys, start, len)| Segment { phys, start, len })
}

/// Any operation, those that make things more often than those that end them.
pub(super) fn op() -> impl Strategy<Value = Op> {
    let (slot, endpoint, n) = (0..4u8, 0..4u8, any::<u8>());
    let (pages, phys) = (1..5u8, 0..16u8);
    // READ, WRITE and MMIO, and now and then none of them.
    let prot = prop_oneof![12 => 1..4u8, 2 => 5..8u8, 1 => Just(0), 1 => Just(4)];
    let op = prop_oneof![
        6 => Just(Op::Create),
        2 => slot.clone().prop_map(|slot| Op::Drop { slot }),
        8 => (endpoint.clone(), slot.clone()).prop_map(|(endpoint, slot)| Op::Attach { endpoint, slot }),
        3 => endpoint.clone().prop_map(|endpoint| Op::Detach { endpoint }),
        3 => (endpoint.clone(), slot.clone()).prop_map(|(endpoint, slot)| Op::Move { endpoint, slot }),
        12 => (slot.clone(), pages.clone(), phys.clone(), prot.clone(), any::<bool>())
            .prop_map(|(slot, pages, phys, prot, low)| Op::Map { slot, pages, phys, prot, low }),
        14 => (slot.clone(), place(), pages.clone(), phys, prot)
            .prop_map(|(slot, place, pages, phys, prot)| Op::MapAt { slot, place, pages, phys, prot }),
        12 => (slot.clone(), n, 0..4u8)
            .prop_map(|(slot, which, neighbours)| Op::Unmap { slot, which, neighbours }),
        2 => (slot.clone(), n, 0..3u8, 0..6u8)
            .prop_map(|(slot, which, skip, pages)| Op::UnmapOther { slot, which, skip, pages }),
        4 => (endpoint, slot, 0..3u8, any::<bool>())
            .prop_map(|(endpoint, slot, bounce, low)| Op::Open { endpoint, slot, bounce, low }),
        2 => n.prop_map(|view| Op::Close { view }),
        1 => n.prop_map(|view| Op::Forget { view }),
        5 => (n, [segment(), segment(), segment(), segment()], 1..5u8, 0..3u8)
            .prop_map(|(view, segments, used, direction)| Op::Scatter { view, segments, used, direction }),
        4 => n.prop_map(|which| Op::UnmapList { which }),
        5 => (n, pages).prop_map(|(view, pages)| Op::Alloc { view, pages }),
        4 => n.prop_map(|which| Op::Free { which }),
        2 => (n, 1..5000u16).prop_map(|(view, len)| Op::Share { view, len }),
        2 => Just(Op::Poll),
        2 => Just(Op::Reclaim),
        1 => any::<bool>().prop_map(|orderly| Op::Restart { orderly }),
    ];
    prop_oneof![1 => Just(Op::Nothing), 99 => op]
}
