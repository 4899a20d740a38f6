//! `nohop config`: checks, migrates or shows the configuration.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{fs, io};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use super::args::RunArguments;
use super::process::{USAGE, environment, print_error, write};
use crate::catalog;
use crate::config::keys::{toml, values};
use crate::config::migrate::{self, Migrated};
use crate::config::{Config, ConfigErrors, DEFAULT_PATH, Flag, LoadedConfig};
use crate::{durable, regular_file};

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

/// The result of `nohop config migrate`.
#[derive(Debug, Serialize, Deserialize)]
struct MigrationReport {
    file: PathBuf,
    /// Whether the file was written.
    applied: bool,
    /// Each with its line.
    changes: Vec<String>,
}

/// Gives the keys of a file their present names. It is written only if this version reads it then, as a
/// whole, and the former one stays beside it.
pub fn migrate(file: Option<&Path>, apply: bool, json: bool) -> anyhow::Result<ExitCode> {
    let file = file.unwrap_or(Path::new(DEFAULT_PATH));
    let before = regular_file::read_to_string(file)
        .with_context(|| format!("can't read {}; name a readable file", file.display()))?;
    let Migrated { text, changes } = migrate::migrate(&before);
    if let Err(errors) = LoadedConfig::parse(file, text.as_bytes(), &[], &environment) {
        print_error(&format!("{} is left as it is, since it has mistakes:", file.display()));
        return Err(errors.into());
    }
    let applied = apply && !changes.is_empty();
    if applied {
        replace(file, &text).with_context(|| format!("can't write {}", file.display()))?;
    }
    let report = MigrationReport { file: file.to_owned(), applied, changes };
    write(json, &report, migration_text)?;
    Ok(ExitCode::SUCCESS)
}

fn migration_text(report: &MigrationReport) -> String {
    let file = report.file.display();
    if report.changes.is_empty() {
        return format!("{file}: nothing to change\n");
    }
    let lines = report.changes.iter().map(|change| format!("{file}:{change}\n"));
    let end = match report.applied {
        true => format!("written; {file}.old is the former file\n"),
        false => "nothing was written: --apply writes it\n".to_owned(),
    };
    lines.chain([end]).collect()
}

/// Writes the file with the owner and the mode that it has, and keeps the former one.
fn replace(file: &Path, text: &str) -> io::Result<()> {
    // A link stays one.
    let file = fs::canonicalize(file)?;
    let beside = |ending: &str| {
        let mut name = file.clone().into_os_string();
        name.push(ending);
        PathBuf::from(name)
    };
    let metadata = fs::metadata(&file)?;
    fs::copy(&file, beside(".old"))?;
    durable::replace(&beside(".new"), &[text.as_bytes()])?;
    std::os::unix::fs::chown(beside(".new"), Some(metadata.uid()), Some(metadata.gid()))?;
    fs::set_permissions(beside(".new"), metadata.permissions())?;
    fs::rename(beside(".new"), &file)
}

/// A key with its value, as `nohop config show --json` prints it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Setting {
    /// The key, such as `dns.ttl`.
    key: String,
    /// The value; of a secret only that there is one.
    value: serde_json::Value,
    /// `default`, FILE:LINE, a variable of the environment, or a flag.
    source: String,
    /// Why a new value needs a restart of the daemon; `null` where a reload is enough.
    restart: Option<String>,
}

/// Every key with its value and where the value comes from, as `nohop run` would read it.
pub fn settings(file: Option<&Path>, flags: &[Flag]) -> Result<Vec<Setting>, ConfigErrors> {
    let LoadedConfig { config, locations } = LoadedConfig::load(file, flags, &environment)?;
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
    Ok(settings)
}

/// Prints them.
pub fn show(arguments: &RunArguments, json: bool) -> anyhow::Result<()> {
    let settings = settings(arguments.config.config.as_deref(), &arguments.flags())?;
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
