//! The operator's verbs, and numbers that are the same wherever they are shown.

use std::fs;
use std::os::unix::fs::FileExt;

use crate::guest::{Failed, Io};
use crate::model::{Model, pattern, same};
use crate::server::{Volume, done, vhost_remap};

/// Scenario 29.
#[test]
fn blocks_are_moved_and_moved_back_by_hand() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let mut model = Model::written(&mut guest, 960, 256, 1);
    let answer = server.order(&["remap", "1003", "1020-1025"]);
    assert!(answer.contains('1') && answer.contains('2'), "{answer}");
    assert_eq!(server.blocks("remapped"), [1000, 1016, 1024]);
    model.check_all(guest.queue());
    let moved = server.events().into_iter().filter(|event| event.kind == "remapped").map(|event| event.cause);
    assert_eq!(moved.collect::<Vec<_>>(), ["the operator's order"; 3]);
    // Again: an error, and no second slot. What is not there yet in a longer range is moved.
    for sectors in ["1000", "1003", "1000-1007", "1016-1031"] {
        let why = server.refused(&["remap", sectors]);
        assert!(why.contains("already remapped") && why.contains(&format!(" {sectors} ")), "{why}");
    }
    assert_eq!(server.status().blocks.slots_free, 61);
    assert_eq!(server.order(&["remap", "1024-1039"]), "blocks moved to the spare: 1\n");
    assert_eq!(server.status().blocks.slots_free, 60);
    let slot = |sector| server.list().iter().find(|entry| entry.sector == sector).unwrap().slot.unwrap();
    let expected = format!(
        "sector 1003 -> slot {}\nsectors 1012-1015 are not remapped\nsectors 1016-1019 -> slot {}\n",
        slot(1000),
        slot(1016)
    );
    assert_eq!(server.order(&["verify", "1003", "1012-1019"]), expected);
    let write = model.write(1000, pattern(1000, 8, 2));
    guest.queue().one(write).unwrap();
    // Back on the primary, with what was written meanwhile.
    server.order(&["release", "1000-1007", "1024-1039"]);
    assert_eq!(server.blocks("remapped"), [1016]);
    model.check_all(guest.queue());
    let mut block = vec![0; 4096];
    fs::File::open(&volume.primary).unwrap().read_exact_at(&mut block, 1000 * 512).unwrap();
    same(&block, model.sectors(1000, 8), 1000);
    for sectors in ["1000", "1000-1007", "0-1015"] {
        let why = server.refused(&["release", sectors]);
        assert!(why.contains("not remapped") && why.contains(&format!(" {sectors} ")), "{why}");
    }
    assert_eq!(server.status().blocks.slots_free, 63);
    assert_eq!(server.order(&["verify", "1000"]), "sector 1000 is not remapped\n");
    model.check_all(guest.queue());
}

/// Scenario 29: what cannot be done is refused with numbers.
#[test]
fn orders_that_cannot_be_carried_out_are_refused() {
    let volume = Volume::create(32, 16);
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let mut model = Model::written(&mut guest, 960, 256, 1);
    let end = 32 * 2048;
    for verb in ["remap", "verify", "release"] {
        for sectors in [format!("{end}"), format!("{}-{end}", end - 8), (1_u64 << 60).to_string()] {
            let why = server.refused(&[verb, &sectors]);
            assert!(why.contains(&(end - 1).to_string()), "{verb} {sectors}: {why}");
        }
    }
    // R4: moving an unreadable block by hand would lose its sectors.
    server.fault(&["--ops", "read", "--sectors", "1003"]);
    let why = server.refused(&["remap", "1000"]);
    assert!(why.contains("1000") && why.contains("cannot be read"), "{why}");
    assert_eq!(server.blocks("remapped"), [] as [u64; 0]);
    server.no_faults();
    // W6: a block leaves its slot only for a primary that takes it.
    server.order(&["remap", "1000"]);
    let write = model.write(1000, pattern(1000, 8, 2));
    guest.queue().one(write).unwrap();
    server.fault(&["--ops", "write", "--sectors", "1004"]);
    let why = server.refused(&["release", "1000"]);
    assert!(why.contains("stays on the spare"), "{why}");
    server.no_faults();
    server.fault(&["--ops", "read", "--sectors", "1004"]);
    let why = server.refused(&["release", "1000"]);
    assert!(why.contains("stays on the spare"), "{why}");
    assert_eq!(server.blocks("remapped"), [1000]);
    model.check_all(guest.queue());
    server.no_faults();
    // More than there are slots.
    let why = server.refused(&["remap", "1000-1135"]);
    let _ = server.refused(&["remap", "1128"]);
    assert!(why.contains("16"), "{why}");
    assert_eq!(server.status().blocks.slots_free, 0);
    model.check_all(guest.queue());
    let why = server.refused(&["clear"]);
    assert!(why.contains("nothing to clear"), "{why}");
    let why = server.refused(&["fault", "clear", "77"]);
    assert!(why.contains("77"), "{why}");
}

#[test]
fn small_verbs_answer() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    assert!(server.order(&["ping"]).starts_with("pong"));
    assert!(server.order(&["save"]).contains("saved"));
    assert_eq!(server.order(&["log-level", "3"]), "log level 3\n");
    drop(server.guest(1));
    assert_eq!(server.order(&["fault", "list"]), "no fault rules\n");
    let plain = volume_without_faults();
    let why = plain.1.refused(&["fault", "add"]);
    assert!(why.contains("--fault-injection"), "{why}");
}

fn volume_without_faults() -> (Volume, crate::server::Server) {
    let volume = Volume::create(32, 64);
    let server = volume.serve_with(&[]);
    (volume, server)
}

/// Scenario 30: N reads, M writes, E errors, the same everywhere.
#[test]
fn counters_are_the_same_in_every_view() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    for i in 0..7 {
        guest.write(960 + 16 * i, pattern(960 + 16 * i, 2, 1)).unwrap();
    }
    for i in 0..11 {
        guest.read(960 + i, 4).unwrap();
    }
    guest.flush().unwrap();
    guest.flush().unwrap();
    guest.queue().one(Io::Discard(vec![(4096, 64, 0)])).unwrap();
    server.fault(&["--ops", "read", "--sectors", "2003"]);
    for _ in 0..3 {
        assert_eq!(guest.read(2003, 1), Err(Failed::IoErr));
    }
    server.fault(&["--ops", "write", "--sectors", "1000"]);
    guest.write(1000, pattern(1000, 8, 1)).unwrap();
    let status = server.status();
    let counters = &status.counters;
    assert_eq!((counters.reads, counters.writes, counters.flushes, counters.discards), (14, 8, 2, 1));
    assert_eq!((counters.read_bytes, counters.written_bytes), (11 * 2048, 7 * 1024 + 4096));
    assert_eq!((counters.guest_errors, counters.remaps), (3, 1));
    let primary = &status.devices[0];
    assert_eq!(counters.device_errors, primary.read_errors + primary.write_errors + primary.flush_errors);
    assert!(primary.read_errors >= 3 && primary.write_errors >= 2 && primary.flush_errors == 0, "{primary:?}");
    let text = server.order(&["status"]);
    for (name, value) in [
        ("reads", 14),
        ("writes", 8),
        ("flushes", 2),
        ("discards", 1),
        ("guest errors", 3),
        ("device errors", counters.device_errors),
        ("remaps", 1),
    ] {
        let line = text.lines().find(|line| line.starts_with(&format!("{name}  "))).unwrap_or_else(|| panic!("{text}"));
        let numbers: Vec<&str> = line[name.len()..].split_whitespace().collect();
        assert_eq!(numbers, [value.to_string(), value.to_string()], "{line}");
    }
    let proc = server.order(&["status", "--proc"]);
    for line in [
        "  Active devices: 1",
        "  Total reads:    14",
        "  Total writes:   8",
        "  Total remaps:   1",
        &format!("  Total errors:   {}", counters.device_errors),
        "  Health scans:   0",
        &format!("  Device: {} -> {}", volume.primary.display(), volume.spare.display()),
        "    Reads:  14",
        "    Writes: 8",
        "    Remaps: 1",
        "    Active mappings: 1",
        "    Health scans: 0",
    ] {
        assert!(proc.lines().any(|found| found == line), "{line:?} is not in\n{proc}");
    }
    // The lifetime goes on over a restart, the run's own counters begin again.
    let lifetime = status.lifetime;
    drop(guest);
    server.stop();
    let status = volume.serve(&[]).status();
    assert_eq!((status.counters.reads, status.lifetime.reads), (0, 14));
    assert_eq!(status.lifetime.guest_errors, lifetime.guest_errors);
    assert_eq!((status.lifetime.writes, status.lifetime.remaps), (8, 1));
}

/// Scenario 32: connections come and go, with work under way or not.
#[test]
fn ten_connections_after_each_other_leave_no_descriptor_behind() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    let descriptors = || fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap().count();
    let mut first = None;
    let mut model = Model::zeros(960, 256);
    for run in 0..10 {
        let mut guest = server.guest(1 + usize::try_from(run % 4).unwrap());
        model.check_all(guest.queue());
        let write = model.write(960 + run, pattern(960 + run, 16, run));
        guest.queue().one(write).unwrap();
        assert!(server.status().connected);
        drop(guest);
        // The next connection begins when this one has ended; its memory and eventfds are gone by then.
        let next = server.guest(1);
        // An operator's connection may be a moment from its end.
        let most = *first.get_or_insert_with(descriptors);
        crate::server::eventually("no more descriptors than after the first", || descriptors() <= most);
        drop(next);
    }
    server.stop();
}

/// Scenario 32 for the operator's side.
#[test]
fn questions_leave_no_descriptor_behind() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    let ask = || {
        for words in [&["ping"][..], &["status"], &["list"], &["events"], &["save"], &["fault", "list"]] {
            server.order(words);
        }
    };
    ask();
    let descriptors = || fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap().count();
    let before = descriptors();
    (0..5).for_each(|_| ask());
    // The last connection may still be closing.
    assert!(descriptors() <= before + 1, "{before} descriptors before, {} after", descriptors());
}

/// `create` and `adopt` say what they made, and the volume has what they said.
#[test]
fn an_adopted_image_is_served_and_not_changed_by_a_byte() {
    let volume = Volume::absent();
    let image = pattern(0, 8 * 2048, 5);
    fs::write(&volume.primary, &image).unwrap();
    let primary = volume.primary.to_str().unwrap();
    let line = done(&vhost_remap(&["adopt", "--primary", primary, "--max-remaps", "64", "--serial", "old-disk"]));
    assert!(line.contains("16384 sectors") && line.contains("64 slots"), "{line}");
    assert!(fs::read(&volume.primary).unwrap() == image);
    let server = volume.serve(&[]);
    assert!(server.announcement.contains("8 MiB") && server.announcement.contains("remaps 0/64"));
    let mut guest = server.guest(1);
    let mut model = Model { start: 0, bytes: image.clone() };
    model.check_all(guest.queue());
    let serial = guest.queue().one(Io::Raw { kind: 8, sector: 0, readable: Vec::new(), writable: 20 }).unwrap();
    assert_eq!(serial, b"old-disk\0\0\0\0\0\0\0\0\0\0\0\0");
    server.fault(&["--ops", "write", "--sectors", "80-87"]);
    let write = model.write(80, pattern(80, 8, 6));
    guest.queue().one(write).unwrap();
    drop(guest);
    server.stop();
    // The remapped block is the only thing that was written, and not here.
    assert!(fs::read(&volume.primary).unwrap() == image);
    model.check_all(volume.serve(&[]).guest(1).queue());
}
