//! A disk in memory with a volatile and a durable half, and with every way to fail that the contract
//! claims to survive.
//!
//! A write that completed is visible at once and durable after a flush that was submitted later. Until
//! then a power cut may leave any of its sectors at any of the values it had since the last flush. A
//! failed flush may drop what it did not write: such a sector still reads as written, and no later flush
//! makes it durable.

mod image;
mod memory;
mod size;
mod store;
mod torn;
mod trouble;

use std::collections::BTreeMap;
use std::ops::Range;

use vhost_remap::device::{Errno, Op, OpKind};

use crate::config::Fault;
use crate::guest::SECTOR;
use crate::rng::Rng;
pub(crate) use memory::Memory;
use store::{Cache, Content, Store};
pub(crate) use torn::tables;
use trouble::strike;
pub(crate) use trouble::{Astray, Bad, Effect, Late, Until};

/// No flush makes a version with this number durable.
const NEVER: u64 = u64::MAX;

/// One device.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    pub(crate) name: &'static str,
    pub(crate) logical: u64,
    store: Store,
    current: Vec<Content>,
    cache: Cache,
    /// Writes completed so far.
    completed: u64,
    pub(crate) bad_reads: BTreeMap<usize, Bad>,
    pub(crate) bad_writes: BTreeMap<usize, Bad>,
    /// How much longer an operation takes that will fail on a bad sector, in nanoseconds.
    pub(crate) failing_ns: u64,
    /// Everything fails.
    pub(crate) gone: bool,
    /// So many operations fail with that error, wherever they go.
    pub(crate) burst: (u32, i32),
    /// So many writes find no space.
    pub(crate) full: u32,
    /// So many flushes fail.
    pub(crate) bad_flushes: u32,
    pub(crate) astray: Option<Astray>,
    /// Flushes succeed and do nothing.
    pub(crate) lies: bool,
    pub(crate) no_zeroes: bool,
    pub(crate) no_discard: bool,
    /// What failed the last operation that failed.
    pub(crate) struck_by: Option<Fault>,
    /// What operations do that fail, where that is not left to chance.
    pub(crate) effect: Option<Effect>,
    /// The world's step, for the notes below.
    pub(crate) step: u64,
    /// Sectors that failed a read for good (more often than a ladder has rungs), and when they last did.
    pub(crate) hard: BTreeMap<usize, u64>,
    /// When a passing trouble of a sector was over.
    pub(crate) passed: BTreeMap<usize, u64>,
    /// When a bad sector last failed an operation.
    pub(crate) struck: u64,
    /// When the device as a whole last failed one.
    pub(crate) troubled: u64,
    /// When operations failed for reasons of ours.
    pub(crate) shortages: Vec<u64>,
    /// Operations that failed.
    pub(crate) strikes: u64,
    /// Changed by every write: what stat says.
    pub(crate) mtime: u64,
    /// A flush failed and dropped something since the last power cut.
    pub(crate) dropped: bool,
    /// Some of that was the guest's.
    pub(crate) dropped_data: bool,
    /// Sectors that hold the guest's data; the others are metadata.
    pub(crate) data: Range<usize>,
    /// A power cut has shown that.
    pub(crate) reverted: bool,
    /// Where pages of the table are: sectors.
    pub(crate) tables: Vec<Range<usize>>,
    /// Sectors of the table that a write which was done in part did not reach, and its number.
    missed: Vec<(usize, u64)>,
    /// Pages of the table that crashes tore between their entries.
    pub(crate) torn_tables: usize,
}

impl Disk {
    pub(crate) fn new(name: &'static str, bytes: u64, logical: u64) -> Disk {
        let sectors = usize::try_from(bytes).expect("small disks") / SECTOR;
        Disk {
            name,
            logical,
            store: Store::default(),
            current: vec![0; sectors],
            cache: Cache::new(sectors),
            completed: 0,
            bad_reads: BTreeMap::new(),
            bad_writes: BTreeMap::new(),
            failing_ns: 0,
            gone: false,
            burst: (0, 0),
            full: 0,
            bad_flushes: 0,
            astray: None,
            lies: false,
            no_zeroes: false,
            no_discard: false,
            struck_by: None,
            effect: None,
            step: 0,
            hard: BTreeMap::new(),
            passed: BTreeMap::new(),
            struck: 0,
            troubled: 0,
            shortages: Vec::new(),
            strikes: 0,
            mtime: 1,
            dropped: false,
            dropped_data: false,
            data: 0..sectors,
            reverted: false,
            tables: Vec::new(),
            missed: Vec::new(),
            torn_tables: 0,
        }
    }

    /// The one of the two that is this device's.
    fn own(&self, faults: [Fault; 2]) -> Fault {
        faults[usize::from(self.name == "spare")]
    }

    /// What a flush submitted now will make durable.
    pub(crate) fn completed(&self) -> u64 {
        self.completed
    }

    /// Whether so many operations failed for reasons of ours that one of them may have run out of tries.
    pub(crate) fn short_since(&self, step: u64) -> bool {
        self.shortages.iter().filter(|when| **when >= step).count() > 3
    }

    /// Passing troubles of the device as a whole are over.
    pub(crate) fn recover(&mut self) {
        (self.gone, self.burst, self.full, self.bad_flushes) = (false, (0, 0), 0, 0);
    }

    /// Everything works again; what was unreadable has its last content.
    pub(crate) fn heal(&mut self) {
        self.bad_reads.clear();
        self.bad_writes.clear();
        self.astray = None;
        self.recover();
    }

    /// How much longer the operation takes for trying hard before it fails.
    pub(crate) fn hesitation_ns(&self, op: &Op) -> u64 {
        let marks = match op.kind {
            OpKind::Read => &self.bad_reads,
            OpKind::Write => &self.bad_writes,
            OpKind::Flush => return if self.bad_flushes > 0 { self.failing_ns } else { 0 },
            OpKind::Discard | OpKind::WriteZeroes { .. } | OpKind::Identify => return 0,
        };
        let (first, last) = sectors(op);
        if marks.range(first..last).next().is_some() { self.failing_ns } else { 0 }
    }

    /// Do an operation; `durable_to` is [`Disk::completed`] as of its submission.
    pub(crate) fn perform(&mut self, op: &Op, durable_to: u64, rng: &mut Rng) -> Result<(), Errno> {
        let result = self.try_to(op, durable_to, rng);
        self.strikes += u64::from(result.is_err());
        result
    }

    fn try_to(&mut self, op: &Op, durable_to: u64, rng: &mut Rng) -> Result<(), Errno> {
        if self.gone {
            (self.troubled, self.struck_by) = (self.step, Some(self.own([Fault::PrimaryGone, Fault::SpareGone])));
            return Err(Errno(libc::ENODEV));
        }
        if matches!(op.kind, OpKind::Identify) {
            return Ok(());
        }
        if self.burst.0 > 0 {
            self.burst.0 -= 1;
            let ours = matches!(self.burst.1, libc::EAGAIN | libc::ENOMEM);
            self.struck_by = Some(if ours { Fault::Ours } else { Fault::Burst });
            if ours {
                self.shortages.push(self.step);
            } else {
                self.troubled = self.step;
            }
            if ours && matches!(op.kind, OpKind::Flush) {
                // Shortages of the host do not happen to flushes: io_uring has everything by then.
                return self.flush(durable_to, rng);
            }
            self.fail_in_part(op, rng);
            return Err(Errno(self.burst.1));
        }
        if matches!(op.kind, OpKind::Flush) {
            return self.flush(durable_to, rng);
        }
        assert!(
            op.offset.is_multiple_of(self.logical) && op.len.is_multiple_of(self.logical) && op.len > 0,
            "a misaligned operation on the {}: {op:?}",
            self.name
        );
        if op.offset + op.len > self.bytes() {
            return Err(Errno(libc::EIO));
        }
        match op.kind {
            OpKind::Read => self.read(op),
            OpKind::Discard if self.no_discard => Err(Errno(libc::EOPNOTSUPP)),
            OpKind::WriteZeroes { .. } if self.no_zeroes => Err(Errno(libc::EOPNOTSUPP)),
            OpKind::Discard => {
                // Advice: each sector may keep its content.
                self.apply_some(op, rng);
                Ok(())
            }
            OpKind::Write | OpKind::WriteZeroes { .. } => self.write(op, rng),
            OpKind::Flush | OpKind::Identify => unreachable!("done above"),
        }
    }

    /// The device as a whole fails an operation.
    pub(crate) fn fail(&mut self, op: &Op, errno: Errno, rng: &mut Rng) -> Result<(), Errno> {
        (self.troubled, self.strikes) = (self.step, self.strikes + 1);
        self.fail_in_part(op, rng);
        Err(errno)
    }

    fn fail_in_part(&mut self, op: &Op, rng: &mut Rng) {
        match op.kind {
            OpKind::Flush => self.fail_flush(rng),
            _ => self.apply_some(op, rng),
        }
    }

    fn read(&mut self, op: &Op) -> Result<(), Errno> {
        let (first, last) = sectors(op);
        let mut hard = Vec::new();
        if let Some((errno, fault)) = strike(&mut self.bad_reads, first, last, &mut hard) {
            (self.struck, self.struck_by) = (self.step, fault);
            let over = (first..last).filter(|sector| !self.bad_reads.contains_key(sector));
            self.passed.extend(over.map(|sector| (sector, self.step)));
            self.hard.extend(hard.into_iter().map(|sector| (sector, self.step)));
            return Err(errno);
        }
        let mut memory = Memory::of(op);
        for content in &self.current[first..last] {
            memory.write(|bytes| self.store.copy(*content, bytes));
        }
        memory.end();
        Ok(())
    }

    fn write(&mut self, op: &Op, rng: &mut Rng) -> Result<(), Errno> {
        let (first, last) = sectors(op);
        if self.full > 0 {
            self.full -= 1;
            (self.troubled, self.struck_by) = (self.step, Some(Fault::Full));
            self.apply_some(op, rng);
            return Err(Errno(libc::ENOSPC));
        }
        if let Some((errno, fault)) = strike(&mut self.bad_writes, first, last, &mut Vec::new()) {
            (self.struck, self.struck_by) = (self.step, fault);
            self.apply_some(op, rng);
            return Err(errno);
        }
        self.completed += 1;
        let destination = self.destination(first, last);
        if matches!(op.kind, OpKind::Write) {
            for (sector, content) in destination.zip(self.data(op)) {
                self.put(sector, content, self.completed);
            }
        } else {
            self.zero(destination);
        }
        let mended: Vec<usize> = self.bad_reads.range(first..last).map(|(sector, _)| *sector).collect();
        for sector in mended {
            if self.bad_reads[&sector].until == Until::Written {
                self.bad_reads.remove(&sector);
            }
        }
        Ok(())
    }

    /// The sectors that a write really goes to.
    fn destination(&mut self, first: usize, last: usize) -> Range<usize> {
        let inside = |astray: &&mut Astray| astray.first <= first && last <= astray.first + astray.sectors;
        let Some(astray) = self.astray.as_mut().filter(inside) else { return first..last };
        astray.count -= 1;
        let Astray { count, by, first: start, sectors } = *astray;
        if count == 0 {
            self.astray = None;
        }
        self.struck_by = Some(if by.is_some() { Fault::MetadataMisdirected } else { Fault::MetadataLost });
        let Some(by) = by else { return first..first };
        let from = start + (first - start + by) % sectors;
        from..(from + last - first).min(start + sectors)
    }

    /// Some of the sectors get what the operation wanted, before or instead of its completion.
    pub(crate) fn apply_some(&mut self, op: &Op, rng: &mut Rng) {
        if !matches!(op.kind, OpKind::Write | OpKind::WriteZeroes { .. } | OpKind::Discard) {
            return;
        }
        let (first, last) = sectors(op);
        if last > self.current.len() {
            return;
        }
        let (share, end) = match self.effect {
            None => (rng.pick(&[0, 0, 50, 100]), last),
            Some(Effect::Nothing) => (0, first),
            Some(Effect::Half) => (100, first.midpoint(last)),
            Some(Effect::All) => (100, last),
        };
        if share > 0 {
            let mut contents = self.data(op);
            contents.truncate(end - first);
            self.scatter(first, &contents, matches!(op.kind, OpKind::Write), share, rng);
        }
    }

    /// So many percent of the sectors get their content, of a write only those that take it.
    fn scatter(&mut self, first: usize, contents: &[Content], is_write: bool, share: u64, rng: &mut Rng) {
        self.completed += 1;
        for (sector, content) in (first..).zip(contents) {
            let unwritable = is_write && self.bad_writes.contains_key(&sector);
            if (share == 100 || rng.percent(share)) && !unwritable {
                self.put(sector, *content, self.completed);
            } else {
                self.note_missed(sector, *content);
            }
        }
    }

    /// What is left of an operation in the kernel when its process dies.
    pub(crate) fn late(&mut self, device: usize, op: &Op) -> Option<Late> {
        let writes = matches!(op.kind, OpKind::Write | OpKind::WriteZeroes { .. } | OpKind::Discard);
        let (first, last) = sectors(op);
        let possible = writes && last <= self.current.len();
        let is_write = matches!(op.kind, OpKind::Write);
        possible.then(|| Late { device, first, contents: self.data(op), is_write })
    }

    /// The kernel does what a dead process left: all of it, a part or nothing.
    pub(crate) fn land_late(&mut self, late: &Late, rng: &mut Rng) {
        let share = rng.pick(&[0, 0, 50, 100]);
        if !self.gone && share > 0 {
            self.scatter(late.first, &late.contents, late.is_write, share, rng);
        }
    }

    fn put(&mut self, sector: usize, content: Content, number: u64) {
        self.mtime += 1;
        let before = std::mem::replace(&mut self.current[sector], content);
        if content != 0 || before != 0 || self.cache.contains(sector) {
            self.cache.versions(sector, before).later.push((number, content));
        }
    }

    /// Zeros come to so many sectors: to most of them at a creation, where there is nothing else.
    fn zero(&mut self, sectors: Range<usize>) {
        const AT_ONCE: usize = 256;
        for first in sectors.clone().step_by(AT_ONCE) {
            let part = first..sectors.end.min(first + AT_ONCE);
            if self.current[part.clone()].iter().all(|content| *content == 0) && self.cache.is_at_rest(part.clone()) {
                self.mtime += part.len() as u64;
            } else {
                part.for_each(|sector| self.put(sector, 0, self.completed));
            }
        }
    }

    /// What the operation writes, sector by sector.
    fn data(&mut self, op: &Op) -> Vec<Content> {
        let len = usize::try_from(op.len).expect("small disks");
        if !matches!(op.kind, OpKind::Write) {
            return vec![0; len / SECTOR];
        }
        let mut memory = Memory::of(op);
        let contents = (0..len / SECTOR).map(|_| memory.read(|bytes| self.store.keep(bytes))).collect();
        memory.end();
        contents
    }

    fn flush(&mut self, durable_to: u64, rng: &mut Rng) -> Result<(), Errno> {
        if self.bad_flushes > 0 {
            self.bad_flushes -= 1;
            (self.troubled, self.struck_by) = (self.step, Some(self.own([Fault::PrimaryFlush, Fault::SpareFlush])));
            self.fail_flush(rng);
            return Err(Errno(libc::EIO));
        }
        if self.lies {
            return Ok(());
        }
        self.cache.retain(|versions| {
            if let Some(newest) = versions.later.iter().rposition(|(number, _)| *number <= durable_to) {
                versions.durable = versions.later[newest].1;
                versions.later.drain(..=newest);
            }
            !versions.later.is_empty()
        });
        Ok(())
    }

    fn fail_flush(&mut self, rng: &mut Rng) {
        let share = match self.effect {
            None => rng.pick(&[0, 30, 100]),
            Some(Effect::All) => 0,
            Some(Effect::Nothing | Effect::Half) => 100,
        };
        let dropped = if self.effect == Some(Effect::Half) { self.cache.len() / 2 } else { self.cache.len() };
        for volatile in self.cache.iter_mut().take(dropped) {
            for (number, _) in &mut volatile.later {
                if rng.percent(share) {
                    *number = NEVER;
                    self.dropped = true;
                    self.dropped_data |= self.data.contains(&volatile.sector);
                }
            }
        }
    }

    /// The power goes: every sector is at one of the values it had since it was last durable.
    pub(crate) fn power_cut(&mut self, rng: &mut Rng) {
        let lose = rng.pick(&[0, 20, 50, 80, 100]);
        let cut = self.cache.take();
        for volatile in &cut {
            let kept = if rng.percent(lose) { rng.index(volatile.later.len()) } else { volatile.later.len() };
            self.current[volatile.sector] = match kept {
                0 => volatile.durable,
                n if volatile.later[n - 1].0 == NEVER => volatile.durable,
                n => volatile.later[n - 1].1,
            };
        }
        self.count_torn(&cut);
        self.reverted |= self.dropped;
        (self.dropped, self.dropped_data) = (false, false);
    }

    /// Flip a bit of a sector, behind everybody's back.
    pub(crate) fn damage(&mut self, sector: usize, rng: &mut Rng) {
        let mut bytes = [0; SECTOR];
        self.store.copy(self.current[sector], &mut bytes);
        match rng.below(3) {
            0 => bytes[rng.index(SECTOR)] ^= 1 << rng.below(8),
            1 => bytes = [0; SECTOR],
            _ => bytes = [0xff; SECTOR],
        }
        self.current[sector] = self.store.keep(&bytes);
        self.cache.retain(|volatile| volatile.sector != sector);
    }
}

fn sectors(op: &Op) -> (usize, usize) {
    let first = usize::try_from(op.offset).expect("small disks") / SECTOR;
    (first, first + usize::try_from(op.len).expect("small disks") / SECTOR)
}
