//! Tables and callers on the host, for tests and for the fuzzer.

use std::collections::BTreeMap;
use std::vec::Vec;

use super::*;
use crate::{
    Address, BackendEntry, BackendOutcomes, BackendSets, BalanceSettings, Control, Drawn,
    EjectionWord, Frontend, Frontend6, Group, INCONSISTENT, MaglevKey, ServiceEntry,
};

/// The tables, as values.
#[derive(Clone, Debug, Default)]
pub struct Model {
    /// The pool's first address and its netmask.
    pub pool: (u32, u32),
    /// The IPv6 pool's first address and its netmask.
    pub pool6: (u128, u128),
    /// What the daemon wrote.
    pub control: Option<Control>,
    /// The value of `FRONTENDS`.
    pub frontends: BTreeMap<Frontend, ServiceRef>,
    /// The value of `FRONTENDS6`.
    pub frontends6: BTreeMap<Frontend6, ServiceRef>,
    /// The value of `SERVICES`.
    pub services: Vec<ServiceEntry>,
    /// The value of `SLOTS`.
    pub slots: Vec<Slot>,
    /// The value of `BACKENDS`.
    pub backends: Vec<BackendEntry>,
    /// [`Tables::now_ns`]
    pub now_ns: u64,
    /// [`Tables::random`]
    pub random: u32,
}

/// A caller, as values.
#[derive(Clone, Copy, Debug)]
pub struct Client {
    /// [`Caller::tgid`]
    pub tgid: u64,
    /// [`Caller::origin`]
    pub origin: Origin,
    /// [`Caller::is_bypassed`]
    pub is_bypassed: bool,
    /// [`Caller::filter`]
    pub filter: FamilyFilter,
    /// [`Caller::netns_cookie`]
    pub netns_cookie: u64,
}

impl ControlWords for Control {
    fn heartbeat_ns(self) -> u64 {
        self.heartbeat_ns
    }

    fn table_ns(self) -> u64 {
        self.table_ns
    }

    fn max_age_ns(self) -> u64 {
        self.max_age_ns
    }

    fn is_inherited(self) -> bool {
        self.is_inherited != 0
    }

    fn host_netns(self) -> u64 {
        self.host_netns
    }

    fn tgid(self) -> u64 {
        self.tgid
    }

    fn is_shadow(self) -> bool {
        self.is_shadow != 0
    }

    fn balance(self) -> BalanceSettings {
        self.balance
    }

    fn maglev_key(self) -> MaglevKey {
        MaglevKey::from_number(self.balance.key)
    }
}

impl ServiceEntry {
    /// A group, by its place in the order.
    pub fn group(&self, group: usize) -> &Group {
        match group {
            0 => &self.group,
            after => &self.fallbacks[after - 1].group,
        }
    }
}

impl ServiceWords for &ServiceEntry {
    fn range(self, group: usize, netns: Netns, family: Family) -> SlotRange {
        let group = self.group(group);
        let sets: &BackendSets = match netns {
            Netns::Host => &group.host_netns,
            Netns::Other => &group.other_netns,
        };
        match family {
            Family::Ipv4 => sets.ipv4,
            Family::Ipv6 => sets.ipv6,
            Family::All => sets.all,
        }
    }

    fn report_next(self) -> bool {
        self.flags.report_next != 0
    }

    fn algorithm(self) -> Algorithm {
        Algorithm::from_number(self.flags.algorithm)
    }

    fn connects(self) -> u64 {
        self.connects
    }
}

impl<'a> Tables for &'a Model {
    type Control = Control;
    type Service = &'a ServiceEntry;
    type Backend = BackendEntry;

    fn in_pool(&self, address: [u8; 4]) -> bool {
        let (network, mask) = self.pool;
        u32::from_be_bytes(address) & mask == network
    }

    fn in_pool6(&self, address: [u8; 16]) -> bool {
        let (network, mask) = self.pool6;
        u128::from_be_bytes(address) & mask == network
    }

    fn is_probe_address(&self, address: [u8; 4]) -> bool {
        u32::from_be_bytes(address) == self.pool.0
    }

    fn control(&self) -> Option<Control> {
        self.control
    }

    fn frontend(&self, frontend: &Frontend) -> Option<ServiceRef> {
        self.frontends.get(frontend).copied()
    }

    fn frontend6(&self, frontend: &Frontend6) -> Option<ServiceRef> {
        self.frontends6.get(frontend).copied()
    }

    fn service(&self, service: u32) -> Option<&'a ServiceEntry> {
        self.services.get(service as usize)
    }

    fn slot(&self, slot: u32) -> Option<Slot> {
        self.slots.get(slot as usize).copied()
    }

    fn backend(&self, backend: u32) -> Option<BackendEntry> {
        self.backends.get(backend as usize).copied()
    }

    fn now_ns(&self) -> u64 {
        self.now_ns
    }

    fn random(&self) -> u32 {
        self.random
    }

    fn choose_for(&self, question: Question) -> PackedChoice {
        let Ok(Draw { found, .. }) = draw_for(self, question) else { return INCONSISTENT };
        match found {
            Drawn::Backend { .. } => Draw::pack(found),
            Drawn::None(walk) => choose_among(self, question.service, question.reach, walk),
        }
    }

    fn choose_among(&self, service: u32, reach: Reach, walk: Walk) -> PackedChoice {
        choose_among(self, service, reach, walk)
    }

    fn state_of(&self, backend_idx: u32, now_ns: u64, ramps: bool) -> State {
        state_of(self, backend_idx, now_ns, ramps)
    }

    fn sample_of(&self, scan: Scan) -> Sample {
        sample_of(self, scan)
    }
}

impl Caller for Client {
    fn tgid(&self) -> u64 {
        self.tgid
    }

    fn origin(&self) -> (Origin, bool) {
        (self.origin, false)
    }

    fn is_bypassed(&self) -> bool {
        self.is_bypassed
    }

    fn filter(&self, _is_ipv6_only: bool) -> FamilyFilter {
        self.filter
    }

    fn netns_cookie(&self) -> u64 {
        self.netns_cookie
    }

    fn cgroup_id(&self) -> u64 {
        self.tgid
    }

    fn source(&self) -> u64 {
        0
    }
}

/// Bytes that are used up one by one; zeros once there are none left.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    /// A number below `n`.
    fn below(&mut self, n: u32) -> u32 {
        u32::from(self.byte()) % n
    }

    fn range(&mut self) -> SlotRange {
        // Now and then one that no daemon writes.
        match self.byte() {
            255 => SlotRange { first_slot: u32::MAX - 1, n_slots: u32::MAX },
            byte => SlotRange { first_slot: u32::from(byte % 8), n_slots: u32::from(byte / 32) },
        }
    }

    fn group(&mut self) -> Group {
        Group::of(std::array::from_fn(|_| self.range()))
    }
}

/// Decides on a connection that the bytes make up, in tables that they make up, which may be
/// inconsistent; and checks what has to be true of any verdict.
pub fn fuzz(bytes: &[u8]) {
    let mut bytes = Bytes(bytes);
    let mut model =
        Model { pool: (0x7f80_0000, 0xff80_0000), pool6: (0, 0xfc << 120), ..Model::default() };
    if bytes.byte() != 255 {
        model.control = Some(Control {
            heartbeat_ns: bytes.below(2).into(),
            host_netns: bytes.below(3).into(),
            tgid: bytes.below(3).into(),
            is_shadow: bytes.below(4) as u64 / 3,
            max_age_ns: bytes.below(4) as u64 / 3,
            balance: BalanceSettings {
                silence: bytes.byte(),
                key: bytes.below(3) as u8,
                share: bytes.below(3) as u16 * 128,
                max_ms: bytes.below(2) * 300_000,
                slow_start_per_tick: bytes.below(2),
                ..BalanceSettings::default()
            },
            ..Control::default()
        });
    }
    let address4 = |n: u32| if n < 4 { [127, 128, 0, n as u8] } else { [10, 0, 0, n as u8] };
    let address6 = |n: u32| [n as u8; 16];
    let protocol = |n: u32| [IPPROTO_TCP, IPPROTO_UDP, 1][n as usize];
    for _ in 0..bytes.below(5) {
        let (port, protocol) = (bytes.below(3) as u16, protocol(bytes.below(2)));
        let target = ServiceRef { service: bytes.below(4), host_only: bytes.below(2) };
        let n = bytes.below(6);
        let frontend = Frontend { address: address4(n), port, protocol, padding: 0 };
        model.frontends.insert(frontend, target);
        let frontend = Frontend6 { address: address6(n), port, protocol, padding: 0 };
        model.frontends6.insert(frontend, target);
    }
    for _ in 0..bytes.below(4) {
        let mut entry = ServiceEntry { group: bytes.group(), ..ServiceEntry::default() };
        entry.flags.report_next = bytes.below(2);
        entry.flags.algorithm = bytes.below(6);
        entry.connects = bytes.byte().into();
        entry.fallbacks.iter_mut().for_each(|fallback| fallback.group = bytes.group());
        model.services.push(entry);
    }
    for _ in 0..bytes.below(12) {
        let (backend, alias) = (bytes.below(5), bytes.below(6) as u16);
        model.slots.push(Slot { backend, alias, threshold: u16::from(bytes.byte()) << 8 });
    }
    for n in 0..bytes.below(5) {
        let address = Address::v4([10, 0, 0, n as u8]);
        let (port, weight) = (bytes.below(3) as u16, bytes.below(3) as u16);
        let outcomes = BackendOutcomes {
            in_flight: i32::from(bytes.byte().cast_signed()),
            pending: i32::from(bytes.byte().cast_signed()),
            ejection: EjectionWord {
                until_ms: bytes.below(4) * 5_000,
                cause: bytes.below(6) as u8,
                ..EjectionWord::default()
            },
            unanswered_since_us: bytes.below(2),
            added_ms: bytes.below(3) * 5_000,
            ..BackendOutcomes::default()
        };
        let backend = Backend { address, port, weight, ..Backend::default() };
        model.backends.push(BackendEntry { backend, outcomes, ..BackendEntry::default() });
    }
    model.now_ns = u64::from(bytes.below(2)) * HEARTBEAT_TIMEOUT_NS;
    model.random = u32::from_be_bytes(std::array::from_fn(|_| bytes.byte()));
    let client = Client {
        tgid: bytes.below(3).into(),
        origin: [Origin::Application, Origin::Subflow, Origin::Kernel][bytes.below(3) as usize],
        is_bypassed: bytes.below(4) == 3,
        filter: [
            FamilyFilter::Ipv4,
            FamilyFilter::Ipv6,
            FamilyFilter::Ipv4First,
            FamilyFilter::Ipv6First,
            FamilyFilter::All,
        ][bytes.below(5) as usize],
        netns_cookie: bytes.below(3).into(),
    };
    let (n, is_v4) = (bytes.below(6), bytes.below(2) == 0);
    let request = Request {
        destination: match is_v4 {
            true => Destination::V4(address4(n)),
            false => Destination::V6(address6(n)),
        },
        port: bytes.below(3) as u16,
        protocol: protocol(bytes.below(3)),
        call: [Call::Connect, Call::Send][bytes.below(2) as usize],
    };
    let verdict = decide(&&model, &client, &request);
    check(&model, &client, &request, verdict);
}

/// What has to be true of any verdict.
fn check(model: &Model, client: &Client, request: &Request, verdict: Verdict) {
    let found = lookup(&model, request);
    let is_vip = match request.destination {
        Destination::V4(address) => model.in_pool(address),
        Destination::V6(address) => model.in_pool6(address),
    };
    let is_routed = [IPPROTO_TCP, IPPROTO_UDP].contains(&request.protocol);
    if !is_routed || found.is_none() && !is_vip {
        assert_eq!(verdict, Verdict::Pass(PassReason::NoFrontend), "it is no business of ours");
        return;
    }
    let Some(control) = model.control else {
        assert!(!matches!(verdict, Verdict::Send(_)), "nothing is sent before a daemon was there");
        return;
    };
    let is_shadowed = matches!(
        verdict,
        Verdict::Pass(
            PassReason::Shadow { .. } | PassReason::ShadowNoFrontend | PassReason::ShadowProbe
        )
    );
    if control.is_shadow() {
        assert!(matches!(verdict, Verdict::Pass(_)), "shadow mode changes nothing: {verdict:?}");
    } else {
        assert!(!is_shadowed, "{verdict:?}");
    }
    let Verdict::Send(selection) = verdict else { return };
    assert!(!client.is_bypassed && client.origin != Origin::Kernel, "{verdict:?}");
    let target = found.expect("what is sent has a frontend");
    assert_eq!(selection.service, target.service);
    let is_on_host = client.netns_cookie == control.host_netns;
    assert!(target.host_only == 0 || is_on_host, "a pin is the host's alone");
    let entry = model.backends.get(selection.backend_idx as usize);
    assert_eq!(Some(&selection.backend), entry.map(|entry| &entry.backend));
    assert_ne!(selection.backend.port, 0);
    let entry = &model.services[target.service as usize];
    assert_eq!(selection.report, entry.flags.report_next != 0);
    let leads_there = |range: SlotRange| {
        let slots = model.slots.iter().skip(range.first_slot as usize).take(range.n_slots as usize);
        // An alias that is out of range leads to a slot all the same; a daemon writes none.
        slots.clone().any(|slot| {
            let alias = range.first_slot as usize + slot.alias as usize;
            slot.backend == selection.backend_idx
                || model.slots.get(alias).is_some_and(|slot| slot.backend == selection.backend_idx)
        })
    };
    let netns = if is_on_host { Netns::Host } else { Netns::Other };
    let ranges = |family| (0..N_GROUPS).map(move |group| entry.range(group, netns, family));
    let first = |family| match ranges(family).any(|range| range.n_slots > 0) {
        true => family,
        false => Family::All,
    };
    let family = match client.filter {
        FamilyFilter::Ipv4 => Family::Ipv4,
        FamilyFilter::Ipv6 => Family::Ipv6,
        FamilyFilter::Ipv4First => first(Family::Ipv4),
        FamilyFilter::Ipv6First => first(Family::Ipv6),
        FamilyFilter::All => Family::All,
    };
    assert!(ranges(family).any(leads_there), "not the service's, or of no use: {verdict:?}");
}
