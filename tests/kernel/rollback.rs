//! This version is started over a later one: with links of kinds that it doesn't know, other maps,
//! other directories. They are removed; other programs' pins stay.

use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use lb_userspace::datapath::{Datapath, unload};

use crate::disconnect::bpf;
use crate::fixture::{Place, Server, VIP, connect, service, table};
use crate::pins::{bpftool, programs};

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_DETACH: libc::c_int = 34;

fn descriptor(fd: i32) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

pub fn pin(object: &OwnedFd, path: &Path) {
    let name = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
    bpf(BPF_OBJ_PIN, &[name.as_ptr() as u64, object.as_raw_fd() as u64]).unwrap();
}

/// What is pinned there.
pub fn pinned(path: &Path) -> OwnedFd {
    let name = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
    descriptor(bpf(BPF_OBJ_GET, &[name.as_ptr() as u64, 0]).unwrap())
}

/// Detaches the link that is pinned there, at once. One that only loses its pin runs for a moment
/// longer: the kernel puts its end off to a worker (`bpf_link_put()`).
pub fn detach(path: &Path) {
    let link = pinned(path);
    bpf(BPF_LINK_DETACH, &[link.as_raw_fd() as u64]).unwrap();
}

/// A program that returns `value`.
pub fn program(kind: u32, attach_type: u32, value: u32) -> OwnedFd {
    let instructions = [u64::from(value) << 32 | 0xb7, 0x95];
    let license = c"GPL";
    let mut attr = [0u32; 32];
    (attr[0], attr[1]) = (kind, instructions.len() as u32);
    let (instructions, license) = (instructions.as_ptr() as u64, license.as_ptr() as u64);
    (attr[2], attr[3]) = (instructions as u32, (instructions >> 32) as u32);
    (attr[4], attr[5]) = (license as u32, (license >> 32) as u32);
    attr[17] = attach_type;
    descriptor(bpf(BPF_PROG_LOAD, &attr).unwrap())
}

pub fn link(program: &OwnedFd, target: u32, attach_type: u32) -> std::io::Result<OwnedFd> {
    let mut attr = [0u32; 32];
    (attr[0], attr[1], attr[2]) = (program.as_raw_fd() as u32, target, attach_type);
    bpf(BPF_LINK_CREATE, &attr).map(descriptor)
}

/// A link of a kind, from the kernel on that has it, in a network namespace of this thread's own.
fn links() -> Vec<(&'static str, OwnedFd)> {
    const XDP: (u32, u32) = (6, 37);
    const SCHED_CLS: u32 = 3;
    const TCX_INGRESS: u32 = 46;
    const SK_LOOKUP: (u32, u32) = (30, 36);
    let loopback = 1;
    let netns = fs::File::open("/proc/thread-self/ns/net").unwrap();
    let lookup = program(SK_LOOKUP.0, SK_LOOKUP.1, 1);
    let xdp = program(XDP.0, XDP.1, 2);
    let mut links = vec![
        ("sk_lookup", link(&lookup, netns.as_raw_fd() as u32, SK_LOOKUP.1).unwrap()),
        ("xdp", link(&xdp, loopback, XDP.1).unwrap()),
    ];
    // From 6.6 on.
    if crate::running_kernel() >= (6, 6) {
        let classifier = program(SCHED_CLS, TCX_INGRESS, 0);
        links.push(("tcx", link(&classifier, loopback, TCX_INGRESS).unwrap()));
    }
    links
}

fn in_own_namespace<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: it is this thread's namespace alone that changes.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
                .unwrap();
            work()
        });
        thread.join().unwrap()
    })
}

/// A later version's pins: its own maps and links, and more links than ours.
fn later(place: &mut Place, server: &Server) {
    place.options.layout = 9;
    let mut datapath = place.start_attached();
    datapath.apply(&table(vec![service("web", VIP, &[(server.address, 1)])])).unwrap();
    drop(datapath);
    place.options.layout = 3;
    let units = place.pin("v9/units/edge/links");
    fs::create_dir_all(&units).unwrap();
    for (n, (name, link)) in in_own_namespace(links).into_iter().enumerate() {
        pin(&link, &place.pin("v9/links").join(name));
        if n == 0 {
            pin(&link, &units.join("nohop_edge"));
        }
    }
    let map = place.pin("v9/maps/UNHEARD_OF");
    let kind = ["type", "hash", "key", "4", "value", "4", "entries", "1", "name", "later"];
    bpftool(&[["map", "create", map.to_str().unwrap()].as_slice(), &kind].concat());
    let (classifier, programs) = (program(3, 0, 0), place.pin("v9/programs"));
    fs::create_dir(&programs).unwrap();
    pin(&classifier, &programs.join("tail"));
}

pub fn over_links_of_every_kind() {
    let server = Server::start(b'a');
    let mut place = Place::new();
    later(&mut place, &server);
    let mut datapath = place.start_attached_or_waiting();
    assert!(!datapath.are_hooks_ours());
    assert_eq!(
        connect((VIP, 80)).unwrap(),
        'a',
        "the later version's hooks stay in use until then"
    );
    datapath.apply(&table(vec![service("web", VIP, &[(server.address, 1)])])).unwrap();
    assert!(datapath.are_hooks_ours() && !place.pin("v9").exists());
    assert_eq!(connect((VIP, 80)).unwrap(), 'a');
    datapath.detach();
}

pub fn unload_ends_links_of_every_kind() {
    let server = Server::start(b'a');
    let mut place = Place::new();
    later(&mut place, &server);
    assert!(unload(&place.options.bpffs).unwrap() >= programs().len() + 3);
    assert!(!place.options.bpffs.exists());
    connect((VIP, 80)).unwrap_err();
}

/// What a removal fails at keeps nothing else attached, and is the error.
pub fn unload_ends_what_it_can() {
    let server = Server::start(b'a');
    let mut place = Place::new();
    later(&mut place, &server);
    let foreign = place.pin("v9/links/theirs");
    pin(&program(3, 0, 0), &foreign);
    let error = unload(&place.options.bpffs).unwrap_err().to_string();
    assert!(error.contains("v9/links/theirs") && error.contains("another program"), "{error}");
    connect((VIP, 80)).unwrap_err();
    assert!(foreign.exists());
    let links: Vec<_> = fs::read_dir(place.pin("v9/links")).unwrap().collect();
    assert_eq!(links.len(), 1, "{links:?}");
    fs::remove_file(&foreign).unwrap();
    assert_eq!(unload(&place.options.bpffs).unwrap(), 0);
    assert!(!place.options.bpffs.exists());
}

/// A later version's socket storage has another size.
pub fn over_another_storage() {
    let server = Server::start(b'a');
    let place = Place::new();
    let web = || vec![service("web", VIP, &[(server.address, 1)])];
    let mut datapath = place.start_attached();
    datapath.apply(&table(web())).unwrap();
    drop(datapath);
    let peers = place.pin("sockets/SK_REVNAT");
    fs::remove_file(&peers).unwrap();
    pin(&storage(96), &peers);
    let mut datapath = place.start_attached_or_waiting();
    datapath.apply(&table(web())).unwrap();
    assert_eq!(connect((VIP, 80)).unwrap(), 'a');
    datapath.detach();
}

/// A socket storage whose values have this many bytes.
fn storage(value_size: u32) -> OwnedFd {
    const BPF_BTF_LOAD: libc::c_int = 18;
    // struct btf_header, an integer, an array of it, strings; as in `disconnect::Storage`.
    let (integer, array) = (1 << 24, 3 << 24);
    let header = [0x0001_eb9f, 24, 0, 16 + 24, 16 + 24, 5];
    let types = [1, integer, 4, 32, 0, array, 0, 1, 1, value_size / 4];
    let words = header.iter().chain(&types).flat_map(|word: &u32| word.to_ne_bytes());
    let btf: Vec<u8> = words.chain(*b"\0int\0").collect();
    let mut attr = [0u64; 16];
    (attr[0], attr[2]) = (btf.as_ptr() as u64, btf.len() as u64);
    let btf = descriptor(bpf(BPF_BTF_LOAD, &attr).unwrap());
    let mut attr = [0u32; 32];
    attr[..5].copy_from_slice(&[24, 4, value_size, 0, 1]);
    attr[12..15].copy_from_slice(&[btf.as_raw_fd() as u32, 1, 2]);
    descriptor(bpf(BPF_MAP_CREATE, &attr).unwrap())
}

/// Directories of other programs that look like layouts, next to ours.
pub fn foreign_directories_stay() {
    let server = Server::start(b'a');
    let place = Place::new();
    let names = ["v7/maps/precious", "v8", "other", "v9", "v10/maps"];
    let foreign = names.map(|name| place.pin(name));
    let ours = place.start_attached();
    drop(ours);
    fs::create_dir_all(&foreign[0]).unwrap();
    fs::create_dir_all(foreign[1].join("links")).unwrap();
    foreign[2..].iter().for_each(|dir| fs::create_dir_all(dir).unwrap());
    let classifier = program(3, 0, 0);
    pin(&classifier, &foreign[1].join("links/theirs"));
    let mut datapath = place.start_attached_or_waiting();
    datapath.apply(&table(vec![service("web", VIP, &[(server.address, 1)])])).unwrap();
    assert_eq!(connect((VIP, 80)).unwrap(), 'a');
    drop(datapath);
    assert_eq!(unload(&place.options.bpffs).unwrap(), programs().len());
    assert!(foreign.iter().all(|dir| dir.exists()));
    assert!(foreign[1].join("links/theirs").exists());
    assert!(!place.pin("v3").exists() && !place.pin("sockets").exists());

    // Where our own layout should be, it is in the way.
    fs::create_dir_all(place.pin("v3/maps/precious")).unwrap();
    let error = Datapath::start(&place.options).unwrap_err().to_string();
    assert!(error.contains("v3 has no pins of nohop's in it"), "{error}");
    assert!(place.pin("v3/maps/precious").exists());
}
