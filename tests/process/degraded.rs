//! A volume whose spare is lost.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use vhost_remap::volume::layout::{LabelLayout, PAGE};
use vhost_remap::volume::superblock::{Seat, Superblock};

use crate::guest::{Failed, Guest};
use crate::model::{Model, pattern};
use crate::server::{Server, Volume};

/// Remaps of the volumes here: two pages of table.
const REMAPS: u32 = 600;

/// A volume with two remapped blocks, 1000 and 1008, of which the primary holds older data; closed cleanly.
fn used() -> (Volume, Model) {
    let volume = Volume::create(32, REMAPS);
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let mut model = Model::written(&mut guest, 960, 256, 1);
    server.order(&["remap", "1000-1015"]);
    for sector in [1000, 1008] {
        let write = model.write(sector, pattern(sector, 8, 2));
        guest.queue().one(write).unwrap();
    }
    drop(guest);
    server.stop();
    (volume, model)
}

fn lose_spare(volume: &Volume) -> std::path::PathBuf {
    let away = volume.dir.path().join("away");
    fs::rename(&volume.spare, &away).unwrap();
    away
}

/// Everything but blocks 1000 and 1008 reads, and those fail.
fn check_without_remapped(server: &Server, guest: &mut Guest, model: &Model) {
    model.check(guest.queue(), 960, 40);
    model.check(guest.queue(), 1016, 200);
    for sector in 1000..1016 {
        assert_eq!(guest.read(sector, 1), Err(Failed::IoErr), "{sector}");
    }
    assert_eq!(guest.read(996, 8), Err(Failed::IoErr));
    assert_eq!(server.blocks("remapped"), [1000, 1008]);
}

#[test]
fn a_labelled_primary_is_served_read_only_without_its_spare_and_is_whole_again_with_it() {
    let (volume, model) = used();
    let away = lose_spare(&volume);
    let why = volume.serve_refused(&[]);
    assert!(why.contains("disk.img.spare") && why.contains("--degraded"), "{why}");
    let before = fs::read(&volume.primary).unwrap();
    let server = volume.serve_with(&["--degraded", "--fault-injection"]);
    let mut guest = server.guest(1);
    assert!(guest.features & 1 << 5 != 0, "VIRTIO_BLK_F_RO");
    check_without_remapped(&server, &mut guest, &model);
    assert_eq!(guest.write(960, pattern(960, 8, 3)), Err(Failed::IoErr));
    guest.flush().unwrap();
    let status = server.status();
    assert_eq!(status.state, ["degraded", "read-only"]);
    assert!(status.messages[0].contains("s ago) fail"), "{:?}", status.messages);
    assert!(server.events().iter().any(|event| event.kind == "degraded"));
    assert!(server.announcement.contains("degraded"), "{}", server.announcement);
    for order in [&["remap", "2048-2055"][..], &["release", "1000-1007"], &["save"], &["clear"]] {
        server.refused(order);
    }
    drop(guest);
    server.stop();
    assert!(fs::read(&volume.primary).unwrap() == before, "the primary was written");
    assert!(!volume.spare.exists());
    // The spare returns: exactly the volume as it was.
    fs::rename(away, &volume.spare).unwrap();
    let server = volume.serve(&[]);
    assert_eq!(server.blocks("remapped"), [1000, 1008]);
    model.check_all(server.guest(1).queue());
    server.stop();
}

/// The one exception to R1: what moved after the label's list was written. The list has a date for that.
#[test]
fn blocks_remapped_after_the_list_was_written_read_as_the_primary_holds_them() {
    let volume = Volume::create(32, REMAPS);
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let mut model = Model::written(&mut guest, 960, 256, 1);
    server.order(&["remap", "1000-1007"]);
    server.order(&["save"]);
    server.order(&["remap", "1008-1015"]);
    let older = model.sectors(1008, 8).to_vec();
    let write = model.write(1008, pattern(1008, 8, 2));
    guest.queue().one(write).unwrap();
    guest.flush().unwrap();
    server.kill();
    let away = lose_spare(&volume);
    let server = volume.serve_with(&["--degraded"]);
    let mut guest = server.guest(1);
    assert_eq!(server.blocks("remapped"), [1000]);
    assert_eq!(guest.read(1000, 8), Err(Failed::IoErr));
    assert_eq!(guest.read(1008, 8), Ok(older));
    drop(guest);
    server.stop();
    fs::rename(away, &volume.spare).unwrap();
    let server = volume.serve(&[]);
    model.check_all(server.guest(1).queue());
}

#[test]
fn an_adopted_primary_is_not_served_without_its_spare() {
    let volume = Volume::absent();
    fs::write(&volume.primary, vec![7; 8 << 20]).unwrap();
    let primary = volume.primary.to_str().unwrap();
    crate::server::done(&crate::server::vhost_remap(&["adopt", "--primary", primary]));
    lose_spare(&volume);
    check_refused(&volume, "carries no label");
}

/// Its list would be taken for that of the new volume.
#[test]
fn adopting_a_primary_that_belongs_to_a_volume_is_refused_or_makes_an_end_of_its_list() {
    let (volume, model) = used();
    let old_spare = lose_spare(&volume);
    let primary = volume.primary.to_str().unwrap();
    let before = fs::read(&volume.primary).unwrap();
    let adopt = ["adopt", "--primary", primary, "--max-remaps", "64"];
    let why = crate::server::refusal(&crate::server::vhost_remap(&adopt));
    assert!(why.contains("has 2 remapped blocks") && why.contains("--force"), "{why}");
    assert!(fs::read(&volume.primary).unwrap() == before && !volume.spare.exists(), "something was written");
    let line = crate::server::done(&crate::server::vhost_remap(&[&adopt[..], &["--force"]].concat()));
    assert!(line.contains("the label of its volume"), "{line}");
    let after = fs::read(&volume.primary).unwrap();
    let label = usize::try_from(label(&volume.primary).start).unwrap();
    assert!(after[label..label + 2 * PAGE].iter().all(|byte| *byte == 0), "the label is still there");
    assert!(after[..label] == before[..label] && after[label + 2 * PAGE..] == before[label + 2 * PAGE..]);
    // All of it is the new volume's, with what the primary held.
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    model.check(guest.queue(), 960, 40);
    model.check(guest.queue(), 1016, 200);
    assert_eq!(guest.read(1000, 16).unwrap(), before[1000 * 512..1016 * 512]);
    drop(guest);
    server.stop();
    fs::remove_file(&volume.spare).unwrap();
    check_refused(&volume, "carries no label");
    // And the old spare is not put back to a primary that has changed since.
    fs::rename(old_spare, &volume.spare).unwrap();
    let why = volume.serve_refused(&[]);
    assert!(why.contains("changed by another program"), "{why}");
}

#[track_caller]
fn check_refused(volume: &Volume, word: &str) {
    let before = fs::read(&volume.primary).unwrap();
    let mut command = volume.command(&["--degraded", "--log-level", "0"]);
    command.env("RUST_BACKTRACE", "0");
    let Err(output) = Server::start(command, volume.dir.path()) else { panic!("served although {word}") };
    let why = crate::server::refusal(&output);
    assert!(why.contains(word) && why.contains("disk.img"), "{why}");
    assert!(fs::read(&volume.primary).unwrap() == before, "the primary was written");
}

fn label(primary: &Path) -> LabelLayout {
    LabelLayout::new(fs::metadata(primary).unwrap().len(), REMAPS).unwrap()
}

fn damage(primary: &Path, offset: u64) {
    let file = fs::OpenOptions::new().read(true).write(true).open(primary).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
}

/// A list that is not whole would serve old data for the blocks it misses.
#[test]
fn a_label_that_is_not_whole_is_not_gone_by() {
    let (volume, _) = used();
    lose_spare(&volume);
    for page in [0, 1] {
        let at = label(&volume.primary).table(page) + 2000;
        damage(&volume.primary, at);
        check_refused(&volume, &format!("page {page} of the label's list"));
        damage(&volume.primary, at);
    }
    // The power went while the list was being written.
    let file = fs::OpenOptions::new().read(true).write(true).open(&volume.primary).unwrap();
    let copies = [0, 1].map(|copy| {
        let at = label(&volume.primary).superblock(copy);
        let mut page = vec![0; PAGE];
        file.read_exact_at(&mut page, at).unwrap();
        let mut superblock = Superblock::decode(&page, Seat::Label, copy).unwrap();
        superblock.stamped = 0;
        file.write_all_at(&superblock.encode(Seat::Label, copy), at).unwrap();
        (at, page)
    });
    check_refused(&volume, "half written");
    for (at, page) in &copies {
        file.write_all_at(page, *at).unwrap();
    }
    // Without any superblock there is nothing to go by either.
    for (at, _) in copies {
        damage(&volume.primary, at + 100);
    }
    check_refused(&volume, "checksum");
}
