//! Reverse names, below `in-addr.arpa` (RFC 1035, section 3.5) and `ip6.arpa` (RFC 3596, section
//! 2.5): which are ours, and their addresses.

use std::net::IpAddr;

use ipnet::IpNet;

use super::message::WireName;

/// The kind of a name within our part of the reverse tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReverseName {
    /// The top of a zone.
    Apex,
    /// A name above addresses, with nothing of its own.
    Between,
    /// An address.
    Address(IpAddr),
    /// None of these.
    Nothing,
}

/// How a family writes its addresses as names.
struct ReverseTree {
    suffix: [&'static [u8]; 2],
    n_digits: usize,
    digit_bits: usize,
}

const V4: ReverseTree = ReverseTree { suffix: [b"in-addr", b"arpa"], n_digits: 4, digit_bits: 8 };
const V6: ReverseTree = ReverseTree { suffix: [b"ip6", b"arpa"], n_digits: 32, digit_bits: 4 };

/// The kind of `name` if it is within `pools`, and the number of its labels below the apex of its
/// zone; `None` if it isn't ours.
///
/// A zone ends at a label, so a pool is as many zones as it takes, such as 128 for a /9:
/// `128.127.in-addr.arpa` to `255.127.in-addr.arpa`. Of a pool smaller than the last label but one
/// only the addresses are ours, and their zone is that label's.
pub(super) fn classify(name: &WireName<'_>, pools: &[IpNet]) -> Option<(ReverseName, usize)> {
    pools.iter().find_map(|pool| classify_in(name, *pool))
}

fn classify_in(name: &WireName<'_>, pool: IpNet) -> Option<(ReverseName, usize)> {
    let ReverseTree { suffix, n_digits, digit_bits } = if pool.addr().is_ipv4() { V4 } else { V6 };
    let n_labels = name.n_labels().checked_sub(suffix.len())?;
    let is_ours = |idx: usize, label: &[u8]| {
        name.label(n_labels + idx).is_some_and(|theirs| theirs.eq_ignore_ascii_case(label))
    };
    if !(is_ours(0, suffix[0]) && is_ours(1, suffix[1])) {
        return None;
    }
    let pool_bits = usize::from(pool.prefix_len());
    let n_zone_digits = pool_bits.div_ceil(digit_bits).clamp(1, n_digits - 1);
    let depth = n_labels.checked_sub(n_zone_digits)?;
    // The digits run backwards: the last label before the suffix is the address's first.
    let n_read = n_labels.min(n_digits);
    let mut value = 0u128;
    for place in 0..n_read {
        let digit = name.label(n_labels - 1 - place).and_then(|label| digit(label, digit_bits));
        match digit {
            Some(digit) => value |= digit << ((n_digits - 1 - place) * digit_bits),
            None if place < n_zone_digits => return None,
            None => {
                let is_within = pool.contains(&address(pool, value));
                return is_within.then_some((ReverseName::Nothing, depth));
            }
        }
    }
    let address = address(pool, value);
    let names_all = n_read * digit_bits >= pool_bits;
    if !(names_all && pool.contains(&address)) {
        return None;
    }
    Some(match n_labels {
        n if n == n_zone_digits => (ReverseName::Apex, depth),
        n if n < n_digits => (ReverseName::Between, depth),
        n if n == n_digits => (ReverseName::Address(address), depth),
        _ => (ReverseName::Nothing, depth),
    })
}

/// The address of the pool's family with these bits.
fn address(pool: IpNet, value: u128) -> IpAddr {
    match pool {
        IpNet::V4(_) => IpAddr::V4((value as u32).into()), // its digits make up 32 bits
        IpNet::V6(_) => IpAddr::V6(value.into()),
    }
}

/// The value of a label that is a decimal octet without leading zeros, or a hexadecimal digit.
fn digit(label: &[u8], bits: usize) -> Option<u128> {
    let text = std::str::from_utf8(label).ok()?;
    match bits {
        4 => (label.len() == 1).then(|| u8::from_str_radix(text, 16).ok()).flatten(),
        _ => text.parse::<u8>().ok().filter(|octet| octet.to_string() == text),
    }
    .map(u128::from)
}

#[cfg(test)]
mod tests {
    use super::super::message::ClientQuery;
    use super::*;

    /// The question for the name `text`.
    fn question(text: &str) -> Vec<u8> {
        let mut bytes = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in text.split('.').filter(|label| !label.is_empty()) {
            bytes.push(label.len() as u8);
            bytes.extend(label.bytes());
        }
        bytes.extend([0, 0, 12, 0, 1]);
        bytes
    }

    #[test]
    fn names_of_addresses() {
        let v6 = |text: &str| format!("{}.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa.", text);
        let rows = [
            ("127.128.0.0/9", "1.0.128.127.in-addr.arpa.", "Address(127.128.0.1) 2"),
            ("127.128.0.0/9", "254.255.255.127.IN-ADDR.ARPA.", "Address(127.255.255.254) 2"),
            ("127.128.0.0/9", "1.0.127.127.in-addr.arpa.", "-"),
            ("127.128.0.0/9", "1.0.0.127.in-addr.arpa.", "-"),
            ("127.128.0.0/9", "1.0.128.10.in-addr.arpa.", "-"),
            ("127.128.0.0/9", "128.127.in-addr.arpa.", "Apex 0"),
            ("127.128.0.0/9", "0.128.127.in-addr.arpa.", "Between 1"),
            ("127.128.0.0/9", "127.in-addr.arpa.", "-"),
            ("127.128.0.0/9", "in-addr.arpa.", "-"),
            ("127.128.0.0/9", "arpa.", "-"),
            ("127.128.0.0/9", ".", "-"),
            ("127.128.0.0/9", "256.0.128.127.in-addr.arpa.", "Nothing 2"),
            ("127.128.0.0/9", "01.0.128.127.in-addr.arpa.", "Nothing 2"),
            ("127.128.0.0/9", "x.128.127.in-addr.arpa.", "Nothing 1"),
            ("127.128.0.0/9", "x.1.0.128.127.in-addr.arpa.", "Nothing 3"),
            ("127.128.0.0/9", "1.0.+128.127.in-addr.arpa.", "-"),
            ("127.128.0.0/9", "1.0.128.127.in-addr.example.", "-"),
            ("127.128.7.0/24", "9.7.128.127.in-addr.arpa.", "Address(127.128.7.9) 1"),
            ("127.128.7.0/24", "7.128.127.in-addr.arpa.", "Apex 0"),
            ("127.128.7.0/26", "9.7.128.127.in-addr.arpa.", "Address(127.128.7.9) 1"),
            ("127.128.7.0/26", "64.7.128.127.in-addr.arpa.", "-"),
            ("127.128.7.0/26", "7.128.127.in-addr.arpa.", "-"),
            ("fd00::/64", &v6("2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0"), "Address(fd00::2) 16"),
            ("fd00::/64", &v6("F.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0"), "Address(fd00::f) 16"),
            ("fd00::/64", &v6("0.0"), "Apex 0"),
            ("fd00::/64", &v6("0.0.0"), "Between 1"),
            ("fd00::/64", &v6("2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.1.0"), "-"),
            ("fd00::/64", &v6("2"), "-"),
            ("fd00::/64", &v6("10.0.0"), "Nothing 1"),
        ];
        for (pool, name, expected) in rows {
            let bytes = question(name);
            let query = ClientQuery::read(&bytes).unwrap();
            let classified = classify(&query.name, &[pool.parse().unwrap()]);
            let shown = classified.map_or("-".into(), |(is, depth)| format!("{is:?} {depth}"));
            assert_eq!(shown, expected, "{name} in {pool}");
        }
    }
}
