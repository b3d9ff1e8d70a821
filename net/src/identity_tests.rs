use super::*;
use std::os::unix::fs::PermissionsExt;

fn joined(authority: &Authority, name: &str) -> HostIdentity {
    let key = HostKey::generate().expect("key");
    let certificate = authority.sign_host_der(name, &key.spki()).expect("sign");
    HostIdentity::new(&key, certificate, authority.ca().clone()).expect("identity")
}

#[test]
fn an_authority_is_private_and_comes_back() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let pki = dir.path().join("pki");
    let made = Authority::create(&pki, "recovery").expect("create");
    let opened = Authority::open(&pki).expect("open");
    assert_eq!(made.fingerprint(), opened.fingerprint());
    let mode = |name: &str| std::fs::metadata(pki.join(name)).expect(name).permissions().mode() & 0o777;
    assert_eq!((mode("ca.key"), mode("server.key"), mode(".")), (0o600, 0o600, 0o700));
    let error = Authority::create(&pki, "recovery").expect_err("never overwritten");
    assert_eq!(error.kind(), ErrorKind::Identity);
    assert!(error.hint().contains("join again"));
}

#[test]
fn a_creation_that_a_crash_cut_off_starts_over() {
    let dir = tempfile::tempdir().expect("temporary directory");
    std::fs::write(dir.path().join("ca.key"), "torn").expect("left over");
    Authority::create(dir.path(), "recovery").expect("no CA certificate: nothing was handed out yet");
}

#[test]
fn missing_damaged_and_mixed_files_are_named() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    Authority::create(&a, "a").expect("create");
    Authority::create(&b, "b").expect("create");
    for name in ["ca.pem", "ca.key", "server.pem", "server.key"] {
        let good = std::fs::read(a.join(name)).expect(name);
        std::fs::write(a.join(name), "-----BEGIN NOTHING-----").expect(name);
        let error = Authority::open(&a).expect_err(name);
        assert_eq!(error.kind(), ErrorKind::Identity);
        assert!(error.to_string().contains(name), "{error}");
        std::fs::remove_file(a.join(name)).expect(name);
        assert!(Authority::open(&a).expect_err(name).to_string().contains(name));
        std::fs::write(a.join(name), good).expect(name);
    }
    std::fs::copy(b.join("ca.key"), a.join("ca.key")).expect("mix");
    assert_eq!(Authority::open(&a).expect_err("mixed").kind(), ErrorKind::Identity);
}

#[test]
fn a_host_identity_comes_back_and_is_replaced_whole() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let authority = Authority::create(&dir.path().join("ca"), "recovery").expect("create");
    let at = dir.path().join("host");
    assert!(HostIdentity::load(&at).expect_err("nothing there").hint().contains("varve join"));
    let first = joined(&authority, "db-1");
    first.save(&at).expect("save");
    let loaded = HostIdentity::load(&at).expect("load");
    assert_eq!((loaded.name(), loaded.fingerprint()), ("db-1", first.fingerprint()));
    assert_eq!(loaded.ca_fingerprint(), authority.fingerprint());
    let mode = std::fs::metadata(at.join("host.key")).expect("key").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let second = joined(&authority, "db-1");
    second.save(&at).expect("save again");
    assert_eq!(HostIdentity::load(&at).expect("load").fingerprint(), second.fingerprint());
    let other = dir.path().join("other");
    first.save(&other).expect("save");
    std::fs::copy(other.join("host.key"), at.join("host.key")).expect("mix");
    assert_eq!(HostIdentity::load(&at).expect_err("mixed").kind(), ErrorKind::Identity);
}

#[test]
fn signing_checks_name_and_key() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let authority = Authority::create(dir.path(), "recovery").expect("create");
    let spki = HostKey::generate().expect("key").spki();
    assert_eq!(authority.sign_host("no spaces", &spki).expect_err("name").kind(), ErrorKind::BadName);
    for bad in [&b""[..], b"garbage", &spki[..spki.len() - 1]] {
        assert_eq!(authority.sign_host("db-1", bad).expect_err("key").kind(), ErrorKind::Crypto);
    }
    let pem = authority.sign_host("db-1", &spki).expect("sign");
    assert!(pem.starts_with("-----BEGIN CERTIFICATE-----"));
    let twice = [authority.sign_host_der("db-1", &spki), authority.sign_host_der("db-1", &spki)];
    let [a, b] = twice.map(|c| fingerprint(&c.expect("sign")));
    assert_ne!(a, b, "a host that joins twice with one key still has two certificates");
}

#[test]
fn garbage_is_no_certificate() {
    for bad in [&b""[..], b"\x30", b"\x30\x82\xff\xff", &[0xff; 300]] {
        assert!(subject_of(&CertificateDer::from(bad)).is_err());
    }
}

#[test]
fn pem_text_is_read_back() {
    for length in 0..150u8 {
        let der: Vec<u8> = (0..length).collect();
        let text = pem("CERTIFICATE", &der);
        let back = CertificateDer::from_pem_slice(text.as_bytes()).expect("PEM");
        assert_eq!(back.as_ref(), der);
    }
}
