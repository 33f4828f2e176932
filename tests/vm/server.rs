//! The server program with a volume of its own, and orders to it as they are typed.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vhost_remap::runtime::report::{EventRecord, ListEntry, StatusReport};

/// How long a server may take to start, on a machine that is busy otherwise.
const START_MAX: Duration = Duration::from_secs(30);

/// One volume, and the server that serves it unless it was ended.
pub(crate) struct Server {
    dir: TempDir,
    primary: PathBuf,
    queues: u16,
    /// Whether its guest is to have packed rings.
    packed: bool,
    /// Further options of `serve`.
    options: Vec<String>,
    child: Option<Child>,
}

impl Server {
    /// Make a volume and serve it.
    pub(crate) fn start(size: &str, queues: u16) -> Server {
        Server::start_with(size, queues, &[], &[])
    }

    /// Make a volume with these options of `create`, and serve it with these of `serve`.
    pub(crate) fn start_with(size: &str, queues: u16, create: &[&str], serve: &[&str]) -> Server {
        let mut server = Server::stopped(queues, serve);
        server.make(&[&["create", "--size", size], create].concat());
        server.run();
        server
    }

    /// Adopt a copy of a raw image and serve it.
    pub(crate) fn adopt(image: &Path, queues: u16) -> Server {
        let mut server = Server::stopped(queues, &[]);
        let mut copy = Command::new("cp");
        copy.args(["--reflink=auto", "--sparse=always"]).arg(image).arg(&server.primary);
        assert!(copy.status().expect("cp").success(), "{} cannot be copied", image.display());
        server.make(&["adopt"]);
        server.run();
        server
    }

    fn stopped(queues: u16, options: &[&str]) -> Server {
        let dir = tempfile::tempdir().expect("a folder for the disks");
        let primary = dir.path().join("disk.img");
        let options = options.iter().map(ToString::to_string).collect();
        Server { dir, primary, queues, packed: false, options, child: None }
    }

    /// The same server for a guest with packed rings.
    pub(crate) fn with_packed_rings(mut self) -> Server {
        self.packed = true;
        self
    }

    /// Another server for the same volume, which awaits its guest.
    pub(crate) fn incoming(other: &Server) -> Server {
        let mut server = Server::stopped(other.queues, &["--incoming"]);
        server.primary.clone_from(&other.primary);
        server.run();
        server
    }

    fn make(&self, words: &[&str]) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-remap"));
        let output = command.args(words).arg("--primary").arg(&self.primary).output().expect("the program was built");
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Serve the volume (again).
    pub(crate) fn run(&mut self) {
        assert!(self.child.is_none(), "the server runs already");
        let log = self.dir.path().join("server.log");
        let log = std::fs::File::options().create(true).append(true).open(log).expect("a log");
        // It must not outlive the test, whatever happens to that.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", env!("CARGO_BIN_EXE_vhost-remap"), "serve", "--fault-injection"]);
        command.arg("--primary").arg(&self.primary).arg("--socket-path").arg(self.socket());
        command.arg("--num-queues").arg(self.queues.to_string()).args(&self.options);
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a descriptor")).stderr(log);
        self.child = Some(command.spawn().expect("setpriv is part of every Linux"));
        let began = Instant::now();
        while !self.order("ping", &[]).status.success() {
            let child = self.child.as_mut().expect("started above");
            let ended = child.try_wait().expect("our child");
            assert!(ended.is_none() && began.elapsed() < START_MAX, "no server ({ended:?}):\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// End it as an operator does.
    pub(crate) fn stop(&mut self) {
        let mut child = self.child.take().expect("a server that runs");
        let kill = Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
        assert!(kill.expect("kill").success());
        let status = child.wait().expect("our child");
        assert!(status.success(), "the server ended with {status}:\n{}", self.log());
    }

    /// End it at once.
    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().expect("a server that runs");
        child.kill().expect("our child");
        child.wait().expect("our child");
    }

    /// Where the front-end connects.
    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("disk.sock")
    }

    /// Wait until the guest has used its disk since the server began.
    pub(crate) fn await_requests(&self) {
        let began = Instant::now();
        while self.status().counters.reads + self.status().counters.writes == 0 {
            assert!(began.elapsed() < START_MAX, "the guest does nothing: {:?}\n{}", self.status(), self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Queues it offers.
    pub(crate) fn queues(&self) -> u16 {
        self.queues
    }

    /// The property of QEMU's device that says what rings the guest has.
    pub(crate) fn rings(&self) -> &'static str {
        if self.packed { "packed=on" } else { "packed=off" }
    }

    /// A folder for what belongs to this test.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What the server has printed.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("server.log")).unwrap_or_default()
    }

    fn order(&self, command: &str, words: &[&str]) -> std::process::Output {
        let mut program = Command::new(env!("CARGO_BIN_EXE_vhost-remap"));
        program.arg(command).args(words).arg("--control-path").arg(self.dir.path().join("disk.sock.ctl"));
        program.stdin(Stdio::null()).output().expect("the program was built")
    }

    /// Give an order and return what it prints.
    pub(crate) fn vhost_remap(&self, command: &str, words: &[&str]) -> String {
        let output = self.order(command, words);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command} {words:?}: {}: {error}\n{}", output.status, self.log());
        String::from_utf8(output.stdout).expect("text")
    }

    /// Make device operations fail.
    pub(crate) fn fault(&self, words: &[&str]) {
        self.vhost_remap("fault", &[&["add"], words].concat());
    }

    fn documents<T: serde::de::DeserializeOwned>(&self, command: &str) -> Vec<T> {
        let text = self.vhost_remap(command, &["--json"]);
        text.lines().map(|line| serde_json::from_str(line).expect("a document a line")).collect()
    }

    /// The state of the volume.
    pub(crate) fn status(&self) -> StatusReport {
        self.documents("status").pop().expect("one document")
    }

    /// Blocks that are remapped or pending.
    pub(crate) fn list(&self) -> Vec<ListEntry> {
        self.documents("list")
    }

    /// First sectors of the blocks that live in slots.
    pub(crate) fn remapped(&self) -> Vec<u64> {
        self.list().iter().filter(|entry| entry.slot.is_some()).map(|entry| entry.sector).collect()
    }

    /// Everything that happened.
    pub(crate) fn events(&self) -> Vec<EventRecord> {
        self.documents("events")
    }

    /// The guest has seen no error, and the volume is as good as new.
    pub(crate) fn assert_unnoticed(&self) {
        let status = self.status();
        assert_eq!(status.counters.guest_errors, 0, "{status:?}\n{}", self.vhost_remap("events", &[]));
        assert_eq!(status.state, ["ok"], "{status:?}");
        assert_eq!((status.blocks.lost_sectors, status.blocks.in_doubt), (0, 0), "{status:?}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            if std::thread::panicking() {
                eprintln!("--- server\n{}", self.log());
            }
            // Gone already is as good.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
