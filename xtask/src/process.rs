//! Other programs: where they are, what they print, with whose rights they run.

use std::env;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Runs `command` to its end and returns its standard output.
///
/// # Errors
/// When it can't be started or fails; the error ends with the last lines it wrote.
pub fn output(command: &mut Command) -> Result<String> {
    let shown = shown(command);
    // A backtrace would push the program's own message out of the lines kept.
    command.stdin(Stdio::null()).env_remove("RUST_BACKTRACE");
    let output = command.output().with_context(|| format!("can't run `{shown}`"))?;
    if !output.status.success() {
        let printed = [output.stdout, output.stderr].concat();
        let printed = String::from_utf8_lossy(&printed);
        let lines: Vec<_> = printed.lines().filter(|line| !line.trim().is_empty()).collect();
        let tail = lines[lines.len().saturating_sub(5)..].join("\n    ");
        bail!("`{shown}` failed ({}):\n    {tail}", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs `command` to its end; its output goes where this program's goes.
///
/// # Errors
/// When it can't be started or fails.
pub fn stream(command: &mut Command) -> Result<()> {
    let shown = shown(command);
    let status = command.status().with_context(|| format!("can't run `{shown}`"))?;
    if !status.success() {
        bail!("`{shown}` failed ({status})");
    }
    Ok(())
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Where the program `name` is; the folders of the system's own tools count also for a user whose
/// PATH lacks them.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    env::split_paths(&path)
        .chain(system)
        .map(|folder| folder.join(name))
        .find(|file| is_executable(file))
}

/// Whether `file` is a file that someone may execute.
pub fn is_executable(file: &Path) -> bool {
    fs::metadata(file).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Whether this process runs as root.
pub fn is_root() -> bool {
    // The kernel gives a process's folder the effective user as its owner.
    fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0)
}
