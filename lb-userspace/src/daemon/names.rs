//! The settings of the unit `names`, from the configuration and this host's interfaces.

use std::net::SocketAddr;

use crate::config::DnsConfig;
use crate::datapath::{IngressInterface, NamesSettings};
use crate::dns;

/// How the kernel answers names for a server that listens on these.
pub fn settings(config: &DnsConfig, listen: &[SocketAddr]) -> NamesSettings {
    let loopback = IngressInterface { name: "lo".to_owned(), index: 1 };
    let mut allowed = dns::allowed_networks(&config.allow);
    // Each interface has a link-local network of its own.
    allowed.iter_mut().for_each(|network| *network = network.trunc());
    allowed.sort_unstable();
    allowed.dedup();
    NamesSettings {
        mode: config.kernel.then_some(config.kernel_mode),
        domain: config.domain.clone(),
        ttl: config.ttl,
        listen: dns::reached_at(listen),
        allowed,
        client_rate: config.client_rate,
        interfaces: vec![loopback],
    }
}
