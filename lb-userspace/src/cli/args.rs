//! What can be said on the command line.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::dns::DnsCommand;

/// The load balancer without a proxy hop, for Nomad and Consul.
#[derive(Debug, Parser)]
#[command(name = "nohop", version)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// A command.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// The daemon; it logs to stderr (RUST_LOG says how much)
    Run {
        /// Where its configuration comes from
        #[command(flatten)]
        config: ConfigArguments,
        /// How log lines look
        #[arg(long, value_enum, default_value_t)]
        log_format: LogFormat,
        /// Whether the kernel goes on translating when the daemon ends [default: keep]
        #[arg(long, value_name = "keep|detach")]
        on_exit: Option<String>,
    },
    /// Say of everything that nohop needs whether it is there, and how to fix it
    Check {
        /// Where its configuration comes from
        #[command(flatten)]
        config: ConfigArguments,
        /// How to find a daemon
        #[command(flatten)]
        client: ClientArguments,
    },
    /// One screen: ready or not and why, the source, the maps; exit code 1 when not ready
    Status {
        /// Wait until the daemon is ready; also for one that isn't there yet
        #[arg(long)]
        wait_ready: bool,
        /// How long --wait-ready waits at most, in seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 60, requires = "wait_ready")]
        timeout: u64,
        /// How to find the daemon
        #[command(flatten)]
        client: ClientArguments,
    },
    /// Every service, with its backends
    Services {
        /// How to find the daemon
        #[command(flatten)]
        client: ClientArguments,
    },
    /// Why each instance of a service is in or out, and what a connection would get
    Explain {
        /// The service, with or without the domain
        name: String,
        /// How to find the daemon
        #[command(flatten)]
        client: ClientArguments,
    },
    /// How this machine's resolver comes to ask nohop, and what nohop answers
    Dns {
        /// Which of the two
        #[command(subcommand)]
        command: DnsCommand,
    },
    /// Have the daemon read its configuration again: all of it comes into force, or nothing
    Reload {
        /// How to find the daemon
        #[command(flatten)]
        client: ClientArguments,
    },
    /// What has to do with the configuration file
    Config {
        /// What to do with it
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Connect once from inside a cgroup: how the daemon proves that its hooks run there
    #[command(hide = true)]
    ProbeConnect {
        /// The cgroup to enter
        cgroup: PathBuf,
        /// Where to connect to
        address: SocketAddr,
    },
    /// Create maps from inside a cgroup: how the daemon keeps them from being charged to its own
    #[command(hide = true)]
    CreateMaps {
        /// The cgroup to enter
        cgroup: PathBuf,
        /// The pins to create, each with its number of entries
        #[arg(value_name = "PATH=ENTRIES")]
        maps: Vec<OsString>,
    },
    /// Detach the programs and remove all pins, after the daemon has ended
    Unload {
        /// Which pins and which pool
        #[command(flatten)]
        config: ConfigArguments,
        /// Remove the unreachable route too
        #[arg(long)]
        all: bool,
        /// One JSON document
        #[arg(long)]
        json: bool,
    },
}

/// What can be done with a configuration file.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Say what is wrong with it, and touch nothing
    Check {
        /// The file
        file: PathBuf,
        /// One JSON document
        #[arg(long)]
        json: bool,
    },
}

/// The configuration file, and keys of it.
#[derive(Clone, Debug, Args)]
pub struct ConfigArguments {
    /// The configuration [default: /etc/nohop/nohop.toml where it exists]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The cgroup v2 directory whose processes are served [default: the mounted root]
    #[arg(long, value_name = "DIR")]
    pub cgroup: Option<PathBuf>,
    /// Where maps and links are pinned [default: /sys/fs/bpf/nohop]
    #[arg(long, value_name = "DIR")]
    pub bpffs: Option<PathBuf>,
    /// Where what must outlive the daemon is kept [default: /var/lib/nohop]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Where DNS is answered; repeatable [default: 127.0.0.1:53]
    #[arg(long, value_name = "ADDR:PORT")]
    pub dns_listen: Vec<String>,
    /// Where the admin interface listens; repeatable [default: unix:/run/nohop/admin.sock]
    #[arg(long, value_name = "unix:PATH|ADDR:PORT")]
    pub admin_listen: Vec<String>,
    /// A static catalog instead of Consul
    #[arg(long, value_name = "FILE")]
    pub catalog: Option<PathBuf>,
    /// The Consul agent [default: http://127.0.0.1:8500]
    #[arg(long, value_name = "URL")]
    pub consul_addr: Option<String>,
    /// Translate nothing, and count what would be
    #[arg(long)]
    pub shadow: bool,
}

/// How a command finds the daemon, and how it answers.
#[derive(Debug, Args)]
pub struct ClientArguments {
    /// The daemon [default: NOHOP_ADMIN, else unix:/run/nohop/admin.sock]
    #[arg(long, value_name = "unix:PATH|ADDR:PORT")]
    pub admin: Option<String>,
    /// One JSON document
    #[arg(long)]
    pub json: bool,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// An object a line.
    Json,
}
