//! A client as the resolver of an application is one: a thread that sends a query, waits for its answer, and is
//! asleep until the next one is due.
//!
//! dnsperf has a thread that sends and another one that receives. What it measures on a calm machine is mostly how long
//! the second one takes to wake up, where an answer is there before the query's system call returns.

use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use testbed::net::Host;

use crate::pin;
use crate::stats::quantile;

/// After this an answer is lost.
const LIMIT: Duration = Duration::from_secs(2);
/// The length of a message's header, in bytes.
const HEADER_LEN: usize = 12;

/// How long answers took, in microseconds: half of them at most the first number, the slowest hundredth at least the
/// second. So many queries a second are sent from a host, on the client's processor, unless answers take longer.
///
/// # Errors
/// When an answer is lost, or is none with a record.
pub fn waits_us(
    host: &Host,
    server: SocketAddrV4,
    questions: &Path,
    rate: f64,
    seconds: f64,
) -> Result<[f64; 2]> {
    let text = fs::read_to_string(questions);
    let text = text.with_context(|| format!("read {}", questions.display()))?;
    let queries: Vec<_> = text.lines().filter_map(|line| query(line.split(' ').next()?)).collect();
    let ask = || ask(server, &queries, rate, seconds);
    let waits_us = pin::on(pin::CLIENT, || host.enter(ask))?;
    Ok([0.5, 0.99].map(|share| quantile(&waits_us, share)))
}

fn ask(server: SocketAddrV4, queries: &[Vec<u8>], rate: f64, seconds: f64) -> Result<Vec<f64>> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).context("bind a socket")?;
    socket.connect(server).with_context(|| format!("connect to {server}"))?;
    socket.set_read_timeout(Some(LIMIT)).context("set a limit")?;
    let [interval, length] = [1.0 / rate, seconds].map(Duration::from_secs_f64);
    let start = Instant::now();
    let (mut waits_us, mut due, mut answer) = (Vec::new(), start, [0; 512]);
    for (id, query) in (0..=u16::MAX).cycle().zip(queries.iter().cycle()) {
        let mut query = query.clone();
        query[..2].copy_from_slice(&id.to_be_bytes());
        if due - start >= length {
            break;
        }
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let sent = Instant::now();
        socket.send(&query).with_context(|| format!("send to {server}"))?;
        let len = socket.recv(&mut answer).with_context(|| format!("an answer of {server}"))?;
        waits_us.push(sent.elapsed().as_secs_f64() * 1e6);
        ensure!(is_answer(&answer[..len], id), "{server} answers {:02x?}", &answer[..len]);
        due = (due + interval).max(sent);
    }
    ensure!(!waits_us.is_empty(), "no query was sent to {server}");
    Ok(waits_us)
}

/// A query for the address of a name; `None` for a name that can't be one.
fn query(name: &str) -> Option<Vec<u8>> {
    // Recursion is desired; one question.
    let mut message = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.trim_end_matches('.').split('.') {
        message.push(u8::try_from(label.len()).ok().filter(|len| (1..64).contains(len))?);
        message.extend(label.bytes());
    }
    message.extend([0, 0, 1, 0, 1]);
    Some(message)
}

/// Whether it is the answer to the query with this id: NOERROR, with a record.
fn is_answer(message: &[u8], id: u16) -> bool {
    let [high, low] = id.to_be_bytes();
    message.len() > HEADER_LEN
        && message[..2] == [high, low]
        && message[2] & 0x80 != 0
        && message[3] & 0xf == 0
        && message[6..8] != [0, 0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_messages() {
        let expected = b"\0\0\x01\0\0\x01\0\0\0\0\0\0\x02n7\x07service\0\0\x01\0\x01";
        assert_eq!(query("n7.service").as_deref(), Some(&expected[..]));
        assert_eq!((query(""), query("a..b")), (None, None));
    }

    #[test]
    fn an_answer_has_a_record() {
        let answer = |id: u8, flags: [u8; 2], n_answers| {
            [&[7, id, flags[0], flags[1], 0, 1, 0, n_answers, 0, 0, 0, 0], &b"rest"[..]].concat()
        };
        let is_answer = |message: &[u8]| is_answer(message, 0x0707);
        assert!(is_answer(&answer(7, [0x85, 0x80], 1)));
        for other in [
            answer(8, [0x85, 0x80], 1),
            answer(7, [0x05, 0x80], 1),
            answer(7, [0x85, 0x82], 1),
            answer(7, [0x85, 0x80], 0),
            vec![7, 7, 0x85, 0x80],
        ] {
            assert!(!is_answer(&other), "{other:02x?}");
        }
    }

    /// A server that answers at once, and one that answers what wasn't asked.
    #[test]
    fn answers_are_timed() {
        let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
        let std::net::SocketAddr::V4(address) = server.local_addr().expect("it is bound") else {
            unreachable!("it is of IPv4")
        };
        let serve = |change: fn(&mut [u8])| {
            let mut buffer = [0; 512];
            let (len, from) = server.recv_from(&mut buffer).expect("a query");
            (buffer[2], buffer[3], buffer[7]) = (0x85, 0x80, 1);
            change(&mut buffer);
            server.send_to(&buffer[..len], from).expect("it is sent");
        };
        let queries = [query("n0.service").expect("a query")];
        // The second one would be due after the end.
        let keep: fn(&mut [u8]) = |_| ();
        let deny: fn(&mut [u8]) = |answer| answer[3] = 3;
        for (change, is_right) in [(keep, true), (deny, false)] {
            let found = thread::scope(|scope| {
                scope.spawn(|| serve(change));
                ask(address, &queries, 0.1, 5.0)
            });
            assert_eq!(found.is_ok_and(|waits_us| waits_us.len() == 1), is_right);
        }
    }
}
