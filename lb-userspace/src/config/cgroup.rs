//! Where the cgroup v2 hierarchy is.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// The magic number of a cgroup v2 file system; linux/magic.h calls it CGROUP2_SUPER_MAGIC.
const CGROUP2_SUPER_MAGIC: u64 = 0x6367_7270;

/// The root of the mounted cgroup v2 hierarchy, `None` where none is mounted.
pub fn find_cgroup2_root() -> Option<PathBuf> {
    mount_point(&std::fs::read_to_string("/proc/self/mounts").ok()?, "cgroup2")
}

/// Whether a directory belongs to a cgroup v2 hierarchy.
///
/// # Errors
/// When the directory can't be looked at, for one because it isn't there.
pub fn is_cgroup2(dir: &Path) -> io::Result<bool> {
    let magic = rustix::fs::statfs(dir)?.f_type;
    Ok(u64::try_from(magic).is_ok_and(|magic| magic == CGROUP2_SUPER_MAGIC))
}

/// Where the first file system of a type is mounted, by the text of /proc/self/mounts.
pub fn mount_point(mounts: &str, fs_type: &str) -> Option<PathBuf> {
    let point = mounts.lines().find_map(|mount| {
        let mut fields = mount.split(' ').skip(1);
        let point = fields.next()?;
        (fields.next()? == fs_type).then_some(point)
    })?;
    Some(PathBuf::from(OsString::from_vec(unescape(point.as_bytes()))))
}

/// The kernel writes blanks and backslashes of a path as `\040` and the like.
fn unescape(mut text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    while let [first, rest @ ..] = text {
        let code = rest.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                plain.push(byte);
                text = &rest[3..];
            }
            _ => {
                plain.push(*first);
                text = rest;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_point_of_cgroup2() {
        let table = [
            ("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n", Some("/sys/fs/cgroup")),
            (
                "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0",
                Some("/sys/fs/cgroup/unified"),
            ),
            (r"none /mnt/a\040b\134c cgroup2 rw 0 0", Some(r"/mnt/a b\c")),
            ("cgroup2 /a cgroup rw 0 0\n\nx", None),
            ("", None),
        ];
        for (mounts, expected) in table {
            assert_eq!(mount_point(mounts, "cgroup2"), expected.map(PathBuf::from), "{mounts}");
        }
    }

    #[test]
    fn a_directory_elsewhere_is_no_cgroup() {
        assert!(!is_cgroup2(Path::new("/proc")).unwrap());
        assert!(is_cgroup2(Path::new("/nowhere/at/all")).is_err());
    }
}
