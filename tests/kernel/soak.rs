//! The maps' room: what doesn't fit is refused service by service, and nothing leaks.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use lb_userspace::datapath::Datapath;
use lb_userspace::table::{Ports, Protocols, Service, Table};

use crate::fixture::{OTHER_VIP, Place, Server, VIP, connect, full_or_quarter, service, table};

/// Small maps are filled: each service that doesn't fit is reported, present ones keep serving, and
/// once there is room all are applied.
pub fn full_maps_refuse_by_service() {
    let (server, other) = (Server::start(b'a'), Server::start(b'b'));
    let mut place = Place::new();
    place.options.datapath.max_services = 2;
    place.options.datapath.max_backends = 8;
    let mut datapath = place.start();
    let far = |n: u16| (SocketAddr::from(([10, 0, 0, 1], n + 1)), 1);
    let web = service("web", VIP, &[(server.address, 1)]);
    let mut many = service("web", VIP, &(0..17).map(far).collect::<Vec<_>>());
    many.ports = Ports::only([80, 81]);
    let second = service("second", OTHER_VIP, &[(other.address, 1)]);
    let third = service("third", Ipv4Addr::new(127, 200, 0, 3), &[(server.address, 1)]);

    assert!(datapath.apply(&table(vec![web.clone()])).unwrap().is_empty());
    let errors = datapath.apply(&table(vec![many, second.clone(), third.clone()])).unwrap();
    let reported: Vec<_> = errors.iter().map(|(name, error)| format!("{name}: {error}")).collect();
    let [services, backends] = [
        "third: SERVICES is full (2 entries): raise datapath.max_services in the configuration and \
         restart",
        "web: BACKENDS is full (16 entries): raise datapath.max_backends in the configuration and \
         restart",
    ];
    assert_eq!(reported, [services, backends]);
    assert_eq!(connect((VIP, 80)).unwrap(), 'a', "the former state serves");
    assert_eq!(connect((OTHER_VIP, 80)).unwrap(), 'b', "the others are as they should be");
    connect((Ipv4Addr::new(127, 200, 0, 3), 80)).unwrap_err();
    let pressure: BTreeMap<_, _> = datapath.pressure().into_iter().collect();
    assert_eq!((pressure["SERVICES"].used, pressure["SERVICES"].capacity), (2, 2));

    assert!(datapath.apply(&table(vec![web, third])).unwrap().is_empty(), "one goes, one comes");
    assert_eq!(connect((VIP, 80)).unwrap(), 'a');
    assert_eq!(connect((Ipv4Addr::new(127, 200, 0, 3), 80)).unwrap(), 'a');
}

/// xorshift64*, Vigna 2016.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % end
    }
}

const SEED: u64 = 20_260_101;
const N_SERVICES: u64 = 200;

/// A random state of one of the services; now and then it isn't there at all.
fn random_service(random: &mut Random) -> (Arc<str>, Option<Service>) {
    let n = random.below(N_SERVICES) as u8;
    let name: Arc<str> = format!("s{n}").into();
    if random.below(5) == 0 {
        return (name, None);
    }
    let most = if random.below(20) == 0 { 100 } else { 6 };
    let n_backends = random.below(most) as u8;
    let first = random.below(100) as u8;
    let backend = |x: u8| (SocketAddr::from(([10, 0, n, first + x], 80)), u16::from(x) + 1);
    let backends: Vec<_> = (0..n_backends).map(backend).collect();
    let mut service = service(&name, Ipv4Addr::new(127, 200, 1, n), &backends);
    service.backends.iter_mut().step_by(3).for_each(|backend| {
        backend.host_only = n.is_multiple_of(2);
    });
    service.protocols = [Protocols::Tcp, Protocols::Both][random.below(2) as usize];
    service.ports =
        [Ports::only([80]), Ports::only([80, 443]), Ports::Any][random.below(3) as usize].clone();
    (name, Some(service))
}

/// The pinned map's values, in one piece, as the kernel has them.
fn dump(place: &Place, map: &str) -> String {
    let path = place.pin(&format!("v3/maps/{map}"));
    let dump = Command::new("bpftool").args(["-j", "map", "dump", "pinned"]).arg(path).output();
    let dump = dump.unwrap();
    assert!(dump.status.success(), "{}", String::from_utf8_lossy(&dump.stderr));
    String::from_utf8(dump.stdout).unwrap()
}

/// The maps hold what the table needs, and not an entry more.
fn check_exact(place: &Place, table: &Table) {
    let backends: usize = table.services.values().map(|service| service.backends.len()).sum();
    let shown = dump(place, "BACKENDS");
    let n_backends =
        shown.matches("\"generation\":").count() - shown.matches("\"generation\":0").count();
    // bpftool's JSON has each element twice: as bytes, and formatted.
    assert_eq!(n_backends, backends, "BACKENDS");
    let n_frontends = |service: &Service| {
        let n_ports = match &service.ports {
            Ports::Any => 1,
            Ports::Only(ports) => ports.len(),
        };
        n_ports * (usize::from(service.protocols.tcp()) + usize::from(service.protocols.udp()))
    };
    let frontends: usize = table.services.values().map(|service| n_frontends(service)).sum();
    assert_eq!(dump(place, "FRONTENDS").matches("\"host_only\":").count(), frontends, "FRONTENDS");
    let serving = table.services.values().filter(|service| !service.backends.is_empty()).count();
    // Each entry that serves has a region for all backends from the host.
    let shown = dump(place, "SERVICES");
    let is_serving =
        |entry: &&str| entry.split("\"n_slots\":").skip(1).any(|rest| !rest.starts_with('0'));
    let n_serving = shown.split("\"formatted\":").skip(1).filter(is_serving).count();
    assert_eq!(n_serving, serving, "SERVICES");
}

/// Random changes, a restart now and then; then the maps hold what the last table needs, and after
/// everything was removed nothing is in use.
pub fn a_soak_leaks_nothing() {
    let n_changes = full_or_quarter(100_000);
    println!("{n_changes} random changes, seed {SEED}");
    let mut random = Random(SEED);
    let mut place = Place::new();
    // Just enough room, so that entries are reused all the time.
    place.options.datapath.max_services = 256;
    place.options.datapath.max_backends = 4_096;
    let mut datapath = place.start();
    let mut table = Table::default();
    let begin = Instant::now();
    let mut n_done = 0;
    while n_done < n_changes {
        // Changes come in bursts, one table each.
        for _ in 0..=random.below(N_SERVICES) {
            n_done += 1;
            let (name, service) = random_service(&mut random);
            match service {
                Some(service) => drop(table.services.insert(name, Arc::new(service))),
                None => drop(table.services.remove(&name)),
            }
        }
        table.generation += 1;
        let errors = datapath.apply(&table).unwrap();
        assert!(errors.is_empty(), "change {n_done}: {errors:?}");
        if random.below(50) == 0 {
            drop(datapath);
            datapath = place.start();
            assert!(datapath.is_adopted());
        }
    }
    println!("{:.1} s", begin.elapsed().as_secs_f64());
    assert!(datapath.apply(&table).unwrap().is_empty());
    check_exact(&place, &table);
    is_empty_after_all(&mut datapath, &table);
}

fn is_empty_after_all(datapath: &mut Datapath, last: &Table) {
    datapath.fix();
    let used: BTreeMap<_, _> =
        datapath.pressure().into_iter().map(|(map, pressure)| (map, pressure.used)).collect();
    let n_backends: usize = last.services.values().map(|service| service.backends.len()).sum();
    assert_eq!(used["BACKENDS"] as usize, n_backends);
    assert_eq!(used["SERVICES"] as usize, last.services.len());
    assert!(datapath.apply(&table(Vec::new())).unwrap().is_empty());
    datapath.fix();
    for (map, pressure) in datapath.pressure() {
        assert_eq!(pressure.used, 0, "{map}");
    }
}
