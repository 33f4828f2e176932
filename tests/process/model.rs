//! What a disk should hold.

use crate::guest::{Guest, Io, Queue};

/// Content that names its own place: each 16 bytes of a sector are its number and `stamp`.
pub(crate) fn pattern(sector: u64, count: u64, stamp: u64) -> Vec<u8> {
    (sector..sector + count)
        .flat_map(|sector| {
            let mut unit = [0; 16];
            unit[..8].copy_from_slice(&sector.to_le_bytes());
            unit[8..].copy_from_slice(&stamp.to_le_bytes());
            unit.repeat(32)
        })
        .collect()
}

/// A copy of the disk's content in memory, from a sector on.
pub(crate) struct Model {
    pub(crate) start: u64,
    pub(crate) bytes: Vec<u8>,
}

impl Model {
    /// Zeros, as on a new volume.
    pub(crate) fn zeros(start: u64, count: u64) -> Model {
        Model { start, bytes: vec![0; usize::try_from(count).expect("small") * 512] }
    }

    /// A pattern, after writing it to the disk.
    pub(crate) fn written(guest: &mut Guest, start: u64, count: u64, stamp: u64) -> Model {
        let mut model = Model::zeros(start, count);
        let ios = cut(start, count).map(|(sector, count)| model.write(sector, pattern(sector, count, stamp)));
        let ios: Vec<Io> = ios.collect();
        assert!(guest.queue().run(&ios).iter().all(Result::is_ok));
        model
    }

    fn range(&self, sector: u64, count: u64) -> std::ops::Range<usize> {
        let at = usize::try_from(sector - self.start).expect("small") * 512;
        at..at + usize::try_from(count).expect("small") * 512
    }

    /// Take the data in; the request that does the same to the disk.
    pub(crate) fn write(&mut self, sector: u64, data: Vec<u8>) -> Io {
        let range = self.range(sector, data.len() as u64 / 512);
        self.bytes[range].copy_from_slice(&data);
        Io::Write { sector, data }
    }

    /// Write that to the disk too.
    #[track_caller]
    pub(crate) fn put(&mut self, guest: &mut Guest, sector: u64, data: Vec<u8>) {
        let write = self.write(sector, data);
        guest.queue().one(write).unwrap();
    }

    pub(crate) fn zero(&mut self, sector: u64, count: u64) {
        let range = self.range(sector, count);
        self.bytes[range].fill(0);
    }

    pub(crate) fn sectors(&self, sector: u64, count: u64) -> &[u8] {
        &self.bytes[self.range(sector, count)]
    }

    /// After a write of `new` that failed: each of its sectors is old or new, and stays what it is (W7).
    #[track_caller]
    pub(crate) fn settle(&mut self, queue: &mut Queue, sector: u64, new: &[u8]) {
        let count = new.len() as u64 / 512;
        let found = queue.one(Io::Read { sector, count }).unwrap_or_else(|failed| panic!("{sector}: {failed:?}"));
        for (sector, (found, new)) in (sector..).zip(found.chunks(512).zip(new.chunks(512))) {
            let old = self.sectors(sector, 1);
            assert!(found == old || found == new, "sector {sector} is neither old nor new: {:x?}", &found[..16]);
            self.write(sector, found.to_vec());
        }
    }

    /// Compare a part of the disk with the model.
    #[track_caller]
    pub(crate) fn check(&self, queue: &mut Queue, sector: u64, count: u64) {
        let cuts: Vec<_> = cut(sector, count).collect();
        let reads: Vec<Io> = cuts.iter().map(|(sector, count)| Io::Read { sector: *sector, count: *count }).collect();
        for ((sector, count), reply) in cuts.into_iter().zip(queue.run(&reads)) {
            let found = reply.unwrap_or_else(|failed| panic!("read of {count} sectors from {sector}: {failed:?}"));
            same(&found, self.sectors(sector, count), sector);
        }
    }

    /// Compare everything.
    #[track_caller]
    pub(crate) fn check_all(&self, queue: &mut Queue) {
        self.check(queue, self.start, self.bytes.len() as u64 / 512);
    }
}

/// Requests of at most 1 MiB.
fn cut(start: u64, count: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..count).step_by(2048).map(move |from| (start + from, (count - from).min(2048)))
}

/// Two equal contents; else the first sector that differs.
#[track_caller]
pub(crate) fn same(found: &[u8], expected: &[u8], start: u64) {
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.chunks(512).zip(expected.chunks(512)).enumerate() {
        let sector = start + i as u64;
        assert!(found == expected, "sector {sector}: found {:x?}, expected {:x?}", &found[..16], &expected[..16]);
    }
}

/// SplitMix64: small, and the same everywhere.
pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}
