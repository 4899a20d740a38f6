//! Which of the addresses of an instance and its node it is connected to at.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::config::AddressChoice;
use crate::table::parse_ip;

/// The addresses that a service, or a node, offers.
#[derive(Clone, Debug, Default)]
pub struct Candidates<'a> {
    /// `Address`; it may be empty, or a name.
    pub own: &'a str,
    /// `TaggedAddresses`, by tag, each with its port where it has one.
    pub tagged: BTreeMap<&'a str, (&'a str, Option<i64>)>,
}

/// A family that an address has to be of.
#[derive(Clone, Copy, PartialEq)]
enum Family {
    V4,
    V6,
}

/// The address, and the port that comes with it where it isn't the service's.
///
/// For `lan` it is the service's own address, else its node's; for `wan` the one that the service
/// is tagged with, its own, the one that its node is tagged with, the node's own: the order of
/// Consul's `CheckServiceNode.BestAddress`. For one family it goes in the order of `wan`, by the
/// tag of that family, and skips what is of the other one; a name may be of either.
///
/// # Errors
/// That there is none of the family.
pub fn choose(
    choice: AddressChoice,
    service: &Candidates,
    node: &Candidates,
) -> Result<(String, Option<i64>), String> {
    let (tag, family) = match choice {
        AddressChoice::Lan => (None, None),
        AddressChoice::Wan => (Some("wan"), None),
        AddressChoice::LanIpv4 => (Some("lan_ipv4"), Some(Family::V4)),
        AddressChoice::LanIpv6 => (Some("lan_ipv6"), Some(Family::V6)),
        AddressChoice::WanIpv4 => (Some("wan_ipv4"), Some(Family::V4)),
        AddressChoice::WanIpv6 => (Some("wan_ipv6"), Some(Family::V6)),
    };
    let candidates = [service, node].into_iter().flat_map(|candidates| {
        let tagged = tag.and_then(|tag| candidates.tagged.get(tag).copied());
        tagged.into_iter().chain([(candidates.own, None)])
    });
    let is_fit = |address: &str| {
        let of = parse_ip(address).map(|address| match address {
            IpAddr::V4(_) => Family::V4,
            IpAddr::V6(_) => Family::V6,
        });
        !address.is_empty() && (family.is_none() || of.is_none() || of == family)
    };
    match (candidates.into_iter().find(|(address, _)| is_fit(address)), family, tag) {
        (Some((address, port)), _, _) => Ok((address.to_owned(), port)),
        (None, Some(_), Some(tag)) => Err(format!("has no `{tag}` address")),
        // The table reports an instance without an address.
        (None, _, _) => Ok((String::new(), None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates<'a>(own: &'a str, tagged: &[(&'a str, &'a str, Option<i64>)]) -> Candidates<'a> {
        let tagged = tagged.iter().map(|(tag, address, port)| (*tag, (*address, *port)));
        Candidates { own, tagged: tagged.collect() }
    }

    #[test]
    fn the_node_address_is_the_fallback() {
        use AddressChoice::*;
        let (none, node) = (candidates("", &[]), candidates("10.0.0.1", &[]));
        let own = candidates("10.0.0.7", &[]);
        let named = candidates("db.example.com", &[]);
        let wide =
            candidates("10.0.0.7", &[("wan", "192.0.2.7", Some(8080)), ("lan", "10.9.9.9", None)]);
        let wide_node = candidates("10.0.0.1", &[("wan", "192.0.2.1", None)]);
        let dual = candidates("10.0.0.7", &[("lan_ipv6", "2001:db8::7", None)]);
        let dual_node = candidates("10.0.0.1", &[("wan_ipv6", "2001:db8::1", None)]);
        let mapped = candidates("::ffff:10.0.0.8", &[]);
        let bracketed = candidates("[2001:db8::8]", &[]);
        let table = [
            (LanIpv4, &mapped, &node, Ok(("::ffff:10.0.0.8", None))),
            (LanIpv6, &mapped, &node, Err("has no `lan_ipv6` address")),
            (LanIpv4, &bracketed, &node, Ok(("10.0.0.1", None))),
            (LanIpv6, &bracketed, &node, Ok(("[2001:db8::8]", None))),
            (Lan, &own, &node, Ok(("10.0.0.7", None))),
            (Lan, &none, &node, Ok(("10.0.0.1", None))),
            (Lan, &wide, &wide_node, Ok(("10.0.0.7", None))),
            (Lan, &none, &none, Ok(("", None))),
            (Wan, &wide, &wide_node, Ok(("192.0.2.7", Some(8080)))),
            (Wan, &own, &wide_node, Ok(("10.0.0.7", None))),
            (Wan, &none, &wide_node, Ok(("192.0.2.1", None))),
            (Wan, &none, &node, Ok(("10.0.0.1", None))),
            (LanIpv4, &dual, &node, Ok(("10.0.0.7", None))),
            (LanIpv6, &dual, &node, Ok(("2001:db8::7", None))),
            (LanIpv6, &own, &node, Err("has no `lan_ipv6` address")),
            (LanIpv6, &named, &node, Ok(("db.example.com", None))),
            (WanIpv6, &own, &dual_node, Ok(("2001:db8::1", None))),
            (WanIpv4, &own, &dual_node, Ok(("10.0.0.7", None))),
            (WanIpv4, &none, &none, Err("has no `wan_ipv4` address")),
        ];
        for (choice, service, node, expected) in table {
            let expected =
                expected.map(|(address, port)| (address.to_owned(), port)).map_err(str::to_owned);
            assert_eq!(choose(choice, service, node), expected, "{choice:?} {service:?}");
        }
    }
}
