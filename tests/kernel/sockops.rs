//! A sockops program of others in the hierarchy.

use std::fs::File;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::path::Path;

const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const PROG_DETACH: libc::c_int = 9;
const PROG_TYPE_SOCK_OPS: u32 = 13;
const ATTACH_TYPE_SOCK_OPS: u32 = 3;
const ALLOW_MULTI: u32 = 2;

/// A program that takes away the callbacks that each socket asked for, and answers each operation with 7;
/// attached to a cgroup until it is dropped, after those that are attached to it already.
pub struct Spoiler {
    program: OwnedFd,
    cgroup: File,
}

impl Spoiler {
    pub fn attach(cgroup: &Path) -> Spoiler {
        // struct bpf_insn: opcode, registers (source, destination), offset, immediate.
        let insn = |opcode: u8, registers: u8, offset: u8, immediate: u32| {
            let [a, b, c, d] = immediate.to_ne_bytes();
            u64::from_ne_bytes([opcode, registers, offset, 0, a, b, c, d])
        };
        let instructions = [
            // r6 = ctx; bpf_sock_ops_cb_flags_set(ctx, 0)
            insn(0xbf, 0x16, 0, 0),
            insn(0xb7, 0x02, 0, 0),
            insn(0x85, 0x00, 0, 59),
            // ctx->reply = 7
            insn(0xb7, 0x01, 0, 7),
            insn(0x63, 0x16, 4, 0),
            // return 1
            insn(0xb7, 0x00, 0, 1),
            insn(0x95, 0x00, 0, 0),
        ];
        let license = c"GPL";
        let n_instructions = instructions.len() as u64;
        let mut attributes = [0u64; 16];
        attributes[0] = n_instructions << 32 | u64::from(PROG_TYPE_SOCK_OPS);
        attributes[1] = instructions.as_ptr() as u64;
        attributes[2] = license.as_ptr() as u64;
        let fd = bpf(PROG_LOAD, &attributes);
        // SAFETY: the kernel has just made it for this process.
        let program = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
        let this = Spoiler { program, cgroup: File::open(cgroup).unwrap() };
        bpf(PROG_ATTACH, &this.attachment());
        this
    }

    fn attachment(&self) -> [u64; 16] {
        let word = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
        let fds = [&self.cgroup.as_raw_fd(), &self.program.as_raw_fd()].map(|fd| *fd as u32);
        let mut attributes = [0; 16];
        attributes[0] = word(fds[0], fds[1]);
        attributes[1] = word(ATTACH_TYPE_SOCK_OPS, ALLOW_MULTI);
        attributes
    }
}

impl Drop for Spoiler {
    fn drop(&mut self) {
        let mut attributes = self.attachment();
        attributes[1] = ATTACH_TYPE_SOCK_OPS.into();
        bpf(PROG_DETACH, &attributes);
    }
}

fn bpf(command: libc::c_int, attributes: &[u64; 16]) -> libc::c_long {
    let size = size_of_val(attributes);
    // SAFETY: the attributes are as long as is named, and what they point to lives until the call ends.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), size) };
    assert!(result >= 0, "bpf {command}: {}", std::io::Error::last_os_error());
    result
}
