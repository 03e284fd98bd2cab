//! Addresses and ranges of addresses.
//!
//! An [`Iova`] is what an endpoint puts on the bus, a [`PhysAddr`] is where guest memory lies. They are never
//! mixed, and neither converts from an integer by itself: the number has to be named as one or the other.

use core::fmt;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u64);

        impl $name {
            /// Names a number as an address of this kind. Any value is valid.
            #[inline]
            pub const fn new(address: u64) -> Self {
                Self(address)
            }

            /// The address as a number of bytes from 0.
            #[inline]
            pub const fn get(self) -> u64 {
                self.0
            }

            /// The address `bytes` further on, or `None` past 2^64 - 1.
            #[inline]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
    };
}

address! {
    /// An I/O virtual address: what an endpoint uses for its DMA. The standard calls it a virtual address.
    ///
    /// Holding one does not prove that anything is mapped there.
    Iova
}

address! {
    /// A guest-physical address of memory or of a device's registers.
    PhysAddr
}

impl Iova {
    /// The highest address of `bits` bits, as devices state what they can put on the bus: 32 for those that know
    /// 4 GiB. All addresses from 64 on.
    #[inline]
    pub const fn mask(bits: u32) -> Self {
        match 1u64.checked_shl(bits) {
            Some(next) => Self(next - 1),
            None => Self(u64::MAX),
        }
    }
}

/// A non-empty range of IOVAs, both ends inclusive, as in the standard.
///
/// # Invariants
/// `start <= last`. The range may be the whole 64-bit space, whose length no `u64` holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct IovaRange {
    start: u64,
    last: u64,
}

impl IovaRange {
    /// The whole 64-bit space.
    pub const WHOLE: Self = Self { start: 0, last: u64::MAX };

    /// The range `start..=last`, or `None` where `last` lies before `start`.
    #[inline]
    pub const fn new(start: Iova, last: Iova) -> Option<Self> {
        if start.get() <= last.get() { Some(Self { start: start.get(), last: last.get() }) } else { None }
    }

    /// `len` bytes from `start`, or `None` where `len` is 0 or the range would pass 2^64 - 1.
    #[inline]
    pub const fn from_len(start: Iova, len: u64) -> Option<Self> {
        if len == 0 {
            return None;
        }
        match start.get().checked_add(len - 1) {
            Some(last) => Some(Self { start: start.get(), last }),
            None => None,
        }
    }

    /// The first address.
    #[inline]
    pub const fn start(self) -> Iova {
        Iova::new(self.start)
    }

    /// The last address, inclusive.
    #[inline]
    pub const fn last(self) -> Iova {
        Iova::new(self.last)
    }

    /// The number of bytes less one, which always fits.
    #[inline]
    pub const fn len_minus_one(self) -> u64 {
        self.last - self.start
    }

    /// The number of bytes, or `None` for the whole 64-bit space.
    #[inline]
    pub const fn len_bytes(self) -> Option<u64> {
        self.len_minus_one().checked_add(1)
    }

    /// The number of bytes, which is known to be one: no mapping takes the whole 64-bit space.
    #[inline]
    pub(crate) const fn len_of_mapping(self) -> u64 {
        self.len_minus_one().wrapping_add(1)
    }

    /// Whether both ranges have an address in common.
    #[inline]
    pub const fn overlaps(self, other: Self) -> bool {
        self.start <= other.last && other.start <= self.last
    }

    /// Whether all of `other` lies in this range.
    #[inline]
    pub const fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.last <= self.last
    }

    /// What of this range lies behind `part`.
    pub(crate) const fn after(self, part: Self) -> Option<Self> {
        if part.last < self.last { Some(Self { start: part.last + 1, last: self.last }) } else { None }
    }

    /// The smallest range of whole granules around this one. `granule` is a power of two.
    pub(crate) const fn rounded_out(self, granule: u64) -> Self {
        Self { start: self.start & !(granule - 1), last: self.last | (granule - 1) }
    }
}

impl fmt::Display for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..={:#x}", self.start, self.last)
    }
}

impl fmt::Debug for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IovaRange({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova::new(start), Iova::new(last)).unwrap()
    }

    #[test]
    fn length_of_the_whole_space_is_not_a_number() {
        assert_eq!(range(0, u64::MAX).len_bytes(), None);
        assert_eq!(range(1, u64::MAX).len_bytes(), Some(u64::MAX));
        assert_eq!(range(7, 7).len_bytes(), Some(1));
    }

    #[test]
    fn masks_are_the_highest_address() {
        let masks = [0, 1, 24, 32, 63, 64, 65].map(|bits| Iova::mask(bits).get());
        assert_eq!(masks, [0, 1, 0xff_ffff, 0xffff_ffff, u64::MAX / 2, u64::MAX, u64::MAX]);
    }

    #[test]
    fn a_range_never_wraps() {
        assert_eq!(IovaRange::from_len(Iova::new(u64::MAX), 2), None);
        assert_eq!(IovaRange::from_len(Iova::new(u64::MAX), 1), Some(range(u64::MAX, u64::MAX)));
        assert_eq!(IovaRange::from_len(Iova::new(5), 0), None);
        assert_eq!(IovaRange::new(Iova::new(2), Iova::new(1)), None);
    }

    #[test]
    fn touching_ranges_do_not_overlap() {
        assert!(!range(0, 0xfff).overlaps(range(0x1000, 0x1fff)));
        assert!(range(0, 0x1000).overlaps(range(0x1000, 0x1fff)));
    }

    #[test]
    fn rounding_out_keeps_the_top_of_the_space() {
        assert_eq!(range(0x1234, u64::MAX - 5).rounded_out(0x1000), range(0x1000, u64::MAX));
    }
}
