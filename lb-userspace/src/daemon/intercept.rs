//! The settings of the unit `intercept`, from the configuration and what the DNS server has.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use crate::config::DnsConfig;
use crate::datapath::InterceptSettings;
use crate::dns;

/// The settings for a server that listens on these; `None` where no process's queries are intercepted. It
/// forwards to these upstreams. `has_default`: it can answer for names outside the zone.
pub fn settings(
    config: &DnsConfig,
    listen: &[SocketAddr],
    upstreams: BTreeSet<SocketAddr>,
    has_default: bool,
) -> Option<InterceptSettings> {
    config.intercept.is_on().then(|| InterceptSettings {
        cgroups: config.intercept.clone(),
        listen: dns::reached_at(listen),
        upstreams,
        is_verified: true,
        obstacle: (!has_default).then(|| {
            "nohop knows no other resolver, and could answer nothing but its own zone: set dns.forward"
                .to_owned()
        }),
    })
}
