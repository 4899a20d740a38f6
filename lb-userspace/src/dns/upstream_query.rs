//! One query to one upstream on a socket of its own: over TCP, probes, and those of the command
//! line, which are all rare. The caller sets the time limit.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tracing::debug;

use super::message::{HEADER_LEN, RD};
use super::random::Random;
use super::response::{ResponseError, UpstreamResponse};
use super::sockets::Transport;

/// The buffer for a response over UDP: more than the size that we advertise, as some resolvers send
/// more, and one byte that shows that there was still more.
const BUFFER_LEN: usize = 4097;

/// Why a resolver gave no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum UpstreamQueryError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    ResponseError(#[from] ResponseError),
}

/// A query as it goes to a resolver.
#[derive(Clone, Debug)]
pub(super) struct UpstreamQuery {
    bytes: Vec<u8>,
    pub(super) id: u16,
    question_len: usize,
}

impl UpstreamQuery {
    /// The query `bytes`, whose question is `question_len` long, under a random id.
    pub(super) fn new(mut bytes: Vec<u8>, question_len: usize) -> UpstreamQuery {
        let id = Random::new().u16();
        if let Some(place) = bytes.first_chunk_mut() {
            *place = id.to_be_bytes();
        }
        UpstreamQuery { bytes, id, question_len }
    }

    /// The question: name, type and class.
    pub(super) fn question(&self) -> &[u8] {
        self.bytes.get(HEADER_LEN..HEADER_LEN + self.question_len).unwrap_or_default()
    }

    /// A query for nothing but this question.
    pub(super) fn of(question: &[u8], recursion_desired: bool) -> UpstreamQuery {
        let rd = if recursion_desired { RD } else { 0 };
        let header = [0, 0, rd, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        UpstreamQuery::new([&header, question].concat(), question.len())
    }

    /// Asks over UDP or TCP.
    pub(super) async fn over(
        &self,
        transport: Transport,
        server: SocketAddr,
    ) -> Result<UpstreamResponse<'static>, UpstreamQueryError> {
        match transport {
            Transport::Udp => self.over_udp(server).await,
            Transport::Tcp => self.over_tcp(server).await,
        }
    }

    /// Asks over UDP, from a port that the kernel draws, and takes answers of `server` alone.
    /// Messages that are no answer to this question are ignored.
    pub(super) async fn over_udp(
        &self,
        server: SocketAddr,
    ) -> Result<UpstreamResponse<'static>, UpstreamQueryError> {
        let local = match server {
            SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
        };
        let socket = UdpSocket::bind(local).await?;
        socket.connect(server).await?;
        socket.send(&self.bytes).await?;
        let mut buffer = vec![0; BUFFER_LEN];
        loop {
            let len = socket.recv(&mut buffer).await?;
            if len == BUFFER_LEN {
                buffer[2] |= 0x02; // the kernel cut it off
            }
            match self.check(&buffer[..len]) {
                Err(error @ (ResponseError::Id | ResponseError::Question)) => {
                    debug!(%server, %error, "a message of the resolver is ignored");
                }
                checked => return Ok(checked?.into_owned()),
            }
        }
    }

    /// Asks over TCP.
    pub(super) async fn over_tcp(
        &self,
        server: SocketAddr,
    ) -> Result<UpstreamResponse<'static>, UpstreamQueryError> {
        let mut stream = TcpStream::connect(server).await?;
        let len = u16::try_from(self.bytes.len()).map_err(io::Error::other)?;
        let message = [&len.to_be_bytes(), &self.bytes[..]].concat();
        stream.write_all(&message).await?; // one segment: some servers read no second one

        let mut answer = vec![0; usize::from(stream.read_u16().await?)];
        stream.read_exact(&mut answer).await?;
        Ok(self.check(&answer)?.into_owned())
    }

    /// Parses `bytes` if they are a response to this query.
    pub(super) fn check<'a>(&self, bytes: &'a [u8]) -> Result<UpstreamResponse<'a>, ResponseError> {
        if bytes.get(..2) != Some(&self.id.to_be_bytes()) {
            return Err(ResponseError::Id);
        }
        UpstreamResponse::read(bytes, self.question())
    }
}
