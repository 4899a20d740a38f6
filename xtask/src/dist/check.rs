//! What is tried with the packages: `cargo xtask test --full`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, ensure};

use super::release::{Architecture, Release, release};
use super::{Options, aarch64, image, package};
use crate::process;
use crate::repository;
use crate::setup;
use crate::test_report::Tally;

/// A version whose configuration had other names of keys.
const OLD: &str = "423192f";
const OLD_VERSION: &str = "0.0.1";

/// Of the folder with the packages.
type Check = fn(&Path) -> Result<()>;

/// Each with what it is about.
const CHECKS: [(&str, Check); 11] = [
    ("made", made),
    ("the same bytes from another folder", same_bytes),
    ("sums, and signed with a key", signed),
    ("the binary needs no newer glibc than they declare", glibc),
    ("the static binary runs without the system's files, and resolves names", static_binary),
    ("the image in Docker", image_in_docker),
    ("what viewers of the page cost", page_cost),
    (".deb installed, upgraded and removed", in_a_root),
    (".rpm installed, upgraded and removed", rpm_in_a_root),
    ("made for aarch64", |_| aarch64::made()),
    ("for aarch64: the kernel takes the programs, and a connection arrives", |_| {
        aarch64::connects()
    }),
];

/// Makes the packages and tries them, or only those checks whose name contains `filter`. Returns the .deb.
pub fn run(tally: &mut Tally, filter: Option<&str>) -> Option<PathBuf> {
    let out = repository::root().join("target/dist");
    let mut n_checks = 0;
    for (name, check) in CHECKS {
        if filter.is_none_or(|filter| name.contains(filter)) {
            tally.check(&format!("packages: {name}"), || check(&out));
            n_checks += 1;
        }
    }
    if n_checks == 0 {
        let names = CHECKS.map(|(name, _)| name).join("\n  ");
        tally.fail("packages", &anyhow!("no check's name contains the filter, only\n  {names}"));
    }
    let release = release(&out).ok()?;
    let deb = out.join(format!("nohop_{}_amd64.deb", release.version));
    deb.is_file().then_some(deb)
}

fn made(out: &Path) -> Result<()> {
    super::run(&Options { architectures: vec![Architecture::X86_64], out: out.to_owned() })
}

fn image_in_docker(out: &Path) -> Result<()> {
    let image = image::path(Architecture::X86_64, &release(out)?);
    process::stream(scenario("packaged_image").env("NOHOP_IMAGE", image))
}

/// The limit on their processor time is that of a release build.
fn page_cost(out: &Path) -> Result<()> {
    let binary = staged(out)?.join("usr/bin/nohop");
    process::stream(scenario("page_cost").env("NOHOP_FULL", "1").env("NOHOP_BINARY", binary))
}

fn scenario(name: &str) -> Command {
    let mut test = Command::new("cargo");
    test.args(["test", "--package", "lb-tests", "--test", "scenarios", name]);
    test.current_dir(repository::root());
    test
}

/// The files of the packages.
fn staged(out: &Path) -> Result<PathBuf> {
    Ok(release(out)?.work.join("stage-x86_64"))
}

/// Makes them once more in a clone in another folder.
fn same_bytes(out: &Path) -> Result<()> {
    let folder = other_folder()?;
    let clone = folder.join("a folder with another name");
    let root = repository::root();
    process::output(Command::new("git").args(["clone", "--quiet"]).arg(root).arg(&clone))?;
    process::output(Command::new("cp").arg("-a").arg(root.join(".tools")).arg(&clone))?;
    let other = folder.join("dist");
    let mut dist = Command::new("cargo");
    dist.args(["xtask", "dist", "--out"]).arg(&other).current_dir(&clone);
    process::stream(&mut dist)?;
    let read = |folder: &Path| fs::read_to_string(folder.join("SHA256SUMS"));
    let (here, there) = (read(out)?, read(&other)?);
    ensure!(here == there, "the sums differ:\n{here}\n{there}");
    fs::remove_dir_all(folder)?;
    Ok(())
}

fn other_folder() -> Result<PathBuf> {
    let folder = repository::root().join("target/dist-work/again");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// The sums are those of the files, and who has the public key can tell that the key's owner made them.
fn signed(out: &Path) -> Result<()> {
    let Release { version, work, .. } = release(out)?;
    let mut sums = Command::new("sha256sum");
    process::output(sums.args(["--check", "--strict", "SHA256SUMS"]).current_dir(out))?;
    setup::dist::provide_minisign()?;
    let (public, secret) = (work.join("minisign.pub"), work.join("minisign.key"));
    let mut generate = Command::new("minisign");
    generate.args(["-G", "-f", "-W", "-p"]).arg(&public).arg("-s").arg(&secret);
    process::output(&mut generate)?;
    let file = work.join("SHA256SUMS");
    fs::copy(out.join("SHA256SUMS"), &file)?;
    super::sign(&file, &secret, &version)?;
    let verify = || {
        let mut minisign = Command::new("minisign");
        process::output(minisign.arg("-V").arg("-p").arg(&public).arg("-m").arg(&file))
    };
    let verified = verify()?;
    ensure!(verified.contains(&format!("nohop {version}")), "{verified:?}");
    fs::write(&file, "")?;
    ensure!(verify().is_err(), "another file has the same signature");
    Ok(())
}

/// Which contrib/packages/nfpm.yaml has.
fn glibc(out: &Path) -> Result<()> {
    const NEWEST: (u32, u32) = (2, 34);
    let folder = staged(out)?;
    let mut objdump = Command::new("objdump");
    let symbols = process::output(objdump.arg("-T").arg(folder.join("usr/bin/nohop")))?;
    let version = |symbol: &str| {
        let (major, minor) = symbol.split_once(')')?.0.split_once('.')?;
        Some((major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?))
    };
    let newest = symbols.split("(GLIBC_").skip(1).filter_map(version).max();
    let newest = newest.context("objdump shows no symbol of glibc")?;
    ensure!(newest <= NEWEST, "it needs glibc {newest:?}, the packages declare {NEWEST:?}");
    Ok(())
}

/// The archive's binary needs no file of the system's: it runs in a root of its own that has none.
fn static_binary(out: &Path) -> Result<()> {
    let Release { version, work, .. } = release(out)?;
    let name = format!("nohop-{version}-x86_64-static");
    let folder = work.join("unpacked");
    fs::create_dir_all(&folder)?;
    let archive = out.join(format!("{name}.tar.gz"));
    process::output(Command::new("tar").arg("-xzf").arg(archive).arg("-C").arg(&folder))?;
    let root = folder.join(name);
    let headers = process::output(Command::new("readelf").arg("-hlW").arg(root.join("nohop")))?;
    let is_anywhere = headers.contains("DYN (") && !headers.contains("INTERP");
    ensure!(is_anywhere, "it can't be loaded anywhere, or by an interpreter alone:\n{headers}");
    let printed = process::output(Command::new("chroot").arg(&root).args(["/nohop", "version"]))?;
    ensure!(printed.contains(&version), "it printed {printed:?}");
    resolves_as_musl(&root)
}

/// What docs/operations.md has of musl's resolver. Nobody listens where the names of agents lead.
fn resolves_as_musl(root: &Path) -> Result<()> {
    setup::dist::provide_dnsmasq()?;
    fs::create_dir_all(root.join("etc"))?;
    fs::write(root.join("etc/hosts"), "127.0.0.1 localhost\n127.0.0.9 agent.hosts\n")?;
    // With glibc no name server would be asked,
    fs::write(root.join("etc/nsswitch.conf"), "hosts: files\n")?;
    // or the silent one alone for 30 s.
    let servers = "nameserver 10.9.9.53\nnameserver 127.0.0.1\noptions timeout:30\n";
    fs::write(root.join("etc/resolv.conf"), servers)?;
    for name in ["agent.hosts", "agent.dns"] {
        let mut check = Command::new("unshare");
        check.args(["--net", "--pid", "--fork", "--kill-child", "sh", "-c", CHECK_BY_NAME]);
        let output = check.arg(root).arg(name).output().context("can't run unshare")?;
        let printed = String::from_utf8_lossy(&output.stdout);
        let expected = format!("can't reach Consul at {name}:8500 (Connection refused");
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(printed.contains(&expected), "{expected:?} isn't in:\n{printed}\n{errors}");
    }
    Ok(())
}

/// `nohop check` in the root $0 of an agent whose name is $1, with a name server that is silent and one that isn't.
const CHECK_BY_NAME: &str = r#"set -e
ip link set lo up
ip link add silent type veth peer name peer
ip address add 10.9.9.1/24 dev silent
ip link set silent up
ip link set peer up
ip neighbour add 10.9.9.53 lladdr 02:00:00:00:00:53 dev silent
dnsmasq --conf-file=/dev/null --no-resolv --no-hosts --user=root --pid-file= \
    --bind-interfaces --listen-address=127.0.0.1 --address=/agent.dns/127.0.0.9 --local=/agent.dns/
exec chroot "$0" /nohop check --consul-addr "http://$1:8500"
"#;

/// A Debian of its own in which the packages are installed.
fn in_a_root(out: &Path) -> Result<()> {
    setup::dist::provide_debootstrap()?;
    let release = release(out)?;
    let root = debian(&release.work)?;
    let name = format!("nohop_{}_amd64.deb", release.version);
    fs::copy(out.join(&name), root.join("new.deb"))?;
    fs::copy(old_package(&release)?, root.join("old.deb"))?;
    let script = include_str!("check.sh");
    fs::write(root.join("check.sh"), script)?;
    let mut unshare = Command::new("unshare");
    unshare.args(["--mount", "--pid", "--fork", "--mount-proc", "--net", "chroot"]).arg(&root);
    process::output(unshare.args(["/bin/sh", "/check.sh", OLD_VERSION, &release.version]))
        .map(|printed| print!("{printed}"))
}

/// rpm installs, upgrades and removes in a root that it has no packages of: the dependencies' names are Fedora's.
fn rpm_in_a_root(out: &Path) -> Result<()> {
    setup::dist::provide_rpm()?;
    let release = release(out)?;
    let root = debian(&release.work)?;
    let package = out.join(format!("nohop-{}.x86_64.rpm", release.version));
    let rpm = |arguments: &[&str], package: &Path| {
        let mut unshare = Command::new("unshare");
        unshare.args(["--mount", "--pid", "--fork", "--mount-proc", "--net", "rpm", "--root"]);
        process::output(unshare.arg(&root).args(arguments).arg(package))
    };
    let name = Path::new("nohop");
    let config = root.join("etc/nohop/nohop.toml");
    let printed = rpm(&["--install", "--nodeps"], &package)?;
    let enable = "systemctl enable --now nohop.socket nohop.service";
    ensure!(printed.contains(enable), "it doesn't print how to start it: {printed}");
    rpm(&["--verify", "--nodeps"], name)?;
    ensure!(config.is_file(), "there is no configuration file");
    let completions = root.join("usr/share/zsh/site-functions/_nohop");
    ensure!(completions.is_file(), "zsh has no completions");
    fs::write(&config, "[plane]\nmax_services = 5000\n")?;
    rpm(&["--upgrade", "--force", "--nodeps"], &package)?;
    let migrated = fs::read_to_string(&config)?;
    ensure!(migrated.starts_with("[datapath]\n"), "the upgrade left {migrated:?}");
    rpm(&["--erase"], name)?;
    ensure!(!root.join("usr/bin/nohop").exists(), "the binary is still there");
    ensure!(config.is_file(), "removal took the configuration");
    Ok(())
}

/// Debian's least system, from its mirror; kept for the next time.
fn debian(work: &Path) -> Result<PathBuf> {
    let (kept, root) = (work.join("debian.tar"), work.join("debian"));
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    fs::create_dir_all(&root)?;
    if !kept.exists() {
        let mut debootstrap = Command::new("debootstrap");
        debootstrap.args(["--variant=minbase", "bookworm"]).arg(&root);
        process::output(&mut debootstrap)?;
        process::output(Command::new("tar").arg("-cf").arg(&kept).arg("-C").arg(&root).arg("."))?;
        return Ok(root);
    }
    process::output(Command::new("tar").arg("-xf").arg(&kept).arg("-C").arg(&root))?;
    Ok(root)
}

/// A package of an old version, packed as today.
fn old_package(release: &Release) -> Result<PathBuf> {
    let Release { work, .. } = release;
    let binary = old_binary(work)?;
    let old = Release {
        version: OLD_VERSION.to_owned(),
        epoch: release.epoch.clone(),
        commit: OLD.to_owned(),
        out: work.clone(),
        work: work.join("old-stage"),
    };
    fs::create_dir_all(&old.work)?;
    let files = work.join("files");
    let licenses = release.path(&format!("nohop-{}-licenses.txt", release.version));
    let stage = package::stage(Architecture::X86_64, &binary, &files, &licenses, &old)?;
    fs::write(stage.join("usr/share/nohop/nohop.toml"), "# All keys have their defaults.\n")?;
    package::pack(package::Format::Deb, Architecture::X86_64, &stage, &old)
}

/// Built once: a commit stays as it is.
fn old_binary(work: &Path) -> Result<PathBuf> {
    let binary = work.join(format!("nohop-{OLD}"));
    if binary.is_file() {
        return Ok(binary);
    }
    let clone = work.join("old");
    if !clone.exists() {
        let root = repository::root();
        process::output(Command::new("git").args(["clone", "--quiet"]).arg(root).arg(&clone))?;
        process::output(Command::new("cp").arg("-a").arg(root.join(".tools")).arg(&clone))?;
    }
    let mut checkout = Command::new("git");
    process::output(checkout.args(["checkout", "--quiet", OLD]).current_dir(&clone))
        .with_context(|| format!("the history has no {OLD}: clone the repository as a whole"))?;
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--locked", "--package", "lb-userspace", "--bin", "nohop"]);
    cargo.arg("--target-dir").arg(work.join("build-old"));
    process::stream(cargo.current_dir(&clone))?;
    let built = work.join("build-old/debug/nohop");
    process::output(Command::new("strip").arg("-o").arg(&binary).arg(built))?;
    Ok(binary)
}
