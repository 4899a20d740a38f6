//! An archive as `tar` reads it, in the format ustar (POSIX.1-1988; tar(5) of libarchive).

/// The size of a header, and what files are padded to.
const BLOCK: usize = 512;

/// An archive of these files in a directory. Names have at most 100 octets with it.
pub fn archive(directory: &str, files: &[(String, String)], seconds: u64) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, text) in files {
        archive.extend(header(&format!("{directory}/{name}"), text.len(), seconds));
        archive.extend_from_slice(text.as_bytes());
        archive.resize(archive.len().next_multiple_of(BLOCK), 0);
    }
    archive.resize(archive.len() + 2 * BLOCK, 0);
    archive
}

fn header(name: &str, size: usize, seconds: u64) -> [u8; BLOCK] {
    let mut header = [0; BLOCK];
    let mut put = |at: usize, text: &str| {
        header[at..at + text.len()].copy_from_slice(text.as_bytes());
    };
    put(0, &name[..name.len().min(100)]);
    put(100, "0000600\0"); // mode
    put(108, "0000000\0"); // owner
    put(116, "0000000\0"); // group
    put(124, &format!("{size:011o}\0"));
    put(136, &format!("{seconds:011o}\0"));
    put(148, "        "); // the sum of the octets, for which its own are blanks
    put(156, "0"); // a file
    put(257, "ustar\x0000");
    let sum: u32 = header.iter().copied().map(u32::from).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn tar_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let long = "x".repeat(BLOCK + 1);
        let files = [("a.txt".into(), "hello\n".into()), ("b.txt".into(), String::new())];
        let files: Vec<_> = files.into_iter().chain([("c.txt".to_owned(), long.clone())]).collect();
        let file = dir.path().join("a.tar");
        std::fs::write(&file, archive("of-it", &files, 1_700_000_000)).unwrap();
        let tar = Command::new("tar").arg("-xf").arg(&file).current_dir(&dir).output().unwrap();
        assert!(tar.status.success() && tar.stderr.is_empty(), "{tar:?}");
        for (name, text) in files {
            let read = std::fs::read_to_string(dir.path().join("of-it").join(&name)).unwrap();
            assert_eq!(read, text, "{name}");
        }
    }
}
