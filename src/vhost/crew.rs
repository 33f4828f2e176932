//! The workers of a server, who come and go with the volume where that can change hands.

use std::io;
use std::sync::{Arc, PoisonError};

use super::device::BlkDevice;
use super::status::{ServerStatus, WorkerStatus};
use super::worker::{Command, WorkerThread, spawn};
use crate::runtime::handover::{HandoverError, HeldVolume};
use crate::runtime::mailbox::Outbox;
use crate::runtime::worker::WorkerPort;
use crate::sync::{Mutex, MutexGuard};

/// Whom the protocol thread gives its orders; one for each worker, none while the volume is away.
pub(crate) type Workers = Vec<Outbox<Command>>;

/// Why nobody can serve a queue.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MusterError {
    #[error(transparent)]
    Volume(#[from] HandoverError),
    #[error("a worker cannot be started: {0}")]
    Host(#[from] io::Error),
}

/// Worker threads, and the volume they serve. They outlive connections.
pub(crate) struct Crew {
    device: Arc<BlkDevice>,
    /// Absent where the volume stays.
    held: Option<Arc<HeldVolume>>,
    status: Arc<ServerStatus>,
    threads: Mutex<Vec<WorkerThread<Command>>>,
}

impl Crew {
    /// Start a worker for each port; without ports they are started when the volume comes, `count` of them.
    ///
    /// # Errors
    /// When a thread or its reactor cannot be made.
    pub(crate) fn new(
        device: Arc<BlkDevice>,
        count: usize,
        ports: Vec<WorkerPort>,
        held: Option<Arc<HeldVolume>>,
    ) -> io::Result<Crew> {
        let statuses = std::iter::repeat_with(|| Arc::new(WorkerStatus::new())).take(count).collect();
        let crew =
            Crew { device, held, status: Arc::new(ServerStatus::new(statuses)), threads: Mutex::new(Vec::new()) };
        crew.start(ports)?;
        Ok(crew)
    }

    fn threads(&self) -> MutexGuard<'_, Vec<WorkerThread<Command>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(&self, ports: Vec<WorkerPort>) -> io::Result<()> {
        let mut threads = Vec::new();
        for (index, port) in ports.into_iter().enumerate() {
            threads.push(spawn(index, port, self.device.settings(), self.status.worker(index))?);
        }
        *self.threads() = threads;
        Ok(())
    }

    /// What the workers are doing, for others to read.
    pub(crate) fn status(&self) -> Arc<ServerStatus> {
        self.status.clone()
    }

    /// The workers there are.
    pub(crate) fn workers(&self) -> Workers {
        self.threads().iter().map(|worker| worker.commands.clone()).collect()
    }

    /// Open the volume that is away, which must be of that generation if one is expected, and start workers for it.
    pub(crate) fn muster(&self, expected: Option<u64>) -> Result<Workers, MusterError> {
        let Some(held) = &self.held else { return Ok(self.workers()) };
        if held.take(expected)? {
            self.device.set_writeback(false);
        }
        if let Err(error) = self.start(held.ports()) {
            // Nobody serves it here.
            self.let_go(held);
            return Err(error.into());
        }
        Ok(self.workers())
    }

    /// End the workers and close the volume, for another server to open it. True if it can change hands.
    pub(crate) fn dismiss(&self) -> bool {
        let Some(held) = &self.held else { return false };
        if self.threads().is_empty() {
            return true;
        }
        self.threads().clear();
        self.let_go(held);
        true
    }

    fn let_go(&self, held: &HeldVolume) {
        if let Err(error) = held.hand_over(!self.device.is_writeback()) {
            log::error!("{error}");
        }
    }

    /// The volume, where it can change hands.
    pub(crate) fn held(&self) -> Option<&HeldVolume> {
        self.held.as_deref()
    }
}
