//! `capture`: the connections that programs of this network namespace begin to some addresses, as their
//! packets show them.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Write};
use std::net::SocketAddrV4;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use clap::Args;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockProtocol, SockType, recvmsg,
    setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeSpec, TimeVal};
use serde_json::{Value, json};
use signal_hook::consts::SIGTERM;
use signal_hook::flag;

/// Room for the packets of a stall, in bytes.
const BUFFER: usize = 32 * 1024 * 1024;

/// How long it waits for a packet before it looks for SIGTERM, in microseconds.
const LOOK_US: i64 = 20_000;

/// The headers of IPv4 and TCP, with all options.
const MAX_HEADERS: usize = 120;

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// The arguments of this command.
#[derive(Args, Clone, Debug)]
pub struct Capture {
    /// The servers whose connections are looked at
    #[arg(value_name = "ADDR:PORT", required = true)]
    pub servers: Vec<SocketAddrV4>,
}

/// A connection; times are the kernel's, in nanoseconds of CLOCK_REALTIME.
#[derive(Clone, Debug, PartialEq)]
struct Connect {
    sequence: u32,
    syn_ns: u64,
    n_syns: u64,
    /// When its SYN was acknowledged.
    accepted_ns: Option<u64>,
    /// When its SYN was answered by a RST.
    refused_ns: Option<u64>,
    /// When the server reset it later.
    reset_ns: Option<u64>,
}

/// A packet of TCP.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Packet {
    from: SocketAddrV4,
    to: SocketAddrV4,
    sequence: u32,
    flags: u8,
}

/// The connections to each server, and which one a client's port stands for.
#[derive(Default)]
struct Seen {
    servers: BTreeMap<SocketAddrV4, Vec<Connect>>,
    current: HashMap<(SocketAddrV4, SocketAddrV4), usize>,
}

impl Capture {
    /// Looks at packets until SIGTERM, and reports for each server its connections in their order.
    ///
    /// # Errors
    /// Without CAP_NET_RAW.
    pub fn run(&self) -> anyhow::Result<Value> {
        let socket = socket(
            AddressFamily::Packet,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::EthAll,
        )
        .context("capture packets, which needs CAP_NET_RAW")?;
        setsockopt(&socket, sockopt::RcvBufForce, &BUFFER)?;
        setsockopt(&socket, sockopt::ReceiveTimestampns, &true)?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(0, LOOK_US))?;
        let is_stopped = Arc::new(AtomicBool::new(false));
        flag::register(SIGTERM, Arc::clone(&is_stopped)).context("handle SIGTERM")?;
        println!("capturing");
        io::stdout().flush()?;

        let servers = self.servers.iter().map(|server| (*server, Vec::new())).collect();
        let mut seen = Seen { servers, ..Seen::default() };
        let mut stop_ns = None;
        let (mut bytes, mut control) = ([0; MAX_HEADERS], nix::cmsg_space!(TimeSpec));
        loop {
            if stop_ns.is_none() && is_stopped.load(Ordering::Relaxed) {
                stop_ns = Some(SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64);
            }
            let mut parts = [io::IoSliceMut::new(&mut bytes)];
            let fd = socket.as_raw_fd();
            let received = recvmsg::<()>(fd, &mut parts, Some(&mut control), MsgFlags::empty());
            let (n_bytes, at_ns) = match received {
                Ok(message) => {
                    let at_ns = message.cmsgs()?.find_map(|control| match control {
                        ControlMessageOwned::ScmTimestampns(at) => Some(ns(at)),
                        _ => None,
                    });
                    (message.bytes, at_ns.context("the kernel reports no time of a packet")?)
                }
                Err(Errno::EAGAIN) if stop_ns.is_some() => break,
                Err(Errno::EAGAIN | Errno::EINTR) => continue,
                Err(errno) => return Err(errno).context("receive a packet"),
            };
            // What was sent before SIGTERM may still be in the buffer.
            if stop_ns.is_some_and(|stop_ns| at_ns > stop_ns) {
                break;
            }
            if let Some(packet) = Packet::parse(&bytes[..n_bytes.min(MAX_HEADERS)]) {
                seen.add(packet, at_ns);
            }
        }
        Ok(seen.to_json())
    }
}

fn ns(at: TimeSpec) -> u64 {
    at.tv_sec() as u64 * crate::clock::SECOND_NS + at.tv_nsec() as u64
}

impl Packet {
    /// From the header of IPv4 on; `None` for anything else.
    fn parse(bytes: &[u8]) -> Option<Packet> {
        let first = *bytes.first()?;
        let (ip, tcp) = bytes.split_at_checked(usize::from(first & 15) * 4)?;
        if first >> 4 != 4 || ip.len() < 20 || ip[9] != 6 {
            return None;
        }
        let port = |at: usize| Some(u16::from_be_bytes(tcp.get(at..at + 2)?.try_into().ok()?));
        let address = |at: usize| <[u8; 4]>::try_from(&ip[at..at + 4]).ok();
        Some(Packet {
            from: SocketAddrV4::new(address(12)?.into(), port(0)?),
            to: SocketAddrV4::new(address(16)?.into(), port(2)?),
            sequence: u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?),
            flags: *tcp.get(13)? & (FIN | SYN | RST | ACK),
        })
    }
}

impl Seen {
    fn add(&mut self, packet: Packet, at_ns: u64) {
        let Packet { from, to, sequence, flags } = packet;
        if let Some(connects) = self.servers.get_mut(&to) {
            if flags != SYN {
                return;
            }
            let current = self.current.get(&(to, from)).and_then(|&idx| connects.get_mut(idx));
            if let Some(again) = current.filter(|connect| connect.sequence == sequence) {
                again.n_syns += 1;
                return;
            }
            self.current.insert((to, from), connects.len());
            connects.push(Connect {
                sequence,
                syn_ns: at_ns,
                n_syns: 1,
                accepted_ns: None,
                refused_ns: None,
                reset_ns: None,
            });
        } else if let Some(connects) = self.servers.get_mut(&from)
            && let Some(&idx) = self.current.get(&(from, to))
        {
            let connect = &mut connects[idx];
            let at = if flags & RST != 0 {
                let is_open = connect.accepted_ns.is_some();
                if is_open { &mut connect.reset_ns } else { &mut connect.refused_ns }
            } else if flags == SYN | ACK {
                &mut connect.accepted_ns
            } else {
                return;
            };
            at.get_or_insert(at_ns);
        }
    }

    fn to_json(&self) -> Value {
        let servers = self.servers.iter().map(|(server, connects)| {
            let connects = connects.iter().map(|connect| {
                json!({
                    "syn_ns": connect.syn_ns,
                    "n_syns": connect.n_syns,
                    "accepted_ns": connect.accepted_ns,
                    "refused_ns": connect.refused_ns,
                    "reset_ns": connect.reset_ns,
                })
            });
            (server.to_string(), connects.collect::<Value>())
        });
        json!({ "servers": servers.collect::<serde_json::Map<_, _>>() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: &str = "10.0.0.1:1000";
    const SERVER: &str = "10.0.0.2:80";

    #[test]
    fn packets_become_connections() {
        let (client, server) = (CLIENT.parse().unwrap(), SERVER.parse().unwrap());
        let mut seen = Seen::default();
        seen.servers.insert(server, vec![]);
        let (out, back) = ((client, server), (server, client));
        let packets = [
            (out, 7, SYN),
            (out, 7, SYN),
            (back, 0, RST | ACK),
            (out, 8, SYN),
            (back, 9, SYN | ACK),
            (out, 9, ACK),
            (back, 10, RST),
            (back, 10, RST),
            // An answer without a question, and another server's.
            ((server, server), 1, SYN | ACK),
            ((client, client), 1, SYN),
        ];
        for (at_ns, ((from, to), sequence, flags)) in (1..).zip(packets) {
            seen.add(Packet { from, to, sequence, flags }, at_ns);
        }
        let connects = &seen.to_json()["servers"][SERVER];
        let expected = json!([
            { "syn_ns": 1, "n_syns": 2, "accepted_ns": null, "refused_ns": 3, "reset_ns": null },
            { "syn_ns": 4, "n_syns": 1, "accepted_ns": 5, "refused_ns": null, "reset_ns": 7 },
        ]);
        assert_eq!(*connects, expected);
    }

    #[test]
    fn headers_are_read_and_anything_else_is_not() {
        let mut bytes = [0; 40];
        (bytes[0], bytes[9]) = (0x45, 6);
        bytes[12..20].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        bytes[20..28].copy_from_slice(&[3, 232, 0, 80, 0, 0, 0, 7]);
        bytes[33] = SYN | 0x40;
        let expected = Packet {
            from: CLIENT.parse().unwrap(),
            to: SERVER.parse().unwrap(),
            sequence: 7,
            flags: SYN,
        };
        assert_eq!(Packet::parse(&bytes), Some(expected));
        for n_bytes in 0..34 {
            assert_eq!(Packet::parse(&bytes[..n_bytes]), None, "{n_bytes}");
        }
        for (at, byte) in [(0, 0x65), (0, 0x4f), (0, 0x41), (9, 17)] {
            let mut bytes = bytes;
            bytes[at] = byte;
            assert_eq!(Packet::parse(&bytes), None, "{byte:#x}");
        }
    }
}
