//! The simulator: shards, healer and two disks in one thread, seeded.
//!
//! A run is a function of its seed. Every fault it injects is one the contract (DESIGN) claims to
//! survive, so that whatever the model objects to is a bug. To see a failing run again:
//!
//! ```text
//! VHOST_REMAP_SEED=7 cargo test --release --test sim -- replay --nocapture
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
mod disk;
mod every_io;
mod faults;
mod guest;
mod model;
mod rng;
mod session;
mod world;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use world::World;

/// Runs where the environment does not say.
const SEEDS_DEFAULT: u64 = 2000;

/// How often each kind of event came, over all runs: a fault that nobody meets tests nothing.
static SEEN: Mutex<BTreeMap<&str, u64>> = Mutex::new(BTreeMap::new());

fn run(seed: u64, verbose: bool) {
    let mut world = World::new(seed, verbose);
    world.run();
    let mut seen = SEEN.lock().expect("nothing panics while counting");
    for event in &world.events {
        *seen.entry(event.kind).or_default() += 1;
    }
}

fn env(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn every_run_keeps_the_contract() {
    let first = env("VHOST_REMAP_FIRST_SEED").unwrap_or(0);
    let count = env("VHOST_REMAP_SEEDS").unwrap_or(SEEDS_DEFAULT);
    let keep_going = env("VHOST_REMAP_KEEP_GOING").is_some();
    let next = AtomicU64::new(first);
    let failed = AtomicU64::new(0);
    let started = std::time::Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while keep_going || failed.load(Ordering::Relaxed) == 0 {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count {
                        return;
                    }
                    if catch_unwind(AssertUnwindSafe(|| run(seed, false))).is_err() {
                        failed.fetch_add(1, Ordering::Relaxed);
                        eprintln!(
                            "seed {seed} failed; see it again with\n  VHOST_REMAP_SEED={seed} cargo test --release --test sim -- replay --nocapture"
                        );
                    }
                }
            });
        }
    });
    let seconds = started.elapsed().as_secs_f64();
    let ran = next.load(Ordering::Relaxed).min(first + count) - first;
    println!("{ran} runs in {seconds:.1} s ({:.0} a second)", ran as f64 / seconds);
    println!("events: {:?}", SEEN.lock().expect("nothing panics while counting"));
    assert_eq!(failed.load(Ordering::Relaxed), 0, "runs failed");
}

#[test]
fn replay() {
    if let Some(seed) = env("VHOST_REMAP_SEED") {
        run(seed, true);
    }
}
