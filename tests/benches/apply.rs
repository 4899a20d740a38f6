//! How long a table takes into the kernel's maps, and how much memory they have, at full size.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aya::maps::MapInfo;
use lb_tests::fixture::{self, Bed, service};
use lb_userspace::ordmap::OrdMap;
use lb_userspace::table::{Service, Table};

/// All that the default configuration has room for.
const N_SERVICES: u32 = 16_384;
const N_BACKENDS: u32 = 131_072 / N_SERVICES;
const N_CHANGED: u32 = 1_000;

fn main() -> ExitCode {
    if !rustix::process::geteuid().is_root() {
        eprintln!("can't run: it loads eBPF programs, which needs root");
        return ExitCode::FAILURE;
    }
    let n_rounds = if std::env::args().any(|argument| argument == "--quick") { 3 } else { 15 };
    let release = rustix::system::uname();
    println!("Linux {}, {n_rounds} rounds", release.release().to_string_lossy());

    let first = (0..n_rounds).map(|_| first_sync(10_000, 10)).collect();
    report("first sync of 10,000 services with 10 backends each", first, None);

    let mut bed = Bed::new();
    let mut services = OrdMap::new();
    services.extend((0..N_SERVICES).map(|idx| web(idx, N_BACKENDS, 0)));
    apply(&mut bed, &services);
    let mut changes = Vec::new();
    for round in 1..=n_rounds {
        // Spread over the whole table; each loses one backend and gets another.
        let changed = (0..N_CHANGED).map(|change| change * (N_SERVICES / N_CHANGED));
        services.extend(changed.map(|idx| web(idx, N_BACKENDS, round)));
        changes.push(apply(&mut bed, &services));
    }
    let goal = Some(Duration::from_millis(200));
    report("1,000 changed services of 16,384", changes, goal);
    report_memory(&bed);
    ExitCode::SUCCESS
}

fn walk(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .flat_map(|entry| match entry.path() {
            path if path.is_dir() => walk(&path),
            path => vec![path],
        })
        .collect()
}

fn first_sync(n_services: u32, n_backends: u32) -> Duration {
    let services = (0..n_services).map(|idx| web(idx, n_backends, 0)).collect();
    apply(&mut Bed::new(), &services)
}

fn apply(bed: &mut Bed, services: &OrdMap<Arc<str>, Arc<Service>>) -> Duration {
    let table = Table { generation: 1, services: services.clone(), ..Table::default() };
    let start = Instant::now();
    let errors = bed.datapath.apply(&table).expect("the kernel takes the table");
    let took = start.elapsed();
    assert!(errors.is_empty(), "{errors:?}");
    took
}

/// A service with backends of its own, one of which is another in each round.
fn web(service_idx: u32, n_backends: u32, round: u32) -> (Arc<str>, Arc<Service>) {
    let vip = Ipv4Addr::from(u32::from(fixture::VIP) + service_idx);
    let [_, b, c, d] = service_idx.to_be_bytes();
    let address = |backend_idx: u32| {
        let port = if backend_idx == 0 { 8_000 + round } else { 8_000 } as u16;
        SocketAddr::from(([10 + b, c, d, backend_idx as u8], port))
    };
    let backends: Vec<_> = (0..n_backends).map(address).zip(std::iter::repeat(1)).collect();
    let service = service(&format!("web-{service_idx}"), vip, &backends);
    (service.name.clone(), Arc::new(service))
}

fn report(what: &str, mut times: Vec<Duration>, goal: Option<Duration>) {
    times.sort();
    let [least, median, most] = [times[0], times[times.len() / 2], times[times.len() - 1]];
    println!("{what}: {median:.1?} ({least:.1?} to {most:.1?}){}", verdict(median, goal));
}

fn verdict<T: PartialOrd + std::fmt::Debug>(is: T, goal: Option<T>) -> String {
    let Some(goal) = goal else { return String::new() };
    let verdict = if is <= goal { "reached" } else { "NOT reached" };
    format!("; at most {goal:?}: {verdict}")
}

/// All maps of the datapath, by the kernel's fdinfo: those that this process has open, and the pinned
/// ones.
fn report_memory(bed: &Bed) {
    let pinned = walk(&bed.options.bpffs);
    let infos = pinned.iter().filter_map(|pin| MapInfo::from_pin(pin).ok());
    let _open: Vec<_> = infos.filter_map(|info| info.fd().ok()).collect();
    let mut maps = BTreeMap::new();
    for fd in std::fs::read_dir("/proc/self/fdinfo").expect("proc is mounted").flatten() {
        let Ok(info) = std::fs::read_to_string(fd.path()) else { continue };
        let field = |name: &str| -> Option<u64> {
            let line = info.lines().find(|line| line.starts_with(name))?;
            line.split_whitespace().nth(1)?.parse().ok()
        };
        if let (Some(id), Some(memory)) = (field("map_id:"), field("memlock:")) {
            maps.insert(id, memory);
        }
    }
    println!("kernel memory at {N_SERVICES} services and 131,072 backends (trust it from 6.4 on):");
    for (id, memory) in &maps {
        let info = MapInfo::from_id(*id as u32).ok();
        let name = info.as_ref().and_then(MapInfo::name_as_str).unwrap_or("?");
        println!("  {name:<16}{:>12.1} kB", *memory as f64 / 1e3);
    }
    let sum = maps.values().sum::<u64>() as f64 / 1e6;
    println!("  {:<16}{sum:>12.1} MB{}", "all", verdict(sum, Some(48.0)));
}
