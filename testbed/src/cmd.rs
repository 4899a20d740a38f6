//! Running a command to its end, and finding the programs that belong to this build.

use std::path::PathBuf;
use std::process::{Command, Output};

use anyhow::{Context, Result, bail};

/// Where `cargo xtask setup` puts the programs and libraries that it doesn't install.
pub const UNPACKED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../.tools");

/// Runs a command to its end, whatever its exit code.
///
/// # Errors
/// When it can't be started.
pub fn output(mut command: Command) -> Result<Output> {
    command.output().with_context(|| format!("start {command:?}"))
}

/// Runs a command that must succeed, and returns what it wrote to stdout.
///
/// # Errors
/// When it can't be started or fails; the message has what it wrote to stderr.
pub fn stdout(mut command: Command) -> Result<String> {
    let output = command.output().with_context(|| format!("start {command:?}"))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?} failed, {}: {stdout}{stderr}", output.status);
    }
    Ok(stdout)
}

/// Runs `program` with arguments separated by spaces; it must succeed.
///
/// # Errors
/// As [`stdout`].
pub fn words(program: &str, arguments: &str) -> Result<String> {
    let mut command = Command::new(program);
    command.args(arguments.split_whitespace());
    stdout(command)
}

/// The program `name` of this build: next to the running executable, as `cargo build` puts it.
///
/// # Errors
/// When it hasn't been built.
pub fn built(name: &str) -> Result<PathBuf> {
    let executable = std::env::current_exe().context("find the executable that runs")?;
    let found = executable
        .ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file());
    found.with_context(|| {
        format!("there is no `{name}` next to {}: run `cargo build`", executable.display())
    })
}

/// The program `name` of this machine: on PATH, where Debian puts PostgreSQL's, or among those that
/// `cargo xtask setup` unpacks.
///
/// # Errors
/// When it isn't installed.
pub fn installed(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let found = std::env::split_paths(&path)
        .chain(versions.map(|version| version.path().join("bin")))
        .chain([UNPACKED.into()])
        .map(|dir| dir.join(name))
        .find(|path| path.is_file());
    found.with_context(|| format!("{name} isn't installed: `cargo xtask setup` tries to"))
}

/// Whether this is a run of CI, which sets `CI=true`.
pub fn is_ci() -> bool {
    std::env::var_os("CI").is_some_and(|value| value == "true")
}

/// The result of a test that can't run here for this reason: it is counted as skipped, with the
/// reason. In CI it fails instead, because CI installs everything that tests need.
///
/// # Errors
/// In CI.
pub fn skip(reason: &str) -> Result<libtest_mimic::Completion, libtest_mimic::Failed> {
    match is_ci() {
        true => Err(format!("CI can't skip this: {reason}").into()),
        false => Ok(libtest_mimic::Completion::ignored_with(reason)),
    }
}
