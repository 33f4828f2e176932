//! One suite for every device: what `Device` and `Reactor` promise, whoever keeps it.
//!
//! Each check runs over each implementation. A device this host cannot offer is skipped with a line
//! `SKIP name: reason`.

use std::io::Write as _;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use tempfile::TempDir;
use vhost_remap::device::buffer::{AlignedBuf, IoSlice, Iovecs};
use vhost_remap::device::fault::{FaultDevice, FaultTable};
use vhost_remap::device::memory::MemoryDisks;
use vhost_remap::device::open::{DeviceSet, Geometry, OpenDevice, OpenError, OpenOptions, create_file, open};
use vhost_remap::device::threads::{THREADS_DEFAULT, ThreadReactor};
use vhost_remap::device::uring::UringReactor;
use vhost_remap::device::{Completion, DeviceIndex, Errno, Event, Op, OpKind, Reactor, Tag, Wait};
use vhost_remap::units::Time;

const PRIMARY: DeviceIndex = DeviceIndex::PRIMARY;
const SIZE: u64 = 24 << 20;
const EIO: Result<(), Errno> = Err(Errno(libc::EIO));
const PATIENCE: Duration = Duration::from_secs(30);

/// A reactor under test, and what it stands on.
struct Subject {
    name: &'static str,
    reactor: Box<dyn Reactor>,
    unit: usize,
    /// Whether discards and zeroing are known to the device.
    geometry: Option<Geometry>,
    started: Instant,
    _ground: Ground,
}

/// Dropped after the reactor.
#[derive(Default)]
struct Ground {
    _dir: Option<TempDir>,
    _loop_device: Option<LoopDevice>,
}

struct LoopDevice(PathBuf);

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

fn skip(name: &str, reason: impl std::fmt::Display) {
    // Past the test harness, which would swallow println! of a passing test.
    let _ = writeln!(std::io::stdout(), "SKIP {name}: {reason}");
}

fn try_open(path: &Path, direct: bool) -> Result<Arc<OpenDevice>, OpenError> {
    let options = OpenOptions { direct, lock_wait: Duration::from_secs(5), ..OpenOptions::default() };
    open(path, &options).map(Arc::new)
}

fn open_quickly(path: &Path, direct: bool) -> Arc<OpenDevice> {
    try_open(path, direct).unwrap()
}

/// The device, unless the file system has no direct I/O.
fn open_or_skip(name: &str, path: &Path, direct: bool) -> Option<Arc<OpenDevice>> {
    match try_open(path, direct) {
        Ok(device) => Some(device),
        Err(error @ OpenError::NoDirect { .. }) => {
            skip(name, error);
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn temp_dir() -> TempDir {
    // Not in /tmp, which may be a tmpfs without direct I/O.
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn file_ground() -> (PathBuf, Ground) {
    let dir = temp_dir();
    let path = dir.path().join("disk");
    create_file(&path, SIZE).unwrap();
    (path, Ground { _dir: Some(dir), _loop_device: None })
}

fn memory_ground() -> Result<(PathBuf, Ground), String> {
    let dir = tempfile::tempdir_in("/dev/shm").map_err(|error| format!("/dev/shm: {error}"))?;
    let path = dir.path().join("disk");
    create_file(&path, SIZE).unwrap();
    match open_quickly(&path, false).geometry.in_memory {
        true => Ok((path, Ground { _dir: Some(dir), _loop_device: None })),
        false => Err("/dev/shm is no tmpfs".to_owned()),
    }
}

fn loop_ground(sector: u32) -> Result<(PathBuf, Ground), String> {
    let (file, mut ground) = file_ground();
    let mut losetup = Command::new("losetup");
    losetup.args(["--find", "--show", "--sector-size", &sector.to_string()]).arg(&file);
    let output = losetup.output().map_err(|error| format!("losetup: {error}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    let path = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
    ground._loop_device = Some(LoopDevice(path.clone()));
    Ok((path, ground))
}

impl Subject {
    fn new(name: &'static str, reactor: Box<dyn Reactor>, geometry: Option<Geometry>, ground: Ground) -> Subject {
        let unit = geometry.as_ref().map_or(512, |geometry| geometry.logical_block as usize);
        Subject { name, reactor, unit, geometry, started: Instant::now(), _ground: ground }
    }

    fn on_uring(name: &'static str, path: &Path, ground: Ground, direct: bool) -> Option<Subject> {
        let device = open_or_skip(name, path, direct)?;
        let geometry = device.geometry.clone();
        // A short queue, so that the suite overflows it.
        match UringReactor::new(&DeviceSet::new(vec![device]), 8) {
            Ok(reactor) => Some(Subject::new(name, Box::new(reactor), Some(geometry), ground)),
            Err(error) => {
                skip(name, error);
                None
            }
        }
    }

    fn on_threads(name: &'static str, path: &Path, ground: Ground, direct: bool) -> Option<Subject> {
        let device = open_or_skip(name, path, direct)?;
        let geometry = device.geometry.clone();
        let reactor = ThreadReactor::new(&DeviceSet::new(vec![device]), THREADS_DEFAULT).unwrap();
        Some(Subject::new(name, Box::new(reactor), Some(geometry), ground))
    }

    fn now(&self) -> Time {
        Time(u64::try_from(self.started.elapsed().as_nanos()).unwrap())
    }

    fn submit(&mut self, tag: u64, kind: OpKind, offset: u64, len: u64, data: IoSlice) {
        let op = Op { tag: Tag(tag), device: PRIMARY, kind, offset, len, data };
        // SAFETY: every caller collects the completion before its buffers go.
        unsafe { self.reactor.submit(op) };
    }

    /// Wait until nothing is in flight.
    fn finish(&mut self) -> Vec<Completion> {
        let mut completions = Vec::new();
        let started = Instant::now();
        while self.reactor.in_flight() > 0 {
            assert!(started.elapsed() < PATIENCE, "{}: operations are stuck", self.name);
            for event in self.poll(Duration::from_secs(1)) {
                match event {
                    Event::Done(completion) => completions.push(completion),
                    Event::Ready(token) => panic!("{}: nobody watches {token}", self.name),
                }
            }
        }
        completions
    }

    fn poll(&mut self, wait: Duration) -> Vec<Event> {
        let now = self.now();
        let mut events = Vec::new();
        let until = now.plus_ns(u64::try_from(wait.as_nanos()).unwrap());
        self.reactor.poll(now, if wait.is_zero() { Wait::No } else { Wait::Until(until) }, &mut events);
        events
    }

    fn run(&mut self, kind: OpKind, offset: u64, len: u64, data: IoSlice) -> Result<(), Errno> {
        self.submit(1, kind, offset, len, data);
        assert_eq!(self.reactor.in_flight(), 1, "{}", self.name);
        match self.finish()[..] {
            [Completion { tag: Tag(1), result }] => result,
            ref other => panic!("{}: {other:?}", self.name),
        }
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        let buffer = AlignedBuf::copy_of(bytes);
        self.run(OpKind::Write, offset, bytes.len() as u64, buffer.as_io())
    }

    fn read(&mut self, offset: u64, len: usize) -> Result<AlignedBuf, Errno> {
        let buffer = AlignedBuf::copy_of(&vec![0x5a; len]);
        self.run(OpKind::Read, offset, len as u64, buffer.as_io())?;
        Ok(buffer)
    }
}

/// Run `check` over every device there is.
fn on_every_device(check: impl Fn(&mut Subject)) {
    let run = |mut subject: Subject| {
        println!("on {}", subject.name);
        check(&mut subject);
        assert_eq!(subject.reactor.in_flight(), 0, "{}", subject.name);
    };
    let (path, ground) = file_ground();
    Subject::on_uring("uring on a file", &path, ground, true).map(run);
    let (path, ground) = file_ground();
    Subject::on_uring("uring on a cached file", &path, ground, false).map(run);
    let (path, ground) = file_ground();
    Subject::on_threads("threads on a file", &path, ground, true).map(run);
    let (path, ground) = file_ground();
    Subject::on_threads("threads on a cached file", &path, ground, false).map(run);
    match memory_ground() {
        Ok((path, ground)) => Subject::on_uring("uring on a file in memory", &path, ground, false).map(run),
        Err(reason) => {
            skip("uring on a file in memory", reason);
            None
        }
    };
    let memory = MemoryDisks::new(&[SIZE]).queue();
    run(Subject::new("memory", Box::new(memory), None, Ground::default()));
    let wrapped = FaultDevice::new(MemoryDisks::new(&[SIZE]).queue(), Arc::new(FaultTable::new()));
    run(Subject::new("memory behind faults", Box::new(wrapped), None, Ground::default()));
    let (path, ground) = file_ground();
    if let Some(subject) = Subject::on_uring("uring behind faults", &path, ground, true) {
        let Subject { reactor, geometry, _ground, .. } = subject;
        let wrapped = FaultDevice::new(reactor, Arc::new(FaultTable::new()));
        run(Subject::new("uring behind faults", Box::new(wrapped), geometry, _ground));
    }
    for (sector, by_uring, by_threads) in [
        (512, "uring on a block device", "threads on a block device"),
        (4096, "uring on a 4Kn block device", "threads on a 4Kn block device"),
    ] {
        match loop_ground(sector) {
            Ok((path, ground)) => Subject::on_uring(by_uring, &path, ground, true).map(run),
            Err(reason) => {
                skip(by_uring, reason);
                continue;
            }
        };
        match loop_ground(sector) {
            Ok((path, ground)) => Subject::on_threads(by_threads, &path, ground, true).map(run),
            Err(reason) => {
                skip(by_threads, reason);
                continue;
            }
        };
    }
}

/// Bytes that differ from place to place and between seeds.
fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = vec![0; len];
    for piece in bytes.chunks_mut(8) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        piece.copy_from_slice(&state.to_le_bytes()[..piece.len()]);
    }
    bytes
}

/// Memory cut into pieces of the given lengths, each `skew` bytes beyond an aligned address.
struct Pieces {
    buffers: Vec<AlignedBuf>,
    list: Iovecs,
}

impl Pieces {
    fn new(lengths: &[usize], skew: usize) -> Pieces {
        let mut buffers: Vec<_> = lengths.iter().map(|len| AlignedBuf::zeroed(len + skew)).collect();
        let mut list = Iovecs::new();
        for (buffer, len) in buffers.iter_mut().zip(lengths) {
            // SAFETY: the buffers live as long as the list, in one struct, and nobody borrows from them
            // while an operation runs.
            unsafe { list.push(buffer.as_mut_ptr().wrapping_add(skew), *len) };
        }
        Pieces { buffers, list }
    }

    fn fill(&mut self, bytes: &[u8]) {
        self.list.copy_from(0, bytes);
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.list.len()];
        self.list.copy_to(0, &mut bytes);
        assert!(!self.buffers.is_empty());
        bytes
    }
}

fn check_round_trip(subject: &mut Subject, offset: u64, lengths: &[usize], skew: usize) {
    let what =
        format!("{}: {} bytes in {} pieces, skew {skew}", subject.name, lengths.iter().sum::<usize>(), lengths.len());
    let (mut written, read) = (Pieces::new(lengths, skew), Pieces::new(lengths, skew));
    let bytes = pattern(written.list.len(), offset + lengths.len() as u64 + skew as u64);
    written.fill(&bytes);
    let len = bytes.len() as u64;
    // The neighbours must stay as they are.
    let unit = subject.unit;
    let before = subject.read(offset - unit as u64, unit).unwrap().to_vec();
    let after = subject.read(offset + len, unit).unwrap().to_vec();
    assert_eq!(subject.run(OpKind::Write, offset, len, written.list.as_io()), Ok(()), "{what}");
    assert_eq!(subject.run(OpKind::Read, offset, len, read.list.as_io()), Ok(()), "{what}");
    assert!(read.bytes() == bytes, "{what}: scattered read differs");
    assert!(subject.read(offset, bytes.len()).unwrap()[..] == bytes, "{what}: plain read differs");
    assert_eq!(subject.read(offset - unit as u64, unit).unwrap()[..], before, "{what}");
    assert_eq!(subject.read(offset + len, unit).unwrap()[..], after, "{what}");
}

#[test]
fn bytes_come_back_from_every_shape_of_memory() {
    on_every_device(|subject| {
        let unit = subject.unit;
        let shapes: Vec<Vec<usize>> = vec![
            vec![unit],
            vec![3 * unit],
            vec![unit, unit],
            vec![4096, unit, 8192],
            vec![1 << 20],
            vec![(1 << 20) + unit],
            vec![unit; 1024],
            vec![unit; 1025],
            vec![unit; 2500],
            vec![5 << 20],
            // No piece is a whole logical block.
            vec![1; unit],
            vec![unit - 3, 3, 100, unit - 100],
            [vec![7; 2000], vec![16384 - 14000]].concat(),
        ];
        for lengths in &shapes {
            for skew in [0, 1, 4, 256, 512, 2048] {
                check_round_trip(subject, 8192, lengths, skew);
            }
        }
        check_round_trip(subject, 1 << 20, &[300_000 / unit * unit, 7, unit * 600 - 7], 3);
    });
}

#[test]
fn nothing_lies_beyond_the_end() {
    on_every_device(|subject| {
        let unit = subject.unit as u64;
        assert!(subject.read(SIZE - unit, subject.unit).is_ok(), "{}", subject.name);
        for (offset, len) in
            [(SIZE - unit, 2 * unit), (SIZE, unit), (SIZE + (1 << 30), unit), (0_u64.wrapping_sub(unit), unit)]
        {
            let buffer = AlignedBuf::zeroed(usize::try_from(len).unwrap());
            let read = subject.run(OpKind::Read, offset, len, buffer.as_io());
            assert_eq!(read, EIO, "{}: read of {len} at {offset}", subject.name);
            let write = subject.run(OpKind::Write, offset, len, buffer.as_io());
            assert_eq!(write, Err(Errno(libc::ENOSPC)), "{}: write of {len} at {offset}", subject.name);
            for kind in [OpKind::Discard, OpKind::WriteZeroes { unmap: true }] {
                assert!(subject.run(kind, offset, len, IoSlice::EMPTY).is_err(), "{}", subject.name);
            }
        }
        assert_eq!(subject.run(OpKind::Identify, 0, 0, IoSlice::EMPTY), Ok(()), "{}: it has not grown", subject.name);
    });
}

#[test]
fn parts_of_logical_blocks_are_refused() {
    on_every_device(|subject| {
        let unit = subject.unit as u64;
        for (offset, len) in [(1, unit), (unit / 2, unit), (0, unit / 2), (0, unit + 1)] {
            let buffer = AlignedBuf::zeroed(usize::try_from(len).unwrap());
            for kind in [OpKind::Read, OpKind::Write] {
                let result = subject.run(kind, offset, len, buffer.as_io());
                assert_eq!(result, Err(Errno(libc::EINVAL)), "{}: {kind:?} of {len} at {offset}", subject.name);
            }
        }
    });
}

#[test]
fn commands_without_bytes_succeed() {
    on_every_device(|subject| {
        for kind in [OpKind::Flush, OpKind::Identify, OpKind::Read, OpKind::Write] {
            assert_eq!(subject.run(kind, 0, 0, IoSlice::EMPTY), Ok(()), "{}: {kind:?}", subject.name);
        }
        subject.write(0, &pattern(8192, 1)).unwrap();
        assert_eq!(subject.run(OpKind::Flush, 0, 0, IoSlice::EMPTY), Ok(()), "{}", subject.name);
    });
}

#[test]
fn an_absent_device_is_no_device() {
    on_every_device(|subject| {
        let op =
            Op { tag: Tag(1), device: DeviceIndex(7), kind: OpKind::Flush, offset: 0, len: 0, data: IoSlice::EMPTY };
        // SAFETY: no memory is named.
        unsafe { subject.reactor.submit(op) };
        let result = subject.finish()[0].result;
        assert_eq!(result, Err(Errno(libc::ENODEV)), "{}", subject.name);
    });
}

#[test]
fn zeroed_ranges_read_as_zeros_and_their_neighbours_do_not_change() {
    on_every_device(|subject| {
        let unit = subject.unit;
        for unmap in [false, true] {
            for (offset, len) in [(unit, unit), (8192, 4096), (4096 + unit, (3 << 20) + unit)] {
                let bytes = pattern(5 << 20, offset as u64);
                subject.write(0, &bytes).unwrap();
                let zeroed = subject.run(OpKind::WriteZeroes { unmap }, offset as u64, len as u64, IoSlice::EMPTY);
                assert_eq!(zeroed, Ok(()), "{}", subject.name);
                let mut expected = bytes;
                expected[offset..offset + len].fill(0);
                let read = subject.read(0, expected.len()).unwrap();
                assert!(read[..] == expected, "{}: unmap {unmap}, {len} bytes at {offset}", subject.name);
            }
        }
    });
}

#[test]
fn a_discarded_range_reads_as_old_or_zero() {
    on_every_device(|subject| {
        let bytes = pattern(1 << 20, 3);
        subject.write(0, &bytes).unwrap();
        let (offset, len) = (64 << 10, 128 << 10);
        match subject.run(OpKind::Discard, offset, len, IoSlice::EMPTY) {
            Ok(()) => {}
            Err(Errno(libc::EOPNOTSUPP)) => {
                assert!(subject.geometry.is_some(), "disks in memory know discards");
                skip("discard", format!("{} has none", subject.name));
            }
            other => panic!("{}: {other:?}", subject.name),
        }
        let read = subject.read(0, bytes.len()).unwrap();
        let range = usize::try_from(offset).unwrap()..usize::try_from(offset + len).unwrap();
        assert!(read[..range.start] == bytes[..range.start] && read[range.end..] == bytes[range.end..]);
        for (new, old) in read[range.clone()].chunks(512).zip(bytes[range].chunks(512)) {
            assert!(new == old || new == [0; 512], "{}", subject.name);
        }
    });
}

#[test]
fn each_of_many_operations_ends_once() {
    const OPS: usize = 600;
    on_every_device(|subject| {
        let unit = subject.unit;
        // Slots of one size; every third buffer needs bouncing, some more of it than there is at once.
        let slot = 32 << 10;
        let lengths = |n: usize| match n % 3 {
            0 => vec![slot],
            1 => vec![unit, slot - unit],
            _ => vec![5, slot - 5],
        };
        let mut written: Vec<_> = (0..OPS).map(|n| Pieces::new(&lengths(n), n % 5)).collect();
        for (n, pieces) in written.iter_mut().enumerate() {
            pieces.fill(&pattern(slot, n as u64));
        }
        let mut seen = vec![0; OPS];
        for (n, pieces) in written.iter().enumerate() {
            subject.submit(n as u64, OpKind::Write, (n * slot) as u64, slot as u64, pieces.list.as_io());
            if n % 100 == 0 {
                subject.submit(OPS as u64, OpKind::Flush, 0, 0, IoSlice::EMPTY);
                seen.push(0);
            }
            if n % 50 == 0 {
                tally(&mut seen, subject.poll(Duration::ZERO));
            }
        }
        tally(&mut seen, subject.finish().into_iter().map(Event::Done).collect());
        let flushes = seen.len() - OPS;
        assert!(seen[..OPS].iter().all(|count| *count == 1), "{}: {seen:?}", subject.name);
        assert_eq!(seen[OPS], flushes, "{}", subject.name);
        let read: Vec<_> = (0..OPS).map(|n| Pieces::new(&lengths(n + 1), n % 3)).collect();
        for (n, pieces) in read.iter().enumerate() {
            subject.submit(n as u64, OpKind::Read, (n * slot) as u64, slot as u64, pieces.list.as_io());
        }
        assert_eq!(subject.reactor.in_flight(), OPS, "{}", subject.name);
        assert_eq!(subject.finish().len(), OPS, "{}", subject.name);
        for (n, (read, written)) in read.iter().zip(&written).enumerate() {
            assert!(read.bytes() == written.bytes(), "{}: operation {n}", subject.name);
        }
    });
}

fn tally(seen: &mut [usize], events: Vec<Event>) {
    for event in events {
        let Event::Done(Completion { tag, result }) = event else { panic!("nothing is watched") };
        assert_eq!(result, Ok(()), "{tag:?}");
        seen[usize::try_from(tag.0).unwrap()] += 1;
    }
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn ring_bell(fd: &OwnedFd) {
    rustix::io::write(fd, &1_u64.to_ne_bytes()).unwrap();
}

/// Poll until `token` is reported, and nothing else.
fn expect_ready(subject: &mut Subject, token: u64) {
    let started = Instant::now();
    loop {
        let events = subject.poll(Duration::from_secs(1));
        if !events.is_empty() {
            assert!(events.iter().all(|event| *event == Event::Ready(token)), "{}: {events:?}", subject.name);
            return;
        }
        assert!(started.elapsed() < PATIENCE, "{}: no wake-up", subject.name);
    }
}

#[test]
fn a_watched_eventfd_wakes_without_being_read() {
    on_every_device(|subject| {
        let (a, b) = (event(), event());
        ring_bell(&a);
        subject.reactor.watch(a.as_raw_fd(), 10);
        subject.reactor.watch(b.as_raw_fd(), 20);
        expect_ready(subject, 10);
        for _ in 0..100 {
            ring_bell(&b);
            expect_ready(subject, 20);
            ring_bell(&a);
            expect_ready(subject, 10);
        }
        assert_eq!(subject.poll(Duration::from_millis(20)), [], "{}: an unread eventfd is no news", subject.name);
        subject.reactor.unwatch(10);
        ring_bell(&a);
        assert_eq!(subject.poll(Duration::from_millis(20)), [], "{}", subject.name);
        // The place of the first is taken again, by another descriptor.
        let c = event();
        subject.reactor.watch(c.as_raw_fd(), 30);
        assert_eq!(subject.poll(Duration::from_millis(20)), [], "{}", subject.name);
        ring_bell(&c);
        expect_ready(subject, 30);
        subject.reactor.unwatch(20);
        subject.reactor.unwatch(30);
        assert_eq!(subject.poll(Duration::ZERO), [], "{}", subject.name);
    });
}

#[test]
fn another_thread_ends_a_wait_without_end() {
    on_every_device(|subject| {
        let bell = Arc::new(event());
        subject.reactor.watch(bell.as_raw_fd(), 1);
        let ringer = {
            let bell = Arc::clone(&bell);
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(30));
                ring_bell(&bell);
            })
        };
        let mut events = Vec::new();
        while events.is_empty() {
            subject.reactor.poll(subject.now(), Wait::Forever, &mut events);
        }
        assert_eq!(events, [Event::Ready(1)], "{}", subject.name);
        ringer.join().unwrap();
        subject.reactor.unwatch(1);
    });
}

#[test]
fn a_wait_ends_in_time() {
    on_every_device(|subject| {
        let bell = event();
        subject.reactor.watch(bell.as_raw_fd(), 1);
        assert_eq!(subject.poll(Duration::ZERO), [], "{}", subject.name);
        let started = Instant::now();
        while started.elapsed() < Duration::from_millis(40) {
            assert_eq!(subject.poll(Duration::from_millis(40)), [], "{}", subject.name);
        }
        assert!(started.elapsed() < Duration::from_secs(5), "{}", subject.name);
        let past = Time(subject.now().0 - 1);
        let mut events = Vec::new();
        subject.reactor.poll(subject.now(), Wait::Until(past), &mut events);
        assert_eq!(events, [], "{}", subject.name);
        subject.reactor.unwatch(1);
    });
}

#[test]
fn watches_and_operations_go_together() {
    on_every_device(|subject| {
        let bell = event();
        subject.reactor.watch(bell.as_raw_fd(), 5);
        let buffer = AlignedBuf::zeroed(4096);
        for round in 0..50 {
            ring_bell(&bell);
            subject.submit(round, OpKind::Read, 4096 * round, 4096, buffer.as_io());
            let (mut done, mut ready) = (false, false);
            let started = Instant::now();
            while !(done && ready) {
                assert!(started.elapsed() < PATIENCE, "{}: done {done}, ready {ready}", subject.name);
                for event in subject.poll(Duration::from_secs(1)) {
                    match event {
                        Event::Done(completion) => done = completion == Completion { tag: Tag(round), result: Ok(()) },
                        Event::Ready(token) => ready = token == 5,
                    }
                }
            }
        }
        subject.reactor.unwatch(5);
    });
}

#[test]
fn a_dropped_reactor_has_let_go_of_memory_and_locks() {
    let (path, _ground) = file_ground();
    for round in 0..4 {
        let Some(device) = open_or_skip("a dropped reactor", &path, true) else { return };
        let set = DeviceSet::new(vec![device]);
        let mut reactor: Box<dyn Reactor> = if round % 2 == 0 {
            Box::new(ThreadReactor::new(&set, 2).unwrap())
        } else {
            match UringReactor::new(&set, 4) {
                Ok(reactor) => Box::new(reactor),
                Err(error) => return skip("uring on a file", error),
            }
        };
        drop(set);
        let buffer = AlignedBuf::copy_of(&[u8::try_from(round).unwrap() + 1; 65536]);
        for tag in 0..64 {
            let op = Op {
                tag: Tag(tag),
                device: PRIMARY,
                kind: OpKind::Write,
                offset: 65536 * tag,
                len: 65536,
                data: buffer.as_io(),
            };
            // SAFETY: the reactor is dropped, which waits for its operations, before the buffer.
            unsafe { reactor.submit(op) };
        }
        drop(reactor);
        let content = std::fs::read(&path).unwrap();
        assert!(content[..64 * 65536].iter().all(|byte| i32::from(*byte) == round + 1), "round {round}");
    }
}

#[test]
fn a_file_that_shrank_gives_errors_and_not_zeros() {
    let check = |subject: Option<Subject>, path: &Path| {
        let Some(mut subject) = subject else { return };
        subject.write(0, &pattern(1 << 20, 1)).unwrap();
        std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(512 << 10).unwrap();
        assert!(subject.read(0, 512 << 10).is_ok());
        assert_eq!(subject.read((512 << 10) - 4096, 8192).unwrap_err(), Errno(libc::EIO), "{}", subject.name);
        assert_eq!(subject.read(768 << 10, 4096).unwrap_err(), Errno(libc::EIO), "{}", subject.name);
        let misaligned = Pieces::new(&[8192], 1);
        let bounced = subject.run(OpKind::Read, (512 << 10) - 4096, 8192, misaligned.list.as_io());
        assert_eq!(bounced, EIO, "{}", subject.name);
        let identity = subject.run(OpKind::Identify, 0, 0, IoSlice::EMPTY);
        assert_eq!(identity, Err(Errno(libc::ENXIO)), "{}", subject.name);
    };
    let (path, ground) = file_ground();
    check(Subject::on_uring("uring on a file", &path, ground, true), &path);
    let (path, ground) = file_ground();
    check(Subject::on_threads("threads on a file", &path, ground, true), &path);
}

#[test]
fn qemu_and_we_keep_each_other_out() {
    let (path, _ground) = file_ground();
    let copy = path.with_extension("copy");
    let read = |forced: &[&str]| {
        let mut convert = Command::new("qemu-img");
        convert.arg("convert").args(forced).args(["-f", "raw", "-O", "raw"]).arg(&path).arg(&copy).output()
    };
    let write = || Command::new("qemu-img").args(["resize", "-f", "raw"]).arg(&path).arg(SIZE.to_string()).output();
    let check = |output: std::io::Result<Output>, allowed: bool, what: &str| {
        let output = output.unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.success(), allowed, "{what}: {message}");
        assert!(allowed || message.contains("lock"), "{what}: {message}");
    };
    if let Err(error) = write() {
        return skip("qemu-img", error);
    }
    check(write(), true, "write to a free image");
    // The locks are the same without direct I/O.
    let device = open_quickly(&path, false);
    check(read(&[]), false, "read what is written to");
    check(read(&["-U"]), true, "a forced look");
    check(write(), false, "write to what is written to");
    drop(device);
    check(read(&[]), true, "read a free image");
    let reader = open(&path, &OpenOptions { read_only: true, direct: false, ..OpenOptions::default() }).unwrap();
    check(read(&[]), true, "readers share");
    check(write(), false, "write to what is read");
    drop(reader);
}

#[test]
fn qemu_using_an_image_keeps_us_out() {
    let (path, _ground) = file_ground();
    let blockdev = format!("driver=file,node-name=disk,filename={}", path.display());
    let export = "type=nbd,id=export,node-name=disk,writable=on,name=disk";
    let socket = path.with_extension("sock");
    let server = format!("addr.type=unix,addr.path={}", socket.display());
    let daemon = Command::new("qemu-storage-daemon")
        .args(["--blockdev", &blockdev, "--nbd-server", &server, "--export", export])
        .spawn();
    let mut daemon = match daemon {
        Ok(daemon) => daemon,
        Err(error) => return skip("qemu-storage-daemon", error),
    };
    let started = Instant::now();
    while !socket.exists() && started.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_millis(200));
    let options = OpenOptions { direct: false, lock_wait: Duration::from_millis(200), ..OpenOptions::default() };
    let refused = open(&path, &options).map(drop).unwrap_err();
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    assert!(refused.to_string().contains("still in use by another process"), "{refused}");
    open(&path, &options).unwrap();
}
