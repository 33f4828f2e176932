//! Servers killed at each step of a repair, as told by the operation that has not happened yet. The
//! simulator does the same to power cuts and to every other order of events.

use std::time::Duration;

use vhost_remap::volume::layout::{Layout, Place};

use crate::guest::{Guest, Io};
use crate::model::{Model, pattern};
use crate::server::{Server, Volume};

const SLOTS: u32 = 64;

/// Rules under which a write to block 1000 stops for good at one step, the last of them by its delay.
type Steps = &'static [&'static [&'static str]];

/// Longer than any test waits: what is delayed so much has not happened when the server is killed.
const STOP: &str = "600000";

/// A block that is moved: its slot is written and flushed, then the map in both places, and that is flushed.
const MOVING: [(&str, Steps); 4] = [
    ("before its slot is written", &[&["--ops", "write", "--sectors", "SLOTS"]]),
    ("before its slot is flushed", &[&["--ops", "flush"]]),
    ("with the map written at the tail only", &[&["--ops", "write", "--sectors", "HEAD"]]),
    ("with the map written at the head only", &[&["--ops", "write", "--sectors", "TAIL"]]),
];

/// A block that is written again in place: once more, flushed and read back.
const REWRITING: [(&str, Steps); 3] = [
    ("before it is written again", &[&["--ops", "write", "--sectors", "1000-1007"]]),
    ("before that is flushed", &[&["--ops", "flush"]]),
    ("before it is read back", &[&["--ops", "read", "--sectors", "1000-1007"]]),
];

/// Sectors of the spare, as fault rules take them.
fn sectors(volume: &Volume, name: &str) -> String {
    let layout = Layout::new(std::fs::metadata(&volume.spare).unwrap().len(), SLOTS).unwrap();
    let (start, len) = match name {
        "SLOTS" => (layout.slots_start, u64::from(SLOTS) * 4096),
        "HEAD" => (layout.place_start(Place::Head), layout.place_len()),
        "TAIL" => (layout.place_start(Place::Tail), layout.place_len()),
        plain => return plain.to_owned(),
    };
    format!("{}-{}", start / 512, (start + len) / 512 - 1)
}

/// Until the last rule has struck, and is gone with that.
fn await_step(server: &Server, guest: &mut Guest) {
    let is_waiting = || server.order(&["fault", "list"]).contains("delay");
    for _ in 0..6000 {
        if !is_waiting() {
            return;
        }
        // No answer may come before the step.
        assert_eq!(guest.queue().wait_for(Duration::from_millis(10)), []);
    }
    panic!("the step is not reached: {}", server.order(&["fault", "list"]));
}

/// What was there, with one block remapped already, and the faults that begin it all.
fn begin(volume: &Volume, primary_fails: &[&str]) -> (Server, Guest, Model) {
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let model = Model::written(&mut guest, 960, 256, 1);
    server.order(&["remap", "1100"]);
    guest.flush().unwrap();
    server.fault(&[&["--ops", "write", "--sectors", "1000-1007"], primary_fails].concat());
    (server, guest, model)
}

/// After the kill: all that was answered is there, the block is old or new sector by sector, the map is one
/// of the two, and the next block that moves takes a slot of its own.
fn check_reopened(volume: &Volume, model: &mut Model, new: &[u8], what: &str) {
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let blocks = server.blocks("remapped");
    assert!(blocks == [1096] || blocks == [1000, 1096], "{what}: {blocks:?}");
    for (sector, new) in (1000..1008).zip(new.chunks(512)) {
        let found = guest.read(sector, 1).unwrap();
        assert!(found == new || found == model.sectors(sector, 1), "{what}: sector {sector}: {:x?}", &found[..16]);
        let _ = model.write(sector, found);
    }
    model.check_all(guest.queue());
    server.order(&["remap", "1040", "1048"]);
    let mut slots: Vec<_> = server.list().iter().map(|entry| entry.slot.unwrap()).collect();
    let count = slots.len();
    slots.sort_unstable();
    slots.dedup();
    assert_eq!(slots.len(), count, "{what}: two blocks in one slot");
    for sector in [1000, 1040, 1048, 1096] {
        let write = model.write(sector, pattern(sector, 8, 9));
        guest.queue().one(write).unwrap();
    }
    guest.flush().unwrap();
    model.check_all(guest.queue());
    drop(guest);
    server.kill();
    model.check_all(volume.serve(&[]).guest(1).queue());
}

fn check_steps(device: &str, steps: &[(&str, Steps)], primary_fails: &[&str]) {
    for (what, rules) in steps {
        let volume = Volume::create(32, SLOTS);
        let (server, mut guest, mut model) = begin(&volume, primary_fails);
        for rule in *rules {
            let rule: Vec<String> = rule.iter().map(|word| sectors(&volume, word)).collect();
            let rule: Vec<&str> = rule.iter().map(String::as_str).collect();
            let stop = ["--device", device, "--errno", "none", "--count", "1", "--delay", STOP];
            server.fault(&[&stop[..], &rule].concat());
        }
        let new = pattern(1000, 8, 2);
        guest.queue().submit(&Io::Write { sector: 1000, data: new.clone() });
        await_step(&server, &mut guest);
        server.kill();
        drop(guest);
        check_reopened(&volume, &mut model, &new, what);
    }
}

/// Scenario 14.
#[test]
fn a_kill_at_each_step_of_moving_a_block_leaves_the_old_map_or_the_new() {
    check_steps("spare", &MOVING, &[]);
}

/// Scenario 14 for the map's own flush, which follows another: it is stopped while the map's last write is late.
#[test]
fn a_kill_before_the_map_is_flushed_leaves_the_old_map_or_the_new() {
    let volume = Volume::create(32, SLOTS);
    let (server, mut guest, mut model) = begin(&volume, &[]);
    let tail = sectors(&volume, "TAIL");
    let late = ["--device", "spare", "--errno", "none", "--count", "1", "--delay", "5000"];
    server.fault(&[&late[..], &["--ops", "write", "--sectors", &tail]].concat());
    let new = pattern(1000, 8, 2);
    guest.queue().submit(&Io::Write { sector: 1000, data: new.clone() });
    await_step(&server, &mut guest);
    server.fault(&["--device", "spare", "--errno", "none", "--count", "1", "--delay", STOP, "--ops", "flush"]);
    await_step(&server, &mut guest);
    server.kill();
    drop(guest);
    check_reopened(&volume, &mut model, &new, "before the map is flushed");
}

/// Scenario 14 for blocks that keep their place.
#[test]
fn a_kill_at_each_step_of_rewriting_a_block_leaves_it_old_or_new() {
    check_steps("primary", &REWRITING, &["--count", "1"]);
}

/// Scenario 14, the last step: answered is answered.
#[test]
fn a_kill_right_after_the_answer_finds_the_new_map() {
    let volume = Volume::create(32, SLOTS);
    let (server, mut guest, mut model) = begin(&volume, &[]);
    let write = model.write(1000, pattern(1000, 8, 2));
    guest.queue().one(write).unwrap();
    server.kill();
    drop(guest);
    let server = volume.serve(&[]);
    assert_eq!(server.blocks("remapped"), [1000, 1096]);
    model.check_all(server.guest(1).queue());
}
