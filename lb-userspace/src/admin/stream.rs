//! `GET /v1/stream`: the status and the services in brief, as server-sent events, for viewers that stay.
//!
//! The first viewer starts a task and a thread that read both, and they end after the last one: without
//! viewers they cost nothing. What is rendered is shared by all of them, and of the services only those that have
//! changed are sent again. A viewer that is behind is disconnected; it connects again, and starts from the whole.

use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{io, thread};

use futures_util::stream::{self, BoxStream, StreamExt as _};
use hyper::body::Bytes;
use serde::Serialize;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, broadcast};

use super::api::ServiceSummary;
use super::view::View;

/// How often the counters are read.
const INTERVAL: Duration = Duration::from_secs(2);

/// The least time between two readings, however often the status changes.
const PAUSE: Duration = Duration::from_millis(500);

/// The events that a viewer may be behind.
const MAX_BEHIND: usize = 4;

/// The length of a service in brief as JSON, more or less, in bytes.
const SUMMARY_LEN: usize = 256;

/// The events for all viewers.
pub(super) struct Feed {
    state: Mutex<State>,
    /// Where the view is asked, and threads are started that do.
    work: Handle,
}

struct State {
    events: broadcast::Sender<Bytes>,
    /// Whether the task that reads runs.
    is_followed: bool,
    /// What viewers have; `None` before the first reading.
    shown: Option<Shown>,
}

struct Shown {
    status: Vec<u8>,
    services: Vec<ServiceSummary>,
    /// The events for a new viewer, once there was one.
    whole: Option<Bytes>,
}

/// The data of an event `services`.
#[derive(Serialize)]
struct Services<'a> {
    /// Whether these are all; else they replace those of the same names.
    all: bool,
    services: &'a [&'a ServiceSummary],
    /// The names of those that are gone.
    removed: &'a [&'a str],
}

impl Feed {
    /// For viewers on any listener; the view is asked on the runtime `work`.
    pub(super) fn new(work: Handle) -> Arc<Feed> {
        Arc::new(Feed { state: Mutex::new(State::new()), work })
    }

    /// The events of a new viewer. `place` is free again once it has left.
    pub(super) fn watch<V: View>(
        self: &Arc<Feed>,
        view: &Arc<V>,
        place: OwnedSemaphorePermit,
    ) -> BoxStream<'static, Bytes> {
        let mut state = self.state();
        let receiver = state.events.subscribe();
        if !std::mem::replace(&mut state.is_followed, true) {
            self.work.spawn(self.clone().follow(view.clone()));
        }
        // Before the first reading there is nothing to send: it goes to all viewers as a whole.
        let whole = state.shown.as_mut().map(|Shown { status, services, whole }| {
            whole.get_or_insert_with(|| events(status, services, None)).clone()
        });
        let later = stream::unfold((receiver, place), |(mut receiver, place)| async {
            let event = receiver.recv().await.ok()?;
            Some((event, (receiver, place)))
        });
        stream::iter(whole).chain(later).boxed()
    }

    /// Has what changes sent for as long as there are viewers.
    async fn follow<V: View>(self: Arc<Feed>, view: Arc<V>) {
        let mut at = view.at();
        let turns = match self.clone().reader(view) {
            Ok(turns) => turns,
            Err(error) => {
                tracing::warn!(%error, "/v1/stream: can't start a thread");
                *self.state() = State::new();
                return;
            }
        };
        while !self.is_over() {
            // One at a time, however long it takes.
            let _ = turns.try_send(());
            tokio::time::sleep(PAUSE).await;
            let _ = tokio::time::timeout(INTERVAL - PAUSE, at.changed()).await;
            at.mark_unchanged();
        }
    }

    /// A thread that reads and sends in its turns: memory that one thread uses again and again stays
    /// little, and the allocator keeps some for each thread.
    fn reader<V: View>(self: Arc<Feed>, view: Arc<V>) -> io::Result<SyncSender<()>> {
        let (turns, taken) = sync_channel(1);
        let read = move || {
            for () in taken {
                let status = serde_json::to_vec(&view.status()).unwrap_or_default();
                self.send(status, view.summaries());
            }
        };
        thread::Builder::new().name("stream".into()).spawn(read)?;
        Ok(turns)
    }

    /// Whether the last viewer has left; then nothing is kept.
    fn is_over(&self) -> bool {
        let mut state = self.state();
        let is_over = state.events.receiver_count() == 0;
        if is_over {
            *state = State::new();
        }
        is_over
    }

    fn send(&self, status: Vec<u8>, services: Vec<ServiceSummary>) {
        let mut state = self.state();
        if !state.is_followed {
            return;
        }
        let last = state.shown.as_ref().map(|shown| &shown.services[..]);
        let changes = events(&status, &services, last);
        state.shown = Some(Shown { status, services, whole: None });
        // Without a viewer this fails, and the task is about to end.
        let _ = state.events.send(changes);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Without viewers; those of an earlier state are disconnected.
    fn new() -> State {
        let events = broadcast::Sender::new(MAX_BEHIND);
        State { events, is_followed: false, shown: None }
    }
}

/// The events for a status and services: all of them, or what differs from the last ones. Both lists
/// are ordered by name.
fn events(status: &[u8], services: &[ServiceSummary], last: Option<&[ServiceSummary]>) -> Bytes {
    let mut old = last.unwrap_or_default().iter().peekable();
    let (mut changed, mut removed) = (Vec::new(), Vec::new());
    for service in services {
        while let Some(gone) = old.next_if(|old| old.name < service.name) {
            removed.push(&*gone.name);
        }
        if old.next_if(|old| old.name == service.name) != Some(service) {
            changed.push(service);
        }
    }
    removed.extend(old.map(|gone| &*gone.name));
    let mut events = Vec::with_capacity(status.len() + SUMMARY_LEN * (changed.len() + 1));
    events.extend_from_slice(b"event: status\ndata: ");
    events.extend_from_slice(status);
    if last.is_none() || !changed.is_empty() || !removed.is_empty() {
        events.extend_from_slice(b"\n\nevent: services\ndata: ");
        let all = last.is_none();
        let services = Services { all, services: &changed, removed: &removed };
        // It has strings and numbers alone, so this can't fail.
        let _ = serde_json::to_writer(&mut events, &services);
    }
    events.extend_from_slice(b"\n\n");
    events.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str, connects: u64) -> ServiceSummary {
        ServiceSummary { name: name.into(), connects, ..ServiceSummary::example() }
    }

    fn text(services: &[ServiceSummary], last: Option<&[ServiceSummary]>) -> String {
        String::from_utf8(events(b"{}", services, last).to_vec()).unwrap()
    }

    #[test]
    fn only_what_differs_is_sent_again() {
        let last = [service("a", 1), service("b", 1), service("d", 1)];
        let now = [service("b", 2), service("c", 1), service("d", 1), service("e", 1)];
        let all = text(&last, None);
        assert!(
            all.starts_with("event: status\ndata: {}\n\nevent: services\ndata: {\"all\":true,")
        );
        assert!(all.ends_with("\n\n") && all.matches("\"name\"").count() == 3, "{all}");
        let changes = text(&now, Some(&last));
        assert!(changes.contains("\"all\":false") && changes.contains("\"removed\":[\"a\"]"));
        for (name, is_sent) in [("b", true), ("c", true), ("d", false), ("e", true)] {
            assert_eq!(changes.contains(&format!("\"name\":\"{name}\"")), is_sent, "{changes}");
        }
        assert_eq!(text(&now, Some(&now)), "event: status\ndata: {}\n\n");
        assert!(text(&[], Some(&last)).contains("\"removed\":[\"a\",\"b\",\"d\"]"));
    }
}
