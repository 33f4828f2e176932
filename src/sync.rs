//! Where threads meet: the standard library's types, and eventfds to wait for.
//!
//! The tests in `vhost::interleavings` run the same code with the types of a model checker instead (`shuttle`,
//! the feature of that name, in tests only), which decides at each of them which thread goes on. So all that one
//! thread shares with another goes through here: locks, channels, atomics, threads and wake-ups.
//!
//! | shared | by | how |
//! |---|---|---|
//! | requests, fences, views, withdrawals | each shard and the healer | a [`mailbox`](crate::runtime::mailbox) each way: a queue under a lock, and an eventfd |
//! | orders of an operator | any thread and the healer | a mailbox; each order carries the channel for its answer |
//! | starts, stops, kicks, memory | the protocol thread and each worker | a mailbox; stops and memory changes carry a channel for their answer |
//! | the map and the mode | the healer and the shards | immutable snapshots, sent in messages, never replaced in place |
//! | guest memory, the in-flight region | the protocol thread and the workers | counted references to immutable maps; what the guest writes is read once |
//! | [`Progress`](crate::engine::view::Progress) | the shards and the healer | atomics, ordered where a comment there says so |
//! | numbers for `status`, the negotiated settings | workers, protocol thread, whoever asks | single atomics, each meaningful alone |
//! | what is counted ([`counters`](crate::runtime::counters)) | each worker and the healer, whoever asks | relaxed atomics of the standard library, each written by one thread |
//! | what the front-end is told unasked | the protocol thread and who gives orders | under a lock; a message is sent or dropped, never waited for |
//! | operations and their results | a reactor and its pool of threads | two queues under locks, a condition variable, an eventfd |
//! | fault rules, the event log | all threads | under locks that are never held across a device operation |

use std::os::fd::BorrowedFd;

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;

#[cfg(all(test, feature = "shuttle"))]
pub(crate) use shuttle::{
    sync::{Condvar, Mutex, MutexGuard, atomic, mpsc},
    thread,
};
#[cfg(not(all(test, feature = "shuttle")))]
pub(crate) use std::{
    sync::{Condvar, Mutex, MutexGuard, atomic, mpsc},
    thread,
};

#[cfg(all(test, feature = "shuttle"))]
use modelled::{change, poll};
#[cfg(not(all(test, feature = "shuttle")))]
use real::{change, poll};

/// Make an eventfd readable.
pub(crate) fn signal(event: BorrowedFd<'_>) {
    change(|| {
        // EAGAIN: a full counter is a wake-up that is already there.
        let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
    });
}

/// Make a non-blocking eventfd unreadable until the next [`signal`].
pub(crate) fn clear(event: BorrowedFd<'_>) {
    change(|| {
        // EAGAIN: nobody has signalled.
        let _ = rustix::io::read(event, &mut [0_u8; 8]);
    });
}

/// Wait until descriptors that `epoll` watches become readable, but no longer than that (`None`: for ever), and
/// append them to `ready`, up to its capacity.
///
/// # Errors
/// When a signal came meanwhile.
pub(crate) fn wait(
    epoll: BorrowedFd<'_>,
    timeout: Option<&Timespec>,
    ready: &mut Vec<epoll::Event>,
) -> Result<(), Errno> {
    let mut look = |timeout: Option<&Timespec>| epoll::wait(epoll, rustix::buffer::spare_capacity(ready), timeout);
    poll(timeout, &mut look).map(drop)
}

#[cfg(not(all(test, feature = "shuttle")))]
mod real {
    use super::{Errno, Timespec};

    pub(super) fn change(write: impl FnOnce()) {
        write();
    }

    pub(super) fn poll(
        timeout: Option<&Timespec>,
        look: &mut impl FnMut(Option<&Timespec>) -> Result<usize, Errno>,
    ) -> Result<usize, Errno> {
        look(timeout)
    }
}

/// Eventfds and epoll are the kernel's here too, but who waits does so in the model checker, whose threads are a
/// single one to the kernel.
#[cfg(all(test, feature = "shuttle"))]
mod modelled {
    use super::{Condvar, Errno, Mutex, Timespec, thread};

    const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

    shuttle::lazy_static! {
        /// Notified whenever an eventfd has changed.
        static ref CHANGED: (Mutex<()>, Condvar) = (Mutex::new(()), Condvar::new());
    }

    pub(super) fn change(write: impl FnOnce()) {
        let _changing = CHANGED.0.lock().expect("no panic is gone on from");
        write();
        CHANGED.1.notify_all();
    }

    pub(super) fn poll(
        timeout: Option<&Timespec>,
        look: &mut impl FnMut(Option<&Timespec>) -> Result<usize, Errno>,
    ) -> Result<usize, Errno> {
        if timeout.is_some_and(|timeout| *timeout != NOW) {
            // No time passes while others have something to do: it is up before anything happens, or after.
            thread::yield_now();
        }
        let mut unchanged = CHANGED.0.lock().expect("no panic is gone on from");
        loop {
            let ready = look(Some(&NOW))?;
            if ready > 0 || timeout.is_some() {
                return Ok(ready);
            }
            unchanged = CHANGED.1.wait(unchanged).expect("no panic is gone on from");
        }
    }
}
