//! The log of queries (`dns.log`): a line for each that got a response.

use std::net::SocketAddr;
use std::time::Instant;

use hickory_proto::op::{Query, ResponseCode};
use hickory_proto::serialize::binary::BinDecodable as _;

use super::sockets::Transport;

/// A message that arrived.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arrival {
    /// The sender.
    pub(super) client: SocketAddr,
    /// What it came by.
    pub(super) transport: Transport,
    /// When it was received.
    pub(super) at: Instant,
}

impl Arrival {
    /// Logs the response to its question, with its code, which may have more bits than its header has. A question
    /// that can't be read isn't logged.
    pub(super) fn log(&self, question: &[u8], code: ResponseCode, response: &[u8]) {
        let Ok(query) = Query::from_bytes(question) else { return };
        let (client, transport) = (self.client.ip(), self.transport);
        let (name, kind) = (query.name(), query.query_type());
        let rcode = format!("{code:?}").to_uppercase();
        let answers = n_answers(response);
        let duration_ms = self.at.elapsed().as_micros() as f64 / 1e3;
        tracing::info!(
            target: "nohop::query",
            %client, %transport, %name, %kind, %rcode, answers, duration_ms, "query"
        );
    }
}

/// The number of records in a message's answer section (ANCOUNT).
fn n_answers(message: &[u8]) -> u16 {
    let count = message.get(6..).and_then(<[u8]>::first_chunk);
    count.copied().map_or(0, u16::from_be_bytes)
}
