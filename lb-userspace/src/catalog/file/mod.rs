//! A static catalog as a source: a TOML file, read again whenever it changes.

mod chunks;
pub(super) mod follow;
mod parse;

#[cfg(any(fuzzing, test))]
pub mod fuzzing {
    //! The text of a catalog, for fuzzers.

    use super::chunks::Chunks;
    use super::parse::parse;
    use crate::catalog::Catalog;

    /// The services, or the number of mistakes; read part by part it says the same as at once.
    pub fn read(text: &str) -> Result<Catalog, usize> {
        let catalog = Chunks::default().read(text, &Catalog::new());
        match (&catalog, parse(text)) {
            (Ok(catalog), Ok(whole)) => {
                let parts = catalog.iter().map(|(name, listing)| (name, &*listing.instances));
                assert!(parts.eq(whole.iter().map(|(name, instances)| (name, &**instances))));
            }
            (parts, whole) => assert_eq!(parts.as_ref().err(), whole.as_ref().err()),
        }
        catalog.map_err(|mistakes| mistakes.len())
    }
}

use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::{Catalog, Output};
use chunks::Chunks;
use follow::Follower;
use parse::Mistake;

/// Why the file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It can't be read.
    #[error("can't read the catalog {path} ({source})")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// It has mistakes.
    #[error("{}", list(.path, .mistakes))]
    Mistakes {
        /// The file.
        path: PathBuf,
        /// All of them, by line.
        mistakes: Vec<Mistake>,
    },
}

fn list(path: &Path, mistakes: &[Mistake]) -> String {
    let lines = mistakes
        .iter()
        .map(|mistake| format!("{}:{}: {}", path.display(), mistake.line, mistake.what));
    lines.collect::<Vec<_>>().join("\n")
}

/// Reads the file and publishes it; what didn't change keeps its allocation.
///
/// # Errors
/// It can't be read, or it has mistakes. Then nothing is published.
pub fn load(path: &Path, output: &Output) -> Result<(), FileError> {
    load_anew(path, output, &mut Chunks::default())
}

fn load_anew(path: &Path, output: &Output, chunks: &mut Chunks) -> Result<(), FileError> {
    let last = output.last().unwrap_or_default();
    let catalog = read(path, chunks, &last)?;
    let now = Instant::now();
    output.publish(catalog, now);
    output.answered(now);
    Ok(())
}

/// Reads the file, to see whether it can be used.
///
/// # Errors
/// As [`load`].
pub fn check(path: &Path) -> Result<(), FileError> {
    read(path, &mut Chunks::default(), &Catalog::new()).map(drop)
}

fn read(path: &Path, chunks: &mut Chunks, last: &Catalog) -> Result<Catalog, FileError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| FileError::Read { path: path.into(), source })?;
    chunks.read(&text, last).map_err(|mistakes| FileError::Mistakes { path: path.into(), mistakes })
}

/// Follows the file until the system refuses to watch it. While it can't be used, its last catalog
/// stays.
pub async fn run(path: PathBuf, output: Output) {
    output.set_off(false);
    let mut follower = match Follower::new(&path) {
        Ok(follower) => follower,
        Err(error) => return output.set_problem(Some(cannot_watch(&path, &error)), true),
    };
    let mut chunks = Chunks::default();
    loop {
        let problem = load_anew(&path, &output, &mut chunks).err().map(|error| error.to_string());
        let is_failing = problem.is_some();
        output.set_problem(problem, is_failing);
        if let Err(error) = follower.changed().await {
            return output.set_problem(Some(cannot_watch(&path, &error)), true);
        }
    }
}

fn cannot_watch(path: &Path, error: &io::Error) -> String {
    let path = path.display();
    format!(
        "can't watch {path} for changes ({error}): see fs.inotify.max_user_instances and \
         fs.inotify.max_user_watches"
    )
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::sync::Arc;

    use super::*;
    use crate::catalog::{CatalogError, Handle, spawn};
    use crate::config::{Config, Source};

    fn follow(path: &Path) -> Result<Handle, CatalogError> {
        let mut config = Config::default();
        config.catalog.source = Source::File(path.into());
        spawn(&config, Vec::new())
    }

    fn text(services: &[&str]) -> String {
        services
            .iter()
            .map(|name| {
                format!("[[service]]\nname=\"{name}\"\nbackend=[{{address=\"10.0.0.1:80\"}}]\n")
            })
            .collect()
    }

    async fn shows(handle: &mut Handle, services: &[&str]) -> Arc<Catalog> {
        let seen = handle.catalog.wait_for(|catalog| {
            catalog
                .as_ref()
                .is_some_and(|e| e.catalog.keys().map(|name| &**name).eq(services.to_vec()))
        });
        let limit = std::time::Duration::from_secs(10);
        let seen = tokio::time::timeout(limit, seen).await.expect("the catalog").unwrap();
        seen.clone().unwrap().catalog
    }

    async fn says(handle: &mut Handle, what: Option<&str>) {
        let seen = handle.health.wait_for(|health| match (&health.problem, what) {
            (None, None) => true,
            (Some(problem), Some(what)) => problem.contains(what),
            _ => false,
        });
        let limit = std::time::Duration::from_secs(10);
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
                 {path}:2: unknown key `port`; there is `name`, `ports`, `protocol`, `backend`"
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
        assert!(Arc::ptr_eq(&first["a"].instances, &second["a"].instances));

        for (bad, what) in [("[[service", "catalog.toml:1: "), ("", "`service` is missing")] {
            fs::write(&path, bad).unwrap();
            says(&mut handle, Some(what)).await;
        }
        fs::remove_file(&path).unwrap();
        says(&mut handle, Some("can't read")).await;
        assert!(Arc::ptr_eq(&shows(&mut handle, &["a", "b"]).await, &second));

        let new = dir.path().join("catalog.toml.new");
        fs::write(&new, text(&["c"])).unwrap();
        fs::rename(&new, &path).unwrap();
        shows(&mut handle, &["c"]).await;
        says(&mut handle, None).await;

        fs::write(&path, "service = []").unwrap();
        shows(&mut handle, &[]).await;
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
