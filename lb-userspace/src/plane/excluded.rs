//! The cgroups that are left alone, as the kernel knows them.

use std::os::linux::fs::MetadataExt;
use std::path::{Path, PathBuf};

use lb_common::{ExcludedCgroup, MAX_EXCLUDED};

/// Those of `paths` that exist now. A relative path is below `root`, the mounted hierarchy's. The
/// kernel knows a cgroup by its inode, so one that was made again has to be looked up again.
pub fn present(root: &Path, paths: &[PathBuf]) -> Vec<ExcludedCgroup> {
    let found = paths.iter().filter_map(|path| {
        let whole = root.join(path);
        let level = whole.strip_prefix(root).ok()?.components().count();
        let cgroup_id = std::fs::metadata(&whole).ok()?.st_ino();
        Some(ExcludedCgroup { cgroup_id, level: level as u64 })
    });
    found.take(MAX_EXCLUDED).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_is_its_inode_and_its_depth() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("a/b")).unwrap();
        let inode = |path| std::fs::metadata(root.path().join(path)).unwrap().st_ino();
        let paths = ["a".into(), root.path().join("a/b"), "gone".into(), "/elsewhere".into()];
        let expected = [
            ExcludedCgroup { cgroup_id: inode("a"), level: 1 },
            ExcludedCgroup { cgroup_id: inode("a/b"), level: 2 },
        ];
        assert_eq!(present(root.path(), &paths), expected);
    }
}
