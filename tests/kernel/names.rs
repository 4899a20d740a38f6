//! The unit `names`: queries on `lo` are answered by the kernel, in a network namespace of the trial's
//! own, where no daemon listens.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use lb_userspace::config::KernelMode;
use lb_userspace::datapath::{
    Datapath, IngressInterface, NamesSettings, Options, ProbedAnswer, UnitState, announce_start,
};
use lb_userspace::table::{Table, Watch};
use rustix::thread::gettid;

use crate::fixture::{OTHER_VIP, Place, VIP, VIP6, nft, service, table, unit};
use crate::netns::{inside, ip, leave};

/// A port where nothing listens.
pub const PORT: u16 = 5399;
pub const A: u16 = 1;
pub const AAAA: u16 = 28;
pub const SRV: u16 = 33;
pub const HTTPS: u16 = 65;
pub const ANY: u16 = 255;

/// For what must come.
pub const LONG: Duration = Duration::from_secs(20);

pub fn settings(port: u16) -> NamesSettings {
    let listen = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
    NamesSettings {
        mode: Some(KernelMode::Always),
        domain: "service".into(),
        ttl: 30,
        listen: listen.map(|ip| SocketAddr::new(ip, port)).into(),
        listen_shared: Vec::new(),
        allowed: vec!["10.0.0.0/8".parse().unwrap()],
        client_rate: 10,
        interfaces: vec![IngressInterface { name: "lo".into(), index: 1 }],
        missing_forwarding: Vec::new(),
        is_logged: false,
    }
}

pub fn names() -> Table {
    let mut web = service("web", VIP, &[]);
    web.vip6 = Some(VIP6);
    let mut cold = service("cold", OTHER_VIP, &[]);
    cold.watch = Watch::Cold;
    Table { generation: 0x0102_0304, ..table(vec![web, cold]) }
}

pub fn query(name: &str, kind: u16, opt: bool) -> Vec<u8> {
    let mut message = vec![7, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, u8::from(opt)];
    for label in name.split('.') {
        message.push(label.len() as u8);
        message.extend(label.bytes());
    }
    message.push(0);
    message.extend(kind.to_be_bytes());
    message.extend([0, 1]);
    if opt {
        message.extend([0, 0, 41, 4, 208, 0, 0, 0x80, 0, 0, 0]);
    }
    message
}

pub fn socket(source: IpAddr) -> UdpSocket {
    let socket = UdpSocket::bind(SocketAddr::new(source, 0)).unwrap();
    socket.set_read_timeout(Some(LONG)).unwrap();
    socket
}

/// A thread in a network namespace of its own, which runs what it is given.
pub struct Container {
    jobs: Option<Sender<Box<dyn FnOnce() + Send>>>,
    thread: Option<JoinHandle<()>>,
    pub tid: String,
}

impl Container {
    pub fn start() -> Container {
        let (jobs, received) = channel::<Box<dyn FnOnce() + Send>>();
        let thread = std::thread::spawn(move || {
            leave();
            received.into_iter().for_each(|job| job());
        });
        let mut container =
            Container { jobs: Some(jobs), thread: Some(thread), tid: String::new() };
        container.tid = container.run(|| gettid().as_raw_nonzero().to_string());
        container
    }

    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (result, received) = channel();
        let job = move || drop(result.send(job()));
        self.jobs.as_ref().unwrap().send(Box::new(job)).unwrap();
        received.recv().unwrap()
    }

    fn ask(&self, server: SocketAddr, name: &'static str, kind: u16) -> String {
        let source = match server {
            SocketAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        self.run(move || ask_from(source, server, name, kind, true))
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        drop(self.jobs.take());
        let _ = self.thread.take().unwrap().join();
    }
}

/// The answer to a query; the error where it is refused.
fn exchange(socket: &UdpSocket, server: SocketAddr, message: &[u8]) -> std::io::Result<Vec<u8>> {
    socket.connect(server)?;
    socket.send(message)?;
    let mut answer = vec![0; 512];
    let len = socket.recv(&mut answer)?;
    answer.truncate(len);
    Ok(answer)
}

/// What an answer is: the code, the numbers of answers and of authorities, and the last bytes of the first
/// record.
pub fn ask(server: SocketAddr, name: &str, kind: u16, opt: bool) -> String {
    let source = if server.is_ipv4() {
        IpAddr::from(Ipv4Addr::LOCALHOST)
    } else {
        Ipv6Addr::LOCALHOST.into()
    };
    ask_from(source, server, name, kind, opt)
}

fn ask_from(source: IpAddr, server: SocketAddr, name: &str, kind: u16, opt: bool) -> String {
    let message = query(name, kind, opt);
    let answer = match exchange(&socket(source), server, &message) {
        Ok(answer) => answer,
        Err(error) => return format!("{:?}", error.kind()),
    };
    assert_eq!(answer[..2], [7, 7]);
    let question = message.len() - if opt { 11 } else { 0 };
    let code = answer[3] & 0xf;
    if code != 0 {
        return format!("code {code}");
    }
    assert_eq!(answer[12..question], message[12..question], "the question in its case");
    assert_eq!(answer[11], u8::from(opt));
    let len = usize::from(answer[question + 11]);
    let data = &answer[question + 12..question + 12 + len];
    match (answer[7], len) {
        (1, 4) => format!("{}.{}.{}.{}", data[0], data[1], data[2], data[3]),
        (1, 16) => Ipv6Addr::from(<[u8; 16]>::try_from(data).unwrap()).to_string(),
        (0, 38) => format!("no data, {:02x?}", &data[18..22]),
        other => format!("{other:?}"),
    }
}

/// A datapath with the names, in a network namespace of this thread's own.
pub fn serve(place: &Place) -> Datapath {
    let mut datapath = place.start();
    datapath.apply(&names()).unwrap();
    datapath.configure_names(settings(PORT));
    datapath.set_names_ready(true);
    let unit = unit(&datapath, "names").unwrap();
    assert_eq!((unit.state, unit.reason), (UnitState::Attached, None));
    datapath
}

pub fn are_answered() {
    inside(|| {
        let place = Place::new();
        let mut datapath = serve(&place);
        for ip in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
            let server = SocketAddr::new(ip, PORT);
            for opt in [false, true] {
                assert_eq!(ask(server, "web.service", A, opt), VIP.to_string());
                assert_eq!(ask(server, "WeB.sErvice", AAAA, opt), VIP6.to_string());
                assert_eq!(ask(server, "web.service", HTTPS, opt), "no data, [01, 02, 03, 04]");
                // The other length of a name: the rest of the message begins at an odd place.
                assert_eq!(ask(server, "cold.service", A, opt), OTHER_VIP.to_string());
                assert_eq!(ask(server, "cold.service", AAAA, opt), "no data, [01, 02, 03, 04]");
                assert_eq!(ask(server, "web.service", ANY, opt), VIP.to_string());
                // Without a daemon, and without a socket.
                assert_eq!(ask(server, "web.service", SRV, opt), "code 2");
                assert_eq!(ask(server, "other.service", A, opt), "code 2");
                assert_eq!(ask(server, "a.web.service", A, opt), "code 2");
                assert_eq!(ask(server, "example.com", A, opt), "code 2");
            }
            // Another port is another's.
            let other = SocketAddr::new(ip, PORT + 1);
            assert_eq!(ask(other, "web.service", A, false), "ConnectionRefused");
        }
        let counters = datapath.names_counters();
        assert_eq!((counters.answered, counters.failed, counters.broken), (24, 16, 0));
        assert_eq!(datapath.active_since_last(), ["cold".into(), "web".into()]);
        assert!(datapath.active_since_last().is_empty());
    });
}

pub fn follow_the_table_and_the_daemon() {
    inside(|| {
        let place = Place::new();
        let mut datapath = serve(&place);
        let server = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
        let web = || ask(server, "web.service", A, false);
        let listener = UdpSocket::bind(server).unwrap();
        listener.set_read_timeout(Some(LONG)).unwrap();
        let client = socket(Ipv4Addr::LOCALHOST.into());
        client.connect(server).unwrap();
        let passes = |name: &str| {
            client.send(&query(name, A, false)).unwrap();
            let mut message = [0; 512];
            let len = listener.recv(&mut message).unwrap();
            assert_eq!(message[..len], query(name, A, false), "as it came");
        };

        // A daemon that runs gets what it has to see.
        let while_it_runs = |datapath: &Datapath, name: &str| {
            datapath.heartbeat(None);
            passes(name);
        };
        datapath.heartbeat(None);
        assert_eq!(web(), VIP.to_string());
        while_it_runs(&datapath, "cold.service");
        while_it_runs(&datapath, "other.service");
        datapath.set_names_detached(true);
        while_it_runs(&datapath, "web.service");
        datapath.set_names_detached(false);
        assert_eq!(web(), VIP.to_string());
        // One that starts or stops is as none.
        let cold = || ask(server, "cold.service", A, false);
        datapath.heartbeat(None);
        datapath.set_names_ready(false);
        assert_eq!(cold(), OTHER_VIP.to_string());
        passes("other.service");
        datapath.set_names_ready(true);
        while_it_runs(&datapath, "cold.service");
        announce_start(&place.options.bpffs);
        assert_eq!(cold(), OTHER_VIP.to_string());
        // It hasn't: this one still runs.
        while_it_runs(&datapath, "cold.service");
        // None runs.
        datapath.keep();
        assert_eq!(ask(server, "cold.service", A, false), OTHER_VIP.to_string());
        passes("other.service");
        datapath.set_names_detached(true);
        assert_eq!(web(), "code 2");
        datapath.set_names_detached(false);
        // The table is too old: the daemon explains that while it runs.
        datapath.set_max_age(Some(Duration::from_secs(5)));
        let old = Some(Duration::from_secs(10));
        datapath.heartbeat(old);
        passes("web.service");
        datapath.keep();
        assert_eq!(web(), "code 2");
        datapath.heartbeat(Some(Duration::ZERO));
        assert_eq!(web(), VIP.to_string());
        datapath.heartbeat(old);
        datapath.set_max_age(None);
        assert_eq!(web(), VIP.to_string());
        datapath.keep();

        datapath.set_shadow(true);
        passes("web.service");
        datapath.set_shadow(false);
        datapath
            .configure_names(NamesSettings { mode: Some(KernelMode::Standby), ..settings(PORT) });
        assert_eq!(web(), VIP.to_string());
        while_it_runs(&datapath, "web.service");
        datapath.set_names_ready(false);
        assert_eq!(web(), VIP.to_string());
        datapath.set_names_ready(true);
        datapath.configure_names(NamesSettings { mode: None, ..settings(PORT) });
        datapath.keep();
        passes("web.service");
        datapath.configure_names(settings(PORT));

        let mut moved = names();
        let other = service("web", OTHER_VIP, &[]);
        moved.services.insert("web".into(), other.into());
        datapath.apply(&moved).unwrap();
        assert_eq!(web(), OTHER_VIP.to_string());
        assert_eq!(ask(server, "web.service", AAAA, false), "no data, [01, 02, 03, 04]");
        datapath.apply(&table(vec![])).unwrap();
        passes("web.service");
    });
}

/// Where it can't be attached the daemon answers, and `status` has the reason; once it can, it is.
pub fn where_it_is_refused() {
    inside(|| {
        let place = Place::new();
        let mut datapath = place.start();
        datapath.apply(&names()).unwrap();
        // What isn't a link is another's.
        let pin = place.pin("v3/links/nohop_names_1");
        std::fs::create_dir_all(&pin).unwrap();
        datapath.configure_names(settings(PORT));
        let state = |datapath: &Datapath| {
            let unit = unit(datapath, "names").unwrap();
            (unit.state, unit.reason.unwrap_or_default())
        };
        let (failed, reason) = state(&datapath);
        assert_eq!(failed, UnitState::Failed);
        assert!(reason.starts_with("it can't be attached to lo: "), "{reason}");
        let web = || ask((Ipv4Addr::LOCALHOST, PORT).into(), "web.service", A, false);
        assert_eq!(web(), "ConnectionRefused", "left to the daemon");
        std::fs::remove_dir(&pin).unwrap();
        datapath.fix();
        assert_eq!(state(&datapath), (UnitState::Attached, String::new()));
        assert_eq!(web(), VIP.to_string());
    });
}

/// The program outlives the daemon; the next one's takes its place, and what was detached comes back.
pub fn outlive_the_daemon() {
    inside(|| {
        let place = Place::new();
        let server = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
        let web = || ask(server, "web.service", A, false);
        drop(serve(&place));
        assert_eq!(web(), VIP.to_string());

        let mut datapath = place.start();
        assert_eq!(web(), VIP.to_string(), "by the earlier daemon's program");
        datapath.configure_names(settings(PORT + 1));
        assert_eq!(web(), "ConnectionRefused");
        let other = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT + 1));
        assert_eq!(ask(other, "web.service", A, false), VIP.to_string());

        // The qdisc goes, or the links' pins.
        let _ = Command::new("tc").args(["qdisc", "del", "dev", "lo", "clsact"]).status();
        let links = place.pin("v3/links/nohop_names_1");
        let had_link = links.exists();
        let _ = std::fs::remove_file(&links);
        let map = place.pin("v3/maps/NAMES");
        std::fs::remove_file(&map).unwrap();
        datapath.fix();
        assert!(map.exists());
        assert_eq!(links.exists(), had_link);
        assert_eq!(ask(other, "web.service", A, false), VIP.to_string());

        datapath.detach();
        assert_eq!(ask(other, "web.service", A, false), "ConnectionRefused");
    });
}

/// Clients of other addresses: allowed or not, within their rate, never from port 53. On `lo` the host's own,
/// by a source that the kernel chose.
pub fn are_for_served_clients() {
    inside(|| {
        let place = Place::new();
        let container = Container::start();
        let bridge = add_bridge(&container);
        let mut datapath = serve(&place);
        let mut interfaces = settings(PORT).interfaces;
        interfaces.push(bridge);
        let server = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
        let on_bridge = SocketAddr::from(([10, 9, 0, 1], PORT));
        let serves = |networks: &[&str]| NamesSettings {
            listen: vec![server, on_bridge],
            allowed: networks.iter().map(|network| network.parse().unwrap()).collect(),
            interfaces: interfaces.clone(),
            ..settings(PORT)
        };
        datapath.configure_names(serves(&["192.0.2.0/24"]));
        ip("addr add 192.0.2.7/32 dev lo");
        let message = query("web.service", A, false);
        let refused = exchange(&socket(Ipv4Addr::new(192, 0, 2, 7).into()), server, &message);
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::ConnectionRefused);
        let alias = exchange(&socket(Ipv4Addr::new(127, 0, 0, 9).into()), server, &message);
        assert!(alias.unwrap().ends_with(&VIP.octets()));
        assert_eq!(ask_from(on_bridge.ip(), on_bridge, "web.service", A, false), VIP.to_string());
        let from_dns = UdpSocket::bind("127.0.0.1:53").unwrap();
        from_dns.set_read_timeout(Some(LONG)).unwrap();
        let refused = exchange(&from_dns, server, &message);
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::ConnectionRefused);
        assert_eq!(container.ask(on_bridge, "web.service", A), "ConnectionRefused");

        // A network of IPv6 that has all of IPv4's mapped addresses has none of IPv4's.
        datapath.configure_names(serves(&["::/0"]));
        assert_eq!(container.ask(on_bridge, "web.service", A), "ConnectionRefused");

        datapath.configure_names(serves(&["10.9.0.0/24", "::/0"]));
        // Ten a second, and a burst of as many: of a hundred at once most are dropped.
        let before = datapath.names_counters();
        container.run(move || {
            let client = socket(Ipv4Addr::UNSPECIFIED.into());
            client.connect(on_bridge).unwrap();
            for _ in 0..100 {
                client.send(&message).unwrap();
            }
        });
        let end = std::time::Instant::now() + LONG;
        let (answered, limited) = loop {
            let now = datapath.names_counters();
            let counts = (now.answered - before.answered, now.limited - before.limited);
            if counts.0 + counts.1 == 100 || std::time::Instant::now() > end {
                break counts;
            }
            std::thread::yield_now();
        };
        assert_eq!(answered + limited, 100);
        assert!(answered >= 10 && limited >= 1, "{answered} {limited}");
    });
}

/// Where answers don't arrive, queries pass.
pub fn pass_where_answers_get_lost() {
    inside(|| {
        let place = Place::new();
        let mut datapath = serve(&place);
        let probe = |datapath: &mut Datapath| {
            let results = datapath.names_prober().unwrap().probe();
            datapath.record_names_probes(results.clone());
            let lost = |(_, result): &&(u64, ProbedAnswer)| *result != ProbedAnswer::Arrived;
            (results.iter().filter(lost).count(), results.len())
        };
        let reason =
            |datapath: &Datapath| unit(datapath, "names").unwrap().reason.unwrap_or_default();
        assert_eq!((probe(&mut datapath), reason(&datapath)), ((0, 2), String::new()));
        // A client that asks for it gets an address, and no other data.
        let server = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
        let probed = |kind| ask(server, "_nohop-probe.service", kind, false);
        assert_eq!([A, ANY].map(probed), ["192.0.2.53", "192.0.2.53"]);
        assert_eq!([AAAA, SRV].map(probed), ["no data, [01, 02, 03, 04]"; 2]);
        // Nobody else's: it is asked for on standby, and isn't counted.
        datapath.heartbeat(None);
        datapath
            .configure_names(NamesSettings { mode: Some(KernelMode::Standby), ..settings(PORT) });
        assert_eq!(probe(&mut datapath), (0, 2));
        assert_eq!(datapath.names_counters().answered, 0);
        datapath.configure_names(NamesSettings {
            missing_forwarding: vec!["/proc/one".into()],
            ..settings(PORT)
        });
        assert!(reason(&datapath).starts_with("/proc/one is 0, so"), "{}", reason(&datapath));
        datapath.configure_names(settings(PORT));
        datapath.keep();

        // A firewall that knows neither the query's connection nor the answer's. Here, where there is one.
        let rules = format!(
            "table inet t {{\nchain i {{ type filter hook input priority 0; udp dport {PORT} accept; \
             ct state established accept; udp sport {PORT} drop; }}\n}}\n"
        );
        if !nft(&rules) {
            return crate::skip("needs nft, and a kernel with connection tracking");
        }
        assert_eq!((probe(&mut datapath), reason(&datapath)), ((2, 2), String::new()), "once");
        assert_eq!(probe(&mut datapath), (2, 2));
        assert!(reason(&datapath).contains("127.0.0.1:5399 don't arrive"), "{}", reason(&datapath));
        let listener = UdpSocket::bind(server).unwrap();
        listener.set_read_timeout(Some(LONG)).unwrap();
        let client = socket(Ipv4Addr::LOCALHOST.into());
        client.send_to(&query("web.service", A, false), server).unwrap();
        let mut message = [0; 512];
        let (len, from) = listener.recv_from(&mut message).unwrap();
        assert_eq!(message[..len], query("web.service", A, false), "as it came");
        // The daemon's answer arrives.
        listener.send_to(b"answer", from).unwrap();
        let len = client.recv(&mut message).unwrap();
        assert_eq!(&message[..len], b"answer");

        assert!(nft("delete table inet t\n"));
        assert_eq!((probe(&mut datapath), reason(&datapath)), ((0, 2), String::new()));
        assert_eq!(ask(server, "web.service", A, false), VIP.to_string());
    });
}

/// A bridge with a container behind it: the host's end, which is a pair's.
fn add_bridge(container: &Container) -> IngressInterface {
    ip("link add br0 type bridge");
    ip("addr add 10.9.0.1/24 dev br0");
    ip("addr add fd09::1/64 dev br0 nodad");
    ip(&format!("link add v0 type veth peer name v1 netns {}", container.tid));
    ip("link set v0 master br0 up");
    ip("link set br0 up");
    // Container runtimes switch it on, and bpf_fib_lookup() finds no way back without it.
    for family in ["ipv4", "ipv6"] {
        std::fs::write(format!("/proc/sys/net/{family}/conf/br0/forwarding"), "1").unwrap();
    }
    container.run(|| {
        ip("addr add 10.9.0.2/24 dev v1");
        ip("addr add fd09::2/64 dev v1 nodad");
        ip("link set v1 up");
    });
    let index = std::fs::read_to_string("/sys/class/net/br0/ifindex");
    // Of another namespace where sysfs is.
    let index = index.ok().and_then(|index| index.trim().parse().ok());
    let index = index.unwrap_or_else(|| {
        let name = c"br0";
        // SAFETY: the name ends with a zero.
        unsafe { libc::if_nametoindex(name.as_ptr()) }
    });
    IngressInterface { name: "br0".into(), index }
}

/// Has the kernel make the checksums of what an interface of this thread's network namespace sends.
fn without_offload(interface: &str) {
    const SIOCETHTOOL: libc::Ioctl = 0x8946;
    const ETHTOOL_STXCSUM: u32 = 0x17;
    // struct ethtool_value; struct ifreq: the name and the pointer to it, of 40 bytes.
    let mut value = [ETHTOOL_STXCSUM, 0];
    let mut request = [0u8; 40];
    request[..interface.len()].copy_from_slice(interface.as_bytes());
    request[16..24].copy_from_slice(&(value.as_mut_ptr() as usize).to_ne_bytes());
    let any = socket(Ipv4Addr::UNSPECIFIED.into());
    // SAFETY: the request and what it points to are as long as the kernel reads and writes.
    let result = unsafe { libc::ioctl(any.as_raw_fd(), SIOCETHTOOL, request.as_mut_ptr()) };
    assert_eq!(result, 0, "{interface}: {}", std::io::Error::last_os_error());
}

pub fn reach_containers() {
    inside(|| {
        let place = Place::new();
        let container = Container::start();
        let bridge = add_bridge(&container);
        let mut datapath = place.start();
        datapath.apply(&names()).unwrap();
        let servers = [IpAddr::from([10, 9, 0, 1]), "fd09::1".parse().unwrap()];
        let servers = servers.map(|ip| SocketAddr::new(ip, PORT));
        let wanted = |interfaces: &[&IngressInterface]| NamesSettings {
            listen: servers.into(),
            allowed: ["10.9.0.0/24", "fd09::/64", "192.0.2.0/24"]
                .map(|network| network.parse().unwrap())
                .into(),
            client_rate: 0,
            interfaces: interfaces.iter().copied().cloned().collect(),
            ..settings(PORT)
        };
        let loopback = settings(PORT).interfaces.remove(0);
        datapath.configure_names(wanted(&[&loopback, &bridge]));
        let answers = || {
            for server in servers {
                assert_eq!(container.ask(server, "web.service", A), VIP.to_string());
                assert_eq!(container.ask(server, "WeB.service", AAAA), VIP6.to_string());
                assert_eq!(
                    container.ask(server, "cold.service", AAAA),
                    "no data, [01, 02, 03, 04]"
                );
                assert_eq!(container.ask(server, "other.service", A), "code 2");
            }
        };
        answers();

        // Packets that have a checksum instead of what a device would make one of: the answers, from the
        // host's end on, and then the queries too.
        without_offload("v0");
        answers();
        container.run(|| without_offload("v1"));
        answers();

        // A source that isn't reached by the bridge passes.
        for name in ["all", "br0"] {
            std::fs::write(format!("/proc/sys/net/ipv4/conf/{name}/rp_filter"), "0").unwrap();
        }
        let listener = UdpSocket::bind(servers[0]).unwrap();
        listener.set_read_timeout(Some(LONG)).unwrap();
        let before = datapath.names_counters();
        let server = servers[0];
        container.run(move || {
            ip("addr add 192.0.2.9/32 dev v1");
            let forged = socket(Ipv4Addr::new(192, 0, 2, 9).into());
            forged.send_to(&query("web.service", A, false), server).unwrap();
        });
        let mut message = [0; 512];
        let (len, from) = listener.recv_from(&mut message).unwrap();
        assert_eq!(
            (&message[..len], from.ip()),
            (&*query("web.service", A, false), [192, 0, 2, 9].into())
        );
        assert_eq!(datapath.names_counters(), before);
        drop(listener);

        // The bridge is deleted and made again.
        ip("link del br0");
        ip("link del v0");
        datapath.configure_names(wanted(&[&loopback]));
        let bridge = add_bridge(&container);
        assert_eq!(container.ask(servers[0], "web.service", A), "ConnectionRefused");
        datapath.configure_names(wanted(&[&loopback, &bridge]));
        answers();

        // The next daemon has no use for the bridge, of which it learns by the pins alone.
        drop(datapath);
        answers();
        let mut datapath = place.start();
        datapath.configure_names(wanted(&[&loopback]));
        assert_eq!(container.ask(servers[0], "web.service", A), "ConnectionRefused");
        datapath.detach();
    });
}

/// Daemons with cgroups and pins of their own may share a network namespace, and the unspecified address is shared
/// with servers that have one of the addresses.
pub fn leave_others_alone() {
    inside(|| {
        let place = Place::new();
        let mut datapath = serve(&place);
        // Which has another cgroup: each has the hooks of one daemon.
        let scope = place.cgroup.path.join("other");
        std::fs::create_dir(&scope).unwrap();
        let mut options = Options::of(&Default::default(), &scope);
        options.bpffs = place.options.bpffs.with_file_name("other");
        options.datapath.clone_from(&place.options.datapath);
        let mut other = Datapath::start(&options).unwrap();
        other.keep();
        other.apply(&names()).unwrap();
        other.configure_names(settings(PORT + 1));
        let [server, others] =
            [PORT, PORT + 1].map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        assert_eq!(ask(server, "web.service", A, false), VIP.to_string());
        assert_eq!(ask(others, "web.service", A, false), VIP.to_string());
        datapath.fix();
        other.detach();
        assert_eq!(ask(others, "web.service", A, false), "ConnectionRefused");
        assert_eq!(ask(server, "web.service", A, false), VIP.to_string());

        let shared = NamesSettings {
            listen: Vec::new(),
            listen_shared: vec![server, SocketAddr::from((Ipv6Addr::LOCALHOST, PORT))],
            ..settings(PORT)
        };
        datapath.configure_names(shared);
        for ip in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
            let server = SocketAddr::new(ip, PORT);
            assert_eq!(ask(server, "web.service", A, false), VIP.to_string(), "without a socket");
            let ours = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, PORT)).unwrap();
            assert_eq!(ask(server, "web.service", A, false), VIP.to_string());
            drop(ours);
            let theirs = UdpSocket::bind(server).unwrap();
            theirs.set_read_timeout(Some(LONG)).unwrap();
            let client = socket(ip);
            client.send_to(&query("web.service", A, false), server).unwrap();
            let mut message = [0; 512];
            let len = theirs.recv(&mut message).unwrap();
            assert_eq!(message[..len], query("web.service", A, false), "as it came");
        }
    });
}
