use std::vec::Vec;

use proptest::prelude::*;

use super::*;

fn zone() -> NamesZone {
    let mut domain = [0; 64];
    domain[..9].copy_from_slice(b"\x07service\0");
    NamesZone { domain, domain_len: 9, ttl: 7, serial: 0x0102_0304, padding: 0 }
}

/// A query with this name on the wire, type, and what follows.
fn query(name: &[u8], kind: u16, n_additionals: u8, rest: &[u8]) -> Vec<u8> {
    let header = [0xab, 0xcd, 1, 0x10, 0, 1, 0, 0, 0, 0, 0, n_additionals];
    [&header[..], name, &kind.to_be_bytes(), &[0, 1], rest].concat()
}

fn read(message: &[u8]) -> Option<NameQuery> {
    read_key(message).map(|(query, _)| query)
}

fn read_key(message: &[u8]) -> Option<(NameQuery, NameKey)> {
    let mut key = NameKey { octets: [9; 64] };
    let len = message.len() as u32;
    let query = read_query(message, len, &zone(), &mut key)?;
    Some((query, key))
}

/// The whole answer.
fn answered(message: &[u8], addresses: NameAddresses) -> Option<Vec<u8>> {
    let query = read(message).filter(|query| query.is_about_addresses(true))?;
    let mut answered = message.to_vec();
    answered.resize(answer_len(&query, &addresses) as usize, 0);
    answer(&mut answered[..], &query, &addresses, &zone());
    Some(answered)
}

const WEB: &[u8] = b"\x03wEb\x07SERVICE\0";
const VIP: [u8; 4] = [127, 128, 0, 5];
const VIP6: [u8; 16] = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9];
const BOTH: NameAddresses = NameAddresses { vip: VIP, vip6: Some(VIP6) };
const V4: NameAddresses = NameAddresses { vip: VIP, vip6: None };
const OPT: &[u8] = &[0, 0, 41, 16, 0, 0, 0, 0x80, 0, 0, 0];

#[test]
fn addresses_and_their_absence() {
    let soa: &[u8] = &[
        &[0xc0, 16, 0, 6, 0, 1, 0, 0, 0, 5, 0, 38, 0xc0, 16],
        &b"\x06nobody\x07invalid\0"[..],
        &[1, 2, 3, 4, 0, 0, 14, 16, 0, 0, 4, 176, 0, 9, 58, 128, 0, 0, 0, 5],
    ]
    .concat();
    let a: &[u8] = &[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 7, 0, 4, 127, 128, 0, 5];
    let aaaa: &[u8] = &[&[0xc0, 12, 0, 28, 0, 1, 0, 0, 0, 7, 0, 16][..], &VIP6].concat();
    let rows: [(u16, NameAddresses, u8, &[u8]); 5] = [
        (1, V4, 1, a),
        (28, BOTH, 1, aaaa),
        (28, V4, 0, soa),
        (65, BOTH, 0, soa),
        (16, V4, 0, soa),
    ];
    for (kind, addresses, n_answers, records) in rows {
        for (n_opt, opt, opt_answer) in [
            (0, &b""[..], &b""[..]),
            (1, OPT, &[0, 0, 41, 4, 208, 0, 0, 0x80, 0, 0, 0][..]),
            (
                1,
                &[0, 0, 41, 16, 0, 0, 0, 0, 0, 0, 5, 0, 10, 0, 1, 9],
                &[0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0],
            ),
        ] {
            let message = query(WEB, kind, n_opt, opt);
            let counts = [0x85, 0x90, 0, 1, 0, n_answers, 0, 1 - n_answers, 0, n_opt];
            let question = &message[12..message.len() - opt.len()];
            let expected = [&message[..2], &counts, question, records, opt_answer].concat();
            assert_eq!(answered(&message, addresses).as_deref(), Some(&expected[..]), "{kind}");
        }
    }
}

#[test]
fn what_is_not_common_passes() {
    let longest = [&[63u8; 64][..], b"\x07service\0"].concat();
    let passed = |name: &[u8], kind, n, rest: &[u8]| read(&query(name, kind, n, rest)).is_none();
    assert!(!passed(WEB, 1, 0, b""), "a plain one");
    assert!(!passed(&longest, 1, 0, b""), "a label of 63 bytes");
    let rows: [(&str, &[u8], u8, &[u8]); 14] = [
        ("another domain", b"\x03web\x07servicf\0", 0, b""),
        ("a longer domain", b"\x03web\x07service\x03com\0", 0, b""),
        ("below a service", b"\x01a\x03web\x07service\0", 0, b""),
        ("the domain itself", b"\x07service\0", 0, b""),
        ("the root", b"\0", 0, b""),
        ("a pointer", b"\xc0\x0c", 0, b""),
        ("a label of 64 bytes", &[&[64u8; 65][..], b"\x07service\0"].concat(), 0, b""),
        ("trailing bytes", WEB, 0, b"\0"),
        ("an OPT that isn't counted", WEB, 0, OPT),
        ("an OPT that is absent", WEB, 1, b""),
        ("a record that is no OPT", WEB, 1, &[0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0]),
        ("EDNS version 1", WEB, 1, &[0, 0, 41, 16, 0, 0, 1, 0, 0, 0, 0]),
        ("an OPT of another name", WEB, 1, &[1, 0, 0, 41, 16, 0, 0, 0, 0, 0, 0, 0]),
        ("options cut off", WEB, 1, &[0, 0, 41, 16, 0, 0, 0, 0, 0, 0, 1]),
    ];
    for (what, name, n_additionals, rest) in rows {
        assert!(passed(name, 1, n_additionals, rest), "{what}");
    }
    let mut padded = [&OPT[..10], &[54][..], &[0; 54]].concat();
    assert!(passed(WEB, 1, 1, &padded), "options of 54 bytes");
    padded.pop();
    padded[10] = 53;
    assert!(!passed(WEB, 1, 1, &padded), "options of 53 bytes");
    for (idx, byte) in [(2, 0x81), (2, 0x29), (5, 2), (5, 0), (7, 1), (9, 1), (11, 2), (4, 1)] {
        let mut message = query(WEB, 1, 0, b"");
        message[idx] = byte;
        assert_eq!(read(&message), None, "{byte} at {idx}");
    }
    for kind in [33, 251, 252] {
        assert_eq!(answered(&query(WEB, kind, 0, b""), BOTH), None, "type {kind}");
        let query = read(&query(WEB, kind, 0, b"")).unwrap();
        assert_eq!(query.is_about_addresses(false), kind == 33, "type {kind}, of no service");
    }
    let mut chaos = query(WEB, 1, 0, b"");
    chaos.splice(chaos.len() - 1.., [3]);
    assert_eq!(read(&chaos), None, "class CH");
}

#[test]
fn a_failure_keeps_all_but_the_flags() {
    for (before, is_query, after) in [
        ([0x01, 0x30], true, [0x81, 0x92]),
        ([0x00, 0x00], true, [0x80, 0x82]),
        ([0x80, 0x00], false, [0x80, 0x82]),
    ] {
        let mut message = query(WEB, 1, 0, b"");
        message[2..4].copy_from_slice(&before);
        assert_eq!(super::is_query(&message[..]), is_query);
        let mut failed = message.clone();
        fail(&mut failed[..]);
        message[2..4].copy_from_slice(&after);
        assert_eq!(failed, message);
    }
}

#[test]
fn keys_are_labels_in_lower_case() {
    let key = NameKey::of(b"Web-1_X").unwrap();
    assert_eq!(key.octets[..9], *b"\x07web-1_x\0");
    let (_, found) = read_key(&query(b"\x07wEB-1_x\x07service\0", 1, 0, b"")).unwrap();
    assert_eq!(found, key);
    assert_eq!(NameKey::of(b""), None);
    assert_eq!(NameKey::of(&[b'a'; 64]), None);
    assert!(NameKey::of(&[b'a'; 63]).is_some());
}

proptest! {
    #[test]
    fn words_become_lower_case_as_bytes_do(bytes in any::<[u8; 8]>()) {
        let lowered = lower(u64::from_ne_bytes(bytes)).to_ne_bytes();
        prop_assert_eq!(lowered, bytes.map(|byte| byte.to_ascii_lowercase()));
    }

    #[test]
    fn no_message_is_read_beyond_its_end(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        read(&bytes);
    }

    #[test]
    fn a_query_that_is_cut_or_has_another_byte_is_read_within_its_end(
        cut in 0usize..60, at in 0usize..60, byte in any::<u8>(),
    ) {
        let mut message = query(WEB, 1, 1, OPT);
        let len = message.len();
        message.truncate(len.saturating_sub(cut));
        if let Some(place) = message.get_mut(at) {
            *place = byte;
        }
        if let Some(query) = read(&message) {
            let opt_len = if query.has_edns { OPT_LEN as usize } else { 0 };
            prop_assert!(query.question_end as usize + opt_len <= message.len());
        }
    }
}
