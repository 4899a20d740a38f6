//! The unit `names`: queries on `lo` are answered by the kernel, in a network namespace of the trial's
//! own, where no daemon listens.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use lb_userspace::config::KernelMode;
use lb_userspace::datapath::{Datapath, IngressInterface, NamesSettings, UnitState};
use lb_userspace::table::{Table, Watch};

use crate::disconnect::leave;
use crate::fixture::{OTHER_VIP, Place, VIP, VIP6, service, table};

/// A port where nothing listens.
pub const PORT: u16 = 5399;
pub const A: u16 = 1;
pub const AAAA: u16 = 28;
pub const SRV: u16 = 33;
pub const HTTPS: u16 = 65;

/// For what must come.
const LONG: Duration = Duration::from_secs(20);

pub fn settings(port: u16) -> NamesSettings {
    let listen = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
    NamesSettings {
        mode: Some(KernelMode::Always),
        domain: "service".into(),
        ttl: 30,
        listen: listen.map(|ip| SocketAddr::new(ip, port)).into(),
        allowed: vec!["10.0.0.0/8".parse().unwrap()],
        client_rate: 10,
        interfaces: vec![IngressInterface { name: "lo".into(), index: 1 }],
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
    let unit = datapath.unit_status().into_iter().find(|unit| unit.name == "names").unwrap();
    assert_eq!((unit.state, unit.reason), (UnitState::Attached, None));
    datapath
}

/// Runs a trial on a thread that can move to another network namespace.
pub fn inside(trial: fn()) {
    let moved = std::thread::spawn(move || {
        leave();
        trial();
    });
    if let Err(panic) = moved.join() {
        std::panic::resume_unwind(panic);
    }
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
        assert_eq!((counters.answered, counters.failed, counters.broken), (20, 16, 0));
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
        // None runs.
        datapath.keep();
        assert_eq!(ask(server, "cold.service", A, false), OTHER_VIP.to_string());
        passes("other.service");
        datapath.set_names_detached(true);
        assert_eq!(web(), "code 2");
        datapath.set_names_detached(false);
        // The table is too old: the daemon explains that while it runs.
        datapath.set_max_age(Some(Duration::from_secs(1)));
        let old = Some(Duration::from_secs(2));
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
        let _ =
            std::process::Command::new("tc").args(["qdisc", "del", "dev", "lo", "clsact"]).status();
        let links = place.pin("v3/links/nohop_names_1");
        let had_link = links.exists();
        let _ = std::fs::remove_file(&links);
        datapath.fix();
        assert_eq!(links.exists(), had_link);
        assert_eq!(ask(other, "web.service", A, false), VIP.to_string());

        datapath.detach();
        assert_eq!(ask(other, "web.service", A, false), "ConnectionRefused");
    });
}

/// Clients of other addresses: allowed or not, within their rate, never from port 53.
pub fn are_for_served_clients() {
    inside(|| {
        let place = Place::new();
        let datapath = serve(&place);
        let add = |address: &str| {
            let mut ip = std::process::Command::new("ip");
            assert!(ip.args(["addr", "add", address, "dev", "lo"]).status().unwrap().success());
        };
        add("10.0.0.7/32");
        add("192.0.2.7/32");
        let server = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
        let message = query("web.service", A, false);
        let refused = exchange(&socket(Ipv4Addr::new(192, 0, 2, 7).into()), server, &message);
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::ConnectionRefused);
        let from_dns = UdpSocket::bind("127.0.0.1:53").unwrap();
        from_dns.set_read_timeout(Some(LONG)).unwrap();
        let refused = exchange(&from_dns, server, &message);
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::ConnectionRefused);

        let client = socket(Ipv4Addr::new(10, 0, 0, 7).into());
        client.connect(server).unwrap();
        // Ten a second, and a burst of as many: of a hundred at once most are dropped.
        for _ in 0..100 {
            client.send(&message).unwrap();
        }
        let counters = datapath.names_counters();
        assert_eq!(counters.answered + counters.limited, 100);
        assert!(counters.answered >= 10 && counters.limited >= 1, "{counters:?}");
    });
}
