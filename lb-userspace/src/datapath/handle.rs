//! The datapath as the daemon's parts share it: the loop applies tables and checks the hooks, others
//! read.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lb_common::NamesCounters;

use tokio::sync::Notify;

use super::control::Datapath;
use super::edge::{EdgeFlow, EdgeOptions, EdgeStatus};
use super::error::DatapathError;
use super::intercept::InterceptSettings;
use super::names::NamesSettings;
use super::probe::ProbeResult;
use super::reconcile::{BackendIndices, Indices, Pressure, ReconcileError};
use super::tcp_terminator::TcpTerminator;
use super::units::UnitHealth;
use crate::config::BalanceConfig;
use crate::counted::counted;
use crate::table::Table;

/// How long `status` reports hooks that were detached and attached again.
const REPORT_FOR: Duration = Duration::from_secs(60);

/// For how long one check ends flows of an edge at most.
const SWEEP_FOR: Duration = Duration::from_millis(200);

/// How many failed services of one table the log names.
const MAX_NAMED: usize = 10;

/// How connections to VIPs are handled.
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

/// A datapath and its problems.
#[derive(Debug)]
pub struct SharedDatapath {
    datapath: Mutex<Datapath>,
    errors: Mutex<Errors>,
    hook_state: Mutex<HookState>,
    mode: Mutex<Mode>,
}

/// The services of the last table that failed to apply.
#[derive(Debug, Default)]
struct Errors {
    /// The reason, by service.
    reasons: BTreeMap<Arc<str>, String>,
    /// Whether applying the same table again may succeed.
    is_transient: bool,
}

/// The observed state of the hooks.
#[derive(Debug, Default)]
struct HookState {
    /// Why hooks aren't where they should be.
    problem: Option<String>,
    /// Why the last probe connection didn't meet the hooks, and whether that proves that they don't run.
    unproven: Option<(String, bool)>,
    /// When hooks were last found detached, and which.
    lost: Option<(Instant, String)>,
    /// Why new maps aren't in use yet.
    waiting: Option<PendingSwitch>,
    /// Notes for the operator, from [`Datapath::notes`].
    notes: Vec<String>,
    /// Problems of the routes for unhooked traffic.
    routes: Vec<String>,
}

/// Why the hooks still run an earlier daemon's programs.
#[derive(Clone, Debug)]
struct PendingSwitch {
    why: String,
    /// Whether all of those are attached; else the switch was interrupted.
    serves: bool,
}

impl PendingSwitch {
    fn of(error: &DatapathError) -> PendingSwitch {
        PendingSwitch {
            why: format!("the hooks still run an earlier daemon's programs and table: {error}"),
            serves: matches!(error, DatapathError::HoldsLess { .. }),
        }
    }
}

/// Whether connections are translated, as far as the daemon can observe.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HookHealth {
    /// Whether every hook is attached, an earlier daemon's or this one's, and no probe found that it
    /// doesn't run.
    pub attached: bool,
    /// Whether connections are translated: the hooks are attached, and shadow mode is off.
    pub translate: bool,
    /// Why an earlier daemon's hooks and table are still in use.
    pub waiting: Option<String>,
    /// For the operator, a sentence each.
    pub problems: Vec<String>,
}

impl HookState {
    /// Whether connections are translated.
    fn hooks(&self, mode: &Mode) -> HookHealth {
        let mut hooks = HookHealth { attached: self.problem.is_none(), ..HookHealth::default() };
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
            && at.elapsed() < REPORT_FOR
        {
            let ago = at.elapsed().as_secs();
            let then = if self.problem.is_none() { "; it was attached again" } else { "" };
            hooks.problems.push(format!("{what} {ago} s ago{then}"));
        }
        if let Some(PendingSwitch { why, serves }) = &self.waiting {
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
            hook_state: Mutex::new(HookState { notes, ..HookState::default() }),
            mode: Mutex::new(mode),
        }
    }

    /// As [`Datapath::apply`]; each failure is logged once, and kept for [`SharedDatapath::errors`].
    pub fn apply(&self, table: &Table) {
        let applied = lock(&self.datapath).apply(table);
        let waiting = applied.as_ref().err().map(PendingSwitch::of);
        let former = std::mem::replace(&mut lock(&self.hook_state).waiting, waiting.clone());
        if let Some(PendingSwitch { why, .. }) = &waiting
            && former.is_none_or(|former| former.why != *why)
        {
            tracing::error!("{why}");
        }
        let errors = applied.unwrap_or_default();
        let is_transient = errors.values().any(ReconcileError::is_transient);
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
            let more = counted(new.len() - MAX_NAMED, "more service");
            tracing::error!("{more} not in the kernel as wanted: see `nohop services`");
        }
        *last = Errors { reasons, is_transient };
    }

    /// Whether applying the last table again may succeed.
    pub fn is_behind(&self) -> bool {
        lock(&self.errors).is_transient || lock(&self.hook_state).waiting.is_some()
    }

    /// The services of the last table that failed to apply, each with the reason.
    pub fn errors(&self) -> BTreeMap<Arc<str>, String> {
        lock(&self.errors).reasons.clone()
    }

    /// Why this service failed to apply; `None` if it didn't.
    pub fn error(&self, name: &str) -> Option<String> {
        lock(&self.errors).reasons.get(name).cloned()
    }

    /// As [`Datapath::indices`].
    pub fn indices(&self, name: &str) -> Option<Indices> {
        lock(&self.datapath).indices(name)
    }

    /// As [`Datapath::service_indices`].
    pub fn service_indices(&self) -> Vec<(Arc<str>, u32, BackendIndices)> {
        lock(&self.datapath).service_indices()
    }

    /// As [`Datapath::tcp_terminator`].
    pub fn tcp_terminator(&self) -> TcpTerminator {
        lock(&self.datapath).tcp_terminator().clone()
    }

    /// As [`Datapath::counts_in_flight`].
    pub fn counts_in_flight(&self) -> bool {
        lock(&self.datapath).counts_in_flight()
    }

    /// As [`Datapath::set_trace`].
    pub fn set_trace(&self, trace: Option<(Duration, u32)>) {
        lock(&self.datapath).set_trace(trace);
    }

    /// As [`Datapath::is_adopted`].
    pub fn is_adopted(&self) -> bool {
        lock(&self.datapath).is_adopted()
    }

    /// As [`Datapath::limits`], as text.
    pub fn limits(&self) -> Vec<String> {
        lock(&self.datapath).limits().iter().map(ToString::to_string).collect()
    }

    /// As [`Datapath::unit_status`].
    pub fn unit_status(&self) -> Vec<UnitHealth> {
        lock(&self.datapath).unit_status()
    }

    /// As [`Datapath::configure_names`].
    pub fn configure_names(&self, settings: NamesSettings) {
        lock(&self.datapath).configure_names(settings);
    }

    /// As [`Datapath::set_names_ready`].
    pub fn set_names_ready(&self, is_ready: bool) {
        lock(&self.datapath).set_names_ready(is_ready);
    }

    /// As [`Datapath::stop_interception`].
    pub fn stop_interception(&self) {
        lock(&self.datapath).stop_interception();
    }

    /// As [`Datapath::set_names_detached`].
    pub fn set_names_detached(&self, is_detached: bool) {
        lock(&self.datapath).set_names_detached(is_detached);
    }

    /// As [`Datapath::configure_intercept`].
    pub fn configure_intercept(&self, settings: Option<InterceptSettings>) {
        lock(&self.datapath).configure_intercept(settings);
    }

    /// As [`Datapath::search_ended`].
    pub fn search_ended(&self) -> Arc<Notify> {
        lock(&self.datapath).search_ended()
    }

    /// As [`Datapath::take_search`].
    pub fn take_search(&self) {
        lock(&self.datapath).take_search();
    }

    /// As [`Datapath::intercept_counts`].
    pub fn intercept_counts(&self) -> Vec<(&'static str, u64)> {
        lock(&self.datapath).intercept_counts()
    }

    /// As [`Datapath::configure_edge`].
    pub fn configure_edge(&self, options: Option<EdgeOptions>) {
        lock(&self.datapath).configure_edge(options);
    }

    /// As [`Datapath::edge_status`].
    pub fn edge_status(&self) -> Option<EdgeStatus> {
        lock(&self.datapath).edge_status()
    }

    /// The flows through the edge, in no order. Changes don't wait while they are read.
    pub fn edge_flows(&self) -> Vec<EdgeFlow> {
        let reader = lock(&self.datapath).edge_flow_reader();
        reader.map_or_else(Vec::new, |reader| reader.flows())
    }

    /// As [`Datapath::edge_counts`].
    pub fn edge_counts(&self) -> Vec<(&'static str, u64)> {
        lock(&self.datapath).edge_counts()
    }

    /// Verifies by queries that the kernel's answers arrive on `lo`. Blocks up to four seconds.
    pub fn probe_names(&self) {
        let prober = lock(&self.datapath).names_prober();
        if let Some(prober) = prober {
            let results = prober.probe();
            lock(&self.datapath).record_names_probes(results);
        }
    }

    /// As [`Datapath::names_counters`].
    pub fn names_counters(&self) -> NamesCounters {
        lock(&self.datapath).names_counters()
    }

    /// As [`Datapath::pressure`].
    pub fn pressure(&self) -> Vec<(&'static str, Pressure)> {
        lock(&self.datapath).pressure()
    }

    /// As [`Datapath::configure_balance`].
    pub fn configure_balance(&self, balance: &BalanceConfig) {
        lock(&self.datapath).configure_balance(balance);
    }

    /// As [`Datapath::heartbeat`].
    pub fn heartbeat(&self, table_age: Option<Duration>) {
        lock(&self.datapath).heartbeat(table_age);
    }

    /// As [`Datapath::set_max_age`].
    pub fn set_max_age(&self, max_age: Option<Duration>) {
        lock(&self.datapath).set_max_age(max_age);
    }

    /// Checks every link, and attaches again what is detached. Returns whether all hooks were
    /// attached.
    pub fn check_hooks(&self) -> bool {
        let mut datapath = lock(&self.datapath);
        let attachment = datapath.fix();
        let scope = datapath.scope().display().to_string();
        let notes: Vec<String> = datapath.notes().cloned().collect();
        drop(datapath);
        // Changes don't wait for all of it. The lock isn't fair: without a pause this thread would take it again
        // before one that waits. What is left of millions of flows is for the next check.
        let until = Instant::now() + SWEEP_FOR;
        while lock(&self.datapath).sweep_edge_on() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut hook_state = lock(&self.hook_state);
        for note in notes.iter().filter(|note| !hook_state.notes.contains(note)) {
            tracing::warn!("{note}");
        }
        hook_state.notes = notes;
        if attachment.problem.is_some() && hook_state.problem != attachment.problem {
            tracing::error!(
                "the hooks aren't attached: {}",
                attachment.problem.as_deref().unwrap_or_default()
            );
        }
        hook_state.problem = attachment.problem;
        if attachment.lost.is_empty() {
            return hook_state.problem.is_none();
        }
        let lost = attachment.lost.into_iter().collect::<Vec<_>>().join(", ");
        if hook_state.problem.is_none() {
            tracing::warn!("something detached {lost} from {scope}: attached again");
        }
        hook_state.lost = Some((Instant::now(), format!("something detached {lost} from {scope}")));
        false
    }

    /// Sets the problems of the routes, and logs new ones.
    pub fn set_route_problems(&self, problems: Vec<String>) {
        let mut hook_state = lock(&self.hook_state);
        for problem in problems.iter().filter(|problem| !hook_state.routes.contains(problem)) {
            tracing::error!("{problem}");
        }
        hook_state.routes = problems;
    }

    /// Verifies by a probe connection from inside the scope that the hooks run. Blocks up to four seconds.
    pub fn probe_hooks(&self) {
        let (prober, are_ours) = {
            let datapath = lock(&self.datapath);
            (datapath.prober(), datapath.are_hooks_ours())
        };
        // An earlier daemon's programs don't report here.
        if !are_ours {
            return;
        }
        let unproven = match prober.probe() {
            ProbeResult::Seen(probe) => {
                lock(&self.datapath).record_probe(probe);
                None
            }
            ProbeResult::NotSeen => Some((
                "a probe connection from inside the cgroup didn't meet the hooks: is --cgroup below \
                 the hierarchy's real root, and not hidden by a cgroup namespace?"
                    .to_owned(),
                true,
            )),
            ProbeResult::Failed(reason) => {
                Some((format!("no probe connection from inside the cgroup: {reason}"), false))
            }
        };
        let mut hook_state = lock(&self.hook_state);
        if hook_state.unproven != unproven {
            match &unproven {
                Some((reason, _)) => tracing::warn!("{reason}"),
                None => tracing::info!("the probe connection meets the hooks again"),
            }
            hook_state.unproven = unproven;
        }
    }

    /// Whether connections are translated.
    pub fn hooks(&self) -> HookHealth {
        lock(&self.hook_state).hooks(&self.mode())
    }

    /// Sets the mode, and logs each change.
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

    /// The present mode.
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

    /// As [`Datapath::leave`].
    pub fn leave(&self) {
        lock(&self.datapath).leave();
    }

    /// As [`Datapath::detach`].
    pub fn detach(&self) {
        lock(&self.datapath).detach();
    }
}

/// A panic while it was locked leaves its data consistent, because every step does.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hooks(waiting: Option<DatapathError>, problem: Option<&str>) -> HookHealth {
        let waiting = waiting.as_ref().map(PendingSwitch::of);
        let problem = problem.map(str::to_owned);
        HookState { waiting, problem, ..HookState::default() }.hooks(&Mode::Translate)
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
