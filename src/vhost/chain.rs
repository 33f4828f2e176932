//! Descriptor chains (virtio 1.3 §2.7.5, §2.8.6): from a head to host memory, with every step bounded.
//!
//! A chain is walked once. Each descriptor is copied out once and judged on the copy, so that a guest
//! that rewrites it meanwhile gains nothing.

use std::rc::Rc;
use std::sync::Arc;

use super::dirty::DirtyLog;
use super::memory::{MemoryMap, RegionBits};
use super::ring::split::SplitRing;
use super::ring::{DESCRIPTOR_SIZE, Descriptor};
use crate::device::buffer::Iovecs;

/// Descriptor flags (virtio 1.3 §2.7.5).
const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;

/// Most descriptors of an indirect table: as many as the largest queue. Drivers may use tables longer than
/// their queue (Windows sends 512 + 3), so the queue size is no limit.
pub const INDIRECT_MAX: u64 = 32_768;

/// Most bytes of one direction of a chain. UEFI firmware reads whole files with one descriptor of up to
/// 1 GiB; twice that is more than Linux moves in one call. One page more is left for headers.
pub const CHAIN_BYTES_MAX: u64 = (1 << 30) + 4096;

/// Most pieces of host memory in one direction: chains of the longest table still fit where each descriptor
/// lies in one region.
const PIECES_MAX: usize = 65_536;

/// Why a chain cannot be read at all: it goes back with a used length of 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A next index outside of its table.
    #[error("descriptor {0} is outside of its table")]
    OutsideTable(u16),
    /// More descriptors than the table has.
    #[error("the chain has a loop")]
    Loop,
    /// A last descriptor that says it has a next one, or none at all, of an iterator that ends without saying why.
    #[error("the chain breaks off")]
    BreaksOff,
    /// An indirect descriptor in an indirect table (virtio 1.3 §2.7.5.3.1).
    #[error("an indirect table refers to another")]
    NestedIndirect,
    /// INDIRECT and NEXT together (virtio 1.3 §2.7.5.3.1), or in one list (§2.8.19).
    #[error("an indirect descriptor has a next one")]
    IndirectAndNext,
    /// An indirect table that is empty, no multiple of 16 bytes, or longer than [`INDIRECT_MAX`].
    #[error("an indirect table of {0} bytes")]
    IndirectLength(u32),
    /// An indirect table outside of guest memory.
    #[error("an indirect table is outside of guest memory")]
    IndirectUnmapped,
    /// A device-readable descriptor after a device-writable one (virtio 1.3 §2.7.4.2).
    #[error("a readable descriptor follows a writable one")]
    ReadableAfterWritable,
}

/// Host memory of one descriptor, or of several that touch.
#[derive(Clone, Copy, Debug)]
struct Segment {
    ptr: *mut u8,
    len: u64,
}

/// One direction of a chain.
#[derive(Debug, Default)]
struct Side {
    segments: Vec<Segment>,
    len: u64,
}

/// A worker's own handle to its map: requests that only keep the map alive on that thread count on the outer
/// pointer, without atomics.
pub type LocalMap = Rc<Arc<MemoryMap>>;

/// The place of a request's status byte, kept mapped.
#[derive(Debug)]
pub struct StatusByte {
    ptr: *mut u8,
    memory: LocalMap,
}

impl StatusByte {
    /// Tell the guest.
    #[inline]
    pub fn write(&self, status: u8) {
        // SAFETY: the byte is memory of `memory` (Chain::status_byte), which maps it as long as this value
        // lives. A volatile store of a byte tolerates whatever the guest does there.
        unsafe { self.ptr.write_volatile(status) };
    }

    /// Note in the dirty log that the guest was told, and what was read into these buffers.
    pub(crate) fn mark(&self, data: Option<&Iovecs>, log: &DirtyLog) {
        log.mark_host(&self.memory, self.ptr, 1);
        for (ptr, len) in data.into_iter().flat_map(Iovecs::pieces) {
            log.mark_host(&self.memory, ptr, len);
        }
    }
}

/// Room to walk chains in, used again for each.
#[derive(Debug, Default)]
pub struct Scatter {
    readable: Side,
    writable: Side,
    last_writable: Option<*mut u8>,
    regions: RegionBits,
    faulty: bool,
    cache: usize,
}

/// A walked chain: host memory in both directions, and the map that keeps it mapped.
#[derive(Clone, Copy, Debug)]
pub struct Chain<'a> {
    scatter: &'a Scatter,
    memory: &'a Arc<MemoryMap>,
}

/// A table of descriptors.
enum Table<'a> {
    Ring(&'a SplitRing),
    Indirect { addr: u64, entries: u64 },
}

impl Table<'_> {
    fn entries(&self) -> u64 {
        match self {
            Table::Ring(ring) => u64::from(ring.size()),
            Table::Indirect { entries, .. } => *entries,
        }
    }

    #[inline]
    fn get(&self, index: u16, memory: &MemoryMap, cache: &mut usize) -> Result<Descriptor, ChainError> {
        match self {
            Table::Ring(ring) => ring.descriptor(index).ok_or(ChainError::OutsideTable(index)),
            Table::Indirect { addr, entries } => {
                if u64::from(index) >= *entries {
                    return Err(ChainError::OutsideTable(index));
                }
                Ok(Descriptor::from_bytes(table_entry(*addr, u64::from(index), memory, cache)?))
            }
        }
    }
}

impl Scatter {
    /// Walk the chain that starts at `head`. Buffers outside of guest memory and absurd lengths make the
    /// chain [`faulty`](Chain::is_faulty); its status byte may be good nevertheless.
    ///
    /// # Errors
    /// When the structure of the chain is broken.
    #[inline]
    pub fn walk<'a>(
        &'a mut self,
        ring: &SplitRing,
        memory: &'a Arc<MemoryMap>,
        head: u16,
    ) -> Result<Chain<'a>, ChainError> {
        self.clear();
        let mut table = Table::Ring(ring);
        let mut index = head;
        let mut left = table.entries();
        let mut table_cache = self.cache;
        loop {
            left = left.checked_sub(1).ok_or(ChainError::Loop)?;
            let descriptor = table.get(index, memory, &mut table_cache)?;
            if descriptor.flags & F_INDIRECT != 0 {
                if matches!(table, Table::Indirect { .. }) {
                    return Err(ChainError::NestedIndirect);
                }
                if descriptor.flags & F_NEXT != 0 {
                    return Err(ChainError::IndirectAndNext);
                }
                // F_WRITE means nothing here (virtio 1.3 §2.7.5.3.2: the device ignores it).
                let (addr, entries) = indirect(&descriptor)?;
                table = Table::Indirect { addr, entries };
                left = entries;
                index = 0;
                continue;
            }
            self.add(&descriptor, memory)?;
            if descriptor.flags & F_NEXT == 0 {
                return Ok(Chain { scatter: self, memory });
            }
            index = descriptor.next;
        }
    }

    /// As [`Scatter::walk`], for the list of descriptors that was taken from a packed ring.
    ///
    /// # Errors
    /// When the structure of the chain is broken.
    #[inline]
    pub(crate) fn walk_list<'a>(
        &'a mut self,
        list: &[Descriptor],
        memory: &'a Arc<MemoryMap>,
    ) -> Result<Chain<'a>, ChainError> {
        self.clear();
        for descriptor in list {
            if descriptor.flags & F_INDIRECT == 0 {
                self.add(descriptor, memory)?;
            } else if list.len() == 1 {
                self.add_table(descriptor, memory)?;
            } else {
                return Err(ChainError::IndirectAndNext);
            }
        }
        Ok(Chain { scatter: self, memory })
    }

    /// The table that a descriptor of a packed ring refers to: all of it, in its order, with no flag but F_WRITE
    /// (virtio 1.3 §2.8.7).
    fn add_table(&mut self, descriptor: &Descriptor, memory: &MemoryMap) -> Result<(), ChainError> {
        let (addr, entries) = indirect(descriptor)?;
        let mut cache = self.cache;
        for index in 0..entries {
            let bytes = table_entry(addr, index, memory, &mut cache)?;
            self.add(&Descriptor::from_packed_bytes(bytes), memory)?;
        }
        Ok(())
    }

    /// As [`Scatter::walk`], for descriptors that somebody else finds: of a table that refers to indirect ones,
    /// only what these hold.
    ///
    /// # Errors
    /// When the structure of the chain is broken.
    pub(crate) fn gather<'a>(
        &'a mut self,
        descriptors: impl Iterator<Item = Descriptor>,
        memory: &'a Arc<MemoryMap>,
    ) -> Result<Chain<'a>, ChainError> {
        self.clear();
        let mut ends = false;
        for descriptor in descriptors {
            ends = descriptor.flags & F_NEXT == 0;
            self.add(&descriptor, memory)?;
        }
        if ends { Ok(Chain { scatter: self, memory }) } else { Err(ChainError::BreaksOff) }
    }

    fn clear(&mut self) {
        for side in [&mut self.readable, &mut self.writable] {
            side.segments.clear();
            side.len = 0;
        }
        self.last_writable = None;
        self.regions = RegionBits::default();
        self.faulty = false;
    }

    #[inline]
    fn add(&mut self, descriptor: &Descriptor, memory: &MemoryMap) -> Result<(), ChainError> {
        let len = u64::from(descriptor.len);
        let writable = descriptor.flags & F_WRITE != 0;
        if !writable && (self.writable.len > 0 || self.last_writable.is_some()) {
            return Err(ChainError::ReadableAfterWritable);
        }
        if len == 0 {
            // The spec forbids nothing here, and there is nothing to read or write.
            return Ok(());
        }
        let side = if writable { &mut self.writable } else { &mut self.readable };
        side.len = side.len.saturating_add(len);
        self.faulty |= side.len > CHAIN_BYTES_MAX;
        if !self.faulty {
            self.faulty = !side.translate(descriptor.addr, len, memory, &mut self.cache, &mut self.regions);
        }
        if writable {
            let end = descriptor.addr.checked_add(len - 1);
            let piece = end.and_then(|last| memory.piece(&mut self.cache, last, 1));
            self.faulty |= piece.is_none();
            self.last_writable = piece.map(|piece| piece.ptr);
            self.regions = piece.map_or(self.regions, |piece| self.regions.union(piece.region));
        }
        Ok(())
    }
}

impl Chain<'_> {
    /// Bytes the device may read.
    pub fn readable_len(&self) -> u64 {
        self.scatter.readable.len
    }

    /// Bytes the device may write.
    pub fn writable_len(&self) -> u64 {
        self.scatter.writable.len
    }

    /// Whether some buffer is not usable: then only the status byte may be touched.
    pub fn is_faulty(&self) -> bool {
        self.scatter.faulty
    }

    /// Whether the chain has a status byte: its last writable byte, wherever it lies, is memory.
    pub fn has_status(&self) -> bool {
        self.scatter.last_writable.is_some()
    }

    /// The status byte, to be written later.
    ///
    /// # Panics
    /// If `memory` is not the map that the chain was walked with.
    #[inline]
    pub fn status_byte(&self, memory: &LocalMap) -> Option<StatusByte> {
        assert!(Arc::ptr_eq(self.memory, memory), "a status byte lies in the map of its chain");
        let ptr = self.scatter.last_writable?;
        Some(StatusByte { ptr, memory: memory.clone() })
    }

    /// The regions the chain touches.
    pub fn regions(&self) -> RegionBits {
        self.scatter.regions
    }

    /// Copy readable bytes from `offset` on; whether there were enough.
    pub fn read_at(&self, offset: u64, to: &mut [u8]) -> bool {
        let mut done = 0;
        let wanted = u64::try_from(to.len()).expect("a usize fits in 64 bits");
        self.scatter.readable.visit(offset, wanted, |ptr, n| {
            // SAFETY: the segments are memory of `self.memory`, which is borrowed here and so still maps them;
            // `to` has at least `n` bytes left, and local slices are not guest memory.
            unsafe { std::ptr::copy_nonoverlapping(ptr, to[done..done + n].as_mut_ptr(), n) };
            done += n;
        });
        done == to.len()
    }

    /// Copy `from` to the start of the writable bytes; how much fitted in front of the status byte.
    pub fn write_data(&self, from: &[u8]) -> usize {
        let mut done = 0;
        let wanted = u64::try_from(from.len()).expect("a usize fits in 64 bits");
        let room = self.writable_len().saturating_sub(1);
        self.scatter.writable.visit(0, wanted.min(room), |ptr, n| {
            // SAFETY: as in read_at, the other way round.
            unsafe { std::ptr::copy_nonoverlapping(from[done..done + n].as_ptr(), ptr, n) };
            done += n;
        });
        done
    }

    /// Fill an empty list with `len` readable bytes from `offset` on.
    pub fn readable_into(&self, offset: u64, len: u64, iovecs: &mut Iovecs) {
        self.collect(&self.scatter.readable, offset, len, iovecs);
    }

    /// Fill an empty list with the first `len` writable bytes.
    pub fn writable_into(&self, len: u64, iovecs: &mut Iovecs) {
        self.collect(&self.scatter.writable, 0, len, iovecs);
    }

    fn collect(&self, side: &Side, offset: u64, len: u64, iovecs: &mut Iovecs) {
        assert!(iovecs.is_empty(), "a list has one owner for all its memory");
        iovecs.set_owner(self.memory.clone());
        // SAFETY: the segments are memory of `self.memory`, which has just become the owner of the list;
        // Rust references into guest memory are never made.
        side.visit(offset, len, |ptr, n| unsafe { iovecs.push(ptr, n) });
    }

    /// Note all writable bytes in the dirty log.
    pub(crate) fn mark_written(&self, log: &DirtyLog) {
        self.scatter.writable.visit(0, u64::MAX, |ptr, n| log.mark_host(self.memory, ptr, n));
        if let Some(status) = self.scatter.last_writable {
            log.mark_host(self.memory, status, 1);
        }
    }

    /// Upper bound of the iovecs that either direction needs.
    pub fn pieces(&self) -> usize {
        self.scatter.readable.segments.len().max(self.scatter.writable.segments.len())
    }
}

impl Side {
    /// Append the host memory of a guest range; false where some of it is not memory.
    #[inline]
    fn translate(
        &mut self,
        addr: u64,
        len: u64,
        memory: &MemoryMap,
        cache: &mut usize,
        regions: &mut RegionBits,
    ) -> bool {
        let (mut at, mut left) = (addr, len);
        loop {
            let Some(piece) = memory.piece(cache, at, left) else { return false };
            *regions = regions.union(piece.region);
            let full = self.segments.len() >= PIECES_MAX;
            match self.segments.last_mut() {
                Some(last) if touches(last, piece.ptr) => last.len += piece.len,
                _ if full => return false,
                _ => self.segments.push(Segment { ptr: piece.ptr, len: piece.len }),
            }
            left -= piece.len;
            if left == 0 {
                return true;
            }
            let Some(next) = at.checked_add(piece.len) else { return false };
            at = next;
        }
    }

    /// The host pieces of `len` bytes from `offset`, or of what there is.
    fn visit(&self, mut offset: u64, mut len: u64, mut each: impl FnMut(*mut u8, usize)) {
        let size = |bytes: u64| usize::try_from(bytes).expect("segments are mapped memory");
        for segment in &self.segments {
            if len == 0 {
                return;
            }
            if offset >= segment.len {
                offset -= segment.len;
                continue;
            }
            let n = len.min(segment.len - offset);
            each(segment.ptr.wrapping_add(size(offset)), size(n));
            offset = 0;
            len -= n;
        }
    }
}

/// Whether memory at `ptr` continues the segment, so that split headers and small descriptors in a row cost
/// one iovec.
fn touches(segment: &Segment, ptr: *mut u8) -> bool {
    usize::try_from(segment.len).is_ok_and(|len| segment.ptr.wrapping_add(len) == ptr)
}

/// Address and entries of the table that a descriptor refers to.
fn indirect(descriptor: &Descriptor) -> Result<(u64, u64), ChainError> {
    let entries = u64::from(descriptor.len) / DESCRIPTOR_SIZE;
    let whole = u64::from(descriptor.len).is_multiple_of(DESCRIPTOR_SIZE);
    if !whole || entries == 0 || entries > INDIRECT_MAX {
        return Err(ChainError::IndirectLength(descriptor.len));
    }
    Ok((descriptor.addr, entries))
}

/// The bytes of an entry, copied out.
#[inline]
fn table_entry(table: u64, index: u64, memory: &MemoryMap, cache: &mut usize) -> Result<[u8; 16], ChainError> {
    let at = table.checked_add(index * DESCRIPTOR_SIZE).ok_or(ChainError::IndirectUnmapped)?;
    let mut bytes = [0; 16];
    memory.read(cache, at, &mut bytes).ok_or(ChainError::IndirectUnmapped)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests;
