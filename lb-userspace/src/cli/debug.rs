//! `nohop debug`: an archive of what a bug report needs, without secrets.

mod archive;
mod secrets;

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

use super::args::{ClientArguments, ConfigArguments};
use super::process::{environment, load, print, runtime};
use super::{check, config_file, version};
use crate::admin::client::{self, ClientError};
use crate::config::{AdminAddress, Config, Token};
use crate::counted::counted;
use crate::{regular_file, terminal};
use archive::archive;
use secrets::Secrets;

/// The lines of the journal.
const JOURNAL_LINES: &str = "2000";

/// Files of the system that tell kernels apart, and what is allowed in them.
const KERNEL_FILES: [&str; 12] = [
    "/proc/version",
    "/etc/os-release",
    "/sys/kernel/security/lsm",
    "/sys/kernel/security/lockdown",
    "/proc/sys/kernel/unprivileged_bpf_disabled",
    "/proc/sys/net/core/bpf_jit_enable",
    "/proc/sys/net/core/bpf_jit_harden",
    "/proc/sys/net/ipv4/ip_local_port_range",
    "/proc/sys/net/ipv4/ip_forward",
    "/sys/fs/cgroup/cgroup.controllers",
    "/proc/meminfo",
    "/proc/self/mountinfo",
];

/// How long a connection to the daemon may take, which needs no answer of it.
const CONNECT_LIMIT: Duration = Duration::from_secs(1);

/// Files of the daemon's process, and of this machine's resolver.
const DAEMON_FILES: [&str; 6] = ["status", "limits", "cgroup", "oom_score_adj", "wchan", "stack"];
const RESOLVER_FILES: [&str; 3] = ["/etc/resolv.conf", "/etc/nsswitch.conf", "/etc/hosts"];

/// What bpftool is asked for.
const BPFTOOL: [&[&str]; 4] =
    [&["map", "show"], &["prog", "show"], &["link", "show"], &["net", "show"]];

/// The result of `nohop debug`.
#[derive(Debug, Serialize, Deserialize)]
struct DebugReport {
    /// The archive.
    file: PathBuf,
    /// The names of the files in it.
    entries: Vec<String>,
    /// What couldn't be had, and why.
    problems: Vec<String>,
}

/// The files of the archive so far.
#[derive(Default)]
struct Collection {
    entries: Vec<(String, String)>,
    problems: Vec<String>,
}

impl Collection {
    /// Adds a file, or the reason why there is none.
    fn add(&mut self, name: &str, found: Result<String, String>) {
        match found {
            Ok(text) => self.entries.push((name.to_owned(), text)),
            Err(why) => self.problems.push(format!("{name}: {why}")),
        }
    }
}

/// Writes the archive, readable by its owner alone, to `file` or to a new file in this directory.
pub fn run(
    file: Option<PathBuf>,
    config: &ConfigArguments,
    client: &ClientArguments,
) -> anyhow::Result<()> {
    let loaded = load(config);
    let config_of_daemon = loaded.as_ref().ok().cloned().unwrap_or_default();
    let mut collection = Collection::default();
    let pid = of_daemon(&mut collection, client)?;
    collection.add("version.json", json(&version::version()));
    let settings = config_file::settings(config.config.as_deref(), &config.flags());
    let settings = settings.map_err(|error| error.to_string());
    collection.add("config.json", settings.and_then(|settings| json(&settings)));
    collection.add("check.json", json(&check::check(loaded, client.admin.as_deref())));
    collection.add("kernel.txt", Ok(files(KERNEL_FILES.map(PathBuf::from))));
    collection.add("resolver.txt", Ok(files(RESOLVER_FILES.map(PathBuf::from))));
    if let Some(pid) = pid {
        let of_process = DAEMON_FILES.map(|name| PathBuf::from(format!("/proc/{pid}/{name}")));
        collection.add("process.txt", Ok(files(of_process)));
    }
    collection.add("pins.txt", Ok(listing(&config_of_daemon.bpffs)));
    let shown: Result<String, String> =
        BPFTOOL.iter().map(|arguments| output("bpftool", arguments)).collect();
    collection.add("bpftool.txt", shown);
    let journal = [
        "--unit",
        "nohop.service",
        "--lines",
        JOURNAL_LINES,
        "--output",
        "short-iso",
        "--no-pager",
    ];
    collection.add("journal.txt", output("journalctl", &journal));
    write(file, collection, &secrets(&config_of_daemon, pid), client)
}

/// Adds what the daemon serves, and returns its process, where that is on this machine.
fn of_daemon(collection: &mut Collection, client: &ClientArguments) -> anyhow::Result<Option<u64>> {
    let address = client::find(client.admin.as_deref(), &environment)?;
    let runtime = runtime()?;
    let mut is_silent = false;
    let mut taken = |name: &str, asked: &dyn Fn() -> Result<String, ClientError>| {
        // One that hangs doesn't answer the next request either.
        let found = match is_silent {
            true => Err("the daemon doesn't answer".to_owned()),
            false => asked().map_err(|error| {
                is_silent = matches!(error, ClientError::TimeLimit { .. });
                error.to_string()
            }),
        };
        collection.add(name, found);
    };
    for (name, path) in [
        ("status.json", "/v1/status"),
        ("services.json", "/v1/services"),
        ("drain.json", "/v1/drain"),
        ("config-in-force.json", "/v1/config"),
    ] {
        taken(name, &|| {
            let document = runtime.block_on(client::get::<serde_json::Value>(&address, path))?;
            Ok(json(&document).unwrap_or_default())
        });
    }
    taken("metrics.txt", &|| runtime.block_on(client::get_text(&address, "/metrics")));
    Ok(runtime.block_on(process_at(&address)))
}

/// The process that listens at an address of this machine, whether it answers or not.
async fn process_at(address: &AdminAddress) -> Option<u64> {
    let AdminAddress::Unix(socket) = address else { return None };
    let connected = tokio::time::timeout(CONNECT_LIMIT, UnixStream::connect(socket)).await;
    let credentials = connected.ok()?.ok()?.peer_cred().ok()?;
    u64::try_from(credentials.pid()?).ok()
}

fn write(
    file: Option<PathBuf>,
    mut collection: Collection,
    secrets: &Secrets,
    client: &ClientArguments,
) -> anyhow::Result<()> {
    let seconds = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs();
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let file = file.unwrap_or_else(|| format!("nohop-debug-{host}-{seconds}.tar").into());
    if !collection.problems.is_empty() {
        let problems = collection.problems.join("\n") + "\n";
        collection.add("problems.txt", Ok(problems));
    }
    for (_, text) in &mut collection.entries {
        *text = secrets.redact(text);
    }
    let bytes = archive("nohop-debug", &collection.entries, seconds);
    // It may name what others needn't know, and replaces nothing.
    let created = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&file);
    let mut created =
        created.with_context(|| format!("can't create {}; name another file", file.display()))?;
    created.write_all(&bytes).with_context(|| format!("can't write {}", file.display()))?;
    let entries = collection.entries.into_iter().map(|(name, _)| name).collect();
    let problems = collection.problems.iter().map(|problem| secrets.redact(problem)).collect();
    print(client, &DebugReport { file, entries, problems }, text)
}

fn text(report: &DebugReport) -> String {
    let DebugReport { file, entries, problems } = report;
    let problems: String =
        problems.iter().map(|problem| format!("  left out: {problem}\n")).collect();
    format!(
        "{}: {}, without tokens and passwords. It has names and addresses of services, nodes \
         and resolvers: look through it before you hand it on\n{problems}",
        file.display(),
        counted(entries.len(), "file")
    )
}

/// What must not be in the archive: of this process, of the daemon, and of files that the
/// configuration names.
fn secrets(config: &Config, pid: Option<u64>) -> Secrets {
    let mut secrets = Secrets::default();
    let own = std::env::vars_os();
    let own = own.map(|(name, value)| {
        (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned())
    });
    own.for_each(|(name, value)| secrets.add_variable(&name, &value));
    let of_daemon = pid.and_then(|pid| fs::read(format!("/proc/{pid}/environ")).ok());
    for variable in of_daemon.unwrap_or_default().split(|octet| *octet == 0) {
        let variable = String::from_utf8_lossy(variable);
        if let Some((name, value)) = variable.split_once('=') {
            secrets.add_variable(name, value);
        }
    }
    match &config.consul.token {
        Some(Token::File(path)) => {
            secrets.add(&regular_file::read_to_string(path).unwrap_or_default())
        }
        Some(Token::Literal(token)) => secrets.add(token),
        None => {}
    }
    secrets
}

fn json(document: &impl Serialize) -> Result<String, String> {
    serde_json::to_string_pretty(document)
        .map(|text| terminal::escape_json(&text) + "\n")
        .map_err(|error| error.to_string())
}

/// Files one after another, each after its name; those that aren't there have none.
fn files<const N: usize>(paths: [PathBuf; N]) -> String {
    let parts = paths.iter().filter_map(|path| {
        let text = regular_file::read(path).ok()?;
        Some(format!("== {}\n{}\n", path.display(), String::from_utf8_lossy(&text)))
    });
    parts.collect()
}

/// The paths below a directory.
fn listing(dir: &Path) -> String {
    let mut text = format!("{}\n", dir.display());
    let mut entries: Vec<_> =
        fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    entries.sort();
    for entry in entries {
        match entry.is_dir() && !entry.is_symlink() {
            true => text += &listing(&entry),
            false => text += &format!("{}\n", entry.display()),
        }
    }
    text
}

/// What a program prints.
fn output(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.map_err(|error| format!("can't run {program}: {error}"))?;
    let (stdout, stderr) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    match output.status.success() {
        true => Ok(format!("== {program} {}\n{stdout}\n", arguments.join(" "))),
        false => Err(format!("{program}: {}", stderr.trim())),
    }
}
