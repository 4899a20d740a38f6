//! The time that tables take to reach the kernel, by how much of them changed.

#[path = "../kernel/bed.rs"]
#[expect(dead_code, clippy::unwrap_used, reason = "the kernel tests' bed, of which they use more")]
mod bed;

use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::Instant;

use bed::{Place, service};
use lb_userspace::plane::Plane;
use lb_userspace::table::{Ports, Service, Table};

const N_BACKENDS: u8 = 10;
const N_ROUNDS: usize = 9;

fn main() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("can't run: it loads eBPF programs, which needs root");
        std::process::exit(1);
    }
    println!("services of {N_BACKENDS} backends each; median of {N_ROUNDS} rounds\n");
    println!("{:>8} {:>8}  {:>28}", "services", "changed", "all backends are others, ms");
    for (n_services, n_changed) in
        [(10, 1), (1_000, 1), (10_000, 1), (1_000, 1_000), (10_000, 1_000), (10_000, 10_000)]
    {
        let ms = measure(n_services, n_changed, web);
        println!("{n_services:>8} {n_changed:>8}  {ms:>28.2}");
    }
    let ms = measure(10_000, 1_000, |n, round| Service {
        ports: Ports::only([1_000 + u16::from(round)]),
        ..web(n, 0)
    });
    println!("\n1000 of 10000 services change their ports: {ms:.2} ms");
}

/// Service `n` with backends that only this round has.
fn web(n: u32, round: u8) -> Service {
    let [_, b, c, d] = n.to_be_bytes();
    let backend = |x| (SocketAddrV4::new(Ipv4Addr::new(10, b ^ c, d, x), 80 + u16::from(round)), 1);
    let vip = Ipv4Addr::from(u32::from(bed::VIP) + n);
    service(&format!("web-{n}"), vip, &(0..N_BACKENDS).map(backend).collect::<Vec<_>>())
}

/// The median of the milliseconds for which `Plane::apply` works on such a change.
fn measure(n_services: u32, n_changed: u32, changed: impl Fn(u32, u8) -> Service) -> f64 {
    let place = Place::new();
    let mut plane = place.start();
    let mut last = bed::table((0..n_services).map(|n| web(n, 0)).collect());
    apply(&mut plane, &last);
    let mut times: Vec<f64> = (1..=N_ROUNDS as u8)
        .map(|round| {
            for n in 0..n_changed {
                let next = changed(n, round);
                last.services.insert(next.name.clone(), Arc::new(next));
            }
            last.generation += 1;
            let begin = Instant::now();
            apply(&mut plane, &last);
            begin.elapsed().as_secs_f64() * 1_000.0
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[N_ROUNDS / 2]
}

fn apply(plane: &mut Plane, table: &Table) {
    let errors = plane.apply(table).expect("the hooks are switched");
    assert!(errors.is_empty(), "{errors:?}");
}
