//! A spare with faults of its own: slots, metadata, or all of it.

use std::fs;

use vhost_remap::volume::layout::{Layout, Place};

use crate::guest::{Failed, Guest};
use crate::model::{Model, pattern};
use crate::server::{Server, Volume};

const SLOTS: u32 = 64;

fn layout(volume: &Volume) -> Layout {
    Layout::new(fs::metadata(&volume.spare).unwrap().len(), SLOTS).unwrap()
}

/// Sectors of the spare, as fault rules take them.
fn sectors(bytes: u64, len: u64) -> String {
    format!("{}-{}", bytes / 512, (bytes + len) / 512 - 1)
}

/// First sector of a slot on the spare.
pub(crate) fn slot_start(volume: &Volume, slot: u32) -> u64 {
    layout(volume).slots_start / 512 + u64::from(slot) * 8
}

/// A sector of a slot on the spare.
fn slot_sector(volume: &Volume, slot: u32, sector: u64) -> String {
    (slot_start(volume, slot) + sector).to_string()
}

pub(crate) fn slot_sectors(volume: &Volume, slot: u32) -> String {
    sectors(layout(volume).slots_start + u64::from(slot) * 4096, 4096)
}

fn slot_of(server: &Server, sector: u64) -> u32 {
    server.list().iter().find(|entry| entry.sector == sector).and_then(|entry| entry.slot).expect("remapped")
}

fn begin(volume: &Volume) -> (Server, Guest, Model) {
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let model = Model::written(&mut guest, 960, 256, 1);
    (server, guest, model)
}

/// A read over both devices of which one fails says nothing of the other.
#[test]
fn a_slot_that_reads_after_a_retry_is_reported_and_not_the_blocks_beside_it() {
    let volume = Volume::create(32, SLOTS);
    let (server, mut guest, model) = begin(&volume);
    server.order(&["remap", "1000-1007"]);
    let slot = slot_sectors(&volume, slot_of(&server, 1000));
    server.fault(&["--device", "spare", "--ops", "read", "--sectors", &slot, "--count", "1"]);
    model.check(guest.queue(), 992, 24);
    let recovered = server.events().into_iter().filter(|event| event.kind == "recovered-read");
    let recovered: Vec<_> = recovered.map(|event| (event.device, event.sector, event.sectors)).collect();
    assert_eq!(recovered, [("spare".to_owned(), Some(1000), 8)]);
}

/// Scenario 22, E3: a slot that does not take its data is retired, and another one is tried.
#[test]
fn a_block_moves_past_slots_that_do_not_take_it() {
    let volume = Volume::create(32, SLOTS);
    let (server, mut guest, mut model) = begin(&volume);
    server.fault(&["--ops", "write", "--sectors", "1000-1007"]);
    server.fault(&["--device", "spare", "--ops", "write", "--sectors", &slot_sector(&volume, 0, 5)]);
    server.fault(&["--device", "spare", "--ops", "write", "--sectors", &slot_sectors(&volume, 1)]);
    let write = model.write(1002, pattern(1002, 2, 2));
    guest.queue().one(write).unwrap();
    model.check_all(guest.queue());
    assert_eq!(slot_of(&server, 1000), 2);
    let status = server.status();
    assert_eq!((status.blocks.slots_retired, status.blocks.slots_free), (2, 61));
    assert_eq!(status.state, ["ok"]);
    assert_eq!(server.events().iter().filter(|event| event.kind == "slot-failed").count(), 2);
    // Retired for good.
    drop(guest);
    server.stop();
    let server = volume.serve(&[]);
    assert_eq!(server.status().blocks.slots_retired, 2);
    let mut guest = server.guest(1);
    model.check_all(guest.queue());
    server.order(&["remap", "1100"]);
    assert_eq!(slot_of(&server, 1096), 3);
}

/// Scenario 22: the slot of a block goes bad later.
#[test]
fn a_block_whose_slot_fails_moves_to_another_slot() {
    let volume = Volume::create(32, SLOTS);
    let (server, mut guest, mut model) = begin(&volume);
    server.order(&["remap", "1000"]);
    let write = model.write(1004, pattern(1004, 1, 2));
    guest.queue().one(write).unwrap();
    let slot = slot_of(&server, 1000);
    server.fault(&["--device", "spare", "--ops", "write", "--sectors", &slot_sectors(&volume, slot)]);
    let write = model.write(1001, pattern(1001, 2, 3));
    guest.queue().one(write).unwrap();
    model.check_all(guest.queue());
    assert_ne!(slot_of(&server, 1000), slot);
    guest.flush().unwrap();
    // Off the path: the slot it left is retired in a commit of its own.
    let status = server.await_status(|status| status.blocks.slots_retired > 0);
    assert_eq!((status.blocks.slots_retired, status.blocks.remapped, status.counters.guest_errors), (1, 1, 0));
    assert_eq!((status.devices[0].write_errors, status.devices[0].read_errors), (0, 0));
    drop(guest);
    server.kill();
    model.check_all(volume.serve(&[]).guest(1).queue());
}

/// E3: that a slot does not read loses nothing.
#[test]
fn a_slot_that_does_not_read_fails_exactly_its_sectors_and_loses_nothing() {
    let volume = Volume::create(32, SLOTS);
    let (server, mut guest, mut model) = begin(&volume);
    server.order(&["remap", "1000"]);
    let write = model.write(1000, pattern(1000, 8, 2));
    guest.queue().one(write).unwrap();
    let slot = slot_of(&server, 1000);
    server.fault(&["--device", "spare", "--ops", "read", "--sectors", &slot_sector(&volume, slot, 3)]);
    for (sector, count) in [(1003, 1), (1000, 8), (990, 100)] {
        assert_eq!(guest.read(sector, count), Err(Failed::IoErr), "{count} from {sector}");
    }
    model.check(guest.queue(), 960, 43);
    model.check(guest.queue(), 1004, 100);
    let list = server.list();
    assert_eq!((&list[0].state[..], &list[0].lost[..]), (&["remapped".to_owned(), "pending".to_owned()][..], &[][..]));
    // A neighbour is written, the bad one stays bad; then it reads again.
    let write = model.write(1002, pattern(1002, 1, 3));
    guest.queue().one(write).unwrap();
    assert_eq!(guest.read(1003, 1), Err(Failed::IoErr));
    model.check(guest.queue(), 960, 43);
    server.no_faults();
    model.check_all(guest.queue());
    assert_eq!(server.blocks("pending"), [] as [u64; 0]);
    assert_eq!(slot_of(&server, 1000), slot);
    // Written itself while it cannot be read back, it moves.
    server.fault(&["--device", "spare", "--ops", "read", "--sectors", &slot_sector(&volume, slot, 3)]);
    assert_eq!(guest.read(1003, 1), Err(Failed::IoErr));
    let write = model.write(1003, pattern(1003, 1, 4));
    guest.queue().one(write).unwrap();
    model.check_all(guest.queue());
    assert_ne!(slot_of(&server, 1000), slot);
    assert_eq!(server.status().blocks.lost_sectors, 0);
}

/// R3: what was once valid in a slot and is lost there must not come back from the primary, which holds
/// something older.
#[test]
fn a_lost_sector_is_not_served_from_a_stale_primary() {
    let volume = Volume::create(32, SLOTS);
    let (server, mut guest, mut model) = begin(&volume);
    server.order(&["remap", "1000"]);
    let write = model.write(1000, pattern(1000, 8, 2));
    guest.queue().one(write).unwrap();
    let slot = slot_of(&server, 1000);
    server.fault(&["--device", "spare", "--ops", "write", "--sectors", &slot_sectors(&volume, slot)]);
    server.fault(&["--device", "spare", "--ops", "read", "--sectors", &slot_sector(&volume, slot, 6)]);
    let write = model.write(1001, pattern(1001, 1, 3));
    guest.queue().one(write).unwrap();
    server.no_faults();
    for _ in 0..2 {
        assert_eq!(guest.read(1006, 1), Err(Failed::IoErr));
        assert_eq!(guest.read(1000, 8), Err(Failed::IoErr));
    }
    model.check(guest.queue(), 960, 46);
    model.check(guest.queue(), 1007, 100);
    let list = server.list();
    assert_eq!((&list[0].lost[..], list[0].primary_stale), (&[1006][..], true));
    assert!(server.order(&["list"]).contains("primary stale"));
    // Nor after a restart.
    drop(guest);
    server.stop();
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    assert_eq!(guest.read(1006, 1), Err(Failed::IoErr));
    let write = model.write(1006, pattern(1006, 1, 4));
    guest.queue().one(write).unwrap();
    model.check_all(guest.queue());
    assert_eq!(server.status().blocks.lost_sectors, 0);
}

/// Scenario 21, half of it: one place of two is enough.
#[test]
fn metadata_that_cannot_be_written_in_one_place_retires_the_place() {
    for place in Place::ALL {
        let volume = Volume::create(32, SLOTS);
        let (server, mut guest, mut model) = begin(&volume);
        let layout = layout(&volume);
        let bad = sectors(layout.place_start(place), layout.place_len());
        server.fault(&["--device", "spare", "--ops", "write", "--sectors", &bad]);
        server.fault(&["--ops", "write", "--sectors", "1000-1007"]);
        let write = model.write(1000, pattern(1000, 8, 2));
        guest.queue().one(write).unwrap();
        assert_eq!(server.status().state, ["place-retired"]);
        assert!(server.status().messages[0].contains(place.name()), "{:?}", server.status().messages);
        let write = model.write(1001, pattern(1001, 1, 3));
        guest.queue().one(write).unwrap();
        guest.flush().unwrap();
        server.order(&["remap", "1100"]);
        model.check_all(guest.queue());
        let list = server.order(&["list", "--json"]);
        drop(guest);
        server.kill();
        // The retired place is not believed; written in full at the next start, it counts again.
        let server = volume.serve(&[]);
        assert_eq!(server.order(&["list", "--json"]), list);
        assert_eq!(server.status().state, ["ok"]);
        model.check_all(server.guest(1).queue());
        server.stop();
    }
}

/// Scenario 21: no mapping becomes visible that is not durable.
#[test]
fn metadata_that_cannot_be_written_anywhere_fails_the_write() {
    let volume = Volume::create(32, SLOTS);
    let (server, mut guest, mut model) = begin(&volume);
    server.order(&["remap", "960"]);
    let layout = layout(&volume);
    for place in Place::ALL {
        let bad = sectors(layout.place_start(place), layout.place_len());
        server.fault(&["--device", "spare", "--ops", "write", "--sectors", &bad]);
    }
    server.fault(&["--ops", "write", "--sectors", "1000-1007"]);
    assert_eq!(guest.write(1000, pattern(1000, 8, 2)), Err(Failed::IoErr));
    assert!(!server.blocks("remapped").contains(&1000), "{:?}", server.list());
    assert_eq!(server.status().state[0], "spare-down");
    let write = model.write(1008, pattern(1008, 8, 3));
    guest.queue().one(write).unwrap();
    guest.flush().unwrap();
    // A crash now must find the block old or new, and everything else as it was.
    server.kill();
    drop(guest);
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let found = guest.read(1000, 8).unwrap();
    assert!(found == model.sectors(1000, 8) || found == pattern(1000, 8, 2));
    model.check(guest.queue(), 960, 40);
    model.check(guest.queue(), 1008, 208);
}

/// F3, E1 on the spare: it goes, the primary does not notice, it comes back.
#[test]
fn a_lost_spare_costs_only_remapped_blocks_until_it_is_back() {
    let volume = Volume::create(32, SLOTS);
    let (server, mut guest, mut model) = begin(&volume);
    server.order(&["remap", "1000-1015"]);
    guest.flush().unwrap();
    server.fault(&["--device", "spare", "--ops", "read,write,flush,identify", "--errno", "ENODEV"]);
    assert_eq!(guest.read(1000, 8), Err(Failed::IoErr));
    assert_eq!(guest.write(1008, pattern(1008, 8, 2)), Err(Failed::IoErr));
    assert_eq!(guest.read(960, 256), Err(Failed::IoErr));
    let status = server.status();
    assert_eq!((&status.state[..], &status.devices[1].state[..]), (&["spare-down".to_owned()][..], "down"));
    for sector in [960, 996, 1016] {
        let write = model.write(sector, pattern(sector, 4, 3));
        guest.queue().one(write).unwrap();
    }
    guest.flush().unwrap();
    model.check(guest.queue(), 960, 40);
    model.check(guest.queue(), 1016, 200);
    let why = server.refused(&["remap", "1100"]);
    assert!(why.contains("spare"), "{why}");
    server.no_faults();
    server.await_event("spare-back");
    let found = guest.read(1008, 8).unwrap();
    assert!(found == model.sectors(1008, 8) || found == pattern(1008, 8, 2));
    let write = model.write(1000, pattern(1000, 16, 4));
    guest.queue().one(write).unwrap();
    guest.flush().unwrap();
    model.check_all(guest.queue());
    assert_eq!(server.status().state, ["ok"]);
}
