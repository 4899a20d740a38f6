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
use crate::config::migrate::{self, Migrated, NameConflict};
use crate::config::{ConfigErrors, DEFAULT_PATH, Flag, LoadedConfig, Location, Problem};
use crate::{durable, regular_file};

/// The result of `nohop config check`.
#[derive(Debug, Serialize, Deserialize)]
struct ConfigReport {
    ok: bool,
    /// Each with its location and the fix.
    problems: Vec<String>,
    /// What static catalogs have that can't be served; the rest of them is.
    warnings: Vec<String>,
}

/// Reads the file as `nohop run --config FILE` would, with the environment of this process, and the
/// static catalog that it names; prints the problems of both.
pub fn check(file: Option<&Path>, json: bool) -> anyhow::Result<ExitCode> {
    let loaded = LoadedConfig::load(file, &[], &environment);
    let has_file = loaded.as_ref().map_or(true, |loaded| loaded.has_file);
    let lines = |text: String| text.lines().map(str::to_owned).collect::<Vec<_>>();
    let (problems, warnings) = match loaded {
        // A mistake in a static catalog keeps the daemon from starting as well.
        Ok(loaded) => match catalog::check(&loaded.config) {
            Ok(warnings) => (Vec::new(), warnings),
            Err(error) => (lines(error.to_string()), Vec::new()),
        },
        Err(errors) => (errors.0.iter().map(ToString::to_string).collect(), Vec::new()),
    };
    let report = ConfigReport { ok: problems.is_empty(), problems, warnings };
    if json || report.ok {
        let file = file.unwrap_or(Path::new(DEFAULT_PATH)).display();
        write(json, &report, |report| match has_file {
            true if report.warnings.is_empty() => format!("{file}: no problems\n"),
            true => format!("{file}: can be used; see the warnings\n"),
            false => format!("there is no {file}: the defaults apply\n"),
        })?;
    }
    if !json {
        report.problems.iter().for_each(|problem| print_error(problem));
        let warnings = report.warnings.iter().map(|warning| format!("warning: {warning}"));
        warnings.for_each(|warning| print_error(&warning));
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
    /// Where the former file is, once the new one was written.
    former: Option<PathBuf>,
}

/// Gives the keys of a file their present names. It is written only if this version reads it then, as a
/// whole, and the former one stays beside it.
pub fn migrate(file: Option<&Path>, apply: bool, json: bool) -> anyhow::Result<ExitCode> {
    let file = file.unwrap_or(Path::new(DEFAULT_PATH));
    let mistake = |line: Option<usize>, what: String| {
        let location = line.map(|line| Location::File { path: file.to_owned(), line });
        ConfigErrors(vec![Problem { location, key: None, what }])
    };
    let before = regular_file::read_to_string(file).map_err(|error| {
        mistake(None, format!("can't read {}: {error}; name a readable file", file.display()))
    })?;
    let Migrated { text, changes, conflict } = migrate::migrate(&before);
    let result = match conflict {
        Some(NameConflict { line, what }) => Err(mistake(Some(line), what)),
        None => LoadedConfig::parse(file, text.as_bytes(), &[], &environment).map(drop),
    };
    if let Err(errors) = result {
        print_error(&format!("{} is left as it is, since it has mistakes:", file.display()));
        return Err(errors.into());
    }
    let mut report =
        MigrationReport { file: file.to_owned(), applied: false, changes, former: None };
    if apply && !report.changes.is_empty() {
        let former = replace(file, &text);
        report.former = Some(former.with_context(|| format!("can't write {}", file.display()))?);
        report.applied = true;
    }
    write(json, &report, migration_text)?;
    Ok(ExitCode::SUCCESS)
}

fn migration_text(report: &MigrationReport) -> String {
    let file = report.file.display();
    if report.changes.is_empty() {
        return format!("{file}: nothing to change\n");
    }
    let lines = report.changes.iter().map(|change| format!("{file}:{change}\n"));
    let end = match &report.former {
        Some(former) => format!("written; {} is the former file\n", former.display()),
        None => "nothing was written: --apply writes it\n".to_owned(),
    };
    lines.chain([end]).collect()
}

/// Writes the file with the owner and the mode that it has. The former one stays, as it is, under another name,
/// which is returned.
fn replace(file: &Path, text: &str) -> io::Result<PathBuf> {
    // A link stays one.
    let file = fs::canonicalize(file)?;
    let beside = |ending: &str| {
        let mut name = file.clone().into_os_string();
        name.push(ending);
        PathBuf::from(name)
    };
    let metadata = fs::metadata(&file)?;
    let new = beside(".new");
    durable::replace(&new, &[text.as_bytes()])?;
    std::os::unix::fs::chown(&new, Some(metadata.uid()), Some(metadata.gid()))?;
    fs::set_permissions(&new, metadata.permissions())?;
    // An earlier one, of which there may be several, isn't overwritten.
    let mut former = beside(".old");
    let mut n_taken = 0;
    while let Err(error) = fs::hard_link(&file, &former) {
        if error.kind() != io::ErrorKind::AlreadyExists {
            return Err(error);
        }
        n_taken += 1;
        former = beside(&format!(".old.{n_taken}"));
    }
    fs::rename(&new, &file)?;
    Ok(former)
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
    let LoadedConfig { config, locations, .. } = LoadedConfig::load(file, flags, &environment)?;
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
