//! The records of TCP connections, which are found by the socket's cookie.
//!
//! A record is an element of an array, which two sockets may share. It belongs to the socket whose
//! cookie it has. This hook takes it for a socket, and the unit `outcomes` releases it when the
//! connection ends, both with the socket locked. A record of another socket isn't touched: the socket
//! uses storage instead. So does each of two sockets whose programs are at one record at the same time:
//! 5.10 has no atomic operation that returns what was there (they came with 5.12), but an addition by
//! one and a load show each of them whether it is alone.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::btf_maps::Array;
use aya_ebpf::helpers::bpf_get_socket_cookie;
use aya_ebpf::macros::btf_map;
use aya_ebpf::programs::SockAddrContext;
use core::intrinsics::{AtomicOrdering, atomic_xadd};
use lb_common::{ConnRecord, N_CONNS, RevNat};

use crate::{config, context, maps};

/// Among the sockets' storages, which outlive layouts.
#[btf_map]
static CONNS: Array<ConnRecord, { N_CONNS as usize }, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Keeps what a TCP socket connected as its record. Returns false where it has none: then the
/// caller stores it in socket storage.
#[inline(always)]
pub fn store(ctx: &SockAddrContext, entry: &RevNat, may_record: bool) -> bool {
    // Each socket that connects a VIP has a cookie from here on, also one that gets storage: the unit
    // `outcomes` looks at those alone.
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    if !may_record || !maps::keeps_records() {
        if let Some(record) = find_by(cookie) {
            record.write(cookie, None);
        }
        return false;
    }
    record(cookie).is_some_and(|record| record.write(cookie, Some(entry)))
}

/// Loads from the record that [`store`] will write. That was used 65,536 cookies ago, so it is in no cache,
/// and the load takes about as long as the choice, during which it needn't be waited for.
#[inline(always)]
pub fn touch(ctx: &SockAddrContext) {
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    if let Some(record) = record(cookie) {
        record.cookie();
    }
}

/// Whether a TCP socket certainly remembers nothing: it has no cookie, so no record, and no storage of
/// any program. Most have neither, which two loads show.
#[inline(always)]
pub fn has_nothing(ctx: &SockAddrContext) -> bool {
    let (cookie_offset, storage_offset) = (config::cookie_offset(), config::storage_offset());
    if cookie_offset == 0 || storage_offset == 0 {
        return false;
    }
    let socket = context::tcp_socket(ctx);
    if socket.is_null() {
        return false;
    }
    // SAFETY: the offsets are those of aligned words in the structure, as the kernel's own type
    // information says. The second is a pointer, which is only compared.
    unsafe {
        socket.add(cookie_offset as usize).cast::<u64>().read_volatile() == 0
            && socket.add(storage_offset as usize).cast::<u64>().read_volatile() == 0
    }
}

/// Releases the record of a TCP socket, if it has one.
#[inline(always)]
pub fn clear(ctx: &SockAddrContext) {
    let cookie = cookie(ctx);
    if let Some(record) = find_by(cookie) {
        record.write(cookie, None);
    }
}

/// What the record of a TCP socket has, if it has one.
#[inline(always)]
pub fn find(ctx: &SockAddrContext) -> Option<&'static RevNat> {
    let RecordPtr(record) = find_by(cookie(ctx))?;
    // SAFETY: an array's element stays, and while it is this socket's it is written with the socket
    // locked only.
    Some(unsafe { &(*record).revnat })
}

#[inline(always)]
fn find_by(cookie: u64) -> Option<RecordPtr> {
    if cookie == 0 {
        return None;
    }
    record(cookie).filter(|record| record.cookie() == cookie)
}

#[inline(always)]
fn record(cookie: u64) -> Option<RecordPtr> {
    CONNS.get_ptr_mut(ConnRecord::index(cookie)).map(RecordPtr)
}

/// A socket's cookie; 0 where it has none yet, so no record either. Most sockets have none, and the
/// helper would give them one.
#[inline(always)]
fn cookie(ctx: &SockAddrContext) -> u64 {
    let offset = config::cookie_offset();
    if offset == 0 {
        // SAFETY: the context is valid.
        return unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    }
    let socket = context::tcp_socket(ctx);
    if socket.is_null() {
        return 0;
    }
    // SAFETY: the offset is that of an aligned word in the structure, as the kernel's own type
    // information says.
    unsafe { socket.add(offset as usize).cast::<u64>().read_volatile() }
}

#[derive(Clone, Copy)]
struct RecordPtr(*mut ConnRecord);

macro_rules! word {
    // SAFETY: an array's element stays, and this is an aligned word of it; volatile, because other
    // programs and the daemon read and write it.
    ($record:ident . $($word:ident).+) => {
        unsafe { (&raw const (*$record.0).$($word).+).read_volatile() }
    };
    // SAFETY: as above; only the program that is alone at the record writes it.
    ($record:ident . $($word:ident).+ = $value:expr) => {{
        let value = $value;
        unsafe { (&raw mut (*$record.0).$($word).+).write_volatile(value) }
    }};
}

impl RecordPtr {
    #[inline(always)]
    fn cookie(self) -> u64 {
        word!(self.cookie)
    }

    /// Whether a socket may have it: it is free, already this socket's, or that of a socket that is gone.
    #[inline(always)]
    fn is_free_for(self, cookie: u64) -> bool {
        let owner = self.cookie();
        owner == 0 || owner == cookie || word!(self.claim.writes) == word!(self.claim.abandoned)
    }

    /// Takes it for a socket with what that connected, or releases it without. Returns whether it could.
    #[inline(always)]
    fn write(self, cookie: u64, entry: Option<&RevNat>) -> bool {
        if !self.is_free_for(cookie) {
            return false;
        }
        self.add_claim(1);
        let is_alone = word!(self.claim.claims) == 1 && self.is_free_for(cookie);
        if is_alone {
            // A reader outside the kernel ignores what is half-written.
            word!(self.cookie = 0);
            if let Some(entry) = entry {
                let writes = word!(self.claim.writes);
                word!(self.claim.abandoned = writes);
                word!(self.claim.writes = writes.wrapping_add(1));
                self.copy(entry);
                word!(self.cookie = cookie);
            }
        }
        self.add_claim(u32::MAX);
        is_alone
    }

    /// Copies what it has from the stack, by word: as a whole, it would be copied there once more, where
    /// room is short.
    #[inline(always)]
    fn copy(self, entry: &RevNat) {
        // SAFETY: as above; both are six aligned words.
        unsafe {
            let from = (&raw const *entry).cast::<u64>();
            let to = (&raw mut (*self.0).revnat).cast::<u64>();
            let mut nth = 0;
            while nth < size_of::<RevNat>() / size_of::<u64>() {
                to.add(nth).write_volatile(from.add(nth).read());
                nth += 1;
            }
        }
    }

    #[inline(always)]
    fn add_claim(self, n: u32) {
        // SAFETY: an array's element stays; this word of it is written by atomic addition only. The
        // result is unused, which makes this XADD.
        unsafe {
            let claims = &raw mut (*self.0).claim.claims;
            atomic_xadd::<u32, u32, { AtomicOrdering::Relaxed }>(claims, n);
        }
    }
}
