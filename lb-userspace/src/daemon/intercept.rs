//! The settings of the unit `intercept`, from the configuration and what the DNS server has.

use std::net::SocketAddr;

use crate::config::DnsConfig;
use crate::datapath::InterceptSettings;
use crate::dns;

/// Whose queries are sent to a server that listens on these; `None` for those of no process.
/// `has_upstream`: it can answer for names outside the zone.
pub fn settings(
    config: &DnsConfig,
    listen: &[SocketAddr],
    has_upstream: bool,
) -> Option<InterceptSettings> {
    config.intercept.is_on().then(|| InterceptSettings {
        whose: config.intercept.clone(),
        listen: dns::reached_at(listen),
        obstacle: (!has_upstream).then(|| {
            "nohop knows no other resolver, and could answer nothing but its own zone: set dns.forward"
                .to_owned()
        }),
    })
}
