//! A split virtqueue (virtio 1.3 §2.7): a table of descriptors, and a ring for each direction.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::{DESCRIPTOR_SIZE, Descriptor, Parts, RingAddresses, RingError, Shape};
use crate::vhost::QUEUE_SIZE_MAX;
use crate::vhost::dirty::DirtyLog;
use crate::vhost::memory::{MemoryMap, RegionBits};

/// The device asks the driver not to kick (virtio 1.3 §2.7.8, VIRTQ_USED_F_NO_NOTIFY).
const USED_F_NO_NOTIFY: u16 = 1;
/// The driver asks not to be interrupted (virtio 1.3 §2.7.6, VIRTQ_AVAIL_F_NO_INTERRUPT).
const AVAIL_F_NO_INTERRUPT: u16 = 1;

/// Offsets in the avail and used rings: flags, index, then the elements.
const FLAGS: usize = 0;
const INDEX: usize = 2;
const ELEMENTS: usize = 4;

/// Sizes and alignments of the parts: virtio 1.3 §2.7. The event fields are counted always; drivers lay rings out
/// with them whether or not EVENT_IDX is negotiated.
pub(super) fn shapes(size: u16) -> Result<[Shape; 3], RingError> {
    if !size.is_power_of_two() || size > QUEUE_SIZE_MAX {
        return Err(RingError::Size(u32::from(size)));
    }
    let entries = u64::from(size);
    Ok([
        ("descriptor table", DESCRIPTOR_SIZE * entries, 16),
        ("avail ring", 6 + 2 * entries, 2),
        ("used ring", 6 + 8 * entries, 4),
    ])
}

/// A split virtqueue in guest memory, seen from the device.
pub struct SplitRing {
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

impl SplitRing {
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
    ) -> Result<SplitRing, RingError> {
        let parts = Parts::translate(memory, addresses, shapes(size)?)?;
        let mut ring = SplitRing {
            parts,
            memory: memory.clone(),
            addresses,
            size,
            event_idx,
            next_avail,
            next_used: 0,
            published: 0,
        };
        ring.next_used = u16::from_le(ring.parts.used.u16_at(INDEX).load(Ordering::Acquire));
        ring.published = ring.next_used;
        Ok(ring)
    }

    /// Translate the ring anew after the memory changed. On error the ring keeps its old memory, which stays
    /// mapped, for the requests still under way.
    ///
    /// # Errors
    /// When the ring is not in the new memory.
    pub fn remap(&mut self, memory: &Arc<MemoryMap>, addresses: RingAddresses) -> Result<(), RingError> {
        self.parts = Parts::translate(memory, addresses, shapes(self.size)?)?;
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

    /// How many entries the driver made available since the last [`SplitRing::pop`]. Read once for a batch.
    ///
    /// # Errors
    /// When the driver claims more than the queue holds: it may not run ahead of the used ring by more than
    /// the queue size (virtio 1.3 §2.7.13.1).
    #[inline]
    pub fn available(&self) -> Result<u16, RingError> {
        // Acquire pairs with the driver's barrier before its index update: what the entries say is visible.
        let idx = u16::from_le(self.parts.avail.u16_at(INDEX).load(Ordering::Acquire));
        let ahead = idx.wrapping_sub(self.next_avail);
        if ahead > self.size {
            return Err(RingError::IndexJump { idx, next: self.next_avail, size: self.size });
        }
        Ok(ahead)
    }

    /// The next chain head, as the driver wrote it: any number. The caller has counted with
    /// [`SplitRing::available`].
    #[inline]
    pub fn pop(&mut self) -> u16 {
        let element = usize::from(self.next_avail & (self.size - 1));
        let head = u16::from_le(self.parts.avail.u16_at(ELEMENTS + 2 * element).load(Ordering::Relaxed));
        self.next_avail = self.next_avail.wrapping_add(1);
        head
    }

    /// Descriptor number `index`, copied out; `None` outside of the table.
    #[inline]
    pub(crate) fn descriptor(&self, index: u16) -> Option<Descriptor> {
        if index >= self.size {
            return None;
        }
        Some(Descriptor::from_bytes(self.parts.descriptors.descriptor(index)))
    }

    /// Write a used entry. The driver sees it with the next [`SplitRing::publish`].
    #[inline]
    pub fn push_used(&mut self, head: u16, len: u32) {
        let element = usize::from(self.next_used & (self.size - 1));
        self.parts.used.u32_at(ELEMENTS + 8 * element).store(u32::from(head).to_le(), Ordering::Relaxed);
        self.parts.used.u32_at(ELEMENTS + 8 * element + 4).store(len.to_le(), Ordering::Relaxed);
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
        self.parts.used.u16_at(INDEX).store(self.next_used.to_le(), Ordering::Release);
        // The index must be visible before the driver's wish is read, as it writes its wish and then reads the
        // index (virtio 1.3 §2.7.13.4.1 has the driver's half).
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event =
                u16::from_le(self.parts.avail.u16_at(ELEMENTS + 2 * usize::from(self.size)).load(Ordering::Relaxed));
            // vring_need_event: did the index pass the event?
            self.published.wrapping_sub(event).wrapping_sub(1) < self.published.wrapping_sub(old)
        } else {
            u16::from_le(self.parts.avail.u16_at(FLAGS).load(Ordering::Relaxed)) & AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Ask for kicks. Returns whether entries came in the meantime, for which no kick may come.
    #[inline]
    pub fn arm(&mut self) -> bool {
        if self.event_idx {
            self.parts
                .used
                .u16_at(ELEMENTS + 8 * usize::from(self.size))
                .store(self.next_avail.to_le(), Ordering::Relaxed);
        } else {
            self.parts.used.u16_at(FLAGS).store(0, Ordering::Relaxed);
        }
        // The wish must be visible before the index is read again (virtio 1.3 §2.7.10).
        fence(Ordering::SeqCst);
        u16::from_le(self.parts.avail.u16_at(INDEX).load(Ordering::Acquire)) != self.next_avail
    }

    /// Ask not to be kicked for now. With EVENT_IDX there is nothing to do: the event passed already.
    #[inline]
    pub fn disarm(&mut self) {
        if !self.event_idx {
            self.parts.used.u16_at(FLAGS).store(USED_F_NO_NOTIFY.to_le(), Ordering::Relaxed);
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
        let used = |ring: &mut SplitRing, event: u16, count: u16| {
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
        let new = |addresses, size| SplitRing::new(&guest.map(), addresses, size, 0, false).map(|_| ());
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
