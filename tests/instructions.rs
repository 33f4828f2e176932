//! What a plain request costs a worker, in instructions: from the avail ring through chain, request, shard and back
//! to the used ring, with a device that answers at once and moves no data.
//!
//! Instructions are the same on a busy machine, so that a regression shows where no time can be measured. The test
//! runs itself under callgrind, with few requests and with many; the difference is what requests cost.
//! `ci/instructions` has the figures to compare with. With another compiler than the one named there they say
//! nothing, and only cases of one run are compared with each other.

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use vhost_remap::device::{Completion, Device, Event, Op, Reactor, Tag, Wait};
use vhost_remap::engine::shard::Shard;
use vhost_remap::engine::view::{Geometry, Mode, PrimaryState, Progress, View, Written};
use vhost_remap::runtime::eventlog::EventLog;
use vhost_remap::runtime::mailbox::mailbox;
use vhost_remap::runtime::worker::{Clock, DiskInfo, WorkerPort};
use vhost_remap::units::{Block, SECTORS_PER_BLOCK, Slot, Time};
use vhost_remap::vhost::device::BlkDevice;
use vhost_remap::vhost::memory::MemoryMap;
use vhost_remap::vhost::ring::{RingAddresses, RingFormat};
use vhost_remap::vhost::status::WorkerStatus;
use vhost_remap::vhost::worker::{DataPlane, QueueKick, StartQueue};
use vhost_remap::volume::map::{BlockState, Map};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Tells the test that it runs under callgrind: which case, and how many requests.
const DRIVE: &str = "VHOST_REMAP_DRIVE";
const FEW: u64 = 2_000;
const MANY: u64 = 12_000;

/// By how much a figure may exceed the committed one, or fall below it: releases of the C library and allocators
/// differ by less.
const TOLERANCE_PERCENT: f64 = 3.0;
/// By how much a case may exceed the one it is compared with.
const EXTRA_PERCENT: f64 = 1.0;

const NAMES: [&str; 8] = [
    "read passthrough",
    "read empty",
    "read elsewhere",
    "read between",
    "write passthrough",
    "write empty",
    "write elsewhere",
    "write between",
];
/// Cases, and those they may exceed by no more than [`EXTRA_PERCENT`].
const PAIRS: [(&str, &str); 4] = [
    ("read empty", "read passthrough"),
    ("write empty", "write passthrough"),
    ("read elsewhere", "read empty"),
    ("write elsewhere", "write empty"),
];

/// Remaps in the cases that have some.
const REMAPS: u64 = 16_384;
/// 1 GiB.
const BLOCKS: u64 = 262_144;
/// Requests in the ring at a time.
const BATCH: u16 = 32;
/// Three descriptors each.
const QUEUE_SIZE: u16 = 128;

const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADERS: u64 = 0x3000;
const STATUSES: u64 = 0x4000;
const DATA: u64 = 0x1_0000;

/// A device that has done everything as soon as it is asked, and nothing in truth.
#[derive(Default)]
struct Idle(Vec<Tag>);

impl Device for Idle {
    unsafe fn submit(&mut self, op: Op) {
        self.0.push(op.tag);
    }

    fn in_flight(&self) -> usize {
        self.0.len()
    }

    fn poll(&mut self, _now: Time, _wait: Wait, events: &mut Vec<Event>) {
        events.extend(self.0.drain(..).map(|tag| Event::Done(Completion { tag, result: Ok(()) })));
    }
}

impl Reactor for Idle {
    fn watch(&mut self, _fd: RawFd, _token: u64) {}

    fn unwatch(&mut self, _token: u64) {}
}

/// The map of a case. Requests go to odd blocks of the first 128 MiB.
fn map_of(case: &str) -> Map {
    let mut map = Map::new(BLOCKS);
    let place: fn(u64) -> u64 = match case.split_once(' ').expect("two words").1 {
        "passthrough" | "empty" => return map,
        // Where no request goes.
        "elsewhere" => |slot| BLOCKS / 2 + slot,
        // Each request has a remapped block on either side.
        "between" => |slot| 2 * slot,
        other => panic!("no case {other:?}"),
    };
    for slot in 0..REMAPS {
        let number = Some(Slot(u32::try_from(slot).expect("small")));
        map.set(Block(place(slot)), BlockState { slot: number, ..BlockState::default() });
    }
    map
}

/// A worker, and the ends of its mailboxes, which nobody uses.
fn worker(case: &str) -> (DataPlane, impl Sized) {
    let capacity = BLOCKS * SECTORS_PER_BLOCK;
    let slots = if case.ends_with("passthrough") { 0 } else { 16_384 };
    let geometry = Geometry { capacity, logical_block: 512, slots_start: 1 << 20, slots };
    let mode = Mode { poisoned: false, primary: PrimaryState::Up, spare_up: true, read_only: false };
    let written = Arc::new(Written::new(capacity));
    let view = Arc::new(View { geometry, map: map_of(case), mode, dense: Arc::default(), written });
    let progress = Progress::new(capacity);
    let capacity = progress.capacity.clone();
    let disk = Arc::new(DiskInfo { capacity, logical_block_size: 512, read_only: false, serial: [0; 20] });
    let device = BlkDevice::new(disk.clone(), 1);
    device.negotiated(device.offered_features());
    let (to_shard, inbox) = mailbox().unwrap();
    let (healer, from_shard) = mailbox().unwrap();
    let port = WorkerPort {
        shard: Shard::new(0, view, progress),
        reactor: Box::new(|| Ok(Box::new(Idle::default()))),
        inbox,
        healer,
        clock: Clock::start(),
        disk,
        log: Arc::new(EventLog::new("a device that does nothing".into(), 0.0)),
        polling: Duration::ZERO,
        counters: Arc::default(),
    };
    let plane = DataPlane::new(port.open().unwrap(), device.settings(), Arc::new(WorkerStatus::new()));
    (plane, (to_shard, from_shard))
}

/// Chains of header, data and status in a ring whose avail entries never change: the driver's side costs nothing.
fn ring(write: bool) -> Arc<GuestMemoryMmap> {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let descriptor = |index: u16, addr: u64, len: u32, flags: u16| {
        let next = if flags & 1 == 0 { 0 } else { index + 1 };
        let word = u128::from(addr) | u128::from(len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
        memory.write_obj(word.to_le_bytes(), GuestAddress(16 * u64::from(index))).unwrap();
    };
    for entry in 0..QUEUE_SIZE {
        let chain = entry % BATCH;
        let (head, at) = (3 * chain, u64::from(chain));
        let sector = (u64::from(chain) * 1021 % REMAPS * 2 + 1) * SECTORS_PER_BLOCK;
        memory.write_obj(u64::from(write).to_le_bytes(), GuestAddress(HEADERS + 16 * at)).unwrap();
        memory.write_obj(sector.to_le_bytes(), GuestAddress(HEADERS + 16 * at + 8)).unwrap();
        descriptor(head, HEADERS + 16 * at, 16, 1);
        descriptor(head + 1, DATA + 4096 * at, 4096, if write { 1 } else { 3 });
        descriptor(head + 2, STATUSES + at, 1, 2);
        memory.write_obj(head.to_le_bytes(), GuestAddress(AVAIL + 4 + 2 * u64::from(entry))).unwrap();
    }
    Arc::new(memory)
}

/// Have a worker serve so many requests.
fn drive(case: &str, requests: u64) {
    let (mut plane, _mailboxes) = worker(case);
    let memory = ring(case.starts_with("write"));
    let (done, _) = channel();
    plane.set_memory(&Arc::new(MemoryMap::of_guest_memory(&memory)), Default::default(), done);
    plane.start(StartQueue {
        index: 0,
        addresses: RingAddresses { descriptors: 0, avail: AVAIL, used: USED, log: None },
        size: QUEUE_SIZE,
        base: 0,
        format: RingFormat::default(),
        inflight: None,
        kick: QueueKick::Caller,
        call: None,
        err: None,
        enabled: true,
    });
    let mut avail = 0_u16;
    for _ in 0..requests.div_ceil(BATCH.into()) {
        memory.write_slice(&[0xff; BATCH as usize], GuestAddress(STATUSES)).unwrap();
        avail = avail.wrapping_add(BATCH);
        memory.write_obj(avail.to_le_bytes(), GuestAddress(AVAIL + 2)).unwrap();
        plane.kick(0);
        // Half of them, then the rest.
        plane.turn(false);
        plane.turn(false);
        let used: [u8; 2] = memory.read_obj(GuestAddress(USED + 2)).unwrap();
        assert_eq!(u16::from_le_bytes(used), avail, "{case}: all are answered in two turns");
        let statuses: [u8; BATCH as usize] = memory.read_obj(GuestAddress(STATUSES)).unwrap();
        assert_eq!(statuses, [0; BATCH as usize], "{case}");
    }
}

/// Instructions of this test when it serves so many requests.
fn counted(case: &str, requests: u64) -> u64 {
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).arg(std::env::current_exe().unwrap());
    command.args(["--exact", "plain_requests_cost_no_more_instructions_than_they_did", "--test-threads=1"]);
    let output = command.env(DRIVE, format!("{case}/{requests}")).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stdout));
    let count = text.lines().find_map(|line| line.split_once("Collected : ")).map(|(_, count)| count.trim());
    count.and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("callgrind says nothing: {text}"))
}

fn per_request(case: &str) -> f64 {
    let more = counted(case, MANY) - counted(case, FEW);
    let requests = MANY.div_ceil(BATCH.into()) - FEW.div_ceil(BATCH.into());
    more as f64 / (requests * u64::from(BATCH)) as f64
}

/// The compiler, and the figure of each case.
fn committed() -> (String, BTreeMap<String, f64>) {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/ci/instructions");
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let mut lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let compiler = lines.next().expect("ci/instructions names a compiler").to_owned();
    let figures = lines.map(|line| {
        let (case, figure) = line.rsplit_once(' ').unwrap_or_else(|| panic!("ci/instructions: {line:?}"));
        (case.to_owned(), figure.parse().unwrap_or_else(|error| panic!("ci/instructions: {line:?}: {error}")))
    });
    (compiler, figures.collect())
}

fn output_of(program: &str) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[test]
fn plain_requests_cost_no_more_instructions_than_they_did() {
    if let Ok(spec) = std::env::var(DRIVE) {
        let (case, requests) = spec.split_once('/').unwrap();
        return drive(case, requests.parse().unwrap());
    }
    if cfg!(debug_assertions) {
        println!("SKIP instructions: not optimised, use --release");
        return;
    }
    if output_of("valgrind").is_none() {
        println!("SKIP instructions: no valgrind");
        return;
    }
    let compiler = output_of("rustc").unwrap_or_default();
    let now: BTreeMap<&str, f64> = NAMES.iter().map(|case| (*case, per_request(case))).collect();
    let lines: Vec<String> = NAMES.iter().map(|case| format!("{case} {:.1}", now[case])).collect();
    println!("instructions for a request:\n{compiler}\n{}", lines.join("\n"));
    for (case, against) in PAIRS {
        let more = (now[case] / now[against] - 1.0) * 100.0;
        assert!(
            more <= EXTRA_PERCENT,
            "{case}: {:.1}, {more:.2} % more than {against}: {:.1}",
            now[case],
            now[against]
        );
    }
    let (known, figures) = committed();
    if known != compiler {
        println!("SKIP instructions: the figures in ci/instructions are of {known}, and this is {compiler}");
        return;
    }
    for case in NAMES {
        let before = figures.get(case).unwrap_or_else(|| panic!("ci/instructions has no {case}"));
        let more = (now[case] / before - 1.0) * 100.0;
        assert!(
            more.abs() <= TOLERANCE_PERCENT,
            "{case}: {:.1} instructions, {before:.1} in ci/instructions: {more:+.1} %, and {TOLERANCE_PERCENT} % are \
             tolerated; if that is meant, put the figures of this run there:\n{compiler}\n{}",
            now[case],
            lines.join("\n")
        );
    }
}
