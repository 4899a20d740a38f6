//! Packages that are unpacked and never installed, because Debian makes services of the machine of them
//! at once: systemd-resolved its resolver, Prometheus a server, Docker a daemon.

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

pub const ALL: [Unpacked; 7] = [
    Unpacked { package: "systemd-resolved", files: &["systemd-resolved"] },
    Unpacked { package: "prometheus", files: &["promtool"] },
    // Whose others are with this one.
    Unpacked { package: "containernetworking-plugins", files: &["host-local"] },
    Unpacked { package: "docker.io", files: &["dockerd", "docker"] },
    Unpacked { package: "containerd", files: &["containerd", "containerd-shim-runc-v2"] },
    Unpacked { package: "runc", files: &["runc"] },
    // Of dockerd.
    Unpacked { package: "libdevmapper1.02.1", files: &["libdevmapper.so.1.02.1"] },
];

/// Where packages have them.
const DIRECTORIES: [&str; 5] =
    ["usr/bin", "usr/sbin", "usr/lib/systemd", "lib/systemd", "usr/lib/cni"];

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
        Ok(found.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(", "))
    }

    /// All of them, if they are there.
    fn files_in(&self, root: &Path) -> Option<Vec<PathBuf>> {
        let find = |name: &&str| {
            let places = DIRECTORIES.iter().map(|dir| root.join(dir));
            // Debian's names of architectures, as multiarch has them.
            let triplet = format!("{}-linux-gnu", std::env::consts::ARCH);
            let libraries = ["lib", "usr/lib"].map(|dir| root.join(dir).join(&triplet));
            let mut places = places.chain(libraries).map(|dir| dir.join(name));
            places.find(|file| file.is_file())
        };
        self.files.iter().map(find).collect()
    }

    fn unpacked(&self) -> Result<Vec<PathBuf>> {
        let package = self.package;
        let place = cache_dir()?.join("unpacked").join(package);
        if let Some(found) = self.files_in(&place) {
            return Ok(found);
        }
        announce(&format!("downloading {package} with apt-get"));
        // The package's file goes with its apt.
        let apt = Apt::of_system()?;
        let deb = apt.download(package)?;
        let draft = Draft::beside(&place)?;
        let root = draft.path().join("root");
        process::output(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&root))?;
        if self.files_in(&root).is_none() {
            bail!("{} lacks one of {}", deb.display(), self.files.join(", "));
        }
        draft.publish(&root, &place)?;
        self.files_in(&place).with_context(|| format!("{} is incomplete", place.display()))
    }
}
