//! Which requests over TCP are accepted: the headers of a browser distinguish a page of another site
//! from a client that was given the address.
//!
//! A page may have a browser send requests to 127.0.0.1 or into a private network, and read the
//! answers under a name of its own that it has resolve to that address (DNS rebinding). A request
//! under such a name has the name in its Host; what a page sends to another site has Sec-Fetch-Site
//! or Origin (Fetch Metadata, RFC 6454).

use std::net::IpAddr;

use hyper::header::{HOST, HeaderMap, ORIGIN};
use hyper::{Uri, Version};

/// Why a request is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Foreign {
    #[error("HTTP/1.1 wants one Host header")]
    NoHost,
    #[error(
        "Host: '{0}' is no IP address, nor localhost or this machine's name: use one, or add the name to \
         admin.hosts"
    )]
    Host(String),
    #[error("requests of pages of another site aren't answered")]
    CrossSite,
}

/// Checks the names under which a TCP listener is addressed. `hosts` are those of the configuration.
pub(super) fn check_host(
    uri: &Uri,
    version: Version,
    headers: &HeaderMap,
    hosts: &[String],
) -> Result<(), Foreign> {
    let mut given = headers.get_all(HOST).iter();
    match (given.next(), given.next()) {
        (Some(host), None) => {
            let host = String::from_utf8_lossy(host.as_bytes());
            is_own(&host, hosts).then_some(()).ok_or_else(|| Foreign::Host(host.into_owned()))?;
        }
        // Health checkers speak HTTP/1.0; no browser does.
        (None, _) if version == Version::HTTP_10 => {}
        _ => return Err(Foreign::NoHost),
    }
    match uri.authority() {
        Some(authority) if !is_own(authority.as_str(), hosts) => {
            Err(Foreign::Host(authority.to_string()))
        }
        _ => Ok(()),
    }
}

/// Refuses what a browser sends on behalf of a page of another site.
pub(super) fn check_site(headers: &HeaderMap) -> Result<(), Foreign> {
    let mut sites = headers.get_all("sec-fetch-site").iter();
    if sites.any(|site| site != "same-origin" && site != "none") {
        return Err(Foreign::CrossSite);
    }
    let host =
        headers.get(HOST).map(|host| String::from_utf8_lossy(host.as_bytes()).to_lowercase());
    for origin in headers.get_all(ORIGIN) {
        let origin = String::from_utf8_lossy(origin.as_bytes()).to_lowercase();
        let site = origin.strip_prefix("http://").or(origin.strip_prefix("https://"));
        if site.is_none() || site != host.as_deref() {
            return Err(Foreign::CrossSite);
        }
    }
    Ok(())
}

/// Whether a Host, with or without a port, is an address or a name of ours: this machine's host name
/// (`uname -n`) can't be another site's.
fn is_own(host: &str, hosts: &[String]) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((address, port)) if is_port(port) => {
                return address.parse::<std::net::Ipv6Addr>().is_ok();
            }
            _ => return false,
        },
        None => host,
    };
    let name = match name.split_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        Some(_) => return false,
        None => name,
    };
    let name = name.strip_suffix('.').unwrap_or(name);
    let is = |own: &str| own.eq_ignore_ascii_case(name);
    let host_name = rustix::system::uname();
    let is_machine = host_name.nodename().to_str().is_ok_and(is);
    name.parse::<IpAddr>().is_ok()
        || is("localhost")
        || is_machine
        || hosts.iter().any(|own| is(own))
}

fn is_port(text: &str) -> bool {
    text.is_empty()
        || text.strip_prefix(':').is_some_and(|port| port.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn a_host_is_an_address_or_known() {
        let hosts = ["nohop.example".to_owned()];
        let own = |host: &str| {
            let uri = Uri::from_static("/v1/status");
            check_host(&uri, Version::HTTP_11, &headers(&[("host", host)]), &hosts).is_ok()
        };
        for host in [
            "127.0.0.1",
            "127.0.0.1:9153",
            "10.0.0.7:9153",
            "[::1]",
            "[::1]:9153",
            "localhost",
            "LOCALHOST:9153",
            "nohop.example",
            "Nohop.Example.:9153",
        ] {
            assert!(own(host), "{host}");
        }
        let host_name = rustix::system::uname().nodename().to_string_lossy().into_owned();
        assert!(own(&host_name) && own(&format!("{host_name}:9153")), "{host_name}");
        assert!(!own(&format!("{host_name}.evil.example")), "{host_name}");
        for host in [
            "evil.example",
            "evil.example:9153",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "127.0.0.1.nip.io:9153",
            "",
            ":9153",
            "[::1",
            "[::1]evil",
            "[localhost]",
            "127.0.0.1:9153:1",
            "127.0.0.1@evil.example",
            "nohop.example.evil.example",
            "2130706433x",
        ] {
            assert!(!own(host), "{host}");
        }
    }

    #[test]
    fn a_host_is_needed_once() {
        let uri = Uri::from_static("/metrics");
        let none = headers(&[]);
        assert_eq!(check_host(&uri, Version::HTTP_11, &none, &[]), Err(Foreign::NoHost));
        assert_eq!(check_host(&uri, Version::HTTP_10, &none, &[]), Ok(()));
        let two = headers(&[("host", "127.0.0.1"), ("host", "evil.example")]);
        assert_eq!(check_host(&uri, Version::HTTP_10, &two, &[]), Err(Foreign::NoHost));
        let one = headers(&[("host", "127.0.0.1")]);
        let absolute = Uri::from_static("http://evil.example/metrics");
        assert!(check_host(&absolute, Version::HTTP_11, &one, &[]).is_err());
    }

    #[test]
    fn a_page_of_another_site_is_refused() {
        let table: [(&[(&'static str, &str)], bool); 9] = [
            (&[], true),
            (&[("sec-fetch-site", "none")], true),
            (&[("sec-fetch-site", "same-origin")], true),
            (&[("sec-fetch-site", "same-site")], false),
            (&[("sec-fetch-site", "cross-site")], false),
            (&[("host", "127.0.0.1:9153"), ("origin", "http://127.0.0.1:9153")], true),
            (&[("host", "127.0.0.1:9153"), ("origin", "http://127.0.0.1:8000")], false),
            (&[("host", "127.0.0.1:9153"), ("origin", "null")], false),
            (&[("origin", "http://evil.example")], false),
        ];
        for (lines, expected) in table {
            assert_eq!(check_site(&headers(lines)).is_ok(), expected, "{lines:?}");
        }
    }
}
