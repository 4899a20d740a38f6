//! The watch of the token file: a blocking query has the token of its start.

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::config::Token;

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

/// The token in a file's text, which may begin with a byte order mark.
pub fn of_text(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text).trim()
}

async fn watch_file(path: PathBuf, every: Duration, changed: watch::Sender<()>) {
    let mut last: Option<String> = None;
    loop {
        // A file that can't be read, or is being written, is for the questions to complain of.
        let text = tokio::fs::read_to_string(&path).await.unwrap_or_default();
        let token = of_text(&text);
        let is_other = !token.is_empty() && last.as_deref() != Some(token);
        if is_other && last.replace(token.into()).is_some() {
            tracing::info!("{} holds another token: asking Consul again", path.display());
            changed.send_replace(());
        }
        tokio::time::sleep(every).await;
    }
}
