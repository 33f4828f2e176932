//! The simulator: shards, healer and two disks in one thread, seeded.
//!
//! A run is a function of its seed, byte for byte. Every fault it injects is one the contract (DESIGN) claims
//! to survive, so that whatever the model objects to is a bug. A run that fails is shrunk, and the command
//! printed that shows what is left of it again. For hours:
//!
//! ```text
//! make simulate SEEDS=1000000
//! ```
//!
//! [`every_io`] leaves nothing to chance; a row of its table alone:
//!
//! ```text
//! VHOST_REMAP_SCENARIO=release cargo test --release --test sim -- every_operation --nocapture
//! ```

mod bounds;
mod brief;
mod config;
mod coverage;
mod disk;
mod every_io;
mod faults;
mod guest;
mod lies;
mod memory;
mod model;
mod prepared;
mod rng;
mod script;
mod session;
mod shrink;
mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use coverage::Strikes;
use script::{Deed, Script};
use shrink::{Case, Trace, shrink};

/// Runs where the environment does not say.
const SEEDS_DEFAULT: u64 = 20_000;
/// So many runs come by every pair of fault and state.
const SEEDS_FOR_ALL_PAIRS: u64 = 500_000;
/// Runs after which a word is said.
const PROGRESS: u64 = 100_000;

/// What all runs came by.
#[derive(Default)]
struct Sum {
    runs: u64,
    failed: u64,
    requests: usize,
    /// Pages of the table that crashes tore between their entries.
    torn_tables: usize,
    strikes: Strikes,
    /// A kind of event that nobody meets tests nothing.
    events: BTreeMap<&'static str, u64>,
}

fn env(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name}={value}: a whole number is needed")))
}

/// Run a seed; what fails is shrunk and told.
fn try_seed(seed: u64, sum: &mut Sum) {
    let case = Case::of(seed);
    sum.runs += 1;
    match case.attempt() {
        Ok(course) => {
            sum.requests += course.requests;
            sum.torn_tables += course.torn_tables;
            sum.strikes.add(&course.strikes);
            course.events.into_iter().for_each(|kind| *sum.events.entry(kind.name()).or_default() += 1);
        }
        Err(message) => {
            sum.failed += 1;
            let small = if env("VHOST_REMAP_SHRINK") == Some(0) { case.clone() } else { shrink(&case, &message) };
            let deeds = small.only.as_ref().map_or(0, BTreeSet::len);
            eprintln!("seed {seed} failed: {message}\n  {case}\nwith {deeds} deeds left:\n  {small}");
        }
    }
}

fn run_seeds(first: u64, count: u64, keep_going: bool) -> Sum {
    shrink::silence_attempts();
    let (next, failed) = (AtomicU64::new(first), AtomicBool::new(false));
    let started = Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let sums = std::thread::scope(|scope| {
        let work = || {
            let mut sum = Sum::default();
            while keep_going || !failed.load(Ordering::Relaxed) {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= first + count {
                    break;
                }
                try_seed(seed, &mut sum);
                failed.fetch_or(sum.failed > 0, Ordering::Relaxed);
                let done = seed - first + 1;
                if done.is_multiple_of(PROGRESS) {
                    eprintln!("{done} of {count} runs, {:.0} s", started.elapsed().as_secs_f64());
                }
            }
            sum
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().map(|thread| thread.join().expect("attempts do not panic")).collect::<Vec<Sum>>()
    });
    let mut all = Sum::default();
    for sum in sums {
        (all.runs, all.failed, all.requests) =
            (all.runs + sum.runs, all.failed + sum.failed, all.requests + sum.requests);
        all.torn_tables += sum.torn_tables;
        all.strikes.add(&sum.strikes);
        sum.events.into_iter().for_each(|(kind, count)| *all.events.entry(kind).or_default() += count);
    }
    let seconds = started.elapsed().as_secs_f64();
    println!(
        "{} runs with {} requests in {seconds:.1} s ({:.0} a second, on {threads} cores)",
        all.runs,
        all.requests,
        all.runs as f64 / seconds
    );
    println!("{} pages of the table torn between their entries", all.torn_tables);
    println!("events: {:?}\nstrikes:\n{}", all.events, all.strikes);
    all
}

#[test]
fn every_run_keeps_the_contract() {
    let first = env("VHOST_REMAP_FIRST_SEED").unwrap_or(0);
    let count = env("VHOST_REMAP_SEEDS").unwrap_or(SEEDS_DEFAULT);
    let sum = run_seeds(first, count, env("VHOST_REMAP_KEEP_GOING").is_some());
    assert_eq!(sum.failed, 0, "runs failed");
    let torn = sum.torn_tables as u64;
    assert!(count < SEEDS_DEFAULT || torn > count / 100, "crashes tore {torn} pages of the table in {count} runs");
    let empty = sum.strikes.empty();
    assert!(count < SEEDS_FOR_ALL_PAIRS || empty.is_empty(), "faults that never struck in a state: {empty:?}");
}

#[test]
fn a_run_is_a_function_of_its_seed() {
    for seed in 0..40 {
        let traces = [(); 2].map(|()| Case::of(seed).run(Trace::Kept).trace.expect("kept"));
        assert!(traces[0] == traces[1], "seed {seed} takes two courses");
        assert!(traces[0].lines().count() > 300, "seed {seed} has hardly a trace");
    }
}

#[test]
fn a_script_has_requests_faults_and_a_crash() {
    for seed in 0..1000 {
        let deeds = Script::of(seed).deeds;
        let count = |wanted: fn(&Deed) -> bool| deeds.iter().filter(|deed| wanted(deed)).count();
        assert!(count(|deed| matches!(deed, Deed::Ask { .. })) >= 200);
        assert!(count(|deed| matches!(deed, Deed::Fault(_))) >= 3);
        assert!(count(|deed| matches!(deed, Deed::Crash { .. })) >= 1);
    }
}

#[test]
fn replay() {
    if let Some(seed) = env("VHOST_REMAP_SEED") {
        let only = std::env::var("VHOST_REMAP_ONLY").ok();
        let number = |text: &str| text.parse().unwrap_or_else(|_| panic!("VHOST_REMAP_ONLY: {text}: not a number"));
        let only = only.map(|only| only.split(',').filter(|text| !text.is_empty()).map(number).collect());
        Case { seed, schedule: env("VHOST_REMAP_SCHEDULE").unwrap_or(0), only }.run(Trace::Printed);
    }
}
