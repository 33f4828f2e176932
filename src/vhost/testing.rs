//! A guest driver for unit tests: rings and chains written into memory of our own.

use std::cell::Cell;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::memory::MemoryMap;
use super::ring::{Ring, RingAddresses};

/// Guest memory for buffers, above the rings.
pub(crate) const DATA: u64 = 0x10_0000;
const REGION: u64 = 0x20_0000;
const DESCRIPTORS: u64 = 0;
const AVAIL: u64 = 0x8_0000;
const USED: u64 = 0xa_0000;

/// A buffer of a chain: address, length, whether the device writes it.
pub(crate) type Buffer = (u64, u32, bool);

/// A buffer the device reads.
pub(crate) fn readable(addr: u64, len: u32) -> Buffer {
    (addr, len, false)
}

/// A buffer the device writes.
pub(crate) fn writable(addr: u64, len: u32) -> Buffer {
    (addr, len, true)
}

/// Two adjacent regions of guest memory and the driver's side of one ring.
pub(crate) struct Guest {
    pub(crate) memory: Arc<GuestMemoryMmap>,
    pub(crate) size: u16,
    avail: Cell<u16>,
    used: Cell<u16>,
}

impl Guest {
    pub(crate) fn new(size: u16) -> Guest {
        let len = usize::try_from(REGION).unwrap();
        let ranges = [(GuestAddress(0), len), (GuestAddress(REGION), len)];
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        Guest { memory, size, avail: Cell::new(0), used: Cell::new(0) }
    }

    pub(crate) fn first_region_end(&self) -> u64 {
        REGION
    }

    pub(crate) fn map(&self) -> Arc<MemoryMap> {
        Arc::new(MemoryMap::of_guest_memory(&self.memory))
    }

    pub(crate) fn addresses(&self) -> RingAddresses {
        RingAddresses { descriptors: DESCRIPTORS, avail: AVAIL, used: USED }
    }

    pub(crate) fn ring(&self) -> Ring {
        self.ring_with(false)
    }

    pub(crate) fn ring_with(&self, event_idx: bool) -> Ring {
        Ring::new(&self.map(), self.addresses(), self.size, self.avail.get(), event_idx).unwrap()
    }

    pub(crate) fn descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.descriptor_at(DESCRIPTORS + 16 * u64::from(index), addr, len, flags, next);
    }

    pub(crate) fn indirect(&self, table: u64, entries: &[(u64, u32, u16, u16)]) {
        for (i, &(addr, len, flags, next)) in entries.iter().enumerate() {
            self.descriptor_at(table + 16 * i as u64, addr, len, flags, next);
        }
    }

    fn descriptor_at(&self, at: u64, addr: u64, len: u32, flags: u16, next: u16) {
        self.memory.write_obj(addr, GuestAddress(at)).unwrap();
        self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    pub(crate) fn write(&self, addr: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    pub(crate) fn read<const N: usize>(&self, addr: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    /// Make a chain available.
    pub(crate) fn offer(&self, head: u16) {
        let slot = u64::from(self.avail.get() % self.size);
        self.memory.write_obj(head, GuestAddress(AVAIL + 4 + 2 * slot)).unwrap();
        self.avail.set(self.avail.get().wrapping_add(1));
        self.set_avail_idx(self.avail.get());
    }

    pub(crate) fn set_avail_idx(&self, idx: u16) {
        self.memory.write_obj(idx, GuestAddress(AVAIL + 2)).unwrap();
    }

    pub(crate) fn set_avail_flags(&self, flags: u16) {
        self.memory.write_obj(flags, GuestAddress(AVAIL)).unwrap();
    }

    pub(crate) fn set_used_event(&self, event: u16) {
        self.memory.write_obj(event, GuestAddress(AVAIL + 4 + 2 * u64::from(self.size))).unwrap();
    }

    pub(crate) fn avail_event(&self) -> u16 {
        self.memory.read_obj(GuestAddress(USED + 4 + 8 * u64::from(self.size))).unwrap()
    }

    pub(crate) fn used_idx(&self) -> u16 {
        self.memory.read_obj(GuestAddress(USED + 2)).unwrap()
    }

    pub(crate) fn used_flags(&self) -> u16 {
        self.memory.read_obj(GuestAddress(USED)).unwrap()
    }

    /// The next used entry, if there is one: head and length.
    pub(crate) fn take_used(&self) -> Option<(u32, u32)> {
        if self.used_idx() == self.used.get() {
            return None;
        }
        let at = USED + 4 + 8 * u64::from(self.used.get() % self.size);
        self.used.set(self.used.get().wrapping_add(1));
        Some((self.memory.read_obj(GuestAddress(at)).unwrap(), self.memory.read_obj(GuestAddress(at + 4)).unwrap()))
    }
}

/// Write a chain of these buffers from descriptor 0 on; its head.
pub(crate) fn chain_of(guest: &Guest, buffers: &[Buffer]) -> u16 {
    chain_from(guest, 0, buffers)
}

/// Write a chain of these buffers from descriptor `first` on; its head.
pub(crate) fn chain_from(guest: &Guest, first: u16, buffers: &[Buffer]) -> u16 {
    for (i, &(addr, len, write)) in buffers.iter().enumerate() {
        let index = first + u16::try_from(i).unwrap();
        let more = i + 1 < buffers.len();
        let flags = u16::from(more) | if write { 2 } else { 0 };
        guest.descriptor(index, addr, len, flags, if more { index + 1 } else { 0 });
    }
    first
}
