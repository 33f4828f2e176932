//! Golden images: volumes of each format version, byte for byte, in `tests/golden/format-VERSION/`.
//!
//! An image is text: for each device its size in bytes, then every 32 bytes that are not zero, with their
//! offset. Making the same volume with the same operations must give the same bytes, and the image must open
//! with the content that the test of it spells out.
//!
//! `VHOST_REMAP_WRITE_GOLDEN=1 cargo test --release --test metadata golden` writes the images that are
//! missing. It overwrites none: a golden image of a released version is never changed, because volumes of
//! that version are out there. What changes the bytes of a volume is a new format version with images of its
//! own, next to the old ones, which must go on to open.
//!
//! The counters page is the one to which values may be added behind those there are: of it the first
//! [`FIRST_COUNTERS`] are compared, and the images are volumes from before there were more.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use vhost_remap::device::{DeviceIndex, OpKind};
use vhost_remap::engine::healer::Order;
use vhost_remap::engine::request::Status;
use vhost_remap::volume::layout::Place;
use vhost_remap::volume::sidecar::SavedCounters;
use vhost_remap::volume::superblock::Seat as PageSeat;

use crate::engine::Engine;
use crate::rig::{BLOCK, Bad, EPOCH, MTIME, PRIMARY, Reads, Rig, SPARE, Shape};
use crate::seat::{At, Entry, Kind, Seat, seats, u32_at, u64_at};

const CREATED: Shape = Shape { capacity: 2048, max_remaps: 16, labelled: true };
const ADOPTED: Shape = Shape { labelled: false, ..CREATED };
/// Counters that the first program of the format kept.
const FIRST_COUNTERS: usize = 15;
/// Bytes in a line of an image.
const LINE: usize = 32;

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/format-1").join(name).with_extension("txt")
}

/// The image of the disks as they are.
fn dump(rig: &Rig) -> String {
    let mut text = String::new();
    for (device, size) in [PRIMARY, SPARE].into_iter().zip(rig.shape.sizes()) {
        writeln!(text, "{device} {size}").expect("a string takes everything");
        let bytes = rig.peek(device, 0, usize::try_from(size).expect("small"));
        for (index, line) in bytes.chunks(LINE).enumerate().filter(|(_, line)| line.iter().any(|byte| *byte != 0)) {
            write!(text, "{:06x} ", index * LINE).expect("a string takes everything");
            line.iter().for_each(|byte| write!(text, "{byte:02x}").expect("a string takes everything"));
            text.push('\n');
        }
    }
    text
}

/// Disks with the content of an image.
fn load(shape: Shape, text: &str) -> Rig {
    let rig = Rig::new(shape);
    let mut device = PRIMARY;
    for line in text.lines() {
        let (first, second) = line.split_once(' ').expect("two words");
        if let Some(index) = [PRIMARY, SPARE].iter().position(|device| device.to_string() == first) {
            device = [PRIMARY, SPARE][index];
            assert_eq!(second, shape.sizes()[index].to_string(), "the size of the {device}");
            continue;
        }
        let offset = u64::from_str_radix(first, 16).expect("an offset");
        let hex = |at: usize| u8::from_str_radix(&second[at..at + 2], 16).expect("hexadecimal digits");
        let bytes: Vec<u8> = (0..second.len()).step_by(2).map(hex).collect();
        rig.disks.poke(device, offset, &bytes);
    }
    rig
}

/// The disks without what later programs add to the counters.
fn with_first_counters(made: &Rig) -> Rig {
    let (rig, set) = (made.fork(), made.shape.create_params().set);
    for seat in seats(&made.shape).into_iter().filter(|seat| seat.kind == Kind::Counters) {
        let place = PageSeat::Spare(seat.at.place().expect("counters are on the spare"));
        let mut saved = SavedCounters::decode(&seat.read(made), set, place).expect("a whole page");
        saved.values.truncate(FIRST_COUNTERS);
        seat.write(&rig, &saved.encode(set, place));
    }
    rig
}

/// Compare what was made with the image of that name, and give the image's disks.
fn golden(name: &str, made: &Rig) -> Rig {
    let (path, text) = (path(name), dump(&with_first_counters(made)));
    if std::env::var_os("VHOST_REMAP_WRITE_GOLDEN").is_some() && !path.exists() {
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder for images");
        fs::write(&path, &text).expect("an image is written");
    }
    let image = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    for (number, (found, expected)) in text.lines().zip(image.lines()).enumerate() {
        assert_eq!(found, expected, "{}:{}: what is written today differs", path.display(), number + 1);
    }
    assert!(text == image, "{}: what is written today is longer or shorter", path.display());
    load(made.shape, &image)
}

/// A sector that says what it is in its first bytes, so that images stay small.
fn sector(sector: u64, write: u64) -> Vec<u8> {
    let mut bytes = format!("sector {sector}, write {write}").into_bytes();
    bytes.resize(512, 0);
    bytes
}

fn block(block: u64, write: u64) -> Vec<u8> {
    (block * BLOCK..(block + 1) * BLOCK).flat_map(|at| sector(at, write)).collect()
}

fn unwritable(device: DeviceIndex, from: u64, bytes: u64) -> Bad {
    Bad { device, from, to: from + bytes, reads: Reads::Good, writes: true }
}

fn unreadable(device: DeviceIndex, from: u64, bytes: u64) -> Bad {
    Bad { device, from, to: from + bytes, reads: Reads::Never, writes: true }
}

fn end(rig: &mut Rig, engine: Engine) {
    drop(engine);
    rig.kill();
    rig.bad.clear();
}

fn write_ok(engine: &mut Engine, rig: &mut Rig, sector: u64, data: &[u8]) {
    assert_eq!(engine.write(rig, sector, data), Ok(Status::Ok));
}

fn created() -> Rig {
    let mut rig = Rig::new(CREATED);
    rig.create().unwrap().unwrap();
    rig
}

/// Remapped blocks, lost sectors of both kinds, a slot that failed; closed cleanly.
fn used() -> Rig {
    let mut rig = created();
    let mut engine = rig.open().unwrap();
    for (number, write) in [(3, 1), (10, 1), (11, 1), (12, 1)] {
        write_ok(&mut engine, &mut rig, number * BLOCK, &block(number, write));
    }
    assert_eq!(engine.flush(&mut rig), Ok(Status::Ok));
    // Blocks 10 to 12 take no writes, and two sectors of block 11 do not read either.
    rig.bad = vec![unwritable(PRIMARY, 10 * 4096, 3 * 4096), unreadable(PRIMARY, 11 * 4096 + 1024, 1024)];
    write_ok(&mut engine, &mut rig, 80, &block(10, 2));
    write_ok(&mut engine, &mut rig, 88, &sector(88, 2));
    write_ok(&mut engine, &mut rig, 96, &block(12, 2));
    // The slot of block 12 fails, with one sector of what was written to it.
    let slot = rig.shape.layout().slots_start + 2 * 4096;
    rig.bad.extend([unwritable(SPARE, slot, 4096), unreadable(SPARE, slot + 6 * 512, 512)]);
    write_ok(&mut engine, &mut rig, 97, &sector(97, 3));
    rig.bad.clear();
    engine.done(&mut rig, Order::Save);
    engine.close(&mut rig).unwrap().unwrap();
    end(&mut rig, engine);
    rig
}

/// The same after one more session: the tail takes no writes any more, a flush of the primary fails, and the
/// process is killed.
fn poisoned() -> Rig {
    let mut rig = used();
    let mut engine = rig.open().unwrap();
    let layout = rig.shape.layout();
    rig.bad = vec![
        unwritable(PRIMARY, 13 * 4096, 4096),
        unwritable(SPARE, layout.place_start(Place::Tail), layout.place_len()),
    ];
    write_ok(&mut engine, &mut rig, 13 * BLOCK, &block(13, 4));
    write_ok(&mut engine, &mut rig, 4 * BLOCK, &block(4, 4));
    rig.bad_flushes = [1, 0];
    assert_eq!(engine.flush(&mut rig), Ok(Status::IoErr));
    end(&mut rig, engine);
    rig
}

/// An image that was there before, adopted, with one remapped block; closed cleanly.
fn adopted() -> Rig {
    let mut rig = Rig::new(ADOPTED);
    for number in [0, 5, 255] {
        rig.disks.poke(PRIMARY, number * 4096, &block(number, 1));
    }
    rig.create().unwrap().unwrap();
    let mut engine = rig.open().unwrap();
    rig.bad = vec![unwritable(PRIMARY, 5 * 4096, 4096)];
    write_ok(&mut engine, &mut rig, 41, &sector(41, 2));
    engine.close(&mut rig).unwrap().unwrap();
    end(&mut rig, engine);
    rig
}

/// Fields of a superblock by the documented offsets: what every copy says.
#[derive(Debug, PartialEq, Eq)]
struct Fields {
    flags: u8,
    retired: u32,
    generation: u64,
    /// Size, time of change, samples that were read.
    stamp: (u64, u64, u32),
    /// Generations, newest first.
    history: Vec<u64>,
}

#[track_caller]
fn superblock(rig: &Rig, at: At, copy: u8) -> Fields {
    let is = |seat: &&Seat| seat.at == at && seat.kind == Kind::Superblock(copy);
    let bytes = seats(&rig.shape).iter().find(is).expect("a superblock").read(rig);
    let shape = rig.shape;
    assert_eq!((&bytes[..8], u32_at(&bytes, 8)), (&b"VHREMAP1"[..], 1));
    assert_eq!(bytes[16..40], [0; 24], "no features");
    assert_eq!(bytes[40..56], 0x0123_4567_89ab_cdef_0123_4567_89ab_cdef_u128.to_be_bytes());
    assert_eq!(bytes[56..72], 0xb_u128.to_be_bytes());
    assert_eq!(bytes[72..75], [if at == At::Label { 2 } else { 1 }, [0, 1, 2][at as usize], copy]);
    let [primary, spare] = shape.sizes();
    assert_eq!([88, 96, 104].map(|offset| u64_at(&bytes, offset)), [shape.capacity, primary, spare]);
    assert_eq!([u32_at(&bytes, 112), u32_at(&bytes, 116)], [shape.max_remaps, 512]);
    assert_eq!((u64_at(&bytes, 120), &bytes[128..148]), (EPOCH, &b"golden-serial-000001"[..]));
    assert_eq!(u64_at(&bytes, 176), 7);
    assert!(bytes[184..].starts_with(if shape.labelled { b"\0" } else { b"naa.5000c500a1b2c3d4\0" }));
    Fields {
        flags: bytes[75],
        retired: u32_at(&bytes, 76),
        generation: u64_at(&bytes, 80),
        stamp: (u64_at(&bytes, 152), u64_at(&bytes, 160), u32_at(&bytes, 172)),
        history: (0..8).map(|i| u64_at(&bytes, 248 + 16 * i)).take_while(|generation| *generation != 0).collect(),
    }
}

/// Copies whose bytes differ, by name. Nothing else on either device may: guest data and slots neither.
fn changed(before: &Rig, after: &Rig) -> BTreeSet<String> {
    let names = seats(&before.shape).into_iter().filter_map(|seat| {
        let now = seat.read(after);
        let changed = seat.read(before) != now;
        // What is compared next is all the rest.
        seat.write(before, &now);
        changed.then(|| seat.name())
    });
    let names = names.collect();
    assert!(dump(before) == dump(after), "something beside metadata was changed");
    names
}

fn named(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// A session without requests writes both generations' superblocks and the counters.
fn check_session(image: &mut Rig, map: &[Entry]) {
    let before = image.fork();
    let mut engine = image.open().unwrap();
    assert_eq!(engine.map(), map);
    assert!(!engine.is_poisoned());
    assert_eq!(engine.events, []);
    engine.close(image).unwrap().unwrap();
    let spare = ["head", "tail"]
        .map(|place| ["superblock 0", "superblock 1", "counters"].map(|page| format!("{page} at the {place}")));
    let mut expected: BTreeSet<String> = spare.into_iter().flatten().collect();
    if image.shape.labelled {
        expected.insert("superblock 0 of the label".to_owned());
    }
    assert_eq!(changed(&before, image), expected);
}

#[test]
fn a_golden_new_volume_is_made_and_opened_as_ever() {
    let mut image = golden("created", &created());
    for at in [At::Head, At::Tail, At::Label] {
        for copy in 0..2 {
            let new = Fields { flags: 3, retired: 0, generation: 1, stamp: (0, 0, 0), history: vec![] };
            assert_eq!(superblock(&image, at, copy), new);
        }
    }
    check_session(&mut image, &[]);
}

#[test]
fn a_golden_used_volume_is_made_and_opened_as_ever() {
    let mut image = golden("used", &used());
    let size = CREATED.sizes()[0];
    for at in At::PLACES {
        let open = Fields { flags: 2, retired: 0, generation: 2, stamp: (0, 0, 0), history: vec![1] };
        assert_eq!(superblock(&image, at, 0), open);
        let closed = Fields { flags: 7, retired: 0, generation: 3, stamp: (size, MTIME, 0xffff), history: vec![2, 1] };
        assert_eq!(superblock(&image, at, 1), closed);
    }
    check_session(&mut image, &[(10, 0, 0, false), (11, 1, 0b1100, false), (12, 3, 0b100_0000, true)]);
    image.kill();
    let mut engine = image.open().unwrap();
    assert_eq!(engine.status(&mut image).retired, 1, "the slot that failed");
    for (number, write) in [(3, 1), (10, 2)] {
        assert_eq!(engine.read(&mut image, number * BLOCK, BLOCK), Some(block(number, write)));
    }
    // The primary reads its two sectors again and holds their last content: they are healed.
    let of_eleven = [sector(88, 2), block(11, 1)[512..].to_vec()].concat();
    assert_eq!(engine.read(&mut image, 88, BLOCK), Some(of_eleven));
    // Of sector 102 the primary holds something older.
    assert_eq!(engine.read(&mut image, 102, 1), None);
    let of_twelve = [sector(96, 2), sector(97, 3), block(12, 2)[1024..6 * 512].to_vec()].concat();
    assert_eq!(engine.read(&mut image, 96, 6), Some(of_twelve));
}

#[test]
fn a_golden_poisoned_volume_with_one_place_is_made_and_opened_as_ever() {
    let mut image = golden("poisoned", &poisoned());
    let open = |generation, retired| {
        let history = (1..generation).rev().collect();
        Fields { flags: 2, retired, generation, stamp: (0, 0, 0), history }
    };
    assert_eq!(superblock(&image, At::Head, 0), open(4, 0));
    assert_eq!(superblock(&image, At::Head, 1), open(5, 2));
    assert_eq!(superblock(&image, At::Tail, 0), open(4, 0));
    let poison = image.peek(SPARE, image.shape.layout().poison(Place::Head), 4096);
    // Sequence, poisoned, device, error, time; regions of 2^11 sectors, one word, and in it the first.
    assert_eq!((u64_at(&poison, 32), &poison[40..42], u32_at(&poison, 44)), (1, &[1, 0][..], 5));
    assert_eq!((u64_at(&poison, 48), u32_at(&poison, 56), u32_at(&poison, 60)), (EPOCH, 11, 1));
    assert_eq!(u64_at(&poison, 128), 1);
    let before = image.fork();
    let mut engine = image.open().unwrap();
    assert!(engine.is_poisoned());
    let map = [(10, 0, 0, false), (11, 1, 0b1100, false), (12, 3, 0b100_0000, true), (13, 4, 0, false)];
    assert_eq!(engine.map(), map);
    let report = engine.status(&mut image).poison.expect("poisoned");
    assert_eq!((report.device, report.errno.0, report.time), (PRIMARY, libc::EIO, EPOCH));
    assert_eq!(report.ranges, [(0, 2048)]);
    assert_eq!(engine.write(&mut image, 0, &sector(0, 9)), Ok(Status::IoErr));
    // The tail takes writes again and is written in full; the new generation goes to both places. The label has
    // to wait for `clear`, as no flush is possible before it.
    let of_tail = ["superblock 0", "superblock 1", "poison page", "table page 0"]
        .map(|page| format!("{page} at the tail{}", if page.starts_with("table") { ", home A" } else { "" }));
    let mut expected: BTreeSet<String> = of_tail.into_iter().collect();
    expected.extend(named(&["table page 0 at the tail, home B", "superblock 0 at the head"]));
    assert_eq!(changed(&before, &image), expected);
    let written = |rig: &Rig| rig.performed.iter().any(|op| op.kind == OpKind::Write && op.device == PRIMARY);
    assert!(!written(&image), "the label");
    engine.done(&mut image, Order::Clear);
    write_ok(&mut engine, &mut image, 0, &sector(0, 9));
    engine.close(&mut image).unwrap().unwrap();
    assert_eq!(engine.read(&mut image, 13 * BLOCK, BLOCK), Some(block(13, 4)));
}

#[test]
fn a_golden_adopted_volume_is_made_and_opened_as_ever() {
    let mut image = golden("adopted", &adopted());
    let size = ADOPTED.sizes()[0];
    for at in At::PLACES {
        let closed = Fields { flags: 5, retired: 0, generation: 3, stamp: (size, MTIME, 0xffff), history: vec![2, 1] };
        assert_eq!(superblock(&image, at, 1), closed);
    }
    check_session(&mut image, &[(5, 0, 0, false)]);
    let mut engine = image.open().unwrap();
    let of_five = [sector(40, 1), sector(41, 2), block(5, 1)[1024..].to_vec()].concat();
    assert_eq!(engine.read(&mut image, 40, BLOCK), Some(of_five));
    assert_eq!(engine.read(&mut image, 255 * BLOCK, BLOCK), Some(block(255, 1)));
}

#[test]
fn a_golden_image_survives_the_trip() {
    let text = dump(&used());
    assert!(dump(&load(CREATED, &text)) == text);
}
