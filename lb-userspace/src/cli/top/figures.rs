//! What `nohop top` shows of an interval: rates, calculated from two samples of the daemon's counters.

use std::net::Ipv4Addr;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::admin::api::{BackendStatus, ServiceStatus, Status};
use crate::table::{BackendState, Ports, Watch};

/// What the daemon reported at one moment.
#[derive(Clone, Debug)]
pub struct Sample {
    /// When it reported it.
    pub at: Instant,
    /// The status.
    pub status: Status,
    /// The services, with their counters.
    pub services: Vec<ServiceStatus>,
}

/// `nohop top --json`: the figures of one interval.
///
/// Rates are per second, and `null` where there is no earlier count: of the first sample, of what is
/// new, and of a counter that began again.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// The length of the interval.
    pub seconds: f64,
    /// Whether names are answered and connections translated.
    pub ready: bool,
    /// The daemon's version.
    pub version: String,
    /// The generation of the table in force.
    pub generation: u64,
    /// What is wrong, each with the fix.
    pub problems: Vec<String>,
    /// The sources of the catalog.
    pub sources: Vec<SourceFigures>,
    /// The services, by name.
    pub services: Vec<ServiceFigures>,
}

/// A source of the catalog, within [`Figures`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourceFigures {
    /// `consul` or `file`.
    pub name: String,
    /// `connecting`, `live` or `failing`.
    pub state: String,
    /// Seconds since it last answered; `null` before that.
    pub age_seconds: Option<f64>,
}

/// A service, within [`Figures`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServiceFigures {
    /// The name.
    pub name: String,
    /// Its address on this node.
    pub vip: Ipv4Addr,
    /// The ports it is connected to at.
    pub ports: Ports,
    /// How a backend is chosen.
    pub algorithm: String,
    /// Whether its instances are followed.
    pub watch: Watch,
    /// Why the kernel doesn't have this state of it; `null` when it does.
    pub error: Option<String>,
    /// Connections that were sent to a backend.
    pub connects_per_second: Option<f64>,
    /// Connections that were refused for lack of a backend.
    pub refused_per_second: Option<f64>,
    /// Connections that were sent to a backend and never established.
    pub failed_per_second: Option<f64>,
    /// SYNs that were sent again, counted when a connect ends.
    pub syn_retransmits_per_second: Option<f64>,
    /// Open connections; `null` where the kernel doesn't count them.
    pub in_flight: Option<u64>,
    /// The mean time to connect in microseconds, by the connections of the interval, or by all where
    /// it has none; `null` where it isn't known.
    pub connect_us: Option<f64>,
    /// The backends that get new connections.
    pub reached: usize,
    /// The backends.
    pub backends: Vec<BackendFigures>,
}

/// A backend, within [`ServiceFigures`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BackendFigures {
    /// Address and port.
    pub address: String,
    /// The node it runs on.
    pub node: String,
    /// The id that the source has for the instance.
    pub instance: String,
    /// The name under which people know it.
    pub instance_name: String,
    /// Its state.
    pub state: BackendState,
    /// Why, where that isn't plain.
    pub reason: Option<String>,
    /// Its share of new connections, relative to the other weights.
    pub weight: u16,
    /// Open connections; `null` where the kernel doesn't count them.
    pub in_flight: Option<u64>,
    /// Connections that it was chosen for.
    pub connects_per_second: Option<f64>,
    /// Connections to it that were never established.
    pub failures_per_second: Option<f64>,
    /// The time from SYN to answer in microseconds, a moving average; `null` before the first.
    pub connect_us: Option<u32>,
    /// The round-trip time of its connections in microseconds, a moving average; `null` before the
    /// first has ended.
    pub rtt_us: Option<u32>,
}

impl Figures {
    /// The figures of a sample, with rates since the one before.
    pub fn new(before: Option<&Sample>, now: &Sample) -> Figures {
        let seconds = before.map_or(0.0, |before| (now.at - before.at).as_secs_f64());
        let Status { ready, ref version, generation, ref problems, ref sources, .. } = now.status;
        let sources = sources.iter().map(|source| SourceFigures {
            name: source.name.clone(),
            state: source.state.clone(),
            age_seconds: source.age_seconds,
        });
        // Both lists are sorted by name, and mostly have the same names.
        let mut earlier = before.map_or(&[][..], |before| &before.services).iter().peekable();
        let services = now.services.iter().map(|service| {
            while earlier.next_if(|earlier| earlier.name < service.name).is_some() {}
            let earlier = earlier.next_if(|earlier| earlier.name == service.name);
            service_figures(seconds, earlier, service)
        });
        Figures {
            seconds,
            ready,
            version: version.clone(),
            generation,
            problems: problems.clone(),
            sources: sources.collect(),
            services: services.collect(),
        }
    }
}

fn service_figures(
    seconds: f64,
    earlier: Option<&ServiceStatus>,
    now: &ServiceStatus,
) -> ServiceFigures {
    let rate = |count: fn(&ServiceStatus) -> u64| rate(seconds, earlier.map(count), count(now));
    let backends: Vec<_> = now
        .backends
        .iter()
        .map(|backend| {
            let earlier = earlier.and_then(|earlier| {
                earlier.backends.iter().find(|earlier| is_same(earlier, backend))
            });
            backend_figures(seconds, earlier, backend)
        })
        .collect();
    ServiceFigures {
        name: now.name.clone(),
        vip: now.vip,
        ports: now.ports.clone(),
        algorithm: now.algorithm.to_string(),
        watch: now.watch,
        error: now.error.clone(),
        connects_per_second: rate(|service| service.connects),
        refused_per_second: rate(|service| service.refused),
        failed_per_second: rate(|service| service.failed),
        syn_retransmits_per_second: rate(|service| service.syn_retransmits),
        in_flight: now.in_flight,
        connect_us: mean_connect_us(&backends, now),
        reached: now.backends.iter().filter(|backend| backend.state.is_reached()).count(),
        backends,
    }
}

fn backend_figures(
    seconds: f64,
    earlier: Option<&BackendStatus>,
    now: &BackendStatus,
) -> BackendFigures {
    let rate = |count: fn(&BackendStatus) -> u64| rate(seconds, earlier.map(count), count(now));
    BackendFigures {
        address: now.address.clone(),
        node: now.node.clone(),
        instance: now.instance.clone(),
        instance_name: now.instance_name.clone(),
        state: now.state,
        reason: now.reason.clone(),
        weight: now.weight,
        in_flight: now.in_flight,
        connects_per_second: rate(|backend| backend.connects),
        failures_per_second: rate(|backend| backend.failures),
        connect_us: now.connect_us,
        rtt_us: now.rtt_us,
    }
}

fn is_same(one: &BackendStatus, other: &BackendStatus) -> bool {
    (&one.address, &one.node, &one.instance) == (&other.address, &other.node, &other.instance)
}

fn rate(seconds: f64, earlier: Option<u64>, now: u64) -> Option<f64> {
    let n = now.checked_sub(earlier?)?;
    (seconds > 0.0).then(|| n as f64 / seconds)
}

/// Each backend's time counts by its connections.
fn mean_connect_us(backends: &[BackendFigures], now: &ServiceStatus) -> Option<f64> {
    let mean = |n_connects: &dyn Fn(usize) -> f64| {
        let times = backends.iter().enumerate().filter_map(|(backend_idx, backend)| {
            let n = n_connects(backend_idx);
            backend.connect_us.map(|us| (n, n * f64::from(us)))
        });
        let (n, sum) = times.fold((0.0, 0.0), |(n, sum), each| (n + each.0, sum + each.1));
        (n > 0.0).then(|| sum / n)
    };
    mean(&|idx| backends[idx].connects_per_second.unwrap_or_default())
        .or_else(|| mean(&|idx| now.backends[idx].connects as f64))
}

#[cfg(test)]
pub mod tests {
    use std::time::Duration;

    use super::*;

    /// A service with these counters, and as many of each backend.
    pub fn service(name: &str, connects: u64, backends: &[(&str, u64, u64)]) -> ServiceStatus {
        let backends = backends.iter().map(|&(address, connects, failures)| BackendStatus {
            address: address.into(),
            node: "n1".into(),
            instance: format!("{name}-{address}"),
            instance_name: format!("{name}-{address}"),
            weight: 1,
            state: BackendState::Healthy,
            reason: None,
            drained_by: None,
            connects,
            in_flight: Some(3),
            failures,
            connect_us: Some(connects as u32),
            rtt_us: None,
        });
        let backends: Vec<_> = backends.collect();
        ServiceStatus {
            name: name.into(),
            vip: [127, 186, 3, 9].into(),
            connects,
            failed: backends.iter().map(|backend| backend.failures).sum(),
            in_flight: Some(3 * backends.len() as u64),
            backends,
            ..ServiceStatus::example()
        }
    }

    /// A sample of these services, which a daemon that is ready took so long after the first.
    pub fn sample(first: Instant, millis: u64, services: Vec<ServiceStatus>) -> Sample {
        let status = serde_json::json!({
            "ready": true, "problems": [], "version": "0.1.0", "pid": 1, "generation": 12,
            "sources": [{ "name": "consul", "state": "live", "age_seconds": 0.4 }],
            "services": services.len(), "backends": 1,
            "dns": { "listen": [], "domain": "service" },
            "datapath": { "attached": true, "cgroup": "/", "maps": [], "counters": {} },
        });
        let status = serde_json::from_value(status).unwrap();
        Sample { at: first + Duration::from_millis(millis), status, services }
    }

    #[test]
    fn rates_are_of_two_samples() {
        let first = Instant::now();
        let before = sample(
            first,
            0,
            vec![
                service("a", 1, &[]),
                service("gone", 7, &[]),
                service("web", 100, &[("10.0.0.1:1", 60, 1), ("10.0.0.2:1", 40, 0)]),
            ],
        );
        let now = sample(
            first,
            2_000,
            vec![
                service("a", 0, &[]),
                service("new", 5, &[]),
                service("web", 140, &[("10.0.0.1:1", 90, 4), ("10.0.0.3:1", 10, 0)]),
            ],
        );
        let figures = Figures::new(Some(&before), &now);
        assert_eq!((figures.seconds, figures.generation, figures.ready), (2.0, 12, true));
        let rates = figures.services.iter().map(|service| service.connects_per_second);
        // A counter that began again, and a service that is new, have no rate.
        assert_eq!(rates.collect::<Vec<_>>(), [None, None, Some(20.0)]);
        let web = &figures.services[2];
        assert_eq!((web.refused_per_second, web.failed_per_second), (Some(0.0), Some(1.5)));
        assert_eq!((web.in_flight, web.reached), (Some(6), 2));
        let rates =
            |backend: &BackendFigures| (backend.connects_per_second, backend.failures_per_second);
        assert_eq!(rates(&web.backends[0]), (Some(15.0), Some(1.5)));
        assert_eq!(rates(&web.backends[1]), (None, None));
        // Only the first had connections in the interval.
        assert_eq!(web.connect_us, Some(90.0));

        let figures = Figures::new(None, &now);
        assert_eq!((figures.seconds, figures.services[2].connects_per_second), (0.0, None));
        assert_eq!(figures.services[2].connect_us, Some((90.0 * 90.0 + 10.0 * 10.0) / 100.0));
        assert_eq!(figures.services[0].connect_us, None);
    }
}
