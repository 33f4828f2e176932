//! Opening a device or file: one file description that does all I/O and carries the lock.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::{AtFlags, FileType, IFlags, OFlags, StatxFlags};

use super::DeviceIndex;
use super::errno::Errno;
use super::lock::{self, Access, Patience};
use super::sys;

/// Remapping works in blocks of 4096 bytes; a device that cannot write less than more is refused.
const PHYSICAL_BLOCK_MAX: u32 = 4096;

/// The type of tmpfs (linux/magic.h).
const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;
/// Where the kernel does not say (no STATX_DIOALIGN before Linux 6.1), a page is always enough.
const MEM_ALIGN_UNKNOWN: usize = 4096;

const SECTOR: u64 = crate::units::SECTOR_SIZE;

/// How to open.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Never write, and share the device with other readers.
    pub read_only: bool,
    /// Bypass the page cache (O_DIRECT), so that errors arrive where they happen.
    pub direct: bool,
    /// How long to wait for another process to let go of the device.
    pub lock_wait: Duration,
}

impl Default for OpenOptions {
    fn default() -> OpenOptions {
        OpenOptions { read_only: false, direct: true, lock_wait: Duration::from_secs(30) }
    }
}

/// What was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A block device.
    BlockDevice,
}

/// Sizes, alignments and abilities.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes, at the time of opening.
    pub size: u64,
    /// Offsets and lengths are multiples of this: 512 or 4096.
    pub logical_block: u32,
    /// What the medium writes as one.
    pub physical_block: u32,
    /// Alignment of memory for transfers; other memory is bounced. 1 without O_DIRECT.
    pub mem_align: usize,
    /// File or block device.
    pub kind: Kind,
    /// Whether a discard has any chance.
    pub discard: bool,
    /// Whether ranges can be zeroed without writing zeros. False means "not known to".
    pub write_zeroes: bool,
    /// Whether the device takes FUA writes; a write with RWF_DSYNC costs a whole flush elsewhere.
    pub fua: bool,
    /// Whether the disk beneath spins, where the kernel says.
    pub rotational: Option<bool>,
    /// Whether the page cache is bypassed.
    pub direct: bool,
    /// Whether it is a file in memory (tmpfs), where no transfer waits for a device.
    pub in_memory: bool,
}

/// What tells a device from another one put in its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The block device's own number, or that of the file system that holds the file.
    pub device: u64,
    /// Inode of a file; 0 for a block device.
    pub inode: u64,
    /// WWN or serial number of a block device, where it has one.
    pub serial: Option<String>,
    /// Last change of a file's content, in nanoseconds since 1970; 0 for a block device.
    pub mtime_ns: i64,
}

/// A device that is ours as long as this lives.
#[derive(Debug)]
pub struct OpenDevice {
    /// The one description of the device: all I/O goes through it, and it carries the locks.
    pub file: Arc<File>,
    /// As given.
    pub path: PathBuf,
    /// Sizes, alignments and abilities.
    pub geometry: Geometry,
    /// What tells it from another.
    pub identity: Identity,
    size: AtomicU64,
    lacks: AtomicU8,
}

/// Ways of dropping or zeroing a range that a device may turn out not to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Ability {
    Discard = 1,
    PunchHole = 2,
    ZeroRange = 4,
    UringDiscard = 8,
}

/// Why a device was not opened. Each is one line that says what to do.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant is its documentation")]
pub enum OpenError {
    #[error("{}: no such file or device; check the path, or make a volume with `create`", path.display())]
    Missing { path: PathBuf },
    #[error("{}: there is no directory {}; make it first", path.display(), directory.display())]
    NoDirectory { path: PathBuf, directory: PathBuf },
    #[error("{}: is a directory; name a file or block device", path.display())]
    Directory { path: PathBuf },
    #[error("{}: is neither a regular file nor a block device; name one", path.display())]
    WrongType { path: PathBuf },
    #[error("{}: permission denied; {} belongs to user {user} and group {group} (mode {mode:03o}): join the group or change the mode", path.display(), place.display())]
    Permission { path: PathBuf, place: PathBuf, user: u32, group: String, mode: u32 },
    #[error("{}: is write-protected, or on a read-only file system; make it writable, or `serve --read-only`", path.display())]
    WriteProtected { path: PathBuf },
    #[error("{}: is immutable (see lsattr) or protected by the kernel; `chattr -i` it, or `serve --read-only`", path.display())]
    Immutable { path: PathBuf },
    #[error("{}: has 0 bytes, so there is no disk in it; check the path or the drive, or `create` a volume of a size", path.display())]
    Empty { path: PathBuf },
    #[error("{path}: {size} bytes is not a multiple of its {unit}-byte sectors; extend it: truncate -s {} {path}", size.next_multiple_of(u64::from(*unit)), path = path.display())]
    Ragged { path: PathBuf, size: u64, unit: u32 },
    #[error("{}: its file system has no direct I/O (O_DIRECT); move it to one that has, such as ext4, xfs or btrfs", path.display())]
    NoDirect { path: PathBuf },
    #[error("{}: its {which} block of {size} bytes is larger than the 4096 that can be remapped; use another device", path.display())]
    BlockTooLarge { path: PathBuf, which: &'static str, size: u32 },
    #[error("{}: still in use by another process{holder} after {waited_secs} s; stop that process or unmount the device", path.display())]
    InUse { path: PathBuf, holder: String, waited_secs: u64 },
    #[error("{}: cannot be locked ({errno}); move it to a file system with file locks", path.display())]
    Lock { path: PathBuf, errno: Errno },
    #[error("{}: exists already; remove it or choose another path", path.display())]
    Exists { path: PathBuf },
    #[error("{}: no space for {size} bytes; free some or choose another place", path.display())]
    NoSpace { path: PathBuf, size: u64 },
    #[error("{}: {size} bytes is more than a file of its file system can have; choose a smaller size or another place", path.display())]
    TooLarge { path: PathBuf, size: u64 },
    #[error("{}: has {found} bytes, and {needed} are needed; extend it first", path.display())]
    DeviceSmall { path: PathBuf, found: u64, needed: u64 },
    #[error("{}: is on a read-only file system; choose another place", path.display())]
    ReadOnlyFileSystem { path: PathBuf },
    #[error("{}: {action}: {source}; check the path and the device", path.display())]
    Io { path: PathBuf, action: &'static str, source: io::Error },
}

/// Open the file or block device at `path` and lock it.
///
/// # Errors
/// [`OpenError`] says what is wrong in one line.
pub fn open(path: &Path, options: &OpenOptions) -> Result<OpenDevice, OpenError> {
    let kind = kind_of(path)?;
    let mut patience = Patience::new(path, options.lock_wait);
    let file = open_description(path, kind, options, &mut patience)?;
    lock(&file, path, options, &mut patience)?;
    finish(file, path, options)
}

/// Open for a look at what another process may be serving: only to read, and without the lock. What is read may
/// be changing.
///
/// # Errors
/// As [`open`].
pub fn look(path: &Path) -> Result<OpenDevice, OpenError> {
    let options = OpenOptions { read_only: true, direct: true, lock_wait: Duration::ZERO };
    let file = open_description(path, kind_of(path)?, &options, &mut Patience::new(path, options.lock_wait))?;
    finish(file, path, &options)
}

/// Make an open file (one that came over a socket) a device of ours. It becomes O_DIRECT or not as
/// the options say; it must have been opened for writing unless they say read-only.
///
/// # Errors
/// As [`open`].
pub fn open_file(file: File, path: &Path, options: &OpenOptions) -> Result<OpenDevice, OpenError> {
    let io_error = |action| move |errno: rustix::io::Errno| io_failure(path, action, errno.into());
    let mut flags = rustix::fs::fcntl_getfl(&file).map_err(io_error("cannot read its flags"))?;
    if !options.read_only && flags & OFlags::RWMODE != OFlags::RDWR {
        return Err(OpenError::WriteProtected { path: path.to_owned() });
    }
    flags.set(OFlags::DIRECT, options.direct);
    match rustix::fs::fcntl_setfl(&file, flags) {
        Ok(()) => {}
        Err(rustix::io::Errno::INVAL) if options.direct => {
            return Err(OpenError::NoDirect { path: path.to_owned() });
        }
        Err(errno) => return Err(io_error("cannot set its flags")(errno)),
    }
    lock(&file, path, options, &mut Patience::new(path, options.lock_wait))?;
    finish(file, path, options)
}

/// Create a regular file of `size` bytes, all of them holes; copy-on-write is switched off where the
/// file system has it. Nothing is left behind on failure.
///
/// # Errors
/// If it exists, does not fit or cannot be made.
pub fn create_file(path: &Path, size: u64) -> Result<(), OpenError> {
    let parent = parent_of(path);
    let opened = fs::OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
    let file = opened.map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => OpenError::Exists { path: path.to_owned() },
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory => {
            OpenError::NoDirectory { path: path.to_owned(), directory: parent.to_owned() }
        }
        io::ErrorKind::PermissionDenied => permission(path, parent),
        io::ErrorKind::ReadOnlyFilesystem => OpenError::ReadOnlyFileSystem { path: path.to_owned() },
        io::ErrorKind::StorageFull => OpenError::NoSpace { path: path.to_owned(), size },
        _ => io_failure(path, "cannot be created", error),
    })?;
    // Only btrfs and a few others know it, and only for empty files.
    if let Ok(flags) = rustix::fs::ioctl_getflags(&file) {
        let _ = rustix::fs::ioctl_setflags(&file, flags | IFlags::NOCOW);
    }
    let filled = file.set_len(size).and_then(|()| file.sync_all()).and_then(|()| File::open(parent)?.sync_all());
    filled.map_err(|error| {
        let _ = fs::remove_file(path);
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => OpenError::NoSpace { path: path.to_owned(), size },
            Some(libc::EFBIG | libc::EINVAL) => OpenError::TooLarge { path: path.to_owned(), size },
            _ => io_failure(path, "cannot be extended", error),
        }
    })
}

/// The directory that `path` is in.
pub fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Whether both paths lead to the same file or block device, or would if there were one. To be asked before
/// opening them: opening the second would wait for the lock of the first.
pub fn same_file(a: &Path, b: &Path) -> bool {
    let identity = |path: &Path| {
        let meta = fs::metadata(path).ok()?;
        let block = meta.file_type().is_block_device();
        Some(if block { (block, meta.rdev(), 0) } else { (block, meta.dev(), meta.ino()) })
    };
    let place = |path: &Path| Some((fs::canonicalize(parent_of(path)).ok()?, path.file_name()?.to_owned()));
    match (identity(a), identity(b)) {
        (Some(identity_of_a), Some(identity_of_b)) => identity_of_a == identity_of_b,
        (None, None) => place(a).is_some_and(|place_of_a| place(b) == Some(place_of_a)),
        _ => false,
    }
}

/// The failure of something that has no line of its own.
pub fn io_failure(path: &Path, action: &'static str, source: io::Error) -> OpenError {
    OpenError::Io { path: path.to_owned(), action, source }
}

/// What is at `path`. To be looked up before opening: opening a FIFO or a tape would already do something.
///
/// # Errors
/// If there is nothing, or nothing that could serve as a device.
pub fn kind_of(path: &Path) -> Result<Kind, OpenError> {
    let meta = fs::metadata(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => OpenError::Missing { path: path.to_owned() },
        io::ErrorKind::PermissionDenied => permission(path, parent_of(path)),
        _ => io_failure(path, "cannot be looked up", error),
    })?;
    if meta.is_dir() {
        return Err(OpenError::Directory { path: path.to_owned() });
    }
    if meta.file_type().is_block_device() {
        Ok(Kind::BlockDevice)
    } else if meta.is_file() {
        Ok(Kind::File)
    } else {
        Err(OpenError::WrongType { path: path.to_owned() })
    }
}

fn open_description(
    path: &Path,
    kind: Kind,
    options: &OpenOptions,
    patience: &mut Patience<'_>,
) -> Result<File, OpenError> {
    let mut flags = libc::O_CLOEXEC;
    if options.direct {
        flags |= libc::O_DIRECT;
    }
    // Without O_CREAT, O_EXCL asks the kernel for sole use of a block device: not mounted, no swap,
    // not part of an array.
    if kind == Kind::BlockDevice && !options.read_only {
        flags |= libc::O_EXCL;
    }
    loop {
        let opened = fs::OpenOptions::new().read(true).write(!options.read_only).custom_flags(flags).open(path);
        let error = match opened {
            Ok(file) => return Ok(file),
            Err(error) => error,
        };
        match error.raw_os_error() {
            Some(libc::EBUSY) => patience.wait(None)?,
            Some(libc::EINVAL) if options.direct => return Err(OpenError::NoDirect { path: path.to_owned() }),
            _ => return Err(open_failure(path, error)),
        }
    }
}

/// Why the kernel did not open a path.
pub fn open_failure(path: &Path, error: io::Error) -> OpenError {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => OpenError::Missing { path: path.to_owned() },
        Some(libc::EROFS) => OpenError::WriteProtected { path: path.to_owned() },
        Some(libc::EACCES) => permission(path, path),
        Some(libc::EPERM) => OpenError::Immutable { path: path.to_owned() },
        _ => io_failure(path, "cannot be opened", error),
    }
}

/// `place` is what stands in the way, or lies behind a directory that does.
fn permission(path: &Path, place: &Path) -> OpenError {
    let mut place = place;
    let stat = loop {
        match rustix::fs::stat(place) {
            Ok(stat) => break Some(stat),
            Err(_) if place == Path::new(".") => break None,
            Err(_) => place = parent_of(place),
        }
    };
    let (user, gid, mode) = stat.map_or((0, 0, 0), |stat| (stat.st_uid, stat.st_gid, stat.st_mode & 0o777));
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    let group = group_name(&groups, gid).unwrap_or_else(|| gid.to_string());
    OpenError::Permission { path: path.to_owned(), place: place.to_owned(), user, group, mode }
}

/// Lines of /etc/group read `disk:x:6:member,member`.
fn group_name(table: &str, gid: u32) -> Option<String> {
    table.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let number = fields.nth(1)?.parse::<u32>().ok()?;
        (number == gid).then(|| name.to_owned())
    })
}

fn examine(file: &File, path: &Path) -> Result<(rustix::fs::Stat, Kind), OpenError> {
    let stat = rustix::fs::fstat(file).map_err(|errno| io_failure(path, "cannot be examined", errno.into()))?;
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Kind::File,
        FileType::BlockDevice => Kind::BlockDevice,
        FileType::Directory => return Err(OpenError::Directory { path: path.to_owned() }),
        _ => return Err(OpenError::WrongType { path: path.to_owned() }),
    };
    Ok((stat, kind))
}

fn lock(file: &File, path: &Path, options: &OpenOptions, patience: &mut Patience<'_>) -> Result<(), OpenError> {
    let access = if options.read_only { Access::Shared } else { Access::Exclusive };
    let (_, kind) = examine(file, path)?;
    lock::acquire(file, access, kind == Kind::File, patience)
}

/// To be called with the lock, where there is to be one: whoever held it may have changed the size.
fn finish(file: File, path: &Path, options: &OpenOptions) -> Result<OpenDevice, OpenError> {
    let (stat, kind) = examine(&file, path)?;
    let geometry = geometry_of(&file, path, kind, &stat, options)?;
    let identity = match kind {
        Kind::File => Identity { device: stat.st_dev, inode: stat.st_ino, serial: None, mtime_ns: mtime_ns(&stat) },
        Kind::BlockDevice => {
            let sysfs = Sysfs::of(stat.st_rdev);
            let serial = ["device/wwid", "wwid", "serial", "device/serial"].iter().find_map(|name| sysfs.text(name));
            Identity { device: stat.st_rdev, inode: 0, serial, mtime_ns: 0 }
        }
    };
    let size = AtomicU64::new(geometry.size);
    Ok(OpenDevice { file: Arc::new(file), path: path.to_owned(), geometry, identity, size, lacks: AtomicU8::new(0) })
}

fn mtime_ns(stat: &rustix::fs::Stat) -> i64 {
    let nanoseconds = i64::try_from(stat.st_mtime_nsec).unwrap_or(0);
    stat.st_mtime.saturating_mul(1_000_000_000).saturating_add(nanoseconds)
}

fn geometry_of(
    file: &File,
    path: &Path,
    kind: Kind,
    stat: &rustix::fs::Stat,
    options: &OpenOptions,
) -> Result<Geometry, OpenError> {
    let io_error = |action| move |errno: rustix::io::Errno| io_failure(path, action, errno.into());
    let statx = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    let dio = statx.ok().filter(|statx| statx.stx_mask & StatxFlags::DIOALIGN.bits() != 0);
    let (size, logical_block, physical_block, number) = match kind {
        Kind::BlockDevice => (
            sys::block_device_size(file).map_err(io_error("cannot tell its size"))?,
            rustix::fs::ioctl_blksszget(file).map_err(io_error("cannot tell its logical block"))?,
            rustix::fs::ioctl_blkpbszget(file).map_err(io_error("cannot tell its physical block"))?,
            stat.st_rdev,
        ),
        Kind::File => {
            let size = u64::try_from(stat.st_size).unwrap_or(0);
            let logical = match &dio {
                _ if !options.direct => 512,
                Some(dio) if dio.stx_dio_offset_align == 0 => {
                    return Err(OpenError::NoDirect { path: path.to_owned() });
                }
                Some(dio) => dio.stx_dio_offset_align.max(512),
                None => probe_alignment(file, path)?,
            };
            (size, logical, logical, stat.st_dev)
        }
    };
    for (which, size) in [("logical", logical_block), ("physical", physical_block)] {
        if size > PHYSICAL_BLOCK_MAX {
            return Err(OpenError::BlockTooLarge { path: path.to_owned(), which, size });
        }
    }
    if size == 0 {
        return Err(OpenError::Empty { path: path.to_owned() });
    }
    if !size.is_multiple_of(u64::from(logical_block).max(SECTOR)) {
        return Err(OpenError::Ragged { path: path.to_owned(), size, unit: logical_block });
    }
    let sysfs = Sysfs::of(number);
    let mem_align = match &dio {
        _ if !options.direct => 1,
        Some(dio) if dio.stx_dio_mem_align.is_power_of_two() => {
            usize::try_from(dio.stx_dio_mem_align).expect("a u32 fits")
        }
        _ => MEM_ALIGN_UNKNOWN,
    };
    let is_file = kind == Kind::File;
    Ok(Geometry {
        size,
        logical_block,
        physical_block,
        mem_align,
        kind,
        discard: is_file || sysfs.number("queue/discard_max_bytes").unwrap_or(0) > 0,
        write_zeroes: is_file || sysfs.number("queue/write_zeroes_max_bytes").unwrap_or(0) > 0,
        fua: sysfs.number("queue/fua").unwrap_or(0) > 0,
        rotational: sysfs.number("queue/rotational").map(|rotational| rotational > 0),
        direct: options.direct,
        in_memory: is_file && rustix::fs::fstatfs(file).is_ok_and(|stat| stat.f_type == TMPFS_MAGIC),
    })
}

/// The smallest offset at which a direct read of the first bytes is taken.
fn probe_alignment(file: &File, path: &Path) -> Result<u32, OpenError> {
    let mut buf = super::buffer::AlignedBuf::zeroed(4096);
    for logical in [512_u32, 4096] {
        let len = usize::try_from(logical).expect("small");
        match rustix::io::pread(file, &mut buf[..len], 0) {
            Err(rustix::io::Errno::INVAL) => {}
            // A medium error at sector 0 says that the alignment was good.
            Ok(_) | Err(_) => return Ok(logical),
        }
    }
    Err(OpenError::NoDirect { path: path.to_owned() })
}

/// A block device's directory in sysfs.
struct Sysfs(PathBuf);

impl Sysfs {
    fn of(device: u64) -> Sysfs {
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        Sysfs(PathBuf::from(format!("/sys/dev/block/{major}:{minor}")))
    }

    /// The trimmed content of an attribute; a partition has most of them in its parent.
    fn text(&self, name: &str) -> Option<String> {
        let read = |path: PathBuf| fs::read_to_string(path).ok();
        let text = read(self.0.join(name))
            .or_else(|| self.0.join("partition").exists().then(|| read(self.0.join("..").join(name))).flatten())?;
        let text = text.trim();
        (!text.is_empty()).then(|| text.to_owned())
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.text(name)?.parse().ok()
    }
}

impl OpenDevice {
    /// Bytes that may be addressed: the size at opening, or what [`OpenDevice::update_size`] found.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// Take over a size that has grown since; a smaller one is reported and not taken over.
    ///
    /// # Errors
    /// If the device does not answer.
    pub fn update_size(&self) -> Result<u64, Errno> {
        let size = self.size_now()?;
        let whole = size - size % u64::from(self.geometry.logical_block);
        self.size.fetch_max(whole, Ordering::Relaxed);
        Ok(size)
    }

    /// Extend a file to `size` bytes, where it has less; what is new are holes. The next flush makes that durable.
    ///
    /// # Errors
    /// Where its file system does not take that; the file is as it was. A block device is extended by others.
    pub fn extend(&self, size: u64) -> Result<(), OpenError> {
        let path = || self.path.clone();
        let found = self.update_size().map_err(|Errno(errno)| {
            io_failure(&self.path, "cannot tell its size", io::Error::from_raw_os_error(errno))
        })?;
        if found >= size {
            return Ok(());
        }
        if self.geometry.kind == Kind::BlockDevice {
            return Err(OpenError::DeviceSmall { path: path(), found, needed: size });
        }
        self.file.set_len(size).map_err(|error| match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => OpenError::NoSpace { path: path(), size },
            Some(libc::EFBIG | libc::EINVAL) => OpenError::TooLarge { path: path(), size },
            _ => io_failure(&self.path, "cannot be extended", error),
        })?;
        self.size.fetch_max(size, Ordering::Relaxed);
        Ok(())
    }

    /// Undo [`OpenDevice::extend`] of a file that had `size` bytes and of whose new part nothing is used.
    ///
    /// # Errors
    /// Where its file system does not take that: it stays longer.
    pub fn shorten_again(&self, size: u64) -> io::Result<()> {
        // First what may be addressed: a device that is shorter than that has gone.
        let whole = size - size % u64::from(self.geometry.logical_block);
        let before = self.size.swap(whole, Ordering::Relaxed);
        self.file.set_len(size).inspect_err(|_| self.size.store(before, Ordering::Relaxed))
    }

    /// Last change of a file's content as of now, in nanoseconds since 1970; 0 for a block device.
    ///
    /// # Errors
    /// If the device does not answer.
    pub fn mtime_ns_now(&self) -> Result<i64, Errno> {
        match self.geometry.kind {
            Kind::File => Ok(mtime_ns(&rustix::fs::fstat(&self.file)?)),
            Kind::BlockDevice => Ok(0),
        }
    }

    fn size_now(&self) -> Result<u64, Errno> {
        match self.geometry.kind {
            Kind::File => Ok(u64::try_from(rustix::fs::fstat(&self.file)?.st_size).unwrap_or(0)),
            Kind::BlockDevice => Ok(sys::block_device_size(&self.file)?),
        }
    }

    /// Whether this still is the device that was opened, at its size. No medium access.
    pub(super) fn identify(&self) -> Result<(), Errno> {
        let stat = rustix::fs::fstat(&self.file)?;
        let same = match self.geometry.kind {
            Kind::File => stat.st_dev == self.identity.device && stat.st_ino == self.identity.inode,
            Kind::BlockDevice => stat.st_rdev == self.identity.device,
        };
        if !same {
            return Err(Errno(libc::ENODEV));
        }
        if self.size_now()? < self.size() { Err(Errno(libc::ENXIO)) } else { Ok(()) }
    }

    pub(super) fn has(&self, ability: Ability) -> bool {
        self.lacks.load(Ordering::Relaxed) & ability as u8 == 0
    }

    pub(super) fn remember_lack(&self, ability: Ability) {
        self.lacks.fetch_or(ability as u8, Ordering::Relaxed);
    }
}

/// The devices of one volume, by [`DeviceIndex`]; the spare may be absent.
#[derive(Clone, Debug)]
pub struct DeviceSet {
    /// Primary first.
    pub devices: Vec<Arc<OpenDevice>>,
}

impl DeviceSet {
    /// A set of these devices, primary first.
    pub fn new(devices: Vec<Arc<OpenDevice>>) -> DeviceSet {
        DeviceSet { devices }
    }

    /// The device at `index`, if there is one.
    pub fn get(&self, index: DeviceIndex) -> Option<&Arc<OpenDevice>> {
        self.devices.get(usize::from(index.0))
    }
}

#[cfg(test)]
mod tests;
