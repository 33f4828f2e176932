//! The programs that are measured: vhost-remap and qemu-storage-daemon, each started for one run.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use serde_json::Value;
use vhost_remap::control::client::{Client, ORDER_TIMEOUT};
use vhost_remap::device::open::{OpenOptions, open};

use crate::machine::Placement;

/// Longest start or stop.
const LIMIT: Duration = Duration::from_secs(60);

/// The program as cargo built it.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_vhost-remap");

/// How a file's data gets to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cache {
    /// Through the host's page cache.
    Writeback,
    /// O_DIRECT.
    None,
}

/// A backend that listens. Killed when dropped.
pub(crate) struct Backend {
    child: Child,
    /// How long it took until it could be connected to.
    pub(crate) opened_in: Duration,
    pub(crate) socket: PathBuf,
    log: PathBuf,
    /// Another program than the one that is to be tested.
    is_peer: bool,
    ended: bool,
}

/// Start `vhost-remap serve` on a volume, or without `spare` in passthrough.
///
/// # Errors
/// What it says when it does not start.
pub(crate) fn serve(
    dir: &Path,
    primary: &Path,
    spare: Option<&Path>,
    cache: Cache,
    queues: usize,
    options: &[String],
) -> Result<Backend, String> {
    let socket = dir.join("vm.sock");
    let mut command = Command::new(PROGRAM);
    command.arg("serve").arg("--primary").arg(primary).arg("--socket-path").arg(&socket);
    match spare {
        Some(spare) => command.arg("--spare").arg(spare),
        None => command.arg("--passthrough"),
    };
    command.args(["--cache", if cache == Cache::Writeback { "writeback" } else { "none" }]);
    command.args(["--num-queues", &queues.to_string(), "--log-level", "0"]).args(options);
    Backend::start(command, dir, socket, queues)
}

/// Start qemu-storage-daemon with one I/O thread.
///
/// # Errors
/// What it says when it does not start.
pub(crate) fn storage_daemon(
    dir: &Path,
    file: &Path,
    aio: &str,
    cache: Cache,
    queues: usize,
) -> Result<Backend, String> {
    let socket = dir.join("qsd.sock");
    let _ = fs::remove_file(&socket);
    // A ring keeps its files, and their locks, for a moment after its process has ended; the daemon does not wait.
    drop(open(file, &OpenOptions::default()).map_err(|error| error.to_string())?);
    let direct = if cache == Cache::None { "on" } else { "off" };
    let mut command = Command::new("qemu-storage-daemon");
    let node = format!("driver=file,node-name=disk,filename={},aio={aio},cache.direct={direct}", file.display());
    let export = "type=vhost-user-blk,id=export,node-name=disk,writable=on,iothread=io,addr.type=unix";
    command.args(["--object", "iothread,id=io", "--blockdev", &node]);
    command.args(["--export", &format!("{export},num-queues={queues},addr.path={}", socket.display())]);
    // The monitor's greeting says that all of that is there.
    command.args(["--chardev", "stdio,id=monitor,signal=off", "--monitor", "chardev=monitor"]);
    Backend::start(command, dir, socket, queues)
}

impl Backend {
    /// Start a program on the backend's processors, and wait for the first line it prints.
    fn start(mut command: Command, dir: &Path, socket: PathBuf, queues: usize) -> Result<Backend, String> {
        let name = command.get_program().to_string_lossy().into_owned();
        let log = dir.join("backend.log");
        let stderr = File::create(&log).map_err(|error| format!("{}: {error}", log.display()))?;
        // The daemon's monitor must not see the end of its input.
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(stderr);
        let begin = Instant::now();
        let mut child = Placement::of(queues).spawn(&mut command).map_err(|error| format!("{name}: {error}"))?;
        let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
        let is_peer = name != PROGRAM;
        let mut backend = Backend { child, opened_in: Duration::ZERO, socket, log, is_peer, ended: false };
        let (sender, line) = mpsc::channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            let read = stdout.read_line(&mut line);
            let _ = sender.send(read.is_ok() && !line.is_empty());
            // Nothing that matters comes, but the pipe must not break.
            let _ = stdout.read_to_end(&mut Vec::new());
        });
        let is_up = line.recv_timeout(LIMIT).unwrap_or(false);
        backend.opened_in = begin.elapsed();
        if is_up { Ok(backend) } else { Err(format!("{name} does not start: {}", backend.said())) }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The last line of its log.
    fn said(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        text.lines().last().unwrap_or("it says nothing").to_owned()
    }

    /// Talk to a vhost-remap.
    pub(crate) fn control(&self) -> Client {
        let mut path = self.socket.clone().into_os_string();
        path.push(".ctl");
        Client::new(Path::new(&path)).expect("an event loop")
    }

    /// An order to a vhost-remap.
    ///
    /// # Errors
    /// Why it was not carried out.
    pub(crate) fn order(&self, target: &str, document: &Value) -> Result<Value, String> {
        self.control().post(target, document, ORDER_TIMEOUT).map_err(|error| error.to_string())
    }

    /// End it as an operator does. A peer that crashes over that, with all that was measured behind it, is reported in
    /// a line.
    ///
    /// # Errors
    /// When it has ended before, or does not end well.
    pub(crate) fn stop(mut self) -> Result<(), String> {
        if let Some(status) = self.child.try_wait().map_err(|error| error.to_string())? {
            self.ended = true;
            return Err(format!("the backend ended with {status} before it was stopped: {}", self.said()));
        }
        let pid = Pid::from_child(&self.child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|error| format!("pidfd: {error}"))?;
        kill_process(pid, Signal::TERM).map_err(|error| format!("kill: {error}"))?;
        let limit = rustix::event::Timespec::try_from(LIMIT).expect("seconds");
        let mut fds = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
        if rustix::event::poll(&mut fds, Some(&limit)) != Ok(1) {
            return Err(format!("the backend does not end within {LIMIT:?}: {}", self.said()));
        }
        self.ended = true;
        let status = self.child.wait().map_err(|error| error.to_string())?;
        if !status.success() {
            if !self.is_peer || status.signal().is_none() {
                return Err(format!("the backend ended with {status}: {}", self.said()));
            }
            eprintln!("the peer crashed when it was stopped ({status}); what was measured before counts");
        }
        Ok(())
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Run `vhost-remap` to its end.
///
/// # Errors
/// What it says.
pub(crate) fn vhost_remap(words: &[&str]) -> Result<String, String> {
    let output: Output = Command::new(PROGRAM).args(words).output().map_err(|error| error.to_string())?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
    }
}
