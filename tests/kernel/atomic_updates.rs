//! While tables change, readers see the old state or the new one, and no other service's.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::fixture::{Bed, OTHER_VIP, Server, VIP, connect, n_connects, service};

/// The most connections of one client of [`swaps_are_atomic`].
const MAX_CONNECTS: usize = 200_000;

/// Two connecting threads against a table that swaps all of a service's backends without a pause.
pub fn swaps_are_atomic() {
    let servers = [b'a', b'b', b'c', b'd'].map(Server::start);
    let outsider = Server::start(b'x');
    let sets = [&servers[..2], &servers[2..]]
        .map(|set| set.iter().map(|server| (server.address, 1)).collect::<Vec<_>>());
    let mut bed = Bed::new();
    let other = service("other", OTHER_VIP, &[(outsider.address, 1)]);
    bed.apply(vec![service("web", VIP, &sets[0]), other.clone()]);
    let done = AtomicBool::new(false);
    let n_swaps = AtomicUsize::new(0);
    // A slow machine needs more connections until as many swaps have met them; the bound ends a hang.
    let is_enough = |n: usize| {
        n >= n_connects()
            && (n_swaps.load(Ordering::Relaxed) > n_connects() / 10 || n >= MAX_CONNECTS)
    };
    std::thread::scope(|scope| {
        let connecting = [(); 2].map(|()| {
            scope.spawn(|| {
                for n in (0..).take_while(|n| !is_enough(*n)) {
                    let answer =
                        connect((VIP, 80)).unwrap_or_else(|error| panic!("connect {n}: {error}"));
                    assert!("abcd".contains(answer), "connect {n} reached {answer}");
                }
            })
        });
        let swapping = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let n = n_swaps.fetch_add(1, Ordering::Relaxed);
                bed.apply(vec![service("web", VIP, &sets[n % 2]), other.clone()]);
            }
        });
        let results = connecting.map(|thread| thread.join());
        done.store(true, Ordering::Relaxed);
        swapping.join().unwrap();
        for result in results {
            result.unwrap();
        }
    });
    let n_swaps = n_swaps.into_inner();
    assert!(n_swaps > n_connects() / 10, "{n_swaps} swaps during {MAX_CONNECTS} connections");
}

/// Two services that come, change and go, each connected all the while: a connection gets its own service's
/// backend or is refused.
pub fn services_never_mix() {
    let servers = [b'a', b'b', b'c', b'd'].map(Server::start);
    let [ours, theirs] = [&servers[..2], &servers[2..]]
        .map(|set| set.iter().map(|server| (server.address, 1)).collect::<Vec<_>>());
    let mut bed = Bed::new();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let connecting = [(VIP, "ab"), (OTHER_VIP, "cd")].map(|(vip, allowed)| {
            scope.spawn(move || {
                let mut n_answers = 0;
                for n in 0..n_connects() {
                    match connect((vip, 80)) {
                        Ok(answer) => {
                            assert!(
                                allowed.contains(answer),
                                "connect {n} of {vip} reached {answer}"
                            );
                            n_answers += 1;
                        }
                        Err(error) => {
                            let kind = std::io::ErrorKind::ConnectionRefused;
                            assert_eq!(error.kind(), kind, "connect {n} of {vip}");
                        }
                    }
                }
                n_answers
            })
        });
        let changing = scope.spawn(|| {
            let mut n = 0usize;
            while !done.load(Ordering::Relaxed) {
                n += 1;
                let mut services = Vec::new();
                if !n.is_multiple_of(3) {
                    services.push(service("ours", VIP, &ours[n % 2..]));
                }
                if !n.is_multiple_of(4) {
                    services.push(service("theirs", OTHER_VIP, &theirs[n % 2..]));
                }
                bed.apply(services);
            }
        });
        let results = connecting.map(|thread| thread.join());
        done.store(true, Ordering::Relaxed);
        changing.join().unwrap();
        for result in results {
            assert!(result.unwrap() > 0, "some connections are answered");
        }
    });
}
