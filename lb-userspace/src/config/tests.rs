use std::path::Path;

use super::keys::{KEYS, KeyChange, changes};
use super::*;

/// The problems of a file, without an environment and without flags, each as `LINE: ...`.
fn check(text: &str) -> Result<Config, Vec<String>> {
    check_all(text, &[], &[])
}

fn check_all(text: &str, flags: &[Flag], env: &[(&str, &str)]) -> Result<Config, Vec<String>> {
    let env = |name: &str| {
        env.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
    };
    LoadedConfig::parse(Path::new("f"), text.as_bytes(), flags, &env)
        .map(|loaded| loaded.config)
        .map_err(|errors| errors.to_string().lines().map(str::to_owned).collect())
}

fn flag(name: &'static str, key: &'static str, text: &str) -> Flag {
    Flag { name, key, value: FlagValue::Text(text.into()) }
}

#[test]
fn nothing_said_means_the_defaults() {
    assert_eq!(check(""), Ok(Config::default()));
}

#[test]
fn the_defaults_written_out_are_the_defaults() {
    let text = r#"
        cgroup = "auto"
        bpffs = "/sys/fs/bpf/nohop"
        state_dir = "/var/lib/nohop"
        on_exit = "keep"
        [catalog]
        sources = ["consul"]
        file = ""
        tag = "routed"
        meta = {}
        health = "passing"
        address = "lan"
        [balance]
        algorithm = "least"
        key = "cgroup"
        slow_start = "10s"
        prefer = "none"
        eject = { failures = 3, refused = 1, silence = 20, base = "1s", max = "5m", share = 0.5 }
        all_critical = "refuse"
        keep_for = "1m"
        drain_deadline = ""
        [consul]
        address = "http://127.0.0.1:8500"
        ca_file = ""
        ca_path = ""
        cert_file = ""
        key_file = ""
        tls_server_name = ""
        verify = true
        token_file = ""
        datacenter = ""
        namespace = ""
        partition = ""
        max_connections = 64
        [vip]
        pool = "127.128.0.0/9"
        pool6 = ""
        ports = [80]
        pins = {}
        public = []
        [edge]
        interfaces = []
        source = []
        vips = {}
        client_address = []
        [dns]
        listen = ["127.0.0.1:53"]
        listen_tls = []
        tls_cert_file = ""
        tls_key_file = ""
        domain = "service"
        ttl = 30
        forward = "resolv.conf"
        routes = { consul = "127.0.0.1:8600" }
        unrouted = "nxdomain"
        allow = ["local"]
        client_rate = 10000
        kernel = true
        kernel_mode = "always"
        intercept = false
        log = false
        [datapath]
        max_services = 16384
        max_backends = 131072
        exclude_cgroups = []
        client_address_from = []
        [admin]
        listen = ["unix:/run/nohop/admin.sock"]
        hosts = []
        trace = true
        access_log = false
    "#;
    assert_eq!(check(text), Ok(Config::default()));
}

const EVERY_KEY: &str = r#"
    cgroup = "/sys/fs/cgroup/web"
    bpffs = "/b"
    state_dir = "/s"
    on_exit = "detach"
    shadow = true
    [catalog]
    sources = ["file"]
    file = "/c.toml"
    tag = "t"
    meta = { stage = "live" }
    health = "warning"
    address = "wan_ipv6"
    watch = "all"
    max_age = "15m"
    expired = "refuse"
    [balance]
    algorithm = "round-robin"
    key = "source"
    slow_start = ""
    prefer = "datacenter"
    all_critical = "keep"
    keep_for = "2m"
    drain_deadline = "1h"
    eject = { failures = 0, share = 1, max = "1h", silence = 255 }
    [consul]
    address = "https://[::1]:8501/"
    ca_file = "/ca.pem"
    ca_path = "/ca"
    cert_file = "/cert.pem"
    key_file = "/key.pem"
    tls_server_name = "server.dc1.consul"
    verify = false
    token_file = "/token"
    datacenter = "dc2"
    namespace = "team-a"
    partition = "part_b"
    max_connections = 4
    [vip]
    pool = "127.64.0.0/16"
    pool6 = "fd6e::/64"
    ports = [80, 0x1bb]
    pins = { Hello = "127.0.0.1:80", other = "10.0.0.9:80" }
    public = ["203.0.113.0/24", "2001:db8:1::/64", "198.51.100.7"]
    [edge]
    interfaces = ["eth0", "eth1.100"]
    source = ["10.0.0.2", "2001:db8::2"]
    vips = { Web = "203.0.113.10:80" }
    client_address = ["Web", "api"]
    max_flows = 1048576
    timeouts = { established = "2h", udp = "20s" }
    [dns]
    listen = ["127.0.0.2:53", "[::1]:53"]
    listen_tls = ["10.0.0.9:853"]
    tls_cert_file = "/dns.pem"
    tls_key_file = "/dns.key"
    domain = "Svc.Local."
    ttl = 0
    forward = ["10.0.0.1", "[2001:db8::1]:5353"]
    routes = { "Corp.Example" = "10.0.0.2" }
    unrouted = "forward"
    allow = ["10.1.2.3/8", "fd00::1", "local"]
    client_rate = 0
    kernel = false
    kernel_mode = "standby"
    intercept = ["nomad.slice", "/sys/fs/cgroup/docker/"]
    log = true
    [datapath]
    max_services = 100
    max_backends = 200
    exclude_cgroups = ["system.slice/consul.service", "/sys/fs/cgroup/a/"]
    client_address_from = ["10.0.0.2", "10.0.0.3"]
    [admin]
    listen = ["127.0.0.1:9000", "unix:/a.sock"]
    hosts = ["Nohop.example"]
    trace = false
    access_log = true
"#;

#[test]
fn every_key_is_taken() {
    let expected = Config {
        cgroup: Some("/sys/fs/cgroup/web".into()),
        bpffs: "/b".into(),
        state_dir: "/s".into(),
        on_exit: OnExit::Detach,
        shadow: true,
        catalog: CatalogConfig {
            sources: vec![SourceKind::File("/c.toml".into())],
            tag: "t".into(),
            meta: BTreeMap::from([("stage".into(), "live".into())]),
            health: HealthPolicy::Warning,
            address: AddressChoice::WanIpv6,
            watch: WatchPolicy::All,
            max_age: Duration::from_secs(900),
            expired: Expired::Refuse,
        },
        balance: BalanceConfig {
            algorithm: BalanceAlgorithm::RoundRobin,
            key: AffinityKey::Source,
            slow_start: None,
            prefer: Preference::Datacenter,
            eject: EjectConfig {
                failures: 0,
                silence: 255,
                max: Duration::from_secs(3600),
                share: Share { per_mille: 1000 },
                ..EjectConfig::default()
            },
            all_critical: AllCritical::Keep,
            keep_for: Duration::from_secs(120),
            drain_deadline: Some(Duration::from_secs(3600)),
        },
        consul: ConsulConfig {
            address: ConsulAddress::Https("[::1]:8501".into()),
            tls: TlsConfig {
                ca_file: Some("/ca.pem".into()),
                ca_path: Some("/ca".into()),
                cert_file: Some("/cert.pem".into()),
                key_file: Some("/key.pem".into()),
                server_name: Some("server.dc1.consul".into()),
                verify: false,
            },
            token: Some(Token::File("/token".into())),
            auth: None,
            datacenter: "dc2".into(),
            namespace: "team-a".into(),
            partition: "part_b".into(),
            max_connections: 4,
        },
        vip: VipConfig {
            pool: "127.64.0.0/16".parse().unwrap(),
            pool6: Some("fd6e::/64".parse().unwrap()),
            ports: vec![80, 443],
            pins: BTreeMap::from([
                ("hello".into(), "127.0.0.1:80".parse().unwrap()),
                ("other".into(), "10.0.0.9:80".parse().unwrap()),
            ]),
            public: ["203.0.113.0/24", "2001:db8:1::/64", "198.51.100.7/32"]
                .map(|network| network.parse().unwrap())
                .into(),
        },
        edge: EdgeConfig {
            interfaces: vec!["eth0".into(), "eth1.100".into()],
            source: vec!["10.0.0.2".parse().unwrap(), "2001:db8::2".parse().unwrap()],
            vips: BTreeMap::from([("web".into(), "203.0.113.10:80".parse().unwrap())]),
            client_address: vec!["web".into(), "api".into()],
            max_flows: 1_048_576,
            timeouts: FlowTimeouts {
                established: Duration::from_secs(7_200),
                udp: Duration::from_secs(20),
                ..FlowTimeouts::default()
            },
        },
        dns: DnsConfig {
            listen: vec!["127.0.0.2:53".parse().unwrap(), "[::1]:53".parse().unwrap()],
            listen_tls: vec!["10.0.0.9:853".parse().unwrap()],
            tls_cert_file: Some("/dns.pem".into()),
            tls_key_file: Some("/dns.key".into()),
            domain: "svc.local".into(),
            ttl: 0,
            forward: Forward::Servers(vec![
                "10.0.0.1:53".parse().unwrap(),
                "[2001:db8::1]:5353".parse().unwrap(),
            ]),
            routes: BTreeMap::from([("corp.example".into(), "10.0.0.2:53".parse().unwrap())]),
            unrouted: Unrouted::Forward,
            allow: vec![
                Allowed::Network("10.0.0.0/8".parse().unwrap()),
                Allowed::Network("fd00::1/128".parse().unwrap()),
                Allowed::Local,
            ],
            client_rate: 0,
            kernel: false,
            kernel_mode: KernelMode::Standby,
            intercept: Intercepted::Cgroups(vec![
                "nomad.slice".into(),
                "/sys/fs/cgroup/docker".into(),
            ]),
            log: true,
        },
        datapath: DatapathConfig {
            max_services: 100,
            max_backends: 200,
            exclude_cgroups: vec!["system.slice/consul.service".into(), "/sys/fs/cgroup/a".into()],
            client_address_from: vec![[10, 0, 0, 2].into(), [10, 0, 0, 3].into()],
        },
        admin: AdminConfig {
            listen: vec![
                AdminAddress::Tcp("127.0.0.1:9000".parse().unwrap()),
                AdminAddress::Unix("/a.sock".into()),
            ],
            hosts: vec!["nohop.example".into()],
            trace: TraceAccess::Off,
            access_log: true,
        },
    };
    assert_eq!(check(EVERY_KEY), Ok(expected));
}

#[test]
fn what_is_wrong_is_named_with_its_line_and_its_fix() {
    let too_many: Vec<_> = (0..1025).map(|n| format!("'c{n}'")).collect();
    let too_many = format!("datapath.exclude_cgroups = ['*', {}]", too_many.join(", "));
    let many_ports = format!("vip.ports = {:?}", (1..=65).collect::<Vec<u16>>());
    let table: &[(&str, &[&str])] = &[
        // Not TOML.
        ("state_dir = ", &["f:1: not TOML: string values must be quoted, expected literal string"]),
        ("\n[dns]\nttl = 5\nttl = 6", &["f:4: not TOML: duplicate key ttl; remove one"]),
        // Unknown keys.
        (
            "[dns]\ndomian = 'x'",
            &["f:2: dns.domian: unknown key; did you mean dns.domain? else remove it"],
        ),
        ("pool = 'x'", &["f:1: pool: unknown key; did you mean vip.pool? else remove it"]),
        (
            "consul.token = 'x'",
            &["f:1: consul.token: unknown key; did you mean consul.token_file? else remove it"],
        ),
        ("[dsn]\nttl = 3", &["f:1: dsn: unknown key; did you mean dns? else remove it"]),
        ("zebra = 1", &["f:1: zebra: unknown key; remove it"]),
        (
            "vip.pins.a.b = '127.0.0.1:80'",
            &["f:1: vip.pins.a: expected a string, found a table; write one in quotes"],
        ),
        // Keys of later versions.
        (
            "catalog.health = 'any'",
            &["f:1: catalog.health: 'any' is invalid; write `passing` or `warning`"],
        ),
        (
            "identity.on = true\n[edge]\ninterface = 'eth0'",
            &[
                "f:1: identity.on: is planned, not in this version; remove it",
                "f:3: edge.interface: unknown key; did you mean edge.interfaces? else remove it",
            ],
        ),
        (
            "dns.cache = 1\nnomad = 5\ncatalog.sources = ['nomad']",
            &[
                "f:1: dns.cache: is planned, not in this version; remove it",
                "f:2: nomad: is planned, not in this version; remove it",
                "f:3: catalog.sources: the source \"nomad\" is planned, not in this version; remove it",
            ],
        ),
        (
            "catalog.sources = ['consul', 'file', 'consul', 'dns']\ncatalog.file = '/c'",
            &[
                "f:1: catalog.sources: duplicate element 'consul'; remove one",
                "f:1: catalog.sources: 'dns' is invalid; write `consul` or `file`",
            ],
        ),
        // Public VIPs and the edge.
        (
            "[vip]\npublic = ['203.0.113.9/24', 'public', '127.0.0.0/7', '224.1.0.0/16', '::/0', 7]",
            &[
                "f:2: vip.public: 203.0.113.9/24 has bits below its prefix; write 203.0.113.0/24",
                "f:2: vip.public: 'public' isn't a network; write one such as 203.0.113.0/24",
                "f:2: vip.public: 127.0.0.0/7 has bits below its prefix; write 126.0.0.0/7",
                "f:2: vip.public: 224.1.0.0/16 overlaps 224.0.0.0/3, whose addresses clients of other \
                 hosts can't use; write one such as 203.0.113.0/24",
                "f:2: vip.public: ::/0 overlaps ::/64, whose addresses clients of other hosts can't \
                 use; write one such as 203.0.113.0/24",
                "f:2: vip.public: expected a string, found an integer; write one in quotes",
            ],
        ),
        (
            "vip.public = ['10.1.0.0/24', '10.2.0.0/24', '10.3.0.0/24', '10.4.0.0/24', '10.5.0.0/24']",
            &[
                "f:1: vip.public: has 5 networks, and 4 is the most, since each connection is compared \
                 to every one; write larger ones",
            ],
        ),
        (
            "[vip]\npublic = ['10.1.0.0/24', '10.0.0.0/8', 'fd00::/16']\npool6 = 'fd00::/96'\n\
             pins = { web = '10.1.0.1:80' }\n[dns]\nroutes = { corp = '10.9.0.1' }",
            &[
                "f:2: vip.public: 10.1.0.0/24 and 10.0.0.0/8 overlap; write one network in place of both",
                "f:2: vip.public: 10.0.0.0/8 has 10.9.0.1:53, which is dns.routes; write smaller \
                 networks, of public VIPs alone",
                "f:2: vip.public: fd00::/16 overlaps vip.pool6 fd00::/96; choose networks apart",
                "f:4: vip.pins: web = \"10.1.0.1:80\" lies in vip.public 10.1.0.0/24; remove the pin, \
                 and write nohop-public = \"10.1.0.1:80\" in the service's Meta",
                "f:4: vip.pins: web = \"10.1.0.1:80\" lies in vip.public 10.0.0.0/8; remove the pin, and \
                 write nohop-public = \"10.1.0.1:80\" in the service's Meta",
            ],
        ),
        (
            "[edge]\ninterfaces = ['lo', 'a/b', 'sixteen-letters!', '', 'eth0', 'eth0']\n\
             source = ['::1', '10.0.0', '0.0.0.0']\nvips = { web = '10.0.0.1', db = '127.0.0.1:80' }",
            &[
                "f:2: edge.interfaces: lo has no packets of other hosts; write one such as eth0",
                "f:2: edge.interfaces: 'a/b' isn't the name of an interface; write one such as eth0",
                "f:2: edge.interfaces: 'sixteen-letters!' isn't the name of an interface; write one such \
                 as eth0",
                "f:2: edge.interfaces: '' isn't the name of an interface; write one such as eth0",
                "f:2: edge.interfaces: duplicate element 'eth0'; remove one",
                "f:3: edge.source: ::1 lies in ::/64, where no backend replies to; write an address of \
                 this host, such as 10.0.0.2",
                "f:3: edge.source: '10.0.0' isn't an address; write an address of this host, such as \
                 10.0.0.2",
                "f:3: edge.source: 0.0.0.0 lies in 0.0.0.0/8, where no backend replies to; write an \
                 address of this host, such as 10.0.0.2",
                "f:4: edge.vips.db: 127.0.0.1:80 lies in 127.0.0.0/8, which isn't public; write \
                 ADDR:PORT, such as 203.0.113.10:80",
                "f:4: edge.vips.web: '10.0.0.1' isn't a public VIP; write ADDR:PORT, such as \
                 203.0.113.10:80",
            ],
        ),
        (
            "edge.source = ['10.0.0.1', '10.0.0.2', '10.0.0.3', '10.0.0.4', '10.0.0.5', 'fd00::1']",
            &["f:1: edge.source: has 5 IPv4 addresses, and 4 is the most; write fewer"],
        ),
        (
            "edge.client_address = ['a b', 'web', 'Web']\n\
             datapath.client_address_from = ['fd00::1', '127.0.0.1', '10.0.0.0/8']",
            &[
                "f:1: edge.client_address: 'a b' isn't a DNS label; write 1 to 63 letters, digits, - and _",
                "f:1: edge.client_address: duplicate element 'Web'; remove one",
                "f:2: datapath.client_address_from: fd00::1 is IPv6, which has no clients' addresses; \
                 remove it",
                "f:2: datapath.client_address_from: 127.0.0.1 lies in 127.0.0.0/8, where no backend replies \
                 to; write an address of this host, such as 10.0.0.2",
                "f:2: datapath.client_address_from: '10.0.0.0/8' isn't an address; write an address of this \
                 host, such as 10.0.0.2",
            ],
        ),
        (
            "edge.timeouts = { established = '8d', tcp = '1m' }\nedge.max_flows = 1000",
            &[
                "f:1: edge.timeouts.established: '8d' is out of range; write 7d or less",
                "f:1: edge.timeouts.tcp: unknown entry; established, half_closed, closed and udp are known",
                "f:2: edge.max_flows: 1000 is out of range; write a number from 1024 to 16777216",
            ],
        ),
        (
            "edge.interfaces = ['eth0']\ncatalog.watch = 'used'",
            &[
                "f:1: edge.interfaces: needs edge.source; write an address of this host that backends \
                 can reply to",
                "f:2: catalog.watch: an edge watches all services, since clients outside use them; \
                 remove catalog.watch, or write \"all\"",
            ],
        ),
        (
            "edge.source = ['10.0.0.2']\nedge.vips = { web = '203.0.113.1:80' }\n\
             vip.public = ['203.0.113.0/24', '10.0.0.0/8']",
            &[
                "f:1: edge.source: 10.0.0.2 lies in vip.public 10.0.0.0/8; write an address of this host \
                 outside of it",
                "f:1: edge.source: needs edge.interfaces; name those where packets arrive, such as \
                 [\"eth0\"]",
                "f:2: edge.vips: needs edge.interfaces; name those where packets arrive, such as \
                 [\"eth0\"]",
            ],
        ),
        (
            "[edge]\ninterfaces = ['eth0']\nsource = ['10.0.0.2']\n\
             vips = { a = '203.0.113.1:80', b = '203.0.113.1:80', c = '[2001:db8::1]:80' }",
            &[
                "f:4: edge.vips: a = \"203.0.113.1:80\" lies in no network of vip.public; add \
                 203.0.113.1/32 to it on all nodes",
                "f:4: edge.vips: b = \"203.0.113.1:80\" lies in no network of vip.public; add \
                 203.0.113.1/32 to it on all nodes",
                "f:4: edge.vips: a and b both have 203.0.113.1:80; give one another address or port",
                "f:4: edge.vips: c = \"[2001:db8::1]:80\" lies in no network of vip.public; add \
                 2001:db8::1/128 to it on all nodes",
                "f:4: edge.vips: c = \"[2001:db8::1]:80\" needs an IPv6 address in edge.source; add one \
                 of this host",
            ],
        ),
        // Former names.
        (
            "catalog.source = 'file'\n[plane]\nmax_services = 5\nmax_backends = 5",
            &[
                "f:1: catalog.source: is called catalog.sources now, a list: [\"consul\"]; rename it",
                "f:3: plane.max_services: is called datapath.max_services now; rename it",
                "f:4: plane.max_backends: is called datapath.max_backends now; rename it",
            ],
        ),
        ("[plane]\nttl = 5", &["f:2: plane.ttl: unknown key; [plane] is called [datapath] now"]),
        ("[plane]", &["f:1: plane: is called datapath now; rename it"]),
        // Wrong types.
        ("dns = 5", &["f:1: dns: expected a table, found an integer; write [dns]"]),
        (
            "[dns]\nttl = '30'",
            &["f:2: dns.ttl: expected an integer, found a string; write one without quotes"],
        ),
        (
            "vip.ports = 80",
            &["f:1: vip.ports: expected an array, found an integer; write a list in brackets"],
        ),
        (
            "state_dir = true",
            &["f:1: state_dir: expected a string, found a boolean; write one in quotes"],
        ),
        (
            "balance.eject = 3",
            &["f:1: balance.eject: expected a table, found an integer; write { NAME = VALUE }"],
        ),
        // Values out of range.
        (
            "balance.algorithm = 'fastest'",
            &[
                "f:1: balance.algorithm: 'fastest' is invalid; write one of `random`, `round-robin`, \
                 `least`, `latency`, `maglev`",
            ],
        ),
        (
            "[balance]\nslow_start = '61m'\ndrain_deadline = '0s'\nkeep_for = ''",
            &[
                "f:2: balance.slow_start: '61m' is out of range; write 1h or less",
                "f:3: balance.drain_deadline: '0s' isn't a duration; write one such as 90s, 15m, 1h \
                 or 2d, up to 365d",
                "f:4: balance.keep_for: '' isn't a duration; write one such as 90s, 15m, 1h or 2d, \
                 up to 365d",
            ],
        ),
        (
            "[balance.eject]\nfailures = 256\nshare = 1.5\nmax = '2h'\nbase = 1\nfail = 2",
            &[
                "f:2: balance.eject.failures: 256 is out of range; write a number from 0 to 255",
                "f:3: balance.eject.share: 1.5 is out of range; write a number from 0 to 1",
                "f:4: balance.eject.max: '2h' is out of range; write 1h or less",
                "f:5: balance.eject.base: expected a string, found an integer; write one in quotes",
                "f:6: balance.eject.fail: unknown entry; failures, refused, silence, base, max and \
                 share are known",
            ],
        ),
        (
            "balance.eject = { share = nan, silence = -1, refused = '1' }",
            &[
                "f:1: balance.eject.refused: expected an integer, found a string; write one without quotes",
                "f:1: balance.eject.share: nan is out of range; write a number from 0 to 1",
                "f:1: balance.eject.silence: -1 is out of range; write a number from 0 to 255",
            ],
        ),
        (
            "balance.eject = { base = '6m' }",
            &["f:1: balance.eject: base is longer than max; write a base of max or less"],
        ),
        (
            "dns.allow = ['local', 'lan', '10.0.0.0/33']",
            &[
                "f:1: dns.allow: 'lan' isn't a network; write one such as 10.0.0.0/8, or \"local\"",
                "f:1: dns.allow: '10.0.0.0/33' isn't a network; write one such as 10.0.0.0/8, or \
                 \"local\"",
            ],
        ),
        (
            "dns.unrouted = 'drop'",
            &["f:1: dns.unrouted: 'drop' is invalid; write `nxdomain` or `forward`"],
        ),
        ("dns.ttl = -1", &["f:1: dns.ttl: -1 is out of range; write a number from 0 to 86400"]),
        ("vip.ports = []", &["f:1: vip.ports: is empty; write at least one element"]),
        (
            "vip.ports = [80,\n0,\n70000,\n80]",
            &[
                "f:2: vip.ports: 0 is out of range; write a number from 1 to 65535",
                "f:3: vip.ports: 70000 is out of range; write a number from 1 to 65535",
                "f:4: vip.ports: duplicate element 80; remove one",
            ],
        ),
        (
            "datapath.max_services = 0",
            &["f:1: datapath.max_services: 0 is out of range; write a number from 1 to 1000000"],
        ),
        (
            "vip.pool = '10.0.0.0/8'",
            &[
                "f:1: vip.pool: 10.0.0.0/8 isn't within 127.0.0.0/8; write one such as 127.128.0.0/9",
            ],
        ),
        (
            "vip.pool = '127.128.0.1/9'",
            &["f:1: vip.pool: 127.128.0.1/9 has bits below its prefix; write 127.128.0.0/9"],
        ),
        (
            "vip.pool6 = 'fc00::/64'",
            &[
                "f:1: vip.pool6: fc00::/64 isn't within fd00::/8; write one such as fd6e:6f68:6f70::/96",
            ],
        ),
        (
            "vip.pool6 = 'fd00::1/64'",
            &["f:1: vip.pool6: fd00::1/64 has bits below its prefix; write fd00::/64"],
        ),
        (
            "vip.pool6 = 'fd00::/63'",
            &["f:1: vip.pool6: fd00::/63 has a prefix of 63; write one from /64 to /120"],
        ),
        (
            "vip.pool6 = '10.0.0.0/8'",
            &[
                "f:1: vip.pool6: '10.0.0.0/8' isn't an IPv6 network; write one such as fd6e:6f68:6f70::/96, or \"\" for none",
            ],
        ),
        ("on_exit = 'stay'", &["f:1: on_exit: 'stay' is invalid; write `keep` or `detach`"]),
        ("bpffs = 'b'", &["f:1: bpffs: 'b' isn't an absolute path; write one that begins with /"]),
        (
            "catalog.sources = ['file']\ncatalog.file = 'c.toml'\nconsul.token_file = 't'\n\
             dns.tls_key_file = './k'",
            &[
                "f:2: catalog.file: 'c.toml' isn't an absolute path; write one that begins with /",
                "f:3: consul.token_file: 't' isn't an absolute path; write one that begins with /",
                "f:4: dns.tls_key_file: './k' isn't an absolute path; write one that begins with /",
            ],
        ),
        (
            &many_ports,
            &["f:1: vip.ports: has 65 ports, and 64 is the most; write those of most \
                         services, and have the others name their own"],
        ),
        (
            "datapath.exclude_cgroups = ['/', '',\n'a/../..', 'a', './a', 'a']",
            &[
                "f:1: datapath.exclude_cgroups: '/' isn't a cgroup below the root; write one such as 'system.slice'",
                "f:1: datapath.exclude_cgroups: '' isn't a cgroup below the root; write one such as 'system.slice'",
                "f:2: datapath.exclude_cgroups: 'a/../..' isn't a cgroup below the root; write one such as 'system.slice'",
                "f:2: datapath.exclude_cgroups: duplicate element 'a'; remove one",
            ],
        ),
        (
            "datapath.exclude_cgroups = ['nomad.slice/**/a', '*/a?', 'nomad.slice/*/*.envoy-*.scope']",
            &[
                "f:1: datapath.exclude_cgroups: 'nomad.slice/**/a' has a '**', which would span directories; write a '*' for each level, as in 'nomad.slice/*/*.envoy-*.scope'",
            ],
        ),
        (
            "dns.intercept = 'yes'",
            &["f:1: dns.intercept: expected true, false or an array of cgroups, found a string"],
        ),
        ("dns.intercept = []", &["f:1: dns.intercept: is empty; write at least one element"]),
        (
            &too_many,
            &[
                "f:1: datapath.exclude_cgroups: names 1025 cgroups; at most 1024 can be excluded: name a cgroup that several of them are below",
            ],
        ),
        (
            "datapath.exclude_cgroups = ['*', 'a','b','c','d','e','f','g','h','i','j','k','l','m','n','o','p']",
            &[],
        ),
        (
            "vip.pool = 'x'",
            &["f:1: vip.pool: 'x' isn't a network; write one such as 127.128.0.0/9"],
        ),
        ("consul.address = 'https://c:8501'", &[]),
        ("consul.address = 'unix:///run/consul.sock'", &[]),
        (
            "consul.address = 'unix://run/consul.sock'",
            &[
                "f:1: consul.address: 'unix://run/consul.sock' isn't an address of a Consul agent; write http://HOST:PORT, https://HOST:PORT or unix:///PATH",
            ],
        ),
        (
            "consul.address = 'https://me:secret@c:8501'",
            &[
                "f:1: consul.address: an address can't have a user; write c:8501 here, and USER:PASSWORD into CONSUL_HTTP_AUTH",
            ],
        ),
        ("consul.address = 'c'", &[]),
        ("consul.address = 'node.7.consul'", &[]),
        (
            "consul.address = 'http://node.7:8500'",
            &[
                "f:1: consul.address: 'http://node.7:8500' has a host that no URL can have (invalid IPv4 address); write the agent's IP address, or another name of it",
            ],
        ),
        ("consul.address = 'https://consul.example.com/'", &[]),
        ("consul.address = '[::1]'", &[]),
        (
            "consul.address = '8500'",
            &[
                "f:1: consul.address: '8500' isn't an address of a Consul agent; write http://HOST:PORT, https://HOST:PORT or unix:///PATH",
            ],
        ),
        (
            "consul.address = 'https://c/consul'",
            &[
                "f:1: consul.address: 'https://c/consul' isn't an address of a Consul agent; write http://HOST:PORT, https://HOST:PORT or unix:///PATH",
            ],
        ),
        (
            "consul.namespace = 'a b'\nconsul.partition = '/'",
            &[
                "f:1: consul.namespace: 'a b' isn't a namespace of Consul; write letters, digits, - and _",
                "f:2: consul.partition: '/' isn't a partition of Consul; write letters, digits, - and _",
            ],
        ),
        (
            "consul.ca_file = '/ca.pem'",
            &[
                "f:1: consul.ca_file: has no effect, because 127.0.0.1:8500 is used without TLS; write https://HOST:PORT as consul.address, or remove this",
            ],
        ),
        (
            "[consul]\naddress = 'unix:///c.sock'\nverify = false",
            &[
                "f:3: consul.verify: has no effect, because unix:///c.sock is used without TLS; write https://HOST:PORT as consul.address, or remove this",
            ],
        ),
        (
            "[consul]\naddress = 'https://c:1'\ntls_server_name = 'a b'",
            &[
                "f:3: consul.tls_server_name: 'a b' isn't a host name; write one such as server.dc1.consul",
            ],
        ),
        (
            "[consul]\naddress = 'https://c:1'\ntls_server_name = 'node.0x7'",
            &[
                "f:3: consul.tls_server_name: 'node.0x7' isn't a host name; write one such as server.dc1.consul",
            ],
        ),
        (
            "catalog.address = 'v6'",
            &[
                "f:1: catalog.address: 'v6' is invalid; write one of `lan`, `wan`, `lan_ipv4`, `lan_ipv6`, `wan_ipv4`, `wan_ipv6`",
            ],
        ),
        (
            "catalog.meta = { stage = 1, '' = 'x' }",
            &[
                "f:1: catalog.meta.: is empty; write a value",
                "f:1: catalog.meta.stage: expected a string, found an integer; write one in quotes",
            ],
        ),
        (
            "dns.listen = ['localhost:53']",
            &["f:1: dns.listen: 'localhost:53' isn't an address; write ADDR:PORT, port 1 to 65535"],
        ),
        (
            "dns.domain = 'a..b'",
            &[
                "f:1: dns.domain: 'a..b' isn't a DNS name; write labels of letters, digits, - and _ between dots",
            ],
        ),
        (
            "dns.forward = 'google'",
            &[
                "f:1: dns.forward: 'google' isn't a nameserver; write ADDR or ADDR:PORT, a list of these, or \"resolv.conf\"",
            ],
        ),
        (
            "admin.hosts = ['nohop:9153']",
            &[
                "f:1: admin.hosts: 'nohop:9153' is neither a DNS name nor an IP address; write one without brackets and port",
            ],
        ),
        ("admin.hosts = ['10.0.0.7', 'fd00::7', 'nohop.example']", &[]),
        (
            "admin.trace = 'all'",
            &["f:1: admin.trace: 'all' is neither true, false nor \"tcp\"; write one of them"],
        ),
        ("admin.trace = 'tcp'", &[]),
        (
            "admin.listen = ['0.0.0.0:9153']",
            &[
                "f:1: admin.listen: other hosts may reach 0.0.0.0:9153, and admin.hosts is empty: list there the names and addresses under which they do, or listen on a loopback or private address",
            ],
        ),
        (
            "admin.listen = ['127.0.0.1:9153', '[::]:9153', '203.0.113.7:9153']",
            &[
                "f:1: admin.listen: other hosts may reach [::]:9153 and 203.0.113.7:9153, and admin.hosts is empty: list there the names and addresses under which they do, or listen on a loopback or private address",
            ],
        ),
        ("admin.listen = ['0.0.0.0:9153']\nadmin.hosts = ['nohop.example']", &[]),
        ("admin.listen = ['127.0.0.1:1', '10.0.0.7:1', '[fd00::7]:1', '[::ffff:10.0.0.8]:1']", &[]),
        (
            "admin.listen = ['unix:x']",
            &["f:1: admin.listen: 'unix:x' isn't an absolute path; write unix:/PATH"],
        ),
        (
            "vip.pins = { 'a.b' = '127.0.0.1:80' }",
            &["f:1: vip.pins.a.b: 'a.b' isn't a DNS label; write 1 to 63 letters, digits, - and _"],
        ),
        // Values that contradict each other.
        (
            "[vip]\npins = { a = '127.128.0.1:80' }",
            &[
                "f:2: vip.pins: a = \"127.128.0.1:80\" lies in vip.pool 127.128.0.0/9; pin it to an address outside, or choose another pool",
            ],
        ),
        (
            "[vip]\npins = { a = '127.0.0.1:80', b = '127.0.0.1:80' }",
            &["f:2: vip.pins: a and b are both pinned to 127.0.0.1:80; give one another address"],
        ),
        ("[vip]\npins = { a = '127.0.0.1:80', b = '127.0.0.1:81', c = '10.0.0.1:80' }", &[]),
        (
            "vip.pins = { a = '127.0.0.1:8500' }",
            &[
                "f:1: vip.pins: a is pinned to 127.0.0.1:8500, which consul.address needs; give it another address",
            ],
        ),
        (
            "\nvip.pool = '127.9.0.0/24'",
            &[
                "f:2: vip.pool: 127.9.0.0/24 has 254 usable addresses and datapath.max_services is 16384; widen the pool, or set max_services = 254 or less",
            ],
        ),
        ("vip.pool = '127.9.0.0/24'\ndatapath.max_services = 254", &[]),
        (
            "vip.pool6 = 'fd00::/120'",
            &[
                "f:1: vip.pool6: fd00::/120 has 254 usable addresses and datapath.max_services is 16384; widen the pool, or set max_services = 254 or less",
            ],
        ),
        (
            "vip.pool6 = 'fd00::/96'\ndns.listen = ['[fd00::1]:53']",
            &[
                "f:2: dns.listen: [fd00::1]:53 lies in vip.pool6 fd00::/96; choose an address outside, or another pool",
            ],
        ),
        (
            "vip.pool = '127.0.0.0/9'",
            &[
                "f:1: vip.pool: 127.0.0.0/9 contains 127.0.0.1; choose a pool elsewhere, such as 127.128.0.0/9",
            ],
        ),
        (
            "dns.listen = ['127.200.0.1:53']",
            &[
                "f:1: dns.listen: 127.200.0.1:53 lies in vip.pool 127.128.0.0/9; choose an address outside, or another pool",
            ],
        ),
        (
            "dns.forward = '127.0.0.1'",
            &[
                "f:1: dns.forward: 127.0.0.1:53 is nohop itself, so queries would loop; name another",
            ],
        ),
        (
            "dns.forward = []\ndns.unrouted = 'forward'",
            &[
                "f:2: dns.unrouted: there is no resolver to forward names of the zone to; write \"nxdomain\", or name one in dns.forward",
            ],
        ),
        (
            "dns.domain = 'consul'",
            &["f:1: dns.domain: nohop answers names below consul itself; remove the route"],
        ),
        (
            "dns.listen_tls = ['10.0.0.9:853']\ndns.tls_cert_file = '/c.pem'",
            &["f:1: dns.listen_tls: needs dns.tls_key_file; name a PEM file"],
        ),
        (
            "dns.listen_tls = ['127.0.0.1:53']\ndns.tls_cert_file = '/c'\ndns.tls_key_file = '/k'",
            &["f:1: dns.listen_tls: 127.0.0.1:53 is in dns.listen, too; choose another port"],
        ),
        (
            "catalog.sources = ['file']",
            &[
                "f:1: catalog.sources: has \"file\", but catalog.file is empty; add file = \"/PATH\" under [catalog]",
            ],
        ),
        (
            "catalog.file = '/c'",
            &[
                "f:1: catalog.file: a file is read only with sources = [\"file\"]; add that, or remove this",
            ],
        ),
        // Addresses of which the daemon itself would have one in use when it binds another.
        (
            "[dns]\nlisten = ['0.0.0.0:5399', '127.0.0.1:5399']\n[admin]\n\
             listen = ['127.0.0.1:5399', '127.0.0.1:5398', '[::ffff:127.0.0.1]:5398', \
             'unix:/run/../run//x', 'unix:/run/./x']",
            &[
                "f:2: dns.listen: 0.0.0.0:5399 includes 127.0.0.1:5399; remove one, or choose another \
                 port",
                "f:4: admin.listen: 0.0.0.0:5399 of dns.listen includes 127.0.0.1:5399; remove one, or \
                 choose another port",
                "f:4: admin.listen: 127.0.0.1:5398 and [::ffff:127.0.0.1]:5398 are one address; remove \
                 one",
                "f:4: admin.listen: unix:/run/../run//x and unix:/run/./x are one path; remove one",
            ],
        ),
        (
            "dns.listen = ['10.0.0.1:53', '[fd00::1]:54']\nadmin.hosts = ['n']\n\
             admin.listen = ['[::]:53', '[::]:54', '0.0.0.0:54']",
            &[
                "f:3: admin.listen: [::]:53 includes 10.0.0.1:53 of dns.listen; remove one, or choose \
                 another port",
                "f:3: admin.listen: [::]:54 includes [fd00::1]:54 of dns.listen; remove one, or choose \
                 another port",
            ],
        ),
        (
            "admin.listen = ['0.0.0.0:1', '[::]:1', '[::1]:2', '127.0.0.1:2']\nadmin.hosts = ['n']",
            &[],
        ),
        (
            "dns.listen = ['[::]:53', '127.0.0.1:53', '10.0.0.1:53', '[fe80::1%2]:54', '[fe80::1%3]:54']",
            &[],
        ),
        (
            "[admin]\nlisten = ['224.0.0.1:1', '255.255.255.255:1', '[fe80::1]:1', '[ff02::1%2]:1']",
            &[
                "f:2: admin.listen: 224.0.0.1:1 is multicast; write an address of this host",
                "f:2: admin.listen: 255.255.255.255:1 is the broadcast address; write an address of \
                 this host",
                "f:2: admin.listen: [fe80::1]:1 is link-local, so each interface may have it; write the \
                 index of one, as `ip link` shows it: [fe80::1%2]:1",
                "f:2: admin.listen: [ff02::1%2]:1 is multicast; write an address of this host",
            ],
        ),
        // All together, in the order of the file; a wrong pool contradicts nothing.
        (
            "[vip]\npool = 'x'\npins = { a = '127.128.0.1:80' }\n[dns]\nttl = 'x'\n[catalog]\nsources = ['file']\n[nope]\n",
            &[
                "f:2: vip.pool: 'x' isn't a network; write one such as 127.128.0.0/9",
                "f:5: dns.ttl: expected an integer, found a string; write one without quotes",
                "f:7: catalog.sources: has \"file\", but catalog.file is empty; add file = \"/PATH\" under [catalog]",
                "f:8: nope: unknown key; remove it",
            ],
        ),
        (
            "dns.ttl = 'x'\nstate_dir = \nvip.ports = [0]",
            &[
                "f:1: dns.ttl: expected an integer, found a string; write one without quotes",
                "f:2: not TOML: string values must be quoted, expected literal string",
                "f:3: vip.ports: 0 is out of range; write a number from 1 to 65535",
            ],
        ),
    ];
    for (text, expected) in table {
        assert_eq!(&check(text).err().unwrap_or_default(), expected, "{text}");
    }
}

#[test]
fn what_is_no_text_is_no_toml() {
    let errors = LoadedConfig::parse(Path::new("f"), b"a = 1\n\xff", &[], &|_| None);
    let expected = "f:2: not TOML: this isn't UTF-8; write the file in UTF-8";
    assert_eq!(errors.unwrap_err().to_string(), expected);
}

#[test]
fn flags_beat_the_environment_and_that_beats_the_file() {
    let text = "[consul]\naddress = 'a:1'\ntoken_file = '/f'";
    let flag = [flag("--consul-addr", "consul.address", "http://c:3/")];
    let address = |flags: &[Flag], env: &[(&str, &str)]| {
        check_all(text, flags, env).unwrap().consul.address.to_string()
    };
    let env = [("CONSUL_HTTP_ADDR", "b:2")];
    assert_eq!(address(&[], &[]), "a:1");
    assert_eq!(address(&[], &env), "b:2");
    assert_eq!(address(&flag, &env), "c:3");

    let token = |env: &[(&str, &str)]| check_all(text, &[], env).unwrap().consul.token;
    let literal = ("CONSUL_HTTP_TOKEN", "secret");
    let file = ("CONSUL_HTTP_TOKEN_FILE", "/env");
    assert_eq!(token(&[]), Some(Token::File("/f".into())));
    assert_eq!(token(&[literal]), Some(Token::Literal("secret".into())));
    assert_eq!(token(&[literal, file]), Some(Token::File("/env".into())));
    assert_eq!(token(&[("CONSUL_HTTP_TOKEN", "")]), Some(Token::File("/f".into())));
}

#[test]
fn a_user_and_password_are_a_header_and_are_never_shown() {
    // RFC 7617, section 2; and without a password, as Consul's own tools take it.
    for (text, header) in [
        ("Aladdin:open sesame", "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="),
        ("me", "Basic bWU6"),
        ("me:", "Basic bWU6"),
    ] {
        let auth = BasicAuth::new(text).unwrap();
        assert_eq!((&*auth.header(), &*format!("{auth:?}")), (header, "BasicAuth(..)"));
    }
    for bad in ["", ":", "a\nb:c"] {
        assert!(!BasicAuth::new(bad).unwrap_err().contains("a\nb"));
    }
}

#[test]
fn the_variables_of_consuls_own_tools_count() {
    let (cert, key) = (Pem::certificate(), Pem::key());
    let [ca, cert, key] = [&cert, &cert, &key].map(|pem| pem.path.to_str().unwrap());
    let env = [
        ("CONSUL_HTTP_ADDR", "consul.example:8501"),
        ("CONSUL_HTTP_SSL", "true"),
        ("CONSUL_HTTP_SSL_VERIFY", "false"),
        ("CONSUL_CACERT", ca),
        ("CONSUL_CAPATH", "/"),
        ("CONSUL_CLIENT_CERT", cert),
        ("CONSUL_CLIENT_KEY", key),
        ("CONSUL_TLS_SERVER_NAME", "server.dc1.consul"),
        ("CONSUL_NAMESPACE", "team"),
        ("CONSUL_PARTITION", "part"),
        ("CONSUL_HTTP_AUTH", "nohop:a:b"),
    ];
    let expected = ConsulConfig {
        address: ConsulAddress::Https("consul.example:8501".into()),
        tls: TlsConfig {
            ca_file: Some(ca.into()),
            ca_path: Some("/".into()),
            cert_file: Some(cert.into()),
            key_file: Some(key.into()),
            server_name: Some("server.dc1.consul".into()),
            verify: false,
        },
        namespace: "team".into(),
        partition: "part".into(),
        auth: Some(BasicAuth::new("nohop:a:b").unwrap()),
        ..ConsulConfig::default()
    };
    let file = "[consul]\nnamespace = 'x'\npartition = 'x'\nverify = true\nca_file = '/x'";
    for text in ["", file] {
        let config = check_all(text, &[], &env).unwrap();
        assert_eq!(config.consul, expected);
    }

    let address = |env: &[(&str, &str)], flag: Option<&str>| {
        let flags = flag.map(|text| self::flag("--consul-addr", "consul.address", text));
        check_all("", flags.as_slice(), env).map(|config| config.consul.address.to_string())
    };
    let ssl = ("CONSUL_HTTP_SSL", "1");
    let table: &[(&[_], _, Result<&str, &str>)] = &[
        (&[("CONSUL_HTTP_ADDR", "unix:///run/c.sock")], None, Ok("unix:///run/c.sock")),
        (&[("CONSUL_HTTP_ADDR", "https://c:1")], None, Ok("https://c:1")),
        (&[("CONSUL_HTTP_ADDR", "http://c:1"), ssl], None, Ok("https://c:1")),
        (&[ssl], None, Ok("https://127.0.0.1:8500")),
        // Without a port, in every form that Consul's own tools take.
        (&[("CONSUL_HTTP_ADDR", "consul.example")], None, Ok("consul.example:80")),
        (&[("CONSUL_HTTP_ADDR", "http://consul.example/")], None, Ok("consul.example:80")),
        (&[("CONSUL_HTTP_ADDR", "https://consul.example")], None, Ok("https://consul.example:443")),
        (&[("CONSUL_HTTP_ADDR", "consul.example"), ssl], None, Ok("https://consul.example:443")),
        (&[("CONSUL_HTTP_ADDR", "10.0.0.7")], None, Ok("10.0.0.7:80")),
        (&[("CONSUL_HTTP_ADDR", "https://[fd00::7]")], None, Ok("https://[fd00::7]:443")),
        (&[("CONSUL_HTTP_ADDR", "[fd00::7]:8500")], None, Ok("[fd00::7]:8500")),
        (&[], Some("https://consul.example"), Ok("https://consul.example:443")),
        (
            &[("CONSUL_HTTP_AUTH", ":secret")],
            None,
            Err("CONSUL_HTTP_AUTH: has no user, or control characters; write USER:PASSWORD"),
        ),
        (&[ssl], Some("http://d:2"), Ok("d:2")),
        (&[("CONSUL_HTTP_SSL", "0"), ("CONSUL_HTTP_ADDR", "https://c:1")], None, Ok("https://c:1")),
        (
            &[("CONSUL_HTTP_SSL", "yes")],
            None,
            Err("CONSUL_HTTP_SSL: 'yes' isn't a boolean; write true or false"),
        ),
        (
            &[("CONSUL_CACERT", "/ca.pem")],
            None,
            Err("CONSUL_CACERT: has no effect, because 127.0.0.1:8500 is used without TLS; \
                 write https://HOST:PORT as consul.address, or remove this"),
        ),
    ];
    for (env, flag, expected) in table {
        let expected = expected.map(str::to_owned).map_err(|what| vec![what.to_owned()]);
        assert_eq!(address(env, *flag), expected, "{env:?} {flag:?}");
    }
}

/// A file in PEM, as rcgen writes it.
struct Pem {
    _dir: tempfile::TempDir,
    path: std::path::PathBuf,
}

impl Pem {
    fn new(text: &str) -> Pem {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pem");
        std::fs::write(&path, text).unwrap();
        Pem { _dir: dir, path }
    }

    fn certificate() -> Pem {
        Pem::new(&rcgen::generate_simple_self_signed(vec!["c".into()]).unwrap().cert.pem())
    }

    fn key() -> Pem {
        Pem::new(&rcgen::KeyPair::generate().unwrap().serialize_pem())
    }
}

#[test]
fn files_of_certificates_must_be_such() {
    let (cert, key) = (Pem::certificate(), Pem::key());
    let [cert, key] = [&cert, &key].map(|pem| pem.path.display());
    let missing = "can't be read (No such file or directory (os error 2)); name one that can";
    let table: &[(String, Option<String>)] = &[
        (format!("cert_file = '{cert}'\nkey_file = '{key}'\nca_file = '{cert}'"), None),
        (
            format!("cert_file = '{cert}'"),
            Some("consul.cert_file: is a certificate without its key; add consul.key_file".into()),
        ),
        (
            format!("key_file = '{key}'"),
            Some("consul.key_file: is a key without its certificate; add consul.cert_file".into()),
        ),
        ("ca_file = '/no.pem'".into(), Some(format!("consul.ca_file: /no.pem {missing}"))),
        ("ca_path = '/no'".into(), Some(format!("consul.ca_path: /no {missing}"))),
        (
            format!("ca_file = '{key}'"),
            Some(format!(
                "consul.ca_file: {key} holds no certificate in PEM; write one that begins with \
                 -----BEGIN CERTIFICATE-----"
            )),
        ),
        (
            format!("cert_file = '{cert}'\nkey_file = '{cert}'"),
            Some(format!(
                "consul.key_file: {cert} holds no private key in PEM; write one without a \
                 passphrase that begins with -----BEGIN PRIVATE KEY-----"
            )),
        ),
    ];
    for (keys, expected) in table {
        let text = format!("[consul]\naddress = 'https://c:1'\n{keys}");
        let problems = check(&text).err().unwrap_or_default();
        let problems: Vec<_> = problems.iter().map(|p| p.split_once(": ").unwrap().1).collect();
        assert_eq!(problems, expected.iter().collect::<Vec<_>>(), "{keys}");
    }
}

#[test]
fn flags_are_checked_like_the_file() {
    let list =
        |name, key, text: &str| Flag { name, key, value: FlagValue::List(vec![text.into()]) };
    let flags = [
        flag("--cgroup", "cgroup", "/cg"),
        list("--dns-listen", "dns.listen", "127.128.0.5:53"),
        list("--admin-listen", "admin.listen", "nowhere"),
        flag("--on-exit", "on_exit", "stay"),
    ];
    let errors = check_all("", &flags, &[("CONSUL_HTTP_ADDR", "ftp://x:1")]);
    let expected = [
        "--admin-listen: 'nowhere' isn't an address; write unix:/PATH or ADDR:PORT, port 1 to 65535",
        "--dns-listen: 127.128.0.5:53 lies in vip.pool 127.128.0.0/9; choose an address outside, \
         or another pool",
        "--on-exit: 'stay' is invalid; write `keep` or `detach`",
        "CONSUL_HTTP_ADDR: 'ftp://x:1' isn't an address of a Consul agent; write http://HOST:PORT, \
         https://HOST:PORT or unix:///PATH",
    ];
    assert_eq!(errors.unwrap_err(), expected);

    let flags = [
        flag("--cgroup", "cgroup", "/cg"),
        list("--dns-listen", "dns.listen", "127.0.0.9:53"),
        list("--admin-listen", "admin.listen", "unix:/x"),
        list("--catalog", "catalog.sources", "file"),
        flag("--catalog", "catalog.file", "/c.toml"),
        flag("--bpffs", "bpffs", "/pins"),
        flag("--on-exit", "on_exit", "detach"),
    ];
    // The address of a source that isn't used isn't checked.
    let config = check_all("", &flags, &[("CONSUL_HTTP_ADDR", "ftp://x:1")]).unwrap();
    assert_eq!(config.cgroup, Some("/cg".into()));
    assert_eq!((config.bpffs, config.on_exit), ("/pins".into(), OnExit::Detach));
    assert_eq!(config.catalog.sources, [SourceKind::File("/c.toml".into())]);
    assert_eq!(config.dns.listen, ["127.0.0.9:53".parse().unwrap()]);
    assert_eq!(config.admin.listen, [AdminAddress::Unix("/x".into())]);
}

#[test]
fn relative_paths_are_the_shells() {
    let here = std::env::current_dir().unwrap();
    assert_eq!(FlagValue::path("c.toml"), FlagValue::Text(format!("{}/c.toml", here.display())));
    for path in ["/c.toml", ""] {
        assert_eq!(FlagValue::path(path), FlagValue::Text(path.into()));
    }
    let consul = check_all("", &[], &[("CONSUL_HTTP_TOKEN_FILE", "token")]).unwrap().consul;
    assert_eq!(consul.token, Some(Token::File(here.join("token"))));
}

#[test]
fn a_file_that_vanishes_is_missed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nohop.toml");
    let ttl = |reader: &ConfigReader| {
        reader.read(&|_| None).map(|config| config.dns.ttl).map_err(|errors| errors.to_string())
    };
    let reader = ConfigReader::optional(&path);
    assert_eq!(ttl(&reader), Ok(30));
    std::fs::write(&path, "dns.ttl = 5").unwrap();
    assert_eq!(ttl(&reader), Ok(5));
    std::fs::remove_file(&path).unwrap();
    let error = ttl(&reader).unwrap_err();
    assert!(error.starts_with(&format!("can't read {}: ", path.display())), "{error}");
    // Nor is a link that leads nowhere no file, at a start either.
    std::os::unix::fs::symlink(dir.path().join("away"), &path).unwrap();
    ttl(&ConfigReader::optional(&path)).unwrap_err();
}

#[test]
fn a_file_that_was_named_must_be_there() {
    let missing = Path::new("/nowhere/nohop.toml");
    let errors = Config::load(Some(missing), &[], &|_| None).unwrap_err();
    assert!(errors.to_string().starts_with("can't read /nowhere/nohop.toml: "), "{errors}");
}

#[test]
fn the_page_shows_the_defaults() {
    let page = include_str!("../../../docs/configuration.md");
    let start = page.find("cgroup = \"auto\"").unwrap();
    let text = page[start..].split("```").next().unwrap();
    let path = Path::new("configuration.md");
    let config = LoadedConfig::parse(path, text.as_bytes(), &[], &|_| None).unwrap();
    assert_eq!(config.config, Config::default());
}

#[test]
fn differences_are_shown_as_toml() {
    let config = |text: &str| check(text).unwrap();
    // Before, after, and what is shown; keys that need a restart are marked.
    let table = [
        ("", "", ""),
        ("dns.ttl = 30", "", ""),
        ("", "dns.ttl = 5", "dns.ttl: 30 -> 5"),
        ("", "dns.client_rate = 7", "dns.client_rate: 10000 -> 7"),
        ("", "dns.unrouted = \"forward\"", "dns.unrouted: \"nxdomain\" -> \"forward\""),
        ("", "dns.allow = [\"10.0.0.0/8\"]", "dns.allow: [\"local\"] -> [\"10.0.0.0/8\"]"),
        ("", "vip.ports = [80, 443]", "vip.ports: [80] -> [80, 443]"),
        ("", "catalog.max_age = \"2m\"", "catalog.max_age: \"1h\" -> \"2m\""),
        ("balance.slow_start = \"0s\"", "balance.slow_start = \"\"", ""),
        ("", "balance.drain_deadline = \"30s\"", "balance.drain_deadline: \"\" -> \"30s\""),
        ("", "dns.routes = {}", "dns.routes: { consul = \"127.0.0.1:8600\" } -> {}"),
        ("", "dns.forward = []", "dns.forward: \"resolv.conf\" -> []"),
        ("", "dns.forward = \"10.0.0.1\"", "dns.forward: \"resolv.conf\" -> [\"10.0.0.1:53\"]"),
        (
            "",
            "catalog.sources = [\"file\"]\ncatalog.file = \"/c\"",
            "catalog.sources: [\"consul\"] -> [\"file\"], catalog.file: \"\" -> \"/c\"",
        ),
        ("", "catalog.meta = { \"a b\" = \"c\" }", "catalog.meta: {} -> { \"a b\" = \"c\" }"),
        ("", "cgroup = \"/a\"", "cgroup: \"auto\" -> \"/a\" (restart)"),
        ("", "vip.public = [\"10.1.1.1\"]", "vip.public: [] -> [\"10.1.1.1/32\"] (restart)"),
        (
            "vip.pins = { web = \"10.0.0.1:80\" }",
            "on_exit = \"detach\"",
            "on_exit: \"keep\" -> \"detach\", vip.pins: { web = \"10.0.0.1:80\" } -> {} (restart)",
        ),
    ];
    for (before, after, expected) in table {
        let shown: Vec<String> = changes(&config(before), &config(after))
            .into_iter()
            .map(|KeyChange { key, from, to, restart }| {
                let restart = restart.map_or("", |_| " (restart)");
                format!("{key}: {from} -> {to}{restart}")
            })
            .collect();
        assert_eq!(shown.join(", "), expected, "{before} / {after}");
    }
}

/// A file that has all values as they are shown is the same configuration.
#[test]
fn what_is_shown_can_be_read_again() {
    let shown = |config: &Config| -> String {
        let values = keys::values(config).into_iter();
        values.map(|(key, value)| format!("{} = {}\n", key.name, keys::toml(&value))).collect()
    };
    for text in ["", EVERY_KEY] {
        let config = check(text).unwrap();
        assert_eq!(check(&shown(&config)), Ok(config));
    }
}

#[test]
fn every_key_differs_in_the_text_that_has_every_key() {
    let config = check(EVERY_KEY).unwrap();
    let differ: Vec<_> = changes(&Config::default(), &config).iter().map(|it| it.key).collect();
    assert_eq!(differ, KEYS.iter().map(|key| key.name).collect::<Vec<_>>());
}

#[test]
fn a_secret_is_never_shown() {
    let with = |token: Option<&str>| {
        let mut config = Config::default();
        config.consul.token = token.map(|token| Token::Literal(token.into()));
        config
    };
    let table = [
        (None, Some("s3cret"), "\"\"", "\"(a token)\""),
        (Some("s3cret"), Some("s3cret2"), "\"(a token)\"", "another token"),
        (Some("s3cret"), None, "\"(a token)\"", "\"\""),
    ];
    for (from, to, shown_from, shown_to) in table {
        let found = changes(&with(from), &with(to));
        let KeyChange { from, to, .. } = &found[0];
        assert_eq!((found.len(), &**from, &**to), (1, shown_from, shown_to));
    }
}
