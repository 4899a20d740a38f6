//! Programs of others at the same hooks: those that share them, and those that don't.

use std::fs;
use std::path::Path;
use std::process::Command;

use lb_userspace::datapath::{Datapath, find_obstacle};

use crate::fixture::{Place, Server, VIP, connect, service, table};
use crate::pins::{bpftool, number};

/// Pins some program for a hook, as another agent's, which is one of ours with another owner.
pub fn foreign_program(place: &Place, program: &str) -> String {
    let datapath = place.start();
    let link = place.pin(&format!("v3/links/{program}"));
    let shown = bpftool(&["-j", "link", "show", "pinned", link.to_str().unwrap()]);
    let id = number(&shown, "prog_id").to_string();
    let path = place.options.bpffs.with_file_name("foreign");
    let _ = fs::remove_file(&path);
    bpftool(&["prog", "pin", "id", &id, path.to_str().unwrap()]);
    let mut datapath = datapath;
    datapath.detach();
    path.to_str().unwrap().to_owned()
}

fn n_attached(cgroup: &Path) -> usize {
    // It fails on 5.10, which doesn't know all hooks that it asks for, but shows the others.
    let show = ["cgroup", "show", cgroup.to_str().unwrap()];
    let shown = Command::new("bpftool").args(show).output().unwrap().stdout;
    String::from_utf8_lossy(&shown).lines().filter(|line| line.contains("nohop_")).count()
}

/// At the scope or above it, at the first hook or at the last.
pub fn an_exclusive_program_is_named() {
    let mut place = Place::new();
    let own = place.cgroup.path.clone();
    let below = own.join("below/further");
    fs::create_dir_all(&below).unwrap();
    for (program, hook) in [("nohop_connect6", "connect6"), ("nohop_getpeer4", "getpeername4")] {
        place.options.scope = own.clone();
        let pinned = foreign_program(&place, program);
        let at = own.to_str().unwrap();
        bpftool(&["cgroup", "attach", at, hook, "pinned", &pinned]);
        for scope in [&own, &below] {
            place.options.scope = scope.clone();
            let n_before = n_attached(scope);
            let error = Datapath::start(&place.options).unwrap_err().to_string();
            for part in [
                &format!("another program ({program}, id "),
                &format!("holds the hook {hook} of {at} exclusively"),
                &format!("bpftool cgroup detach {at} {hook} id "),
            ] {
                assert!(error.contains(part.as_str()), "no {part:?} in {error}");
            }
            assert_eq!(n_attached(scope), n_before, "{}", scope.display());
            assert!(!place.options.bpffs.exists());
            assert_eq!(find_obstacle(scope, &place.options.bpffs).unwrap().unwrap().hook, hook);
        }
        bpftool(&["cgroup", "detach", at, hook, "pinned", &pinned]);
        assert_eq!(find_obstacle(&below, &place.options.bpffs).unwrap(), None);
    }
}

/// It comes while the daemon runs, and the daemon's own links are lost.
pub fn an_exclusive_program_is_named_later() {
    let mut place = Place::new();
    let own = place.cgroup.path.clone();
    let below = own.join("below");
    fs::create_dir(&below).unwrap();
    place.options.scope = own.clone();
    let pinned = foreign_program(&place, "nohop_connect4");
    place.options.scope = below.clone();
    let mut datapath = place.start_attached();
    datapath.apply(&table(Vec::new())).unwrap();
    let link = place.pin("v3/links/nohop_connect4");
    bpftool(&["link", "detach", "pinned", link.to_str().unwrap()]);
    let at = own.to_str().unwrap();
    bpftool(&["cgroup", "attach", at, "connect4", "pinned", &pinned]);
    let problem = datapath.fix().problem.unwrap();
    assert!(problem.contains("holds the hook connect4 of"), "{problem}");
    bpftool(&["cgroup", "detach", at, "connect4", "pinned", &pinned]);
    assert!(datapath.fix().is_complete());
    // Our links were there first and hold: a restart gives them other programs, and attaches nothing.
    bpftool(&["cgroup", "attach", at, "connect4", "pinned", &pinned]);
    drop(datapath);
    let mut datapath = place.start_attached();
    assert!(datapath.are_hooks_ours() && datapath.fix().is_complete());
    // Without one of them it is an obstacle again.
    bpftool(&["link", "detach", "pinned", link.to_str().unwrap()]);
    drop(datapath);
    let error = Datapath::start(&place.options).unwrap_err().to_string();
    assert!(error.contains("holds the hook connect4 of"), "{error}");
    bpftool(&["cgroup", "detach", at, "connect4", "pinned", &pinned]);
    datapath = place.start_attached();
    datapath.detach();
}

/// Those that share the hook, or let it be overridden from below, are no obstacle.
pub fn programs_that_share_are_none() {
    let server = Server::start(b'a');
    let mut place = Place::new();
    let own = place.cgroup.path.clone();
    place.options.scope = own.clone();
    let pinned = foreign_program(&place, "nohop_getpeer6");
    let below = own.join("below");
    fs::create_dir(&below).unwrap();
    for (flag, scope) in [("multi", &own), ("multi", &below), ("override", &below)] {
        let at = own.to_str().unwrap();
        bpftool(&["cgroup", "attach", at, "getpeername6", "pinned", &pinned, flag]);
        place.options.scope = scope.clone();
        let mut datapath = place.start_attached();
        datapath.apply(&table(vec![service("web", VIP, &[(server.address, 1)])])).unwrap();
        if scope == &own {
            assert_eq!(connect((VIP, 80)).unwrap(), 'a');
        }
        datapath.detach();
        bpftool(&["cgroup", "detach", at, "getpeername6", "pinned", &pinned]);
    }
}
