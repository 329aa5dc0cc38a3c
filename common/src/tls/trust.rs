//! Whom we talk to: the verdict on a peer's certificate. No sockets, no files but the `ca` one, the clock is given.

use std::{fmt, path::PathBuf};

use jiff::Timestamp;
use pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};

use super::CredentialsError;
use crate::identity::{Fingerprint, certificates};

/// Which certificates of a peer are good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peers {
    /// Exactly these.
    Pinned(Vec<Fingerprint>),
    /// Those that one of the authorities in a PEM file issued for this name.
    Ca {
        /// The PEM file.
        file: PathBuf,
        /// A DNS name or an IP address that must be in the certificate; see [`is_peer_name`].
        peer_name: String,
    },
}

impl fmt::Display for Peers {
    /// What is expected, for error messages.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pinned(pins) => {
                for (index, pin) in pins.iter().enumerate() {
                    write!(f, "{}{pin}", if index > 0 { " or " } else { "" })?;
                }
                Ok(())
            }
            Self::Ca { file, peer_name } => write!(f, "one for {peer_name:?} issued by {}", file.display()),
        }
    }
}

/// Whether a text can be the name of a peer in a certificate: a DNS name or an IP address.
pub fn is_peer_name(text: &str) -> bool {
    ServerName::try_from(text).is_ok()
}

/// A peer's certificate that is not taken: which, what was expected instead, and why.
#[derive(Debug, thiserror::Error)]
#[error("the peer's certificate {came} {why}; expected is {expected}")]
pub struct Refused {
    /// The one that came.
    pub came: Fingerprint,
    /// What is expected.
    pub expected: Peers,
    /// Why it is not taken.
    pub why: Why,
}

/// Why a peer's certificate is not taken.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Why {
    /// None of the pinned ones.
    #[error("is unknown (if it is the right one, add it to `peers` in [tls])")]
    NotPinned,
    /// Valid no more.
    #[error("expired at {0} (make a new one with `keygen`, or set the clock)")]
    Expired(Timestamp),
    /// Not valid yet.
    #[error("is not valid before {0} (is the clock right?)")]
    NotYetValid(Timestamp),
    /// Issued by nobody whom we trust.
    #[error("comes from an unknown issuer")]
    UnknownIssuer,
    /// Issued for another name.
    #[error("is for another name")]
    WrongName,
    /// Not fit for TLS, or broken.
    #[error("cannot be used ({0})")]
    Unusable(webpki::Error),
}

/// Which part the peer has in the handshake: a certificate may be limited to one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PeerRole {
    /// It called us.
    Client,
    /// We called it.
    Server,
}

/// [`Peers`] with the `ca` file read and everything parsed.
#[derive(Debug)]
pub(super) struct Trust {
    peers: Peers,
    anchors: Vec<TrustAnchor<'static>>,
    /// None when certificates are pinned: then no name matters.
    name: Option<ServerName<'static>>,
}

impl Trust {
    /// Reads the `ca` file, if there is one.
    pub(super) fn load(peers: &Peers) -> Result<Self, CredentialsError> {
        let (anchors, name) = match peers {
            Peers::Pinned(_) => (Vec::new(), None),
            Peers::Ca { file, peer_name } => {
                let name = ServerName::try_from(peer_name.clone())
                    .map_err(|_| CredentialsError::PeerName(peer_name.clone()))?;
                let issuers = certificates(file)?;
                let anchor = |issuer| anchor_from_trusted_cert(issuer).map(|anchor| anchor.to_owned());
                let anchors = issuers
                    .iter()
                    .map(anchor)
                    .collect::<Result<_, _>>()
                    .map_err(|source| CredentialsError::BadAuthority { file: file.clone(), source })?;
                (anchors, Some(name))
            }
        };
        Ok(Self { peers: peers.clone(), anchors, name })
    }

    /// What is expected of a peer.
    pub(super) fn peers(&self) -> &Peers {
        &self.peers
    }

    /// The verdict on a certificate and the intermediate ones that came with it.
    pub(super) fn judge(
        &self,
        role: PeerRole,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<Fingerprint, Box<Refused>> {
        let came = Fingerprint::of(certificate);
        let verdict = match &self.peers {
            Peers::Pinned(pins) if !pins.contains(&came) => Err(Why::NotPinned),
            Peers::Pinned(_) => still_valid(role, certificate, now),
            Peers::Ca { .. } => self.issued(role, certificate, intermediates, now),
        };
        verdict.map(|()| came).map_err(|why| Box::new(Refused { came, expected: self.peers.clone(), why }))
    }

    fn issued(
        &self,
        role: PeerRole,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Why> {
        let parsed = EndEntityCert::try_from(certificate).map_err(why)?;
        verify(&parsed, role, &self.anchors, intermediates, now).map_err(why)?;
        self.name.as_ref().map_or(Ok(()), |name| parsed.verify_is_valid_for_subject_name(name).map_err(why))
    }
}

/// Whether a pinned certificate is within its dates; who issued it does not matter.
fn still_valid(role: PeerRole, certificate: &CertificateDer<'_>, now: UnixTime) -> Result<(), Why> {
    let parsed = EndEntityCert::try_from(certificate).map_err(why)?;
    // Without any trust anchor webpki finds no issuer; but it looks at the dates before it looks for one, and before it
    // minds the CA flag, which `openssl req -x509` sets.
    match verify(&parsed, role, &[], &[], now) {
        Ok(()) | Err(webpki::Error::UnknownIssuer | webpki::Error::CaUsedAsEndEntity) => Ok(()),
        Err(error) => Err(why(error)),
    }
}

fn verify(
    certificate: &EndEntityCert<'_>,
    role: PeerRole,
    anchors: &[TrustAnchor<'_>],
    intermediates: &[CertificateDer<'_>],
    now: UnixTime,
) -> Result<(), webpki::Error> {
    let usage = match role {
        PeerRole::Client => KeyUsage::client_auth(),
        PeerRole::Server => KeyUsage::server_auth(),
    };
    let algorithms = webpki::ALL_VERIFICATION_ALGS;
    certificate.verify_for_usage(algorithms, anchors, intermediates, now, usage, None, None).map(|_| ())
}

fn why(error: webpki::Error) -> Why {
    let timestamp = |time: UnixTime| Timestamp::from_second(i64::try_from(time.as_secs()).unwrap_or(i64::MAX));
    match error {
        webpki::Error::CertExpired { not_after, .. } => Why::Expired(timestamp(not_after).unwrap_or(Timestamp::MAX)),
        webpki::Error::CertNotValidYet { not_before, .. } => {
            Why::NotYetValid(timestamp(not_before).unwrap_or(Timestamp::MAX))
        }
        webpki::Error::UnknownIssuer => Why::UnknownIssuer,
        webpki::Error::CertNotValidForName(_) => Why::WrongName,
        other => Why::Unusable(other),
    }
}
