//! The shape against GLib 2.74's own answers.

use super::MetOrder;
use Op::{Find, Insert, Remove};

/// Range `n` is `16 * n..=16 * n + 15`.
enum Op {
    Insert(u64),
    Remove(u64),
    /// A lookup, and the range that GLib returned.
    Find(u64, u64, Option<u64>),
}

fn range(n: u64) -> (u64, u64) {
    (16 * n, 16 * n + 15)
}

#[test]
fn lookups_meet_what_glib_meets() {
    let mut order = MetOrder::default();
    for op in RECORDED {
        match *op {
            Insert(n) => order.insert(range(n)),
            Remove(n) => order.remove(range(n)),
            Find(first, last, met) => assert_eq!(order.find((first, last)), met.map(range)),
        }
    }
}

/// A random sequence that was run on libglib-2.0 through its C interface.
#[rustfmt::skip]
const RECORDED: &[Op] = &[
    Insert(19), Insert(6), Insert(12), Insert(7), Find(219, 238, None), Insert(53), Insert(11), Remove(6),
    Find(126, 240, Some(12)), Remove(53), Find(590, 889, None), Insert(28), Insert(17), Insert(18), Insert(39),
    Remove(12), Insert(24), Insert(8), Remove(17), Insert(54), Remove(39), Remove(54), Insert(31), Remove(18),
    Insert(38), Insert(43), Remove(24), Remove(8), Insert(53), Insert(62), Insert(9), Remove(62), Remove(31),
    Insert(44), Remove(44), Find(485, 841, Some(38)), Remove(7), Remove(19), Remove(53),
    Find(291, 657, Some(28)), Insert(44), Insert(59), Insert(14), Insert(27), Remove(14), Remove(44),
    Insert(63), Insert(57), Insert(35), Find(838, 1058, Some(59)), Find(285, 646, Some(28)), Insert(45),
    Remove(43), Find(154, 196, Some(11)), Insert(29), Remove(9), Insert(23), Insert(0), Insert(47), Remove(29),
    Find(707, 970, Some(45)), Find(670, 1016, Some(45)), Remove(45), Find(798, 1146, Some(59)), Remove(38),
    Insert(50), Insert(51), Insert(8), Find(451, 534, Some(28)), Insert(6), Insert(19), Insert(46), Remove(8),
    Find(628, 820, Some(47)), Insert(32), Find(616, 802, Some(47)), Insert(14), Find(477, 722, Some(35)),
    Insert(10), Insert(43), Remove(51), Find(165, 429, Some(11)), Insert(3), Remove(28),
    Find(884, 930, Some(57)), Remove(27), Insert(21), Insert(28), Insert(42), Remove(63),
    Find(776, 875, Some(50)), Find(837, 1042, Some(57)), Remove(21), Insert(63), Find(809, 952, Some(57)),
    Insert(24), Remove(35), Insert(44), Find(373, 414, Some(24)), Insert(29), Remove(6),
    Find(122, 320, Some(11)), Remove(23), Insert(22), Remove(19), Find(28, 105, Some(3)), Remove(47),
    Find(149, 462, Some(11)), Find(485, 821, Some(32)), Find(159, 439, Some(11)), Insert(2), Insert(13),
    Insert(17), Find(216, 230, Some(14)), Insert(37), Insert(41), Insert(53), Find(62, 440, Some(11)),
    Insert(58), Remove(43), Insert(16), Find(795, 888, Some(50)), Remove(63), Remove(13), Insert(15),
    Remove(24), Remove(44), Remove(10), Find(58, 185, Some(11)), Insert(5), Remove(46), Remove(3), Insert(25),
    Remove(41), Insert(61), Insert(31), Remove(22), Find(207, 436, Some(17)), Insert(40), Insert(30),
    Insert(27), Remove(11), Find(158, 524, Some(32)), Remove(30), Find(224, 606, Some(32)),
    Find(407, 656, Some(32)), Insert(55), Find(413, 586, Some(32)), Insert(45), Insert(46), Insert(8),
    Find(107, 150, Some(8)), Find(185, 323, Some(17)), Remove(32), Find(692, 824, Some(50)), Insert(63),
    Remove(5), Insert(23), Insert(9), Remove(61), Insert(43), Find(427, 564, Some(28)), Remove(2), Insert(30),
    Find(165, 299, Some(17)), Find(643, 799, Some(45)), Insert(26), Insert(22), Insert(2),
    Find(37, 44, Some(2)), Insert(24), Find(108, 445, Some(17)), Find(442, 778, Some(37)),
    Find(315, 667, Some(37)), Insert(44), Find(857, 923, Some(57)), Insert(32), Insert(7), Insert(48),
    Find(686, 830, Some(50)), Remove(31), Find(560, 725, Some(37)), Insert(39), Insert(35), Insert(11),
    Insert(5), Insert(38), Insert(19), Remove(59), Insert(41), Remove(45), Insert(18), Insert(54), Remove(46),
    Find(598, 962, Some(37)), Remove(23), Insert(46), Find(385, 616, Some(37)), Remove(2), Remove(26),
    Remove(53), Find(94, 431, Some(17)), Insert(60), Find(240, 613, Some(37)), Remove(25), Remove(48),
    Insert(48), Insert(36), Remove(22), Remove(16), Insert(12), Remove(54), Insert(59), Remove(60), Insert(10),
    Find(17, 165, Some(8)), Find(396, 503, Some(28)), Find(215, 253, Some(14)), Remove(15), Remove(30),
    Find(135, 443, Some(17)), Find(520, 663, Some(37)), Find(720, 906, Some(50)), Insert(62), Insert(20),
    Remove(42), Insert(42), Find(122, 222, Some(8)), Remove(35), Insert(54), Remove(8), Insert(6),
    Find(292, 617, Some(37)), Find(255, 391, Some(17)), Insert(47), Remove(46), Find(831, 1220, Some(58)),
    Remove(62), Insert(52), Remove(36), Insert(16), Insert(53), Insert(33), Insert(30), Remove(44),
    Find(777, 1007, Some(50)), Insert(22), Insert(25), Find(767, 978, Some(50)), Insert(26), Remove(47),
    Insert(46), Insert(31), Find(893, 904, Some(55)), Remove(42), Find(501, 501, Some(31)),
    Find(254, 309, Some(17)), Insert(13), Find(739, 1097, Some(50)), Remove(40), Insert(4), Remove(26),
    Find(641, 769, Some(41)), Remove(11), Remove(0), Find(285, 446, Some(17)), Remove(24), Insert(3),
    Find(721, 1053, Some(50)), Insert(2), Remove(32), Remove(39), Remove(53), Find(319, 711, Some(37)),
    Find(236, 474, Some(17)), Remove(19), Find(149, 350, Some(17)), Find(145, 357, Some(17)),
    Find(321, 696, Some(37)), Find(337, 434, Some(25)), Find(339, 565, Some(28)), Insert(0), Insert(15),
    Remove(16), Insert(39), Find(442, 486, Some(28)), Insert(60), Remove(48), Insert(51), Insert(8),
    Find(347, 532, Some(28)), Insert(40), Find(304, 305, None), Remove(58), Find(649, 682, Some(41)),
    Find(395, 523, Some(28)), Find(834, 1086, Some(59)),
];
