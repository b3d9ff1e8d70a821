//! Certificates and keys from a peer or a file. The receiver looks into a client's certificate before it knows who that
//! is; a host's own files go through the same reader ([`HostIdentity::load`]). A public key to be signed comes from a
//! peer with an open invitation.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::PathBuf;
use std::sync::LazyLock;
use varve_net::hosts::check_name;
use varve_net::identity::{Authority, HostIdentity, HostKey};

/// What every uncompressed P-256 key begins with as a SubjectPublicKeyInfo; 64 bytes follow.
const P256: [u8; 27] =
    *b"\x30\x59\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x03\x42\x00\x04";

struct Fixture {
    authority: Authority,
    dir: PathBuf,
}

static FIXTURE: LazyLock<Fixture> = LazyLock::new(|| {
    let dir = varve_fuzz::work_dir("identity");
    let authority = Authority::create(&dir.join("receiver"), "fuzz").expect("authority");
    let key = HostKey::generate().expect("key");
    let certificate = authority.sign_host_der("db", &key.spki()).expect("certificate");
    let identity = HostIdentity::new(&key, certificate, authority.ca().clone()).expect("identity");
    identity.save(&dir.join("host")).expect("save");
    Fixture { authority, dir: dir.join("host") }
});

fuzz_target!(|data: &[u8]| {
    let fixture = &*FIXTURE;
    let Some((what, bytes)) = data.split_first() else { return };
    match what % 4 {
        // DER in a file of ours: what a peer's certificate goes through, too.
        0 => load(fixture, "host.pem", pem(bytes).as_bytes()),
        1 => load(fixture, "host.pem", bytes),
        2 => load(fixture, "host.key", bytes),
        _ => {
            let signed = fixture.authority.sign_host_der("db", bytes);
            // Other forms are parsed and written anew; a peer has proved its key to TLS before it comes to this.
            if bytes.len() == 91 && bytes.starts_with(&P256) {
                let certificate = signed.expect("a P-256 key");
                assert!(certificate.windows(bytes.len()).any(|part| part == bytes), "the key that was asked for");
            }
        }
    }
});

/// Loads the identity with one file replaced, and puts the good one back.
fn load(fixture: &Fixture, name: &str, bytes: &[u8]) {
    let path = fixture.dir.join(name);
    let good = std::fs::read(&path).expect("read");
    std::fs::write(&path, bytes).expect("write");
    if let Ok(identity) = HostIdentity::load(&fixture.dir) {
        assert!(check_name(identity.name()).is_ok());
        assert_eq!(identity.ca_fingerprint(), fixture.authority.fingerprint());
    }
    std::fs::write(&path, good).expect("write");
}

fn pem(der: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::from("-----BEGIN CERTIFICATE-----\n");
    for chunk in der.chunks(3) {
        let mut block = [0u8; 4];
        block[1..1 + chunk.len()].copy_from_slice(chunk);
        let bits = u32::from_be_bytes(block);
        for i in 0..4 {
            let index = (bits >> (18 - 6 * i)) & 63;
            text.push(if i <= chunk.len() { char::from(ALPHABET[index as usize]) } else { '=' });
        }
    }
    text + "\n-----END CERTIFICATE-----\n"
}
