//! An answer as it goes over the wire, written into a buffer that is used again and again.

use hickory_proto::op::ResponseCode;

use super::message::{ClientQuery, HEADER_LEN, MalformedQuery};
use super::sockets::Transport;

/// The size of UDP messages that we advertise: that of the DNS flag day of 2020, which passes
/// nearly every network unfragmented.
pub(super) const OUR_PAYLOAD: u16 = 1232;

/// The longest response to `query`. Over UDP it isn't longer than what we advertise ourselves, whatever
/// the client allows: a longer one would be fragmented, and all fragments but the first can be forged
/// without knowing port and id; and it would amplify queries with a forged source.
pub(super) fn max_len(query: &ClientQuery<'_>, transport: Transport) -> usize {
    match transport {
        Transport::Udp => query.max_payload().min(OUR_PAYLOAD).into(),
        Transport::Tcp => u16::MAX.into(),
    }
}

/// An OPT record without options.
const OPT_LEN: usize = 11;

/// A reference to the question's name, which every answer repeats there.
pub(super) const QUESTION: u16 = HEADER_LEN as u16;

/// The sections after the question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Section {
    Answer,
    Authority,
    Additional,
}

/// An answer that is being written, section by section.
#[derive(Debug)]
pub(super) struct ResponseWriter<'a> {
    out: &'a mut Vec<u8>,
    query: &'a ClientQuery<'a>,
    counts: [u16; 3],
    /// Where the additional records begin, once there is one.
    additionals: Option<usize>,
}

impl<'a> ResponseWriter<'a> {
    /// Begins an answer to `query` in `out`, with the question as it was asked.
    pub(super) fn new(out: &'a mut Vec<u8>, query: &'a ClientQuery<'a>) -> ResponseWriter<'a> {
        out.clear();
        out.extend_from_slice(query.head());
        ResponseWriter { out, query, counts: [0; 3], additionals: None }
    }

    /// Adds a record of class IN for the name at `owner` in the message; `data` in pieces. Returns
    /// where its data begins.
    pub(super) fn record(
        &mut self,
        section: Section,
        owner: u16,
        record_type: u16,
        ttl: u32,
        data: &[&[u8]],
    ) -> u16 {
        if section == Section::Additional {
            self.additionals.get_or_insert(self.out.len());
        }
        let len: usize = data.iter().map(|piece| piece.len()).sum();
        self.out.extend((0xc000 | owner).to_be_bytes());
        self.out.extend(record_type.to_be_bytes());
        self.out.extend([0, 1]);
        self.out.extend(ttl.to_be_bytes());
        self.out.extend((len as u16).to_be_bytes()); // of two names at most
        let begin = self.out.len();
        for piece in data {
            self.out.extend_from_slice(piece);
        }
        self.counts[section as usize] += 1;
        begin as u16
    }

    /// Completes the response within `max_len` bytes: without the additional records if it would be
    /// longer, and without any record but with TC if that isn't enough, so that the client retries
    /// over TCP.
    pub(super) fn finish(mut self, code: ResponseCode, authoritative: bool, max_len: usize) {
        let opt_len = if self.query.edns.is_some() { OPT_LEN } else { 0 };
        let mut truncated = false;
        if self.out.len() + opt_len > max_len
            && let Some(begin) = self.additionals
        {
            self.out.truncate(begin);
            self.counts[Section::Additional as usize] = 0;
        }
        if self.out.len() + opt_len > max_len {
            self.out.truncate(self.query.head().len());
            self.counts = [0; 3];
            truncated = true;
        }
        if let Some(edns) = self.query.edns {
            put_opt(self.out, (u16::from(code) >> 4) as u8, edns.dnssec_ok);
            self.counts[Section::Additional as usize] += 1;
        }
        let aa = if authoritative { 0x04 } else { 0 };
        let tc = if truncated { 0x02 } else { 0 };
        put_header(self.out, code, aa | tc, 1, self.counts);
    }
}

/// Writes an answer that is a code alone, to `query`.
pub(super) fn error(
    out: &mut Vec<u8>,
    query: &ClientQuery<'_>,
    code: ResponseCode,
    max_len: usize,
) {
    ResponseWriter::new(out, query).finish(code, false, max_len);
}

/// Writes the response to a malformed query; `None` if the message isn't a query at all.
pub(super) fn to_malformed(
    out: &mut Vec<u8>,
    bytes: &[u8],
    why: MalformedQuery,
) -> Option<ResponseCode> {
    let code = match why {
        MalformedQuery::NoQuestion => return None,
        MalformedQuery::OpCode => ResponseCode::NotImp,
        MalformedQuery::Format => ResponseCode::FormErr,
    };
    out.clear();
    out.extend_from_slice(bytes.get(..HEADER_LEN)?);
    // A header alone: what came after it may be anything.
    put_header(out, code, 0, 0, [0; 3]);
    Some(code)
}

/// Adds an OPT record without options; `code_high` has the upper bits of the response code.
pub(super) fn put_opt(out: &mut Vec<u8>, code_high: u8, dnssec_ok: bool) {
    let [payload_high, payload_low] = OUR_PAYLOAD.to_be_bytes();
    let flags = if dnssec_ok { 0x80 } else { 0 };
    let opt: [u8; OPT_LEN] = [0, 0, 41, payload_high, payload_low, code_high, 0, flags, 0, 0, 0];
    out.extend(opt);
}

/// Makes the question's header, at the begin of `out`, that of the answer.
fn put_header(out: &mut [u8], code: ResponseCode, aa_tc: u8, n_questions: u8, counts: [u16; 3]) {
    const OP_CODE_AND_RD: u8 = 0x79;
    const QR: u8 = 0x80;
    const RA: u8 = 0x80;
    const CD: u8 = 0x10;
    out[2] = QR | (out[2] & OP_CODE_AND_RD) | aa_tc;
    out[3] = RA | (out[3] & CD) | (u16::from(code) as u8 & 0x0f);
    out[4..6].copy_from_slice(&[0, n_questions]);
    for (idx, count) in counts.into_iter().enumerate() {
        out[6 + 2 * idx..8 + 2 * idx].copy_from_slice(&count.to_be_bytes());
    }
}
