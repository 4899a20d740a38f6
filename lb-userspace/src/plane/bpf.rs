//! What aya doesn't offer: cgroup links that are pinned, asked whether they still hold, and given
//! another program in place; and the cookie of a network namespace.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_UPDATE: libc::c_int = 29;
const BPF_LINK_DETACH: libc::c_int = 34;
const BPF_LINK_TYPE_CGROUP: u32 = 3;

/// Where a program is attached; from linux/bpf.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum AttachType {
    /// BPF_CGROUP_INET4_CONNECT
    Connect4 = 10,
    /// BPF_CGROUP_INET6_CONNECT
    Connect6 = 11,
    /// BPF_CGROUP_UDP4_SENDMSG
    SendMsg4 = 14,
    /// BPF_CGROUP_UDP6_SENDMSG
    SendMsg6 = 15,
    /// BPF_CGROUP_UDP4_RECVMSG
    RecvMsg4 = 19,
    /// BPF_CGROUP_UDP6_RECVMSG
    RecvMsg6 = 20,
    /// BPF_CGROUP_INET4_GETPEERNAME
    GetPeerName4 = 29,
    /// BPF_CGROUP_INET6_GETPEERNAME
    GetPeerName6 = 30,
}

/// A program's attachment to a cgroup. It ends with the last descriptor and pin.
#[derive(Debug)]
pub struct CgroupLink(OwnedFd);

/// What is found pinned where a link should be.
#[derive(Debug)]
pub enum Pinned {
    /// A cgroup link.
    Link(CgroupLink),
    /// Something else, as fdinfo has it.
    Other(String),
}

/// What a link joins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Joined {
    /// The cgroup's id, which is its directory's inode; 0 once the link was detached.
    pub cgroup_id: u64,
    /// Where in it, an [`AttachType`].
    pub attach_type: u32,
}

impl CgroupLink {
    /// Attaches a program to a cgroup, beside whatever is there. Kernel 5.7 and later.
    ///
    /// # Errors
    /// EBADF for a directory that is no cgroup v2 one, EPERM without CAP_NET_ADMIN and CAP_BPF.
    pub fn attach(
        program: BorrowedFd<'_>,
        cgroup: BorrowedFd<'_>,
        attach_type: AttachType,
    ) -> io::Result<CgroupLink> {
        let (program, cgroup) = (program.as_raw_fd() as u32, cgroup.as_raw_fd() as u32);
        let fd = bpf(BPF_LINK_CREATE, &[program, cgroup, attach_type as u32, 0])?;
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(CgroupLink(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// What is pinned at `path`; `None` when there is nothing.
    ///
    /// # Errors
    /// When the kernel refuses, such as EPERM for something that isn't a BPF object.
    pub fn pinned(path: &Path) -> io::Result<Option<Pinned>> {
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
        let is_link = kind == "link_type: cgroup";
        Ok(Some(if is_link { Pinned::Link(CgroupLink(fd)) } else { Pinned::Other(kind) }))
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

    /// Puts another program in the place of the present one: no dial finds neither, or both.
    ///
    /// # Errors
    /// ENOLINK once the link was detached.
    pub fn replace(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        let link = self.0.as_raw_fd() as u32;
        bpf(BPF_LINK_UPDATE, &[link, program.as_raw_fd() as u32, 0, 0]).map(drop)
    }

    /// What the link joins; `None` when it isn't a cgroup link.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn joined(&self) -> io::Result<Option<Joined>> {
        // struct bpf_link_info: type, id, prog_id, (padding,) then cgroup { cgroup_id, attach_type }.
        let mut info = [0u64; 8];
        let [low, high] = halves(info.as_mut_ptr() as u64);
        let size = size_of_val(&info) as u32;
        bpf(BPF_OBJ_GET_INFO_BY_FD, &[self.0.as_raw_fd() as u32, size, low, high])?;
        let [link_type, _id] = halves(info[0]);
        let [attach_type, _] = halves(info[3]);
        let joined = Joined { cgroup_id: info[2], attach_type };
        Ok((link_type == BPF_LINK_TYPE_CGROUP).then_some(joined))
    }

    /// Detaches the program, whoever holds the link.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn detach(&self) -> io::Result<()> {
        bpf(BPF_LINK_DETACH, &[self.0.as_raw_fd() as u32, 0, 0, 0]).map(drop)
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

/// The 32-bit halves of a word, in the order in which they lie in memory.
fn halves(word: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = word.to_ne_bytes();
    [u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h])]
}

/// The system call. The attribute is the beginning of a `bpf_attr`; the rest of it is zeros.
fn bpf(command: libc::c_int, attr: &[u32]) -> io::Result<libc::c_int> {
    // A larger zeroed attribute, 8-byte aligned, is right for every command and kernel.
    let mut whole = [0u64; 16];
    for (word, pair) in whole.iter_mut().zip(attr.chunks(2)) {
        *word = joined(pair[0], pair.get(1).copied().unwrap_or(0));
    }
    // SAFETY: the attribute is live and as large as said; what it points to, the caller keeps alive
    // and writable.
    let done =
        unsafe { libc::syscall(libc::SYS_bpf, command, whole.as_mut_ptr(), size_of_val(&whole)) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done as libc::c_int) }
}

fn joined(first: u32, second: u32) -> u64 {
    let ([a, b, c, d], [e, f, g, h]) = (first.to_ne_bytes(), second.to_ne_bytes());
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}
