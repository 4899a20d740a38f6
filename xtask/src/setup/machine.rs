//! The image of a machine with systemd: `cargo xtask test --full`.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use super::common::{Draft, announce, cache_dir};
use super::system;
use crate::process;

const RELEASE: &str = "bookworm";

/// What the machine has in addition to Debian's least system.
const PACKAGES: &str =
    "systemd,systemd-sysv,systemd-resolved,dbus,iproute2,procps,curl,kmod,bind9-dnsutils";

/// What it takes room for only.
const UNUSED: [&str; 6] = [
    "usr/share/doc",
    "usr/share/locale",
    "usr/share/man",
    "usr/share/info",
    "var/lib/apt/lists",
    "var/cache/apt",
];

/// Debian with systemd as an archive, made from its mirror once and kept.
///
/// # Errors
/// When it can't be had, with the way to get it.
pub fn provide() -> Result<PathBuf> {
    system::provide_program("debootstrap", "debootstrap")?;
    system::provide_program("cpio", "cpio")?;
    let place = cache_dir()?.join("machine").join(format!("{RELEASE}-1"));
    let tar = place.join("image.tar");
    if tar.is_file() {
        return Ok(tar);
    }
    announce("making an image of Debian with systemd, by debootstrap");
    let parent = place.parent().context("the cache has no folder")?;
    fs::create_dir_all(parent).with_context(|| format!("can't create {}", parent.display()))?;
    let draft = Draft::beside(&place)?;
    let root = draft.path().join("root");
    let mut debootstrap = Command::new("debootstrap");
    debootstrap.args(["--variant=minbase", &format!("--include={PACKAGES}"), RELEASE]);
    process::output(debootstrap.arg(&root))
        .context("a mirror of Debian is needed once; as root, since devices and owners are made")?;
    let mut tar_of = Command::new("tar");
    for unused in UNUSED {
        tar_of.arg(format!("--exclude=./{unused}/*"));
    }
    let made = draft.path().join("made");
    fs::create_dir_all(&made)?;
    process::output(tar_of.arg("-cf").arg(made.join("image.tar")).arg("-C").arg(&root).arg("."))?;
    draft.publish(&made, &place)?;
    Ok(tar)
}
