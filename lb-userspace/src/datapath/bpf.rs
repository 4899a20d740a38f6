//! BPF operations that aya lacks: links that are pinned, queried and updated in place; the programs
//! attached to a cgroup; small programs that test the verifier; a wait for a grace period; the cookie
//! of a network namespace.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_PROG_TEST_RUN: libc::c_int = 10;
const BPF_PROG_GET_FD_BY_ID: libc::c_int = 13;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_UPDATE: libc::c_int = 29;
const BPF_LINK_DETACH: libc::c_int = 34;
const BPF_LINK_TYPE_CGROUP: u32 = 3;
const BPF_LINK_TYPE_XDP: u32 = 6;
const BPF_LINK_TYPE_TCX: u32 = 11;

/// A program runs in the driver or not at all (linux/if_link.h).
pub const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

/// Where in its target a program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttachType {
    /// Its number in linux/bpf.h.
    pub number: u32,
    /// Its name, as every version of bpftool takes it.
    pub name: &'static str,
}

impl AttachType {
    /// BPF_CGROUP_SOCK_OPS
    pub const SOCK_OPS: AttachType = AttachType { number: 3, name: "sock_ops" };
    /// BPF_CGROUP_INET4_BIND
    pub const BIND4: AttachType = AttachType { number: 8, name: "bind4" };
    /// BPF_CGROUP_INET6_BIND
    pub const BIND6: AttachType = AttachType { number: 9, name: "bind6" };
    /// BPF_CGROUP_INET4_CONNECT
    pub const CONNECT4: AttachType = AttachType { number: 10, name: "connect4" };
    /// BPF_CGROUP_INET6_CONNECT
    pub const CONNECT6: AttachType = AttachType { number: 11, name: "connect6" };
    /// BPF_CGROUP_UDP4_SENDMSG
    pub const SENDMSG4: AttachType = AttachType { number: 14, name: "sendmsg4" };
    /// BPF_CGROUP_UDP6_SENDMSG
    pub const SENDMSG6: AttachType = AttachType { number: 15, name: "sendmsg6" };
    /// BPF_CGROUP_UDP4_RECVMSG
    pub const RECVMSG4: AttachType = AttachType { number: 19, name: "recvmsg4" };
    /// BPF_CGROUP_UDP6_RECVMSG
    pub const RECVMSG6: AttachType = AttachType { number: 20, name: "recvmsg6" };
    /// BPF_CGROUP_INET4_GETPEERNAME
    pub const GETPEERNAME4: AttachType = AttachType { number: 29, name: "getpeername4" };
    /// BPF_CGROUP_INET6_GETPEERNAME
    pub const GETPEERNAME6: AttachType = AttachType { number: 30, name: "getpeername6" };
}

/// Where at an interface tcx attaches a program, by its number in linux/bpf.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcxHook(u32);

impl TcxHook {
    /// BPF_TCX_INGRESS
    pub const INGRESS: TcxHook = TcxHook(46);
    /// BPF_TCX_EGRESS
    pub const EGRESS: TcxHook = TcxHook(47);
}

/// A program's attachment (`bpf_link`). It ends with the last descriptor and pin.
#[derive(Debug)]
pub struct Link(OwnedFd);

/// An object that is pinned in a link's place.
#[derive(Debug)]
pub enum PinnedObject {
    /// A link, of any kind.
    Link(Link),
    /// Something else, as fdinfo describes it.
    Other(String),
}

/// The target of a cgroup link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkInfo {
    /// The cgroup's id, which is its directory's inode; 0 once the link was detached.
    pub cgroup_id: u64,
    /// Where in it: the number of an [`AttachType`].
    pub attach_type: u32,
}

impl Link {
    /// Attaches a program to a target, such as a cgroup, in addition to those attached there.
    /// Kernel 5.7 and later.
    ///
    /// # Errors
    /// EBADF for a directory that is no cgroup v2 one, EPERM without CAP_NET_ADMIN and CAP_BPF.
    pub fn attach(
        program: BorrowedFd<'_>,
        target: BorrowedFd<'_>,
        attach_type: AttachType,
    ) -> io::Result<Link> {
        let (program, target) = (program.as_raw_fd() as u32, target.as_raw_fd() as u32);
        let fd = bpf(BPF_LINK_CREATE, &[program, target, attach_type.number, 0])?;
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(Link(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Attaches a program to an interface, before those that are attached there. Kernel 6.6 and later.
    ///
    /// # Errors
    /// EINVAL on earlier kernels, EPERM without CAP_NET_ADMIN and CAP_BPF, ENODEV for no interface.
    pub fn attach_tcx(
        program: BorrowedFd<'_>,
        interface: u32,
        TcxHook(hook): TcxHook,
    ) -> io::Result<Link> {
        const BPF_F_BEFORE: u32 = 1 << 3;
        let program = program.as_raw_fd() as u32;
        let fd = bpf(BPF_LINK_CREATE, &[program, interface, hook, BPF_F_BEFORE])?;
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(Link(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Attaches a program to an interface's driver, where no other is attached. Kernel 5.9 and later.
    ///
    /// # Errors
    /// EOPNOTSUPP and others from the driver, EBUSY where another program is attached, EPERM without
    /// CAP_NET_ADMIN and CAP_BPF.
    pub fn attach_xdp(program: BorrowedFd<'_>, interface: u32) -> io::Result<Link> {
        const BPF_XDP: u32 = 37;
        let program = program.as_raw_fd() as u32;
        let fd = bpf(BPF_LINK_CREATE, &[program, interface, BPF_XDP, XDP_FLAGS_DRV_MODE])?;
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(Link(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The interface that the link attaches a program to, 0 once that is gone or the link was detached;
    /// `None` if it isn't such a link.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn tcx_interface(&self) -> io::Result<Option<u32>> {
        self.interface(BPF_LINK_TYPE_TCX)
    }

    /// The same of a link to an interface's driver.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn xdp_interface(&self) -> io::Result<Option<u32>> {
        self.interface(BPF_LINK_TYPE_XDP)
    }

    fn interface(&self, wanted: u32) -> io::Result<Option<u32>> {
        // struct bpf_link_info: type, id, prog_id, (padding,) then tcx { ifindex, attach_type } or
        // xdp { ifindex }.
        let info = self.raw_info()?;
        let ([link_type, _id], [interface, _]) = (halves(info[0]), halves(info[2]));
        Ok((link_type == wanted).then_some(interface))
    }

    /// The object that is pinned at `path`; `None` when there is none.
    ///
    /// # Errors
    /// When the kernel refuses, such as EPERM for something that isn't a BPF object.
    pub fn pinned(path: &Path) -> io::Result<Option<PinnedObject>> {
        let name = CString::new(path.as_os_str().as_bytes())?;
        let [low, high] = halves(name.as_ptr() as u64);
        let fd = match bpf(BPF_OBJ_GET, &[low, high, 0, 0]) {
            // SAFETY: the kernel has just made this descriptor for us.
            Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd) },
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let about = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
        let kind = about.lines().find(|line| line.contains("_type:")).unwrap_or("no type");
        let kind = kind.split_whitespace().collect::<Vec<_>>().join(" ");
        let is_link = kind.starts_with("link_type:");
        Ok(Some(if is_link { PinnedObject::Link(Link(fd)) } else { PinnedObject::Other(kind) }))
    }

    /// Pins the link, so that it outlives this process.
    ///
    /// # Errors
    /// EEXIST when something is there, EINVAL or EPERM when `path` isn't on a bpffs.
    pub fn pin(&self, path: &Path) -> io::Result<()> {
        let name = CString::new(path.as_os_str().as_bytes())?;
        let [low, high] = halves(name.as_ptr() as u64);
        bpf(BPF_OBJ_PIN, &[low, high, self.0.as_raw_fd() as u32, 0]).map(drop)
    }

    /// Replaces the program in place: no call meets neither program, or both.
    ///
    /// # Errors
    /// ENOLINK once the link was detached.
    pub fn replace(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        let link = self.0.as_raw_fd() as u32;
        bpf(BPF_LINK_UPDATE, &[link, program.as_raw_fd() as u32, 0, 0]).map(drop)
    }

    /// The link's target; `None` if it isn't a cgroup link.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn info(&self) -> io::Result<Option<LinkInfo>> {
        // struct bpf_link_info: type, id, prog_id, (padding,) then cgroup { cgroup_id, attach_type }.
        let info = self.raw_info()?;
        let [link_type, _id] = halves(info[0]);
        let [attach_type, _] = halves(info[3]);
        let attached = LinkInfo { cgroup_id: info[2], attach_type };
        Ok((link_type == BPF_LINK_TYPE_CGROUP).then_some(attached))
    }

    fn raw_info(&self) -> io::Result<[u64; 8]> {
        let mut info = [0u64; 8];
        let [low, high] = halves(info.as_mut_ptr() as u64);
        let size = size_of_val(&info) as u32;
        bpf(BPF_OBJ_GET_INFO_BY_FD, &[self.0.as_raw_fd() as u32, size, low, high])?;
        Ok(info)
    }

    /// Detaches the program, even if other processes hold the link. Links of some kinds (tracing, iterators) can't
    /// be detached: they end with the last descriptor and pin.
    ///
    /// # Errors
    /// When the kernel refuses, EOPNOTSUPP for a link that can't be detached.
    pub fn detach(&self) -> io::Result<()> {
        bpf(BPF_LINK_DETACH, &[self.0.as_raw_fd() as u32, 0, 0, 0]).map(drop)
    }
}

/// The programs that are attached to a cgroup itself, at one hook.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AttachedPrograms {
    /// BPF_F_ALLOW_OVERRIDE or BPF_F_ALLOW_MULTI, by which they are attached; 0 for exclusively.
    pub flags: u32,
    /// Their ids, no more than 64: the most that there can be (BPF_CGROUP_MAX_PROGS).
    pub ids: Vec<u32>,
}

/// The programs attached to the cgroup itself, by links or without.
///
/// # Errors
/// EPERM without CAP_NET_ADMIN, EBADF for a directory that is no cgroup v2 one.
pub fn attached_programs(
    cgroup: BorrowedFd<'_>,
    attach_type: AttachType,
) -> io::Result<AttachedPrograms> {
    let mut ids = [0u32; 64];
    let [low, high] = halves(ids.as_mut_ptr() as u64);
    let (cgroup, n) = (cgroup.as_raw_fd() as u32, ids.len() as u32);
    let mut attr = attr_of(&[cgroup, attach_type.number, 0, 0, low, high, n]);
    bpf_by(BPF_PROG_QUERY, &mut attr)?;
    // The kernel has written to the fourth word and to the seventh.
    let ([_, flags], [n, _]) = (halves(attr[1]), halves(attr[3]));
    let ids = ids.iter().take(n as usize).copied().collect();
    Ok(AttachedPrograms { flags, ids })
}

/// A program's name, of up to 15 characters.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN, ENOENT when it is gone.
pub fn program_name(id: u32) -> io::Result<String> {
    let fd = bpf(BPF_PROG_GET_FD_BY_ID, &[id, 0])?;
    // SAFETY: the kernel has just made this descriptor for us.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // struct bpf_prog_info: its name is 16 bytes at offset 64.
    let mut info = [0u64; 10];
    let [low, high] = halves(info.as_mut_ptr() as u64);
    let size = size_of_val(&info) as u32;
    bpf(BPF_OBJ_GET_INFO_BY_FD, &[fd.as_raw_fd() as u32, size, low, high])?;
    let [.., first, second] = info.map(u64::to_ne_bytes);
    let name = [first, second].concat();
    let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
    Ok(String::from_utf8_lossy(name).into_owned())
}

/// A program that the kernel didn't take.
#[derive(Debug)]
pub struct Rejected {
    /// The kernel's error.
    pub error: io::Error,
    /// The verifier's log; empty if it didn't run.
    pub log: String,
}

impl Rejected {
    /// Whether the verifier has no such helper for this kind of program. libbpf searches for the same
    /// messages (`libbpf_probe_bpf_helper`).
    pub fn is_for_no_helper(&self) -> bool {
        ["invalid func ", "unknown func ", "program of this type cannot use helper "]
            .iter()
            .any(|words| self.log.contains(words))
    }
}

/// Loads a socket-address program of a few instructions, to see whether the kernel takes it.
///
/// # Errors
/// When it doesn't.
pub fn load_trial(instructions: &[u64], attach_type: AttachType) -> Result<(), Rejected> {
    const CGROUP_SOCK_ADDR: u32 = 18;
    let license = c"GPL";
    let mut log = vec![0u8; 4096];
    let [instructions_low, instructions_high] = halves(instructions.as_ptr() as u64);
    let [license_low, license_high] = halves(license.as_ptr() as u64);
    let [log_low, log_high] = halves(log.as_mut_ptr() as u64);
    let mut attr = [0u32; 18];
    attr[..10].copy_from_slice(&[
        CGROUP_SOCK_ADDR,
        instructions.len() as u32,
        instructions_low,
        instructions_high,
        license_low,
        license_high,
        1,
        log.len() as u32,
        log_low,
        log_high,
    ]);
    attr[17] = attach_type.number;
    match bpf(BPF_PROG_LOAD, &attr) {
        Ok(fd) => {
            // SAFETY: the kernel has just made this descriptor for us.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
            Ok(())
        }
        Err(error) => {
            let written = log.split(|&byte| byte == 0).next().unwrap_or_default();
            Err(Rejected { error, log: String::from_utf8_lossy(written).into_owned() })
        }
    }
}

/// Waits for programs that run, by a map in a map: its update returns only once every program that
/// may have seen the former state has ended (`maybe_wait_bpf_programs` in kernel/bpf/syscall.c).
///
/// MEMBARRIER_CMD_GLOBAL waits for the same, but not where one processor alone is online, on which a
/// program may still be preempted half-way, and not with `nohz_full`.
#[derive(Debug)]
pub struct ProgramWait {
    outer: OwnedFd,
    inner: OwnedFd,
}

impl ProgramWait {
    /// Makes the two maps.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn new() -> io::Result<ProgramWait> {
        const ARRAY: u32 = 2;
        const ARRAY_OF_MAPS: u32 = 12;
        // Type, size of keys and of values, entries, flags, and the map that shows what is inside.
        let inner = bpf(BPF_MAP_CREATE, &[ARRAY, 4, 4, 1])?;
        // SAFETY: the kernel has just made this descriptor for us.
        let inner = unsafe { OwnedFd::from_raw_fd(inner) };
        let shown = inner.as_raw_fd() as u32;
        let outer = bpf(BPF_MAP_CREATE, &[ARRAY_OF_MAPS, 4, 4, 1, 0, shown])?;
        // SAFETY: as above.
        Ok(ProgramWait { outer: unsafe { OwnedFd::from_raw_fd(outer) }, inner })
    }

    /// Waits until every program that was running has ended: 10 to 20 ms.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn wait(&self) -> io::Result<()> {
        let (key, value) = (0u32, self.inner.as_raw_fd() as u32);
        let [key_low, key_high] = halves(&raw const key as u64);
        let [value_low, value_high] = halves(&raw const value as u64);
        let map = self.outer.as_raw_fd() as u32;
        bpf(BPF_MAP_UPDATE_ELEM, &[map, 0, key_low, key_high, value_low, value_high]).map(drop)
    }
}

/// Has the kernel give reasons for its errors to a netlink socket, and no copies of requests.
///
/// # Errors
/// When it doesn't know the options (before 4.12).
pub fn ask_for_reasons(socket: BorrowedFd<'_>) -> io::Result<()> {
    for option in [libc::NETLINK_CAP_ACK, libc::NETLINK_EXT_ACK] {
        let on: libc::c_int = 1;
        // SAFETY: the value is live, and as long as said.
        let done = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_NETLINK,
                option,
                (&raw const on).cast(),
                size_of_val(&on) as libc::socklen_t,
            )
        };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The cookie of this process's network namespace. Kernel 5.14 and later.
///
/// # Errors
/// ENOPROTOOPT on older kernels.
pub fn netns_cookie() -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let socket = std::net::UdpSocket::bind(("127.0.0.1", 0))?;
    let mut cookie = 0u64;
    let mut length = size_of_val(&cookie) as libc::socklen_t;
    // SAFETY: both pointers are to live values, and the length says how large the first is.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if done == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// Runs a program on a packet, without doing what it decides. `context` is the beginning of its context. Returns what
/// it returns, and the packet that it leaves.
///
/// # Errors
/// When the kernel refuses, such as a context that it can't make.
pub fn test_run(
    program: BorrowedFd<'_>,
    packet: &[u8],
    context: &[u32],
) -> io::Result<(u32, Vec<u8>)> {
    let mut out = vec![0; packet.len() + 256];
    let mut attr = [0u64; 16];
    attr[0] = joined(program.as_raw_fd() as u32, 0);
    attr[1] = joined(packet.len() as u32, out.len() as u32);
    (attr[2], attr[3]) = (packet.as_ptr() as u64, out.as_mut_ptr() as u64);
    // Once.
    attr[4] = joined(1, 0);
    attr[5] = joined(size_of_val(context) as u32, 0);
    attr[6] = context.as_ptr() as u64;
    bpf_by(BPF_PROG_TEST_RUN, &mut attr)?;
    let ([_, verdict], [_, len]) = (halves(attr[0]), halves(attr[1]));
    out.truncate(len as usize);
    Ok((verdict, out))
}

/// The 32-bit halves of a word, in the order in which they lie in memory.
fn halves(word: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = word.to_ne_bytes();
    [u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h])]
}

/// The system call. The attribute is the beginning of a `bpf_attr`; the rest of it is zeros.
fn bpf(command: libc::c_int, attr: &[u32]) -> io::Result<libc::c_int> {
    bpf_by(command, &mut attr_of(attr))
}

/// A larger zeroed attribute, 8-byte aligned, is right for every command and kernel.
fn attr_of(words: &[u32]) -> [u64; 16] {
    let mut whole = [0u64; 16];
    for (word, pair) in whole.iter_mut().zip(words.chunks(2)) {
        *word = joined(pair[0], pair.get(1).copied().unwrap_or(0));
    }
    whole
}

/// The same, where the kernel answers in the attribute.
fn bpf_by(command: libc::c_int, attr: &mut [u64; 16]) -> io::Result<libc::c_int> {
    // SAFETY: the attribute is live and as large as said; what it points to, the caller keeps alive
    // and writable.
    let done =
        unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), size_of_val(attr)) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done as libc::c_int) }
}

fn joined(first: u32, second: u32) -> u64 {
    let ([a, b, c, d], [e, f, g, h]) = (first.to_ne_bytes(), second.to_ne_bytes());
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}
