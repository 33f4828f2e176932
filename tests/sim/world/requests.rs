//! The guest and its requests: asked, answered against the model, given back.

use vhost_remap::device::buffer::Iovecs;
use vhost_remap::engine::event::EventKind;
use vhost_remap::engine::request::{Request, RequestOp, Status, Token};
use vhost_remap::units::SectorRange;

use super::{Asked, QUEUES, Stopping, World, sectors, trace};
use crate::config::Fault;
use crate::disk::Memory;
use crate::guest;
use crate::model::Tick;
use crate::script::Ask;

impl World {
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
        self.with_shard(shard, |shard, out| shard.submit(now, request, out));
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
        // What an earlier request left there may look just like what this one is to bring.
        let dirt = (0..sectors_of(range)).map(|_| 0xa5a5_a5a5_a5a5_a5a5);
        let data = guest::memory(dirt, &mut self.rng);
        self.reads_under_way += 1;
        (RequestOp::Read { range, data }, "read", vec![range], self.model.tick())
    }

    fn a_write(&mut self, range: SectorRange) -> (RequestOp, &'static str, Vec<SectorRange>, Tick) {
        let value = self.next_value;
        self.next_value += 1;
        let words = (0..sectors_of(range)).map(|at| guest::word(range.start.0 + u64::from(at), value));
        let data = guest::memory(words, &mut self.rng);
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

    pub(super) fn answered(&mut self, request: Request, status: Status) {
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
                    self.check_read(&asked, data);
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

    /// What a read brought is what the model admits.
    fn check_read(&mut self, asked: &Asked, data: &Iovecs) {
        let mut memory = Memory::of_request(data);
        for sector in sectors(&asked.ranges) {
            if let Err(lie) = memory.read(|bytes| self.model.read(sector, asked.start, bytes)) {
                assert!(!self.believe, "R1: {lie}");
            }
        }
        memory.end();
    }

    /// An error needs a reason that lies between the request's submission and its answer.
    fn check_justified(&mut self, asked: &Asked) {
        let since = asked.step;
        if self.read_only
            || !self.believe
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
        let told = self.events.iter().rev().find(|event| event.kind == EventKind::GuestError);
        let cause = told.map_or("", |event| &event.cause);
        assert!(justified, "{} fails without a reason ({cause}): {asked:?}", asked.what);
    }

    pub(super) fn withdrawn(&mut self, request: Request) {
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
        self.with_shard(shard, |shard, out| shard.withdraw(queue, out));
    }

    /// What came back from a queue that stops is served to its end; a queue that has stopped goes on.
    pub(crate) fn resume_queues(&mut self) {
        for at in 0..self.stopping.len() {
            let Stopping { queue, shard, .. } = self.stopping[at];
            let back = std::mem::take(&mut self.stopping[at].back);
            if back.is_empty() {
                continue;
            }
            self.with_shard(shard, |shard, out| shard.finish(queue, out));
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
}

fn sectors_of(range: SectorRange) -> u32 {
    u32::try_from(range.count).expect("small")
}
