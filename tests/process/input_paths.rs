//! Wrong files: missing, of another kind, of an impossible size, each other, of other formats.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Command;

use crate::inputs::{Ground, check_refused, skip};
use crate::server::try_output_of;

/// A ground with one of everything that is no disk.
fn oddities() -> Ground {
    let ground = Ground::with_volume();
    fs::create_dir(ground.path("dir")).unwrap();
    ground.zeros("empty", 0);
    ground.zeros("ragged", 1000);
    ground.zeros("small", 1 << 20);
    ground.zeros("zeros", 8 << 20);
    fs::write(ground.path("raw"), vec![7; 1 << 20]).unwrap();
    fs::hard_link(ground.path("disk.img"), ground.path("hard")).unwrap();
    fs::hard_link(ground.path("zeros"), ground.path("zeros2")).unwrap();
    std::os::unix::fs::symlink("disk.img", ground.path("link")).unwrap();
    std::os::unix::fs::symlink("nowhere", ground.path("dangling")).unwrap();
    done_by(Command::new("mkfifo").arg(ground.path("pipe")));
    ground
}

#[track_caller]
fn done_by(command: &mut Command) {
    let output = try_output_of(command).unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn create_refuses_what_cannot_become_a_volume() {
    let ground = oddities();
    for (words, line) in [
        ("--primary no/p --size 1M", "no/p: there is no directory no; make it first"),
        ("--primary p --spare no/s --size 1M", "no/s: there is no directory no; make it first"),
        ("--primary disk.img/p --size 1M", "disk.img/p: there is no directory disk.img; make it first"),
        ("--primary dir --size 1M", "dir: is a directory; name a file or block device"),
        ("--primary new/ --size 1M", "new/: is a directory; name a file or block device"),
        ("--primary p --spare dir --size 1M", "dir: is a directory; name a file or block device"),
        ("--primary empty --spare dir --size 1M", "dir: is a directory; name a file or block device"),
        ("--primary pipe --size 1M", "pipe: is neither a regular file nor a block device; name one"),
        (
            "--primary p --spare /dev/null --size 1M",
            "/dev/null: is neither a regular file nor a block device; name one",
        ),
        ("--primary dangling --size 1M", "dangling: exists already; remove it or choose another path"),
        ("--primary p --spare p --size 1M", "p: is the primary itself; name another spare"),
        ("--primary p --spare ./p --size 1M", "./p: is the primary itself; name another spare"),
        ("--primary zeros --spare zeros2 --size 1M", "zeros2: is the primary itself; name another spare"),
        ("--primary disk.img --spare link --size 1M", "link: is the primary itself; name another spare"),
        (
            "--primary disk.img --size 4M",
            "disk.img: is the primary of vhost-remap volume …, made …Z: serve it with its spare, or wipe it first to lose it",
        ),
        (
            "--primary disk.img --size 4M --spare new --force",
            "disk.img: is the primary of vhost-remap volume …, made …Z: serve it with its spare, or wipe it first to lose it",
        ),
        ("--primary raw --size 4M", "raw: is not empty (some data); `adopt` keeps its content, or wipe it first"),
        (
            "--primary p --spare disk.img.spare --size 4M",
            "disk.img.spare: is not empty (a vhost-remap spare); name another spare, or --force to lose what it holds",
        ),
        (
            "--primary zeros --size 8M",
            "zeros: has 8388608 bytes, and a disk of 8388608 with its label needs 9437184; choose a smaller --size",
        ),
        (
            "--primary ragged --size 512",
            "ragged: has 1000 bytes, and a disk of 512 with its label needs 1052672; choose a smaller --size",
        ),
        (
            "--primary p --spare empty --size 1M",
            "empty: has 0 bytes; remove it so that it is made, or extend it: truncate -s 69206016 empty",
        ),
        (
            "--primary empty --spare small --size 1M --max-remaps 16",
            "small: has 1048576 bytes, and 16 remaps need 3145728; use a larger one, or fewer with --max-remaps",
        ),
        (
            "--primary p --size 8191P",
            "p: 9222246136947933184 bytes is more than a volume can have; choose a size below 4096T",
        ),
        (
            "--primary empty --size 8191P",
            "empty: 9222246136947933184 bytes is more than a volume can have; choose a size below 4096T",
        ),
    ] {
        ground.refuses(&format!("create {words}"), line);
    }
    // A spare whose last sector is cut off is found out only when it is opened: the primary goes again.
    ground.zeros("cut", (4 << 20) - 100);
    ground.refuses(
        "create --primary empty --spare cut --size 1M --max-remaps 16",
        "cut: 4194204 bytes is not a multiple of its 512-byte sectors; extend it: truncate -s 4194304 cut",
    );
    ground.refuses(
        "create --primary p --spare cut --size 1M --max-remaps 16",
        "cut: 4194204 bytes is not a multiple of its 512-byte sectors; extend it: truncate -s 4194304 cut",
    );
    ground.still_serves();
}

#[test]
fn adopt_refuses_what_is_no_disk() {
    let ground = oddities();
    let belongs = "disk.img: is the primary of vhost-remap volume …, made …Z; its list of …Z has 1 remapped blocks, whose newest data is on its spare: serve it with that, or --force to lose what the spare holds";
    for (words, line) in [
        ("--primary nowhere", "nowhere: no such file or device; check the path, or make a volume with `create`"),
        ("--primary dangling", "dangling: no such file or device; check the path, or make a volume with `create`"),
        ("--primary no/p", "no/p: there is no directory no; make it first"),
        ("--primary zeros --spare no/s", "no/s: there is no directory no; make it first"),
        ("--primary dir", "dir: is a directory; name a file or block device"),
        ("--primary zeros --spare dir", "dir: is a directory; name a file or block device"),
        ("--primary pipe", "pipe: is neither a regular file nor a block device; name one"),
        (
            "--primary empty",
            "empty: has 0 bytes, so there is no disk in it; check the path or the drive, or `create` a volume of a size",
        ),
        (
            "--primary ragged",
            "ragged: 1000 bytes is not a multiple of its 512-byte sectors; extend it: truncate -s 1024 ragged",
        ),
        ("--primary zeros --spare zeros", "zeros: is the primary itself; name another spare"),
        ("--primary zeros --spare zeros2", "zeros2: is the primary itself; name another spare"),
        ("--primary disk.img --spare link", "link: is the primary itself; name another spare"),
        (
            "--primary zeros --spare empty",
            "empty: has 0 bytes; remove it so that it is made, or extend it: truncate -s 69206016 empty",
        ),
        (
            "--primary zeros --spare small",
            "small: has 1048576 bytes, and 16384 remaps need 69206016; use a larger one, or fewer with --max-remaps",
        ),
        (
            "--primary raw --spare disk.img.spare",
            "disk.img.spare: is not empty (a vhost-remap spare); name another spare, or --force to lose what it holds",
        ),
        // Before anything is said of the spare, which may well be that of the same volume.
        ("--primary disk.img", belongs),
        ("--primary disk.img --spare new", belongs),
        ("--primary disk.img --spare small", belongs),
    ] {
        ground.refuses(&format!("adopt {words}"), line);
    }
    ground.still_serves();
}

#[test]
fn serve_refuses_what_is_no_volume() {
    let ground = oddities();
    let missing = "no such file or device; check the path, or make a volume with `create`";
    let not_ours = "the spare holds no vhost-remap volume; make one with `create` or `adopt`, or name the right spare";
    for (words, line) in [
        ("--primary nowhere", format!("nowhere: {missing}")),
        ("--primary no/p", "no/p: there is no directory no; make it first".into()),
        ("--primary dir", "dir: is a directory; name a file or block device".into()),
        ("--primary pipe", "pipe: is neither a regular file nor a block device; name one".into()),
        ("--primary disk.img --spare dir", "dir: is a directory; name a file or block device".into()),
        (
            "--primary empty",
            "empty: has 0 bytes, so there is no disk in it; check the path or the drive, or `create` a volume of a size"
                .into(),
        ),
        (
            "--primary ragged --spare disk.img.spare",
            "ragged: 1000 bytes is not a multiple of its 512-byte sectors; extend it: truncate -s 1024 ragged".into(),
        ),
        (
            "--primary disk.img --spare empty",
            "empty: has 0 bytes, so there is no disk in it; check the path or the drive, or `create` a volume of a size"
                .into(),
        ),
        (
            "--primary disk.img --spare nowhere",
            "nowhere: missing, and disk.img exists: bring the spare back; or read what the primary holds with `serve --degraded`; or, if it never had one, `adopt` it".into(),
        ),
        (
            "--primary zeros",
            "zeros.spare: missing, and zeros exists: bring the spare back; or read what the primary holds with `serve --degraded`; or, if it never had one, `adopt` it".into(),
        ),
        ("--primary disk.img --spare zeros", format!("disk.img with spare zeros: {not_ours}")),
        ("--primary disk.img --spare small", format!("disk.img with spare small: {not_ours}")),
        ("--primary disk.img --spare disk.img", "disk.img: is the primary itself; name another spare".into()),
        ("--primary disk.img --spare hard", "hard: is the primary itself; name another spare".into()),
        ("--primary link --spare disk.img", "disk.img: is the primary itself; name another spare".into()),
        (
            "--primary zeros --spare disk.img.spare",
            "zeros with spare disk.img.spare: the primary has 8388608 bytes and the volume was made with 5242880, and no label lies where it did; shrink it back, or name the right one"
                .into(),
        ),
        (
            "--primary small --spare disk.img.spare",
            "small with spare disk.img.spare: the primary has 1048576 bytes and the volume was made with 5242880; extend it back, or name the right one"
                .into(),
        ),
        ("--primary dir --passthrough", "dir: is a directory; name a file or block device".into()),
        ("--primary nowhere --passthrough", format!("nowhere: {missing}")),
    ] {
        for more in ["", " --read-only"] {
            ground.refuses(&format!("serve --socket-path s {words}{more}"), &line);
        }
    }
    ground.still_serves();
}

#[test]
fn serve_with_create_makes_nothing_of_half_a_pair() {
    let ground = oddities();
    let missing = "bring the spare back; or read what the primary holds with `serve --degraded`; or, if it never had one, `adopt` it";
    for (words, line) in [
        ("--primary no/p", "no/p: there is no directory no; make it first".into()),
        ("--primary p --spare no/s", "no/s: there is no directory no; make it first".into()),
        ("--primary dir", "dir: is a directory; name a file or block device".into()),
        ("--primary p --spare dir", "dir: is a directory; name a file or block device".into()),
        ("--primary p --spare p", "p: is the primary itself; name another spare".into()),
        ("--primary disk.img --spare hard", "hard: is the primary itself; name another spare".into()),
        ("--primary disk.img --spare nowhere", format!("nowhere: missing, and disk.img exists: {missing}")),
        ("--primary zeros", format!("zeros.spare: missing, and zeros exists: {missing}")),
        (
            "--primary p --spare disk.img.spare",
            "p: missing, and its spare disk.img.spare exists: bring the primary back, or remove the spare too".into(),
        ),
        (
            "--primary p --spare zeros",
            "p: missing, and its spare zeros exists: bring the primary back, or remove the spare too".into(),
        ),
    ] {
        ground.refuses(&format!("serve --socket-path s --create --size 1M {words}"), &line);
    }
    ground.refuses(
        "serve --socket-path s --create --size 8191P --primary p",
        "p: 9222246136947933184 bytes is more than a volume can have; choose a size below 4096T",
    );
    ground.still_serves();
}

/// A block device has no place beside it for a spare, and may be one that is not there.
#[test]
fn block_devices_need_a_spare_and_a_driver() {
    let ground = Ground::with_volume();
    // Major numbers from 120 on are for local use: no driver has this one.
    let output = try_output_of(Command::new("mknod").arg(ground.path("node")).args(["b", "120", "7"])).unwrap();
    if !output.status.success() {
        return skip("block_devices_need_a_spare_and_a_driver", String::from_utf8_lossy(&output.stderr).trim());
    }
    let line = "node: is a block device: say where its spare is with --spare";
    let missing = "node: no such file or device; check the path, or make a volume with `create`";
    for words in ["create --size 1M", "adopt", "serve --socket-path s", "serve --socket-path s --create --size 1M"] {
        check_refused(ground.dir(), &mut ground.command(&format!("{words} --primary node")), 2, line);
        ground.refuses(&format!("{words} --primary node --spare disk.img.spare"), missing);
    }
    ground.refuses("serve --socket-path s --primary disk.img --spare node", missing);
    ground.zeros("zeros", 1 << 20);
    ground.refuses("adopt --primary zeros --spare node", missing);
    ground.refuses("create --primary p --size 1M --spare node", missing);
}

/// Images in formats of their own, as `qemu-img` makes them.
#[test]
fn images_that_are_not_raw_are_refused_with_the_line_that_converts_them() {
    let name = "images_that_are_not_raw_are_refused_with_the_line_that_converts_them";
    let ground = Ground::with_volume();
    ground.zeros("zeros", 1 << 20);
    for (format, what) in [
        ("qcow2", "a qcow2 image"),
        ("vmdk", "a VMDK image"),
        ("vhdx", "a VHDX image"),
        ("vpc", "a VHD image"),
        ("vdi", "a VDI image"),
        ("qed", "a QED image"),
        ("parallels", "a Parallels image"),
    ] {
        let image = format!("disk.{format}");
        let mut make = Command::new("qemu-img");
        make.args(["create", "-q", "-f", format]).arg(ground.path(&image)).arg("16M");
        match try_output_of(&mut make) {
            Err(error) => return skip(name, format_args!("qemu-img: {error}")),
            Ok(output) if !output.status.success() => {
                let reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                skip(&format!("{name} ({format})"), reason);
                continue;
            }
            Ok(_) => {}
        }
        let line = format!(
            "{image}: is {what}, not a raw disk; convert it: qemu-img convert -f {format} -O raw {image} {image}.raw"
        );
        for words in ["adopt", "create --size 1M", "serve --socket-path s", "serve --socket-path s --create --size 1M"]
        {
            ground.refuses(&format!("{words} --primary {image}"), &line);
        }
        // As a spare it is data of somebody's.
        for words in ["adopt --primary zeros", "create --size 1M --primary p"] {
            let line = format!("{image}: is not empty ({what}); name another spare, or --force to lose what it holds");
            ground.refuses(&format!("{words} --spare {image}"), &line);
        }
    }
    ground.still_serves();
}

/// A guest may put anything into its first sectors; that is no reason not to serve it.
#[test]
fn a_disk_that_begins_like_an_image_is_served() {
    let ground = Ground::with_volume();
    let server = ground.volume.serve(&[]);
    let mut sector = vec![0; 512];
    sector[..4].copy_from_slice(b"QFI\xfb");
    server.guest(1).write(0, sector).unwrap();
    server.stop();
    ground.still_serves();
}

#[test]
fn a_spare_with_a_foreign_signature_needs_force() {
    let ground = Ground::empty();
    let disk = ground.zeros("disk", 1 << 20);
    let spare = ground.zeros("foreign", 4 << 20);
    let known: [(&str, &[u8], u64); 12] = [
        ("an ext2/3/4 file system", b"\x53\xef", 1080),
        ("an xfs file system", b"XFSB", 0),
        ("a btrfs file system", b"_BHRfS_M", 65_600),
        ("an f2fs file system", b"\x10\x20\xf5\xf2", 1024),
        ("a squashfs file system", b"hsqs", 0),
        ("an ISO 9660 file system", b"CD001", 32_769),
        ("a LUKS volume", b"LUKS\xba\xbe", 0),
        ("an LVM physical volume", b"LABELONE", 512),
        ("an md array member", b"\xfc\x4e\x2b\xa9", 4096),
        ("a swap space", b"SWAPSPACE2", 4086),
        ("a GPT partition table", b"EFI PART", 512),
        ("a partition table or boot sector", b"\x55\xaa", 510),
    ];
    let check = |what: &str| {
        let line = format!("foreign: is not empty ({what}); name another spare, or --force to lose what it holds");
        for words in ["adopt --primary disk", "create --primary p --size 1M"] {
            ground.refuses(&format!("{words} --spare foreign --max-remaps 16"), &line);
        }
    };
    for (what, magic, offset) in known {
        let file = fs::File::create(&spare).unwrap();
        file.set_len(4 << 20).unwrap();
        file.write_all_at(magic, offset).unwrap();
        check(what);
    }
    let file = fs::File::create(&spare).unwrap();
    file.set_len(4 << 20).unwrap();
    file.write_all_at(b"x", (4 << 20) - 1).unwrap();
    check("some data");
    // As the real program makes it.
    match try_output_of(Command::new("mkfs.ext4").arg("-qF").arg(&spare)) {
        Ok(output) if output.status.success() => check("an ext2/3/4 file system"),
        _ => skip("a_spare_with_a_foreign_signature_needs_force (mkfs)", "no mkfs.ext4"),
    }
    let forced = "adopt --primary disk --spare foreign --max-remaps 16 --force";
    done_by(&mut ground.command(forced));
    assert!(fs::read(&disk).unwrap().iter().all(|byte| *byte == 0));
}
