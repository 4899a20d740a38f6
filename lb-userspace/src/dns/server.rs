//! The server: it owns sockets and threads, and connects them with zone and forwarder.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tracing::warn;

use super::acl::Acl;
use super::bind::DnsError;
use super::connections::Connections;
use super::debug_query::DebugClient;
use super::forward::Forwarder;
use super::handler::{Handler, MAX_WAITING, Policy};
use super::mailbox::{Mailbox, WorkerWakers};
use super::origin::OriginTracker;
use super::probe;
use super::relay::ForwardLimits;
use super::resolve::{TableSnapshot, Zone};
use super::sockets::Sockets;
use super::stats::DnsStats;
use super::tcp;
use super::udp::UdpEndpoint;
use super::upstreams::{RESOLV_CONF, UpstreamRegistry, Upstreams};
use super::usage_limiter::UsageLimiter;
use super::worker::{DRAIN, Worker};
use crate::capabilities;
use crate::catalog::UsageSender;
use crate::config::{DnsConfig, VipConfig};
use crate::table::Table;

/// How long a stop serves on (lameduck): a query may have been sent here before the kernel, or whoever sends, knew
/// of the stop, and be read a moment later.
const LAMEDUCK: Duration = Duration::from_millis(50);

/// The limit of a stop after that.
const STOP_TIMEOUT: Duration = Duration::from_millis(500);

/// The startup grace period if sockets were passed: queries for the zone wait for it, so that those
/// which came while there was no daemon get more than SERVFAIL, and the first daemon of a machine
/// whose source is down still answers soon.
const GRACE: Duration = Duration::from_secs(2);

/// The DNS server; it answers until it is stopped or dropped.
pub struct DnsServer {
    pub(super) handler: Arc<Handler>,
    /// The addresses of `dns.listen`.
    own: Vec<SocketAddr>,
    /// Those of `dns.listen_tls` as well.
    own_with_tls: Vec<SocketAddr>,
    resolv_conf: PathBuf,
    limits: ForwardLimits,
    /// The state of upstreams, which outlives a reload.
    registry: UpstreamRegistry,
    /// Of the threads.
    mailboxes: Vec<Arc<Mailbox>>,
    alarm: WorkerWakers,
    stopped: watch::Sender<bool>,
    /// Whether no connection is accepted and nothing more is read of them.
    pub(super) closing: watch::Sender<bool>,
    threads: Vec<JoinHandle<()>>,
    listeners: JoinSet<()>,
    /// Whether a listener or thread has ended.
    ended: watch::Sender<bool>,
}

/// Options that tests replace.
#[derive(Debug)]
pub(super) struct ServerOptions {
    pub(super) resolv_conf: PathBuf,
    pub(super) limits: ForwardLimits,
    /// The idle timeout of TCP and TLS connections.
    pub(super) tcp_idle_timeout: Duration,
}

impl Default for ServerOptions {
    fn default() -> ServerOptions {
        ServerOptions {
            resolv_conf: RESOLV_CONF.into(),
            limits: ForwardLimits::default(),
            tcp_idle_timeout: tcp::IDLE_TIMEOUT,
        }
    }
}

impl DnsServer {
    /// Serves `sockets`. Each response comes from the `table` of that moment, whose addresses come
    /// from the pools of `vip`; while `attached` is false connections to VIPs aren't redirected, so
    /// the zone is SERVFAIL.
    ///
    /// # Errors
    /// When the kernel lacks resources.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start(
        sockets: Sockets,
        config: &DnsConfig,
        vip: &VipConfig,
        table: watch::Receiver<Arc<Table>>,
        attached: watch::Receiver<bool>,
        demand: UsageSender,
    ) -> Result<DnsServer, DnsError> {
        let pools: Vec<IpNet> = vip.pools().collect();
        DnsServer::start_in(
            ServerOptions::default(),
            sockets,
            config,
            &pools,
            table,
            attached,
            demand,
        )
    }

    pub(super) fn start_in(
        options: ServerOptions,
        sockets: Sockets,
        config: &DnsConfig,
        pools: &[IpNet],
        table: watch::Receiver<Arc<Table>>,
        attached: watch::Receiver<bool>,
        demand: UsageSender,
    ) -> Result<DnsServer, DnsError> {
        let ServerOptions { resolv_conf, limits, tcp_idle_timeout } = options;
        let own = sockets.addresses().to_vec();
        let own_with_tls = [&own, sockets.tls_addresses()].concat();
        let grace = if sockets.n_passed > 0 { GRACE } else { Duration::ZERO };
        let (registry, alarm) = (UpstreamRegistry::default(), WorkerWakers::default());
        let upstreams = Upstreams::new(config, &own, resolv_conf.clone(), registry.clone());
        let forwarder = Forwarder::new(upstreams, limits);
        probe::start(&forwarder, alarm.clone());
        let snapshot = Arc::new(TableSnapshot::new(table.borrow().clone()));
        let handler = Arc::new(Handler {
            policy: RwLock::new(Arc::new(Policy {
                zone: Zone::new(config, pools.iter().copied()),
                acl: Arc::new(Acl::new(config, &own_with_tls)),
                forwarder,
                log: config.log,
            })),
            version: AtomicU64::new(0),
            table,
            snapshot: RwLock::new(snapshot),
            attached,
            demand,
            usage_limiter: UsageLimiter::default(),
            ready_by: Instant::now() + grace,
            waiting: Arc::new(Semaphore::new(MAX_WAITING)),
            origins: OriginTracker::default(),
            stats: Arc::default(),
        });

        let (stopped, _) = watch::channel(false);
        let (closing, _) = watch::channel(false);
        let (ended, _) = watch::channel(false);
        let mut listeners = JoinSet::new();
        let connections = Arc::new(Connections::default());
        let acceptor = sockets.tls_config.map(TlsAcceptor::from);
        let plain = sockets.tcp.into_iter().map(|listener| (listener, None));
        let tls = sockets.tls.into_iter().map(|listener| (listener, acceptor.clone()));
        for (listener, acceptor) in plain.chain(tls) {
            let listener = TcpListener::from_std(listener).map_err(DnsError::Start)?;
            let (handler, connections) = (handler.clone(), connections.clone());
            let (closing, ends) = (closing.subscribe(), ExitNotifier(ended.clone()));
            listeners.spawn(async move {
                let _ends = ends;
                tcp::serve(listener, acceptor, handler, connections, tcp_idle_timeout, closing)
                    .await;
            });
        }
        let mut server = DnsServer {
            handler,
            own,
            own_with_tls,
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
            let thread = server.serve_udp(socket, idx < sockets.n_passed, idx);
            let thread = thread.map_err(DnsError::Start)?;
            server.threads.push(thread);
        }
        Ok(server)
    }

    fn serve_udp(
        &mut self,
        socket: UdpSocket,
        was_passed: bool,
        idx: usize,
    ) -> io::Result<JoinHandle<()>> {
        let mailbox = Arc::new(Mailbox::new()?);
        self.mailboxes.push(mailbox.clone());
        self.alarm.add(&mailbox);
        let (endpoint, stopped) = (UdpEndpoint::new(socket)?, self.stopped.subscribe());
        let (handler, ends) = (self.handler.clone(), ExitNotifier(self.ended.clone()));
        let runtime = Handle::current();
        let (started, start) = std::sync::mpsc::sync_channel(1);
        let thread = std::thread::Builder::new().name("dns".into()).spawn(move || {
            let _ends = ends;
            capabilities::none();
            let _runtime = runtime.enter();
            // Created in its thread: the buffers for the kernel stay with it.
            match Worker::new(handler, endpoint, mailbox, stopped, was_passed, idx) {
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

    /// Applies another configuration, except `dns.listen*`, `dns.tls_*` and `dns.domain`. Pending
    /// queries keep theirs.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn reconfigure(&self, config: &DnsConfig) {
        let (registry, alarm) = (self.registry.clone(), self.alarm.clone());
        let upstreams = Upstreams::new(config, &self.own, self.resolv_conf.clone(), registry);
        let forwarder = Forwarder::new(upstreams, self.limits);
        probe::start(&forwarder, alarm);
        let pools = self.handler.policy().zone.pools().to_vec();
        let policy = Policy {
            zone: Zone::new(config, pools),
            acl: Arc::new(Acl::new(config, &self.own_with_tls)),
            forwarder,
            log: config.log,
        };
        *self.handler.policy.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(policy);
        self.handler.version.fetch_add(1, Ordering::Release);
    }

    /// The client behind `nohop dns query`.
    pub fn debug_client(&self) -> DebugClient {
        let default = SocketAddr::from(([127, 0, 0, 1], 53));
        // An address that the host doesn't have yet would give no answer.
        let loopback = self.own.iter().find(|address| address.ip().is_loopback());
        let server = loopback.or(self.own.first()).unwrap_or(&default);
        DebugClient::new(self.handler.clone(), *server)
    }

    /// Its counters.
    pub fn stats(&self) -> Arc<DnsStats> {
        self.handler.stats.clone()
    }

    /// Resolves when a listener or thread ends unexpectedly: its socket isn't served any more.
    pub fn listener_failed(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut ended = self.ended.subscribe();
        async move {
            if ended.wait_for(|ended| *ended).await.is_err() {
                std::future::pending().await // stopped
            }
        }
    }

    /// Serves for 50 ms more, stops reading, lets pending queries finish, and drops the rest within half a second.
    /// Sockets that end with this process are read until then, as what is left in them is lost.
    pub async fn stop(mut self) {
        tokio::time::sleep(LAMEDUCK).await;
        self.mailboxes.iter().for_each(|mailbox| mailbox.stop());
        self.closing.send_replace(true);
        let threads = std::mem::take(&mut self.threads);
        let mut listeners = std::mem::take(&mut self.listeners);
        let ended = async {
            let mut joined = tokio::task::spawn_blocking(|| {
                threads.into_iter().try_for_each(JoinHandle::join).is_ok()
            });
            let mut are_well = None;
            let drained = async {
                // Until then they have queries wait.
                are_well = Some((&mut joined).await);
                while listeners.join_next().await.is_some() {}
                self.handler.drained().await;
            };
            let _ = tokio::time::timeout(DRAIN, drained).await;
            self.stopped.send_replace(true);
            listeners.shutdown().await;
            self.handler.drained().await;
            let are_well = match are_well {
                Some(are_well) => are_well,
                None => joined.await,
            };
            are_well.unwrap_or(false)
        };
        match tokio::time::timeout(STOP_TIMEOUT, ended).await {
            Ok(true) => {}
            Ok(false) => warn!("a thread of the DNS server had panicked"),
            Err(_) => warn!("the DNS server took too long to stop, so it was cut off"),
        }
    }
}

impl Drop for DnsServer {
    fn drop(&mut self) {
        self.mailboxes.iter().for_each(|mailbox| mailbox.stop());
        self.closing.send_replace(true);
        self.stopped.send_replace(true);
    }
}

/// Reports its drop, also in a panic.
struct ExitNotifier(watch::Sender<bool>);

impl Drop for ExitNotifier {
    fn drop(&mut self) {
        self.0.send_replace(true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_of_a_thread_is_reported() {
        let (ended, mut has_ended) = watch::channel(false);
        let ends = ExitNotifier(ended);
        let thread = std::thread::spawn(move || {
            let _ends = ends;
            panic!("a defect");
        });
        assert!(thread.join().is_err());
        assert!(*has_ended.wait_for(|ended| *ended).await.unwrap());
    }
}
