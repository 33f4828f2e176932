//! Sectors that say what they are: which sector, who wrote it, as the how manieth write, and a checksum over that.

use std::ops::Range;

/// Bytes in a sector.
pub(crate) const SECTOR: usize = 512;

const MAGIC: [u8; 4] = *b"VRTS";
/// Magic, checksum, sector, run, stamp; the rest follows from these.
const HEADER: usize = 32;

/// Which write a sector is from: a number no other write of the run has, and the queue it went through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Stamp(u64);

impl Stamp {
    /// Zeros: nobody has written it, or zeros were.
    pub(crate) const ZEROS: Stamp = Stamp(0);

    pub(crate) fn new(sequence: u64, queue: usize) -> Stamp {
        Stamp(sequence << 8 | queue as u64)
    }
}

impl std::fmt::Display for Stamp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Stamp::ZEROS => f.write_str("zeros"),
            Stamp(stamp) => write!(f, "write {} of queue {}", stamp >> 8, stamp & 0xff),
        }
    }
}

/// What a run's sectors look like. Those of another run are foreign.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run(pub(crate) u64);

impl Run {
    /// The content of these sectors after a write.
    pub(crate) fn content(self, sectors: Range<u64>, stamp: Stamp) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(usize::try_from(sectors.end - sectors.start).expect("small") * SECTOR);
        sectors.for_each(|sector| bytes.extend(self.sector(sector, stamp)));
        bytes
    }

    fn sector(self, sector: u64, stamp: Stamp) -> [u8; SECTOR] {
        let mut bytes = [0; SECTOR];
        if stamp == Stamp::ZEROS {
            return bytes;
        }
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[8..16].copy_from_slice(&sector.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.0.to_le_bytes());
        bytes[24..32].copy_from_slice(&stamp.0.to_le_bytes());
        let mut word = sector.rotate_left(32) ^ stamp.0;
        for unit in bytes[HEADER..].chunks_exact_mut(8) {
            word = word.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(self.0);
            unit.copy_from_slice(&word.to_le_bytes());
        }
        let sum = crc32c::crc32c(&bytes[8..]);
        bytes[4..8].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Which write a sector's content is from, wherever it was found: the sector it belongs to, and the stamp.
    pub(crate) fn identify(self, bytes: &[u8]) -> Result<(Option<u64>, Stamp), String> {
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok((None, Stamp::ZEROS));
        }
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        if bytes[..4] != MAGIC || bytes[4..8] != crc32c::crc32c(&bytes[8..]).to_le_bytes() {
            return Err(format!("is torn or was written by nobody: {:x?}", &bytes[..HEADER]));
        }
        if word(16) != self.0 {
            return Err(format!("is from another run, {:x}", word(16)));
        }
        Ok((Some(word(8)), Stamp(word(24))))
    }
}

#[test]
fn sectors_are_known_again_and_nothing_else_passes_for_them() {
    let (run, stamp) = (Run(7), Stamp::new(5, 2));
    let bytes = run.content(100..102, stamp);
    assert_eq!(run.identify(&bytes[..SECTOR]), Ok((Some(100), stamp)));
    assert_eq!(run.identify(&bytes[SECTOR..]), Ok((Some(101), stamp)));
    assert_eq!(run.identify(&run.content(3..4, Stamp::ZEROS)), Ok((None, Stamp::ZEROS)));
    assert!(Run(8).identify(&bytes[..SECTOR]).is_err());
    for byte in 0..SECTOR {
        let mut flipped = bytes[..SECTOR].to_vec();
        flipped[byte] ^= 1;
        assert!(run.identify(&flipped).is_err(), "byte {byte}");
    }
    // The halves of two writes of one sector.
    let torn = [&bytes[..256], &run.content(100..101, Stamp::new(6, 2))[256..]].concat();
    assert!(run.identify(&torn).is_err());
}
