//! The server: sockets in front, the zone and the forwarder behind.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
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
use super::clients;
use super::clients::{Admission, Clients};
use super::forward::Forwarder;
use super::lookup::Inquirer;
use super::mailbox::{Alarm, Mailbox};
use super::message::Asked;
use super::origin::{Origin, Origins};
use super::received::PassOn;
use super::relay::{Limits, Party};
use super::reply::{self, Code};
use super::sockets::{DnsError, Sockets, Transport};
use super::stats::Stats;
use super::tcp::{self, Connections};
use super::told::Told;
use super::udp::Endpoint;
use super::upstreams::{Registry, Upstreams};
use super::worker::Worker;
use crate::catalog::{Demand, Lookup};
use crate::config::{DnsConfig, Unrouted, VipConfig};
use crate::table::{Service, Table, Watch};

/// What a stop may take.
const STOP_TIMEOUT: Duration = Duration::from_millis(500);

/// How much of that there is for what is under way to end by itself.
pub(super) const DRAIN: Duration = Duration::from_millis(300);

/// How long after the start questions for the zone wait for it, where sockets were passed: those
/// that came while there was no daemon get more than SERVFAIL, and the first daemon of a machine
/// whose source is down still answers soon.
const GRACE: Duration = Duration::from_secs(2);

/// How long an answer waits for a service that isn't live. After that a name that the table has is
/// answered as it stands there, and another one is unknown.
const WARMING: Duration = Duration::from_millis(250);

/// The UDP questions that wait for the zone at one time: what is beyond is answered at once, as well
/// as can be, or stays in the socket while the zone is waited for after the start.
const MAX_WAITING: usize = 1024;

/// The DNS server, which answers from when it is started until it is stopped or dropped.
pub struct Server {
    handler: Arc<Handler>,
    own: Vec<SocketAddr>,
    resolv_conf: PathBuf,
    limits: Limits,
    /// What is known of upstreams, whatever the configuration is.
    registry: Registry,
    /// Of the threads.
    mailboxes: Vec<Arc<Mailbox>>,
    alarm: Alarm,
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
        let (registry, alarm) = (Registry::default(), Alarm::default());
        let upstreams = Upstreams::new(config, &own, resolv_conf.clone(), registry.clone());
        let forwarder = Forwarder::start(upstreams, limits, alarm.clone());
        let snapshot = Arc::new(Snapshot::new(table.borrow().clone()));
        let handler = Arc::new(Handler {
            ways: RwLock::new(Arc::new(Ways {
                zone: Zone::new(config, pools.iter().copied()),
                clients: Arc::new(Clients::new(config, &own)),
                forwarder,
            })),
            version: AtomicU64::new(0),
            table,
            snapshot: RwLock::new(snapshot),
            attached,
            demand,
            told: Told::default(),
            reliable_by: Instant::now() + grace,
            waiting: Arc::new(Semaphore::new(MAX_WAITING)),
            origins: Origins::default(),
            stats: Arc::default(),
        });

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
            registry,
            mailboxes: Vec::new(),
            alarm,
            stopped,
            closing,
            threads: Vec::new(),
            listeners,
            ended,
        };
        for (idx, socket) in sockets.udp.into_iter().enumerate() {
            let thread = server.serve_udp(socket, idx).map_err(DnsError::Start)?;
            server.threads.push(thread);
        }
        Ok(server)
    }

    fn serve_udp(&mut self, socket: UdpSocket, idx: usize) -> io::Result<JoinHandle<()>> {
        let mailbox = Arc::new(Mailbox::new()?);
        self.mailboxes.push(mailbox.clone());
        self.alarm.add(&mailbox);
        let (endpoint, stopped) = (Endpoint::new(socket)?, self.stopped.subscribe());
        let (handler, ends) = (self.handler.clone(), Ends(self.ended.clone()));
        let runtime = Handle::current();
        let (started, start) = std::sync::mpsc::sync_channel(1);
        let thread = std::thread::Builder::new().name("dns".into()).spawn(move || {
            let _ends = ends;
            let _runtime = runtime.enter();
            // Made where it is used: the buffers for the kernel stay with their thread.
            match Worker::new(handler, endpoint, mailbox, stopped, idx) {
                Ok(worker) => {
                    let _ = started.send(Ok(()));
                    worker.run();
                }
                Err(error) => drop(started.send(Err(error))),
            }
        })?;
        start.recv().unwrap_or_else(|_| Err(io::Error::other("a thread of it ended")))?;
        Ok(thread)
    }

    /// Answers by another configuration from now on, but for where it listens and for the domain.
    /// A question that is under way keeps what it found.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn reconfigure(&self, config: &DnsConfig) {
        let (registry, alarm) = (self.registry.clone(), self.alarm.clone());
        let upstreams = Upstreams::new(config, &self.own, self.resolv_conf.clone(), registry);
        let forwarder = Forwarder::start(upstreams, self.limits, alarm);
        let pools = self.handler.ways().zone.pools().to_vec();
        let ways = Ways {
            zone: Zone::new(config, pools),
            clients: Arc::new(Clients::new(config, &self.own)),
            forwarder,
        };
        *self.handler.ways.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(ways);
        self.handler.version.fetch_add(1, Ordering::Release);
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
        self.mailboxes.iter().for_each(|mailbox| mailbox.stop());
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
        self.mailboxes.iter().for_each(|mailbox| mailbox.stop());
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

/// What may be replaced while the server runs.
#[derive(Debug)]
pub(super) struct Ways {
    zone: Zone,
    clients: Arc<Clients>,
    forwarder: Arc<Forwarder>,
}

/// What one thread knows of everything that may change, so that it takes no lock for each message.
#[derive(Debug)]
pub(super) struct View {
    ways: Arc<Ways>,
    version: u64,
    table: watch::Receiver<Arc<Table>>,
    snapshot: Arc<Snapshot>,
    attached: watch::Receiver<bool>,
    is_attached: bool,
}

impl View {
    /// The forwarder.
    pub(super) fn forwarder(&self) -> &Forwarder {
        &self.ways.forwarder
    }

    /// What may be replaced.
    pub(super) fn ways(&self) -> &Ways {
        &self.ways
    }

    /// The bounds on times to live of what is forwarded of the zone.
    pub(super) fn max_ttls(&self) -> (u32, u32) {
        self.ways.zone.max_ttls()
    }

    /// Whether the zone can be answered for.
    pub(super) fn is_reliable(&self) -> bool {
        self.is_attached && self.snapshot.table.is_synced()
    }

    /// What the zone's answers come from; nothing is waited for.
    pub(super) fn known(&self) -> Known<'_> {
        let (zone, snapshot) = (&self.ways.zone, &*self.snapshot);
        Known { zone, snapshot, attached: self.is_attached, waits: false, missing: Missing::Absent }
    }

    /// Who a client's questions count as.
    pub(super) fn party(&self, client: IpAddr) -> Party {
        self.ways.party(client)
    }
}

impl Ways {
    /// Who a client's questions count as.
    fn party(&self, client: IpAddr) -> Party {
        let client = client.to_canonical();
        (!self.clients.is_own(client)).then(|| clients::party(client))
    }
}

/// What a message that waited comes to.
#[derive(Debug)]
pub(super) enum Settled {
    Answer(Vec<u8>),
    /// It is another resolver's to answer, but perhaps the name of a service all the same.
    Forward {
        is_unknown: bool,
    },
    Nothing,
}

/// Answers messages, whichever way they come.
#[derive(Debug)]
pub(super) struct Handler {
    ways: RwLock<Arc<Ways>>,
    /// Of the ways.
    version: AtomicU64,
    table: watch::Receiver<Arc<Table>>,
    /// Of the table that was there at the last question.
    snapshot: RwLock<Arc<Snapshot>>,
    attached: watch::Receiver<bool>,
    demand: Demand,
    told: Told,
    /// Until when the zone is waited for.
    reliable_by: Instant,
    waiting: Arc<Semaphore>,
    /// The questions whose origin is watched.
    pub(super) origins: Origins,
    pub(super) stats: Arc<Stats>,
}

impl Handler {
    pub(super) fn ways(&self) -> Arc<Ways> {
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
        drop(self.waiting.acquire_many(MAX_WAITING as u32).await);
    }

    /// A place to wait for the zone in, where there is one.
    pub(super) fn place(&self) -> Option<OwnedSemaphorePermit> {
        self.waiting.clone().try_acquire_owned().ok()
    }

    /// What a thread knows to begin with.
    pub(super) fn view(&self) -> View {
        let version = self.version.load(Ordering::Acquire);
        let (mut table, mut attached) = (self.table.clone(), self.attached.clone());
        table.mark_unchanged();
        attached.mark_unchanged();
        let (snapshot, is_attached) = (self.snapshot(), *attached.borrow_and_update());
        View { ways: self.ways(), version, table, snapshot, attached, is_attached }
    }

    /// Brings a thread's knowledge up to date. Returns whether the configuration is another one.
    pub(super) fn refresh(&self, view: &mut View) -> bool {
        // An error says that there will be no further change.
        if view.table.has_changed().unwrap_or(false) {
            view.table.mark_unchanged();
            view.snapshot = self.snapshot();
        }
        if view.attached.has_changed().unwrap_or(false) {
            view.is_attached = *view.attached.borrow_and_update();
        }
        let version = self.version.load(Ordering::Acquire);
        if version == view.version {
            return false;
        }
        (view.version, view.ways) = (version, self.ways());
        true
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

    /// What a client gets that isn't served, or not now; `None` for one that is.
    pub(super) fn refusal(
        &self,
        ways: &Ways,
        bytes: &[u8],
        transport: Transport,
        client: IpAddr,
    ) -> Option<Option<Vec<u8>>> {
        let admission = ways.clients.admit(client);
        if admission == Admission::Admitted {
            return None;
        }
        if admission == Admission::Limited {
            self.stats.count("limited");
            return Some(None);
        }
        let Ok(asked) = Asked::read(bytes) else {
            self.stats.count("malformed");
            return Some(None);
        };
        self.stats.count_own(Code::Refused);
        let mut out = Vec::new();
        reply::error(&mut out, &asked, Code::Refused, max_len(&asked, transport));
        Some(Some(out))
    }

    /// Counts what became of a message, and tells of the service that it uses. Returns whether
    /// it was answered.
    pub(super) fn conclude(&self, outcome: Outcome<'_, '_>) -> bool {
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
            // Not where they weren't allowed, and those are for the caller.
            Outcome::Wait | Outcome::Warm(_) | Outcome::Forward(_) => return false,
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

    /// The answer to a message over TCP, in a while; `None` where there is none.
    pub(super) async fn reply(&self, bytes: &[u8], client: IpAddr) -> Option<Vec<u8>> {
        match self.settle(bytes, Transport::Tcp).await {
            Settled::Answer(answer) => Some(answer),
            Settled::Nothing => None,
            Settled::Forward { is_unknown } => {
                let asked = Asked::read(bytes).ok()?; // it was read before
                let ways = self.ways();
                Some(self.forward(&ways, &asked, ways.party(client), is_unknown).await)
            }
        }
    }

    /// What a message comes to, in a while.
    pub(super) async fn settle(&self, bytes: &[u8], transport: Transport) -> Settled {
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
                Outcome::Forward(_) => {
                    return Settled::Forward { is_unknown: found == Some(Missing::Unknown) };
                }
                outcome => {
                    let is_answered = self.conclude(outcome);
                    return if is_answered { Settled::Answer(out) } else { Settled::Nothing };
                }
            }
        }
    }

    /// Whether the start is so near that the zone is waited for.
    pub(super) fn is_early(&self) -> bool {
        Instant::now() < self.reliable_by
    }

    /// Waits for the zone, for as long as that is done after the start.
    pub(super) async fn grow_reliable(&self) {
        let (mut table, mut attached) = (self.table.clone(), self.attached.clone());
        let reliable = async {
            let _ = table.wait_for(|table| table.is_synced()).await;
            let _ = attached.wait_for(|attached| *attached).await;
        };
        let _ = tokio::time::timeout_at(self.reliable_by.into(), reliable).await;
    }

    /// What becomes of a name that the table doesn't have live.
    pub(super) fn missing(&self) -> Missing {
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

    /// Another resolver's answer over TCP, or SERVFAIL. Where the name may be a service of ours for
    /// all that is known (`is_unknown`), the other resolver's "no such name" doesn't hold either.
    async fn forward(
        &self,
        ways: &Ways,
        asked: &Asked<'_>,
        party: Party,
        is_unknown: bool,
    ) -> Vec<u8> {
        let mut out = Vec::new();
        let note = |origin| self.origins.note(asked.id(), asked.question(), || origin);
        match ways.forwarder.over_tcp(asked, party).await {
            Ok((answer, ..)) if is_unknown && answer.code() == ResponseCode::NXDomain => {
                note(Origin::Nowhere("whether it is a service is unknown".to_owned()));
                reply::error(&mut out, asked, Code::ServFail, max_len(asked, Transport::Tcp));
                self.stats.count_own(Code::ServFail);
            }
            Ok((answer, upstream, is_in_zone)) => {
                note(Origin::Upstream(upstream.address));
                self.stats.count_forwarded(answer.code());
                let how = PassOn {
                    max_len: max_len(asked, Transport::Tcp),
                    keeps_ad: upstream.keeps_ad(),
                    max_ttls: is_in_zone.then(|| ways.zone.max_ttls()),
                };
                answer.pass_on(&asked.client(), how, &mut out);
            }
            Err(error) => {
                debug!("not forwarded: {error}");
                note(Origin::Nowhere(error.to_string()));
                reply::error(&mut out, asked, Code::ServFail, max_len(asked, Transport::Tcp));
                self.stats.count_own(Code::ServFail);
            }
        }
        out
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
