//! The dashboard for Grafana, against Grafana's own conventions
//! (github.com/grafana/dashboard-linter/tree/main/docs) and the metrics of a running daemon: each
//! expression has a value there, by Prometheus' own tool.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use testbed::cmd;
use testbed::http;
use testbed::tempdir::TempDir;

use crate::cluster::Cluster;

const DASHBOARD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../contrib/grafana/nohop.json");
const RULES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../contrib/prometheus/nohop.rules.yml");

pub fn run() -> Result<()> {
    let cluster = Cluster::new(2)?;
    let vip = cluster.vip("helloworld")?;
    let connects = cluster.nodes.connect(vip, 20)?;
    ensure!(connects.errors.is_empty(), "{connects:?}");
    let socket = cluster.nohop.admin().replace("unix:", "");
    check(&http::ask(Path::new(&socket), "GET", "/metrics", "")?)
}

/// Checks the dashboard and the rules with what `/metrics` served.
fn check(metrics: &str) -> Result<()> {
    let text = fs::read_to_string(DASHBOARD).context("read the dashboard")?;
    let dashboard: Value = serde_json::from_str(&text)?;
    conventions(&dashboard)?;
    let expressions = expressions(&dashboard)?;
    let rules = fs::read_to_string(RULES).context("read the rules")?;
    let of_rules = rules.lines().filter_map(|line| line.trim().strip_prefix("expr: "));
    let all = expressions.iter().map(String::as_str).chain(of_rules);
    for (expression, name) in all.flat_map(|it| names(it).map(move |name| (it, name))) {
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|part| name.strip_suffix(part));
        let is_there = |name: &str| metrics.contains(&format!("# TYPE {name} "));
        ensure!(is_there(name) || family.is_some_and(is_there), "no {name} for {expression}");
    }

    let samples: Vec<&str> = metrics.lines().filter(|line| !line.starts_with('#')).collect();
    let has_sample = |name: &str| {
        samples
            .iter()
            .any(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])))
    };
    // What the daemon has no sample of, as it is no edge, gives no value.
    let tested: Vec<_> = expressions.iter().filter(|it| names(it).all(has_sample)).collect();
    ensure!(tested.len() > expressions.len() * 3 / 4, "{} of {}", tested.len(), expressions.len());
    let test = json!({ "tests": [{
        "interval": "15s",
        "input_series": samples.iter().map(|line| series(line)).collect::<Result<Vec<_>>>()?,
        "promql_expr_test": tested.iter().map(|expression| json!({
            "expr": format!("count({expression}) > bool 0"),
            "eval_time": "10m",
            "exp_samples": [{ "labels": "{}", "value": 1 }],
        })).collect::<Vec<_>>(),
    }]});
    let tempdir = TempDir::new("dashboard")?;
    let file = tempdir.path().join("test.yml");
    // JSON is YAML.
    fs::write(&file, serde_json::to_string_pretty(&test)?)?;
    let promtool = cmd::installed("promtool")?;
    let promtool = promtool.to_str().context("a path in UTF-8")?;
    let output = cmd::words(promtool, &format!("test rules {}", file.display()))?;
    ensure!(output.contains("SUCCESS"), "{output}");
    Ok(())
}

/// A sample as a series that grows.
fn series(line: &str) -> Result<Value> {
    let (name, value) = line.rsplit_once(' ').context("a sample")?;
    let labels = "job=\"nohop\",instance=\"n1\"";
    let name = match name.strip_suffix('}') {
        Some(name) => format!("{name},{labels}}}"),
        None => format!("{name}{{{labels}}}"),
    };
    let value: f64 = value.parse().context("a number")?;
    Ok(json!({ "series": name, "values": format!("{value}+1x40") }))
}

/// The metrics in an expression.
fn names(expression: &str) -> impl Iterator<Item = &str> {
    let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("nohop_") || word.starts_with("process_"))
}

fn panels(dashboard: &Value) -> Result<Vec<&Value>> {
    let panels = dashboard["panels"].as_array().context("panels")?;
    Ok(panels.iter().filter(|panel| panel["type"] != "row").collect())
}

/// The expressions of all panels, for all nodes and services.
fn expressions(dashboard: &Value) -> Result<Vec<String>> {
    let panels = panels(dashboard)?;
    let targets = panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    let expressions = targets.filter_map(|target| target["expr"].as_str()).map(|expression| {
        let variables = [("$__rate_interval", "1m"), ("$job", ".+"), ("$instance", ".+")];
        let filled = variables
            .iter()
            .fold(expression.to_owned(), |text, (name, value)| text.replace(name, value));
        filled.replace("$service", ".+")
    });
    let expressions: Vec<String> = expressions.collect();
    ensure!(expressions.iter().all(|it| !it.contains('$')), "unknown variables");
    Ok(expressions)
}

fn conventions(dashboard: &Value) -> Result<()> {
    ensure!(dashboard["editable"] == false && dashboard["id"].is_null(), "editable, or with an id");
    let variables = dashboard["templating"]["list"].as_array().context("variables")?;
    let variables: BTreeMap<_, _> =
        variables.iter().filter_map(|it| Some((it["name"].as_str()?, it))).collect();
    let datasource = variables.get("datasource").context("a variable for the data source")?;
    ensure!(datasource["type"] == "datasource" && datasource["query"] == "prometheus");
    for name in ["job", "instance", "service"] {
        let variable = variables.get(name).with_context(|| format!("no variable {name}"))?;
        // 2: whenever the time range changes.
        let is_good = variable["label"] == name
            && variable["multi"] == true
            && variable["includeAll"] == true
            && variable["refresh"] == 2
            && variable["datasource"]["uid"] == "${datasource}";
        ensure!(is_good, "{variable:#}");
    }
    for panel in panels(dashboard)? {
        let title = panel["title"].as_str().unwrap_or_default();
        let has = |value: &Value| value.as_str().is_some_and(|text| !text.is_empty());
        ensure!(has(&panel["title"]) && has(&panel["description"]), "{title}: no description");
        ensure!(has(&panel["fieldConfig"]["defaults"]["unit"]), "{title}: no unit");
        ensure!(panel["datasource"]["uid"] == "${datasource}", "{title}: a fixed data source");
        for target in panel["targets"].as_array().with_context(|| format!("{title}: no query"))? {
            let expression = target["expr"].as_str().context("an expression")?;
            ensure!(target["datasource"]["uid"] == "${datasource}", "{title}: {expression}");
            ensure!(has(&target["legendFormat"]), "{title}: no legend of {expression}");
            ensure!(
                expression.contains("job=~\"$job\", instance=~\"$instance\""),
                "{title}: {expression}"
            );
            // Counters are shown by their rate, of an interval that Grafana chooses.
            for (at, _) in expression.match_indices("_total{") {
                let rest = &expression[at..];
                let range = &rest[rest.find('}').unwrap_or_default()..];
                ensure!(range.starts_with("}[$__rate_interval]"), "{title}: {expression}");
            }
            ensure!(!expression.replace("[$__rate_interval]", "").contains('['), "{title}");
        }
    }
    Ok(())
}
