//! The last good text of a static catalog, in the state directory: a daemon that starts while the
//! file can't be used serves what it said before.
//!
//! A static catalog doesn't age as Consul's does: what it has holds until somebody edits it, over
//! reboots as well.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// The copy's name, within the state directory.
const FILE_NAME: &str = "catalog.last.toml";

/// Where the copy of one catalog is.
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
        if self.read().is_some_and(|kept| kept == text) {
            return Ok(());
        }
        let directory = self.path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(directory)?;
        let mut file = tempfile::NamedTempFile::new_in(directory)?;
        file.write_all(self.head.as_bytes())?;
        file.write_all(text.as_bytes())?;
        file.as_file().sync_all()?;
        file.persist(&self.path)?;
        // So that the new name outlives a loss of power, too.
        std::fs::File::open(directory)?.sync_all()
    }

    /// The text, where there is one of this catalog.
    pub fn read(&self) -> Option<String> {
        let text = std::fs::read_to_string(&self.path).ok()?;
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
            assert_eq!(Kept::new(&state, Path::new("/etc/b.toml")).read(), None);
        }
    }
}
