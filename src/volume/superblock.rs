//! Superblocks: whose device this is, and which generation of the volume it belongs to.
//!
//! Little-endian, 4 KiB, CRC32C over the page with the checksum field zero:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic `VHREMAP1` |
//! | 8 | 4 | version, 1 |
//! | 12 | 4 | CRC32C |
//! | 16 | 8+8+8 | feature masks: compat, ro_compat, incompat |
//! | 40 | 16+16 | set UUID, device UUID |
//! | 72 | 1 | role: 1 spare, 2 primary |
//! | 73 | 1 | place: 0 head, 1 tail, 2 label |
//! | 74 | 1 | copy number, 0 or 1 |
//! | 75 | 1 | flags: 1 closed cleanly, 2 primary has a label, 4 close stamp valid, 8 stamp: its driver chose write-through |
//! | 76 | 4 | retired places, a bit each |
//! | 80 | 8 | generation |
//! | 88 | 8 | capacity of the volume, sectors |
//! | 96 | 8 | size of the primary, bytes |
//! | 104 | 8 | size of the spare, bytes |
//! | 112 | 4 | remaps at most |
//! | 116 | 4 | logical block, bytes |
//! | 120 | 8 | creation, seconds since the epoch |
//! | 128 | 20+4 | serial, padding |
//! | 152 | 8+8 | stamp: primary's size in bytes, mtime in ns since the epoch |
//! | 168 | 4+2+2 | stamp: CRC32C of the sampled blocks, a bit for each that could be read, padding |
//! | 176 | 8 | primary's inode (0: a block device) |
//! | 184 | 64 | primary's WWN or serial, zero padded |
//! | 248 | 8 × 16 | history, newest first: generation, CRC32C of its superblock, padding |
//! | 376 | 4+4 | number of regions, padding |
//! | 384 | 32 × 24 | regions: type 4, device 4, start 8, length 8 |
//! | 1152 | 8 | label: when the table was stamped, seconds since the epoch |

use uuid::Uuid;

use super::layout::{PAGE, Place};

/// What every superblock begins with.
pub const MAGIC: [u8; 8] = *b"VHREMAP1";
/// The format's version.
pub const VERSION: u32 = 1;
/// compat bits this program knows; others are ignored.
pub const COMPAT_KNOWN: u64 = 0;
/// ro_compat bits this program knows; with others the volume opens read-only.
pub const RO_COMPAT_KNOWN: u64 = 0;
/// incompat bits this program knows; with others the volume does not open.
pub const INCOMPAT_KNOWN: u64 = 0;
/// Sectors of the largest volume: blocks have numbers of 40 bits.
pub const CAPACITY_MAX: u64 = (1 << 43) - 1;
/// Generations and sequences below this one are possible: numbers that are raised once a commit never come
/// near it, and one that did would leave no room for the next.
pub const NUMBER_END: u64 = 1 << 62;
/// The last second that can be written as a date, of the year 9999.
const SECONDS_MAX: u64 = 253_402_300_799;
/// Generations remembered.
pub const HISTORY: usize = 8;
/// Regions there is room for.
pub const REGIONS: usize = 32;

/// Where a superblock belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seat {
    /// A place on the spare.
    Spare(Place),
    /// The label of the primary.
    Label,
}

impl Seat {
    fn bytes(self) -> [u8; 2] {
        match self {
            Seat::Spare(place) => [1, place.number()],
            Seat::Label => [2, 2],
        }
    }
}

/// What lies in a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// 1 head place, 2 slots, 3 tail place, 4 guest data, 5 label, 6 old label: to be zeros before the capacity
    /// takes it in. Programs that know no 6 change no capacity.
    pub kind: u32,
    /// 0 the primary, 1 the first spare.
    pub device: u32,
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub length: u64,
}

/// How the primary looked at the last clean close.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CloseStamp {
    /// Bytes.
    pub size: u64,
    /// Nanoseconds since the epoch; 0 for block devices.
    pub mtime_ns: u64,
    /// CRC32C over those sampled blocks that could be read.
    pub sample_crc: u32,
    /// Whether the guest that was served last has switched its cache to write-through: the one it is migrated to
    /// goes on without saying so.
    pub write_through: bool,
}

/// The content of a superblock, the same in all of its copies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Feature masks: compat, ro_compat, incompat.
    pub features: [u64; 3],
    /// The volume.
    pub set: Uuid,
    /// The device this copy lies on.
    pub device: Uuid,
    /// Whether the volume was closed cleanly.
    pub clean: bool,
    /// Whether the primary carries a label.
    pub labelled: bool,
    /// Bit per place that is no longer written.
    pub retired: u32,
    /// Raised at each open for writing, close, and change of membership.
    pub generation: u64,
    /// Sectors the guest sees.
    pub capacity: u64,
    /// Bytes of the primary.
    pub primary_size: u64,
    /// Bytes of the spare.
    pub spare_size: u64,
    /// Slots.
    pub max_remaps: u32,
    /// 512 or 4096.
    pub logical_block: u32,
    /// Seconds since the epoch.
    pub created: u64,
    /// GET_ID.
    pub serial: [u8; 20],
    /// The primary at the last clean close.
    pub stamp: Option<CloseStamp>,
    /// The samples that [`CloseStamp::sample_crc`] covers, a bit each: those that could be read.
    pub sampled: u16,
    /// The primary's inode; 0 for a block device.
    pub primary_inode: u64,
    /// The primary's WWN or serial; empty for a file.
    pub primary_wwn: String,
    /// Earlier generations and the checksums of their superblocks, newest first.
    pub history: [(u64, u32); HISTORY],
    /// What lies where.
    pub regions: Vec<Region>,
    /// Label: when its table was stamped, seconds since the epoch.
    pub stamped: u64,
}

/// Why a page is no superblock of ours, or not a usable one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SuperblockError {
    /// No magic: not ours at all.
    #[error("no vhost-remap superblock")]
    NotOurs,
    /// Ours, damaged.
    #[error("checksum {found:#010x} where {expected:#010x} belongs")]
    Checksum {
        /// In the page.
        found: u32,
        /// Of its content.
        expected: u32,
    },
    /// Made by a later program.
    #[error("format version {0}, and this program knows version {VERSION}")]
    Version(u32),
    /// Of a primary where a spare's belongs, or the other way round.
    #[error("a superblock of another kind of device")]
    Role,
    /// In the wrong place.
    #[error("a superblock that belongs elsewhere (misdirected write)")]
    Misplaced,
    /// A field that cannot be.
    #[error("an impossible {0}")]
    Field(&'static str),
}

/// Little-endian fields of a page at fixed offsets.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl Fields<'_> {
    pub(super) fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0[at..at + N].try_into().expect("offsets lie inside the page")
    }
    pub(super) fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }
    pub(super) fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.array(at))
    }
}

/// Writes little-endian fields into a page.
pub(super) struct FieldsMut<'a>(pub(super) &'a mut [u8]);

impl FieldsMut<'_> {
    pub(super) fn bytes(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }
    pub(super) fn u32(&mut self, at: usize, value: u32) {
        self.bytes(at, &value.to_le_bytes());
    }
    pub(super) fn u64(&mut self, at: usize, value: u64) {
        self.bytes(at, &value.to_le_bytes());
    }
}

/// CRC32C of a page whose four checksum bytes at `at` count as zero.
pub(super) fn page_crc(page: &[u8], at: usize) -> u32 {
    let crc = crc32c::crc32c(&page[..at]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, &page[at + 4..])
}

impl Superblock {
    /// What the last close said of its guest's cache; nothing after an unclean one.
    pub fn closed_write_through(&self) -> Option<bool> {
        self.stamp.filter(|_| self.clean).map(|stamp| stamp.write_through)
    }

    /// The page for `seat`, copy 0 or 1.
    pub fn encode(&self, seat: Seat, copy: u8) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        let mut f = FieldsMut(&mut page);
        f.bytes(0, &MAGIC);
        f.u32(8, VERSION);
        for (i, mask) in self.features.iter().enumerate() {
            f.u64(16 + 8 * i, *mask);
        }
        f.bytes(40, self.set.as_bytes());
        f.bytes(56, self.device.as_bytes());
        f.bytes(72, &seat.bytes());
        let write_through = self.stamp.is_some_and(|stamp| stamp.write_through);
        let flags = [self.clean, self.labelled, self.stamp.is_some(), write_through];
        let flags = flags.iter().enumerate().fold(0, |flags, (bit, set)| flags | u8::from(*set) << bit);
        f.bytes(74, &[copy, flags]);
        f.u32(76, self.retired);
        f.u64(80, self.generation);
        f.u64(88, self.capacity);
        f.u64(96, self.primary_size);
        f.u64(104, self.spare_size);
        f.u32(112, self.max_remaps);
        f.u32(116, self.logical_block);
        f.u64(120, self.created);
        f.bytes(128, &self.serial);
        if let Some(stamp) = &self.stamp {
            f.u64(152, stamp.size);
            f.u64(160, stamp.mtime_ns);
            f.u32(168, stamp.sample_crc);
            f.bytes(172, &self.sampled.to_le_bytes());
        }
        f.u64(176, self.primary_inode);
        let wwn = self.primary_wwn.as_bytes();
        f.bytes(184, &wwn[..wwn.len().min(64)]);
        for (i, (generation, crc)) in self.history.iter().enumerate() {
            f.u64(248 + 16 * i, *generation);
            f.u32(256 + 16 * i, *crc);
        }
        assert!(self.regions.len() <= REGIONS, "a volume of format 1 has five regions, and an old label at most");
        f.u32(376, u32::try_from(self.regions.len()).expect("at most 32"));
        for (i, region) in self.regions.iter().enumerate() {
            let at = 384 + 24 * i;
            f.u32(at, region.kind);
            f.u32(at + 4, region.device);
            f.u64(at + 8, region.start);
            f.u64(at + 16, region.length);
        }
        f.u64(1152, self.stamped);
        let crc = page_crc(&page, 12);
        FieldsMut(&mut page).u32(12, crc);
        page
    }

    /// Verify a page read for `seat`, copy 0 or 1.
    ///
    /// # Errors
    /// When the page is not a superblock of ours, damaged, of another version or of another seat.
    pub fn decode(page: &[u8], seat: Seat, copy: u8) -> Result<Superblock, SuperblockError> {
        let f = Fields(page);
        if f.array(0) != MAGIC {
            return Err(SuperblockError::NotOurs);
        }
        let (found, expected) = (f.u32(12), page_crc(page, 12));
        if found != expected {
            return Err(SuperblockError::Checksum { found, expected });
        }
        if f.u32(8) != VERSION {
            return Err(SuperblockError::Version(f.u32(8)));
        }
        if page[72] != seat.bytes()[0] {
            return Err(SuperblockError::Role);
        }
        if f.array(72) != seat.bytes() || page[74] != copy {
            return Err(SuperblockError::Misplaced);
        }
        let field = |ok: bool, name| if ok { Ok(()) } else { Err(SuperblockError::Field(name)) };
        let flags = page[75];
        let regions = f.u32(376) as usize;
        field(regions <= REGIONS, "number of regions")?;
        field(matches!(f.u32(116), 512 | 4096), "logical block size")?;
        field(f.u64(88) > 0 && f.u64(88) <= CAPACITY_MAX, "capacity")?;
        field(f.u64(80) < NUMBER_END, "generation")?;
        field(f.u64(120) <= SECONDS_MAX && f.u64(1152) <= SECONDS_MAX, "time")?;
        let wwn: [u8; 64] = f.array(184);
        let wwn_len = wwn.iter().position(|b| *b == 0).unwrap_or(64);
        let superblock = Superblock {
            features: [f.u64(16), f.u64(24), f.u64(32)],
            set: Uuid::from_bytes(f.array(40)),
            device: Uuid::from_bytes(f.array(56)),
            clean: flags & 1 != 0,
            labelled: flags & 2 != 0,
            retired: f.u32(76),
            generation: f.u64(80),
            capacity: f.u64(88),
            primary_size: f.u64(96),
            spare_size: f.u64(104),
            max_remaps: f.u32(112),
            logical_block: f.u32(116),
            created: f.u64(120),
            serial: f.array(128),
            stamp: (flags & 4 != 0).then(|| CloseStamp {
                size: f.u64(152),
                mtime_ns: f.u64(160),
                sample_crc: f.u32(168),
                write_through: flags & 8 != 0,
            }),
            sampled: if flags & 4 == 0 { 0 } else { u16::from_le_bytes(f.array(172)) },
            primary_inode: f.u64(176),
            primary_wwn: String::from_utf8_lossy(&wwn[..wwn_len]).into_owned(),
            history: std::array::from_fn(|i| (f.u64(248 + 16 * i), f.u32(256 + 16 * i))),
            regions: (0..regions)
                .map(|i| 384 + 24 * i)
                .map(|at| Region {
                    kind: f.u32(at),
                    device: f.u32(at + 4),
                    start: f.u64(at + 8),
                    length: f.u64(at + 16),
                })
                .collect(),
            stamped: f.u64(1152),
        };
        field(superblock.old_labels().all(|old| superblock.may_be_zeros(old)), "old label")?;
        Ok(superblock)
    }

    /// The superblock of the next generation, with this one at the head of its history.
    pub fn next_generation(&self) -> Superblock {
        let own = Fields(&self.encode(Seat::Spare(Place::Head), 0)).u32(12);
        let mut next = self.clone();
        next.generation += 1;
        next.history.rotate_right(1);
        next.history[0] = (self.generation, own);
        next
    }

    /// Which of its two copies a generation is written to: a torn write leaves the one before it whole.
    pub fn copy_for(generation: u64) -> u8 {
        u8::from(!generation.is_multiple_of(2))
    }

    /// Whether `place` is retired.
    pub fn is_retired(&self, place: Place) -> bool {
        self.retired >> place.number() & 1 == 1
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::volume) fn sample() -> Superblock {
        Superblock {
            features: [1, 2, 3],
            set: Uuid::from_u128(7),
            device: Uuid::from_u128(8),
            clean: true,
            labelled: true,
            retired: 2,
            generation: 41,
            capacity: 1000,
            primary_size: 1 << 20,
            spare_size: 1 << 30,
            max_remaps: 16_384,
            logical_block: 512,
            created: 5,
            serial: *b"serial\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
            stamp: Some(CloseStamp { size: 9, mtime_ns: 10, sample_crc: 11, write_through: true }),
            sampled: 0xfffe,
            primary_inode: 12,
            primary_wwn: "naa.5000".into(),
            history: [(40, 1), (39, 2), (0, 0), (0, 0), (0, 0), (0, 0), (0, 0), (0, 0)],
            regions: vec![Region { kind: 1, device: 1, start: 0, length: 4096 }],
            stamped: 13,
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let page = sample().encode(Seat::Spare(Place::Tail), 1);
        assert_eq!(Superblock::decode(&page, Seat::Spare(Place::Tail), 1), Ok(sample()));
    }

    #[test]
    fn any_flipped_bit_is_noticed() {
        let good = sample().encode(Seat::Label, 0);
        // An interpreter has no time for all.
        for byte in (0..PAGE).step_by(if cfg!(miri) { 1999 } else { 1 }) {
            let mut page = good;
            page[byte] ^= 0x10;
            assert!(Superblock::decode(&page, Seat::Label, 0).is_err(), "byte {byte}");
        }
    }

    #[test]
    fn a_superblock_from_elsewhere_is_misplaced() {
        let page = sample().encode(Seat::Spare(Place::Head), 0);
        for (seat, copy) in [(Seat::Spare(Place::Tail), 0), (Seat::Spare(Place::Head), 1)] {
            assert_eq!(Superblock::decode(&page, seat, copy), Err(SuperblockError::Misplaced));
        }
        assert_eq!(Superblock::decode(&page, Seat::Label, 0), Err(SuperblockError::Role));
    }

    #[test]
    fn numbers_that_cannot_be_are_not_believed() {
        let (seat, decode) = (Seat::Label, |superblock: &Superblock| {
            Superblock::decode(&superblock.encode(Seat::Label, 0), Seat::Label, 0)
        });
        let last = Superblock { generation: NUMBER_END - 1, stamped: SECONDS_MAX, ..sample() };
        assert_eq!(decode(&last), Ok(last.clone()));
        assert!(last.next_generation().encode(seat, 0).starts_with(&MAGIC));
        let generation = Superblock { generation: u64::MAX, ..sample() };
        assert_eq!(decode(&generation), Err(SuperblockError::Field("generation")));
        let time = Superblock { stamped: u64::MAX, ..sample() };
        assert_eq!(decode(&time), Err(SuperblockError::Field("time")));
    }

    #[test]
    fn the_next_generation_remembers_this_one() {
        let next = sample().next_generation();
        assert_eq!(next.generation, 42);
        assert_eq!(next.history[0].0, 41);
        assert_eq!(next.history[1], (40, 1));
    }
}
