//! Threads that perform operations to their end.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use super::open::OpenDevice;
use super::operation::{Operation, Progress};
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{self, Condvar, Mutex, MutexGuard};

/// An operation to perform.
pub(super) struct Job {
    /// The submitter's place for it.
    pub(super) slot: usize,
    pub(super) operation: Operation,
    pub(super) device: Arc<OpenDevice>,
}

/// An operation that ended, or that needs a bounce buffer to go on.
pub(super) struct Finished {
    pub(super) job: Job,
    pub(super) progress: Progress,
}

/// At most so many threads, started as jobs come; dropping joins them after all jobs are done.
pub(super) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    threads_max: usize,
}

struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
    finished: Mutex<Vec<Finished>>,
    /// Readable when something finished.
    wake: OwnedFd,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    idle: usize,
    closing: bool,
}

/// The queues stay consistent whatever panics elsewhere.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// A pool with its first thread, so that later failures to start one only cost speed.
    pub(super) fn new(threads_max: usize) -> io::Result<Pool> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared =
            Arc::new(Shared { queue: Mutex::default(), work: Condvar::new(), finished: Mutex::default(), wake });
        let mut pool = Pool { shared, threads: Vec::new(), threads_max };
        pool.start_thread()?;
        Ok(pool)
    }

    fn start_thread(&mut self) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        self.threads.push(thread::Builder::new().name("device-io".to_owned()).spawn(move || shared.serve())?);
        Ok(())
    }

    /// Queue a job.
    pub(super) fn submit(&mut self, job: Job) {
        let mut queue = lock(&self.shared.queue);
        queue.jobs.push_back(job);
        let crowded = queue.jobs.len() > queue.idle;
        drop(queue);
        self.shared.work.notify_one();
        if crowded && self.threads.len() < self.threads_max {
            // Without another thread the job waits for one that exists.
            let _ = self.start_thread();
        }
    }

    /// Take what finished.
    pub(super) fn collect(&mut self, into: &mut Vec<Finished>) {
        into.append(&mut lock(&self.shared.finished));
    }

    /// Readable when something finished; [`Pool::quiet`] makes it unreadable.
    pub(super) fn wake(&self) -> BorrowedFd<'_> {
        self.shared.wake.as_fd()
    }

    /// Forget that something finished; call before [`Pool::collect`].
    pub(super) fn quiet(&self) {
        sync::clear(self.wake());
    }
}

impl Shared {
    fn serve(&self) {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(mut job) = queue.jobs.pop_front() {
                drop(queue);
                let progress = job.operation.run(&job.device);
                let mut finished = lock(&self.finished);
                finished.push(Finished { job, progress });
                let first = finished.len() == 1;
                drop(finished);
                if first {
                    sync::signal(self.wake.as_fd());
                }
                queue = lock(&self.queue);
            } else if queue.closing {
                return;
            } else {
                queue.idle += 1;
                queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
                queue.idle -= 1;
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.shared.queue).closing = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // A panic there was reported when it happened.
            let _ = thread.join();
        }
    }
}
