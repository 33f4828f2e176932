//! The worker, its healer and disks, and the guest's view of them: what is taken, what comes back, what may be
//! written meanwhile.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use vhost_remap::device::memory::MemoryDisks;
use vhost_remap::device::{DeviceIndex, Errno, OpKind, Wait};
use vhost_remap::engine::healer::{OnLoss, Policy};
use vhost_remap::units::{Sector, Time};
use vhost_remap::vhost::device::BlkDevice;
use vhost_remap::vhost::memory::{MemoryMap, RegionBits};
use vhost_remap::vhost::ring::RingFormat;
use vhost_remap::vhost::status::WorkerStatus;
use vhost_remap::vhost::worker::{DataPlane, QueueKick, StartQueue, StopHow};

use super::guest::{Guest, Offered, QUEUES, RING_SPAN, Ring};
use super::packed;
use super::volume::{self, Keeper};

/// Turns until everything has ended: the healer's longest timers end within a few dozen.
const TURNS_MAX: usize = 20_000;

/// A queue as the guest knows it.
#[derive(Default)]
pub(super) struct Queue {
    pub(super) ring: Ring,
    pub(super) started: bool,
    /// Where it goes on comes when it has stopped.
    pub(super) stopping: Option<(StopHow, Receiver<u32>)>,
    /// The driver broke its ring.
    pub(super) broken: bool,
    pub(super) packed: bool,
    /// The next avail entry the device takes, or the place of the next chain.
    pub(super) next_avail: u16,
    /// Used entries seen, or the place of the next one.
    pub(super) used: u16,
    /// The place where the driver writes its next chain into a packed ring.
    pub(super) driver: u16,
    /// Taken and not given back.
    pub(super) out: Vec<Offered>,
}

/// Sectors of a device that fail.
pub(super) struct Bad {
    pub(super) device: DeviceIndex,
    pub(super) sectors: std::ops::Range<u64>,
    pub(super) reads: bool,
    pub(super) writes: bool,
}

/// Memory that is being removed.
struct Removal {
    region: usize,
    /// The changes of memory between which it was there: chains taken then may use it, older and newer ones use
    /// another mapping of the same region.
    lifetime: std::ops::Range<usize>,
    done: Receiver<()>,
}

pub(super) struct World {
    pub(super) guest: Guest,
    pub(super) plane: DataPlane,
    pub(super) keeper: Keeper,
    pub(super) disks: MemoryDisks,
    pub(super) queues: [Queue; QUEUES],
    pub(super) map: MemoryMap,
    removals: Vec<Removal>,
    pub(super) bad: Vec<Bad>,
    pub(super) bad_flushes: [u8; 2],
    pub(super) now: Time,
    /// A device-writable buffer lies over rings or tables, or the driver changed what the device keeps there: what
    /// the device sees is no longer what was read here, and only the end counts.
    pub(super) confused: bool,
}

impl World {
    pub(super) fn new(first: u8) -> World {
        let disks = volume::disks();
        let on_loss = if first & 1 == 0 { OnLoss::Fail } else { OnLoss::Hold(3) };
        let policy = Policy { primary_gone: on_loss, spare_full: on_loss, passthrough: false };
        let (keeper, ports) = volume::open(&disks, policy, 1);
        disks.manual(true);
        let port = ports.into_iter().next().expect("one worker");
        let device = BlkDevice::new(port.disk.clone(), 2);
        device.negotiated(device.offered_features() & if first & 2 == 0 { u64::MAX } else { !(1 << 9) });
        let worker = port.open().expect("descriptors are left");
        let plane = DataPlane::new(worker, device.settings(), Arc::new(WorkerStatus::new()));
        let guest = Guest::new();
        let map = guest.map();
        let mut world = World {
            guest,
            plane,
            keeper,
            disks,
            queues: Default::default(),
            map,
            removals: Vec::new(),
            bad: Vec::new(),
            bad_flushes: [0; 2],
            now: Time(0),
            confused: false,
        };
        world.use_memory(RegionBits::default());
        for (index, size) in [8, [4, 16, 64, 256][usize::from(first >> 6)]].into_iter().enumerate() {
            let ring = Ring::at(u64::try_from(index).expect("small") * RING_SPAN, size);
            (world.queues[index].ring, world.queues[index].packed) = (ring, first & 0x10 != 0);
            world.start(index, 0, first & 4 != 0);
        }
        world
    }

    fn use_memory(&mut self, removed: RegionBits) -> Receiver<()> {
        let (done, ended) = channel();
        self.plane.set_memory(&self.map, removed, done);
        ended
    }

    pub(super) fn start(&mut self, index: usize, base: u32, event_idx: bool) {
        let queue = &mut self.queues[index];
        if queue.started {
            return;
        }
        // A ring that is not in memory is refused; this one is when its region is there.
        queue.started = self.guest.has_rings();
        queue.broken = false;
        if queue.packed {
            let places = self.guest.packed_base(queue.ring, base);
            queue.started &= places.is_some();
            (queue.next_avail, queue.used) = places.unwrap_or((packed::START, packed::START));
            queue.driver = queue.next_avail;
        } else {
            queue.next_avail = u16::try_from(base & 0xffff).expect("masked");
            queue.used = self.guest.used_index(queue.ring);
        }
        self.plane.start(StartQueue {
            index: u16::try_from(index).expect("two"),
            addresses: self.guest.addresses(queue.ring),
            size: queue.ring.size,
            base,
            format: RingFormat { packed: queue.packed, event_idx },
            inflight: None,
            kick: QueueKick::Caller,
            call: None,
            err: None,
            enabled: true,
        });
    }

    pub(super) fn stop(&mut self, index: usize, how: StopHow) {
        let queue = &mut self.queues[index];
        if queue.started && queue.stopping.is_none() {
            let (reply, stopped) = channel();
            queue.stopping = Some((how, stopped));
            self.plane.stop(u16::try_from(index).expect("two"), how, reply);
        }
    }

    /// What the device takes in the turn that comes, as the spec has it.
    fn take(&mut self) {
        let mapped = self.guest.has_rings();
        for queue in self.queues.iter_mut() {
            let takes = queue.started && !queue.broken && queue.stopping.is_none() && mapped;
            if queue.started && queue.packed {
                self.confused |= takes && self.guest.take_packed(queue);
                // Also where nothing is taken any more: the driver writes there all the same.
                self.confused |= self.guest.looks_used(queue);
            }
            if !takes || queue.packed {
                continue;
            }
            let count = self.guest.avail_index(queue.ring).wrapping_sub(queue.next_avail);
            if count > queue.ring.size {
                queue.broken = true;
                continue;
            }
            let held = queue.out.len();
            for _ in 0..count {
                let head = self.guest.avail_entry(queue.ring, queue.next_avail);
                let taken = queue.out.iter().position(|offered| offered.head == head);
                // A chain that is no request comes back at once, and may then be offered again in the same batch.
                self.confused |= taken.is_some_and(|at| at >= held);
                if head >= queue.ring.size || taken.is_some() {
                    queue.broken = true;
                    break;
                }
                let offered = self.guest.walk(queue.ring, head);
                self.confused |= offered.over_rings();
                queue.out.push(offered);
                queue.next_avail = queue.next_avail.wrapping_add(1);
            }
        }
    }

    /// A round of the worker and the healer; the guest kicks both queues before.
    pub(super) fn turn(&mut self) {
        self.take();
        self.plane.kick(0);
        self.plane.kick(1);
        self.plane.turn(false);
        self.keeper.turn(self.now, Wait::No);
        self.see();
    }

    /// What the device did to guest memory since the last look.
    fn see(&mut self) {
        let started = self.queues.iter().filter(|queue| queue.started);
        let rings: Vec<_> = started.flat_map(|queue| queue.ring.device_parts(queue.packed)).collect();
        let writable = self.queues.iter().flat_map(|queue| &queue.out).flat_map(|offered| offered.writable.clone());
        let writable: Vec<_> = writable.chain(rings).collect();
        let stray = self.guest.look(&writable);
        assert!(self.confused || stray.is_none(), "the device wrote to {:#x}", stray.unwrap_or(0));
        let mut back = Vec::new();
        for queue in self.queues.iter_mut().filter(|queue| queue.started) {
            see_used(&self.guest, queue, self.confused, &mut back);
        }
        self.see_statuses(&back);
        for queue in &mut self.queues {
            see_stop(queue, self.confused);
        }
        for removal in std::mem::take(&mut self.removals) {
            if removal.done.try_recv().is_err() {
                self.removals.push(removal);
                continue;
            }
            let left = self.queues.iter().flat_map(|queue| &queue.out);
            let uses =
                left.filter(|offered| offered.regions[removal.region] && removal.lifetime.contains(&offered.before));
            assert!(self.confused || uses.count() == 0, "region {} is gone and was in use", removal.region);
        }
        let out: usize = self.queues.iter().map(|queue| queue.out.len()).sum();
        assert!(self.confused || out == self.plane.in_flight(), "{out} chains, {} under way", self.plane.in_flight());
    }

    /// The status of each chain that came back is one there is.
    fn see_statuses(&mut self, back: &[(Offered, u32)]) {
        let alone = |offered: &&Offered| {
            // Another buffer over the status, of this chain or another, may leave anything there.
            let out = self.queues.iter().flat_map(|queue| &queue.out);
            !out.chain(back.iter().map(|(other, _)| other)).any(|other| other.covers_status_of(offered))
        };
        let statuses: Vec<usize> = back
            .iter()
            .filter(|(_, len)| *len > 0)
            .map(|(offered, _)| offered)
            .filter(alone)
            .filter_map(|offered| offered.status)
            .collect();
        for status in statuses {
            let value = self.guest.byte(status);
            assert!(value <= 2, "a chain came back with status {value:#x}");
            // What is written there from now on was written twice.
            self.guest.forget_status(status);
        }
    }

    /// Perform the operation at `index` of those submitted, as the disks are.
    pub(super) fn perform(&mut self, index: usize, errno: Option<Errno>) {
        let op = self.disks.pending(index);
        let (first, end) = (op.offset / 512, (op.offset + op.len).div_ceil(512));
        let hit = |bad: &&Bad, sector: u64| {
            bad.device == op.device
                && bad.sectors.contains(&sector)
                && if op.kind == OpKind::Read { bad.reads } else { bad.writes }
        };
        let flushes = &mut self.bad_flushes[usize::from(op.device.0)];
        let mut failed = errno;
        if op.kind == OpKind::Flush && *flushes > 0 {
            *flushes -= 1;
            failed = Some(Errno(libc::EIO));
        }
        if (first..end).any(|sector| self.bad.iter().any(|bad| hit(&bad, sector))) {
            failed = failed.or(Some(Errno(libc::EIO)));
        }
        match failed {
            None => self.disks.complete(index),
            Some(errno) => {
                let bad = &self.bad;
                let lands = |sector: Sector| sector.0.is_multiple_of(3) && !bad.iter().any(|bad| hit(&bad, sector.0));
                self.disks.complete_as(index, Err(errno), lands);
            }
        }
    }

    pub(super) fn perform_some(&mut self, count: usize) {
        for _ in 0..count.min(self.disks.pending_len()) {
            self.perform(0, None);
        }
    }

    /// Remove a region of memory, or bring it back.
    pub(super) fn change_memory(&mut self, region: usize) {
        let (map, removed) = self.guest.toggle(&self.map, region);
        self.map = map;
        let done = self.use_memory(removed);
        if !self.guest.present[region] {
            self.removals.push(Removal { region, lifetime: self.guest.lifetime(region), done });
        }
    }

    /// Mend everything, and let everything end.
    pub(super) fn finish(&mut self) {
        self.bad.clear();
        self.bad_flushes = [0; 2];
        for device in [DeviceIndex::PRIMARY, DeviceIndex::SPARE] {
            self.disks.set_gone(device, false);
        }
        self.settle();
        assert_eq!(self.plane.in_flight(), 0, "requests are left");
        for index in 0..QUEUES {
            self.stop(index, StopHow::Drain);
        }
        self.settle();
        assert!(self.queues.iter().all(|queue| queue.stopping.is_none()), "a queue does not stop");
        assert!(self.removals.is_empty(), "memory is still in use");
        assert_eq!(self.keeper.unanswered(), 0, "orders are left");
    }

    pub(super) fn settle(&mut self) {
        let mut still = 0;
        for _ in 0..TURNS_MAX {
            self.turn();
            let pending = self.disks.pending_len();
            self.perform_some(pending);
            // A message takes a turn to arrive, and its answer another.
            still = if pending > 0 { 0 } else { still + 1 };
            if still < 4 {
                continue;
            }
            if self.plane.in_flight() == 0 && self.keeper.is_idle() && self.is_quiet() {
                return;
            }
            // Nothing moves but time.
            self.now = self.keeper.wake_at().map_or(self.now, |at| Time(at.0.max(self.now.0 + 1)));
            still = 0;
        }
        let (requests, orders) = (self.plane.in_flight(), self.keeper.unanswered());
        panic!("not everything ends: {requests} requests and {orders} orders are under way");
    }

    fn is_quiet(&self) -> bool {
        let stopped = self.queues.iter().all(|queue| queue.stopping.is_none());
        stopped && self.removals.is_empty() && self.keeper.unanswered() == 0
    }
}

/// The chains that came back, with the lengths they came with.
fn see_used(guest: &Guest, queue: &mut Queue, confused: bool, back: &mut Vec<(Offered, u32)>) {
    if confused {
        queue.out.clear();
        return;
    }
    if queue.packed {
        while let Some((offered, len)) = guest.see_used_packed(queue) {
            assert!(u64::from(len) <= offered.len, "{len} bytes written to {}", offered.len);
            back.push((offered, len));
        }
        return;
    }
    let count = guest.used_index(queue.ring).wrapping_sub(queue.used);
    assert!(usize::from(count) <= queue.out.len(), "{count} chains given back, of {}", queue.out.len());
    for _ in 0..count {
        let (head, len) = guest.used_entry(queue.ring, queue.used);
        queue.used = queue.used.wrapping_add(1);
        let at = queue.out.iter().position(|offered| u32::from(offered.head) == head);
        let at = at.unwrap_or_else(|| panic!("descriptor {head} was not offered, or is back already"));
        let offered = queue.out.remove(at);
        assert!(u64::from(len) <= offered.len, "{len} bytes written to {}", offered.len);
        back.push((offered, len));
    }
}

fn see_stop(queue: &mut Queue, confused: bool) {
    let Some((how, stopped)) = &queue.stopping else { return };
    let Ok(base) = stopped.try_recv() else { return };
    let next = u16::try_from(base & 0xffff).expect("masked");
    let back = match queue.packed {
        true => packed::since(queue.next_avail, next, queue.ring.size),
        false => queue.next_avail.wrapping_sub(next),
    };
    let rewound = if *how == StopHow::Drain { queue.out.iter().map(|offered| offered.count).sum() } else { 0 };
    assert!(confused || back == rewound, "the ring went back by {back} for {} chains", queue.out.len());
    if queue.packed {
        let used = u16::try_from(base >> 16).expect("sixteen bits are left");
        assert!(confused || used == queue.used, "the next used place is {:#x}, not {used:#x}", queue.used);
        queue.used = used;
    }
    queue.out.clear();
    queue.next_avail = next;
    queue.started = false;
    queue.stopping = None;
}
