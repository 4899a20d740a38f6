//! Where the cgroup v2 hierarchy is mounted.

use std::path::PathBuf;

/// The mount point of the cgroup v2 hierarchy: the first in /proc/mounts, since beside v1 it is
/// wherever the distribution put it. `None` where none is mounted.
pub fn find_cgroup2_root() -> Option<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/mounts").ok()?;
    in_mounts(&mounts)
}

fn in_mounts(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (directory, kind) = (fields.next()?, fields.next()?);
        // The kernel writes a space within a field as \040.
        (kind == "cgroup2").then(|| directory.replace("\\040", " ").into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_cgroup2_mount() {
        let check = |mounts, expected: Option<&str>| {
            assert_eq!(in_mounts(mounts), expected.map(PathBuf::from), "{mounts}");
        };
        check("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n", Some("/sys/fs/cgroup"));
        check(
            "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\nnone /my\\040cgroup cgroup2 rw 0 0\n",
            Some("/my cgroup"),
        );
        check("cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n", None);
        check("", None);
    }
}
