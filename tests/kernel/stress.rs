//! Up to a million connections, while the service's backends are swapped again and again.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use lb_userspace::datapath::Datapath;
use lb_userspace::table::{Service, Table};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_linger;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use crate::fixture::{End, Place, VIP, full_or_quarter, service};

const N_CLIENTS: usize = 3;
const N_LISTENERS: usize = 64;
/// The number of backends of each set.
const N_BACKENDS: usize = 3;
/// The connections for each swap: swaps and connections wait for each other, so that the
/// tested orders don't depend on the machine's speed.
const CONNECTS_A_SWAP: std::ops::RangeInclusive<u64> = 16..=100;
/// A connection that saw at most so many sets is conclusive: more than half of the servers are wrong.
const N_TELLING: u64 = 8;

/// The set of swap `k`: no two that follow each other share a server.
fn set(k: u64) -> impl Iterator<Item = usize> {
    (0..N_BACKENDS as u64).map(move |n| ((k * 5 + n * 19) % N_LISTENERS as u64) as usize)
}

/// The sets by their numbers: `finished` is current or was, `begun` may be.
struct Swaps {
    begun: AtomicU64,
    finished: AtomicU64,
    n_connects: AtomicU64,
    done: AtomicBool,
}

/// The results of one thread's connections.
#[derive(Debug, Default)]
struct Met {
    n_connects: u64,
    n_conclusive: u64,
    most_sets: u64,
}

pub fn many_connects_meet_no_wrong_one() {
    let n_connects = full_or_quarter(1_000_000);
    let listeners: Vec<TcpListener> =
        (0..N_LISTENERS).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()).collect();
    let mut place = Place::new();
    // So few that freed entries are soon reused.
    place.options.datapath.max_backends = 1_024;
    let mut datapath = place.start();
    let tables = tables(&listeners);
    let swaps = Swaps {
        begun: AtomicU64::new(0),
        finished: AtomicU64::new(0),
        n_connects: AtomicU64::new(0),
        done: AtomicBool::new(false),
    };
    assert!(datapath.apply(&tables[0]).unwrap().is_empty());
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| serve(&listeners, &swaps.done));
        let swapping = scope.spawn(|| swap(&mut datapath, &tables, &swaps));
        let connecting = [(); N_CLIENTS]
            .map(|()| scope.spawn(|| connect_all(n_connects.div_ceil(N_CLIENTS as u64), &swaps)));
        let met = connecting.map(|thread| thread.join());
        swaps.done.store(true, Ordering::SeqCst);
        swapping.join().unwrap();
        serving.join().unwrap();
        let met = met.map(Result::unwrap);
        let n_swaps = swaps.finished.load(Ordering::SeqCst);
        let [n_connects, n_conclusive] = [|met: &Met| met.n_connects, |met: &Met| met.n_conclusive]
            .map(|n| met.iter().map(n).sum::<u64>());
        let most_sets = met.iter().map(|met| met.most_sets).max();
        println!(
            "{n_connects} connects, {n_swaps} swaps; {n_conclusive} connects saw {N_TELLING} sets at most, none \
             more than {most_sets:?}"
        );
        assert!(
            (n_swaps + 1) * CONNECTS_A_SWAP.end() >= n_connects,
            "{n_swaps} swaps, {n_connects} connections"
        );
        assert!(
            n_conclusive * 2 > n_connects,
            "{n_conclusive} of {n_connects} connections are conclusive"
        );
    });
}

/// The tables of all sets, after which they begin again.
fn tables(listeners: &[TcpListener]) -> Vec<Table> {
    let address = |idx: usize| {
        let port = listeners[idx].local_addr().unwrap().port();
        (SocketAddr::from((Ipv4Addr::LOCALHOST, port)), 1)
    };
    let table = |k: u64| {
        let backends: Vec<_> = set(k).map(address).collect();
        let web: Arc<Service> = Arc::new(service("web", VIP, &backends));
        Table { generation: k, services: [(web.name.clone(), web)].into(), ..Table::default() }
    };
    (0..N_LISTENERS as u64).map(table).collect()
}

/// Swaps until the connections are done.
fn swap(datapath: &mut Datapath, tables: &[Table], swaps: &Swaps) {
    // Also where it panics: the connections wait for it.
    let _end = End(&swaps.done);
    for k in 1.. {
        let is_done = || swaps.done.load(Ordering::SeqCst);
        while swaps.n_connects.load(Ordering::SeqCst) < k * CONNECTS_A_SWAP.start() && !is_done() {
            std::thread::yield_now();
        }
        if is_done() {
            return;
        }
        swaps.begun.store(k, Ordering::SeqCst);
        let errors = datapath.apply(&tables[k as usize % tables.len()]).unwrap();
        assert!(errors.is_empty(), "{errors:?}");
        swaps.finished.store(k, Ordering::SeqCst);
    }
}

fn connect_all(n_connects: u64, swaps: &Swaps) -> Met {
    let mut met = Met { n_connects, ..Met::default() };
    for n in 0..n_connects {
        let n_before = swaps.n_connects.fetch_add(1, Ordering::SeqCst);
        let finished = loop {
            let finished = swaps.finished.load(Ordering::SeqCst);
            let is_done = swaps.done.load(Ordering::SeqCst);
            if n_before < (finished + 1) * CONNECTS_A_SWAP.end() || is_done {
                break finished;
            }
            std::thread::yield_now();
        };
        let reached = connect_quickly().unwrap_or_else(|errno| panic!("connect {n}: {errno}"));
        let begun = swaps.begun.load(Ordering::SeqCst);
        let is_right = (finished..=begun).any(|k| set(k).any(|idx| idx == reached));
        assert!(
            is_right,
            "connect {n} reached {reached}, of none of the sets {finished}..={begun}"
        );
        let n_sets = begun - finished + 1;
        met.n_conclusive += u64::from(n_sets <= N_TELLING);
        met.most_sets = met.most_sets.max(n_sets);
    }
    met
}

/// Connects the VIP, and returns the number that the server sent.
fn connect_quickly() -> rustix::io::Result<usize> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)?;
    rustix::net::connect(&socket, &SocketAddrV4::new(VIP, 80))?;
    let mut number = [0];
    let (n, _) = rustix::net::recv(&socket, &mut number, RecvFlags::empty())?;
    // No port is left waiting.
    set_socket_linger(&socket, Some(Duration::ZERO))?;
    if n == 1 { Ok(number[0].into()) } else { Err(Errno::CONNRESET) }
}

/// Sends everybody who connects the number of the listener.
fn serve(listeners: &[TcpListener], done: &AtomicBool) {
    listeners.iter().for_each(|listener| listener.set_nonblocking(true).unwrap());
    let mut fds: Vec<_> =
        listeners.iter().map(|listener| PollFd::new(listener, PollFlags::IN)).collect();
    let patience = Duration::from_millis(100).try_into().unwrap();
    // A client that hasn't read yet mustn't lose the data.
    let mut open: Vec<OwnedFd> = Vec::new();
    while !done.load(Ordering::SeqCst) {
        poll(&mut fds, Some(&patience)).unwrap();
        for (number, (listener, fd)) in (0u8..).zip(listeners.iter().zip(&fds)) {
            if fd.revents().is_empty() {
                continue;
            }
            while let Ok(socket) = rustix::net::accept_with(listener, SocketFlags::CLOEXEC) {
                let _ = rustix::net::send(&socket, &[number], SendFlags::NOSIGNAL);
                open.push(socket);
            }
        }
        // Those of clients that have gone cost nothing to close.
        open.drain(..open.len().saturating_sub(N_CLIENTS));
    }
}
