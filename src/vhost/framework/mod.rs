//! The same device under rust-vmm's own daemon: `VhostUserDaemon` of the `vhost-user-backend` crate talks to the
//! front-end and waits for kicks, `virtio-queue` reads and writes the rings and walks the chains.
//!
//! It is there to be compared with [`Server`](super::server::Server), which has its own of all that: two
//! implementations that answer every request alike are hard to be wrong together. Shared are
//! [`BlkDevice`], the meaning of requests ([`super::request`]) and everything below.
//!
//! The daemon tracks no requests in flight and does not wait for them when memory goes away, refusing a message
//! ends its connection, and it loses a file descriptor a worker and connection.

mod backend;
mod lane;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use vhost::vhost_user::{Error as ProtocolError, Listener};
use vhost_user_backend::{Error, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use self::backend::BlkBackend;
use self::lane::{Lane, Order};
use super::device::BlkDevice;
use super::status::{ServerStatus, WorkerStatus};
use super::thread::{WorkerThread, spawn_worker};
use super::wait::{is_passing, wait_for};
use crate::runtime::worker::WorkerPort;

/// The vhost-user side of one volume, on rust-vmm's daemon.
///
/// The workers outlive connections and end with the server; drop it while the healer still answers, since
/// requests that wait there must come back first.
pub struct Server {
    listener: UnixListener,
    device: Arc<BlkDevice>,
    workers: Vec<WorkerThread<Order>>,
    status: Arc<ServerStatus>,
}

impl Server {
    /// Start the workers, one for each port.
    ///
    /// # Errors
    /// When a thread or its reactor cannot be made.
    ///
    /// # Panics
    /// If there is no port.
    pub fn new(listener: UnixListener, device: Arc<BlkDevice>, ports: Vec<WorkerPort>) -> io::Result<Server> {
        assert!(!ports.is_empty(), "a server has at least one worker");
        let mut workers = Vec::new();
        let mut statuses = Vec::new();
        for (index, port) in ports.into_iter().enumerate() {
            let (settings, status) = (device.settings(), Arc::new(WorkerStatus::new()));
            statuses.push(status.clone());
            workers.push(spawn_worker(index, port, Order::Exit, move |worker, orders| {
                Lane::new(worker, settings, status).run(orders);
            })?);
        }
        Ok(Server { listener, device, workers, status: Arc::new(ServerStatus::new(statuses)) })
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
        self.listener.set_nonblocking(false)?;
        let mut listener = Listener::from(self.listener.try_clone()?);
        while wait_for(self.listener.as_fd(), shutdown)? {
            match self.serve(&mut listener, shutdown) {
                Err(Error::CreateBackendListener(ProtocolError::SocketError(error))) if !is_passing(&error) => {
                    return Err(error);
                }
                Err(error) => {
                    log::warn!("a front-end cannot be accepted: {error}");
                    std::thread::sleep(Duration::from_millis(100));
                }
                Ok(()) => {}
            }
        }
        Ok(())
    }

    /// Accept one front-end and serve it until it leaves or `shutdown` becomes readable; then every queue is
    /// stopped and the device has returned everything. A daemon serves one connection only.
    fn serve(&self, listener: &mut Listener, shutdown: BorrowedFd<'_>) -> Result<(), Error> {
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let lanes = self.workers.iter().map(|worker| worker.commands.clone()).collect();
        let backend = Arc::new(BlkBackend::new(self.device.clone(), lanes, memory.clone()));
        let ended = eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| Error::StartDaemon(error.into()))?;
        let mut daemon = VhostUserDaemon::new("vhost-user".to_owned(), backend.clone(), memory)?;
        daemon.start(listener)?;
        let handle = daemon.shutdown_handle().expect("a started daemon has a connection");
        self.status.set_connected(true);
        log::info!("a front-end connected");
        let result = std::thread::scope(|scope| {
            scope.spawn(|| {
                if !matches!(wait_for(ended.as_fd(), shutdown), Ok(true)) {
                    // First, as the daemon may itself be waiting for a queue to stop.
                    backend.close();
                    handle.shutdown();
                }
            });
            let result = daemon.wait();
            rustix::io::write(&ended, &1_u64.to_ne_bytes()).expect("an eventfd of our own takes one write");
            result
        });
        match result {
            Ok(()) | Err(Error::HandleRequest(ProtocolError::Disconnected)) => log::info!("the front-end disconnected"),
            Err(error) => log::warn!("the connection is closed: {error}"),
        }
        // While the daemon's threads are there: its end waits for no request.
        backend.close();
        drop(daemon);
        self.status.set_connected(false);
        Ok(())
    }
}
