//! The price of one dial: the connect program's mean cost by the kernel's BPF statistics, for a VIP
//! and for an address that is none, at several sizes of the table.

#[path = "../kernel/bed.rs"]
#[expect(dead_code, clippy::unwrap_used, reason = "the kernel tests' bed, of which they use more")]
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
    println!(
        "connect() through nohop: {n_rounds} rounds of {n_dials} dials each, interleaved; the"
    );
    println!(
        "program's mean run time in ns, two readings of the clock included: median (least-most)\n"
    );
    println!("{:>19}  {:^35}  {:^35}", "", "in a tight loop", "between two processes' work");
    println!(
        "{:>8} {:>10}  {:>17} {:>17}  {:>17} {:>17}",
        "services", "x backends", "a VIP", "no VIP", "a VIP", "no VIP"
    );
    for (n_services, n_backends) in [(2, 3), (10, 10), (10_000, 10)] {
        let [a, b, c, d] = measure(n_services, n_backends, n_rounds, n_dials).map(spread);
        println!("{n_services:>8} {n_backends:>10}  {a:>17} {b:>17}  {c:>17} {d:>17}");
    }
}

/// The means of each round. A dial that nobody answers comes back at once, so that all the program
/// touches stays in the caches; one that a server answers finds them as an application would.
fn measure(n_services: u32, n_backends: usize, n_rounds: usize, n_dials: usize) -> [Vec<f64>; 4] {
    let dead = bed::dead();
    let server = Server::start(b'a');
    // Every service has addresses of its own, but those that are dialled have to answer.
    let web = |service_idx: u32| -> Service {
        let backends: Vec<_> = (0..n_backends as u8)
            .map(|backend_idx| {
                let [_, b, c, d] = service_idx.to_be_bytes();
                let address = Ipv4Addr::new(10, b ^ c, d, backend_idx);
                match service_idx {
                    0 => server.address,
                    1 => dead,
                    _ => SocketAddrV4::new(address, 8080),
                }
            })
            .zip(std::iter::repeat(1))
            .collect();
        let vip = Ipv4Addr::from(u32::from(bed::VIP) + service_idx);
        service(&format!("web-{service_idx}"), vip, &backends)
    };
    let mut bed = Bed::new();
    bed.apply((0..n_services).map(web).collect());
    let _measuring = Measuring::start().expect("the kernel counts run times");
    let cost_of = |address: (Ipv4Addr, u16), answered: bool| {
        let before = bed.plane.cost("nohop_connect4").expect("the kernel tells");
        for _ in 0..n_dials {
            assert_eq!(dial(address).is_ok(), answered, "{address:?}");
        }
        bed.plane.cost("nohop_connect4").expect("the kernel tells").mean_ns_since(before)
    };
    let [answering_vip, dead_vip] = [0, 1].map(|idx| Ipv4Addr::from(u32::from(bed::VIP) + idx));
    let mut means: [Vec<f64>; 4] = Default::default();
    for _ in 0..n_rounds {
        means[0].push(cost_of((dead_vip, 80), false));
        means[1].push(cost_of((*dead.ip(), dead.port()), false));
        means[2].push(cost_of((answering_vip, 80), true));
        means[3].push(cost_of((*server.address.ip(), server.address.port()), true));
    }
    means
}

fn spread(mut means: Vec<f64>) -> String {
    means.sort_by(f64::total_cmp);
    format!("{:.0} ({:.0}-{:.0})", means[means.len() / 2], means[0], means[means.len() - 1])
}
