//! `nohop config`: checks or shows the configuration.

use std::path::Path;
use std::process::ExitCode;

use serde::{Deserialize, Serialize};

use super::args::RunArguments;
use super::process::{USAGE, environment, print_error, write};
use crate::catalog;
use crate::config::keys::{toml, values};
use crate::config::{Config, DEFAULT_PATH, LoadedConfig};

/// The result of `nohop config check`.
#[derive(Debug, Serialize, Deserialize)]
struct ConfigReport {
    ok: bool,
    /// Each with its location and the fix.
    problems: Vec<String>,
}

/// Reads the file as `nohop run --config FILE` would, with the environment of this process, and the
/// static catalog that it names; prints the problems of both.
pub fn check(file: Option<&Path>, json: bool) -> anyhow::Result<ExitCode> {
    let problems = match Config::load(file, &[], &environment) {
        // A mistake in a static catalog keeps the daemon from starting as well.
        Ok(config) => match catalog::check(&config) {
            Ok(()) => Vec::new(),
            Err(error) => error.to_string().lines().map(str::to_owned).collect(),
        },
        Err(errors) => errors.0.iter().map(ToString::to_string).collect(),
    };
    let report = ConfigReport { ok: problems.is_empty(), problems };
    if json || report.ok {
        let file = file.unwrap_or(Path::new(DEFAULT_PATH));
        write(json, &report, |_| format!("{}: no problems\n", file.display()))?;
    } else {
        report.problems.iter().for_each(|problem| print_error(problem));
    }
    Ok(if report.ok { ExitCode::SUCCESS } else { ExitCode::from(USAGE) })
}

/// A key with its value, as `nohop config show --json` prints it.
#[derive(Debug, Serialize, Deserialize)]
struct Setting {
    /// The key, such as `dns.ttl`.
    key: String,
    /// The value; of a secret only that there is one.
    value: serde_json::Value,
    /// `default`, FILE:LINE, a variable of the environment, or a flag.
    source: String,
    /// Why a new value needs a restart of the daemon; `null` where a reload is enough.
    restart: Option<String>,
}

/// Prints every key with its value and where the value comes from, as `nohop run` would read it.
pub fn show(arguments: &RunArguments, json: bool) -> anyhow::Result<()> {
    let file = arguments.config.config.as_deref();
    let LoadedConfig { config, locations } =
        LoadedConfig::load(file, &arguments.flags(), &environment)?;
    let source = |key: &str| locations.get(key).map_or("default".into(), ToString::to_string);
    let mut settings: Vec<Setting> = values(&config)
        .into_iter()
        .map(|(key, value)| Setting {
            key: key.name.into(),
            value,
            source: source(key.name),
            restart: key.restart.map(str::to_owned),
        })
        .collect();
    if config.consul.auth.is_some() {
        let (key, value) = ("consul.auth", "(a user and password)".into());
        settings.push(Setting { key: key.into(), value, source: source(key), restart: None });
    }
    write(json, &settings, |settings| text(settings))
}

/// TOML with the sources as comments.
fn text(settings: &[Setting]) -> String {
    let lines = settings.iter().map(|Setting { key, value, source, .. }| {
        let line = format!("{key} = {}", toml(value));
        format!("{line:<47} # {source}\n")
    });
    lines.collect()
}
