//! Which requests are accepted: the headers of a browser distinguish a page of another site from a client
//! that was given the address.
//!
//! A page may have a browser send requests to 127.0.0.1 or into a private network, and read the
//! answers under a name of its own that it has resolve to that address (DNS rebinding). A request
//! under such a name has the name in its Host; what a page sends to another site has Sec-Fetch-Site
//! or Origin (Fetch Metadata, RFC 6454). A unix socket that `ssh -L` forwards is such an address, too.

use std::net::IpAddr;

use hyper::header::{HOST, HeaderMap, ORIGIN};
use hyper::{Request, Version};

/// Why a request is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Foreign {
    #[error("HTTP/1.1 wants one Host header")]
    NoHost,
    #[error(
        "Host: '{0}' isn't the address that was connected to, nor localhost or this machine's name: use \
         one, or add it to admin.hosts"
    )]
    Host(String),
    #[error("requests of pages of another site aren't answered")]
    CrossSite,
}

/// What clients of TCP may do, by the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TcpAccess {
    /// The names and addresses under which a listener may be addressed, in addition to its own.
    pub hosts: Vec<String>,
    /// Whether they may trace connections, and list an edge's flows.
    pub may_trace: bool,
}

/// Checks the name under which a listener is addressed. `local` is the address that the client has
/// connected to, `None` on a unix socket; `hosts` are those of the configuration.
pub(super) fn check_host<B>(
    request: &Request<B>,
    local: Option<IpAddr>,
    hosts: &[String],
) -> Result<(), Foreign> {
    let (uri, headers) = (request.uri(), request.headers());
    let is_own = |host: &str| is_own(host, local, hosts);
    let mut given = headers.get_all(HOST).iter();
    match (given.next(), given.next()) {
        (Some(host), None) => {
            let host = String::from_utf8_lossy(host.as_bytes());
            is_own(&host).then_some(()).ok_or_else(|| Foreign::Host(host.into_owned()))?;
        }
        // Health checkers speak HTTP/1.0; no browser does.
        (None, _) if request.version() == Version::HTTP_10 => {}
        _ => return Err(Foreign::NoHost),
    }
    match uri.authority() {
        Some(authority) if !is_own(authority.as_str()) => Err(Foreign::Host(authority.to_string())),
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

/// Whether a browser opens what it requests in a tab of its own, as it does for a link on a page of
/// another site.
pub(super) fn is_navigation(headers: &HeaderMap) -> bool {
    let is = |name: &str, value: &str| headers.get(name).is_some_and(|given| given == value);
    is("sec-fetch-mode", "navigate") && is("sec-fetch-dest", "document")
}

/// Whether a Host, with or without a port, is an address or a name of ours: this machine's host name
/// (`uname -n`) can't be another site's. Clients of a unix socket make a name up, and may: one without
/// a dot is no site's.
fn is_own(host: &str, local: Option<IpAddr>, hosts: &[String]) -> bool {
    let is_own_address = |ip: IpAddr| {
        let ip = ip.to_canonical();
        let is_local = local.map_or(ip.is_loopback(), |local| local.to_canonical() == ip);
        is_local || hosts.iter().any(|own| own.parse() == Ok(ip))
    };
    let name = match host.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((address, port)) if is_port(port) => {
                return address.parse().is_ok_and(|ip| is_own_address(IpAddr::V6(ip)));
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
    if let Ok(ip) = name.parse() {
        return is_own_address(ip);
    }
    let host_name = rustix::system::uname();
    let is_machine = host_name.nodename().to_str().is_ok_and(is);
    is("localhost")
        || is_machine
        || hosts.iter().any(|own| is(own))
        || local.is_none() && !name.contains('.')
}

fn is_port(text: &str) -> bool {
    text.is_empty()
        || text.strip_prefix(':').is_some_and(|port| port.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCAL: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 7));

    fn request(uri: &str, lines: &[(&'static str, &str)]) -> Request<()> {
        let mut request = Request::new(());
        *request.uri_mut() = uri.parse().unwrap();
        *request.headers_mut() = headers(lines);
        request
    }

    fn headers(lines: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn a_host_is_an_address_or_known() {
        let hosts = ["nohop.example".to_owned(), "192.0.2.1".to_owned(), "fd00::1".to_owned()];
        let own = |host: &str| {
            check_host(&request("/v1/status", &[("host", host)]), Some(LOCAL), &hosts).is_ok()
        };
        for host in [
            "10.0.0.7",
            "10.0.0.7:9153",
            "10.0.0.7.:9153",
            "[::ffff:10.0.0.7]:9153",
            "192.0.2.1:9153",
            "[fd00::1]",
            "[fd00::1]:9153",
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
            "127.0.0.1:9153",
            "10.0.0.8",
            "[::1]:9153",
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
            "171376641",
            "0x0a000007",
            "010.0.0.7",
            "10.0.0.7..",
            "10.0.0.7/evil.example",
            "10.0.0.7,evil.example",
            "localhost%00",
            "[fe80::1%25eth0]",
        ] {
            assert!(!own(host), "{host}");
        }
    }

    #[test]
    fn clients_of_a_unix_socket_make_a_name_up() {
        for (host, expected) in [
            ("nohop", true),
            ("x:9153", true),
            ("localhost:9153", true),
            ("127.0.0.1:9153", true),
            ("[::1]:9153", true),
            ("nohop.example", true),
            ("evil.example:9153", false),
            ("192.0.2.1:9153", false),
        ] {
            let request = request("/", &[("host", host)]);
            let checked = check_host(&request, None, &["nohop.example".to_owned()]);
            assert_eq!(checked.is_ok(), expected, "{host}");
        }
    }

    #[test]
    fn a_host_is_needed_once() {
        let check = |request: Request<()>| check_host(&request, Some(LOCAL), &[]);
        let old = |mut request: Request<()>| {
            *request.version_mut() = Version::HTTP_10;
            request
        };
        assert_eq!(check(request("/metrics", &[])), Err(Foreign::NoHost));
        assert_eq!(check(old(request("/metrics", &[]))), Ok(()));
        let two = [("host", "10.0.0.7"), ("host", "evil.example")];
        assert_eq!(check(old(request("/metrics", &two))), Err(Foreign::NoHost));
        assert!(check(request("http://evil.example/metrics", &two[..1])).is_err());
        assert_eq!(check(request("http://10.0.0.7/metrics", &two[..1])), Ok(()));
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
