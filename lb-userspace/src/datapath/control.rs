//! Controls the kernel side: applies tables, watches the hooks, detaches or keeps them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lb_common::{
    BalanceSettings, Control, Counter, MaglevKey, NamesCounters, RejectMethod, SlowStart,
    TraceSwitch,
};

use tokio::sync::Notify;

use super::activity::Usage;
use super::bpf::netns_cookie;
use super::edge::{Edge, EdgeOptions, EdgeStatus, FlowReader};
use super::error::DatapathError;
use super::events::Reports;
use super::features::{Features, Limit};
use super::former::FormerPins;
use super::in_flight::{Recount, Recounter};
use super::intercept::{Intercept, InterceptSettings};
use super::kernel::{ControlBlock, Counters, KernelMaps};
use super::links::{self, Attachment, ServedCgroup, Units};
use super::names::{Names, NamesProber, NamesSettings, ProbedAnswer};
use super::pins::{PinnedMaps, Pins, monotonic_ns};
use super::reconcile::{BackendIndices, Indices, Pressure, ReconcileError, Reconciler};
use super::socket_terminator::SocketTerminator;
use super::tcp_terminator::TcpTerminator;
use super::trace::TraceEvents;
use super::units::{OUTCOMES, UnitHealth};
use super::{bypass, probe};
use crate::config::{AffinityKey, BalanceConfig, EjectConfig};
use crate::table::Table;

/// The kernel side of a daemon.
#[derive(Debug)]
pub struct Datapath {
    pub(super) reconciler: Reconciler<KernelMaps>,
    pub(super) counters: Counters,
    pub(super) usage: Usage,
    pub(super) control_block: ControlBlock,
    pub(super) units: Units,
    pub(super) names: Names,
    pub(super) intercept: Intercept,
    pub(super) edge: Edge,
    pub(super) pins: Pins,
    pub(super) pinned_maps: PinnedMaps,
    /// What an earlier daemon left in another directory, until there is a table.
    pub(super) former: FormerPins,
    pub(super) socket_terminator: SocketTerminator,
    pub(super) recounter: Recounter,
    /// How backends are to be chosen and ejected.
    pub(super) balance: BalanceSettings,
    pub(super) tcp_terminator: TcpTerminator,
    pub(super) features: Features,
    pub(super) excluded: Vec<PathBuf>,
    /// Notes for the operator about what is served.
    pub(super) notes: Vec<String>,
    /// Notes about bypassed cgroups.
    pub(super) exclusions: Vec<String>,
    pub(super) pool_network: Ipv4Addr,
    pub(super) is_adopted: bool,
}

impl Datapath {
    /// Publishes this daemon's process id and network namespace.
    pub(super) fn publish_identity(&self, host_netns: Option<u64>) {
        let mut daemon = self.control_block.daemon();
        match host_netns.map_or_else(netns_cookie, Ok) {
            Ok(cookie) => daemon.host_netns = cookie,
            Err(error) => tracing::info!(
                "this kernel doesn't report the network namespace's cookie ({error}): a probe \
                 connection will"
            ),
        }
        daemon.pid = std::process::id().into();
        daemon.tgid = daemon.pid;
        daemon.heartbeat_ns = monotonic_ns();
        self.names.heartbeat(daemon.heartbeat_ns);
        self.edge.set_heartbeat(daemon.heartbeat_ns);
        daemon.trace = TraceSwitch::default();
        daemon.is_inherited = daemon.is_synced;
        // Until what releases them is attached, which comes last.
        daemon.keeps_records = 0;
        self.control_block.set_daemon(daemon);
    }

    pub(super) fn resolve_bypass(&mut self) {
        // Without them the programs don't check either.
        if self.excluded.is_empty() {
            return;
        }
        let mut found = bypass::find(&self.excluded);
        let map = self.reconciler.maps_mut().bypass();
        let set = map.cgroups().and_then(|present| map.set(&found.fit(&present)));
        if let Err(error) = set {
            found.problems.push(format!(
                "datapath.exclude_cgroups: the kernel refused a change of the map BYPASS: {error}"
            ));
        }
        self.exclusions = found.problems;
    }

    /// Notes for the operator about which connections are translated or bypassed.
    pub fn notes(&self) -> impl Iterator<Item = &String> {
        self.notes.iter().chain(&self.exclusions)
    }

    /// Updates the maps to `table`. Returns the services that failed, each with the reason; their
    /// former state keeps serving, and the next call retries them.
    ///
    /// # Errors
    /// When the maps are new and the hooks couldn't be switched to them, or they lack a frontend that
    /// the former maps have ([`DatapathError::HoldsLess`]): the former maps stay in use.
    pub fn apply(
        &mut self,
        table: &Table,
    ) -> Result<BTreeMap<Arc<str>, ReconcileError>, DatapathError> {
        self.edge.prepare(table);
        let errors = self.reconciler.apply(table, now_ms());
        // Maps with fewer services must not replace those in use.
        let unserved = self.reconciler.unserved(table, &errors);
        if let Some((name, error)) = unserved.first_key_value()
            && self.are_others_live()
        {
            return Err(DatapathError::HoldsLess {
                n_services: unserved.len(),
                name: name.to_string(),
                reason: error.to_string(),
            });
        }
        self.socket_terminator.disconnect(self.reconciler.take_removed_udp());
        let daemon = self.control_block.daemon();
        self.control_block.set_daemon(Control {
            is_synced: 1,
            is_inherited: 0,
            table_generation: table.generation,
            ..daemon
        });
        if self.reconciler.take_renewed() {
            self.recounter.request();
        }
        if !self.units.are_switched() {
            self.switch()?;
        }
        self.reconciler.clear_served();
        self.names.apply(table, &self.pins);
        self.apply_edge();
        Ok(errors)
    }

    /// Updates the public frontends to the table that was applied last.
    fn apply_edge(&mut self) {
        let reconciler = &self.reconciler;
        self.edge.apply(|name| Some(reconciler.indices(name)?.service));
    }

    /// Makes the hooks run this datapath's programs.
    ///
    /// # Errors
    /// When the kernel refuses a required unit.
    pub(super) fn switch(&mut self) -> Result<(), DatapathError> {
        let mut of_names = Vec::new();
        let switched = self.units.switch(&self.pins, &mut of_names);
        self.names.take_place_of(of_names);
        self.follow_outcomes(switched?);
        Ok(())
    }

    /// Has silence eject, and connections kept as records, while the ends of connections are seen. Those
    /// that are pending after a gap may have ended in it, so they are forgotten; the recount that follows
    /// finds those that haven't.
    fn follow_outcomes(&self, is_after_gap: bool) {
        if is_after_gap {
            self.counters.forget_all_pending();
        }
        // Until then an earlier daemon's programs run.
        let is_unseen = self.units.are_switched() && !self.counts_in_flight();
        let silence = if is_unseen { 0 } else { self.balance.silence };
        let balance = BalanceSettings { silence, ..self.balance };
        // What releases records is attached last.
        let keeps_records = u64::from(self.units.are_switched() && self.counts_in_flight());
        let control = self.control_block.daemon();
        if (control.balance, control.keeps_records) != (balance, keeps_records) {
            self.control_block.set_daemon(Control { balance, keeps_records, ..control });
        }
    }

    /// Whether an earlier daemon's hooks serve the scope. If the pins can't be read, they may.
    fn are_others_live(&self) -> bool {
        !self.units.are_switched()
            && ServedCgroup::open(self.scope())
                .and_then(|cgroup| links::are_attached(&self.pins, &cgroup))
                .unwrap_or(true)
    }

    /// Closes TCP connections by VIPs.
    pub fn tcp_terminator(&self) -> &TcpTerminator {
        &self.tcp_terminator
    }

    /// Whether the maps were taken over from an earlier daemon.
    pub fn is_adopted(&self) -> bool {
        self.is_adopted
    }

    /// The services in the maps, each with its VIPs.
    pub fn names(&self) -> Vec<(Arc<str>, Vec<IpAddr>)> {
        self.reconciler.names().map(|(name, vips)| (name.clone(), vips.collect())).collect()
    }

    /// The services that the kernel has backends for, in lower case.
    pub fn in_use(&self) -> Vec<Arc<str>> {
        let serves =
            |name: &str| self.indices(name).is_some_and(|indices| !indices.backends.is_empty());
        self.reconciler.names().map(|(name, _)| name.clone()).filter(|name| serves(name)).collect()
    }

    /// The backends that the kernel has, by service, in lower case.
    pub fn served(&self) -> Vec<(Arc<str>, BTreeSet<SocketAddr>)> {
        let backends = |name: &Arc<str>| {
            let backends = self.indices(name)?.backends.into_keys().collect();
            Some((name.clone(), backends))
        };
        self.reconciler.names().filter_map(|(name, _)| backends(name)).collect()
    }

    /// Checks every link and pin, and attaches and pins again what is missing. Frees the reconciler's
    /// quarantine, and ends the ramps of backends that have come to their full share.
    pub fn fix(&mut self) -> Attachment {
        self.resolve_bypass();
        self.reconciler.end_ramps(now_ms());
        self.reconciler.recycle();
        let pinned = self.pins.fix().and_then(|()| self.pinned_maps.fix());
        let mut attachment = self.units.fix(&self.pins);
        self.follow_outcomes(attachment.is_after_gap);
        self.names.fix(&self.pins);
        let reconciler = &self.reconciler;
        self.edge.fix(&self.pins, |name| Some(reconciler.indices(name)?.service));
        let control = self.control_block.daemon();
        let has_table = control.is_synced != 0 && control.is_inherited == 0;
        if !self.former.is_empty() && self.units.are_switched() && has_table {
            self.former.end();
        }
        if self.counts_in_flight() {
            self.recounter.work(attachment.is_after_gap);
        }
        if let Err(error) = pinned {
            attachment.problem.get_or_insert(error.to_string());
        }
        attachment
    }

    /// Sets how backends are chosen, at once and without a reload. The algorithm of each service is the
    /// table's.
    pub fn configure_balance(&mut self, balance: &BalanceConfig) {
        self.reconciler.set_slow_start(balance.slow_start);
        self.set_balance(balance_settings(balance));
    }

    /// Writes the daemon's heartbeat, and the table's age if it is known.
    pub fn heartbeat(&self, table_age: Option<Duration>) {
        let now = monotonic_ns();
        let mut daemon = self.control_block.daemon();
        daemon.heartbeat_ns = now;
        self.names.heartbeat(now);
        self.edge.set_heartbeat(now);
        self.intercept.heartbeat(now);
        // What the maps have of an earlier daemon has no news.
        if let Some(age) = table_age.filter(|_| daemon.is_inherited == 0) {
            daemon.table_ns = now.saturating_sub(age.as_nanos() as u64);
        }
        self.control_block.set_daemon(daemon);
    }

    /// Sets how old the table may be while no daemon is alive; `None` for any age. It takes effect in the
    /// programs, by the age that [`Datapath::heartbeat`] wrote last; the time for which the machine is
    /// suspended after that doesn't count.
    pub fn set_max_age(&self, max_age: Option<Duration>) {
        // A zero would mean any age.
        let max_age_ns = max_age.map_or(0, |age| (age.as_nanos() as u64).max(1));
        let control = self.control_block.daemon();
        if control.max_age_ns != max_age_ns {
            self.control_block.set_daemon(Control { max_age_ns, ..control });
        }
    }

    /// The state of each unit.
    pub fn unit_status(&self) -> Vec<UnitHealth> {
        let mut units = self.units.status();
        units.push(self.names.status());
        units.extend(self.intercept.status());
        units.extend(self.edge.health());
        units
    }

    /// Sets what this node does as an edge; `None` for nothing.
    pub fn configure_edge(&mut self, options: Option<EdgeOptions>) {
        self.edge.configure(options, &self.pins);
        self.apply_edge();
    }

    /// Ends the flows through the edge that would be over so much later.
    pub fn sweep_edge_after(&mut self, time: Duration) {
        self.edge.sweep_after(time);
    }

    /// Goes on with ending flows through the edge that [`Datapath::fix`] has begun, by a part. Returns whether there is
    /// more.
    pub fn sweep_edge_on(&mut self) -> bool {
        self.edge.sweep_on()
    }

    /// Has the edge prove again that its programs translate.
    pub fn prove_edge_again(&mut self) {
        self.edge.prove_again();
    }

    /// How the edge does; `None` where this node is none.
    pub fn edge_status(&self) -> Option<EdgeStatus> {
        self.edge.status()
    }

    /// Reads the flows through the edge without this; `None` where there is none.
    pub fn edge_flow_reader(&self) -> Option<FlowReader> {
        self.edge.flow_reader()
    }

    /// What the edge decided on packets, by name.
    pub fn edge_counts(&self) -> Vec<(&'static str, u64)> {
        self.edge.counts()
    }

    /// Sets how the kernel answers names.
    pub fn configure_names(&mut self, settings: NamesSettings) {
        self.names.configure(settings, &self.pins);
    }

    /// Whether the daemon can answer names from its table. Until it can, and from when it can't any more,
    /// the kernel answers as while no daemon runs.
    pub fn set_names_ready(&mut self, is_ready: bool) {
        self.names.set_ready(is_ready);
    }

    /// Intercepts no DNS queries any more, until the next heartbeat.
    pub fn stop_interception(&self) {
        self.intercept.stop();
    }

    /// Whether a required hook was found detached: names are SERVFAIL then.
    pub fn set_names_detached(&mut self, is_detached: bool) {
        self.names.set_detached(is_detached);
        self.intercept.set_detached(is_detached);
    }

    /// Sets whose DNS queries are intercepted, `None` for those of no process, and follows their
    /// cgroups as they come and go.
    pub fn configure_intercept(&mut self, settings: Option<InterceptSettings>) {
        // It may be an earlier daemon's.
        self.intercept.set_shadow(self.is_shadow());
        self.intercept.configure(settings, &self.pins, self.units.scope());
    }

    /// Notified when [`Datapath::take_search`] has something to do.
    pub fn search_ended(&self) -> Arc<Notify> {
        self.intercept.search_ended()
    }

    /// Takes over which DNS servers a search has found in the cgroups whose queries are intercepted.
    pub fn take_search(&mut self) {
        self.intercept.take_search(self.units.scope());
    }

    /// The same, and waits for it.
    pub fn finish_search(&mut self) {
        self.intercept.finish_search(self.units.scope());
    }

    /// What was decided on queries that may be intercepted, by name; none while none may.
    pub fn intercept_counts(&self) -> Vec<(&'static str, u64)> {
        self.intercept.counts()
    }

    /// As [`Names::prober`].
    pub fn names_prober(&self) -> Option<NamesProber> {
        self.names.prober()
    }

    /// As [`Names::record_probes`].
    pub fn record_names_probes(&mut self, results: Vec<(u64, ProbedAnswer)>) {
        self.names.record_probes(results);
    }

    /// What the unit `names` did.
    pub fn names_counters(&self) -> NamesCounters {
        self.names.counters()
    }

    /// Whether the connections in flight are counted: the unit `outcomes` is attached.
    pub fn counts_in_flight(&self) -> bool {
        self.units.is_attached(OUTCOMES.name)
    }

    /// Counts the connections in flight and corrects what the programs have; [`Datapath::fix`] does so
    /// on a thread of its own, when that is due. Blocks for about a microsecond a TCP socket of the
    /// host.
    pub fn recount(&self) -> Recount {
        self.recount_at(Instant::now())
    }

    /// The same, as if it were `now`: records of sockets that are gone are freed after a minute.
    pub fn recount_at(&self, now: Instant) -> Recount {
        self.recounter.recount(now)
    }

    /// The number of records of connections that are in use.
    pub fn n_records(&self) -> usize {
        self.recounter.n_records()
    }

    /// The served cgroup.
    pub fn scope(&self) -> &Path {
        self.units.scope()
    }

    /// Whether the hooks run this datapath's programs, and not an earlier daemon's.
    pub fn are_hooks_ours(&self) -> bool {
        self.units.are_switched()
    }

    /// Opens probe connections, which verify that the hooks run.
    pub fn prober(&self) -> probe::Prober {
        probe::Prober::new(self.control_block.clone(), self.pool_network, self.units.scope())
    }

    /// Records the process id and network namespace that the hook saw of a probe connection.
    pub fn record_probe(&self, observed: probe::Observed) {
        let daemon = self.control_block.daemon();
        // In a PID namespace our process id isn't the kernel's.
        let tgid = if observed.is_own { observed.probe.tgid } else { daemon.tgid };
        let host_netns = observed.probe.netns;
        if (tgid, host_netns) != (daemon.tgid, daemon.host_netns) {
            self.control_block.set_daemon(Control { tgid, host_netns, ..daemon });
        }
    }

    /// Sets how backends are chosen and ejected, at once; but silence ejects only while the unit
    /// `outcomes` is attached.
    pub fn set_balance(&mut self, balance: BalanceSettings) {
        self.balance = balance;
        self.follow_outcomes(false);
    }

    /// Switches shadow mode on or off, at once and without a reload.
    pub fn set_shadow(&mut self, is_shadow: bool) {
        let daemon = Control { is_shadow: is_shadow.into(), ..self.control_block.daemon() };
        self.control_block.set_daemon(daemon);
        self.names.set_shadow(is_shadow);
        self.intercept.set_shadow(is_shadow);
    }

    /// Has the programs report connections one by one, for a while: those of sockets whose hash isn't
    /// above this; or none.
    pub fn set_trace(&self, trace: Option<(Duration, u32)>) {
        self.edge.ended().set_traced(trace.is_some());
        let trace = trace.map_or_else(TraceSwitch::default, |(time, max_hash)| {
            let until_ns = monotonic_ns().saturating_add(time.as_nanos() as u64);
            TraceSwitch { until_ns, max_hash, padding: 0 }
        });
        self.control_block.set_daemon(Control { trace, ..self.control_block.daemon() });
    }

    /// Takes the reader of events of traced connections, once.
    ///
    /// # Errors
    /// When it can't be mapped into memory.
    pub fn take_trace_events(&mut self) -> Result<TraceEvents, DatapathError> {
        let names = self.reconciler.maps_mut().names();
        let maps = self.units.loaded_mut().filter_map(|ebpf| ebpf.take_map("TRACE"));
        let (flows, ended) = (self.edge.take_ring("TRACE"), self.edge.ended().clone());
        TraceEvents::new(maps, flows, ended, names, self.intercept.trace_ring())
    }

    /// Whether connections are only counted.
    pub fn is_shadow(&self) -> bool {
        self.control_block.daemon().is_shadow != 0
    }

    /// The services with connections since the last call, at first since the start, including refused
    /// and only counted ones. Further datagrams of a flow are no connections.
    pub fn active_since_last(&mut self) -> Vec<Arc<str>> {
        let mut active = self.usage.active_since_last(self.reconciler.service_indices());
        active.extend(self.names.active_since_last());
        active
    }

    /// Takes the reader of the programs' events, once.
    ///
    /// # Errors
    /// When it was taken already, or can't be mapped into memory.
    pub fn take_reports(&mut self) -> Result<Reports, DatapathError> {
        let (names, counters) = (self.reconciler.maps_mut().names(), self.counters());
        let mut maps = self.units.loaded_mut().filter_map(|ebpf| ebpf.take_map("EVENTS"));
        // The required unit's, and those of others that are there.
        let first = maps.next().ok_or(DatapathError::Object { missing: "EVENTS" })?;
        let maps = std::iter::once(first).chain(maps).chain(self.edge.take_ring("EVENTS"));
        Reports::new(maps, names, counters)
    }

    /// The indices of a service and its backends in the kernel's maps.
    pub fn indices(&self, name: &str) -> Option<Indices> {
        self.reconciler.indices(name)
    }

    /// The index that the kernel knows each service by, and its backends with theirs.
    pub fn service_indices(&self) -> Vec<(Arc<str>, u32, BackendIndices)> {
        let services = self.reconciler.all_indices();
        services.map(|(name, idx, backends)| (name.clone(), idx, backends.collect())).collect()
    }

    /// How full each map is.
    pub fn pressure(&self) -> Vec<(&'static str, Pressure)> {
        let mut pressure = self.reconciler.pressure();
        pressure.extend(self.edge.pressure());
        pressure
    }

    /// A handle to the programs' counters.
    pub fn counters(&self) -> Counters {
        self.counters.clone()
    }

    /// How this kernel rejects a connection.
    pub fn refusal(&self) -> RejectMethod {
        self.features.refusal
    }

    /// Features that this kernel lacks and nohop can do without.
    pub fn limits(&self) -> &[Limit] {
        &self.features.limits
    }

    /// Takes the reader of the programs' log, once.
    pub fn take_logger(&mut self) -> Option<aya_log::EbpfLogger<&'static dyn log::Log>> {
        aya_log::EbpfLogger::init(self.units.loaded_mut().next()?)
            .inspect_err(|error| tracing::warn!("the programs' log can't be read: {error}"))
            .ok()
    }

    /// Leaves everything attached and pinned, for the next daemon.
    pub fn keep(&self) {
        self.intercept.stop();
        // Another process may get our process id, and queries for us would be refused.
        self.control_block.set_daemon(Control {
            heartbeat_ns: 0,
            pid: 0,
            tgid: 0,
            trace: TraceSwitch::default(),
            ..self.control_block.daemon()
        });
    }

    /// [`keep`](Self::keep), and lets the next daemon have it, though this process may not be able to end yet.
    pub fn leave(&self) {
        self.keep();
        self.pins.unlock();
    }

    /// Detaches the programs, reverse translation last, and removes all pins. Succeeds if they are gone
    /// already.
    pub fn detach(&mut self) {
        self.configure_intercept(None);
        self.names.detach(&self.pins);
        self.edge.detach(&self.pins);
        self.units.detach(&self.pins);
        if let Err(error) = self.pins.remove_all() {
            tracing::warn!("{error}");
        }
        self.pins.unlock();
    }
}

/// The low 32 bits of CLOCK_MONOTONIC in milliseconds.
fn now_ms() -> u32 {
    (monotonic_ns() / 1_000_000) as u32
}

/// The configuration, as the programs read it.
fn balance_settings(balance: &BalanceConfig) -> BalanceSettings {
    let BalanceConfig { key, slow_start, eject, .. } = balance;
    let &EjectConfig { failures, refused, silence, base, max, share } = eject;
    // An hour at most.
    let ms = |time: Duration| time.as_millis() as u32;
    let key = match key {
        AffinityKey::Cgroup => MaglevKey::Cgroup,
        AffinityKey::Netns => MaglevKey::Netns,
        AffinityKey::Source => MaglevKey::Source,
    };
    let slow_start = SlowStart::of(slow_start.map_or(0, |time| time.as_nanos() as u64));
    BalanceSettings {
        refused,
        failures,
        silence,
        key: key as u8,
        // In 1/256.
        share: (u32::from(share.per_mille) * 256 / 1_000) as u16,
        base_ms: ms(base),
        max_ms: ms(max),
        slow_start_per_tick: slow_start.per_tick,
        ..BalanceSettings::default()
    }
}

/// Problems of `datapath.exclude_cgroups`: patterns that match nothing now, and cgroups beyond the map's
/// capacity.
pub fn exclusion_problems(patterns: &[PathBuf]) -> Vec<String> {
    let mut found = bypass::find(patterns);
    found.fit(&BTreeMap::new());
    found.problems
}

/// The global counters, by their names in `status`.
pub const COUNTERS: [(&str, Counter); 14] = [
    ("refused_no_frontend", Counter::RefusedNoFrontend),
    ("storage_alloc_failed", Counter::StorageAllocFailed),
    ("inconsistent", Counter::Inconsistent),
    ("bypassed", Counter::Bypassed),
    ("stale_backend", Counter::StaleBackend),
    ("shadowed", Counter::Shadowed),
    ("shadowed_no_frontend", Counter::ShadowedNoFrontend),
    ("udp_no_frontend", Counter::UdpNoFrontend),
    ("flows_full", Counter::FlowsFull),
    ("trace_lost", Counter::TraceLost),
    ("events_lost", Counter::EventsLost),
    ("client_shown", Counter::ClientShown),
    ("client_no_option", Counter::ClientNoOption),
    ("client_no_syn", Counter::ClientNoSyn),
];

#[cfg(test)]
mod tests {
    use lb_common::EjectionLimits;

    use super::*;
    use crate::config::Share;

    #[test]
    fn the_defaults_are_those_that_were_simulated() {
        let settings = balance_settings(&BalanceConfig::default());
        assert_eq!(settings.limits(), EjectionLimits::default());
        assert_eq!(settings.slow_start_per_tick, SlowStart::of(10_000_000_000).per_tick);
        assert_eq!(MaglevKey::from_number(settings.key), MaglevKey::Cgroup);
    }

    #[test]
    fn all_of_a_share_is_256_and_no_slow_start_is_0() {
        let mut balance = BalanceConfig { slow_start: None, ..BalanceConfig::default() };
        balance.key = AffinityKey::Source;
        for (per_mille, expected) in [(0, 0), (1000, 256), (250, 64)] {
            balance.eject.share = Share { per_mille };
            let settings = balance_settings(&balance);
            assert_eq!((settings.share, settings.slow_start_per_tick), (expected, 0));
            assert_eq!(MaglevKey::from_number(settings.key), MaglevKey::Source);
        }
    }
}
