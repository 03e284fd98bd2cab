//! The configuration space as a front end passes it on.
//!
//! QEMU passes on a write of any length as the whole space: its copy, in which what the guest wrote is new. The copy is
//! from the last time that either side passed the space on, so that what differs from that is what was written.

/// The space as the front end knows it.
#[derive(Clone, Debug)]
pub(crate) struct Known(Vec<u8>);

impl Known {
    /// One that the front end knows nothing of: its copy has zeros.
    pub(crate) fn nothing(len: usize) -> Self {
        Self(vec![0; len])
    }

    /// The front end is told what is at `offset`.
    pub(crate) fn told(&mut self, offset: usize, bytes: &[u8]) {
        if let Some(known) = self.0.get_mut(offset..).filter(|known| known.len() >= bytes.len()) {
            known[..bytes.len()].copy_from_slice(bytes);
        }
    }

    /// The bytes that the guest wrote, when the front end passes on `bytes` at `offset`: those that are new in the
    /// whole space, or all of a part of it. `None` when they are not in the space.
    pub(crate) fn written(&mut self, offset: usize, bytes: &[u8]) -> Option<Vec<(usize, u8)>> {
        let whole = bytes.len() == self.0.len();
        let end = offset.checked_add(bytes.len())?;
        let known = self.0.get_mut(offset..end)?;
        let pairs = bytes.iter().zip(known.iter()).enumerate();
        let written = pairs
            .filter(|(_, (new, old))| !whole || new != old)
            .map(|(at, (new, _))| (offset + at, *new))
            .collect();
        known.copy_from_slice(bytes);
        Some(written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_the_whole_space_only_what_is_new_was_written() {
        let mut known = Known::nothing(4);
        known.told(0, &[1, 2, 3, 4]);
        assert_eq!(known.written(0, &[1, 9, 3, 8]), Some(vec![(1, 9), (3, 8)]));
        assert_eq!(known.written(0, &[1, 9, 3, 8]), Some(vec![]));
        // Something here changed by itself, and the front end was told.
        known.told(1, &[2]);
        assert_eq!(known.written(0, &[1, 9, 3, 8]), Some(vec![(1, 9)]));
    }

    #[test]
    fn a_part_was_written_as_it_is() {
        let mut known = Known::nothing(4);
        assert_eq!(known.written(2, &[0]), Some(vec![(2, 0)]));
        assert_eq!(known.written(1, &[5, 6]), Some(vec![(1, 5), (2, 6)]));
    }

    #[test]
    fn what_is_outside_is_no_write() {
        let mut known = Known::nothing(4);
        for (offset, len) in [(0, 5), (4, 1), (3, 2), (usize::MAX, 2)] {
            assert_eq!(known.written(offset, &vec![1; len]), None);
            known.told(offset, &vec![1; len]);
        }
        assert_eq!(known.written(0, &[0; 4]), Some(vec![]));
    }
}
