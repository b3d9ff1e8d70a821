//! Join tokens: any text is refused as malformed or is, but for case and white space around it, the one text of its
//! token. With the checksum put right, too.
#![no_main]

use libfuzzer_sys::fuzz_target;
use varve_net::ErrorKind;
use varve_net::hosts::check_name;
use varve_net::token::{JoinToken, TOKEN_CHARS_MAX};

fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data) {
        decode(text);
    }
    let Some((parts, name)) = data.split_first_chunk::<64>() else { return };
    let (mut ca_fingerprint, mut secret) = ([0; 32], [0; 32]);
    ca_fingerprint.copy_from_slice(&parts[..32]);
    secret.copy_from_slice(&parts[32..]);
    let name = String::from_utf8_lossy(name).into_owned();
    let may_be = check_name(&name).is_ok();
    let token = JoinToken { ca_fingerprint, secret, name };
    assert_eq!(decode(&token.encode()), may_be.then_some(token), "a token decodes exactly if its name may be one");
});

fn decode(text: &str) -> Option<JoinToken> {
    match JoinToken::decode(text) {
        Ok(token) => {
            assert!(check_name(&token.name).is_ok() && text.trim().len() <= TOKEN_CHARS_MAX);
            assert_eq!(token.encode(), text.trim().to_ascii_lowercase(), "one text");
            Some(token)
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::MalformedToken);
            assert!(error.context().len() < 200, "what was typed is not repeated: it may be a secret");
            None
        }
    }
}
