//! From a file, the environment and the flags to a checked configuration.

use std::collections::BTreeMap;
use std::path::Path;

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
        let bytes = match regular_file::read_or_null(file) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && path.is_none() => {
                Vec::new()
            }
            Err(error) => {
                let what = format!("can't read {}: {error}; name a readable file", file.display());
                return Err(ConfigErrors(vec![Problem { location: None, key: None, what }]));
            }
        };
        LoadedConfig::parse(file, &bytes, flags, env)
    }

    /// As [`LoadedConfig::load`], with the content of the file.
    pub(crate) fn parse(
        path: &Path,
        bytes: &[u8],
        flags: &[Flag],
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<LoadedConfig, ConfigErrors> {
        let mut builder = ConfigBuilder::new(path);
        match std::str::from_utf8(bytes) {
            Ok(text) => builder.read_file(text),
            Err(error) => {
                let location = builder.location(bytes, error.valid_up_to());
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
        let mut bad_lines = Vec::new();
        for error in errors {
            let offset = error.span().map_or(text.len(), |span| span.start);
            let location = self.location(text.as_bytes(), offset);
            // The parser reports several errors for one mistake; the first of a line is the best.
            if !bad_lines.contains(&location) {
                let what = match (error.message(), error.span().and_then(|span| text.get(span))) {
                    ("duplicate key", Some(key)) => {
                        format!("not TOML: duplicate key {key}; remove one")
                    }
                    (message, _) => format!("not TOML: {message}"),
                };
                let location = Some(location.clone());
                self.problems.push(Problem { location, key: None, what });
            }
            bad_lines.push(location);
            self.is_toml = false;
        }
        for (name, value) in document.get_ref() {
            let name = name.get_ref().to_string();
            let is_section = KEYS.iter().any(|key| key.section() == Some(&name));
            match value.get_ref().as_table() {
                Some(table) if is_section || !table.is_empty() && is_other_section(&name) => {
                    for (key, value) in table {
                        let key = format!("{name}.{}", key.get_ref());
                        self.read_value(text, &bad_lines, TomlValue { key, value });
                    }
                }
                _ if is_section => {
                    let found = kind(value.get_ref());
                    let what = format!("expected a table, found {found}; write [{name}]");
                    let offset = value.span().start;
                    self.reject(text, &bad_lines, InvalidValue { key: name, offset, what });
                }
                _ => self.read_value(text, &bad_lines, TomlValue { key: name, value }),
            }
        }
    }

    fn read_value(&mut self, text: &str, bad_lines: &[Location], value: TomlValue) {
        let offset = value.value.span().start;
        let Some(key) = Key::find(&value.key) else {
            let what = unknown(&value.key);
            return self.reject(text, bad_lines, InvalidValue { key: value.key, offset, what });
        };
        let location = self.location(text.as_bytes(), offset);
        self.locations.insert(key.name, location);
        if let Err(faults) = (key.read)(self, &value) {
            self.faulty.insert(key.name);
            for fault in faults {
                self.reject(text, bad_lines, fault);
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
            return Ok(LoadedConfig { config: self.config, locations: self.locations });
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
