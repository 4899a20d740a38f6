//! A kernel that refuses the program of the unit `names`: a filter of system calls (seccomp) has another thread decide
//! on each BPF_PROG_LOAD, and it refuses those of this name.

use std::ffi::CStr;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::mpsc::sync_channel;

use lb_userspace::datapath::UnitState;
use rustix::event::{PollFd, PollFlags, poll};

use crate::fixture::{Place, Server, VIP, connect, service, table, unit};
use crate::names::{A, LONG, PORT, ask, names, query, serve, settings, socket};
use crate::netns::inside;

const BPF_PROG_LOAD: u32 = 5;
/// In `union bpf_attr`, for it: where the program's name is.
const NAME: std::ops::Range<usize> = 48..64;
/// In `struct seccomp_data`: the call's number, and the lower half of its first argument.
const NUMBER: u32 = 0;
const COMMAND: u32 = if cfg!(target_endian = "big") { 20 } else { 16 };

/// The program is refused: the daemon has the queries, also where an earlier daemon's program answered them, `status`
/// has the reason, and all else works. The next daemon tries again.
pub fn the_program_is_refused() {
    inside(|| {
        let (place, backend) = (Place::new(), Server::start(b'a'));
        let server = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
        let web = || ask(server, "web.service", A, false);
        drop(serve(&place));
        assert_eq!(web(), VIP.to_string());
        refusing(c"nohop_names", || {
            let mut datapath = place.start();
            let shown = unit(&datapath, "names").unwrap();
            let reason = shown.reason.unwrap();
            assert_eq!(shown.state, UnitState::Failed);
            assert!(
                reason.starts_with(
                    "the kernel refused the program nohop_names; it has every capability"
                ),
                "{reason}"
            );
            let web = service("web", VIP, &[(backend.address, 1)]);
            datapath.apply(&table(vec![web])).unwrap();
            datapath.configure_names(settings(PORT));
            datapath.set_names_ready(true);
            datapath.heartbeat(None);
            datapath.fix();
            assert_eq!(unit(&datapath, "names").unwrap().reason, Some(reason));
            assert!(datapath.names_prober().is_none() && datapath.active_since_last().is_empty());
            let listener = UdpSocket::bind(server).unwrap();
            listener.set_read_timeout(Some(LONG)).unwrap();
            let message = query("web.service", A, false);
            socket(server.ip()).send_to(&message, server).unwrap();
            let mut buffer = [0; 512];
            let len = listener.recv(&mut buffer).unwrap();
            assert_eq!(buffer[..len], message, "the daemon's");
            datapath.keep();
            assert_eq!(connect((VIP, 80)).unwrap(), 'a');
        });
        let mut datapath = place.start();
        datapath.apply(&names()).unwrap();
        datapath.configure_names(settings(PORT));
        assert_eq!(unit(&datapath, "names").unwrap().state, UnitState::Attached);
        assert_eq!(web(), VIP.to_string());
        datapath.detach();
    });
}

/// Runs it on a thread whose programs of this name the kernel refuses, by EPERM.
fn refusing<T: Send>(name: &CStr, run: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let (listener_out, listener) = sync_channel(1);
        let refused = scope.spawn(move || {
            listener_out.send(listen()).unwrap();
            run()
        });
        let listener = listener.recv().unwrap();
        scope.spawn(move || while decide(&listener, name) {});
        refused.join().unwrap()
    })
}

/// Has the descriptor that is returned decide on this thread's BPF_PROG_LOAD.
fn listen() -> OwnedFd {
    let load = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    let is_equal = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    let verdict = (libc::BPF_RET | libc::BPF_K) as u16;
    let instruction = |code, k, jf| libc::sock_filter { code, jt: 0, jf, k };
    let mut filter = [
        instruction(load, NUMBER, 0),
        instruction(is_equal, libc::SYS_bpf as u32, 3),
        instruction(load, COMMAND, 0),
        instruction(is_equal, BPF_PROG_LOAD, 1),
        instruction(verdict, libc::SECCOMP_RET_USER_NOTIF, 0),
        instruction(verdict, libc::SECCOMP_RET_ALLOW, 0),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    let (set, flags) = (libc::SECCOMP_SET_MODE_FILTER, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER);
    // SAFETY: the program is as long as it says; the kernel makes a descriptor for us.
    unsafe {
        let fd = libc::syscall(libc::SYS_seccomp, set, flags, &raw const program);
        assert!(fd >= 0, "seccomp: {}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd as libc::c_int)
    }
}

/// Decides on one call. Returns false when no thread has the filter any more.
fn decide(listener: &OwnedFd, name: &CStr) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)];
    poll(&mut fds, None).unwrap();
    if fds[0].revents().contains(PollFlags::HUP) {
        return false;
    }
    // SAFETY: it has integers only.
    let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    let mut verdict = libc::seccomp_notif_resp {
        id: 0,
        val: 0,
        error: 0,
        flags: libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
    };
    // SAFETY: the structures are the kernel's. The caller, of this process, waits in the call until it is decided,
    // and so does its argument, which is as long as its length says.
    unsafe {
        let received =
            libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut call);
        if received != 0 {
            return true;
        }
        let [_, attributes, len, ..] = call.data.args;
        let attributes = std::slice::from_raw_parts(attributes as *const u8, len as usize);
        if attributes.get(NAME).is_some_and(|found| found.starts_with(name.to_bytes_with_nul())) {
            (verdict.error, verdict.flags) = (-libc::EPERM, 0);
        }
        verdict.id = call.id;
        libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut verdict);
    }
    true
}
