//! A service's condition in a word, for the list of all services.

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::BalanceAlgorithm;
    use crate::table::{Backend, Excluded, Ports, Protocols};

    fn service(states: &[BackendState], n_excluded: usize) -> Service {
        let backend = |state: &BackendState| Backend {
            address: None,
            shown_address: "10.0.0.7:1".into(),
            node: "n1".into(),
            id: "web-1".into(),
            weight: 1,
            state: *state,
            group: 0,
            reason: None,
            host_only: false,
        };
        let [address, node, id, reason] = ["10.0.0.8:1", "n2", "web-2", "critical"];
        let [address, node, id, reason] = [address, node, id, reason].map(str::to_owned);
        Service {
            name: "web".into(),
            vip: [127, 128, 0, 1].into(),
            vip6: None,
            ports: Ports::only([80]),
            protocols: Protocols::Tcp,
            algorithm: BalanceAlgorithm::Random,
            pin: None,
            public: Vec::new(),
            backends: states.iter().map(backend).collect(),
            excluded: vec![Excluded { address, node, id, reason }; n_excluded],
            notes: Vec::new(),
            watch: Watch::Live,
            generation: 1,
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
}
