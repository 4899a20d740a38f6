//! The alerts for Prometheus: its own tool takes them, and each fires when it should, and only then: not
//! for a node in shadow mode, and not for hooks that were detached once.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use testbed::cmd;
use testbed::tempdir::TempDir;

const RULES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../contrib/prometheus/nohop.rules.yml");

/// Nodes, each with its series by minute and the alerts that it has after an hour. Each alert is some
/// node's, and each node but the first ones is there for one alert.
const NODES: [(&str, &[&str], &[&str]); 22] = [
    (
        "good",
        &[
            "up 1x60",
            "nohop_ready 1x60",
            "nohop_mode{mode=\"shadow\"} 0x60",
            "nohop_datapath_attached{unit=\"connect\"} 1x60",
            "nohop_source_problem{source=\"consul\"} 0x60",
            "nohop_catalog_age_seconds{source=\"consul\"} 9x60",
            "nohop_connects_total{service=\"web\"} 0+600x60",
            "nohop_connects_failed_total{service=\"web\"} 0+1x60",
            "nohop_connects_refused_total{service=\"web\",reason=\"no_backend\"} 0+1x60",
            "nohop_ejected_backends 0x60",
            "nohop_dns_upstream_up{upstream=\"192.0.2.1:53\"} 1x60",
            "nohop_dns_upstream_tcp_up{upstream=\"192.0.2.1:53\"} 1x60",
            "nohop_last_reload_successful 1x60",
            "nohop_datapath_events_total{event=\"inconsistent\"} 0x60",
            "nohop_datapath_events_total{event=\"bypassed\"} 0+9x60",
            "nohop_edge_announced 1x60",
            "nohop_edge_flows 10x60",
            "nohop_edge_flows_capacity 100x60",
            "process_start_time_seconds 17x60",
            "process_open_fds 10x60",
            "process_max_fds 100x60",
            "nohop_log_dropped_total 0x60",
            "nohop_map_entries{map=\"SLOTS\"} 10x60",
            "nohop_map_capacity{map=\"SLOTS\"} 100x60",
        ],
        &[],
    ),
    // On purpose: neither is an outage.
    (
        "shadow",
        &[
            "nohop_ready 0x60",
            "nohop_mode{mode=\"shadow\"} 1x60",
            "nohop_datapath_attached{unit=\"names\"} 0x60",
            "nohop_edge_announced 0x60",
        ],
        &[],
    ),
    ("drained", &["nohop_edge_announced 0x60", "nohop_drains{kind=\"edge\"} 1x60"], &[]),
    // An upgrade.
    ("restarted", &["up 1x50 0x2 1x8"], &[]),
    ("dead", &["up 1x50 0x10"], &["NohopDown"]),
    ("once", &["nohop_datapath_attached{unit=\"connect\"} 1x58 0 1"], &[]),
    ("down", &["nohop_ready 0x60", "nohop_mode{mode=\"shadow\"} 0x60"], &["NohopNotReady"]),
    ("detached", &["nohop_datapath_attached{unit=\"connect\"} 1x50 0x10"], &["NohopDetached"]),
    ("old", &["nohop_catalog_age_seconds{source=\"consul\"} 0+60x60"], &["NohopCatalogOld"]),
    (
        "refusing",
        &["nohop_connects_refused_total{service=\"web\",reason=\"no_backend\"} 0+90x60"],
        &["NohopConnectsRefused"],
    ),
    (
        "full",
        &["nohop_map_entries{map=\"SLOTS\"} 91x60", "nohop_map_capacity{map=\"SLOTS\"} 100x60"],
        &["NohopNearlyFull"],
    ),
    ("no-acl", &["nohop_source_problem{source=\"consul\"} 1x60"], &["NohopSourceProblem"]),
    (
        "failing",
        &[
            "nohop_connects_total{service=\"web\"} 0+600x60",
            "nohop_connects_failed_total{service=\"web\"} 0+60x60",
        ],
        &["NohopConnectsFailed"],
    ),
    ("ejected", &["nohop_ejected_backends 2x60"], &["NohopEjected"]),
    (
        "no-resolver",
        &[
            "nohop_dns_upstream_up{upstream=\"192.0.2.1:53\"} 0x60",
            "nohop_dns_upstream_tcp_up{upstream=\"192.0.2.1:53\"} 0x60",
        ],
        &["NohopUpstreamDown"],
    ),
    (
        "no-resolver-by-tcp",
        &[
            "nohop_dns_upstream_up{upstream=\"192.0.2.1:53\"} 1x60",
            "nohop_dns_upstream_tcp_up{upstream=\"192.0.2.1:53\"} 0x60",
        ],
        &["NohopUpstreamDown"],
    ),
    ("unloaded", &["nohop_last_reload_successful 1x30 0x30"], &["NohopReloadRefused"]),
    (
        "inconsistent",
        &["nohop_datapath_events_total{event=\"inconsistent\"} 0x50 0+1x10"],
        &["NohopKernelErrors"],
    ),
    // A drain of a backend doesn't silence an edge.
    (
        "withdrawn",
        &[
            "nohop_edge_announced 0x60",
            "nohop_drains{kind=\"edge\"} 0x60",
            "nohop_drains{kind=\"node\"} 1x60",
        ],
        &["NohopEdgeNotAnnounced"],
    ),
    (
        "busy",
        &["nohop_edge_flows 95x60", "nohop_edge_flows_capacity 100x60"],
        &["NohopEdgeFlowsNearlyFull"],
    ),
    ("crashing", &["process_start_time_seconds 0+60x60"], &["NohopRestarting"]),
    (
        "leaking",
        &[
            "process_open_fds 90x60",
            "process_max_fds 100x60",
            "nohop_log_dropped_total 0x50 0+7x10",
        ],
        &["NohopFewDescriptorsLeft", "NohopLogDropped"],
    ),
];

pub fn run() -> Result<()> {
    let promtool = cmd::installed("promtool")?;
    let promtool = promtool.to_str().context("a path in UTF-8")?;
    cmd::words(promtool, &format!("check rules {RULES}"))?;

    let rules = std::fs::read_to_string(RULES)?;
    let alerts: Vec<&str> =
        rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    for alert in &alerts {
        ensure!(NODES.iter().any(|(_, _, of_it)| of_it.contains(alert)), "{alert} isn't tested");
    }

    let tempdir = TempDir::new("rules")?;
    let file = tempdir.path().join("test.yml");
    std::fs::write(&file, test(Path::new(RULES), &alerts))?;
    let output = cmd::words(promtool, &format!("test rules {}", file.display()))?;
    ensure!(output.contains("SUCCESS"), "{output}");
    Ok(())
}

/// A file for `promtool test rules`.
fn test(rules: &Path, all: &[&str]) -> String {
    let mut text = format!("rule_files: [{:?}]\ntests:\n", rules.display().to_string());
    for (node, series, alerts) in NODES {
        text += "- interval: 1m\n  input_series:\n";
        for each in series {
            let (name, values) = each.split_once(' ').unwrap_or((each, ""));
            let is_constant = |value: &str| value.contains('x') && !value.contains('+');
            let values: Vec<String> = values
                .split(' ')
                .map(|value| match is_constant(value) {
                    true => value.replace('x', "+0x"),
                    false => value.to_owned(),
                })
                .collect();
            let values = values.join(" ");
            let labels = format!("instance={node:?},job=\"nohop\"");
            let name = match name.strip_suffix('}') {
                Some(name) => format!("{name},{labels}}}"),
                None => format!("{name}{{{labels}}}"),
            };
            text += &format!("  - series: '{name}'\n    values: '{values}'\n");
        }
        text += "  promql_expr_test:\n";
        for alert in all {
            let selector = format!("{{alertname={alert:?},alertstate=\"firing\"}}");
            text += &format!("  - expr: 'count(ALERTS{selector})'\n    eval_time: 60m\n");
            if alerts.contains(alert) {
                text += "    exp_samples:\n    - value: 1\n      labels: '{}'\n";
            }
        }
    }
    text
}
