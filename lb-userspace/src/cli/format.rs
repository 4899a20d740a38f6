//! The admin interface's documents as text for people.

use std::fmt::Write;

use super::instance::display_name;
use crate::admin::api::{
    BackendStatus, EdgeDocument, EdgeInterfaceDocument, Explanation, MapStatus, PoolStatus,
    ServiceStatus, SourceStatus, Status, UnitStatus, UpstreamStatus, WatchStatus,
};

/// `nohop status`
pub fn status(status: &Status) -> String {
    let mut text = String::new();
    let headline = if status.ready { "ready" } else { "NOT READY" };
    line(&mut text, format!("{headline}  nohop {} (pid {})", status.version, status.pid));
    for problem in &status.problems {
        line(&mut text, format!("  ! {problem}"));
    }
    for SourceStatus { name, state, age_seconds, facts, watches, .. } in &status.sources {
        let age = match age_seconds {
            Some(seconds) => format!("last answer {} ago", duration(*seconds)),
            None => "no answer yet".to_owned(),
        };
        line(&mut text, format!("source    {name} {state}, {age}"));
        for fact in facts {
            line(&mut text, format!("          {fact}"));
        }
        if let Some(watches) = watches {
            watch_lines(watches).into_iter().for_each(|shown| line(&mut text, shown));
        }
    }
    let (services, backends) = (status.services, status.backends);
    let generation = status.generation;
    line(
        &mut text,
        format!("table     generation {generation}: {services} services, {backends} backends"),
    );
    if status.drains > 0 {
        line(&mut text, format!("drains    {} by hand: see `nohop drain`", status.drains));
    }
    let PoolStatus { used, quarantined, size } = status.pool;
    let quarantined = match quarantined {
        0 => String::new(),
        n => format!(", {n} in quarantine for a day"),
    };
    line(&mut text, format!("vip.pool  {used} of {size} addresses used{quarantined}"));
    let mut listen: Vec<_> = status.dns.listen.iter().map(ToString::to_string).collect();
    listen.extend(status.dns.listen_tls.iter().map(|address| format!("{address} (TLS)")));
    line(&mut text, format!("dns       *.{} on {}", status.dns.domain, listen.join(", ")));
    for upstream in &status.dns.upstreams {
        line(&mut text, format!("          {}", upstream_line(upstream)));
    }
    let attached = if status.datapath.attached { "attached to" } else { "NOT ATTACHED to" };
    let adopted = if status.datapath.adopted { ", taken over from an earlier daemon" } else { "" };
    line(&mut text, format!("datapath     {attached} {}{adopted}", status.datapath.cgroup));
    if let Some(why) = &status.datapath.mode_reason {
        line(
            &mut text,
            format!("          {}: connections are only counted: {why}", status.datapath.mode),
        );
    }
    for UnitStatus { name, state, reason } in &status.datapath.units {
        if let Some(reason) = reason {
            line(&mut text, format!("          unit {name}: {state}: {reason}"));
        }
    }
    if let Some(edge) = &status.edge {
        edge_lines(edge).into_iter().for_each(|shown| line(&mut text, shown));
    }
    for limit in &status.datapath.limits {
        line(&mut text, format!("          {limit}"));
    }
    if status.datapath.refused_services > 0 {
        let n = status.datapath.refused_services;
        line(&mut text, format!("          {n} services aren't in the kernel as they should be"));
    }
    for map in &status.datapath.maps {
        line(&mut text, format!("          {}", pressure(map)));
    }
    for (name, n) in status.datapath.counters.iter().filter(|(_, n)| **n > 0) {
        line(&mut text, format!("          {name}: {n}"));
    }
    text
}

/// The edge's interfaces and flows, and what it announces.
fn edge_lines(edge: &EdgeDocument) -> Vec<String> {
    let EdgeDocument { interfaces, proof, flows, capacity, announced, withdrawn } = edge;
    let announced = match (withdrawn, announced.len()) {
        (Some(why), 0) => format!("no public VIP announced: {why}"),
        (Some(why), n) => format!("{n} public addresses announced: {why}"),
        (None, n) => format!("{n} public addresses announced"),
    };
    let proof = match proof.as_deref() {
        Some("passed") => "; proof passed".to_owned(),
        Some(why) => format!("; {why}"),
        None => String::new(),
    };
    let mut lines = vec![format!("edge      {flows} of {capacity} flows; {announced}{proof}")];
    lines.extend(interfaces.iter().map(|EdgeInterfaceDocument { name, mode, message }| {
        let mode = mode.as_deref().unwrap_or("NOT ATTACHED");
        let message = message.as_ref().map(|text| format!(": {text}")).unwrap_or_default();
        format!("          {name} {mode}{message}")
    }));
    lines
}

/// A resolver's state and counters.
fn upstream_line(upstream: &UpstreamStatus) -> String {
    let UpstreamStatus { address, state, sent, results, mean_ms } = upstream;
    let mean = mean_ms.map(|ms| format!(" in {ms:.1} ms")).unwrap_or_default();
    let failed = ["refused", "timeout", "unreachable"].into_iter().filter_map(|result| {
        results.get(result).filter(|n| **n > 0).map(|n| format!(", {n} {result}"))
    });
    let n_answered = results.get("answered").copied().unwrap_or_default();
    let failed: String = failed.collect();
    format!("upstream {address} {state}: {n_answered} of {sent} queries answered{mean}{failed}")
}

/// The watched services, and the load on Consul at most.
fn watch_lines(watches: &WatchStatus) -> [String; 2] {
    let WatchStatus { live, cold, connections, max_connections, .. } = watches;
    let oldest = watches.oldest_age_seconds.map(duration);
    let oldest = oldest.map(|age| format!(", the oldest answered {age} ago")).unwrap_or_default();
    let megabytes = watches.bytes_per_hour as f64 / 1e6;
    let requests = watches.requests_per_hour;
    [
        format!(
            "          {live} services live, {cold} cold; {connections} of {max_connections} \
             connections{oldest}"
        ),
        format!("          at most {requests} requests and {megabytes:.1} MB an hour"),
    ]
}

/// `nohop services`
pub fn services(services: &[ServiceStatus]) -> String {
    if services.is_empty() {
        return "no services\n".to_owned();
    }
    let width = services.iter().map(|service| service.name.len()).max().unwrap_or_default();
    let mut text = String::new();
    for each in services {
        service(&mut text, each, width);
    }
    text
}

/// `nohop explain NAME`
pub fn explanation(explanation: &Explanation) -> String {
    let mut text = String::new();
    let Explanation { source, shadowed, .. } = explanation;
    let source = source.as_ref().map(|source| match shadowed.is_empty() {
        true => format!("source: {source}"),
        false => format!("source: {source}, which shadows {}", shadowed.join(" and ")),
    });
    line(&mut text, explanation.connect.clone());
    if let Some(source) = source {
        line(&mut text, source);
    }
    for note in &explanation.notes {
        line(&mut text, note.clone());
    }
    text.push('\n');
    let backends = explanation.service.as_ref().map(|service| &service.backends[..]);
    let backends = backends.unwrap_or_default();
    if let Some(each) = &explanation.service {
        service_head(&mut text, each, each.name.len());
    }
    for instance in &explanation.instances {
        let is_it =
            |it: &&BackendStatus| (&it.node, &it.instance) == (&instance.node, &instance.instance);
        match backends.iter().find(is_it) {
            Some(it) => line(&mut text, format!("  {}", backend(it, &instance.service))),
            None => {
                let id = display_name(&instance.instance, &instance.service);
                let place = place(&instance.address, &instance.node, &id);
                let of = match explanation.service {
                    Some(_) => String::new(),
                    None => format!("  {}", instance.service),
                };
                let reason = instance.reason.as_deref().unwrap_or_default();
                line(&mut text, format!("  {:<10} {place}{of}  {reason}", instance.state));
            }
        }
        for check in &instance.checks {
            let output = match check.status.as_str() {
                "passing" => "",
                _ => &check.output,
            };
            let colon = if output.is_empty() { "" } else { ": " };
            line(&mut text, format!("    check `{}` {}{colon}{output}", check.name, check.status));
        }
    }
    text
}

fn service(text: &mut String, service: &ServiceStatus, width: usize) {
    service_head(text, service, width);
    for backend in &service.backends {
        line(text, format!("  {}", self::backend(backend, &service.name)));
    }
}

fn service_head(text: &mut String, service: &ServiceStatus, width: usize) {
    let ports = &service.ports;
    let vip6 = service.vip6.map(|vip6| format!(" and [{vip6}]:{ports}")).unwrap_or_default();
    let by_family = match service.refused_family {
        0 => String::new(),
        n => format!(", {n} because of their address family"),
    };
    let shadowed = match service.shadowed {
        0 => String::new(),
        n => format!(", {n} only counted"),
    };
    let udp_connects = match (service.udp_connects, service.udp_connects_refused) {
        (0, 0) => String::new(),
        (n, 0) => format!(", UDP connects {n}"),
        (n, n_refused) => format!(", UDP connects {n}, refused {n_refused}"),
    };
    let in_flight = service.in_flight.map(|n| format!(", in flight {n}")).unwrap_or_default();
    let failed = match service.failed {
        0 => String::new(),
        n => format!(", failed {n}"),
    };
    let retransmits = match service.syn_retransmits {
        0 => String::new(),
        n => format!(", SYN retransmits {n}"),
    };
    let pin = service.pin.map(|pin| format!(" and {pin}")).unwrap_or_default();
    let public: String = service.public.iter().map(|public| format!(" and {public}")).collect();
    line(
        text,
        format!(
            "{:<width$}  {}:{ports}{vip6}{pin}{public}  {}, {}, connects {}, refused {}{by_family}{shadowed}{udp_connects}{failed}{retransmits}{in_flight}",
            service.name,
            service.vip,
            service.protocol,
            service.algorithm,
            service.connects,
            service.refused
        ),
    );
    for note in &service.notes {
        line(text, format!("  ~ {note}"));
    }
    if let Some(error) = &service.error {
        line(text, format!("  ! the kernel doesn't have this state of it: {error}"));
    }
    if service.backends.is_empty() {
        line(text, "  no backend: connections are refused".to_owned());
    }
}

fn backend(backend: &BackendStatus, service: &str) -> String {
    let state = format!("{:?}", backend.state).to_lowercase();
    let id = display_name(&backend.instance, service);
    let place = place(&backend.address, &backend.node, &id);
    let reason = backend.reason.as_ref().map(|reason| format!("  {reason}")).unwrap_or_default();
    let (weight, connects) = (backend.weight, backend.connects);
    let in_flight = backend.in_flight.map(|n| format!("  in flight {n}")).unwrap_or_default();
    let failures = match backend.failures {
        0 => String::new(),
        n => format!("  failures {n}"),
    };
    format!(
        "{state:<10} {place}  weight {weight}  connects {connects}{in_flight}{failures}{reason}"
    )
}

fn place(address: &str, node: &str, id: &str) -> String {
    match node {
        "" => format!("{address:<21}"),
        node => format!("{address:<21}  {node}/{id}"),
    }
}

/// A bar of twenty characters: full at the map's capacity, and never empty when it isn't.
fn pressure(map: &MapStatus) -> String {
    let filled = (map.entries * 20).div_ceil(map.capacity.max(1)).min(20) as usize;
    let bar = "#".repeat(filled) + &".".repeat(20 - filled);
    format!("{:<10} [{bar}] {} of {}", map.name, map.entries, map.capacity)
}

pub(super) fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 10.0 => format!("{s:.1} s"),
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.0} h", s / 3600.0),
    }
}

fn line(text: &mut String, line: String) {
    // Writing to a string can't fail.
    let _ = writeln!(text, "{}", line.trim_end_matches(' '));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::api::{CheckStatus, InstanceStatus};
    use crate::config::BalanceAlgorithm;
    use crate::table::{BackendState, Ports, Protocols, Watch};

    fn helloworld() -> ServiceStatus {
        ServiceStatus {
            name: "helloworld".into(),
            vip: [127, 186, 3, 9].into(),
            vip6: None,
            notes: vec![],
            pin: None,
            public: Vec::new(),
            ports: Ports::only([80]),
            protocol: Protocols::Tcp,
            algorithm: BalanceAlgorithm::Random,
            generation: 1,
            error: None,
            watch: Watch::Live,
            connects: 7,
            refused: 0,
            failed: 0,
            syn_retransmits: 0,
            in_flight: None,
            refused_family: 0,
            shadowed: 0,
            udp_connects: 0,
            udp_connects_refused: 0,
            backends: vec![BackendStatus {
                address: "10.0.0.7:23456".into(),
                node: "n1".into(),
                instance: "h1".into(),
                weight: 1,
                state: BackendState::Healthy,
                reason: None,
                connects: 7,
                in_flight: None,
                failures: 0,
                connect_us: None,
                rtt_us: None,
            }],
        }
    }

    #[test]
    fn services_are_one_block_each() {
        let text = "helloworld  127.186.3.9:80  tcp, random, connects 7, refused 0\n  \
                    healthy    10.0.0.7:23456         n1/h1  weight 1  connects 7\n";
        assert_eq!(services(&[helloworld()]), text);
        assert_eq!(services(&[]), "no services\n");
        let odd = ServiceStatus {
            vip6: Some("fd00::9".parse().unwrap()),
            ports: Ports::Any,
            protocol: Protocols::Both,
            notes: vec!["something is odd".into()],
            udp_connects: 5,
            udp_connects_refused: 2,
            failed: 3,
            syn_retransmits: 6,
            in_flight: Some(4),
            ..helloworld()
        };
        let text = "helloworld  127.186.3.9:any and [fd00::9]:any  both, random, connects 7, \
                    refused 0, UDP connects 5, refused 2, failed 3, SYN retransmits 6, in flight 4\n  ~ something is odd\n";
        assert!(services(&[odd]).starts_with(text));
    }

    /// The explanation of a service with these instances that are out.
    fn explained(service: ServiceStatus, out: &[(&str, &str)]) -> Explanation {
        let of_backend = |it: &BackendStatus| InstanceStatus {
            service: service.name.clone(),
            address: it.address.clone(),
            node: it.node.clone(),
            instance: it.instance.clone(),
            state: "healthy".into(),
            reason: None,
            checks: vec![CheckStatus {
                name: "web".into(),
                status: "passing".into(),
                output: "200 OK".into(),
            }],
        };
        let mut instances: Vec<_> = service.backends.iter().map(of_backend).collect();
        instances.extend(out.iter().map(|(id, reason)| InstanceStatus {
            service: service.name.clone(),
            address: "10.0.0.8:1".into(),
            node: "n2".into(),
            instance: (*id).into(),
            state: "out".into(),
            reason: Some((*reason).into()),
            checks: vec![CheckStatus {
                name: "web".into(),
                status: "critical".into(),
                output: "connection refused".into(),
            }],
        }));
        Explanation {
            name: service.name.clone(),
            connect: "a connection goes somewhere".into(),
            source: None,
            shadowed: vec![],
            service: Some(service),
            excluded: vec![],
            instances,
            notes: vec![],
        }
    }

    #[test]
    fn instances_of_nomad_are_shown_as_allocations() {
        let mut service = helloworld();
        let id = "_nomad-task-39e25890-23fb-7513-b98f-97a5310046ad-group-web-helloworld-http";
        service.backends[0].instance = id.into();
        let out = id.replace("39e2", "40e2");
        let explained = explained(service, &[(&out, "check `web` is critical")]);
        let text = explanation(&Explanation {
            source: Some("consul".into()),
            shadowed: vec!["file".into()],
            ..explained
        });
        assert!(text.contains("somewhere\nsource: consul, which shadows file\n\n"), "{text}");
        assert!(text.contains("  n1/alloc 39e25890 web  weight 1  "), "{text}");
        assert!(text.contains("  n2/alloc 40e25890 web  check `web`"), "{text}");
    }

    #[test]
    fn an_explanation_has_each_instance_with_the_reason_and_its_checks() {
        let explained = explained(helloworld(), &[("h2", "check `web` is critical")]);
        let text = explanation(&explained);
        assert!(text.starts_with("a connection goes somewhere\n\nhelloworld"), "{text}");
        assert!(text.contains("\n    check `web` passing\n  out "), "{text}");
        let last = "  out        10.0.0.8:1             n2/h2  check `web` is critical\n    \
                    check `web` critical: connection refused\n";
        assert!(text.ends_with(last), "{text}");
        // Of an address, or of a name without the tag.
        let text = explanation(&Explanation {
            service: None,
            notes: vec!["Consul has it".into()],
            ..explained
        });
        assert!(
            text.starts_with("a connection goes somewhere\nConsul has it\n\n  healthy"),
            "{text}"
        );
        assert!(text.contains("  n1/h1  helloworld\n"), "{text}");
    }

    #[test]
    fn a_status_has_watches_and_their_load() {
        let watches = WatchStatus {
            live: 60,
            cold: 440,
            connections: 61,
            max_connections: 64,
            oldest_age_seconds: Some(42.0),
            requests_per_hour: 4_200,
            bytes_per_hour: 12_340_000,
        };
        let shown = watch_lines(&watches);
        let first =
            "60 services live, 440 cold; 61 of 64 connections, the oldest answered 42 s ago";
        assert_eq!(shown[0].trim_start(), first);
        assert_eq!(shown[1].trim_start(), "at most 4200 requests and 12.3 MB an hour");
    }

    #[test]
    fn pressure_is_a_bar() {
        let bar = |entries| pressure(&MapStatus { name: "SLOTS".into(), entries, capacity: 40 });
        assert_eq!(bar(0), "SLOTS      [....................] 0 of 40");
        assert_eq!(bar(1), "SLOTS      [#...................] 1 of 40");
        assert_eq!(bar(40), "SLOTS      [####################] 40 of 40");
    }
}
