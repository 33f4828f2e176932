//! The thread of a worker, which takes orders until it is told to end.

use std::io;

use crate::runtime::mailbox::{Inbox, Outbox, mailbox};
use crate::runtime::worker::{Worker, WorkerPort};
use crate::sync::mpsc::channel;
use crate::sync::thread::{self, JoinHandle};

/// A worker that panics takes the process with it: its queues would never be served again, nor their drains
/// answered, while the supervisor's restart finds every request in the in-flight region.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

/// A running worker thread. Dropping it waits for its end.
pub struct WorkerThread<C> {
    /// Takes its orders.
    pub commands: Outbox<C>,
    exit: Option<C>,
    thread: Option<JoinHandle<()>>,
}

impl<C> Drop for WorkerThread<C> {
    fn drop(&mut self) {
        if let Some(exit) = self.exit.take() {
            self.commands.send(exit);
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("a worker thread panicked");
        }
    }
}

/// Run a worker on a thread of its own: `run` takes orders until it meets `exit`.
///
/// # Errors
/// When the thread or its reactor cannot be made.
pub(crate) fn spawn_worker<C: Send + 'static>(
    index: usize,
    port: WorkerPort,
    exit: C,
    run: impl FnOnce(Worker, Inbox<C>) + Send + 'static,
) -> io::Result<WorkerThread<C>> {
    let (commands, inbox) = mailbox()?;
    let (opened, is_open) = channel();
    let thread = thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
        let _guard = AbortOnPanic;
        match port.open() {
            Ok(worker) => {
                // The starter waits for this message.
                let _ = opened.send(Ok(()));
                run(worker, inbox);
            }
            Err(error) => {
                let _ = opened.send(Err(error));
            }
        }
    })?;
    let worker = WorkerThread { commands, exit: Some(exit), thread: Some(thread) };
    is_open.recv().unwrap_or_else(|_| Err(io::Error::other("the worker thread ended before it began")))?;
    Ok(worker)
}
