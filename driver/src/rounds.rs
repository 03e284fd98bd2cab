//! Loops over lists, many items in a round: what there is to do for one takes no longer than going round.

/// Items in a round: half of the most that lists usually have.
pub(crate) const ROUND: usize = 32;

/// Whether it is so for all of them, in order.
#[inline(always)]
pub(crate) fn all<T>(list: &[T], mut is: impl FnMut(&T) -> bool) -> bool {
    let mut rest = list;
    while let Some((round, behind)) = rest.split_first_chunk::<ROUND>() {
        for item in round {
            if !is(item) {
                return false;
            }
        }
        rest = behind;
    }
    for item in rest {
        if !is(item) {
            return false;
        }
    }
    true
}

/// Changes each of them, in order.
#[inline(always)]
pub(crate) fn change<T>(list: &mut [T], mut change: impl FnMut(&mut T)) {
    let (rounds, rest) = list.as_chunks_mut::<ROUND>();
    for round in rounds {
        for item in round {
            change(item);
        }
    }
    for item in rest {
        change(item);
    }
}

/// Changes each of them with the one of another list, in order, as far as both go.
#[inline(always)]
pub(crate) fn change_with<T, U>(list: &mut [T], with: &[U], mut change: impl FnMut(&mut T, &U)) {
    let len = list.len().min(with.len());
    let (rounds, rest) = list[..len].as_chunks_mut::<ROUND>();
    let (with, rest_with) = with[..len].as_chunks::<ROUND>();
    for (round, with) in rounds.iter_mut().zip(with) {
        for (item, with) in round.iter_mut().zip(with) {
            change(item, with);
        }
    }
    for (item, with) in rest.iter_mut().zip(rest_with) {
        change(item, with);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    /// Fails when one is left out, or comes twice, in a round or behind the last one.
    #[test]
    fn each_has_its_turn() {
        for count in [0, 1, ROUND - 1, ROUND, ROUND + 1, 3 * ROUND + 2] {
            let mut list: Vec<_> = (0..count).collect();
            let mut next = 0;
            change(&mut list, |item| {
                assert_eq!(*item, next);
                (*item, next) = (*item + 1, next + 1);
            });
            assert_eq!(next, count);
            // One list is longer than the other, each time.
            for (more, less) in [(0, 1), (1, 0), (0, 0)] {
                let with: Vec<_> = (0..count + more).map(|item| 10 * item).collect();
                let mut sums: Vec<_> = (0..count + less).collect();
                change_with(&mut sums, &with, |item, with| *item += with);
                assert!(sums[..count].iter().enumerate().all(|(item, sum)| *sum == 11 * item));
                assert!(less == 0 || sums[count] == count, "there is none for it");
            }
            let mut seen = 0;
            assert!(all(&list, |item| {
                seen += 1;
                *item == seen
            }));
            assert_eq!(seen, count);
            for not in 0..count {
                let mut seen = 0;
                assert!(!all(&list, |item| {
                    seen += 1;
                    *item != not + 1
                }));
                assert_eq!(seen, not + 1, "and no further");
            }
        }
    }
}
