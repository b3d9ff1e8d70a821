//! Enrolment, both sides: one request and one reply on one stream of a `varve-join/1` connection.
//!
//! ```text
//! request: "VJQ1" secret[32]
//! reply:   "VJA1" status:u8   and if status is 0:   name (u8 length)  certificate DER (u16 LE)  CA DER (u16 LE)
//! ```
//! The host's key needs no field: it is the one with which the host proved its join certificate in the handshake.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls_pki_types::CertificateDer;
use tokio::time::timeout;

use crate::connect::{self, Purpose, explain};
use crate::endpoint::{Accepted, CloseCode, Peer};
use crate::error::{Error, ErrorKind, Result};
use crate::hosts::{Hosts, RedeemError};
use crate::identity::{Authority, HostIdentity, HostKey, fingerprint};
use crate::tls;
use crate::token::{JoinToken, SECRET_BYTES};

/// Largest message of the enrolment, checked before anything is allocated for it.
pub const JOIN_MESSAGE_BYTES_MAX: usize = 8 << 10;
/// The longest that each side waits for the other.
pub const JOIN_TIMEOUT: Duration = Duration::from_secs(10);

const REQUEST_MAGIC: [u8; 4] = *b"VJQ1";
const REPLY_MAGIC: [u8; 4] = *b"VJA1";

/// What the receiver answers.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Reply {
    Granted { name: String, certificate: Vec<u8>, ca: Vec<u8> },
    Refused(Refusal),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Refusal {
    Unknown = 1,
    Used = 2,
    Expired = 3,
    Failed = 4,
}

/// Enrols this machine at the receiver at `addr` (`HOST:PORT`; the port may be left out). Nothing is written: the
/// caller saves the identity.
pub async fn join(addr: &str, token: &JoinToken) -> Result<HostIdentity> {
    let key = HostKey::generate()?;
    let config = tls::join_config(token, &key)?;
    let dialled = connect::dial(addr, config, Purpose::Join).await?;
    let outcome = timeout(JOIN_TIMEOUT, ask(&dialled.connection, token, &key, addr)).await;
    CloseCode::Done.close(&dialled.connection);
    // So that the receiver learns of the close and need not wait for it. A lost packet is no failure.
    let _ = timeout(Duration::from_secs(1), dialled.endpoint.wait_idle()).await;
    outcome.unwrap_or_else(|_| {
        Err(Error::new(
            ErrorKind::Timeout,
            format!("the receiver at {addr} did not answer the join in {JOIN_TIMEOUT:?}"),
        )
        .with_hint(
            "look at the receiver's log; the token may be used up by now: make a new one with 'varve host invite NAME'",
        ))
    })
}

async fn ask(connection: &quinn::Connection, token: &JoinToken, key: &HostKey, addr: &str) -> Result<HostIdentity> {
    let lost = |e: quinn::ConnectionError| explain(&e, Purpose::Join, addr);
    let (mut send, mut receive) = connection.open_bi().await.map_err(lost)?;
    let mut request = REQUEST_MAGIC.to_vec();
    request.extend_from_slice(&token.secret);
    let sent = send.write_all(&request).await;
    let _ = send.finish();
    let reply = match receive.read_to_end(JOIN_MESSAGE_BYTES_MAX).await {
        Ok(bytes) => decode_reply(&bytes).ok_or_else(|| protocol(addr))?,
        Err(quinn::ReadToEndError::Read(quinn::ReadError::ConnectionLost(e))) => return Err(lost(e)),
        Err(e) => return Err(protocol(addr).because(e)),
    };
    sent.map_err(|e| protocol(addr).because(e))?;
    match reply {
        Reply::Granted { certificate, ca, .. } => {
            let ca = CertificateDer::from(ca);
            if fingerprint(&ca) != token.ca_fingerprint {
                return Err(Error::new(
                    ErrorKind::WrongCa,
                    format!("the receiver at {addr} sent another CA than the token names"),
                ));
            }
            HostIdentity::new(key, CertificateDer::from(certificate), ca)
        }
        Reply::Refused(refusal) => Err(refused(refusal, addr)),
    }
}

fn refused(refusal: Refusal, addr: &str) -> Error {
    let (kind, why) = match refusal {
        Refusal::Unknown => (ErrorKind::UnknownToken, "did not issue this token"),
        Refusal::Used => (ErrorKind::UsedToken, "says that this token was already used"),
        Refusal::Expired => (ErrorKind::ExpiredToken, "says that this token has expired or was withdrawn"),
        Refusal::Failed => {
            return Error::new(ErrorKind::Protocol, format!("the receiver at {addr} could not enrol this host"))
                .with_hint("the receiver's log says why; then make a new token there with 'varve host invite NAME'");
        }
    };
    Error::new(kind, format!("the receiver at {addr} {why}"))
}

fn protocol(addr: &str) -> Error {
    Error::new(ErrorKind::Protocol, format!("the receiver at {addr} sent something else than the answer to a join"))
}

/// Serves one accepted [`Peer::Joiner`]: redeems its secret, signs its key, records it. Returns the host's name.
/// Takes at most three times [`JOIN_TIMEOUT`].
pub async fn serve_join(accepted: &Accepted, authority: &Arc<Authority>, hosts: &Arc<Hosts>) -> Result<String> {
    let remote = accepted.remote;
    let Peer::Joiner { spki } = &accepted.peer else {
        return Err(Error::new(ErrorKind::WrongProtocol, format!("{remote} is enrolled and does not ask to join")));
    };
    let late = |_| Error::new(ErrorKind::Timeout, format!("{remote} asked to join and then took too long"));
    let (mut send, secret) = timeout(JOIN_TIMEOUT, read_request(accepted)).await.map_err(late)??;
    // The registry is synced to disk: not on a thread that serves connections.
    let work = (authority.clone(), hosts.clone(), spki.clone());
    let outcome = tokio::task::spawn_blocking(move || grant(&work.0, &work.1, &secret, &work.2))
        .await
        .map_err(|e| Error::new(ErrorKind::Io, "the join could not be worked on").because(e))?;
    let (reply, result) = match outcome {
        Ok((name, reply)) => (reply, Ok(name)),
        Err((refusal, error)) => (Reply::Refused(refusal), Err(error)),
    };
    timeout(JOIN_TIMEOUT, send_reply(accepted, &mut send, &reply)).await.map_err(late)??;
    result.map_err(|error| Error::new(error.kind(), format!("{remote} could not join")).because(error))
}

async fn read_request(accepted: &Accepted) -> Result<(quinn::SendStream, [u8; SECRET_BYTES])> {
    let remote = accepted.remote;
    let bad = || Error::new(ErrorKind::Protocol, format!("{remote} sent something else than a join request"));
    let (send, mut receive) = accepted.connection.accept_bi().await.map_err(|e| bad().because(e))?;
    let bytes = receive.read_to_end(JOIN_MESSAGE_BYTES_MAX).await.map_err(|e| bad().because(e))?;
    Ok((send, decode_request(&bytes).ok_or_else(bad)?))
}

/// The steps in their order: used up (durable), signed, enrolled (durable), and only then handed out. A crash in
/// between costs a token, never an unrecorded certificate.
fn grant(
    authority: &Authority,
    hosts: &Hosts,
    secret: &[u8; SECRET_BYTES],
    spki: &[u8],
) -> Result<(String, Reply), (Refusal, Error)> {
    let now = SystemTime::now();
    let name = hosts.redeem(secret, now).map_err(|why| {
        let (refusal, kind) = match why {
            RedeemError::Unknown => (Refusal::Unknown, ErrorKind::UnknownToken),
            RedeemError::Used => (Refusal::Used, ErrorKind::UsedToken),
            RedeemError::Expired => (Refusal::Expired, ErrorKind::ExpiredToken),
            RedeemError::NotRecorded => (Refusal::Failed, ErrorKind::Io),
        };
        (refusal, Error::new(kind, "the token was refused").because(why))
    })?;
    let failed = |error| (Refusal::Failed, error);
    let certificate = authority.sign_host_der(&name, spki).map_err(failed)?;
    hosts.enrol(&name, fingerprint(&certificate), now).map_err(failed)?;
    let reply = Reply::Granted { name: name.clone(), certificate: certificate.to_vec(), ca: authority.ca().to_vec() };
    Ok((name, reply))
}

async fn send_reply(accepted: &Accepted, send: &mut quinn::SendStream, reply: &Reply) -> Result<()> {
    let gone = || Error::new(ErrorKind::Closed, format!("{} left before it had its answer", accepted.remote));
    send.write_all(&encode_reply(reply)).await.map_err(|e| gone().because(e))?;
    let _ = send.finish();
    // The joiner closes when it has read everything; closing first could overtake the answer.
    accepted.connection.closed().await;
    Ok(())
}

fn decode_request(bytes: &[u8]) -> Option<[u8; SECRET_BYTES]> {
    let secret = bytes.strip_prefix(&REQUEST_MAGIC)?;
    secret.try_into().ok()
}

fn encode_reply(reply: &Reply) -> Vec<u8> {
    let mut bytes = REPLY_MAGIC.to_vec();
    match reply {
        Reply::Refused(refusal) => bytes.push(*refusal as u8),
        Reply::Granted { name, certificate, ca } => {
            bytes.push(0);
            // Names have at most 64 bytes, certificates of P-256 keys less than 1 KiB.
            bytes.push(name.len() as u8);
            bytes.extend_from_slice(name.as_bytes());
            for part in [certificate, ca] {
                bytes.extend_from_slice(&(part.len() as u16).to_le_bytes());
                bytes.extend_from_slice(part);
            }
        }
    }
    debug_assert!(bytes.len() <= JOIN_MESSAGE_BYTES_MAX);
    bytes
}

fn decode_reply(bytes: &[u8]) -> Option<Reply> {
    let (&status, rest) = bytes.strip_prefix(&REPLY_MAGIC)?.split_first()?;
    let refusal = match status {
        0 => return decode_granted(rest),
        1 => Refusal::Unknown,
        2 => Refusal::Used,
        3 => Refusal::Expired,
        4 => Refusal::Failed,
        _ => return None,
    };
    rest.is_empty().then_some(Reply::Refused(refusal))
}

fn decode_granted(bytes: &[u8]) -> Option<Reply> {
    let (&length, rest) = bytes.split_first()?;
    let (name, rest) = rest.split_at_checked(usize::from(length))?;
    let (certificate, rest) = split_part(rest)?;
    let (ca, rest) = split_part(rest)?;
    let name = std::str::from_utf8(name).ok()?.to_owned();
    rest.is_empty().then(|| Reply::Granted { name, certificate: certificate.to_vec(), ca: ca.to_vec() })
}

fn split_part(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<2>()?;
    rest.split_at_checked(usize::from(u16::from_le_bytes(*length)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_bytes_are_frozen() {
        let granted = Reply::Granted { name: "db".into(), certificate: vec![1, 2], ca: vec![3] };
        assert_eq!(encode_reply(&granted), b"VJA1\x00\x02db\x02\x00\x01\x02\x01\x00\x03");
        assert_eq!(encode_reply(&Reply::Refused(Refusal::Expired)), b"VJA1\x03");
        let mut request = b"VJQ1".to_vec();
        request.extend([9; 32]);
        assert_eq!(decode_request(&request), Some([9; 32]));
        request.push(0);
        assert_eq!(decode_request(&request), None);
    }

    proptest! {
        #[test]
        fn replies_come_back(name in "[a-z]{1,64}", certificate in proptest::collection::vec(any::<u8>(), 0..2000),
                             ca in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let reply = Reply::Granted { name, certificate, ca };
            let bytes = encode_reply(&reply);
            for cut in 0..bytes.len() {
                prop_assert_eq!(decode_reply(&bytes[..cut]), None);
            }
            prop_assert_eq!(decode_reply(&bytes), Some(reply));
        }

        #[test]
        fn decoding_never_panics_and_is_strict(tail in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode_request(&tail);
            let mut bytes = REPLY_MAGIC.to_vec();
            bytes.extend(tail);
            if let Some(reply) = decode_reply(&bytes) {
                prop_assert_eq!(encode_reply(&reply), bytes);
            }
        }
    }
}
