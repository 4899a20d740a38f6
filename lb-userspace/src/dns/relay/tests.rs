//! The relay on a made-up clock, with sockets that note what goes through them.

use hickory_proto::op::{Message, OpCode, Query};
use hickory_proto::rr::rdata::{A, NS};
use hickory_proto::rr::{Name, RData, Record, RecordType};

use super::*;
use crate::dns::udp::LocalAddress;
use crate::dns::upstream::Upstream;

fn server(rank: usize) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, rank as u8 + 1], 53))
}

/// Sockets that note what goes through them.
#[derive(Default)]
struct Notes {
    /// What was sent and answered since the last look.
    log: Vec<String>,
    ports: Vec<SocketAddr>,
    /// What was sent last for each name to each upstream.
    sent: HashMap<(String, usize), (SocketId, Message)>,
    n_in_flight: usize,
    n_mismatches: u32,
    n_sent: u32,
}

impl RelayIo for Notes {
    fn draw(&mut self, server: SocketAddr) -> Option<SocketId> {
        self.n_in_flight += 1;
        self.ports.push(server);
        Some(self.ports.len() as SocketId - 1)
    }

    fn id(&mut self) -> u16 {
        7 // as if by chance
    }

    fn send(&mut self, port: SocketId, message: &[u8]) {
        let message = Message::from_vec(message).unwrap();
        let name = message.queries[0].name.to_string();
        let rank = (0..).find(|rank| server(*rank) == self.ports[port as usize]).unwrap();
        self.log.push(format!("{name}>{}", rank + 1));
        self.sent.insert((name, rank), (port, message));
        self.n_sent += 1;
    }

    fn done(&mut self, _port: SocketId) {
        self.n_in_flight -= 1;
    }

    fn mismatch(&mut self, _port: SocketId) -> bool {
        self.n_mismatches += 1;
        self.n_mismatches.is_multiple_of(3)
    }

    fn answer(&mut self, waiter: &Waiter, _: &[u8], message: &[u8], end: Completion<'_>) {
        let message = Message::from_vec(message).unwrap();
        assert_eq!(message.metadata.id, waiter.id);
        let data = message.answers.first().map(|record| record.data.to_string());
        let last = data.as_deref().and_then(|data| data.rsplit('.').next()).unwrap_or_default();
        let shown = match end {
            Completion::Truncated => "TC".to_owned(),
            Completion::Failed(ForwardError::Busy) => "Busy".to_owned(),
            _ => format!("{:?}", message.metadata.response_code),
        };
        assert_eq!(message.metadata.truncation, end == Completion::Truncated);
        self.log.push(format!("{}={shown}{last}", message.queries[0].name));
    }
}

struct Rig {
    relay: Relay,
    notes: Notes,
    route: Arc<UpstreamRoute>,
    start: Instant,
}

impl Rig {
    fn new(n_upstreams: usize, limits: ForwardLimits) -> Rig {
        let start = Instant::now();
        let upstream = |rank| Arc::new(Upstream::new(server(rank), start));
        let upstreams = (0..n_upstreams).map(upstream).collect();
        let route = UpstreamRoute { domain: "".into(), is_in_zone: false, upstreams };
        let relay = Relay::new(limits, Arc::default(), (30, 5), 0);
        Rig { relay, notes: Notes::default(), route: Arc::new(route), start }
    }

    fn at(&self, ms: u64) -> Instant {
        self.start + Duration::from_millis(ms)
    }

    fn ask(&mut self, ms: u64, name: &str, id: u16, client_key: ClientKey) {
        let mut message = Message::query();
        message.metadata.id = id;
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
        let bytes = message.to_vec().unwrap();
        let query = ClientQuery::read(&bytes).unwrap();
        let now = self.at(ms);
        let client = SocketAddr::from(([127, 0, 0, 1], id));
        let waiter = Waiter::new(client, LocalAddress::Bound, client_key, &query, now);
        self.relay.ask(&query, &self.route, waiter, now, &mut self.notes);
    }

    fn reply(&mut self, ms: u64, rank: usize, name: &str, what: &str) {
        let (port, query) = &self.notes.sent[&(name.to_owned(), rank)];
        let code = match what {
            "ok" | "nothing" | "bare" | "referral" => ResponseCode::NoError,
            "nx" => ResponseCode::NXDomain,
            "fail" => ResponseCode::ServFail,
            "malformed" => ResponseCode::FormErr,
            "unauthorized" => ResponseCode::NotAuth,
            other => panic!("{other}"),
        };
        let mut message = Message::error_msg(query.metadata.id, OpCode::Query, code);
        message.metadata.recursion_available = !matches!(what, "referral" | "bare");
        message.add_query(query.queries[0].clone());
        if what == "ok" {
            let data = RData::A(A::new(192, 0, 2, rank as u8 + 1));
            let name = query.queries[0].name.clone();
            message.add_answer(Record::from_rdata(name, 9, data));
        }
        if what == "referral" {
            let zone = Name::from_ascii("example.").unwrap();
            let server = RData::NS(NS(Name::from_ascii("ns.example.").unwrap()));
            message.authorities = vec![Record::from_rdata(zone, 9, server)];
        }
        let (port, bytes) = (*port, message.to_vec().unwrap());
        let now = self.at(ms);
        self.relay.receive(port, &bytes, now, &mut self.notes);
    }

    /// All that was asked comes to its end, and nothing is left of it.
    fn end(&mut self, ms: u64) {
        for n in 1..20 {
            let now = self.at(ms + n * 400);
            self.relay.expire(now, &mut self.notes);
        }
        assert!(self.relay.is_idle() && self.relay.client_keys.is_empty());
        assert!(self.relay.flights.is_empty() && self.relay.by_question.is_empty());
        assert_eq!(self.notes.n_in_flight, 0);
    }

    /// What happens at each time, and what was sent, answered and suspected by then.
    fn check(&mut self, what: &str, rows: &[(u64, &str, &str)]) {
        for (ms, action, expected) in rows {
            let now = self.at(*ms);
            self.relay.expire(now, &mut self.notes);
            let words: Vec<&str> = action.split(' ').collect();
            let rank = |word: &str| word.parse::<usize>().unwrap() - 1;
            match words[..] {
                ["-"] => {}
                ["ask", name] => self.ask(*ms, name, 1, None),
                ["out", number] => {
                    let upstream = &self.route.upstreams[rank(number)];
                    upstream.is_late(Transport::Udp, now);
                    assert!(upstream.is_unproven(Transport::Udp, now), "{what} {ms}");
                    self.relay.recheck(now, &mut self.notes);
                }
                ["alive", number] => {
                    self.route.upstreams[rank(number)].is_alive(Transport::Udp, now);
                }
                ["loop", number] => {
                    let path = self.route.path(&self.route.upstreams[rank(number)]);
                    let probe = self.relay.loops.probe(&path, now).unwrap();
                    assert!(self.relay.is_probe(&WireName::read(&probe.wire).unwrap()));
                    self.relay.recheck(now, &mut self.notes);
                }
                ["unreachable", number, name] => {
                    let (port, _) = self.notes.sent[&(name.to_owned(), rank(number))];
                    self.relay.unreachable(port, now, &mut self.notes);
                }
                [number, name, answer] => self.reply(*ms, rank(number), name, answer),
                _ => panic!("{action}"),
            }
            let mut log = std::mem::take(&mut self.notes.log);
            log.extend(self.relay.take_suspicion().then(|| "!".to_owned()));
            assert_eq!(log.join(" "), *expected, "{what}: {action} at {ms}");
        }
    }
}

#[test]
fn who_is_asked_and_whose_answer_counts() {
    type Row<'a> = (u64, &'a str, &'a str);
    let stories: [(&str, &[Row<'_>]); 18] = [
        ("the first answers", &[(0, "ask a.", "a.>1"), (399, "1 a. ok", "a.=NoError1")]),
        (
            "the first one's answer counts, however late",
            &[
                (0, "ask a.", "a.>1"),
                (400, "-", "a.>2 !"),
                (800, "-", "a.>3 !"),
                (900, "1 a. ok", "a.=NoError1"),
                (901, "2 a. ok", ""),
            ],
        ),
        (
            "a dead one costs one hedge, then a short one, then nothing",
            &[
                (0, "ask a.", "a.>1"),
                (400, "-", "a.>2 !"),
                (401, "2 a. ok", "a.=NoError2"),
                (402, "ask b.", "b.>1"),
                (452, "-", "b.>2"),
                (453, "2 b. ok", "b.=NoError2"),
                (1400, "out 1", ""),
                (1401, "ask c.", "c.>2"),
                (1402, "2 c. ok", "c.=NoError2"),
                (99_000_000, "ask d.", "d.>2"),
                (99_000_001, "2 d. ok", "d.=NoError2"),
                (99_000_002, "alive 1", ""),
                (99_000_003, "ask e.", "e.>1"),
            ],
        ),
        (
            "slow names demote no upstream",
            &[
                (0, "ask slow.", "slow.>1"),
                (10, "ask b.", "b.>1"),
                (20, "1 b. ok", "b.=NoError1"),
                (400, "-", "slow.>2"),
                (401, "2 slow. ok", "slow.=NoError2"),
                (410, "ask c.", "c.>1"),
            ],
        ),
        (
            "a denial waits for the better one",
            &[
                (0, "ask a.", "a.>1"),
                (400, "-", "a.>2 !"),
                (401, "2 a. nx", ""),
                (900, "-", ""),
                (950, "1 a. ok", "a.=NoError1"),
            ],
        ),
        (
            "nothing of that type is a denial too",
            &[
                (0, "ask a.", "a.>1"),
                (400, "-", "a.>2 !"),
                (401, "2 a. nothing", ""),
                (950, "1 a. ok", "a.=NoError1"),
            ],
        ),
        (
            "a denial counts once the better one is out",
            &[
                (0, "ask a.", "a.>1"),
                (400, "-", "a.>2 !"),
                (401, "2 a. nx", ""),
                (1400, "out 1", "a.=NXDomain"),
            ],
        ),
        (
            "a denial counts once the time is over",
            &[
                (0, "ask a.", "a.>1"),
                (400, "-", "a.>2 !"),
                (401, "2 a. nx", ""),
                (1999, "-", ""),
                (2000, "-", "a.=NXDomain"),
            ],
        ),
        (
            "the first one's denial counts at once",
            &[(0, "ask a.", "a.>1"), (1, "1 a. nx", "a.=NXDomain")],
        ),
        (
            "one that can't is passed over, and its answer counts where none is better",
            &[
                (0, "ask a.", "a.>1"),
                (1, "1 a. fail", "a.>2"),
                (2, "2 a. nx", "a.=NXDomain"),
                (3, "ask b.", "b.>1"),
                (4, "1 b. fail", "b.>2"),
                (5, "2 b. fail", "b.>3"),
                (6, "3 b. fail", "b.=ServFail"),
            ],
        ),
        (
            "whatever isn't an answer is a failure",
            &[
                (0, "ask a.", "a.>1"),
                (1, "1 a. malformed", "a.>2"),
                (2, "2 a. referral", "a.>3"),
                (3, "3 a. unauthorized", "a.=FormErr"),
                (4, "ask b.", "b.>1"),
                (5, "1 b. referral", "b.>2"),
                (6, "2 b. ok", "b.=NoError2"),
                // No data, by one that doesn't recurse for us.
                (7, "ask c.", "c.>1"),
                (8, "1 c. bare", "c.=NoError"),
            ],
        ),
        (
            "one that is out holds up no failure for longer than a hedge",
            &[
                (0, "out 1", ""),
                (1, "ask a.", "a.>2"),
                (10, "2 a. fail", "a.>3"),
                (20, "3 a. fail", "a.>1"),
                (419, "-", ""),
                (420, "-", "a.=ServFail"),
                (421, "ask b.", "b.>2"),
                (422, "2 b. fail", "b.>3"),
                (423, "3 b. fail", "b.>1"),
                (424, "1 b. ok", "b.=NoError1"),
            ],
        ),
        (
            "one that goes out ends the wait, too",
            &[
                (0, "ask a.", "a.>1"),
                (400, "-", "a.>2 !"),
                (401, "2 a. fail", "a.>3"),
                (402, "3 a. fail", ""),
                (1399, "-", ""),
                (1400, "out 1", "a.=ServFail"),
            ],
        ),
        (
            "one that isn't there is passed over at once",
            &[
                (0, "ask a.", "a.>1"),
                (1, "unreachable 1 a.", "a.>2 !"),
                (2, "2 a. ok", "a.=NoError2"),
            ],
        ),
        (
            "two rounds, and no answer",
            &[
                (0, "ask a.", "a.>1"),
                (400, "-", "a.>2 !"),
                (800, "-", "a.>3 !"),
                (2000, "-", "a.>1 !"),
                (2050, "-", "a.>2"),
                (2100, "-", "a.>3"),
                (3999, "-", ""),
                (4000, "-", "a.=ServFail"),
            ],
        ),
        (
            "all are out: all are query, and the first is back by its answer",
            &[
                (0, "out 1", ""),
                (0, "out 2", ""),
                (0, "out 3", ""),
                (1, "ask a.", "a.>1 a.>2 a.>3"),
                (2, "2 a. nx", ""),
                (3, "1 a. ok", "a.=NoError1"),
                (4, "ask b.", "b.>1"),
            ],
        ),
        (
            "a looping upstream is left, and its query goes to the next one",
            &[
                (0, "ask a.", "a.>1"),
                (5, "loop 1", "a.>2"),
                (6, "2 a. nx", "a.=NXDomain"),
                (7, "ask b.", "b.>2"),
            ],
        ),
        (
            "circles alone",
            &[
                (0, "loop 2", ""),
                (0, "loop 3", ""),
                (1, "ask a.", "a.>1"),
                (5, "loop 1", "a.=ServFail"),
                (7, "ask b.", "b.=ServFail"),
            ],
        ),
    ];
    for (what, rows) in stories {
        let mut rig = Rig::new(3, ForwardLimits::default());
        rig.check(what, rows);
        rig.end(100_000_000);
        assert_eq!(rig.relay.deadline(), None, "{what}");
    }
}

#[test]
fn many_ask_the_same_and_one_query_goes_out() {
    let mut rig = Rig::new(2, ForwardLimits::default());
    for id in 0..20 {
        rig.ask(0, if id % 2 == 0 { "hot.example." } else { "HOT.example." }, id, None);
    }
    assert_eq!(rig.notes.n_sent, 1);
    assert!(rig.relay.take_suspicion(), "it may be a loop");
    rig.reply(1, 0, "hot.example.", "ok");
    assert_eq!(rig.notes.log.iter().filter(|line| line.contains("=NoError1")).count(), 20);
    // Each in its own case, and nothing is kept.
    assert_eq!(rig.notes.log.iter().filter(|line| line.contains("HOT.")).count(), 10);
    assert!(rig.relay.is_idle() && rig.relay.by_question.is_empty());
    assert_eq!(rig.notes.n_in_flight, 0);
    rig.ask(2, "hot.example.", 1, None);
    assert_eq!(rig.notes.n_sent, 2);
}

#[test]
fn one_client_takes_no_more_than_its_share() {
    let limits = ForwardLimits { max_waiting: 16, ..ForwardLimits::default() };
    let mut rig = Rig::new(1, limits);
    let greedy = Some(1);
    let modest = Some(2);
    rig.ask(0, "good.", 1, modest);
    for id in 0..100 {
        rig.ask(1 + u64::from(id), &format!("n{id}."), id, greedy);
    }
    let busy = |rig: &Rig| rig.notes.log.iter().filter(|line| line.contains("Busy")).count();
    assert_eq!(busy(&rig), 96);
    assert!(rig.notes.log.contains(&"n0.=Busy".to_owned()), "the oldest goes first");
    // The host has all that others leave, and makes room for them itself.
    for id in 0..100 {
        rig.ask(200 + u64::from(id), &format!("h{id}."), id, None);
    }
    assert_eq!(rig.relay.n_waiting, 16);
    rig.ask(400, "more.", 2, modest);
    rig.reply(401, 0, "good.", "ok");
    rig.reply(401, 0, "more.", "ok");
    assert_eq!(rig.notes.log[rig.notes.log.len() - 2..], ["good.=NoError1", "more.=NoError1"]);
    // And the places are all given back.
    rig.end(401);
    assert_eq!(rig.relay.slots.len(), rig.relay.free.len());
}

#[test]
fn a_host_whose_names_hang_goes_on_with_those_that_do_not() {
    let mut rig = Rig::new(1, ForwardLimits { max_waiting: 64, ..ForwardLimits::default() });
    let mut n_answered = 0;
    for ms in 0..2000u64 {
        let now = rig.at(ms);
        rig.relay.expire(now, &mut rig.notes);
        rig.ask(ms, &format!("hangs{ms}."), 1, None);
        if ms % 10 == 0 {
            rig.ask(ms, &format!("good{ms}."), 2, None);
        }
        if ms % 10 == 5 {
            let before = rig.notes.log.len();
            rig.reply(ms, 0, &format!("good{}.", ms - 5), "ok");
            n_answered += rig.notes.log.len() - before;
        }
    }
    assert_eq!(n_answered, 200);
}

#[test]
fn guesses_find_another_port_or_none_at_all() {
    let mut rig = Rig::new(1, ForwardLimits::default());
    rig.ask(0, "a.", 1, None);
    let (mut seen, mut port) = (vec![0], 0);
    for guess in 0..12u8 {
        let now = rig.at(1);
        rig.relay.receive(port, &[guess, guess, 0x80], now, &mut rig.notes);
        port = rig.notes.sent[&("a.".to_owned(), 0)].0;
        seen.extend((!seen.contains(&port)).then_some(port));
    }
    assert_eq!(seen.len(), 1 + usize::from(MAX_MOVES));
    assert_eq!(rig.notes.log.last().unwrap(), "a.=TC");
    assert!(rig.relay.is_idle() && rig.relay.flights.is_empty());
    assert_eq!(rig.notes.n_in_flight, 0);

    // The right id with another question is a guess as well; the late answer of an upstream isn't.
    let mut rig = Rig::new(2, ForwardLimits::default());
    rig.ask(0, "a.", 1, None);
    let bytes = [0, 7, 0x80, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, b'b', 0, 0, 1, 0, 1];
    let now = rig.at(1);
    rig.relay.receive(0, &bytes, now, &mut rig.notes);
    assert_eq!(rig.notes.n_mismatches, 1);
    let now = rig.at(400);
    rig.relay.expire(now, &mut rig.notes);
    rig.reply(401, 1, "a.", "ok");
    rig.reply(402, 0, "a.", "ok");
    assert_eq!(rig.notes.n_mismatches, 1);
    rig.reply(403, 0, "a.", "ok");
    assert_eq!(rig.notes.n_mismatches, 2, "twice is once too often");
}

#[test]
fn what_is_forwarded_of_our_own_zone_is_soon_asked_again() {
    for (is_in_zone, expected) in [(false, 9), (true, 3)] {
        let mut rig = Rig::new(1, ForwardLimits::default());
        let UpstreamRoute { domain, upstreams, .. } = UpstreamRoute::clone(&rig.route);
        rig.route = Arc::new(UpstreamRoute { domain, is_in_zone, upstreams });
        rig.relay = Relay::new(ForwardLimits::default(), Arc::default(), (3, 5), 0);
        rig.ask(0, "web.service.", 1, None);
        rig.reply(1, 0, "web.service.", "ok");
        let answer = Message::from_vec(&rig.relay.out).unwrap();
        assert_eq!(answer.answers[0].ttl, expected, "{is_in_zone}");
    }
}

#[test]
fn no_resolver_denies_what_may_be_a_service() {
    for (what, expected) in [("nx", "new.=ServFail"), ("ok", "new.=NoError1")] {
        let mut rig = Rig::new(1, ForwardLimits::default());
        let mut message = Message::query();
        message.add_query(Query::query(Name::from_ascii("new.").unwrap(), RecordType::A));
        let bytes = message.to_vec().unwrap();
        let query = ClientQuery::read(&bytes).unwrap();
        let client = SocketAddr::from(([127, 0, 0, 1], 1));
        let waiter = Waiter::new(client, LocalAddress::Bound, None, &query, rig.start);
        let waiter = Waiter { is_unknown: true, ..waiter };
        rig.relay.ask(&query, &rig.route, waiter, rig.start, &mut rig.notes);
        rig.reply(1, 0, "new.", what);
        assert_eq!(rig.notes.log[1..], [expected]);
    }
}
