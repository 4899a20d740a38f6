//! From a file, the environment and the flags to a checked configuration.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use toml::Spanned;
use toml::de::DeTable;

use super::builder::{ConfigBuilder, Flag, FlagValue, SourceName};
use super::keys::{KEYS, Key, is_other_section, unknown};
use super::toml_value::{InvalidValue, TomlValue, kind};
use super::{Config, ConfigErrors, DEFAULT_PATH, Location, Problem, SourceKind, consul, validate};
use crate::regular_file;

/// A configuration, and where its values come from.
#[derive(Clone, Debug)]
pub struct LoadedConfig {
    /// The configuration.
    pub config: Config,
    /// Where each value stands that isn't the default.
    pub locations: BTreeMap<&'static str, Location>,
    /// Whether there is a file.
    pub has_file: bool,
}

/// Reads the configuration of a daemon at its start, and at each reload. Only as long as no file was ever read
/// the default one may be missing: when it vanishes, what it has isn't given up.
#[derive(Debug)]
pub struct ConfigReader {
    path: PathBuf,
    is_required: AtomicBool,
    flags: Vec<Flag>,
}

impl ConfigReader {
    /// Of `path`, or the default file.
    pub fn new(path: Option<&Path>, flags: Vec<Flag>) -> ConfigReader {
        ConfigReader {
            path: path.unwrap_or(Path::new(DEFAULT_PATH)).to_owned(),
            is_required: AtomicBool::new(path.is_some()),
            flags,
        }
    }

    /// Of a file that may be missing, as the default one.
    #[cfg(test)]
    pub(super) fn optional(path: &Path) -> ConfigReader {
        ConfigReader { path: path.to_owned(), is_required: false.into(), flags: Vec::new() }
    }

    /// Reads it.
    ///
    /// # Errors
    /// As [`LoadedConfig::load`].
    pub fn read(&self, env: &dyn Fn(&str) -> Option<String>) -> Result<Config, ConfigErrors> {
        let is_required = self.is_required.load(Ordering::Relaxed);
        let loaded = LoadedConfig::read(&self.path, is_required, &self.flags, env)?;
        self.is_required.fetch_or(loaded.has_file, Ordering::Relaxed);
        Ok(loaded.config)
    }
}

impl Config {
    /// As [`LoadedConfig::load`], without the places of the values.
    ///
    /// # Errors
    /// As [`LoadedConfig::load`].
    pub fn load(
        path: Option<&Path>,
        flags: &[Flag],
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Config, ConfigErrors> {
        LoadedConfig::load(path, flags, env).map(|loaded| loaded.config)
    }
}

impl LoadedConfig {
    /// Reads the file, applies the environment and then the flags, and checks the result.
    ///
    /// Without a path, [`DEFAULT_PATH`] is read if it exists. Of the environment the CONSUL_*
    /// variables apply, as in Consul's own tools; they override the file, and flags override them.
    ///
    /// # Errors
    /// All mistakes together: what isn't TOML, unknown keys, wrong types, values out of range and
    /// values that contradict each other; or that the file can't be read.
    pub fn load(
        path: Option<&Path>,
        flags: &[Flag],
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<LoadedConfig, ConfigErrors> {
        let file = path.unwrap_or(Path::new(DEFAULT_PATH));
        LoadedConfig::read(file, path.is_some(), flags, env)
    }

    /// As [`LoadedConfig::load`], of a file that may be missing, or not.
    fn read(
        file: &Path,
        is_required: bool,
        flags: &[Flag],
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<LoadedConfig, ConfigErrors> {
        // A link that leads nowhere isn't missing.
        let is_missing = || fs::symlink_metadata(file).is_err();
        let bytes = match regular_file::read_or_null(file) {
            Ok(bytes) => Some(bytes),
            Err(error) if error.kind() == ErrorKind::NotFound && !is_required && is_missing() => {
                None
            }
            Err(error) => {
                let what = format!("can't read {}: {error}; name a readable file", file.display());
                return Err(ConfigErrors(vec![Problem { location: None, key: None, what }]));
            }
        };
        let has_file = bytes.is_some();
        let loaded = LoadedConfig::parse(file, &bytes.unwrap_or_default(), flags, env)?;
        Ok(LoadedConfig { has_file, ..loaded })
    }

    /// As [`LoadedConfig::load`], with the content of the file.
    pub(crate) fn parse(
        path: &Path,
        bytes: &[u8],
        flags: &[Flag],
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<LoadedConfig, ConfigErrors> {
        let mut builder = ConfigBuilder::new(path, bytes);
        match std::str::from_utf8(bytes) {
            Ok(text) => builder.read_file(text),
            Err(error) => {
                let location = builder.location(error.valid_up_to());
                builder.is_toml = false;
                let what = "not TOML: this isn't UTF-8; write the file in UTF-8".into();
                builder.problems.push(Problem { location: Some(location), key: None, what });
            }
        }
        // A value that a flag overrides, or no source uses, isn't checked.
        let sets_source = flags.iter().any(|flag| flag.key == "catalog.sources");
        if !sets_source && builder.source_names.contains(&SourceName::Consul) {
            let is_set = |key: &str| flags.iter().any(|flag| flag.key == key);
            consul::read_environment(&mut builder, env, &is_set);
        }
        for Flag { name, key, value } in flags {
            builder.apply(key, name, value);
        }
        builder.finish()
    }
}

impl ConfigBuilder {
    fn read_file(&mut self, text: &str) {
        let (document, errors) = DeTable::parse_recoverable(text);
        for error in errors {
            let offset = error.span().map_or(text.len(), |span| span.start);
            // The parser reports several errors for one mistake; the first of a line is the best.
            if self.bad_lines.insert(self.line(offset)) {
                let what = match (error.message(), error.span().and_then(|span| text.get(span))) {
                    ("duplicate key", Some(key)) => {
                        format!("not TOML: duplicate key {key}; remove one")
                    }
                    (message, _) => format!("not TOML: {message}"),
                };
                let location = Some(self.location(offset));
                self.problems.push(Problem { location, key: None, what });
            }
            self.is_toml = false;
        }
        for (name, value) in document.get_ref() {
            let name = name.get_ref().to_string();
            let is_section = KEYS.iter().any(|key| key.section() == Some(&name));
            match value.get_ref().as_table() {
                Some(table) if is_section || !table.is_empty() && is_other_section(&name) => {
                    for (key, value) in table {
                        let key = format!("{name}.{}", key.get_ref());
                        self.read_value(TomlValue { key, value });
                    }
                }
                _ if is_section => {
                    let found = kind(value.get_ref());
                    let what = format!("expected a table, found {found}; write [{name}]");
                    let offset = value.span().start;
                    self.reject(InvalidValue { key: name, offset, what });
                }
                _ => self.read_value(TomlValue { key: name, value }),
            }
        }
    }

    fn read_value(&mut self, value: TomlValue) {
        let offset = value.value.span().start;
        let Some(key) = Key::find(&value.key) else {
            let what = unknown(&value.key);
            return self.reject(InvalidValue { key: value.key, offset, what });
        };
        let location = self.location(offset);
        self.locations.insert(key.name, location);
        if let Err(faults) = (key.read)(self, &value) {
            self.faulty.insert(key.name);
            for fault in faults {
                self.reject(fault);
            }
        }
    }

    /// Applies the value of a flag or a variable.
    pub(super) fn apply(&mut self, key: &'static str, name: &'static str, value: &FlagValue) {
        let value = Spanned::new(0..0, value.toml());
        let value = TomlValue { key: key.to_owned(), value: &value };
        let parsed = match Key::find(key) {
            Some(key) => (key.read)(self, &value),
            None => value.fault(unknown(key)),
        };
        let faults = parsed.err().unwrap_or_default();
        self.outside(key, name, faults.into_iter().map(|fault| fault.what));
    }

    fn finish(mut self) -> Result<LoadedConfig, ConfigErrors> {
        // A file that was parsed in part can't be checked as a whole.
        if self.is_toml {
            self.choose_sources();
            validate::check(&mut self);
        }
        if self.problems.is_empty() {
            let (config, locations) = (self.config, self.locations);
            return Ok(LoadedConfig { config, locations, has_file: true });
        }
        self.problems.sort_by(|a, b| a.location.cmp(&b.location));
        Err(ConfigErrors(self.problems))
    }

    fn choose_sources(&mut self) {
        let has_file = self.source_names.contains(&SourceName::File);
        match (has_file, &self.catalog_file) {
            (true, None) => self.conflict(
                &["catalog.sources", "catalog.file"],
                "has \"file\", but catalog.file is empty; add file = \"/PATH\" under [catalog]",
            ),
            (false, Some(_)) => self.conflict(
                &["catalog.file", "catalog.sources"],
                "a file is read only with sources = [\"file\"]; add that, or remove this",
            ),
            _ => {}
        }
        let sources = self.source_names.iter().filter_map(|name| match name {
            SourceName::Consul => Some(SourceKind::Consul),
            SourceName::File => self.catalog_file.clone().map(SourceKind::File),
        });
        self.config.catalog.sources = sources.collect();
    }
}
