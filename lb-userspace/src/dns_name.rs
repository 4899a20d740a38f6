//! The rules for the names of hosts and services in DNS.

/// The longest name, in octets, without the dot at its end (RFC 1035, section 2.3.4).
const MAX_NAME_LEN: usize = 253;

/// The longest label, in octets.
const MAX_LABEL_LEN: usize = 63;

/// Whether `name` can be a host's: labels of letters, digits, `-` and `_` between dots, none of which
/// begins or ends with `-` (RFC 952 and 1123; `_` is in use all the same).
pub fn is_host_name(name: &str) -> bool {
    name.len() <= MAX_NAME_LEN && name.split('.').all(|label| label_problem(label).is_none())
}

/// What keeps `label` from being a service's name, to be read after it: unlike that of a host, it begins
/// and ends with a letter or digit, as `_NAME._tcp` is another name (RFC 2782).
pub fn service_name_problem(label: &str) -> Option<&'static str> {
    let is_outer = |octet: Option<&u8>| octet.is_some_and(u8::is_ascii_alphanumeric);
    let octets = label.as_bytes();
    label_problem(label).or_else(|| {
        let is_good = is_outer(octets.first()) && is_outer(octets.last());
        (!is_good).then_some("doesn't begin and end with a letter or digit")
    })
}

fn label_problem(label: &str) -> Option<&'static str> {
    let is_inner = |octet: u8| octet.is_ascii_alphanumeric() || octet == b'-' || octet == b'_';
    if label.is_empty() {
        Some("is empty")
    } else if label.len() > MAX_LABEL_LEN {
        Some("is longer than the 63 octets of a DNS label")
    } else if !label.bytes().all(is_inner) {
        Some("has more in it than letters, digits, `-` and `_`")
    } else if label.starts_with('-') || label.ends_with('-') {
        Some("begins or ends with `-`")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let (longest, too_long) = ("x".repeat(63), "x".repeat(64));
        // Whether a host can have the name, and a service.
        let table = [
            ("a", true, true),
            ("Web-2", true, true),
            ("api_v1", true, true),
            (&longest, true, true),
            ("_a", true, false),
            ("a_", true, false),
            ("a.b-c.example", true, false),
            ("", false, false),
            ("-a", false, false),
            ("a-", false, false),
            ("a..b", false, false),
            ("a b", false, false),
            ("ä", false, false),
            (&too_long, false, false),
        ];
        for (name, host, service) in table {
            let is = (is_host_name(name), service_name_problem(name).is_none());
            assert_eq!(is, (host, service), "{name:?}");
        }
        let name = |len: usize| "x.".repeat(len / 2) + "x";
        assert!(is_host_name(&name(253)) && !is_host_name(&name(255)));
    }
}
