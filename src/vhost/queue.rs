//! A started queue of a worker: its ring, its in-flight state, its notifications.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use super::dirty::MaybeLog;
use super::inflight::{InflightError, InflightQueue, InflightRegion};
use super::memory::MemoryMap;
use super::ring::{Ring, RingAddresses, RingError};
use crate::engine::request::Request;
use crate::sync;
use crate::sync::mpsc::Sender;

/// How a queue learns of new requests.
#[derive(Debug)]
pub enum Kick {
    /// The front-end writes to this eventfd.
    Fd(OwnedFd),
    /// The front-end gave none: look now and then.
    Polled,
    /// The caller says when to look.
    Caller,
}

/// Everything a worker needs to start a queue.
#[derive(Debug)]
pub struct StartQueue {
    /// Its number in the device.
    pub index: u16,
    /// Where its parts are.
    pub addresses: RingAddresses,
    /// Entries.
    pub size: u16,
    /// The avail entry to take first, where there is no in-flight region.
    pub next_avail: u16,
    /// Whether EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// The in-flight region, where it was negotiated.
    pub inflight: Option<Arc<InflightRegion>>,
    /// How to learn of new requests.
    pub kick: Kick,
    /// Interrupts the guest; a front-end may have none for the time being.
    pub call: Option<OwnedFd>,
    /// Tells the front-end of a broken ring.
    pub err: Option<OwnedFd>,
    /// Whether requests may be taken.
    pub enabled: bool,
}

/// What happens to requests that no device works on when a queue stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopHow {
    /// The front-end asks where to go on (GET_VRING_BASE): the ring is rewound over them. Those with answered
    /// requests behind them stay in the in-flight region. Where there is none, or the guest is migrated without it,
    /// they are served, or fail if they would have to wait for a device.
    Drain,
    /// As [`StopHow::Drain`], and the in-flight region goes wherever the guest goes.
    Suspend,
    /// The front-end is gone: they stay in the in-flight region.
    Leave,
    /// The device is reset: they are forgotten.
    Discard,
}

/// A stop under way.
#[derive(Debug)]
pub(crate) struct Stop {
    pub(crate) how: StopHow,
    pub(crate) withdrawn: Vec<Request>,
    /// Told the next avail entry when the queue has stopped.
    pub(crate) reply: Sender<u16>,
}

/// Heads that are under way: a driver that offers one twice breaks its ring, so a queue never holds more
/// requests than it has entries.
#[derive(Debug)]
pub(super) struct HeadSet(Vec<u64>);

impl HeadSet {
    pub(super) fn new(size: u16) -> HeadSet {
        HeadSet(vec![0; usize::from(size).div_ceil(64)])
    }

    /// Whether the head was not there.
    #[inline]
    pub(super) fn insert(&mut self, head: u16) -> bool {
        let (word, bit) = (&mut self.0[usize::from(head / 64)], 1_u64 << (head % 64));
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    #[inline]
    pub(super) fn remove(&mut self, head: u16) {
        self.0[usize::from(head / 64)] &= !(1_u64 << (head % 64));
    }
}

/// A started queue.
pub(crate) struct Queue {
    pub(crate) index: u16,
    pub(crate) ring: Ring,
    inflight: Option<InflightQueue>,
    heads: HeadSet,
    /// Heads from the in-flight region, to be served first.
    pub(crate) resubmit: std::collections::VecDeque<u16>,
    pub(crate) kick: Kick,
    /// Token of the kick's watch.
    pub(crate) token: u64,
    call: Option<OwnedFd>,
    err: Option<OwnedFd>,
    pub(crate) enabled: bool,
    broken: bool,
    /// Whether the ring is in the current memory.
    mapped: bool,
    /// Whether the driver was asked to kick and nothing came since.
    pub(crate) armed: bool,
    /// Where writes to the used ring are noted.
    pub(crate) log: MaybeLog,
    pub(crate) stop: Option<Stop>,
}

impl Queue {
    pub(crate) fn start(memory: &Arc<MemoryMap>, start: StartQueue) -> Result<Queue, StartError> {
        let mut ring = Ring::new(memory, start.addresses, start.size, start.next_avail, start.event_idx)?;
        let mut inflight = None;
        let mut resubmit = std::collections::VecDeque::new();
        if let Some(region) = &start.inflight {
            inflight = InflightQueue::open(region, start.index, start.size, ring.next_used())?;
        }
        if let Some(state) = &inflight {
            resubmit.extend(state.heads().into_iter().filter(|head| *head < start.size));
            // What was taken is what is used plus what is in flight; front-ends differ in what they pass as
            // base here (QEMU the used index, cloud-hypervisor the avail index).
            let taken = u16::try_from(resubmit.len()).expect("at most one entry a head");
            ring.set_next_avail(ring.next_used().wrapping_add(taken));
        }
        Ok(Queue {
            index: start.index,
            ring,
            inflight,
            heads: HeadSet::new(start.size),
            resubmit,
            kick: start.kick,
            token: 0,
            call: start.call,
            err: start.err,
            enabled: start.enabled,
            broken: false,
            mapped: true,
            armed: false,
            log: None,
            stop: None,
        })
    }

    /// Whether requests may be taken now.
    pub(crate) fn is_running(&self) -> bool {
        self.enabled && !self.broken && self.mapped && self.stop.is_none()
    }

    /// Whether there is an in-flight region that remembers requests for a later start.
    pub(crate) fn is_tracked(&self) -> bool {
        self.inflight.is_some()
    }

    pub(crate) fn kick_fd(&self) -> Option<RawFd> {
        match &self.kick {
            Kick::Fd(fd) => Some(fd.as_raw_fd()),
            Kick::Polled | Kick::Caller => None,
        }
    }

    /// Take the next new head, with its place in the avail ring.
    #[inline]
    pub(crate) fn take(&mut self) -> Option<(u16, u16)> {
        let position = self.ring.next_avail();
        let head = self.ring.pop();
        if head >= self.ring.size() {
            self.ring.set_next_avail(position);
            self.break_down(&format!("the driver offers descriptor {head} of {}", self.ring.size()));
            return None;
        }
        if !self.begin(head) {
            self.ring.set_next_avail(position);
            return None;
        }
        Some((head, position))
    }

    /// Note a head as under way.
    #[inline]
    pub(crate) fn begin(&mut self, head: u16) -> bool {
        if !self.heads.insert(head) {
            self.break_down(&format!("the driver offers descriptor {head} while the device holds it"));
            return false;
        }
        if let Some(inflight) = &mut self.inflight {
            inflight.begin(head);
        }
        true
    }

    /// How many heads can be taken.
    #[inline]
    pub(crate) fn available(&mut self) -> u16 {
        match self.ring.available() {
            Ok(count) => count,
            Err(error) => {
                self.break_down(&error.to_string());
                0
            }
        }
    }

    /// Give a chain back; the driver sees it with [`Queue::publish`].
    #[inline]
    pub(crate) fn give_back(&mut self, head: u16, len: u32) {
        self.heads.remove(head);
        self.ring.push_used(head, len);
        if let Some(inflight) = &mut self.inflight {
            inflight.end(head);
        }
    }

    /// A request was given up without effect and the ring rewound over it, or the device was reset.
    pub(crate) fn forget(&mut self, head: u16) {
        self.heads.remove(head);
        if let Some(inflight) = &mut self.inflight {
            inflight.forget(head);
        }
    }

    /// Show the driver what was given back and notify it, once for the batch.
    #[inline]
    pub(crate) fn publish(&mut self) {
        if !self.ring.unpublished() {
            return;
        }
        let first = self.ring.published();
        let notify = self.ring.publish();
        if let Some(log) = &self.log {
            self.ring.mark_used(log, first);
        }
        if let Some(inflight) = &mut self.inflight {
            inflight.published(self.ring.next_used());
        }
        if notify {
            self.signal_call();
        }
    }

    /// Ask the driver to kick; whether it need not, as there is something already.
    pub(crate) fn arm(&mut self) -> bool {
        let more = self.ring.arm();
        if let Some(log) = &self.log {
            self.ring.mark_used(log, self.ring.published());
        }
        more
    }

    /// Ask the driver not to kick for now.
    #[inline]
    pub(crate) fn disarm(&mut self) {
        self.ring.disarm();
        if let Some(log) = &self.log {
            self.ring.mark_used(log, self.ring.published());
        }
    }

    fn signal_call(&self) {
        if let Some(call) = &self.call {
            sync::signal(call.as_fd());
        }
    }

    /// Another call eventfd. A notification may have gone to the old one when nobody listened any more, so the
    /// new one is signalled once.
    pub(crate) fn set_call(&mut self, call: Option<OwnedFd>) {
        self.call = call;
        self.signal_call();
    }

    pub(crate) fn set_err(&mut self, err: Option<OwnedFd>) {
        self.err = err;
    }

    /// Follow the ring to new memory. Where it is in none, requests under way still end in the old memory,
    /// which stays mapped, and none are taken until memory comes that has the ring.
    pub(crate) fn remap(&mut self, memory: &Arc<MemoryMap>, addresses: RingAddresses) {
        let before = self.mapped;
        match self.ring.remap(memory, addresses) {
            Ok(()) => self.mapped = true,
            Err(error) => {
                self.mapped = false;
                if before {
                    log::info!("queue {} waits for memory: {error}", self.index);
                }
            }
        }
        self.armed = false;
    }

    /// Stop taking requests until the next start: what the driver writes makes no sense.
    fn break_down(&mut self, reason: &str) {
        if self.broken {
            return;
        }
        self.broken = true;
        log::warn!("queue {} is broken until it is restarted: {reason}", self.index);
        if let Some(err) = &self.err {
            sync::signal(err.as_fd());
        }
    }
}

/// Why a queue cannot start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error(transparent)]
    Inflight(#[from] InflightError),
}
