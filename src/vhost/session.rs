//! What a front-end has said of its guest on one connection, and the workers that do it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::vhost_user::{Error, Result};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_RING_PACKED;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::command::wait;
use super::crew::{Crew, Workers};
use super::device::BlkDevice;
use super::dirty::{MaybeLog, VHOST_F_LOG_ALL};
use super::eventfd::duplicate;
use super::inflight::InflightRegion;
use super::memory::{MemoryMap, RegionBits};
use super::ring::{Ring, RingAddresses, RingFormat};
use super::state;
use super::worker::{Command, QueueKick, StartQueue, StopHow};
use crate::runtime::mailbox::Outbox;
use crate::sync::mpsc::{Receiver, channel};

#[derive(Default)]
pub(super) struct QueueSetup {
    pub(super) size: u16,
    pub(super) addresses: Option<RingAddresses>,
    pub(super) base: u32,
    pub(super) kick: Option<QueueKick>,
    pub(super) call: Option<OwnedFd>,
    pub(super) err: Option<OwnedFd>,
    pub(super) enabled: bool,
    pub(super) started: bool,
}

/// One connection.
pub(crate) struct Session {
    pub(super) device: Arc<BlkDevice>,
    pub(super) crew: Arc<Crew>,
    /// Of the crew; empty while the volume is away.
    pub(super) workers: Workers,
    pub(super) queues: Vec<QueueSetup>,
    pub(super) memory: Arc<MemoryMap>,
    pub(super) inflight: Option<Arc<InflightRegion>>,
    pub(super) features: u64,
    /// How GET_VRING_BASE stops a queue, as was negotiated.
    pub(super) drain: StopHow,
    /// What SET_LOG_BASE gave; used while LOG_ALL is among the features.
    pub(super) log: MaybeLog,
    /// Where the state of a guest that comes is read from.
    pub(super) state: Option<File>,
    /// Of the volume, by that state.
    pub(super) generation: Option<u64>,
}

/// A refusal that the crate has answered, where an answer was asked for; the connection goes on.
pub(super) fn refuse(reason: impl std::fmt::Display) -> Error {
    Error::ReqHandlerError(io::Error::new(io::ErrorKind::InvalidInput, reason.to_string()))
}

/// Whether the connection goes on after `error`.
pub(crate) fn is_refusal(error: &Error) -> bool {
    matches!(error, Error::ReqHandlerError(_))
}

impl Session {
    pub(crate) fn new(device: Arc<BlkDevice>, crew: Arc<Crew>, queues: u16) -> Session {
        let queues = std::iter::repeat_with(QueueSetup::default).take(usize::from(queues)).collect();
        let workers = crew.workers();
        let memory = Arc::new(MemoryMap::new());
        Session {
            device,
            crew,
            workers,
            queues,
            memory,
            inflight: None,
            features: 0,
            drain: StopHow::Drain,
            log: None,
            state: None,
            generation: None,
        }
    }

    /// The end of the connection: every queue is stopped, the device has returned everything, and guest memory
    /// is no longer used. Requests that no device worked on stay in the in-flight region.
    pub(crate) fn close(&mut self) {
        if let Err(error) =
            self.stop_all(StopHow::Leave).and_then(|()| self.use_memory(MemoryMap::new(), RegionBits(u64::MAX)))
        {
            log::error!("the connection cannot be wound up: {error}");
        }
        self.inflight = None;
        self.log = None;
        self.use_log();
    }

    /// Features on offer: the device's, and those of the transport.
    pub(super) fn offered_features(&self) -> u64 {
        self.device.offered_features() | 1 << VHOST_F_LOG_ALL | 1 << VIRTIO_F_RING_PACKED
    }

    /// What was negotiated of rings.
    pub(super) fn ring_format(&self) -> RingFormat {
        let has = |number: u32| self.features & 1 << number != 0;
        RingFormat { packed: has(VIRTIO_F_RING_PACKED), event_idx: has(VIRTIO_RING_F_EVENT_IDX) }
    }

    /// Have all workers log, or not, as was negotiated; from the return on they do.
    pub(super) fn use_log(&self) {
        let log = self.log.as_ref().filter(|_| self.is_logging());
        let (done, ends) = channel();
        for worker in &self.workers {
            worker.send(Command::DirtyLog { log: log.cloned(), done: done.clone() });
        }
        drop(done);
        for _ in &self.workers {
            wait(&ends, || "the dirty log".to_string());
        }
    }

    /// Have the volume opened, if it is away: a queue is to be served.
    fn muster(&mut self) -> Result<()> {
        if !self.workers.is_empty() {
            return Ok(());
        }
        // Not every message that starts a queue has an answer: only the end of the connection is always heard.
        self.workers = self.crew.muster(self.generation).map_err(|error| {
            log::error!("{error}");
            Error::BackendInternalError
        })?;
        self.note_cache_mode();
        self.use_log();
        self.use_memory(MemoryMap::clone(&self.memory), RegionBits::default())
    }

    /// Let go of the volume, if no queue is started: the guest goes on elsewhere.
    pub(super) fn dismiss(&mut self) -> bool {
        let idle = !self.queues.iter().any(|queue| queue.started);
        if !(idle && self.crew.dismiss()) {
            return false;
        }
        self.workers.clear();
        self.generation = None;
        true
    }

    /// Whether the front-end logs writes to guest memory, as it does while a guest is migrated.
    pub(super) fn is_logging(&self) -> bool {
        self.features & 1 << VHOST_F_LOG_ALL != 0
    }

    pub(super) fn worker(&self, index: u16) -> &Outbox<Command> {
        // Fixed: a queue's requests never change threads.
        &self.workers[usize::from(index) % self.workers.len()]
    }

    pub(super) fn queue(&mut self, index: u32) -> Result<(u16, &mut QueueSetup)> {
        let number = u16::try_from(index).map_err(|_| refuse(format!("there is no queue {index}")))?;
        let queue = self.queues.get_mut(usize::from(number));
        queue.map(|queue| (number, queue)).ok_or_else(|| refuse(format!("there is no queue {index}")))
    }

    /// Start a queue once everything is known: with its kick, or late ones when they are enabled.
    pub(super) fn start_if_ready(&mut self, index: u32) -> Result<()> {
        let format = self.ring_format();
        let memory = self.memory.clone();
        let inflight = self.inflight.clone();
        let (_, queue) = self.queue(index)?;
        let Some(addresses) = queue.addresses.filter(|_| queue.kick.is_some() && queue.size > 0 && !queue.started)
        else {
            return Ok(());
        };
        // The worker translates for itself; here it is checked so that the front-end hears of errors.
        Ring::new(&memory, addresses, queue.size, queue.base, format).map_err(refuse)?;
        self.muster()?;
        let (number, queue) = self.queue(index)?;
        let start = StartQueue {
            index: number,
            addresses,
            size: queue.size,
            base: queue.base,
            format,
            inflight,
            kick: queue.kick.take().expect("just seen"),
            call: duplicate(queue.call.as_ref()),
            err: duplicate(queue.err.as_ref()),
            enabled: queue.enabled,
        };
        queue.started = true;
        self.worker(number).send(Command::Start(Box::new(start)));
        self.note_started();
        Ok(())
    }

    fn note_started(&self) {
        self.device.channel().set_started(self.queues.iter().any(|queue| queue.started));
    }

    /// Order a stop; the receiver gets the place where it goes on, or is closed if the worker did not serve the queue.
    pub(super) fn order_stop(&mut self, index: u16, how: StopHow) -> Receiver<u32> {
        let (reply, stopped) = channel();
        self.worker(index).send(Command::Stop { queue: index, how, reply });
        stopped
    }

    pub(super) fn finish_stop(&mut self, index: u16, stopped: &Receiver<u32>) -> Result<()> {
        let base = wait(stopped, || format!("queue {index}"));
        let queue = &mut self.queues[usize::from(index)];
        queue.started = false;
        queue.kick = None;
        // A queue that its worker could not start has taken nothing.
        queue.base = base.unwrap_or(queue.base);
        self.note_started();
        Ok(())
    }

    pub(super) fn stop_all(&mut self, how: StopHow) -> Result<()> {
        let started = self.queues.iter().enumerate().filter(|(_, queue)| queue.started);
        let started: Vec<u16> = started.map(|(i, _)| u16::try_from(i).expect("at most 64 queues")).collect();
        let stops: Vec<_> = started.into_iter().map(|index| (index, self.order_stop(index, how))).collect();
        stops.iter().try_for_each(|(index, stopped)| self.finish_stop(*index, stopped))
    }

    /// Change the memory of all workers and wait until no request uses `removed` (O5).
    pub(super) fn use_memory(&mut self, map: MemoryMap, removed: RegionBits) -> Result<()> {
        self.memory = Arc::new(map);
        let (done, ends) = channel();
        for worker in &self.workers {
            worker.send(Command::Memory { map: self.memory.clone(), removed, done: done.clone() });
        }
        drop(done);
        if removed != RegionBits::default() {
            for _ in &self.workers {
                wait(&ends, || "memory that is being removed".to_string());
            }
        }
        Ok(())
    }

    /// Close the volume and say which it is, for the guest to take along.
    pub(super) fn save_state(&mut self, fd: &File) -> Result<()> {
        if !self.dismiss() {
            return Err(refuse("the volume cannot change hands"));
        }
        let held = self.crew.held().expect("it was handed over");
        state::write(fd, &held.state().map_err(refuse)?).map_err(refuse)
    }

    /// Have the cache mode outlive this process.
    pub(super) fn note_cache_mode(&self) {
        if let Some(region) = &self.inflight {
            region.set_write_through(!self.device.is_writeback());
        }
    }
}
