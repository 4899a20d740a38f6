//! Closes TCP connections by VIPs to backends that left, once their deadline has passed.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::PathBuf;

use aya::maps::MapData;
use lb_common::{Address, RevNat};
use zerocopy::FromBytes;

use super::diag::{self, Stored};

/// Which connections are to be closed: those by these frontends to this backend.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct VipConnections {
    /// What they connected to; port 0 stands for all ports.
    pub frontends: Vec<SocketAddr>,
    /// Where they went.
    pub backend: SocketAddr,
}

impl VipConnections {
    /// Whether a connection is one of them.
    pub fn has(&self, connection: &VipConnection) -> bool {
        let any_port = SocketAddr::new(connection.frontend.ip(), 0);
        connection.backend == self.backend
            && (self.frontends.contains(&connection.frontend) || self.frontends.contains(&any_port))
    }
}

/// A TCP connection of this host by a VIP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VipConnection {
    /// What it connected to.
    pub frontend: SocketAddr,
    /// Where it goes.
    pub backend: SocketAddr,
}

impl VipConnection {
    /// What the socket remembers, whatever layout the maps had when it connected; `None` for one that
    /// connected to its peer itself, also after it was connected by a VIP once.
    fn of(socket: &Stored) -> Option<VipConnection> {
        let kept = RevNat::read_from_bytes(&socket.storage).ok()?;
        let at = |address: Address, port: u16| canonical(SocketAddr::from((address.octets, port)));
        let backend = at(kept.backend, kept.backend_port);
        let is_its = backend == canonical(socket.destination);
        is_its.then(|| VipConnection { frontend: at(kept.frontend, kept.frontend_port), backend })
    }
}

/// Reads what sockets remember, and aborts them.
#[derive(Clone, Debug)]
pub struct TcpTerminator {
    /// Where the sockets' storages are pinned.
    storages: PathBuf,
}

impl TcpTerminator {
    /// A terminator that reads what sockets remember from the map that is pinned in `storages`.
    pub fn new(storages: PathBuf) -> TcpTerminator {
        TcpTerminator { storages }
    }

    /// Why nothing could be closed here, as far as that can be known before.
    pub fn problem() -> Option<String> {
        diag::abort_problem().map(|error| error.to_string())
    }

    /// The connections by VIPs. Blocks: see [`diag::stored_tcp`].
    ///
    /// # Errors
    /// Why some couldn't be listed.
    pub fn list(&self) -> Result<Vec<VipConnection>, String> {
        let storage = self.storage()?;
        let (sockets, errors) = diag::stored_tcp(storage.fd().as_fd());
        if let Some(error) = errors.first() {
            return Err(error.to_string());
        }
        let connections = sockets.values().filter_map(VipConnection::of);
        Ok(connections.collect())
    }

    /// Closes these connections, in every network namespace, and no others. Returns how many, and what
    /// failed. Blocks: see [`diag::abort_tcp`].
    pub fn close(&self, chosen: &[VipConnections]) -> (usize, Option<String>) {
        let storage = match self.storage() {
            Ok(storage) => storage,
            Err(error) => return (0, Some(error)),
        };
        let is_chosen = |socket: &Stored| {
            VipConnection::of(socket)
                .is_some_and(|connection| chosen.iter().any(|chosen| chosen.has(&connection)))
        };
        let (n_closed, errors) = diag::abort_tcp(storage.fd().as_fd(), is_chosen);
        (n_closed, errors.first().map(ToString::to_string))
    }

    fn storage(&self) -> Result<MapData, String> {
        MapData::from_pin(self.storages.join("SK_REVNAT"))
            .map_err(|error| format!("can't read what sockets connected to: {error}"))
    }
}

/// With an IPv4 address as what it is, also where a socket has it in IPv6's form.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_chosen_by_vip_and_backend() {
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        let chosen = VipConnections {
            frontends: vec![address("127.128.0.1:0"), address("127.0.0.1:80")],
            backend: address("10.0.0.1:8080"),
        };
        for (frontend, backend, expected) in [
            ("127.128.0.1:80", "10.0.0.1:8080", true),
            ("127.128.0.1:5432", "10.0.0.1:8080", true),
            ("127.0.0.1:80", "10.0.0.1:8080", true),
            ("127.0.0.1:81", "10.0.0.1:8080", false),
            ("127.128.0.2:80", "10.0.0.1:8080", false),
            ("127.128.0.1:80", "10.0.0.1:8081", false),
            ("127.128.0.1:80", "10.0.0.2:8080", false),
        ] {
            let (frontend, backend) = (address(frontend), address(backend));
            let connection = VipConnection { frontend, backend };
            assert_eq!(chosen.has(&connection), expected, "{connection:?}");
        }
    }
}
