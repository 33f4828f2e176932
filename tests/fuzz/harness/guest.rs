//! Guest memory that the fuzzer owns, with a copy of it, and what a chain in it means by the virtio spec: read here
//! a second time, independently of the program.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost_remap::vhost::memory::{MemoryMap, RegionAddress, RegionBits};
use vhost_remap::vhost::ring::RingAddresses;

pub(crate) const QUEUES: usize = 2;
/// Rings lie at the start of memory, this far apart; the largest has 256 entries.
pub(crate) const RING_SPAN: u64 = 0x4000;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Tables of descriptors that are no ring's.
const TABLES: Range<u64> = 0x8000..0xa000;
/// Headers, data and status bytes of requests.
pub(crate) const AREAS: u64 = 0x1_0000;
/// What a status byte holds before the device writes it.
pub(crate) const UNTOUCHED: u8 = 0xee;

/// Regions: guest address, bytes, start in the file. The first two are adjacent.
const REGIONS: [(u64, u64, u64); 3] =
    [(0, 0x1_0000, 0), (0x1_0000, 0x1_0000, 0x1_0000), (0x8000_0000, 0x8000, 0x2_0000)];
const SIZE: u64 = 0x2_8000;
/// The front-end's addresses are not the guest's.
const USER: u64 = 0x7000_0000_0000;

/// A ring: where its parts begin, and its entries.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ring {
    pub(crate) start: u64,
    pub(crate) size: u16,
}

impl Ring {
    pub(crate) fn at(start: u64, size: u16) -> Ring {
        Ring { start, size }
    }

    /// What the device writes: flags, index, entries, and when to kick; of a packed ring, descriptors and when to
    /// kick.
    pub(crate) fn device_parts(self, packed: bool) -> impl Iterator<Item = Range<usize>> {
        let (start, size) = (to_usize(self.start + USED), usize::from(self.size));
        let descriptors = to_usize(self.start);
        let descriptors = packed.then_some(descriptors..descriptors + 16 * size);
        let used = if packed { start..start + 4 } else { start..start + 6 + 8 * size };
        descriptors.into_iter().chain([used])
    }
}

/// A chain that was offered, as it was when the device took it.
pub(crate) struct Offered {
    /// Its first descriptor, or its buffer id.
    pub(crate) head: u16,
    /// Entries that it takes up in what the driver offers.
    pub(crate) count: u16,
    /// What the device may write, in the file.
    pub(crate) writable: Vec<Range<usize>>,
    /// Bytes of all device-writable buffers, also of those that are nowhere.
    pub(crate) len: u64,
    /// The last device-writable byte.
    pub(crate) status: Option<usize>,
    /// Regions it touches; every chain is in a ring.
    pub(crate) regions: [bool; 3],
    /// Changes of memory before it was taken.
    pub(crate) before: usize,
    /// Its table lies where the device may be made to write.
    loose_table: bool,
}

impl Offered {
    /// Whether the device may change, on behalf of a chain, what chains are read from.
    pub(crate) fn over_rings(&self) -> bool {
        self.loose_table || self.writable.iter().any(|range| range.start < to_usize(TABLES.end))
    }

    /// Whether one of its buffers lies over the status of `other`; of its own, one beside the status itself.
    pub(crate) fn covers_status_of(&self, other: &Offered) -> bool {
        let Some(status) = other.status else { return false };
        let own = usize::from(std::ptr::eq(self, other));
        self.writable.iter().filter(|range| range.contains(&status)).count() > own
    }
}

/// Address, length and the two words after them.
fn words_of(word: u128) -> (u64, u32, u16, u16) {
    let half = |shift: u32| u16::try_from(word >> shift & 0xffff).expect("masked");
    let addr = u64::try_from(word & u128::from(u64::MAX)).expect("masked");
    (addr, u32::from(half(64)) | u32::from(half(80)) << 16, half(96), half(112))
}

/// The inverse of [`words_of`].
pub(crate) fn bytes_of((addr, len, third, fourth): (u64, u32, u16, u16)) -> Vec<u8> {
    let rest = u64::from(len) | u64::from(third) << 32 | u64::from(fourth) << 48;
    [addr.to_le_bytes(), rest.to_le_bytes()].concat()
}

pub(crate) struct Guest {
    file: File,
    /// The file's content when it was last looked at.
    copy: Vec<u8>,
    buffer: Vec<u8>,
    pub(crate) present: [bool; 3],
    /// The change that brought each region.
    brought: [usize; 3],
    changes: usize,
}

fn to_usize(number: u64) -> usize {
    usize::try_from(number).expect("64 bits")
}

impl Guest {
    pub(crate) fn new() -> Guest {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).expect("descriptors are left");
        ftruncate(&file, SIZE).expect("memory is left");
        let bytes = vec![0; to_usize(SIZE)];
        let mut guest = Guest {
            file: file.into(),
            copy: bytes.clone(),
            buffer: bytes,
            present: [true; 3],
            brought: [0; 3],
            changes: 0,
        };
        guest.reset();
        guest
    }

    /// Rings without entries, and bytes that no disk holds.
    pub(crate) fn reset(&mut self) {
        self.copy.fill(0xc5);
        self.copy[..to_usize(TABLES.end)].fill(0);
        self.file.write_all_at(&self.copy, 0).expect("it has the room");
    }

    fn address(region: usize) -> RegionAddress {
        let (guest, len, offset) = REGIONS[region];
        RegionAddress { guest, user: USER + guest, len, offset }
    }

    /// All regions.
    pub(crate) fn map(&self) -> MemoryMap {
        (0..3).fold(MemoryMap::new(), |map, region| {
            map.with_region(Guest::address(region), &self.file).expect("a region of the file")
        })
    }

    /// Remove a region from a map, or add it; and which bits are gone.
    pub(crate) fn toggle(&mut self, map: &MemoryMap, region: usize) -> (MemoryMap, RegionBits) {
        self.changes += 1;
        self.present[region] = !self.present[region];
        match self.present[region] {
            true => {
                self.brought[region] = self.changes;
                let map = map.with_region(Guest::address(region), &self.file).expect("a region of the file");
                (map, RegionBits::default())
            }
            false => map.without_region(Guest::address(region)).expect("it was there"),
        }
    }

    /// The change that brought a region, and the last one of all.
    pub(crate) fn lifetime(&self, region: usize) -> Range<usize> {
        self.brought[region]..self.changes
    }

    pub(crate) fn has_rings(&self) -> bool {
        self.present[0]
    }

    pub(crate) fn addresses(&self, ring: Ring) -> RingAddresses {
        let start = USER + ring.start;
        RingAddresses { descriptors: start, avail: start + AVAIL, used: start + USED, log: None }
    }

    /// The parts of the file behind a guest range, whether mapped at the moment or not, with their regions.
    fn parts(addr: u64, len: u64) -> impl Iterator<Item = (usize, Range<u64>, Range<usize>)> {
        let end = addr.saturating_add(len);
        (0..).zip(REGIONS).filter_map(move |(region, (guest, size, offset))| {
            let (from, to) = (addr.max(guest), end.min(guest + size));
            let file = |at: u64| to_usize(at - guest + offset);
            (from < to).then(|| (region, from - addr..to - addr, file(from)..file(to)))
        })
    }

    /// Write what lies in memory of these bytes; whether one of them lies in `parts`.
    pub(crate) fn write(&mut self, addr: u64, bytes: &[u8], parts: &[Range<usize>]) -> bool {
        let mut touched = false;
        for (_, within, file) in Guest::parts(addr, bytes.len() as u64) {
            let piece = &bytes[to_usize(within.start)..to_usize(within.end)];
            self.copy[file.clone()].copy_from_slice(piece);
            self.file.write_all_at(piece, file.start as u64).expect("it has the room");
            touched |= parts.iter().any(|part| part.start < file.end && file.start < part.end);
        }
        touched
    }

    pub(crate) fn byte(&self, at: usize) -> u8 {
        self.copy[at]
    }

    /// The guest has seen a status.
    pub(crate) fn forget_status(&mut self, at: usize) {
        self.copy[at] = UNTOUCHED;
        self.file.write_all_at(&[UNTOUCHED], at as u64).expect("it has the room");
    }

    fn u16_at(&self, at: u64) -> u16 {
        let at = to_usize(at);
        u16::from_le_bytes([self.copy[at], self.copy[at + 1]])
    }

    pub(crate) fn avail_index(&self, ring: Ring) -> u16 {
        self.u16_at(ring.start + AVAIL + 2)
    }

    pub(crate) fn avail_entry(&self, ring: Ring, position: u16) -> u16 {
        self.u16_at(ring.start + AVAIL + 4 + 2 * u64::from(position % ring.size))
    }

    pub(crate) fn used_index(&self, ring: Ring) -> u16 {
        self.u16_at(ring.start + USED + 2)
    }

    /// Head and length.
    pub(crate) fn used_entry(&self, ring: Ring, position: u16) -> (u32, u32) {
        let at = to_usize(ring.start + USED + 4 + 8 * u64::from(position % ring.size));
        let word = |at: usize| u32::from_le_bytes(self.copy[at..at + 4].try_into().expect("four bytes"));
        (word(at), word(at + 4))
    }

    pub(crate) fn set_avail_index(&mut self, ring: Ring, index: u16) {
        self.write(ring.start + AVAIL + 2, &index.to_le_bytes(), &[]);
    }

    /// Offer a chain after those that were offered.
    pub(crate) fn publish(&mut self, ring: Ring, head: u16) {
        let index = self.avail_index(ring);
        self.write(ring.start + AVAIL + 4 + 2 * u64::from(index % ring.size), &head.to_le_bytes(), &[]);
        self.set_avail_index(ring, index.wrapping_add(1));
    }

    /// A descriptor: address, length, flags, next.
    fn descriptor(&self, at: u64) -> Option<(u64, u32, u16, u16)> {
        let mut bytes = [0; 16];
        let mut found = 0;
        for (region, within, file) in Guest::parts(at, 16) {
            if self.present[region] {
                found += file.len();
                bytes[to_usize(within.start)..to_usize(within.end)].copy_from_slice(&self.copy[file]);
            }
        }
        (found == 16).then(|| words_of(u128::from_le_bytes(bytes)))
    }

    fn offered(&self, head: u16, count: u16) -> Offered {
        Offered {
            head,
            count,
            writable: Vec::new(),
            len: 0,
            status: None,
            regions: [true, false, false],
            before: self.changes,
            loose_table: false,
        }
    }

    /// A descriptor of the ring as it lies there, its last two words in that order.
    pub(crate) fn ring_descriptor(&self, ring: Ring, index: u16) -> (u64, u32, u16, u16) {
        let at = to_usize(ring.start) + 16 * usize::from(index);
        let word = u128::from_le_bytes(self.copy[at..at + 16].try_into().expect("sixteen bytes"));
        words_of(word)
    }

    pub(crate) fn write_ring_descriptor(&mut self, ring: Ring, index: u16, words: (u64, u32, u16, u16)) {
        self.write(ring.start + 16 * u64::from(index), &bytes_of(words), &[]);
    }

    /// A list of descriptors that was taken from a packed ring, as far as it makes sense (virtio 1.3 §2.8.6, §2.8.7).
    pub(crate) fn walk_list(&self, list: &[(u64, u32, u16, u16)]) -> Offered {
        let id = list.last().expect("chains have a descriptor").2;
        let mut offered = self.offered(id, u16::try_from(list.len()).expect("within a ring"));
        for &(addr, len, _, flags) in list {
            if flags & 4 == 0 {
                self.add(&mut offered, addr, u64::from(len), flags & 2 != 0);
                continue;
            }
            if list.len() > 1 {
                break;
            }
            offered.loose_table = addr < TABLES.start || addr.saturating_add(u64::from(len)) > TABLES.end;
            for entry in 0..u64::from(len / 16) {
                let Some((addr, len, _, flags)) = self.descriptor(addr.saturating_add(16 * entry)) else { break };
                self.add(&mut offered, addr, u64::from(len), flags & 2 != 0);
            }
        }
        offered
    }

    /// Follow a chain as far as it makes sense (virtio 1.3 §2.7.5).
    pub(crate) fn walk(&self, ring: Ring, head: u16) -> Offered {
        let mut offered = self.offered(head, 1);
        let (mut table, mut entries, mut index) = (ring.start, u64::from(ring.size), head);
        let (mut left, mut indirect) = (entries, false);
        while left > 0 && u64::from(index) < entries {
            left -= 1;
            let at = table.saturating_add(16 * u64::from(index));
            let Some((addr, len, flags, next)) = self.descriptor(at) else { break };
            if flags & 4 != 0 {
                if indirect || flags & 1 != 0 {
                    break;
                }
                (table, entries, index, indirect) = (addr, u64::from(len / 16), 0, true);
                left = entries;
                offered.loose_table = addr < TABLES.start || addr.saturating_add(u64::from(len)) > TABLES.end;
                continue;
            }
            self.add(&mut offered, addr, u64::from(len), flags & 2 != 0);
            if flags & 1 == 0 {
                break;
            }
            index = next;
        }
        offered
    }

    fn add(&self, offered: &mut Offered, addr: u64, len: u64, writable: bool) {
        for (region, _, file) in Guest::parts(addr, len).filter(|(region, ..)| self.present[*region]) {
            offered.regions[region] = true;
            if writable {
                offered.writable.push(file);
            }
        }
        if writable && len > 0 {
            offered.len += len;
            let last = addr.checked_add(len - 1);
            let mut place = last.into_iter().flat_map(|last| Guest::parts(last, 1));
            offered.status = place.next().filter(|(region, ..)| self.present[*region]).map(|(_, _, file)| file.start);
        }
    }

    /// Bring the copy up to date; where something has changed outside of `writable`, if it has.
    pub(crate) fn look(&mut self, writable: &[Range<usize>]) -> Option<usize> {
        self.file.read_exact_at(&mut self.buffer, 0).expect("it is there");
        let mut stray = None;
        // Whole pages first: next to nothing changes in a turn, and every comparison made here is counted too.
        for page in (0..self.copy.len()).step_by(4096) {
            if self.buffer[page..page + 4096] == self.copy[page..page + 4096] {
                continue;
            }
            for at in (page..page + 4096).step_by(16) {
                let differ = |byte: &usize| self.buffer[*byte] != self.copy[*byte];
                let Some(first) = (at..at + 16).find(differ) else { continue };
                let last = (at..at + 16).rev().find(differ).expect("there is a first");
                if !writable.iter().any(|range| range.start <= first && last < range.end) {
                    let beside = |byte: &usize| differ(byte) && !writable.iter().any(|range| range.contains(byte));
                    stray = stray.or((at..at + 16).find(beside));
                }
            }
        }
        std::mem::swap(&mut self.copy, &mut self.buffer);
        stray
    }
}
