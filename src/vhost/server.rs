//! A vhost-user server for one volume: accepts front-ends, one after the other, and runs the workers.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use vhost::vhost_user::{BackendReqHandler, Error};

use super::QUEUES_MAX;
use super::device::BlkDevice;
use super::protocol::{Session, is_refusal};
use super::status::{ServerStatus, WorkerStatus};
use super::worker::{WorkerThread, spawn};
use crate::runtime::worker::WorkerPort;

/// How long the rest of a message may take: a front-end that stops in the middle of one must not keep a
/// shutdown waiting.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);

/// The vhost-user side of one volume.
///
/// The workers outlive connections and end with the server; drop it while the healer still answers, since
/// requests that wait there must come back first.
pub struct Server {
    listener: Option<UnixListener>,
    device: Arc<BlkDevice>,
    workers: Vec<WorkerThread>,
    status: Arc<ServerStatus>,
}

impl Server {
    /// Start the workers, one for each port. Without a listener only [`Server::serve`] is of use.
    ///
    /// # Errors
    /// When a thread or its reactor cannot be made.
    ///
    /// # Panics
    /// If there is no port.
    pub fn new(listener: Option<UnixListener>, device: Arc<BlkDevice>, ports: Vec<WorkerPort>) -> io::Result<Server> {
        assert!(!ports.is_empty(), "a server has at least one worker");
        let mut workers = Vec::new();
        let mut statuses = Vec::new();
        for (index, port) in ports.into_iter().enumerate() {
            let status = Arc::new(WorkerStatus::new());
            workers.push(spawn(index, port, device.settings(), status.clone())?);
            statuses.push(status);
        }
        Ok(Server { listener, device, workers, status: Arc::new(ServerStatus::new(statuses)) })
    }

    /// Queues on offer.
    pub fn num_queues(&self) -> u16 {
        QUEUES_MAX
    }

    /// What the server is doing, for others to read.
    pub fn status(&self) -> Arc<ServerStatus> {
        self.status.clone()
    }

    /// Accept front-ends until `shutdown` (an eventfd or the like) becomes readable.
    ///
    /// # Errors
    /// When the listener fails.
    pub fn run(&self, shutdown: BorrowedFd<'_>) -> io::Result<()> {
        let Some(listener) = &self.listener else { return Ok(()) };
        listener.set_nonblocking(true)?;
        while wait_for(listener.as_fd(), shutdown)? {
            match listener.accept() {
                Ok((stream, _)) => self.serve(stream, shutdown)?,
                // The client has gone again, or the process is out of something for the moment.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if is_passing(&error) => {
                    log::warn!("a front-end cannot be accepted: {error}");
                    std::thread::sleep(Duration::from_millis(100));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Serve one front-end until it leaves or `shutdown` becomes readable; then every queue is stopped and the
    /// device has returned everything.
    ///
    /// # Errors
    /// When waiting fails.
    pub fn serve(&self, stream: UnixStream, shutdown: BorrowedFd<'_>) -> io::Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(MESSAGE_TIMEOUT))?;
        stream.set_write_timeout(Some(MESSAGE_TIMEOUT))?;
        let orders = self.workers.iter().map(|worker| worker.commands.clone()).collect();
        let session = Arc::new(Mutex::new(Session::new(self.device.clone(), orders, QUEUES_MAX)));
        let socket = stream.try_clone()?;
        let mut handler = BackendReqHandler::from_stream(stream, session.clone());
        self.status.set_connected(true);
        log::info!("a front-end connected");
        let result = converse(&mut handler, &socket, shutdown);
        session.lock().unwrap_or_else(PoisonError::into_inner).close();
        self.status.set_connected(false);
        result
    }
}

/// Handle messages until the connection ends.
fn converse(
    handler: &mut BackendReqHandler<Mutex<Session>>,
    socket: &UnixStream,
    shutdown: BorrowedFd<'_>,
) -> io::Result<()> {
    while wait_for(socket.as_fd(), shutdown)? {
        match handler.handle_request() {
            Ok(()) => {}
            Err(error) if is_refusal(&error) => log::warn!("the front-end was refused: {error}"),
            Err(Error::Disconnected) => {
                log::info!("the front-end disconnected");
                break;
            }
            Err(error) => {
                log::warn!("the connection is closed: {error}");
                break;
            }
        }
    }
    Ok(())
}

/// Wait until `fd` is readable; false if it is `shutdown` that is.
fn wait_for(fd: BorrowedFd<'_>, shutdown: BorrowedFd<'_>) -> io::Result<bool> {
    loop {
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN), PollFd::from_borrowed_fd(shutdown, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) if !fds[1].revents().is_empty() => return Ok(false),
            Ok(_) if !fds[0].revents().is_empty() => return Ok(true),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINTR | libc::ECONNABORTED | libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)
    )
}
