//! What has to hold of an order's list and tree.

use super::*;
use crate::engine::mapping::Holder;
use crate::engine::space::order::MAX_BEHIND;

impl Order {
    /// Looks at the whole list and the whole tree.
    pub(super) fn check(&self) {
        let (mut index, mut prev, mut behind, mut in_tree) = (self.first, NIL, 0, alloc::vec![]);
        while index != NIL {
            let record = &self[index];
            assert_eq!(record.prev, prev);
            assert!(record.holder != Holder::Nobody);
            assert_eq!(record.holder == Holder::End, record.next == NIL);
            if prev != NIL {
                assert!(self[prev].range.last() < record.range.start(), "sorted");
            }
            if record.rank > 0 {
                behind = 0;
                in_tree.push(index);
            } else {
                behind += 1;
                assert!(
                    behind <= 2 * i32::from(MAX_BEHIND) && self.gap(index) == 0 && prev != NIL,
                    "{behind}"
                );
                assert!(record.rank < 0);
            }
            (prev, index) = (index, record.next);
        }
        let mut visited = alloc::vec![];
        self.check_subtree(self.root, &mut visited);
        assert_eq!(visited, in_tree, "the same, in order");
    }

    fn check_subtree(&self, node: Index, visited: &mut Vec<Index>) -> (i8, u32) {
        if node == NIL {
            return (0, 0);
        }
        let record = &self[node];
        let left = self.check_subtree(record.left, visited);
        visited.push(node);
        let right = self.check_subtree(record.right, visited);
        assert!((left.0 - right.0).abs() <= 1, "balanced");
        let expected = (1 + left.0.max(right.0), self.gap(node).max(left.1).max(right.1));
        assert_eq!((record.rank, record.gap), expected);
        expected
    }
}
