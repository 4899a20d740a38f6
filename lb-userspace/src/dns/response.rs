//! The response of an upstream. Only what belongs to one hop is parsed and changed: its records may
//! be of types that this program can't decode.

use std::borrow::Cow;

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::serialize::binary::DecodeError;

use super::encode::{OUR_PAYLOAD, put_opt};
use super::message::{
    AD, AD_AND_CD, ClientEcho, HEADER_LEN, MessageCursor, OPT_PAYLOAD, OptRecord, Question, RD,
    bound_ttls, is_same_question,
};

/// In the third byte of a header.
const AA: u8 = 0x04;
const TC: u8 = 0x02;
const QR: u8 = 0x80;
const OP_CODE: u8 = 0x78;

/// In the fourth.
const RA: u8 = 0x80;
const CODE: u8 = 0x0f;

/// Response codes, in those bits.
const NO_ERROR: u8 = 0;
const SERV_FAIL: u8 = 2;
const NX_DOMAIN: u8 = 3;

/// A type of record.
const NS: u16 = 2;

/// Where an OPT record has the upper bits of the response code.
const OPT_CODE: usize = 5;

/// Why a message is not the response to a query.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ResponseError {
    #[error("the answer can't be read: it ends within a record, or has two OPT records")]
    Format,
    #[error("the answer has another id, or is none")]
    Id,
    #[error("the answer is to another question")]
    Question,
}

/// A response with a valid header, question and record lengths.
#[derive(Clone, Debug)]
pub(super) struct UpstreamResponse<'a> {
    /// Up to the end of the last record.
    bytes: Cow<'a, [u8]>,
    /// Where the question ends, or the header where there is none.
    head_len: usize,
    opt: Option<OptRecord>,
}

/// How a response is relayed to a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RelayOptions {
    /// The longest message that the client takes.
    pub(super) max_len: usize,
    /// Whether the AD bit is relayed.
    pub(super) keeps_ad: bool,
    /// The longest TTLs in seconds, of positive and of negative responses.
    pub(super) max_ttls: Option<(u32, u32)>,
}

impl<'a> UpstreamResponse<'a> {
    /// Reads the answer `bytes` to a question: name, type and class on the wire.
    ///
    /// # Errors
    /// When it is none, is to another question, or ends within a record without saying that it was
    /// cut off.
    pub(super) fn read(
        bytes: &'a [u8],
        question: &[u8],
    ) -> Result<UpstreamResponse<'a>, ResponseError> {
        let header: &[u8; HEADER_LEN] = bytes.first_chunk().ok_or(ResponseError::Id)?;
        if header[2] & QR == 0 {
            return Err(ResponseError::Id);
        }
        let count = |idx: usize| u16::from_be_bytes([header[idx], header[idx + 1]]);
        // An error may come without the question, from a server that couldn't read it.
        let may_omit = !matches!(header[3] & CODE, NO_ERROR | NX_DOMAIN);
        let head_len = match (count(4), Question::read(bytes)) {
            _ if header[2] & OP_CODE != 0 => return Err(ResponseError::Question),
            (1, Some(theirs)) if is_same_question(&bytes[HEADER_LEN..theirs.end()], question) => {
                theirs.end()
            }
            (0, _) if may_omit => HEADER_LEN,
            _ => return Err(ResponseError::Question),
        };
        let mut rest = MessageCursor { bytes, offset: head_len };
        match rest.opt(u32::from(count(6)) + u32::from(count(8)), count(10)) {
            Some(opt) => Ok(UpstreamResponse { bytes: bytes[..rest.offset].into(), head_len, opt }),
            // Cut off in the middle of a record, as some do: its header and question still count.
            None if header[2] & TC != 0 => {
                let mut head = bytes[..head_len].to_vec();
                head[6..HEADER_LEN].fill(0); // the numbers of records
                Ok(UpstreamResponse { bytes: head.into(), head_len, opt: None })
            }
            None => Err(ResponseError::Format),
        }
    }

    /// The same, on its own.
    pub(super) fn into_owned(self) -> UpstreamResponse<'static> {
        UpstreamResponse {
            bytes: self.bytes.into_owned().into(),
            head_len: self.head_len,
            opt: self.opt,
        }
    }

    /// Its response code.
    pub(super) fn code(&self) -> ResponseCode {
        ResponseCode::from(self.code_high(), self.bytes[3] & CODE)
    }

    /// Whether it is truncated (TC).
    pub(super) fn is_truncated(&self) -> bool {
        self.bytes[2] & TC != 0
    }

    /// Whether the upstream can't or won't answer: by its code, or by a referral to other servers
    /// (RFC 1034, section 4.3.2) from one that doesn't recurse. Our queries are well-formed, so FORMERR
    /// is a failure of the upstream's, too.
    pub(super) fn is_failure(&self) -> bool {
        match self.code() {
            ResponseCode::NoError => self.is_referral(),
            ResponseCode::NXDomain | ResponseCode::YXDomain => false,
            _ => true,
        }
    }

    /// Whether it only names other servers (RFC 2308, section 2.2): an empty answer with SOA, or without
    /// records, is no data, also by a server that doesn't recurse for us.
    fn is_referral(&self) -> bool {
        let first = MessageCursor { bytes: &self.bytes, offset: self.head_len };
        self.is_empty()
            && self.bytes[2] & AA == 0
            && self.bytes[3] & RA == 0
            && first.kind() == Some(NS)
    }

    /// Whether it is negative: NXDOMAIN or no data.
    pub(super) fn is_negative(&self) -> bool {
        match self.code() {
            ResponseCode::NXDomain => true,
            ResponseCode::NoError => self.is_empty(),
            _ => false,
        }
    }

    /// Whether it has no answer, and isn't truncated.
    fn is_empty(&self) -> bool {
        self.bytes[6..8] == [0, 0] && !self.is_truncated()
    }

    /// All of it, decoded.
    ///
    /// # Errors
    /// When a record can't be decoded.
    pub(super) fn message(&self) -> Result<Message, DecodeError> {
        Message::from_vec(&self.bytes)
    }

    /// Writes the response for the client: the same, except what belongs to one hop, and truncated
    /// if it is longer than the client takes.
    pub(super) fn relay_to(&self, client: &ClientEcho<'_>, how: RelayOptions, out: &mut Vec<u8>) {
        out.clear();
        let [id_high, id_low] = client.id.to_be_bytes();
        let (mut flags, mut code) = (self.bytes[2] & (AA | TC), self.bytes[3] & CODE);
        out.extend([id_high, id_low, 0, 0, 0, 1]);
        out.extend_from_slice(&self.bytes[6..HEADER_LEN]);
        out.extend_from_slice(client.question); // in the client's case
        let head_len = out.len();
        let has_question = self.head_len == head_len;
        match (&self.opt, client.has_edns) {
            // A code alone: without the question, names in records would point astray.
            _ if !has_question => out[6..HEADER_LEN].fill(0),
            (Some(opt), false) => {
                // What comes behind it goes too: names there might point past it.
                out.extend_from_slice(&self.bytes[head_len..opt.begin]);
                out[10..HEADER_LEN].copy_from_slice(&opt.n_before.to_be_bytes());
            }
            _ => out.extend_from_slice(&self.bytes[head_len..]),
        }
        match (&self.opt, client.has_edns) {
            (Some(_), false) if self.code_high() > 0 => code = SERV_FAIL,
            (Some(opt), true) if has_question => {
                out[opt.begin + OPT_PAYLOAD..][..2].copy_from_slice(&OUR_PAYLOAD.to_be_bytes());
            }
            _ => {}
        }
        if let Some((max_ttl, max_negative_ttl)) = how.max_ttls {
            let bounded = bound_ttls(out, client.question.len(), max_ttl, max_negative_ttl);
            debug_assert!(bounded.is_some(), "it was read before");
        }
        if out.len() > how.max_len {
            out.truncate(head_len);
            out[6..HEADER_LEN].fill(0);
            flags |= TC;
            // Options, too, may be longer than what fits.
            if let (Some(opt), true) = (&self.opt, client.has_edns) {
                put_opt(out, self.code_high(), opt.edns.dnssec_ok);
                out[HEADER_LEN - 1] = 1;
            }
        }
        let ad = if how.keeps_ad { 0 } else { AD };
        out[2] = QR | flags | if client.recursion_desired { RD } else { 0 };
        out[3] = RA | self.bytes[3] & AD_AND_CD & !ad | code;
    }

    /// The upper bits of the response code, which only EDNS can carry.
    fn code_high(&self) -> u8 {
        self.opt.as_ref().map_or(0, |opt| self.bytes[opt.begin + OPT_CODE])
    }
}

#[cfg(test)]
mod tests {
    use super::super::message::ClientQuery;
    use super::*;

    fn relay_to(
        received: &UpstreamResponse<'_>,
        query: &ClientQuery<'_>,
        max_len: usize,
    ) -> Vec<u8> {
        let mut out = Vec::new();
        let how = RelayOptions { max_len, keeps_ad: true, max_ttls: None };
        received.relay_to(&query.client(), how, &mut out);
        out
    }

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
            let received = UpstreamResponse::read(&theirs, question).unwrap();
            for (client, expected_records) in [(CLIENT_OPT, 1), (&[], 0)] {
                let query =
                    message([1, 0], [1, 0, 0, !client.is_empty() as u8], &[question, client]);
                let query = ClientQuery::read(&query).unwrap();
                let passed = relay_to(&received, &query, 1232);
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
                assert!(UpstreamResponse::read(&passed, question).is_ok(), "{what}");
            }
        }
    }

    #[test]
    fn what_belongs_to_one_hop_is_the_clients() {
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
            let query = asks(edns);
            let received = UpstreamResponse::read(&theirs, question).unwrap();
            let passed = relay_to(&received, &ClientQuery::read(&query).unwrap(), max_len);
            assert_eq!(passed[2..HEADER_LEN], expected, "{what}");
            assert!(passed.len() <= max_len && passed[HEADER_LEN..].starts_with(shouted), "{what}");
            assert!(UpstreamResponse::read(&passed, question).is_ok(), "{what}");
        }
    }

    #[test]
    fn the_word_that_data_is_authentic_is_cleared() {
        let question: &[u8] = &[NAME, &[0, 1, 0, 1]].concat();
        let theirs = message([0x81, 0xb0], [1, 0, 0, 0], &[question]);
        let received = UpstreamResponse::read(&theirs, question).unwrap();
        let query = message([1, 0x30], [1, 0, 0, 0], &[question]);
        let client = ClientQuery::read(&query).unwrap().client();
        let mut out = Vec::new();
        for (keeps_ad, expected) in [(true, 0xb0), (false, 0x90)] {
            received.relay_to(
                &client,
                RelayOptions { max_len: 512, keeps_ad, max_ttls: None },
                &mut out,
            );
            assert_eq!(out[3], expected, "{keeps_ad}");
        }
    }

    #[test]
    fn answers_are_checked() {
        let question = |name: &[u8], kind: u8| [name, &[0, kind, 0, 1]].concat();
        let query = question(b"\x07Example\x03com\x00", 1);
        let answer = |questions: &[&[u8]], code: u8| {
            message([0x81, code], [questions.len() as u8, 0, 0, 0], questions)
        };
        let good = answer(&[&query], 0);
        let with = |idx: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[idx] = byte;
            bytes
        };
        let other_name = question(b"\x07example\x03org\x00", 1);
        // Types that differ as letters do in case.
        let (upper, lower) = (question(NAME, b'A'), question(NAME, b'a'));
        let table = [
            ("good", &query, good.clone(), Ok(())),
            ("another case", &query, answer(&[&question(NAME, 1)], 0), Ok(())),
            ("no response", &query, with(2, 0), Err(ResponseError::Id)),
            ("another opcode", &query, with(2, 0x80 | 5 << 3), Err(ResponseError::Question)),
            ("another name", &query, answer(&[&other_name], 0), Err(ResponseError::Question)),
            (
                "another type",
                &query,
                answer(&[&question(NAME, 28)], 0),
                Err(ResponseError::Question),
            ),
            ("a type in another case", &upper, answer(&[&lower], 0), Err(ResponseError::Question)),
            ("two questions", &query, answer(&[&query, &query], 0), Err(ResponseError::Question)),
            ("no question", &query, answer(&[], 3), Err(ResponseError::Question)),
            ("an error alone", &query, answer(&[], 1), Ok(())),
            ("records missing", &query, with(7, 3), Err(ResponseError::Format)),
            ("nothing", &query, Vec::new(), Err(ResponseError::Id)),
            ("half a header", &query, good[..6].to_vec(), Err(ResponseError::Id)),
        ];
        for (what, query, bytes, expected) in table {
            assert_eq!(UpstreamResponse::read(&bytes, query).map(drop), expected, "{what}");
        }

        let mut cut_off = with(7, 3);
        cut_off[2] |= TC;
        let received = UpstreamResponse::read(&cut_off, &query).unwrap();
        assert!(received.is_truncated() && received.message().unwrap().answers.is_empty());
        assert!(!received.is_negative());
    }
}
