//! A small file system of a test's own, which can be filled up.

use std::path::Path;

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::cleanup::Cleanup;
use crate::tempdir::TempDir;

/// A mounted tmpfs; needs root.
pub struct Tmpfs {
    // Unmounted before the directory is removed.
    _cleanup: Cleanup,
    tempdir: TempDir,
}

impl Tmpfs {
    /// Mounts one of this size, such as `64k`.
    ///
    /// # Errors
    /// When it can't be mounted.
    pub fn new(size: &str) -> Result<Tmpfs> {
        let tempdir = TempDir::new("tmpfs")?;
        let cleanup = Cleanup::new({
            let path = tempdir.path().to_owned();
            move || {
                let _ = unmount(path, UnmountFlags::DETACH);
            }
        });
        // By default everyone may write to its root, as to /tmp.
        let options = std::ffi::CString::new(format!("size={size},mode=0755"))?;
        mount("tmpfs", tempdir.path(), "tmpfs", MountFlags::empty(), Some(options.as_c_str()))
            .with_context(|| format!("mount a tmpfs at {}", tempdir.path().display()))?;
        Ok(Tmpfs { _cleanup: cleanup, tempdir })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.tempdir.path()
    }
}
