//! A started queue of a worker: its ring, its in-flight state, its notifications.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use super::chain::{Chain, ChainError, Scatter};
use super::dirty::MaybeLog;
use super::inflight::{InflightError, InflightQueue, InflightRegion};
use super::memory::MemoryMap;
use super::ring::{Descriptor, Head, Ring, RingAddresses, RingError, RingFormat};
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
    /// Where it goes on, where no in-flight region says so (SET_VRING_BASE).
    pub base: u32,
    /// What it looks like.
    pub format: RingFormat,
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
    /// Told where the queue goes on when it has stopped.
    pub(crate) reply: Sender<u32>,
}

/// Heads that are under way, by their ids: a driver that offers one twice breaks its ring, so a queue never holds more
/// requests than it has entries.
#[derive(Debug)]
pub(super) struct HeadSet(Vec<u64>);

impl HeadSet {
    /// For ids below that number.
    pub(super) fn new(ids: u32) -> HeadSet {
        HeadSet(vec![0; usize::try_from(ids.div_ceil(64)).expect("32 bits fit in a usize")])
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
    /// Chains from the in-flight region, to be served first.
    pub(crate) resubmit: VecDeque<Head>,
    /// The chain that was taken last, of a packed ring.
    list: Vec<Descriptor>,
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
        let mut ring = Ring::new(memory, start.addresses, start.size, start.base, start.format)?;
        let found = match &start.inflight {
            Some(region) => InflightQueue::open(region, start.index, start.size, &mut ring)?,
            None => None,
        };
        let (inflight, resubmit) = found.map_or((None, Vec::new()), |(state, heads)| (Some(state), heads));
        // Of buffer ids the spec only says that they have sixteen bits.
        let ids = if start.format.packed { 1 << 16 } else { u32::from(start.size) };
        Ok(Queue {
            index: start.index,
            ring,
            inflight,
            heads: HeadSet::new(ids),
            resubmit: resubmit.into(),
            list: Vec::new(),
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

    /// Take the next new chain, with its place in what the driver offers.
    #[inline]
    pub(crate) fn take(&mut self) -> Option<(Head, u16)> {
        self.close_batch();
        let position = self.ring.next_avail();
        let popped = self.ring.pop(&mut self.list);
        let mut head = match popped {
            Ok(head) => head?,
            Err(error) => {
                self.ring.set_next_avail(position);
                self.break_down(&error.to_string());
                return None;
            }
        };
        if !self.hold(head) {
            self.ring.set_next_avail(position);
            return None;
        }
        if let Some(inflight) = &mut self.inflight {
            inflight.begin(&mut head, &self.list);
        }
        Some((head, position))
    }

    /// Take a chain again that was found in the in-flight region.
    pub(crate) fn take_again(&mut self, head: Head) -> bool {
        let held = self.hold(head);
        if let Some(inflight) = self.inflight.as_mut().filter(|_| held) {
            inflight.begin_again(head, &mut self.list);
        }
        held
    }

    #[inline]
    fn hold(&mut self, head: Head) -> bool {
        let new = self.heads.insert(head.id);
        if !new {
            self.break_down(&RingError::Held(head.id).to_string());
        }
        new
    }

    /// Walk the chain that was taken last.
    ///
    /// # Errors
    /// When the structure of the chain is broken.
    #[inline]
    pub(crate) fn walk<'a>(
        &self,
        scatter: &'a mut Scatter,
        memory: &'a Arc<MemoryMap>,
        head: Head,
    ) -> Result<Chain<'a>, ChainError> {
        match &self.ring {
            Ring::Split(ring) => scatter.walk(ring, memory, head.id),
            Ring::Packed(_) => scatter.walk_list(&self.list, memory),
        }
    }

    /// The in-flight region of a packed ring knows no chains that are taken while others have ended and have not been
    /// published.
    #[inline]
    fn close_batch(&mut self) {
        if self.inflight.as_ref().is_some_and(InflightQueue::is_batch_open) {
            self.publish();
        }
    }

    /// How many chains there may be to take.
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
    pub(crate) fn give_back(&mut self, head: Head, len: u32) {
        self.heads.remove(head.id);
        self.ring.push_used(head, len);
        if let Some(inflight) = &mut self.inflight {
            inflight.end(head);
        }
    }

    /// A request was given up without effect and the ring rewound over it, or the device was reset.
    pub(crate) fn forget(&mut self, head: Head) {
        self.close_batch();
        self.heads.remove(head.id);
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
        if let Some(inflight) = &mut self.inflight {
            inflight.publishing(&self.ring);
        }
        let notify = self.ring.publish();
        if let Some(log) = &self.log {
            self.ring.mark_used(log, first);
        }
        if let Some(inflight) = &mut self.inflight {
            inflight.published(&self.ring);
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

#[cfg(test)]
mod tests;
