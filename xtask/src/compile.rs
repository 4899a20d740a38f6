//! Builds the kernel object and the binaries, and finds where cargo put them.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::process;
use crate::setup::{self, Purpose, toolchain};

/// The results of a build.
pub struct Built {
    /// The kernel object; the daemon carries a copy.
    pub object: PathBuf,
    /// The daemon.
    pub nohop: PathBuf,
    /// The cluster's other programs.
    pub helpers: Vec<PathBuf>,
}

/// Prepares the machine for `purpose`, then builds.
///
/// # Errors
/// When something isn't there that `purpose` needs, or the build fails.
pub fn build(purpose: Purpose, release: bool) -> Result<Built> {
    setup::run(purpose)?;
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--package", "lb-userspace", "--package", "testbed-load", "--bins"]);
    cargo.args(release.then_some("--release"));

    let mut object = None;
    let mut nohop = None;
    let mut helpers = Vec::new();
    messages(cargo, |message| match message["reason"].as_str() {
        Some("build-script-executed") if package(message) == Some("lb-userspace") => {
            object = message["out_dir"].as_str().map(|dir| Path::new(dir).join("nohop-ebpf"));
        }
        Some("compiler-artifact") => {
            if let Some(executable) = message["executable"].as_str().map(PathBuf::from) {
                match package(message) {
                    Some("lb-userspace") => nohop = Some(executable),
                    _ => helpers.push(executable),
                }
            }
        }
        _ => {}
    })?;
    Ok(Built {
        object: object.context("cargo reported no kernel object")?,
        nohop: nohop.context("cargo reported no binary nohop")?,
        helpers,
    })
}

/// Builds the benchmark harness, the daemon as it ships and all that they need, optimised. Returns
/// the harness.
///
/// # Errors
/// When the build fails.
pub fn harness() -> Result<PathBuf> {
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--release", "--bins"]);
    cargo.args(["lb-userspace", "testbed-load", "lb-bench"].iter().flat_map(|p| ["--package", p]));
    let mut harness = None;
    messages(cargo, |message| {
        if message["target"]["name"] == "nohop-bench" {
            harness = message["executable"].as_str().map(PathBuf::from).or(harness.take());
        }
    })?;
    harness.context("cargo reported no binary nohop-bench")
}

/// Builds an object of lb-ebpf that benchmarks alone load, such as `nohop-measure`.
///
/// # Errors
/// When the build fails.
pub fn bench_object(name: &str) -> Result<PathBuf> {
    bench_object_in(&crate::repository::root().join("target/measure"), name)
}

fn bench_object_in(target: &Path, name: &str) -> Result<PathBuf> {
    let mut cargo = toolchain::command("cargo");
    cargo.args(["build", "--release", "--locked", "--bin", name, "--target-dir"]);
    process::stream(cargo.arg(target).current_dir(crate::repository::root().join("lb-ebpf")))?;
    Ok(target.join("bpfel-unknown-none/release").join(name))
}

/// The benchmark of costs as tests are built.
pub struct CostBench {
    /// Its program.
    pub program: PathBuf,
    /// The object that nohop is compared with.
    pub measure: PathBuf,
}

/// Builds it where the tests and the daemon's objects are built already, whose dependencies it shares.
///
/// # Errors
/// When a build fails.
pub fn cost_bench() -> Result<CostBench> {
    let mut cargo = Command::new("cargo");
    cargo.args(["test", "--no-run", "--workspace", "--bench", "cost"]);
    let (mut program, mut out_dir) = (None, None);
    messages(cargo, |message| match message["reason"].as_str() {
        Some("build-script-executed") if package(message) == Some("lb-userspace") => {
            out_dir = message["out_dir"].as_str().map(PathBuf::from);
        }
        Some("compiler-artifact") if message["target"]["name"] == "cost" => {
            program = message["executable"].as_str().map(PathBuf::from);
        }
        _ => {}
    })?;
    let target = out_dir.context("cargo reported no kernel objects")?.join("object");
    Ok(CostBench {
        program: program.context("cargo reported no benchmark `cost`")?,
        measure: bench_object_in(&target, "nohop-measure")?,
    })
}

/// The in-kernel tests, a program of their own, and the daemon as tests run it.
pub struct KernelTests {
    /// The tests' program.
    pub tests: PathBuf,
    /// The daemon.
    pub nohop: PathBuf,
}

/// Builds the in-kernel tests and the daemon. As a part of the whole workspace, because dependencies
/// that are built for one package alone have fewer features and would be built once more.
///
/// # Errors
/// When the build fails.
pub fn kernel_tests() -> Result<KernelTests> {
    let mut cargo = Command::new("cargo");
    // A test of the daemon's package needs the daemon.
    cargo.args(["test", "--no-run", "--workspace", "--test", "kernel", "--test", "cli"]);
    let mut tests = None;
    let mut nohop = None;
    messages(cargo, |message| {
        let Some(executable) = message["executable"].as_str().map(PathBuf::from) else { return };
        match message["target"]["name"].as_str() {
            Some("kernel") => tests = Some(executable),
            Some("nohop") => nohop = Some(executable),
            _ => {}
        }
    })?;
    Ok(KernelTests {
        tests: tests.context("cargo reported no test `kernel`")?,
        nohop: nohop.context("cargo reported no binary nohop")?,
    })
}

/// Builds a program of a package, as tests run it.
///
/// # Errors
/// When the build fails.
pub fn program(package: &str, name: &str) -> Result<PathBuf> {
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--package", package, "--bin", name]);
    let mut program = None;
    messages(cargo, |message| {
        if message["target"]["name"] == name {
            program = message["executable"].as_str().map(PathBuf::from).or(program.take());
        }
    })?;
    program.with_context(|| format!("cargo reported no binary {name}"))
}

/// Runs a build, and gives each message of cargo's to `read`.
fn messages(mut cargo: Command, mut read: impl FnMut(&Value)) -> Result<()> {
    let mut cargo = cargo
        .arg("--message-format=json-render-diagnostics")
        .current_dir(crate::repository::root())
        .stdout(Stdio::piped())
        .spawn()
        .context("can't run cargo: install it from https://rustup.rs")?;
    let stdout = cargo.stdout.take().context("cargo has no standard output")?;
    for line in BufReader::new(stdout).lines() {
        read(&serde_json::from_str(&line?).context("can't parse cargo's JSON")?);
    }
    if !cargo.wait()?.success() {
        bail!("the build failed: cargo's messages above have the reason");
    }
    Ok(())
}

/// The workspace's package that `message` is about, by the folder its manifest lies in.
fn package(message: &Value) -> Option<&'static str> {
    let id = message["package_id"].as_str()?;
    let path = id.strip_prefix("path+file://")?.split('#').next()?;
    match Path::new(path).strip_prefix(crate::repository::root()).ok()?.to_str()? {
        "lb-userspace" => Some("lb-userspace"),
        "tests" => Some("lb-tests"),
        _ => None,
    }
}
