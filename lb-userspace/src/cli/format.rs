//! The admin interface's documents as text for people.

use std::fmt::Write;

use super::columns::{Cell, Palette, Tone, lines};
use crate::admin::api::{
    BackendStatus, CheckStatus, EdgeDocument, EdgeInterfaceDocument, Explanation, InstanceStatus,
    MapStatus, PoolStatus, ServiceStatus, SourceStatus, Status, UnitStatus, UpstreamStatus,
    WatchStatus,
};
use crate::counted::counted;
use crate::table::{BackendState, Watch};

/// `nohop status`
pub fn status(status: &Status, palette: Palette) -> String {
    let mut text = String::new();
    let headline = match status.ready {
        true => palette.paint("ready", Tone::Good),
        false => palette.paint("NOT READY", Tone::Bad),
    };
    line(&mut text, format!("{headline}  nohop {} (pid {})", status.version, status.pid));
    let tone = if status.ready { Tone::Warning } else { Tone::Bad };
    for problem in &status.problems {
        line(&mut text, format!("  {}", palette.paint(&format!("! {problem}"), tone)));
    }
    for SourceStatus { name, state, age_seconds, facts, watches, .. } in &status.sources {
        let age = match age_seconds {
            Some(seconds) => format!("last answer {} ago", duration(*seconds)),
            None => "no answer yet".to_owned(),
        };
        let tone = match state.as_str() {
            "live" => Tone::Good,
            "connecting" => Tone::Warning,
            _ => Tone::Bad,
        };
        line(&mut text, format!("source    {name} {}, {age}", palette.paint(state, tone)));
        for fact in facts {
            line(&mut text, format!("          {fact}"));
        }
        if let Some(watches) = watches {
            watch_lines(watches).into_iter().for_each(|shown| line(&mut text, shown));
        }
    }
    let (services, backends) =
        (counted(status.services, "service"), counted(status.backends, "backend"));
    let generation = status.generation;
    line(&mut text, format!("table     generation {generation}: {services}, {backends}"));
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
        line(&mut text, format!("          {}", upstream_line(upstream, palette)));
    }
    let attached = match status.datapath.attached {
        true => "attached to".to_owned(),
        false => palette.paint("NOT ATTACHED to", Tone::Bad),
    };
    let adopted = if status.datapath.adopted { ", taken over from an earlier daemon" } else { "" };
    line(&mut text, format!("datapath  {attached} {}{adopted}", status.datapath.cgroup));
    if let Some(why) = &status.datapath.mode_reason {
        line(
            &mut text,
            format!("          {}: connections are only counted: {why}", status.datapath.mode),
        );
    }
    for UnitStatus { name, state, reason } in &status.datapath.units {
        if let Some(reason) = reason {
            let tone = if state == "failed" { Tone::Bad } else { Tone::Warning };
            let state = palette.paint(state, tone);
            line(&mut text, format!("          unit {name}: {state}: {reason}"));
        }
    }
    for limit in &status.datapath.limits {
        line(&mut text, format!("          {limit}"));
    }
    if status.datapath.refused_services > 0 {
        let what = match status.datapath.refused_services {
            1 => "1 service isn't in the kernel as it should be".to_owned(),
            n => format!("{n} services aren't in the kernel as they should be"),
        };
        line(&mut text, format!("          {what}"));
    }
    let maps: Vec<_> = status.datapath.maps.iter().map(pressure).collect();
    lines(&maps, palette)
        .into_iter()
        .for_each(|shown| line(&mut text, format!("          {shown}")));
    if !status.datapath.client_address_from.is_empty() {
        let edges = status.datapath.client_address_from.iter().map(ToString::to_string);
        let edges = edges.collect::<Vec<_>>().join(", ");
        line(&mut text, format!("          servers see clients' addresses by edges {edges}"));
    }
    for (name, n) in status.datapath.counters.iter().filter(|(_, n)| **n > 0) {
        line(&mut text, format!("          {name}: {n}"));
    }
    if let Some(edge) = &status.edge {
        edge_lines(edge).into_iter().for_each(|shown| line(&mut text, shown));
    }
    text
}

/// The edge's interfaces and flows, and what it announces.
fn edge_lines(edge: &EdgeDocument) -> Vec<String> {
    let EdgeDocument {
        interfaces,
        proof,
        flows,
        capacity,
        announced,
        withdrawn,
        client_address,
        packets,
    } = edge;
    let announced = match (withdrawn, announced.len()) {
        (Some(why), 0) => format!("no public VIP announced: {why}"),
        (Some(why), n) => format!("{} announced: {why}", counted(n, "public VIP")),
        (None, n) => format!("{} announced", counted(n, "public VIP")),
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
    let n_packets = |name: &str| packets.get(name).copied().unwrap_or_default();
    let refused = REFUSED_PACKETS.iter().map(|name| (name, n_packets(name)));
    let refused = refused.filter(|(_, n)| *n > 0).map(|(name, n)| format!("{n} {name}"));
    let refused = refused.collect::<Vec<_>>().join(", ");
    if !refused.is_empty() {
        lines.push(format!("          packets not sent on: {refused}"));
    }
    if !client_address.is_empty() {
        let [n_shown, n_not_shown] = ["client_shown", "client_not_shown"].map(n_packets);
        let names = client_address.join(", ");
        lines.push(format!(
            "          clients' addresses go to servers of {names}: {} with, {n_not_shown} without",
            counted(n_shown, "SYN")
        ));
    }
    lines
}

/// What became of packets that an edge didn't send on, see docs/edge.md.
const REFUSED_PACKETS: [&str; 14] = [
    "no_route",
    "no_backend",
    "no_frontend",
    "no_port",
    "table_full",
    "syn_flood",
    "unknown_flow",
    "fragment",
    "martian",
    "bad_header",
    "bad_checksum",
    "hop_limit",
    "too_long",
    "broken",
];

/// A resolver's state and counters.
fn upstream_line(upstream: &UpstreamStatus, palette: Palette) -> String {
    let UpstreamStatus { address, state, tcp_state, sent, results, mean_ms, .. } = upstream;
    let painted = |state: &str| {
        let tone = match state {
            "up" => Tone::Good,
            "suspect" => Tone::Warning,
            _ => Tone::Bad,
        };
        palette.paint(state, tone)
    };
    let over_tcp = match tcp_state.as_str() {
        "" | "up" => String::new(),
        other => format!(" (TCP: {})", painted(other)),
    };
    let state = painted(state) + &over_tcp;
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
    let requests = &watches.requests_per_hour;
    [
        format!(
            "          {} live, {cold} cold; {connections} of {max_connections} connections{oldest}",
            counted(*live, "service")
        ),
        format!(
            "          at most {} and {megabytes:.1} MB an hour",
            counted(*requests, "request")
        ),
    ]
}

/// `nohop services`
pub fn services(services: &[ServiceStatus], palette: Palette) -> String {
    if services.is_empty() {
        return "no services\n".to_owned();
    }
    let heads: Vec<_> = services.iter().map(service_row).collect();
    let backends = services.iter().flat_map(|service| &service.backends).map(backend_row);
    let mut backends = lines(&backends.collect::<Vec<_>>(), palette).into_iter();
    let mut text = String::new();
    for (service, head) in services.iter().zip(lines(&heads, palette)) {
        line(&mut text, head);
        service_notes(&mut text, service, palette);
        for backend in backends.by_ref().take(service.backends.len()) {
            line(&mut text, format!("  {backend}"));
        }
    }
    text
}

/// `nohop explain NAME`
pub fn explanation(explanation: &Explanation, palette: Palette) -> String {
    let mut text = String::new();
    let Explanation { source, shadowed, .. } = explanation;
    let source = source.as_ref().map(|source| match shadowed.is_empty() {
        true => format!("source: {source}"),
        false => format!("source: {source}, which shadows {}", shadowed.join(" and ")),
    });
    line(&mut text, palette.paint(&explanation.connect, Tone::Strong));
    if let Some(source) = source {
        line(&mut text, source);
    }
    for note in &explanation.notes {
        line(&mut text, note.clone());
    }
    if explanation.service.is_some() || !explanation.instances.is_empty() {
        text.push('\n');
    }
    let backends = explanation.service.as_ref().map(|service| &service.backends[..]);
    let backends = backends.unwrap_or_default();
    if let Some(service) = &explanation.service {
        lines(&[service_row(service)], palette).into_iter().for_each(|row| line(&mut text, row));
        service_notes(&mut text, service, palette);
    }
    let row = |instance: &InstanceStatus| {
        let is_it =
            |it: &&BackendStatus| (&it.node, &it.instance) == (&instance.node, &instance.instance);
        if let Some(it) = backends.iter().find(is_it) {
            return backend_row(it);
        }
        let mut row = vec![
            state(&instance.state),
            (&instance.address).into(),
            place(&instance.node, &instance.instance_name),
        ];
        if explanation.service.is_none() {
            row.push((&instance.service).into());
        }
        row.push(reason(&instance.reason).into());
        row
    };
    let rows: Vec<_> = explanation.instances.iter().map(row).collect();
    for (instance, row) in explanation.instances.iter().zip(lines(&rows, palette)) {
        line(&mut text, format!("  {row}"));
        for CheckStatus { name, status, output } in &instance.checks {
            let (output, tone) = match status.as_str() {
                "passing" => ("", Tone::Good),
                "warning" => (output.as_str(), Tone::Warning),
                _ => (output.as_str(), Tone::Bad),
            };
            let colon = if output.is_empty() { "" } else { ": " };
            let status = palette.paint(status, tone);
            line(&mut text, format!("    check `{name}` {status}{colon}{output}"));
        }
    }
    text
}

fn service_row(service: &ServiceStatus) -> Vec<Cell> {
    let ports = &service.ports;
    let vip6 = service.vip6.map(|vip6| format!(" and [{vip6}]:{ports}")).unwrap_or_default();
    let pin = service.pin.map(|pin| format!(" and {pin}")).unwrap_or_default();
    let public: String = service.public.iter().map(|public| format!(" and {public}")).collect();
    vec![
        Cell::new(&service.name, Tone::Strong),
        format!("{}:{ports}{vip6}{pin}{public}", service.vip).into(),
        service.protocol.to_string().into(),
        service.algorithm.to_string().into(),
        service_counts(service).into(),
    ]
}

/// How often it was connected to, and what became of that.
fn service_counts(service: &ServiceStatus) -> String {
    let mut counts = vec![format!("connects {}", service.connects)];
    counts.push(format!("refused {}", service.refused));
    let mut count = |n: u64, text: String| {
        if n > 0 {
            counts.push(text);
        }
    };
    let n = service.refused_family;
    count(n, format!("{n} because of their address family"));
    count(service.shadowed, format!("{} only counted", service.shadowed));
    let (n, n_refused) = (service.udp_connects, service.udp_connects_refused);
    count(n + n_refused, format!("UDP connects {n}"));
    count(n_refused, format!("refused {n_refused}"));
    count(service.failed, format!("failed {}", service.failed));
    count(service.syn_retransmits, format!("SYN retransmits {}", service.syn_retransmits));
    counts.extend(service.in_flight.map(|n| format!("in flight {n}")));
    counts.join(", ")
}

fn service_notes(text: &mut String, service: &ServiceStatus, palette: Palette) {
    for note in &service.notes {
        line(text, format!("  ~ {note}"));
    }
    if let Some(error) = &service.error {
        let error = format!("! the kernel doesn't have this state of it: {error}");
        line(text, format!("  {}", palette.paint(&error, Tone::Bad)));
    }
    if service.backends.is_empty() {
        let tone = if service.watch == Watch::Cold { Tone::Plain } else { Tone::Bad };
        let none = palette.paint(no_backend(service.watch), tone);
        line(text, format!("  {none}"));
    }
}

/// What a service without a backend means.
pub fn no_backend(watch: Watch) -> &'static str {
    match watch {
        Watch::Cold => {
            "cold: nothing on this node uses it; its instances are fetched when its name is looked up"
        }
        Watch::Live => "no backend: connections are refused",
    }
}

fn backend_row(backend: &BackendStatus) -> Vec<Cell> {
    let failures = match backend.failures {
        0 => String::new(),
        n => format!("failures {n}"),
    };
    let in_flight = backend.in_flight.map(|n| format!("in flight {n}"));
    vec![
        state(&state_name(backend.state)),
        (&backend.address).into(),
        place(&backend.node, named(&backend.instance_name, &backend.instance)),
        format!("weight {}", backend.weight).into(),
        format!("connects {}", backend.connects).into(),
        in_flight.unwrap_or_default().into(),
        failures.into(),
        reason(&backend.reason).into(),
    ]
}

/// An instance's name, or its id from a daemon that gives it none yet.
fn named<'a>(name: &'a str, id: &'a str) -> &'a str {
    if name.is_empty() { id } else { name }
}

fn reason(reason: &Option<String>) -> &str {
    reason.as_deref().unwrap_or_default()
}

/// The name of a backend's state, as JSON has it.
pub fn state_name(state: BackendState) -> String {
    format!("{state:?}").to_lowercase()
}

/// The state of an instance, by which it gets connections or not.
fn state(state: &str) -> Cell {
    let tone = match state {
        "healthy" => Tone::Good,
        "warning" | "spare" | "draining" | "unproven" => Tone::Warning,
        _ => Tone::Bad,
    };
    Cell::new(state, tone)
}

fn place(node: &str, id: &str) -> Cell {
    match node {
        "" => "".into(),
        node => format!("{node}/{id}").into(),
    }
}

/// The share of a map's entries from which on it is nearly full, as the alert has it: 9 of 10.
const NEARLY_FULL: (u64, u64) = (9, 10);

/// A bar of twenty characters: full at the map's capacity, and never empty when it isn't.
fn pressure(map: &MapStatus) -> Vec<Cell> {
    let filled = (map.entries * 20).div_ceil(map.capacity.max(1)).min(20) as usize;
    let bar = "#".repeat(filled) + &".".repeat(20 - filled);
    let tone = match map.entries * NEARLY_FULL.1 > map.capacity * NEARLY_FULL.0 {
        true => Tone::Bad,
        false => Tone::Plain,
    };
    let room = format!("{} of {}", map.entries, map.capacity);
    vec![(&map.name).into(), Cell::new(format!("[{bar}]"), tone), Cell::new(room, tone)]
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
    use crate::cli::args::ColorChoice;
    use crate::table::{Ports, Protocols};

    fn helloworld() -> ServiceStatus {
        ServiceStatus {
            name: "helloworld".into(),
            vip: [127, 186, 3, 9].into(),
            connects: 7,
            backends: vec![BackendStatus {
                address: "10.0.0.7:23456".into(),
                node: "n1".into(),
                instance: "h1".into(),
                instance_name: "h1".into(),
                weight: 1,
                state: BackendState::Healthy,
                reason: None,
                drained_by: None,
                connects: 7,
                in_flight: None,
                failures: 0,
                connect_us: None,
                rtt_us: None,
            }],
            ..ServiceStatus::example()
        }
    }

    #[test]
    fn services_are_one_block_each() {
        let shown = |services: &[ServiceStatus]| super::services(services, Palette::default());
        let text = "helloworld  127.186.3.9:80  tcp  random  connects 7, refused 0\n  \
                    healthy  10.0.0.7:23456  n1/h1  weight 1  connects 7\n";
        assert_eq!(shown(&[helloworld()]), text);
        assert_eq!(shown(&[]), "no services\n");
        let mut web = ServiceStatus { name: "web".into(), connects: 1, ..helloworld() };
        web.backends[0].state = BackendState::Ejected;
        web.backends[0].reason = Some("3 failures in a row".into());
        web.backends[0].connects = 123;
        let text = "helloworld  127.186.3.9:80  tcp  random  connects 7, refused 0\n  \
                    healthy  10.0.0.7:23456  n1/h1  weight 1  connects 7\n\
                    web         127.186.3.9:80  tcp  random  connects 1, refused 0\n  \
                    ejected  10.0.0.7:23456  n1/h1  weight 1  connects 123  3 failures in a row\n";
        assert_eq!(shown(&[helloworld(), web]), text);
        let empty = ServiceStatus { backends: Vec::new(), ..helloworld() };
        let text = shown(std::slice::from_ref(&empty));
        assert!(text.ends_with("\n  no backend: connections are refused\n"), "{text}");
        let cold = [ServiceStatus { watch: Watch::Cold, ..empty }];
        let text = super::services(&cold, Palette::of_stdout(ColorChoice::Always));
        let cold = "\n  cold: nothing on this node uses it; its instances are fetched when its name is looked up\n";
        assert!(text.ends_with(cold), "{text}");
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
        let text = "helloworld  127.186.3.9:any and [fd00::9]:any  both  random  connects 7, \
                    refused 0, UDP connects 5, refused 2, failed 3, SYN retransmits 6, in flight 4\n  ~ something is odd\n";
        assert!(shown(&[odd]).starts_with(text));
    }

    /// The explanation of a service with these instances that are out.
    fn explained(service: ServiceStatus, out: &[(&str, &str)]) -> Explanation {
        let of_backend = |it: &BackendStatus| InstanceStatus {
            service: service.name.clone(),
            address: it.address.clone(),
            node: it.node.clone(),
            instance: it.instance.clone(),
            instance_name: it.instance_name.clone(),
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
            instance_name: (*id).into(),
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
    fn instances_are_shown_by_their_names() {
        let mut service = helloworld();
        service.backends[0].instance_name = "alloc 39e25890 web".into();
        let explained = explained(service, &[("alloc 40e25890 web", "check `web` is critical")]);
        let explanation = |it: &Explanation| super::explanation(it, Palette::default());
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
        let explanation = |it: &Explanation| super::explanation(it, Palette::default());
        let text = explanation(&explained);
        assert!(text.starts_with("a connection goes somewhere\n\nhelloworld"), "{text}");
        assert!(text.contains("\n    check `web` passing\n  out "), "{text}");
        let last = "  out      10.0.0.8:1      n2/h2  check `web` is critical\n    \
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
        let map = |(name, entries): (&str, u64)| {
            pressure(&MapStatus { name: name.into(), entries, capacity: 40 })
        };
        assert_eq!(
            lines(&[("SLOTS", 0), ("BACKENDS", 1), ("MANY", 40)].map(map), Palette::default()),
            [
                "SLOTS     [....................]  0 of 40",
                "BACKENDS  [#...................]  1 of 40",
                "MANY      [####################]  40 of 40",
            ]
        );
    }
}
