//! The addresses from which packets go to backends.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use lb_common::{Address, EdgeSettings, MAX_EDGE_SOURCES};
use nix::ifaddrs::{InterfaceAddress, getifaddrs};

use crate::interfaces::ip;

/// Sets the addresses that new flows get. Former ones follow, as far as there is room and they are this host's
/// still: flows have them.
pub fn set(settings: &mut EdgeSettings, sources: &[IpAddr], is_own: impl Fn(&IpAddr) -> bool) {
    let former = of(settings);
    (settings.sources, settings.sources6) = Default::default();
    (settings.n_sources, settings.n_sources6) = (0, 0);
    let (mut n_v4, mut n_v6) = (0, 0);
    let is_kept = |source: &&IpAddr| !sources.contains(source) && is_own(source);
    let all = sources.iter().map(|source| (source, true));
    for (source, is_new) in all.chain(former.iter().filter(is_kept).map(|source| (source, false))) {
        match source {
            IpAddr::V4(ip) if n_v4 < MAX_EDGE_SOURCES => {
                settings.sources[n_v4] = u32::from_ne_bytes(ip.octets());
                n_v4 += 1;
                settings.n_sources += u32::from(is_new);
            }
            IpAddr::V6(ip) if n_v6 < MAX_EDGE_SOURCES => {
                settings.sources6[n_v6] = Address { octets: ip.octets() };
                n_v6 += 1;
                settings.n_sources6 += u32::from(is_new);
            }
            _ => {}
        }
    }
}

/// All that are set.
fn of(settings: &EdgeSettings) -> Vec<IpAddr> {
    let v4 = settings.sources.iter().filter(|source| **source != 0);
    let v6 = settings.sources6.iter().filter(|source| **source != Address::default());
    let v4 = v4.map(|source| IpAddr::from(source.to_ne_bytes()));
    v4.chain(v6.map(|source| IpAddr::from(source.octets))).collect()
}

/// The addresses of interfaces, each with the length of its network's prefix. Those of a link alone are left out.
///
/// # Errors
/// When the kernel refuses.
pub fn of_interfaces() -> io::Result<Vec<(String, IpAddr, u8)>> {
    let ones = |mask: IpAddr| match mask {
        IpAddr::V4(mask) => mask.to_bits().leading_ones() as u8,
        IpAddr::V6(mask) => mask.to_bits().leading_ones() as u8,
    };
    let network = |one: InterfaceAddress| {
        let address = ip(one.address.as_ref()?)?;
        let is_of_link = matches!(address, IpAddr::V6(ip) if ip.is_unicast_link_local());
        Some((one.interface_name, address, ones(ip(one.netmask.as_ref()?)?)))
            .filter(|_| !is_of_link)
    };
    Ok(getifaddrs()?.filter_map(network).collect())
}

/// The addresses that this host's interfaces have, in this network namespace.
///
/// # Errors
/// When the kernel refuses.
pub fn all_own() -> io::Result<BTreeSet<IpAddr>> {
    Ok(getifaddrs()?.filter_map(|one| ip(&one.address?)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn former_addresses_stay_for_the_flows_that_have_them() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let is_own = |address: &IpAddr| *address != ip("10.0.0.9");
        let mut settings = EdgeSettings::default();
        let rows: [(&[&str], &[&str], [u32; 2]); 5] = [
            (&["10.0.0.1", "fd00::1"], &["10.0.0.1", "fd00::1"], [1, 1]),
            (&["10.0.0.2"], &["10.0.0.2", "10.0.0.1", "fd00::1"], [1, 0]),
            (&["10.0.0.9"], &["10.0.0.9", "10.0.0.2", "10.0.0.1", "fd00::1"], [1, 0]),
            (&["10.0.0.1"], &["10.0.0.1", "10.0.0.2", "fd00::1"], [1, 0]),
            (
                &["10.0.0.3", "10.0.0.4", "10.0.0.5"],
                &["10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.1", "fd00::1"],
                [3, 0],
            ),
        ];
        for (sources, expected, n) in rows {
            let sources: Vec<_> = sources.iter().map(|text| ip(text)).collect();
            set(&mut settings, &sources, is_own);
            let expected: Vec<_> = expected.iter().map(|text| ip(text)).collect();
            assert_eq!(of(&settings), expected);
            assert_eq!([settings.n_sources, settings.n_sources6], n);
        }
    }
}
