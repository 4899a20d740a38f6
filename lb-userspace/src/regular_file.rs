//! Reads files that the configuration names, and those of the state directory. Something else may be in the
//! place of each: to open a FIFO waits for a writer, some devices act when they are opened, and others have no
//! end.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

/// The device number of `/dev/null` (Documentation/admin-guide/devices.txt in Linux).
const NULL: u64 = libc::makedev(1, 3);

/// Opens a file for reading, without waiting for anything but the disk.
///
/// # Errors
/// When it can't be opened, or is no regular file: then what it is, with the fix, to follow its path. A descriptor of
/// this process, such as `/dev/stdin`, may be anything.
pub fn open(path: &Path) -> io::Result<File> {
    // What the caller has passed on is open already.
    let own = ["/dev/stdin", "/dev/fd/", "/proc/self/fd/"];
    if own.iter().any(|own| path.as_os_str().as_encoded_bytes().starts_with(own.as_bytes())) {
        return File::open(path);
    }
    // Before it is opened, for devices; and after it, as it may be another one by then.
    check(&fs::metadata(path)?)?;
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    check(&file.metadata()?)?;
    Ok(file)
}

/// Reads a file whole.
///
/// # Errors
/// As [`open`], or when it can't be read.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut contents = Vec::new();
    open(path)?.read_to_end(&mut contents)?;
    Ok(contents)
}

/// As [`read`], for what `/dev/null` may be named for: an empty file.
///
/// # Errors
/// As [`read`].
pub fn read_or_null(path: &Path) -> io::Result<Vec<u8>> {
    let found = fs::metadata(path)?;
    let is_null = found.file_type().is_char_device() && found.rdev() == NULL;
    if is_null { Ok(Vec::new()) } else { read(path) }
}

/// As [`read`], for a text in UTF-8.
///
/// # Errors
/// As [`read`], or when it isn't such a text.
pub fn read_to_string(path: &Path) -> io::Result<String> {
    String::from_utf8(read(path)?).map_err(|_| {
        io::Error::new(io::ErrorKind::InvalidData, "it isn't UTF-8; write the file in UTF-8")
    })
}

fn check(found: &Metadata) -> io::Result<()> {
    let kind = found.file_type();
    let what = match kind {
        _ if kind.is_file() => return Ok(()),
        _ if kind.is_dir() => "a directory",
        _ if kind.is_fifo() => "a FIFO",
        _ if kind.is_socket() => "a socket",
        _ => "a device",
    };
    Err(io::Error::other(format!("it is {what}, not a regular file; replace it with one")))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use nix::sys::stat::Mode;

    use super::*;

    /// Without the check a FIFO would hang the test.
    #[test]
    fn what_is_no_file_is_named_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        nix::unistd::mkfifo(&at("fifo"), Mode::S_IRWXU).unwrap();
        symlink(at("fifo"), at("link")).unwrap();
        let _listener = UnixListener::bind(at("socket")).unwrap();
        symlink("/dev/zero", at("zero")).unwrap();
        for (name, expected) in [
            ("fifo", "a FIFO"),
            ("link", "a FIFO"),
            ("socket", "a socket"),
            ("zero", "a device"),
            (".", "a directory"),
        ] {
            let error = read_or_null(&at(name)).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("replace it with one"), "{error}");
        }
        let (reader, writer) = std::io::pipe().unwrap();
        std::io::Write::write_all(&mut &writer, b"passed on").unwrap();
        drop(writer);
        let passed = format!("/dev/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&reader));
        assert_eq!(read(Path::new(&passed)).unwrap(), b"passed on");
        let null = Path::new("/dev/null");
        assert_eq!(read_or_null(null).unwrap(), b"");
        assert!(read(null).unwrap_err().to_string().contains("a device"));
        let absent = read(&at("absent")).unwrap_err();
        assert_eq!(absent.kind(), io::ErrorKind::NotFound);
    }
}
