//! Connections that the daemon itself makes to backends, by TCP and from its own network namespace, to
//! find out whether they can be reached. The hooks bypass the daemon's connections.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::table::first_contact::Probe;

/// The time limit of a connection: a SYN and one retransmission of it (RFC 6298: after 1 s) are enough for
/// a backend that is to serve.
pub const LIMIT: Duration = Duration::from_secs(1);

/// The probes under way; dropping it ends them.
#[derive(Debug, Default)]
pub struct BackendProber(JoinSet<(Probe, Result<(), String>)>);

impl BackendProber {
    /// Begins a probe. The caller bounds their number.
    pub fn begin(&mut self, probe: Probe) {
        self.0.spawn(async move {
            let result = connect(probe.address).await.map_err(|error| describe(&error));
            (probe, result)
        });
    }

    /// The next result; waits for ever while no probe is under way. Cancel safe.
    pub async fn ended(&mut self) -> (Probe, Result<(), String>) {
        loop {
            match self.0.join_next().await {
                Some(Ok(ended)) => return ended,
                // Neither aborted nor able to panic.
                Some(Err(_)) => {}
                None => return std::future::pending().await,
            }
        }
    }

    /// A further result that is there already.
    pub fn try_ended(&mut self) -> Option<(Probe, Result<(), String>)> {
        self.0.try_join_next()?.ok()
    }
}

/// Connects, and closes the connection.
///
/// # Errors
/// As connect(2); `TimedOut` after [`LIMIT`].
pub async fn connect(address: SocketAddr) -> io::Result<()> {
    match timeout(LIMIT, TcpStream::connect(address)).await {
        Ok(result) => result.map(drop),
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// An error of [`connect`] without the number that Rust adds to it.
pub fn describe(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::TimedOut => format!("no answer within {LIMIT:?}"),
        kind @ (io::ErrorKind::ConnectionRefused
        | io::ErrorKind::HostUnreachable
        | io::ErrorKind::NetworkUnreachable
        | io::ErrorKind::ConnectionReset) => kind.to_string(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_connection_is_refused_until_something_listens() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        connect(address).await.unwrap();
        drop(listener);
        let error = connect(address).await.unwrap_err();
        assert_eq!(describe(&error), "connection refused");
        assert_eq!(describe(&io::ErrorKind::TimedOut.into()), "no answer within 1s");
    }
}
