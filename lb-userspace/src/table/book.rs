//! The file of the book of VIPs, written by a thread of its own.
//!
//! A disk may be full, or stall for minutes; whoever has something to write waits for neither.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::vips::{BookError, Page};
use crate::durable;

/// The pause after a failed write; it doubles with each further one, up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// The longest pause, so that a disk that has room again is noticed within it.
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// A write that has taken this long is told as a problem.
const STALLED: Duration = Duration::from_secs(5);

/// What the file has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// The last edition that is on disk.
    pub edition: u64,
    /// Why the last write failed; `None` after one that succeeded, and before the first.
    pub failure: Option<String>,
}

/// The book's file. Dropping it ends the thread, once the write that is under way has ended.
#[derive(Debug)]
pub struct Book {
    path: PathBuf,
    inbox: Arc<Inbox>,
    submitted: u64,
    written: watch::Receiver<Written>,
}

/// What is left to the thread: the latest page alone, since each holds the whole book.
#[derive(Debug, Default)]
struct Inbox {
    content: Mutex<Content>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Content {
    page: Option<Page>,
    is_closed: bool,
    /// Since when the thread is in a write.
    writing_since: Option<Instant>,
}

impl Book {
    /// The book in the file at `path`, which has edition 0 of the book: what [`super::vips::Vips::read`] read.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn start(path: &Path) -> std::io::Result<Book> {
        let target = path.to_owned();
        Book::start_with(path, FIRST_PAUSE, move |page| {
            durable::replace(&target, page.text())
                .map_err(|source| BookError::write(&target, source))
        })
    }

    fn start_with(
        path: &Path,
        first_pause: Duration,
        write: impl FnMut(&Page) -> Result<(), BookError> + Send + 'static,
    ) -> std::io::Result<Book> {
        let inbox = Arc::new(Inbox::default());
        let (out, written) = watch::channel(Written::default());
        let thread = std::thread::Builder::new().name("book".into());
        let of_thread = inbox.clone();
        thread.spawn(move || work(&of_thread, first_pause, write, &out))?;
        Ok(Book { path: path.to_owned(), inbox, submitted: 0, written })
    }

    /// Has a page written, whole, unless a later one comes before the disk is free. It returns at
    /// once.
    pub fn submit(&mut self, page: Page) {
        self.submitted = page.edition();
        self.inbox.lock().page = Some(page);
        self.inbox.changed.notify_all();
    }

    /// Whether this edition was never submitted.
    pub fn lacks(&self, edition: u64) -> bool {
        self.submitted < edition
    }

    /// What the file has, as it changes.
    pub fn written(&self) -> watch::Receiver<Written> {
        self.written.clone()
    }

    /// What is wrong with the file: the last write failed, or one takes too long.
    pub fn problem(&self) -> Option<String> {
        let stalled_for = self.inbox.lock().writing_since.map(|since| since.elapsed());
        let what = match stalled_for.filter(|&time| time >= STALLED) {
            Some(_) => format!("{} can't be written: the disk doesn't answer", self.path.display()),
            None => self.written.borrow().failure.clone()?,
        };
        Some(format!(
            "{what}; services are served all the same, but until it can be written, a reboot may \
             change the addresses that names got meanwhile"
        ))
    }
}

impl Drop for Book {
    fn drop(&mut self) {
        self.inbox.lock().is_closed = true;
        self.inbox.changed.notify_all();
    }
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next page to write; `None` once there is none left and the book is gone.
    fn take(&self) -> Option<Page> {
        let waits = |content: &mut Content| content.page.is_none() && !content.is_closed;
        let waited = self.changed.wait_while(self.lock(), waits);
        let mut content = waited.unwrap_or_else(PoisonError::into_inner);
        content.writing_since = content.page.is_some().then(Instant::now);
        content.page.take()
    }

    /// Puts a page back that couldn't be written, unless a later one has come, and waits for
    /// `pause`. Returns whether the book is still there.
    fn put_back(&self, page: Page, pause: Duration) -> bool {
        let mut content = self.lock();
        content.page.get_or_insert(page);
        content.writing_since = None;
        let waits = |content: &mut Content| !content.is_closed;
        let waited = self.changed.wait_timeout_while(content, pause, waits);
        !waited.unwrap_or_else(PoisonError::into_inner).0.is_closed
    }
}

fn work(
    inbox: &Inbox,
    first_pause: Duration,
    mut write: impl FnMut(&Page) -> Result<(), BookError>,
    out: &watch::Sender<Written>,
) {
    let mut pause = first_pause;
    while let Some(page) = inbox.take() {
        let Err(error) = write(&page) else {
            inbox.lock().writing_since = None;
            pause = first_pause;
            if out.borrow().failure.is_some() {
                tracing::info!("the book of VIPs is written again");
            }
            out.send_replace(Written { edition: page.edition(), failure: None });
            continue;
        };
        let failure = Some(error.to_string());
        out.send_if_modified(|written| {
            let is_new = written.failure != failure;
            if is_new {
                tracing::error!("{error}; until it can be written, a reboot may change addresses");
                written.failure.clone_from(&failure);
            }
            is_new
        });
        if !inbox.put_back(page, pause) {
            return;
        }
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::table::vips::Vips;

    type Outcome = Result<(), &'static str>;

    /// A book on a disk that says what is written, and waits for its outcome.
    fn book() -> (Book, mpsc::Receiver<Vec<u8>>, mpsc::Sender<Outcome>) {
        let (writes_out, writes) = mpsc::channel();
        let (outcomes, outcomes_in) = mpsc::channel::<Outcome>();
        let write = move |page: &Page| {
            writes_out.send(page.text().to_vec()).unwrap();
            let outcome = outcomes_in.recv().unwrap_or(Err("the test has ended"));
            let error = |what| BookError::write(Path::new("/book"), std::io::Error::other(what));
            outcome.map_err(error)
        };
        let book = Book::start_with(Path::new("/book"), Duration::from_millis(1), write).unwrap();
        (book, writes, outcomes)
    }

    fn page(edition: u64) -> Page {
        Page::new(edition, edition.to_string().into())
    }

    #[tokio::test]
    async fn a_stalled_disk_keeps_nobody_waiting_and_the_latest_page_wins() {
        let (mut book, writes, outcomes) = book();
        book.submit(page(1));
        assert_eq!(writes.recv().unwrap(), b"1");
        // The disk is in the middle of page 1. All of this returns at once.
        for edition in 2..100 {
            book.submit(page(edition));
            assert!(!book.lacks(edition) && book.lacks(edition + 1));
        }
        let mut written = book.written();
        assert_eq!(written.borrow_and_update().edition, 0);
        outcomes.send(Ok(())).unwrap();
        outcomes.send(Ok(())).unwrap();
        assert_eq!(writes.recv().unwrap(), b"99", "those in between aren't worth a write");
        written.wait_for(|written| written.edition == 99).await.unwrap();
        assert_eq!(book.problem(), None);
    }

    #[tokio::test]
    async fn a_failed_write_is_a_problem_until_the_latest_page_is_written() {
        let (mut book, writes, outcomes) = book();
        let mut written = book.written();
        book.submit(page(1));
        assert_eq!(writes.recv().unwrap(), b"1");
        outcomes.send(Err("no space")).unwrap();
        written.wait_for(|written| written.failure.is_some()).await.unwrap();
        let problem = book.problem().unwrap();
        assert!(problem.starts_with("can't write /book: no space; "), "{problem}");
        // It is tried again by itself.
        assert_eq!(writes.recv().unwrap(), b"1");
        book.submit(page(2));
        outcomes.send(Err("no space")).unwrap();
        assert_eq!(writes.recv().unwrap(), b"2", "page 2 has page 1 in it");
        outcomes.send(Ok(())).unwrap();
        let now = written.wait_for(|written| written.edition == 2).await.unwrap().clone();
        assert_eq!(now, Written { edition: 2, failure: None });
        assert_eq!(book.problem(), None);
    }

    #[test]
    fn a_write_that_takes_long_is_a_problem() {
        let (mut book, writes, _outcomes) = book();
        book.submit(page(1));
        writes.recv().unwrap();
        assert_eq!(book.problem(), None);
        book.inbox.lock().writing_since = Instant::now().checked_sub(STALLED);
        assert!(book.problem().unwrap().contains("/book can't be written: the disk"));
    }

    #[tokio::test]
    async fn the_file_has_what_was_submitted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state/vips.json");
        let pools = crate::table::vips::Pools { v4: "127.128.0.0/9".parse().unwrap(), v6: None };
        let mut vips = Vips::read(&path, pools).unwrap();
        vips.assign(&"web".into(), std::time::SystemTime::UNIX_EPOCH).unwrap();
        let mut book = Book::start(&path).unwrap();
        book.submit(vips.page());
        book.written().wait_for(|written| written.edition == vips.edition()).await.unwrap();
        let read = Vips::read(&path, pools).unwrap();
        assert_eq!(read.page().text(), vips.page().text());
        assert_eq!(read.edition(), 0, "the file is as the book");
    }
}
