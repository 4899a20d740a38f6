//! The unit's object in the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher as _, RandomState};
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aya::programs::{SchedClassifier, Xdp};
use aya::{Ebpf, EbpfLoader};
use ipnet::IpNet;
use lb_common::{DEFAULT_MAX_FLOWS, EdgeSettings, FlowState, FlowWord, IPPROTO_TCP, N_FLOW_STATES};

use super::super::error::DatapathError;
use super::super::kernel::Counters;
use super::super::map_specs::{EDGE, MapShape, Sizes, edge_shapes};
use super::super::maps::FrontendKey;
use super::super::object::{create_additional_maps, load_program};
use super::super::pins::{PinnedMaps, Pins, monotonic_ns, unpin};
use super::super::tc::Interface;
use super::super::trace::EndedFlows;
use super::attachments::{Attachments, PROGRAMS};
use super::device::{self, Device};
use super::frontends::Frontends;
use super::kernel::{EdgeMaps, RawFlow};
use super::options::{EdgeOptions, UNIT};
use super::status::{EdgeStatus, Proof};
use super::xdp::{self, Fast};
use super::{flows, networks, proof, sources};
use crate::causes;

/// How many records a part of a sweep looks at while the datapath waits.
const SLICE: u32 = 65_536;
/// After how long what was proved is proved again.
const PROOF_AGAIN: Duration = Duration::from_secs(10);

/// What is loaded once the unit is configured.
#[derive(Debug)]
pub struct LoadedEdge {
    pub ebpf: Ebpf,
    pub maps: EdgeMaps,
    pub frontends: Frontends,
    pub pinned: PinnedMaps,
    pub attachments: Attachments,
    /// What keeps packets from being sent on.
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

impl LoadedEdge {
    /// Loads it over the pinned maps.
    ///
    /// # Errors
    /// Why the kernel doesn't take it.
    pub fn load(
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
        create_additional_maps(UNIT, &shapes, sizes, map_creator.as_deref(), pins);
        let ebpf = loader(&shapes, sizes, pins).load(EDGE);
        let mut ebpf = ebpf.map_err(|error| failed(DatapathError::Load(error)))?;
        for (name, _) in PROGRAMS {
            load_program(&mut ebpf, name).map_err(failed)?;
        }
        let refusal = load_program(&mut ebpf, xdp::PROGRAM).err().map(failed);
        let maps = EdgeMaps::take(&mut ebpf).map_err(failed)?;
        let fast = Fast::new(maps.interfaces().clone(), refusal);
        let capacity = shapes.iter().find(|shape| shape.name == "EDGE_FRONTENDS");
        let capacity = capacity.map_or(0, |shape| shape.max_entries);
        let frontends = Frontends::take(&mut ebpf, capacity)?;
        let pinned = PinnedMaps::open(shapes.iter().map(|shape| pins.maps().join(shape.name)))
            .map_err(|error| error.to_string())?;
        Ok(LoadedEdge {
            ebpf,
            maps,
            frontends,
            pinned,
            attachments: Attachments::new(fast, pins),
            problems: Vec::new(),
            forwards: [true; 2],
            n_flows: 0,
            swept: (0, 0),
            proofs: Default::default(),
            proved_at: None,
        })
    }

    /// How it does, with what the unit knows of itself.
    pub fn status(&self, unit: EdgeStatus) -> EdgeStatus {
        let problems = self.problems.iter().chain(self.frontends.problem());
        EdgeStatus {
            interfaces: self.attachments.interfaces().to_vec(),
            n_flows: self.n_flows,
            problems: problems.cloned().collect(),
            forwards: self.forwards,
            proofs: self.proofs.clone(),
            ..unit
        }
    }

    /// Attaches its programs where they aren't, and looks at what keeps packets from being sent on.
    pub fn attach(&mut self, options: &EdgeOptions, pins: &Pins) {
        self.attachments.attach(&mut self.ebpf, &options.interfaces, pins);
        (self.problems, self.forwards) = problems(options);
    }

    /// As [`LoadedEdge::prove`], at once.
    pub fn prove_again(&mut self, options: &EdgeOptions) {
        self.proved_at = None;
        self.prove(options);
    }

    /// Proves that the attached programs translate: after some time again, and at once where they didn't.
    pub fn prove(&mut self, options: &EdgeOptions) {
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
        taken.extend(self.frontends.present().keys().map(|key| key.address));
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
        let LoadedEdge { ebpf, maps, attachments, forwards, proofs, .. } = self;
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
        for (Interface { name, index }, has_xdp) in attachments.all() {
            let networks = own.iter().filter(|(device, ip, _)| device == name && is_of(ip));
            let neighbour = networks.into_iter().find_map(|&(_, ip, prefix)| {
                proof::neighbour(ip, prefix, |address| taken.contains(address))
            });
            let (Some(neighbour), Some(device)) = (neighbour, devices.get(index)) else { continue };
            let xdp = xdp.filter(|_| has_xdp).and_then(|xdp| xdp.fd().ok());
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
    pub fn configure(&mut self, options: &EdgeOptions) {
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
    pub fn update_own(&mut self, options: &EdgeOptions) {
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

    /// Whether a sweep has begun that isn't through.
    pub fn is_sweeping(&self) -> bool {
        self.swept.0 != 0
    }

    /// Ends the flows whose time is over, of the next records. Returns whether there are more.
    pub fn sweep(
        &mut self,
        now_ms: u32,
        counters: &Counters,
        wanted: &BTreeMap<FrontendKey, Arc<str>>,
        traced: &EndedFlows,
    ) -> bool {
        let LoadedEdge { maps, frontends, .. } = self;
        let (first, n_before) = self.swept;
        let n_records = maps.records().len();
        let records = first..first.saturating_add(SLICE).min(n_records);
        let service = |flow: &RawFlow| {
            let (address, port) = (flow.vip.ip(), flow.vip.port());
            let key = FrontendKey { address, port, protocol: flow.record.word.protocol };
            frontends.service(&key)
        };
        let (n_left, next) = maps.sweep(records, now_ms, |flow| {
            ended(flow, service(flow), counters);
            // The program reports the end of one that was closed.
            if flow.record.word.is_open() || flow.record.word.protocol != IPPROTO_TCP {
                traced.add(|| flows::flow(flow, wanted, now_ms));
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

/// A random number that isn't 0.
fn random_seed() -> u32 {
    RandomState::new().hash_one(()) as u32 | 1
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
pub fn loader(shapes: &[MapShape], sizes: &Sizes, pins: &Pins) -> EbpfLoader<'static> {
    let mut loader = EbpfLoader::new();
    let shared = sizes.shapes();
    for MapShape { name, max_entries, .. } in shapes.iter().chain(&shared) {
        loader.map_max_entries(name, *max_entries).map_pin_path(name, pins.maps().join(name));
    }
    loader
}

/// Removes the pins of the unit's maps.
pub fn remove_pins(sizes: &Sizes, pins: &Pins) {
    for shape in edge_shapes(sizes, DEFAULT_MAX_FLOWS, true) {
        if let Err(error) = unpin(&pins.maps().join(shape.name)) {
            tracing::debug!("{error}");
        }
    }
}
