//! docs/reference.md against the product: each name of the page is found in `--help`, `config show`,
//! JSON, `/metrics` or the pins of a running daemon, and each name found there is on the page. What
//! the page lists as planned is refused. docs/metrics.md has the same metrics.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::consul::program;
use testbed::http;
use testbed::nohop::Nohop;

use crate::cluster::Cluster;

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference.md");
const METRICS_PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");

type Names = BTreeSet<String>;

pub fn run() -> Result<()> {
    let page = Page(fs::read_to_string(PAGE).context("read the page")?);
    let cluster = Cluster::new(2)?;
    let nohop = &cluster.nohop;
    // An instance that is out, for `explain`.
    let maint = "maint -enable -service=helloworld-1 -reason=upgrade";
    cluster.nodes.backend.outside().run(program()?, maint)?;
    nohop.wait_for_backends("helloworld", 1)?;

    commands(&page, nohop)?;
    keys(&page, nohop)?;
    documents(&page, nohop)?;
    routes(&page, nohop)?;
    metrics(&page, nohop)?;
    let mut maps = Names::new();
    for entry in fs::read_dir(nohop.pin("maps")?)? {
        maps.insert(entry?.file_name().to_string_lossy().into_owned());
    }
    same("maps", &page.names("Maps")?, &maps)
}

/// The tables of the page.
struct Page(String);

impl Page {
    /// The rows of a section's table: the code of the first cell, name by name, and the other cells.
    fn rows(&self, section: &str) -> Result<Vec<(Vec<&str>, Vec<&str>)>> {
        let start = self.0.find(&format!("\n## {section}\n"));
        let start = start.with_context(|| format!("{PAGE} has no section {section}"))?;
        let lines = self.0[start..].lines().skip(2).take_while(|line| !line.starts_with("## "));
        let cells = lines.filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"));
        let rows = cells.map(|cells| {
            let mut cells = cells.split(" | ");
            let code = cells.next().unwrap_or_default().split('`').skip(1).step_by(2);
            (code.collect(), cells.collect())
        });
        Ok(rows.filter(|(names, _): &(Vec<_>, _)| !names.is_empty()).collect())
    }

    fn names(&self, section: &str) -> Result<Names> {
        let rows = self.rows(section)?.into_iter();
        Ok(rows.flat_map(|(names, _)| names).map(str::to_owned).collect())
    }
}

/// Fails with the names that are on the page alone, and those missing there.
fn same(what: &str, page: &Names, product: &Names) -> Result<()> {
    let (gone, new): (Vec<_>, Vec<_>) =
        (page.difference(product).collect(), product.difference(page).collect());
    ensure!(
        gone.is_empty() && new.is_empty(),
        "{what}: docs/reference.md has {gone:?}, which nohop lacks, and not {new:?}"
    );
    Ok(())
}

fn stdout(nohop: &Nohop, arguments: &str) -> Result<String> {
    let output = nohop.cli(arguments)?;
    ensure!(output.status.success(), "nohop {arguments}: {output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

/// The names in the first column of the list of commands in `--help`, whose texts may be wrapped.
fn commands_in(help: &str) -> Names {
    let lines = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let entries = lines.take_while(|line| line.is_empty() || line.starts_with(' '));
    let first = entries.filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    first.filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

fn commands(page: &Page, nohop: &Nohop) -> Result<()> {
    let (mut found, mut flags) = (Names::new(), BTreeMap::<String, Names>::new());
    let mut open = vec![String::new()];
    while let Some(command) = open.pop() {
        let help = stdout(nohop, &format!("{command} -h"))?;
        let below = commands_in(&help).into_iter().filter(|name| name != "help");
        let below: Vec<_> = below.map(|name| format!("{command} {name}")).collect();
        if below.is_empty() {
            let options = help.split_whitespace().map(|word| word.trim_end_matches(','));
            for flag in options.filter(|word| word.starts_with("--") && *word != "--help") {
                let flag = flag.trim_end_matches(|c: char| !c.is_ascii_lowercase());
                flags.entry(flag.to_owned()).or_default().insert(command.trim().to_owned());
            }
            found.insert(format!("nohop{command}"));
        }
        open.extend(below);
    }
    let documented = page.rows("Commands")?.into_iter().flat_map(|(names, _)| names);
    let documented = documented.map(|name| {
        name.split(' ').take_while(|word| word.bytes().all(|byte| byte.is_ascii_lowercase()))
    });
    let documented: Names = documented.map(|words| words.collect::<Vec<_>>().join(" ")).collect();
    same("commands", &documented, &found)?;

    for (names, cells) in page.rows("Flags")? {
        let flag = names.first().and_then(|name| name.split(' ').next()).unwrap_or_default();
        let of = cells.first().unwrap_or(&"").split('`').skip(1).step_by(2);
        let product = flags.remove(flag).unwrap_or_default();
        same(flag, &of.map(str::to_owned).collect(), &product)?;
    }
    same("flags", &Names::new(), &flags.into_keys().collect())?;

    Ok(())
}

fn keys(page: &Page, nohop: &Nohop) -> Result<()> {
    let text = stdout(nohop, "config show --config /dev/null")?;
    let lines = text.lines().filter_map(|line| line.split_once(" = "));
    let default = |value: &str| value.split(" # ").next().unwrap_or_default().trim_end().to_owned();
    let defaults: BTreeMap<_, _> = lines.map(|(key, value)| (key, default(value))).collect();
    let json = stdout(nohop, "config show --json --config /dev/null")?;
    let settings: Value = serde_json::from_str(&json)?;
    let mut found = Names::new();
    for setting in settings.as_array().context("a list")? {
        let key = setting["key"].as_str().context("a key")?;
        let change = if setting["restart"].is_null() { "reload" } else { "restart" };
        let default = defaults.get(key).with_context(|| format!("no {key} in:\n{text}"))?;
        found.insert(format!("{key} = {default}: {change}"));
    }
    let documented = page.rows("Keys")?.into_iter().map(|(names, cells)| {
        let code = |cell: &str| cell.trim_matches('`').to_owned();
        let cells: Vec<_> = cells.into_iter().map(code).collect();
        format!("{} = {}", names.join(""), cells.get(..2).unwrap_or_default().join(": "))
    });
    same("keys", &documented.collect(), &found)?;

    let planned = page.names("Planned keys")?;
    let file = nohop.state_dir().join("planned.toml");
    let lines: String = planned.iter().map(|key| format!("{key} = 1\n")).collect();
    fs::write(&file, lines)?;
    let output = nohop.cli(&format!("config check --json {}", file.display()))?;
    let report: Value = serde_json::from_slice(&output.stdout)?;
    let problems = report["problems"].as_array().context("problems")?;
    ensure!(problems.len() == planned.len(), "{report:#}");
    for problem in problems {
        ensure!(problem.to_string().contains(": is planned, not in this version"), "{problem}");
    }
    Ok(())
}

/// Every path of a document: `sources[].name`.
fn paths(path: &str, value: &Value, found: &mut Names) {
    match value {
        // The value of a key is of the key's own type.
        _ if path == "[].value" => drop(found.insert(path.to_owned())),
        Value::Object(entries) => {
            let point = if path.is_empty() { "" } else { "." };
            entries
                .iter()
                .for_each(|(key, value)| paths(&format!("{path}{point}{key}"), value, found));
        }
        Value::Array(values) if values.iter().any(Value::is_object) => {
            values.iter().for_each(|value| paths(&format!("{path}[]"), value, found));
        }
        _ => drop(found.insert(path.to_owned())),
    }
}

fn documents(page: &Page, nohop: &Nohop) -> Result<()> {
    let dump = |arguments: &str| -> Result<Value> {
        let output = nohop.cli(arguments)?;
        serde_json::from_slice(&output.stdout).with_context(|| format!("{arguments}: {output:?}"))
    };
    nohop.configure("dns.ttl = 7")?;
    // The one that is out.
    let drained = "helloworld-1";
    let file = nohop.state_dir().join("empty.toml");
    fs::write(&file, "")?;
    for (section, arguments) in [
        ("status", "status --json".to_owned()),
        ("services", "services --json".to_owned()),
        ("top", "top --json".to_owned()),
        ("explain", "explain --json helloworld".to_owned()),
        ("undrain", format!("drain --json {drained}")),
        ("drain", "drain --json".to_owned()),
        ("dns setup", "dns setup --dnsmasq --json".to_owned()),
        ("dns query", "dns query --json helloworld.service".to_owned()),
        ("reload", "reload --json".to_owned()),
        ("check", "check --json".to_owned()),
        ("config check", format!("config check --json {}", file.display())),
        ("config migrate", format!("config migrate --json {}", file.display())),
        ("config show", "config show --json".to_owned()),
        ("version", "version --json".to_owned()),
        ("debug", format!("debug --json {}", file.with_file_name("debug.tar").display())),
    ] {
        let mut document = dump(&arguments)?;
        if section == "explain" {
            ensure!(document["service"].is_object(), "{document:#}");
            // It is one of `services`.
            document["service"] = Value::Null;
        }
        let mut found = Names::new();
        paths("", &document, &mut found);
        same(&arguments, &page.names(&format!("JSON of `{section}`"))?, &found)?;
    }
    Ok(())
}

fn routes(page: &Page, nohop: &Nohop) -> Result<()> {
    let ask = |path: &str| {
        let socket = nohop.admin().replace("unix:", "");
        http::ask(Path::new(&socket), "GET", path, "")
    };
    let error = ask("/nowhere").err().context("a path that isn't there")?.to_string();
    let is_route = |line: &&str| {
        (line.starts_with("GET /") || line.starts_with("POST /")) && !line.contains(": ")
    };
    let found = error.lines().filter(is_route).map(str::to_owned).collect();
    same("routes", &page.names("Routes")?, &found)?;
    Ok(())
}

fn metrics(page: &Page, nohop: &Nohop) -> Result<()> {
    let described = fs::read_to_string(METRICS_PAGE).context("read the page of the metrics")?;
    let cells = described.lines().filter_map(|line| line.strip_prefix("| `")?.split_once(" | "));
    let described: Names = cells
        .flat_map(|(names, _)| names.split("`, `"))
        .map(|name| name.replace('`', ""))
        .collect();
    same("docs/metrics.md", &page.names("Metrics")?, &described)?;

    let socket = nohop.admin().replace("unix:", "");
    let text = http::ask(Path::new(&socket), "GET", "/metrics", "")?;
    let kinds = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let mut kinds: BTreeMap<&str, &str> = kinds.collect();
    for (names, cells) in page.rows("Metrics")? {
        for metric in names {
            let (name, labels) = metric.split_once('{').unwrap_or((metric, "}"));
            let kind = kinds.remove(name);
            ensure!(kind == cells.first().copied(), "{name}: {kind:?}");
            let samples = text.lines().filter(|line| !line.starts_with('#'));
            let samples = samples.filter_map(|line| {
                let rest = line.strip_prefix(name)?;
                let rest = ["_bucket", "_sum", "_count"]
                    .iter()
                    .find_map(|s| rest.strip_prefix(s))
                    .unwrap_or(rest);
                rest.starts_with(['{', ' ']).then_some(rest)
            });
            for sample in samples {
                let found =
                    sample.split(['{', ',']).skip(1).filter_map(|label| label.split_once("=\""));
                let found: Names = found
                    .map(|(label, _)| label.to_owned())
                    .filter(|label| label != "le")
                    .collect();
                let labels =
                    labels.trim_end_matches('}').split(',').filter(|label| !label.is_empty());
                same(name, &labels.map(str::to_owned).collect(), &found)?;
            }
        }
    }
    let lacking = kinds.into_keys().map(str::to_owned).collect();
    same("metrics", &Names::new(), &lacking)?;
    for name in page.names("Planned metrics")? {
        let name = name.split('{').next().unwrap_or_default();
        ensure!(!text.contains(&format!("# TYPE {name} ")), "{name} isn't planned any more");
    }
    Ok(())
}
