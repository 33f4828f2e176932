//! Every copy of everything damaged in every way, one by one and in all pairs.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use vhost_remap::engine::event::EventKind;
use vhost_remap::engine::open::OpenError;

use crate::damage::{Copy, Damage, copies, damages, different, inflict};
use crate::engine::Engine;
use crate::expect::{Opens, Refusal, expect};
use crate::rig::{Random, Rig};
use crate::seat::{At, Kind, Seat, age, content, is_whole};
use crate::story::Story;

/// Copies damaged together.
type Case = Vec<(Seat, Damage)>;

/// A story and one of its moments, with blank-slotted disks as of then.
struct Base {
    story: &'static Story,
    moment: usize,
    disks: Rig,
    /// Everything that can happen to a seat, for each seat.
    all: Vec<(Seat, Damage)>,
    /// One of each kind, for each seat.
    kinds: Vec<(Seat, Damage)>,
}

impl Base {
    fn new(labelled: bool, moment: &str) -> Base {
        let story = Story::of(labelled);
        let moment = story.moment(moment);
        let disks = Rig::on(story.shape, story.disks(moment));
        let mut base = Base { story, moment, disks, all: Vec::new(), kinds: Vec::new() };
        (base.all, base.kinds) = (base.of_each_seat(damages), base.of_each_seat(different));
        base
    }

    fn seats(&self) -> Vec<Seat> {
        self.story.moments[self.moment].bytes.keys().copied().collect()
    }

    fn of_each_seat(&self, damages: fn(&Story, usize, &Seat) -> Vec<Damage>) -> Vec<(Seat, Damage)> {
        let of = |seat: Seat| damages(self.story, self.moment, &seat).into_iter().map(move |damage| (seat, damage));
        self.seats().into_iter().flat_map(of).collect()
    }

    fn check(&self, case: &Case) -> &'static str {
        let mut rig = self.disks.fork();
        for (seat, damage) in case {
            inflict(&mut rig, self.story, self.moment, seat, *damage);
        }
        let copies = copies(self.story, self.moment, case);
        match expect(&copies, self.story.shape.layout().table_pages) {
            Err(refusal) => self.check_refused(&mut rig, refusal),
            Ok(opens) => self.check_open(&mut rig, &copies, &opens),
        }
    }

    fn check_refused(&self, rig: &mut Rig, refusal: Refusal) -> &'static str {
        let error = rig.open().map(|_| "opened").expect_err("this must be refused");
        let right = match refusal {
            Refusal::NotAVolume => error == OpenError::NotAVolume,
            Refusal::NoSuperblock => matches!(error, OpenError::NoSuperblock(_)),
            Refusal::OldSpare => matches!(error, OpenError::OldSpare { .. }),
            Refusal::TablePage(number) => error == OpenError::TablePage(number),
            Refusal::Io => matches!(error, OpenError::Io { .. }),
        };
        assert!(right, "{refusal:?} was expected: {error}");
        // With no place left that takes writes, it was found out by writing.
        assert_eq!(rig.was_written(), refusal == Refusal::Io, "what is refused is left as it is");
        match refusal {
            Refusal::NotAVolume | Refusal::NoSuperblock => "no superblock",
            Refusal::OldSpare => "an older spare",
            Refusal::TablePage(_) => "no home of a page",
            Refusal::Io => "no place left",
        }
    }

    fn check_open(&self, rig: &mut Rig, copies: &[Copy<'_>], opens: &Opens) -> &'static str {
        let engine = rig.open().expect("this must open");
        check_state(&engine, opens);
        check_events(&engine, opens, fails_label(copies, opens));
        self.check_copies(rig, copies, opens);
        // A second start finds nothing to do but what cannot be done.
        drop(engine);
        rig.kill();
        let again = rig.open().expect("what was repaired opens");
        check_state(&again, opens);
        let nothing: [&str; 0] = [];
        for kind in ["metadata-repaired", "place-retired", "place-restored"] {
            assert_eq!(again.causes(kind), nothing, "the second start");
        }
        assert_eq!(names(&again, "metadata-damaged"), opens.damaged_still, "the second start");
        match (opens.retired.is_empty(), opens.restored.is_empty()) {
            (false, _) => "a place retired",
            (true, false) => "a place restored",
            (true, true) => "repaired",
        }
    }

    /// All copies of everything are whole, new and the same.
    fn check_copies(&self, rig: &Rig, copies: &[Copy<'_>], opens: &Opens) {
        let mut known: BTreeMap<String, (Vec<u8>, Seat)> = BTreeMap::new();
        for Copy { seat, dead, .. } in copies {
            if *dead || (seat.at != At::Label && seat.kind != Kind::Poison && !opens.live.contains(&seat.at)) {
                continue;
            }
            // Nothing but notes while no flush is possible, and the list only between two superblocks that say so.
            let stampable = !copies.iter().any(|copy| copy.dead && is_current_label(copy.seat, opens));
            if seat.at == At::Label
                && match seat.kind {
                    Kind::Table(..) => opens.poisoned || !stampable,
                    Kind::Superblock(_) => opens.poisoned,
                    Kind::Poison | Kind::Counters => false,
                }
            {
                continue;
            }
            let bytes = seat.read(rig);
            assert!(is_whole(seat, &bytes), "{seat:?} is still damaged");
            let age = age(seat.kind, &bytes);
            let current = Kind::Superblock(u8::from(opens.generation % 2 == 1));
            let page = match seat.kind {
                Kind::Superblock(_) if seat.at == At::Label => {
                    assert!(seat.kind == current || age > opens.generation, "{seat:?}: generation {age}");
                    continue;
                }
                kind if kind == current => {
                    assert_eq!(age, opens.generation, "{seat:?}");
                    "current".to_owned()
                }
                Kind::Superblock(_) => {
                    assert!(age > opens.generation, "{seat:?}: generation {age}");
                    "next".to_owned()
                }
                Kind::Table(_, number) => {
                    assert_eq!(age, opens.sequences[number as usize], "{seat:?}");
                    format!("page {number}")
                }
                Kind::Poison => "poison".to_owned(),
                Kind::Counters => "counters".to_owned(),
            };
            let content = content(seat.kind, &bytes);
            let (first, of) = known.entry(page).or_insert_with(|| (content.clone(), *seat));
            assert!(*first == content, "{seat:?} and {of:?} differ");
        }
    }
}

/// Whether the seat is the label's superblock of the generation that runs: that after the one that was found.
fn is_current_label(seat: Seat, opens: &Opens) -> bool {
    seat.at == At::Label && seat.kind == Kind::Superblock(u8::from(opens.generation.is_multiple_of(2)))
}

fn check_state(engine: &Engine, opens: &Opens) {
    assert_eq!(engine.map(), opens.map);
    assert_eq!(engine.is_poisoned(), opens.poisoned);
}

/// The copies that events of a kind name, in order.
fn names(engine: &Engine, kind: &str) -> Vec<String> {
    let mut names: Vec<String> =
        engine.causes(kind).iter().map(|cause| cause.split(": ").next().expect("a name").to_owned()).collect();
    names.sort();
    names
}

/// Whether the list of the label cannot be written, or neither of the superblocks that give it a date.
fn fails_label(copies: &[Copy<'_>], opens: &Opens) -> bool {
    let dead = |is: fn(&Kind) -> bool| {
        copies.iter().filter(|copy| copy.dead && copy.seat.at == At::Label && is(&copy.seat.kind)).count()
    };
    let lists = dead(|kind| matches!(kind, Kind::Table(..)));
    let superblocks = dead(|kind| matches!(kind, Kind::Superblock(_)));
    !opens.poisoned && (lists > 0 || superblocks == 2)
}

fn check_events(engine: &Engine, opens: &Opens, fails_label: bool) {
    let mut repaired: BTreeMap<String, usize> = BTreeMap::new();
    names(engine, "metadata-repaired").into_iter().for_each(|name| *repaired.entry(name).or_default() += 1);
    for (name, times) in &opens.repaired {
        let found = repaired.remove(name).unwrap_or(0);
        assert!(times.contains(&found), "{name}: {found} events: {:?}", engine.events);
    }
    assert_eq!(repaired, BTreeMap::new(), "repaired without need");
    assert_eq!(names(engine, "metadata-damaged"), opens.damaged);
    for (kind, places) in [("place-retired", &opens.retired), ("place-restored", &opens.restored)] {
        let causes = engine.causes(kind);
        assert_eq!(causes.len(), places.len(), "{kind}: {causes:?}");
        for (cause, at) in causes.iter().zip(places) {
            assert!(cause.contains(at.place().expect("a place").name()), "{kind}: {cause}");
        }
    }
    assert_eq!(engine.causes("poisoned").len(), usize::from(opens.poison_unknown));
    assert_eq!(engine.causes("label-failed").len(), usize::from(fails_label), "{:?}", engine.events);
    let known = |kind| {
        use EventKind::*;
        matches!(
            kind,
            MetadataRepaired | MetadataDamaged | PlaceRetired | PlaceRestored | Poisoned | Health | LabelFailed
        )
    };
    let others: Vec<_> = engine.events.iter().filter(|event| !known(event.kind)).collect();
    assert!(others.is_empty(), "{others:?}");
}

/// Check all cases that `case` counts out, on all cores, and say how they ended.
fn check_all(what: &str, base: impl Fn() -> Base + Sync, case: impl Fn(&Base, usize) -> Option<Case> + Sync) {
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let started = std::time::Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut ends: BTreeMap<&str, usize> = BTreeMap::new();
    std::thread::scope(|scope| {
        let worker = || {
            let base = base();
            let mut ends: BTreeMap<&str, usize> = BTreeMap::new();
            while !failed.load(Ordering::Relaxed) {
                let Some(case) = case(&base, next.fetch_add(1, Ordering::Relaxed)) else { break };
                match catch_unwind(AssertUnwindSafe(|| base.check(&case))) {
                    Ok(end) => *ends.entry(end).or_default() += 1,
                    Err(_) => {
                        failed.store(true, Ordering::Relaxed);
                        eprintln!("{what}: the case was {case:?}");
                    }
                }
            }
            ends
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        for worker in workers {
            for (end, count) in worker.join().expect("panics are caught") {
                *ends.entry(end).or_default() += count;
            }
        }
    });
    let seconds = started.elapsed().as_secs_f64();
    println!("{what}: {} cases in {seconds:.1} s: {ends:?}", ends.values().sum::<usize>());
    assert!(!failed.load(Ordering::Relaxed), "{what}: see the case above");
}

/// The moments that damage strikes: in the middle of a commit, after a clean close, and poisoned with one
/// place retired; of a volume that was created, and of one that was adopted.
const MOMENTS: [(bool, &str); 6] =
    [(true, "half"), (true, "closed"), (true, "alone"), (false, "half"), (false, "closed"), (false, "alone")];

#[test]
fn any_one_damaged_copy_is_repaired_from_the_others() {
    for (labelled, moment) in MOMENTS {
        check_all(
            &format!("{moment}, labelled {labelled}"),
            || Base::new(labelled, moment),
            // And with nothing damaged.
            |base, index| (index <= base.all.len()).then(|| base.all.get(index).copied().into_iter().collect()),
        );
    }
}

/// The `index`-th pair of damages that concern two seats.
fn pair(singles: &[(Seat, Damage)], firsts: &[usize], index: usize) -> Option<Case> {
    let first = firsts.partition_point(|pairs| *pairs <= index).checked_sub(1)?;
    let second = first + 1 + (index - firsts[first]);
    let (one, two) = (singles.get(first)?, singles.get(second)?);
    Some(if one.0 == two.0 { vec![*one] } else { vec![*one, *two] })
}

/// Pairs before those that begin with each single.
fn firsts(count: usize) -> Vec<usize> {
    (0..count).map(|first| first * count - first * (first + 1) / 2).collect()
}

fn check_pairs(labelled: bool, moment: &'static str) {
    check_all(
        &format!("pairs, {moment}, labelled {labelled}"),
        || Base::new(labelled, moment),
        |base, index| pair(&base.kinds, &firsts(base.kinds.len()), index),
    );
}

#[test]
fn any_two_damaged_copies_after_a_crash_are_repaired_or_refused() {
    check_pairs(true, "half");
    check_pairs(false, "half");
}

#[test]
fn any_two_damaged_copies_after_a_clean_close_are_repaired_or_refused() {
    check_pairs(true, "closed");
    check_pairs(false, "closed");
}

#[test]
fn any_two_damaged_copies_with_one_place_left_are_repaired_or_refused() {
    check_pairs(true, "alone");
    check_pairs(false, "alone");
}

/// All copies of something: superblocks, homes of a page, poison pages. Each in the same way, and then in
/// ways that chance picks.
#[test]
fn with_no_whole_copy_left_the_volume_is_refused_or_poisoned() {
    const CHANCES: u64 = 200;
    for (labelled, moment) in MOMENTS {
        let groups = |base: &Base| -> Vec<Vec<Seat>> {
            let is = |is: &dyn Fn(Seat) -> bool| base.seats().into_iter().filter(|seat| is(*seat)).collect();
            let on_spare = |seat: Seat| seat.at != At::Label;
            let pages = (0..base.story.shape.layout().table_pages)
                .map(|number| is(&|seat| on_spare(seat) && matches!(seat.kind, Kind::Table(_, of) if of == number)));
            pages
                .chain([
                    is(&|seat| on_spare(seat) && matches!(seat.kind, Kind::Superblock(_))),
                    is(&|seat| matches!(seat.kind, Kind::Superblock(_))),
                    is(&|seat| seat.kind == Kind::Poison),
                    is(&|seat| seat.kind == Kind::Counters),
                    is(&|seat| seat.at == At::Label),
                ])
                .collect()
        };
        check_all(
            &format!("groups, {moment}, labelled {labelled}"),
            || Base::new(labelled, moment),
            |base, index| {
                let groups = groups(base);
                let group = groups.get(index % groups.len()).expect("within");
                let round = index / groups.len();
                let same = [
                    Damage::Random(7),
                    Damage::Zero,
                    Damage::Unreadable,
                    Damage::Dead,
                    Damage::Flip(3),
                    Damage::Flip(600),
                ];
                if let Some(damage) = same.get(round) {
                    return Some(group.iter().map(|seat| (*seat, *damage)).collect());
                }
                let mut random = Random::new(index as u64);
                let mut pick = |seat: &Seat| {
                    let all = damages(base.story, base.moment, seat);
                    let at = usize::try_from(random.below(all.len() as u64)).expect("small");
                    (*seat, all[at])
                };
                (index as u64 <= CHANCES * groups.len() as u64).then(|| group.iter().map(&mut pick).collect())
            },
        );
    }
}
