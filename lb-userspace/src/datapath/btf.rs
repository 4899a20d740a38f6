//! The offsets of the fields that the programs read, from the running kernel's type information (BTF).
//!
//! The format is Documentation/bpf/btf.rst of the kernel: a header, then types, each a fixed part
//! and what its kind adds, then strings.

use std::io;

/// Where the running kernel keeps it.
const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

const KIND_INT: u32 = 1;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_DECL_TAG: u32 = 17;
const KIND_ENUM64: u32 = 19;

/// A bit within a structure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bit {
    /// The offset of its byte.
    pub offset: u32,
    /// The bit within that byte; 0 for none.
    pub mask: u32,
}

/// Offsets in the kernel's sockets; `None` for a field that this kernel lacks.
#[derive(Clone, Copy, Debug, Default)]
pub struct SocketBits {
    /// Of any socket: that the kernel itself made it.
    pub kernel: Option<Bit>,
    /// Of a TCP socket: that it is a part of an MPTCP one.
    pub subflow: Option<Bit>,
    /// Of an IPv6 socket: that it is closed to IPv4 (IPV6_V6ONLY).
    pub ipv6_only: Option<Bit>,
    /// Of any socket: its pending error, of which the mask means nothing.
    pub error: Option<Bit>,
    /// Of any socket: its cookie, of which the mask means nothing.
    pub cookie: Option<Bit>,
    /// Of any socket: the pointer to its storage, of which the mask means nothing.
    pub storage: Option<Bit>,
    /// Whether a program gets from such a part to the MPTCP socket (`bpf_skc_to_mptcp_sock`, 5.19).
    pub has_mptcp: bool,
}

/// Reads the offsets of the running kernel.
///
/// # Errors
/// When the kernel has no BTF, or it can't be read.
pub fn socket_bits() -> io::Result<SocketBits> {
    let btf = std::fs::read(VMLINUX)?;
    let kernel = bit(&btf, "sock", "sk_kern_sock");
    let subflow = bit(&btf, "tcp_sock", "is_mptcp");
    let ipv6_only = bit(&btf, "sock_common", "skc_ipv6only");
    let error = bit(&btf, "sock", "sk_err");
    let cookie = bit(&btf, "sock_common", "skc_cookie");
    let storage = bit(&btf, "sock", "sk_bpf_storage");
    // An enumerator of enum bpf_func_id. Without MPTCP there is no type for what the helper returns.
    let has_mptcp = subflow.is_some() && has_string(&btf, "BPF_FUNC_skc_to_mptcp_sock");
    Ok(SocketBits { kernel, subflow, ipv6_only, error, cookie, storage, has_mptcp })
}

/// Whether something has this name.
fn has_string(btf: &[u8], name: &str) -> bool {
    let Some(strings) = part(btf, 16, 20) else { return false };
    strings.split(|&byte| byte == 0).any(|string| string == name.as_bytes())
}

/// A section, by where the header has its offset and its length.
fn part(btf: &[u8], offset: usize, len: usize) -> Option<&[u8]> {
    let start = (word(btf, 4)? as usize).checked_add(word(btf, offset)? as usize)?;
    btf.get(start..start.checked_add(word(btf, len)? as usize)?)
}

/// The first bit of a member of a structure.
fn bit(btf: &[u8], structure: &str, member: &str) -> Option<Bit> {
    let (types, strings) = (part(btf, 8, 12)?, part(btf, 16, 20)?);
    let is_named = |offset: u32, name: &str| {
        let rest = strings.get(offset as usize..).unwrap_or_default();
        rest.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
    };
    let mut at = 0;
    while at < types.len() {
        let (name, info) = (word(types, at)?, word(types, at + 4)?);
        let (kind, n_members, has_bitfields) = (info >> 24 & 0x1f, info & 0xffff, info >> 31 == 1);
        let n_members = n_members as usize;
        at += 12;
        if kind == KIND_STRUCT && is_named(name, structure) {
            for member_at in (at..at + n_members * 12).step_by(12) {
                if is_named(word(types, member_at)?, member) {
                    let offset = word(types, member_at + 8)?;
                    let bits = if has_bitfields { offset & 0x00ff_ffff } else { offset };
                    // A big-endian machine counts from the other end of the byte.
                    let is_big = has_bitfields && cfg!(target_endian = "big");
                    let mask = if is_big { 0x80 >> (bits % 8) } else { 1 << (bits % 8) };
                    return Some(Bit { offset: bits / 8, mask });
                }
            }
        }
        at += match kind {
            KIND_INT | KIND_VAR | KIND_DECL_TAG => 4,
            KIND_ARRAY => 12,
            KIND_STRUCT | KIND_UNION | KIND_DATASEC | KIND_ENUM64 => n_members * 12,
            KIND_ENUM | KIND_FUNC_PROTO => n_members * 8,
            _ => 0,
        };
    }
    None
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bit_is_found_behind_other_types() {
        let strings = b"\0int\0sock\0sk_a\0sk_kern_sock\0";
        let types: [u32; 16] = [
            [1, KIND_INT << 24, 4].as_slice(),
            &[32],
            &[5, 1 << 31 | KIND_STRUCT << 24 | 3, 64],
            &[10, 1, 0],
            &[10, 1, 32],
            &[15, 1, 1 << 24 | 77],
        ]
        .concat()
        .try_into()
        .unwrap();
        let (n_types, n_strings) = (64u32, strings.len() as u32);
        let header = [0x0001_eb9f, 24, 0, n_types, n_types, n_strings];
        let mut btf: Vec<u8> =
            header.iter().chain(&types).flat_map(|word| word.to_ne_bytes()).collect();
        btf.extend(strings);
        assert_eq!(bit(&btf, "sock", "sk_kern_sock"), Some(Bit { offset: 9, mask: 1 << 5 }));
        assert_eq!(bit(&btf, "sock", "sk_kern"), None);
        assert!(has_string(&btf, "sk_a") && !has_string(&btf, "sk_") && !has_string(&btf, "a"));
        for length in 0..btf.len() {
            // Cut short, it is no BTF, and no reason to panic.
            let _ = bit(&btf[..length], "sock", "sk_kern_sock");
            let _ = has_string(&btf[..length], "sk_a");
        }
    }

    #[test]
    fn this_kernel_tells() {
        let Ok(SocketBits { kernel, subflow, ipv6_only, error, cookie, storage, .. }) =
            socket_bits()
        else {
            return;
        };
        assert!(error.is_some_and(|bit| bit.offset > 0 && bit.offset.is_multiple_of(4)));
        for word in [cookie, storage] {
            assert!(word.is_some_and(|bit| bit.offset > 0 && bit.offset.is_multiple_of(8)));
        }
        assert!(ipv6_only.is_some_and(|bit| bit.offset > 0 && bit.mask.count_ones() == 1));
        assert!(kernel.is_some_and(|bit| bit.offset > 0 && bit.mask.count_ones() == 1));
        // A bool, which is a whole byte. Without CONFIG_MPTCP there is none.
        assert!(subflow.is_none_or(|bit| bit.offset > 0 && bit.mask == 1));
    }
}
