//! What happens in a simulation.

use std::time::Duration;

/// What a backend does with connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// It serves them.
    Serves,
    /// It refuses them, and resets those that are open.
    Refuses,
    /// It never answers a SYN; what is open goes on.
    Silent,
}

/// What changes with one backend, or with some.
#[derive(Clone, Copy, Debug)]
pub enum Change {
    /// What it does with connections.
    Mode(Mode),
    /// By how much its work takes longer than others'.
    Slowness(f64),
    /// It joins the service, which every client learns at once.
    Join,
}

/// A change, when it happens and to which backends.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    /// Since the start.
    pub at: Duration,
    /// The first backend.
    pub first: usize,
    /// How many there are of them.
    pub n_backends: usize,
    /// The change.
    pub change: Change,
}

/// A scene: who is there, and what happens.
#[derive(Clone, Debug)]
pub struct Scene {
    /// The name on the command line.
    pub name: &'static str,
    /// What the table is called.
    pub title: String,
    /// Client nodes, each of which knows its own connections alone.
    pub n_nodes: usize,
    /// Backends, those that join later included.
    pub n_backends: usize,
    /// Which backends are the odd ones, whose share is shown.
    pub is_odd: fn(usize) -> bool,
    /// When the share of the odd ones is taken; the whole time where there is none.
    pub odd_window: Option<(Duration, Duration)>,
    /// The round-trip time to a backend.
    pub rtt: fn(usize) -> Duration,
    /// What happens.
    pub events: Vec<Event>,
    /// How long connections are begun.
    pub lasts: Duration,
}

const NEAR: Duration = Duration::from_micros(500);
const FAR: Duration = Duration::from_millis(20);

/// The time in which measuring hasn't begun.
pub const WARM_UP: Duration = Duration::from_secs(2);

/// All scenes, for so many client nodes, backends and seconds.
pub fn all(n_nodes: usize, n_backends: usize, lasts: Duration) -> Vec<Scene> {
    let scene = |name, title: &str, is_odd: fn(usize) -> bool, events| Scene {
        name,
        title: title.to_owned(),
        n_nodes,
        n_backends,
        is_odd,
        odd_window: None,
        rtt: |_| NEAR,
        events,
        lasts,
    };
    let first = |at, change| Event { at, first: 0, n_backends: 1, change };
    let start = Duration::ZERO;
    // A twentieth of the backends at once, one part after the other, each away for as long as two take.
    let part = n_backends.div_ceil(20);
    let step = (lasts - WARM_UP) / 20;
    let restart = |n: u32, mode| Event {
        at: WARM_UP + step * n,
        first: 0,
        n_backends: part,
        change: Change::Mode(mode),
    };
    let rolling = (0..20).flat_map(|n| {
        let first = part * n as usize;
        let stop = Event { first, ..restart(n, Mode::Refuses) };
        let start = Event { first, ..restart(n + 2, Mode::Serves) };
        [stop, start]
    });
    let joins = WARM_UP + Duration::from_secs(1);
    let new = [
        first(start, Change::Slowness(5.0)),
        first(joins, Change::Join),
        first(joins + Duration::from_secs(5), Change::Slowness(1.0)),
    ];
    vec![
        scene("equal", "All backends are equal", none, vec![]),
        Scene {
            n_nodes: (n_nodes / 200).max(2),
            ..scene(
                "gateways",
                "All backends are equal, and few clients make all connections",
                none,
                vec![],
            )
        },
        scene(
            "slow",
            "One backend is 50 times slower",
            one,
            vec![first(start, Change::Slowness(50.0))],
        ),
        scene(
            "refuses",
            "One backend refuses",
            one,
            vec![first(WARM_UP, Change::Mode(Mode::Refuses))],
        ),
        scene(
            "silent",
            "One backend is silent",
            one,
            vec![first(WARM_UP, Change::Mode(Mode::Silent))],
        ),
        scene(
            "restart",
            "A rolling restart: a twentieth after the other refuses, unannounced",
            none,
            rolling.collect(),
        ),
        Scene {
            odd_window: Some((joins, joins + Duration::from_secs(2))),
            ..scene("new", "A backend joins, and is 5 times slower for 5 s", one, new.to_vec())
        },
        Scene {
            rtt: |backend| if is_far(backend) { FAR } else { NEAR },
            ..scene("far", "Every other backend is 20 ms away", is_far, vec![])
        },
    ]
}

fn none(_: usize) -> bool {
    false
}

fn one(backend: usize) -> bool {
    backend == 0
}

fn is_far(backend: usize) -> bool {
    !backend.is_multiple_of(2)
}
