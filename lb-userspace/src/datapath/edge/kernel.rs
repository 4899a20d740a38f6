//! The unit's maps, but for those of frontends.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::mem::offset_of;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;

use aya::Ebpf;
use aya::maps::{MapData, PerCpuArray};
use lb_common::{
    Address, EdgeControl, EdgeCounters, EdgeInterface, EdgeProcessor, EdgeSettings, FlowAddresses6,
    FlowKey4, FlowKey6, FlowRecord, FlowRef, FlowState, FlowWord, N_FAST_PATHS, PROOF_GENERATION,
    is_long_ago,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::super::error::DatapathError;
use super::super::kernel::{AtomicArray, Hash, Plain, io_error, take_hash, take_per_cpu};
use super::super::pins::{Pins, monotonic_ns};

/// The maps.
#[derive(Debug)]
pub struct EdgeMaps {
    own: Hash<Address, u32>,
    /// The addresses in `own`.
    own_addresses: BTreeSet<IpAddr>,
    flows: Hash<FlowKey4, FlowRef>,
    flows6: Hash<FlowKey6, FlowRef>,
    records: FlowRecords,
    control: Arc<AtomicArray<EdgeControl>>,
    counters: Arc<AtomicArray<EdgeCounters>>,
    interfaces: Arc<AtomicArray<EdgeInterface>>,
    processors: Processors,
    /// Records that were claimed at the last sweep, by their indices, with their times.
    stuck: BTreeMap<u32, u32>,
}

/// How many flows a part of a sweep ends at most: two system calls each, while the datapath waits.
const MAX_ENDED: u32 = 1_024;

/// What the fast path keeps for each processor.
struct Processors(PerCpuArray<MapData, Plain<EdgeProcessor>>);

impl fmt::Debug for Processors {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Processors")
    }
}

/// The records of flows, which are read without a lock.
#[derive(Clone, Debug)]
pub struct FlowRecords {
    records: Arc<AtomicArray<FlowRecord>>,
    addresses6: Arc<AtomicArray<FlowAddresses6>>,
}

/// Where a daemon that keeps the frontends has its heartbeat.
#[derive(Clone, Debug)]
pub struct Heartbeat(Arc<AtomicArray<EdgeControl>>);

impl Heartbeat {
    /// An earlier daemon's, whose programs go on until this one's are loaded.
    pub fn inherited(pins: &Pins) -> Option<Heartbeat> {
        let name = "EDGE_CONTROL";
        AtomicArray::pinned(&pins.maps().join(name), name).ok().map(Heartbeat)
    }

    /// Writes it.
    pub fn set(&self, now_ns: u64) {
        let at = offset_of!(EdgeControl, settings) + offset_of!(EdgeSettings, heartbeat_ns);
        self.0.store_field(0, at, &now_ns);
    }
}

/// A flow as its record has it.
#[derive(Clone, Copy, Debug)]
pub struct RawFlow {
    /// Its record.
    pub record: FlowRecord,
    /// The client.
    pub client: SocketAddr,
    /// What it sent to.
    pub vip: SocketAddr,
    /// Where its packets go.
    pub backend: SocketAddr,
    /// From where they do.
    pub source: SocketAddr,
}

impl EdgeMaps {
    /// Takes the maps of a loaded object.
    ///
    /// # Errors
    /// When one isn't there.
    pub fn take(ebpf: &mut Ebpf) -> Result<EdgeMaps, DatapathError> {
        Ok(EdgeMaps {
            own: take_hash(ebpf, "EDGE_OWN")?,
            own_addresses: BTreeSet::new(),
            flows: take_hash(ebpf, "EDGE_FLOWS")?,
            flows6: take_hash(ebpf, "EDGE_FLOWS6")?,
            records: FlowRecords {
                records: AtomicArray::take(ebpf, "EDGE_RECORDS")?,
                addresses6: AtomicArray::take(ebpf, "EDGE_ADDRESSES6")?,
            },
            control: AtomicArray::take(ebpf, "EDGE_CONTROL")?,
            counters: AtomicArray::take(ebpf, "EDGE_COUNTERS")?,
            interfaces: AtomicArray::take(ebpf, "EDGE_INTERFACES")?,
            processors: Processors(take_per_cpu(ebpf, "EDGE_PROCESSORS")?),
            stuck: BTreeMap::new(),
        })
    }

    /// The records of flows.
    pub fn records(&self) -> &FlowRecords {
        &self.records
    }

    /// What the daemon writes for the programs.
    pub fn settings(&self) -> EdgeSettings {
        self.control.load_field(0, offset_of!(EdgeControl, settings))
    }

    /// Changes that. What the programs write stays.
    pub fn set_settings(&self, settings: &EdgeSettings) {
        self.control.store_field(0, offset_of!(EdgeControl, settings), settings);
    }

    /// Where the heartbeat is.
    pub fn heartbeat(&self) -> Heartbeat {
        Heartbeat(self.control.clone())
    }

    /// Updates this host's addresses.
    ///
    /// # Errors
    /// When the kernel refuses, such as more than there is room for.
    pub fn set_own(&mut self, addresses: BTreeSet<IpAddr>) -> io::Result<()> {
        let gone: Vec<IpAddr> = self.own_addresses.difference(&addresses).copied().collect();
        for gone in gone {
            match self.own.remove(&Plain(address_of(gone))).map_err(io_error) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => self.own_addresses.remove(&gone),
            };
        }
        for new in addresses {
            if !self.own_addresses.contains(&new) {
                self.own.insert(Plain(address_of(new)), Plain(1), 0).map_err(io_error)?;
                self.own_addresses.insert(new);
            }
        }
        Ok(())
    }

    /// What was decided on packets.
    pub fn counters(&self) -> EdgeCounters {
        self.counters.load(0)
    }

    /// What the fast path sent on, by [`FastPath`](lb_common::FastPath), on all processors.
    pub fn fast_counts(&self) -> [u64; N_FAST_PATHS] {
        let mut counts = [0u64; N_FAST_PATHS];
        let values = self.processors.0.get(&0, 0);
        for Plain(EdgeProcessor { forwarded, .. }) in values.iter().flat_map(|values| values.iter())
        {
            for (count, n) in counts.iter_mut().zip(forwarded) {
                *count += n;
            }
        }
        counts
    }

    /// What the fast path knows of interfaces.
    pub fn interfaces(&self) -> &Arc<AtomicArray<EdgeInterface>> {
        &self.interfaces
    }

    /// Ends the flows of these records whose time is over, some thousand at most, and calls the function with each.
    /// Returns how many are left of those that it has looked at, and the record at which to continue.
    pub fn sweep(
        &mut self,
        records: Range<u32>,
        now_ms: u32,
        mut ended: impl FnMut(&RawFlow),
    ) -> (u32, u32) {
        let timeouts_ms = self.settings().timeouts_ms;
        let (mut n_left, mut n_ended) = (0, 0);
        for idx in records.clone() {
            if n_ended == MAX_ENDED {
                return (n_left, idx);
            }
            let Some(state) = self.records.state(idx) else { continue };
            let timeout_ms = timeouts_ms.get(state as usize).copied();
            let last_ms = self.records.last_ms(idx);
            let is_over = is_long_ago(last_ms, now_ms, timeout_ms.unwrap_or_default());
            match is_over.then(|| self.end(idx)).flatten() {
                Some(flow) => {
                    n_ended += 1;
                    ended(&flow);
                }
                None => n_left += 1,
            }
            let stuck = self.stuck.remove(&idx);
            if is_over && self.records.is_claimed(idx) {
                // A program has a record for microseconds. A daemon that was killed here has it for ever.
                if stuck == Some(last_ms) {
                    self.records.release(idx);
                } else {
                    self.stuck.insert(idx, last_ms);
                }
            }
        }
        (n_left, records.end)
    }

    /// Inserts a flow that no packet began. Returns the index of its record; `None` where none of some thousand is
    /// free, or there is such a flow.
    pub fn insert_flow(
        &mut self,
        record: &FlowRecord,
        addresses: Option<FlowAddresses6>,
    ) -> Option<u32> {
        const N_TRIES: u32 = 4_096;
        let n = self.records.len();
        let first = fastrand::u32(..n.max(1));
        let mut some = (0..n.min(N_TRIES))
            .map(|nth| ((u64::from(first) + u64::from(nth)) % u64::from(n)) as u32);
        let idx = some.find(|idx| self.records.claim_free(*idx))?;
        self.records.fill(idx, record, addresses);
        let protocol = record.word.protocol;
        let flow = self.records.flow(idx)?;
        self.end_left((flow.backend, flow.source), protocol);
        let back = self.insert_key((flow.backend, flow.source), protocol, idx, true);
        let there = back.and_then(|()| {
            let inserted = self.insert_key((flow.client, flow.vip), protocol, idx, false);
            inserted.inspect_err(|_| self.remove_key(flow.backend, flow.source, protocol))
        });
        if there.is_err() {
            self.records.clear(idx);
            return None;
        }
        Some(idx)
    }

    fn insert_key(
        &mut self,
        (from, to): (SocketAddr, SocketAddr),
        protocol: u8,
        record: u32,
        is_back: bool,
    ) -> io::Result<()> {
        const BPF_NOEXIST: u64 = 1;
        let flow = Plain(FlowRef { record, is_back: is_back.into() });
        match FlowKey::of(from, to, protocol) {
            FlowKey::V4(key) => self.flows.insert(key, flow, BPF_NOEXIST),
            FlowKey::V6(key) => self.flows6.insert(key, flow, BPF_NOEXIST),
        }
        .map_err(io_error)
    }

    /// Ends a proof's flow that a daemon has left which was killed meanwhile, with the claim that it may have had.
    fn end_left(&mut self, (from, to): (SocketAddr, SocketAddr), protocol: u8) {
        let found = match FlowKey::of(from, to, protocol) {
            FlowKey::V4(key) => self.flows.get(&key, 0),
            FlowKey::V6(key) => self.flows6.get(&key, 0),
        };
        let Ok(Plain(FlowRef { record, .. })) = found else { return };
        let left = self.records.flow(record);
        if left.is_some_and(|left| left.record.generation == PROOF_GENERATION) {
            self.records.release(record);
            self.end(record);
        }
    }

    /// Ends a flow of [`EdgeMaps::insert_flow`].
    pub fn end_flow(&mut self, idx: u32) {
        self.end(idx);
    }

    /// Ends a flow, unless a program does something with it. Returns it.
    fn end(&mut self, idx: u32) -> Option<RawFlow> {
        let flow = self.records.claim(idx)?;
        let protocol = flow.record.word.protocol;
        self.remove_key(flow.client, flow.vip, protocol);
        self.remove_key(flow.backend, flow.source, protocol);
        self.records.free(idx);
        Some(flow)
    }

    fn remove_key(&mut self, from: SocketAddr, to: SocketAddr, protocol: u8) {
        let removed = match FlowKey::of(from, to, protocol) {
            FlowKey::V4(key) => self.flows.remove(&key),
            FlowKey::V6(key) => self.flows6.remove(&key),
        };
        if let Err(error) = removed {
            tracing::debug!("a flow's key can't be removed: {error}");
        }
    }
}

impl FlowRecords {
    /// How many there are.
    pub fn len(&self) -> u32 {
        self.records.len()
    }

    /// The array.
    pub fn array(&self) -> &Arc<AtomicArray<FlowRecord>> {
        &self.records
    }

    /// All flows.
    pub fn flows(&self) -> impl Iterator<Item = RawFlow> {
        let is_real = |flow: &RawFlow| flow.record.generation != PROOF_GENERATION;
        (0..self.len()).filter_map(|idx| self.flow(idx)).filter(is_real)
    }

    fn flow(&self, idx: u32) -> Option<RawFlow> {
        self.state(idx)?;
        let record = self.records.load(idx);
        let FlowRecord { client_port, vip_port, backend_port, source_port, .. } = record;
        let [client, vip, backend, source] = if record.word.is_ipv6() {
            let FlowAddresses6 { client, vip, backend, source } = self.addresses6.load(idx);
            [client, vip, backend, source]
                .map(|address| IpAddr::from(Ipv6Addr::from(address.octets)))
        } else {
            let FlowRecord { client, vip, backend, source, .. } = record;
            [client, vip, backend, source].map(IpAddr::from)
        };
        Some(RawFlow {
            record,
            client: (client, client_port).into(),
            vip: (vip, vip_port).into(),
            backend: (backend, backend_port).into(),
            source: (source, source_port).into(),
        })
    }

    /// A flow's state; `None` where the record is none's.
    fn state(&self, idx: u32) -> Option<FlowState> {
        let Claimed { claims, word } = self.records.load_field(idx, 0);
        Some(word.state()).filter(|state| claims != 0 && *state != FlowState::None)
    }

    fn last_ms(&self, idx: u32) -> u32 {
        let [last_ms, _]: [u32; 2] = self.records.load_field(idx, offset_of!(FlowRecord, last_ms));
        last_ms
    }

    /// Whether a program, or a daemon, does something with a flow.
    fn is_claimed(&self, idx: u32) -> bool {
        let Claimed { claims, .. } = self.records.load_field(idx, 0);
        claims > 1
    }

    /// Claims a record if it is free.
    fn claim_free(&self, idx: u32) -> bool {
        let claim = |both| {
            let Claimed { claims, .. } = zerocopy::transmute!(both);
            let claimed = Claimed { claims: 1, word: FlowWord::default() };
            (claims == 0).then(|| zerocopy::transmute!(claimed))
        };
        self.records.exchange_word(idx, 0, claim).is_some()
    }

    /// Makes a record that was claimed a flow's.
    fn fill(&self, idx: u32, record: &FlowRecord, addresses: Option<FlowAddresses6>) {
        if let Some(addresses) = addresses {
            self.addresses6.store(idx, &addresses);
        }
        let now_ms = now_ms();
        let record = FlowRecord { begun_ms: now_ms, last_ms: now_ms, ..*record };
        let words: [u64; size_of::<FlowRecord>() / 8] = zerocopy::transmute!(record);
        let [_, rest @ ..] = &words;
        self.records.store_field(idx, 8, rest);
        let set = |both| {
            let Claimed { claims, .. } = zerocopy::transmute!(both);
            Some(zerocopy::transmute!(Claimed { claims, word: record.word }))
        };
        self.records.exchange_word(idx, 0, set);
    }

    /// Frees a record that no key leads to.
    fn clear(&self, idx: u32) {
        let clear = |both| {
            let Claimed { claims, .. } = zerocopy::transmute!(both);
            let (claims, word) = (claims.wrapping_sub(1), FlowWord::default());
            Some(zerocopy::transmute!(Claimed { claims, word }))
        };
        self.records.exchange_word(idx, 0, clear);
    }

    /// Takes back the claims of others.
    fn release(&self, idx: u32) {
        let release = |both| {
            let Claimed { claims, word } = zerocopy::transmute!(both);
            (claims > 1).then(|| zerocopy::transmute!(Claimed { claims: 1, word }))
        };
        self.records.exchange_word(idx, 0, release);
    }

    /// Claims a flow, unless a program does something with it.
    fn claim(&self, idx: u32) -> Option<RawFlow> {
        let claim = |both| {
            let Claimed { claims, word } = zerocopy::transmute!(both);
            (claims == 1 && word.client != 0)
                .then(|| zerocopy::transmute!(Claimed { claims: 2, word }))
        };
        self.records.exchange_word(idx, 0, claim)?;
        self.flow(idx)
    }

    /// Frees what was claimed.
    fn free(&self, idx: u32) {
        let free = |both| {
            let Claimed { claims, .. } = zerocopy::transmute!(both);
            let (claims, word) = (claims.wrapping_sub(2), FlowWord::default());
            Some(zerocopy::transmute!(Claimed { claims, word }))
        };
        self.records.exchange_word(idx, 0, free);
    }
}

/// The key of one direction of a flow.
enum FlowKey {
    V4(Plain<FlowKey4>),
    V6(Plain<FlowKey6>),
}

impl FlowKey {
    fn of(from: SocketAddr, to: SocketAddr, protocol: u8) -> FlowKey {
        match (from.ip(), to.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let from = (source.octets(), from.port());
                FlowKey::V4(Plain(FlowKey4::of(from, (destination.octets(), to.port()), protocol)))
            }
            (source, destination) => {
                let from = (address_of(source), from.port());
                let to = (address_of(destination), to.port());
                FlowKey::V6(Plain(FlowKey6::of(from, to, protocol)))
            }
        }
    }
}

/// The low 32 bits of CLOCK_MONOTONIC in milliseconds.
pub fn now_ms() -> u32 {
    (monotonic_ns() / 1_000_000) as u32
}

/// An address as the programs have it.
pub fn address_of(ip: IpAddr) -> Address {
    match ip {
        IpAddr::V4(ip) => Address::v4(ip.octets()),
        IpAddr::V6(ip) => Address { octets: ip.octets() },
    }
}

/// The first word of a record.
#[repr(C, align(8))]
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes)]
struct Claimed {
    claims: u32,
    word: FlowWord,
}

const _: () = assert!(offset_of!(FlowRecord, claims) == 0 && offset_of!(FlowRecord, word) == 4);
