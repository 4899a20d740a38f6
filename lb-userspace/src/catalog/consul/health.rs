//! The records of `/v1/health/service/NAME`, and the instance of each.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Error, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::address::{self, Candidates};
use crate::catalog::declarations::declarations;
use crate::catalog::inspection::{
    InspectedCheck, InspectedInstance, Inspection, MAX_CHECKS, MAX_INSTANCES, MAX_OUTPUT,
};
use crate::config::{CatalogConfig, HealthPolicy};
use crate::table::{HealthStatus, Instance, NodeIdentity, ServiceMeta, parse_ip};
use crate::terminal;

/// The most instances that a service may have: many times what is known of any, and a bound on the
/// memory that an answer takes, since an empty record has two bytes there and some 300 here.
const MAX_RECORDS: usize = 65_536;

/// The body of the answer.
#[derive(Clone, Debug)]
pub struct Records(pub Vec<Record>);

impl<'de> Deserialize<'de> for Records {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(ReadRecords)
    }
}

struct ReadRecords;

impl<'de> Visitor<'de> for ReadRecords {
    type Value = Records;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of instances")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Records, A::Error> {
        let mut records = Vec::new();
        while let Some(record) = list.next_element()? {
            if records.len() >= MAX_RECORDS {
                let problem = format!("a service of more than {MAX_RECORDS} instances isn't read");
                return Err(A::Error::custom(problem));
            }
            records.push(record);
        }
        Ok(Records(records))
    }
}

/// One instance with its node and its checks; fields without a use here are skipped.
///
/// A missing field or a null is its default: what is wrong with an instance is said of that
/// instance, by the table. A field of another type fails the whole answer.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Record {
    #[serde(default, deserialize_with = "or_default")]
    node: RawNode,
    #[serde(default, deserialize_with = "or_default")]
    service: RawService,
    #[serde(default, deserialize_with = "or_default")]
    checks: RawChecks,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RawNode {
    #[serde(default, rename = "ID", deserialize_with = "or_default")]
    id: String,
    #[serde(default, deserialize_with = "or_default")]
    node: String,
    #[serde(default, deserialize_with = "or_default")]
    datacenter: String,
    #[serde(default, deserialize_with = "or_default")]
    partition: String,
    #[serde(default, deserialize_with = "or_default")]
    address: String,
    #[serde(default, deserialize_with = "or_default")]
    tagged_addresses: BTreeMap<String, Option<String>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RawService {
    #[serde(default, deserialize_with = "or_default")]
    kind: String,
    #[serde(default, deserialize_with = "or_default")]
    service: String,
    #[serde(default, rename = "ID", deserialize_with = "or_default")]
    id: String,
    #[serde(default, deserialize_with = "or_default")]
    tags: Vec<String>,
    #[serde(default, deserialize_with = "or_default")]
    address: String,
    #[serde(default, deserialize_with = "or_default")]
    port: i64,
    #[serde(default, deserialize_with = "or_default")]
    ports: Vec<NamedPort>,
    #[serde(default, deserialize_with = "or_default")]
    tagged_addresses: BTreeMap<String, Option<RawTagged>>,
    #[serde(default, deserialize_with = "or_default")]
    weights: RawWeights,
    #[serde(default, deserialize_with = "or_default")]
    meta: BTreeMap<String, Option<String>>,
    #[serde(default, deserialize_with = "or_default")]
    create_index: u64,
}

/// One of several ports, as Consul has them from 1.22 on, instead of `Port`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct NamedPort {
    #[serde(default, deserialize_with = "or_default")]
    port: i64,
    #[serde(default, deserialize_with = "or_default")]
    default: bool,
}

/// A further address of a service.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RawTagged {
    #[serde(default, deserialize_with = "or_default")]
    address: String,
    #[serde(default, deserialize_with = "or_default")]
    port: i64,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RawWeights {
    passing: Option<i64>,
    warning: Option<i64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RawCheck {
    #[serde(default, rename = "CheckID", deserialize_with = "or_default")]
    id: String,
    #[serde(default, deserialize_with = "or_default")]
    name: String,
    #[serde(default, deserialize_with = "or_default")]
    status: String,
    /// Empty for a check of the node.
    #[serde(default, rename = "ServiceID", deserialize_with = "or_default")]
    service_id: String,
}

/// What the checks come to, folded as they are read: however many there are, they take no memory.
#[derive(Clone, Debug, Default)]
struct RawChecks {
    /// The one that doesn't pass and explains the most.
    worst: Option<RawCheck>,
    /// Whether one is of the instance itself.
    has_own: bool,
}

impl<'de> Deserialize<'de> for RawChecks {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(ReadChecks)
    }
}

struct ReadChecks;

impl<'de> Visitor<'de> for ReadChecks {
    type Value = RawChecks;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of checks")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<RawChecks, A::Error> {
        let mut checks = RawChecks::default();
        while let Some(check) = list.next_element::<RawCheck>()? {
            checks.add(check);
        }
        Ok(checks)
    }
}

impl RawChecks {
    fn add(&mut self, check: RawCheck) {
        self.has_own |= !check.service_id.is_empty();
        let is_worse = |worst: &RawCheck| check.rank() < worst.rank();
        if check.status != "passing" && self.worst.as_ref().is_none_or(is_worse) {
            self.worst = Some(check);
        }
    }
}

/// The body of the answer, with each check and its output, for [`inspection`].
#[derive(Clone, Debug)]
pub struct FullRecords {
    records: Vec<FullRecord>,
    n_more: usize,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct FullRecord {
    #[serde(default, deserialize_with = "or_default")]
    node: RawNode,
    #[serde(default, deserialize_with = "or_default")]
    service: RawService,
    #[serde(default, deserialize_with = "or_default")]
    checks: FullChecks,
}

/// What the checks come to, and the first ones.
#[derive(Clone, Debug, Default)]
struct FullChecks {
    all: RawChecks,
    shown: Vec<InspectedCheck>,
}

#[derive(Debug, Deserialize)]
struct FullCheck {
    #[serde(flatten)]
    check: RawCheck,
    #[serde(default, rename = "Output", deserialize_with = "or_default")]
    output: String,
}

impl<'de> Deserialize<'de> for FullRecords {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(ReadFullRecords)
    }
}

struct ReadFullRecords;

impl<'de> Visitor<'de> for ReadFullRecords {
    type Value = FullRecords;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of instances")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<FullRecords, A::Error> {
        let (mut records, mut n_more) = (Vec::new(), 0);
        while records.len() < MAX_INSTANCES
            && let Some(record) = list.next_element()?
        {
            records.push(record);
        }
        while list.next_element::<IgnoredAny>()?.is_some() {
            n_more += 1;
        }
        Ok(FullRecords { records, n_more })
    }
}

impl<'de> Deserialize<'de> for FullChecks {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(ReadFullChecks)
    }
}

struct ReadFullChecks;

impl<'de> Visitor<'de> for ReadFullChecks {
    type Value = FullChecks;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of checks")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<FullChecks, A::Error> {
        let mut checks = FullChecks::default();
        while let Some(FullCheck { check, output }) = list.next_element()? {
            if checks.shown.len() < MAX_CHECKS {
                let line = output.trim().lines().next().unwrap_or_default();
                checks.shown.push(InspectedCheck {
                    name: check.shown_name().to_owned(),
                    status: check.status.clone(),
                    output: terminal::escape(line).chars().take(MAX_OUTPUT).collect(),
                });
            }
            checks.all.add(check);
        }
        Ok(checks)
    }
}

/// All registrations of a name, each with what the rules make of it.
pub fn inspection(records: FullRecords, rules: &CatalogConfig) -> Inspection {
    let FullRecords { records, n_more } = records;
    let inspect = |record: FullRecord| {
        let FullRecord { node, service, checks: FullChecks { all, shown } } = record;
        let record = Record { node, service, checks: all };
        let (service, is_tagged) = (record.service.service.clone(), record.has_tag(&rules.tag));
        let instance = instance(record, rules);
        InspectedInstance {
            service,
            address: instance.shown_address(),
            node: instance.node,
            id: instance.id,
            is_tagged,
            out: match instance.health {
                HealthStatus::Out(reason) => Some(reason),
                HealthStatus::Serving | HealthStatus::Warning(_) | HealthStatus::Spare(_) => None,
            },
            checks: shown,
        }
    };
    let instances = records.into_iter().map(inspect).collect();
    Inspection { source: "consul", instances, n_more, is_filtered: false }
}

fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// The instances among the records, or `None` where there are records and all belong to proxies,
/// gateways and the like (any non-empty Kind): such a name is no service to connect to. Beside others
/// such a record is out.
///
/// `local` is left false: the node that this host is isn't known here.
pub fn instances(records: Vec<Record>, rules: &CatalogConfig) -> Option<Vec<Instance>> {
    if !records.is_empty() && records.iter().all(|record| !record.service.kind.is_empty()) {
        return None;
    }
    Some(records.into_iter().map(|record| instance(record, rules)).collect())
}

fn instance(record: Record, rules: &CatalogConfig) -> Instance {
    let mut standing = standing(&record, rules);
    let chosen =
        address::choose(rules.address, &record.service.candidates(), &record.node.candidates());
    if let (Err(reason), true) = (&chosen, standing.serves()) {
        standing = HealthStatus::Out(reason.clone());
    }
    let is_of_service = foreign(&record, rules).is_none();
    let is_checked = record.has_own_check();
    let is_critical = is_of_service
        && chosen.is_ok()
        && record.checks.worst.as_ref().is_some_and(RawCheck::is_critical);
    let Record { node, service, .. } = record;
    let (address, port) = match chosen {
        Ok((address, port)) => (address, port.unwrap_or(service.port())),
        Err(_) => (service.address.clone(), service.port()),
    };
    let weight = match standing {
        HealthStatus::Warning(_) | HealthStatus::Spare(_) => service.weights.warning,
        HealthStatus::Serving | HealthStatus::Out(_) => service.weights.passing,
    };
    let meta = match is_of_service {
        true => declarations(&service.tags, service.meta),
        false => ServiceMeta::default(),
    };
    Instance {
        node_identity: NodeIdentity::new(&node.id, &node.datacenter, &node.partition),
        node_address: parse_ip(&node.address),
        may_be_local: false,
        is_checked,
        is_critical,
        created: if meta.public.is_some() { service.create_index } else { 0 },
        node: node.node,
        id: service.id,
        address,
        port,
        weight: weight.unwrap_or(1),
        local: false,
        health: standing,
        meta,
    }
}

impl Record {
    /// The service's name as it was registered. Consul finds it in any case.
    pub fn service_name(&self) -> &str {
        &self.service.service
    }

    /// Whether the instance has the tag.
    pub fn has_tag(&self, tag: &str) -> bool {
        self.service.tags.iter().any(|has| has == tag)
    }

    /// Whether a check of the instance itself is there, rather than of its node alone.
    pub fn has_own_check(&self) -> bool {
        self.checks.has_own
    }

    /// Identifies the instance: its node, and its name there.
    pub fn key(&self) -> (String, String) {
        (self.node.node.clone(), self.service.id.clone())
    }
}

impl RawService {
    /// The port: `Port`, or where that is 0 the default one of `Ports`, else the first.
    fn port(&self) -> i64 {
        let default = self.ports.iter().find(|port| port.default).or(self.ports.first());
        match (self.port, default) {
            (0, Some(default)) => default.port,
            (port, _) => port,
        }
    }

    fn candidates(&self) -> Candidates<'_> {
        let tagged = self.tagged_addresses.iter().filter_map(|(tag, tagged)| {
            let RawTagged { address, port } = tagged.as_ref()?;
            // Port 0 stands for no port.
            Some((tag.as_str(), (address.as_str(), (*port != 0).then_some(*port))))
        });
        Candidates { own: &self.address, tagged: tagged.collect() }
    }
}

impl RawNode {
    fn candidates(&self) -> Candidates<'_> {
        let tagged = self
            .tagged_addresses
            .iter()
            .filter_map(|(tag, address)| Some((tag.as_str(), (address.as_deref()?, None))));
        Candidates { own: &self.address, tagged: tagged.collect() }
    }
}

/// Why a record of the service's name is none of its instances: by the kind, the tag and the Meta.
fn foreign(record: &Record, rules: &CatalogConfig) -> Option<String> {
    let CatalogConfig { tag, meta, .. } = rules;
    // A sidecar inherits the tags of its service.
    if !record.service.kind.is_empty() {
        return Some(format!("is a {}, not the service itself", record.service.kind));
    }
    // The tags in the list of names are a union over instances, so each has to show it here.
    if !record.has_tag(tag) {
        let similar = record.service.tags.iter().find(|has| has.trim().eq_ignore_ascii_case(tag));
        let hint = similar.map(|has| format!(" (`{has}` is another)"));
        return Some(format!("lacks the tag `{tag}`{}", hint.unwrap_or_default()));
    }
    meta.iter().find_map(|(key, wanted)| {
        match record.service.meta.get(key).and_then(Option::as_ref) {
            Some(has) if has == wanted => None,
            Some(has) => Some(format!("its Meta has `{key}` = `{has}`, not `{wanted}`")),
            None => Some(format!("its Meta lacks `{key}` = `{wanted}`")),
        }
    })
}

/// The verdict of the kind, the tag, the Meta and the checks. Outputs and times of checks have no
/// part in it, so that a check that only changed its words changes nothing.
fn standing(record: &Record, rules: &CatalogConfig) -> HealthStatus {
    if let Some(reason) = foreign(record, rules) {
        return HealthStatus::Out(reason);
    }
    let Some(check) = &record.checks.worst else { return HealthStatus::Serving };
    let complaint = check.complaint();
    match rules.health {
        HealthPolicy::Warning if check.is_warning() => HealthStatus::Warning(complaint),
        HealthPolicy::Passing if check.is_warning() => HealthStatus::Spare(complaint),
        HealthPolicy::Passing | HealthPolicy::Warning => HealthStatus::Out(complaint),
    }
}

impl RawCheck {
    fn is_node_maintenance(&self) -> bool {
        self.id == "_node_maintenance"
    }

    fn is_service_maintenance(&self) -> bool {
        self.id.starts_with("_service_maintenance:")
    }

    /// The order, of which the lowest is reported.
    fn rank(&self) -> (u8, &str) {
        (self.severity(), &self.id)
    }

    /// The rank of a check; the lowest explains the most, and is reported.
    fn severity(&self) -> u8 {
        match self.status.as_str() {
            _ if self.is_node_maintenance() => 0,
            _ if self.is_service_maintenance() => 1,
            "warning" => 4,
            "critical" => 2,
            _ => 3,
        }
    }

    fn shown_name(&self) -> &str {
        if self.name.is_empty() { &self.id } else { &self.name }
    }

    fn is_critical(&self) -> bool {
        self.severity() == 2
    }

    fn is_warning(&self) -> bool {
        self.severity() == 4
    }

    fn complaint(&self) -> String {
        if self.is_node_maintenance() {
            return "node maintenance".into();
        }
        if self.is_service_maintenance() {
            return "service maintenance".into();
        }
        let name = self.shown_name();
        match self.status.as_str() {
            "" => format!("check `{name}` has no status"),
            status => format!("check `{name}` is {status}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::AddressChoice;

    fn parse(json: &str) -> Vec<Record> {
        serde_json::from_str(json).unwrap()
    }

    fn rules() -> CatalogConfig {
        crate::config::Config::default().catalog
    }

    /// The response of `consul agent -dev` 1.8.7 about instances registered in every relevant way.
    #[test]
    fn reads_consuls_records() {
        let instances = instances(parse(include_str!("samples/web.json")), &rules()).unwrap();
        let got: Vec<String> = instances
            .iter()
            .map(|i| {
                let standing = match &i.health {
                    HealthStatus::Serving => "serving",
                    HealthStatus::Warning(reason)
                    | HealthStatus::Spare(reason)
                    | HealthStatus::Out(reason) => reason,
                };
                format!("{}/{} {}:{} x{}: {standing}", i.node, i.id, i.address, i.port, i.weight)
            })
            .collect();
        assert_eq!(
            got,
            [
                "dead/web-1 10.9.9.9:23456 x1: check `Serf Health Status` is critical",
                "legacy/web db.example.com:0 x1: serving",
                "maint/web 10.9.9.8:80 x1: node maintenance",
                "n1/web-1 10.0.0.7:23456 x5: serving",
                "n1/web-2 127.0.0.1:23457 x1: check `web` is critical",
                "n1/web-3 10.0.0.8:23458 x1: lacks the tag `routed`",
                "n1/web-4 10.0.0.9:23459 x1: service maintenance",
                "n1/web-5 10.0.0.10:23460 x1: check `web` is warning",
                "n1/web-6 10.0.0.10:23461 x1: serving",
            ]
        );
        let critical = instances.iter().filter(|instance| instance.is_critical);
        let critical: Vec<_> = critical.map(|it| format!("{}/{}", it.node, it.id)).collect();
        assert_eq!(critical, ["dead/web-1", "n1/web-2"]);
        assert!(
            instances.iter().any(|it| it.is_checked) && !instances.iter().all(|it| it.is_checked)
        );
    }

    #[test]
    fn an_inspection_has_each_check_with_the_first_line_of_its_output() {
        let records: FullRecords = serde_json::from_str(include_str!("samples/web.json")).unwrap();
        let Inspection { instances, n_more, .. } = inspection(records, &rules());
        assert_eq!((instances.len(), n_more), (9, 0));
        let find = |id: &str| instances.iter().find(|it| it.node == "n1" && it.id == id).unwrap();
        let untagged = find("web-3");
        assert_eq!((untagged.is_tagged, &*untagged.service), (false, "web"));
        assert_eq!(untagged.out.as_deref(), Some("lacks the tag `routed`"));
        assert_eq!(find("web-2").out.as_deref(), Some("check `web` is critical"));
        assert!(find("web-2").checks.iter().any(|check| check.status == "critical"));
        assert_eq!(
            (find("web-1").out.as_deref(), &*find("web-1").address),
            (None, "10.0.0.7:23456")
        );

        let output = format!("\\n  a\\u001b[2Jb{}\\nsecond", "x".repeat(500));
        let json = format!(
            r#"[{{"Service": {{"ID": "w"}}, "Checks": [{{"CheckID": "c", "Output": "{output}"}}, {{}}]}}]"#
        );
        let records: FullRecords = serde_json::from_str(&json).unwrap();
        let checks = &inspection(records, &rules()).instances[0].checks;
        assert_eq!((checks.len(), &*checks[0].name), (2, "c"));
        assert!(checks[0].output.starts_with(r"a\u{1b}[2Jbxx"), "{checks:?}");
        assert_eq!(checks[0].output.chars().count(), MAX_OUTPUT);

        let many = format!("[{}]", ["{}"; MAX_INSTANCES + 2].join(","));
        let records: FullRecords = serde_json::from_str(&many).unwrap();
        assert_eq!(inspection(records, &rules()).n_more, 2);
    }

    #[test]
    fn a_name_of_proxies_only_is_no_service() {
        let sidecars = parse(include_str!("samples/sidecar.json"));
        assert!(!sidecars.is_empty());
        assert_eq!(instances(sidecars, &rules()), None);
        assert_eq!(instances(Vec::new(), &rules()), Some(Vec::new()));
    }

    #[test]
    fn judges_records_one_by_one() {
        // (record, address:port xweight standing)
        let table = [
            (r#"{}"#, ":0 x1 lacks the tag `routed`"),
            (r#"{"Node":null,"Service":null,"Checks":null}"#, ":0 x1 lacks the tag `routed`"),
            (
                r#"{"Service":{"Tags":["old", "Routed"]}}"#,
                ":0 x1 lacks the tag `routed` (`Routed` is another)",
            ),
            (r#"{"Service":{"Tags":["routed"],"Port":-1}}"#, ":-1 x1 serving"),
            (
                r#"{"Node":{"Address":"a"},"Service":{"Tags":["routed"],"Weights":{"Passing":-7}}}"#,
                "a:0 x-7 serving",
            ),
            (
                r#"{"Service":{"Tags":["routed"],"Weights":{"Passing":99999999999}}}"#,
                ":0 x99999999999 serving",
            ),
            (
                r#"{"Service":{"Tags":["routed"]},"New":1,"Checks":[{"Status":"passing","X":2}]}"#,
                ":0 x1 serving",
            ),
            (
                r#"{"Service":{"Tags":["routed"]},"Checks":[{"CheckID":"a"}]}"#,
                ":0 x1 check `a` has no status",
            ),
            (
                r#"{"Service":{"Tags":["routed"]},"Checks":[
                    {"CheckID":"a","Status":"warning"},{"CheckID":"c","Status":"critical"},
                    {"CheckID":"b","Status":"critical"}]}"#,
                ":0 x1 check `b` is critical",
            ),
        ];
        for (json, expected) in table {
            let records = vec![serde_json::from_str(json).unwrap()];
            let instance = instances(records, &rules()).unwrap().remove(0);
            let standing = match instance.health {
                HealthStatus::Serving => "serving".into(),
                HealthStatus::Warning(reason)
                | HealthStatus::Spare(reason)
                | HealthStatus::Out(reason) => reason,
            };
            let got =
                format!("{}:{} x{} {standing}", instance.address, instance.port, instance.weight);
            assert_eq!(got, expected, "{json}");
        }
    }

    /// Elsewhere it would make a difference of what is none.
    #[test]
    fn an_instance_with_a_public_address_has_its_create_index() {
        for (tags, created) in [
            (r#""routed""#, 0),
            (r#""routed","nohop.public=203.0.113.1:80""#, 7),
            (r#""nohop.public=203.0.113.1:80""#, 0),
        ] {
            let json = format!(r#"[{{"Service":{{"Tags":[{tags}],"CreateIndex":7}}}}]"#);
            let instances = instances(parse(&json), &rules()).unwrap();
            assert_eq!(instances[0].created, created, "{tags}");
        }
    }

    #[test]
    fn the_declarations_of_the_services_own_instances_are_read() {
        let table = [
            (r#"{}"#, (None, None)),
            (r#"{"Service":{"Meta":null}}"#, (None, None)),
            (
                r#"{"Service":{"Tags":["routed"],"Meta":{"version":"3","Nohop-Ports":"1"}}}"#,
                (None, None),
            ),
            (
                r#"{"Service":{"Tags":["routed"],"Meta":{"nohop-ports":"80, 5432","a":"b"}}}"#,
                (Some("80, 5432"), None),
            ),
            (
                r#"{"Service":{"Tags":["routed"],"Meta":{"nohop-ports":null,"nohop-protocol":"what"}}}"#,
                (None, Some("what")),
            ),
            // Whatever its health; but what isn't the service has no say in it.
            (
                r#"{"Service":{"Tags":["routed"],"Meta":{"nohop-ports":"81"}},
                    "Checks":[{"CheckID":"a","Status":"critical"}]}"#,
                (Some("81"), None),
            ),
            (r#"{"Service":{"Tags":["other"],"Meta":{"nohop-ports":"81"}}}"#, (None, None)),
            (r#"{"Service":{"Tags":["routed","nohop.ports=81"]}}"#, (Some("81"), None)),
            (r#"{"Service":{"Tags":["other","nohop.ports=81","nohop.x"]}}"#, (None, None)),
            (
                r#"{"Service":{"Kind":"connect-proxy","Tags":["routed"],
                               "Meta":{"nohop-ports":"81","nohop-protocol":"udp"}}}"#,
                (None, None),
            ),
        ];
        for (json, expected) in table {
            let records = vec![serde_json::from_str(json).unwrap()];
            let other = r#"{"Service":{"Tags":["routed"]}}"#;
            let records = [records, vec![serde_json::from_str(other).unwrap()]].concat();
            let ServiceMeta { ports, protocol, .. } =
                instances(records, &rules()).unwrap().remove(0).meta;
            assert_eq!((ports.as_deref(), protocol.as_deref()), expected, "{json}");
        }
    }

    #[test]
    fn the_nodes_address_is_kept_in_addition_to_the_services() {
        for (node, expected) in [
            (r#"{"Address":"172.17.0.2"}"#, Some([172, 17, 0, 2].into())),
            (r#"{"Address":"::ffff:172.17.0.2"}"#, Some([172, 17, 0, 2].into())),
            (r#"{"Address":"db.example.com"}"#, None),
            (r#"{"Address":null}"#, None),
            ("null", None),
        ] {
            let service = r#""Service":{"Tags":["routed"],"Address":"172.17.0.3"}"#;
            let json = format!(r#"[{{"Node":{node},{service}}}]"#);
            let instance = instances(parse(&json), &rules()).unwrap().remove(0);
            let got = (instance.node_address, &*instance.address);
            assert_eq!(got, (expected, "172.17.0.3"), "{node}");
        }
    }

    #[test]
    fn the_default_one_of_several_ports_is_used() {
        for (service, expected) in [
            (r#""Port":80"#, 80),
            (r#""Port":80,"Ports":null"#, 80),
            (r#""Port":80,"Ports":[]"#, 80),
            (r#""Ports":[{"Name":"http","Port":8080,"Default":true}]"#, 8080),
            (
                r#""Port":0,"Ports":[{"Name":"admin","Port":9000},
                    {"Name":"http","Port":8080,"Default":true}]"#,
                8080,
            ),
            (r#""Port":null,"Ports":[{"Port":9000},{"Port":8080,"Default":false}]"#, 9000),
            (r#""Port":80,"Ports":[{"Name":"http","Port":8080,"Default":true}]"#, 80),
            (r#""Port":0"#, 0),
        ] {
            let json = format!(r#"[{{"Service":{{"Tags":["routed"],{service}}}}}]"#);
            let instance = instances(parse(&json), &rules()).unwrap().remove(0);
            assert_eq!(instance.port, expected, "{service}");
        }
    }

    #[test]
    fn too_many_instances_are_an_error() {
        let list = |n: usize| format!("[{}]", vec!["{}"; n].join(","));
        let Records(records) = serde_json::from_str(&list(MAX_RECORDS)).unwrap();
        assert_eq!(records.len(), MAX_RECORDS);
        let error = serde_json::from_str::<Records>(&list(MAX_RECORDS + 1)).unwrap_err();
        assert!(error.to_string().contains("more than 65536 instances"), "{error}");
    }

    #[test]
    fn a_field_of_another_type_is_an_error() {
        for json in [
            r#"{"Service":{"Meta":{"nohop-ports":80}}}"#,
            r#"{"Service":{"Port":"80"}}"#,
            r#"{"Service":{"Tags":"routed"}}"#,
            r#"{"Checks":{}}"#,
            r#"{"Service":{"Weights":{"Passing":1.5}}}"#,
        ] {
            assert!(serde_json::from_str::<Record>(json).is_err(), "{json}");
        }
    }

    #[test]
    fn a_warning_serves_with_its_weight_if_configured() {
        let warning = CatalogConfig { health: HealthPolicy::Warning, ..rules() };
        // (weights, checks by status, what the policies `passing` and `warning` make of it)
        let table = [
            (r#"{"Passing":7,"Warning":3}"#, "passing", "x7 serving", "x7 serving"),
            (r#"{"Passing":7,"Warning":3}"#, "warning", "x3 spare", "x3 warning"),
            (r#"{"Passing":7,"Warning":0}"#, "warning", "x0 spare", "x0 warning"),
            (r#"{"Passing":7}"#, "warning", "x1 spare", "x1 warning"),
            (r#"null"#, "warning", "x1 spare", "x1 warning"),
            (r#"{"Passing":7,"Warning":3}"#, "warning passing", "x3 spare", "x3 warning"),
            (r#"{"Passing":7,"Warning":3}"#, "warning critical", "x7 out", "x7 out"),
            (r#"{"Passing":7,"Warning":3}"#, "warning unheard-of", "x7 out", "x7 out"),
        ];
        for (weights, statuses, by_passing, by_warning) in table {
            for (rules, expected) in [(&rules(), by_passing), (&warning, by_warning)] {
                let checks = statuses.split(' ').enumerate().map(
                    |(n, status)| serde_json::json!({"CheckID": n.to_string(), "Status": status}),
                );
                let json = serde_json::json!({
                    "Service": {
                        "Tags": ["routed"],
                        "Weights": serde_json::from_str::<serde_json::Value>(weights).unwrap(),
                    },
                    "Checks": checks.collect::<Vec<_>>(),
                });
                let records = vec![serde_json::from_value(json).unwrap()];
                let instance = instances(records, rules).unwrap().remove(0);
                let standing = match instance.health {
                    HealthStatus::Serving => "serving",
                    HealthStatus::Warning(_) => "warning",
                    HealthStatus::Spare(_) => "spare",
                    HealthStatus::Out(_) => "out",
                };
                let got = format!("x{} {standing}", instance.weight);
                assert_eq!(got, expected, "{weights} {statuses}");
            }
        }
    }

    #[test]
    fn maintenance_is_no_warning_whatever_its_status() {
        let warning = CatalogConfig { health: HealthPolicy::Warning, ..rules() };
        let json = r#"[{"Service":{"Tags":["routed"]},
                        "Checks":[{"CheckID":"_node_maintenance","Status":"warning"}]}]"#;
        let instance = instances(parse(json), &warning).unwrap().remove(0);
        assert_eq!(instance.health, HealthStatus::Out("node maintenance".into()));
    }

    #[test]
    fn all_required_meta_must_match() {
        let wanted = [("stage", "live"), ("zone", "a")].map(|(k, v)| (k.into(), v.into()));
        let rules = CatalogConfig { meta: wanted.into(), ..rules() };
        for (meta, expected) in [
            (r#"{"zone":"a","stage":"live","x":"y"}"#, None),
            (r#"{"zone":"a"}"#, Some("its Meta lacks `stage` = `live`")),
            (r#"{"zone":"a","stage":null}"#, Some("its Meta lacks `stage` = `live`")),
            (r#"{"zone":"b","stage":"live"}"#, Some("its Meta has `zone` = `b`, not `a`")),
            ("null", Some("its Meta lacks `stage` = `live`")),
        ] {
            let json = format!(r#"[{{"Service":{{"Tags":["routed"],"Meta":{meta}}}}}]"#);
            let standing = instances(parse(&json), &rules).unwrap().remove(0).health;
            let expected =
                expected.map_or(HealthStatus::Serving, |why| HealthStatus::Out(why.into()));
            assert_eq!(standing, expected, "{meta}");
        }
    }

    #[test]
    fn the_chosen_address_comes_with_its_port() {
        let json = r#"{"Node":{"Address":"10.0.0.1","TaggedAddresses":{"wan":"192.0.2.1"}},
            "Service":{"Tags":["routed"],"Port":80,"Address":"",
                       "TaggedAddresses":{"wan":{"Address":"192.0.2.9","Port":8080},"x":null}}}"#;
        for (choice, expected) in [
            (AddressChoice::Lan, ("10.0.0.1", 80, None)),
            (AddressChoice::Wan, ("192.0.2.9", 8080, None)),
            (AddressChoice::LanIpv6, ("", 80, Some("has no `lan_ipv6` address"))),
        ] {
            let rules = CatalogConfig { address: choice, ..rules() };
            let records = vec![serde_json::from_str(json).unwrap()];
            let instance = instances(records, &rules).unwrap().remove(0);
            assert_eq!((&*instance.address, instance.port), (expected.0, expected.1), "{choice:?}");
            let standing =
                expected.2.map_or(HealthStatus::Serving, |why| HealthStatus::Out(why.into()));
            assert_eq!(instance.health, standing, "{choice:?}");
        }
    }
}
