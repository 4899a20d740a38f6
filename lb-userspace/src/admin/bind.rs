//! The sockets of the admin interface.

use std::fs;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::net::{TcpListener, UnixListener};

use crate::config::AdminAddress;

/// Who may use the socket: root and its group.
const MODE: u32 = 0o660;

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
    /// bind() or listen() failed for another reason.
    #[error("can't listen on {address}: choose an address of your own with --admin-listen")]
    Refused {
        /// The address.
        address: AdminAddress,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

/// A socket that listens.
#[derive(Debug)]
pub enum Listener {
    /// On a path.
    Unix(UnixListener, SocketFile),
    /// On an address and port.
    Tcp(TcpListener),
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

/// Listens on each address. The directory of a unix socket is created if it is missing, a stale socket
/// is replaced, and root's group may use the new one (0660).
///
/// Call it within a tokio runtime.
///
/// # Errors
/// For the first address that can't be listened on; then none is.
pub fn bind(addresses: &[AdminAddress]) -> Result<Vec<Listener>, BindError> {
    addresses.iter().map(bind_one).collect()
}

fn bind_one(address: &AdminAddress) -> Result<Listener, BindError> {
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
        AdminAddress::Tcp(socket_address) => {
            let listener = std::net::TcpListener::bind(socket_address).map_err(refused)?;
            listener.set_nonblocking(true).map_err(refused)?;
            // Its connections inherit it.
            rustix::net::sockopt::set_socket_send_buffer_size(&listener, SEND_BUFFER)
                .map_err(|error| refused(error.into()))?;
            Ok(Listener::Tcp(TcpListener::from_std(listener).map_err(refused)?))
        }
    }
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
    let Ok(peer) = rustix::net::sockopt::socket_peercred(stream) else {
        return BindError::InUse(address);
    };
    let pid = peer.pid.as_raw_nonzero().get();
    let command = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let (command, uid) = (command.trim_end().to_owned(), peer.uid.as_raw());
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
    async fn a_port_in_use_is_named() {
        let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = AdminAddress::Tcp(holder.local_addr().unwrap());
        assert!(matches!(bind(&[address]).unwrap_err(), BindError::InUse(_)));
    }
}
