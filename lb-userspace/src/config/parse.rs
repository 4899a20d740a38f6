//! From a file, the environment and the flags to a checked configuration.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;
use toml::de::DeTable;

use super::toml_value::{Fault, Read, Value, kind, line};
use super::{
    AddressChoice, AdminAddress, Allowed, Config, ConfigErrors, DEFAULT_PATH, Expired, Forward,
    HealthPolicy, MAX_EXCLUDED_CGROUPS, OnExit, Place, Problem, Source, Token, Unrouted,
    WatchPolicy, address, consul, validate,
};

/// What the command line says in place of the file; each is a flag of `nohop run`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// `--cgroup DIR`
    pub cgroup: Option<PathBuf>,
    /// `--bpffs DIR`
    pub bpffs: Option<PathBuf>,
    /// `--state-dir DIR`
    pub state_dir: Option<PathBuf>,
    /// `--dns-listen ADDR:PORT`, each; empty when it wasn't given.
    pub dns_listen: Vec<String>,
    /// `--admin-listen unix:PATH|ADDR:PORT`, each; empty when it wasn't given.
    pub admin_listen: Vec<String>,
    /// `--catalog FILE`
    pub catalog: Option<PathBuf>,
    /// `--consul-addr URL`
    pub consul_addr: Option<String>,
    /// `--on-exit keep|detach`
    pub on_exit: Option<String>,
    /// `--shadow`
    pub shadow: bool,
}

impl Config {
    /// Reads the file, then what the environment and the flags say in its place, and checks it all.
    ///
    /// Without a path, [`DEFAULT_PATH`] is read where it exists. Of the environment, the CONSUL_*
    /// variables count, as in Consul's own tools; they beat the file and lose to flags.
    ///
    /// # Errors
    /// Everything that is wrong, together: what isn't TOML, unknown keys, wrong types, values out
    /// of range and values that contradict each other; or that the file can't be read.
    pub fn load(
        path: Option<&Path>,
        overrides: Overrides,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Config, ConfigErrors> {
        let (path, is_explicit) = match path {
            Some(path) => (path, true),
            None => (Path::new(DEFAULT_PATH), false),
        };
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !is_explicit => {
                Vec::new()
            }
            Err(error) => {
                let what = format!(
                    "can't read {}: {error}; name a file that can be read with --config",
                    path.display()
                );
                return Err(ConfigErrors(vec![Problem { place: None, key: None, what }]));
            }
        };
        Config::parse(path, &bytes, overrides, env)
    }

    /// As [`Config::load`], with what the file `path` holds.
    pub(crate) fn parse(
        path: &Path,
        bytes: &[u8],
        overrides: Overrides,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Config, ConfigErrors> {
        let mut draft = Draft { path: path.to_owned(), ..Draft::default() };
        match std::str::from_utf8(bytes) {
            Ok(text) => draft.read_file(text),
            Err(error) => {
                let place = draft.place(bytes, error.valid_up_to());
                draft.is_toml = false;
                draft.problems.push(Problem {
                    place: Some(place),
                    key: None,
                    what: "not TOML: this isn't UTF-8; write the file in UTF-8".into(),
                });
            }
        }
        draft.read_environment(env, &overrides);
        draft.read_overrides(overrides);
        draft.finish()
    }
}

/// A configuration that is being read.
pub(super) struct Draft {
    pub(super) config: Config,
    /// `catalog.file`, which counts when `catalog.source` is `file`.
    catalog_file: Option<PathBuf>,
    source_is_file: bool,
    /// Where each key that was given was given last.
    pub(super) places: BTreeMap<&'static str, Place>,
    /// The keys whose value is wrong by itself.
    pub(super) faulty: BTreeSet<&'static str>,
    /// Whether the text could be parsed at all.
    is_toml: bool,
    path: PathBuf,
    pub(super) problems: Vec<Problem>,
}

impl Default for Draft {
    fn default() -> Self {
        Draft {
            config: Config::default(),
            catalog_file: None,
            source_is_file: false,
            places: BTreeMap::new(),
            faulty: BTreeSet::new(),
            is_toml: true,
            path: PathBuf::new(),
            problems: Vec::new(),
        }
    }
}

/// Puts a value in its place in the draft.
pub(super) type Apply = fn(&mut Draft, &Value) -> Read<()>;

/// Every key of the file.
pub(super) const KEYS: &[(&str, Apply)] = &[
    ("cgroup", |draft, value| {
        let dir = value.text(|text| match text {
            "auto" => Ok(None),
            dir => full_path(dir).map(Some),
        });
        set(&mut draft.config.cgroup, dir)
    }),
    ("bpffs", |draft, value| set(&mut draft.config.bpffs, value.text(full_path))),
    ("state_dir", |draft, value| set(&mut draft.config.state_dir, value.text(full_path))),
    ("on_exit", |draft, value| set(&mut draft.config.on_exit, value.text(str::parse::<OnExit>))),
    ("shadow", |draft, value| set(&mut draft.config.shadow, value.flag())),
    ("catalog.source", |draft, value| {
        let is_file = value.text(|source| match source {
            "consul" => Ok(false),
            "file" => Ok(true),
            _ => Err(format!("'{source}' is no source; write \"consul\" or \"file\"")),
        });
        set(&mut draft.source_is_file, is_file)
    }),
    ("catalog.file", |draft, value| {
        let file = value.text(|file| Ok(PathBuf::from(file)))?;
        draft.catalog_file = (!file.as_os_str().is_empty()).then_some(file);
        Ok(())
    }),
    ("catalog.tag", |draft, value| set(&mut draft.config.catalog.tag, value.text(not_empty))),
    ("catalog.meta", |draft, value| {
        let meta = value.table(not_empty, |wanted| wanted.text(|text| Ok(text.to_owned())));
        set(&mut draft.config.catalog.meta, meta)
    }),
    ("catalog.health", |draft, value| {
        let health = value.text(|health| match health {
            "passing" => Ok(HealthPolicy::Passing),
            "warning" => Ok(HealthPolicy::Warning),
            _ => Err(format!("'{health}' can't be done; write \"passing\" or \"warning\"")),
        });
        set(&mut draft.config.catalog.health, health)
    }),
    ("catalog.address", |draft, value| {
        set(&mut draft.config.catalog.address, value.text(str::parse::<AddressChoice>))
    }),
    ("catalog.watch", |draft, value| {
        let watch = value.text(|watch| match watch {
            "auto" => Ok(WatchPolicy::Auto),
            "used" => Ok(WatchPolicy::Used),
            "all" => Ok(WatchPolicy::All),
            _ => Err(format!("'{watch}' can't be done; write \"auto\", \"used\" or \"all\"")),
        });
        set(&mut draft.config.catalog.watch, watch)
    }),
    ("catalog.max_age", |draft, value| {
        set(&mut draft.config.catalog.max_age, value.text(duration))
    }),
    ("catalog.expired", |draft, value| {
        let expired = value.text(|expired| match expired {
            "serve" => Ok(Expired::Serve),
            "refuse" => Ok(Expired::Refuse),
            _ => Err(format!("'{expired}' can't be done; write \"serve\" or \"refuse\"")),
        });
        set(&mut draft.config.catalog.expired, expired)
    }),
    ("consul.address", |draft, value| {
        set(&mut draft.config.consul.address, value.text(address::consul))
    }),
    ("consul.token_file", |draft, value| {
        draft.config.consul.token = consul::path(value)?.map(Token::File);
        Ok(())
    }),
    ("consul.datacenter", |draft, value| {
        let datacenter = value.text(|text| consul::name(text, "datacenter"));
        set(&mut draft.config.consul.datacenter, datacenter)
    }),
    ("consul.namespace", |draft, value| {
        let namespace = value.text(|text| consul::name(text, "namespace"));
        set(&mut draft.config.consul.namespace, namespace)
    }),
    ("consul.partition", |draft, value| {
        let partition = value.text(|text| consul::name(text, "partition"));
        set(&mut draft.config.consul.partition, partition)
    }),
    ("consul.ca_file", |draft, value| {
        set(&mut draft.config.consul.tls.ca_file, consul::path(value))
    }),
    ("consul.ca_path", |draft, value| {
        set(&mut draft.config.consul.tls.ca_path, consul::path(value))
    }),
    ("consul.cert_file", |draft, value| {
        set(&mut draft.config.consul.tls.cert_file, consul::path(value))
    }),
    ("consul.key_file", |draft, value| {
        set(&mut draft.config.consul.tls.key_file, consul::path(value))
    }),
    ("consul.tls_server_name", |draft, value| {
        set(&mut draft.config.consul.tls.server_name, value.text(consul::server_name))
    }),
    ("consul.verify", |draft, value| set(&mut draft.config.consul.tls.verify, value.flag())),
    ("consul.max_connections", |draft, value| {
        set(&mut draft.config.consul.max_connections, value.integer(4..=65_536))
    }),
    ("vip.pool", |draft, value| set(&mut draft.config.vip.pool, value.text(address::pool))),
    ("vip.pool6", |draft, value| {
        let pool6 = value.text(|text| match text {
            "" => Ok(None),
            pool6 => address::pool6(pool6).map(Some),
        });
        set(&mut draft.config.vip.pool6, pool6)
    }),
    ("vip.ports", |draft, value| {
        set(&mut draft.config.vip.ports, value.list(|port| port.integer(1..=65_535)))
    }),
    ("vip.pins", |draft, value| {
        let pins = value.table(address::service_name, |pin| pin.text(address::pin));
        set(&mut draft.config.vip.pins, pins)
    }),
    ("dns.listen", |draft, value| {
        let listen = value.list(|each| each.text(address::socket_address));
        set(&mut draft.config.dns.listen, listen)
    }),
    ("dns.domain", |draft, value| set(&mut draft.config.dns.domain, value.text(address::domain))),
    ("dns.ttl", |draft, value| set(&mut draft.config.dns.ttl, value.integer(0..=86_400))),
    ("dns.forward", |draft, value| set(&mut draft.config.dns.forward, forward(value))),
    ("dns.routes", |draft, value| {
        let routes = value.table(address::domain, |server| server.text(address::nameserver));
        set(&mut draft.config.dns.routes, routes)
    }),
    ("dns.unrouted", |draft, value| {
        let unrouted = value.text(|unrouted| match unrouted {
            "nxdomain" => Ok(Unrouted::Nxdomain),
            "forward" => Ok(Unrouted::Forward),
            _ => Err(format!("'{unrouted}' can't be done; write \"nxdomain\" or \"forward\"")),
        });
        set(&mut draft.config.dns.unrouted, unrouted)
    }),
    ("dns.allow", |draft, value| {
        set(&mut draft.config.dns.allow, value.list_or_none(|each| each.text(allowed)))
    }),
    ("dns.client_rate", |draft, value| {
        set(&mut draft.config.dns.client_rate, value.integer(0..=10_000_000))
    }),
    ("datapath.max_services", |draft, value| {
        set(&mut draft.config.datapath.max_services, value.integer(1..=1_000_000))
    }),
    ("datapath.max_backends", |draft, value| {
        set(&mut draft.config.datapath.max_backends, value.integer(1..=8_000_000))
    }),
    ("datapath.exclude_cgroups", |draft, value| {
        let cgroups = value.list_or_none(|each| each.text(cgroup))?;
        // How many a pattern matches only the running system can tell.
        let n_named = cgroups.iter().filter(|cgroup| !is_pattern(cgroup)).count();
        let cgroups = match n_named {
            0..=MAX_EXCLUDED_CGROUPS => Ok(cgroups),
            _ => value.fault(format!(
                "names {n_named} cgroups; {MAX_EXCLUDED_CGROUPS} at most can be excluded: name a \
                 cgroup that several of them are below"
            )),
        };
        set(&mut draft.config.datapath.exclude_cgroups, cgroups)
    }),
    ("admin.listen", |draft, value| {
        let listen = value.list(|each| each.text(str::parse::<AdminAddress>));
        set(&mut draft.config.admin.listen, listen)
    }),
    ("admin.hosts", |draft, value| {
        let hosts = value.list_or_none(|each| each.text(address::domain));
        set(&mut draft.config.admin.hosts, hosts)
    }),
    ("datapath.algorithm", later),
];

fn set<T>(target: &mut T, value: Read<T>) -> Read<()> {
    *target = value?;
    Ok(())
}

fn later(_: &mut Draft, value: &Value) -> Read<()> {
    value.fault("not in this version; remove it")
}

/// A time such as `90s`, `15m` or `1h`: from a second to a year.
fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) =
        text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let unit = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 60 * 60,
        "d" => 24 * 60 * 60,
        _ => 0,
    };
    let seconds = number.parse::<u64>().ok().and_then(|n| n.checked_mul(unit));
    match seconds {
        Some(seconds @ 1..=31_536_000) => Ok(Duration::from_secs(seconds)),
        _ => Err(format!("'{text}' is no time; write one such as 90s, 15m, 1h or 2d, up to 365d")),
    }
}

fn not_empty(text: &str) -> Result<String, String> {
    if text.is_empty() { Err("is empty; write a value".into()) } else { Ok(text.into()) }
}

fn full_path(text: &str) -> Result<PathBuf, String> {
    if text.starts_with('/') {
        Ok(PathBuf::from(text))
    } else {
        Err(format!("'{text}' is no full path; write one that begins with /"))
    }
}

/// Whether a cgroup is given by a pattern.
fn is_pattern(cgroup: &Path) -> bool {
    cgroup.as_os_str().as_encoded_bytes().iter().any(|byte| matches!(byte, b'*' | b'?'))
}

/// A cgroup other than the root, or a pattern. What it matches only the kernel side can tell.
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
    Err(format!("'{text}' names no cgroup below the root; write one such as 'system.slice'"))
}

impl FromStr for OnExit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "keep" => Ok(OnExit::Keep),
            "detach" => Ok(OnExit::Detach),
            _ => Err(format!("'{text}' can't be done; write keep or detach")),
        }
    }
}

impl FromStr for AddressChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "lan" => Ok(AddressChoice::Lan),
            "wan" => Ok(AddressChoice::Wan),
            "lan_ipv4" => Ok(AddressChoice::LanIpv4),
            "lan_ipv6" => Ok(AddressChoice::LanIpv6),
            "wan_ipv4" => Ok(AddressChoice::WanIpv4),
            "wan_ipv6" => Ok(AddressChoice::WanIpv6),
            _ => Err(format!(
                "'{text}' is no choice; write \"lan\", \"wan\", or one of them with _ipv4 or _ipv6"
            )),
        }
    }
}

/// A network, or those that this host is in.
fn allowed(text: &str) -> Result<Allowed, String> {
    if text == "local" {
        return Ok(Allowed::Local);
    }
    let network = text.parse().or_else(|_| text.parse().map(|ip: IpAddr| ip.into()));
    network
        .map(|network: IpNet| Allowed::Network(network.trunc()))
        .map_err(|_| format!("'{text}' is no network; write one such as 10.0.0.0/8, or \"local\""))
}

fn forward(value: &Value) -> Read<Forward> {
    if value.is_list() {
        return value.list(|server| server.text(address::nameserver)).map(Forward::Servers);
    }
    value.text(|text| match text {
        "resolv.conf" => Ok(Forward::ResolvConf),
        server => address::nameserver(server)
            .map(|server| Forward::Servers(vec![server]))
            .map_err(|what| format!("{what}, a list of these, or \"resolv.conf\"")),
    })
}

impl Draft {
    fn place(&self, text: &[u8], offset: usize) -> Place {
        Place::File { path: self.path.clone(), line: line(text, offset) }
    }

    fn read_file(&mut self, text: &str) {
        let (document, errors) = DeTable::parse_recoverable(text);
        let mut bad_places = Vec::new();
        for error in errors {
            let offset = error.span().map_or(text.len(), |span| span.start);
            let place = self.place(text.as_bytes(), offset);
            // One mistake makes the parser stumble several times on its line; the first says most.
            if !bad_places.contains(&place) {
                let what = format!("not TOML: {}", error.message());
                self.problems.push(Problem { place: Some(place.clone()), key: None, what });
            }
            bad_places.push(place);
            self.is_toml = false;
        }
        for (name, value) in document.get_ref() {
            let name = name.get_ref().to_string();
            let is_section = KEYS.iter().any(|(key, _)| section(key) == Some(&name));
            match value.get_ref().as_table() {
                Some(table) if is_section => {
                    for (key, value) in table {
                        let key = format!("{name}.{}", key.get_ref());
                        self.read_value(text, &bad_places, Value { key, value });
                    }
                }
                _ if is_section => {
                    let found = kind(value.get_ref());
                    let what = format!("expected a table, found {found}; write [{name}]");
                    let offset = value.span().start;
                    self.reject(text, &bad_places, Fault { key: name, offset, what });
                }
                _ => self.read_value(text, &bad_places, Value { key: name, value }),
            }
        }
    }

    fn read_value(&mut self, text: &str, bad_places: &[Place], value: Value) {
        let offset = value.value.span().start;
        let Some((key, apply)) = KEYS.iter().find(|(key, _)| *key == value.key) else {
            let what = format!("unknown key; {}", fix_of_unknown(&value.key));
            return self.reject(text, bad_places, Fault { key: value.key, offset, what });
        };
        let place = self.place(text.as_bytes(), offset);
        self.places.insert(key, place);
        if let Err(faults) = apply(self, &value) {
            self.faulty.insert(key);
            for fault in faults {
                self.reject(text, bad_places, fault);
            }
        }
    }

    /// Notes what is wrong, unless its line isn't TOML: then that is what is wrong.
    fn reject(&mut self, text: &str, bad_places: &[Place], fault: Fault) {
        let place = self.place(text.as_bytes(), fault.offset);
        if !bad_places.contains(&place) {
            let Fault { key, what, .. } = fault;
            self.problems.push(Problem { place: Some(place), key: Some(key), what });
        }
    }

    /// What a flag beats, or no source asks for, isn't judged.
    fn read_environment(&mut self, env: &dyn Fn(&str) -> Option<String>, overrides: &Overrides) {
        let env = |name: &str| env(name).filter(|value| !value.is_empty());
        if !self.source_is_file && overrides.catalog.is_none() {
            consul::read_environment(self, &env, overrides);
        }
    }

    fn read_overrides(&mut self, overrides: Overrides) {
        if let Some(cgroup) = overrides.cgroup {
            self.config.cgroup = (cgroup != Path::new("auto")).then_some(cgroup);
        }
        if let Some(bpffs) = overrides.bpffs {
            self.config.bpffs = bpffs;
        }
        if let Some(text) = overrides.on_exit
            && let Some(on_exit) = self.outside("on_exit", "--on-exit", text.parse())
        {
            self.config.on_exit = on_exit;
        }
        self.config.shadow |= overrides.shadow;
        if let Some(state_dir) = overrides.state_dir {
            self.config.state_dir = state_dir;
        }
        if !overrides.dns_listen.is_empty() {
            let listen = overrides.dns_listen.iter().map(|text| address::socket_address(text));
            let listen = listen.collect();
            if let Some(listen) = self.outside("dns.listen", "--dns-listen", listen) {
                self.config.dns.listen = listen;
            }
        }
        if !overrides.admin_listen.is_empty() {
            let listen = overrides.admin_listen.iter().map(|text| text.parse()).collect();
            if let Some(listen) = self.outside("admin.listen", "--admin-listen", listen) {
                self.config.admin.listen = listen;
            }
        }
        if let Some(text) = overrides.consul_addr {
            let address = address::consul(&text);
            if let Some(address) = self.outside("consul.address", "--consul-addr", address) {
                self.config.consul.address = address;
            }
        }
        if let Some(file) = overrides.catalog {
            self.source_is_file = true;
            self.catalog_file = Some(file);
            self.places.insert("catalog.file", Place::Outside("--catalog"));
        }
    }

    /// Takes the value of a flag or a variable, or notes what is wrong with it.
    pub(super) fn outside<T>(
        &mut self,
        key: &'static str,
        name: &'static str,
        value: Result<T, String>,
    ) -> Option<T> {
        let place = Place::Outside(name);
        self.places.insert(key, place.clone());
        value
            .map_err(|what| {
                self.faulty.insert(key);
                self.problems.push(Problem { place: Some(place), key: Some(key.into()), what });
            })
            .ok()
    }

    fn finish(mut self) -> Result<Config, ConfigErrors> {
        // What the file says can't be judged as a whole when only a part of it was understood.
        if self.is_toml {
            self.choose_source();
            validate::check(&mut self);
        }
        if self.problems.is_empty() {
            return Ok(self.config);
        }
        self.problems.sort_by(|a, b| a.place.cmp(&b.place));
        Err(ConfigErrors(self.problems))
    }

    fn choose_source(&mut self) {
        match (self.source_is_file, self.catalog_file.take()) {
            (true, Some(file)) => self.config.catalog.source = Source::File(file),
            (true, None) => self.contradiction(
                &["catalog.source", "catalog.file"],
                "is \"file\", and catalog.file names none; add file = \"/PATH\" under [catalog]",
            ),
            (false, Some(_)) => self.contradiction(
                &["catalog.file", "catalog.source"],
                "a file is read only from source = \"file\"; add that, or remove this",
            ),
            (false, None) => {}
        }
    }

    /// Notes that values don't go together, where the first of the keys was given. Nothing is said
    /// of values that are wrong by themselves.
    pub(super) fn contradiction(&mut self, keys: &[&'static str], what: impl Into<String>) {
        if keys.iter().any(|key| self.faulty.contains(key)) {
            return;
        }
        let given = keys.iter().find(|key| self.places.contains_key(**key));
        let key = given.or(keys.first()).map(|key| key.to_string());
        let place = given.and_then(|key| self.places.get(key).cloned());
        self.problems.push(Problem { place, key, what: what.into() });
    }
}

fn section(key: &str) -> Option<&str> {
    key.split_once('.').map(|(section, _)| section)
}

/// What an unknown key was meant to be.
fn fix_of_unknown(unknown: &str) -> String {
    let leaf = |key: &str| key.rsplit('.').next().map(str::to_owned);
    let distance = |key: &str| match edits(unknown, key) {
        // The right key in the wrong section.
        far if far > 2 && leaf(unknown) == leaf(key) => 2,
        far => far,
    };
    let sections = KEYS.iter().filter_map(|(key, _)| section(key));
    let known = KEYS.iter().map(|(key, _)| *key).chain(sections);
    match known.map(|key| (distance(key), key)).min() {
        Some((0..=2, key)) => format!("did you mean {key}? else remove it"),
        _ => "remove it".into(),
    }
}

/// The number of letters to add, drop or change to get from one word to the other (Levenshtein).
fn edits(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (from_idx, from_char) in from.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = from_idx + 1;
        for (to_idx, to_char) in to.iter().enumerate() {
            let changed = diagonal + usize::from(from_char != *to_char);
            diagonal = row[to_idx + 1];
            row[to_idx + 1] = changed.min(row[to_idx] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}
