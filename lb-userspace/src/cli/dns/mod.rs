//! `nohop dns`: configures the host's resolver, and queries nohop's DNS.

mod apply;
mod detect;
mod host;
mod instructions;
mod query;
mod resolved;
pub mod target;
mod upstream;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

use super::args::ResolverArguments;
use crate::config::Config;
use target::{ResolverKind, Setup, SetupReport, ZoneServer};

pub use detect::is_nomads;
pub use host::findings as resolver_findings;
pub use query::{query, text as lookup_text};
pub use target::setup_text;

impl ZoneServer {
    /// The target on the host whose files are below `root`.
    fn of(config: &Config, root: &Path) -> ZoneServer {
        let pools = config.vip.pools().collect();
        let config = &config.dns;
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 53));
        let reachable = |address: &&SocketAddr| !address.ip().is_unspecified();
        let mut known = config.listen.iter().filter(reachable);
        let first = config.listen.first().map(|first| match first.ip().is_unspecified() {
            true => SocketAddr::from((Ipv4Addr::LOCALHOST, first.port())),
            false => *first,
        });
        let is_loopback = |address: &&SocketAddr| address.ip().is_loopback();
        ZoneServer {
            local: known.clone().find(is_loopback).copied().or(first).unwrap_or(loopback),
            remote: known.find(|address| !is_loopback(address)).copied(),
            domain: config.domain.clone(),
            pools,
            has_dummy: detect::has_dummy(root),
        }
    }
}

/// `nohop dns setup`
///
/// # Errors
/// When a file can't be written, or systemd-resolved doesn't come up with it.
pub fn setup(
    arguments: ResolverArguments,
    apply: bool,
    undo: bool,
    root: &Path,
    config: &Config,
) -> anyhow::Result<SetupReport> {
    let target = ZoneServer::of(config, root);
    let kinds = arguments.kinds();
    let setups = match &kinds[..] {
        [kind] if apply => {
            if root == Path::new("/") {
                query::ask_zone(&target)?;
            }
            vec![Setup::requested(*kind, &apply::apply(root, &target, &config.dns)?)]
        }
        [kind] if undo => vec![Setup::requested(*kind, &apply::undo(root, &target)?)],
        [] => detect::recommend(&detect::detect(root)),
        kinds => {
            let setup =
                |kind: &ResolverKind| Setup::requested(*kind, &instructions::text(*kind, &target));
            kinds.iter().map(setup).collect()
        }
    };
    Ok(SetupReport { setups })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_combine() {
        #[derive(clap::Parser)]
        struct Command {
            #[command(flatten)]
            resolvers: ResolverArguments,
        }
        let table: [(&str, Option<&[ResolverKind]>); 8] = [
            ("--docker --nomad", Some(&[ResolverKind::Nomad, ResolverKind::Docker])),
            ("--nomad --dnsmasq", Some(&[ResolverKind::Dnsmasq, ResolverKind::Nomad])),
            ("--resolv-conf", Some(&[ResolverKind::ResolvConf])),
            ("", Some(&[])),
            ("--dnsmasq --resolv-conf", None),
            // Each of them is the host's only nameserver.
            ("--nomad --resolv-conf", None),
            ("--systemd-resolved --dnsmasq --nomad", None),
            ("--resolv-conf --systemd-resolved", None),
        ];
        for (arguments, expected) in table {
            let arguments = std::iter::once("test").chain(arguments.split_whitespace());
            let kinds = <Command as clap::Parser>::try_parse_from(arguments.clone());
            let kinds = kinds.ok().map(|command| command.resolvers.kinds());
            assert_eq!(kinds.as_deref(), expected, "{:?}", arguments.collect::<Vec<_>>());
        }
        let both = ResolverArguments {
            systemd_resolved: false,
            resolv_conf: false,
            dnsmasq: false,
            nomad: true,
            docker: true,
        };
        let report = setup(both, false, false, Path::new("/"), &Config::default()).unwrap();
        let text = setup_text(&report);
        assert!(
            text.contains("nameserver 169.254.53.53") && text.contains("daemon.json"),
            "{text}"
        );
    }

    #[test]
    fn targets() {
        let table = [
            ("127.0.0.1:53", "127.0.0.1:53", None),
            ("127.0.0.1:5354 169.254.53.53:53", "127.0.0.1:5354", Some("169.254.53.53:53")),
            ("169.254.53.53:53 127.0.0.1:53", "127.0.0.1:53", Some("169.254.53.53:53")),
            ("0.0.0.0:53", "127.0.0.1:53", None),
            ("10.0.0.1:53", "10.0.0.1:53", Some("10.0.0.1:53")),
            ("[::1]:53", "[::1]:53", None),
        ];
        for (listen, local, remote) in table {
            let listen = listen.split(' ').map(|address| address.parse().unwrap()).collect();
            let mut config = Config::default();
            config.dns.listen = listen;
            let target = ZoneServer::of(&config, Path::new("/"));
            assert_eq!(target.local.to_string(), local);
            assert_eq!(target.remote.map(|remote| remote.to_string()).as_deref(), remote);
        }
    }
}
