//! The server: sockets in front, the zone and the forwarder behind.

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
use tracing::warn;

use super::acl::Clients;
use super::debug_query::Inquirer;
use super::forward::Forwarder;
use super::handler::{Handler, MAX_WAITING, Ways};
use super::mailbox::{Alarm, Mailbox};
use super::origin::Origins;
use super::probe;
use super::relay::Limits;
use super::resolve::{Snapshot, Zone};
use super::sockets::{DnsError, Sockets};
use super::stats::Stats;
use super::tcp::{self, Connections};
use super::udp::Endpoint;
use super::upstreams::{Registry, Upstreams};
use super::usage_limiter::Told;
use super::worker::{DRAIN, Worker};
use crate::catalog::Demand;
use crate::config::{DnsConfig, VipConfig};
use crate::table::Table;

/// What a stop may take.
const STOP_TIMEOUT: Duration = Duration::from_millis(500);

/// How long after the start questions for the zone wait for it, where sockets were passed: those
/// that came while there was no daemon get more than SERVFAIL, and the first daemon of a machine
/// whose source is down still answers soon.
const GRACE: Duration = Duration::from_secs(2);

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
    /// from the pools of `vip`; while `attached` is false, connections to VIPs would go astray, so the
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
        let forwarder = Forwarder::new(upstreams, limits);
        probe::start(&forwarder, alarm.clone());
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
        let forwarder = Forwarder::new(upstreams, self.limits);
        probe::start(&forwarder, alarm);
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
