//! Disks whose errors are the kernel's own: a file exported by a storage daemon that fails what it is told,
//! loop devices, and a file system that is full. Nothing of them outlives the test that made them.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Seek, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use serde_json::{Value, json};
use vhost_remap::device::open::{OpenOptions, open};

use crate::server::{Server, Volume, done, try_output_of, vhost_remap};

/// Longest the daemon takes to start or to answer.
const LIMIT: Duration = Duration::from_secs(60);

/// Say that a test does not run here, past the test harness, which would swallow println! of a passing test.
pub(crate) fn skip(test: &str, reason: impl std::fmt::Display) {
    let _ = writeln!(io::stdout(), "SKIP {test}: {reason}");
}

/// Operations that fail with an error of the kernel's.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    /// `read`, `write`, `write-zeroes`, `discard`, `flush`.
    pub(crate) kinds: &'static [&'static str],
    /// Only those that touch one of these sectors.
    pub(crate) sectors: Option<std::ops::Range<u64>>,
    pub(crate) errno: i32,
    /// Only the first of them, for each kind and sector.
    pub(crate) once: bool,
}

impl Fault {
    pub(crate) fn of(kinds: &'static [&'static str], errno: i32) -> Fault {
        Fault { kinds, sectors: None, errno, once: false }
    }

    pub(crate) fn at(self, sectors: std::ops::Range<u64>) -> Fault {
        Fault { sectors: Some(sectors), ..self }
    }

    pub(crate) fn once(self) -> Fault {
        Fault { once: true, ..self }
    }

    /// In the words of QEMU's `blkdebug`.
    fn rules(&self) -> Vec<Value> {
        let sectors: Vec<Option<u64>> = match &self.sectors {
            None => vec![None],
            Some(range) => range.clone().map(Some).collect(),
        };
        let rule = |kind: &str, sector: Option<u64>| {
            let mut rule = json!({ "event": "none", "iotype": kind, "errno": self.errno, "once": self.once });
            if let Some(sector) = sector {
                rule["sector"] = sector.into();
            }
            rule
        };
        self.kinds.iter().flat_map(|kind| sectors.iter().map(|sector| rule(kind, *sector))).collect()
    }
}

/// A file that `qemu-storage-daemon` offers in place of another one: at a path of its own, in a FUSE mount,
/// and with errors where it is told. Unmounted when dropped.
pub(crate) struct FuseDisk {
    pub(crate) path: PathBuf,
    daemon: Child,
    monitor: BufReader<UnixStream>,
    /// How often the rules were changed.
    changes: u32,
}

/// A daemon that does nothing. What waits for it must not be waited for while this is there.
pub(crate) struct Paused(Pid);

impl Drop for Paused {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::CONT);
    }
}

impl FuseDisk {
    /// Export `file` at `file` with `.fuse` appended; why not, where that cannot be done here.
    pub(crate) fn export(file: &Path) -> Result<FuseDisk, String> {
        let with = |suffix: &str| {
            let mut name = file.as_os_str().to_owned();
            name.push(suffix);
            PathBuf::from(name)
        };
        let (path, socket, log) = (with(".fuse"), with(".qmp"), with(".daemon.log"));
        // A ring keeps its files, and their locks, for a moment after its process has ended.
        drop(open(file, &OpenOptions::default()).map_err(|error| error.to_string())?);
        let _ = fs::remove_file(&socket);
        File::create(&path).expect("a place to mount on");
        let listener = UnixListener::bind(&socket).expect("a socket");
        let mut command = Command::new("qemu-storage-daemon");
        let node = format!("driver=file,node-name=file,filename={},cache.direct=on,discard=unmap", file.display());
        // The rules of a node are for ever; the exported one passes on to whichever has the present rules.
        command.args(["--blockdev", &node, "--blockdev", "driver=blkdebug,node-name=rules-0,image=file"]);
        command.args(["--object", "throttle-group,id=unlimited"]);
        command.args(["--blockdev", "driver=throttle,node-name=disk,throttle-group=unlimited,file=rules-0"]);
        let export = format!("type=fuse,id=export,node-name=disk,mountpoint={},writable=on", path.display());
        command.args(["--export", &format!("{export},allow-other=off")]);
        command.args(["--chardev", &format!("socket,id=monitor,path={}", socket.display())]);
        command.args(["--monitor", "chardev=monitor"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log).expect("a log file"));
        let mut daemon = command.spawn().map_err(|error| format!("qemu-storage-daemon: {error}"))?;
        let monitor = match connection(&listener, &daemon) {
            Some(stream) => stream,
            None => {
                let _ = daemon.kill();
                let _ = daemon.wait();
                let said = fs::read_to_string(&log).unwrap_or_default();
                // Before the reason it repeats its options, with paths that differ from run to run.
                let reason = said.lines().last().and_then(|line| line.rsplit(": ").next());
                return Err(format!("qemu-storage-daemon: {}", reason.unwrap_or("it does not start")));
            }
        };
        let mut disk = FuseDisk { path, daemon, monitor: BufReader::new(monitor), changes: 0 };
        disk.read_message();
        disk.order("qmp_capabilities", &json!({}));
        Ok(disk)
    }

    /// From now on exactly these operations fail.
    pub(crate) fn fail(&mut self, faults: &[Fault]) {
        let before = format!("rules-{}", self.changes);
        self.changes += 1;
        let now = format!("rules-{}", self.changes);
        let rules: Vec<Value> = faults.iter().flat_map(Fault::rules).collect();
        let mut node = json!({ "driver": "blkdebug", "node-name": now, "image": "file" });
        if !rules.is_empty() {
            node["inject-error"] = rules.into();
        }
        self.order("blockdev-add", &node);
        let disk = json!({ "driver": "throttle", "node-name": "disk", "throttle-group": "unlimited", "file": now });
        self.order("blockdev-reopen", &json!({ "options": [disk] }));
        self.order("blockdev-del", &json!({ "node-name": before }));
    }

    /// No operation fails any more.
    pub(crate) fn mend(&mut self) {
        self.fail(&[]);
    }

    /// The daemon no longer does anything.
    pub(crate) fn pause(&self) {
        kill_process(Pid::from_child(&self.daemon), Signal::STOP).expect("our child");
    }

    /// As [`FuseDisk::pause`], until the answer is dropped.
    pub(crate) fn pause_for_a_while(&self) -> Paused {
        self.pause();
        Paused(Pid::from_child(&self.daemon))
    }

    /// The daemon dies, and what is open on its mount is dead from then on.
    pub(crate) fn kill(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }

    fn order(&mut self, command: &str, arguments: &Value) {
        let order = json!({ "execute": command, "arguments": arguments });
        self.monitor.get_ref().write_all(format!("{order}\n").as_bytes()).expect("the daemon listens");
        let answer = self.read_message();
        assert!(answer.get("return").is_some(), "{order}: {answer}");
    }

    /// The next message that is not an event.
    fn read_message(&mut self) -> Value {
        loop {
            let mut line = String::new();
            self.monitor.read_line(&mut line).expect("an answer of the daemon");
            let message: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"));
            if message.get("event").is_none() {
                return message;
            }
        }
    }
}

impl Drop for FuseDisk {
    fn drop(&mut self) {
        self.kill();
        // Lazily: a server may still have a dead file of it open.
        let quiet = |program: &str, options: &[&str], path: &Path| {
            let mut command = Command::new(program);
            command.args(options).arg(path).stdout(Stdio::null()).stderr(Stdio::null());
            command.status().is_ok_and(|status| status.success())
        };
        if !quiet("umount", &["--lazy"], &self.path) {
            quiet("fusermount3", &["-u", "-z"], &self.path);
        }
    }
}

/// The daemon's connection, unless it ends before.
fn connection(listener: &UnixListener, daemon: &Child) -> Option<UnixStream> {
    let ended = pidfd_open(Pid::from_child(daemon), PidfdFlags::empty()).expect("a pidfd of our child");
    let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::new(&ended, PollFlags::IN)];
    let limit = Timespec::try_from(LIMIT).expect("seconds");
    poll(&mut fds, Some(&limit)).expect("poll");
    if fds[0].revents().is_empty() {
        return None;
    }
    let (stream, _) = listener.accept().expect("a connection is waiting");
    stream.set_read_timeout(Some(LIMIT)).expect("a timeout above zero");
    Some(stream)
}

/// A volume whose devices are exported by daemons, the primary, the spare or both.
///
/// `qemu-storage-daemon` up to 10.1 mixes up writes that reach one export at a time (as `qemu-io` alone shows
/// with `aio_write`), so at most one may be under way. `--io-engine threads` sees to that, since the kernel
/// lets only one synchronous writer at a time into a file; with io_uring the test has to: one request after
/// the other, on an adopted primary, which has no label that is written beside them.
pub(crate) struct Exported {
    pub(crate) primary: Option<FuseDisk>,
    pub(crate) spare: Option<FuseDisk>,
    /// After the daemons, which have files in its directory.
    pub(crate) volume: Volume,
    files: [PathBuf; 2],
}

/// Which devices of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    Primary,
    Spare,
    Both,
}

impl Exported {
    /// A new volume of 32 MiB with 64 slots; `None`, with a line for the summary, where it cannot be had.
    pub(crate) fn create(test: &str, which: Which) -> Option<Exported> {
        Exported::of(test, which, Volume::create(32, 64))
    }

    /// As [`Exported::create`], with an adopted primary, exported alone.
    pub(crate) fn adopt(test: &str) -> Option<Exported> {
        let volume = Volume::absent();
        File::create(&volume.primary).and_then(|file| file.set_len(32 << 20)).expect("a new file");
        let exported = Exported::of(test, Which::Primary, volume)?;
        let [primary, spare] = [&exported.volume.primary, &exported.files[1]].map(|path| path.to_str().expect("UTF-8"));
        done(&vhost_remap(&["adopt", "--primary", primary, "--spare", spare, "--max-remaps", "64"]));
        Some(exported)
    }

    fn of(test: &str, which: Which, volume: Volume) -> Option<Exported> {
        let files = [volume.primary.clone(), volume.spare.clone()];
        let mut exported = Exported { primary: None, spare: None, volume, files };
        exported.export(which).map_err(|reason| skip(test, reason)).ok()?;
        Some(exported)
    }

    /// Start daemons, new ones where some ran.
    pub(crate) fn export(&mut self, which: Which) -> Result<(), String> {
        let [primary, spare] = &self.files;
        if which != Which::Spare {
            self.primary = None;
            self.volume.primary = self.primary.insert(FuseDisk::export(primary)?).path.clone();
        }
        if which != Which::Primary {
            self.spare = None;
            self.volume.spare = self.spare.insert(FuseDisk::export(spare)?).path.clone();
        }
        Ok(())
    }

    pub(crate) fn primary(&mut self) -> &mut FuseDisk {
        self.primary.as_mut().expect("the primary is exported")
    }

    pub(crate) fn spare(&mut self) -> &mut FuseDisk {
        self.spare.as_mut().expect("the spare is exported")
    }

    /// Nothing fails any more.
    pub(crate) fn mend(&mut self) {
        self.primary.iter_mut().chain(&mut self.spare).for_each(FuseDisk::mend);
    }

    /// Serve it by that engine, without fault rules of the server's own.
    pub(crate) fn serve(&self, engine: &str, options: &[&str]) -> Server {
        let spare = self.volume.spare.to_str().expect("UTF-8");
        self.volume.serve_with(&[&["--spare", spare, "--io-engine", engine], options].concat())
    }
}

/// A loop device. The kernel detaches it when the last one who has it open closes it, however that comes.
pub(crate) struct Loop {
    pub(crate) path: PathBuf,
    _open: File,
}

impl Loop {
    /// Attach `file` with these options of `losetup`; why not, where there can be none.
    pub(crate) fn attach(file: &Path, options: &[&str]) -> Result<Loop, String> {
        let path = losetup(&[&["--find", "--show"], options].concat(), file)?;
        let path = PathBuf::from(path.trim());
        let open = File::open(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        // In use as it is, it is only marked.
        losetup(&["--detach"], &path)?;
        Ok(Loop { path, _open: open })
    }

    /// Take over the size of the file beneath.
    pub(crate) fn update_size(&self) {
        losetup(&["--set-capacity"], &self.path).expect("it is attached");
    }
}

/// A loop device over a file with holes, on a file system that has no space to spare once it is filled. The
/// file system is in no directory: it lives until the last of its files is closed.
pub(crate) struct Thin {
    pub(crate) disk: Loop,
    file: File,
    ballast: File,
}

impl Thin {
    /// A device of `size` bytes on a file system of `space` bytes, for the moment in `dir`.
    pub(crate) fn attach(dir: &Path, size: u64, space: u64) -> Result<Thin, String> {
        let at = dir.join("small");
        fs::create_dir(&at).expect("a new directory");
        let mut mount = Command::new("mount");
        run(mount.args(["-t", "tmpfs", "-o", &format!("size={space}"), "small"]).arg(&at))?;
        let open = |name: &str| File::options().read(true).write(true).create_new(true).open(at.join(name));
        let made = open("disk").and_then(|file| Ok((file, open("ballast")?))).map_err(|error| error.to_string());
        let attached = made.and_then(|(file, ballast)| {
            file.set_len(size).map_err(|error| error.to_string())?;
            Ok(Thin { disk: Loop::attach(&at.join("disk"), &[])?, file, ballast })
        });
        run(Command::new("umount").arg("--lazy").arg(&at))?;
        fs::remove_dir(&at).expect("nothing is mounted there any more");
        attached
    }

    /// Make a hole in it.
    pub(crate) fn punch(&self, offset: u64, len: u64) {
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, mode, offset, len).expect("this file system can have holes");
    }

    /// Take all space that is left.
    pub(crate) fn fill(&mut self) {
        let full = loop {
            if let Err(error) = self.ballast.write_all(&[0xb5; 4096]) {
                break error;
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::StorageFull, "{full}");
    }

    /// Give it back.
    pub(crate) fn free(&mut self) {
        self.ballast.set_len(0).expect("a file can be cut");
        self.ballast.rewind().expect("a file has a start");
    }
}

fn losetup(options: &[&str], path: &Path) -> Result<String, String> {
    run(Command::new("losetup").args(options).arg(path))
}

/// What a program printed; or why it did not do it.
pub(crate) fn run(command: &mut Command) -> Result<String, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = try_output_of(command).map_err(|error| format!("{program}: {error}"))?;
    match output.status.success() {
        true => Ok(done(&output)),
        false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
    }
}
