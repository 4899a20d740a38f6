//! The query behind `nohop dns query`: it goes through the server's own socket and reports which
//! upstream answered.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::ProtoError;
use hickory_proto::op::{Edns, Message, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};

use super::encode::OUR_PAYLOAD;
use super::handler::Handler;
use super::message::ClientQuery;
use super::origin::AnswerOrigin;
use super::upstream::UpstreamStats;
use super::upstream_query::{UpstreamQuery, UpstreamQueryError};
use crate::config::Unrouted;
use crate::terminal::escape;

/// How long a query may take: less than a client of the admin interface waits.
const TIME_LIMIT: Duration = Duration::from_millis(4500);

/// Why a query has no response.
#[derive(Debug, thiserror::Error)]
pub enum DebugQueryError {
    /// The name can't be parsed.
    #[error("'{}' is not a valid name: {}", escape(name), escape(&source.to_string()))]
    Name {
        /// What was asked for.
        name: String,
        /// What is wrong with it.
        source: ProtoError,
    },
    /// The record type is unknown.
    #[error("unknown record type '{kind}'; use A, AAAA, SRV, PTR, TXT and so on")]
    Type {
        /// What was asked for.
        kind: String,
    },
    /// The server didn't respond in time.
    #[error("no response from {server} within {} s", TIME_LIMIT.as_secs_f64())]
    Silent {
        /// The server.
        server: SocketAddr,
    },
    /// The exchange failed.
    #[error("no response from {server}: {what}")]
    Exchange {
        /// The server.
        server: SocketAddr,
        /// What happened.
        what: String,
    },
}

/// Queries the running server, and reports its upstreams.
#[derive(Clone, Debug)]
pub struct DebugClient {
    handler: Arc<Handler>,
    server: SocketAddr,
    /// What a test replaces.
    pub(super) time_limit: Duration,
}

impl DebugClient {
    pub(super) fn new(handler: Arc<Handler>, server: SocketAddr) -> DebugClient {
        DebugClient { handler, server, time_limit: TIME_LIMIT }
    }

    /// The problems of the upstreams, each with its fix.
    pub fn problems(&self) -> Vec<String> {
        self.handler.forwarder().problems()
    }

    /// Each upstream's state and counters, in the order in which they are asked.
    pub fn upstreams(&self) -> Vec<UpstreamStats> {
        self.handler.forwarder().readings()
    }

    /// The upstreams of all routes, and whether there is one for all names, not only for those of
    /// `dns.routes`.
    pub fn upstream_addresses(&self) -> (BTreeSet<SocketAddr>, bool) {
        let plan = self.handler.forwarder().upstreams.plan();
        (plan.upstreams().map(|upstream| upstream.address).collect(), plan.has_default())
    }

    /// The response for names of the zone that no routed service has.
    pub fn unrouted(&self) -> Unrouted {
        self.handler.unrouted()
    }

    /// Looks a name up, through the server's own socket. If other resolvers take longer than 4.5 s,
    /// the result is SERVFAIL, from nowhere.
    ///
    /// # Errors
    /// When name or type are invalid, or the server itself doesn't answer.
    pub async fn look_up(
        &self,
        name: &str,
        kind: &str,
    ) -> Result<(Message, AnswerOrigin), DebugQueryError> {
        let question = question(name, kind)?;
        let query = query(&question, self.server)?;
        let watched = self.handler.origins.watch(query.id, query.question());
        let silent = DebugQueryError::Silent { server: self.server };
        let answered = tokio::time::timeout(self.time_limit, exchange(&query, self.server)).await;
        match answered.unwrap_or(Err(silent)) {
            Err(DebugQueryError::Silent { .. })
                if !matches!(watched.origin(), AnswerOrigin::Kernel | AnswerOrigin::Own) =>
            {
                let mut answer = Message::response(query.id, OpCode::Query);
                answer.add_query(question).metadata.response_code = ResponseCode::ServFail;
                Ok((answer, watched.origin()))
            }
            answer => answer.map(|answer| (answer, watched.origin())),
        }
    }
}

/// Queries any server over UDP, and over TCP if the response is truncated.
///
/// # Errors
/// When name or type are invalid, or the server doesn't answer within 4.5 s.
pub async fn ask(server: SocketAddr, name: &str, kind: &str) -> Result<Message, DebugQueryError> {
    let query = query(&question(name, kind)?, server)?;
    let answered = tokio::time::timeout(TIME_LIMIT, exchange(&query, server)).await;
    answered.unwrap_or(Err(DebugQueryError::Silent { server }))
}

/// Checks that a name and a type can be asked for.
///
/// # Errors
/// One of them can't.
pub fn check_question(name: &str, kind: &str) -> Result<(), DebugQueryError> {
    question(name, kind).map(drop)
}

fn question(name: &str, kind: &str) -> Result<Query, DebugQueryError> {
    let wrong = |source| DebugQueryError::Name { name: name.to_owned(), source };
    let mut parsed = Name::from_ascii(name).map_err(wrong)?;
    parsed.set_fqdn(true);
    let wrong = |_| DebugQueryError::Type { kind: kind.to_owned() };
    let kind: RecordType = kind.to_uppercase().parse().map_err(wrong)?;
    Ok(Query::query(parsed, kind))
}

fn query(question: &Query, server: SocketAddr) -> Result<UpstreamQuery, DebugQueryError> {
    let mut message = Message::query();
    message.add_query(question.clone()).metadata.recursion_desired = true;
    let mut edns = Edns::new();
    edns.set_max_payload(OUR_PAYLOAD);
    message.set_edns(edns);
    let wrong = |what: String| DebugQueryError::Exchange { server, what };
    let bytes = message.to_vec().map_err(|error| wrong(error.to_string()))?;
    let question_len = ClientQuery::read(&bytes).map(|query| query.question().len());
    let question_len = question_len.map_err(|error| wrong(format!("{error:?}")))?;
    Ok(UpstreamQuery::new(bytes, question_len))
}

async fn exchange(query: &UpstreamQuery, server: SocketAddr) -> Result<Message, DebugQueryError> {
    let wrong = |what: String| DebugQueryError::Exchange { server, what };
    let exchange = async {
        let answer = query.over_udp(server).await?;
        match answer.is_truncated() {
            true => query.over_tcp(server).await,
            false => Ok(answer),
        }
    };
    match exchange.await {
        Ok(answer) => {
            answer.message().map_err(|error| wrong(format!("can't decode the response: {error}")))
        }
        Err(UpstreamQueryError::Io(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
            Err(wrong("connection refused: no server listens there".to_owned()))
        }
        Err(error) => Err(wrong(error.to_string())),
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
            ("a..b", "A", "'a..b' is not a valid name"),
            (long.as_str(), "A", "is not a valid name"),
            ("web", "B", "unknown record type 'B'; use A,"),
        ];
        for (name, kind, expected) in errors {
            let error = question(name, kind).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
