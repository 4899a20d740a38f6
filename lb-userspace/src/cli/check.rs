//! `nohop check`: the system requirements, and how to fix what is missing.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{edge_check, nomad_check};
use crate::admin::{BindError, api, client, try_bind};
use crate::catalog::Handle;
use crate::config::{AdminAddress, Config, ConfigErrors, DnsConfig, Forward, SourceKind, cgroup};
use crate::counted::counted;
use crate::datapath::{
    Charge, Features, Limit, Safety, TcpTerminator, are_charged, exclusion_problems, find_obstacle,
    intercept_problems, is_bpffs, look_at_pins, nearest_directory, route,
};
use crate::dns;
use crate::durable::{self, ProcessOwner};

/// The whole report.
#[derive(Debug, Serialize, Deserialize)]
pub struct CheckReport {
    /// Whether every requirement is met.
    pub ok: bool,
    /// The requirements.
    pub checks: Vec<Finding>,
}

/// A requirement.
#[derive(Debug, Serialize, Deserialize)]
pub struct Finding {
    /// Its name.
    pub what: String,
    /// Whether it is met.
    pub ok: bool,
    /// Whether nohop can't run without it.
    pub required: bool,
    /// The finding.
    pub detail: String,
    /// The fix; empty if it is met.
    pub fix: String,
}

/// The finding, or the problem and its fix.
type CheckResult = Result<String, (String, String)>;

fn finding(what: &str, required: bool, found: CheckResult) -> Finding {
    let ok = found.is_ok();
    let (detail, fix) = match found {
        Ok(detail) => (detail, String::new()),
        Err(wrong) => wrong,
    };
    Finding { what: what.to_owned(), ok, required, detail, fix }
}

fn wrong<T>(detail: impl Into<String>, fix: impl Into<String>) -> Result<T, (String, String)> {
    Err((detail.into(), fix.into()))
}

/// Checks everything, whatever is missing.
pub fn check(config: Result<Config, ConfigErrors>, admin: Option<&str>) -> CheckReport {
    let mut checks = vec![finding(
        "configuration",
        true,
        match &config {
            Ok(_) => Ok("no problems".to_owned()),
            Err(ConfigErrors(errors)) => {
                let errors: Vec<String> = errors.iter().map(ToString::to_string).collect();
                wrong(
                    errors.join("; "),
                    "correct these; the other checks go by the defaults instead",
                )
            }
        },
    )];
    let config = config.unwrap_or_default();
    let daemon = daemon(admin);
    checks.push(finding("kernel", true, kernel()));
    checks.extend(features());
    checks.push(finding("cgroup v2", true, scope(&config)));
    checks.extend(namespace(&config).map(|found| finding("cgroup namespace", false, found)));
    for (is_required, found) in exclusions(&config) {
        checks.push(finding("excluded cgroups", is_required, found));
    }
    if config.dns.intercept.is_on() {
        checks.push(finding("dns.intercept", false, interception(&config)));
    }
    checks.push(finding("hooks", true, hooks(&config)));
    let containers = nomad_check::ContainerHost {
        root: "/".into(),
        dns: config.dns.listen.clone(),
        is_intercepted: config.dns.intercept.is_on(),
    };
    let found = nomad_check::networks(&containers).into_iter();
    checks.extend(found.map(|(what, found)| finding(&what, false, found)));
    let docker_host = super::process::environment("DOCKER_HOST");
    let docker = nomad_check::docker(docker_host.as_deref(), |parent| is_served(&config, parent));
    checks.extend(docker.map(|found| finding("Docker's cgroups", false, found)));
    checks.push(finding("routes", false, routes(&config)));
    let host = edge_check::EdgeHost::here(parse_release(&release()));
    let clients = edge_check::check_clients(
        &config,
        &host,
        daemon.as_ref().ok().map(|status| &status.datapath),
    );
    checks.extend(clients.map(|found| finding("addresses of clients", false, found)));
    if config.edge.is_on() {
        let running = daemon.as_ref().ok().and_then(|status| status.edge.as_ref());
        let found = edge_check::check(&config, &host, running);
        checks.extend(found.into_iter().map(|(what, required, it)| finding(&what, required, it)));
    }
    checks.push(finding("bpffs", true, bpffs(&config.bpffs)));
    checks.push(finding("mode of bpffs", false, bpffs_mode(&config.bpffs)));
    checks.push(finding("memory of maps", false, memory_of_maps(&config.bpffs, Charge::find())));
    let effective = effective_capabilities();
    checks.push(finding("capabilities", true, capabilities(missing_capabilities(effective))));
    let for_udp = capabilities(missing_for_udp(effective));
    checks.push(finding("capabilities to disconnect UDP sockets", false, for_udp));
    if config.balance.drain_deadline.is_some() {
        checks.push(finding("balance.drain_deadline", false, drain_deadline()));
    }
    checks.push(finding("state directory", true, state_dir(&config.state_dir)));
    checks.push(finding(
        "owner of the state directory",
        false,
        exposure(&config.state_dir, daemon.as_ref().ok()),
    ));
    for &address in &config.dns.listen {
        let try_bind = || dns::try_bind(address, &config.dns.listen);
        let found = dns_port(address, try_bind, daemon.as_ref().ok());
        checks.push(finding("DNS port", true, found));
    }
    for &address in &config.dns.listen_tls {
        let try_bind = || dns::try_bind_tls(address, &config.dns.listen_tls);
        let found = dns_port(address, try_bind, daemon.as_ref().ok());
        checks.push(finding("DNS over TLS port", true, found));
    }
    for address in &config.admin.listen {
        let AdminAddress::Tcp(address) = address else { continue };
        let try_bind = || try_bind(*address, &config.admin.listen);
        let (is_required, found) = admin_address(*address, try_bind, daemon.as_ref().ok());
        checks.push(finding("admin address", is_required, found));
    }
    checks.push(finding("other resolvers", false, resolvers(&config.dns)));
    if !config.dns.listen_tls.is_empty() {
        let found = match dns::tls_server_config(&config.dns) {
            Ok(_) => Ok("certificate and key belong together".to_owned()),
            Err(error) => in_two(&error.to_string()),
        };
        checks.push(finding("DNS over TLS certificate", true, found));
    }
    let mut facts = Vec::new();
    for kind in &config.catalog.sources {
        let SourceReport { found, warning, facts: of_source } = source(kind, &config);
        checks.push(finding(&format!("source {}", kind.name()), true, found));
        if let Some(warning) = warning {
            let fix = "it routes all the same; see the message".to_owned();
            let what = format!("source {} warning", kind.name());
            checks.push(finding(&what, false, Err((warning, fix))));
        }
        facts.extend(of_source.into_iter().map(|fact| (kind.name(), fact)));
    }
    checks.push(finding("names in the kernel", false, kernel_names(daemon.as_ref().ok())));
    let through = through_resolver(admin, daemon.as_ref().ok());
    checks.push(finding("lookups of this machine", false, through));
    for found in super::dns::resolver_findings(Path::new("/"), &config) {
        checks.push(finding("resolv.conf", false, Err(found)));
    }
    for (name, fact) in facts {
        let fix = "nothing, where that is meant".to_owned();
        checks.push(finding(&format!("source {name} fact"), false, Err((fact, fix))));
    }
    checks.push(finding(
        "daemon",
        false,
        match daemon {
            Ok(status) if status.ready => Ok(format!("ready (pid {})", status.pid)),
            Ok(status) => wrong(status.problems.join("; "), "see nohop status"),
            Err(error) => wrong(error, "start it: nohop run"),
        },
    ));
    CheckReport { ok: checks.iter().all(|check| check.ok || !check.required), checks }
}

/// The report for people.
pub fn text(report: &CheckReport) -> String {
    let mut text = String::new();
    for Finding { what, ok, required, detail, fix } in &report.checks {
        let mark = match (ok, required) {
            (true, _) => "ok  ",
            (false, true) => "FAIL",
            (false, false) => "note",
        };
        // Writing to a string can't fail.
        let _ = writeln!(text, "{mark}  {what}: {detail}");
        if !fix.is_empty() {
            let _ = writeln!(text, "        fix: {fix}");
        }
    }
    let verdict = if report.ok { "nohop can run here" } else { "nohop can't run here yet" };
    text + "\n" + verdict + "\n"
}

fn daemon(admin: Option<&str>) -> Result<api::Status, String> {
    let address =
        client::find(admin, &super::process::environment).map_err(|error| error.to_string())?;
    block_on(client::get(&address, "/v1/status"))
        .and_then(|result| result.map_err(|error| error.to_string()))
}

fn block_on<F: Future>(future: F) -> Result<F::Output, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    Ok(runtime.map_err(|error| format!("can't start the runtime: {error}"))?.block_on(future))
}

fn kernel() -> CheckResult {
    kernel_at_least(5, 10)
}

fn kernel_at_least(major: u32, minor: u32) -> CheckResult {
    let release = release();
    match parse_release(&release) {
        Some(version) if version >= (major, minor) => Ok(release),
        _ => wrong(
            format!("{release} is older than {major}.{minor}"),
            format!("boot a kernel from {major}.{minor} on"),
        ),
    }
}

/// The features of the verifier, probed as the daemon does.
fn features() -> Vec<Finding> {
    match Features::probe() {
        Ok(Features { limits, .. }) => found_features(&limits),
        Err(error) => {
            let text = error.to_string();
            let (detail, fix) = text.split_once("; ").unwrap_or((&text, ""));
            vec![finding("eBPF programs", true, wrong(detail, fix))]
        }
    }
}

fn found_features(limits: &[Limit]) -> Vec<Finding> {
    let found = |is_about: fn(&Limit) -> bool, is_there: &str| match limits
        .iter()
        .find(|limit| is_about(limit))
    {
        None => Ok(is_there.to_owned()),
        Some(limit) => wrong(limit.to_string(), limit.fix()),
    };
    let refusal = found(|limit| matches!(limit, Limit::PortZero), "by bpf_set_retval");
    let is_btf = |limit: &Limit| matches!(limit, Limit::NoBtf(_) | Limit::NoKernelBit);
    let btf = found(is_btf, "/sys/kernel/btf/vmlinux");
    let read = found(|limit| matches!(limit, Limit::NoKernelRead(_)), "allowed");
    vec![
        finding("eBPF programs", true, Ok("the verifier takes them".to_owned())),
        finding("refusal by ECONNREFUSED", false, refusal),
        finding("BTF", false, btf),
        finding("reading the kernel's memory", false, read),
    ]
}

/// Whether another program holds the cgroup's hooks exclusively.
fn hooks(config: &Config) -> CheckResult {
    let Some(scope) = config.cgroup.clone().or_else(cgroup::find_cgroup2_root) else {
        return Ok("not checked: there is no cgroup v2".to_owned());
    };
    match find_obstacle(&scope, &config.bpffs) {
        Ok(None) => Ok(format!("nothing holds those of {} exclusively", scope.display())),
        Ok(Some(obstacle)) => wrong(obstacle.to_string(), obstacle.fix()),
        // That is reported elsewhere.
        Err(error) => Ok(format!("not checked: {error}")),
    }
}

/// Whether a foreign route makes VIPs reachable where no hook runs.
fn routes(config: &Config) -> CheckResult {
    let pools: Vec<_> = config.vip.pools().collect();
    let mut holes = Vec::new();
    for &pool in &pools {
        match block_on(route::holes(pool)) {
            Ok(Ok(found)) => holes.extend(found),
            Ok(Err(error)) => return Ok(format!("not checked: {error}")),
            Err(error) => return Ok(format!("not checked: {error}")),
        }
    }
    let Some(hole) = holes.first() else {
        let pools: Vec<_> = pools.iter().map(ToString::to_string).collect();
        return Ok(format!("none but ours leads to {}", pools.join(", ")));
    };
    let (detail, fix) = hole.split_once("; ").unwrap_or((hole, ""));
    wrong(detail, fix)
}

fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn scope(config: &Config) -> CheckResult {
    let scope = match &config.cgroup {
        Some(scope) => Ok(scope.clone()),
        None => cgroup::default_scope(),
    };
    let found = scope.and_then(|scope| Ok((cgroup::inspect(&scope)?, scope)));
    let (_, scope) = match found {
        Ok(found) => found,
        Err(error) => return in_two(&error.to_string()),
    };
    let whose = match config.cgroup {
        Some(_) => "processes in it and below it are served",
        None => "every process is served",
    };
    let others: Vec<String> = cgroup::mounts()
        .into_iter()
        .filter(|mount| mount.point != scope)
        .map(|mount| format!("{} (from {})", mount.point.display(), mount.root.display()))
        .collect();
    let also = match others.is_empty() {
        true => String::new(),
        false => format!("; cgroup v2 is mounted also at {}", others.join(", ")),
    };
    Ok(format!("{}: {whose}{also}", scope.display()))
}

/// The cgroup namespace, in which nohop may see a part of the hierarchy only.
fn namespace(config: &Config) -> Option<CheckResult> {
    let note = cgroup::inspect(config.cgroup.as_deref()?).ok()??;
    Some(in_two(&note))
}

/// The problem and, after a semicolon, the fix.
fn in_two(text: &str) -> CheckResult {
    let (detail, fix) = text.split_once("; ").unwrap_or((text, ""));
    wrong(detail, fix)
}

/// The cgroups that are bypassed.
fn exclusions(config: &Config) -> Vec<(bool, CheckResult)> {
    let patterns = &config.datapath.exclude_cgroups;
    if patterns.is_empty() {
        return Vec::new();
    }
    if let Err(error) = cgroup::check_exclusions(patterns) {
        return vec![(true, in_two(&error.to_string()))];
    }
    let problems = exclusion_problems(patterns);
    if problems.is_empty() {
        return vec![(false, Ok("each pattern matches a cgroup".to_owned()))];
    }
    problems.iter().map(|problem| (false, in_two(problem))).collect()
}

/// The processes whose DNS queries are intercepted.
fn interception(config: &Config) -> CheckResult {
    let problems = intercept_problems(&config.dns.intercept, &dns::reached_at(&config.dns.listen));
    match problems.first() {
        Some(problem) => in_two(problem),
        None => Ok("port 53 of these cgroups goes to nohop, from containers as well".to_owned()),
    }
}

/// Whether processes below this directory of the hierarchy's root are in the cgroup that is served.
fn is_served(config: &Config, directory: &str) -> bool {
    let Some(scope) = &config.cgroup else { return true };
    cgroup::find_cgroup2_root().is_none_or(|root| root.join(directory).starts_with(scope))
}

fn bpffs(dir: &Path) -> CheckResult {
    let conventional = Path::new("/sys/fs/bpf");
    if is_bpffs(nearest_directory(dir)) {
        return match look_at_pins(dir) {
            Ok(_) => Ok(dir.display().to_string()),
            Err(error) => {
                let text = error.to_string();
                let (detail, fix) = text.split_once("; ").unwrap_or((&text, ""));
                wrong(detail, fix)
            }
        };
    }
    if dir.starts_with(conventional) && conventional.is_dir() {
        return Ok(format!("{}: `nohop run` mounts it", conventional.display()));
    }
    wrong(
        format!("{} isn't on a BPF file system", dir.display()),
        "mount -t bpf -o mode=0700 bpf /sys/fs/bpf, or name a directory of one with --bpffs",
    )
}

/// Others could take the place of the pins first, where they may write to the file system's root.
fn bpffs_mode(dir: &Path) -> CheckResult {
    match look_at_pins(dir) {
        Ok(Safety::OpenMount(root)) => {
            let root = root.display();
            wrong(
                format!("others may write to {root}, and could take the place of the pins"),
                format!("chmod 700 {root}, and mount it with -o mode=0700"),
            )
        }
        Ok(Safety::Safe) => Ok("closed to others".to_owned()),
        // It is reported above.
        Err(_) => Ok("not checked".to_owned()),
    }
}

/// The memory cgroup that maps and socket storage are charged to.
fn memory_of_maps(bpffs: &Path, charge: Charge) -> CheckResult {
    if are_charged(bpffs) {
        let limit = Limit::Charged("an earlier start created them".to_owned());
        return wrong(limit.to_string(), limit.fix());
    }
    match charge {
        Charge::None => Ok("charged to no memory cgroup".to_owned()),
        Charge::Avoidable(root) => Ok(format!(
            "charged to no memory cgroup: they are created from the root, {}",
            root.display()
        )),
        Charge::Own(reason) => {
            let limit = Limit::Charged(reason);
            wrong(limit.to_string(), limit.fix())
        }
    }
}

/// From linux/capability.h. CAP_SYS_ADMIN stands for CAP_BPF and CAP_PERFMON.
const CAP_DAC_READ_SEARCH: u32 = 2;
const CAP_NET_BIND_SERVICE: u32 = 10;
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_PTRACE: u32 = 19;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;

fn effective_capabilities() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or_default()
}

fn capabilities(missing: Vec<&str>) -> CheckResult {
    match missing.is_empty() {
        true => Ok("all that are needed".to_owned()),
        false => wrong(
            format!("missing {}", missing.join(", ")),
            "run as root, or give the service these (CapabilityBoundingSet=, and AmbientCapabilities= with User=)",
        ),
    }
}

fn missing_capabilities(effective: u64) -> Vec<&'static str> {
    let has = |capability: u32| effective & (1 << capability) != 0;
    named(&[
        ("CAP_NET_BIND_SERVICE", has(CAP_NET_BIND_SERVICE)),
        ("CAP_NET_ADMIN", has(CAP_NET_ADMIN)),
        ("CAP_PERFMON", has(CAP_PERFMON) || has(CAP_SYS_ADMIN)),
        ("CAP_BPF", has(CAP_BPF) || has(CAP_SYS_ADMIN)),
    ])
}

/// The further requirements of disconnecting UDP sockets of removed backends.
fn missing_for_udp(effective: u64) -> Vec<&'static str> {
    let has = |capability: u32| effective & (1 << capability) != 0;
    named(&[
        ("CAP_SYS_ADMIN", has(CAP_SYS_ADMIN)),
        ("CAP_SYS_PTRACE", has(CAP_SYS_PTRACE)),
        // For /proc/[pid]/fd of other users' processes.
        ("CAP_DAC_READ_SEARCH", has(CAP_DAC_READ_SEARCH)),
    ])
}

/// Whether connections to backends that left can be closed.
fn drain_deadline() -> CheckResult {
    match TcpTerminator::problem() {
        None => Ok("connections to backends that left can be closed".to_owned()),
        Some(problem) => wrong(
            problem,
            "run as root, or give the service CAP_SYS_ADMIN, CAP_SYS_PTRACE, CAP_NET_ADMIN and CAP_BPF; or \
             set no balance.drain_deadline",
        ),
    }
}

/// Those of the capabilities that aren't there.
fn named(capabilities: &[(&'static str, bool)]) -> Vec<&'static str> {
    capabilities.iter().filter_map(|&(name, has)| (!has).then_some(name)).collect()
}

fn state_dir(path: &Path) -> CheckResult {
    // The daemon creates a missing directory, so its nearest ancestor is checked.
    let existing = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    // A link that leads nowhere is in the way as well.
    let in_the_way = path.ancestors().find(|path| path.symlink_metadata().is_ok());
    if let Some(it) = in_the_way.filter(|path| !path.is_dir()) {
        return wrong(
            format!("{} isn't a directory", it.display()),
            "move it away, or name another with --state-dir",
        );
    }
    match rustix::fs::access(existing, rustix::fs::Access::WRITE_OK) {
        Ok(()) => Ok(path.display().to_string()),
        Err(errno) => wrong(
            format!("can't write to {}: {errno}", existing.display()),
            "run as root, or name another with --state-dir",
        ),
    }
}

/// Others could change where services lead, where they may write to the state directory.
fn exposure(path: &Path, daemon: Option<&api::Status>) -> CheckResult {
    let owner = daemon.and_then(|status| ProcessOwner::of(status.pid));
    match durable::exposure(path, owner.unwrap_or_else(ProcessOwner::own)) {
        None => Ok("closed to others".to_owned()),
        Some(problem) => in_two(&problem),
    }
}

fn dns_port(
    address: SocketAddr,
    try_bind: impl Fn() -> Result<(), dns::DnsError>,
    daemon: Option<&api::Status>,
) -> CheckResult {
    let is_held =
        |dns: &api::DnsStatus| dns.listen.contains(&address) || dns.listen_tls.contains(&address);
    if daemon.is_some_and(|status| is_held(&status.dns)) {
        return Ok(format!("{address} is held by the running daemon"));
    }
    let Err(error) = try_bind() else {
        return Ok(format!("{address} is free"));
    };
    let unit = socket_unit();
    if error.is_in_use() && unit_holds(address, &unit) {
        return Ok(format!("{address} is held by nohop.socket, for the daemon"));
    }
    // The problem, then the fix.
    let text = error.to_string();
    let (detail, fix) = text.split_once("; ").unwrap_or((&text, ""));
    wrong(detail, fix)
}

/// Whether a TCP address of the admin interface can be listened on, and whether the daemon doesn't start
/// otherwise.
fn admin_address(
    address: SocketAddr,
    try_bind: impl Fn() -> Result<(), (BindError, bool)>,
    daemon: Option<&api::Status>,
) -> (bool, CheckResult) {
    match (try_bind(), daemon) {
        (Ok(()), _) => (true, Ok(format!("{address} is free"))),
        (Err((error, is_fatal)), None) => (is_fatal, in_two(&error.to_string())),
        // It waits for the address, or holds it.
        (Err((error, _)), Some(status)) => {
            let text = error.to_string();
            match error.is_in_use() && !status.problems.contains(&text) {
                true => (true, Ok(format!("{address} is held by the running daemon"))),
                false => (false, in_two(&text)),
            }
        }
    }
}

/// nohop.socket as systemd reports it; nothing if there is none.
fn socket_unit() -> String {
    let words = ["show", "--property=ActiveState,Listen", "nohop.socket"];
    let output = std::process::Command::new("systemctl").args(words).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
}

fn unit_holds(address: SocketAddr, unit: &str) -> bool {
    let says = |wanted: &str| unit.lines().any(|line| line == wanted);
    let listens = says(&format!("Listen={address} (Datagram)"));
    listens && (says("ActiveState=active") || says("ActiveState=activating"))
}

/// How long the machine's resolver may take: as long as glibc waits for its first nameserver.
const LOOKUP_LIMIT: std::time::Duration = std::time::Duration::from_secs(5);

/// Whether the kernel answers names, as a running daemon has found.
fn kernel_names(daemon: Option<&api::Status>) -> CheckResult {
    let units = daemon.map(|status| status.datapath.units.as_slice()).unwrap_or_default();
    let Some(unit) = units.iter().find(|unit| unit.name == "names") else {
        return Ok("not known: no daemon runs".to_owned());
    };
    match &unit.reason {
        None => Ok("answered, also while no daemon runs".to_owned()),
        Some(reason) if ["off", "waiting"].contains(&unit.state.as_str()) => {
            Ok(format!("{}: {reason}", unit.state))
        }
        Some(reason) => wrong(
            reason,
            "fix what the message names; until then these queries need a running daemon",
        ),
    }
}

/// Looks a service up as every program does, through getaddrinfo() and the machine's resolver, and
/// compares the answer with the service's VIP, which only the daemon has.
fn through_resolver(admin: Option<&str>, daemon: Option<&api::Status>) -> CheckResult {
    let Some(status) = daemon.filter(|status| status.ready) else {
        return Ok("not tried: no daemon is ready to answer".to_owned());
    };
    let services = client::find(admin, &super::process::environment)
        .map_err(|error| error.to_string())
        .and_then(|address| {
            block_on(client::get::<Vec<api::ServiceStatus>>(&address, "/v1/services"))
        })
        .and_then(|result| result.map_err(|error| error.to_string()));
    let Some(service) = services.ok().and_then(|services| services.into_iter().next()) else {
        return Ok("not tried: there is no service to look up yet".to_owned());
    };
    let name = format!("{}.{}", service.name, status.dns.domain);
    let (sender, receiver) = std::sync::mpsc::channel();
    let asked = (name.clone(), 80);
    // getaddrinfo() knows no limit of time but the resolver's own.
    std::thread::spawn(move || {
        let found = std::net::ToSocketAddrs::to_socket_addrs(&asked);
        let _ = sender.send(found.map(|found| found.map(|each| each.ip()).collect::<Vec<_>>()));
    });
    let fix = "point the machine's resolver at nohop: nohop dns setup says how";
    match receiver.recv_timeout(LOOKUP_LIMIT) {
        Ok(Ok(found)) if found.contains(&service.vip.into()) => {
            Ok(format!("{name} is {}, through the machine's own resolver", service.vip))
        }
        Ok(Ok(found)) => {
            let found: Vec<_> = found.iter().map(ToString::to_string).collect();
            let found = found.join(", ");
            wrong(format!("{name} is {found} here, and not its VIP {}", service.vip), fix)
        }
        Ok(Err(error)) => {
            wrong(format!("the machine's resolver doesn't know {name}: {error}"), fix)
        }
        Err(_) => wrong(format!("the machine's resolver gives no answer for {name} in 5 s"), fix),
    }
}

/// Whether names outside the zone can be forwarded.
fn resolvers(config: &DnsConfig) -> CheckResult {
    let problems = dns::upstream_problems(config);
    match problems.first() {
        Some(problem) => in_two(problem),
        None if config.forward == Forward::Servers(Vec::new()) => {
            Ok("dns.forward is empty: other names are refused".to_owned())
        }
        None => Ok("there is a resolver to forward to".to_owned()),
    }
}

/// How long a source may take to report all its services.
const SOURCE_LIMIT: std::time::Duration = std::time::Duration::from_secs(5);

/// What a source reports.
struct SourceReport {
    found: CheckResult,
    /// A problem that keeps nothing from working.
    warning: Option<String>,
    facts: Vec<String>,
}

/// Runs one source as the daemon does, so that the check meets what the daemon would meet.
fn source(kind: &SourceKind, config: &Config) -> SourceReport {
    let fix = match kind {
        SourceKind::Consul => "check that the agent runs, consul.address and the token",
        SourceKind::File(_) => "correct the file",
    };
    let asked = block_on(async {
        let mut source = Handle::dry_run(kind, config).map_err(|error| error.to_string())?;
        let answered = async {
            tokio::select! {
                _ = source.catalog.wait_for(Option::is_some) => {}
                _ = source.health.wait_for(|health| health.is_failing) => {}
            }
        };
        // A timeout is reported below.
        let _ = tokio::time::timeout(SOURCE_LIMIT, answered).await;
        let n_services = source.catalog.borrow().as_ref().map(|e| e.catalog.len());
        let health = source.health.borrow().clone();
        Ok((n_services, health.problem, health.facts))
    });
    let wrong =
        |detail| SourceReport { found: wrong(detail, fix), warning: None, facts: Vec::new() };
    match asked.flatten() {
        Ok((Some(n_services), warning, facts)) => {
            let found = Ok(counted(n_services, "service") + " to route");
            SourceReport { found, warning, facts }
        }
        Ok((None, Some(problem), _)) => wrong(problem),
        Ok((None, None, _)) => wrong("no answer within 5 s".to_owned()),
        Err(error) => wrong(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_lacks_is_named_with_its_fix() {
        let lockdown = Limit::NoKernelRead(Some("confidentiality".to_owned()));
        let findings = found_features(&[Limit::PortZero, lockdown]);
        let text = text(&CheckReport { ok: true, checks: findings });
        for part in [
            "note  refusal by ECONNREFUSED: this kernel has no bpf_set_retval",
            "fix: boot a kernel from 6.1 on",
            "ok    BTF: ",
            "note  reading the kernel's memory: the kernel is locked down (lockdown=confidentiality)",
            "fix: nothing, unless the kernel itself (NFS",
        ] {
            assert!(text.contains(part), "no {part:?} in:\n{text}");
        }
    }

    #[test]
    fn releases() {
        assert_eq!(parse_release("6.18.44-fc"), Some((6, 18)));
        assert_eq!(parse_release("5.10.0-28-cloud-amd64"), Some((5, 10)));
        assert_eq!(parse_release("strange"), None);
    }

    #[test]
    fn capabilities_are_named() {
        assert!(missing_capabilities(u64::MAX).is_empty());
        let admin = 1 << CAP_SYS_ADMIN | 1 << CAP_NET_ADMIN;
        assert_eq!(missing_capabilities(admin), ["CAP_NET_BIND_SERVICE"]);
        assert_eq!(missing_capabilities(0).len(), 4);
        assert_eq!(missing_for_udp(admin), ["CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH"]);
        assert!(missing_for_udp(u64::MAX).is_empty());
    }

    /// The unit grants what the check requires.
    #[test]
    fn the_unit_has_every_capability() {
        let unit = include_str!("../../../contrib/systemd/nohop.service");
        let given = |key| {
            let line = unit.lines().find_map(|line| line.strip_prefix(key)).unwrap();
            line.split(' ').collect::<Vec<_>>()
        };
        let bounding = given("CapabilityBoundingSet=");
        for name in missing_capabilities(0).into_iter().chain(missing_for_udp(0)) {
            assert!(bounding.contains(&name), "{name} isn't among {bounding:?}");
        }
    }

    #[test]
    fn ports() {
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let taken = udp.local_addr().unwrap();
        let (detail, fix) = dns_port(taken, || dns::try_bind(taken, &[taken]), None).unwrap_err();
        assert_eq!(detail, format!("can't listen on {taken} (udp): address in use"));
        assert!(fix.starts_with("see who holds it with ss -ulpn"), "{fix}");
        // Of documentation (RFC 5737): one that isn't there yet.
        let absent = SocketAddr::from(([192, 0, 2, 1], 0));
        assert_eq!(
            dns_port(absent, || dns::try_bind(absent, &[absent]), None),
            Ok("192.0.2.1:0 is free".to_owned())
        );
        // One of the admin interface is waited for, and no lookup depends on it.
        let (is_required, found) = admin_address(absent, || try_bind(absent, &[]), None);
        let (detail, _) = found.unwrap_err();
        assert!(
            !is_required && detail.ends_with("no interface of this host has 192.0.2.1"),
            "{detail}"
        );
    }

    #[test]
    fn what_the_socket_unit_holds() {
        let lines = "Listen=127.0.0.1:53 (Datagram)\nListen=127.0.0.1:53 (Stream)\n";
        let v6 = "Listen=[::1]:53 (Datagram)\nListen=[::1]:53 (Stream)\nActiveState=active\n";
        let table = [
            (format!("{lines}ActiveState=active\n"), "127.0.0.1:53", true),
            (format!("{lines}ActiveState=active\n"), "127.0.0.1:5354", false),
            (format!("{lines}ActiveState=failed\n"), "127.0.0.1:53", false),
            ("ActiveState=inactive\n".to_owned(), "127.0.0.1:53", false),
            (v6.to_owned(), "[::1]:53", true),
            (String::new(), "127.0.0.1:53", false),
        ];
        for (unit, address, expected) in table {
            assert_eq!(unit_holds(address.parse().unwrap(), &unit), expected, "{unit}");
        }
    }

    #[test]
    fn maps_that_an_earlier_start_has_charged_are_reported() {
        let bpffs = tempfile::tempdir().unwrap();
        assert!(memory_of_maps(bpffs.path(), Charge::None).is_ok());
        std::fs::create_dir_all(bpffs.path().join("sockets/charged")).unwrap();
        let (detail, fix) = memory_of_maps(bpffs.path(), Charge::None).unwrap_err();
        assert!(detail.contains("an earlier start"), "{detail}");
        assert!(fix.contains("nohop unload"), "{fix}");
    }

    #[test]
    fn what_is_in_the_place_of_the_state_directory_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        std::fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink(dir.path().join("nowhere"), &link).unwrap();
        for path in [&file, &link, &file.join("below")] {
            let (detail, fix) = state_dir(path).unwrap_err();
            assert!(
                detail.ends_with(" isn't a directory") && fix.contains("--state-dir"),
                "{detail}"
            );
        }
        assert!(state_dir(&dir.path().join("new/state")).is_ok());
    }

    #[test]
    fn a_required_failure_is_shown_with_its_fix() {
        let found = wrong("it is gone", "bring it back");
        let checks = vec![finding("thing", true, found), finding("other", false, Ok("yes".into()))];
        let text = text(&CheckReport { ok: false, checks });
        assert!(text.contains("FAIL  thing: it is gone\n        fix: bring it back\n"), "{text}");
        assert!(text.contains("ok    other: yes\n") && text.contains("can't run"), "{text}");
    }
}
