//! What the addresses of instances mean on this host: names that stand for some, looked up by the
//! system's resolver and kept fresh, and the networks that are this host's own.
//!
//! Nothing waits for it: an instance whose name has no answer yet is unroutable meanwhile, and a
//! name that gets no answer any more keeps the last one.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::stream::BoxStream;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::host::Bridges;
use crate::table::{Bridge, Host, Hosts};

/// How long an answer is taken for fresh; then the name is looked up again.
const FRESH: Duration = Duration::from_secs(30);

/// How long it takes until a failed lookup is repeated.
const RETRY: Duration = Duration::from_secs(5);

/// How long an address counts that a rotating name doesn't give any more.
const ROTATION: Duration = Duration::from_secs(5 * 60);

/// The most addresses of a name that are remembered.
const MAX_SEEN: usize = 64;

/// How often this host's bridges are looked at, should the kernel's messages have been lost.
const LOOK: Duration = Duration::from_secs(60);

/// How many lookups may be under way: each holds a thread (getaddrinfo blocks), for as long as the
/// system's resolver takes to give up.
const N_LOOKUPS: usize = 8;

/// The task that looks names up; dropping it ends it.
#[derive(Debug)]
pub struct Resolver {
    wanted: watch::Sender<BTreeSet<String>>,
    hosts: watch::Receiver<Arc<Hosts>>,
    _task: JoinSet<()>,
}

impl Resolver {
    /// Starts it on the current tokio runtime, and knows this host's bridges then. `domain` is the zone
    /// that is ours: names in it would lead back to where they come from.
    pub async fn start(domain: &str) -> Resolver {
        let (kernel, changes) = match Bridges::listen() {
            Ok((kernel, changes)) => (Some(kernel), changes.boxed()),
            Err(error) => {
                tracing::warn!("this host's bridges can't be distinguished from others' ({error})");
                (None, futures_util::stream::pending().boxed())
            }
        };
        let mut book = Book::new(domain);
        look(kernel.as_ref(), &mut book).await;
        let (wanted, names) = watch::channel(BTreeSet::new());
        let (publish, hosts) = watch::channel(Arc::new(book.hosts()));
        let mut task = JoinSet::new();
        task.spawn(run(book, kernel, changes, names, publish));
        Resolver { wanted, hosts, _task: task }
    }

    /// Says which names are to be kept fresh; the others are forgotten.
    pub fn want(&self, names: BTreeSet<String>) {
        self.wanted.send_if_modified(|wanted| {
            let differs = *wanted != names;
            *wanted = names;
            differs
        });
    }

    /// What the names stand for now.
    pub fn hosts(&self) -> Arc<Hosts> {
        self.hosts.borrow().clone()
    }

    /// Waits until a name stands for something else than [`Resolver::hosts`] said last here. `None`
    /// once nobody looks names up any more, which only a defect brings about.
    pub async fn changed(&mut self) -> Option<Arc<Hosts>> {
        self.hosts.changed().await.ok()?;
        Some(self.hosts.borrow_and_update().clone())
    }
}

async fn run(
    mut book: Book,
    kernel: Option<Bridges>,
    mut changes: BoxStream<'static, ()>,
    mut wanted: watch::Receiver<BTreeSet<String>>,
    publish: watch::Sender<Arc<Hosts>>,
) {
    let mut lookups = JoinSet::new();
    let mut looks = tokio::time::interval(LOOK);
    loop {
        while lookups.len() < N_LOOKUPS
            && let Some(name) = book.next(Instant::now())
        {
            lookups.spawn(async move {
                let answer = tokio::net::lookup_host((name.as_str(), 0)).await;
                let addresses = answer.map(|answer| answer.map(|address| address.ip()).collect());
                (name, addresses)
            });
        }
        publish.send_if_modified(|last| {
            let hosts = book.hosts();
            let differs = **last != hosts;
            if differs {
                *last = Arc::new(hosts);
            }
            differs
        });
        let rest = book.rest(Instant::now()).filter(|_| lookups.len() < N_LOOKUPS);
        tokio::select! {
            Some(Ok((name, addresses))) = lookups.join_next() => {
                book.answered(&name, addresses, Instant::now(), fastrand::f64());
            }
            changed = wanted.changed() => {
                if changed.is_err() {
                    return;
                }
                book.want(&wanted.borrow_and_update(), Instant::now());
            }
            Some(()) = changes.next() => {
                // Those that came together are one.
                drain(&mut changes);
                look(kernel.as_ref(), &mut book).await;
            }
            _ = looks.tick() => look(kernel.as_ref(), &mut book).await,
            () = sleep(rest) => {}
        }
    }
}

fn drain(changes: &mut BoxStream<'static, ()>) {
    while let Some(Some(())) = changes.next().now_or_never() {}
}

async fn look(kernel: Option<&Bridges>, book: &mut Book) {
    let Some(kernel) = kernel else { return };
    match kernel.look().await {
        Ok(bridges) => {
            if book.bridges != bridges {
                let shown: Vec<_> =
                    bridges.iter().map(|b| format!("{} {}", b.name, b.network)).collect();
                tracing::info!("networks on bridges of this host alone: [{}]", shown.join(", "));
            }
            book.bridges = bridges;
        }
        Err(error) => tracing::warn!("can't list this host's bridges ({error})"),
    }
}

async fn sleep(time: Option<Duration>) {
    match time {
        Some(time) => tokio::time::sleep(time).await,
        None => std::future::pending().await,
    }
}

/// What is known of each name, and when it is looked up next. Pure.
#[derive(Debug)]
struct Book {
    domain: String,
    names: BTreeMap<String, Entry>,
    bridges: Vec<Bridge>,
}

#[derive(Debug)]
struct Entry {
    host: Option<Host>,
    state: State,
    /// The addresses that it had lately, and when last.
    seen: BTreeMap<IpAddr, Instant>,
    /// Until when it counts as one that gives some of its addresses in turn.
    rotates_until: Option<Instant>,
}

impl Entry {
    /// Takes in the addresses that a lookup found; `None` where it found none.
    ///
    /// The present one stays while it is among them, since each change ends connections; of others
    /// every node takes the first, IPv4 before IPv6. A name that gives some of many in turn, as load
    /// balancers of clouds do, has it back sooner or later: once one came back, the present one stays
    /// for [`ROTATION`] without being seen.
    fn choose(&mut self, found: &[IpAddr], now: Instant) -> Option<Host> {
        let first = *found.iter().min()?;
        let is_recent = |at: &Instant| now.saturating_duration_since(*at) < ROTATION;
        self.seen.retain(|_, at| is_recent(at));
        let previous = self.seen.values().max().copied();
        let came_back = |address| self.seen.get(address).is_some_and(|at| Some(*at) != previous);
        if found.iter().any(came_back) {
            self.rotates_until = Some(now + ROTATION);
        }
        for address in found.iter().take(MAX_SEEN) {
            if self.seen.len() < MAX_SEEN || self.seen.contains_key(address) {
                self.seen.insert(*address, now);
            }
        }
        let rotates = self.rotates_until.is_some_and(|until| now < until);
        let present = match self.host {
            Some(Host::At { address, .. }) => Some(address),
            _ => None,
        };
        let stays = |address: &IpAddr| {
            found.contains(address) || rotates && self.seen.contains_key(address)
        };
        Some(match (&self.host, present.filter(stays)) {
            (Some(Host::At { is_one_of_many, .. }), Some(address)) => {
                let is_one_of_many = *is_one_of_many || self.seen.len() > 1;
                Host::At { address, is_one_of_many }
            }
            _ => Host::At { address: first, is_one_of_many: found.iter().any(|a| *a != first) },
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    /// To be looked up from then on.
    Due(Instant),
    /// Being looked up.
    Asked,
    /// Never looked up.
    Refused,
}

impl Book {
    fn new(domain: &str) -> Book {
        Book { domain: domain.to_ascii_lowercase(), names: BTreeMap::new(), bridges: Vec::new() }
    }

    /// Takes in which names are wanted: new ones are due at once.
    fn want(&mut self, wanted: &BTreeSet<String>, now: Instant) {
        self.names.retain(|name, _| wanted.contains(name));
        for name in wanted {
            if self.names.contains_key(name) {
                continue;
            }
            let refusal = self.refusal(name);
            let state = if refusal.is_some() { State::Refused } else { State::Due(now) };
            let host = refusal.map(Host::Nowhere);
            let (seen, rotates_until) = (BTreeMap::new(), None);
            self.names.insert(name.clone(), Entry { host, state, seen, rotates_until });
        }
    }

    /// Why a name isn't looked up, if it isn't.
    fn refusal(&self, name: &str) -> Option<String> {
        let bare = name.strip_suffix('.').unwrap_or(name);
        let is_ours = match bare.strip_suffix(&self.domain) {
            Some(head) => head.is_empty() || head.ends_with('.'),
            None => false,
        };
        is_ours.then(|| {
            format!(
                "`{name}` is in `{}`, the zone that nohop itself answers, so it would go in a \
                 circle: register the instance's own address",
                self.domain
            )
        })
    }

    /// The name that is due longest, if one is; it is being looked up then.
    fn next(&mut self, now: Instant) -> Option<String> {
        let due = self.due().filter(|(at, _)| *at <= now).min()?.1.clone();
        self.names.get_mut(&due)?.state = State::Asked;
        Some(due)
    }

    /// How long nothing is due.
    fn rest(&self, now: Instant) -> Option<Duration> {
        self.due().map(|(at, _)| at.saturating_duration_since(now)).min()
    }

    fn due(&self) -> impl Iterator<Item = (Instant, &String)> {
        self.names.iter().filter_map(|(name, entry)| match entry.state {
            State::Due(at) => Some((at, name)),
            State::Asked | State::Refused => None,
        })
    }

    /// Takes in what came of a lookup. `random`, in 0..1, spreads the next one, since a fleet
    /// learns of a name at once.
    fn answered(
        &mut self,
        name: &str,
        addresses: io::Result<Vec<IpAddr>>,
        now: Instant,
        random: f64,
    ) {
        let Some(entry) = self.names.get_mut(name) else { return };
        let none = || io::Error::other("it has no address");
        let (host, pause) =
            match addresses.and_then(|found| entry.choose(&found, now).ok_or_else(none)) {
                Ok(host) => (Some(host), FRESH),
                Err(error) => {
                    // The last good answer stays.
                    let is_known = matches!(entry.host, Some(Host::At { .. }));
                    let reason = format!("`{name}` can't be looked up ({error}): see the resolver");
                    ((!is_known).then_some(Host::Nowhere(reason)), RETRY)
                }
            };
        if host.is_some() {
            entry.host = host;
        }
        entry.state = State::Due(now + pause.mul_f64(0.75 + random / 2.0));
    }

    fn hosts(&self) -> Hosts {
        let known =
            self.names.iter().filter_map(|(name, entry)| Some((name.clone(), entry.host.clone()?)));
        Hosts { names: known.collect(), bridges: self.bridges.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HALF: f64 = 0.5;

    fn names(list: &[&str]) -> BTreeSet<String> {
        list.iter().map(|name| (*name).to_owned()).collect()
    }

    fn at(address: &str) -> Host {
        Host::At { address: address.parse().unwrap(), is_one_of_many: false }
    }

    fn answer(address: &str) -> io::Result<Vec<IpAddr>> {
        Ok(vec![address.parse().unwrap()])
    }

    #[test]
    fn a_name_is_looked_up_at_once_and_then_every_half_minute() {
        let now = Instant::now();
        let mut book = Book::new("service");
        assert_eq!((book.next(now), book.rest(now)), (None, None));
        book.want(&names(&["a.example"]), now);
        assert_eq!(book.next(now).as_deref(), Some("a.example"));
        assert_eq!((book.next(now), book.rest(now)), (None, None), "it is under way");
        assert_eq!(book.hosts(), Hosts::default());
        book.answered("a.example", answer("10.0.0.7"), now, HALF);
        assert_eq!(book.hosts().names["a.example"], at("10.0.0.7"));
        assert_eq!(book.next(now), None);
        assert_eq!(book.rest(now), Some(FRESH));
        // A wish that is repeated asks for nothing.
        book.want(&names(&["a.example"]), now);
        assert_eq!(book.rest(now), Some(FRESH));
        assert_eq!(book.next(now + FRESH).as_deref(), Some("a.example"));
        book.answered("a.example", answer("10.0.0.8"), now + FRESH, HALF);
        assert_eq!(book.hosts().names["a.example"], at("10.0.0.8"));
    }

    #[test]
    fn the_present_address_stays_while_the_name_has_it() {
        let ip = |text: &str| -> IpAddr { text.parse().unwrap() };
        // (what each lookup finds, a half minute apart, and what the name stands for then)
        type Lookup = (&'static [&'static str], &'static str);
        let rows: &[(&str, &[Lookup])] = &[
            (
                "every node takes the first, IPv4 before IPv6",
                &[(&["2001:db8::1", "10.0.0.9", "10.0.0.10"], "10.0.0.9+")],
            ),
            (
                "other ones come and go",
                &[
                    (&["10.0.0.9"], "10.0.0.9"),
                    (&["10.0.0.3", "10.0.0.9"], "10.0.0.9+"),
                    (&["10.0.0.9", "10.0.0.1", "10.0.0.2"], "10.0.0.9+"),
                    (&["10.0.0.9"], "10.0.0.9+"),
                ],
            ),
            (
                "a host that moved has moved",
                &[
                    (&["10.0.0.9"], "10.0.0.9"),
                    (&["10.0.0.3"], "10.0.0.3"),
                    (&["10.0.0.4"], "10.0.0.4"),
                ],
            ),
            (
                "one of three in turn",
                &[
                    (&["10.0.0.1"], "10.0.0.1"),
                    (&["10.0.0.2"], "10.0.0.2"),
                    (&["10.0.0.1"], "10.0.0.2+"),
                    (&["10.0.0.3"], "10.0.0.2+"),
                    (&["10.0.0.1"], "10.0.0.2+"),
                    (&["10.0.0.2"], "10.0.0.2+"),
                ],
            ),
        ];
        for (what, lookups) in rows {
            let start = Instant::now();
            let mut book = Book::new("service");
            book.want(&names(&["a.example"]), start);
            for (nth, (found, expected)) in lookups.iter().enumerate() {
                let now = start + FRESH * nth as u32;
                let found = found.iter().map(|address| ip(address)).collect();
                book.answered("a.example", Ok(found), now, HALF);
                let is_one_of_many = expected.ends_with('+');
                let address = ip(expected.trim_end_matches('+'));
                let expected = Host::At { address, is_one_of_many };
                assert_eq!(book.hosts().names["a.example"], expected, "{what}: lookup {nth}");
            }
        }
    }

    #[test]
    fn an_address_that_a_rotating_name_lost_is_given_up_in_the_end() {
        let start = Instant::now();
        let mut book = Book::new("service");
        book.want(&names(&["a.example"]), start);
        let mut at = start;
        for address in ["10.0.0.1", "10.0.0.2", "10.0.0.1", "10.0.0.3", "10.0.0.1"] {
            book.answered("a.example", answer(address), at, HALF);
            at += FRESH;
        }
        let host = |book: &Book| match &book.hosts().names["a.example"] {
            Host::At { address, .. } => address.to_string(),
            Host::Nowhere(why) => why.clone(),
        };
        assert_eq!(host(&book), "10.0.0.2");
        for nth in 0..20 {
            let address = ["10.0.0.1", "10.0.0.3"][nth % 2];
            book.answered("a.example", answer(address), at, HALF);
            at += FRESH;
        }
        assert!(["10.0.0.1", "10.0.0.3"].contains(&&*host(&book)), "{}", host(&book));
    }

    #[test]
    fn a_failure_keeps_the_last_answer_and_is_repeated_soon() {
        let now = Instant::now();
        let mut book = Book::new("service");
        book.want(&names(&["a.example"]), now);
        let failure = || Err(io::Error::other("down"));
        book.next(now);
        book.answered("a.example", failure(), now, HALF);
        let reason = "`a.example` can't be looked up (down): see the resolver";
        assert_eq!(book.hosts().names["a.example"], Host::Nowhere(reason.into()));
        assert_eq!(book.rest(now), Some(RETRY));
        book.answered("a.example", answer("10.0.0.7"), now, HALF);
        for bad in [failure(), Ok(Vec::new())] {
            book.answered("a.example", bad, now, HALF);
            assert_eq!(book.hosts().names["a.example"], at("10.0.0.7"));
        }
    }

    #[test]
    fn what_nobody_wants_is_forgotten_and_a_late_answer_with_it() {
        let now = Instant::now();
        let mut book = Book::new("service");
        book.want(&names(&["a.example", "b.example"]), now);
        assert_eq!(book.next(now).as_deref(), Some("a.example"));
        book.want(&names(&["b.example"]), now);
        book.answered("a.example", answer("10.0.0.7"), now, HALF);
        assert_eq!(book.hosts(), Hosts::default());
        assert_eq!(book.next(now).as_deref(), Some("b.example"));
    }

    #[test]
    fn names_of_our_own_are_refused() {
        let now = Instant::now();
        for (name, is_ours) in [
            ("web.service", true),
            ("web.service.", true),
            ("service", true),
            ("a.b.service", true),
            ("webservice", false),
            ("service.example", false),
            ("web.service.consul", false),
        ] {
            let mut book = Book::new("Service");
            book.want(&names(&[name]), now);
            assert_eq!(book.next(now).is_none(), is_ours, "{name}");
            let hosts = book.hosts();
            let is_said =
                matches!(hosts.names.get(name), Some(Host::Nowhere(why)) if why.contains("circle"));
            assert_eq!(is_said, is_ours, "{name}");
        }
    }

    #[tokio::test]
    async fn the_systems_resolver_is_asked() {
        let mut resolver = Resolver::start("service").await;
        resolver.want(names(&["localhost", "web.service"]));
        let limit = Duration::from_secs(20);
        let known = async {
            loop {
                let hosts = resolver.changed().await.unwrap();
                if hosts.names.contains_key("localhost") {
                    return hosts;
                }
            }
        };
        let hosts = tokio::time::timeout(limit, known).await.unwrap();
        assert!(
            matches!(hosts.names["localhost"], Host::At { address, .. } if address.is_loopback()),
            "{hosts:?}"
        );
        resolver.want(BTreeSet::new());
        let hosts = tokio::time::timeout(limit, resolver.changed()).await.unwrap();
        assert_eq!(hosts.unwrap().names, BTreeMap::new());

        resolver._task.abort_all();
        let hosts = tokio::time::timeout(limit, resolver.changed()).await.unwrap();
        assert!(hosts.is_none(), "its end is seen");
    }
}
