//! Detects that a file changed by its metadata, where watching it would miss changes (such as those of a
//! symbolic link's target).

use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The version of a file: device, inode, change time and size. A file that was replaced has another
/// inode, one that was written to another time; `None` for one that can't be examined.
pub type FileState = Option<(u64, u64, i64, i64, u64)>;

/// The version of the file that `path` leads to now.
pub fn file_state(path: &Path) -> FileState {
    let file = std::fs::metadata(path).ok()?;
    Some((file.dev(), file.ino(), file.ctime(), file.ctime_nsec(), file.size()))
}
