//! The packages for aarch64 in a VM, by software emulation: the kernel takes the programs, and a connection by
//! name arrives.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::release::{Architecture, release};
use super::{Options, run};
use crate::process;
use crate::repository;
use crate::setup;
use crate::vm::boot;
use crate::vm::initramfs::Archive;

/// What glibc and the daemon are linked with.
const LIBRARIES: [&str; 4] = ["ld-linux-aarch64.so.1", "libc.so.6", "libgcc_s.so.1", "libm.so.6"];

fn out() -> PathBuf {
    repository::root().join("target/dist-aarch64")
}

/// Makes the packages.
pub fn made() -> Result<()> {
    run(&Options { architectures: vec![Architecture::Aarch64], out: out() })
}

/// Runs the binary of the .deb.
pub fn connects() -> Result<()> {
    let deb = out().join(format!("nohop_{}_arm64.deb", release(&out())?.version));
    let parts = setup::aarch64::provide()?;
    let initrd = initrd(&deb, &parts, &repository::root().join("target/dist-work/aarch64"))?;
    let (kernel, limit) = (&parts.kernel, boot::LIMIT_SECONDS);
    let program = "qemu-system-aarch64";
    let mut vm = boot::emulator(program, kernel, &initrd, limit, "1G", "console=ttyAMA0");
    vm.args(["-machine", "virt", "-cpu", "cortex-a57"]);
    ensure!(boot::run(vm, "aarch64", |_| {})?, "what failed is above");
    Ok(())
}

/// The file system that it boots on.
fn initrd(deb: &Path, parts: &setup::aarch64::Parts, folder: &Path) -> Result<PathBuf> {
    let unpacked = folder.join("unpacked");
    if unpacked.exists() {
        std::fs::remove_dir_all(&unpacked)?;
    }
    std::fs::create_dir_all(&unpacked)?;
    process::output(Command::new("dpkg-deb").arg("-x").arg(deb).arg(&unpacked))?;
    let mut archive = Archive::default();
    archive.add_executable("usr/bin/nohop", &unpacked.join("usr/bin/nohop"))?;
    archive.add_executable("bin/busybox", &parts.busybox)?;
    let libraries = Path::new(setup::aarch64::LIBRARIES);
    for library in LIBRARIES {
        archive
            .add_executable(&format!("lib/{library}"), &libraries.join(library))
            .context("the cross compiler's packages have it")?;
    }
    archive.add_modules(&parts.kernel.modules, &[])?;
    let init =
        format!("{}echo \"{}$?\"\npoweroff -f\n", include_str!("aarch64.sh"), boot::END_MARK);
    archive.add_script("init", init);
    let initrd = folder.join("initrd");
    archive.write(&initrd)?;
    Ok(initrd)
}
