//! `top` on a terminal of its own.

use std::cell::Cell;
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
    drawn: Arc<Mutex<Vec<u8>>>,
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
        let drawn = Arc::new(Mutex::new(Vec::new()));
        let (mut reader, all) = (File::from(keys.try_clone().unwrap()), drawn.clone());
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            // It fails when the last one has closed the terminal.
            while let Ok(count @ 1..) = reader.read(&mut bytes) {
                all.lock().unwrap().extend_from_slice(&bytes[..count]);
            }
        });
        Terminal { child, keys: keys.into(), screen, before, drawn }
    }

    fn drawn(&self) -> String {
        String::from_utf8_lossy(&self.drawn.lock().unwrap()).into_owned()
    }

    /// What was drawn since the last time is forgotten; then what `act` leads to is awaited.
    fn after(&mut self, act: impl FnOnce(&mut Terminal), what: &str) {
        self.drawn.lock().unwrap().clear();
        act(self);
        eventually(what, || self.drawn().contains(what));
    }

    fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    fn resize(&self, columns: u16, rows: u16) {
        tcsetwinsize(&self.screen, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
    }

    /// How it ended, and that the terminal is as it was.
    fn ended(mut self) -> ExitStatus {
        let status = self.child.wait().unwrap();
        let after = tcgetattr(&self.screen).unwrap();
        assert_eq!(after.local_modes, self.before.local_modes);
        assert_eq!(after.input_modes, self.before.input_modes);
        eventually("it left the other screen", || {
            let drawn = self.drawn();
            drawn.rfind("\x1b[?1049l") > drawn.rfind("\x1b[?1049h")
        });
        eventually("the cursor is shown again", || {
            let drawn = self.drawn();
            drawn.rfind("\x1b[?25h") >= drawn.rfind("\x1b[?25l")
        });
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
    eventually("it draws", || top.drawn().contains("SURFACE") && top.drawn().contains("1 of 64 remapped"));
    assert!(top.drawn().contains("disk.img") && top.drawn().contains("guest-error"), "{}", top.drawn());
    top.after(|top| top.press("?"), "Ctrl-C");
    top.after(|top| top.press("?p"), "PAUSED");
    top.after(|top| top.resize(40, 10), "SCANNER");
    top.after(|top| top.resize(120, 40), "IOPS OVER TIME");
    top.press("p");
    server.stop();
    eventually("it says that the server is gone", || top.drawn().contains("NO ANSWER"));
    let again = volume.serve(&[]);
    let width = Cell::new(80);
    eventually("the server is found again", || {
        // Another size gets a picture that is drawn anew.
        width.set(width.get() ^ 1);
        top.drawn.lock().unwrap().clear();
        top.resize(width.get(), 24);
        eventually("it draws", || top.drawn().contains("newest first"));
        !top.drawn().contains("NO ANSWER")
    });
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
        eventually("it draws", || top.drawn().contains("newest first"));
        kill_process(Pid::from_child(&top.child), signal).unwrap();
        assert_eq!(top.ended().code(), Some(0), "{signal:?}");
    }
    let mut top = Terminal::start(&server.ctl, 80, 24);
    eventually("it draws", || top.drawn().contains("newest first"));
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
    eventually("it says why", || top.drawn().contains("no control socket there"));
    assert!(!top.drawn().contains('\x1b'), "{}", top.drawn());
}
