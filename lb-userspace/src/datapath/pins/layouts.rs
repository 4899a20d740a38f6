//! The directories of the pins, by layout: which are ours, and which links they have.
//!
//! A name alone proves nothing. A directory is ours if it has our mark in it, or, since earlier
//! versions left none, pins of ours; others are never removed, even if empty.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::error::{PinError, io_error};
use crate::datapath::bpf::{Link, PinnedObject};

/// The entry that marks a directory as ours. A BPF file system has no files but pins, so it is a
/// directory. Every version from 0.1.0 on creates it.
pub const MARK: &str = "nohop";

/// How many directories deep a layout's pins may lie.
const MAX_DEPTH: usize = 8;

/// Whether a link is pinned anywhere below; what can't be read may be one.
pub fn has_links(dir: &Path) -> bool {
    let Collected { links, problem } = Collected::of(&[dir.to_owned()]);
    problem.is_some() || !links.is_empty()
}

/// The directories of layouts in `dir` that are ours.
pub fn layouts(dir: &Path) -> Result<Vec<PathBuf>, PinError> {
    let is_layout = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.strip_prefix('v').is_some_and(|number| number.parse::<u16>().is_ok()) && is_ours(path)
    };
    Ok(entries(dir)?.into_iter().filter(is_layout).collect())
}

/// Every link that is pinned in `dir` under any layout, without a lock and with nothing made.
///
/// # Errors
/// When something that isn't a link lies where links are, or the file system refuses.
pub fn links_in(dir: &Path) -> Result<Vec<PinnedLink>, PinError> {
    collect_all_links(&layouts(dir)?)
}

/// Every link that is pinned in these directories or below.
///
/// # Errors
/// When something that isn't a link lies where links are.
pub fn collect_all_links(layouts: &[PathBuf]) -> Result<Vec<PinnedLink>, PinError> {
    let Collected { links, problem } = Collected::of(layouts);
    problem.map_or(Ok(links), Err)
}

/// The links in some directories, as far as they can be read.
#[derive(Debug, Default)]
pub struct Collected {
    /// The links.
    pub links: Vec<PinnedLink>,
    /// The first problem: something else lies where links are, or can't be read.
    pub problem: Option<PinError>,
}

impl Collected {
    /// Those in these directories or below.
    pub fn of(layouts: &[PathBuf]) -> Collected {
        let mut collected = Collected::default();
        for layout in layouts {
            collected.add(layout, 0);
        }
        collected
    }

    /// Adds every link that is pinned in a directory or below.
    fn add(&mut self, dir: &Path, depth: usize) {
        let paths = entries(dir).unwrap_or_else(|error| {
            self.problem.get_or_insert(error);
            Vec::new()
        });
        for path in paths {
            if let Err(error) = self.add_one(dir, path, depth) {
                self.problem.get_or_insert(error);
            }
        }
    }

    fn add_one(&mut self, dir: &Path, path: PathBuf, depth: usize) -> Result<(), PinError> {
        let kind = fs::symlink_metadata(&path).map_err(io_error("read", &path))?.file_type();
        if kind.is_dir() {
            // Maps are compared one by one, where they are used.
            let is_maps = depth == 0 && path.ends_with("maps");
            if depth < MAX_DEPTH && !is_maps {
                self.add(&path, depth + 1);
            }
            return Ok(());
        }
        // A symbolic link's target may be anywhere.
        if kind.is_symlink() {
            return Ok(());
        }
        match Link::pinned(&path).map_err(io_error("open", &path))? {
            Some(PinnedObject::Link(link)) => {
                let name = path.file_name().unwrap_or_default().to_owned();
                self.links.push(PinnedLink { name, path, link });
                Ok(())
            }
            Some(PinnedObject::Other(found)) if dir.ends_with("links") => {
                let expected = "a link".to_owned();
                let found = format!("a BPF object of {found}");
                Err(PinError::Foreign { path, found, expected })
            }
            Some(PinnedObject::Other(_)) | None => Ok(()),
        }
    }
}

/// Whether a directory is ours to use and to remove: it has our mark in it, or pins that have names
/// of ours.
pub fn is_ours(dir: &Path) -> bool {
    // Of layout 2, too.
    const MAPS: [&str; 8] =
        ["FRONTENDS", "SERVICES", "BACKENDS", "CONTROL", "SK_REVNAT", "FLOWS", "DAEMON", "PEERS"];
    let (here, maps, links) = (names(dir), names(&dir.join("maps")), names(&dir.join("links")));
    here.iter().any(|name| name == MARK || MAPS.contains(&name.as_str()))
        || maps.iter().any(|name| MAPS.contains(&name.as_str()))
        || links.iter().any(|name| name.starts_with("nohop_"))
}

/// Whether a directory is free for our pins: it has nothing but our own directories.
pub fn is_free(dir: &Path) -> bool {
    names(dir).iter().all(|name| name == "maps" || name == "links")
        && names(&dir.join("maps")).is_empty()
        && names(&dir.join("links")).is_empty()
}

fn names(dir: &Path) -> Vec<String> {
    let paths = entries(dir).unwrap_or_default();
    let name = |path: PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into();
    paths.into_iter().map(name).collect()
}

/// A link and where it is pinned.
#[derive(Debug)]
pub struct PinnedLink {
    /// The pin's name: the program's.
    pub name: OsString,
    /// The pin.
    pub path: PathBuf,
    /// The link.
    pub link: Link,
}

/// Removes a pin; one that is absent is no error.
///
/// # Errors
/// When the file system refuses.
pub fn unpin(path: &Path) -> Result<(), PinError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(io_error("remove", path)),
    }
}

/// The paths in a directory, sorted; none where it doesn't exist.
///
/// # Errors
/// When the file system refuses.
pub fn entries(dir: &Path) -> Result<Vec<PathBuf>, PinError> {
    match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        listing => {
            let listing = listing.map_err(io_error("list", dir))?;
            let mut paths = listing
                .map(|entry| entry.map(|entry| entry.path()))
                .collect::<io::Result<Vec<_>>>()
                .map_err(io_error("list", dir))?;
            paths.sort_unstable();
            Ok(paths)
        }
    }
}

/// Removes a directory and everything below; one that is absent is no error.
///
/// # Errors
/// When the file system refuses.
pub fn remove_tree(dir: &Path) -> Result<(), PinError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(io_error("remove", dir)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_by_mark_or_contents() {
        let ours = |paths: &[&str]| {
            let root = tempfile::tempdir().unwrap();
            let dir = root.path().join("v7");
            for path in paths {
                fs::create_dir_all(dir.join(path)).unwrap();
            }
            (is_ours(&dir), is_free(&dir))
        };
        let table: [(&[&str], (bool, bool)); 9] = [
            // Anybody's: it may be used, where our own layout goes, and isn't removed elsewhere.
            (&[], (false, true)),
            (&["maps", "links"], (false, true)),
            (&["nohop", "whatever/precious"], (true, false)),
            (&["maps/CONTROL", "maps/UNKNOWN"], (true, false)),
            (&["links/nohop_edge"], (true, false)),
            (&["PEERS"], (true, false)),
            (&["maps/precious"], (false, false)),
            (&["links/edge"], (false, false)),
            (&["something"], (false, false)),
        ];
        for (paths, expected) in table {
            assert_eq!(ours(paths), expected, "{paths:?}");
        }
    }
}
