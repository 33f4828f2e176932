//! Hosts that refuse something: permission, writing, space, direct I/O, io_uring; and devices others use.

use std::fs;
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::disks::{Loop, run};
use crate::inputs::{Ground, check_refused, create, skip};
use crate::server::{Server, try_output_of};

/// A file system of its own, unmounted when dropped.
struct Mount(PathBuf);

impl Mount {
    fn new(kind: &str, options: &str, at: &Path) -> Result<Mount, String> {
        fs::create_dir(at).unwrap();
        run(Command::new("mount").args(["-t", kind, "-o", options, kind]).arg(at))?;
        Ok(Mount(at.to_owned()))
    }

    /// A directory seen from another place, where nothing can be written.
    fn read_only(dir: &Path, at: &Path) -> Result<Mount, String> {
        fs::create_dir(at).unwrap();
        run(Command::new("mount").arg("--bind").args([dir, at]))?;
        let mount = Mount(at.to_owned());
        run(Command::new("mount").args(["-o", "remount,bind,ro"]).arg(at))?;
        Ok(mount)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// The program in the ground's directory as somebody who may nothing. Whatever directories lie above it, it
/// is reached by the working directory, and the program by a descriptor.
fn as_nobody(ground: &Ground, words: &str) -> Command {
    let mut command = Command::new("sh");
    let script = r#"exec 9<"$0"; exec setpriv --reuid=65534 --regid=65534 --clear-groups /proc/self/fd/9 "$@""#;
    command.args(["-c", script, env!("CARGO_BIN_EXE_vhost-remap")]).current_dir(ground.dir()).args(words.split(' '));
    command
}

#[test]
fn without_permission_the_path_and_its_group_are_named() {
    let name = "without_permission_the_path_and_its_group_are_named";
    if !rustix::process::geteuid().is_root() {
        return skip(name, "not root, so nobody else to become");
    }
    let ground = Ground::with_volume();
    ground.zeros("zeros", 4 << 20);
    fs::create_dir(ground.path("open")).unwrap();
    fs::create_dir(ground.path("closed")).unwrap();
    fs::copy(ground.path("zeros"), ground.path("closed/zeros")).unwrap();
    for (path, mode) in [(".", 0o755), ("open", 0o777), ("closed", 0o700), ("zeros", 0o640), ("closed/zeros", 0o666)] {
        fs::set_permissions(ground.path(path), fs::Permissions::from_mode(mode)).unwrap();
    }
    if let Err(why) = run(&mut as_nobody(&ground, "--version")) {
        return skip(name, why);
    }
    let join = "join the group or change the mode";
    let volume = "(mode 600)";
    let belongs = "belongs to user 0 and group root";
    let file = |name: &str, mode: &str| format!("{name}: permission denied; {name} {belongs} {mode}: {join}");
    let behind = |name: &str, directory: &str, mode: &str| {
        format!("{name}: permission denied; {directory} {belongs} (mode {mode}): {join}")
    };
    let elsewhere = "choose a directory that you may write to";
    for (words, line) in [
        ("create --primary new --size 1M", behind("new", ".", "755")),
        ("create --primary zeros --size 1M --max-remaps 16", file("zeros", "(mode 640)")),
        ("create --primary closed/new --size 1M", behind("closed/new", "closed", "700")),
        ("create --primary open/new --spare new --size 1M --max-remaps 16", behind("new", ".", "755")),
        ("adopt --primary zeros --spare open/spare", file("zeros", "(mode 640)")),
        ("adopt --primary closed/zeros --spare open/spare", behind("closed/zeros", "closed", "700")),
        ("serve --primary disk.img --socket-path open/s", file("disk.img", volume)),
        ("serve --primary disk.img --socket-path open/s --read-only", file("disk.img", volume)),
        ("serve --primary closed/zeros --socket-path open/s", behind("closed/zeros", "closed", "700")),
        ("serve --primary new --create --size 1M --socket-path open/s", behind("new", ".", "755")),
        (
            "serve --primary disk.img --socket-path s",
            format!("s: permission denied; . belongs to group root (mode 0755): {elsewhere}"),
        ),
        (
            "serve --primary disk.img --socket-path closed/s",
            format!("closed/s: permission denied; closed belongs to group root (mode 0700): {elsewhere}"),
        ),
        (
            "serve --primary disk.img --socket-path open/s --control-path c",
            format!("c: permission denied; . belongs to group root (mode 0755): {elsewhere}"),
        ),
    ] {
        check_refused(ground.dir(), &mut as_nobody(&ground, words), 1, &line);
    }
    let server = ground.volume.serve(&[]);
    // What it would write by itself a little later.
    server.order(&["save"]);
    let line = "vm.sock.ctl: permission denied; vm.sock.ctl belongs to group root (mode 0660): run as a member of that group, or as root";
    check_refused(ground.dir(), &mut as_nobody(&ground, "ping --control-path vm.sock.ctl"), 1, line);
    server.stop();
    ground.still_serves();
}

#[test]
fn what_cannot_be_written_is_not_served_for_writing() {
    let name = "what_cannot_be_written_is_not_served_for_writing";
    let ground = Ground::empty();
    fs::create_dir(ground.path("rw")).unwrap();
    let zeros = ground.zeros("rw/zeros", 4 << 20);
    ground.zeros("rw/raw", 1 << 20);
    create(&ground.path("rw/disk"), &ground.path("rw/disk.spare"), "4M");
    let _mount = match Mount::read_only(&ground.path("rw"), &ground.path("ro")) {
        Ok(mount) => mount,
        Err(why) => return skip(name, why),
    };
    let protected = "is write-protected, or on a read-only file system; make it writable, or `serve --read-only`";
    let elsewhere = "is on a read-only file system; choose another place";
    for (words, line) in [
        ("serve --socket-path s --primary ro/disk", format!("ro/disk: {protected}")),
        ("serve --socket-path s --primary ro/new --create --size 1M", format!("ro/new: {elsewhere}")),
        ("create --primary ro/new --size 1M", format!("ro/new: {elsewhere}")),
        ("create --primary ro/zeros --spare spare --size 1M --max-remaps 16", format!("ro/zeros: {protected}")),
        ("create --primary new --spare ro/spare --size 1M", format!("ro/spare: {elsewhere}")),
        ("adopt --primary ro/zeros", format!("ro/zeros.spare: {elsewhere}")),
        ("adopt --primary ro/raw --spare ro/zeros --max-remaps 16", format!("ro/zeros: {protected}")),
        (
            "serve --socket-path ro/s --primary ro/disk",
            "ro/s: is on a read-only file system; choose another path, such as one under /run".into(),
        ),
    ] {
        ground.refuses(words, &line);
    }
    // Nothing needs to be written for that.
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-remap"));
    command.args(["serve", "--read-only", "--socket-path"]).arg(ground.path("vm.sock")).arg("--primary");
    command.arg(ground.path("ro/disk"));
    Server::start(command, ground.dir()).unwrap().stop();
    assert!(zeros.exists());
}

/// `chattr +i`, taken back when dropped.
struct Immutable(PathBuf);

impl Drop for Immutable {
    fn drop(&mut self) {
        let _ = Command::new("chattr").arg("-i").arg(&self.0).status();
    }
}

#[test]
fn immutable_files_are_not_served_for_writing() {
    let ground = Ground::with_volume();
    ground.zeros("zeros", 4 << 20);
    ground.zeros("raw", 1 << 20);
    let line = |path| {
        format!("{path}: is immutable (see lsattr) or protected by the kernel; `chattr -i` it, or `serve --read-only`")
    };
    for (path, commands) in [
        ("disk.img", &["serve --socket-path s --primary disk.img"][..]),
        ("disk.img.spare", &["serve --socket-path s --primary disk.img"]),
        (
            "zeros",
            &[
                "create --primary zeros --size 1M --spare new --max-remaps 16",
                "create --primary new --size 1M --spare zeros --max-remaps 16",
                "adopt --primary raw --spare zeros --max-remaps 16",
            ],
        ),
    ] {
        if let Err(why) = run(Command::new("chattr").arg("+i").arg(ground.path(path))) {
            return skip("immutable_files_are_not_served_for_writing", why);
        }
        let _guard = Immutable(ground.path(path));
        for words in commands {
            ground.refuses(words, &line(path));
        }
    }
    ground.still_serves();
}

#[test]
fn without_space_nothing_is_left_behind() {
    let name = "without_space_nothing_is_left_behind";
    let ground = Ground::empty();
    let _mount = match Mount::new("tmpfs", "size=4m", &ground.path("full")) {
        Ok(mount) => mount,
        Err(why) => return skip(name, why),
    };
    ground.zeros("zeros", 4 << 20);
    ground.zeros("empty", 0);
    let line = "full/spare: no space for 69206016 bytes; free some or choose another place";
    for words in [
        "create --primary new --spare full/spare --size 4M",
        "create --primary empty --spare full/spare --size 4M",
        "create --primary full/new --spare full/spare --size 4M",
        "adopt --primary zeros --spare full/spare",
        "serve --socket-path s --create --size 4M --primary new --spare full/spare",
        "serve --socket-path full/s --create --size 4M --primary full/new --spare full/spare",
    ] {
        ground.refuses(words, line);
    }
    // Not even the label's few pages. On a disk of its own: one gets the space of removed files back late.
    let _mount = match Mount::new("tmpfs", "size=1m", &ground.path("fuller")) {
        Ok(mount) => mount,
        Err(why) => return skip(name, why),
    };
    fs::write(ground.path("fuller/filler"), vec![1; 2 << 20]).unwrap_err();
    let line = "fuller/new: no space for 1048576 bytes; free some or choose another place";
    for words in ["create", "serve --socket-path s --create"] {
        ground.refuses(&format!("{words} --primary fuller/new --spare spare --size 4M --max-remaps 16"), line);
    }
}

#[test]
fn file_systems_without_direct_io_are_named() {
    let name = "file_systems_without_direct_io_are_named";
    let ground = Ground::with_volume();
    let _mount = match Mount::new("ramfs", "mode=755", &ground.path("ram")) {
        Ok(mount) => mount,
        Err(why) => return skip(name, why),
    };
    ground.zeros("zeros", 4 << 20);
    for file in ["zeros", "disk.img", "disk.img.spare"] {
        fs::copy(ground.path(file), ground.path("ram").join(file)).unwrap();
    }
    let line = |path: &str| {
        format!(
            "{path}: its file system has no direct I/O (O_DIRECT); move it to one that has, such as ext4, xfs or btrfs"
        )
    };
    for (words, path) in [
        ("create --primary ram/new --size 1M --max-remaps 16", "ram/new"),
        ("create --primary new --spare ram/spare --size 1M --max-remaps 16", "ram/spare"),
        ("adopt --primary ram/zeros --spare spare --max-remaps 16", "ram/zeros"),
        ("adopt --primary zeros --spare ram/spare --max-remaps 16", "ram/spare"),
        ("serve --socket-path s --primary ram/disk.img", "ram/disk.img"),
        ("serve --socket-path s --primary disk.img --spare ram/disk.img.spare", "ram/disk.img.spare"),
        ("serve --socket-path s --primary ram/disk.img --read-only", "ram/disk.img"),
        ("serve --socket-path s --primary ram/new --create --size 1M", "ram/new"),
    ] {
        ground.refuses(words, &line(path));
    }
    // With the page cache the primary would do, but metadata is always written with direct I/O.
    let words = "serve --socket-path s --primary ram/disk.img --cache writeback --log-level 0";
    let output = try_output_of(&mut ground.command(words)).unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    let last = format!("vhost-remap: {}", line("ram/disk.img.spare"));
    assert_eq!((output.status.code(), stderr.lines().last()), (Some(1), Some(&*last)), "{stderr}");
    ground.still_serves();
}

/// The program where the kernel answers EPERM to io_uring_setup, as in most containers.
fn without_io_uring(mut command: Command) -> Command {
    crate::seccomp::deny(&mut command, libc::SYS_io_uring_setup, libc::EPERM);
    command
}

#[test]
fn without_io_uring_threads_do_its_work_unless_it_was_asked_for() {
    let ground = Ground::with_volume();
    let words = |words: &str| without_io_uring(ground.command(words));
    let line = "io_uring cannot be used on this host: Operation not permitted (os error 1); allow it (kernel.io_uring_disabled, seccomp) or use --io-engine threads";
    for given in ["--primary disk.img", "--primary new --create --size 1M", "--primary disk.img --passthrough"] {
        let mut command = words(&format!("serve --socket-path s --io-engine io_uring {given}"));
        check_refused(ground.dir(), &mut command, 1, line);
    }
    for engine in ["auto", "threads"] {
        let command = without_io_uring(ground.volume.command(&["--io-engine", engine]));
        let server = Server::start(command, ground.dir()).unwrap();
        let why = if engine == "auto" {
            "threads (io_uring cannot be used on this host: Operation not permitted (os error 1))"
        } else {
            "threads (as asked for)"
        };
        assert!(server.announcement.contains(why), "{}", server.announcement);
        assert_eq!(server.status().io_engine, why);
        assert_eq!(server.guest(1).read(0, 1), Ok(vec![0; 512]));
        server.stop();
    }
    // Making a volume needs none.
    run(&mut words("create --primary new --size 1M --max-remaps 16")).unwrap();
}

/// Whoever has a device for himself is not disturbed, and named where the kernel names him.
#[test]
fn devices_in_use_are_left_to_those_who_use_them() {
    let ground = Ground::with_volume();
    ground.zeros("zeros", 8 << 20);
    let server = ground.volume.serve(&["--log-level", "0"]);
    // What it would write by itself a little later.
    server.order(&["save"]);
    let pid = server.pid();
    let in_use = |path: &str, seconds| {
        format!(
            "{path}: still in use by another process (pid {pid}) after {seconds} s; stop that process or unmount the device"
        )
    };
    std::thread::scope(|scope| {
        for (words, line) in [
            ("serve --socket-path s --lock-wait 0 --primary disk.img", in_use("disk.img", 0)),
            ("serve --socket-path s --lock-wait 0 --primary disk.img --read-only", in_use("disk.img", 0)),
            ("serve --socket-path s --lock-wait 0 --primary disk.img --passthrough", in_use("disk.img", 0)),
            ("serve --socket-path s --lock-wait 0 --primary zeros --spare disk.img.spare", in_use("disk.img.spare", 0)),
            (
                "serve --socket-path vm.sock --lock-wait 0 --primary disk.img",
                "vm.sock: is in use by a running server; choose another path or stop that server".to_owned(),
            ),
        ] {
            ground.refuses(words, &line);
        }
        // These wait a little for udev, and are in nobody's way meanwhile.
        for (words, line) in [
            ("adopt --primary disk.img --spare new --max-remaps 16", in_use("disk.img", 5)),
            (
                "create --primary zeros --spare disk.img.spare --size 1M --max-remaps 16 --force",
                in_use("disk.img.spare", 5),
            ),
        ] {
            let mut command = ground.command(words);
            scope.spawn(move || {
                let output = try_output_of(&mut command).unwrap();
                let stderr = String::from_utf8(output.stderr).unwrap();
                let last = stderr.lines().last().unwrap_or_default();
                assert_eq!((output.status.code(), last), (Some(1), &*format!("vhost-remap: {line}")), "{stderr}");
            });
        }
    });
    assert!(!ground.path("new").exists());
    server.stop();
    ground.still_serves();
}

/// QEMU, until dropped.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Qemu {
    /// Export an image for writing; comes back when it is exported, and therefore locked.
    fn export(image: &Path) -> io::Result<Qemu> {
        let mut daemon = Command::new("qemu-storage-daemon");
        daemon.arg("--blockdev").arg(format!("driver=file,node-name=disk,filename={}", image.display()));
        daemon.arg("--nbd-server").arg(format!("addr.type=unix,addr.path={}.nbd", image.display()));
        daemon.args(["--export", "type=nbd,id=export,node-name=disk,writable=on,name=disk"]);
        // The monitor greets once all options have been carried out.
        daemon.args(["--chardev", "stdio,id=monitor", "--monitor", "chardev=monitor"]);
        let mut qemu = Qemu(daemon.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?);
        let greeting =
            io::BufRead::read_line(&mut io::BufReader::new(qemu.0.stdout.take().unwrap()), &mut String::new())?;
        if greeting == 0 {
            return Err(io::Error::other("it ended at once"));
        }
        Ok(qemu)
    }
}

#[test]
fn an_image_that_qemu_uses_is_left_to_it() {
    let ground = Ground::with_volume();
    for path in ["disk.img", "disk.img.spare"] {
        let qemu = match Qemu::export(&ground.path(path)) {
            Ok(qemu) => qemu,
            Err(error) => {
                return skip("an_image_that_qemu_uses_is_left_to_it", format_args!("qemu-storage-daemon: {error}"));
            }
        };
        let line =
            format!("{path}: still in use by another process after 0 s; stop that process or unmount the device");
        for more in ["", " --read-only"] {
            ground.refuses(&format!("serve --socket-path s --lock-wait 0 --primary disk.img{more}"), &line);
        }
        drop(qemu);
    }
    ground.still_serves();
}

/// Nor a block device that is mounted or in an array: whoever has it so has opened it for himself.
#[test]
fn a_block_device_in_use_is_left_to_those_who_use_it() {
    let name = "a_block_device_in_use_is_left_to_those_who_use_it";
    let ground = Ground::with_volume();
    ground.zeros("zeros", 8 << 20);
    let disk = match Loop::attach(&ground.path("zeros"), &[]) {
        Ok(disk) => disk,
        Err(reason) => return skip(name, reason),
    };
    let path = disk.path.display();
    let user = fs::File::options().read(true).custom_flags(libc::O_EXCL).open(&disk.path).unwrap();
    let line = format!("{path}: still in use by another process after 0 s; stop that process or unmount the device");
    for devices in [format!("--primary {path} --spare disk.img.spare"), format!("--primary disk.img --spare {path}")] {
        ground.refuses(&format!("serve --socket-path s --lock-wait 0 {devices}"), &line);
    }
    drop(user);
    run(&mut ground.command(&format!("adopt --primary {path} --spare new --max-remaps 16"))).unwrap();
    ground.still_serves();
}
