//! The unit `edge`: packets from outside for public VIPs are sent to backends, by translation of both
//! addresses.
//!
//! Its flows are in pinned maps and outlive the daemon, as do its programs. The frontends follow the table
//! in the same step as those of the unit `connect`: what leads to another service is removed before that
//! one's index can be, and inserted after.

mod attachments;
mod device;
mod flows;
mod frontends;
pub mod kernel;
mod loaded;
mod networks;
mod options;
mod proof;
mod sources;
pub mod status;
mod xdp;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aya::VerifierLogLevel;
use aya::maps::Map;
use lb_common::{
    ANY_PORT, DEFAULT_MAX_FLOWS, EdgeCounter, EdgeServiceRef, FastPath, IPPROTO_TCP, IPPROTO_UDP,
};

use super::error::DatapathError;
use super::in_flight::EdgeRecords;
use super::kernel::Counters;
use super::map_specs::{EDGE, Sizes, edge_shapes};
use super::maps::FrontendKey;
use super::object::processed;
use super::pins::Pins;
use super::reconcile::Pressure;
use super::tc::end_links;
use super::trace::EndedFlows;
use super::units::{UnitHealth, UnitState};
use crate::ordmap::{Diff, OrdMap};
use crate::table::{Service, Table};
pub use attachments::detach_filters;
use attachments::{PROGRAMS, detach_filters_but};
pub use device::{Device, all as interfaces};
pub use flows::FlowReader;
use frontends::NO_SERVICE;
use kernel::{Heartbeat, now_ms};
use loaded::{LoadedEdge, loader, remove_pins};
use options::UNIT;
pub use options::{EdgeOptions, EdgeTimeouts};
pub use sources::of_interfaces as interface_addresses;
pub use status::{EdgeFlow, EdgeFlowState, EdgeInterface, EdgeMode, EdgeStatus, Proof};
pub use xdp::PIN_PREFIX;

/// For how long a VIP that no service has any more is refused rather than left to the host.
const LEFT_FOR: Duration = Duration::from_secs(3_600);

/// The unit.
#[derive(Debug)]
pub struct Edge {
    sizes: Sizes,
    map_creator: Option<PathBuf>,
    counters: Counters,
    records: EdgeRecords,
    options: Option<EdgeOptions>,
    heartbeat: Option<Heartbeat>,
    /// Loaded when it is first configured.
    loaded: Option<Result<LoadedEdge, String>>,
    /// The services of the last table.
    seen: OrdMap<Arc<str>, Arc<Service>>,
    /// Their frontends, each with its service.
    wanted: Arc<BTreeMap<FrontendKey, Arc<str>>>,
    /// Frontends that no service has any more, and since when, as long as there is room. They are VIPs still, to
    /// which nothing else on this host is to answer.
    left: BTreeMap<FrontendKey, Instant>,
    /// Whether there was a table. Until then an earlier daemon's frontends stay: its flows are looked up only
    /// where they lead.
    has_table: bool,
    /// Whether an earlier daemon's is known to be gone.
    is_tidy: bool,
    ended: EndedFlows,
}

impl Edge {
    /// The unit of a datapath with maps of these sizes. `map_creator` is the program that creates maps, so
    /// that they are charged to no memory cgroup. Nothing is loaded yet; an earlier daemon's programs go on.
    pub fn new(
        sizes: &Sizes,
        map_creator: Option<PathBuf>,
        counters: Counters,
        records: EdgeRecords,
        pins: &Pins,
    ) -> Edge {
        Edge {
            sizes: *sizes,
            map_creator,
            counters,
            records,
            options: None,
            heartbeat: Heartbeat::inherited(pins),
            loaded: None,
            seen: OrdMap::new(),
            wanted: Arc::default(),
            left: BTreeMap::new(),
            has_table: false,
            is_tidy: false,
            ended: EndedFlows::default(),
        }
    }

    /// Takes a ring buffer of the loaded object, by its name.
    pub fn take_ring(&mut self, name: &str) -> Option<Map> {
        let Some(Ok(loaded)) = &mut self.loaded else { return None };
        loaded.ebpf.take_map(name)
    }

    /// The flows that the daemon ends, for their reader.
    pub fn ended(&self) -> &EndedFlows {
        &self.ended
    }

    /// Sets what it does; `None` for nothing, which ends what an earlier daemon's did.
    pub fn configure(&mut self, options: Option<EdgeOptions>, pins: &Pins) {
        let Some(wanted) = options else {
            if self.options.is_some() || !self.is_tidy {
                self.detach(pins);
                remove_pins(&self.sizes, pins);
            }
            self.is_tidy = true;
            return;
        };
        let has_ipv6 = wanted.sources.iter().any(IpAddr::is_ipv6);
        let is_resized = |earlier: &EdgeOptions| {
            earlier.max_flows != wanted.max_flows
                || earlier.sources.iter().any(IpAddr::is_ipv6) != has_ipv6
        };
        let is_failed = self.loaded.as_ref().is_some_and(Result::is_err);
        if is_failed || self.options.as_ref().is_some_and(is_resized) {
            self.detach(pins);
        }
        let (sizes, creator) = (&self.sizes, &self.map_creator);
        let records = &self.records;
        let loaded = self.loaded.get_or_insert_with(|| {
            let loaded = LoadedEdge::load(sizes, creator, wanted.max_flows, has_ipv6, pins);
            match &loaded {
                Ok(loaded) => records.set(Some(loaded.maps.records().array().clone())),
                Err(reason) => tracing::error!("the unit {UNIT} doesn't run: {reason}"),
            }
            loaded
        });
        self.heartbeat = None;
        if let Ok(loaded) = loaded {
            self.heartbeat = Some(loaded.maps.heartbeat());
            loaded.configure(&wanted);
            loaded.attach(&wanted, pins);
            // An earlier daemon's may have been others.
            detach_filters_but(pins, &wanted.interfaces);
        }
        self.options = Some(wanted);
    }

    /// Writes the heartbeat of a daemon that keeps the frontends: without it the programs begin no flows while
    /// another daemon runs, which may not know them.
    pub fn set_heartbeat(&self, now_ns: u64) {
        if let Some(heartbeat) = &self.heartbeat {
            heartbeat.set(now_ns);
        }
    }

    /// Removes the frontends that don't lead to the same service in `table`: before that changes.
    pub fn prepare(&mut self, table: &Table) {
        let Diff { changed, gone } = self.seen.diff(&table.services);
        let is_public = |service: &Arc<Service>| !service.public.is_empty();
        let mut changed = changed.iter().map(|(name, service)| (*name, *service)).chain(gone);
        let is_concerned = changed.any(|(name, service)| {
            is_public(service) || self.seen.get(name).is_some_and(is_public)
        });
        let wanted = if is_concerned { Arc::new(frontends(table)) } else { self.wanted.clone() };
        self.seen = table.services.clone();
        let mut given_up = Vec::new();
        for (key, service) in self.wanted.iter() {
            match wanted.get(key) {
                Some(name) if name == service => {}
                Some(_) => {
                    if let Some(Ok(loaded)) = &mut self.loaded {
                        loaded.frontends.remove(key);
                    }
                }
                None => given_up.push(*key),
            }
        }
        self.left.extend(given_up.iter().map(|key| (*key, Instant::now())));
        if let Some(Ok(loaded)) = &mut self.loaded {
            loaded.frontends.give_up(&given_up);
        }
        self.wanted = wanted;
        if let Some(Ok(loaded)) = self.loaded.as_ref().filter(|_| !self.has_table) {
            // Of an earlier daemon.
            let known = loaded.frontends.present().keys().filter(|key| key.port != ANY_PORT);
            self.left.extend(known.map(|key| (*key, Instant::now())));
        }
        self.has_table = true;
    }

    /// Updates the frontends to the table that [`Edge::prepare`] was given. `index` is where the kernel has a
    /// service.
    pub fn apply(&mut self, index: impl Fn(&str) -> Option<u32>) {
        let Some(Ok(loaded)) = self.loaded.as_mut().filter(|_| self.has_table) else { return };
        let is_left = |key: &FrontendKey, since: &Instant| {
            !self.wanted.contains_key(key) && since.elapsed() < LEFT_FOR
        };
        self.left.retain(|key, since| is_left(key, since));
        let shown = self.options.iter().flat_map(|options| &options.client_address);
        let shown: BTreeSet<&str> = shown.map(String::as_str).collect();
        let reference = |name: &str| {
            let shows_client = shown.contains(name).into();
            index(name).map_or(NO_SERVICE, |service| EdgeServiceRef { service, shows_client })
        };
        if let Some(options) = &self.options {
            loaded.update_own(options);
        }
        let served = self.wanted.iter().map(|(key, name)| (*key, reference(name)));
        let left = self.left.keys().map(|key| (*key, NO_SERVICE));
        let mut wanted = with_other_ports(served.clone().chain(left).collect());
        if !loaded.frontends.have_room_for(&wanted) {
            self.left.clear();
            wanted = with_other_ports(served.collect());
        }
        loaded.frontends.update(&wanted);
    }

    /// Attaches and pins again what isn't, and begins to end the flows whose time is over.
    pub fn fix(&mut self, pins: &Pins, index: impl Fn(&str) -> Option<u32>) {
        let (Some(Ok(loaded)), Some(options)) = (&mut self.loaded, &self.options) else { return };
        if let Err(error) = loaded.pinned.fix() {
            tracing::debug!("the maps of the unit {UNIT} can't be pinned again: {error}");
        }
        loaded.attach(options, pins);
        loaded.update_own(options);
        loaded.prove(options);
        loaded.sweep(now_ms(), &self.counters, &self.wanted, &self.ended);
        self.apply(index);
    }

    /// Ends the flows whose time is over, as if it were so much later.
    pub fn sweep_after(&mut self, time: Duration) {
        if let Some(Ok(loaded)) = &mut self.loaded {
            let now_ms = now_ms().wrapping_add(time.as_millis() as u32);
            while loaded.sweep(now_ms, &self.counters, &self.wanted, &self.ended) {}
        }
    }

    /// Goes on with a sweep that [`Edge::fix`] has begun, by a part. Returns whether there is more.
    pub fn sweep_on(&mut self) -> bool {
        match &mut self.loaded {
            Some(Ok(loaded)) if loaded.is_sweeping() => {
                loaded.sweep(now_ms(), &self.counters, &self.wanted, &self.ended)
            }
            _ => false,
        }
    }

    /// Proves again that the programs translate.
    pub fn prove_again(&mut self) {
        if let (Some(Ok(loaded)), Some(options)) = (&mut self.loaded, &self.options) {
            loaded.prove_again(options);
        }
    }

    /// Detaches the programs. The flows stay.
    pub fn detach(&mut self, pins: &Pins) {
        if let Some(Ok(loaded)) = self.loaded.take() {
            loaded.attachments.detach(pins);
        }
        self.records.set(None);
        (self.options, self.heartbeat) = (None, None);
        // An earlier daemon's, too.
        end_links(pins, PIN_PREFIX, |_| true);
        detach_filters(pins);
    }

    /// How it does; `None` where it isn't configured.
    pub fn status(&self) -> Option<EdgeStatus> {
        let options = self.options.as_ref()?;
        let status = EdgeStatus {
            interfaces: Vec::new(),
            sources: options.sources.clone(),
            client_address: options.client_address.clone(),
            n_flows: 0,
            max_flows: options.max_flows,
            problems: Vec::new(),
            forwards: [false; 2],
            proofs: Default::default(),
        };
        Some(match self.loaded.as_ref()? {
            Ok(loaded) => loaded.status(status),
            Err(reason) => {
                let interface = |name: &String| EdgeInterface {
                    name: name.clone(),
                    mode: None,
                    message: Some(reason.clone()),
                };
                let interfaces = options.interfaces.iter().map(interface).collect();
                EdgeStatus { interfaces, problems: vec![reason.clone()], ..status }
            }
        })
    }

    /// How full its maps of frontends are; none where it isn't loaded.
    pub fn pressure(&self) -> Vec<(&'static str, Pressure)> {
        let Some(Ok(loaded)) = &self.loaded else { return Vec::new() };
        loaded.frontends.pressure()
    }

    /// Reads the flows, without the datapath; `None` where it isn't loaded.
    pub fn flow_reader(&self) -> Option<FlowReader> {
        let Some(Ok(loaded)) = &self.loaded else { return None };
        Some(FlowReader::new(loaded.maps.records().clone(), self.wanted.clone()))
    }

    /// What was decided on packets, by name; none where it isn't loaded.
    pub fn counts(&self) -> Vec<(&'static str, u64)> {
        let Some(Ok(loaded)) = &self.loaded else { return Vec::new() };
        let (words, fast) = (loaded.maps.counters().words, loaded.maps.fast_counts());
        let fast = |path: FastPath| fast[path as usize];
        let count = |(name, counter): (&'static str, EdgeCounter)| {
            let by_tc = if counter == EdgeCounter::Forwarded { fast(FastPath::Tc) } else { 0 };
            (name, words[counter as usize] + by_tc)
        };
        let by_xdp = [("xdp_tx", FastPath::XdpTx), ("xdp_redirect", FastPath::XdpRedirect)];
        let by_xdp = by_xdp.map(|(name, path)| (name, fast(path)));
        EdgeCounter::ALL.into_iter().map(count).chain(by_xdp).collect()
    }

    /// The unit's state; `None` where it isn't configured.
    pub fn health(&self) -> Option<UnitHealth> {
        let status = self.status()?;
        let disproof = status.proof().and_then(Result::err).map(str::to_owned);
        let EdgeStatus { interfaces, problems, .. } = status;
        let detached = interfaces.into_iter().find(|interface| interface.mode.is_none());
        let (state, reason) = match (detached, problems.into_iter().chain(disproof).next()) {
            (Some(EdgeInterface { name, message, .. }), _) => {
                let why = message.unwrap_or_default();
                (UnitState::Failed, Some(format!("it isn't attached to {name}: {why}")))
            }
            (None, problem) => (UnitState::Attached, problem),
        };
        Some(UnitHealth { name: UNIT, is_required: false, state, reason })
    }

    /// How many instructions the verifier processed for each program, by its log.
    ///
    /// # Errors
    /// When the object can't be opened.
    pub fn processed_instructions(
        &self,
        pins: &Pins,
    ) -> Result<Vec<(&'static str, Option<u32>)>, DatapathError> {
        let shapes = edge_shapes(&self.sizes, DEFAULT_MAX_FLOWS, true);
        let mut loader = loader(&shapes, &self.sizes, pins);
        loader.verifier_log_level(VerifierLogLevel::STATS);
        let mut ebpf = loader.load(EDGE).map_err(DatapathError::Load)?;
        let names = PROGRAMS.iter().map(|(name, _)| *name).chain([xdp::PROGRAM]);
        let counts = names.map(|name| processed(&mut ebpf, name)).collect();
        if self.loaded.is_none() {
            remove_pins(&self.sizes, pins);
        }
        counts
    }
}

/// The public frontends of a table, each with its service.
fn frontends(table: &Table) -> BTreeMap<FrontendKey, Arc<str>> {
    let mut all = BTreeMap::new();
    for (name, service) in table.services.iter() {
        for address in &service.public {
            let (address, port) = (address.ip(), address.port());
            let protocols =
                [(IPPROTO_TCP, service.protocols.tcp()), (IPPROTO_UDP, service.protocols.udp())];
            for (protocol, _) in protocols.into_iter().filter(|(_, has_it)| *has_it) {
                let key = FrontendKey { address, port, protocol };
                all.entry(key).or_insert_with(|| name.clone());
            }
        }
    }
    all
}

/// Frontends, and for each of their VIPs those of any other port: what no service has of a VIP is dropped.
fn with_other_ports(
    mut frontends: BTreeMap<FrontendKey, EdgeServiceRef>,
) -> BTreeMap<FrontendKey, EdgeServiceRef> {
    let addresses: BTreeSet<IpAddr> = frontends.keys().map(|key| key.address).collect();
    for address in addresses {
        for protocol in [IPPROTO_TCP, IPPROTO_UDP] {
            frontends.insert(FrontendKey { address, port: ANY_PORT, protocol }, NO_SERVICE);
        }
    }
    frontends
}
