//! The program as a process: exit status, standard output and standard error.

use std::process::{Command, Output};

fn vhost_remap(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vhost-remap")).args(words).output().expect("the program was just built")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Exit status 2 and one line with the part.
#[track_caller]
fn check_usage_error(words: &[&str], part: &str) {
    let output = vhost_remap(words);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{words:?}: {stderr}");
    assert!(output.stdout.is_empty(), "{words:?}");
    assert!(stderr.starts_with("vhost-remap: ") && stderr.lines().count() == 1, "{words:?}: {stderr}");
    assert!(stderr.contains(part) && stderr.contains("--help"), "{words:?}: {stderr}");
}

/// Exit status 1 and one line with all the parts.
#[track_caller]
fn check_failure(words: &[&str], parts: &[&str]) {
    let output = vhost_remap(words);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{words:?}: {stderr}");
    assert!(output.stdout.is_empty(), "{words:?}");
    assert!(stderr.starts_with("vhost-remap: ") && stderr.lines().count() == 1, "{words:?}: {stderr}");
    for part in parts {
        assert!(stderr.contains(part), "{words:?}: {stderr}");
    }
}

#[test]
fn wrong_usage_exits_with_2_and_says_why() {
    check_usage_error(&["frobnicate"], "unrecognized subcommand");
    check_usage_error(&["create", "--primary", "p"], "--size");
    check_usage_error(&["create", "--primary", "p", "--size", "10GB"], "ambiguous");
    check_usage_error(&["create", "--primary", "p", "--size", "1000"], "not a multiple of 512");
    check_usage_error(&["create", "--primary", "p", "--size", "1G", "--serial", "123456789012345678901"], "20 bytes");
    check_usage_error(&["serve", "--primary", "p"], "--socket-path");
    check_usage_error(&["serve", "--primary", "p", "--socket-path", "s", "--fd", "3"], "cannot be used with");
    check_usage_error(&["serve", "--primary", "p", "--fd", "1"], "a whole number from 3 to 2147483647 is needed");
    check_usage_error(&["serve", "--primary", "p", "--fd", "3", "--create"], "--size");
    check_usage_error(&["serve", "--primary", "p", "--fd", "3", "--io-engine", "magic"], "io_uring");
    check_usage_error(&["serve", "--primary", "p", "--fd", "3", "--transport", "magic"], "framework");
    check_usage_error(&["serve", "--primary", "p", "--fd", "3", "--on-device-loss", "hold=x"], "hold=SECONDS");
    check_usage_error(
        &["serve", "--primary", "p", "--fd", "3", "--passthrough", "--spare", "s"],
        "cannot be used with",
    );
    check_usage_error(&["status"], "--control-path");
    let serve = |words: &[&'static str]| [&["serve", "--primary", "p", "--fd", "3"], words].concat();
    check_usage_error(&serve(&["--scan-interval", "30m"]), "between 1h and 90d");
    check_usage_error(&serve(&["--scan-interval", "soon"]), "no time such as 14d");
    check_usage_error(&serve(&["--scan-interval-hours", "169"]), "a whole number from 1 to 168 is needed");
    check_usage_error(&serve(&["--scan-interval-hours", "9", "--scan-interval", "9h"]), "cannot be used with");
    check_usage_error(&serve(&["--scan-rate", "63K"]), "less than 64K");
    check_usage_error(&serve(&["--scan-window", "25:00-26:00"]), "no window such as 22:00-06:00");
    check_usage_error(&serve(&["--move-weak", "maybe"]), "auto");
    check_usage_error(&["scan", "start", "--control-path", "c", "--range", "9-8"], "ends before it starts");
    check_usage_error(&["scan", "stop", "--control-path", "c"], "unrecognized subcommand");
    check_usage_error(&["list", "--control-path", "c", "--lost", "--pending"], "cannot be used with");
    check_usage_error(&["remap", "--control-path", "c", "15-8"], "ends before it starts");
    check_usage_error(&["log-level", "--control-path", "c", "4"], "a whole number from 0 to 3 is needed");
    check_usage_error(&["fault", "add", "--control-path", "c", "--errno", "EWHAT"], "EIO");
    check_usage_error(&["status", "--control-path", "c", "--watch", "0"], "a whole number from 1 to 86400 is needed");
    check_usage_error(&["status", "--control-path", "c", "--line", "--json"], "cannot be used with");
    check_usage_error(&["surface", "--control-path", "c", "--cells", "65537"], "a whole number from 1 to 65536");
    check_usage_error(&["top", "--control-path", "c", "--interval", "10ms"], "no time from 100ms to 1h");
    check_usage_error(&["fault", "add", "--control-path", "c", "--probability", "2", "--seed", "1"], "no probability");
}

#[test]
fn without_a_server_every_question_fails_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let ctl = dir.path().join("vm1.sock.ctl");
    let ctl = ctl.to_str().unwrap();
    for words in [
        &["status"][..],
        &["status", "--proc"],
        &["list"],
        &["events"],
        &["events", "--follow"],
        &["fault", "add"],
        &["fault", "list"],
        &["fault", "clear"],
        &["clear"],
        &["remap", "8"],
        &["verify", "8"],
        &["release", "8"],
        &["save"],
        &["resize", "--size", "1G"],
        &["ping"],
        &["log-level", "1"],
        &["health"],
        &["surface"],
        &["clear-stats"],
        &["scan", "start"],
        &["scan", "pause"],
        &["scan", "wait"],
        &["status", "--line"],
        &["status", "--watch", "1"],
    ] {
        let words = [words, &["--control-path", ctl]].concat();
        check_failure(&words, &[ctl, "server may not be running", "--control-path"]);
    }
}

#[test]
fn a_socket_left_by_a_dead_server_is_told_from_a_missing_one() {
    let dir = tempfile::tempdir().unwrap();
    let ctl = dir.path().join("ctl");
    drop(std::os::unix::net::UnixListener::bind(&ctl).unwrap());
    let ctl = ctl.to_str().unwrap();
    check_failure(&["ping", "--control-path", ctl], &[ctl, "nobody answers"]);
}

#[test]
fn capabilities_are_printed_whatever_else_is_asked() {
    for words in [
        &["--print-capabilities"][..],
        &["--socket-path=/no", "--print-capabilities", "--no-such-option"],
        &["serve", "--print-capabilities"],
    ] {
        let output = vhost_remap(words);
        assert_eq!(output.status.code(), Some(0), "{words:?}");
        assert_eq!(text(&output.stdout), "{\"type\":\"block\",\"features\":[\"read-only\",\"blk-file\"]}\n");
        assert!(output.stderr.is_empty());
    }
}

/// Who types nothing is told what there is, and not what is wrong.
#[test]
fn without_words_the_help_is_shown_as_an_error() {
    for words in [&[][..], &["fault"], &["scan"]] {
        let output = vhost_remap(words);
        assert_eq!(output.status.code(), Some(2), "{words:?}");
        assert!(output.stdout.is_empty() && text(&output.stderr).contains("Usage:"), "{words:?}");
    }
}

#[test]
fn help_and_version_go_to_standard_output() {
    let help = vhost_remap(&["--help"]);
    assert_eq!(help.status.code(), Some(0));
    assert!(text(&help.stdout).contains("serve"));
    let version = vhost_remap(&["--version"]);
    assert_eq!(text(&version.stdout), format!("vhost-remap {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_vhost-remap"))
        .arg("--print-capabilities")
        .stdout({
            let (reader, writer) = std::io::pipe().unwrap();
            drop(reader);
            writer
        })
        .spawn()
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
