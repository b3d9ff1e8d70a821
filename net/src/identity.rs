//! Keys and certificates: the receiver's private CA, and what a host holds after it joined.
//!
//! Lifetimes are long on purpose. A disaster-recovery product must not stop at three in the morning because a
//! certificate expired, and it must work on a machine whose clock is wrong. So dates protect nothing here: validity
//! begins in 1970, ends after 20 years (CA) and 10 years (server, hosts), and trust is withdrawn at once through the
//! host registry ([`crate::hosts`]), which is asked at every handshake.
//!
//! The server's certificate is valid for one made-up name, never for an address: the receiver may move, and an agent
//! trusts whoever holds a certificate of the pinned CA.

use std::path::Path;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SerialNumber, SubjectPublicKeyInfo, date_time_ymd,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::durable::{MODE_PUBLIC, MODE_SECRET, create_private_dir, read_bounded, remove, write_atomic};
use crate::error::{Error, ErrorKind, Result};
use crate::hosts::{Fingerprint, InviteId, check_name, hex};

/// The name in every receiver's certificate, and the SNI name that clients ask for.
pub const SERVER_NAME: &str = "varve-receiver";
/// The common name of the self-signed certificate with which a host asks to join.
pub const JOIN_NAME: &str = "varve-join";
/// Life of the CA.
pub const CA_YEARS: u64 = 20;
/// Life of the certificates of server and hosts.
pub const LEAF_YEARS: u64 = 10;
/// Largest key or certificate file that is read.
pub const PEM_BYTES_MAX: usize = 64 << 10;

const CA_CERT: &str = "ca.pem";
const CA_KEY: &str = "ca.key";
const SERVER_CERT: &str = "server.pem";
const SERVER_KEY: &str = "server.key";
const HOST_CERT: &str = "host.pem";
const HOST_KEY: &str = "host.key";
const YEAR: Duration = Duration::from_secs(365 * 24 * 3600 + 6 * 3600);

/// SHA-256 of a certificate: what `openssl x509 -fingerprint -sha256` prints, so an operator can compare.
pub fn fingerprint(certificate: &CertificateDer<'_>) -> Fingerprint {
    crate::tls::sha256(certificate)
}

/// The receiver's private CA and its server certificate.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    ca: CertificateDer<'static>,
    server: CertificateDer<'static>,
    server_key: PrivateKeyDer<'static>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("ca", &hex(&self.fingerprint())).finish_non_exhaustive()
    }
}

impl Authority {
    /// Makes a new CA for the receiver `name` in `dir`. An existing one is never overwritten: every enrolled host
    /// would be locked out.
    pub fn create(dir: &Path, name: &str) -> Result<Self> {
        check_name(name)?;
        let ca_path = dir.join(CA_CERT);
        if ca_path.try_exists().map_err(|e| Error::io(format!("cannot read {}", ca_path.display()), e))? {
            return Err(Error::new(
                ErrorKind::Identity,
                format!("{} exists: this receiver is set up", ca_path.display()),
            )
            .with_hint("use it as it is; to start over (every host must join again), move the directory away first"));
        }
        create_private_dir(dir)?;
        let ca_key = new_key()?;
        let ca = ca_params(name)?.self_signed(&ca_key).map_err(|e| crypto("cannot make the CA certificate", e))?;
        let server_key = new_key()?;
        let issuer = Issuer::from_ca_cert_der(ca.der(), &ca_key).map_err(|e| crypto("cannot use the new CA", e))?;
        let server = server_params()?
            .signed_by(&server_key, &issuer)
            .map_err(|e| crypto("cannot make the server certificate", e))?;
        // The CA's certificate last: it is the mark that everything else is there.
        write_atomic(&dir.join(CA_KEY), ca_key.serialize_pem().as_bytes(), MODE_SECRET)?;
        write_atomic(&dir.join(SERVER_KEY), server_key.serialize_pem().as_bytes(), MODE_SECRET)?;
        write_atomic(&dir.join(SERVER_CERT), server.pem().as_bytes(), MODE_PUBLIC)?;
        write_atomic(&ca_path, ca.pem().as_bytes(), MODE_PUBLIC)?;
        Self::open(dir)
    }

    /// Reads what [`Authority::create`] wrote.
    pub fn open(dir: &Path) -> Result<Self> {
        let ca = read_certificate(&dir.join(CA_CERT))?;
        let ca_key = read_key_pair(&dir.join(CA_KEY))?;
        if spki_of(&ca)? != spki_of_key(&ca_key) {
            return Err(Error::new(
                ErrorKind::Identity,
                format!("{CA_KEY} does not belong to {CA_CERT} in {}", dir.display()),
            ));
        }
        let server = read_certificate(&dir.join(SERVER_CERT))?;
        let server_key = read_private_key(&dir.join(SERVER_KEY))?;
        let issuer = Issuer::from_ca_cert_der(&ca, ca_key)
            .map_err(|e| crypto(&format!("cannot use the CA in {}", dir.display()), e))?;
        Ok(Self { issuer, ca, server, server_key })
    }

    /// SHA-256 of the CA certificate (DER): what tokens carry and clients pin.
    pub fn fingerprint(&self) -> Fingerprint {
        fingerprint(&self.ca)
    }

    /// The CA certificate.
    pub fn ca(&self) -> &CertificateDer<'static> {
        &self.ca
    }

    /// The chain and key that the server shows. The CA is part of the chain: a joining host knows only its
    /// fingerprint and has to see it.
    pub fn server_chain(&self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        (vec![self.server.clone(), self.ca.clone()], self.server_key.clone_key())
    }

    /// Signs a host's public key (DER of a SubjectPublicKeyInfo, proved to be the host's by the TLS handshake of its
    /// join certificate). Returns the certificate as PEM.
    pub fn sign_host(&self, name: &str, spki: &[u8]) -> Result<String> {
        Ok(self.sign_host_certificate(name, spki)?.pem())
    }

    /// As [`Authority::sign_host`], as DER.
    pub fn sign_host_der(&self, name: &str, spki: &[u8]) -> Result<CertificateDer<'static>> {
        Ok(self.sign_host_certificate(name, spki)?.der().clone())
    }

    fn sign_host_certificate(&self, name: &str, spki: &[u8]) -> Result<Certificate> {
        check_name(name)?;
        let key =
            SubjectPublicKeyInfo::from_der(spki).map_err(|e| crypto("the host's public key cannot be used", e))?;
        let mut params = leaf_params(name)?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.signed_by(&key, &self.issuer).map_err(|e| crypto("cannot sign the host's certificate", e))
    }
}

/// The key pair that a host makes when it joins; it never leaves the host.
pub struct HostKey {
    key: KeyPair,
}

impl HostKey {
    /// A new P-256 key: fast, and every TLS library takes it.
    pub fn generate() -> Result<Self> {
        Ok(Self { key: new_key()? })
    }

    /// The self-signed certificate for the handshake of the join. It carries the invitation's id, so that the
    /// receiver refuses whoever was not invited before a single byte of his is read.
    pub(crate) fn join_certificate(&self, invite: &InviteId) -> Result<CertificateDer<'static>> {
        let mut params = leaf_params(JOIN_NAME)?;
        params.distinguished_name.push(DnType::OrganizationName, hex(invite));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.self_signed(&self.key).map_err(|e| crypto("cannot make the join certificate", e))?;
        Ok(certificate.der().clone())
    }

    /// DER of the public key's SubjectPublicKeyInfo.
    pub fn spki(&self) -> Vec<u8> {
        spki_of_key(&self.key)
    }

    pub(crate) fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialize_der()))
    }
}

/// What a host holds after it joined: its name, key and certificate, and the CA that it trusts.
pub struct HostIdentity {
    name: String,
    key: PrivateKeyDer<'static>,
    certificate: CertificateDer<'static>,
    ca: CertificateDer<'static>,
}

impl std::fmt::Debug for HostIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostIdentity").field("name", &self.name).finish_non_exhaustive()
    }
}

impl HostIdentity {
    /// Puts together what a join brought; refuses a certificate that is not for this key.
    pub fn new(key: &HostKey, certificate: CertificateDer<'static>, ca: CertificateDer<'static>) -> Result<Self> {
        if spki_of(&certificate)? != key.spki() {
            return Err(Error::new(ErrorKind::Protocol, "the receiver signed another key than ours"));
        }
        Ok(Self { name: host_name_of(&certificate)?, key: key.private_key(), certificate, ca })
    }

    /// The name under which the receiver knows this host.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// SHA-256 of this host's certificate.
    pub fn fingerprint(&self) -> Fingerprint {
        fingerprint(&self.certificate)
    }

    /// SHA-256 of the CA's certificate.
    pub fn ca_fingerprint(&self) -> Fingerprint {
        fingerprint(&self.ca)
    }

    pub(crate) fn ca(&self) -> &CertificateDer<'static> {
        &self.ca
    }

    pub(crate) fn chain(&self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        (vec![self.certificate.clone()], self.key.clone_key())
    }

    /// Writes ca.pem, host.key (0600) and host.pem into `dir`. An earlier identity is replaced: joining again is how
    /// a revoked host comes back.
    pub fn save(&self, dir: &Path) -> Result<()> {
        create_private_dir(dir)?;
        // The certificate goes first and comes last, so that a crash in between cannot pair it with a foreign key.
        let certificate = dir.join(HOST_CERT);
        remove(&certificate)?;
        write_atomic(&dir.join(CA_CERT), pem("CERTIFICATE", &self.ca).as_bytes(), MODE_PUBLIC)?;
        write_atomic(&dir.join(HOST_KEY), pem("PRIVATE KEY", self.key.secret_der()).as_bytes(), MODE_SECRET)?;
        write_atomic(&certificate, pem("CERTIFICATE", &self.certificate).as_bytes(), MODE_PUBLIC)
    }

    /// Reads what [`HostIdentity::save`] wrote.
    pub fn load(dir: &Path) -> Result<Self> {
        let hint = "run 'varve join ADDR:7443 TOKEN' on this host (the token comes from 'varve host invite NAME' on the recovery host)";
        let certificate = read_certificate(&dir.join(HOST_CERT)).map_err(|e| e.with_hint(hint))?;
        let key_pair = read_key_pair(&dir.join(HOST_KEY)).map_err(|e| e.with_hint(hint))?;
        let ca = read_certificate(&dir.join(CA_CERT)).map_err(|e| e.with_hint(hint))?;
        Self::new(&HostKey { key: key_pair }, certificate, ca).map_err(|e| {
            Error::new(ErrorKind::Identity, format!("the files in {} do not fit together", dir.display()))
                .because(e)
                .with_hint(hint)
        })
    }
}

/// The subject's common name and organisation, and whether the certificate names itself as issuer.
pub(crate) struct Subject {
    pub(crate) common_name: String,
    pub(crate) organisation: String,
    pub(crate) self_issued: bool,
    /// DER of the SubjectPublicKeyInfo.
    pub(crate) spki: Vec<u8>,
}

/// Reads the parts of a certificate that this crate looks at. Any input; never panics.
pub(crate) fn subject_of(certificate: &CertificateDer<'_>) -> Result<Subject> {
    let (rest, parsed) = x509_parser::parse_x509_certificate(certificate)
        .map_err(|e| Error::new(ErrorKind::Protocol, "not a certificate").because(e))?;
    if !rest.is_empty() {
        return Err(Error::new(ErrorKind::Protocol, "bytes after the end of a certificate"));
    }
    let subject = parsed.subject();
    let text = |value: Option<&x509_parser::x509::AttributeTypeAndValue<'_>>| {
        value.and_then(|v| v.as_str().ok()).unwrap_or_default().to_owned()
    };
    Ok(Subject {
        common_name: text(subject.iter_common_name().next()),
        organisation: text(subject.iter_organization().next()),
        self_issued: subject.as_raw() == parsed.issuer().as_raw(),
        spki: parsed.public_key().raw.to_vec(),
    })
}

fn host_name_of(certificate: &CertificateDer<'_>) -> Result<String> {
    let name = subject_of(certificate)?.common_name;
    check_name(&name)?;
    Ok(name)
}

fn spki_of(certificate: &CertificateDer<'_>) -> Result<Vec<u8>> {
    Ok(subject_of(certificate)?.spki)
}

fn spki_of_key(key: &KeyPair) -> Vec<u8> {
    rcgen::PublicKeyData::subject_public_key_info(key)
}

fn new_key() -> Result<KeyPair> {
    KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(|e| crypto("cannot make a key", e))
}

fn ca_params(name: &str) -> Result<CertificateParams> {
    let mut params = base_params(&format!("Varve CA of {name}"), CA_YEARS)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn server_params() -> Result<CertificateParams> {
    let mut params = leaf_params(SERVER_NAME)?;
    let name = SERVER_NAME.try_into().map_err(|e| crypto("the server's name is no DNS name", e))?;
    params.subject_alt_names = vec![rcgen::SanType::DnsName(name)];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    Ok(params)
}

fn leaf_params(name: &str) -> Result<CertificateParams> {
    let mut params = base_params(name, LEAF_YEARS)?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    Ok(params)
}

fn base_params(common_name: &str, years: u64) -> Result<CertificateParams> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.not_before = date_time_ymd(1970, 1, 1);
    params.not_after = (SystemTime::now() + YEAR * years as u32).into();
    // Random, so that no two certificates have the same fingerprint.
    let mut serial: [u8; 16] = rand::random();
    serial[0] = serial[0] & 0x7f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(params)
}

fn crypto(context: &str, source: rcgen::Error) -> Error {
    Error::new(ErrorKind::Crypto, context).because(source)
}

fn read_pem(path: &Path) -> Result<Vec<u8>> {
    read_bounded(path, PEM_BYTES_MAX)
        .map_err(|error| Error::new(ErrorKind::Identity, format!("{} cannot be used", path.display())).because(error))
}

fn read_certificate(path: &Path) -> Result<CertificateDer<'static>> {
    CertificateDer::from_pem_slice(&read_pem(path)?)
        .map_err(|e| Error::new(ErrorKind::Identity, format!("{} holds no certificate", path.display())).because(e))
}

fn read_private_key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_slice(&read_pem(path)?)
        .map_err(|e| Error::new(ErrorKind::Identity, format!("{} holds no private key", path.display())).because(e))
}

fn read_key_pair(path: &Path) -> Result<KeyPair> {
    let key = read_private_key(path)?;
    KeyPair::try_from(&key).map_err(|e| {
        Error::new(ErrorKind::Identity, format!("{} holds no key that can be used", path.display())).because(e)
    })
}

/// RFC 7468 text of `der`.
fn pem(label: &str, der: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const LINE_BYTES: usize = 48;
    let mut text = format!("-----BEGIN {label}-----\n");
    for line in der.chunks(LINE_BYTES) {
        for chunk in line.chunks(3) {
            let mut block = [0u8; 4];
            block[1..1 + chunk.len()].copy_from_slice(chunk);
            let bits = u32::from_be_bytes(block);
            for i in 0..4 {
                let index = (bits >> (18 - 6 * i)) & 63;
                text.push(if i <= chunk.len() { char::from(ALPHABET[index as usize]) } else { '=' });
            }
        }
        text.push('\n');
    }
    text + &format!("-----END {label}-----\n")
}

#[cfg(test)]
#[path = "identity_tests.rs"]
mod tests;
