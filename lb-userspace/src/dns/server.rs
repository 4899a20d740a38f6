//! The server: hickory's sockets in front, the zone and the forwarder behind.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hickory_net::runtime::Time;
use hickory_net::xfer::Protocol;
use hickory_proto::op::{Edns, Header, HeaderCounts, Message, Metadata, Query, ResponseCode};
use hickory_proto::serialize::binary::BinDecoder;
use hickory_server::server::{Request, RequestHandler, ResponseHandler, ResponseInfo};
use hickory_server::zone_handler::{MessageResponseBuilder, Queries};
use tokio::sync::watch;
use tracing::{debug, warn};

use super::answer::{Answer, Asked, Known, Verdict, Zone};
use super::forward::{Forwarder, Limits};
use super::sockets::Sockets;
use super::stats::{Stats, rcode};
use super::upstreams::Upstreams;
use crate::catalog::Demand;
use crate::config::DnsConfig;
use crate::table::{Table, Watch};

/// A TCP connection that asks nothing for so long is closed.
const TCP_IDLE: Duration = Duration::from_secs(10);
/// The answers that wait to be written to one TCP connection. hickory reads the next question when
/// it has dealt with the one before, so there are never more than a few.
const TCP_ANSWERS: usize = 8;
/// The longest answer over UDP, whatever size the client allows: also the size of hickory's buffer
/// for questions.
const MAX_UDP_LEN: u16 = 4096;
/// What a stop may take.
const STOP_TIMEOUT: Duration = Duration::from_millis(500);

/// The DNS server, which answers from when it is started until it is stopped or dropped.
pub struct Server {
    hickory: hickory_server::Server<Handler>,
    live: watch::Sender<Arc<Live>>,
    stats: Arc<Stats>,
    /// The addresses that are listened on.
    own: Vec<SocketAddr>,
    surroundings: Surroundings,
}

/// What may be replaced while the server runs. A question that is under way keeps what it found.
struct Live {
    zone: Zone,
    forwarder: Arc<Forwarder>,
    demand: Demand,
}

impl Live {
    fn new(
        config: &DnsConfig,
        own: &[SocketAddr],
        surroundings: &Surroundings,
        demand: Demand,
    ) -> Live {
        let upstreams = Upstreams::new(config, own, surroundings.resolv_conf.clone());
        Live {
            zone: Zone::new(&config.domain, config.ttl),
            forwarder: Arc::new(Forwarder::new(upstreams, surroundings.limits)),
            demand,
        }
    }
}

/// What a test replaces.
#[derive(Debug)]
pub(super) struct Surroundings {
    pub(super) resolv_conf: PathBuf,
    pub(super) limits: Limits,
}

impl Default for Surroundings {
    fn default() -> Surroundings {
        Surroundings { resolv_conf: "/etc/resolv.conf".into(), limits: Limits::default() }
    }
}

impl Server {
    /// Serves `sockets`. Each answer comes from the `table` of that moment; while `attached` is
    /// false, dials to VIPs would go astray, so the zone answers SERVFAIL.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub fn start(
        sockets: Sockets,
        config: &DnsConfig,
        table: watch::Receiver<Arc<Table>>,
        attached: watch::Receiver<bool>,
        demand: Demand,
    ) -> Server {
        Server::start_in(Surroundings::default(), sockets, config, table, attached, demand)
    }

    pub(super) fn start_in(
        surroundings: Surroundings,
        sockets: Sockets,
        config: &DnsConfig,
        table: watch::Receiver<Arc<Table>>,
        attached: watch::Receiver<bool>,
        demand: Demand,
    ) -> Server {
        let own = sockets.addresses().to_vec();
        let live = watch::Sender::new(Arc::new(Live::new(config, &own, &surroundings, demand)));
        let stats = Arc::<Stats>::default();
        let mut hickory = hickory_server::Server::new(Handler {
            live: live.subscribe(),
            table,
            attached,
            stats: stats.clone(),
        });
        for socket in sockets.udp {
            hickory.register_socket(socket);
        }
        for listener in sockets.tcp {
            hickory.register_listener(listener, TCP_IDLE, TCP_ANSWERS);
        }
        Server { hickory, live, stats, own, surroundings }
    }

    /// Takes over what can change while the server runs: the TTL, and where other names go. The
    /// zone's name and the addresses to listen on have to be those of the start.
    pub fn reconfigure(&self, config: &DnsConfig) {
        let demand = self.live.borrow().demand.clone();
        let live = Live::new(config, &self.own, &self.surroundings, demand);
        self.live.send_replace(Arc::new(live));
    }

    /// Says from now on to `demand` which services are used.
    pub fn set_demand(&self, demand: Demand) {
        self.live.send_modify(|live| {
            let Live { zone, forwarder, .. } = &**live;
            let (zone, forwarder) = (zone.clone(), forwarder.clone());
            *live = Arc::new(Live { zone, forwarder, demand });
        });
    }

    /// What the server counts.
    pub fn stats(&self) -> Arc<Stats> {
        self.stats.clone()
    }

    /// Stops listening and drops what is under way, within half a second.
    pub async fn stop(mut self) {
        match tokio::time::timeout(STOP_TIMEOUT, self.hickory.shutdown_gracefully()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!("the DNS server ended with an error: {error}"),
            Err(_) => warn!("the DNS server took too long to stop, so it was cut off"),
        }
    }
}

/// Answers the messages that hickory could read; it answers FORMERR to others itself.
struct Handler {
    live: watch::Receiver<Arc<Live>>,
    table: watch::Receiver<Arc<Table>>,
    attached: watch::Receiver<bool>,
    stats: Arc<Stats>,
}

#[async_trait::async_trait]
impl RequestHandler for Handler {
    async fn handle_request<R: ResponseHandler, T: Time>(
        &self,
        request: &Request,
        mut response_handler: R,
    ) -> ResponseInfo {
        let message = self.reply(request).await;
        self.stats.count(rcode(message.metadata.response_code));
        let no_queries;
        let mut builder = match request.queries.len() {
            1 => MessageResponseBuilder::from_message_request(request),
            // An error alone: many questions might not even fit into an answer.
            _ => match Queries::read(&mut BinDecoder::new(&[]), 0) {
                Ok(queries) => {
                    no_queries = queries;
                    MessageResponseBuilder::new(&no_queries, None)
                }
                Err(_) => MessageResponseBuilder::from_message_request(request),
            },
        };
        if let Some(edns) = &message.edns {
            builder.edns(edns);
        }
        let Message { metadata, answers, authorities, additionals, .. } = &message;
        let response =
            builder.build(*metadata, answers, authorities, std::iter::empty(), additionals);
        match response_handler.send_response(response).await {
            Ok(info) => info,
            Err(error) => {
                debug!(client = %request.src(), %error, "an answer was lost");
                Header { metadata: *metadata, counts: HeaderCounts::default() }.into()
            }
        }
    }
}

impl Handler {
    /// Says that a service is used, and waits a moment for one that isn't live.
    async fn warm(&self, demand: &Demand, name: &str) {
        let mut table = self.table.clone();
        let is_live = |table: &Arc<Table>| {
            table.services.get(name).is_some_and(|service| service.watch == Watch::Live)
        };
        if is_live(&table.borrow()) {
            return demand.used(name);
        }
        let warming = async {
            if demand.look_up(name).await {
                let _ = table.wait_for(is_live).await;
            }
        };
        let _ = tokio::time::timeout(WARMING, warming).await;
    }

    /// The message that answers `request`, but for its question section.
    async fn reply(&self, request: &Request) -> Message {
        let asked = Asked {
            op_code: request.metadata.op_code,
            edns_version: request.version(),
            questions: request.queries.queries(),
        };
        let live = Arc::clone(&self.live.borrow());
        if let Some(name) = live.zone.service_asked(&asked) {
            self.warm(&live.demand, &name).await;
        }
        let verdict = {
            let table = Arc::clone(&self.table.borrow());
            let attached = *self.attached.borrow();
            live.zone.judge(asked, Known { table: &table, attached })
        };
        match verdict {
            Verdict::Answer(answer) => local(request, answer),
            Verdict::Forward(question) => match live.forwarder.forward(request, question).await {
                Ok(message) => forwarded(request, question, message),
                Err(error) => {
                    debug!(client = %request.src(), %question, "not forwarded: {error}");
                    local(request, Answer::error(ResponseCode::ServFail))
                }
            },
        }
    }
}

/// How long an answer waits for a service that isn't live, before it tells what is known.
const WARMING: Duration = Duration::from_millis(250);

/// The size of UDP messages that the client takes, within ours.
fn max_udp_len(request: &Request) -> u16 {
    request.max_payload().min(MAX_UDP_LEN)
}

/// Our own answer as a message.
fn local(request: &Request, answer: Answer) -> Message {
    let mut message = Message::response(request.metadata.id, request.metadata.op_code);
    message.metadata = Metadata::response_from_request(&request.metadata);
    message.metadata.recursion_available = true;
    message.metadata.authoritative = answer.authoritative;
    message.metadata.response_code = answer.code;
    message.answers = answer.answers;
    message.authorities = answer.authorities;
    message.edns = request.edns.as_ref().map(|theirs| {
        let mut edns = Edns::new();
        // hickory takes the response's size for the client's.
        edns.set_max_payload(max_udp_len(request)).set_dnssec_ok(theirs.flags().dnssec_ok);
        edns
    });
    message
}

/// A resolver's answer as the message for the client: the same, but for what belongs to one hop.
fn forwarded(request: &Request, question: &Query, mut message: Message) -> Message {
    message.metadata.id = request.metadata.id;
    message.metadata.recursion_available = true;
    message.queries = vec![question.clone()];
    message.edns = message.edns.filter(|_| request.edns.is_some());
    if let Some(edns) = &mut message.edns {
        edns.set_max_payload(max_udp_len(request));
    } else if message.metadata.response_code.high() > 0 {
        // A code that only EDNS can carry.
        message.metadata.response_code = ResponseCode::ServFail;
    }

    // hickory would cut the message where it is full, and lose the OPT record.
    let max_len = message.edns.as_ref().map_or(512, Edns::max_payload);
    let fits = request.protocol() != Protocol::Udp
        || message.to_vec().is_ok_and(|bytes| bytes.len() <= usize::from(max_len));
    if fits { message } else { message.truncate() }
}
