//! Shared by the steps of setup: the cache folder, links to tools, errors with a fix.

use std::env;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};

/// The purposes of a machine. Each needs what those before it need, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Purpose {
    /// To build the object and the binary.
    Build,
    /// To run the demo.
    Demo,
    /// To run the tests, which also need other programs' clients and servers.
    Test,
}

/// Adds to an error what it stopped and how to fix it.
pub fn with_fix<T>(result: Result<T>, stopped: &str, fix: &str) -> Result<T> {
    result.map_err(|error| anyhow!("{stopped}: {error:#}\n  to fix it: {fix}"))
}

/// Prints what a step that takes a while is about to do.
pub fn announce(what: &str) {
    println!("..: {what}");
}

/// The folder of what setup builds and unpacks, shared by all working copies.
pub fn cache_dir() -> Result<PathBuf> {
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let caches = match absolute("XDG_CACHE_HOME") {
        Some(caches) => caches,
        None => absolute("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?.join(".cache"),
    };
    let dir = caches.join("nohop");
    fs::create_dir_all(&dir).with_context(|| format!("can't create {}", dir.display()))?;
    Ok(dir)
}

/// Makes `.tools/NAME` point at `target`, in one step. A link that already does stays as it is: cargo
/// would rebuild the object for a newer one.
pub fn link_tool(name: &str, target: &Path) -> Result<()> {
    let tools = crate::repository::root().join(".tools");
    let link = tools.join(name);
    if fs::read_link(&link).is_ok_and(|current| current == target) {
        return Ok(());
    }
    let fresh = tools.join(format!(".{name}.{}", std::process::id()));
    fs::create_dir_all(&tools)
        .and_then(|()| symlink(target, &fresh))
        .and_then(|()| fs::rename(&fresh, &link))
        .with_context(|| format!("can't link {} to {}", link.display(), target.display()))
}

/// A folder next to its final place, so that a half-filled one is never visible there.
/// Removed on drop.
pub struct Draft(PathBuf);

impl Draft {
    /// The folder.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// An empty folder next to `place`.
    pub fn beside(place: &Path) -> Result<Self> {
        let name = place.file_name().unwrap_or_default().to_string_lossy();
        let dir = place.with_file_name(format!(".{name}.{}", std::process::id()));
        fs::create_dir_all(&dir).with_context(|| format!("can't create {}", dir.display()))?;
        Ok(Self(dir))
    }

    /// Moves `what`, a path inside the draft, to `place`, over what may lie there.
    pub fn publish(&self, what: &Path, place: &Path) -> Result<()> {
        if place.exists() {
            let old = self.0.join(".old");
            fs::rename(place, &old)
                .with_context(|| format!("can't move {} away", place.display()))?;
        }
        fs::rename(what, place).with_context(|| format!("can't put {} in place", place.display()))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // A leftover has a hidden name and is never used.
        let _ = fs::remove_dir_all(&self.0);
    }
}
