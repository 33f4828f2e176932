//! The in-flight region (vhost-user protocol, "Inflight I/O tracking"): which requests a queue holds,
//! in memory that the front-end keeps while this process may die.
//!
//! The layouts are those of QEMU's `docs/interop/vhost-user.rst`, of `split` and of `packed` rings. Numbers read
//! back are checked like guest input.

mod packed;
mod split;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vhost::vhost_user::VhostUserProtocolFeatures;

use self::packed::PackedInflight;
use self::split::SplitInflight;
use super::queue::StopHow;
use super::ring::{Descriptor, Head, Ring};
use super::{QUEUE_SIZE_MAX, QUEUES_MAX};

/// Queues start at multiples of a cache line.
const QUEUE_ALIGNMENT: usize = 64;
/// The layout's version.
const VERSION: u16 = 1;

/// Offsets in the header of a queue, of either layout.
const FEATURES_AT: usize = 0;
const VERSION_AT: usize = 8;
const DESC_NUM_AT: usize = 10;

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

/// How a queue's state lies in the region.
#[derive(Clone, Copy)]
struct Layout {
    header: usize,
    entry: usize,
}

impl Layout {
    fn of(packed: bool) -> Layout {
        if packed { packed::LAYOUT } else { split::LAYOUT }
    }

    /// Bytes of the state of one queue with `size` entries.
    fn stride(self, size: u16) -> usize {
        (self.header + self.entry * usize::from(size)).next_multiple_of(QUEUE_ALIGNMENT)
    }

    /// Bytes of the states of all queues.
    fn len(self, queues: u16, size: u16) -> Result<usize, InflightError> {
        let refuse = |reason| InflightError::Layout { queues, size, reason };
        if queues == 0 || queues > QUEUES_MAX {
            return Err(refuse("there are 1 to 64 queues"));
        }
        if size == 0 || size > QUEUE_SIZE_MAX {
            return Err(refuse("a queue has 1 to 32768 entries"));
        }
        Ok(usize::from(queues) * self.stride(size))
    }
}

impl InflightRegion {
    /// A fresh region for exactly that many queues and entries, as the front-end asked; with its size.
    ///
    /// # Errors
    /// When the numbers are out of range or there is no memory.
    pub fn create(queues: u16, size: u16, packed: bool) -> Result<(File, u64), InflightError> {
        let len = Layout::of(packed).len(queues, size)?;
        let len = u64::try_from(len).expect("a usize fits in 64 bits");
        let memfd = memfd_create("vhost-remap-inflight", MemfdFlags::CLOEXEC).map_err(io::Error::from)?;
        ftruncate(&memfd, len).map_err(io::Error::from)?;
        Ok((File::from(memfd), len))
    }

    /// Map a region that the front-end handed back.
    ///
    /// # Errors
    /// When it is too small for its queues, or cannot be mapped.
    pub fn map(file: &File, offset: u64, len: u64, queues: u16, size: u16) -> Result<InflightRegion, InflightError> {
        // What rings there will be is said later: as much of it as the longer layout needs.
        let (needed, used) = (split::LAYOUT.len(queues, size)?, packed::LAYOUT.len(queues, size)?);
        let refuse = |reason| InflightError::Layout { queues, size, reason };
        let file_len = u64::try_from(fstat(file).map_err(io::Error::from)?.st_size).unwrap_or(0);
        let available = usize::try_from(len).unwrap_or(usize::MAX);
        if available < needed {
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
        let map_len = usize::try_from(lead).expect("less than a page") + used.min(available);
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

    /// A packed ring says nowhere how far it has come; the region does, until the driver begins anew.
    pub(crate) fn forget_packed(self: &Arc<Self>) {
        for index in 0..self.queues {
            if let Some(state) = self.state(index, packed::LAYOUT) {
                state.u16_at(VERSION_AT).store(0, Ordering::Release);
            }
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

    /// Where the state of a queue is, if the region has it.
    fn state(self: &Arc<Self>, index: u16, layout: Layout) -> Option<QueueState> {
        let len = layout.stride(self.size);
        let start = self.lead + usize::from(index) * len;
        let fits = index < self.queues && start + len <= self.len;
        fits.then(|| QueueState { region: self.clone(), start, len })
    }
}

/// The part of the region that belongs to one queue.
struct QueueState {
    region: Arc<InflightRegion>,
    start: usize,
    len: usize,
}

impl QueueState {
    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        #[cfg(test)]
        super::testing::kill::point();
        assert!(offset.is_multiple_of(len) && offset + len <= self.len);
        self.region.start.as_ptr().wrapping_add(self.start + offset)
    }

    fn u8_at(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: `offset` is inside of the queue's stride (`at`), which lies in the mapping (InflightRegion::state),
        // and the region is kept mapped by `self.region`. All access is atomic.
        unsafe { AtomicU8::from_ptr(self.at(offset, 1)) }
    }

    fn u16_at(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: as above; the offset is even (`at`), and strides and the region's offset are multiples of eight.
        unsafe { AtomicU16::from_ptr(self.at(offset, 2).cast()) }
    }

    fn u32_at(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: as above, with a multiple of four.
        unsafe { AtomicU32::from_ptr(self.at(offset, 4).cast()) }
    }

    fn u64_at(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: as above, with a multiple of eight.
        unsafe { AtomicU64::from_ptr(self.at(offset, 8).cast()) }
    }
}

/// The in-flight state of one queue.
pub(crate) enum InflightQueue {
    Split(SplitInflight),
    Packed(PackedInflight),
}

impl InflightQueue {
    /// The state of queue `index`, and the requests under way in the order they were taken. The ring is brought to the
    /// place after them: front-ends differ in what they know of it. `None` where the region has no such queue.
    ///
    /// # Errors
    /// When the region belongs to another layout or queue size.
    pub(crate) fn open(
        region: &Arc<InflightRegion>,
        index: u16,
        queue_size: u16,
        ring: &mut Ring,
    ) -> Result<Option<(InflightQueue, Vec<Head>)>, InflightError> {
        if index >= region.queues {
            return Ok(None);
        }
        Ok(Some(match ring {
            Ring::Split(ring) => {
                let state = SplitInflight::open(region, index, queue_size, ring.next_used())?;
                let heads: Vec<u16> = state.heads().into_iter().filter(|head| *head < queue_size).collect();
                // What was taken is what is used plus what is in flight.
                let taken = u16::try_from(heads.len()).expect("at most one entry a head");
                ring.set_next_avail(ring.next_used().wrapping_add(taken));
                (InflightQueue::Split(state), heads.into_iter().map(Head::of_split).collect())
            }
            Ring::Packed(ring) => {
                let (state, heads) = PackedInflight::open(region, index, queue_size, ring)?;
                (InflightQueue::Packed(state), heads)
            }
        }))
    }

    /// A request is taken; to be called before it is submitted. `list` is what it consists of in a packed ring.
    ///
    /// # Panics
    /// If the head is not below the queue size, or a batch is open that [`InflightQueue::is_batch_open`] speaks of.
    #[inline]
    pub(crate) fn begin(&mut self, head: &mut Head, list: &[Descriptor]) {
        match self {
            InflightQueue::Split(state) => state.begin(head.id),
            InflightQueue::Packed(state) => head.entry = state.begin(list),
        }
    }

    /// A request that was found in the region is taken again. `list` gets what it consists of in a packed ring.
    pub(crate) fn begin_again(&mut self, head: Head, list: &mut Vec<Descriptor>) {
        match self {
            InflightQueue::Split(state) => state.begin(head.id),
            InflightQueue::Packed(state) => state.load(head, list),
        }
    }

    /// A request's used entry is written; to be called before it is published.
    #[inline]
    pub(crate) fn end(&mut self, head: Head) {
        match self {
            InflightQueue::Split(state) => state.end(head.id),
            InflightQueue::Packed(state) => state.end(head),
        }
    }

    /// Whether requests have ended and not been published, before which none can begin or be forgotten.
    #[inline]
    pub(crate) fn is_batch_open(&self) -> bool {
        match self {
            InflightQueue::Split(_) => false,
            InflightQueue::Packed(state) => state.is_batch_open(),
        }
    }

    /// What ended is about to be published.
    #[inline]
    pub(crate) fn publishing(&mut self, ring: &Ring) {
        if let (InflightQueue::Packed(state), Ring::Packed(ring)) = (self, ring) {
            state.publishing(ring.next_used());
        }
    }

    /// What ended has been published: it is no longer in flight.
    #[inline]
    pub(crate) fn published(&mut self, ring: &Ring) {
        match (self, ring) {
            (InflightQueue::Split(state), Ring::Split(ring)) => state.published(ring.next_used()),
            (InflightQueue::Packed(state), Ring::Packed(ring)) => state.published(ring.next_used()),
            _ => unreachable!("`open` makes the state of the ring's kind"),
        }
    }

    /// A request was given up before anything happened, and the ring rewound over it.
    pub(crate) fn forget(&mut self, head: Head) {
        match self {
            InflightQueue::Split(state) => state.forget(head.id),
            InflightQueue::Packed(state) => state.forget(head),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_is_that_of_the_queues_asked_for() {
        let size = |queues, size, packed| InflightRegion::create(queues, size, packed).unwrap().1;
        assert_eq!((size(1, 16, false), size(2, 128, false)), (320, 2 * 2112));
        assert_eq!((size(1, 16, true), size(2, 128, true)), (576, 2 * 4160));
    }
}
