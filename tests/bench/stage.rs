//! The files that are measured, and backends on them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::json;
use tempfile::TempDir;

use crate::backend::{self, Backend, Cache, vhost_remap};
use crate::content::{BLOCK, Content, SECTORS_PER_BLOCK};
use crate::load::Area;
use crate::machine::file_system;

/// Bytes that are read, written and checked: small enough to stay in the page cache.
pub(crate) const LEN: u64 = 256 << 20;
/// As many again are for fio to write to.
const FILE_LEN: u64 = 2 * LEN;
/// Remaps of the volumes that have some.
pub(crate) const REMAPS: usize = 16_384;

/// Longer than a request to a flash disk takes, in microseconds.
const POLL_US: &str = "200";

/// Where data comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(crate) enum Medium {
    /// A warm file, through the page cache.
    Cached,
    Tmpfs,
    /// The same file as `Cached`, with O_DIRECT.
    Direct,
}

/// What serves it, or what else uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum Peer {
    /// vhost-remap, with an empty map.
    Empty,
    /// The same with adaptive polling for up to [`POLL_US`].
    Polling,
    /// vhost-remap without an engine's map: `--passthrough`.
    Passthrough,
    /// vhost-remap, the first 16,384 blocks remapped in order.
    InOrder,
    /// vhost-remap, the first 16,384 blocks with even numbers remapped.
    Between,
    /// qemu-storage-daemon, `aio=io_uring`.
    QsdUring,
    /// qemu-storage-daemon, `aio=threads`.
    QsdThreads,
    /// fio with io_uring on the file itself.
    Fio,
}

/// Why something is not measured.
pub(crate) enum Trouble {
    /// It is not there, or cannot do this.
    Missing(String),
    /// It is, and does it wrong.
    Failed(String),
}

/// A file with known content, and the spares of its volumes: all of them have it as their primary, so that it is the
/// same in every comparison.
pub(crate) struct Disk {
    pub(crate) file: PathBuf,
    content: Content,
    spares: BTreeMap<Map, Spare>,
}

/// What is in a volume's map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Map {
    Empty,
    InOrder,
    Between,
}

struct Spare {
    path: PathBuf,
    /// What the slots of remapped blocks hold, which is not what the primary holds.
    slots: Content,
}

/// All files, made when they are first needed, and removed with this.
pub(crate) struct Stage {
    dir: TempDir,
    memory: Option<TempDir>,
    /// On disk, and in memory.
    disks: [Option<Disk>; 2],
}

fn map_of(peer: Peer) -> Map {
    match peer {
        Peer::InOrder => Map::InOrder,
        Peer::Between => Map::Between,
        _ => Map::Empty,
    }
}

impl Stage {
    /// In folders of its own under `parent`, and under `memory` where that is a tmpfs.
    pub(crate) fn new(parent: &Path, memory: &Path) -> io::Result<Stage> {
        let within = |parent: &Path| tempfile::Builder::new().prefix("files.").tempdir_in(parent);
        let dir = within(parent)?;
        let memory = (file_system(memory) == "tmpfs").then(|| within(memory)).and_then(Result::ok);
        Ok(Stage { dir, memory, disks: [None, None] })
    }

    /// For sockets and logs.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A folder in memory, or the other where there is none.
    pub(crate) fn fast_dir(&self) -> &Path {
        self.memory.as_ref().map_or(self.dir.path(), TempDir::path)
    }

    /// The disk of a medium, with the spare that a peer uses there.
    pub(crate) fn disk(&mut self, medium: Medium, peer: Peer) -> Result<&mut Disk, Trouble> {
        let in_memory = medium == Medium::Tmpfs;
        if in_memory && self.memory.is_none() {
            return Err(Trouble::Missing("BENCH_MEMORY is no tmpfs that can be written to".into()));
        }
        let [dir, fast] = [self.dir(), self.fast_dir()].map(Path::to_owned);
        let disk = &mut self.disks[usize::from(in_memory)];
        let dir = if in_memory { &fast } else { &dir };
        let disk = match disk {
            Some(disk) => disk,
            None => disk.insert(Disk::make(dir.join("disk.img")).map_err(Trouble::Failed)?),
        };
        disk.add_spare(map_of(peer), dir, &fast).map_err(Trouble::Failed)?;
        Ok(disk)
    }

    /// Start a peer that is a backend.
    pub(crate) fn start(&mut self, medium: Medium, peer: Peer, queues: usize) -> Result<Backend, Trouble> {
        let options = match peer {
            Peer::Polling => ["--poll-us", POLL_US].map(str::to_owned).to_vec(),
            // Others write to the primary in between, to blocks that are not remapped.
            Peer::InOrder | Peer::Between => vec!["--accept-external".to_owned()],
            _ => Vec::new(),
        };
        let dir = self.dir().to_owned();
        let disk = self.disk(medium, peer)?;
        let spare = &disk.spares[&map_of(peer)].path;
        let cache = if medium == Medium::Direct { Cache::None } else { Cache::Writeback };
        let daemon = |aio| backend::storage_daemon(&dir, &disk.file, aio, cache, queues).map_err(Trouble::Missing);
        match peer {
            Peer::Fio => Err(Trouble::Missing("fio is no backend".into())),
            Peer::QsdUring => daemon("io_uring"),
            Peer::QsdThreads => daemon("threads"),
            _ => {
                let spare = (peer != Peer::Passthrough).then_some(spare.as_path());
                backend::serve(&dir, &disk.file, spare, cache, queues, &options).map_err(Trouble::Failed)
            }
        }
    }

    /// Have all that a peer reads in the page cache, and nothing to be written back.
    pub(crate) fn settle(&mut self, medium: Medium, peer: Peer) -> Result<(), Trouble> {
        let disk = self.disk(medium, peer)?;
        for path in [&disk.file, &disk.spares[&map_of(peer)].path] {
            settle(path, medium).map_err(|error| Trouble::Failed(format!("{}: {error}", path.display())))?;
        }
        Ok(())
    }
}

impl Disk {
    fn make(file: PathBuf) -> Result<Disk, String> {
        let content = Content::write(&file, LEN, FILE_LEN).map_err(|error| format!("{}: {error}", file.display()))?;
        Ok(Disk { file, content, spares: BTreeMap::new() })
    }

    /// What is known of the blocks that a load of `peer` uses, which are remapped all or not at all.
    pub(crate) fn content(&mut self, peer: Peer, area: Area) -> &mut Content {
        if peer == Peer::InOrder && area.first < REMAPS {
            return &mut self.spares.get_mut(&Map::InOrder).expect("made with the disk").slots;
        }
        &mut self.content
    }

    fn add_spare(&mut self, map: Map, dir: &Path, fast: &Path) -> Result<(), String> {
        if self.spares.contains_key(&map) {
            return Ok(());
        }
        let path = dir.join(format!("{map:?}.spare").to_lowercase());
        // Remaps are made one after the other, each with its flushes: for that the spare is in memory.
        let first = if map == Map::Empty { path.clone() } else { fast.join("first.spare") };
        let text = |path: &Path| path.to_str().expect("made of UTF-8").to_owned();
        vhost_remap(&["adopt", "--primary", &text(&self.file), "--spare", &text(&first)])?;
        if map != Map::Empty {
            self.remap(map, dir, &first)?;
        }
        if first != path {
            fs::copy(&first, &path).and_then(|_| File::open(&path)?.sync_all()).map_err(|error| error.to_string())?;
            fs::remove_file(&first).map_err(|error| error.to_string())?;
        }
        let slots = Content { versions: self.content.versions.clone() };
        self.spares.insert(map, Spare { path, slots });
        Ok(())
    }

    fn remap(&self, map: Map, dir: &Path, spare: &Path) -> Result<(), String> {
        let server = backend::serve(dir, &self.file, Some(spare), Cache::Writeback, 1, &[])?;
        let order = |block: usize, blocks: usize| {
            let sectors = json!({ "start": block * SECTORS_PER_BLOCK, "count": blocks * SECTORS_PER_BLOCK });
            server.order("/v1/remap", &sectors)
        };
        if map == Map::InOrder {
            order(0, REMAPS)?;
        } else {
            (0..REMAPS).try_for_each(|slot| order(2 * slot, 1).map(drop))?;
        }
        server.stop()
    }
}

fn settle(path: &Path, medium: Medium) -> io::Result<()> {
    let mut file = File::open(path)?;
    file.sync_all()?;
    let mut piece = vec![0; 1 << 20];
    while medium == Medium::Cached && file.read(&mut piece)? > 0 {}
    Ok(())
}

/// All blocks that there are.
pub(crate) const WHOLE: Area = Area { first: 0, count: LEN as usize / BLOCK, stride: 1 };
