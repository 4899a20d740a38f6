//! The nameservers of /etc/resolv.conf, as it is now.

use std::fs::{self, Metadata};
use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use resolv_conf::{Config, ScopedIp};
use tracing::{debug, warn};

/// The file, and what it said when it was read last.
///
/// A look at the file's metadata before each use finds every change, for about a microsecond. To
/// watch /etc instead would miss those of a link's target, which is where systemd-resolved and
/// NetworkManager make them.
#[derive(Debug)]
pub(super) struct ResolvConf {
    path: PathBuf,
    /// Where systemd-resolved tells whom it asks itself.
    uplinks: PathBuf,
    read: Mutex<Read>,
}

#[derive(Debug, Default)]
struct Read {
    /// The versions of the two files; `None` before the first look.
    stamp: Option<[Stamp; 2]>,
    servers: Arc<[SocketAddr]>,
}

/// What differs between two versions of a file; all zero for a file that is absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    changed_s: i64,
    changed_ns: i64,
}

impl From<Metadata> for Stamp {
    fn from(metadata: Metadata) -> Stamp {
        Stamp {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            changed_s: metadata.ctime(),
            changed_ns: metadata.ctime_nsec(),
        }
    }
}

impl ResolvConf {
    /// The file at `path`, which is read when it is first needed; `uplinks` stands in where it
    /// names systemd-resolved alone.
    pub(super) fn new(path: PathBuf, uplinks: PathBuf) -> ResolvConf {
        ResolvConf { path, uplinks, read: Mutex::default() }
    }

    /// The nameservers that `keep` lets through, in the file's order.
    ///
    /// Behind systemd-resolved's own address come the servers that it asks itself: where it is
    /// told to ask us, it asks us for all names, so it leads back here and is left out.
    ///
    /// `keep` is asked once for each version of the file. While the file can't be read, the
    /// servers stay those of the version before.
    pub(super) fn servers(&self, keep: impl Fn(&SocketAddr) -> bool) -> Arc<[SocketAddr]> {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        // First the metadata, then the content: a change in between is found the next time.
        let stamp = [&self.path, &self.uplinks]
            .map(|path| fs::metadata(path).map(Stamp::from).unwrap_or_default());
        if read.stamp != Some(stamp) {
            read.stamp = Some(stamp);
            let path = self.path.display();
            match fs::read(&self.path) {
                Ok(content) => {
                    let named: Vec<_> = nameservers(&content).collect();
                    let uplinks = match !named.is_empty() && named.iter().all(is_stub) {
                        true => fs::read(&self.uplinks).unwrap_or_default(),
                        false => Vec::new(),
                    };
                    let servers = named.into_iter().chain(nameservers(&uplinks));
                    read.servers = servers.filter(keep).collect();
                }
                Err(error) => warn!("can't read {path}: {error}; its last nameservers stay"),
            }
            debug!(servers = ?read.servers, "read {path}");
            if read.servers.is_empty() {
                warn!(
                    "{path} names no nameserver but this one, so names outside the zone fail; \
                     name one there, or set dns.forward to the resolver's addresses"
                );
            }
        }
        Arc::clone(&read.servers)
    }
}

/// Whether this is an address of systemd-resolved.
pub(super) fn is_stub(server: &SocketAddr) -> bool {
    matches!(server.ip(), IpAddr::V4(ip) if matches!(ip.octets(), [127, 0, 0, 53 | 54]))
}

/// The nameservers in `content`; a line that can't be understood costs only itself.
fn nameservers(content: &[u8]) -> impl Iterator<Item = SocketAddr> {
    let (config, errors) = Config::parse_with_errors(content);
    for error in errors {
        debug!(%error, "a line of resolv.conf is ignored");
    }
    config.nameservers.into_iter().filter_map(|server| match server {
        ScopedIp::V4(ip) => Some(SocketAddr::from((ip, 53))),
        ScopedIp::V6(ip, None) => Some(SocketAddr::from((ip, 53))),
        ScopedIp::V6(ip, Some(scope)) => match scope_id(&scope) {
            Ok(scope_id) => Some(SocketAddrV6::new(ip, 53, 0, scope_id).into()),
            Err(error) => {
                debug!(%error, "nameserver {ip}%{scope} is ignored: no such interface");
                None
            }
        },
    })
}

/// The index of an interface, from its name or the index itself.
fn scope_id(scope: &str) -> io::Result<u32> {
    if let Ok(index) = scope.parse() {
        return Ok(index);
    }
    let index = fs::read_to_string(format!("/sys/class/net/{scope}/ifindex"))?;
    index.trim().parse().map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn show(servers: &[SocketAddr]) -> String {
        servers.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn content() {
        let table: [(&[u8], &str); 6] = [
            (b"", ""),
            (b"search example.com\noptions ndots:5\n", ""),
            (b"nameserver 192.0.2.1\nnameserver 192.0.2.2 # second\n", "192.0.2.1:53 192.0.2.2:53"),
            (b"nameserver ::1\nnameserver fe80::1%7\n", "[::1]:53 [fe80::1%7]:53"),
            (b"nameserver nonsense\nwhat is this\nnameserver 192.0.2.1\n", "192.0.2.1:53"),
            (b"\xff\xfe\0\nnameserver 192.0.2.1\n", "192.0.2.1:53"),
        ];
        for (content, expected) in table {
            let servers: Vec<_> = nameservers(content).collect();
            assert_eq!(show(&servers), expected, "{:?}", content.escape_ascii().to_string());
        }
    }

    #[test]
    fn a_change_is_seen_through_a_link_and_an_error_is_no_emptiness() {
        let dir = tempfile::tempdir().unwrap();
        let (target, link) = (dir.path().join("stub"), dir.path().join("resolv.conf"));
        fs::write(&target, "nameserver 192.0.2.1\n").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        let resolv_conf = ResolvConf::new(link, dir.path().join("uplinks"));
        let servers = || show(&resolv_conf.servers(|server| server.ip().is_ipv4()));

        assert_eq!(servers(), "192.0.2.1:53");
        fs::write(&target, "nameserver ::1\nnameserver 192.0.2.20\n").unwrap();
        assert_eq!(servers(), "192.0.2.20:53");
        fs::remove_file(&target).unwrap();
        assert_eq!(servers(), "192.0.2.20:53");
        fs::write(&target, "nameserver 192.0.2.3\n").unwrap();
        assert_eq!(servers(), "192.0.2.3:53");
    }

    #[test]
    fn behind_systemd_resolved_stand_those_that_it_asks() {
        let dir = tempfile::tempdir().unwrap();
        let [path, uplinks] = ["resolv.conf", "uplinks"].map(|name| dir.path().join(name));
        let resolv_conf = ResolvConf::new(path.clone(), uplinks.clone());
        let servers = || show(&resolv_conf.servers(|server| server.to_string() != "127.0.0.1:53"));

        fs::write(&path, "nameserver 127.0.0.53\n").unwrap();
        assert_eq!(servers(), "127.0.0.53:53");
        fs::write(&uplinks, "nameserver 127.0.0.1\nnameserver 192.0.2.9\n").unwrap();
        assert_eq!(servers(), "127.0.0.53:53 192.0.2.9:53");
        fs::write(&path, "nameserver 127.0.0.53\nnameserver 192.0.2.1\n").unwrap();
        assert_eq!(servers(), "127.0.0.53:53 192.0.2.1:53");
        fs::write(&path, "").unwrap();
        assert_eq!(servers(), "");
    }
}
