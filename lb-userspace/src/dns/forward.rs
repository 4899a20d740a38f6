//! Names that aren't ours: the question goes to other resolvers, and their answer comes back.

use std::net::SocketAddr;
use std::time::Duration;

use hickory_proto::op::{Message, Query, ResponseCode};
use tokio::sync::Semaphore;
use tracing::debug;

use super::exchange::{ExchangeError, Outgoing};
use super::sockets::Transport;
use super::upstreams::Upstreams;

/// How much is tried, and for how long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// For one answer of one resolver.
    pub(super) patience: Duration,
    /// How often the list of resolvers is gone through.
    pub(super) n_rounds: usize,
    /// The questions that may be under way at one time.
    pub(super) max_in_flight: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { patience: Duration::from_secs(2), n_rounds: 2, max_in_flight: 512 }
    }
}

/// Why a question got no answer from elsewhere.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ForwardError {
    #[error("too many questions are under way")]
    Busy,
    #[error("there is no resolver to ask but this one")]
    NoUpstream,
    #[error("none of {0} resolvers answered")]
    Unanswered(usize),
}

/// Carries questions to other resolvers; it keeps no answer.
#[derive(Debug)]
pub(super) struct Forwarder {
    upstreams: Upstreams,
    limits: Limits,
    in_flight: Semaphore,
}

impl Forwarder {
    pub(super) fn new(upstreams: Upstreams, limits: Limits) -> Forwarder {
        Forwarder { upstreams, limits, in_flight: Semaphore::new(limits.max_in_flight) }
    }

    /// The resolvers' answer to `question`, the only one of the client's message `bytes`, by the
    /// transport that the client chose. A client over UDP that gets a truncated answer asks again
    /// over TCP, and then the resolver is asked so, too. Over UDP the client takes up to
    /// `max_payload` bytes.
    ///
    /// An answer that says that this resolver can't or won't answer counts only when the others
    /// have none that is better.
    pub(super) async fn forward(
        &self,
        bytes: &[u8],
        question: &Query,
        transport: Transport,
        max_payload: u16,
    ) -> Result<Message, ForwardError> {
        let Ok(_permit) = self.in_flight.try_acquire() else {
            return Err(ForwardError::Busy);
        };
        let servers = self.upstreams.of(&question.name);
        if servers.is_empty() {
            return Err(ForwardError::NoUpstream);
        }
        let outgoing = Outgoing::new(bytes, question);
        let mut refusal = None;
        for _ in 0..self.limits.n_rounds {
            for &server in &*servers {
                match self.ask(server, &outgoing, transport, max_payload).await {
                    Some(answer) if is_refusal(&answer) => {
                        debug!(%server, %question, code = %answer.metadata.response_code, "refused");
                        refusal.get_or_insert(answer);
                    }
                    Some(answer) => return Ok(answer),
                    None => {}
                }
            }
            if let Some(answer) = refusal {
                return Ok(answer);
            }
        }
        Err(ForwardError::Unanswered(servers.len()))
    }

    /// One resolver's answer, where it gives one in time.
    async fn ask(
        &self,
        server: SocketAddr,
        outgoing: &Outgoing<'_>,
        transport: Transport,
        max_payload: u16,
    ) -> Option<Message> {
        let exchange = async {
            match transport {
                Transport::Udp => outgoing.over_udp(server, max_payload.into()).await,
                Transport::Tcp => outgoing.over_tcp(server).await,
            }
        };
        let timed = tokio::time::timeout(self.limits.patience, exchange);
        let answer: Result<Message, ExchangeError> = timed.await.unwrap_or_else(|elapsed| {
            Err(std::io::Error::new(std::io::ErrorKind::TimedOut, elapsed).into())
        });
        answer.inspect_err(|error| debug!(%server, %error, "a resolver gave no answer")).ok()
    }
}

fn is_refusal(answer: &Message) -> bool {
    matches!(
        answer.metadata.response_code,
        ResponseCode::ServFail | ResponseCode::Refused | ResponseCode::NotImp
    )
}
