//! The packets of the benchmark of edges: one program sends them, by BPF_PROG_RUN with live frames, one counts
//! and drops them where they arrive. The daemon doesn't know them.
#![no_std]
#![no_main]

use aya_ebpf::bindings::xdp_action::{XDP_ABORTED, XDP_DROP, XDP_PASS};
use aya_ebpf::btf_maps::{Array, PerCpuArray};
use aya_ebpf::helpers::generated::{bpf_ktime_get_ns, bpf_redirect};
use aya_ebpf::macros::{btf_map, xdp};
use aya_ebpf::programs::XdpContext;
use lb_common::folded;

/// The length of each packet, in octets; Ethernet's checksum not included.
const LEN: usize = 64;
/// Where the headers begin.
const IP: usize = 14;
const TRANSPORT: usize = IP + 20;
/// Where a datagram has its number: the last eight octets.
const NUMBER: usize = LEN - 8;
/// The streams that are told apart where they arrive.
const N_STREAMS: u32 = 2;
const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;

/// What is sent; words of the packet's are as in memory.
#[repr(C, align(8))]
struct Plan {
    /// The packet with a source address, a source port, a number and checksums of 0.
    frame: [u8; LEN],
    /// The checksum of the IP header without source address: the sum of words, not yet complemented.
    ip_sum: u32,
    /// That of the transport's, pseudo-header included.
    transport_sum: u32,
    /// The first source address, in host byte order; flows take turns through these.
    first_address: u32,
    n_addresses: u32,
    /// The first source port; with the next address the next port is used.
    first_port: u32,
    n_ports: u32,
    /// The interface, by whose cable it leaves.
    interface: u32,
    /// The time between two packets in ns; 0 for none.
    interval_ns: u32,
    /// The number of the next packet; the first octet is the stream's.
    next: u64,
    /// When the first packet was due, by the kernel's monotonic clock; later by what it was held up since. 0 before.
    start_ns: u64,
}

/// How late a packet may be sent; those after it are late by as much, so that no burst follows.
const MAX_LATE_NS: u64 = 200_000;

/// Element 0 is the plan: of one sender, so of one processor.
#[btf_map]
static PLAN: Array<Plan, 1> = Array::new();
/// The packets that arrived: the datagrams of each stream, and last the TCP segments.
#[btf_map]
static ARRIVED: PerCpuArray<u64, { N_STREAMS as usize + 1 }> = PerCpuArray::new();

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // Never reached: nothing here panics, and the verifier rejects a program that could loop.
    loop {}
}

/// Writes the next packet over the whole frame, whose pages come back as the last receiver left them, and sends
/// it; none before it is due.
#[xdp]
pub fn traffic_send(ctx: XdpContext) -> u32 {
    let Some(plan) = PLAN.get_ptr_mut(0) else { return XDP_ABORTED };
    if ctx.data() + LEN > ctx.data_end() {
        return XDP_ABORTED;
    }
    let frame = ctx.data() as *mut u8;
    // SAFETY: an array's element stays, and one sender alone uses it at a time; the frame has LEN octets, by the
    // comparison.
    unsafe {
        let number = (*plan).next;
        if (*plan).interval_ns != 0 {
            let now_ns = bpf_ktime_get_ns();
            let due_ns = (*plan).start_ns + (number << 8 >> 8) * u64::from((*plan).interval_ns);
            if now_ns < due_ns {
                return XDP_DROP;
            }
            if now_ns - due_ns > MAX_LATE_NS {
                (*plan).start_ns += now_ns - due_ns;
            }
        }
        (*plan).next = number + 1;
        let nth = number as u32;
        let (n_addresses, n_ports) = ((*plan).n_addresses, (*plan).n_ports);
        if n_addresses == 0 || n_ports == 0 {
            return XDP_ABORTED;
        }
        let address = (*plan).first_address + nth % n_addresses;
        let port = ((*plan).first_port + nth / n_addresses % n_ports) as u16;
        let mut word = 0;
        while word < LEN / 8 {
            let from = (&raw const (*plan).frame).cast::<u64>().add(word);
            frame.cast::<u64>().add(word).write_unaligned(from.read());
            word += 1;
        }
        let addresses = (address >> 16) + (address & 0xffff);
        put(frame, IP + 12, (address >> 16) as u16);
        put(frame, IP + 14, address as u16);
        put(frame, TRANSPORT, port);
        put(frame, IP + 10, !folded(((*plan).ip_sum + addresses).into()));
        let sum = (*plan).transport_sum + addresses + u32::from(port);
        if (*plan).frame[IP + 9] == IPPROTO_UDP {
            frame.add(NUMBER).cast::<u64>().write_unaligned(number.to_be());
            let numbers = (number >> 48) as u32
                + (number >> 32 & 0xffff) as u32
                + (nth >> 16)
                + (nth & 0xffff);
            // 0 would mean that there is none.
            let checksum = match !folded((sum + numbers).into()) {
                0 => 0xffff,
                checksum => checksum,
            };
            put(frame, TRANSPORT + 6, checksum);
        } else {
            put(frame, TRANSPORT + 16, !folded(sum.into()));
        }
        bpf_redirect((*plan).interface, 0) as u32
    }
}

/// Writes a word in network byte order.
#[inline(always)]
unsafe fn put(frame: *mut u8, at: usize, word: u16) {
    // SAFETY: as the caller's.
    unsafe { frame.add(at).cast::<u16>().write_unaligned(word.to_be()) }
}

/// Counts and drops the packets of [`traffic_send`]; all others, such as neighbour discovery, pass. With `frags`,
/// veth takes it whatever the MTU.
#[xdp(frags)]
pub fn traffic_drop(ctx: XdpContext) -> u32 {
    if ctx.data() + LEN > ctx.data_end() {
        return XDP_PASS;
    }
    let frame = ctx.data() as *const u8;
    // SAFETY: the packet has that many octets, by the comparison.
    let (kind, protocol, stream) = unsafe {
        let kind = frame.add(12).cast::<u16>().read_unaligned();
        (kind, frame.add(IP + 9).read(), u32::from(frame.add(NUMBER).read()))
    };
    let arrived = match protocol {
        IPPROTO_UDP => stream % N_STREAMS,
        IPPROTO_TCP => N_STREAMS,
        _ => return XDP_PASS,
    };
    if kind != 0x0800u16.to_be() {
        return XDP_PASS;
    }
    if let Some(count) = ARRIVED.get_ptr_mut(arrived) {
        // SAFETY: the element of this processor, which no other program changes.
        unsafe { *count += 1 };
    }
    XDP_DROP
}
