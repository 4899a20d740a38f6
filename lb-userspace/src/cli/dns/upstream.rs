//! Checks that nohop still has an upstream once the host's resolver forwards all names to it.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use super::detect::nameservers;
use super::resolved::{SettingList, server_ip};
use crate::config::{DnsConfig, Forward};
use crate::dns;

/// systemd-resolved's list of its own upstreams, below the root.
const UPLINKS: &str = "run/systemd/resolve/resolv.conf";

/// Whether nohop has an upstream that is neither itself nor systemd-resolved, which forwards to
/// nohop.
///
/// The servers in `fallback` don't count: systemd-resolved uses them only while it has no other
/// server, and nohop's address is one.
pub(super) fn is_there(root: &Path, config: &DnsConfig, fallback: &SettingList) -> bool {
    let leads_back =
        |server: SocketAddr| dns::is_stub(&server) || dns::leads_to_own(server, &config.listen);
    if let Forward::Servers(servers) = &config.forward {
        return !servers.iter().all(|server| leads_back(*server));
    }
    let path = root.join("etc/resolv.conf");
    let named = nameservers(&path);
    let is_link = fs::read_link(&path)
        .is_ok_and(|link| link.display().to_string().contains("systemd/resolve"));
    let is_all_stub = !named.is_empty() && named.iter().all(dns::is_stub);
    let servers = match is_link || is_all_stub {
        false => named,
        true => {
            let goes = |server: &SocketAddr| {
                fallback.values.iter().any(|setting| server_ip(&setting.word) == Some(server.ip()))
            };
            let mut uplinks = nameservers(&root.join(UPLINKS));
            uplinks.retain(|server| !goes(server));
            uplinks
        }
    };
    servers.into_iter().any(|server| !leads_back(server))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::dns::resolved::ResolvedSettings;
    use crate::config::Config;

    #[test]
    fn who_is_left_to_ask() {
        const STUB: &str = "nameserver 127.0.0.53\n";
        let fallback = "[Resolve]\nFallbackDNS=192.0.2.9\n";
        let servers = |text: &str| Forward::Servers(vec![text.parse().unwrap()]);
        // dns.forward, resolv.conf, and systemd-resolved's own upstreams.
        let table = [
            (servers("192.0.2.1:53"), STUB, "", true),
            (servers("127.0.0.1:53"), STUB, "nameserver 192.0.2.1\n", false),
            (servers("127.0.0.53:53"), STUB, "nameserver 192.0.2.1\n", false),
            (Forward::ResolvConf, STUB, "", false),
            (Forward::ResolvConf, STUB, "nameserver 192.0.2.1\n", true),
            (Forward::ResolvConf, STUB, "nameserver 192.0.2.9\n", false),
            (Forward::ResolvConf, STUB, "nameserver 127.0.0.1\n", false),
            (Forward::ResolvConf, STUB, "nameserver 127.0.0.1\nnameserver fe80::1%2\n", true),
            (Forward::ResolvConf, "nameserver 192.0.2.9\n", "", true),
            (Forward::ResolvConf, "nameserver 127.0.0.1\n", "nameserver 192.0.2.1\n", false),
            (Forward::ResolvConf, "", "nameserver 192.0.2.1\n", false),
            (Forward::ResolvConf, "", "", false),
        ];
        for (forward, resolv_conf, uplinks, expected) in table {
            let dir = tempfile::tempdir().unwrap();
            let root = dir.path();
            for (file, content) in [("etc/resolv.conf", resolv_conf), (UPLINKS, uplinks)] {
                let path = root.join(file);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, content).unwrap();
            }
            let config = DnsConfig { forward, ..Config::default().dns };
            let settings = ResolvedSettings::of(&[("file".into(), fallback.to_owned())]);
            let is = is_there(root, &config, &settings.fallback);
            assert_eq!(is, expected, "{:?} {resolv_conf:?} {uplinks:?}", config.forward);
        }
    }

    #[test]
    fn a_link_to_the_uplinks_changes_with_them() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        for folder in ["etc", "run/systemd/resolve"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        fs::write(root.join(UPLINKS), "nameserver 192.0.2.9\n").unwrap();
        let link = Path::new("..").join(UPLINKS);
        std::os::unix::fs::symlink(link, root.join("etc/resolv.conf")).unwrap();
        let config = Config::default().dns;
        assert!(is_there(root, &config, &SettingList::default()));
        let text = "[Resolve]\nFallbackDNS=192.0.2.9\n".to_owned();
        let settings = ResolvedSettings::of(&[("file".into(), text)]);
        assert!(!is_there(root, &config, &settings.fallback));
    }
}
