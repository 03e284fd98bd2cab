//! The order in which QEMU meets mappings.
//!
//! QEMU keeps them in a balanced binary tree (GLib's `GTree`) whose comparison calls overlapping ranges equal. A lookup with a
//! range that overlaps several mappings ends at the one nearest the root, so that which one an UNMAP removes first, and where
//! an access at the edge of two mappings goes, follow from the tree's shape. This is a plain AVL tree with the same shape: one
//! rotation where both would do, and the successor in place of a removed node.

use alloc::boxed::Box;
use core::cmp::Ordering;

type Link = Option<Box<Node>>;

/// Ranges that do not overlap, as (first, last), in a tree.
#[derive(Clone, Debug, Default)]
pub(crate) struct MetOrder {
    root: Link,
}

#[derive(Clone, Debug)]
struct Node {
    range: (u64, u64),
    height: u8,
    left: Link,
    right: Link,
}

impl MetOrder {
    /// The range that a lookup meets first among those that overlap.
    pub(crate) fn find(&self, range: (u64, u64)) -> Option<(u64, u64)> {
        let mut link = &self.root;
        while let Some(node) = link {
            link = match compare(range, node.range) {
                Ordering::Less => &node.left,
                Ordering::Greater => &node.right,
                Ordering::Equal => return Some(node.range),
            };
        }
        None
    }

    /// Adds a range that overlaps none.
    pub(crate) fn insert(&mut self, range: (u64, u64)) {
        self.root = Some(insert(self.root.take(), range));
    }

    /// Removes a range that was added.
    pub(crate) fn remove(&mut self, range: (u64, u64)) {
        self.root = remove(self.root.take(), range);
    }
}

fn compare(a: (u64, u64), b: (u64, u64)) -> Ordering {
    if a.1 < b.0 {
        Ordering::Less
    } else if b.1 < a.0 {
        Ordering::Greater
    } else {
        Ordering::Equal
    }
}

/// The depth of recursion is the tree's height, at most 1.45 times the logarithm of its size.
fn insert(link: Link, range: (u64, u64)) -> Box<Node> {
    let Some(mut node) = link else {
        return Box::new(Node { range, height: 1, left: None, right: None });
    };
    match compare(range, node.range) {
        Ordering::Less => node.left = Some(insert(node.left.take(), range)),
        Ordering::Greater => node.right = Some(insert(node.right.take(), range)),
        Ordering::Equal => {}
    }
    balance(node)
}

fn remove(link: Link, range: (u64, u64)) -> Link {
    let mut node = link?;
    match compare(range, node.range) {
        Ordering::Less => node.left = remove(node.left.take(), range),
        Ordering::Greater => node.right = remove(node.right.take(), range),
        Ordering::Equal => match (node.left.take(), node.right.take()) {
            (None, only) | (only, None) => return only,
            (left, Some(right)) => {
                let (successor, rest) = take_first(right);
                node = successor;
                (node.left, node.right) = (left, rest);
            }
        },
    }
    Some(balance(node))
}

/// Takes the lowest node out of a tree.
fn take_first(mut node: Box<Node>) -> (Box<Node>, Link) {
    match node.left.take() {
        None => {
            let rest = node.right.take();
            (node, rest)
        }
        Some(left) => {
            let (first, rest) = take_first(left);
            node.left = rest;
            (first, Some(balance(node)))
        }
    }
}

fn height(link: &Link) -> u8 {
    link.as_ref().map_or(0, |node| node.height)
}

fn balance(mut node: Box<Node>) -> Box<Node> {
    node.update();
    if height(&node.left) > height(&node.right) + 1 {
        node.left = node.left.take().map(|left| {
            let leans_inwards = height(&left.right) > height(&left.left);
            if leans_inwards { rotate_left(left) } else { left }
        });
        return rotate_right(node);
    }
    if height(&node.right) > height(&node.left) + 1 {
        node.right = node.right.take().map(|right| {
            let leans_inwards = height(&right.left) > height(&right.right);
            if leans_inwards { rotate_right(right) } else { right }
        });
        return rotate_left(node);
    }
    node
}

fn rotate_left(mut node: Box<Node>) -> Box<Node> {
    let Some(mut top) = node.right.take() else {
        return node;
    };
    node.right = top.left.take();
    node.update();
    top.left = Some(node);
    top.update();
    top
}

fn rotate_right(mut node: Box<Node>) -> Box<Node> {
    let Some(mut top) = node.left.take() else {
        return node;
    };
    node.left = top.right.take();
    node.update();
    top.right = Some(node);
    top.update();
    top
}

impl Node {
    fn update(&mut self) {
        self.height = 1 + height(&self.left).max(height(&self.right));
    }
}

#[cfg(test)]
mod tests;
