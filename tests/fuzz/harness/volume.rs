//! A volume on disks in memory: the healer and what its thread does, one turn at a time, and places for workers.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use vhost_remap::device::memory::{MemoryDevice, MemoryDisks};
use vhost_remap::device::{Device, Event, Reactor, Wait};
use vhost_remap::engine::healer::{Healer, HealerOut, HealerParams, Order, OrderId, Policy};
use vhost_remap::engine::message::{ToHealer, ToShard};
use vhost_remap::engine::open::{OpenParams, Opening};
use vhost_remap::engine::request::Status;
use vhost_remap::engine::scan::ScanParams;
use vhost_remap::engine::shard::Shard;
use vhost_remap::runtime::eventlog::EventLog;
use vhost_remap::runtime::mailbox::{Inbox, Outbox, mailbox};
use vhost_remap::runtime::worker::{Clock, DiskInfo, WorkerPort};
use vhost_remap::units::Time;

use super::rig::{BLOCK, Bad, EPOCH, PRIMARY, Reads, Rig, Shape, pattern};

/// Sectors of the guest's disk.
pub(crate) const CAPACITY: u64 = 1024;
pub(crate) const SHAPE: Shape = Shape { capacity: CAPACITY, max_remaps: 16, labelled: true };
/// Blocks whose content is not zero.
const FILLED: u64 = 48;

/// Disks with a volume that was closed cleanly, some blocks of which are remapped and one of which has lost
/// sectors.
pub(crate) fn disks() -> MemoryDisks {
    static MADE: OnceLock<MemoryDisks> = OnceLock::new();
    MADE.get_or_init(make).fork()
}

fn make() -> MemoryDisks {
    let mut rig = Rig::new(SHAPE);
    rig.disks.poke(PRIMARY, 0, &pattern(0, FILLED * BLOCK, 1));
    rig.create().expect("no end was set").expect("the disks are good");
    let mut engine = rig.open().expect("it was just made");
    let bad = |from: u64, to: u64, reads| Bad { device: PRIMARY, from: from * 512, to: to * 512, reads, writes: true };
    rig.bad = vec![bad(24, 32, Reads::Good), bad(64, 80, Reads::Good), bad(162, 164, Reads::Never)];
    for (sector, count) in [(24, 8), (64, 16), (160, 1)] {
        assert_eq!(engine.write(&mut rig, sector, &pattern(sector, count, 2)), Ok(Status::Ok));
    }
    engine.close(&mut rig).expect("no end was set").expect("the spare is good");
    rig.kill();
    rig.disks.fork()
}

/// The healer of an open volume, and its ends of the mailboxes.
pub(crate) struct Keeper {
    healer: Healer,
    device: MemoryDevice,
    from_shards: Inbox<ToHealer>,
    to_shards: Vec<Outbox<ToShard>>,
    next_order: u64,
    unanswered: usize,
    // Buffers used again in every turn.
    out: HealerOut,
    events: Vec<Event>,
    messages: Vec<ToHealer>,
}

fn open_params() -> OpenParams {
    let [primary, spare] = SHAPE.facts();
    OpenParams { primary, spare, read_only: false, accept_external: false }
}

/// Open the volume on `disks` for so many workers.
pub(crate) fn open(disks: &MemoryDisks, policy: Policy, workers: usize) -> (Keeper, Vec<WorkerPort>) {
    disks.manual(false);
    let mut device = disks.queue();
    let mut opening = Opening::new(open_params());
    let (mut events, mut ops) = (Vec::new(), Vec::new());
    while !opening.is_done() {
        let completions: Vec<_> = events
            .drain(..)
            .filter_map(|event| match event {
                Event::Done(completion) => Some(completion),
                Event::Ready(_) => None,
            })
            .collect();
        opening.step(Time(0), &completions, &mut ops);
        submit(&mut device, &mut ops);
        device.poll(Time(0), Wait::No, &mut events);
    }
    let params = HealerParams { shards: workers, policy, epoch: EPOCH, scan: ScanParams::default() };
    let (healer, facts) = opening.finish(&params).expect("the volume is good");
    let (to_healer, from_shards) = mailbox().expect("descriptors are left");
    device.watch(from_shards.as_raw_fd(), 0);
    let capacity = healer.progress().capacity.clone();
    let disk = DiskInfo { capacity, logical_block_size: 512, read_only: false, serial: facts.serial };
    let (disk, log) = (Arc::new(disk), Arc::new(EventLog::new("memory".into(), 0.0)));
    let clock = Clock::start();
    let mut to_shards = Vec::new();
    let ports = (0..workers).map(|index| {
        let (to_shard, inbox) = mailbox().expect("descriptors are left");
        to_shards.push(to_shard);
        let disks = disks.clone();
        WorkerPort {
            reactor: Box::new(move || Ok(Box::new(disks.queue()))),
            shard: Shard::new(index, healer.view(), healer.progress()),
            inbox,
            healer: to_healer.clone(),
            clock,
            disk: disk.clone(),
            log: log.clone(),
            polling: Duration::ZERO,
            counters: Arc::default(),
        }
    });
    let ports = ports.collect();
    let keeper = Keeper {
        healer,
        device,
        from_shards,
        to_shards,
        next_order: 0,
        unanswered: 0,
        out: HealerOut::default(),
        events: Vec::new(),
        messages: Vec::new(),
    };
    (keeper, ports)
}

fn submit(device: &mut MemoryDevice, ops: &mut Vec<vhost_remap::device::Op>) {
    for op in ops.drain(..) {
        // SAFETY: whoever emitted the operation, the opening script or the healer, keeps its memory until told of
        // its end, and is not dropped before the disks have performed what was submitted, unless the process ends.
        unsafe { device.submit(op) };
    }
}

impl Keeper {
    /// One round of the healer's thread.
    pub(crate) fn turn(&mut self, now: Time, wait: Wait) {
        self.healer.tick(now, &mut self.out);
        self.carry_out();
        self.device.poll(now, wait, &mut self.events);
        for event in self.events.drain(..) {
            if let Event::Done(completion) = event {
                self.healer.completed(now, completion, &mut self.out);
            }
        }
        self.from_shards.drain(&mut self.messages);
        for message in self.messages.drain(..) {
            self.healer.message(now, message, &mut self.out);
        }
        self.carry_out();
    }

    /// An operator's order, whose answer nobody waits for.
    pub(crate) fn order(&mut self, now: Time, order: Order) {
        self.next_order += 1;
        self.unanswered += 1;
        self.healer.order(now, OrderId(self.next_order), order, &mut self.out);
        self.carry_out();
    }

    /// Orders that were not answered.
    pub(crate) fn unanswered(&self) -> usize {
        self.unanswered
    }

    /// Whether nothing is under way but timers.
    pub(crate) fn is_idle(&self) -> bool {
        self.healer.is_idle()
    }

    pub(crate) fn wake_at(&self) -> Option<Time> {
        self.healer.wake_at()
    }

    fn carry_out(&mut self) {
        submit(&mut self.device, &mut self.out.ops);
        for (shard, message) in self.out.to_shards.drain(..) {
            self.to_shards[shard].send(message);
        }
        self.unanswered -= self.out.replies.len();
        self.out.replies.clear();
        self.out.events.clear();
    }
}
