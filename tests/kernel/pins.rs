//! The pins and the hooks: existing ones are compared first, lost ones are restored, and no step leaves
//! a translated socket without reverse translation.

use std::fs;
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::process::Command;

use lb_userspace::datapath::{Datapath, UNITS, hooks, unload};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};

use crate::fixture::{Bed, Place, Server, VIP, connect, service, table};

/// The programs, in the order in which they are attached.
pub fn programs() -> Vec<&'static str> {
    hooks(UNITS).map(|hook| hook.program).collect()
}

pub fn bpftool(arguments: &[&str]) -> String {
    let output = Command::new("bpftool").args(arguments).output().unwrap();
    let [stdout, stderr] =
        [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    assert!(output.status.success(), "bpftool {arguments:?}: {stdout}{stderr}");
    stdout
}

/// The number after `"key":` in what bpftool prints.
pub fn number(json: &str, key: &str) -> u64 {
    let (_, rest) = json.split_once(&format!("\"{key}\":")).unwrap_or_else(|| panic!("{json}"));
    let rest = rest.trim_start();
    rest.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
}

/// A bed whose one service answers `a`.
fn serving(server: &Server) -> Bed {
    let mut bed = Bed::new();
    bed.apply(vec![service("web", VIP, &[(server.address, 1)])]);
    assert_eq!(connect((VIP, 80)).unwrap(), 'a');
    bed
}

fn pin(bed: &Bed, name: &str) -> PathBuf {
    bed.options.bpffs.join(name)
}

pub fn two_daemons_are_one_too_many() {
    let server = Server::start(b'a');
    let mut place = Place::new();
    let mut first = Datapath::start(&place.options).unwrap();
    first.apply(&table(vec![service("web", VIP, &[(server.address, 1)])])).unwrap();
    let (pid, own_layout) = (std::process::id(), place.options.layout);
    for layout in [3, 4] {
        place.options.layout = layout;
        let error = Datapath::start(&place.options).unwrap_err().to_string();
        assert!(error.contains(&format!("process {pid},")), "{error}");
    }
    assert!(!place.pin("v4").exists());
    first.leave();
    assert_eq!(connect((VIP, 80)).unwrap(), 'a', "the first stays in use");
    // It has stopped, and can't end yet.
    place.options.layout = own_layout;
    let next = Datapath::start(&place.options).unwrap();
    // Its own connections are bypassed.
    next.keep();
    assert_eq!(connect((VIP, 80)).unwrap(), 'a');
    drop((next, first));
}

/// Pins something of another program at a path.
type Spoil<'a> = &'a dyn Fn(&str);

/// Things of another program under names of ours. The error names them; what runs stays in use.
pub fn what_is_foreign_is_refused() {
    let server = Server::start(b'a');
    let foreign_map = |path: &str| {
        let kind = ["type", "hash", "key", "4", "value", "4", "entries", "1", "name", "foreign"];
        bpftool(&[["map", "create", path].as_slice(), &kind].concat());
    };
    // A program under the name of a link; any will do, such as the one of a link of ours.
    let program = |path: &str| {
        let link = Path::new(path).with_file_name("nohop_connect6");
        let shown = bpftool(&["-j", "link", "show", "pinned", link.to_str().unwrap()]);
        let id = number(&shown, "prog_id").to_string();
        bpftool(&["prog", "pin", "id", &id, path]);
    };
    let spoils: [(&str, Spoil<'_>); 5] = [
        ("v3/maps/SLOTS", &foreign_map),
        ("sockets/SK_REVNAT", &foreign_map),
        ("v3/links/nohop_connect4", &foreign_map),
        ("v3/links/nohop_connect4", &program),
        ("v3/links/another", &program),
    ];
    for (name, spoil) in spoils {
        let mut place = Place::new();
        let mut datapath = place.start();
        datapath.apply(&table(vec![service("web", VIP, &[(server.address, 1)])])).unwrap();
        let path = place.pin(name).to_str().unwrap().to_owned();
        // The link stays attached by another pin.
        if name.ends_with("connect4") {
            fs::create_dir(place.pin("aside")).unwrap();
            let aside = place.pin("aside/connect4");
            let connect4 = place.pin("v3/links/nohop_connect4");
            let shown = bpftool(&["-j", "link", "show", "pinned", connect4.to_str().unwrap()]);
            let id = number(&shown, "id").to_string();
            bpftool(&["link", "pin", "id", &id, aside.to_str().unwrap()]);
        }
        drop(datapath);
        let _ = fs::remove_file(&path);
        spoil(&path);
        for layout in [3, 4] {
            if layout == 4 && name.starts_with("v3/maps") {
                continue; // a map of another layout is never used
            }
            place.options.layout = layout;
            let error = Datapath::start(&place.options).unwrap_err().to_string();
            assert!(error.contains(&path) && error.contains("another program"), "{error}");
            assert_eq!(connect((VIP, 80)).unwrap(), 'a', "{name}");
            assert!(Path::new(&path).exists(), "{name} isn't ours to remove");
        }
    }
}

/// A later version's pins: its links get our programs, unknown ones are removed.
pub fn a_later_layout_is_replaced() {
    let server = Server::start(b'a');
    let mut place = Place::new();
    place.options.layout = 9;
    let mut later = place.start();
    let web = vec![service("web", VIP, &[(server.address, 1)])];
    later.apply(&table(web.clone())).unwrap();
    drop(later);
    let links = place.pin("v9/links");
    fs::rename(links.join("nohop_sendmsg6"), links.join("nohop_unheard_of")).unwrap();
    fs::create_dir(place.pin("v9/something")).unwrap();
    place.options.layout = 3;
    let mut datapath = place.start();
    assert!(!datapath.are_hooks_ours());
    assert_eq!(connect((VIP, 80)).unwrap(), 'a');
    datapath.apply(&table(web)).unwrap();
    assert!(!place.pin("v9").exists());
    assert!(datapath.fix().is_complete());
    assert_eq!(connect((VIP, 80)).unwrap(), 'a');
    let n_attached = bpftool(&["cgroup", "show", place.cgroup.path.to_str().unwrap()]);
    let n_attached = n_attached.lines().filter(|line| line.contains("nohop_")).count();
    assert_eq!(n_attached, programs().len());
}

/// The operator serves another cgroup from now on: the former one is left.
pub fn another_cgroup_is_left() {
    let server = Server::start(b'a');
    let mut place = Place::new();
    let below = place.cgroup.path.join("below");
    fs::create_dir(&below).unwrap();
    place.options.scope = below.clone();
    let mut datapath = Datapath::start(&place.options).unwrap();
    datapath.apply(&table(vec![service("web", VIP, &[(server.address, 1)])])).unwrap();
    let before = datapath.indices("web");
    connect((VIP, 80)).unwrap_err();
    drop(datapath);
    let attached = |cgroup: &Path| {
        let shown = bpftool(&["cgroup", "show", cgroup.to_str().unwrap()]);
        shown.lines().filter(|line| line.contains("nohop_")).count()
    };
    assert_eq!(attached(&below), programs().len());
    place.options.scope = place.cgroup.path.clone();
    let datapath = place.start();
    assert!(datapath.is_adopted(), "the maps serve on");
    assert_eq!(datapath.indices("web"), before);
    assert_eq!((attached(&below), attached(&place.cgroup.path)), (0, programs().len()));
    assert_eq!(connect((VIP, 80)).unwrap(), 'a');
    fs::remove_dir(&below).unwrap();
}

/// The operator names a directory that can't be attached to: existing hooks stay attached.
pub fn a_wrong_cgroup_leaves_all() {
    let server = Server::start(b'a');
    let mut place = Place::new();
    let mut datapath = place.start();
    datapath.apply(&table(vec![service("web", VIP, &[(server.address, 1)])])).unwrap();
    drop(datapath);
    let own = place.options.scope.clone();
    for wrong in ["/tmp", "/nonexistent"] {
        place.options.scope = wrong.into();
        let error = Datapath::start(&place.options).unwrap_err().to_string();
        assert!(error.contains(wrong), "{error}");
        assert_eq!(connect((VIP, 80)).unwrap(), 'a', "{wrong}");
    }
    place.options.scope = own;
    assert!(place.start().is_adopted());
}

/// The pins would go with the machine's next start, or with the directory.
pub fn no_bpffs_is_an_error() {
    let mut place = Place::new();
    place.options.bpffs = "/run/nohop-kernel-test".into();
    let error = Datapath::start(&place.options).unwrap_err().to_string();
    assert!(
        error.contains("mount -t bpf -o mode=0700") && error.contains("/run/nohop-kernel-test"),
        "{error}"
    );
    assert!(!place.options.bpffs.exists());
    assert_eq!(unload(&place.options.bpffs).unwrap(), 0);
}

/// Links are detached from outside.
pub fn lost_links_are_fixed() {
    let server = Server::start(b'a');
    let mut bed = serving(&server);
    for lost in [vec!["nohop_getpeer4"], vec!["nohop_connect4"], programs()] {
        let lost: std::collections::BTreeSet<_> = lost.into_iter().collect();
        for program in &lost {
            let link = pin(&bed, &format!("v3/links/{program}"));
            bpftool(&["link", "detach", "pinned", link.to_str().unwrap()]);
        }
        let attachment = bed.datapath.fix();
        assert!(attachment.is_complete() && attachment.is_after_gap);
        let required = UNITS[0].hooks.iter().map(|hook| hook.program);
        assert!(attachment.lost.into_iter().eq(
            lost.into_iter().filter(|&lost| { required.clone().any(|program| program == lost) })
        ));
        assert_eq!(connect((VIP, 80)).unwrap(), 'a');
        let attachment = bed.datapath.fix();
        assert!(attachment.is_complete() && attachment.lost.is_empty(), "{attachment:?}");
    }
}

/// Pins are removed from outside, which detaches nothing while the daemon lives.
pub fn lost_pins_are_fixed() {
    let server = Server::start(b'a');
    let place = Place::new();
    let (options, mut datapath) = (&place.options, place.start());
    datapath.apply(&table(vec![service("web", VIP, &[(server.address, 1)])])).unwrap();
    let before = datapath.indices("web");
    for lost in ["v3/links/nohop_recvmsg4", "v3/maps/SLOTS", "sockets", "v3", ""] {
        let path = options.bpffs.join(lost);
        if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) }.unwrap();
        let attachment = datapath.fix();
        assert!(attachment.is_complete() && attachment.lost.is_empty(), "{attachment:?}");
        assert!(path.exists());
        assert!(unload(&options.bpffs).is_err(), "{lost}: still locked");
        drop(datapath);
        assert_eq!(connect((VIP, 80)).unwrap(), 'a', "{lost}: it survives the daemon");
        datapath = place.start();
        assert!(datapath.is_adopted(), "{lost}");
        assert_eq!(datapath.indices("web"), before);
    }
}

/// The cgroup is removed and made again.
pub fn a_lost_cgroup_is_fixed() {
    let server = Server::start(b'a');
    let mut place = Place::new();
    let below = place.cgroup.path.join("below");
    fs::create_dir(&below).unwrap();
    place.options.scope = below.clone();
    let mut datapath = Datapath::start(&place.options).unwrap();
    datapath.keep();
    datapath.apply(&table(vec![service("web", VIP, &[(server.address, 1)])])).unwrap();
    fs::remove_dir(&below).unwrap();
    for _ in 0..2 {
        let problem = datapath.fix().problem.unwrap();
        assert!(problem.contains(below.to_str().unwrap()), "{problem}");
    }
    fs::create_dir(&below).unwrap();
    let attachment = datapath.fix();
    assert!(
        attachment.is_complete() && attachment.lost.len() == UNITS[0].hooks.len(),
        "{attachment:?}"
    );
    fs::write(below.join("cgroup.procs"), "0").unwrap();
    let answer = connect((VIP, 80));
    fs::write(place.cgroup.path.join("cgroup.procs"), "0").unwrap();
    assert_eq!(answer.unwrap(), 'a');
    drop(datapath);
    fs::remove_dir(&below).unwrap();
}

/// Reverse translation is attached before translation and detached after it.
pub fn hooks_come_and_go_in_order() {
    let place = Place::new();
    let datapath = place.start();
    let translates_back = |name: &&str| name.contains("getpeer") || name.contains("recvmsg");
    let connect = UNITS[0].hooks.iter().map(|hook| hook.program);
    assert!(connect.is_sorted_by_key(|name| !translates_back(&name)));
    let ids: Vec<u64> = programs()
        .iter()
        .map(|program| {
            let path = place.pin(&format!("v3/links/{program}"));
            number(&bpftool(&["-j", "link", "show", "pinned", path.to_str().unwrap()]), "id")
        })
        .collect();
    assert!(ids.is_sorted(), "the kernel numbers links as they come: {ids:?}");
    // Each pin goes right after its link was detached.
    let backwards: Vec<_> = programs().into_iter().rev().collect();
    let mut datapath = Some(datapath);
    for by_daemon in [true, false] {
        let mut datapath = datapath.take().unwrap_or_else(|| place.start());
        let events = inotify::init(CreateFlags::NONBLOCK).unwrap();
        inotify::add_watch(&events, place.pin("v3/links"), WatchFlags::DELETE).unwrap();
        if by_daemon {
            datapath.detach();
        } else {
            drop(datapath);
            assert_eq!(unload(&place.options.bpffs).unwrap(), programs().len());
        }
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&events, &mut buffer);
        let mut gone = Vec::new();
        while let Ok(event) = reader.next() {
            gone.extend(event.file_name().map(|name| name.to_str().unwrap().to_owned()));
        }
        assert!(gone.iter().eq(backwards.iter().copied()), "{gone:?}");
    }
}

/// How old the table is, an operator and a program can read by field name.
pub fn the_heartbeat_is_readable() {
    let place = Place::new();
    let mut datapath = place.start();
    datapath.apply(&table(vec![])).unwrap();
    let path = place.pin("v3/maps/CONTROL");
    let read = || {
        let dump = bpftool(&["-j", "map", "dump", "pinned", path.to_str().unwrap()]);
        ["heartbeat_ns", "table_ns", "table_generation"].map(|field| number(&dump, field))
    };
    datapath.heartbeat(None);
    let [heartbeat, table_time, generation] = read();
    assert!(heartbeat > 0 && table_time == 0 && generation == 1, "nothing is known of the table");
    datapath.heartbeat(Some(std::time::Duration::from_secs(2)));
    let [later, table_time, _] = read();
    assert!(later > heartbeat);
    assert_eq!(later - table_time, 2_000_000_000);
    datapath.heartbeat(Some(std::time::Duration::ZERO));
    let [last, newer, _] = read();
    assert!(last > later && newer == last);
}
