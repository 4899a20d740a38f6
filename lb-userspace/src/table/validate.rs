//! Validation of instances: one instance in, one backend or reason out.

use std::net::{IpAddr, SocketAddr};

use super::vips::Pools;
use super::{Backend, BackendState, Bridge, Catalog, Excluded, HealthStatus, Hosts, Instance};
use crate::dns_name;

/// An instance's place in the table.
#[derive(Debug, PartialEq, Eq)]
pub enum Validation {
    /// It serves, and can be reached from here or not.
    In(Backend),
    /// It gets nothing, by its source's verdict.
    Out(Excluded),
}

/// Validates one instance. `pools` are the pools of VIPs, and `hosts` the resolved host names.
/// `kept_weight` is the last one, for an instance whose Meta has a wrong one now.
pub fn validate(
    instance: &Instance,
    pools: &Pools,
    hosts: &Hosts,
    kept_weight: Option<u16>,
) -> Validation {
    let shown_address = instance.shown_address();
    let (node, id) = (instance.node.clone(), instance.id.clone());
    if let HealthStatus::Out(reason) = &instance.health {
        return Validation::Out(Excluded {
            address: shown_address,
            node,
            id,
            reason: reason.clone(),
        });
    }
    let (state, warning) = match &instance.health {
        HealthStatus::Warning(reason) => (BackendState::Warning, Some(reason.clone())),
        HealthStatus::Spare(reason) => (BackendState::Spare, Some(reason.clone())),
        _ => (BackendState::Healthy, None),
    };
    let (weight, odd_weight) = effective_weight(instance, kept_weight);
    let group = u8::from(state == BackendState::Spare);
    let state = if weight == 0 { BackendState::Draining } else { state };
    let (address, state, reason) = match route(instance, pools, hosts) {
        Ok((address, named)) => {
            let notes: Vec<String> = [warning, odd_weight, named].into_iter().flatten().collect();
            (Some(address), state, (!notes.is_empty()).then(|| notes.join("; ")))
        }
        Err(reason) => (None, BackendState::Unroutable, Some(reason)),
    };
    let host_only = address.is_some_and(|address| address.ip().is_loopback());
    Validation::In(Backend {
        address,
        shown_address,
        node,
        id,
        weight,
        state,
        group,
        reason,
        host_only,
    })
}

/// Where connections to the instance go, with a note where it has a name for an address; or why none can.
fn route(
    instance: &Instance,
    pools: &Pools,
    hosts: &Hosts,
) -> Result<(SocketAddr, Option<String>), String> {
    let (address, note) = hosts.find(instance)?;
    let port = match u16::try_from(instance.port) {
        Ok(0) => {
            return Err("port 0 can't be connected to: register the port it listens on".to_owned());
        }
        Ok(port) => port,
        Err(_) => return Err(format!("port {} isn't one: 1 to 65535 are", instance.port)),
    };
    if let Some(pool) = pools.around(address) {
        return Err(format!("{address} is in the VIP pool {pool}: a VIP can't be a backend"));
    }
    if let Some(reason) = misleads(address, instance) {
        return Err(reason);
    }
    // Its node may be a guest or a container of this host.
    let is_here = |bridge: &&Bridge| {
        let may_be_local = instance.local || instance.may_be_local;
        may_be_local || instance.node_address.is_some_and(|node| hosts.is_on(bridge, node))
    };
    if let Some(bridge) = hosts.bridge_around(address).filter(|bridge| !is_here(bridge)) {
        return Err(format!(
            "{address} is on a bridge of node `{}`, and {} is this host's own bridge `{}`, so it \
             would lead to another instance here: register an address that is routed{}",
            instance.node, bridge.network, bridge.name, WHICH_NODE
        ));
    }
    Ok((SocketAddr::new(address, port), note))
}

/// How nohop recognizes this node's own instances.
const WHICH_NODE: &str = "; where it is this node's, nohop has to ask this host's own agent, with \
                          agent:read";

/// Why an address doesn't lead from here to the instance that has it, whatever this host's network.
fn misleads(address: IpAddr, instance: &Instance) -> Option<String> {
    if address.is_loopback() && !instance.local {
        let node = &instance.node;
        return Some(format!(
            "{address} is the loopback of node `{node}`, not of this one: register an address that \
             is routed{WHICH_NODE}"
        ));
    }
    // RFC 1122, 3.2.1.3: 0.0.0.0/8 is this host on this network. RFC 4291, 2.5.5.1: ::/96 held
    // IPv4 addresses once, and leads nowhere.
    let is_nobodys = match address {
        IpAddr::V4(address) => address.octets()[0] == 0 || address.is_broadcast(),
        IpAddr::V6(ip) => !ip.is_loopback() && ip.segments()[..6] == [0; 6],
    };
    if address.is_multicast() || is_nobodys {
        return Some(format!("{address} is no host's address: register the one it listens on"));
    }
    match address {
        IpAddr::V6(address) if address.is_unicast_link_local() => Some(format!(
            "{address} is link-local, so it needs a zone, and each node has its own: register an \
             address that is routed"
        )),
        IpAddr::V4(address)
            if address.is_link_local() && !(instance.local || instance.may_be_local) =>
        {
            Some(format!(
                "{address} is link-local, so it is another host's on each link: register an address \
             that is routed{WHICH_NODE}"
            ))
        }
        _ => None,
    }
}

/// Whether a connection to the instance can be tried, by its own record: its port is valid, and its
/// address reaches it from here.
pub fn may_be_reached(instance: &Instance) -> bool {
    let has_port = (1..=i64::from(u16::MAX)).contains(&instance.port);
    has_port
        && match instance.ip() {
            Some(address) => misleads(address, instance).is_none(),
            None => instance.hostname().is_some(),
        }
}

/// The weight that the Meta gives an instance that passes, else the source's own, with a note if it
/// isn't the given one, or is 0.
fn effective_weight(instance: &Instance, kept: Option<u16>) -> (u16, Option<String>) {
    let given = instance.meta.weight().filter(|_| instance.health == HealthStatus::Serving);
    match given {
        None => weight(instance.weight),
        Some(Ok(given)) => weight(given.into()),
        Some(Err(problem)) => {
            let (weight, note) = weight(kept.map_or(instance.weight, Into::into));
            let note = note.map(|note| format!("; {note}")).unwrap_or_default();
            (weight, Some(format!("{problem}: it has {weight} as before{note}")))
        }
    }
}

/// The effective weight, and a note if it differs from the given one, or is 0.
fn weight(given: i64) -> (u16, Option<String>) {
    match u16::try_from(given) {
        Ok(0) => (0, Some("weight 0: it gets no new connections".to_owned())),
        Ok(weight) => (weight, None),
        Err(_) => {
            let weight = if given < 0 { 1 } else { u16::MAX };
            (weight, Some(format!("weight {given} isn't within 0 to 65535: taken as {weight}")))
        }
    }
}

/// Whether a service can have this name: one DNS label of letters, digits, `-` and `_` that begins
/// and ends with a letter or digit.
///
/// # Errors
/// The problem, with the fix.
pub fn check_name(name: &str) -> Result<(), String> {
    let Some(problem) = dns_name::service_name_problem(name) else { return Ok(()) };
    Err(format!("`{name}` can't be a DNS name: it {problem}; register the service under another"))
}

/// What this node can't serve of a catalog, whatever its network: names, and addresses of backends. A sentence
/// each.
pub fn catalog_problems(catalog: &Catalog, pools: &Pools) -> impl Iterator<Item = String> {
    catalog.iter().flat_map(move |(id, record)| {
        let of_backends = record.instances().filter_map(move |instance| {
            match validate(instance, pools, &Hosts::default(), None) {
                Validation::In(Backend { state: BackendState::Unroutable, reason, .. }) => {
                    Some(format!("service `{}`: {}", id.name, reason.unwrap_or_default()))
                }
                _ => None,
            }
        });
        check_name(&id.name).err().into_iter().chain(of_backends)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::{Host, ServiceMeta};

    fn instance(address: &str, port: i64) -> Instance {
        Instance { address: address.into(), port, ..Instance::fixture() }
    }

    fn pools() -> Pools {
        let v4 = "127.128.0.0/9".parse().unwrap();
        Pools { v4, v6: Some("fd6e::/64".parse().unwrap()) }
    }

    fn hosts() -> Hosts {
        let at = |address: &str, is_one_of_many| Host::At {
            address: address.parse().unwrap(),
            is_one_of_many,
        };
        let hosts = [
            ("db.example.com", at("10.0.0.9", false)),
            ("many.example.com.", at("10.0.0.10", true)),
            ("a_vip.example.com", at("127.200.0.1", false)),
            ("localhost", at("127.0.0.1", true)),
            ("bridged.example.com", at("172.17.0.9", false)),
            ("gone.example.com", Host::Nowhere("it can't be looked up".into())),
        ];
        let bridge = |name: &str, network: &str| Bridge {
            name: name.to_owned(),
            network: network.parse().unwrap(),
        };
        Hosts {
            names: hosts.into_iter().map(|(name, host)| (name.to_owned(), host)).collect(),
            bridges: vec![
                bridge("docker0", "172.17.0.0/16"),
                bridge("nomad", "fd17::/64"),
                bridge("virbr0", "192.168.122.0/24"),
                bridge("virbr0", "fd22::/64"),
            ],
        }
    }

    fn valid(instance: &Instance) -> Backend {
        match validate(instance, &pools(), &hosts(), None) {
            Validation::In(backend) => backend,
            Validation::Out(out) => panic!("{out:?}"),
        }
    }

    #[test]
    fn what_can_be_connected_is_healthy() {
        for (address, expected) in [
            ("10.0.0.7", "10.0.0.7:23456"),
            ("2001:db8::7", "[2001:db8::7]:23456"),
            ("[2001:db8::7]", "[2001:db8::7]:23456"),
            ("::ffff:10.0.0.7", "10.0.0.7:23456"),
            ("fd6e:0:0:1::7", "[fd6e:0:0:1::7]:23456"),
            ("172.18.0.5", "172.18.0.5:23456"),
            ("240.0.0.7", "240.0.0.7:23456"),
        ] {
            let backend = valid(&instance(address, 23456));
            assert_eq!(backend.address, Some(expected.parse().unwrap()), "{address}");
            assert_eq!(
                (backend.state, backend.reason, backend.host_only),
                (BackendState::Healthy, None, false)
            );
        }
    }

    #[test]
    fn what_cannot_be_connected_is_unroutable_and_says_why() {
        for (address, port, why) in [
            ("10.0.0.7", 0, "port 0"),
            ("10.0.0.7", -1, "port -1"),
            ("10.0.0.7", 65_536, "port 65536"),
            ("", 80, "no address"),
            ("new.example.com", 80, "`new.example.com` is being looked up"),
            ("gone.example.com", 80, "can't be looked up"),
            ("a_vip.example.com", 80, "127.200.0.1 is in the VIP pool"),
            ("localhost", 80, "127.0.0.1 is the loopback of node `n1`"),
            ("[10.0.0.7]", 80, "`[10.0.0.7]` is neither"),
            ("[2001:db8::7", 80, "is neither an IP address nor a host's name"),
            ("10.0.0", 80, "`10.0.0` is neither"),
            ("a..b", 80, "`a..b` is neither"),
            ("a b", 80, "`a b` is neither"),
            ("127.0.0.1", 80, "loopback of node `n1`"),
            ("::1", 80, "loopback of node `n1`"),
            ("::ffff:127.0.0.1", 80, "127.0.0.1 is the loopback of node `n1`"),
            ("fd6e::7", 80, "in the VIP pool fd6e::/64"),
            ("::ffff:127.200.0.1", 80, "127.200.0.1 is in the VIP pool 127.128.0.0/9"),
            ("::", 80, "no host's address"),
            ("ff02::1", 80, "no host's address"),
            ("fe80::7", 80, "fe80::7 is link-local"),
            ("fe80::7%eth0", 80, "fe80::7 is link-local"),
            ("[febf::7]", 80, "febf::7 is link-local"),
            ("127.200.0.1", 80, "in the VIP pool"),
            ("0.0.0.0", 80, "no host's address"),
            ("224.0.0.1", 80, "no host's address"),
            ("255.255.255.255", 80, "no host's address"),
            ("0.1.2.3", 80, "no host's address"),
            ("::ffff:0.0.0.0", 80, "no host's address"),
            ("::10.0.0.7", 80, "no host's address"),
            ("::127.0.0.1", 80, "no host's address"),
            ("169.254.7.7", 80, "169.254.7.7 is link-local"),
            ("::ffff:169.254.7.7", 80, "169.254.7.7 is link-local"),
            ("::1%lo", 80, "loopback of node `n1`"),
            ("127.0.0.2", 80, "loopback of node `n1`"),
            ("172.17.0.5", 80, "172.17.0.0/16 is this host's own bridge `docker0`"),
            ("::ffff:172.17.0.1", 80, "172.17.0.0/16 is this host's own bridge `docker0`"),
            ("[fd17::5]", 80, "fd17::/64 is this host's own bridge `nomad`"),
            ("bridged.example.com", 80, "this host's own bridge `docker0`"),
        ] {
            let backend = valid(&instance(address, port));
            assert_eq!(
                (backend.state, backend.address),
                (BackendState::Unroutable, None),
                "{address}"
            );
            let reason = backend.reason.unwrap();
            assert!(reason.contains(why), "{address}:{port}: {reason}");
        }
    }

    #[test]
    fn a_name_is_connected_at_what_it_stands_for() {
        for (name, address, note) in [
            ("db.example.com", "10.0.0.9:80", "`db.example.com` is 10.0.0.9"),
            ("DB.example.com", "10.0.0.9:80", "`db.example.com` is 10.0.0.9"),
            (
                "many.example.com.",
                "10.0.0.10:80",
                "`many.example.com.` is 10.0.0.10, one of several addresses",
            ),
        ] {
            let backend = valid(&instance(name, 80));
            assert_eq!(backend.address, Some(address.parse().unwrap()));
            assert_eq!(
                (backend.shown_address, backend.state),
                (format!("{name}:80"), BackendState::Healthy)
            );
            assert_eq!(backend.reason.as_deref(), Some(note));
        }
    }

    #[test]
    fn an_instance_in_warning_is_reached_and_says_why() {
        let health = HealthStatus::Warning("check `web` is warning".into());
        let backend = valid(&Instance { health: health.clone(), ..instance("10.0.0.7", 80) });
        assert_eq!((backend.state, backend.state.is_reached()), (BackendState::Warning, true));
        assert_eq!(backend.reason.as_deref(), Some("check `web` is warning"));
        let backend = valid(&Instance { health, ..instance("10.0.0.7", 0) });
        assert_eq!((backend.state, backend.state.is_reached()), (BackendState::Unroutable, false));
    }

    #[test]
    fn this_nodes_loopback_is_for_the_host_alone() {
        for address in ["127.0.0.1", "::1", "::ffff:127.0.0.1"] {
            let backend = valid(&Instance { local: true, ..instance(address, 8080) });
            assert_eq!(
                (backend.state, backend.host_only),
                (BackendState::Healthy, true),
                "{address}"
            );
        }
    }

    #[test]
    fn this_nodes_own_bridge_and_links_are_reached() {
        for (address, expected) in [
            ("172.17.0.5", "172.17.0.5:80"),
            ("fd17::5", "[fd17::5]:80"),
            ("169.254.7.7", "169.254.7.7:80"),
        ] {
            for (local, may_be_local) in [(true, false), (false, true)] {
                let backend = valid(&Instance { local, may_be_local, ..instance(address, 80) });
                let got = (backend.address, backend.state, backend.host_only);
                assert_eq!(got, (Some(expected.parse().unwrap()), BackendState::Healthy, false));
            }
        }
        let backend = valid(&Instance { may_be_local: true, ..instance("127.0.0.1", 80) });
        assert_eq!(backend.address, None, "its loopback may be another's");
    }

    #[test]
    fn nodes_on_a_bridge_of_this_host_are_reached_there() {
        // (the node's own address, the instance's, whether it can be reached)
        for (node, address, expected) in [
            // An agent in a container, whose services are in other containers of the host.
            (Some("172.17.0.2"), "172.17.0.3", true),
            (Some("172.17.0.2"), "172.17.0.2", true),
            // A guest that is another node, by either family.
            (Some("192.168.122.50"), "192.168.122.50", true),
            (Some("192.168.122.50"), "::ffff:192.168.122.51", true),
            (Some("192.168.122.50"), "fd22::50", true),
            (Some("fd22::50"), "192.168.122.50", true),
            (Some("fd22::50"), "fd22::50", true),
            // Another host's bridge of the same network.
            (Some("10.0.0.7"), "172.17.0.3", false),
            (Some("fd00::7"), "172.17.0.3", false),
            (None, "172.17.0.3", false),
            // A guest's own bridge of a network that this host has, too.
            (Some("192.168.122.50"), "172.17.0.3", false),
            (Some("172.17.0.2"), "fd17::5", false),
            // What isn't on a bridge is reached whatever its node's address.
            (Some("172.17.0.2"), "10.0.0.7", true),
        ] {
            let node_address = node.map(|node| node.parse().unwrap());
            let backend = valid(&Instance { node_address, ..instance(address, 80) });
            let reason = backend.reason.unwrap_or_default();
            assert_eq!(backend.address.is_some(), expected, "{node:?} {address}: {reason}");
            assert!(!backend.host_only);
        }
    }

    #[test]
    fn what_a_record_alone_says_of_reaching_it() {
        for (address, port, local, expected) in [
            ("10.0.0.7", 80, false, true),
            ("db.example.com", 80, false, true),
            ("10.0.0.7", 0, false, false),
            ("10.0.0.7", 65_536, false, false),
            ("", 80, false, false),
            ("127.0.0.1", 80, false, false),
            ("127.0.0.1", 80, true, true),
            ("0.0.0.0", 80, true, false),
            ("10.0.0", 80, false, false),
        ] {
            let instance = Instance { local, ..instance(address, port) };
            assert_eq!(may_be_reached(&instance), expected, "{address}:{port}");
        }
    }

    #[test]
    fn odd_weights_are_brought_into_range_and_noted() {
        for (given, weight) in [(-5, 1), (1, 1), (65_535, 65_535), (1 << 40, 65_535)] {
            let backend = valid(&Instance { weight: given, ..instance("10.0.0.7", 80) });
            assert_eq!((backend.state, backend.weight), (BackendState::Healthy, weight));
            assert_eq!(backend.reason.is_some(), i64::from(weight) != given, "{given}");
        }
    }

    #[test]
    fn an_instance_that_is_spare_has_its_group() {
        let health = HealthStatus::Spare("check `web` is warning".into());
        let backend = valid(&Instance { health, ..instance("10.0.0.7", 80) });
        assert_eq!((backend.state, backend.group), (BackendState::Spare, 1));
        assert_eq!(backend.reason.as_deref(), Some("check `web` is warning"));
    }

    #[test]
    fn a_weight_in_meta_overrides_the_sources_own() {
        let warns = || HealthStatus::Warning("w".into());
        // The Meta's, the last one, the health, and the result from a source's own weight of 7.
        let rows = [
            ("3", None, HealthStatus::Serving, 3, None),
            ("0", Some(5), HealthStatus::Serving, 0, Some("weight 0: it gets no new connections")),
            (
                "many",
                Some(5),
                HealthStatus::Serving,
                5,
                Some("weight `many` isn't a number from 0 to 65535: it has 5 as before"),
            ),
            (
                "65536",
                None,
                HealthStatus::Serving,
                7,
                Some("weight `65536` isn't a number from 0 to 65535: it has 7 as before"),
            ),
            ("3", None, warns(), 7, Some("w")),
        ];
        for (text, kept, health, weight, reason) in rows {
            let meta = ServiceMeta { weight: Some(text.into()), ..ServiceMeta::default() };
            let instance = Instance { weight: 7, health, meta, ..instance("10.0.0.7", 80) };
            let Validation::In(backend) = validate(&instance, &pools(), &hosts(), kept) else {
                panic!("{instance:?}");
            };
            assert_eq!((backend.weight, backend.reason.as_deref()), (weight, reason), "{text}");
        }
    }

    #[test]
    fn weight_0_takes_no_new_connections() {
        let backend = valid(&Instance { weight: 0, ..instance("10.0.0.7", 80) });
        assert_eq!((backend.state, backend.weight), (BackendState::Draining, 0));
        assert_eq!(backend.reason.as_deref(), Some("weight 0: it gets no new connections"));
        assert!(backend.state.has_entry() && !backend.state.is_reached());
    }

    #[test]
    fn a_sources_verdict_stands() {
        let health = HealthStatus::Out("check `web` is critical".into());
        let out = validate(&Instance { health, ..instance("", 0) }, &pools(), &hosts(), None);
        assert!(matches!(out, Validation::Out(out) if out.reason == "check `web` is critical"));
    }
}
