//! A test's own BPF file system: its pins are private, and go with it.

use std::path::Path;
use std::sync::Once;

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::cleanup::Cleanup;
use crate::tempdir::{TempDir, sweep};

const ROLE: &str = "bpf";

/// A mounted BPF file system; needs root. Dropping it removes its pins.
pub struct Bpffs {
    // Unmounted before the directory is removed.
    _cleanup: Cleanup,
    tempdir: TempDir,
}

impl Bpffs {
    /// Mounts one.
    ///
    /// # Errors
    /// When it can't be mounted.
    pub fn new() -> Result<Bpffs> {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            let temporary = std::env::temp_dir();
            sweep(&temporary, |name| {
                if name.ends_with(ROLE) {
                    let _ = unmount(temporary.join(name), UnmountFlags::DETACH);
                }
            });
        });
        let tempdir = TempDir::new(ROLE)?;
        let cleanup = Cleanup::new({
            let path = tempdir.path().to_owned();
            move || {
                let _ = unmount(path, UnmountFlags::DETACH);
            }
        });
        mount("bpf", tempdir.path(), "bpf", MountFlags::empty(), None)
            .with_context(|| format!("mount a BPF file system at {}", tempdir.path().display()))?;
        Ok(Bpffs { _cleanup: cleanup, tempdir })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.tempdir.path()
    }
}
