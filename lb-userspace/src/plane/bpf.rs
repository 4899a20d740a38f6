//! What aya doesn't offer: cgroup links that can be asked whether they still hold, detaching one from
//! outside, and the cookie of a network namespace.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_GET_FD_BY_ID: libc::c_int = 30;
const BPF_LINK_GET_NEXT_ID: libc::c_int = 31;
const BPF_LINK_DETACH: libc::c_int = 34;
const BPF_LINK_TYPE_CGROUP: u32 = 3;

/// Where a program is attached; from linux/bpf.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum AttachType {
    /// BPF_CGROUP_INET4_CONNECT
    Connect4 = 10,
    /// BPF_CGROUP_INET4_GETPEERNAME
    GetPeerName4 = 29,
}

/// A program's attachment to a cgroup. It ends with the last descriptor.
#[derive(Debug)]
pub struct CgroupLink(OwnedFd);

/// What a link joins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Joined {
    /// The program's id.
    pub program_id: u32,
    /// The cgroup's id, which is its directory's inode; 0 once the link was detached.
    pub cgroup_id: u64,
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
        let fd = bpf(BPF_LINK_CREATE, &mut [program, cgroup, attach_type as u32, 0])?;
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(CgroupLink(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The link with this id; `None` when there is none.
    ///
    /// # Errors
    /// EPERM without CAP_SYS_ADMIN.
    pub fn by_id(link_id: u32) -> io::Result<Option<CgroupLink>> {
        let fd = match bpf(BPF_LINK_GET_FD_BY_ID, &mut [link_id, 0, 0, 0]) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
            result => result?,
        };
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(Some(CgroupLink(unsafe { OwnedFd::from_raw_fd(fd) })))
    }

    /// What the link joins; `None` when it isn't a cgroup link.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn joined(&self) -> io::Result<Option<Joined>> {
        // struct bpf_link_info: type, id, prog_id, (padding,) then cgroup { cgroup_id, attach_type }.
        let mut info = [0u64; 8];
        let pointer = info.as_mut_ptr() as u64;
        let [low, high] = halves(pointer);
        bpf(
            BPF_OBJ_GET_INFO_BY_FD,
            &mut [self.0.as_raw_fd() as u32, size_of_val(&info) as u32, low, high],
        )?;
        let [link_type, _id] = halves(info[0]);
        let [program_id, _padding] = halves(info[1]);
        Ok((link_type == BPF_LINK_TYPE_CGROUP).then_some(Joined { program_id, cgroup_id: info[2] }))
    }

    /// Detaches the program, whoever holds the link.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn detach(&self) -> io::Result<()> {
        bpf(BPF_LINK_DETACH, &mut [self.0.as_raw_fd() as u32, 0, 0, 0]).map(drop)
    }
}

/// The ids of all links.
///
/// # Errors
/// When the kernel refuses, such as EPERM.
pub fn link_ids() -> io::Result<Vec<u32>> {
    let mut ids = Vec::new();
    let mut attr = [0, 0, 0, 0];
    loop {
        match bpf(BPF_LINK_GET_NEXT_ID, &mut attr) {
            Ok(_) => ids.push(attr[1]),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(ids),
            Err(error) => return Err(error),
        }
        attr = [attr[1], 0, 0, 0];
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

/// The system call, for commands whose `bpf_attr` has at most 16 bytes in use.
fn bpf(command: libc::c_int, attr: &mut [u32; 4]) -> io::Result<libc::c_int> {
    // A larger zeroed attribute, 8-byte aligned, is right for every command and kernel.
    let mut whole = [0u64; 16];
    whole[0] = u64::from_ne_bytes(joined(attr[0], attr[1]));
    whole[1] = u64::from_ne_bytes(joined(attr[2], attr[3]));
    // SAFETY: the attribute is live and as large as said; what it points to, the caller keeps alive
    // and writable.
    let done =
        unsafe { libc::syscall(libc::SYS_bpf, command, whole.as_mut_ptr(), size_of_val(&whole)) };
    [attr[0], attr[1]] = halves(whole[0]);
    [attr[2], attr[3]] = halves(whole[1]);
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done as libc::c_int) }
}

fn joined(first: u32, second: u32) -> [u8; 8] {
    let ([a, b, c, d], [e, f, g, h]) = (first.to_ne_bytes(), second.to_ne_bytes());
    [a, b, c, d, e, f, g, h]
}
