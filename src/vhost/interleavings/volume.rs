//! An open volume with its healer's thread, on disks in memory that take their time.

use std::os::fd::RawFd;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use shuttle::rand::{Rng, thread_rng};
use uuid::Uuid;

use super::guest::negotiate;
use crate::device::memory::{MemoryDevice, MemoryDisks};
use crate::device::{Completion, Device, DeviceIndex, Errno, Event, Op, OpKind, Reactor, Wait};
use crate::engine::create::{CreateParams, Creation};
use crate::engine::healer::{HealerParams, HealerStatus, OnLoss, Order, Policy, Reply};
use crate::engine::open::{DeviceFacts, OpenParams, Opening};
use crate::engine::scan::{GuestLoad, ScanParams};
use crate::engine::shard::Shard;
use crate::runtime::eventlog::EventLog;
use crate::runtime::healer::{Command, HealerThread, OpenedVolume, Surroundings, drive};
use crate::runtime::mailbox::mailbox;
use crate::runtime::worker::{Clock, DiskInfo, WorkerPort};
use crate::sync::atomic::{AtomicBool, Ordering::SeqCst};
use crate::sync::mpsc::{Receiver, sync_channel};
use crate::sync::thread;
use crate::units::{Sector, SectorRange, Slot, Time};
use crate::vhost::device::{BlkDevice, Settings};
use crate::volume::layout::spare_size;
use crate::volume::superblock::CloseStamp;

/// Sectors of the volume: 16 blocks.
const CAPACITY: u64 = 128;
const SLOTS: u32 = 64;
/// The block that two workers and the operator fight for, and its first sector.
pub(super) const BLOCK: SectorRange = SectorRange { start: Sector(8), count: 8 };
pub(super) const FIRST: u64 = 8;
/// A block that nobody else touches.
pub(super) const OTHER: SectorRange = SectorRange { start: Sector(64), count: 8 };

fn facts(size: u64, inode: u64) -> DeviceFacts {
    DeviceFacts { size, logical_block: 512, inode, wwn: String::new(), mtime_ns: 1 }
}

fn both() -> [DeviceFacts; 2] {
    [facts(CAPACITY * 512, 1), facts(spare_size(SLOTS), 2)]
}

/// The disks of a new volume.
static NEW: LazyLock<MemoryDisks> = LazyLock::new(|| {
    let [primary, spare] = both();
    let disks = MemoryDisks::new(&[primary.size, spare.size]);
    let mut creation = Creation::new(CreateParams {
        primary,
        spare,
        capacity: CAPACITY,
        labelled: false,
        max_remaps: SLOTS,
        set: Uuid::from_u128(1),
        devices: [Uuid::from_u128(2), Uuid::from_u128(3)],
        serial: [0; 20],
        now: 1,
    });
    let mut result = None;
    drive(&mut disks.queue(), &Clock::start(), |now, completions, ops| {
        creation.step(now, completions, ops);
        result = result.take().or_else(|| creation.result());
        result.is_some()
    });
    result.expect("driven to its end").expect("good disks");
    disks
});

/// A flush of the spare that fails while a worker's write to it is under way: both end only then.
#[derive(Default)]
pub(super) struct Failure {
    /// The healer's next flush of the spare fails.
    pub(super) armed: AtomicBool,
    /// A worker's write to the spare was submitted.
    writing: AtomicBool,
}

impl Failure {
    /// Whether an operation of a worker need not wait for the failure.
    fn lets_end(&self, op: &Op) -> bool {
        (op.device, op.kind) != (DeviceIndex::SPARE, OpKind::Write) || !self.armed.load(SeqCst)
    }
}

/// A queue to the disks whose operations take their time: each waits until chance has it.
struct Slow {
    inner: MemoryDevice,
    held: Vec<Op>,
    failed: Vec<Event>,
    failure: Arc<Failure>,
    of_healer: bool,
}

impl Slow {
    fn queue(disks: &MemoryDisks, failure: Arc<Failure>, of_healer: bool) -> Box<dyn Reactor> {
        Box::new(Slow { inner: disks.queue(), held: Vec::new(), failed: Vec::new(), failure, of_healer })
    }
}

impl Device for Slow {
    unsafe fn submit(&mut self, op: Op) {
        match (self.of_healer, op.device, op.kind) {
            (false, DeviceIndex::SPARE, OpKind::Write) => self.failure.writing.store(true, SeqCst),
            (true, DeviceIndex::SPARE, OpKind::Flush) if self.failure.armed.swap(false, SeqCst) => {
                self.failed.push(Event::Done(Completion { tag: op.tag, result: Err(Errno(libc::EIO)) }));
                return;
            }
            _ => {}
        }
        self.held.push(op);
    }

    fn in_flight(&self) -> usize {
        self.held.len() + self.failed.len() + self.inner.in_flight()
    }

    fn poll(&mut self, now: Time, wait: Wait, events: &mut Vec<Event>) {
        let mut random = thread_rng();
        let may_end = |op: &Op| self.of_healer || self.failure.lets_end(op);
        let held = std::mem::take(&mut self.held).into_iter();
        let (due, later): (Vec<Op>, Vec<Op>) = held.partition(|op| may_end(op) && random.gen_bool(0.5));
        self.held = later;
        for op in due {
            // SAFETY: whoever submitted it keeps its memory until its completion, which is yet to come.
            unsafe { self.inner.submit(op) };
        }
        let before = events.len();
        if self.failure.writing.load(SeqCst) && random.gen_bool(0.5) {
            events.append(&mut self.failed);
        }
        let busy = events.len() > before || self.in_flight() > self.inner.in_flight();
        self.inner.poll(now, if busy { Wait::No } else { wait }, events);
        if events.len() == before && wait != Wait::No {
            thread::yield_now();
        }
    }
}

impl Reactor for Slow {
    fn watch(&mut self, fd: RawFd, token: u64) {
        self.inner.watch(fd, token);
    }

    fn unwatch(&mut self, token: u64) {
        self.inner.unwatch(token);
    }
}

/// An open volume whose healer runs.
pub(super) struct Volume {
    pub(super) disks: MemoryDisks,
    pub(super) failure: Arc<Failure>,
    pub(super) settings: Arc<Settings>,
    pub(super) ports: Vec<WorkerPort>,
    pub(super) opened: OpenedVolume,
    pub(super) healer: HealerThread,
}

impl Volume {
    /// A new one.
    pub(super) fn open(workers: usize) -> Volume {
        Volume::open_on(NEW.fork(), workers)
    }

    pub(super) fn open_on(disks: MemoryDisks, workers: usize) -> Volume {
        let failure = Arc::new(Failure::default());
        let [primary, spare] = both();
        let params = OpenParams { primary, spare, read_only: false, accept_external: false };
        let policy = Policy { primary_gone: OnLoss::Fail, spare_full: OnLoss::Fail, passthrough: false };
        let (clock, log) = (Clock::start(), Arc::new(EventLog::new("a volume in memory".into(), 0.0)));
        let (to_shards, inboxes): (Vec<_>, Vec<_>) = (0..workers).map(|_| mailbox().unwrap()).unzip();
        let of_healer = (disks.clone(), failure.clone());
        let (healer, opened) = HealerThread::start_on(
            Box::new(move || Ok(Slow::queue(&of_healer.0, of_healer.1, true))),
            Box::new(move || Opening::new(params)),
            HealerParams { shards: workers, policy, epoch: 1, scan: ScanParams::default() },
            Surroundings {
                clock,
                log: log.clone(),
                shards: to_shards,
                counters: Arc::default(),
                load: Box::new(|_| GuestLoad::default()),
            },
        )
        .unwrap();
        let capacity = opened.progress.capacity.clone();
        let info = DiskInfo { capacity, logical_block_size: 512, read_only: false, serial: [0; 20] };
        let disk = Arc::new(info);
        let port = |(index, inbox)| {
            let (disks, failure) = (disks.clone(), failure.clone());
            WorkerPort {
                reactor: Box::new(move || Ok(Slow::queue(&disks, failure, false))),
                shard: Shard::new(index, opened.view.clone(), opened.progress.clone()),
                inbox,
                healer: healer.shards.clone(),
                clock,
                disk: disk.clone(),
                log: log.clone(),
                polling: Duration::ZERO,
                counters: Arc::default(),
            }
        };
        let ports = inboxes.into_iter().enumerate().map(port).collect();
        let settings = negotiate(&BlkDevice::new(disk.clone(), 1));
        Volume { disks, failure, settings, ports, opened, healer }
    }

    /// Close as a server does; its workers have ended.
    pub(super) fn close(self) {
        let Reply::Settled(settled) = self.order(Order::Settle) else { panic!("another answer") };
        let [DeviceFacts { size, mtime_ns, .. }, _] = both();
        self.done(Order::Seal(CloseStamp { size, mtime_ns, sample_crc: settled.unwrap(), write_through: false }));
    }

    /// Give an order, as an operator's thread does.
    pub(super) fn ask(&self, order: Order) -> Receiver<Reply> {
        let (reply, answer) = sync_channel(1);
        self.healer.orders.send(Command::Order(order, reply));
        answer
    }

    fn order(&self, order: Order) -> Reply {
        self.ask(order).recv().expect("the healer answers")
    }

    #[track_caller]
    pub(super) fn done(&self, order: Order) {
        let Reply::Done(result) = self.order(order) else { panic!("another answer") };
        result.unwrap();
    }

    pub(super) fn status(&self) -> HealerStatus {
        let Reply::Status(status) = self.order(Order::Status) else { panic!("another answer") };
        *status
    }

    /// The slot of [`BLOCK`], if it has one.
    pub(super) fn slot(&self) -> Option<Slot> {
        let Reply::List(list) = self.order(Order::List { from: BLOCK.start, limit: 1 }) else {
            panic!("another answer")
        };
        list.first().and_then(|(_, state, _)| state.slot)
    }
}
