//! The networks that public VIPs are in, which the programs compare each packet with.

use ipnet::IpNet;
use lb_common::{EdgeSettings, MAX_EDGE_NETWORKS};

/// Sets the networks that public VIPs may come from. The programs have room for as many as there may be.
pub fn set(settings: &mut EdgeSettings, public: &[IpNet]) {
    settings.networks = [[0, u32::MAX]; MAX_EDGE_NETWORKS];
    settings.networks6 = [[0, u64::MAX]; MAX_EDGE_NETWORKS];
    let (mut places, mut places6) = (settings.networks.iter_mut(), settings.networks6.iter_mut());
    for network in public {
        match network {
            IpNet::V4(network) => {
                if let Some(place) = places.next() {
                    let words = [network.network(), network.netmask()];
                    *place = words.map(|word| u32::from_ne_bytes(word.octets()));
                }
            }
            IpNet::V6(network) => {
                if let Some(place) = places6.next() {
                    // The upper half: what is in a smaller network is found by its frontend.
                    let words = [network.network(), network.netmask()];
                    *place = words.map(|word| ((u128::from(word) >> 64) as u64).to_be());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_of_public_vips() {
        let public = ["203.0.113.0/24", "192.0.2.7/32", "2001:db8::/32", "fd00::10/124"];
        let mut settings = EdgeSettings::default();
        set(&mut settings, &public.map(|network| network.parse().unwrap()));
        let networks = settings.networks.map(|pair| pair.map(u32::from_be));
        let none = [0, u32::MAX];
        let expected = [[0xcb00_7100, 0xffff_ff00], [0xc000_0207, u32::MAX], none, none];
        assert_eq!(networks, expected);
        let networks6 = settings.networks6.map(|pair| pair.map(u64::from_be));
        let none = [0, u64::MAX];
        let expected =
            [[0x2001_0db8 << 32, 0xffff_ffff << 32], [0xfd00 << 48, u64::MAX], none, none];
        assert_eq!(networks6, expected);
    }
}
