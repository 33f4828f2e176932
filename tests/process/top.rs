//! `top` on a terminal of its own.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Termios, Winsize, tcgetattr, tcsetwinsize};

use crate::monitoring::work;
use crate::server::{Volume, eventually, vhost_remap};

/// A terminal and `top` on it. Killed when dropped.
struct Terminal {
    child: Child,
    keys: File,
    /// Keeps the terminal when `top` has ended.
    screen: OwnedFd,
    before: Termios,
    seen: Arc<Mutex<Seen>>,
}

/// What a person sees, and the bytes that made it. A picture comes in pieces: what it shows is to be awaited.
struct Seen {
    screen: vt100::Parser,
    bytes: Vec<u8>,
}

impl Terminal {
    fn start(ctl: &Path, columns: u16, rows: u16) -> Terminal {
        let keys = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&keys).unwrap();
        unlockpt(&keys).unwrap();
        let path = ptsname(&keys, Vec::new()).unwrap();
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let screen = rustix::fs::open(path.as_c_str(), flags, Mode::empty()).unwrap();
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&screen, size).unwrap();
        let before = tcgetattr(&screen).unwrap();
        let end = || Stdio::from(screen.try_clone().unwrap());
        let child = Command::new("setsid")
            .args(["--ctty", env!("CARGO_BIN_EXE_vhost-remap"), "top", "--interval", "100ms", "--control-path"])
            .arg(ctl)
            .env("TERM", "xterm-256color")
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap();
        let empty = vt100::Parser::new(rows.try_into().unwrap(), columns.try_into().unwrap(), 0);
        let seen = Arc::new(Mutex::new(Seen { screen: empty, bytes: Vec::new() }));
        let (mut reader, all) = (File::from(keys.try_clone().unwrap()), seen.clone());
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            // It fails when the last one has closed the terminal.
            while let Ok(count @ 1..) = reader.read(&mut bytes) {
                let mut seen = all.lock().unwrap();
                seen.screen.process(&bytes[..count]);
                seen.bytes.extend_from_slice(&bytes[..count]);
            }
        });
        Terminal { child, keys: keys.into(), screen, before, seen }
    }

    fn look<T>(&self, at: impl FnOnce(&vt100::Screen) -> T) -> T {
        at(self.seen.lock().unwrap().screen.screen())
    }

    fn shows(&self, what: &str) -> bool {
        self.look(|screen| screen.contents().contains(what))
    }

    fn eventually_shows(&self, all: &[&str]) {
        for what in all {
            eventually(what, || self.shows(what));
        }
    }

    fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    /// All that was drawn before is gone: what is seen then is a picture of the new size.
    fn resize(&self, columns: u16, rows: u16) {
        {
            let mut seen = self.seen.lock().unwrap();
            seen.screen.screen_mut().set_size(rows.try_into().unwrap(), columns.try_into().unwrap());
            seen.screen.process(b"\x1b[2J");
        }
        tcsetwinsize(&self.screen, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
    }

    /// How it ended, and that the terminal is as it was.
    fn ended(mut self) -> ExitStatus {
        let status = self.child.wait().unwrap();
        let after = tcgetattr(&self.screen).unwrap();
        assert_eq!(after.local_modes, self.before.local_modes);
        assert_eq!(after.input_modes, self.before.input_modes);
        eventually("it left the other screen", || !self.look(vt100::Screen::alternate_screen));
        eventually("the cursor is shown again", || !self.look(vt100::Screen::hide_cursor));
        status
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn top_follows_the_volume_and_leaves_the_terminal_as_it_was() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    work(&server);
    let mut top = Terminal::start(&server.ctl, 80, 24);
    top.eventually_shows(&["disk.img", "1 of 64 remapped", "SURFACE", "guest-error"]);
    assert!(!top.shows("Ctrl-C"));
    top.press("?");
    top.eventually_shows(&["Ctrl-C"]);
    assert!(!top.shows("PAUSED"));
    top.press("?p");
    top.eventually_shows(&["PAUSED"]);
    eventually("the help goes", || !top.shows("Ctrl-C"));
    top.resize(40, 10);
    top.eventually_shows(&["SCANNER"]);
    top.resize(120, 40);
    top.eventually_shows(&["IOPS OVER TIME"]);
    top.press("p");
    server.stop();
    top.eventually_shows(&["NO ANSWER"]);
    let again = volume.serve(&[]);
    eventually("the server is found again", || !top.shows("NO ANSWER"));
    top.eventually_shows(&["newest first"]);
    top.press("q");
    assert_eq!(top.ended().code(), Some(0));
    drop(again);
}

#[test]
fn top_gives_the_terminal_back_also_when_it_is_told_to_end() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    for signal in [Signal::TERM, Signal::HUP, Signal::INT] {
        let top = Terminal::start(&server.ctl, 80, 24);
        top.eventually_shows(&["newest first"]);
        kill_process(Pid::from_child(&top.child), signal).unwrap();
        assert_eq!(top.ended().code(), Some(0), "{signal:?}");
    }
    let mut top = Terminal::start(&server.ctl, 80, 24);
    top.eventually_shows(&["newest first"]);
    top.press("\x03");
    assert_eq!(top.ended().code(), Some(0));
}

#[test]
fn top_without_a_terminal_or_a_server_says_so_in_one_line() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    let output = vhost_remap(&["top", "--control-path", server.ctl.to_str().unwrap()]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), said.lines().count()), (Some(2), 1), "{said}");
    assert!(said.contains("needs a terminal") && said.contains("status --watch"), "{said}");
    assert!(output.stdout.is_empty());
    let ctl = server.ctl.clone();
    server.stop();
    let mut top = Terminal::start(&ctl, 80, 24);
    assert_eq!(top.child.wait().unwrap().code(), Some(1));
    top.eventually_shows(&["no control socket there"]);
    assert!(!top.seen.lock().unwrap().bytes.contains(&b'\x1b'), "it drew before it asked");
}
