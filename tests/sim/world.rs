//! The world: shards, healer, disks, guest and operator in one thread, one small step at a time.

mod late;
mod operator;
mod requests;
mod resize;

use std::collections::{BTreeMap, VecDeque};

use vhost_remap::device::{Completion, DeviceIndex, Op, OpKind};
use vhost_remap::engine::event::{Event, EventKind};
use vhost_remap::engine::healer::{Healer, HealerOut, OrderId, PoisonReport};
use vhost_remap::engine::message::{ToHealer, ToShard};
use vhost_remap::engine::request::{Answer, Request};
use vhost_remap::engine::shard::{Shard, ShardOut};
use vhost_remap::units::{SectorRange, Time};

use crate::brief::{brief, brief_back};
use crate::config::{Config, Fault};
use crate::coverage::{Phase, Strikes};
use crate::disk::{Disk, Late, tables};
use crate::every_io::plan::Plan;
use crate::guest::{SECTOR, Value};
use crate::model::{Model, Tick};
use crate::rng::Rng;

pub(crate) use resize::Growth;

/// Queues of a shard.
pub(crate) const QUEUES: u16 = 2;

/// Who waits for an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    Shard(usize),
    Healer,
    /// Opening or creation.
    Script,
}

/// An operation under way.
#[derive(Debug)]
pub(crate) struct Flight {
    pub(crate) owner: Owner,
    pub(crate) op: Op,
    ready: Time,
    durable_to: u64,
}

/// A request the guest waits for.
#[derive(Debug)]
struct Asked {
    queue: u16,
    what: &'static str,
    ranges: Vec<SectorRange>,
    start: Tick,
    /// Events there were before it.
    events: usize,
    /// Numbered like steps: whether a poison came before it.
    step: u64,
}

/// An order the operator waits for.
#[derive(Debug)]
enum Ordered {
    /// With the poison of that moment.
    Clear(Option<PoisonReport>),
    /// [`Order::Remap`] or [`Order::Release`].
    Move,
    Save,
    PrepareResize,
    /// With the capacity.
    Resize(u64),
    /// [`Order::Settle`] or [`Order::Seal`].
    Close,
}

/// A queue that is stopping.
#[derive(Debug)]
struct Stopping {
    queue: u16,
    shard: usize,
    /// What comes back is asked for again, to be served to its end.
    finish: bool,
    /// What has come back.
    back: Vec<Request>,
}

/// The volume while it is open.
pub(crate) struct Engine {
    pub(crate) healer: Healer,
    pub(crate) shards: Vec<Shard>,
}

pub(crate) struct World {
    pub(crate) config: Config,
    pub(crate) rng: Rng,
    pub(crate) now: Time,
    pub(crate) disks: [Disk; 2],
    pub(crate) engine: Option<Engine>,
    pub(crate) flights: Vec<Flight>,
    to_healer: Vec<VecDeque<ToHealer>>,
    to_shard: Vec<VecDeque<ToShard>>,
    asked: BTreeMap<u32, Asked>,
    reads_under_way: usize,
    stopping: Vec<Stopping>,
    next_token: u32,
    pub(crate) next_value: Value,
    orders: BTreeMap<OrderId, Ordered>,
    next_order: u64,
    pub(crate) growth: Growth,
    pub(crate) model: Model,
    pub(crate) step: u64,
    errors_answered: u64,
    errors_reported: u64,
    /// The step of a poisoning not yet cleared.
    poisoned_at: Option<u64>,
    /// A flush has failed and what that means is not decided.
    poisoning: bool,
    /// Whether the healer has said that a device is gone: primary, spare.
    gone: [bool; 2],
    /// The last step at which the volume as a whole could not serve everything.
    troubled: u64,
    pub(crate) read_only: bool,
    /// Whether what is read is held against the model.
    pub(crate) believe: bool,
    /// A place was retired in this run.
    pub(crate) retired: bool,
    pub(crate) events: Vec<Event>,
    pub(crate) settled: Option<Result<u32, String>>,
    pub(crate) done: Option<Result<String, String>>,
    /// Whether there is a trace: printed, or kept.
    pub(crate) verbose: bool,
    pub(crate) kept: Option<String>,
    /// Writes of a dead process that the kernel has not done yet.
    pub(crate) late: Vec<Late>,
    /// What the operations of [`Owner::Script`] belong to.
    pub(crate) script: Phase,
    /// Which fault struck in which states, where that is counted.
    pub(crate) strikes: Option<Strikes>,
    /// What a step of a shard or of the healer brings, empty between steps.
    shard_out: ShardOut,
    healer_out: HealerOut,
    /// Nothing is left to chance: the oldest thing that can happen does, and this says what fails.
    pub(crate) plan: Option<Plan>,
}

macro_rules! trace {
    ($world:expr, $($arg:tt)*) => {
        if $world.verbose {
            let line = format!("{:6} {:>12} {}", $world.step, $world.now.0, format_args!($($arg)*));
            $world.tell(line);
        }
    };
}
pub(crate) use trace;

impl World {
    pub(crate) fn with(config: Config, rng: Rng, verbose: bool) -> World {
        let mut primary = Disk::new("primary", config.primary_bytes(), config.logical[0]);
        let mut spare = Disk::new("spare", config.spare_bytes(), config.logical[1]);
        let sector = |byte: u64| usize::try_from(byte).expect("small disks") / SECTOR;
        primary.data = 0..sector(config.capacity * 512);
        spare.data = sector(config.layout().slots_start)..sector(config.layout().tail_start);
        spare.tables = tables(&config.layout());
        for disk in [&mut primary, &mut spare] {
            disk.no_zeroes = config.no_zeroes && disk.name == "primary";
            disk.no_discard = config.no_discard;
        }
        World::on([primary, spare], config, rng, verbose)
    }

    pub(crate) fn on(disks: [Disk; 2], config: Config, rng: Rng, verbose: bool) -> World {
        World {
            rng,
            now: Time(0),
            disks,
            engine: None,
            flights: Vec::new(),
            to_healer: Vec::new(),
            to_shard: Vec::new(),
            asked: BTreeMap::new(),
            reads_under_way: 0,
            stopping: Vec::new(),
            next_token: 0,
            next_value: 1,
            orders: BTreeMap::new(),
            next_order: 0,
            growth: Growth::of(config.capacity),
            model: Model::new(0),
            step: 0,
            errors_answered: 0,
            errors_reported: 0,
            poisoned_at: None,
            poisoning: false,
            gone: [false; 2],
            troubled: 0,
            read_only: false,
            believe: true,
            retired: false,
            events: Vec::new(),
            settled: None,
            done: None,
            verbose,
            kept: None,
            shard_out: ShardOut::default(),
            healer_out: HealerOut::default(),
            late: Vec::new(),
            script: Phase::Opening,
            strikes: None,
            plan: None,
            config,
        }
    }

    /// A line of the trace.
    pub(crate) fn tell(&mut self, line: String) {
        match &mut self.kept {
            None => eprintln!("{line}"),
            Some(kept) => {
                kept.push_str(&line);
                kept.push('\n');
            }
        }
    }

    /// The volume has been opened.
    pub(crate) fn start(&mut self, healer: Healer, poisoned: bool) {
        let shards = (0..self.config.shards).map(|index| Shard::new(index, healer.view(), healer.progress())).collect();
        self.to_healer = (0..self.config.shards).map(|_| VecDeque::new()).collect();
        self.to_shard = (0..self.config.shards).map(|_| VecDeque::new()).collect();
        self.engine = Some(Engine { healer, shards });
        self.poisoned_at = poisoned.then_some(0);
        (self.poisoning, self.gone) = (false, [false; 2]);
        self.troubled = self.step;
        self.stopping.clear();
        self.wake_healer();
    }

    /// The engine is gone, with all it had under way; the caller has seen to the flights.
    pub(crate) fn stop(&mut self) {
        assert!(self.flights.is_empty());
        self.engine = None;
        self.asked.clear();
        self.reads_under_way = 0;
        self.orders.clear();
        self.errors_answered = 0;
        self.errors_reported = 0;
        self.settled = None;
        self.done = None;
    }

    pub(crate) fn healer(&mut self) -> &mut Healer {
        &mut self.engine.as_mut().expect("the volume is open").healer
    }

    // ---- devices

    pub(crate) fn submit(&mut self, owner: Owner, ops: impl IntoIterator<Item = Op>) {
        let slow = self.config.has(&[Fault::Latency]);
        for op in ops {
            assert!(
                !self.read_only || matches!(op.kind, OpKind::Read | OpKind::Identify | OpKind::Flush),
                "a read-only volume is written: {op:?}"
            );
            let changes = matches!(op.kind, OpKind::Write | OpKind::WriteZeroes { .. } | OpKind::Discard);
            let noted = self.poisoned_at.is_some() && matches!(owner, Owner::Shard(_));
            assert!(!(changes && noted), "F2: written when the regions that are were noted: {op:?}");
            let flushes = |flight: &Flight| flight.op.kind == OpKind::Flush && flight.op.device == op.device;
            let twice = op.kind == OpKind::Flush && self.flights.iter().any(flushes);
            assert!(!twice, "F2: two flushes of the {} at a time", self.disk(op.device).name);
            let mut latency = 1 + self.disk(op.device).hesitation_ns(&op);
            if self.plan.is_none() {
                latency += self.rng.below(20_000);
            }
            if slow && self.rng.percent(3) {
                latency += self.rng.below(12_000_000_000);
                trace!(self, "slow: {:?} {}+{} takes {latency} ns", op.kind, op.offset, op.len);
                self.count_strike(Some(Fault::Latency));
            }
            let durable_to = self.disk(op.device).completed();
            self.flights.push(Flight { owner, op, ready: self.now.plus_ns(latency), durable_to });
        }
    }

    /// Perform flight `index` and say how it ended.
    pub(crate) fn perform(&mut self, index: usize) -> (Owner, Completion) {
        let fails = self.planned(index);
        let Flight { owner, op, durable_to, .. } = self.flights.remove(index);
        let disk = &mut self.disks[usize::from(op.device.0)];
        disk.step = self.step;
        let result = match fails {
            Some(errno) => disk.fail(&op, errno, &mut self.rng),
            None => disk.perform(&op, durable_to, &mut self.rng),
        };
        let fault = disk.struck_by.take();
        self.count_strike(fault);
        if result.is_err() {
            // A place that fails a write is retired by a write to the other one, which may land and fail too.
            self.retired |= self.is_metadata_write(&op);
        }
        trace!(
            self,
            "{owner:?} {} {:?} {}+{} -> {result:?}",
            self.disks[usize::from(op.device.0)].name,
            op.kind,
            op.offset / SECTOR as u64,
            op.len / SECTOR as u64
        );
        (owner, Completion { tag: op.tag, result })
    }

    /// One of so many, by chance unless there is a plan.
    fn choose(&mut self, count: usize) -> usize {
        if self.plan.is_some() { 0 } else { self.rng.index(count) }
    }

    /// A random operation that is ready.
    pub(crate) fn ready_flight(&mut self) -> Option<usize> {
        let now = self.now;
        let ready = |flight: &Flight| flight.ready <= now;
        let count = self.flights.iter().filter(|flight| ready(flight)).count();
        if count == 0 {
            return None;
        }
        let chosen = self.choose(count);
        let mut flights = self.flights.iter().enumerate().filter(|(_, flight)| ready(flight));
        flights.nth(chosen).map(|(index, _)| index)
    }

    /// When the next operation is ready.
    pub(crate) fn next_ready(&self) -> Option<Time> {
        self.flights.iter().map(|flight| flight.ready).min()
    }

    /// Everything under way ends here: a write lands in part, in whole or not at all.
    pub(crate) fn abandon_flights(&mut self) {
        for Flight { op, .. } in std::mem::take(&mut self.flights) {
            let disk = &mut self.disks[usize::from(op.device.0)];
            if !disk.gone && op.offset + op.len <= disk.bytes() {
                disk.apply_some(&op, &mut self.rng);
            }
        }
    }

    /// The process dies with operations in the kernel, which may do its writes yet.
    pub(crate) fn leave_flights(&mut self) {
        for Flight { op, .. } in std::mem::take(&mut self.flights) {
            let device = usize::from(op.device.0);
            self.late.extend(self.disks[device].late(device, &op));
        }
    }

    /// What a dead process left in the kernel is done, or lost if the power goes meanwhile. Until then it has
    /// the devices' lock, which a successor waits for (O4).
    pub(crate) fn await_lock(&mut self, power_goes: bool) {
        let mut left = std::mem::take(&mut self.late);
        let landing = if power_goes { self.rng.index(left.len() + 1) } else { left.len() };
        for _ in 0..landing {
            let late = left.swap_remove(self.rng.index(left.len()));
            trace!(self, "late: {} sectors at {} of device {}", late.len(), late.first, late.device);
            self.disks[late.device].land_late(&late, &mut self.rng);
        }
    }

    // ---- steps

    /// Let a shard do something, and take what comes of it.
    fn with_shard(&mut self, shard: usize, act: impl FnOnce(&mut Shard, &mut ShardOut)) {
        let mut out = std::mem::take(&mut self.shard_out);
        act(&mut self.engine.as_mut().expect("the volume is open").shards[shard], &mut out);
        self.submit(Owner::Shard(shard), out.ops.drain(..));
        self.to_healer[shard].extend(out.to_healer.drain(..));
        for Answer { request, status } in out.answers.drain(..) {
            self.answered(request, status);
        }
        for request in out.withdrawn.drain(..) {
            self.withdrawn(request);
        }
        self.shard_out = out;
    }

    /// Let the healer do something, and take what comes of it.
    fn with_healer(&mut self, act: impl FnOnce(&mut Healer, &mut HealerOut)) {
        let mut out = std::mem::take(&mut self.healer_out);
        act(self.healer(), &mut out);
        self.submit(Owner::Healer, out.ops.drain(..));
        for event in out.events.drain(..) {
            trace!(
                self,
                "event {} {:?}+{}: {}; {}",
                event.kind.name(),
                event.range.start,
                event.range.count,
                event.cause,
                event.action
            );
            match event.kind {
                EventKind::PlaceRetired => self.retired = true,
                EventKind::GuestError => self.errors_reported += 1,
                EventKind::FlushFailed => self.poisoning = true,
                EventKind::Poisoned => _ = self.poisoned_at.get_or_insert(self.step),
                EventKind::DeviceGone => self.gone[0] = true,
                EventKind::DeviceBack => self.gone[0] = false,
                EventKind::SpareDown => (self.gone[1], self.poisoning) = (true, false),
                EventKind::SpareBack => self.gone[1] = false,
                _ => {}
            }
            self.events.push(event);
        }
        self.note_trouble();
        for (shard, message) in out.to_shards.drain(..) {
            self.to_shard[shard].push_back(message);
        }
        for (id, reply) in out.replies.drain(..) {
            self.replied(id, reply);
        }
        self.healer_out = out;
    }

    /// Trouble lasts until every shard has heard that it is over.
    fn note_trouble(&mut self) {
        if self.poisoned_at.is_some() {
            self.poisoning = false;
        }
        let over = !self.poisoning && self.poisoned_at.is_none() && self.gone == [false; 2];
        if !over || (self.troubled + 1 >= self.step && self.to_shard.iter().any(|queue| !queue.is_empty())) {
            self.troubled = self.step;
        }
    }

    fn wake_healer(&mut self) {
        let now = self.now;
        self.with_healer(|healer, out| healer.tick(now, out));
    }

    /// One step of whatever can happen; `false` where only the passing of time helps.
    pub(crate) fn advance(&mut self) -> bool {
        self.note_trouble();
        self.step += 1;
        self.now = self.now.plus_ns(self.rng.below(2_000));
        let busy = self.busy();
        let flight = self.ready_flight();
        if flight.is_some() && self.plan.is_none() && self.rng.percent(3) {
            let Flight { op, .. } = &self.flights[self.rng.index(self.flights.len())];
            let disk = &mut self.disks[usize::from(op.device.0)];
            if !disk.gone && op.offset + op.len <= disk.bytes() {
                disk.apply_some(op, &mut self.rng);
            }
        }
        if self.healer().wake_at().is_some_and(|when| when <= self.now) {
            self.wake_healer();
            return true;
        }
        match (busy == 0, flight) {
            (true, None) => false,
            (false, None) => {
                self.deliver(busy);
                true
            }
            (true, Some(flight)) => {
                self.complete(flight);
                true
            }
            (false, Some(flight)) => {
                if self.choose(2) == 0 {
                    self.deliver(busy)
                } else {
                    self.complete(flight)
                }
                true
            }
        }
    }

    /// Nothing can happen now: let time pass until something can. `false` where nothing ever will.
    pub(crate) fn wait(&mut self) -> bool {
        let timer = self.healer().wake_at();
        let Some(next) = timer.into_iter().chain(self.next_ready()).min() else { return false };
        self.now = self.now.max(next);
        true
    }

    /// The channels that messages wait in, as a mask: those to the healer, then those to the shards.
    fn busy(&self) -> u32 {
        let channels =
            self.to_healer.iter().map(VecDeque::is_empty).chain(self.to_shard.iter().map(VecDeque::is_empty));
        channels.enumerate().fold(0, |mask, (channel, empty)| mask | u32::from(!empty) << channel)
    }

    fn deliver(&mut self, busy: u32) {
        let (shards, now) = (self.config.shards, self.now);
        let chosen = self.choose(busy.count_ones() as usize);
        let left = (0..chosen).fold(busy, |left, _| left & (left - 1));
        let channel = left.trailing_zeros() as usize;
        if channel < shards {
            let message = self.to_healer[channel].pop_front().expect("busy");
            trace!(self, "shard {channel} -> healer: {}", brief(&message));
            self.with_healer(|healer, out| healer.message(now, message, out));
        } else {
            let shard = channel - shards;
            let message = self.to_shard[shard].pop_front().expect("busy");
            trace!(self, "healer -> shard {shard}: {}", brief_back(&message));
            self.with_shard(shard, |shard, out| shard.message(now, message, out));
        }
    }

    fn complete(&mut self, flight: usize) {
        let (owner, completion) = self.perform(flight);
        let now = self.now;
        match owner {
            Owner::Shard(shard) => self.with_shard(shard, |shard, out| shard.completed(now, completion, out)),
            Owner::Healer => self.with_healer(|healer, out| healer.completed(now, completion, out)),
            Owner::Script => unreachable!("scripts have a driver of their own"),
        }
    }

    /// Whether nothing is under way but timers.
    pub(crate) fn is_quiet(&mut self) -> bool {
        self.asked.is_empty()
            && self.orders.is_empty()
            && self.flights.is_empty()
            && self.to_healer.iter().all(VecDeque::is_empty)
            && self.to_shard.iter().all(VecDeque::is_empty)
            && self.healer().is_idle()
    }

    pub(crate) fn unanswered(&self) -> usize {
        self.asked.len()
    }

    pub(crate) fn describe_waiting(&self) -> String {
        format!("requests {:?}, orders {:?}, {} flights", self.asked, self.orders, self.flights.len())
    }

    pub(crate) fn disk(&mut self, device: DeviceIndex) -> &mut Disk {
        &mut self.disks[usize::from(device.0)]
    }
}

/// Every sector of the ranges.
pub(crate) fn sectors(ranges: &[SectorRange]) -> impl Iterator<Item = u64> + '_ {
    ranges.iter().flat_map(|range| range.start.0..range.end().0)
}
