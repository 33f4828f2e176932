//! The in-flight state of a packed ring: `QueueRegionPacked` of QEMU's `docs/interop/vhost-user.rst`.
//!
//! A used descriptor may be written over any that the device holds, so the region keeps copies of these, each chain a
//! list of entries. All others are in the free list, from `free_head` on; entries from `old_free_head` on were free
//! when `old_used_idx` was the next used descriptor. The old ones count: who comes after a kill goes back to them,
//! or, where the first used descriptor of the last batch was shown to the driver, on to the others.
//!
//! The region also says how far the ring has come, which the ring itself does not, nor does the front-end after a
//! kill.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{DESC_NUM_AT, InflightError, InflightRegion, Layout, QueueState, VERSION, VERSION_AT};
use crate::vhost::ring::packed::{PackedRing, Place};
use crate::vhost::ring::{Descriptor, Head};

/// The header is features, version, desc_num, free_head, old_free_head, used_idx, old_used_idx, used_wrap_counter,
/// old_used_wrap_counter and padding; an entry inflight, padding, next, last, num, counter, id, flags, len and addr.
pub(super) const LAYOUT: Layout = Layout { header: 32, entry: 32 };

/// Offsets in a queue's header.
const FREE_HEAD_AT: usize = 12;
const OLD_FREE_HEAD_AT: usize = 14;
/// Used and old used index and their wrap counters, read and written together.
const USED_AT: usize = 16;
/// Offsets in an entry.
const INFLIGHT_AT: usize = 0;
const NEXT_AT: usize = 2;
const LAST_AT: usize = 4;
const NUM_AT: usize = 6;
const COUNTER_AT: usize = 8;
const ID_AT: usize = 16;
const FLAGS_AT: usize = 18;
const LEN_AT: usize = 20;
const ADDR_AT: usize = 24;

/// The in-flight state of one packed queue.
pub(crate) struct PackedInflight {
    state: QueueState,
    counter: u64,
    /// The links of the region's lists, which nobody else changes while this is open; beyond them the list ends.
    next: Vec<u16>,
    free_head: u16,
    old_used: Place,
    /// Entries whose used descriptors have not been published.
    batch: Vec<u16>,
}

/// What the region says of used descriptors: the next one, and the one of the last commit.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Used {
    now: Place,
    old: Place,
}

impl Used {
    fn from_word(word: u64) -> Used {
        let bytes = word.to_le_bytes();
        let place =
            |at: usize, wrap: u8| Place { index: u16::from_le_bytes([bytes[at], bytes[at + 1]]), wrap: wrap != 0 };
        Used { now: place(0, bytes[4]), old: place(2, bytes[5]) }
    }

    fn to_word(self) -> u64 {
        let (now, old) = (self.now.index.to_le_bytes(), self.old.index.to_le_bytes());
        u64::from_le_bytes([now[0], now[1], old[0], old[1], u8::from(self.now.wrap), u8::from(self.old.wrap), 0, 0])
    }
}

impl PackedInflight {
    /// The state of queue `index` and its requests under way, in the order they were taken; the ring goes on after
    /// them. Finishes or undoes what a process that died was about.
    ///
    /// # Errors
    /// When the region belongs to another layout or queue size, or was written by nobody who knows it.
    pub(super) fn open(
        region: &Arc<InflightRegion>,
        index: u16,
        queue_size: u16,
        ring: &mut PackedRing,
    ) -> Result<(PackedInflight, Vec<Head>), InflightError> {
        let refuse = |reason| InflightError::Layout { queues: region.queues, size: region.size, reason };
        let state = region.state(index, LAYOUT).ok_or_else(|| refuse("it is too small for packed rings"))?;
        if queue_size > region.size {
            return Err(refuse("its queues are smaller than the ring"));
        }
        let (free_head, old_used, batch) = (0, ring.next_used(), Vec::new());
        let mut queue = PackedInflight { state, counter: 0, next: Vec::new(), free_head, old_used, batch };
        match queue.state.u16_at(VERSION_AT).load(Ordering::Acquire) {
            0 => queue.lay_out(region.size),
            VERSION => {}
            _ => return Err(refuse("its version is unknown")),
        }
        if queue.state.u16_at(DESC_NUM_AT).load(Ordering::Relaxed) != region.size {
            return Err(refuse("it was laid out for another queue size"));
        }
        queue.settle_last_batch(queue_size, ring).map_err(refuse)?;
        let heads = queue.read_lists(region.size).map_err(refuse)?;
        let held: u64 = heads.iter().map(|head| u64::from(head.len)).sum();
        let held = u16::try_from(held).ok().filter(|held| *held <= queue_size);
        ring.resume(queue.old_used, held.ok_or_else(|| refuse("more is in flight than the ring holds"))?);
        Ok((queue, heads))
    }

    /// Nothing is in flight: all entries are free, one after the other.
    fn lay_out(&mut self, size: u16) {
        for entry in 0..size {
            self.state.u8_at(at(entry, INFLIGHT_AT)).store(0, Ordering::Relaxed);
            self.state.u16_at(at(entry, NEXT_AT)).store(entry + 1, Ordering::Relaxed);
        }
        self.state.u16_at(FREE_HEAD_AT).store(0, Ordering::Relaxed);
        self.state.u16_at(OLD_FREE_HEAD_AT).store(0, Ordering::Relaxed);
        self.store_used(self.old_used);
        self.state.u16_at(DESC_NUM_AT).store(size, Ordering::Relaxed);
        self.state.u16_at(VERSION_AT).store(VERSION, Ordering::Release);
    }

    /// Step 1 and 2 of the spec's reconnection: whether the last batch counts.
    fn settle_last_batch(&mut self, queue_size: u16, ring: &PackedRing) -> Result<(), &'static str> {
        let used = Used::from_word(self.state.u64_at(USED_AT).load(Ordering::Acquire));
        if used.now.index >= queue_size || used.old.index >= queue_size {
            return Err("its used index is outside of the ring");
        }
        if used.now != used.old && !ring.is_available(used.old) {
            let free_head = self.state.u16_at(FREE_HEAD_AT).load(Ordering::Relaxed);
            self.state.u16_at(OLD_FREE_HEAD_AT).store(free_head, Ordering::Release);
            self.old_used = used.now;
        } else {
            self.old_used = used.old;
        }
        self.store_used(self.old_used);
        self.free_head = self.state.u16_at(OLD_FREE_HEAD_AT).load(Ordering::Relaxed);
        self.state.u16_at(FREE_HEAD_AT).store(self.free_head, Ordering::Release);
        Ok(())
    }

    /// Read all links: each entry is free, or of a chain that is in flight. The heads of these, oldest first.
    fn read_lists(&mut self, size: u16) -> Result<Vec<Head>, &'static str> {
        let number = |entry: u16, field: usize| self.state.u16_at(at(entry, field)).load(Ordering::Relaxed);
        let next: Vec<u16> = (0..size).map(|entry| number(entry, NEXT_AT)).collect();
        let mut seen = vec![false; usize::from(size)];
        let mut see = |entry: u16| match seen.get_mut(usize::from(entry)) {
            Some(seen) if !*seen => {
                *seen = true;
                Ok(())
            }
            _ => Err("its lists make no sense"),
        };
        let mut entry = self.free_head;
        while entry < size {
            see(entry)?;
            // A chain that was being taken when the process died is the driver's again.
            self.state.u8_at(at(entry, INFLIGHT_AT)).store(0, Ordering::Relaxed);
            entry = next[usize::from(entry)];
        }
        let mut found = Vec::new();
        for first in 0..size {
            if self.state.u8_at(at(first, INFLIGHT_AT)).load(Ordering::Acquire) == 0 {
                continue;
            }
            let (len, mut last) = (number(first, NUM_AT), first);
            see(first)?;
            for _ in 1..len {
                last = next[usize::from(last)];
                see(last)?;
            }
            if len == 0 {
                return Err("its lists make no sense");
            }
            let counter = self.state.u64_at(at(first, COUNTER_AT)).load(Ordering::Relaxed);
            found.push((counter, Head { id: number(last, ID_AT), len, entry: first }));
        }
        if seen.contains(&false) {
            return Err("its lists make no sense");
        }
        found.sort_by_key(|(counter, _)| *counter);
        self.counter = found.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        self.next = next;
        Ok(found.into_iter().map(|(_, head)| head).collect())
    }

    /// A chain of these descriptors is taken; its entry. It counts from the last store on.
    ///
    /// # Panics
    /// If a batch is open, or the chain is empty. Free entries are as many as descriptors the device does not hold.
    pub(super) fn begin(&mut self, list: &[Descriptor]) -> u16 {
        assert!(self.batch.is_empty() && !list.is_empty(), "batches are published before the next chain is taken");
        let (first, mut last) = (self.free_head, self.free_head);
        for descriptor in list {
            last = self.free_head;
            self.store_descriptor(last, descriptor);
            self.free_head = self.next[usize::from(last)];
        }
        let len = u16::try_from(list.len()).expect("no longer than the ring");
        self.state.u16_at(at(first, LAST_AT)).store(last, Ordering::Relaxed);
        self.state.u16_at(at(first, NUM_AT)).store(len, Ordering::Relaxed);
        self.state.u64_at(at(first, COUNTER_AT)).store(self.counter, Ordering::Relaxed);
        self.counter = self.counter.wrapping_add(1);
        self.state.u8_at(at(first, INFLIGHT_AT)).store(1, Ordering::Relaxed);
        self.commit_free_head();
        first
    }

    fn store_descriptor(&self, entry: u16, descriptor: &Descriptor) {
        self.state.u16_at(at(entry, ID_AT)).store(descriptor.next, Ordering::Relaxed);
        self.state.u16_at(at(entry, FLAGS_AT)).store(descriptor.flags, Ordering::Relaxed);
        self.state.u32_at(at(entry, LEN_AT)).store(descriptor.len, Ordering::Relaxed);
        self.state.u64_at(at(entry, ADDR_AT)).store(descriptor.addr, Ordering::Relaxed);
    }

    /// The descriptors of a chain that is in flight.
    pub(super) fn load(&self, head: Head, list: &mut Vec<Descriptor>) {
        list.clear();
        list.extend(self.entries(head).map(|entry| Descriptor {
            addr: self.state.u64_at(at(entry, ADDR_AT)).load(Ordering::Relaxed),
            len: self.state.u32_at(at(entry, LEN_AT)).load(Ordering::Relaxed),
            flags: self.state.u16_at(at(entry, FLAGS_AT)).load(Ordering::Relaxed),
            next: head.id,
        }));
    }

    fn entries(&self, head: Head) -> impl Iterator<Item = u16> {
        std::iter::successors(Some(head.entry), |entry| self.next.get(usize::from(*entry)).copied())
            .take(usize::from(head.len))
    }

    /// A request's used descriptor is written; to be called before it is published.
    pub(super) fn end(&mut self, head: Head) {
        self.put_back(head);
        self.batch.push(head.entry);
    }

    /// Put the entries of a chain before those that are free.
    fn put_back(&mut self, head: Head) {
        let last = self.entries(head).last().expect("chains have a descriptor");
        self.next[usize::from(last)] = self.free_head;
        self.state.u16_at(at(last, NEXT_AT)).store(self.free_head, Ordering::Relaxed);
        self.free_head = head.entry;
        self.state.u16_at(FREE_HEAD_AT).store(self.free_head, Ordering::Release);
    }

    pub(super) fn is_batch_open(&self) -> bool {
        !self.batch.is_empty()
    }

    /// The used descriptors up to `now` are about to be published.
    pub(super) fn publishing(&mut self, now: Place) {
        self.state.u64_at(USED_AT).store(Used { now, old: self.old_used }.to_word(), Ordering::Release);
    }

    /// The used descriptors up to `now` have been published: what ended is no longer in flight.
    pub(super) fn published(&mut self, now: Place) {
        let mut batch = std::mem::take(&mut self.batch);
        for entry in batch.drain(..) {
            self.state.u8_at(at(entry, INFLIGHT_AT)).store(0, Ordering::Release);
        }
        self.batch = batch;
        self.commit_free_head();
        self.old_used = now;
        self.store_used(now);
    }

    /// A request was given up before anything happened, and the ring rewound over it.
    ///
    /// # Panics
    /// If a batch is open.
    pub(super) fn forget(&mut self, head: Head) {
        assert!(self.batch.is_empty(), "batches are published before a chain is forgotten");
        self.put_back(head);
        self.commit_free_head();
        self.state.u8_at(at(head.entry, INFLIGHT_AT)).store(0, Ordering::Release);
    }

    fn commit_free_head(&self) {
        self.state.u16_at(FREE_HEAD_AT).store(self.free_head, Ordering::Release);
        self.state.u16_at(OLD_FREE_HEAD_AT).store(self.free_head, Ordering::Release);
    }

    fn store_used(&self, place: Place) {
        self.state.u64_at(USED_AT).store(Used { now: place, old: place }.to_word(), Ordering::Release);
    }
}

/// Where a field of an entry is.
fn at(entry: u16, field: usize) -> usize {
    LAYOUT.header + LAYOUT.entry * usize::from(entry) + field
}

#[cfg(test)]
mod tests;
