//! The datapath as the daemon's parts share it: one applies tables and looks after the hooks, others
//! ask.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::control::Datapath;
use super::error::DatapathError;
use super::probe::Proof;
use super::reconcile::{ApplyError, Indices, Pressure};
use super::units::UnitStatus;
use crate::table::Table;

/// How long `status` tells of hooks that were detached and attached again.
const TELLS: Duration = Duration::from_secs(60);

/// The services that the log names when the kernel doesn't have them, of those that a table adds.
const MAX_NAMED: usize = 10;

/// What becomes of connections to VIPs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// They are translated.
    #[default]
    Translate,
    /// They are counted, and pass untouched.
    Shadow {
        /// Why, as a part of a sentence.
        why: String,
    },
}

/// A datapath, and what is wrong with it.
#[derive(Debug)]
pub struct SharedDatapath {
    datapath: Mutex<Datapath>,
    errors: Mutex<Errors>,
    watched: Mutex<Watched>,
    mode: Mutex<Mode>,
}

/// The services that the kernel doesn't have as the last table wants them.
#[derive(Debug, Default)]
struct Errors {
    /// Each with the reason.
    reasons: BTreeMap<Arc<str>, String>,
    /// Whether to apply the same table again may help.
    may_pass: bool,
}

/// What was seen of the hooks.
#[derive(Debug, Default)]
struct Watched {
    /// Why hooks aren't where they should be.
    problem: Option<String>,
    /// Why the last connection of our own didn't prove that they run, and whether it proved the opposite.
    unproven: Option<(String, bool)>,
    /// When hooks were last found detached, and which.
    lost: Option<(Instant, String)>,
    /// Why new maps don't count yet.
    waiting: Option<Waiting>,
    /// What an operator should know of whose connections are translated.
    notes: Vec<String>,
    /// What lets VIPs reach something where no hook runs.
    routes: Vec<String>,
}

/// Why the hooks still run an earlier daemon's programs.
#[derive(Clone, Debug)]
struct Waiting {
    why: String,
    /// Whether all of those are where they should be; else the switch stopped half-way.
    serves: bool,
}

impl Waiting {
    fn of(error: &DatapathError) -> Waiting {
        Waiting {
            why: format!("the hooks still run an earlier daemon's programs and table: {error}"),
            serves: matches!(error, DatapathError::HoldsLess { .. }),
        }
    }
}

/// Whether connections are translated, as far as the daemon knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hooks {
    /// Whether every hook is attached, an earlier daemon's or this one's, and nothing showed that it
    /// doesn't run.
    pub attached: bool,
    /// Whether a connection would be translated: the hooks are attached, and connects to aren't only counted.
    pub translate: bool,
    /// Why they still are an earlier daemon's, with the table that it knew last.
    pub waiting: Option<String>,
    /// What an operator should know.
    pub problems: Vec<String>,
}

impl Watched {
    /// Whether connections are translated.
    fn hooks(&self, mode: &Mode) -> Hooks {
        let mut hooks = Hooks { attached: self.problem.is_none(), ..Hooks::default() };
        if let Mode::Shadow { why } = mode {
            hooks.problems.push(format!(
                "connections are only counted, none is translated, and names get SERVFAIL: {why}"
            ));
        }
        if let Some(problem) = &self.problem {
            hooks.problems.push(format!("the hooks aren't attached: {problem}"));
        }
        if let Some((reason, is_disproof)) = &self.unproven {
            hooks.attached &= !is_disproof;
            hooks.problems.push(reason.clone());
        }
        if let Some((at, what)) = &self.lost
            && at.elapsed() < TELLS
        {
            let ago = at.elapsed().as_secs();
            let then = if self.problem.is_none() { "; it was attached again" } else { "" };
            hooks.problems.push(format!("{what} {ago} s ago{then}"));
        }
        if let Some(Waiting { why, serves }) = &self.waiting {
            hooks.attached &= serves;
            hooks.problems.push(why.clone());
            hooks.waiting = Some(why.clone());
        }
        hooks.problems.extend(self.notes.iter().cloned());
        hooks.problems.extend(self.routes.iter().cloned());
        hooks.translate = hooks.attached && *mode == Mode::Translate;
        hooks
    }
}

impl SharedDatapath {
    /// Shares `datapath`.
    pub fn new(datapath: Datapath) -> SharedDatapath {
        let mode = if datapath.is_shadow() {
            Mode::Shadow { why: "it began so".to_owned() }
        } else {
            Mode::Translate
        };
        let notes: Vec<String> = datapath.notes().cloned().collect();
        notes.iter().for_each(|note| tracing::warn!("{note}"));
        SharedDatapath {
            datapath: Mutex::new(datapath),
            errors: Mutex::default(),
            watched: Mutex::new(Watched { notes, ..Watched::default() }),
            mode: Mutex::new(mode),
        }
    }

    /// As [`Datapath::apply`]; what couldn't be applied is logged once, and kept for those who ask.
    pub fn apply(&self, table: &Table) {
        let applied = lock(&self.datapath).apply(table);
        let waiting = applied.as_ref().err().map(Waiting::of);
        let former = std::mem::replace(&mut lock(&self.watched).waiting, waiting.clone());
        if let Some(Waiting { why, .. }) = &waiting
            && former.is_none_or(|former| former.why != *why)
        {
            tracing::error!("{why}");
        }
        let errors = applied.unwrap_or_default();
        let may_pass = errors.values().any(ApplyError::may_pass);
        let reasons: BTreeMap<Arc<str>, String> =
            errors.into_iter().map(|(name, error)| (name, error.to_string())).collect();
        let mut last = lock(&self.errors);
        let is_new =
            |(name, reason): &(&Arc<str>, &String)| last.reasons.get(*name) != Some(*reason);
        let new: Vec<_> = reasons.iter().filter(is_new).collect();
        for (name, reason) in new.iter().take(MAX_NAMED) {
            tracing::error!("{name}: {reason}");
        }
        if new.len() > MAX_NAMED {
            let n_more = new.len() - MAX_NAMED;
            tracing::error!("{n_more} more services aren't in the kernel: see `nohop services`");
        }
        *last = Errors { reasons, may_pass };
    }

    /// Whether the last table has to be applied again, which may help.
    pub fn is_behind(&self) -> bool {
        lock(&self.errors).may_pass || lock(&self.watched).waiting.is_some()
    }

    /// The services that the kernel doesn't have as the table wants them, each with the reason.
    pub fn errors(&self) -> BTreeMap<Arc<str>, String> {
        lock(&self.errors).reasons.clone()
    }

    /// Why the kernel doesn't have this service as the table wants it; `None` if it does.
    pub fn error(&self, name: &str) -> Option<String> {
        lock(&self.errors).reasons.get(name).cloned()
    }

    /// As [`Datapath::indices`].
    pub fn indices(&self, name: &str) -> Option<Indices> {
        lock(&self.datapath).indices(name)
    }

    /// As [`Datapath::service_indices`].
    pub fn service_indices(&self) -> Vec<(Arc<str>, u32)> {
        lock(&self.datapath).service_indices()
    }

    /// As [`Datapath::is_adopted`].
    pub fn is_adopted(&self) -> bool {
        lock(&self.datapath).is_adopted()
    }

    /// As [`Datapath::limits`], in words.
    pub fn limits(&self) -> Vec<String> {
        lock(&self.datapath).limits().iter().map(ToString::to_string).collect()
    }

    /// As [`Datapath::unit_status`].
    pub fn unit_status(&self) -> Vec<UnitStatus> {
        lock(&self.datapath).unit_status()
    }

    /// As [`Datapath::pressure`].
    pub fn pressure(&self) -> Vec<(&'static str, Pressure)> {
        lock(&self.datapath).pressure()
    }

    /// As [`Datapath::beat`].
    pub fn beat(&self, table_age: Option<Duration>) {
        lock(&self.datapath).beat(table_age);
    }

    /// Looks at every link, and attaches again what somebody detached. Returns whether all hooks had
    /// been where they should be.
    pub fn look_after(&self) -> bool {
        let mut datapath = lock(&self.datapath);
        let attachment = datapath.fix();
        let scope = datapath.scope().display().to_string();
        let notes: Vec<String> = datapath.notes().cloned().collect();
        drop(datapath);
        let mut watched = lock(&self.watched);
        for note in notes.iter().filter(|note| !watched.notes.contains(note)) {
            tracing::warn!("{note}");
        }
        watched.notes = notes;
        if attachment.problem.is_some() && watched.problem != attachment.problem {
            tracing::error!(
                "the hooks aren't attached: {}",
                attachment.problem.as_deref().unwrap_or_default()
            );
        }
        watched.problem = attachment.problem;
        if attachment.lost.is_empty() {
            return watched.problem.is_none();
        }
        let lost = attachment.lost.into_iter().collect::<Vec<_>>().join(", ");
        if watched.problem.is_none() {
            tracing::warn!("something detached {lost} from {scope}: attached again");
        }
        watched.lost = Some((Instant::now(), format!("something detached {lost} from {scope}")));
        false
    }

    /// Takes note of what is wrong with the routes; the log shows what is new.
    pub fn set_route_problems(&self, problems: Vec<String>) {
        let mut watched = lock(&self.watched);
        for problem in problems.iter().filter(|problem| !watched.routes.contains(problem)) {
            tracing::error!("{problem}");
        }
        watched.routes = problems;
    }

    /// Proves by a connection from inside the scope that the hooks run. It blocks for up to four seconds.
    pub fn prove(&self) {
        let (prober, are_ours) = {
            let datapath = lock(&self.datapath);
            (datapath.prober(), datapath.are_hooks_ours())
        };
        // An earlier daemon's programs don't report here.
        if !are_ours {
            return;
        }
        let unproven = match prober.probe() {
            Proof::Runs(probe) => {
                lock(&self.datapath).learn(probe);
                None
            }
            Proof::Misses => Some((
                "a connect of our own from inside the cgroup didn't meet the hooks: is --cgroup below \
                 the hierarchy's real root, and not hidden by a cgroup namespace?"
                    .to_owned(),
                true,
            )),
            Proof::Unknown(reason) => {
                Some((format!("can't connect to from inside the cgroup: {reason}"), false))
            }
        };
        let mut watched = lock(&self.watched);
        if watched.unproven != unproven {
            match &unproven {
                Some((reason, _)) => tracing::warn!("{reason}"),
                None => tracing::info!("a connection of our own meets the hooks again"),
            }
            watched.unproven = unproven;
        }
    }

    /// Whether connections are translated.
    pub fn hooks(&self) -> Hooks {
        lock(&self.watched).hooks(&self.mode())
    }

    /// Has connections translated or only counted from now on; the log hears of each change.
    pub fn set_mode(&self, mode: Mode) {
        let mut last = lock(&self.mode);
        if *last == mode {
            return;
        }
        match &mode {
            Mode::Translate => tracing::warn!("connections are translated from now on"),
            Mode::Shadow { why } => {
                tracing::warn!(
                    "connections are only counted from now on, none is translated: {why}"
                );
            }
        }
        lock(&self.datapath).set_shadow(mode != Mode::Translate);
        *last = mode;
    }

    /// What becomes of connections.
    pub fn mode(&self) -> Mode {
        lock(&self.mode).clone()
    }

    /// As [`Datapath::in_use`].
    pub fn in_use(&self) -> Vec<Arc<str>> {
        lock(&self.datapath).in_use()
    }

    /// As [`Datapath::active_since_last`].
    pub fn active_since_last(&self) -> Vec<Arc<str>> {
        lock(&self.datapath).active_since_last()
    }

    /// As [`Datapath::keep`].
    pub fn keep(&self) {
        lock(&self.datapath).keep();
    }

    /// As [`Datapath::detach`].
    pub fn detach(&self) {
        lock(&self.datapath).detach();
    }
}

/// A panic while it was locked leaves what is in it consistent: every step is.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hooks(waiting: Option<DatapathError>, problem: Option<&str>) -> Hooks {
        let waiting = waiting.as_ref().map(Waiting::of);
        let problem = problem.map(str::to_owned);
        Watched { waiting, problem, ..Watched::default() }.hooks(&Mode::Translate)
    }

    /// An earlier daemon's hooks serve as well as this one's: names are answered while they do.
    #[test]
    fn names_are_answered_while_the_hooks_are_an_earlier_daemons() {
        let holds_less = || DatapathError::HoldsLess {
            n_services: 1,
            name: "web".to_owned(),
            reason: "BACKENDS is full".to_owned(),
        };
        let waiting = hooks(Some(holds_less()), None);
        assert!(waiting.attached && waiting.translate, "{waiting:?}");
        let why = waiting.waiting.unwrap();
        assert!(why.contains("earlier daemon's programs and table"), "{why}");
        assert_eq!(waiting.problems, [why]);

        let halfway = DatapathError::Object { missing: "nohop_connect4" };
        assert!(!hooks(Some(halfway), None).attached, "a switch that stopped half-way");
        assert!(!hooks(Some(holds_less()), Some("gone")).attached);
        assert!(hooks(None, None).translate);
    }
}
