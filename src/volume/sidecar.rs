//! The two pages beside superblocks and table: poison and counters.
//!
//! Both begin with magic (8), CRC32C (4), place (1: 0 head, 1 tail, 2 label), zeros (3), set UUID (16)
//! and a sequence (8); of several valid copies the highest sequence counts.
//!
//! The poison page goes on with: poisoned (1), device that failed (1), zeros (2), error number (4), time
//! in seconds since the epoch (8), log2 of the sectors in a region (4), words in the bitmap (4), and at
//! offset 128 one bit for each region written since the last good flush. The counters page goes on with
//! a count (8) and that many counters of 8 bytes: 16 are the engine's own, 16 to 47 the scanner's, and from
//! 48 on lie the days that health is judged by, two words each.

use uuid::Uuid;

use super::layout::PAGE;
use super::superblock::{CAPACITY_MAX, Fields, FieldsMut, NUMBER_END, Seat, page_crc};

const POISON_MAGIC: [u8; 8] = *b"VHREPOIS";
const COUNTERS_MAGIC: [u8; 8] = *b"VHRECNTR";
const BITMAP: usize = 128;
/// 64-bit words of regions a poison page has room for.
pub const BITMAP_WORDS: usize = (PAGE - BITMAP) / 8;
/// Counters a page has room for.
pub const COUNTERS_MAX: usize = 256;

/// Whether a flush failed, and what that may concern.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Poison {
    /// Raised by each change.
    pub sequence: u64,
    /// A flush failed and nobody has cleared that.
    pub poisoned: bool,
    /// The device that failed.
    pub device: u8,
    /// Its error number.
    pub errno: i32,
    /// Seconds since the epoch.
    pub time: u64,
    /// Log2 of the sectors in a region.
    pub shift: u32,
    /// Regions written since the last good flush, a bit each.
    pub regions: Vec<u64>,
}

impl Poison {
    /// The written regions as (first sector, sectors), neighbours joined.
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        let size = 1_u64 << self.shift;
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for (word, bits) in self.regions.iter().enumerate() {
            for bit in (0..64).filter(|bit| bits >> bit & 1 == 1) {
                let start = (word as u64 * 64 + bit) * size;
                match ranges.last_mut() {
                    Some((first, count)) if *first + *count == start => *count += size,
                    _ => ranges.push((start, size)),
                }
            }
        }
        ranges
    }

    /// The page for `seat`.
    pub fn encode(&self, set: Uuid, seat: Seat) -> [u8; PAGE] {
        let mut page = header(POISON_MAGIC, set, seat, self.sequence);
        let mut f = FieldsMut(&mut page);
        f.bytes(40, &[u8::from(self.poisoned), self.device]);
        f.bytes(44, &self.errno.to_le_bytes());
        f.u64(48, self.time);
        f.u32(56, self.shift);
        assert!(self.regions.len() <= BITMAP_WORDS, "regions are sized to fit the page");
        f.u32(60, u32::try_from(self.regions.len()).expect("a few hundred"));
        for (i, word) in self.regions.iter().enumerate() {
            f.u64(BITMAP + 8 * i, *word);
        }
        seal(page)
    }

    /// Verify a page read from `seat`.
    pub fn decode(page: &[u8], set: Uuid, seat: Seat) -> Option<Poison> {
        let f = check(page, POISON_MAGIC, set, seat)?;
        let words = f.u32(60) as usize;
        (words <= BITMAP_WORDS && f.u32(56) <= CAPACITY_MAX.ilog2()).then(|| Poison {
            sequence: f.u64(32),
            poisoned: page[40] != 0,
            device: page[41],
            errno: i32::from_le_bytes(f.array(44)),
            time: f.u64(48),
            shift: f.u32(56),
            regions: (0..words).map(|i| f.u64(BITMAP + 8 * i)).collect(),
        })
    }
}

/// Counters that outlive the server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SavedCounters {
    /// Raised by each save.
    pub sequence: u64,
    /// In the order the engine defines; missing ones are 0.
    pub values: Vec<u64>,
}

impl SavedCounters {
    /// The page for `seat`.
    pub fn encode(&self, set: Uuid, seat: Seat) -> [u8; PAGE] {
        let mut page = header(COUNTERS_MAGIC, set, seat, self.sequence);
        let mut f = FieldsMut(&mut page);
        assert!(self.values.len() <= COUNTERS_MAX, "the engine has few counters");
        f.u64(40, self.values.len() as u64);
        for (i, value) in self.values.iter().enumerate() {
            f.u64(48 + 8 * i, *value);
        }
        seal(page)
    }

    /// Verify a page read from `seat`.
    pub fn decode(page: &[u8], set: Uuid, seat: Seat) -> Option<SavedCounters> {
        let f = check(page, COUNTERS_MAGIC, set, seat)?;
        let count = usize::try_from(f.u64(40)).ok().filter(|count| *count <= COUNTERS_MAX)?;
        Some(SavedCounters { sequence: f.u64(32), values: (0..count).map(|i| f.u64(48 + 8 * i)).collect() })
    }
}

fn seat_byte(seat: Seat) -> u8 {
    match seat {
        Seat::Spare(place) => place.number(),
        Seat::Label => 2,
    }
}

fn header(magic: [u8; 8], set: Uuid, seat: Seat, sequence: u64) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    let mut f = FieldsMut(&mut page);
    f.bytes(0, &magic);
    f.bytes(12, &[seat_byte(seat)]);
    f.bytes(16, set.as_bytes());
    f.u64(32, sequence);
    page
}

fn seal(mut page: [u8; PAGE]) -> [u8; PAGE] {
    let crc = page_crc(&page, 8);
    FieldsMut(&mut page).u32(8, crc);
    page
}

fn check(page: &[u8], magic: [u8; 8], set: Uuid, seat: Seat) -> Option<Fields<'_>> {
    let f = Fields(page);
    let ours = f.array(0) == magic
        && f.u32(8) == page_crc(page, 8)
        && page[12] == seat_byte(seat)
        && f.array(16) == *set.as_bytes()
        && f.u64(32) < NUMBER_END;
    ours.then_some(f)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::layout::Place;

    #[test]
    fn both_pages_survive_the_trip_and_notice_any_change() {
        let set = Uuid::from_u128(77);
        let seat = Seat::Spare(Place::Tail);
        let poison =
            Poison { sequence: 3, poisoned: true, device: 1, errno: 5, time: 9, shift: 11, regions: vec![5, 1 << 63] };
        let counters = SavedCounters { sequence: 4, values: vec![1, 2, 3] };
        let (p, c) = (poison.encode(set, seat), counters.encode(set, seat));
        assert_eq!(Poison::decode(&p, set, seat), Some(poison));
        assert_eq!(SavedCounters::decode(&c, set, seat), Some(counters));
        assert_eq!(Poison::decode(&p, set, Seat::Label), None);
        assert_eq!(Poison::decode(&p, Uuid::from_u128(78), seat), None);
        // An interpreter has no time for all.
        for byte in (0..PAGE).step_by(if cfg!(miri) { 1999 } else { 1 }) {
            let (mut p, mut c) = (p, c);
            p[byte] ^= 0x80;
            c[byte] ^= 0x80;
            assert_eq!(Poison::decode(&p, set, seat), None, "poison byte {byte}");
            assert_eq!(SavedCounters::decode(&c, set, seat), None, "counters byte {byte}");
        }
    }

    #[test]
    fn numbers_that_cannot_be_are_not_believed() {
        let (set, seat) = (Uuid::from_u128(77), Seat::Label);
        let poison = |sequence, shift| Poison { sequence, shift, regions: vec![u64::MAX], ..Poison::default() };
        for (impossible, possible) in
            [(poison(u64::MAX, 11), poison(NUMBER_END - 1, 11)), (poison(1, 63), poison(1, 42))]
        {
            assert_eq!(Poison::decode(&impossible.encode(set, seat), set, seat), None);
            assert_eq!(Poison::decode(&possible.encode(set, seat), set, seat), Some(possible.clone()));
            assert_eq!(possible.ranges().len(), 1);
        }
        let counters = SavedCounters { sequence: u64::MAX, values: vec![1] };
        assert_eq!(SavedCounters::decode(&counters.encode(set, seat), set, seat), None);
    }

    #[test]
    fn neighbouring_regions_are_one_range() {
        let poison = Poison { shift: 11, regions: vec![0b1011 | 1 << 63, 1], ..Poison::default() };
        assert_eq!(poison.ranges(), [(0, 4096), (3 * 2048, 2048), (63 * 2048, 4096)]);
    }
}
