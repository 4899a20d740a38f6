//! The fast path: the plain packets of flows that go on as they are. What is anything else is left to the
//! rest of the program at TC, untouched. It runs at XDP and at TC.

use core::ffi::c_void;

use lb_common::{
    FlowKey4, FlowKey6, FlowRef, IPPROTO_TCP, IPPROTO_UDP, N_ENDS4, N_ENDS6, PlainHeader, TCP_FIN,
    TCP_RST, TCP_SYN, addresses_difference, forwarded, may_be_partial, swapped, transport_checksum,
    words_difference,
};

use crate::cache::{self, CachePtr};
use crate::fib::{self, Fib, Question, Route};
use crate::headers::Headers;
use crate::hops::{self, NextHop};
use crate::maps;
use crate::record::RecordPtr;
use crate::settings::{self, Side};

const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
const ETHERNET: usize = 14;
const TCP: usize = 20;
const UDP: usize = 8;

/// A packet as a hook has it.
pub trait Frame: Copy {
    /// The program's context.
    fn context(self) -> *mut c_void;
    /// Where it begins, with its Ethernet header.
    fn data(self) -> usize;
    /// Where the part of it ends that can be read.
    fn data_end(self) -> usize;
    /// Its length, from the IP header on; any other number where that would be below 0.
    fn ip_len(self) -> u32;
    /// The interface that it came by.
    fn ifindex(self) -> u32;
    /// Whether it was sent to this interface's hardware address.
    fn is_to_host(self, ethernet: Headers) -> bool;
    /// Whether it may leave by an interface from here.
    fn may_leave_by(self, egress: u32) -> bool;
    /// Takes note of by how much the sum of the packet differs, from its IP header on: IPv4's stays the same, as
    /// its checksum makes up for all else of it.
    fn set_difference(self, difference: u64);
}

/// Where parts of a plain packet lie, by its address family.
trait Family<const N: usize> {
    const IS_IPV6: bool;
    const IP_LEN: usize;
    fn side(ends: &[u32; N]) -> Side;
    fn ends(ip: Headers) -> [u32; N];
    fn set_ends(ip: Headers, ends: [u32; N]);
    /// The flow with these ends.
    fn find(ends: &[u32; N], protocol: u8) -> Option<FlowRef>;
    /// Both ends of the client's side of a flow, or of the backend's, as packets from there have them.
    fn ends_of(record: RecordPtr, idx: u32, is_back: bool) -> Option<[u32; N]>;
    /// Those of packets the other way.
    fn reversed(ends: [u32; N]) -> [u32; N];
    fn addresses(ends: &[u32; N]) -> [[u32; 4]; 2];
}

struct V4;
struct V6;

/// The ports of a side, as packets from there have them.
#[inline(always)]
fn ports_of(record: RecordPtr, is_back: bool) -> u32 {
    let (from, to) = if is_back {
        (record.backend_port(), record.source_port())
    } else {
        (record.client_port(), record.vip_port())
    };
    swapped(u32::from(from) | u32::from(to) << 16)
}

impl Family<N_ENDS4> for V4 {
    const IS_IPV6: bool = false;
    const IP_LEN: usize = 20;

    #[inline(always)]
    fn side(ends: &[u32; N_ENDS4]) -> Side {
        settings::side4(ends[1])
    }

    #[inline(always)]
    fn ends(ip: Headers) -> [u32; N_ENDS4] {
        ip.ends4()
    }

    #[inline(always)]
    fn set_ends(ip: Headers, ends: [u32; N_ENDS4]) {
        ip.set_ends4(ends);
    }

    #[inline(always)]
    fn find(&[source, destination, ports]: &[u32; N_ENDS4], protocol: u8) -> Option<FlowRef> {
        let key: [u32; 4] = [source, destination, swapped(ports), protocol.into()];
        let key: FlowKey4 = zerocopy::transmute!(key);
        maps::flow4(&key)
    }

    #[inline(always)]
    fn ends_of(record: RecordPtr, _idx: u32, is_back: bool) -> Option<[u32; N_ENDS4]> {
        let ports = ports_of(record, is_back);
        Some(if is_back {
            [record.backend(), record.source(), ports]
        } else {
            [record.client(), record.vip(), ports]
        })
    }

    #[inline(always)]
    fn reversed([source, destination, ports]: [u32; N_ENDS4]) -> [u32; N_ENDS4] {
        [destination, source, ports.rotate_left(16)]
    }

    #[inline(always)]
    fn addresses(ends: &[u32; N_ENDS4]) -> [[u32; 4]; 2] {
        [[0, 0, 0, ends[0]], [0, 0, 0, ends[1]]]
    }
}

impl Family<N_ENDS6> for V6 {
    const IS_IPV6: bool = true;
    const IP_LEN: usize = 40;

    #[inline(always)]
    fn side(ends: &[u32; N_ENDS6]) -> Side {
        let [.., a, b, c, d, _] = *ends;
        settings::side6(u64::from(a) | u64::from(b) << 32, u64::from(c) | u64::from(d) << 32)
    }

    #[inline(always)]
    fn ends(ip: Headers) -> [u32; N_ENDS6] {
        ip.ends6()
    }

    #[inline(always)]
    fn set_ends(ip: Headers, ends: [u32; N_ENDS6]) {
        ip.set_ends6(ends);
    }

    #[inline(always)]
    fn find(&[a, b, c, d, e, f, g, h, ports]: &[u32; N_ENDS6], protocol: u8) -> Option<FlowRef> {
        let key: [u32; 10] = [a, b, c, d, e, f, g, h, swapped(ports), protocol.into()];
        let key: FlowKey6 = zerocopy::transmute!(key);
        maps::flow6(&key)
    }

    #[inline(always)]
    fn ends_of(record: RecordPtr, idx: u32, is_back: bool) -> Option<[u32; N_ENDS6]> {
        let addresses = maps::addresses6(idx)?.cast::<[u32; 8]>();
        // SAFETY: an array's element stays; the backend's side lies behind the client's.
        let side = unsafe { addresses.add(is_back.into()).read_volatile() };
        let [a, b, c, d, e, f, g, h] = side;
        Some([a, b, c, d, e, f, g, h, ports_of(record, is_back)])
    }

    #[inline(always)]
    fn reversed([a, b, c, d, e, f, g, h, ports]: [u32; N_ENDS6]) -> [u32; N_ENDS6] {
        [e, f, g, h, a, b, c, d, ports.rotate_left(16)]
    }

    #[inline(always)]
    fn addresses(&[a, b, c, d, e, f, g, h, _]: &[u32; N_ENDS6]) -> [[u32; 4]; 2] {
        [[a, b, c, d], [e, f, g, h]]
    }
}

/// Forwards a packet if it is a plain one of a flow that goes on as it is. Returns the interface by which it is
/// to leave; `None` where it is left as it was.
#[inline(always)]
pub fn forward(frame: impl Frame) -> Option<u32> {
    let (data, end) = (frame.data(), frame.data_end());
    if data + ETHERNET + V4::IP_LEN + UDP > end {
        return None;
    }
    let ethernet = Headers(data);
    let ip = ethernet.at(ETHERNET);
    match u16::from_be(ethernet.half::<12>()) {
        ETH_P_IP => {
            const MORE_OR_OFFSET: u16 = 0x3fffu16.to_be();
            if ip.octet::<0>() != 0x45 || ip.half::<6>() & MORE_OR_OFFSET != 0 {
                return None;
            }
            let len = u16::from_be(ip.half::<2>());
            let header = header::<N_ENDS4, V4>(frame, len.into(), ip.octet::<8>());
            forward_as::<N_ENDS4, V4>(frame, end, ethernet, header, ip.octet::<9>())
        }
        ETH_P_IPV6 => {
            if data + ETHERNET + V6::IP_LEN + UDP > end || ip.octet::<0>() >> 4 != 6 {
                return None;
            }
            let len = u32::from(u16::from_be(ip.half::<4>())) + V6::IP_LEN as u32;
            let header = header::<N_ENDS6, V6>(frame, len, ip.octet::<7>());
            forward_as::<N_ENDS6, V6>(frame, end, ethernet, header, ip.octet::<6>())
        }
        _ => None,
    }
}

#[inline(always)]
fn header<const N: usize, F: Family<N>>(frame: impl Frame, len: u32, hops: u8) -> PlainHeader {
    PlainHeader { available: frame.ip_len(), len, ip_len: F::IP_LEN as u32, hops }
}

#[inline(always)]
fn forward_as<const N: usize, F: Family<N>>(
    frame: impl Frame,
    end: usize,
    ethernet: Headers,
    header: PlainHeader,
    protocol: u8,
) -> Option<u32> {
    let ip = ethernet.at(ETHERNET);
    let before = F::ends(ip);
    if F::side(&before) == Side::None
        || protocol != IPPROTO_TCP && protocol != IPPROTO_UDP
        || !header.is_plain(protocol)
        || !frame.is_to_host(ethernet)
    {
        return None;
    }
    let transport = ip.at(F::IP_LEN);
    // Where the checksum is follows from the comparison that showed that it is there.
    let (tcp_flags, checksum_at) = if protocol == IPPROTO_TCP {
        if transport.0 + TCP > end || !header.has_tcp(transport.octet::<12>()) {
            return None;
        }
        let tcp_flags = transport.octet::<13>();
        // Before the flow is searched for: what opens or closes one is never for here.
        if tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST) != 0 {
            return None;
        }
        (tcp_flags, transport.at(16))
    } else {
        if !header.has_udp(u16::from_be(transport.half::<4>()).into()) {
            return None;
        }
        (0, transport.at(6))
    };
    let checksum = checksum_at.half::<0>();
    let Flow { idx, is_back, record, begun_ms } = flow::<N, F>(&before, protocol)?;
    if !goes_on(record, protocol, tcp_flags, is_back) {
        return None;
    }
    let transport_len = header.len - F::IP_LEN as u32;
    if may_be_partial(&before, protocol, transport_len, checksum) {
        return None;
    }
    let after = F::reversed(F::ends_of(record, idx, !is_back)?);

    let (now, hop, ingress) = (hops::jiffies(), hops::hop(idx, is_back)?, frame.ifindex());
    let NextHop { egress, ethernet: addresses } = match hop.get(now, ingress, header.len) {
        Some(hop) => hop,
        None => {
            let mut fib: Fib = [0; 16];
            let (is_ipv6, len) = (F::IS_IPV6, header.len);
            let question = Question { ifindex: ingress, is_ipv6, protocol, len };
            let [from, to] = F::addresses(&after);
            if fib::look_up(frame.context(), &mut fib, question, from, to) != Route::Found
                || hops::is_unverified(&fib, hops::processor()?.now_ms(now))
            {
                return None;
            }
            hop.set(now, ingress, len, &fib)
        }
    };
    if !frame.may_leave_by(egress) {
        return None;
    }

    // Another flow may have got the record meanwhile: it writes when it begins before its addresses.
    if record.begun_ms() != begun_ms {
        hop.forget();
        return None;
    }

    record.set_last_ms(hops::processor()?.now_ms(now));
    record.add_packet(header.len);
    ethernet.set_word::<0>(addresses[0]);
    ethernet.set_word::<4>(addresses[1]);
    ethernet.set_word::<8>(addresses[2]);
    let mut hops_difference = 0;
    if F::IS_IPV6 {
        let word = ip.half::<6>();
        let [next, hops] = word.to_ne_bytes();
        let less = u16::from_ne_bytes([next, hops.wrapping_sub(1)]);
        hops_difference = u64::from(!word) + u64::from(less);
        ip.set_half::<6>(less);
    } else {
        let difference = addresses_difference(&[before[0], before[1], 0], &[after[0], after[1], 0]);
        let (hops, checksum) = forwarded(ip.half::<8>(), ip.half::<10>(), difference);
        ip.set_half::<8>(hops);
        ip.set_half::<10>(checksum);
    }
    F::set_ends(ip, after);
    let before_sum = checksum;
    let checksum = transport_checksum(protocol, checksum, words_difference(&before, &after));
    checksum_at.set_half::<0>(checksum);
    let sums = u64::from(!before_sum) + u64::from(checksum);
    let difference = match F::IS_IPV6 {
        true => words_difference(&before, &after) + hops_difference,
        false => words_difference(&[before[N - 1]], &[after[N - 1]]),
    };
    frame.set_difference(difference + sums);
    Some(egress)
}

/// Word by word: the compiler would call a function.
#[inline(always)]
fn differ<const N: usize>(one: &[u32; N], other: &[u32; N]) -> bool {
    let (mut difference, mut idx) = (0, 0);
    while idx < N {
        difference |= one[idx] ^ other[idx];
        idx += 1;
    }
    difference != 0
}

/// A packet's flow.
#[derive(Clone, Copy)]
struct Flow {
    /// The index of its record.
    idx: u32,
    /// Whether the packet is the backend's.
    is_back: bool,
    record: RecordPtr,
    /// When it began, by which it is seen that another flow has got the record.
    begun_ms: u32,
}

impl Flow {
    /// The one with this record, if it has these ends.
    #[inline(always)]
    fn at<const N: usize, F: Family<N>>(found: FlowRef, ends: &[u32; N]) -> Option<Flow> {
        let FlowRef { record: idx, is_back } = found;
        let is_back = is_back != 0;
        let record = maps::record(idx)?;
        let begun_ms = record.begun_ms();
        let is_same = !differ(&F::ends_of(record, idx, is_back)?, ends);
        is_same.then_some(Flow { idx, is_back, record, begun_ms })
    }
}

/// The flow of a packet with these ends.
#[inline(always)]
fn flow<const N: usize, F: Family<N>>(ends: &[u32; N], protocol: u8) -> Option<Flow> {
    let place = cache::place(ends, protocol);
    if let Some(found) = place.and_then(CachePtr::find)
        && let Some(flow) = Flow::at::<N, F>(found, ends)
        && is_certain(flow.record, protocol, F::IS_IPV6)
    {
        return Some(flow);
    }
    let found = F::find(ends, protocol)?;
    let flow = Flow::at::<N, F>(found, ends)?;
    if let Some(place) = place
        && is_certain(flow.record, protocol, F::IS_IPV6)
    {
        place.keep(found);
    }
    Some(flow)
}

/// Whether keys of this protocol and family lead to a record, by what it shows: of one that its backend hasn't answered
/// they may not, yet or any more. A record of one family keeps addresses that an earlier flow of the other one had.
#[inline(always)]
fn is_certain(record: RecordPtr, protocol: u8, is_ipv6: bool) -> bool {
    let word = record.word();
    word.client != 0 && word.backend != 0 && word.protocol == protocol && word.is_ipv6() == is_ipv6
}

/// Whether a flow stays as it is with a packet that neither opens nor closes one, and its backend isn't on this host.
#[inline(always)]
fn goes_on(record: RecordPtr, protocol: u8, tcp_flags: u8, is_back: bool) -> bool {
    let word = record.word();
    if word.protocol != protocol || word.client == 0 || word.is_local() {
        return false;
    }
    if protocol == IPPROTO_UDP {
        let is_known = !is_back || word.backend != 0;
        return is_known
            && (is_back || maps::is_in_table(record.backend_idx(), record.generation()));
    }
    let shown = if is_back { word.backend } else { word.client };
    word.is_open() && !word.is_unsettled() && word.after(tcp_flags, is_back, 0) == shown
}
