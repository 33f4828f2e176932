//! The control socket's thread.

use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};

use super::access::Peer;
use super::bounded::Bounded;
use super::routes::{self, State};
use super::volume::Volume;

/// Orders under way at a time. They may wait for a disk, so they must not use up the threads that reports need.
pub(super) const ORDERS_MAX: usize = 4;

/// Threads that run orders and reports.
const THREADS_MAX: usize = ORDERS_MAX + 4;

/// How long requests under way may take to end after [`Server::shutdown`].
pub(super) const GRACE: Duration = Duration::from_secs(2);

/// A volume and what an operator calls it.
#[derive(Clone)]
pub struct ServedVolume {
    /// Short name, unique in this server.
    pub name: String,
    /// Set UUID.
    pub uuid: String,
    /// Whom to ask.
    pub volume: Arc<dyn Volume>,
}

/// Where to answer.
#[derive(Debug, Default)]
pub struct Doors {
    /// The control socket.
    pub control: Option<UnixListener>,
    /// A group that was let in there, whose members may only read.
    pub readers: Option<String>,
    /// Where anybody may read.
    pub http: Option<TcpListener>,
}

/// A running control server; dropping it stops it.
pub struct Server {
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Answer on `listener` for `volumes` (at least one), on a thread of its own.
    ///
    /// # Errors
    /// When the thread or its event loop cannot be made.
    pub fn start(listener: UnixListener, volumes: Vec<ServedVolume>) -> io::Result<Server> {
        Server::start_at(Doors { control: Some(listener), ..Doors::default() }, volumes)
    }

    /// As [`Server::start`], wherever it is to answer.
    ///
    /// # Errors
    /// As there.
    pub fn start_at(doors: Doors, volumes: Vec<ServedVolume>) -> io::Result<Server> {
        assert!(!volumes.is_empty(), "a control server without volumes has nothing to say");
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(THREADS_MAX).build()?;
        let _in_runtime = runtime.enter();
        let control = doors.control.map(|listener| {
            listener.set_nonblocking(true)?;
            tokio::net::UnixListener::from_std(listener)
        });
        let http = doors.http.map(|listener| {
            listener.set_nonblocking(true)?;
            tokio::net::TcpListener::from_std(listener)
        });
        let (control, http, readers) = (control.transpose()?, http.transpose()?, doors.readers);
        drop(_in_runtime);
        let (stop, stopped) = watch::channel(false);
        let state = State { volumes: volumes.into(), orders: Arc::new(Semaphore::new(ORDERS_MAX)), stopped };
        let thread = std::thread::Builder::new().name("control".into()).spawn(move || {
            runtime.block_on(run(control, readers, http, state));
            // A report or order that is stuck keeps its thread; the process need not wait for it here.
            runtime.shutdown_background();
        })?;
        Ok(Server { stop, thread: Some(thread) })
    }

    /// Take no more requests, let those under way end for two seconds, and stop.
    pub fn shutdown(mut self) {
        self.stop_and_join();
    }

    fn stop_and_join(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the control thread panicked");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop_and_join();
    }
}

async fn run(
    control: Option<tokio::net::UnixListener>,
    readers: Option<String>,
    http: Option<tokio::net::TcpListener>,
    state: State,
) {
    let mut stopped = state.stopped.clone();
    let control = control.map(|listener| {
        let routes = routes::control(state.clone(), readers).into_make_service_with_connect_info::<Peer>();
        let serving = axum::serve(Bounded::new(listener), routes).with_graceful_shutdown(has_stopped(stopped.clone()));
        tokio::spawn(serving.into_future())
    });
    let http = http.map(|listener| {
        let serving = axum::serve(Bounded::new(listener), routes::http(state));
        tokio::spawn(serving.with_graceful_shutdown(has_stopped(stopped.clone())).into_future())
    });
    wait_stopped(&mut stopped).await;
    // Either all connections ended in time or the runtime drops them.
    let _ = tokio::time::timeout(GRACE, async {
        for serving in [control, http].into_iter().flatten() {
            let _ = serving.await;
        }
    })
    .await;
}

async fn has_stopped(mut stopped: watch::Receiver<bool>) {
    wait_stopped(&mut stopped).await;
}

/// Return once the server is told to stop.
pub(super) async fn wait_stopped(stopped: &mut watch::Receiver<bool>) {
    // An error means that the sender is gone, and the server with it.
    let _ = stopped.wait_for(|stop| *stop).await;
}
