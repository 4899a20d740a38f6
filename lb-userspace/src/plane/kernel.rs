//! The kernel's maps: the hash by system call, the arrays through shared memory.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use aya::Ebpf;
use aya::maps::{HashMap, Map, MapData, MapError};
use lb_common::{Backend, Counter, Frontend, Region, Service, ServiceCounters, Slot, Target};

use super::PlaneError;
use super::maps::Maps;

/// An array map with values of 8 or 16 bytes, mapped into memory as words.
#[derive(Debug)]
struct Words {
    start: NonNull<AtomicU64>,
    n_words: usize,
}

// SAFETY: the mapping belongs to the value until it is dropped, and is only used as atomics.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    fn map(map: &MapData) -> Result<Words, PlaneError> {
        let info = map.info().map_err(|source| PlaneError::Map { source })?;
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
        let start = start.map_err(|errno| PlaneError::Mmap {
            map: info.name_as_str().unwrap_or("?").to_owned(),
            source: errno.into(),
        })?;
        let start = NonNull::new(start.cast()).ok_or(PlaneError::Mmap {
            map: "null".to_owned(),
            source: io::ErrorKind::Other.into(),
        })?;
        Ok(Words { start, n_words })
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping holds that many aligned words for as long as `self` lives, and both
        // the kernel's programs and this process access them as whole words.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.n_words) }
    }

    /// Stores a word after all that was stored before it.
    fn store(&self, word_idx: usize, word: u64) {
        self.words()[word_idx].store(word, Ordering::Release);
    }

    fn load(&self, word_idx: usize) -> u64 {
        self.words().get(word_idx).map_or(0, |word| word.load(Ordering::Relaxed))
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: nothing borrows the mapping any more. There is nothing to do about a failure.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.n_words * 8) };
    }
}

/// What the programs count.
#[derive(Clone, Debug)]
pub struct Counters {
    service_stats: Arc<Words>,
    backend_dials: Arc<Words>,
    counters: Arc<Words>,
}

impl Counters {
    /// The counters of a service, by its index.
    pub fn service(&self, service_idx: u32) -> ServiceCounters {
        let first = service_idx as usize * 2;
        ServiceCounters {
            dials: self.service_stats.load(first),
            refused: self.service_stats.load(first + 1),
        }
    }

    /// The dials of a backend, by its index.
    pub fn backend_dials(&self, backend_idx: u32) -> u64 {
        self.backend_dials.load(backend_idx as usize)
    }

    /// An event that no service owns.
    pub fn event(&self, counter: Counter) -> u64 {
        self.counters.load(counter as usize)
    }
}

/// The maps that the programs read.
#[derive(Debug)]
pub struct KernelMaps {
    frontends: HashMap<MapData, [u8; 8], [u8; 8]>,
    services: Words,
    slots: Words,
    backends: Words,
    counters: Counters,
}

impl KernelMaps {
    /// Takes the maps of a loaded object.
    pub fn take(ebpf: &mut Ebpf) -> Result<KernelMaps, PlaneError> {
        let mut array = |name: &'static str| match ebpf.take_map(name) {
            Some(Map::Array(data)) => Words::map(&data),
            _ => Err(PlaneError::Object { missing: name }),
        };
        let services = array("SERVICES")?;
        let slots = array("SLOTS")?;
        let backends = array("BACKENDS")?;
        let counters = Counters {
            service_stats: Arc::new(array("SERVICE_STATS")?),
            backend_dials: Arc::new(array("BACKEND_DIALS")?),
            counters: Arc::new(array("COUNTERS")?),
        };
        let frontends =
            ebpf.take_map("FRONTENDS").ok_or(PlaneError::Object { missing: "FRONTENDS" })?;
        let frontends =
            HashMap::try_from(frontends).map_err(|source| PlaneError::Map { source })?;
        Ok(KernelMaps { frontends, services, slots, backends, counters })
    }

    /// A handle to what the programs count.
    pub fn counters(&self) -> Counters {
        self.counters.clone()
    }
}

impl Maps for KernelMaps {
    fn insert_frontend(&mut self, frontend: Frontend, target: Target) -> io::Result<()> {
        let target = pair(target.service, target.host_only);
        self.frontends.insert(frontend_key(&frontend), target.to_ne_bytes(), 0).map_err(io_error)
    }

    fn remove_frontend(&mut self, frontend: &Frontend) -> io::Result<()> {
        match self.frontends.remove(&frontend_key(frontend)).map_err(io_error) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    fn write_backend(&mut self, backend_idx: u32, backend: Backend) {
        self.backends.store(backend_idx as usize, backend_word(backend));
        self.counters.backend_dials.store(backend_idx as usize, 0);
    }

    fn write_slots(&mut self, first_slot: u32, slots: &[Slot]) {
        for (word_idx, slot) in (first_slot as usize..).zip(slots) {
            self.slots.store(word_idx, slot_word(*slot));
        }
    }

    fn reset_service(&mut self, service_idx: u32) {
        let first = service_idx as usize * 2;
        self.counters.service_stats.store(first, 0);
        self.counters.service_stats.store(first + 1, 0);
    }

    fn publish(&mut self, service_idx: u32, service: Service) {
        let first = service_idx as usize * 2;
        self.services.store(first, region_word(service.host));
        self.services.store(first + 1, region_word(service.elsewhere));
    }

    fn wait_for_readers(&mut self) {
        const MEMBARRIER_CMD_GLOBAL: libc::c_long = 1;
        // SAFETY: the call takes no pointers. It is `synchronize_rcu`, and socket-address programs
        // run within an RCU read-side section.
        let done = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
        if done != 0 {
            // A kernel with `nohz_full` cores refuses. A program runs for about a microsecond.
            std::thread::sleep(Duration::from_secs(1));
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

fn frontend_key(frontend: &Frontend) -> [u8; 8] {
    let [a, b, c, d] = frontend.address;
    let [e, f] = frontend.port.to_ne_bytes();
    [a, b, c, d, e, f, frontend.protocol, frontend.padding]
}

/// Two fields of 4 bytes, in the order in which they lie in memory.
fn pair(first: u32, second: u32) -> u64 {
    let ([a, b, c, d], [e, f, g, h]) = (first.to_ne_bytes(), second.to_ne_bytes());
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

fn region_word(region: Region) -> u64 {
    pair(region.first_slot, region.n_slots)
}

fn slot_word(slot: Slot) -> u64 {
    let [a, b, c, d] = slot.backend.to_ne_bytes();
    let ([e, f], [g, h]) = (slot.alias.to_ne_bytes(), slot.threshold.to_ne_bytes());
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

fn backend_word(backend: Backend) -> u64 {
    let [a, b, c, d] = backend.address;
    let ([e, f], [g, h]) = (backend.port.to_ne_bytes(), backend.padding.to_ne_bytes());
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}
