//! A persistent radix tree over bytes: a clone shares every node, a change copies only the nodes on its way.
//!
//! Nodes that no other clone holds are changed in place, so a bulk build copies nothing.

use std::sync::Arc;

use smallvec::SmallVec;

#[derive(Clone)]
pub(super) struct Radix<T> {
    root: Node<T>,
}

#[derive(Clone)]
struct Node<T> {
    /// What this node adds to its parent's key. Only the root's is empty.
    label: SmallVec<[u8; 16]>,
    /// The first byte of each child's label, in the order of `children`.
    firsts: SmallVec<[u8; 16]>,
    children: Vec<Arc<Node<T>>>,
    value: Option<T>,
}

impl<T> Default for Radix<T> {
    fn default() -> Self {
        Radix { root: Node::new(&[]) }
    }
}

impl<T> Radix<T> {
    pub fn is_empty(&self) -> bool {
        self.root.value.is_none() && self.root.children.is_empty()
    }

    /// Calls `visit` with length and value of every key that `path` starts with, shortest key first.
    pub fn visit_prefixes<'a>(&'a self, path: &[u8], mut visit: impl FnMut(usize, &'a T)) {
        let (length, mut path) = (path.len(), path);
        let mut node = &self.root;
        loop {
            if let Some(value) = &node.value {
                visit(length - path.len(), value);
            }
            let Some(child) = path.first().and_then(|first| node.child(*first)) else { return };
            node = &node.children[child];
            match path.strip_prefix(&node.label[..]) {
                Some(rest) => path = rest,
                None => return,
            }
        }
    }
}

impl<T: Clone> Radix<T> {
    /// The value of `key`, as a place to put one.
    pub fn slot(&mut self, mut key: &[u8]) -> &mut Option<T> {
        let mut node = &mut self.root;
        while let Some(&first) = key.first() {
            let at = node.child(first).unwrap_or_else(|| node.adopt(Node::new(key)));
            let child = Arc::make_mut(&mut node.children[at]);
            let common = common_prefix(&child.label, key);
            if common < child.label.len() {
                child.split(common);
            }
            key = &key[common..];
            node = child;
        }
        &mut node.value
    }

    /// Lets `change` work on the value of `key`, when there is one; nodes that this leaves without purpose go.
    pub fn change(&mut self, key: &[u8], change: impl FnOnce(&mut Option<T>)) {
        self.root.change(key, change);
    }
}

impl<T> Node<T> {
    fn new(label: &[u8]) -> Self {
        Node { label: SmallVec::from_slice(label), firsts: SmallVec::new(), children: Vec::new(), value: None }
    }

    fn child(&self, first: u8) -> Option<usize> {
        // Few children are the rule; a call to memchr costs more than looking at them.
        match self.firsts.len() {
            0..=8 => self.firsts.iter().position(|f| *f == first),
            _ => memchr::memchr(first, &self.firsts),
        }
    }

    fn adopt(&mut self, child: Node<T>) -> usize {
        self.firsts.push(child.label[0]);
        self.children.push(Arc::new(child));
        self.children.len() - 1
    }

    /// Keeps the first `at` bytes of the label and moves all else into a child.
    fn split(&mut self, at: usize) {
        let mut lower = Node::new(&self.label[at..]);
        lower.firsts = std::mem::take(&mut self.firsts);
        lower.children = std::mem::take(&mut self.children);
        lower.value = self.value.take();
        self.label.truncate(at);
        self.adopt(lower);
    }
}

impl<T: Clone> Node<T> {
    fn change(&mut self, key: &[u8], change: impl FnOnce(&mut Option<T>)) {
        let Some(&first) = key.first() else { return change(&mut self.value) };
        let Some(at) = self.child(first) else { return };
        let Some(rest) = key.strip_prefix(&self.children[at].label[..]) else { return };
        let child = Arc::make_mut(&mut self.children[at]);
        child.change(rest, change);
        match (&child.value, child.children.len()) {
            (None, 0) => {
                self.firsts.remove(at);
                self.children.remove(at);
            }
            (None, 1) => child.merge(),
            _ => {}
        }
    }

    /// Takes the place of the only child.
    fn merge(&mut self) {
        let Some(only) = self.children.pop() else { return };
        let only = Arc::unwrap_or_clone(only);
        self.label.extend_from_slice(&only.label);
        self.firsts = only.firsts;
        self.children = only.children;
        self.value = only.value;
    }
}

fn common_prefix(a: &[u8], b: &[u8]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefixes(tree: &Radix<u32>, path: &str) -> Vec<u32> {
        let mut found = Vec::new();
        tree.visit_prefixes(path.as_bytes(), |_, v| found.push(*v));
        found
    }

    fn sample() -> Radix<u32> {
        let mut tree = Radix::default();
        for (i, key) in ["", "/a", "/abc", "/abd", "/x/y"].into_iter().enumerate() {
            *tree.slot(key.as_bytes()) = Some(i as u32);
        }
        tree
    }

    #[test]
    fn visits_prefixes_from_short_to_long() {
        let tree = sample();
        assert_eq!(prefixes(&tree, "/abcd"), [0, 1, 2]);
        assert_eq!(prefixes(&tree, "/ab"), [0, 1]);
        assert_eq!(prefixes(&tree, "/x"), [0]);
        assert_eq!(prefixes(&tree, ""), [0]);
        assert!(prefixes(&Radix::default(), "/x").is_empty());
    }

    #[test]
    fn a_clone_keeps_what_it_had() {
        let old = sample();
        let mut new = old.clone();
        new.change(b"/abc", |v| *v = None);
        *new.slot(b"/abcd") = Some(9);
        assert_eq!(prefixes(&old, "/abcd"), [0, 1, 2]);
        assert_eq!(prefixes(&new, "/abcd"), [0, 1, 9]);
    }

    #[test]
    fn removing_everything_leaves_nothing() {
        let mut tree = sample();
        tree.change(b"/absent", |_| unreachable!("there is no such key"));
        for key in ["/abd", "", "/x/y", "/a", "/abc"] {
            tree.change(key.as_bytes(), |v| *v = None);
        }
        assert!(tree.is_empty());
    }
}
