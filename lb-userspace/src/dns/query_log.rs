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
        // Not as it is displayed, which decodes labels (xn--) to any characters.
        let (name, kind) = (query.name().to_ascii(), query.query_type());
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

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Seek as _};
    use std::sync::Mutex;

    use super::*;

    /// What a client writes into a name forges no field, and has no effect on a terminal.
    #[test]
    fn names_are_logged_in_ascii() {
        let table: [(&[u8], &str); 3] = [
            (b"xn--bcher-kva", "xn--bcher-kva."),
            (b"xn--a rcode=NOERROR-", "xn--a\\040rcode\\=NOERROR-."),
            (b"a\x1b[2J\n", "a\\033\\[2J\\012."),
        ];
        for (label, expected) in table {
            let mut file = tempfile::tempfile().unwrap();
            let out = Mutex::new(file.try_clone().unwrap());
            let lines = tracing_subscriber::fmt().with_ansi(false).with_writer(out).finish();
            let question = [&[label.len() as u8], label, &[0, 0, 1, 0, 1]].concat();
            let client = SocketAddr::from(([127, 0, 0, 1], 5353));
            let arrival = Arrival { client, transport: Transport::Udp, at: Instant::now() };
            tracing::subscriber::with_default(lines, || {
                arrival.log(&question, ResponseCode::NXDomain, &[0; 12]);
            });
            let mut line = String::new();
            file.rewind().unwrap();
            file.read_to_string(&mut line).unwrap();
            let expected = format!(
                "transport=udp name={expected} kind=A rcode=NXDOMAIN answers=0 duration_ms="
            );
            assert!(line.contains(&expected), "{expected:?} isn't in {line:?}");
        }
    }
}
