//! How an operator's command reaches the running agent: a socket in the state directory, for root alone.
//!
//! One connection, one request, one reply: a line of JSON each way. If no agent runs, the command does the same itself, under the
//! lock of the volume.

use std::{
    fs,
    io::{self, BufRead, BufReader, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream as Blocking},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use common::exit::chain;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    task::spawn_blocking,
    time::timeout,
};

use crate::{
    config::Config,
    operator::{Request, RequestError},
    session::Host,
    volume::{Volume, VolumeError},
};

/// The name of the socket in the state directory.
const SOCKET: &str = "control.sock";

/// A request is a name and a sentence. What is longer is not read to its end.
const MAX_REQUEST_BYTES: u64 = 16 << 10;

/// A client that says nothing does not hold a task for longer.
const MAX_REQUEST_TIME: Duration = Duration::from_secs(10);

/// How long an operator waits for the answer: more than the agent takes in any case, unless the file system hangs.
const MAX_REPLY_TIME: Duration = Duration::from_secs(120);

/// What the agent answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Reply {
    /// What was done.
    Done(String),
    /// Why nothing was done.
    Failed(String),
}

/// Why a command of an operator is not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The volume is not in the configuration.
    #[error("no [[volume]] of the configuration has the name {0}")]
    NoVolume(String),
    /// There is a socket, but no conversation.
    #[error("cannot talk to the running agent at {path}")]
    Talk {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The agent said no.
    #[error("{0}")]
    Refused(String),
    /// No agent runs, and the volume cannot be opened without one.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// No agent runs, and it cannot be done.
    #[error(transparent)]
    Request(#[from] RequestError),
}

/// Has a request carried out, by the running agent or, if there is none, here. Returns what to tell the operator.
///
/// # Errors
/// See [`ControlError`].
pub fn request(config: &Config, request: &Request) -> Result<String, ControlError> {
    let Some(volume) = config.volumes.iter().find(|volume| volume.name == *request.volume()) else {
        return Err(ControlError::NoVolume(request.volume().to_string()));
    };
    let path = config.agent.state_dir.join(SOCKET);
    match ask(&path, request) {
        Ok(Some(Reply::Done(text))) => Ok(text),
        Ok(Some(Reply::Failed(why))) => Err(ControlError::Refused(why)),
        Ok(None) => Ok(Volume::open(volume, &config.agent.state_dir)?.obey(request)?),
        Err(source) => Err(ControlError::Talk { path, source }),
    }
}

/// Asks the agent that listens at `path`; None if nobody does.
fn ask(path: &Path, request: &Request) -> io::Result<Option<Reply>> {
    let mut stream = match Blocking::connect(path) {
        Ok(stream) => stream,
        // A socket file that an agent left behind when it was killed refuses connections.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    stream.set_read_timeout(Some(MAX_REPLY_TIME))?;
    stream.write_all(&line(request)?)?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    Ok(Some(serde_json::from_str(&answer)?))
}

/// The socket of a running agent.
#[derive(Debug)]
pub struct Control {
    listener: UnixListener,
    path: PathBuf,
}

impl Control {
    /// Listens in `state_dir`. The caller holds the locks of its volumes.
    ///
    /// # Errors
    /// The socket cannot be made; or another agent, with other volumes, listens there: each needs a state directory of its own.
    pub fn open(state_dir: &Path) -> io::Result<Self> {
        let path = state_dir.join(SOCKET);
        if Blocking::connect(&path).is_ok() {
            let text = "another agent listens there; give each a state_dir of its own";
            return Err(io::Error::new(io::ErrorKind::AddrInUse, text));
        }
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        Ok(Self { listener, path })
    }

    /// Where it listens.
    pub fn path(state_dir: &Path) -> PathBuf {
        state_dir.join(SOCKET)
    }

    /// Serves operators until the shutdown.
    pub async fn serve(self, host: Arc<Host>) {
        loop {
            tokio::select! {
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        tokio::spawn(answer(stream, Arc::clone(&host)));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept an operator's connection");
                        tokio::time::sleep(Duration::from_millis(200)).await;
                    }
                },
                () = host.shutdown.cancelled() => return,
            }
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// One request. A client that misbehaves gets no answer, or one that says so.
async fn answer(mut stream: UnixStream, host: Arc<Host>) {
    // The mode of the socket says it already, but not in the moment between its making and its mode.
    let is_root = stream.peer_cred().is_ok_and(|peer| peer.uid() == 0);
    let reply = match timeout(MAX_REQUEST_TIME, read(&mut stream)).await {
        Ok(Ok(request)) if is_root => carry_out(request, &host).await,
        Ok(Ok(_)) => Reply::Failed("only root may ask the agent for anything".to_owned()),
        Ok(Err(error)) => Reply::Failed(format!("this is no request: {error}")),
        Err(_) => return,
    };
    if let Ok(line) = line(&reply) {
        // Whoever does not wait for the answer does not get it.
        let _ = stream.write_all(&line).await;
    }
}

async fn read(stream: &mut UnixStream) -> io::Result<Request> {
    let mut text = String::new();
    tokio::io::BufReader::new(stream.take(MAX_REQUEST_BYTES)).read_line(&mut text).await?;
    Ok(serde_json::from_str(&text)?)
}

async fn carry_out(request: Request, host: &Arc<Host>) -> Reply {
    let Some(volume) = host.volumes.iter().find(|volume| volume.config.name == *request.volume()) else {
        return Reply::Failed(format!("the running agent has no volume {}; start it anew", request.volume()));
    };
    let volume = Arc::clone(volume);
    let done = spawn_blocking(move || volume.obey(&request)).await;
    host.tidy.notify_one();
    match done {
        Ok(Ok(text)) => Reply::Done(text),
        Ok(Err(error)) => Reply::Failed(chain(&error)),
        Err(_) => Reply::Failed("a thread of the agent died; please report it".to_owned()),
    }
}

fn line<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use tokio::sync::Notify;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::operator::tests::{Mirror, snapshot};

    fn host(volume: Volume) -> Arc<Host> {
        Arc::new(Host {
            volumes: vec![Arc::new(volume)],
            stream_version: 2,
            progress_interval: Duration::from_secs(10),
            reconnect_grace: Duration::ZERO,
            parkings: AtomicU64::new(0),
            shutdown: CancellationToken::new(),
            tidy: Notify::new(),
        })
    }

    fn hold(n: u64) -> Request {
        Request::Hold { snapshot: snapshot(n).name, why: "because".to_owned() }
    }

    #[tokio::test]
    async fn an_operator_is_answered_by_the_running_agent_alone() {
        let mirror = Mirror::new();
        let (path, host) = (Control::path(&mirror.state_dir()), host(mirror.start()));
        assert!(ask(&path, &hold(1)).unwrap().is_none(), "nobody listens yet");
        let serving = tokio::spawn(Control::open(&mirror.state_dir()).unwrap().serve(Arc::clone(&host)));
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(Control::open(&mirror.state_dir()).unwrap_err().to_string().contains("state_dir of its own"));

        let ours = path.clone();
        let asked = async move |request: Request| {
            let path = ours.clone();
            spawn_blocking(move || ask(&path, &request)).await.unwrap().unwrap().unwrap()
        };
        assert!(matches!(asked(hold(1)).await, Reply::Done(text) if text.contains("is held")));
        assert_eq!(host.volumes[0].wishes.lock().unwrap().state().holds[0].why, "because");
        assert!(matches!(asked(hold(9)).await, Reply::Failed(text) if text.contains("no complete snapshot")));
        let other = Request::PublishLatest { volume: "w".parse().unwrap() };
        assert!(matches!(asked(other).await, Reply::Failed(text) if text.contains("no volume w")));

        // Nonsense is answered, and does no harm.
        let nonsense = path.clone();
        let answer = spawn_blocking(move || {
            let mut stream = Blocking::connect(&nonsense).unwrap();
            stream.write_all(b"{\"do\":\"format\"}\n").unwrap();
            let mut answer = String::new();
            BufReader::new(stream).read_line(&mut answer).unwrap();
            answer
        });
        assert!(answer.await.unwrap().contains("no request"));
        assert!(matches!(asked(hold(2)).await, Reply::Done(_)));

        host.shutdown.cancel();
        serving.await.unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn what_a_killed_agent_left_behind_is_in_nobodys_way() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(SOCKET);
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists() && ask(&path, &hold(1)).unwrap().is_none());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { drop(Control::open(dir.path()).unwrap()) });
        assert!(!path.exists());
    }
}
