//! The settings of the unit `names`, from the configuration and this host's interfaces.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use super::network::{HostLink, HostNetwork, LinkKind};
use super::timers::ticks;
use crate::config::DnsConfig;
use crate::datapath::{IngressInterface, NamesSettings, SharedDatapath};
use crate::dns;

/// How often it is verified that the kernel's answers arrive.
const PROBE_PERIOD: Duration = Duration::from_secs(1);

/// Verifies that the kernel's answers arrive, again and again.
pub async fn probe(datapath: Arc<SharedDatapath>) {
    let mut ticks = ticks(PROBE_PERIOD, Duration::ZERO);
    loop {
        ticks.tick().await;
        let datapath = datapath.clone();
        if let Err(error) = tokio::task::spawn_blocking(move || datapath.probe_names()).await {
            tracing::debug!("the probe of the unit names has ended: {error}");
        }
    }
}

/// How the kernel answers names for a server that listens on these.
pub fn settings(config: &DnsConfig, listen: &[SocketAddr], network: &HostNetwork) -> NamesSettings {
    let mut allowed = dns::allowed_networks(&config.allow, &network.interfaces);
    // Each interface has a link-local network of its own.
    allowed.iter_mut().for_each(|network| *network = network.trunc());
    allowed.sort_unstable();
    allowed.dedup();
    let (unspecified, bound): (Vec<SocketAddr>, Vec<SocketAddr>) =
        listen.iter().partition(|address| address.ip().is_unspecified());
    let shared: BTreeSet<SocketAddr> = unspecified
        .iter()
        .flat_map(|listener| {
            let addresses = network.interfaces.addresses.iter();
            // Each interface has a link-local network of its own, so the address alone is no one's.
            let same_family = addresses.filter(|ip| match ip {
                IpAddr::V4(_) => true,
                IpAddr::V6(ip) => listener.is_ipv6() && !ip.is_unicast_link_local(),
            });
            same_family.map(|ip| SocketAddr::new(*ip, listener.port()))
        })
        .filter(|address| !bound.contains(address))
        .collect();
    let reached: BTreeSet<IpAddr> =
        bound.iter().chain(&shared).map(|address| address.ip()).collect();
    NamesSettings {
        mode: config.kernel.then_some(config.kernel_mode),
        domain: config.domain.clone(),
        ttl: config.ttl,
        listen: bound,
        listen_shared: shared.into_iter().collect(),
        allowed,
        client_rate: config.client_rate,
        interfaces: interfaces(&reached, &network.links),
        missing_forwarding: missing_forwarding(&reached, &network.links, |path| {
            std::fs::read_to_string(path).ok()
        }),
        is_logged: config.log,
    }
}

/// The files of `forwarding` that are off for a bridge with an address of a family in which containers may
/// ask: bpf_fib_lookup() leads nowhere without it. `read` returns a file's content.
fn missing_forwarding(
    reached: &BTreeSet<IpAddr>,
    links: &[HostLink],
    read: impl Fn(&str) -> Option<String>,
) -> Vec<String> {
    let mut missing = Vec::new();
    for (family, is_ipv4) in [("ipv4", true), ("ipv6", false)] {
        let is_asked = |ip: &IpAddr| ip.is_ipv4() == is_ipv4 && !ip.is_loopback();
        // Every interface has a link-local address of IPv6.
        let has_address = |link: &&HostLink| {
            let is_own = |ip: &IpAddr| match ip {
                IpAddr::V4(_) => is_ipv4,
                IpAddr::V6(ip) => !is_ipv4 && !ip.is_unicast_link_local(),
            };
            link.kind == LinkKind::Bridge && link.addresses.iter().any(is_own)
        };
        if reached.iter().any(is_asked) {
            let bridges = links.iter().filter(has_address);
            let file = |link: &HostLink| {
                format!("/proc/sys/net/{family}/conf/{}/forwarding", link.interface.name)
            };
            let is_off = |file: &String| read(file).is_some_and(|content| content.trim() == "0");
            missing.extend(bridges.map(file).filter(is_off));
        }
    }
    missing
}

/// The interfaces by which queries to these addresses come from this host and from its containers:
/// loopback; bridges, whose ports' packets to the host arrive at the bridge; veth that is no bridge's
/// port; macvlan that has one of the addresses. Network cards are left to the daemon.
fn interfaces(reached: &BTreeSet<IpAddr>, links: &[HostLink]) -> Vec<IngressInterface> {
    let mut all = vec![IngressInterface { name: "lo".to_owned(), index: 1 }];
    if reached.iter().any(|address| !address.is_loopback()) {
        let leads_here = |link: &&HostLink| match link.kind {
            LinkKind::Bridge | LinkKind::Veth => true,
            LinkKind::Macvlan => !link.addresses.is_disjoint(reached),
            LinkKind::Other => false,
        };
        all.extend(links.iter().filter(leads_here).map(|link| link.interface.clone()));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::interfaces::Interfaces;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn bridges_without_forwarding() {
        let link = |name: &str, kind, addresses: &[&str]| HostLink {
            interface: IngressInterface { name: name.to_owned(), index: 1 },
            kind,
            addresses: addresses.iter().map(|text| ip(text)).collect(),
        };
        let links = [
            link("eth0", LinkKind::Other, &["10.0.0.1", "fd00::1"]),
            link("docker0", LinkKind::Bridge, &["172.17.0.1", "fe80::1"]),
            link("br.1", LinkKind::Bridge, &["10.1.0.1", "fd01::1"]),
        ];
        // Where it listens; the files that have 0, all of them or one; what is found.
        let table = [
            ("127.0.0.1 ::1", "", ""),
            ("10.0.0.1", "", "ipv4/docker0 ipv4/br.1"),
            ("10.0.0.1", "docker0", "ipv4/docker0"),
            ("172.17.0.1 ::1", "eth0", ""),
            ("fd01::1", "", "ipv6/br.1"),
            ("10.0.0.1 fd01::1", "br.1", "ipv4/br.1 ipv6/br.1"),
        ];
        for (reached, off, expected) in table {
            let reached = reached.split(' ').map(ip).collect();
            let read = |path: &str| Some(if path.contains(off) { "0\n" } else { "1\n" }.to_owned());
            let expected: Vec<String> = expected
                .split_whitespace()
                .filter_map(|one| one.split_once('/'))
                .map(|(family, name)| format!("/proc/sys/net/{family}/conf/{name}/forwarding"))
                .collect();
            assert_eq!(missing_forwarding(&reached, &links, read), expected);
        }
        assert!(missing_forwarding(&[ip("10.0.0.1")].into(), &links, |_| None).is_empty());
    }

    #[test]
    fn where_queries_come_from() {
        let link = |name: &str, index, kind, address: &str| HostLink {
            interface: IngressInterface { name: name.to_owned(), index },
            kind,
            addresses: [ip(address)].into(),
        };
        let network = HostNetwork {
            interfaces: Interfaces {
                addresses: ["127.0.0.1", "10.0.0.1", "172.17.0.1", "::1"].map(ip).into(),
                ..Interfaces::default()
            },
            links: vec![
                link("eth0", 2, LinkKind::Other, "10.0.0.1"),
                link("docker0", 3, LinkKind::Bridge, "172.17.0.1"),
                link("shim", 4, LinkKind::Macvlan, "10.0.0.9"),
            ],
        };
        // Where it listens: the addresses that are its own, those that it shares, the interfaces.
        let table = [
            ("127.0.0.1:53", "127.0.0.1:53", "", "lo"),
            ("10.0.0.1:53", "10.0.0.1:53", "", "lo docker0"),
            ("10.0.0.9:53", "10.0.0.9:53", "", "lo docker0 shim"),
            ("0.0.0.0:53", "", "10.0.0.1:53 127.0.0.1:53 172.17.0.1:53", "lo docker0"),
            (
                "[::]:53 10.0.0.1:53",
                "10.0.0.1:53",
                "127.0.0.1:53 172.17.0.1:53 [::1]:53",
                "lo docker0",
            ),
        ];
        let shown = |addresses: &[SocketAddr]| {
            addresses.iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(" ")
        };
        for (listen, own, shared, interfaces) in table {
            let listen: Vec<SocketAddr> =
                listen.split(' ').map(|address| address.parse().unwrap()).collect();
            let settings = settings(&Config::default().dns, &listen, &network);
            assert_eq!(shown(&settings.listen), own);
            assert_eq!(shown(&settings.listen_shared), shared);
            let names: Vec<_> = settings.interfaces.iter().map(|one| one.name.as_str()).collect();
            assert_eq!(names.join(" "), interfaces);
        }
    }
}
