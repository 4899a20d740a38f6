//! The text of a static catalog, and everything that is wrong with it.

use std::cell::OnceCell;
use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::config::{BalanceAlgorithm, MAX_PORTS};
use crate::table::{
    HealthStatus, Instance, NodeIdentity, Ports, Protocols, PublicAddresses, ServiceMeta,
};

/// Something wrong with a static catalog.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// The line, from 1.
    pub line: usize,
    /// What is wrong there, with the service where there is one.
    pub what: String,
}

/// The services of a static catalog, by name, in lower case.
pub type Services = BTreeMap<Arc<str>, Vec<Instance>>;

/// Reads a static catalog. A text without the key `service` is an error, since that is what a file
/// looks like that is being written; a catalog without services is `service = []`.
///
/// # Errors
/// All errors, by line.
pub fn parse(text: &str) -> Result<Services, Vec<Diagnostic>> {
    let text = without_mark(text);
    let mut reader = Reader { text, diagnostics: Vec::new(), lines: OnceCell::new() };
    let (root, syntax) = DeTable::parse_recoverable(text);
    for error in syntax {
        reader.diagnostic(&error.span().unwrap_or(0..0), error.message().to_owned());
    }
    let mut services = Services::new();
    // After a syntax error the rest may be misread, and be blamed for what isn't wrong.
    if reader.diagnostics.is_empty() {
        services = reader.root(root.get_ref());
    }
    reader.diagnostics.sort_by_key(|diagnostic| diagnostic.line);
    if reader.diagnostics.is_empty() { Ok(services) } else { Err(reader.diagnostics) }
}

/// The text without the byte order mark that some editors begin a file with.
pub fn without_mark(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

struct Reader<'a> {
    text: &'a str,
    diagnostics: Vec<Diagnostic>,
    /// Where the lines end; looked for once, since a text may have a error in each of them.
    lines: OnceCell<Vec<usize>>,
}

impl Reader<'_> {
    fn diagnostic(&mut self, at: &Range<usize>, what: String) {
        let line = self.line(at);
        self.diagnostics.push(Diagnostic { line, what });
    }

    fn line(&self, at: &Range<usize>) -> usize {
        let ends = || self.text.match_indices('\n').map(|(at, _)| at).collect();
        1 + self.lines.get_or_init(ends).partition_point(|end| *end < at.start)
    }

    fn root(&mut self, root: &DeTable<'_>) -> Services {
        self.check_keys(root, &["service"], "");
        let Some(list) = root.get("service") else {
            self.diagnostic(
                &(0..0),
                "the key `service` is missing; a catalog without services is `service = []`".into(),
            );
            return Services::new();
        };
        let mut services = Services::new();
        let mut spans = BTreeMap::new();
        for (table, span) in self.tables(list, "`service`", "[[service]]") {
            let Some((name, instances)) = self.service(table, &span) else { continue };
            if let Some(first) = spans.insert(name.clone(), span.clone()) {
                let first = self.line(&first);
                self.diagnostic(
                    &span,
                    format!("service `{name}` is there twice, first in line {first}"),
                );
            }
            services.insert(name, instances);
        }
        services
    }

    fn service(
        &mut self,
        table: &DeTable<'_>,
        span: &Range<usize>,
    ) -> Option<(Arc<str>, Vec<Instance>)> {
        let name = match table.get("name").map(|name| (name.span(), name.get_ref().as_str())) {
            None => Err((span.clone(), "a service without `name`")),
            Some((span, None)) => Err((span, "`name` must be a string")),
            Some((span, Some(""))) => Err((span, "`name` is empty")),
            Some((_, Some(name))) => Ok(name.to_ascii_lowercase()),
        };
        let whose = match &name {
            Ok(name) => format!("service `{name}`: "),
            Err((span, what)) => {
                self.diagnostic(span, (*what).into());
                String::new()
            }
        };
        self.check_keys(
            table,
            &["name", "ports", "protocol", "algorithm", "public", "backend"],
            &whose,
        );
        let meta = ServiceMeta {
            ports: table.get("ports").and_then(|ports| self.ports(ports, &whose)),
            protocol: table.get("protocol").and_then(|protocol| self.protocol(protocol, &whose)),
            algorithm: table.get("algorithm").and_then(|given| self.algorithm(given, &whose)),
            public: table.get("public").and_then(|given| self.public(given, &whose)),
            ..ServiceMeta::default()
        };
        let mut instances: Vec<Instance> = Vec::new();
        let mut ids = HashSet::new();
        if let Some(list) = table.get("backend") {
            let what = format!("{whose}`backend`");
            for (table, span) in self.tables(list, &what, "[[service.backend]]") {
                let Some(instance) = self.backend(table, &span, &whose, &meta) else { continue };
                if !ids.insert(instance.id.clone()) {
                    let id = &instance.id;
                    self.diagnostic(&span, format!("{whose}backend {id} is there twice"));
                }
                instances.push(instance);
            }
        }
        instances.sort();
        Some((name.ok()?.into(), instances))
    }

    fn backend(
        &mut self,
        table: &DeTable<'_>,
        span: &Range<usize>,
        whose: &str,
        meta: &ServiceMeta,
    ) -> Option<Instance> {
        self.check_keys(table, &["address", "weight"], whose);
        let weight = table.get("weight").map_or(Some(1), |weight| {
            let number = weight.get_ref().as_integer();
            let number = number.and_then(|n| i64::from_str_radix(n.as_str(), n.radix()).ok());
            let number = number.filter(|number| (0..=65_535).contains(number));
            if number.is_none() {
                let given = &self.text[weight.span()];
                let what = format!("{whose}weight {given} isn't a whole number from 0 to 65535");
                self.diagnostic(&weight.span(), what);
            }
            number
        });
        let Some(address) = table.get("address") else {
            self.diagnostic(span, format!("{whose}a backend without `address`"));
            return None;
        };
        let parsed = address.get_ref().as_str().and_then(|text| text.parse::<SocketAddr>().ok());
        let Some(parsed) = parsed.filter(|address| address.port() != 0) else {
            let given = &self.text[address.span()];
            let what = format!(
                "{whose}address {given} isn't an IP address with a port, such as \
                 \"10.0.0.7:23456\" or \"[2001:db8::7]:23456\""
            );
            self.diagnostic(&address.span(), what);
            return None;
        };
        Some(Instance {
            node: String::new(),
            id: parsed.to_string(),
            address: parsed.ip().to_string(),
            port: parsed.port().into(),
            weight: weight?,
            local: true,
            node_identity: NodeIdentity::default(),
            node_address: None,
            is_checked: true,
            is_critical: false,
            created: 0,
            may_be_local: false,
            health: HealthStatus::Serving,
            meta: meta.clone(),
        })
    }

    /// The ports a service is connected to at, as text again, for the table to read.
    fn ports(&mut self, value: &Spanned<DeValue<'_>>, whose: &str) -> Option<String> {
        let port = |value: &Spanned<DeValue<'_>>| {
            let number = value.get_ref().as_integer()?;
            let number = i64::from_str_radix(number.as_str(), number.radix()).ok()?;
            u16::try_from(number).ok().filter(|&port| port != 0)
        };
        let ports = match value.get_ref() {
            DeValue::Array(list) if (1..=MAX_PORTS).contains(&list.len()) => {
                list.iter().map(port).collect::<Option<Vec<u16>>>().map(Ports::only)
            }
            DeValue::String(text) => (text == "any").then_some(Ports::Any),
            _ => None,
        };
        if ports.is_none() {
            let what = format!(
                "{whose}`ports` must be a list of numbers from 1 to 65535, at least one and at \
                 most {MAX_PORTS}, such as [5432], or \"any\""
            );
            self.diagnostic(&value.span(), what);
        }
        ports.map(|ports| ports.to_string())
    }

    /// How the backend of a connection is chosen, as text again, for the table to read.
    fn algorithm(&mut self, value: &Spanned<DeValue<'_>>, whose: &str) -> Option<String> {
        let given = value.get_ref().as_str().unwrap_or(&self.text[value.span()]);
        match given.parse::<BalanceAlgorithm>() {
            Ok(algorithm) => Some(algorithm.to_string()),
            Err(problem) => {
                self.diagnostic(&value.span(), format!("{whose}`algorithm`: {problem}"));
                None
            }
        }
    }

    /// The public addresses, as text again, for the table to read.
    fn public(&mut self, value: &Spanned<DeValue<'_>>, whose: &str) -> Option<String> {
        let given = value.get_ref().as_str().unwrap_or(&self.text[value.span()]);
        match given.parse::<PublicAddresses>() {
            Ok(public) => Some(public.to_string()),
            Err(problem) => {
                self.diagnostic(&value.span(), format!("{whose}`public`: {problem}"));
                None
            }
        }
    }

    /// The protocols a service is connected to with, as text again, for the table to read.
    fn protocol(&mut self, value: &Spanned<DeValue<'_>>, whose: &str) -> Option<String> {
        let protocols = value.get_ref().as_str().and_then(|text| text.parse::<Protocols>().ok());
        if protocols.is_none() {
            let what = format!("{whose}`protocol` must be \"tcp\", \"udp\" or \"both\"");
            self.diagnostic(&value.span(), what);
        }
        protocols.map(|protocols| protocols.to_string())
    }

    fn check_keys(&mut self, table: &DeTable<'_>, known: &[&str], whose: &str) {
        for key in table.keys() {
            let name: &str = key.get_ref();
            if !known.contains(&name) {
                let known = known.join("`, `");
                let what = format!("{whose}unknown key `{name}`; there is `{known}`");
                self.diagnostic(&key.span(), what);
            }
        }
    }

    fn tables<'t, 'i>(
        &mut self,
        list: &'t Spanned<DeValue<'i>>,
        what: &str,
        written: &str,
    ) -> Vec<(&'t DeTable<'i>, Range<usize>)> {
        let Some(entries) = list.get_ref().as_array() else {
            self.diagnostic(&list.span(), format!("{what} must be written {written}"));
            return Vec::new();
        };
        let mut tables = Vec::new();
        for entry in entries.iter() {
            match entry.get_ref().as_table() {
                Some(table) => tables.push((table, entry.span())),
                None => self.diagnostic(&entry.span(), format!("{what} must be written {written}")),
            }
        }
        tables
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_services_and_backends() {
        let services = parse(
            r#"
            [[service]]
            name = "HelloWorld"
            ports = [5432, 0x50]
            protocol = "both"
            algorithm = "maglev"
            public = "[2001:db8::1]:80, 203.0.113.1:80"
            [[service.backend]]
            address = "10.0.0.7:23456"
            weight = 0x10
            [[service.backend]]
            address = "127.0.0.1:80"
            [[service.backend]]
            address = "[2001:db8::7]:80"
            [[service]]
            name = "idle"
            ports = "any"
            "#,
        )
        .unwrap();
        let got: Vec<_> = services["helloworld"]
            .iter()
            .map(|i| (&*i.node, &*i.id, &*i.address, i.port, i.weight, i.local))
            .collect();
        assert_eq!(
            got,
            [
                ("", "10.0.0.7:23456", "10.0.0.7", 23456, 16, true),
                ("", "127.0.0.1:80", "127.0.0.1", 80, 1, true),
                ("", "[2001:db8::7]:80", "2001:db8::7", 80, 1, true)
            ]
        );
        let meta = ServiceMeta {
            ports: Some("80,5432".into()),
            protocol: Some("both".into()),
            algorithm: Some("maglev".into()),
            public: Some("203.0.113.1:80,[2001:db8::1]:80".into()),
            ..ServiceMeta::default()
        };
        assert!(services["helloworld"].iter().all(|instance| instance.meta == meta));
        assert!(services["idle"].is_empty());
        assert_eq!(parse("service = []"), Ok(Services::new()));
    }

    #[test]
    fn every_spelling_of_one_catalog_has_all_services() {
        let service = |name: &str| {
            format!("[[service]]\nname = \"{name}\"\nbackend = [{{ address = \"10.0.0.1:80\" }}]\n")
        };
        let (a, b, c) = (service("a"), service("b"), service("c"));
        let plain = format!("{a}{b}{c}");
        let indented: String = format!(
            "{a}{}",
            format!("{b}{c}").lines().map(|line| format!("  {line}\n")).collect::<String>()
        );
        let inline = |name: &str| {
            format!("{{ name = \"{name}\", backend = [{{ address = \"10.0.0.1:80\" }}] }}")
        };
        let texts = [
            plain.clone(),
            plain.replace('\n', "\r\n"),
            format!("\u{feff}{plain}"),
            format!("\u{feff}{}", plain.replace('\n', "\r\n")),
            format!("# ours\n\n{a}# [[service]]\n{b} # more\n{c}"),
            indented.clone(),
            indented.replace("  ", "\t"),
            plain.replace("[[service]]", "[[ service ]]"),
            plain.replace("[[service]]", " [[\tservice ]] # one"),
            plain.replace("[[service]]", "[[\"service\"]]"),
            format!("{a}\n  [[ 'service' ]]\n{}{c}", b.trim_start_matches("[[service]]\n")),
            format!("service = [{}, {}, {}]", inline("a"), inline("b"), inline("c")),
            format!(
                "service = [\n  {},\n  {}, # the second\n  {},\n]\n",
                inline("a"),
                inline("b"),
                inline("c")
            ),
            plain.replace("name", "\"name\"").replace("backend", "'backend'"),
            plain.replace(
                "backend = [{ address = \"10.0.0.1:80\" }]",
                "[[service.backend]]\naddress = \"10.0.0.1:80\"",
            ),
            plain
                .replace("name = \"a\"", "name = '''a'''")
                .replace("name = \"b\"", "name = \"\"\"\nb\"\"\""),
        ];
        let expected = parse(&plain).unwrap();
        assert_eq!(expected.len(), 3);
        for text in texts {
            assert_eq!(parse(&text), Ok(expected.clone()), "{text}");
        }
    }

    #[test]
    fn many_mistakes_and_backends_are_read_in_one_pass() {
        // A search for each from the text's start, or among all backends, would take minutes.
        let n = 20_000;
        let backends: String = (0..n)
            .map(|nth| format!("{{ address = \"10.0.{}.{}:80\" }},\n", nth >> 8, nth & 255))
            .collect();
        let text = format!("[[service]]\nname = \"a\"\nbackend = [\n{backends}]\n");
        assert_eq!(parse(&text).unwrap()["a"].len(), n);
        let diagnostics = parse(&text.replace("address", "adress")).unwrap_err();
        assert_eq!(diagnostics.len(), 2 * n);
        assert_eq!((diagnostics[0].line, diagnostics.last().unwrap().line), (4, n + 3));
    }

    #[test]
    fn names_every_mistake_with_its_line() {
        // The text of a catalog, and what is said of it, without the examples at the ends.
        let table: &[(&str, &[&str])] = &[
            ("", &["1: the key `service` is missing"]),
            ("service = 1", &["1: `service` must be written [[service]]"]),
            ("service = [1]", &["1: `service` must be written [[service]]"]),
            (
                "[[service]]\nname = \"a\"\n[[service]]\nname = \"A\"",
                &["3: service `a` is there twice, first in line 1"],
            ),
            ("[[service]]\nname = 3", &["2: `name` must be a string"]),
            ("[[service]]\nname = \"\"", &["2: `name` is empty"]),
            (
                "[[service]]\nport = 80\n[top]",
                &["1: a service without `name`", "2: unknown key `port`", "3: unknown key `top`"],
            ),
            (
                "[[service]]\nname = \"a\"\n[[service.backend]]\naddress = \"10.0.0.7:0\"\n\
                 weight = -1\nnode = \"n\"\n[[service.backend]]\naddress = \"b:80\"\n\
                 [[service.backend]]\naddress = \"10.0.0.7:1\"\nweight = 99999999999999999999\n\
                 [[service.backend]]\n[[service.backend]]\naddress = \"::1:80\"\nweight = \"1\"",
                &[
                    "4: service `a`: address \"10.0.0.7:0\" isn't an IP address with a port",
                    "5: service `a`: weight -1 isn't a whole number from 0 to 65535",
                    "6: service `a`: unknown key `node`",
                    "8: service `a`: address \"b:80\" isn't an IP address with a port",
                    "11: service `a`: weight 99999999999999999999 isn't a whole number",
                    "12: service `a`: a backend without `address`",
                    "14: service `a`: address \"::1:80\" isn't an IP address with a port",
                    "15: service `a`: weight \"1\" isn't a whole number",
                ],
            ),
            (
                "[[service]]\nname = \"a\"\nports = [80,\n0]\nprotocol = \"icmp\"\n\
                 [[service]]\nname = \"b\"\nports = []\nprotocol = 6\n\
                 [[service]]\nname = \"c\"\nports = \"all\"\n\
                 [[service]]\nname = \"d\"\nports = 80\n",
                &[
                    "3: service `a`: `ports` must be a list of numbers from 1 to 65535",
                    "5: service `a`: `protocol` must be \"tcp\", \"udp\" or \"both\"",
                    "8: service `b`: `ports` must be a list of numbers from 1 to 65535",
                    "9: service `b`: `protocol` must be",
                    "12: service `c`: `ports` must be",
                    "15: service `d`: `ports` must be",
                ],
            ),
            (
                "[[service]]\nname = \"a\"\nbackend = [{ address = \"1.2.3.4:5\" },\n\
                 { address = \"1.2.3.4:5\", weight = 2 }]",
                &["4: service `a`: backend 1.2.3.4:5 is there twice"],
            ),
            ("[[service]]\nname = \n\n[[service]]\nname", &["2: ", "5: "]),
        ];
        for (text, expected) in table {
            let got: Vec<String> = parse(text)
                .unwrap_err()
                .into_iter()
                .map(|diagnostic| format!("{}: {}", diagnostic.line, diagnostic.what))
                .collect();
            assert_eq!(got.len(), expected.len(), "{text}\n{got:#?}");
            for (got, expected) in got.iter().zip(*expected) {
                assert!(got.starts_with(expected), "{text}\n{got}\n{expected}");
            }
        }
    }
}
