//! What a run does: a list of deeds of guest, operator, devices and power, made from the seed before the run
//! begins. When each of them comes, and in which order messages and completions go, is the schedule's
//! affair, so that a deed that is left out changes nothing of the others.

use vhost_remap::engine::healer::Order;
use vhost_remap::engine::scan::{ScanOrder, ScanParams, ScanScope};
use vhost_remap::units::{Sector, SectorRange};

use crate::config::{Config, Fault};
use crate::faults::Trouble;
use crate::rng::Rng;
use crate::world::QUEUES;

/// Requests of a run, at least.
const REQUESTS_MIN: u64 = 200;
/// Faults of a run, at least.
const FAULTS_MIN: usize = 3;

/// Makes another seed of a seed.
const GROWING: u64 = 0x6772_6f77_6772_6f77;

/// Makes yet another.
const SCANNING: u64 = 0x7363_616e_7363_616e;

/// What the guest asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    Read(SectorRange),
    Write(SectorRange),
    Flush,
    Zeroes(SectorRange, bool),
    Discard(Vec<SectorRange>),
}

/// What becomes of the devices while nobody uses them, and how the next opening goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reopening {
    /// Sectors of metadata that are damaged, in one place.
    pub(crate) damage: Vec<u64>,
    /// Devices whose passing troubles are over.
    pub(crate) over: [bool; 2],
    /// Further attempts at opening that are cut after so many operations.
    pub(crate) cuts: Vec<u64>,
    pub(crate) read_only: bool,
}

/// One step of a script.
#[derive(Clone, Debug)]
pub(crate) enum Deed {
    /// The guest asks, in that queue (or the next one that is not stopping).
    Ask { ask: Ask, queue: u16, write_through: bool },
    /// Something breaks, or comes back.
    Fault(Trouble),
    /// The operator orders.
    Order(Order),
    /// The operator has the disk grow by so many blocks.
    Resize(u64),
    /// The guest writes, or reads, sectors by which the disk has grown, if it has: so many from there on, as far as
    /// there are any.
    Beyond { write: bool, at: u64, count: u64, queue: u16 },
    /// A queue stops: its parked requests come back, and with `finish` are served to their end.
    Reset { queue: u16, finish: bool },
    /// The scanner reads for a while.
    ScanThrough,
    /// Until everything is answered.
    Settle,
    /// The devices are back: they must be in use again within seconds.
    Return,
    /// A clean close.
    Close(Reopening),
    /// The process ends after so many more steps, and maybe the power goes.
    Crash { after: u64, power: bool, reopening: Reopening },
}

/// A whole run.
pub(crate) struct Script {
    pub(crate) config: Config,
    pub(crate) deeds: Vec<Deed>,
}

impl Script {
    pub(crate) fn of(seed: u64) -> Script {
        let mut rng = Rng::new(seed);
        let mut config = Config::of(&mut rng);
        // By a chance of its own, as below.
        let mut scanning = Rng::new(seed ^ SCANNING);
        if scanning.percent(15) {
            let interval = scanning.percent(30).then(|| 600 + scanning.below(1200));
            config.scan = ScanParams { interval, move_weak: scanning.percent(60), ..ScanParams::default() };
        }
        let mut author = Author { config: &config, rng };
        let mut deeds = author.deeds();
        // By a chance of its own: what else a seed does is what it did before disks grew.
        author.rng = Rng::new(seed ^ GROWING);
        if author.rng.percent(15) {
            author.grow(&mut deeds);
        }
        author.rng = scanning;
        if author.config.scan != ScanParams::default() || author.rng.percent(10) {
            author.scan(&mut deeds);
        }
        Script { config, deeds }
    }
}

struct Author<'a> {
    config: &'a Config,
    rng: Rng,
}

impl Author<'_> {
    fn deeds(&mut self) -> Vec<Deed> {
        let requests = REQUESTS_MIN + self.rng.below(8);
        let ends = 1 + self.rng.below(3);
        let mut deeds = Vec::with_capacity(usize::try_from(requests).expect("few") * 3 / 2);
        if self.config.remapped > 0 {
            let all = SectorRange { start: Sector(0), count: self.config.remapped * 8 };
            deeds.push(Deed::Order(Order::Remap(all)));
        }
        for number in 0..requests {
            let ask = self.ask();
            deeds.push(ask);
            let config = self.config;
            if self.rng.below(1000) < config.fault_rate {
                deeds.push(self.fault());
            }
            if self.rng.below(1000) < config.order_rate {
                deeds.push(self.order());
            }
            if self.rng.below(1000) < config.reset_rate {
                let (queue, finish) = (self.queue(), self.rng.percent(50));
                deeds.push(Deed::Reset { queue, finish });
            }
            match self.rng.below(200) {
                0 => deeds.push(Deed::Settle),
                1 => deeds.push(Deed::Return),
                _ => {}
            }
            if (number + 1) * ends / requests > number * ends / requests {
                let mut end = self.end(number + 1 == requests);
                if self.config.prepared.is_some() && self.rng.percent(80) {
                    if self.rng.percent(50) {
                        deeds.extend([Deed::Order(Order::Clear), Deed::Settle]);
                    }
                    let order = self.order_of_many();
                    deeds.push(order);
                    if let Deed::Crash { after, .. } = &mut end {
                        // In the middle of the commit, with luck.
                        *after = self.rng.below(50);
                    }
                }
                deeds.push(end);
            }
        }
        let faults = deeds.iter().filter(|deed| matches!(deed, Deed::Fault(_))).count();
        for _ in faults..FAULTS_MIN {
            let (at, fault) = (self.rng.index(deeds.len()), self.fault());
            deeds.insert(at, fault);
        }
        deeds
    }

    /// Let the disk grow here and there, by less or more than a label takes, and be used where it has.
    fn grow(&mut self, deeds: &mut Vec<Deed>) {
        for _ in 0..=self.rng.below(2) {
            let (at, few) = (self.rng.index(deeds.len()), self.rng.percent(50));
            let blocks = if few { 1 + self.rng.below(8) } else { 200 + self.rng.below(400) };
            deeds.insert(at, Deed::Resize(blocks));
        }
        let first = deeds.iter().position(|deed| matches!(deed, Deed::Resize(_))).expect("just put there");
        for _ in 0..20 + self.rng.below(40) {
            let (write, far) = (self.rng.percent(60), self.rng.percent(50));
            let (at, count) = (self.rng.below(if far { 4096 } else { 16 }), 1 + self.rng.below(16));
            let beyond = Deed::Beyond { write, at, count, queue: self.queue() };
            let place = first + 1 + self.rng.index(deeds.len() - first);
            deeds.insert(place, beyond);
        }
    }

    /// Passes of the scanner here and there, or parts of them.
    fn scan(&mut self, deeds: &mut Vec<Deed>) {
        for _ in 0..3 + self.rng.below(6) {
            let range = self.rng.percent(30).then(|| self.range());
            let scope = ScanScope { range, check_only: self.rng.percent(20) };
            let mut some = vec![Deed::Order(Order::Scan(ScanOrder::Start(scope)))];
            match self.rng.below(8) {
                0 => some.push(Deed::Order(Order::Scan(ScanOrder::Pause))),
                1 => some.push(Deed::Order(Order::Scan(ScanOrder::Cancel))),
                2 => some.extend([ScanOrder::Pause, ScanOrder::Resume].map(|order| Deed::Order(Order::Scan(order)))),
                3 => {}
                _ => some.push(Deed::ScanThrough),
            }
            let at = self.rng.index(deeds.len());
            deeds.splice(at..at, some);
        }
    }

    /// How a session ends; the last one of a run crashes in any case.
    fn end(&mut self, last: bool) -> Deed {
        let reopening = self.reopening();
        if !last && self.rng.percent(40) {
            return Deed::Close(reopening);
        }
        let longest = self.rng.pick(&[1, 20, 400]);
        Deed::Crash { after: self.rng.below(longest), power: self.rng.percent(70), reopening }
    }

    fn reopening(&mut self) -> Reopening {
        let mut reopening = Reopening {
            over: [self.rng.percent(50), self.rng.percent(50)],
            read_only: self.rng.percent(3),
            ..Reopening::default()
        };
        while self.rng.percent(10) {
            reopening.cuts.push(self.rng.below(30));
        }
        if self.config.has(&[Fault::MetadataDamage]) {
            let sectors = self.config.place_sectors();
            reopening.damage = (0..self.rng.below(4)).map(|_| self.rng.below(sectors)).collect();
        }
        reopening
    }

    fn queue(&mut self) -> u16 {
        u16::try_from(self.rng.index(self.config.shards * usize::from(QUEUES))).expect("few")
    }

    fn fault(&mut self) -> Deed {
        let fault = self.rng.pick(&self.config.faults);
        Deed::Fault(Trouble::of(fault, self.config, &mut self.rng))
    }

    fn order(&mut self) -> Deed {
        let range = self.range();
        let few = SectorRange { count: range.count.min(24), ..range };
        Deed::Order(match self.rng.below(8) {
            0..3 => Order::Remap(few),
            3..6 => Order::Release(few),
            6 => Order::Save,
            _ => Order::Clear,
        })
    }

    /// Blocks move whose entries do not share a sector with the header of their page.
    fn order_of_many(&mut self) -> Deed {
        let (used, blocks) = (self.config.used(), self.config.capacity / 8);
        let remap = self.rng.percent(60);
        let first = if remap { used } else { Config::NEAR_HEADER + self.rng.below(used - Config::NEAR_HEADER) };
        let range = SectorRange { start: Sector(first * 8), count: (1 + self.rng.below(8)).min(blocks - first) * 8 };
        Deed::Order(if remap { Order::Remap(range) } else { Order::Release(range) })
    }

    fn ask(&mut self) -> Deed {
        let range = self.range();
        let ask = match self.rng.below(100) {
            0..45 => Ask::Write(range),
            45..80 => Ask::Read(range),
            80..90 => Ask::Flush,
            90..96 => Ask::Zeroes(range, self.rng.percent(50)),
            _ if self.config.discards => Ask::Discard(self.ranges(range)),
            _ => Ask::Read(range),
        };
        let write_through = self.config.write_through && self.rng.percent(20);
        Deed::Ask { ask, queue: self.queue(), write_through }
    }

    fn ranges(&mut self, first: SectorRange) -> Vec<SectorRange> {
        let more = self.range();
        let apart = more.end() <= first.start || first.end() <= more.start;
        if apart && self.rng.percent(30) { vec![first, more] } else { vec![first] }
    }

    fn range(&mut self) -> SectorRange {
        let config = self.config;
        let rng = &mut self.rng;
        let unit = if rng.percent(85) { config.unit() } else { 1 };
        let capacity = config.capacity;
        if rng.percent(30) {
            let block = rng.pick(&config.weak);
            let first = block * 8 + if rng.percent(50) { 0 } else { rng.below(8) / unit * unit };
            let start = first.min(capacity - 1) / unit * unit;
            let count = (1 + rng.below(8)).next_multiple_of(unit).min(capacity - start);
            return SectorRange { start: Sector(start), count };
        }
        let limit = if rng.percent(80) { (config.hot * 8).min(capacity) } else { capacity };
        let unit = if rng.percent(40) { 8 } else { unit };
        let start = rng.below(limit) / unit * unit;
        let longest = if rng.percent(1) { 200 } else { 16 };
        let count = ((1 + rng.below(longest)).next_multiple_of(unit)).min(capacity - start);
        SectorRange { start: Sector(start), count }
    }
}
