//! TLS 1.3 with both sides authenticated. The one file that names rustls.
//!
//! There is no session resumption: a resumed session would skip the look at the certificate, and connections are few.

mod trust;

use std::{
    error::Error,
    fmt, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, InconsistentKeys,
    ServerConfig, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{
        CryptoProvider, WebPkiSupportedAlgorithms,
        ring::{self, cipher_suite::TLS13_AES_128_GCM_SHA256},
        verify_tls13_signature,
    },
    server::danger::{ClientCertVerified, ClientCertVerifier},
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};

use self::trust::{PeerRole, Trust};
pub use self::trust::{Peers, Refused, Why, is_peer_name};
use crate::{
    identity::{self, Fingerprint, IdentityError},
    wire::message::ALPN,
};

/// An encrypted connection, of either side.
pub type Stream<S> = tokio_rustls::TlsStream<BufReader<S>>;

/// How much is read from the network at once, a few records: rustls itself asks for 4 KiB, which is a system call for each of them.
const READ_BYTES: usize = 64 * 1024;

/// How long a handshake may take, both ways: ample for a slow link, short enough that idle callers do not pile up.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(20);

/// How long, and for how many bytes, a refused caller is listened to, so that it reads why before the connection is reset.
const FAREWELL_DEADLINE: Duration = Duration::from_secs(1);
const FAREWELL_BYTES: u64 = 64 * 1024;

/// Our own certificate and private key.
#[derive(Debug, Clone)]
pub struct Credentials {
    key: Arc<CertifiedKey>,
    fingerprint: Fingerprint,
}

/// What is wrong with our own certificate, key or `ca` file.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A file cannot be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Key and certificate are of two identities.
    #[error("{private_key} is not the private key of {certificate}: they must come from the same `keygen`")]
    Mismatch {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        private_key: PathBuf,
    },
    /// Key or certificate are of a kind that TLS 1.3 does not use, or broken.
    #[error("{certificate} and {private_key} cannot be used for TLS 1.3")]
    Unusable {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        private_key: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// A certificate in the `ca` file cannot be an issuer.
    #[error("{file} holds a certificate that cannot be an issuer")]
    BadAuthority {
        /// Which.
        file: PathBuf,
        /// Why.
        #[source]
        source: webpki::Error,
    },
    /// `peer_name` is no name.
    #[error("peer_name {0:?} is neither a DNS name nor an IP address")]
    PeerName(String),
}

/// Why there is no encrypted connection.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// We do not take the peer's certificate.
    #[error(transparent)]
    Refused(#[from] Box<Refused>),
    /// The peer showed no certificate.
    #[error("the peer showed no certificate; expected is {expected}")]
    NoCertificate {
        /// What is expected.
        expected: Peers,
    },
    /// The peer does not take our certificate.
    #[error("the peer refused our certificate {ours}: {reason}")]
    RefusedByPeer {
        /// Our certificate.
        ours: Fingerprint,
        /// What it says.
        reason: Reason,
    },
    /// The peer speaks TLS, but not our protocol in it.
    #[error("the peer does not speak {}: is this the right address?", ALPN.escape_ascii())]
    OtherProtocol,
    /// The peer speaks no TLS 1.3.
    #[error("no TLS 1.3 handshake with the peer: is it a snapferry agent?")]
    Handshake(#[source] io::Error),
    /// The connection broke.
    #[error("the connection broke during the TLS handshake")]
    Connection(#[source] io::Error),
    /// The handshake took too long.
    #[error("the peer did not finish the TLS handshake within {} s", HANDSHAKE_DEADLINE.as_secs())]
    TimedOut,
}

/// What a peer that refuses our certificate tells about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reason(AlertDescription);

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            AlertDescription::AccessDenied => "it is not one of those that it expects (add it to `peers` over there)",
            AlertDescription::CertificateExpired => "for it, it is expired or not valid yet (compare the clocks)",
            AlertDescription::UnknownCA => "its `ca` did not issue it",
            AlertDescription::BadCertificate => "it is not for the `peer_name` that it expects, or broken",
            AlertDescription::CertificateRequired => "it did not get one",
            _ => "it cannot use it",
        })
    }
}

/// Who is at the other end of an encrypted connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// The certificate that it proved to own.
    pub fingerprint: Fingerprint,
    /// The certificate that we showed.
    pub ours: Fingerprint,
}

impl Peer {
    /// In TLS 1.3 the calling side learns of the other's verdict on its certificate only with its first read: whether that is
    /// what an error of an established connection says. `error` may be any error that has the [`io::Error`] as a source.
    pub fn refusal(&self, error: &(dyn Error + 'static)) -> Option<TlsError> {
        let reason = certificate_alert(rustls_error(error)?)?;
        Some(TlsError::RefusedByPeer { ours: self.ours, reason })
    }
}

/// Takes calls: the server's side of TLS.
#[derive(Debug, Clone)]
pub struct Acceptor(Side);

/// Calls: the client's side of TLS.
#[derive(Debug, Clone)]
pub struct Connector(Side);

#[derive(Debug, Clone)]
struct Side {
    credentials: Credentials,
    trust: Arc<Trust>,
    provider: Arc<CryptoProvider>,
}

impl Credentials {
    /// Reads our certificate (with intermediate ones behind it, if there are any) and its private key from PEM files.
    ///
    /// # Errors
    /// If a file cannot be read, the key is open to others, or the two do not belong together.
    pub fn load(certificate: &Path, private_key: &Path) -> Result<Self, CredentialsError> {
        let chain = identity::certificates(certificate)?;
        let fingerprint = Fingerprint::of(&chain[0]);
        let key = identity::private_key(private_key)?;
        let files = || (certificate.to_owned(), private_key.to_owned());
        let key = CertifiedKey::from_der(chain, key, &ring::default_provider()).map_err(|error| {
            let (certificate, private_key) = files();
            match error {
                rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                    CredentialsError::Mismatch { certificate, private_key }
                }
                source => CredentialsError::Unusable { certificate, private_key, source },
            }
        })?;
        Ok(Self { key: Arc::new(key), fingerprint })
    }

    /// The fingerprint of our certificate.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }
}

impl Acceptor {
    /// Prepares for calls of `peers`.
    ///
    /// # Errors
    /// If the `ca` file cannot be used.
    pub fn new(credentials: &Credentials, peers: &Peers) -> Result<Self, CredentialsError> {
        Side::new(credentials, peers).map(Self)
    }

    /// Shakes hands with a caller.
    ///
    /// # Errors
    /// If it is not one of the expected peers, does not take our certificate, or speaks something else.
    pub async fn accept<S>(&self, stream: S) -> Result<(Stream<S>, Peer), TlsError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let verifier = self.0.verifier();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(self.0.server_config(&verifier)?));
        let stream = BufReader::with_capacity(READ_BYTES, stream);
        let handshake = tokio::time::timeout(HANDSHAKE_DEADLINE, acceptor.accept(stream).into_fallible());
        match handshake.await.map_err(|_| TlsError::TimedOut)? {
            Ok(stream) => self.0.established(Stream::Server(stream), &verifier),
            Err((error, stream)) => {
                let error = self.0.failure(error, &verifier);
                if !matches!(error, TlsError::Connection(_)) {
                    farewell(stream).await;
                }
                Err(error)
            }
        }
    }
}

impl Connector {
    /// Prepares for calling one of `peers`.
    ///
    /// # Errors
    /// If the `ca` file cannot be used.
    pub fn new(credentials: &Credentials, peers: &Peers) -> Result<Self, CredentialsError> {
        Side::new(credentials, peers).map(Self)
    }

    /// Shakes hands with whom we called. That it takes *our* certificate shows only with the first read: [`Peer::refusal`].
    ///
    /// # Errors
    /// If it is not one of the expected peers or speaks something else.
    pub async fn connect<S>(&self, stream: S) -> Result<(Stream<S>, Peer), TlsError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let verifier = self.0.verifier();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(self.0.client_config(&verifier)?));
        // rustls wants a name; ours is judged in `Trust`, and none is sent (`enable_sni`).
        let name = ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into());
        let stream = BufReader::with_capacity(READ_BYTES, stream);
        let handshake = tokio::time::timeout(HANDSHAKE_DEADLINE, connector.connect(name, stream));
        match handshake.await.map_err(|_| TlsError::TimedOut)? {
            Ok(stream) => self.0.established(Stream::Client(stream), &verifier),
            Err(error) => Err(self.0.failure(error, &verifier)),
        }
    }
}

/// With the suite first that the fewest rounds are needed for: nobody breaks 128 bits either, and each side has gigabytes to encrypt.
fn provider() -> CryptoProvider {
    let mut provider = ring::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != TLS13_AES_128_GCM_SHA256.suite());
    provider
}

impl Side {
    fn new(credentials: &Credentials, peers: &Peers) -> Result<Self, CredentialsError> {
        let trust = Arc::new(Trust::load(peers)?);
        Ok(Self { credentials: credentials.clone(), trust, provider: Arc::new(provider()) })
    }

    /// One a connection: it remembers its verdict.
    fn verifier(&self) -> Arc<Verifier> {
        let algorithms = self.provider.signature_verification_algorithms;
        Arc::new(Verifier { trust: self.trust.clone(), algorithms, verdict: Mutex::new(None) })
    }

    fn server_config(&self, verifier: &Arc<Verifier>) -> Result<ServerConfig, TlsError> {
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(ours)?
            .with_client_cert_verifier(verifier.clone())
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(self.credentials.key.clone())));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    fn client_config(&self, verifier: &Arc<Verifier>) -> Result<ClientConfig, TlsError> {
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(ours)?
            .dangerous() // the name of the method; the verifier is `Trust`, which is stricter than the default
            .with_custom_certificate_verifier(verifier.clone())
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(self.credentials.key.clone())));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        Ok(config)
    }

    fn established<S>(&self, stream: Stream<S>, verifier: &Verifier) -> Result<(Stream<S>, Peer), TlsError> {
        if stream.get_ref().1.alpn_protocol() != Some(ALPN) {
            return Err(TlsError::OtherProtocol);
        }
        match verifier.take_verdict() {
            Some(Ok(fingerprint)) => Ok((stream, Peer { fingerprint, ours: self.credentials.fingerprint })),
            Some(Err(refused)) => Err(refused.into()),
            None => Err(TlsError::NoCertificate { expected: self.trust.peers().clone() }),
        }
    }

    fn failure(&self, error: io::Error, verifier: &Verifier) -> TlsError {
        if let Some(Err(refused)) = verifier.take_verdict() {
            return refused.into();
        }
        match rustls_error(&error) {
            Some(rustls::Error::NoCertificatesPresented) => {
                TlsError::NoCertificate { expected: self.trust.peers().clone() }
            }
            Some(
                rustls::Error::NoApplicationProtocol
                | rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol),
            ) => TlsError::OtherProtocol,
            Some(rustls_error) => match certificate_alert(rustls_error) {
                Some(reason) => TlsError::RefusedByPeer { ours: self.credentials.fingerprint, reason },
                None => TlsError::Handshake(error),
            },
            None => TlsError::Connection(error),
        }
    }
}

/// An error of the set-up on our side, in the form of the others.
fn ours(error: rustls::Error) -> TlsError {
    TlsError::Handshake(io::Error::other(error))
}

/// Lets a refused caller read why: were the socket closed with bytes of its unread, the kernel would send a reset that
/// overtakes the alert.
async fn farewell<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S) {
    let last_words = async {
        stream.shutdown().await?;
        tokio::io::copy(&mut stream.take(FAREWELL_BYTES), &mut tokio::io::sink()).await
    };
    // Whatever comes of it: the refusal itself is what the caller of `accept` gets.
    let _ = tokio::time::timeout(FAREWELL_DEADLINE, last_words).await;
}

/// The rustls error in an error or one of its sources.
fn rustls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        // An io::Error does not name what it wraps as its source, but that one's source.
        let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        if let Some(found) = wrapped.and_then(|wrapped| wrapped.downcast_ref()).or_else(|| error.downcast_ref()) {
            return Some(found);
        }
        next = match wrapped {
            Some(wrapped) => Some(wrapped as &'a (dyn Error + 'static)),
            None => error.source(),
        };
    }
    None
}

fn certificate_alert(error: &rustls::Error) -> Option<Reason> {
    let rustls::Error::AlertReceived(alert) = error else { return None };
    let about_a_certificate = matches!(
        alert,
        AlertDescription::AccessDenied
            | AlertDescription::BadCertificate
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateRequired
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateUnknown
            | AlertDescription::NoCertificate
            | AlertDescription::UnknownCA
            | AlertDescription::UnsupportedCertificate
    );
    about_a_certificate.then_some(Reason(*alert))
}

/// Asks [`Trust`] on behalf of rustls and keeps the verdict, which rustls's own errors have no room for.
#[derive(Debug)]
struct Verifier {
    trust: Arc<Trust>,
    algorithms: WebPkiSupportedAlgorithms,
    verdict: Mutex<Option<Result<Fingerprint, Box<Refused>>>>,
}

impl Verifier {
    fn judge(
        &self,
        role: PeerRole,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let verdict = self.trust.judge(role, certificate, intermediates, now);
        // Which of these it is decides the alert that the peer gets, see `Reason`.
        let told = verdict.as_ref().map(|_| ()).map_err(|refused| match &refused.why {
            Why::NotPinned => CertificateError::ApplicationVerificationFailure,
            Why::Expired(_) => CertificateError::Expired,
            Why::NotYetValid(_) => CertificateError::NotValidYet,
            Why::UnknownIssuer => CertificateError::UnknownIssuer,
            Why::WrongName => CertificateError::NotValidForName,
            Why::Unusable(_) => CertificateError::InvalidPurpose,
        });
        *self.verdict.lock().unwrap_or_else(PoisonError::into_inner) = Some(verdict);
        told.map_err(rustls::Error::InvalidCertificate)
    }

    fn take_verdict(&self) -> Option<Result<Fingerprint, Box<Refused>>> {
        self.verdict.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// TLS 1.2 is not even compiled in; the traits ask all the same.
fn no_tls12() -> Result<HandshakeSignatureValid, rustls::Error> {
    Err(rustls::Error::PeerIncompatible(rustls::PeerIncompatible::Tls13RequiredForQuic))
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.judge(PeerRole::Server, certificate, intermediates, now).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // No hints: an agent has one certificate, and who calls need not know whom else we know.
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.judge(PeerRole::Client, certificate, intermediates, now).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests;
