//! Ends a server at a moment that neither it nor the driver knows.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::slow_disk::SlowDisks;

/// Longest a connection may be broken before it shows that the server was killed.
const GRACE: Duration = Duration::from_secs(2);

/// The server was ended: whatever was begun with it is over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Killed;

/// How a kill went.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kill {
    /// The moment before.
    pub(crate) at: Instant,
    /// Operations that the kernel had taken from the server and not finished.
    pub(crate) in_kernel: usize,
}

/// When to kill.
#[derive(Clone, Copy, Debug)]
pub(crate) struct When {
    pub(crate) after: Duration,
    /// How long before that the disks begin to hold what they are given.
    pub(crate) hold_before: Option<Duration>,
}

/// A thread that kills one process when it is told to.
pub(crate) struct Killer {
    has_killed: Arc<AtomicBool>,
    orders: Sender<When>,
    has_order: Cell<bool>,
    thread: JoinHandle<Option<Kill>>,
}

impl Killer {
    /// For `pid`, a child that is not waited for before this is joined; with that signal.
    pub(crate) fn arm(pid: u32, signal: Signal, disks: Option<Arc<SlowDisks>>) -> Killer {
        let has_killed = Arc::new(AtomicBool::new(false));
        let flag = has_killed.clone();
        let (orders, received) = mpsc::channel::<When>();
        let pid = Pid::from_raw(i32::try_from(pid).expect("a process id")).expect("not zero");
        let thread = std::thread::spawn(move || {
            let when = received.recv().ok()?;
            let lead = when.hold_before.unwrap_or_default().min(when.after);
            let passes = |time| received.recv_timeout(time).is_err_and(|error| error == RecvTimeoutError::Timeout);
            if !passes(when.after - lead) {
                return None;
            }
            if let (Some(disks), Some(_)) = (&disks, when.hold_before) {
                disks.hold();
                if !passes(lead) {
                    return None;
                }
            }
            let at = Instant::now();
            flag.store(true, Ordering::Release);
            kill_process(pid, signal).expect("our child");
            // The successor's I/O is not held, so that it is not this that keeps it waiting.
            Some(Kill { at, in_kernel: disks.map_or(0, |disks| disks.hold_no_more()) })
        });
        Killer { has_killed, orders, has_order: Cell::new(false), thread }
    }

    /// Kill it then. Only the first order counts.
    pub(crate) fn order(&self, when: When) {
        if !self.has_order.replace(true) {
            self.orders.send(when).expect("the thread waits for it");
        }
    }

    pub(crate) fn has_killed(&self) -> bool {
        self.has_killed.load(Ordering::Acquire)
    }

    /// Something broke: that must be because of the kill.
    #[track_caller]
    pub(crate) fn expect_kill(&self, what: &str) -> Killed {
        let since = Instant::now();
        while !self.has_killed() {
            assert!(since.elapsed() < GRACE, "the server lives, and: {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
        Killed
    }

    /// How it went; `None` if it was never told to.
    pub(crate) fn join(self) -> Option<Kill> {
        drop(self.orders);
        self.thread.join().expect("it ends by itself")
    }
}
