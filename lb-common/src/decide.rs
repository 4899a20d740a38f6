//! The verdict on a connection: whether it passes untouched, is refused, or is sent to a backend, and
//! why. A pure function over the tables and over the caller's properties, so that the same code is
//! tested on the host and runs in the kernel.
//!
//! Whatever costs a look-up or a helper call is a method, which is called only where it decides.

use crate::{
    ANY_PORT, Algorithm, Backend, BackendWords, BalanceSettings, Candidates, ChoiceReason, Draw,
    Frontend, Frontend6, IPPROTO_TCP, IPPROTO_UDP, Inconsistent, MaglevKey, N_GROUPS, NO_BACKEND,
    PackedChoice, Sample, Scan, ServiceRef, Slot, SlotRange, State, Walk, choose_in_order, draw,
    sample, state_at, unpack,
};

/// After how many nanoseconds without a heartbeat the daemon's process id isn't trusted any more:
/// another process may have got it.
pub const HEARTBEAT_TIMEOUT_NS: u64 = 10_000_000_000;

/// What a connection goes to, by its address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// An IPv4 address, in the order of octets; also where an AF_INET6 socket names its mapped form.
    V4([u8; 4]),
    /// An IPv6 address.
    V6([u8; 16]),
}

/// Which call is decided on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// connect(). Of a UDP socket it is counted apart: it may never send.
    Connect,
    /// sendto() or sendmsg() with an address.
    Send,
}

/// What is decided on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The address.
    pub destination: Destination,
    /// The port.
    pub port: u16,
    /// The protocol number of the socket.
    pub protocol: u8,
    /// The call.
    pub call: Call,
}

impl Request {
    /// Whether a UDP socket connects.
    #[inline(always)]
    pub fn is_udp_connect(&self) -> bool {
        self.call == Call::Connect && self.protocol == IPPROTO_UDP
    }
}

/// Whose socket it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// An application's.
    Application,
    /// The kernel's part of an application's MPTCP socket.
    Subflow,
    /// The kernel's own, as NFS has them.
    Kernel,
}

/// The backends that a socket can reach, by their address families.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FamilyFilter {
    /// IPv4 backends.
    Ipv4,
    /// IPv6 backends.
    Ipv6,
    /// IPv4 backends, or all where no group has any.
    Ipv4First,
    /// IPv6 backends, or all where no group has any.
    Ipv6First,
    /// All.
    All,
}

impl FamilyFilter {
    /// The family that is looked for, and whether it is all where no group has any backend of it. Not by
    /// group: else IPv6 backends of the first would come before IPv4 ones of a spare set, which are all
    /// that other sockets of the same client reach.
    #[inline(always)]
    fn preference(self) -> (Family, bool) {
        match self {
            FamilyFilter::Ipv4 => (Family::Ipv4, false),
            FamilyFilter::Ipv6 => (Family::Ipv6, false),
            FamilyFilter::Ipv4First => (Family::Ipv4, true),
            FamilyFilter::Ipv6First => (Family::Ipv6, true),
            FamilyFilter::All => (Family::All, false),
        }
    }
}

/// One of a group's [`BackendSets`](crate::BackendSets), by its place.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Netns {
    /// For connections from the host's network namespace.
    Host = 0,
    /// For those from any other.
    Other = 1,
}

/// One of the ranges of [`BackendSets`](crate::BackendSets), by its place.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// [`BackendSets::ipv4`](crate::BackendSets::ipv4)
    Ipv4 = 0,
    /// [`BackendSets::ipv6`](crate::BackendSets::ipv6)
    Ipv6 = 1,
    /// [`BackendSets::all`](crate::BackendSets::all)
    All = 2,
}

/// Which of a group's ranges a connection selects from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// By where it comes from.
    pub netns: Netns,
    /// By the address families of the socket.
    pub family: Family,
}

impl Reach {
    /// The slots of a group.
    #[inline(always)]
    fn range(self, service: impl ServiceWords, group: usize) -> SlotRange {
        service.range(group, self.netns, self.family)
    }
}

/// What the daemon writes for the programs ([`Control`](crate::Control)), each word as it is now.
pub trait ControlWords: Copy {
    /// The last heartbeat.
    fn heartbeat_ns(self) -> u64;
    /// When the table was last known to be right.
    fn table_ns(self) -> u64;
    /// How old the table may be while no daemon is alive that has applied it; 0 for any age.
    fn max_age_ns(self) -> u64;
    /// Whether the table is an earlier daemon's.
    fn is_inherited(self) -> bool;
    /// The cookie of the host's network namespace.
    fn host_netns(self) -> u64;
    /// The daemon's process id.
    fn tgid(self) -> u64;
    /// Whether connections are only counted.
    fn is_shadow(self) -> bool;
    /// How backends are chosen.
    fn balance(self) -> BalanceSettings;
    /// What Maglev hashes: [`BalanceSettings::key`](crate::BalanceSettings::key).
    fn maglev_key(self) -> MaglevKey;
}

/// A service ([`ServiceEntry`](crate::ServiceEntry)), each word as it is now.
pub trait ServiceWords: Copy {
    /// A range of slots of a group, of [`N_GROUPS`].
    fn range(self, group: usize, netns: Netns, family: Family) -> SlotRange;
    /// Whether the next connection is to be reported.
    fn report_next(self) -> bool;
    /// How a backend is selected.
    fn algorithm(self) -> Algorithm;
    /// The connections that were sent to a backend before this one.
    fn connects(self) -> u64;
}

/// The configuration, the maps, the clock and the source of random numbers.
pub trait Tables {
    /// See [`Tables::control`].
    type Control: ControlWords;
    /// See [`Tables::service`].
    type Service: ServiceWords;
    /// See [`Tables::backend`].
    type Backend: BackendWords;
    /// Whether an IPv4 address is in the pool.
    fn in_pool(&self, address: [u8; 4]) -> bool;
    /// Whether an IPv6 address is in the IPv6 pool.
    fn in_pool6(&self, address: [u8; 16]) -> bool;
    /// Whether an IPv4 address is the pool's own, to which the daemon sends its probes.
    fn is_probe_address(&self, address: [u8; 4]) -> bool;
    /// What the daemon writes for the programs.
    fn control(&self) -> Option<Self::Control>;
    /// The service behind an IPv4 frontend.
    fn frontend(&self, frontend: &Frontend) -> Option<ServiceRef>;
    /// The service behind an IPv6 frontend.
    fn frontend6(&self, frontend: &Frontend6) -> Option<ServiceRef>;
    /// A service, by its index.
    fn service(&self, service: u32) -> Option<Self::Service>;
    /// A slot, by its index.
    fn slot(&self, slot: u32) -> Option<Slot>;
    /// A backend, by its index.
    fn backend(&self, backend: u32) -> Option<Self::Backend>;
    /// The time, by CLOCK_MONOTONIC.
    fn now_ns(&self) -> u64;
    /// A number that is uniform over its whole range.
    fn random(&self) -> u32;
    /// The choice: [`draw_for`], and [`choose_among`] where that leads to no backend. A method for the
    /// reason that [`Candidates::choose_in_order`] has. Where the request is by TCP, what the choice
    /// found of backends is applied to them.
    fn choose_for(&self, question: Question) -> PackedChoice;
    /// [`choose_among`], likewise.
    fn choose_among(&self, service: u32, reach: Reach, walk: Walk) -> PackedChoice;
    /// [`state_of`], likewise.
    fn state_of(&self, backend_idx: u32, now_ns: u64, ramps: bool) -> State;
    /// [`sample_of`], likewise.
    fn sample_of(&self, scan: Scan) -> Sample;
}

/// Who makes the call.
pub trait Caller {
    /// The process id, as the kernel sees it.
    fn tgid(&self) -> u64;
    /// Whose socket it is; and whether it is an IPv6 socket that is closed to IPv4, where
    /// [`Caller::filter`] has a use for that.
    fn origin(&self) -> (Origin, bool);
    /// Whether the process is in a cgroup that is bypassed, or below one.
    fn is_bypassed(&self) -> bool;
    /// Called once the connection is to go to a backend, if the service has one: what the caller needs for that
    /// can be loaded while the backend is chosen.
    fn prepare(&self) {}
    /// The backends that the socket can reach.
    fn filter(&self, is_ipv6_only: bool) -> FamilyFilter;
    /// The cookie of the network namespace.
    fn netns_cookie(&self) -> u64;
    /// The id of the process's cgroup.
    fn cgroup_id(&self) -> u64;
    /// A number for the address that the socket is bound to; 0 where it is bound to none.
    fn source(&self) -> u64;
}

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes where it was going.
    Pass(PassReason),
    /// It fails with ECONNREFUSED.
    Refuse(RefuseReason),
    /// It goes to a backend.
    Send(Selection),
}

/// Why a connection passes untouched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PassReason {
    /// It isn't to a frontend, or to none that applies where it comes from.
    NoFrontend,
    /// Its process or socket is bypassed.
    Bypassed,
    /// Connections are only counted. This one would have met a frontend of the service.
    Shadow {
        /// The index of the service.
        service: u32,
    },
    /// Connections are only counted. This one would have been refused.
    ShadowNoFrontend,
    /// Connections are only counted. This one is to the address of the daemon's probes.
    ShadowProbe,
}

/// Why a connection is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefuseReason {
    /// It is to the address of the daemon's probes.
    Probe,
    /// It is into a pool, and no frontend matches.
    NoFrontend,
    /// The service has no backend that the socket reaches.
    NoBackend {
        /// The index of the service.
        service: u32,
        /// Whether it has some of another address family.
        has_other_family: bool,
        /// Whether the connection is to be reported.
        report: bool,
    },
    /// The service leads to a slot or a backend that isn't there.
    Inconsistent {
        /// The index of the service.
        service: u32,
    },
}

/// A backend, and how it was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Selection {
    /// The index of the service.
    pub service: u32,
    /// The index of the backend.
    pub backend_idx: u32,
    /// The backend.
    pub backend: Backend,
    /// Why it was chosen.
    pub reason: ChoiceReason,
    /// Whose socket it is.
    pub origin: Origin,
    /// Whether the connection is to be reported.
    pub report: bool,
}

/// Decides on a connection.
#[inline(always)]
pub fn decide(tables: &impl Tables, caller: &impl Caller, request: &Request) -> Verdict {
    if request.protocol != IPPROTO_TCP && request.protocol != IPPROTO_UDP {
        return Verdict::Pass(PassReason::NoFrontend);
    }
    let found = lookup(tables, request);
    if found.is_none() {
        let in_pool = match request.destination {
            Destination::V4(address) => tables.in_pool(address),
            Destination::V6(address) => tables.in_pool6(address),
        };
        if !in_pool {
            return Verdict::Pass(PassReason::NoFrontend);
        }
        if let Destination::V4(address) = request.destination
            && tables.is_probe_address(address)
        {
            let is_shadow = tables.control().is_some_and(ControlWords::is_shadow);
            return match is_shadow {
                true => Verdict::Pass(PassReason::ShadowProbe),
                false => Verdict::Refuse(RefuseReason::Probe),
            };
        }
    }
    let Some(control) = tables.control() else {
        return Verdict::Pass(PassReason::NoFrontend);
    };
    if is_daemon(tables, control, caller) {
        return Verdict::Pass(PassReason::Bypassed);
    }
    let (origin, is_ipv6_only) = caller.origin();
    if origin == Origin::Kernel || caller.is_bypassed() {
        return Verdict::Pass(PassReason::Bypassed);
    }
    if control.is_shadow() {
        return Verdict::Pass(match found {
            None => PassReason::ShadowNoFrontend,
            Some(ServiceRef { service, host_only }) => {
                match host_only == 0 || is_on_host(control, caller) {
                    true => PassReason::Shadow { service },
                    false => PassReason::NoFrontend,
                }
            }
        });
    }
    let Some(ServiceRef { service, host_only }) = found else {
        return Verdict::Refuse(RefuseReason::NoFrontend);
    };
    let inconsistent = Verdict::Refuse(RefuseReason::Inconsistent { service });
    let (family, or_all) = caller.filter(is_ipv6_only).preference();
    let Some(words) = tables.service(service) else { return inconsistent };
    // Asking where a connection comes from is spared where it makes no difference. One of the two
    // words may be newer than the other: if they are the same, each is what either may have.
    let first_range = |netns| Reach { netns, family }.range(words, 0);
    let (on_host, elsewhere) = (first_range(Netns::Host), first_range(Netns::Other));
    let is_on_host = host_only == 0 && is_same(on_host, elsewhere) || is_on_host(control, caller);
    if host_only != 0 && !is_on_host {
        return Verdict::Pass(PassReason::NoFrontend);
    }
    // As if the daemon had taken the service's backends away, which it does while it is alive.
    if is_expired(control, || tables.now_ns()) {
        let (has_other_family, report) = (false, false);
        return Verdict::Refuse(RefuseReason::NoBackend { service, has_other_family, report });
    }
    caller.prepare();
    let report = words.report_next();
    let netns = match self::is_on_host(control, caller) {
        true => Netns::Host,
        false => Netns::Other,
    };
    let mut reach = Reach { netns, family };
    let mut range = if is_on_host { on_host } else { elsewhere };
    let mut group = 0;
    if range.n_slots == 0 {
        (group, range) = fallback(words, reach);
        if range.n_slots == 0 && or_all {
            reach.family = Family::All;
            (group, range) = first_group(words, reach);
        }
        if range.n_slots == 0 {
            let has_other_family = has_any(words, reach.netns);
            return Verdict::Refuse(RefuseReason::NoBackend { service, has_other_family, report });
        }
    }
    let key = || match control.maglev_key() {
        MaglevKey::Cgroup => caller.cgroup_id(),
        MaglevKey::Netns => caller.netns_cookie(),
        MaglevKey::Source => match caller.source() {
            0 => caller.netns_cookie(),
            source => source,
        },
    };
    let packed = tables.choose_for(Question {
        service,
        reach,
        group,
        range,
        key: if words.algorithm() == Algorithm::Maglev { key() } else { 0 },
        is_udp_connect: request.is_udp_connect(),
        is_tcp: request.protocol == IPPROTO_TCP,
    });
    let (backend_idx, reason) = unpack(packed);
    let Some(backend) = tables.backend(backend_idx).map(BackendWords::backend) else {
        return inconsistent;
    };
    if backend.port == 0 {
        return inconsistent;
    }
    Verdict::Send(Selection { service, backend_idx, backend, reason, origin, report })
}

/// What a connection chooses from, and by what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    /// The index of the service.
    pub service: u32,
    /// Which of each group's ranges it is.
    pub reach: Reach,
    /// The first group that has backends.
    pub group: usize,
    /// Its range.
    pub range: SlotRange,
    /// What Maglev hashes; 0 for any other algorithm.
    pub key: u64,
    /// See [`Request::is_udp_connect`].
    pub is_udp_connect: bool,
    /// Whether it is by TCP, by which backends are ejected and tried.
    pub is_tcp: bool,
}

/// [`draw`] among the backends of a service that a connection can reach.
///
/// # Errors
/// See [`Inconsistent`].
#[inline(always)]
pub fn draw_for<T: Tables>(tables: &T, question: Question) -> Result<Draw, Inconsistent> {
    let Question { service, reach, group, range, key, is_udp_connect, is_tcp } = question;
    let (Some(control), Some(words)) = (tables.control(), tables.service(service)) else {
        return Err(Inconsistent);
    };
    // connect() of a UDP socket isn't counted as a connection, so it has no turn.
    let algorithm = match words.algorithm() {
        Algorithm::RoundRobin if is_udp_connect => Algorithm::Random,
        algorithm => algorithm,
    };
    draw(&View { tables, control, service, words, algorithm, reach, key, is_tcp }, group, range)
}

/// The backends of a service that a connection can reach.
struct View<'a, T: Tables> {
    tables: &'a T,
    control: T::Control,
    service: u32,
    words: T::Service,
    algorithm: Algorithm,
    reach: Reach,
    key: u64,
    is_tcp: bool,
}

impl<T: Tables> Candidates for View<'_, T> {
    type Words = T::Backend;

    #[inline(always)]
    fn range(&self, group: usize) -> SlotRange {
        self.reach.range(self.words, group)
    }

    #[inline(always)]
    fn slot(&self, slot: u32) -> Option<Slot> {
        self.tables.slot(slot)
    }

    #[inline(always)]
    fn words(&self, backend_idx: u32) -> Option<T::Backend> {
        self.tables.backend(backend_idx)
    }

    #[inline(always)]
    fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    #[inline(always)]
    fn settings(&self) -> BalanceSettings {
        self.control.balance()
    }

    #[inline(always)]
    fn n_before(&self) -> u64 {
        self.words.connects()
    }

    #[inline(always)]
    fn key(&self) -> u64 {
        self.key
    }

    #[inline(always)]
    fn is_tcp(&self) -> bool {
        self.is_tcp
    }

    #[inline(always)]
    fn now_ns(&self) -> u64 {
        self.tables.now_ns()
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        self.tables.random()
    }

    #[inline(always)]
    fn state_at(&self, backend_idx: u32, now_ns: u64, ramps: bool) -> State {
        self.tables.state_of(backend_idx, now_ns, ramps)
    }

    #[inline(always)]
    fn sample(&self, scan: Scan) -> Sample {
        self.tables.sample_of(scan)
    }

    #[inline(always)]
    fn choose_in_order(&self, walk: Walk) -> PackedChoice {
        self.tables.choose_among(self.service, self.reach, walk)
    }
}

/// [`choose_in_order`] among the backends of a service that a connection can reach.
#[inline(always)]
pub fn choose_among<T: Tables>(tables: &T, service: u32, reach: Reach, walk: Walk) -> PackedChoice {
    let (Some(control), Some(words)) = (tables.control(), tables.service(service)) else {
        return u64::from(NO_BACKEND);
    };
    // None of them is asked for.
    let (algorithm, key, is_tcp) = (Algorithm::default(), 0, true);
    choose_in_order(&View { tables, control, service, words, algorithm, reach, key, is_tcp }, walk)
}

/// How a backend stands at a time.
#[inline(always)]
pub fn state_of<T: Tables>(tables: &T, backend_idx: u32, now_ns: u64, ramps: bool) -> State {
    match (tables.backend(backend_idx), tables.control()) {
        (Some(words), Some(control)) => state_at(words, &control.balance(), now_ns, ramps),
        _ => State::NONE,
    }
}

/// A sample of a range's backends.
#[inline(always)]
pub fn sample_of<T: Tables>(tables: &T, scan: Scan) -> Sample {
    let state = |idx| tables.state_of(idx, scan.now_ns, scan.ramps);
    sample(scan, |idx| tables.slot(idx), state)
}

/// The service behind the request's address and port, or the address's service for any port. Pins
/// and public VIPs have one port each.
#[inline(always)]
pub fn lookup(tables: &impl Tables, request: &Request) -> Option<ServiceRef> {
    let &Request { destination, port, protocol, .. } = request;
    match destination {
        Destination::V4(address) => {
            let mut frontend = Frontend { address, port, protocol, padding: 0 };
            let found = tables.frontend(&frontend);
            if found.is_some() || !tables.in_pool(address) || tables.is_probe_address(address) {
                return found;
            }
            frontend.port = ANY_PORT;
            tables.frontend(&frontend)
        }
        Destination::V6(address) => {
            let mut frontend = Frontend6 { address, port, protocol, padding: 0 };
            let found = tables.frontend6(&frontend);
            if found.is_some() || !tables.in_pool6(address) {
                return found;
            }
            frontend.port = ANY_PORT;
            tables.frontend6(&frontend)
        }
    }
}

/// Whether the daemon itself connects.
#[inline(always)]
fn is_daemon(tables: &impl Tables, control: impl ControlWords, caller: &impl Caller) -> bool {
    caller.tgid() == control.tgid()
        && tables.now_ns().wrapping_sub(control.heartbeat_ns()) < HEARTBEAT_TIMEOUT_NS
}

/// Whether the table is too old to be used, and no daemon is alive that would decide so for each service:
/// one that has applied no table of its own knows nothing of this one's services.
/// The clock is only read where the age matters.
#[inline(always)]
pub fn is_expired(control: impl ControlWords, now_ns: impl FnOnce() -> u64) -> bool {
    let max_age_ns = control.max_age_ns();
    if max_age_ns == 0 {
        return false;
    }
    let now_ns = now_ns();
    now_ns.saturating_sub(control.table_ns()) >= max_age_ns
        && (control.is_inherited()
            || now_ns.saturating_sub(control.heartbeat_ns()) >= HEARTBEAT_TIMEOUT_NS)
}

#[inline(always)]
fn is_on_host(control: impl ControlWords, caller: &impl Caller) -> bool {
    caller.netns_cookie() == control.host_netns()
}

#[inline(always)]
fn is_same(one: SlotRange, other: SlotRange) -> bool {
    let word = |range: SlotRange| -> u64 { zerocopy::transmute!(range) };
    word(one) == word(other)
}

/// The first group that has any slots for this connection, and these: none where no group has.
#[inline(always)]
pub fn first_group(service: impl ServiceWords, reach: Reach) -> (usize, SlotRange) {
    let range = reach.range(service, 0);
    if range.n_slots != 0 { (0, range) } else { fallback(service, reach) }
}

/// The first group after the first that has any slots for this connection, and these.
#[inline(always)]
fn fallback(service: impl ServiceWords, reach: Reach) -> (usize, SlotRange) {
    let mut group = 1;
    while group < N_GROUPS {
        let range = reach.range(service, group);
        if range.n_slots != 0 {
            return (group, range);
        }
        group += 1;
    }
    (group, SlotRange { first_slot: 0, n_slots: 0 })
}

/// Whether a service has any backend, of whatever family.
#[inline(always)]
fn has_any(service: impl ServiceWords, netns: Netns) -> bool {
    let mut group = 0;
    while group < N_GROUPS {
        if service.range(group, netns, Family::All).n_slots != 0 {
            return true;
        }
        group += 1;
    }
    false
}

#[cfg(any(test, fuzzing))]
pub mod model;

#[cfg(test)]
mod tests;
