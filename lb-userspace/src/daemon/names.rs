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
            let same_family = addresses.filter(|ip| ip.is_ipv4() || listener.is_ipv6());
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
    }
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
    use crate::dns::Interfaces;

    #[test]
    fn where_queries_come_from() {
        let ip = |text: &str| -> IpAddr { text.parse().unwrap() };
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
