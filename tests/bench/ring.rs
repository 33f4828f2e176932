//! The driver's side of one queue, in memory shared with a backend. Chains are header, data and status, written into
//! the ring itself or, with indirect descriptors, into a table beside it.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use vhost::VringConfigData;
use vm_memory::{MmapRegion, VolatileMemory};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::content::{SECTOR, WORDS, filler, stamp, unstamp};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const CHAIN: usize = 3;

pub(crate) const IN: u32 = 0;
pub(crate) const OUT: u32 = 1;
pub(crate) const FLUSH: u32 = 4;

/// Status before the device writes it.
const UNTOUCHED: u8 = 0xee;

/// Offsets in a queue's part of memory: descriptors first.
const AVAIL: usize = 0x4000;
const USED: usize = 0x6000;
/// Header of each slot, its table and its status, 128 bytes a slot.
const HEADERS: usize = 0xc000;
const HEADER_LEN: usize = 128;
const TABLE: usize = 16;
const STATUS: usize = 64;
/// Entries at most, for which there is room.
const SIZE_MAX: usize = 1024;
const DATA: usize = HEADERS + SIZE_MAX * HEADER_LEN;

/// A queue with as many slots for requests as the load is deep.
pub(crate) struct Ring {
    memory: Arc<MmapRegion>,
    base: usize,
    size: u16,
    slots: usize,
    data_len: usize,
    indirect: bool,
    avail: u16,
    used: u16,
    /// Entries of the avail ring that the device was told of.
    shown: u16,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
}

/// Bytes of memory a queue needs.
pub(crate) fn memory_len(slots: usize, data_len: usize) -> usize {
    (DATA + slots * data_len).next_multiple_of(4096)
}

impl Ring {
    pub(crate) fn new(memory: Arc<MmapRegion>, base: usize, slots: usize, data_len: usize, indirect: bool) -> Ring {
        let size = (slots * if indirect { 1 } else { CHAIN }).next_power_of_two().max(64);
        assert!(size <= SIZE_MAX, "{slots} requests at a time do not fit into a ring");
        let (kick, call) = (EventFd::new(0).expect("an eventfd"), EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
        let size = u16::try_from(size).expect("small");
        let ring = Ring { memory, base, size, slots, data_len, indirect, avail: 0, used: 0, shown: 0, kick, call };
        for slot in 0..slots {
            for word in 0..data_len / 8 {
                ring.word(ring.data(slot) + 8 * word).store(filler(word % WORDS), Ordering::Relaxed);
            }
        }
        ring
    }

    /// Where the backend finds it, `user` being the front-end's address of memory.
    pub(crate) fn config(&self, user: u64) -> VringConfigData {
        let at = |offset: usize| user + (self.base + offset) as u64;
        VringConfigData {
            queue_max_size: self.size,
            queue_size: self.size,
            flags: 0,
            desc_table_addr: at(0),
            used_ring_addr: at(USED),
            avail_ring_addr: at(AVAIL),
            log_addr: None,
        }
    }

    fn data(&self, slot: usize) -> usize {
        self.base + DATA + slot * self.data_len
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        self.memory.get_atomic_ref(at).expect("within memory and aligned")
    }

    fn half(&self, at: usize) -> &AtomicU16 {
        self.memory.get_atomic_ref(self.base + at).expect("within memory and aligned")
    }

    fn status(&self, slot: usize) -> &AtomicU8 {
        let at = self.base + HEADERS + slot * HEADER_LEN + STATUS;
        self.memory.get_atomic_ref(at).expect("within memory")
    }

    fn descriptor(&self, at: usize, (addr, len, flags, next): (usize, usize, u16, u16)) {
        self.word(at).store(addr as u64, Ordering::Relaxed);
        self.word(at + 8).store(len as u64 | u64::from(flags) << 32 | u64::from(next) << 48, Ordering::Relaxed);
    }

    /// Put a request into the ring; [`Ring::kick`] shows it to the device.
    pub(crate) fn put(&mut self, slot: usize, kind: u32, sector: u64) {
        let header = self.base + HEADERS + slot * HEADER_LEN;
        self.word(header).store(u64::from(kind), Ordering::Relaxed);
        self.word(header + 8).store(sector, Ordering::Relaxed);
        self.status(slot).store(UNTOUCHED, Ordering::Relaxed);
        let step = if self.indirect { 1 } else { CHAIN };
        let head = u16::try_from(slot * step).expect("within the ring");
        // In a table of its own a chain counts from 0.
        let (table, first) = if self.indirect { (header + TABLE, 0) } else { (self.base + 16 * slot * CHAIN, head) };
        let status = (header + STATUS, 1, WRITE, 0);
        let len = if kind == FLUSH {
            self.descriptor(table, (header, 16, NEXT, first + 1));
            self.descriptor(table + 16, status);
            2
        } else {
            let data_flags = if kind == IN { NEXT | WRITE } else { NEXT };
            self.descriptor(table, (header, 16, NEXT, first + 1));
            self.descriptor(table + 16, (self.data(slot), self.data_len, data_flags, first + 2));
            self.descriptor(table + 32, status);
            CHAIN
        };
        if self.indirect {
            self.descriptor(self.base + 16 * slot, (table, 16 * len, INDIRECT, 0));
        }
        self.half(AVAIL + 4 + 2 * usize::from(self.avail % self.size)).store(head, Ordering::Relaxed);
        self.avail = self.avail.wrapping_add(1);
    }

    /// Show the device what was put into the ring, and kick if it asks for that (virtio 1.3 §2.7.10).
    pub(crate) fn kick(&mut self) {
        let before = std::mem::replace(&mut self.shown, self.avail);
        if before == self.avail {
            return;
        }
        self.half(AVAIL + 2).store(self.avail, Ordering::Release);
        // What the device asks for is read after it can see the entries.
        fence(Ordering::SeqCst);
        let event = self.half(USED + 4 + 8 * usize::from(self.size)).load(Ordering::Acquire);
        if self.avail.wrapping_sub(event).wrapping_sub(1) < self.avail.wrapping_sub(before) {
            self.kick.write(1).expect("an eventfd takes a write");
        }
    }

    /// The next used entry: its slot, and whether the device says that it was done.
    ///
    /// # Errors
    /// When it is no request under way.
    pub(crate) fn take(&mut self) -> Result<Option<(usize, u8)>, String> {
        if self.is_empty() {
            return Ok(None);
        }
        let at = self.base + USED + 4 + 8 * usize::from(self.used % self.size);
        let head: &AtomicU32 = self.memory.get_atomic_ref(at).expect("within memory and aligned");
        let head = head.load(Ordering::Relaxed) as usize;
        self.used = self.used.wrapping_add(1);
        let step = if self.indirect { 1 } else { CHAIN };
        let slot = head / step;
        if !head.is_multiple_of(step) || slot >= self.slots {
            return Err(format!("an answer to descriptor {head}, which is no request"));
        }
        Ok(Some((slot, self.status(slot).load(Ordering::Acquire))))
    }

    /// Ask for a notification of the next answer; false if there is one already.
    pub(crate) fn arm(&self) -> bool {
        self.half(AVAIL + 4 + 2 * usize::from(self.size)).store(self.used, Ordering::Relaxed);
        // The device may use an entry before it sees that; then it is there now.
        fence(Ordering::SeqCst);
        self.is_empty()
    }

    /// Whether there is no answer to be taken.
    pub(crate) fn is_empty(&self) -> bool {
        self.half(USED + 2).load(Ordering::Acquire) == self.used
    }

    /// Put off any notification: its place has just been passed.
    pub(crate) fn disarm(&self) {
        self.half(AVAIL + 4 + 2 * usize::from(self.size)).store(self.used.wrapping_sub(1), Ordering::Relaxed);
    }

    /// The sectors of a slot's data, and where they are.
    fn sectors(&self, slot: usize) -> impl Iterator<Item = (usize, usize)> {
        let start = self.data(slot);
        (0..self.data_len / SECTOR).map(move |sector| (sector, start + sector * SECTOR))
    }

    /// Stamp a slot's data as the given version of the sectors from `first` on. `version` has one for each.
    pub(crate) fn stamp(&self, slot: usize, first: u64, version: impl Fn(usize) -> u32) {
        for (sector, at) in self.sectors(slot) {
            let stamp = stamp(first + sector as u64, version(sector));
            self.word(at).store(stamp, Ordering::Relaxed);
            self.word(at + 8 * (WORDS - 1)).store(stamp, Ordering::Relaxed);
        }
    }

    /// Compare all of a slot's data with what the sectors from `first` on hold, in one of the versions given.
    ///
    /// # Errors
    /// At the first word that is something else.
    pub(crate) fn check(
        &self,
        slot: usize,
        first: u64,
        versions: impl Fn(usize) -> RangeInclusive<u32>,
    ) -> Result<(), String> {
        for (sector, at) in self.sectors(slot) {
            let (number, versions) = (first + sector as u64, versions(sector));
            let [head, tail] = [at, at + 8 * (WORDS - 1)].map(|at| unstamp(self.word(at).load(Ordering::Relaxed)));
            if head != tail || head.0 != number || !versions.contains(&head.1) {
                let seen = format!("sector {} version {} and sector {} version {}", head.0, head.1, tail.0, tail.1);
                return Err(format!("sector {number}, versions {versions:?}, reads as {seen}"));
            }
            let body = (1..WORDS - 1).find(|word| self.word(at + 8 * word).load(Ordering::Relaxed) != filler(*word));
            if let Some(word) = body {
                return Err(format!("sector {number} reads as something else at byte {}", 8 * word));
            }
        }
        Ok(())
    }
}
