//! A configuration while it is read, shared by its parsers.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use toml::Spanned;
use toml::de::{DeArray, DeValue};

use super::toml_value::InvalidValue;
use super::{Config, Location, Problem};

/// A key that the command line sets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flag {
    /// The flag, such as `--dns-listen`.
    pub name: &'static str,
    /// The key that it sets.
    pub key: &'static str,
    /// The value.
    pub value: FlagValue,
}

/// The value of a flag or a variable, as the file would have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FlagValue {
    /// `true` or `false`.
    Bool(bool),
    /// A string.
    Text(String),
    /// An array of strings.
    List(Vec<String>),
}

impl FlagValue {
    /// A path that a person wrote: a relative one is the working directory's.
    pub fn path(path: &str) -> FlagValue {
        let absolute = std::path::absolute(path);
        // Of the empty one there is none.
        FlagValue::Text(absolute.map_or(path.into(), |path| path.to_string_lossy().into_owned()))
    }

    /// As a value of the file.
    pub(super) fn toml(&self) -> DeValue<'_> {
        match self {
            FlagValue::Bool(flag) => DeValue::Boolean(*flag),
            FlagValue::Text(text) => DeValue::String(Cow::Borrowed(text)),
            FlagValue::List(texts) => {
                let mut array = DeArray::new();
                for text in texts {
                    array.push(Spanned::new(0..0, DeValue::String(Cow::Borrowed(text))));
                }
                DeValue::Array(array)
            }
        }
    }
}

/// A source by its name in the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum SourceName {
    Consul,
    File,
}

/// A configuration that is being read.
pub(super) struct ConfigBuilder {
    pub(super) config: Config,
    pub(super) source_names: Vec<SourceName>,
    /// `catalog.file`, for the source `file`.
    pub(super) catalog_file: Option<PathBuf>,
    /// Where each key that was given was given last.
    pub(super) locations: BTreeMap<&'static str, Location>,
    /// The keys whose value is wrong by itself.
    pub(super) faulty: BTreeSet<&'static str>,
    /// Whether the text could be parsed at all.
    pub(super) is_toml: bool,
    /// The lines of the text that couldn't.
    pub(super) bad_lines: BTreeSet<usize>,
    pub(super) path: PathBuf,
    /// Where the lines of the text end, in bytes.
    line_ends: Vec<usize>,
    pub(super) problems: Vec<Problem>,
}

impl ConfigBuilder {
    pub(super) fn new(path: &Path, text: &[u8]) -> ConfigBuilder {
        let ends = text.iter().enumerate().filter(|(_, byte)| **byte == b'\n');
        ConfigBuilder {
            config: Config::default(),
            source_names: vec![SourceName::Consul],
            catalog_file: None,
            locations: BTreeMap::new(),
            faulty: BTreeSet::new(),
            is_toml: true,
            bad_lines: BTreeSet::new(),
            path: path.to_owned(),
            line_ends: ends.map(|(offset, _)| offset).collect(),
            problems: Vec::new(),
        }
    }

    /// The line of a place in the text, in bytes; lines count from 1.
    pub(super) fn line(&self, offset: usize) -> usize {
        1 + self.line_ends.partition_point(|end| *end < offset)
    }

    pub(super) fn location(&self, offset: usize) -> Location {
        Location::File { path: self.path.clone(), line: self.line(offset) }
    }

    /// Adds a problem, unless its line isn't TOML, which is reported instead.
    pub(super) fn reject(&mut self, fault: InvalidValue) {
        let InvalidValue { key, offset, what } = fault;
        if !self.bad_lines.contains(&self.line(offset)) {
            let location = Some(self.location(offset));
            self.problems.push(Problem { location, key: Some(key), what });
        }
    }

    /// Notes that a flag or a variable sets a key, and the value's problem.
    pub(super) fn outside(
        &mut self,
        key: &'static str,
        name: &'static str,
        problems: impl IntoIterator<Item = String>,
    ) {
        let location = Location::Outside(name);
        self.locations.insert(key, location.clone());
        for what in problems {
            self.faulty.insert(key);
            let (location, key) = (Some(location.clone()), Some(key.into()));
            self.problems.push(Problem { location, key, what });
        }
    }

    /// Notes that values don't go together, where the first of the keys was given. Values that are
    /// wrong by themselves are left out.
    pub(super) fn conflict(&mut self, keys: &[&'static str], what: impl Into<String>) {
        if keys.iter().any(|key| self.faulty.contains(key)) {
            return;
        }
        let given = keys.iter().find(|key| self.locations.contains_key(**key));
        let key = given.or(keys.first()).map(|key| key.to_string());
        let location = given.and_then(|key| self.locations.get(key).cloned());
        self.problems.push(Problem { location, key, what: what.into() });
    }
}
