//! systemd-resolved for a scenario; it is unpacked, never installed, because Debian's package makes
//! it the machine's resolver at once.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use super::apt::Apt;
use super::{Draft, announce, cache_dir, link_tool};
use crate::process::{self, is_executable};

const INSTALLED: &str = "/lib/systemd/systemd-resolved";

pub fn provide() -> Result<String> {
    let unpacked = cache_dir()?.join("systemd-resolved");
    let binary = match Path::new(INSTALLED) {
        installed if is_executable(installed) => installed.to_owned(),
        _ => {
            let binary = unpacked.join("systemd-resolved");
            if !is_executable(&binary) {
                unpack(&unpacked)?;
            }
            binary
        }
    };
    link_tool("systemd-resolved", &binary)?;
    Ok(binary.display().to_string())
}

fn unpack(place: &Path) -> Result<()> {
    announce("downloading systemd-resolved with apt-get");
    // The package's file goes with its apt.
    let apt = Apt::of_system()?;
    let deb = apt.download("systemd-resolved")?;
    let draft = Draft::beside(place)?;
    process::output(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&draft.0))?;
    let found = ["usr/lib/systemd", "lib/systemd"].map(|dir| draft.0.join(dir));
    match found.iter().find(|dir| is_executable(&dir.join("systemd-resolved"))) {
        Some(dir) => draft.publish(dir, place),
        None => bail!("{} holds no systemd-resolved", deb.display()),
    }
}
