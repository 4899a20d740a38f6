//! Closes TCP connections by VIPs to backends that left, once their deadline has passed.

use std::net::SocketAddr;

use lb_common::{Address, RevNat};

use super::conns::{TcpConns, canonical};
use super::diag;

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
    /// By what its socket remembers.
    fn of(revnat: &RevNat) -> VipConnection {
        let at = |address: Address, port: u16| canonical(SocketAddr::from((address.octets, port)));
        VipConnection {
            frontend: at(revnat.frontend, revnat.frontend_port),
            backend: at(revnat.backend, revnat.backend_port),
        }
    }
}

/// Reads what sockets remember, and aborts them.
#[derive(Clone, Debug)]
pub struct TcpTerminator {
    conns: TcpConns,
}

impl TcpTerminator {
    /// A terminator of these connections.
    pub fn new(conns: TcpConns) -> TcpTerminator {
        TcpTerminator { conns }
    }

    /// Why nothing could be closed here, as far as that can be known before.
    pub fn problem() -> Option<String> {
        diag::abort_problem().map(|error| error.to_string())
    }

    /// The connections by VIPs. Blocks: see [`TcpConns::list`].
    ///
    /// # Errors
    /// Why some couldn't be listed.
    pub fn list(&self) -> Result<Vec<VipConnection>, String> {
        let listed = self.conns.list()?;
        Ok(listed.conns.iter().map(|(_, revnat)| VipConnection::of(revnat)).collect())
    }

    /// Closes these connections, in every network namespace, and no others. Returns how many, and what
    /// failed. Blocks: see [`TcpConns::abort`].
    pub fn close(&self, chosen: &[VipConnections]) -> (usize, Option<String>) {
        self.conns.abort(|revnat| {
            let connection = VipConnection::of(revnat);
            chosen.iter().any(|chosen| chosen.has(&connection))
        })
    }
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
