//! The cost of the page: ten viewers of 10,000 services, of which some hundred get connections each
//! second, beside none. Limits of time are those of a release build: NOHOP_BINARY names one,
//! and `cargo xtask test --full` that of the packages.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use testbed::nohop::Nohop;

use crate::cluster::{Catalog, Nodes};
use crate::page;

const ADDRESS: &str = "127.0.0.1:9153";
const N_VIEWERS: usize = 10;
const N_SERVICES: usize = 10_000;
const PERIOD: Duration = Duration::from_secs(20);

/// The greatest part of a processor, and of memory in kB, that viewers may take.
const MAX_SHARE: f64 = 0.03;
const MAX_KB: u64 = 20_000;

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let helloworld = nodes.helloworld("helloworld")?;
    let catalog = Catalog::new(&[])?;
    catalog.write(&page::services(&[helloworld.address], N_SERVICES)?)?;
    let config = catalog.config() + page::LISTEN;
    let binary = std::env::var_os("NOHOP_BINARY");
    let nohop = match &binary {
        Some(binary) => {
            Nohop::start_binary(Path::new(binary), &nodes.client, &nodes.cgroup, &config)?
        }
        None => nodes.nohop(&config)?,
    };
    let services = nohop.services()?;
    let services = services.as_array().context("a list")?;
    let vips: Vec<_> = services.iter().filter_map(|it| it["vip"].as_str()).step_by(20).collect();

    let idle = share(&nodes, &nohop, &vips)?;
    let before = memory_kb(&nohop)?;
    let (is_over, n_bytes) = (AtomicBool::new(false), AtomicU64::new(0));
    let watched = thread::scope(|scope| {
        let viewers: Vec<_> = (0..N_VIEWERS)
            .map(|_| scope.spawn(|| nodes.client.enter(|| view(&is_over, &n_bytes))))
            .collect();
        let watched = share(&nodes, &nohop, &vips);
        let memory = memory_kb(&nohop);
        is_over.store(true, Ordering::Relaxed);
        for viewer in viewers {
            viewer.join().map_err(|_| anyhow::anyhow!("a viewer panicked"))??;
        }
        Ok::<_, anyhow::Error>((watched?, memory?))
    });
    let (watched, memory) = watched?;
    let (more, kb) = (watched - idle, memory.saturating_sub(before));
    let n_bytes = n_bytes.load(Ordering::Relaxed);
    eprintln!(
        "{N_VIEWERS} viewers of {} services: {:.2}% of a processor beside {:.2}% without, {kb} kB of \
         memory beside {before}, {} kB/s to each",
        services.len(),
        more * 1e2,
        idle * 1e2,
        n_bytes / 1000 / PERIOD.as_secs() / N_VIEWERS as u64,
    );
    ensure!(kb < MAX_KB, "viewers take {kb} kB");
    ensure!(binary.is_none() || more < MAX_SHARE, "viewers take {:.2}% of a processor", more * 1e2);
    Ok(())
}

/// Reads the stream until it is over.
fn view(is_over: &AtomicBool, n_bytes: &AtomicU64) -> Result<()> {
    let mut stream = TcpStream::connect(ADDRESS)?;
    write!(stream, "GET /v1/stream HTTP/1.1\r\nHost: {ADDRESS}\r\n\r\n")?;
    let mut buffer = vec![0; 1 << 20];
    while !is_over.load(Ordering::Relaxed) {
        let n = stream.read(&mut buffer)?;
        ensure!(n > 0, "the stream has ended");
        n_bytes.fetch_add(n as u64, Ordering::Relaxed);
    }
    Ok(())
}

/// The part of a processor that the daemon takes while there are connections to these VIPs.
fn share(nodes: &Nodes, nohop: &Nohop, vips: &[&str]) -> Result<f64> {
    let (start, before) = (Instant::now(), ticks(nohop)?);
    while start.elapsed() < PERIOD {
        let connect = "for vip in \"$@\"; do exec 3<>/dev/tcp/$vip/80; sleep 0.01; done";
        let mut command = nodes.inside().command("bash");
        command.args(["-c", connect, "bash"]).args(vips);
        testbed::cmd::stdout(command)?;
    }
    let n_ticks = ticks(nohop)? - before;
    Ok(n_ticks as f64 / 100.0 / start.elapsed().as_secs_f64())
}

/// The processor time of the daemon, in hundredths of a second (USER_HZ).
fn ticks(nohop: &Nohop) -> Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", nohop.process.pid().as_raw_nonzero()))?;
    // After the name, which may contain anything: fields 14 and 15 of proc(5).
    let fields = stat.rsplit(')').next().context("a name")?.split_whitespace();
    let times = fields.skip(11).take(2).map(|field| Ok(field.parse::<u64>()?));
    times.sum()
}

/// The memory that is the daemon's own, in kB.
fn memory_kb(nohop: &Nohop) -> Result<u64> {
    let path = format!("/proc/{}/status", nohop.process.pid().as_raw_nonzero());
    let status = fs::read_to_string(path)?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("RssAnon")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
