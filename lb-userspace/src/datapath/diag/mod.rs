//! Lists TCP connections with what their sockets store ([`stored_tcp`]), aborts chosen ones
//! ([`abort_tcp`]), and disconnects UDP sockets from outside: no hook runs when a connected UDP socket sends, so it keeps sending to a removed
//! backend until it is disconnected.
//!
//! [`disconnect`] has the kernel abort exactly chosen sockets: the application's next call, or the
//! one that it waits in, fails once with ECONNABORTED. After that the socket has no destination and,
//! unless the application bound it, no port; it can be connected again.
//!
//! A socket's storage is read through a descriptor that is borrowed from a process that has it: the
//! kernel lists sockets with their storage (INET_DIAG_REQ_SK_BPF_STORAGES) for TCP only,
//! since `inet_sk_diag_fill` is done with a socket of any other protocol before it comes to storage.
//! So it is on 5.10, 6.1, 6.12, 6.18 and 7.2.

mod error;
mod netns;
mod procfs;
mod sock_diag;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use sock_diag::{Family, SockDiag};

use crate::capabilities;
use error::MAX_DURATION;

pub use error::DiagError;
pub use sock_diag::{Connected, Stored};

/// How often the suspects are looked for at most. Those that were not disconnected at once are tried
/// again: a socket can be hidden behind one with equal addresses and ports (SO_REUSEPORT), and it
/// can be on its way from one process to another.
const MAX_ROUNDS: usize = 4;

/// What [`disconnect`] did.
#[derive(Debug, Default)]
pub struct DiagReport {
    /// The network namespaces whose sockets were listed.
    pub n_namespaces: usize,
    /// The sockets that `is_gone` was called for, and that were disconnected or spared.
    pub n_examined: usize,
    /// The sockets that were disconnected.
    pub n_disconnected: usize,
    /// Failures. The next call retries them.
    pub errors: Vec<DiagError>,
}

/// Disconnects the connected UDP sockets, IPv4 and IPv6, for which first `is_suspect` and then
/// `is_gone` is true, in every network namespace that a thread is in.
///
/// `is_suspect` sees every connected UDP socket of the host and has to be cheap and narrow, such as
/// "connected to an address that has just left the table": to examine a suspect, all processes are
/// searched for a descriptor of it. `is_gone` then gets a descriptor of the socket itself, to read
/// its storage by; to say that the socket has no storage it returns false.
///
/// Blocks: for some milliseconds where there is no suspect, else for as long as it takes to read
/// all the links in /proc/*/fd. Sockets that aren't connected are never touched; what vanishes
/// meanwhile is no error. Needs CAP_SYS_ADMIN, CAP_SYS_PTRACE, CAP_NET_ADMIN and, for other users'
/// processes, CAP_DAC_READ_SEARCH. Minimum kernel: 5.6.
///
/// Not reached: a socket whose namespace no thread is in any more; a socket that only a message
/// under way or an io_uring holds, or a process whose first thread has ended; and one that shares
/// addresses and ports with a socket that stays connected. All but the first are reported.
pub fn disconnect(
    is_suspect: impl Fn(&Connected) -> bool + Send,
    is_gone: impl FnMut(&Connected, BorrowedFd<'_>) -> io::Result<bool> + Send,
) -> DiagReport {
    // The thread ends in another namespace than it started in, so it can't be one of a pool.
    std::thread::scope(|scope| {
        let work = || {
            capabilities::for_search();
            disconnect_everywhere(is_suspect, is_gone)
        };
        match std::thread::Builder::new().name("disconnect".to_owned()).spawn_scoped(scope, work) {
            Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            Err(error) => {
                DiagReport { errors: vec![DiagError::Thread(error)], ..DiagReport::default() }
            }
        }
    })
}

/// A UDP socket that is bound to a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BoundUdp {
    /// Its address.
    pub local: SocketAddr,
    /// The id of the cgroup in which it was made.
    pub cgroup_id: u64,
    /// Whether it is in the network namespace in which the search began.
    pub is_in_own_namespace: bool,
}

/// The UDP sockets that are bound to these ports in the network namespaces of these processes and in
/// the calling thread's. `visit` is called in each of the others, with its inode and the id of a process in it.
///
/// The calling thread ends in another namespace, with its capabilities raised. Minimum kernel: 5.9.
///
/// # Errors
/// Without CAP_SYS_ADMIN, CAP_SYS_PTRACE, or the kernel module udp_diag. What vanishes meanwhile is no
/// error.
pub fn bound_udp(
    ports: &BTreeSet<u16>,
    pids: &BTreeSet<u32>,
    mut visit: impl FnMut(u64, &str),
) -> Result<Vec<BoundUdp>, DiagError> {
    if !netns::may_look() {
        return Err(DiagError::Hidden);
    }
    capabilities::for_search();
    let own = netns::own().map_err(DiagError::Processes)?;
    let list = |inode| -> Result<Vec<BoundUdp>, DiagError> {
        let failed = |source| DiagError::List { namespace: inode, source };
        let mut sock_diag = SockDiag::open().map_err(failed)?;
        let mut listed = Vec::new();
        for &port in ports {
            for family in [Family::V4, Family::V6] {
                listed.extend(sock_diag.bound_udp(family, port).map_err(failed)?);
            }
        }
        let is_in_own_namespace = inode == own;
        let bound = |(local, cgroup_id)| BoundUdp { local, cgroup_id, is_in_own_namespace };
        Ok(listed.into_iter().map(bound).collect())
    };
    let mut all = list(own)?;
    for namespace in netns::of(pids).iter().filter(|namespace| namespace.inode != own) {
        let inode = namespace.inode;
        if namespace.enter().map_err(|source| DiagError::Enter { namespace: inode, source })? {
            all.extend(list(inode)?);
            visit(inode, namespace.pid());
        }
    }
    Ok(all)
}

/// The TCP connections whose sockets have storage in `storage`, or for whose cookie `has_record` is true,
/// in every network namespace that a thread is in, by their sockets' cookies; and the namespaces that
/// couldn't be listed.
///
/// The kernel may miss a socket whose neighbour in its table goes while it lists them, so each
/// namespace is listed twice. Blocks: for about a microsecond a TCP socket of the host. Needs
/// CAP_SYS_ADMIN, CAP_SYS_PTRACE, CAP_BPF and CAP_NET_ADMIN. Minimum kernel: 5.7.
pub fn stored_tcp(
    storage: BorrowedFd<'_>,
    has_record: impl Fn(u64) -> bool + Sync,
) -> (BTreeMap<u64, Stored>, Vec<DiagError>) {
    let mut stored = BTreeMap::new();
    let errors = for_each_tcp(storage, has_record, |_, _, found| {
        stored.extend(found.into_iter().map(|stored| (stored.cookie, stored)));
        Ok(())
    });
    (stored, errors)
}

/// Aborts the TCP connections of [`stored_tcp`] for which `is_chosen` is true: the peer gets a RST, and
/// the application ECONNABORTED. Returns how many there were, and what failed, which another call may do.
///
/// Blocks, and needs what [`stored_tcp`] needs, and a kernel with CONFIG_INET_DIAG_DESTROY.
pub fn abort_tcp(
    storage: BorrowedFd<'_>,
    has_record: impl Fn(u64) -> bool + Sync,
    is_chosen: impl Fn(&Stored) -> bool + Sync,
) -> (usize, Vec<DiagError>) {
    let mut n_aborted = 0;
    let errors = for_each_tcp(storage, has_record, |namespace, sock_diag, found| {
        for stored in found.iter().filter(|stored| is_chosen(stored)) {
            let cookie = stored.cookie;
            let error = |source| DiagError::Abort { namespace, cookie, source };
            n_aborted += usize::from(sock_diag.abort_tcp(stored).map_err(error)?);
        }
        Ok(())
    });
    (n_aborted, errors)
}

/// Why [`abort_tcp`] could do nothing here; `None` if it could, as far as that can be known before.
pub fn abort_problem() -> Option<DiagError> {
    if !netns::may_look() {
        return Some(DiagError::Hidden);
    }
    let error = |source| DiagError::Abort { namespace: 0, cookie: 0, source };
    SockDiag::open().and_then(|mut sock_diag| sock_diag.may_abort_tcp()).map_err(error).err()
}

/// Calls `take` with the TCP connections of each network namespace that a thread is in, several times
/// for each namespace, and with that namespace's inode. Returns what failed.
fn for_each_tcp(
    storage: BorrowedFd<'_>,
    has_record: impl Fn(u64) -> bool + Sync,
    mut take: impl FnMut(u64, &mut SockDiag, Vec<Stored>) -> Result<(), DiagError> + Send,
) -> Vec<DiagError> {
    let mut errors = Vec::new();
    // The thread ends in another namespace than it started in, so it can't be one of a pool.
    std::thread::scope(|scope| {
        let mut look = || match netns::all() {
            Ok(_) if !netns::may_look() => errors.push(DiagError::Hidden),
            Ok(namespaces) => namespaces.iter().for_each(|namespace| {
                errors.extend(tcp_in(namespace, storage, &has_record, &mut take).err());
            }),
            Err(error) => errors.push(DiagError::Processes(error)),
        };
        let thread = std::thread::Builder::new().name("tcp-diag".to_owned());
        let work = move || {
            capabilities::for_search();
            look();
        };
        thread.spawn_scoped(scope, work).map(|thread| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        })
    })
    .unwrap_or_else(|error| errors.push(DiagError::Thread(error)));
    errors
}

/// Moves the calling thread to a namespace and lists its TCP connections.
fn tcp_in(
    namespace: &netns::Namespace,
    storage: BorrowedFd<'_>,
    has_record: impl Fn(u64) -> bool,
    mut take: impl FnMut(u64, &mut SockDiag, Vec<Stored>) -> Result<(), DiagError>,
) -> Result<(), DiagError> {
    let inode = namespace.inode;
    if !namespace.enter().map_err(|source| DiagError::Enter { namespace: inode, source })? {
        return Ok(());
    }
    let error = |source| DiagError::ListTcp { namespace: inode, source };
    let mut sock_diag = SockDiag::open().map_err(error)?;
    for family in [Family::V4, Family::V6, Family::V4, Family::V6] {
        let found = sock_diag.stored_tcp(family, storage, &has_record).map_err(error)?;
        take(inode, &mut sock_diag, found)?;
    }
    Ok(())
}

/// A network namespace, and the sockets in it that are still to be examined or disconnected.
#[derive(Debug)]
struct Place {
    /// The namespace's inode.
    namespace: u64,
    /// Belongs to that namespace, wherever the thread is now.
    sock_diag: SockDiag,
    suspects: Vec<Connected>,
}

impl Place {
    /// Searches for the suspects again.
    fn list(&mut self, is_suspect: impl Fn(&Connected) -> bool) -> Result<(), DiagError> {
        self.suspects.clear();
        for family in [Family::V4, Family::V6] {
            let sockets = self.sock_diag.connected_udp(family);
            let sockets =
                sockets.map_err(|source| DiagError::List { namespace: self.namespace, source })?;
            self.suspects.extend(sockets.into_iter().filter(&is_suspect));
        }
        Ok(())
    }
}

/// Moves the calling thread.
fn disconnect_everywhere(
    is_suspect: impl Fn(&Connected) -> bool,
    is_gone: impl FnMut(&Connected, BorrowedFd<'_>) -> io::Result<bool>,
) -> DiagReport {
    let deadline = Instant::now() + MAX_DURATION;
    let mut report = DiagReport::default();
    let result = find_suspects(&is_suspect, deadline, &mut report).and_then(|places| {
        disconnect_in_rounds(places, is_suspect, is_gone, deadline, &mut report)
    });
    report.errors.extend(result.err());
    report
}

/// Returns the namespaces with suspects in them. Moves the calling thread.
fn find_suspects(
    is_suspect: impl Fn(&Connected) -> bool,
    deadline: Instant,
    report: &mut DiagReport,
) -> Result<Vec<Place>, DiagError> {
    let mut places = Vec::new();
    if !netns::may_look() {
        report.errors.push(DiagError::Hidden);
    }
    for namespace in netns::all().map_err(DiagError::Processes)? {
        if Instant::now() > deadline {
            report.errors.push(DiagError::TimedOut);
            break;
        }
        match suspects_in(&namespace, &is_suspect) {
            Ok(Some(place)) => {
                report.n_namespaces += 1;
                places.push(place);
            }
            Ok(None) => {}
            // The others are done all the same.
            Err(error) => report.errors.push(error),
        }
        // Each keeps a descriptor.
        places.retain(|place| !place.suspects.is_empty());
    }
    Ok(places)
}

fn disconnect_in_rounds(
    mut places: Vec<Place>,
    is_suspect: impl Fn(&Connected) -> bool,
    mut is_gone: impl FnMut(&Connected, BorrowedFd<'_>) -> io::Result<bool>,
    deadline: Instant,
    report: &mut DiagReport,
) -> Result<(), DiagError> {
    let mut spared = BTreeSet::new();
    let mut refused = None;
    for round in 0..MAX_ROUNDS {
        if places.is_empty() {
            return Ok(());
        }
        if round > 0 && Instant::now() > deadline {
            return Err(DiagError::TimedOut);
        }
        refused = disconnect_suspects(&mut places, &mut is_gone, &mut spared, report)?;
        for place in &mut places {
            let is_suspect =
                |socket: &Connected| is_suspect(socket) && !spared.contains(&socket.cookie);
            // The others are done all the same.
            report.errors.extend(place.list(is_suspect).err());
        }
        places.retain(|place| !place.suspects.is_empty());
    }
    let first = places.first().and_then(|place| Some((place.namespace, place.suspects.first()?)));
    match first {
        None => Ok(()),
        Some((namespace, &Connected { cookie, destination, .. })) => {
            let n_sockets = places.iter().map(|place| place.suspects.len()).sum();
            Err(DiagError::Unreached { n_sockets, namespace, cookie, destination, refused })
        }
    }
}

/// Moves the calling thread to a namespace and lists its suspects; `None` when no thread is in it
/// any more.
fn suspects_in(
    namespace: &netns::Namespace,
    is_suspect: impl Fn(&Connected) -> bool,
) -> Result<Option<Place>, DiagError> {
    let inode = namespace.inode;
    if !namespace.enter().map_err(|source| DiagError::Enter { namespace: inode, source })? {
        return Ok(None);
    }
    let sock_diag =
        SockDiag::open().map_err(|source| DiagError::List { namespace: inode, source })?;
    let mut place = Place { namespace: inode, sock_diag, suspects: Vec::new() };
    place.list(is_suspect)?;
    Ok(Some(place))
}

/// Examines each suspect that a process has open, and disconnects it or adds its cookie to `spared`;
/// also if that fails, which the report has then: a socket that can't be examined doesn't affect
/// others. Returns the kernel's error if it refused a descriptor.
fn disconnect_suspects(
    places: &mut [Place],
    mut is_gone: impl FnMut(&Connected, BorrowedFd<'_>) -> io::Result<bool>,
    spared: &mut BTreeSet<u64>,
    report: &mut DiagReport,
) -> Result<Option<io::Error>, DiagError> {
    let mut suspects = BTreeMap::new();
    let mut inodes = BTreeSet::new();
    for (place_idx, place) in places.iter_mut().enumerate() {
        for socket in place.suspects.drain(..) {
            inodes.insert(u64::from(socket.inode));
            suspects.insert(socket.cookie, (place_idx, socket));
        }
    }
    procfs::borrow_sockets(inodes, |cookie, descriptor| {
        // Inodes are used again, cookies aren't.
        let Some((place_idx, socket)) = suspects.remove(&cookie) else { return };
        match is_gone(&socket, descriptor.as_fd()) {
            Ok(true) => {}
            Ok(false) => {
                report.n_examined += 1;
                spared.insert(cookie);
                return;
            }
            Err(source) => {
                report.errors.push(DiagError::Examine { cookie, source });
                spared.insert(cookie);
                return;
            }
        }
        let Place { namespace, ref mut sock_diag, .. } = places[place_idx];
        match sock_diag.destroy(&socket) {
            Ok(true) => {
                report.n_examined += 1;
                report.n_disconnected += 1;
            }
            // It changed or is hidden: the next round shows which.
            Ok(false) => {}
            Err(source) => {
                report.errors.push(DiagError::Destroy { namespace, cookie, source });
                spared.insert(cookie);
            }
        }
    })
}
