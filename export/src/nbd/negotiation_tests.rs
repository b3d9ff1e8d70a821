use proptest::prelude::*;

use super::*;

struct Two;

impl Catalog for Two {
    fn find(&self, name: &str) -> Option<Facts> {
        let read_only = match name {
            "rw" => false,
            "ro" => true,
            _ => return None,
        };
        Some(Facts { name: name.to_owned(), description: "text".to_owned(), size: 12_345, read_only })
    }
    fn list(&self) -> Vec<Facts> {
        ["ro", "rw"].iter().filter_map(|name| self.find(name)).collect()
    }
}

/// The replies in an answer, as (option, kind, data).
fn replies(mut bytes: &[u8]) -> Vec<(u32, u32, Vec<u8>)> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let mut reader = Reader::new(bytes);
        assert_eq!(reader.u64().unwrap(), OPTION_REPLY_MAGIC);
        let (option, kind, len) = (reader.u32().unwrap(), reader.u32().unwrap(), reader.u32().unwrap() as usize);
        found.push((option, kind, bytes[20..20 + len].to_vec()));
        bytes = &bytes[20 + len..];
    }
    found
}

fn ask(negotiation: &mut Negotiation, option: u32, data: &[u8]) -> (Step, Vec<(u32, Vec<u8>)>) {
    let mut out = Vec::new();
    let step = negotiation.option(option, data, &Two, &mut out);
    let found = replies(&out);
    assert!(found.iter().all(|(of, ..)| *of == option));
    (step, found.into_iter().map(|(_, kind, data)| (kind, data)).collect())
}

fn kinds(answer: &[(u32, Vec<u8>)]) -> Vec<u32> {
    answer.iter().map(|(kind, _)| *kind).collect()
}

fn open() -> Negotiation {
    Negotiation::new(Tls::None, 3).unwrap()
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

fn go(name: &str) -> Vec<u8> {
    [text(name), vec![0, 2, 0, 1, 0, 2]].concat()
}

fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = [text(name), (queries.len() as u32).to_be_bytes().to_vec()].concat();
    queries.iter().for_each(|query| data.extend(text(query)));
    data
}

#[test]
fn frozen_bytes() {
    assert_eq!(&greeting(), b"NBDMAGICIHAVEOPT\x00\x03");
    let (step, answer) = ask(&mut open(), OPT_GO, &go("rw"));
    assert_eq!(step, Step::Begin(Agreed { export: "rw".to_owned(), structured: false, allocation: false }));
    let expected: [(u32, &[u8]); 5] = [
        (REP_INFO, b"\0\0\0\0\0\0\0\0\x30\x39\x0d\x6d"),
        (REP_INFO, b"\0\x01rw"),
        (REP_INFO, b"\0\x02text"),
        (REP_INFO, b"\0\x03\0\0\0\x01\0\0\x10\0\x02\0\0\0"),
        (REP_ACK, b""),
    ];
    assert_eq!(answer, expected.map(|(kind, data)| (kind, data.to_vec())));
    let mut out = Vec::new();
    assert!(matches!(
        Negotiation::new(Tls::None, 1).unwrap().option(OPT_EXPORT_NAME, b"ro", &Two, &mut out),
        Step::Begin(_)
    ));
    assert_eq!((out.len(), &out[..10]), (134, &b"\0\0\0\0\0\0\x30\x39\x05\x0f"[..]));
}

#[test]
fn flags_that_were_not_offered() {
    for flags in 0..4 {
        assert!(Negotiation::new(Tls::None, flags).is_ok());
    }
    assert_eq!(Negotiation::new(Tls::None, 4).unwrap_err(), WireError::Flags(4));
}

#[test]
fn an_unknown_export_or_option_is_refused_and_the_talk_goes_on() {
    let mut it = open();
    for option in [OPT_INFO, OPT_GO] {
        let (step, answer) = ask(&mut it, option, &go("xx"));
        assert_eq!((step, kinds(&answer)), (Step::Next, vec![REP_ERR_UNKNOWN]));
    }
    for option in [0, 4, 11, 12, u32::MAX] {
        let (step, answer) = ask(&mut it, option, b"anything");
        assert_eq!((step, kinds(&answer)), (Step::Next, vec![REP_ERR_UNSUP]));
    }
    assert_eq!(it.option(OPT_EXPORT_NAME, b"xx", &Two, &mut Vec::new()), Step::Close);
    assert_eq!(it.option(OPT_EXPORT_NAME, b"\xff", &Two, &mut Vec::new()), Step::Close);
    assert_eq!(ask(&mut it, OPT_ABORT, b""), (Step::Close, vec![(REP_ACK, vec![])]));
    assert_eq!(kinds(&ask(&mut it, OPT_LIST, b"").1), [REP_SERVER, REP_SERVER, REP_ACK]);
}

#[test]
fn malformed_data_is_invalid() {
    let mut it = open();
    ask(&mut it, OPT_STRUCTURED_REPLY, b"");
    let mut long = text("rw");
    long.extend((NBD_INFO_REQUESTS_MAX + 1).to_be_bytes());
    long.extend(vec![0; 2 * usize::from(NBD_INFO_REQUESTS_MAX + 1)]);
    let cases: [(u32, Vec<u8>); 10] = [
        (OPT_GO, vec![]),
        (OPT_GO, text("rw")),
        (OPT_GO, [go("rw"), vec![0]].concat()),
        (OPT_GO, vec![0xff; 8]),
        (OPT_INFO, long),
        (OPT_LIST, vec![0]),
        (OPT_STRUCTURED_REPLY, vec![0]),
        (OPT_SET_META_CONTEXT, text("rw")),
        (OPT_SET_META_CONTEXT, [text("rw"), u32::MAX.to_be_bytes().to_vec()].concat()),
        (OPT_SET_META_CONTEXT, [meta("rw", &["base:allocation"]), vec![7]].concat()),
    ];
    for (option, data) in cases {
        let (step, answer) = ask(&mut it, option, &data);
        assert_eq!((step, kinds(&answer)), (Step::Next, vec![REP_ERR_INVALID]), "{option} {data:x?}");
    }
    let mut out = Vec::new();
    assert_eq!(it.too_big(OPT_GO, &mut out), Step::Next);
    assert_eq!(replies(&out)[0].1, REP_ERR_TOO_BIG);
    assert_eq!(it.too_big(OPT_EXPORT_NAME, &mut Vec::new()), Step::Close);
}

#[test]
fn contexts_need_structured_replies_and_hold_for_their_export() {
    let mut it = open();
    let set = meta("rw", &["qemu:dirty-bitmap:x", "base:allocation"]);
    assert_eq!(kinds(&ask(&mut it, OPT_SET_META_CONTEXT, &set).1), [REP_ERR_INVALID]);
    assert_eq!(kinds(&ask(&mut it, OPT_STRUCTURED_REPLY, b"").1), [REP_ACK]);
    let id = BASE_ALLOCATION_ID.to_be_bytes();
    let chosen = [(REP_META_CONTEXT, [&id[..], b"base:allocation"].concat()), (REP_ACK, vec![])];
    assert_eq!(ask(&mut it, OPT_SET_META_CONTEXT, &set).1, chosen);
    let allocation = |it: &mut Negotiation, name: &str| match ask(it, OPT_GO, &go(name)).0 {
        Step::Begin(agreed) => agreed.allocation,
        other => panic!("{other:?}"),
    };
    assert!(allocation(&mut it, "rw") && !allocation(&mut it, "ro"));
    // Listing changes nothing; setting anew replaces, also when it fails.
    for (queries, count) in [(&[][..], 2), (&["base:"], 2), (&["other:"], 1)] {
        assert_eq!(ask(&mut it, OPT_LIST_META_CONTEXT, &meta("rw", queries)).1.len(), count);
    }
    assert!(allocation(&mut it, "rw"));
    assert_eq!(kinds(&ask(&mut it, OPT_SET_META_CONTEXT, &meta("xx", &["base:allocation"])).1), [REP_ERR_UNKNOWN]);
    assert!(!allocation(&mut it, "rw"));
    assert_eq!(kinds(&ask(&mut it, OPT_SET_META_CONTEXT, &meta("rw", &["base:"])).1), [REP_ACK], "no wildcard here");
    assert!(!allocation(&mut it, "rw"));
}

#[test]
fn before_tls_nothing_counts() {
    let mut it = Negotiation::new(Tls::Required, 3).unwrap();
    for option in (2..20).filter(|option| ![OPT_ABORT, OPT_STARTTLS].contains(option)) {
        let (step, answer) = ask(&mut it, option, &go("rw"));
        assert_eq!((step, kinds(&answer)), (Step::Next, vec![REP_ERR_TLS_REQD]), "{option}");
    }
    assert_eq!(it.option(OPT_EXPORT_NAME, b"rw", &Two, &mut Vec::new()), Step::Close);
    assert_eq!(kinds(&ask(&mut it, OPT_STARTTLS, b"x").1), [REP_ERR_INVALID]);
    assert_eq!(ask(&mut it, OPT_STARTTLS, b""), (Step::StartTls, vec![(REP_ACK, vec![])]));
    let mut it = it.behind_tls();
    assert_eq!(kinds(&ask(&mut it, OPT_STARTTLS, b"").1), [REP_ERR_INVALID]);
    assert!(matches!(ask(&mut it, OPT_GO, &go("rw")).0, Step::Begin(Agreed { structured: false, .. })));
    assert_eq!(kinds(&ask(&mut open(), OPT_STARTTLS, b"").1), [REP_ERR_UNSUP]);
}

#[test]
fn heads_of_options() {
    let head = |option: u32, len: u32| {
        let mut bytes = [0; OPTION_HEADER_BYTES];
        bytes[..8].copy_from_slice(b"IHAVEOPT");
        bytes[8..12].copy_from_slice(&option.to_be_bytes());
        bytes[12..].copy_from_slice(&len.to_be_bytes());
        bytes
    };
    assert_eq!(OptionHeader::decode(&head(7, 9)), Ok(OptionHeader { option: 7, len: 9 }));
    assert!(!OptionHeader::decode(&head(7, NBD_OPTION_BYTES_MAX)).unwrap().is_too_big());
    assert!(OptionHeader::decode(&head(7, NBD_OPTION_BYTES_MAX + 1)).unwrap().is_too_big());
    assert!(OptionHeader::decode(&head(7, NBD_OPTION_SKIP_MAX + 1)).is_err());
    assert!(matches!(OptionHeader::decode(&[0; 16]), Err(WireError::Magic(0))));
}

proptest! {
    #[test]
    fn any_option_gets_a_whole_answer(
        options in prop::collection::vec((0u32..14, prop::collection::vec(any::<u8>(), 0..64)), 0..12),
        tls in prop::sample::select(vec![Tls::None, Tls::Required, Tls::Active]),
    ) {
        let mut it = Negotiation::new(tls, 3).unwrap();
        for (option, data) in options {
            let mut out = Vec::new();
            let step = it.option(option, &data, &Two, &mut out);
            if option != OPT_EXPORT_NAME {
                let found = replies(&out);
                // The last reply, and no other, ends the answer.
                let ends = found.iter().map(|(_, kind, _)| *kind == REP_ACK || kind >> 31 == 1);
                prop_assert_eq!(ends.clone().filter(|&end| end).count(), 1);
                prop_assert_eq!(ends.clone().next_back(), Some(true));
            }
            prop_assert!(tls != Tls::Required || !matches!(step, Step::Begin(_)));
        }
    }
}
