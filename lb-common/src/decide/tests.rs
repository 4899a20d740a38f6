use proptest::prelude::*;

use super::model::{Client, Model, fuzz};
use super::*;
use crate::{Address, BackendEntry, Control, Group, ServiceEntry};

const HOST: u64 = 1;
const CONTAINER: u64 = 2;
const DAEMON: u64 = 77;
const VIP: [u8; 4] = [127, 128, 0, 5];
const VIP6: [u8; 16] = [0xfd; 16];
const PIN: [u8; 4] = [10, 0, 0, 1];
const PUBLIC: [u8; 4] = [203, 0, 113, 10];
const PUBLIC6: [u8; 16] = [0x20; 16];

/// The indices of the services.
const WEB: u32 = 0;
const EMPTY: u32 = 1;
const SPARE: u32 = 2;
const IPV6_ONLY: u32 = 3;
const BROKEN: u32 = 4;
const SPARE_IPV4: u32 = 5;
const SPARE_IPV6: u32 = 6;

/// A service a line: its VIP's last octet, its index, and its groups' backends, each as the range of
/// slots for IPv4 and the one for IPv6 (`all` is the wider of the two).
fn tables() -> Model {
    let range = |first_slot, n_slots| SlotRange { first_slot, n_slots };
    let none = range(0, 0);
    let sets = |ipv4: SlotRange, ipv6: SlotRange| {
        let all = if ipv4.n_slots > 0 { ipv4 } else { ipv6 };
        crate::BackendSets { ipv4, ipv6, all }
    };
    let everywhere =
        |ipv4, ipv6| Group { host_netns: sets(ipv4, ipv6), other_netns: sets(ipv4, ipv6) };
    let entry = |group| ServiceEntry { group, ..ServiceEntry::default() };
    // Backend 0 is on the host's loopback, backend 1 is not, backend 2 has an IPv6 address.
    let mut web = entry(everywhere(range(1, 1), none));
    web.group.host_netns = sets(range(0, 1), none);
    let mut spare = entry(everywhere(none, none));
    spare.fallbacks[1].group = everywhere(range(1, 1), none);
    spare.flags.report_next = 1;
    let mut spare_ipv4 = entry(everywhere(none, range(2, 1)));
    spare_ipv4.fallbacks[1].group = everywhere(range(1, 1), none);
    let mut spare_ipv6 = entry(everywhere(range(1, 1), none));
    spare_ipv6.fallbacks[0].group = everywhere(none, range(2, 1));
    let services = [
        web,
        entry(everywhere(none, none)),
        spare,
        entry(everywhere(none, range(2, 1))),
        entry(everywhere(range(99, 1), none)),
        spare_ipv4,
        spare_ipv6,
    ];
    let slot = |backend| Slot { backend, alias: 0, threshold: u16::MAX };
    let ipv6 = Address { octets: [0xfd; 16] };
    let addresses = [Address::v4([127, 0, 0, 1]), Address::v4([10, 0, 0, 7]), ipv6];
    let backend = |address| BackendEntry {
        backend: Backend { address, port: 80, weight: 0, generation: 9 },
        ..BackendEntry::default()
    };
    let frontend = |address, port, service, host_only| {
        let frontend = Frontend { address, port, protocol: IPPROTO_TCP, padding: 0 };
        let udp = Frontend { protocol: IPPROTO_UDP, ..frontend };
        let target = ServiceRef { service, host_only };
        [(frontend, target), (udp, target)]
    };
    let vip = |last: u8| [127, 128, 0, last];
    let frontends = [
        frontend(VIP, 80, WEB, 0),
        frontend(PIN, 53, WEB, 1),
        frontend(vip(6), ANY_PORT, EMPTY, 0),
        frontend(vip(7), 80, SPARE, 0),
        frontend(vip(8), 80, IPV6_ONLY, 0),
        frontend(vip(9), 80, BROKEN, 0),
        frontend(vip(10), 80, 99, 0),
        frontend(vip(11), 80, SPARE_IPV4, 0),
        frontend(vip(12), 80, SPARE_IPV6, 0),
        frontend(PUBLIC, 443, WEB, 0),
        frontend(PUBLIC, 444, EMPTY, 0),
    ];
    let frontend6 = |address, port| {
        let frontend = Frontend6 { address, port, protocol: IPPROTO_TCP, padding: 0 };
        (frontend, ServiceRef { service: IPV6_ONLY, host_only: 0 })
    };
    let control =
        Control { heartbeat_ns: 1_000, host_netns: HOST, tgid: DAEMON, ..Control::default() };
    Model {
        pool: (u32::from_be_bytes([127, 128, 0, 0]), 0xff80_0000),
        pool6: (0xfd << 120, 0xff << 120),
        control: Some(control),
        frontends: frontends.into_iter().flatten().collect(),
        frontends6: [frontend6(VIP6, ANY_PORT), frontend6(PUBLIC6, 443)].into(),
        services: services.to_vec(),
        slots: [slot(0), slot(1), slot(2)].to_vec(),
        backends: addresses.map(backend).to_vec(),
        now_ns: 2_000,
        random: 0,
    }
}

const CLIENT: Client = Client {
    tgid: 5,
    origin: Origin::Application,
    is_bypassed: false,
    filter: FamilyFilter::Ipv4,
    netns_cookie: HOST,
};

const fn tcp(address: [u8; 4], port: u16) -> Request {
    let destination = Destination::V4(address);
    Request { destination, port, protocol: IPPROTO_TCP, call: Call::Connect }
}

/// What a verdict says, but for the backend's address.
#[derive(Debug, PartialEq)]
enum Expected {
    Pass(PassReason),
    Refuse(RefuseReason),
    /// Sent to the backend with this index, and reported or not.
    Send(u32, bool),
}

#[test]
fn verdicts() {
    use Expected::{Pass, Refuse, Send};
    let vip = |last: u8| tcp([127, 128, 0, last], 80);
    let v6 = |port| Request { destination: Destination::V6(VIP6), ..tcp([0; 4], port) };
    let public6 = |port| Request { destination: Destination::V6(PUBLIC6), ..tcp([0; 4], port) };
    let container = Client { netns_cookie: CONTAINER, ..CLIENT };
    let filtered = |filter| Client { filter, ..CLIENT };
    let (ipv6, all) = (filtered(FamilyFilter::Ipv6), filtered(FamilyFilter::All));
    let ipv4_first = filtered(FamilyFilter::Ipv4First);
    let ipv6_first = filtered(FamilyFilter::Ipv6First);
    let no_backend = |service, has_other_family| {
        Refuse(RefuseReason::NoBackend { service, has_other_family, report: false })
    };
    let inconsistent = |service| Refuse(RefuseReason::Inconsistent { service });
    let nothing = || Pass(PassReason::NoFrontend);
    let table = [
        // Pool and ports.
        ("a VIP", tcp(VIP, 80), CLIENT, Send(0, false)),
        ("no VIP", tcp([10, 0, 0, 9], 80), CLIENT, nothing()),
        ("a port that isn't the service's", tcp(VIP, 81), CLIENT, Refuse(RefuseReason::NoFrontend)),
        ("an address that no service has", vip(99), CLIENT, Refuse(RefuseReason::NoFrontend)),
        ("any port", tcp([127, 128, 0, 6], 8_080), CLIENT, no_backend(EMPTY, false)),
        ("another protocol", Request { protocol: 1, ..tcp(VIP, 80) }, CLIENT, nothing()),
        ("the probe", tcp([127, 128, 0, 0], 80), CLIENT, Refuse(RefuseReason::Probe)),
        ("a datagram", Request { protocol: IPPROTO_UDP, ..tcp(VIP, 80) }, CLIENT, Send(0, false)),
        ("an IPv6 VIP, any port", v6(443), ipv6, Send(2, false)),
        ("a public VIP", tcp(PUBLIC, 443), CLIENT, Send(0, false)),
        ("one from a container", tcp(PUBLIC, 443), container, Send(1, false)),
        ("one without backends", tcp(PUBLIC, 444), CLIENT, no_backend(EMPTY, false)),
        ("another port of one", tcp(PUBLIC, 80), CLIENT, nothing()),
        ("an IPv6 public VIP", public6(443), ipv6, Send(2, false)),
        ("another port of one", public6(80), ipv6, nothing()),
        ("an IPv6 VIP by IPv4", v6(443), CLIENT, no_backend(IPV6_ONLY, true)),
        // Pins and network namespaces.
        ("a pin", tcp(PIN, 53), CLIENT, Send(0, false)),
        ("another port of a pin", tcp(PIN, 54), CLIENT, nothing()),
        ("a pin from a container", tcp(PIN, 53), container, nothing()),
        ("a VIP from a container", tcp(VIP, 80), container, Send(1, false)),
        // Groups and families.
        ("no backend", vip(6), CLIENT, no_backend(EMPTY, false)),
        ("the third group", vip(7), CLIENT, Send(1, true)),
        (
            "no group",
            vip(7),
            ipv6,
            Refuse(RefuseReason::NoBackend {
                service: SPARE,
                has_other_family: true,
                report: true,
            }),
        ),
        ("another family", vip(8), CLIENT, no_backend(IPV6_ONLY, true)),
        ("any family rather than none", vip(8), ipv4_first, Send(2, false)),
        ("IPv4 in a later group", vip(11), CLIENT, Send(1, false)),
        ("that rather than another family in the first", vip(11), ipv4_first, Send(1, false)),
        ("all families, by group", vip(11), all, Send(2, false)),
        ("IPv6 in a later group", vip(12), ipv6, Send(2, false)),
        ("that rather than another family in the first", vip(12), ipv6_first, Send(2, false)),
        ("any family in a later group", vip(7), ipv6_first, Send(1, true)),
        // Who is bypassed.
        ("the daemon", tcp(VIP, 80), Client { tgid: DAEMON, ..CLIENT }, Pass(PassReason::Bypassed)),
        (
            "a socket of the kernel's",
            tcp(VIP, 80),
            Client { origin: Origin::Kernel, ..CLIENT },
            Pass(PassReason::Bypassed),
        ),
        ("a subflow", tcp(VIP, 80), Client { origin: Origin::Subflow, ..CLIENT }, Send(0, false)),
        (
            "a bypassed cgroup, where nothing is",
            vip(99),
            Client { is_bypassed: true, ..CLIENT },
            Pass(PassReason::Bypassed),
        ),
        // Tables that another program wrote to.
        ("a slot that isn't there", vip(9), CLIENT, inconsistent(BROKEN)),
        ("a service that isn't there", vip(10), CLIENT, inconsistent(99)),
    ];
    for (case, request, client, expected) in table {
        assert_eq!(outcome(&tables(), &client, &request), expected, "{case}");
    }
}

#[test]
fn a_process_that_has_a_dead_daemons_id_is_not_bypassed() {
    let model = Model { now_ns: 1_000 + HEARTBEAT_TIMEOUT_NS, ..tables() };
    let daemon = Client { tgid: DAEMON, ..CLIENT };
    assert_eq!(outcome(&model, &daemon, &tcp(VIP, 80)), Expected::Send(0, false));
}

#[test]
fn an_old_table_has_no_backends_while_no_daemon_is_alive() {
    const TIMEOUT: u64 = HEARTBEAT_TIMEOUT_NS;
    let refused = || {
        let (has_other_family, report) = (false, false);
        Expected::Refuse(RefuseReason::NoBackend { service: WEB, has_other_family, report })
    };
    let serves = || Expected::Send(0, false);
    // When the table was right, its age that is allowed, the last heartbeat, now; whether it is an earlier
    // daemon's.
    let table = [
        ([1_000, 0, 0, 1_000 + TIMEOUT], 0, serves(), "any age is allowed"),
        ([1_000, 500, 0, 1_499 + TIMEOUT], 0, refused(), "too old"),
        ([1_000, TIMEOUT, 0, 999 + TIMEOUT], 0, serves(), "not yet"),
        ([1_000, TIMEOUT, 0, 999 + TIMEOUT], 1, serves(), "an earlier daemon's, not yet"),
        ([1_000, 500, 1_500, 1_499 + TIMEOUT], 0, serves(), "the daemon is alive"),
        ([1_000, 500, 1_500, 1_500], 1, refused(), "it is alive, and the table an earlier one's"),
        ([9 * TIMEOUT, 500, 0, TIMEOUT], 0, serves(), "right in the future"),
    ];
    for ([table_ns, max_age_ns, heartbeat_ns, now_ns], is_inherited, expected, case) in table {
        let mut model = Model { now_ns, ..tables() };
        let control = model.control.unwrap();
        model.control =
            Some(Control { table_ns, max_age_ns, heartbeat_ns, is_inherited, ..control });
        assert_eq!(outcome(&model, &CLIENT, &tcp(VIP, 80)), expected, "{case}");
    }
    // What passes still does.
    let mut model = Model { now_ns: 2 * TIMEOUT, ..tables() };
    model.control.as_mut().unwrap().max_age_ns = 1;
    let container = Client { netns_cookie: CONTAINER, ..CLIENT };
    let passed = Expected::Pass(PassReason::NoFrontend);
    assert_eq!(outcome(&model, &container, &tcp(PIN, 53)), passed);
}

#[test]
fn shadow_mode_passes_everything() {
    let mut model = tables();
    model.control.as_mut().unwrap().is_shadow = 1;
    let container = Client { netns_cookie: CONTAINER, ..CLIENT };
    let table = [
        (tcp(VIP, 80), CLIENT, PassReason::Shadow { service: WEB }),
        (tcp(VIP, 81), CLIENT, PassReason::ShadowNoFrontend),
        (tcp(PIN, 53), CLIENT, PassReason::Shadow { service: WEB }),
        (tcp(PIN, 53), container, PassReason::NoFrontend),
        (tcp([127, 128, 0, 0], 80), CLIENT, PassReason::ShadowProbe),
        (tcp([10, 0, 0, 9], 80), CLIENT, PassReason::NoFrontend),
        (tcp(VIP, 80), Client { is_bypassed: true, ..CLIENT }, PassReason::Bypassed),
    ];
    for (request, client, reason) in table {
        assert_eq!(outcome(&model, &client, &request), Expected::Pass(reason), "{request:?}");
    }
}

#[test]
fn a_backend_without_a_port_is_inconsistent() {
    let mut model = tables();
    model.backends[0].backend.port = 0;
    let expected = Expected::Refuse(RefuseReason::Inconsistent { service: WEB });
    assert_eq!(outcome(&model, &CLIENT, &tcp(VIP, 80)), expected);
    model.backends.clear();
    assert_eq!(outcome(&model, &CLIENT, &tcp(VIP, 80)), expected);
}

fn outcome(model: &Model, client: &Client, request: &Request) -> Expected {
    match decide(&model, client, request) {
        Verdict::Pass(reason) => Expected::Pass(reason),
        Verdict::Refuse(reason) => Expected::Refuse(reason),
        Verdict::Send(Selection { backend_idx, report, origin, .. }) => {
            assert_eq!(origin, client.origin);
            Expected::Send(backend_idx, report)
        }
    }
}

proptest! {
    /// What the fuzzer does, for a while.
    #[test]
    fn any_tables_any_connection(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        fuzz(&bytes);
    }
}
