//! Threads of the server under a model checker, which decides who goes on wherever one of them touches what another
//! may touch too: [`crate::sync`] says what that is. What runs is the code that serves: workers with their rings,
//! shards and reactors, the pool of threads, the healer's thread, the protocol's half of a connection. Guests and
//! front-ends are played, on real memory and real eventfds.
//!
//! The checker tries schedules at random, and such with few changes of hands at the worst places (PCT). It knows no
//! orders weaker than sequential consistency: those of atomics are argued where they are used.
//!
//! `cargo test --lib --features shuttle interleavings`; `INTERLEAVINGS=100` tries a hundred times as many.

mod guest;
mod healer;
mod mailbox;
mod volume;
mod worker;

use std::sync::Arc;

use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, Runner};

const SEED: u64 = 20;
/// Changes of hands that a schedule of the second kind makes: most races need one or two.
const CHANGES: usize = 3;
/// What a worker's turn takes of stack, without optimisation, and more.
const STACK: usize = 1 << 20;

/// Run a scenario under so many schedules of each kind. It fails if it panics, or if nobody can go on.
fn explore(schedules: usize, scenario: fn()) {
    let times: usize = std::env::var("INTERLEAVINGS").map_or(1, |times| times.parse().expect("a number"));
    let schedules = schedules * times;
    let mut config = Config::new();
    config.stack_size = STACK;
    config.silence_warnings = true;
    Runner::new(RandomScheduler::new_from_seed(SEED, schedules), config.clone()).run(scenario);
    Runner::new(PctScheduler::new_from_seed(SEED, CHANGES, schedules), config).run(scenario);
}

/// What must be gone at the end of a scenario.
fn last_owner<T: ?Sized>(shared: &Arc<T>) -> bool {
    Arc::strong_count(shared) == 1
}
