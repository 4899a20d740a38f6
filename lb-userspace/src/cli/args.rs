//! The arguments of the command line.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};

use super::dns::target::ResolverKind;
use crate::admin::{OUTCOMES, TraceFilter};
use crate::config::keys::{Key, toml, values};
use crate::config::{Config, Flag, FlagValue};
use crate::logging::LogFormat;
use crate::table::check_target;

/// What scripts can rely on.
const EXIT_CODES: &str = "Exit codes: 0; 1 for a failure, a daemon that isn't ready (status), a missing \
                          requirement (check), or a name that isn't routed (explain); 2 for a mistake in \
                          the usage or the configuration.";

/// A load balancer without a proxy hop, for Nomad and Consul.
#[derive(Debug, Parser)]
#[command(name = "nohop", version, after_help = EXIT_CODES)]
pub struct Arguments {
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// The longest wait for a daemon, in seconds: a year.
const MAX_TIMEOUT: u64 = 365 * 86_400;

/// When text has colours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ColorChoice {
    /// At a terminal, unless NO_COLOR is set.
    #[default]
    Auto,
    /// Also in a pipe.
    Always,
    /// Nowhere.
    Never,
}

/// A command.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon; it logs to stderr (RUST_LOG sets the level)
    Run {
        /// The configuration.
        #[command(flatten)]
        config: RunArguments,
        /// Format of log lines
        #[arg(long, value_enum, default_value_t)]
        log_format: LogFormat,
    },
    /// Check the system requirements and print how to fix what is missing
    Check {
        /// The configuration.
        #[command(flatten)]
        config: ConfigArguments,
        /// The daemon.
        #[command(flatten)]
        client: ClientArguments,
    },
    /// Show the state of the daemon; exit code 1 when it isn't ready
    Status {
        /// Wait until the daemon is ready, also for one that hasn't started yet
        #[arg(long)]
        wait_ready: bool,
        /// Time limit of --wait-ready
        #[arg(long, value_name = "SECONDS", default_value_t = 60, requires = "wait_ready",
            value_parser = clap::value_parser!(u64).range(..=MAX_TIMEOUT))]
        timeout: u64,
        /// The text.
        #[command(flatten)]
        text: TextArguments,
        /// The daemon.
        #[command(flatten)]
        client: ClientArguments,
    },
    /// List services and their backends; with --watch, follow them
    Services {
        /// Which.
        #[command(flatten)]
        services: ServicesArguments,
        /// The daemon.
        #[command(flatten)]
        client: ClientArguments,
    },
    /// Show why each instance of a service is in or out, and what a connection would get
    Explain {
        /// Name of the service, its VIP, or the address of an instance, with a port or without
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        name: String,
        /// The text.
        #[command(flatten)]
        text: TextArguments,
        /// The daemon.
        #[command(flatten)]
        client: ClientArguments,
    },
    /// Show services by their connections, live; with --json, the figures of one second
    Top {
        /// The daemon.
        #[command(flatten)]
        client: ClientArguments,
    },
    /// Print connections as they happen, each with its process and its outcome
    Trace {
        /// Which.
        #[command(flatten)]
        filter: TraceArguments,
        /// The daemon.
        #[command(flatten)]
        client: ClientArguments,
    },
    /// Show the flows through this edge, those with the latest packets first
    Flows {
        /// Those with the most bytes first
        #[arg(long)]
        top: bool,
        /// The daemon.
        #[command(flatten)]
        client: ClientArguments,
    },
    /// Stop new connections from this node to the backends of a node, an address, an instance or an
    /// allocation; open ones go on. Without an argument, list what is drained
    Drain {
        /// Name of a node, address with or without a port, id of an instance (NODE/ID where several
        /// nodes have it), or id of an allocation (8 digits suffice); where one means several things,
        /// `node:NAME`, `address:ADDRESS`, `instance:ID` or `allocation:ID`. Or `edge`: this edge
        /// no longer announces its public VIPs, and open flows continue
        #[arg(value_parser = drain_target)]
        target: Option<String>,
        /// The daemon.
        #[command(flatten)]
        client: ClientArguments,
    },
    /// Allow new connections from this node again to what was drained
    Undrain {
        /// What was drained, by the same name or as `nohop drain` lists it
        #[arg(value_parser = drain_target)]
        target: String,
        /// The daemon.
        #[command(flatten)]
        client: ClientArguments,
    },
    /// Configure the system resolver, and query nohop's DNS
    Dns {
        /// The command.
        #[command(subcommand)]
        command: DnsCommand,
    },
    /// Reload the configuration of the daemon (atomic: on an error nothing changes)
    Reload {
        /// The daemon.
        #[command(flatten)]
        client: ClientArguments,
    },
    /// Show what the daemon logs, or change it until the daemon ends
    Log {
        /// A level (error, warn, info, debug, trace, off) or MODULE=LEVEL, separated by commas
        filter: Option<String>,
        /// The daemon.
        #[command(flatten)]
        client: ClientArguments,
    },
    /// Check or show the configuration
    Config {
        /// The command.
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Print the completions of a shell, for it to read
    Completion {
        /// The shell
        shell: CompletionShell,
    },
    /// Write an archive of what a bug report needs, without tokens and passwords
    Debug {
        /// The archive, a new file [default: nohop-debug-HOST-TIME.tar in this directory]
        file: Option<PathBuf>,
        /// The configuration.
        #[command(flatten)]
        config: Box<ConfigArguments>,
        /// The daemon.
        #[command(flatten)]
        client: ClientArguments,
    },
    /// Print the version, the commit, and checksums of the eBPF programs
    Version {
        /// Print one JSON document
        #[arg(long)]
        json: bool,
    },
    /// Connect once from inside a cgroup: the daemon verifies its hooks with that
    #[command(hide = true)]
    ProbeConnect {
        /// The cgroup to enter
        cgroup: PathBuf,
        /// The destination
        address: SocketAddr,
    },
    /// Create maps from inside a cgroup, so that they aren't charged to the daemon's
    #[command(hide = true)]
    CreateMaps {
        /// The cgroup to enter
        cgroup: PathBuf,
        /// The pins to create, each with its number of entries
        #[arg(value_name = "PATH=ENTRIES")]
        maps: Vec<OsString>,
    },
    /// Write what packages contain in addition to the binary: manual pages, completions, the configuration file
    #[command(hide = true)]
    PackageFiles {
        /// The directory; what is there is replaced
        dir: PathBuf,
    },
    /// Detach the programs and remove all pins, after the daemon has stopped
    Unload {
        /// The configuration.
        #[command(flatten)]
        config: ConfigArguments,
        /// Remove the unreachable route as well
        #[arg(long)]
        all: bool,
        /// Print one JSON document
        #[arg(long)]
        json: bool,
    },
}

impl Command {
    /// Whether the result is printed as JSON.
    pub fn is_json(&self) -> bool {
        match self {
            Command::Check { client, .. }
            | Command::Status { client, .. }
            | Command::Services { client, .. }
            | Command::Explain { client, .. }
            | Command::Top { client }
            | Command::Trace { client, .. }
            | Command::Flows { client, .. }
            | Command::Drain { client, .. }
            | Command::Undrain { client, .. }
            | Command::Dns { command: DnsCommand::Query { client, .. } }
            | Command::Reload { client }
            | Command::Log { client, .. }
            | Command::Debug { client, .. } => client.json,
            Command::Dns { command: DnsCommand::Setup { json, .. } }
            | Command::Config {
                command:
                    ConfigCommand::Check { json, .. }
                    | ConfigCommand::Migrate { json, .. }
                    | ConfigCommand::Show { json, .. },
            }
            | Command::Version { json }
            | Command::Unload { json, .. } => *json,
            Command::Run { .. }
            | Command::Completion { .. }
            | Command::PackageFiles { .. }
            | Command::ProbeConnect { .. }
            | Command::CreateMaps { .. } => false,
        }
    }
}

/// A shell that completes the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CompletionShell {
    /// `source <(nohop completion bash)`, or a file in /etc/bash_completion.d
    Bash,
    /// A file `_nohop` in a directory of $fpath
    Zsh,
    /// A file `nohop.fish` in ~/.config/fish/completions
    Fish,
}

/// Which services are listed, and how.
#[derive(Debug, Args)]
pub struct ServicesArguments {
    /// Those with this in their name; with * (any text) or ? (any character), those whose whole name matches
    pub pattern: Option<String>,
    /// Those with backends in this state, with these alone
    #[arg(long, value_parser = STATES)]
    pub state: Option<String>,
    /// Print those that change, as they do; with --json, one document a line
    #[arg(short, long)]
    pub watch: bool,
    /// The text.
    #[command(flatten)]
    pub text: TextArguments,
}

/// The states of a service's backends.
const STATES: [&str; 7] =
    ["healthy", "warning", "spare", "draining", "unproven", "ejected", "unroutable"];

/// How text looks.
#[derive(Debug, Args)]
pub struct TextArguments {
    /// Use colours
    #[arg(long, value_enum, default_value_t)]
    pub color: ColorChoice,
}

/// Which connections are printed.
#[derive(Debug, Args)]
pub struct TraceArguments {
    /// Of this service alone
    name: Option<String>,
    /// Not of this service; may be repeated
    #[arg(long, value_name = "NAME")]
    not: Vec<String>,
    /// With this outcome alone
    #[arg(long, value_parser = OUTCOMES)]
    outcome: Option<String>,
    /// One of so many
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    sample: u32,
}

impl From<TraceArguments> for TraceFilter {
    fn from(arguments: TraceArguments) -> TraceFilter {
        let TraceArguments { name: service, not, outcome, sample } = arguments;
        TraceFilter { service, not, outcome, sample }
    }
}

/// A command about the configuration.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Report the mistakes in a file, and in the static catalog that it names
    Check {
        /// The file [default: /etc/nohop/nohop.toml if it exists]
        file: Option<PathBuf>,
        /// Print one JSON document
        #[arg(long)]
        json: bool,
    },
    /// Give the keys in a file of an earlier version their present names; without --apply, print what
    /// would change
    Migrate {
        /// The file [default: /etc/nohop/nohop.toml]
        file: Option<PathBuf>,
        /// Write it; FILE.old keeps the former one
        #[arg(long)]
        apply: bool,
        /// Print one JSON document
        #[arg(long)]
        json: bool,
    },
    /// Print every key with its value and the source of the value
    Show {
        /// The configuration.
        #[command(flatten)]
        config: Box<RunArguments>,
        /// Print one JSON document
        #[arg(long)]
        json: bool,
    },
}

/// Setups whose files nohop doesn't write.
const NOT_APPLIED: [&str; 4] = ["resolv_conf", "dnsmasq", "nomad", "docker"];

/// Subcommands of `nohop dns`.
#[derive(Debug, Subcommand)]
pub enum DnsCommand {
    /// Print how a resolver delegates the zone to nohop; without an option, inspect this machine and
    /// recommend a setup
    Setup {
        /// Which resolver
        #[command(flatten)]
        resolvers: ResolverArguments,
        /// Apply it, for systemd-resolved
        #[arg(long, requires = "systemd_resolved", conflicts_with_all = NOT_APPLIED,
            conflicts_with = "undo")]
        apply: bool,
        /// Restore the former files, for systemd-resolved
        #[arg(long, requires = "systemd_resolved", conflicts_with_all = NOT_APPLIED)]
        undo: bool,
        /// Where the machine's files are: a test has others than the machine
        #[arg(long, value_name = "DIR", default_value = "/", hide = true)]
        root: PathBuf,
        /// Where the configuration comes from
        #[command(flatten)]
        config: Box<ConfigArguments>,
        /// Print one JSON document
        #[arg(long)]
        json: bool,
    },
    /// Ask the running daemon for a name, and show the answer and where it came from
    Query {
        /// The name
        name: String,
        /// The type of record
        #[arg(value_name = "TYPE", default_value = "A")]
        kind: String,
        /// Ask this server instead, which can't report where its answer comes from
        #[arg(long, value_name = "ADDR:PORT", value_parser = server)]
        server: Option<SocketAddr>,
        /// How to find the daemon
        #[command(flatten)]
        client: ClientArguments,
    },
}

/// The resolver that is to query nohop.
#[derive(Clone, Copy, Debug, Args)]
pub struct ResolverArguments {
    /// systemd-resolved, by a drop-in
    #[arg(long)]
    pub systemd_resolved: bool,
    /// Every program itself, by /etc/resolv.conf
    #[arg(long, conflicts_with = "systemd_resolved")]
    pub resolv_conf: bool,
    /// dnsmasq (and, by the same words, unbound and BIND)
    #[arg(long, conflicts_with_all = ["systemd_resolved", "resolv_conf"])]
    pub dnsmasq: bool,
    /// A Nomad client: one address for the host and the tasks of every driver
    #[arg(long, conflicts_with = "resolv_conf")]
    pub nomad: bool,
    /// Docker's containers
    #[arg(long)]
    pub docker: bool,
}

impl ResolverArguments {
    /// The setups that were given, the host's own resolver first.
    pub fn kinds(self) -> Vec<ResolverKind> {
        [
            (self.systemd_resolved, ResolverKind::SystemdResolved),
            (self.resolv_conf, ResolverKind::ResolvConf),
            (self.dnsmasq, ResolverKind::Dnsmasq),
            (self.nomad, ResolverKind::Nomad),
            (self.docker, ResolverKind::Docker),
        ]
        .into_iter()
        .filter_map(|(is_given, kind)| is_given.then_some(kind))
        .collect()
    }
}

/// The configuration of the daemon.
#[derive(Clone, Debug, Args)]
pub struct RunArguments {
    /// The arguments that other commands share.
    #[command(flatten)]
    pub config: ConfigArguments,
    #[arg(long, value_name = "keep|detach", help = help("on_exit"))]
    on_exit: Option<String>,
}

/// The configuration file, and keys that override it.
#[derive(Clone, Debug, Args)]
pub struct ConfigArguments {
    /// Configuration file [default: /etc/nohop/nohop.toml if it exists]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[arg(long, value_name = "DIR", help = help("cgroup"))]
    cgroup: Option<String>,
    #[arg(long, value_name = "DIR", help = help("bpffs"))]
    bpffs: Option<String>,
    #[arg(long, value_name = "DIR", help = help("state_dir"))]
    state_dir: Option<String>,
    #[arg(long, value_name = "ADDR:PORT", help = help("dns.listen"))]
    dns_listen: Vec<String>,
    #[arg(long, value_name = "unix:PATH|ADDR:PORT", help = help("admin.listen"))]
    admin_listen: Vec<String>,
    /// Static catalog instead of Consul
    #[arg(long, value_name = "FILE")]
    catalog: Option<String>,
    #[arg(long, value_name = "URL", help = help("consul.address"))]
    consul_addr: Option<String>,
    #[arg(long, help = help("shadow"))]
    shadow: bool,
}

/// How a command finds the daemon, and prints its answer.
#[derive(Debug, Args)]
pub struct ClientArguments {
    /// Address of the daemon [default: NOHOP_ADMIN, else unix:/run/nohop/admin.sock]
    #[arg(long, value_name = "unix:PATH|ADDR:PORT")]
    pub admin: Option<String>,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

/// What is drained; the daemon finds out what it is.
fn drain_target(text: &str) -> Result<String, String> {
    check_target(text).map(|()| text.to_owned()).map_err(|error| error.to_string())
}

/// A DNS server's address.
fn server(text: &str) -> Result<SocketAddr, &'static str> {
    text.parse().map_err(|_| "write ADDR:PORT, such as 127.0.0.1:53")
}

/// The meaning of a flag's key, and its default.
fn help(name: &str) -> String {
    let text = Key::find(name).map_or("", |key| key.text);
    let values = values(&Config::default());
    let default = values.iter().find(|(key, _)| key.name == name).map(|(_, value)| toml(value));
    let mut chars = text.chars();
    let text: String = chars.next().into_iter().flat_map(char::to_uppercase).chain(chars).collect();
    format!("{text} [default: {}]", default.unwrap_or_default())
}

impl RunArguments {
    /// The keys that flags set.
    pub fn flags(&self) -> Vec<Flag> {
        let on_exit = text("--on-exit", "on_exit", &self.on_exit);
        self.config.flags().into_iter().chain(on_exit).collect()
    }
}

impl ConfigArguments {
    /// The keys that flags set.
    pub fn flags(&self) -> Vec<Flag> {
        let list = |name, key, values: &[String]| {
            let value = FlagValue::List(values.to_vec());
            (!values.is_empty()).then_some(Flag { name, key, value })
        };
        let shadow = FlagValue::Bool(true);
        let source = self.catalog.as_ref().map(|_| "file".to_owned());
        [
            // `auto` isn't a path.
            path("--cgroup", "cgroup", &self.cgroup, "auto"),
            path("--bpffs", "bpffs", &self.bpffs, ""),
            path("--state-dir", "state_dir", &self.state_dir, ""),
            list("--dns-listen", "dns.listen", &self.dns_listen),
            list("--admin-listen", "admin.listen", &self.admin_listen),
            list("--catalog", "catalog.sources", source.as_slice()),
            path("--catalog", "catalog.file", &self.catalog, ""),
            text("--consul-addr", "consul.address", &self.consul_addr),
            self.shadow.then_some(Flag { name: "--shadow", key: "shadow", value: shadow }),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

fn text(name: &'static str, key: &'static str, value: &Option<String>) -> Option<Flag> {
    value.as_ref().map(|text| Flag { name, key, value: FlagValue::Text(text.clone()) })
}

/// A path, or a keyword.
fn path(name: &'static str, key: &'static str, value: &Option<String>, word: &str) -> Option<Flag> {
    let value = value.as_ref().map(|path| match path == word {
        true => FlagValue::Text(path.clone()),
        false => FlagValue::path(path),
    })?;
    Some(Flag { name, key, value })
}
