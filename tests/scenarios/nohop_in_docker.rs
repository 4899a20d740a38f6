//! The daemon in a container of a real Docker, with what contrib/nomad/nohop-docker.nomad.hcl asks Nomad for: its
//! capabilities, namespaces and volumes, Docker's own seccomp profile. Its pins outlive the container.

use std::fs;
use std::os::unix::fs::symlink;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use testbed::cmd;

use crate::cluster::{Catalog, Nodes};
use crate::docker::Docker;

const JOB: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../contrib/nomad/nohop-docker.nomad.hcl");

/// As the job's configuration has it.
const LISTEN: &str = "169.254.53.53";

/// The daemon that was built beside this test, linked with the libraries of this host.
pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let docker = Docker::start(&nodes)?;
    let root = docker.directory().path().join("root");
    for directory in ["etc", "proc", "run", "sys", "tmp", "usr", "var/lib"] {
        fs::create_dir_all(root.join(directory))?;
    }
    for link in ["lib", "lib64"] {
        symlink(format!("usr/{link}"), root.join(link))?;
    }
    let archive = docker.directory().path().join("root.tar");
    let (archive, root) = (archive.display(), root.display());
    cmd::words("tar", &format!("--create --file {archive} --directory {root} ."))?;
    docker.run(&format!("import {archive} nohop:built"))?;
    let binary = cmd::built("nohop")?;
    let mounts = format!("--volume /usr:/usr:ro --volume {}:/nohop:ro", binary.display());
    serves(&nodes, &docker, &format!("{mounts} --entrypoint /nohop nohop:built"), "/nohop")
}

/// `image` is its name, after options that it needs beside the job's; `program` the daemon in it.
pub fn serves(nodes: &Nodes, docker: &Docker, image: &str, program: &str) -> Result<()> {
    let job = Job::read()?;
    let helloworld = nodes.helloworld("helloworld")?;
    let catalog = Catalog::new(&[("helloworld", &[helloworld.address])])?;
    nodes.client.outside().run("ip", &format!("address add {LISTEN}/32 dev lo"))?;
    let directory = docker.directory().path().display().to_string();
    let file = format!("{directory}/nohop.toml");
    let shared = catalog.directory().display().to_string();
    let command = format!("--volume {shared}:{shared} {image} run");
    let mut options = job.options.replace("local/nohop.toml", &file);
    let fails_with = |option: &str, reason: &str| -> Result<bool> {
        let output = docker.output(&format!("run --rm {option} {image} version"))?;
        Ok(String::from_utf8_lossy(&output.stderr).contains(reason))
    };
    // Debian 12's Docker doesn't know the names; CAP_SYS_ADMIN has what they have (capabilities(7)).
    if fails_with("--cap-add bpf", "unknown capability")? {
        options = options.replace("--cap-add bpf ", "").replace("--cap-add perfmon ", "");
    }
    // Where this machine has no CAP_SYS_RESOURCE.
    const LOCKED: &str = "--ulimit memlock=-1";
    if fails_with(LOCKED, "setting rlimit")? {
        options = options.replace(LOCKED, "");
    }

    // In a cgroup namespace of its own it would serve itself alone.
    fs::write(&file, catalog.config())?;
    let apart = options.replace("--cgroupns host", "--cgroupns private");
    ensure!(apart != options, "{options}");
    let refused = docker.output(&format!("run --rm {apart} {command}"))?;
    let text = String::from_utf8_lossy(&refused.stderr);
    ensure!(refused.status.code() == Some(1) && text.contains("cgroupns = \"host\""), "{text}");

    // The root that this Docker sees is a cgroup of the test's own.
    let config = format!("cgroup = \"/sys/fs/cgroup\"\n{}{}", catalog.config(), job.config);
    fs::write(&file, config)?;
    let start = || docker.run(&format!("run --detach --name nohop {options} {command}"));
    let nohop = |words: &str| {
        let printed = docker.run(&format!("exec nohop {program} {words}"));
        printed.with_context(|| docker.run("logs nohop").unwrap_or_default())
    };
    start()?;
    nohop("status --wait-ready --timeout 60")?;
    let status: Value = serde_json::from_str(&nohop("status --json")?)?;
    let detached = |unit: &Value| unit["wanted"] == true && unit["state"] != "attached";
    let units = status["datapath"]["units"].as_array().context("no units")?;
    ensure!(!units.iter().any(detached), "{units:#?}");

    let client = nodes.client.inside(docker.cgroup());
    let words = format!("+short +time=60 +tries=1 @{LISTEN} helloworld.service");
    let url = format!("http://{}/", client.run("dig", &words)?.trim());
    let answers = |when: &str| -> Result<()> {
        let answer = client.run("curl", &format!("-sS --max-time 60 {url}"))?;
        ensure!(answer == "hello from helloworld\n", "{when}: {answer:?}");
        Ok(())
    };
    answers("at first")?;
    docker.run("rm --force nohop")?;
    answers("without a container")?;
    start()?;
    nohop("status --wait-ready --timeout 60")?;
    docker.run("stop --time 30 nohop")?;
    let code = docker.run("inspect --format {{.State.ExitCode}} nohop")?;
    ensure!(code.trim() == "0", "exit code {code}: {}", docker.run("logs nohop")?);
    answers("after a stop")
}

/// What the job asks for.
struct Job {
    /// As options of `docker run`.
    options: String,
    /// The daemon's configuration.
    config: String,
}

impl Job {
    fn read() -> Result<Job> {
        let text = fs::read_to_string(JOB).with_context(|| format!("read {JOB}"))?;
        let block = between(&text, "      config {\n", "\n      }\n")?;
        let config = between(&text, "<<-EOF\n", " EOF\n")?;
        let config: Vec<&str> = config.lines().map(str::trim_start).collect();
        Ok(Job { options: options(block)?.join(" "), config: config.join("\n") + "\n" })
    }
}

fn between<'a>(text: &'a str, start: &str, end: &str) -> Result<&'a str> {
    let (_, rest) = text.split_once(start).with_context(|| format!("{start:?} isn't in {JOB}"))?;
    Ok(rest.split_once(end).with_context(|| format!("{end:?} isn't in {JOB}"))?.0)
}

/// The options of `docker run` for those of Nomad's driver.
fn options(block: &str) -> Result<Vec<String>> {
    let without_comments = block.lines().map(|line| match line.split_once(" #") {
        Some((kept, _)) => kept,
        None if line.trim_start().starts_with('#') => "",
        None => line,
    });
    let text: String = without_comments.collect::<Vec<_>>().join(" ");
    let mut options = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        let (name, after) = rest.split_once(['=', '{']).context("a name and a value")?;
        let (name, after) = (name.trim(), after.trim_start());
        let (value, end) = match (after.chars().next(), rest[name.len()..].trim_start()) {
            (_, block) if block.starts_with('{') => after.split_once('}'),
            (Some('['), _) => after[1..].split_once(']'),
            _ => Some(after.split_once(' ').unwrap_or((after, ""))),
        }
        .with_context(|| format!("the value of {name} has no end"))?;
        rest = end.trim_start();
        let option = match name {
            "image" => continue,
            "network_mode" => "network",
            "pid_mode" => "pid",
            "cgroupns" => "cgroupns",
            "cap_drop" => "cap-drop",
            "cap_add" => "cap-add",
            "security_opt" => "security-opt",
            "volumes" => "volume",
            "ulimit" => "ulimit",
            other => bail!("{JOB} has {other}, which this test doesn't know"),
        };
        let values = value.split(',').map(|value| value.replace(['"', ' '], ""));
        options.extend(values.filter(|v| !v.is_empty()).map(|v| format!("--{option} {v}")));
    }
    Ok(options)
}
