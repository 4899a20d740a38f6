//! Drains: instances that an operator has taken out of the choices of this node, as data.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::{Catalog, Hosts, Instance, ServiceRecord, Watch, allocation, is_uuid, parse_ip};
use crate::counted::counted;

/// The most drains at a time: each is compared with every instance that is built.
pub const MAX_DRAINS: usize = 256;

/// The length of an allocation's short id, which Nomad shows.
const SHORT_ID: usize = 8;

/// How many names an error lists.
const N_LISTED: usize = 5;

/// What is drained. The text of each is also the argument that names it and nothing else.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DrainTarget {
    /// All instances of a node, by its name in lower case.
    Node(String),
    /// All instances at an IP address.
    Address(IpAddr),
    /// All instances at an address and port.
    Endpoint(SocketAddr),
    /// One instance of a node; the node is empty where the source knows of no nodes.
    Instance {
        /// The node.
        node: String,
        /// The id that discovery has.
        id: String,
    },
    /// All instances of an allocation of Nomad, by its UUID in lower case.
    Allocation(String),
    /// This node as an edge: its public VIPs aren't announced. It covers no instance.
    Edge,
}

/// The argument that names [`DrainTarget::Edge`].
pub const EDGE: &str = "edge";

/// The kinds of targets. An argument may begin with each but the last, to say which it means.
pub const DRAIN_KINDS: [&str; 5] = ["node", "address", "instance", "allocation", EDGE];

impl DrainTarget {
    /// What it is: `node`, `address`, `instance`, `allocation` or `edge`.
    pub fn kind(&self) -> &'static str {
        match self {
            DrainTarget::Node(_) => "node",
            DrainTarget::Address(_) | DrainTarget::Endpoint(_) => "address",
            DrainTarget::Instance { .. } => "instance",
            DrainTarget::Allocation(_) => "allocation",
            DrainTarget::Edge => EDGE,
        }
    }

    /// Its name among those of its kind, such as `10.0.0.5:8080` or `NODE/ID`.
    pub fn name(&self) -> String {
        match self {
            DrainTarget::Node(name) | DrainTarget::Allocation(name) => name.clone(),
            DrainTarget::Edge => String::new(),
            DrainTarget::Address(address) => address.to_string(),
            DrainTarget::Endpoint(endpoint) => endpoint.to_string(),
            DrainTarget::Instance { node, id } if node.is_empty() => id.clone(),
            DrainTarget::Instance { node, id } => format!("{node}/{id}"),
        }
    }

    /// Whether it covers the instance of this node with this id at this address. Consul ignores the case
    /// of a node's letters.
    pub fn covers(&self, node: &str, id: &str, address: Option<SocketAddr>) -> bool {
        match self {
            DrainTarget::Node(name) => !node.is_empty() && name.eq_ignore_ascii_case(node),
            DrainTarget::Address(ip) => address.is_some_and(|address| address.ip() == *ip),
            DrainTarget::Endpoint(endpoint) => address == Some(*endpoint),
            DrainTarget::Instance { node: own, id: own_id } => {
                own_id == id && own.eq_ignore_ascii_case(node)
            }
            DrainTarget::Allocation(uuid) => {
                allocation(id).is_some_and(|own| own.eq_ignore_ascii_case(uuid))
            }
            DrainTarget::Edge => false,
        }
    }
}

impl fmt::Display for DrainTarget {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DrainTarget::Edge => formatter.write_str(EDGE),
            _ => write!(formatter, "{}:{}", self.kind(), self.name()),
        }
    }
}

/// When something was drained.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// In seconds of the Unix epoch, for people.
    pub since: u64,
    /// By CLOCK_BOOTTIME, in milliseconds: it counts suspension, and no step of the clock moves it. For
    /// the deadline.
    pub boottime_ms: u64,
}

impl Drain {
    /// The time for people, in UTC: `2026-11-29T10:30:00Z`.
    pub fn since_text(&self) -> String {
        utc(SystemTime::UNIX_EPOCH + Duration::from_secs(self.since.min(MAX_SECONDS)))
    }
}

/// The end of the year 9999, the last of four digits.
const MAX_SECONDS: u64 = 253_402_300_799;

/// A time in UTC, by RFC 3339. The date by Hinnant's `civil_from_days`
/// (<https://howardhinnant.github.io/date_algorithms.html>).
fn utc(time: SystemTime) -> String {
    let seconds = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// All that is drained.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drains {
    drains: BTreeMap<DrainTarget, Drain>,
    /// Those of an earlier daemon aren't known yet.
    is_incomplete: bool,
}

impl Drains {
    /// None, before those of an earlier daemon are known.
    pub fn incomplete() -> Drains {
        Drains { is_incomplete: true, ..Drains::default() }
    }

    /// Whether those of an earlier daemon aren't known yet.
    pub fn is_incomplete(&self) -> bool {
        self.is_incomplete
    }

    /// They are known.
    pub fn complete(&mut self) {
        self.is_incomplete = false;
    }

    /// The drain that covers an instance, the earliest of several.
    pub fn find(
        &self,
        node: &str,
        id: &str,
        address: Option<SocketAddr>,
    ) -> Option<(&DrainTarget, &Drain)> {
        let covering = self.drains.iter().filter(|(target, _)| target.covers(node, id, address));
        covering.min_by_key(|(_, drain)| drain.boottime_ms)
    }

    /// Adds a drain; returns whether it is new.
    ///
    /// # Errors
    /// When there are [`MAX_DRAINS`].
    pub fn add(&mut self, target: DrainTarget, drain: Drain) -> Result<bool, DrainError> {
        if self.drains.contains_key(&target) {
            return Ok(false);
        }
        if self.drains.len() >= MAX_DRAINS {
            return Err(DrainError::TooMany);
        }
        self.drains.insert(target, drain);
        Ok(true)
    }

    /// Adds a drain of an earlier run; of two of one target the earlier applies.
    pub fn restore(&mut self, target: DrainTarget, drain: Drain) {
        let known = self.drains.entry(target).or_insert_with(|| drain.clone());
        if drain.boottime_ms < known.boottime_ms {
            *known = drain;
        }
    }

    /// Removes a drain; returns whether there was one.
    pub fn remove(&mut self, target: &DrainTarget) -> bool {
        self.drains.remove(target).is_some()
    }

    /// When it was drained.
    pub fn get(&self, target: &DrainTarget) -> Option<&Drain> {
        self.drains.get(target)
    }

    /// All of them, by kind and name.
    pub fn iter(&self) -> impl Iterator<Item = (&DrainTarget, &Drain)> {
        self.drains.iter()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.drains.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.drains.is_empty()
    }
}

impl FromIterator<(DrainTarget, Drain)> for Drains {
    fn from_iter<T: IntoIterator<Item = (DrainTarget, Drain)>>(drains: T) -> Drains {
        Drains { drains: drains.into_iter().collect(), is_incomplete: false }
    }
}

/// Why nothing was drained, or undrained.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DrainError {
    /// No argument.
    #[error("name a node, an address, an instance or an allocation")]
    Empty,
    /// `edge`.
    #[error("this node is no edge: name a node, an address, an instance or an allocation")]
    NoEdge,
    /// Nothing is known yet.
    #[error(
        "discovery has not reported in full yet, so `{0}` can't be found: try again once `nohop \
         status` reports ready"
    )]
    NotSynced(String),
    /// No instance has it.
    #[error(
        "no instance is of a node, at an address, or of an id or allocation `{text}`, among \
         {nearby}"
    )]
    Unknown {
        /// What was named.
        text: String,
        /// What is known.
        nearby: Nearby,
    },
    /// It means several things.
    #[error("`{text}` means {}: name one of them so", listed(.candidates))]
    Ambiguous {
        /// What was named.
        text: String,
        /// What it may mean.
        candidates: Vec<DrainTarget>,
    },
    /// One too many.
    #[error("{MAX_DRAINS} drains are the most: undrain some, or drain whole nodes")]
    TooMany,
}

/// Checks that a text names something to drain, whether or not there is such a thing.
///
/// # Errors
/// It is empty, or a kind without a name.
pub fn check_target(text: &str) -> Result<(), DrainError> {
    match Wanted::parse(text) {
        Err(DrainError::Empty) => Err(DrainError::Empty),
        _ => Ok(()),
    }
}

/// What is known where something isn't.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Nearby {
    /// The number of instances.
    pub n_instances: usize,
    /// The number of their nodes.
    pub n_nodes: usize,
    /// The nearest names.
    pub closest: Vec<DrainTarget>,
    /// The number of cold services, of whose instances little is known.
    pub n_cold: usize,
}

impl fmt::Display for Nearby {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Nearby { n_instances, n_nodes, closest, n_cold } = self;
        let (instances, nodes) = (counted(*n_instances, "instance"), counted(*n_nodes, "node"));
        write!(formatter, "{instances} on {nodes}")?;
        if !closest.is_empty() {
            write!(formatter, "; the closest names are {}", listed(closest))?;
        }
        match n_cold {
            0 => Ok(()),
            n => write!(
                formatter,
                "; {} may have it: to drain it all the same, name it as `node:NAME`, \
                 `address:ADDRESS`, `instance:NODE/ID` or `allocation:UUID`",
                counted(*n, "cold service")
            ),
        }
    }
}

fn listed(targets: &[DrainTarget]) -> String {
    let named = targets.iter().take(N_LISTED).map(|target| format!("`{target}`"));
    let named = named.collect::<Vec<_>>().join(", ");
    match targets.len().saturating_sub(N_LISTED) {
        0 => named,
        n => format!("{named} and {n} more"),
    }
}

/// An argument: a name, and its kind where that is given, as in `node:web-1`.
#[derive(Clone, Copy, Debug)]
struct Wanted<'a> {
    kind: Option<&'static str>,
    name: &'a str,
}

impl Wanted<'_> {
    fn parse(text: &str) -> Result<Wanted<'_>, DrainError> {
        let (kind, name) = DRAIN_KINDS
            .into_iter()
            .filter(|kind| *kind != EDGE)
            .find_map(|kind| Some((Some(kind), text.strip_prefix(kind)?.strip_prefix(':')?)))
            .unwrap_or((None, text));
        match (kind, name) {
            (_, "") => Err(DrainError::Empty),
            (None, EDGE) => Err(DrainError::NoEdge),
            (kind, name) => Ok(Wanted { kind, name }),
        }
    }

    /// What it names by itself, where its kind is given.
    fn explicit(self) -> Option<DrainTarget> {
        match self.kind? {
            "node" => Some(DrainTarget::Node(self.name.to_ascii_lowercase())),
            "address" => {
                let address = parse_ip(self.name).map(DrainTarget::Address);
                address.or_else(|| self.endpoint().map(DrainTarget::Endpoint))
            }
            "instance" => {
                let (node, id) = self.name.split_once('/')?;
                let target = || DrainTarget::Instance { node: node.into(), id: id.into() };
                (!node.is_empty() && !id.is_empty()).then(target)
            }
            "allocation" if is_uuid(self.name) => {
                Some(DrainTarget::Allocation(self.name.to_ascii_lowercase()))
            }
            _ => None,
        }
    }

    /// What it names of an instance.
    fn of(self, instance: &Instance, address: Option<SocketAddr>) -> Vec<DrainTarget> {
        let Instance { node, id, .. } = instance;
        let mut found = Vec::new();
        if !node.is_empty() && node.eq_ignore_ascii_case(self.name) {
            found.push(DrainTarget::Node(node.to_ascii_lowercase()));
        }
        let endpoint = self.endpoint();
        let is_at = |address: SocketAddr| Some(address.ip()) == parse_ip(self.name);
        if let Some(address) = address.filter(|address| is_at(*address)) {
            found.push(DrainTarget::Address(address.ip()));
        } else if let Some(address) = address.filter(|address| Some(*address) == endpoint) {
            found.push(DrainTarget::Endpoint(address));
        }
        let is_whole =
            self.name.strip_prefix(node.as_str()).and_then(|rest| rest.strip_prefix('/'));
        if id == self.name || is_whole == Some(id) {
            found.push(DrainTarget::Instance { node: node.clone(), id: id.clone() });
        }
        let is_its = |uuid: &str| {
            let short = uuid.get(..self.name.len());
            self.name.len() >= SHORT_ID
                && short.is_some_and(|short| short.eq_ignore_ascii_case(self.name))
        };
        if let Some(uuid) = allocation(id).filter(|uuid| is_its(uuid)) {
            found.push(DrainTarget::Allocation(uuid.to_ascii_lowercase()));
        }
        found.retain(|target| self.kind.is_none_or(|kind| kind == target.kind()));
        found
    }

    /// Whether it names what is drained already.
    fn names(self, target: &DrainTarget) -> bool {
        if self.kind.is_some_and(|kind| kind != target.kind()) {
            return false;
        }
        match target {
            DrainTarget::Node(node) => node.eq_ignore_ascii_case(self.name),
            DrainTarget::Address(ip) => parse_ip(self.name) == Some(*ip),
            DrainTarget::Endpoint(endpoint) => self.endpoint() == Some(*endpoint),
            DrainTarget::Instance { id, .. } => id == self.name || target.name() == self.name,
            DrainTarget::Allocation(uuid) => {
                self.name.len() >= SHORT_ID && uuid.starts_with(&self.name.to_ascii_lowercase())
            }
            DrainTarget::Edge => false,
        }
    }

    fn endpoint(self) -> Option<SocketAddr> {
        let endpoint: SocketAddr = self.name.parse().ok()?;
        Some(SocketAddr::new(endpoint.ip().to_canonical(), endpoint.port()))
    }
}

/// What can be drained: the instances of a catalog, at one moment. A clone is cheap; a search takes a while
/// where there are many.
#[derive(Clone, Debug)]
pub struct DrainCatalog {
    pub(super) catalog: Catalog,
    pub(super) hosts: Arc<Hosts>,
}

impl DrainCatalog {
    /// What an argument of `nohop drain` names. Instances of cold services aren't known: while there are
    /// such services, what is named with its kind may be theirs.
    ///
    /// # Errors
    /// When that is nothing, or several things.
    pub fn find(&self, text: &str) -> Result<DrainTarget, DrainError> {
        let instances = self.catalog.values().flat_map(ServiceRecord::instances);
        let error = match resolve(text, instances, &self.hosts) {
            Err(DrainError::Unknown { text, nearby }) => {
                let records = self.catalog.values();
                let n_cold = records.filter(|record| record.watch == Watch::Cold).count();
                DrainError::Unknown { text, nearby: Nearby { n_cold, ..nearby } }
            }
            found => return found,
        };
        let may_be_cold = matches!(&error, DrainError::Unknown { nearby, .. } if nearby.n_cold > 0);
        let explicit = Wanted::parse(text).ok().and_then(Wanted::explicit);
        explicit.filter(|_| may_be_cold).ok_or(error)
    }

    /// The services, by name in lower case, of which an instance is covered.
    pub fn covered_by(&self, target: &DrainTarget) -> BTreeSet<Arc<str>> {
        let is_covered = |instance: &Instance| {
            target.covers(&instance.node, &instance.id, self.hosts.endpoint(instance))
        };
        let covered = self.catalog.iter().filter(|(_, record)| record.instances().any(is_covered));
        covered.map(|(id, _)| id.folded_name()).collect()
    }
}

/// What an argument names among these instances. One that is registered by several is one endpoint in
/// the table, and each registration can be named.
///
/// # Errors
/// When that is nothing, or several things.
fn resolve<'a>(
    text: &str,
    instances: impl Iterator<Item = &'a Instance> + Clone,
    hosts: &Hosts,
) -> Result<DrainTarget, DrainError> {
    let wanted = Wanted::parse(text)?;
    let found =
        instances.clone().flat_map(|instance| wanted.of(instance, hosts.endpoint(instance)));
    let found: BTreeSet<DrainTarget> = found.collect();
    // The id that is an endpoint's text, as the static catalog has it, is that endpoint.
    let is_endpoint = |target: &DrainTarget| matches!(target, DrainTarget::Endpoint(_));
    let has_endpoint = found.iter().any(is_endpoint);
    let is_spare = |target: &DrainTarget| {
        has_endpoint && matches!(target, DrainTarget::Instance { node, .. } if node.is_empty())
    };
    let candidates = found.iter().filter(|target| !is_spare(target)).cloned().collect();
    one(text, candidates)?.ok_or_else(|| {
        let nearby = nearby(wanted.name, instances);
        DrainError::Unknown { text: text.to_owned(), nearby }
    })
}

/// What an argument names among the drains; `None` for nothing.
///
/// # Errors
/// When that is several drains.
pub fn resolve_drained(text: &str, drains: &Drains) -> Result<Option<DrainTarget>, DrainError> {
    let wanted = Wanted::parse(text)?;
    let named = drains.iter().map(|(target, _)| target).filter(|target| wanted.names(target));
    one(text, named.cloned().collect())
}

fn one(text: &str, mut candidates: Vec<DrainTarget>) -> Result<Option<DrainTarget>, DrainError> {
    match candidates.len() {
        0 | 1 => Ok(candidates.pop()),
        _ => Err(DrainError::Ambiguous { text: text.to_owned(), candidates }),
    }
}

fn nearby<'a>(name: &str, instances: impl Iterator<Item = &'a Instance>) -> Nearby {
    let (mut n_instances, mut nodes, mut names) = (0, BTreeSet::new(), BTreeMap::new());
    for Instance { node, id, .. } in instances {
        n_instances += 1;
        let is_new = nodes.insert(node.as_str());
        if is_new && !node.is_empty() {
            names.insert(DrainTarget::Node(node.to_ascii_lowercase()), node.as_str());
        }
        let target = DrainTarget::Instance { node: node.clone(), id: id.clone() };
        match allocation(id) {
            Some(uuid) => {
                let short = &uuid[..SHORT_ID];
                names.insert(DrainTarget::Allocation(uuid.to_ascii_lowercase()), short);
            }
            None => drop(names.insert(target, id)),
        }
    }
    let similarity = |text: &str| strsim::jaro_winkler(&name.to_lowercase(), &text.to_lowercase());
    let mut closest: Vec<_> =
        names.into_iter().map(|(target, text)| (similarity(text), target)).collect();
    closest.retain(|(similarity, _)| *similarity > 0.5);
    closest.sort_by(|(one, _), (other, _)| other.total_cmp(one));
    closest.truncate(N_LISTED);
    let n_nodes = nodes.iter().filter(|node| !node.is_empty()).count();
    let closest = closest.into_iter().map(|(_, target)| target).collect();
    Nearby { n_instances, n_nodes, closest, n_cold: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALLOC: &str = "39e25890-23fb-7513-b98f-97a5310046ad";

    fn instance(node: &str, id: &str, address: &str) -> Instance {
        let address: SocketAddr = address.parse().unwrap();
        Instance {
            node: node.into(),
            id: id.into(),
            address: address.ip().to_string(),
            port: address.port().into(),
            ..Instance::fixture()
        }
    }

    fn instances() -> Vec<Instance> {
        let task = |alloc: &str| format!("_nomad-task-{alloc}-group-web-web-http");
        vec![
            instance("n1", "web-1", "10.0.0.5:8080"),
            instance("n1", "web", "10.0.0.5:8081"),
            instance("n2", "web", "[2001:db8::7]:8080"),
            instance("N2", &task(ALLOC), "10.0.0.6:80"),
            instance("n3", &task("39e25890-0000-7513-b98f-97a5310046ad"), "10.0.0.7:80"),
            instance("web-1", "other", "10.0.0.8:80"),
            instance("", "10.0.0.9:80", "10.0.0.9:80"),
        ]
    }

    fn found(text: &str) -> String {
        match resolve(text, instances().iter(), &Hosts::default()) {
            Ok(target) => target.to_string(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn an_argument_names_one_thing() {
        for (text, expected) in [
            ("n1", "node:n1"),
            ("N3", "node:n3"),
            ("10.0.0.5", "address:10.0.0.5"),
            ("10.0.0.5:8080", "address:10.0.0.5:8080"),
            ("::ffff:10.0.0.5", "address:10.0.0.5"),
            ("2001:db8:0::7", "address:2001:db8::7"),
            ("[2001:db8::7]", "address:2001:db8::7"),
            ("[2001:db8::7]:8080", "address:[2001:db8::7]:8080"),
            ("10.0.0.9:80", "address:10.0.0.9:80"),
            ("instance:10.0.0.9:80", "instance:10.0.0.9:80"),
            ("n1/web", "instance:n1/web"),
            ("instance:web-1", "instance:n1/web-1"),
            ("node:web-1", "node:web-1"),
            ("other", "instance:web-1/other"),
            (ALLOC, "allocation:39e25890-23fb-7513-b98f-97a5310046ad"),
            ("39E25890-23FB", "allocation:39e25890-23fb-7513-b98f-97a5310046ad"),
        ] {
            assert_eq!(found(text), expected, "{text}");
        }
        let by_id = format!("_nomad-task-{ALLOC}-group-web-web-http");
        assert_eq!(found(&by_id), format!("instance:N2/{by_id}"));
    }

    #[test]
    fn what_is_unknown_or_ambiguous_is_an_error_that_lists_what_there_is() {
        for (text, expected) in [
            ("", "name a node, an address, an instance or an allocation"),
            ("node:", "name a node, an address, an instance or an allocation"),
            ("edge", "this node is no edge"),
            ("web-1", "means `node:web-1`, `instance:n1/web-1`: name one of them"),
            ("web", "means `instance:n1/web`, `instance:n2/web`: name one"),
            (
                "39e25890",
                "means `allocation:39e25890-0000-7513-b98f-97a5310046ad`, `allocation:39e2",
            ),
            (
                "39e2589",
                "among 7 instances on 5 nodes; the closest names are `allocation:39e25890-",
            ),
            ("web-2", "5 nodes; the closest names are `node:web-1`, `instance:n1/web-1`"),
            (
                "10.0.0.5:8082",
                "no instance is of a node, at an address, or of an id or allocation `10",
            ),
            ("address:n1", "no instance is"),
        ] {
            let error = found(text);
            assert!(error.contains(expected), "{text}: {error}");
        }
        let none = resolve("web", [].iter(), &Hosts::default()).unwrap_err().to_string();
        assert!(none.ends_with("`web`, among 0 instances on 0 nodes"), "{none}");
    }

    #[test]
    fn what_cold_services_may_have_can_be_drained_by_its_kind() {
        use crate::table::ServiceId;
        let catalog = |n_cold: usize| {
            let web: Vec<_> = instances();
            let web = (ServiceId::new("web"), ServiceRecord::new(web.into(), Watch::Live));
            let cold = ServiceRecord::new([].into(), Watch::Cold);
            let cold = (0..n_cold).map(|n| (ServiceId::new(format!("s{n}")), cold.clone()));
            let catalog = std::iter::once(web).chain(cold).collect();
            DrainCatalog { catalog, hosts: Arc::default() }
        };
        let uuid = "01234567-89ab-cdef-0123-456789abcdef";
        for (text, expected) in [
            ("node:N7", Some("node:n7".to_owned())),
            ("address:10.0.0.77", Some("address:10.0.0.77".to_owned())),
            ("address:10.0.0.77:80", Some("address:10.0.0.77:80".to_owned())),
            ("instance:n7/_nomad/x", Some("instance:n7/_nomad/x".to_owned())),
            (&*format!("allocation:{uuid}"), Some(format!("allocation:{uuid}"))),
            ("node:n1", Some("node:n1".to_owned())),
            ("n7", None),
            ("10.0.0.77", None),
            ("address:n7", None),
            ("instance:web-7", None),
            ("instance:/web-7", None),
            ("allocation:01234567", None),
        ] {
            let found = catalog(2).find(text).map(|target| target.to_string());
            match expected {
                Some(expected) => assert_eq!(found, Ok(expected)),
                None => {
                    let error = found.unwrap_err().to_string();
                    let hint =
                        "; 2 cold services may have it: to drain it all the same, name it as";
                    assert!(error.contains(hint), "{text}: {error}");
                }
            }
            // A typing error, where all instances are known.
            let all_known = catalog(0).find(text);
            assert_eq!(all_known.is_ok(), text == "node:n1", "{text}");
        }
    }

    #[test]
    fn what_is_drained_covers_what_it_names_and_can_be_named_once_that_has_gone() {
        let drain = |since| Drain { since, boottime_ms: since };
        let mut drains = Drains::default();
        // (what is named, the instances it covers)
        let table = [
            ("n2", vec!["web", "nomad 1"]),
            ("10.0.0.5:8081", vec!["web"]),
            ("10.0.0.6", vec!["nomad 1"]),
            ("n1/web-1", vec!["web-1"]),
            (ALLOC, vec!["nomad 1"]),
        ];
        for (since, (text, expected)) in table.iter().enumerate() {
            let target = resolve(text, instances().iter(), &Hosts::default()).unwrap();
            let covered = instances().into_iter().filter(|instance| {
                let Instance { node, id, .. } = instance;
                target.covers(node, id, Hosts::default().endpoint(instance))
            });
            let ids: Vec<_> = covered.map(|instance| instance.id).collect();
            let ids: Vec<_> = ids
                .iter()
                .map(|id| if allocation(id).is_some() { "nomad 1" } else { id })
                .collect();
            assert_eq!(ids, *expected, "{text}");
            assert!(drains.add(target.clone(), drain(since as u64 + 1)).unwrap());
            assert!(!drains.add(target.clone(), drain(9)).unwrap());
            assert_eq!(resolve_drained(text, &drains).unwrap(), Some(target));
        }
        let (target, at) = drains.find("n2", "x", Some("10.0.0.6:80".parse().unwrap())).unwrap();
        assert_eq!((target.to_string(), at.since), ("node:n2".into(), 1), "the earliest");
        assert_eq!(resolve_drained("n1", &drains).unwrap(), None);
        assert_eq!(resolve_drained("39e25890", &drains).unwrap().unwrap().name(), ALLOC);
        assert!(drains.remove(&DrainTarget::Node("n2".into())));
        assert!(!drains.remove(&DrainTarget::Node("n2".into())));
        assert_eq!(drains.find("n2", "x", None), None);

        let many = (0..MAX_DRAINS).map(|n| (DrainTarget::Node(format!("m{n}")), drain(1)));
        let mut many: Drains = many.collect();
        let one_more = many.add(DrainTarget::Node("n1".into()), drain(1)).unwrap_err();
        assert_eq!(one_more, DrainError::TooMany);
    }

    #[test]
    fn times_are_in_utc() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_795_948_200, "2026-11-29T10:30:00Z"),
            (u64::MAX, "9999-12-31T23:59:59Z"),
        ] {
            let drain = Drain { since: seconds, boottime_ms: 0 };
            assert_eq!(drain.since_text(), expected);
        }
    }
}
