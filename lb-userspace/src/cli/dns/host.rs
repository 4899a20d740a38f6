//! Checks resolv.conf for settings that send names past nohop, or have a wrong server answer.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use crate::config::Config;
use crate::{dns, interfaces};

/// The port of Consul's own DNS.
const CONSUL_DNS_PORT: u16 = 8600;

/// The problems, each with its fix. The host's files are below `root`.
///
/// With fewer than `ndots` dots in a name, glibc tries it below each domain of the search list
/// first, and any name that fails or doesn't exist below them afterwards (resolv.conf(5)).
pub fn findings(root: &Path, config: &Config) -> Vec<(String, String)> {
    let text = fs::read(root.join("etc/resolv.conf")).unwrap_or_default();
    // As for resolvers, a line that can't be understood costs only itself.
    let (file, _) = resolv_conf::Config::parse_with_errors(&text);
    let domain = config.dns.domain.trim_matches('.');
    let search = file.get_last_search_or_domain().map(|it| it.trim_matches('.'));
    let search: Vec<&str> = search.filter(|it| !it.is_empty()).collect(); // "." is the root
    let mut findings = Vec::new();

    let n_dots = 1 + domain.matches('.').count();
    if file.ndots as usize > n_dots && !search.is_empty() {
        let (ndots, first) = (file.ndots, search[0]);
        findings.push((
            format!(
                "options ndots:{ndots} has NAME.{domain} looked up as NAME.{domain}.{first} first, \
                 which nohop doesn't answer: a server of that domain may"
            ),
            format!(
                "set options ndots:{n_dots} in /etc/resolv.conf, or write NAME.{domain}. with a dot"
            ),
        ));
    }

    let routes = config.dns.routes.iter().filter(|(_, server)| server.port() == CONSUL_DNS_PORT);
    let routes = routes.map(|(route, _)| route.trim_matches('.'));
    let foreign: Vec<&str> = routes.chain(["consul"]).collect();
    let leads_to = |searched: &&&str| {
        let below = format!("{domain}.{searched}").to_ascii_lowercase();
        let is_below = |zone: &&str| below.ends_with(&format!(".{}", zone.to_ascii_lowercase()));
        foreign.iter().any(is_below)
    };
    if let Some(searched) = search.iter().find(leads_to) {
        findings.push((
            format!(
                "search {searched}: a name that nohop doesn't have, such as that of a service \
                 without the tag, is looked up as NAME.{domain}.{searched}, and Consul answers with \
                 an instance's host: a client connects to port 80 of that host, whatever listens there"
            ),
            format!("take {searched} out of the search list of /etc/resolv.conf"),
        ));
    }

    let bridges = bridges(root);
    let is_loopback = |server: &resolv_conf::ScopedIp| std::net::IpAddr::from(server).is_loopback();
    let are_loopback = !file.nameservers.is_empty() && file.nameservers.iter().all(is_loopback);
    if are_loopback && !bridges.is_empty() {
        let server = std::net::IpAddr::from(&file.nameservers[0]);
        findings.push((
            format!(
                "nameserver {server} is each network namespace's own loopback: Nomad's tasks of exec \
                 and raw_exec in bridge mode read this file and ask themselves ({} is there)",
                bridges.join(", ")
            ),
            "use one address that the host and containers reach: nohop dns setup --nomad".to_owned(),
        ));
    }

    // Another resolver of this host may forward the zone to nohop.
    let is_near = |server: &SocketAddr| {
        interfaces::is_own(server.ip()) || dns::leads_to_own(*server, &config.dns.listen)
    };
    let (near, far): (Vec<_>, Vec<_>) = dns::nameservers(&text).partition(is_near);
    if let (Some(near), Some(far)) = (near.first(), far.first()) {
        let (near, far) = (near.ip(), far.ip());
        findings.push((
            format!(
                "nameserver {far} is listed with {near}, and has no NAME.{domain}: musl asks both and \
                 takes the first answer, and glibc asks it first, by turns (options rotate) or when the \
                 other one is slow, depending on the order: then a name doesn't exist"
            ),
            format!(
                "leave nameserver {near} alone in /etc/resolv.conf, and name {far} in dns.forward or \
                 in the configuration of the resolver at {near}"
            ),
        ));
    }
    findings
}

/// The bridges of this network namespace.
fn bridges(root: &Path) -> Vec<String> {
    let interfaces = fs::read_dir(root.join("sys/class/net")).into_iter().flatten().flatten();
    let bridges = interfaces.filter(|entry| entry.path().join("bridge").is_dir());
    let mut names: Vec<_> =
        bridges.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort_unstable();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_bypass_nohop() {
        let far = "nameserver 198.51.100.1\n";
        let both = "nameserver 127.0.0.1\nnameserver 198.51.100.1\n";
        // resolv.conf, a bridge, the domain, and a part of each finding.
        let table: [(&str, &str, &str, &[&str]); 23] = [
            (far, "nomad", "service", &[]),
            ("", "nomad", "service", &[]),
            ("nameserver 127.0.0.1\n", "", "service", &[]),
            ("nameserver 127.0.0.1\n", "docker0", "service", &["127.0.0.1 is each"]),
            ("nameserver 127.0.0.53\n", "nomad", "service", &["(nomad is there)"]),
            ("nameserver ::1\n", "br-0a1b", "service", &["nameserver ::1 is"]),
            (both, "docker0", "service", &["nameserver 198.51.100.1 is listed with 127.0.0.1"]),
            (
                "nameserver 198.51.100.1\nnameserver 127.0.0.53\n",
                "",
                "service",
                &["198.51.100.1 is listed"],
            ),
            (
                "nameserver 203.0.113.53\nnameserver 198.51.100.1\n",
                "",
                "service",
                &["with 203.0.113.53"],
            ),
            ("nameserver 127.0.0.1\nnameserver ::1\n", "", "service", &[]),
            ("nameserver 198.51.100.1\nnameserver 198.51.100.2\n", "", "service", &[]),
            ("what is this\nsearch consul\n", "", "service", &["search consul: "]),
            (
                "search consul\noptions ndots:two edns1 rotate\n",
                "",
                "service",
                &["search consul: "],
            ),
            ("search .\noptions ndots:5\n", "", "service", &[]),
            ("search corp.example\n", "", "service", &[]),
            ("search its.example\n", "", "service", &["search its.example: "]),
            ("search consul\n", "", "service", &["search consul: "]),
            ("search corp.example dc1.Consul.\n", "", "service", &["NAME.service.dc1.Consul"]),
            ("domain service.consul\n", "", "service", &["search service.consul: "]),
            ("search service\noptions ndots:1\n", "", "service", &[]),
            ("search corp.example\noptions ndots:5\n", "", "service", &["options ndots:5 has"]),
            ("search corp.example\noptions ndots:2\n", "", "lb.corp", &[]),
            ("options ndots:5\n", "", "service", &[]),
        ];
        for (resolv_conf, bridge, domain, expected) in table {
            let dir = tempfile::tempdir().unwrap();
            let root = dir.path();
            fs::create_dir_all(root.join("etc")).unwrap();
            fs::write(root.join("etc/resolv.conf"), resolv_conf).unwrap();
            fs::create_dir_all(root.join("sys/class/net/eth0")).unwrap();
            if !bridge.is_empty() {
                fs::create_dir_all(root.join("sys/class/net").join(bridge).join("bridge")).unwrap();
            }
            let mut config = Config::default();
            config.dns.domain = domain.to_owned();
            config.dns.listen.push("203.0.113.53:53".parse().unwrap());
            for (route, server) in
                [("corp.example", "198.51.100.1:53"), ("its.example", "198.51.100.1:8600")]
            {
                config.dns.routes.insert(route.to_owned(), server.parse().unwrap());
            }
            let found = findings(root, &config);
            assert_eq!(found.len(), expected.len(), "{resolv_conf:?}: {found:?}");
            for ((detail, _), part) in found.iter().zip(expected) {
                assert!(detail.contains(part), "{resolv_conf:?}: {detail}");
            }
        }
    }
}
