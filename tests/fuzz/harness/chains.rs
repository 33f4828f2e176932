//! A guest that writes whatever it likes into its memory and rings, against a whole worker: queues, shard, healer
//! and two disks in memory with bad sectors, all in one thread.
//!
//! Whatever the guest does: nothing panics or goes on for ever; nothing is written but the buffers that its chains
//! name for that, and used rings; each chain that was taken comes back exactly once, with one status and a length
//! within its buffers; nothing stays under way; and an honest request is served afterwards.

use vhost_remap::device::{DeviceIndex, Errno};
use vhost_remap::engine::healer::Order;
use vhost_remap::units::{Sector, SectorRange};
use vhost_remap::vhost::worker::StopHow;

use super::guest::{AREAS, QUEUES, UNTOUCHED, bytes_of};
use super::packed::{START, plus};
use super::program::Program;
use super::volume::CAPACITY;
use super::world::{Bad, Queue, World};

/// Operations of one input.
const OPS_MAX: usize = 200;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const KINDS: [u32; 10] = [0, 1, 0, 1, 4, 8, 11, 13, 99, u32::MAX];
const ERRNOS: [i32; 8] =
    [libc::EIO, libc::ENODATA, libc::ENODEV, libc::ENOSPC, libc::EREMOTEIO, libc::EINVAL, libc::ETIMEDOUT, libc::EROFS];

impl World {
    fn obey(&mut self, program: &mut Program<'_>) {
        match program.u8() % 16 {
            0 => {
                let (queue, index) = (program.below(QUEUES), program.u8());
                let words = (address(program), length(program), flags(program), program.u16() & 0x1ff);
                let index = u16::from(index) % self.queues[queue].ring.size;
                self.write_descriptor(queue, index, words);
            }
            1 | 2 => self.request(program),
            3 => {
                let (at, len) = (address(program), program.below(17));
                let bytes = program.bytes(len);
                // The device keeps its own count of what is used, and asks for kicks where it likes.
                // What it reads of a packed ring it reads but once.
                let split = self.queues.iter().filter(|queue| !queue.packed);
                let parts: Vec<_> = split.flat_map(|queue| queue.ring.device_parts(false)).collect();
                self.confused |= self.guest.write(at, bytes, &parts);
            }
            4 => {
                let (index, head) = (program.below(QUEUES), program.u16());
                self.publish(index, head);
            }
            5 => {
                let (index, idx) = (program.below(QUEUES), program.u16());
                let queue = &mut self.queues[index];
                match queue.packed {
                    true => queue.driver = (idx & 0x8000) | ((idx & 0x7fff) % queue.ring.size),
                    false => self.guest.set_avail_index(queue.ring, idx),
                }
            }
            6 | 7 => {
                let how = program.u8();
                for _ in 0..=how & 7 {
                    self.turn();
                    self.perform_some(usize::from(how >> 3));
                }
            }
            8 => {
                let (index, errno) = (usize::from(program.u8()), program.pick(&ERRNOS));
                let len = self.disks.pending_len();
                if len > 0 {
                    self.perform(index % len, (index < 224).then_some(Errno(errno)));
                }
            }
            9 => self.break_disks(program),
            10 => {
                let (index, how) =
                    (program.below(QUEUES), program.pick(&[StopHow::Drain, StopHow::Leave, StopHow::Discard]));
                self.stop(index, how);
            }
            11 => {
                let (index, how) = (program.below(QUEUES), program.u8());
                let queue = &self.queues[index];
                let base = match how {
                    0..192 => u32::from(queue.next_avail) | u32::from(queue.used) << 16,
                    192..224 => u32::from(program.u16()) * 0x1_0001,
                    _ => u32::from(program.u16()) | u32::from(queue.used) << 16,
                };
                self.start(index, base, how & 1 != 0);
            }
            12 => self.change_memory(program.below(3)),
            13 => {
                self.now = self
                    .now
                    .plus_ns([1, 1_000_000, 20_000_000, 300_000_000, 2_000_000_000, 6_000_000_000][program.below(6)])
            }
            14 => {
                let range = SectorRange {
                    start: Sector(u64::from(program.u16()) % 1100),
                    count: u64::from(program.u8() % 20) + 1,
                };
                let order = [
                    Order::Clear,
                    Order::Save,
                    Order::Remap(range),
                    Order::Release(range),
                    Order::Status,
                    Order::Settle,
                ];
                self.keeper.order(self.now, order[program.below(6)].clone());
            }
            _ => self.request_by_table(program),
        }
    }

    /// Address, length, flags and, unless the ring is packed, where the chain goes on; there it is the buffer id.
    fn write_descriptor(&mut self, queue: usize, index: u16, words: (u64, u32, u16, u16)) {
        let Queue { ring, packed, .. } = self.queues[queue];
        self.guest.write_ring_descriptor(ring, index, in_order(words, packed));
    }

    fn publish(&mut self, queue: usize, head: u16) {
        let queue = &mut self.queues[queue];
        match queue.packed {
            true => self.guest.publish_packed(queue),
            false => self.guest.publish(queue.ring, head),
        }
    }

    /// A request as a driver makes it, or with one thing wrong; it is offered at once.
    fn request(&mut self, program: &mut Program<'_>) {
        let queue = program.below(QUEUES);
        let chain = self.chain(program);
        let ring = self.queues[queue].ring;
        let first = u16::from(program.u8()) % ring.size;
        self.offer(queue, first, &chain);
    }

    fn offer(&mut self, queue: usize, first: u16, chain: &[(u64, u32, u16)]) {
        if self.queues[queue].packed {
            return self.guest.offer_packed(&mut self.queues[queue], first, chain);
        }
        let ring = self.queues[queue].ring;
        let count = u16::try_from(chain.len()).expect("a few");
        for (at, (addr, len, flags)) in (first..).zip(chain) {
            let index = at % ring.size;
            let flags = if at + 1 < first + count { flags | NEXT } else { *flags };
            self.write_descriptor(queue, index, (*addr, *len, flags, (index + 1) % ring.size));
        }
        self.guest.publish(ring, first);
    }

    /// The same with its descriptors in a table of their own.
    fn request_by_table(&mut self, program: &mut Program<'_>) {
        let queue = program.below(QUEUES);
        let chain = self.chain(program);
        let Queue { ring, packed, .. } = self.queues[queue];
        let (table, first) = (0x8000 + 0x200 * u64::from(program.u8() % 16), u16::from(program.u8()) % ring.size);
        let count = u16::try_from(chain.len()).expect("a few");
        for (index, (addr, len, flags)) in (0..).zip(chain) {
            let flags = if index + 1 < count { flags | NEXT } else { flags };
            let words = in_order((addr, len, flags, index + 1), packed);
            self.guest.write(table + 16 * u64::from(index), &bytes_of(words), &[]);
        }
        let len = if program.u8() < 224 { u32::from(count) * 16 } else { program.u32() };
        self.offer(queue, first, &[(table, len, INDIRECT)]);
    }

    /// Header, data in one or two pieces, status, as (address, length, flags).
    fn chain(&mut self, program: &mut Program<'_>) -> Vec<(u64, u32, u16)> {
        let area = AREAS + 0x800 * u64::from(program.u8() % 16);
        let (kind, sector, count) = (program.pick(&KINDS), program.u16() % 1032, u32::from(program.u8() % 12));
        let header = [kind.to_le_bytes(), [0; 4]].concat();
        self.guest.write(area, &[&header[..], &u64::from(sector).to_le_bytes()].concat(), &[]);
        let len = match kind {
            8 => 20,
            4 => 0,
            11 | 13 => {
                let segment = [u64::from(sector).to_le_bytes(), u64::from(count * 3).to_le_bytes()].concat();
                self.guest.write(area + 0x20, &segment, &[]);
                16
            }
            _ => count * 512,
        };
        let data = match kind {
            11 | 13 => area + 0x20,
            _ if program.u8() < 160 => 0x8000_0000 + 0x200 * u64::from(program.u8() % 32),
            _ => address(program),
        };
        let write = if matches!(kind, 0 | 8) { WRITE } else { 0 };
        let cut = u32::from(program.u16()).min(len);
        let mut chain = vec![(area, 16, 0), (data, cut, write), (data.wrapping_add(u64::from(cut)), len - cut, write)];
        chain.push((area + 0x18, 1, WRITE));
        chain.retain(|(_, len, _)| *len > 0);
        // Three in four are as a driver makes them.
        let twist = program.u8();
        if twist >= 192 {
            let at = program.below(chain.len());
            match twist % 6 {
                0 => chain[at].0 = address(program),
                1 => chain[at].1 = length(program),
                2 => chain[at].2 ^= 1 << (program.u8() % 4),
                3 => _ = chain.remove(at),
                4 => chain.push(chain[at]),
                _ => chain.insert(at, (address(program), length(program), flags(program))),
            }
        }
        self.guest.write(area + 0x18, &[UNTOUCHED], &[]);
        if chain.is_empty() { vec![(area, 16, 0)] } else { chain }
    }

    fn break_disks(&mut self, program: &mut Program<'_>) {
        let device = program.pick(&[DeviceIndex::PRIMARY, DeviceIndex::SPARE]);
        match program.u8() {
            how @ 0..160 => {
                let start = u64::from(program.u16()) % if device == DeviceIndex::PRIMARY { CAPACITY } else { 6400 };
                let sectors = start..start + u64::from(program.u8()) + 1;
                self.bad.push(Bad { device, sectors, reads: how & 1 != 0, writes: how & 2 != 0 });
            }
            160..192 => self.bad.clear(),
            192..224 => self.bad_flushes[usize::from(device.0)] = program.u8() % 3,
            how => self.disks.set_gone(device, how & 1 != 0),
        }
    }
    /// The next driver starts a queue and reads a sector.
    fn honest(&mut self) {
        for region in 0..3 {
            if !self.guest.present[region] {
                self.change_memory(region);
            }
        }
        self.guest.reset();
        self.confused = false;
        self.start(0, 0, false);
        let program = [0, 0, 1, 0, 1, 0];
        let chain = self.chain(&mut Program::new(&program));
        self.offer(0, 0, &chain);
        self.settle();
        let Queue { ring, packed, used, .. } = self.queues[0];
        let used = if packed { used } else { self.guest.used_index(ring) };
        let expected = if packed { plus(START, 3, ring.size) } else { 1 };
        assert_eq!(used, expected, "the next driver is served");
    }
}

/// The words of a descriptor as they lie in memory.
fn in_order((addr, len, flags, next): (u64, u32, u16, u16), packed: bool) -> (u64, u32, u16, u16) {
    if packed { (addr, len, next, flags) } else { (addr, len, flags, next) }
}

/// Somewhere in memory, at an edge of it, or nowhere.
fn address(program: &mut Program<'_>) -> u64 {
    match program.u8() % 16 {
        0..7 => AREAS + u64::from(program.u8() % 16) * 0x800 + u64::from(program.u8()),
        7..9 => 0x8000_0000 + u64::from(program.u16()) % 0x8000,
        9 => u64::from(program.u16()),
        10 => 0x1_0000 - u64::from(program.u8()),
        11 => 0x2_0000 - u64::from(program.u8()),
        12 => 0x8000_8000 - u64::from(program.u8()),
        13 => program.u64(),
        14 => u64::MAX - u64::from(program.u8()),
        _ => 0x4000_0000,
    }
}

fn length(program: &mut Program<'_>) -> u32 {
    match program.u8() % 8 {
        0..3 => u32::from(program.u8()) * 512,
        3 => u32::from(program.u8()),
        4 => u32::from(program.u16()),
        5 => u32::MAX - u32::from(program.u8()),
        6 => program.pick(&[0, 1, 15, 16, 17, 511, 512, 513, 4096]),
        _ => program.u32(),
    }
}

fn flags(program: &mut Program<'_>) -> u16 {
    let flags = program.u8();
    if flags < 240 { u16::from(flags & 7) } else { program.u16() }
}

/// Do what the bytes say; the first says how the volume and its queues are set up.
pub(crate) fn chains(data: &[u8]) {
    let mut program = Program::new(data);
    let mut world = World::new(program.u8());
    for _ in 0..OPS_MAX {
        if program.is_done() {
            break;
        }
        world.obey(&mut program);
    }
    world.finish();
    world.honest();
}
