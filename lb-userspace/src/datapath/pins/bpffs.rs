//! The BPF file system that the pins are on.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::error::{CONVENTIONAL_MOUNT, PinError};

/// The magic number of a BPF file system; linux/magic.h calls it BPF_FS_MAGIC.
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;

/// The directory itself, or the nearest existing one above it. A symlink in its place is ignored:
/// another user may have created it.
pub fn nearest(dir: &Path) -> &Path {
    let is_there = |path: &&Path| path.exists() && !(*path == dir && path.is_symlink());
    dir.ancestors().find(is_there).unwrap_or(Path::new("/"))
}

/// Checks that a directory is, or will be, on a BPF file system; mounts one in its conventional place
/// where that is meant.
///
/// # Errors
/// When there is none, or it can't be mounted.
pub fn ensure_bpffs(dir: &Path) -> Result<(), PinError> {
    if is_bpffs(nearest(dir)) {
        return Ok(());
    }
    let mount_point = Path::new(CONVENTIONAL_MOUNT);
    if !dir.starts_with(mount_point) || !mount_point.is_dir() {
        return Err(PinError::NoBpffs { dir: dir.into() });
    }
    let flags = rustix::mount::MountFlags::NOSUID
        | rustix::mount::MountFlags::NODEV
        | rustix::mount::MountFlags::NOEXEC;
    rustix::mount::mount("bpf", mount_point, "bpf", flags, c"mode=0700")
        .map_err(|errno| PinError::Mount { source: errno.into() })?;
    tracing::info!("mounted a BPF file system at {CONVENTIONAL_MOUNT}");
    let own = Path::new("/proc/self/ns/mnt");
    if is_another_namespace(own, Path::new("/proc/1/ns/mnt")) {
        tracing::warn!(
            "only this process sees it, so the pins go with it, and nohop unload doesn't find them: \
             have the machine mount it at its start, by a line in /etc/fstab: \
             bpf {CONVENTIONAL_MOUNT} bpf mode=0700 0 0"
        );
    }
    Ok(())
}

/// Whether two links of /proc name different namespaces, as far as that can be seen.
fn is_another_namespace(own: &Path, other: &Path) -> bool {
    match (fs::metadata(own), fs::metadata(other)) {
        (Ok(own), Ok(other)) => (own.dev(), own.ino()) != (other.dev(), other.ino()),
        _ => false,
    }
}

/// Whether a directory is on a BPF file system.
pub fn is_bpffs(dir: &Path) -> bool {
    let magic = rustix::fs::statfs(dir).map(|fs| fs.f_type);
    magic.is_ok_and(|magic| u64::try_from(magic).is_ok_and(|magic| magic == BPF_FS_MAGIC))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces() {
        let table = [
            ("/proc/self/ns/mnt", "/proc/thread-self/ns/mnt", false),
            ("/proc/self/ns/mnt", "/proc/self/ns/net", true),
            // Without access to the other process it is unknown.
            ("/proc/self/ns/mnt", "/proc/self/ns/absent", false),
        ];
        for (own, other, expected) in table {
            assert_eq!(is_another_namespace(own.as_ref(), other.as_ref()), expected, "{other}");
        }
    }
}
