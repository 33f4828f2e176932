//! What a worker thread gets to serve its queues: a shard, a reactor and its mailboxes.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::counters::WorkerCounters;
use super::eventlog::EventLog;
use super::mailbox::{Inbox, Outbox};
use crate::device::Reactor;
use crate::engine::message::{ToHealer, ToShard};
use crate::engine::shard::Shard;
use crate::sync::atomic::AtomicU64;
use crate::units::Time;

/// The clock of one volume: nanoseconds since it was opened.
#[derive(Clone, Copy, Debug)]
pub struct Clock(std::time::Instant);

impl Clock {
    /// A clock that starts now.
    pub fn start() -> Clock {
        Clock(std::time::Instant::now())
    }

    /// The time since the start.
    pub fn now(&self) -> Time {
        Time(u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }
}

/// What the guest is told of the disk.
#[derive(Clone, Debug)]
pub struct DiskInfo {
    /// Sectors, which may become more.
    pub capacity: Arc<AtomicU64>,
    /// 512, or 4096 where the primary or the spare knows no smaller.
    pub logical_block_size: u32,
    /// Whether the volume only takes reads.
    pub read_only: bool,
    /// The answer to GET_ID, padded with zeros (virtio 1.3 §5.2.6).
    pub serial: [u8; 20],
}

/// A worker's place at an open volume; turned into a [`Worker`] on the worker's own thread.
pub struct WorkerPort {
    /// Makes the thread's reactor (io_uring wants it made by the thread that uses it).
    pub reactor: Box<dyn FnOnce() -> io::Result<Box<dyn Reactor>> + Send>,
    /// The fast path.
    pub shard: Shard,
    /// From the healer.
    pub inbox: Inbox<ToShard>,
    /// To the healer.
    pub healer: Outbox<ToHealer>,
    /// The volume's clock.
    pub clock: Clock,
    /// What the guest is told of the disk.
    pub disk: Arc<DiskInfo>,
    /// Where events go.
    pub log: Arc<EventLog>,
    /// How long the worker may look at its rings, when nothing comes, before it sleeps.
    pub polling: Duration,
    /// Where it counts.
    pub counters: Arc<WorkerCounters>,
}

/// A worker's parts, on its thread.
pub struct Worker {
    /// The fast path.
    pub shard: Shard,
    /// What the thread submits to and sleeps on.
    pub reactor: Box<dyn Reactor>,
    /// From the healer.
    pub inbox: Inbox<ToShard>,
    /// To the healer.
    pub healer: Outbox<ToHealer>,
    /// The volume's clock.
    pub clock: Clock,
    /// What the guest is told of the disk.
    pub disk: Arc<DiskInfo>,
    /// Where events go.
    pub log: Arc<EventLog>,
    /// How long it may look at its rings, when nothing comes, before it sleeps.
    pub polling: Duration,
    /// Where it counts.
    pub counters: Arc<WorkerCounters>,
}

impl WorkerPort {
    /// Make the parts, on the thread that will use them.
    ///
    /// # Errors
    /// When the reactor cannot be made (no io_uring, no file descriptors left).
    pub fn open(self) -> io::Result<Worker> {
        Ok(Worker {
            shard: self.shard,
            reactor: (self.reactor)()?,
            inbox: self.inbox,
            healer: self.healer,
            clock: self.clock,
            disk: self.disk,
            log: self.log,
            polling: self.polling,
            counters: self.counters,
        })
    }
}
