//! The in-flight region (vhost-user protocol, "Inflight I/O tracking"): which requests a queue holds,
//! in memory that the front-end keeps while this process may die.
//!
//! The layout is that of `QueueRegionSplit` in QEMU's `docs/interop/vhost-user.rst`. An entry is set before
//! its request is submitted and cleared after the used index has been published; the list of the last batch
//! makes the moment in between recoverable. Numbers read back are checked like guest input.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vhost::vhost_user::VhostUserProtocolFeatures;

use super::queue::StopHow;
use super::{QUEUE_SIZE_MAX, QUEUES_MAX};

/// Bytes of a queue's header: features, version, desc_num, last_batch_head, used_idx.
const HEADER_SIZE: usize = 16;
/// Bytes of a descriptor's state: inflight, padding, next, counter.
const ENTRY_SIZE: usize = 16;
/// Queues start at multiples of a cache line.
const QUEUE_ALIGNMENT: usize = 64;
/// The layout's version.
const VERSION: u16 = 1;

/// Offsets in a queue's header.
const FEATURES_AT: usize = 0;
const VERSION_AT: usize = 8;
const DESC_NUM_AT: usize = 10;
const LAST_BATCH_HEAD_AT: usize = 12;
const USED_IDX_AT: usize = 14;
/// Offsets in an entry.
const INFLIGHT_AT: usize = 0;
const NEXT_AT: usize = 6;
const COUNTER_AT: usize = 8;

/// What a front-end takes that carries the region along when its guest is migrated: a stop may then leave requests in
/// it, whoever serves the guest next (`docs/interop/vhost-user.rst` of QEMU 11.0, GET_VRING_BASE).
pub(crate) const INFLIGHT_MIGRATION: VhostUserProtocolFeatures =
    VhostUserProtocolFeatures::INFLIGHT_SHMFD.union(VhostUserProtocolFeatures::GET_VRING_BASE_INFLIGHT);

/// How a ring is stopped for a front-end that took these protocol features.
pub(crate) fn drain_of(features: u64) -> StopHow {
    let carried = VhostUserProtocolFeatures::from_bits_retain(features).contains(INFLIGHT_MIGRATION);
    if carried { StopHow::Suspend } else { StopHow::Drain }
}

/// Our own among the features of the first queue, of which the protocol knows none: the driver switched the cache to
/// write-through. Front-ends do not say so again to the next process.
const WRITE_THROUGH: u64 = 1 << 63;

/// Why a region cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InflightError {
    /// Sizes that do not fit.
    #[error("in-flight region of {queues} queues of {size}: {reason}")]
    Layout {
        /// Queues asked for.
        queues: u16,
        /// Entries a queue.
        size: u16,
        /// What is wrong.
        reason: &'static str,
    },
    /// The memory cannot be had.
    #[error("in-flight region: {0}")]
    Io(#[from] io::Error),
}

/// The region of all queues of a connection, mapped.
#[derive(Debug)]
pub struct InflightRegion {
    start: NonNull<u8>,
    len: usize,
    /// Start of the first queue in the mapping: offsets need not be aligned to pages.
    lead: usize,
    queues: u16,
    size: u16,
}

// SAFETY: the region is an address range that lives as long as this value; all access is atomic.
unsafe impl Send for InflightRegion {}
// SAFETY: as above.
unsafe impl Sync for InflightRegion {}

impl Drop for InflightRegion {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this length, and every user of its addresses holds the Arc it lives in.
        if let Err(error) = unsafe { munmap(self.start.as_ptr().cast(), self.len) } {
            log::error!("the in-flight region cannot be unmapped: {error}");
        }
    }
}

/// Bytes of the state of one queue with `size` entries.
fn queue_stride(size: u16) -> usize {
    (HEADER_SIZE + ENTRY_SIZE * usize::from(size)).next_multiple_of(QUEUE_ALIGNMENT)
}

fn check_layout(queues: u16, size: u16) -> Result<usize, InflightError> {
    let refuse = |reason| InflightError::Layout { queues, size, reason };
    if queues == 0 || queues > QUEUES_MAX {
        return Err(refuse("there are 1 to 64 queues"));
    }
    if size == 0 || size > QUEUE_SIZE_MAX {
        return Err(refuse("a queue has 1 to 32768 entries"));
    }
    Ok(usize::from(queues) * queue_stride(size))
}

impl InflightRegion {
    /// A fresh region for exactly that many queues and entries, as the front-end asked; with its size.
    ///
    /// # Errors
    /// When the numbers are out of range or there is no memory.
    pub fn create(queues: u16, size: u16) -> Result<(File, u64), InflightError> {
        let len = u64::try_from(check_layout(queues, size)?).expect("a usize fits in 64 bits");
        let memfd = memfd_create("vhost-remap-inflight", MemfdFlags::CLOEXEC).map_err(io::Error::from)?;
        ftruncate(&memfd, len).map_err(io::Error::from)?;
        Ok((File::from(memfd), len))
    }

    /// Map a region that the front-end handed back.
    ///
    /// # Errors
    /// When it is too small for its queues, or cannot be mapped.
    pub fn map(file: &File, offset: u64, len: u64, queues: u16, size: u16) -> Result<InflightRegion, InflightError> {
        let needed = check_layout(queues, size)?;
        let refuse = |reason| InflightError::Layout { queues, size, reason };
        let file_len = u64::try_from(fstat(file).map_err(io::Error::from)?.st_size).unwrap_or(0);
        if !usize::try_from(len).is_ok_and(|len| len >= needed) {
            return Err(refuse("it is too small"));
        }
        if offset.checked_add(len).is_none_or(|end| end > file_len) {
            // The first access beyond the end would end this process with SIGBUS.
            return Err(refuse("it reaches beyond the end of its file"));
        }
        if !offset.is_multiple_of(8) {
            return Err(refuse("its offset is not aligned to the counters"));
        }
        let lead = offset % 4096;
        let map_len = usize::try_from(lead).expect("less than a page") + needed;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let start =
            unsafe { mmap(std::ptr::null_mut(), map_len, protection, MapFlags::SHARED, file.as_fd(), offset - lead) };
        let start = NonNull::new(start.map_err(io::Error::from)?.cast()).expect("mmap never succeeds with address 0");
        let lead = usize::try_from(lead).expect("less than a page");
        Ok(InflightRegion { start, len: map_len, lead, queues, size })
    }

    /// Whether the driver of this region wants its writes durable.
    pub fn is_write_through(&self) -> bool {
        self.features().load(Ordering::Acquire) & WRITE_THROUGH != 0
    }

    /// Note whether the driver wants its writes durable, for the next process.
    pub fn set_write_through(&self, write_through: bool) {
        if write_through {
            self.features().fetch_or(WRITE_THROUGH, Ordering::Release);
        } else {
            self.features().fetch_and(!WRITE_THROUGH, Ordering::Release);
        }
    }

    /// Of the first queue.
    fn features(&self) -> &AtomicU64 {
        let at = self.start.as_ptr().wrapping_add(self.lead + FEATURES_AT);
        // SAFETY: there is at least one queue, whose header is mapped as long as `self` lives; its start is a multiple
        // of eight (InflightRegion::map), and all access is atomic.
        unsafe { AtomicU64::from_ptr(at.cast()) }
    }

    /// Queues the region has room for.
    pub fn queues(&self) -> u16 {
        self.queues
    }
}

/// A request found in the region at start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Found {
    counter: u64,
    head: u16,
}

/// The in-flight state of one queue.
pub struct InflightQueue {
    region: Arc<InflightRegion>,
    start: usize,
    size: u16,
    counter: u64,
    /// Heads given back and not yet published.
    batch: Vec<u16>,
}

impl InflightQueue {
    /// The state of queue `index`, brought to the used ring's index `used_idx`: finishes what a process that
    /// died between publishing and clearing left. `None` where the region has no such queue.
    ///
    /// # Errors
    /// When the region belongs to another layout or queue size.
    pub fn open(
        region: &Arc<InflightRegion>,
        index: u16,
        queue_size: u16,
        used_idx: u16,
    ) -> Result<Option<InflightQueue>, InflightError> {
        if index >= region.queues {
            return Ok(None);
        }
        let refuse = |reason| InflightError::Layout { queues: region.queues, size: region.size, reason };
        let start = region.lead + usize::from(index) * queue_stride(region.size);
        let mut queue =
            InflightQueue { region: region.clone(), start, size: region.size, counter: 0, batch: Vec::new() };
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
        Ok(Some(queue))
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
    pub fn heads(&self) -> Vec<u16> {
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
    pub fn begin(&mut self, head: u16) {
        self.counter_of(head).store(self.counter, Ordering::Relaxed);
        self.counter = self.counter.wrapping_add(1);
        self.inflight_of(head).store(1, Ordering::Release);
    }

    /// A request's used entry is written; to be called before the used index is published.
    #[inline]
    pub fn end(&mut self, head: u16) {
        let last = self.u16_at(LAST_BATCH_HEAD_AT).load(Ordering::Relaxed);
        self.u16_at(Self::entry(head) + NEXT_AT).store(last, Ordering::Relaxed);
        // Ordered before the used index by the index's release store.
        self.u16_at(LAST_BATCH_HEAD_AT).store(head, Ordering::Relaxed);
        self.batch.push(head);
    }

    /// The used index `used_idx` has been published: what ended is no longer in flight.
    #[inline]
    pub fn published(&mut self, used_idx: u16) {
        let mut batch = std::mem::take(&mut self.batch);
        for head in batch.drain(..) {
            self.inflight_of(head).store(0, Ordering::Release);
        }
        self.batch = batch;
        self.u16_at(USED_IDX_AT).store(used_idx, Ordering::Release);
    }

    /// A request was given up before anything happened, and the avail ring rewound over it.
    pub fn forget(&mut self, head: u16) {
        self.inflight_of(head).store(0, Ordering::Release);
    }

    fn entry(head: u16) -> usize {
        HEADER_SIZE + ENTRY_SIZE * usize::from(head)
    }

    fn at(&self, offset: usize) -> *mut u8 {
        self.region.start.as_ptr().wrapping_add(self.start + offset)
    }

    fn u16_at(&self, offset: usize) -> &AtomicU16 {
        assert!(offset + 2 <= queue_stride(self.size));
        // SAFETY: `open` checked that the region has this queue, `offset` is inside of its stride and even, and
        // the region is kept mapped by `self.region`. All access is atomic.
        unsafe { AtomicU16::from_ptr(self.at(offset).cast()) }
    }

    fn inflight_of(&self, head: u16) -> &AtomicU8 {
        assert!(head < self.size);
        // SAFETY: as above, with a byte of entry `head`, which is inside of the stride.
        unsafe { AtomicU8::from_ptr(self.at(Self::entry(head) + INFLIGHT_AT)) }
    }

    fn counter_of(&self, head: u16) -> &AtomicU64 {
        assert!(head < self.size);
        // SAFETY: as above; strides, headers, entries and the region's offset are multiples of eight.
        unsafe { AtomicU64::from_ptr(self.at(Self::entry(head) + COUNTER_AT).cast()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(queues: u16, size: u16) -> (File, Arc<InflightRegion>) {
        let (file, len) = InflightRegion::create(queues, size).unwrap();
        let region = Arc::new(InflightRegion::map(&file, 0, len, queues, size).unwrap());
        (file, region)
    }

    fn open(region: &Arc<InflightRegion>, used_idx: u16) -> InflightQueue {
        InflightQueue::open(region, 1, 8, used_idx).unwrap().unwrap()
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
        assert_eq!(InflightQueue::open(&region, 0, 8, 0).unwrap().unwrap().heads(), [0_u16; 0]);
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
        assert!(InflightQueue::open(&region, 1, 8, 0).is_err());
        queue.u16_at(VERSION_AT).store(2, Ordering::Relaxed);
        assert!(InflightQueue::open(&region, 1, 8, 0).is_err());
        assert!(InflightQueue::open(&region, 0, 16, 0).is_err(), "a ring larger than its state");
        assert!(InflightQueue::open(&region, 2, 8, 0).unwrap().is_none());
        assert!(InflightRegion::map(&file, 0, 64, 2, 8).is_err(), "too small");
        assert!(InflightRegion::map(&file, 8, 384, 2, 8).is_err(), "beyond the file");
        assert!(InflightRegion::create(65, 8).is_err());
        assert!(InflightRegion::create(1, 0).is_err());
        assert!(InflightRegion::create(1, 40_000).is_err());
    }

    #[test]
    fn the_size_is_that_of_the_queues_asked_for() {
        assert_eq!(InflightRegion::create(1, 16).unwrap().1, 320);
        assert_eq!(InflightRegion::create(2, 128).unwrap().1, 2 * 2112);
    }
}
