//! What systemd is told.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::guest::Io;
use crate::server::{Server, Volume, eventually};

/// systemd's end, and a server that tells it.
struct Systemd {
    socket: UnixDatagram,
    server: Server,
}

impl Systemd {
    fn start(volume: &Volume, watchdog: Duration) -> Systemd {
        let path = volume.dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut command = volume.command(&["--fault-injection"]);
        command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", watchdog.as_micros().to_string());
        let server = Server::start(command, volume.dir.path()).unwrap_or_else(|output| panic!("{output:?}"));
        Systemd { socket, server }
    }

    /// The next message.
    fn hear(&self) -> String {
        let mut message = [0; 4096];
        let len = self.socket.recv(&mut message).expect("the server says something");
        String::from_utf8(message[..len].to_vec()).unwrap()
    }

    fn hear_until(&self, part: &str) -> String {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let message = self.hear();
            if message.lines().any(|line| line.starts_with(part)) {
                return message;
            }
            assert!(Instant::now() < deadline, "no {part}");
        }
    }
}

#[test]
fn systemd_hears_that_the_server_is_ready_and_alive_and_stops() {
    let volume = Volume::create(32, 64);
    let systemd = Systemd::start(&volume, Duration::from_millis(300));
    let ready = systemd.hear();
    assert!(ready.lines().any(|line| line == "READY=1"), "{ready}");
    assert!(ready.lines().any(|line| line == "STATUS=ok: 0 of 64 remaps, 0 lost sectors"), "{ready}");
    // There is a socket to connect to.
    drop(systemd.server.guest(1));
    systemd.server.order(&["remap", "1000"]);
    systemd.hear_until("WATCHDOG=1");
    systemd.hear_until("STATUS=ok: 1 of 64 remaps");
    kill_process(Pid::from_raw(systemd.server.pid().try_into().unwrap()).unwrap(), Signal::TERM).unwrap();
    systemd.hear_until("STOPPING=1");
    systemd.server.stop();
}

/// Requests that a disk does not return for longer than the watchdog waits do not make the server a dead one.
#[test]
fn a_slow_disk_does_not_keep_the_server_from_saying_that_it_is_alive() {
    let volume = Volume::create(32, 64);
    let systemd = Systemd::start(&volume, Duration::from_millis(300));
    systemd.hear_until("READY=1");
    let mut guest = systemd.server.guest(1);
    systemd.server.fault(&["--ops", "read,write", "--delay", "3000", "--sectors", "800-1100"]);
    let queue = guest.queue();
    queue.submit(&Io::Read { sector: 800, count: 8 });
    queue.submit(&Io::Write { sector: 1000, data: vec![1; 4096] });
    let began = Instant::now();
    // Thirty more, of which most come while the requests are under way.
    for _ in 0..20 {
        systemd.hear_until("WATCHDOG=1");
    }
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    assert!(!systemd.server.log_text().contains("systemd is not told"), "{}", systemd.server.log_text());
    let mut answered = queue.wait().len();
    while answered < 2 {
        answered += queue.wait().len();
    }
}

/// A thread of the server that stands still, until this is dropped.
struct Stopped(libc::pid_t);

impl Stopped {
    /// The one of that name.
    fn thread(server: &Server, name: &str) -> Stopped {
        let tasks = fs::read_dir(format!("/proc/{}/task", server.pid())).unwrap();
        let named = |task: &std::path::PathBuf| fs::read_to_string(task.join("comm")).is_ok_and(|c| c.trim() == name);
        let task = tasks.map(|task| task.unwrap().path()).find(named).unwrap_or_else(|| panic!("no thread {name}"));
        let tid = task.file_name().unwrap().to_str().unwrap().parse().unwrap();
        let stopped = Stopped(tid);
        stopped.ptrace(libc::PTRACE_SEIZE);
        stopped.ptrace(libc::PTRACE_INTERRUPT);
        stopped
    }

    fn ptrace(&self, request: libc::c_uint) {
        // SAFETY: these requests read and write no memory of ours.
        let result = unsafe { libc::ptrace(request, self.0, 0_usize, 0_usize) };
        assert!(result >= 0, "ptrace {request} {}: {}", self.0, std::io::Error::last_os_error());
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.ptrace(libc::PTRACE_DETACH);
        }
    }
}

/// As one that hangs in the kernel.
#[test]
fn a_server_with_a_thread_that_hangs_does_not_say_that_it_is_alive() {
    let volume = Volume::create(32, 64);
    let systemd = Systemd::start(&volume, Duration::from_millis(300));
    for name in ["worker-0", "healer"] {
        systemd.hear_until("WATCHDOG=1");
        let before = systemd.server.log_text().len();
        let stopped = Stopped::thread(&systemd.server, name);
        let said = || systemd.server.log_text()[before..].matches("systemd is not told").count();
        eventually("the server notices", || said() >= 1);
        // What was said before it stood still.
        systemd.socket.set_nonblocking(true).unwrap();
        while systemd.socket.recv(&mut [0; 4096]).is_ok() {}
        eventually("the server notices again", || said() >= 2);
        let unheard = systemd.socket.recv(&mut [0; 4096]).unwrap_err();
        assert_eq!(unheard.kind(), std::io::ErrorKind::WouldBlock, "{name}");
        systemd.socket.set_nonblocking(false).unwrap();
        drop(stopped);
    }
    systemd.hear_until("WATCHDOG=1");
    systemd.server.stop();
}
