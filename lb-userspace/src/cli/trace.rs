//! `nohop trace`: connections as they happen.

use std::io::{IsTerminal as _, stderr, stdout};

use anyhow::Context;

use super::args::ClientArguments;
use super::process::{end_when_unread, environment, print_error, runtime, show_line};
use crate::admin::api::{FlowTraceRecord, TraceLine, TraceRecord};
use crate::admin::{TraceFilter, client};
use crate::counted::counted;

/// Runs the command, until the daemon ends or its output is closed.
pub fn run(filter: TraceFilter, arguments: &ClientArguments) -> anyhow::Result<()> {
    let address = client::find(arguments.admin.as_deref(), &environment)?;
    end_when_unread();
    let mut failed = Ok(());
    let opened = || {
        // Or a cluster at rest looks like a command that hangs.
        if stdout().is_terminal() && stderr().is_terminal() {
            print_error("connections that begin from now on; Ctrl-C ends it");
        }
    };
    let each = |line: &[u8]| match print(line, arguments.json) {
        Ok(is_read) => is_read,
        Err(error) => {
            failed = Err(error);
            false
        }
    };
    let traced = runtime()?.block_on(client::trace(&address, &filter, opened, each));
    failed.and(traced.map_err(Into::into))
}

/// Prints a line; false once the output is closed.
fn print(line: &[u8], json: bool) -> anyhow::Result<bool> {
    let line: TraceLine = serde_json::from_slice(line)
        .context("can't read what the daemon sent: is it of the same version?")?;
    show_line(json, &line, text)
}

fn text(line: &TraceLine) -> String {
    match line {
        TraceLine::Lost { lost } => format!("lost {}\n", counted(*lost, "connection")),
        TraceLine::Connection(connection) => connection_text(connection),
        TraceLine::Flow(flow) => flow_text(flow),
    }
}

fn flow_text(flow: &FlowTraceRecord) -> String {
    let FlowTraceRecord { client, service, vip, outcome, reason, packets, bytes, .. } = flow;
    let time = time_of_day(flow.time);
    let service = service.as_deref().unwrap_or("no service");
    let udp = if flow.protocol == "udp" { " udp" } else { "" };
    let backend = flow.backend.as_deref().map(|to| format!(" -> {to}")).unwrap_or_default();
    let counts = match (outcome.as_str(), &flow.state) {
        ("ended", Some(state)) => {
            format!("  {state}, {}, {}", counted(*packets, "packet"), counted(*bytes, "byte"))
        }
        _ => String::new(),
    };
    format!("{time}  edge  {client}  {service} {vip}{udp}{backend}  {outcome}  {reason}{counts}\n")
}

fn connection_text(connection: &TraceRecord) -> String {
    let TraceRecord { comm, pid, service, frontend, .. } = connection;
    let time = time_of_day(connection.time);
    let client = connection.client_name.as_deref().or(connection.cgroup.as_deref());
    let client = client.map(|name| format!("  {name}")).unwrap_or_default();
    let no_service = match connection.outcome.as_str() {
        "intercepted" | "passed" => "DNS query to",
        _ => "no service",
    };
    // Of a daemon that gives them no names yet.
    let instance = connection.instance_name.as_deref().or(connection.instance.as_deref());
    let instance = instance.map(|name| format!(" ({name})")).unwrap_or_default();
    let service = service.as_deref().unwrap_or(no_service);
    let udp = if connection.protocol == "udp" { " udp" } else { "" };
    let backend = connection.backend.as_deref().map(|to| format!(" -> {to}")).unwrap_or_default();
    let reason = connection.reason.as_deref().map(|why| format!("  {why}")).unwrap_or_default();
    let details = connection.error.iter().map(|error| format!(" {error}"));
    let details = details.chain(connection.connect_us.map(|us| format!(" in {us} us")));
    let details: String = details.collect();
    let outcome = &connection.outcome;
    format!(
        "{time}  {comm}[{pid}]{client}  {service} {frontend}{udp}{backend}{instance}  {outcome}{details}{reason}\n"
    )
}

/// The time of day in UTC, to the microsecond.
fn time_of_day(seconds: f64) -> String {
    let us = (seconds * 1e6).round() as u64;
    let (us, seconds) = (us % 1_000_000, us / 1_000_000 % 86_400);
    format!("{:02}:{:02}:{:02}.{us:06}", seconds / 3_600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn established() -> TraceRecord {
        TraceRecord {
            time: 1_764_414_123.000_456,
            comm: "curl".into(),
            pid: 1234,
            cgroup: Some("/sys/fs/cgroup/system.slice/cron.service".into()),
            client_name: Some("/sys/fs/cgroup/system.slice/cron.service".into()),
            allocation: None,
            task: None,
            service: Some("web".into()),
            frontend: "127.186.3.9:80".into(),
            protocol: "tcp".into(),
            backend: Some("10.0.0.7:23456".into()),
            instance: None,
            instance_name: None,
            reason: None,
            outcome: "established".into(),
            error: None,
            connect_us: Some(153),
        }
    }

    #[test]
    fn a_connection_is_a_line() {
        assert_eq!(
            connection_text(&established()),
            "11:02:03.000456  curl[1234]  /sys/fs/cgroup/system.slice/cron.service  web \
             127.186.3.9:80 -> 10.0.0.7:23456  established in 153 us\n"
        );
        let name = Some("alloc 39e25890 api".into());
        let shown = connection_text(&TraceRecord { instance_name: name, ..established() });
        assert!(shown.contains("-> 10.0.0.7:23456 (alloc 39e25890 api)  established"), "{shown}");
        let failed = TraceRecord {
            client_name: Some("alloc 39e25890 server".into()),
            outcome: "failed".into(),
            error: Some("ECONNREFUSED".into()),
            connect_us: None,
            ..established()
        };
        assert_eq!(
            connection_text(&failed),
            "11:02:03.000456  curl[1234]  alloc 39e25890 server  web 127.186.3.9:80 -> \
             10.0.0.7:23456  failed ECONNREFUSED\n"
        );
        let refused = TraceRecord {
            cgroup: None,
            client_name: None,
            service: None,
            backend: None,
            reason: Some("no service has this address and port".into()),
            outcome: "refused".into(),
            connect_us: None,
            ..established()
        };
        assert_eq!(
            connection_text(&refused),
            "11:02:03.000456  curl[1234]  no service 127.186.3.9:80  refused  no service has this \
             address and port\n"
        );
        let intercepted = TraceRecord {
            service: None,
            frontend: "10.0.0.2:53".into(),
            protocol: "udp".into(),
            backend: Some("127.0.0.1:53".into()),
            reason: Some("dns.intercept".into()),
            outcome: "intercepted".into(),
            connect_us: None,
            ..established()
        };
        assert_eq!(
            connection_text(&intercepted),
            "11:02:03.000456  curl[1234]  /sys/fs/cgroup/system.slice/cron.service  DNS query to \
             10.0.0.2:53 udp -> 127.0.0.1:53  intercepted  dns.intercept\n"
        );
        assert_eq!(text(&TraceLine::Lost { lost: 3 }), "lost 3 connections\n");
    }

    #[test]
    fn what_happens_to_a_flow_is_a_line() {
        let ended = FlowTraceRecord {
            time: 1_764_414_123.000_456,
            client: "198.51.100.7:40000".into(),
            vip: "203.0.113.10:80".into(),
            service: Some("web".into()),
            protocol: "tcp".into(),
            backend: Some("10.0.0.7:23456".into()),
            source: Some("10.0.0.2:1024".into()),
            outcome: "ended".into(),
            reason: "reset by the client".into(),
            state: Some("closed".into()),
            packets: 7,
            bytes: 900,
        };
        assert_eq!(
            flow_text(&ended),
            "11:02:03.000456  edge  198.51.100.7:40000  web 203.0.113.10:80 -> 10.0.0.7:23456  ended  \
             reset by the client  closed, 7 packets, 900 bytes\n"
        );
        let refused = FlowTraceRecord {
            service: None,
            protocol: "udp".into(),
            backend: None,
            source: None,
            outcome: "refused".into(),
            reason: "no service has this address and port".into(),
            state: None,
            ..ended
        };
        assert_eq!(
            flow_text(&refused),
            "11:02:03.000456  edge  198.51.100.7:40000  no service 203.0.113.10:80 udp  refused  no \
             service has this address and port\n"
        );
    }
}
