//! What tells one state of a file from another, where it is looked at rather than watched.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A file's state. One that is replaced has another inode, one that is written to another time; one
/// that can't be looked at has none.
pub type Stamp = Option<(u64, u64, i64, i64, u64)>;

/// The state of the file that a path leads to now.
pub fn stamp(path: &Path) -> Stamp {
    let file = std::fs::metadata(path).ok()?;
    Some((file.dev(), file.ino(), file.mtime(), file.mtime_nsec(), file.size()))
}
