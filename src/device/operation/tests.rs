use std::time::Duration;

use super::super::buffer::Iovecs;
use super::super::open::{OpenOptions, create_file, open};
use super::super::{DeviceIndex, Tag};
use super::*;

const UNMAP: OpKind = OpKind::WriteZeroes { unmap: true };
const KEEP: OpKind = OpKind::WriteZeroes { unmap: false };

/// A device whose every answer the test makes up. Nothing reaches the file.
struct Bench {
    device: OpenDevice,
    unit: usize,
    /// Where a direct transfer may go on within a piece of memory.
    stride: usize,
    _dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        create_file(&path, 64 << 20).unwrap();
        let options = OpenOptions { lock_wait: Duration::from_secs(1), ..OpenOptions::default() };
        let device = open(&path, &options).unwrap();
        let unit = to_usize(u64::from(device.geometry.logical_block));
        let stride = unit.max(device.geometry.mem_align);
        Bench { device, unit, stride, _dir: dir }
    }

    fn begin(&self, kind: OpKind, offset: u64, len: usize, data: IoSlice) -> (Operation, Progress) {
        let op = Op { tag: Tag(1), device: DeviceIndex::PRIMARY, kind, offset, len: to_u64(len), data };
        // SAFETY: the tests keep their buffers longer than their operations.
        unsafe { Operation::begin(op, &self.device) }
    }

    fn begun(&self, kind: OpKind, offset: u64, len: usize, data: IoSlice) -> Operation {
        let (operation, progress) = self.begin(kind, offset, len, data);
        assert_eq!(progress, Progress::Next);
        operation
    }

    fn answer(&self, operation: &mut Operation, result: usize) -> Progress {
        operation.advance(&self.device, i32::try_from(result).unwrap())
    }

    fn fail(&self, operation: &mut Operation, errno: i32) -> Progress {
        operation.advance(&self.device, -errno)
    }
}

fn failed(errno: i32) -> Progress {
    Progress::Done(Err(Errno(errno)))
}

/// Offset, length and number of pieces of a transfer, and its first address.
fn transfer(operation: &mut Operation) -> (u64, usize, usize, usize) {
    let Step::Transfer { memory, offset, .. } = operation.step() else { panic!("no transfer") };
    match memory {
        Memory::One(iovec) => (offset, iovec.iov_len, 1, iovec.iov_base.addr()),
        Memory::Many(iovecs, count) => {
            // SAFETY: the array belongs to a buffer of the test.
            let iovecs = unsafe { std::slice::from_raw_parts(iovecs, count) };
            (offset, iovecs.iter().map(|iovec| iovec.iov_len).sum(), count, iovecs[0].iov_base.addr())
        }
    }
}

#[test]
fn a_short_transfer_goes_on_from_the_last_whole_block() {
    let bench = Bench::new();
    let stride = bench.stride;
    let buffer = AlignedBuf::zeroed(16 * stride);
    let mut operation = bench.begun(OpKind::Write, 8192, buffer.len(), buffer.as_io());
    assert_eq!(transfer(&mut operation), (8192, 16 * stride, 1, buffer.as_ptr().addr()));
    assert_eq!(bench.answer(&mut operation, 5 * stride + 7), Progress::Next);
    let rest = (8192 + to_u64(5 * stride), 11 * stride, 1, buffer.as_ptr().addr() + 5 * stride);
    assert_eq!(transfer(&mut operation), rest);
    assert_eq!(bench.answer(&mut operation, 11 * stride), Progress::Done(Ok(())));
}

#[test]
fn a_short_scattered_transfer_finishes_the_piece_before_the_others() {
    let bench = Bench::new();
    let stride = bench.stride;
    let mut buffers: Vec<_> = (0..5).map(|_| AlignedBuf::zeroed(4 * stride)).collect();
    let mut list = Iovecs::new();
    for buffer in &mut buffers {
        // SAFETY: the buffers outlive the list.
        unsafe { list.push(buffer.as_mut_ptr(), 4 * stride) };
    }
    let mut operation = bench.begun(OpKind::Read, 0, list.len(), list.as_io());
    assert_eq!(transfer(&mut operation).2, 5);
    assert_eq!(bench.answer(&mut operation, 6 * stride + stride / 2), Progress::Next);
    assert_eq!(transfer(&mut operation), (to_u64(6 * stride), 2 * stride, 1, buffers[1].as_ptr().addr() + 2 * stride));
    assert_eq!(bench.answer(&mut operation, 2 * stride), Progress::Next);
    assert_eq!(transfer(&mut operation), (to_u64(8 * stride), 12 * stride, 3, buffers[2].as_ptr().addr()));
    assert_eq!(bench.answer(&mut operation, 4 * stride), Progress::Next);
    assert_eq!(transfer(&mut operation), (to_u64(12 * stride), 8 * stride, 2, buffers[3].as_ptr().addr()));
    assert_eq!(bench.answer(&mut operation, 8 * stride), Progress::Done(Ok(())));
}

#[test]
fn a_call_takes_at_most_1024_pieces() {
    let bench = Bench::new();
    let mut buffer = AlignedBuf::zeroed(1500 * bench.stride);
    let mut list = Iovecs::new();
    for n in 0..1500 {
        // SAFETY: the buffer outlives the list.
        unsafe { list.push(buffer.as_mut_ptr().wrapping_add(n * bench.stride), bench.stride) };
    }
    let mut operation = bench.begun(OpKind::Write, 0, list.len(), list.as_io());
    assert_eq!(transfer(&mut operation).2, 1024);
    assert_eq!(bench.answer(&mut operation, 1024 * bench.stride), Progress::Next);
    assert_eq!(transfer(&mut operation).2, 476);
    assert_eq!(bench.answer(&mut operation, 476 * bench.stride), Progress::Done(Ok(())));
}

#[test]
fn no_progress_ends_in_an_error_and_never_in_success() {
    let bench = Bench::new();
    let buffer = AlignedBuf::zeroed(4096);
    let begun = |kind| bench.begun(kind, 0, 4096, buffer.as_io());
    for kind in [OpKind::Read, OpKind::Write] {
        assert_eq!(bench.answer(&mut begun(kind), 0), failed(libc::EIO), "the end came early");
        let ends_within_a_block: Vec<_> = {
            let mut operation = begun(kind);
            (0..=STALLS_MAX).map(|_| bench.answer(&mut operation, 100)).collect()
        };
        assert_eq!(ends_within_a_block.last(), Some(&failed(libc::EIO)));
        assert!(ends_within_a_block[..ends_within_a_block.len() - 1].iter().all(|step| *step == Progress::Next));
    }
    let mut operation = begun(OpKind::Read);
    assert!((0..STALLS_MAX).all(|_| bench.fail(&mut operation, libc::EAGAIN) == Progress::Next));
    assert_eq!(bench.fail(&mut operation, libc::EAGAIN), failed(libc::EAGAIN));
    let mut operation = begun(OpKind::Read);
    assert!((0..1000).all(|_| bench.fail(&mut operation, libc::EINTR) == Progress::Next));
}

#[test]
fn memory_the_device_refuses_after_all_is_bounced_from_there() {
    let bench = Bench::new();
    let stride = bench.stride;
    let len = 3 * BOUNCE_UNIT;
    let mut buffer = AlignedBuf::zeroed(len);
    let mut operation = bench.begun(OpKind::Read, 0, len, buffer.as_io());
    assert_eq!(bench.answer(&mut operation, stride), Progress::Next);
    assert_eq!(bench.fail(&mut operation, libc::EINVAL), Progress::NeedsBuffer);
    let mut lent = AlignedBuf::zeroed(BOUNCE_UNIT);
    lent.fill(9);
    let address = lent.as_ptr().addr();
    operation.lend(lent);
    assert_eq!(transfer(&mut operation), (to_u64(stride), BOUNCE_UNIT, 1, address));
    // A short one: what is no whole block comes again.
    assert_eq!(bench.answer(&mut operation, 2 * bench.unit + 1), Progress::Next);
    let done = stride + 2 * bench.unit;
    assert_eq!(transfer(&mut operation), (to_u64(done), BOUNCE_UNIT, 1, address));
    assert_eq!(bench.fail(&mut operation, libc::EINVAL), failed(libc::EINVAL), "bounced already");
    assert!(operation.take_buffer().is_some());
    drop(operation);
    let expected: Vec<u8> = (0..len).map(|at| if (stride..done).contains(&at) { 9 } else { 0 }).collect();
    assert!(buffer.as_mut() == expected);
}

#[test]
fn a_device_without_a_way_to_zero_gets_zeros_written_and_is_not_asked_again() {
    let bench = Bench::new();
    let len = (2 << 20) + 4096;
    let mut operation = bench.begun(UNMAP, 4096, len, IoSlice::EMPTY);
    assert!(matches!(operation.step(), Step::Allocate(PUNCH_HOLE)));
    assert_eq!(bench.fail(&mut operation, libc::EOPNOTSUPP), Progress::Next);
    assert!(matches!(operation.step(), Step::Allocate(ZERO_RANGE)));
    assert_eq!(bench.fail(&mut operation, libc::EOPNOTSUPP), Progress::Next);
    for (offset, len) in [(4096, 1 << 20), (4096 + (1 << 20), 1 << 20), (4096 + (2 << 20), 4096)] {
        let (at, bytes, pieces, _) = transfer(&mut operation);
        assert_eq!((at, bytes, pieces), (offset, len, 1));
        let last = len == 4096;
        let expected = if last { Progress::Done(Ok(())) } else { Progress::Next };
        assert_eq!(bench.answer(&mut operation, len), expected);
    }
    let mut again = bench.begun(KEEP, 0, 4096, IoSlice::EMPTY);
    assert_eq!(transfer(&mut again).1, 4096);
    let (_, discard) = bench.begin(OpKind::Discard, 0, 4096, IoSlice::EMPTY);
    assert_eq!(discard, failed(libc::EOPNOTSUPP), "it cannot punch holes");
}

#[test]
fn one_command_the_target_failed_says_nothing_of_the_next() {
    let bench = Bench::new();
    let mut operation = bench.begun(KEEP, 0, 4096, IoSlice::EMPTY);
    assert!(matches!(operation.step(), Step::Allocate(ZERO_RANGE)));
    assert_eq!(bench.fail(&mut operation, libc::EREMOTEIO), Progress::Next);
    assert_eq!(transfer(&mut operation).1, 4096);
    assert!(matches!(bench.begun(KEEP, 0, 4096, IoSlice::EMPTY).step(), Step::Allocate(ZERO_RANGE)));
    let mut operation = bench.begun(KEEP, 0, 4096, IoSlice::EMPTY);
    assert_eq!(bench.fail(&mut operation, libc::EIO), failed(libc::EIO), "a medium error is not hidden");
}

#[test]
fn the_pool_of_bounce_buffers_is_bounded() {
    let mut pool = BouncePool::default();
    let mut taken: Vec<_> = (0..BOUNCE_BUFFERS).map(|_| pool.take().unwrap()).collect();
    assert!(pool.take().is_none());
    pool.give_back(taken.pop().unwrap());
    assert!(pool.take().is_some());
}
