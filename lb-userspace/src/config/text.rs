//! Short values of the configuration that aren't addresses: keywords, durations and paths.

use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use serde::de::value::{Error as WordError, StrDeserializer};
use serde::de::{DeserializeOwned, IntoDeserializer};
use serde::{Serialize, Serializer};

use super::toml_value::{Parsed, TomlValue};
use super::{Intercepted, MAX_EXCLUDED_CGROUPS, TraceAccess};

/// One of the keywords of an enum of the configuration.
pub(super) fn word<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let words: StrDeserializer<WordError> = text.into_deserializer();
    T::deserialize(words).map_err(|error| {
        let error = error.to_string();
        let (_, expected) = error.split_once("expected ").unwrap_or(("", &error));
        format!("'{text}' is invalid; write {expected}")
    })
}

const UNITS: [(&str, u64); 4] = [("d", 24 * 60 * 60), ("h", 60 * 60), ("m", 60), ("s", 1)];

/// A time such as `90s`, `15m` or `1h`: from a second to a year.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) =
        text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let unit = UNITS.iter().find(|(name, _)| *name == unit).map_or(0, |(_, seconds)| *seconds);
    match number.parse::<u64>().ok().and_then(|n| n.checked_mul(unit)) {
        Some(seconds @ 1..=31_536_000) => Ok(Duration::from_secs(seconds)),
        _ => Err(format!(
            "'{text}' isn't a duration; write one such as 90s, 15m, 1h or 2d, up to 365d"
        )),
    }
}

/// Writes a time as [`duration`] reads it.
pub(super) fn write_duration<S: Serializer>(time: &Duration, to: S) -> Result<S::Ok, S::Error> {
    let seconds = time.as_secs();
    let unit = UNITS.iter().find(|(_, unit)| seconds.is_multiple_of(*unit));
    unit.map_or(String::new(), |(name, unit)| format!("{}{name}", seconds / unit)).serialize(to)
}

/// Writes a time as [`duration`] reads it; none as an empty text.
pub(super) fn write_optional_duration<S: Serializer>(
    time: &Option<Duration>,
    to: S,
) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => write_duration(time, to),
        None => "".serialize(to),
    }
}

pub(super) fn not_empty(text: &str) -> Result<String, String> {
    if text.is_empty() { Err("is empty; write a value".into()) } else { Ok(text.into()) }
}

/// An absolute path; an empty one means none.
pub(super) fn path_or_none(text: &str) -> Result<Option<PathBuf>, String> {
    if text.is_empty() { Ok(None) } else { absolute(text).map(Some) }
}

pub(super) fn absolute(text: &str) -> Result<PathBuf, String> {
    if text.starts_with('/') {
        Ok(PathBuf::from(text))
    } else {
        Err(format!("'{text}' isn't an absolute path; write one that begins with /"))
    }
}

/// A directory, or `auto`.
pub(super) fn cgroup_or_auto(text: &str) -> Result<Option<PathBuf>, String> {
    if text == "auto" { Ok(None) } else { absolute(text).map(Some) }
}

pub(super) fn any(text: &str) -> Result<String, String> {
    Ok(text.to_owned())
}

/// Cgroups to exclude.
pub(super) fn cgroups(value: &TomlValue) -> Parsed<Vec<PathBuf>> {
    let cgroups = value.list_or_none(|each| each.text(cgroup))?;
    // The number of matches of a pattern is known to the running system alone.
    let is_pattern = |cgroup: &Path| {
        cgroup.as_os_str().as_encoded_bytes().iter().any(|byte| matches!(byte, b'*' | b'?'))
    };
    match cgroups.iter().filter(|cgroup| !is_pattern(cgroup)).count() {
        0..=MAX_EXCLUDED_CGROUPS => Ok(cgroups),
        n => value.fault(format!(
            "names {n} cgroups; at most {MAX_EXCLUDED_CGROUPS} can be excluded: name a cgroup that \
             several of them are below"
        )),
    }
}

/// Whether DNS queries are intercepted, or in which cgroups.
pub(super) fn intercept(value: &TomlValue) -> Parsed<Intercepted> {
    match value.flag() {
        Ok(flag) => Ok(Intercepted::Tasks(flag)),
        Err(_) if !value.is_list() => value.unexpected("true, false or an array of cgroups", None),
        Err(_) => value.list(|each| each.text(cgroup)).map(Intercepted::Cgroups),
    }
}

/// Whose clients may trace connections.
pub(super) fn trace(value: &TomlValue) -> Parsed<TraceAccess> {
    match value.flag() {
        Ok(true) => Ok(TraceAccess::Unix),
        Ok(false) => Ok(TraceAccess::Off),
        Err(_) => value.text(|text| match text {
            "tcp" => Ok(TraceAccess::Tcp),
            _ => Err(format!("'{text}' is neither true, false nor \"tcp\"; write one of them")),
        }),
    }
}

/// A cgroup other than the root, or a pattern.
fn cgroup(text: &str) -> Result<PathBuf, String> {
    let path = Path::new(text);
    if path.components().any(|part| part.as_os_str() == "**") {
        return Err(format!(
            "'{text}' has a '**', which would span directories; write a '*' for each level, as in \
             'nomad.slice/*/*.envoy-*.scope'"
        ));
    }
    let is_below = path.components().any(|part| matches!(part, Component::Normal(_)));
    if is_below && !path.components().any(|part| part == Component::ParentDir) {
        return Ok(path.to_owned());
    }
    Err(format!("'{text}' isn't a cgroup below the root; write one such as 'system.slice'"))
}
