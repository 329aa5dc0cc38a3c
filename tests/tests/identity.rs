//! Who may talk to whom: keys, fingerprints, certificates; and what both sides say of a stranger.

#![allow(clippy::unwrap_used)]

use std::{
    fs::{self, Permissions},
    io::{Read, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Stdio,
};

use sha2::{Digest, Sha256};
use snapferry_tests::{
    agent::Agent,
    config::{PORT, Settings, VOLUME},
    host::MIRROR_ADDRESS,
    nar,
    pair::Pair,
    pki::{self, Authority},
    programs::{self, RECEIVER, SENDER},
};

/// A fingerprint of nobody.
const NOBODY: &str = "sha256:00000000000000000000000000000000000000000000000000000000000000aa";

/// The fingerprint of the first certificate of a PEM file, computed here.
fn fingerprint(certificate: &Path) -> String {
    let pem = fs::read_to_string(certificate).unwrap();
    let body = pem.lines().skip_while(|line| !line.starts_with("-----BEGIN")).skip(1);
    let der = decode_base64(body.take_while(|line| !line.starts_with("-----END")).flat_map(str::bytes));
    Sha256::digest(der).iter().fold("sha256:".to_owned(), |text, byte| format!("{text}{byte:02x}"))
}

fn decode_base64(text: impl Iterator<Item = u8>) -> Vec<u8> {
    let (mut out, mut bits, mut held) = (Vec::new(), 0u32, 0);
    for letter in text.filter(|letter| *letter != b'=') {
        let value = match letter {
            b'A'..=b'Z' => letter - b'A',
            b'a'..=b'z' => letter - b'a' + 26,
            b'0'..=b'9' => letter - b'0' + 52,
            b'+' => 62,
            _ => 63,
        };
        (bits, held) = (bits << 6 | u32::from(value), held + 6);
        if held >= 8 {
            held -= 8;
            out.push((bits >> held) as u8);
        }
    }
    out
}

#[test]
fn keygen_makes_a_secret_key_and_says_the_fingerprint() {
    let pair = Pair::new();
    for (program, stem, dir, said) in [
        (SENDER, "sender", &pair.places.sender, &pair.sender_fingerprint),
        (RECEIVER, "receiver", &pair.places.receiver, &pair.receiver_fingerprint),
    ] {
        let (key, certificate) = (dir.join(format!("{stem}.key")), dir.join(format!("{stem}.crt")));
        assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(&fingerprint(&certificate), said);
        let run = |arguments: [&Path; 2]| Agent::start(pair.head.command(programs::path(program)), arguments).wait();
        let shown = run(["fingerprint".as_ref(), &certificate]).expect(0);
        assert_eq!(shown.stdout.trim(), said);
        let before = fs::read(&key).unwrap();
        run(["keygen".as_ref(), dir]).expect(1).expect_said(&format!("{stem}.key"));
        assert_eq!(fs::read(&key).unwrap(), before, "a key must not be overwritten");
    }
    assert_ne!(pair.sender_fingerprint, pair.receiver_fingerprint);
}

#[test]
fn a_receiver_that_is_somebody_else_is_not_given_anything() {
    let pair = Pair::new();
    nar::grow(&pair.places.source, 100_000, 1).unwrap();
    let trusts = Some(format!("peers = [\"{NOBODY}\"]"));
    pair.configure(&Settings { sender_trusts: trusts, ..Settings::default() });
    let receiver = pair.start_receiver();
    let ended = pair.run_once().expect(4);
    ended.expect_said(&pair.receiver_fingerprint).expect_said(NOBODY);
    receiver.wait_for("peer refused");
    assert!(pair.replicas().is_empty());
}

#[test]
fn a_sender_that_is_somebody_else_is_not_let_in() {
    let pair = Pair::new();
    nar::grow(&pair.places.source, 100_000, 1).unwrap();
    let trusts = Some(format!("peers = [\"{NOBODY}\"]"));
    pair.configure(&Settings { receiver_trusts: trusts, ..Settings::default() });
    let receiver = pair.start_receiver();
    // The sender learns which of its certificates was not taken.
    pair.run_once().expect(4).expect_said(&pair.sender_fingerprint);
    let refused = receiver.wait_for("peer refused");
    for part in [NOBODY, &pair.sender_fingerprint] {
        assert!(refused.text("error").contains(part), "{part} is missing in {refused:?}");
    }
    assert!(receiver.log().all("peer connected").is_empty());
    assert!(pair.replicas().is_empty());
}

#[test]
fn one_of_several_pinned_certificates_is_enough() {
    let pair = Pair::new();
    let trusts = Some(format!("peers = [\"{NOBODY}\", \"{}\"]", pair.sender_fingerprint));
    pair.configure(&Settings { receiver_trusts: trusts, ..Settings::default() });
    let _receiver = pair.start_receiver();
    pair.ferry();
    pair.assert_arrived();
}

#[test]
fn expired_certificates_are_refused_by_either_side_even_if_pinned() {
    for expired in [SENDER, RECEIVER] {
        let pair = Pair::new();
        let (dir, stem) = match expired {
            SENDER => (&pair.places.sender, "sender"),
            _ => (&pair.places.receiver, "receiver"),
        };
        pki::expired(dir, stem);
        let pinned = Some(format!("peers = [\"{}\"]", fingerprint(&dir.join(format!("{stem}.crt")))));
        let settings = match expired {
            SENDER => Settings { receiver_trusts: pinned, ..Settings::default() },
            _ => Settings { sender_trusts: pinned, ..Settings::default() },
        };
        pair.configure(&settings);
        let receiver = pair.start_receiver();
        let ended = pair.run_once().expect(4);
        let refused = receiver.wait_for("peer refused");
        let verdict = if expired == SENDER { refused.text("error").to_owned() } else { ended.log.as_text() };
        assert!(verdict.contains("expired"), "{verdict}");
        assert!(pair.replicas().is_empty());
    }
}

#[test]
fn an_authority_vouches_for_both() {
    let pair = Pair::new();
    let authority = Authority::new();
    let ca = authority.write(&pair.lab.path().join("ca"));
    let trusts = |name: &str| Some(format!("ca = {ca:?}\npeer_name = \"{name}\""));
    authority.issue(&pair.places.sender, "sender", "head.example.org");
    authority.issue(&pair.places.receiver, "receiver", "mirror.example.org");
    let good = Settings {
        sender_trusts: trusts("mirror.example.org"),
        receiver_trusts: trusts("head.example.org"),
        ..Settings::default()
    };
    pair.configure(&good);
    let receiver = pair.start_receiver();
    pair.ferry();
    pair.assert_arrived();

    // The authority's word, but for somebody else.
    pair.configure(&Settings { sender_trusts: trusts("other.example.org"), ..good.clone() });
    pair.run_once().expect(4).expect_said("other.example.org");
    pair.configure(&good);
    authority.issue(&pair.places.sender, "sender", "other.example.org");
    pair.run_once().expect(4);
    receiver.wait_where("peer refused", |event| event.text("error").contains("head.example.org"));
    // Somebody else's word.
    Authority::new().issue(&pair.places.sender, "sender", "head.example.org");
    let before = receiver.log().all("peer refused").len();
    pair.run_once().expect(4);
    snapferry_tests::wait::until("that is refused, too", || {
        (receiver.log().all("peer refused").len() > before).then_some(())
    });
}

#[test]
fn a_key_that_others_can_read_is_refused() {
    let pair = Pair::new();
    for mode in [0o644, 0o640, 0o604] {
        fs::set_permissions(pair.places.sender.join("sender.key"), Permissions::from_mode(mode)).unwrap();
        fs::set_permissions(pair.places.receiver.join("receiver.key"), Permissions::from_mode(mode)).unwrap();
        pair.run_once().expect(2).expect_said("sender.key").expect_said("chmod 600");
        pair.receiver(&["run"]).wait().expect(2).expect_said("receiver.key").expect_said("chmod 600");
    }
}

#[test]
fn a_key_and_a_certificate_that_do_not_belong_together_are_refused() {
    let pair = Pair::new();
    fs::copy(pair.places.sender.join("sender.crt"), pair.places.receiver.join("receiver.crt")).unwrap();
    pair.receiver(&["run"]).wait().expect(2).expect_said("receiver.crt");
}

#[test]
fn whoever_speaks_no_tls_or_nothing_at_all_disturbs_nobody() {
    let pair = Pair::new();
    let mut receiver = pair.start_receiver();
    let connect = || {
        let script = format!("exec 3<>/dev/tcp/{MIRROR_ADDRESS}/{PORT}; cat >&3");
        pair.head.command("bash").args(["-c", &script]).stdin(Stdio::piped()).spawn().unwrap()
    };
    // These stay connected and silent while the cycle goes on.
    let silent: Vec<_> = (0..20).map(|_| connect()).collect();
    let mut noisy = connect();
    let mut noise = vec![0; 100_000];
    fastrand::fill(&mut noise);
    // The receiver may hang up in the middle.
    let _ = noisy.stdin.as_mut().unwrap().write_all(&noise);
    receiver.wait_for("peer refused");
    let mut web = connect();
    let _ = web.stdin.as_mut().unwrap().write_all(b"GET / HTTP/1.0\r\n\r\n");
    pair.ferry();
    pair.assert_arrived();
    assert!(receiver.is_running());
    for mut stranger in silent.into_iter().chain([noisy, web]) {
        let _ = stranger.kill();
        let _ = stranger.wait();
    }
}

#[test]
fn a_client_without_a_certificate_is_refused_and_so_is_an_old_protocol() {
    let pair = Pair::new();
    let receiver = pair.start_receiver();
    let openssl = |more: &[&str]| {
        let to = format!("{MIRROR_ADDRESS}:{PORT}");
        let mut command = pair.head.command("openssl");
        command.args(["s_client", "-quiet", "-alpn", "snapferry/1", "-connect", &to]).args(more);
        let mut child = command.stdin(Stdio::piped()).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(!child.wait().unwrap().success(), "{said}");
        said
    };
    openssl(&[]);
    let refused = receiver.wait_for("peer refused");
    assert!(refused.text("error").contains("certificate"), "{refused:?}");
    let (certificate, key) = (pair.places.sender.join("sender.crt"), pair.places.sender.join("sender.key"));
    let ours = ["-cert", certificate.to_str().unwrap(), "-key", key.to_str().unwrap()];
    openssl(&[&ours[..], &["-tls1_2"]].concat());
    openssl(&[&ours[..], &["-alpn", "http/1.1"]].concat());
    assert!(receiver.log().all("peer connected").is_empty(), "{VOLUME}: {}", receiver.log().as_text());
}
