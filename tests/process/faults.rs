//! Bad sectors: what a guest sees of them, and what an operator.

use vhost_remap::control::api::FaultList;

use crate::guest::{Failed, Guest, Io};
use crate::model::{Model, Random, pattern, same};
use crate::server::{Server, Volume};

const OPTIONS: [&str; 0] = [];

fn serve(volume: &Volume) -> (Server, Guest) {
    let server = volume.serve(&OPTIONS);
    let guest = server.guest(1);
    (server, guest)
}

/// Sectors of a read that fail, one at a time.
pub(crate) fn failing(guest: &mut Guest, sectors: std::ops::Range<u64>) -> Vec<u64> {
    let reads: Vec<Io> = sectors.clone().map(|sector| Io::Read { sector, count: 1 }).collect();
    let replies = guest.queue().run(&reads);
    sectors.zip(replies).filter(|(_, reply)| reply.is_err()).map(|(sector, _)| sector).collect()
}

/// Scenario 2.
#[test]
fn a_write_to_a_bad_block_succeeds_and_moves_the_block() {
    let volume = Volume::create(32, 64);
    let (server, mut guest) = serve(&volume);
    let mut model = Model::written(&mut guest, 960, 128, 1);
    server.fault(&["--ops", "write", "--sectors", "1000-1003", "--sectors", "1012"]);
    // One request over four blocks, two of them bad.
    let write = model.write(996, pattern(996, 24, 2));
    guest.queue().one(write).unwrap();
    model.check_all(guest.queue());
    assert_eq!(server.blocks("remapped"), [1000, 1008]);
    let entry = &server.list()[0];
    assert_eq!((entry.sectors, entry.lost.len(), entry.state.len()), (8, 0, 1));
    // What is moved stays moved, and takes writes of every size.
    for (sector, count) in [(1000, 8), (1003, 1), (1001, 12), (990, 40)] {
        let write = model.write(sector, pattern(sector, count, sector));
        guest.queue().one(write).unwrap();
    }
    model.check_all(guest.queue());
    let status = server.status();
    assert_eq!((status.blocks.remapped, status.blocks.slots_free, status.counters.remaps), (2, 62, 2));
    assert_eq!((status.state, status.counters.guest_errors), (vec!["ok".to_owned()], 0));
    let events = server.events();
    let moved: Vec<_> = events.iter().filter(|event| event.kind == "remapped").map(|event| event.sector).collect();
    assert_eq!(moved, [Some(1000), Some(1008)]);
    assert!(events.iter().all(|event| event.severity != "error"), "{events:?}");
}

/// Scenario 2, for an error that passes: the block keeps its place.
#[test]
fn a_write_that_fails_once_is_rewritten_in_place() {
    let volume = Volume::create(32, 64);
    let (server, mut guest) = serve(&volume);
    let mut model = Model::written(&mut guest, 960, 128, 1);
    server.fault(&["--ops", "write", "--sectors", "1000-1007", "--count", "1"]);
    let write = model.write(1002, pattern(1002, 3, 2));
    guest.queue().one(write).unwrap();
    model.check_all(guest.queue());
    let status = server.status();
    let counters = &status.counters;
    assert_eq!((counters.rewritten, counters.remaps, status.blocks.slots_free), (1, 0, 64));
    assert!(server.list().is_empty(), "{:?}", server.list());
    assert!(server.events().iter().any(|event| event.kind == "rewritten" && event.sector == Some(1002)));
    // W1: a second failure of the same block moves it.
    server.fault(&["--ops", "write", "--sectors", "1000-1007", "--count", "1"]);
    let write = model.write(1000, pattern(1000, 8, 3));
    guest.queue().one(write).unwrap();
    model.check_all(guest.queue());
    assert_eq!(server.blocks("remapped"), [1000]);
}

/// W1: a rewrite that does not last is not tried twice. R4: it is the write that moves the block, not the read.
#[test]
fn a_block_that_fails_a_read_again_after_a_rewrite_moves_with_the_next_write() {
    let volume = Volume::create(32, 64);
    let (server, mut guest) = serve(&volume);
    let mut model = Model::written(&mut guest, 960, 128, 1);
    let mut rewrite_unreadable = |stamp| {
        server.fault(&["--ops", "read", "--sectors", "1002", "--until-rewritten"]);
        assert_eq!(guest.read(1000, 8), Err(Failed::IoErr));
        assert_eq!((server.blocks("pending"), server.status().blocks.remapped), (vec![1000], 0));
        let write = model.write(1000, pattern(1000, 8, stamp));
        guest.queue().one(write).unwrap();
        model.check_all(guest.queue());
        let status = server.status();
        (status.counters.rewritten, status.blocks.remapped, status.blocks.pending)
    };
    assert_eq!(rewrite_unreadable(2), (1, 0, 0));
    assert_eq!(rewrite_unreadable(3), (1, 1, 0));
    assert_eq!(server.blocks("remapped"), [1000]);
}

/// Scenario 8: one block fails under several writes at once.
#[test]
fn concurrent_failures_of_one_block_take_one_slot() {
    let volume = Volume::create(32, 64);
    let (server, mut guest) = serve(&volume);
    let mut model = Model::written(&mut guest, 960, 128, 1);
    server.fault(&["--ops", "write", "--sectors", "1000-1007"]);
    let writes: Vec<Io> = (1000..1008).map(|sector| model.write(sector, pattern(sector, 1, 2))).collect();
    assert!(guest.queue().run(&writes).iter().all(Result::is_ok));
    model.check_all(guest.queue());
    let status = server.status();
    assert_eq!((status.blocks.remapped, status.blocks.slots_free, status.counters.remaps), (1, 63, 1));
}

/// Scenario 9: 64 blocks fail at queue depth 64. They lie within a quarter of the disk: writes that fail
/// all over it, without one success, are taken for a lost disk instead (E1).
#[test]
fn sixty_four_blocks_failing_at_once_are_all_moved() {
    let volume = Volume::create(64, 128);
    let (server, mut guest) = serve(&volume);
    let mut model = Model::written(&mut guest, 4096, 2048, 1);
    let bad: Vec<u64> = (0..64).map(|i| 4100 + i * 24).collect();
    let texts: Vec<String> = bad.iter().map(u64::to_string).collect();
    let words: Vec<&str> = texts.iter().flat_map(|text| ["--sectors", text]).collect();
    server.fault(&[&["--ops", "write"], &words[..]].concat());
    let writes: Vec<Io> = bad.iter().map(|sector| model.write(*sector, pattern(*sector, 1, 2))).collect();
    assert!(guest.queue().run(&writes).iter().all(Result::is_ok));
    model.check_all(guest.queue());
    let blocks: Vec<u64> = bad.iter().map(|sector| sector / 8 * 8).collect();
    assert_eq!(server.blocks("remapped"), blocks);
    let mut slots: Vec<_> = server.list().iter().map(|entry| entry.slot).collect();
    slots.sort_unstable();
    slots.dedup();
    assert_eq!(slots.len(), 64);
    // Storms share commits: far fewer than blocks.
    let counters = server.status().counters;
    assert_eq!((counters.remaps, counters.guest_errors), (64, 0));
    assert!(counters.commits < 64, "{} commits", counters.commits);
}

/// Scenario 3.
#[test]
fn a_read_of_a_bad_block_fails_for_exactly_its_sectors() {
    let volume = Volume::create(32, 64);
    let (server, mut guest) = serve(&volume);
    let model = Model::written(&mut guest, 960, 128, 1);
    server.fault(&["--ops", "read", "--sectors", "1003-1004"]);
    for _ in 0..2 {
        assert_eq!(failing(&mut guest, 980..1030), [1003, 1004]);
    }
    for (sector, count) in [(1000, 8), (1004, 1), (960, 128), (1003, 2), (1001, 3)] {
        assert_eq!(guest.read(sector, count), Err(Failed::IoErr), "{count} sectors from {sector}");
    }
    for (sector, count) in [(1000, 3), (1005, 3), (960, 43), (1005, 80)] {
        model.check(guest.queue(), sector, count);
    }
    assert_eq!(server.blocks("pending"), [1000]);
    assert_eq!((&server.list()[0].pending[..], &server.list()[0].lost[..]), (&[1003, 1004][..], &[][..]));
    let text = server.order(&["list", "--pending"]);
    assert!(text.contains("1003-1004"), "{text}");
    let status = server.status();
    assert_eq!((status.blocks.remapped, status.blocks.slots_free, status.blocks.lost_sectors), (0, 64, 0));
    assert_eq!((status.blocks.pending, status.counters.guest_errors), (1, 9));
    // P1: one event for each error the guest got.
    let events = server.events();
    assert_eq!(events.iter().filter(|event| event.kind == "guest-error").count(), 9, "{events:?}");
    // R3: pending stands in nobody's way once the sectors read again.
    server.no_faults();
    model.check_all(guest.queue());
    assert_eq!(server.blocks("pending"), [] as [u64; 0]);
}

/// Scenario 5, as real disks do it: a sector that does not read is good again once it was written.
#[test]
fn a_pending_block_is_healed_in_place_by_a_rewrite() {
    let volume = Volume::create(32, 64);
    let (server, mut guest) = serve(&volume);
    let mut model = Model::written(&mut guest, 960, 128, 1);
    server.fault(&["--ops", "read", "--sectors", "1003-1004", "--until-rewritten"]);
    assert_eq!(guest.read(1000, 8), Err(Failed::IoErr));
    assert_eq!(server.blocks("pending"), [1000]);
    // A part of the bad sectors heals that part.
    let write = model.write(1003, pattern(1003, 1, 2));
    guest.queue().one(write).unwrap();
    assert_eq!(failing(&mut guest, 996..1012), [1004]);
    assert_eq!((server.blocks("pending"), &server.list()[0].pending[..]), (vec![1000], &[1004][..]));
    let write = model.write(1000, pattern(1000, 8, 3));
    guest.queue().one(write).unwrap();
    model.check_all(guest.queue());
    assert!(server.list().is_empty(), "{:?}", server.list());
    let status = server.status();
    assert_eq!((status.counters.remaps, status.blocks.slots_free), (0, 64));
    assert!(status.counters.rewritten >= 1);
}

/// Scenario 4, and what becomes of lost sectors.
#[test]
fn a_partial_write_loses_exactly_the_sectors_that_cannot_be_read() {
    let volume = Volume::create(32, 64);
    let (server, mut guest) = serve(&volume);
    let mut model = Model::written(&mut guest, 960, 128, 1);
    server.fault(&["--ops", "write", "--sectors", "1000-1007"]);
    server.fault(&["--ops", "read", "--sectors", "1003-1005"]);
    let write = model.write(1001, pattern(1001, 1, 2));
    guest.queue().one(write).unwrap();
    assert_eq!(failing(&mut guest, 990..1020), [1003, 1004, 1005]);
    assert_eq!(guest.read(996, 16), Err(Failed::IoErr));
    model.check(guest.queue(), 960, 43);
    model.check(guest.queue(), 1006, 82);
    let list = server.list();
    assert_eq!(list.len(), 1);
    assert_eq!((list[0].sector, &list[0].lost[..], list[0].primary_stale), (1000, &[1003, 1004, 1005][..], false));
    let text = server.order(&["list", "--lost"]);
    assert!(text.contains("1003-1005"), "{text}");
    assert_eq!(server.status().blocks.lost_sectors, 3);
    // Written again, a lost sector is no longer lost; its neighbours are.
    let write = model.write(1004, pattern(1004, 1, 3));
    guest.queue().one(write).unwrap();
    assert_eq!(failing(&mut guest, 990..1020), [1003, 1005]);
    assert_eq!(server.list()[0].lost, [1003, 1005]);
    // R3: the primary still holds what was lost; once it reads again, that is kept in the slot.
    server.no_faults();
    model.check_all(guest.queue());
    assert_eq!(server.list()[0].lost, [] as [u64; 0]);
    let status = server.status();
    assert_eq!((status.counters.lost, status.counters.healed, status.blocks.lost_sectors), (3, 2, 0));
    server.fault(&["--ops", "read", "--sectors", "1000-1007"]);
    model.check_all(guest.queue());
}

/// Scenario 5 for a block that lives on the spare: written in full, it has nothing lost any more.
#[test]
fn a_full_write_clears_what_was_lost() {
    let volume = Volume::create(32, 64);
    let (server, mut guest) = serve(&volume);
    let mut model = Model::written(&mut guest, 960, 128, 1);
    server.fault(&["--ops", "write", "--sectors", "1000-1007"]);
    server.fault(&["--ops", "read", "--sectors", "1003-1005"]);
    let write = model.write(1001, pattern(1001, 1, 2));
    guest.queue().one(write).unwrap();
    // Neither zeros nor what a slot happens to hold, however often it is asked.
    for _ in 0..3 {
        assert_eq!(failing(&mut guest, 996..1012), [1003, 1004, 1005]);
    }
    assert_eq!(server.status().blocks.lost_sectors, 3);
    let write = model.write(1000, pattern(1000, 8, 3));
    guest.queue().one(write).unwrap();
    model.check_all(guest.queue());
    assert_eq!((server.status().blocks.lost_sectors, server.blocks("remapped")), (0, vec![1000]));
    assert_eq!(server.list()[0].lost, [] as [u64; 0]);
    assert_eq!(server.order(&["list", "--lost"]), "none\n");
    drop(guest);
    server.kill();
    model.check_all(volume.serve(&OPTIONS).guest(1).queue());
}

/// Scenario 6: a long read goes to the spare for the one block that lives there, and for nothing else.
#[test]
fn a_long_read_over_a_remapped_block_is_split_there() {
    let volume = Volume::create(32, 64);
    let (server, mut guest) = serve(&volume);
    let mut model = Model::written(&mut guest, 8192, 4096, 1);
    server.order(&["remap", "9216-9223"]);
    let write = model.write(9218, pattern(9218, 3, 2));
    guest.queue().one(write).unwrap();
    // The primary's own copy of the block must not be read, the rest must.
    server.fault(&["--ops", "read", "--sectors", "9216-9223"]);
    server.fault(&["--device", "spare", "--ops", "read", "--delay", "1", "--errno", "none"]);
    let hits = || {
        let list: FaultList = serde_json::from_str(&server.order(&["fault", "list", "--json"])).unwrap();
        list.rules.iter().map(|rule| rule.hits).collect::<Vec<_>>()
    };
    let start = 9216 - 1024;
    same(&guest.read(start, 2048).unwrap(), model.sectors(start, 2048), start);
    assert_eq!(hits(), [0, 1]);
    same(&guest.read(9224, 2048).unwrap(), model.sectors(9224, 2048), 9224);
    assert_eq!(hits(), [0, 1]);
}

/// Scenarios 6 and 7.
#[test]
fn requests_of_all_sizes_around_remapped_blocks_agree_with_a_model() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&OPTIONS);
    let mut guest = server.guest(2);
    let mut model = Model::written(&mut guest, 8192, 4096, 1);
    server.order(&["remap", "9216-9223"]);
    model.check(guest.queue(), 8192, 2048);
    same(&guest.read(9216 - 1024, 2048).unwrap(), model.sectors(9216 - 1024, 2048), 9216 - 1024);
    server.order(&["remap", "9240", "9256-9271"]);
    assert_eq!(server.blocks("remapped"), [9216, 9240, 9256, 9264]);
    let mut random = Random(7);
    for round in 0..300 {
        let count = 1 + random.below(64);
        let sector = 9216 - 70 + random.below(130);
        let queue = &mut guest.queues[usize::try_from(round % 2).unwrap()];
        queue.shape.skew = [0, 512, 1][usize::try_from(round % 3).unwrap()];
        let write = model.write(sector, pattern(sector, count, round));
        queue.one(write).unwrap();
        // Each queue reads what the other wrote.
        let count = 1 + random.below(64);
        let sector = 9216 - 70 + random.below(130);
        model.check(&mut guest.queues[usize::try_from((round + 1) % 2).unwrap()], sector, count);
    }
    model.check_all(guest.queue());
    assert_eq!(server.status().counters.guest_errors, 0);
}
