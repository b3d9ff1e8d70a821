//! An NBD client's bytes: a whole negotiation, with TLS before it or not, then requests. Whatever they are, every option gets
//! a whole answer, nothing begins before TLS where that is required, and a request that is let through is on the disk.
#![no_main]

use libfuzzer_sys::fuzz_target;
use varve_export::limits::NBD_REQUEST_BYTES_MAX;
use varve_export::nbd::negotiation::{
    Agreed, Catalog, Facts, Negotiation, OPTION_HEADER_BYTES, OptionHeader, Step, Tls,
};
use varve_export::nbd::request::{Action, Allowed, REQUEST_BYTES, Request, error_reply};
use varve_export::nbd::wire::{OPT_EXPORT_NAME, OPTION_MAGIC, OPTION_REPLY_MAGIC, REQUEST_MAGIC};

const SIZE: u64 = 100_000;

struct One;

impl Catalog for One {
    fn find(&self, name: &str) -> Option<Facts> {
        matches!(name, "" | "x").then(|| Facts {
            name: "x".to_owned(),
            description: String::new(),
            size: SIZE,
            read_only: false,
        })
    }
    fn list(&self) -> Vec<Facts> {
        self.find("x").into_iter().collect()
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&how, mut data)) = data.split_first() else { return };
    let tls = if how & 1 == 0 { Tls::None } else { Tls::Required };
    let Ok(mut negotiation) = Negotiation::new(tls, u32::from(how >> 1 & 3)) else { return };
    let mut secure = tls == Tls::None;
    let agreed = loop {
        let Some((head, rest)) = data.split_first_chunk::<OPTION_HEADER_BYTES>() else { return };
        let _ = OptionHeader::decode(head);
        // A fuzzer does not guess the magic.
        let mut head = *head;
        head[..8].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        let Ok(header) = OptionHeader::decode(&head) else { return };
        let mut out = Vec::new();
        if header.is_too_big() {
            negotiation.too_big(header.option, &mut out);
            return;
        }
        let Some((bytes, rest)) = rest.split_at_checked(header.len as usize) else { return };
        data = rest;
        let step = negotiation.option(header.option, bytes, &One, &mut out);
        if header.option != OPT_EXPORT_NAME {
            whole_answer(header.option, &out);
        }
        match step {
            Step::Next => {}
            Step::StartTls => {
                assert!(!secure);
                secure = true;
                negotiation = negotiation.behind_tls();
            }
            Step::Begin(agreed) => {
                assert!(secure && agreed.export == "x");
                break agreed;
            }
            Step::Close => return,
        }
    };
    while let Some((head, rest)) = data.split_first_chunk::<REQUEST_BYTES>() {
        request(&agreed, head, how & 8 != 0);
        data = rest;
    }
});

fn whole_answer(option: u32, mut out: &[u8]) {
    let mut ends = 0;
    while !out.is_empty() {
        assert_eq!((&out[..8], &out[8..12]), (&OPTION_REPLY_MAGIC.to_be_bytes()[..], &option.to_be_bytes()[..]));
        let kind = u32::from_be_bytes(out[12..16].try_into().expect("four bytes"));
        let len = u32::from_be_bytes(out[16..20].try_into().expect("four bytes")) as usize;
        assert_eq!(ends, 0, "nothing follows the end of an answer");
        ends += u32::from(kind == 1 || kind >> 31 == 1);
        out = &out[20 + len..];
    }
    assert_eq!(ends, 1);
}

fn request(agreed: &Agreed, head: &[u8; REQUEST_BYTES], read_only: bool) {
    let _ = Request::decode(head);
    let mut head = *head;
    head[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    let request = Request::decode(&head).expect("the magic is right");
    let (structured, allocation) = (agreed.structured, agreed.allocation);
    match request.check(&Allowed { size: SIZE, read_only, allocation, structured }) {
        Ok(Action::Flush) => {}
        Ok(action) => {
            assert!(request.offset + u64::from(request.len) <= SIZE);
            assert!(!read_only || !matches!(action, Action::Write | Action::Zero { .. }));
            assert!(request.len <= NBD_REQUEST_BYTES_MAX || !matches!(action, Action::Read { .. } | Action::Write));
            assert!(structured && allocation || !matches!(action, Action::Status { .. }));
        }
        Err(refused) => assert!(error_reply(structured, request.cookie, &refused).len() >= 16),
    }
}
