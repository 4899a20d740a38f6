//! The names: those of the list, those that are looked up beside it, and who waits for one.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use super::super::doubt::{Assessment, Evidence};
use super::super::index::{IndexCheck, ReadMode};
use super::super::model::Subject;
use super::super::negative_cache::LookupDecision;
use super::super::query::{Answer, List, Response};
use super::super::schedule::is_shrink;
use super::{Asked, Supervisor, TIDY};
use crate::catalog::usage::{Lookup, LookupRequest};

/// Under which name Consul's servers are listed themselves.
const CONSUL: &str = "consul";

/// The names that have gone and are known yet, at most.
const MAX_GONE: usize = 1024;

/// Those who wait for a name, at most; for more it is unknown.
const MAX_WAITING: usize = 4096;

impl Supervisor {
    pub(super) fn take_names(&mut self, asked: Asked, now: Instant) {
        let problem = match asked {
            Ok(Answer { index, said: Response::Names(list), n_bytes, is_filtered, news_at }) => {
                let is_sure = self.names.ask() == ReadMode::Consistent;
                if self.names.answered(index, now, fastrand::f64()) == IndexCheck::Apply {
                    let signs = Evidence { now, is_sure, is_filtered, moved: self.names.moved() };
                    self.weigh_names(list, signs, news_at);
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

    fn weigh_names(&mut self, list: List, signs: Evidence, news_at: Instant) {
        let (listed, now) = (&self.listed, signs.now);
        let n_kept = list.tagged.iter().filter(|name| listed.contains(*name)).count();
        let is_loss = is_shrink(listed.len(), n_kept) || self.would_lose(&list.tagged);
        let is_hidden = self.lists_consul && !list.has(CONSUL);
        let there = |name: &Arc<str>| list.has(name) || self.unlisted.contains(name);
        match self.model.weigh_names(listed, &there, is_loss, is_hidden, signs) {
            Assessment::Apply => {
                self.names.applied();
                self.lists_consul = list.has(CONSUL);
                self.believe(news_at);
                self.take_list(list, now);
            }
            Assessment::Confirm => {
                self.output.stats().count_shrink_held();
                return self.names.doubt(now, self.timing().doubt.mul_f64(fastrand::f64()));
            }
            // What is new is no loss.
            Assessment::Withhold => {
                self.names.withhold();
                self.set_names(self.listed.union(&list.tagged).cloned().collect());
            }
        }
        let jitter = 1.0 + fastrand::f64() / 5.0;
        self.names.hold_until(now + self.timing().names.mul_f64(jitter));
    }

    /// Takes a list of names. What has gone from it altogether stays known for a while, without
    /// instances: Nomad takes a service away while it starts its task again, and "no such name" would
    /// outlive that in caches. A name that only lost the tag goes at once.
    fn take_list(&mut self, list: List, now: Instant) {
        let gone: Vec<Arc<str>> =
            self.listed.iter().filter(|name| !list.has(name)).cloned().collect();
        for name in gone {
            self.linger(&name, now);
        }
        self.gone.retain(|name, _| !list.has(name));
        self.set_names(list.tagged);
    }

    /// Keeps a name for a while that has gone; its instances are gone.
    pub(super) fn linger(&mut self, name: &Arc<str>, now: Instant) {
        if self.gone.len() < MAX_GONE && self.model.empty(name, now) {
            self.gone.insert(name.clone(), now + self.timing().linger);
        }
    }

    /// Lets go of the names whose time is over. One that is registered again, and not listed yet, is
    /// as one that was looked up; one of which that is doubted stays for as long.
    pub(super) fn end_lingering(&mut self, now: Instant) {
        let n_gone = self.gone.len();
        let (model, unlisted) = (&self.model, &mut self.unlisted);
        self.gone.retain(|name, until| {
            if *until <= now && model.is_doubted(name, now) {
                *until = now + TIDY;
            }
            let stays = *until > now;
            if !stays && model.is_back(name) {
                unlisted.insert(name.clone());
            }
            stays
        });
        if self.gone.len() != n_gone {
            self.set_names(self.listed.clone());
        }
    }

    /// Whether a list of names takes away what serves. What was looked up beside the list, or is
    /// registered again, stays until its own answer.
    fn would_lose(&self, names: &BTreeSet<Arc<str>>) -> bool {
        if self.unlisted.is_empty() && self.gone.is_empty() {
            return self.model.would_lose(names);
        }
        let besides = self.unlisted.iter().chain(self.gone.keys());
        self.model.would_lose(&names.iter().chain(besides).cloned().collect())
    }

    pub(super) fn set_names(&mut self, names: BTreeSet<Arc<str>>) {
        self.unlisted.retain(|name| !names.contains(name));
        self.folded.clear();
        let all = names.iter().chain(&self.unlisted).chain(self.gone.keys());
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
        let unlisted = self.unlisted.iter().chain(self.gone.keys()).cloned();
        let all: BTreeSet<_> = names.into_iter().chain(unlisted).collect();
        self.model.set_names(&all);
        self.schedule.set_names(all);
        if self.give_up_at.is_none() {
            self.give_up_at = Some(Instant::now() + self.timing().stragglers);
        }
    }

    pub(super) fn take_lookup(&mut self, name: Arc<str>, asked: Asked, now: Instant) {
        self.looking_up.remove(&name);
        let has_doubts = self.model.has_doubts(now);
        match asked {
            // One that is left out for the token's sake may well be there.
            Ok(Answer { said: Response::Lookup(None), is_filtered: false, .. }) if !has_doubts => {
                self.absent.note(name.clone(), now);
                self.tell(&name, Lookup::Absent);
            }
            Ok(Answer { said: Response::Lookup(Some(registered)), .. }) => {
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
    pub(super) fn want(&mut self, wish: LookupRequest) {
        let now = Instant::now();
        let variants = self.folded.get(&*wish.name).into_iter().flatten();
        let names = self.schedule.names().get(&wish.name).into_iter().chain(variants);
        let names: Vec<Arc<str>> = names.cloned().collect();
        if let Some(name) = names.first().cloned() {
            for name in names {
                self.schedule.used(name, now);
            }
            if wish.reply.is_some() && !self.model.is_cut_off() {
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
            LookupDecision::Absent => {
                if let (Some(done), false) = (wish.reply, self.model.has_doubts(now)) {
                    let _ = done.send(Lookup::Absent);
                }
            }
            LookupDecision::TooMany => {}
            LookupDecision::LookUp => {
                if self.schedule.look_up(wish.name.clone()) {
                    self.looking_up.insert(wish.name.clone());
                    self.wait(wish.name.clone(), wish);
                }
            }
        }
    }

    fn wait(&mut self, name: Arc<str>, wish: LookupRequest) {
        let n_waiting: usize = self.waiting.values().map(Vec::len).sum();
        if let (Some(done), true) = (wish.reply, n_waiting < MAX_WAITING) {
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
