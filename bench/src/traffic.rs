//! Packets by BPF_PROG_RUN with live frames, and their count where they arrive: lb-ebpf/traffic. A sender costs
//! a tenth of a microsecond a packet, and what it sends are frames as a network card's driver has them, which
//! become an skb only where the stack needs one.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use aya::maps::{Array, PerCpuArray};
use aya::programs::{TestRun as _, Xdp, XdpMode};
use aya::{Ebpf, TestRunAttrs, TestRunOptions};
use rustix::process::{Signal, setpriority_process};
use serde_json::Value;
use signal_hook::consts::SIGTERM;
use signal_hook::flag;
use testbed::net::Host;
use testbed::process::Process;

use crate::pin;

/// The variable with the path of the programs, which `cargo xtask bench` builds.
const OBJECT: &str = "NOHOP_TRAFFIC";

/// The length of each packet, in octets; Ethernet's checksum not included.
pub const LEN: usize = 64;
const IP: usize = 14;
const TRANSPORT: usize = IP + 20;
const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;

/// Packets that the kernel sends between two looks at its schedule.
const BATCH: u32 = 64;

/// The word on the command line that makes this program a sender.
const HELPER: &str = "send-packets";

/// Which packets are sent.
#[derive(Clone, Copy, Debug)]
pub struct Packets {
    /// SYNs, or datagrams.
    pub are_syns: bool,
    /// By which a [`Sink`] tells datagrams apart: 0 or 1.
    pub stream: u8,
    /// Whom they are for.
    pub to: SocketAddrV4,
    /// The first of the addresses that they come from, and how many there are.
    pub from: (Ipv4Addr, u32),
    /// The first of the ports that they come from, and how many there are.
    pub ports: (u16, u32),
}

/// Packets that are being sent.
pub struct Sending(Process);

/// Counts and drops, for as long as it lives, the packets that arrive at an interface.
pub struct Sink(Ebpf);

/// The programs' file.
///
/// # Errors
/// Without the variable that names it.
pub fn object() -> Result<PathBuf> {
    let path = std::env::var_os(OBJECT).with_context(|| {
        format!("{OBJECT} isn't set: run `cargo xtask bench edge`, which builds what sends packets")
    })?;
    Ok(path.into())
}

impl Sending {
    /// Starts to send these from an `interface` of a host over its cable to `next`, an interface of another one;
    /// `rate` a second, or as fast as it can.
    ///
    /// # Errors
    /// When the programs aren't built, or the kernel rejects them.
    pub fn start(
        host: &Host,
        interface: &str,
        next: (&Host, &str),
        packets: &Packets,
        rate: Option<u32>,
    ) -> Result<Sending> {
        let (index, here) = link(host, interface)?;
        let (_, there) = link(next.0, next.1)?;
        let plan = plan(packets, index, here, there, rate);
        let plan: Vec<String> = plan.iter().map(|octet| format!("{octet:02x}")).collect();
        // A process of its own, as nothing but a signal ends it.
        let mut command = host.outside().command(std::env::current_exe()?);
        command.args([HELPER, &plan.concat()]);
        let process = pin::on(pin::CLIENT, || Process::spawn("packets", command))?;
        process.wait_for_line(&["sending"])?;
        Ok(Sending(process))
    }

    /// Ends it. Returns how many packets it has sent.
    ///
    /// # Errors
    /// When it has failed.
    pub fn stop(self) -> Result<u64> {
        self.0.signal(Signal::TERM)?;
        let line = self.0.wait_for_line(&["sent "])?;
        line.trim_start_matches("sent ").parse().with_context(|| line.clone())
    }
}

/// Sends, if `arguments` ask for it, until SIGTERM.
pub fn helper(arguments: &[String]) -> Option<Result<()>> {
    match arguments {
        [helper, plan] if helper == HELPER => Some(send(plan)),
        _ => None,
    }
}

fn send(plan: &str) -> Result<()> {
    let mut ebpf = load("traffic_send")?;
    let octet = |at: usize| u8::from_str_radix(plan.get(2 * at..2 * at + 2)?, 16).ok();
    let mut octets = [0; PLAN];
    for (at, to) in octets.iter_mut().enumerate() {
        *to = octet(at).with_context(|| format!("{plan} is no plan"))?;
    }
    let mut plans: Array<_, [u8; PLAN]> = ebpf.take_map("PLAN").context("no PLAN")?.try_into()?;
    plans.set(0, octets, 0)?;
    let is_over = Arc::new(AtomicBool::new(false));
    flag::register(SIGTERM, Arc::clone(&is_over))?;
    // As interrupts do, it goes before programs.
    setpriority_process(None, -20).context("raise the priority")?;
    let program: &Xdp = ebpf.program("traffic_send").context("no program")?.try_into()?;
    println!("sending");
    while !is_over.load(Ordering::Relaxed) {
        // Each call holds up for some ten milliseconds, in which the kernel enters the program into its dispatcher.
        let options = TestRunOptions {
            data_in: Some(&[0; LEN]),
            repeat: u32::MAX,
            attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
            ..TestRunOptions::new()
        };
        match program.test_run(options) {
            Err(error) if !is_over.load(Ordering::Relaxed) => {
                return Err(error).context("send packets by BPF_PROG_RUN");
            }
            _ => {}
        }
    }
    let sent = plans.get(&0, 0)?;
    let next = sent[NEXT..].first_chunk::<8>().context("a plan")?;
    println!("sent {}", u64::from_ne_bytes(*next) & (u64::MAX >> 8));
    Ok(())
}

impl Sink {
    /// Counts and drops at an interface of a host.
    ///
    /// # Errors
    /// When the programs aren't built, or the kernel rejects them.
    pub fn new(host: &Host, interface: &str) -> Result<Sink> {
        let mut ebpf = load("traffic_drop")?;
        host.enter(|| {
            let program: &mut Xdp =
                ebpf.program_mut("traffic_drop").context("no program")?.try_into()?;
            program.attach(interface, XdpMode::Driver).context("attach the sink")
        })?;
        Ok(Sink(ebpf))
    }

    /// How many datagrams of a stream have arrived.
    ///
    /// # Errors
    /// When the kernel doesn't report it.
    pub fn n_datagrams(&self, stream: u8) -> Result<u64> {
        let arrived: PerCpuArray<_, u64> =
            self.0.map("ARRIVED").context("no ARRIVED")?.try_into()?;
        Ok(arrived.get(&stream.into(), 0)?.iter().sum())
    }
}

fn load(program: &str) -> Result<Ebpf> {
    let path = object()?;
    let mut ebpf = Ebpf::load_file(&path).with_context(|| format!("load {}", path.display()))?;
    let found: &mut Xdp = ebpf.program_mut(program).context("no program")?.try_into()?;
    found.load().with_context(|| format!("load {program}"))?;
    Ok(ebpf)
}

/// An interface's index and its address.
fn link(host: &Host, interface: &str) -> Result<(u32, [u8; 6])> {
    let text = host.ip(&format!("-j link show dev {interface}"))?;
    let links: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    let index = links[0]["ifindex"].as_u64().and_then(|index| u32::try_from(index).ok());
    let address = links[0]["address"].as_str().unwrap_or_default();
    let octets: Vec<u8> =
        address.split(':').map_while(|octet| u8::from_str_radix(octet, 16).ok()).collect();
    let address = octets.try_into().ok();
    index.zip(address).with_context(|| format!("{interface} has no Ethernet address: {text}"))
}

/// The size of a `Plan` of lb-ebpf/traffic.
const PLAN: usize = NEXT + 16;
/// Where it has the number of the next packet.
const NEXT: usize = LEN + 8 * 4;

/// A `Plan` of lb-ebpf/traffic.
fn plan(
    packets: &Packets,
    interface: u32,
    from: [u8; 6],
    to: [u8; 6],
    rate: Option<u32>,
) -> [u8; PLAN] {
    let mut frame = [0; LEN];
    frame[..6].copy_from_slice(&to);
    frame[6..12].copy_from_slice(&from);
    frame[12] = 0x08;
    let protocol = if packets.are_syns { IPPROTO_TCP } else { IPPROTO_UDP };
    // A TCP header is a multiple of four; what follows is Ethernet's padding.
    let transport_len = (LEN - TRANSPORT) as u16 & if packets.are_syns { !3 } else { !0 };
    let ip_len = 20 + transport_len;
    frame[IP] = 0x45;
    frame[IP + 2..IP + 4].copy_from_slice(&ip_len.to_be_bytes());
    // Don't fragment; a time to live of 64.
    frame[IP + 6] = 0x40;
    frame[IP + 8] = 64;
    frame[IP + 9] = protocol;
    frame[IP + 16..IP + 20].copy_from_slice(&packets.to.ip().octets());
    let header = &mut frame[TRANSPORT..];
    header[2..4].copy_from_slice(&packets.to.port().to_be_bytes());
    if packets.are_syns {
        // Two words of options, which do nothing.
        header[12] = 7 << 4;
        header[13] = 2;
        header[14..16].copy_from_slice(&64_240u16.to_be_bytes());
        header[20..28].fill(1);
    } else {
        header[4..6].copy_from_slice(&transport_len.to_be_bytes());
    }
    let ip_sum = sum(&frame[IP..TRANSPORT]);
    let destination = sum(&frame[IP + 16..IP + 20]);
    let transport_sum =
        sum(&frame[TRANSPORT..]) + destination + u32::from(protocol) + u32::from(transport_len);
    let (first_address, n_addresses) = packets.from;
    let (first_port, n_ports) = packets.ports;
    let words = [
        ip_sum,
        transport_sum,
        first_address.to_bits(),
        n_addresses,
        first_port.into(),
        n_ports,
        interface,
        rate.map_or(0, |rate| 1_000_000_000 / rate.max(1)),
    ];
    let mut plan = [0; PLAN];
    plan[..LEN].copy_from_slice(&frame);
    for (nth, word) in words.into_iter().enumerate() {
        plan[LEN + 4 * nth..][..4].copy_from_slice(&word.to_ne_bytes());
    }
    let first_number = u64::from(packets.stream) << 56;
    plan[NEXT..NEXT + 8].copy_from_slice(&first_number.to_ne_bytes());
    plan
}

/// The sum of words in network byte order.
fn sum(octets: &[u8]) -> u32 {
    octets
        .chunks(2)
        .map(|word| u32::from(word[0]) << 8 | u32::from(word.get(1).copied().unwrap_or(0)))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The packet that the program makes of a plan, for one address, port and number; without number of a SYN.
    fn packet(plan: &[u8], from: (Ipv4Addr, u16), number: Option<u64>) -> Vec<u8> {
        let word = |nth: usize| {
            u32::from_ne_bytes(*plan[LEN + 4 * nth..].first_chunk().expect("a word of the plan"))
        };
        let fold = |sum: u32| {
            let sum = (sum >> 16) + (sum & 0xffff);
            !((sum >> 16) + sum) as u16
        };
        let mut frame = plan[..LEN].to_vec();
        frame[IP + 12..IP + 16].copy_from_slice(&from.0.octets());
        frame[TRANSPORT..TRANSPORT + 2].copy_from_slice(&from.1.to_be_bytes());
        let mut added = sum(&from.0.octets());
        frame[IP + 10..IP + 12].copy_from_slice(&fold(word(0) + added).to_be_bytes());
        added += u32::from(from.1);
        let checksum_at = TRANSPORT + if number.is_some() { 6 } else { 16 };
        if let Some(number) = number {
            frame[LEN - 8..].copy_from_slice(&number.to_be_bytes());
            added += sum(&number.to_be_bytes());
        }
        frame[checksum_at..checksum_at + 2].copy_from_slice(&fold(word(1) + added).to_be_bytes());
        frame
    }

    #[test]
    fn checksums_are_right() {
        let folded = |mut sum: u32| {
            while sum > 0xffff {
                sum = (sum >> 16) + (sum & 0xffff);
            }
            sum
        };
        let from = (Ipv4Addr::new(198, 18, 255, 254), 54_321);
        for are_syns in [false, true] {
            let packets = Packets {
                are_syns,
                stream: 1,
                to: "10.96.1.0:80".parse().expect("an address"),
                from: (from.0, 1),
                ports: (from.1, 1),
            };
            let plan = plan(&packets, 7, [1; 6], [2; 6], Some(100_000));
            let frame = packet(&plan, from, (!are_syns).then_some(0x1234_5678_9abc));
            let len = usize::from(u16::from_be_bytes([frame[IP + 2], frame[IP + 3]]));
            assert_eq!(len, if are_syns { 48 } else { 50 });
            assert_eq!(folded(sum(&frame[IP..TRANSPORT])), 0xffff, "{frame:?}");
            let (protocol, transport) = (u32::from(frame[IP + 9]), &frame[TRANSPORT..IP + len]);
            let pseudo = sum(&frame[IP + 12..TRANSPORT]) + protocol + transport.len() as u32;
            assert_eq!(folded(pseudo + sum(transport)), 0xffff, "{frame:?}");
        }
    }
}
