//! The kernel's maps: the hashes by system call, the arrays through shared memory.
#![allow(unsafe_code)]

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use aya::Ebpf;
use aya::maps::{HashMap, Map, MapData, MapError};
use lb_common::{
    Address, Backend, BackendEntry, BackendSets, BypassCgroup, Control, Counter, Group,
    MAX_EXCLUDED, N_PINNED_COUNTERS, Probe, ServiceEntry, ServiceName, ServiceRef, Slot, SlotRange,
    UdpConnects,
};

use super::bpf::ProgramWait;
use super::error::DatapathError;
use super::maps::{FrontendKey, Maps};

/// An array map whose values are words, mapped into memory.
#[derive(Debug)]
struct AtomicArray {
    start: NonNull<AtomicU64>,
    n_words: usize,
}

// SAFETY: the mapping belongs to the value until it is dropped, and is only used as atomics.
unsafe impl Send for AtomicArray {}
// SAFETY: as above.
unsafe impl Sync for AtomicArray {}

impl AtomicArray {
    fn map(map: &MapData) -> Result<AtomicArray, DatapathError> {
        let info = map.info().map_err(|source| DatapathError::Map { source })?;
        let n_words = info.max_entries() as usize * info.value_size() as usize / 8;
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
        let start = start.map_err(|errno| DatapathError::Mmap {
            map: info.name_as_str().unwrap_or("?").to_owned(),
            source: errno.into(),
        })?;
        let start = NonNull::new(start.cast()).ok_or(DatapathError::Mmap {
            map: "null".to_owned(),
            source: io::ErrorKind::Other.into(),
        })?;
        Ok(AtomicArray { start, n_words })
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping holds that many aligned words for as long as `self` lives, and both
        // the kernel's programs and this process access them as whole words, or as words of which
        // one side writes only a half that the other leaves as it is.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.n_words) }
    }

    /// Stores a word after all that was stored before it.
    fn store(&self, word_idx: usize, word: u64) {
        self.words()[word_idx].store(word, Ordering::Release);
    }

    fn load(&self, word_idx: usize) -> u64 {
        self.words().get(word_idx).map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Stores the words of element `index`, one after the other.
    fn store_element<const N: usize>(&self, index: u32, words: [u64; N]) {
        for (word_idx, word) in (index as usize * N..).zip(words) {
            self.store(word_idx, word);
        }
    }

    fn load_element<const N: usize>(&self, index: u32) -> [u64; N] {
        std::array::from_fn(|word| self.load(index as usize * N + word))
    }
}

impl Drop for AtomicArray {
    fn drop(&mut self) {
        // SAFETY: nothing borrows the mapping any more. There is nothing to do about a failure.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.n_words * 8) };
    }
}

/// The words of a [`ServiceEntry`]: its regions, the connections, and whether one is awaited.
const SERVICE_WORDS: usize = size_of::<ServiceEntry>() / 8;
/// The words of a [`BackendEntry`]: two of address, one of port and generation, the connections.
const BACKEND_WORDS: usize = size_of::<BackendEntry>() / 8;

/// What the programs count.
#[derive(Clone, Debug)]
pub struct Counters {
    services: Arc<AtomicArray>,
    unsent: Arc<AtomicArray>,
    backends: Arc<AtomicArray>,
    counters: Arc<AtomicArray>,
    events: Arc<AtomicArray>,
    udp_connects: Arc<AtomicArray>,
}

/// What is counted of a service; all only grow.
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
    /// connect() by UDP sockets, since the daemon's start: apart, since address lookups make them and
    /// send nothing.
    pub udp_connects: UdpConnects,
}

impl ServiceCounters {
    /// All connections, whatever became of them.
    pub fn all(&self) -> u64 {
        let ServiceCounters { connects, refused, refused_family, shadowed, udp_connects } = self;
        let UdpConnects { connects: by_udp, no_backend, family } = udp_connects;
        connects + refused + refused_family + shadowed + by_udp + no_backend + family
    }
}

impl Counters {
    /// The counters of a service, by its index.
    pub fn service(&self, service_idx: u32) -> ServiceCounters {
        let [.., connects, _is_awaited] = self.services.load_element::<SERVICE_WORDS>(service_idx);
        let [refused, refused_family, shadowed] = self.unsent.load_element(service_idx);
        let [by_udp, no_backend, family] = self.udp_connects.load_element(service_idx);
        let udp_connects = UdpConnects { connects: by_udp, no_backend, family };
        ServiceCounters { connects, refused, refused_family, shadowed, udp_connects }
    }

    /// The connections of a backend, by its index.
    pub fn backend_connects(&self, backend_idx: u32) -> u64 {
        let [.., connects] = self.backends.load_element::<BACKEND_WORDS>(backend_idx);
        connects
    }

    /// An event that no service owns.
    pub fn event(&self, counter: Counter) -> u64 {
        match (counter as usize).checked_sub(N_PINNED_COUNTERS) {
            None => self.counters.load(counter as usize),
            Some(event) => self.events.load(event),
        }
    }
}

/// The maps by which the daemon and the programs speak of themselves.
#[derive(Clone, Debug)]
pub struct ControlBlock {
    daemon: Arc<AtomicArray>,
    probe: Arc<AtomicArray>,
    excluded: Arc<AtomicArray>,
}

impl ControlBlock {
    /// What a daemon, this one or an earlier one, says of itself.
    pub fn daemon(&self) -> Control {
        let [heartbeat_ns, table_ns, table_generation, host_netns, pid, tgid, is_synced, is_shadow] =
            self.daemon.load_element(0);
        Control {
            heartbeat_ns,
            table_ns,
            table_generation,
            host_netns,
            pid,
            tgid,
            is_synced,
            is_shadow,
        }
    }

    /// Says something else of this daemon.
    pub fn set_daemon(&self, daemon: Control) {
        let Control { heartbeat_ns, table_ns, table_generation, host_netns, .. } = daemon;
        let Control { pid, tgid, is_synced, is_shadow, .. } = daemon;
        let words =
            [heartbeat_ns, table_ns, table_generation, host_netns, pid, tgid, is_synced, is_shadow];
        self.daemon.store_element(0, words);
    }

    /// What the connect hook saw of the last connect() to the pool's own address.
    pub fn probe(&self) -> Probe {
        let [cookie, tgid, netns] = self.probe.load_element(0);
        Probe { cookie, tgid, netns }
    }

    /// Has the connect hook expect a connect() of the socket with this cookie.
    pub fn expect_probe(&self, cookie: u64) {
        // Without a cookie none is expected; with a process it was seen already.
        self.probe.store_element(0, [0; 3]);
        self.probe.store(0, cookie);
    }

    /// The cgroups that are left alone.
    pub fn excluded(&self) -> [BypassCgroup; MAX_EXCLUDED] {
        std::array::from_fn(|index| {
            let [cgroup_id, level] = self.excluded.load_element(index as u32);
            BypassCgroup { cgroup_id, level }
        })
    }

    /// Leaves these cgroups alone, and no others.
    pub fn set_excluded(&self, excluded: &[BypassCgroup; MAX_EXCLUDED]) {
        let former = self.excluded();
        for (index, (next, _)) in
            excluded.iter().zip(&former).enumerate().filter(|(_, (next, former))| next != former)
        {
            // Between the two the former cgroup has another's level, at which no process finds it: it
            // goes anyway. Without an id in between the entry could be taken for the last one.
            self.excluded.store(index * 2 + 1, next.level);
            self.excluded.store(index * 2, next.cgroup_id);
        }
    }
}

/// Tells which backends are in the table.
#[derive(Clone, Debug)]
pub struct Generations(Arc<AtomicArray>);

impl Generations {
    /// The generation of the backend with this index; 0 for one that isn't in the table.
    pub fn generation(&self, backend_idx: u32) -> u32 {
        halves(self.0.load(backend_idx as usize * BACKEND_WORDS + 2))[1]
    }
}

/// Tells the names of services.
#[derive(Clone, Debug)]
pub struct Names(Arc<AtomicArray>);

impl Names {
    /// The name of the service with this index; `None` where there is none.
    pub fn name(&self, service_idx: u32) -> Option<Arc<str>> {
        let ServiceName { octets } = name_entry(&self.0, service_idx);
        let name = octets.split(|&octet| octet == 0).next().unwrap_or_default();
        let name = std::str::from_utf8(name).unwrap_or_default();
        (!name.is_empty()).then(|| name.into())
    }
}

/// The maps that the programs read.
#[derive(Debug)]
pub struct KernelMaps {
    frontends: HashMap<MapData, [u8; 8], [u8; 8]>,
    frontends6: HashMap<MapData, [u8; 20], [u8; 8]>,
    services: Arc<AtomicArray>,
    slots: AtomicArray,
    backends: Arc<AtomicArray>,
    names: Arc<AtomicArray>,
    counters: Counters,
    board: ControlBlock,
    program_wait: Option<ProgramWait>,
}

impl KernelMaps {
    /// Takes the maps of a loaded object.
    pub fn take(ebpf: &mut Ebpf) -> Result<KernelMaps, DatapathError> {
        let mut map =
            |name: &'static str| ebpf.take_map(name).ok_or(DatapathError::Object { missing: name });
        let mut array = |name: &'static str| match map(name)? {
            Map::Array(data) => AtomicArray::map(&data),
            _ => Err(DatapathError::Object { missing: name }),
        };
        let services = Arc::new(array("SERVICES")?);
        let slots = array("SLOTS")?;
        let backends = Arc::new(array("BACKENDS")?);
        let names = Arc::new(array("NAMES")?);
        let counters = Counters {
            services: services.clone(),
            unsent: Arc::new(array("UNSENT")?),
            backends: backends.clone(),
            counters: Arc::new(array("COUNTERS")?),
            events: Arc::new(array("EVENTS")?),
            udp_connects: Arc::new(array("UDP_CONNECTS")?),
        };
        let board = ControlBlock {
            daemon: Arc::new(array("DAEMON")?),
            probe: Arc::new(array("PROBE")?),
            excluded: Arc::new(array("EXCLUDED")?),
        };
        let map_error = |source| DatapathError::Map { source };
        let frontends = HashMap::try_from(map("FRONTENDS")?).map_err(map_error)?;
        let frontends6 = HashMap::try_from(map("FRONTENDS6")?).map_err(map_error)?;
        let program_wait = ProgramWait::new()
            .inspect_err(|error| {
                tracing::warn!("can't wait for programs but by the clock: {error}")
            })
            .ok();
        Ok(KernelMaps {
            frontends,
            frontends6,
            services,
            slots,
            backends,
            names,
            counters,
            board,
            program_wait,
        })
    }

    /// A handle to what the programs count.
    pub fn counters(&self) -> Counters {
        self.counters.clone()
    }

    /// A handle that tells which backends are in the table.
    pub fn generations(&self) -> Generations {
        Generations(self.backends.clone())
    }

    /// A handle that tells the names of services.
    pub fn names(&self) -> Names {
        Names(self.names.clone())
    }

    /// A handle to what the two sides say of themselves.
    pub fn board(&self) -> ControlBlock {
        self.board.clone()
    }
}

impl Maps for KernelMaps {
    fn insert_frontend(&mut self, frontend: FrontendKey, target: ServiceRef) -> io::Result<()> {
        let value = pair(target.service, target.host_only).to_ne_bytes();
        match frontend.address {
            IpAddr::V4(address) => {
                let key = key4(&frontend, address);
                self.frontends.insert(key, value, 0).map_err(io_error)
            }
            IpAddr::V6(address) => {
                let key = key6(&frontend, address);
                self.frontends6.insert(key, value, 0).map_err(io_error)
            }
        }
    }

    fn remove_frontend(&mut self, frontend: &FrontendKey) -> io::Result<()> {
        let removed = match frontend.address {
            IpAddr::V4(address) => self.frontends.remove(&key4(frontend, address)),
            IpAddr::V6(address) => self.frontends6.remove(&key6(frontend, address)),
        };
        match removed.map_err(io_error) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    fn write_backend(&mut self, backend_idx: u32, backend: Backend) {
        let [high, low] = backend.address.words();
        self.backends.store_element(backend_idx, [high, low, backend_word(&backend), 0]);
    }

    fn retire_backend(&mut self, backend_idx: u32) {
        self.renew_backend(backend_idx, 0);
    }

    fn renew_backend(&mut self, backend_idx: u32, generation: u32) {
        let renewed = Backend { generation, ..self.backend(backend_idx) };
        self.backends.store(backend_idx as usize * BACKEND_WORDS + 2, backend_word(&renewed));
    }

    fn write_slots(&mut self, first_slot: u32, slots: &[Slot]) {
        for (slot_idx, slot) in (first_slot as usize..).zip(slots) {
            self.slots.store(slot_idx, slot_word(*slot));
        }
    }

    fn set_name(&mut self, service_idx: u32, name: ServiceName) {
        self.names.store_element(service_idx, name_words(name));
        self.services.store(service_idx as usize * SERVICE_WORDS + Group::N_REGIONS, 0);
        self.counters.unsent.store_element(service_idx, [0; 3]);
        self.counters.udp_connects.store_element(service_idx, [0; 3]);
    }

    fn publish(&mut self, service_idx: u32, service: Group) {
        let words = service.regions().map(|region| pair(region.first_slot, region.n_slots));
        for (word_idx, word) in (service_idx as usize * SERVICE_WORDS..).zip(words) {
            self.services.store(word_idx, word);
        }
    }

    fn request_event(&mut self, service_idx: u32, report_next: bool) {
        let word_idx = service_idx as usize * SERVICE_WORDS + SERVICE_WORDS - 1;
        self.services.store(word_idx, report_next.into());
    }

    fn synchronize_rcu(&mut self) {
        let waited = self.program_wait.as_ref().map(ProgramWait::wait);
        if !matches!(waited, Some(Ok(()))) {
            // A program runs for about a microsecond.
            std::thread::sleep(Duration::from_secs(1));
        }
    }

    fn frontends(&self) -> io::Result<Vec<(FrontendKey, ServiceRef)>> {
        let mut all = Vec::new();
        for entry in self.frontends.iter() {
            let ([a, b, c, d, e, f, protocol, _], value) = entry.map_err(io_error)?;
            let address = IpAddr::V4(Ipv4Addr::new(a, b, c, d));
            let port = u16::from_ne_bytes([e, f]);
            all.push((FrontendKey { address, port, protocol }, target(value)));
        }
        for entry in self.frontends6.iter() {
            let (key, value) = entry.map_err(io_error)?;
            let ([address @ .., e, f, protocol, _], value) = (key, value);
            let address = IpAddr::V6(Ipv6Addr::from(address));
            let port = u16::from_ne_bytes([e, f]);
            all.push((FrontendKey { address, port, protocol }, target(value)));
        }
        Ok(all)
    }

    fn service(&self, service_idx: u32) -> Group {
        let [a, b, c, d, e, f, ..] =
            self.services.load_element::<SERVICE_WORDS>(service_idx).map(|word| {
                let [first_slot, n_slots] = halves(word);
                SlotRange { first_slot, n_slots }
            });
        Group {
            host: BackendSets { ipv4: a, ipv6: b, all: c },
            elsewhere: BackendSets { ipv4: d, ipv6: e, all: f },
        }
    }

    fn name(&self, service_idx: u32) -> ServiceName {
        name_entry(&self.names, service_idx)
    }

    fn slot(&self, slot_idx: u32) -> Slot {
        let [a, b, c, d, e, f, g, h] = self.slots.load(slot_idx as usize).to_ne_bytes();
        Slot {
            backend: u32::from_ne_bytes([a, b, c, d]),
            alias: u16::from_ne_bytes([e, f]),
            threshold: u16::from_ne_bytes([g, h]),
        }
    }

    fn backend(&self, backend_idx: u32) -> Backend {
        let [high, low, word, _connects] = self.backends.load_element(backend_idx);
        let mut octets = [0; 16];
        octets[..8].copy_from_slice(&high.to_ne_bytes());
        octets[8..].copy_from_slice(&low.to_ne_bytes());
        let [a, b, c, d, e, f, g, h] = word.to_ne_bytes();
        Backend {
            address: Address { octets },
            port: u16::from_ne_bytes([a, b]),
            padding: u16::from_ne_bytes([c, d]),
            generation: u32::from_ne_bytes([e, f, g, h]),
        }
    }
}

fn io_error(error: MapError) -> io::Error {
    match error {
        MapError::SyscallError(error) => error.io_error,
        MapError::KeyNotFound | MapError::ElementNotFound => io::ErrorKind::NotFound.into(),
        other => io::Error::other(other),
    }
}

fn key4(frontend: &FrontendKey, address: Ipv4Addr) -> [u8; 8] {
    let ([a, b, c, d], [e, f]) = (address.octets(), frontend.port.to_ne_bytes());
    [a, b, c, d, e, f, frontend.protocol, 0]
}

fn key6(frontend: &FrontendKey, address: Ipv6Addr) -> [u8; 20] {
    let mut key = [0; 20];
    key[..16].copy_from_slice(&address.octets());
    key[16..18].copy_from_slice(&frontend.port.to_ne_bytes());
    key[18] = frontend.protocol;
    key
}

fn target(value: [u8; 8]) -> ServiceRef {
    let [service, host_only] = halves(u64::from_ne_bytes(value));
    ServiceRef { service, host_only }
}

/// Two fields of 4 bytes, in the order in which they lie in memory.
fn pair(first: u32, second: u32) -> u64 {
    let ([a, b, c, d], [e, f, g, h]) = (first.to_ne_bytes(), second.to_ne_bytes());
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

fn halves(word: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = word.to_ne_bytes();
    [u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h])]
}

fn slot_word(slot: Slot) -> u64 {
    let [a, b, c, d] = slot.backend.to_ne_bytes();
    let ([e, f], [g, h]) = (slot.alias.to_ne_bytes(), slot.threshold.to_ne_bytes());
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

/// The last word of a backend's entry.
fn backend_word(backend: &Backend) -> u64 {
    let ([a, b], [c, d]) = (backend.port.to_ne_bytes(), backend.padding.to_ne_bytes());
    let [e, f, g, h] = backend.generation.to_ne_bytes();
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

fn name_entry(names: &AtomicArray, service_idx: u32) -> ServiceName {
    let words: [u64; 8] = names.load_element(service_idx);
    let mut octets = [0; 64];
    for (to, word) in octets.chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    ServiceName { octets }
}

fn name_words(name: ServiceName) -> [u64; 8] {
    let mut words = [0; 8];
    for (word, octets) in words.iter_mut().zip(name.octets.chunks_exact(8)) {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(octets);
        *word = u64::from_ne_bytes(bytes);
    }
    words
}
