//! One question to one resolver, and its answer. The caller sets the time limit.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use hickory_proto::op::{Message, Query};
use hickory_proto::rr::Name;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tracing::debug;

use super::answer::MAX_UDP_LEN;
use super::received::Received;

/// The room for an answer over UDP: what a client may get, as some resolvers send more than they
/// were allowed to, and a byte that shows that there was more still.
const BUFFER_LEN: usize = MAX_UDP_LEN as usize + 1;

/// Why a resolver gave no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum ExchangeError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the answer can't be read: it ends within a record, or has two OPT records")]
    Format,
    #[error("the answer has another id, or is none")]
    Id,
    #[error("the answer is to another question")]
    Question,
}

/// A question as it goes to resolvers: the client's bytes, under an id of its own.
#[derive(Debug)]
pub(super) struct Outgoing<'a> {
    bytes: Vec<u8>,
    id: u16,
    question: &'a Query,
}

impl<'a> Outgoing<'a> {
    /// The client's message `bytes`, which asks `question`, under a random id.
    pub(super) fn new(bytes: &[u8], question: &'a Query) -> Outgoing<'a> {
        // hickory draws the id of a new query from a cryptographic source.
        Outgoing::with_id(bytes, Message::query().metadata.id, question)
    }

    /// The message `bytes`, which asks `question`, under this id.
    pub(super) fn with_id(bytes: &[u8], id: u16, question: &'a Query) -> Outgoing<'a> {
        let mut bytes = bytes.to_vec();
        for (byte, id_byte) in bytes.iter_mut().zip(id.to_be_bytes()) {
            *byte = id_byte;
        }
        Outgoing { bytes, id, question }
    }

    /// The name that is asked for.
    pub(super) fn name(&self) -> &Name {
        &self.question.name
    }

    /// Asks over UDP, from a port that the kernel draws, and hears `server` alone. Messages that
    /// are no answer to this question are ignored.
    pub(super) async fn over_udp(&self, server: SocketAddr) -> Result<Received, ExchangeError> {
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
                Err(error @ (ExchangeError::Id | ExchangeError::Question)) => {
                    debug!(%server, %error, "a message of the resolver is ignored");
                }
                checked => return checked,
            }
        }
    }

    /// Asks over TCP.
    pub(super) async fn over_tcp(&self, server: SocketAddr) -> Result<Received, ExchangeError> {
        let mut stream = TcpStream::connect(server).await?;
        let len = u16::try_from(self.bytes.len()).map_err(io::Error::other)?;
        let mut message = Vec::with_capacity(2 + self.bytes.len());
        message.extend(len.to_be_bytes());
        message.extend(&self.bytes);
        stream.write_all(&message).await?; // in one piece: some servers read no second one

        let mut answer = vec![0; usize::from(stream.read_u16().await?)];
        stream.read_exact(&mut answer).await?;
        self.check(&answer)
    }

    /// Whether `bytes` are an answer to this question, and which.
    pub(super) fn check(&self, bytes: &[u8]) -> Result<Received, ExchangeError> {
        if bytes.get(..2) != Some(&self.id.to_be_bytes()) {
            return Err(ExchangeError::Id);
        }
        Received::read(bytes, self.question)
    }
}

#[cfg(test)]
mod tests {
    use super::super::message::HEADER_LEN;
    use super::*;
    use hickory_proto::op::{OpCode, ResponseCode};
    use hickory_proto::rr::RecordType;

    #[test]
    fn answers_are_checked() {
        let query = |name: &str, kind| Query::query(Name::from_ascii(name).unwrap(), kind);
        let asked = query("Example.com.", RecordType::A);
        let outgoing = Outgoing::new(&[0; HEADER_LEN], &asked);
        let id = outgoing.id;

        let answer = |id, queries: &[Query], code| {
            let mut message = Message::error_msg(id, OpCode::Query, code);
            message.add_queries(queries.iter().cloned());
            message.to_vec().unwrap()
        };
        let good = answer(id, std::slice::from_ref(&asked), ResponseCode::NoError);
        let with = |idx: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[idx] = byte;
            bytes
        };
        let lower = [query("example.com.", RecordType::A)];
        let other_name = [query("example.org.", RecordType::A)];
        let other_type = [query("example.com.", RecordType::AAAA)];
        let twice = [asked.clone(), asked.clone()];
        let table = [
            ("good", good.clone(), "ok"),
            ("another case", answer(id, &lower, ResponseCode::NoError), "ok"),
            ("another id", answer(!id, &lower, ResponseCode::NoError), "another id"),
            ("no response", with(2, 0), "another id"),
            ("another opcode", with(2, 0x80 | 5 << 3), "another question"),
            ("another name", answer(id, &other_name, ResponseCode::NoError), "another question"),
            ("another type", answer(id, &other_type, ResponseCode::NoError), "another question"),
            ("two questions", answer(id, &twice, ResponseCode::NoError), "another question"),
            ("no question", answer(id, &[], ResponseCode::NXDomain), "another question"),
            ("an error alone", answer(id, &[], ResponseCode::FormErr), "ok"),
            ("records missing", with(7, 3), "can't be read"),
            ("nothing", Vec::new(), "another id"),
            ("half a header", good[..6].to_vec(), "another id"),
        ];
        for (what, bytes, expected) in table {
            let shown = match outgoing.check(&bytes) {
                Ok(_) => "ok".into(),
                Err(error) => error.to_string(),
            };
            assert!(shown.contains(expected), "{what}: {shown}");
        }

        let mut cut_off = with(7, 3);
        cut_off[2] |= 0x02;
        let received = outgoing.check(&cut_off).unwrap();
        assert!(received.is_truncated() && received.message().unwrap().answers.is_empty());
    }
}
