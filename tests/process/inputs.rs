//! Wrong input: a directory with what a case needs, the program run in it, and a look at every file before
//! and after. Whatever is refused is refused in one line, and leaves every byte, size, time and name as it was.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::model::Model;
use crate::server::{Volume, done, try_output_of, vhost_remap};

/// Past the test harness, which would swallow println! of a passing test.
pub(crate) fn skip(test: &str, reason: impl std::fmt::Display) {
    let _ = writeln!(std::io::stdout(), "SKIP {test}: {reason}");
}

/// Everything in a directory.
#[derive(PartialEq, Eq)]
pub(crate) struct Snapshot(BTreeMap<PathBuf, Entry>);

#[derive(Debug, PartialEq, Eq)]
struct Entry {
    mode: u32,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    /// Of a file's bytes, or of the path a link has.
    crc: u32,
}

impl Snapshot {
    pub(crate) fn of(dir: &Path) -> Snapshot {
        let mut entries = BTreeMap::new();
        // Hard links are read once.
        let mut known = BTreeMap::new();
        let mut left = vec![dir.to_owned()];
        while let Some(dir) = left.pop() {
            for entry in fs::read_dir(&dir).unwrap() {
                let path = entry.unwrap().path();
                let meta = fs::symlink_metadata(&path).unwrap();
                let kind = meta.file_type();
                let crc = if kind.is_file() {
                    *known.entry((meta.dev(), meta.ino())).or_insert_with(|| crc32c::crc32c(&fs::read(&path).unwrap()))
                } else if kind.is_symlink() {
                    crc32c::crc32c(fs::read_link(&path).unwrap().as_os_str().as_encoded_bytes())
                } else {
                    let known = kind.is_dir() || kind.is_socket() || kind.is_fifo() || kind.is_block_device();
                    assert!(known, "{}", path.display());
                    0
                };
                if kind.is_dir() {
                    left.push(path.clone());
                }
                // What comes and goes in a directory is seen by its entries.
                let (size, modified) =
                    if kind.is_dir() { (0, (0, 0)) } else { (meta.len(), (meta.mtime(), meta.mtime_nsec())) };
                let entry = Entry { mode: meta.mode(), inode: meta.ino(), size, modified, crc };
                entries.insert(path, entry);
            }
        }
        Snapshot(entries)
    }

    /// Nothing has changed since.
    #[track_caller]
    pub(crate) fn check(&self, dir: &Path, what: &str) {
        let now = Snapshot::of(dir);
        for path in self.0.keys().chain(now.0.keys()) {
            let (before, after) = (self.0.get(path), now.0.get(path));
            assert!(before == after, "{what}: {}: {before:?} became {after:?}", path.display());
        }
    }
}

/// `…` stands for what differs from run to run.
fn matches(line: &str, pattern: &str) -> bool {
    let mut parts = pattern.split('…');
    let first = parts.next().expect("there is always one");
    let Some(mut rest) = line.strip_prefix(first) else { return false };
    let parts: Vec<&str> = parts.collect();
    for (i, part) in parts.iter().enumerate() {
        if i + 1 == parts.len() {
            return rest.ends_with(part);
        }
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.is_empty()
}

/// The command is refused with this exit status and this one line after the program's name, and nothing in
/// `dir` has changed.
#[track_caller]
pub(crate) fn check_refused(dir: &Path, command: &mut Command, status: i32, line: &str) {
    let before = Snapshot::of(dir);
    let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
    let words = words.join(" ");
    let output = try_output_of(command).unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    // For those who want to read them all.
    println!("{words}\n    {:?}: {stderr}", output.status.code());
    let one = stderr.strip_prefix("vhost-remap: ").and_then(|line| line.strip_suffix('\n')).unwrap_or_default();
    assert!(matches(one, line), "{words}: expected {line:?}, printed {stderr:?}");
    assert!(!one.contains('\n'), "{words}: more than a line: {stderr:?}");
    assert_eq!(output.status.code(), Some(status), "{words}: {stderr}");
    assert!(output.stdout.is_empty(), "{words}: {:?}", String::from_utf8_lossy(&output.stdout));
    before.check(dir, &words);
}

/// A directory to run the program in, with relative paths, so that lines are the same in every run.
pub(crate) struct Ground {
    pub(crate) volume: Volume,
}

impl Ground {
    /// Nothing in it.
    pub(crate) fn empty() -> Ground {
        Ground { volume: Volume::absent() }
    }

    /// With `disk.img` and `disk.img.spare`, closed cleanly, one block remapped.
    pub(crate) fn with_volume() -> Ground {
        let volume = Volume::create(4, 16);
        // A ring goes some time after its process, and takes the locks of its files along only then.
        let server = volume.serve(&["--io-engine", "threads"]);
        let mut guest = server.guest(1);
        Model::written(&mut guest, 960, 256, 1);
        server.order(&["remap", "1000"]);
        drop(guest);
        server.stop();
        Ground { volume }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.volume.dir.path()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// A file of so many zeros.
    pub(crate) fn zeros(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        fs::File::create_new(&path).unwrap().set_len(size).unwrap();
        path
    }

    /// The program in this directory.
    pub(crate) fn command(&self, words: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-remap"));
        command.current_dir(self.dir()).args(words.split(' '));
        command
    }

    /// See [`check_refused`].
    #[track_caller]
    pub(crate) fn refuses(&self, words: &str, line: &str) {
        check_refused(self.dir(), &mut self.command(words), 1, line);
    }

    /// As [`Ground::refuses`], for what was not understood.
    #[track_caller]
    pub(crate) fn refuses_usage(&self, words: &str, line: &str) {
        let subcommand = words.split(' ').take_while(|word| !word.starts_with('-')).collect::<Vec<_>>().join(" ");
        let line = format!("{line}; see `vhost-remap {subcommand} --help`");
        check_refused(self.dir(), &mut self.command(words), 2, &line);
    }

    /// What was refused a moment ago is not refused for ever: the volume serves.
    #[track_caller]
    pub(crate) fn still_serves(&self) {
        let server = self.volume.serve(&[]);
        assert_eq!(server.blocks("remapped"), [1000]);
        server.stop();
    }
}

/// A volume of the given primary and spare, made by the program.
pub(crate) fn create(primary: &Path, spare: &Path, size: &str) -> String {
    let [primary, spare] = [primary, spare].map(|path| path.to_str().unwrap());
    done(&vhost_remap(&["create", "--primary", primary, "--spare", spare, "--size", size, "--max-remaps", "16"]))
}

#[test]
fn a_pattern_has_gaps() {
    assert!(matches("a b c", "a b c") && matches("a b c", "a … c") && matches("a b c", "… b …"));
    assert!(matches("a b b", "a …b") && !matches("a b c", "a b") && !matches("a b c", "b … c"));
    assert!(!matches("a c", "a …b… c") && !matches("a b c", "a … d"));
}
