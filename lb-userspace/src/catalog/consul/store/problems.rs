//! What `status` reports of the source.

use std::sync::Arc;
use std::time::Instant;

use super::{ServiceStore, Subject};

pub(super) const AGENT_DENIED: &str = "instances on a loopback address, or in the network of a bridge of this \
                            host, are unroutable, since the Consul token may not read which node \
                            this is: it needs agent:read as well";

impl ServiceStore {
    /// Sets or removes the problem of a subject.
    pub fn set_problem(&mut self, subject: Subject, problem: Option<String>) {
        match problem {
            Some(problem) => self.problems.insert(subject, problem),
            None => self.problems.remove(&subject),
        };
    }

    /// Whether Consul doesn't answer, or its answers are suspicious; not a problem of one service.
    pub fn is_failing(&self, now: Instant) -> bool {
        // Not the names alone: the switch is always asked about, the names only every ten seconds.
        let subjects = [Subject::Names, Subject::Agent, Subject::Switch];
        subjects.iter().any(|subject| self.problems.contains_key(subject))
            || self.has_suspicions(now)
    }

    /// Whether Consul can't be asked about what isn't watched: only the names show that, since a problem
    /// with the switch, or the agent's node, need not be one with services.
    pub fn is_cut_off(&self) -> bool {
        self.problems.contains_key(&Subject::Names)
    }

    /// All problems in one line, equal ones once, and at most three.
    pub fn problem(&self, now: Instant) -> Option<String> {
        let general = |subject| self.problems.get(&subject).map(|problem| (&**problem, None));
        let suspicion = self.suspicion_problem(now);
        let first = [Subject::Names, Subject::Agent, Subject::Switch].map(general);
        let then = [suspicion.as_deref().map(|it| (it, None)), general(Subject::Connections)];
        let of_services = self.index.failing.iter().filter_map(|name| {
            let live = self.by_name.get(name)?.live.as_ref()?;
            Some((live.problem.as_deref()?, Some(name)))
        });
        let mut shown: Vec<(&str, Option<&Arc<str>>)> = Vec::new();
        let mut n_more = 0;
        for (problem, name) in first.into_iter().chain(then).flatten().chain(of_services) {
            match shown.len() {
                _ if shown.iter().any(|(other, _)| *other == problem) => {}
                0..3 => shown.push((problem, name)),
                _ => n_more += 1,
            }
        }
        if self.index.totals.n_needs_agent > 0 {
            shown.push((AGENT_DENIED, None));
        }
        let line = |(problem, name): (&str, Option<&Arc<str>>)| match name {
            Some(name) => format!("service `{name}`: {problem}"),
            None => problem.into(),
        };
        let mut lines: Vec<String> = shown.into_iter().map(line).collect();
        if n_more > 0 {
            lines.push(format!("and {n_more} more"));
        }
        (!lines.is_empty()).then(|| lines.join("; "))
    }
}
