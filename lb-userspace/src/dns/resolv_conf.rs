//! The reader of /etc/resolv.conf and of systemd-resolved's list of uplinks.

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use resolv_conf::{Config, ScopedIp};
use tracing::{debug, warn};

use crate::file_state::{FileState, file_state};
use crate::regular_file;

/// The pause before an unreadable file is tried again.
const PAUSE: Duration = Duration::from_secs(1);

/// The file and its nameservers when it was last read.
///
/// Comparing the file's metadata finds every change for about a microsecond. Watching /etc instead
/// would miss changes of a link's target, which is where systemd-resolved and NetworkManager make
/// them.
#[derive(Debug)]
pub(super) struct ResolvConf {
    path: PathBuf,
    /// systemd-resolved's list of its own upstreams.
    uplinks: PathBuf,
    read: Mutex<Cached>,
}

#[derive(Debug, Default)]
struct Cached {
    /// The versions of the two files that were read; `None` before that.
    stamp: Option<[FileState; 2]>,
    /// The versions that couldn't be read, and when that was tried last.
    failed: Option<([FileState; 2], Instant)>,
    /// Why they couldn't be read.
    error: Option<String>,
    servers: Arc<[SocketAddr]>,
}

impl ResolvConf {
    /// The file at `path`, which is read when it is first needed; `uplinks` stands in where it
    /// names systemd-resolved alone.
    pub(super) fn new(path: PathBuf, uplinks: PathBuf) -> ResolvConf {
        ResolvConf { path, uplinks, read: Mutex::default() }
    }

    /// Whether the file changed since it was read, or couldn't be read then.
    pub(super) fn has_changed(&self) -> bool {
        let read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        read.is_due(self.stamp(), Instant::now())
    }

    /// The versions of the two files as they are now.
    fn stamp(&self) -> [FileState; 2] {
        [&self.path, &self.uplinks].map(|path| file_state(path))
    }

    /// The nameservers that `keep` selects, in the file's order.
    ///
    /// systemd-resolved's own address is followed by its own upstreams: if it forwards to us, it
    /// forwards all names, so it leads back here and is skipped.
    ///
    /// `keep` is called once per version of the file. While the file can't be read, the nameservers
    /// stay those of the former version, and it is tried again every second.
    pub(super) fn servers(&self, keep: impl Fn(&SocketAddr) -> bool) -> Arc<[SocketAddr]> {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        // First the metadata, then the content: a change in between is found the next time.
        let stamp = self.stamp();
        let path = self.path.display();
        match read.update(stamp, Instant::now(), || self.named()) {
            Update::None => {}
            Update::Cached => {
                read.servers = read.servers.iter().copied().filter(keep).collect();
                debug!(servers = ?read.servers, "read {path}");
                if let Some(problem) = self.problem_of(&read) {
                    warn!("{problem}");
                }
            }
            Update::Failed(error) => {
                warn!("can't read {path}: {error}; its last nameservers stay")
            }
        }
        Arc::clone(&read.servers)
    }

    /// What is wrong, with the fix, where no nameserver is known.
    pub(super) fn problem(&self) -> Option<String> {
        self.problem_of(&self.read.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn problem_of(&self, read: &Cached) -> Option<String> {
        if !read.servers.is_empty() {
            return None;
        }
        let path = self.path.display();
        let (what, fix) = match &read.error {
            Some(error) => (format!("can't read {path} ({error})"), "make it readable"),
            None => (format!("{path} names no nameserver but this one"), "name one there"),
        };
        Some(format!(
            "{what}, so names outside the zone fail; {fix}, or set dns.forward to the resolver's addresses, or to \
             [] to forward nothing"
        ))
    }

    /// The nameservers in the file, and those behind them.
    fn named(&self) -> io::Result<Vec<SocketAddr>> {
        let mut named: Vec<_> = nameservers(&regular_file::read_or_null(&self.path)?).collect();
        if !named.is_empty() && named.iter().all(is_stub) {
            match regular_file::read_or_null(&self.uplinks) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                uplinks => named.extend(nameservers(&uplinks?)),
            }
        }
        Ok(named)
    }
}

/// The result of an update.
#[derive(Debug)]
enum Update {
    None,
    Cached,
    /// It can't be read; reported once for each version.
    Failed(io::Error),
}

impl Cached {
    /// Whether this version is to be read: it isn't the one that was read last, and hasn't failed
    /// just now.
    fn is_due(&self, stamp: [FileState; 2], now: Instant) -> bool {
        let has_failed = self.failed.filter(|(failed, _)| *failed == stamp);
        let rests = has_failed.is_some_and(|(_, at)| now.saturating_duration_since(at) < PAUSE);
        self.stamp != Some(stamp) && !rests
    }

    /// Stores the nameservers that `named` reads, if this version is to be read.
    fn update(
        &mut self,
        stamp: [FileState; 2],
        now: Instant,
        named: impl FnOnce() -> io::Result<Vec<SocketAddr>>,
    ) -> Update {
        if !self.is_due(stamp, now) {
            return Update::None;
        }
        let has_failed = self.failed.filter(|(failed, _)| *failed == stamp);
        match named() {
            Ok(servers) => {
                let servers = servers.into();
                *self = Cached { stamp: Some(stamp), failed: None, error: None, servers };
                Update::Cached
            }
            Err(error) => {
                (self.failed, self.error) = (Some((stamp, now)), Some(error.to_string()));
                if has_failed.is_none() { Update::Failed(error) } else { Update::None }
            }
        }
    }
}

/// Whether this is the stub of systemd-resolved.
pub fn is_stub(server: &SocketAddr) -> bool {
    matches!(server.ip(), IpAddr::V4(ip) if matches!(ip.octets(), [127, 0, 0, 53 | 54]))
}

/// The nameservers in `content`; a line that can't be understood costs only itself.
pub fn nameservers(content: &[u8]) -> impl Iterator<Item = SocketAddr> {
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
    Ok(nix::net::if_::if_nametoindex(scope)?)
}

#[cfg(test)]
mod tests {
    use std::fs;

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

    #[test]
    fn what_could_not_be_read_is_tried_again() {
        let [old, new] = [1, 2].map(|last| SocketAddr::from(([192, 0, 2, last], 53)));
        let start = Instant::now();
        let mut read = Cached::default();
        let versions = [1, 2].map(|inode| [Some((0, inode, 0, 0, 0)); 2]);
        let fault = || io::Error::from(io::ErrorKind::Interrupted);
        // The version, when, what comes of reading, whether that is asked, told and what there is.
        let rows = [
            (0, 0, Some(old), "read", old),
            (0, 100, None, "-", old),
            (1, 200, None, "failed", old),
            (1, 900, Some(new), "-", old),
            (1, 1200, None, "-", old),
            (1, 2200, Some(new), "read", new),
            (1, 2300, None, "-", new),
        ];
        for (version, at_ms, named, expected, server) in rows {
            let now = start + Duration::from_millis(at_ms);
            let named = || named.map(|server| vec![server]).ok_or_else(fault);
            let outcome = match read.update(versions[version], now, named) {
                Update::None => "-",
                Update::Cached => "read",
                Update::Failed(_) => "failed",
            };
            assert_eq!((outcome, &*read.servers), (expected, &[server][..]), "{at_ms}");
        }
    }
}
