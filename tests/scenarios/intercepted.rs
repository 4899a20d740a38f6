//! `dns.intercept`: processes that are configured for another resolver find services by name while the
//! daemon runs, and ask that resolver again as soon as it is dead.

use std::net::{Ipv4Addr, UdpSocket};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::TIMEOUT;
use testbed::cgroup::Cgroup;
use testbed::helloworld::Helloworld;
use testbed::load::Load;
use testbed::net::{ExecContext, Host};
use testbed::nohop::Nohop;
use testbed::process::Process;

use crate::cluster::{BACKEND, Catalog, Nodes, attached, unit, vip};
use crate::resolvers;

/// The address of the client node that its container reaches, and the container's.
const ON_HOST: &str = "10.98.0.1";
const IN_CONTAINER: &str = "10.98.0.2";
/// A DNS server on the backend node that never answers.
const SILENT: (&str, u16) = ("127.0.0.1", 5399);
/// Lookups a second, each followed by a connection.
const RATE: u32 = 500;
/// Becomes the daemon, with sockets passed as systemd passes them.
const PASS_SOCKETS: &str = r#"
import fcntl, os, socket, sys
for place, kind in enumerate((socket.SOCK_DGRAM, socket.SOCK_STREAM)):
    bound = socket.socket(socket.AF_INET, kind)
    bound.bind(("127.0.0.1", 53))
    if kind == socket.SOCK_STREAM:
        bound.listen(64)
    os.dup2(fcntl.fcntl(bound.fileno(), fcntl.F_DUPFD, 10), 3 + place)
    bound.detach()
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="2")
os.execv(sys.argv[1], sys.argv[1:])
"#;

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let one = nodes.helloworld("one")?;
    let catalog = Catalog::new(&[("helloworld", &[one.address])])?;
    let _resolver = resolver(&nodes, "")?;
    nodes.client.set_resolv_conf(&format!("nameserver {BACKEND}\n"))?;
    let container = Host::new("container")?;
    let addresses = [&format!("{ON_HOST}/24"), &format!("{IN_CONTAINER}/24")];
    nodes.client.connect_veth(&container, addresses.map(String::as_str))?;
    container.set_resolv_conf(&format!("nameserver {BACKEND}\n"))?;

    let tasks = nodes.cgroup.child("tasks")?;
    let listen = format!("dns.listen = [\"127.0.0.1:53\", \"{ON_HOST}:53\"]\n");
    let intercept = format!("dns.intercept = [{:?}]\n", tasks.path());
    let mut nohop = nodes.nohop(&(catalog.config() + &listen + &intercept))?;
    nohop.wait_for_status(|status| unit(status, "intercept")["state"] == "attached")?;
    let vip = vip(&nohop, "helloworld")?.ip().to_string();

    // Processes elsewhere: the resolver of resolv.conf answers, and knows no services.
    by_itself(&nodes.inside())?;
    let task = nodes.client.inside(&tasks);
    by_nohop(&task, &vip)?;
    let answer = task.run("curl", "-sS --max-time 60 http://helloworld.service/")?;
    ensure!(answer == "hello from one\n", "{answer}");
    by_nohop(&container.inside(&tasks), &vip)?;
    ensure!(intercepted(&nohop)? > 0.0);

    nohop.kill()?;
    by_itself(&task)?;
    ensure!(attached(&tasks)?.is_empty(), "{:?}", attached(&tasks)?);
    nohop.start_again()?;
    nohop.wait_for_status(|status| unit(status, "intercept")["state"] == "attached")?;
    by_nohop(&task, &vip)?;

    off_and_on(&nohop, &task, &vip, &tasks, &(catalog.config() + &listen))?;
    ensure!(nohop.terminate()?.success());
    by_itself(&task)
}

/// By the configuration of a daemon that runs.
fn off_and_on(
    nohop: &Nohop,
    task: &ExecContext<'_>,
    vip: &str,
    tasks: &Cgroup,
    config: &str,
) -> Result<()> {
    nohop.configure(config)?;
    reload(nohop)?;
    by_itself(task)?;
    ensure!(unit(&nohop.status()?, "intercept") == Value::Null);
    nohop.configure(&format!("{config}dns.intercept = [{:?}]\nshadow = true\n", tasks.path()))?;
    reload(nohop)?;
    by_itself(task)?;
    ensure!(unit(&nohop.status()?, "intercept")["reason"] == "shadow mode");
    nohop.configure(&format!("{config}dns.intercept = [{:?}]\n", tasks.path()))?;
    reload(nohop)?;
    by_nohop(task, vip)
}

fn reload(nohop: &Nohop) -> Result<()> {
    let output = nohop.cli("reload")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    Ok(())
}

/// While the daemon stops, each query of these processes is answered: those that were sent to it are read before it
/// stops reading, and all later ones go to the resolver that was asked. The daemon has passed sockets, in which it
/// leaves what arrives while it waits for its last answers: so queries that are intercepted then are lost.
pub fn while_it_stops() -> Result<()> {
    let nodes = Nodes::new()?;
    let one = Helloworld::start(nodes.backend.outside(), "one", &format!("{BACKEND}:80"))?;
    let catalog = Catalog::new(&[("helloworld", &[one.address])])?;
    let silent = nodes.backend.enter(|| Ok(UdpSocket::bind(SILENT)?))?;
    silent.set_read_timeout(Some(TIMEOUT))?;
    let (silent_ip, silent_port) = SILENT;
    let names = format!(
        "--address=/one.example/{BACKEND} --server=/silent.example/{silent_ip}#{silent_port}"
    );
    let _resolver = resolver(&nodes, &names)?;
    nodes.client.set_resolv_conf(&format!("nameserver {BACKEND}\n"))?;
    let tasks = nodes.cgroup.child("tasks")?;
    let config = format!("{}dns.intercept = [{:?}]\n", catalog.config(), tasks.path());
    let under = ["python3", "-c", PASS_SOCKETS];
    let nohop = Nohop::start_under(&nodes.client, &under, nodes.cgroup.path(), &config)?;
    nohop.wait_for_status(|status| unit(status, "intercept")["state"] == "attached")?;

    let task = nodes.client.inside(&tasks);
    let resolver = (BACKEND.parse::<Ipv4Addr>()?, 53);
    let load = Load::start_by_resolver(nodes.client.inside(&tasks), "one.example", resolver, RATE)?;
    load.wait_until_second(1)?;
    ensure!(intercepted(&nohop)? >= f64::from(RATE), "{}", intercepted(&nohop)?);
    // A query that the daemon waits for when it stops, as long as it waits for any.
    let mut dig = task.command("dig");
    dig.args(["+time=60", "+tries=1", "silent.example"]);
    let _dig = Process::spawn("dig", dig)?;
    silent.recv(&mut [0; 512]).context("a query that waits for its answer")?;
    ensure!(nohop.terminate()?.success());
    let outcome = load.finish()?;
    ensure!(outcome.errors.is_empty(), "{outcome:?}");
    ensure!(outcome.answers.keys().eq(["hello from one"]), "{outcome:?}");
    Ok(())
}

/// A resolver that knows one name and no services, with further options.
fn resolver(nodes: &Nodes, options: &str) -> Result<Process> {
    let words = format!(
        "--address=/other.example/192.0.2.9 --local=/service/ --listen-address={BACKEND} {options}"
    );
    resolvers::dnsmasq_by(nodes.backend.outside().command("dnsmasq"), &words)
}

const DIG: &str = "+time=60 +tries=1";

/// The resolver of resolv.conf answers.
fn by_itself(context: &ExecContext<'_>) -> Result<()> {
    for transport in ["+notcp", "+tcp"] {
        let answer = context.run("dig", &format!("{DIG} {transport} helloworld.service"))?;
        ensure!(answer.contains("status: NXDOMAIN"), "{answer}");
        let answer = context.run("dig", &format!("{DIG} +short {transport} other.example"))?;
        ensure!(answer.trim() == "192.0.2.9", "{answer}");
    }
    let found = context.run("getent", "ahostsv4 helloworld.service");
    ensure!(found.is_err(), "{found:?}");
    Ok(())
}

/// nohop answers in its place, and the application doesn't notice: dig and glibc compare the address
/// that an answer comes from.
fn by_nohop(context: &ExecContext<'_>, vip: &str) -> Result<()> {
    for transport in ["+notcp", "+tcp"] {
        let answer = context.run("dig", &format!("{DIG} {transport} helloworld.service"))?;
        ensure!(answer.contains(vip), "{answer}");
        ensure!(answer.contains(&format!("SERVER: {BACKEND}#53")), "{answer}");
        let answer = context.run("dig", &format!("{DIG} +short {transport} other.example"))?;
        ensure!(answer.trim() == "192.0.2.9", "{answer}");
    }
    let found = context.run("getent", "ahostsv4 helloworld.service")?;
    ensure!(found.starts_with(&format!("{vip} ")), "{found}");
    Ok(())
}

fn intercepted(nohop: &Nohop) -> Result<f64> {
    let socket = nohop.admin().replace("unix:", "");
    let text = testbed::http::ask(socket.as_ref(), "GET", "/metrics", "")?;
    let sample = "nohop_dns_intercept_total{result=\"intercepted\"} ";
    let value = text.lines().find_map(|line| line.strip_prefix(sample));
    Ok(value.with_context(|| format!("no {sample}"))?.parse()?)
}
