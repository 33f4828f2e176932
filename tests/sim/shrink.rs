//! From a run that failed to a short one that fails in the same way.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use vhost_remap::engine::event::EventKind;

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
    pub(crate) events: Vec<EventKind>,
    /// Requests asked.
    pub(crate) requests: usize,
    /// Pages of the table that crashes tore between their entries.
    pub(crate) torn_tables: usize,
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
            torn_tables: world.disks[1].torn_tables,
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

/// The shortest case that was found to fail like this one. What is left is tried in several schedules.
pub(crate) fn shrink(failing: &Case, message: &str) -> Case {
    let all = failing.only.clone().unwrap_or_else(|| (0..Script::of(failing.seed).deeds.len()).collect());
    let mut best = Case { only: Some(all.clone()), ..failing.clone() };
    let mut runs = 0;
    smallest(all, |deeds| {
        let schedules = std::iter::once(best.schedule).chain(0..SCHEDULES);
        for schedule in schedules {
            let smaller = Case { seed: failing.seed, schedule, only: Some(deeds.clone()) };
            runs += 1;
            if runs <= RUNS_MAX && smaller.attempt().is_err_and(|failure| kind(&failure) == kind(message)) {
                best = smaller;
                return true;
            }
        }
        false
    });
    best
}

/// A small part of `all` that still fails: ever smaller pieces are left out as long as that does.
fn smallest(all: BTreeSet<usize>, mut fails: impl FnMut(&BTreeSet<usize>) -> bool) -> BTreeSet<usize> {
    let mut best = all;
    let mut piece = best.len().div_ceil(2).max(1);
    loop {
        let before = best.len();
        let mut from = 0;
        while from < best.len() {
            let numbered = best.iter().copied().enumerate();
            let left = numbered.filter(|(at, _)| !(from..from + piece).contains(at)).map(|(_, deed)| deed).collect();
            if fails(&left) {
                best = left;
            } else {
                from += piece;
            }
        }
        if piece == 1 && best.len() == before {
            return best;
        }
        piece = piece.div_ceil(2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_of_a_failure_is_what_it_needs() {
        let needed = BTreeSet::from([17, 60, 133]);
        let mut attempts = 0;
        let left = smallest((0..250).collect(), |deeds| {
            attempts += 1;
            needed.is_subset(deeds)
        });
        assert_eq!(left, needed);
        assert!(attempts < 200, "{attempts} attempts");
    }
}
