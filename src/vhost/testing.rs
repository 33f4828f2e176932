//! For tests: a guest driver that writes rings and chains into memory of our own, and a worker on a disk in
//! memory whose every step the test decides. Also compiled into `tests/hostile_chains.rs`.

use std::cell::Cell;
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::device::memory::MemoryDisks;
use crate::engine::message::{Outcome, ToHealer, ToShard, Why};
use crate::engine::shard::Shard;
use crate::engine::view::{Geometry, Mode, PrimaryState, Progress, View, Written};
use crate::runtime::eventlog::EventLog;
use crate::runtime::mailbox::{Inbox, Outbox, mailbox};
use crate::runtime::worker::{Clock, DiskInfo, WorkerPort};
use crate::sync::atomic::AtomicU64;
use crate::sync::mpsc::{Receiver, channel};
use crate::vhost::device::BlkDevice;
use crate::vhost::memory::MemoryMap;
use crate::vhost::ring::split::SplitRing;
use crate::vhost::ring::{RingAddresses, RingFormat};
use crate::vhost::status::WorkerStatus;
use crate::vhost::worker::{DataPlane, QueueKick, StartQueue};
use crate::volume::map::Map;

// From both crates that this file is compiled into.
#[path = "testing/kill.rs"]
pub(crate) mod kill;
#[path = "testing/packed.rs"]
pub(crate) mod packed;

use self::packed::{PackedDriver, PackedParts};

/// Guest memory for buffers, above the rings.
pub(crate) const DATA: u64 = 0x10_0000;
const REGION: u64 = 0x20_0000;
const DESCRIPTORS: u64 = 0;
const AVAIL: u64 = 0x8_0000;
const USED: u64 = 0xa_0000;

/// A buffer of a chain: address, length, whether the device writes it.
pub(crate) type Buffer = (u64, u32, bool);

/// A buffer the device reads.
pub(crate) fn readable(addr: u64, len: u32) -> Buffer {
    (addr, len, false)
}

/// A buffer the device writes.
pub(crate) fn writable(addr: u64, len: u32) -> Buffer {
    (addr, len, true)
}

/// Two adjacent regions of guest memory, in one file, and the driver's side of one ring.
pub(crate) struct Guest {
    pub(crate) memory: Arc<GuestMemoryMmap>,
    pub(crate) file: Arc<File>,
    pub(crate) size: u16,
    avail: Cell<u16>,
    used: Cell<u16>,
}

impl Guest {
    pub(crate) fn new(size: u16) -> Guest {
        let len = usize::try_from(REGION).unwrap();
        if cfg!(miri) {
            // An interpreter maps no files, and its memory may begin anywhere; rings do so at multiples of 16.
            let file = Arc::new(File::open("/dev/null").unwrap());
            let ranges = [(GuestAddress(0), len), (GuestAddress(REGION), len)];
            let any = std::iter::repeat_with(|| GuestMemoryMmap::from_ranges(&ranges).unwrap());
            let mut fit = any.filter(|memory| memory.get_host_address(GuestAddress(0)).unwrap().addr() % 16 == 0);
            let memory = Arc::new(fit.next().unwrap());
            return Guest { memory, file, size, avail: Cell::new(0), used: Cell::new(0) };
        }
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.set_len(2 * REGION).unwrap();
        let at = |start| (GuestAddress(start), len, Some(FileOffset::from_arc(file.clone(), start)));
        let memory = Arc::new(GuestMemoryMmap::from_ranges_with_files([at(0), at(REGION)]).unwrap());
        Guest { memory, file, size, avail: Cell::new(0), used: Cell::new(0) }
    }

    pub(crate) fn first_region_end(&self) -> u64 {
        REGION
    }

    pub(crate) fn map(&self) -> Arc<MemoryMap> {
        Arc::new(MemoryMap::of_guest_memory(&self.memory))
    }

    pub(crate) fn addresses(&self) -> RingAddresses {
        RingAddresses { descriptors: DESCRIPTORS, avail: AVAIL, used: USED, log: None }
    }

    /// A driver with a packed ring at the place of the split one.
    pub(crate) fn packed(&self) -> PackedDriver {
        let parts = PackedParts { descriptors: DESCRIPTORS, driver: AVAIL, device: USED };
        PackedDriver::new(self.memory.clone(), parts, self.size)
    }

    pub(crate) fn ring(&self) -> SplitRing {
        self.ring_with(false)
    }

    pub(crate) fn ring_with(&self, event_idx: bool) -> SplitRing {
        SplitRing::new(&self.map(), self.addresses(), self.size, self.avail.get(), event_idx).unwrap()
    }

    pub(crate) fn descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.descriptor_at(DESCRIPTORS + 16 * u64::from(index), addr, len, flags, next);
    }

    pub(crate) fn indirect(&self, table: u64, entries: &[(u64, u32, u16, u16)]) {
        for (i, &(addr, len, flags, next)) in entries.iter().enumerate() {
            self.descriptor_at(table + 16 * i as u64, addr, len, flags, next);
        }
    }

    fn descriptor_at(&self, at: u64, addr: u64, len: u32, flags: u16, next: u16) {
        self.memory.write_obj(addr, GuestAddress(at)).unwrap();
        self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    pub(crate) fn write(&self, addr: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    pub(crate) fn read<const N: usize>(&self, addr: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    /// Make a chain available.
    pub(crate) fn offer(&self, head: u16) {
        let element = u64::from(self.avail.get() % self.size);
        self.memory.write_obj(head, GuestAddress(AVAIL + 4 + 2 * element)).unwrap();
        self.avail.set(self.avail.get().wrapping_add(1));
        self.set_avail_idx(self.avail.get());
    }

    /// Begin anew at that entry, as a driver does after a reset.
    pub(crate) fn restart_at(&self, idx: u16) {
        self.avail.set(idx);
        self.used.set(idx);
        self.set_avail_idx(idx);
    }

    pub(crate) fn set_avail_idx(&self, idx: u16) {
        self.memory.write_obj(idx, GuestAddress(AVAIL + 2)).unwrap();
    }

    pub(crate) fn set_avail_flags(&self, flags: u16) {
        self.memory.write_obj(flags, GuestAddress(AVAIL)).unwrap();
    }

    pub(crate) fn set_used_event(&self, event: u16) {
        self.memory.write_obj(event, GuestAddress(AVAIL + 4 + 2 * u64::from(self.size))).unwrap();
    }

    pub(crate) fn avail_event(&self) -> u16 {
        self.memory.read_obj(GuestAddress(USED + 4 + 8 * u64::from(self.size))).unwrap()
    }

    pub(crate) fn avail_idx(&self) -> u16 {
        self.avail.get()
    }

    pub(crate) fn used_idx(&self) -> u16 {
        self.memory.read_obj(GuestAddress(USED + 2)).unwrap()
    }

    pub(crate) fn used_flags(&self) -> u16 {
        self.memory.read_obj(GuestAddress(USED)).unwrap()
    }

    /// The next used entry, if there is one: head and length.
    pub(crate) fn take_used(&self) -> Option<(u32, u32)> {
        if self.used_idx() == self.used.get() {
            return None;
        }
        let at = USED + 4 + 8 * u64::from(self.used.get() % self.size);
        self.used.set(self.used.get().wrapping_add(1));
        Some((self.memory.read_obj(GuestAddress(at)).unwrap(), self.memory.read_obj(GuestAddress(at + 4)).unwrap()))
    }
}

/// Write a chain of these buffers from descriptor 0 on; its head.
pub(crate) fn chain_of(guest: &Guest, buffers: &[Buffer]) -> u16 {
    chain_from(guest, 0, buffers)
}

/// Write a chain of these buffers from descriptor `first` on; its head.
pub(crate) fn chain_from(guest: &Guest, first: u16, buffers: &[Buffer]) -> u16 {
    for (i, &(addr, len, write)) in buffers.iter().enumerate() {
        let index = first + u16::try_from(i).unwrap();
        let more = i + 1 < buffers.len();
        let flags = u16::from(more) | if write { 2 } else { 0 };
        guest.descriptor(index, addr, len, flags, if more { index + 1 } else { 0 });
    }
    first
}

/// Sectors of the test disk.
pub(crate) const CAPACITY: u64 = 4096;

fn device() -> BlkDevice {
    let serial = *b"bench\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let capacity = Arc::new(AtomicU64::new(CAPACITY));
    BlkDevice::new(Arc::new(DiskInfo { capacity, logical_block_size: 512, read_only: false, serial }), 64)
}

/// A worker's place on a disk in memory, and the healer's ends of its mailboxes.
fn port(index: usize, device: &BlkDevice, disks: &MemoryDisks) -> (WorkerPort, Outbox<ToShard>, Inbox<ToHealer>) {
    let (to_shard, inbox) = mailbox().unwrap();
    let (healer, from_shard) = mailbox().unwrap();
    let geometry = Geometry { capacity: CAPACITY, logical_block: 512, slots_start: 0, slots: 0 };
    let mode = Mode { poisoned: false, primary: PrimaryState::Up, spare_up: true, read_only: false };
    let view = Arc::new(View {
        geometry,
        map: Map::new(geometry.blocks()),
        mode,
        dense: Arc::default(),
        written: Arc::new(Written::new(CAPACITY)),
    });
    let disks = disks.clone();
    let port = WorkerPort {
        shard: Shard::new(index, view, Progress::new(CAPACITY)),
        reactor: Box::new(move || Ok(Box::new(disks.queue()))),
        inbox,
        healer,
        clock: Clock::start(),
        disk: Arc::new(device.disk().clone()),
        log: Arc::new(EventLog::new("a disk in memory".into(), 0.0)),
        polling: Duration::ZERO,
        counters: Arc::default(),
    };
    (port, to_shard, from_shard)
}

/// A worker on a disk in memory, with one guest. The healer's part is played by [`Bench::step`]: durability is
/// granted, everything else refused.
pub(crate) struct Bench {
    pub(crate) guest: Guest,
    pub(crate) plane: DataPlane,
    /// Operations end at once, or (after `manual`) when the test says.
    pub(crate) disks: MemoryDisks,
    pub(crate) device: BlkDevice,
    pub(crate) to_shard: Outbox<ToShard>,
    from_shard: Inbox<ToHealer>,
    base: u32,
    format: RingFormat,
    /// The driver's side, where the ring is packed.
    pub(crate) packed: Option<PackedDriver>,
}

impl Bench {
    /// A worker with guest memory and no queue.
    pub(crate) fn new(size: u16) -> Bench {
        let guest = Guest::new(size);
        let device = device();
        device.negotiated(device.offered_features());
        let disks = MemoryDisks::new(&[CAPACITY * 512]);
        let (port, to_shard, from_shard) = port(0, &device, &disks);
        let worker = port.open().unwrap();
        let mut plane = DataPlane::new(worker, device.settings(), Arc::new(WorkerStatus::new()));
        let (done, _) = channel();
        plane.set_memory(&guest.map(), Default::default(), done);
        Bench {
            guest,
            plane,
            disks,
            device,
            to_shard,
            from_shard,
            base: 0,
            format: RingFormat::default(),
            packed: None,
        }
    }

    /// A device and places for its workers. Nobody plays the healer: reads are served, flushes are not.
    pub(crate) fn ports(count: usize) -> (Arc<BlkDevice>, Vec<WorkerPort>) {
        let device = device();
        let disks = MemoryDisks::new(&[CAPACITY * 512]);
        let ports = (0..count).map(|index| port(index, &device, &disks).0).collect();
        (Arc::new(device), ports)
    }

    /// As [`Bench::new`], for a packed ring.
    pub(crate) fn packed(size: u16) -> Bench {
        let mut bench = Bench::new(size);
        bench.format.packed = true;
        bench.packed = Some(bench.guest.packed());
        bench
    }

    /// Start queue 0 where it stopped.
    pub(crate) fn start(&mut self) {
        self.start_with(None);
    }

    pub(crate) fn start_with(&mut self, inflight: Option<Arc<crate::vhost::inflight::InflightRegion>>) {
        self.plane.start(StartQueue {
            index: 0,
            addresses: self.guest.addresses(),
            size: self.guest.size,
            base: self.base,
            format: self.format,
            inflight,
            kick: QueueKick::Caller,
            call: None,
            err: None,
            enabled: true,
        });
    }

    /// Kick and give everything the chance to happen. Bounded: a worker that has nothing to do is quiet.
    pub(crate) fn step(&mut self) {
        self.plane.kick(0);
        for _ in 0..8 {
            self.plane.turn(false);
            let mut messages = Vec::new();
            self.from_shard.drain(&mut messages);
            for message in messages {
                if let ToHealer::Handed(handed) = message {
                    let outcome = if handed.why == Why::Durability { Outcome::Durable } else { Outcome::Failed };
                    let (request, cursor) = (handed.request, handed.cursor);
                    self.to_shard.send(ToShard::Handled { request, cursor, outcome });
                }
            }
        }
    }

    /// Begin to stop queue 0; the place where it goes on comes when it has stopped.
    pub(crate) fn begin_stop(&mut self, how: crate::vhost::worker::StopHow) -> Receiver<u32> {
        let (reply, stopped) = channel();
        self.plane.stop(0, how, reply);
        self.step();
        stopped
    }

    /// Stop queue 0, whose requests have all ended; where it goes on.
    pub(crate) fn stop(&mut self, how: crate::vhost::worker::StopHow) -> Option<u32> {
        let base = self.begin_stop(how).try_recv().ok()?;
        self.base = base;
        Some(base)
    }

    /// Where queue 0 goes on when it is started again.
    pub(crate) fn set_base(&mut self, base: u32) {
        self.base = base;
    }
}
