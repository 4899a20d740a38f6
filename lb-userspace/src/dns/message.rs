//! A question as it comes over the wire (RFC 1035, section 4; EDNS: RFC 6891), read in place.

use hickory_proto::op::Query;
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder, DecodeError};

/// The length of a message's header.
pub(super) const HEADER_LEN: usize = 12;

/// The longest name, its lengths and the root's included.
const MAX_NAME_LEN: usize = 255;

/// The most labels that a name of that length has, the root not counted.
const MAX_LABELS: usize = 127;

/// The longest UDP message that is understood by those who don't speak EDNS.
const PLAIN_PAYLOAD: u16 = 512;

/// A resource record's fixed part: its type, class, time to live and length.
const RECORD_LEN: usize = 10;

/// The type of EDNS's record.
const OPT: u16 = 41;

/// Where an OPT record has the size of UDP messages: after the root's name and the type.
pub(super) const OPT_PAYLOAD: usize = 3;

/// Why a message is no question that can be dealt with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unreadable {
    /// It isn't a question at all: whoever answered it could be led into answering answers, or
    /// anything.
    NoQuestion,
    /// It asks for something else than names.
    OpCode,
    /// It hasn't one question, or what follows that isn't put together as it should be.
    Format,
}

/// A message that asks one question.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked<'a> {
    bytes: &'a [u8],
    pub(super) name: WireName<'a>,
    pub(super) query_type: u16,
    pub(super) query_class: u16,
    pub(super) edns: Option<AskedEdns>,
    /// Where the OPT record is in the message, where there is one.
    opt_begin: usize,
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
        let mut rest = Rest { bytes, offset: HEADER_LEN + name.bytes.len() };
        Some(Question { name, query_type: rest.u16()?, query_class: rest.u16()? })
    }

    /// Where it ends in the message.
    pub(super) fn end(&self) -> usize {
        HEADER_LEN + self.name.bytes.len() + 4
    }
}

/// What an OPT record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AskedEdns {
    pub(super) version: u8,
    pub(super) dnssec_ok: bool,
    /// The size of UDP messages that it takes; at least 512.
    max_payload: u16,
}

/// An OPT record in its message.
#[derive(Clone, Copy, Debug)]
pub(super) struct Opt {
    pub(super) edns: AskedEdns,
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

impl<'a> Asked<'a> {
    /// Reads a message. What it can't use it skips: records other than OPT, options, trailing bytes.
    pub(super) fn read(bytes: &'a [u8]) -> Result<Asked<'a>, Unreadable> {
        let header: &[u8; HEADER_LEN] = bytes.first_chunk().ok_or(Unreadable::NoQuestion)?;
        if header[2] & 0x80 != 0 {
            return Err(Unreadable::NoQuestion);
        }
        if header[2] & 0x78 != 0 {
            return Err(Unreadable::OpCode);
        }
        let count = |idx: usize| u16::from_be_bytes([header[idx], header[idx + 1]]);
        if count(4) != 1 {
            return Err(Unreadable::Format);
        }
        let question = Question::read(bytes).ok_or(Unreadable::NoQuestion)?;
        let Question { name, query_type, query_class } = question;
        let mut rest = Rest { bytes, offset: question.end() };
        let n_others = u32::from(count(6)) + u32::from(count(8));
        let opt = rest.opt(n_others, count(10)).ok_or(Unreadable::Format)?;
        let (edns, opt_begin) = opt.map_or((None, 0), |opt| (Some(opt.edns), opt.begin));
        Ok(Asked { bytes, name, query_type, query_class, edns, opt_begin })
    }

    /// The message, in which the asker takes at most `most` bytes over UDP.
    pub(super) fn with_payload_within(&self, most: u16) -> Vec<u8> {
        let mut bytes = self.bytes.to_vec();
        if let Some(edns) = self.edns
            && edns.max_payload > most
        {
            bytes[self.opt_begin + OPT_PAYLOAD..][..2].copy_from_slice(&most.to_be_bytes());
        }
        bytes
    }

    /// The whole message, as it came.
    pub(super) fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The header and the question, as they came.
    pub(super) fn head(&self) -> &'a [u8] {
        &self.bytes[..HEADER_LEN + self.name.bytes.len() + 4]
    }

    /// The longest message that the asker takes over UDP.
    pub(super) fn max_payload(&self) -> u16 {
        self.edns.map_or(PLAIN_PAYLOAD, |edns| edns.max_payload)
    }

    /// The message's id.
    pub(super) fn id(&self) -> u16 {
        u16::from_be_bytes([self.bytes[0], self.bytes[1]])
    }

    /// The question, as hickory has it.
    pub(super) fn query(&self) -> Result<Query, DecodeError> {
        Query::read(&mut BinDecoder::new(&self.bytes[HEADER_LEN..]))
    }
}

impl<'a> WireName<'a> {
    /// Reads the name that `bytes` begin with. A pointer is no part of it: before the first name
    /// of a message there is none that it could point to.
    fn read(bytes: &'a [u8]) -> Option<WireName<'a>> {
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
pub(super) struct Rest<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) offset: usize,
}

impl<'a> Rest<'a> {
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
    pub(super) fn opt(&mut self, n_others: u32, n_additionals: u16) -> Option<Option<Opt>> {
        for _ in 0..n_others {
            self.record()?;
        }
        let mut opt = None;
        for n_before in 0..n_additionals {
            let begin = self.offset;
            if let Some(edns) = self.record()? {
                // RFC 6891, section 6.1.1: more than one is an error.
                if opt.replace(Opt { edns, begin, n_before }).is_some() {
                    return None;
                }
            }
        }
        Some(opt)
    }

    /// Steps over a record, whatever its data is; what it says where it is OPT.
    fn record(&mut self) -> Option<Option<AskedEdns>> {
        let is_root = self.bytes.get(self.offset) == Some(&0);
        self.name()?;
        let record = self.take(RECORD_LEN)?;
        let field = |idx: usize| u16::from_be_bytes([record[idx], record[idx + 1]]);
        self.take(field(8).into())?;
        if field(0) != OPT {
            return Some(None);
        }
        is_root.then_some(Some(AskedEdns {
            version: record[5],
            dnssec_ok: record[6] & 0x80 != 0,
            max_payload: field(2).max(PLAIN_PAYLOAD),
        }))
    }

    /// Steps over a name, without following where it points to: so none can lead in a circle.
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
            Ok(Some(AskedEdns { version, dnssec_ok, max_payload }))
        };
        let (garbled, format) = (Err(Unreadable::NoQuestion), Err(Unreadable::Format));
        type Read = Result<Option<AskedEdns>, Unreadable>;
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
                Err(Unreadable::NoQuestion),
            ),
            ("nothing", Vec::new(), Err(Unreadable::NoQuestion)),
        ];
        for (what, bytes, expected) in rows {
            assert_eq!(Asked::read(&bytes).map(|asked| asked.edns), expected, "{what}");
        }

        let mut answer = message([1, 0, 0, 0], &[web, A_IN]);
        answer[2] |= 0x80;
        assert_eq!(Asked::read(&answer).err(), Some(Unreadable::NoQuestion));
        answer[2] = 2 << 3;
        assert_eq!(Asked::read(&answer).err(), Some(Unreadable::OpCode));
    }

    #[test]
    fn a_name_in_parts() {
        let bytes = message([1, 0, 0, 0], &[b"\x03wEb\x07service\x00", A_IN]);
        let asked = Asked::read(&bytes).unwrap();
        assert_eq!(asked.name.n_labels(), 2);
        let labels: [Option<&[u8]>; 3] = [Some(b"wEb"), Some(b"service"), None];
        assert_eq!([0, 1, 2].map(|idx| asked.name.label(idx)), labels);
        assert_eq!(asked.name.suffix(1), b"\x07service\0");
        assert_eq!([0, 1, 2].map(|n| asked.name.suffix_offset(n)), [12, 16, 24]);
        assert_eq!(asked.name.suffix(2), b"\0");
        assert_eq!(asked.head(), bytes);
        assert_eq!(asked.query().unwrap().name.to_string(), "wEb.service.");
    }

    #[test]
    fn the_size_that_goes_on_is_bounded() {
        let web: &[u8] = b"\x03web\x07service\x00";
        for (payload, expected) in [(8192u16, 4096), (4096, 4096), (1232, 1232), (100, 100)] {
            let [high, low] = payload.to_be_bytes();
            let opt: &[u8] = &[0, 0, 41, high, low, 0, 0, 0x80, 0, 0, 0];
            let bytes = message([1, 0, 0, 1], &[web, A_IN, opt]);
            let mut wanted = bytes.clone();
            let place = wanted.len() - opt.len() + OPT_PAYLOAD;
            wanted[place..][..2].copy_from_slice(&u16::to_be_bytes(expected));
            assert_eq!(Asked::read(&bytes).unwrap().with_payload_within(4096), wanted, "{payload}");
        }
        let plain = message([1, 0, 0, 0], &[web, A_IN]);
        assert_eq!(Asked::read(&plain).unwrap().with_payload_within(4096), plain);
    }
}
