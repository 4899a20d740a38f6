//! What differs between two configurations, and whether a running daemon can take it over.

use std::fmt::Display;
use std::path::PathBuf;

use super::{
    AddressChoice, AdminAddress, Allowed, Config, Expired, Forward, HealthPolicy, OnExit, Source,
    Token, Unrouted, WatchPolicy,
};

/// A key whose value differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The key, such as `dns.ttl`.
    pub key: &'static str,
    /// The value in force, as the file would have it; of a secret only that there is one.
    pub from: String,
    /// The value that is wanted.
    pub to: String,
    /// Why it needs a restart of the daemon; `None` where it doesn't.
    pub restart: Option<&'static str>,
}

/// Every key whose value differs, in the order of the README.
pub fn changes(running: &Config, wanted: &Config) -> Vec<Change> {
    let differing = KEYS.iter().filter_map(|&(key, restart, show)| {
        let (from, to) = (show(running), show(wanted));
        (from != to).then_some(Change { key, from, to, restart })
    });
    let mut changes: Vec<Change> = differing.collect();
    // Both are shown as a secret.
    if running.consul.token != wanted.consul.token
        && !changes.iter().any(|change| change.key == TOKEN)
    {
        let (from, to) = (token(running), "another token".into());
        changes.push(Change { key: TOKEN, from, to, restart: None });
    }
    changes
}

const TOKEN: &str = "consul.token_file";

const LISTENS: &str = "the sockets are opened at the start";
const MAPS: &str = "the maps are made at the start";
const PROGRAMS: &str = "it is a constant of the programs in the kernel";

type Show = fn(&Config) -> String;

/// Every key, with the reason for which it needs a restart, if it does.
pub(super) const KEYS: &[(&str, Option<&str>, Show)] = &[
    ("cgroup", Some("the programs are attached there at the start"), |config| {
        config.cgroup.as_ref().map_or("\"auto\"".into(), |dir| text(dir.display()))
    }),
    ("bpffs", Some("maps and links are pinned there at the start"), |config| {
        text(config.bpffs.display())
    }),
    ("state_dir", Some("the book of VIPs is read there at the start"), |config| {
        text(config.state_dir.display())
    }),
    ("on_exit", None, |config| {
        text(match config.on_exit {
            OnExit::Keep => "keep",
            OnExit::Detach => "detach",
        })
    }),
    ("shadow", None, |config| config.shadow.to_string()),
    ("catalog.source", None, |config| {
        text(match config.catalog.source {
            Source::Consul => "consul",
            Source::File(_) => "file",
        })
    }),
    ("catalog.file", None, |config| match &config.catalog.source {
        Source::Consul => text(""),
        Source::File(path) => text(path.display()),
    }),
    ("catalog.tag", None, |config| text(&config.catalog.tag)),
    ("catalog.meta", None, |config| table(config.catalog.meta.iter())),
    ("catalog.health", None, |config| {
        text(match config.catalog.health {
            HealthPolicy::Passing => "passing",
            HealthPolicy::Warning => "warning",
        })
    }),
    ("catalog.address", None, |config| {
        text(match config.catalog.address {
            AddressChoice::Lan => "lan",
            AddressChoice::Wan => "wan",
            AddressChoice::LanIpv4 => "lan_ipv4",
            AddressChoice::LanIpv6 => "lan_ipv6",
            AddressChoice::WanIpv4 => "wan_ipv4",
            AddressChoice::WanIpv6 => "wan_ipv6",
        })
    }),
    ("catalog.watch", None, |config| {
        text(match config.catalog.watch {
            WatchPolicy::Auto => "auto",
            WatchPolicy::Used => "used",
            WatchPolicy::All => "all",
        })
    }),
    ("catalog.max_age", None, |config| text(format!("{}s", config.catalog.max_age.as_secs()))),
    ("catalog.expired", None, |config| {
        text(match config.catalog.expired {
            Expired::Serve => "serve",
            Expired::Refuse => "refuse",
        })
    }),
    ("consul.address", None, |config| text(&config.consul.address)),
    (TOKEN, None, token),
    ("consul.datacenter", None, |config| text(&config.consul.datacenter)),
    ("consul.namespace", None, |config| text(&config.consul.namespace)),
    ("consul.partition", None, |config| text(&config.consul.partition)),
    ("consul.ca_file", None, |config| file(&config.consul.tls.ca_file)),
    ("consul.ca_path", None, |config| file(&config.consul.tls.ca_path)),
    ("consul.cert_file", None, |config| file(&config.consul.tls.cert_file)),
    ("consul.key_file", None, |config| file(&config.consul.tls.key_file)),
    ("consul.tls_server_name", None, |config| {
        text(config.consul.tls.server_name.as_deref().unwrap_or_default())
    }),
    ("consul.verify", None, |config| config.consul.tls.verify.to_string()),
    ("consul.max_connections", None, |config| config.consul.max_connections.to_string()),
    ("vip.pool", Some(PROGRAMS), |config| text(config.vip.pool)),
    ("vip.pool6", Some(PROGRAMS), |config| config.vip.pool6.map_or("\"\"".into(), text)),
    ("vip.ports", None, |config| list(&config.vip.ports, ToString::to_string)),
    ("vip.pins", Some("the network around the pins is a constant of the programs"), |config| {
        table(config.vip.pins.iter())
    }),
    ("dns.listen", Some(LISTENS), |config| list(&config.dns.listen, |address| text(address))),
    ("dns.domain", Some("applications keep what they were told of the former zone"), |config| {
        text(&config.dns.domain)
    }),
    ("dns.ttl", None, |config| config.dns.ttl.to_string()),
    ("dns.forward", None, |config| match &config.dns.forward {
        Forward::ResolvConf => text("resolv.conf"),
        Forward::Servers(servers) => list(servers, |server| text(server)),
    }),
    ("dns.routes", None, |config| table(config.dns.routes.iter())),
    ("dns.unrouted", None, |config| {
        text(match config.dns.unrouted {
            Unrouted::Nxdomain => "nxdomain",
            Unrouted::Forward => "forward",
        })
    }),
    ("dns.allow", None, |config| {
        list(&config.dns.allow, |allowed| match allowed {
            Allowed::Local => text("local"),
            Allowed::Network(network) => text(network),
        })
    }),
    ("dns.client_rate", None, |config| config.dns.client_rate.to_string()),
    ("datapath.max_services", Some(MAPS), |config| config.datapath.max_services.to_string()),
    ("datapath.max_backends", Some(MAPS), |config| config.datapath.max_backends.to_string()),
    (
        "datapath.exclude_cgroups",
        Some("the programs know at the start how many there are"),
        |config| list(&config.datapath.exclude_cgroups, |cgroup| text(cgroup.display())),
    ),
    ("admin.listen", Some(LISTENS), |config| {
        list(&config.admin.listen, |address: &AdminAddress| text(address))
    }),
    ("admin.hosts", None, |config| list(&config.admin.hosts, |host| text(host))),
];

fn token(config: &Config) -> String {
    match &config.consul.token {
        None => text(""),
        Some(Token::File(path)) => text(path.display()),
        Some(Token::Literal(_)) => "a token".into(),
    }
}

fn file(path: &Option<PathBuf>) -> String {
    path.as_ref().map_or_else(|| text(""), |path| text(path.display()))
}

fn text(value: impl Display) -> String {
    format!("{:?}", value.to_string())
}

fn list<T>(values: &[T], show: impl Fn(&T) -> String) -> String {
    format!("[{}]", values.iter().map(show).collect::<Vec<_>>().join(", "))
}

fn table(entries: impl Iterator<Item = (impl Display, impl Display)>) -> String {
    let entries: Vec<String> =
        entries.map(|(name, value)| format!("{name} = \"{value}\"")).collect();
    if entries.is_empty() { "{}".into() } else { format!("{{ {} }}", entries.join(", ")) }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::{Overrides, parse};

    fn config(text: &str) -> Config {
        Config::parse(Path::new("f"), text.as_bytes(), Overrides::default(), &|_| None).unwrap()
    }

    #[test]
    fn every_key_of_the_file_is_compared() {
        // It has one value only in this version.
        let known =
            |key: &str| key == "datapath.algorithm" || KEYS.iter().any(|(known, ..)| *known == key);
        let missing: Vec<_> =
            parse::KEYS.iter().map(|(key, _)| *key).filter(|key| !known(key)).collect();
        assert!(missing.is_empty(), "say in change.rs of each whether it can change: {missing:?}");
    }

    #[test]
    fn what_differs_is_told_as_the_file_would_have_it() {
        // Before, after, and what is told; those that need a restart are marked.
        let table = [
            ("", "", ""),
            ("dns.ttl = 30", "", ""),
            ("", "dns.ttl = 5", "dns.ttl: 30 -> 5"),
            ("", "dns.client_rate = 7", "dns.client_rate: 10000 -> 7"),
            ("", "dns.unrouted = \"forward\"", "dns.unrouted: \"nxdomain\" -> \"forward\""),
            ("", "dns.allow = [\"10.0.0.0/8\"]", "dns.allow: [\"local\"] -> [\"10.0.0.0/8\"]"),
            ("", "vip.ports = [80, 443]", "vip.ports: [80] -> [80, 443]"),
            ("", "catalog.max_age = \"2m\"", "catalog.max_age: \"3600s\" -> \"120s\""),
            ("", "dns.routes = {}", "dns.routes: { consul = \"127.0.0.1:8600\" } -> {}"),
            ("", "dns.forward = \"10.0.0.1\"", "dns.forward: \"resolv.conf\" -> [\"10.0.0.1:53\"]"),
            (
                "",
                "catalog.source = \"file\"\ncatalog.file = \"/c\"",
                "catalog.source: \"consul\" -> \"file\", catalog.file: \"\" -> \"/c\"",
            ),
            ("", "cgroup = \"/a\"", "cgroup: \"auto\" -> \"/a\" (restart)"),
            (
                "vip.pins = { web = \"10.0.0.1:80\" }",
                "on_exit = \"detach\"",
                "on_exit: \"keep\" -> \"detach\", vip.pins: { web = \"10.0.0.1:80\" } -> {} (restart)",
            ),
        ];
        for (before, after, expected) in table {
            let shown: Vec<String> = changes(&config(before), &config(after))
                .into_iter()
                .map(|Change { key, from, to, restart }| {
                    let restart = restart.map_or("", |_| " (restart)");
                    format!("{key}: {from} -> {to}{restart}")
                })
                .collect();
            assert_eq!(shown.join(", "), expected, "{before} / {after}");
        }
    }

    #[test]
    fn a_secret_is_never_shown() {
        let with = |token: Option<&str>| {
            let mut config = Config::default();
            config.consul.token = token.map(|token| Token::Literal(token.into()));
            config
        };
        let table = [
            (None, Some("s3cret"), "\"\"", "a token"),
            (Some("s3cret"), Some("s3cret2"), "a token", "another token"),
            (Some("s3cret"), None, "a token", "\"\""),
        ];
        for (from, to, shown_from, shown_to) in table {
            let found = changes(&with(from), &with(to));
            let Change { from, to, .. } = &found[0];
            assert_eq!((found.len(), &**from, &**to), (1, shown_from, shown_to));
        }
    }
}
