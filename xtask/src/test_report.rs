//! The results of each phase of the tests, added up.

use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, anyhow};

use crate::process;
use crate::vm::verifier;

/// The results of all phases.
#[derive(Default)]
pub struct Tally {
    pub passed: u64,
    pub failed: u64,
    pub skipped: u64,
    /// The phases that failed.
    pub failures: Vec<String>,
    /// What the in-kernel tests reported about the verifier.
    pub verified: verifier::Table,
}

impl Tally {
    /// A check has no tests of its own: it counts as one.
    pub fn check(&mut self, name: &str, check: impl FnOnce() -> Result<()>) {
        println!("\n== {name}");
        match check() {
            Ok(()) => self.passed += 1,
            Err(error) => self.fail(name, &error),
        }
    }

    /// A check that is a command.
    pub fn command(&mut self, name: &str, command: &mut Command) {
        self.check(name, || process::stream(command));
    }

    /// Runs tests with cargo.
    pub fn tests(&mut self, name: &str, command: &mut Command) {
        self.phase(name, |on_line| lines(command, on_line));
    }

    /// `run` runs tests, passes every line of their output on, and returns whether they succeeded.
    pub fn phase(&mut self, name: &str, run: impl FnOnce(&mut dyn FnMut(&str)) -> Result<bool>) {
        println!("\n== {name}");
        let failed_before = self.failed;
        let mut has_result = false;
        let result = run(&mut |line| has_result |= self.read(line));
        match result {
            Ok(true) if has_result => {}
            Ok(true) => self.fail(name, &anyhow!("it ended without a `test result:`")),
            // A test that failed stands for the phase; what doesn't build is one failure.
            Ok(false) if self.failed > failed_before => self.failures.push(name.to_owned()),
            Ok(false) => self.fail(name, &anyhow!("it failed")),
            Err(error) => self.fail(name, &error),
        }
    }

    /// Adds up a test runner's line; returns whether it was a result line.
    fn read(&mut self, line: &str) -> bool {
        self.verified.read(line);
        let result = parse_result(line);
        if let Some([passed, failed, skipped]) = result {
            self.passed += passed;
            self.failed += failed;
            self.skipped += skipped;
        }
        result.is_some()
    }

    pub fn fail(&mut self, name: &str, error: &anyhow::Error) {
        eprintln!("error: {error:#}");
        self.failed += 1;
        self.failures.push(name.to_owned());
    }

    /// Something that can't run on this machine, and why. CI installs all that tests need, so there
    /// it is a failure.
    pub fn skip(&mut self, name: &str, why: &str) {
        if std::env::var_os("CI").is_some_and(|value| value == "true") {
            self.fail(name, &anyhow!("CI can't skip this: {why}"));
            return;
        }
        self.skip_offline(name, why);
    }

    /// Something for which this network has no way to another host, CI's included.
    pub fn skip_offline(&mut self, name: &str, why: &str) {
        println!("\n== {name}: skipped: {why}");
        self.skipped += 1;
    }

    /// The last line, with all counts.
    pub fn finish(&self) -> ExitCode {
        if !self.failures.is_empty() {
            println!("\nfailed: {}", self.failures.join(", "));
        }
        println!("{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped);
        if self.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// Runs `command`, shows what it writes and gives each line to `on_line`; returns whether it
/// succeeded.
fn lines(command: &mut Command, on_line: &mut dyn FnMut(&str)) -> Result<bool> {
    let mut child = command.stdout(Stdio::piped()).spawn().context("can't run cargo")?;
    let stdout = child.stdout.take().context("cargo has no standard output")?;
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line.context("can't read what the tests write")?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        on_line(&line);
    }
    Ok(child.wait()?.success())
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
