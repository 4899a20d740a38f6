//! The price of one dial: the connect program's mean cost by the kernel's BPF statistics, for a VIP
//! and for an address that is none, at several sizes of the table.

#[path = "../kernel/bed.rs"]
#[expect(dead_code, reason = "the kernel tests use the rest")]
mod bed;

use std::net::{Ipv4Addr, SocketAddrV4};

use bed::{Bed, Server, dial, service};
use lb_userspace::plane::Measuring;
use lb_userspace::table::Service;

fn main() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("can't run: it loads eBPF programs, which needs root");
        std::process::exit(1);
    }
    let quick = std::env::args().any(|argument| argument == "--quick");
    let (n_rounds, n_dials) = if quick { (5, 500) } else { (15, 2_000) };
    println!("connect() through nohop, {n_rounds} rounds of {n_dials} dials each, interleaved");
    println!("mean of the program's run time, the kernel's two clock readings included\n");
    println!("{:>8} {:>8}  {:>22}  {:>22}", "services", "backends", "a VIP, ns", "no VIP, ns");
    println!(
        "{:>8} {:>8}  {:>22}  {:>22}",
        "", "of each", "median (least-most)", "median (least-most)"
    );
    for (n_services, n_backends) in [(1, 3), (10, 10), (10_000, 10)] {
        let (hit, miss) = measure(n_services, n_backends, n_rounds, n_dials);
        println!("{n_services:>8} {n_backends:>8}  {:>22}  {:>22}", spread(hit), spread(miss));
    }
}

fn measure(
    n_services: u32,
    n_backends: usize,
    n_rounds: usize,
    n_dials: usize,
) -> (Vec<f64>, Vec<f64>) {
    let server = Server::start(b'a');
    // Every service has addresses of its own, but those that are dialled have to answer.
    let web = |service_idx: u32| -> Service {
        let backends: Vec<_> = (0..n_backends as u8)
            .map(|backend_idx| {
                let [_, b, c, d] = service_idx.to_be_bytes();
                let address = Ipv4Addr::new(10, b ^ c, d, backend_idx);
                if service_idx == 0 { server.address } else { SocketAddrV4::new(address, 8080) }
            })
            .zip(std::iter::repeat(1))
            .collect();
        let vip = Ipv4Addr::from(u32::from(bed::VIP) + service_idx);
        service(&format!("web-{service_idx}"), vip, &backends)
    };
    let mut bed = Bed::new();
    bed.apply((0..n_services).map(web).collect());
    let _measuring = Measuring::start().expect("the kernel counts run times");
    let cost_of = |address: (Ipv4Addr, u16)| {
        let before = bed.plane.connect_cost().expect("the kernel tells");
        for _ in 0..n_dials {
            dial(address).expect("the server answers");
        }
        bed.plane.connect_cost().expect("the kernel tells").mean_ns_since(before)
    };
    let plain = (Ipv4Addr::LOCALHOST, server.address.port());
    (0..n_rounds).map(|_| (cost_of((bed::VIP, 80)), cost_of(plain))).unzip()
}

fn spread(mut means: Vec<f64>) -> String {
    means.sort_by(f64::total_cmp);
    format!("{:.0} ({:.0}-{:.0})", means[means.len() / 2], means[0], means[means.len() - 1])
}
