//! What is checked in the TLS handshake, on both sides. TLS 1.3 only.
//!
//! The receiver refuses in the handshake whoever is not enrolled and not invited, before a byte of his is read:
//!
//! | client certificate | accepted while | else refused with alert |
//! |---|---|---|
//! | signed by our CA | its fingerprint is enrolled in the registry | revoked: `certificate_revoked`; unknown: `access_denied` |
//! | self-signed, named `varve-join`, with an invitation's id | that invitation is open | used: `certificate_revoked`; expired: `certificate_expired`; unknown: `access_denied` |
//! | none, or any other | never | `certificate_required`, `unknown_ca`, … |
//!
//! There is no session resumption: a resumed session is not verified again, so a revoked host could come back with it.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

use crate::error::{Error, ErrorKind, Result};
use crate::hosts::{Fingerprint, Hosts, InviteId, RedeemError, Standing, hex, invite_id};
use crate::identity::{Authority, HostIdentity, HostKey, JOIN_NAME, fingerprint, subject_of};
use crate::token::JoinToken;

/// Application protocol of sessions between an enrolled host and the receiver.
pub const ALPN_SESSION: &[u8] = b"varve/1";
/// Application protocol of enrolment.
pub const ALPN_JOIN: &[u8] = b"varve-join/1";

/// The receiver's side: both protocols, client certificates mandatory, the registry asked at every handshake.
pub fn server_config(authority: &Authority, hosts: Arc<Hosts>) -> Result<QuicServerConfig> {
    let provider = provider();
    let verifier = ClientVerifier::new(authority, hosts, true, &provider)?;
    let (chain, key) = authority.server_chain();
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| tls("cannot set up TLS", e))?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(chain, key)
        .map_err(|e| tls("the server certificate and its key cannot be used", e))?;
    config.alpn_protocols = vec![ALPN_SESSION.to_vec(), ALPN_JOIN.to_vec()];
    resume_nothing(&mut config);
    QuicServerConfig::try_from(config)
        .map_err(|e| Error::new(ErrorKind::Crypto, "the TLS library lacks what QUIC needs").because(e))
}

/// For NBD over TCP: the receiver's certificate, and only enrolled hosts as clients.
pub fn nbd_config(authority: &Authority, hosts: Arc<Hosts>) -> Result<rustls::ServerConfig> {
    let provider = provider();
    let verifier = ClientVerifier::new(authority, hosts, false, &provider)?;
    let (chain, key) = authority.server_chain();
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| tls("cannot set up TLS", e))?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(chain, key)
        .map_err(|e| tls("the server certificate and its key cannot be used", e))?;
    resume_nothing(&mut config);
    Ok(config)
}

/// See the module's text.
fn resume_nothing(config: &mut rustls::ServerConfig) {
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.max_early_data_size = 0;
}

/// An enrolled host's side: the CA pinned by its certificate.
pub fn session_config(identity: &HostIdentity) -> Result<QuicClientConfig> {
    let provider = provider();
    let verifier = pinned(identity.ca().clone(), &provider).map_err(|e| tls("the receiver's CA cannot be used", e))?;
    let (chain, key) = identity.chain();
    client_config(provider, verifier, ALPN_SESSION, chain, key)
}

/// A joining host's side: the CA pinned by the fingerprint in the token.
pub fn join_config(token: &JoinToken, key: &HostKey) -> Result<QuicClientConfig> {
    let provider = provider();
    let verifier = Arc::new(FingerprintVerifier { ca: token.ca_fingerprint, provider: provider.clone() });
    let certificate = key.join_certificate(&invite_id(&token.secret))?;
    client_config(provider, verifier, ALPN_JOIN, vec![certificate], key.private_key())
}

fn client_config(
    provider: Arc<CryptoProvider>,
    verifier: Arc<dyn ServerCertVerifier>,
    alpn: &[u8],
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<QuicClientConfig> {
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| tls("cannot set up TLS", e))?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(chain, key)
        .map_err(|e| tls("this host's certificate and key cannot be used", e))?;
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    QuicClientConfig::try_from(config)
        .map_err(|e| Error::new(ErrorKind::Crypto, "the TLS library lacks what QUIC needs").because(e))
}

/// ring, with AES-128-GCM first where the CPU has AES: two rounds in seven less than AES-256, and as good for data
/// that lives as long as a connection. Both sides agree on the client's first choice.
pub fn provider() -> Arc<CryptoProvider> {
    let mut provider = ring::default_provider();
    provider.cipher_suites = vec![
        ring::cipher_suite::TLS13_AES_128_GCM_SHA256,
        ring::cipher_suite::TLS13_AES_256_GCM_SHA384,
        ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    if !cpu_has_aes() {
        provider.cipher_suites.rotate_right(1);
    }
    Arc::new(provider)
}

#[cfg(target_arch = "x86_64")]
fn cpu_has_aes() -> bool {
    std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq")
}

#[cfg(target_arch = "aarch64")]
fn cpu_has_aes() -> bool {
    std::arch::is_aarch64_feature_detected!("aes")
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn cpu_has_aes() -> bool {
    false
}

/// SHA-256, from the same library that TLS uses.
pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut digest = [0; 32];
    if let Some(suite) = ring::cipher_suite::TLS13_AES_128_GCM_SHA256.tls13() {
        let output = suite.common.hash_provider.hash(bytes);
        digest.copy_from_slice(output.as_ref());
    }
    digest
}

/// Decides about client certificates. The registry is shared and live.
#[derive(Debug)]
struct ClientVerifier {
    chain: Arc<dyn ClientCertVerifier>,
    hosts: Arc<Hosts>,
    /// Whether one who was only invited may come in: to join.
    invites: bool,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ClientVerifier {
    fn new(authority: &Authority, hosts: Arc<Hosts>, invites: bool, provider: &Arc<CryptoProvider>) -> Result<Self> {
        let roots = roots(authority.ca().clone()).map_err(|e| tls("our CA cannot be used", e))?;
        let chain = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .build()
            .map_err(|e| Error::new(ErrorKind::Crypto, "our CA cannot verify anything").because(e))?;
        Ok(Self { chain, hosts, invites, algorithms: provider.signature_verification_algorithms })
    }
}

impl ClientCertVerifier for ClientVerifier {
    /// None: a joining host's certificate has no issuer that could be hinted at.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let refuse = |why: CertificateError| Err(rustls::Error::InvalidCertificate(why));
        if let Some(invite) = invite_of(end_entity).filter(|_| self.invites) {
            return match self.hosts.invite_standing(&invite, system_time(now)) {
                Ok(()) => Ok(ClientCertVerified::assertion()),
                Err(RedeemError::Used) => refuse(CertificateError::Revoked),
                Err(RedeemError::Expired) => refuse(CertificateError::Expired),
                Err(_) => refuse(CertificateError::ApplicationVerificationFailure),
            };
        }
        let verified = self.chain.verify_client_cert(end_entity, intermediates, now)?;
        match self.hosts.standing(&fingerprint(end_entity)) {
            Standing::Enrolled(_) => Ok(verified),
            Standing::Revoked(_) => refuse(CertificateError::Revoked),
            Standing::Unknown => refuse(CertificateError::ApplicationVerificationFailure),
        }
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOffered))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Accepts a server whose chain leads to the CA with this fingerprint, and that is called `varve-receiver`.
#[derive(Debug)]
struct FingerprintVerifier {
    ca: Fingerprint,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for FingerprintVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(ca) = intermediates.iter().find(|c| fingerprint(c) == self.ca) else {
            return Err(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer));
        };
        let verifier = pinned(ca.clone().into_owned(), &self.provider)?;
        verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOffered))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// The invitation that a join certificate names; `None` if it is not a join certificate.
pub(crate) fn invite_of(certificate: &CertificateDer<'_>) -> Option<InviteId> {
    let subject = subject_of(certificate).ok()?;
    if subject.common_name != JOIN_NAME || !subject.self_issued {
        return None;
    }
    // Without a readable id it is still a join certificate: an id that no invitation has.
    let id = blake3::Hash::from_hex(&subject.organisation).map_or([0; 32], |h| *h.as_bytes());
    debug_assert!(id == [0; 32] || hex(&id) == subject.organisation.to_ascii_lowercase());
    Some(id)
}

fn roots(ca: CertificateDer<'static>) -> Result<RootCertStore, rustls::Error> {
    let mut roots = RootCertStore::empty();
    roots.add(ca)?;
    Ok(roots)
}

fn pinned(
    ca: CertificateDer<'static>,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>, rustls::Error> {
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots(ca)?), provider.clone())
        .build()
        .map_err(|e| rustls::Error::General(e.to_string()))
}

fn system_time(now: UnixTime) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(now.as_secs())
}

fn tls(context: &str, source: rustls::Error) -> Error {
    Error::new(ErrorKind::Crypto, context).because(source)
}

#[cfg(test)]
#[allow(clippy::expect_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    /// What is resumed is not verified again.
    #[test]
    fn an_exported_view_resumes_nothing() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let authority = Authority::create(&dir.path().join("pki"), "recovery").expect("authority");
        let hosts = Arc::new(Hosts::open(dir.path().join("hosts.json")).expect("registry"));
        let config = nbd_config(&authority, hosts).expect("TLS");
        let storage = &config.session_storage;
        assert!(config.send_tls13_tickets == 0 && config.max_early_data_size == 0 && !config.ticketer.enabled());
        assert!(!storage.can_cache() && !storage.put(vec![1], vec![2]) && storage.get(&[1]).is_none());
    }
}
