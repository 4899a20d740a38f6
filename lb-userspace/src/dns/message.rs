//! A question as it comes over the wire (RFC 1035, section 4; EDNS: RFC 6891), read in place.

/// The length of a message's header.
pub(super) const HEADER_LEN: usize = 12;

/// The longest name, its lengths and the root's included.
const MAX_NAME_LEN: usize = 255;

/// The most labels that a name of that length has, the root not counted.
const MAX_LABELS: usize = 127;

/// The longest UDP message without EDNS (RFC 1035, section 4.2.1).
const PLAIN_PAYLOAD: u16 = 512;

/// A resource record's fixed part: its type, class, time to live and length.
const RECORD_LEN: usize = 10;

/// The type of EDNS's record.
const OPT: u16 = 41;

/// Recursion desired, in the third byte of a header.
pub(super) const RD: u8 = 0x01;

/// In the fourth: the data is authentic, checking is disabled (RFC 4035, section 3).
pub(super) const AD: u8 = 0x20;
pub(super) const AD_AND_CD: u8 = 0x30;

/// DNSSEC OK, in the eighth byte of an OPT record (RFC 3225).
const DO: u8 = 0x80;

/// The type of the record that begins a zone.
const SOA: u16 = 6;

/// Where an OPT record has the size of UDP messages: after the root's name and the type.
pub(super) const OPT_PAYLOAD: usize = 3;

/// Why a message is not a query that can be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MalformedQuery {
    /// It isn't a query: to answer it could mean to answer a response, in a loop.
    NoQuestion,
    /// Its opcode isn't QUERY.
    OpCode,
    /// It doesn't have exactly one question, or the records after it are malformed.
    Format,
}

/// A client's query, with one question.
#[derive(Clone, Copy, Debug)]
pub(super) struct ClientQuery<'a> {
    bytes: &'a [u8],
    pub(super) name: WireName<'a>,
    pub(super) query_type: u16,
    pub(super) query_class: u16,
    pub(super) edns: Option<EdnsInfo>,
}

/// The question of a message, at its place after the header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Question<'a> {
    pub(super) name: WireName<'a>,
    pub(super) query_type: u16,
    pub(super) query_class: u16,
}

impl<'a> Question<'a> {
    /// Reads the question that follows the header of the message `bytes`.
    pub(super) fn read(bytes: &'a [u8]) -> Option<Question<'a>> {
        let name = WireName::read(bytes.get(HEADER_LEN..)?)?;
        let mut rest = MessageCursor { bytes, offset: HEADER_LEN + name.bytes.len() };
        Some(Question { name, query_type: rest.u16()?, query_class: rest.u16()? })
    }

    /// Where it ends in the message.
    pub(super) fn end(&self) -> usize {
        HEADER_LEN + self.name.bytes.len() + 4
    }
}

/// The fields of a query that its response repeats.
#[derive(Clone, Copy, Debug)]
pub(super) struct ClientEcho<'a> {
    pub(super) id: u16,
    pub(super) recursion_desired: bool,
    /// In the client's case.
    pub(super) question: &'a [u8],
    pub(super) has_edns: bool,
}

/// The fields of an OPT record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct EdnsInfo {
    pub(super) version: u8,
    pub(super) dnssec_ok: bool,
    /// The size of UDP messages that it takes; at least 512.
    max_payload: u16,
}

/// An OPT record in its message.
#[derive(Clone, Copy, Debug)]
pub(super) struct OptRecord {
    pub(super) edns: EdnsInfo,
    /// Where it begins.
    pub(super) begin: usize,
    /// The additional records before it.
    pub(super) n_before: u16,
}

/// A name within a message, uncompressed, with the case that it was written in.
#[derive(Clone, Copy, Debug)]
pub(super) struct WireName<'a> {
    /// Each label after its length, down to the root's 0.
    bytes: &'a [u8],
    n_labels: usize,
    /// Where each label begins.
    begins: [u8; MAX_LABELS],
}

impl<'a> ClientQuery<'a> {
    /// Parses a message. It skips records other than OPT, options and trailing bytes.
    pub(super) fn read(bytes: &'a [u8]) -> Result<ClientQuery<'a>, MalformedQuery> {
        let header: &[u8; HEADER_LEN] = bytes.first_chunk().ok_or(MalformedQuery::NoQuestion)?;
        if header[2] & 0x80 != 0 {
            return Err(MalformedQuery::NoQuestion);
        }
        if header[2] & 0x78 != 0 {
            return Err(MalformedQuery::OpCode);
        }
        let count = |idx: usize| u16::from_be_bytes([header[idx], header[idx + 1]]);
        if count(4) != 1 {
            return Err(MalformedQuery::Format);
        }
        let question = Question::read(bytes).ok_or(MalformedQuery::NoQuestion)?;
        let Question { name, query_type, query_class } = question;
        let mut rest = MessageCursor { bytes, offset: question.end() };
        let n_others = u32::from(count(6)) + u32::from(count(8));
        let opt = rest.opt(n_others, count(10)).ok_or(MalformedQuery::Format)?;
        let edns = opt.map(|opt| opt.edns);
        Ok(ClientQuery { bytes, name, query_type, query_class, edns })
    }

    /// Writes the query that goes to other resolvers, with the id 0: the question, RD, AD, CD and
    /// DO. Everything else belongs to one hop: the size of answers, and options such as cookies
    /// (RFC 7873, section 5.2). A client without EDNS gets none by another's.
    pub(super) fn forwarded(&self, max_payload: u16, out: &mut Vec<u8>) {
        out.clear();
        let n_additionals = u8::from(self.edns.is_some());
        let [rd, ad_and_cd] = [self.bytes[2] & RD, self.bytes[3] & AD_AND_CD];
        out.extend([0, 0, rd, ad_and_cd, 0, 1, 0, 0, 0, 0, 0, n_additionals]);
        out.extend_from_slice(self.question());
        if let Some(edns) = self.edns {
            let [high, low] = max_payload.to_be_bytes();
            let dnssec_ok = if edns.dnssec_ok { DO } else { 0 };
            out.extend([0, 0, OPT as u8, high, low, 0, 0, dnssec_ok, 0, 0, 0]);
        }
    }

    /// The query without the records and options that no response depends on: at most 282 bytes.
    pub(super) fn essentials(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.forwarded(self.max_payload(), &mut out);
        out[..4].copy_from_slice(&self.bytes[..4]);
        if let (Some(edns), [.., version, _, _, _, _]) = (self.edns, &mut out[..]) {
            *version = edns.version;
        }
        out
    }

    /// What an upstream query has in addition to the question, as one byte.
    pub(super) fn forwarded_flags(&self) -> u8 {
        let (has_edns, dnssec_ok) = (self.edns.is_some(), self.dnssec_ok());
        self.bytes[2] & RD
            | self.bytes[3] & AD_AND_CD
            | u8::from(has_edns) << 1
            | u8::from(dnssec_ok) << 2
    }

    fn dnssec_ok(&self) -> bool {
        self.edns.is_some_and(|edns| edns.dnssec_ok)
    }

    /// The question: name, type and class.
    pub(super) fn question(&self) -> &'a [u8] {
        &self.head()[HEADER_LEN..]
    }

    /// The fields that the response repeats.
    pub(super) fn client(&self) -> ClientEcho<'a> {
        ClientEcho {
            id: self.id(),
            recursion_desired: self.bytes[2] & RD != 0,
            question: self.question(),
            has_edns: self.edns.is_some(),
        }
    }

    /// The header and the question, as they came.
    pub(super) fn head(&self) -> &'a [u8] {
        &self.bytes[..HEADER_LEN + self.name.bytes.len() + 4]
    }

    /// The longest UDP response that the client takes.
    pub(super) fn max_payload(&self) -> u16 {
        self.edns.map_or(PLAIN_PAYLOAD, |edns| edns.max_payload)
    }

    /// The message's id.
    pub(super) fn id(&self) -> u16 {
        u16::from_be_bytes([self.bytes[0], self.bytes[1]])
    }
}

impl<'a> WireName<'a> {
    /// Reads the name that `bytes` begin with. A pointer is no part of it: before the first name
    /// of a message there is none that it could point to.
    pub(super) fn read(bytes: &'a [u8]) -> Option<WireName<'a>> {
        let mut begins = [0; MAX_LABELS];
        let (mut offset, mut n_labels) = (0, 0);
        loop {
            let len = match *bytes.get(offset)? {
                0 => break,
                len @ 1..=63 => usize::from(len),
                _ => return None,
            };
            // Within 255 octets there is room for no more labels than for their places.
            *begins.get_mut(n_labels)? = u8::try_from(offset).ok()?;
            n_labels += 1;
            offset += 1 + len;
            if offset >= MAX_NAME_LEN {
                return None;
            }
        }
        Some(WireName { bytes: &bytes[..=offset], n_labels, begins })
    }

    pub(super) fn n_labels(&self) -> usize {
        self.n_labels
    }

    /// The label of that place, counted from the left, where the name has so many.
    pub(super) fn label(&self, idx: usize) -> Option<&'a [u8]> {
        let begin = (idx < self.n_labels).then(|| usize::from(self.begins[idx]))?;
        let len = usize::from(self.bytes[begin]);
        Some(&self.bytes[begin + 1..begin + 1 + len])
    }

    /// What is left of the name without its first `n_skipped` labels, on the wire.
    pub(super) fn suffix(&self, n_skipped: usize) -> &'a [u8] {
        &self.bytes[self.suffix_begin(n_skipped)..]
    }

    /// Where that is in the message.
    pub(super) fn suffix_offset(&self, n_skipped: usize) -> u16 {
        (HEADER_LEN + self.suffix_begin(n_skipped)) as u16 // a name has at most 255 bytes
    }

    fn suffix_begin(&self, n_skipped: usize) -> usize {
        match n_skipped < self.n_labels {
            true => usize::from(self.begins[n_skipped]),
            false => self.bytes.len() - 1,
        }
    }
}

/// What follows `offset` in a message.
pub(super) struct MessageCursor<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) offset: usize,
}

impl<'a> MessageCursor<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let taken = self.bytes.get(self.offset..)?.get(..len)?;
        self.offset += len;
        Some(taken)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take(2).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    /// The OPT record, where it is among the additional records, after as many others; `None` where
    /// those can't be read. Afterwards `offset` is behind the last record.
    pub(super) fn opt(&mut self, n_others: u32, n_additionals: u16) -> Option<Option<OptRecord>> {
        for _ in 0..n_others {
            self.record()?;
        }
        let mut opt = None;
        for n_before in 0..n_additionals {
            let begin = self.offset;
            if let Some(edns) = self.record()? {
                // RFC 6891, section 6.1.1: more than one is an error.
                if opt.replace(OptRecord { edns, begin, n_before }).is_some() {
                    return None;
                }
            }
        }
        Some(opt)
    }

    /// The type of the record that begins here.
    pub(super) fn kind(mut self) -> Option<u16> {
        self.name()?;
        self.u16()
    }

    /// Skips a record; returns its EDNS fields if it is OPT.
    fn record(&mut self) -> Option<Option<EdnsInfo>> {
        let is_root = self.bytes.get(self.offset) == Some(&0);
        self.name()?;
        let record = self.take(RECORD_LEN)?;
        let field = |idx: usize| u16::from_be_bytes([record[idx], record[idx + 1]]);
        self.take(field(8).into())?;
        if field(0) != OPT {
            return Some(None);
        }
        is_root.then_some(Some(EdnsInfo {
            version: record[5],
            dnssec_ok: record[6] & 0x80 != 0,
            max_payload: field(2).max(PLAIN_PAYLOAD),
        }))
    }

    /// Skips a name without following compression pointers, so none can loop.
    fn name(&mut self) -> Option<()> {
        loop {
            match *self.take(1)?.first()? {
                0 => return Some(()),
                len @ 1..=63 => drop(self.take(len.into())?),
                0xc0.. => return self.take(1).map(drop),
                _ => return None,
            }
        }
    }
}

/// Whether two questions on the wire (name, type, class) are the same; names are case-insensitive.
pub(super) fn is_same_question(one: &[u8], other: &[u8]) -> bool {
    match (one.split_last_chunk::<4>(), other.split_last_chunk::<4>()) {
        (Some((name, kind)), Some((other_name, other_kind))) => {
            kind == other_kind && name.eq_ignore_ascii_case(other_name)
        }
        _ => false,
    }
}

/// Limits the TTLs in a well-formed message whose question is `question_len` long: to `max_ttl`
/// seconds, and in negative responses to `max_negative_ttl` (RFC 2308: the authority section, and
/// the last field of SOA).
pub(super) fn bound_ttls(
    message: &mut [u8],
    question_len: usize,
    max_ttl: u32,
    max_negative_ttl: u32,
) -> Option<()> {
    let count = |idx: usize| Some(u16::from_be_bytes([*message.get(idx)?, *message.get(idx + 1)?]));
    let sections = [(count(6)?, max_ttl), (count(8)?, max_negative_ttl), (count(10)?, max_ttl)];
    let mut offset = HEADER_LEN + question_len;
    let bound = |field: &mut [u8], most: u32| {
        if let Ok(bytes) = <&mut [u8; 4]>::try_from(field) {
            *bytes = u32::from_be_bytes(*bytes).min(most).to_be_bytes();
        }
    };
    for (n_records, most) in sections {
        for _ in 0..n_records {
            let mut rest = MessageCursor { bytes: message, offset };
            rest.name()?;
            let record_type = rest.u16()?;
            let ttl = rest.offset + 2;
            rest.take(6)?;
            let data_len = usize::from(rest.u16()?);
            rest.take(data_len)?;
            offset = rest.offset;
            if record_type == OPT {
                continue; // its TTL is none
            }
            bound(message.get_mut(ttl..ttl + 4)?, most);
            if record_type == SOA && data_len >= 22 {
                bound(message.get_mut(offset - 4..offset)?, max_negative_ttl);
            }
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const A_IN: &[u8] = &[0, 1, 0, 1];

    /// A message with those counts of records; what follows its header is `parts`.
    fn message(counts: [u8; 4], parts: &[&[u8]]) -> Vec<u8> {
        let [questions, answers, authorities, additionals] = counts;
        let header = [7, 7, 1, 0, 0, questions, 0, answers, 0, authorities, 0, additionals];
        [&header, &parts.concat()[..]].concat()
    }

    fn name_of_len(len: usize) -> Vec<u8> {
        let mut name = Vec::new();
        while name.len() + 1 < len {
            let label_len = (len - name.len() - 2).min(63);
            name.push(label_len as u8);
            name.extend(std::iter::repeat_n(b'x', label_len));
        }
        name.push(0);
        name
    }

    #[test]
    fn what_can_be_read() {
        let web: &[u8] = b"\x03web\x07service\x00";
        let opt: &[u8] = &[0, 0, 41, 4, 208, 0, 0, 0x80, 0, 0, 0];
        let with_option: &[u8] = &[0, 0, 41, 0, 1, 0, 3, 0, 0, 0, 5, 0xff, 0xfe, 0, 1, 9];
        let pointing: &[u8] = &[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 1, 9];
        let (longest, too_long) = (name_of_len(255), name_of_len(256));
        let edns = |version, dnssec_ok, max_payload| {
            Ok(Some(EdnsInfo { version, dnssec_ok, max_payload }))
        };
        let (garbled, format) = (Err(MalformedQuery::NoQuestion), Err(MalformedQuery::Format));
        type Read = Result<Option<EdnsInfo>, MalformedQuery>;
        let rows: [(&str, Vec<u8>, Read); 22] = [
            ("a question", message([1, 0, 0, 0], &[web, A_IN]), Ok(None)),
            ("EDNS", message([1, 0, 0, 1], &[web, A_IN, opt]), edns(0, true, 1232)),
            ("an option", message([1, 0, 0, 1], &[web, A_IN, with_option]), edns(3, false, 512)),
            ("a record", message([1, 1, 0, 1], &[web, A_IN, pointing, opt]), edns(0, true, 1232)),
            ("trailing bytes", message([1, 0, 0, 0], &[web, A_IN, b"xyz"]), Ok(None)),
            ("the longest name", message([1, 0, 0, 0], &[&longest, A_IN]), Ok(None)),
            ("the root", message([1, 0, 0, 0], &[b"\0", A_IN]), Ok(None)),
            ("a name too long", message([1, 0, 0, 0], &[&too_long, A_IN]), garbled),
            ("a name without end", message([1, 0, 0, 0], &[b"\x03we"]), garbled),
            ("a pointer to itself", message([1, 0, 0, 0], &[&[0xc0, 12], A_IN]), garbled),
            ("a label of type 01", message([1, 0, 0, 0], &[&[0x41, b'x', 0], A_IN]), garbled),
            ("no type", message([1, 0, 0, 0], &[web]), garbled),
            ("half a class", message([1, 0, 0, 0], &[web, &[0, 1, 0]]), garbled),
            ("no question", message([0, 0, 0, 0], &[]), format),
            ("two questions", message([2, 0, 0, 0], &[web, A_IN, web, A_IN]), format),
            ("two OPT", message([1, 0, 0, 2], &[web, A_IN, opt, opt]), format),
            ("OPT of a name", message([1, 0, 0, 1], &[web, A_IN, b"\x01x", opt]), format),
            ("an OPT that isn't there", message([1, 0, 0, 1], &[web, A_IN]), format),
            ("half an OPT", message([1, 0, 0, 1], &[web, A_IN, &opt[..9]]), format),
            ("records that aren't there", message([1, 255, 255, 255], &[web, A_IN]), format),
            (
                "half a header",
                message([1, 0, 0, 0], &[])[..11].to_vec(),
                Err(MalformedQuery::NoQuestion),
            ),
            ("nothing", Vec::new(), Err(MalformedQuery::NoQuestion)),
        ];
        for (what, bytes, expected) in rows {
            assert_eq!(ClientQuery::read(&bytes).map(|asked| asked.edns), expected, "{what}");
        }

        let mut answer = message([1, 0, 0, 0], &[web, A_IN]);
        answer[2] |= 0x80;
        assert_eq!(ClientQuery::read(&answer).err(), Some(MalformedQuery::NoQuestion));
        answer[2] = 2 << 3;
        assert_eq!(ClientQuery::read(&answer).err(), Some(MalformedQuery::OpCode));
    }

    #[test]
    fn a_name_in_parts() {
        let bytes = message([1, 0, 0, 0], &[b"\x03wEb\x07service\x00", A_IN]);
        let asked = ClientQuery::read(&bytes).unwrap();
        assert_eq!(asked.name.n_labels(), 2);
        let labels: [Option<&[u8]>; 3] = [Some(b"wEb"), Some(b"service"), None];
        assert_eq!([0, 1, 2].map(|idx| asked.name.label(idx)), labels);
        assert_eq!(asked.name.suffix(1), b"\x07service\0");
        assert_eq!([0, 1, 2].map(|n| asked.name.suffix_offset(n)), [12, 16, 24]);
        assert_eq!(asked.name.suffix(2), b"\0");
        assert_eq!(asked.head(), bytes);
        assert_eq!(asked.question(), &bytes[12..]);
    }

    #[test]
    fn what_belongs_to_one_hop_stays_here() {
        let web: &[u8] = b"\x03wEb\x07service\x00";
        // A cookie (RFC 7873) and a client's network (RFC 7871).
        let cookie: &[u8] = &[0, 10, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8];
        let opt = |payload: u16, dnssec_ok: u8, options: &[u8]| {
            let [high, low] = payload.to_be_bytes();
            let len = options.len() as u8;
            [&[0, 0, 41, high, low, 0, 0, dnssec_ok, 0, 0, len], options].concat()
        };
        let plain = message([1, 0, 0, 0], &[web, A_IN]);
        let signed = message([1, 0, 0, 1], &[web, A_IN, &opt(4096, 0x80, cookie)]);
        let other = message([1, 0, 0, 1], &[web, A_IN, &opt(512, 0x80, b"")]);
        let without = message([1, 0, 0, 1], &[web, A_IN, &opt(512, 0, b"")]);
        let rows =
            [(&plain, None), (&signed, Some(0x80)), (&other, Some(0x80)), (&without, Some(0))];
        let mut out = Vec::new();
        for (bytes, dnssec_ok) in rows {
            let asked = ClientQuery::read(bytes).unwrap();
            asked.forwarded(1232, &mut out);
            let edns = dnssec_ok.map(|dnssec_ok| opt(1232, dnssec_ok, b"")).unwrap_or_default();
            let n_more = u8::from(dnssec_ok.is_some());
            let mut expected = message([1, 0, 0, n_more], &[web, A_IN, &edns]);
            expected[..2].fill(0);
            assert_eq!(out, expected);
        }
        let flags = rows.map(|(bytes, _)| ClientQuery::read(bytes).unwrap().forwarded_flags());
        assert_eq!(flags, [1, 7, 7, 3]);
        let mut checked = plain.clone();
        checked[3] = 0x10;
        assert_eq!(ClientQuery::read(&checked).unwrap().forwarded_flags(), 0x11);
    }

    #[test]
    fn times_to_live_are_bounded() {
        let web: &[u8] = b"\x03web\x07service\x00";
        let record = |kind: u8, ttl: u32, data: &[u8]| {
            let [len_high, len_low] = (data.len() as u16).to_be_bytes();
            [&[0xc0, 12, 0, kind, 0, 1], &ttl.to_be_bytes()[..], &[len_high, len_low], data]
                .concat()
        };
        let soa = |minimum: u32| {
            [&[0u8; 2][..], &[9; 16], &minimum.to_be_bytes()].concat() // two roots, five numbers
        };
        let opt: &[u8] = &[0, 0, 41, 4, 208, 0xff, 0xff, 0xff, 0xff, 0, 0];
        let with = |ttl: [u32; 4]| {
            let [answer, authority, minimum, additional] = ttl;
            let records: [&[u8]; 6] = [
                web,
                A_IN,
                &record(1, answer, &[1; 4]),
                &record(6, authority, &soa(minimum)),
                &record(1, additional, &[1; 4]),
                opt,
            ];
            message([1, 1, 1, 2], &records)
        };
        for (given, expected) in [
            ([3600, 86_400, 3600, 3600], [30, 5, 5, 30]),
            ([7, 3, 0, 29], [7, 3, 0, 29]),
            ([u32::MAX, 900, 5, 31], [30, 5, 5, 30]),
        ] {
            let mut bytes = with(given);
            bound_ttls(&mut bytes, web.len() + 4, 30, 5).unwrap();
            assert_eq!(bytes, with(expected), "{given:?}");
        }
        // One that ends within a record: nothing is read beyond its end.
        let whole = with([3600; 4]);
        for len in 0..whole.len() {
            assert_eq!(bound_ttls(&mut whole[..len].to_vec(), web.len() + 4, 30, 5), None, "{len}");
        }
    }
}
