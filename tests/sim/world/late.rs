//! A shard that hears late of what the healer has decided.

use std::collections::VecDeque;

use vhost_remap::engine::event::EventKind;

use super::World;
use crate::config::Config;
use crate::rng::Rng;

impl World {
    fn has_told(&self, kind: EventKind) -> bool {
        self.events.iter().any(|event| event.kind == kind)
    }
}

/// F2: which regions were written is noted when every shard has heard that no more is: until then one of them may
/// answer a write that the failed flush dropped, of which it has not said yet that it was done.
#[test]
fn a_poisoning_is_noted_when_the_last_shard_has_heard_of_it() {
    for late in 0..3 {
        let mut world = World::with(Config::without_faults(3, 128, 16, true), Rng::new(1), false);
        world.create_once(None).expect("no crash was asked for").expect("healthy disks take a new volume");
        world.open_once(false, None).expect("no crash was asked for").expect("a new volume opens");
        world.rewrite_all();
        world.disks[0].bad_flushes = 1;
        world.ask_flush();
        let mut kept = VecDeque::new();
        while world.advance() || world.flights.iter().any(|flight| flight.ready > world.now) && world.wait() {
            kept.append(&mut world.to_shard[late]);
        }
        assert!(
            world.has_told(EventKind::FlushFailed) && !world.has_told(EventKind::Poisoned),
            "shard {late} has not heard of it"
        );
        world.to_shard[late] = kept;
        world.settle_down();
        assert!(world.has_told(EventKind::Poisoned));
    }
}
