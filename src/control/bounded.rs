//! Listeners with few connections of strangers at a time, none of which may be silent for long, so that nobody uses up
//! the server's descriptors, which its guest needs too, or keeps others out.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep};

use super::access::is_owner;

/// Connections of strangers at a time: a few browsers and scrapers.
const CONNECTIONS_MAX: usize = 64;
/// How long one may take until it asks for something.
const FIRST_BYTE: Duration = Duration::from_secs(10);
/// How long one may be silent then: longer than an answer is put off (see [`super::api::WAIT_MAX_SECONDS`]).
const SILENCE: Duration = Duration::from_secs(90);

/// Who is at the other end.
pub(super) trait Caller {
    /// Whether it is root or the server's own user, who are never turned away.
    fn is_owner(&self) -> bool;
}

impl Caller for TcpStream {
    fn is_owner(&self) -> bool {
        false
    }
}

impl Caller for UnixStream {
    fn is_owner(&self) -> bool {
        self.peer_cred().is_ok_and(|credentials| is_owner(credentials.uid()))
    }
}

/// A listener that turns strangers away where there are too many.
pub(super) struct Bounded<L> {
    listener: L,
    free: Arc<Semaphore>,
}

impl<L> Bounded<L> {
    pub(super) fn new(listener: L) -> Bounded<L> {
        Bounded { listener, free: Arc::new(Semaphore::new(CONNECTIONS_MAX)) }
    }
}

impl<L: Listener<Io: Caller + Unpin>> Listener for Bounded<L> {
    type Io = Connection<L::Io>;
    type Addr = L::Addr;

    async fn accept(&mut self) -> (Connection<L::Io>, L::Addr) {
        loop {
            let (stream, address) = self.listener.accept().await;
            if stream.is_owner() {
                return (Connection { stream, stranger: None }, address);
            }
            if let Ok(place) = self.free.clone().try_acquire_owned() {
                let stranger = Some(Stranger { deadline: Box::pin(sleep(FIRST_BYTE)), _place: place });
                return (Connection { stream, stranger }, address);
            }
        }
    }

    fn local_addr(&self) -> io::Result<L::Addr> {
        self.listener.local_addr()
    }
}

/// A connection that makes room for another one when it ends.
pub(super) struct Connection<S> {
    pub(super) stream: S,
    stranger: Option<Stranger>,
}

struct Stranger {
    deadline: Pin<Box<Sleep>>,
    _place: OwnedSemaphorePermit,
}

impl<S> Connection<S> {
    /// It said something, or was told something.
    fn is_alive(&mut self) {
        if let Some(stranger) = &mut self.stranger {
            stranger.deadline.as_mut().reset(Instant::now() + SILENCE);
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Connection<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if read.is_ready() {
            self.is_alive();
        } else if let Some(stranger) = &mut self.stranger
            && stranger.deadline.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Connection<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        if written.is_ready() {
            self.is_alive();
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener as StdListener;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, UnixListener};

    use super::*;

    fn in_runtime(test: impl Future<Output = ()>) {
        // Time that passes when there is nothing else to do.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(test);
    }

    #[test]
    fn strangers_have_few_connections_and_room_is_made_when_one_ends() {
        in_runtime(async {
            let mut listener = Bounded::new(TcpListener::bind("127.0.0.1:0").await.unwrap());
            let address = listener.local_addr().unwrap();
            let mut held = Vec::new();
            for _ in 0..CONNECTIONS_MAX {
                let client = TcpStream::connect(address).await.unwrap();
                held.push((client, listener.accept().await.0));
            }
            let mut over = TcpStream::connect(address).await.unwrap();
            let accepting = tokio::spawn(async move { listener.accept().await.0 });
            assert_eq!(over.read(&mut [0]).await.unwrap(), 0, "one too many is closed");
            held.pop();
            let _next = TcpStream::connect(address).await.unwrap();
            accepting.await.unwrap();
        });
    }

    #[test]
    fn the_owner_is_never_turned_away() {
        in_runtime(async {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("socket");
            let listener = StdListener::bind(&path).unwrap();
            listener.set_nonblocking(true).unwrap();
            let mut listener = Bounded::new(UnixListener::from_std(listener).unwrap());
            let mut held = Vec::new();
            for _ in 0..=CONNECTIONS_MAX {
                let client = UnixStream::connect(&path).await.unwrap();
                held.push((client, listener.accept().await.0));
            }
        });
    }

    #[test]
    fn a_silent_stranger_loses_its_place() {
        in_runtime(async {
            let mut listener = Bounded::new(TcpListener::bind("127.0.0.1:0").await.unwrap());
            let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let mut connection = listener.accept().await.0;
            let began = Instant::now();
            assert_eq!(connection.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
            assert_eq!(began.elapsed().as_secs(), FIRST_BYTE.as_secs());
            drop(client);
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let mut connection = listener.accept().await.0;
            client.write_all(b"G").await.unwrap();
            connection.read_exact(&mut [0]).await.unwrap();
            let began = Instant::now();
            assert_eq!(connection.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
            assert!(began.elapsed() >= SILENCE && SILENCE.as_secs() > crate::control::api::WAIT_MAX_SECONDS);
        });
    }
}
