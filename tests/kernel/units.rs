//! Units load, fail and come back as a whole; one that isn't required fails alone.

use lb_userspace::datapath::{
    AttachPoint, AttachType, Attachment, Datapath, Hook, Object, UNITS, Unit, UnitState, unload,
};

use crate::fixture::{Place, Server, VIP, connect, service, table};
use crate::obstacles::foreign_program;
use crate::pins::bpftool;

const fn cgroup(program: &'static str, attach_type: AttachType) -> Hook {
    Hook { program, target: AttachPoint::Cgroup(attach_type) }
}

/// The unit `connect` without two of its hooks, which are a unit of their own, and a unit that the
/// object has no program for.
const SPLIT: &[Unit] = &[
    Unit {
        name: "connect",
        is_required: true,
        object: Object::Connect,
        hooks: &[
            cgroup("nohop_getpeer4", AttachType::GETPEERNAME4),
            cgroup("nohop_connect4", AttachType::CONNECT4),
        ],
    },
    Unit {
        name: "datagrams",
        is_required: false,
        object: Object::Connect,
        hooks: &[
            cgroup("nohop_recvmsg4", AttachType::RECVMSG4),
            cgroup("nohop_sendmsg4", AttachType::SENDMSG4),
        ],
    },
    Unit {
        name: "unknown",
        is_required: false,
        object: Object::Connect,
        hooks: &[cgroup("nohop_unknown", AttachType::CONNECT6)],
    },
];

/// The same with a required unit that can't be loaded.
const IMPOSSIBLE: &[Unit] = &[Unit { ..SPLIT[0] }, Unit { is_required: true, ..SPLIT[2] }];

/// How the units of the list do: `names` isn't among them, and waits for a DNS server.
fn states(datapath: &Datapath) -> Vec<(&'static str, UnitState, String)> {
    let status = datapath.unit_status().into_iter().filter(|unit| unit.name != "names");
    status.map(|unit| (unit.name, unit.state, unit.reason.unwrap_or_default())).collect()
}

/// How the unit `datagrams` does, and why.
fn datagrams(datapath: &Datapath) -> (UnitState, String) {
    let [connect, (_, state, reason), unknown] = states(datapath).try_into().unwrap();
    assert_eq!(connect, ("connect", UnitState::Attached, String::new()));
    assert_eq!(unknown.1, UnitState::Failed);
    assert!(unknown.2.contains("the eBPF object has no nohop_unknown"), "{}", unknown.2);
    (state, reason)
}

/// Another program keeps one hook of a unit for itself: the whole unit waits for it, and no other.
pub fn an_optional_unit_fails_alone() {
    let server = Server::start(b'a');
    let mut place = Place::new();
    let foreign = foreign_program(&place, "nohop_sendmsg4");
    let scope = place.cgroup.path.to_str().unwrap().to_owned();
    bpftool(&["cgroup", "attach", &scope, "sendmsg4", "pinned", &foreign]);

    place.options.units = SPLIT;
    let mut datapath = place.start();
    datapath.apply(&table(vec![service("web", VIP, &[(server.address, 1)])])).unwrap();
    for _ in 0..2 {
        assert_eq!(connect((VIP, 80)).unwrap(), 'a');
        let (state, reason) = datagrams(&datapath);
        assert_eq!(state, UnitState::Failed);
        assert!(reason.contains("holds the hook sendmsg4"), "{reason}");
        let recvmsg4 = place.pin("v3/links/nohop_recvmsg4");
        assert!(!recvmsg4.exists(), "the hook before it is detached again");
        let attachment = datapath.fix();
        assert!(attachment.is_complete() && attachment.lost.is_empty(), "{attachment:?}");
    }

    bpftool(&["cgroup", "detach", &scope, "sendmsg4", "pinned", &foreign]);
    assert!(datapath.fix().is_complete());
    assert_eq!(datagrams(&datapath), (UnitState::Attached, String::new()));
    let link = place.pin("v3/links/nohop_sendmsg4");
    bpftool(&["link", "detach", "pinned", link.to_str().unwrap()]);
    let after_gap = Attachment { is_after_gap: true, ..Attachment::default() };
    assert_eq!(datapath.fix(), after_gap, "only required units count");
    assert_eq!(datagrams(&datapath), (UnitState::Attached, String::new()));

    // One that can't be attached again takes the others of its unit along.
    bpftool(&["link", "detach", "pinned", link.to_str().unwrap()]);
    bpftool(&["cgroup", "attach", &scope, "sendmsg4", "pinned", &foreign]);
    assert_eq!(datapath.fix(), Attachment::default());
    assert_eq!(datagrams(&datapath).0, UnitState::Failed);
    assert!(!link.exists() && !place.pin("v3/links/nohop_recvmsg4").exists());
    bpftool(&["cgroup", "detach", &scope, "sendmsg4", "pinned", &foreign]);
    assert!(datapath.fix().is_complete());
    assert_eq!(datagrams(&datapath), (UnitState::Attached, String::new()));

    // A unit that the next daemon doesn't have is detached by it.
    drop(datapath);
    place.options.units = &SPLIT[..1];
    let datapath = place.start();
    assert!(datapath.is_adopted() && !link.exists());
    assert_eq!(connect((VIP, 80)).unwrap(), 'a');
    drop(datapath);
    assert_eq!(unload(&place.options.bpffs).unwrap(), SPLIT[0].hooks.len());
}

/// Nothing is left of a start that fails.
pub fn a_required_unit_is_a_condition() {
    let mut place = Place::new();
    place.options.units = IMPOSSIBLE;
    let error = Datapath::start(&place.options).unwrap_err().to_string();
    assert!(error.contains("has no nohop_unknown"), "{error}");
    assert!(!place.options.bpffs.exists());
}

/// While an earlier daemon's hooks serve, the status names them as what runs.
pub fn a_unit_waits_for_its_first_table() {
    let mut place = Place::new();
    drop(place.start());
    place.options.layout = 9;
    let mut datapath = place.start();
    for ((name, state, reason), unit) in states(&datapath).into_iter().zip(UNITS) {
        assert_eq!((name, state), (unit.name, UnitState::Waiting));
        assert!(reason.contains("an earlier daemon's programs"), "{reason}");
    }
    datapath.apply(&table(vec![])).unwrap();
    assert!(states(&datapath).iter().all(|(_, state, _)| *state == UnitState::Attached));
}
