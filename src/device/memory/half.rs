//! One half of a disk in memory.

use std::cell::RefCell;
use std::ops::Range;

/// Bytes kept as one. Small, because most of a simulated disk is never touched.
const CHUNK: usize = 4096;

/// Chunks kept by a thread for its next disks, 16 MiB at most. Without this, half of a simulator's
/// time goes to page faults: malloc gives the memory of each run's disks back to the kernel.
const SPARES_MAX: usize = 4096;

thread_local! {
    static SPARES: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

fn zeroed_chunk() -> Box<[u8]> {
    match SPARES.with_borrow_mut(Vec::pop) {
        Some(mut chunk) => {
            chunk.fill(0);
            chunk
        }
        None => vec![0; CHUNK].into_boxed_slice(),
    }
}

/// A range of bytes that are zero until written; only chunks that were written take memory.
#[derive(Clone, Debug)]
pub(super) struct Half {
    chunks: Vec<Option<Box<[u8]>>>,
    len: usize,
}

impl Half {
    pub(super) fn zeros(len: usize) -> Half {
        Half { chunks: vec![None; len.div_ceil(CHUNK)], len }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Have `len` bytes from now on, at least as many as before.
    pub(super) fn extend(&mut self, len: usize) {
        assert!(len >= self.len, "a disk does not shrink");
        self.chunks.resize(len.div_ceil(CHUNK), None);
        self.len = len;
    }

    /// Chunk number, range within the chunk, and range within the `len` bytes asked for.
    fn pieces(&self, offset: usize, len: usize) -> impl Iterator<Item = (usize, Range<usize>, Range<usize>)> + use<> {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "a range beyond the end of the disk");
        let mut done = 0;
        std::iter::from_fn(move || {
            (done < len).then(|| {
                let within = (offset + done) % CHUNK;
                let count = (CHUNK - within).min(len - done);
                let piece = ((offset + done) / CHUNK, within..within + count, done..done + count);
                done += count;
                piece
            })
        })
    }

    pub(super) fn read(&self, offset: usize, to: &mut [u8]) {
        for (chunk, within, asked) in self.pieces(offset, to.len()) {
            match &self.chunks[chunk] {
                Some(bytes) => to[asked].copy_from_slice(&bytes[within]),
                None => to[asked].fill(0),
            }
        }
    }

    pub(super) fn write(&mut self, offset: usize, from: &[u8]) {
        for (chunk, within, asked) in self.pieces(offset, from.len()) {
            let bytes = self.chunks[chunk].get_or_insert_with(zeroed_chunk);
            bytes[within].copy_from_slice(&from[asked]);
        }
    }

    /// Make `range` the same as in `other`.
    pub(super) fn copy_from(&mut self, other: &Half, range: Range<usize>) {
        for (chunk, within, _) in self.pieces(range.start, range.len()) {
            match (&mut self.chunks[chunk], &other.chunks[chunk]) {
                (Some(mine), Some(theirs)) => mine[within.clone()].copy_from_slice(&theirs[within]),
                (Some(mine), None) => mine[within].fill(0),
                (None, None) => {}
                (mine @ None, Some(theirs)) => {
                    let mut bytes = zeroed_chunk();
                    bytes[within.clone()].copy_from_slice(&theirs[within]);
                    *mine = Some(bytes);
                }
            }
        }
    }
}

impl Drop for Half {
    fn drop(&mut self) {
        // At the end of a thread its spares may be gone already: then the chunks are just freed.
        let _ = SPARES.try_with(|spares| {
            let mut spares = spares.borrow_mut();
            let room = SPARES_MAX - spares.len();
            spares.extend(self.chunks.drain(..).flatten().take(room));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_across_chunks_are_kept_and_the_rest_is_zero() {
        let mut half = Half::zeros(3 * CHUNK);
        half.write(CHUNK - 512, &[7; 1024]);
        let mut bytes = vec![1; 3 * CHUNK];
        half.read(0, &mut bytes);
        let expected = |at| if (CHUNK - 512..CHUNK + 512).contains(&at) { 7 } else { 0 };
        assert!(bytes.iter().enumerate().all(|(at, byte)| *byte == expected(at)));
        let mut other = Half::zeros(3 * CHUNK);
        other.write(2 * CHUNK, &[9; 512]);
        other.copy_from(&half, CHUNK..3 * CHUNK);
        other.read(0, &mut bytes);
        let expected = |at| if (CHUNK..CHUNK + 512).contains(&at) { 7 } else { 0 };
        assert!(bytes.iter().enumerate().all(|(at, byte)| *byte == expected(at)));
    }
}
