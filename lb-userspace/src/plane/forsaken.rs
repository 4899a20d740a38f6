//! Connected UDP sockets whose backend left: no hook runs when they send, so they are disconnected.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aya::maps::{Map, MapData, MapError, SkStorage};
use lb_common::Peer;

use super::diag::{self, Connected};
use super::kernel::Liveness;

/// How often the disconnection of a backend's sockets is tried.
const MAX_ATTEMPTS: u32 = 5;
/// How long after a walk the next one begins.
const AGAIN: Duration = Duration::from_secs(1);

/// Disconnects sockets, in a thread of its own, while there are any to disconnect.
#[derive(Clone, Debug)]
pub struct Disconnector {
    liveness: Liveness,
    /// Where the sockets' storages are pinned.
    storages: PathBuf,
    queue: Arc<Mutex<Queue>>,
}

#[derive(Debug, Default)]
struct Queue {
    /// Addresses that left a service which is dialled by UDP, and how often they were tried.
    left: Vec<(HashSet<SocketAddr>, u32)>,
    is_running: bool,
}

impl Disconnector {
    /// A disconnector that reads what sockets remember from the maps that are pinned in `storages`.
    pub fn new(liveness: Liveness, storages: PathBuf) -> Disconnector {
        Disconnector { liveness, storages, queue: Arc::default() }
    }

    /// Disconnects the sockets of these backends soon, and returns at once.
    pub fn disconnect(&self, left: HashSet<SocketAddr>) {
        if !left.is_empty() {
            self.enqueue(left, 0);
        }
    }

    fn enqueue(&self, left: HashSet<SocketAddr>, n_attempts: u32) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.left.push((left, n_attempts));
        if queue.is_running {
            return;
        }
        queue.is_running = true;
        let this = self.clone();
        let thread = std::thread::Builder::new().name("forsaken".to_owned());
        if let Err(error) = thread.spawn(move || this.work()) {
            tracing::error!("can't start a thread to disconnect UDP sockets: {error}");
            queue.is_running = false;
        }
    }

    fn work(&self) {
        loop {
            let (left, n_attempts) = {
                let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
                let Some((mut left, mut n_attempts)) = queue.left.pop() else {
                    queue.is_running = false;
                    return;
                };
                // What was asked for in the meantime is done in the same walk.
                for (more, n_earlier) in queue.left.drain(..) {
                    left.extend(more);
                    n_attempts = n_attempts.min(n_earlier);
                }
                (left, n_attempts)
            };
            let is_done = self.disconnect_now(&left);
            // The first walk may have come before a connect that was under way.
            if n_attempts == 0 || !is_done && n_attempts < MAX_ATTEMPTS {
                std::thread::sleep(AGAIN);
                self.enqueue(left, n_attempts + 1);
            }
        }
    }

    /// Returns whether there is nothing left to try.
    fn disconnect_now(&self, left: &HashSet<SocketAddr>) -> bool {
        let open = |name| {
            let map = MapData::from_pin(self.storages.join(name)).and_then(Map::from_map_data);
            map.and_then(SkStorage::<_, [u8; size_of::<Peer>()]>::try_from)
        };
        let (peers, former) = match (open("PEERS"), open("FORMER_PEERS")) {
            (Ok(peers), Ok(former)) => (peers, former),
            (Err(error), _) | (_, Err(error)) => {
                tracing::warn!("connected UDP sockets can't be looked at: {error}");
                return false;
            }
        };
        let is_suspect = |socket: &Connected| left.contains(&canonical(socket.destination));
        let is_gone = |socket: &Connected, descriptor: BorrowedFd<'_>| {
            // The one that says where the socket is connected to is true: a later connect() may have
            // failed.
            for storage in [&peers, &former] {
                match storage.get(&descriptor, 0) {
                    Ok(peer) if sent_to(&peer) == canonical(socket.destination) => {
                        return Ok(self.is_gone(&peer));
                    }
                    Ok(_) | Err(MapError::KeyNotFound) => {}
                    Err(error) => return Err(std::io::Error::other(error)),
                }
            }
            // It dialled the address itself.
            Ok(false)
        };
        let report = diag::disconnect(is_suspect, is_gone);
        if report.n_disconnected > 0 {
            let n = report.n_disconnected;
            tracing::info!("disconnected {n} UDP sockets whose backend left");
        }
        for error in &report.errors {
            tracing::warn!("{error}");
        }
        report.errors.is_empty()
    }

    /// Whether the backend that a socket remembers left the table.
    fn is_gone(&self, peer: &[u8; size_of::<Peer>()]) -> bool {
        let word = |at: usize| u32::from_ne_bytes(std::array::from_fn(|byte| peer[at + byte]));
        let backend_idx = word(std::mem::offset_of!(Peer, backend_idx));
        let generation = word(std::mem::offset_of!(Peer, generation));
        // A dial that met an entry while it was retired remembers no generation.
        generation == 0 || self.liveness.generation(backend_idx) != generation
    }
}

/// Where a dial was sent.
fn sent_to(peer: &[u8; size_of::<Peer>()]) -> SocketAddr {
    let address = std::mem::offset_of!(Peer, backend);
    let port = std::mem::offset_of!(Peer, backend_port);
    let backend: [u8; 16] = std::array::from_fn(|at| peer[address + at]);
    let backend_port = u16::from_ne_bytes([peer[port], peer[port + 1]]);
    canonical(SocketAddr::from((backend, backend_port)))
}

/// With an IPv4 address as what it is, also where a socket has it in IPv6's form.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
