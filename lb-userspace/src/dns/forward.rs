//! Names that aren't ours: the question goes to other resolvers, and their answer comes back.

use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::Name;
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;
use tracing::debug;

use super::answer::MAX_UDP_LEN;
use super::exchange::{ExchangeError, Outgoing};
use super::health::Health;
use super::lookup::{Origin, Origins};
use super::loops::{self, Loops, Way};
use super::message::Asked;
use super::received::Received;
use super::same::{Key, Same};
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
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ForwardError {
    #[error("too many questions are under way")]
    Busy,
    #[error("it is a question of our own that shows which resolvers lead back here")]
    OwnProbe,
    #[error("there is no resolver to ask but this one")]
    NoUpstream,
    #[error("none of {0} resolvers answered")]
    Unanswered(usize),
}

/// An answer, and who gave it.
#[derive(Clone, Debug)]
pub(super) struct Forwarded {
    pub(super) answer: Received,
    pub(super) server: SocketAddr,
}

/// Carries questions to other resolvers; it keeps no answer.
#[derive(Debug)]
pub(super) struct Forwarder {
    upstreams: Upstreams,
    limits: Limits,
    in_flight: Semaphore,
    same: Same,
    health: Health,
    loops: Loops,
    /// Who wants to know where answers come from.
    pub(super) origins: Origins,
    /// Wakes the search for circles.
    suspicion: Arc<Notify>,
}

impl Forwarder {
    /// Starts to look for circles, too, for as long as the forwarder lives.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub(super) fn start(upstreams: Upstreams, limits: Limits) -> Arc<Forwarder> {
        let forwarder = Arc::new(Forwarder {
            upstreams,
            limits,
            in_flight: Semaphore::new(limits.max_in_flight),
            same: Same::default(),
            health: Health::default(),
            loops: Loops::default(),
            origins: Origins::default(),
            suspicion: Arc::default(),
        });
        let suspicion = Arc::clone(&forwarder.suspicion);
        tokio::spawn(search(Arc::downgrade(&forwarder), suspicion));
        forwarder
    }

    /// The resolvers' answer to `question`, which the client's message asks, by the transport that the client chose. A client over UDP that gets a truncated answer asks again
    /// over TCP, and then the resolver is asked so, too.
    ///
    /// An answer that says that this resolver can't or won't answer counts only when the others
    /// have none that is better.
    pub(super) async fn forward(
        &self,
        asked: &Asked<'_>,
        question: &Query,
        transport: Transport,
    ) -> Result<Forwarded, ForwardError> {
        // Who wants to know may not wait for the end.
        let unanswered = || Origin::Nowhere("no resolver has answered in time".to_owned());
        self.origins.note(asked.bytes(), question, unanswered);
        let forwarded = self.share(asked, question, transport).await;
        self.origins.note(asked.bytes(), question, || match &forwarded {
            Ok(forwarded) => Origin::Upstream(forwarded.server),
            Err(error) => Origin::Nowhere(error.to_string()),
        });
        forwarded
    }

    /// The answer that all get who ask the same at this moment.
    async fn share(
        &self,
        asked: &Asked<'_>,
        question: &Query,
        transport: Transport,
    ) -> Result<Forwarded, ForwardError> {
        if self.loops.is_probe(&question.name) {
            return Err(ForwardError::OwnProbe);
        }
        let under_way = self.same.enter(Key::new(asked, transport));
        if under_way.is_suspicious {
            self.suspicion.notify_one();
        }
        let bytes = asked.with_payload_within(MAX_UDP_LEN);
        under_way.answer(self.carry(&bytes, question, transport)).await
    }

    async fn carry(
        &self,
        bytes: &[u8],
        question: &Query,
        transport: Transport,
    ) -> Result<Forwarded, ForwardError> {
        let Ok(_permit) = self.in_flight.try_acquire() else {
            self.suspicion.notify_one();
            return Err(ForwardError::Busy);
        };
        let outgoing = Outgoing::new(bytes, question);
        let (mut n_servers, mut refusal) = (0, None);
        for _ in 0..self.limits.n_rounds {
            // Each round anew: what was learnt in the one before counts.
            let ways = self.ways(&question.name, transport);
            n_servers = ways.len();
            for way in ways {
                let server = way.server;
                let answer = tokio::select! {
                    answer = self.ask(server, &outgoing, transport) => answer,
                    // Its question may be the one that it waits for itself.
                    () = self.loops.leads_back(&way) => None,
                };
                match answer {
                    Some(answer) if is_refusal(&answer) => {
                        debug!(%server, %question, code = %answer.code(), "refused");
                        refusal.get_or_insert(Forwarded { answer, server });
                    }
                    Some(answer) => return Ok(Forwarded { answer, server }),
                    None => {}
                }
            }
            if let Some(answer) = refusal {
                return Ok(answer);
            }
        }
        match n_servers {
            0 => Err(ForwardError::NoUpstream),
            n_servers => Err(ForwardError::Unanswered(n_servers)),
        }
    }

    /// Whether a question that isn't going to be forwarded is a probe of ours; then it is noted that
    /// it came back.
    pub(super) fn hears_probe(&self, asked: &Asked<'_>) -> bool {
        let is_marked = asked.name.label(1).is_some_and(loops::is_label);
        is_marked && asked.query().is_ok_and(|question| self.loops.is_probe(&question.name))
    }

    /// What is wrong with the upstreams, each with the mend.
    pub(super) fn problems(&self) -> Vec<String> {
        self.loops.problems(&self.upstreams.ways())
    }

    /// The resolvers to ask for a name, in order: none that leads back here, and those that fail
    /// last.
    fn ways(&self, name: &Name, transport: Transport) -> Vec<Way> {
        let (domain, servers) = self.upstreams.of(name);
        let mut servers = servers.to_vec();
        self.health.order(&mut servers, transport, Instant::now());
        let ways = servers.into_iter().map(|server| Way { domain: Arc::clone(&domain), server });
        ways.filter(|way| !self.loops.is_circular(way)).collect()
    }

    /// One resolver's answer, where it gives one in time.
    async fn ask(
        &self,
        server: SocketAddr,
        outgoing: &Outgoing<'_>,
        transport: Transport,
    ) -> Option<Received> {
        let exchange = async {
            match transport {
                Transport::Udp => outgoing.over_udp(server).await,
                Transport::Tcp => outgoing.over_tcp(server).await,
            }
        };
        let timed = tokio::time::timeout(self.limits.patience, exchange);
        let answer: Result<Received, ExchangeError> = timed.await.unwrap_or_else(|elapsed| {
            Err(std::io::Error::new(std::io::ErrorKind::TimedOut, elapsed).into())
        });
        match answer {
            Ok(answer) => {
                self.health.answered(server, transport);
                Some(answer)
            }
            Err(error) => {
                debug!(%server, %error, "a resolver gave no answer");
                self.health.failed(server, transport, outgoing.name(), Instant::now());
                // A resolver that hears its own question again may keep silent, as dnsmasq does.
                self.suspicion.notify_one();
                None
            }
        }
    }

    /// Sends each upstream a question that shows whether it leads back here.
    async fn probe(self: Arc<Self>) {
        let ways = self.upstreams.ways();
        self.loops.keep(&ways);
        let mut probes = JoinSet::new();
        for way in ways {
            let Some(question) = self.loops.probe(&way) else { continue };
            let forwarder = Arc::clone(&self);
            probes.spawn(async move {
                let mut message = Message::query();
                message.add_query(question.clone()).metadata.recursion_desired = true;
                let Ok(bytes) = message.to_vec() else { return };
                let outgoing = Outgoing::new(&bytes, &question);
                let exchange = outgoing.over_udp(way.server);
                let timed = tokio::time::timeout(forwarder.limits.patience, exchange);
                if let Ok(Ok(_)) = timed.await {
                    forwarder.health.answered(way.server, Transport::Udp);
                    forwarder.loops.answered(&question);
                } else if !forwarder.loops.is_circular(&way) {
                    // All probes count as one name.
                    let name = question.name.base_name();
                    forwarder.health.failed(way.server, Transport::Udp, &name, Instant::now());
                }
            });
        }
        while probes.join_next().await.is_some() {}
    }
}

/// How often upstreams are probed.
const PROBE_PERIOD: Duration = Duration::from_secs(60);

/// The time between two searches at least, however suspicious what comes in may look.
const PROBE_PAUSE: Duration = Duration::from_secs(2);

/// How often a change of the upstreams is looked for.
const CHANGE_PERIOD: Duration = Duration::from_secs(5);

/// Probes at the start, every minute, when the upstreams have changed, and when the same question
/// comes suspiciously often, until the forwarder is gone.
async fn search(forwarder: Weak<Forwarder>, suspicion: Arc<Notify>) {
    let mut probed = Vec::new();
    let mut due = Instant::now();
    loop {
        {
            let Some(forwarder) = forwarder.upgrade() else { return };
            let ways = forwarder.upstreams.ways();
            if Instant::now() >= due || ways != probed {
                probed = ways;
                due = Instant::now() + PROBE_PERIOD;
                forwarder.probe().await;
            }
        }
        tokio::time::sleep(PROBE_PAUSE).await;
        if tokio::time::timeout(CHANGE_PERIOD - PROBE_PAUSE, suspicion.notified()).await.is_ok() {
            due = Instant::now();
        }
    }
}

fn is_refusal(answer: &Received) -> bool {
    matches!(answer.code(), ResponseCode::ServFail | ResponseCode::Refused | ResponseCode::NotImp)
}
