//! What `nohop explain` reports, by the table and by what the source has: the result of a connection, a
//! sentence, and all instances.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::admin::api::{BackendStatus, CheckStatus, InstanceStatus, OUT};
use crate::catalog::{InspectResult, InspectedCheck, InspectedInstance, Inspection};
use crate::config::BalanceAlgorithm;
use crate::counted::counted;
use crate::table::{
    Backend, BackendState, Excluded, Ports, Protocols, Service, Table, Watch, check_name,
    display_name, parse_ip, with_display_names,
};

/// How many services or instances a sentence names.
const N_NAMED: usize = 5;

/// How many similar names are suggested.
const N_SIMILAR: usize = 3;

/// The argument of `nohop explain`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExplainTarget {
    /// A service's name, in lower case and without the domain, with a port or without.
    Name(String, Option<u16>),
    /// An IP address, with a port or without.
    Address(IpAddr, Option<u16>),
}

impl ExplainTarget {
    /// Reads the argument; `domain` is the zone of the services.
    pub fn parse(text: &str, domain: &str) -> ExplainTarget {
        if let Ok(address) = text.parse::<SocketAddr>() {
            return ExplainTarget::Address(address.ip().to_canonical(), Some(address.port()));
        }
        if let Some(ip) = parse_ip(text) {
            return ExplainTarget::Address(ip, None);
        }
        let (name, port) = match text.split_once(':').map(|(name, port)| (name, port.parse())) {
            Some((name, Ok(port))) if !name.is_empty() => (name, Some(port)),
            _ => (text, None),
        };
        let name = name.trim_end_matches('.').to_lowercase();
        let name =
            name.strip_suffix(domain).and_then(|name| name.strip_suffix('.')).unwrap_or(&name);
        ExplainTarget::Name(name.to_owned(), port)
    }

    /// Whether an instance at this address, as the source has it, is meant.
    pub fn is_at(&self, shown_address: &str) -> bool {
        let ExplainTarget::Address(ip, port) = self else { return false };
        let Some((host, own_port)) = shown_address.rsplit_once(':') else { return false };
        parse_ip(host) == Some(*ip) && port.is_none_or(|port| own_port.parse() == Ok(port))
    }
}

/// The services whose VIP, IPv6 VIP, pinned or public address this is: several may have a public one, at a port each.
pub fn by_vip(table: &Table, ip: IpAddr, port: Option<u16>) -> Vec<&Arc<Service>> {
    let is_its = |service: &Service| {
        let is_pin = service.pin.is_some_and(|pin| {
            IpAddr::from(*pin.ip()) == ip && port.is_none_or(|port| port == pin.port())
        });
        let is_public = |public: &SocketAddr| {
            public.ip() == ip && port.is_none_or(|port| port == public.port())
        };
        IpAddr::from(service.vip) == ip
            || service.vip6.map(IpAddr::from) == Some(ip)
            || is_pin
            || service.public.iter().any(is_public)
    };
    table.services.values().filter(|service| is_its(service)).collect()
}

/// The note that an address is another service's, too.
pub fn also_at(ip: IpAddr, other: &Service) -> String {
    let name = &other.name;
    let at = other.public.iter().filter(|public| public.ip() == ip);
    let at: Vec<String> = at.map(|public| public.to_string()).collect();
    format!("{name} has {} as well: `nohop explain {name}`", at.join(" and "))
}

/// The services that have an instance at this address, in or out.
pub fn by_instance<'a>(table: &'a Table, subject: &ExplainTarget) -> Vec<&'a Arc<Service>> {
    let has_it = |service: &Service| {
        let is_at = |it: &Backend| {
            let address = it.address.map(|address| address.to_string());
            subject.is_at(&it.shown_address) || address.is_some_and(|it| subject.is_at(&it))
        };
        service.backends.iter().any(is_at)
            || service.excluded.iter().any(|it| subject.is_at(&it.address))
    };
    table.services.values().filter(|service| has_it(service)).collect()
}

/// What a connection to an instance's address gets, a sentence.
pub fn direct(what: &str, instances: &[InstanceStatus]) -> String {
    if instances.is_empty() {
        return format!(
            "{what} is no service's VIP, and no service has an instance there: `nohop services` lists \
             both"
        );
    }
    let named = instances.iter().take(N_NAMED);
    let named = named.map(|it| format!("`{}` at {} ({})", it.service, it.address, it.state));
    let more = match instances.len().saturating_sub(N_NAMED) {
        0 => String::new(),
        n => format!(" and {n} more"),
    };
    let named = named.collect::<Vec<_>>().join(", ");
    format!(
        "{what} is the address of an instance of {named}{more}; a connection to it by this address isn't \
         redirected"
    )
}

/// What a connection to an address of a service gets where the service has no such port there. `shown` is
/// the address, or the name that stands for it.
pub fn other_port(service: &Service, connected: SocketAddr, shown: &str) -> Option<String> {
    let port = connected.port();
    let Ports::Only(ports) = &service.ports else { return None };
    let is_pin = service.pin.is_some_and(|pin| SocketAddr::from(pin) == connected);
    if is_pin || ports.contains(&port) || service.public.contains(&connected) {
        return None;
    }
    let ports = ports.iter().map(u16::to_string).collect::<Vec<_>>().join(" or ");
    Some(format!(
        "a connection to {shown} is refused with ECONNREFUSED: `{}` is connected to at port {ports} \
         (nohop-ports in Meta, else vip.ports)",
        service.name
    ))
}

/// All instances of a name: its backends, those that are out, and what else the source has. `is_cold` is
/// whether its service's instances are only fetched by demand.
pub fn instances(
    name: &str,
    is_cold: bool,
    backends: &[BackendStatus],
    excluded: &[Excluded],
    inspection: Option<&Inspection>,
) -> Vec<InstanceStatus> {
    let inspected = inspection.into_iter().flat_map(|inspection| &inspection.instances);
    let mut inspected: BTreeMap<(String, String), &InspectedInstance> =
        inspected.map(|it| ((it.node.clone(), it.id.clone()), it)).collect();
    let mut checks = |node: &str, id: &str| -> Vec<CheckStatus> {
        let found = inspected.remove(&(node.to_owned(), id.to_owned()));
        found.map(|it| it.checks.iter().map(check).collect()).unwrap_or_default()
    };
    let mut all: Vec<InstanceStatus> = Vec::new();
    for backend in backends {
        all.push(InstanceStatus {
            service: name.to_owned(),
            address: backend.address.clone(),
            node: backend.node.clone(),
            instance: backend.instance.clone(),
            instance_name: backend.instance_name.clone(),
            state: format!("{:?}", backend.state).to_lowercase(),
            reason: backend.reason.clone(),
            checks: checks(&backend.node, &backend.instance),
        });
    }
    for out in excluded {
        all.push(InstanceStatus {
            service: name.to_owned(),
            address: out.address.clone(),
            node: out.node.clone(),
            instance: out.id.clone(),
            instance_name: display_name(&out.id, name),
            state: OUT.to_owned(),
            reason: Some(out.reason.clone()),
            checks: checks(&out.node, &out.id),
        });
    }
    for it in inspected.into_values() {
        let same = backends.iter().find(|backend| backend.address == it.address);
        let (state, reason) = match (&it.out, same) {
            (Some(reason), _) => (OUT.to_owned(), reason.clone()),
            (None, Some(backend)) => (
                format!("{:?}", backend.state).to_lowercase(),
                format!("one backend with `{}/{}`", backend.node, backend.instance_name),
            ),
            (None, None) => {
                let not_yet = match is_cold {
                    true => "cold: fetched when the name is looked up",
                    false => "this node hasn't taken it over yet",
                };
                let why = check_name(&it.service).err().unwrap_or_else(|| not_yet.to_owned());
                (OUT.to_owned(), why)
            }
        };
        all.push(InstanceStatus {
            service: name.to_owned(),
            address: it.address.clone(),
            node: it.node.clone(),
            instance: it.id.clone(),
            instance_name: display_name(&it.id, name),
            state,
            reason: Some(with_display_names(&reason, name)),
            checks: it.checks.iter().map(check).collect(),
        });
    }
    all
}

fn check(check: &InspectedCheck) -> CheckStatus {
    let InspectedCheck { name, status, output } = check.clone();
    CheckStatus { name, status, output }
}

/// What the source has of a name that isn't routed, or no longer has of one that is, and what keeps more
/// from being shown.
pub fn notes(
    name: &str,
    tag: &str,
    service: Option<&Service>,
    result: Option<&InspectResult>,
) -> Vec<String> {
    let inspection = match result {
        None => return Vec::new(),
        Some(Err(error)) => return vec![format!("checks aren't shown: {error}")],
        Some(Ok(inspection)) => inspection,
    };
    let mut notes = Vec::new();
    let Inspection { instances, n_more, is_filtered, .. } = &**inspection;
    let n = instances.len() + n_more;
    let n_tagged = instances.iter().filter(|instance| instance.is_tagged).count();
    let names: BTreeSet<&str> = instances.iter().map(|it| &*it.service).collect();
    let instances = counted(n, "instance");
    let is_routed = service.is_some();
    let shown = names.first().copied().filter(|name| !name.is_empty()).unwrap_or(name);
    if !is_routed && n == 0 && !is_filtered {
        notes.push(format!("Consul has no service `{name}`"));
    } else if service.is_some_and(has_no_instance) && n == 0 && !is_filtered {
        notes.push(format!(
            "Consul no longer has the service `{name}`: the name is answered for up to 5 minutes after \
             it left Consul's list"
        ));
    } else if !is_routed && n > 0 && n_tagged == 0 {
        notes.push(format!(
            "Consul has `{shown}` with {instances}, none with the tag `{tag}`: add it to the tags of the \
             registration"
        ));
    } else if !is_routed && n > 0 {
        notes.push(format!(
            "Consul has `{shown}` with {instances}, {n_tagged} of them with the tag `{tag}`: see the \
             reason of each"
        ));
    }
    if *n_more > 0 {
        let more = counted(*n_more, "further instance");
        notes.push(format!("the checks of {more} aren't shown"));
    }
    if *is_filtered {
        notes.push(
            "Consul left out what the token may not read: it needs service:read and node:read"
                .to_owned(),
        );
    }
    notes
}

/// The note that names services whose names are like one that doesn't exist.
/// None for what can't be a name, which may be long: the comparison takes time by its length.
pub fn similar<'a>(name: &str, services: impl Iterator<Item = &'a str>) -> Option<String> {
    check_name(name).ok()?;
    let similarity = |service: &'a str| (strsim::jaro_winkler(name, service), service);
    let mut similar: Vec<_> = services.map(similarity).filter(|(it, _)| *it > 0.85).collect();
    similar.sort_by(|(one, _), (other, _)| other.total_cmp(one));
    let named = similar.iter().take(N_SIMILAR).map(|(_, name)| format!("`{name}`"));
    let named = named.collect::<Vec<_>>().join(" or ");
    (!named.is_empty()).then(|| format!("did you mean {named}?"))
}

fn has_no_instance(service: &Service) -> bool {
    service.backends.is_empty() && service.excluded.is_empty()
}

/// What the result of a connection depends on in addition to the service in the table.
#[derive(Clone, Debug, Default)]
pub struct ConnectContext<'a> {
    /// The backends that failed by themselves so that few connections or none go to them for now.
    pub n_ejected: usize,
    /// That critical instances are kept, if they are.
    pub kept: Option<String>,
    /// What the source has of the service, if it was asked.
    pub inspection: Option<&'a Inspection>,
}

/// The result of a connection in this state of the service.
pub fn sentence(fqdn: &str, service: &Service, context: &ConnectContext<'_>) -> String {
    let healthy: Vec<&Backend> = service.healthy().collect();
    // The kernel uses the groups in order.
    let group = healthy.iter().map(|backend| backend.group).min().unwrap_or_default();
    let n_first = healthy.iter().filter(|backend| backend.group == group).count();
    // Of those that are ejected or kept, the further clauses have the state.
    let is_doubtful = context.n_ejected > 0 || context.kept.is_some();
    let kind = match group {
        0 if is_doubtful => "",
        0 => "healthy ",
        _ => "spare ",
    };
    let by = match service.algorithm {
        BalanceAlgorithm::Random => "at random by weight".to_owned(),
        algorithm => format!("by `{algorithm}`"),
    };
    let target = target(fqdn, service);
    let mut clauses = vec![match n_first {
        0 if service.watch == Watch::Cold => cold(&target, context.inspection),
        0 => format!(
            "{target} is refused with ECONNREFUSED: {}",
            match service.backends.len() + service.excluded.len() {
                0 => "it has no instance".to_owned(),
                1 => "its one instance isn't fit".to_owned(),
                n => format!("none of its {n} instances is fit"),
            }
        ),
        1 => format!("{target} goes to its one {kind}backend"),
        n => format!("{target} goes to one of {n} {kind}backends, {by}"),
    }];
    match healthy.len() - n_first {
        0 => {}
        1 => clauses.push("where that isn't possible, to 1 spare backend".to_owned()),
        n => clauses.push(format!("where that isn't possible, to one of {n} spare backends")),
    }
    let n_host_only = healthy.iter().filter(|backend| backend.host_only).count();
    if n_host_only > 0 {
        clauses.push(format!(
            "{n_host_only} of them on this host's loopback, for connects from its own network \
             namespace only"
        ));
    }
    let n_v6 = healthy.iter().filter(|backend| is_v6(backend)).count();
    if n_v6 > 0 && n_v6 == healthy.len() {
        clauses.push(
            "from an IPv4 socket (AF_INET) it is refused with ECONNREFUSED, since every healthy \
             backend is at an IPv6 address"
                .to_owned(),
        );
    } else if n_v6 > 0 {
        let public = service.public.iter().filter(|address| address.is_ipv6());
        let vips: Vec<String> = service
            .vip6
            .iter()
            .map(ToString::to_string)
            .chain(public.map(ToString::to_string))
            .collect();
        let by = if vips.is_empty() {
            "which get nothing while others are at IPv4 addresses: only connections to an address \
             of `vip.pool6` would reach both"
                .to_owned()
        } else {
            format!("which only connections to {} reach", vips.join(" or "))
        };
        clauses.push(format!("{n_v6} of them at IPv6 addresses, {by}"));
    }
    if n_v6 > 0 && service.protocols.udp() {
        let vip = service.vip;
        clauses.push(format!("UDP sent to {vip} without a connect reaches IPv4 backends only"));
    }
    if !healthy.is_empty() {
        clauses.extend(refused(service));
    }
    match context.n_ejected {
        0 => {}
        1 => clauses.push("1 of them is ejected for now: see its reason".to_owned()),
        n => clauses.push(format!("{n} of them are ejected for now: see their reasons")),
    }
    clauses.extend(context.kept.clone());
    clauses.join("; ")
}

/// The result of a connection to a cold service of which no fit instance is known.
fn cold(target: &str, inspection: Option<&Inspection>) -> String {
    let n_fit = inspection.map(|it| it.instances.iter().filter(|one| one.out.is_none()).count());
    let why = "the service is cold, since nothing on this node uses it";
    let has = match n_fit {
        Some(0) => {
            return format!(
                "{target} is refused with ECONNREFUSED: {why}, and Consul has no fit instance"
            );
        }
        Some(n) => format!("; Consul has {n} fit {}", if n == 1 { "one" } else { "ones" }),
        None => String::new(),
    };
    format!(
        "{target} goes to the instances that are fetched when its name is looked up: {why}{has}; a \
         connection without a lookup is refused until then"
    )
}

/// What a name gets of which it isn't known whether a service has it.
pub fn unknown(fqdn: &str, is_forwarded: bool, why: &str) -> String {
    let what = match is_forwarded {
        true => {
            "is forwarded to other resolvers (dns.unrouted), and gets SERVFAIL where they lack it"
        }
        false => "gets SERVFAIL",
    };
    format!("{fqdn} {what}: it isn't known whether there is such a service; {why}")
}

/// How many of them are ejected.
pub fn n_ejected(backends: &[BackendStatus]) -> usize {
    backends.iter().filter(|it| it.state == BackendState::Ejected).count()
}

/// A connection, and all that it may be to: the name, its addresses, ports and protocols.
pub fn target(fqdn: &str, service: &Service) -> String {
    let vip6 = service.vip6.map(|vip6| format!(" or {vip6}")).unwrap_or_default();
    let ports = match &service.ports {
        Ports::Any => "any port".to_owned(),
        Ports::Only(ports) => {
            let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
            format!("port {}", ports.join(" or "))
        }
    };
    let protocols = match service.protocols {
        Protocols::Tcp => "TCP",
        Protocols::Udp => "UDP",
        Protocols::Both => "TCP or UDP",
    };
    let public: String = service.public.iter().map(|public| format!(" or to {public}")).collect();
    format!("a connection to {fqdn} ({}{vip6}) at {ports}{public} by {protocols}", service.vip)
}

/// Connections that the service's addresses refuse in any case.
fn refused(service: &Service) -> Option<String> {
    let ports = match service.ports {
        Ports::Any => None,
        Ports::Only(_) => Some("any other port"),
    };
    let protocol = match service.protocols {
        Protocols::Tcp => Some("UDP"),
        Protocols::Udp => Some("TCP"),
        Protocols::Both => None,
    };
    let refused: Vec<&str> = ports.into_iter().chain(protocol).collect();
    (!refused.is_empty()).then(|| format!("{} is refused", refused.join(" or ")))
}

fn is_v6(backend: &Backend) -> bool {
    matches!(backend.address, Some(SocketAddr::V6(_)))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::catalog::InspectError;
    use crate::table::BackendState;

    #[test]
    fn a_subject_is_a_name_or_an_address() {
        let address = |ip: &str, port| ExplainTarget::Address(ip.parse().unwrap(), port);
        let name = |name: &str, port| ExplainTarget::Name(name.into(), port);
        for (text, expected) in [
            ("Web", name("web", None)),
            ("web.service.", name("web", None)),
            ("v2.web.service", name("v2.web", None)),
            ("service", name("service", None)),
            ("web:80", name("web", Some(80))),
            ("Web.service.:80", name("web", Some(80))),
            ("web:http", name("web:http", None)),
            ("web:80:81", name("web:80:81", None)),
            ("web:65536", name("web:65536", None)),
            (":80", name(":80", None)),
            ("127.128.0.7", address("127.128.0.7", None)),
            ("127.128.0.7:80", address("127.128.0.7", Some(80))),
            ("fd00::7", address("fd00::7", None)),
            ("[fd00::7]", address("fd00::7", None)),
            ("[fd00::7]:80", address("fd00::7", Some(80))),
            ("[::ffff:10.0.0.7]:80", address("10.0.0.7", Some(80))),
            ("10.0.0", name("10.0.0", None)),
        ] {
            assert_eq!(ExplainTarget::parse(text, "service"), expected, "{text}");
        }
        let of = |text| ExplainTarget::parse(text, "service");
        assert!(of("10.0.0.7").is_at("10.0.0.7:80") && of("10.0.0.7:80").is_at("10.0.0.7:80"));
        assert!(of("fd00::7").is_at("[fd00::7]:80"));
        assert!(
            !of("10.0.0.7:81").is_at("10.0.0.7:80") && !of("10.0.0.7").is_at("db.example.com:80")
        );
        assert!(!of("web").is_at("web:80"));
    }

    #[test]
    fn services_are_found_by_their_addresses() {
        let web = Service {
            pin: Some("127.0.0.1:81".parse().unwrap()),
            public: vec!["203.0.113.10:443".parse().unwrap()],
            excluded: vec![Excluded {
                address: "10.0.0.8:1".into(),
                node: "n".into(),
                id: "out".into(),
                reason: "check `web` is critical".into(),
            }],
            ..service(&["10.0.0.7:1"])
        };
        let table = Table {
            generation: 1,
            services: [("web".into(), Arc::new(web))].into(),
            ..Table::default()
        };
        for (text, is_vip, is_instance) in [
            ("127.128.0.1", true, false),
            ("127.128.0.1:443", true, false),
            ("127.0.0.1:81", true, false),
            ("127.0.0.1:82", false, false),
            ("203.0.113.10", true, false),
            ("203.0.113.10:443", true, false),
            ("203.0.113.10:444", false, false),
            ("10.0.0.7", false, true),
            ("10.0.0.7:1", false, true),
            ("10.0.0.8:1", false, true),
            ("10.0.0.7:2", false, false),
            ("10.0.0.9", false, false),
        ] {
            let subject = ExplainTarget::parse(text, "service");
            let ExplainTarget::Address(ip, port) = subject else { panic!("{text}") };
            assert_eq!(!by_vip(&table, ip, port).is_empty(), is_vip, "{text}");
            assert_eq!(by_instance(&table, &subject).len(), usize::from(is_instance), "{text}");
        }
        let public = vec!["203.0.113.10:53".parse().unwrap()];
        let dns = Service { name: "dns".into(), public, ..service(&[]) };
        let mut both = table.clone();
        both.services.insert("dns".into(), Arc::new(dns.clone()));
        let ip = "203.0.113.10".parse().unwrap();
        assert_eq!(by_vip(&both, ip, None).len(), 2);
        assert_eq!(by_vip(&both, ip, Some(53)).len(), 1);
        let note = "dns has 203.0.113.10:53 as well: `nohop explain dns`";
        assert_eq!(also_at(ip, &dns), note);
        let web = &table.services["web"];
        for allowed in ["127.128.0.1:80", "127.0.0.1:81", "203.0.113.10:443"] {
            assert_eq!(other_port(web, allowed.parse().unwrap(), allowed), None, "{allowed}");
        }
        assert!(other_port(web, "127.128.0.1:81".parse().unwrap(), "web.service:81").is_some());
        let refused = other_port(web, "127.128.0.1:443".parse().unwrap(), "web.service:443");
        let refused = refused.unwrap();
        assert!(refused.contains("web.service:443 is refused") && refused.contains("at port 80"));
    }

    #[test]
    fn instances_have_the_checks_that_the_source_has() {
        let inspected = |id: &str, address: &str, out: Option<&str>| InspectedInstance {
            service: "web".into(),
            node: "n".into(),
            id: id.into(),
            address: address.into(),
            is_tagged: out.is_none(),
            out: out.map(str::to_owned),
            checks: vec![InspectedCheck {
                name: format!("check of {id}"),
                status: "passing".into(),
                output: "200 OK".into(),
            }],
        };
        let backend = BackendStatus {
            address: "10.0.0.7:1".into(),
            node: "n".into(),
            instance: "a".into(),
            instance_name: "a".into(),
            weight: 1,
            state: BackendState::Healthy,
            reason: None,
            drained_by: None,
            connects: 0,
            in_flight: None,
            failures: 0,
            connect_us: None,
            rtt_us: None,
        };
        let excluded = Excluded {
            address: "10.0.0.8:1".into(),
            node: "n".into(),
            id: "b".into(),
            reason: "service maintenance".into(),
        };
        let inspection = Inspection {
            source: "consul",
            instances: vec![
                inspected("a", "10.0.0.7:1", None),
                inspected("a2", "10.0.0.7:1", None),
                inspected("b", "10.0.0.8:1", Some("service maintenance")),
                inspected("c", "10.0.0.9:1", Some("lacks the tag `routed`")),
                inspected("d", "10.0.0.10:1", None),
            ],
            n_more: 0,
            is_filtered: false,
        };
        let (backends, excluded) = ([backend], [excluded]);
        let all = instances("web", false, &backends, &excluded, Some(&inspection));
        let shown = all.iter().map(|it| {
            let reason = it.reason.as_deref().unwrap_or_default();
            format!("{} {}: {reason}: {}", it.instance, it.state, it.checks[0].name)
        });
        assert_eq!(
            shown.collect::<Vec<_>>(),
            [
                "a healthy: : check of a",
                "b out: service maintenance: check of b",
                "a2 healthy: one backend with `n/a`: check of a2",
                "c out: lacks the tag `routed`: check of c",
                "d out: this node hasn't taken it over yet: check of d",
            ]
        );
        let cold = instances("web", true, &[], &[], Some(&inspection));
        let cold: Vec<_> = cold.iter().filter_map(|it| it.reason.as_deref()).collect();
        assert_eq!(cold[0], "cold: fetched when the name is looked up");
        let without = instances("web", false, &backends, &excluded, None);
        assert_eq!(without.len(), 2);
        assert!(without.iter().all(|it| it.checks.is_empty()));
    }

    #[test]
    fn what_consul_has_of_a_name_that_is_not_routed() {
        let of = |n: usize, is_tagged: bool, is_filtered: bool| -> InspectResult {
            let instance =
                InspectedInstance { service: "Web".into(), is_tagged, ..Default::default() };
            let instances = vec![instance; n];
            Ok(Inspection { instances, is_filtered, ..Inspection::default() }.into())
        };
        let failed = Err(InspectError::Failed("connection refused".into()));
        let full = service(&["10.0.0.7:1"]);
        let empty = service(&[]);
        let gone = "Consul no longer has the service `web`: the name is answered for up to 5 minutes \
                    after it left Consul's list";
        for (result, routed, expected) in [
            (None, None, ""),
            (Some(failed), Some(&full), "checks aren't shown: connection refused"),
            (Some(of(2, true, false)), Some(&full), ""),
            (Some(of(0, false, false)), Some(&empty), gone),
            (Some(of(0, false, false)), Some(&full), ""),
            (Some(of(0, false, false)), None, "Consul has no service `web`"),
            (
                Some(of(2, false, false)),
                None,
                "Consul has `Web` with 2 instances, none with the tag `routed`: add it to the tags of the \
                 registration",
            ),
            (
                Some(of(2, true, false)),
                None,
                "Consul has `Web` with 2 instances, 2 of them with the tag `routed`: see the reason of each",
            ),
            (
                Some(of(0, false, true)),
                None,
                "Consul left out what the token may not read: it needs service:read and node:read",
            ),
        ] {
            let notes = notes("web", "routed", routed, result.as_ref()).join("; ");
            assert_eq!(notes, expected, "{result:?}");
        }
    }

    #[test]
    fn a_misspelt_name_is_corrected() {
        let services = ["helloworld", "helloworld-2", "web", "postgres"];
        for (name, expected) in [
            ("helloworl", Some("did you mean `helloworld` or `helloworld-2`?")),
            ("helloword", Some("did you mean `helloworld` or `helloworld-2`?")),
            ("wbe", None),
            ("postgress", Some("did you mean `postgres`?")),
            ("nope", None),
            ("", None),
        ] {
            assert_eq!(similar(name, services.into_iter()).as_deref(), expected, "{name}");
        }
    }

    pub(in crate::daemon) fn service(backends: &[&str]) -> Service {
        let backend = |address: &&str| {
            let address: SocketAddr = address.parse().unwrap();
            Backend { host_only: address.ip().is_loopback(), ..Backend::example(address) }
        };
        Service::example(backends.iter().map(backend).collect())
    }

    #[test]
    fn what_a_connect_gets() {
        use Protocols::*;
        let (v4, v6) = ("10.0.0.7:1", "[2001:db8::7]:1");
        let rows: &[(&[&str], Ports, Protocols, &str)] = &[
            (
                &[],
                Ports::only([80]),
                Tcp,
                "at port 80 by TCP is refused with ECONNREFUSED: it has no instance",
            ),
            (
                &[v4],
                Ports::only([80, 5432]),
                Tcp,
                "at port 80 or 5432 by TCP goes to its one healthy backend; any other port or UDP \
                 is refused",
            ),
            (
                &[v4, "127.0.0.1:1"],
                Ports::Any,
                Both,
                "at any port by TCP or UDP goes to one of 2 healthy backends, at random by weight; \
                 1 of them on this host's loopback, for connects from its own network namespace only",
            ),
            (
                &[v6],
                Ports::Any,
                Tcp,
                "at any port by TCP goes to its one healthy backend; from an IPv4 socket (AF_INET) \
                 it is refused with ECONNREFUSED, since every healthy backend is at an IPv6 \
                 address; UDP is refused",
            ),
            (
                &[v4, v6],
                Ports::only([53]),
                Udp,
                "at port 53 by UDP goes to one of 2 healthy backends, at random by weight; 1 of \
                 them at IPv6 addresses, which get nothing while others are at IPv4 addresses: only \
                 connections to an address of `vip.pool6` would reach both; UDP sent to 127.128.0.1 \
                 without a connect reaches IPv4 backends only; any other port or TCP is refused",
            ),
        ];
        for (backends, ports, protocols, expected) in rows {
            let service =
                Service { ports: ports.clone(), protocols: *protocols, ..service(backends) };
            let expected = format!("a connection to web.service (127.128.0.1) {expected}");
            assert_eq!(sentence("web.service", &service, &ConnectContext::default()), expected);
        }
    }

    #[test]
    fn an_ipv6_backend_is_reached_by_a_public_address() {
        let mut both = service(&["10.0.0.7:1", "[2001:db8::7]:1"]);
        both.public = vec!["[2001:db8:1::10]:443".parse().unwrap()];
        let text = sentence("w", &both, &ConnectContext::default());
        let expected =
            "1 of them at IPv6 addresses, which only connections to [2001:db8:1::10]:443 reach";
        assert!(text.contains(expected), "{text}");
    }

    #[test]
    fn spare_backends_and_the_algorithm_are_named() {
        let mut some = service(&["10.0.0.7:1", "10.0.0.8:1", "10.0.0.9:1", "10.0.0.10:1"]);
        some.algorithm = BalanceAlgorithm::Least;
        let mut check = |states: [(BackendState, u8); 4], expected: &str| {
            for (backend, (state, group)) in some.backends.iter_mut().zip(states) {
                (backend.state, backend.group) = (state, group);
            }
            let text = sentence("w", &some, &ConnectContext::default());
            assert!(text.contains(expected), "{text}");
        };
        use BackendState::*;
        check(
            [(Healthy, 0), (Warning, 0), (Spare, 1), (Draining, 0)],
            "goes to one of 2 healthy backends, by `least`; where that isn't possible, to 1 spare \
             backend; any",
        );
        check(
            [(Spare, 1), (Draining, 0), (Spare, 2), (Spare, 2)],
            "goes to its one spare backend; where that isn't possible, to one of 2 spare backends;",
        );
        check([(Draining, 0); 4], "is refused with ECONNREFUSED: none of its 4 instances is fit");
    }

    #[test]
    fn a_cold_service_is_fetched_by_a_lookup() {
        let cold = Service { watch: Watch::Cold, ..service(&[]) };
        let of = |outs: &[Option<&str>]| {
            let instance = |out: &Option<&str>| InspectedInstance {
                out: out.map(str::to_owned),
                ..Default::default()
            };
            Inspection { instances: outs.iter().map(instance).collect(), ..Inspection::default() }
        };
        let (two, none) = (of(&[None, Some("critical"), None]), of(&[Some("critical")]));
        let fetched = "goes to the instances that are fetched when its name is looked up: the service is \
                       cold, since nothing on this node uses it";
        let until = "a connection without a lookup is refused until then";
        for (inspection, expected) in [
            (None, format!("{fetched}; {until}")),
            (Some(&two), format!("{fetched}; Consul has 2 fit ones; {until}")),
            (
                Some(&none),
                "is refused with ECONNREFUSED: the service is cold, since nothing on this node uses it, \
                 and Consul has no fit instance"
                    .to_owned(),
            ),
        ] {
            let context = ConnectContext { inspection, ..ConnectContext::default() };
            let target = "a connection to w (127.128.0.1) at port 80 by TCP";
            assert_eq!(sentence("w", &cold, &context), format!("{target} {expected}"));
        }
    }

    #[test]
    fn backends_that_are_ejected_or_kept_are_not_called_healthy() {
        let two = service(&["10.0.0.7:1", "10.0.0.8:1"]);
        let kept = "kept: all instances are critical since 3 s; for 57 s more";
        for (n_ejected, kept, expected) in [
            (0, None, "goes to one of 2 healthy backends, at random by weight; any other port"),
            (2, None, "goes to one of 2 backends, at random by weight; any other port"),
            (2, None, "is refused; 2 of them are ejected for now: see their reasons"),
            (0, Some(kept), "goes to one of 2 backends, at random by weight; any other port"),
            (0, Some(kept), "is refused; kept: all instances are critical since 3 s; for"),
        ] {
            let kept = kept.map(str::to_owned);
            let context = ConnectContext { n_ejected, kept, inspection: None };
            let text = sentence("w", &two, &context);
            assert!(text.contains(expected), "{text}");
        }
    }

    #[test]
    fn a_name_that_may_exist_is_not_absent() {
        assert_eq!(
            unknown("x.service", false, "Consul hangs"),
            "x.service gets SERVFAIL: it isn't known whether there is such a service; Consul hangs"
        );
        assert!(
            unknown("x.service", true, "Consul hangs").contains("is forwarded to other resolvers")
        );
    }

    #[test]
    fn both_addresses_are_named() {
        let service = Service { vip6: Some("fd00::1".parse().unwrap()), ..service(&[]) };
        let expected = "a connection to w (127.128.0.1 or fd00::1) at port 80 by TCP";
        assert_eq!(target("w", &service), expected);
        let mixed = self::service(&["10.0.0.7:1", "[2001:db8::7]:1"]);
        let text =
            sentence("w", &Service { vip6: service.vip6, ..mixed }, &ConnectContext::default());
        let clause = "1 of them at IPv6 addresses, which only connections to fd00::1 reach; ";
        assert!(text.contains(clause), "{text}");
    }
}
