//! A persistent ordered map: the store of catalogs and tables.
//!
//! Clones share everything, a change copies one leaf and the list of leaves, and the difference of two
//! snapshots skips the leaves that they share: a change of one entry in 10,000 copies 64 entries and
//! some 160 pointers, and finding it compares as many. Two levels suffice for the sizes here.

use std::borrow::Borrow;
use std::fmt;
use std::ops::Index;
use std::sync::Arc;

/// The most entries of a leaf.
const LEAF: usize = 64;

/// A map ordered by key. Cloning it costs one reference count.
pub struct OrdMap<K, V> {
    /// In order, none empty.
    leaves: Arc<Vec<Leaf<K, V>>>,
    len: usize,
}

/// A run of entries.
struct Leaf<K, V> {
    /// Not above the first key, and above the last one of the leaf before; unused in the first leaf.
    first: K,
    entries: Arc<Vec<(K, V)>>,
}

/// The differences of a newer map from an older one.
#[derive(Debug, PartialEq, Eq)]
pub struct Diff<'a, K, V> {
    /// The entries of the newer map that are new or have another value.
    pub changed: Vec<(&'a K, &'a V)>,
    /// The entries of the older map whose keys are gone.
    pub gone: Vec<(&'a K, &'a V)>,
}

impl<K, V> OrdMap<K, V> {
    /// An empty map.
    pub fn new() -> OrdMap<K, V> {
        OrdMap { leaves: Arc::new(Vec::new()), len: 0 }
    }

    /// The number of entries.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The entries, by key.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> + Clone {
        self.leaves.iter().flat_map(|leaf| leaf.entries.iter()).map(|(key, value)| (key, value))
    }

    /// The keys, in order.
    pub fn keys(&self) -> impl Iterator<Item = &K> + Clone {
        self.iter().map(|(key, _)| key)
    }

    /// The values, by key.
    pub fn values(&self) -> impl Iterator<Item = &V> + Clone {
        self.iter().map(|(_, value)| value)
    }
}

#[cfg(test)]
impl<K, V> OrdMap<K, V> {
    /// The number of leaves that it doesn't share with another map.
    pub fn n_leaves_not_in(&self, other: &OrdMap<K, V>) -> usize {
        let is_shared = |leaf: &&Leaf<K, V>| {
            other.leaves.iter().any(|other| Arc::ptr_eq(&leaf.entries, &other.entries))
        };
        self.leaves.len() - self.leaves.iter().filter(is_shared).count()
    }
}

impl<K: Ord, V> OrdMap<K, V> {
    /// The leaf that has the key, or would have it.
    fn locate<Q: Ord + ?Sized>(&self, key: &Q) -> usize
    where
        K: Borrow<Q>,
    {
        // The first leaf's key isn't updated: keys below all others go there, too.
        let others = self.leaves.get(1..).unwrap_or_default();
        others.partition_point(|leaf| leaf.first.borrow() <= key)
    }

    /// The entry of a key.
    pub fn get_key_value<Q: Ord + ?Sized>(&self, key: &Q) -> Option<(&K, &V)>
    where
        K: Borrow<Q>,
    {
        let entries = &self.leaves.get(self.locate(key))?.entries;
        let idx = entries.binary_search_by(|(known, _)| known.borrow().cmp(key)).ok()?;
        entries.get(idx).map(|(key, value)| (key, value))
    }

    /// The value of a key.
    pub fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.get_key_value(key).map(|(_, value)| value)
    }

    /// Whether there is an entry of this key.
    pub fn contains_key<Q: Ord + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.get_key_value(key).is_some()
    }

    /// Compares this map with a newer one: as many steps as there are leaves, and those of the leaves
    /// that both don't share.
    pub fn diff<'a>(&'a self, newer: &'a OrdMap<K, V>) -> Diff<'a, K, V>
    where
        V: PartialEq,
    {
        let mut diff = Diff { changed: Vec::new(), gone: Vec::new() };
        let (mut old, mut new) = (Cursor::new(self), Cursor::new(newer));
        loop {
            // Both are at the start of a leaf that is shared at the same time or never: what comes
            // before it is below its keys in either map.
            while old.shares_leaf_with(&new) {
                old.skip_leaf();
                new.skip_leaf();
            }
            match (old.peek(), new.peek()) {
                (Some(former), Some(entry)) if former.0 == entry.0 => {
                    if former.1 != entry.1 {
                        diff.changed.push((&entry.0, &entry.1));
                    }
                    old.advance();
                    new.advance();
                }
                (Some(former), entry) if entry.is_none_or(|entry| former.0 < entry.0) => {
                    diff.gone.push((&former.0, &former.1));
                    old.advance();
                }
                (_, Some(entry)) => {
                    diff.changed.push((&entry.0, &entry.1));
                    new.advance();
                }
                (_, None) => return diff,
            }
        }
    }
}

impl<K: Ord + Clone, V: Clone> OrdMap<K, V> {
    /// The same entries, sharing with an earlier map the leaves in which nothing differs.
    pub fn sharing(&self, last: &OrdMap<K, V>) -> OrdMap<K, V>
    where
        V: PartialEq,
    {
        let (mut map, Diff { changed, gone }) = (last.clone(), last.diff(self));
        gone.into_iter().for_each(|(key, _)| drop(map.remove(key)));
        changed.into_iter().for_each(|(key, value)| drop(map.insert(key.clone(), value.clone())));
        map
    }

    /// Sets the value of a key. Returns the former one.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        let leaf_idx = self.locate(&key);
        let leaves = Arc::make_mut(&mut self.leaves);
        let Some(leaf) = leaves.get_mut(leaf_idx) else {
            leaves.push(Leaf { first: key.clone(), entries: Arc::new(vec![(key, value)]) });
            self.len += 1;
            return None;
        };
        let entries = Arc::make_mut(&mut leaf.entries);
        let idx = match entries.binary_search_by(|(known, _)| known.cmp(&key)) {
            Ok(idx) => return Some(std::mem::replace(&mut entries[idx].1, value)),
            Err(idx) => idx,
        };
        self.len += 1;
        entries.insert(idx, (key, value));
        if entries.len() > LEAF {
            // Insertions in order leave full leaves.
            let rest = entries.split_off(if idx == LEAF { LEAF } else { LEAF / 2 });
            leaves.insert(leaf_idx + 1, Leaf { first: rest[0].0.clone(), entries: Arc::new(rest) });
        }
        None
    }

    /// Removes the entry of a key. Returns its value.
    pub fn remove<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let leaf_idx = self.locate(key);
        let entries = &self.leaves.get(leaf_idx)?.entries;
        let idx = entries.binary_search_by(|(known, _)| known.borrow().cmp(key)).ok()?;
        self.len -= 1;
        let leaves = Arc::make_mut(&mut self.leaves);
        let entries = Arc::make_mut(&mut leaves[leaf_idx].entries);
        let (_, value) = entries.remove(idx);
        let n_next = leaves.get(leaf_idx + 1).map_or(0, |next| next.entries.len());
        if leaves[leaf_idx].entries.is_empty() {
            leaves.remove(leaf_idx);
        } else if n_next > 0 && leaves[leaf_idx].entries.len() + n_next <= LEAF / 2 {
            let next = leaves.remove(leaf_idx + 1);
            Arc::make_mut(&mut leaves[leaf_idx].entries).extend_from_slice(&next.entries);
        }
        Some(value)
    }
}

#[cfg(test)]
impl<K, V> OrdMap<K, V> {
    /// The leaves that another map doesn't share.
    pub fn n_unshared_leaves(&self, other: &OrdMap<K, V>) -> usize {
        let is_shared = |leaf: &&Leaf<K, V>| {
            other.leaves.iter().any(|theirs| Arc::ptr_eq(&leaf.entries, &theirs.entries))
        };
        self.leaves.iter().filter(|leaf| !is_shared(leaf)).count()
    }
}

/// A place in a map, on the way through it.
struct Cursor<'a, K, V> {
    leaves: &'a [Leaf<K, V>],
    /// The place in the first of the leaves.
    idx: usize,
}

impl<'a, K, V> Cursor<'a, K, V> {
    fn new(map: &'a OrdMap<K, V>) -> Cursor<'a, K, V> {
        Cursor { leaves: &map.leaves, idx: 0 }
    }

    fn shares_leaf_with(&self, other: &Cursor<'_, K, V>) -> bool {
        let at_starts = self.idx == 0 && other.idx == 0;
        let leaves = self.leaves.first().zip(other.leaves.first()).filter(|_| at_starts);
        leaves.is_some_and(|(one, other)| Arc::ptr_eq(&one.entries, &other.entries))
    }

    fn peek(&self) -> Option<&'a (K, V)> {
        self.leaves.first()?.entries.get(self.idx)
    }

    fn advance(&mut self) {
        self.idx += 1;
        if self.peek().is_none() {
            self.skip_leaf();
        }
    }

    fn skip_leaf(&mut self) {
        self.leaves = self.leaves.get(1..).unwrap_or_default();
        self.idx = 0;
    }
}

impl<K, V> Clone for OrdMap<K, V> {
    fn clone(&self) -> Self {
        OrdMap { leaves: self.leaves.clone(), len: self.len }
    }
}

impl<K: Clone, V> Clone for Leaf<K, V> {
    fn clone(&self) -> Self {
        Leaf { first: self.first.clone(), entries: self.entries.clone() }
    }
}

impl<K, V> Default for OrdMap<K, V> {
    fn default() -> Self {
        OrdMap::new()
    }
}

impl<K: Ord, V: PartialEq> PartialEq for OrdMap<K, V> {
    fn eq(&self, other: &Self) -> bool {
        let Diff { changed, gone } = self.diff(other);
        changed.is_empty() && gone.is_empty()
    }
}

impl<K: Ord, V: Eq> Eq for OrdMap<K, V> {}

impl<K: fmt::Debug, V: fmt::Debug> fmt::Debug for OrdMap<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl<K: Ord + Borrow<Q>, V, Q: Ord + ?Sized> Index<&Q> for OrdMap<K, V> {
    type Output = V;

    /// # Panics
    /// When there is no entry of this key.
    fn index(&self, key: &Q) -> &V {
        self.get(key).expect("no entry of this key")
    }
}

impl<K: Ord + Clone, V: Clone> Extend<(K, V)> for OrdMap<K, V> {
    fn extend<I: IntoIterator<Item = (K, V)>>(&mut self, entries: I) {
        entries.into_iter().for_each(|(key, value)| drop(self.insert(key, value)));
    }
}

impl<K: Ord + Clone, V: Clone, const N: usize> From<[(K, V); N]> for OrdMap<K, V> {
    fn from(entries: [(K, V); N]) -> Self {
        entries.into_iter().collect()
    }
}

impl<K: Ord + Clone, V: Clone> FromIterator<(K, V)> for OrdMap<K, V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        let mut map = OrdMap::new();
        map.extend(entries);
        map
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    type Entries = Vec<(u16, Option<u8>)>;

    /// Insertions, and removals where there is no value; of few keys or of many.
    fn changes() -> impl Strategy<Value = Entries> {
        prop_oneof![50_u16..90, 2_000_u16..2_001].prop_flat_map(|n_keys| {
            prop::collection::vec((0..n_keys, prop::option::weighted(0.7, 0_u8..3)), 0..600)
        })
    }

    fn apply(changes: Entries, map: &mut OrdMap<u16, u8>, model: &mut BTreeMap<u16, u8>) {
        for (key, value) in changes {
            match value {
                Some(value) => assert_eq!(map.insert(key, value), model.insert(key, value)),
                None => assert_eq!(map.remove(&key), model.remove(&key)),
            }
        }
    }

    proptest! {
        #[test]
        fn it_has_what_a_btree_map_has_and_finds_each_difference(
            older in changes(), newer in changes(), order in 0..3,
        ) {
            let (mut map, mut model) = (OrdMap::new(), BTreeMap::new());
            let mut first: Entries = (0..1_000).map(|key| (key, Some(1))).collect();
            match order {
                0 => first.clear(),
                1 => {}
                // Each below the first key.
                _ => first.reverse(),
            }
            apply(first, &mut map, &mut model);
            apply(older, &mut map, &mut model);
            let (old_map, old_model) = (map.clone(), model.clone());
            apply(newer, &mut map, &mut model);

            for (map, model) in [(&old_map, &old_model), (&map, &model)] {
                prop_assert!(map.iter().eq(model.iter()) && map.len() == model.len());
                for key in 0..2_000 {
                    prop_assert_eq!(map.get(&key), model.get(&key));
                }
                let leaves = &map.leaves;
                let holds = |leaf: &Leaf<u16, u8>| !leaf.entries.is_empty() && leaf.entries.len() <= LEAF;
                prop_assert!(leaves.iter().all(holds));
            }
            let changed = model.iter().filter(|(key, value)| old_model.get(key) != Some(value));
            let gone = old_model.iter().filter(|(key, _)| !model.contains_key(key));
            let expected = Diff { changed: changed.collect(), gone: gone.collect() };
            prop_assert_eq!(old_map.diff(&map), expected);
            // The same entries, nothing shared.
            let again: OrdMap<u16, u8> = model.iter().map(|(key, value)| (*key, *value)).collect();
            prop_assert!(again == map && (old_map == map) == (old_model == model));
            prop_assert!(again.sharing(&old_map) == map);
        }
    }

    /// A value that counts how often values are compared.
    #[derive(Clone, Debug)]
    struct Counted(u32, std::rc::Rc<std::cell::Cell<usize>>);

    impl PartialEq for Counted {
        fn eq(&self, other: &Self) -> bool {
            self.1.set(self.1.get() + 1);
            self.0 == other.0
        }
    }

    #[test]
    fn a_difference_costs_what_differs() {
        let n_compared = std::rc::Rc::default();
        let value = |n| Counted(n, std::rc::Rc::clone(&n_compared));
        let mut map: OrdMap<u32, Counted> = (0..10_000).map(|key| (key, value(0))).collect();
        let before = map.clone();
        map.insert(5_000, value(1));
        map.remove(&9_999);
        map.insert(20_000, value(0));
        let Diff { changed, gone } = before.diff(&map);
        assert_eq!((changed.len(), gone.len()), (2, 1));
        assert!(n_compared.get() <= 2 * LEAF, "{n_compared:?}");
    }
}
