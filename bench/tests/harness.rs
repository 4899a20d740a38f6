//! The harness as a user meets it: what it refuses before any work, what an interrupted run leaves
//! behind, and what a whole one writes. It needs root, wrk and nginx.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, ExitCode, Output};

use anyhow::{Context, Result, ensure};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use rustix::process::Signal;
use serde_json::Value;
use testbed::process::Process;
use testbed::tempdir::TempDir;
use testbed::{cleanup, cmd, process};

const HARNESS: &str = env!("CARGO_BIN_EXE_nohop-bench");

type Scenario = fn() -> Result<()>;

/// The scenarios, each with the programs that it needs.
const SCENARIOS: &[(&str, &[&str], Scenario)] = &[
    ("without_root", &["setpriv"], without_root),
    ("one_processor", &["taskset"], one_processor),
    ("an_unknown_suite", &[], an_unknown_suite),
    ("a_tool_is_missing", &[], a_tool_is_missing),
    (
        "an_edge_without_packets",
        &["chrt", "ethtool", "haproxy", "nft", "nginx", "wrk"],
        an_edge_without_packets,
    ),
    ("reports_cannot_be_written", &["wrk", "nginx"], reports_cannot_be_written),
    ("interrupted", &["wrk", "nginx"], interrupted),
    ("checks_itself", &["wrk", "nginx"], checks_itself),
    ("compares_with_no_nohop", &["bpftool", "dnsperf"], compares_with_no_nohop),
    ("a_bigger_binary_is_worse", &["bpftool", "dnsperf"], a_bigger_binary_is_worse),
];

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // One at a time: they look at what others leave behind.
    arguments.test_threads = Some(1);
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        eprintln!("The harness's tests are ignored: needs root: run `cargo xtask test`");
    }
    if let Err(error) = cleanup::on_signals() {
        eprintln!("Can't handle signals: {error}");
        return ExitCode::FAILURE;
    }
    let trials = SCENARIOS.iter().map(|&(name, programs, scenario)| {
        Trial::ignorable_test(name, move || run(programs, scenario)).with_ignored_flag(!is_root)
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

fn run(programs: &[&str], scenario: Scenario) -> Result<Completion, Failed> {
    let absent = programs.iter().find_map(|program| lb_bench::peers::find(program).err());
    if let Some(absent) = absent {
        return cmd::skip(&absent.to_string());
    }
    scenario()
        .map_err(|error| Failed::from(format!("{error:?}\n{}", process::failure_output())))?;
    Ok(Completion::Completed)
}

/// Runs it to its end, which is to be `code`; the output has to contain these.
fn refuses(mut command: Command, code: i32, texts: &[&str]) -> Result<()> {
    let Output { status, stdout, stderr } = command.output().context("start the harness")?;
    let text = String::from_utf8_lossy(&[stdout, stderr].concat()).into_owned();
    ensure!(status.code() == Some(code), "{status} instead of {code}: {text}");
    for part in texts {
        ensure!(text.contains(part), "the output lacks {part:?}: {text}");
    }
    Ok(())
}

fn without_root() -> Result<()> {
    // Where anybody may execute it.
    let tempdir = TempDir::new("harness")?;
    let copy = tempdir.path().join("nohop-bench");
    fs::copy(HARNESS, &copy)?;
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(copy);
    refuses(command, 1, &["needs root", "sudo -E"])
}

fn one_processor() -> Result<()> {
    let mut command = Command::new("taskset");
    command.args(["-c", "0", HARNESS, "check"]);
    refuses(command, 1, &["only one processor"])
}

fn an_unknown_suite() -> Result<()> {
    let mut command = Command::new(HARNESS);
    command.arg("htpt");
    refuses(command, 2, &["htpt", "http"])
}

fn a_tool_is_missing() -> Result<()> {
    let tempdir = TempDir::new("path")?;
    let mut command = Command::new(HARNESS);
    command.arg("http").env("PATH", tempdir.path());
    refuses(command, 1, &["not installed: ", "wrk"])
}

fn an_edge_without_packets() -> Result<()> {
    let tempdir = TempDir::new("results")?;
    let mut command = Command::new(HARNESS);
    command.args(["edge", "--quick", "--out"]).arg(tempdir.path()).env_remove("NOHOP_TRAFFIC");
    refuses(command, 1, &["edge failed: NOHOP_TRAFFIC isn't set", "`cargo xtask bench edge`"])
}

fn reports_cannot_be_written() -> Result<()> {
    let mut command = Command::new(HARNESS);
    command.args(["check", "--out", "/proc/nowhere"]);
    refuses(command, 1, &["/proc/nowhere", "--out"])
}

fn interrupted() -> Result<()> {
    const CONNTRACK: &str = "/proc/sys/net/netfilter/nf_conntrack_max";
    let before = fs::read_to_string(CONNTRACK).ok();
    let tempdir = TempDir::new("results")?;
    let mut command = Command::new(HARNESS);
    command.args(["check", "--quick", "--out"]).arg(tempdir.path());
    let harness = Process::spawn("nohop-bench", command)?;
    let pid = harness.pid();
    harness.wait_for_line(&["check 1/"])?;
    harness.signal(Signal::INT)?;
    let status = harness.wait_for_exit()?;
    ensure!(status.code() == Some(128 + 2), "{status}");

    let mark = format!("nohop-{}-", pid.as_raw_nonzero());
    let mounts = fs::read_to_string("/proc/mounts")?;
    let cgroups = mounts.lines().filter(|line| line.split(' ').nth(2) == Some("cgroup2"));
    let cgroups = cgroups.filter_map(|line| line.split(' ').nth(1)).map(Path::new);
    let temporary = std::env::temp_dir();
    for dir in cgroups.chain([Path::new("/run/netns"), &temporary]) {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            ensure!(!name.to_string_lossy().starts_with(&mark), "left behind: {entry:?}");
        }
    }
    // Whatever it started has its files below a folder of that name.
    let mut ps = Command::new("ps");
    ps.args(["-eo", "args"]);
    let running = cmd::stdout(ps)?;
    let left = running.lines().find(|line| line.contains(&mark));
    ensure!(left.is_none(), "left running: {left:?}");
    ensure!(!mounts.contains(&mark), "left mounted: {mounts}");
    ensure!(fs::read_to_string(CONNTRACK).ok() == before, "{CONNTRACK} isn't as before");
    Ok(())
}

/// That the check runs and tells, and fails the run where it doesn't pass; whether it does depends on the
/// machine, so that is no test.
fn checks_itself() -> Result<()> {
    let tempdir = TempDir::new("results")?;
    let mut command = Command::new(HARNESS);
    command.args(["check", "--quick", "--out"]).arg(tempdir.path());
    let Output { status, stdout, stderr } = cmd::output(command)?;
    let text = String::from_utf8_lossy(&[stdout, stderr].concat()).into_owned();
    let mut is_passed = false;
    let mut extensions = Vec::new();
    for entry in fs::read_dir(tempdir.path())? {
        let path = entry?.path();
        let extension = path.extension().unwrap_or_default().to_string_lossy().into_owned();
        if extension == "json" {
            let report: Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
            let names = ["direct", "direct again", "delayed"];
            let listed = report["contenders"].as_array().into_iter().flatten();
            let listed: Vec<_> =
                listed.filter_map(|contender| contender["name"].as_str()).collect();
            ensure!(listed == names, "{listed:?}");
            let measured = |goal: &Value| goal["outcome"] != "not_measured";
            let goals = report["goals"].as_array().context("no goals")?;
            ensure!(goals.len() == 4 && goals.iter().all(measured), "{goals:?}");
            is_passed = goals.iter().all(|goal| goal["outcome"] == "reached");
        }
        extensions.push(extension);
    }
    extensions.sort_unstable();
    ensure!(extensions == ["json", "md", "svg", "svg"], "{extensions:?}");
    // The exit code and a sentence tell which it was.
    ensure!(status.success() == is_passed, "{status}: {text}");
    ensure!(text.contains("check failed: ") != is_passed, "{text}");
    Ok(())
}

fn compares_with_no_nohop() -> Result<()> {
    for (new, text) in [("/nonexistent", "find /nonexistent"), ("/bin/false", "isn't a nohop")] {
        let mut command = Command::new(HARNESS);
        let tempdir = TempDir::new("results")?;
        command.arg("compare").arg(cmd::built("nohop")?).arg(new);
        command.arg("--out").arg(tempdir.path());
        refuses(command, 1, &[text])?;
    }
    Ok(())
}

/// Of two binaries, one of which makes bigger maps, which no load of the machine hides: it is worse in
/// both passes.
fn a_bigger_binary_is_worse() -> Result<()> {
    let tempdir = TempDir::new("results")?;
    let (nohop, bigger) = (cmd::built("nohop")?, tempdir.path().join("bigger"));
    let script = format!(
        "#!/bin/sh\n[ \"$1\" != run ] || echo 'datapath.max_backends = 262144' >> \"$3\"\nexec {} \"$@\"\n",
        nohop.display()
    );
    fs::write(&bigger, script)?;
    fs::set_permissions(&bigger, fs::Permissions::from_mode(0o755))?;
    let compare = |old: &Path, new: &Path| {
        let mut command = Command::new(HARNESS);
        command.arg("compare").arg(old).arg(new).args(["--suite", "scale", "--rounds", "6"]);
        command.args(["--services", "20", "--seed", "3", "--out"]).arg(tempdir.path());
        command
    };
    refuses(compare(&nohop, &bigger), 1, &["kernel memory of the maps", "WORSE; at first"])?;
    let report = fs::read_dir(tempdir.path())?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "json"))
        .context("no JSON was written")?;
    let report: Value = serde_json::from_str(&fs::read_to_string(report)?)?;
    let verdict = |name: &str| {
        let quantities = report["quantities"].as_array().into_iter().flatten();
        let found = quantities.into_iter().find(|quantity| quantity["name"] == name);
        found.map(|quantity| quantity["verdict"].clone()).with_context(|| format!("no {name}"))
    };
    let maps = verdict("kernel memory of the maps, 20 services")?;
    ensure!(maps == "worse", "{maps}");
    ensure!(report["seed"] == 3, "{}", report["seed"]);
    Ok(())
}
