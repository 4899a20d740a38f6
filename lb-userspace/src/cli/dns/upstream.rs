//! Whom nohop could ask for other names once the machine's resolver asks it for all of them.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;

use super::detect::nameservers;
use super::resolved::{List, server_ip};
use crate::config::{DnsConfig, Forward};

/// Where systemd-resolved tells whom it asks itself, below the root.
const UPLINKS: &str = "run/systemd/resolve/resolv.conf";

/// Whether nohop has a resolver to ask that isn't itself, nor systemd-resolved, which asks nohop.
///
/// Those in `fallback` aren't counted: systemd-resolved has them only for as long as it has no other
/// server, and nohop's address is one.
pub(super) fn is_there(root: &Path, config: &DnsConfig, fallback: &List) -> bool {
    let leads_back = |server: SocketAddr| is_stub(server.ip()) || is_listener(server, config);
    if let Forward::Servers(servers) = &config.forward {
        return !servers.iter().all(|server| leads_back(*server));
    }
    let path = root.join("etc/resolv.conf");
    let ips = |path: &Path| nameservers(path).iter().filter_map(|word| server_ip(word)).collect();
    let named: Vec<IpAddr> = ips(&path);
    let is_link = fs::read_link(&path)
        .is_ok_and(|link| link.display().to_string().contains("systemd/resolve"));
    let is_all_stub = !named.is_empty() && named.iter().all(|ip| is_stub(*ip));
    let servers = match is_link || is_all_stub {
        false => named,
        true => {
            let goes = |ip: &IpAddr| {
                fallback.said.iter().any(|said| server_ip(&said.word).as_ref() == Some(ip))
            };
            let mut uplinks = ips(&root.join(UPLINKS));
            uplinks.retain(|ip| !goes(ip));
            uplinks
        }
    };
    servers.into_iter().any(|ip| !leads_back(SocketAddr::new(ip, 53)))
}

fn is_stub(ip: IpAddr) -> bool {
    [53, 54].map(|last| IpAddr::V4(Ipv4Addr::new(127, 0, 0, last))).contains(&ip)
}

fn is_listener(server: SocketAddr, config: &DnsConfig) -> bool {
    let mut listen = config.listen.iter().filter(|listen| listen.port() == server.port());
    listen.any(|listen| {
        let is_any = listen.ip().is_unspecified() && server.ip().is_loopback();
        is_any || listen.ip() == server.ip()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::dns::resolved::Settings;
    use crate::config::Config;

    #[test]
    fn who_is_left_to_ask() {
        const STUB: &str = "nameserver 127.0.0.53\n";
        let fallback = "[Resolve]\nFallbackDNS=192.0.2.9\n";
        let servers = |text: &str| Forward::Servers(vec![text.parse().unwrap()]);
        // What nohop is told, resolv.conf, and what systemd-resolved says that it asks.
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
            let settings = Settings::of(&[("file".into(), fallback.to_owned())]);
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
        assert!(is_there(root, &config, &List::default()));
        let text = "[Resolve]\nFallbackDNS=192.0.2.9\n".to_owned();
        let settings = Settings::of(&[("file".into(), text)]);
        assert!(!is_there(root, &config, &settings.fallback));
    }
}
