//! The volume while it is open: healer, shard, guest and operator in one thread.

use std::collections::VecDeque;
use std::sync::Arc;

use vhost_remap::device::buffer::{AlignedBuf, Iovecs};
use vhost_remap::engine::event::{Event, EventKind};
use vhost_remap::engine::healer::{Healer, HealerOut, HealerStatus, Order, OrderId, Reply};
use vhost_remap::engine::message::{ToHealer, ToShard};
use vhost_remap::engine::request::{Answer, Request, RequestOp, Status, Token};
use vhost_remap::engine::scan::{LastPass, ScanOrder, ScanScope, ScanState};
use vhost_remap::engine::shard::{Shard, ShardOut};
use vhost_remap::units::{Block, Sector, SectorRange, Time};
use vhost_remap::volume::superblock::CloseStamp;

use super::rig::{Cut, MTIME, Rig, range_of};
use super::seat::Entry;

/// The open volume.
pub(crate) struct Engine {
    healer: Healer,
    shard: Shard,
    to_healer: VecDeque<ToHealer>,
    to_shard: VecDeque<ToShard>,
    answers: Vec<Answer>,
    replies: Vec<(OrderId, Reply)>,
    pub(crate) events: Vec<Event>,
    now: Time,
    asked: u32,
}

impl Engine {
    pub(crate) fn new(healer: Healer) -> Engine {
        let shard = Shard::new(0, healer.view(), healer.progress());
        Engine {
            healer,
            shard,
            to_healer: VecDeque::new(),
            to_shard: VecDeque::new(),
            answers: Vec::new(),
            replies: Vec::new(),
            events: Vec::new(),
            now: Time(0),
            asked: 0,
        }
    }

    /// The first turn, to the end of what it began.
    pub(crate) fn start(&mut self, rig: &mut Rig) {
        self.pass(rig, 0).expect("no end was set");
    }

    fn take_healer(&mut self, rig: &mut Rig, mut out: HealerOut) {
        rig.submit(0, &mut out.ops);
        self.to_shard.extend(out.to_shards.into_iter().map(|(_, message)| message));
        self.replies.append(&mut out.replies);
        self.events.append(&mut out.events);
    }

    fn take_shard(&mut self, rig: &mut Rig, mut out: ShardOut) {
        rig.submit(1, &mut out.ops);
        self.to_healer.extend(out.to_healer);
        self.answers.append(&mut out.answers);
    }

    /// One message or one operation; `false` where there is neither.
    pub(crate) fn step(&mut self, rig: &mut Rig) -> Result<bool, Cut> {
        let (mut rare, mut fast) = (HealerOut::default(), ShardOut::default());
        if let Some(message) = self.to_healer.pop_front() {
            self.healer.message(self.now, message, &mut rare);
        } else if let Some(message) = self.to_shard.pop_front() {
            self.shard.message(self.now, message, &mut fast);
        } else if rig.disks.pending_len() > 0 {
            let (queue, completion) = rig.perform()?;
            if completion.result.is_err() || rig.was_slow() {
                self.now = self.now.plus_secs(rig.failing_seconds);
            }
            match queue {
                0 => self.healer.completed(self.now, completion, &mut rare),
                _ => self.shard.completed(self.now, completion, &mut fast),
            }
        } else {
            return Ok(false);
        }
        self.take_healer(rig, rare);
        self.take_shard(rig, fast);
        Ok(true)
    }

    /// Go on until nothing is under way.
    pub(crate) fn settle(&mut self, rig: &mut Rig) -> Result<(), Cut> {
        while self.step(rig)? {}
        Ok(())
    }

    /// Let time pass.
    pub(crate) fn pass(&mut self, rig: &mut Rig, seconds: u64) -> Result<(), Cut> {
        self.tick(rig, seconds);
        self.settle(rig)
    }

    /// Let time pass, and do nothing yet of what comes of it.
    pub(crate) fn tick(&mut self, rig: &mut Rig, seconds: u64) {
        self.now = self.now.plus_secs(seconds);
        let mut out = HealerOut::default();
        self.healer.tick(self.now, &mut out);
        self.take_healer(rig, out);
    }

    fn submit(&mut self, rig: &mut Rig, op: RequestOp) -> Token {
        self.asked += 1;
        let token = Token(self.asked);
        let mut out = ShardOut::default();
        self.shard.submit(self.now, Request { token, queue: 0, write_through: false, op }, &mut out);
        self.take_shard(rig, out);
        token
    }

    /// Submit a write without waiting for it.
    pub(crate) fn begin_write(&mut self, rig: &mut Rig, sector: u64, bytes: &[u8]) -> Token {
        let (range, len) = (range_of(sector, bytes.len()), bytes.len());
        let data = Iovecs::of_buffer(&Arc::new(AlignedBuf::copy_of(bytes)), 0, len);
        self.submit(rig, RequestOp::Write { range, data })
    }

    /// Submit a read without waiting for it.
    pub(crate) fn begin_read(&mut self, rig: &mut Rig, sector: u64, count: u64) -> Token {
        let bytes = usize::try_from(count * 512).expect("small");
        let data = Iovecs::of_buffer(&Arc::new(AlignedBuf::zeroed(bytes)), 0, bytes);
        self.submit(rig, RequestOp::Read { range: range_of(sector, bytes), data })
    }

    pub(crate) fn discard(&mut self, rig: &mut Rig, sector: u64, count: u64) {
        let ranges = vec![SectorRange { start: Sector(sector), count }];
        let token = self.submit(rig, RequestOp::Discard { ranges });
        self.settle(rig).expect("no end was set");
        assert_eq!(self.answer(token), Some(Status::Ok));
    }

    /// How a request ended, if it has.
    pub(crate) fn answer(&self, token: Token) -> Option<Status> {
        self.answers.iter().find(|answer| answer.request.token == token).map(|answer| answer.status)
    }

    /// Go on until a request is answered, and no further.
    pub(crate) fn await_answer(&mut self, rig: &mut Rig, token: Token) -> Result<Status, Cut> {
        loop {
            if let Some(status) = self.answer(token) {
                return Ok(status);
            }
            assert!(self.step(rig)?, "request {token:?} is never answered");
        }
    }

    pub(crate) fn write(&mut self, rig: &mut Rig, sector: u64, bytes: &[u8]) -> Result<Status, Cut> {
        let token = self.begin_write(rig, sector, bytes);
        let status = self.await_answer(rig, token)?;
        self.settle(rig)?;
        Ok(status)
    }

    /// Submit a flush without waiting for it.
    pub(crate) fn begin_flush(&mut self, rig: &mut Rig) -> Token {
        self.submit(rig, RequestOp::Flush)
    }

    pub(crate) fn flush(&mut self, rig: &mut Rig) -> Result<Status, Cut> {
        let token = self.submit(rig, RequestOp::Flush);
        let status = self.await_answer(rig, token)?;
        self.settle(rig)?;
        Ok(status)
    }

    /// What a read gives; `None` where it fails.
    pub(crate) fn read(&mut self, rig: &mut Rig, sector: u64, count: u64) -> Option<Vec<u8>> {
        let token = self.begin_read(rig, sector, count);
        self.settle(rig).expect("no end was set");
        self.content(token)
    }

    /// What a read gave that is answered; `None` where it failed.
    pub(crate) fn content(&self, token: Token) -> Option<Vec<u8>> {
        let answer = self.answers.iter().find(|answer| answer.request.token == token).expect("answered");
        let RequestOp::Read { data, .. } = &answer.request.op else { panic!("the request comes back as it went") };
        let mut bytes = vec![0; data.len()];
        data.copy_to(0, &mut bytes);
        (answer.status == Status::Ok).then_some(bytes)
    }

    /// Give an order without waiting for its answer.
    pub(crate) fn begin_order(&mut self, rig: &mut Rig, order: Order) -> OrderId {
        self.asked += 1;
        let id = OrderId(u64::from(self.asked));
        let mut out = HealerOut::default();
        self.healer.order(self.now, id, order, &mut out);
        self.take_healer(rig, out);
        id
    }

    pub(crate) fn order(&mut self, rig: &mut Rig, order: Order) -> Result<Reply, Cut> {
        let id = self.begin_order(rig, order);
        self.settle(rig)?;
        let at = self.replies.iter().position(|(of, _)| *of == id).expect("an order is answered");
        Ok(self.replies.remove(at).1)
    }

    pub(crate) fn is_answered(&self, order: OrderId) -> bool {
        self.reply(order).is_some()
    }

    /// The answer to an order, if there is one.
    pub(crate) fn reply(&self, order: OrderId) -> Option<&Reply> {
        self.replies.iter().find(|(id, _)| *id == order).map(|(_, reply)| reply)
    }

    /// Whether there is something to do beside what the rig holds.
    pub(crate) fn is_busy_but_for_held(&self, rig: &Rig) -> bool {
        !self.to_healer.is_empty() || !self.to_shard.is_empty() || rig.next_op().is_some()
    }

    /// Go on as long as there is.
    pub(crate) fn settle_but_for_held(&mut self, rig: &mut Rig) -> Result<(), Cut> {
        while self.is_busy_but_for_held(rig) {
            self.step(rig)?;
        }
        Ok(())
    }

    /// Why an order is refused.
    pub(crate) fn refused(&mut self, rig: &mut Rig, order: Order) -> String {
        match self.order(rig, order).expect("no end was set") {
            Reply::Done(Err(why)) => why,
            reply => panic!("{reply:?}"),
        }
    }

    /// The server is told to end.
    pub(crate) fn wind_down(&mut self) {
        self.healer.wind_down();
    }

    /// Begin a pass of the scanner.
    pub(crate) fn begin_scan(&mut self, rig: &mut Rig, scope: ScanScope) {
        self.done(rig, Order::Scan(ScanOrder::Start(scope)));
    }

    /// Let time pass until no pass is under way; what came of the last one.
    pub(crate) fn end_scan(&mut self, rig: &mut Rig) -> LastPass {
        for _ in 0..1000 {
            if self.status(rig).scan.state != ScanState::Running {
                return self.status(rig).scan.last.expect("one has ended");
            }
            self.pass(rig, 1).expect("no end was set");
        }
        panic!("a pass does not end: {:?}", self.status(rig).scan);
    }

    /// One pass over everything.
    pub(crate) fn scan(&mut self, rig: &mut Rig) -> LastPass {
        self.begin_scan(rig, ScanScope::default());
        self.end_scan(rig)
    }

    /// An order that must be carried out.
    pub(crate) fn done(&mut self, rig: &mut Rig, order: Order) {
        match self.order(rig, order).expect("no end was set") {
            Reply::Done(result) => _ = result.unwrap_or_else(|why| panic!("refused: {why}")),
            reply => panic!("{reply:?}"),
        }
    }

    pub(crate) fn status(&mut self, rig: &mut Rig) -> HealerStatus {
        self.settle(rig).expect("no end was set");
        self.status_now(rig)
    }

    /// In the middle of what is under way.
    pub(crate) fn status_now(&mut self, rig: &mut Rig) -> HealerStatus {
        let id = self.begin_order(rig, Order::Status);
        let at = self.replies.iter().position(|(of, _)| *of == id).expect("answered at once");
        match self.replies.remove(at).1 {
            Reply::Status(status) => *status,
            reply => panic!("{reply:?}"),
        }
    }

    /// Let a pass come so far, and no further.
    pub(crate) fn scan_until(&mut self, rig: &mut Rig, covered: u64) {
        self.tick(rig, 1);
        while self.status_now(rig).scan.covered < covered {
            assert!(self.step(rig).expect("no end was set"), "a pass does not go on");
        }
    }

    /// Close cleanly.
    pub(crate) fn close(&mut self, rig: &mut Rig) -> Result<Result<(), String>, Cut> {
        let sample_crc = match self.order(rig, Order::Settle)? {
            Reply::Settled(Ok(crc)) => crc,
            Reply::Settled(Err(why)) => return Ok(Err(why)),
            reply => panic!("{reply:?}"),
        };
        let stamp = CloseStamp { size: rig.shape.sizes()[0], mtime_ns: MTIME, sample_crc, write_through: false };
        match self.order(rig, Order::Seal(stamp))? {
            Reply::Done(result) => Ok(result.map(drop)),
            reply => panic!("{reply:?}"),
        }
    }

    pub(crate) fn is_poisoned(&self) -> bool {
        self.healer.view().mode.poisoned
    }

    /// The map as (block, slot, lost sectors, primary stale), in the order of blocks.
    pub(crate) fn map(&self) -> Vec<Entry> {
        let view = self.healer.view();
        let entries = view
            .map
            .iter_from(Block(0))
            .filter_map(|(block, state)| Some((block.0, state.slot?.0, state.lost, state.primary_stale)));
        entries.collect()
    }

    /// Causes of the events of a kind.
    pub(crate) fn causes(&self, kind: &str) -> Vec<&str> {
        let kind: EventKind = kind.parse().expect("a kind of events");
        self.events.iter().filter(|event| event.kind == kind).map(|event| &*event.cause).collect()
    }
}
