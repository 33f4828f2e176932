//! Virtqueues on host pointers that were translated and checked once: `split` ones (virtio 1.3 §2.7) and
//! `packed` ones (virtio 1.3 §2.8).
//!
//! The guest may write any of this memory at any time. What is read here is read atomically and once, or copied
//! out; nothing of it is an address. Only numbers below the queue size are used as indices.

pub(crate) mod packed;
pub mod split;

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32};

use self::packed::{PackedRing, Place};
use self::split::SplitRing;
use super::dirty::DirtyLog;
use super::memory::{MemoryMap, RegionBits};

/// Bytes of a descriptor (virtio 1.3 §2.7.5, §2.8.13).
pub(crate) const DESCRIPTOR_SIZE: u64 = 16;

/// Why a ring cannot be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The size is 0, above 32768, or, of a split ring, no power of two.
    #[error("queue size {0} is not a power of two up to 32768")]
    Size(u32),
    /// A part of the ring is not in guest memory (or in more than one region).
    #[error("the {0} at front-end address {1:#x} is not in one memory region")]
    NotMapped(&'static str, u64),
    /// A part of the ring is misaligned (virtio 1.3 §2.7, §2.8.10.1).
    #[error("the {0} at front-end address {1:#x} is misaligned")]
    Misaligned(&'static str, u64),
    /// A place to go on from that a packed ring of that size does not have.
    #[error("the base {base:#x} is no place in a packed ring of {size} descriptors")]
    Base {
        /// What the front-end said.
        base: u32,
        /// Queue size.
        size: u16,
    },
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
    /// The driver offers a chain that cannot be.
    #[error("the driver offers descriptor {head} of {size}")]
    Outside {
        /// What was read.
        head: u16,
        /// Queue size.
        size: u16,
    },
    /// The driver offers anew what the device has not given back.
    #[error("the driver offers descriptor {0} while the device holds it")]
    Held(u16),
    /// A chain of a packed ring that does not end in the part of it that is the driver's.
    #[error("a chain from descriptor {first} on is longer than the {room} descriptors that are the driver's")]
    Endless {
        /// Its first descriptor.
        first: u16,
        /// Descriptors that the device does not hold.
        room: u16,
    },
}

/// Where the parts of a ring are, in the front-end's addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptor table, or descriptor ring.
    pub descriptors: u64,
    /// Avail ring, or driver event suppression.
    pub avail: u64,
    /// Used ring, or device event suppression.
    pub used: u64,
    /// The guest address of `used`, where writes to it belong into the dirty log (VHOST_VRING_F_LOG).
    pub log: Option<u64>,
}

/// What the driver negotiated of rings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingFormat {
    /// Packed rings (VIRTIO_F_RING_PACKED).
    pub packed: bool,
    /// VIRTIO_F_EVENT_IDX.
    pub event_idx: bool,
}

/// A descriptor, copied out (virtio 1.3 §2.7.5, §2.8.13).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    /// Where the chain goes on; in packed rings the buffer's id.
    pub(crate) next: u16,
}

impl Descriptor {
    /// From the sixteen bytes in guest memory.
    #[inline]
    pub(crate) fn from_bytes(bytes: [u8; 16]) -> Descriptor {
        let (addr, len, [flags, next]) = fields(bytes);
        Descriptor { addr, len, flags, next }
    }

    /// From the sixteen bytes of a packed ring, or of a table that one refers to.
    #[inline]
    pub(crate) fn from_packed_bytes(bytes: [u8; 16]) -> Descriptor {
        let (addr, len, [id, flags]) = fields(bytes);
        Descriptor { addr, len, flags, next: id }
    }
}

#[inline]
fn fields(bytes: [u8; 16]) -> (u64, u32, [u16; 2]) {
    let word = u128::from_le_bytes(bytes);
    let addr = u64::try_from(word & u128::from(u64::MAX)).expect("masked");
    let len = u32::try_from((word >> 64) & 0xffff_ffff).expect("masked");
    let third = u16::try_from((word >> 96) & 0xffff).expect("masked");
    (addr, len, [third, u16::try_from(word >> 112).expect("sixteen bits are left")])
}

/// A chain that was taken, as it takes to give it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    /// The driver's name for it: its first descriptor, in packed rings its buffer id.
    pub(crate) id: u16,
    /// Entries that it takes up in what the driver offers: one of the avail ring, or the descriptors of its list.
    pub(crate) len: u16,
    /// Its entry in the in-flight region.
    pub(crate) entry: u16,
}

impl Head {
    /// A chain of a split ring.
    pub(crate) fn of_split(head: u16) -> Head {
        Head { id: head, len: 1, entry: head }
    }
}

/// A part of a ring: host memory that its ring keeps mapped.
#[derive(Clone, Copy)]
struct Part {
    start: NonNull<u8>,
    len: usize,
}

impl Part {
    #[inline]
    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        #[cfg(test)]
        super::testing::kill::point();
        debug_assert!(offset + len <= self.len);
        self.start.as_ptr().wrapping_add(offset)
    }

    /// The two bytes at an even offset.
    #[inline]
    fn u16_at(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: `Parts::translate` checked that the part is guest memory at an even address, the ring asks for what
        // lies in the part, and keeps it mapped with its map. All access is atomic.
        unsafe { AtomicU16::from_ptr(self.at(offset, 2).cast()) }
    }

    /// The four bytes at an offset that is a multiple of four, of a part that is aligned so.
    #[inline]
    fn u32_at(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: as above, with parts that were checked to lie at a multiple of four.
        unsafe { AtomicU32::from_ptr(self.at(offset, 4).cast()) }
    }

    /// The bytes of descriptor `index`, copied out.
    #[inline]
    fn descriptor(&self, index: u16) -> [u8; 16] {
        // SAFETY: as above, with a part that was checked to lie at a multiple of sixteen; volatile reads of plain
        // bytes tolerate concurrent writes.
        unsafe { self.at(usize::from(index) * 16, 16).cast::<[u8; 16]>().read_volatile() }
    }
}

/// The three parts of a ring as host addresses.
#[derive(Clone, Copy)]
struct Parts {
    descriptors: Part,
    avail: Part,
    used: Part,
    regions: RegionBits,
}

/// What a part is called, its length and its alignment.
type Shape = (&'static str, u64, usize);

impl Parts {
    fn translate(memory: &MemoryMap, addresses: RingAddresses, shapes: [Shape; 3]) -> Result<Parts, RingError> {
        let mut regions = RegionBits::default();
        let mut part = |user, (name, len, alignment): Shape| {
            let piece = memory.user_range(user, len).ok_or(RingError::NotMapped(name, user))?;
            if !piece.ptr.addr().is_multiple_of(alignment) {
                return Err(RingError::Misaligned(name, user));
            }
            regions = regions.union(piece.region);
            let start = NonNull::new(piece.ptr).ok_or(RingError::NotMapped(name, user))?;
            Ok(Part { start, len: usize::try_from(len).expect("it is mapped") })
        };
        let [descriptors, avail, used] = shapes;
        let descriptors = part(addresses.descriptors, descriptors)?;
        let avail = part(addresses.avail, avail)?;
        let used = part(addresses.used, used)?;
        Ok(Parts { descriptors, avail, used, regions })
    }
}

/// A virtqueue in guest memory, seen from the device. Places in it are numbers that only the ring understands: an
/// index of the avail ring, or index and wrap counter of a packed ring.
pub(crate) enum Ring {
    Split(SplitRing),
    Packed(PackedRing),
}

impl Ring {
    /// A ring at these addresses that goes on at `base` (SET_VRING_BASE).
    ///
    /// # Errors
    /// When size, place or alignment are not those of a ring.
    pub(crate) fn new(
        memory: &Arc<MemoryMap>,
        addresses: RingAddresses,
        size: u16,
        base: u32,
        format: RingFormat,
    ) -> Result<Ring, RingError> {
        Ok(if format.packed {
            Ring::Packed(PackedRing::new(memory, addresses, size, base, format.event_idx)?)
        } else {
            let next_avail = u16::try_from(base & 0xffff).expect("masked");
            Ring::Split(SplitRing::new(memory, addresses, size, next_avail, format.event_idx)?)
        })
    }

    /// Whether there can be such a ring.
    ///
    /// # Errors
    /// As for [`Ring::new`].
    pub(crate) fn check(
        memory: &MemoryMap,
        addresses: RingAddresses,
        size: u16,
        format: RingFormat,
    ) -> Result<(), RingError> {
        let shapes = if format.packed { packed::shapes(size)? } else { split::shapes(size)? };
        Parts::translate(memory, addresses, shapes).map(|_| ())
    }

    /// Translate the ring anew after the memory changed. On error the ring keeps its old memory, which stays
    /// mapped, for the requests still under way.
    ///
    /// # Errors
    /// When the ring is not in the new memory.
    pub(crate) fn remap(&mut self, memory: &Arc<MemoryMap>, addresses: RingAddresses) -> Result<(), RingError> {
        match self {
            Ring::Split(ring) => ring.remap(memory, addresses),
            Ring::Packed(ring) => ring.remap(memory, addresses),
        }
    }

    /// Where the ring is, in the front-end's addresses.
    pub(crate) fn addresses(&self) -> RingAddresses {
        match self {
            Ring::Split(ring) => ring.addresses(),
            Ring::Packed(ring) => ring.addresses(),
        }
    }

    /// Regions the ring lies in.
    #[inline]
    pub(crate) fn regions(&self) -> RegionBits {
        match self {
            Ring::Split(ring) => ring.regions(),
            Ring::Packed(ring) => ring.regions(),
        }
    }

    /// The place of the next chain.
    #[inline]
    pub(crate) fn next_avail(&self) -> u16 {
        match self {
            Ring::Split(ring) => ring.next_avail(),
            Ring::Packed(ring) => ring.next_avail().bits(),
        }
    }

    /// Go back to a place.
    pub(crate) fn set_next_avail(&mut self, place: u16) {
        match self {
            Ring::Split(ring) => ring.set_next_avail(place),
            Ring::Packed(ring) => ring.set_next_avail(Place::of(place)),
        }
    }

    /// How far the place of the next chain is ahead of `place`.
    pub(crate) fn ahead_of(&self, place: u16) -> u16 {
        match self {
            Ring::Split(ring) => ring.next_avail().wrapping_sub(place),
            Ring::Packed(ring) => ring.ahead_of(Place::of(place)),
        }
    }

    /// Where the ring goes on, as GET_VRING_BASE says it.
    pub(crate) fn base(&self) -> u32 {
        match self {
            Ring::Split(ring) => u32::from(ring.next_avail()),
            Ring::Packed(ring) => ring.base(),
        }
    }

    /// How many chains may be there: at least as many as the driver has made available, and no more than the queue
    /// holds.
    ///
    /// # Errors
    /// When the driver claims more than that.
    #[inline]
    pub(crate) fn available(&self) -> Result<u16, RingError> {
        match self {
            Ring::Split(ring) => ring.available(),
            Ring::Packed(ring) => Ok(ring.size()),
        }
    }

    /// The next chain, if there is one, of those that [`Ring::available`] counted. `list` gets the descriptors of a
    /// packed ring.
    ///
    /// # Errors
    /// When what the driver offers makes no sense.
    #[inline]
    pub(crate) fn pop(&mut self, list: &mut Vec<Descriptor>) -> Result<Option<Head>, RingError> {
        match self {
            Ring::Split(ring) => {
                let (head, size) = (ring.pop(), ring.size());
                if head >= size { Err(RingError::Outside { head, size }) } else { Ok(Some(Head::of_split(head))) }
            }
            Ring::Packed(ring) => ring.pop(list),
        }
    }

    /// Give a chain back. The driver sees it with the next [`Ring::publish`].
    #[inline]
    pub(crate) fn push_used(&mut self, head: Head, len: u32) {
        match self {
            Ring::Split(ring) => ring.push_used(head.id, len),
            Ring::Packed(ring) => ring.push_used(head, len),
        }
    }

    /// Whether there are used entries the driver has not been shown.
    #[inline]
    pub(crate) fn unpublished(&self) -> bool {
        match self {
            Ring::Split(ring) => ring.unpublished(),
            Ring::Packed(ring) => ring.unpublished(),
        }
    }

    /// Show the driver what was given back, all at once, and say whether it wants to be notified.
    #[inline]
    pub(crate) fn publish(&mut self) -> bool {
        match self {
            Ring::Split(ring) => ring.publish(),
            Ring::Packed(ring) => ring.publish(),
        }
    }

    /// Ask for kicks. Returns whether entries came in the meantime, for which no kick may come.
    #[inline]
    pub(crate) fn arm(&mut self) -> bool {
        match self {
            Ring::Split(ring) => ring.arm(),
            Ring::Packed(ring) => ring.arm(),
        }
    }

    /// Ask not to be kicked for now. With EVENT_IDX there is nothing to do: the event passed already.
    #[inline]
    pub(crate) fn disarm(&mut self) {
        match self {
            Ring::Split(ring) => ring.disarm(),
            Ring::Packed(ring) => ring.disarm(),
        }
    }

    /// The place in the used entries that the driver was last shown.
    pub(crate) fn published(&self) -> u16 {
        match self {
            Ring::Split(ring) => ring.published(),
            Ring::Packed(ring) => ring.published().bits(),
        }
    }

    /// Note in the dirty log what was written: the used entries from `first` to the published one, and what asks for
    /// kicks.
    pub(crate) fn mark_used(&self, log: &DirtyLog, first: u16) {
        match self {
            Ring::Split(ring) => ring.mark_used(log, first),
            Ring::Packed(ring) => ring.mark_used(log, Place::of(first)),
        }
    }
}
