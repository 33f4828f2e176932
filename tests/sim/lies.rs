//! A disk that answers flushes and does nothing. What it then loses nobody can bring back; but a volume still
//! opens, or is refused with a reason, and serves what it has.

use crate::rng::Rng;
use crate::script::{Deed, Reopening, Script};
use crate::world::World;

/// How the sessions of a run came about.
#[derive(Default)]
struct Openings {
    opened: u32,
    refused: u32,
}

fn run(seed: u64, openings: &mut Openings) {
    let Script { mut config, deeds } = Script::of(seed);
    config.faults.clear();
    let mut world = World::with(config, Rng::new(seed), false);
    world.create();
    world.believe = false;
    world.disks.iter_mut().for_each(|disk| disk.lies = true);
    let mut deeds = deeds.iter().filter(|deed| !matches!(deed, Deed::Fault(_) | Deed::Return)).peekable();
    while deeds.peek().is_some() {
        match world.open_once(false, None).expect("no crash was asked for") {
            Ok(()) => openings.opened += 1,
            Err(error) => {
                assert!(!error.to_string().is_empty());
                openings.refused += 1;
                return;
            }
        }
        let _: Option<&Reopening> = world.session(&mut deeds);
    }
}

#[test]
fn a_volume_on_disks_that_lie_about_flushes_opens_or_is_refused() {
    let mut openings = Openings::default();
    for seed in 0..1500 {
        run(seed, &mut openings);
    }
    let Openings { opened, refused } = openings;
    println!("{opened} openings, {refused} refusals");
    assert!(opened > 1500 && refused > 0, "{opened} openings, {refused} refusals");
}
