//! `[balance]`: how the backend of a connection is chosen.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize, Serializer};

use super::text;
use super::toml_value::{Parsed, TomlValue};

/// The longest `balance.slow_start`, `eject.base` and `eject.max`.
const MAX: Duration = Duration::from_secs(60 * 60);

/// How the backend of a connection is chosen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BalanceConfig {
    /// The algorithm of services that name none.
    pub algorithm: BalanceAlgorithm,
    /// What `maglev` hashes.
    pub key: AffinityKey,
    /// The time in which a new backend comes to its full share, up to an hour; `None` for at once.
    #[serde(serialize_with = "text::write_optional_duration")]
    pub slow_start: Option<Duration>,
    /// The backends that come before the others.
    pub prefer: Preference,
    /// What ejects a backend, and for how long.
    pub eject: EjectConfig,
    /// What happens where no instance of a service may serve.
    pub all_critical: AllCritical,
    /// How long the last healthy instances serve with [`AllCritical::Keep`].
    #[serde(serialize_with = "text::write_duration")]
    pub keep_for: Duration,
    /// How long connections to a backend that leaves may stay open; `None` for as long as they like.
    #[serde(serialize_with = "text::write_optional_duration")]
    pub drain_deadline: Option<Duration>,
}

impl Default for BalanceConfig {
    fn default() -> BalanceConfig {
        BalanceConfig {
            algorithm: BalanceAlgorithm::Least,
            key: AffinityKey::Cgroup,
            slow_start: Some(Duration::from_secs(10)),
            prefer: Preference::None,
            eject: EjectConfig::default(),
            all_critical: AllCritical::Refuse,
            keep_for: Duration::from_secs(60),
            drain_deadline: None,
        }
    }
}

/// The algorithm by which a backend is chosen; docs/choice.md describes each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BalanceAlgorithm {
    /// At random, by weight.
    Random,
    /// In turn, by weight.
    RoundRobin,
    /// Of two random ones, the one with fewer open connections from this node for its weight.
    #[default]
    Least,
    /// Of two random ones, the quicker one for its open connections from this node.
    Latency,
    /// By a consistent hash of [`BalanceConfig::key`].
    Maglev,
}

impl BalanceAlgorithm {
    /// All of them.
    pub const ALL: [BalanceAlgorithm; 5] = [
        BalanceAlgorithm::Random,
        BalanceAlgorithm::RoundRobin,
        BalanceAlgorithm::Least,
        BalanceAlgorithm::Latency,
        BalanceAlgorithm::Maglev,
    ];

    /// Its name, as the configuration and Meta have it.
    pub fn name(self) -> &'static str {
        match self {
            BalanceAlgorithm::Random => "random",
            BalanceAlgorithm::RoundRobin => "round-robin",
            BalanceAlgorithm::Least => "least",
            BalanceAlgorithm::Latency => "latency",
            BalanceAlgorithm::Maglev => "maglev",
        }
    }
}

impl fmt::Display for BalanceAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for BalanceAlgorithm {
    type Err = String;

    /// Ignores blanks around it. Errors name the fix.
    fn from_str(text: &str) -> Result<BalanceAlgorithm, String> {
        let named = BalanceAlgorithm::ALL.into_iter().find(|it| it.name() == text.trim());
        named.ok_or_else(|| {
            let names = BalanceAlgorithm::ALL.map(|it| format!("`{it}`"));
            let [first @ .., last] = &names;
            format!("`{text}` is no algorithm: write {} or {last}", first.join(", "))
        })
    }
}

/// What `maglev` hashes of a connection: those that have it in common go to one backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AffinityKey {
    /// The client's cgroup.
    #[default]
    Cgroup,
    /// The client's network namespace.
    Netns,
    /// The address that the client's socket is bound to, or its network namespace where it is bound
    /// to none.
    Source,
}

/// The backends that come before a service's others, which are then its spare set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Preference {
    /// None: all are equal.
    #[default]
    None,
    /// Those of this node.
    Node,
    /// Those of this node's datacenter.
    Datacenter,
}

/// What happens where no instance of a service may serve any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AllCritical {
    /// Its connections are refused.
    #[default]
    Refuse,
    /// The last instances that did keep serving for [`BalanceConfig::keep_for`].
    Keep,
}

/// What ejects a backend, and for how long.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EjectConfig {
    /// Failures to connect in a row, refused ones included; 0 for never.
    pub failures: u8,
    /// Refused connections in a row; 0 for never.
    pub refused: u8,
    /// Silence, in multiples of the backend's connect time; 0 for never.
    pub silence: u8,
    /// The time of a first ejection: from a second to `max`.
    #[serde(serialize_with = "text::write_duration")]
    pub base: Duration,
    /// The longest time of an ejection, up to an hour.
    #[serde(serialize_with = "text::write_duration")]
    pub max: Duration,
    /// The part of a service's backends beyond which the spare set is used as well.
    pub share: Share,
}

impl Default for EjectConfig {
    fn default() -> EjectConfig {
        EjectConfig {
            failures: 3,
            refused: 1,
            silence: 20,
            base: Duration::from_secs(1),
            max: Duration::from_secs(5 * 60),
            share: Share { per_mille: 500 },
        }
    }
}

/// A part of a whole, written as a number from 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// The part in thousandths: 0..=1000.
    pub per_mille: u16,
}

impl Serialize for Share {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(f64::from(self.per_mille) / 1_000.0)
    }
}

/// A time up to an hour; an empty one or zero means none.
pub(super) fn slow_start(text: &str) -> Result<Option<Duration>, String> {
    if matches!(text, "" | "0s") { Ok(None) } else { up_to_an_hour(text).map(Some) }
}

/// A time; an empty one means none.
pub(super) fn drain_deadline(text: &str) -> Result<Option<Duration>, String> {
    if text.is_empty() { Ok(None) } else { text::duration(text).map(Some) }
}

fn up_to_an_hour(text: &str) -> Result<Duration, String> {
    match text::duration(text)? {
        time if time <= MAX => Ok(time),
        _ => Err(format!("'{text}' is out of range; write 1h or less")),
    }
}

/// A table of some of [`EjectConfig`]'s fields; the others have their defaults.
pub(super) fn eject(value: &TomlValue) -> Parsed<EjectConfig> {
    let mut eject = EjectConfig::default();
    let mut faults = Vec::new();
    for (name, entry) in value.entries()? {
        let read = match &*name {
            "failures" => entry.integer(0..=255).map(|n| eject.failures = n),
            "refused" => entry.integer(0..=255).map(|n| eject.refused = n),
            "silence" => entry.integer(0..=255).map(|n| eject.silence = n),
            "base" => entry.text(up_to_an_hour).map(|time| eject.base = time),
            "max" => entry.text(up_to_an_hour).map(|time| eject.max = time),
            "share" => entry.fraction().map(|per_mille| eject.share = Share { per_mille }),
            _ => entry
                .fault("unknown entry; failures, refused, silence, base, max and share are known"),
        };
        faults.extend(read.err().into_iter().flatten());
    }
    if !faults.is_empty() {
        return Err(faults);
    }
    if eject.base > eject.max {
        return value.fault("base is longer than max; write a base of max or less");
    }
    Ok(eject)
}
