//! Volumes that a later program has used, served by this one (E4).

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use vhost_remap::volume::layout::{LabelLayout, Layout, PAGE, Place};

use crate::guest::Failed;
use crate::model::{Model, pattern};
use crate::refusals::{check_refused, used};
use crate::server::Volume;

const SLOTS: u32 = 64;
/// Where a superblock has its version, its checksum, and its masks of features.
const VERSION: usize = 8;
const CHECKSUM: usize = 12;
const COMPAT: usize = 16;
const RO_COMPAT: usize = 24;
const INCOMPAT: usize = 32;

fn superblocks_of_spare(volume: &Volume) -> Vec<u64> {
    let layout = Layout::new(fs::metadata(&volume.spare).unwrap().len(), SLOTS).unwrap();
    Place::ALL.into_iter().flat_map(|place| [0, 1].map(|copy| layout.superblock(place, copy))).collect()
}

fn superblocks_of_label(volume: &Volume) -> Vec<u64> {
    let label = LabelLayout::new(fs::metadata(&volume.primary).unwrap().len(), SLOTS).unwrap();
    [0, 1].map(|copy| label.superblock(copy)).into()
}

fn superblock(path: &Path, offset: u64) -> Vec<u8> {
    let mut page = vec![0; PAGE];
    fs::File::open(path).unwrap().read_exact_at(&mut page, offset).unwrap();
    page
}

/// Change a byte of each superblock, with the right checksum, and leave the file as old as it was.
fn patch(path: &Path, offsets: &[u64], at: usize, byte: u8) {
    let modified = fs::metadata(path).unwrap().modified().unwrap();
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    for offset in offsets {
        let mut page = superblock(path, *offset);
        page[at] = byte;
        page[CHECKSUM..CHECKSUM + 4].fill(0);
        let crc = crc32c::crc32c(&page);
        page[CHECKSUM..CHECKSUM + 4].copy_from_slice(&crc.to_le_bytes());
        file.write_all_at(&page, *offset).unwrap();
    }
    file.set_modified(modified).unwrap();
}

#[test]
fn a_volume_of_a_later_format_is_refused() {
    let volume = used();
    let spare = superblocks_of_spare(&volume);
    patch(&volume.spare, &spare, VERSION, 2);
    for options in [&[][..], &["--read-only"], &["--accept-external"], &["--create", "--size", "32M"]] {
        check_refused(&volume, options, &["disk.img.spare", "the spare has format version 2", "use a newer program"]);
    }
    patch(&volume.spare, &spare, VERSION, 1);
    let label = superblocks_of_label(&volume);
    patch(&volume.primary, &label, VERSION, 3);
    check_refused(&volume, &[], &["disk.img", "the primary has format version 3", "use a newer program"]);
    patch(&volume.primary, &label, VERSION, 1);
    volume.serve(&[]).stop();
}

#[test]
fn a_volume_with_incompatible_features_is_refused() {
    let volume = used();
    let spare = superblocks_of_spare(&volume);
    patch(&volume.spare, &spare, INCOMPAT + 1, 0x04);
    for options in [&[][..], &["--read-only"]] {
        check_refused(&volume, options, &["the spare names incompatible features 0x400", "use a newer program"]);
    }
    patch(&volume.spare, &spare, INCOMPAT + 1, 0);
    patch(&volume.primary, &superblocks_of_label(&volume), INCOMPAT, 0x01);
    check_refused(&volume, &[], &["the primary names incompatible features 0x1", "use a newer program"]);
}

#[test]
fn a_volume_with_read_only_compatible_features_is_only_read() {
    let volume = used();
    let spare = superblocks_of_spare(&volume);
    patch(&volume.spare, &spare, RO_COMPAT + 7, 0x80);
    let before = (fs::read(&volume.primary).unwrap(), fs::read(&volume.spare).unwrap());
    let server = volume.serve_with(&["--spare", volume.spare.to_str().unwrap()]);
    assert!(server.announcement.trim_end().ends_with("state read-only"), "{}", server.announcement);
    assert_eq!(server.status().state, ["read-only"]);
    let why = server.await_event("read-only");
    assert!(why.cause.contains("0x8000000000000000") && why.action == "opened read-only", "{why:?}");
    assert!(server.log_text().contains("0x8000000000000000"), "{}", server.log_text());
    assert_eq!(server.blocks("remapped"), [1000]);
    let mut guest = server.guest(1);
    assert_eq!(guest.read(960, 256), Ok(pattern(960, 256, 1)));
    assert_eq!(guest.write(960, pattern(960, 1, 2)), Err(Failed::IoErr));
    guest.flush().unwrap();
    let why = server.refused(&["remap", "2000"]);
    assert!(why.contains("read-only"), "{why}");
    drop(guest);
    server.stop();
    assert!(before == (fs::read(&volume.primary).unwrap(), fs::read(&volume.spare).unwrap()), "something was written");
}

#[test]
fn compatible_features_are_ignored_and_kept() {
    let volume = used();
    let (spare, label) = (superblocks_of_spare(&volume), superblocks_of_label(&volume));
    patch(&volume.spare, &spare, COMPAT + 2, 0x21);
    for _ in 0..2 {
        let server = volume.serve(&[]);
        assert_eq!(server.status().state, ["ok"]);
        let mut guest = server.guest(1);
        Model::written(&mut guest, 960, 256, 1);
        drop(guest);
        server.stop();
    }
    let kept = |path: &Path, offset: &u64| u64::from(superblock(path, *offset)[COMPAT + 2]) << 16;
    assert!(spare.iter().all(|offset| kept(&volume.spare, offset) == 0x21_0000));
    // The label has it from the spare: each session writes one of its two copies.
    assert!(label.iter().any(|offset| kept(&volume.primary, offset) == 0x21_0000));
}
