//! Programs of packages that are unpacked and never installed, because Debian makes them services of
//! the machine at once: systemd-resolved its resolver, Prometheus a server.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use super::apt::Apt;
use super::common::{Draft, announce, cache_dir, link_tool};
use crate::process::{self, is_executable};

/// A program that a scenario needs.
pub struct Unpacked {
    pub name: &'static str,
    package: &'static str,
    /// The folder it is in where the package is installed, and those within the package.
    installed: &'static str,
    within: &'static [&'static str],
}

pub const ALL: [Unpacked; 2] = [
    Unpacked {
        name: "systemd-resolved",
        package: "systemd-resolved",
        installed: "/lib/systemd",
        within: &["usr/lib/systemd", "lib/systemd"],
    },
    Unpacked {
        name: "promtool",
        package: "prometheus",
        installed: "/usr/bin",
        within: &["usr/bin"],
    },
];

impl Unpacked {
    /// Sees to it that the program is there, and returns where.
    pub fn provide(&self) -> Result<String> {
        let installed = Path::new(self.installed).join(self.name);
        let binary = if is_executable(&installed) { installed } else { self.unpacked()? };
        link_tool(self.name, &binary)?;
        Ok(binary.display().to_string())
    }

    fn unpacked(&self) -> Result<PathBuf> {
        let (name, package) = (self.name, self.package);
        let place = cache_dir()?.join(name);
        let binary = place.join(name);
        if is_executable(&binary) {
            return Ok(binary);
        }
        announce(&format!("downloading {package} with apt-get"));
        // The package's file goes with its apt.
        let apt = Apt::of_system()?;
        let deb = apt.download(package)?;
        let draft = Draft::beside(&place)?;
        process::output(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(draft.path()))?;
        let mut found = self.within.iter().map(|dir| draft.path().join(dir));
        match found.find(|dir| is_executable(&dir.join(name))) {
            Some(dir) => draft.publish(&dir, &place)?,
            None => bail!("{} holds no {name}", deb.display()),
        }
        Ok(binary)
    }
}
