//! One of the two binaries at work in one round.

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::cmd;
use testbed::nohop::Nohop;
use testbed::process::Process;
use testbed::tempdir::TempDir;

use super::quantity::{N_TURNS, Part, Quantity, Samples};
use crate::bpf;
use crate::generators;
use crate::node::{Layout, Node};
use crate::peers::{Protocol, Service, Services, rendered};
use crate::pin;
use crate::suites::dns::{dnsperf, site as dns};
use crate::suites::scale;

/// The services of the smaller of the two daemons.
const N_FEW: usize = 10;
/// The backends of each service.
const N_BACKENDS: usize = 10;

/// Where every service's backends listen, and the address that has each backend's datagrams back.
const PORT: u16 = 8_080;
const ECHO_IDX: usize = 60_500;
/// The port of the backend that a change of the catalog moves, before and after.
const CHANGED_PORTS: [u16; 2] = [PORT, PORT + 1];

/// The least number of connections of one turn.
const N_CONNECTS: usize = 250;

/// How long datagrams are exchanged, and dnsperf asks, in one turn, in seconds.
const UDP_SECONDS: f64 = 0.1;
const DNS_SECONDS: f64 = 0.15;

/// The names that are forwarded at full speed in one turn, each asked once.
const N_FORWARDED: usize = 1_500;

const DNS: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 53);

/// Daemons of one binary, just started, each on a node of its own.
pub struct Site {
    few: Option<Daemon>,
    many: Option<Daemon>,
}

/// A daemon, its backends, and the figures of its start. Dropped in this order.
struct Daemon {
    nohop: Nohop,
    _helpers: Vec<Process>,
    vips: Vec<SocketAddrV4>,
    echo: SocketAddrV4,
    catalogs: [String; 2],
    start: Duration,
    start_cpu: Duration,
    files: TempDir,
    node: Node,
}

impl Site {
    /// Starts what these parts need.
    ///
    /// # Errors
    /// When a daemon isn't ready in time.
    pub fn start(binary: &Path, parts: &[Part], n_services: usize) -> Result<Site> {
        let wants = |part| parts.contains(&part);
        let few = wants(Part::Connect) || wants(Part::Udp);
        let many = wants(Part::Connect) || wants(Part::Dns) || wants(Part::Scale);
        let start = |is_wanted: bool, n_services| {
            is_wanted.then(|| Daemon::start(binary, n_services)).transpose()
        };
        Ok(Site { few: start(few, N_FEW)?, many: start(many, n_services)? })
    }

    /// Measures a part once, for the `turn`th time in this round. `forwarded_rate` is what is asked for while latency is measured, in queries a
    /// second; `None` where it isn't known yet.
    ///
    /// # Errors
    /// When it can't be measured; `samples` has the values until then.
    pub fn measure(
        &self,
        part: Part,
        turn: usize,
        forwarded_rate: Option<f64>,
        samples: &mut Samples,
    ) -> Result<()> {
        let daemon = |daemon| Option::as_ref(daemon).context("no daemon was started for it");
        match part {
            Part::Scale => daemon(&self.many)?.scale(turn, samples),
            Part::Connect => connect(daemon(&self.few)?, daemon(&self.many)?, turn, samples),
            Part::Udp => daemon(&self.few)?.udp(samples),
            Part::Dns => daemon(&self.many)?.dns(turn, forwarded_rate, samples),
        }
    }
}

/// The key that has a binary read a static catalog: an older one knows its former name alone.
fn sources(binary: &Path, probe: &Path) -> Result<&'static str> {
    let key = "catalog.sources = [\"file\"]\n";
    fs::write(probe, format!("{key}catalog.file = \"/\"\n")).context("write a configuration")?;
    let check = Command::new(binary).args(["config", "check"]).arg(probe).output();
    let output = check.with_context(|| format!("run {}", binary.display()))?;
    let is_unknown = String::from_utf8_lossy(&output.stderr).contains("unknown key");
    Ok(if is_unknown { "catalog.source = \"file\"\n" } else { key })
}

impl Daemon {
    fn start(binary: &Path, n_services: usize) -> Result<Daemon> {
        let (node, files) = (Node::new(Layout::OneHost)?, TempDir::new("catalog")?);
        let echo = Node::backend(ECHO_IDX, PORT);
        let mut helpers = Vec::new();
        let servers = CHANGED_PORTS
            .map(|port| ["greet".to_owned(), format!("0.0.0.0:{port}")])
            .into_iter()
            .chain([["echo".to_owned(), echo.to_string()]]);
        for arguments in servers {
            let mut command = node.backend_place().command(generators::load_program()?);
            command.args(arguments);
            helpers.push(Process::spawn("server", command)?);
        }
        for server in &helpers {
            server.wait_for_line(&["listening on "])?;
        }
        helpers.push(pin::on(pin::CLIENT, || dns::start_upstream(&node))?);

        let [before, after] = CHANGED_PORTS.map(|port| catalog(n_services, port, echo));
        let catalogs = [before?, after?];
        let catalog = files.path().join("nohop.toml");
        fs::write(&catalog, &catalogs[0]).context("write the catalog")?;
        let config = format!("catalog.file = {catalog:?}\ndns.forward = [\"{}\"]\n", dns::UPSTREAM);
        let config = config + sources(binary, &files.path().join("probe.toml"))?;
        let start = Instant::now();
        let nohop = Nohop::start_binary(binary, node.client_host(), &node.client, &config)?;
        let start = start.elapsed();
        let start_cpu = cpu_time(nohop.process.pid().as_raw_nonzero().get())?;
        node.adopt_hop(&nohop.process)?;
        let listed = nohop.services()?;
        let vip = |service: &Value| -> Option<(String, SocketAddrV4)> {
            let vip = service["vip"].as_str()?.parse().ok()?;
            Some((service["name"].as_str()?.to_owned(), SocketAddrV4::new(vip, 80)))
        };
        let listed = listed.as_array().context("a list of services")?;
        let vips_by_name: BTreeMap<_, _> = listed.iter().filter_map(vip).collect();
        let vip = |name: &str| vips_by_name.get(name).copied().context("nohop lacks a service");
        let vips = (0..n_services).map(|idx| vip(&name(idx))).collect::<Result<_>>()?;
        let echo = vip("echo")?;
        Ok(Daemon { nohop, _helpers: helpers, vips, echo, catalogs, start, start_cpu, files, node })
    }

    /// Connects each of these as often as any other, [`N_CONNECTS`] times at least in all, one after another.
    /// Returns the median of connect(), in ns.
    fn connect(&self, targets: &[SocketAddrV4]) -> Result<f64> {
        let file = self.files.path().join("targets");
        let lines: Vec<String> = targets.iter().map(SocketAddrV4::to_string).collect();
        fs::write(&file, lines.join("\n")).context("write the addresses to connect to")?;
        let n_connects = N_CONNECTS.div_ceil(targets.len()) * targets.len();
        let place = self.node.client_place();
        let found = generators::connect(place, &format!("@{}", file.display()), n_connects)?;
        generators::number(&found, "/connect_ns/p50")
    }

    /// What the connect hook costs for connections of these, in ns.
    fn hook_ns(&self, targets: &[SocketAddrV4]) -> Result<f64> {
        let connect = || self.connect(targets).map(drop);
        let means = bpf::mean_ns(&self.node.client, &[bpf::CONNECT4], connect)?;
        means.first().copied().context("a mean")
    }

    /// The latency of datagrams to the VIP, one under way at a time, in us.
    fn exchange(&self) -> Result<f64> {
        let arguments = format!(
            "udp {} --seconds {UDP_SECONDS} --sockets 1 --window 1 --unconnected",
            self.echo
        );
        let found = generators::load(self.node.client_place(), &arguments)?;
        ensure!(found["lost"] == 0, "datagrams were lost: {found}");
        generators::number(&found, "/latency_us/p50")
    }

    fn udp(&self, samples: &mut Samples) -> Result<()> {
        samples.add(Quantity::RoundTrip, self.exchange()?);
        let hooks = [bpf::SENDMSG4, bpf::RECVMSG4];
        let means = bpf::mean_ns(&self.node.client, &hooks, || self.exchange().map(drop))?;
        for (quantity, mean) in [Quantity::HookSend, Quantity::HookReceive].into_iter().zip(means) {
            samples.add(quantity, mean);
        }
        Ok(())
    }

    fn scale(&self, turn: usize, samples: &mut Samples) -> Result<()> {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        if turn == 0 {
            samples.add(Quantity::Ready, ms(self.start));
            samples.add(Quantity::ReadyCpu, ms(self.start_cpu));
            samples.add(Quantity::Resident, scale::resident_mb(&self.node)?);
            samples.add(Quantity::FirstSync, scale::propagation_ms(&self.nohop)?);
            samples.add(Quantity::Maps, bpf::maps_mb(&self.nohop.pins())?);
        }
        samples.add(Quantity::Change, ms(self.change(&self.catalogs[(turn + 1) % 2])?));
        Ok(())
    }

    /// From the rename of an edited catalog until the kernel has it.
    fn change(&self, catalog: &str) -> Result<Duration> {
        let (edited, file) = (self.files.path().join("edited"), self.files.path());
        fs::write(&edited, catalog).context("write the edited catalog")?;
        let generation = self.nohop.status()?["generation"].as_u64();
        let start = Instant::now();
        fs::rename(edited, file.join("nohop.toml")).context("rename the edited catalog")?;
        let is_newer = |status: &Value| status["generation"].as_u64() > generation;
        self.nohop.wait_for_status(is_newer)?;
        Ok(start.elapsed())
    }

    fn dns(&self, turn: usize, forwarded_rate: Option<f64>, samples: &mut Samples) -> Result<()> {
        const CLIENTS: &str = "-c 4 -q 100";
        let at = (self.node.client_place(), DNS);
        let questions =
            |domain: &str, names: &mut dyn Iterator<Item = String>| -> Result<PathBuf> {
                dns::write_questions(names, self.files.path(), domain)
            };
        if turn == 0 {
            // All of its threads have one processor, and dnsperf with the other resolver the other.
            let pid = self.nohop.process.pid().as_raw_nonzero();
            cmd::words("taskset", &format!("-a -c -p {} {pid}", pin::number(pin::SERVER)?))?;
            dns::await_answer(self.node.hop_place(), DNS, "n0.example", dns::UPSTREAM_ANSWER)?;
        }
        let zone = questions("service", &mut (0..self.vips.len()).map(name))?;
        let ask = |questions: &Path, arguments: &str| -> Result<(dnsperf::Summary, f64)> {
            let before = self.node.cpu_times()?;
            let summary = dnsperf::query(at, questions, arguments)?;
            let cpu = self.node.cpu_times()?.since(before).hop;
            Ok((summary, cpu.as_secs_f64() * 1e6 / summary.n_good as f64))
        };
        let (summary, cpu_us) = ask(&zone, &format!("{CLIENTS} -l {DNS_SECONDS}"))?;
        ensure!(summary.n_failed() == 0, "{} queries of the zone failed", summary.n_failed());
        samples.add(Quantity::ZoneRate, summary.rate());
        samples.add(Quantity::ZoneCpu, cpu_us);
        let others = questions("example", &mut (0..N_FORWARDED).map(|idx| format!("n{idx}")))?;
        let (summary, cpu_us) = ask(&others, &format!("{CLIENTS} -n 1"))?;
        samples.add(Quantity::ForwardedRate, summary.rate());
        samples.add(Quantity::ForwardedCpu, cpu_us);
        let Some(rate) = forwarded_rate else { return Ok(()) };
        let arguments = format!("{CLIENTS} -l {DNS_SECONDS} -Q {rate:.0}");
        let (summary, p99_us) = dnsperf::query_and_list(at, &others, &arguments)?;
        ensure!(
            summary.rate() > 0.9 * rate,
            "less than {rate:.0} forwarded queries a second in a turn"
        );
        samples.add(Quantity::ForwardedP99, p99_us);
        Ok(())
    }
}

fn connect(few: &Daemon, many: &Daemon, turn: usize, samples: &mut Samples) -> Result<()> {
    let share: Vec<SocketAddrV4> = many.vips.iter().copied().skip(turn).step_by(N_TURNS).collect();
    // Fewer services than turns are all connected in each.
    let share = if share.is_empty() { &many.vips } else { &share };
    samples.add(Quantity::ConnectFew, few.connect(&few.vips)?);
    samples.add(Quantity::ConnectMany, many.connect(share)?);
    samples.add(Quantity::HitFew, few.hook_ns(&few.vips)?);
    samples.add(Quantity::HitMany, many.hook_ns(share)?);
    samples.add(Quantity::Miss, many.hook_ns(&[Node::backend(0, PORT)])?);
    Ok(())
}

/// The processor time that the threads of a process have had so far: those that ended are left out.
fn cpu_time(pid: i32) -> Result<Duration> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).context("list the daemon's threads")?;
    let ran_ns = tasks.flatten().map(|task| -> Option<u64> {
        // Time on a processor, in ns, is the first word.
        let times = fs::read_to_string(task.path().join("schedstat")).ok()?;
        times.split_whitespace().next()?.parse().ok()
    });
    Ok(Duration::from_nanos(ran_ns.flatten().sum()))
}

fn name(idx: usize) -> String {
    format!("web-{idx}")
}

/// A static catalog: so many services of TCP with backends of their own, of which one, in the middle,
/// has this port; and one of UDP.
fn catalog(n_services: usize, port: u16, echo: SocketAddrV4) -> Result<String> {
    let service = |service_idx: usize| {
        let backend = |idx: usize| {
            let is_changed = idx == 0 && service_idx == n_services / 2;
            let n = service_idx * N_BACKENDS + idx;
            // More than there are addresses share them by port.
            let of_its_own = CHANGED_PORTS[n / 60_000 % 2];
            Node::backend(n % 60_000, if is_changed { port } else { of_its_own })
        };
        Service { name: name(service_idx), backends: (0..N_BACKENDS).map(backend).collect() }
    };
    let tcp = (0..n_services).map(service).collect();
    let tcp = Services { protocol: Protocol::Tcp, services: tcp, settings: String::new() };
    let udp = vec![Service { name: "echo".into(), backends: vec![echo] }];
    let udp = Services { protocol: Protocol::Udp, services: udp, settings: String::new() };
    let text = |services| rendered("nohop.toml", services, Path::new(""));
    Ok(text(&tcp)? + "\n" + &text(&udp)?)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::generators::STRIDE;

    #[test]
    fn catalogs_differ_in_one_backend() {
        let echo = Node::backend(ECHO_IDX, PORT);
        let [before, after] =
            CHANGED_PORTS.map(|port| catalog(100, port, echo).expect("a catalog"));
        let pairs = before.lines().zip(after.lines());
        assert_eq!(pairs.filter(|(before, after)| before != after).count(), 1);
        assert!(before.contains("protocol = \"udp\""), "{before}");
    }

    #[test]
    fn the_stride_meets_every_service() {
        for n in [N_FEW, 1_000, 10_000 / N_TURNS, 10_000] {
            let met: BTreeSet<_> = (0..n).map(|i| i * STRIDE % n).collect();
            assert_eq!(met.len(), n);
        }
    }
}
