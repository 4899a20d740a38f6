//! The kernel's maps: the hashes by system call, the arrays through shared memory.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::marker::PhantomData;
use std::mem::offset_of;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use aya::Ebpf;
use aya::maps::{HashMap, Map, MapData, MapError, PerCpuArray};
use lb_common::{
    Backend, BackendEntry, BackendOutcomes, BalanceSettings, BypassCgroup, BypassLevel, ConnClaim,
    ConnRecord, Control, Counter, EventKind, Fallback, Frontend, Frontend6, GlobalCounters, Group,
    Index, IndexBucket, N_GROUPS, Probe, ServiceEntry, ServiceFlags, ServiceName, ServiceRef,
    ServiceStats, Sign, Slot, SlotRange, UdpConnects,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::bpf::ProgramWait;
use super::error::DatapathError;
use super::maps::{FrontendKey, Maps, ServiceRanges};

/// An array map whose values are `T`, mapped into memory. Each word of a value is read and written at
/// once; a value of several words may be seen half-written.
#[derive(Debug)]
pub(super) struct AtomicArray<T> {
    start: NonNull<AtomicU64>,
    n_words: usize,
    value: PhantomData<T>,
}

// SAFETY: the mapping belongs to the value until it is dropped, and is only used as atomics.
unsafe impl<T> Send for AtomicArray<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for AtomicArray<T> {}

impl<T> AtomicArray<T> {
    /// Maps an array of the object into memory.
    pub(super) fn take(
        ebpf: &mut Ebpf,
        name: &'static str,
    ) -> Result<Arc<AtomicArray<T>>, DatapathError> {
        AtomicArray::map(ebpf.take_map(name), name)
    }

    /// Maps a pinned array into memory.
    pub(super) fn pinned(
        pin: &Path,
        name: &'static str,
    ) -> Result<Arc<AtomicArray<T>>, DatapathError> {
        let map = MapData::from_pin(pin).and_then(Map::from_map_data);
        AtomicArray::map(Some(map.map_err(|source| DatapathError::Map { source })?), name)
    }

    fn map(map: Option<Map>, name: &'static str) -> Result<Arc<AtomicArray<T>>, DatapathError> {
        let Some(Map::Array(map)) = map else {
            return Err(DatapathError::Object { missing: name });
        };
        let info = map.info().map_err(|source| DatapathError::Map { source })?;
        if info.value_size() as usize != size_of::<T>() {
            return Err(DatapathError::Object { missing: name });
        }
        let n_words = info.max_entries() as usize * size_of::<T>() / 8;
        let protection = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
        // SAFETY: a fresh mapping, at an address of the kernel's choice, aliases nothing.
        let start = unsafe {
            let shared = rustix::mm::MapFlags::SHARED;
            rustix::mm::mmap(
                std::ptr::null_mut(),
                n_words * 8,
                protection,
                shared,
                map.fd().as_fd(),
                0,
            )
        };
        let mmap_error = |source| DatapathError::Mmap { map: name.to_owned(), source };
        let start = start.map_err(|errno| mmap_error(errno.into()))?;
        let start =
            NonNull::new(start.cast()).ok_or_else(|| mmap_error(io::ErrorKind::Other.into()))?;
        Ok(Arc::new(AtomicArray { start, n_words, value: PhantomData }))
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping holds that many aligned words for as long as `self` lives, and both
        // the kernel's programs and this process access them as whole words, or as words of which
        // one side writes only a half that the other leaves as it is.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.n_words) }
    }

    /// The words of the field at `offset` of an element, which has `size` bytes; none where there is
    /// no such element.
    fn field(&self, index: u32, offset: usize, size: usize) -> &[AtomicU64] {
        let whole = offset.is_multiple_of(8) && size.is_multiple_of(8);
        assert!(whole && offset + size <= size_of::<T>(), "a field is whole words of the value");
        let first = (index as usize * size_of::<T>() + offset) / 8;
        self.words().get(first..first + size / 8).unwrap_or_default()
    }

    /// The field at `offset` of an element; zeros where there is no such element.
    pub(super) fn load_field<F: FromBytes + IntoBytes>(&self, index: u32, offset: usize) -> F {
        let mut field = F::new_zeroed();
        let bytes = field.as_mut_bytes().chunks_exact_mut(8);
        for (bytes, word) in bytes.zip(self.field(index, offset, size_of::<F>())) {
            bytes.copy_from_slice(&word.load(Ordering::Acquire).to_ne_bytes());
        }
        field
    }

    /// Stores the words of a field, one after the other, each after all that was stored before.
    pub(super) fn store_field<F: IntoBytes + Immutable>(
        &self,
        index: u32,
        offset: usize,
        field: &F,
    ) {
        let words = self.field(index, offset, size_of::<F>());
        let (bytes, _) = field.as_bytes().as_chunks();
        for (word, bytes) in words.iter().zip(bytes) {
            word.store(u64::from_ne_bytes(*bytes), Ordering::Release);
        }
    }

    /// Changes the word at `offset` of an element by exchange, unless the function gives it up; returns what it
    /// was.
    pub(super) fn exchange_word(
        &self,
        index: u32,
        offset: usize,
        change: impl FnMut(u64) -> Option<u64>,
    ) -> Option<u64> {
        let [word] = self.field(index, offset, 8) else { return None };
        word.try_update(Ordering::AcqRel, Ordering::Acquire, change).ok()
    }

    /// The number of elements.
    pub(super) fn len(&self) -> u32 {
        (self.n_words * 8 / size_of::<T>()) as u32
    }

    pub(super) fn load(&self, index: u32) -> T
    where
        T: FromBytes + IntoBytes,
    {
        self.load_field(index, 0)
    }

    pub(super) fn store(&self, index: u32, value: &T)
    where
        T: IntoBytes + Immutable,
    {
        self.store_field(index, 0, value);
    }
}

impl<T> Drop for AtomicArray<T> {
    fn drop(&mut self) {
        // SAFETY: nothing borrows the mapping any more. There is nothing to do about a failure.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.n_words * 8) };
    }
}

/// Keys and values of hashes, as aya takes them.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub(super) struct Plain<T>(pub(super) T);

// SAFETY: zerocopy's derives have proved that these are plain integers without padding.
unsafe impl<T: FromBytes + IntoBytes + Immutable + Copy + 'static> aya::Pod for Plain<T> {}

pub(super) type Hash<K, V> = HashMap<MapData, Plain<K>, Plain<V>>;

pub(super) fn take_hash<K, V>(
    ebpf: &mut Ebpf,
    name: &'static str,
) -> Result<Hash<K, V>, DatapathError>
where
    Plain<K>: aya::Pod,
    Plain<V>: aya::Pod,
{
    let map = ebpf.take_map(name).ok_or(DatapathError::Object { missing: name })?;
    HashMap::try_from(map).map_err(|source| DatapathError::Map { source })
}

pub(super) fn take_per_cpu<V>(
    ebpf: &mut Ebpf,
    name: &'static str,
) -> Result<PerCpuArray<MapData, Plain<V>>, DatapathError>
where
    Plain<V>: aya::Pod,
{
    let map = ebpf.take_map(name).ok_or(DatapathError::Object { missing: name })?;
    PerCpuArray::try_from(map).map_err(|source| DatapathError::Map { source })
}

/// The programs' counters.
#[derive(Clone, Debug)]
pub struct Counters {
    services: Arc<AtomicArray<ServiceEntry>>,
    stats: Arc<AtomicArray<ServiceStats>>,
    syn_retransmits: Arc<AtomicArray<u64>>,
    backends: Arc<AtomicArray<BackendEntry>>,
    backend_failures: Arc<AtomicArray<u64>>,
    global: Arc<AtomicArray<GlobalCounters>>,
    control: Arc<AtomicArray<Control>>,
}

/// What the programs count of a backend's connections, at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tally {
    /// The backend's generation.
    pub generation: u32,
    /// The connections that were sent there.
    pub connects: u64,
    /// Those that are in flight; below zero where more were seen to end than to begin.
    pub in_flight: i32,
    /// Those of them that are being established, likewise.
    pub pending: i32,
}

/// A service's counters; all only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServiceCounters {
    /// Connects that were sent to a backend: connects by TCP, and choices for datagrams.
    pub connects: u64,
    /// Connects that were refused because there was no backend at all for them.
    pub refused: u64,
    /// Connects that were refused because the socket's address family reaches none of the backends.
    pub refused_family: u64,
    /// Connects that passed untouched because connections were only counted.
    pub shadowed: u64,
    /// connect() by UDP sockets: apart, since address lookups make them and send nothing.
    pub udp_connects: UdpConnects,
    /// Connects by TCP that a backend refused, didn't answer, or that didn't reach it.
    pub failed: u64,
    /// Ejections of its backends.
    pub ejections: u64,
    /// SYNs to its backends that were sent again.
    pub syn_retransmits: u64,
}

impl ServiceCounters {
    /// All connections, whatever became of them.
    pub fn all(&self) -> u64 {
        let ServiceCounters { connects, refused, refused_family, shadowed, udp_connects, .. } =
            self;
        let UdpConnects { connects: by_udp, no_backend, family } = udp_connects;
        connects + refused + refused_family + shadowed + by_udp + no_backend + family
    }
}

impl Counters {
    /// The counters of a service, by its index.
    pub fn service(&self, service_idx: u32) -> ServiceCounters {
        let stats = self.stats.load(service_idx);
        ServiceCounters {
            connects: self.services.load_field(service_idx, offset_of!(ServiceEntry, connects)),
            refused: stats.no_backend,
            refused_family: stats.family,
            shadowed: stats.shadowed,
            udp_connects: stats.udp,
            failed: stats.failed,
            ejections: stats.ejections,
            syn_retransmits: self.syn_retransmits.load(service_idx),
        }
    }

    /// The connections of a backend, by its index.
    pub fn backend_connects(&self, backend_idx: u32) -> u64 {
        self.backends.load_field(backend_idx, offset_of!(BackendEntry, connects))
    }

    /// The TCP connections of a backend that are open or being established, by its index.
    pub fn in_flight(&self, backend_idx: u32) -> u32 {
        u32::try_from(self.outcomes(backend_idx).in_flight).unwrap_or(0)
    }

    /// The connections of a backend that failed, by its index.
    pub fn backend_failures(&self, backend_idx: u32) -> u64 {
        self.backend_failures.load(backend_idx)
    }

    /// A backend's time to connect in microseconds, by its index; `None` where none was measured.
    pub fn connect_us(&self, backend_idx: u32) -> Option<u32> {
        Some(self.outcomes(backend_idx).connect_us).filter(|us| *us > 0)
    }

    /// The round-trip time of a backend's connections in microseconds, by its index; `None` where none
    /// was measured.
    pub fn rtt_us(&self, backend_idx: u32) -> Option<u32> {
        Some(self.outcomes(backend_idx).srtt_us).filter(|us| *us > 0)
    }

    /// What this node has learnt of a backend, by its index.
    pub fn outcomes(&self, backend_idx: u32) -> BackendOutcomes {
        self.backends.load_field(backend_idx, offset_of!(BackendEntry, outcomes))
    }

    /// How backends are chosen and ejected.
    pub(super) fn balance(&self) -> BalanceSettings {
        self.control.load_field(0, offset_of!(Control, balance))
    }

    /// The generation of the backend with this index; 0 for one that isn't in the table.
    pub(super) fn generation(&self, backend_idx: u32) -> u32 {
        Generations(self.backends.clone()).generation(backend_idx)
    }

    /// The word that holds a backend's ejection, an [`EjectionWord`](lb_common::EjectionWord); `None`
    /// beyond the map.
    pub(super) fn ejection_word(&self, backend_idx: u32) -> Option<&AtomicU64> {
        let at = offset_of!(BackendEntry, outcomes) + offset_of!(BackendOutcomes, ejection);
        self.backends.field(backend_idx, at, size_of::<u64>()).first()
    }

    /// The address of a backend that still has this generation.
    pub(super) fn backend_address(&self, backend_idx: u32, generation: u32) -> Option<SocketAddr> {
        let at = offset_of!(BackendEntry, backend);
        let backend: Backend = self.backends.load_field(backend_idx, at);
        let ip = IpAddr::from(backend.address.octets).to_canonical();
        (generation != 0 && backend.generation == generation)
            .then(|| SocketAddr::new(ip, backend.port))
    }

    /// What a count of connections is compared with: of each backend in the table, by its index.
    pub(super) fn tallies(&self) -> BTreeMap<u32, Tally> {
        let n_backends = self.backends.n_words * 8 / size_of::<BackendEntry>();
        let generations = Generations(self.backends.clone());
        let tally = |backend_idx| {
            // Most entries aren't used.
            let generation = generations.generation(backend_idx);
            if generation == 0 {
                return None;
            }
            let BackendOutcomes { in_flight, pending, .. } = self.outcomes(backend_idx);
            let connects = self.backend_connects(backend_idx);
            Some((backend_idx, Tally { generation, connects, in_flight, pending }))
        };
        (0..n_backends as u32).filter_map(tally).collect()
    }

    /// Adds to a backend's connections in flight, and to those that are being established, while
    /// programs do.
    pub(super) fn add_in_flight(&self, backend_idx: u32, n: i32, n_pending: i32) {
        let at = offset_of!(BackendEntry, outcomes);
        let [word] = self.backends.field(backend_idx, at, 8) else { return };
        // Programs add to one half, and this to the whole word, so the halves are added to by exchange.
        let with = |word: u64| {
            let mut halves: [i32; 2] = zerocopy::transmute!(word);
            halves = [halves[0].wrapping_add(n), halves[1].wrapping_add(n_pending)];
            zerocopy::transmute!(halves)
        };
        // The closure never gives up.
        let _ = word.try_update(Ordering::AcqRel, Ordering::Acquire, |word| Some(with(word)));
    }

    /// Applies that a connection to a backend that still has this generation got no answer, and counts it, also of
    /// its service.
    pub(super) fn count_failure(&self, backend_idx: u32, generation: u32, service: Option<u32>) {
        let more = |n: u64| Some(n.wrapping_add(1));
        self.backend_failures.exchange_word(backend_idx, 0, more);
        let event = self.apply_sign(backend_idx, generation, Sign::Failed);
        let Some(service_idx) = service else { return };
        self.stats.exchange_word(service_idx, offset_of!(ServiceStats, failed), more);
        if event == Some(EventKind::Ejected) {
            self.stats.exchange_word(service_idx, offset_of!(ServiceStats, ejections), more);
        }
    }

    /// Forgets the connections of a backend that are being established: those that the programs don't see
    /// end.
    pub(super) fn forget_pending(&self, backend_idx: u32) {
        let n_pending = self.outcomes(backend_idx).pending;
        self.add_in_flight(backend_idx, 0, n_pending.wrapping_neg());
        // Programs write the word's other half.
        let at =
            offset_of!(BackendEntry, outcomes) + offset_of!(BackendOutcomes, unanswered_since_us);
        const {
            let since_us = offset_of!(BackendOutcomes, unanswered_since_us);
            assert!(offset_of!(BackendOutcomes, connect_us) == since_us + 4);
        };
        let connect_us_alone: u64 = zerocopy::transmute!([0, u32::MAX]);
        for word in self.backends.field(backend_idx, at, size_of::<u64>()) {
            word.fetch_and(connect_us_alone, Ordering::AcqRel);
        }
    }

    /// The same of all backends in the table.
    pub(super) fn forget_all_pending(&self) {
        self.tallies().into_keys().for_each(|backend_idx| self.forget_pending(backend_idx));
    }

    /// The events of traced connections that were lost.
    pub fn trace_lost(&self) -> u64 {
        self.event(Counter::TraceLost)
    }

    /// An event that no service owns.
    pub fn event(&self, counter: Counter) -> u64 {
        self.global.load_field(0, counter as usize * size_of::<u64>())
    }
}

/// The maps by which the daemon and the programs control each other.
#[derive(Clone, Debug)]
pub struct ControlBlock {
    control: Arc<AtomicArray<Control>>,
    probe: Arc<AtomicArray<Probe>>,
}

impl ControlBlock {
    /// The part that daemons write.
    pub fn daemon(&self) -> Control {
        self.control.load(0)
    }

    /// Writes something else.
    pub fn set_daemon(&self, control: Control) {
        self.control.store(0, &control);
    }

    /// The connect hook's record of the last connect() to the pool's own address.
    pub fn probe(&self) -> Probe {
        self.probe.load(0)
    }

    /// Has the connect hook expect a connect() of the socket with this cookie.
    pub fn expect_probe(&self, cookie: u64) {
        // Without a cookie none is expected; with a process it was seen already.
        self.probe.store(0, &Probe::default());
        self.probe.store_field(0, offset_of!(Probe, cookie), &cookie);
    }
}

/// The records of TCP connections.
#[derive(Clone, Debug)]
pub struct ConnRecords(Arc<AtomicArray<ConnRecord>>);

impl ConnRecords {
    /// The records that sockets have, by the sockets' cookies, while programs write them: without those
    /// that are just being written.
    pub fn all(&self) -> BTreeMap<u64, ConnRecord> {
        let read = |conn_idx| {
            let cookie: u64 = self.0.load_field(conn_idx, offset_of!(ConnRecord, cookie));
            if cookie == 0 {
                return None;
            }
            let record = self.0.load(conn_idx);
            let again: [u64; 2] = self.0.load_field(conn_idx, 0);
            let ConnClaim { writes, abandoned, .. } = record.claim;
            let head: [u64; 2] = [cookie, zerocopy::transmute!(record.claim)];
            (again == head && record.cookie == cookie && writes != abandoned)
                .then_some((cookie, record))
        };
        (0..lb_common::N_CONNS).filter_map(read).collect()
    }

    /// Frees the record of a socket that is gone, unless it was written since it was read.
    pub fn abandon(&self, record: &ConnRecord) {
        let conn_idx = ConnRecord::index(record.cookie);
        let at = offset_of!(ConnRecord, claim);
        let [word] = self.0.field(conn_idx, at, size_of::<ConnClaim>()) else { return };
        let writes = record.claim.writes;
        let (read, free) = (record.claim, ConnClaim { abandoned: writes, ..record.claim });
        // One that a program has begun to write since then has another word.
        let _ = word.compare_exchange(
            zerocopy::transmute!(read),
            zerocopy::transmute!(free),
            Ordering::AcqRel,
            Ordering::Acquire,
        );
    }
}

/// The cgroups that are bypassed.
#[derive(Debug)]
pub struct BypassMap {
    cgroups: Hash<BypassCgroup, BypassLevel>,
    control: Arc<AtomicArray<Control>>,
}

impl BypassMap {
    /// The cgroups that are bypassed now, each with its depth.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn cgroups(&self) -> io::Result<BTreeMap<BypassCgroup, BypassLevel>> {
        let entry = |(Plain(cgroup), Plain(level))| (cgroup, level);
        self.cgroups.iter().map(|found| found.map(entry).map_err(io_error)).collect()
    }

    /// Bypasses these cgroups, and no others. Those that are bypassed before and after are so
    /// throughout.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set(&mut self, cgroups: &BTreeMap<BypassCgroup, BypassLevel>) -> io::Result<()> {
        let former = self.cgroups()?;
        // Programs check only the depths with a bit.
        self.set_levels(former.values().chain(cgroups.values()));
        for cgroup in former.keys().filter(|cgroup| !cgroups.contains_key(cgroup)) {
            self.cgroups.remove(&Plain(*cgroup)).map_err(io_error)?;
        }
        for (cgroup, level) in cgroups {
            if former.get(cgroup) != Some(level) {
                self.cgroups.insert(Plain(*cgroup), Plain(*level), 0).map_err(io_error)?;
            }
        }
        self.set_levels(cgroups.values());
        Ok(())
    }

    fn set_levels<'a>(&self, levels: impl Iterator<Item = &'a BypassLevel>) {
        let bits = levels.fold(0, |bits, &BypassLevel { level }| bits | 1u64 << level);
        self.control.store_field(0, offset_of!(Control, bypass_levels), &bits);
    }
}

/// Knows which backends are in the table.
#[derive(Clone, Debug)]
pub struct Generations(Arc<AtomicArray<BackendEntry>>);

impl Generations {
    /// The generation of the backend with this index; 0 for one that isn't in the table.
    pub fn generation(&self, backend_idx: u32) -> u32 {
        self.0.load_field::<Backend>(backend_idx, offset_of!(BackendEntry, backend)).generation
    }
}

/// Knows the names of services.
#[derive(Clone, Debug)]
pub struct ServiceNames(Arc<AtomicArray<ServiceName>>);

impl ServiceNames {
    /// The name of the service with this index; `None` where there is none.
    pub fn name(&self, service_idx: u32) -> Option<Arc<str>> {
        let ServiceName { octets } = self.0.load(service_idx);
        let name = octets.split(|&octet| octet == 0).next().unwrap_or_default();
        let name = std::str::from_utf8(name).unwrap_or_default();
        (!name.is_empty()).then(|| name.into())
    }
}

/// The index of IPv4 frontends.
#[derive(Debug)]
struct FrontendIndex(Arc<AtomicArray<IndexBucket>>);

impl Index for FrontendIndex {
    fn load(&self, bucket: u32, way: usize) -> u64 {
        self.0.load_field(bucket, way * size_of::<u64>())
    }

    fn store(&mut self, bucket: u32, way: usize, word: u64) {
        self.0.store_field(bucket, way * size_of::<u64>(), &word);
    }
}

/// The maps that the programs read.
#[derive(Debug)]
pub struct KernelMaps {
    frontends: Hash<Frontend, ServiceRef>,
    frontends6: Hash<Frontend6, ServiceRef>,
    index: FrontendIndex,
    slots: Arc<AtomicArray<Slot>>,
    names: Arc<AtomicArray<ServiceName>>,
    records: ConnRecords,
    counters: Counters,
    control: ControlBlock,
    bypass: BypassMap,
    program_wait: Option<ProgramWait>,
}

impl KernelMaps {
    /// Takes the maps of a loaded object.
    pub fn take(ebpf: &mut Ebpf) -> Result<KernelMaps, DatapathError> {
        let counters = Counters {
            services: AtomicArray::take(ebpf, "SERVICES")?,
            stats: AtomicArray::take(ebpf, "SERVICE_STATS")?,
            syn_retransmits: AtomicArray::take(ebpf, "SYN_RETRANSMITS")?,
            backends: AtomicArray::take(ebpf, "BACKENDS")?,
            backend_failures: AtomicArray::take(ebpf, "BACKEND_FAILURES")?,
            global: AtomicArray::take(ebpf, "COUNTERS")?,
            control: AtomicArray::take(ebpf, "CONTROL")?,
        };
        let control = ControlBlock {
            control: counters.control.clone(),
            probe: AtomicArray::take(ebpf, "PROBE")?,
        };
        let bypass =
            BypassMap { cgroups: take_hash(ebpf, "BYPASS")?, control: control.control.clone() };
        let program_wait = ProgramWait::new()
            .inspect_err(|error| {
                tracing::warn!("can't wait for programs but by the clock: {error}")
            })
            .ok();
        Ok(KernelMaps {
            frontends: take_hash(ebpf, "FRONTENDS")?,
            frontends6: take_hash(ebpf, "FRONTENDS6")?,
            index: FrontendIndex(AtomicArray::take(ebpf, "FRONTEND_INDEX")?),
            slots: AtomicArray::take(ebpf, "SLOTS")?,
            names: AtomicArray::take(ebpf, "SERVICE_NAMES")?,
            records: ConnRecords(AtomicArray::take(ebpf, "CONNS")?),
            counters,
            control,
            bypass,
            program_wait,
        })
    }

    /// A handle to the programs' counters.
    pub fn counters(&self) -> Counters {
        self.counters.clone()
    }

    /// A handle to the records of connections.
    pub fn records(&self) -> ConnRecords {
        self.records.clone()
    }

    /// A handle that knows which backends are in the table.
    pub fn generations(&self) -> Generations {
        Generations(self.counters.backends.clone())
    }

    /// A handle that knows the names of services.
    pub fn names(&self) -> ServiceNames {
        ServiceNames(self.names.clone())
    }

    /// A handle to what the two sides write for each other.
    pub fn control_block(&self) -> ControlBlock {
        self.control.clone()
    }

    /// The cgroups that are bypassed.
    pub fn bypass(&mut self) -> &mut BypassMap {
        &mut self.bypass
    }

    /// Where the nth of [`ServiceRanges::all`] is in a service's entry.
    fn range_at(nth: usize) -> usize {
        let fallback =
            |nth: usize| offset_of!(ServiceEntry, fallbacks) + nth * size_of::<Fallback>();
        let group = match nth / Group::N_RANGES {
            0 => offset_of!(ServiceEntry, group),
            N_GROUPS => return fallback(N_GROUPS - 2) + offset_of!(Fallback, unselected),
            after => fallback(after - 1) + offset_of!(Fallback, group),
        };
        group + nth % Group::N_RANGES * size_of::<SlotRange>()
    }

    /// Stores the second word of a backend, which has its port, weight and generation. The others stay as
    /// they are, though they are stored too.
    fn change_backend(&self, backend_idx: u32, change: impl FnOnce(&mut Backend)) {
        let mut backend = self.backend(backend_idx);
        change(&mut backend);
        self.counters.backends.store_field(
            backend_idx,
            offset_of!(BackendEntry, backend),
            &backend,
        );
    }
}

impl Maps for KernelMaps {
    fn insert_frontend(&mut self, frontend: FrontendKey, target: ServiceRef) -> io::Result<()> {
        match Key::of(&frontend) {
            Key::V4(key) => {
                // It may be another service's until now.
                self.index.remove(&key);
                self.frontends.insert(Plain(key), Plain(target), 0).map_err(io_error)?;
                self.index.insert(&key, target);
                Ok(())
            }
            Key::V6(key) => self.frontends6.insert(Plain(key), Plain(target), 0).map_err(io_error),
        }
    }

    fn adopt_frontend(&mut self, frontend: FrontendKey, target: ServiceRef) {
        if let Key::V4(key) = Key::of(&frontend) {
            self.index.insert(&key, target);
        }
    }

    fn remove_frontend(&mut self, frontend: &FrontendKey) -> io::Result<()> {
        let removed = match Key::of(frontend) {
            Key::V4(key) => {
                self.index.remove(&key);
                self.frontends.remove(&Plain(key))
            }
            Key::V6(key) => self.frontends6.remove(&Plain(key)),
        };
        match removed.map_err(io_error) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    fn write_backend(&mut self, backend_idx: u32, backend: Backend, added_ms: u32) {
        let outcomes = BackendOutcomes { added_ms, ..BackendOutcomes::default() };
        let entry = BackendEntry { backend, outcomes, ..BackendEntry::default() };
        self.counters.backends.store(backend_idx, &entry);
        self.counters.backend_failures.store(backend_idx, &0);
    }

    fn retire_backend(&mut self, backend_idx: u32) {
        self.change_backend(backend_idx, |backend| backend.generation = 0);
    }

    fn renew_backend(&mut self, backend_idx: u32, generation: u32) {
        let in_flight = self.counters.outcomes(backend_idx).in_flight;
        self.counters.add_in_flight(backend_idx, in_flight.wrapping_neg(), 0);
        self.counters.forget_pending(backend_idx);
        self.change_backend(backend_idx, |backend| backend.generation = generation);
    }

    fn set_weight(&mut self, backend_idx: u32, weight: u16) {
        self.change_backend(backend_idx, |backend| backend.weight = weight);
    }

    fn end_ramp(&mut self, backend_idx: u32) {
        // Programs write the word's other half.
        let at = offset_of!(BackendEntry, outcomes) + offset_of!(BackendOutcomes, srtt_us);
        const {
            assert!(
                offset_of!(BackendOutcomes, added_ms) == offset_of!(BackendOutcomes, srtt_us) + 4
            )
        };
        let srtt_us_alone: u64 = zerocopy::transmute!([u32::MAX, 0]);
        for word in self.counters.backends.field(backend_idx, at, size_of::<u64>()) {
            word.fetch_and(srtt_us_alone, Ordering::AcqRel);
        }
    }

    fn added_ms(&self, backend_idx: u32) -> u32 {
        let at = offset_of!(BackendEntry, outcomes);
        self.counters.backends.load_field::<BackendOutcomes>(backend_idx, at).added_ms
    }

    fn write_slots(&mut self, first_slot: u32, slots: &[Slot]) {
        for (slot_idx, slot) in (first_slot..).zip(slots) {
            self.slots.store(slot_idx, slot);
        }
    }

    fn set_name(&mut self, service_idx: u32, name: ServiceName) {
        self.names.store(service_idx, &name);
        let at = offset_of!(ServiceEntry, connects);
        self.counters.services.store_field(service_idx, at, &0u64);
        self.counters.stats.store(service_idx, &ServiceStats::default());
        self.counters.syn_retransmits.store(service_idx, &0);
    }

    fn store_range(&mut self, service_idx: u32, nth: usize, range: SlotRange) {
        self.counters.services.store_field(service_idx, Self::range_at(nth), &range);
    }

    fn set_flags(&mut self, service_idx: u32, flags: ServiceFlags) {
        self.counters.services.store_field(service_idx, offset_of!(ServiceEntry, flags), &flags);
    }

    fn synchronize_rcu(&mut self) {
        wait_for_programs(self.program_wait.as_ref());
    }

    fn frontends(&self) -> io::Result<Vec<(FrontendKey, ServiceRef)>> {
        let mut all = Vec::new();
        for entry in self.frontends.iter() {
            let (Plain(Frontend { address, port, protocol, .. }), Plain(target)) =
                entry.map_err(io_error)?;
            let address = IpAddr::V4(Ipv4Addr::from(address));
            all.push((FrontendKey { address, port, protocol }, target));
        }
        for entry in self.frontends6.iter() {
            let (Plain(Frontend6 { address, port, protocol, .. }), Plain(target)) =
                entry.map_err(io_error)?;
            let address = IpAddr::V6(Ipv6Addr::from(address));
            all.push((FrontendKey { address, port, protocol }, target));
        }
        Ok(all)
    }

    fn service(&self, service_idx: u32) -> ServiceRanges {
        let services = &self.counters.services;
        let range = |nth: usize| services.load_field(service_idx, Self::range_at(nth));
        let group = |nth: usize| {
            Group::of(std::array::from_fn(|range_idx| range(nth * Group::N_RANGES + range_idx)))
        };
        ServiceRanges {
            groups: std::array::from_fn(group),
            unselected: range(ServiceRanges::N - 1),
        }
    }

    fn flags(&self, service_idx: u32) -> ServiceFlags {
        self.counters.services.load_field(service_idx, offset_of!(ServiceEntry, flags))
    }

    fn name(&self, service_idx: u32) -> ServiceName {
        self.names.load(service_idx)
    }

    fn slot(&self, slot_idx: u32) -> Slot {
        self.slots.load(slot_idx)
    }

    fn backend(&self, backend_idx: u32) -> Backend {
        self.counters.backends.load_field(backend_idx, offset_of!(BackendEntry, backend))
    }
}

/// A frontend, as a key of its map.
enum Key {
    V4(Frontend),
    V6(Frontend6),
}

impl Key {
    fn of(frontend: &FrontendKey) -> Key {
        let &FrontendKey { address, port, protocol } = frontend;
        match address {
            IpAddr::V4(ip) => {
                Key::V4(Frontend { address: ip.octets(), port, protocol, padding: 0 })
            }
            IpAddr::V6(ip) => {
                Key::V6(Frontend6 { address: ip.octets(), port, protocol, padding: 0 })
            }
        }
    }
}

/// Waits until every program that was running has ended.
pub(super) fn wait_for_programs(wait: Option<&ProgramWait>) {
    if !matches!(wait.map(ProgramWait::wait), Some(Ok(()))) {
        // A program runs for about a microsecond.
        std::thread::sleep(Duration::from_secs(1));
    }
}

pub(super) fn io_error(error: MapError) -> io::Error {
    match error {
        MapError::SyscallError(error) => error.io_error,
        MapError::KeyNotFound | MapError::ElementNotFound => io::ErrorKind::NotFound.into(),
        other => io::Error::other(other),
    }
}
