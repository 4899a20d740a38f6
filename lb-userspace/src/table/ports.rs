//! How a service is connected to: its ports and its transport protocols, and how both are written.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::config::MAX_PORTS;

/// The ports a service is connected to at.
///
/// As text `any`, or numbers with commas between them; in JSON `"any"`, or a list of numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ports {
    /// Every port.
    Any,
    /// These: sorted, none twice, never empty.
    Only(Arc<[u16]>),
}

impl Ports {
    /// These ports, in any order; at least one.
    pub fn only(ports: impl IntoIterator<Item = u16>) -> Ports {
        let mut ports: Vec<u16> = ports.into_iter().collect();
        ports.sort_unstable();
        ports.dedup();
        Ports::Only(ports.into())
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ports::Any => f.write_str("any"),
            Ports::Only(ports) => {
                let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
                f.write_str(&ports.join(","))
            }
        }
    }
}

impl FromStr for Ports {
    type Err = String;

    /// Ignores blanks. Errors name the fix.
    fn from_str(text: &str) -> Result<Ports, String> {
        if text.trim() == "any" {
            return Ok(Ports::Any);
        }
        // Digits alone: `parse` would take a sign too.
        let port = |text: &str| {
            let port = text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok());
            port.flatten().filter(|&port: &u16| port != 0)
        };
        let ports: Option<Vec<u16>> = text.split(',').map(|text| port(text.trim())).collect();
        let Some(ports) = ports else {
            return Err(format!(
                "`{text}` is no list of ports: write numbers from 1 to 65535 with commas between \
                 them, such as `80,5432`, or `any`"
            ));
        };
        match Ports::only(ports) {
            Ports::Only(ports) if ports.len() > MAX_PORTS => Err(format!(
                "it lists {} ports, and {MAX_PORTS} is the most: write fewer, or `any`",
                ports.len()
            )),
            ports => Ok(ports),
        }
    }
}

impl Serialize for Ports {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Ports::Any => serializer.serialize_str("any"),
            Ports::Only(ports) => serializer.collect_seq(ports.iter()),
        }
    }
}

impl<'de> Deserialize<'de> for Ports {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Ports, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Text(String),
            List(Vec<u16>),
        }
        match Written::deserialize(deserializer)? {
            Written::Text(text) => text.parse().map_err(serde::de::Error::custom),
            Written::List(ports) if ports.is_empty() => {
                Err(serde::de::Error::custom("no port at all: write at least one, or \"any\""))
            }
            Written::List(ports) => Ok(Ports::only(ports)),
        }
    }
}

/// The transport protocols a service is connected to with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocols {
    /// TCP alone.
    Tcp,
    /// UDP alone.
    Udp,
    /// TCP and UDP.
    Both,
}

impl Protocols {
    /// Whether TCP is among them.
    pub fn tcp(self) -> bool {
        matches!(self, Protocols::Tcp | Protocols::Both)
    }

    /// Whether UDP is among them.
    pub fn udp(self) -> bool {
        matches!(self, Protocols::Udp | Protocols::Both)
    }
}

impl fmt::Display for Protocols {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocols::Tcp => "tcp",
            Protocols::Udp => "udp",
            Protocols::Both => "both",
        })
    }
}

impl FromStr for Protocols {
    type Err = String;

    /// Ignores blanks around it. Errors name the fix.
    fn from_str(text: &str) -> Result<Protocols, String> {
        match text.trim() {
            "tcp" => Ok(Protocols::Tcp),
            "udp" => Ok(Protocols::Udp),
            "both" => Ok(Protocols::Both),
            _ => Err(format!("`{text}` is no protocol: write `tcp`, `udp` or `both`")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_as_text() {
        let many: Vec<String> = (1..=65).map(|port| port.to_string()).collect();
        let rows = [
            ("80", Ok("80")),
            ("5432, 80 ,5432", Ok("80,5432")),
            (" any ", Ok("any")),
            ("65535", Ok("65535")),
            ("0", Err("`0` is no list of ports")),
            ("65536", Err("`65536` is no list of ports")),
            ("+80", Err("`+80` is no list of ports")),
            ("80,", Err("`80,` is no list of ports")),
            ("80,any", Err("`80,any` is no list of ports")),
            ("", Err("`` is no list of ports")),
            (&many[..64].join(","), Ok(&many[..64].join(","))),
            (&many.join(","), Err("it lists 65 ports, and 64 is the most")),
        ];
        for (text, expected) in rows {
            match (text.parse::<Ports>(), expected) {
                (Ok(ports), expected) => assert_eq!(Ok(&*ports.to_string()), expected, "{text}"),
                (Err(what), Err(expected)) => assert!(what.starts_with(expected), "{text}: {what}"),
                (Err(what), Ok(_)) => panic!("{text}: {what}"),
            }
        }
    }

    #[test]
    fn ports_and_protocols_as_json() {
        for (ports, json) in [(Ports::Any, r#""any""#), (Ports::only([81, 80]), "[80,81]")] {
            assert_eq!(serde_json::to_string(&ports).unwrap(), json);
            assert_eq!(serde_json::from_str::<Ports>(json).unwrap(), ports);
        }
        assert!(serde_json::from_str::<Ports>("[]").is_err());
        for protocols in [Protocols::Tcp, Protocols::Udp, Protocols::Both] {
            let json = serde_json::to_string(&protocols).unwrap();
            assert_eq!(json, format!("\"{protocols}\""));
            assert_eq!(protocols.to_string().parse(), Ok(protocols));
        }
        assert!("TCP".parse::<Protocols>().is_err());
    }
}
