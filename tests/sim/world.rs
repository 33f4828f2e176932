//! The world: shards, healer, disks, guest and operator in one thread, one small step at a time.

use std::collections::{BTreeMap, VecDeque};

use vhost_remap::device::{Completion, DeviceIndex, Op, OpKind};
use vhost_remap::engine::event::Event;
use vhost_remap::engine::healer::{Healer, HealerOut, HealerStatus, Order, OrderId, PoisonReport, Reply};
use vhost_remap::engine::message::{ToHealer, ToShard};
use vhost_remap::engine::request::{Answer, Request, RequestOp, Status, Token};
use vhost_remap::engine::shard::{Shard, ShardOut};
use vhost_remap::engine::view::PrimaryState;
use vhost_remap::units::{Sector, SectorRange, Time};

use crate::brief::{brief, brief_back};
use crate::config::{Config, Fault};
use crate::coverage::{Phase, State, Strikes};
use crate::disk::{Disk, Late};
use crate::every_io::plan::Plan;
use crate::guest::{self, SECTOR, Value};
use crate::model::{Model, Tick};
use crate::rng::Rng;
use crate::script::Ask;

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
    /// For copying.
    scratch: Vec<u8>,
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
            model: Model::new(0),
            step: 0,
            errors_answered: 0,
            errors_reported: 0,
            poisoned_at: None,
            poisoning: false,
            gone: [false; 2],
            troubled: 0,
            read_only: false,
            retired: false,
            events: Vec::new(),
            settled: None,
            done: None,
            verbose,
            kept: None,
            scratch: Vec::new(),
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
        let shards = (0..self.config.shards)
            .map(|index| Shard::new(index, healer.geometry(), healer.view(), healer.progress()))
            .collect();
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

    pub(crate) fn submit(&mut self, owner: Owner, ops: Vec<Op>) {
        let slow = self.config.has(&[Fault::Latency]);
        for op in ops {
            assert!(
                !self.read_only || matches!(op.kind, OpKind::Read | OpKind::Identify | OpKind::Flush),
                "a read-only volume is written: {op:?}"
            );
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
        if result.is_err() {
            let fault = disk.struck_by.take();
            self.count_strike(fault);
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

    fn take_shard(&mut self, shard: usize, out: ShardOut) {
        self.submit(Owner::Shard(shard), out.ops);
        self.to_healer[shard].extend(out.to_healer);
        for Answer { request, status } in out.answers {
            self.answered(request, status);
        }
        for request in out.withdrawn {
            self.withdrawn(request);
        }
    }

    fn take_healer(&mut self, out: HealerOut) {
        self.submit(Owner::Healer, out.ops);
        for event in out.events {
            trace!(
                self,
                "event {} {:?}+{}: {}; {}", event.kind, event.range.start, event.range.count, event.cause, event.action
            );
            match event.kind {
                "place-retired" => self.retired = true,
                "guest-error" => self.errors_reported += 1,
                "flush-failed" => self.poisoning = true,
                "poisoned" => _ = self.poisoned_at.get_or_insert(self.step),
                "device-gone" => self.gone[0] = true,
                "device-back" => self.gone[0] = false,
                "spare-down" => (self.gone[1], self.poisoning) = (true, false),
                "spare-back" => self.gone[1] = false,
                _ => {}
            }
            self.events.push(event);
        }
        self.note_trouble();
        for (shard, message) in out.to_shards {
            self.to_shard[shard].push_back(message);
        }
        for (id, reply) in out.replies {
            self.replied(id, reply);
        }
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
        let mut out = HealerOut::default();
        self.healer().tick(now, &mut out);
        self.take_healer(out);
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
            let mut out = HealerOut::default();
            self.healer().message(now, message, &mut out);
            self.take_healer(out);
        } else {
            let shard = channel - shards;
            let message = self.to_shard[shard].pop_front().expect("busy");
            trace!(self, "healer -> shard {shard}: {}", brief_back(&message));
            let mut out = ShardOut::default();
            self.engine.as_mut().expect("the volume is open").shards[shard].message(now, message, &mut out);
            self.take_shard(shard, out);
        }
    }

    fn complete(&mut self, flight: usize) {
        let (owner, completion) = self.perform(flight);
        let now = self.now;
        let engine = self.engine.as_mut().expect("the volume is open");
        match owner {
            Owner::Shard(shard) => {
                let mut out = ShardOut::default();
                engine.shards[shard].completed(now, completion, &mut out);
                self.take_shard(shard, out);
            }
            Owner::Healer => {
                let mut out = HealerOut::default();
                engine.healer.completed(now, completion, &mut out);
                self.take_healer(out);
            }
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

    // ---- the guest

    /// The guest asks for something in a queue.
    pub(crate) fn ask(&mut self, ask: &Ask, queue: u16, through: bool) {
        let through = through && matches!(ask, Ask::Write(_) | Ask::Zeroes(..));
        let (op, what, ranges, start) = match ask {
            Ask::Read(range) => self.a_read(*range),
            Ask::Write(range) => self.a_write(*range),
            Ask::Flush => (RequestOp::Flush, "flush", Vec::new(), self.model.tick()),
            Ask::Zeroes(range, unmap) => {
                let start = self.model.begin(sectors(&[*range]), 0);
                (RequestOp::WriteZeroes { ranges: vec![(*range, *unmap)] }, "zeroes", vec![*range], start)
            }
            Ask::Discard(ranges) => {
                let start = self.model.begin(sectors(ranges), 0);
                (RequestOp::Discard { ranges: ranges.clone() }, "discard", ranges.clone(), start)
            }
        };
        let (shard, queue) = self.open_queue(queue);
        let token = self.next_token;
        self.next_token += 1;
        trace!(self, "guest {token}: {what} {ranges:?} value {} through {through} queue {queue}", self.next_value - 1);
        self.asked.insert(token, Asked { queue, what, ranges, start, events: self.events.len(), step: self.step });
        self.hand_in(shard, Request { token: Token(token), queue, write_through: through, op });
    }

    fn hand_in(&mut self, shard: usize, request: Request) {
        let now = self.now;
        let mut out = ShardOut::default();
        self.engine.as_mut().expect("open").shards[shard].submit(now, request, &mut out);
        self.take_shard(shard, out);
    }

    /// That queue with its shard, or the next one that is not stopping; where all are, it opens again in time.
    fn open_queue(&self, queue: u16) -> (usize, u16) {
        let queues = u16::try_from(self.config.shards).expect("few") * QUEUES;
        let open = |queue: &u16| self.stopping.iter().all(|stopping| stopping.queue != *queue);
        let queue = (queue..queues).chain(0..queue).find(open).unwrap_or(queue);
        (usize::from(queue / QUEUES), queue)
    }

    fn some_queue(&mut self) -> u16 {
        u16::try_from(self.rng.index(self.config.shards * usize::from(QUEUES))).expect("few")
    }

    fn a_read(&mut self, range: SectorRange) -> (RequestOp, &'static str, Vec<SectorRange>, Tick) {
        let data = guest::memory(usize::try_from(range.bytes()).expect("small"), &mut self.rng);
        // What an earlier request left there may look just like what this one is to bring.
        static DIRT: [u8; 64 * SECTOR] = [0xa5; 64 * SECTOR];
        for at in (0..data.len()).step_by(DIRT.len()) {
            data.copy_from(at, &DIRT[..DIRT.len().min(data.len() - at)]);
        }
        self.reads_under_way += 1;
        (RequestOp::Read { range, data }, "read", vec![range], self.model.tick())
    }

    fn a_write(&mut self, range: SectorRange) -> (RequestOp, &'static str, Vec<SectorRange>, Tick) {
        let value = self.next_value;
        self.next_value += 1;
        let data = guest::memory(usize::try_from(range.bytes()).expect("small"), &mut self.rng);
        let scratch = guest::at_least(&mut self.scratch, data.len());
        for (sector, bytes) in sectors(&[range]).zip(scratch.chunks_exact_mut(SECTOR)) {
            guest::fill(bytes, sector, value);
        }
        data.copy_from(0, scratch);
        let start = self.model.begin(sectors(&[range]), value);
        (RequestOp::Write { range, data }, "write", vec![range], start)
    }

    pub(crate) fn ask_read(&mut self, range: SectorRange) {
        let queue = self.some_queue();
        self.ask(&Ask::Read(range), queue, false);
    }

    pub(crate) fn ask_write(&mut self, range: SectorRange) {
        let queue = self.some_queue();
        self.ask(&Ask::Write(range), queue, false);
    }

    pub(crate) fn ask_flush(&mut self) {
        let queue = self.some_queue();
        self.ask(&Ask::Flush, queue, false);
    }

    pub(crate) fn ask_zeroes(&mut self, range: SectorRange) {
        let queue = self.some_queue();
        self.ask(&Ask::Zeroes(range, false), queue, false);
    }

    pub(crate) fn ask_discard(&mut self, ranges: Vec<SectorRange>) {
        let queue = self.some_queue();
        self.ask(&Ask::Discard(ranges), queue, false);
    }

    fn answered(&mut self, request: Request, status: Status) {
        let token = request.token.0;
        let asked = self.asked.remove(&token).unwrap_or_else(|| panic!("request {token} is answered twice"));
        trace!(self, "answer {token}: {} {status:?}", asked.what);
        let ok = status == Status::Ok;
        if !ok {
            self.errors_answered += 1;
            assert!(self.errors_answered <= self.errors_reported, "P1: an error without an event: {asked:?}");
            self.check_justified(&asked);
        }
        if let Some(step) = self.poisoned_at
            && asked.what != "read"
            && asked.step > step
        {
            assert!(!ok, "F2: a poisoned volume serves {asked:?}");
        }
        match &request.op {
            RequestOp::Read { data, .. } => {
                self.reads_under_way -= 1;
                if ok {
                    let scratch = guest::at_least(&mut self.scratch, data.len());
                    data.copy_to(0, scratch);
                    for (sector, bytes) in sectors(&asked.ranges).zip(scratch.chunks_exact(SECTOR)) {
                        if let Err(lie) = self.model.read(sector, asked.start, bytes) {
                            panic!("R1: {lie}");
                        }
                    }
                }
            }
            // A volume that writes nothing has nothing of its own to make durable.
            RequestOp::Flush if ok && !self.read_only => self.model.flushed(asked.start),
            RequestOp::Flush => {}
            RequestOp::Discard { .. } => self.model.end(sectors(&asked.ranges), asked.start, false),
            RequestOp::Write { .. } | RequestOp::WriteZeroes { .. } => {
                self.model.end(sectors(&asked.ranges), asked.start, ok);
                if ok && request.write_through {
                    self.model.pinned(sectors(&asked.ranges), asked.start);
                }
                if ok {
                    self.pin_moved(&asked.ranges, asked.events, asked.start);
                }
            }
        }
        if self.reads_under_way == 0 {
            self.model.quiet(sectors(&asked.ranges));
        }
    }

    /// An error needs a reason that lies between the request's submission and its answer.
    fn check_justified(&mut self, asked: &Asked) {
        let since = asked.step;
        if self.read_only
            || self.troubled >= since
            || self.disks.iter().any(|disk| disk.troubled >= since || disk.short_since(since))
            || self.config.has(&[Fault::Latency])
        {
            return;
        }
        let special = self.list();
        let mut blocks = asked.ranges.iter().flat_map(|range| range.blocks().iter());
        let in_doubt = blocks.any(|block| special.iter().any(|(other, state, _)| *other == block && state.in_doubt));
        let spare = self.disks[1].struck >= since;
        let justified = in_doubt
            || match asked.what {
                "read" => {
                    let bad = |sector| {
                        let at = usize::try_from(sector).expect("small");
                        let lost = special.iter().any(|(block, state, _)| {
                            (block.start().0..block.start().0 + 8).contains(&sector)
                                && state.lost >> (sector % 8) & 1 == 1
                        });
                        lost || self.disks[0].hard.get(&at).is_some_and(|when| *when >= since)
                    };
                    let unit = self.config.unit();
                    let wide = |range: &SectorRange| range.start.0 / unit * unit..range.end().0.next_multiple_of(unit);
                    // Several passing troubles in one large sector may outlast the ladder together.
                    let several = unit > 1 && self.disks[0].struck >= since;
                    spare || several || asked.ranges.iter().flat_map(wide).any(bad)
                }
                // What the primary does not take goes to a slot, where there is one.
                "write" | "zeroes" => spare || self.status().free < self.config.depth * 32,
                _ => false,
            };
        let told = self.events.iter().rev().find(|event| event.kind == "guest-error");
        let cause = told.map_or("", |event| &event.cause);
        assert!(justified, "{} fails without a reason ({cause}): {asked:?}", asked.what);
    }

    fn withdrawn(&mut self, request: Request) {
        let token = request.token.0;
        trace!(self, "withdrawn {token}");
        let stopping = self.stopping.iter_mut().find(|stopping| stopping.queue == request.queue);
        let stopping = stopping.expect("only a queue that stops gives requests back");
        if stopping.finish {
            return stopping.back.push(request);
        }
        let asked = self.asked.remove(&token).unwrap_or_else(|| panic!("request {token} ends twice"));
        match asked.what {
            "read" => self.reads_under_way -= 1,
            "flush" => {}
            _ => self.model.end(sectors(&asked.ranges), asked.start, false),
        }
    }

    /// Stop a queue.
    pub(crate) fn reset_queue(&mut self, queue: u16, finish: bool) {
        if self.stopping.iter().any(|stopping| stopping.queue == queue) {
            return;
        }
        let shard = usize::from(queue / QUEUES);
        trace!(self, "withdraw queue {queue} of shard {shard}, finish {finish}");
        self.stopping.push(Stopping { queue, shard, finish, back: Vec::new() });
        let mut out = ShardOut::default();
        self.engine.as_mut().expect("open").shards[shard].withdraw(queue, &mut out);
        self.take_shard(shard, out);
    }

    /// What came back from a queue that stops is served to its end; a queue that has stopped goes on.
    pub(crate) fn resume_queues(&mut self) {
        for at in 0..self.stopping.len() {
            let Stopping { queue, shard, .. } = self.stopping[at];
            let back = std::mem::take(&mut self.stopping[at].back);
            if back.is_empty() {
                continue;
            }
            let mut out = ShardOut::default();
            self.engine.as_mut().expect("open").shards[shard].finish(queue, &mut out);
            self.take_shard(shard, out);
            back.into_iter().for_each(|request| self.hand_in(shard, request));
        }
        if self.stopping.is_empty() {
            return;
        }
        let engine = self.engine.as_mut().expect("open");
        let asked = &self.asked;
        self.stopping.retain(|Stopping { queue, shard, back, .. }| {
            let left = engine.shards[*shard].unanswered(*queue);
            let waiting = asked.values().filter(|asked| asked.queue == *queue).count();
            assert_eq!(left + back.len(), waiting, "unanswered of {queue}");
            if waiting == 0 {
                engine.shards[*shard].resume(*queue);
            }
            waiting > 0
        });
    }

    // ---- the operator

    pub(crate) fn order(&mut self, order: Order) {
        let id = OrderId(self.next_order);
        self.next_order += 1;
        trace!(self, "order {order:?}");
        let ordered = match &order {
            Order::Clear => Ordered::Clear(self.status().poison),
            Order::Remap(_) | Order::Release(_) => Ordered::Move,
            Order::Save => Ordered::Save,
            Order::Settle | Order::Seal(_) => Ordered::Close,
            Order::Status | Order::List { .. } => unreachable!("these are answered at once"),
        };
        self.orders.insert(id, ordered);
        let now = self.now;
        let mut out = HealerOut::default();
        self.healer().order(now, id, order, &mut out);
        self.take_healer(out);
    }

    /// The healer's state, which it gives at once.
    pub(crate) fn status(&mut self) -> HealerStatus {
        let now = self.now;
        let mut out = HealerOut::default();
        self.healer().order(now, OrderId(u64::MAX), Order::Status, &mut out);
        let at = out.replies.iter().position(|(id, _)| *id == OrderId(u64::MAX)).expect("status is given at once");
        let (_, reply) = out.replies.remove(at);
        self.take_healer(out);
        let Reply::Status(status) = reply else { panic!("a status was asked for") };
        *status
    }

    /// All special blocks.
    pub(crate) fn list(&mut self) -> Vec<(vhost_remap::units::Block, vhost_remap::volume::map::BlockState, u8)> {
        let now = self.now;
        let mut out = HealerOut::default();
        let order = Order::List { from: Sector(0), limit: usize::MAX };
        self.healer().order(now, OrderId(u64::MAX), order, &mut out);
        let at = out.replies.iter().position(|(id, _)| *id == OrderId(u64::MAX)).expect("the list is given at once");
        let (_, reply) = out.replies.remove(at);
        self.take_healer(out);
        let Reply::List(list) = reply else { panic!("a list was asked for") };
        list
    }

    fn replied(&mut self, id: OrderId, reply: Reply) {
        let ordered = self.orders.remove(&id).expect("an order is answered once");
        trace!(self, "reply {id:?} {reply:?}");
        match (ordered, reply) {
            (Ordered::Clear(report), Reply::Done(Ok(_))) => {
                let was_poisoned = self.poisoned_at.take().is_some();
                if was_poisoned {
                    let known = report.filter(|report| !report.ranges.is_empty());
                    self.model.distrust(known.as_ref().map(|report| &report.ranges[..]));
                }
            }
            (_, Reply::Settled(settled)) => self.settled = Some(settled),
            (_, Reply::Done(done)) => self.done = Some(done),
            _ => {}
        }
    }

    fn is_metadata_write(&self, op: &Op) -> bool {
        let layout = self.config.layout();
        let data = layout.slots_start..layout.tail_start;
        op.device == DeviceIndex::SPARE && op.kind == OpKind::Write && !data.contains(&op.offset)
    }

    /// What the volume is busy with.
    fn states(&mut self) -> Vec<State> {
        let Some(engine) = &self.engine else { return vec![State::Script(self.script)] };
        let mode = engine.healer.view().mode.clone();
        let flights = || self.flights.iter().filter(|flight| flight.owner == Owner::Healer);
        let ordered = |wanted: fn(&Ordered) -> bool| self.orders.values().any(wanted);
        let mut states = [
            (State::Committing, flights().any(|flight| self.is_metadata_write(&flight.op))),
            (State::Flushing, flights().any(|flight| flight.op.kind == OpKind::Flush)),
            (State::Moving, ordered(|order| matches!(order, Ordered::Move))),
            (State::Closing, ordered(|order| matches!(order, Ordered::Close))),
            (State::Stopping, !self.stopping.is_empty()),
            (State::Poisoned, mode.poisoned),
            (State::SpareDown, !mode.spare_up),
            (State::PrimaryDown, mode.primary != PrimaryState::Up),
        ]
        .to_vec();
        let status = self.status();
        states.extend([
            (State::Repairing, status.repairs > 0),
            (State::Holding, status.held > 0),
            (State::InDoubt, status.in_doubt > 0),
            (State::SpareFull, status.free == 0),
        ]);
        let held: Vec<State> = states.into_iter().filter(|(_, held)| *held).map(|(state, _)| state).collect();
        if held.is_empty() { vec![State::Idle] } else { held }
    }

    /// A fault has struck.
    pub(crate) fn count_strike(&mut self, fault: Option<Fault>) {
        let Some(fault) = fault.filter(|_| self.strikes.is_some()) else { return };
        let states = self.states();
        self.strikes.as_mut().expect("looked at above").count(fault, &states);
    }

    /// What must be true whenever nothing is under way.
    pub(crate) fn check_quiet(&mut self) {
        let status = self.status();
        assert_eq!(status.fences, 0, "a fence stands with nobody behind it");
        assert_eq!((status.repairs, status.held), (0, 0), "repairs without requests");
        assert_eq!(self.errors_answered, self.errors_reported, "P1: one event for each error");
        let list = self.list();
        let mapped = list.iter().filter(|(_, state, _)| state.slot.is_some()).count();
        let lost: u64 = list.iter().map(|(_, state, _)| u64::from(state.lost.count_ones())).sum();
        assert!(status.live >= mapped, "{} live slots for {mapped} remapped blocks", status.live);
        assert_eq!(status.lost_sectors, lost);
        let slots = usize::try_from(self.config.max_remaps).expect("small");
        let spoken_for = slots - (status.live + status.free + status.retired);
        assert!(
            spoken_for == 0 || status.in_doubt > 0 || !status.mode.spare_up,
            "every slot is live, free or retired: {status:?}"
        );
    }

    pub(crate) fn disk(&mut self, device: DeviceIndex) -> &mut Disk {
        &mut self.disks[usize::from(device.0)]
    }
}

/// Every sector of the ranges.
pub(crate) fn sectors(ranges: &[SectorRange]) -> impl Iterator<Item = u64> + '_ {
    ranges.iter().flat_map(|range| range.start.0..range.end().0)
}
