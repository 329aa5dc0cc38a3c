//! Every refusal, both ways: over TCP, because only a real socket can lose the alert to a reset.

#![allow(clippy::unwrap_used)]

use std::{fs, path::Path};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::identity::keygen;

struct Agent {
    dir: TempDir,
    credentials: Credentials,
}

fn agent() -> Agent {
    let dir = tempfile::tempdir().unwrap();
    keygen(dir.path(), "agent", "agent.example.org").unwrap();
    let credentials = load(dir.path());
    Agent { dir, credentials }
}

fn load(dir: &Path) -> Credentials {
    Credentials::load(&dir.join("agent.crt"), &dir.join("agent.key")).unwrap()
}

/// An agent with a certificate of the test's making; issued by `issuer`, or by itself.
fn agent_with(issuer: Option<&Issuer<'_, KeyPair>>, change: impl FnOnce(&mut CertificateParams)) -> Agent {
    let mut params = CertificateParams::new(["agent.example.org".to_owned()]).unwrap();
    change(&mut params);
    let key = KeyPair::generate().unwrap();
    let certificate = match issuer {
        Some(issuer) => params.signed_by(&key, issuer).unwrap(),
        None => params.self_signed(&key).unwrap(),
    };
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("agent.crt"), certificate.pem()).unwrap();
    fs::write(dir.path().join("agent.key"), key.serialize_pem()).unwrap();
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    fs::set_permissions(dir.path().join("agent.key"), private).unwrap();
    let credentials = load(dir.path());
    Agent { dir, credentials }
}

fn authority(dir: &Path) -> Issuer<'static, KeyPair> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "test authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    fs::write(dir.join("ca.crt"), params.self_signed(&key).unwrap().pem()).unwrap();
    Issuer::new(params, key)
}

fn pinned(agent: &Agent) -> Peers {
    Peers::Pinned(vec![agent.credentials.fingerprint()])
}

/// What each side has in the end: the client's includes its first read, the answer to one byte.
struct Outcome {
    server: Result<Peer, TlsError>,
    client: Result<Peer, TlsError>,
}

async fn meet(client: (&Agent, Peers), server: (&Agent, Peers)) -> Outcome {
    let connector = Connector::new(&client.0.credentials, &client.1).unwrap();
    let acceptor = Acceptor::new(&server.0.credentials, &server.1).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serve = async {
        let (stream, _) = listener.accept().await.unwrap();
        let (mut stream, peer) = acceptor.accept(stream).await?;
        let byte = stream.read_u8().await.map_err(TlsError::Connection)?;
        stream.write_u8(byte + 1).await.unwrap();
        stream.shutdown().await.unwrap();
        Ok(peer)
    };
    let call = async {
        let stream = TcpStream::connect(address).await.unwrap();
        let (mut stream, peer) = connector.connect(stream).await?;
        // A failed write does not matter: the reason is there to be read.
        let _ = stream.write_u8(41).await;
        let _ = stream.flush().await;
        match stream.read_u8().await {
            Ok(byte) => {
                assert_eq!(byte, 42);
                Ok(peer)
            }
            Err(error) => Err(peer.refusal(&error).unwrap_or(TlsError::Connection(error))),
        }
    };
    let (server, client) = tokio::join!(serve, call);
    Outcome { server, client }
}

#[tokio::test]
async fn two_agents_that_know_each_other_meet() {
    let (head, mirror, other) = (agent(), agent(), agent());
    let known = Peers::Pinned(vec![other.credentials.fingerprint(), mirror.credentials.fingerprint()]);
    let outcome = meet((&head, known), (&mirror, pinned(&head))).await;
    assert_eq!(outcome.server.unwrap().fingerprint, head.credentials.fingerprint());
    let peer = outcome.client.unwrap();
    assert_eq!(peer, Peer { fingerprint: mirror.credentials.fingerprint(), ours: head.credentials.fingerprint() });
}

#[tokio::test]
async fn an_unknown_receiver_is_refused_and_told() {
    let (head, mirror, other) = (agent(), agent(), agent());
    let outcome = meet((&head, pinned(&other)), (&mirror, pinned(&head))).await;
    let (came, expected) = (mirror.credentials.fingerprint(), other.credentials.fingerprint());
    let text = outcome.client.unwrap_err().to_string();
    assert!(
        text.contains(&format!("{came} is unknown")) && text.ends_with(&format!("expected is {expected}")),
        "{text}"
    );
    let text = outcome.server.unwrap_err().to_string();
    assert!(text.contains(&format!("refused our certificate {came}")), "{text}");
}

#[tokio::test]
async fn an_unknown_sender_is_refused_and_told() {
    let (head, mirror, other) = (agent(), agent(), agent());
    let outcome = meet((&head, pinned(&mirror)), (&mirror, pinned(&other))).await;
    let came = head.credentials.fingerprint();
    let text = outcome.server.unwrap_err().to_string();
    assert!(text.contains(&format!("{came} is unknown")), "{text}");
    assert!(text.contains(&other.credentials.fingerprint().to_string()), "{text}");
    let text = outcome.client.unwrap_err().to_string();
    assert!(text.contains(&format!("refused our certificate {came}: it is not one of those")), "{text}");
}

#[tokio::test]
async fn a_pinned_certificate_that_expired_is_refused_on_either_side() {
    let expired = agent_with(None, |params| params.not_after = date_time_ymd(2020, 2, 3));
    let good = agent();
    let outcome = meet((&expired, pinned(&good)), (&good, pinned(&expired))).await;
    let text = outcome.server.unwrap_err().to_string();
    assert!(text.contains("expired at 2020-02-03T00:00:00Z"), "{text}");
    let text = outcome.client.unwrap_err().to_string();
    assert!(text.contains("compare the clocks"), "{text}");

    let outcome = meet((&good, pinned(&expired)), (&expired, pinned(&good))).await;
    assert!(matches!(outcome.client, Err(TlsError::Refused(refused)) if matches!(refused.why, Why::Expired(_))));
    assert!(matches!(outcome.server, Err(TlsError::RefusedByPeer { .. })));
}

#[tokio::test]
async fn a_pinned_certificate_of_the_future_is_refused() {
    let early = agent_with(None, |params| params.not_before = date_time_ymd(4000, 1, 1));
    let good = agent();
    let outcome = meet((&early, pinned(&good)), (&good, pinned(&early))).await;
    assert!(matches!(outcome.server, Err(TlsError::Refused(refused)) if matches!(refused.why, Why::NotYetValid(_))));
}

#[tokio::test]
async fn a_pinned_certificate_may_come_from_anywhere() {
    let dir = tempfile::tempdir().unwrap();
    let issuer = authority(dir.path());
    let issued = agent_with(Some(&issuer), |_| ());
    // As `openssl req -x509` makes them.
    let own_authority = agent_with(None, |params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    let outcome = meet((&issued, pinned(&own_authority)), (&own_authority, pinned(&issued))).await;
    outcome.server.unwrap();
    outcome.client.unwrap();

    let expired = agent_with(Some(&issuer), |params| params.not_after = date_time_ymd(2020, 1, 1));
    let outcome = meet((&expired, pinned(&issued)), (&issued, pinned(&expired))).await;
    assert!(matches!(outcome.server, Err(TlsError::Refused(refused)) if matches!(refused.why, Why::Expired(_))));
    let expired = agent_with(None, |params| {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.not_after = date_time_ymd(2020, 1, 1);
    });
    let outcome = meet((&expired, pinned(&issued)), (&issued, pinned(&expired))).await;
    assert!(matches!(outcome.server, Err(TlsError::Refused(refused)) if matches!(refused.why, Why::Expired(_))));
}

#[tokio::test]
async fn an_authority_vouches_for_a_name() {
    let dir = tempfile::tempdir().unwrap();
    let issuer = authority(dir.path());
    let file = dir.path().join("ca.crt");
    let by_ca = |name: &str| Peers::Ca { file: file.clone(), peer_name: name.to_owned() };
    let (head, mirror) = (agent_with(Some(&issuer), |_| ()), agent_with(Some(&issuer), |_| ()));
    let outcome = meet((&head, by_ca("agent.example.org")), (&mirror, by_ca("agent.example.org"))).await;
    outcome.server.unwrap();
    outcome.client.unwrap();

    let outcome = meet((&head, by_ca("other.example.org")), (&mirror, by_ca("agent.example.org"))).await;
    let text = outcome.client.unwrap_err().to_string();
    assert!(text.contains("is for another name") && text.contains("other.example.org"), "{text}");
    let outcome = meet((&head, by_ca("agent.example.org")), (&mirror, by_ca("other.example.org"))).await;
    assert!(matches!(outcome.server, Err(TlsError::Refused(refused)) if refused.why == Why::WrongName));
    let text = outcome.client.unwrap_err().to_string();
    assert!(text.contains("peer_name"), "{text}");

    let stranger = agent();
    let outcome = meet((&stranger, by_ca("agent.example.org")), (&mirror, by_ca("agent.example.org"))).await;
    assert!(matches!(outcome.server, Err(TlsError::Refused(refused)) if refused.why == Why::UnknownIssuer));
    assert!(outcome.client.unwrap_err().to_string().contains("`ca` did not issue it"));

    let expired = agent_with(Some(&issuer), |params| params.not_after = date_time_ymd(2020, 1, 1));
    let outcome = meet((&head, by_ca("agent.example.org")), (&expired, by_ca("agent.example.org"))).await;
    assert!(matches!(outcome.client, Err(TlsError::Refused(refused)) if matches!(refused.why, Why::Expired(_))));
}

/// A caller that plays by other rules than ours.
async fn stranger_calls(mirror: &Agent, head: &Agent, config: ClientConfig) -> TlsError {
    let acceptor = Acceptor::new(&mirror.credentials, &pinned(head)).unwrap();
    let (ours, theirs) = tokio::io::duplex(65_536);
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let call = async {
        let name = ServerName::try_from("mirror").unwrap();
        if let Ok(mut stream) = connector.connect(name, theirs).await {
            let _ = stream.read_u8().await;
        }
    };
    let (accepted, ()) = tokio::join!(acceptor.accept(ours), call);
    accepted.map(|_| ()).unwrap_err()
}

fn strange_config(mirror: &Agent, head: &Agent) -> ClientConfig {
    let side = Side::new(&head.credentials, &pinned(mirror)).unwrap();
    side.client_config(&side.verifier()).unwrap()
}

#[tokio::test]
async fn a_caller_without_a_certificate_is_refused() {
    let (head, mirror) = (agent(), agent());
    let mut config = strange_config(&mirror, &head);
    config.client_auth_cert_resolver = Arc::new(NoCertificate);
    let error = stranger_calls(&mirror, &head, config).await;
    assert!(matches!(error, TlsError::NoCertificate { .. }), "{error}");
    assert!(error.to_string().contains(&head.credentials.fingerprint().to_string()), "{error}");
}

#[derive(Debug)]
struct NoCertificate;

impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

#[tokio::test]
async fn a_caller_with_another_protocol_is_refused() {
    let (head, mirror) = (agent(), agent());
    for protocols in [vec![], vec![b"h2".to_vec()]] {
        let mut config = strange_config(&mirror, &head);
        config.alpn_protocols = protocols;
        let error = stranger_calls(&mirror, &head, config).await;
        assert!(matches!(error, TlsError::OtherProtocol), "{error}");
        assert!(error.to_string().contains("snapferry/1"), "{error}");
    }
}

#[tokio::test]
async fn a_stolen_certificate_without_its_key_is_of_no_use() {
    let (head, mirror, thief) = (agent(), agent(), agent());
    let mut config = strange_config(&mirror, &head);
    let forged = CertifiedKey::new(head.credentials.key.cert.clone(), thief.credentials.key.key.clone());
    config.client_auth_cert_resolver = Arc::new(SingleCertAndKey::from(forged));
    let error = stranger_calls(&mirror, &head, config).await;
    assert!(!matches!(error, TlsError::Connection(_)), "{error}");
}

#[tokio::test]
async fn what_is_not_tls_is_named() {
    let (head, mirror) = (agent(), agent());
    let acceptor = Acceptor::new(&mirror.credentials, &pinned(&head)).unwrap();
    let (ours, mut theirs) = tokio::io::duplex(65_536);
    let call = async {
        theirs.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        drop(theirs);
    };
    let (accepted, ()) = tokio::join!(acceptor.accept(ours), call);
    assert!(matches!(accepted.map(|_| ()), Err(TlsError::Handshake(_))));

    let (ours, theirs) = tokio::io::duplex(65_536);
    drop(theirs);
    assert!(matches!(acceptor.accept(ours).await.map(|_| ()), Err(TlsError::Connection(_))));
}

#[tokio::test]
async fn a_refused_caller_that_keeps_talking_reads_why() {
    let (head, mirror, other) = (agent(), agent(), agent());
    let acceptor = Acceptor::new(&mirror.credentials, &pinned(&other)).unwrap();
    let connector = Connector::new(&head.credentials, &pinned(&mirror)).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serve = async { acceptor.accept(listener.accept().await.unwrap().0).await.map(|_| ()) };
    let call = async {
        let (mut stream, peer) = connector.connect(TcpStream::connect(address).await.unwrap()).await.unwrap();
        let _ = stream.write_all(&[7; 20_000]).await;
        let _ = stream.flush().await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        let error = stream.read_u8().await.unwrap_err();
        // Also when somebody has wrapped it.
        let wrapped = io::Error::other(error);
        peer.refusal(&wrapped).unwrap()
    };
    let (served, told) = tokio::join!(serve, call);
    assert!(matches!(served, Err(TlsError::Refused(_))));
    assert!(matches!(told, TlsError::RefusedByPeer { .. }), "{told}");
}

#[test]
fn key_and_certificate_of_two_identities_are_refused() {
    let (one, two) = (agent(), agent());
    let error = Credentials::load(&one.dir.path().join("agent.crt"), &two.dir.path().join("agent.key")).unwrap_err();
    assert!(matches!(error, CredentialsError::Mismatch { .. }), "{error}");
}

#[test]
fn a_bad_peer_name_or_authority_is_named() {
    let agent = agent();
    let peers = Peers::Ca { file: agent.dir.path().join("agent.crt"), peer_name: "not a name".to_owned() };
    let error = Acceptor::new(&agent.credentials, &peers).unwrap_err();
    assert!(matches!(error, CredentialsError::PeerName(_)), "{error}");
    let peers = Peers::Ca { file: agent.dir.path().join("agent.key"), peer_name: "name".to_owned() };
    let error = Acceptor::new(&agent.credentials, &peers).unwrap_err();
    assert!(error.to_string().contains("holds no certificate"), "{error}");
    assert!(
        is_peer_name("mirror.example.org") && is_peer_name("192.0.2.1") && !is_peer_name("a b") && !is_peer_name("")
    );
}
