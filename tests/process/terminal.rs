//! A terminal with the program on it, and what a person sees there.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};

use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Termios, Winsize, tcgetattr, tcsetwinsize};

use crate::server::eventually;

/// A terminal and the program on it, which is killed when this is dropped.
pub(crate) struct Terminal {
    pub(crate) child: Child,
    keys: File,
    /// Keeps the terminal when the program has ended.
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
    /// With these words.
    pub(crate) fn start(words: &[&OsStr], columns: u16, rows: u16) -> Terminal {
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
            .args(["--ctty", env!("CARGO_BIN_EXE_vhost-remap")])
            .args(words)
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

    /// Nothing that moves the cursor or changes a colour was written.
    pub(crate) fn is_plain(&self) -> bool {
        !self.seen.lock().unwrap().bytes.contains(&b'\x1b')
    }

    fn look<T>(&self, at: impl FnOnce(&vt100::Screen) -> T) -> T {
        at(self.seen.lock().unwrap().screen.screen())
    }

    pub(crate) fn shows(&self, what: &str) -> bool {
        self.look(|screen| screen.contents().contains(what))
    }

    pub(crate) fn eventually_shows(&self, all: &[&str]) {
        for what in all {
            eventually(what, || self.shows(what));
        }
    }

    pub(crate) fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    /// All that was drawn before is gone: what is seen then is a picture of the new size.
    pub(crate) fn resize(&self, columns: u16, rows: u16) {
        {
            let mut seen = self.seen.lock().unwrap();
            seen.screen.screen_mut().set_size(rows.try_into().unwrap(), columns.try_into().unwrap());
            seen.screen.process(b"\x1b[2J");
        }
        tcsetwinsize(&self.screen, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
    }

    /// How it ended, and that the terminal is as it was.
    pub(crate) fn ended(mut self) -> ExitStatus {
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
