//! Commands to a source: which services are in use, which names to look up, and to save its state
//! before it ends.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use tokio::sync::{Notify, mpsc, oneshot, watch};

use super::inspection::{InspectError, Inspection};

/// The most lookups that wait for a source; the name of one beyond that is unknown, which is counted.
const MAX_LOOKUPS: usize = 1024;

/// The most names in use that wait for a source: many times what a node uses. One beyond that is
/// counted, and reported again by the next use.
const MAX_USES: usize = 65_536;

/// Reports which services are in use to the source that fetches services by demand, where one does. It
/// stays connected when that source is restarted.
#[derive(Clone, Debug, Default)]
pub struct UsageSender(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    channel: RwLock<Option<SourceChannel>>,
    uses: Mutex<BTreeSet<Arc<str>>>,
    used: Notify,
    n_dropped: AtomicU64,
}

/// The channel to the connected source.
#[derive(Clone, Debug)]
pub(super) struct SourceChannel {
    commands: mpsc::Sender<SourceCommand>,
    end: watch::Receiver<()>,
}

impl SourceChannel {
    /// Waits until the source has ended, and its connections are closed.
    pub(super) async fn closed(mut self) {
        while self.end.changed().await.is_ok() {}
    }

    /// Whether the source has ended.
    #[cfg(test)]
    pub(super) fn is_closed(&self) -> bool {
        self.commands.is_closed()
    }
}

/// A command to a source.
#[derive(Debug)]
pub enum SourceCommand {
    /// Use or look up a service.
    Lookup(LookupRequest),
    /// Report all that is registered under a name, for a person.
    Inspect(InspectRequest),
    /// Save the state that the next run begins with, and report when it is written.
    Flush(oneshot::Sender<()>),
}

/// A name to be inspected.
#[derive(Debug)]
pub struct InspectRequest {
    /// The name.
    pub name: Arc<str>,
    /// Receives the result.
    pub reply: oneshot::Sender<InspectResult>,
}

/// The result of an inspection.
pub type InspectResult = Result<Arc<Inspection>, InspectError>;

/// A service that is in use, or looked up.
#[derive(Debug)]
pub struct LookupRequest {
    /// Its name, in lower case; there may be no service of that name.
    pub name: Arc<str>,
    /// Receives the result; dropped where the source can't know.
    pub reply: Option<oneshot::Sender<Lookup>>,
}

/// The result of a lookup by the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// There is such a service, and a catalog that has it live is published.
    Exists,
    /// The source has answered that there is none.
    Absent,
    /// The source hasn't answered: it failed, was too slow or too busy, can't be reached, or its answer
    /// isn't trusted yet. That is not "no such name".
    Unknown,
}

/// The receiving side of a [`UsageSender`], for one run of a source.
#[derive(Debug)]
pub struct UsageReceiver {
    queue: mpsc::Receiver<SourceCommand>,
    shared: Arc<Shared>,
    end: Option<watch::Sender<()>>,
}

impl UsageSender {
    /// Connects a source; an earlier receiver gets nothing more.
    pub fn listen(&self) -> UsageReceiver {
        let (commands, queue) = mpsc::channel(MAX_LOOKUPS);
        let (ends, end) = watch::channel(());
        let channel = Some(SourceChannel { commands, end });
        *self.0.channel.write().unwrap_or_else(PoisonError::into_inner) = channel;
        UsageReceiver { queue, shared: self.0.clone(), end: Some(ends) }
    }

    /// Disconnects the source: the sources that remain publish all they have, so no lookup finds more.
    pub(super) fn disconnect(&self) {
        *self.0.channel.write().unwrap_or_else(PoisonError::into_inner) = None;
        self.0.uses.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// The lookups and uses so far that the source was too busy to receive.
    pub fn n_dropped(&self) -> u64 {
        self.0.n_dropped.load(Ordering::Relaxed)
    }

    fn count_dropped(&self) {
        self.0.n_dropped.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether a source is connected; if not, reports have no effect.
    pub fn is_connected(&self) -> bool {
        self.0.channel.read().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Reports that the service `name`, in lower case, is in use: it becomes or stays live. While the
    /// source is busy or restarts, the names wait: each once, 65,536 at most.
    pub fn used(&self, name: &str) {
        if !self.is_connected() {
            return;
        }
        let mut uses = self.0.uses.lock().unwrap_or_else(PoisonError::into_inner);
        if uses.len() >= MAX_USES && !uses.contains(name) {
            return self.count_dropped();
        }
        uses.insert(name.into());
        drop(uses);
        self.0.used.notify_one();
    }

    /// Looks a name up, which counts as a use. The caller sets the time limit; past it the result is
    /// [`Lookup::Unknown`]. Without a connected source the catalog is all there is.
    pub async fn look_up(&self, name: &str) -> Lookup {
        let Some(SourceChannel { commands, .. }) = self.channel() else { return Lookup::Absent };
        let (reply, looked_up) = oneshot::channel();
        let wanted = LookupRequest { name: name.into(), reply: Some(reply) };
        if commands.try_send(SourceCommand::Lookup(wanted)).is_err() {
            self.count_dropped();
            return Lookup::Unknown;
        }
        looked_up.await.unwrap_or(Lookup::Unknown)
    }

    /// Asks the source for all that is registered under a name; `None` where no source is asked by name.
    /// The caller sets the time limit.
    pub async fn inspect(&self, name: &str) -> Option<InspectResult> {
        let SourceChannel { commands, .. } = self.channel()?;
        let (reply, inspected) = oneshot::channel();
        let request = InspectRequest { name: name.into(), reply };
        if commands.try_send(SourceCommand::Inspect(request)).is_err() {
            return Some(Err(InspectError::Busy));
        }
        Some(inspected.await.unwrap_or(Err(InspectError::Busy)))
    }

    /// Waits until the source has saved its state, or can't. The caller sets the time limit.
    pub(super) async fn flush(&self) {
        let Some(SourceChannel { commands, .. }) = self.channel() else { return };
        let (reply, left) = oneshot::channel();
        if commands.send(SourceCommand::Flush(reply)).await.is_ok() {
            let _ = left.await;
        }
    }

    /// The channel to the connected source.
    pub(super) fn channel(&self) -> Option<SourceChannel> {
        self.0.channel.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl UsageReceiver {
    /// Is to be dropped once the run's resources are gone; [`SourceChannel::closed`] waits for it.
    pub fn take_end(&mut self) -> Option<watch::Sender<()>> {
        self.end.take()
    }

    /// The next command; `None` once there can be none. It is cancel safe.
    pub async fn recv(&mut self) -> Option<SourceCommand> {
        loop {
            if let Some(command) = self.next_use() {
                return Some(command);
            }
            tokio::select! {
                command = self.queue.recv() => return command,
                () = self.shared.used.notified() => {}
            }
        }
    }

    /// The next command, if there is one already.
    pub fn try_recv(&mut self) -> Option<SourceCommand> {
        self.next_use().or_else(|| self.queue.try_recv().ok())
    }

    fn next_use(&self) -> Option<SourceCommand> {
        let name = self.shared.uses.lock().unwrap_or_else(PoisonError::into_inner).pop_first()?;
        Some(SourceCommand::Lookup(LookupRequest { name, reply: None }))
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    #[test]
    fn a_use_is_lost_neither_in_a_flood_of_lookups_nor_among_many_nor_between_two_runs() {
        let demand = UsageSender::default();
        drop(demand.listen());
        demand.used("between-two-runs");
        let mut commands = demand.listen();
        let mut lookups: Vec<_> =
            (0..2 * MAX_LOOKUPS).map(|n| polled(demand.look_up(&format!("made-up-{n}")))).collect();
        assert!(lookups.iter().any(Option::is_none), "those that wait");
        lookups.retain(Option::is_some);
        assert_eq!(lookups.len(), MAX_LOOKUPS, "those beyond are unknown at once");
        assert!(lookups.iter().all(|lookup| *lookup == Some(Lookup::Unknown)));
        assert_eq!(demand.n_dropped(), MAX_LOOKUPS as u64);
        for n in 0..2000 {
            demand.used(&format!("s{n}"));
            demand.used(&format!("s{n}"));
        }
        let mut used = 0;
        while let Some(command) = commands.try_recv() {
            if let SourceCommand::Lookup(LookupRequest { reply: None, .. }) = command {
                used += 1;
            }
        }
        assert_eq!(used, 2001);
        assert_eq!(demand.n_dropped(), MAX_LOOKUPS as u64);
    }

    /// Polls once. What is dropped while it waits has left its question in the queue.
    fn polled<T>(future: impl Future<Output = T>) -> Option<T> {
        match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(got) => Some(got),
            Poll::Pending => None,
        }
    }

    #[test]
    fn uses_have_a_bound_and_are_counted_beyond_it() {
        let demand = UsageSender::default();
        let _commands = demand.listen();
        for n in 0..MAX_USES + 7 {
            demand.used(&format!("s{n}"));
        }
        demand.used("s0");
        assert_eq!(demand.n_dropped(), 7);
    }

    #[tokio::test]
    async fn sources_that_publish_all_they_have_get_no_lookups() {
        let demand = UsageSender::default();
        let _commands = demand.listen();
        assert!(demand.is_connected());
        demand.disconnect();
        demand.used("web");
        assert_eq!(demand.look_up("web").await, Lookup::Absent);
        drop(demand.listen());
        assert_eq!(demand.look_up("web").await, Lookup::Unknown, "a source that has ended");
    }
}
