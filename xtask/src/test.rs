//! Everything that must hold, in one run that goes on past failures and ends with the counts.

use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result};

use crate::process::{self, is_root};

/// Runs the checks and the tests, or only the tests whose name contains `filter`. The last line
/// says how many passed.
pub fn run(filter: Option<&str>) -> ExitCode {
    let mut tally = Tally::default();
    match crate::setup::run() {
        Ok(()) => run_phases(&mut tally, filter),
        Err(error) => {
            eprintln!("error: {error:#}");
            tally.fail("setup");
        }
    }

    if !tally.failures.is_empty() {
        println!("\nfailed: {}", tally.failures.join(", "));
    } else if let (Some(filter), 0) = (filter, tally.passed + tally.skipped) {
        println!("\nno test's name contains {filter:?}");
        tally.failures.push("filter".to_owned());
    }
    println!("{} passed, {} failed, {} skipped", tally.passed, tally.failed, tally.skipped);
    if tally.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run_phases(tally: &mut Tally, filter: Option<&str>) {
    if filter.is_none() {
        let object = ["--manifest-path", "lb-ebpf/Cargo.toml"];
        tally.check("format", &mut cargo(&["fmt", "--all", "--check"]));
        tally.check("format of the object", cargo(&["fmt", "--check"]).args(object));
        let lints = ["--", "--deny", "warnings"];
        let clippy = ["clippy", "--workspace", "--all-targets"];
        tally.check("lints", cargo(&clippy).args(lints));
        lint_object(tally, &lints);
    }

    let tests = ["test", "--workspace", "--no-fail-fast"];
    if is_root() {
        tally.tests("tests", cargo(&tests).args(filter));
        return;
    }
    // Only the scenarios need root; what the others write stays the user's own.
    tally.tests("tests", cargo(&tests).args(["--exclude", "lb-tests"]).args(filter));
    let scenarios = ["test", "--package", "lb-tests", "--no-fail-fast"];
    match runner_variable() {
        Ok(runner) => {
            let mut cargo = cargo(&scenarios);
            tally.tests("scenarios", cargo.args(filter).env(runner, "sudo -E"));
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            tally.fail("scenarios");
        }
    }
}

/// A nightly may come without clippy: that is no failure of this code.
fn lint_object(tally: &mut Tally, lints: &[&str]) {
    if process::output(process::nightly("cargo-clippy").arg("--version")).is_err() {
        println!("\n== lints of the object: left out, the nightly has no clippy");
        println!("(`rustup component add clippy --toolchain nightly` adds it)");
        return;
    }
    let mut clippy = process::nightly("cargo");
    clippy.args(["clippy", "--release", "--locked"]).args(lints);
    tally.check("lints of the object", clippy.current_dir(crate::root().join("lb-ebpf")));
}

fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new("cargo");
    command.args(arguments).current_dir(crate::root());
    command
}

/// The variable that names the program through which cargo runs tests on this machine.
fn runner_variable() -> Result<String> {
    let version = process::output(Command::new("rustc").arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    let host = host.context("`rustc -vV` names no host")?.trim();
    Ok(format!("CARGO_TARGET_{}_RUNNER", host.to_uppercase().replace('-', "_")))
}

#[derive(Default)]
struct Tally {
    passed: u64,
    failed: u64,
    skipped: u64,
    /// The phases that failed.
    failures: Vec<String>,
}

impl Tally {
    /// A check has no tests of its own: it counts only when it fails, as one.
    fn check(&mut self, name: &str, command: &mut Command) {
        println!("\n== {name}");
        if let Err(error) = process::stream(command) {
            eprintln!("error: {error:#}");
            self.fail(name);
        }
    }

    fn tests(&mut self, name: &str, command: &mut Command) {
        println!("\n== {name}");
        let failed_before = self.failed;
        match self.count(command) {
            Ok(true) => {}
            // A test that failed stands for the phase; what doesn't build is one failure.
            Ok(false) if self.failed > failed_before => self.failures.push(name.to_owned()),
            Ok(false) => self.fail(name),
            Err(error) => {
                eprintln!("error: {error:#}");
                self.fail(name);
            }
        }
    }

    /// Runs `command`, shows what it writes and adds up its results; returns whether it succeeded.
    fn count(&mut self, command: &mut Command) -> Result<bool> {
        let mut child = command.stdout(Stdio::piped()).spawn().context("can't run cargo")?;
        let stdout = child.stdout.take().context("cargo has no standard output")?;
        for line in BufReader::new(stdout).split(b'\n') {
            let line = line.context("can't read what the tests write")?;
            let line = String::from_utf8_lossy(&line);
            println!("{line}");
            if let Some([passed, failed, skipped]) = parse_result(&line) {
                self.passed += passed;
                self.failed += failed;
                self.skipped += skipped;
            }
        }
        Ok(child.wait()?.success())
    }

    fn fail(&mut self, name: &str) {
        self.failed += 1;
        self.failures.push(name.to_owned());
    }
}

/// Passed, failed and ignored of a test runner's closing line.
fn parse_result(line: &str) -> Option<[u64; 3]> {
    let (_, counts) = line.split_once("test result: ")?;
    let count = |word: &str| {
        let (before, _) = counts.split_once(word)?;
        before.trim_end().rsplit(' ').next()?.parse().ok()
    };
    Some([count(" passed")?, count(" failed")?, count(" ignored")?])
}

#[cfg(test)]
mod tests {
    use super::parse_result;

    #[test]
    fn results_are_read() {
        let table = [
            (
                "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; \
                 finished in 0.00s",
                Some([12, 0, 1]),
            ),
            (
                "test result: \u{1b}[31mFAILED\u{1b}[m. 1 passed; 2 failed; 0 ignored;",
                Some([1, 2, 0]),
            ),
            ("test results_are_read ... ok", None),
            ("test result: ok.", None),
        ];
        for (line, expected) in table {
            assert_eq!(parse_result(line), expected, "{line}");
        }
    }
}
