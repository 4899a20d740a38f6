//! Consul agents, driven over their HTTP interface.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::TIMEOUT;
use crate::cmd;
use crate::net::Host;
use crate::process::Process;
use crate::tempdir::TempDir;

/// An agent's log line once the catalog has its node, so that there is a leader, too.
const READY: [&str; 2] = ["Synced node info", "Node info in sync"];

/// Between two requests, where no event shows when to repeat one.
const PAUSE: Duration = Duration::from_millis(200);

/// The node name of [`Consul::dev`].
const DEV: &str = "dev";

/// An agent on a host, with the default ports on 127.0.0.1 but that of DNS, which is off.
pub struct Consul {
    host: Arc<Host>,
    config: Value,
    /// The token for this agent's HTTP interface, where ACLs are on.
    token: Option<String>,
    process: Option<Process>,
    tempdir: TempDir,
}

impl Consul {
    /// Starts a server, the only one of its cluster, that other hosts reach at `address`.
    ///
    /// # Errors
    /// When it isn't ready in time.
    pub fn server(host: &Arc<Host>, node: &str, address: &str) -> Result<Consul> {
        Consul::start(host, node, address, alone())
    }

    /// Starts a server and a client of it at the same time, each on a host, under a node name, at an
    /// address.
    ///
    /// # Errors
    /// When they aren't ready in time.
    pub fn server_and_client(
        server: (&Arc<Host>, &str, &str),
        client: (&Arc<Host>, &str, &str),
    ) -> Result<(Consul, Consul)> {
        let join = json!({ "retry_join": [server.2], "retry_interval": "250ms" });
        let (host, node, address) = server;
        let mut server = Consul::prepare(host, node, address, &alone(), None)?;
        let (host, node, address) = client;
        let mut client = Consul::prepare(host, node, address, &join, None)?;
        server.spawn()?;
        client.spawn()?;
        server.wait_until_ready()?;
        client.wait_until_ready()?;
        Ok((server, client))
    }

    /// Starts the servers of one cluster, each on a host, under a node name, at an address; `more` is
    /// merged into the configuration of each, and `token` is for their HTTP interface.
    ///
    /// # Errors
    /// When they aren't ready in time.
    pub fn servers(
        hosts: &[(&Arc<Host>, &str, &str)],
        more: &Value,
        token: Option<&str>,
    ) -> Result<Vec<Consul>> {
        let addresses: Vec<&str> = hosts.iter().map(|(_, _, address)| *address).collect();
        let mut servers = Vec::new();
        for (host, node, address) in hosts {
            let mut config = json!({
                "server": true,
                "bootstrap_expect": hosts.len(),
                // A leader keeps its office also where the machine stalls for a second.
                "performance": { "raft_multiplier": if hosts.len() > 1 { 3 } else { 1 } },
                "retry_join": addresses,
                "retry_interval": "250ms",
            });
            merge(&mut config, more);
            let mut server = Consul::prepare(host, node, address, &config, token)?;
            server.spawn()?;
            servers.push(server);
        }
        // None is ready before they have elected one of them.
        for server in &servers {
            server.wait_until_ready()?;
        }
        Ok(servers)
    }

    /// Starts a client, reached at `address`, of the servers at `servers`, with more of a
    /// configuration and a token as in [`Consul::servers`].
    ///
    /// # Errors
    /// When it isn't ready in time.
    pub fn client_with(
        host: &Arc<Host>,
        node: &str,
        address: &str,
        servers: &[&str],
        more: &Value,
        token: Option<&str>,
    ) -> Result<Consul> {
        let mut config = json!({ "retry_join": servers, "retry_interval": "250ms" });
        merge(&mut config, more);
        let mut client = Consul::prepare(host, node, address, &config, token)?;
        client.restart()?;
        Ok(client)
    }

    /// Starts an agent that is a cluster by itself and stores nothing: `consul agent -dev`.
    ///
    /// # Errors
    /// When it isn't ready in time.
    pub fn dev(host: &Arc<Host>) -> Result<Consul> {
        Consul::dev_with(host, json!({}))
    }

    /// The same, with more of a configuration.
    ///
    /// # Errors
    /// When it isn't ready in time.
    pub fn dev_with(host: &Arc<Host>, more: Value) -> Result<Consul> {
        Consul::start(host, DEV, "127.0.0.1", more)
    }

    fn start(host: &Arc<Host>, node: &str, address: &str, role: Value) -> Result<Consul> {
        let mut consul = Consul::prepare(host, node, address, &role, None)?;
        consul.restart()?;
        Ok(consul)
    }

    /// An agent that doesn't run yet.
    fn prepare(
        host: &Arc<Host>,
        node: &str,
        address: &str,
        role: &Value,
        token: Option<&str>,
    ) -> Result<Consul> {
        let mut config = json!({
            "node_name": node,
            "bind_addr": address,
            "client_addr": "127.0.0.1",
            "disable_update_check": true,
            "leave_on_terminate": false,
            "skip_leave_on_interrupt": true,
            "log_level": "debug",
            // An agent whose DNS server doesn't run after a second ends, which a busy machine brings
            // about (`listenAndServeDNS` in Consul).
            "ports": { "dns": -1 },
            // On one machine agents agree faster than the defaults. A busy one is no reason to take
            // a node for dead, and with it its instances: only after half a minute's silence.
            "performance": { "raft_multiplier": 1 },
            "gossip_lan": {
                "gossip_interval": "50ms",
                "probe_interval": "1s",
                "suspicion_mult": 30,
            },
        });
        merge(&mut config, role);
        let (host, tempdir) = (Arc::clone(host), TempDir::new("consul")?);
        Ok(Consul { host, config, token: token.map(String::from), tempdir, process: None })
    }

    /// Ends the agent at once, as a crash would.
    pub fn kill(&mut self) {
        if let Some(process) = self.process.take() {
            process.kill();
        }
    }

    /// Starts the agent again after [`Consul::kill`], with what it had stored.
    ///
    /// # Errors
    /// When it isn't ready in time.
    pub fn restart(&mut self) -> Result<()> {
        self.spawn()?;
        self.wait_until_ready()
    }

    /// The same, without waiting until it is usable.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn spawn(&mut self) -> Result<()> {
        self.kill();
        let config_file = self.tempdir.path().join("config.json");
        fs::write(&config_file, self.config.to_string()).context("write Consul's configuration")?;
        let mut command = self.host.outside().command(program()?);
        command.arg("agent").arg("-config-file").arg(config_file);
        let name = self.config["node_name"].as_str().unwrap_or_default();
        if name == DEV {
            command.arg("-dev");
        } else {
            command.arg("-data-dir").arg(self.tempdir.path().join("data"));
        }
        self.process = Some(Process::spawn(&format!("consul {name}"), command)?);
        Ok(())
    }

    /// Waits until it is usable, after [`Consul::spawn`].
    ///
    /// # Errors
    /// When it isn't in time.
    pub fn wait_until_ready(&self) -> Result<()> {
        let process = self.process.as_ref().context("the agent doesn't run")?;
        process.wait_for_line(&READY)?;
        let name = self.config["node_name"].as_str().unwrap_or_default();
        let passing = |checks: &Value| {
            let mut checks = checks.as_array().into_iter().flatten();
            checks.any(|check| check["CheckID"] == "serfHealth" && check["Status"] == "passing")
        };
        self.wait_for(&format!("/v1/health/node/{name}"), passing)?;
        Ok(())
    }

    /// GETs a path, such as `/v1/catalog/services`.
    ///
    /// # Errors
    /// When the agent doesn't answer with 200 and JSON.
    pub fn get(&self, path: &str) -> Result<Value> {
        let body = self.ask(path, &[])?;
        serde_json::from_str(&body).with_context(|| format!("{path} answered {body:?}"))
    }

    /// PUTs to a path, such as `/v1/agent/service/register`.
    ///
    /// # Errors
    /// When the agent refuses.
    pub fn put(&self, path: &str, body: &Value) -> Result<()> {
        self.ask(path, &["--request", "PUT", "--data-binary", &body.to_string()]).map(drop)
    }

    /// PUTs to a path, and returns what the agent answers.
    ///
    /// # Errors
    /// When the agent refuses, or doesn't answer with JSON.
    pub fn put_for(&self, path: &str, body: &Value) -> Result<Value> {
        let answer = self.ask(path, &["--request", "PUT", "--data-binary", &body.to_string()])?;
        serde_json::from_str(&answer).with_context(|| format!("{path} answered {answer:?}"))
    }

    /// DELETEs a path, such as `/v1/acl/token/ID`.
    ///
    /// # Errors
    /// When the agent refuses.
    pub fn delete(&self, path: &str) -> Result<()> {
        self.ask(path, &["--request", "DELETE"]).map(drop)
    }

    /// Registers an instance with this agent; [`instance`] makes one.
    ///
    /// # Errors
    /// When the agent refuses.
    pub fn register(&self, instance: &Value) -> Result<()> {
        self.put("/v1/agent/service/register", instance)
    }

    /// Removes the instance with this id.
    ///
    /// # Errors
    /// When the agent refuses.
    pub fn deregister(&self, id: &str) -> Result<()> {
        self.put(&format!("/v1/agent/service/deregister/{id}"), &Value::Null)
    }

    /// Has the check of this instance pass.
    ///
    /// # Errors
    /// When the agent refuses.
    pub fn pass(&self, id: &str) -> Result<()> {
        self.put(&format!("/v1/agent/check/pass/service:{id}"), &Value::Null)
    }

    /// Has the check of this instance fail, so that it is critical.
    ///
    /// # Errors
    /// When the agent refuses.
    pub fn fail(&self, id: &str) -> Result<()> {
        self.put(&format!("/v1/agent/check/fail/service:{id}"), &Value::Null)
    }

    /// Waits by blocking queries until `predicate` holds of what `path` answers, and returns that. An
    /// agent that can't answer, as during an election, is asked again.
    ///
    /// # Errors
    /// When it doesn't in time.
    pub fn wait_for(&self, path: &str, predicate: impl Fn(&Value) -> bool) -> Result<Value> {
        let deadline = Instant::now() + TIMEOUT;
        let mut index = 0;
        while Instant::now() < deadline {
            let mut command = self.curl(&format!("{path}?index={index}&wait=5s"));
            command.arg("--include");
            let answer = match cmd::stdout(command) {
                Ok(answer) => answer,
                Err(_) => {
                    thread::sleep(PAUSE);
                    index = 0;
                    continue;
                }
            };
            let (head, body) = answer.split_once("\r\n\r\n").context("an answer without a head")?;
            let value = serde_json::from_str(body).with_context(|| format!("{path}: {body:?}"))?;
            if predicate(&value) {
                return Ok(value);
            }
            let mut headers = head.lines().filter_map(|line| line.split_once(": "));
            let found = headers.find(|(name, _)| name.eq_ignore_ascii_case("X-Consul-Index"));
            index = found.and_then(|(_, value)| value.parse().ok()).unwrap_or(0);
            if index == 0 {
                // It answers at once, whatever the query asks for.
                thread::sleep(PAUSE);
            }
        }
        bail!("{path} isn't as expected after {TIMEOUT:?}: {}", self.get(path)?)
    }

    /// Asks once, but during an election: then nothing was done, and it is asked again.
    fn ask(&self, path: &str, options: &[&str]) -> Result<String> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let mut command = self.curl(path);
            command.args(options);
            match cmd::stdout(command) {
                Err(error)
                    if error.to_string().contains("No cluster leader")
                        && Instant::now() < deadline =>
                {
                    thread::sleep(PAUSE);
                }
                answer => return answer,
            }
        }
    }

    fn curl(&self, path: &str) -> Command {
        let mut command = self.host.outside().command("curl");
        command.args(["--silent", "--show-error", "--fail-with-body", "--max-time", "60"]);
        if let Some(token) = &self.token {
            command.args(["--header", &format!("X-Consul-Token: {token}")]);
        }
        command.arg(format!("http://127.0.0.1:8500{path}"));
        command
    }
}

/// The configuration of a server that is the only one of its cluster.
fn alone() -> Value {
    json!({ "server": true, "bootstrap_expect": 1 })
}

/// Puts the keys of `more` into `config`.
fn merge(config: &mut Value, more: &Value) {
    for (key, value) in more.as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
}

/// An instance in the form that an agent registers: tagged `routed`, with a check that passes until
/// [`Consul::fail`].
pub fn instance(name: &str, id: &str, address: impl Into<SocketAddr>) -> Value {
    let address = address.into();
    json!({
        "Name": name,
        "ID": id,
        "Address": address.ip(),
        "Port": address.port(),
        "Tags": ["routed"],
        "Check": { "TTL": "1h", "Status": "passing" },
    })
}

/// The consul that `cargo xtask setup` has fetched.
///
/// # Errors
/// When it hasn't.
pub fn program() -> Result<PathBuf> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../.tools/consul");
    fs::canonicalize(path).with_context(|| format!("there is no {path}: run `cargo xtask setup`"))
}

/// What `consul version` calls itself.
///
/// # Errors
/// When it can't be run.
pub fn version() -> Result<String> {
    let text = cmd::words(&program()?.display().to_string(), "version")?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}
