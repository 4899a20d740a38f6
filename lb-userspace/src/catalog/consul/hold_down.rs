//! The hold-down of instances that are registered before their checks, and so look healthy for a moment
//! (nomad's issue 3935).

use std::collections::{BTreeMap, HashSet};
use std::hash::{Hash, Hasher};
use std::time::{Duration, Instant};

use crate::table::{HealthStatus, Instance, may_be_reached};

/// How long an instance without a check of its own, while others of the service have one, is held down.
pub const HOLD_DOWN: Duration = Duration::from_secs(3);

/// An instance: its node, and its name there.
pub type InstanceKey = (String, String);

/// The instances of one service without a check, and since when.
#[derive(Clone, Debug, Default)]
pub struct HoldDown {
    since: BTreeMap<InstanceKey, Instant>,
}

impl HoldDown {
    /// Sets those of the `unchecked` instances out that have been so for less than [`HOLD_DOWN`], while
    /// another instance serves: to refuse connections is worse than an instance that may not be up yet.
    /// Returns when the first hold-down ends. Instances that served in `known` are exempt.
    pub fn judge(
        &mut self,
        instances: &mut [Instance],
        unchecked: &[InstanceKey],
        known: &[Instance],
        now: Instant,
    ) -> Option<Instant> {
        // An answer has up to 65,536 instances, so each is looked up, never searched for.
        let unchecked: HashSet<KeyRef> = unchecked.iter().map(KeyRef::of_key).collect();
        self.since.retain(|key, _| unchecked.contains(&KeyRef::of_key(key)));
        if unchecked.is_empty() {
            return None;
        }
        let served = known.iter().filter(|instance| instance.health.serves());
        let served: HashSet<KeyRef> = served.map(KeyRef::of).collect();
        let (mut newcomers, mut others_serve) = (Vec::new(), false);
        for (idx, instance) in instances.iter().enumerate() {
            if !instance.health.serves() {
                continue;
            }
            let name = KeyRef::of(instance);
            if unchecked.contains(&name) && !served.contains(&name) {
                let key = (instance.node.clone(), instance.id.clone());
                let until = *self.since.entry(key).or_insert(now) + HOLD_DOWN;
                if until > now {
                    newcomers.push((idx, until));
                    continue;
                }
            }
            others_serve |= may_be_reached(instance);
        }
        if !others_serve {
            return None;
        }
        for &(idx, _) in &newcomers {
            instances[idx].health = HealthStatus::Out(format!(
                "has no check yet, as others of the service have: held back for {HOLD_DOWN:?}"
            ));
        }
        newcomers.into_iter().map(|(_, until)| until).min()
    }
}

/// An instance's key, to look it up by.
#[derive(Clone, Copy, Debug, Eq)]
struct KeyRef<'a> {
    node: &'a str,
    id: &'a str,
}

impl<'a> KeyRef<'a> {
    fn of(instance: &'a Instance) -> KeyRef<'a> {
        KeyRef { node: &instance.node, id: &instance.id }
    }

    fn of_key((node, id): &'a InstanceKey) -> KeyRef<'a> {
        KeyRef { node, id }
    }
}

impl Hash for KeyRef<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.node, self.id).hash(state);
    }
}

impl PartialEq for KeyRef<'_> {
    fn eq(&self, other: &Self) -> bool {
        #[cfg(test)]
        tests::N_COMPARED.with(|n| n.set(n.get() + 1));
        (self.id, self.node) == (other.id, other.node)
    }
}

/// The instances without a check of their own, where others have one. `has_check` has all.
pub fn unchecked(has_check: impl Iterator<Item = (InstanceKey, bool)> + Clone) -> Vec<InstanceKey> {
    if !has_check.clone().any(|(_, has_check)| has_check) {
        return Vec::new();
    }
    has_check.filter(|(_, has_check)| !has_check).map(|(key, _)| key).collect()
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    thread_local! {
        /// How many names were compared.
        pub static N_COMPARED: Cell<usize> = const { Cell::new(0) };
    }

    fn instance(id: &str) -> Instance {
        Instance { id: id.into(), ..Instance::fixture() }
    }

    fn key(id: &str) -> InstanceKey {
        ("n1".into(), id.into())
    }

    #[test]
    fn an_instance_without_a_check_is_unchecked_only_if_others_have_one() {
        // (whether a, b and c have checks, which are unchecked)
        let table: [([bool; 3], &[&str]); 4] = [
            ([true, true, true], &[]),
            ([true, false, true], &["b"]),
            ([true, false, false], &["b", "c"]),
            ([false, false, false], &[]),
        ];
        for (has_check, expected) in table {
            let given = ["a", "b", "c"].map(key).into_iter().zip(has_check);
            let expected: Vec<InstanceKey> = expected.iter().map(|id| key(id)).collect();
            assert_eq!(unchecked(given), expected, "{has_check:?}");
        }
        assert_eq!(unchecked([(key("a"), false)].into_iter()), [], "it is the only one");
    }

    #[test]
    fn a_new_instance_serves_without_a_check_after_the_hold_down() {
        let start = Instant::now();
        let known = [instance("old")];
        let mut held = HoldDown::default();
        let unchecked = [key("new"), key("old")];
        // (after, which serve, whether one is held down)
        let ms = Duration::from_millis;
        for (after, expected, again) in [
            (0, "old", true),
            (2999, "old", true),
            (3000, "new old", false),
            (9000, "new old", false),
        ] {
            let mut instances = [instance("new"), instance("old")];
            let again_at = held.judge(&mut instances, &unchecked, &known, start + ms(after));
            let serving = instances.iter().filter(|i| i.health == HealthStatus::Serving);
            let serving: Vec<&str> = serving.map(|i| &*i.id).collect();
            assert_eq!(serving.join(" "), expected, "after {after} ms");
            assert_eq!(again_at, again.then_some(start + HOLD_DOWN), "after {after} ms");
        }
        // It gets its check, and loses it: the time starts again, unless it serves already.
        held.judge(&mut [], &[], &known, start);
        let mut instances = [instance("new"), instance("old")];
        let again_at = held.judge(&mut instances, &[key("new")], &known, start + HOLD_DOWN * 5);
        assert_eq!(again_at, Some(start + HOLD_DOWN * 6));
    }

    #[test]
    fn a_new_instance_is_held_down_down_only_while_another_serves() {
        let out = HealthStatus::Out("check `web` is critical".into());
        let warning = HealthStatus::Warning("check `web` is warning".into());
        let other = |change: fn(&mut Instance)| {
            let mut other = instance("old");
            change(&mut other);
            other
        };
        let cases: [(Instance, bool); 8] = [
            (instance("old"), true),
            (Instance { health: warning, ..instance("old") }, true),
            (other(|other| other.address = "db.example.com".into()), true),
            (Instance { health: out, ..instance("old") }, false),
            // One that Consul has as healthy, and that can't be reached from here.
            (other(|other| other.port = 0), false),
            (other(|other| other.address = "127.0.0.1".into()), false),
            (other(|other| other.address = "0.0.0.0".into()), false),
            (other(|other| other.address.clear()), false),
        ];
        for (other, is_held_down) in cases {
            let mut instances = [other.clone(), instance("new"), instance("newer")];
            let mut held = HoldDown::default();
            let unchecked = [key("new"), key("newer")];
            let again_at = held.judge(&mut instances, &unchecked, &[], Instant::now());
            assert_eq!(again_at.is_some(), is_held_down, "{other:?}");
            for newcomer in &instances[1..] {
                assert_eq!(!newcomer.health.serves(), is_held_down, "{other:?}");
            }
        }
    }

    #[test]
    fn the_work_is_linear_in_the_instances() {
        let n = 60_000;
        let ids: Vec<String> =
            (0..n).map(|nth| format!("_nomad-task-{nth:08}-group-web-web-http")).collect();
        let mut instances: Vec<Instance> = ids.iter().map(|id| instance(id)).collect();
        let known = instances[..n / 2].to_vec();
        let unchecked: Vec<InstanceKey> = ids[1..].iter().map(|id| key(id)).collect();
        let mut held = HoldDown::default();
        for _ in 0..2 {
            N_COMPARED.with(|compared| compared.set(0));
            held.judge(&mut instances, &unchecked, &known, Instant::now());
            let n_compared = N_COMPARED.with(Cell::get);
            assert!(n_compared < 10 * n, "{n_compared} comparisons of {n} instances");
        }
        assert_eq!(instances.iter().filter(|i| !i.health.serves()).count(), n / 2);
    }
}
