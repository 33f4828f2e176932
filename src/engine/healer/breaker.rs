//! Telling a bad medium from a gone device (E1).
//!
//! The error number says what kind of failure it was; a probe that writes nothing confirms it. A device
//! that is gone opens the breaker: nothing is sent to it and nothing is remapped, since a remap storm
//! over a pulled cable would eat the spare.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use super::failure::{Failure, FailureClass, Hold};
use super::{Core, EventKind, Severity};
use crate::device::{DeviceIndex, Errno};
use crate::engine::errors::{Class, class_of};
use crate::engine::message::Refusal;
use crate::engine::task::{Promise, promise};
use crate::engine::view::PrimaryState;
use crate::units::{SectorRange, Time};
use std::sync::atomic::Ordering;

/// A probe that passed speaks for so long, in nanoseconds.
const PROBE_VALID_NS: u64 = 1_000_000_000;
/// A gone device is asked again after so many seconds.
const RETRY_SECONDS: u64 = 1;
/// Failed writes of the guest in a row, without one success, that trip the breaker.
const STORM_WRITES: usize = 32;
/// Regions they must lie in.
const STORM_REGIONS: usize = 3;
/// How far apart those are, in sectors (1 GiB), or a quarter of a smaller volume.
const STORM_APART: u64 = 2 << 20;

/// Places of a device that a probe reads: far apart, so that no one bad region has them all.
const PLACES: usize = 3;

/// What the reads of one probe say together: the first that succeeds, or else the last that fails.
struct Verdict {
    promise: RefCell<Option<Promise<Result<(), Errno>>>>,
    unheard: Cell<usize>,
}

impl Verdict {
    fn is_known(&self) -> bool {
        self.promise.borrow().is_none()
    }

    fn hear(&self, read: Result<(), Errno>) {
        self.unheard.set(self.unheard.get() - 1);
        if (read.is_ok() || self.unheard.get() == 0)
            && let Some(promise) = self.promise.borrow_mut().take()
        {
            promise.keep(read);
        }
    }
}

/// A place that probes read, one after the other: a read of a bad sector may outlast its probe for long, and
/// probes that come meanwhile must not fill the device's queue with more of them.
#[derive(Default)]
struct ProbedPlace {
    reading: Cell<bool>,
    /// The probe that is to read it next; one before it has its verdict already.
    next: RefCell<Option<Rc<Verdict>>>,
}

#[derive(Default)]
struct Probe {
    running: Cell<bool>,
    /// Raised by what makes earlier answers worthless.
    doubts: Cell<u64>,
    /// Doubts when the running probe began.
    begun: Cell<u64>,
    /// Who waits for the running probe.
    waiting: RefCell<Vec<Promise<Result<(), Errno>>>>,
    /// Who waits for one that has yet to begin.
    next: RefCell<Vec<Promise<Result<(), Errno>>>>,
    passed: Cell<Option<Time>>,
    places: [ProbedPlace; PLACES],
}

impl Probe {
    /// The device has failed: what it answered before, or is being asked, says nothing of now.
    fn doubt(&self) {
        self.doubts.set(self.doubts.get() + 1);
        self.passed.set(None);
    }
}

/// The breaker's state.
#[derive(Default)]
pub(super) struct Breaker {
    probes: [Probe; 2],
    /// Regions of failed writes since the last success, and how many there were.
    storm: RefCell<(usize, Vec<u64>)>,
    successes_seen: Cell<u64>,
    /// Tripped by a storm: only `clear` closes it.
    tripped: Cell<bool>,
    returning: Cell<bool>,
    /// Times each device has gone.
    departures: [Cell<u64>; 2],
}

impl Breaker {
    fn probe_of(&self, device: DeviceIndex) -> &Probe {
        &self.probes[usize::from(device.0)]
    }
}

impl Core {
    /// Times a device has gone: what was under way when it did says nothing, also once it is back.
    pub(super) fn departures(&self, device: DeviceIndex) -> u64 {
        self.breaker.departures[usize::from(device.0)].get()
    }

    pub(super) fn note_departure(&self, device: DeviceIndex) {
        let departures = &self.breaker.departures[usize::from(device.0)];
        departures.set(departures.get() + 1);
    }

    /// Decide what a failed operation means: `Ok` for a bad medium or a passing trouble, which the ladders
    /// deal with; otherwise the failure to answer with. A gone device has opened the breaker by then.
    pub(super) async fn diagnose(
        self: &Rc<Self>,
        device: DeviceIndex,
        errno: Errno,
        read: bool,
        range: SectorRange,
    ) -> Result<(), Failure> {
        if self.policy.passthrough {
            return Err(Failure::errno(device, errno).at(range));
        }
        let class = class_of(errno);
        match class {
            Class::Medium => {}
            // Tried again below already; the disk is not to blame and nothing is remapped for it.
            Class::Ours | Class::Space | Class::Unlisted => return Err(Failure::errno(device, errno).at(range)),
            Class::Gone => return Err(self.device_gone(device, errno).at(range)),
            Class::Ambiguous | Class::Target => {
                if !read {
                    // What follows a failed write takes slots: an answer from before it does not count.
                    self.breaker.probe_of(device).doubt();
                }
                if let Err(probed) = self.probe(device).await {
                    return Err(self.device_gone(device, probed).at(range));
                }
            }
        }
        Ok(())
    }

    /// A guest's write to the primary failed on the medium, as far as the probe can tell. Too many of them in
    /// a row, too far apart for one bad region, and it is the device after all. What the ladders try again is
    /// not counted: one bad place would stand for many.
    pub(super) fn count_failed_write(self: &Rc<Self>, errno: Errno, range: SectorRange) -> Result<(), Failure> {
        // What was under way when the device went does not say how it went.
        self.refuse_gone(DeviceIndex::PRIMARY)?;
        if !self.is_storm(range) {
            return Ok(());
        }
        self.breaker.tripped.set(true);
        Err(self.device_gone(DeviceIndex::PRIMARY, errno).at(range))
    }

    /// Ask a device whether it is there, without writing: its identity, and reads of three far places, of
    /// which one must succeed (any of them may be a bad sector). Concurrent callers share a probe, unless the
    /// device has failed since it began.
    pub(super) async fn probe(self: &Rc<Self>, device: DeviceIndex) -> Result<(), Errno> {
        let probe = self.breaker.probe_of(device);
        if probe.passed.get().is_some_and(|passed| self.io.now().since_ns(passed) < PROBE_VALID_NS) {
            return Ok(());
        }
        let (promise, awaited) = promise();
        let speaks_for_now = probe.running.get() && probe.begun.get() == probe.doubts.get();
        let queue = if speaks_for_now { &probe.waiting } else { &probe.next };
        queue.borrow_mut().push(promise);
        if !probe.running.replace(true) {
            let core = self.clone();
            self.spawn(async move { core.probe_in_rounds(device).await });
        }
        awaited.await
    }

    async fn probe_in_rounds(self: &Rc<Self>, device: DeviceIndex) {
        let probe = self.breaker.probe_of(device);
        loop {
            let next = std::mem::take(&mut *probe.next.borrow_mut());
            if next.is_empty() {
                probe.running.set(false);
                return;
            }
            *probe.waiting.borrow_mut() = next;
            probe.begun.set(probe.doubts.get());
            let result = self.probe_once(device).await;
            if result.is_ok() && probe.begun.get() == probe.doubts.get() {
                probe.passed.set(Some(self.io.now()));
            }
            let waiting = std::mem::take(&mut *probe.waiting.borrow_mut());
            waiting.into_iter().for_each(|waiter| waiter.keep(result));
        }
    }

    /// Whether a device is there now, and not only was a moment ago: what looked like bad sectors may have been
    /// its going, and nothing is remapped, lost or pending for that.
    pub(super) async fn confirm(self: &Rc<Self>, device: DeviceIndex) -> Result<(), Failure> {
        self.breaker.probe_of(device).doubt();
        self.probe(device).await.map_err(|errno| self.device_gone(device, errno))?;
        // A storm trips the breaker whatever the probe says.
        self.refuse_gone(device)
    }

    async fn probe_once(self: &Rc<Self>, device: DeviceIndex) -> Result<(), Errno> {
        self.io.identify(device).await?;
        let size = match device {
            DeviceIndex::PRIMARY => self.geometry().capacity * 512,
            _ => self.layout.spare_size,
        };
        let unit = u64::from(self.geometry().logical_block);
        let last = (size / unit).saturating_sub(1) * unit;
        let places: [u64; PLACES] = [0, last / 2 / unit * unit, last];
        let len = usize::try_from(unit).expect("512 or 4096");
        let (first_good, awaited) = promise();
        let verdict = Rc::new(Verdict { promise: RefCell::new(Some(first_good)), unheard: Cell::new(places.len()) });
        for (index, offset) in places.into_iter().enumerate() {
            let place = &self.breaker.probe_of(device).places[index];
            *place.next.borrow_mut() = Some(verdict.clone());
            if place.reading.replace(true) {
                continue;
            }
            let core = self.clone();
            // Not waited for together: a bad sector may take its time to fail.
            self.spawn(async move {
                let place = &core.breaker.probe_of(device).places[index];
                loop {
                    let verdict = place.next.borrow_mut().take();
                    let Some(verdict) = verdict.filter(|verdict| !verdict.is_known()) else { break };
                    let (read, _) = core.io.read(device, offset, len).await;
                    verdict.hear(read.map(drop));
                }
                place.reading.set(false);
            });
        }
        awaited.await
    }

    /// Count it; `true` when 32 in a row failed in far apart places without one success.
    fn is_storm(&self, range: SectorRange) -> bool {
        let successes = self.progress.primary_writes_ok.load(Ordering::Relaxed);
        let mut storm = self.breaker.storm.borrow_mut();
        if self.breaker.successes_seen.replace(successes) != successes {
            *storm = (0, Vec::new());
        }
        storm.0 += 1;
        let apart = STORM_APART.min(self.geometry().capacity / 4).max(1);
        let start = range.start.0;
        if storm.1.len() < STORM_REGIONS && storm.1.iter().all(|region| region.abs_diff(start) >= apart) {
            storm.1.push(start);
        }
        storm.0 >= STORM_WRITES && storm.1.len() >= STORM_REGIONS
    }

    /// The guest's writes that failed on the primary since one last succeeded there.
    pub(super) fn failed_writes_in_a_row(&self) -> usize {
        let successes = self.progress.primary_writes_ok.load(Ordering::Relaxed);
        let has_succeeded = self.breaker.successes_seen.get() != successes;
        if has_succeeded { 0 } else { self.breaker.storm.borrow().0 }
    }

    /// A write of the healer to the primary succeeded.
    pub(super) fn note_primary_write(&self) {
        self.progress.primary_writes_ok.fetch_add(1, Ordering::Relaxed);
    }

    /// The device is gone: open the breaker and watch for its return.
    pub(super) fn device_gone(self: &Rc<Self>, device: DeviceIndex, errno: Errno) -> Failure {
        // A probe that passed a moment ago no longer speaks for the device.
        self.breaker.probe_of(device).doubt();
        if device != DeviceIndex::PRIMARY {
            self.spare_down(&errno.to_string());
            return Failure::spare_down();
        }
        if self.mode.get().primary == PrimaryState::Up {
            self.note_departure(device);
            let policy = if self.holds_for_primary() { "requests are held" } else { "requests fail" };
            let action = match self.breaker.tripped.get() {
                true => format!("{STORM_WRITES} writes failed far apart without one success: {policy} until `clear`"),
                false => format!("{policy} until it is back; asking every {RETRY_SECONDS} s"),
            };
            let none = SectorRange::default();
            self.event(Severity::Error, EventKind::DeviceGone, Some(device), none, errno.to_string(), action);
            self.change_mode(|mode| mode.primary = PrimaryState::Gone);
            if !self.breaker.returning.replace(true) {
                let core = self.clone();
                self.spawn(async move { core.await_primary().await });
            }
        }
        let failure = Failure::new(Some(device), format!("the primary is gone: {errno}")).of(FailureClass::Gone);
        Failure { hold: Hold::PrimaryGone, ..failure }
    }

    async fn await_primary(self: &Rc<Self>) {
        loop {
            self.io.sleep_until(self.io.now().plus_secs(RETRY_SECONDS)).await;
            if self.mode.get().primary == PrimaryState::Up {
                break;
            }
            let doubts = || self.breaker.probe_of(DeviceIndex::PRIMARY).doubts.get();
            let before = doubts();
            if self.breaker.tripped.get() || self.probe(DeviceIndex::PRIMARY).await.is_err() {
                continue;
            }
            // Meanwhile the operator may have closed the breaker, and the device or a storm opened it again.
            if self.mode.get().primary == PrimaryState::Gone && !self.breaker.tripped.get() && doubts() == before {
                self.primary_back();
                break;
            }
        }
        self.breaker.returning.set(false);
    }

    fn primary_back(self: &Rc<Self>) {
        self.breaker.tripped.set(false);
        *self.breaker.storm.borrow_mut() = (0, Vec::new());
        self.change_mode(|mode| mode.primary = PrimaryState::Up);
        let none = SectorRange::default();
        self.event(
            Severity::Info,
            EventKind::DeviceBack,
            Some(DeviceIndex::PRIMARY),
            none,
            "the probe passed",
            "requests go on",
        );
        self.resume_held(Hold::PrimaryGone);
    }

    /// Something hangs: ask the device whether it is there, and say so if not.
    pub(super) async fn suspect(self: &Rc<Self>, device: DeviceIndex) {
        if let Err(errno) = self.probe(device).await {
            self.device_gone(device, errno);
        }
    }

    /// Close a breaker on the operator's order: the probe must pass.
    pub(super) async fn clear_breaker(self: &Rc<Self>) -> Result<(), String> {
        let device = DeviceIndex::PRIMARY;
        self.probe(device)
            .await
            .map_err(|errno| format!("the {device} does not answer: {errno}; reattach it first"))?;
        self.primary_back();
        Ok(())
    }

    /// Refuse what needs a device that cannot be used.
    pub(super) fn refuse_gone(&self, device: DeviceIndex) -> Result<(), Failure> {
        let mode = self.mode.get();
        match device {
            DeviceIndex::PRIMARY if mode.primary == PrimaryState::Gone => Err(Failure::refused(Refusal::PrimaryGone)),
            DeviceIndex::SPARE if !mode.spare_up => Err(Failure::refused(Refusal::SpareDown)),
            _ => Ok(()),
        }
    }
}
