//! To the receiver: TCP, TLS, greeting, and the first question.

use std::{io, time::Duration};

use common::{
    link::{Gone, Incoming, Link, LinkError},
    snapshot::VolumeName,
    tls::{Connector, Peer, TlsError},
    wire::message::{Hello, Inventory, PROTOCOL, Role, ToReceiver, ToSender},
};
use tokio::{net::TcpStream, time::timeout};

/// The conversation as the sender has it.
pub type ReceiverLink = Link<ToSender, ToReceiver>;

/// Where the receiver is and how to prove who we are.
pub struct Route {
    /// `host:port`.
    pub address: String,
    /// How long TCP and TLS may take together.
    pub connect_timeout: Duration,
    /// Our certificate, and whom we trust.
    pub connector: Connector,
    /// `[agent] name`.
    pub agent: String,
    /// How long a transfer waits for another connection when its own breaks.
    pub reconnect_grace: Duration,
    /// The most bytes that a transfer keeps until the receiver has them.
    pub window: u64,
}

/// Why there is no conversation with the receiver.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody answers at the address.
    #[error("the receiver at {address} cannot be reached: {source}")]
    Unreachable {
        /// As configured.
        address: String,
        /// From TCP or the resolver.
        source: io::Error,
    },
    /// TCP or TLS hangs.
    #[error("the receiver at {address} did not answer within {} s", .within.as_secs())]
    Timeout {
        /// As configured.
        address: String,
        /// As configured.
        within: Duration,
    },
    /// It is not who it should be, or does not take us for who we should be.
    #[error("the receiver at {address} and this sender do not trust each other: {source}")]
    Untrusted {
        /// As configured.
        address: String,
        /// Which fingerprint came and which were expected.
        source: TlsError,
    },
    /// TLS stands, the conversation does not.
    #[error("no conversation with the receiver at {address}: {source}")]
    Conversation {
        /// As configured.
        address: String,
        /// What went wrong.
        source: LinkError,
    },
    /// It has no volume of that name.
    #[error("the receiver at {address} does not take volume {volume}: {detail}")]
    Volume {
        /// As configured.
        address: String,
        /// The volume.
        volume: VolumeName,
        /// The receiver's words.
        detail: String,
    },
}

/// Connects and asks what the receiver has of `volume`.
///
/// # Errors
/// See [`ConnectError`]; all of them may pass by themselves or by an operator's hand, so the caller tries again.
pub async fn connect(route: &Route, volume: &VolumeName) -> Result<(ReceiverLink, Inventory), ConnectError> {
    let address = || route.address.clone();
    let tcp_and_tls = async {
        let tcp = TcpStream::connect(&route.address)
            .await
            .map_err(|source| ConnectError::Unreachable { address: address(), source })?;
        // Blocks are written whole; what waits for company is only acknowledgements and keep-alives.
        tcp.set_nodelay(true).map_err(|source| ConnectError::Unreachable { address: address(), source })?;
        route.connector.connect(tcp).await.map_err(|source| ConnectError::Untrusted { address: address(), source })
    };
    let (stream, peer) = timeout(route.connect_timeout, tcp_and_tls)
        .await
        .map_err(|_| ConnectError::Timeout { address: address(), within: route.connect_timeout })??;
    let hello = Hello {
        protocol: PROTOCOL,
        role: Role::Sender,
        agent: route.agent.clone(),
        software: concat!("snapferry-sender ", env!("CARGO_PKG_VERSION")).to_owned(),
    };
    let mut link = Link::greet(stream, &hello).await.map_err(|source| judge(address(), source, &peer))?;
    tracing::debug!(peer = %peer.fingerprint, agent = link.peer.agent, software = link.peer.software, "receiver reached");
    let inventory = query(&mut link, volume).await.map_err(|source| judge(address(), source, &peer))?;
    match inventory {
        Ok(inventory) => Ok((link, inventory)),
        Err(detail) => Err(ConnectError::Volume { address: address(), volume: volume.clone(), detail }),
    }
}

/// In TLS 1.3 a client hears only afterwards that the server did not like its certificate.
fn judge(address: String, source: LinkError, peer: &Peer) -> ConnectError {
    match source {
        LinkError::Io(error) => match peer.refusal(&error) {
            Some(source) => ConnectError::Untrusted { address, source },
            None => ConnectError::Conversation { address, source: LinkError::Io(error) },
        },
        source => ConnectError::Conversation { address, source },
    }
}

/// Asks what the receiver has of `volume`. `Ok(Err(_))`: it does not take the volume.
pub async fn query(link: &mut ReceiverLink, volume: &VolumeName) -> Result<Result<Inventory, String>, LinkError> {
    let asked = link.outbox().say(&ToReceiver::Query { volume: volume.clone() }).await;
    // If the connection is gone already, `next` knows the reason.
    let (Ok(()) | Err(Gone)) = asked;
    match link.next().await? {
        Incoming::Message(ToSender::Inventory(inventory)) => Ok(Ok(inventory)),
        Incoming::Message(ToSender::Refused { detail, .. }) => Ok(Err(detail)),
        Incoming::Message(ToSender::Abort { reason }) => Err(LinkError::Refused(reason)),
        Incoming::Message(_) | Incoming::Data(_) => Err(LinkError::OutOfTurn),
    }
}
