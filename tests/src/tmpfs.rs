//! A small file system of a test's own, which can be filled up.

use std::path::Path;

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::cleanup::Undo;
use crate::tempdir::Scratch;

/// A mounted tmpfs; needs root.
pub struct Tmpfs {
    // Unmounted before the directory is removed.
    _undo: Undo,
    scratch: Scratch,
}

impl Tmpfs {
    /// Mounts one of this size, such as `64k`.
    ///
    /// # Errors
    /// When it can't be mounted.
    pub fn new(size: &str) -> Result<Tmpfs> {
        let scratch = Scratch::new("tmpfs")?;
        let undo = Undo::new({
            let path = scratch.path().to_owned();
            move || {
                let _ = unmount(path, UnmountFlags::DETACH);
            }
        });
        let options = std::ffi::CString::new(format!("size={size}"))?;
        mount("tmpfs", scratch.path(), "tmpfs", MountFlags::empty(), Some(options.as_c_str()))
            .with_context(|| format!("mount a tmpfs at {}", scratch.path().display()))?;
        Ok(Tmpfs { _undo: undo, scratch })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.scratch.path()
    }
}
