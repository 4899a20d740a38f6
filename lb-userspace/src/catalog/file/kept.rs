//! The last good text of a static catalog, in the state directory: a daemon that starts while the
//! file can't be used serves what the file had before.
//!
//! A static catalog doesn't age as Consul's does: what it has applies until somebody edits it, over
//! reboots as well.

use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use crate::{durable, regular_file};

/// The copy's name, within the state directory.
const FILE_NAME: &str = "catalog.last.toml";

/// The copy of one catalog.
#[derive(Clone, Debug)]
pub struct Kept {
    path: PathBuf,
    /// Its first line, which names the catalog: a copy of another one isn't served.
    head: String,
}

impl Kept {
    /// The copy in `state_dir` of the catalog at `path`.
    pub fn new(state_dir: &Path, path: &Path) -> Kept {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let head = format!("# The last good copy of {:?}, written by nohop.\n", path.display());
        Kept { path: state_dir.join(FILE_NAME), head }
    }

    /// Keeps a text: whole, or not at all.
    ///
    /// # Errors
    /// When the directory can't be written to.
    pub fn write(&self, text: &str) -> io::Result<()> {
        match self.has(text) {
            true => Ok(()),
            false => durable::replace(&self.path, &[self.head.as_bytes(), text.as_bytes()]),
        }
    }

    /// Whether the copy is of this text. It is read in pieces: texts have megabytes.
    fn has(&self, text: &str) -> bool {
        let Ok(file) = regular_file::open(&self.path) else { return false };
        let expected = self.head.bytes().chain(text.bytes());
        let n_expected = (self.head.len() + text.len()) as u64;
        let has_size = file.metadata().is_ok_and(|file| file.len() == n_expected);
        has_size && BufReader::new(file).bytes().map_while(Result::ok).eq(expected)
    }

    /// The text, where there is one of this catalog.
    pub fn read(&self) -> Option<String> {
        let text = String::from_utf8(regular_file::read(&self.path).ok()?).ok()?;
        text.strip_prefix(&self.head).map(str::to_owned)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_of_its_own_catalog_alone() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let kept = Kept::new(&state, Path::new("/etc/a.toml"));
        assert_eq!(kept.read(), None);
        for text in ["service = []\n", "\u{feff}# \u{fc}\r\n", ""] {
            kept.write(text).unwrap();
            assert_eq!(kept.read().as_deref(), Some(text));
            assert!(kept.has(text) && !kept.has("service = [ ]"));
            assert_eq!(Kept::new(&state, Path::new("/etc/b.toml")).read(), None);
        }
    }
}
