//! Which of a fixed number of things are out: taken and given back from any thread, without a lock.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicUsize, Ordering};

const BITS: usize = usize::BITS as usize;

/// One bit for each: set while it is out.
///
/// Each change is one atomic OR or AND of bits that nobody else changes, so that there is no loop to be lost in, and
/// nothing that could look the same and be another (ABA). What is set for a moment by a run that is not had makes other
/// takers pass over it.
pub(super) struct Slots {
    words: Vec<AtomicUsize>,
    count: usize,
    /// The word where one came back last, or was taken: it is warm, and likely to have one.
    hint: AtomicUsize,
}

impl Slots {
    /// None of `count` is out. Allocates.
    pub(super) fn new(count: usize) -> Self {
        let words: Vec<_> = (0..count.div_ceil(BITS)).map(|_| AtomicUsize::new(0)).collect();
        // What the last word has beyond is out for good.
        if let Some(last) = words.last().filter(|_| !count.is_multiple_of(BITS)) {
            last.store(usize::MAX << (count % BITS), Ordering::Relaxed);
        }
        Self { words, count, hint: AtomicUsize::new(0) }
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Takes one. Bounded by their number: each round passes a bit.
    #[inline]
    pub(super) fn take(&self) -> Option<usize> {
        let hint = self.hint.load(Ordering::Relaxed);
        self.take_in(hint).or_else(|| self.take_elsewhere())
    }

    #[inline]
    fn take_in(&self, at: usize) -> Option<usize> {
        let word = self.words.get(at)?;
        let mut free = !word.load(Ordering::Relaxed);
        while free != 0 {
            let bit = free.trailing_zeros() as usize;
            // Acquire: what the last user did to it is over.
            if word.fetch_or(1 << bit, Ordering::Acquire) & (1 << bit) == 0 {
                return Some(at * BITS + bit);
            }
            free &= free - 1;
        }
        None
    }

    #[cold]
    fn take_elsewhere(&self) -> Option<usize> {
        let (at, taken) = (0..self.words.len()).find_map(|at| Some((at, self.take_in(at)?)))?;
        self.hint.store(at, Ordering::Relaxed);
        Some(taken)
    }

    /// Takes `count` neighbours, and returns the first. Looks at each place once.
    pub(super) fn take_run(&self, count: usize) -> Option<usize> {
        match count {
            0 => None,
            1 => self.take(),
            _ => {
                let mut places = 0..(self.count + 1).saturating_sub(count);
                places.find(|first| self.are_free(*first, count) && self.claim(*first, count))
            }
        }
    }

    fn are_free(&self, first: usize, count: usize) -> bool {
        masks(first, count).all(|(at, mask)| self.words[at].load(Ordering::Relaxed) & mask == 0)
    }

    /// Sets the bits of a run, or none if one of them is set.
    fn claim(&self, first: usize, count: usize) -> bool {
        for (done, (at, mask)) in masks(first, count).enumerate() {
            let before = self.words[at].fetch_or(mask, Ordering::Acquire);
            if before & mask == 0 {
                continue;
            }
            // Somebody was faster: back to what was ours.
            self.words[at].fetch_and(before | !mask, Ordering::Relaxed);
            for (at, mask) in masks(first, count).take(done) {
                self.words[at].fetch_and(!mask, Ordering::Relaxed);
            }
            return false;
        }
        true
    }

    /// Gives back what was taken. Release: whoever takes it next sees what was done to it.
    #[inline]
    pub(super) fn give_back(&self, at: usize) {
        let (word, bit) = (at / BITS, at % BITS);
        self.words[word].fetch_and(!(1 << bit), Ordering::Release);
        self.hint.store(word, Ordering::Relaxed);
    }

    /// The same for a run.
    pub(super) fn give_back_run(&self, first: usize, count: usize) {
        for (at, mask) in masks(first, count) {
            self.words[at].fetch_and(!mask, Ordering::Release);
        }
    }

    /// Whether this one is out.
    #[inline]
    pub(super) fn is_out(&self, at: usize) -> bool {
        let (word, bit) = (at / BITS, at % BITS);
        at < self.count && self.words[word].load(Ordering::Acquire) & (1 << bit) != 0
    }

    /// Whether all of these are out.
    pub(super) fn are_out(&self, first: usize, count: usize) -> bool {
        let inside = first < self.count && count <= self.count - first;
        inside && masks(first, count).all(|(at, mask)| self.words[at].load(Ordering::Acquire) & mask == mask)
    }

    /// How many are out.
    pub(super) fn out(&self) -> usize {
        let ones = |word: &AtomicUsize| word.load(Ordering::Relaxed).count_ones() as usize;
        let beyond = self.words.len() * BITS - self.count;
        self.words.iter().map(ones).sum::<usize>() - beyond
    }

    /// Takes all, for good, if none is out.
    pub(super) fn retire(&self) -> bool {
        self.count == 0 || self.claim(0, self.count)
    }
}

/// The words of a run, and its bits in them.
fn masks(first: usize, count: usize) -> impl Iterator<Item = (usize, usize)> {
    let end = first + count;
    (first / BITS..end.div_ceil(BITS)).map(move |at| {
        let from = first.max(at * BITS) - at * BITS;
        let to = end.min((at + 1) * BITS) - at * BITS;
        (at, (usize::MAX >> (BITS - (to - from))) << from)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeSet;
    use std::thread;

    #[test]
    fn each_is_handed_out_once() {
        for count in [1, 63, 64, 65, 200] {
            let slots = Slots::new(count);
            let taken: BTreeSet<_> = (0..count).map(|_| slots.take().unwrap()).collect();
            assert_eq!((taken.len(), taken.last().copied()), (count, Some(count - 1)));
            assert_eq!((slots.take(), slots.out()), (None, count));
            slots.give_back(count / 2);
            assert_eq!(slots.take(), Some(count / 2));
        }
        assert_eq!(Slots::new(0).take(), None);
    }

    #[test]
    fn runs_go_across_words_and_are_whole() {
        let slots = Slots::new(200);
        assert_eq!(slots.take(), Some(0));
        assert_eq!(slots.take_run(130), Some(1));
        assert_eq!((slots.take_run(70), slots.take_run(69)), (None, Some(131)));
        assert!(slots.are_out(0, 200) && !slots.are_out(0, 201) && !slots.are_out(200, 1));
        assert!(slots.is_out(0) && slots.is_out(199) && !slots.is_out(200) && !slots.is_out(255));
        slots.give_back_run(60, 10);
        assert!(slots.is_out(59) && !slots.is_out(60) && !slots.is_out(69) && slots.is_out(70));
        assert_eq!((slots.take_run(11), slots.take_run(10)), (None, Some(60)));
        assert_eq!((slots.take_run(201), slots.take_run(0)), (None, None));
    }

    #[test]
    fn only_what_is_idle_is_retired() {
        let slots = Slots::new(130);
        let one = slots.take_run(2).unwrap();
        assert!(!slots.retire() && slots.out() == 2);
        slots.give_back_run(one, 2);
        assert!(slots.retire());
        assert_eq!(slots.take(), None);
    }

    /// Fails when `claim` undoes bits that were another's, or does not undo its own.
    #[test]
    fn a_run_that_somebody_is_faster_at_leaves_all_as_it_was() {
        for other in [10, 70, 149] {
            let slots = Slots::new(150);
            assert!(slots.claim(other, 1));
            for (first, count) in [(0, 150), (5, 140), (10, 140), (other, 1)] {
                assert_eq!(slots.claim(first, count), other < first || other >= first + count);
                assert!(slots.are_out(other, 1));
                if slots.out() > 1 {
                    slots.give_back_run(first, count);
                }
                assert_eq!(slots.out(), 1);
            }
        }
    }

    #[test]
    fn threads_never_share_one() {
        const COUNT: usize = 150;
        let slots = Slots::new(COUNT);
        let owners: Vec<_> = (0..COUNT).map(|_| AtomicUsize::new(0)).collect();
        thread::scope(|scope| {
            for me in 1..=4usize {
                let (slots, owners) = (&slots, &owners);
                scope.spawn(move || {
                    for round in 0..4000 {
                        let count = [1, 1, 3, 70][(round * me) % 4];
                        let Some(first) = slots.take_run(count) else { continue };
                        for owner in &owners[first..first + count] {
                            assert_eq!(owner.swap(me, Ordering::Relaxed), 0);
                        }
                        for owner in &owners[first..first + count] {
                            assert_eq!(owner.swap(0, Ordering::Relaxed), me);
                        }
                        match count {
                            1 => slots.give_back(first),
                            _ => slots.give_back_run(first, count),
                        }
                    }
                });
            }
        });
        assert_eq!(slots.out(), 0);
    }
}
