//! A receiver on loopback, and clients that do not keep the rules.
#![allow(dead_code, unreachable_pub, missing_docs, clippy::unwrap_used)]

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use quinn::crypto::rustls::QuicClientConfig;
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, KeyPair};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use varve_net::endpoint::{self, Accepted, Server};
use varve_net::hosts::{Hosts, invite_id};
use varve_net::identity::{Authority, HostIdentity, SERVER_NAME};
use varve_net::token::JoinToken;
use varve_net::{Result, tls};

pub const LIMIT: Duration = Duration::from_secs(30);
pub const HOUR: Duration = Duration::from_secs(3600);

pub struct Receiver {
    pub dir: tempfile::TempDir,
    pub authority: Arc<Authority>,
    pub hosts: Arc<Hosts>,
    pub server: Arc<Server>,
    pub addr: String,
}

impl Receiver {
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Arc::new(Authority::create(&dir.path().join("pki"), "recovery").unwrap());
        let hosts = Arc::new(Hosts::open(dir.path().join("hosts.json")).unwrap());
        let server = Arc::new(Server::bind(([127, 0, 0, 1], 0).into(), &authority, hosts.clone()).unwrap());
        let addr = server.local_addr().unwrap().to_string();
        Self { dir, authority, hosts, server, addr }
    }

    pub fn token(&self, name: &str, ttl: Duration) -> JoinToken {
        let secret = self.hosts.invite(name, ttl, SystemTime::now()).unwrap();
        JoinToken { ca_fingerprint: self.authority.fingerprint(), secret, name: name.into() }
    }

    pub async fn accept(&self) -> Accepted {
        within(self.server.accept()).await.unwrap()
    }

    /// The joiner's and the receiver's outcome.
    pub async fn join(&self, token: &JoinToken) -> (Result<HostIdentity>, Result<String>) {
        let serving = async { endpoint::serve_join(&self.accept().await, &self.authority, &self.hosts).await };
        within(async { tokio::join!(endpoint::join(&self.addr, token), serving) }).await
    }

    /// Joins when the receiver is expected to refuse in the handshake.
    pub async fn join_refused(&self, token: &JoinToken) -> varve_net::Error {
        within(endpoint::join(&self.addr, token)).await.expect_err("refused")
    }

    pub async fn enrolled(&self, name: &str) -> HostIdentity {
        let (identity, served) = self.join(&self.token(name, HOUR)).await;
        assert_eq!(served.unwrap(), name);
        identity.unwrap()
    }

    pub async fn session(&self, identity: &HostIdentity) -> (quinn::Connection, Accepted) {
        let (connection, accepted) =
            within(async { tokio::join!(endpoint::connect(identity, &self.addr), self.accept()) }).await;
        (connection.unwrap(), accepted)
    }
}

pub async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, work).await.expect("within the limit")
}

/// Waits for a condition, with a limit.
pub async fn until(what: &str, condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LIMIT, wait).await.unwrap_or_else(|_| panic!("never: {what}"));
}

pub type Credentials = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

pub fn self_signed(common_name: &str, organisation: Option<String>) -> Credentials {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    if let Some(organisation) = organisation {
        params.distinguished_name.push(DnType::OrganizationName, organisation);
    }
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let certificate = params.self_signed(&key).unwrap();
    (vec![certificate.der().clone()], PrivatePkcs8KeyDer::from(key.serialize_der()).into())
}

pub fn join_credentials(token: &JoinToken) -> Credentials {
    self_signed("varve-join", Some(blake3::Hash::from_bytes(invite_id(&token.secret)).to_hex().to_string()))
}

pub fn host_credentials(authority: &Authority, name: &str) -> Credentials {
    let key = KeyPair::generate().unwrap();
    let spki = rcgen::PublicKeyData::subject_public_key_info(&key);
    let certificate = authority.sign_host_der(name, &spki).unwrap();
    (vec![certificate], PrivatePkcs8KeyDer::from(key.serialize_der()).into())
}

/// A client that trusts every server and shows what it is told to.
pub fn raw_config(credentials: Option<Credentials>, alpn: &[u8]) -> quinn::ClientConfig {
    let provider = tls::provider();
    let builder = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible(provider)));
    let mut config = match credentials {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key).unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = if alpn.is_empty() { Vec::new() } else { vec![alpn.to_vec()] };
    quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(config).unwrap()))
}

/// Connects and waits for the verdict: the welcome, or why not.
pub async fn raw_dial(
    addr: &str,
    credentials: Option<Credentials>,
    alpn: &[u8],
) -> Result<quinn::Connection, quinn::ConnectionError> {
    raw_dial_with(addr, raw_config(credentials, alpn)).await
}

/// As [`raw_dial`]; a configuration that is used again keeps its session tickets.
pub async fn raw_dial_with(
    addr: &str,
    config: quinn::ClientConfig,
) -> Result<quinn::Connection, quinn::ConnectionError> {
    let endpoint = quinn::Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let connecting = endpoint.connect_with(config, addr.parse().unwrap(), SERVER_NAME).unwrap();
    within(async {
        let connection = connecting.await?;
        connection.accept_uni().await?;
        Ok(connection)
    })
    .await
}

#[derive(Debug)]
struct Gullible(Arc<CryptoProvider>);

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
