//! The tree of an [`Order`]: an AVL tree without links to parents, in which each change goes by the path from the root.

use super::order::Order;
use super::slab::{Index, NIL};
use crate::addr::Iova;
use crate::engine::mapping::Record;

/// More than an AVL tree of 2^31 nodes is high.
const MAX_HEIGHT: usize = 48;

/// The way from the root to a record, both included.
struct Path {
    nodes: [Index; MAX_HEIGHT],
    len: usize,
}

impl Path {
    fn new() -> Self {
        Self { nodes: [NIL; MAX_HEIGHT], len: 0 }
    }

    fn push(&mut self, node: Index) {
        self.nodes[self.len] = node;
        self.len += 1;
    }

    fn last(&self) -> Index {
        self.len.checked_sub(1).map_or(NIL, |at| self.nodes[at])
    }

    fn above(&self, at: usize) -> Index {
        at.checked_sub(1).map_or(NIL, |at| self.nodes[at])
    }

    /// Where a record is on the way, or the length where it is not.
    fn position(&self, node: Index) -> usize {
        self.nodes[..self.len].iter().position(|at| *at == node).unwrap_or(self.len)
    }
}

impl Order {
    /// The way to a record of the tree, or to where one that starts at `start` would hang.
    fn path_to(&self, start: Iova) -> Path {
        let (mut path, mut node) = (Path::new(), self.root);
        while node != NIL {
            path.push(node);
            let record = &self[node];
            node = match start.cmp(&record.range.start()) {
                core::cmp::Ordering::Equal => break,
                core::cmp::Ordering::Less => record.left,
                core::cmp::Ordering::Greater => record.right,
            };
        }
        path
    }

    /// Puts a record of the list into the tree.
    pub(super) fn attach(&mut self, index: Index) {
        let start = self[index].range.start();
        let path = self.path_to(start);
        let parent = path.last();
        let record = &mut self[index];
        (record.left, record.right) = (NIL, NIL);
        self.update(index);
        match parent {
            NIL => self.root = index,
            parent if start < self[parent].range.start() => self[parent].left = index,
            parent => self[parent].right = index,
        }
        let next = path.position(self[index].next);
        self.mend(&path, next);
    }

    /// Takes a record out of the tree, which stays in the list.
    pub(super) fn detach(&mut self, index: Index) {
        let mut path = self.path_to(self[index].range.start());
        let at = path.len - 1;
        let Record { left, right, .. } = self[index];
        if left != NIL && right != NIL {
            // The record that follows in the tree takes its place.
            let mut heir = right;
            while self[heir].left != NIL {
                path.push(heir);
                heir = self[heir].left;
            }
            if heir != right {
                let parent = path.last();
                self[parent].left = self[heir].right;
                self[heir].right = right;
            }
            self[heir].left = left;
            self.relink(path.above(at), index, heir);
            path.nodes[at] = heir;
        } else {
            self.relink(path.above(at), index, if left == NIL { right } else { left });
            path.len = at;
        }
        self.mend(&path, at);
    }

    /// Lets the record behind take its place in the tree, and its addresses free.
    pub(super) fn replace(&mut self, index: Index, heir: Index) {
        let mut path = self.path_to(self[index].range.start());
        let at = path.len - 1;
        let Record { left, right, rank, .. } = self[index];
        let record = &mut self[heir];
        (record.left, record.right, record.rank) = (left, right, rank);
        self.relink(path.above(at), index, heir);
        self.unlink(index);
        path.nodes[at] = heir;
        self.mend(&path, at);
    }

    /// Takes note that what is free before a record of the tree changed.
    pub(super) fn refresh(&mut self, index: Index) {
        let path = self.path_to(self[index].range.start());
        self.mend(&path, path.len.saturating_sub(1));
    }

    fn relink(&mut self, parent: Index, old: Index, new: Index) {
        match parent {
            NIL => self.root = new,
            parent if self[parent].left == old => self[parent].left = new,
            parent => self[parent].right = new,
        }
    }

    /// Brings a path up to date and into balance, from its end up: all down from `changed`, and above it as far as
    /// anything changes.
    fn mend(&mut self, path: &Path, changed: usize) {
        for at in (0..path.len).rev() {
            let node = path.nodes[at];
            let before = (self[node].rank, self[node].gap);
            let top = self.balance(node);
            if top != node {
                self.relink(path.above(at), node, top);
            }
            if at < changed && (self[top].rank, self[top].gap) == before {
                return;
            }
        }
    }

    fn rank(&self, index: Index) -> i8 {
        if index == NIL { 0 } else { self[index].rank }
    }

    /// Brings a node up to date whose subtrees are. Returns what stands in its place.
    fn balance(&mut self, node: Index) -> Index {
        let Record { left, right, .. } = self[node];
        let lean = self.rank(left) - self.rank(right);
        if lean > 1 {
            if self.rank(self[left].left) < self.rank(self[left].right) {
                self[node].left = self.rotate_left(left);
            }
            return self.rotate_right(node);
        }
        if lean < -1 {
            if self.rank(self[right].right) < self.rank(self[right].left) {
                self[node].right = self.rotate_right(right);
            }
            return self.rotate_left(node);
        }
        self.update(node);
        node
    }

    fn rotate_right(&mut self, node: Index) -> Index {
        let top = self[node].left;
        self[node].left = self[top].right;
        self[top].right = node;
        self.update(node);
        self.update(top);
        top
    }

    fn rotate_left(&mut self, node: Index) -> Index {
        let top = self[node].right;
        self[node].right = self[top].left;
        self[top].left = node;
        self.update(node);
        self.update(top);
        top
    }

    pub(super) fn update(&mut self, node: Index) {
        let mut gap = self.gap(node);
        let mut height = 0;
        for child in [self[node].left, self[node].right] {
            if child != NIL {
                let record = &self[child];
                (gap, height) = (gap.max(record.gap), height.max(record.rank));
            }
        }
        let record = &mut self[node];
        (record.gap, record.rank) = (gap, height + 1);
    }
}
