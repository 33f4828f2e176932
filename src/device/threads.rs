//! A reactor on a pool of threads, for hosts that forbid io_uring.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use super::open::DeviceSet;
use super::operation::{BouncePool, Operation, Progress};
use super::pool::{Finished, Job, Pool};
use super::watch::Watches;
use super::{Completion, Device, Errno, Event, Op, Reactor, Tag, Wait};
use crate::units::Time;

/// Threads of one reactor, unless told otherwise.
pub const THREADS_DEFAULT: usize = 8;

/// Most threads of one reactor: beyond, they only wait for each other.
pub const THREADS_MAX: usize = 64;

/// Stands for the pool among the watched tokens.
const POOL_TOKEN: u64 = u64::MAX;

/// One thread's reactor whose operations are system calls made by other threads.
///
/// Dropping it waits for the operations that have begun.
pub struct ThreadReactor {
    devices: DeviceSet,
    pool: Pool,
    watches: Watches,
    buffers: BouncePool,
    /// Operations that wait for a bounce buffer, in order.
    waiting: VecDeque<Job>,
    /// Operations that ended without a system call.
    ended: Vec<Event>,
    finished: Vec<Finished>,
    in_flight: usize,
}

impl ThreadReactor {
    /// A reactor with at most `threads` threads (1 to [`THREADS_MAX`]), started as needed.
    ///
    /// # Errors
    /// If there are no descriptors or threads left.
    pub fn new(devices: &DeviceSet, threads: usize) -> io::Result<ThreadReactor> {
        let pool = Pool::new(threads.clamp(1, THREADS_MAX))?;
        let mut watches = Watches::new()?;
        watches.watch(pool.wake().as_raw_fd(), POOL_TOKEN);
        Ok(ThreadReactor {
            devices: devices.clone(),
            pool,
            watches,
            buffers: BouncePool::default(),
            waiting: VecDeque::new(),
            ended: Vec::new(),
            finished: Vec::new(),
            in_flight: 0,
        })
    }

    fn proceed(&mut self, job: Job, progress: Progress, events: &mut Vec<Event>) {
        match progress {
            Progress::Next => self.pool.submit(job),
            Progress::NeedsBuffer => self.waiting.push_back(job),
            Progress::Done(result) => self.end(job, result, events),
        }
    }

    fn end(&mut self, mut job: Job, result: Result<(), Errno>, events: &mut Vec<Event>) {
        if let Some(buffer) = job.operation.take_buffer() {
            self.buffers.give_back(buffer);
        }
        self.in_flight -= 1;
        events.push(done(job.operation.op().tag, result));
    }

    fn lend_buffers(&mut self) {
        while !self.waiting.is_empty() {
            let Some(buffer) = self.buffers.take() else { return };
            let mut job = self.waiting.pop_front().expect("it is not empty");
            job.operation.lend(buffer);
            self.pool.submit(job);
        }
    }

    fn collect(&mut self, events: &mut Vec<Event>) {
        let mut finished = std::mem::take(&mut self.finished);
        self.pool.collect(&mut finished);
        for Finished { job, progress } in finished.drain(..) {
            self.proceed(job, progress, events);
        }
        self.finished = finished;
        self.lend_buffers();
    }
}

fn done(tag: Tag, result: Result<(), Errno>) -> Event {
    Event::Done(Completion { tag, result })
}

impl Device for ThreadReactor {
    unsafe fn submit(&mut self, op: Op) {
        self.in_flight += 1;
        let Some(device) = self.devices.get(op.device) else {
            self.in_flight -= 1;
            self.ended.push(done(op.tag, Err(Errno(libc::ENODEV))));
            return;
        };
        // SAFETY: the caller's promise is the one asked for.
        let (operation, progress) = unsafe { Operation::begin(op, device) };
        let job = Job { slot: 0, operation, device: Arc::clone(device) };
        let mut ended = std::mem::take(&mut self.ended);
        self.proceed(job, progress, &mut ended);
        self.ended = ended;
        self.lend_buffers();
    }

    fn in_flight(&self) -> usize {
        // Ended operations count until they are reported.
        self.in_flight + self.ended.len()
    }

    fn poll(&mut self, now: Time, wait: Wait, events: &mut Vec<Event>) {
        let start = events.len();
        loop {
            events.append(&mut self.ended);
            self.collect(events);
            let wait_now = if events.len() > start { Wait::No } else { wait };
            let from = events.len();
            self.watches.wait(now, wait_now, events);
            if events[from..].contains(&Event::Ready(POOL_TOKEN)) {
                events.retain(|event| *event != Event::Ready(POOL_TOKEN));
                self.pool.quiet();
                self.collect(events);
            }
            if events.len() > start || wait != Wait::Forever {
                return;
            }
        }
    }
}

impl Reactor for ThreadReactor {
    fn watch(&mut self, fd: RawFd, token: u64) {
        assert_ne!(token, POOL_TOKEN, "this token is the reactor's own");
        self.watches.watch(fd, token);
    }

    fn unwatch(&mut self, token: u64) {
        self.watches.unwatch(token);
    }
}

impl Drop for ThreadReactor {
    fn drop(&mut self) {
        let mut events = Vec::new();
        while self.in_flight > 0 {
            self.poll(Time(0), Wait::Forever, &mut events);
            events.clear();
        }
    }
}
