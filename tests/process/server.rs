//! The host's side: a volume in a directory of its own, the program that serves it, and its operator.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde::de::DeserializeOwned;
use tempfile::TempDir;
use vhost_remap::control::client::Client;
use vhost_remap::runtime::report::{EventPage, EventRecord, ListEntry, StatusReport};

use crate::guest::Guest;

/// Longest any command, start or stop of these tests takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// What `--transport` takes.
pub(crate) const TRANSPORTS: [&str; 2] = ["own", "framework"];

/// Primary and spare in a directory that goes away with this.
pub(crate) struct Volume {
    pub(crate) dir: TempDir,
    pub(crate) primary: PathBuf,
    pub(crate) spare: PathBuf,
}

impl Volume {
    /// Paths only.
    pub(crate) fn absent() -> Volume {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (primary, spare) = (dir.path().join("disk.img"), dir.path().join("disk.img.spare"));
        Volume { dir, primary, spare }
    }

    /// A new volume of so many MiB.
    pub(crate) fn create(mib: u64, max_remaps: u32) -> Volume {
        let volume = Volume::absent();
        let primary = volume.primary.to_str().expect("UTF-8");
        let (size, remaps) = (format!("{mib}M"), max_remaps.to_string());
        done(&vhost_remap(&["create", "--primary", primary, "--size", &size, "--max-remaps", &remaps]));
        volume
    }

    /// Serve it with faults to be injected, and more options.
    pub(crate) fn serve(&self, options: &[&str]) -> Server {
        let fixed = ["--fault-injection", "--spare", self.spare.to_str().expect("UTF-8")];
        self.serve_with(&[&fixed[..], options].concat())
    }

    /// Serve it with nothing but these options.
    pub(crate) fn serve_with(&self, options: &[&str]) -> Server {
        let server = Server::start(self.command(options), self.dir.path());
        let server = server.unwrap_or_else(|output| panic!("{output:?}"));
        // The label is written at each start, off the path, with flushes: not when a test has made those fail, or
        // compares files. What takes no writes refuses this, and has no such flushes.
        server.ask(&["save"]);
        server
    }

    /// Try to serve it; the one line on stderr that says why it does not start.
    pub(crate) fn serve_refused(&self, options: &[&str]) -> String {
        let fixed = ["--spare", self.spare.to_str().expect("UTF-8"), "--log-level", "0"];
        match Server::start(self.command(&[&fixed[..], options].concat()), self.dir.path()) {
            Ok(_) => panic!("served although it should be refused"),
            Err(output) => refusal(&output),
        }
    }

    /// As [`Volume::serve_refused`], on sockets of its own.
    pub(crate) fn serve_elsewhere_refused(&self, options: &[&str]) -> String {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let fixed = ["--log-level", "0"];
        match Server::start(self.command_in(dir.path(), &[&fixed[..], options].concat()), dir.path()) {
            Ok(_) => panic!("served although it should be refused"),
            Err(output) => refusal(&output),
        }
    }

    /// Serve it on sockets of its own; the server and the directory they are in, once it serves.
    pub(crate) fn serve_elsewhere(&self, options: &[&str]) -> JoinHandle<(Server, TempDir)> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let command = self.command_in(dir.path(), options);
        std::thread::spawn(move || {
            let server = Server::start(command, dir.path()).unwrap_or_else(|output| panic!("{output:?}"));
            (server, dir)
        })
    }

    /// The command line of `serve` on sockets in another directory.
    pub(crate) fn command_in(&self, dir: &Path, options: &[&str]) -> Command {
        let mut command = Command::new(program_to_serve());
        command.arg("serve").arg("--primary").arg(&self.primary).arg("--spare").arg(&self.spare);
        command.arg("--socket-path").arg(dir.join("vm.sock")).args(options);
        command
    }

    /// The command line of `serve`.
    pub(crate) fn command(&self, options: &[&str]) -> Command {
        let mut command = self.command_without_socket(options);
        command.arg("--socket-path").arg(self.socket());
        command
    }

    /// The command line of `serve`, to be told where to listen.
    pub(crate) fn command_without_socket(&self, options: &[&str]) -> Command {
        let mut command = Command::new(program_to_serve());
        command.arg("serve").arg("--primary").arg(&self.primary).args(options);
        command
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("vm.sock")
    }
}

/// How most tests begin: a new volume of 32 MiB and 64 slots, its server, and a guest with one queue.
pub(crate) fn served() -> (Volume, Server, Guest) {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    let guest = server.guest(1);
    (volume, server, guest)
}

/// The program that serves: as cargo built it, or with a sanitizer. What else is asked of it is asked of cargo's.
fn program_to_serve() -> PathBuf {
    let named = std::env::var_os("VHOST_REMAP_BIN");
    named.map_or_else(|| env!("CARGO_BIN_EXE_vhost-remap").into(), PathBuf::from)
}

/// Wait until that holds.
#[track_caller]
pub(crate) fn eventually(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {LIMIT:?}: {what}");
        std::thread::yield_now();
    }
}

/// Run the program with these words.
pub(crate) fn vhost_remap(words: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-remap"));
    command.args(words);
    output_of(&mut command)
}

/// Run a program that is there to its end, within [`LIMIT`].
fn output_of(command: &mut Command) -> Output {
    try_output_of(command).unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

/// As [`output_of`], where the program may be missing.
pub(crate) fn try_output_of(command: &mut Command) -> io::Result<Output> {
    let what = format!("{command:?}");
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let pid = Pid::from_child(&child);
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    match receiver.recv_timeout(LIMIT) {
        Ok(output) => Ok(output.expect("the output of a child")),
        Err(_) => {
            // Not waited for yet, so the number is still its own.
            let _ = kill_process(pid, Signal::KILL);
            panic!("{what}: not done within {LIMIT:?}");
        }
    }
}

/// The standard output of a command that succeeded.
#[track_caller]
pub(crate) fn done(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).expect("text")
}

/// The one line of a command that was refused: exit status 1, and the reason on stderr. It may have had to wait for the
/// process before it, whose io_uring, and locks with it, the kernel takes apart a little after its end.
#[track_caller]
pub(crate) fn refusal(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let waited = |line: &&str| line.contains(" WARN ") && line.contains("in use by another process");
    let lines: Vec<&str> = stderr.lines().skip_while(waited).collect();
    assert!(lines.len() == 1 && lines[0].starts_with("vhost-remap: "), "{stderr:?}");
    format!("{}\n", lines[0])
}

/// A running server. Killed when dropped.
pub(crate) struct Server {
    child: Child,
    ended: bool,
    pub(crate) socket: PathBuf,
    pub(crate) ctl: PathBuf,
    /// The line it prints once it serves.
    pub(crate) announcement: String,
    log: PathBuf,
}

/// A server that has not said yet that it serves. Killed when dropped.
pub(crate) struct Starting {
    pub(crate) server: Server,
    line: Receiver<io::Result<String>>,
}

impl Starting {
    /// Start the program.
    pub(crate) fn spawn(mut command: Command, dir: &Path) -> Starting {
        // One for each start: a second server must not write into the log of the first.
        let log = (0..).map(|run| dir.join(format!("server.{run}.log"))).find(|path| !path.exists());
        let log = log.expect("endless");
        let stderr = File::create(&log).expect("a log file");
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr).spawn().expect("just built");
        let socket = dir.join("vm.sock");
        let ctl = dir.join("vm.sock.ctl");
        let mut server = Server { child, ended: false, socket, ctl, announcement: String::new(), log };
        let mut stdout = BufReader::new(server.child.stdout.take().expect("piped"));
        let (sender, line) = mpsc::channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            let read = stdout.read_line(&mut line);
            let _ = sender.send(read.map(|_| line));
            // Nothing more comes, but the pipe must not break.
            let _ = stdout.read_to_end(&mut Vec::new());
        });
        Starting { server, line }
    }

    /// Wait for the line that says that it serves; its output when it ended instead.
    pub(crate) fn wait(mut self) -> Result<Server, Output> {
        match self.line.recv_timeout(LIMIT) {
            Ok(Ok(line)) if !line.is_empty() => {
                self.server.announcement = line;
                Ok(self.server)
            }
            Ok(_) => {
                let status = self.server.wait();
                let stderr = fs::read(&self.server.log).expect("a log file");
                Err(Output { status, stdout: Vec::new(), stderr })
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => panic!("no start within {LIMIT:?}"),
        }
    }
}

impl Server {
    /// Start the program and wait for the line that says that it serves; else its output when it ended.
    pub(crate) fn start(command: Command, dir: &Path) -> Result<Server, Output> {
        Starting::spawn(command, dir).wait()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Connect a front-end.
    pub(crate) fn guest(&self, queues: usize) -> Guest {
        Guest::connect(&self.socket, queues)
    }

    /// End it as an operator does; it must close cleanly.
    #[track_caller]
    pub(crate) fn stop(mut self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).expect("our child");
        let status = self.wait();
        assert!(status.success(), "{status:?}: {}", self.log_text());
    }

    /// End it as an operator does, where that cannot be clean; the reason it gives.
    #[track_caller]
    pub(crate) fn stop_unclean(mut self) -> String {
        kill_process(Pid::from_child(&self.child), Signal::TERM).expect("our child");
        let status = self.wait();
        let log = self.log_text();
        assert_eq!(status.code(), Some(1), "{log}");
        log.lines().last().unwrap_or_default().to_owned()
    }

    /// End it as a crash does.
    pub(crate) fn kill(mut self) {
        self.child.kill().expect("our child");
        let status = self.wait();
        assert_eq!(status.signal(), Some(9));
    }

    /// End it as a crash does, with I/O in the kernel that keeps it from going altogether.
    pub(crate) fn kill_into_a_zombie(&mut self) {
        self.child.kill().expect("our child");
        assert!(self.comes_to(|server| server.state() == Some('Z')));
    }

    /// Wait until that holds, as long as it runs; `false` where it ends instead.
    fn comes_to(&mut self, mut holds: impl FnMut(&Server) -> bool) -> bool {
        let deadline = Instant::now() + LIMIT;
        while Instant::now() < deadline {
            if holds(self) {
                return true;
            }
            if self.state() == Some('Z') {
                return holds(self);
            }
            std::thread::yield_now();
        }
        panic!("nothing within {LIMIT:?}: {}", self.log_text());
    }

    /// Wait until its main thread waits for a FUSE file system; `false` where it ends instead.
    pub(crate) fn comes_to_wait_for_fuse(&mut self) -> bool {
        self.comes_to(|server| {
            let wchan = fs::read_to_string(format!("/proc/{}/wchan", server.pid())).unwrap_or_default();
            wchan == "request_wait_answer"
        })
    }

    /// Of its main thread, see proc(5).
    fn state(&self) -> Option<char> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).expect("not reaped");
        stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next())
    }

    fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + LIMIT;
        let pidfd = rustix::process::pidfd_open(Pid::from_child(&self.child), rustix::process::PidfdFlags::empty());
        let pidfd = pidfd.expect("a pidfd of our child");
        let left = rustix::event::Timespec::try_from(deadline - Instant::now()).expect("seconds");
        let mut fds = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
        let ready = rustix::event::poll(&mut fds, Some(&left)).expect("poll");
        assert_eq!(ready, 1, "the server does not end within {LIMIT:?}: {}", self.log_text());
        self.ended = true;
        self.child.wait().expect("our child")
    }

    pub(crate) fn log_text(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Ask it with the program's own command line.
    pub(crate) fn ask(&self, words: &[&str]) -> Output {
        let at = if ["fault", "scan", "scrub"].contains(&words[0]) { 2 } else { 1 };
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-remap"));
        command.args(&words[..at]).arg("--control-path").arg::<&OsStr>(self.ctl.as_ref()).args(&words[at..]);
        output_of(&mut command)
    }

    /// An order that must be carried out; its answer.
    #[track_caller]
    pub(crate) fn order(&self, words: &[&str]) -> String {
        done(&self.ask(words))
    }

    /// An order that must be refused; the reason.
    #[track_caller]
    pub(crate) fn refused(&self, words: &[&str]) -> String {
        refusal(&self.ask(words))
    }

    /// Add a fault rule (`fault add` with these words).
    #[track_caller]
    pub(crate) fn fault(&self, words: &[&str]) {
        self.order(&[&["fault", "add"], words].concat());
    }

    /// Remove all fault rules.
    #[track_caller]
    pub(crate) fn no_faults(&self) {
        self.order(&["fault", "clear"]);
    }

    pub(crate) fn status(&self) -> StatusReport {
        let text = self.order(&["status", "--json"]);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    pub(crate) fn list(&self) -> Vec<ListEntry> {
        lines(&self.order(&["list", "--json"]))
    }

    pub(crate) fn events(&self) -> Vec<EventRecord> {
        lines(&self.order(&["events", "--json"]))
    }

    /// Causes that events of a kind give.
    pub(crate) fn causes(&self, kind: &str) -> Vec<String> {
        self.events().into_iter().filter(|event| event.kind == kind).map(|event| event.cause).collect()
    }

    /// Wait for an event of a kind.
    pub(crate) fn await_event(&self, kind: &str) -> EventRecord {
        self.await_event_after(kind, 0)
    }

    /// Wait for an event of a kind with a number above `after`.
    pub(crate) fn await_event_after(&self, kind: &str, mut after: u64) -> EventRecord {
        let client = Client::new(&self.ctl).expect("an event loop");
        let deadline = Instant::now() + LIMIT;
        while Instant::now() < deadline {
            let page: EventPage =
                client.get(&format!("/v1/events?after={after}&wait=5"), LIMIT).expect("a page of events");
            after = page.last_seq.max(after);
            if let Some(found) = page.events.into_iter().find(|event| event.kind == kind) {
                return found;
            }
        }
        panic!("no event {kind:?} within {LIMIT:?}: {}", self.log_text());
    }

    /// Wait for a status like that.
    #[track_caller]
    pub(crate) fn await_status(&self, wanted: impl Fn(&StatusReport) -> bool) -> StatusReport {
        let deadline = Instant::now() + LIMIT;
        loop {
            let status = self.status();
            if wanted(&status) {
                return status;
            }
            assert!(Instant::now() < deadline, "not within {LIMIT:?}: {status:?}");
        }
    }

    /// Blocks in a state of `list`, by their first sector.
    pub(crate) fn blocks(&self, state: &str) -> Vec<u64> {
        let list = self.list();
        list.iter().filter(|entry| entry.state.iter().any(|s| s == state)).map(|entry| entry.sector).collect()
    }
}

impl Server {
    /// What it says of itself, and where its threads are in the kernel: for a test that has failed.
    fn state_text(&self) -> String {
        const PATIENCE: Duration = Duration::from_secs(3);
        let ask = |what| match Client::new(&self.ctl).map(|client| client.get::<serde_json::Value>(what, PATIENCE)) {
            Ok(Ok(answer)) => format!("{what}: {answer}\n"),
            Ok(Err(error)) => format!("{what}: {error}\n"),
            Err(error) => format!("{what}: {error}\n"),
        };
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).into_iter().flatten().flatten();
        let threads = tasks.map(|task| {
            let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default().trim().to_owned();
            format!("{} in {}: {}\n", read("comm"), read("wchan"), read("syscall"))
        });
        let fds = fs::read_dir(format!("/proc/{}/fdinfo", self.pid())).into_iter().flatten().flatten();
        // Eventfds with their counts, rings with their heads, tails and polls.
        let waited_on = fds.filter_map(|fd| {
            let text = fs::read_to_string(fd.path()).ok()?;
            let is_waited_on = text.contains("eventfd-count:") || text.contains("CqTail:");
            is_waited_on.then(|| format!("descriptor {}:\n{text}", fd.file_name().to_string_lossy()))
        });
        ["/v1/status", "/v1/stats"].map(ask).into_iter().chain(threads).chain(waited_on).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() && !self.ended {
            eprintln!("--- state of the server\n{}---", self.state_text());
        }
        if !self.ended {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- log of the server\n{}---", self.log_text());
        }
    }
}

/// JSON documents, one a line.
fn lines<T: DeserializeOwned>(text: &str) -> Vec<T> {
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}
