//! The names: those of the list, those that are looked up beside it, and who waits for one.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use super::super::absent::Decision;
use super::super::ask::{Answer, Said};
use super::super::index::{Ask, Verdict};
use super::super::model::Subject;
use super::super::schedule::is_shrink;
use super::{Asked, Supervisor};
use crate::catalog::demand::{Lookup, Wanted};

/// Those who wait for a name, at most; for more it is unknown.
const MAX_WAITING: usize = 4096;

impl Supervisor {
    pub(super) fn take_names(&mut self, asked: Asked, now: Instant) {
        let problem = match asked {
            Ok(Answer { index, said: Said::Names(names), n_bytes, .. }) => {
                let is_sure = self.names.ask() == Ask::Consistently;
                let verdict = self.names.answered(index, now, fastrand::f64());
                let n_kept = names.iter().filter(|name| self.listed.contains(*name)).count();
                let is_loss = || is_shrink(self.listed.len(), n_kept) || self.would_lose(&names);
                let is_doubtful = verdict == Verdict::Apply && !is_sure && is_loss();
                match verdict {
                    Verdict::Apply if is_doubtful => {
                        self.output.stats().count_shrink_held();
                        self.names.doubt(now, self.timing().doubt.mul_f64(fastrand::f64()));
                    }
                    Verdict::Apply => self.set_names(names),
                    Verdict::Unchanged | Verdict::Confirm => {}
                }
                if !is_doubtful && verdict != Verdict::Confirm {
                    let jitter = 1.0 + fastrand::f64() / 5.0;
                    self.names.hold_until(now + self.timing().names.mul_f64(jitter));
                }
                self.names_bytes = n_bytes;
                None
            }
            Ok(_) => return,
            Err(failure) => {
                self.names.failed(now, fastrand::f64());
                Some(failure.problem)
            }
        };
        self.note(Subject::Names, problem, now);
    }

    /// Whether a list of names takes away what serves. What was looked up beside the list stays
    /// until its own answer.
    fn would_lose(&self, names: &BTreeSet<Arc<str>>) -> bool {
        match self.unlisted.is_empty() {
            true => self.model.would_lose(names),
            false => self.model.would_lose(&names.union(&self.unlisted).cloned().collect()),
        }
    }

    pub(super) fn set_names(&mut self, names: BTreeSet<Arc<str>>) {
        self.unlisted.retain(|name| !names.contains(name));
        self.folded.clear();
        let all = names.iter().chain(&self.unlisted);
        for name in all.filter(|name| name.bytes().any(|octet| octet.is_ascii_uppercase())) {
            self.folded.entry(name.to_ascii_lowercase()).or_default().push(name.clone());
        }
        // A use of one is a use of all.
        for (folded, variants) in &self.folded {
            let used = variants.iter().map(|name| &**name).chain([&**folded]);
            let Some(at) = used.filter_map(|name| self.schedule.used_at(name)).max() else {
                continue;
            };
            for name in variants {
                self.schedule.used(name.clone(), at);
            }
            if let Some(name) = names.get(&**folded).or_else(|| self.unlisted.get(&**folded)) {
                self.schedule.used(name.clone(), at);
            }
        }
        self.listed.clone_from(&names);
        let all: BTreeSet<_> = names.into_iter().chain(self.unlisted.iter().cloned()).collect();
        self.model.set_names(&all);
        self.schedule.set_names(all);
        if self.give_up_at.is_none() {
            self.give_up_at = Some(Instant::now() + self.timing().stragglers);
        }
    }

    pub(super) fn take_lookup(&mut self, name: Arc<str>, asked: Asked, now: Instant) {
        self.looking_up.remove(&name);
        match asked {
            // One that is left out for the token's sake may well be there.
            Ok(Answer { said: Said::Lookup(None), is_filtered: false, .. }) => {
                self.absent.note(name.clone(), now);
                self.tell(&name, Lookup::Absent);
            }
            Ok(Answer { said: Said::Lookup(Some(registered)), .. }) => {
                let waiting = self.waiting.remove(&name).unwrap_or_default();
                self.waiting.entry(registered.clone()).or_default().extend(waiting);
                if !self.listed.contains(&registered) {
                    self.unlisted.insert(registered.clone());
                    self.set_names(self.listed.clone());
                }
                self.schedule.used(registered, now);
            }
            // Not knowing is not "no".
            _ => self.tell(&name, Lookup::Unknown),
        }
    }

    /// Hears that a name is in use.
    pub(super) fn want(&mut self, wish: Wanted) {
        let now = Instant::now();
        let variants = self.folded.get(&*wish.name).into_iter().flatten();
        let names = self.schedule.names().get(&wish.name).into_iter().chain(variants);
        let names: Vec<Arc<str>> = names.cloned().collect();
        if let Some(name) = names.first().cloned() {
            for name in names {
                self.schedule.used(name, now);
            }
            if wish.done.is_some() && !self.model.is_cut_off() {
                self.wait(name, wish);
            }
            return;
        }
        if !self.model.has_names() {
            // It counts once the names are there.
            self.schedule.used(wish.name, now);
            return;
        }
        if self.model.is_cut_off() {
            // It is unknown, at once: an answer would have to wait for the time that answers have.
            return;
        }
        if self.looking_up.contains(&wish.name) {
            return self.wait(wish.name.clone(), wish);
        }
        match self.absent.decide(&wish.name, now) {
            Decision::Absent => {
                if let Some(done) = wish.done {
                    let _ = done.send(Lookup::Absent);
                }
            }
            Decision::TooMany => {}
            Decision::LookUp => {
                if self.schedule.look_up(wish.name.clone()) {
                    self.looking_up.insert(wish.name.clone());
                    self.wait(wish.name.clone(), wish);
                }
            }
        }
    }

    fn wait(&mut self, name: Arc<str>, wish: Wanted) {
        let n_waiting: usize = self.waiting.values().map(Vec::len).sum();
        if let (Some(done), true) = (wish.done, n_waiting < MAX_WAITING) {
            let waiting = self.waiting.entry(name).or_default();
            waiting.retain(|done| !done.is_closed());
            waiting.push(done);
        }
    }

    /// Tells those who wait for a name that has gone, and that nobody looks up.
    pub(super) fn release_waiting(&mut self) {
        let known = self.schedule.names();
        let gone = self.waiting.keys();
        let gone = gone.filter(|name| !known.contains(*name) && !self.looking_up.contains(*name));
        for name in gone.cloned().collect::<Vec<_>>() {
            self.tell(&name, Lookup::Absent);
        }
    }

    pub(super) fn tell(&mut self, name: &str, lookup: Lookup) {
        for done in self.waiting.remove(name).into_iter().flatten() {
            let _ = done.send(lookup);
        }
    }
}
