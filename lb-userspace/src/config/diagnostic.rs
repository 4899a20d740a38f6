//! Problems of a configuration, with their places.

use std::fmt;
use std::path::PathBuf;

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Location {
    /// A line of the configuration file; lines count from 1.
    File {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
    },
    /// A flag, such as `--dns-listen`, or a variable of the environment.
    Outside(&'static str),
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Location::File { path, line } => write!(f, "{}:{line}", path.display()),
            Location::Outside(name) => f.write_str(name),
        }
    }
}

/// One mistake, with the fix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where the value stands; `None` when the file as a whole is meant.
    pub location: Option<Location>,
    /// The key, such as `dns.listen`; `None` where the text isn't TOML.
    pub key: Option<String>,
    /// The problem, with the fix.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(location) = &self.location {
            write!(f, "{location}: ")?;
        }
        // The name of a flag or a variable implies the key.
        match (&self.location, &self.key) {
            (Some(Location::Outside(_)), _) | (_, None) => {}
            (_, Some(key)) => write!(f, "{key}: ")?,
        }
        f.write_str(&self.what)
    }
}

/// All mistakes in a configuration, one line each, in the order of the file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n"))]
pub struct ConfigErrors(pub Vec<Problem>);
