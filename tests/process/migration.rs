//! Live migration, from the back-end's side: what the device writes to guest memory is in the dirty log.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use crate::frontend::{FrontEnd, LOG_BYTES, MEMORY_END, NEXT, PAGE, Setup, WRITE};
use crate::guest::ANSWER_LIMIT;
use crate::model::{Random, pattern};
use crate::server::Volume;

const SETUP: Setup = Setup { queues: 1, size: 16, without: 0 };
/// The log need not be at the start of its file.
const LOG_START: u64 = 24;

const IN: u32 = 0;
const OUT: u32 = 1;
const GET_ID: u32 = 8;

pub(crate) fn log_file() -> File {
    let memfd = memfd_create("dirty-log", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&memfd, LOG_START + LOG_BYTES).unwrap();
    File::from(memfd)
}

/// The pages that were noted since the last time, which are forgotten.
fn take_dirty(log: &File) -> Vec<u64> {
    let mut bits = vec![0; LOG_BYTES as usize];
    log.read_exact_at(&mut bits, LOG_START).unwrap();
    log.write_all_at(&vec![0; LOG_BYTES as usize], LOG_START).unwrap();
    (0..MEMORY_END / PAGE).filter(|page| bits[(page / 8) as usize] >> (page % 8) & 1 == 1).collect()
}

/// One request, whose status lies in the third page of the ring's area and whose data at `data`.
pub(crate) fn request(front_end: &mut FrontEnd, kind: u32, sector: u64, data: u64, len: u32) -> u8 {
    let ring = &mut front_end.rings[0];
    let (header, status) = (ring.area(), ring.area() + 2 * PAGE);
    ring.write(header, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
    ring.descriptor(0, (header, 16, NEXT, 1));
    ring.descriptor(1, (data, len, if kind == OUT { NEXT } else { NEXT | WRITE }, 2));
    ring.descriptor(2, (status, 1, WRITE, 0));
    ring.offer(0);
    assert_eq!(ring.take(ANSWER_LIMIT).expect("answered").0, 0);
    ring.read(status, 1)[0]
}

/// Data, status and used ring, exactly; and nothing once it is over.
#[test]
fn pages_that_the_device_writes_are_in_the_dirty_log() {
    check_dirty_log(FrontEnd::connect);
    check_dirty_log(FrontEnd::packed);
}

fn check_dirty_log(connect: fn(&Path, Setup) -> FrontEnd) {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    let mut front_end = connect(&server.socket, SETUP);
    let log = log_file();
    let area = front_end.rings[0].area();
    let used = front_end.rings[0].device_pages();
    let status = area / PAGE + 2;
    // Its last bytes are in the next region of guest memory.
    let data = (MEMORY_END / 3) - 5 * PAGE - 512;
    let pages = |first: u64, count: u64| first / PAGE..first / PAGE + count;
    let sorted = |mut pages: Vec<u64>| {
        pages.sort_unstable();
        pages
    };
    assert_eq!(request(&mut front_end, IN, 0, data, 512), 0);
    front_end.log_to(&log, LOG_START);
    take_dirty(&log);
    assert_eq!(request(&mut front_end, IN, 0, data, 8 * 4096), 0);
    assert_eq!(take_dirty(&log), sorted(pages(data, 9).chain([status]).chain(used.clone()).collect()), "a read");
    assert_eq!(request(&mut front_end, OUT, 0, data, 8 * 4096), 0);
    assert_eq!(take_dirty(&log), sorted([&[status], &used[..]].concat()), "a write");
    assert_eq!(request(&mut front_end, GET_ID, 0, data, 20), 0);
    assert_eq!(take_dirty(&log), sorted([&[data / PAGE, status], &used[..]].concat()), "an identity");
    assert_eq!(request(&mut front_end, IN, u64::MAX, data, 512), 1);
    assert_eq!(take_dirty(&log), sorted([&[status], &used[..]].concat()), "a request that is refused");
    // Two blocks fail for good, and the sectors before them were read.
    server.fault(&["--ops", "read", "--sectors", "16-31"]);
    assert_eq!(request(&mut front_end, IN, 0, data, 8 * 4096), 1);
    assert_eq!(
        take_dirty(&log),
        sorted(pages(data, 9).chain([status]).chain(used.clone()).collect()),
        "a read that fails"
    );
    front_end.log_no_more();
    take_dirty(&log);
    assert_eq!(request(&mut front_end, IN, 512, data, 4096), 0);
    assert_eq!(take_dirty(&log), [] as [u64; 0], "after the end");
    // A front-end that goes takes its log with it.
    front_end.log_to(&log, LOG_START);
    drop(front_end);
    let mut front_end = connect(&server.socket, SETUP);
    take_dirty(&log);
    assert_eq!(request(&mut front_end, IN, 512, data, 4096), 0);
    assert_eq!(take_dirty(&log), [] as [u64; 0], "the next front-end");
}

/// Memory is copied while the device writes to it, page by page as the log says, and once more when the ring has
/// stopped: then the copy has all that the device wrote.
#[test]
fn a_copy_of_memory_by_the_dirty_log_misses_nothing() {
    check_copy(FrontEnd::connect);
    check_copy(FrontEnd::packed);
}

fn check_copy(connect: fn(&Path, Setup) -> FrontEnd) {
    const REQUESTS: u64 = 4000;
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    let mut front_end = connect(&server.socket, SETUP);
    let log = log_file();
    let area = front_end.rings[0].area();
    let data = area + 16 * PAGE;
    for part in 0..16 {
        front_end.rings[0].write(data, &pattern(part * 64, 64, 1));
        assert_eq!(request(&mut front_end, OUT, part * 64, data, 64 * 512), 0);
    }
    front_end.log_to(&log, LOG_START);
    let memory = front_end.memory().clone();
    let mut copy = vec![0; MEMORY_END as usize];
    memory.read_exact_at(&mut copy, 0).unwrap();
    let copy_dirty = |copy: &mut Vec<u8>| {
        for page in take_dirty_atomically(&log) {
            let at = (page * PAGE) as usize;
            memory.read_exact_at(&mut copy[at..at + PAGE as usize], page * PAGE).unwrap();
        }
    };
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                copy_dirty(&mut copy);
            }
        });
        let mut random = Random(7);
        for _ in 0..REQUESTS {
            let (sector, to) = (random.below(16 * 64 - 32), data + random.below(64) * 512);
            assert_eq!(request(&mut front_end, IN, sector, to, 32 * 512), 0);
        }
        over.store(true, Ordering::Release);
    });
    front_end.stop(0);
    copy_dirty(&mut copy);
    let mut now = vec![0; MEMORY_END as usize];
    memory.read_exact_at(&mut now, 0).unwrap();
    let rings = front_end.rings[0].device_pages().into_iter().map(|page| ("ring", page * PAGE, PAGE));
    for (what, start, len) in rings.chain([("data", data, 128 * 512), ("status", area + 2 * PAGE, PAGE)]) {
        let range = start as usize..(start + len) as usize;
        assert!(copy[range.clone()] == now[range], "the copy of the {what} is old");
    }
}

/// As [`take_dirty`], while the device marks pages: a bit that is cleared was seen.
fn take_dirty_atomically(log: &File) -> Vec<u64> {
    let file = FileOffset::new(log.try_clone().unwrap(), 0);
    let map: MmapRegion = MmapRegion::from_file(file, (LOG_START + LOG_BYTES) as usize).unwrap();
    let mut pages = Vec::new();
    for byte in 0..LOG_BYTES {
        let bits = map.get_atomic_ref::<AtomicU8>((LOG_START + byte) as usize).unwrap();
        let found = bits.swap(0, Ordering::SeqCst);
        pages.extend((0..8).filter(|bit| found >> bit & 1 == 1).map(|bit| byte * 8 + bit));
    }
    pages
}
