//! One run: create, then open, do deeds and close or crash a few times, then heal everything and look.

use uuid::Uuid;
use vhost_remap::device::{Completion, DeviceIndex, Op, OpKind};
use vhost_remap::engine::create::{CreateParams, Creation};
use vhost_remap::engine::event::EventKind;
use vhost_remap::engine::healer::Order;
use vhost_remap::engine::open::{DeviceFacts, OpenError, OpenParams, Opening};
use vhost_remap::units::{Sector, SectorRange};
use vhost_remap::volume::superblock::CloseStamp;

use crate::coverage::Phase;
use crate::disk::Disk;
use crate::faults;
use crate::model::Crash;
use crate::prepared;
use crate::script::{Deed, Reopening};
use crate::world::{Owner, World, trace};

/// The volume's name.
pub(crate) const SET: u128 = 0x5e7;
/// Steps after which a session that still has requests hangs.
const STEPS_MAX: u64 = 200_000;
/// The same in simulated time: 20 minutes, far beyond every deadline of the engine.
const PATIENCE_NS: u64 = 1_200_000_000_000;

/// How a script ended.
enum Scripted {
    Done,
    Crashed,
}

impl World {
    fn facts(&self, device: usize) -> DeviceFacts {
        let disk = &self.disks[device];
        DeviceFacts {
            size: disk.bytes(),
            logical_block: u32::try_from(disk.logical).expect("small"),
            inode: 7,
            wwn: String::new(),
            mtime_ns: disk.mtime,
        }
    }

    /// Drive a script to its end, or into a crash after so many operations.
    fn script(
        &mut self,
        crash_after: Option<u64>,
        mut step: impl FnMut(&World, &[Completion], &mut Vec<Op>) -> bool,
    ) -> Scripted {
        let mut completions = Vec::new();
        let mut performed = 0;
        loop {
            let mut ops = Vec::new();
            let done = step(self, &completions, &mut ops);
            completions.clear();
            self.submit(Owner::Script, ops);
            if done {
                assert!(self.flights.is_empty(), "a script leaves nothing under way");
                return Scripted::Done;
            }
            if crash_after.is_some_and(|after| performed >= after) {
                return Scripted::Crashed;
            }
            self.step += 1;
            if let Some(next) = self.next_ready() {
                self.now = self.now.max(next);
            }
            let flight = self.ready_flight().expect("a script that is not done has operations under way");
            completions.push(self.perform(flight).1);
            performed += 1;
        }
    }

    /// Create once; `None` where a crash came first.
    pub(crate) fn create_once(&mut self, crash_after: Option<u64>) -> Option<Result<(), OpenError>> {
        let params = CreateParams {
            primary: self.facts(0),
            spare: self.facts(1),
            capacity: self.config.capacity,
            labelled: self.config.labelled,
            max_remaps: self.config.max_remaps,
            set: Uuid::from_u128(SET),
            devices: [Uuid::from_u128(1), Uuid::from_u128(2)],
            serial: *b"simulated-disk-00000",
            now: 1_000_000,
        };
        self.script = Phase::Creating;
        let mut creation = Creation::new(params);
        let mut result = None;
        let ended = self.script(crash_after, |world, completions, ops| {
            creation.step(world.now, completions, ops);
            result = creation.result();
            result.is_some()
        });
        if matches!(ended, Scripted::Crashed) {
            // Before the memory goes that they write from.
            self.abandon_flights();
        }
        result
    }

    pub(crate) fn create(&mut self) {
        loop {
            let crash_after = self.rng.percent(5).then(|| self.rng.below(20));
            match self.create_once(crash_after) {
                Some(result) => return result.expect("healthy disks take a new volume"),
                None => {
                    trace!(self, "crash during creation");
                    let power = self.rng.percent(70);
                    self.cut_power(power);
                    // What a broken creation left either opens or is refused; it never harms.
                    let _ = self.open_once(false, None);
                    if self.engine.is_some() {
                        self.abandon_flights();
                        self.stop();
                    }
                }
            }
        }
    }

    fn cut_power(&mut self, power: bool) -> Crash {
        if !power {
            self.disks.iter_mut().for_each(Disk::killed);
            return Crash::Kill;
        }
        self.disks.iter_mut().for_each(|disk| disk.power_cut(&mut self.rng));
        Crash::PowerCut
    }

    /// Crash now: everything under way may have landed or not, or lands before the volume is opened again.
    pub(crate) fn crash(&mut self, power: bool) {
        self.leave_flights();
        self.await_lock(power);
        let crash = self.cut_power(power);
        trace!(self, "crash: {crash:?}");
        self.model.crash(crash);
        if self.engine.is_some() {
            self.stop();
        }
    }

    /// Open once; `None` where the opening itself was cut by a crash.
    pub(crate) fn open_once(&mut self, read_only: bool, crash_after: Option<u64>) -> Option<Result<(), OpenError>> {
        // What a failed flush dropped and a power cut took differs from the close stamp.
        let accept_external = self.disks.iter().any(|disk| disk.reverted);
        let params = OpenParams { primary: self.facts(0), spare: self.facts(1), read_only, accept_external };
        trace!(self, "open, read-only {read_only}, crash after {crash_after:?}");
        self.script = Phase::Opening;
        self.read_only = read_only;
        let mut opening = Opening::new(params);
        let ended = self.script(crash_after, |world, completions, ops| {
            opening.step(world.now, completions, ops);
            opening.is_done()
        });
        if matches!(ended, Scripted::Crashed) {
            self.leave_flights();
            let power = self.rng.percent(70);
            self.await_lock(power);
            let crash = self.cut_power(power);
            trace!(self, "crash during opening: {crash:?}");
            self.model.crash(crash);
            return None;
        }
        let params = self.config.healer_params();
        Some(opening.finish(&params).map(|(healer, _)| {
            let poisoned = healer.view().mode.poisoned;
            trace!(self, "open: {:?}", healer.view().mode);
            // The power went, or the process, before the failure was noted.
            if !poisoned && self.disks.iter().any(|disk| disk.dropped_data) {
                self.model.distrust(None);
            }
            self.start(healer, poisoned);
            self.retired = !self.status().retired_places.is_empty();
            self.check_capacity();
        }))
    }

    /// Open, through crashes and refusals that the faults of the moment explain.
    fn open(&mut self, reopening: &Reopening) {
        let mut cuts = reopening.cuts.iter().copied();
        let mut read_only = reopening.read_only;
        loop {
            let began = self.step;
            let one_place_is_whole = faults::one_place_is_whole(self);
            match self.open_once(std::mem::take(&mut read_only), cuts.next()) {
                None => {}
                Some(Ok(())) => return,
                Some(Err(error)) => {
                    trace!(self, "refused: {error}");
                    let trouble = self.disks.iter().any(|disk| disk.troubled >= began || disk.short_since(began));
                    let explained = trouble || self.retired || !one_place_is_whole;
                    assert!(explained, "E4: a volume with one whole place is refused: {error}");
                    self.disks.iter_mut().for_each(|disk| disk.heal());
                }
            }
        }
    }

    /// What happens to the devices while nobody uses them, then the next opening.
    fn reopen(&mut self, reopening: &Reopening) {
        reopening.damage.iter().for_each(|sector| faults::damage(self, *sector));
        for (disk, over) in self.disks.iter_mut().zip(reopening.over) {
            if over {
                disk.recover();
            }
        }
        self.open(reopening);
    }

    /// Some steps of whatever can happen; where nothing can, time passes in so many of a hundred cases.
    fn pace(&mut self, steps: u64, patience: u64) {
        for _ in 0..steps {
            if !self.advance() {
                self.resume_queues();
                if !self.rng.percent(patience) || !self.wait() {
                    return;
                }
            }
        }
    }

    /// Go on until `done`.
    pub(crate) fn serve_until(&mut self, mut done: impl FnMut(&mut World) -> bool) {
        let (began, since) = (self.step, self.now);
        while !done(self) {
            if !self.advance() {
                self.resume_queues();
                if !done(self) {
                    let waits = self.wait();
                    assert!(waits, "hang: nothing will ever happen: {}", self.describe_waiting());
                }
            }
            let in_time = self.now.since_ns(since) < PATIENCE_NS && self.step - began < STEPS_MAX;
            assert!(in_time, "hang: {}", self.describe_waiting());
        }
    }

    /// Run until nothing is under way.
    pub(crate) fn run_dry(&mut self) {
        self.serve_until(World::is_quiet);
    }

    /// Run until nothing is under way, and look.
    pub(crate) fn settle_down(&mut self) {
        self.run_dry();
        self.check_quiet();
    }

    /// Devices that come back are used again, bad sectors or not.
    fn check_return(&mut self) {
        self.disks.iter_mut().for_each(Disk::recover);
        // What failed before may come to light late, when the rest of its request is done.
        self.run_dry();
        let mut whole = faults::one_place_is_whole(self);
        self.let_pass(4);
        if !whole && faults::one_place_is_whole(self) {
            // Attempts until now may each have met a trouble in either place, the last of them just now.
            whole = true;
            self.let_pass(4);
        }
        let status = self.status();
        let whole = whole && status.retired_places.is_empty();
        assert!(status.mode.spare_up || !whole, "the spare is there and not used: {status:?}");
    }

    /// Let so many seconds pass: devices that are asked every second are in use again.
    pub(crate) fn let_pass(&mut self, seconds: u64) {
        let until = self.now.plus_secs(seconds);
        while self.now < until {
            if !self.advance() && !self.wait() {
                self.now = until;
            }
        }
        self.settle_down();
    }

    /// Close cleanly; what does not close is killed.
    pub(crate) fn close(&mut self) {
        self.settle_down();
        if self.read_only {
            return self.crash(false);
        }
        let submitted = self.model.tick();
        self.order(Order::Settle);
        self.settle_down();
        let Some(Ok(sample_crc)) = self.settled.take() else {
            return self.crash(false);
        };
        self.model.flushed(submitted);
        let stamp =
            CloseStamp { size: self.disks[0].bytes(), mtime_ns: self.disks[0].mtime, sample_crc, write_through: false };
        self.done = None;
        self.order(Order::Seal(stamp));
        self.settle_down();
        if self.done.as_ref().is_some_and(Result::is_ok) {
            trace!(self, "closed");
            self.stop();
        } else {
            self.crash(false);
        }
    }

    /// The whole run.
    pub(crate) fn run<'a>(&mut self, deeds: impl Iterator<Item = &'a Deed>) {
        match self.config.prepared {
            Some(shape) => prepared::take(self, shape),
            None => self.create(),
        }
        let mut deeds = deeds.peekable();
        let mut reopening = &Reopening::default();
        while deeds.peek().is_some() {
            self.reopen(reopening);
            let Some(next) = self.session(&mut deeds) else { break };
            reopening = next;
        }
        self.finish();
    }

    /// Do deeds to the end of the session, or of the run; it ends with nothing open.
    pub(crate) fn session<'a>(&mut self, deeds: &mut impl Iterator<Item = &'a Deed>) -> Option<&'a Reopening> {
        for deed in deeds {
            let steps = self.rng.below(10);
            self.pace(steps, 30);
            self.resume_queues();
            match deed {
                Deed::Ask { ask, queue, write_through } => {
                    let depth = self.config.depth;
                    self.serve_until(|world| world.unanswered() < depth);
                    self.ask(ask, *queue, *write_through);
                }
                Deed::Fault(trouble) => trouble.strike(self),
                Deed::Order(order) => self.order(order.clone()),
                Deed::Resize(blocks) => self.resize(*blocks),
                Deed::Beyond { write, at, count, queue } => self.ask_beyond(*write, *at, *count, *queue),
                Deed::Reset { queue, finish } => self.reset_queue(*queue, *finish),
                Deed::ScanThrough => self.scan_through(),
                Deed::Settle => self.settle_down(),
                Deed::Return => self.check_return(),
                Deed::Close(reopening) => {
                    self.close();
                    return Some(reopening);
                }
                Deed::Crash { after, power, reopening } => {
                    // What comes soon comes in the middle of what is under way.
                    self.pace(*after, if *after < 50 { 100 } else { 30 });
                    self.crash(*power);
                    return Some(reopening);
                }
            }
        }
        self.crash(true);
        None
    }

    /// Heal every fault, open, and see that every sector has an admissible value; then that the volume
    /// takes new data and keeps it.
    pub(crate) fn finish(&mut self) {
        trace!(self, "finish");
        self.config.faults.clear();
        self.disks.iter_mut().for_each(|disk| disk.heal());
        while self.open_once(false, None).expect("no crash was asked for").map_err(|e| panic!("healed: {e}")).is_err() {
        }
        self.settle_down();
        if self.status().mode.poisoned {
            self.order(Order::Clear);
            self.settle_down();
        }
        self.let_pass(3);
        let status = self.status();
        assert!(!status.mode.poisoned && status.mode.spare_up, "healed devices are used again: {status:?}");
        self.check_quiet();
        self.check_all_readable();
        self.rewrite_all();
        self.crash_and_check();
    }

    /// Errors the guest got so far.
    pub(crate) fn guest_errors(&self) -> usize {
        self.events.iter().filter(|event| event.kind == EventKind::GuestError).count()
    }

    fn pieces(&self) -> Vec<SectorRange> {
        let capacity = self.config.capacity;
        (0..capacity)
            .step_by(64)
            .map(|start| SectorRange { start: Sector(start), count: 64.min(capacity - start) })
            .collect()
    }

    /// Read every sector; only lost ones may fail, and only where a device once failed to read them.
    pub(crate) fn check_all_readable(&mut self) {
        for piece in self.pieces() {
            let errors = self.guest_errors();
            self.ask_read(piece);
            self.run_dry();
            if self.guest_errors() == errors {
                continue;
            }
            let lost: Vec<u64> = self
                .list()
                .iter()
                .flat_map(|(block, state, _)| {
                    let start = block.start().0;
                    assert!(!state.in_doubt, "nothing is in doubt after a restart: {block} {state:?}");
                    (0..8).filter(|bit| state.lost >> bit & 1 == 1).map(move |bit| start + bit).collect::<Vec<_>>()
                })
                .collect();
            for sector in piece.start.0..piece.end().0 {
                if lost.contains(&sector) {
                    continue;
                }
                let errors = self.guest_errors();
                self.ask_read(SectorRange { start: Sector(sector), count: 1 });
                self.run_dry();
                assert!(self.guest_errors() == errors, "sector {sector} is not lost and does not read");
            }
        }
    }

    /// Write everything anew: on healthy devices that never fails.
    pub(crate) fn rewrite_all(&mut self) {
        let errors = self.guest_errors();
        for piece in self.pieces() {
            self.ask_write(piece);
        }
        self.run_dry();
        self.ask_flush();
        self.run_dry();
        let after = self.guest_errors();
        assert_eq!(errors, after, "healthy devices take every write");
    }

    fn crash_and_check(&mut self) {
        self.abandon_flights();
        for disk in &mut self.disks {
            disk.power_cut(&mut self.rng);
        }
        self.model.crash(Crash::PowerCut);
        self.stop();
        self.open_once(false, None).expect("no crash was asked for").unwrap_or_else(|e| panic!("healed: {e}"));
        let errors = self.guest_errors();
        for piece in self.pieces() {
            self.ask_read(piece);
        }
        self.run_dry();
        let after = self.guest_errors();
        assert_eq!(errors, after, "what was rewritten and flushed reads");
        self.check_quiet();
        // The label is looked for at the end of the primary, which may have been extended for nothing.
        let at_end = self.status().primary_size == self.disks[0].bytes();
        if self.config.labelled && at_end && self.rng.percent(30) {
            self.lose_spare();
        }
        self.abandon_flights();
        self.stop();
    }

    /// Save, crash, and look at the primary without its spare: it is not written, and what the label lists as
    /// remapped fails; the rest reads.
    fn lose_spare(&mut self) {
        self.done = None;
        self.order(Order::Save);
        self.settle_down();
        assert!(matches!(self.done, Some(Ok(_))), "healthy devices take counters and label: {:?}", self.done);
        let moved: Vec<u64> =
            self.list().iter().filter(|(_, state, _)| state.slot.is_some()).map(|(block, ..)| block.0).collect();
        self.crash(true);
        self.disk(DeviceIndex::SPARE).gone = true;
        self.open_degraded().unwrap_or_else(|error| panic!("a whole label is refused: {error}"));
        let changes = self.disks[0].mtime;
        for block in 0..self.config.capacity.div_ceil(8) {
            let errors = self.guest_errors();
            let (start, count) = (block * 8, (self.config.capacity - block * 8).min(8));
            self.ask_read(SectorRange { start: Sector(start), count });
            self.run_dry();
            assert_eq!(self.guest_errors() > errors, moved.contains(&block), "block {block}; moved: {moved:?}");
        }
        self.check_quiet();
        assert_eq!(self.disks[0].mtime, changes, "a volume without its spare is only read");
    }

    /// Open by the primary's label alone, without a write.
    pub(crate) fn open_degraded(&mut self) -> Result<(), OpenError> {
        let mut opening = Opening::degraded(self.facts(0));
        self.script(None, |world, completions, ops| {
            opening.step(world.now, completions, ops);
            assert!(ops.iter().all(|op| op.kind == OpKind::Read && op.device == DeviceIndex::PRIMARY), "{ops:?}");
            opening.is_done()
        });
        let params = self.config.healer_params();
        let (healer, _) = opening.finish(&params)?;
        self.read_only = true;
        let poisoned = healer.view().mode.poisoned;
        self.start(healer, poisoned);
        Ok(())
    }
}
