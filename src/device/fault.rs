//! A device that fails what its rules say.

mod rule;

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::{Arc, PoisonError};

use serde::{Deserialize, Serialize};

use super::buffer::{IoSlice, Iovecs};
use super::{Completion, Device, DeviceIndex, Errno, Event, Op, OpKind, Reactor, Tag, Wait};
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, MutexGuard};
use crate::units::{SECTOR_SIZE, Sector, SectorRange, Time};
pub use rule::{DELAY_MS_MAX, FaultOp, FaultRule, RuleError};

/// Most rules at a time: each operation is compared with each.
const RULES_MAX: usize = 1024;

const NS_PER_MS: u64 = 1_000_000;

/// The fault rules of one volume, shared by all its devices' queues.
#[derive(Debug, Default)]
pub struct FaultTable {
    /// Whether there is any rule. All that a device without faults pays for.
    active: AtomicBool,
    rules: Mutex<Rules>,
}

#[derive(Debug, Default)]
struct Rules {
    list: Vec<Active>,
    last_id: u64,
}

#[derive(Debug)]
struct Active {
    rule: FaultRule,
    hits: u64,
    dice: Dice,
    rewritten: Sectors,
}

/// A rule and how often it struck.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FaultReport {
    /// The rule; its count is what is left of it.
    #[serde(flatten)]
    pub rule: FaultRule,
    /// Operations hit so far.
    pub hits: u64,
}

/// There are too many rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there are {RULES_MAX} fault rules already; clear some first")]
pub struct TooManyRules;

/// What the rules say of one operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Verdict {
    delay_ns: u64,
    errno: Option<Errno>,
    /// The operation's sectors that are written although it fails are those outside of this.
    spared_outside: Option<SectorRange>,
}

impl FaultTable {
    /// A table without rules.
    pub fn new() -> FaultTable {
        FaultTable::default()
    }

    /// Add a rule; returns its id.
    ///
    /// # Errors
    /// If there are too many.
    pub fn add(&self, mut rule: FaultRule) -> Result<u64, TooManyRules> {
        let mut rules = self.rules();
        if rules.list.len() >= RULES_MAX {
            return Err(TooManyRules);
        }
        rules.last_id += 1;
        rule.id = rules.last_id;
        let dice = Dice(rule.seed);
        rules.list.push(Active { rule, hits: 0, dice, rewritten: Sectors::default() });
        self.active.store(true, Ordering::Relaxed);
        Ok(rules.last_id)
    }

    /// The rules in force, in the order in which they are asked.
    pub fn list(&self) -> Vec<FaultReport> {
        self.rules().list.iter().map(|active| FaultReport { rule: active.rule.clone(), hits: active.hits }).collect()
    }

    /// Remove one rule, or all; returns how many there were.
    pub fn clear(&self, id: Option<u64>) -> usize {
        let mut rules = self.rules();
        let before = rules.list.len();
        rules.list.retain(|active| id.is_some_and(|id| active.rule.id != id));
        self.update(&rules);
        before - rules.list.len()
    }

    fn rules(&self) -> MutexGuard<'_, Rules> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update(&self, rules: &Rules) {
        self.active.store(!rules.list.is_empty(), Ordering::Relaxed);
    }

    fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    /// Ask the rules in order: delays add up until one fails the operation.
    fn judge(&self, op: &Op) -> Verdict {
        let (kind, sectors) = (FaultOp::of(op.kind), sectors_of(op));
        let mut verdict = Verdict::default();
        let mut rules = self.rules();
        for active in &mut rules.list {
            let Some(hit) = active.strikes(op.device, kind, sectors) else { continue };
            verdict.delay_ns = verdict.delay_ns.saturating_add(active.rule.delay_ms.saturating_mul(NS_PER_MS));
            if active.rule.errno.is_some() {
                verdict.errno = active.rule.errno;
                verdict.spared_outside = active.rule.partial.then_some(hit);
                break;
            }
        }
        rules.list.retain(|active| active.rule.count != Some(0));
        self.update(&rules);
        verdict
    }

    /// A write that came through.
    fn written(&self, device: DeviceIndex, sectors: SectorRange) {
        let mut rules = self.rules();
        rules.list.retain_mut(|active| {
            let FaultRule { range, until_rewritten, device: on, .. } = active.rule;
            if !until_rewritten || on != device {
                return true;
            }
            active.rewritten.insert(range.map_or(sectors, |range| intersection(range, sectors)));
            !range.is_some_and(|range| active.rewritten.contains_all(range))
        });
        self.update(&rules);
    }
}

impl Active {
    /// The sectors hit, if the operation is.
    fn strikes(&mut self, device: DeviceIndex, kind: FaultOp, sectors: SectorRange) -> Option<SectorRange> {
        let rule = &mut self.rule;
        if rule.device != device || !rule.ops.contains(&kind) {
            return None;
        }
        let mut hit = sectors;
        if kind.has_range() {
            hit = rule.range.map_or(sectors, |range| intersection(range, sectors));
            if hit.is_empty() || (rule.until_rewritten && self.rewritten.contains_all(hit)) {
                return None;
            }
        }
        if rule.probability < 1.0 && self.dice.roll() >= rule.probability {
            return None;
        }
        if let Some(count) = &mut rule.count {
            // Spent rules leave the table before the next operation.
            *count = count.checked_sub(1)?;
        }
        self.hits += 1;
        Some(hit)
    }
}

fn sectors_of(op: &Op) -> SectorRange {
    SectorRange { start: Sector(op.offset / SECTOR_SIZE), count: op.len.div_ceil(SECTOR_SIZE) }
}

fn intersection(a: SectorRange, b: SectorRange) -> SectorRange {
    let start = a.start.max(b.start);
    // An operation's range is not checked yet, so its end may not fit.
    let end = a.start.0.saturating_add(a.count).min(b.start.0.saturating_add(b.count));
    SectorRange { start, count: end.saturating_sub(start.0) }
}

/// SplitMix64: small, and good enough for dice.
#[derive(Debug)]
struct Dice(u64);

impl Dice {
    /// A number from 0 up to but not including 1.
    fn roll(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let bits = u32::try_from((z ^ (z >> 31)) >> 32).expect("32 bits are left");
        f64::from(bits) / (f64::from(u32::MAX) + 1.0)
    }
}

/// A set of sectors as disjoint runs: first sector to the one after the last.
#[derive(Debug, Default)]
struct Sectors(BTreeMap<u64, u64>);

impl Sectors {
    fn insert(&mut self, range: SectorRange) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start.0, range.end().0);
        while let Some((&left, &right)) = self.0.range(..=end).next_back() {
            if right < start {
                break;
            }
            self.0.remove(&left);
            start = start.min(left);
            end = end.max(right);
        }
        self.0.insert(start, end);
    }

    fn contains_all(&self, range: SectorRange) -> bool {
        let last = self.0.range(..=range.start.0).next_back();
        last.is_some_and(|(_, end)| range.start.0.saturating_add(range.count) <= *end)
    }
}

/// Tags with this bit are the wrapper's own.
const OWN_TAG: u64 = 1 << 63;

/// A device behind a fault table.
pub struct FaultDevice<D> {
    inner: D,
    table: Arc<FaultTable>,
    /// Operations that a rule delays.
    held: Vec<Held>,
    /// Failing writes of which a part is on its way, by the number in their pieces' tags.
    partials: BTreeMap<u64, Partial>,
    partials_made: u64,
    /// Pieces at the inner device.
    pieces: usize,
    /// Writes to tell the table of when they come through.
    writes: BTreeMap<Tag, (DeviceIndex, SectorRange)>,
    /// What failed without the device.
    ended: Vec<Event>,
}

#[derive(Debug)]
struct Held {
    op: Op,
    verdict: Verdict,
    /// When it goes on; counted from the first poll after its submission, which knows the time.
    due: Option<Time>,
}

#[derive(Debug)]
struct Partial {
    completion: Completion,
    /// Keeps the scatter lists of the pieces in place; `left` of them have not come back.
    lists: Vec<Iovecs>,
    left: usize,
}

impl<D: Device> FaultDevice<D> {
    /// `inner`, but failing what the rules in `table` say.
    pub fn new(inner: D, table: Arc<FaultTable>) -> FaultDevice<D> {
        FaultDevice {
            inner,
            table,
            held: Vec::new(),
            partials: BTreeMap::new(),
            partials_made: 0,
            pieces: 0,
            writes: BTreeMap::new(),
            ended: Vec::new(),
        }
    }

    /// Let an operation go where its verdict sends it.
    ///
    /// # Safety
    /// As for [`Device::submit`].
    unsafe fn release(&mut self, op: Op, verdict: Verdict) {
        let is_write = FaultOp::of(op.kind) == FaultOp::Write;
        let Some(errno) = verdict.errno else {
            if is_write {
                self.writes.insert(op.tag, (op.device, sectors_of(&op)));
            }
            // SAFETY: the caller's promise is passed on unchanged.
            unsafe { self.inner.submit(op) };
            return;
        };
        let completion = Completion { tag: op.tag, result: Err(errno) };
        match verdict.spared_outside {
            // SAFETY: as above.
            Some(bad) if is_write => unsafe { self.write_around(op, bad, completion) },
            _ => self.ended.push(Event::Done(completion)),
        }
    }

    /// Write what lies before and after the bad sectors, then fail.
    ///
    /// # Safety
    /// As for [`Device::submit`].
    unsafe fn write_around(&mut self, op: Op, bad: SectorRange, completion: Completion) {
        let (bad_start, bad_end) = (bad.start.bytes(), bad.end().bytes());
        let end = op.offset.saturating_add(op.len);
        let around = [(op.offset, bad_start), (bad_end, end)];
        let mut partial = Partial { completion, lists: Vec::new(), left: 0 };
        let number = self.partials_made;
        self.partials_made += 1;
        for (from, to) in around.into_iter().filter(|(from, to)| from < to) {
            let list = if op.kind == OpKind::Write {
                // SAFETY: the caller keeps the array and its memory until the completion, which the
                // wrapper reports only after those of the pieces.
                unsafe { part_of(op.data, from - op.offset, to - from) }
            } else {
                Iovecs::new()
            };
            let piece = Op { tag: Tag(OWN_TAG | number), offset: from, len: to - from, data: list.as_io(), ..op };
            partial.lists.push(list);
            partial.left += 1;
            self.pieces += 1;
            // SAFETY: as above; the list of iovecs stays where it is while it moves with its owner.
            unsafe { self.inner.submit(piece) };
        }
        if partial.left == 0 {
            self.ended.push(Event::Done(completion));
        } else {
            self.partials.insert(number, partial);
        }
    }

    /// Release what is due; returns how long there is time until the next one.
    fn release_due(&mut self, now: Time, wait: Wait) -> Wait {
        let mut next = None;
        for held in std::mem::take(&mut self.held) {
            let due = held.due.unwrap_or(now.plus_ns(held.verdict.delay_ns));
            if due <= now {
                // SAFETY: the promise of the submission holds until the completion.
                unsafe { self.release(held.op, held.verdict) };
            } else {
                next = Some(next.map_or(due, |next: Time| next.min(due)));
                self.held.push(Held { due: Some(due), ..held });
            }
        }
        match (wait, next) {
            _ if !self.ended.is_empty() => Wait::No,
            (Wait::Until(until), Some(next)) => Wait::Until(until.min(next)),
            (Wait::Forever, Some(next)) => Wait::Until(next),
            (wait, _) => wait,
        }
    }

    /// Take out the pieces of ours, and tell the table of writes.
    fn digest(&mut self, event: Event, events: &mut Vec<Event>) {
        let Event::Done(completion) = event else {
            events.push(event);
            return;
        };
        if completion.tag.0 & OWN_TAG == 0 {
            if let Some((device, sectors)) = self.writes.remove(&completion.tag)
                && completion.result.is_ok()
            {
                self.table.written(device, sectors);
            }
            events.push(event);
            return;
        }
        self.pieces -= 1;
        let number = completion.tag.0 & !OWN_TAG;
        let partial = self.partials.get_mut(&number).expect("a piece belongs to a failing write");
        partial.left -= 1;
        if partial.left == 0 {
            events.push(Event::Done(partial.completion));
            self.partials.remove(&number);
        }
    }
}

/// A scatter list of its own for `len` bytes from `offset` of another.
///
/// # Safety
/// The array is valid, and the memory it names for as long as the result is used.
unsafe fn part_of(data: IoSlice, offset: u64, len: u64) -> Iovecs {
    let mut whole = Iovecs::new();
    // SAFETY: the caller vouches for the array.
    for iovec in unsafe { data.iovecs() } {
        // SAFETY: the caller vouches for the memory.
        unsafe { whole.push(iovec.iov_base.cast(), iovec.iov_len) };
    }
    let to_usize = |bytes| usize::try_from(bytes).expect("memory sizes fit in usize");
    whole.slice(to_usize(offset), to_usize(len))
}

impl<D: Device> Device for FaultDevice<D> {
    unsafe fn submit(&mut self, op: Op) {
        assert_eq!(op.tag.0 & OWN_TAG, 0, "the upper bit of tags is the fault device's own");
        if !self.table.is_active() {
            // SAFETY: the caller's promise is passed on unchanged.
            unsafe { self.inner.submit(op) };
            return;
        }
        let verdict = self.table.judge(&op);
        if verdict.delay_ns > 0 {
            self.held.push(Held { op, verdict, due: None });
        } else {
            // SAFETY: the caller's promise is passed on unchanged.
            unsafe { self.release(op, verdict) };
        }
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight() - self.pieces + self.partials.len() + self.held.len() + self.ended.len()
    }

    fn poll(&mut self, now: Time, wait: Wait, events: &mut Vec<Event>) {
        let wait = if self.held.is_empty() && self.ended.is_empty() { wait } else { self.release_due(now, wait) };
        if self.writes.is_empty() && self.partials.is_empty() && self.ended.is_empty() {
            self.inner.poll(now, wait, events);
            return;
        }
        events.append(&mut self.ended);
        let start = events.len();
        self.inner.poll(now, wait, events);
        for event in events.split_off(start) {
            self.digest(event, events);
        }
    }
}

impl<R: Reactor> Reactor for FaultDevice<R> {
    fn watch(&mut self, fd: RawFd, token: u64) {
        self.inner.watch(fd, token);
    }

    fn unwatch(&mut self, token: u64) {
        self.inner.unwatch(token);
    }
}

#[cfg(test)]
mod tests;
