//! The socket that the program runs for, as the context and the kernel's structures show it.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_sock;
use aya_ebpf::helpers::bpf_get_socket_cookie;
use aya_ebpf::helpers::generated::bpf_skc_to_tcp_sock;
use aya_ebpf::programs::SockOpsContext;

/// Where in the kernel's `struct sock` the word `sk_err` is; 0 where it isn't known.
#[unsafe(no_mangle)]
static SOCKET_ERROR_OFFSET: u32 = 0;
/// Where in the kernel's `struct sock` the word `skc_cookie` is; 0 where it isn't known.
#[unsafe(no_mangle)]
static COOKIE_OFFSET: u32 = 0;

macro_rules! read {
    // SAFETY: the kernel hands every program a valid context, and this is a field of it.
    ($ctx:ident . $($field:tt)+) => {
        unsafe { (&raw const (*$ctx.ops).$($field)+).read_volatile() }
    };
}
pub(crate) use read;

macro_rules! setting {
    // SAFETY: a static is valid and aligned; volatile, because its value comes after compilation.
    ($name:ident) => {
        unsafe { core::ptr::read_volatile(&raw const $name) }
    };
}

/// The context's socket; null where there is none.
#[inline(always)]
pub fn socket(ctx: &SockOpsContext) -> *mut bpf_sock {
    read!(ctx.__bindgen_anon_2.sk)
}

/// A socket's `sk_err`; none where it can't be read.
#[inline(always)]
pub fn error(socket: *mut bpf_sock) -> Option<u32> {
    let offset = setting!(SOCKET_ERROR_OFFSET);
    if offset == 0 || socket.is_null() {
        return None;
    }
    // SAFETY: the helper takes the context's socket, and the verifier knows the structure that it
    // returns. The offset is that of a word in it, as the kernel's own type information says.
    unsafe {
        let socket = bpf_skc_to_tcp_sock(socket.cast()).cast::<u8>();
        (!socket.is_null()).then(|| socket.add(offset as usize).cast::<u32>().read_volatile())
    }
}

/// A socket's cookie; 0 where it has none yet. The helper would give it one.
#[inline(always)]
pub fn cookie(ctx: &SockOpsContext, socket: *mut bpf_sock) -> u64 {
    let offset = setting!(COOKIE_OFFSET);
    if offset == 0 {
        // SAFETY: the context is valid.
        return unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    }
    if socket.is_null() {
        return 0;
    }
    // SAFETY: as in `error`.
    unsafe {
        let socket = bpf_skc_to_tcp_sock(socket.cast()).cast::<u8>();
        if socket.is_null() { 0 } else { socket.add(offset as usize).cast::<u64>().read_volatile() }
    }
}
