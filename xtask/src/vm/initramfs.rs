//! The file system that a VM boots on: an archive in cpio's `newc` format, which the kernel's
//! Documentation/driver-api/early-userspace/buffer-format.rst describes.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The modules that the tests need, where the kernel hasn't them built in.
const MODULES: [&str; 10] = [
    "8021q",
    "bridge",
    "cls_bpf",
    "dummy",
    "inet_diag",
    "macvlan",
    "sch_ingress",
    "tcp_diag",
    "udp_diag",
    "veth",
];

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const FILE: u32 = 0o100_644;

/// Files by path, without a slash at the begin; ordered, so that folders come before what they
/// hold.
#[derive(Clone, Default)]
pub struct Archive(BTreeMap<String, Entry>);

#[derive(Clone)]
struct Entry {
    mode: u32,
    content: Vec<u8>,
}

impl Archive {
    /// A script to be executed.
    pub fn add_script(&mut self, path: &str, script: String) {
        self.add(path, EXECUTABLE, script.into_bytes());
    }

    /// A file that is executed or loaded as it is.
    pub fn add_executable(&mut self, path: &str, file: &Path) -> Result<()> {
        self.add(path, EXECUTABLE, read(file)?);
        Ok(())
    }

    /// A program of this machine's, with the shared libraries that it needs.
    pub fn add_program(&mut self, path: &str, program: &Path) -> Result<()> {
        self.add_executable(path, program)?;
        for library in libraries(program)? {
            let library_path = library.to_string_lossy();
            self.add_executable(library_path.trim_start_matches('/'), &library)?;
        }
        Ok(())
    }

    /// The modules of the folder `modules` that the tests need, and `more`, as modules/NUMBER-NAME in the order
    /// in which they go into the kernel.
    pub fn add_modules(&mut self, modules: &Path, more: &[&str]) -> Result<()> {
        let mut files = BTreeMap::new();
        find_modules(modules, &mut files)?;
        let mut ordered = Vec::new();
        for name in MODULES.iter().chain(more) {
            order(name, &files, &mut ordered)?;
        }
        for (n, (name, content)) in ordered.into_iter().enumerate() {
            self.add(&format!("modules/{n:02}-{name}"), FILE, content);
        }
        Ok(())
    }

    fn add(&mut self, path: &str, mode: u32, content: Vec<u8>) {
        for (end, _) in path.match_indices('/') {
            let folder = Entry { mode: DIRECTORY, content: Vec::new() };
            self.0.insert(path[..end].to_owned(), folder);
        }
        self.0.insert(path.to_owned(), Entry { mode, content });
    }

    /// Writes it to `file`.
    pub fn write(&self, file: &Path) -> Result<()> {
        fs::write(file, self.to_cpio()).with_context(|| format!("can't write {}", file.display()))
    }

    fn to_cpio(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (n, (path, entry)) in self.0.iter().enumerate() {
            append(&mut bytes, n + 1, path, entry);
        }
        let trailer = Entry { mode: 0, content: Vec::new() };
        append(&mut bytes, 0, "TRAILER!!!", &trailer);
        bytes
    }
}

fn append(bytes: &mut Vec<u8>, inode: usize, path: &str, Entry { mode, content }: &Entry) {
    let (size, name_size) = (content.len(), path.len() + 1);
    // inode, mode, uid, gid, links, mtime, size, four device numbers, the name's size, a checksum
    let header = format!(
        "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}{size:08x}\
         {0:08x}{0:08x}{0:08x}{0:08x}{name_size:08x}{0:08x}",
        0, 1
    );
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(path.as_bytes());
    bytes.push(0);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

fn read(file: &Path) -> Result<Vec<u8>> {
    fs::read(file).with_context(|| format!("can't read {}", file.display()))
}

/// The shared libraries that `program` needs, its loader among them; none of a static one.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let ldd = Command::new("ldd").arg(program).env("LC_ALL", "C").output();
    let ldd = ldd.context("can't run `ldd`")?;
    let printed = String::from_utf8_lossy(&[ldd.stdout, ldd.stderr].concat()).into_owned();
    if printed.contains("not a dynamic executable") {
        return Ok(Vec::new());
    }
    if !ldd.status.success() || printed.contains("not found") {
        bail!("`ldd {}` doesn't find all libraries: {printed}", program.display());
    }
    Ok(library_paths(&printed))
}

/// The paths in what ldd says: `libc.so.6 => /lib/libc.so.6 (0x…)`, `/lib64/ld.so (0x…)`.
fn library_paths(printed: &str) -> Vec<PathBuf> {
    let words =
        printed.lines().filter_map(|line| line.split_whitespace().find(|w| w.starts_with('/')));
    words.map(PathBuf::from).collect()
}

/// All modules in `folder` and below, by name.
fn find_modules(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let unreadable = || format!("can't read {}", folder.display());
    for entry in fs::read_dir(folder).with_context(unreadable)? {
        let entry = entry.with_context(unreadable)?;
        if entry.file_type().with_context(unreadable)?.is_dir() {
            find_modules(&entry.path(), files)?;
        } else if let Some((name, "ko" | "ko.xz")) =
            entry.file_name().to_string_lossy().split_once('.')
        {
            files.insert(name.replace('-', "_"), entry.path());
        }
    }
    Ok(())
}

/// Adds the module `name` to `ordered`, after those that it depends on. What isn't among the files
/// is part of the kernel.
fn order(
    name: &str,
    files: &BTreeMap<String, PathBuf>,
    ordered: &mut Vec<(String, Vec<u8>)>,
) -> Result<()> {
    let Some(file) = files.get(name) else { return Ok(()) };
    if ordered.iter().any(|(done, _)| done == name) {
        return Ok(());
    }
    let module = uncompressed(file)?;
    for dependency in dependencies(&module) {
        order(&dependency, files, ordered)?;
    }
    ordered.push((name.to_owned(), module));
    Ok(())
}

/// The content of a module's file, compressed or not.
fn uncompressed(file: &Path) -> Result<Vec<u8>> {
    if file.extension().is_none_or(|extension| extension != "xz") {
        return read(file);
    }
    let xz = Command::new("xz").args(["--decompress", "--stdout"]).arg(file).output();
    let xz = xz.context("can't run `xz`")?;
    if !xz.status.success() {
        bail!("{} can't be unpacked: {}", file.display(), String::from_utf8_lossy(&xz.stderr));
    }
    Ok(xz.stdout)
}

/// A module's dependencies, from its section `.modinfo` of `key=value` and zero bytes.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module[start + KEY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(value);
    names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::{Archive, dependencies, library_paths};

    #[test]
    fn folders_come_before_their_files() {
        let mut archive = Archive::default();
        archive.add_script("a/b/c", "x".to_owned());
        let paths: Vec<_> = archive.0.keys().map(String::as_str).collect();
        assert_eq!(paths, ["a", "a/b", "a/b/c"]);
    }

    #[test]
    fn entries_are_as_the_format_has_them() {
        let mut archive = Archive::default();
        archive.add("f", 0o100_644, b"hello".to_vec());
        let cpio = archive.to_cpio();
        let first = "07070100000001000081a4000000000000000000000001000000000000000500000000\
                     00000000000000000000000000000002000000\
                     00f\0hello\0\0\x00070701";
        assert!(cpio.starts_with(first.as_bytes()), "{}", String::from_utf8_lossy(&cpio));
        assert_eq!(cpio.len() % 4, 0);
    }

    #[test]
    fn dependencies_are_read() {
        let table: [(&[u8], &[&str]); 3] = [
            (b"x\0license=GPL\0depends=inet-diag,tunnel4\0name=x\0", &["inet_diag", "tunnel4"]),
            (b"x\0depends=\0name=x\0", &[]),
            (b"", &[]),
        ];
        for (module, expected) in table {
            assert_eq!(dependencies(module), expected);
        }
    }

    #[test]
    fn libraries_are_read_from_what_ldd_says() {
        let printed = "\tlinux-vdso.so.1 (0x00007f29bab19000)\n\
                    \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f29ba21e000)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f29bab1b000)\n";
        let paths = library_paths(printed);
        let expected = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"];
        assert_eq!(paths, expected.map(std::path::PathBuf::from));
        assert!(library_paths("\tstatically linked\n").is_empty());
    }
}
