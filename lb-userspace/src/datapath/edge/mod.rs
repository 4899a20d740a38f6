//! The unit `edge`: packets from outside for public VIPs are sent to backends, by translation of both
//! addresses.
//!
//! Its flows are in pinned maps and outlive the daemon, as do its programs. The frontends follow the table
//! in the same step as those of the unit `connect`: what leads to another service is removed before that
//! one's index can be, and inserted after.

mod device;
mod flows;
pub mod kernel;
mod networks;
mod proof;
mod sources;
pub mod status;
mod xdp;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aya::maps::Map;
use aya::programs::{SchedClassifier, Xdp};
use aya::{Ebpf, EbpfLoader, VerifierLogLevel};
use ipnet::IpNet;
use lb_common::{
    ANY_PORT, DEFAULT_MAX_FLOWS, EdgeCounter, EdgeServiceRef, EdgeSettings, FastPath, FlowState,
    FlowWord, IPPROTO_TCP, IPPROTO_UDP, N_FLOW_STATES,
};

use super::error::DatapathError;
use super::in_flight::EdgeRecords;
use super::kernel::Counters;
use super::map_specs::{EDGE, MapShape, Sizes, edge_shapes};
use super::maps::FrontendKey;
use super::memcg;
use super::object::{load_program, processed};
use super::pins::{PinnedMaps, Pins, monotonic_ns, unpin};
use super::tc::{
    Attached, Direction, FilterHandle, Interface, Place, detach_filter, end_links, interface_names,
};
use super::trace::EndedFlows;
use super::units::{UnitHealth, UnitState};
use crate::causes;
use crate::ordmap::{Diff, OrdMap};
use crate::table::{Service, Table};
pub use device::{Device, all as interfaces};
pub use flows::FlowReader;
use kernel::{EdgeMaps, Heartbeat, RawFlow, now_ms};
pub use sources::of_interfaces as interface_addresses;
pub use status::{EdgeFlow, EdgeFlowState, EdgeInterface, EdgeMode, EdgeStatus, Proof};
use xdp::Fast;
pub use xdp::PIN_PREFIX;

/// The unit's name.
const UNIT: &str = "edge";
/// No service.
const NO_SERVICE: EdgeServiceRef = EdgeServiceRef { service: u32::MAX, shows_client: 0 };
/// For how long a VIP that no service has any more is refused rather than left to the host.
const LEFT_FOR: Duration = Duration::from_secs(3_600);

/// How many records a part of a sweep looks at while the datapath waits.
const SLICE: u32 = 65_536;
/// After how long what was proved is proved again.
const PROOF_AGAIN: Duration = Duration::from_secs(10);

/// The programs, in the order in which they are attached: the way back first.
const PROGRAMS: [(&str, Direction); 2] =
    [("nohop_edge_out", Direction::Egress), ("nohop_edge", Direction::Ingress)];

/// What an edge does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EdgeOptions {
    /// The interfaces by which clients and backends send their packets here.
    pub interfaces: Vec<String>,
    /// The networks that public VIPs may come from, at most four.
    pub networks: Vec<IpNet>,
    /// This host's addresses from which packets go to backends, at most four of each address family.
    pub sources: Vec<IpAddr>,
    /// How many flows there are room for.
    pub max_flows: u32,
    /// After how long without a packet flows end.
    pub timeouts: EdgeTimeouts,
    /// The services whose backends are shown clients' addresses, by IPv4 and TCP.
    pub client_address: Vec<String>,
}

/// After how long without a packet a flow ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EdgeTimeouts {
    /// An established TCP connection.
    pub established: Duration,
    /// One that one side has closed.
    pub half_closed: Duration,
    /// One that both have closed or that was reset, and one that isn't established yet. Where room is short, it
    /// is over as soon as another flow needs its place.
    pub closed: Duration,
    /// UDP.
    pub udp: Duration,
}

impl Default for EdgeTimeouts {
    fn default() -> EdgeTimeouts {
        EdgeTimeouts {
            established: Duration::from_secs(3_600),
            half_closed: Duration::from_secs(120),
            closed: Duration::from_secs(60),
            udp: Duration::from_secs(60),
        }
    }
}

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
    /// Frontends that no service has any more, and since when. They are VIPs still, to which nobody else on this
    /// host is to answer.
    left: BTreeMap<FrontendKey, Instant>,
    /// Whether there was a table. Until then an earlier daemon's frontends stay: its flows are looked up only
    /// where they lead.
    has_table: bool,
    /// Whether an earlier daemon's is known to be gone.
    is_tidy: bool,
    ended: EndedFlows,
}

#[derive(Debug)]
struct LoadedEdge {
    ebpf: Ebpf,
    maps: EdgeMaps,
    pinned: PinnedMaps,
    /// The frontends in the map, each with the index of its service.
    present: BTreeMap<FrontendKey, EdgeServiceRef>,
    attached: Vec<AttachedTo>,
    fast: Fast,
    handle: FilterHandle,
    interfaces: Vec<EdgeInterface>,
    problems: Vec<String>,
    /// See [`EdgeStatus::forwards`].
    forwards: [bool; 2],
    n_flows: u32,
    /// The record at which the sweep goes on, and how many flows it has found before that.
    swept: (u32, u32),
    /// See [`EdgeStatus::proofs`], and when that was found.
    proofs: [Proof; 2],
    proved_at: Option<Instant>,
}

#[derive(Debug)]
struct AttachedTo {
    interface: Interface,
    /// In the order of [`PROGRAMS`].
    programs: Vec<Attached>,
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
        for (key, service) in self.wanted.iter() {
            match wanted.get(key) {
                Some(name) if name == service => {}
                Some(_) => {
                    if let Some(Ok(loaded)) = &mut self.loaded {
                        loaded.remove(key);
                    }
                }
                None => {
                    self.left.insert(*key, Instant::now());
                    if let Some(Ok(loaded)) = &mut self.loaded {
                        loaded.insert(*key, NO_SERVICE);
                    }
                }
            }
        }
        self.wanted = wanted;
        if let Some(Ok(loaded)) = self.loaded.as_ref().filter(|_| !self.has_table) {
            // Of an earlier daemon.
            let known = loaded.present.keys().filter(|key| key.port != ANY_PORT);
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
        let mut wanted: BTreeMap<_, _> =
            self.wanted.iter().map(|(key, name)| (*key, reference(name))).collect();
        if let Some(options) = &self.options {
            loaded.update_own(options);
        }
        wanted.extend(self.left.keys().map(|key| (*key, NO_SERVICE)));
        // What no service has of a VIP is dropped: one of any port shows that an address is a VIP.
        let addresses: BTreeSet<IpAddr> = wanted.keys().map(|key| key.address).collect();
        for address in addresses {
            for protocol in [IPPROTO_TCP, IPPROTO_UDP] {
                wanted.insert(FrontendKey { address, port: ANY_PORT, protocol }, NO_SERVICE);
            }
        }
        loaded.apply(&wanted);
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
            Some(Ok(loaded)) if loaded.swept.0 != 0 => {
                loaded.sweep(now_ms(), &self.counters, &self.wanted, &self.ended)
            }
            _ => false,
        }
    }

    /// Proves again that the programs translate.
    pub fn prove_again(&mut self) {
        if let (Some(Ok(loaded)), Some(options)) = (&mut self.loaded, &self.options) {
            loaded.proved_at = None;
            loaded.prove(options);
        }
    }

    /// Detaches the programs. The flows stay.
    pub fn detach(&mut self, pins: &Pins) {
        if let Some(Ok(mut loaded)) = self.loaded.take() {
            loaded.fast.detach(pins);
            for attached in loaded.attached {
                attached.detach(loaded.handle, pins);
            }
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
            Ok(LoadedEdge { interfaces, problems, forwards, n_flows, proofs, .. }) => EdgeStatus {
                interfaces: interfaces.clone(),
                n_flows: *n_flows,
                problems: problems.clone(),
                forwards: *forwards,
                proofs: proofs.clone(),
                ..status
            },
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

/// Takes a flow that ended off its backend's connections. One that the backend never answered is a failure of the
/// backend and of its service, as one of a socket is.
fn ended(flow: &RawFlow, service: Option<u32>, counters: &Counters) {
    let FlowWord { flags, .. } = flow.record.word;
    let (backend_idx, generation) = (flow.record.backend_idx, flow.record.generation);
    let one = |flag: u8| if flags & flag != 0 { -1 } else { 0 };
    let (n, n_pending) = (one(FlowWord::IN_FLIGHT), one(FlowWord::PENDING));
    if counters.generation(backend_idx) != generation || (n, n_pending) == (0, 0) {
        return;
    }
    counters.add_in_flight(backend_idx, n, n_pending);
    if n_pending != 0 {
        counters.count_failure(backend_idx, generation, service);
    }
}

impl LoadedEdge {
    fn load(
        sizes: &Sizes,
        map_creator: &Option<PathBuf>,
        max_flows: u32,
        has_ipv6: bool,
        pins: &Pins,
    ) -> Result<LoadedEdge, String> {
        let failed = |error: DatapathError| causes::with_root(&error);
        let shapes = edge_shapes(sizes, max_flows, has_ipv6);
        // Of another size they are replaced by empty ones. Keys without records, or the other way round, are of no use.
        pins.exist(&pins.maps(), &shapes).map_err(|error| error.to_string())?;
        let is_there = |name: &str| pins.maps().join(name).exists();
        if is_there("EDGE_FLOWS") != is_there("EDGE_RECORDS") {
            remove_pins(sizes, pins);
        }
        if let Some(program) = map_creator {
            // With those of the first unit, which are there: the mark is about all of them.
            let all = sizes.shapes().into_iter().chain(shapes.iter().copied());
            let all: Vec<_> =
                all.map(|shape| (pins.maps().join(shape.name), shape.max_entries)).collect();
            if let Err(reason) = memcg::create_uncharged(program, &all, &pins.charged()) {
                tracing::debug!("the maps of the unit {UNIT} are charged: {reason}");
            }
        }
        let ebpf = loader(&shapes, sizes, pins).load(EDGE);
        let mut ebpf = ebpf.map_err(|error| failed(DatapathError::Load(error)))?;
        for (name, _) in PROGRAMS {
            load_program(&mut ebpf, name).map_err(failed)?;
        }
        let refusal = load_program(&mut ebpf, xdp::PROGRAM).err().map(failed);
        let maps = EdgeMaps::take(&mut ebpf).map_err(failed)?;
        let fast = Fast::new(maps.interfaces().clone(), refusal);
        let present = maps
            .frontends()
            .map_err(|error| format!("the map EDGE_FRONTENDS can't be read: {error}"))?;
        let pinned = PinnedMaps::open(shapes.iter().map(|shape| pins.maps().join(shape.name)))
            .map_err(|error| error.to_string())?;
        Ok(LoadedEdge {
            ebpf,
            maps,
            pinned,
            present,
            attached: Vec::new(),
            fast,
            handle: FilterHandle::of_unit(pins.dir(), UNIT),
            interfaces: Vec::new(),
            problems: Vec::new(),
            forwards: [true; 2],
            n_flows: 0,
            swept: (0, 0),
            proofs: Default::default(),
            proved_at: None,
        })
    }

    /// Proves that the attached programs translate: after some time again, and at once where they didn't.
    fn prove(&mut self, options: &EdgeOptions) {
        let mut results = self.proofs.iter().flatten().peekable();
        let is_proved = results.peek().is_some() && results.all(Result::is_ok);
        if is_proved && self.proved_at.is_some_and(|at| at.elapsed() < PROOF_AGAIN) {
            return;
        }
        let former = self.proofs.clone();
        for (idx, proof) in self.proved(options).into_iter().flatten().enumerate() {
            if let Some(Err(why)) = &proof
                && former[idx] != proof
            {
                tracing::error!("edge: {why}");
            }
            self.proofs[idx] = proof;
        }
        self.proved_at = Some(Instant::now());
    }

    /// Of IPv4 and of IPv6; `None` where what there is isn't known.
    fn proved(&mut self, options: &EdgeOptions) -> Option<[Proof; 2]> {
        let devices = device::all().ok()?;
        let own = sources::of_interfaces().ok()?;
        let mut taken: BTreeSet<IpAddr> = own.iter().map(|(_, ip, _)| *ip).collect();
        // Where a VIP of the interface's own network is announced it is unreachable.
        taken.extend(self.present.keys().map(|key| key.address));
        Some([false, true].map(|is_ipv6| self.proved_of(is_ipv6, options, &devices, &own, &taken)))
    }

    /// Of one address family, by all interfaces; what is known of it where there is no room for a flow.
    fn proved_of(
        &mut self,
        is_ipv6: bool,
        options: &EdgeOptions,
        devices: &BTreeMap<u32, Device>,
        own: &[(String, IpAddr, u8)],
        taken: &BTreeSet<IpAddr>,
    ) -> Proof {
        let LoadedEdge { ebpf, maps, attached, fast, forwards, proofs, .. } = self;
        // Of a family that isn't forwarded nothing is announced.
        if !forwards[usize::from(is_ipv6)] {
            return None;
        }
        let tc: &SchedClassifier = ebpf.program(PROGRAMS[1].0)?.try_into().ok()?;
        let tc = tc.fd().ok()?.as_fd();
        let xdp: Option<&Xdp> =
            ebpf.program(xdp::PROGRAM).and_then(|program| program.try_into().ok());
        let is_of = |ip: &IpAddr| ip.is_ipv6() == is_ipv6;
        let source = options.sources.iter().copied().find(is_of)?;
        let vip = options.networks.iter().map(IpNet::network).find(is_of)?;
        let mut proof = None;
        for Interface { name, index } in attached.iter().map(|attached| &attached.interface) {
            let networks = own.iter().filter(|(device, ip, _)| device == name && is_of(ip));
            let neighbour = networks.into_iter().find_map(|&(_, ip, prefix)| {
                proof::neighbour(ip, prefix, |address| taken.contains(address))
            });
            let (Some(neighbour), Some(device)) = (neighbour, devices.get(index)) else { continue };
            let xdp = xdp.filter(|_| fast.is_attached(*index)).and_then(|xdp| xdp.fd().ok());
            let xdp = xdp.map(|xdp| xdp.as_fd());
            let input =
                proof::ProofInput { index: *index, device, tc, xdp, vip, source, neighbour };
            match proof::prove(maps, &input) {
                Some(Ok(())) => proof = Some(Ok(())),
                Some(Err(why)) => {
                    let family = if is_ipv6 { "IPv6" } else { "IPv4" };
                    return Some(Err(format!("a proof of {family} by {name} has failed: {why}")));
                }
                None => return proofs[usize::from(is_ipv6)].clone(),
            }
        }
        proof
    }

    /// Writes what the programs read.
    fn configure(&mut self, options: &EdgeOptions) {
        let EdgeOptions { networks, timeouts, .. } = options;
        let ms = |time: Duration| u32::try_from(time.as_millis()).unwrap_or(i32::MAX as u32);
        let before = self.maps.settings();
        let mut settings = EdgeSettings {
            timeouts_ms: [ms(timeouts.closed); N_FLOW_STATES],
            n_records: self.maps.records().len(),
            heartbeat_ns: monotonic_ns(),
            seed: if before.seed == 0 { random_seed() } else { before.seed },
            ..before
        };
        let longer = [
            (FlowState::Established, timeouts.established),
            (FlowState::HalfClosed, timeouts.half_closed),
            (FlowState::Udp, timeouts.udp),
            (FlowState::UdpUnanswered, timeouts.udp),
        ];
        for (state, timeout) in longer {
            settings.timeouts_ms[state as usize] = ms(timeout);
        }
        networks::set(&mut settings, networks);
        self.maps.set_settings(&settings);
        self.update_own(options);
    }

    /// Updates this host's addresses: a backend that has one is here, and a source without one gets no new flows.
    fn update_own(&mut self, options: &EdgeOptions) {
        let updated = sources::all_own().and_then(|own| {
            let before = self.maps.settings();
            let mut settings = before;
            let is_own = |source: &IpAddr| own.contains(source);
            let usable: Vec<IpAddr> = options.sources.iter().copied().filter(is_own).collect();
            sources::set(&mut settings, &usable, is_own);
            if settings != before {
                self.maps.set_settings(&settings);
            }
            self.maps.set_own(own)
        });
        if let Err(error) = updated {
            tracing::warn!("edge: this host's addresses can't be listed: {error}");
        }
    }

    /// Ends the flows whose time is over, of the next records. Returns whether there are more.
    fn sweep(
        &mut self,
        now_ms: u32,
        counters: &Counters,
        frontends: &BTreeMap<FrontendKey, Arc<str>>,
        traced: &EndedFlows,
    ) -> bool {
        let LoadedEdge { maps, present, .. } = self;
        let (first, n_before) = self.swept;
        let n_records = maps.records().len();
        let records = first..first.saturating_add(SLICE).min(n_records);
        let service = |flow: &RawFlow| {
            let (address, port) = (flow.vip.ip(), flow.vip.port());
            let key = FrontendKey { address, port, protocol: flow.record.word.protocol };
            present.get(&key).map(|found| found.service)
        };
        let (n_left, next) = maps.sweep(records, now_ms, |flow| {
            ended(flow, service(flow), counters);
            // The program reports the end of one that was closed.
            if flow.record.word.is_open() || flow.record.word.protocol != IPPROTO_TCP {
                traced.add(|| flows::flow(flow, frontends, now_ms));
            }
        });
        let n_flows = n_before + n_left;
        if next < n_records {
            self.swept = (next, n_flows);
            return true;
        }
        (self.n_flows, self.swept) = (n_flows, (0, 0));
        false
    }

    fn remove(&mut self, key: &FrontendKey) {
        match self.maps.remove(key) {
            Ok(()) => {
                self.present.remove(key);
            }
            Err(error) => tracing::error!("EDGE_FRONTENDS: {error}"),
        }
    }

    /// Updates the map of frontends.
    fn apply(&mut self, wanted: &BTreeMap<FrontendKey, EdgeServiceRef>) {
        if *wanted == self.present {
            return;
        }
        // What no service has any more stays, for none.
        let is_kept = |(key, present): &(&FrontendKey, &EdgeServiceRef)| {
            let is_same = |wanted: &EdgeServiceRef| wanted.service == present.service;
            wanted.get(*key).is_some_and(|wanted| is_same(wanted) || *wanted == NO_SERVICE)
        };
        let gone: Vec<_> =
            self.present.iter().filter(|one| !is_kept(one)).map(|(key, _)| *key).collect();
        gone.iter().for_each(|key| self.remove(key));
        for (key, service) in wanted {
            if self.present.get(key) != Some(service) {
                self.insert(*key, *service);
            }
        }
    }

    fn insert(&mut self, key: FrontendKey, service: EdgeServiceRef) {
        match self.maps.insert(key, service) {
            Ok(()) => {
                if self.present.insert(key, service).is_some() {
                    self.maps.replaced();
                }
            }
            Err(error) => tracing::error!("EDGE_FRONTENDS: {error}"),
        }
    }

    /// Attaches the programs where they aren't, and detaches them from interfaces that aren't wanted.
    fn attach(&mut self, options: &EdgeOptions, pins: &Pins) {
        let indices = interface_indices();
        let wanted: Vec<(&String, Option<Interface>)> = options
            .interfaces
            .iter()
            .map(|name| {
                let index = indices.get(name).copied();
                (name, index.map(|index| Interface { name: name.clone(), index }))
            })
            .collect();
        let is_wanted = |attached: &AttachedTo| {
            wanted.iter().any(|(_, interface)| interface.as_ref() == Some(&attached.interface))
        };
        let (kept, gone): (Vec<_>, Vec<_>) = self.attached.drain(..).partition(is_wanted);
        self.attached = kept;
        for attached in gone {
            attached.detach(self.handle, pins);
        }
        let is_own = |name: &str| {
            let interfaces = wanted.iter().filter_map(|(_, interface)| interface.as_ref());
            let mut names = interfaces.flat_map(|interface| {
                let programs = PROGRAMS.map(|(program, _)| pin_name(program, interface));
                programs.into_iter().chain([xdp::pin_name(interface.index)])
            });
            names.any(|own| own == name)
        };
        end_links(pins, PIN_PREFIX, |name| !is_own(name));
        let mut results = Vec::new();
        for (name, interface) in &wanted {
            results.push(match interface {
                None => Err(format!("there is no interface {name}")),
                Some(_) if !has_ethernet(name) => Err(format!(
                    "packets of {name} have no Ethernet header; name the interface below it, or one of Ethernet"
                )),
                Some(interface) => {
                    self.attach_to(interface, pins).map_err(|error| error.to_string())
                }
            });
        }
        let by_tc = wanted.iter().zip(&results).filter(|(_, result)| result.is_ok());
        let by_tc: Vec<_> = by_tc.filter_map(|((_, interface), _)| interface.as_ref()).collect();
        let reasons = self.fast.attach(&mut self.ebpf, &by_tc, pins);
        let mut interfaces = Vec::new();
        for ((name, interface), result) in wanted.iter().zip(results) {
            let index = interface.as_ref().map_or(0, |interface| interface.index);
            let (mode, message) = match result {
                Ok(mode) if self.fast.is_attached(index) => (Some(mode.with_xdp()), None),
                Ok(mode) => (Some(mode), reasons.get(&index).cloned()),
                Err(message) => (None, Some(message)),
            };
            let interface = EdgeInterface { name: (*name).clone(), mode, message };
            let is_new = !self.interfaces.contains(&interface);
            match (&interface, is_new) {
                (EdgeInterface { mode: Some(mode), message, .. }, true) => {
                    let message = message.as_deref().map(|text| format!(": {text}"));
                    let message = message.unwrap_or_default();
                    tracing::info!("edge: attached to {name} by {}{message}", mode.name());
                }
                (EdgeInterface { message: Some(message), .. }, true) => {
                    tracing::warn!("edge: not attached to {name}: {message}");
                }
                _ => {}
            }
            interfaces.push(interface);
        }
        self.interfaces = interfaces;
        (self.problems, self.forwards) = problems(options);
    }

    fn attach_to(&mut self, interface: &Interface, pins: &Pins) -> io::Result<EdgeMode> {
        let nth = self.attached.iter().position(|attached| attached.interface == *interface);
        let nth = nth.unwrap_or_else(|| {
            let programs = Vec::new();
            self.attached.push(AttachedTo { interface: interface.clone(), programs });
            self.attached.len() - 1
        });
        let mut mode = EdgeMode::Tcx;
        for (idx, (name, direction)) in PROGRAMS.into_iter().enumerate() {
            let program = self.ebpf.program_mut(name).ok_or(io::ErrorKind::NotFound)?;
            let program: &mut SchedClassifier = program.try_into().map_err(io::Error::other)?;
            let pin = pins.link(&pin_name(name, interface));
            let place = Place { pin: &pin, handle: self.handle, direction };
            let Some(AttachedTo { programs, .. }) = self.attached.get_mut(nth) else { continue };
            match programs.get_mut(idx) {
                Some(attached) => attached.fix(program, interface, place)?,
                None => programs.push(Attached::attach(program, interface, place)?),
            }
            if matches!(programs.get(idx), Some(Attached::Clsact)) {
                mode = EdgeMode::Clsact;
            }
        }
        Ok(mode)
    }
}

impl AttachedTo {
    fn detach(self, handle: FilterHandle, pins: &Pins) {
        for ((name, direction), attached) in PROGRAMS.into_iter().zip(self.programs).rev() {
            let pin = pins.link(&pin_name(name, &self.interface));
            attached.detach(&self.interface, Place { pin: &pin, handle, direction });
        }
    }
}

/// A random number that isn't 0.
fn random_seed() -> u32 {
    RandomState::new().hash_one(()) as u32 | 1
}

/// Whether an interface's packets begin with an Ethernet header, as those of WireGuard and PPP don't; also
/// where that can't be read.
fn has_ethernet(name: &str) -> bool {
    // ARPHRD_ETHER and ARPHRD_LOOPBACK (linux/if_arp.h).
    let kind = std::fs::read_to_string(format!("/sys/class/net/{name}/type"));
    kind.map_or(true, |kind| matches!(kind.trim(), "1" | "772"))
}

/// What keeps packets from being sent on, and whether those of IPv4 and of IPv6 are.
fn problems(options: &EdgeOptions) -> (Vec<String>, [bool; 2]) {
    let family = |is_ipv6| if is_ipv6 { "ipv6" } else { "ipv4" };
    let (mut problems, mut forwards) = (Vec::new(), [true; 2]);
    // Where they can't be listed, they are as before.
    let own = sources::all_own().unwrap_or_else(|_| options.sources.iter().copied().collect());
    let (present, absent): (Vec<&IpAddr>, Vec<&IpAddr>) =
        options.sources.iter().partition(|source| own.contains(source));
    for source in absent {
        let is_last = !present.iter().any(|other| other.is_ipv6() == source.is_ipv6());
        forwards[usize::from(source.is_ipv6())] &= !is_last;
        problems.push(format!(
            "edge.source {source} is no address of this host, so replies of backends to it don't come here: \
             `ip addr add {source} dev INTERFACE`"
        ));
    }
    for is_ipv6 in [false, true] {
        if !options.sources.iter().any(|source| source.is_ipv6() == is_ipv6) {
            continue;
        }
        for name in &options.interfaces {
            let setting = format!("net/{}/conf/{name}/forwarding", family(is_ipv6));
            let value = std::fs::read_to_string(format!("/proc/sys/{setting}"));
            if value.is_ok_and(|value| value.trim() == "0") {
                let setting = setting.replace('/', ".");
                forwards[usize::from(is_ipv6)] = false;
                problems.push(format!(
                    "{setting} is 0, so no packet that comes by {name} is sent on: `sysctl -w {setting}=1`"
                ));
            }
        }
    }
    (problems, forwards)
}

/// Loads the object over its pinned maps.
fn loader(shapes: &[MapShape], sizes: &Sizes, pins: &Pins) -> EbpfLoader<'static> {
    let mut loader = EbpfLoader::new();
    let shared = sizes.shapes();
    for MapShape { name, max_entries, .. } in shapes.iter().chain(&shared) {
        loader.map_max_entries(name, *max_entries).map_pin_path(name, pins.maps().join(name));
    }
    loader
}

/// Removes the pins of the unit's maps.
fn remove_pins(sizes: &Sizes, pins: &Pins) {
    for shape in edge_shapes(sizes, DEFAULT_MAX_FLOWS, true) {
        if let Err(error) = unpin(&pins.maps().join(shape.name)) {
            tracing::debug!("{error}");
        }
    }
}

/// Removes the filters that no link holds. Returns how many there were.
pub fn detach_filters(pins: &Pins) -> usize {
    detach_filters_but(pins, &[])
}

/// The same, but for those of some interfaces.
fn detach_filters_but(pins: &Pins, kept: &[String]) -> usize {
    let handle = FilterHandle::of_unit(pins.dir(), UNIT);
    let detach = |name: &String| {
        let directions = [Direction::Ingress, Direction::Egress].into_iter();
        directions.filter(|direction| detach_filter(name, handle, *direction).is_ok()).count()
    };
    interface_names().filter(|name| !kept.contains(name)).map(|name| detach(&name)).sum()
}

/// The interfaces of this network namespace, by name.
fn interface_indices() -> HashMap<String, u32> {
    let index = |name: String| Some((name.clone(), nix::net::if_::if_nametoindex(&*name).ok()?));
    interface_names().filter_map(index).collect()
}

/// Names of pins have no dots, so it has the interface's number.
fn pin_name(program: &str, interface: &Interface) -> String {
    let direction = if program.ends_with("_out") { "out" } else { "in" };
    format!("{PIN_PREFIX}{direction}_{}", interface.index)
}
