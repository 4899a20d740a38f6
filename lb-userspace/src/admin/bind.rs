//! The sockets of the admin interface.

use std::fs;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt;
use tokio::net::{TcpListener, UnixListener};

use crate::config::{AdminAddress, is_v6_only, tcp_addresses};

/// Who may use the socket: root and its group.
const MODE: u32 = 0o660;

/// The first port that any user may listen on, unless net.ipv4.ip_unprivileged_port_start is another.
const FIRST_UNPRIVILEGED_PORT: u16 = 1024;

/// How often an address is tried that can't be listened on yet.
pub(super) const RETRY: Duration = Duration::from_secs(1);

/// The connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// The send buffer of a TCP connection in bytes, of which the kernel takes twice as many. It would
/// otherwise grow to some megabytes (`net.ipv4.tcp_wmem`), which hold an hour of a stream that isn't read.
const SEND_BUFFER: usize = 32 << 10;

/// Why an address can't be listened on, with the fix.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another daemon listens there.
    #[error(
        "another daemon answers at {0}: stop it first, or choose another address with \
         --admin-listen"
    )]
    InUse(AdminAddress),
    /// A process listens on the path.
    #[error(
        "process {pid} ({command}, of uid {uid}) listens at {address}: if it is another daemon, stop it \
         first; else end it, or choose another address with --admin-listen"
    )]
    Held {
        /// The address.
        address: AdminAddress,
        /// The process.
        pid: i32,
        /// Its name.
        command: String,
        /// Its user.
        uid: u32,
    },
    /// The path exists, and isn't a socket.
    #[error("{0} is there and is no socket: move it away, or choose another with --admin-listen")]
    NotASocket(PathBuf),
    /// The directory of the socket can't be created.
    #[error("can't make the directory {dir}: run as root, or choose another with --admin-listen")]
    Directory {
        /// The directory.
        dir: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// A TCP address can't be listened on.
    #[error("can't listen on {address}, of admin.listen: {}", cause(*address, source))]
    Tcp {
        /// The address.
        address: SocketAddr,
        /// The system's error.
        source: io::Error,
    },
    /// A path can't be listened on, for another reason.
    #[error("can't listen on {address}: choose an address of your own with --admin-listen")]
    Refused {
        /// The address.
        address: AdminAddress,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

impl BindError {
    /// Whether something else listens there.
    pub fn is_in_use(&self) -> bool {
        match self {
            BindError::InUse(_) => true,
            BindError::Tcp { source, .. } => source.kind() == ErrorKind::AddrInUse,
            _ => false,
        }
    }
}

/// A socket that listens.
#[derive(Debug)]
pub enum Listener {
    /// On a path.
    Unix(UnixListener, SocketFile),
    /// On an address and port.
    Tcp(TcpListener),
    /// On an address and port, once they are available.
    Waiting(Arc<WaitingListener>),
}

/// A TCP address with a port from 1024 on that can't be listened on yet, without which the daemon starts: another
/// process holds the port, as any user's may, or no interface has the address.
#[derive(Debug)]
pub struct WaitingListener {
    address: SocketAddr,
    is_v6_only: bool,
    /// Why it waits, by the last try; `None` once it listens.
    problem: Mutex<Option<String>>,
}

impl WaitingListener {
    fn new(address: SocketAddr, is_v6_only: bool, source: io::Error) -> WaitingListener {
        let waiting = WaitingListener { address, is_v6_only, problem: Mutex::default() };
        waiting.fail(source);
        waiting
    }

    /// What is wrong, and the fix, while it waits.
    pub fn problem(&self) -> Option<String> {
        self.lock().clone()
    }

    /// Listens as soon as the address is free, which is tried every `pause`.
    pub(super) async fn listener(&self, pause: Duration) -> TcpListener {
        loop {
            match listen_tcp(self.address, self.is_v6_only) {
                Ok(listener) => {
                    tracing::info!("listening on {}, which is available now", self.address);
                    *self.lock() = None;
                    return listener;
                }
                Err(error) => self.fail(error),
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Takes the error of a try, and logs it where it isn't that of the last one.
    fn fail(&self, source: io::Error) {
        let problem = Some(BindError::Tcp { address: self.address, source }.to_string());
        let mut last = self.lock();
        if *last != problem {
            tracing::error!("{}", problem.as_deref().unwrap_or_default());
            *last = problem;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<String>> {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a TCP address can't be listened on, and the fix.
fn cause(address: SocketAddr, error: &io::Error) -> String {
    let (ip, port) = (address.ip(), address.port());
    match Errno::from_io_error(error) {
        Some(Errno::ADDRINUSE) => format!(
            "another process does; see who with ss -tlpn 'sport = :{port}' and stop it, or choose another port"
        ),
        Some(Errno::ADDRNOTAVAIL) => format!(
            "no interface of this host has {ip}; see those that they have with ip address, and add it to one or \
             choose another"
        ),
        Some(Errno::ACCESS | Errno::PERM) if port < FIRST_UNPRIVILEGED_PORT => format!(
            "this process isn't allowed to ({error}); run nohop as root, give it CAP_NET_BIND_SERVICE, or choose \
             a port from {FIRST_UNPRIVILEGED_PORT} on"
        ),
        Some(Errno::ACCESS | Errno::PERM) => format!(
            "this process isn't allowed to ({error}), by a security module or a program at its cgroup's bind \
             hook; allow it there, or choose another address"
        ),
        Some(Errno::AFNOSUPPORT) => {
            format!(
                "this kernel has no {}; choose another address",
                if ip.is_ipv4() { "IPv4" } else { "IPv6" }
            )
        }
        _ => format!("{error}; choose another address"),
    }
}

/// The listeners that wait for their addresses.
pub fn waiting(listeners: &[Listener]) -> Vec<Arc<WaitingListener>> {
    let waiting = |listener: &Listener| match listener {
        Listener::Waiting(waiting) => Some(waiting.clone()),
        Listener::Unix(..) | Listener::Tcp(_) => None,
    };
    listeners.iter().filter_map(waiting).collect()
}

/// The file of a unix socket, removed on drop.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode: a file that another daemon put in our place isn't ours to remove.
    identity: Option<(u64, u64)>,
}

impl SocketFile {
    fn new(path: &Path) -> SocketFile {
        SocketFile { path: path.to_owned(), identity: identity(path) }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            // Nothing is lost where this fails: the next daemon replaces a stale socket.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Listens on each address, or has one of TCP wait that may be had later ([`WaitingListener`]). The directory of
/// a unix socket is created if it is missing, a stale socket is replaced, and root's group may use the new one
/// (0660).
///
/// Call it within a tokio runtime.
///
/// # Errors
/// For the first address that can't be listened on; then none is.
pub fn bind(addresses: &[AdminAddress]) -> Result<Vec<Listener>, BindError> {
    addresses.iter().map(|address| bind_one(address, addresses)).collect()
}

/// Listens on one of `addresses`.
fn bind_one(address: &AdminAddress, addresses: &[AdminAddress]) -> Result<Listener, BindError> {
    let refused = |source: io::Error| match source.kind() {
        ErrorKind::AddrInUse => BindError::InUse(address.clone()),
        _ => BindError::Refused { address: address.clone(), source },
    };
    match address {
        AdminAddress::Unix(path) => {
            make_directory(path)?;
            clear_stale(path, address)?;
            let socket = bind_unix(path).map_err(refused)?;
            let file = SocketFile::new(path);
            fs::set_permissions(path, fs::Permissions::from_mode(MODE)).map_err(refused)?;
            // Only now can anybody connect, and only those who may.
            rustix::net::listen(&socket, BACKLOG).map_err(|error| refused(error.into()))?;
            let listener = std::os::unix::net::UnixListener::from(socket);
            listener.set_nonblocking(true).map_err(refused)?;
            Ok(Listener::Unix(UnixListener::from_std(listener).map_err(refused)?, file))
        }
        &AdminAddress::Tcp(address) => {
            let is_v6_only = is_v6_only(address, tcp_addresses(addresses));
            match listen_tcp(address, is_v6_only) {
                Ok(listener) => Ok(Listener::Tcp(listener)),
                // Later the daemon hasn't the right to bind a low port.
                Err(error) if is_absent(address, &error) => bind_absent(address)
                    .map(Listener::Tcp)
                    .map_err(|source| BindError::Tcp { address, source }),
                Err(error) if is_waited_for(address, &error) => {
                    let waiting = WaitingListener::new(address, is_v6_only, error);
                    Ok(Listener::Waiting(Arc::new(waiting)))
                }
                Err(source) => Err(BindError::Tcp { address, source }),
            }
        }
    }
}

/// Whether an address may be had later, so that the daemon starts without it: any user may take a port from 1024
/// on, and an address or its interface may come late (DHCP), or be away while the daemon is upgraded.
fn is_waited_for(address: SocketAddr, error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    address.port() >= FIRST_UNPRIVILEGED_PORT
        && matches!(errno, Some(Errno::ADDRINUSE | Errno::ADDRNOTAVAIL | Errno::NODEV))
}

/// Whether an address with a low port is one that no interface has (yet).
fn is_absent(address: SocketAddr, error: &io::Error) -> bool {
    address.port() < FIRST_UNPRIVILEGED_PORT
        && Errno::from_io_error(error) == Some(Errno::ADDRNOTAVAIL)
}

/// Listens on an address that no interface has: connections come once one does.
fn bind_absent(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = tcp_socket(address)?;
    match address {
        SocketAddr::V4(_) => sockopt::set_ip_freebind(&socket, true)?,
        SocketAddr::V6(_) => sockopt::set_ipv6_freebind(&socket, true)?,
    }
    prepared(listen_by(socket, address)?)
}

/// Whether a TCP address, one of `addresses`, can be listened on now.
///
/// # Errors
/// Why it can't, and whether that keeps the daemon from its start.
pub fn try_bind(address: SocketAddr, addresses: &[AdminAddress]) -> Result<(), (BindError, bool)> {
    let is_v6_only = is_v6_only(address, tcp_addresses(addresses));
    listen_std(address, is_v6_only).map(drop).map_err(|source| {
        let is_fatal = !is_waited_for(address, &source) && !is_absent(address, &source);
        (BindError::Tcp { address, source }, is_fatal)
    })
}

fn listen_tcp(address: SocketAddr, is_v6_only: bool) -> io::Result<TcpListener> {
    prepared(listen_std(address, is_v6_only)?)
}

fn listen_std(address: SocketAddr, is_v6_only: bool) -> io::Result<std::net::TcpListener> {
    let socket = tcp_socket(address)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, is_v6_only)?;
    }
    listen_by(socket, address)
}

fn tcp_socket(address: SocketAddr) -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    Ok(socket)
}

fn listen_by(socket: OwnedFd, address: SocketAddr) -> io::Result<std::net::TcpListener> {
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

fn prepared(listener: std::net::TcpListener) -> io::Result<TcpListener> {
    listener.set_nonblocking(true)?;
    // Its connections inherit it.
    sockopt::set_socket_send_buffer_size(&listener, SEND_BUFFER)?;
    TcpListener::from_std(listener)
}

/// Binds a socket to a path. Its file has at most the rights of [`MODE`] from the first moment: Linux
/// gives it those of the socket's own inode, less the umask (unix_bind_bsd in net/unix/af_unix.c).
fn bind_unix(path: &Path) -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, socket_with};
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::fs::fchmod(&socket, rustix::fs::Mode::from_raw_mode(MODE))?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// The TCP addresses that other hosts may reach.
pub fn exposed(addresses: &[AdminAddress]) -> impl Iterator<Item = SocketAddr> {
    addresses.iter().filter_map(|address| match address {
        AdminAddress::Tcp(address) if !address.ip().to_canonical().is_loopback() => Some(*address),
        _ => None,
    })
}

fn make_directory(path: &Path) -> Result<(), BindError> {
    let Some(dir) = path.parent() else { return Ok(()) };
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(dir)
        .map_err(|source| BindError::Directory { dir: dir.to_owned(), source })
}

/// Removes a socket that a daemon left behind, and nothing else.
fn clear_stale(path: &Path, address: &AdminAddress) -> Result<(), BindError> {
    let refused = |source| BindError::Refused { address: address.clone(), source };
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(BindError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(refused(error)),
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(stream) => Err(held(&stream, address)),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(refused)
        }
        // The listener has gone meanwhile.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(refused(error)),
    }
}

/// Who listens at the other end.
fn held(stream: &std::os::unix::net::UnixStream, address: &AdminAddress) -> BindError {
    let address = address.clone();
    // The kernel gives 0 for a process of another PID namespace, which rustix's type can't hold.
    let Ok(peer) = nix::sys::socket::getsockopt(stream, nix::sys::socket::sockopt::PeerCredentials)
    else {
        return BindError::InUse(address);
    };
    let (pid, uid) = (peer.pid(), peer.uid());
    if pid == 0 {
        return BindError::InUse(address);
    }
    let command = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let command = command.trim_end().to_owned();
    BindError::Held { address, pid, command, uid }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unix(path: &Path) -> [AdminAddress; 1] {
        [AdminAddress::Unix(path.to_owned())]
    }

    #[tokio::test]
    async fn a_socket_is_made_with_its_directory_and_goes_with_its_listener() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/nohop/admin.sock");
        let listeners = bind(&unix(&path)).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o660);
        drop(listeners);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_connection_holds_little_that_is_not_read() {
        use rustix::net::sockopt::socket_send_buffer_size;
        let address = AdminAddress::Tcp("127.0.0.1:0".parse().unwrap());
        let listeners = bind(&[address]).unwrap();
        let [Listener::Tcp(listener)] = &listeners[..] else { panic!("it isn't TCP") };
        let _client = tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (connection, _) = listener.accept().await.unwrap();
        // The kernel doubles it (socket(7)).
        assert_eq!(socket_send_buffer_size(&connection).unwrap(), 2 * SEND_BUFFER);
    }

    #[test]
    fn a_socket_is_never_more_open_than_it_should_be() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        let umask = rustix::process::umask(rustix::fs::Mode::empty());
        let socket = bind_unix(&path);
        rustix::process::umask(umask);
        // Not listening yet, so its permissions are set before the first connection.
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, MODE);
        assert!(std::os::unix::net::UnixStream::connect(&path).is_err());
        drop(socket.unwrap());
    }

    #[test]
    fn what_others_may_reach_is_known() {
        let table = [
            ("unix:/run/nohop/admin.sock", false),
            ("127.0.0.1:9153", false),
            ("127.1.2.3:9153", false),
            ("[::1]:9153", false),
            ("[::ffff:127.0.0.1]:9153", false),
            ("0.0.0.0:9153", true),
            ("[::]:9153", true),
            ("10.0.0.7:9153", true),
        ];
        for (address, expected) in table {
            let addresses = [address.parse().unwrap()];
            assert_eq!(exposed(&addresses).count() == 1, expected, "{address}");
        }
    }

    /// On the same port, in either order; alone, that of IPv6 has IPv4, too.
    #[tokio::test]
    async fn both_wildcards_are_listened_on() {
        // No one else gets the port of a socket that is bound and doesn't listen.
        let any = "127.0.0.1:0".parse().unwrap();
        let reserved = tcp_socket(any).unwrap();
        rustix::net::bind(&reserved, &any).unwrap();
        let address = rustix::net::getsockname(&reserved).unwrap();
        let port = SocketAddr::try_from(address).unwrap().port();
        let [v4, v6] = ["0.0.0.0", "[::]"].map(|ip| format!("{ip}:{port}").parse().unwrap());
        let (v4, v6): (AdminAddress, AdminAddress) = (v4, v6);
        for listen in [vec![v4, v6.clone()], vec![v6]] {
            let listeners = bind(&listen).unwrap();
            let waiting: Vec<_> = waiting(&listeners).iter().map(|it| it.problem()).collect();
            assert!(waiting.is_empty(), "{waiting:?}");
            std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
            std::net::TcpStream::connect(("::1", port)).unwrap();
        }
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let _listeners = bind(&unix(&path)).unwrap();
        let error = bind(&unix(&path)).unwrap_err();
        // Whoever it is: another user's process is no daemon.
        let own = rustix::process::geteuid().as_raw();
        let parts = [
            format!("process {} (", std::process::id()),
            format!("of uid {own}) listens at unix:{}", path.display()),
        ];
        assert!(parts.iter().all(|part| error.to_string().contains(part)), "{error}");
        assert!(path.exists());
    }

    #[tokio::test]
    async fn a_file_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        fs::write(&path, "mine").unwrap();
        assert!(matches!(bind(&unix(&path)).unwrap_err(), BindError::NotASocket(_)));
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
    }

    #[tokio::test]
    async fn why_an_address_cannot_be_listened_on() {
        // TEST-NET-1 (RFC 5737), which no interface has.
        let absent = AdminAddress::Tcp("192.0.2.77:9153".parse().unwrap());
        // It may come later. With a low port it is listened on at once.
        let low = AdminAddress::Tcp("192.0.2.77:80".parse().unwrap());
        let bound = bind(&[absent, low]);
        if rustix::process::geteuid().is_root() {
            assert!(matches!(bound.as_ref().unwrap()[1], Listener::Tcp(_)));
        }
        let absent = bind(&[AdminAddress::Tcp("192.0.2.77:9153".parse().unwrap())]).unwrap();
        let absent = waiting(&absent);
        assert_eq!(absent.len(), 1);
        for problem in absent.iter().map(|waiting| waiting.problem().unwrap()) {
            assert!(problem.contains("no interface of this host has 192.0.2.77"), "{problem}");
        }
        for (address, errno, expected) in [
            (
                "127.0.0.1:80",
                libc::EADDRINUSE,
                "another process does; see who with ss -tlpn 'sport = :80'",
            ),
            ("127.0.0.1:80", libc::EACCES, "CAP_NET_BIND_SERVICE"),
            ("127.0.0.1:9153", libc::EACCES, "bind hook"),
            ("127.0.0.1:9153", libc::EPERM, "bind hook"),
            ("[::1]:9153", libc::EAFNOSUPPORT, "this kernel has no IPv6"),
            ("127.0.0.1:9153", libc::ENOBUFS, "No buffer space"),
        ] {
            let (address, source) = (address.parse().unwrap(), io::Error::from_raw_os_error(errno));
            let error = BindError::Tcp { address, source }.to_string();
            assert!(
                error.contains(address.to_string().as_str()) && error.contains(expected),
                "{error}"
            );
        }
    }

    /// Any user may hold such a port.
    #[tokio::test]
    async fn a_port_in_use_is_named_and_waited_for() {
        let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = holder.local_addr().unwrap();
        let listeners = bind(&[AdminAddress::Tcp(address)]).unwrap();
        let [waiting] = &waiting(&listeners)[..] else { panic!("{listeners:?}") };
        assert!(waiting.problem().unwrap().contains(&address.to_string()));
        // What keeps it waiting may be another cause by now.
        let other = io::Error::from_raw_os_error(libc::EADDRNOTAVAIL);
        waiting.fail(other);
        assert!(waiting.problem().unwrap().contains("no interface of this host has 127.0.0.1"));
        let pause = Duration::from_millis(1);
        // It is polled once.
        tokio::time::timeout(Duration::ZERO, waiting.listener(pause)).await.unwrap_err();
        assert!(waiting.problem().unwrap().contains("another process does"));
        drop(holder);
        assert_eq!(waiting.listener(pause).await.local_addr().unwrap(), address);
        assert_eq!(waiting.problem(), None);
    }
}
