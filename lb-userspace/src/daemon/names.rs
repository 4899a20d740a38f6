//! What the kernel is told about names: by the configuration, and by this host's interfaces as they are
//! now.

use std::net::SocketAddr;

use crate::config::DnsConfig;
use crate::datapath::{IngressInterface, NamesSettings};
use crate::dns;

/// How the kernel answers names for a server that listens on these.
pub fn settings(config: &DnsConfig, listen: &[SocketAddr]) -> NamesSettings {
    let loopback = IngressInterface { name: "lo".to_owned(), index: 1 };
    NamesSettings {
        mode: config.kernel.then_some(config.kernel_mode),
        domain: config.domain.clone(),
        ttl: config.ttl,
        listen: dns::reached_at(listen),
        allowed: dns::allowed_networks(&config.allow),
        client_rate: config.client_rate,
        interfaces: vec![loopback],
    }
}
