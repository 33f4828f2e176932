//! Wrong sockets: taken, of another kind, where none can be; and questions to what is no server.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;

use crate::guest::Guest;
use crate::inputs::Ground;
use crate::server::{Server, refusal, try_output_of};

/// A ground with a volume and one of everything that can be in a socket's way.
fn crowded() -> (Ground, UnixListener) {
    let ground = Ground::with_volume();
    fs::create_dir(ground.path("dir")).unwrap();
    fs::write(ground.path("file"), "precious").unwrap();
    std::os::unix::fs::symlink("file", ground.path("link")).unwrap();
    drop(UnixListener::bind(ground.path("stale")).unwrap());
    let listener = UnixListener::bind(ground.path("live")).unwrap();
    (ground, listener)
}

#[test]
fn serve_refuses_sockets_it_cannot_have() {
    let (ground, listener) = crowded();
    let not_a_socket = "exists and is not a socket; choose another path or remove it";
    let long = "x".repeat(108);
    let almost = "x".repeat(104);
    let too_long = |bytes| format!("the path has {bytes} bytes, a Unix socket path at most 107; choose a shorter one");
    for (words, line) in [
        (
            "--socket-path live".to_owned(),
            "live: is in use by a running server; choose another path or stop that server".to_owned(),
        ),
        ("--socket-path file".into(), format!("file: {not_a_socket}")),
        ("--socket-path link".into(), format!("link: {not_a_socket}")),
        ("--socket-path dir".into(), format!("dir: {not_a_socket}")),
        ("--socket-path disk.img".into(), format!("disk.img: {not_a_socket}")),
        ("--socket-path no/s".into(), "no/s: there is no directory no; create it first".into()),
        ("--socket-path file/s".into(), "file/s: there is no directory file; create it first".into()),
        (format!("--socket-path {long}"), format!("{long}: {}", too_long(108))),
        (format!("--socket-path {almost}"), format!("{almost}.ctl: {}", too_long(108))),
        (
            "--socket-path s --control-path live".into(),
            "live: is in use by a running server; choose another path or stop that server".into(),
        ),
        ("--socket-path s --control-path file".into(), format!("file: {not_a_socket}")),
        ("--socket-path s --control-path disk.img.spare".into(), format!("disk.img.spare: {not_a_socket}")),
        ("--socket-path s --control-path dir".into(), format!("dir: {not_a_socket}")),
        ("--socket-path s --control-path no/c".into(), "no/c: there is no directory no; create it first".into()),
        (format!("--socket-path s --control-path {long}"), format!("{long}: {}", too_long(108))),
        (
            "--socket-path s --control-path s".into(),
            "s: is the front-end's socket too; choose another --control-path".into(),
        ),
        (
            "--socket-path s --control-path ./s".into(),
            "./s: is the front-end's socket too; choose another --control-path".into(),
        ),
    ] {
        ground.refuses(&format!("serve --primary disk.img {words}"), &line);
        ground.refuses(&format!("serve --primary new --create --size 1M {words}"), &line);
    }
    drop(listener);
    ground.still_serves();
}

/// A socket that its server left behind is in nobody's way.
#[test]
fn a_stale_control_socket_is_replaced() {
    let (ground, _listener) = crowded();
    let server = ground.volume.serve(&["--control-path", ground.path("stale").to_str().unwrap()]);
    UnixStream::connect(ground.path("stale")).unwrap();
    server.stop();
    assert!(!ground.path("stale").exists());
}

/// Whoever asks there learns from it that a server ran and has ended.
#[test]
fn a_server_that_is_refused_leaves_stale_sockets_alone() {
    let (ground, _listener) = crowded();
    drop(UnixListener::bind(ground.path("s")).unwrap());
    let line = "nowhere: no such file or device; check the path, or make a volume with `create`";
    ground.refuses("serve --primary nowhere --socket-path s --control-path stale", line);
    let line = "./s: is the front-end's socket too; choose another --control-path";
    ground.refuses("serve --primary disk.img --socket-path s --control-path ./s", line);
}

#[test]
fn serve_refuses_descriptors_that_are_no_sockets() {
    let ground = Ground::with_volume();
    let pass = "pass an open Unix stream socket, listening or connected";
    let closed = format!("Bad file descriptor (os error 9); {pass}");
    ground.refuses("serve --primary disk.img --fd 999", &format!("--fd 999: {closed}"));
    // No number that the program comes to use itself passes for one that was handed over.
    for fd in 3..10 {
        ground.refuses(&format!("serve --primary disk.img --fd {fd}"), &format!("--fd {fd}: {closed}"));
    }
    let (datagram, _peer) = std::os::unix::net::UnixDatagram::pair().unwrap();
    let from_file = fs::File::open(ground.path("disk.img")).unwrap();
    for (handed_over, why) in [
        (std::process::Stdio::from(from_file), "Socket operation on non-socket (os error 88)"),
        (std::os::fd::OwnedFd::from(datagram).into(), "a socket of another kind"),
    ] {
        // The harness closes the standard input of what it runs, so it goes through a shell of its own.
        let mut shell = Command::new("sh");
        shell.args(["-c", r#"exec 3<&1 1>/dev/null; exec "$0" serve --primary disk.img --fd 3"#]);
        shell.arg(env!("CARGO_BIN_EXE_vhost-remap")).current_dir(ground.dir()).stdin(std::process::Stdio::null());
        let output = shell.stdout(handed_over).output().unwrap();
        let line = format!("vhost-remap: --fd 3: {why}; {pass}\n");
        assert_eq!((output.status.code(), String::from_utf8(output.stderr).unwrap()), (Some(1), line));
    }
    ground.still_serves();
}

/// And one that is: as management layers hand it over, listening.
#[test]
fn an_inherited_listener_is_served() {
    let ground = Ground::with_volume();
    let listener = UnixListener::bind(ground.path("inherited")).unwrap();
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-remap"));
    command.arg("serve").arg("--primary").arg(&ground.volume.primary);
    command.args(["--fd", &listener.as_raw_fd().to_string()]);
    let server = Server::start(command, ground.dir()).unwrap();
    drop(listener);
    assert_eq!(Guest::connect(&ground.path("inherited"), 1).read(0, 1), Ok(vec![0; 512]));
    server.stop();
    assert!(ground.path("inherited").exists(), "it is not ours to remove");
}

/// Each client command with sectors, levels and numbers that would be taken.
const CLIENT_COMMANDS: [&str; 18] = [
    "status",
    "status --proc",
    "status --json",
    "list",
    "list --lost",
    "events",
    "events --follow",
    "fault add",
    "fault list",
    "fault clear",
    "fault clear 1",
    "clear",
    "remap 8",
    "verify 8",
    "release 8-15",
    "save",
    "resize",
    "ping",
];

#[test]
fn client_commands_refuse_what_is_no_control_socket() {
    let (ground, _listener) = crowded();
    let nothing = "no control socket there; the server may not be running, or was given another --control-path";
    let other = "is no socket; --control-path names the server's control socket, by default its --socket-path with .ctl appended";
    let long = "x".repeat(108);
    for command in CLIENT_COMMANDS {
        for (path, line) in [
            ("nowhere", nothing.to_owned()),
            ("no/c", nothing.to_owned()),
            ("file/c", nothing.to_owned()),
            ("file", other.to_owned()),
            ("dir", other.to_owned()),
            ("disk.img", other.to_owned()),
            ("stale", "nobody answers on this control socket; the server has ended, start it again".to_owned()),
            (&long, "the path has 108 bytes, a Unix socket path at most 107; use a relative or shorter one".to_owned()),
        ] {
            ground.refuses(&format!("{command} --control-path {path}"), &format!("{path}: {line}"));
        }
    }
    ground.refuses("log-level 1 --control-path nowhere", &format!("nowhere: {nothing}"));
}

#[test]
fn a_client_at_the_front_ends_socket_is_told_so() {
    let ground = Ground::with_volume();
    let server = ground.volume.serve(&[]);
    // Not a look at all files: the server notes in its log that somebody spoke nonsense.
    let why = refusal(&try_output_of(&mut ground.command("ping --control-path vm.sock")).unwrap());
    let line = "vm.sock: the connection broke (connection error); is it the control socket of a server that runs?";
    assert_eq!(why, format!("vhost-remap: {line}\n"));
    assert_eq!(server.guest(1).read(0, 1), Ok(vec![0; 512]));
    server.stop();
}

#[test]
fn a_server_refuses_orders_with_the_disk_and_the_number() {
    let ground = Ground::with_volume();
    let server = ground.volume.serve_with(&[]);
    // What it would write by itself a little later.
    server.order(&["save"]);
    let disk = ground.volume.primary.display();
    for (words, line) in [
        ("remap 8192", format!("{disk}: 1 sectors from 8192 are not all on the disk; its last sector is 8191")),
        ("release 8184-8192", format!("{disk}: 9 sectors from 8184 are not all on the disk; its last sector is 8191")),
        ("verify 8192", format!("{disk}: 1 sectors from 8192 are not all on the disk; its last sector is 8191")),
        (
            "remap 1152921504606846976",
            format!("{disk}: 1 sectors from 1152921504606846976 are not all on the disk; its last sector is 8191"),
        ),
        (
            "remap 1000-1007",
            format!("{disk}: sectors 1000-1007 are already remapped, so there is nothing to do; see `list`"),
        ),
        ("remap 1003", format!("{disk}: sector 1003 is already remapped, so there is nothing to do; see `list`")),
        ("release 992", format!("{disk}: sector 992 is not remapped, so there is nothing to do; see `list`")),
        ("release 0-999", format!("{disk}: sectors 0-999 are not remapped, so there is nothing to do; see `list`")),
        ("clear", format!("{disk}: nothing to clear: no flush has failed and the primary is up")),
        ("fault add", "this server runs without fault injection; restart it with --fault-injection".into()),
        ("fault list", "this server runs without fault injection; restart it with --fault-injection".into()),
        ("fault clear", "this server runs without fault injection; restart it with --fault-injection".into()),
        ("save --volume nowhere", "no volume \"nowhere\"; there are: disk.img".into()),
        ("status --volume nowhere", "no volume \"nowhere\"; there are: disk.img".into()),
    ] {
        ground.refuses(&format!("{words} --control-path vm.sock.ctl"), &line);
    }
    assert_eq!((server.blocks("remapped"), server.events()), (vec![1000], vec![]));
    server.stop();
}
