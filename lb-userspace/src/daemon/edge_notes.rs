//! What `nohop explain` reports of a public service with regard to edges.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use crate::datapath::EdgeStatus;
use crate::table::Service;

/// How many backends a sentence names.
const N_NAMED: usize = 3;

/// On an edge: whether servers are sent the addresses of clients, and what limits that.
pub fn clients_from_edge(service: &Service, edge: &EdgeStatus) -> Option<String> {
    if !edge.client_address.iter().any(|name| **name == *service.name) {
        return None;
    }
    let sources = edge.sources.iter().filter(|source| source.is_ipv4());
    let sources: Vec<String> = sources.map(|source| format!("\"{source}\"")).collect();
    let is_v4 = |address: &SocketAddr| address.is_ipv4();
    Some(if !service.protocols.tcp() {
        "edge.client_address has it, which changes nothing: only SYNs of TCP have room for a client's \
         address"
            .to_owned()
    } else if sources.is_empty() || !service.public.iter().any(is_v4) {
        "edge.client_address has it, which changes nothing: clients' addresses are IPv4's, and it has no \
         IPv4 VIP, or edge.source no IPv4 address"
            .to_owned()
    } else {
        format!(
            "its servers see clients' addresses over TCP and IPv4 where their node has \
             datapath.client_address_from = [{}], and began to listen since; others see this edge's",
            sources.join(", ")
        )
    })
}

/// On any node: whose clients' addresses its servers see.
pub fn clients_on_node(service: &Service, trusted: &[Ipv4Addr]) -> Option<String> {
    if trusted.is_empty() || !service.protocols.tcp() {
        return None;
    }
    let edges: Vec<String> = trusted.iter().map(Ipv4Addr::to_string).collect();
    Some(format!(
        "servers on this node see the address of the client that an edge at {} sends with a SYN \
         (datapath.client_address_from), where it sends one",
        edges.join(" or ")
    ))
}

/// On an edge: the backends that packets of flows have no route to.
pub fn without_route(
    service: &Service,
    has_no_route: impl Fn(SocketAddr) -> Option<io::Error>,
) -> Option<String> {
    let all = service.backends.iter().filter(|backend| backend.state.is_reached());
    let all = all.filter_map(|backend| backend.address);
    // One family's backends are none of an edge's without a VIP of that family.
    let is_used = |address: &SocketAddr| {
        service.public.iter().any(|public| public.is_ipv4() == address.is_ipv4())
    };
    let found: Vec<(SocketAddr, io::Error)> =
        all.filter(is_used).filter_map(|address| Some((address, has_no_route(address)?))).collect();
    let (_, error) = found.first()?;
    let named: Vec<String> =
        found.iter().take(N_NAMED).map(|(address, _)| address.to_string()).collect();
    let more = match found.len().saturating_sub(N_NAMED) {
        0 => String::new(),
        n => format!(" and {n} more"),
    };
    Some(format!(
        "this edge has no route to {}{more} ({error}): packets of clients that get it are dropped \
         (no_route); see `ip route get {}`",
        named.join(", "),
        found.first().map(|(address, _)| address.ip())?
    ))
}

/// Why this host's routing table has no way to an address; `None` where it has. Nothing is sent.
pub fn has_no_route(address: SocketAddr) -> Option<io::Error> {
    let any: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let error = UdpSocket::bind((any, 0)).and_then(|socket| socket.connect(address)).err()?;
    // Others, such as of the host's limits, are none of a route's.
    matches!(
        error.kind(),
        io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::PermissionDenied
            | io::ErrorKind::InvalidInput
    )
    .then_some(error)
}

#[cfg(test)]
mod tests {
    use super::super::explain::tests::service;
    use super::*;
    use crate::table::Protocols;

    fn edge(client_address: &[&str], sources: &[&str]) -> EdgeStatus {
        EdgeStatus {
            interfaces: Vec::new(),
            sources: sources.iter().map(|source| source.parse().unwrap()).collect(),
            client_address: client_address.iter().map(|name| (*name).to_owned()).collect(),
            n_flows: 0,
            max_flows: 1,
            problems: Vec::new(),
            forwards: [true; 2],
            proofs: Default::default(),
        }
    }

    fn public(vips: &[&str], backends: &[&str]) -> Service {
        let public = vips.iter().map(|vip| vip.parse().unwrap()).collect();
        Service { public, ..service(backends) }
    }

    #[test]
    fn who_sees_clients() {
        let both = ["203.0.113.10:80", "[2001:db8::1]:80"];
        for (vips, protocols, shown, sources, expected) in [
            (
                &both[..],
                Protocols::Both,
                "web",
                ["10.0.0.2", "fd00::2"],
                Some(r#"= ["10.0.0.2"],"#),
            ),
            (
                &both,
                Protocols::Tcp,
                "web",
                ["fd00::3", "fd00::2"],
                Some("changes nothing: clients'"),
            ),
            (&both[1..], Protocols::Tcp, "web", ["10.0.0.2", "fd00::2"], Some("no IPv4 VIP")),
            (&both[..], Protocols::Udp, "web", ["10.0.0.2", "fd00::2"], Some("only SYNs of TCP")),
            (&both[..], Protocols::Tcp, "api", ["10.0.0.2", "fd00::2"], None),
        ] {
            let service = Service { protocols, ..public(vips, &[]) };
            let note = clients_from_edge(&service, &edge(&[shown], &sources));
            let is_right = match (&note, expected) {
                (Some(note), Some(expected)) => note.contains(expected),
                (note, expected) => note.is_none() && expected.is_none(),
            };
            assert!(is_right, "{note:?}, {expected:?}");
        }
        let service = public(&both, &[]);
        assert_eq!(clients_on_node(&service, &[]), None);
        let note = clients_on_node(&service, &[[10, 0, 0, 2].into(), [10, 0, 0, 3].into()]);
        assert!(note.unwrap().contains("an edge at 10.0.0.2 or 10.0.0.3 sends"));
        assert_eq!(
            clients_on_node(&Service { protocols: Protocols::Udp, ..service }, &[SOURCE]),
            None
        );
    }

    const SOURCE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

    #[test]
    fn backends_without_a_route_are_named() {
        let backends = ["10.0.0.7:1", "10.0.0.8:1", "10.0.0.9:1", "10.0.0.10:1", "[fd00::7]:1"];
        let service = public(&["203.0.113.10:80"], &backends);
        let none = |_| Some(io::Error::from_raw_os_error(libc::ENETUNREACH));
        let note = without_route(&service, none).unwrap();
        let named = "no route to 10.0.0.7:1, 10.0.0.8:1, 10.0.0.9:1 and 1 more (Network is unreach";
        assert!(note.contains(named) && note.ends_with("`ip route get 10.0.0.7`"), "{note}");
        assert_eq!(without_route(&service, |_| None), None);
    }

    #[test]
    fn routes_are_found_without_a_packet() {
        assert!(has_no_route(([127, 0, 0, 1], 9).into()).is_none());
        // Which only sockets that ask for it may send to.
        assert!(has_no_route(([255, 255, 255, 255], 9).into()).is_some());
    }
}
