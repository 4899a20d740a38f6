//! `nohop config check FILE`: what is wrong with a configuration, before a daemon reads it.

use std::path::Path;
use std::process::ExitCode;

use serde::{Deserialize, Serialize};

use super::{USAGE, environment, say, write};
use crate::catalog;
use crate::config::{Config, Overrides};

/// What was found.
#[derive(Debug, Serialize, Deserialize)]
struct Report {
    ok: bool,
    /// Each with its place and the fix.
    problems: Vec<String>,
}

/// Reads the file as `nohop run --config FILE` would, with the environment of this process, and the
/// static catalog that it names; prints what is wrong with them.
pub fn config_check(file: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let problems = match Config::load(Some(file), Overrides::default(), &environment) {
        // A mistake in a static catalog keeps the daemon from starting as well.
        Ok(config) => match catalog::check(&config) {
            Ok(()) => Vec::new(),
            Err(error) => error.to_string().lines().map(str::to_owned).collect(),
        },
        Err(errors) => errors.0.iter().map(ToString::to_string).collect(),
    };
    let report = Report { ok: problems.is_empty(), problems };
    if json || report.ok {
        write(json, &report, |_| format!("{} is fine\n", file.display()))?;
    } else {
        report.problems.iter().for_each(|problem| say(problem));
    }
    Ok(if report.ok { ExitCode::SUCCESS } else { ExitCode::from(USAGE) })
}
