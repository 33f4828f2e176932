//! Flushes that fail: on the primary, on a spare that holds unflushed data, and on one that does not.

use vhost_remap::control::api::FaultList;

use crate::guest::{Failed, Io};
use crate::model::{Model, pattern};
use crate::server::served;

/// Scenario 24, F2.
#[test]
fn a_failed_flush_poisons_the_volume_until_the_operator_has_looked() {
    let (volume, server, mut guest) = served();
    let mut model = Model::written(&mut guest, 960, 256, 1);
    guest.flush().unwrap();
    model.put(&mut guest, 1000, pattern(1000, 8, 2));
    server.fault(&["--ops", "flush", "--count", "1"]);
    assert_eq!(guest.flush(), Err(Failed::IoErr));
    // The next flush would succeed on the device, and must not.
    assert_eq!(guest.flush(), Err(Failed::IoErr));
    for io in [
        Io::Write { sector: 1000, data: pattern(1000, 8, 3) },
        Io::WriteZeroes(vec![(1000, 8, 0)]),
        Io::Discard(vec![(1000, 8, 0)]),
    ] {
        assert_eq!(guest.queue().one(io.clone()), Err(Failed::IoErr), "{io:?}");
    }
    model.check_all(guest.queue());
    let status = server.status();
    assert_eq!(status.state, ["poisoned"]);
    // Which sectors nobody knows of.
    assert!(status.messages[0].contains("disk.img") && status.messages[0].contains("clear"), "{:?}", status.messages);
    assert_eq!(server.events().iter().filter(|event| event.kind == "poisoned").count(), 1);
    // Remembered over a crash.
    server.kill();
    drop(guest);
    let server = volume.serve(&[]);
    assert_eq!(server.status().state, ["poisoned"]);
    let mut guest = server.guest(1);
    assert_eq!(guest.write(1000, pattern(1000, 8, 3)), Err(Failed::IoErr));
    assert_eq!(guest.flush(), Err(Failed::IoErr));
    model.check_all(guest.queue());
    // Not lifted while flushes still fail.
    server.fault(&["--ops", "flush"]);
    let why = server.refused(&["clear"]);
    assert!(why.contains("primary still fails to flush"), "{why}");
    assert_eq!(guest.flush(), Err(Failed::IoErr));
    server.no_faults();
    let answer = server.order(&["clear"]);
    assert!(answer.contains("writes are taken again"), "{answer}");
    model.put(&mut guest, 1000, pattern(1000, 8, 4));
    guest.flush().unwrap();
    assert_eq!(server.status().state, ["ok"]);
    drop(guest);
    server.stop();
    let server = volume.serve(&[]);
    assert_eq!(server.status().state, ["ok"]);
    model.check_all(server.guest(1).queue());
}

/// Scenario 24, F1: a flush reaches the primary, and the spare where a slot was written since the last one.
#[test]
fn a_flush_reaches_both_devices() {
    let (_volume, server, mut guest) = served();
    let mut model = Model::written(&mut guest, 960, 256, 1);
    server.order(&["remap", "1000-1007"]);
    guest.flush().unwrap();
    for device in ["primary", "spare"] {
        server.fault(&["--device", device, "--ops", "flush", "--delay", "1", "--errno", "none"]);
    }
    let hits = || {
        let list: FaultList = serde_json::from_str(&server.order(&["fault", "list", "--json"])).unwrap();
        list.rules.iter().map(|rule| rule.hits).collect::<Vec<_>>()
    };
    let mut expected = [0, 0];
    for (sector, on_spare) in [(1003, 1), (1100, 0), (1000, 1), (996, 1)] {
        model.put(&mut guest, sector, pattern(sector, 5, 2));
        assert_eq!(hits(), expected);
        guest.flush().unwrap();
        expected = [expected[0] + 1, expected[1] + on_spare];
        assert_eq!(hits(), expected);
    }
    model.check_all(guest.queue());
}

/// F2 where no device takes the note: said, not hidden.
#[test]
fn a_poison_that_no_device_keeps_is_called_not_persistent() {
    let (_volume, server, mut guest) = served();
    guest.write(1000, pattern(1000, 8, 2)).unwrap();
    server.fault(&["--ops", "flush"]);
    server.fault(&["--ops", "flush", "--device", "spare"]);
    assert_eq!(guest.flush(), Err(Failed::IoErr));
    let status = server.status();
    assert_eq!(status.state, ["poisoned"]);
    assert!(status.messages[0].contains("not persistent"), "{:?}", status.messages);
}

/// F3: a spare without unflushed data is not worth the primary.
#[test]
fn a_spare_that_fails_to_flush_while_clean_is_down_and_the_primary_goes_on() {
    let (volume, server, mut guest) = served();
    let mut model = Model::written(&mut guest, 960, 512, 1);
    server.order(&["remap", "960-975"]);
    guest.flush().unwrap();
    server.fault(&["--ops", "flush", "--device", "spare"]);
    server.fault(&["--ops", "write", "--sectors", "1000-1007"]);
    // A write that needs a slot fails: its mapping cannot be made durable.
    assert_eq!(guest.write(1000, pattern(1000, 8, 2)), Err(Failed::IoErr));
    assert_eq!(server.status().state, ["spare-down"]);
    // Remapped blocks fail, all else goes on, flushes included.
    assert_eq!(guest.read(960, 8), Err(Failed::IoErr));
    assert_eq!(guest.write(968, pattern(968, 1, 2)), Err(Failed::IoErr));
    model.put(&mut guest, 1008, pattern(1008, 64, 3));
    guest.flush().unwrap();
    model.check(guest.queue(), 976, 24);
    model.check(guest.queue(), 1008, 400);
    // The spare comes back by itself.
    server.no_faults();
    server.await_event("spare-back");
    assert_eq!(server.status().state, ["ok"]);
    // The write that failed left its sectors old or new (W7); then they stay.
    let first = guest.read(1000, 8).unwrap();
    assert!(first == model.sectors(1000, 8) || first == pattern(1000, 8, 2));
    model.put(&mut guest, 1000, pattern(1000, 8, 4));
    guest.flush().unwrap();
    model.check_all(guest.queue());
    drop(guest);
    server.stop();
    model.check_all(volume.serve(&[]).guest(1).queue());
}

/// F3, the other half: unflushed data in slots is as precious as on the primary.
#[test]
fn a_spare_that_fails_to_flush_while_dirty_poisons_the_volume() {
    let (_volume, server, mut guest) = served();
    let mut model = Model::written(&mut guest, 960, 512, 1);
    server.order(&["remap", "960-975"]);
    model.put(&mut guest, 962, pattern(962, 4, 2));
    server.fault(&["--ops", "flush", "--device", "spare", "--count", "1"]);
    assert_eq!(guest.flush(), Err(Failed::IoErr));
    assert_eq!(server.status().state, ["poisoned"]);
    assert_eq!(guest.write(1200, pattern(1200, 8, 3)), Err(Failed::IoErr));
    model.check_all(guest.queue());
    server.order(&["clear"]);
    model.put(&mut guest, 962, pattern(962, 4, 4));
    guest.flush().unwrap();
    model.check_all(guest.queue());
}

/// A poisoned volume ends like a crashed one, says so, and is still poisoned afterwards.
#[test]
fn a_poisoned_volume_does_not_close_cleanly() {
    let (volume, server, mut guest) = served();
    guest.write(1000, pattern(1000, 8, 2)).unwrap();
    server.fault(&["--ops", "flush", "--count", "1"]);
    assert_eq!(guest.flush(), Err(Failed::IoErr));
    drop(guest);
    let why = server.stop_unclean();
    assert!(why.contains("not closed cleanly") && why.contains("a flush failed before"), "{why}");
    assert_eq!(volume.serve(&[]).status().state, ["poisoned"]);
}
