//! A guest that runs one of the scripts in this folder.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::server::Server;

/// Megabytes of memory. The largest user is xfs_repair.
const MEMORY_MIB: &str = "448";
/// Exit status of `vm-images/run` where a guest cannot be started at all.
const NEVER_STARTED: i32 = 126;

pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Take a turn: one guest at a time. `None`, with the reason printed, where there can be no guests.
pub(crate) fn guests() -> Option<MutexGuard<'static, ()>> {
    static TURN: Mutex<()> = Mutex::new(());
    static MISSING: OnceLock<Option<String>> = OnceLock::new();
    // A test that failed leaves nothing behind that would harm the next.
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let missing = MISSING.get_or_init(why_no_guests);
    if let Some(reason) = missing {
        // Past the capture of test output, so that a skip is seen when the test passes.
        writeln!(std::io::stdout(), "SKIP vm: {reason}").expect("standard output");
        return None;
    }
    Some(turn)
}

fn why_no_guests() -> Option<String> {
    let script = tempfile::NamedTempFile::new().expect("a temporary file");
    let mut run = Command::new(root().join("vm-images/run"));
    let output = run.arg("--script").arg(script.path()).stdin(Stdio::null()).output().expect("bash");
    let error = String::from_utf8_lossy(&output.stderr);
    match output.status.code() {
        Some(0) => None,
        Some(NEVER_STARTED) => Some(error.lines().last().unwrap_or("no guest can be started").to_owned()),
        // Not for lack of something: that is a failure.
        _ => panic!("an empty script in a guest: {}: {error}", output.status),
    }
}

/// The disk that a guest with `--image debian` starts from; only copies of it are to be served. `None`, with the
/// reason printed, where it cannot be made.
pub(crate) fn debian_disk() -> Option<PathBuf> {
    let build = Command::new(root().join("vm-images/build")).arg("debian").stdin(Stdio::null()).output().expect("bash");
    if !build.status.success() {
        let error = String::from_utf8_lossy(&build.stderr);
        writeln!(std::io::stdout(), "SKIP debian: {}", error.lines().last().unwrap_or("no image"))
            .expect("standard output");
        return None;
    }
    let folder = String::from_utf8(build.stdout).expect("a path of ours");
    Some(Path::new(folder.trim_end()).join("disk.img"))
}

/// Whether guests can be started by UEFI firmware; where they cannot, the reason is printed.
pub(crate) fn has_uefi() -> bool {
    let look = Command::new("bash").args(["-c", ". ci/debs.sh && ovmf_path"]).current_dir(root()).output();
    let found = look.expect("bash").status.success();
    if !found {
        writeln!(std::io::stdout(), "SKIP uefi: OVMF is missing; run: ci/setup test").expect("standard output");
    }
    found
}

/// A guest with one disk, and the line to its script.
pub(crate) struct Guest {
    child: Child,
    console: PathBuf,
    channel: PathBuf,
    deadline: Instant,
    stream: Option<BufReader<UnixStream>>,
}

impl Guest {
    /// Boot it on the server's disk.
    pub(crate) fn start(server: &Server, script: &str, args: &[&str], options: &[&str], limit: Duration) -> Guest {
        let folder = root().join("tests/vm");
        let (console, channel) = (server.dir().join("console"), server.dir().join("channel"));
        let output = File::create(&console).expect("a file for the console");
        // An image that starts from a disk starts from this one.
        let (socket, queues, rings) = (server.socket(), server.queues(), server.rings());
        let disk = format!("{},num-queues={queues},{rings},reconnect=1,bootindex=1", socket.display());
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "TERM"]).arg(root().join("vm-images/run"));
        command.arg("--script").arg(folder.join(script)).args(args.iter().flat_map(|arg| ["--arg", arg]));
        command.arg("--file").arg(format!("common.sh={}", folder.join("common.sh").display()));
        command.args(["--disk-socket", &disk, "--memory", MEMORY_MIB]).arg("--host-channel").arg(&channel);
        command.args(["--timeout", &limit.as_secs().to_string()]).args(options);
        command.stdin(Stdio::null()).stdout(output.try_clone().expect("a descriptor")).stderr(output);
        let child = command.spawn().expect("setpriv is part of every Linux");
        // The runner ends the guest; a little later at most it has ended itself.
        Guest { child, console, channel, deadline: Instant::now() + limit + Duration::from_secs(10), stream: None }
    }

    fn console(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.console).unwrap_or_default()).into_owned()
    }

    fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("our child")
    }

    fn stream(&mut self) -> &mut BufReader<UnixStream> {
        while self.stream.is_none() {
            if let Ok(stream) = UnixStream::connect(&self.channel) {
                stream.set_read_timeout(Some(Duration::from_secs(1))).expect("a second is no zero");
                self.stream = Some(BufReader::new(stream));
                break;
            }
            if let Some(status) = self.ended() {
                panic!("the guest ended with {status}:\n{}", self.console());
            }
            assert!(Instant::now() < self.deadline, "no channel to the guest:\n{}", self.console());
            std::thread::sleep(Duration::from_millis(50));
        }
        self.stream.as_mut().expect("connected above")
    }

    /// The next line that the script sends.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        loop {
            // What was read before a time-out stays in `line`.
            match self.stream().read_line(&mut line) {
                Ok(n) if n > 0 && line.ends_with('\n') => return line.trim_end().to_owned(),
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Ok(_) | Err(_) => {
                    let status = self.child.wait().expect("our child");
                    panic!("the guest ended with {status}:\n{}", self.console());
                }
            }
            assert!(Instant::now() < self.deadline, "the guest sends no line:\n{}", self.console());
        }
    }

    /// Send a line to the script.
    pub(crate) fn say(&mut self, line: &str) {
        let stream = self.stream().get_mut();
        stream.write_all(format!("{line}\n").as_bytes()).expect("a guest that listens");
    }

    /// Wait for the script's end, which must be a good one.
    pub(crate) fn finish(mut self) {
        while self.ended().is_none() {
            assert!(Instant::now() < self.deadline, "the guest does not end:\n{}", self.console());
            std::thread::sleep(Duration::from_millis(50));
        }
        let status = self.ended().expect("it has ended");
        assert!(status.success(), "the guest ended with {status}:\n{}", self.console());
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if self.ended().is_none() {
            // Not SIGKILL, so that the runner removes its files.
            let _ = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status();
            let _ = self.child.wait();
        }
    }
}
