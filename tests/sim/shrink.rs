//! From a run that failed to a short one that fails in the same way.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use crate::coverage::Strikes;
use crate::rng::Rng;
use crate::script::{Deed, Script};
use crate::world::World;

/// Schedules that are tried before a deed is called needed: what fails depends on them too.
const SCHEDULES: u64 = 12;
/// Runs that shrinking may take.
const RUNS_MAX: u64 = 20_000;

/// A run, or what is left of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Case {
    pub(crate) seed: u64,
    pub(crate) schedule: u64,
    /// The deeds of the script that are done, by number; all of them if none is named.
    pub(crate) only: Option<BTreeSet<usize>>,
}

/// What came out of a run.
pub(crate) struct Course {
    pub(crate) strikes: Strikes,
    /// Kinds of the events, in order.
    pub(crate) events: Vec<&'static str>,
    /// Requests asked.
    pub(crate) requests: usize,
    /// The trace, if it was to be kept.
    pub(crate) trace: Option<String>,
}

/// Where a run's trace goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trace {
    Nowhere,
    Printed,
    Kept,
}

impl Case {
    pub(crate) fn of(seed: u64) -> Case {
        Case { seed, schedule: 0, only: None }
    }

    /// Run it; panics where the contract is broken.
    pub(crate) fn run(&self, trace: Trace) -> Course {
        let script = Script::of(self.seed);
        let rng = Rng::new(self.seed ^ (self.schedule + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut world = World::with(script.config, rng, trace != Trace::Nowhere);
        world.kept = (trace == Trace::Kept).then(String::new);
        world.strikes = Some(Strikes::default());
        let done = |number: &usize| self.only.as_ref().is_none_or(|only| only.contains(number));
        let deeds: Vec<_> = script.deeds.iter().enumerate().filter(|(number, _)| done(number)).collect();
        if trace == Trace::Printed {
            eprintln!("{:?}", world.config);
            deeds.iter().for_each(|(number, deed)| eprintln!("deed {number}: {deed:?}"));
        }
        world.run(deeds.iter().map(|(_, deed)| *deed));
        Course {
            strikes: world.strikes.take().unwrap_or_default(),
            events: world.events.iter().map(|event| event.kind).collect(),
            requests: deeds.iter().filter(|(_, deed)| matches!(deed, Deed::Ask { .. })).count(),
            trace: world.kept.take(),
        }
    }

    /// Run it; what it fails with is not told to anybody else.
    pub(crate) fn attempt(&self) -> Result<Course, String> {
        QUIET.set(true);
        let result = catch_unwind(AssertUnwindSafe(|| self.run(Trace::Nowhere)));
        QUIET.set(false);
        result.map_err(|panic| match (panic.downcast_ref::<String>(), panic.downcast_ref::<&str>()) {
            (Some(text), _) => text.clone(),
            (None, Some(text)) => (*text).to_owned(),
            (None, None) => "a panic without a message".to_owned(),
        })
    }

    fn size(&self) -> usize {
        self.only.as_ref().map_or(usize::MAX, BTreeSet::len)
    }
}

/// How to see it again.
impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VHOST_REMAP_SEED={}", self.seed)?;
        if self.schedule > 0 {
            write!(f, " VHOST_REMAP_SCHEDULE={}", self.schedule)?;
        }
        if let Some(only) = &self.only {
            let only: Vec<String> = only.iter().map(usize::to_string).collect();
            write!(f, " VHOST_REMAP_ONLY={}", only.join(","))?;
        }
        write!(f, " cargo test --release --test sim -- replay --nocapture")
    }
}

thread_local! {
    /// Panics of this thread are not told to anybody: they are tried out.
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Let those who only want to know whether a run fails hear nothing of its panic.
pub(crate) fn silence_attempts() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let loud = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                loud(info);
            }
        }));
    });
}

/// What kind of failure a message tells of: its promise, or its first words.
fn kind(message: &str) -> &str {
    let end = message.find(|c: char| !c.is_alphanumeric() && c != ' ').unwrap_or(message.len());
    &message[..end.min(24)]
}

/// The shortest case that was found to fail like this one, by leaving out ever smaller parts.
pub(crate) fn shrink(failing: &Case, message: &str) -> Case {
    let all = failing.only.clone().unwrap_or_else(|| (0..Script::of(failing.seed).deeds.len()).collect());
    let mut best = Case { only: Some(all), ..failing.clone() };
    let mut runs = 0;
    let mut part = best.size().div_ceil(2);
    loop {
        let before = best.size();
        let mut from = 0;
        while from < best.size() {
            match without(&best, from, part, message, &mut runs) {
                Some(smaller) => best = smaller,
                None => from += part,
            }
        }
        if runs >= RUNS_MAX || (part == 1 && best.size() == before) {
            return best;
        }
        part = part.div_ceil(2);
    }
}

/// The case without so many deeds, if some schedule lets that fail too.
fn without(case: &Case, from: usize, count: usize, message: &str, runs: &mut u64) -> Option<Case> {
    let deeds = case.only.iter().flatten().copied().enumerate();
    let left: BTreeSet<usize> =
        deeds.filter(|(at, _)| !(from..from + count).contains(at)).map(|(_, deed)| deed).collect();
    let schedules = std::iter::once(case.schedule).chain(0..SCHEDULES);
    for schedule in schedules {
        if *runs >= RUNS_MAX {
            return None;
        }
        *runs += 1;
        let smaller = Case { schedule, only: Some(left.clone()), ..case.clone() };
        if smaller.attempt().is_err_and(|failure| kind(&failure) == kind(message)) {
            return Some(smaller);
        }
    }
    None
}
