//! The unit `names` from one version to another and back, while a client asks: of this layout with maps of other sizes or
//! formats, and of other layouts.

use std::mem::offset_of;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use aya::maps::{Array, Map, MapData};
use lb_common::{Control, LAYOUT};
use lb_userspace::datapath::{Datapath, NamesSettings, UnitState};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::fixture::{End, OTHER_VIP, Place, VIP, is_emulated, service, unit};
use crate::names::{A, PORT, ask, names, serve, settings};
use crate::netns::inside;
use crate::pins::bpftool;

fn server() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, PORT))
}

/// Runs it while a client asks for a name. `more` waits for another answer. Each answer is the name's address.
fn while_asked(work: impl FnOnce(&dyn Fn())) {
    let (is_over, n_answers) = (AtomicBool::new(false), AtomicU64::new(0));
    let ask_on = || {
        while !is_over.load(Ordering::Relaxed) {
            let found = ask(server(), "web.service", A, false);
            assert_eq!(found, VIP.to_string(), "answer {}", n_answers.load(Ordering::Relaxed));
            n_answers.fetch_add(1, Ordering::Relaxed);
        }
    };
    std::thread::scope(|scope| {
        let end = End(&is_over);
        let client = scope.spawn(ask_on);
        let more = || {
            // One may be under way.
            let wanted = n_answers.load(Ordering::Relaxed) + 2;
            while n_answers.load(Ordering::Relaxed) < wanted && !client.is_finished() {
                std::thread::yield_now();
            }
        };
        more();
        work(&more);
        more();
        drop(end);
        client.join().unwrap();
    });
}

/// That this daemon's program answers, and reports no problem.
fn answers(datapath: &Datapath, more: &dyn Fn()) {
    let shown = unit(datapath, "names").unwrap();
    assert_eq!((shown.state, shown.reason), (UnitState::Attached, None));
    let before = datapath.names_counters().answered;
    more();
    assert!(datapath.names_counters().answered > before, "an earlier program answers");
}

/// Daemons of several layouts and sizes take each other's place, back and forth. Before Linux 6.6 the program is a filter,
/// which stays by itself and is the same for all layouts: there this doesn't prove that another layout's links are kept.
pub fn of_other_layouts() {
    inside(|| {
        let mut place = Place::new();
        let n_services = place.options.datapath.max_services;
        let mut running = Some(serve(&place));
        while_asked(|more| {
            let versions = [(9, 1), (LAYOUT, 1), (LAYOUT, 2), (9, 2), (9, 1), (LAYOUT, 2)];
            for (turn, (layout, divisor)) in versions.into_iter().enumerate() {
                drop(running.take());
                place.options.layout = layout;
                place.options.datapath.max_services = n_services / divisor;
                let mut datapath = place.start();
                more();
                // What is known first, the table or this host's interfaces.
                if turn % 2 == 0 {
                    datapath.apply(&names()).unwrap();
                    more();
                    datapath.configure_names(settings(PORT));
                } else {
                    datapath.configure_names(settings(PORT));
                    more();
                    datapath.apply(&names()).unwrap();
                }
                answers(&datapath, more);
                let other = if layout == LAYOUT { 9 } else { LAYOUT };
                assert!(!place.pin(&format!("v{other}")).exists());
                running = Some(datapath);
            }
        });
        running.unwrap().detach();
        assert_eq!(ask(server(), "web.service", A, false), "ConnectionRefused");
    });
}

/// A daemon of another layout has gone.
fn after_another_layout() -> Place {
    let mut place = Place::new();
    place.options.layout = 9;
    drop(serve(&place));
    place.options.layout = LAYOUT;
    place
}

/// Another layout's program doesn't outlive a change of the layout in which something fails, nor its hooks.
pub fn of_another_layout_end() {
    inside(|| {
        let web = || ask(server(), "web.service", A, false);
        {
            let place = after_another_layout();
            let mut datapath = place.start();
            datapath.apply(&names()).unwrap();
            assert_eq!(web(), VIP.to_string());
            datapath.configure_names(NamesSettings { domain: "a".repeat(70), ..settings(PORT) });
            assert_eq!(web(), "ConnectionRefused", "it is left to the daemon");
            datapath.detach();
        }
        {
            let place = after_another_layout();
            for pin in std::fs::read_dir(place.pin("v9/links")).unwrap() {
                let pin = pin.unwrap();
                if !pin.file_name().to_string_lossy().starts_with("nohop_names_") {
                    std::fs::remove_file(pin.path()).unwrap();
                }
            }
            assert_eq!(web(), VIP.to_string());
            let mut datapath = place.start();
            assert!(datapath.are_hooks_ours() && !datapath.is_adopted());
            assert_eq!(web(), "ConnectionRefused", "there is no table yet");
            datapath.detach();
        }
        let place = after_another_layout();
        // A directory that can't be removed, before anything else is.
        let busy = place.pin("v9/busy");
        std::fs::create_dir(&busy).unwrap();
        mount("tmpfs", &busy, "tmpfs", MountFlags::empty(), None).unwrap();
        let mut datapath = place.start();
        let error = datapath.apply(&names()).unwrap_err().to_string();
        assert!(error.contains("v9"), "{error}");
        datapath.apply(&names()).unwrap();
        datapath.configure_names(settings(PORT));
        answers(&datapath, &|| assert_eq!(web(), VIP.to_string()));
        assert!(!place.pin("v9/links/nohop_names_1").exists(), "it was detached");
        unmount(&busy, UnmountFlags::empty()).unwrap();
        datapath.detach();
    });
}

/// A later version of this layout has left maps with longer values, which its program uses: they are made again, and
/// that program answers until then, by what it has.
pub fn with_other_formats() {
    const KINDS: [(&str, &str); 3] = [
        ("NAMES_CONTROL", "type array key 4 value 160 flags 1024"),
        ("NAME_RECORDS", "type array key 4 value 128 flags 1024"),
        ("NAMES", "type hash key 64 value 16 flags 0"),
    ];
    inside(|| {
        let place = Place::new();
        let mut running = Some(serve(&place));
        // A program passes queries when a table is newer by seconds than the last heartbeat in the control that it has,
        // which an emulated kernel takes.
        let n_without = if is_emulated() { 2 } else { 0 };
        let turns = [&KINDS[..], &KINDS[..1], &KINDS[1..2], &KINDS[2..]];
        while_asked(|more| {
            for kinds in turns.into_iter().skip(n_without) {
                drop(running.take());
                kinds.iter().for_each(|(name, kind)| replace(&place, name, kind));
                let mut datapath = place.start();
                more();
                // Names have other records than before.
                let mut table = names();
                for n in 0..2 * kinds.len() {
                    let name = format!("a{n}");
                    table
                        .services
                        .insert(name.as_str().into(), service(&name, OTHER_VIP, &[]).into());
                }
                datapath.apply(&table).unwrap();
                more();
                datapath.configure_names(settings(PORT));
                answers(&datapath, more);
                running = Some(datapath);
            }
        });
        running.unwrap().detach();
    });
}

/// Pins another map in the place of one, with as many entries.
fn replace(place: &Place, name: &str, kind: &str) {
    let pin = place.pin("v3/maps").join(name);
    let n_entries = MapData::from_pin(&pin).unwrap().info().unwrap().max_entries();
    std::fs::remove_file(&pin).unwrap();
    let words = format!("map create {} {kind} entries {n_entries} name later", pin.display());
    bpftool(&words.split(' ').collect::<Vec<_>>());
}

/// An earlier version that doesn't know the unit has run since, and doesn't keep the names: they are left to it, until a
/// daemon that does is back.
pub fn after_one_without_the_unit() {
    inside(|| {
        let place = Place::new();
        drop(serve(&place));
        let web = || ask(server(), "web.service", A, false);
        assert_eq!(web(), VIP.to_string());
        beat(&place.pin("v3/maps/CONTROL"));
        assert_eq!(web(), "ConnectionRefused", "left to the daemon");
        let mut datapath = place.start();
        datapath.heartbeat(None);
        assert_eq!(web(), VIP.to_string());
        datapath.detach();
    });
}

/// A heartbeat in the maps of the unit `connect` alone, of a time to come.
fn beat(control: &Path) {
    let map = Map::from_map_data(MapData::from_pin(control).unwrap()).unwrap();
    let mut control: Array<_, [u64; size_of::<Control>() / 8]> = map.try_into().unwrap();
    let mut words = control.get(&0, 0).unwrap();
    words[offset_of!(Control, heartbeat_ns) / 8] = u64::MAX / 2;
    control.set(0, words, 0).unwrap();
}
