//! The probe of the hooks shows the daemon's own connect(), though other processes connect to the same
//! address at the same time.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};

use lb_userspace::datapath::Datapath;
use lb_userspace::datapath::probe::{Observed, ProbeResult, connect_inside};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::fixture::{Bed, Place, Server, VIP, connect, proof, service};

const FLAG: &str = "--spray";
/// The daemon's hidden command, which it runs from its own executable: here, this one.
const PROBE: &str = "probe-connect";
const UNPRIVILEGED: u32 = 65534;
const N_THREADS: usize = 2;
const N_PROOFS: usize = 20;

/// The pool's own address.
const POOL: Ipv4Addr = Ipv4Addr::new(127, 128, 0, 0);

/// An unprivileged process in a network namespace of its own that connects to every port of the
/// pool's own address, again and again, until it is dropped.
struct Sprayer(Child);

impl Sprayer {
    fn start(cgroup: &Path) -> Sprayer {
        let mut child = Command::new("/proc/self/exe")
            .arg(FLAG)
            .arg(cgroup)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // It writes a byte once it has been through all ports.
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        Sprayer(child)
    }
}

impl Drop for Sprayer {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// Runs a hidden command, if this process was started for one.
pub fn hidden_command() -> Option<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    match arguments.next()?.as_str() {
        FLAG => {
            spray(arguments.next()?.as_ref());
            Some(ExitCode::SUCCESS)
        }
        PROBE => {
            let cgroup = arguments.next()?;
            connect_inside(cgroup.as_ref(), arguments.next()?.parse().ok()?).unwrap();
            Some(ExitCode::SUCCESS)
        }
        _ => None,
    }
}

fn spray(cgroup: &Path) {
    std::fs::write(cgroup.join("cgroup.procs"), "0").unwrap();
    // SAFETY: this thread is the only one, and has no descriptor of the former namespace.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
    // SAFETY: plain system calls, by the only thread.
    let is_nobody = unsafe {
        libc::setgroups(0, std::ptr::null()) == 0
            && libc::setresgid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED) == 0
            && libc::setresuid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED) == 0
    };
    assert!(is_nobody, "{}", std::io::Error::last_os_error());
    // On a machine with one processor the process that proves must get its turn in time.
    // SAFETY: a plain system call.
    let _ = unsafe { libc::nice(if crate::fixture::is_emulated() { 19 } else { 0 }) };
    for thread in 0..N_THREADS {
        std::thread::spawn(move || {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            let mut is_first = thread == 0;
            loop {
                for port in 1..=u16::MAX {
                    let _ = socket.connect(SocketAddr::from((POOL, port)));
                }
                if std::mem::take(&mut is_first) {
                    std::io::stdout().write_all(&[0]).unwrap();
                    std::io::stdout().flush().unwrap();
                }
            }
        });
    }
    // Until the test ends, however it does.
    let _ = std::io::stdin().read(&mut [0]);
}

pub fn a_proof_cant_be_forged() {
    let mut place = Place::new();
    let below = place.cgroup.path.join("below");
    std::fs::create_dir(&below).unwrap();
    // The daemon is in the scope and connects itself, or is above it and a child of it connects.
    for scope in [place.cgroup.path.clone(), below] {
        place.options.scope = scope.clone();
        let mut datapath = Datapath::start(&place.options).unwrap();
        let expected = proof(&datapath);
        let sprayer = Sprayer::start(&scope);
        for n in 0..N_PROOFS {
            let Observed { probe, is_own } = proof(&datapath);
            assert_eq!(probe.netns, expected.probe.netns, "proof {n} is the other process's");
            assert_eq!((probe.tgid == expected.probe.tgid, is_own), (is_own, expected.is_own));
        }
        drop(sprayer);
        datapath.detach();
    }
}

/// Only the programs, no application, can mistake another namespace for the host's: a proof corrects
/// it.
pub fn a_proof_corrects_the_namespace() {
    const ANOTHER_NETNS: u64 = u64::MAX;
    let server = Server::start(b'a');
    let mut bed = Bed::on_host(ANOTHER_NETNS);
    let mut web = service("web", VIP, &[(server.address, 1)]);
    web.backends.iter_mut().for_each(|backend| backend.host_only = true);
    bed.apply(vec![web]);
    connect((VIP, 80)).unwrap_err();
    bed.datapath.record_probe(proof(&bed.datapath));
    bed.datapath.keep();
    assert_eq!(connect((VIP, 80)).unwrap(), 'a');
}

/// A process that enters the scope gets no processor time: the daemon doesn't hang.
pub fn a_frozen_scope_is_reported() {
    let mut place = Place::new();
    let below = place.cgroup.path.join("below");
    std::fs::create_dir(&below).unwrap();
    place.options.scope = below.clone();
    let mut datapath = Datapath::start(&place.options).unwrap();
    std::fs::write(below.join("cgroup.freeze"), "1").unwrap();
    let proof = datapath.prober().probe();
    std::fs::write(below.join("cgroup.freeze"), "0").unwrap();
    let ProbeResult::Failed(reason) = proof else { panic!("{proof:?}") };
    assert!(reason.contains("cgroup.freeze"), "{reason}");
    assert!(!below.join("nohop-probe").exists());
    datapath.detach();
}
