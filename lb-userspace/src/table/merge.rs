//! Merges what the instances of a service declare about it: the majority decides.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Instance, Ports, Protocols, PublicAddresses};
use crate::config::BalanceAlgorithm;

/// An instance's declarations about its service, as unparsed text. A source leaves them empty for an
/// instance without the tag and for a sidecar proxy, which have the service's name.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ServiceMeta {
    /// The service's ports, such as `80,5432` or `any`.
    pub ports: Option<String>,
    /// The protocols it is connected to with: `tcp`, `udp` or `both`.
    pub protocol: Option<String>,
    /// How the backend of a connection is chosen, such as `maglev`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub algorithm: Option<String>,
    /// The weight of this instance alone, instead of the source's own: 0 to 65535.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<String>,
    /// The public addresses of the service, such as `203.0.113.10:443`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub public: Option<String>,
    /// What is wrong with how they are given, a sentence each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
}

impl ServiceMeta {
    /// The weight, if one is given that is none.
    ///
    /// # Errors
    /// It isn't a number from 0 to 65535.
    pub fn weight(&self) -> Option<Result<u16, String>> {
        let text = self.weight.as_deref()?.trim();
        // Digits alone: `parse` would take a sign too.
        let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
        let weight = if is_number { text.parse().ok() } else { None };
        Some(weight.ok_or_else(|| format!("weight `{text}` isn't a number from 0 to 65535")))
    }
}

/// The values that apply to the service, and what was odd about the declarations.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct MergedMeta {
    /// The ports; `None` where no instance declares any that can be parsed.
    pub ports: Option<Ports>,
    /// The protocols, likewise.
    pub protocols: Option<Protocols>,
    /// The algorithm, likewise.
    pub algorithm: Option<BalanceAlgorithm>,
    /// The public addresses, likewise.
    pub public: Option<PublicAddresses>,
    /// Whether an algorithm is declared, and none that can be parsed.
    pub has_bad_algorithm: bool,
    /// Declarations that can't be parsed, and contradictions, a sentence each.
    pub notes: Vec<String>,
}

/// Merges the declarations of all instances, whatever their health: an outage must not move a service to
/// other ports.
pub fn merge_meta<'a>(instances: impl Iterator<Item = &'a Instance>) -> MergedMeta {
    let instances: Vec<&Instance> = instances.collect();
    let mut notes = Vec::new();
    let ports = majority("ports", &instances, |meta| meta.ports.as_deref(), &mut notes);
    let protocols = majority("protocols", &instances, |meta| meta.protocol.as_deref(), &mut notes);
    let algorithm =
        majority("algorithms", &instances, |meta| meta.algorithm.as_deref(), &mut notes);
    let public =
        majority("public addresses", &instances, |meta| meta.public.as_deref(), &mut notes);
    let declares = |instance: &&Instance| instance.meta.algorithm.is_some();
    let has_bad_algorithm = algorithm.is_none() && instances.iter().any(declares);
    let mut problems: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for instance in &instances {
        for problem in &instance.meta.problems {
            problems.entry(problem).or_default().push(&instance.id);
        }
    }
    notes.extend(problems.iter().map(|(problem, ids)| format!("{}: {problem}", first(ids))));
    MergedMeta { ports, protocols, algorithm, public, has_bad_algorithm, notes }
}

/// The most frequent value; of those equally frequent, the one whose text is smallest.
fn majority<T: FromStr<Err = String> + Display>(
    what: &str,
    instances: &[&Instance],
    declared: impl Fn(&ServiceMeta) -> Option<&str>,
    notes: &mut Vec<String>,
) -> Option<T> {
    let mut votes: BTreeMap<String, (usize, T)> = BTreeMap::new();
    let mut bad: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for instance in instances {
        match declared(&instance.meta).map(str::parse::<T>) {
            // By the parsed value, so that `80, 443` and `443,80` agree.
            Some(Ok(value)) => votes.entry(value.to_string()).or_insert((0, value)).0 += 1,
            Some(Err(problem)) => bad.entry(problem).or_default().push(&instance.id),
            None => {}
        }
    }
    for (problem, ids) in bad {
        notes.push(format!("the {what} given by {} are ignored: {problem}", first(&ids)));
    }
    // The last of the greatest, and the texts run backwards.
    let winner = votes.iter().rev().max_by_key(|(_, (n_votes, _))| n_votes)?.0.clone();
    if votes.len() > 1 {
        let shown: Vec<_> = votes.iter().map(|(text, (n, _))| format!("`{text}` ({n})")).collect();
        notes.push(format!(
            "its instances give different {what}, {}: `{winner}` applies; give all the same",
            shown.join(", ")
        ));
    }
    votes.remove(&winner).map(|(_, value)| value)
}

/// The first of many, and how many more there are.
fn first(ids: &[&str]) -> String {
    match ids {
        [] => String::new(),
        [id] => format!("`{id}`"),
        [id, others @ ..] => format!("`{id}` and {} more", others.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::HealthStatus;

    /// An instance for each `PORTS`, out where it begins with `!`; `-` declares nothing.
    fn instances(words: &[&str]) -> Vec<Instance> {
        let instance = |(idx, word): (usize, &&str)| {
            let (health, word) = match word.strip_prefix('!') {
                Some(word) => (HealthStatus::Out("critical".into()), word),
                None => (HealthStatus::Serving, *word),
            };
            let ports = (word != "-").then(|| word.to_owned());
            Instance {
                id: format!("i{idx}"),
                health,
                meta: ServiceMeta { ports, ..ServiceMeta::default() },
                ..Instance::fixture()
            }
        };
        words.iter().enumerate().map(instance).collect()
    }

    #[test]
    fn the_majority_decides() {
        let bad = "`x` is no list of ports: write numbers from 1 to 65535 with commas between \
                   them, such as `80,5432`, or `any`";
        let rows: &[(&[&str], Option<&str>, &[&str])] = &[
            (&[], None, &[]),
            (&["-", "-"], None, &[]),
            (&["-", "5432"], Some("5432"), &[]),
            (&["443, 80", "80,443"], Some("80,443"), &[]),
            (&["80", "!80", "!80"], Some("80"), &[]),
            (
                &["any", "!80", "!80"],
                Some("80"),
                &[
                    "its instances give different ports, `80` (2), `any` (1): `80` applies; give all \
                   the same",
                ],
            ),
            (&["!80"], Some("80"), &[]),
            (&["-", "!80"], Some("80"), &[]),
            (
                &["81", "80", "81"],
                Some("81"),
                &[
                    "its instances give different ports, `80` (1), `81` (2): `81` applies; give all \
                   the same",
                ],
            ),
            (
                &["any", "81", "80"],
                Some("80"),
                &["its instances give different ports, `80` (1), `81` (1), `any` (1): `80` \
                   applies; give all the same"],
            ),
            (&["x"], None, &[&format!("the ports given by `i0` are ignored: {bad}")]),
            (
                &["80", "x", "x", "x"],
                Some("80"),
                &[&format!("the ports given by `i1` and 2 more are ignored: {bad}")],
            ),
        ];
        for (words, ports, notes) in rows {
            let merged = merge_meta(instances(words).iter());
            assert_eq!(merged.ports, ports.map(|ports| ports.parse().unwrap()), "{words:?}");
            assert_eq!(merged.notes, *notes, "{words:?}");
        }
    }

    #[test]
    fn a_bad_algorithm_is_ignored_while_another_instance_gives_a_good_one() {
        let check = |words: &[&str], expected: Option<BalanceAlgorithm>, is_bad: bool| {
            let mut instances = instances(&vec!["-"; words.len()]);
            for (instance, word) in instances.iter_mut().zip(words) {
                instance.meta.algorithm = (*word != "-").then(|| (*word).into());
            }
            let merged = merge_meta(instances.iter());
            assert_eq!(
                (merged.algorithm, merged.has_bad_algorithm),
                (expected, is_bad),
                "{words:?}"
            );
            merged.notes
        };
        let (least, maglev) = (BalanceAlgorithm::Least, BalanceAlgorithm::Maglev);
        assert!(check(&["-", "-"], None, false).is_empty());
        assert!(check(&["-", " maglev "], Some(maglev), false).is_empty());
        assert_eq!(
            check(&["fast", "maglev"], Some(maglev), false),
            ["the algorithms given by `i0` are ignored: `fast` is no algorithm: write `random`, \
              `round-robin`, `least`, `latency` or `maglev`"]
        );
        assert_eq!(check(&["Least", "-"], None, true).len(), 1);
        let notes = check(&["least", "maglev", "least"], Some(least), false);
        assert!(notes[0].contains("`least` (2), `maglev` (1): `least` applies"), "{notes:?}");
    }

    #[test]
    fn problems_of_declarations_are_notes() {
        let mut instances = instances(&["-", "80", "80"]);
        instances[1].meta.problems = vec!["it is odd".into(), "it is bad".into()];
        instances[2].meta.problems = vec!["it is odd".into()];
        let merged = merge_meta(instances.iter());
        assert_eq!(merged.ports, Some(Ports::only([80])));
        assert_eq!(merged.notes, ["`i1`: it is bad", "`i1` and 1 more: it is odd"]);
    }

    #[test]
    fn weights_in_meta() {
        for (text, expected) in
            [("0", Some(0)), (" 65535 ", Some(65_535)), ("65536", None), ("-1", None), ("", None)]
        {
            let meta = ServiceMeta { weight: Some(text.into()), ..ServiceMeta::default() };
            assert_eq!(meta.weight().unwrap().ok(), expected, "{text}");
        }
        assert_eq!(ServiceMeta::default().weight(), None);
    }

    #[test]
    fn protocols_are_merged_alike() {
        let mut instances = instances(&["-", "-", "-"]);
        for (instance, protocol) in instances.iter_mut().zip(["udp", " both ", "both"]) {
            instance.meta.protocol = Some(protocol.into());
        }
        let merged = merge_meta(instances.iter());
        assert_eq!((merged.ports, merged.protocols), (None, Some(Protocols::Both)));
        assert!(merged.notes[0].contains("different protocols"), "{:?}", merged.notes);
    }
}
