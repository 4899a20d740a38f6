//! Socket activation (sd_listen_fds(3)): the sockets outlive the daemon, so queries that arrive
//! while it is down wait in them.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};

use listenfd::ListenFd;

use super::sockets::{Sockets, Transport, n_sockets};

/// A problem with the passed sockets.
#[derive(Debug, thiserror::Error)]
pub enum ActivationError {
    /// One is neither a datagram nor a listening stream socket of the internet.
    #[error(
        "systemd passed a socket (number {number}) that DNS can't be served on: {source}; let the \
         socket unit have ListenDatagram=ADDR:PORT and ListenStream=ADDR:PORT alone"
    )]
    Kind {
        /// Its place among those passed, from 0.
        number: usize,
        /// What it isn't.
        source: io::Error,
    },
    /// An address is there for one transport alone.
    #[error(
        "systemd passed no {missing} socket for {address}; add {}={address} to the socket unit",
        match missing { Transport::Udp => "ListenDatagram", Transport::Tcp => "ListenStream" }
    )]
    Half {
        /// The address.
        address: SocketAddr,
        /// The transport that isn't there.
        missing: Transport,
    },
}

/// Takes the sockets that this process was started with; `None` where there are none.
pub(super) fn take() -> Result<Option<Sockets>, ActivationError> {
    let mut passed = ListenFd::from_env();
    if passed.len() == 0 {
        return Ok(None);
    }
    let (mut udp, mut tcp) = (Vec::new(), Vec::new());
    for number in 0..passed.len() {
        let fault = |source| ActivationError::Kind { number, source };
        // One that isn't of this kind stays where it is.
        match passed.take_udp_socket(number) {
            Ok(socket) => udp.extend(socket),
            Err(_) => tcp.extend(passed.take_tcp_listener(number).map_err(fault)?),
        }
    }
    pair(udp, tcp).map(Some)
}

/// Finds the addresses of `udp` and `tcp`, which have to be the same.
fn pair(udp: Vec<UdpSocket>, tcp: Vec<TcpListener>) -> Result<Sockets, ActivationError> {
    let address = |number, result: io::Result<SocketAddr>| {
        result.map_err(|source| ActivationError::Kind { number, source })
    };
    let mut udp_addresses = Vec::new();
    for (number, socket) in udp.iter().enumerate() {
        socket.set_nonblocking(true).map_err(|source| ActivationError::Kind { number, source })?;
        udp_addresses.push(address(number, socket.local_addr())?);
    }
    let mut addresses = Vec::new();
    for (number, listener) in tcp.iter().enumerate() {
        listener
            .set_nonblocking(true)
            .map_err(|source| ActivationError::Kind { number, source })?;
        let address = address(number, listener.local_addr())?;
        if !udp_addresses.contains(&address) {
            return Err(ActivationError::Half { address, missing: Transport::Udp });
        }
        addresses.push(address);
    }
    for &address in &udp_addresses {
        if !addresses.contains(&address) {
            return Err(ActivationError::Half { address, missing: Transport::Tcp });
        }
    }
    let udp = share(udp, &udp_addresses)?;
    Ok(Sockets { n_passed: udp.len(), udp, tcp, addresses, ..Sockets::default() })
}

/// Where systemd passed one socket of an address, several threads read it; several of them, which
/// `ReusePort=yes` allows, have a thread each.
fn share(
    sockets: Vec<UdpSocket>,
    addresses: &[SocketAddr],
) -> Result<Vec<UdpSocket>, ActivationError> {
    let mut shared = Vec::new();
    for (number, (socket, address)) in sockets.into_iter().zip(addresses).enumerate() {
        let n_passed = addresses.iter().filter(|other| *other == address).count();
        let n_more = if n_passed == 1 { n_sockets() - 1 } else { 0 };
        for _ in 0..n_more {
            let clone = socket.try_clone();
            shared.push(clone.map_err(|source| ActivationError::Kind { number, source })?);
        }
        shared.push(socket);
    }
    Ok(shared)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_transports_of_each_address() {
        let udp = || UdpSocket::bind("127.0.0.1:0").unwrap();
        let tcp_at = |address| TcpListener::bind(address);
        // A UDP and a TCP socket of one port that is free for both.
        let (udp_socket, tcp_socket) = (0..64)
            .find_map(|_| {
                let udp_socket = udp();
                let tcp_socket = tcp_at(udp_socket.local_addr().unwrap()).ok()?;
                Some((udp_socket, tcp_socket))
            })
            .unwrap();
        let address = udp_socket.local_addr().unwrap();
        let error = |udp, tcp| pair(udp, tcp).unwrap_err().to_string();
        assert_eq!(
            error(vec![udp_socket.try_clone().unwrap()], vec![]),
            format!(
                "systemd passed no tcp socket for {address}; add ListenStream={address} to the \
                 socket unit"
            )
        );
        assert_eq!(
            error(vec![], vec![tcp_socket.try_clone().unwrap()]),
            format!(
                "systemd passed no udp socket for {address}; add ListenDatagram={address} to the \
                 socket unit"
            )
        );
        let sockets = pair(vec![udp_socket], vec![tcp_socket]).unwrap();
        assert_eq!(sockets.addresses(), [address]);
        assert_eq!((sockets.udp.len(), sockets.n_passed), (n_sockets(), n_sockets()));
    }
}
