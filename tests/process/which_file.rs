//! From a lost sector to the guest's file that lies on it: what `list` says, and the commands of the README.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::disks::{run, skip};
use crate::faults::failing;
use crate::model::pattern;
use crate::server::{Volume, done, vhost_remap};

/// Sectors of the file, each of which has a content of its own.
const FILE_SECTORS: u64 = 64;

/// The blocks of shell commands in the README's section about this, in order.
fn recipe() -> Vec<String> {
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let (_, section) = readme.split_once("\n## Which file lies on a lost sector\n").expect("the README has it");
    let section = section.split("\n## ").next().unwrap_or(section);
    let blocks = section.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap_or(rest).to_owned());
    blocks.collect()
}

/// Put `to` in the place of `from`, which is there once.
fn replaced(text: &str, from: &str, to: &str) -> String {
    assert_eq!(text.matches(from).count(), 1, "{from} in {text}");
    text.replace(from, to)
}

/// A disk with one partition, which holds a file system with one file of [`FILE_SECTORS`].
struct Disk {
    path: PathBuf,
    /// First sector of the partition.
    start: u64,
    /// Where each sector of the file lies on the disk.
    file: Vec<u64>,
}

impl Disk {
    /// Partition `path` and fill the partition from the file system in `image`.
    fn partitioned(path: &Path, image: &Path, start: u64) -> Disk {
        let sectors = fs::metadata(image).unwrap().len() / 512;
        let mut table = [0; 512];
        // Linux, from `start` on, as long as it is; cylinders and heads are nobody's business any more.
        table[446..462].copy_from_slice(&[0, 0xfe, 0xff, 0xff, 0x83, 0xfe, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
        table[454..458].copy_from_slice(&u32::try_from(start).unwrap().to_le_bytes());
        table[458..462].copy_from_slice(&u32::try_from(sectors).unwrap().to_le_bytes());
        table[510..].copy_from_slice(&[0x55, 0xaa]);
        let disk = File::create(path).unwrap();
        disk.set_len((start + sectors).next_multiple_of(2048) * 512).unwrap();
        disk.write_all_at(&table, 0).unwrap();
        let mut file = vec![0; usize::try_from(FILE_SECTORS).unwrap()];
        let from = File::open(image).unwrap();
        let mut piece = vec![0; 1 << 20];
        for at in (0..sectors).step_by(2048) {
            let len = usize::try_from((sectors - at).min(2048)).unwrap() * 512;
            from.read_exact_at(&mut piece[..len], at * 512).unwrap();
            let contents = piece[..len].chunks(512);
            for (sector, content) in (at..).zip(contents).filter(|(_, content)| *content != [0; 512]) {
                disk.write_all_at(content, (start + sector) * 512).unwrap();
                let number = u64::from_le_bytes(content[..8].try_into().unwrap());
                if number < FILE_SECTORS && content == pattern(number, 1, 7) {
                    file[usize::try_from(number).unwrap()] = start + sector;
                }
            }
        }
        assert!(!file.contains(&0), "{file:?}");
        // What is in the partition, at the name of its device.
        std::os::unix::fs::symlink(image, format!("{}1", path.display())).unwrap();
        Disk { path: path.to_owned(), start, file }
    }

    /// What the README's commands print of a sector, those for all disks and those for a file system; or on stderr.
    fn commands(&self, sector: u64, file_system: usize) -> Result<String, String> {
        let blocks = recipe();
        let disk = format!("disk={} sector={sector}", self.path.display());
        let script = replaced(&blocks[0], "disk=/dev/vda sector=2267", &disk) + &blocks[1 + file_system];
        let mut shell = Command::new("sh");
        // Where Debian keeps the tools of file systems.
        let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
        run(shell.args(["-euc", &script]).env("PATH", path))
    }

    /// What they print of a sector of the partition's, after saying which one that is.
    fn commands_say(&self, sector: u64, file_system: usize) -> String {
        let said = self.commands(sector, file_system).unwrap_or_else(|error| panic!("{sector}: {error}"));
        let place = format!("sector {sector} is sector {} of partition 1\n", sector - self.start);
        assert!(said.starts_with(&place), "{said}");
        said[place.len()..].to_owned()
    }
}

/// A folder with the file, at `sub/hello.bin` in it.
fn tree(dir: &Path) -> PathBuf {
    let tree = dir.join("tree");
    fs::create_dir_all(tree.join("sub")).unwrap();
    fs::write(tree.join("sub/hello.bin"), pattern(0, FILE_SECTORS, 7)).unwrap();
    tree
}

fn empty(path: PathBuf, mib: u64) -> PathBuf {
    File::create(&path).unwrap().set_len(mib << 20).unwrap();
    path
}

/// Let sectors of the file become lost and pending on the served disk; what `list` then says of them.
fn list_of_bad_sectors(mut volume: Volume, disk: &Disk, lost: u64, pending: u64) -> (Vec<u64>, Vec<u64>) {
    volume.primary.clone_from(&disk.path);
    let [primary, spare] = [&volume.primary, &volume.spare].map(|path| path.to_str().unwrap());
    done(&vhost_remap(&["adopt", "--primary", primary, "--spare", spare, "--max-remaps", "64"]));
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    let block = lost / 8 * 8;
    server.fault(&["--ops", "write", "--sectors", &format!("{block}-{}", block + 7)]);
    server.fault(&["--ops", "read", "--sectors", &lost.to_string(), "--sectors", &pending.to_string()]);
    let beside = if lost.is_multiple_of(8) { lost + 1 } else { lost - 1 };
    let content = guest.read(beside, 1).unwrap();
    guest.write(beside, content).unwrap();
    assert_eq!(failing(&mut guest, block - 8..block + 16), [lost]);
    assert_eq!(failing(&mut guest, pending..pending + 1), [pending]);
    let list = |filter| -> Vec<serde_json::Value> {
        let text = server.order(&["list", filter, "--json"]);
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let sectors = |rows: Vec<serde_json::Value>, field: &str| -> Vec<u64> {
        rows.iter().flat_map(|row| row[field].as_array().unwrap()).map(|sector| sector.as_u64().unwrap()).collect()
    };
    let found = (sectors(list("--lost"), "lost"), sectors(list("--pending"), "pending"));
    drop(guest);
    server.stop();
    found
}

#[test]
fn the_file_on_a_lost_sector_of_ext4_is_named_and_metadata_is_not_called_a_file() {
    let name = "the_file_on_a_lost_sector_of_ext4_is_named_and_metadata_is_not_called_a_file";
    let volume = Volume::absent();
    for (block, start) in [("1024", 2048), ("4096", 63)] {
        let image = empty(volume.dir.path().join("ext4"), 32);
        let tree = tree(volume.dir.path());
        let mut mkfs = Command::new("mkfs.ext4");
        if let Err(reason) = run(mkfs.args(["-q", "-F", "-b", block, "-d"]).arg(&tree).arg(&image)) {
            return skip(name, reason);
        }
        let disk = Disk::partitioned(&volume.dir.path().join(block), &image, start);
        let own = Volume::absent();
        let (lost, pending) = list_of_bad_sectors(own, &disk, disk.file[10], disk.file[40]);
        assert_eq!((&lost[..], &pending[..]), (&disk.file[10..11], &disk.file[40..41]));
        for sector in [lost[0], pending[0], disk.file[0], disk.file[63]] {
            let said = disk.commands_say(sector, 0);
            assert!(said.ends_with("/sub/hello.bin\n"), "{said}");
        }
        // The superblock, what follows it, the journal, and the last block.
        assert_eq!(disk.commands_say(start, 0), "no file: boot block and superblock\n");
        let said = disk.commands_say(start + 8, 0);
        // An inode of the file system's own keeps the first group's for its growth, in small blocks.
        assert!(
            said == "no file: Block 1 marked in use\n" || (block == "1024" && said.starts_with("no file: ")),
            "{said}"
        );
        let debugfs = run(Command::new("debugfs").args(["-R", "blocks <8>"]).arg(&image)).unwrap();
        let journal: u64 = debugfs.split_whitespace().next().unwrap().parse().unwrap();
        let said = disk.commands_say(start + journal * block.parse::<u64>().unwrap() / 512, 0);
        assert_eq!(said, "no file: inode 8, the file system's own\n");
        let error = disk.commands(start - 1, 0).unwrap_err();
        assert!(error.contains("no partition has that sector"), "{error}");
        let said = disk.commands_say(start + (32 << 11) - 1, 0);
        assert!(said.starts_with("no file: Block ") && said.ends_with(" not in use\n"), "{said}");
    }
}

#[test]
fn the_file_on_a_lost_sector_of_xfs_is_named_and_metadata_is_not_called_a_file() {
    let name = "the_file_on_a_lost_sector_of_xfs_is_named_and_metadata_is_not_called_a_file";
    let volume = Volume::absent();
    // The least that XFS takes. It is nearly all holes.
    let image = empty(volume.dir.path().join("xfs"), 304);
    let file = tree(volume.dir.path()).join("sub/hello.bin");
    let prototype = volume.dir.path().join("prototype");
    let tree = format!("d--755 0 0\nsub d--755 0 0\nhello.bin ---644 0 0 {}\n$\n$\n", file.display());
    fs::write(&prototype, format!("/dev/null\n0 0\n{tree}")).unwrap();
    let mut mkfs = Command::new("mkfs.xfs");
    if let Err(reason) = run(mkfs.arg("-q").arg("-p").arg(&prototype).arg(&image)) {
        return skip(name, reason);
    }
    // Neither on a block of ours nor on one of the file system's.
    let start = 2051;
    let disk = Disk::partitioned(&volume.dir.path().join("disk"), &image, start);
    let own = Volume::absent();
    let (lost, pending) = list_of_bad_sectors(own, &disk, disk.file[10], disk.file[40]);
    assert_eq!((&lost[..], &pending[..]), (&disk.file[10..11], &disk.file[40..41]));
    for sector in [lost[0], pending[0], disk.file[0], disk.file[63]] {
        let said = disk.commands_say(sector, 1);
        assert!(said.contains(" type data inode ") && said.ends_with(" sub/hello.bin\n"), "{said}");
    }
    // The superblock, the log, the root of a tree of free space, inodes, and the last block.
    let (log, inodes) = (xfs_place(&image, "logstart", "fsblock"), xfs_place(&image, "rootino", "ino"));
    let others = [(0, " type sb\n"), (8, " type btbno\n"), (inodes, " type inode"), (log + 9, " type log\n")];
    let free = ((304 << 11) - 1, " type free");
    for (sector, expected) in others.into_iter().chain([free]) {
        let said = disk.commands_say(start + sector, 1);
        assert!(said.contains(expected) && !said.contains(" type data"), "{sector}: {said}");
    }
}

/// The sector of a place that the superblock names, in units of that kind.
fn xfs_place(image: &Path, field: &str, kind: &str) -> u64 {
    let ask = |commands: &[&str]| run(Command::new("xfs_db").arg("-r").args(commands).arg(image)).unwrap();
    let named = ask(&["-c", "sb 0", "-c", &format!("print {field}")]);
    let (_, number) = named.trim().rsplit_once(' ').unwrap();
    // As `0x8 (8)`.
    let place = ask(&["-c", &format!("convert {kind} {number} daddr")]);
    let (_, place) = place.trim().trim_end_matches(')').rsplit_once('(').unwrap();
    place.parse().unwrap()
}
