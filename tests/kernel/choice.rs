//! The choice of a backend in the kernel: what it knows of them is written into the map by hand.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use aya::maps::{Array, Map, MapData};
use lb_common::{BackendEntry, BalanceSettings, Cause, Control, EjectionWord, SlowStart};
use lb_userspace::config::BalanceAlgorithm;
use lb_userspace::table::{Protocols, Service};
use rustix::time::{ClockId, clock_gettime};
use zerocopy::{FromBytes as _, IntoBytes as _};

use crate::fixture::{Bed, Echo, Server, VIP, connect, connect_udp, dead, service, ways};

/// Long enough for no trial to end by itself.
const EJECTED_MS: u32 = 200_000;
const N_CONNECTS: u32 = 40;

const SETTINGS: BalanceSettings = BalanceSettings {
    refused: 1,
    failures: 3,
    silence: 20,
    key: 0,
    share: 128,
    padding: 0,
    base_ms: 100_000,
    max_ms: 300_000,
    slow_start_per_tick: 0,
    reserved: 0,
};

/// CLOCK_MONOTONIC, in milliseconds.
pub fn now_ms() -> u32 {
    let now = clock_gettime(ClockId::Monotonic);
    (now.tv_sec * 1_000 + now.tv_nsec / 1_000_000) as u32
}

fn backends(bed: &Bed) -> Array<MapData, [u8; 64]> {
    let pin = bed.options.bpffs.join(format!("v{}/maps/BACKENDS", lb_common::LAYOUT));
    Map::from_map_data(MapData::from_pin(pin).unwrap()).unwrap().try_into().unwrap()
}

pub fn entry(bed: &Bed, address: SocketAddr) -> (u32, BackendEntry) {
    let idx = bed.datapath.indices("web").unwrap().backends[&address];
    (idx, BackendEntry::read_from_bytes(&backends(bed).get(&idx, 0).unwrap()).unwrap())
}

/// Changes what the kernel knows of a backend.
pub fn change(bed: &Bed, address: SocketAddr, change: impl FnOnce(&mut BackendEntry)) {
    let (idx, mut entry) = entry(bed, address);
    change(&mut entry);
    let bytes: [u8; 64] = entry.as_bytes().try_into().unwrap();
    backends(bed).set(idx, bytes, 0).unwrap();
}

/// Ejects a backend until so long from now, or ago.
fn eject(bed: &Bed, address: SocketAddr, cause: Cause, later_ms: i32) {
    let until_ms = now_ms().wrapping_add_signed(later_ms);
    let ejection =
        EjectionWord { until_ms, ejections: 1, cause: cause as u8, ..EjectionWord::default() };
    change(bed, address, |entry| entry.outcomes.ejection = ejection);
}

fn bed(algorithm: BalanceAlgorithm, servers: &[&Server]) -> Bed {
    // Room for Maglev's tables, also where maps are small.
    let mut bed = Bed::with(|options| options.datapath.max_backends = 8_192);
    bed.apply(vec![web(algorithm, servers)]);
    bed.datapath.set_balance(SETTINGS);
    bed
}

fn web(algorithm: BalanceAlgorithm, servers: &[&Server]) -> Service {
    let backends: Vec<_> = servers.iter().map(|server| (server.address, 1)).collect();
    Service { algorithm, ..service("web", VIP, &backends) }
}

/// How many of some connections each server answered, by AF_INET and by AF_INET6 in turn.
fn answers(n: u32) -> BTreeMap<char, u32> {
    let mut answers = BTreeMap::new();
    for way in ways(VIP, 80).into_iter().cycle().take(n as usize) {
        *answers.entry(connect(way).unwrap()).or_default() += 1;
    }
    answers
}

pub fn least_avoids_the_busier_one() {
    let (a, b) = (Server::start(b'a'), Server::start(b'b'));
    let bed = bed(BalanceAlgorithm::Least, &[&a, &b]);
    change(&bed, a.address, |entry| entry.outcomes.in_flight = 1_000);
    // Where both draws fall on it: a quarter. 160 times within seven standard deviations.
    let n_busy = answers(160).get(&'a').copied().unwrap_or(0);
    assert!((2..=80).contains(&n_busy), "{n_busy} of 160");
}

pub fn round_robin_is_exact() {
    let servers = [b'a', b'b', b'c', b'd'].map(Server::start);
    let _bed = bed(BalanceAlgorithm::RoundRobin, &servers.each_ref());
    assert!(answers(N_CONNECTS).values().all(|&n| n == N_CONNECTS / 4));
}

pub fn maglev_keeps_a_cgroups_backend() {
    let servers = [b'a', b'b', b'c', b'd'].map(Server::start);
    let mut bed = bed(BalanceAlgorithm::Maglev, &servers.each_ref());
    let first = answers(N_CONNECTS);
    assert_eq!(first.len(), 1, "{first:?}");
    let kept = *first.keys().next().unwrap();
    // Another one leaves: it has one still, mostly the same.
    let other = servers.iter().find(|server| connect(server.address).unwrap() != kept).unwrap();
    let left: Vec<_> = servers.iter().filter(|server| server.address != other.address).collect();
    bed.apply(vec![web(BalanceAlgorithm::Maglev, &left)]);
    assert_eq!(answers(N_CONNECTS).len(), 1);
    // While its backend is ejected it goes to another one, always the same, and then returns.
    let after = *answers(1).keys().next().unwrap();
    let own = left.iter().find(|server| connect(server.address).unwrap() == after).unwrap();
    eject(&bed, own.address, Cause::Refused, EJECTED_MS as i32);
    let meanwhile = answers(N_CONNECTS);
    assert!(meanwhile.len() == 1 && !meanwhile.contains_key(&after), "{meanwhile:?}");
    change(&bed, own.address, |entry| entry.outcomes.ejection = EjectionWord::default());
    assert_eq!(answers(N_CONNECTS), BTreeMap::from([(after, N_CONNECTS)]));
}

pub fn ejected_backends_come_last() {
    let (a, b) = (Server::start(b'a'), Server::start(b'b'));
    for algorithm in BalanceAlgorithm::ALL {
        let bed = bed(algorithm, &[&a, &b]);
        let only = |letter| BTreeMap::from([(letter, N_CONNECTS)]);
        eject(&bed, a.address, Cause::Refused, EJECTED_MS as i32);
        assert_eq!(answers(N_CONNECTS), only('b'), "{algorithm:?}");
        // A silent one comes before one that refuses. What it answered ends that, so once each.
        eject(&bed, b.address, Cause::Silence, EJECTED_MS as i32);
        assert_eq!(answers(1).into_keys().next(), Some('b'), "{algorithm:?}");
    }
}

pub fn silence_is_found_at_the_next_connect() {
    let (a, b) = (Server::start(b'a'), Server::start(b'b'));
    let bed = bed(BalanceAlgorithm::Random, &[&a, &b]);
    change(&bed, a.address, |entry| {
        entry.outcomes.pending = 1;
        entry.outcomes.unanswered_since_us = now_ms().wrapping_mul(1_000).wrapping_sub(2_000_000);
    });
    assert_eq!(answers(N_CONNECTS), BTreeMap::from([('b', N_CONNECTS)]));
    let (_, found) = entry(&bed, a.address);
    assert_eq!(found.outcomes.ejection.cause, Cause::Silence as u8);
    assert_eq!(found.outcomes.ejection.ejections, 1);
}

pub fn a_trial_is_claimed_by_one_connection() {
    let b = Server::start(b'b');
    let dead: SocketAddr = dead().into();
    let mut bed = Bed::new();
    bed.apply(vec![service("web", VIP, &[(dead, 1), (b.address, 1)])]);
    bed.datapath.set_balance(SETTINGS);
    eject(&bed, dead, Cause::Refused, -1);
    let n_refused = (0..N_CONNECTS).filter(|_| connect((VIP, 80)).is_err()).count();
    assert_eq!(n_refused, 1);
    assert_eq!(entry(&bed, dead).1.outcomes.ejection.ejections, 2);
}

pub fn the_spare_set_takes_over_and_gives_back() {
    let (a, b) = (Server::start(b'a'), Server::start(b'b'));
    let mut bed = Bed::new();
    let mut web = web(BalanceAlgorithm::Least, &[&a, &b]);
    web.backends[1].group = 1;
    bed.apply(vec![web]);
    bed.datapath.set_balance(SETTINGS);
    let only = |letter| BTreeMap::from([(letter, N_CONNECTS)]);
    assert_eq!(answers(N_CONNECTS), only('a'));
    eject(&bed, a.address, Cause::Refused, EJECTED_MS as i32);
    assert_eq!(answers(N_CONNECTS), only('b'));
    change(&bed, a.address, |entry| entry.outcomes.ejection = EjectionWord::default());
    assert_eq!(answers(N_CONNECTS), only('a'));
}

pub fn beyond_the_share_the_spare_set_is_used() {
    let servers = [b'a', b'b', b'c', b'd'].map(Server::start);
    let mut bed = Bed::new();
    let mut web = web(BalanceAlgorithm::Least, &servers.each_ref());
    web.backends[3].group = 1;
    bed.apply(vec![web]);
    bed.datapath.set_balance(SETTINGS);
    eject(&bed, servers[0].address, Cause::Refused, EJECTED_MS as i32);
    assert!(!answers(N_CONNECTS).contains_key(&'d'));
    eject(&bed, servers[1].address, Cause::Refused, EJECTED_MS as i32);
    // Half of the connections each.
    assert_eq!(answers(N_CONNECTS).into_keys().collect::<String>(), "cd");
}

pub fn a_new_backend_ramps_up() {
    let (a, b) = (Server::start(b'a'), Server::start(b'b'));
    let mut bed = bed(BalanceAlgorithm::Random, &[&a, &b]);
    let per_tick = SlowStart::of(3_000_000_000_000).per_tick;
    bed.datapath.set_balance(BalanceSettings { slow_start_per_tick: per_tick, ..SETTINGS });
    change(&bed, a.address, |entry| entry.outcomes.added_ms = now_ms());
    // A tenth of the other one's, which is 15, within seven standard deviations.
    let n_new = answers(160).get(&'a').copied().unwrap_or(0);
    assert!(n_new <= 40, "{n_new} of 160");
}

pub fn datagrams_avoid_an_ejected_backend() {
    let (a, b) = (Echo::start(b'a'), Echo::start(b'b'));
    let mut bed = Bed::new();
    let backends = [(a.address, 1), (b.address, 1)];
    bed.apply(vec![Service { protocols: Protocols::Both, ..service("web", VIP, &backends) }]);
    bed.datapath.set_balance(SETTINGS);
    let answers = || {
        let ways = ways(VIP, 80).into_iter().cycle().take(N_CONNECTS as usize);
        ways.map(|way| connect_udp(way).unwrap()).collect::<BTreeSet<_>>()
    };
    eject(&bed, a.address, Cause::Silence, EJECTED_MS as i32);
    assert_eq!(answers(), BTreeSet::from(['b']));
    // Of its TCP port alone.
    eject(&bed, a.address, Cause::Refused, EJECTED_MS as i32);
    assert_eq!(answers(), BTreeSet::from(['a', 'b']));
}

/// A client of the trace that was killed leaves the switch on until then.
pub fn a_trace_that_is_over_is_switched_off() {
    let a = Server::start(b'a');
    let mut bed = Bed::new();
    bed.apply(vec![service("web", VIP, &[(a.address, 1)])]);
    let until_ns = || {
        let pin = bed.options.bpffs.join(format!("v{}/maps/CONTROL", lb_common::LAYOUT));
        let map = Map::from_map_data(MapData::from_pin(pin).unwrap()).unwrap();
        let control: Array<_, [u8; size_of::<Control>()]> = map.try_into().unwrap();
        Control::read_from_bytes(&control.get(&0, 0).unwrap()).unwrap().trace.until_ns
    };
    bed.datapath.set_trace(Some((Duration::from_secs(60), u32::MAX)));
    connect((VIP, 80)).unwrap();
    assert_ne!(until_ns(), 0);
    bed.datapath.set_trace(Some((Duration::ZERO, u32::MAX)));
    connect((VIP, 80)).unwrap();
    assert_eq!(until_ns(), 0);
}
