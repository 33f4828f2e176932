//! The world: shards, healer, disks, guest and operator in one thread, one small step at a time.

use std::collections::{BTreeMap, VecDeque};

use vhost_remap::device::{Completion, DeviceIndex, Op, OpKind};
use vhost_remap::engine::event::Event;
use vhost_remap::engine::healer::{Healer, HealerOut, HealerStatus, Order, OrderId, PoisonReport, Reply};
use vhost_remap::engine::message::{ToHealer, ToShard};
use vhost_remap::engine::request::{Answer, Request, RequestOp, Status, Token};
use vhost_remap::engine::shard::{Shard, ShardOut};
use vhost_remap::units::{Sector, SectorRange, Time};

use crate::brief::{brief, brief_back};
use crate::config::Config;
use crate::disk::Disk;
use crate::every_io::plan::Plan;
use crate::guest::{self, SECTOR, Value};
use crate::model::{Model, Tick};
use crate::rng::Rng;

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
    Other,
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
    stopping: Vec<(u16, usize)>,
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
    pub(crate) verbose: bool,
    /// For copying.
    scratch: Vec<u8>,
    /// Nothing is left to chance: the oldest thing that can happen does, and this says what fails.
    pub(crate) plan: Option<Plan>,
}

macro_rules! trace {
    ($world:expr, $($arg:tt)*) => {
        if $world.verbose {
            eprintln!("{:6} {:>12} {}", $world.step, $world.now.0, format_args!($($arg)*));
        }
    };
}
pub(crate) use trace;

impl World {
    pub(crate) fn new(seed: u64, verbose: bool) -> World {
        let mut rng = Rng::new(seed);
        let config = Config::of(&mut rng);
        World::with(config, rng, verbose)
    }

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
        if verbose {
            eprintln!("{config:?}");
        }
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
            scratch: Vec::new(),
            plan: None,
            config,
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

    pub(crate) fn submit(&mut self, owner: Owner, ops: Vec<Op>, slow: bool) {
        for op in ops {
            let disk = &self.disks[usize::from(op.device.0)];
            assert!(
                !self.read_only || matches!(op.kind, OpKind::Read | OpKind::Identify | OpKind::Flush),
                "a read-only volume is written: {op:?}"
            );
            let mut latency = 1 + disk.hesitation_ns(&op);
            if self.plan.is_none() {
                latency += self.rng.below(20_000);
            }
            if slow && self.rng.percent(3) {
                latency += self.rng.below(12_000_000_000);
                trace!(self, "slow: {:?} takes {latency} ns", op);
            }
            let durable_to = disk.completed();
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

    // ---- steps

    fn take_shard(&mut self, shard: usize, out: ShardOut) {
        let slow = self.config.has(&[crate::config::Fault::Latency]);
        self.submit(Owner::Shard(shard), out.ops, slow);
        self.to_healer[shard].extend(out.to_healer);
        for Answer { request, status } in out.answers {
            self.answered(request, status);
        }
        for request in out.withdrawn {
            self.withdrawn(&request);
        }
    }

    fn take_healer(&mut self, out: HealerOut) {
        let slow = self.config.has(&[crate::config::Fault::Latency]);
        self.submit(Owner::Healer, out.ops, slow);
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
                "spare-down" => {
                    (self.gone[1], self.poisoning) = (true, false);
                    // The attempt to retire a place may be on the other one although it failed.
                    self.retired = true;
                }
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
        let shards = self.config.shards;
        let busy: Vec<usize> = (0..2 * shards)
            .filter(
                |i| if *i < shards { !self.to_healer[*i].is_empty() } else { !self.to_shard[*i - shards].is_empty() },
            )
            .collect();
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
        match (busy.is_empty(), flight) {
            (true, None) => false,
            (false, None) => {
                self.deliver(&busy);
                true
            }
            (true, Some(flight)) => {
                self.complete(flight);
                true
            }
            (false, Some(flight)) => {
                if self.choose(2) == 0 {
                    self.deliver(&busy)
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

    fn deliver(&mut self, busy: &[usize]) {
        let (shards, now) = (self.config.shards, self.now);
        let channel = busy[self.choose(busy.len())];
        let engine = self.engine.as_mut().expect("the volume is open");
        if channel < shards {
            let message = self.to_healer[channel].pop_front().expect("busy");
            trace!(self, "shard {channel} -> healer: {}", brief(&message));
            let mut out = HealerOut::default();
            engine.healer.message(now, message, &mut out);
            self.take_healer(out);
        } else {
            let shard = channel - shards;
            let message = self.to_shard[shard].pop_front().expect("busy");
            trace!(self, "healer -> shard {shard}: {}", brief_back(&message));
            let mut out = ShardOut::default();
            engine.shards[shard].message(now, message, &mut out);
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

    fn some_range(&mut self) -> SectorRange {
        let unit = if self.rng.percent(85) { self.config.logical.into_iter().max().unwrap_or(512) / 512 } else { 1 };
        let capacity = self.config.capacity;
        if self.rng.percent(30) {
            let block = self.rng.pick(&self.config.weak.clone());
            let first = block * 8 + if self.rng.percent(50) { 0 } else { self.rng.below(8) / unit * unit };
            let start = first.min(capacity - 1) / unit * unit;
            let count = (1 + self.rng.below(8)).next_multiple_of(unit).min(capacity - start);
            return SectorRange { start: Sector(start), count };
        }
        let limit = if self.rng.percent(80) { (self.config.hot * 8).min(capacity) } else { capacity };
        let unit = if self.rng.percent(40) { 8 } else { unit };
        let start = self.rng.below(limit) / unit * unit;
        let longest = if self.rng.percent(10) { 200 } else { 24 };
        let count = ((1 + self.rng.below(longest)).next_multiple_of(unit)).min(capacity - start);
        SectorRange { start: Sector(start), count }
    }

    /// The guest asks for something.
    pub(crate) fn ask(&mut self) {
        let range = self.some_range();
        let kind = self.rng.below(100);
        let value = self.next_value;
        match kind {
            0..45 => self.ask_write(range, value),
            45..80 => self.ask_read(range),
            80..90 => self.ask_flush(),
            90..96 => self.ask_zeroes(range),
            _ if self.config.discards => self.ask_some_discard(range),
            _ => self.ask_read(range),
        }
    }

    pub(crate) fn ask_read(&mut self, range: SectorRange) {
        let data = guest::memory(usize::try_from(range.bytes()).expect("small"), &mut self.rng);
        // What an earlier request left there may look just like what this one is to bring.
        self.scratch.clear();
        self.scratch.resize(data.len(), 0xa5);
        data.copy_from(0, &self.scratch);
        self.reads_under_way += 1;
        let start = self.model.tick();
        self.ask_for(RequestOp::Read { range, data }, "read", vec![range], start, false);
    }

    pub(crate) fn ask_write(&mut self, range: SectorRange, value: Value) {
        self.next_value += 1;
        let data = guest::memory(usize::try_from(range.bytes()).expect("small"), &mut self.rng);
        self.scratch.resize(data.len(), 0);
        for (sector, bytes) in sectors(&[range]).zip(self.scratch.chunks_exact_mut(SECTOR)) {
            guest::fill(bytes, sector, value);
        }
        data.copy_from(0, &self.scratch);
        let start = self.model.begin(sectors(&[range]), value);
        let through = self.config.write_through && self.rng.percent(20);
        self.ask_for(RequestOp::Write { range, data }, "write", vec![range], start, through);
    }

    pub(crate) fn ask_flush(&mut self) {
        let start = self.model.tick();
        self.ask_for(RequestOp::Flush, "flush", Vec::new(), start, false);
    }

    pub(crate) fn ask_zeroes(&mut self, range: SectorRange) {
        let start = self.model.begin(sectors(&[range]), 0);
        let through = self.config.write_through && self.rng.percent(20);
        let ranges = vec![(range, self.rng.percent(50))];
        self.ask_for(RequestOp::WriteZeroes { ranges }, "zeroes", vec![range], start, through);
    }

    fn ask_some_discard(&mut self, range: SectorRange) {
        let mut ranges = vec![range];
        let more = self.some_range();
        if self.rng.percent(30) && (more.end() <= range.start || range.end() <= more.start) {
            ranges.push(more);
        }
        self.ask_discard(ranges);
    }

    pub(crate) fn ask_discard(&mut self, ranges: Vec<SectorRange>) {
        let start = self.model.begin(sectors(&ranges), 0);
        self.ask_for(RequestOp::Discard { ranges: ranges.clone() }, "discard", ranges, start, false);
    }

    fn ask_for(
        &mut self,
        op: RequestOp,
        what: &'static str,
        ranges: Vec<SectorRange>,
        start: Tick,
        write_through: bool,
    ) {
        let mut shard = self.rng.index(self.config.shards);
        let mut queue = 0;
        // A queue that is being reset takes nothing; where all are, the first one opens again in time.
        for _ in 0..16 {
            shard = self.rng.index(self.config.shards);
            queue = u16::try_from(shard).expect("few") * QUEUES + u16::try_from(self.rng.below(2)).expect("few");
            if self.stopping.iter().all(|(stopping, _)| *stopping != queue) {
                break;
            }
        }
        let token = self.next_token;
        self.next_token += 1;
        trace!(
            self,
            "guest {token}: {what} {ranges:?} value {} through {write_through} shard {shard}",
            self.next_value - 1
        );
        self.asked.insert(token, Asked { queue, what, ranges, start, events: self.events.len(), step: self.step });
        let request = Request { token: Token(token), queue, write_through, op };
        let now = self.now;
        let mut out = ShardOut::default();
        self.engine.as_mut().expect("open").shards[shard].submit(now, request, &mut out);
        self.take_shard(shard, out);
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
                    self.scratch.resize(data.len(), 0);
                    data.copy_to(0, &mut self.scratch);
                    for (sector, bytes) in sectors(&asked.ranges).zip(self.scratch.chunks_exact(SECTOR)) {
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
            || self.config.has(&[crate::config::Fault::Latency])
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
                    let unit = self.config.logical.into_iter().max().unwrap_or(512) / 512;
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

    fn withdrawn(&mut self, request: &Request) {
        let token = request.token.0;
        let asked = self.asked.remove(&token).unwrap_or_else(|| panic!("request {token} ends twice"));
        trace!(self, "withdrawn {token}: {asked:?}");
        match asked.what {
            "read" => self.reads_under_way -= 1,
            "flush" => {}
            _ => self.model.end(sectors(&asked.ranges), asked.start, false),
        }
    }

    /// Reset a queue, or go on with those whose reset is complete.
    pub(crate) fn reset_queue(&mut self) {
        let shard = self.rng.index(self.config.shards);
        let queue = u16::try_from(shard).expect("few") * QUEUES;
        if self.stopping.iter().any(|(stopping, _)| *stopping == queue) {
            return;
        }
        trace!(self, "withdraw queue {queue} of shard {shard}");
        self.stopping.push((queue, shard));
        let mut out = ShardOut::default();
        self.engine.as_mut().expect("open").shards[shard].withdraw(queue, &mut out);
        self.take_shard(shard, out);
    }

    pub(crate) fn resume_queues(&mut self) {
        let engine = self.engine.as_mut().expect("open");
        let asked = &self.asked;
        self.stopping.retain(|(queue, shard)| {
            let left = engine.shards[*shard].unanswered(*queue);
            assert_eq!(left, asked.values().filter(|asked| asked.queue == *queue).count(), "unanswered of {queue}");
            if left == 0 {
                engine.shards[*shard].resume(*queue);
            }
            left > 0
        });
    }

    // ---- the operator

    pub(crate) fn order(&mut self, order: Order) {
        let id = OrderId(self.next_order);
        self.next_order += 1;
        trace!(self, "order {order:?}");
        let ordered = match &order {
            Order::Clear => Ordered::Clear(self.status().poison),
            _ => Ordered::Other,
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

    pub(crate) fn some_order(&mut self) {
        let range = self.some_range();
        let few = SectorRange { count: range.count.min(24), ..range };
        let order = match self.rng.below(8) {
            0..3 => Order::Remap(few),
            3..6 => Order::Release(few),
            6 => Order::Save,
            _ => Order::Clear,
        };
        self.order(order);
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
