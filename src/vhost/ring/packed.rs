//! A packed virtqueue (virtio 1.3 §2.8): one ring of descriptors, which the driver makes available and the device
//! marks as used, and for each side a word that says when it wants to be told.
//!
//! The device holds the descriptors from the next used place on, in the order of the ring, up to the next avail
//! place. It reads a chain once, when it takes it: any used descriptor may be written over any of these.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::{DESCRIPTOR_SIZE, Descriptor, Head, Parts, RingAddresses, RingError, Shape};
use crate::vhost::QUEUE_SIZE_MAX;
use crate::vhost::dirty::DirtyLog;
use crate::vhost::memory::{MemoryMap, RegionBits};

/// Descriptor flags (virtio 1.3 §2.8.6, §2.8.3, §2.8.1).
const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_AVAIL: u16 = 1 << 7;
const F_USED: u16 = 1 << 15;

/// Offsets in a descriptor: length, buffer id, flags.
const LEN: usize = 8;
const ID: usize = 12;
const FLAGS: usize = 14;

/// Event flags (virtio 1.3 §2.8.10), in the upper half of the word; the place is in the lower one.
const EVENT_ENABLE: u16 = 0;
const EVENT_DISABLE: u16 = 1;
const EVENT_DESC: u16 = 2;

/// The wrap counter's bit beside an index.
const WRAP: u16 = 1 << 15;

/// Sizes and alignments of the parts: virtio 1.3 §2.8.10.1.
pub(super) fn shapes(size: u16) -> Result<[Shape; 3], RingError> {
    if size == 0 || size > QUEUE_SIZE_MAX {
        return Err(RingError::Size(u32::from(size)));
    }
    let ring = DESCRIPTOR_SIZE * u64::from(size);
    Ok([("descriptor ring", ring, 16), ("driver event suppression", 4, 4), ("device event suppression", 4, 4)])
}

/// A descriptor of the ring and the wrap counter with which it is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) index: u16,
    pub(crate) wrap: bool,
}

impl Place {
    /// Where a driver begins.
    pub(crate) const START: Place = Place { index: 0, wrap: true };

    /// As the protocol and event words have it.
    pub(crate) fn of(bits: u16) -> Place {
        Place { index: bits & !WRAP, wrap: bits & WRAP != 0 }
    }

    /// The inverse of [`Place::of`].
    pub(crate) fn bits(self) -> u16 {
        self.index | if self.wrap { WRAP } else { 0 }
    }

    /// So many descriptors further, at most once around.
    pub(crate) fn plus(self, count: u16, size: u16) -> Place {
        let left = size - self.index;
        if count < left {
            Place { index: self.index + count, wrap: self.wrap }
        } else {
            Place { index: count - left, wrap: !self.wrap }
        }
    }

    /// Descriptors from `start` to here, of twice the size of the ring: then both counters are the same again.
    fn since(self, start: Place, size: u16) -> u16 {
        let twice = 2 * u32::from(size);
        let at = |place: Place| u32::from(place.index) + if place.wrap { 0 } else { u32::from(size) };
        let count = (at(self) + twice - at(start) % twice) % twice;
        u16::try_from(count).expect("less than twice 32768")
    }

    /// The flags of a descriptor that the driver has made available here.
    fn available_flags(self) -> u16 {
        if self.wrap { F_AVAIL } else { F_USED }
    }

    /// The flags of a descriptor that the device has used here.
    fn used_flags(self) -> u16 {
        if self.wrap { F_AVAIL | F_USED } else { 0 }
    }
}

/// A packed virtqueue in guest memory, seen from the device.
pub(crate) struct PackedRing {
    parts: Parts,
    /// Keeps the memory behind `parts` mapped.
    memory: Arc<MemoryMap>,
    addresses: RingAddresses,
    size: u16,
    event_idx: bool,
    /// The chain taken next.
    next_avail: Place,
    /// The used descriptor written next.
    next_used: Place,
    /// The first used descriptor that the driver has not been shown.
    published: Place,
    /// The flags that show it.
    first_flags: u16,
}

impl PackedRing {
    /// A ring at these addresses that goes on at `base`: the next avail place, above it the next used one.
    ///
    /// A base of 0 is what some front-ends (libblkio's) say of a ring that is new.
    ///
    /// # Errors
    /// When size, place or alignment are not those of a ring.
    pub(crate) fn new(
        memory: &Arc<MemoryMap>,
        addresses: RingAddresses,
        size: u16,
        base: u32,
        event_idx: bool,
    ) -> Result<PackedRing, RingError> {
        let parts = Parts::translate(memory, addresses, shapes(size)?)?;
        let half = |shift: u32| Place::of(u16::try_from((base >> shift) & 0xffff).expect("masked"));
        let (mut avail, mut used) = (half(0), half(16));
        let ring = |next_avail, next_used| PackedRing {
            parts,
            memory: memory.clone(),
            addresses,
            size,
            event_idx,
            next_avail,
            next_used,
            published: next_used,
            first_flags: 0,
        };
        // One that has gone round once has F_USED where a chain was used last, whoever wrote there since; not in its
        // first descriptor, which a longer chain before it may have stood for.
        let begun = ring(avail, used);
        if base == 0 && (0..size).all(|index| begun.flags(index) & F_USED == 0) {
            (avail, used) = (Place::START, Place::START);
        }
        if avail.index >= size || used.index >= size || avail.since(used, size) > size {
            return Err(RingError::Base { base, size });
        }
        Ok(ring(avail, used))
    }

    /// As [`Ring::remap`](super::Ring::remap).
    ///
    /// # Errors
    /// When the ring is not in the new memory.
    pub(super) fn remap(&mut self, memory: &Arc<MemoryMap>, addresses: RingAddresses) -> Result<(), RingError> {
        self.parts = Parts::translate(memory, addresses, shapes(self.size)?)?;
        self.addresses = addresses;
        self.memory = memory.clone();
        Ok(())
    }

    pub(super) fn addresses(&self) -> RingAddresses {
        self.addresses
    }

    pub(super) fn regions(&self) -> RegionBits {
        self.parts.regions
    }

    /// Number of descriptors.
    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    /// The place of the next chain.
    pub(crate) fn next_avail(&self) -> Place {
        self.next_avail
    }

    /// The place of the next used descriptor.
    pub(crate) fn next_used(&self) -> Place {
        self.next_used
    }

    pub(super) fn set_next_avail(&mut self, place: Place) {
        self.next_avail = place;
    }

    /// Go on where the in-flight region says: with the used descriptor at `used`, and `held` descriptors from there
    /// on taken.
    ///
    /// Of a batch that a process had not shown to the driver when it died, all used descriptors but the first have
    /// their flags. The driver must not take them for used once a first one is shown: what they stand for is under
    /// way again, and may end in another order.
    pub(crate) fn resume(&mut self, used: Place, held: u16) {
        (self.next_used, self.published) = (used, used);
        self.next_avail = used.plus(held, self.size);
        for place in (1..held).map(|count| used.plus(count, self.size)) {
            if self.flags(place.index) & (F_AVAIL | F_USED) == place.used_flags() {
                let flags = self.parts.descriptors.u16_at(usize::from(place.index) * 16 + FLAGS);
                flags.store(place.available_flags().to_le(), Ordering::Release);
            }
        }
    }

    pub(super) fn ahead_of(&self, place: Place) -> u16 {
        self.next_avail.since(place, self.size)
    }

    pub(super) fn base(&self) -> u32 {
        u32::from(self.next_avail.bits()) | u32::from(self.next_used.bits()) << 16
    }

    /// Whether the driver has made the descriptor there available.
    pub(crate) fn is_available(&self, place: Place) -> bool {
        self.flags(place.index) & (F_AVAIL | F_USED) == place.available_flags()
    }

    /// As [`Ring::pop`](super::Ring::pop).
    ///
    /// # Errors
    /// When the device holds the descriptor, or the chain has no end. How many descriptors to skip for it is then
    /// unknown, so it cannot be given back.
    #[inline]
    pub(crate) fn pop(&mut self, list: &mut Vec<Descriptor>) -> Result<Option<Head>, RingError> {
        let first = self.next_avail;
        let flags = self.flags(first.index);
        if flags & (F_AVAIL | F_USED) != first.available_flags() {
            return Ok(None);
        }
        let room = self.size.saturating_sub(first.since(self.next_used, self.size));
        if room == 0 {
            return Err(RingError::Held(first.index));
        }
        list.clear();
        for len in 1..=room {
            let index = first.plus(len - 1, self.size).index;
            let mut descriptor = Descriptor::from_packed_bytes(self.parts.descriptors.descriptor(index));
            if len == 1 {
                descriptor.flags = flags;
            }
            list.push(descriptor);
            if descriptor.flags & F_NEXT == 0 {
                self.next_avail = first.plus(len, self.size);
                return Ok(Some(Head { id: descriptor.next, len, entry: 0 }));
            }
        }
        Err(RingError::Endless { first: first.index, room })
    }

    /// As [`Ring::push_used`](super::Ring::push_used): the used descriptor counts for all of the chain. The flags of
    /// the first of a batch are written last.
    #[inline]
    pub(crate) fn push_used(&mut self, head: Head, len: u32) {
        let at = usize::from(self.next_used.index) * 16;
        let ring = &self.parts.descriptors;
        ring.u32_at(at + LEN).store(len.to_le(), Ordering::Relaxed);
        ring.u16_at(at + ID).store(head.id.to_le(), Ordering::Relaxed);
        let flags = self.next_used.used_flags() | if len > 0 { F_WRITE } else { 0 };
        if self.next_used == self.published {
            self.first_flags = flags;
        } else {
            ring.u16_at(at + FLAGS).store(flags.to_le(), Ordering::Relaxed);
        }
        self.next_used = self.next_used.plus(head.len, self.size);
    }

    #[inline]
    pub(super) fn unpublished(&self) -> bool {
        self.next_used != self.published
    }

    /// As [`Ring::publish`](super::Ring::publish): a driver looks at one used descriptor after the other, so the
    /// first shows them all.
    #[inline]
    pub(crate) fn publish(&mut self) -> bool {
        let old = self.published;
        self.published = self.next_used;
        let flags = self.parts.descriptors.u16_at(usize::from(old.index) * 16 + FLAGS);
        flags.store(self.first_flags.to_le(), Ordering::Release);
        // The descriptors must be visible before the driver's wish is read, as it writes its wish and then looks
        // for used descriptors.
        fence(Ordering::SeqCst);
        let event = u32::from_le(self.parts.avail.u32_at(0).load(Ordering::Relaxed));
        match u16::try_from(event >> 16).expect("sixteen bits are left") & 3 {
            EVENT_DISABLE => false,
            EVENT_DESC if self.event_idx => {
                let place = Place::of(u16::try_from(event & 0xffff).expect("masked"));
                place.since(old, self.size) < self.published.since(old, self.size)
            }
            _ => true,
        }
    }

    #[inline]
    pub(super) fn arm(&mut self) -> bool {
        let flags = if self.event_idx { EVENT_DESC } else { EVENT_ENABLE };
        self.set_device_event(flags, self.next_avail);
        // The wish must be visible before the driver's descriptor is looked at again.
        fence(Ordering::SeqCst);
        self.is_available(self.next_avail)
    }

    #[inline]
    pub(super) fn disarm(&mut self) {
        if !self.event_idx {
            self.set_device_event(EVENT_DISABLE, Place::of(0));
        }
    }

    pub(super) fn published(&self) -> Place {
        self.published
    }

    /// Note the descriptors from `first` to the published one, and the word that asks for kicks.
    pub(super) fn mark_used(&self, log: &DirtyLog, first: Place) {
        if let Some(device) = self.addresses.log {
            log.mark(device, 4);
        }
        let len = self.published.since(first, self.size).min(self.size);
        let before_end = len.min(self.size - first.index);
        for (index, count) in [(first.index, before_end), (0, len - before_end)] {
            log.mark_host(&self.memory, self.parts.descriptors.at(usize::from(index) * 16, 0), usize::from(count) * 16);
        }
    }

    fn flags(&self, index: u16) -> u16 {
        // Acquire pairs with the driver's barrier before it writes flags: what they make available is visible.
        let flags = self.parts.descriptors.u16_at(usize::from(index) * 16 + FLAGS);
        u16::from_le(flags.load(Ordering::Acquire))
    }

    fn set_device_event(&self, flags: u16, place: Place) {
        let word = u32::from(place.bits()) | u32::from(flags) << 16;
        self.parts.used.u32_at(0).store(word.to_le(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
