//! The server: sockets in front, the zone and the forwarder behind.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tracing::{debug, warn};

use super::answer::{self, Known, MAX_UDP_LEN, Outcome, Snapshot, Zone};
use super::clients::{Admission, Clients};
use super::forward::{Forwarded, Forwarder, Limits};
use super::lookup::Inquirer;
use super::message::Asked;
use super::reply::{self, Code};
use super::sockets::{DnsError, Sockets, Transport};
use super::stats::Stats;
use super::tcp::{self, Connections};
use super::told::Told;
use super::udp::{self, Endpoint, Stop, To};
use super::upstreams::Upstreams;
use crate::catalog::Demand;
use crate::config::{DnsConfig, Unrouted, VipConfig};
use crate::table::{Service, Table, Watch};

/// What a stop may take.
const STOP_TIMEOUT: Duration = Duration::from_millis(500);

/// How long after the start questions for the zone wait for it, where sockets were passed: those
/// that came while there was no daemon get more than SERVFAIL, and the first daemon of a machine
/// whose source is down still answers soon.
const GRACE: Duration = Duration::from_secs(2);

/// How long an answer waits for a service that isn't live, before it tells what is known.
const WARMING: Duration = Duration::from_millis(250);

/// The UDP questions that wait for others at one time: what is beyond is answered at once, as well
/// as can be. It is more than the forwarder takes, so that names of the zone find room.
const MAX_WAITING: usize = 1024;

/// The DNS server, which answers from when it is started until it is stopped or dropped.
pub struct Server {
    handler: Arc<Handler>,
    own: Vec<SocketAddr>,
    resolv_conf: PathBuf,
    limits: Limits,
    stop: Arc<Stop>,
    stopped: watch::Sender<bool>,
    threads: Vec<JoinHandle<()>>,
    listeners: JoinSet<()>,
}

/// What a test replaces.
#[derive(Debug)]
pub(super) struct Surroundings {
    pub(super) resolv_conf: PathBuf,
    pub(super) limits: Limits,
    /// How long a TCP client is waited for.
    pub(super) tcp_patience: Duration,
}

impl Default for Surroundings {
    fn default() -> Surroundings {
        Surroundings {
            resolv_conf: "/etc/resolv.conf".into(),
            limits: Limits::default(),
            tcp_patience: tcp::PATIENCE,
        }
    }
}

impl Server {
    /// Serves `sockets`. Each answer comes from the `table` of that moment, whose addresses come
    /// from the pools of `vip`; while `attached` is false, dials to VIPs would go astray, so the
    /// zone answers SERVFAIL.
    ///
    /// # Errors
    /// When the kernel has no room for what it takes.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start(
        sockets: Sockets,
        config: &DnsConfig,
        vip: &VipConfig,
        table: watch::Receiver<Arc<Table>>,
        attached: watch::Receiver<bool>,
        demand: Demand,
    ) -> Result<Server, DnsError> {
        let pools: Vec<IpNet> = vip.pools().collect();
        Server::start_in(Surroundings::default(), sockets, config, &pools, table, attached, demand)
    }

    pub(super) fn start_in(
        surroundings: Surroundings,
        sockets: Sockets,
        config: &DnsConfig,
        pools: &[IpNet],
        table: watch::Receiver<Arc<Table>>,
        attached: watch::Receiver<bool>,
        demand: Demand,
    ) -> Result<Server, DnsError> {
        let Surroundings { resolv_conf, limits, tcp_patience } = surroundings;
        let own = sockets.addresses().to_vec();
        let grace = if sockets.were_passed { GRACE } else { Duration::ZERO };
        let upstreams = Upstreams::new(config, &own, resolv_conf.clone());
        let forwarder = Forwarder::start(upstreams, limits);
        let snapshot = Arc::new(Snapshot::new(table.borrow().clone()));
        let handler = Arc::new(Handler {
            ways: RwLock::new(Arc::new(Ways {
                zone: Zone::new(config, pools.iter().copied()),
                clients: Clients::new(config, &own),
                forwarder,
            })),
            table,
            snapshot: RwLock::new(snapshot),
            attached,
            demand,
            told: Told::default(),
            reliable_by: Instant::now() + grace,
            waiting: Arc::new(Semaphore::new(MAX_WAITING)),
            stats: Arc::default(),
        });

        let stop = Arc::new(Stop::new().map_err(DnsError::Start)?);
        let (stopped, _) = watch::channel(false);
        let mut listeners = JoinSet::new();
        let connections = Arc::new(Connections::default());
        for listener in sockets.tcp {
            let listener = TcpListener::from_std(listener).map_err(DnsError::Start)?;
            let (handler, connections) = (handler.clone(), connections.clone());
            listeners.spawn(tcp::serve(listener, handler, connections, tcp_patience));
        }
        let mut server = Server {
            handler,
            own,
            resolv_conf,
            limits,
            stop,
            stopped,
            threads: Vec::new(),
            listeners,
        };
        for socket in sockets.udp {
            let endpoint = Arc::new(Endpoint::new(socket).map_err(DnsError::Start)?);
            let thread = server.serve_udp(endpoint).map_err(DnsError::Start)?;
            server.threads.push(thread);
        }
        Ok(server)
    }

    fn serve_udp(&self, endpoint: Arc<Endpoint>) -> std::io::Result<JoinHandle<()>> {
        let (handler, stop) = (self.handler.clone(), self.stop.clone());
        let (runtime, stopped) = (Handle::current(), self.stopped.subscribe());
        std::thread::Builder::new().name("dns".into()).spawn(move || {
            let mut out = Vec::with_capacity(MAX_UDP_LEN.into());
            udp::serve(&endpoint, &stop, |bytes, client, to| {
                let Some(waits) = handler.take(&endpoint, bytes, client, to, &mut out) else {
                    return;
                };
                let mut stopped = stopped.clone();
                runtime.spawn(async move {
                    tokio::select! {
                        () = waits => {}
                        _ = stopped.wait_for(|stopped| *stopped) => {}
                    }
                });
            });
        })
    }

    /// Answers by another configuration from now on, but for where it listens and for the domain.
    /// A question that is under way keeps what it found.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn reconfigure(&self, config: &DnsConfig) {
        let upstreams = Upstreams::new(config, &self.own, self.resolv_conf.clone());
        let forwarder = Forwarder::start(upstreams, self.limits);
        let pools = self.handler.ways().zone.pools().to_vec();
        let ways = Ways {
            zone: Zone::new(config, pools),
            clients: Clients::new(config, &self.own),
            forwarder,
        };
        *self.handler.ways.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(ways);
    }

    /// Who asks this server.
    pub fn inquirer(&self) -> Inquirer {
        let nobody = SocketAddr::from(([127, 0, 0, 1], 53));
        // An address that the host doesn't have yet would give no answer.
        let loopback = self.own.iter().find(|address| address.ip().is_loopback());
        let server = loopback.or(self.own.first()).unwrap_or(&nobody);
        Inquirer::new(self.handler.clone(), *server)
    }

    /// What it has counted, and goes on counting.
    pub fn stats(&self) -> Arc<Stats> {
        self.handler.stats.clone()
    }

    /// Stops listening and drops what is under way, within half a second.
    pub async fn stop(mut self) {
        self.stop.set();
        self.stopped.send_replace(true);
        let threads = std::mem::take(&mut self.threads);
        let mut listeners = std::mem::take(&mut self.listeners);
        let ended = async {
            let joined = tokio::task::spawn_blocking(|| {
                threads.into_iter().try_for_each(JoinHandle::join).is_ok()
            });
            listeners.shutdown().await;
            joined.await.unwrap_or(false)
        };
        match tokio::time::timeout(STOP_TIMEOUT, ended).await {
            Ok(true) => {}
            Ok(false) => warn!("a thread of the DNS server had panicked"),
            Err(_) => warn!("the DNS server took too long to stop, so it was cut off"),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.set();
        self.stopped.send_replace(true);
    }
}

/// What may be replaced while the server runs.
#[derive(Debug)]
struct Ways {
    zone: Zone,
    clients: Clients,
    forwarder: Arc<Forwarder>,
}

/// Answers messages, whichever way they come.
#[derive(Debug)]
pub(super) struct Handler {
    ways: RwLock<Arc<Ways>>,
    table: watch::Receiver<Arc<Table>>,
    /// Of the table that was there at the last question.
    snapshot: RwLock<Arc<Snapshot>>,
    attached: watch::Receiver<bool>,
    demand: Demand,
    told: Told,
    /// Until when the zone is waited for.
    reliable_by: Instant,
    waiting: Arc<Semaphore>,
    stats: Arc<Stats>,
}

impl Handler {
    fn ways(&self) -> Arc<Ways> {
        self.ways.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The forwarder of this moment.
    pub(super) fn forwarder(&self) -> Arc<Forwarder> {
        self.ways().forwarder.clone()
    }

    /// What names of the zone get that no service has.
    pub(super) fn unrouted(&self) -> Unrouted {
        self.ways().zone.unrouted()
    }

    fn snapshot(&self) -> Arc<Snapshot> {
        let table = self.table.borrow();
        {
            let snapshot = self.snapshot.read().unwrap_or_else(PoisonError::into_inner);
            if Arc::ptr_eq(&snapshot.table, &table) {
                return snapshot.clone();
            }
        }
        let snapshot = Arc::new(Snapshot::new(table.clone()));
        drop(table);
        *self.snapshot.write().unwrap_or_else(PoisonError::into_inner) = snapshot.clone();
        snapshot
    }

    /// Answers a UDP message where that can be done at once; else what it waits for, which answers.
    fn take(
        self: &Arc<Self>,
        endpoint: &Arc<Endpoint>,
        bytes: &[u8],
        client: SocketAddr,
        to: To,
        out: &mut Vec<u8>,
    ) -> Option<impl Future<Output = ()> + Send + use<>> {
        if let Some(refusal) = self.refusal(bytes, Transport::Udp, client.ip()) {
            if let Some(refusal) = refusal {
                endpoint.send(&refusal, client, to);
            }
            return None;
        }
        let (ways, snapshot) = (self.ways(), self.snapshot());
        let attached = *self.attached.borrow();
        let looks_up = self.demand.is_heard();
        let waits = !(attached && snapshot.table.is_synced()) && self.is_early();
        let mut known = Known { zone: &ways.zone, snapshot: &snapshot, attached, waits, looks_up };
        let mut outcome = answer::answer(bytes, Transport::Udp, known, out);
        if let Outcome::Forward(_) | Outcome::Wait | Outcome::Warm(_) = outcome {
            if let Ok(permit) = self.waiting.clone().try_acquire_owned() {
                let (handler, bytes) = (self.clone(), bytes.to_vec());
                // A stop frees the port, whatever is under way.
                let endpoint = Arc::downgrade(endpoint);
                return Some(async move {
                    let reply = handler.reply(&bytes, Transport::Udp).await;
                    if let (Some(reply), Some(endpoint)) = (reply, endpoint.upgrade()) {
                        endpoint.send(&reply, client, to);
                    }
                    drop(permit);
                });
            }
            (known.waits, known.looks_up) = (false, false);
            outcome = answer::answer(bytes, Transport::Udp, known, out);
        }
        if self.conclude(&ways.forwarder, outcome, out) {
            endpoint.send(out, client, to);
        }
        None
    }

    /// What a client gets that isn't served, or not now; `None` for one that is.
    pub(super) fn refusal(
        &self,
        bytes: &[u8],
        transport: Transport,
        client: IpAddr,
    ) -> Option<Option<Vec<u8>>> {
        let ways = self.ways();
        let admission = ways.clients.admit(client);
        if admission == Admission::Admitted {
            return None;
        }
        let asked = Asked::read(bytes);
        // A circle is to be seen whichever way it comes.
        if asked.is_ok_and(|asked| ways.forwarder.hears_probe(&asked)) {
            return None;
        }
        if admission == Admission::Limited {
            self.stats.count("limited");
            return Some(None);
        }
        let Ok(asked) = asked else {
            self.stats.count("malformed");
            return Some(None);
        };
        self.stats.count_own(Code::Refused);
        let mut out = Vec::new();
        reply::error(&mut out, &asked, Code::Refused, max_len(&asked, transport));
        Some(Some(out))
    }

    /// Counts what became of a message, and tells of the service that it uses. Returns whether
    /// there is an answer, in `out`: an error where another resolver would have been asked.
    fn conclude(&self, forwarder: &Forwarder, outcome: Outcome<'_, '_>, out: &mut Vec<u8>) -> bool {
        let code = match outcome {
            Outcome::Drop => {
                self.stats.count("malformed");
                return false;
            }
            Outcome::Reply(code, used) => {
                if let Some(service) = used {
                    self.tell(service);
                }
                code
            }
            Outcome::Forward(asked) => {
                forwarder.hears_probe(&asked);
                reply::error(out, &asked, Code::ServFail, MAX_UDP_LEN.into());
                Code::ServFail
            }
            Outcome::Wait | Outcome::Warm(_) => return false, // not where they weren't allowed
        };
        self.stats.count_own(code);
        true
    }

    /// Says that a service is used, now and then.
    fn tell(&self, service: &Service) {
        if self.demand.is_heard() && self.told.is_due(&service.name) {
            self.demand.used(&service.name);
        }
    }

    /// The answer to a message, in a while; `None` where there is none.
    pub(super) async fn reply(&self, bytes: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        let mut looks_up = true;
        let mut waits = self.is_early();
        loop {
            let (ways, snapshot) = (self.ways(), self.snapshot());
            let attached = *self.attached.borrow();
            looks_up &= self.demand.is_heard();
            let known = Known { zone: &ways.zone, snapshot: &snapshot, attached, waits, looks_up };
            match answer::answer(bytes, transport, known, &mut out) {
                Outcome::Wait => {
                    self.grow_reliable().await;
                    waits = false;
                }
                Outcome::Warm(name) => {
                    self.warm(&name).await;
                    looks_up = false;
                }
                Outcome::Forward(asked) => {
                    return Some(self.forward(&ways.forwarder, &asked, transport).await);
                }
                outcome => return self.conclude(&ways.forwarder, outcome, &mut out).then_some(out),
            }
        }
    }

    /// Whether the start is so near that the zone is waited for.
    fn is_early(&self) -> bool {
        Instant::now() < self.reliable_by
    }

    /// Waits for the zone, for as long as that is done after the start.
    async fn grow_reliable(&self) {
        let (mut table, mut attached) = (self.table.clone(), self.attached.clone());
        let reliable = async {
            let _ = table.wait_for(|table| table.is_synced()).await;
            let _ = attached.wait_for(|attached| *attached).await;
        };
        let _ = tokio::time::timeout_at(self.reliable_by.into(), reliable).await;
    }

    /// Waits a moment for a service that isn't live.
    async fn warm(&self, name: &str) {
        let mut table = self.table.clone();
        let is_live = |table: &Arc<Table>| {
            table.services.get(name).is_some_and(|service| service.watch == Watch::Live)
        };
        let warming = async {
            if self.demand.look_up(name).await {
                let _ = table.wait_for(is_live).await;
            }
        };
        let _ = tokio::time::timeout(WARMING, warming).await;
    }

    /// Another resolver's answer, or SERVFAIL.
    async fn forward(
        &self,
        forwarder: &Forwarder,
        asked: &Asked<'_>,
        transport: Transport,
    ) -> Vec<u8> {
        let mut out = Vec::new();
        let question = match asked.query() {
            Ok(question) => question,
            Err(error) => {
                debug!(%error, "a question can't be read");
                reply::error(&mut out, asked, Code::FormErr, max_len(asked, transport));
                self.stats.count_own(Code::FormErr);
                return out;
            }
        };
        match forwarder.forward(asked, &question, transport).await {
            Ok(Forwarded { answer, .. }) => {
                self.stats.count_forwarded(answer.code());
                answer.pass_on(asked, max_len(asked, transport))
            }
            Err(error) => {
                debug!(%question, "not forwarded: {error}");
                reply::error(&mut out, asked, Code::ServFail, max_len(asked, transport));
                self.stats.count_own(Code::ServFail);
                out
            }
        }
    }
}

/// The longest message that the client takes.
fn max_len(asked: &Asked<'_>, transport: Transport) -> usize {
    match transport {
        Transport::Udp => asked.max_payload().min(MAX_UDP_LEN).into(),
        Transport::Tcp => usize::from(u16::MAX),
    }
}
