//! Notifications for systemd: sd_notify(3), a datagram of lines to NOTIFY_SOCKET.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// How long a daemon may be started before it is called ready though names aren't answered yet, as
/// while Consul is down: what waits for it has to go on.
const PATIENCE: Duration = Duration::from_secs(5);

/// The service manager's socket; all of it does nothing where there is none.
#[derive(Debug)]
pub struct Notify {
    socket: Option<(UnixDatagram, SocketAddr)>,
    since: Instant,
    is_started: bool,
    /// Whether names were answered at the last notification.
    is_serving: Option<bool>,
}

impl Notify {
    /// The socket that the environment names.
    pub fn of_environment() -> Notify {
        let socket = std::env::var_os("NOTIFY_SOCKET").and_then(|name| {
            let address = match name.as_bytes() {
                [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
                name => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(name)),
            };
            let socket = UnixDatagram::unbound().and_then(|socket| {
                // The daemon's loop never blocks: a message that doesn't fit is lost.
                socket.set_nonblocking(true)?;
                Ok((socket, address?))
            });
            let wrong = |error| tracing::warn!("NOTIFY_SOCKET can't be used: {error}");
            socket.map_err(wrong).ok()
        });
        Notify { socket, since: Instant::now(), is_started: false, is_serving: None }
    }

    /// To be called once a second from the daemon's loop: reports that it runs (WATCHDOG=1), once that it
    /// has started, and changes of whether names are answered.
    pub fn alive(&mut self, is_serving: bool) {
        let mut lines = vec!["WATCHDOG=1"];
        if !self.is_started && (is_serving || self.since.elapsed() >= PATIENCE) {
            self.is_started = true;
            lines.push("READY=1");
        }
        if self.is_serving != Some(is_serving) {
            self.is_serving = Some(is_serving);
            lines.push(match is_serving {
                true => "STATUS=answering",
                false => "STATUS=not ready: nohop status says why",
            });
        }
        self.send(&lines.join("\n"));
    }

    /// A reload begins.
    pub fn reloading(&self) {
        let now = clock_gettime(ClockId::Monotonic);
        let micros = now.tv_sec * 1_000_000 + now.tv_nsec / 1_000;
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={micros}"));
    }

    /// A reload has ended, whatever became of it.
    pub fn reloaded(&self) {
        self.send("READY=1");
    }

    /// The daemon stops.
    pub fn stopping(&self) {
        self.send("STOPPING=1");
    }

    fn send(&self, lines: &str) {
        if let Some((socket, address)) = &self.socket {
            // systemd that doesn't read has worse problems.
            let _ = socket.send_to_addr(lines.as_bytes(), address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notify(path: &std::path::Path) -> Notify {
        let socket = UnixDatagram::unbound().unwrap();
        socket.set_nonblocking(true).unwrap();
        let socket = Some((socket, SocketAddr::from_pathname(path).unwrap()));
        Notify { socket, since: Instant::now(), is_started: false, is_serving: None }
    }

    #[test]
    fn systemd_is_told_when_it_is_ready_and_that_it_lives() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let systemd = UnixDatagram::bind(&path).unwrap();
        let heard = || {
            let mut buffer = [0; 256];
            let n = systemd.recv(&mut buffer).unwrap();
            String::from_utf8_lossy(&buffer[..n]).into_owned()
        };
        let mut notify = notify(&path);
        notify.alive(false);
        assert_eq!(heard(), "WATCHDOG=1\nSTATUS=not ready: nohop status says why");
        notify.alive(false);
        assert_eq!(heard(), "WATCHDOG=1");
        notify.alive(true);
        assert_eq!(heard(), "WATCHDOG=1\nREADY=1\nSTATUS=answering");
        notify.reloading();
        assert!(heard().starts_with("RELOADING=1\nMONOTONIC_USEC="));
        notify.reloaded();
        assert_eq!(heard(), "READY=1");
        notify.stopping();
        assert_eq!(heard(), "STOPPING=1");
    }

    #[test]
    fn what_waits_for_it_does_not_wait_for_consul() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let systemd = UnixDatagram::bind(&path).unwrap();
        let mut notify = notify(&path);
        notify.since = Instant::now().checked_sub(PATIENCE).unwrap();
        notify.alive(false);
        let mut buffer = [0; 256];
        let n = systemd.recv(&mut buffer).unwrap();
        assert!(String::from_utf8_lossy(&buffer[..n]).contains("READY=1"));
        // A socket that isn't read holds nobody up.
        for _ in 0..10_000 {
            notify.alive(true);
        }
    }
}
