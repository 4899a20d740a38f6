//! What differs between two sorted maps, found in one walk over both.
//!
//! A look-up for each of 10,000 names takes several times as long as the change of one of them, so
//! whatever follows catalogs and tables walks instead.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What a newer map has that an older one has not, and the other way round.
#[derive(Debug, PartialEq, Eq)]
pub struct Diff<'older, 'newer, V> {
    /// The entries that are new, or not the same as before.
    pub changed: Vec<(&'newer Arc<str>, &'newer V)>,
    /// The keys that are there no more.
    pub gone: Vec<&'older Arc<str>>,
}

/// Compares two maps; `is_same` says of two values under one key whether nothing changed.
pub fn diff<'older, 'newer, U, V>(
    older: &'older BTreeMap<Arc<str>, U>,
    newer: &'newer BTreeMap<Arc<str>, V>,
    is_same: impl Fn(&U, &V) -> bool,
) -> Diff<'older, 'newer, V> {
    let mut diff = Diff { changed: Vec::new(), gone: Vec::new() };
    let mut older = older.iter().peekable();
    for (key, value) in newer {
        loop {
            let order = older.peek().map_or(Ordering::Greater, |(known, _)| order(known, key));
            let known = if order.is_le() { older.next() } else { None };
            match (order, known) {
                (Ordering::Less, Some((known, _))) => {
                    diff.gone.push(known);
                    continue;
                }
                (Ordering::Equal, Some((_, former))) if is_same(former, value) => {}
                _ => diff.changed.push((key, value)),
            }
            break;
        }
    }
    diff.gone.extend(older.map(|(key, _)| key));
    diff
}

/// How two names are ordered. Most are the same object in both maps, which spares the look at them.
fn order(one: &Arc<str>, other: &Arc<str>) -> Ordering {
    if Arc::ptr_eq(one, other) { Ordering::Equal } else { one.cmp(other) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_walk_finds_what_look_ups_find(
            older in prop::collection::btree_map(0_u8..20, 0_u8..3, 0..12),
            newer in prop::collection::btree_map(0_u8..20, 0_u8..3, 0..12),
        ) {
            let names: Vec<Arc<str>> = (0..20).map(|n| format!("name-{n}").into()).collect();
            let name = |(n, value)| -> (Arc<str>, u8) {
                // Some are the same object in both.
                let name = &names[usize::from(n)];
                (if n % 2 == 0 { name.clone() } else { (&**name).into() }, value)
            };
            let older: BTreeMap<_, _> = older.into_iter().map(name).collect();
            let newer: BTreeMap<_, _> = newer.into_iter().map(name).collect();
            let changed = newer.iter().filter(|(key, value)| older.get(*key) != Some(value));
            let gone = older.keys().filter(|key| !newer.contains_key(*key));
            let expected = Diff { changed: changed.collect(), gone: gone.collect() };
            prop_assert_eq!(diff(&older, &newer, |a, b| a == b), expected);
        }
    }
}
