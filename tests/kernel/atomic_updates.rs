//! What readers see while tables change: the old or the new, and nobody else's.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::fixture::{Bed, OTHER_VIP, Server, VIP, dial, n_dials, service};

/// Two dialling threads against a table that swaps all of a service's backends without a pause.
pub fn swaps_are_atomic() {
    let servers = [b'a', b'b', b'c', b'd'].map(Server::start);
    let outsider = Server::start(b'x');
    let sets = [&servers[..2], &servers[2..]]
        .map(|set| set.iter().map(|server| (server.address, 1)).collect::<Vec<_>>());
    let mut bed = Bed::new();
    let other = service("other", OTHER_VIP, &[(outsider.address, 1)]);
    bed.apply(vec![service("web", VIP, &sets[0]), other.clone()]);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let dialling = [(); 2].map(|()| {
            scope.spawn(|| {
                for n in 0..n_dials() {
                    let answer =
                        dial((VIP, 80)).unwrap_or_else(|error| panic!("dial {n}: {error}"));
                    assert!("abcd".contains(answer), "dial {n} reached {answer}");
                }
            })
        });
        let swapping = scope.spawn(|| {
            let mut n_swaps = 0;
            while !done.load(Ordering::Relaxed) {
                n_swaps += 1;
                bed.apply(vec![service("web", VIP, &sets[n_swaps % 2]), other.clone()]);
            }
            n_swaps
        });
        let results = dialling.map(|thread| thread.join());
        done.store(true, Ordering::Relaxed);
        let n_swaps = swapping.join().unwrap();
        for result in results {
            result.unwrap();
        }
        assert!(n_swaps > n_dials() / 10, "{n_swaps} swaps are too few to prove anything");
    });
}

/// Two services that come, change and go, each dialled all the while: a dial gets its own service's
/// backend or is refused.
pub fn services_never_mix() {
    let servers = [b'a', b'b', b'c', b'd'].map(Server::start);
    let [ours, theirs] = [&servers[..2], &servers[2..]]
        .map(|set| set.iter().map(|server| (server.address, 1)).collect::<Vec<_>>());
    let mut bed = Bed::new();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let dialling = [(VIP, "ab"), (OTHER_VIP, "cd")].map(|(vip, allowed)| {
            scope.spawn(move || {
                let mut n_answers = 0;
                for n in 0..n_dials() {
                    match dial((vip, 80)) {
                        Ok(answer) => {
                            assert!(allowed.contains(answer), "dial {n} of {vip} reached {answer}");
                            n_answers += 1;
                        }
                        Err(error) => {
                            let kind = std::io::ErrorKind::ConnectionRefused;
                            assert_eq!(error.kind(), kind, "dial {n} of {vip}");
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
        let results = dialling.map(|thread| thread.join());
        done.store(true, Ordering::Relaxed);
        changing.join().unwrap();
        for result in results {
            assert!(result.unwrap() > 0, "some dials are answered");
        }
    });
}
