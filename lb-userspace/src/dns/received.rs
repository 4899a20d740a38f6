//! Another resolver's answer, as it came. Only what belongs to one hop is read and changed: the
//! records may be of kinds that nobody here can take apart, and that is no fault of theirs.

use std::sync::Arc;

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::serialize::binary::DecodeError;

use super::exchange::ExchangeError;
use super::message::{Asked, HEADER_LEN, OPT_PAYLOAD, Opt, Question, Rest};
use super::reply::{Code, OUR_PAYLOAD, put_opt};

/// In the third byte of a header.
const AA: u8 = 0x04;
const TC: u8 = 0x02;
const RD: u8 = 0x01;
const QR: u8 = 0x80;
const OP_CODE: u8 = 0x78;

/// In the fourth.
const RA: u8 = 0x80;
const AD_AND_CD: u8 = 0x30;
const CODE: u8 = 0x0f;

/// Where an OPT record has the upper bits of the response code.
const OPT_CODE: usize = 5;

/// An answer whose header, question and lengths are as they should be.
#[derive(Clone, Debug)]
pub(super) struct Received {
    /// Up to the end of the last record.
    bytes: Arc<[u8]>,
    /// Where the question ends, or the header where there is none.
    head_len: usize,
    opt: Option<Opt>,
}

impl Received {
    /// Reads the answer `bytes` to `question`.
    ///
    /// # Errors
    /// When it is none, is to another question, or ends within a record without saying that it was
    /// cut off.
    pub(super) fn read(bytes: &[u8], question: &Query) -> Result<Received, ExchangeError> {
        let header: &[u8; HEADER_LEN] = bytes.first_chunk().ok_or(ExchangeError::Id)?;
        if header[2] & QR == 0 {
            return Err(ExchangeError::Id);
        }
        let count = |idx: usize| u16::from_be_bytes([header[idx], header[idx + 1]]);
        // An error may come without the question, from a server that couldn't read it.
        let may_omit =
            ![Code::NoError, Code::NxDomain].map(|code| code as u8).contains(&(header[3] & CODE));
        let head_len = match (count(4), Question::read(bytes)) {
            _ if header[2] & OP_CODE != 0 => return Err(ExchangeError::Question),
            (1, Some(theirs)) if is_same(&theirs, question) => theirs.end(),
            (0, _) if may_omit => HEADER_LEN,
            _ => return Err(ExchangeError::Question),
        };
        let mut rest = Rest { bytes, offset: head_len };
        match rest.opt(u32::from(count(6)) + u32::from(count(8)), count(10)) {
            Some(opt) => Ok(Received { bytes: bytes[..rest.offset].into(), head_len, opt }),
            // Cut off in the middle of a record, as some do: its header and question still count.
            None if header[2] & TC != 0 => {
                let mut head = bytes[..head_len].to_vec();
                head[6..HEADER_LEN].fill(0); // the numbers of records
                Ok(Received { bytes: head.into(), head_len, opt: None })
            }
            None => Err(ExchangeError::Format),
        }
    }

    /// Its response code.
    pub(super) fn code(&self) -> ResponseCode {
        ResponseCode::from(self.code_high(), self.bytes[3] & CODE)
    }

    /// Whether there is more than what came.
    pub(super) fn is_truncated(&self) -> bool {
        self.bytes[2] & TC != 0
    }

    /// The whole of it, where it can be taken apart.
    ///
    /// # Errors
    /// When one of its records can't.
    pub(super) fn message(&self) -> Result<Message, DecodeError> {
        Message::from_vec(&self.bytes)
    }

    /// The message for the client who asked: the same, but for what belongs to one hop, and cut off
    /// where it is longer than `max_len`.
    pub(super) fn pass_on(&self, asked: &Asked<'_>, max_len: usize) -> Vec<u8> {
        let head = asked.head();
        let mut out = Vec::with_capacity(self.bytes.len());
        out.extend_from_slice(head); // with the client's id and case
        let (mut flags, mut code) = (self.bytes[2] & (AA | TC), self.bytes[3] & CODE);
        out[6..HEADER_LEN].copy_from_slice(&self.bytes[6..HEADER_LEN]);
        let has_question = self.head_len == head.len();
        match (&self.opt, asked.edns) {
            // A code alone: without the question, names in records would point astray.
            _ if !has_question => out[6..HEADER_LEN].fill(0),
            (Some(opt), None) => {
                // What comes behind it goes too: names there might point past it.
                out.extend_from_slice(&self.bytes[head.len()..opt.begin]);
                out[10..HEADER_LEN].copy_from_slice(&opt.n_before.to_be_bytes());
            }
            _ => out.extend_from_slice(&self.bytes[head.len()..]),
        }
        match (&self.opt, asked.edns) {
            (Some(_), None) if self.code_high() > 0 => code = Code::ServFail as u8,
            (Some(opt), Some(_)) if has_question => {
                out[opt.begin + OPT_PAYLOAD..][..2].copy_from_slice(&OUR_PAYLOAD.to_be_bytes());
            }
            _ => {}
        }
        if out.len() > max_len {
            out.truncate(head.len());
            out[6..HEADER_LEN].fill(0);
            flags |= TC;
            // Options, too, may be longer than what fits.
            if let (Some(opt), Some(_)) = (&self.opt, asked.edns) {
                put_opt(&mut out, self.code_high(), opt.edns.dnssec_ok);
                out[HEADER_LEN - 1] = 1;
            }
        }
        out[2] = QR | flags | head[2] & RD;
        out[3] = RA | self.bytes[3] & AD_AND_CD | code;
        out
    }

    /// The upper bits of the response code, which only EDNS can carry.
    fn code_high(&self) -> u8 {
        self.opt.as_ref().map_or(0, |opt| self.bytes[opt.begin + OPT_CODE])
    }
}

/// Whether a question is that which was asked; case doesn't count.
fn is_same(theirs: &Question<'_>, asked: &Query) -> bool {
    let mut labels = asked.name.iter().enumerate();
    asked.name.iter().count() == theirs.name.n_labels()
        && labels.all(|(idx, label)| {
            theirs.name.label(idx).is_some_and(|theirs| theirs.eq_ignore_ascii_case(label))
        })
        && theirs.query_type == u16::from(asked.query_type)
        && theirs.query_class == u16::from(asked.query_class)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::rr::{Name, RecordType};

    const NAME: &[u8] = b"\x07example\x03com\x00";
    const CLIENT_OPT: &[u8] = &[0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0];

    fn message(flags: [u8; 2], counts: [u8; 4], parts: &[&[u8]]) -> Vec<u8> {
        let [questions, answers, authorities, additionals] = counts;
        let header =
            [7, 7, flags[0], flags[1], 0, questions, 0, answers, 0, authorities, 0, additionals];
        [&header[..], &parts.concat()].concat()
    }

    #[test]
    fn records_that_nobody_here_can_read_go_through_as_they_came() {
        let query = Query::query(Name::from_ascii("example.com.").unwrap(), RecordType::NAPTR);
        let question: &[u8] = &[NAME, &[0, 35, 0, 1]].concat();
        let record = |kind: u8, data: &[u8]| {
            [&[0xc0, 12, 0, kind, 0, 1, 0, 0, 0, 9, 0, data.len() as u8], data].concat()
        };
        // With an option for a client's network (RFC 7871) of a family that there isn't.
        let ecs: &[u8] = &[0, 0, 41, 16, 0, 0, 0, 0x80, 0, 0, 8, 0, 8, 0, 4, 0, 0, 0, 0];
        let rows = [
            ("NAPTR with flags of several letters", record(35, b"\0\x01\0\x01\x03a-b\0\0\0")),
            ("SVCB with keys out of order", record(64, &[0, 1, 0, 0, 3, 0, 2, 0, 80, 0, 1, 0, 0])),
            ("CAA with a tag that is none", record(1, b"\0\x05is-ue")),
            ("A without data", record(1, b"")),
        ];
        for (what, record) in rows {
            let theirs = message([0x81, 0x80], [1, 1, 0, 1], &[question, &record, ecs]);
            let received = Received::read(&theirs, &query).unwrap();
            for (client, expected_records) in [(CLIENT_OPT, 1), (&[], 0)] {
                let asked =
                    message([1, 0], [1, 0, 0, !client.is_empty() as u8], &[question, client]);
                let asked = Asked::read(&asked).unwrap();
                let passed = received.pass_on(&asked, 1232);
                assert_eq!(passed[..4], [7, 7, 0x81, 0x80], "{what}");
                assert_eq!(
                    passed[4..HEADER_LEN],
                    [0, 1, 0, 1, 0, 0, 0, expected_records],
                    "{what}"
                );
                let expected = [question, &record].concat();
                assert!(passed[HEADER_LEN..].starts_with(&expected), "{what}");
                let opt_len = usize::from(expected_records) * ecs.len();
                assert_eq!(passed.len(), HEADER_LEN + expected.len() + opt_len, "{what}");
                if expected_records == 1 {
                    let at = passed.len() - ecs.len() + OPT_PAYLOAD;
                    assert_eq!(passed[at..at + 2], OUR_PAYLOAD.to_be_bytes(), "{what}");
                }
                assert!(Received::read(&passed, &query).is_ok(), "{what}");
            }
        }
    }

    #[test]
    fn what_belongs_to_one_hop_is_the_clients() {
        let query = Query::query(Name::from_ascii("example.com.").unwrap(), RecordType::A);
        let question: &[u8] = &[NAME, &[0, 1, 0, 1]].concat();
        let shouted: &[u8] = &[b"\x07EXAMPLE\x03com\x00", &[0, 1, 0, 1][..]].concat();
        let a: &[u8] = &[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 192, 0, 2, 7];
        let bad_cookie: &[u8] = &[0, 0, 41, 16, 0, 1, 0, 0, 0, 0, 0]; // code 16 + 7
        let asks =
            |edns: &[u8]| message([0, 0], [1, 0, 0, !edns.is_empty() as u8], &[shouted, edns]);
        type Row<'a> = (&'a str, Vec<u8>, &'a [u8], usize, [u8; 10]);
        let rows: [Row<'_>; 6] = [
            (
                "as it is",
                message([0x85, 0xb0], [1, 1, 0, 0], &[question, a]),
                b"",
                512,
                [0x84, 0xb0, 0, 1, 0, 1, 0, 0, 0, 0],
            ),
            (
                "too long",
                message([0x81, 0], [1, 1, 0, 0], &[question, a]),
                b"",
                40,
                [0x82, 0x80, 0, 1, 0, 0, 0, 0, 0, 0],
            ),
            (
                "too long with EDNS",
                message([0x81, 0], [1, 1, 0, 1], &[question, a, bad_cookie]),
                CLIENT_OPT,
                50,
                [0x82, 0x80, 0, 1, 0, 0, 0, 0, 0, 1],
            ),
            (
                "a code of EDNS",
                message([0x81, 7], [1, 0, 0, 1], &[question, bad_cookie]),
                b"",
                512,
                [0x80, 0x82, 0, 1, 0, 0, 0, 0, 0, 0],
            ),
            (
                "no question",
                message([0x81, 5], [0, 0, 0, 0], &[]),
                b"",
                512,
                [0x80, 0x85, 0, 1, 0, 0, 0, 0, 0, 0],
            ),
            (
                "cut within a record",
                message([0x83, 0], [1, 1, 0, 0], &[question, &a[..9]]),
                b"",
                512,
                [0x82, 0x80, 0, 1, 0, 0, 0, 0, 0, 0],
            ),
        ];
        for (what, theirs, edns, max_len, expected) in rows {
            let asked = asks(edns);
            let passed = Received::read(&theirs, &query)
                .unwrap()
                .pass_on(&Asked::read(&asked).unwrap(), max_len);
            assert_eq!(passed[2..HEADER_LEN], expected, "{what}");
            assert!(passed.len() <= max_len && passed[HEADER_LEN..].starts_with(shouted), "{what}");
            assert!(Received::read(&passed, &query).is_ok(), "{what}");
        }
    }
}
