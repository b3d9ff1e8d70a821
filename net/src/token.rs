//! The join token: one string that an operator copies from the recovery host to a production host.
//!
//! `varve1.` + base32 (lower case, no padding) of: CA fingerprint (32 bytes), secret (32), host name (1–64),
//! checksum (4). Base32 and not base64url: a double click selects all of it, and it survives software that changes
//! the case. The checksum tells a mistyped token (found here, nothing sent) from a wrong one (the receiver says so).

use crate::error::{Error, ErrorKind, Result};
use crate::hosts::check_name;

/// What every token of this version starts with.
pub const TOKEN_PREFIX: &str = "varve1.";
/// Longest token text that is looked at.
pub const TOKEN_CHARS_MAX: usize = 256;
/// Bytes of the secret.
pub const SECRET_BYTES: usize = 32;

const FINGERPRINT_BYTES: usize = 32;
const CHECKSUM_BYTES: usize = 4;
const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

/// What a joining host needs to know: which receiver, as whom, and by what right.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// SHA-256 of the receiver's CA certificate (DER).
    pub ca_fingerprint: [u8; FINGERPRINT_BYTES],
    /// The single-use secret.
    pub secret: [u8; SECRET_BYTES],
    /// The name that the host will have at the receiver.
    pub name: String,
}

impl std::fmt::Debug for JoinToken {
    /// Without the secret: tokens end up in logs through `Debug`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JoinToken").field("name", &self.name).field("secret", &"(hidden)").finish_non_exhaustive()
    }
}

impl JoinToken {
    /// The text form.
    pub fn encode(&self) -> String {
        let mut bytes = Vec::with_capacity(FINGERPRINT_BYTES + SECRET_BYTES + self.name.len() + CHECKSUM_BYTES);
        bytes.extend_from_slice(&self.ca_fingerprint);
        bytes.extend_from_slice(&self.secret);
        bytes.extend_from_slice(self.name.as_bytes());
        let sum = checksum(&bytes);
        bytes.extend_from_slice(&sum);
        let mut text = String::from(TOKEN_PREFIX);
        base32_encode(&bytes, &mut text);
        text
    }

    /// Reads the text form. White space around it is ignored, as is the case; anything else that is not exactly what
    /// [`JoinToken::encode`] writes is [`ErrorKind::MalformedToken`].
    pub fn decode(text: &str) -> Result<Self> {
        let text = text.trim();
        if text.len() > TOKEN_CHARS_MAX {
            return Err(malformed("it is too long"));
        }
        let lower = text.to_ascii_lowercase();
        let Some(body) = lower.strip_prefix(TOKEN_PREFIX) else {
            return Err(malformed("it does not start with 'varve1.'"));
        };
        let bytes =
            base32_decode(body).ok_or_else(|| malformed("it has a character that no token has, or is cut off"))?;
        let Some((content, sum)) = bytes.split_last_chunk::<CHECKSUM_BYTES>() else {
            return Err(malformed("it is cut off"));
        };
        if *sum != checksum(content) {
            return Err(malformed("its checksum does not fit: a character is wrong, missing or doubled"));
        }
        let (Some((ca_fingerprint, rest)), true) =
            (content.split_first_chunk::<FINGERPRINT_BYTES>(), content.len() > FINGERPRINT_BYTES + SECRET_BYTES)
        else {
            return Err(malformed("it is cut off"));
        };
        let Some((secret, name)) = rest.split_first_chunk::<SECRET_BYTES>() else {
            return Err(malformed("it is cut off"));
        };
        let name = std::str::from_utf8(name).map_err(|_| malformed("the host name in it is not text"))?;
        check_name(name).map_err(|error| malformed("the host name in it cannot be one").because(error))?;
        Ok(Self { ca_fingerprint: *ca_fingerprint, secret: *secret, name: name.to_owned() })
    }
}

fn malformed(why: &str) -> Error {
    Error::new(ErrorKind::MalformedToken, format!("this is not a join token: {why}"))
}

/// Over everything before it. Not against forgers (the secret is), only against slips of hand.
fn checksum(content: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut hasher = blake3::Hasher::new_derive_key("varve 2026 join token checksum");
    hasher.update(content);
    let mut sum = [0; CHECKSUM_BYTES];
    hasher.finalize_xof().fill(&mut sum);
    sum
}

fn base32_encode(bytes: &[u8], text: &mut String) {
    for chunk in bytes.chunks(5) {
        let mut block = [0u8; 8];
        block[3..3 + chunk.len()].copy_from_slice(chunk);
        let bits = u64::from_be_bytes(block);
        let chars = (chunk.len() * 8).div_ceil(5);
        for i in 0..chars {
            let index = (bits >> (35 - 5 * i)) & 31;
            text.push(char::from(ALPHABET[index as usize]));
        }
    }
}

/// `None` for a foreign character, an impossible length, or bits set in the padding (one text per value).
fn base32_decode(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() * 5 / 8);
    for chunk in text.as_bytes().chunks(8) {
        let mut bits = 0u64;
        for (i, &c) in chunk.iter().enumerate() {
            let value = ALPHABET.iter().position(|&a| a == c)? as u64;
            bits |= value << (35 - 5 * i);
        }
        let whole = chunk.len() * 5 / 8;
        if (whole * 8).div_ceil(5) != chunk.len() || bits.trailing_zeros() < (40 - whole * 8) as u32 {
            return None;
        }
        bytes.extend_from_slice(&bits.to_be_bytes()[3..3 + whole]);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> JoinToken {
        JoinToken { ca_fingerprint: [0xA5; 32], secret: [7; 32], name: "db-1.example".into() }
    }

    #[test]
    fn the_text_form_is_frozen() {
        let text = sample().encode();
        assert_eq!(
            text,
            "varve1.uws2ljnfuws2ljnfuws2ljnfuws2ljnfuws2ljnfuws2ljnfuwsqobyha4dqobyha4dqobyha4dqobyha4dqobyha4dqobyha4dqob3emiwtcltfpbqw24dmmxmqwbjq",
            "tokens that are under way must stay readable"
        );
    }

    #[test]
    fn debug_hides_the_secret() {
        assert!(!format!("{:?}", sample()).contains("7, 7"));
    }

    #[test]
    fn every_slip_of_one_character_is_found() {
        let text = sample().encode();
        for at in TOKEN_PREFIX.len()..text.len() {
            let mut slipped = text.clone().into_bytes();
            slipped[at] = if slipped[at] == b'a' { b'b' } else { b'a' };
            let slipped = String::from_utf8(slipped).expect("ASCII");
            let error = JoinToken::decode(&slipped).expect_err("a slip must be found");
            assert_eq!(error.kind(), ErrorKind::MalformedToken);
            let cut = &text[..at];
            assert_eq!(JoinToken::decode(cut).expect_err("cut off").kind(), ErrorKind::MalformedToken);
        }
        for bad in ["", "varve1.", "varve2.aaaa", "varve1.a", &"varve1.a".repeat(100)] {
            assert_eq!(JoinToken::decode(bad).expect_err("not a token").kind(), ErrorKind::MalformedToken);
        }
    }

    proptest! {
        #[test]
        fn any_token_comes_back(ca in any::<[u8; 32]>(), secret in any::<[u8; 32]>(), name in "[a-z0-9][a-z0-9._-]{0,63}") {
            let token = JoinToken { ca_fingerprint: ca, secret, name };
            let text = token.encode();
            prop_assert!(text.len() <= TOKEN_CHARS_MAX);
            prop_assert_eq!(JoinToken::decode(&format!(" {}\n", text.to_ascii_uppercase())).expect("own token"), token);
        }

        #[test]
        fn decoding_never_panics_and_has_one_text_per_value(text in "(varve1\\.)?[ -~]{0,300}|(varve1\\.)[a-z2-7]{0,249}|\\PC{0,64}") {
            if let Ok(token) = JoinToken::decode(&text) {
                prop_assert_eq!(token.encode(), text.trim().to_ascii_lowercase());
            }
        }

        #[test]
        fn base32_is_strict(bytes in proptest::collection::vec(any::<u8>(), 0..64), text in "[a-z2-7]{0,40}") {
            let mut encoded = String::new();
            base32_encode(&bytes, &mut encoded);
            prop_assert_eq!(base32_decode(&encoded), Some(bytes));
            if let Some(bytes) = base32_decode(&text) {
                let mut again = String::new();
                base32_encode(&bytes, &mut again);
                prop_assert_eq!(again, text);
            }
        }
    }
}
