//! The simulation: clients, the network and backends, event by event.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use super::policies::{Balancers, Outcome, Policy};
use super::scenes::{Change, Mode, Scene, WARM_UP};

/// The requests that a backend works on at once; others wait in its queue.
const N_WORKERS: usize = 2;
/// The mean time of a request's work, whose distribution is exponential.
const WORK_NS: f64 = 50e6;
/// How much of all backends' time the requests take.
const UTILISATION: f64 = 0.6;
/// When a client gives up a connection that isn't established.
const CONNECT_TIMEOUT_NS: u64 = 3_000_000_000;
/// The keys of all nodes together, as cgroups are, for each backend.
const KEYS_PER_BACKEND: usize = 16;

/// What a policy did in a scene, of connections that began after the warm-up.
#[derive(Clone, Debug, PartialEq)]
pub struct Figures {
    /// The number of connections.
    pub n_connections: usize,
    /// The connections of the backend that got the most, over the mean.
    pub busiest: f64,
    /// The most requests that a backend had at once, waiting or not.
    pub most_open: usize,
    /// The share of the odd backends, over their fair share.
    pub odd_share: Option<f64>,
    /// From connect() to the response: the median, and the 99th and 99.9th percentile.
    pub waiting: [Duration; 3],
    /// Connections that failed: refused, given up or reset.
    pub n_failed: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    /// Something happens, by its number in the scene.
    Happens(usize),
    /// A client connects.
    Connects,
    /// A SYN arrives.
    Syn(usize),
    /// The answer to it arrives: whether it is accepted.
    Answer(usize, bool),
    /// The client has waited long enough.
    GivesUp(usize),
    /// A worker is done with a request; unless its backend was restarted since.
    Done(usize, u32),
    /// The response arrives, and the connection is closed.
    Closed(usize),
    /// A reset arrives.
    Reset(usize),
}

struct Request {
    node: usize,
    backend: u32,
    began_ns: u64,
}

struct Backend {
    mode: Mode,
    slowness: f64,
    rtt_ns: u64,
    /// Grows with each restart.
    epoch: u32,
    working: Vec<usize>,
    queue: VecDeque<usize>,
    n_measured: usize,
    n_odd: usize,
}

struct Simulation<'a> {
    scene: &'a Scene,
    balancers: Balancers,
    backends: Vec<Backend>,
    members: Vec<u32>,
    requests: Vec<Request>,
    steps: BinaryHeap<Reverse<(u64, u64, Step)>>,
    n_steps: u64,
    random: fastrand::Rng,
    now_ns: u64,
    waited_ns: Vec<u64>,
    n_failed: usize,
    most_open: usize,
    n_odd_window: usize,
}

/// Runs a scene by a policy. The same seed gives the same figures, and the same arrivals and work to
/// every policy.
pub fn run(scene: &Scene, policy: Policy, seed: u64) -> Figures {
    let joins = |backend: usize| {
        scene
            .events
            .iter()
            .any(|event| matches!(event.change, Change::Join) && event.first == backend)
    };
    let members: Vec<u32> =
        (0..scene.n_backends).filter(|&idx| !joins(idx)).map(|idx| idx as u32).collect();
    let backend = |idx| Backend {
        mode: Mode::Serves,
        slowness: 1.0,
        rtt_ns: (scene.rtt)(idx).as_nanos() as u64,
        epoch: 0,
        working: Vec::new(),
        queue: VecDeque::new(),
        n_measured: 0,
        n_odd: 0,
    };
    let mut balancers = Balancers::new(policy, scene.n_nodes, scene.n_backends, seed ^ 0x5eed);
    balancers.set_members(&members, 0);
    let mut simulation = Simulation {
        scene,
        balancers,
        backends: (0..scene.n_backends).map(backend).collect(),
        members,
        requests: Vec::new(),
        steps: BinaryHeap::new(),
        n_steps: 0,
        random: fastrand::Rng::with_seed(seed),
        now_ns: 0,
        waited_ns: Vec::new(),
        n_failed: 0,
        most_open: 0,
        n_odd_window: 0,
    };
    for (idx, event) in scene.events.iter().enumerate() {
        simulation.plan(event.at.as_nanos() as u64, Step::Happens(idx));
    }
    simulation.plan(0, Step::Connects);
    while let Some(Reverse((now_ns, _, step))) = simulation.steps.pop() {
        simulation.now_ns = now_ns;
        simulation.take(step);
    }
    debug_assert!(simulation.balancers.are_idle(), "every connection has ended");
    simulation.figures()
}

impl Simulation<'_> {
    fn plan(&mut self, at_ns: u64, step: Step) {
        self.n_steps += 1;
        self.steps.push(Reverse((at_ns, self.n_steps, step)));
    }

    fn after(&mut self, ns: u64, step: Step) {
        self.plan(self.now_ns + ns, step);
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Happens(idx) => self.happens(idx),
            Step::Connects => self.connects(),
            Step::Syn(request) => self.syn(request),
            Step::Answer(request, is_accepted) => self.answer(request, is_accepted),
            Step::GivesUp(request) => self.fail(request, Outcome::GaveUp),
            Step::Done(request, epoch) => self.done(request, epoch),
            Step::Closed(request) => self.closed(request),
            Step::Reset(request) => self.fail(request, Outcome::Reset),
        }
    }

    fn happens(&mut self, idx: usize) {
        let event = self.scene.events[idx];
        let last = (event.first + event.n_backends).min(self.backends.len());
        for idx in event.first.min(last)..last {
            match event.change {
                Change::Slowness(slowness) => self.backends[idx].slowness = slowness,
                Change::Join => {
                    self.members.push(idx as u32);
                    self.balancers.set_members(&self.members, self.now_ns);
                }
                Change::Mode(mode) => {
                    let backend = &mut self.backends[idx];
                    backend.mode = mode;
                    if mode == Mode::Refuses {
                        backend.epoch += 1;
                        // A reset follows the answer to the SYN, which may be under way.
                        let back_ns = backend.rtt_ns / 2;
                        let working = std::mem::take(&mut backend.working);
                        let queue = std::mem::take(&mut backend.queue);
                        working
                            .into_iter()
                            .chain(queue)
                            .for_each(|open| self.after(back_ns, Step::Reset(open)));
                    }
                }
            }
        }
    }

    /// Clients connect at random, each as often as the others.
    fn connects(&mut self) {
        let n_backends = self.scene.n_backends as f64;
        let mean_ns = WORK_NS / (n_backends * N_WORKERS as f64 * UTILISATION);
        let wait_ns = self.exponential(mean_ns);
        if Duration::from_nanos(self.now_ns + wait_ns) < self.scene.lasts {
            self.after(wait_ns, Step::Connects);
        }
        let node = self.random.usize(..self.scene.n_nodes);
        let n_keys = (KEYS_PER_BACKEND * self.scene.n_backends).div_ceil(self.scene.n_nodes) as u64;
        let key = node as u64 * n_keys + self.random.u64(..n_keys);
        let backend = self.balancers.connect(node, key, self.now_ns);
        let request = self.requests.len();
        self.requests.push(Request { node, backend, began_ns: self.now_ns });
        if self.is_measured(self.now_ns) {
            self.backends[backend as usize].n_measured += 1;
        }
        let (from, to) = self.odd_window();
        if (from..to).contains(&Duration::from_nanos(self.now_ns)) {
            self.n_odd_window += 1;
            self.backends[backend as usize].n_odd += 1;
        }
        self.after(self.backends[backend as usize].rtt_ns / 2, Step::Syn(request));
    }

    fn syn(&mut self, request: usize) {
        let Request { backend, began_ns, .. } = self.requests[request];
        let backend = &mut self.backends[backend as usize];
        let back_ns = backend.rtt_ns / 2;
        match backend.mode {
            Mode::Silent => self.plan(began_ns + CONNECT_TIMEOUT_NS, Step::GivesUp(request)),
            Mode::Refuses => self.after(back_ns, Step::Answer(request, false)),
            Mode::Serves => {
                self.after(back_ns, Step::Answer(request, true));
                let backend = &mut self.backends[self.requests[request].backend as usize];
                backend.queue.push_back(request);
                self.most_open = self.most_open.max(backend.queue.len() + backend.working.len());
                self.work(self.requests[request].backend);
            }
        }
    }

    fn answer(&mut self, request: usize, is_accepted: bool) {
        let Request { node, backend, began_ns } = self.requests[request];
        if is_accepted {
            let took = Outcome::Established(self.now_ns - began_ns);
            self.balancers.report(node, backend, took, self.now_ns);
        } else {
            self.fail(request, Outcome::Refused);
        }
    }

    /// A backend's idle workers take what waits.
    fn work(&mut self, idx: u32) {
        loop {
            let backend = &mut self.backends[idx as usize];
            if backend.working.len() == N_WORKERS {
                return;
            }
            let Some(request) = backend.queue.pop_front() else { return };
            backend.working.push(request);
            let (epoch, mean_ns) = (backend.epoch, WORK_NS * backend.slowness);
            // The work of a request depends on the request alone, not on the backend.
            let work_ns = exponential(&mut fastrand::Rng::with_seed(request as u64), mean_ns);
            self.after(work_ns, Step::Done(request, epoch));
        }
    }

    fn done(&mut self, request: usize, epoch: u32) {
        let idx = self.requests[request].backend;
        let backend = &mut self.backends[idx as usize];
        if backend.epoch != epoch {
            return;
        }
        backend.working.retain(|&working| working != request);
        // The response takes half a round trip, and so does the handshake's last part before it.
        let rtt_ns = backend.rtt_ns;
        self.after(rtt_ns, Step::Closed(request));
        self.work(idx);
    }

    fn closed(&mut self, request: usize) {
        let Request { node, backend, began_ns } = self.requests[request];
        if self.is_measured(began_ns) {
            self.waited_ns.push(self.now_ns - began_ns);
        }
        self.balancers.report(node, backend, Outcome::Closed, self.now_ns);
    }

    fn fail(&mut self, request: usize, outcome: Outcome) {
        let Request { node, backend, began_ns } = self.requests[request];
        self.balancers.report(node, backend, outcome, self.now_ns);
        self.n_failed += usize::from(self.is_measured(began_ns));
    }

    fn is_measured(&self, began_ns: u64) -> bool {
        Duration::from_nanos(began_ns) >= WARM_UP
    }

    fn odd_window(&self) -> (Duration, Duration) {
        self.scene.odd_window.unwrap_or((WARM_UP, self.scene.lasts))
    }

    fn exponential(&mut self, mean_ns: f64) -> u64 {
        exponential(&mut self.random, mean_ns)
    }

    fn figures(mut self) -> Figures {
        let n_connections: usize = self.backends.iter().map(|backend| backend.n_measured).sum();
        let most = self.backends.iter().map(|backend| backend.n_measured).max().unwrap_or(0);
        let fair = n_connections as f64 / self.backends.len() as f64;
        let odd = self.backends.iter().enumerate().filter(|&(idx, _)| (self.scene.is_odd)(idx));
        let n_odd = odd.clone().count();
        let odd: usize = odd.map(|(_, backend)| backend.n_odd).sum();
        let odd_fair = self.n_odd_window as f64 * n_odd as f64 / self.backends.len() as f64;
        self.waited_ns.sort_unstable();
        let percentile = |of_1000: usize| {
            let idx = self.waited_ns.len() * of_1000 / 1_000;
            Duration::from_nanos(self.waited_ns.get(idx).copied().unwrap_or(0))
        };
        Figures {
            n_connections,
            busiest: most as f64 / fair,
            most_open: self.most_open,
            odd_share: (n_odd > 0).then(|| odd as f64 / odd_fair),
            waiting: [500, 990, 999].map(percentile),
            n_failed: self.n_failed,
        }
    }
}

fn exponential(random: &mut fastrand::Rng, mean_ns: f64) -> u64 {
    // Never of 0, whose logarithm is infinite.
    (-(1.0 - random.f64()).ln() * mean_ns) as u64
}
