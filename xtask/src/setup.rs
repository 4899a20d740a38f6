//! Takes a bare machine to one that builds and tests. Each step looks before it acts, so running
//! it again is cheap and changes nothing.

mod apt;
mod consul;
pub mod deny;
mod envoy;
pub mod fuzz;
pub mod kernels;
mod linker;
mod rust;
mod system;
pub mod toolchain;
mod unpacked;
mod wheel;

use std::env;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

pub const AFTER_HELP: &str = "\
Looked at first:
  NOHOP_NIGHTLY   rustup's name of the nightly compiler; `nightly` where it is unset
  NOHOP_RUST_SRC  the standard library's source for the nightly: a rust-src tarball, or a folder
                  that holds one, or that holds library/
  NOHOP_CONSUL    a consul binary, a .deb of it, or a folder that holds one of the two
  NOHOP_KERNELS   a folder of VERSION/vmlinuz and VERSION/modules/";

/// What a machine is prepared for. Each needs what those before it need, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Purpose {
    /// To build the object and the binary.
    Build,
    /// To run the demo.
    Demo,
    /// To run the tests, which also need other programs' clients and servers.
    Test,
}

/// Provides everything that `purpose` needs, and nothing else.
///
/// # Errors
/// When something can't be had: the error lists all of it, each with the way to get it.
pub fn run(purpose: Purpose) -> Result<()> {
    let mut missing = Vec::new();
    let mut step = |name: &str, result: Result<String>, took: Duration| match result {
        Ok(found) if took < Duration::from_secs(1) => println!("ok: {name}: {found}"),
        Ok(found) => println!("ok: {name}: {found} ({:.0} s)", took.as_secs_f64()),
        Err(error) => {
            println!("missing: {name}");
            missing.push(format!("{name}: {error:#}"));
        }
    };
    let mut timed = |name: &str, act: &dyn Fn() -> Result<String>| {
        let start = Instant::now();
        let result = act();
        step(name, result, start.elapsed());
    };

    timed("system packages", &|| system::provide(purpose));
    match rust::Nightly::find() {
        Ok(nightly) => {
            timed("rust-src", &|| rust::provide_source(&nightly));
            timed("bpf-linker", &|| linker::provide(&nightly));
        }
        Err(error) => timed("nightly compiler", &|| bail!("{error:#}")),
    }
    if purpose >= Purpose::Demo {
        timed("consul", &consul::provide);
    }
    if purpose >= Purpose::Test {
        let (clients, left_out) = system::provide_clients();
        println!("ok: clients that a few scenarios need: {clients}");
        for program in unpacked::ALL {
            let name = program.name;
            match program.provide() {
                Ok(found) => println!("ok: {name}: {found}"),
                Err(error) => println!("skipped: {name}, and its scenario: {error:#}"),
            }
        }
        for reason in left_out {
            println!("skipped: the scenarios that need it: {reason}");
        }
        if let Some(folder) = env::var_os("NOHOP_KERNELS") {
            timed("kernels", &|| kernels::look(Path::new(&folder)));
        }
    }

    if missing.is_empty() {
        println!("ready");
        return Ok(());
    }
    bail!("not ready; what is missing, and how to get it:\n- {}", missing.join("\n- "));
}

/// Provides what VMs need beside that.
///
/// # Errors
/// When something can't be had, with the way to get it.
pub fn run_for_vms() -> Result<()> {
    println!("ok: VMs: {}", system::provide_for_vms()?);
    Ok(())
}

/// Provides what the benchmarks need beside that.
///
/// # Errors
/// When something can't be had, with the way to get it.
pub fn run_for_bench() -> Result<()> {
    println!("ok: benchmarks: {}", system::provide_for_bench()?);
    match envoy::provide() {
        Ok(found) => println!("ok: Envoy: {found}"),
        Err(error) => println!("left out: Envoy, which the benchmarks list as absent: {error:#}"),
    }
    Ok(())
}

/// Adds to an error what it stopped and how to fix it.
fn with_fix<T>(result: Result<T>, stopped: &str, fix: &str) -> Result<T> {
    result.map_err(|error| anyhow!("{stopped}: {error:#}\n  to fix it: {fix}"))
}

/// Says what a step that takes a while is about to do.
fn announce(what: &str) {
    println!("..: {what}");
}

/// The folder of what setup builds and unpacks, shared by all working copies.
fn cache_dir() -> Result<PathBuf> {
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let caches = match absolute("XDG_CACHE_HOME") {
        Some(caches) => caches,
        None => absolute("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?.join(".cache"),
    };
    let dir = caches.join("nohop");
    fs::create_dir_all(&dir).with_context(|| format!("can't create {}", dir.display()))?;
    Ok(dir)
}

/// Makes `.tools/NAME` point at `target`, in one step, and leaves it alone when it already does:
/// cargo would build the object anew for a link that is newer.
fn link_tool(name: &str, target: &Path) -> Result<()> {
    let tools = crate::root().join(".tools");
    let link = tools.join(name);
    if fs::read_link(&link).is_ok_and(|current| current == target) {
        return Ok(());
    }
    let fresh = tools.join(format!(".{name}.{}", std::process::id()));
    fs::create_dir_all(&tools)
        .and_then(|()| symlink(target, &fresh))
        .and_then(|()| fs::rename(&fresh, &link))
        .with_context(|| format!("can't link {} to {}", link.display(), target.display()))
}

/// A folder that is filled beside its final place, so that a half-filled one is never seen there.
/// Removed on drop.
struct Draft(PathBuf);

impl Draft {
    /// An empty folder beside `place`.
    fn beside(place: &Path) -> Result<Self> {
        let name = place.file_name().unwrap_or_default().to_string_lossy();
        let dir = place.with_file_name(format!(".{name}.{}", std::process::id()));
        fs::create_dir_all(&dir).with_context(|| format!("can't create {}", dir.display()))?;
        Ok(Self(dir))
    }

    /// Moves `what`, a path inside the draft, to `place`, over what may lie there.
    fn publish(&self, what: &Path, place: &Path) -> Result<()> {
        if place.exists() {
            let old = self.0.join(".old");
            fs::rename(place, &old)
                .with_context(|| format!("can't move {} away", place.display()))?;
        }
        fs::rename(what, place).with_context(|| format!("can't put {} in place", place.display()))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // What can't be removed now lies under a dot and harms nobody.
        let _ = fs::remove_dir_all(&self.0);
    }
}
