//! The alerts for Prometheus: its own tool takes them, and they fire when they should: not for a node
//! in shadow mode, and not for hooks that were detached once.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use testbed::cmd;
use testbed::tempdir::TempDir;

const RULES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../contrib/prometheus/nohop.rules.yml");

/// Each node's series, by minute, and which alerts it has after an hour.
const NODES: [(&str, &[&str], &[&str]); 5] = [
    (
        "good",
        &[
            "nohop_ready 1x60",
            "nohop_mode{mode=\"shadow\"} 0x60",
            "nohop_datapath_attached{unit=\"connect\"} 1x60",
        ],
        &[],
    ),
    ("down", &["nohop_ready 0x60", "nohop_mode{mode=\"shadow\"} 0x60"], &["NohopNotReady"]),
    ("shadow", &["nohop_ready 0x60", "nohop_mode{mode=\"shadow\"} 1x60"], &[]),
    ("once", &["nohop_datapath_attached{unit=\"connect\"} 1x58 0 1"], &[]),
    ("detached", &["nohop_datapath_attached{unit=\"connect\"} 1x50 0x10"], &["NohopDetached"]),
];

pub fn run() -> Result<()> {
    let promtool = cmd::installed("promtool")?;
    let promtool = promtool.to_str().context("a path in UTF-8")?;
    cmd::words(promtool, &format!("check rules {RULES}"))?;

    let tempdir = TempDir::new("rules")?;
    let file = tempdir.path().join("test.yml");
    std::fs::write(&file, test(Path::new(RULES)))?;
    let output = cmd::words(promtool, &format!("test rules {}", file.display()))?;
    ensure!(output.contains("SUCCESS"), "{output}");
    Ok(())
}

/// A file for `promtool test rules`.
fn test(rules: &Path) -> String {
    let mut text = format!("rule_files: [{:?}]\ntests:\n", rules.display().to_string());
    for (node, series, alerts) in NODES {
        text += "- interval: 1m\n  input_series:\n";
        for each in series {
            let (name, values) = each.split_once(' ').unwrap_or((each, ""));
            let values = values.replace('x', "+0x");
            let labels = format!("instance={node:?},job=\"nohop\"");
            let name = match name.strip_suffix('}') {
                Some(name) => format!("{name},{labels}}}"),
                None => format!("{name}{{{labels}}}"),
            };
            text += &format!("  - series: '{name}'\n    values: '{values}'\n");
        }
        text += "  promql_expr_test:\n";
        for alert in ["NohopNotReady", "NohopDetached"] {
            let selector = format!("{{alertname={alert:?},alertstate=\"firing\"}}");
            text += &format!("  - expr: 'count(ALERTS{selector})'\n    eval_time: 60m\n");
            if alerts.contains(&alert) {
                text += "    exp_samples:\n    - value: 1\n      labels: '{}'\n";
            }
        }
    }
    text
}
