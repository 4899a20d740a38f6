//! A lookup of our own, that goes the way of everybody's and tells where its answer came from.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hickory_proto::ProtoError;
use hickory_proto::op::{Edns, Message, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};

use super::exchange::{ExchangeError, Outgoing};
use super::server::Handler;
use crate::config::Unrouted;

/// How long a lookup may take: less than a client of the admin interface waits.
const TIME_LIMIT: Duration = Duration::from_millis(4500);

/// The size of UDP answers that a lookup takes: that of the DNS flag day of 2020.
const MAX_PAYLOAD: u16 = 1232;

/// Why a lookup has no answer.
#[derive(Debug, thiserror::Error)]
pub enum LookupError {
    /// The name is none.
    #[error("'{name}' is no name: {source}")]
    Name {
        /// What was asked for.
        name: String,
        /// What is wrong with it.
        source: ProtoError,
    },
    /// The type is none.
    #[error("'{kind}' is no type of record: write A, AAAA, SRV, PTR, TXT and so on")]
    Type {
        /// What was asked for.
        kind: String,
    },
    /// Nothing came.
    #[error("no answer comes from {server} within {} s", TIME_LIMIT.as_secs_f64())]
    Silent {
        /// Who was asked.
        server: SocketAddr,
    },
    /// What came is no answer.
    #[error("no answer comes from {server}: {what}")]
    Exchange {
        /// Who was asked.
        server: SocketAddr,
        /// What happened.
        what: String,
    },
}

/// Where an answer came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// From this server itself.
    Own,
    /// From another resolver, which is this one.
    Upstream(SocketAddr),
    /// It should have come from another resolver, and none gave one, for this reason.
    Nowhere(String),
}

/// Who asks the running server, and what is wrong with its upstreams.
#[derive(Clone, Debug)]
pub struct Inquirer {
    handler: Arc<Handler>,
    server: SocketAddr,
    /// What a test replaces.
    pub(super) time_limit: Duration,
}

impl Inquirer {
    pub(super) fn new(handler: Arc<Handler>, server: SocketAddr) -> Inquirer {
        Inquirer { handler, server, time_limit: TIME_LIMIT }
    }

    /// What is wrong with the upstreams, each with the mend.
    pub fn problems(&self) -> Vec<String> {
        self.handler.forwarder().problems()
    }

    /// What names of the zone get that no service has.
    pub fn unrouted(&self) -> Unrouted {
        self.handler.unrouted()
    }

    /// Looks a name up, through the server's own socket. Where other resolvers take longer than
    /// 4.5 s, that is the answer: SERVFAIL, from nowhere.
    ///
    /// # Errors
    /// When name or type are none, or the server itself doesn't answer.
    pub async fn look_up(&self, name: &str, kind: &str) -> Result<(Message, Origin), LookupError> {
        let question = question(name, kind)?;
        let message = message(&question);
        let forwarder = self.handler.forwarder();
        let watched = forwarder.origins.watch(message.metadata.id, &question);
        let asked = ask_with(&message, &question, self.server, true);
        let silent = LookupError::Silent { server: self.server };
        let answered = tokio::time::timeout(self.time_limit, asked).await;
        match answered.unwrap_or(Err(silent)) {
            Err(LookupError::Silent { .. }) if watched.origin() != Origin::Own => {
                let mut answer = Message::response(message.metadata.id, OpCode::Query);
                answer.add_query(question).metadata.response_code = ResponseCode::ServFail;
                Ok((answer, watched.origin()))
            }
            answer => answer.map(|answer| (answer, watched.origin())),
        }
    }
}

/// Asks any server over UDP, and over TCP where the answer is cut off.
///
/// # Errors
/// When name or type are none, or the server doesn't answer within 4.5 s.
pub async fn ask(server: SocketAddr, name: &str, kind: &str) -> Result<Message, LookupError> {
    let question = question(name, kind)?;
    let message = message(&question);
    let asked = ask_with(&message, &question, server, false);
    let answered = tokio::time::timeout(TIME_LIMIT, asked).await;
    answered.unwrap_or(Err(LookupError::Silent { server }))
}

fn question(name: &str, kind: &str) -> Result<Query, LookupError> {
    let wrong = |source| LookupError::Name { name: name.to_owned(), source };
    let mut parsed = Name::from_ascii(name).map_err(wrong)?;
    parsed.set_fqdn(true);
    let wrong = |_| LookupError::Type { kind: kind.to_owned() };
    let kind: RecordType = kind.to_uppercase().parse().map_err(wrong)?;
    Ok(Query::query(parsed, kind))
}

fn message(question: &Query) -> Message {
    let mut message = Message::query();
    message.add_query(question.clone()).metadata.recursion_desired = true;
    let mut edns = Edns::new();
    edns.set_max_payload(MAX_PAYLOAD);
    message.set_edns(edns);
    message
}

/// `keep_id`: the id is how the server tells this question from others.
async fn ask_with(
    message: &Message,
    question: &Query,
    server: SocketAddr,
    keep_id: bool,
) -> Result<Message, LookupError> {
    let wrong = |what: String| LookupError::Exchange { server, what };
    let bytes = message.to_vec().map_err(|error| wrong(error.to_string()))?;
    let outgoing = match keep_id {
        true => Outgoing::with_id(&bytes, message.metadata.id, question),
        false => Outgoing::new(&bytes, question),
    };
    let exchange = async {
        let answer = outgoing.over_udp(server).await?;
        match answer.is_truncated() {
            true => outgoing.over_tcp(server).await,
            false => Ok(answer),
        }
    };
    match exchange.await {
        Ok(answer) => answer
            .message()
            .map_err(|error| wrong(format!("the answer can't be taken apart: {error}"))),
        Err(ExchangeError::Io(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
            Err(wrong("nobody listens there".to_owned()))
        }
        Err(error) => Err(wrong(error.to_string())),
    }
}

/// What tells one question from another.
type Key = (u16, Name, RecordType);

/// The questions whose origin somebody wants to know.
#[derive(Debug, Default)]
pub(super) struct Origins {
    /// The number of them, so that others needn't look.
    n_watched: AtomicUsize,
    watched: Mutex<HashMap<Key, Origin>>,
}

/// A question whose origin somebody wants to know, until this is dropped.
#[derive(Debug)]
struct Watched<'a> {
    origins: &'a Origins,
    key: Key,
}

impl Origins {
    fn watch(&self, id: u16, question: &Query) -> Watched<'_> {
        let key = (id, question.name.clone(), question.query_type);
        let mut watched = self.lock();
        watched.insert(key.clone(), Origin::Own);
        self.n_watched.store(watched.len(), Ordering::Relaxed);
        Watched { origins: self, key }
    }

    /// Notes where the answer to the question in `bytes` came from, where somebody wants to know.
    pub(super) fn note(&self, bytes: &[u8], question: &Query, origin: impl FnOnce() -> Origin) {
        if self.n_watched.load(Ordering::Relaxed) == 0 {
            return;
        }
        let [high, low, ..] = *bytes else { return };
        let id = u16::from_be_bytes([high, low]);
        let key = (id, question.name.clone(), question.query_type);
        if let Some(known) = self.lock().get_mut(&key) {
            *known = origin();
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Origin>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watched<'_> {
    fn origin(&self) -> Origin {
        self.origins.lock().get(&self.key).cloned().unwrap_or(Origin::Own)
    }
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        let mut watched = self.origins.lock();
        watched.remove(&self.key);
        self.origins.n_watched.store(watched.len(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions() {
        let table = [
            ("web.service", "a", "web.service. IN A"),
            ("web.service.", "SRV", "web.service. IN SRV"),
            ("Web.Service", "AAAA", "Web.Service. IN AAAA"),
            (".", "NS", ". IN NS"),
        ];
        for (name, kind, expected) in table {
            assert_eq!(question(name, kind).unwrap().to_string(), expected);
        }
        let long = format!("{}.service", "x".repeat(64));
        let errors = [
            ("a..b", "A", "'a..b' is no name"),
            (long.as_str(), "A", "is no name"),
            ("web", "B", "'B' is no type of record: write A,"),
        ];
        for (name, kind, expected) in errors {
            let error = question(name, kind).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn only_the_watched_question_has_its_origin_noted() {
        let origins = Origins::default();
        let [web, other] = ["web.example", "web2.example"].map(|name| question(name, "A").unwrap());
        let server = SocketAddr::from(([192, 0, 2, 1], 53));
        let note = |id: u16, question: &Query| {
            origins.note(&id.to_be_bytes(), question, || Origin::Upstream(server));
        };
        note(7, &web);
        let watched = origins.watch(7, &web);
        assert_eq!(watched.origin(), Origin::Own);
        note(7, &other);
        note(8, &web);
        assert_eq!(watched.origin(), Origin::Own);
        note(7, &web);
        assert_eq!(watched.origin(), Origin::Upstream(server));
        drop(watched);
        assert!(origins.lock().is_empty());
        origins.note(&[], &web, || Origin::Own);
    }
}
