//! Packages that are unpacked and never installed, because Debian makes services of the machine of them
//! at once: systemd-resolved its resolver, Prometheus, nginx and ngtcp2 servers, Docker a daemon, BIRD and
//! FRR routers.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::apt::Apt;
use super::common::{Draft, announce, cache_dir, link_tool};
use crate::process;

/// A package with what scenarios need.
pub struct Unpacked {
    pub package: &'static str,
    /// The programs, or the library.
    files: &'static [&'static str],
}

pub const ALL: [Unpacked; 13] = [
    Unpacked { package: "systemd-resolved", files: &["systemd-resolved"] },
    Unpacked { package: "prometheus", files: &["promtool"] },
    // Whose others are with this one.
    Unpacked { package: "containernetworking-plugins", files: &["host-local"] },
    Unpacked { package: "docker.io", files: &["dockerd", "docker"] },
    Unpacked { package: "containerd", files: &["containerd", "containerd-shim-runc-v2"] },
    Unpacked { package: "runc", files: &["runc"] },
    // Of dockerd.
    Unpacked { package: "libdevmapper1.02.1", files: &["libdevmapper.so.1.02.1"] },
    Unpacked { package: "bird2", files: &["bird", "birdc"] },
    Unpacked { package: "frr", files: &["bgpd", "vtysh", "zebra"] },
    Unpacked { package: "keepalived", files: &["keepalived"] },
    Unpacked { package: "nginx", files: &["nginx"] },
    Unpacked { package: "ngtcp2-client", files: &["gtlsclient"] },
    Unpacked { package: "ngtcp2-server", files: &["gtlsserver"] },
];

/// Where packages have them.
const DIRECTORIES: [&str; 6] =
    ["usr/bin", "usr/sbin", "usr/lib/systemd", "lib/systemd", "usr/lib/cni", "usr/lib/frr"];

impl Unpacked {
    /// Sees to it that the files are there, and returns where.
    pub fn provide(&self) -> Result<String> {
        let found = match self.files_in(Path::new("/")) {
            Some(found) => found,
            None => self.unpacked()?,
        };
        for (name, file) in self.files.iter().zip(&found) {
            link_tool(name, file)?;
        }
        for library in libraries(&self.place()?) {
            let name = library.file_name().and_then(|name| name.to_str());
            let name = name.context("a library's name")?;
            if ALL.iter().all(|one| !one.files.contains(&name)) {
                link_tool(name, &library)?;
            }
        }
        Ok(found.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(", "))
    }

    /// All of them, if they are there.
    fn files_in(&self, root: &Path) -> Option<Vec<PathBuf>> {
        let find = |name: &&str| {
            let places = DIRECTORIES.iter().map(|dir| root.join(dir));
            let mut places = places.chain(library_dirs(root)).map(|dir| dir.join(name));
            places.find(|file| file.is_file())
        };
        self.files.iter().map(find).collect()
    }

    fn unpacked(&self) -> Result<Vec<PathBuf>> {
        let (package, place) = (self.package, self.place()?);
        if let Some(found) = self.files_in(&place) {
            return Ok(found);
        }
        announce(&format!("downloading {package} with apt-get"));
        // The package's file goes with its apt.
        let apt = Apt::of_system()?;
        let draft = Draft::beside(&place)?;
        let root = draft.path().join("root");
        for package in apt.absent_libraries(package)?.iter().map(String::as_str).chain([package]) {
            let deb = apt.download(package)?;
            process::output(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&root))?;
        }
        if self.files_in(&root).is_none() {
            bail!("{package} lacks one of {}", self.files.join(", "));
        }
        draft.publish(&root, &place)?;
        self.files_in(&place).with_context(|| format!("{} is incomplete", place.display()))
    }

    /// Where it is unpacked.
    fn place(&self) -> Result<PathBuf> {
        Ok(cache_dir()?.join("unpacked").join(self.package))
    }
}

/// Where libraries are, by Debian's names of architectures, as multiarch has them.
fn library_dirs(root: &Path) -> [PathBuf; 3] {
    let triplet = format!("{}-linux-gnu", std::env::consts::ARCH);
    let usr = root.join("usr/lib").join(&triplet);
    [root.join("lib").join(&triplet), usr.join("frr"), usr]
}

/// The libraries that were unpacked, by the links that have their sonames.
fn libraries(root: &Path) -> Vec<PathBuf> {
    let files = library_dirs(root).into_iter().filter_map(|dir| dir.read_dir().ok()).flatten();
    let files = files.filter_map(|entry| Some(entry.ok()?.path()));
    files.filter(|path| path.is_symlink() && path.to_string_lossy().contains(".so.")).collect()
}
