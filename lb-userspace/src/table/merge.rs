//! What a service's instances say of it: many voices in, one word out.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Instance, Ports, Protocols};

/// What an instance says of its service, in its own words: read, and judged, by the table. A source
/// leaves it empty for what bears the service's name and isn't the service (without the tag, or a
/// proxy of it).
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Says {
    /// The ports it is connected to at, such as `80,5432` or `any`.
    pub ports: Option<String>,
    /// The protocols it is connected to with: `tcp`, `udp` or `both`.
    pub protocol: Option<String>,
}

/// What counts of what the instances say, and what was odd about it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// The ports; `None` where nobody says a word that can be used.
    pub ports: Option<Ports>,
    /// The protocols, likewise.
    pub protocols: Option<Protocols>,
    /// Words that can't be used, and words that contradict each other, a sentence each.
    pub notes: Vec<String>,
}

/// Hears all instances, whatever their health: what a service is connected to at must not depend on it.
/// What isn't an instance of the service, such as a sidecar, has nothing to say (see [`Says`]).
pub fn hear(instances: &[Instance]) -> Heard {
    let voices: Vec<&Instance> = instances.iter().collect();
    let mut notes = Vec::new();
    let ports = elect("ports", &voices, |says| says.ports.as_deref(), &mut notes);
    let protocols = elect("protocols", &voices, |says| says.protocol.as_deref(), &mut notes);
    Heard { ports, protocols, notes }
}

/// The value that most give; among equals the one whose text is smallest.
fn elect<T: FromStr<Err = String> + Display>(
    what: &str,
    voices: &[&Instance],
    word: impl Fn(&Says) -> Option<&str>,
    notes: &mut Vec<String>,
) -> Option<T> {
    let mut votes: BTreeMap<String, (usize, T)> = BTreeMap::new();
    let mut bad: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for instance in voices {
        match word(&instance.says).map(str::parse::<T>) {
            // By what is meant, so that `80, 443` and `443,80` agree.
            Some(Ok(value)) => votes.entry(value.to_string()).or_insert((0, value)).0 += 1,
            Some(Err(problem)) => bad.entry(problem).or_default().push(&instance.id),
            None => {}
        }
    }
    for (problem, ids) in bad {
        notes.push(format!("the {what} given by {} don't count: {problem}", first(&ids)));
    }
    // The last of the greatest, and the texts run backwards.
    let winner = votes.iter().rev().max_by_key(|(_, (n_votes, _))| n_votes)?.0.clone();
    if votes.len() > 1 {
        let shown: Vec<_> = votes.iter().map(|(text, (n, _))| format!("`{text}` ({n})")).collect();
        notes.push(format!(
            "its instances give different {what}, {}: `{winner}` counts; give all the same",
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
    use crate::table::{Home, Standing};

    /// An instance for each `PORTS`, out where it begins with `!`; `-` says nothing.
    fn instances(words: &[&str]) -> Vec<Instance> {
        let instance = |(idx, word): (usize, &&str)| {
            let (standing, word) = match word.strip_prefix('!') {
                Some(word) => (Standing::Out("critical".into()), word),
                None => (Standing::Serving, *word),
            };
            let ports = (word != "-").then(|| word.to_owned());
            Instance {
                node: String::new(),
                id: format!("i{idx}"),
                address: String::new(),
                port: 80,
                weight: 1,
                local: false,
                home: Home::default(),
                node_address: None,
                may_be_local: false,
                standing,
                says: Says { ports, protocol: None },
            }
        };
        words.iter().enumerate().map(instance).collect()
    }

    #[test]
    fn many_voices_and_one_word() {
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
                    "its instances give different ports, `80` (2), `any` (1): `80` counts; give all \
                   the same",
                ],
            ),
            (&["!80"], Some("80"), &[]),
            (&["-", "!80"], Some("80"), &[]),
            (
                &["81", "80", "81"],
                Some("81"),
                &["its instances give different ports, `80` (1), `81` (2): `81` counts; give all \
                   the same"],
            ),
            (
                &["any", "81", "80"],
                Some("80"),
                &["its instances give different ports, `80` (1), `81` (1), `any` (1): `80` \
                   counts; give all the same"],
            ),
            (&["x"], None, &[&format!("the ports given by `i0` don't count: {bad}")]),
            (
                &["80", "x", "x", "x"],
                Some("80"),
                &[&format!("the ports given by `i1` and 2 more don't count: {bad}")],
            ),
        ];
        for (words, ports, notes) in rows {
            let heard = hear(&instances(words));
            assert_eq!(heard.ports, ports.map(|ports| ports.parse().unwrap()), "{words:?}");
            assert_eq!(heard.notes, *notes, "{words:?}");
        }
    }

    #[test]
    fn protocols_are_heard_alike() {
        let mut instances = instances(&["-", "-", "-"]);
        for (instance, protocol) in instances.iter_mut().zip(["udp", " both ", "both"]) {
            instance.says.protocol = Some(protocol.into());
        }
        let heard = hear(&instances);
        assert_eq!((heard.ports, heard.protocols), (None, Some(Protocols::Both)));
        assert!(heard.notes[0].contains("different protocols"), "{:?}", heard.notes);
    }
}
