//! The unit's maps.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::mem::offset_of;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use aya::Ebpf;
use aya::maps::{MapData, PerCpuArray};
use lb_common::{
    Address, EdgeControl, EdgeCounters, EdgeInterface, EdgeProcessor, FlowAddresses6, FlowKey4,
    FlowKey6, FlowRecord, FlowRef, FlowState, Frontend, Frontend6, N_FAST_PATHS, ServiceRef,
    is_long_ago,
};

use super::super::bpf::ProgramWait;
use super::super::error::DatapathError;
use super::super::kernel::{
    AtomicArray, Hash, Plain, io_error, take_hash, take_per_cpu, wait_for_programs,
};
use super::super::maps::FrontendKey;

/// The maps.
#[derive(Debug)]
pub struct EdgeMaps {
    frontends: Hash<Frontend, ServiceRef>,
    frontends6: Hash<Frontend6, ServiceRef>,
    flows: Hash<FlowKey4, FlowRef>,
    flows6: Hash<FlowKey6, FlowRef>,
    records: Arc<AtomicArray<FlowRecord>>,
    addresses6: Arc<AtomicArray<FlowAddresses6>>,
    control: Arc<AtomicArray<EdgeControl>>,
    counters: Arc<AtomicArray<EdgeCounters>>,
    interfaces: Arc<AtomicArray<EdgeInterface>>,
    processors: Processors,
    program_wait: Option<ProgramWait>,
    /// Whether frontends were removed whose elements a program may still read.
    is_dirty: bool,
}

/// What the fast path keeps for each processor.
struct Processors(PerCpuArray<MapData, Plain<EdgeProcessor>>);

impl fmt::Debug for Processors {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Processors")
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
            frontends: take_hash(ebpf, "EDGE_FRONTENDS")?,
            frontends6: take_hash(ebpf, "EDGE_FRONTENDS6")?,
            flows: take_hash(ebpf, "EDGE_FLOWS")?,
            flows6: take_hash(ebpf, "EDGE_FLOWS6")?,
            records: AtomicArray::take(ebpf, "EDGE_RECORDS")?,
            addresses6: AtomicArray::take(ebpf, "EDGE_ADDRESSES6")?,
            control: AtomicArray::take(ebpf, "EDGE_CONTROL")?,
            counters: AtomicArray::take(ebpf, "EDGE_COUNTERS")?,
            interfaces: AtomicArray::take(ebpf, "EDGE_INTERFACES")?,
            processors: Processors(take_per_cpu(ebpf, "EDGE_PROCESSORS")?),
            program_wait: ProgramWait::new().ok(),
            is_dirty: false,
        })
    }

    /// The records of flows.
    pub fn records(&self) -> &Arc<AtomicArray<FlowRecord>> {
        &self.records
    }

    /// What the daemon writes for the programs.
    pub fn control(&self) -> EdgeControl {
        self.control.load(0)
    }

    /// Changes that.
    pub fn set_control(&self, control: &EdgeControl) {
        self.control.store(0, control);
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

    /// All frontends, each with its service's index.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn frontends(&self) -> io::Result<BTreeMap<FrontendKey, u32>> {
        let mut all = BTreeMap::new();
        for found in self.frontends.iter() {
            let (Plain(key), Plain(target)) = found.map_err(io_error)?;
            let Frontend { address, port, protocol, .. } = key;
            let key = FrontendKey { address: address.into(), port, protocol };
            all.insert(key, target.service);
        }
        for found in self.frontends6.iter() {
            let (Plain(key), Plain(target)) = found.map_err(io_error)?;
            let Frontend6 { address, port, protocol, .. } = key;
            let key = FrontendKey { address: address.into(), port, protocol };
            all.insert(key, target.service);
        }
        Ok(all)
    }

    /// Inserts a frontend, or makes it lead to another service.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn insert(&mut self, key: FrontendKey, service: u32) -> io::Result<()> {
        // The kernel reuses a removed element at once.
        if std::mem::take(&mut self.is_dirty) {
            wait_for_programs(self.program_wait.as_ref());
        }
        let target = Plain(ServiceRef { service, host_only: 0 });
        let FrontendKey { port, protocol, .. } = key;
        match key.address {
            IpAddr::V4(ip) => {
                let address = ip.octets();
                let key = Plain(Frontend { address, port, protocol, padding: 0 });
                self.frontends.insert(key, target, 0).map_err(io_error)
            }
            IpAddr::V6(ip) => {
                let address = ip.octets();
                let key = Plain(Frontend6 { address, port, protocol, padding: 0 });
                self.frontends6.insert(key, target, 0).map_err(io_error)
            }
        }
    }

    /// Removes a frontend; one that is absent is no error.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn remove(&mut self, key: &FrontendKey) -> io::Result<()> {
        let &FrontendKey { address, port, protocol } = key;
        let removed = match address {
            IpAddr::V4(ip) => {
                let address = ip.octets();
                self.frontends.remove(&Plain(Frontend { address, port, protocol, padding: 0 }))
            }
            IpAddr::V6(ip) => {
                let address = ip.octets();
                self.frontends6.remove(&Plain(Frontend6 { address, port, protocol, padding: 0 }))
            }
        };
        self.is_dirty = true;
        match removed.map_err(io_error) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    /// All flows.
    pub fn flows(&self) -> impl Iterator<Item = RawFlow> {
        (0..self.records.len()).filter_map(|idx| self.flow(idx))
    }

    fn flow(&self, idx: u32) -> Option<RawFlow> {
        let [claims, state] = self.word(idx);
        if claims == 0 || state as u8 == FlowState::None as u8 {
            return None;
        }
        let record = self.records.load(idx);
        let FlowRecord { client_port, vip_port, backend_port, source_port, .. } = record;
        let [client, vip, backend, source] = if record.flags & FlowRecord::IPV6 != 0 {
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

    /// The claims, and the state with what follows it.
    fn word(&self, idx: u32) -> [u32; 2] {
        const { assert!(offset_of!(FlowRecord, claims) == 0 && offset_of!(FlowRecord, state) == 4) };
        self.records.load_field(idx, 0)
    }

    /// Ends the flows whose time is over, and calls the function with the record of each. Returns how many
    /// are left.
    pub fn sweep(&mut self, now_ms: u32, mut ended: impl FnMut(&FlowRecord)) -> u32 {
        let control = self.control();
        let mut n_left = 0;
        for idx in 0..self.records.len() {
            let [claims, state] = self.word(idx);
            let state = state as u8;
            if claims == 0 || state == FlowState::None as u8 {
                continue;
            }
            let [last_ms, _]: [u32; 2] =
                self.records.load_field(idx, offset_of!(FlowRecord, last_ms));
            let timeout_ms = control.timeouts_ms.get(usize::from(state)).copied();
            let is_over = is_long_ago(last_ms, now_ms, timeout_ms.unwrap_or_default());
            match is_over.then(|| self.end(idx)).flatten() {
                Some(record) => ended(&record),
                None => n_left += 1,
            }
        }
        n_left
    }

    /// Ends a flow, unless a program does. Returns its record.
    fn end(&mut self, idx: u32) -> Option<FlowRecord> {
        let halves = |word: u64| -> [u32; 2] { zerocopy::transmute!(word) };
        let claim = |word| {
            let [claims, state] = halves(word);
            (claims == 1 && state as u8 != 0).then(|| zerocopy::transmute!([2, state]))
        };
        self.records.exchange_word(idx, 0, claim)?;
        let RawFlow { record, client, vip, backend, source } = self.flow(idx)?;
        self.remove_key(client, vip, record.protocol);
        self.remove_key(backend, source, record.protocol);
        let free = |word| {
            let [claims, _] = halves(word);
            Some(zerocopy::transmute!([claims.wrapping_sub(2), 0]))
        };
        self.records.exchange_word(idx, 0, free);
        Some(record)
    }

    fn remove_key(&mut self, from: SocketAddr, to: SocketAddr, protocol: u8) {
        let removed = match (from.ip(), to.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let from = (source.octets(), from.port());
                let key = FlowKey4::of(from, (destination.octets(), to.port()), protocol);
                self.flows.remove(&Plain(key))
            }
            (source, destination) => {
                let address = |ip: IpAddr| match ip {
                    IpAddr::V4(ip) => Address::v4(ip.octets()),
                    IpAddr::V6(ip) => Address { octets: ip.octets() },
                };
                let from = (address(source), from.port());
                let key = FlowKey6::of(from, (address(destination), to.port()), protocol);
                self.flows6.remove(&Plain(key))
            }
        };
        if let Err(error) = removed {
            tracing::debug!("a flow's key can't be removed: {error}");
        }
    }
}
