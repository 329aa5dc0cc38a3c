//! Where senders arrive: TCP, TLS, greeting, then a conversation each.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use common::{
    exit::chain,
    link::Link,
    tls::Acceptor,
    wire::{
        limits::MAX_GREETING_TIME,
        message::{Hello, PROTOCOL, Role},
    },
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::session::{self, Host};

/// Conversations at a time, strangers in the handshake included: a handful of senders and an operator's `plan`.
const MAX_CONNECTIONS: usize = 64;

/// Out of file descriptors or memory: accepting again at once would only spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(200);

/// How long conversations may take to end in good order after the shutdown: what they began is removed by then.
const MAX_FAREWELL: Duration = Duration::from_secs(4);

/// The open door.
pub struct Door {
    listener: TcpListener,
    acceptor: Arc<Acceptor>,
    agent: String,
}

impl Door {
    /// Listens at `address` (`host:port`).
    ///
    /// # Errors
    /// The address cannot be bound.
    pub async fn open(address: &str, acceptor: Acceptor, agent: &str) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        Ok(Self { listener, acceptor: Arc::new(acceptor), agent: agent.to_owned() })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// From the socket.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves whoever comes, until the shutdown.
    pub async fn serve(self, host: Arc<Host>) {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut conversations = JoinSet::new();
        loop {
            tokio::select! {
                accepted = self.listener.accept() => match accepted {
                    Ok((tcp, from)) => {
                        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                            tracing::warn!(%from, "too many connections, one more is turned away");
                            continue;
                        };
                        let (acceptor, host, agent) = (Arc::clone(&self.acceptor), Arc::clone(&host), self.agent.clone());
                        conversations.spawn(async move {
                            welcome(tcp, from, &acceptor, agent, &host).await;
                            drop(place);
                        });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection");
                        sleep(ACCEPT_RETRY).await;
                    }
                },
                Some(_) = conversations.join_next() => {}
                () = host.shutdown.cancelled() => break,
            }
        }
        let farewell = async { while conversations.join_next().await.is_some() {} };
        if timeout(MAX_FAREWELL, farewell).await.is_err() {
            tracing::warn!("a conversation does not end; what it leaves behind is removed at the next start");
        }
    }
}

async fn welcome(tcp: TcpStream, from: SocketAddr, acceptor: &Acceptor, agent: String, host: &Arc<Host>) {
    // Without it, acknowledgements wait for company that does not come.
    let _ = tcp.set_nodelay(true);
    let (stream, peer) = match timeout(MAX_GREETING_TIME, acceptor.accept(tcp)).await {
        Ok(Ok(accepted)) => accepted,
        Ok(Err(error)) => {
            tracing::warn!(%from, error = chain(&error), "peer refused");
            return;
        }
        Err(_) => {
            tracing::warn!(%from, "peer refused: no TLS handshake in time");
            return;
        }
    };
    let hello = Hello {
        protocol: PROTOCOL,
        role: Role::Receiver,
        agent,
        software: concat!("snapferry-receiver ", env!("CARGO_PKG_VERSION")).to_owned(),
    };
    match Link::greet(stream, &hello).await {
        Ok(link) => {
            tracing::info!(
                peer = link.peer.agent, %from, fingerprint = %peer.fingerprint, software = link.peer.software, "peer connected"
            );
            session::serve(link, host).await;
        }
        Err(error) => {
            tracing::warn!(%from, fingerprint = %peer.fingerprint, error = chain(&error), "no conversation with the peer");
        }
    }
}
