//! Messages between threads, with an eventfd so that a reactor can sleep on them.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use crate::sync::{self, Mutex};

struct Shared<T> {
    queue: Mutex<VecDeque<T>>,
    wake: OwnedFd,
}

/// The sending end: cheap to clone, never blocks.
pub struct Outbox<T>(Arc<Shared<T>>);

/// The receiving end.
pub struct Inbox<T>(Arc<Shared<T>>);

/// A pair of ends.
///
/// # Errors
/// When no eventfd can be made.
pub fn mailbox<T>() -> io::Result<(Outbox<T>, Inbox<T>)> {
    let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let shared = Arc::new(Shared { queue: Mutex::new(VecDeque::new()), wake });
    Ok((Outbox(shared.clone()), Inbox(shared)))
}

impl<T> Clone for Outbox<T> {
    fn clone(&self) -> Self {
        Outbox(self.0.clone())
    }
}

impl<T> Outbox<T> {
    /// Hand over `message` and wake the receiver.
    pub fn send(&self, message: T) {
        let was_empty = {
            let mut queue = self.0.queue.lock().unwrap_or_else(PoisonError::into_inner);
            queue.push_back(message);
            queue.len() == 1
        };
        if was_empty {
            sync::signal(self.0.wake.as_fd());
        }
    }
}

impl<T> Inbox<T> {
    /// Readable whenever a message came; it need not be read.
    pub fn as_raw_fd(&self) -> RawFd {
        self.0.wake.as_raw_fd()
    }

    /// Move what is there to `out`.
    pub fn drain(&mut self, out: &mut Vec<T>) {
        // Taken before the queue, so that a message sent in between wakes again.
        sync::clear(self.0.wake.as_fd());
        let mut queue = self.0.queue.lock().unwrap_or_else(PoisonError::into_inner);
        out.extend(queue.drain(..));
    }
}
