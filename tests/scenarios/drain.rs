//! An operator drains what a node of its own is about to lose: an instance, an address, a node. New
//! connections from here avoid it at once, also after a restart, until it is undrained.

use std::fs;
use std::net::SocketAddrV4;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use testbed::consul::instance;
use testbed::net::{ExecContext, Host};
use testbed::nohop::{Nohop, service};
use testbed::process::Process;
use testbed::tempdir::TempDir;

use crate::cluster::{BACKEND, Catalog, Cluster, Nodes, vip};
use crate::disk::fifo;
use crate::load::{RATE, under_load};

/// The backends of a service that are in this state, by instance.
fn in_state(services: &Value, name: &str, state: &str) -> Vec<String> {
    let backends = service(services, name).and_then(|service| service["backends"].as_array());
    let backends = backends.into_iter().flatten().filter(|backend| backend["state"] == state);
    backends.map(|backend| backend["instance"].as_str().unwrap_or_default().to_owned()).collect()
}

/// What a command prints, where it exits with this code.
fn cli(nohop: &Nohop, arguments: &str, code: i32) -> Result<String> {
    let output = nohop.cli(arguments)?;
    let [stdout, stderr] = [output.stdout, output.stderr].map(String::from_utf8);
    let text = stdout? + &stderr?;
    ensure!(output.status.code() == Some(code), "nohop {arguments}: {}: {text}", output.status);
    Ok(text)
}

pub fn by_hand() -> Result<()> {
    let mut cluster = Cluster::new(3)?;
    let vip = cluster.vip("helloworld")?;
    let nohop = &cluster.nohop;
    under_load(&cluster.nodes, vip, RATE, |load| {
        load.wait_until_second(1)?;
        let text = cli(nohop, "drain helloworld-0", 0)?;
        let expected = "instance backend/helloworld-0 is drained: no new connections from here to 1 \
                        backend of 1 service\n";
        ensure!(text == expected, "{text}");
        let drained = in_state(&nohop.services()?, "helloworld", "draining");
        ensure!(drained == ["helloworld-0"], "{drained:?}");
        let connects = cluster.nodes.connect(vip, 100)?;
        let avoids = |answer: &str| answer != "hello from helloworld-0";
        ensure!(connects.all_answered(avoids), "{connects:?}");
        load.wait_until_second(2)
    })?;

    // Twice is no mistake; what is unknown or ambiguous changes nothing.
    let again = cli(nohop, "drain backend/helloworld-0", 0)?;
    ensure!(again.contains("is drained already, since 20"), "{again}");
    let unknown = cli(nohop, "drain helloworld-9", 1)?;
    ensure!(unknown.contains("the closest names are `instance:backend/helloworld-"), "{unknown}");
    let unknown = cli(nohop, "undrain helloworld-9", 1)?;
    ensure!(unknown.contains("among 3 instances on 1 node"), "{unknown}");
    ensure!(cli(nohop, "drain edge", 1)?.contains("this node is no edge"));
    ensure!(cli(nohop, "undrain helloworld-1", 0)?.ends_with("helloworld-1 isn't drained\n"));
    ensure!(nohop.status()?["drains"] == 1);

    // The next daemon has it in its first table.
    let explained = nohop.explain("helloworld")?;
    let reason = |explained: &Value| -> Result<String> {
        let backends = explained["service"]["backends"].as_array().context("backends")?;
        let drained = backends.iter().find(|backend| backend["state"] == "draining");
        Ok(drained.context("none is draining")?["reason"].to_string())
    };
    let before = reason(&explained)?;
    ensure!(before.contains("drained by hand since 20"), "{before}");
    nohop.kill()?;
    cluster.nohop.start_again()?;
    let nohop = &cluster.nohop;
    ensure!(reason(&nohop.explain("helloworld")?)? == before);
    let connects = cluster.nodes.connect(vip, 100)?;
    ensure!(connects.all_answered(|answer| answer != "hello from helloworld-0"), "{connects:?}");

    // A whole node, though nothing is left then.
    let node = cli(nohop, "drain backend", 0)?;
    ensure!(node.contains("warning: helloworld has no backend left here"), "{node}");
    let connects = cluster.nodes.connect(vip, 10)?;
    ensure!(connects.all_failed_with("ConnectionRefused"), "{connects:?}");
    // What ends it is the argument that it was drained by, for each instance.
    let services = nohop.services()?;
    let backends = service(&services, "helloworld").and_then(|it| it["backends"].as_array());
    let by: Vec<_> = backends.into_iter().flatten().map(|it| &it["drained_by"]).collect();
    ensure!(by == ["instance:backend/helloworld-0", "node:backend", "node:backend"], "{by:?}");
    let held = cli(nohop, "undrain helloworld-1", 1)?;
    ensure!(
        held.contains("is drained by another drain, which `nohop undrain node:backend` ends"),
        "{held}"
    );
    let listed: Value = serde_json::from_str(&cli(nohop, "drain --json", 0)?)?;
    let of = |nth: usize| (&listed[nth]["kind"], &listed[nth]["name"], &listed[nth]["backends"]);
    ensure!(of(0) == (&"node".into(), &"backend".into(), &3.into()), "{listed:#}");
    ensure!(of(1).1 == "backend/helloworld-0", "{listed:#}");

    let still = cli(nohop, "undrain helloworld-0", 0)?;
    ensure!(still.contains("is still drained, by node:backend"), "{still}");
    cli(nohop, "undrain node:backend", 0)?;
    ensure!(cli(nohop, "drain", 0)? == "nothing is drained by hand\n");
    let connects = cluster.nodes.connect(vip, 100)?;
    ensure!(connects.errors.is_empty() && connects.answers.len() == 3, "{connects:?}");

    // An instance with the id of a node: the argument has to name the kind.
    let other = instance("other", "backend", cluster.helloworlds[2].address);
    cluster.server.register(&other)?;
    nohop.wait_for_backends("other", 1)?;
    let ambiguous = cli(nohop, "drain backend", 1)?;
    let means = "`backend` means `node:backend`, `instance:backend/backend`: name one of them so";
    ensure!(ambiguous.contains(means), "{ambiguous}");
    ensure!(cli(nohop, "drain", 0)? == "nothing is drained by hand\n");
    let one = cli(nohop, "drain instance:backend/backend", 0)?;
    ensure!(one.starts_with("instance backend/backend is drained: no new connections"), "{one}");

    // By address and port.
    let address = cluster.helloworlds[1].address;
    cli(nohop, &format!("drain {address}"), 0)?;
    let drained = in_state(&nohop.services()?, "helloworld", "draining");
    ensure!(drained == ["helloworld-1"], "{drained:?}");

    // Where connections aren't translated.
    fs::write(nohop.state_dir().join("off"), "")?;
    nohop.wait_for_status(|status| status["datapath"]["mode"] == "shadow")?;
    let shadow = cli(nohop, "drain helloworld-2", 0)?;
    let expected = "warning: connections are only counted, so it has no effect until they are";
    ensure!(shadow.contains(expected), "{shadow}");
    Ok(())
}

/// A disk that doesn't answer keeps no drain from applying. What isn't on disk is reported, and what is there
/// applies once it can be read.
pub fn on_a_slow_disk() -> Result<()> {
    let nodes = Nodes::new()?;
    let (one, two) = (nodes.helloworld("one")?, nodes.helloworld("two")?);
    let catalog = Catalog::new(&[("web", &[one.address, two.address])])?;
    let state = TempDir::new("state")?;
    let config = catalog.config() + &format!("state_dir = {:?}\n", state.path());
    let mut nohop = nodes.nohop(&config)?;
    nohop.wait_for_backends("web", 2)?;
    let [drain_one, drain_two] = [&one, &two].map(|it| format!("drain {}", it.address));
    let text = cli(&nohop, &drain_one, 0)?;
    ensure!(!text.contains("warning"), "{text}");
    // It was on disk before the answer.
    let file = state.path().join("drains.json");
    let drains = fs::read_to_string(&file)?;
    ensure!(nohop.terminate()?.success());

    fifo(&file)?;
    nohop.start_again()?;
    let is_unread = |text: &str| text.contains("drains.json isn't read yet");
    nohop.wait_for_status(|status| is_unread(&status["problems"].to_string()))?;
    nohop.wait_for_backends("web", 2)?;
    let text = cli(&nohop, &drain_two, 0)?;
    ensure!(text.contains(" is drained: no new connections") && is_unread(&text), "{text}");
    let connects = nodes.connect(vip(&nohop, "web")?, 20)?;
    ensure!(connects.all_answered(|answer| answer == "hello from one"), "{connects:?}");
    // A file is in its place: nothing was lost.
    let new = state.path().join("new");
    fs::write(&new, drains)?;
    fs::rename(&new, &file)?;
    nohop.wait_until(|services| in_state(services, "web", "draining").len() == 2)?;
    nohop.wait_for_status(|status| !is_unread(&status["problems"].to_string()))?;
    let again = cli(&nohop, &drain_two, 0)?;
    ensure!(again.contains("is drained already") && !again.contains("disk"), "{again}");
    let drains = fs::read_to_string(&file)?;
    for helloworld in [&one, &two] {
        ensure!(drains.contains(&helloworld.address.to_string()), "{drains}");
    }

    // It doesn't answer any more: the answer reports that, and a stop doesn't wait for it.
    fifo(&state.path().join(".drains.json.tmp"))?;
    let text = cli(&nohop, &format!("un{drain_one}"), 0)?;
    ensure!(text.contains("warning: it applies, and isn't on disk yet"), "{text}");
    ensure!(nohop.terminate()?.success());
    nohop.start_again()?;
    nohop.wait_until(|services| in_state(services, "web", "draining").len() == 2)?;
    Ok(())
}

/// Opens a connection, prints `open`, what answers, and then waits on it.
const HOLD: &str = r#"
exec 3<>"/dev/tcp/$0/$1" && printf 'GET / HTTP/1.1\r\nHost: x\r\n\r\n' >&3
while IFS= read -r line <&3; do case $line in *hello*) echo "open $line";; esac; done
echo closed
"#;

/// The most connections that are opened until each backend has one.
const MAX_HELD: usize = 64;

/// A connection that a process holds open.
struct Held {
    process: Process,
    /// The backend that answered.
    backend: String,
}

impl Held {
    fn open(place: ExecContext<'_>, address: SocketAddrV4) -> Result<Held> {
        let mut command = place.command("bash");
        let (ip, port) = (address.ip().to_string(), address.port().to_string());
        command.args(["-c", HOLD, &ip, &port]).env("LC_ALL", "C");
        let process = Process::spawn("a connection that is held", command)?;
        let line = process.wait_for_line(&["open hello from "])?;
        Ok(Held { process, backend: line.replace("open hello from ", "") })
    }

    /// Opens connections until each of these backends has one.
    fn open_to_each<'a>(
        place: impl Fn() -> ExecContext<'a>,
        vip: SocketAddrV4,
        backends: &[&str],
    ) -> Result<Vec<Held>> {
        let mut held: Vec<Held> = Vec::new();
        while !backends.iter().all(|name| held.iter().any(|held| held.backend == *name)) {
            if held.len() == MAX_HELD {
                bail!("not every backend answers");
            }
            held.push(Held::open(place(), vip)?);
        }
        Ok(held)
    }

    /// Waits until it is aborted from outside: its backend ends none.
    fn wait_until_aborted(&self) -> Result<()> {
        self.process.wait_for_line(&["Software caused connection abort"]).map(drop)
    }

    fn is_open(&self) -> bool {
        self.process.n_lines_with("closed") == 0
    }
}

/// Connections to what is drained, or deregistered, are open until the deadline and are closed then, in
/// every network namespace; no others are, and no new connection fails.
pub fn deadline() -> Result<()> {
    let mut cluster = Cluster::with_config(4, "balance.drain_deadline = \"2s\"")?;
    let vip = cluster.vip("helloworld")?;
    // A container of the served cgroup, with a network namespace of its own.
    let container = Host::new("container")?;
    container.connect_veth(&cluster.nodes.backend, ["10.97.0.1/24", "10.97.0.2/24"])?;
    container.ip(&format!("route add {BACKEND} via 10.97.0.2"))?;
    let names: Vec<String> = (0..4).map(|nth| format!("helloworld-{nth}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let (nodes, addresses) = (&cluster.nodes, &cluster.helloworlds);
    let mut held = Held::open_to_each(|| nodes.inside(), vip, &names)?;
    held.extend(Held::open_to_each(|| container.inside(&nodes.cgroup), vip, &names)?);
    // Connections to the backends themselves are none of nohop's.
    let direct = [0, 1].map(|nth: usize| Held::open(nodes.inside(), addresses[nth].address));
    let direct = direct.into_iter().collect::<Result<Vec<_>>>()?;

    under_load(nodes, vip, RATE, |load| {
        load.wait_until_second(1)?;
        cli(&cluster.nohop, "drain helloworld-0", 0)?;
        cluster.server.deregister("helloworld-1")?;
        let ends = |held: &Held| ["helloworld-0", "helloworld-1"].contains(&held.backend.as_str());
        held.iter().filter(|held| ends(held)).try_for_each(Held::wait_until_aborted)?;
        ensure!(held.iter().filter(|held| !ends(held)).all(Held::is_open));
        ensure!(direct.iter().all(Held::is_open));
        load.wait_until_second(4)
    })?;

    // The deadline of what was drained before a restart passes after it.
    cli(&cluster.nohop, "drain helloworld-2", 0)?;
    cluster.nohop.wait_for_state("drains.json", "helloworld-2")?;
    cluster.nohop.kill()?;
    cluster.nohop.start_again()?;
    let ends = |held: &&Held| held.backend == "helloworld-2";
    held.iter().filter(ends).try_for_each(Held::wait_until_aborted)?;
    let stays = |held: &&Held| held.backend == "helloworld-3";
    ensure!(held.iter().filter(stays).chain(&direct).all(Held::is_open));
    Ok(())
}
