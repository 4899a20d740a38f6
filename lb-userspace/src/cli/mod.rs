//! The command line.

mod args;
mod check;
mod columns;
mod completion;
mod config_file;
mod debug;
mod dns;
mod drain;
mod edge_check;
mod flows;
mod format;
mod log;
mod nomad_check;
mod package_files;
mod process;
mod reload;
mod services;
mod top;
mod trace;
mod unload;
mod version;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::{CommandFactory, FromArgMatches};
use hyper::StatusCode;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::admin::client::ClientError;
use crate::admin::{api, client};
use crate::catalog::CatalogError;
use crate::causes;
use crate::config::{ConfigErrors, ConfigReader};
use crate::datapath::{create_maps, probe};
use crate::dns::DebugQueryError;
use crate::{daemon, logging};
use args::{Arguments, ClientArguments, Command, ConfigCommand, DnsCommand};
use columns::Palette;
use process::{
    ANSWER, FAILURE, LONGEST_WAIT, USAGE, environment, load, print, print_error, runtime,
    show_line, write, write_text,
};

/// Between two tries to reach a daemon that isn't there yet.
const PAUSE: Duration = Duration::from_millis(100);

/// How much longer than asked `status --wait-ready` waits for an answer to its last request.
const GRACE: Duration = Duration::from_secs(2);

/// How long `run` waits before it exits for a mistake in the configuration, under a service manager:
/// that starts it again at once, where it doesn't pace restarts or a lookup waits in a socket.
const MISTAKE_PAUSE: Duration = Duration::from_secs(5);

/// The width of help where no terminal is known, as clap has it.
const DEFAULT_WIDTH: usize = 100;

/// Runs the command that the arguments name. Exit codes: 0, 1 for a failure, 2 for a mistake in the
/// usage or the configuration.
pub fn main() -> ExitCode {
    let arguments = arguments();
    let is_service = matches!(arguments.command, Command::Run { .. })
        && ["NOTIFY_SOCKET", "LISTEN_PID"].iter().any(|name| std::env::var_os(name).is_some());
    let is_json = arguments.command.is_json();
    let code = match command(arguments.command) {
        Ok(code) => code,
        Err(error) => {
            let text = causes::text(error.as_ref());
            // The problems of a configuration have a line each, and no headline.
            match error.downcast_ref::<ConfigErrors>() {
                Some(ConfigErrors(errors)) => {
                    errors.iter().for_each(|problem| print_error(&problem.to_string()));
                }
                None => format!("error: {text}").lines().for_each(print_error),
            }
            if is_json {
                // The failure is reported already, if stdout fails as well.
                let _ = show_line(true, &Failure { error: text }, |_| String::new());
            }
            let usage = is_usage(&error);
            if usage && is_service {
                std::thread::sleep(MISTAKE_PAUSE);
            }
            ExitCode::from(if usage { USAGE } else { FAILURE })
        }
    };
    logging::drain();
    code
}

/// Whether it is a mistake in the usage or the configuration.
fn is_usage(error: &anyhow::Error) -> bool {
    let is_of_client = match error.downcast_ref() {
        Some(ClientError::Address { .. }) => true,
        Some(ClientError::Refused { status, .. }) => *status == StatusCode::BAD_REQUEST,
        _ => false,
    };
    let is_of_query = matches!(
        error.downcast_ref(),
        Some(DebugQueryError::Name { .. } | DebugQueryError::Type { .. })
    );
    error.is::<ConfigErrors>() || error.is::<CatalogError>() || is_of_client || is_of_query
}

/// What `--json` prints where there is no result.
#[derive(Serialize, Deserialize)]
struct Failure {
    error: String,
}

/// The arguments of the process.
fn arguments() -> Arguments {
    let command = with_room(Arguments::command(), environment("COLUMNS").as_deref());
    Arguments::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit())
}

/// COLUMNS is 0 where a terminal has no size, and then no width at all: a line of help has room for words.
fn with_room(command: clap::Command, columns: Option<&str>) -> clap::Command {
    match columns {
        Some("0") => command.term_width(DEFAULT_WIDTH),
        _ => command,
    }
}

fn command(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Run { config, log_format } => {
            logging::start(log_format).context("can't start a thread")?;
            let reader = ConfigReader::new(config.config.config.as_deref(), config.flags());
            let read = Arc::new(move || reader.read(&environment));
            daemon::run(read()?, read)?;
        }
        Command::Check { config, client } => {
            let report = check::check(load(&config), client.admin.as_deref());
            print(&client, &report, check::text)?;
            return Ok(if report.ok { ExitCode::SUCCESS } else { ExitCode::from(FAILURE) });
        }
        Command::Status { wait_ready, timeout, text, client } => {
            let palette = Palette::of_stdout(text.color);
            let status = match wait_ready {
                true => wait_until_ready(&client, Duration::from_secs(timeout))?,
                false => ask(&client, "/v1/status")?,
            };
            print(&client, &status, |status| format::status(status, palette))?;
            return Ok(if status.ready { ExitCode::SUCCESS } else { ExitCode::from(FAILURE) });
        }
        Command::Services { services, client } => services::run(&services, &client)?,
        Command::Top { client } => top::run(&client)?,
        Command::Trace { filter, client } => trace::run(filter.into(), &client)?,
        Command::Explain { name, text, client } => {
            let palette = Palette::of_stdout(text.color);
            let explanation: api::Explanation = ask(&client, &client::explain_path(&name))?;
            print(&client, &explanation, |it| format::explanation(it, palette))?;
            if !explanation.is_routed() {
                return Ok(ExitCode::from(FAILURE));
            }
        }
        Command::Dns {
            command: DnsCommand::Setup { resolvers, apply, undo, root, config, json },
        } => {
            let report = dns::setup(resolvers, apply, undo, &root, &load(&config)?)?;
            write(json, &report, dns::setup_text)?;
        }
        Command::Dns { command: DnsCommand::Query { name, kind, server, client } } => {
            print(&client, &dns::query(&name, &kind, server, &client)?, dns::lookup_text)?;
        }
        Command::Flows { top, client } => flows::run(top, &client)?,
        Command::Drain { target: None, client } => drain::list(&client)?,
        Command::Drain { target: Some(target), client } => {
            return drain::change(true, &target, &client);
        }
        Command::Undrain { target, client } => return drain::change(false, &target, &client),
        Command::Log { filter, client } => return log::run(filter.as_deref(), &client),
        Command::Reload { client } => return reload::ask(&client),
        Command::Config { command: ConfigCommand::Check { file, json } } => {
            return config_file::check(file.as_deref(), json);
        }
        Command::Config { command: ConfigCommand::Show { config, json } } => {
            config_file::show(&config, json)?;
        }
        Command::Config { command: ConfigCommand::Migrate { file, apply, json } } => {
            return config_file::migrate(file.as_deref(), apply, json);
        }
        Command::PackageFiles { dir } => package_files::write(&dir)?,
        Command::Completion { shell } => write_text(&completion::script(shell))?,
        Command::Debug { file, config, client } => debug::run(file, &config, &client)?,
        Command::Version { json } => write(json, &version::version(), version::text)?,
        Command::ProbeConnect { cgroup, address } => probe::connect_inside(&cgroup, address)
            .with_context(|| format!("can't enter {}", cgroup.display()))?,
        Command::CreateMaps { cgroup, maps } => create_maps(&cgroup, &maps)
            .with_context(|| format!("can't create maps from {}", cgroup.display()))?,
        Command::Unload { config, all, json } => unload::unload(&load(&config)?, all, json)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn ask<T: DeserializeOwned>(client: &ClientArguments, path: &str) -> anyhow::Result<T> {
    let address = client::find(client.admin.as_deref(), &environment)?;
    Ok(runtime()?.block_on(client::get(&address, path))?)
}

/// The status once the daemon is ready, or when the time is over. The daemon may start meanwhile.
fn wait_until_ready(client: &ClientArguments, limit: Duration) -> anyhow::Result<api::Status> {
    let address = client::find(client.admin.as_deref(), &environment)?;
    let deadline = Instant::now() + limit;
    runtime()?.block_on(async {
        let mut path = "/v1/status".to_owned();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // One that hangs must not hold this up for much longer than asked.
            let limit = (left.min(LONGEST_WAIT) + ANSWER).min(left + GRACE);
            let status = client::get_within::<api::Status>(&address, &path, limit).await;
            match status {
                Ok(status) if status.ready || left.is_zero() => return Ok(status),
                Ok(status) => {
                    let seconds = left.min(LONGEST_WAIT).as_secs().max(1);
                    path = format!("/v1/status?after={}&wait={seconds}", status.revision);
                }
                Err(error) if Instant::now() >= deadline || !error.is_transient() => {
                    return Err(error.into());
                }
                // There is no event for a socket that doesn't exist yet.
                Err(_) => tokio::time::sleep(PAUSE.min(left)).await,
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn what_a_person_got_wrong_is_no_failure_of_the_daemon() {
        let refused = |status| ClientError::Refused {
            address: "unix:/a".parse().unwrap(),
            status,
            body: String::new(),
        };
        for (error, expected) in [
            (refused(StatusCode::BAD_REQUEST).into(), true),
            (refused(StatusCode::SERVICE_UNAVAILABLE).into(), false),
            (DebugQueryError::Type { kind: "FOO".into() }.into(), true),
            (anyhow::anyhow!("anything else"), false),
        ] {
            assert_eq!(is_usage(&error), expected, "{error}");
        }
    }

    #[test]
    fn help_has_room_without_a_terminal() {
        let mut command = with_room(Arguments::command().term_width(0), Some("0"));
        let help = command.render_long_help().to_string();
        let longest = help.lines().map(str::len).max().unwrap_or_default();
        assert!((60..=DEFAULT_WIDTH).contains(&longest), "{longest}:\n{help}");
    }

    #[test]
    fn arguments_that_cant_be_are_named() {
        for (arguments, expected) in [
            ("status --wait-ready --timeout 18446744073709551615", "is not in 0..=31536000"),
            ("dns query web A --server 127.0.0.1", "write ADDR:PORT"),
            ("drain node:", "name a node, an address, an instance or an allocation"),
            ("undrain instance:", "name a node, an address, an instance or an allocation"),
            ("dns setup --undo --resolv-conf", "cannot be used with '--resolv-conf'"),
            ("dns setup --apply --systemd-resolved --docker", "cannot be used with '--docker'"),
        ] {
            let arguments = std::iter::once("nohop").chain(arguments.split(' '));
            let error = Arguments::try_parse_from(arguments).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
