//! One connection to the agent: TCP, TCP with TLS, or a unix socket.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use http_body_util::Empty;
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

use super::error::QueryError;
use super::tls::Tls;
use crate::config::ConsulAddress;

/// How long the task that moves the bytes has to say why it ended.
const LAST_WORD: Duration = Duration::from_millis(100);

/// A connection; one question at a time goes over it.
pub struct Connection {
    /// The address at the other end; `None` for a unix socket.
    pub peer: Option<IpAddr>,
    sender: SendRequest<Empty<Bytes>>,
    /// The task that moves the bytes; it ends with the connection.
    driver: JoinSet<hyper::Result<()>>,
}

/// What HTTP goes over.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Connection {
    /// Connects within `limit`, TLS included, or gives up.
    pub async fn open(
        address: &ConsulAddress,
        tls: &Tls,
        limit: Duration,
    ) -> Result<Connection, QueryError> {
        let stream = tokio::time::timeout(limit, stream(address, tls)).await;
        let (stream, peer) = stream.unwrap_or_else(|_| {
            let source = io::ErrorKind::TimedOut.into();
            Err(QueryError::Unreachable { address: address.to_string(), source })
        })?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|source| QueryError::of_lost(address.to_string(), source))?;
        let mut driver = JoinSet::new();
        driver.spawn(connection);
        Ok(Connection { peer, sender, driver })
    }

    /// Sends a question, and waits for the head of the answer.
    ///
    /// # Errors
    /// Why the connection ended.
    pub async fn send(
        &mut self,
        request: Request<Empty<Bytes>>,
    ) -> Result<Response<Incoming>, hyper::Error> {
        let sent = match self.sender.ready().await {
            Ok(()) => self.sender.send_request(request).await,
            Err(error) => Err(error),
        };
        let Err(error) = sent else { return sent };
        // The sender knows that it ended, and the driver why.
        match tokio::time::timeout(LAST_WORD, self.driver.join_next()).await {
            Ok(Some(Ok(Err(why)))) => Err(why),
            _ => Err(error),
        }
    }
}

type Opened = (Box<dyn Stream>, Option<IpAddr>);

async fn stream(address: &ConsulAddress, tls: &Tls) -> Result<Opened, QueryError> {
    let unreachable = |source| QueryError::Unreachable { address: address.to_string(), source };
    match address {
        ConsulAddress::Http(authority) => {
            let (stream, peer) = tcp(authority).await.map_err(unreachable)?;
            Ok((Box::new(stream), Some(peer)))
        }
        ConsulAddress::Https(authority) => {
            let bad_file = |what| QueryError::TlsFile { what };
            let server_name = tls.server_name(authority).map_err(bad_file)?;
            let client = tls.client().map_err(bad_file)?;
            let (stream, peer) = tcp(authority).await.map_err(unreachable)?;
            let stream = TlsConnector::from(client).connect(server_name, stream).await;
            let stream =
                stream.map_err(|source| QueryError::of_tls(address.to_string(), source))?;
            Ok((Box::new(stream), Some(peer)))
        }
        ConsulAddress::Unix(path) => {
            Ok((Box::new(UnixStream::connect(path).await.map_err(unreachable)?), None))
        }
    }
}

async fn tcp(authority: &str) -> io::Result<(TcpStream, IpAddr)> {
    let stream = TcpStream::connect(authority).await?;
    stream.set_nodelay(true)?;
    keep_alive(&stream)?;
    let peer = stream.peer_addr()?.ip().to_canonical();
    Ok((stream, peer))
}

/// Has the kernel find out that the other host is gone, within 20 s: no answer would say so.
fn keep_alive(stream: &TcpStream) -> rustix::io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(10))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(3))?;
    sockopt::set_tcp_keepcnt(stream, 3)?;
    sockopt::set_tcp_user_timeout(stream, 20_000)
}
