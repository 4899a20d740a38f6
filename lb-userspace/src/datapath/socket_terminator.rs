//! Disconnects connected UDP sockets of removed backends, because no hook runs when they send.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aya::maps::{Map, MapData, MapError, SkStorage};
use lb_common::{Address, RevNat};

use super::diag::{self, Connected};
use super::kernel::Generations;
use super::reconcile::RemovedUdp;

/// The most walks that search for a backend's sockets.
const MAX_WALKS: u32 = 5;
/// The fewest walks: a connect may have been in progress during the first.
const MIN_WALKS: u32 = 2;
/// How long after a walk the next one begins.
const AGAIN: Duration = Duration::from_secs(1);

/// Disconnects sockets, in a thread of its own, while there are any to disconnect.
#[derive(Clone, Debug)]
pub struct SocketTerminator {
    generations: Generations,
    /// Where the sockets' storages are pinned.
    storages: PathBuf,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Queue,
    is_running: bool,
}

/// The connected sockets to search for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Left {
    /// Those of a backend that left a service, which isn't known any more.
    Backend(SocketAddr),
    /// Those that connected to this frontend and got this backend, a pair that isn't in the table any
    /// more. Sockets with the same backend through another frontend stay. Port 0 of the frontend stands
    /// for all ports.
    Frontend { frontend: SocketAddr, backend: SocketAddr },
    /// Not those that connected to this frontend and got this backend, where port 0 stands for all others.
    Kept { frontend: SocketAddr, backend: SocketAddr },
}

impl Left {
    fn backend(&self) -> SocketAddr {
        match self {
            Left::Backend(backend)
            | Left::Frontend { backend, .. }
            | Left::Kept { backend, .. } => *backend,
        }
    }
}

/// The remaining searches, each with the number of walks done.
#[derive(Debug, Default)]
struct Queue(HashMap<Left, u32>);

impl Queue {
    /// Has it looked for from the beginning.
    fn add(&mut self, left: impl IntoIterator<Item = Left>) {
        self.0.extend(left.into_iter().map(|left| (left, 0)));
    }

    /// Takes the searches of the next walk.
    fn take(&mut self) -> HashMap<Left, u32> {
        std::mem::take(&mut self.0)
    }

    /// Puts a walk's searches back, except those with enough walks. One that was added meanwhile starts
    /// again.
    fn put_back(&mut self, walked: HashMap<Left, u32>, is_done: bool) {
        let n_wanted = if is_done { MIN_WALKS } else { MAX_WALKS };
        for (left, n_walks) in walked {
            if n_walks + 1 < n_wanted {
                self.0.entry(left).or_insert(n_walks + 1);
            }
        }
    }
}

impl SocketTerminator {
    /// A terminator that reads what sockets remember from the maps that are pinned in `storages`.
    pub fn new(generations: Generations, storages: PathBuf) -> SocketTerminator {
        SocketTerminator { generations, storages, shared: Arc::default() }
    }

    /// Disconnects the sockets of what left soon, and returns at once.
    pub fn disconnect(&self, left: RemovedUdp) {
        if left.is_empty() {
            return;
        }
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.queue.add(left.backends.into_iter().map(Left::Backend));
        let frontends = left.frontends.into_iter();
        shared.queue.add(frontends.map(|(frontend, backend)| Left::Frontend { frontend, backend }));
        let kept = left.kept.into_iter();
        shared.queue.add(kept.map(|(frontend, backend)| Left::Kept { frontend, backend }));
        if shared.is_running {
            return;
        }
        shared.is_running = true;
        let this = self.clone();
        let thread = std::thread::Builder::new().name("terminator".to_owned());
        if let Err(error) = thread.spawn(move || this.work()) {
            tracing::error!("can't start a thread to disconnect UDP sockets: {error}");
            shared.is_running = false;
        }
    }

    fn work(&self) {
        loop {
            let walked = {
                let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
                let walked = shared.queue.take();
                if walked.is_empty() {
                    shared.is_running = false;
                    return;
                }
                walked
            };
            let is_done = self.disconnect_now(&walked.keys().copied().collect());
            let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
            shared.queue.put_back(walked, is_done);
            drop(shared);
            std::thread::sleep(AGAIN);
        }
    }

    /// Returns whether there is nothing left to try.
    fn disconnect_now(&self, left: &HashSet<Left>) -> bool {
        let open = |name| {
            let map = MapData::from_pin(self.storages.join(name)).and_then(Map::from_map_data);
            map.and_then(SkStorage::<_, [u8; size_of::<RevNat>()]>::try_from)
        };
        let (peers, former) = match (open("SK_REVNAT"), open("SK_REVNAT_PREV")) {
            (Ok(peers), Ok(former)) => (peers, former),
            (Err(error), _) | (_, Err(error)) => {
                tracing::warn!("connected UDP sockets can't be looked at: {error}");
                return false;
            }
        };
        let destinations: HashSet<SocketAddr> = left.iter().map(Left::backend).collect();
        let is_suspect = |socket: &Connected| destinations.contains(&canonical(socket.destination));
        let is_gone = |socket: &Connected, descriptor: BorrowedFd<'_>| {
            // The entry of the socket's present destination is valid: a later connect() may have failed.
            for storage in [&peers, &former] {
                match storage.get(&descriptor, 0).map(Remembered::of) {
                    Ok(peer) if peer.backend == canonical(socket.destination) => {
                        let generation = self.generations.generation(peer.backend_idx);
                        return Ok(is_gone(&peer, generation, left));
                    }
                    Ok(_) | Err(MapError::KeyNotFound) => {}
                    Err(error) => return Err(std::io::Error::other(error)),
                }
            }
            // It connected the address itself.
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
}

/// The contents of a connected socket's storage.
#[derive(Clone, Copy, Debug)]
struct Remembered {
    frontend: SocketAddr,
    backend: SocketAddr,
    backend_idx: u32,
    generation: u32,
}

impl Remembered {
    fn of(entry: [u8; size_of::<RevNat>()]) -> Remembered {
        let entry: RevNat = zerocopy::transmute!(entry);
        let RevNat { frontend_port, backend_port, backend_idx, generation, .. } = entry;
        let socket_address =
            |address: Address, port: u16| canonical(SocketAddr::from((address.octets, port)));
        Remembered {
            frontend: socket_address(entry.frontend, frontend_port),
            backend: socket_address(entry.backend, backend_port),
            backend_idx,
            generation,
        }
    }
}

/// Whether what a connected socket remembers is among what left. `generation` is the one that the
/// backend it remembers has now.
fn is_gone(peer: &Remembered, generation: u32, left: &HashSet<Left>) -> bool {
    let Remembered { frontend, backend, .. } = *peer;
    // A connection that met an entry while it was retired remembers no generation.
    if peer.generation != 0 && peer.generation == generation {
        return false;
    }
    let any_port = SocketAddr::new(frontend.ip(), 0);
    let gave_up = |frontend| left.contains(&Left::Frontend { frontend, backend });
    left.contains(&Left::Backend(backend))
        || gave_up(frontend)
        || gave_up(any_port) && !left.contains(&Left::Kept { frontend, backend })
}

/// With an IPv4 address as what it is, also where a socket has it in IPv6's form.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    /// Each is looked for a few times, however many others come in the meantime.
    #[test]
    fn the_queue_drains_under_churn() {
        let left = |n: u16| Left::Backend(SocketAddr::from(([10, 0, 0, 1], n)));
        for (is_done, n_walks) in [(true, 2), (false, 5)] {
            let mut queue = Queue::default();
            let mut seen = HashMap::<Left, u32>::new();
            for n in 1..=100 {
                queue.add([left(n)]);
                let walked = queue.take();
                assert!(
                    walked.len() <= n_walks as usize + 1,
                    "walk {n} looks for {}",
                    walked.len()
                );
                walked.keys().for_each(|&left| *seen.entry(left).or_default() += 1);
                // It is removed again during its search, which starts again.
                if n == 50 {
                    queue.add([left(n)]);
                }
                queue.put_back(walked, is_done);
            }
            assert_eq!(seen[&left(1)], n_walks);
            assert_eq!(seen[&left(50)], n_walks + 1);
        }
    }

    #[test]
    fn what_a_socket_remembers_is_gone() {
        let (pin, vip, other) = ("127.0.0.1:53", "127.128.0.1:53", "127.128.0.1:54");
        let (web, api) = (address("10.0.0.1:5300"), address("10.0.0.2:5300"));
        let moved = |frontend, backend| Left::Frontend { frontend: address(frontend), backend };
        // The socket's frontend, backend and generation; the entry's generation now; what was removed.
        let table = [
            (vip, web, 7, 0, Left::Backend(web), true),
            (vip, web, 7, 8, Left::Backend(web), true),
            (vip, web, 7, 7, Left::Backend(web), false),
            (vip, web, 0, 0, Left::Backend(web), true),
            (vip, web, 7, 0, Left::Backend(api), false),
            (pin, web, 7, 9, moved(pin, web), true),
            // The service keeps the VIP, so who came by it stays.
            (vip, web, 7, 9, moved(pin, web), false),
            // Who came by the pin after it moved, to a service that has the backend as well.
            (pin, web, 9, 9, moved(pin, web), false),
            (other, web, 7, 9, moved("127.128.0.1:0", web), true),
        ];
        for (frontend, backend, generation, now, left, expected) in table {
            let frontend = address(frontend);
            let peer = Remembered { frontend, backend, backend_idx: 0, generation };
            let found = is_gone(&peer, now, &HashSet::from([left]));
            assert_eq!(found, expected, "{peer:?}, now {now}, {left:?}");
        }
        // The service had any port, and has this one now; what left it in the meantime is gone all the same.
        let kept = |frontend| Left::Kept { frontend: address(frontend), backend: web };
        let (any, port) = (moved("127.128.0.1:0", web), moved(other, web));
        for (left, expected) in [
            (vec![any, kept(other)], false),
            (vec![any, kept(vip)], true),
            (vec![any, kept(other), port], true),
            (vec![any, kept(other), Left::Backend(web)], true),
        ] {
            let (frontend, backend) = (address(other), web);
            let peer = Remembered { frontend, backend, backend_idx: 0, generation: 7 };
            assert_eq!(is_gone(&peer, 9, &left.iter().copied().collect()), expected, "{left:?}");
        }
    }
}
