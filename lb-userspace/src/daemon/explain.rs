//! The result of a connection to a service, a sentence, by the table.

use std::net::SocketAddr;

use crate::config::BalanceAlgorithm;
use crate::table::{Backend, Ports, Protocols, Service};

/// The result of a connection in this state of the service.
pub fn sentence(fqdn: &str, service: &Service) -> String {
    let healthy: Vec<&Backend> = service.healthy().collect();
    // The kernel uses the groups in order.
    let group = healthy.iter().map(|backend| backend.group).min().unwrap_or_default();
    let n_first = healthy.iter().filter(|backend| backend.group == group).count();
    let kind = if group == 0 { "healthy" } else { "spare" };
    let by = match service.algorithm {
        BalanceAlgorithm::Random => "at random by weight".to_owned(),
        algorithm => format!("by `{algorithm}`"),
    };
    let target = target(fqdn, service);
    let mut clauses = vec![match n_first {
        0 => format!(
            "{target} is refused with ECONNREFUSED: none of its {} instances is fit",
            service.backends.len() + service.excluded.len()
        ),
        1 => format!("{target} goes to its one {kind} backend"),
        n => format!("{target} goes to one of {n} {kind} backends, {by}"),
    }];
    match healthy.len() - n_first {
        0 => {}
        1 => clauses.push("where that isn't possible, to 1 spare backend".to_owned()),
        n => clauses.push(format!("where that isn't possible, to one of {n} spare backends")),
    }
    let n_host_only = healthy.iter().filter(|backend| backend.host_only).count();
    if n_host_only > 0 {
        clauses.push(format!(
            "{n_host_only} of them on this host's loopback, for connects from its own network \
             namespace only"
        ));
    }
    let n_v6 = healthy.iter().filter(|backend| is_v6(backend)).count();
    if n_v6 > 0 && n_v6 == healthy.len() {
        clauses.push(
            "from an IPv4 socket (AF_INET) it is refused with ECONNREFUSED, since every healthy \
             backend is at an IPv6 address"
                .to_owned(),
        );
    } else if n_v6 > 0 {
        let by = match service.vip6 {
            Some(vip6) => format!("which only connections to {vip6} reach"),
            None => "which get nothing while others are at IPv4 addresses: only connections to an \
                     address of `vip.pool6` would reach both"
                .to_owned(),
        };
        clauses.push(format!("{n_v6} of them at IPv6 addresses, {by}"));
    }
    if n_v6 > 0 && service.protocols.udp() {
        let vip = service.vip;
        clauses.push(format!("UDP sent to {vip} without a connect reaches IPv4 backends only"));
    }
    if !healthy.is_empty() {
        clauses.extend(refused(service));
    }
    clauses.join("; ")
}

/// A connection, and all that it may be to: the name, its addresses, ports and protocols.
pub fn target(fqdn: &str, service: &Service) -> String {
    let vip6 = service.vip6.map(|vip6| format!(" or {vip6}")).unwrap_or_default();
    let ports = match &service.ports {
        Ports::Any => "any port".to_owned(),
        Ports::Only(ports) => {
            let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
            format!("port {}", ports.join(" or "))
        }
    };
    let protocols = match service.protocols {
        Protocols::Tcp => "TCP",
        Protocols::Udp => "UDP",
        Protocols::Both => "TCP or UDP",
    };
    format!("a connection to {fqdn} ({}{vip6}) at {ports} by {protocols}", service.vip)
}

/// Connections that the service's addresses refuse in any case.
fn refused(service: &Service) -> Option<String> {
    let ports = match service.ports {
        Ports::Any => None,
        Ports::Only(_) => Some("any other port"),
    };
    let protocol = match service.protocols {
        Protocols::Tcp => Some("UDP"),
        Protocols::Udp => Some("TCP"),
        Protocols::Both => None,
    };
    let refused: Vec<&str> = ports.into_iter().chain(protocol).collect();
    (!refused.is_empty()).then(|| format!("{} is refused", refused.join(" or ")))
}

fn is_v6(backend: &Backend) -> bool {
    matches!(backend.address, Some(SocketAddr::V6(_)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::BackendState;

    fn service(backends: &[&str]) -> Service {
        let backend = |address: &&str| {
            let address: SocketAddr = address.parse().unwrap();
            Backend {
                address: Some(address),
                shown_address: address.to_string(),
                node: String::new(),
                id: String::new(),
                weight: 1,
                state: BackendState::Healthy,
                group: 0,
                reason: None,
                host_only: address.ip().is_loopback(),
            }
        };
        Service {
            name: "web".into(),
            vip: [127, 128, 0, 1].into(),
            vip6: None,
            ports: Ports::only([80]),
            protocols: Protocols::Tcp,
            algorithm: BalanceAlgorithm::Random,
            pin: None,
            backends: backends.iter().map(backend).collect(),
            excluded: Vec::new(),
            notes: Vec::new(),
            watch: Default::default(),
            generation: 1,
        }
    }

    #[test]
    fn what_a_connect_gets() {
        use Protocols::*;
        let (v4, v6) = ("10.0.0.7:1", "[2001:db8::7]:1");
        let rows: &[(&[&str], Ports, Protocols, &str)] = &[
            (
                &[],
                Ports::only([80]),
                Tcp,
                "at port 80 by TCP is refused with ECONNREFUSED: none of its 0 instances is fit",
            ),
            (
                &[v4],
                Ports::only([80, 5432]),
                Tcp,
                "at port 80 or 5432 by TCP goes to its one healthy backend; any other port or UDP \
                 is refused",
            ),
            (
                &[v4, "127.0.0.1:1"],
                Ports::Any,
                Both,
                "at any port by TCP or UDP goes to one of 2 healthy backends, at random by weight; \
                 1 of them on this host's loopback, for connects from its own network namespace only",
            ),
            (
                &[v6],
                Ports::Any,
                Tcp,
                "at any port by TCP goes to its one healthy backend; from an IPv4 socket (AF_INET) \
                 it is refused with ECONNREFUSED, since every healthy backend is at an IPv6 \
                 address; UDP is refused",
            ),
            (
                &[v4, v6],
                Ports::only([53]),
                Udp,
                "at port 53 by UDP goes to one of 2 healthy backends, at random by weight; 1 of \
                 them at IPv6 addresses, which get nothing while others are at IPv4 addresses: only \
                 connections to an address of `vip.pool6` would reach both; UDP sent to 127.128.0.1 \
                 without a connect reaches IPv4 backends only; any other port or TCP is refused",
            ),
        ];
        for (backends, ports, protocols, expected) in rows {
            let service =
                Service { ports: ports.clone(), protocols: *protocols, ..service(backends) };
            let expected = format!("a connection to web.service (127.128.0.1) {expected}");
            assert_eq!(sentence("web.service", &service), expected);
        }
    }

    #[test]
    fn spare_backends_and_the_algorithm_are_named() {
        let mut some = service(&["10.0.0.7:1", "10.0.0.8:1", "10.0.0.9:1", "10.0.0.10:1"]);
        some.algorithm = BalanceAlgorithm::Least;
        let mut check = |states: [(BackendState, u8); 4], expected: &str| {
            for (backend, (state, group)) in some.backends.iter_mut().zip(states) {
                (backend.state, backend.group) = (state, group);
            }
            let text = sentence("w", &some);
            assert!(text.contains(expected), "{text}");
        };
        use BackendState::*;
        check(
            [(Healthy, 0), (Warning, 0), (Spare, 1), (Draining, 0)],
            "goes to one of 2 healthy backends, by `least`; where that isn't possible, to 1 spare \
             backend; any",
        );
        check(
            [(Spare, 1), (Draining, 0), (Spare, 2), (Spare, 2)],
            "goes to its one spare backend; where that isn't possible, to one of 2 spare backends;",
        );
        check([(Draining, 0); 4], "is refused with ECONNREFUSED: none of its 4 instances is fit");
    }

    #[test]
    fn both_addresses_are_named() {
        let service = Service { vip6: Some("fd00::1".parse().unwrap()), ..service(&[]) };
        let expected = "a connection to w (127.128.0.1 or fd00::1) at port 80 by TCP";
        assert_eq!(target("w", &service), expected);
        let mixed = self::service(&["10.0.0.7:1", "[2001:db8::7]:1"]);
        let text = sentence("w", &Service { vip6: service.vip6, ..mixed });
        let clause = "1 of them at IPv6 addresses, which only connections to fd00::1 reach; ";
        assert!(text.contains(clause), "{text}");
    }
}
