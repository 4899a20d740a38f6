//! A service's condition in a word, for the list of all services.

use std::net::SocketAddr;

use crate::admin::api::Condition;
use crate::table::{BackendState, Service, Watch};

/// The condition of a service, and the number of instances that connections reach. `n_ejected` of its
/// backends are ejected; `is_stale` is whether the kernel lacks its present state.
pub fn of(service: &Service, n_ejected: usize, is_stale: bool) -> (Condition, usize) {
    let n_of = |is: fn(BackendState) -> bool| {
        service.backends.iter().filter(|backend| is(backend.state)).count()
    };
    let reached = n_of(BackendState::is_reached).saturating_sub(n_ejected);
    let is_faulty = |state| {
        use BackendState::{Ejected, Unproven, Unroutable, Warning};
        matches!(state, Warning | Unproven | Ejected | Unroutable)
    };
    let condition = if reached == 0 {
        if service.watch == Watch::Cold { Condition::Cold } else { Condition::Down }
    } else if is_stale || n_ejected > 0 || n_of(is_faulty) > 0 || !service.excluded.is_empty() {
        Condition::Degraded
    } else {
        Condition::Healthy
    };
    (condition, reached)
}

/// How many of the backends that connections reach are ejected: a drained one isn't shown as such.
/// `backends` are those in the kernel, by their indices.
pub fn n_ejected(
    service: &Service,
    backends: &[(SocketAddr, u32)],
    is_ejected: impl Fn(u32) -> bool,
) -> usize {
    let is_reached = |address: SocketAddr| {
        let mut backends = service.backends.iter();
        backends.any(|it| it.address == Some(address) && it.state.is_reached())
    };
    let ejected = backends.iter().filter(|(_, idx)| is_ejected(*idx));
    ejected.filter(|(address, _)| is_reached(*address)).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::{Backend, Excluded};

    fn service(states: &[BackendState], n_excluded: usize) -> Service {
        let backend = |state: &BackendState| Backend {
            state: *state,
            ..Backend::example("10.0.0.7:1".parse().unwrap())
        };
        let [address, node, id, reason] = ["10.0.0.8:1", "n2", "web-2", "critical"];
        let [address, node, id, reason] = [address, node, id, reason].map(str::to_owned);
        Service {
            excluded: vec![Excluded { address, node, id, reason }; n_excluded],
            ..Service::example(states.iter().map(backend).collect())
        }
    }

    #[test]
    fn a_condition_is_that_of_the_instances_and_of_the_kernel() {
        use BackendState::{Draining, Healthy, Spare, Unproven, Unroutable, Warning};
        for (states, n_excluded, n_ejected, is_stale, condition, reached) in [
            (&[Healthy, Healthy][..], 0, 0, false, Condition::Healthy, 2),
            (&[Healthy, Spare, Draining], 0, 0, false, Condition::Healthy, 2),
            (&[Healthy, Warning], 0, 0, false, Condition::Degraded, 2),
            (&[Healthy, Unproven], 0, 0, false, Condition::Degraded, 1),
            (&[Healthy, Unroutable], 0, 0, false, Condition::Degraded, 1),
            (&[Healthy], 1, 0, false, Condition::Degraded, 1),
            (&[Healthy, Healthy], 0, 1, false, Condition::Degraded, 1),
            (&[Healthy], 0, 0, true, Condition::Degraded, 1),
            (&[Healthy], 0, 1, false, Condition::Down, 0),
            (&[Draining, Unroutable], 0, 0, false, Condition::Down, 0),
            (&[], 3, 0, false, Condition::Down, 0),
        ] {
            let found = of(&service(states, n_excluded), n_ejected, is_stale);
            assert_eq!(
                found,
                (condition, reached),
                "{states:?} {n_excluded} {n_ejected} {is_stale}"
            );
        }
        let cold = Service { watch: Watch::Cold, ..service(&[], 0) };
        assert_eq!(of(&cold, 0, false), (Condition::Cold, 0));
    }

    #[test]
    fn a_drained_backend_does_not_count_as_ejected() {
        use BackendState::{Draining, Healthy};
        let addresses = ["10.0.0.7:1", "10.0.0.8:1", "10.0.0.9:1"].map(|it| it.parse().unwrap());
        let backends = addresses.iter().zip([Healthy, Draining, Healthy]);
        let backends = backends.map(|(it, state)| Backend { state, ..Backend::example(*it) });
        let service = Service::example(backends.collect());
        let gone = "10.0.0.6:1".parse().unwrap();
        let in_kernel = [(addresses[0], 4), (addresses[1], 5), (addresses[2], 6), (gone, 7)];
        for (ejected, expected) in [(&[4, 5, 7][..], 1), (&[5], 0), (&[4, 5, 6], 2), (&[], 0)] {
            let n = n_ejected(&service, &in_kernel, |idx| ejected.contains(&idx));
            assert_eq!(n, expected, "{ejected:?}");
        }
    }
}
