//! Disks whose operations stay in the kernel: files exported through FUSE by this process, which finishes them
//! late, or not before it is told, and not in the order in which they came. A write has its effect when it is
//! finished, so one that a killed server left behind lands after the kill.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::model::Random;

/// Operations are finished within this, unless they are held.
const DELAY_MAX: Duration = Duration::from_millis(6);
/// Longest they are held: whoever waits for the end of a server must not wait for ever.
const HOLD_MAX: Duration = Duration::from_secs(10);

/// The kernel's limit for a write, unless more is negotiated.
const WRITE_MAX: u32 = 128 << 10;

/// From the kernel's `include/uapi/linux/fuse.h`.
mod abi {
    pub(super) const HEADER_IN: usize = 40;
    pub(super) const FORGET: u32 = 2;
    pub(super) const GETATTR: u32 = 3;
    pub(super) const SETATTR: u32 = 4;
    pub(super) const OPEN: u32 = 14;
    pub(super) const READ: u32 = 15;
    pub(super) const WRITE: u32 = 16;
    pub(super) const RELEASE: u32 = 18;
    pub(super) const FSYNC: u32 = 20;
    pub(super) const FLUSH: u32 = 25;
    pub(super) const INIT: u32 = 26;
    pub(super) const INTERRUPT: u32 = 36;
    pub(super) const BATCH_FORGET: u32 = 42;
    pub(super) const VERSION: [u32; 2] = [7, 31];
    pub(super) const ASYNC_READ: u32 = 1;
    pub(super) const BIG_WRITES: u32 = 1 << 5;
    pub(super) const ASYNC_DIO: u32 = 1 << 15;
    pub(super) const OPEN_DIRECT_IO: u32 = 1;
    pub(super) const OPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
}

/// What waits for its time.
struct Pending {
    due: Instant,
    is_held: bool,
    unique: u64,
    op: Op,
}

enum Op {
    Read { offset: u64, len: usize },
    Write { offset: u64, data: Vec<u8> },
    Sync,
}

#[derive(Default)]
struct State {
    pending: Vec<Pending>,
    /// Whether what comes is held.
    holding: bool,
    /// Sectors that take no writes.
    bad: Vec<Range<u64>>,
    ended: bool,
}

/// What the threads share.
struct Shared {
    /// The kernel's side.
    connection: File,
    backing: File,
    state: Mutex<State>,
    changed: Condvar,
}

/// One file, at a path of its own. Unmounted when dropped.
struct SlowDisk {
    path: PathBuf,
    shared: Arc<Shared>,
}

/// A volume's two files.
pub(crate) struct SlowDisks {
    disks: [SlowDisk; 2],
}

impl SlowDisks {
    /// Export them at their own paths with `.slow` appended; why not, where that cannot be done here.
    pub(crate) fn export(primary: &Path, spare: &Path) -> Result<SlowDisks, String> {
        Ok(SlowDisks { disks: [SlowDisk::export(primary)?, SlowDisk::export(spare)?] })
    }

    pub(crate) fn paths(&self) -> [&Path; 2] {
        self.disks.each_ref().map(|disk| &*disk.path)
    }

    /// What is there, and what comes from now on, is not finished until it is released.
    pub(crate) fn hold(&self) {
        self.for_each(State::hold);
    }

    /// What comes from now on is finished as ever; how much is still held.
    pub(crate) fn hold_no_more(&self) -> usize {
        self.for_each(|state| state.holding = false);
        self.held()
    }

    /// Finish what is held.
    pub(crate) fn release(&self) {
        self.for_each(State::release);
    }

    /// Operations that are held.
    pub(crate) fn held(&self) -> usize {
        let held = |disk: &SlowDisk| disk.shared.state().pending.iter().filter(|pending| pending.is_held).count();
        self.disks.iter().map(held).sum()
    }

    fn for_each(&self, change: impl Fn(&mut State)) {
        for disk in &self.disks {
            change(&mut disk.shared.state());
            disk.shared.changed.notify_all();
        }
    }

    /// From now on exactly these sectors of the primary take no writes.
    pub(crate) fn fail_writes(&self, sectors: &[Range<u64>]) {
        self.disks[0].shared.state().bad = sectors.to_vec();
    }
}

impl State {
    fn hold(&mut self) {
        self.holding = true;
        let until = Instant::now() + HOLD_MAX;
        self.pending.iter_mut().for_each(|pending| (pending.due, pending.is_held) = (until, true));
    }

    fn release(&mut self) {
        self.holding = false;
        let now = Instant::now();
        let held = self.pending.iter_mut().filter(|pending| pending.is_held);
        held.for_each(|pending| (pending.due, pending.is_held) = (now, false));
    }
}

impl SlowDisk {
    fn export(file: &Path) -> Result<SlowDisk, String> {
        let mut path = file.as_os_str().to_owned();
        path.push(".slow");
        let path = PathBuf::from(path);
        let open = |path: &Path| File::options().read(true).write(true).open(path);
        let connection = open(Path::new("/dev/fuse")).map_err(|error| format!("/dev/fuse: {error}"))?;
        let backing = open(file).map_err(|error| format!("{}: {error}", file.display()))?;
        File::create(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let meta = backing.metadata().map_err(|error| error.to_string())?;
        let options = format!(
            "fd={},rootmode={:o},user_id={},group_id={}",
            connection.as_raw_fd(),
            meta.mode(),
            meta.uid(),
            meta.gid()
        );
        let options = CString::new(options).expect("no zeros");
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        mount("slow-disk", &path, "fuse", flags, &*options).map_err(|error| format!("mount: {error}"))?;
        let shared = Arc::new(Shared { connection, backing, state: Mutex::default(), changed: Condvar::new() });
        for work in [Shared::receive as fn(&Shared), Shared::finish] {
            let shared = shared.clone();
            std::thread::spawn(move || work(&shared));
        }
        Ok(SlowDisk { path, shared })
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        self.shared.state().release();
        self.shared.changed.notify_all();
        // Lazily: a server may still have it open. The threads end when the kernel lets go of it.
        let _ = unmount(&self.path, UnmountFlags::DETACH);
        let _ = fs::remove_file(&self.path);
    }
}

/// Fields of a request.
fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn words(list: &[u32]) -> Vec<u8> {
    list.iter().flat_map(|word| word.to_le_bytes()).collect()
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Take requests until the file is unmounted and closed by all.
    fn receive(&self) {
        let mut buffer = vec![0; WRITE_MAX as usize + 4096];
        let mut random = Random(0);
        loop {
            match (&self.connection).read(&mut buffer) {
                Ok(len) => self.take(&buffer[..len], &mut random),
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::ENOENT | libc::EAGAIN)) => {}
                Err(_) => break,
            }
        }
        self.state().ended = true;
        self.changed.notify_all();
    }

    fn take(&self, request: &[u8], random: &mut Random) {
        let (opcode, unique) = (word(request, 4), long(request, 8));
        let body = &request[abi::HEADER_IN..];
        let op = match opcode {
            abi::READ => Op::Read { offset: long(body, 8), len: word(body, 16) as usize },
            abi::WRITE => Op::Write { offset: long(body, 8), data: body[40..].to_vec() },
            abi::FSYNC => Op::Sync,
            abi::FORGET | abi::BATCH_FORGET | abi::INTERRUPT => return,
            _ => return self.reply(unique, self.answer_at_once(opcode, body)),
        };
        let delay = DELAY_MAX * u32::try_from(random.below(1000)).expect("small") / 1000;
        let mut state = self.state();
        let (is_held, delay) = if state.holding { (true, HOLD_MAX) } else { (false, delay) };
        state.pending.push(Pending { due: Instant::now() + delay, is_held, unique, op });
        drop(state);
        self.changed.notify_all();
    }

    /// What takes no time, held or not: that is about the file and not about its content.
    fn answer_at_once(&self, opcode: u32, body: &[u8]) -> io::Result<Vec<u8>> {
        match opcode {
            abi::INIT => {
                let flags = (abi::ASYNC_READ | abi::BIG_WRITES | abi::ASYNC_DIO) & word(body, 12);
                // Version, readahead, flags, background requests (more than are ever held), longest write.
                let mut reply = words(&[abi::VERSION[0], abi::VERSION[1], 0, flags, 512 | 384 << 16, WRITE_MAX]);
                reply.resize(64, 0);
                Ok(reply)
            }
            abi::GETATTR | abi::SETATTR => self.attributes(),
            abi::OPEN => Ok(words(&[0, 0, abi::OPEN_DIRECT_IO | abi::OPEN_PARALLEL_DIRECT_WRITES, 0])),
            abi::FLUSH | abi::RELEASE => Ok(Vec::new()),
            _ => Err(io::Error::from_raw_os_error(libc::ENOSYS)),
        }
    }

    fn attributes(&self) -> io::Result<Vec<u8>> {
        let meta = self.backing.metadata()?;
        // Valid for no time, then inode, size, blocks, times.
        let mut reply = words(&[0, 0, 0, 0]);
        let times = [meta.atime(), meta.mtime(), meta.ctime()].map(i64::cast_unsigned);
        for value in [meta.ino(), meta.size(), meta.blocks(), times[0], times[1], times[2]] {
            reply.extend(value.to_le_bytes());
        }
        for nanoseconds in [meta.atime_nsec(), meta.mtime_nsec(), meta.ctime_nsec()] {
            reply.extend(u32::try_from(nanoseconds).expect("less than a second").to_le_bytes());
        }
        reply.extend(words(&[meta.mode(), 1, meta.uid(), meta.gid(), 0, 4096, 0]));
        Ok(reply)
    }

    fn reply(&self, unique: u64, result: io::Result<Vec<u8>>) {
        let (error, body) = match result {
            Ok(body) => (0, body),
            Err(error) => (-error.raw_os_error().unwrap_or(libc::EIO), Vec::new()),
        };
        let len = u32::try_from(16 + body.len()).expect("small");
        let reply = [&len.to_le_bytes()[..], &error.to_le_bytes(), &unique.to_le_bytes(), &body].concat();
        // Nobody may be there any more to whom it matters.
        let _ = (&self.connection).write(&reply);
    }

    /// Finish what is due.
    fn finish(&self) {
        while let Some(Pending { unique, op, .. }) = self.next_due() {
            let result = match op {
                Op::Read { offset, len } => {
                    let mut data = vec![0; len];
                    self.backing.read_at(&mut data, offset).map(|count| {
                        data.truncate(count);
                        data
                    })
                }
                Op::Write { offset, data } => self.write(offset, &data),
                Op::Sync => Ok(Vec::new()),
            };
            self.reply(unique, result);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<Vec<u8>> {
        let (start, end) = (offset / 512, (offset + data.len() as u64) / 512);
        if self.state().bad.iter().any(|bad| bad.start < end && start < bad.end) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.backing.write_all_at(data, offset)?;
        Ok(words(&[u32::try_from(data.len()).expect("small"), 0]))
    }

    /// The first that is due, once it is; `None` when there will be no more.
    fn next_due(&self) -> Option<Pending> {
        let mut state = self.state();
        loop {
            let now = Instant::now();
            let first = (0..state.pending.len()).min_by_key(|i| state.pending[*i].due);
            let due = first.map(|first| state.pending[first].due);
            match (first, due) {
                (Some(first), Some(due)) if due <= now => return Some(state.pending.swap_remove(first)),
                (None, _) if state.ended => return None,
                _ => {}
            }
            let wait = due.map_or(HOLD_MAX, |due| due.saturating_duration_since(now));
            state = self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
