//! How long requests take on a disk that tries hard before it fails (R2, W1). In simulated time, so that a
//! minute of a dying disk costs nothing.

use vhost_remap::device::Errno;
use vhost_remap::engine::event::EventKind;
use vhost_remap::units::{Sector, SectorRange};

use crate::config::Config;
use crate::disk::{Bad, Until};
use crate::rng::Rng;
use crate::world::World;

const SECOND: u64 = 1_000_000_000;
const SECTORS: u64 = 4096;
const ALL: SectorRange = SectorRange { start: Sector(0), count: SECTORS };

/// An open volume of 2 MiB, written in full, on a disk whose bad sectors take so long to fail.
fn open(failing_ns: u64) -> World {
    let config = Config::without_faults(1, SECTORS, 1024, false);
    let mut world = World::with(config, Rng::new(7), false);
    world.create();
    world.open_once(false, None).expect("no crash was asked for").expect("a new volume opens");
    world.ask_write(ALL);
    world.settle_down();
    world.disks[0].failing_ns = failing_ns;
    world
}

fn mark(world: &mut World, sectors: std::ops::Range<usize>, read: bool, until: Until) {
    let disk = &mut world.disks[0];
    let marks = if read { &mut disk.bad_reads } else { &mut disk.bad_writes };
    marks.extend(sectors.map(|sector| (sector, Bad { errno: Errno(libc::EIO).0, until, fault: None })));
}

/// Do it, and say how many seconds it took and how many errors the guest got.
fn timed(world: &mut World, ask: impl FnOnce(&mut World)) -> (f64, usize) {
    let (began, errors) = (world.now, world.events.len());
    ask(world);
    world.settle_down();
    let failed = world.events[errors..].iter().filter(|event| event.kind == EventKind::GuestError).count();
    (world.now.since_ns(began) as f64 / SECOND as f64, failed)
}

#[test]
fn a_read_of_a_disk_that_tries_hard_fails_within_ten_seconds_of_device_time() {
    for failing in [SECOND / 10, SECOND, 4 * SECOND] {
        let mut world = open(failing);
        mark(&mut world, 0..64, true, Until::Healed);
        let began = world.now;
        let (_, errors) = timed(&mut world, |world| world.ask_read(ALL));
        // To the answer: a probe's read of a bad sector may go on for a while after it.
        let error = world.events.iter().find(|event| event.kind == EventKind::GuestError).expect("it fails");
        let seconds = error.time.since_ns(began) as f64 / SECOND as f64;
        // The shard's own attempt came first, and the last one on the ladder may begin just in time.
        let limit = 10.0 + 2.0 * failing as f64 / SECOND as f64 + 0.1;
        assert!(errors == 1 && seconds <= limit, "{errors} errors, {seconds} s of {limit}");
        // What it had no time for was not proven bad.
        assert!(world.status().pending <= 64 / 8, "{:?}", world.status());
    }
}

#[test]
fn a_long_read_of_a_slow_disk_that_reads_in_the_end_succeeds() {
    let mut world = open(SECOND);
    mark(&mut world, 100..101, true, Until::Times(2));
    let (_, errors) = timed(&mut world, |world| world.ask_read(ALL));
    assert_eq!(errors, 0);
}

#[test]
fn a_write_gives_up_rewriting_in_place_within_two_seconds_of_device_time() {
    for failing in [SECOND / 20, SECOND / 2, 3 * SECOND] {
        let mut world = open(failing);
        mark(&mut world, 0..SECTORS as usize, false, Until::Healed);
        let (seconds, errors) = timed(&mut world, |world| world.ask_write(ALL));
        // Then each part that is left (a halving of one of two chunks) fails once and moves.
        let limit = 2.0 + (2 + 2 * 9) as f64 * failing as f64 / SECOND as f64 + 0.5;
        assert!(errors == 0 && seconds <= limit, "{errors} errors, {seconds} s of {limit}");
        let status = world.status();
        assert_eq!(status.live as u64, SECTORS / 8, "{status:?}");
        let (_, errors) = timed(&mut world, |world| world.ask_read(ALL));
        assert_eq!(errors, 0);
    }
}

/// A part that was never tried alone is tried before it moves: slots are not for blocks that work.
#[test]
fn blocks_that_take_their_write_stay_where_they_are_though_time_is_up() {
    let mut world = open(3 * SECOND);
    mark(&mut world, 0..8, false, Until::Healed);
    let (_, errors) = timed(&mut world, |world| world.ask_write(ALL));
    assert_eq!((errors, world.status().live <= 128), (0, true), "{:?}", world.status());
}
