//! The in-flight state of a split ring: `QueueRegionSplit` of QEMU's `docs/interop/vhost-user.rst`.
//!
//! An entry is set before its request is submitted and cleared after the used index has been published; the list of
//! the last batch makes the moment in between recoverable.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use super::{DESC_NUM_AT, InflightError, InflightRegion, Layout, QueueState, VERSION, VERSION_AT};

/// The header is features, version, desc_num, last_batch_head and used_idx; an entry inflight, padding, next and
/// counter.
pub(super) const LAYOUT: Layout = Layout { header: 16, entry: 16 };

/// Offsets in a queue's header.
const LAST_BATCH_HEAD_AT: usize = 12;
const USED_IDX_AT: usize = 14;
/// Offsets in an entry.
const INFLIGHT_AT: usize = 0;
const NEXT_AT: usize = 6;
const COUNTER_AT: usize = 8;

/// A request found in the region at start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Found {
    counter: u64,
    head: u16,
}

/// The in-flight state of one split queue.
pub(crate) struct SplitInflight {
    state: QueueState,
    size: u16,
    counter: u64,
    /// Heads given back and not yet published.
    batch: Vec<u16>,
}

impl SplitInflight {
    /// The state of queue `index`, brought to the used ring's index `used_idx`: finishes what a process that
    /// died between publishing and clearing left.
    ///
    /// # Errors
    /// When the region belongs to another layout or queue size.
    pub(super) fn open(
        region: &Arc<InflightRegion>,
        index: u16,
        queue_size: u16,
        used_idx: u16,
    ) -> Result<SplitInflight, InflightError> {
        let refuse = |reason| InflightError::Layout { queues: region.queues, size: region.size, reason };
        let state = region.state(index, LAYOUT).ok_or_else(|| refuse("it has no such queue"))?;
        let mut queue = SplitInflight { state, size: region.size, counter: 0, batch: Vec::new() };
        if queue_size > region.size {
            return Err(refuse("its queues are smaller than the ring"));
        }
        match queue.u16_at(VERSION_AT).load(Ordering::Relaxed) {
            0 => {
                queue.u16_at(DESC_NUM_AT).store(region.size, Ordering::Relaxed);
                queue.u16_at(USED_IDX_AT).store(used_idx, Ordering::Relaxed);
                queue.u16_at(VERSION_AT).store(VERSION, Ordering::Release);
            }
            VERSION => {}
            _ => return Err(refuse("its version is unknown")),
        }
        if queue.u16_at(DESC_NUM_AT).load(Ordering::Relaxed) != region.size {
            return Err(refuse("it was laid out for another queue size"));
        }
        queue.finish_last_batch(used_idx);
        queue.counter = queue.found().iter().map(|found| found.counter).max().map_or(0, |max| max.wrapping_add(1));
        Ok(queue)
    }

    /// Steps 1a to 1c of the spec's reconnection: the entries of the last batch are in the used ring.
    fn finish_last_batch(&mut self, used_idx: u16) {
        let tracked = self.u16_at(USED_IDX_AT).load(Ordering::Acquire);
        let count = used_idx.wrapping_sub(tracked);
        if count > 0 && count <= self.size {
            let mut head = self.u16_at(LAST_BATCH_HEAD_AT).load(Ordering::Relaxed);
            for _ in 0..count {
                if head >= self.size {
                    break;
                }
                self.inflight_of(head).store(0, Ordering::Relaxed);
                head = self.u16_at(Self::entry(head) + NEXT_AT).load(Ordering::Relaxed);
            }
        }
        self.u16_at(USED_IDX_AT).store(used_idx, Ordering::Release);
    }

    /// The heads of requests under way, in the order they were taken.
    pub(super) fn heads(&self) -> Vec<u16> {
        let mut found = self.found();
        found.sort_by_key(|found| found.counter);
        found.into_iter().map(|found| found.head).collect()
    }

    fn found(&self) -> Vec<Found> {
        let in_flight = (0..self.size).filter(|head| self.inflight_of(*head).load(Ordering::Acquire) != 0);
        in_flight.map(|head| Found { counter: self.counter_of(head).load(Ordering::Relaxed), head }).collect()
    }

    /// A request is taken; to be called before it is submitted.
    ///
    /// # Panics
    /// If `head` is not below the queue size.
    #[inline]
    pub(super) fn begin(&mut self, head: u16) {
        self.counter_of(head).store(self.counter, Ordering::Relaxed);
        self.counter = self.counter.wrapping_add(1);
        self.inflight_of(head).store(1, Ordering::Release);
    }

    /// A request's used entry is written; to be called before the used index is published.
    #[inline]
    pub(super) fn end(&mut self, head: u16) {
        let last = self.u16_at(LAST_BATCH_HEAD_AT).load(Ordering::Relaxed);
        self.u16_at(Self::entry(head) + NEXT_AT).store(last, Ordering::Relaxed);
        // Ordered before the used index by the index's release store.
        self.u16_at(LAST_BATCH_HEAD_AT).store(head, Ordering::Relaxed);
        self.batch.push(head);
    }

    /// The used index `used_idx` has been published: what ended is no longer in flight.
    #[inline]
    pub(super) fn published(&mut self, used_idx: u16) {
        let mut batch = std::mem::take(&mut self.batch);
        for head in batch.drain(..) {
            self.inflight_of(head).store(0, Ordering::Release);
        }
        self.batch = batch;
        self.u16_at(USED_IDX_AT).store(used_idx, Ordering::Release);
    }

    /// A request was given up before anything happened, and the avail ring rewound over it.
    pub(super) fn forget(&mut self, head: u16) {
        self.inflight_of(head).store(0, Ordering::Release);
    }

    fn entry(head: u16) -> usize {
        LAYOUT.header + LAYOUT.entry * usize::from(head)
    }

    fn u16_at(&self, offset: usize) -> &AtomicU16 {
        self.state.u16_at(offset)
    }

    fn inflight_of(&self, head: u16) -> &AtomicU8 {
        assert!(head < self.size);
        self.state.u8_at(Self::entry(head) + INFLIGHT_AT)
    }

    fn counter_of(&self, head: u16) -> &AtomicU64 {
        assert!(head < self.size);
        self.state.u64_at(Self::entry(head) + COUNTER_AT)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn region(queues: u16, size: u16) -> (File, Arc<InflightRegion>) {
        let (file, len) = InflightRegion::create(queues, size, false).unwrap();
        let region = Arc::new(InflightRegion::map(&file, 0, len, queues, size).unwrap());
        (file, region)
    }

    fn open(region: &Arc<InflightRegion>, used_idx: u16) -> SplitInflight {
        SplitInflight::open(region, 1, 8, used_idx).unwrap()
    }

    #[test]
    fn requests_come_back_in_the_order_they_were_taken() {
        let (_file, region) = region(2, 8);
        let mut queue = open(&region, 5);
        for head in [3, 0, 7] {
            queue.begin(head);
        }
        queue.end(0);
        queue.published(6);
        let mut again = open(&region, 6);
        assert_eq!(again.heads(), [3, 7]);
        again.begin(1);
        assert_eq!(again.heads(), [3, 7, 1]);
        assert_eq!(SplitInflight::open(&region, 0, 8, 0).unwrap().heads(), [0_u16; 0]);
    }

    #[test]
    fn a_crash_between_publishing_and_clearing_loses_and_repeats_nothing() {
        let (_file, region) = region(2, 8);
        let mut queue = open(&region, 10);
        for head in [1, 2, 3, 4] {
            queue.begin(head);
        }
        queue.end(3);
        queue.published(11);
        queue.end(2);
        queue.end(4);
        // The used index went to 13 here, and the process died.
        assert_eq!(open(&region, 13).heads(), [1]);
    }

    #[test]
    fn a_crash_before_publishing_repeats_the_batch() {
        let (_file, region) = region(2, 8);
        let mut queue = open(&region, 0);
        queue.begin(6);
        queue.end(6);
        assert_eq!(open(&region, 0).heads(), [6]);
    }

    #[test]
    fn nonsense_in_the_region_is_survived() {
        let (file, region) = region(2, 8);
        let mut queue = open(&region, 0);
        queue.begin(2);
        queue.u16_at(LAST_BATCH_HEAD_AT).store(60_000, Ordering::Relaxed);
        assert_eq!(open(&region, 4).heads(), [2]);
        assert_eq!(open(&region, 40_000).heads(), [2]);
        queue.u16_at(DESC_NUM_AT).store(16, Ordering::Relaxed);
        assert!(SplitInflight::open(&region, 1, 8, 0).is_err());
        queue.u16_at(VERSION_AT).store(2, Ordering::Relaxed);
        assert!(SplitInflight::open(&region, 1, 8, 0).is_err());
        assert!(SplitInflight::open(&region, 0, 16, 0).is_err(), "a ring larger than its state");
        assert!(SplitInflight::open(&region, 2, 8, 0).is_err());
        assert!(InflightRegion::map(&file, 0, 64, 2, 8).is_err(), "too small");
        assert!(InflightRegion::map(&file, 8, 384, 2, 8).is_err(), "beyond the file");
        assert!(InflightRegion::create(65, 8, false).is_err());
        assert!(InflightRegion::create(1, 0, false).is_err());
        assert!(InflightRegion::create(1, 40_000, false).is_err());
    }
}
