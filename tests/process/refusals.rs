//! What keeps a server from starting (E4): one line, exit status 1, and nothing written.

use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;

use crate::model::{Model, pattern};
use crate::server::{TRANSPORTS, Volume, done, refusal, vhost_remap};

fn content(volume: &Volume) -> (Vec<u8>, Vec<u8>) {
    (fs::read(&volume.primary).unwrap_or_default(), fs::read(&volume.spare).unwrap_or_default())
}

/// Refused with these words in the reason, and the files are as before.
#[track_caller]
pub(crate) fn check_refused(volume: &Volume, options: &[&str], words: &[&str]) {
    let before = content(volume);
    let why = volume.serve_refused(options);
    for word in words {
        assert!(why.contains(word), "{word:?} is not in {why}");
    }
    assert!(content(volume) == before, "something was written: {why}");
    assert!(!volume.socket().exists());
}

/// A volume that was used and closed: with a remapped block.
pub(crate) fn used() -> Volume {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    Model::written(&mut guest, 960, 256, 1);
    server.order(&["remap", "1000"]);
    drop(guest);
    server.stop();
    volume
}

/// O4, E4.
#[test]
fn a_volume_has_one_server() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    let why = volume.serve_elsewhere_refused(&["--lock-wait", "0"]);
    assert!(why.contains("disk.img"), "{why}");
    let why = volume.serve_elsewhere_refused(&["--lock-wait", "0", "--read-only"]);
    assert!(why.contains("disk.img"), "{why}");
    // A socket somebody listens on is not taken away from him.
    let why = volume.serve_refused(&["--lock-wait", "0"]);
    assert!(why.contains("vm.sock"), "{why}");
    // Nor is anything made over a volume that is served.
    let made = vhost_remap(&["create", "--size", "32M", "--primary", volume.primary.to_str().unwrap()]);
    let why = String::from_utf8_lossy(&made.stderr);
    assert!(made.status.code() == Some(1) && why.contains("still in use by another process"), "{why}");
    assert_eq!(server.guest(1).read(0, 1), Ok(vec![0; 512]));
    // A server that ends makes room for the one that waits for it.
    let waiting = volume.serve_elsewhere(&["--lock-wait", "30"]);
    server.stop();
    let (server, _dir) = waiting.join().unwrap();
    assert_eq!(server.guest(1).read(0, 1), Ok(vec![0; 512]));
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    TRANSPORTS.into_iter().for_each(check_sockets);
}

fn check_sockets(transport: &str) {
    let volume = Volume::create(32, 64);
    let options = ["--transport", transport];
    let server = volume.serve(&options);
    server.kill();
    assert!(volume.socket().exists());
    let server = volume.serve(&options);
    server.stop();
    assert!(!volume.socket().exists());
    let _somebody = UnixListener::bind(volume.socket()).unwrap();
    let why = volume.serve_refused(&options);
    assert!(why.contains("vm.sock"), "{why}");
    fs::remove_file(volume.socket()).unwrap();
    fs::write(volume.socket(), "not a socket").unwrap();
    let why = volume.serve_refused(&options);
    assert!(why.contains("vm.sock"), "{why}");
    assert_eq!(fs::read(volume.socket()).unwrap(), b"not a socket");
}

/// Scenarios 16 and 18.
#[test]
fn wrong_devices_are_refused() {
    let mut volume = used();
    let other = used();
    let (primary, spare) = (volume.primary.clone(), volume.spare.clone());
    volume.spare = other.spare.clone();
    check_refused(&volume, &[], &["disk.img", "belongs to volume"]);
    // Swapped.
    (volume.primary, volume.spare) = (spare.clone(), primary.clone());
    check_refused(&volume, &[], &["no vhost-remap volume"]);
    volume.primary = primary.clone();
    check_refused(&volume, &[], &["is the primary itself"]);
    // Not there.
    volume.spare = volume.dir.path().join("nowhere");
    check_refused(&volume, &[], &["nowhere"]);
    check_refused(&volume, &["--create", "--size", "32M"], &["nowhere", "bring the spare back"]);
    volume.spare = spare;
    volume.primary = volume.dir.path().join("nowhere");
    check_refused(&volume, &[], &["nowhere"]);
    check_refused(&volume, &["--create", "--size", "32M"], &["nowhere", "bring the primary back"]);
    volume.primary = primary;
    volume.serve(&[]).stop();
}

/// Scenario 18.
#[test]
fn devices_that_changed_while_nobody_looked_are_refused() {
    let volume = used();
    let size = fs::metadata(&volume.primary).unwrap().len();
    let file = fs::OpenOptions::new().write(true).open(&volume.primary).unwrap();
    file.set_len(size - 4096).unwrap();
    check_refused(&volume, &[], &["primary", &(size - 4096).to_string(), &size.to_string()]);
    let volume = used();
    let file = fs::OpenOptions::new().write(true).open(&volume.primary).unwrap();
    file.set_len(size + 4096).unwrap();
    check_refused(&volume, &[], &["primary", &(size + 4096).to_string(), &size.to_string()]);
    // Written by another program.
    let volume = used();
    let file = fs::OpenOptions::new().write(true).open(&volume.primary).unwrap();
    file.write_all_at(b"mounted without us", 1000 * 512).unwrap();
    check_refused(&volume, &[], &["changed by another program", "1 blocks"]);
    let volume = used();
    let spare_size = fs::metadata(&volume.spare).unwrap().len();
    let file = fs::OpenOptions::new().write(true).open(&volume.spare).unwrap();
    file.set_len(spare_size / 2).unwrap();
    check_refused(&volume, &[], &["spare", &spare_size.to_string()]);
}

/// E4: an older copy of the spare knows less than the primary's label.
#[test]
fn an_older_spare_is_refused() {
    let volume = used();
    let old = fs::read(&volume.spare).unwrap();
    let server = volume.serve(&[]);
    server.order(&["remap", "2000"]);
    server.stop();
    fs::write(&volume.spare, old).unwrap();
    check_refused(&volume, &[], &["older copy of the spare"]);
}

#[test]
fn nothing_is_made_over_something_that_exists() {
    let volume = used();
    let primary = volume.primary.to_str().unwrap();
    let before = content(&volume);
    for words in [&["create", "--size", "32M"][..], &["create", "--size", "32M", "--force"], &["adopt"]] {
        let why = refusal(&vhost_remap(&[words, &["--primary", primary]].concat()));
        assert!(why.contains("is the primary of vhost-remap volume"), "{why}");
    }
    let blank = Volume::absent();
    fs::write(&blank.primary, vec![0; 16 << 20]).unwrap();
    let path = blank.primary.to_str().unwrap();
    for verb in [&["adopt"][..], &["create", "--size", "8M"]] {
        let words = [verb, &["--primary", path, "--spare", path, "--max-remaps", "64"]].concat();
        let why = refusal(&vhost_remap(&words));
        assert!(why.contains("is the primary itself"), "{why}");
    }
    assert!(content(&volume) == before);
    // `--create` makes a volume once, and then opens it.
    let fresh = Volume::absent();
    for run in 0..2 {
        let server = fresh.serve(&["--create", "--size", "16M", "--max-remaps", "64"]);
        let mut guest = server.guest(1);
        let expected = if run == 0 { vec![0; 512] } else { pattern(77, 1, 1) };
        assert_eq!(guest.read(77, 1), Ok(expected));
        guest.write(77, pattern(77, 1, 1)).unwrap();
        drop(guest);
        server.stop();
    }
    let foreign = Volume::absent();
    fs::write(&foreign.primary, vec![0; 1 << 20]).unwrap();
    fs::write(&foreign.spare, pattern(0, 16 * 2048, 1)).unwrap();
    let why = refusal(&vhost_remap(&["adopt", "--primary", foreign.primary.to_str().unwrap(), "--max-remaps", "64"]));
    assert!(why.contains("--force"), "{why}");
    let words = ["adopt", "--primary", foreign.primary.to_str().unwrap(), "--max-remaps", "64", "--force"];
    done(&vhost_remap(&words));
    foreign.serve(&[]).stop();
}
