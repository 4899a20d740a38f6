//! What the zone says to a question: from the question and the table to the answer, without I/O.

use hickory_proto::op::{LowerQuery, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{NS, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

use super::suffix::Suffix;
use crate::table::Table;

/// How long others may remember that something does not exist, in seconds: short, so that a
/// service that comes up is found soon after somebody asked for it too early.
const NEGATIVE_TTL: u32 = 5;

/// The zone that is ours.
#[derive(Clone, Debug)]
pub(super) struct Zone {
    domain: Suffix,
    ttl: u32,
}

/// A question, as far as it decides what becomes of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked<'a> {
    pub(super) op_code: OpCode,
    /// The version of EDNS that the asker speaks; 0 without EDNS.
    pub(super) edns_version: u8,
    pub(super) questions: &'a [LowerQuery],
}

/// What the zone knows at this moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known<'a> {
    pub(super) table: &'a Table,
    /// Whether dials to VIPs are translated now.
    pub(super) attached: bool,
}

/// What becomes of a question.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Verdict<'a> {
    /// This is the answer.
    Answer(Answer),
    /// It is another resolver's to answer.
    Forward(&'a Query),
}

/// An answer, but for what the message around it carries.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Answer {
    pub(super) code: ResponseCode,
    pub(super) authoritative: bool,
    pub(super) answers: Vec<Record>,
    pub(super) authorities: Vec<Record>,
}

impl Answer {
    /// A refusal: a code, and nothing that anybody may take for the zone's content.
    pub(super) fn error(code: ResponseCode) -> Answer {
        Answer { code, authoritative: false, answers: Vec::new(), authorities: Vec::new() }
    }

    fn records(answers: Vec<Record>) -> Answer {
        let code = ResponseCode::NoError;
        Answer { code, authoritative: true, answers, authorities: Vec::new() }
    }

    /// There is nothing of that kind, or nothing at all; the SOA says for how long to believe it.
    fn nothing(code: ResponseCode, soa: Record) -> Answer {
        Answer { code, authoritative: true, answers: Vec::new(), authorities: vec![soa] }
    }
}

impl Zone {
    /// The zone `domain`, whose addresses may be kept for `ttl` seconds.
    pub(super) fn new(domain: &str, ttl: u32) -> Zone {
        Zone { domain: Suffix::new(domain), ttl }
    }

    /// The service, in lower case, that a question is about; there may be none of that name.
    pub(super) fn service_asked(&self, asked: &Asked<'_>) -> Option<String> {
        let [question] = asked.questions else { return None };
        let name = &question.original().name;
        let label = name.iter().next().filter(|_| self.domain.depth_of(name) == Some(1))?;
        Some(std::str::from_utf8(label).ok()?.to_ascii_lowercase())
    }

    /// Decides what becomes of a question.
    pub(super) fn judge<'a>(&self, asked: Asked<'a>, known: Known<'_>) -> Verdict<'a> {
        let error = |code| Verdict::Answer(Answer::error(code));
        if asked.op_code != OpCode::Query {
            return error(ResponseCode::NotImp);
        }
        if asked.edns_version != 0 {
            return error(ResponseCode::BADVERS);
        }
        let [question] = asked.questions else {
            return error(ResponseCode::FormErr);
        };
        let question = question.original();
        // Other classes have other trees of names, of which we know none; a transfer is more than
        // one message, and nobody's to have here.
        if question.query_class != DNSClass::IN
            || matches!(question.query_type, RecordType::AXFR | RecordType::IXFR)
        {
            return error(ResponseCode::Refused);
        }

        let Some(depth) = self.domain.depth_of(&question.name) else {
            return Verdict::Forward(question);
        };
        if !known.table.is_synced() || !known.attached {
            // Never NXDOMAIN: others would remember it.
            return error(ResponseCode::ServFail);
        }
        Verdict::Answer(match depth {
            0 => self.apex(question, known.table),
            1 => self.service(question, known.table),
            _ => Answer::nothing(ResponseCode::NXDomain, self.soa(question, known.table)),
        })
    }

    fn service(&self, question: &Query, table: &Table) -> Answer {
        let label = question.name.iter().next().unwrap_or_default().to_ascii_lowercase();
        let service = std::str::from_utf8(&label).ok().and_then(|name| table.services.get(name));
        let Some(service) = service else {
            return Answer::nothing(ResponseCode::NXDomain, self.soa(question, table));
        };
        // Also while no backend is healthy: "no such name" would outlive the outage in caches.
        let a = RData::A(service.vip.into());
        let aaaa = service.vip6.map(|vip6| RData::AAAA(vip6.into()));
        let is_asked = |record: &RData| {
            question.query_type == RecordType::ANY || question.query_type == record.record_type()
        };
        let answers: Vec<Record> = std::iter::once(a)
            .chain(aaaa)
            .filter(is_asked)
            .map(|vip| Record::from_rdata(question.name.clone(), self.ttl, vip))
            .collect();
        if answers.is_empty() {
            return Answer::nothing(ResponseCode::NoError, self.soa(question, table));
        }
        Answer::records(answers)
    }

    fn apex(&self, question: &Query, table: &Table) -> Answer {
        match question.query_type {
            RecordType::SOA | RecordType::ANY => Answer::records(vec![self.soa(question, table)]),
            RecordType::NS => {
                let apex = question.name.clone();
                let ns = RData::NS(NS(apex.clone()));
                Answer::records(vec![Record::from_rdata(apex, self.ttl, ns)])
            }
            _ => Answer::nothing(ResponseCode::NoError, self.soa(question, table)),
        }
    }

    /// The zone's SOA, with the names that RFC 6303, section 3, gives to a zone that nobody else
    /// serves: the zone is its own primary, and nobody is responsible.
    fn soa(&self, question: &Query, table: &Table) -> Record {
        let apex = question.name.trim_to(self.domain.n_labels());
        let nobody = Name::from_labels(["nobody", "invalid"]).unwrap_or_else(|_| Name::root());
        let serial = table.generation as u32; // RFC 1982: a serial wraps
        let soa = SOA::new(apex.clone(), nobody, serial, 3600, 1200, 604_800, NEGATIVE_TTL);
        Record::from_rdata(apex, NEGATIVE_TTL, RData::SOA(soa))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use super::*;
    use crate::table::{Ports, Protocols, Service};

    /// The records of a section, written `NAME TTL TYPE [DATA]`; of a SOA the serial alone.
    fn show(records: &[Record]) -> String {
        let show = |record: &Record| {
            let data = match &record.data {
                RData::SOA(soa) => format!("{} {} {}", soa.mname, soa.serial, soa.minimum),
                data => data.to_string(),
            };
            format!("{} {} {} {data}", record.name, record.ttl, record.record_type())
        };
        records.iter().map(show).collect::<Vec<_>>().join(", ")
    }

    fn table(generation: u64) -> Table {
        let service = |name: &str, vip: [u8; 4], vip6: Option<&str>| {
            let name: Arc<str> = name.into();
            let service = Service {
                name: name.clone(),
                vip: vip.into(),
                vip6: vip6.map(|vip6| vip6.parse().unwrap()),
                ports: Ports::only([80]),
                protocols: Protocols::Tcp,
                pin: None,
                backends: Vec::new(), // none is healthy: the name stands all the same
                excluded: Vec::new(),
                notes: Vec::new(),
                watch: Default::default(),
                generation,
            };
            (name, Arc::new(service))
        };
        let services = BTreeMap::from([
            service("web", [127, 128, 0, 1], None),
            service("a-1", [127, 128, 0, 2], None),
            service("six", [127, 128, 0, 3], Some("fd00::3")),
        ]);
        Table { generation, services, rejected: BTreeMap::new() }
    }

    fn question(name: &str, query_type: RecordType) -> LowerQuery {
        LowerQuery::query(Query::query(Name::from_ascii(name).unwrap(), query_type))
    }

    fn judge(zone: &Zone, question: &LowerQuery, table: &Table, attached: bool) -> String {
        let questions = std::slice::from_ref(question);
        let asked = Asked { op_code: OpCode::Query, edns_version: 0, questions };
        match zone.judge(asked, Known { table, attached }) {
            Verdict::Forward(_) => "forward".into(),
            Verdict::Answer(Answer { code, authoritative, answers, authorities }) => {
                let aa = if authoritative { " aa" } else { "" };
                format!("{code:?}{aa} [{}] [{}]", show(&answers), show(&authorities))
            }
        }
    }

    const NODATA: &str = "NoError aa [] [service. 5 SOA service. 7 5]";
    const NXDOMAIN: &str = "NXDomain aa [] [service. 5 SOA service. 7 5]";
    const SERVFAIL: &str = "ServFail [] []";

    #[test]
    fn the_zone_service() {
        use RecordType::*;
        let web = "NoError aa [web.service. 30 A 127.128.0.1] []";
        let rows = [
            // a service
            ("web.service.", A, web),
            ("a-1.service.", A, "NoError aa [a-1.service. 30 A 127.128.0.2] []"),
            ("WeB.SerVice.", A, "NoError aa [WeB.SerVice. 30 A 127.128.0.1] []"),
            ("web.service.", ANY, web),
            ("web.service.", AAAA, NODATA),
            ("web.service.", HTTPS, NODATA),
            ("web.service.", SVCB, NODATA),
            ("web.service.", MX, NODATA),
            ("web.service.", TXT, NODATA),
            ("web.service.", SRV, NODATA),
            ("web.service.", SOA, NODATA),
            ("web.service.", Unknown(65_280), NODATA),
            ("web.SERVICE.", AAAA, "NoError aa [] [SERVICE. 5 SOA SERVICE. 7 5]"),
            // a service with an address of each family
            ("six.service.", A, "NoError aa [six.service. 30 A 127.128.0.3] []"),
            ("six.service.", AAAA, "NoError aa [six.service. 30 AAAA fd00::3] []"),
            (
                "six.service.",
                ANY,
                "NoError aa [six.service. 30 A 127.128.0.3, six.service. 30 AAAA fd00::3] []",
            ),
            ("six.service.", HTTPS, NODATA),
            // no service
            ("wbe.service.", A, NXDOMAIN),
            ("wbe.service.", AAAA, NXDOMAIN),
            ("foo.web.service.", A, NXDOMAIN),
            ("a.b.c.service.", ANY, NXDOMAIN),
            ("_web._tcp.service.", SRV, NXDOMAIN),
            ("*.service.", A, NXDOMAIN),
            ("a\\.b.service.", A, NXDOMAIN),
            // the apex
            ("service.", SOA, "NoError aa [service. 5 SOA service. 7 5] []"),
            ("service.", NS, "NoError aa [service. 30 NS service.] []"),
            ("service.", ANY, "NoError aa [service. 5 SOA service. 7 5] []"),
            ("service.", A, NODATA),
            ("service.", DS, NODATA),
            // a transfer
            ("service.", AXFR, "Refused [] []"),
            ("example.com.", IXFR, "Refused [] []"),
            // not ours
            ("example.com.", A, "forward"),
            ("web.service.consul.", A, "forward"),
            ("webservice.", A, "forward"),
            ("web.", A, "forward"),
            ("localhost.", A, "forward"),
            (".", NS, "forward"),
        ];
        let (zone, table) = (Zone::new("service", 30), table(7));
        for (name, query_type, expected) in rows {
            let question = question(name, query_type);
            assert_eq!(judge(&zone, &question, &table, true), expected, "{name} {query_type}");
        }

        let bytes = Name::from_labels([&b"\xff\xfe\0"[..], b"service"]).unwrap();
        let question = LowerQuery::query(Query::query(bytes, A));
        assert_eq!(judge(&zone, &question, &table, true), NXDOMAIN);
    }

    #[test]
    fn a_zone_of_several_labels() {
        let nxdomain = "NXDomain aa [] [lb.corp. 5 SOA lb.corp. 7 5]";
        let rows = [
            ("web.lb.corp.", "NoError aa [web.lb.corp. 0 A 127.128.0.1] []"),
            ("x.web.lb.corp.", nxdomain),
            ("lb.corp.", "NoError aa [] [lb.corp. 5 SOA lb.corp. 7 5]"),
            ("corp.", "forward"),
            ("web.service.", "forward"),
        ];
        let (zone, table) = (Zone::new("lb.corp", 0), table(7));
        for (name, expected) in rows {
            let question = question(name, RecordType::A);
            assert_eq!(judge(&zone, &question, &table, true), expected, "{name}");
        }
    }

    #[test]
    fn the_zone_fails_until_it_can_be_relied_on() {
        let rows = [
            ("web.service.", 0, true, SERVFAIL),
            ("wbe.service.", 0, true, SERVFAIL),
            ("service.", 0, true, SERVFAIL),
            ("web.service.", 7, false, SERVFAIL),
            ("a.wbe.service.", 7, false, SERVFAIL),
            ("service.", 7, false, SERVFAIL),
            ("example.com.", 0, false, "forward"),
            ("web.service.", 7, true, "NoError aa [web.service. 30 A 127.128.0.1] []"),
        ];
        let zone = Zone::new("service", 30);
        for (name, generation, attached, expected) in rows {
            let question = question(name, RecordType::A);
            let judged = judge(&zone, &question, &table(generation), attached);
            assert_eq!(judged, expected, "{name} at {generation}, attached: {attached}");
        }
    }

    #[test]
    fn questions_that_are_no_questions() {
        let web = question("web.service.", RecordType::A);
        let far = question("example.com.", RecordType::A);
        let chaos = |name| {
            let mut query = Query::query(Name::from_ascii(name).unwrap(), RecordType::TXT);
            query.query_class = DNSClass::CH;
            LowerQuery::query(query)
        };
        let rows = [
            (OpCode::Status, 0, vec![web.clone()], ResponseCode::NotImp),
            (OpCode::Update, 0, vec![web.clone()], ResponseCode::NotImp),
            (OpCode::Notify, 0, vec![far.clone()], ResponseCode::NotImp),
            (OpCode::Query, 1, vec![web.clone()], ResponseCode::BADVERS),
            (OpCode::Query, 255, vec![far.clone()], ResponseCode::BADVERS),
            (OpCode::Query, 0, vec![], ResponseCode::FormErr),
            (OpCode::Query, 0, vec![web.clone(), far], ResponseCode::FormErr),
            (OpCode::Query, 0, vec![chaos("web.service.")], ResponseCode::Refused),
            (OpCode::Query, 0, vec![chaos("version.bind.")], ResponseCode::Refused),
        ];
        let (zone, table) = (Zone::new("service", 30), table(7));
        for (op_code, edns_version, questions, expected) in rows {
            let asked = Asked { op_code, edns_version, questions: &questions };
            let judged = zone.judge(asked, Known { table: &table, attached: true });
            assert_eq!(judged, Verdict::Answer(Answer::error(expected)), "{asked:?}");
        }
    }
}
