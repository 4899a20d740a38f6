//! The server: sockets in front, the zone and the forwarder behind.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hickory_proto::op::ResponseCode;
use ipnet::IpNet;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tracing::{debug, warn};

use super::answer::{self, Known, MAX_UDP_LEN, Missing, Outcome, Snapshot, Zone};
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
use crate::catalog::{Demand, Lookup};
use crate::config::{DnsConfig, Unrouted, VipConfig};
use crate::table::{Service, Table, Watch};

/// What a stop may take.
const STOP_TIMEOUT: Duration = Duration::from_millis(500);

/// How much of that there is for what is under way to end by itself.
const DRAIN: Duration = Duration::from_millis(300);

/// How long after the start questions for the zone wait for it, where sockets were passed: those
/// that came while there was no daemon get more than SERVFAIL, and the first daemon of a machine
/// whose source is down still answers soon.
const GRACE: Duration = Duration::from_secs(2);

/// How long an answer waits for a service that isn't live. After that a name that the table has is
/// answered as it stands there, and another one is unknown.
const WARMING: Duration = Duration::from_millis(250);

/// The UDP questions that wait for the zone at one time, and as many that wait for other resolvers:
/// what is beyond is answered at once, as well as can be, or stays in the socket while the zone is
/// waited for after the start.
const MAX_WAITING: usize = 1024;

/// The DNS server, which answers from when it is started until it is stopped or dropped.
pub struct Server {
    handler: Arc<Handler>,
    own: Vec<SocketAddr>,
    resolv_conf: PathBuf,
    limits: Limits,
    stop: Arc<Stop>,
    stopped: watch::Sender<bool>,
    /// Whether nothing more is read.
    closing: watch::Sender<bool>,
    threads: Vec<JoinHandle<()>>,
    listeners: JoinSet<()>,
    /// Whether one of those who serve sockets has ended.
    ended: watch::Sender<bool>,
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
                clients: Arc::new(Clients::new(config, &own)),
                forwarder,
            })),
            table,
            snapshot: RwLock::new(snapshot),
            attached,
            demand,
            told: Told::default(),
            reliable_by: Instant::now() + grace,
            waiting: Arc::new(Semaphore::new(MAX_WAITING)),
            forwarding: Arc::new(Semaphore::new(MAX_WAITING)),
            stats: Arc::default(),
        });

        let stop = Arc::new(Stop::new().map_err(DnsError::Start)?);
        let (stopped, _) = watch::channel(false);
        let (closing, _) = watch::channel(false);
        let (ended, _) = watch::channel(false);
        let mut listeners = JoinSet::new();
        let connections = Arc::new(Connections::default());
        for listener in sockets.tcp {
            let listener = TcpListener::from_std(listener).map_err(DnsError::Start)?;
            let (handler, connections) = (handler.clone(), connections.clone());
            let (closing, ends) = (closing.subscribe(), Ends(ended.clone()));
            listeners.spawn(async move {
                let _ends = ends;
                tcp::serve(listener, handler, connections, tcp_patience, closing).await;
            });
        }
        let mut server = Server {
            handler,
            own,
            resolv_conf,
            limits,
            stop,
            stopped,
            closing,
            threads: Vec::new(),
            listeners,
            ended,
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
        let (mut closing, ends) = (self.closing.subscribe(), Ends(self.ended.clone()));
        std::thread::Builder::new().name("dns".into()).spawn(move || {
            let _ends = ends;
            let mut out = Vec::with_capacity(MAX_UDP_LEN.into());
            udp::serve(&endpoint, &stop, |bytes, client, to| {
                if handler.is_full_early() {
                    // What comes after this one waits in the socket meanwhile.
                    runtime.block_on(async {
                        tokio::select! {
                            () = handler.grow_reliable() => {}
                            _ = closing.wait_for(|closing| *closing) => {}
                        }
                    });
                }
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
            clients: Arc::new(Clients::new(config, &self.own)),
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

    /// Waits until one of those who serve the sockets has ended, which none does before the stop
    /// but by a fault of ours: then its listener is deaf.
    pub fn deaf(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut ended = self.ended.subscribe();
        async move {
            if ended.wait_for(|ended| *ended).await.is_err() {
                std::future::pending().await // stopped
            }
        }
    }

    /// Stops reading, lets what is under way end, and drops what takes longer, within half a second.
    pub async fn stop(mut self) {
        self.stop.set();
        self.closing.send_replace(true);
        let threads = std::mem::take(&mut self.threads);
        let mut listeners = std::mem::take(&mut self.listeners);
        let ended = async {
            let joined = tokio::task::spawn_blocking(|| {
                threads.into_iter().try_for_each(JoinHandle::join).is_ok()
            });
            let drained = async {
                while listeners.join_next().await.is_some() {}
                self.handler.drained().await;
            };
            let _ = tokio::time::timeout(DRAIN, drained).await;
            self.stopped.send_replace(true);
            listeners.shutdown().await;
            self.handler.drained().await;
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
        self.closing.send_replace(true);
        self.stopped.send_replace(true);
    }
}

/// Tells when it is dropped, in a panic too.
struct Ends(watch::Sender<bool>);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.send_replace(true);
    }
}

/// What a question needs that waits; the socket goes first, so that a stop which has all places back
/// has freed the port.
struct Waiting {
    endpoint: Arc<Endpoint>,
    _place: OwnedSemaphorePermit,
}

/// What may be replaced while the server runs.
#[derive(Debug)]
struct Ways {
    zone: Zone,
    clients: Arc<Clients>,
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
    forwarding: Arc<Semaphore>,
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

    /// Who is answered.
    pub(super) fn clients(&self) -> Arc<Clients> {
        self.ways().clients.clone()
    }

    /// Waits until nothing waits.
    async fn drained(&self) {
        for places in [&self.waiting, &self.forwarding] {
            drop(places.acquire_many(MAX_WAITING as u32).await);
        }
    }

    /// Whether nobody else can wait for the zone, which will be there soon.
    fn is_full_early(&self) -> bool {
        self.is_early()
            && self.waiting.available_permits() == 0
            && !(*self.attached.borrow() && self.table.borrow().is_synced())
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
        let missing = self.missing();
        let waits = !(attached && snapshot.table.is_synced()) && self.is_early();
        let mut known = Known { zone: &ways.zone, snapshot: &snapshot, attached, waits, missing };
        let mut outcome = answer::answer(bytes, Transport::Udp, known, out);
        let places = match outcome {
            Outcome::Forward(_) => Some(&self.forwarding),
            Outcome::Wait | Outcome::Warm(_) => Some(&self.waiting),
            Outcome::Drop | Outcome::Reply(..) => None,
        };
        if let Some(places) = places {
            if let Ok(place) = places.clone().try_acquire_owned() {
                let (handler, bytes) = (self.clone(), bytes.to_vec());
                let waiting = Waiting { endpoint: endpoint.clone(), _place: place };
                return Some(async move {
                    if let Some(reply) = handler.reply(&bytes, Transport::Udp).await {
                        waiting.endpoint.send(&reply, client, to);
                    }
                    drop(waiting);
                });
            }
            known.waits = false;
            if known.missing == Missing::LookUp {
                known.missing = Missing::Unknown;
            }
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
        let mut found = None;
        let mut waits = self.is_early();
        loop {
            let (ways, snapshot) = (self.ways(), self.snapshot());
            let attached = *self.attached.borrow();
            let missing = found.unwrap_or_else(|| self.missing());
            let known = Known { zone: &ways.zone, snapshot: &snapshot, attached, waits, missing };
            match answer::answer(bytes, transport, known, &mut out) {
                Outcome::Wait => {
                    self.grow_reliable().await;
                    waits = false;
                }
                Outcome::Warm(name) => {
                    found = Some(self.warm(&name).await);
                }
                Outcome::Forward(asked) => {
                    let is_unknown = found == Some(Missing::Unknown);
                    let answer = self.forward(&ways.forwarder, &asked, transport, is_unknown);
                    return Some(answer.await);
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

    /// What becomes of a name that the table doesn't have live.
    fn missing(&self) -> Missing {
        if self.demand.is_heard() { Missing::LookUp } else { Missing::Absent }
    }

    /// Waits a moment for a service that isn't live, and returns what is known of its name then.
    async fn warm(&self, name: &str) -> Missing {
        let mut table = self.table.clone();
        let is_live = |table: &Arc<Table>| {
            table.services.get(name).is_some_and(|service| service.watch == Watch::Live)
        };
        let warming = async {
            let lookup = self.demand.look_up(name).await;
            if lookup == Lookup::Exists {
                let _ = table.wait_for(is_live).await;
            }
            lookup
        };
        match tokio::time::timeout(WARMING, warming).await {
            Ok(Lookup::Absent) => Missing::Absent,
            // One that exists is in the table, or can't be served.
            Ok(Lookup::Exists | Lookup::Unknown) | Err(_) => Missing::Unknown,
        }
    }

    /// Another resolver's answer, or SERVFAIL. Where the name may be a service of ours for all that is
    /// known (`is_unknown`), the other resolver's "no such name" doesn't hold either.
    async fn forward(
        &self,
        forwarder: &Forwarder,
        asked: &Asked<'_>,
        transport: Transport,
        is_unknown: bool,
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
            Ok(Forwarded { answer, .. })
                if is_unknown && answer.code() == ResponseCode::NXDomain =>
            {
                reply::error(&mut out, asked, Code::ServFail, max_len(asked, transport));
                self.stats.count_own(Code::ServFail);
                out
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_thread_that_panics_is_told_of() {
        let (ended, mut told) = watch::channel(false);
        let ends = Ends(ended);
        let thread = std::thread::spawn(move || {
            let _ends = ends;
            panic!("as a fault of ours would");
        });
        assert!(thread.join().is_err());
        assert!(*told.wait_for(|ended| *ended).await.unwrap());
    }
}
