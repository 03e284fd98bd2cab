//! Compares what the guest claims with what QEMU saw.
//!
//! A guest that passes on a machine with an IOMMU states five numbers as `@@ value` lines: `attach`, `detach`, `map`,
//! `unmap` and `kicks`. Each must be there, and be the number in QEMU's trace.

use crate::protocol::Value;
use crate::trace::Counts;

/// Says what differs, a sentence for each number. Empty when guest and QEMU agree.
#[must_use]
pub fn differences(claimed: &[Value], seen: &Counts) -> Vec<String> {
    let numbers = [
        ("attach", seen.attach),
        ("detach", seen.detach),
        ("map", seen.map),
        ("unmap", seen.unmap),
        ("kicks", seen.kicks),
    ];
    let differences = numbers.into_iter().filter_map(|(name, seen)| {
        match claimed.iter().find(|value| value.name == name) {
            None => Some(format!("the guest does not say its number `{name}`; QEMU saw {seen}")),
            Some(value) if value.number != seen => {
                Some(format!("the guest claims `{name}` {}, but QEMU saw {seen}", value.number))
            }
            Some(_) => None,
        }
    });
    differences.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEEN: Counts = Counts { attach: 3, detach: 1, map: 9, unmap: 4, kicks: 12, pops: 20 };

    fn claims() -> Vec<Value> {
        let numbers = [("attach", 3), ("detach", 1), ("map", 9), ("unmap", 4), ("kicks", 12), ("faults", 8)];
        numbers.map(|(name, number)| Value { name: name.into(), number, unit: "requests".into() }).to_vec()
    }

    #[test]
    fn agreement_is_silent() {
        assert!(differences(&claims(), &SEEN).is_empty());
    }

    #[test]
    fn a_different_number_is_named_with_both() {
        let mut claims = claims();
        claims[2].number = 10;
        assert_eq!(differences(&claims, &SEEN), ["the guest claims `map` 10, but QEMU saw 9"]);
    }

    #[test]
    fn a_missing_number_is_named() {
        let mut claims = claims();
        claims.retain(|value| value.name != "kicks");
        assert_eq!(differences(&claims, &SEEN), ["the guest does not say its number `kicks`; QEMU saw 12"]);
        assert_eq!(differences(&[], &SEEN).len(), 5);
    }
}
