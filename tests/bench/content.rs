//! What is on the disk that is read and written, so that every read can be checked.
//!
//! Each sector begins and ends with a stamp of its number and the number of times it was written; between them is the
//! same filler everywhere. A stamp that is elsewhere, old or torn is seen by itself.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

/// Words of eight bytes in a sector.
pub(crate) const WORDS: usize = 64;
pub(crate) const SECTOR: usize = 512;
pub(crate) const BLOCK: usize = 4096;
pub(crate) const SECTORS_PER_BLOCK: usize = BLOCK / SECTOR;

/// What is known of a disk: the number of times each block was written.
pub(crate) struct Content {
    pub(crate) versions: Vec<u32>,
}

/// So that no stamp looks like a number.
const MASK: u64 = 0x9e37_79b9_7f4a_7c15;

/// First and last word of a sector.
pub(crate) fn stamp(sector: u64, version: u32) -> u64 {
    (sector | u64::from(version) << 32) ^ MASK
}

/// The sector and the version of a stamp.
pub(crate) fn unstamp(stamp: u64) -> (u64, u32) {
    let plain = stamp ^ MASK;
    (plain & 0xffff_ffff, (plain >> 32) as u32)
}

/// A word between them.
pub(crate) fn filler(word: usize) -> u64 {
    (word as u64).wrapping_mul(0xd6e8_feb8_6659_fd93)
}

impl Content {
    /// Fill the first `len` bytes of a file of `file_len`, and have them on the disk.
    pub(crate) fn write(path: &Path, len: u64, file_len: u64) -> io::Result<Content> {
        let blocks = usize::try_from(len).expect("small") / BLOCK;
        let mut file = File::create(path)?;
        let mut piece = vec![0_u64; 1 << 17];
        let mut sector = 0;
        while sector < blocks * SECTORS_PER_BLOCK {
            for words in piece.chunks_mut(WORDS) {
                words.iter_mut().enumerate().for_each(|(at, word)| *word = filler(at));
                (words[0], words[WORDS - 1]) = (stamp(sector as u64, 0), stamp(sector as u64, 0));
                sector += 1;
            }
            let bytes: Vec<u8> = piece.iter().flat_map(|word| word.to_le_bytes()).collect();
            file.write_all(&bytes)?;
        }
        // What fio writes over, so that it does not meet holes.
        let zeros = vec![0; 1 << 20];
        for _ in (len..file_len).step_by(zeros.len()) {
            file.write_all(&zeros)?;
        }
        file.sync_all()?;
        Ok(Content { versions: vec![0; blocks] })
    }
}
