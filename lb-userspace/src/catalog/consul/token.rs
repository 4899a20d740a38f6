//! The watch of the token file: a blocking query has the token of its start.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{JoinSet, spawn_blocking};

use crate::config::Token;
use crate::regular_file;

/// Reports that the token file holds another token. Dropping it ends the watch.
pub struct TokenWatch {
    changes: watch::Receiver<()>,
    _task: JoinSet<()>,
}

impl TokenWatch {
    /// Watches the file of `token`, where that is one, by reading it again and again: a secret may be
    /// a link that is swapped, or on a file system without inotify.
    pub fn start(token: Option<&Token>, every: Duration) -> Self {
        let (changed, changes) = watch::channel(());
        let mut task = JoinSet::new();
        if let Some(Token::File(path)) = token {
            task.spawn(watch_file(path.clone(), every, changed));
        }
        TokenWatch { changes, _task: task }
    }

    /// Waits until the file holds another token than it last did. It loses nothing where it is
    /// cancelled.
    pub async fn changed(&mut self) {
        if self.changes.changed().await.is_err() {
            std::future::pending().await // there is no file
        }
    }
}

/// Reads a token file.
///
/// # Errors
/// As [`regular_file::read_to_string`].
pub async fn read(path: &Path) -> io::Result<String> {
    let path = path.to_owned();
    let reading = spawn_blocking(move || regular_file::read_to_string(&path));
    reading.await.unwrap_or_else(|ended| Err(io::Error::other(ended)))
}

/// The token in a file's text, which may begin with a byte order mark.
pub fn of_text(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text).trim()
}

async fn watch_file(path: PathBuf, every: Duration, changed: watch::Sender<()>) {
    let mut last: Option<String> = None;
    loop {
        // A file that can't be read, or is being written, is for the questions to complain of.
        let text = read(&path).await.unwrap_or_default();
        let token = of_text(&text);
        let is_other = !token.is_empty() && last.as_deref() != Some(token);
        if is_other && last.replace(token.into()).is_some() {
            tracing::info!("{} holds another token: asking Consul again", path.display());
            changed.send_replace(());
        }
        tokio::time::sleep(every).await;
    }
}
