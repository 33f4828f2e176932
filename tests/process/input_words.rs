//! Wrong words: options that do not exist, numbers that cannot be. Exit status 2, one line, nothing touched.

use crate::inputs::{Ground, check_refused};

/// What all lines about a value have in common.
fn value(given: &str, option: &str, why: &str) -> String {
    format!("invalid value '{given}' for '{option}': {why}")
}

#[test]
fn unknown_and_missing_options_are_named() {
    let ground = Ground::with_volume();
    for (words, line) in [
        ("create --primary p --size 1M --frob", "unexpected argument '--frob' found"),
        ("create --primary p --size 1M extra", "unexpected argument 'extra' found"),
        ("create --primary p --size 1M --size 2M", "the argument '--size <SIZE>' cannot be used multiple times"),
        (
            "create --primary p --size 1M --sparse s",
            "unexpected argument '--sparse' found; tip: a similar argument exists: '--spare'",
        ),
        ("create --primary p", "the following required arguments were not provided: --size <SIZE>"),
        ("create", "the following required arguments were not provided: --primary <P>, --size <SIZE>"),
        ("adopt", "the following required arguments were not provided: --primary <P>"),
        ("adopt --primary p --size 1M", "unexpected argument '--size' found"),
        (
            "serve --primary disk.img",
            "the following required arguments were not provided: <--socket-path <SOCK>|--fd <N>>",
        ),
        ("serve --socket-path s", "the following required arguments were not provided: --primary <P>"),
        (
            "serve --primary disk.img --socket-path s --fd 3",
            "the argument '--socket-path <SOCK>' cannot be used with '--fd <N>'",
        ),
        (
            "serve --primary p --socket-path s --create",
            "the following required arguments were not provided: --size <SIZE>",
        ),
        ("serve --primary p --socket-path s --size 1M", "the following required arguments were not provided: --create"),
        (
            "serve --primary disk.img --socket-path s --read-only --create --size 1M",
            "the argument '--read-only' cannot be used with '--create'",
        ),
        (
            "serve --primary disk.img --socket-path s --passthrough --spare x",
            "the argument '--passthrough' cannot be used with '--spare <S>'",
        ),
        ("status", "the following required arguments were not provided: --control-path <CTL>"),
        ("status --control-path c --proc --json", "the argument '--proc' cannot be used with '--json'"),
        ("list --control-path c --lost --pending", "the argument '--lost' cannot be used with '--pending'"),
        ("remap --control-path c", "the following required arguments were not provided: <SECTOR>..."),
    ] {
        ground.refuses_usage(words, line);
    }
    for (words, help) in [("frob", ""), ("fault frob", " fault")] {
        let line = format!("unrecognized subcommand 'frob'; see `vhost-remap{help} --help`");
        check_refused(ground.dir(), &mut ground.command(words), 2, &line);
    }
    ground.still_serves();
}

#[test]
fn impossible_sizes_are_refused_with_what_is_possible() {
    let ground = Ground::with_volume();
    let written = "is no size; write it like 10G, 512M, 1T or in bytes";
    for (given, why) in [
        ("0", "a disk cannot have size 0".to_owned()),
        ("-1", format!("\"-1\" {written}")),
        ("10Q", format!("\"10Q\" {written}")),
        ("1E", format!("\"1E\" {written}")),
        ("1.5G", format!("\"1.5G\" {written}")),
        ("1e9", format!("\"1e9\" {written}")),
        ("0x1000", format!("\"0x1000\" {written}")),
        ("ten", format!("\"ten\" {written}")),
        ("10GB", "\"10GB\" is ambiguous; write G or GiB, M or MiB (powers of 1024), or bytes".into()),
        ("1000", "1000 bytes is not a multiple of 512; the next ones are 512 and 1024".into()),
        ("511", "511 bytes is not a multiple of 512; the next one is 512".into()),
        ("9999999P", "\"9999999P\" is too large; the most is 8191P".into()),
        ("99999999999999999999", "\"99999999999999999999\" is too large; the most is 8191P".into()),
    ] {
        for words in ["create --primary p", "serve --primary p --socket-path s --create"] {
            ground.refuses_usage(&format!("{words} --size {given}"), &value(given, "--size <SIZE>", &why));
        }
    }
}

#[test]
fn impossible_numbers_are_refused_with_what_is_possible() {
    let ground = Ground::with_volume();
    let serve = "serve --primary disk.img --socket-path s";
    for (words, option, given, possible) in [
        (
            "create --primary p --size 1M",
            "--max-remaps <N>",
            &["0", "15", "-1", "4194305", "5000000000", "5e9", "x"][..],
            "16 to 4194304",
        ),
        ("adopt --primary p", "--max-remaps <N>", &["0", "4194305"], "16 to 4194304"),
        (
            "serve --primary p --socket-path s --create --size 1M",
            "--max-remaps <N>",
            &["0", "4194305"],
            "16 to 4194304",
        ),
        (serve, "--num-queues <N>", &["0", "65", "-1", "65537", "x"], "1 to 64"),
        (serve, "--workers <N>", &["0", "65", "-1", "x"], "1 to 64"),
        (serve, "--log-level <0..3>", &["4", "9", "-1", "256", "x"], "0 to 3"),
        (serve, "--lock-wait <SECONDS>", &["-1", "1.5", "4294967296", "x"], "0 to 4294967295"),
        ("serve --primary disk.img", "--fd <N>", &["0", "1", "2", "-1", "2147483648", "x"], "3 to 2147483647"),
        ("fault add --control-path c", "--count <N>", &["0", "-1", "x"], "1 to 18446744073709551615"),
        ("fault add --control-path c", "--delay <MS>", &["-1", "3600001", "x"], "0 to 3600000"),
        ("fault add --control-path c", "--seed <N>", &["-1", "x"], "0 to 18446744073709551615"),
    ] {
        for given in given {
            let name = option.split(' ').next().unwrap();
            let why = format!("a whole number from {possible} is needed");
            ground.refuses_usage(&format!("{words} {name} {given}"), &value(given, option, &why));
        }
    }
}

#[test]
fn values_that_are_no_numbers_are_refused_with_what_is_possible() {
    let ground = Ground::with_volume();
    let serve = "serve --primary disk.img --socket-path s";
    for (words, option, given, why) in [
        (
            "create --primary p --size 1M --serial",
            "--serial <ID>",
            "123456789012345678901",
            "a serial has 1 to 20 bytes, this one 21",
        ),
        (
            "create --primary p --size 1M --serial",
            "--serial <ID>",
            "ä",
            "a serial has only printable ASCII characters and no spaces",
        ),
        (
            "serve --primary disk.img --socket-path s --on-device-loss",
            "--on-device-loss <fail|hold[=SECONDS]>",
            "wait",
            "\"wait\" is none of fail, hold, hold=SECONDS",
        ),
        (
            "serve --primary disk.img --socket-path s --on-spare-full",
            "--on-spare-full <fail|hold[=SECONDS]>",
            "hold=-1",
            "\"hold=-1\" is none of fail, hold, hold=SECONDS",
        ),
        (
            "fault add --control-path c --probability",
            "--probability <P>",
            "0",
            "\"0\" is no probability above 0 and up to 1",
        ),
        (
            "fault add --control-path c --probability",
            "--probability <P>",
            "-0.5",
            "\"-0.5\" is no probability above 0 and up to 1",
        ),
        (
            "fault add --control-path c --errno",
            "--errno <ERRNO>",
            "EWHAT",
            "\"EWHAT\" is not an error: use a name such as EIO, ENODATA or ETIMEDOUT, or a number from 1 to 4095",
        ),
        (
            "fault add --control-path c --errno",
            "--errno <ERRNO>",
            "0",
            "\"0\" is not an error: use a name such as EIO, ENODATA or ETIMEDOUT, or a number from 1 to 4095",
        ),
        ("fault add --control-path c --sectors", "--sectors <A-B>", "9-3", "\"9-3\" ends before it starts"),
    ] {
        ground.refuses_usage(&format!("{words} {given}"), &value(given, option, why));
    }
    for (words, choices) in [
        (
            format!("{serve} --io-engine magic"),
            "invalid value 'magic' for '--io-engine <ENGINE>' [possible values: auto, io_uring, threads]",
        ),
        (
            format!("{serve} --cache maybe"),
            "invalid value 'maybe' for '--cache <MODE>' [possible values: none, writeback]",
        ),
        (
            "fault add --control-path c --device disk".into(),
            "invalid value 'disk' for '--device <DEVICE>' [possible values: primary, spare]",
        ),
    ] {
        ground.refuses_usage(&words, choices);
    }
    ground.still_serves();
}

#[test]
fn impossible_sectors_are_refused_with_what_is_possible() {
    let ground = Ground::with_volume();
    let written = "is no sector or range of sectors; write it like 17 or 8-15 (both included)";
    for command in ["remap", "verify", "release"] {
        for given in ["x", "-1", "8-", "1-2-3", "0x10", "18446744073709551615", "0-18446744073709551615"] {
            let line = value(given, "<SECTOR>...", &format!("\"{given}\" {written}"));
            ground.refuses_usage(&format!("{command} --control-path c {given}"), &line);
        }
        let line = value("15-8", "<SECTOR>...", "\"15-8\" ends before it starts");
        ground.refuses_usage(&format!("{command} --control-path c 15-8"), &line);
    }
    for given in ["4", "9", "-1", "x"] {
        let line = value(given, "<0..3>", "a whole number from 0 to 3 is needed");
        ground.refuses_usage(&format!("log-level --control-path c {given}"), &line);
    }
}
