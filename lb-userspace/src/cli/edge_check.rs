//! The part of `nohop check` for an edge: its interfaces, its addresses, and what the kernel does with
//! packets.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use crate::admin::api;
use crate::config::{Config, EdgeConfig};
use crate::counted::counted;
use crate::datapath::{Device, interface_addresses, interfaces};

/// A requirement's name, whether an edge can't work without it, and the finding, or the problem and its
/// fix.
pub type EdgeFinding = (String, bool, Result<String, (String, String)>);

/// The ports of its sources that an edge uses: those below the kernel's own by default.
const SOURCE_PORTS: std::ops::RangeInclusive<u16> = 1_024..=32_767;

/// Drivers whose interfaces run XDP programs natively, by the kernel's sources of 6.12 (`ndo_bpf`).
const NATIVE_XDP: [&str; 27] = [
    "atlantic",
    "bnxt_en",
    "cxgb4",
    "dpaa2-eth",
    "ena",
    "enetc",
    "fec",
    "fun",
    "gve",
    "hv_netvsc",
    "i40e",
    "ice",
    "igb",
    "igc",
    "ionic",
    "ixgbe",
    "ixgbevf",
    "mana",
    "mlx4_en",
    "mlx5_core",
    "nfp",
    "qede",
    "sfc",
    "stmmac",
    "tsnep",
    "veth",
    "virtio_net",
];

/// What is looked at of a host.
pub struct EdgeHost {
    /// `/sys`
    pub sys: PathBuf,
    /// `/proc/sys`
    pub sysctl: PathBuf,
    /// Its network interfaces, as far as the kernel reports them.
    pub devices: Vec<Device>,
    /// Their addresses, each with the length of its network's prefix.
    pub addresses: Vec<(String, IpAddr, u8)>,
    /// Its kernel's version, major and minor; `None` where it isn't known.
    pub kernel: Option<(u32, u32)>,
}

impl EdgeHost {
    /// This host, on a kernel of this version.
    pub fn here(kernel: Option<(u32, u32)>) -> EdgeHost {
        let devices = interfaces().unwrap_or_default().into_values().collect();
        let addresses = interface_addresses().unwrap_or_default();
        EdgeHost { sys: "/sys".into(), sysctl: "/proc/sys".into(), devices, addresses, kernel }
    }

    /// How programs are attached at TC: by tcx from Linux 6.6 on.
    fn traffic_control(&self) -> &'static str {
        match self.kernel {
            Some(version) if version >= (6, 6) => "TC (tcx)",
            Some(_) => "TC (clsact)",
            None => "TC",
        }
    }

    fn sysctl(&self, name: &str) -> Option<String> {
        let text = fs::read_to_string(self.sysctl.join(name)).ok()?;
        Some(text.trim().to_owned())
    }
}

/// Checks what an edge needs. `running` is how a running daemon's interfaces are attached.
pub fn check(
    config: &Config,
    host: &EdgeHost,
    running: Option<&api::EdgeDocument>,
) -> Vec<EdgeFinding> {
    let edge = &config.edge;
    let mut found = Vec::new();
    for name in &edge.interfaces {
        found.push((format!("edge interface {name}"), true, interface(name, host, running)));
        found.push((format!("rp_filter of {name}"), false, rp_filter(name, host)));
        for (family, is_used) in families(edge) {
            if is_used {
                let what = format!("{family} forwarding of {name}");
                found.push((what, true, forwarding(name, family, host)));
            }
        }
    }
    for source in &edge.source {
        found.push((format!("edge.source {source}"), true, source_address(*source, host)));
    }
    if !edge.client_address.is_empty() {
        found.push(("edge.client_address".to_owned(), false, sent_clients(edge)));
    }
    for (family, is_used) in families(edge) {
        let is_v4 = family == "ipv4";
        let networks = config.vip.public.iter();
        let n_networks = networks.filter(|network| network.addr().is_ipv4() == is_v4).count();
        if n_networks > 0 && !is_used {
            let problem =
                format!("vip.public has {family} networks, and edge.source no such address");
            let fix =
                "add one of this host to edge.source, or clients of those VIPs aren't served here";
            found.push((
                format!("edge.source for {family}"),
                false,
                Err((problem, fix.to_owned())),
            ));
        }
    }
    if config.vip.public.is_empty() {
        let problem = "vip.public is empty, so no service has a public VIP".to_owned();
        let fix = "write the networks of the public VIPs, the same on all nodes".to_owned();
        found.push(("vip.public".to_owned(), false, Err((problem, fix))));
    }
    if let Some(finding) = own_address(config, host) {
        found.push(("addresses in vip.public".to_owned(), false, Err(finding)));
    }
    found.push(("source ports".to_owned(), false, source_ports(host)));
    found
}

/// An address of this host that a service could take. VIPs that keepalived adds have no network of their own.
fn own_address(config: &Config, host: &EdgeHost) -> Option<(String, String)> {
    let is_public = |ip: &IpAddr| config.vip.public.iter().any(|network| network.contains(ip));
    let is_host = |ip: &IpAddr, prefix: u8| prefix < if ip.is_ipv4() { 32 } else { 128 };
    let own = host.addresses.iter().find(|(_, ip, prefix)| is_public(ip) && is_host(ip, *prefix));
    let (device, ip, _) = own?;
    Some((
        format!(
            "{ip} of {device} lies in vip.public: a service that declares it gets this host's packets, such as \
             those of SSH"
        ),
        "write networks of public VIPs alone, such as one /32 or /28 in place of the whole network"
            .to_owned(),
    ))
}

/// What servers' nodes need for the addresses of clients that this edge sends.
fn sent_clients(edge: &EdgeConfig) -> Result<String, (String, String)> {
    let sources = edge.source.iter().filter(|source| source.is_ipv4());
    let sources: Vec<String> = sources.map(|source| format!("\"{source}\"")).collect();
    if sources.is_empty() {
        let problem = "edge.source has no IPv4 address, so no SYN has a client's address";
        return Err((problem.to_owned(), "add one of this host to edge.source".to_owned()));
    }
    Ok(format!(
        "sent with SYNs over IPv4; the nodes of {} need datapath.client_address_from = [{}]",
        edge.client_address.join(", "),
        sources.join(", ")
    ))
}

/// Checks what a node needs to show the addresses of clients that edges send. `running` is what a running daemon reports.
pub fn check_clients(
    config: &Config,
    host: &EdgeHost,
    running: Option<&api::DatapathStatus>,
) -> Option<Result<String, (String, String)>> {
    let edges = &config.datapath.client_address_from;
    if edges.is_empty() {
        return None;
    }
    let edges: Vec<String> = edges.iter().map(ToString::to_string).collect();
    let wrong = |problem: String, fix: &str| Some(Err((problem, fix.to_owned())));
    // 2: for every connection (Documentation/networking/ip-sysctl.rst).
    if host.sysctl("net/ipv4/tcp_syncookies").as_deref() == Some("2") {
        return wrong(
            "net.ipv4.tcp_syncookies is 2, so the kernel keeps no SYN, and servers see the edges"
                .to_owned(),
            "sysctl -w net.ipv4.tcp_syncookies=1, which uses cookies while a backlog overflows",
        );
    }
    let outcomes = running.and_then(|it| it.units.iter().find(|unit| unit.name == "outcomes"));
    if let Some(unit) = outcomes.filter(|unit| matches!(&*unit.state, "failed" | "off")) {
        let why = unit.reason.as_deref().unwrap_or(&unit.state);
        return wrong(
            format!("servers see the edges: the unit outcomes doesn't run: {why}"),
            "see `nohop status`",
        );
    }
    let n_kept =
        |name: &str| running.and_then(|it| it.counters.get(name)).copied().unwrap_or_default();
    let [n_shown, n_no_syn] = ["client_shown", "client_no_syn"].map(n_kept);
    if n_no_syn > 0 {
        return wrong(
            format!(
                "{} from {} showed the edge, since the kernel hadn't kept their SYN ({n_shown} showed the \
                 client)",
                counted(n_no_syn, "connection"),
                edges.join(", ")
            ),
            "restart servers that listen for longer than nohop runs with datapath.client_address_from; \
             others met a full backlog (SYN cookies)",
        );
    }
    Some(Ok(format!("of connections from {}: {n_shown} shown", edges.join(", "))))
}

fn families(edge: &EdgeConfig) -> [(&'static str, bool); 2] {
    let has = |is_v4: bool| edge.source.iter().any(|source| source.is_ipv4() == is_v4);
    [("ipv4", has(true)), ("ipv6", has(false))]
}

fn interface(
    name: &str,
    host: &EdgeHost,
    running: Option<&api::EdgeDocument>,
) -> Result<String, (String, String)> {
    let directory = host.sys.join("class/net").join(name);
    // /sys may be another network namespace's, /proc/sys/net never is.
    if !host.sysctl.join("net/ipv4/conf").join(name).exists() {
        let problem = format!("there is no interface {name}");
        return Err((problem, "correct edge.interfaces: `ip -br link` lists them".to_owned()));
    }
    let running = running.and_then(|edge| edge.interfaces.iter().find(|one| one.name == name));
    if let Some(one) = running {
        let message = one.message.as_ref().map(|text| format!(": {text}")).unwrap_or_default();
        return match &one.mode {
            Some(mode) => Ok(format!("attached, {mode}{message}")),
            None => Err((
                format!("not attached{message}"),
                "see the message; `nohop status` shows when it has changed".to_owned(),
            )),
        };
    }
    let device = host.devices.iter().find(|device| device.name == name);
    let tc = host.traffic_control();
    let (what, is_listed) = match driver(&directory) {
        Kind::Virtual(kind) => (kind, Some(false)),
        Kind::Driver(driver) => {
            let is_listed = NATIVE_XDP.contains(&&*driver).then_some(true);
            (format!("driver {driver}"), is_listed)
        }
        Kind::Unknown => ("no driver is known".to_owned(), None),
    };
    let can = match (device.and_then(Device::runs_xdp), is_listed) {
        (Some(true), _) => {
            let redirects = match device.is_some_and(Device::redirects) {
                true => "",
                false => " without redirects",
            };
            format!("{what}, and the kernel reports native XDP{redirects}: by that and {tc}")
        }
        (Some(false), _) => format!("{what}, and the kernel reports no native XDP: by {tc}"),
        (None, Some(true)) => format!("{what}, which has native XDP: by that and {tc}"),
        (None, Some(false)) => format!("{what}, which has no native XDP: by {tc}"),
        (None, None) => format!("{what}, and native XDP isn't known of it: by {tc}"),
    };
    match fs::read_to_string(directory.join("operstate")) {
        Ok(state) if state.trim() == "down" => {
            Err((format!("{name} is down ({can})"), format!("set it up: ip link set {name} up")))
        }
        _ => Ok(can),
    }
}

/// What an interface is.
enum Kind {
    /// By its driver.
    Driver(String),
    /// A device above others, such as `vlan`.
    Virtual(String),
    Unknown,
}

fn driver(directory: &Path) -> Kind {
    let uevent = fs::read_to_string(directory.join("uevent")).unwrap_or_default();
    let values: BTreeMap<&str, &str> =
        uevent.lines().filter_map(|line| line.split_once('=')).collect();
    // A bond runs XDP where all its members do; that is for the kernel to find.
    if let Some(kind @ &("vlan" | "bridge" | "team" | "vxlan" | "macvlan")) = values.get("DEVTYPE")
    {
        return Kind::Virtual((*kind).to_owned());
    }
    let link = fs::read_link(directory.join("device/driver")).ok();
    let driver = link.and_then(|link| Some(link.file_name()?.to_str()?.to_owned()));
    driver.map_or(Kind::Unknown, Kind::Driver)
}

fn forwarding(name: &str, family: &str, host: &EdgeHost) -> Result<String, (String, String)> {
    let key = format!("net/{family}/conf/{name}/forwarding");
    match host.sysctl(&key).as_deref() {
        Some("0") => Err((
            format!("{name} forwards no {family} packets, so the kernel finds no way to backends"),
            match family {
                "ipv4" => "sysctl -w net.ipv4.ip_forward=1, and in /etc/sysctl.d".to_owned(),
                _ => "sysctl -w net.ipv6.conf.all.forwarding=1, and in /etc/sysctl.d".to_owned(),
            },
        )),
        Some(_) => Ok("on".to_owned()),
        None => Ok("not known: it can't be read".to_owned()),
    }
}

fn rp_filter(name: &str, host: &EdgeHost) -> Result<String, (String, String)> {
    let value = |scope: &str| -> u8 {
        let text = host.sysctl(&format!("net/ipv4/conf/{scope}/rp_filter"));
        text.and_then(|text| text.parse().ok()).unwrap_or(0)
    };
    // The greater one applies (Documentation/networking/ip-sysctl.rst).
    match value("all").max(value(name)) {
        1 => Err((
            format!(
                "strict: packets that the kernel has to route itself, such as before a neighbour is \
                 known, are dropped where {name} isn't the way back to their client"
            ),
            format!("sysctl -w net.ipv4.conf.{name}.rp_filter=2 (and conf.all, if that is 1)"),
        )),
        2 => Ok("loose".to_owned()),
        _ => Ok("off".to_owned()),
    }
}

fn source_address(source: IpAddr, host: &EdgeHost) -> Result<String, (String, String)> {
    // That an address can be bound to proves nothing (net.ipv4.ip_nonlocal_bind).
    if host.addresses.iter().any(|(_, own, _)| *own == source) {
        return Ok("an address of this host".to_owned());
    }
    Err((
        "no address of this host, so replies of backends don't come here".to_owned(),
        format!("add it: ip addr add {source} dev INTERFACE; or correct edge.source"),
    ))
}

/// The host's own connections must not use the edge's ports: a backend would see two connections of one
/// address and port.
fn source_ports(host: &EdgeHost) -> Result<String, (String, String)> {
    let range = host.sysctl("net/ipv4/ip_local_port_range").unwrap_or_default();
    let first = range.split_whitespace().next().and_then(|first| first.parse::<u16>().ok());
    let (low, high) = (SOURCE_PORTS.start(), SOURCE_PORTS.end());
    let Some(first) = first.filter(|first| first <= high) else {
        return Ok(format!("{low} to {high} of edge.source, below ip_local_port_range"));
    };
    let reserved = host.sysctl("net/ipv4/ip_local_reserved_ports").unwrap_or_default();
    if is_reserved(&reserved, first.max(*low), *high) {
        return Ok(format!("{low} to {high} of edge.source, in ip_local_reserved_ports"));
    }
    Err((
        format!(
            "this host's own connections use ports from {first} on, and the edge {low} to {high} of \
             edge.source"
        ),
        "sysctl -w net.ipv4.ip_local_port_range=\"32768 60999\", or addresses in edge.source that \
         nothing else on this host uses"
            .to_owned(),
    ))
}

/// Whether a list such as `80,1024-2000` has all ports of a range.
fn is_reserved(list: &str, first: u16, last: u16) -> bool {
    let mut ranges: Vec<(u16, u16)> = list
        .split(',')
        .filter_map(|part| {
            let (low, high) = part.split_once('-').unwrap_or((part, part));
            Some((low.trim().parse().ok()?, high.trim().parse().ok()?))
        })
        .collect();
    ranges.sort_unstable();
    let mut next = first;
    for (low, high) in ranges {
        if low > next {
            return false;
        }
        if high >= last {
            return true;
        }
        next = next.max(high + 1);
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, name: &str, text: &str) {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn an_edge_is_checked_before_it_runs() {
        let root = tempfile::tempdir().unwrap();
        let mut host = EdgeHost {
            sys: root.path().join("sys"),
            sysctl: root.path().join("sysctl"),
            devices: Vec::new(),
            addresses: vec![("eth0".to_owned(), "10.0.0.2".parse().unwrap(), 24)],
            kernel: Some((6, 1)),
        };
        write(root.path(), "sys/class/net/eth0/operstate", "up\n");
        write(root.path(), "sys/class/net/eth0/uevent", "INTERFACE=eth0\n");
        fs::create_dir_all(root.path().join("sys/class/net/eth0/device")).unwrap();
        let link = root.path().join("sys/class/net/eth0/device/driver");
        std::os::unix::fs::symlink("../../bus/pci/drivers/ixgbe", link).unwrap();
        write(root.path(), "sys/class/net/eth0.7/uevent", "DEVTYPE=vlan\nINTERFACE=eth0.7\n");
        write(root.path(), "sys/class/net/eth0.7/operstate", "down\n");
        write(root.path(), "sysctl/net/ipv4/conf/all/rp_filter", "0\n");
        write(root.path(), "sysctl/net/ipv4/conf/eth0/rp_filter", "1\n");
        write(root.path(), "sysctl/net/ipv4/conf/eth0/forwarding", "0\n");
        write(root.path(), "sysctl/net/ipv4/conf/eth0.7/forwarding", "1\n");
        write(root.path(), "sysctl/net/ipv4/ip_local_port_range", "15000\t60999\n");
        let mut config = Config::default();
        config.edge.interfaces = ["eth0", "eth0.7", "eth9"].map(str::to_owned).into();
        config.edge.source = ["10.0.0.2", "10.0.0.3"].map(|it| it.parse().unwrap()).into();
        config.vip.public = vec!["2001:db8::/64".parse().unwrap()];
        config.edge.client_address = vec!["web".to_owned()];
        let findings = |host: &EdgeHost, running: Option<&api::EdgeDocument>| {
            let found = check(&config, host, running);
            let found = found.into_iter().map(|(what, _, found)| match found {
                Ok(detail) => (what, Ok(detail)),
                Err((problem, fix)) => {
                    assert!(!fix.is_empty(), "{what}");
                    (what, Err(problem))
                }
            });
            found.collect::<BTreeMap<String, Result<String, String>>>()
        };
        let found = findings(&host, None);
        let is_wrong = |what: &str, word: &str| match &found[what] {
            Err(problem) => assert!(problem.contains(word), "{what}: {problem}"),
            Ok(detail) => panic!("{what}: {detail}"),
        };
        let is_right = |what: &str, word: &str| match &found[what] {
            Ok(detail) => assert!(detail.contains(word), "{what}: {detail}"),
            Err(problem) => panic!("{what}: {problem}"),
        };
        is_right(
            "edge interface eth0",
            "driver ixgbe, which has native XDP: by that and TC (clsact)",
        );
        is_wrong("edge interface eth0.7", "is down (vlan, which has no native XDP");
        is_wrong("edge interface eth9", "there is no interface eth9");
        is_wrong("rp_filter of eth0", "strict");
        is_right("rp_filter of eth0.7", "off");
        is_wrong("ipv4 forwarding of eth0", "no way to backends");
        is_right("ipv4 forwarding of eth0.7", "on");
        is_right("edge.source 10.0.0.2", "an address of this host");
        is_wrong("edge.source 10.0.0.3", "replies of backends don't come here");
        is_wrong("edge.source for ipv6", "vip.public has ipv6 networks");
        is_right(
            "edge.client_address",
            r#"of web need datapath.client_address_from = ["10.0.0.2", "#,
        );
        is_wrong("source ports", "use ports from 15000 on");
        assert!(!found.contains_key("addresses in vip.public"));
        host.addresses = [("2001:db8::10", 128), ("2001:db9::5", 64), ("2001:db8::6", 64)]
            .map(|(ip, prefix)| ("eth0".to_owned(), ip.parse().unwrap(), prefix))
            .into();
        let own = findings(&host, None)["addresses in vip.public"].clone().unwrap_err();
        assert!(own.starts_with("2001:db8::6 of eth0 lies in vip.public"), "{own}");

        // What the kernel reports itself, from 6.3 on, counts more than the list of drivers.
        host.kernel = Some((6, 12));
        for (features, expected) in [
            (0, "no native XDP: by TC (tcx)"),
            (1, "native XDP without redirects: by that and TC (tcx)"),
            (3, "reports native XDP: by that and TC (tcx)"),
        ] {
            let xdp_features = Some(features);
            host.devices = vec![Device { name: "eth0".into(), xdp_features, ..Device::default() }];
            let found = findings(&host, None)["edge interface eth0"].clone().unwrap();
            assert!(found.contains(expected), "{found}");
        }

        let interface = |name: &str, mode: Option<&str>| api::EdgeInterfaceDocument {
            name: name.to_owned(),
            mode: mode.map(str::to_owned),
            message: Some("words of the driver".to_owned()),
        };
        let running = api::EdgeDocument {
            interfaces: vec![interface("eth0", Some("tcx")), interface("eth0.7", None)],
            proof: None,
            flows: 0,
            capacity: 1,
            announced: Vec::new(),
            withdrawn: None,
            client_address: Vec::new(),
            packets: BTreeMap::new(),
        };
        let found = findings(&host, Some(&running));
        assert_eq!(found["edge interface eth0"], Ok("attached, tcx: words of the driver".into()));
        assert_eq!(
            found["edge interface eth0.7"],
            Err("not attached: words of the driver".to_owned())
        );
    }

    #[test]
    fn a_node_that_shows_clients_is_checked() {
        let root = tempfile::tempdir().unwrap();
        let host = EdgeHost {
            sys: root.path().join("sys"),
            sysctl: root.path().join("sysctl"),
            devices: Vec::new(),
            addresses: Vec::new(),
            kernel: Some((6, 1)),
        };
        let mut config = Config::default();
        assert_eq!(check_clients(&config, &host, None), None);
        config.datapath.client_address_from = vec![[10, 0, 0, 2].into()];
        let unit = |state: &str| api::UnitStatus {
            name: "outcomes".to_owned(),
            state: state.to_owned(),
            reason: None,
        };
        let status = |state: &str, n_no_syn| {
            let counters = [("client_shown", 5), ("client_no_syn", n_no_syn)];
            let counters = counters.map(|(name, n)| (name.to_owned(), n)).into();
            api::DatapathStatus { units: vec![unit(state)], counters, ..Default::default() }
        };
        for (cookies, status, expected) in [
            ("1", status("attached", 0), Ok("of connections from 10.0.0.2: 5 shown")),
            ("1", status("attached", 3), Err("3 connections from 10.0.0.2 showed the edge")),
            ("1", status("failed", 0), Err("the unit outcomes doesn't run: failed")),
            ("2", status("attached", 0), Err("tcp_syncookies is 2")),
        ] {
            write(root.path(), "sysctl/net/ipv4/tcp_syncookies", cookies);
            let found = check_clients(&config, &host, Some(&status)).unwrap();
            match (&found, expected) {
                (Ok(found), Ok(expected)) => assert!(found.contains(expected), "{found}"),
                (Err((problem, _)), Err(expected)) => {
                    assert!(problem.contains(expected), "{problem}")
                }
                _ => panic!("{found:?}, {expected:?}"),
            }
        }
    }

    #[test]
    fn reserved_ports() {
        for (list, expected) in [
            ("", false),
            ("1024-32767", true),
            ("80,1000-20000,20001-40000", true),
            ("20001-40000,1000-20000", true),
            ("1000-20000,20002-40000", false),
            ("1025-40000", false),
            ("1024", false),
        ] {
            assert_eq!(is_reserved(list, 1_024, 32_767), expected, "{list}");
        }
    }
}
