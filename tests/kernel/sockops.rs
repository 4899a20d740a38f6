//! Sockops programs of others in the hierarchy.

use std::fs::File;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::path::Path;

const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const PROG_DETACH: libc::c_int = 9;
const PROG_TYPE_SOCK_OPS: u32 = 13;
const ATTACH_TYPE_SOCK_OPS: u32 = 3;
const ALLOW_MULTI: u32 = 2;

/// A program that is attached to a cgroup until it is dropped, after those that are attached to it already.
pub struct Sockops {
    program: OwnedFd,
    cgroup: File,
}

/// struct bpf_insn: opcode, registers (source, destination), offset, immediate.
fn insn(opcode: u8, registers: u8, offset: i16, immediate: i32) -> u64 {
    let ([low, high], [a, b, c, d]) = (offset.to_ne_bytes(), immediate.to_ne_bytes());
    u64::from_ne_bytes([opcode, registers, low, high, a, b, c, d])
}

impl Sockops {
    /// Takes away the callbacks that each socket asked for, and answers each operation with 7.
    pub fn spoiling(cgroup: &Path) -> Sockops {
        Sockops::attach(
            cgroup,
            &[
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
            ],
        )
    }

    /// Has each connection send an edge's option, with the address 9.9.9.9:2313.
    pub fn forging(cgroup: &Path) -> Sockops {
        let option = i32::from_ne_bytes([254, 10, b'n', b'h']);
        Sockops::attach(
            cgroup,
            &[
                // r6 = ctx; by ctx->op: TCP_CONNECT_CB, HDR_OPT_LEN_CB, WRITE_HDR_OPT_CB, else return 1
                insn(0xbf, 0x16, 0, 0),
                insn(0x61, 0x62, 0, 0),
                insn(0x15, 0x02, 4, 3),
                insn(0x15, 0x02, 7, 14),
                insn(0x15, 0x02, 11, 15),
                insn(0xb7, 0x00, 0, 1),
                insn(0x95, 0x00, 0, 0),
                // bpf_sock_ops_cb_flags_set(ctx, BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG)
                insn(0xbf, 0x61, 0, 0),
                insn(0xb7, 0x02, 0, 64),
                insn(0x85, 0x00, 0, 59),
                insn(0x05, 0x00, -6, 0),
                // bpf_reserve_hdr_opt(ctx, 12, 0)
                insn(0xbf, 0x61, 0, 0),
                insn(0xb7, 0x02, 0, 12),
                insn(0xb7, 0x03, 0, 0),
                insn(0x85, 0x00, 0, 144),
                insn(0x05, 0x00, -11, 0),
                // bpf_store_hdr_opt(ctx, option, 10, 0)
                insn(0x62, 0x0a, -12, option),
                insn(0x62, 0x0a, -8, 0x0909_0909),
                insn(0x62, 0x0a, -4, 0x0909_0909),
                insn(0xbf, 0x61, 0, 0),
                insn(0xbf, 0xa2, 0, 0),
                insn(0x07, 0x02, 0, -12),
                insn(0xb7, 0x03, 0, 10),
                insn(0xb7, 0x04, 0, 0),
                insn(0x85, 0x00, 0, 143),
                insn(0x05, 0x00, -21, 0),
            ],
        )
    }

    fn attach(cgroup: &Path, instructions: &[u64]) -> Sockops {
        let license = c"GPL";
        let n_instructions = instructions.len() as u64;
        let mut attributes = [0u64; 16];
        attributes[0] = n_instructions << 32 | u64::from(PROG_TYPE_SOCK_OPS);
        attributes[1] = instructions.as_ptr() as u64;
        attributes[2] = license.as_ptr() as u64;
        let fd = bpf(PROG_LOAD, &attributes);
        // SAFETY: the kernel has just made it for this process.
        let program = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
        let this = Sockops { program, cgroup: File::open(cgroup).unwrap() };
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

impl Drop for Sockops {
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
