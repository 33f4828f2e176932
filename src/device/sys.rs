//! The system calls that neither std nor rustix offer in a form that fits: transfers between a file
//! and memory that must not be borrowed, two block-device ioctls, and OFD locks.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};

use rustix::io;
use rustix::ioctl;

use super::errno::Errno;

/// Most iovecs a call takes (UIO_MAXIOV).
pub(super) const IOVECS_MAX: usize = 1024;

/// Most bytes a transfer moves in one call: the kernel's MAX_RW_COUNT, 2 GiB less a page.
pub(super) const TRANSFER_MAX: usize = 0x7fff_f000;

const BLKDISCARD: ioctl::Opcode = ioctl::opcode::none(0x12, 119);
/// `_IOR(0x12, 114, size_t)`; what it returns is 64 bits wide all the same.
const BLKGETSIZE64: ioctl::Opcode = ioctl::opcode::read::<usize>(0x12, 114);

fn last_errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

fn file_offset(offset: u64) -> Result<i64, i32> {
    i64::try_from(offset).map_err(|_| libc::EINVAL)
}

/// `preadv(2)`: bytes read, or a negative error number as io_uring gives it.
///
/// # Safety
/// The iovec array and the memory it names are valid for writes until this returns.
pub(super) unsafe fn preadv(file: &File, iovecs: *const libc::iovec, count: usize, offset: u64) -> i32 {
    let Ok(offset) = file_offset(offset) else { return -libc::EINVAL };
    let Ok(count) = libc::c_int::try_from(count) else { return -libc::EINVAL };
    // SAFETY: the caller vouches for the array and its memory; the descriptor is open.
    let result = unsafe { libc::preadv(file.as_raw_fd(), iovecs, count, offset) };
    as_cqe_result(result)
}

/// `pwritev(2)`: bytes written, or a negative error number as io_uring gives it.
///
/// # Safety
/// The iovec array and the memory it names are valid for reads until this returns.
pub(super) unsafe fn pwritev(file: &File, iovecs: *const libc::iovec, count: usize, offset: u64) -> i32 {
    let Ok(offset) = file_offset(offset) else { return -libc::EINVAL };
    let Ok(count) = libc::c_int::try_from(count) else { return -libc::EINVAL };
    // SAFETY: the caller vouches for the array and its memory; the descriptor is open.
    let result = unsafe { libc::pwritev(file.as_raw_fd(), iovecs, count, offset) };
    as_cqe_result(result)
}

fn as_cqe_result(result: libc::ssize_t) -> i32 {
    if result < 0 { -last_errno() } else { i32::try_from(result).expect("one transfer is below 2 GiB") }
}

/// Size of a block device in bytes.
pub(super) fn block_device_size(fd: impl AsFd) -> io::Result<u64> {
    // SAFETY: BLKGETSIZE64 writes one u64.
    unsafe { ioctl::ioctl(fd, ioctl::Getter::<BLKGETSIZE64, u64>::new()) }
}

/// BLKDISCARD over `len` bytes from `offset`.
pub(super) fn block_device_discard(fd: impl AsFd, offset: u64, len: u64) -> io::Result<()> {
    // SAFETY: BLKDISCARD reads two u64s.
    unsafe { ioctl::ioctl(fd, ioctl::Setter::<BLKDISCARD, [u64; 2]>::new([offset, len])) }
}

/// What an OFD lock call asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OfdLock {
    /// Take a shared lock.
    Shared,
    /// Let go.
    Unlock,
}

fn flock_of(kind: libc::c_int, start: i64, len: i64) -> libc::flock {
    libc::flock {
        l_type: libc::c_short::try_from(kind).expect("lock types are small"),
        l_whence: libc::c_short::try_from(libc::SEEK_SET).expect("zero"),
        l_start: start,
        l_len: len,
        l_pid: 0,
    }
}

/// Take or drop a lock of the open file description on `len` bytes from `start`, without waiting.
pub(super) fn ofd_lock(file: &File, lock: OfdLock, start: i64, len: i64) -> Result<(), Errno> {
    let kind = match lock {
        OfdLock::Shared => libc::F_RDLCK,
        OfdLock::Unlock => libc::F_UNLCK,
    };
    let request = flock_of(kind, start, len);
    // SAFETY: F_OFD_SETLK reads one struct flock, which outlives the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const request) };
    if result < 0 { Err(Errno(last_errno())) } else { Ok(()) }
}

/// Whether another open file description holds any lock on the byte at `start`.
pub(super) fn ofd_held_elsewhere(file: &File, start: i64) -> Result<bool, Errno> {
    let mut request = flock_of(libc::F_WRLCK, start, 1);
    // SAFETY: F_OFD_GETLK reads and writes one struct flock, which outlives the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut request) };
    if result < 0 {
        return Err(Errno(last_errno()));
    }
    Ok(i32::from(request.l_type) != libc::F_UNLCK)
}
