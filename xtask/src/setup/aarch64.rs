//! What runs programs for aarch64 on another architecture: an emulator, and from Debian a kernel and a busybox.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use super::apt::Apt;
use super::common::{Draft, announce, cache_dir};
use super::kernels::{self, Kernel};
use super::system;
use crate::process;

const RELEASE: &str = "bookworm";

/// Where Debian's cross compiler has its libraries.
pub const LIBRARIES: &str = "/usr/aarch64-linux-gnu/lib";

/// What a VM of aarch64 needs.
pub struct Parts {
    pub kernel: Kernel,
    /// Linked statically.
    pub busybox: PathBuf,
}

/// Finds them, or downloads them from this machine's Debian mirror, once.
///
/// # Errors
/// When they can't be had, with the way to get them.
pub fn provide() -> Result<Parts> {
    system::provide_program("qemu-system-aarch64", "qemu-system-arm")?;
    let place = cache_dir()?.join("aarch64").join(RELEASE);
    if !place.is_dir() {
        announce(&format!("downloading the kernel for arm64 of Debian's {RELEASE} with apt-get"));
        let parent = place.parent().context("the cache has no folder")?;
        fs::create_dir_all(parent).with_context(|| format!("can't create {}", parent.display()))?;
        let (apt, draft) = (Apt::of_debian(RELEASE, Some("arm64"))?, Draft::beside(&place)?);
        kernels::download(&apt, "arm64", &draft)?;
        let deb = apt.download("busybox-static")?;
        let unpacked = draft.path().join("busybox");
        process::output(Command::new("dpkg-deb").arg("-x").arg(deb).arg(&unpacked))?;
        let made = draft.path().join("kernels");
        fs::rename(unpacked.join("bin/busybox"), made.join("busybox"))
            .context("busybox-static has no bin/busybox")?;
        draft.publish(&made, &place)?;
    }
    let kernel = kernels::in_folder(&place)?.pop();
    let kernel = kernel.with_context(|| format!("{} has no kernel", place.display()))?;
    Ok(Parts { kernel, busybox: place.join("busybox") })
}
