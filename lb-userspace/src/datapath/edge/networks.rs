//! The networks that public VIPs are in, which the programs compare each packet with.

use std::net::IpAddr;

use lb_common::{EdgeControl, MAX_EDGE_NETWORKS};

/// Sets the networks that these addresses are in: as few and as small as the programs have room for.
pub fn set(control: &mut EdgeControl, addresses: impl Iterator<Item = IpAddr>) {
    let (mut ipv4, mut ipv6) = (Vec::new(), Vec::new());
    for address in addresses {
        match address {
            IpAddr::V4(ip) => ipv4.push(u64::from(u32::from(ip)) << 32),
            IpAddr::V6(ip) => ipv6.push((u128::from(ip) >> 64) as u64),
        }
    }
    control.networks = [[0, u32::MAX]; MAX_EDGE_NETWORKS];
    control.networks6 = [[0, u64::MAX]; MAX_EDGE_NETWORKS];
    for (place, (network, mask)) in control.networks.iter_mut().zip(around(ipv4, 32)) {
        *place = [((network >> 32) as u32).to_be(), ((mask >> 32) as u32).to_be()];
    }
    for (place, (network, mask)) in control.networks6.iter_mut().zip(around(ipv6, 64)) {
        *place = [network.to_be(), mask.to_be()];
    }
}

/// At most [`MAX_EDGE_NETWORKS`] networks, each with its mask, around addresses of so many bits, which are the upper
/// ones. Of neighbours those are joined that have most in common.
fn around(mut addresses: Vec<u64>, n_bits: u32) -> Vec<(u64, u64)> {
    addresses.sort_unstable();
    addresses.dedup();
    let whole = u64::MAX << (64 - n_bits);
    let mut networks: Vec<_> = addresses.into_iter().map(|address| (address, whole)).collect();
    while networks.len() > MAX_EDGE_NETWORKS {
        let common = |nth: usize| joined(networks[nth], networks[nth + 1]);
        let best = (0..networks.len() - 1).max_by_key(|nth| common(*nth).1).unwrap_or(0);
        let both = common(best);
        networks.splice(best..=best + 1, [both]);
    }
    networks
}

/// The smallest network around two.
fn joined((one, mask): (u64, u64), (other, other_mask): (u64, u64)) -> (u64, u64) {
    let n_common = (one ^ other).leading_zeros();
    let common = u64::MAX.checked_shl(64 - n_common).unwrap_or(0);
    let mask = mask & other_mask & if n_common == 0 { 0 } else { common };
    (one & mask, mask)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn networks_around_addresses() {
        let shown = |addresses: &[&str]| {
            let addresses = addresses.iter().map(|ip| ip.parse().unwrap());
            let mut control = EdgeControl::default();
            set(&mut control, addresses);
            let network = |[network, mask]: [u32; 2]| {
                let ip = Ipv4Addr::from(u32::from_be(network));
                format!("{ip}/{}", u32::from_be(mask).count_ones())
            };
            control.networks.map(network).join(" ")
        };
        let none = "0.0.0.0/32";
        assert_eq!(shown(&[]), [none; 4].join(" "));
        assert_eq!(shown(&["203.0.113.10"]), format!("203.0.113.10/32 {none} {none} {none}"));
        assert_eq!(
            shown(&["10.0.0.1", "10.0.0.2", "10.0.0.3", "192.0.2.1", "203.0.113.9", "203.0.113.9"]),
            "10.0.0.1/32 10.0.0.2/31 192.0.2.1/32 203.0.113.9/32"
        );
        assert_eq!(
            shown(&["1.0.0.0", "2.0.0.0", "4.0.0.0", "8.0.0.0", "16.0.0.0", "128.0.0.0"]),
            "0.0.0.0/5 8.0.0.0/32 16.0.0.0/32 128.0.0.0/32"
        );
        let ips = ["2001:db8::1", "2001:db8::2", "fd00::1"].map(|ip| ip.parse().unwrap());
        let mut control = EdgeControl::default();
        set(&mut control, ips.into_iter());
        let [first, second, third, _] = control.networks6.map(|pair| pair.map(u64::from_be));
        assert_eq!(first, [0x2001_0db8_0000_0000, u64::MAX]);
        assert_eq!((second, third), ([0xfd00 << 48, u64::MAX], [0, u64::MAX]));
    }
}
