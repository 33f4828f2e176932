//! A guest: requests on several queues, and what it makes of their answers.

use std::collections::VecDeque;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::expected::Expected;
use crate::killer::{Killed, Killer};
use crate::model::Random;
use crate::ring::{DATA_MAX, DEPTH, Device, Ring, Session, Wire};
use crate::sector::{SECTOR, Stamp};

/// Longest any request takes, retries and moves included.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// How often the driver looks whether the server was killed.
const LOOK: Duration = Duration::from_millis(5);

/// Requests of a queue that wait for others, at most.
const WAITING_MAX: usize = 16;

/// Sectors of the longest request.
pub(crate) const SECTORS_MAX: u64 = (DATA_MAX / SECTOR) as u64;

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Io {
    Read(Range<u64>),
    Write(Range<u64>, Stamp),
    /// With the permission to unmap.
    Zero(Range<u64>, bool),
    Discard(Range<u64>),
    Flush,
}

impl Io {
    pub(crate) fn sectors(&self) -> Range<u64> {
        match self {
            Io::Read(sectors) | Io::Write(sectors, _) | Io::Zero(sectors, _) | Io::Discard(sectors) => sectors.clone(),
            Io::Flush => 0..0,
        }
    }

    fn is_read(&self) -> bool {
        matches!(self, Io::Read(_))
    }

    /// What the sectors have after it.
    fn stamp(&self) -> Option<Stamp> {
        match self {
            Io::Write(_, stamp) => Some(*stamp),
            Io::Zero(..) | Io::Discard(_) => Some(Stamp::ZEROS),
            Io::Read(_) | Io::Flush => None,
        }
    }
}

/// A request under way.
struct UnderWay {
    io: Io,
    sent: Instant,
}

/// The guest, whose memory outlives servers.
pub(crate) struct Workload {
    pub(crate) device: Device,
    under_way: Vec<[Option<UnderWay>; DEPTH]>,
    session: Option<Session>,
    pub(crate) answered: u64,
}

/// How a read went, where that was not as it should.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Unread(pub(crate) Range<u64>);

impl Workload {
    pub(crate) fn new(queues: usize, tracked: bool, event_idx: bool, packed: bool) -> Workload {
        let under_way = (0..queues).map(|_| std::array::from_fn(|_| None)).collect();
        Workload { device: Device::new(queues, tracked, event_idx, packed), under_way, session: None, answered: 0 }
    }

    pub(crate) fn connect(&mut self, socket: &Path, killer: &Killer) -> Result<(), Killed> {
        self.session = None;
        match self.device.connect(socket) {
            Ok(session) => {
                self.session = Some(session);
                Ok(())
            }
            Err(error) => Err(killer.expect_kill(&format!("no connection: {error}"))),
        }
    }

    pub(crate) fn disconnect(&mut self) {
        self.session = None;
    }

    fn all(&self) -> impl Iterator<Item = &UnderWay> {
        self.under_way.iter().flatten().flatten()
    }

    /// Requests without an answer that were sent before this.
    pub(crate) fn in_flight_at(&self, time: Instant) -> usize {
        self.all().filter(|under_way| under_way.sent < time).count()
    }

    /// What is under way and changes sectors.
    pub(crate) fn unanswered_writes(&self) -> Vec<Io> {
        self.all().filter(|under_way| under_way.io.stamp().is_some()).map(|under_way| under_way.io.clone()).collect()
    }

    /// Whether a request would meet one that is under way, and one of them writes: nobody knows the order then.
    fn collides(&self, io: &Io) -> bool {
        let sectors = io.sectors();
        self.all().any(|other| {
            let others = other.io.sectors();
            !(io.is_read() && other.io.is_read()) && sectors.start < others.end && others.start < sectors.end
        })
    }

    fn send(&mut self, queue: usize, io: Io, expected: &mut Expected, random: &mut Random) {
        let slot = self.device.rings[queue].free_slot().expect("the caller has seen one");
        if let Some(stamp) = io.stamp() {
            expected.sent(&io.sectors(), stamp);
        }
        let skew = [0, 0, 512, 8, 1][usize::try_from(random.below(5)).expect("small")];
        let cut = match random.below(3) {
            0 => usize::MAX,
            1 => SECTOR,
            _ => usize::try_from(random.below(DATA_MAX as u64)).expect("small"),
        };
        let indirect = random.below(2) == 0;
        let wire = wire(&io, expected, skew, cut, indirect);
        self.under_way[queue][slot] = Some(UnderWay { io, sent: Instant::now() });
        self.device.rings[queue].submit(slot, &wire);
    }

    /// Take in the answers that are there; reads that failed go to `unread`.
    pub(crate) fn take_answers(&mut self, expected: &mut Expected, unread: &mut Vec<Unread>) -> usize {
        let mut count = 0;
        for (queue, ring) in self.device.rings.iter_mut().enumerate() {
            for answer in ring.answers() {
                let under_way = self.under_way[queue][answer.slot].take().expect("the ring knows it");
                take_in(&under_way.io, answer.status == 0, &answer.data, expected, unread);
                count += 1;
            }
        }
        self.answered += count as u64;
        count
    }

    /// Send what `next` has for each queue, as much at a time as fits, until it has nothing more and all is
    /// answered; reads that failed.
    pub(crate) fn drive(
        &mut self,
        killer: &Killer,
        expected: &mut Expected,
        random: &mut Random,
        mut next: impl FnMut(usize, &mut Random) -> Option<Io>,
    ) -> Result<Vec<Unread>, Killed> {
        let mut unread = Vec::new();
        let mut waiting: Vec<VecDeque<Io>> = self.under_way.iter().map(|_| VecDeque::new()).collect();
        let mut last_answer = Instant::now();
        loop {
            if killer.has_killed() {
                return Err(Killed);
            }
            if self.take_answers(expected, &mut unread) > 0 {
                last_answer = Instant::now();
            }
            for (queue, waiting) in waiting.iter_mut().enumerate() {
                self.fill(queue, waiting, expected, random, &mut next);
            }
            if self.all().next().is_none() && waiting.iter().all(VecDeque::is_empty) {
                return Ok(unread);
            }
            if last_answer.elapsed() > ANSWER_LIMIT {
                let stuck: Vec<&Io> = self.all().map(|under_way| &under_way.io).collect();
                let rings: Vec<String> = self.device.rings.iter().map(Ring::describe).collect();
                let count = stuck.len();
                panic!("no answer for {ANSWER_LIMIT:?}, with {count} requests under way: {stuck:?}; queues: {rings:?}");
            }
            self.device.wait(LOOK);
        }
    }

    /// Send what fits. What would meet a request that is under way waits for its end.
    fn fill(
        &mut self,
        queue: usize,
        waiting: &mut VecDeque<Io>,
        expected: &mut Expected,
        random: &mut Random,
        next: &mut impl FnMut(usize, &mut Random) -> Option<Io>,
    ) {
        while self.device.rings[queue].free_slot().is_some() {
            if let Some(at) = waiting.iter().position(|io| !self.collides(io)) {
                let io = waiting.remove(at).expect("just found");
                self.send(queue, io, expected, random);
                continue;
            }
            if waiting.len() >= WAITING_MAX {
                return;
            }
            let Some(io) = next(queue, random) else { return };
            waiting.push_back(io);
        }
    }

    /// The server is dead, and whatever it had answered is there now. What it had not answers nobody who has
    /// no in-flight region: those requests are given up.
    pub(crate) fn give_up(self) -> Vec<Range<u64>> {
        self.unanswered_writes().iter().map(Io::sectors).collect()
    }
}

fn take_in(io: &Io, is_ok: bool, data: &[u8], expected: &mut Expected, unread: &mut Vec<Unread>) {
    match (io, is_ok) {
        (Io::Read(sectors), true) => expected.check(sectors, data),
        (Io::Read(sectors), false) => {
            assert!(expected.may_fail(sectors), "a read of readable sectors {sectors:?} failed");
            unread.push(Unread(sectors.clone()));
        }
        (Io::Write(sectors, stamp), true) => expected.written(sectors, *stamp),
        (Io::Zero(sectors, _), true) => expected.written(sectors, Stamp::ZEROS),
        // What a discard leaves is for the device to say.
        (Io::Discard(_) | Io::Flush, true) => {}
        (_, false) => panic!("{io:?} failed: the spare has room, and takes writes"),
    }
}

fn wire(io: &Io, expected: &Expected, skew: usize, cut: usize, indirect: bool) -> Wire {
    let sectors = io.sectors();
    let count = sectors.end - sectors.start;
    let segment = |flags: u32| {
        let count = u32::try_from(count).expect("small");
        [&sectors.start.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    let (kind, sector, readable, writable) = match io {
        Io::Read(_) => (0, sectors.start, Vec::new(), usize::try_from(count).expect("small") * SECTOR),
        Io::Write(_, stamp) => (1, sectors.start, expected.run.content(sectors.clone(), *stamp), 0),
        Io::Flush => (4, 0, Vec::new(), 0),
        Io::Discard(_) => (11, 0, segment(0), 0),
        Io::Zero(_, unmap) => (13, 0, segment(u32::from(*unmap)), 0),
    };
    Wire { kind, sector, readable, writable, skew, cut, indirect }
}
