//! A BPF file system of a test's own: what is pinned in it is nobody else's, and goes with it.

use std::path::Path;
use std::sync::Once;

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::cleanup::Undo;
use crate::tempdir::{Scratch, sweep};

const ROLE: &str = "bpf";

/// A mounted BPF file system; needs root. What is pinned in it goes when this is dropped.
pub struct Bpffs {
    // Unmounted before the directory is removed.
    _undo: Undo,
    scratch: Scratch,
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
        let scratch = Scratch::new(ROLE)?;
        let undo = Undo::new({
            let path = scratch.path().to_owned();
            move || {
                let _ = unmount(path, UnmountFlags::DETACH);
            }
        });
        mount("bpf", scratch.path(), "bpf", MountFlags::empty(), None)
            .with_context(|| format!("mount a BPF file system at {}", scratch.path().display()))?;
        Ok(Bpffs { _undo: undo, scratch })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.scratch.path()
    }
}
