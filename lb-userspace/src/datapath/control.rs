//! The control of the kernel side: it is brought to a table, watched and left.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lb_common::{Control, Counter, RejectMethod};

use super::activity::Usage;
use super::bpf::netns_cookie;
use super::error::DatapathError;
use super::events::Reports;
use super::features::{Features, Limit};
use super::kernel::{ControlBlock, Counters, KernelMaps};
use super::links::{self, Attachment, ServedCgroup, Units};
use super::pins::{PinnedMaps, Pins, monotonic_ns};
use super::reconcile::{ApplyError, Indices, Pressure, Reconciler};
use super::socket_terminator::Disconnector;
use super::units::UnitStatus;
use super::{bypass, probe};
use crate::table::Table;

/// The kernel side of a daemon.
#[derive(Debug)]
pub struct Datapath {
    pub(super) reconciler: Reconciler<KernelMaps>,
    pub(super) counters: Counters,
    pub(super) usage: Usage,
    pub(super) board: ControlBlock,
    pub(super) units: Units,
    pub(super) pins: Pins,
    pub(super) pinned_maps: PinnedMaps,
    pub(super) disconnector: Disconnector,
    pub(super) features: Features,
    pub(super) excluded: Vec<PathBuf>,
    /// What an operator should know of what is served and what is bypassed.
    pub(super) notes: Vec<String>,
    /// The same, of the cgroups that are bypassed.
    pub(super) exclusions: Vec<String>,
    pub(super) pool_network: Ipv4Addr,
    pub(super) is_adopted: bool,
}

impl Datapath {
    /// Says who this daemon is.
    pub(super) fn introduce(&self, host_netns: Option<u64>) {
        let mut daemon = self.board.daemon();
        match host_netns.map_or_else(netns_cookie, Ok) {
            Ok(cookie) => daemon.host_netns = cookie,
            Err(error) => tracing::info!(
                "this kernel doesn't tell the network namespace's cookie ({error}): it is learnt \
                 from a connect"
            ),
        }
        daemon.pid = std::process::id().into();
        daemon.tgid = daemon.pid;
        daemon.heartbeat_ns = monotonic_ns();
        self.board.set_daemon(daemon);
    }

    pub(super) fn look_up_excluded(&mut self) {
        // Without them the programs don't look either.
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

    /// What an operator should know of whose connections are translated and whose are left alone.
    pub fn notes(&self) -> impl Iterator<Item = &String> {
        self.notes.iter().chain(&self.exclusions)
    }

    /// Brings the maps to `table`. Returns the services that couldn't be brought there, each with
    /// the reason; their former state serves on, and the next call tries them again.
    ///
    /// # Errors
    /// When the maps were new and the hooks couldn't be switched to them, or don't lead to a service
    /// from everywhere that the former ones do ([`DatapathError::HoldsLess`]): the former ones go on.
    pub fn apply(
        &mut self,
        table: &Table,
    ) -> Result<BTreeMap<Arc<str>, ApplyError>, DatapathError> {
        let errors = self.reconciler.apply(table);
        // What holds less must not take the place of what works.
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
        self.disconnector.disconnect(self.reconciler.take_left_udp());
        let daemon = self.board.daemon();
        self.board.set_daemon(Control {
            is_synced: 1,
            table_generation: table.generation,
            ..daemon
        });
        if !self.units.are_switched() {
            self.units.switch(&self.pins)?;
        }
        self.reconciler.forget_served();
        Ok(errors)
    }

    /// Whether an earlier daemon's hooks serve the scope. Where the pins can't be read they may.
    fn are_others_live(&self) -> bool {
        !self.units.are_switched()
            && ServedCgroup::open(self.scope())
                .and_then(|cgroup| links::are_attached(&self.pins, &cgroup))
                .unwrap_or(true)
    }

    /// Whether the maps are an earlier daemon's.
    pub fn is_adopted(&self) -> bool {
        self.is_adopted
    }

    /// The services that the maps hold, each with its VIPs.
    pub fn names(&self) -> Vec<(Arc<str>, Vec<IpAddr>)> {
        self.reconciler.names().map(|(name, vips)| (name.clone(), vips.collect())).collect()
    }

    /// The services that the kernel has backends for, in lower case.
    pub fn in_use(&self) -> Vec<Arc<str>> {
        let serves =
            |name: &str| self.indices(name).is_some_and(|indices| !indices.backends.is_empty());
        self.reconciler.names().map(|(name, _)| name.clone()).filter(|name| serves(name)).collect()
    }

    /// Looks at every link and pin, and attaches and pins again what somebody took away. Frees what
    /// the last changes gave up.
    pub fn fix(&mut self) -> Attachment {
        self.look_up_excluded();
        self.reconciler.recycle();
        let pinned = self.pins.fix().and_then(|()| self.pinned_maps.fix());
        let mut attachment = self.units.fix(&self.pins);
        if let Err(error) = pinned {
            attachment.problem.get_or_insert(error.to_string());
        }
        attachment
    }

    /// Says that the daemon lives, and how old the table is, if it is known.
    pub fn beat(&self, table_age: Option<Duration>) {
        let now = monotonic_ns();
        let mut daemon = self.board.daemon();
        daemon.heartbeat_ns = now;
        if let Some(age) = table_age {
            daemon.table_ns = now.saturating_sub(age.as_nanos() as u64);
        }
        self.board.set_daemon(daemon);
    }

    /// How each unit does.
    pub fn unit_status(&self) -> Vec<UnitStatus> {
        self.units.status()
    }

    /// The cgroup whose processes are served.
    pub fn scope(&self) -> &Path {
        self.units.scope()
    }

    /// Whether the hooks run this datapath's programs, and not an earlier daemon's.
    pub fn are_hooks_ours(&self) -> bool {
        self.units.are_switched()
    }

    /// What connects to prove that the hooks run.
    pub fn prober(&self) -> probe::Prober {
        probe::Prober::new(self.board.clone(), self.pool_network, self.units.scope())
    }

    /// Takes note of what a connect() of our own showed. The network namespace's cookie that an
    /// earlier daemon learnt gives way to the one that the hook saw now.
    pub fn learn(&self, probe: probe::Seen) {
        let daemon = self.board.daemon();
        // From inside a process namespace our own number isn't the kernel's.
        let tgid = if probe.is_own { probe.seen.tgid } else { daemon.tgid };
        let host_netns = probe.seen.netns;
        if (tgid, host_netns) != (daemon.tgid, daemon.host_netns) {
            self.board.set_daemon(Control { tgid, host_netns, ..daemon });
        }
    }

    /// Has connections only counted from now on, or translated; at once, without a reload.
    pub fn set_shadow(&self, is_shadow: bool) {
        let daemon = Control { is_shadow: is_shadow.into(), ..self.board.daemon() };
        self.board.set_daemon(daemon);
    }

    /// Whether connections are only counted.
    pub fn is_shadow(&self) -> bool {
        self.board.daemon().is_shadow != 0
    }

    /// The services that were connected to since the last call or, at first, since the start; those that
    /// were refused or only counted too. Datagrams of a flow that goes on are no connections.
    pub fn active_since_last(&mut self) -> Vec<Arc<str>> {
        self.usage.active_since_last(self.reconciler.services())
    }

    /// What tells of connections of services that aren't followed, once.
    ///
    /// # Errors
    /// When it was taken already, or can't be mapped into memory.
    pub fn take_reports(&mut self) -> Result<Reports, DatapathError> {
        let names = self.reconciler.maps_mut().names();
        let mut loaded = self.units.loaded_mut();
        let map = loaded.find_map(|ebpf| ebpf.take_map("EVENTS"));
        Reports::new(map.ok_or(DatapathError::Object { missing: "EVENTS" })?, names)
    }

    /// The indices that the kernel knows a service and its backends by.
    pub fn indices(&self, name: &str) -> Option<Indices> {
        self.reconciler.indices(name)
    }

    /// The index that the kernel knows each service by.
    pub fn service_indices(&self) -> Vec<(Arc<str>, u32)> {
        self.reconciler.service_indices().map(|(name, idx)| (name.clone(), idx)).collect()
    }

    /// How full each map is.
    pub fn pressure(&self) -> Vec<(&'static str, Pressure)> {
        self.reconciler.pressure()
    }

    /// A handle to what the programs count.
    pub fn counters(&self) -> Counters {
        self.counters.clone()
    }

    /// How this kernel refuses a connection.
    pub fn refusal(&self) -> RejectMethod {
        self.features.refusal
    }

    /// What this kernel lacks, without which nohop works all the same.
    pub fn limits(&self) -> &[Limit] {
        &self.features.limits
    }

    /// What reads the programs' log, once.
    pub fn take_voice(&mut self) -> Option<aya_log::EbpfLogger<&'static dyn log::Log>> {
        aya_log::EbpfLogger::init(self.units.loaded_mut().next()?)
            .inspect_err(|error| tracing::warn!("the programs' log can't be read: {error}"))
            .ok()
    }

    /// Leaves everything as it is, for the next daemon.
    pub fn keep(&self) {
        // Another process may get our number.
        self.board.set_daemon(Control { pid: 0, tgid: 0, ..self.board.daemon() });
    }

    /// Detaches the programs, what translates back last, and takes all pins away. It is no error if
    /// somebody did already.
    pub fn detach(&mut self) {
        self.units.detach(&self.pins);
        if let Err(error) = self.pins.remove_all() {
            tracing::warn!("{error}");
        }
    }
}

/// What keeps `datapath.exclude_cgroups` from excluding what it names: patterns that match nothing now,
/// and cgroups that there is no room for.
pub fn exclusion_problems(patterns: &[PathBuf]) -> Vec<String> {
    let mut found = bypass::find(patterns);
    found.fit(&BTreeMap::new());
    found.problems
}

/// The counters that no service owns, with the names they have in `status`.
pub const COUNTERS: [(&str, Counter); 9] = [
    ("refused_no_frontend", Counter::RefusedNoFrontend),
    ("storage_alloc_failed", Counter::StorageAllocFailed),
    ("inconsistent", Counter::Inconsistent),
    ("bypassed", Counter::Bypassed),
    ("stale_backend", Counter::StaleBackend),
    ("shadowed", Counter::Shadowed),
    ("shadowed_no_frontend", Counter::ShadowedNoFrontend),
    ("udp_no_frontend", Counter::UdpNoFrontend),
    ("flows_full", Counter::FlowsFull),
];
