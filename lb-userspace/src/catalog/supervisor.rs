//! Keeps a source running: it has a thread and a runtime of its own, and a heartbeat shows whether it
//! still makes progress.
//!
//! A thread of its own, because nothing can end a loop that never yields, and so that parsing a large
//! response delays nothing else. A run that panics or whose heartbeat stops is abandoned: its output is
//! ignored (see `Publisher::new_epoch`), and another run starts.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::time::{Interval, MissedTickBehavior};

use super::publisher::Publisher;
use super::usage::{UsageReceiver, UsageSender};
use crate::boot::suspended;
use crate::capabilities;
use crate::config::{CatalogConfig, Expired};

/// Starts a run of a source, on its own thread and runtime.
pub type Source =
    Arc<dyn Fn(Publisher, UsageReceiver) -> Pin<Box<dyn Future<Output = ()>>> + Send + Sync>;

/// When a run counts as hung, and when the source is given up.
#[derive(Clone, Copy, Debug)]
pub struct RestartPolicy {
    /// The period of the heartbeat, and of the checks for it.
    pub beat: Duration,
    /// The checks in a row without a heartbeat after which a run counts as hung. Checks rather than a
    /// time: while the whole machine is paused there are none.
    pub n_silent: u32,
    /// How long a source that ended stays down.
    pub pause: Duration,
    /// The number of hung runs within [`RestartPolicy::memory`] after which the source is given up.
    pub n_hung: usize,
    /// How long a run that hung or ended is remembered.
    pub memory: Duration,
}

impl Default for RestartPolicy {
    fn default() -> Self {
        RestartPolicy {
            beat: Duration::from_secs(1),
            n_silent: 10,
            pause: Duration::from_secs(1),
            n_hung: 3,
            memory: Duration::from_secs(60 * 60),
        }
    }
}

/// When a catalog of the source is stale, and what follows; `None` for a source without staleness.
#[derive(Clone, Copy, Debug)]
pub struct Staleness {
    max_age: Duration,
    expired: Expired,
}

impl From<&CatalogConfig> for Staleness {
    fn from(config: &CatalogConfig) -> Self {
        Staleness { max_age: config.max_age, expired: config.expired }
    }
}

/// Keeps the source running, and returns once it has hung too often.
pub async fn supervise(
    source: Source,
    mut output: Publisher,
    demand: UsageSender,
    staleness: Option<Staleness>,
    limits: RestartPolicy,
) {
    let name = output.source();
    let mut failures = RestartHistory::default();
    loop {
        output = output.new_epoch();
        let run = SourceRun::start(&source, output.clone(), demand.listen(), limits.beat);
        let mut run = match run {
            Ok(run) => run,
            Err(error) => {
                tracing::error!("the source {name} can't have a thread ({error})");
                tokio::time::sleep(limits.pause).await;
                continue;
            }
        };
        let mut ticks = ticks(limits.beat);
        let end = loop {
            ticks.tick().await;
            if let Some(staleness) = staleness {
                let (now, asleep) = (Instant::now(), suspended());
                output.check_age(now, asleep, staleness.max_age, staleness.expired);
            }
            if failures.forget(Instant::now(), limits.memory) {
                output.set_supervisor_problem(failures.problem());
            }
            if let Some(end) = run.poll(limits.n_silent) {
                break end;
            }
        };
        match end {
            ExitReason::Ended => {
                tracing::error!("the source {name} ended; restarting it");
                failures.ended_at.push(Instant::now());
                output.set_supervisor_problem(failures.problem());
            }
            ExitReason::Hung => {
                let silence = limits.beat * limits.n_silent;
                tracing::error!(
                    "the source {name} missed its heartbeat for {silence:?}; restarting it"
                );
                failures.hung_at.push(Instant::now());
                output.set_supervisor_problem(failures.problem());
                if failures.hung_at.len() >= limits.n_hung {
                    return;
                }
            }
        }
        tokio::time::sleep(limits.pause).await;
    }
}

/// The runs that failed lately; the pause between two of them bounds their number.
#[derive(Debug, Default)]
struct RestartHistory {
    hung_at: Vec<Instant>,
    /// Runs that panicked or ended otherwise.
    ended_at: Vec<Instant>,
}

impl RestartHistory {
    /// Removes runs older than `memory`, and returns whether there were any.
    fn forget(&mut self, now: Instant, memory: Duration) -> bool {
        let n_before = self.hung_at.len() + self.ended_at.len();
        for at in [&mut self.hung_at, &mut self.ended_at] {
            at.retain(|at| now.saturating_duration_since(*at) <= memory);
        }
        self.hung_at.len() + self.ended_at.len() < n_before
    }

    fn problem(&self) -> Option<String> {
        let kinds = [("hung", self.hung_at.len()), ("ended", self.ended_at.len())];
        let kinds = kinds.into_iter().filter(|(_, n)| *n > 0);
        let kinds: Vec<String> = kinds.map(|(what, n)| format!("{what} {n} times")).collect();
        (!kinds.is_empty()).then(|| {
            format!(
                "discovery {} within the hour and was restarted: the log before that has the \
                 reason",
                kinds.join(" and ")
            )
        })
    }
}

/// One run of a source; dropping it ends the run, unless it hangs.
struct SourceRun {
    n_heartbeats: Arc<AtomicU64>,
    seen: u64,
    n_silent: u32,
    /// Closed when the thread ends, for whatever reason.
    alive: oneshot::Receiver<()>,
    _stop: oneshot::Sender<()>,
}

/// Why a run ended.
enum ExitReason {
    Ended,
    Hung,
}

impl SourceRun {
    fn start(
        source: &Source,
        output: Publisher,
        mut wishes: UsageReceiver,
        beat: Duration,
    ) -> std::io::Result<SourceRun> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .thread_name("catalog")
            .build()?;
        let n_heartbeats = Arc::new(AtomicU64::new(0));
        let (stop, stopped) = oneshot::channel::<()>();
        let (at_end, alive) = oneshot::channel::<()>();
        let (source, beats) = (source.clone(), n_heartbeats.clone());
        std::thread::Builder::new().name("catalog".into()).spawn(move || {
            // Dropped after the runtime, with which the connections go.
            let _ends = (wishes.take_end(), at_end);
            capabilities::for_files();
            let runtime = runtime;
            runtime.block_on(async {
                tokio::select! {
                    _ = stopped => {}
                    () = source(output, wishes) => {}
                    () = heartbeat(&beats, beat) => {}
                }
            });
        })?;
        Ok(SourceRun { n_heartbeats, seen: 0, n_silent: 0, alive, _stop: stop })
    }

    /// Checks whether the run has ended, or has missed so many heartbeats.
    fn poll(&mut self, n_silent: u32) -> Option<ExitReason> {
        if let Err(oneshot::error::TryRecvError::Closed) = self.alive.try_recv() {
            return Some(ExitReason::Ended);
        }
        let n_heartbeats = self.n_heartbeats.load(Ordering::Relaxed);
        self.n_silent = if n_heartbeats == self.seen { self.n_silent + 1 } else { 0 };
        self.seen = n_heartbeats;
        (self.n_silent >= n_silent).then_some(ExitReason::Hung)
    }
}

async fn heartbeat(n_heartbeats: &AtomicU64, beat: Duration) {
    let mut ticks = ticks(beat);
    loop {
        ticks.tick().await;
        n_heartbeats.fetch_add(1, Ordering::Relaxed);
    }
}

fn ticks(period: Duration) -> Interval {
    let mut ticks = tokio::time::interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;
    use crate::catalog::Catalog;

    fn limits() -> RestartPolicy {
        RestartPolicy {
            beat: Duration::from_millis(20),
            n_silent: 10,
            pause: Duration::ZERO,
            ..RestartPolicy::default()
        }
    }

    /// A source whose first `n` runs end as `fails` does.
    fn failing(n: u32, fails: fn(&AtomicU32)) -> (Source, Arc<AtomicU32>) {
        let n_runs = Arc::new(AtomicU32::new(0));
        let counted = n_runs.clone();
        let source: Source = Arc::new(move |output, _| {
            let n_runs = n_runs.clone();
            Box::pin(async move {
                if n_runs.fetch_add(1, Ordering::Relaxed) < n {
                    fails(&n_runs);
                    // It reports too late: its output is ignored.
                    output.set_problem(Some("an earlier run".into()), true);
                }
                output.publish(Catalog::new(), Instant::now());
                std::future::pending().await
            })
        });
        (source, counted)
    }

    fn panics(_: &AtomicU32) {
        panic!("so that it is started again");
    }

    /// Loops without yielding until another run has begun.
    fn loops(n_runs: &AtomicU32) {
        let n = n_runs.load(Ordering::Relaxed);
        while n_runs.load(Ordering::Relaxed) == n {
            std::hint::spin_loop();
        }
    }

    #[tokio::test]
    async fn a_run_that_panics_or_loops_is_followed_by_another() {
        // A panic may take its time, where it logs a backtrace.
        let patient = RestartPolicy { n_silent: 3000, ..limits() };
        let table = [(panics as fn(&AtomicU32), patient, "ended"), (loops, limits(), "hung")];
        for (fails, limits, alarm) in table {
            let (source, n_runs) = failing(1, fails);
            let output = Publisher::new("file");
            let (mut catalog, health, _) = output.subscribe();
            let demand = UsageSender::default();
            let keeper = tokio::spawn(supervise(source, output, demand, None, limits));
            catalog.wait_for(Option::is_some).await.unwrap();
            assert!(n_runs.load(Ordering::Relaxed) >= 2);
            let problem = health.borrow().problem.clone();
            assert!(problem.as_ref().is_some_and(|problem| problem.contains(alarm)), "{problem:?}");
            keeper.abort();
        }
    }

    #[test]
    fn a_failed_run_is_reported_for_an_hour() {
        let start = Instant::now();
        let memory = RestartPolicy::default().memory;
        let mut failures = RestartHistory::default();
        assert_eq!(failures.problem(), None);
        failures.hung_at.push(start);
        failures.ended_at.push(start + memory / 2);
        assert!(!failures.forget(start + memory, memory));
        let alarm = failures.problem().unwrap();
        assert!(alarm.starts_with("discovery hung 1 times and ended 1 times"), "{alarm}");
        assert!(failures.forget(start + memory + memory / 4, memory));
        assert!(failures.problem().unwrap().starts_with("discovery ended 1 times"));
        assert!(failures.forget(start + memory * 2, memory));
        assert_eq!(failures.problem(), None);
    }

    #[tokio::test]
    async fn the_third_run_that_hangs_is_the_last() {
        let (source, n_runs) = failing(u32::MAX, |n_runs| {
            while n_runs.load(Ordering::Relaxed) < 100 {
                std::hint::spin_loop();
            }
        });
        let output = Publisher::new("file");
        supervise(source, output, UsageSender::default(), None, limits()).await;
        assert_eq!(n_runs.fetch_add(100, Ordering::Relaxed), 3);
    }
}
