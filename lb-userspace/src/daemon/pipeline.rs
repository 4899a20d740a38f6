//! The stages from a catalog to its readers: build, apply, record, publish.
//!
//! The kernel has a table first, and the disk has the VIPs that it assigns, before DNS and the admin
//! interface see it. No stage waits for another's disk or reader: see [`Holdback`].

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use tokio::sync::watch;

use super::holdback::Holdback;
use super::metrics::PROPAGATION_BUCKETS;
use super::recorder::{Recorded, Recorder};
use crate::admin::At;
use crate::admin::prometheus::Histogram;
use crate::catalog::Published;
use crate::counted::counted;
use crate::ordmap::Diff;
use crate::table::{Builder, NextTable, Table};

/// The services that the log names when one table changes that many at most; a first table may
/// change all of them.
const MAX_NAMED: usize = 100;

/// The stages, and the tables on their way through them.
pub struct Pipeline {
    builder: Builder,
    /// The last table that was built and applied; its readers may lack it for a moment.
    latest: Arc<Table>,
    recorder: Arc<Recorder>,
    recorded: watch::Receiver<Recorded>,
    holdback: Holdback,
    propagation: Arc<Mutex<Histogram>>,
    table: watch::Sender<Arc<Table>>,
    at: watch::Sender<At>,
}

impl Pipeline {
    /// Stages that record with `recorder`; the first table is empty.
    pub fn new(builder: Builder, recorder: Recorder) -> Pipeline {
        Pipeline {
            builder,
            latest: Arc::default(),
            recorded: recorder.recorded(),
            recorder: Arc::new(recorder),
            holdback: Holdback::default(),
            propagation: Arc::new(Mutex::new(Histogram::new(&PROPAGATION_BUCKETS))),
            table: watch::Sender::new(Arc::default()),
            at: watch::Sender::new(At::start()),
        }
    }

    /// Builds tables.
    pub fn builder(&mut self) -> &mut Builder {
        &mut self.builder
    }

    /// The last table that was built.
    pub fn latest(&self) -> &Arc<Table> {
        &self.latest
    }

    /// The table that readers go by, as it changes.
    pub fn published(&self) -> watch::Receiver<Arc<Table>> {
        self.table.subscribe()
    }

    /// The number of the published table, and the revision of the status.
    pub fn at(&self) -> &watch::Sender<At> {
        &self.at
    }

    /// Records the VIPs.
    pub fn recorder(&self) -> &Arc<Recorder> {
        &self.recorder
    }

    /// How long news took to the kernel.
    pub fn propagation(&self) -> &Arc<Mutex<Histogram>> {
        &self.propagation
    }

    /// Leads a catalog through the stages; `apply` brings a table to the kernel. Returns the names that
    /// instances have for addresses, where they differ from those before.
    pub fn update(
        &mut self,
        news: &Published,
        apply: impl FnOnce(&Table),
    ) -> Option<BTreeSet<String>> {
        let last = self.latest.clone();
        let next = self.builder.next(&last, &news.catalog, SystemTime::now());
        let hostnames = self.builder.take_hostnames();
        let Some(NextTable { table, vips_given }) = next else { return hostnames };
        apply(&table);
        let took = news.news_at.elapsed().as_secs_f64();
        self.propagation.lock().unwrap_or_else(PoisonError::into_inner).observe(took);
        self.latest = table.clone();
        if vips_given {
            self.record();
        }
        let (assigned, recorded) = (self.builder.vips().assigned(), self.recorded.borrow().version);
        let released = self.holdback.offer(table.clone(), assigned, recorded, Instant::now());
        self.publish(released);
        log_change(&last, &table);
        hostnames
    }

    /// Has the VIPs recorded, where they have changed.
    pub fn record(&self) {
        self.recorder.submit(self.builder.vips());
    }

    /// Waits until a table that is held back may be published, and publishes it. Cancel safe.
    pub async fn publish_held(&mut self) {
        let due = self.holdback.due();
        let expired = async {
            match due {
                Some(due) => tokio::time::sleep_until(due.into()).await,
                None => std::future::pending().await,
            }
        };
        let table = tokio::select! {
            // It fails once the recorder's thread has ended: then the deadline alone counts.
            Ok(()) = self.recorded.changed() => {
                self.holdback.acknowledge(self.recorded.borrow_and_update().version)
            }
            () = expired => self.holdback.expire(Instant::now()),
        };
        self.publish(table);
    }

    /// Waits until the last VIPs are on disk.
    ///
    /// # Errors
    /// The recorder's thread has ended without them.
    pub async fn flush(&mut self) -> Result<(), watch::error::RecvError> {
        self.record();
        let version = self.builder.vips().version();
        self.recorded.wait_for(|recorded| recorded.version >= version).await.map(drop)
    }

    fn publish(&self, table: Option<Arc<Table>>) {
        if let Some(table) = table {
            let generation = table.generation;
            self.table.send_replace(table);
            self.at.send_modify(|at| *at = At { generation, revision: at.revision + 1 });
        }
    }
}

fn log_change(last: &Table, next: &Table) {
    let Diff { changed, gone } = last.services.diff(&next.services);
    let is_much = changed.len() + gone.len() > MAX_NAMED;
    if is_much {
        let (n_changed, n_gone) = (changed.len(), gone.len());
        let n_services = counted(next.services.len(), "service");
        tracing::info!(n_changed, n_gone, "{n_services}; debug names them");
    }
    for (name, service) in changed {
        let (n_backends, n_unfit) = (service.healthy().count(), service.excluded.len());
        if is_much {
            tracing::debug!(vip = %service.vip, n_backends, n_unfit, "{name}");
        } else {
            tracing::info!(vip = %service.vip, n_backends, n_unfit, "{name}");
        }
        let before = last.services.get(name);
        for note in &service.notes {
            if !before.is_some_and(|before| before.notes.contains(note)) {
                tracing::warn!("{name}: {note}");
            }
        }
    }
    for (name, _) in gone {
        if is_much {
            tracing::debug!("{name} is gone");
        } else {
            tracing::info!("{name} is gone");
        }
    }
    let rejected = last.rejected.diff(&next.rejected).changed;
    for (name, reason) in rejected.iter().take(MAX_NAMED) {
        tracing::warn!("{name}: {reason}");
    }
    if rejected.len() > MAX_NAMED {
        let more = counted(rejected.len() - MAX_NAMED, "more name");
        tracing::warn!("{more} are unavailable: `nohop explain NAME` has the reason");
    }
}

#[cfg(test)]
mod tests {
    use super::super::recorder::tests::{Disk, recorder};
    use super::*;
    use crate::config::Config;
    use crate::table::vips::Vips;
    use crate::table::{Catalog, ServiceId, ServiceRecord, Watch};

    /// Stages without services on a disk that the test controls.
    fn pipeline() -> (Pipeline, Disk) {
        let vip = Config::default().vip;
        let (recorder, disk) = recorder();
        (Pipeline::new(Builder::new(&vip, Vips::new((&vip).into())), recorder), disk)
    }

    fn catalog(names: &[&str]) -> Published {
        let record = ServiceRecord::new([].into(), Watch::Live);
        let catalog: Catalog =
            names.iter().map(|name| (ServiceId::new(*name), record.clone())).collect();
        Published { catalog, news_at: Instant::now() }
    }

    /// Leads these services through; the kernel has to get them at once.
    fn update(pipeline: &mut Pipeline, names: &[&str]) {
        let mut applied = None;
        pipeline.update(&catalog(names), |table| applied = Some(table.services.len()));
        assert_eq!(applied, Some(names.len()));
    }

    fn n_published(pipeline: &Pipeline) -> usize {
        pipeline.published().borrow().services.len()
    }

    #[tokio::test]
    async fn a_table_is_published_once_its_vips_are_on_disk() {
        let (mut pipeline, disk) = pipeline();
        update(&mut pipeline, &["a"]);
        assert_eq!(disk.writes.recv().unwrap(), 1);
        assert_eq!(n_published(&pipeline), 0);
        disk.outcomes.send(Ok(())).unwrap();
        pipeline.publish_held().await;
        assert_eq!(n_published(&pipeline), 1);
        assert_eq!(pipeline.at().borrow().generation, 1);
    }

    #[tokio::test]
    async fn a_stalled_disk_delays_no_change_of_the_kernel_and_readers_for_a_bounded_time() {
        let (mut pipeline, disk) = pipeline();
        update(&mut pipeline, &["a"]);
        assert_eq!(disk.writes.recv().unwrap(), 1);
        // The disk is in the middle of that write, and stays there.
        update(&mut pipeline, &["a", "b"]);
        assert_eq!((n_published(&pipeline), pipeline.latest().services.len()), (0, 2));
        pipeline.publish_held().await;
        assert_eq!(n_published(&pipeline), 2, "the deadline has passed");
        update(&mut pipeline, &["a", "b", "c"]);
        assert_eq!(n_published(&pipeline), 3, "such a disk isn't waited for again");
        // A table that assigns no address doesn't wait in any case.
        update(&mut pipeline, &["a"]);
        assert_eq!(n_published(&pipeline), 1);
    }

    #[tokio::test]
    async fn a_recorder_that_has_ended_holds_no_table_back() {
        let vip = Config::default().vip;
        let pause = std::time::Duration::ZERO;
        let recorder = Recorder::start_with("/vips.json".into(), pause, |_| panic!("a defect"));
        let builder = Builder::new(&vip, Vips::new((&vip).into()));
        let mut pipeline = Pipeline::new(builder, recorder.unwrap());
        update(&mut pipeline, &["a"]);
        assert!(pipeline.recorded.clone().changed().await.is_err());
        assert_eq!(n_published(&pipeline), 0);
        pipeline.publish_held().await;
        assert_eq!(n_published(&pipeline), 1);
        let problem = pipeline.recorder().problem().unwrap();
        assert!(problem.contains("can't write /vips.json: its thread has ended"), "{problem}");
        assert!(pipeline.flush().await.is_err());
    }

    #[tokio::test]
    async fn a_stop_waits_for_what_was_released() {
        let (mut pipeline, disk) = pipeline();
        disk.outcomes.send(Ok(())).unwrap();
        update(&mut pipeline, &["a"]);
        pipeline.publish_held().await;
        update(&mut pipeline, &[]);
        disk.outcomes.send(Ok(())).unwrap();
        pipeline.flush().await.unwrap();
        assert_eq!(disk.writes.iter().take(2).last(), Some(2));
    }
}
