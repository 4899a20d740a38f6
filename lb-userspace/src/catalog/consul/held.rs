//! Instances that were registered before their checks, and so look healthy for a moment (nomad's
//! issue 3935): they are held back.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::table::{Instance, Standing};

/// How long an instance without checks of its own, whose siblings have some, is held back.
pub const HOLD: Duration = Duration::from_secs(3);

/// An instance: its node, and its name there.
pub type Key = (String, String);

/// The instances of one service that look too good, and since when.
#[derive(Clone, Debug, Default)]
pub struct Held {
    since: BTreeMap<Key, Instant>,
}

impl Held {
    /// Takes those of the `unchecked` out that haven't been seen so for [`HOLD`], and returns when to
    /// judge anew. Those that served in `known` went through this, or had their checks taken away: they
    /// go on.
    pub fn judge(
        &mut self,
        instances: &mut [Instance],
        unchecked: &[Key],
        known: &[Instance],
        now: Instant,
    ) -> Option<Instant> {
        self.since.retain(|key, _| unchecked.contains(key));
        let mut again_at = None;
        for (node, id) in unchecked {
            let is_it = |instance: &&Instance| instance.node == *node && instance.id == *id;
            if known.iter().find(is_it).is_some_and(|known| known.standing.serves()) {
                continue;
            }
            let until = *self.since.entry((node.clone(), id.clone())).or_insert(now) + HOLD;
            if until <= now {
                continue;
            }
            for instance in instances.iter_mut().filter(|instance| is_it(&&**instance)) {
                if instance.standing.serves() {
                    instance.standing = Standing::Out(format!(
                        "has no check yet, as others of the service have: held back for {HOLD:?}"
                    ));
                    again_at = Some(again_at.map_or(until, |at: Instant| at.min(until)));
                }
            }
        }
        again_at
    }
}

/// Those without a check of their own, where others have one. `has_check` tells of each.
pub fn unchecked(has_check: impl Iterator<Item = (Key, bool)> + Clone) -> Vec<Key> {
    if !has_check.clone().any(|(_, has_check)| has_check) {
        return Vec::new();
    }
    has_check.filter(|(_, has_check)| !has_check).map(|(key, _)| key).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Says;

    fn instance(id: &str) -> Instance {
        Instance {
            node: "n1".into(),
            id: id.into(),
            address: "10.0.0.1".into(),
            port: 80,
            weight: 1,
            local: false,
            standing: Standing::Serving,
            says: Says::default(),
        }
    }

    fn key(id: &str) -> Key {
        ("n1".into(), id.into())
    }

    #[test]
    fn only_beside_siblings_with_checks_is_one_without_suspect() {
        // (whether a, b and c have checks, who is suspect)
        let table: [([bool; 3], &[&str]); 4] = [
            ([true, true, true], &[]),
            ([true, false, true], &["b"]),
            ([true, false, false], &["b", "c"]),
            ([false, false, false], &[]),
        ];
        for (has_check, expected) in table {
            let given = ["a", "b", "c"].map(key).into_iter().zip(has_check);
            let expected: Vec<Key> = expected.iter().map(|id| key(id)).collect();
            assert_eq!(unchecked(given), expected, "{has_check:?}");
        }
        assert_eq!(unchecked([(key("a"), false)].into_iter()), [], "it has no siblings");
    }

    #[test]
    fn a_newcomer_waits_for_its_check_and_counts_without_it_in_the_end() {
        let start = Instant::now();
        let known = [instance("old")];
        let mut held = Held::default();
        let suspects = [key("new"), key("old")];
        // (after, who serves, whether it is to be judged anew)
        let ms = Duration::from_millis;
        for (after, expected, again) in [
            (0, "old", true),
            (2999, "old", true),
            (3000, "new old", false),
            (9000, "new old", false),
        ] {
            let mut instances = [instance("new"), instance("old")];
            let again_at = held.judge(&mut instances, &suspects, &known, start + ms(after));
            let serving = instances.iter().filter(|i| i.standing == Standing::Serving);
            let serving: Vec<&str> = serving.map(|i| &*i.id).collect();
            assert_eq!(serving.join(" "), expected, "after {after} ms");
            assert_eq!(again_at, again.then_some(start + HOLD), "after {after} ms");
        }
        // It gets its check, and loses it: the time begins anew, unless it serves already.
        held.judge(&mut [], &[], &known, start);
        let again_at = held.judge(&mut [instance("new")], &[key("new")], &known, start + HOLD * 5);
        assert_eq!(again_at, Some(start + HOLD * 6));
    }
}
