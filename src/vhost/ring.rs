//! A split virtqueue (virtio 1.3 §2.7) on host pointers that were translated and checked once.
//!
//! The guest may write any of this memory at any time. Indices are read atomically and once; nothing read
//! here is an address. Only numbers below the queue size are used as indices.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use super::dirty::DirtyLog;
use super::memory::{MemoryMap, RegionBits};

/// Bytes of a descriptor (virtio 1.3 §2.7.5).
pub(crate) const DESCRIPTOR_SIZE: u64 = 16;

/// The device asks the driver not to kick (virtio 1.3 §2.7.8, VIRTQ_USED_F_NO_NOTIFY).
const USED_F_NO_NOTIFY: u16 = 1;
/// The driver asks not to be interrupted (virtio 1.3 §2.7.6, VIRTQ_AVAIL_F_NO_INTERRUPT).
const AVAIL_F_NO_INTERRUPT: u16 = 1;

/// Offsets in the avail and used rings: flags, index, then the elements.
const FLAGS: usize = 0;
const INDEX: usize = 2;
const ELEMENTS: usize = 4;

/// Why a ring cannot be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The size is 0, no power of two, or above 32768.
    #[error("queue size {0} is not a power of two up to 32768")]
    Size(u32),
    /// A part of the ring is not in guest memory (or in more than one region).
    #[error("the {0} at front-end address {1:#x} is not in one memory region")]
    NotMapped(&'static str, u64),
    /// A part of the ring is misaligned (virtio 1.3 §2.7).
    #[error("the {0} at front-end address {1:#x} is misaligned")]
    Misaligned(&'static str, u64),
    /// The driver claims more buffers than the queue holds.
    #[error("avail index {idx} is more than {size} entries ahead of {next}")]
    IndexJump {
        /// What was read.
        idx: u16,
        /// The first entry not yet taken.
        next: u16,
        /// Queue size.
        size: u16,
    },
}

/// Where the parts of a ring are, in the front-end's addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptor table.
    pub descriptors: u64,
    /// Avail ring.
    pub avail: u64,
    /// Used ring.
    pub used: u64,
    /// The used ring's guest address, where writes to it belong into the dirty log (VHOST_VRING_F_LOG).
    pub log: Option<u64>,
}

/// A descriptor, copied out (virtio 1.3 §2.7.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

impl Descriptor {
    /// From the sixteen bytes in guest memory.
    pub(crate) fn from_bytes(bytes: [u8; 16]) -> Descriptor {
        let word = u128::from_le_bytes(bytes);
        Descriptor {
            addr: low_u64(word),
            len: u32::try_from((word >> 64) & 0xffff_ffff).expect("masked"),
            flags: u16::try_from((word >> 96) & 0xffff).expect("masked"),
            next: u16::try_from(word >> 112).expect("sixteen bits are left"),
        }
    }
}

fn low_u64(word: u128) -> u64 {
    u64::try_from(word & u128::from(u64::MAX)).expect("masked")
}

/// The three parts as host addresses.
#[derive(Clone, Copy)]
struct Parts {
    descriptors: NonNull<u8>,
    avail: NonNull<u8>,
    used: NonNull<u8>,
    regions: RegionBits,
}

/// A split virtqueue in guest memory, seen from the device.
pub struct Ring {
    parts: Parts,
    /// Keeps the memory behind `parts` mapped.
    memory: Arc<MemoryMap>,
    addresses: RingAddresses,
    size: u16,
    event_idx: bool,
    /// The avail entry taken next.
    next_avail: u16,
    /// The used entry written next.
    next_used: u16,
    /// The used index the driver was last told.
    published: u16,
}

impl Ring {
    /// A ring at these addresses. The used index is taken from the ring itself, the next avail entry is
    /// `next_avail` or, where the front-end does not know it, the used index.
    ///
    /// # Errors
    /// When size, place or alignment are not those of a ring.
    pub fn new(
        memory: &Arc<MemoryMap>,
        addresses: RingAddresses,
        size: u16,
        next_avail: u16,
        event_idx: bool,
    ) -> Result<Ring, RingError> {
        if !size.is_power_of_two() || size > super::QUEUE_SIZE_MAX {
            return Err(RingError::Size(u32::from(size)));
        }
        let parts = Parts::translate(memory, addresses, size)?;
        let mut ring =
            Ring { parts, memory: memory.clone(), addresses, size, event_idx, next_avail, next_used: 0, published: 0 };
        ring.next_used = u16::from_le(ring.used_u16(INDEX).load(Ordering::Acquire));
        ring.published = ring.next_used;
        Ok(ring)
    }

    /// Translate the ring anew after the memory changed. On error the ring keeps its old memory, which stays
    /// mapped, for the requests still under way.
    ///
    /// # Errors
    /// When the ring is not in the new memory.
    pub fn remap(&mut self, memory: &Arc<MemoryMap>, addresses: RingAddresses) -> Result<(), RingError> {
        self.parts = Parts::translate(memory, addresses, self.size)?;
        self.addresses = addresses;
        self.memory = memory.clone();
        Ok(())
    }

    /// Where the ring is, in the front-end's addresses.
    pub fn addresses(&self) -> RingAddresses {
        self.addresses
    }

    /// Regions the ring lies in.
    pub fn regions(&self) -> RegionBits {
        self.parts.regions
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The avail entry taken next.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// The used entry written next.
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// Go to another place in the avail ring: back over requests that were given up, or to where the
    /// in-flight region says.
    pub fn set_next_avail(&mut self, next_avail: u16) {
        self.next_avail = next_avail;
    }

    /// How many entries the driver made available since the last [`Ring::pop`]. Read once for a batch.
    ///
    /// # Errors
    /// When the driver claims more than the queue holds: it may not run ahead of the used ring by more than
    /// the queue size (virtio 1.3 §2.7.13.1).
    #[inline]
    pub fn available(&self) -> Result<u16, RingError> {
        // Acquire pairs with the driver's barrier before its index update: what the entries say is visible.
        let idx = u16::from_le(self.avail_u16(INDEX).load(Ordering::Acquire));
        let ahead = idx.wrapping_sub(self.next_avail);
        if ahead > self.size {
            return Err(RingError::IndexJump { idx, next: self.next_avail, size: self.size });
        }
        Ok(ahead)
    }

    /// The next chain head, as the driver wrote it: any number. The caller has counted with
    /// [`Ring::available`].
    #[inline]
    pub fn pop(&mut self) -> u16 {
        let element = usize::from(self.next_avail & (self.size - 1));
        let head = u16::from_le(self.avail_u16(ELEMENTS + 2 * element).load(Ordering::Relaxed));
        self.next_avail = self.next_avail.wrapping_add(1);
        head
    }

    /// Descriptor number `index`, copied out; `None` outside of the table.
    #[inline]
    pub(crate) fn descriptor(&self, index: u16) -> Option<Descriptor> {
        if index >= self.size {
            return None;
        }
        let at = self.parts.descriptors.as_ptr().wrapping_add(usize::from(index) * 16);
        // SAFETY: `descriptors` is 16-byte aligned and has `size` descriptors (Parts::translate), the memory is
        // kept mapped by `self.memory`, and volatile reads of plain bytes tolerate concurrent writes.
        let bytes = unsafe { at.cast::<[u8; 16]>().read_volatile() };
        Some(Descriptor::from_bytes(bytes))
    }

    /// Write a used entry. The driver sees it with the next [`Ring::publish`].
    #[inline]
    pub fn push_used(&mut self, head: u16, len: u32) {
        let element = usize::from(self.next_used & (self.size - 1));
        self.used_u32(ELEMENTS + 8 * element).store(u32::from(head).to_le(), Ordering::Relaxed);
        self.used_u32(ELEMENTS + 8 * element + 4).store(len.to_le(), Ordering::Relaxed);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Whether there are used entries the driver has not been shown.
    #[inline]
    pub fn unpublished(&self) -> bool {
        self.next_used != self.published
    }

    /// Show the driver the used entries written so far, with one index update, and say whether it wants to be
    /// notified (virtio 1.3 §2.7.7).
    #[inline]
    pub fn publish(&mut self) -> bool {
        let old = self.published;
        self.published = self.next_used;
        self.used_u16(INDEX).store(self.next_used.to_le(), Ordering::Release);
        // The index must be visible before the driver's wish is read, as it writes its wish and then reads the
        // index (virtio 1.3 §2.7.13.4.1 has the driver's half).
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = u16::from_le(self.avail_u16(ELEMENTS + 2 * usize::from(self.size)).load(Ordering::Relaxed));
            // vring_need_event: did the index pass the event?
            self.published.wrapping_sub(event).wrapping_sub(1) < self.published.wrapping_sub(old)
        } else {
            u16::from_le(self.avail_u16(FLAGS).load(Ordering::Relaxed)) & AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Ask for kicks. Returns whether entries came in the meantime, for which no kick may come.
    #[inline]
    pub fn arm(&mut self) -> bool {
        if self.event_idx {
            self.avail_event().store(self.next_avail.to_le(), Ordering::Relaxed);
        } else {
            self.used_u16(FLAGS).store(0, Ordering::Relaxed);
        }
        // The wish must be visible before the index is read again (virtio 1.3 §2.7.10).
        fence(Ordering::SeqCst);
        u16::from_le(self.avail_u16(INDEX).load(Ordering::Acquire)) != self.next_avail
    }

    /// Ask not to be kicked for now. With EVENT_IDX there is nothing to do: the event passed already.
    #[inline]
    pub fn disarm(&mut self) {
        if !self.event_idx {
            self.used_u16(FLAGS).store(USED_F_NO_NOTIFY.to_le(), Ordering::Relaxed);
        }
    }

    /// The used index the driver was last told.
    pub(crate) fn published(&self) -> u16 {
        self.published
    }

    /// Note in the dirty log what was written to the used ring: the entries from `first` to the published one, and
    /// the words before and after them.
    pub(crate) fn mark_used(&self, log: &DirtyLog, first: u16) {
        let Some(used) = self.addresses.log else { return };
        let mark = |offset: usize, len: u64| {
            let offset = u64::try_from(offset).expect("within a ring");
            log.mark(used.saturating_add(offset), len);
        };
        mark(FLAGS, 4);
        mark(ELEMENTS + 8 * usize::from(self.size), 2);
        for entry in 0..self.published.wrapping_sub(first) {
            mark(ELEMENTS + 8 * usize::from(first.wrapping_add(entry) & (self.size - 1)), 8);
        }
    }

    fn avail_u16(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset <= ELEMENTS + 2 * usize::from(self.size));
        // SAFETY: Parts::translate checked that the avail ring has 6 + 2 * size bytes at an even address, every
        // caller stays within them, and `self.memory` keeps them mapped. All access is atomic.
        unsafe { AtomicU16::from_ptr(self.parts.avail.as_ptr().wrapping_add(offset).cast()) }
    }

    fn used_u16(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset < ELEMENTS);
        // SAFETY: as for the avail ring: the used ring has 6 + 8 * size bytes at a multiple of four.
        unsafe { AtomicU16::from_ptr(self.parts.used.as_ptr().wrapping_add(offset).cast()) }
    }

    fn used_u32(&self, offset: usize) -> &AtomicU32 {
        debug_assert!(offset < ELEMENTS + 8 * usize::from(self.size));
        // SAFETY: as above; elements start at a multiple of four.
        unsafe { AtomicU32::from_ptr(self.parts.used.as_ptr().wrapping_add(offset).cast()) }
    }

    fn avail_event(&self) -> &AtomicU16 {
        let offset = ELEMENTS + 8 * usize::from(self.size);
        // SAFETY: as above; avail_event are the last two of the 6 + 8 * size bytes.
        unsafe { AtomicU16::from_ptr(self.parts.used.as_ptr().wrapping_add(offset).cast()) }
    }
}

impl Parts {
    fn translate(memory: &MemoryMap, addresses: RingAddresses, size: u16) -> Result<Parts, RingError> {
        let size = u64::from(size);
        let mut regions = RegionBits::default();
        let mut part = |name, user, len: u64, alignment: usize| {
            let piece = memory.user_range(user, len).ok_or(RingError::NotMapped(name, user))?;
            if !piece.ptr.addr().is_multiple_of(alignment) {
                return Err(RingError::Misaligned(name, user));
            }
            regions = regions.union(piece.region);
            NonNull::new(piece.ptr).ok_or(RingError::NotMapped(name, user))
        };
        // Sizes and alignments: virtio 1.3 §2.7. The event fields are counted always; drivers lay rings out
        // with them whether or not EVENT_IDX is negotiated.
        let descriptors = part("descriptor table", addresses.descriptors, DESCRIPTOR_SIZE * size, 16)?;
        let avail = part("avail ring", addresses.avail, 6 + 2 * size, 2)?;
        let used = part("used ring", addresses.used, 6 + 8 * size, 4)?;
        Ok(Parts { descriptors, avail, used, regions })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost::testing::Guest;

    #[test]
    fn heads_come_in_order_and_used_entries_show_at_once() {
        let guest = Guest::new(4);
        let mut ring = guest.ring();
        assert_eq!(ring.available(), Ok(0));
        guest.offer(3);
        guest.offer(1);
        assert_eq!(ring.available(), Ok(2));
        assert_eq!((ring.pop(), ring.pop()), (3, 1));
        ring.push_used(1, 7);
        ring.push_used(3, 9);
        assert_eq!(guest.take_used(), None);
        assert!(ring.unpublished());
        assert!(ring.publish());
        assert_eq!((guest.take_used(), guest.take_used(), guest.take_used()), (Some((1, 7)), Some((3, 9)), None));
    }

    #[test]
    fn an_index_more_than_the_queue_ahead_is_refused() {
        let guest = Guest::new(4);
        let ring = guest.ring();
        guest.set_avail_idx(4);
        assert_eq!(ring.available(), Ok(4));
        for idx in [5, 0x8000, 0xffff] {
            guest.set_avail_idx(idx);
            assert_eq!(ring.available(), Err(RingError::IndexJump { idx, next: 0, size: 4 }));
        }
    }

    #[test]
    fn indices_wrap() {
        let guest = Guest::new(4);
        guest.set_avail_idx(0xfffe);
        let mut ring = guest.ring();
        ring.set_next_avail(0xfffe);
        guest.set_avail_idx(1);
        assert_eq!(ring.available(), Ok(3));
        for _ in 0..3 {
            ring.pop();
        }
        assert_eq!((ring.next_avail(), ring.available()), (1, Ok(0)));
    }

    #[test]
    fn flags_suppress_notifications_and_kicks() {
        let guest = Guest::new(4);
        let mut ring = guest.ring();
        guest.set_avail_flags(AVAIL_F_NO_INTERRUPT);
        ring.push_used(0, 0);
        assert!(!ring.publish());
        ring.disarm();
        assert_eq!(guest.used_flags(), USED_F_NO_NOTIFY);
        assert!(!ring.arm());
        assert_eq!(guest.used_flags(), 0);
        guest.offer(0);
        assert!(ring.arm(), "what came before arming must be seen");
    }

    #[test]
    fn event_indices_suppress_notifications_and_kicks() {
        let guest = Guest::new(4);
        let mut ring = guest.ring_with(true);
        let used = |ring: &mut Ring, event: u16, count: u16| {
            guest.set_used_event(event);
            (0..count).for_each(|_| ring.push_used(0, 0));
            ring.publish()
        };
        assert!(used(&mut ring, 0, 1), "the driver waits for entry 0");
        assert!(!used(&mut ring, 2, 1), "entry 1 is not the one it waits for");
        assert!(used(&mut ring, 2, 3), "entries 2 to 4 pass it");
        assert!(!used(&mut ring, 2, 1), "it was passed before");
        guest.offer(0);
        ring.pop();
        assert!(!ring.arm());
        assert_eq!((guest.avail_event(), guest.used_flags()), (1, 0));
    }

    #[test]
    fn rings_outside_of_memory_or_misaligned_are_refused() {
        let guest = Guest::new(4);
        let good = guest.addresses();
        let new = |addresses, size| Ring::new(&guest.map(), addresses, size, 0, false).map(|_| ());
        assert_eq!(new(good, 4), Ok(()));
        assert_eq!(new(good, 32_768), Ok(()));
        assert_eq!(new(good, 3), Err(RingError::Size(3)));
        assert_eq!(new(good, 0), Err(RingError::Size(0)));
        let descriptors = good.descriptors + 8;
        assert!(matches!(new(RingAddresses { descriptors, ..good }, 4), Err(RingError::Misaligned(..))));
        let used = good.used + 2;
        assert!(matches!(new(RingAddresses { used, ..good }, 4), Err(RingError::Misaligned(..))));
        for avail in [guest.first_region_end() - 12, 1 << 40, u64::MAX - 1] {
            assert!(matches!(new(RingAddresses { avail, ..good }, 4), Err(RingError::NotMapped(..))), "{avail:#x}");
        }
    }
}
