//! The revision of the status: it grows when anything in it changes but ages and counts, whichever
//! part it comes from, and with each ejection and return of a backend, which the services show, so that
//! `?after=` wakes for all of them.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::select_all;
use tokio::sync::{Notify, watch};

use crate::admin::{At, api};
use crate::catalog::SourceView;

/// How often the status is read: most of its parts have no event.
const INTERVAL: Duration = Duration::from_secs(1);

/// The least time between two reads, however often sources answer and backends are ejected.
const PAUSE: Duration = Duration::from_millis(100);

/// Follows the status for as long as the daemon lives; a change of a source's health wakes it, and one of
/// `ejections`. Ends only if `status` panics, which ends the daemon.
pub async fn follow(
    status: impl Fn() -> api::Status + Send + Sync + 'static,
    mut sources: watch::Receiver<Arc<[SourceView]>>,
    ejections: Arc<Notify>,
    at: watch::Sender<At>,
) {
    let status = Arc::new(status);
    let receivers = |sources: &[SourceView]| -> Vec<_> {
        sources.iter().map(|source| source.health.clone()).collect()
    };
    let mut health = receivers(&sources.borrow_and_update());
    let mut last = None;
    loop {
        let status = status.clone();
        // It waits for the datapath's lock.
        let now = tokio::task::spawn_blocking(move || lasting(status())).await;
        let Ok(now) = now else { return };
        if last.as_ref().is_some_and(|last| *last != now) {
            at.send_modify(|at| at.revision += 1);
        }
        last = Some(now);
        tokio::time::sleep(PAUSE).await;
        let is_other_source = tokio::select! {
            _ = sources.changed() => true,
            _ = select_all(health.iter_mut().map(|health| Box::pin(health.changed()))) => false,
            () = ejections.notified() => {
                at.send_modify(|at| at.revision += 1);
                false
            }
            () = tokio::time::sleep(INTERVAL - PAUSE) => false,
        };
        if is_other_source {
            health = receivers(&sources.borrow_and_update());
        }
    }
}

/// A status without ages and counts.
fn lasting(status: api::Status) -> api::Status {
    let source = |source: api::SourceStatus| api::SourceStatus {
        age_seconds: None,
        watches: None,
        facts: source.facts.iter().map(|fact| without_ages(fact)).collect(),
        problem: source.problem.as_deref().map(without_ages),
        ..source
    };
    let counted = |upstream: api::UpstreamStatus| api::UpstreamStatus {
        sent: 0,
        in_flight: 0,
        results: Default::default(),
        mean_ms: None,
        ..upstream
    };
    let upstreams = status.dns.upstreams.into_iter().map(counted).collect();
    let dns = api::DnsStatus { upstreams, ..status.dns };
    let datapath =
        api::DatapathStatus { maps: Vec::new(), counters: Default::default(), ..status.datapath };
    api::Status {
        problems: status.problems.iter().map(|problem| without_ages(problem)).collect(),
        revision: 0,
        // A table's change has been counted already.
        generation: 0,
        services: 0,
        backends: 0,
        pool: api::PoolStatus::default(),
        sources: status.sources.into_iter().map(source).collect(),
        dns,
        datapath,
        edge: status.edge.map(|edge| api::EdgeDocument {
            flows: 0,
            packets: Default::default(),
            ..edge
        }),
        ..status
    }
}

/// A sentence without its ages, such as `3 s ago`.
fn without_ages(sentence: &str) -> String {
    const AGO: &str = " s ago";
    let (sentence, rest) = sentence.rsplit_once(AGO).unwrap_or(("", sentence));
    let parts = sentence.split(AGO).map(|part| part.trim_end_matches(|c: char| c.is_ascii_digit()));
    parts.collect::<Vec<_>>().join(AGO) + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn upstream(sent: u64) -> api::UpstreamStatus {
        api::UpstreamStatus {
            address: ([127, 0, 0, 1], 53).into(),
            state: "up".into(),
            tcp_state: "up".into(),
            sent,
            in_flight: sent,
            results: [("answered".to_owned(), sent)].into(),
            mean_ms: Some(sent as f64),
        }
    }

    fn source(age_seconds: f64, watches: Option<api::WatchStatus>) -> api::SourceStatus {
        api::SourceStatus {
            name: "consul".into(),
            state: "live".into(),
            age_seconds: Some(age_seconds),
            facts: vec![],
            problem: None,
            watches,
        }
    }

    fn status() -> api::Status {
        api::Status {
            ready: true,
            problems: vec!["something detached a hook 3 s ago".into()],
            version: "1".into(),
            pid: 1,
            generation: 4,
            revision: 5,
            sources: vec![source(1.0, None)],
            services: 1,
            backends: 2,
            drains: 0,
            dns: api::DnsStatus {
                listen: vec![],
                listen_tls: vec![],
                domain: "service".into(),
                upstreams: vec![upstream(0)],
            },
            pool: api::PoolStatus::default(),
            datapath: api::DatapathStatus::default(),
            edge: None,
        }
    }

    #[tokio::test]
    async fn a_panic_ends_it() {
        let (sources, at) = (watch::channel(Arc::default()).1, watch::Sender::new(At::default()));
        follow(|| panic!("a defect"), sources, Arc::default(), at).await;
    }

    #[test]
    fn only_ages_are_left_out() {
        for (one, other, is_same) in [
            ("port 53 is taken", "port 54 is taken", false),
            ("detached 3 s ago; attached 1 s ago", "detached 14 s ago; attached 12 s ago", true),
            ("2 names, 3 s ago", "3 names, 3 s ago", false),
            ("nothing", "nothing", true),
        ] {
            assert_eq!(without_ages(one) == without_ages(other), is_same, "{one} / {other}");
        }
    }

    #[test]
    fn what_grows_by_itself_is_no_change_and_all_else_is() {
        let counted = api::Status {
            problems: vec!["something detached a hook 14 s ago".into()],
            sources: vec![source(2.0, Some(api::WatchStatus::default()))],
            dns: api::DnsStatus { upstreams: vec![upstream(9)], ..status().dns },
            datapath: api::DatapathStatus {
                counters: [("probes".to_owned(), 7)].into(),
                maps: vec![api::MapStatus { name: "SLOTS".into(), entries: 1, capacity: 2 }],
                ..status().datapath
            },
            ..status()
        };
        assert_eq!(lasting(counted), lasting(status()));
        let changes: [fn(&mut api::Status); 9] = [
            |status| status.ready = false,
            |status| status.problems.clear(),
            |status| status.problems.push("the hooks aren't attached".into()),
            |status| status.sources[0].state = "failing".into(),
            |status| status.sources[0].problem = Some("no agent".into()),
            |status| status.datapath.attached = true,
            |status| status.datapath.mode = "shadow".into(),
            |status| status.datapath.refused_services = 1,
            |status| status.dns.upstreams[0].state = "out".into(),
        ];
        for (nth, change) in changes.into_iter().enumerate() {
            let mut changed = status();
            change(&mut changed);
            assert_ne!(lasting(changed), lasting(status()), "change {nth}");
        }
    }
}
