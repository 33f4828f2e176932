//! What survives the end of the server, and damage to the metadata while it is down.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use vhost_remap::volume::layout::{Home, Layout, PAGE, Place};

use crate::guest::Guest;
use crate::model::{Model, pattern};
use crate::server::{Server, Volume};

const SLOTS: u32 = 64;

/// A volume with remapped blocks, a lost sector among them.
fn damaged(server: &Server) -> (Guest, Model) {
    let mut guest = server.guest(1);
    let mut model = Model::written(&mut guest, 960, 256, 1);
    server.fault(&["--ops", "write", "--sectors", "1000-1015", "--sectors", "1100"]);
    server.fault(&["--ops", "read", "--sectors", "1103"]);
    for (sector, count) in [(998, 12), (1012, 1), (1100, 2)] {
        let write = model.write(sector, pattern(sector, count, 2));
        guest.queue().one(write).unwrap();
    }
    guest.flush().unwrap();
    (guest, model)
}

/// Everything is as it was; and the next block that moves takes a slot nobody has.
#[track_caller]
fn check_restarted(server: &Server, mut model: Model, list: &str) {
    assert_eq!(server.order(&["list", "--json"]), list);
    let before: Vec<_> = server.list().iter().map(|entry| entry.slot).collect();
    let mut guest = server.guest(1);
    // The fault is gone with the old server, so the lost sector reads again, from the primary.
    model.check_all(guest.queue());
    server.fault(&["--ops", "write", "--sectors", "1200-1207"]);
    let write = model.write(1203, pattern(1203, 1, 3));
    guest.queue().one(write).unwrap();
    let list = server.list();
    let new = list.iter().find(|entry| entry.sector == 1200).expect("a remapped block");
    assert!(new.slot.is_some() && !before.contains(&new.slot), "{list:?}");
    model.check_all(guest.queue());
}

/// Scenario 13.
#[test]
fn remaps_survive_a_clean_stop() {
    let volume = Volume::create(32, SLOTS);
    let server = volume.serve(&[]);
    let (guest, model) = damaged(&server);
    let list = server.order(&["list", "--json"]);
    assert_eq!(server.list().len(), 3);
    drop(guest);
    server.stop();
    let server = volume.serve(&[]);
    assert!(server.events().is_empty(), "{:?}", server.events());
    assert_eq!(server.status().lifetime.remaps, 3);
    check_restarted(&server, model, &list);
}

/// Scenario 13, O1.
#[test]
fn remaps_survive_a_kill() {
    let volume = Volume::create(32, SLOTS);
    let server = volume.serve(&[]);
    let (guest, model) = damaged(&server);
    let list = server.order(&["list", "--json"]);
    // Connected as it is.
    server.kill();
    drop(guest);
    let server = volume.serve(&[]);
    check_restarted(&server, model, &list);
}

/// Scenario 32 in small: each run finds what all runs before it left.
#[test]
fn ten_runs_after_each_other_lose_nothing() {
    let volume = Volume::create(32, SLOTS);
    let mut model = Model::zeros(960, 256);
    for run in 0..10 {
        let server = volume.serve(&[]);
        let sector = 968 + 8 * run;
        assert_eq!(server.blocks("remapped").len() as u64, run);
        server.fault(&["--ops", "write", "--sectors", &sector.to_string()]);
        let mut guest = server.guest(1);
        model.check_all(guest.queue());
        let write = model.write(sector, pattern(sector, 9, run));
        guest.queue().one(write).unwrap();
        drop(guest);
        if run % 2 == 0 {
            server.stop();
        } else {
            server.kill();
        }
    }
}

fn spare_layout(volume: &Volume) -> Layout {
    Layout::new(fs::metadata(&volume.spare).unwrap().len(), SLOTS).unwrap()
}

fn corrupt(path: &Path, offset: u64, len: u64) {
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&vec![0xa5; usize::try_from(len).unwrap()], offset).unwrap();
}

/// Scenario 15: any one place can be lost whole.
#[test]
fn metadata_damaged_in_one_place_is_repaired_from_the_other() {
    for place in Place::ALL {
        let volume = Volume::create(32, SLOTS);
        let server = volume.serve(&[]);
        let (guest, model) = damaged(&server);
        let list = server.order(&["list", "--json"]);
        drop(guest);
        server.stop();
        let layout = spare_layout(&volume);
        corrupt(&volume.spare, layout.place_start(place), layout.place_len());
        let server = volume.serve(&[]);
        let status = server.status();
        // Both homes of the one table page.
        assert!(status.counters.metadata_repairs >= 2, "{:?}", status.counters);
        assert_eq!(status.state, ["ok"]);
        let repaired = server.events().into_iter().filter(|event| event.kind == "metadata-repaired");
        assert!(repaired.count() >= 2, "{:?}", server.events());
        check_restarted(&server, model, &list);
        server.stop();
        // The damage is repaired, so the other place may go now.
        let other = if place == Place::Head { Place::Tail } else { Place::Head };
        corrupt(&volume.spare, layout.place_start(other), layout.place_len());
        let server = volume.serve(&[]);
        assert_eq!(server.list().len(), 4, "{:?}", server.list());
    }
}

/// Scenario 15 with single pages: any three of the four homes of a table page may be bad.
#[test]
fn one_good_home_of_a_table_page_is_enough() {
    let volume = Volume::create(32, SLOTS);
    let server = volume.serve(&[]);
    let (guest, mut model) = damaged(&server);
    let mut list = server.order(&["list", "--json"]);
    drop(guest);
    server.stop();
    let layout = spare_layout(&volume);
    let homes: Vec<_> = Place::ALL.into_iter().flat_map(|place| Home::ALL.map(|home| (place, home))).collect();
    for good in &homes {
        for (place, home) in homes.iter().filter(|home| *home != good) {
            corrupt(&volume.spare, layout.table(*place, *home, 0), PAGE as u64);
        }
        let server = volume.serve(&[]);
        assert_eq!(server.order(&["list", "--json"]), list, "{good:?}");
        assert_eq!(server.status().counters.metadata_repairs, 3);
        let mut guest = server.guest(1);
        model.check_all(guest.queue());
        let write = model.write(1001, pattern(1001, 1, 9));
        guest.queue().one(write).unwrap();
        list = server.order(&["list", "--json"]);
        drop(guest);
        server.stop();
    }
}

/// Scenario 16: never a fresh start over something that exists.
#[test]
fn a_table_page_without_a_good_home_keeps_the_volume_from_opening() {
    let volume = Volume::create(32, SLOTS);
    let server = volume.serve(&[]);
    let (guest, _) = damaged(&server);
    drop(guest);
    server.stop();
    let layout = spare_layout(&volume);
    for place in Place::ALL {
        for home in Home::ALL {
            corrupt(&volume.spare, layout.table(place, home, 0), PAGE as u64);
        }
    }
    let before = (fs::read(&volume.spare).unwrap(), fs::read(&volume.primary).unwrap());
    for options in [&[][..], &["--create", "--size", "32M"], &["--read-only"]] {
        let why = volume.serve_refused(options);
        assert!(why.contains("table page 0 has no valid copy") && why.contains("disk.img.spare"), "{why}");
    }
    // Nothing was written either.
    assert!(before == (fs::read(&volume.spare).unwrap(), fs::read(&volume.primary).unwrap()));
    for place in Place::ALL {
        corrupt(&volume.spare, layout.superblock(place, 0), 2 * PAGE as u64);
    }
    let why = volume.serve_refused(&[]);
    assert!(why.contains("spare"), "{why}");
}
