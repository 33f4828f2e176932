use super::super::buffer::AlignedBuf;
use super::super::memory::{MemoryDevice, MemoryDisks};
use super::*;

const PRIMARY: DeviceIndex = DeviceIndex::PRIMARY;
const EIO: Result<(), Errno> = Err(Errno(libc::EIO));

struct Bench {
    disks: MemoryDisks,
    table: Arc<FaultTable>,
    device: FaultDevice<MemoryDevice>,
}

impl Bench {
    fn new(rules: Vec<FaultRule>) -> Bench {
        let disks = MemoryDisks::new(&[1 << 20, 1 << 20]);
        let table = Arc::new(FaultTable::new());
        for rule in rules {
            table.add(rule).unwrap();
        }
        let device = FaultDevice::new(disks.queue(), Arc::clone(&table));
        Bench { disks, table, device }
    }

    fn submit(&mut self, kind: OpKind, device: DeviceIndex, start: u64, data: &AlignedBuf) {
        let moves = matches!(kind, OpKind::Read | OpKind::Write);
        let data_len = data.len() as u64;
        let data = if moves { data.as_io() } else { IoSlice::EMPTY };
        let op = Op { tag: Tag(1), device, kind, offset: start * SECTOR_SIZE, len: data_len, data };
        // SAFETY: the buffers of these tests live until the completion was collected.
        unsafe { self.device.submit(op) };
    }

    /// One operation from submission to its end; rules without delay only.
    fn run(&mut self, kind: OpKind, start: u64, count: u64) -> Result<(), Errno> {
        self.run_on(PRIMARY, kind, start, count)
    }

    fn run_on(&mut self, device: DeviceIndex, kind: OpKind, start: u64, count: u64) -> Result<(), Errno> {
        let data = AlignedBuf::copy_of(&vec![7; usize::try_from(count * SECTOR_SIZE).unwrap()]);
        self.submit(kind, device, start, &data);
        assert_eq!(self.device.in_flight(), 1);
        let mut events = Vec::new();
        self.device.poll(Time(0), Wait::No, &mut events);
        assert_eq!(self.device.in_flight(), 0);
        match events[..] {
            [Event::Done(Completion { tag: Tag(1), result })] => result,
            _ => panic!("{events:?}"),
        }
    }

    fn written(&self, sectors: std::ops::Range<u64>) -> Vec<bool> {
        let written = |sector| {
            let mut byte = [0];
            self.disks.peek(PRIMARY, sector * SECTOR_SIZE, &mut byte);
            byte == [7]
        };
        sectors.map(written).collect()
    }
}

fn sectors(start: u64, count: u64) -> Option<SectorRange> {
    Some(SectorRange { start: Sector(start), count })
}

fn rule(ops: &[FaultOp]) -> FaultRule {
    FaultRule::new(PRIMARY, ops)
}

#[test]
fn a_rule_hits_its_operations_on_its_device_within_its_range() {
    let mut bench = Bench::new(vec![FaultRule { range: sectors(8, 4), ..rule(&[FaultOp::Read, FaultOp::Discard]) }]);
    assert_eq!(bench.run(OpKind::Read, 0, 8), Ok(()));
    assert_eq!(bench.run(OpKind::Read, 12, 8), Ok(()));
    assert_eq!(bench.run(OpKind::Read, 11, 8), EIO, "an overlap of one sector fails the whole");
    assert_eq!(bench.run(OpKind::Discard, 0, 16), EIO);
    assert_eq!(bench.run(OpKind::Write, 8, 1), Ok(()));
    assert_eq!(bench.run(OpKind::WriteZeroes { unmap: false }, 8, 1), Ok(()));
    assert_eq!(bench.run_on(DeviceIndex::SPARE, OpKind::Read, 8, 1), Ok(()));
    assert_eq!(bench.table.list()[0].hits, 2);
    assert_eq!(bench.table.clear(Some(1)), 1);
    assert_eq!(bench.run(OpKind::Read, 8, 1), Ok(()));
}

#[test]
fn operations_without_sectors_need_no_range() {
    let mut bench = Bench::new(vec![FaultRule {
        range: sectors(8, 4),
        errno: Some(Errno(libc::ENODEV)),
        ..rule(&[FaultOp::Flush, FaultOp::Identify])
    }]);
    for kind in [OpKind::Flush, OpKind::Identify] {
        assert_eq!(bench.run(kind, 0, 0), Err(Errno(libc::ENODEV)));
    }
    assert_eq!(bench.run(OpKind::Read, 8, 1), Ok(()));
}

#[test]
fn a_counted_rule_strikes_that_often_and_is_gone() {
    let mut bench = Bench::new(vec![FaultRule { count: Some(2), ..rule(&[FaultOp::Write]) }]);
    let results: Vec<_> = (0..4).map(|_| bench.run(OpKind::Write, 0, 1)).collect();
    assert_eq!(results, [EIO, EIO, Ok(()), Ok(())]);
    assert!(bench.table.list().is_empty());
}

#[test]
fn a_pending_sector_reads_again_once_it_was_written() {
    let until = FaultRule { range: sectors(8, 3), until_rewritten: true, ..rule(&[FaultOp::Read]) };
    let mut bench = Bench::new(vec![until]);
    assert_eq!(bench.run(OpKind::Read, 8, 1), EIO);
    assert_eq!(bench.run(OpKind::Write, 9, 1), Ok(()));
    assert_eq!(bench.run(OpKind::Read, 9, 1), Ok(()));
    assert_eq!(bench.run(OpKind::Read, 8, 2), EIO, "its neighbour was not written");
    assert_eq!(bench.run(OpKind::WriteZeroes { unmap: true }, 0, 9), Ok(()));
    assert_eq!(bench.run(OpKind::Read, 8, 2), Ok(()));
    assert_eq!(bench.run(OpKind::Read, 10, 1), EIO);
    assert_eq!(bench.run(OpKind::Write, 10, 6), Ok(()));
    assert!(bench.table.list().is_empty(), "nothing is left of it");
}

#[test]
fn a_write_that_fails_rewrites_nothing() {
    let until = FaultRule { range: sectors(8, 1), until_rewritten: true, ..rule(&[FaultOp::Read]) };
    let mut bench = Bench::new(vec![until, FaultRule { count: Some(1), ..rule(&[FaultOp::Write]) }]);
    assert_eq!(bench.run(OpKind::Write, 8, 1), EIO);
    assert_eq!(bench.run(OpKind::Read, 8, 1), EIO);
    assert_eq!(bench.written(8..9), [false], "a failing write does not reach the device");
}

#[test]
fn a_partial_write_lands_around_the_bad_sectors() {
    let bad = FaultRule { range: sectors(2, 1), partial: true, ..rule(&[FaultOp::Write]) };
    let mut bench = Bench::new(vec![bad.clone()]);
    assert_eq!(bench.run(OpKind::Write, 0, 5), EIO);
    assert_eq!(bench.written(0..6), [true, true, false, true, true, false]);
    assert_eq!(bench.run(OpKind::WriteZeroes { unmap: false }, 1, 2), EIO);
    assert_eq!(bench.written(0..6), [true, false, false, true, true, false]);
    assert_eq!(bench.run(OpKind::Write, 2, 1), EIO, "nothing lies around it");
}

#[test]
fn a_delay_holds_the_operation_and_shortens_the_wait() {
    let slow = FaultRule { errno: None, delay_ms: 5, ..rule(&[FaultOp::Read]) };
    let failing = FaultRule { delay_ms: 2, ..rule(&[FaultOp::Read]) };
    let mut bench = Bench::new(vec![slow, failing]);
    let data = AlignedBuf::zeroed(512);
    bench.submit(OpKind::Read, PRIMARY, 0, &data);
    let start = Time(1_000_000);
    let mut events = Vec::new();
    let due = start.plus_ns(7 * NS_PER_MS);
    assert_eq!(bench.device.release_due(start, Wait::Forever), Wait::Until(due), "delays add up");
    bench.device.poll(start, Wait::No, &mut events);
    bench.device.poll(Time(due.0 - 1), Wait::No, &mut events);
    assert!(events.is_empty() && bench.device.in_flight() == 1);
    bench.device.poll(due, Wait::No, &mut events);
    assert_eq!(events, [Event::Done(Completion { tag: Tag(1), result: EIO })]);
}

#[test]
fn dice_fall_the_same_for_the_same_seed() {
    let run = |seed| -> Vec<bool> {
        let unlikely = FaultRule { probability: 0.25, seed, ..rule(&[FaultOp::Read]) };
        let mut bench = Bench::new(vec![unlikely]);
        (0..400).map(|_| bench.run(OpKind::Read, 0, 1).is_err()).collect()
    };
    let first = run(1);
    assert_eq!(first, run(1));
    assert_ne!(first, run(2));
    let hits = first.iter().filter(|hit| **hit).count();
    assert!((60..140).contains(&hits), "{hits} of 400 at 0.25");
}

#[test]
fn the_table_is_bounded_and_reports_as_json() {
    let table = FaultTable::new();
    for _ in 0..RULES_MAX {
        table.add(rule(&[FaultOp::Read])).unwrap();
    }
    assert_eq!(table.add(rule(&[FaultOp::Read])), Err(TooManyRules));
    assert_eq!(table.clear(None), RULES_MAX);
    table.add(FaultRule { range: sectors(8, 8), ..rule(&[FaultOp::Read]) }).unwrap();
    let json = serde_json::to_value(table.list()).unwrap();
    assert_eq!((&json[0]["sectors"], &json[0]["hits"]), (&"8-15".into(), &0.into()));
}

#[test]
fn runs_of_sectors_merge() {
    let mut set = Sectors::default();
    let range = |start, count| SectorRange { start: Sector(start), count };
    set.insert(range(0, 2));
    set.insert(range(4, 2));
    assert!(!set.contains_all(range(0, 6)));
    set.insert(range(1, 3));
    assert!(set.contains_all(range(0, 6)) && !set.contains_all(range(0, 7)));
    assert_eq!(set.0.len(), 1);
}
