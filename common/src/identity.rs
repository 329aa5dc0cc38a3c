//! Who an agent is: a private key, a self-signed certificate, and the certificate's fingerprint.
//!
//! Two agents that know each other's fingerprint need no PKI. `keygen` makes the pair of files; the operator copies the
//! fingerprint that it prints into the other agent's configuration.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    str::FromStr,
};

use jiff::{Timestamp, ToSpan, civil::Date, tz::TimeZone};
use pki_types::{
    CertificateDer, PrivateKeyDer,
    pem::{self, PemObject},
};
use rcgen::{CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose, SanType};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use sha2::{Digest, Sha256};

/// How long a generated certificate is valid, in years: longer than the machines. What ends trust in it is its removal
/// from `peers`; an expiry date would end it on some night when nobody thinks of it.
const VALID_YEARS: i32 = 20;

/// A generated certificate is valid from this many days before it was made, so that a peer with a slow clock takes it too.
const BACKDATED_DAYS: i32 = 2;

/// How a fingerprint's text begins: it names the hash.
const FINGERPRINT_PREFIX: &str = "sha256:";

/// The largest file that is read as a private key; real ones have up to 3 KiB.
const MAX_KEY_FILE_BYTES: u64 = 64 * 1024;

/// The permission bits that nobody but a private key's owner may have.
const FOREIGN_BITS: u32 = 0o077;

/// A certificate by the SHA-256 of its DER form; as text `sha256:` and 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint(pub [u8; 32]);

/// Why a text is no [`Fingerprint`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a fingerprint is sha256: and 64 hexadecimal digits, as `keygen` and `fingerprint` print it, not {0:?}")]
pub struct BadFingerprint(String);

/// What went wrong with the files of an identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A key or certificate is there already; it is never overwritten.
    #[error(
        "{0} exists already and is not overwritten: give another directory, or remove it if nobody trusts it any more"
    )]
    Exists(PathBuf),
    /// A file or directory could not be made.
    #[error("cannot write {path}")]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file could not be read.
    #[error("cannot read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is not a certificate in PEM form.
    #[error("{path} holds no certificate: it must have a PEM section that begins with -----BEGIN CERTIFICATE-----")]
    NotACertificate {
        /// Which.
        path: PathBuf,
        /// What the PEM parser says.
        #[source]
        source: pem::Error,
    },
    /// Others than its owner can read or write a private key.
    #[error(
        "the private key {path} has mode {mode:04o}, so others have access to it: `chmod 600` it (or make a new one, if they may have read it)"
    )]
    KeyOpenToOthers {
        /// Which.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A private key belongs to somebody who is neither root nor us.
    #[error("the private key {path} belongs to user {owner}, who can read it: `chown root` it")]
    KeyOfSomebodyElse {
        /// Which.
        path: PathBuf,
        /// The user id.
        owner: u32,
    },
    /// The file is not a private key in PEM form.
    #[error("{path} holds no private key: it must have a PEM section that begins with -----BEGIN PRIVATE KEY-----")]
    NotAKey {
        /// Which.
        path: PathBuf,
        /// What the PEM parser says.
        #[source]
        source: pem::Error,
    },
    /// The key or the certificate could not be made.
    #[error("cannot make a key and a certificate for {name:?}")]
    Generate {
        /// The agent's name.
        name: String,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
    /// The clock shows a date for which no certificate can be made.
    #[error("cannot make a certificate that is valid for {VALID_YEARS} years: the clock shows {0}, set it first")]
    Clock(Timestamp),
}

/// Makes a private key and a self-signed certificate for an agent, as `<dir>/<stem>.key` (mode 0600 from its first byte on)
/// and `<dir>/<stem>.crt`, and returns the fingerprint of the certificate.
///
/// `agent_name` becomes the certificate's common name and, if it can be a host name (else `stem`), its subject alternative
/// name. The directory is made if it does not exist.
///
/// # Errors
/// [`IdentityError::Exists`] if one of the two files is there; what was written by then is removed again after any error.
pub fn keygen(dir: &Path, stem: &str, agent_name: &str) -> Result<Fingerprint, IdentityError> {
    let key_file = dir.join(format!("{stem}.key"));
    let certificate_file = dir.join(format!("{stem}.crt"));
    for file in [&key_file, &certificate_file] {
        // A dangling link counts as well: nothing may be written through it.
        if file.symlink_metadata().is_ok() {
            return Err(IdentityError::Exists(file.clone()));
        }
    }
    let (key, certificate) = generate(stem, agent_name)?;
    fs::create_dir_all(dir).map_err(|source| IdentityError::Write { path: dir.to_owned(), source })?;
    write_new(&key_file, 0o600, key.serialize_pem().as_bytes())?;
    write_new(&certificate_file, 0o644, certificate.pem().as_bytes()).inspect_err(|_| {
        // A key without its certificate is of no use, and in the way of the next try.
        let _ = fs::remove_file(&key_file);
    })?;
    Ok(Fingerprint::of(certificate.der()))
}

/// The fingerprint of the (first) certificate in a PEM file.
///
/// # Errors
/// If the file cannot be read or holds no certificate.
pub fn fingerprint(file: &Path) -> Result<Fingerprint, IdentityError> {
    certificates(file).map(|chain| Fingerprint::of(&chain[0]))
}

/// All certificates of a PEM file in their order, at least one.
pub(crate) fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let text = fs::read(file).map_err(|source| IdentityError::Read { path: file.to_owned(), source })?;
    let not_one = |source| IdentityError::NotACertificate { path: file.to_owned(), source };
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&text).collect::<Result<_, _>>().map_err(not_one)?;
    if chain.is_empty() { Err(not_one(pem::Error::NoItemsFound)) } else { Ok(chain) }
}

/// The private key in a PEM file, if nobody but its owner (root or us) has access to it.
pub(crate) fn private_key(file: &Path) -> Result<PrivateKeyDer<'static>, IdentityError> {
    let failed = |source| IdentityError::Read { path: file.to_owned(), source };
    let opened = File::open(file).map_err(failed)?;
    // Of the open file, not of the path: what is judged is what is read.
    let metadata = opened.metadata().map_err(failed)?;
    let mode = metadata.mode() & 0o7777;
    if mode & FOREIGN_BITS != 0 {
        return Err(IdentityError::KeyOpenToOthers { path: file.to_owned(), mode });
    }
    let owner = metadata.uid();
    if owner != 0 && owner != rustix::process::geteuid().as_raw() {
        return Err(IdentityError::KeyOfSomebodyElse { path: file.to_owned(), owner });
    }
    let mut text = Vec::new();
    opened.take(MAX_KEY_FILE_BYTES).read_to_end(&mut text).map_err(failed)?;
    PrivateKeyDer::from_pem_slice(&text).map_err(|source| IdentityError::NotAKey { path: file.to_owned(), source })
}

fn generate(stem: &str, agent_name: &str) -> Result<(KeyPair, rcgen::Certificate), IdentityError> {
    let failed = |source| IdentityError::Generate { name: agent_name.to_owned(), source };
    let now = Timestamp::now();
    let today = now.to_zoned(TimeZone::UTC).date();
    let out_of_range = |_| IdentityError::Clock(now);
    let not_before = today.checked_sub(BACKDATED_DAYS.days()).map_err(out_of_range)?;
    let not_after = today.checked_add(VALID_YEARS.years()).map_err(out_of_range)?;
    // jiff only makes dates that exist: rcgen's function panics at others.
    let midnight =
        |day: Date| rcgen::date_time_ymd(i32::from(day.year()), day.month().unsigned_abs(), day.day().unsigned_abs());
    let host_name = if could_be_a_host_name(agent_name) { agent_name } else { stem };

    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, agent_name);
    let mut params = CertificateParams::default();
    params.distinguished_name = subject;
    params.subject_alt_names = vec![SanType::DnsName(host_name.try_into().map_err(failed)?)];
    params.not_before = midnight(not_before);
    params.not_after = midnight(not_after);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate().map_err(failed)?;
    let certificate = params.self_signed(&key).map_err(failed)?;
    Ok((key, certificate))
}

fn could_be_a_host_name(name: &str) -> bool {
    let label = |label: &str| {
        let inner = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        (1..=63).contains(&label.len()) && label.bytes().all(inner) && !label.starts_with('-') && !label.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

/// Writes a file that must not exist yet, with this mode from its creation on, and makes it durable.
fn write_new(path: &Path, mode: u32, content: &[u8]) -> Result<(), IdentityError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AlreadyExists => IdentityError::Exists(path.to_owned()),
        _ => IdentityError::Write { path: path.to_owned(), source },
    };
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(failed)?;
    let written = file.write_all(content).and_then(|()| file.sync_all()).and_then(|()| match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => File::open(dir)?.sync_all(),
        _ => File::open(".")?.sync_all(),
    });
    written
        .inspect_err(|_| {
            let _ = fs::remove_file(path);
        })
        .map_err(failed)
}

impl Fingerprint {
    /// The fingerprint of a certificate in DER form.
    pub fn of(der: &[u8]) -> Self {
        Self(Sha256::digest(der).into())
    }
}

impl FromStr for Fingerprint {
    type Err = BadFingerprint;

    fn from_str(text: &str) -> Result<Self, BadFingerprint> {
        let bad = || BadFingerprint(text.chars().take(80).collect());
        let digits = text.strip_prefix(FINGERPRINT_PREFIX).ok_or_else(bad)?.as_bytes();
        // from_str_radix would take a sign.
        if digits.len() != 64 || !digits.iter().all(u8::is_ascii_hexdigit) {
            return Err(bad());
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| bad())?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| bad())?;
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(FINGERPRINT_PREFIX)?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<'de> Deserialize<'de> for Fingerprint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

impl Serialize for Fingerprint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn keygen_writes_a_private_key_that_only_its_owner_reads() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("new/identity");
        let printed = keygen(&inner, "sender", "head").unwrap();
        let mode = fs::metadata(inner.join("sender.key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(fingerprint(&inner.join("sender.crt")).unwrap(), printed);
    }

    #[test]
    fn keygen_never_overwrites() {
        let dir = tempfile::tempdir().unwrap();
        keygen(dir.path(), "sender", "head").unwrap();
        let key = fs::read(dir.path().join("sender.key")).unwrap();
        let error = keygen(dir.path(), "sender", "head").unwrap_err();
        assert!(matches!(&error, IdentityError::Exists(path) if path.ends_with("sender.key")), "{error}");
        assert_eq!(fs::read(dir.path().join("sender.key")).unwrap(), key);

        fs::remove_file(dir.path().join("sender.key")).unwrap();
        let error = keygen(dir.path(), "sender", "head").unwrap_err();
        assert!(matches!(&error, IdentityError::Exists(path) if path.ends_with("sender.crt")), "{error}");
        assert!(!dir.path().join("sender.key").exists(), "a key without a certificate was left behind");
    }

    #[test]
    fn every_agent_name_gets_a_certificate() {
        let dir = tempfile::tempdir().unwrap();
        for (index, name) in ["mirror.example.org", "Kopf Knoten", "", "knöten", "-", "a..b"].into_iter().enumerate() {
            keygen(&dir.path().join(index.to_string()), "receiver", name).unwrap();
        }
        assert!(could_be_a_host_name("mirror.example.org"));
        assert!(!could_be_a_host_name("Kopf Knoten") && !could_be_a_host_name("") && !could_be_a_host_name("a..b"));
    }

    #[test]
    fn a_file_without_a_certificate_is_named() {
        let dir = tempfile::tempdir().unwrap();
        keygen(dir.path(), "sender", "head").unwrap();
        let error = fingerprint(&dir.path().join("sender.key")).unwrap_err();
        assert!(error.to_string().contains("sender.key holds no certificate"), "{error}");
        assert!(matches!(fingerprint(&dir.path().join("none")), Err(IdentityError::Read { .. })));
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        keygen(dir.path(), "sender", "head").unwrap();
        let key = dir.path().join("sender.key");
        private_key(&key).unwrap();
        for mode in [0o640, 0o604, 0o644, 0o620, 0o601] {
            fs::set_permissions(&key, fs::Permissions::from_mode(mode)).unwrap();
            let error = private_key(&key).unwrap_err();
            assert!(matches!(error, IdentityError::KeyOpenToOthers { mode: found, .. } if found == mode), "{error}");
        }
        fs::set_permissions(&key, fs::Permissions::from_mode(0o400)).unwrap();
        private_key(&key).unwrap();
        assert!(matches!(private_key(&dir.path().join("sender.crt")), Err(IdentityError::KeyOpenToOthers { .. })));
        fs::set_permissions(dir.path().join("sender.crt"), fs::Permissions::from_mode(0o600)).unwrap();
        assert!(matches!(private_key(&dir.path().join("sender.crt")), Err(IdentityError::NotAKey { .. })));
    }

    #[test]
    fn a_fingerprint_has_one_form() {
        let text = format!("sha256:{}", "0a".repeat(32));
        let parsed: Fingerprint = text.parse().unwrap();
        assert_eq!(parsed, Fingerprint([10; 32]));
        assert_eq!(parsed.to_string(), text);
        assert_eq!(format!("sha256:{}", "0A".repeat(32)).parse(), Ok(parsed));
        let (short, signed, hex) = ("0a".repeat(31), "+a".repeat(32), "0a".repeat(32));
        for bad in [format!("sha256:{short}"), format!("sha256:{signed}"), format!("sha1:{hex}"), hex, String::new()] {
            assert!(bad.parse::<Fingerprint>().is_err(), "{bad:?}");
        }
    }
}
