//! Keys and certificates that `keygen` does not make: expired ones, those of a CA, those with other names.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};

/// Writes a self-signed certificate that was valid in the year 2000 only, and its key, as `<stem>.crt` and `<stem>.key`.
pub fn expired(dir: &Path, stem: &str) {
    let mut params = params(stem);
    params.not_before = date_time_ymd(2000, 1, 1);
    params.not_after = date_time_ymd(2000, 12, 31);
    let key = KeyPair::generate().unwrap();
    write(dir, stem, &params.self_signed(&key).unwrap().pem(), &key);
}

/// A certificate authority.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    /// Makes one.
    #[must_use]
    pub fn new() -> Self {
        let mut params = params("authority.example.org");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Writes its certificate; returns where it is.
    #[must_use]
    pub fn write(&self, dir: &Path) -> PathBuf {
        let path = dir.join("ca.crt");
        fs::create_dir_all(dir).unwrap();
        fs::write(&path, self.0.pem()).unwrap();
        path
    }

    /// Writes a certificate with this name in it, signed by the authority, and its key, as `<stem>.crt` and `<stem>.key`.
    pub fn issue(&self, dir: &Path, stem: &str, name: &str) {
        let key = KeyPair::generate().unwrap();
        write(dir, stem, &params(name).signed_by(&key, &self.0).unwrap().pem(), &key);
    }
}

impl Default for Authority {
    fn default() -> Self {
        Self::new()
    }
}

fn params(name: &str) -> CertificateParams {
    CertificateParams::new([name.to_owned()]).unwrap()
}

fn write(dir: &Path, stem: &str, certificate: &str, key: &KeyPair) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join(format!("{stem}.crt")), certificate).unwrap();
    let path = dir.join(format!("{stem}.key"));
    fs::write(&path, key.serialize_pem()).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}
