//! What sequences are made of, and how one that failed gets shorter.

use proptest::collection::vec;
use proptest::prelude::any;
use proptest::strategy::{NewTree, Strategy, ValueTree};
use proptest::test_runner::TestRunner;

use super::OPERATIONS;

/// A word for each operation, and whether the device misbehaves.
#[derive(Debug)]
pub(super) struct Words;

impl Strategy for Words {
    type Tree = Shorter;
    type Value = (Vec<u64>, bool);

    fn new_tree(&self, runner: &mut TestRunner) -> NewTree<Self> {
        let words = vec(any::<u64>(), OPERATIONS).new_tree(runner)?.current();
        let misbehaves = any::<bool>().new_tree(runner)?.current();
        Ok(Shorter { words, misbehaves, pass: 0, at: 0, before: None })
    }
}

/// Tries sequences in this order, and goes on from those that fail: with a half of the operations replaced by nothing,
/// a quarter, and so on to single ones; then with one part of an operation that is 0, half, or one less; then with
/// single operations replaced again.
pub(super) struct Shorter {
    words: Vec<u64>,
    misbehaves: bool,
    pass: usize,
    at: usize,
    /// The words that the last try changed, and what they were.
    before: Option<(usize, Vec<u64>)>,
}

/// Passes over the whole: chunks of so many operations, or parts of single ones.
const PASSES: [Pass; 14] = [
    Pass::Chunks(OPERATIONS / 2),
    Pass::Chunks(OPERATIONS / 4),
    Pass::Chunks(OPERATIONS / 8),
    Pass::Chunks(OPERATIONS / 20),
    Pass::Chunks(4),
    Pass::Chunks(2),
    Pass::Chunks(1),
    Pass::Chunks(1),
    Pass::Parts(|_| 0),
    Pass::Parts(|part| part / 2),
    Pass::Parts(|part| part / 2),
    Pass::Parts(|part| part.saturating_sub(1)),
    Pass::Chunks(1),
    Pass::Parts(|_| 0),
];

#[derive(Clone, Copy)]
enum Pass {
    Chunks(usize),
    /// Each byte of a word but the first, which says what the operation is.
    Parts(fn(u8) -> u8),
}

impl Shorter {
    /// Changes the next thing that can be changed. False when there is none.
    fn try_next(&mut self) -> bool {
        while let Some(pass) = PASSES.get(self.pass) {
            let at = self.at;
            self.at += 1;
            let (first, new) = match *pass {
                Pass::Chunks(size) => (at * size, vec![0; size]),
                Pass::Parts(change) => {
                    let (first, part) = (at / 7, 1 + at % 7);
                    let mut bytes = self.words.get(first).map_or([0; 8], |word| word.to_be_bytes());
                    bytes[part] = change(bytes[part]);
                    (first, vec![u64::from_be_bytes(bytes)])
                }
            };
            if first >= self.words.len() {
                (self.pass, self.at) = (self.pass + 1, 0);
                continue;
            }
            let last = self.words.len().min(first + new.len());
            let old = self.words[first..last].to_vec();
            self.words[first..last].copy_from_slice(&new[..last - first]);
            if self.words[first..last] != old {
                self.before = Some((first, old));
                return true;
            }
        }
        false
    }
}

impl ValueTree for Shorter {
    type Value = (Vec<u64>, bool);

    fn current(&self) -> Self::Value {
        (self.words.clone(), self.misbehaves)
    }

    /// The last try failed, as it should: on from there.
    fn simplify(&mut self) -> bool {
        self.before = None;
        self.try_next()
    }

    /// The last try did not fail: back, and on.
    fn complicate(&mut self) -> bool {
        if let Some((first, old)) = self.before.take() {
            self.words[first..first + old.len()].copy_from_slice(&old);
        }
        self.try_next()
    }
}
