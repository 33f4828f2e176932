//! What others may know of the workers without asking them.

use std::sync::Arc;
use std::time::Duration;

use crate::runtime::worker::Clock;
use crate::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use crate::units::Time;

/// No request is under way.
const NEVER: u64 = u64::MAX;

/// One worker's numbers, written by the worker alone.
#[derive(Debug)]
pub struct WorkerStatus {
    in_flight: AtomicUsize,
    oldest_start_ns: AtomicU64,
    malformed: AtomicU64,
}

impl WorkerStatus {
    /// Nothing under way.
    pub fn new() -> WorkerStatus {
        WorkerStatus {
            in_flight: AtomicUsize::new(0),
            oldest_start_ns: AtomicU64::new(NEVER),
            malformed: AtomicU64::new(0),
        }
    }

    pub(crate) fn set(&self, in_flight: usize, oldest: Option<Time>) {
        self.in_flight.store(in_flight, Ordering::Relaxed);
        self.oldest_start_ns.store(oldest.map_or(NEVER, |time| time.0), Ordering::Relaxed);
    }

    pub(crate) fn count_malformed(&self) {
        self.malformed.fetch_add(1, Ordering::Relaxed);
    }
}

impl Default for WorkerStatus {
    fn default() -> Self {
        WorkerStatus::new()
    }
}

/// What the vhost-user side of a volume is doing.
#[derive(Debug)]
pub struct ServerStatus {
    connected: AtomicBool,
    workers: Vec<Arc<WorkerStatus>>,
    clock: Clock,
    /// When the message that is being handled came.
    message_start_ns: AtomicU64,
}

impl ServerStatus {
    pub(crate) fn new(workers: Vec<Arc<WorkerStatus>>) -> ServerStatus {
        ServerStatus {
            connected: AtomicBool::new(false),
            workers,
            clock: Clock::start(),
            message_start_ns: AtomicU64::new(NEVER),
        }
    }

    /// Where worker `index` writes its numbers.
    pub(crate) fn worker(&self, index: usize) -> Arc<WorkerStatus> {
        self.workers[index].clone()
    }

    pub(crate) fn set_connected(&self, connected: bool) {
        self.connected.store(connected, Ordering::Relaxed);
    }

    /// Handle a message of the front-end.
    pub(crate) fn handling<T>(&self, handle: impl FnOnce() -> T) -> T {
        self.message_start_ns.store(self.clock.now().0, Ordering::Relaxed);
        let result = handle();
        self.message_start_ns.store(NEVER, Ordering::Relaxed);
        result
    }

    /// For how long a message of the front-end has been handled; nothing where there is none.
    pub fn message_under_way(&self) -> Duration {
        let start = self.message_start_ns.load(Ordering::Relaxed);
        if start == NEVER { Duration::ZERO } else { Duration::from_nanos(self.clock.now().since_ns(Time(start))) }
    }

    /// Whether a front-end is connected.
    pub fn connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// Number of worker threads.
    pub fn workers(&self) -> usize {
        self.workers.len()
    }

    /// Requests taken from the guest and not yet answered.
    pub fn in_flight(&self) -> usize {
        self.workers.iter().map(|worker| worker.in_flight.load(Ordering::Relaxed)).sum()
    }

    /// Age of the oldest request under way, in milliseconds; 0 where there is none.
    pub fn oldest_in_flight_ms(&self, now: Time) -> u64 {
        let starts = self.workers.iter().map(|worker| worker.oldest_start_ns.load(Ordering::Relaxed));
        starts.min().filter(|start| *start != NEVER).map_or(0, |start| now.since_ns(Time(start)) / 1_000_000)
    }

    /// Chains given back with an error before they became a request.
    pub fn malformed(&self) -> u64 {
        self.workers.iter().map(|worker| worker.malformed.load(Ordering::Relaxed)).sum()
    }
}
