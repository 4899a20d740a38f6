//! The unit `names` while much changes: thousands of names, more than its map holds, and programs of
//! others beside it.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use lb_common::{INDEX_WAYS, NameIndexKey, NameKey};
use lb_userspace::datapath::NamesSettings;
use lb_userspace::table::{Service, Table};

use crate::fixture::{End, Place, service, table, unit};
use crate::names::{self, A, LONG, PORT, ask, query, settings};
use crate::netns::inside;

/// The names of a table, and in how many tables they are replaced.
const N_NAMES: u16 = 128;
const N_TABLES: u16 = 40;

/// A name's address in a table; each has its own.
fn address(name: u16, table: u16) -> Ipv4Addr {
    let [high, low] = (table * N_NAMES + name).to_be_bytes();
    Ipv4Addr::new(127, 200, high, low)
}

fn server() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, PORT))
}

/// Every name moves with each table, while two clients ask: each answer is an address of the name's, of
/// this table or of the next.
pub fn thousands_are_replaced() {
    inside(|| {
        let place = Place::new();
        let mut datapath = place.start();
        let services = |table: u16| -> Vec<Service> {
            let each = (0..N_NAMES).map(|name| (name, format!("name{name}")));
            // Some come and go, and so take each other's place in the maps.
            let present = each.filter(|(name, _)| name % 8 != table % 8);
            present.map(|(name, label)| service(&label, address(name, table), &[])).collect()
        };
        datapath.apply(&table(services(0))).unwrap();
        datapath.configure_names(settings(PORT));
        let (is_over, n_answers) = (AtomicBool::new(false), AtomicU64::new(0));
        let client = || {
            let socket = names::socket(Ipv4Addr::LOCALHOST.into());
            socket.connect(server()).unwrap();
            let queries = (0..N_NAMES).map(|name| query(&format!("name{name}.service"), A, false));
            let queries: Vec<_> = queries.collect();
            let mut last = vec![0; queries.len()];
            let mut answer = [0; 512];
            while !is_over.load(Ordering::Relaxed) {
                for (name, query) in (0..).zip(&queries) {
                    socket.send(query).unwrap();
                    let len = socket.recv(&mut answer).unwrap();
                    assert_eq!(answer[12..query.len()], query[12..], "another name's answer");
                    if answer[3] & 0xf == 2 {
                        continue; // it isn't there now
                    }
                    let [.., a, b, c, d] = answer[..len] else { panic!("{len} bytes") };
                    let table = u16::from_be_bytes([c, d]) / N_NAMES;
                    assert_eq!(Ipv4Addr::new(a, b, c, d), address(name, table), "of another name");
                    let last = &mut last[usize::from(name)];
                    assert!(table >= *last, "name{name} went back from {last} to {table}");
                    *last = table;
                    n_answers.fetch_add(1, Ordering::Relaxed);
                }
            }
        };
        std::thread::scope(|scope| {
            let end = End(&is_over);
            let clients = [scope.spawn(client), scope.spawn(client)];
            for idx in 1..N_TABLES {
                let wanted = n_answers.load(Ordering::Relaxed) + u64::from(N_NAMES);
                while n_answers.load(Ordering::Relaxed) < wanted
                    && !clients.iter().any(|client| client.is_finished())
                {
                    std::thread::yield_now();
                }
                assert!(datapath.apply(&table(services(idx))).unwrap().is_empty());
            }
            drop(end);
            for client in clients {
                client.join().unwrap();
            }
        });
        for name in (0..N_NAMES).filter(|name| name % 8 != (N_TABLES - 1) % 8) {
            let found = ask(server(), &format!("name{name}.service"), A, false);
            assert_eq!(found, address(name, N_TABLES - 1).to_string());
        }
        assert_eq!(unit(&datapath, "names").unwrap().reason, None);
    });
}

/// What doesn't fit is reported, and is left to the daemon; there is room for it once another name goes.
pub fn a_full_map() {
    inside(|| {
        const N_FIT: usize = 4;
        let mut place = Place::new();
        place.options.datapath.max_services = N_FIT as u32;
        let mut datapath = place.start();
        let names: Vec<u16> = (0..6).collect();
        let of = |names: &[u16]| -> Table {
            let each =
                names.iter().map(|&name| service(&format!("name{name}"), address(name, 0), &[]));
            table(each.collect())
        };
        datapath.apply(&of(&names)).unwrap();
        datapath.configure_names(settings(PORT));
        let found = |names: &[u16]| -> Vec<u16> {
            let is_found = |&name: &u16| {
                let found = ask(server(), &format!("name{name}.service"), A, false);
                assert!(found == address(name, 0).to_string() || found == "code 2", "{found}");
                found != "code 2"
            };
            names.iter().copied().filter(is_found).collect()
        };
        let first = found(&names);
        assert_eq!(first.len(), N_FIT);
        let reason = unit(&datapath, "names").unwrap().reason.unwrap();
        assert!(reason.ends_with("the map NAMES is full: raise datapath.max_services"), "{reason}");
        // A daemon that runs gets the others.
        let listener = UdpSocket::bind(server()).unwrap();
        listener.set_read_timeout(Some(LONG)).unwrap();
        datapath.set_names_ready(true);
        datapath.heartbeat(None);
        let other = names.iter().find(|name| !first.contains(name)).unwrap();
        let message = query(&format!("name{other}.service"), A, false);
        let client = names::socket(Ipv4Addr::LOCALHOST.into());
        client.send_to(&message, server()).unwrap();
        let mut buffer = [0; 512];
        let len = listener.recv(&mut buffer).unwrap();
        assert_eq!(buffer[..len], message);
        drop(listener);
        datapath.keep();

        let rest: Vec<u16> =
            names.iter().copied().filter(|name| !first[..2].contains(name)).collect();
        datapath.apply(&of(&rest)).unwrap();
        assert_eq!(found(&names), rest);
        assert_eq!(unit(&datapath, "names").unwrap().reason, None);
    });
}

/// More names than the index has room for in a bucket, by the program of the daemon that has inserted them and of
/// the next one. An earlier daemon's program has an index that nothing keeps, and so finds what has changed by
/// the hash.
pub fn in_one_bucket() {
    inside(|| {
        let place = Place::new();
        let bucket =
            |name: &str| NameIndexKey::of(NameKey::of(name.as_bytes()).unwrap().hash()).bucket;
        let all = (0..).map(|n| format!("n{n}")).filter(|name| bucket(name) == bucket("n0"));
        let labels: Vec<String> = all.take(INDEX_WAYS + 2).collect();
        let of = |wanted: &[(usize, u16)]| -> Table {
            let each = wanted.iter();
            let each = each.map(|&(n, table)| service(&labels[n], address(n as u16, table), &[]));
            table(each.collect())
        };
        let found = || -> Vec<String> {
            labels.iter().map(|name| ask(server(), &format!("{name}.service"), A, false)).collect()
        };
        let expected = |wanted: &[(usize, u16)]| -> Vec<String> {
            let address_of = |n| {
                let &(_, table) = wanted.iter().find(|(name, _)| *name == n)?;
                Some(address(n as u16, table).to_string())
            };
            (0..labels.len()).map(|n| address_of(n).unwrap_or("code 2".into())).collect()
        };
        let first: Vec<_> = (0..labels.len()).map(|n| (n, 0)).collect();
        let mut datapath = place.start();
        datapath.apply(&of(&first)).unwrap();
        datapath.configure_names(settings(PORT));
        assert_eq!(found(), expected(&first));
        drop(datapath);

        // Two are gone, and give their records to others' new addresses; two have moved.
        let mut datapath = place.start();
        assert_eq!(found(), expected(&first), "by the earlier daemon's program");
        for wanted in [&[(1, 0), (3, 1), (4, 0), (5, 1)][..], &[(0, 2), (1, 0), (2, 2), (5, 3)]] {
            datapath.apply(&of(wanted)).unwrap();
            assert_eq!(found(), expected(wanted), "by the earlier daemon's program");
        }
        datapath.configure_names(settings(PORT));
        for wanted in [&[(0, 2), (1, 0), (2, 2), (5, 3)][..], &first, &[(5, 3)], &first] {
            datapath.apply(&of(wanted)).unwrap();
            assert_eq!(found(), expected(wanted));
        }
        datapath.detach();
    });
}

/// A program of another's at the ingress of `lo`, until it is dropped.
struct Foreign {
    _link: OwnedFd,
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_PROG_TYPE_SCHED_CLS: u64 = 3;
const BPF_TCX_INGRESS: u64 = 46;
const BPF_F_BEFORE: u64 = 1 << 3;
const BPF_F_AFTER: u64 = 1 << 4;
/// What a program of tcx returns so that the next one runs, and so that no other does.
const TCX_NEXT: i32 = -1;
const TCX_PASS: i32 = 0;

impl Foreign {
    /// One that returns this, before all that are there or after them.
    fn attach(verdict: i32, place: u64) -> Foreign {
        // r0 = verdict; exit.
        let instructions = [0xb7 | (verdict as u32 as u64) << 32, 0x95];
        let license = c"GPL";
        let mut load = [0u64; 16];
        load[0] = BPF_PROG_TYPE_SCHED_CLS | (instructions.len() as u64) << 32;
        (load[1], load[2]) = (instructions.as_ptr() as u64, license.as_ptr() as u64);
        let program = bpf(BPF_PROG_LOAD, &load);
        let mut create = [0u64; 16];
        create[0] = program.as_raw_fd() as u64 | 1 << 32;
        create[1] = BPF_TCX_INGRESS | place << 32;
        Foreign { _link: bpf(BPF_LINK_CREATE, &create) }
    }
}

fn bpf(command: libc::c_int, attributes: &[u64; 16]) -> OwnedFd {
    let size = size_of_val(attributes);
    // SAFETY: the attributes are as long as is named, what they point to lives until the call ends, and
    // the kernel makes a descriptor for us.
    unsafe {
        let fd = libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), size);
        assert!(fd >= 0, "bpf {command}: {}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd as libc::c_int)
    }
}

/// Others that pass a packet on hide nothing; one before ours that accepts it has the daemon answer.
pub fn beside_other_programs() {
    inside(|| {
        let place = Place::new();
        let mut datapath = names::serve(&place);
        let web = || ask(server(), "web.service", A, false);
        let vip = crate::fixture::VIP.to_string();
        let (client, listener) =
            (names::socket(Ipv4Addr::LOCALHOST.into()), UdpSocket::bind(server()).unwrap());
        listener.set_read_timeout(client.read_timeout().unwrap()).unwrap();
        for (what, verdict, place) in [
            ("before", TCX_NEXT, BPF_F_BEFORE),
            ("after", TCX_NEXT, BPF_F_AFTER),
            ("after, and accepts", TCX_PASS, BPF_F_AFTER),
        ] {
            let _foreign = Foreign::attach(verdict, place);
            assert_eq!(web(), vip, "{what}");
            // What ours passes it gets, too.
            let message = query("none.service", A, false);
            client.send_to(&message, server()).unwrap();
            let mut buffer = [0; 512];
            let len = listener.recv(&mut buffer).unwrap();
            assert_eq!(buffer[..len], message, "{what}");
        }
        let foreign = Foreign::attach(TCX_PASS, BPF_F_BEFORE);
        let message = query("web.service", A, false);
        client.send_to(&message, server()).unwrap();
        let mut buffer = [0; 512];
        let len = listener.recv(&mut buffer).unwrap();
        assert_eq!(buffer[..len], message, "hidden from ours");
        drop(foreign);
        assert_eq!(web(), vip);
        datapath.configure_names(NamesSettings { ttl: 31, ..settings(PORT) });
        datapath.fix();
        assert_eq!(web(), vip);
    });
}
