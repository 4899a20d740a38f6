//! Where it is measured: one host with a Consul server, and a cgroup that the daemon serves.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use testbed::cgroup::Cgroup;
use testbed::consul::Consul;
use testbed::http::ask;
use testbed::net::Host;
use testbed::nohop::Nohop;
use testbed::tempdir::TempDir;

/// The address of the host.
pub const ADDRESS: &str = "10.99.0.1";

/// The node that bears all instances. It isn't the agent's own, whose services the agent would deregister.
const NODE: &str = "elsewhere";

/// The operations that Consul takes in one transaction.
const MAX_OPERATIONS: usize = 64;

/// The clock ticks in which the kernel counts a process's time, in a second (USER_HZ).
const TICKS_PER_S: f64 = 100.0;

/// A host, and what runs there. Dropped in this order.
pub struct Site {
    _consul: Consul,
    pub cgroup: Cgroup,
    pub host: Arc<Host>,
    /// Holds Consul's unix socket, for requests from outside the host's network.
    tempdir: TempDir,
}

/// An instance to be registered, with a check of its own that passes.
pub struct Instance {
    pub service: String,
    pub id: String,
    pub address: String,
    pub port: u16,
}

impl Site {
    /// Starts a Consul of one server, with its default limits and a log on disk.
    pub fn new() -> Result<Site> {
        let (host, cgroup, tempdir) = (Host::new("site")?, Cgroup::new()?, TempDir::new("http")?);
        host.ip(&format!("addr add {ADDRESS}/32 dev lo"))?;
        let http = format!("127.0.0.1 unix://{}", socket(&tempdir).display());
        let more = json!({ "addresses": { "http": http }, "log_level": "info" });
        let mut servers = Consul::servers(&[(&host, "server", ADDRESS)], &more, None)?;
        let consul = servers.pop().context("no server")?;
        Ok(Site { _consul: consul, cgroup, host, tempdir })
    }

    /// Starts the daemon, and waits until it is ready.
    pub fn nohop(&self, config: &str) -> Result<Nohop> {
        Nohop::start(&self.host, &self.cgroup, config)
    }

    /// Registers instances, as fast as it goes.
    pub fn register(&self, instances: &[Instance]) -> Result<()> {
        let node = json!({ "Node": NODE, "Address": "10.99.0.9", "SkipNodeUpdate": true });
        self.put("/v1/catalog/register", &node)?;
        let operations: Vec<Value> = instances.iter().flat_map(operations).collect();
        operations.chunks(MAX_OPERATIONS).try_for_each(|part| self.put("/v1/txn", &json!(part)))
    }

    /// Registers one instance, new or changed.
    pub fn change(&self, instance: &Instance) -> Result<()> {
        let Instance { service, id, address, port } = instance;
        let body = json!({
            "Node": NODE,
            "SkipNodeUpdate": true,
            "Service": {
                "Service": service, "ID": id, "Tags": ["routed"], "Address": address, "Port": port,
            },
        });
        self.put("/v1/catalog/register", &body)
    }

    /// Queries DNS for services, as their clients do.
    pub fn use_names<'a>(&self, names: impl Iterator<Item = &'a str>) -> Result<()> {
        let names: Vec<String> = names.map(|name| format!("{name}.service")).collect();
        for some in names.chunks(20) {
            let words = format!("+time=2 +tries=1 +short {}", some.join(" "));
            self.host.outside().run("dig", &words)?;
        }
        Ok(())
    }

    /// The connections that programs of the host have to Consul's port.
    pub fn n_connections(&self) -> Result<usize> {
        let shown = self.host.outside().run("ss", "-Htn state established dport = :8500")?;
        Ok(shown.lines().count())
    }

    fn put(&self, path: &str, body: &Value) -> Result<()> {
        ask(&socket(&self.tempdir), "PUT", path, &body.to_string()).map(drop)
    }
}

fn operations(instance: &Instance) -> [Value; 2] {
    let Instance { service, id, address, port } = instance;
    let service = json!({
        "Verb": "set",
        "Node": NODE,
        "Service": {
            "Service": service, "ID": id, "Tags": ["routed"], "Address": address, "Port": port,
        },
    });
    let check = json!({
        "Verb": "set",
        "Check": {
            "Node": NODE, "CheckID": format!("{id}-check"), "ServiceID": id, "Name": "alive",
            "Status": "passing",
        },
    });
    [json!({ "Service": service }), json!({ "Check": check })]
}

fn socket(tempdir: &TempDir) -> PathBuf {
    tempdir.path().join("consul.sock")
}

/// The daemon's metrics of a name, with their labels.
pub fn metrics(nohop: &Nohop, name: &str) -> Result<Vec<(String, f64)>> {
    let admin = nohop.admin();
    let text = ask(Path::new(admin.trim_start_matches("unix:")), "GET", "/metrics", "")?;
    let samples = text.lines().filter(|line| line.starts_with(name));
    let samples = samples.filter_map(|line| line.rsplit_once(' '));
    Ok(samples.filter_map(|(labels, value)| Some((labels.into(), value.parse().ok()?))).collect())
}

/// The time from news to the maps, as the daemon itself counts it: all of it in ms, and how often.
pub fn propagation(nohop: &Nohop) -> Result<(f64, f64)> {
    let one = |name: &str| -> Result<f64> {
        metrics(nohop, name)?.first().map(|(_, value)| *value).context("no such metric")
    };
    Ok((one("nohop_propagation_seconds_sum")? * 1e3, one("nohop_propagation_seconds_count")?))
}

/// The processor time that the daemon has had, in seconds.
pub fn cpu_s(nohop: &Nohop) -> Result<f64> {
    let pid = nohop.process.pid().as_raw_nonzero();
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').context("the kernel's stat")?;
    let ticks = fields.split_whitespace().skip(11).take(2);
    let ticks: Vec<f64> = ticks.map(str::parse).collect::<Result<_, _>>()?;
    Ok(ticks.iter().sum::<f64>() / TICKS_PER_S)
}

/// A line of the daemon's /proc/PID/status, such as `VmRSS`, in MB.
pub fn memory_mb(nohop: &Nohop, key: &str) -> Result<f64> {
    let pid = nohop.process.pid().as_raw_nonzero();
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with(key)).context("no such line")?;
    let kilobytes: f64 = line.split_whitespace().nth(1).context("no number")?.parse()?;
    Ok(kilobytes * 1024.0 / 1e6)
}
