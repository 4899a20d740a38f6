//! The lock on the state directory: two daemons that record there would overwrite each other's drains and VIPs.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::bail;
use rustix::fs::{FlockOperation, OFlags};

use crate::file_lock::{holders, try_lock};

/// Its file, which only root can open: a process that opens a file can lock it.
const FILE_NAME: &str = "lock";

/// After how long the disk is taken for one that doesn't answer, as by those who read the directory.
const OPEN_TIMEOUT: Duration = Duration::from_secs(2);

/// The lock, for as long as this lives. There is none where the directory can't be written: then nothing is
/// recorded, which is a problem in `status`.
#[derive(Debug)]
pub struct StateLock(Option<File>);

impl StateLock {
    /// Locks a state directory.
    ///
    /// # Errors
    /// When another process has.
    pub async fn take(state_dir: &Path) -> anyhow::Result<StateLock> {
        let path = state_dir.join(FILE_NAME);
        let taking = tokio::task::spawn_blocking(move || open(path));
        let Ok(Ok(Some(opened))) = tokio::time::timeout(OPEN_TIMEOUT, taking).await else {
            return Ok(StateLock(None));
        };
        match opened {
            Ok(file) => Ok(StateLock(Some(file))),
            Err(who) => {
                let shown = state_dir.display();
                bail!(
                    "{who} uses the state directory {shown}: stop it first, or name another directory with --state-dir"
                )
            }
        }
    }

    /// Lets another daemon have the directory. This process may not be able to end yet: a thread that writes to a
    /// disk that doesn't answer keeps all descriptors open.
    pub fn unlock(&self) {
        if let Some(file) = &self.0 {
            let _ = rustix::fs::flock(file, FlockOperation::Unlock);
        }
    }
}

/// The locked file, or who has locked it; `None` where it can't be had.
fn open(path: PathBuf) -> Option<Result<File, String>> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    options.custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32);
    crate::durable::make_directory(path.parent()?).ok()?;
    let opened = options.open(&path).and_then(|file| Ok((try_lock(&file)?, file)));
    match opened {
        Ok((true, file)) => Some(Ok(file)),
        Ok((false, file)) => Some(Err(match holders(&file).into_iter().next() {
            Some(holder) => format!("process {} ({})", holder.pid, holder.command),
            None => "another process".to_owned(),
        })),
        Err(error) => {
            tracing::debug!("{} can't be locked: {error}", path.display());
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_second_daemon_is_refused_and_told_who_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let state_dir = dir.path().join("state");
        let first = StateLock::take(&state_dir).await.unwrap();
        let refused = StateLock::take(&state_dir).await.unwrap_err().to_string();
        let expected = format!("process {} (", std::process::id());
        assert!(refused.starts_with(&expected) && refused.contains("--state-dir"), "{refused}");
        first.unlock();
        StateLock::take(&state_dir).await.unwrap();
    }

    #[tokio::test]
    async fn a_directory_that_cant_be_written_is_no_obstacle() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(StateLock::take(&file.join("state")).await.unwrap().0.is_none());
    }
}
