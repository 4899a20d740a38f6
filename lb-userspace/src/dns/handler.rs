//! Handles messages of all transports: each is answered from the table or forwarded.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use hickory_proto::op::ResponseCode;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tracing::debug;

use super::acl::{Acl, Admission, ClientKey};
use super::encode;
use super::forward::Forwarder;
use super::message::ClientQuery;
use super::origin::{AnswerOrigin, OriginTracker};
use super::query_log::Arrival;
use super::relay::ForwardError;
use super::resolve::{self, Missing, Resolution, ResolveContext, TableSnapshot, Zone};
use super::response::RelayOptions;
use super::stats::{DnsStats, Dropped};
use super::usage_limiter::UsageLimiter;
use crate::catalog::{Lookup, UsageSender};
use crate::config::Unrouted;
use crate::table::{Service, Table, Watch};

/// How long a response waits for a service to become live. After that, a name that the table has is
/// answered from the table, and another one is SERVFAIL.
const FETCH_TIMEOUT: Duration = Duration::from_millis(250);

/// The UDP queries that may wait for the zone at a time: further ones are answered at once from
/// what is known or, while the zone is waited for after the start, stay in the socket.
pub(super) const MAX_WAITING: usize = 1024;

/// What a reload replaces while the server runs.
#[derive(Debug)]
pub(super) struct Policy {
    pub(super) zone: Zone,
    pub(super) acl: Arc<Acl>,
    pub(super) forwarder: Arc<Forwarder>,
    /// Whether queries are logged.
    pub(super) log: bool,
}

/// A thread's own copy of everything that changes, so that it takes no lock per message.
#[derive(Debug)]
pub(super) struct ThreadView {
    policy: Arc<Policy>,
    version: u64,
    table: watch::Receiver<Arc<Table>>,
    snapshot: Arc<TableSnapshot>,
    attached: watch::Receiver<bool>,
    is_attached: bool,
}

impl ThreadView {
    /// The forwarder.
    pub(super) fn forwarder(&self) -> &Forwarder {
        &self.policy.forwarder
    }

    /// What may be replaced.
    pub(super) fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The bounds on times to live of what is forwarded of the zone.
    pub(super) fn max_ttls(&self) -> (u32, u32) {
        self.policy.zone.max_ttls()
    }

    /// Whether the zone can be answered for.
    pub(super) fn is_ready(&self) -> bool {
        self.is_attached && self.snapshot.table.is_synced()
    }

    /// The context for the zone's responses; nothing waits.
    pub(super) fn known(&self) -> ResolveContext<'_> {
        let (zone, snapshot) = (&self.policy.zone, &*self.snapshot);
        ResolveContext {
            zone,
            snapshot,
            attached: self.is_attached,
            waits: false,
            missing: Missing::Absent,
        }
    }

    /// Who a client's queries are accounted to.
    pub(super) fn client_key(&self, client: IpAddr) -> ClientKey {
        self.policy.acl.client_key(client)
    }
}

/// The result of a query that waited.
#[derive(Debug)]
pub(super) enum Deferred {
    Answer(Vec<u8>),
    /// It is to be forwarded; `is_unknown` if it may be a service all the same.
    Forward {
        is_unknown: bool,
    },
    Nothing,
}

/// Answers messages of all transports.
#[derive(Debug)]
pub(super) struct Handler {
    pub(super) policy: RwLock<Arc<Policy>>,
    /// Incremented with each change of `policy`.
    pub(super) version: AtomicU64,
    pub(super) table: watch::Receiver<Arc<Table>>,
    /// Of the latest table that was queried.
    pub(super) snapshot: RwLock<Arc<TableSnapshot>>,
    pub(super) attached: watch::Receiver<bool>,
    pub(super) demand: UsageSender,
    pub(super) usage_limiter: UsageLimiter,
    /// The end of the startup grace period, during which queries wait for the zone.
    pub(super) ready_by: Instant,
    pub(super) waiting: Arc<Semaphore>,
    /// The queries whose origin is tracked.
    pub(super) origins: OriginTracker,
    pub(super) stats: Arc<DnsStats>,
}

impl Handler {
    pub(super) fn policy(&self) -> Arc<Policy> {
        self.policy.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The current forwarder.
    pub(super) fn forwarder(&self) -> Arc<Forwarder> {
        self.policy().forwarder.clone()
    }

    /// The current ACL.
    pub(super) fn acl(&self) -> Arc<Acl> {
        self.policy().acl.clone()
    }

    /// Waits until no query waits.
    pub(super) async fn drained(&self) {
        drop(self.waiting.acquire_many(MAX_WAITING as u32).await);
    }

    /// A permit to wait for the zone, if one is left.
    pub(super) fn place(&self) -> Option<OwnedSemaphorePermit> {
        self.waiting.clone().try_acquire_owned().ok()
    }

    /// The initial view of a thread.
    pub(super) fn view(&self) -> ThreadView {
        let version = self.version.load(Ordering::Acquire);
        let (mut table, mut attached) = (self.table.clone(), self.attached.clone());
        table.mark_unchanged();
        attached.mark_unchanged();
        let (snapshot, is_attached) = (self.snapshot(), *attached.borrow_and_update());
        ThreadView { policy: self.policy(), version, table, snapshot, attached, is_attached }
    }

    /// Updates a thread's view. Returns whether the configuration changed.
    pub(super) fn refresh(&self, view: &mut ThreadView) -> bool {
        // An error means that there will be no further change.
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
        (view.version, view.policy) = (version, self.policy());
        true
    }

    /// What names of the zone get that no service has.
    pub(super) fn unrouted(&self) -> Unrouted {
        self.policy().zone.unrouted()
    }

    fn snapshot(&self) -> Arc<TableSnapshot> {
        let table = self.table.borrow();
        {
            let snapshot = self.snapshot.read().unwrap_or_else(PoisonError::into_inner);
            if Arc::ptr_eq(&snapshot.table, &table) {
                return snapshot.clone();
            }
        }
        let snapshot = Arc::new(TableSnapshot::new(table.clone()));
        drop(table);
        *self.snapshot.write().unwrap_or_else(PoisonError::into_inner) = snapshot.clone();
        snapshot
    }

    /// The response (or none) for a client that isn't served or exceeds its rate; `None` for one
    /// that is served.
    pub(super) fn refusal(
        &self,
        policy: &Policy,
        bytes: &[u8],
        arrival: &Arrival,
    ) -> Option<Option<Vec<u8>>> {
        if self.origins.any()
            && let Ok(query) = ClientQuery::read(bytes)
        {
            self.origins.note(query.id(), query.question(), || AnswerOrigin::Own);
        }
        let admission = policy.acl.admit(arrival.client.ip());
        if admission == Admission::Admitted {
            return None;
        }
        if admission == Admission::Limited {
            self.stats.count_dropped(Dropped::RateLimited);
            return Some(None);
        }
        let Ok(query) = ClientQuery::read(bytes) else {
            self.stats.count_dropped(Dropped::Malformed);
            return Some(None);
        };
        let code = ResponseCode::Refused;
        self.stats.count(code);
        let mut out = Vec::new();
        encode::error(&mut out, &query, code, encode::max_len(&query, arrival.transport));
        if policy.log {
            arrival.log(query.question(), code, &out);
        }
        Some(Some(out))
    }

    /// Counts the result of a message, reports the use of its service, and logs it. Returns whether `response` is
    /// to be sent.
    pub(super) fn finish_answer(
        &self,
        policy: &Policy,
        outcome: Resolution<'_, '_>,
        (bytes, arrival): (&[u8], &Arrival),
        response: &[u8],
    ) -> bool {
        let code = match outcome {
            Resolution::Drop => {
                self.stats.count_dropped(Dropped::Malformed);
                return false;
            }
            Resolution::Reply(code, used) => {
                if let Some(service) = used {
                    self.report_usage(service);
                }
                code
            }
            // The caller handles these.
            Resolution::Wait | Resolution::Warm(_) | Resolution::Forward(_) => return false,
        };
        self.stats.count(code);
        if policy.log
            && let Ok(query) = ClientQuery::read(bytes)
        {
            arrival.log(query.question(), code, response);
        }
        true
    }

    /// Reports that a service is used, at most once a minute.
    fn report_usage(&self, service: &Service) {
        if self.demand.is_connected() && self.usage_limiter.is_due(&service.name) {
            self.demand.used(&service.name);
        }
    }

    /// The response to a message over TCP; `None` where there is none.
    pub(super) async fn reply_over_tcp(&self, bytes: &[u8], arrival: &Arrival) -> Option<Vec<u8>> {
        match self.refusal(&self.policy(), bytes, arrival) {
            Some(refusal) => refusal,
            None => self.reply(bytes, arrival).await,
        }
    }

    /// The response to a message of a served client, over TCP or TLS; `None` where there is none.
    pub(super) async fn reply(&self, bytes: &[u8], arrival: &Arrival) -> Option<Vec<u8>> {
        match self.resolve_deferred(bytes, arrival).await {
            Deferred::Answer(answer) => Some(answer),
            Deferred::Nothing => None,
            Deferred::Forward { is_unknown } => {
                let query = ClientQuery::read(bytes).ok()?; // it was read before
                Some(self.forward(&self.policy(), &query, arrival, is_unknown).await)
            }
        }
    }

    /// Resolves a query that may wait for the zone or for a service.
    pub(super) async fn resolve_deferred(&self, bytes: &[u8], arrival: &Arrival) -> Deferred {
        let mut out = Vec::new();
        let mut found = None;
        let mut waits = self.in_startup_grace();
        loop {
            let (policy, snapshot) = (self.policy(), self.snapshot());
            let attached = *self.attached.borrow();
            let missing = found.unwrap_or_else(|| self.missing());
            let known = ResolveContext {
                zone: &policy.zone,
                snapshot: &snapshot,
                attached,
                waits,
                missing,
            };
            match resolve::answer(bytes, arrival.transport, known, &mut out) {
                Resolution::Wait => {
                    self.wait_ready().await;
                    waits = false;
                }
                Resolution::Warm(name) => {
                    found = Some(self.wait_live(&name).await);
                }
                Resolution::Forward(_) => {
                    return Deferred::Forward { is_unknown: found == Some(Missing::Unknown) };
                }
                outcome => {
                    let is_answered = self.finish_answer(&policy, outcome, (bytes, arrival), &out);
                    return if is_answered { Deferred::Answer(out) } else { Deferred::Nothing };
                }
            }
        }
    }

    /// Whether queries still wait for the zone after the start.
    pub(super) fn in_startup_grace(&self) -> bool {
        Instant::now() < self.ready_by
    }

    /// Waits until the zone can be answered for, at most until the startup grace period ends.
    pub(super) async fn wait_ready(&self) {
        let (mut table, mut attached) = (self.table.clone(), self.attached.clone());
        let reliable = async {
            let _ = table.wait_for(|table| table.is_synced()).await;
            let _ = attached.wait_for(|attached| *attached).await;
        };
        let _ = tokio::time::timeout_at(self.ready_by.into(), reliable).await;
    }

    /// How a name that isn't live in the table is handled.
    pub(super) fn missing(&self) -> Missing {
        if self.demand.is_connected() { Missing::LookUp } else { Missing::Absent }
    }

    /// Waits a moment for a service to become live, and returns what is known of its name then.
    async fn wait_live(&self, name: &str) -> Missing {
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
        match tokio::time::timeout(FETCH_TIMEOUT, warming).await {
            Ok(Lookup::Absent) => Missing::Absent,
            // One that exists is in the table, or was rejected.
            Ok(Lookup::Exists | Lookup::Unknown) | Err(_) => Missing::Unknown,
        }
    }

    /// An upstream's response over TCP, or an error. If the name may be a service (`is_unknown`),
    /// an upstream's NXDOMAIN is SERVFAIL, too.
    async fn forward(
        &self,
        policy: &Policy,
        query: &ClientQuery<'_>,
        arrival: &Arrival,
        is_unknown: bool,
    ) -> Vec<u8> {
        let mut out = Vec::new();
        let log = |code, response: &[u8]| {
            if policy.log {
                arrival.log(query.question(), code, response);
            }
        };
        let max_len = encode::max_len(query, arrival.transport);
        let client_key = policy.acl.client_key(arrival.client.ip());
        let note = |origin| self.origins.note(query.id(), query.question(), || origin);
        let why = match policy.forwarder.over_tcp(query, client_key).await {
            Ok((answer, ..)) if is_unknown && answer.code() == ResponseCode::NXDomain => {
                ForwardError::Unknown
            }
            Ok((answer, upstream, is_in_zone)) => {
                note(AnswerOrigin::Upstream(upstream.address));
                self.stats.count(answer.code());
                let how = RelayOptions {
                    max_len,
                    keeps_ad: upstream.keeps_ad(),
                    max_ttls: is_in_zone.then(|| policy.zone.max_ttls()),
                };
                answer.relay_to(&query.client(), how, &mut out);
                log(answer.code(), &out);
                return out;
            }
            Err(error) => error,
        };
        debug!("not forwarded: {why}");
        note(AnswerOrigin::Nowhere(why.to_string()));
        let code = why.code();
        self.stats.count(code);
        encode::error(&mut out, query, code, max_len);
        log(code, &out);
        out
    }
}
