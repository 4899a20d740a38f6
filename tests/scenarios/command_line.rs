//! The command line as people and scripts use it: columns, colours at a terminal alone, services that
//! are followed, the version, the log's level, and an archive for a bug report that has no secret in it.

use std::fs;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::cmd;
use testbed::nohop::Nohop;
use testbed::process::Process;
use testbed::tempdir::TempDir;
use testbed::terminal::Terminal;

use crate::cluster::Cluster;

/// Of the environment, of a file and of URLs: none may be in the archive.
const SECRETS: [&str; 5] = [
    "b1gs-token-of-the-environment",
    "t0ken-of-a-file",
    "pa55word-of-a-proxy",
    "pa55word-of-a-url",
    "n0mad-token",
];

pub fn run() -> Result<()> {
    let cluster = Cluster::new(2)?;
    let nohop = &cluster.nohop;
    columns(nohop)?;
    colours(nohop)?;
    selected(nohop)?;
    followed(nohop)?;
    unread(nohop)?;
    failing(nohop)?;
    let version: Value = serde_json::from_str(&stdout(nohop, "version --json")?)?;
    let crc32 = version["objects"]["connect"].as_str().context("the object of `connect`")?;
    ensure!(crc32.len() == 8 && stdout(nohop, "version")?.contains(crc32), "{version:#}");
    logged(&cluster)?;
    archived(nohop)
}

fn stdout(nohop: &Nohop, arguments: &str) -> Result<String> {
    let output = nohop.cli(arguments)?;
    ensure!(output.status.success(), "nohop {arguments}: {output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

/// Each column of the backends begins at one place.
fn columns(nohop: &Nohop) -> Result<()> {
    let text = stdout(nohop, "services")?;
    let backends: Vec<&str> = text.lines().filter(|line| line.starts_with("  ")).collect();
    ensure!(backends.len() == 2, "{text}");
    for column in ["weight ", "connects ", "in flight "] {
        let places: Vec<_> = backends.iter().map(|line| line.find(column)).collect();
        ensure!(places[0].is_some() && places[0] == places[1], "{column}:\n{text}");
    }
    Ok(())
}

fn colours(nohop: &Nohop) -> Result<()> {
    for (arguments, no_color, is_coloured) in [
        ("services", "", true),
        ("explain helloworld", "", true),
        ("status", "", true),
        ("status", "1", false),
        ("status --color never", "", false),
        ("status --color always", "1", true),
    ] {
        let mut command = nohop.command(arguments)?;
        command.env("NO_COLOR", no_color);
        let mut terminal = Terminal::spawn(&command)?;
        let (status, screen) = terminal.wait_for_exit()?;
        ensure!(status.success(), "{arguments}: {status}: {}", screen.contents());
        ensure!(terminal.has_colour() == is_coloured, "{arguments}, NO_COLOR={no_color}");
    }
    ensure!(!stdout(nohop, "status")?.contains('\u{1b}'), "colours in a pipe");
    ensure!(stdout(nohop, "status --color always")?.contains("\u{1b}[32mready"), "no colours");
    Ok(())
}

fn selected(nohop: &Nohop) -> Result<()> {
    for (arguments, is_listed) in [
        ("services world", true),
        ("services hello*", true),
        ("services world*", false),
        ("services --state healthy", true),
        ("services --state ejected", false),
    ] {
        let text = stdout(nohop, arguments)?;
        ensure!(text.contains("helloworld-0") == is_listed, "{arguments}:\n{text}");
        ensure!(is_listed || text == "none of 1 service matches\n", "{arguments}:\n{text}");
    }
    let unknown = nohop.cli("services --state broken")?;
    ensure!(unknown.status.code() == Some(2), "{unknown:?}");
    Ok(())
}

fn followed(nohop: &Nohop) -> Result<()> {
    let watch = Process::spawn("nohop services -w", nohop.command("services -w hello*")?)?;
    let documents = Process::spawn("nohop services", nohop.command("services --watch --json")?)?;
    watch.wait_for_line(&["healthy "])?;
    documents.wait_for_line(&["{\"services\":[{"])?;
    stdout(nohop, "drain helloworld-0")?;
    watch.wait_for_line(&["draining "])?;
    documents.wait_for_line(&["\"state\":\"draining\""])?;
    stdout(nohop, "undrain helloworld-0")?;
    Ok(())
}

/// A reader that has seen enough ends each command, quietly, and those that wait, too.
fn unread(nohop: &Nohop) -> Result<()> {
    for (arguments, n_lines) in [
        ("services -w", 1),
        ("trace", 0),
        ("status", 1),
        ("explain helloworld", 0),
        ("top --json", 0),
        ("dns query helloworld", 0),
        ("unload --bpffs /sys/fs/bpf/nohop-of-no-one", 0),
    ] {
        let command = nohop.command(arguments)?;
        let mut shell = Command::new("bash");
        shell.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let script = format!("\"$@\" | head -n {n_lines}; echo it ends with ${{PIPESTATUS[0]}}");
        shell.args(["-c", &script, "bash"]).arg(command.get_program()).args(command.get_args());
        let shell = Process::spawn(arguments, shell)?;
        shell.wait_for_line(&["it ends with 0"])?;
        ensure!(shell.n_lines_with("panicked") == 0, "{}", shell.tail());
    }
    Ok(())
}

/// With `--json` there is a document, also where there is no result.
fn failing(nohop: &Nohop) -> Result<()> {
    for (arguments, code, expected) in [
        ("status --json --admin unix:/nowhere", 1, "no daemon answers at unix:/nowhere"),
        ("trace --json --admin unix:/nowhere", 1, "no daemon answers"),
        ("drain nothing --json --admin nonsense", 2, "--admin: 'nonsense' isn't an address"),
        ("config show --json --config /", 2, "/: "),
        ("config migrate --json /nowhere", 2, "can't read /nowhere: No such file"),
    ] {
        let output = nohop.cli(arguments)?;
        let document: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("nohop {arguments}: {output:?}"))?;
        let error = document["error"].as_str().context("no error")?;
        ensure!(output.status.code() == Some(code) && error.contains(expected), "{output:?}");
    }
    Ok(())
}

/// The level can be changed, and queries and requests are logged where that is switched on.
fn logged(cluster: &Cluster) -> Result<()> {
    let nohop = &cluster.nohop;
    let wrong = nohop.cli("log louder")?;
    let error = String::from_utf8_lossy(&wrong.stderr).into_owned();
    ensure!(wrong.status.code() == Some(2) && error.contains("write a level"), "{wrong:?}");
    ensure!(stdout(nohop, "log debug")? == "debug\n" && stdout(nohop, "log")? == "debug\n");
    nohop.process.wait_for_line(&["the log's filter is debug from now on"])?;
    nohop.configure("dns.log = true\ndns.kernel = false\nadmin.access_log = true")?;
    stdout(nohop, "reload")?;
    cluster.nodes.dig("+short helloworld.service")?;
    nohop.process.wait_for_line(&[
        "query client=127.0.0.1 transport=udp name=helloworld.service. kind=A rcode=NOERROR",
    ])?;
    stdout(nohop, "services")?;
    nohop
        .process
        .wait_for_line(&["request client=unix method=GET path=/v1/services status=200"])?;
    Ok(())
}

fn archived(nohop: &Nohop) -> Result<()> {
    let dir = TempDir::new("debug")?;
    let [token, valid, invalid] =
        ["token", "valid.toml", "invalid.toml"].map(|it| dir.path().join(it));
    fs::write(&token, format!("{}\n", SECRETS[1]))?;
    fs::write(&valid, format!("consul.token_file = {token:?}\ndns.listen = ['127.0.0.1:1053']\n"))?;
    fs::write(&invalid, format!("consul.address = 'http://me:{}@127.0.0.1:8500'\n", SECRETS[3]))?;
    for (config, has_settings) in [(valid, true), (invalid, false)] {
        let file = config.with_extension("tar");
        let arguments = format!("debug {} --config {} --json", file.display(), config.display());
        let mut command = nohop.command(&arguments)?;
        command.env("CONSUL_HTTP_TOKEN", SECRETS[0]).env("NOMAD_TOKEN", SECRETS[4]);
        command.env("CONSUL_HTTP_AUTH", format!("proxy:{}", SECRETS[2]));
        if has_settings {
            command.env_remove("CONSUL_HTTP_TOKEN");
        }
        let output: Output = cmd::output(command)?;
        ensure!(output.status.success(), "{output:?}");
        let report: Value = serde_json::from_slice(&output.stdout)?;
        let unpacked = config.with_extension("d");
        fs::create_dir(&unpacked)?;
        cmd::words("tar", &format!("-xf {} -C {}", file.display(), unpacked.display()))?;
        let mut names = Vec::new();
        for entry in fs::read_dir(unpacked.join("nohop-debug"))? {
            let path = entry?.path();
            let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            for secret in SECRETS {
                ensure!(!text.contains(secret), "{secret} is in {}", path.display());
            }
            names.push(path.file_name().unwrap_or_default().to_string_lossy().into_owned());
        }
        for expected in [
            "status.json",
            "services.json",
            "drain.json",
            "metrics.txt",
            "check.json",
            "version.json",
            "kernel.txt",
            "process.txt",
            "pins.txt",
            "bpftool.txt",
        ] {
            ensure!(names.iter().any(|name| name == expected), "no {expected}: {report:#}");
        }
        ensure!(names.iter().any(|name| name == "config.json") == has_settings, "{report:#}");
        let again = nohop.cli(&format!("debug {}", file.display()))?;
        ensure!(again.status.code() == Some(1), "a file is replaced: {again:?}");
    }
    Ok(())
}
