use super::*;
use crate::device::sys;

fn quick(read_only: bool) -> OpenOptions {
    OpenOptions { read_only, lock_wait: Duration::from_millis(120), ..OpenOptions::default() }
}

fn file_of(size: u64) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    create_file(&path, size).unwrap();
    (dir, path)
}

fn check_refused(path: &Path, expected: &str) {
    let message = open(path, &quick(false)).unwrap_err().to_string();
    assert!(message.starts_with(&path.display().to_string()), "{message}");
    assert!(message.contains(expected), "{message}");
    assert!(!message.contains('\n'), "{message}");
}

#[test]
fn what_cannot_serve_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    check_refused(&dir.path().join("absent"), "no such file");
    check_refused(dir.path(), "is a directory");
    check_refused(Path::new("/dev/null"), "neither a regular file nor a block device");
    let (_dir, empty) = file_of(0);
    check_refused(&empty, "has 0 bytes");
    let (_dir, ragged) = file_of(5000);
    check_refused(&ragged, "5000 bytes is not a multiple of its 512-byte sectors; extend it: truncate -s 5120 /");
}

#[test]
fn the_geometry_of_a_file() {
    let (_dir, path) = file_of(1 << 20);
    let device = open(&path, &quick(false)).unwrap();
    let geometry = &device.geometry;
    assert_eq!((geometry.size, geometry.kind, geometry.direct), (1 << 20, Kind::File, true));
    assert!([512, 4096].contains(&geometry.logical_block), "{geometry:?}");
    assert!(geometry.mem_align.is_power_of_two() && geometry.mem_align <= 4096, "{geometry:?}");
    drop(device);
    let buffered = open(&path, &OpenOptions { direct: false, ..quick(false) }).unwrap();
    assert_eq!((buffered.geometry.mem_align, buffered.geometry.direct), (1, false));
}

#[test]
fn a_writer_excludes_everyone_and_readers_share() {
    let (_dir, path) = file_of(4096);
    let writer = open(&path, &quick(false)).unwrap();
    for read_only in [false, true] {
        let message = open(&path, &quick(read_only)).unwrap_err().to_string();
        assert!(message.contains(&format!("(pid {})", std::process::id())), "{message}");
    }
    drop(writer);
    let _readers = [open(&path, &quick(true)).unwrap(), open(&path, &quick(true)).unwrap()];
    assert!(matches!(open(&path, &quick(false)), Err(OpenError::InUse { .. })));
}

/// QEMU takes no flock: a disk that it writes has a shared lock on the byte of that permission.
#[test]
fn what_qemu_writes_is_left_alone() {
    let (_dir, path) = file_of(4096);
    let qemu = fs::File::open(&path).unwrap();
    sys::ofd_lock(&qemu, sys::OfdLock::Shared, 101, 1).unwrap();
    for read_only in [false, true] {
        assert!(matches!(open(&path, &quick(read_only)), Err(OpenError::InUse { .. })), "read-only: {read_only}");
    }
    drop(qemu);
    open(&path, &quick(false)).unwrap();
}

#[test]
fn a_file_is_the_same_by_every_path() {
    let (dir, path) = file_of(4096);
    let (link, other) = (dir.path().join("link"), dir.path().join("other"));
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert!(same_file(&path, &link) && !same_file(&path, &other));
    // Neither is there yet: what would be one file is one.
    let absent = dir.path().join("absent");
    assert!(same_file(&other, &dir.path().join(".").join("other")) && !same_file(&other, &absent));
    fs::write(&other, "").unwrap();
    assert!(!same_file(&link, &other));
}

#[test]
fn a_successor_gets_the_lock_once_the_holder_is_gone() {
    let (_dir, path) = file_of(4096);
    let writer = open(&path, &quick(false)).unwrap();
    let leaving = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(150));
        drop(writer);
    });
    open(&path, &OpenOptions { lock_wait: Duration::from_secs(20), ..OpenOptions::default() }).unwrap();
    leaving.join().unwrap();
}

#[test]
fn a_file_is_created_once_and_failures_leave_nothing() {
    let (dir, path) = file_of(4096);
    assert!(matches!(create_file(&path, 4096), Err(OpenError::Exists { .. })));
    let huge = dir.path().join("huge");
    assert!(matches!(create_file(&huge, u64::MAX >> 1), Err(OpenError::TooLarge { .. })));
    assert!(!huge.exists());
    assert!(matches!(create_file(&dir.path().join("no/disk"), 4096), Err(OpenError::NoDirectory { .. })));
}

#[test]
fn a_shrunk_file_is_found_out_and_a_grown_one_taken_over() {
    let (_dir, path) = file_of(8192);
    let device = open(&path, &quick(false)).unwrap();
    assert_eq!(device.identify(), Ok(()));
    device.file.set_len(4096).unwrap();
    assert_eq!(device.identify(), Err(Errno(libc::ENXIO)));
    device.file.set_len(16384).unwrap();
    assert_eq!(device.identify(), Ok(()));
    assert_eq!((device.update_size(), device.size()), (Ok(16384), 16384));
}

#[test]
fn a_file_from_elsewhere_becomes_a_device() {
    let (_dir, path) = file_of(4096);
    let file = File::open(&path).unwrap();
    assert!(matches!(open_file(file, &path, &quick(false)), Err(OpenError::WriteProtected { .. })));
    let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let device = open_file(file, &path, &quick(false)).unwrap();
    assert!(rustix::fs::fcntl_getfl(&device.file).unwrap().contains(OFlags::DIRECT));
}

#[test]
fn who_may_not_is_told_whose_it_is() {
    let (dir, path) = file_of(4096);
    let message = permission(&path, &path).to_string();
    let expected = format!("{0}: permission denied; {0} belongs to user ", path.display());
    assert!(message.starts_with(&expected) && message.contains(" (mode 600)"), "{message}");
    // What cannot be seen lies behind a directory that can.
    let hidden = dir.path().join("no/where");
    let message = permission(&hidden, &hidden).to_string();
    let expected = format!("{}: permission denied; {} belongs to", hidden.display(), dir.path().display());
    assert!(message.starts_with(&expected), "{message}");
}

#[test]
fn groups_are_named() {
    assert_eq!(group_name("root:x:0:\ndisk:x:6:a,b\n", 6), Some("disk".to_owned()));
    assert_eq!(group_name("root:x:0:\n", 6), None);
}
