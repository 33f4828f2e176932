//! Every I/O fails in turn. Where the seeds roam, this goes through one thing after the other: for each
//! scenario of [`scenario::TABLE`], and each device operation of it in a fixed order,
//!
//! - the operation fails, once, having done nothing, half or all of it;
//! - everything fails from it on, on either device and on both, until the scenario has ended;
//! - the process or the power goes before it, and of the writes that were not flushed any may be left, torn
//!   at any sector; where they are few, every subset of their sectors is looked at;
//! - and again: each operation of the reopening that follows fails, or is where the power goes.
//!
//! After each the volume must come back and hold what the contract says.

mod acts;
mod copies;
pub(crate) mod plan;
mod scenario;

use std::collections::HashSet;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};

use vhost_remap::device::{DeviceIndex, OpKind};
use vhost_remap::engine::event::EventKind;
use vhost_remap::engine::healer::Order;
use vhost_remap::engine::view::PrimaryState;

use crate::config::Config;
use crate::disk::Effect;
use crate::rng::Rng;
use crate::world::World;
use copies::check_copies;
use plan::{Detail, Image, Plan, Snapshot, Strike, fingerprint};
use scenario::{Scenario, TABLE};

const EFFECTS: [Effect; 3] = [Effect::Nothing, Effect::Half, Effect::All];

/// What was done for a scenario.
#[derive(Default)]
struct Tally {
    operations: u64,
    /// Runs of it in which something failed.
    runs: u64,
    /// Moments at which it was cut, over all runs.
    crashes: u64,
    /// Different images that were opened and checked, not counting those of crashed reopenings.
    images: u64,
    /// Reopenings in which something failed.
    reopenings: u64,
    /// Different images of reopenings that were cut.
    again: u64,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tally { operations, runs, crashes, images, reopenings, again } = self;
        write!(
            f,
            "{operations:4} operations, {runs:4} runs, {crashes:6} crashes, {images:6} images; \
             reopening: {reopenings:6} runs, {again:6} images"
        )
    }
}

/// One scenario on its way through all that can happen to it.
struct Drill<'a> {
    scenario: &'a Scenario,
    config: Config,
    base: Snapshot,
    /// Images that were looked at: with every trouble in the reopening, and without.
    seen: [HashSet<u64>; 2],
    tally: Tally,
}

impl Drill<'_> {
    fn new(scenario: &Scenario) -> Drill<'_> {
        let config = scenario.config();
        let mut world = World::with(config.clone(), Rng::new(1), false);
        world.plan = Some(Plan::default());
        (scenario.prepare)(&mut world);
        let base = Snapshot::of(&world);
        Drill { scenario, config, base, seen: Default::default(), tally: Tally::default() }
    }

    /// The scenario once, with what fails and where crash points are noted from. The last one is its end.
    fn play(&self, strike: Option<Strike>, record_from: Option<u64>, verbose: bool) -> World {
        let mut world = self.base.world(None, &self.config, verbose);
        (self.scenario.begin)(&mut world);
        let plan = world.plan.as_mut().expect("a snapshot's world has one");
        (plan.counting, plan.strike, plan.record_from) = (true, strike, record_from);
        (self.scenario.act)(&mut world);
        world.record();
        world.plan.as_mut().expect("as above").counting = false;
        world
    }

    fn run(&mut self) {
        let clean = self.case("untouched", None, |drill, world| {
            let plan = world.plan.as_ref().expect("planned");
            drill.tally.operations = plan.count;
            for snapshot in &plan.snapshots {
                drill.explore(snapshot, Detail::Writes, true);
                drill.explore(snapshot, Detail::Torn, false);
            }
            errors(world)
        });
        for effect in EFFECTS {
            for at in 0.. {
                let what = format!("operation {at} fails, {effect:?}");
                let strike = Strike::Once { at, effect };
                if self.case(&what, Some(strike), |drill, world| drill.check_once(world, clean)) {
                    break;
                }
            }
        }
        for (devices, errno) in
            [1, 2, 3].into_iter().flat_map(|devices| [(devices, libc::EIO), (devices, libc::ENODEV)])
        {
            for at in 0.. {
                let what = format!("everything fails from {at} on, devices {devices}, errno {errno}");
                let strike = Strike::From { at, devices, errno };
                let untouched = self.case(&what, Some(strike), |drill, world| {
                    let plan = world.plan.as_ref().expect("planned");
                    check_flushes(world);
                    drill.explore(plan.snapshots.last().expect("the end is one"), Detail::Few, true);
                    plan.struck.is_empty()
                });
                if untouched {
                    break;
                }
            }
        }
    }

    /// Play, check with `check`, and see that the volume comes back. What fails is shown again with a trace.
    fn case<T>(&mut self, what: &str, strike: Option<Strike>, check: impl FnOnce(&mut Self, &mut World) -> T) -> T {
        self.tally.runs += u64::from(strike.is_some());
        let record_from = match strike {
            None => Some(0),
            Some(Strike::Once { at, .. }) => Some(at + 1),
            Some(Strike::From { .. }) => None,
        };
        let result = catch_unwind(AssertUnwindSafe(|| {
            let mut world = self.play(strike, record_from, false);
            let result = check(self, &mut world);
            self.come_back(world);
            result
        }));
        result.unwrap_or_else(|panic| {
            eprintln!("{}: {what}; again, with a trace:", self.scenario.name);
            let _ = catch_unwind(AssertUnwindSafe(|| {
                let world = self.play(strike, None, true);
                self.come_back(world);
            }));
            resume_unwind(panic)
        })
    }

    /// After a failure that came once: whether the scenario was over before it came.
    fn check_once(&mut self, world: &mut World, clean: usize) -> bool {
        let plan = world.plan.as_ref().expect("planned");
        let Some(struck) = plan.struck.first() else { return true };
        check_flushes(world);
        // A device that does not know who it is is gone; and the second failure of metadata takes the spare down.
        let hidden = !matches!(struck.kind, OpKind::Flush | OpKind::Identify) && !self.scenario.damaged;
        if hidden && !struck.by_script {
            assert!(errors(world) <= clean, "a single failure that is no flush's reaches the guest");
        }
        let (last, others) = plan.snapshots.split_last().expect("the end is one");
        others.iter().for_each(|snapshot| self.explore(snapshot, Detail::Few, false));
        self.explore(last, Detail::Few, true);
        false
    }

    /// Open every image that a crash can leave here; `again`: with every trouble in that.
    fn explore(&mut self, snapshot: &Snapshot, detail: Detail, again: bool) {
        self.tally.crashes += u64::from(detail != Detail::Torn);
        for image in snapshot.images(detail) {
            if let Some(world) = self.fresh(snapshot, &image, again) {
                self.tally.images += 1;
                self.leaf(snapshot, &image, "an image", |drill| drill.reopen(world, snapshot, &image, again));
            }
        }
    }

    /// The world of an image that was not looked at before.
    fn fresh(&mut self, snapshot: &Snapshot, image: &Image, again: bool) -> Option<World> {
        let world = snapshot.world(Some(image), &self.config, false);
        let print = fingerprint(&world, snapshot.poisoned);
        let new = !self.seen[0].contains(&print) && self.seen[usize::from(!again)].insert(print);
        new.then_some(world)
    }

    fn leaf(&mut self, snapshot: &Snapshot, image: &Image, what: &str, check: impl FnOnce(&mut Self)) {
        catch_unwind(AssertUnwindSafe(|| check(self))).unwrap_or_else(|panic| {
            let (name, at) = (self.scenario.name, snapshot.at);
            eprintln!("{name}: {what} of a crash before operation {at}: {image:?}; again, with a trace:");
            let world = snapshot.world(Some(image), &self.config, true);
            let _ = catch_unwind(AssertUnwindSafe(|| self.reopen(world, snapshot, image, false)));
            resume_unwind(panic)
        });
    }

    fn reopen(&mut self, mut world: World, snapshot: &Snapshot, image: &Image, again: bool) {
        self.check_copies(&world);
        let plan = world.plan.as_mut().expect("a snapshot's world has one");
        (plan.counting, plan.record_from) = (true, again.then_some(0));
        self.open(&mut world);
        let plan = world.plan.as_mut().expect("as above");
        plan.counting = false;
        let (kinds, snapshots) = (std::mem::take(&mut plan.kinds), std::mem::take(&mut plan.snapshots));
        self.verify(&mut world, snapshot.poisoned);
        if !again {
            return;
        }
        for cut in &snapshots {
            self.reopen_twice(cut);
        }
        for (at, kind) in (0..).zip(kinds) {
            let effects = if matches!(kind, OpKind::Read | OpKind::Identify) { &EFFECTS[..1] } else { &EFFECTS[..] };
            for effect in effects {
                self.tally.reopenings += 1;
                let strike = Strike::Once { at, effect: *effect };
                let what = format!("with operation {at} of the reopening failing, {effect:?},");
                self.leaf(snapshot, image, &what, |drill| drill.reopen_struck(snapshot, image, strike, kind));
            }
        }
    }

    /// Open what a crash while opening has left.
    fn reopen_twice(&mut self, cut: &Snapshot) {
        for image in cut.images(Detail::Few) {
            if let Some(world) = self.fresh(cut, &image, false) {
                self.tally.again += 1;
                self.leaf(cut, &image, "a reopening", |drill| drill.reopen(world, cut, &image, false));
            }
        }
    }

    fn reopen_struck(&mut self, snapshot: &Snapshot, image: &Image, strike: Strike, kind: OpKind) {
        let mut world = snapshot.world(Some(image), &self.config, false);
        let plan = world.plan.as_mut().expect("a snapshot's world has one");
        (plan.counting, plan.strike) = (true, Some(strike));
        let opened = world.open_once(false, None).expect("no crash was asked for");
        world.plan.as_mut().expect("as above").counting = false;
        if let Err(error) = opened {
            let excused = kind == OpKind::Flush || self.scenario.damaged || self.scenario.creates || world.retired;
            assert!(excused, "a failure while opening that leaves a whole copy refuses the volume: {error}");
            self.reopen_twice(&Snapshot::of(&world));
            self.open(&mut world);
        }
        self.verify(&mut world, snapshot.poisoned);
        self.reopen_twice(&Snapshot::of(&world));
    }

    /// Open, with the marks that the scenario left on the devices or without.
    fn open(&mut self, world: &mut World) {
        let Err(error) = world.open_once(false, None).expect("no crash was asked for") else { return };
        if self.scenario.creates {
            world.disks.iter_mut().for_each(|disk| disk.heal());
            let created = world.create_once(None).expect("no crash was asked for");
            created.unwrap_or_else(|error| panic!("healthy disks take a new volume: {error}"));
        } else {
            let marks =
                world.disks.iter().any(|disk| disk.gone || !disk.bad_reads.is_empty() || !disk.bad_writes.is_empty());
            assert!(marks, "a volume that nothing has harmed is refused: {error}");
            world.disks.iter_mut().for_each(|disk| disk.heal());
        }
        let opened = world.open_once(false, None).expect("no crash was asked for");
        opened.unwrap_or_else(|error| panic!("healed devices are refused: {error}"));
    }

    /// Where one place is harmed already, a superblock that does not read for once hides that the other was retired.
    fn check_copies(&self, world: &World) {
        if !self.scenario.damaged {
            check_copies(world);
        }
    }

    /// Healed, the volume has what it must have.
    fn verify(&self, world: &mut World, poisoned: bool) {
        world.disks.iter_mut().for_each(|disk| disk.heal());
        world.settle_down();
        let status = world.status();
        assert!(status.mode.poisoned || !poisoned, "F2: a poisoning is forgotten: {status:?}");
        world.check_quiet();
        world.check_all_readable();
        self.check_copies(world);
        let status = world.status();
        let mapped = world.list().iter().filter(|(_, state, _)| state.slot.is_some()).count();
        assert!(status.mode.spare_up, "the spare is there: {status:?}");
        // A poisoned volume commits nothing, not even that a slot is free which its block has left.
        assert!(status.live == mapped || status.mode.poisoned, "O2: one live slot a block: {mapped}, {status:?}");
        assert!(status.lost_sectors == 0 || self.scenario.loses, "nothing was unreadable: {status:?}");
    }

    /// The faults end: what is open works again, takes new data, and keeps it through a crash.
    fn come_back(&mut self, mut world: World) {
        let plan = world.plan.as_mut().expect("planned");
        (plan.strike, plan.clearing) = (None, false);
        world.disks.iter_mut().for_each(|disk| disk.heal());
        if world.engine.is_some() && world.read_only {
            world.settle_down();
            world.stop();
        }
        if world.engine.is_none() {
            self.open(&mut world);
        }
        world.settle_down();
        world.let_pass(3);
        let mode = world.status().mode;
        if mode.poisoned || mode.primary != PrimaryState::Up {
            world.order(Order::Clear);
            world.settle_down();
            world.let_pass(3);
        }
        let mode = world.status().mode;
        assert!(!mode.poisoned && mode.spare_up && mode.primary == PrimaryState::Up, "healed, but {mode:?}");
        self.verify(&mut world, false);
        world.rewrite_all();
        let end = Snapshot::of(&world);
        for image in end.images(Detail::Few) {
            let mut world = end.world(Some(&image), &self.config, world.verbose);
            self.open(&mut world);
            self.verify(&mut world, false);
        }
    }
}

fn errors(world: &World) -> usize {
    world.events.iter().filter(|event| event.kind == EventKind::GuestError).count()
}

/// F2, F3: a flush that failed under the healer poisons the volume, or takes the spare down.
fn check_flushes(world: &World) {
    let plan = world.plan.as_ref().expect("planned");
    let told = |kind| world.events.iter().any(|event| event.kind == kind);
    for struck in plan.struck.iter().filter(|struck| struck.kind == OpKind::Flush && !struck.by_script) {
        let spare = struck.device == DeviceIndex::SPARE;
        assert!(
            told(EventKind::Poisoned) || (spare && told(EventKind::SpareDown)),
            "F2: a failed flush goes by: {struck:?}"
        );
    }
}

#[test]
fn every_operation_fails_and_is_where_the_power_goes_in_turn() {
    let only = std::env::var("VHOST_REMAP_SCENARIO").ok();
    let rows: Vec<&Scenario> =
        TABLE.iter().filter(|row| only.as_ref().is_none_or(|only| row.name.contains(only))).collect();
    let (next, failed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let started = std::time::Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(scenario) = rows.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let began = std::time::Instant::now();
                    let mut drill = Drill::new(scenario);
                    let passed = catch_unwind(AssertUnwindSafe(|| drill.run())).is_ok();
                    failed.fetch_add(usize::from(!passed), Ordering::Relaxed);
                    let (name, seconds) = (scenario.name, began.elapsed().as_secs_f64());
                    println!("{name:35} {} ({seconds:.1} s)", drill.tally);
                }
            });
        }
    });
    println!("{} scenarios in {:.1} s", rows.len(), started.elapsed().as_secs_f64());
    assert_eq!(failed.into_inner(), 0, "scenarios failed; see them alone with VHOST_REMAP_SCENARIO=name");
}
