//! From the SYN of a connection to its end: what is in flight, what failed, and what that shows of
//! the backend, which may eject it. No timer runs: silence is found by the connect hook when it chooses,
//! and here when a client gives up.
//!
//! The program runs for each TCP socket of the cgroup, several times for each connection, so its
//! first instructions return unless the operation is one of few. It never writes `reply`: the kernel
//! hands it the answer of other programs of the hierarchy, to operations that aren't ours.
//!
//! The kernel runs it with the socket locked, as it does the hooks that read and write the socket's
//! record or storage. Callbacks of state changes come for the sockets that ask for them alone, which the
//! program has a translated socket do when it sends its SYN (`tcp_connect`).

use aya_ebpf::bindings::{
    BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
    BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_SOCK_OPS_TCP_LISTEN_CB, BPF_TCP_CLOSE, BPF_TCP_ESTABLISHED,
    bpf_sock,
};
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::macros::sock_ops;
use aya_ebpf::programs::SockOpsContext;
use lb_common::{
    COUNTED_ESTABLISHED, COUNTED_PENDING, COUNTED_TRIAL, EjectionWord, NOT_COUNTED, RevNat, Sign,
    TraceKind, is_silent, peak_average_us,
};

use crate::maps::{self, BackendPtr, layout};
use crate::socket::{cookie, error, read, socket};
use crate::{clients, trace};

const PROCEED: u32 = 1;
const AF_INET6: u32 = 10;
/// What SOCK_DESTROY leaves a socket with (`tcp_abort`): that was no failure of the backend.
const ECONNABORTED: u32 = 103;
/// A RST that came to an established connection.
const ECONNRESET: u32 = 104;
/// A RST that answered the SYN.
const ECONNREFUSED: u32 = 111;

/// Attached to BPF_CGROUP_SOCK_OPS.
#[sock_ops]
pub fn nohop_sockops(ctx: SockOpsContext) -> u32 {
    match read!(ctx.op) {
        BPF_SOCK_OPS_STATE_CB => change_state(&ctx),
        BPF_SOCK_OPS_TCP_CONNECT_CB => begin(&ctx),
        BPF_SOCK_OPS_TCP_LISTEN_CB => clients::listen(&ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => clients::accept(&ctx),
        _ => {}
    }
    PROCEED
}

/// A socket is about to send its SYN. A connection that got no further, for lack of a route or of a
/// port, was never in flight.
#[inline(always)]
fn begin(ctx: &SockOpsContext) {
    let socket = socket(ctx);
    // The connect hook gives each socket that connects a VIP a cookie.
    let cookie = cookie(ctx, socket);
    if cookie == 0 {
        return;
    }
    let Some(Kept { revnat: kept, .. }) = find(socket, cookie) else { return };
    if !is_sent_to(ctx, kept) {
        return;
    }
    // Another program of the hierarchy may have asked for callbacks as well. A record is released by
    // them also where it isn't counted.
    let flags = read!(ctx.bpf_sock_ops_cb_flags) | BPF_SOCK_OPS_STATE_CB_FLAG;
    if ctx.set_cb_flags(flags.cast_signed()).is_err() || kept.layout != layout() {
        return;
    }
    let Some(backend) = maps::backend(kept.backend_idx, kept.generation) else { return };
    kept.naming = if begins_trial(backend) { COUNTED_TRIAL } else { COUNTED_PENDING };
    // A time that is left of earlier connections, after two ends at once, is none.
    if backend.pending() <= 0 || backend.unanswered_since_us() == 0 {
        backend.set_unanswered_since_us(now_us());
    }
    backend.add_in_flight(1);
    backend.add_pending(1);
}

/// Whether a SYN to a backend is that of its trial, which the connect hook has claimed.
#[inline(always)]
fn begins_trial(backend: BackendPtr) -> bool {
    let ejection = backend.ejection();
    if !ejection.is_claimed() {
        return false;
    }
    let Some(limits) = maps::limits() else { return false };
    let now_ns = now_ns();
    backend.set_ejection(EjectionWord::of(ejection.at(now_ns).begin_trial(now_ns, &limits)));
    true
}

/// A socket is about to be in another state: `args` has the former one and the next.
#[inline(always)]
fn change_state(ctx: &SockOpsContext) {
    let next = read!(ctx.__bindgen_anon_1.args[1]);
    if next != BPF_TCP_ESTABLISHED && next != BPF_TCP_CLOSE {
        return;
    }
    let socket = socket(ctx);
    // One that was connected by an earlier version has storage, and may have no cookie.
    let Some(Kept { revnat, record }) = find(socket, cookie(ctx, socket)) else { return };
    // A copy: the verifier would follow all below once for a record and once for storage.
    // SAFETY: the reference is valid.
    let kept = unsafe { &(&raw const *revnat).read_volatile() };
    let counted = kept.naming;
    // Also of one that was connected by a program of another layout, whose counts are elsewhere.
    let is_followed = counted != NOT_COUNTED && kept.layout == layout();
    if is_followed {
        let is_established = next == BPF_TCP_ESTABLISHED;
        revnat.naming = if is_established { COUNTED_ESTABLISHED } else { NOT_COUNTED };
    }
    if next == BPF_TCP_CLOSE && record != 0 {
        maps::release(record);
    }
    if !is_followed {
        return;
    }
    let is_pending = counted != COUNTED_ESTABLISHED;
    if is_pending {
        trace::report(ctx, || outcome(ctx, socket, next));
        let n_retransmits = read!(ctx.total_retrans);
        if n_retransmits != 0 {
            maps::count_syn_retransmits(kept, n_retransmits);
        }
    }
    let backend = maps::backend(kept.backend_idx, kept.generation);
    if next == BPF_TCP_ESTABLISHED {
        if let Some(backend) = backend {
            established(ctx, kept, backend);
        }
        return;
    }
    let mut sign = if is_pending {
        let sign = why_it_failed(ctx, socket);
        if sign.is_some() {
            // Also of a backend that has left: the connect() was the service's.
            maps::count_service_failure(kept);
        }
        sign
    } else {
        how_it_ended(ctx, socket)
    };
    let Some(backend) = backend else { return };
    backend.add_in_flight(-1);
    if is_pending {
        if sign.is_some() {
            maps::count_backend_failure(kept.backend_idx);
        } else {
            sign = given_up(backend, counted == COUNTED_TRIAL);
        }
        backend.add_pending(-1);
        if sign == Some(Sign::Refused) {
            answered(backend);
        }
    } else {
        let srtt_us = read!(ctx.srtt_us) >> 3;
        if srtt_us != 0 {
            backend.set_srtt_us(peak_average_us(backend.srtt_us(), srtt_us));
        }
    }
    if let Some(sign) = sign {
        apply(sign, kept, backend);
    }
}

/// The outcome of a connection that was being established, for the trace.
#[inline(always)]
fn outcome(ctx: &SockOpsContext, socket: *mut bpf_sock, next: u32) -> trace::Outcome {
    if next == BPF_TCP_ESTABLISHED {
        let is_first = read!(ctx.total_retrans) == 0;
        return (TraceKind::Established, if is_first { read!(ctx.srtt_us) >> 3 } else { 0 }, 0);
    }
    match why_it_failed(ctx, socket) {
        Some(_) => (TraceKind::Failed, 0, error(socket).unwrap_or(0)),
        None => (TraceKind::Aborted, 0, 0),
    }
}

#[inline(always)]
fn established(ctx: &SockOpsContext, kept: &RevNat, backend: BackendPtr) {
    backend.add_pending(-1);
    answered(backend);
    // The first sample of the round-trip time is that of the SYN (`tcp_ack` comes first in
    // `tcp_rcv_synsent_state_process`); one that was sent again has none.
    let srtt_us = read!(ctx.srtt_us) >> 3;
    if read!(ctx.total_retrans) == 0 && srtt_us != 0 {
        backend.set_connect_us(peak_average_us(backend.connect_us(), srtt_us));
    }
    apply(Sign::Answered, kept, backend);
}

/// The backend's host answered a SYN. The wait for an answer begins with the next SYN of a new
/// connection: those that are pending may send theirs again a minute later, after a long silence.
#[inline(always)]
fn answered(backend: BackendPtr) {
    backend.set_unanswered_since_us(0);
}

/// Applies a sign to a backend's ejection.
#[inline(always)]
fn apply(sign: Sign, kept: &RevNat, backend: BackendPtr) {
    let before = backend.ejection();
    if !before.is_changed_by(sign) {
        return;
    }
    let Some(limits) = maps::limits() else { return };
    let (after, event) = before.after(sign, now_ns(), &limits);
    backend.set_ejection(after);
    if let Some(kind) = event {
        maps::emit_ejection(kind, kept);
    }
}

/// What a connection shows whose client gave up while it was being established: silence, by the rule by
/// which the connect hook finds it, as no later connect may come; else nothing, so a trial decides nothing.
#[inline(always)]
fn given_up(backend: BackendPtr, is_trial: bool) -> Option<Sign> {
    let (pending, since_us) = (backend.pending(), backend.unanswered_since_us());
    if since_us != 0 {
        let (connect_us, limits) = (backend.connect_us(), maps::limits()?);
        if is_silent(pending, since_us, connect_us, now_us(), &limits) {
            return Some(Sign::Silence);
        }
    }
    is_trial.then_some(Sign::TrialAborted)
}

/// Why a connection never was established, where it ended by an error: refused, timed out,
/// unreachable. `tcp_reset`, `tcp_write_err` and `tcp_v4_err` set it before the state. One that the
/// client gave up has none: `tcp_disconnect` sets it after the state.
#[inline(always)]
fn why_it_failed(ctx: &SockOpsContext, socket: *mut bpf_sock) -> Option<Sign> {
    // Read at once: the compiler joins reads of branches, and the verifier forbids what it makes of them
    // ("dereference of modified ctx ptr").
    let (segs_in, packets_out) = (read!(ctx.segs_in), read!(ctx.packets_out));
    let total_retrans = read!(ctx.total_retrans);
    let Some(error) = error(socket) else {
        // A RST and a time-out purge the SYN before the state changes (`tcp_write_queue_purge` in
        // `tcp_reset` and `tcp_write_err`); a client that gives up doesn't, nor does an ICMP error before
        // 6.11. A segment that came in may be of an earlier connection, such as one in TIME_WAIT, which
        // has the SYN sent again after 8 ms (`tcp_rcv_synsent_state_process`).
        return match (packets_out, segs_in, total_retrans) {
            (0, 1.., 0) => Some(Sign::Refused),
            (0, ..) => Some(Sign::Failed),
            _ => None,
        };
    };
    match error {
        0 | ECONNABORTED => None,
        // By a segment, not by an ICMP error, which may be of this client's own firewall.
        ECONNREFUSED if segs_in != 0 => Some(Sign::Refused),
        _ => Some(Sign::Failed),
    }
}

/// How an established connection ended: reset by the backend, in order, or by neither.
#[inline(always)]
fn how_it_ended(ctx: &SockOpsContext, socket: *mut bpf_sock) -> Option<Sign> {
    let error = error(socket).unwrap_or(0);
    // One that went from here to its end was reset, by either side, or timed out.
    if read!(ctx.__bindgen_anon_1.args[0]) == BPF_TCP_ESTABLISHED {
        return (error == ECONNRESET).then_some(Sign::Reset);
    }
    (error == 0).then_some(Sign::Closed)
}

/// CLOCK_MONOTONIC.
#[inline(always)]
fn now_ns() -> u64 {
    // SAFETY: the helper takes nothing.
    unsafe { bpf_ktime_get_ns() }
}

/// The low 32 bits of CLOCK_MONOTONIC in microseconds; 1 for 0, which is no time.
#[inline(always)]
fn now_us() -> u32 {
    let now_us = (now_ns() / 1_000) as u32;
    if now_us == 0 { 1 } else { now_us }
}

/// What a socket connected by a VIP, as it is kept.
struct Kept {
    revnat: &'static mut RevNat,
    /// The cookie by which its record is found; 0 where storage has it.
    record: u64,
}

/// What a socket connected by a VIP, and where it is kept.
#[inline(always)]
fn find(socket: *mut bpf_sock, cookie: u64) -> Option<Kept> {
    if socket.is_null() {
        return None;
    }
    // SAFETY: a non-null pointer is to this socket's own record or storage, which only programs of
    // this socket write, and they run with it locked.
    unsafe {
        match maps::recorded(cookie).as_mut() {
            Some(revnat) => Some(Kept { revnat, record: cookie }),
            None => maps::stored(socket).as_mut().map(|revnat| Kept { revnat, record: 0 }),
        }
    }
}

/// Whether a socket is being connected to what is kept of it. Where hooks were detached in between
/// it may be something else.
#[inline(always)]
fn is_sent_to(ctx: &SockOpsContext, kept: &RevNat) -> bool {
    // A field of 32 bits with the 16-bit port in its upper half in memory, in network order.
    let [_, _, high, low] = read!(ctx.remote_port).to_ne_bytes();
    if kept.backend_port == 0 || kept.backend_port != u16::from_be_bytes([high, low]) {
        return false;
    }
    if read!(ctx.family) != AF_INET6 {
        return kept.backend.to_v4() == Some(read!(ctx.remote_ip4).to_ne_bytes());
    }
    let [first, second] = kept.backend.words();
    let word = |high: u32, low: u32| {
        let ([a, b, c, d], [e, f, g, h]) = (high.to_ne_bytes(), low.to_ne_bytes());
        u64::from_ne_bytes([a, b, c, d, e, f, g, h])
    };
    word(read!(ctx.remote_ip6[0]), read!(ctx.remote_ip6[1])) == first
        && word(read!(ctx.remote_ip6[2]), read!(ctx.remote_ip6[3])) == second
}
