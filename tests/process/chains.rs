//! Random chains from a seed: every request in every shape, and chains that are wrong.
//!
//! A chain says all that is written to guest memory for it, so that the same chain can be offered to two
//! back-ends.

use crate::frontend::{AREA, INDIRECT, MEMORY_END, NEXT, Raw, WRITE};
use crate::model::{Random, pattern};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const GET_LIFETIME: u32 = 10;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// Buffers lie in the first part of a ring's area, tables of descriptors in the last.
const TABLES: u64 = AREA - 0x10_0000;
/// Where the area goes from one region of guest memory into the next.
const BORDER: u64 = AREA / 2;
/// Guest memory ends long before.
const NOWHERE: u64 = 1 << 40;

/// A chain and everything it refers to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Chain {
    /// Bytes in guest memory.
    pub(crate) content: Vec<(u64, Vec<u8>)>,
    /// Descriptors of the ring's own table.
    pub(crate) descriptors: Vec<(u16, Raw)>,
    /// A table elsewhere.
    pub(crate) table: Option<(u64, Vec<Raw>)>,
    pub(crate) head: u16,
    /// Buffers that the device may write.
    pub(crate) writable: Vec<(u64, u32)>,
}

impl Chain {
    /// Where the status byte goes: the last byte that the device may write.
    pub(crate) fn status(&self) -> Option<u64> {
        let last = self.writable.iter().rfind(|(_, len)| *len > 0)?;
        Some(last.0 + u64::from(last.1) - 1).filter(|at| *at < MEMORY_END)
    }
}

/// A buffer: address, length, whether the device writes it.
type Buffer = (u64, u32, bool);

/// What a request says and how many bytes, status included, it gives the device to write.
struct Request {
    readable: Vec<u8>,
    writable: usize,
}

/// Makes chains for one ring.
pub(crate) struct Chains {
    pub(crate) random: Random,
    /// Start of the ring's area.
    pub(crate) area: u64,
    /// Entries of the ring.
    pub(crate) size: u16,
    /// Whether indirect descriptors may be used.
    pub(crate) indirect: bool,
    /// Sectors to be used: the first and how many.
    pub(crate) sectors: (u64, u64),
    /// Size of the disk, in sectors.
    pub(crate) capacity: u64,
}

impl Chains {
    /// The next chain.
    pub(crate) fn next(&mut self) -> Chain {
        if self.random.below(6) == 0 {
            return self.wrong();
        }
        let request = self.request();
        self.shape(&request)
    }

    /// A flush, in one of its shapes.
    pub(crate) fn flush(&mut self) -> Chain {
        self.shape(&transfer(FLUSH, 0, &[], 0))
    }

    fn pick<T: Copy>(&mut self, among: &[T]) -> T {
        among[usize::try_from(self.random.below(among.len() as u64)).expect("small")]
    }

    fn range(&mut self) -> (u64, u64) {
        let longest = self.pick(&[1, 8, 64, 1024]).min(self.sectors.1 / 2);
        let count = 1 + self.random.below(longest);
        let mut start = self.sectors.0 + self.random.below(self.sectors.1 - count);
        if self.random.below(3) == 0 {
            start = start / 8 * 8;
        }
        (start.max(self.sectors.0), count)
    }

    fn request(&mut self) -> Request {
        let (sector, count) = self.range();
        let bytes = usize::try_from(count * 512).expect("small");
        match self.random.below(40) {
            0..14 => transfer(IN, sector, &[], bytes),
            14..26 => transfer(OUT, sector, &pattern(sector, count, self.random.next()), 0),
            26..28 => transfer(FLUSH, self.random.next(), &[], 0),
            28..30 => self.segments(DISCARD, 34),
            30..33 => self.segments(WRITE_ZEROES, 6),
            33 => {
                let kind = self.pick(&[GET_ID, GET_LIFETIME]);
                let len = self.pick(&[0, 1, 5, 6, 19, 20, 21, 64, 4096]);
                transfer(kind, 0, &[], len)
            }
            34 => {
                let kind = self.pick(&[2, 3, 5, 7, 9, 12, 14, 15, 0xdead, u32::MAX]);
                let (payload, len) = (self.pick(&[0, 16, 512]), self.pick(&[0, 7, 512]));
                transfer(kind, sector, &vec![0xff; payload], len)
            }
            35 => {
                // Not in sectors.
                let bytes = bytes + self.pick(&[1, 256, 511]);
                if self.random.below(2) == 0 {
                    transfer(IN, sector, &[], bytes)
                } else {
                    transfer(OUT, sector, &vec![0x11; bytes], 0)
                }
            }
            36 => {
                // Nothing, or more than the last sector.
                let kind = self.pick(&[IN, OUT]);
                let end = self.capacity;
                let (sector, len) = self.pick(&[(sector, 0), (end, 0), (end + 1, 0), (end - 1, 1024), (end, 512)]);
                if kind == IN { transfer(IN, sector, &[], len) } else { transfer(OUT, sector, &vec![0x22; len], 0) }
            }
            37 => {
                let sector = self.pick(&[u64::MAX, u64::MAX - 1, u64::MAX / 512, u64::MAX / 512 + 1, 1 << 55]);
                if self.random.below(2) == 0 {
                    transfer(IN, sector, &[], 1024)
                } else {
                    transfer(OUT, sector, &[0x33; 1024], 0)
                }
            }
            // Data in the direction that means nothing.
            38 => transfer(OUT, sector, &pattern(sector, count, self.random.next()), 512),
            _ => transfer(IN, sector, &[0x44; 100], bytes),
        }
    }

    /// A discard or zeroing of some segments; now and then of more than a request may have.
    fn segments(&mut self, kind: u32, too_many: u64) -> Request {
        let count = match self.random.below(10) {
            0 => too_many - self.random.below(3),
            1 => 0,
            _ => 1 + self.random.below(4),
        };
        let mut payload = Vec::new();
        for _ in 0..count {
            let (mut sector, sectors) = self.range();
            let mut sectors = u32::try_from(sectors).expect("small");
            let mut flags = if kind == WRITE_ZEROES { u32::try_from(self.random.below(2)).expect("a bit") } else { 0 };
            match self.random.below(24) {
                0 => flags = self.pick(&[1, 2, 0x8000_0000]),
                1 => sectors = self.pick(&[0, 1 << 22, u32::MAX]),
                2 => sector = self.pick(&[self.capacity, self.capacity - 1, u64::MAX]),
                _ => {}
            }
            payload.extend(sector.to_le_bytes());
            payload.extend(sectors.to_le_bytes());
            payload.extend(flags.to_le_bytes());
        }
        if self.random.below(12) == 0 {
            payload.extend([0; 7]);
        }
        let len = self.pick(&[0, 0, 0, 33]);
        transfer(kind, self.random.next(), &payload, len)
    }

    /// Place a request in memory, cut into buffers.
    fn shape(&mut self, request: &Request) -> Chain {
        let descriptors_max = if self.indirect { 600 } else { usize::from(self.size) };
        let most = match self.random.below(4) {
            0 => 3,
            1 | 2 => 12.min(descriptors_max),
            _ => descriptors_max,
        };
        // Half of them as drivers do it: header, data, status.
        let framed = self.random.below(2) == 0;
        let readable_cuts = self.cuts(request.readable.len(), if framed { 16 } else { 0 }, most / 2);
        let status_at = if framed { request.writable - 1 } else { 0 };
        let writable_cuts = self.cuts(request.writable, status_at, most - readable_cuts.len());
        let mut at = self.start(request.readable.len() + request.writable);
        let (mut content, mut buffers) = (Vec::new(), Vec::new());
        for cut in readable_cuts {
            at = self.step(at);
            buffers.push((at, len_of(&cut), false));
            content.push((at, request.readable[cut.clone()].to_vec()));
            at += cut.len() as u64;
        }
        for cut in writable_cuts {
            at = self.step(at);
            buffers.push((at, len_of(&cut), true));
            at += cut.len() as u64;
        }
        if self.random.below(6) == 0 && buffers.len() + 2 <= most {
            // Nothing, anywhere: neither read nor written.
            let first_writable = buffers.iter().position(|buffer| buffer.2).expect("a status");
            buffers.insert(first_writable, (self.pick(&[NOWHERE, 0, at]), 0, false));
            buffers.push((self.pick(&[NOWHERE, u64::MAX, at]), 0, true));
        }
        let mut chain = self.link(&buffers);
        chain.content = content;
        chain
    }

    /// Cut `len` bytes at `fixed`, if that is inside, and elsewhere, into at most `most` pieces (but two if `fixed`
    /// demands it).
    fn cuts(&mut self, len: usize, fixed: usize, most: usize) -> Vec<std::ops::Range<usize>> {
        let mut at = std::collections::BTreeSet::from([0, len]);
        if 0 < fixed && fixed < len {
            at.insert(fixed);
        }
        let wanted = 1 + usize::try_from(self.random.below(most.max(1) as u64)).expect("small");
        for _ in 0..wanted {
            if at.len() > most {
                break;
            }
            let place = usize::try_from(self.random.below(len as u64 + 1)).expect("small");
            at.insert(if self.random.below(2) == 0 { place / 512 * 512 } else { place });
        }
        let at: Vec<usize> = at.into_iter().collect();
        at.windows(2).map(|pair| pair[0]..pair[1]).collect()
    }

    /// Where the buffers begin: somewhere, or so that they cross from one region into the next.
    fn start(&mut self, len: usize) -> u64 {
        let near = BORDER - self.random.below(len as u64 + 64);
        let anywhere = self.random.below(0x10_0000);
        self.area + if self.random.below(3) == 0 { near } else { anywhere }
    }

    /// The place of the next buffer: right behind, a little further, or aligned.
    fn step(&mut self, at: u64) -> u64 {
        match self.random.below(4) {
            0 => at,
            1 => at + self.random.below(64),
            2 => at.next_multiple_of(512),
            _ => at.next_multiple_of(16),
        }
    }

    /// Write the buffers as a chain: in the ring's table, in one elsewhere, or in both.
    fn link(&mut self, buffers: &[Buffer]) -> Chain {
        let direct = if !self.indirect {
            buffers.len()
        } else if buffers.len() >= usize::from(self.size) || self.random.below(3) > 0 {
            usize::try_from(self.random.below(3)).expect("small").min(buffers.len() - 1)
        } else {
            buffers.len()
        };
        let (in_ring, in_table) = buffers.split_at(direct);
        let mut chain = Chain { writable: written(buffers), ..Chain::default() };
        let mut ring = in_ring.to_vec();
        if !in_table.is_empty() {
            let at = self.area + TABLES + self.random.below(0x1000);
            let entries = in_table.iter().zip(1_u16..).map(|(&(addr, len, write), next)| {
                let more = usize::from(next) < in_table.len();
                (addr, len, flags(more, write), if more { next } else { self.pick(&[0, 7, u16::MAX]) })
            });
            let entries: Vec<Raw> = entries.collect();
            ring.push((at, len_of(&(0..entries.len() * 16)), false));
            chain.table = Some((at, entries));
        }
        // Anywhere in the ring's table: an odd step goes through all of it.
        let first = self.random.below(u64::from(self.size));
        let step = self.random.below(u64::from(self.size)) | 1;
        let place = |i: usize| u16::try_from((first + i as u64 * step) % u64::from(self.size)).expect("below the size");
        chain.head = place(0);
        for (i, &(addr, len, write)) in ring.iter().enumerate() {
            let more = i + 1 < ring.len();
            let indirect = if !more && chain.table.is_some() { INDIRECT } else { 0 };
            let next = if more { place(i + 1) } else { 0 };
            chain.descriptors.push((place(i), (addr, len, flags(more, write) | indirect, next)));
        }
        chain
    }
}

impl Chains {
    /// A chain that no driver should send.
    fn wrong(&mut self) -> Chain {
        let kind = self.pick(&[IN, OUT, FLUSH]);
        let (sector, _) = self.range();
        let (header, body, status) = (self.area + 0x100, self.area + 0x1000, self.area + 0x200);
        let (asks, end) = ((header, 16, false), MEMORY_END);
        let answers = (status, 1, true);
        let data = (body, 512, kind != OUT);
        let buffers: &[Buffer] = match self.random.below(36) {
            0 => &[asks],
            1 => &[asks, (body, 512, false)],
            2 => &[asks, (status, 0, true)],
            3 => &[(header, 0, false)],
            4 => &[asks, (NOWHERE, 1, true)],
            5 => &[asks, (end, 1, true)],
            6 => &[answers, asks],
            7 => &[asks, (body, 512, true), (body + 512, 1, false), answers],
            8 => &[answers],
            9 => &[(header, 15, false), answers],
            10 => &[(NOWHERE, 16, false), answers],
            11 => &[(u64::MAX - 7, 16, false), answers],
            12 => &[(end - 8, 16, false), answers],
            13 => &[(header, 16, true), data, answers],
            14 => &[asks, (NOWHERE, 512, kind != OUT), answers],
            15 => &[asks, (end - 256, 512, kind != OUT), answers],
            16 => &[asks, (body, 1 << 31, kind != OUT), answers],
            17 => &[asks, data, (body, 0, true), (status, 0, false), answers],
            _ => return self.broken(kind, sector),
        };
        let mut chain = self.link(buffers);
        chain.content.push((header, header_of(kind, sector)));
        chain
    }

    /// A chain that does not hold together.
    fn broken(&mut self, kind: u32, sector: u64) -> Chain {
        let (header, status) = (self.area + 0x100, self.area + 0x200);
        let (table, end) = (self.area + TABLES, MEMORY_END);
        let (asks, answers) = ((header, 16, NEXT, 1), (status, 1, WRITE, 0));
        let to_table = (table, 32, INDIRECT, 0);
        let no_table = Vec::new();
        let (of_ring, of_both) = (4, 17);
        let (ring, entries): (Vec<Raw>, Vec<Raw>) =
            match self.random.below(if self.indirect { of_both } else { of_ring }) {
                0 => (vec![(header, 16, NEXT, 0)], no_table),
                1 => (vec![asks, (status, 1, NEXT | WRITE, 0)], no_table),
                2 => (vec![asks, (status, 1, NEXT | WRITE, 1)], no_table),
                3 => (vec![asks, (status, 1, NEXT | WRITE, self.size)], no_table),
                4 => (vec![(table, 0, INDIRECT, 0)], no_table),
                5 => (vec![(table, 17, INDIRECT, 0)], no_table),
                6 => (vec![asks, (table, 8, INDIRECT | WRITE, 0)], no_table),
                7 => (vec![asks, (table, 1 << 28, INDIRECT, 0)], no_table),
                8 => (vec![(NOWHERE, 32, INDIRECT, 0)], no_table),
                9 => (vec![asks, (end - 8, 32, INDIRECT, 0)], no_table),
                10 => (vec![(u64::MAX - 15, 32, INDIRECT, 0)], no_table),
                11 => (vec![to_table], vec![to_table, answers]),
                12 => (vec![to_table], vec![asks, (table, 32, INDIRECT, 0)]),
                13 => (vec![to_table], vec![asks, (header, 16, NEXT, 0)]),
                14 => (vec![to_table], vec![(header, 16, NEXT, 2), answers]),
                15 => {
                    // Good, though strange: an entry that is skipped, and a table that is called writable.
                    let entries = vec![(header, 16, NEXT, 2), (NOWHERE, 9, INDIRECT | NEXT, 9), answers];
                    (vec![(table, 48, INDIRECT | WRITE, 0)], entries)
                }
                _ => (vec![asks, (table, 16, INDIRECT, 0)], vec![answers]),
            };
        Chain {
            content: vec![(header, header_of(kind, sector))],
            descriptors: (0..).zip(ring).collect(),
            table: (!entries.is_empty()).then_some((table, entries)),
            head: 0,
            writable: vec![(status, 1)],
        }
    }
}

fn header_of(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

fn transfer(kind: u32, sector: u64, payload: &[u8], writable: usize) -> Request {
    Request { readable: [&header_of(kind, sector), payload].concat(), writable: writable + 1 }
}

fn flags(more: bool, write: bool) -> u16 {
    (if more { NEXT } else { 0 }) | (if write { WRITE } else { 0 })
}

fn len_of(range: &std::ops::Range<usize>) -> u32 {
    u32::try_from(range.len()).expect("small")
}

fn written(buffers: &[Buffer]) -> Vec<(u64, u32)> {
    buffers.iter().filter(|buffer| buffer.2).map(|&(addr, len, _)| (addr, len)).collect()
}
