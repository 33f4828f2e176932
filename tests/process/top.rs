//! `top` on a terminal of its own.

use std::ffi::OsStr;
use std::path::Path;

use rustix::process::{Pid, Signal, kill_process};

use crate::monitoring::work;
use crate::server::{Volume, eventually, vhost_remap};
use crate::terminal::Terminal;

fn top_on(ctl: &Path) -> Terminal {
    let words = ["top", "--interval", "100ms", "--control-path"].map(OsStr::new);
    Terminal::start(&[&words[..], &[ctl.as_os_str()]].concat(), 80, 24)
}

#[test]
fn top_follows_the_volume_and_leaves_the_terminal_as_it_was() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    work(&server);
    let mut top = top_on(&server.ctl);
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
        let top = top_on(&server.ctl);
        top.eventually_shows(&["newest first"]);
        kill_process(Pid::from_child(&top.child), signal).unwrap();
        assert_eq!(top.ended().code(), Some(0), "{signal:?}");
    }
    let mut top = top_on(&server.ctl);
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
    let mut top = top_on(&ctl);
    assert_eq!(top.child.wait().unwrap().code(), Some(1));
    top.eventually_shows(&["no control socket there"]);
    assert!(top.is_plain(), "it drew before it asked");
}
