//! A static catalog as a source: a TOML file, read again whenever it changes.

mod chunks;
pub(super) mod follow;
mod kept;
mod parse;

#[cfg(any(fuzzing, test))]
pub mod fuzzing {
    //! The text of a catalog, for fuzzers.

    use super::chunks::Chunks;
    use super::parse::parse;
    use crate::table::Catalog;

    /// The services, or the number of errors; read part by part it says the same as at once.
    pub fn read(text: &str) -> Result<Catalog, usize> {
        let catalog = Chunks::default().read(text, &Catalog::new());
        match (&catalog, parse(text)) {
            (Ok(catalog), Ok(whole)) => {
                let parts =
                    catalog.iter().map(|(id, record)| (&id.name, &*record.groups[0].instances));
                assert!(parts.eq(whole.iter().map(|(name, instances)| (name, &**instances))));
            }
            (parts, whole) => assert_eq!(parts.as_ref().err(), whole.as_ref().err()),
        }
        catalog.map_err(|diagnostics| diagnostics.len())
    }
}

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task;

use super::publisher::Publisher;
use super::usage::{SourceCommand, UsageReceiver};
use crate::file_state::{FileState, file_state};
use crate::regular_file;
use crate::table::Catalog;
use chunks::Chunks;
use follow::FileWatcher;
pub use kept::Kept;
use parse::Diagnostic;

/// How often a file is looked at that can't be watched.
const POLL: Duration = Duration::from_secs(1);

/// After so many looks the system is asked for a watch again.
const POLLS: usize = 60;

/// How long after a change its copy is written. The kernel has the change by then, so the copy, of
/// megabytes, takes no processor from it; of several changes in a row the last one is written.
const KEEP_AFTER: Duration = Duration::from_millis(500);

/// Why the file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It can't be read.
    #[error("can't read the catalog {path} ({source}): name a readable file by catalog.file")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// It has errors.
    #[error("{}", list(.path, .diagnostics))]
    Diagnostics {
        /// The file.
        path: PathBuf,
        /// All of them, by line.
        diagnostics: Vec<Diagnostic>,
    },
}

fn list(path: &Path, diagnostics: &[Diagnostic]) -> String {
    let lines = diagnostics
        .iter()
        .map(|diagnostic| format!("{}:{}: {}", path.display(), diagnostic.line, diagnostic.what));
    lines.collect::<Vec<_>>().join("\n")
}

/// Reads the file and publishes its catalog.
///
/// # Errors
/// It can't be read, or it has errors. Then nothing is published.
pub fn load(path: &Path, output: &Publisher) -> Result<(), FileError> {
    let text = read(path)?;
    publish(output, catalog_of(path, &text, output, &mut Chunks::default())?);
    Ok(())
}

/// As [`load`] at the start, when nothing is known yet: where the file can't be used, its last good
/// copy is published, which is a problem.
///
/// # Errors
/// As [`load`], where there is no copy either.
pub fn load_first(path: &Path, kept: &Kept, output: &Publisher) -> Result<(), FileError> {
    let Err(error) = load(path, output) else { return Ok(()) };
    let catalog = kept.read().map(|text| catalog_of(path, &text, output, &mut Chunks::default()));
    let Some(Ok(catalog)) = catalog else { return Err(error) };
    output.publish(catalog, Instant::now());
    tracing::warn!("serving the last good copy of the catalog, {}", kept.path().display());
    output.set_problem(Some(error.to_string()), true);
    Ok(())
}

/// Reads the file, to see whether it can be used, and what it has.
///
/// # Errors
/// As [`load`].
pub fn check(path: &Path) -> Result<Catalog, FileError> {
    catalog_alone(&read(path)?).map_err(|diagnostics| diagnosed(path, diagnostics))
}

/// The same at the start, when a good copy serves as well.
///
/// # Errors
/// As [`load_first`].
pub fn check_first(path: &Path, kept: &Kept) -> Result<(), FileError> {
    match check(path) {
        Err(_) if kept.read().is_some_and(|text| catalog_alone(&text).is_ok()) => Ok(()),
        result => result.map(drop),
    }
}

fn read(path: &Path) -> Result<String, FileError> {
    regular_file::read_to_string(path)
        .map_err(|source| FileError::Read { path: path.into(), source })
}

fn catalog_alone(text: &str) -> Result<Catalog, Vec<Diagnostic>> {
    Chunks::default().read(text, &Catalog::new())
}

/// The catalog of a text; what didn't change is shared with the last one.
fn catalog_of(
    path: &Path,
    text: &str,
    output: &Publisher,
    chunks: &mut Chunks,
) -> Result<Catalog, FileError> {
    let last = output.last().unwrap_or_default();
    chunks.read(text, &last).map_err(|diagnostics| diagnosed(path, diagnostics))
}

fn publish(output: &Publisher, catalog: Catalog) {
    let now = Instant::now();
    output.publish(catalog, now);
    output.mark_success(now);
}

fn diagnosed(path: &Path, diagnostics: Vec<Diagnostic>) -> FileError {
    FileError::Diagnostics { path: path.into(), diagnostics }
}

/// Follows the file for ever. While it can't be used, its last catalog stays. `kept` is the copy of its
/// good texts.
pub async fn run(path: PathBuf, kept: Option<Kept>, output: Publisher, commands: UsageReceiver) {
    let (texts, good_texts) = mpsc::unbounded_channel();
    if let Some(kept) = kept {
        task::spawn(keep(kept, good_texts, commands));
    }
    follow_with(path, output, &texts, FileWatcher::new, POLL).await;
}

/// The same, with what watches a file; one that can't be watched is looked at every `poll`. Good texts
/// go to `texts`.
async fn follow_with(
    path: PathBuf,
    output: Publisher,
    texts: &mpsc::UnboundedSender<String>,
    watch: impl Fn(&Path) -> io::Result<FileWatcher>,
    poll: Duration,
) {
    let (mut follower, mut chunks) = (None, Chunks::default());
    loop {
        // Before the file is read, so that no change after that is missed.
        if follower.is_none() {
            follower = match watch(&path) {
                Ok(follower) => Some(follower),
                Err(error) => {
                    output.set_notice("watch", Some(cannot_watch(&path, &error)));
                    None
                }
            };
        }
        if follower.is_some() {
            output.set_notice("watch", None);
        }
        let seen = file_state(&path);
        let parsed = read(&path).and_then(|text| {
            let catalog = catalog_of(&path, &text, &output, &mut chunks)?;
            Ok((text, catalog))
        });
        let problem = match parsed {
            Ok((text, catalog)) => {
                // Before its catalog is known, so that no stop comes in between. Without a receiver there
                // is no copy.
                let _ = texts.send(text);
                publish(&output, catalog);
                None
            }
            Err(error) => Some(error.to_string()),
        };
        let is_failing = problem.is_some();
        output.set_problem(problem, is_failing);
        match &mut follower {
            Some(watched) => {
                if let Err(error) = watched.changed().await {
                    tracing::warn!("{}", cannot_watch(&path, &error));
                    follower = None;
                }
            }
            None => settled(&path, seen, poll).await,
        }
    }
}

/// Looks at a file until it is another than `seen` and stays so for a look, since no event shows that its
/// writer is done; or until it is time to try and watch it again.
async fn settled(path: &Path, seen: FileState, poll: Duration) {
    let mut last = seen;
    for _ in 0..POLLS {
        tokio::time::sleep(poll).await;
        let now = file_state(path);
        if now != seen && now == last {
            return;
        }
        last = now;
    }
}

/// Writes the copy some time after a good text was read, and when the source is to save its state.
async fn keep(kept: Kept, mut texts: mpsc::UnboundedReceiver<String>, mut commands: UsageReceiver) {
    let mut latest: Option<(String, tokio::time::Instant)> = None;
    loop {
        let due = latest.as_ref().map(|(_, due)| *due);
        let is_due = async {
            match due {
                Some(due) => tokio::time::sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        let mut saved = None;
        tokio::select! {
            biased;
            text = texts.recv() => {
                let Some(text) = text else { return };
                let due = due.unwrap_or_else(|| tokio::time::Instant::now() + KEEP_AFTER);
                latest = Some((text, due));
                continue;
            }
            command = commands.recv() => match command {
                Some(SourceCommand::Flush(reply)) => saved = Some(reply),
                Some(SourceCommand::Lookup(_) | SourceCommand::Inspect(_)) => continue,
                // Another run has begun.
                None => return,
            },
            () = is_due => {}
        }
        if let Some((text, _)) = latest.take() {
            let kept = kept.clone();
            let _ = task::spawn_blocking(move || write(&kept, &text)).await;
        }
        if let Some(saved) = saved {
            let _ = saved.send(());
        }
    }
}

fn write(kept: &Kept, text: &str) {
    if let Err(error) = kept.write(text) {
        let path = kept.path().display();
        tracing::warn!(
            "can't write a copy of the catalog to {path} ({error}): a restart needs a good file"
        );
    }
}

fn cannot_watch(path: &Path, error: &io::Error) -> String {
    let path = path.display();
    format!(
        "{path} is looked at every second, since it can't be watched ({error}): see \
         fs.inotify.max_user_instances and fs.inotify.max_user_watches"
    )
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::sync::Arc;

    use super::*;
    use crate::catalog::{CatalogError, Handle, UsageSender};
    use crate::config::{Config, SourceKind};

    fn config(path: &Path) -> Config {
        let mut config = Config::default();
        config.catalog.sources = vec![SourceKind::File(path.into())];
        config.state_dir = path.parent().unwrap().join("state");
        config
    }

    fn follow(path: &Path) -> Result<Handle, CatalogError> {
        let kind = SourceKind::File(path.into());
        Handle::spawn(&kind, &config(path), &UsageSender::default(), Vec::new())
    }

    fn text(services: &[&str]) -> String {
        services
            .iter()
            .map(|name| {
                format!("[[service]]\nname=\"{name}\"\nbackend=[{{address=\"10.0.0.1:80\"}}]\n")
            })
            .collect()
    }

    async fn shows(handle: &mut Handle, services: &[&str]) -> Catalog {
        let seen = handle.catalog.wait_for(|catalog| {
            catalog
                .as_ref()
                .is_some_and(|e| e.catalog.keys().map(|id| &*id.name).eq(services.to_vec()))
        });
        let limit = std::time::Duration::from_secs(60);
        let seen = tokio::time::timeout(limit, seen).await.expect("the catalog").unwrap();
        seen.clone().unwrap().catalog
    }

    async fn says(handle: &mut Handle, what: Option<&str>) {
        let seen = handle.health.wait_for(|health| match (&health.problem, what) {
            (None, None) => true,
            (Some(problem), Some(what)) => problem.contains(what),
            _ => false,
        });
        let limit = std::time::Duration::from_secs(60);
        tokio::time::timeout(limit, seen).await.expect("the problem").unwrap();
    }

    #[tokio::test]
    async fn a_bad_file_at_the_start_is_an_error_with_all_its_mistakes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("catalog.toml");
        assert!(matches!(follow(&path), Err(CatalogError::File(FileError::Read { .. }))));
        fs::write(&path, "[[service]]\nport = 1\n").unwrap();
        let error = follow(&path).unwrap_err().to_string();
        let path = path.display();
        assert_eq!(
            error,
            format!(
                "{path}:1: a service without `name`\n\
                 {path}:2: unknown key `port`; there is `name`, `ports`, `protocol`, `algorithm`, `public`, `backend`"
            )
        );
    }

    #[tokio::test]
    async fn follows_writes_and_renames_and_keeps_the_last_good_catalog() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("catalog.toml");
        fs::write(&path, text(&["a"])).unwrap();
        let mut handle = follow(&path).unwrap();
        let first = shows(&mut handle, &["a"]).await;

        fs::write(&path, text(&["a", "b"])).unwrap();
        let second = shows(&mut handle, &["a", "b"]).await;
        assert!(Arc::ptr_eq(&first["a"].groups, &second["a"].groups));

        for (bad, what) in [("[[service", "catalog.toml:1: "), ("", "`service` is missing")] {
            fs::write(&path, bad).unwrap();
            says(&mut handle, Some(what)).await;
        }
        fs::remove_file(&path).unwrap();
        says(&mut handle, Some("can't read")).await;
        let (fifo, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR);
        rustix::fs::mknodat(rustix::fs::CWD, &path, fifo, mode, 0).unwrap();
        says(&mut handle, Some("it is a FIFO, not a regular file")).await;
        assert_eq!(shows(&mut handle, &["a", "b"]).await, second);

        let new = dir.path().join("catalog.toml.new");
        fs::write(&new, text(&["c"])).unwrap();
        fs::rename(&new, &path).unwrap();
        shows(&mut handle, &["c"]).await;
        says(&mut handle, None).await;

        fs::write(&path, "service = []").unwrap();
        shows(&mut handle, &[]).await;
    }

    #[tokio::test]
    async fn a_bad_file_at_a_restart_leaves_what_served_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("catalog.toml");
        let kept = Kept::new(&dir.path().join("state"), &path);
        fs::write(&path, text(&["a"])).unwrap();
        let mut handle = follow(&path).unwrap();
        // The copy is there once its directory has it.
        let mut seen = FileWatcher::new(kept.path()).unwrap();
        while kept.read() != Some(text(&["a"])) {
            seen.changed().await.unwrap();
        }
        // A stop doesn't wait until it is due.
        fs::write(&path, text(&["a", "b"])).unwrap();
        shows(&mut handle, &["a", "b"]).await;
        handle.end().await;
        assert_eq!(kept.read(), Some(text(&["a", "b"])));
        let spoil: [fn(&Path); 4] = [
            |path| fs::write(path, "[[service]\n").unwrap(),
            |path| fs::write(path, b"\xff\xfe").unwrap(),
            |path| fs::write(path, "").unwrap(),
            |path| fs::remove_file(path).unwrap(),
        ];
        for spoil in spoil {
            spoil(&path);
            assert!(crate::catalog::check(&config(&path)).is_err(), "a reload is refused");
            assert!(crate::catalog::check_first(&config(&path)).is_ok());
            let mut handle = follow(&path).unwrap();
            shows(&mut handle, &["a", "b"]).await;
            says(&mut handle, Some("catalog.toml")).await;
            assert!(handle.health.borrow().is_failing);
            handle.end().await;
        }
        let mut handle = follow(&path).unwrap();
        fs::write(&path, text(&["c"])).unwrap();
        shows(&mut handle, &["c"]).await;
        says(&mut handle, None).await;
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_watched_is_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("catalog.toml");
        fs::write(&path, text(&["a"])).unwrap();
        let output = Publisher::new("file");
        let (mut catalog, health, _) = output.subscribe();
        let (texts, _) = mpsc::unbounded_channel();
        let none = |_: &Path| Err(io::Error::from_raw_os_error(libc::EMFILE));
        let following = follow_with(path.clone(), output, &texts, none, Duration::from_millis(5));
        let test = async {
            let mut shows = async |services: &[&str]| {
                let is_it = |published: &Option<crate::catalog::Published>| {
                    published
                        .as_ref()
                        .is_some_and(|e| e.catalog.keys().map(|id| &*id.name).eq(services.to_vec()))
                };
                catalog.wait_for(is_it).await.unwrap();
            };
            shows(&["a"]).await;
            let facts = health.borrow().facts.clone();
            assert!(facts[0].contains("is looked at every second"), "{facts:?}");
            assert_eq!(health.borrow().problem, None);
            fs::write(&path, text(&["a", "b"])).unwrap();
            shows(&["a", "b"]).await;
            fs::remove_file(&path).unwrap();
            let new = dir.path().join("new");
            fs::write(&new, text(&["c"])).unwrap();
            fs::rename(&new, &path).unwrap();
            shows(&["c"]).await;
        };
        tokio::select! {
            () = following => unreachable!("it never ends"),
            () = test => {}
        }
    }

    #[tokio::test]
    async fn follows_links_as_kubernetes_swaps_them() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for (version, service) in [("1", "a"), ("2", "b")] {
            fs::create_dir(at(version)).unwrap();
            fs::write(at(version).join("catalog.toml"), text(&[service])).unwrap();
        }
        symlink("1", at("..data")).unwrap();
        symlink("..data/catalog.toml", at("catalog.toml")).unwrap();
        let mut handle = follow(&at("catalog.toml")).unwrap();
        shows(&mut handle, &["a"]).await;

        symlink("2", at("..tmp")).unwrap();
        fs::rename(at("..tmp"), at("..data")).unwrap();
        shows(&mut handle, &["b"]).await;

        fs::write(at("2").join("catalog.toml"), text(&["c"])).unwrap();
        shows(&mut handle, &["c"]).await;
    }

    #[tokio::test]
    async fn outlives_its_folder() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("etc/nohop");
        let path = folder.join("catalog.toml");
        fs::create_dir_all(&folder).unwrap();
        fs::write(&path, text(&["a"])).unwrap();
        let mut handle = follow(&path).unwrap();
        shows(&mut handle, &["a"]).await;

        fs::remove_dir_all(dir.path().join("etc")).unwrap();
        says(&mut handle, Some("can't read")).await;
        fs::create_dir_all(&folder).unwrap();
        fs::write(&path, text(&["b"])).unwrap();
        shows(&mut handle, &["b"]).await;
        says(&mut handle, None).await;
    }
}
