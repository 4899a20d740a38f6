//! Documents on their way to clients: a bounded number of them is in memory, and each may be shared.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hyper::body::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::route::Endpoint;

/// The time limit of a request's wait for its turn.
const PATIENCE: Duration = Duration::from_secs(5);

/// A rendered document.
#[derive(Clone, Debug)]
pub(super) struct Document {
    pub(super) status: hyper::StatusCode,
    pub(super) media_type: &'static str,
    /// The table's generation and the status' revision, at the latest, when it was rendered.
    pub(super) at: At,
    pub(super) body: Bytes,
}

/// The state that a document shows: see [`super::View::at`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct At {
    /// The generation of the table.
    pub generation: u64,
    /// The revision of the status, which grows with every change of `status` except those of ages and
    /// counts, and with every table. It starts at the milliseconds of the
    /// Unix epoch, so a later daemon's are greater.
    pub revision: u64,
}

impl At {
    /// No revision is less, and every generation is: a table a second would take 30,000 years.
    pub const FIRST_REVISION: u64 = 1_000_000_000_000;

    /// The moment at which a daemon starts, before its first table.
    pub fn start() -> At {
        let since = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let millis = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        At { generation: 0, revision: millis.max(At::FIRST_REVISION) }
    }

    /// Whether something has changed since `after`, for a request that came at `start`. `after` is a
    /// revision; any other than the present one is past, also one of an earlier daemon. A generation works
    /// as well: then only changes of the table before the request are noticed.
    pub(super) fn is_past(&self, after: u64, start: At) -> bool {
        if after >= At::FIRST_REVISION {
            return self.revision != after;
        }
        self.generation != after || self.revision != start.revision
    }
}

/// The documents of one kind of listener. A large one takes tens of megabytes, and a slow reader
/// keeps it for as long as it is allowed to read.
#[derive(Debug)]
pub(super) struct Documents {
    /// A permit for each document that is being rendered, is cached or is being read.
    places: Arc<Semaphore>,
    /// How long a document is shared; zero: not at all.
    max_age: Duration,
    kept: Mutex<HashMap<Endpoint, (Instant, Document)>>,
    /// Held while a document that may be shared is rendered: the others wait for it.
    turn: tokio::sync::Mutex<()>,
}

/// A body with its permit, which is free once its last reader is done.
struct Placed {
    body: Vec<u8>,
    _place: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Placed {
    fn as_ref(&self) -> &[u8] {
        &self.body
    }
}

impl Documents {
    /// At most `n` documents at a time, which serve others for `max_age`.
    pub(super) fn new(n: usize, max_age: Duration) -> Documents {
        Documents {
            places: Arc::new(Semaphore::new(n)),
            max_age,
            kept: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
        }
    }

    /// The document of a route: a small one takes no place, so that slow readers of large ones can't
    /// hold it up. Else one that was rendered at `at` and is young enough, or a new one.
    /// `None` where there was no place for it in time.
    pub(super) async fn get<F>(
        &self,
        route: &Endpoint,
        at: At,
        render: impl FnOnce() -> F,
    ) -> Option<Document>
    where
        F: Future<Output = (hyper::StatusCode, &'static str, Vec<u8>)>,
    {
        if route.is_small() {
            let (status, media_type, body) = render().await;
            return Some(Document { status, media_type, at, body: body.into() });
        }
        if self.max_age.is_zero() {
            return self.render(at, render).await;
        }
        let _turn = tokio::time::timeout(PATIENCE, self.turn.lock()).await.ok()?;
        if let Some(document) = self.find(route, at) {
            return Some(document);
        }
        let document = self.render(at, render).await?;
        self.kept().insert(route.clone(), (Instant::now(), document.clone()));
        Some(document)
    }

    fn find(&self, route: &Endpoint, at: At) -> Option<Document> {
        let mut kept = self.kept();
        kept.retain(|_, (since, document)| since.elapsed() < self.max_age && document.at == at);
        kept.get(route).map(|(_, document)| document.clone())
    }

    async fn render<F>(&self, at: At, render: impl FnOnce() -> F) -> Option<Document>
    where
        F: Future<Output = (hyper::StatusCode, &'static str, Vec<u8>)>,
    {
        let places = self.places.clone();
        let place = match places.clone().try_acquire_owned() {
            Ok(place) => place,
            Err(_) => {
                // Cached documents without readers free their permits first.
                self.kept().clear();
                tokio::time::timeout(PATIENCE, places.acquire_owned()).await.ok()?.ok()?
            }
        };
        let (status, media_type, body) = render().await;
        let body = Bytes::from_owner(Placed { body, _place: place });
        Some(Document { status, media_type, at, body })
    }

    fn kept(&self) -> MutexGuard<'_, HashMap<Endpoint, (Instant, Document)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use hyper::StatusCode;

    use super::*;

    const LONG: Duration = Duration::from_secs(600);

    async fn get(documents: &Documents, at: At, n: &AtomicUsize) -> Option<Document> {
        let render = || async {
            let nth = n.fetch_add(1, Ordering::Relaxed);
            (StatusCode::OK, "text/plain", vec![nth as u8; 4])
        };
        documents.get(&Endpoint::Services, at, render).await
    }

    #[tokio::test]
    async fn a_document_is_rendered_once_for_all_that_ask_at_a_revision() {
        let (documents, n) = (Documents::new(2, LONG), AtomicUsize::new(0));
        let first = get(&documents, At::default(), &n).await.unwrap();
        let second = get(&documents, At::default(), &n).await.unwrap();
        assert_eq!(first.body.as_ptr(), second.body.as_ptr(), "the memory is shared");
        let later = At { revision: 1, ..At::default() };
        assert_eq!(get(&documents, later, &n).await.unwrap().body[0], 1);
        let fresh = Documents::new(2, Duration::ZERO);
        drop(get(&fresh, At::default(), &n).await.unwrap());
        assert_eq!(get(&fresh, At::default(), &n).await.unwrap().body[0], 3);
    }

    #[tokio::test]
    async fn no_more_than_so_many_are_in_memory() {
        let (documents, n) = (Arc::new(Documents::new(2, LONG)), Arc::new(AtomicUsize::new(0)));
        let at = |revision| At { revision, ..At::default() };
        let first = get(&documents, at(1), &n).await.unwrap();
        let _second = get(&documents, at(2), &n).await.unwrap();
        let third = {
            let (documents, n) = (documents.clone(), n.clone());
            tokio::spawn(async move { get(&documents, at(3), &n).await })
        };
        tokio::task::yield_now().await;
        assert_eq!(n.load(Ordering::Relaxed), 2, "two readers hold a document each");
        let ready = || async { (StatusCode::OK, "text/plain", Vec::new()) };
        assert!(documents.get(&Endpoint::Ready, at(3), ready).await.is_some());
        // One reader is done, and no other has its document.
        drop(first);
        assert!(third.await.unwrap().is_some());
        assert_eq!(n.load(Ordering::Relaxed), 3);
    }
}
