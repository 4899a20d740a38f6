//! The names that are known, and why. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use super::query::List;

/// The most names that linger.
const MAX_LINGERING: usize = 1024;

/// Why a name is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// The list of names has it.
    Listed,
    /// A lookup found it; the list doesn't have it yet.
    Found,
    /// It vanished from the list, and stays known without instances until this moment.
    Lingering {
        /// When it ends.
        until: Instant,
    },
}

/// One record for each known name.
#[derive(Debug, Default)]
pub struct Names {
    known: BTreeMap<Arc<str>, Presence>,
    /// The names with upper case in them, by how DNS knows them: DNS regards all of them, and the one
    /// in lower case, as one service.
    folded: BTreeMap<String, Vec<Arc<str>>>,
    n_lingering: usize,
    next_end: Option<Instant>,
}

impl Names {
    /// All of them.
    pub fn all(&self) -> BTreeSet<Arc<str>> {
        self.known.keys().cloned().collect()
    }

    /// Why the name is known, if it is.
    pub fn presence(&self, name: &str) -> Option<Presence> {
        self.known.get(name).copied()
    }

    /// The names of the list.
    pub fn listed(&self) -> BTreeSet<Arc<str>> {
        self.with(|presence| presence == Presence::Listed)
    }

    /// The names that a list doesn't have, and doesn't take away.
    pub fn unlisted(&self) -> BTreeSet<Arc<str>> {
        self.with(|presence| presence != Presence::Listed)
    }

    fn with(&self, is_meant: impl Fn(Presence) -> bool) -> BTreeSet<Arc<str>> {
        let meant = self.known.iter().filter(|(_, presence)| is_meant(**presence));
        meant.map(|(name, _)| name.clone()).collect()
    }

    /// Adds names of the list.
    pub fn add_listed(&mut self, names: impl IntoIterator<Item = Arc<str>>) {
        for name in names {
            self.known.insert(name, Presence::Listed);
        }
        self.index();
    }

    /// Adds a name that a lookup found, unless the list has it. Returns whether it is new.
    pub fn add_found(&mut self, name: &Arc<str>) -> bool {
        let is_new = self.presence(name).is_none_or(|is| matches!(is, Presence::Lingering { .. }));
        if is_new {
            self.known.insert(name.clone(), Presence::Found);
            self.index();
        }
        is_new
    }

    /// Removes names.
    pub fn remove<'a>(&mut self, names: impl IntoIterator<Item = &'a Arc<str>>) {
        for name in names {
            self.known.remove(name);
        }
        self.index();
    }

    /// Applies a list: it adds names, and takes away those that it had. `lingers` is asked of each
    /// name that vanished altogether how long it stays known; one that only lost the tag goes at once.
    pub fn apply(&mut self, list: List, mut lingers: impl FnMut(&Arc<str>) -> Option<Instant>) {
        let mut n_lingering = self.n_lingering;
        self.known.retain(|name, presence| match *presence {
            Presence::Found => true,
            Presence::Lingering { .. } => !list.has(name),
            Presence::Listed if list.has(name) => list.tagged.contains(name),
            Presence::Listed if n_lingering >= MAX_LINGERING => false,
            Presence::Listed => {
                let until = lingers(name);
                *presence = until.map_or(*presence, |until| Presence::Lingering { until });
                n_lingering += usize::from(until.is_some());
                until.is_some()
            }
        });
        self.add_listed(list.tagged);
    }

    /// Lets a name linger until then, where there is room for it; otherwise it goes.
    pub fn linger(&mut self, name: &Arc<str>, until: Option<Instant>) {
        match until.filter(|_| self.n_lingering < MAX_LINGERING) {
            Some(until) => drop(self.known.insert(name.clone(), Presence::Lingering { until })),
            None => drop(self.known.remove(name)),
        }
        self.index();
    }

    /// When the first name has lingered for long enough.
    pub fn next_end(&self) -> Option<Instant> {
        self.next_end
    }

    /// Asks `next` about each name that has lingered for long enough; `None` removes it. Returns
    /// whether there were any.
    pub fn end_lingering(
        &mut self,
        now: Instant,
        mut next: impl FnMut(&Arc<str>) -> Option<Presence>,
    ) -> bool {
        if self.next_end.is_none_or(|end| end > now) {
            return false;
        }
        self.known.retain(|name, presence| match *presence {
            Presence::Lingering { until } if until <= now => {
                let next = next(name);
                *presence = next.unwrap_or(*presence);
                next.is_some()
            }
            _ => true,
        });
        self.index();
        true
    }

    fn index(&mut self) {
        let ends = || {
            self.known.values().filter_map(|presence| match presence {
                Presence::Lingering { until } => Some(*until),
                Presence::Listed | Presence::Found => None,
            })
        };
        (self.n_lingering, self.next_end) = (ends().count(), ends().min());
        self.folded.clear();
        let has_upper = |name: &&Arc<str>| name.bytes().any(|octet| octet.is_ascii_uppercase());
        for name in self.known.keys().filter(has_upper) {
            self.folded.entry(name.to_ascii_lowercase()).or_default().push(name.clone());
        }
    }

    /// The names that DNS regards as this one, which is in lower case.
    pub fn of(&self, folded: &str) -> Vec<Arc<str>> {
        let name = self.known.get_key_value(folded).map(|(name, _)| name);
        name.into_iter().chain(self.folded.get(folded).into_iter().flatten()).cloned().collect()
    }

    /// The groups of names that DNS regards as one, each by its name in lower case.
    pub fn groups(&self) -> impl Iterator<Item = (&str, Vec<Arc<str>>)> {
        self.folded.keys().map(|folded| (&**folded, self.of(folded)))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn list(tagged: &[&str], others: &[&str]) -> List {
        let set = |names: &[&str]| names.iter().map(|name| Arc::from(*name)).collect();
        List { tagged: set(tagged), others: set(others) }
    }

    fn shown(names: &Names) -> String {
        let shown = names.known.iter().map(|(name, presence)| match presence {
            Presence::Listed => name.to_string(),
            Presence::Found => format!("{name}?"),
            Presence::Lingering { .. } => format!("({name})"),
        });
        shown.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_name_that_vanishes_lingers_and_one_that_lost_its_tag_goes() {
        let end = Instant::now() + Duration::from_secs(300);
        // (tagged, others, what is known then)
        let table: &[(&[&str], &[&str], &str)] = &[
            (&["a", "b", "proxy"], &[], "a b found? proxy"),
            (&["a"], &["b"], "a found?"),
            (&["a", "b"], &[], "a b found?"),
            (&["b"], &[], "(a) b found?"),
            (&["b", "found"], &[], "(a) b found"),
            (&["b"], &["a"], "b (found)"),
            (&["a", "found"], &[], "a (b) found"),
        ];
        let mut names = Names::default();
        assert!(names.add_found(&"found".into()));
        for (tagged, others, expected) in table {
            names.apply(list(tagged, others), |name| (&**name != "proxy").then_some(end));
            assert_eq!(shown(&names), *expected, "after {tagged:?} {others:?}");
        }
        assert_eq!(names.next_end(), Some(end));
        assert!(!names.end_lingering(end - Duration::from_secs(1), |_| None));
        assert!(names.end_lingering(end, |_| None));
        assert_eq!(shown(&names), "a found");
    }

    #[test]
    fn what_lingers_has_a_bound() {
        let all: Vec<String> = (0..MAX_LINGERING + 10).map(|n| format!("s{n:04}")).collect();
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        let mut names = Names::default();
        names.apply(list(&all, &[]), |_| None);
        names.apply(list(&[], &[]), |_| Some(Instant::now()));
        assert_eq!(names.known.len(), MAX_LINGERING);
    }

    #[test]
    fn names_that_differ_in_case_are_one_group() {
        let mut names = Names::default();
        names.add_listed(["WEB", "Web", "web", "db", "Other"].map(Arc::from));
        assert_eq!(names.of("web"), ["web", "WEB", "Web"].map(Arc::from));
        assert_eq!(names.of("other"), ["Other"].map(Arc::from));
        assert_eq!(names.groups().map(|(folded, _)| folded).collect::<Vec<_>>(), ["other", "web"]);
        names.remove(&[Arc::from("WEB"), Arc::from("Web")]);
        assert_eq!(names.of("web"), [Arc::from("web")]);
    }
}
