//! A Debian of its own that boots with systemd as PID 1, in a VM, and what is tried there with the package:
//! what only a real boot shows. `cargo xtask test --full` runs it; by software emulation it takes minutes, and
//! nothing is measured by its clock.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::setup;
use crate::setup::kernels::{self, Kernel, Version};
use crate::test_report::Tally;
use crate::vm::{boot, initramfs::Archive};
use crate::{compile, dist, process, repository};

/// The version that is installed in the image, and upgraded.
const OLD_VERSION: &str = "0.0.9";

/// The kernel of the image's release of Debian; the newest where there is none such.
const KERNEL: Version = Version { major: 6, minor: 1 };

/// For how long the machine may run, in seconds, on a host that does other things as well.
const LIMIT_SECONDS: u32 = 3600;

/// What a line of guest.sh begins with.
const MARK: &str = "machine: ";

/// The init of the initramfs: the image is a folder of it, which only grows in memory.
const INIT: &str = "#!/bin/busybox sh
/bin/busybox mkdir -p /dev /proc /upper /root
/bin/busybox --install -s /bin
mount -t devtmpfs devtmpfs /dev
exec > /dev/console 2>&1
mount -t proc proc /proc
for module in /modules/*; do insmod $module; done
mount -t tmpfs -o size=80% tmpfs /upper
mkdir /upper/upper /upper/work
mount -t overlay overlay -o lowerdir=/image,upperdir=/upper/upper,workdir=/upper/work /root
umount /proc
mount --move /dev /root/dev
cd /root
mount --move . /
exec chroot . /sbin/init
";

/// Boots the machine and counts its checks. `deb` is the package; where there is none, one is made of a build
/// for tests. With a shell the machine doesn't end by itself.
pub fn run(tally: &mut Tally, deb: Option<&Path>, has_shell: bool) {
    println!("\n== a machine with systemd");
    if let Err(error) = try_run(tally, deb, has_shell) {
        tally.fail("a machine with systemd", &error);
    }
}

fn try_run(tally: &mut Tally, deb: Option<&Path>, has_shell: bool) -> Result<()> {
    setup::run_for_vms()?;
    let folder = repository::root().join("target/machine");
    fs::create_dir_all(&folder).with_context(|| format!("can't make {}", folder.display()))?;
    let kernel = kernel()?;
    let initrd = initrd(&kernel, deb, &folder)?;
    let mut results = Vec::new();
    let mut has_ended = false;
    boot_machine(&kernel, &initrd, &folder, has_shell, |line| {
        println!("{line}");
        let Some(line) = line.strip_prefix(MARK) else { return };
        has_ended |= line == "END";
        if let Some(result) = CheckResult::parse(line) {
            results.push(result);
        }
    })?;
    println!("\n{}the journal: {}", table(&results), folder.join("journal.txt").display());
    for CheckResult { name, reason } in &results {
        match reason {
            None => tally.passed += 1,
            Some(_) => {
                tally.failed += 1;
                tally.failures.push(format!("a machine with systemd: {name}"));
            }
        }
    }
    ensure!(has_ended, "the machine ended before its checks did: see {}", folder.display());
    Ok(())
}

/// A check on the machine.
#[derive(Debug, PartialEq, Eq)]
struct CheckResult {
    name: String,
    /// Why it failed.
    reason: Option<String>,
}

impl CheckResult {
    fn parse(line: &str) -> Option<CheckResult> {
        if let Some(name) = line.strip_prefix("PASS ") {
            return Some(CheckResult { name: name.to_owned(), reason: None });
        }
        let (name, reason) = line.strip_prefix("FAIL ")?.split_once(": ")?;
        Some(CheckResult { name: name.to_owned(), reason: Some(reason.to_owned()) })
    }
}

fn table(results: &[CheckResult]) -> String {
    let line = |CheckResult { name, reason }: &CheckResult| match reason {
        None => format!("| {name} | passed |\n"),
        Some(reason) => format!("| {name} | failed: {reason} |\n"),
    };
    let lines: String = results.iter().map(line).collect();
    format!("| on the machine | |\n|---|---|\n{lines}")
}

fn kernel() -> Result<Kernel> {
    let kernels::Kernels { mut found, missing } = kernels::provide()?;
    let idx = found.iter().position(|kernel| kernel.version == KERNEL);
    let idx = idx.or(found.len().checked_sub(1));
    let idx = idx.with_context(|| format!("there is no kernel: {}", missing.join("; ")))?;
    Ok(found.swap_remove(idx))
}

/// The image with all that is installed on the machine, and the kernel's modules, as one initramfs.
fn initrd(kernel: &Kernel, deb: Option<&Path>, folder: &Path) -> Result<PathBuf> {
    let tree = folder.join("tree");
    let image = tree.join("image");
    if tree.exists() {
        fs::remove_dir_all(&tree)?;
    }
    fs::create_dir_all(&image)?;
    let tar = setup::machine::provide()?;
    process::output(Command::new("tar").arg("-xf").arg(tar).arg("-C").arg(&image))?;
    let programs = image.join("usr/local/bin");
    let load = compile::program("testbed-load", "nohop-load")?;
    strip(&load, &programs.join("nohop-load"))?;
    let consul = repository::root().join(".tools/consul");
    fs::copy(&consul, programs.join("consul")).context("setup links .tools/consul")?;
    let packages = image.join("packages");
    fs::create_dir_all(&packages)?;
    let version = env!("CARGO_PKG_VERSION");
    let nohop = folder.join("nohop");
    let new = match deb {
        Some(deb) => {
            let unpacked = tree.join("unpacked");
            process::output(Command::new("dpkg-deb").arg("-x").arg(deb).arg(&unpacked))?;
            fs::copy(unpacked.join("usr/bin/nohop"), &nohop).context("the package has nohop")?;
            deb.to_owned()
        }
        None => {
            strip(&compile::program("lb-userspace", "nohop")?, &nohop)?;
            dist::package_of(&nohop, version, &folder.join("new"))?
        }
    };
    // The same binary: what is tried is the upgrade, not what that version did.
    let old = dist::package_of(&nohop, OLD_VERSION, &folder.join("old"))?;
    for deb in [&old, &new] {
        fs::copy(deb, packages.join(deb.file_name().context("a package has a name")?))?;
    }
    fs::write(packages.join("guest.sh"), include_str!("machine/guest.sh"))?;
    fs::write(packages.join("image.sh"), include_str!("machine/image.sh"))?;
    let mut unshare = Command::new("unshare");
    unshare.args(["--mount", "--pid", "--fork", "--mount-proc", "--net", "chroot"]).arg(&image);
    process::output(unshare.args(["/bin/sh", "/packages/image.sh", OLD_VERSION, version]))?;

    let mut archive = Archive::default();
    archive.add_program("bin/busybox", &process::find("busybox").context("setup installs it")?)?;
    archive.add_modules(&kernel.modules, &["overlay"])?;
    archive.add_script("init", INIT.to_owned());
    let initrd = folder.join("initrd");
    archive.write(&initrd)?;
    // The kernel reads one archive after the other.
    let mut pack = Command::new("sh");
    pack.args(["-ec", "cd \"$0\" && find image | cpio --quiet -o -H newc >> \"$1\""]);
    process::output(pack.arg(&tree).arg(&initrd))?;
    fs::remove_dir_all(&tree)?;
    Ok(initrd)
}

/// Most of a build for tests is for debuggers.
fn strip(from: &Path, to: &Path) -> Result<()> {
    let mut strip = Command::new("strip");
    process::output(strip.args(["--strip-debug", "-o"]).arg(to).arg(from)).map(drop)
}

/// Runs the machine to its end, and gives each line of its checks to `on_line`. What its console has and its
/// journal lie in `folder` then.
fn boot_machine(
    kernel: &Kernel,
    initrd: &Path,
    folder: &Path,
    has_shell: bool,
    mut on_line: impl FnMut(&str),
) -> Result<()> {
    let shell = if has_shell { " nohop.shell" } else { "" };
    let parameters = format!("systemd.show_status=true{shell}");
    let mut qemu = boot::qemu(kernel, initrd, LIMIT_SECONDS, "2G", &parameters);
    for (device, file) in
        [("file:", Some("console.txt")), ("stdio", None), ("file:", Some("journal.txt"))]
    {
        let to = file.map(|file| folder.join(file).display().to_string()).unwrap_or_default();
        qemu.args(["-serial", &format!("{device}{to}")]);
    }
    if has_shell {
        let socket = folder.join("shell");
        println!("a shell: socat -,raw,echo=0 UNIX-CONNECT:{}", socket.display());
        qemu.args(["-serial", &format!("unix:{},server=on,wait=off", socket.display())]);
    }
    qemu.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut machine = qemu.spawn().context("can't run `timeout qemu-system-x86_64`")?;
    let lines = machine.stdout.take().context("the machine has no serial line")?;
    for line in BufReader::new(lines).split(b'\n') {
        let line = line.context("can't read the machine's serial line")?;
        on_line(String::from_utf8_lossy(&line).trim_end_matches('\r'));
    }
    let ended = machine.wait().context("can't wait for the machine")?;
    if !ended.success() {
        bail!(
            "the machine didn't end by itself ({ended}): see {}",
            folder.join("console.txt").display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_checks() {
        let result = |name: &str, reason: Option<&str>| {
            Some(CheckResult { name: name.to_owned(), reason: reason.map(str::to_owned) })
        };
        let table = [
            ("PASS curl by name", result("curl by name", None)),
            ("FAIL curl by name: it's: gone", result("curl by name", Some("it's: gone"))),
            ("NOTE PASS", None),
            ("END", None),
        ];
        for (line, expected) in table {
            assert_eq!(CheckResult::parse(line), expected, "{line}");
        }
    }

    /// The machine tries each command of the README's installation as it stands there.
    #[test]
    fn commands_are_the_readmes() {
        let readme = fs::read_to_string(repository::root().join("README.md")).unwrap();
        let section =
            readme.split("\n## ").find(|section| section.starts_with("Install\n")).unwrap();
        let guest = include_str!("machine/guest.sh");
        let commands: Vec<_> =
            guest.split("readme \"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
        assert!(commands.len() >= 5, "{commands:?}");
        for command in commands.into_iter().filter(|command| *command != "$1") {
            assert!(section.contains(command), "the README doesn't have {command}");
        }
    }
}
