//! Who may use a device: locks on the very file description that does its I/O.
//!
//! A killed process's I/O can land seconds after the process is gone; the locks of its file
//! description live exactly as long, so a successor that waits for them starts on a quiet device.
//! `flock` keeps out other instances of this program. On regular files the byte-range locks of QEMU
//! (its `docs/system/images.rst`, "Disk image file locking") are taken on the same description, so
//! that `qemu-img` and we refuse each other; read-only peeks with `qemu-img info -U` stay possible.

use std::fs::{self, File};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use log::warn;
use rustix::fs::{FlockOperation, flock, fstatfs, major, minor};
use rustix::io::Errno as Rustix;

use super::errno::Errno;
use super::open::OpenError;
use super::sys::{self, OfdLock};

/// How often a lock that is taken is tried again.
const RETRY: Duration = Duration::from_millis(50);

/// How long to wait in silence: a restart normally finds the lock free by then.
const SILENT: Duration = Duration::from_secs(1);

/// QEMU marks a permission it uses with a shared lock on byte `PERM_BASE + n`, one it denies to
/// others with a shared lock on `SHARED_BASE + n`, `n` being the permission's bit.
const PERM_BASE: i64 = 100;
const SHARED_BASE: i64 = 200;

const PERM_CONSISTENT_READ: u8 = 1 << 0;
const PERM_WRITE: u8 = 1 << 1;
const PERM_WRITE_UNCHANGED: u8 = 1 << 2;
const PERM_RESIZE: u8 = 1 << 3;
const PERM_BITS: u8 = 4;

/// File systems that turn flock into a byte-range lock on the whole file, with which the OFD locks
/// of the same description would collide on the server: NFS, CIFS, SMB2.
const FLOCK_IS_A_RANGE_LOCK: [u64; 3] = [0x6969, 0xff53_4d42, 0xfe53_4d42];

/// What the holder of the description does with the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Reads beside other readers.
    Shared,
    /// Reads and writes, alone.
    Exclusive,
}

/// Patience with whoever holds a device, and one message about it.
pub(super) struct Patience<'a> {
    path: &'a Path,
    started: Instant,
    limit: Duration,
    told: bool,
}

impl<'a> Patience<'a> {
    pub(super) fn new(path: &'a Path, limit: Duration) -> Patience<'a> {
        Patience { path, started: Instant::now(), limit, told: false }
    }

    /// Sleep until the next try; fails once the deadline has passed. `file` is looked up in the
    /// kernel's lock table to name the holder.
    pub(super) fn wait(&mut self, file: Option<&File>) -> Result<(), OpenError> {
        let waited = self.started.elapsed();
        let holder = || file.and_then(holder_pid).map_or_else(String::new, |pid| format!(" (pid {pid})"));
        if waited >= self.limit {
            return Err(OpenError::InUse {
                path: self.path.to_owned(),
                holder: holder(),
                waited_secs: self.limit.as_secs(),
            });
        }
        if waited >= SILENT && !self.told {
            self.told = true;
            warn!(
                "{}: in use by another process{}; waiting up to {} s",
                self.path.display(),
                holder(),
                self.limit.as_secs()
            );
        }
        thread::sleep(RETRY.min(self.limit - waited));
        Ok(())
    }
}

/// Take all locks for `access`, waiting as long as `patience` lasts.
pub(super) fn acquire(
    file: &File,
    access: Access,
    regular: bool,
    patience: &mut Patience<'_>,
) -> Result<(), OpenError> {
    let operation = match access {
        Access::Shared => FlockOperation::NonBlockingLockShared,
        Access::Exclusive => FlockOperation::NonBlockingLockExclusive,
    };
    loop {
        match flock(file, operation) {
            Ok(()) => break,
            Err(Rustix::WOULDBLOCK) => patience.wait(Some(file))?,
            Err(Rustix::INTR) => {}
            Err(errno) => return Err(OpenError::Lock { path: patience.path.to_owned(), errno: errno.into() }),
        }
    }
    let range_locks_collide =
        fstatfs(file).is_ok_and(|stat| FLOCK_IS_A_RANGE_LOCK.contains(&u64::try_from(stat.f_type).unwrap_or(0)));
    if !regular || range_locks_collide {
        return Ok(());
    }
    loop {
        match qemu_try_lock(file, access) {
            Ok(true) => return Ok(()),
            // These locks have no owner to be named, and the one of the other kind on this file is our own.
            Ok(false) => patience.wait(None)?,
            // No OFD locks in this file system: then QEMU does without them, too.
            Err(Errno(libc::EINVAL | libc::ENOLCK | libc::EOPNOTSUPP)) => return Ok(()),
            Err(errno) => return Err(OpenError::Lock { path: patience.path.to_owned(), errno }),
        }
    }
}

/// Permissions used, and permissions others must not use.
fn qemu_permissions(access: Access) -> (u8, u8) {
    let denied = PERM_WRITE | PERM_RESIZE;
    match access {
        Access::Shared => (PERM_CONSISTENT_READ, denied),
        Access::Exclusive => (PERM_CONSISTENT_READ | PERM_WRITE | PERM_RESIZE, denied | PERM_WRITE_UNCHANGED),
    }
}

/// As QEMU does it: announce first, then look, so that of two starting at once at least one sees the
/// other.
fn qemu_try_lock(file: &File, access: Access) -> Result<bool, Errno> {
    let (used, denied) = qemu_permissions(access);
    let bits = (0..PERM_BITS).map(|bit| (1_u8 << bit, i64::from(bit)));
    for (mask, bit) in bits.clone() {
        for (wanted, base) in [(used, PERM_BASE), (denied, SHARED_BASE)] {
            if wanted & mask == 0 {
                continue;
            }
            match sys::ofd_lock(file, OfdLock::Shared, base + bit, 1) {
                Ok(()) => {}
                Err(Errno(libc::EAGAIN | libc::EACCES)) => return qemu_unlock(file),
                Err(errno) => return Err(errno),
            }
        }
    }
    for (mask, bit) in bits {
        let refused = used & mask != 0 && sys::ofd_held_elsewhere(file, SHARED_BASE + bit)?;
        if refused || (denied & mask != 0 && sys::ofd_held_elsewhere(file, PERM_BASE + bit)?) {
            return qemu_unlock(file);
        }
    }
    Ok(true)
}

fn qemu_unlock(file: &File) -> Result<bool, Errno> {
    for base in [PERM_BASE, SHARED_BASE] {
        sys::ofd_lock(file, OfdLock::Unlock, base, i64::from(PERM_BITS))?;
    }
    Ok(false)
}

/// The process that holds the flock of this file.
fn holder_pid(file: &File) -> Option<u32> {
    let stat = rustix::fs::fstat(file).ok()?;
    let table = fs::read_to_string("/proc/locks").ok()?;
    holder_in(&table, &format!("{:02x}:{:02x}:{}", major(stat.st_dev), minor(stat.st_dev), stat.st_ino))
}

/// Lines read `7: FLOCK  ADVISORY  WRITE 1234 fe:00:131 0 EOF`, with `->` after the number for waiters.
fn holder_in(table: &str, place: &str) -> Option<u32> {
    table.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        let kind = words.next()?;
        if kind == "->" {
            return None;
        }
        let pid = words.nth(2)?.parse().ok()?;
        (words.next()? == place).then_some(pid)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lock_table_names_the_holder_and_not_the_waiter() {
        let table = "1: OFDLCK ADVISORY  READ -1 fe:00:9 100 101\n\
                     2: -> FLOCK  ADVISORY  WRITE 77 fe:00:9 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 1234 fe:00:9 0 EOF\n";
        assert_eq!(holder_in(table, "fe:00:9"), Some(1234));
        assert_eq!(holder_in(table, "fe:00:10"), None);
    }

    #[test]
    fn qemu_locks_conflict_between_descriptions_in_both_directions() {
        let check = |first, second, together| {
            let file = tempfile::NamedTempFile::new().unwrap();
            let a = file.reopen().unwrap();
            let b = file.reopen().unwrap();
            assert_eq!(qemu_try_lock(&a, first), Ok(true));
            assert_eq!(qemu_try_lock(&b, second), Ok(together), "{first:?} then {second:?}");
            drop(a);
            if !together {
                let c = file.reopen().unwrap();
                assert_eq!(qemu_try_lock(&c, first), Ok(true), "a refused lock leaves nothing behind");
            }
            assert_eq!(qemu_try_lock(&b, second), Ok(true), "a closed description holds nothing");
        };
        check(Access::Exclusive, Access::Exclusive, false);
        check(Access::Exclusive, Access::Shared, false);
        check(Access::Shared, Access::Exclusive, false);
        check(Access::Shared, Access::Shared, true);
    }
}
