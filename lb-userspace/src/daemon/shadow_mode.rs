//! Shadow mode, the kill switch: connections are only counted, and every application connects as it
//! would without nohop.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::watch;

use crate::capabilities;
use crate::config::Config;
use crate::datapath::Mode;

/// How often the file is looked for.
const LOOK: Duration = Duration::from_secs(1);

/// How long the start waits for the first look: a disk that doesn't answer keeps no daemon down.
const FIRST_LOOK: Duration = Duration::from_secs(2);

/// Whether the file is there, as a thread of its own sees it: on a disk that stalls, looking takes as
/// long as the disk does.
#[derive(Debug)]
pub struct OffFile(watch::Receiver<Option<bool>>);

impl OffFile {
    /// Starts to look, and waits for the first look, but no longer than 2 s.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub async fn watch(config: &Config) -> io::Result<OffFile> {
        let path = path(config);
        OffFile::watch_with(LOOK, FIRST_LOOK, move || is_there(&path)).await
    }

    async fn watch_with(
        period: Duration,
        patience: Duration,
        look: impl Fn() -> Option<bool> + Send + 'static,
    ) -> io::Result<OffFile> {
        let (out, mut seen) = watch::channel(None);
        let work = move || {
            capabilities::for_files();
            while !out.is_closed() {
                // If it can't be read, the last state applies.
                if let Some(is_there) = look() {
                    out.send_if_modified(|seen| seen.replace(is_there) != Some(is_there));
                }
                std::thread::sleep(period);
            }
        };
        std::thread::Builder::new().name("off-file".into()).spawn(work)?;
        if tokio::time::timeout(patience, seen.wait_for(Option::is_some)).await.is_err() {
            tracing::error!("the state directory's disk doesn't answer: starting without it");
        }
        Ok(OffFile(seen))
    }

    /// Waits for the file to come or go.
    pub async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending().await
        }
    }

    /// Whether it is there.
    pub fn is_there(&self) -> bool {
        self.0.borrow().unwrap_or(false)
    }
}

/// Whether a file is there; `None` where the disk fails.
fn is_there(path: &Path) -> Option<bool> {
    match path.try_exists() {
        // In the directory's place is something else, which has no files.
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => Some(false),
        found => found.ok(),
    }
}

fn path(config: &Config) -> PathBuf {
    config.state_dir.join("off")
}

/// All reasons for shadow mode except the source's. One of them is enough.
#[derive(Debug)]
pub struct ShadowSwitch {
    /// `--shadow`
    is_configured: bool,
    /// The file that switches shadow mode on by its existence.
    file: PathBuf,
    is_file_there: bool,
    /// Whether an earlier daemon left it so, for a reason that the source may still have.
    is_inherited: bool,
}

impl ShadowSwitch {
    /// The configuration's value, and whether the file exists.
    pub fn new(config: &Config, is_file_there: bool) -> ShadowSwitch {
        let (file, is_configured) = (path(config), config.shadow);
        ShadowSwitch { is_configured, file, is_file_there, is_inherited: false }
    }

    /// Takes the configuration's present value.
    pub fn configure(&mut self, shadow: bool) {
        self.is_configured = shadow;
    }

    /// Takes whether the file is there.
    pub fn see_file(&mut self, is_there: bool) {
        self.is_file_there = is_there;
    }

    /// Keeps an earlier daemon's shadow mode until the source has answered.
    pub fn inherit(&mut self) {
        self.is_inherited = true;
    }

    /// Notes that the source has answered, which ends the earlier daemon's shadow mode.
    pub fn source_answered(&mut self) {
        self.is_inherited = false;
    }

    /// The mode, by these reasons and the source's.
    pub fn mode(&self, is_source_off: bool) -> Mode {
        let file = self.file.display();
        let reasons = [
            (self.is_configured, "`shadow` is set by --shadow or the configuration".to_owned()),
            (self.is_file_there, format!("{file} is there; remove it to translate again")),
            (
                is_source_off,
                "Consul's key nohop/off is there; delete it to translate again".to_owned(),
            ),
            (
                self.is_inherited,
                "the daemon before this one left it so, and discovery hasn't said yet whether that \
                 holds"
                    .to_owned(),
            ),
        ];
        let reasons: Vec<String> =
            reasons.into_iter().filter_map(|(holds, why)| holds.then_some(why)).collect();
        if reasons.is_empty() {
            return Mode::Translate;
        }
        Mode::Shadow { why: reasons.join("; ") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(1);
    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn any_reason_is_enough_and_each_is_named() {
        let cases: [(bool, bool, bool, bool, &[&str]); 6] = [
            (false, false, false, false, &[]),
            (true, false, false, false, &["--shadow"]),
            (false, true, false, false, &["/state/off"]),
            (false, false, true, false, &["nohop/off"]),
            (false, false, false, true, &["the daemon before"]),
            (true, true, true, true, &["--shadow", "/state/off", "nohop/off", "the daemon before"]),
        ];
        for (is_configured, is_file_there, is_source_off, is_inherited, named) in cases {
            let file = "/state/off".into();
            let switch = ShadowSwitch { is_configured, file, is_file_there, is_inherited };
            match switch.mode(is_source_off) {
                Mode::Translate => assert!(named.is_empty(), "{switch:?}"),
                Mode::Shadow { why } => {
                    assert!(!named.is_empty(), "{why}");
                    assert!(named.iter().all(|part| why.contains(part)), "{why}");
                    assert_eq!(why.matches("--shadow").count(), usize::from(is_configured));
                }
            }
        }
    }

    #[tokio::test]
    async fn the_file_is_looked_for() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config { state_dir: dir.path().into(), ..Config::default() };
        let path = path(&config);
        let look = {
            let path = path.clone();
            move || path.try_exists().ok()
        };
        let mut file = OffFile::watch_with(SHORT, LONG, look).await.unwrap();
        let mut switch = ShadowSwitch::new(&config, file.is_there());
        assert_eq!(switch.mode(false), Mode::Translate);
        std::fs::write(&path, "").unwrap();
        file.changed().await;
        switch.see_file(file.is_there());
        assert_ne!(switch.mode(false), Mode::Translate);
        let again = OffFile::watch(&config).await.unwrap();
        assert_ne!(ShadowSwitch::new(&config, again.is_there()).mode(false), Mode::Translate);
        std::fs::remove_file(&path).unwrap();
        file.changed().await;
        switch.see_file(file.is_there());
        assert_eq!(switch.mode(false), Mode::Translate);
    }

    #[tokio::test]
    async fn a_disk_that_does_not_answer_keeps_no_daemon_down() {
        let (hold, held) = std::sync::mpsc::channel::<()>();
        let look = move || {
            let _ = held.recv();
            None
        };
        let file = OffFile::watch_with(SHORT, SHORT, look).await.unwrap();
        assert!(!file.is_there());
        drop(hold);
    }

    #[test]
    fn what_was_inherited_holds_until_the_source_was_heard() {
        let mut switch = ShadowSwitch::new(&Config::default(), false);
        switch.inherit();
        assert_ne!(switch.mode(false), Mode::Translate);
        switch.source_answered();
        assert_ne!(switch.mode(true), Mode::Translate);
        assert_eq!(switch.mode(false), Mode::Translate);
    }
}
