//! Measurements that are no load: lookups, opening, memory, size, and what a bad block costs.

use std::fs::{self, File};
use std::hint::black_box;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;
use tempfile::TempDir;
use uuid::Uuid;
use vhost_remap::control::client::REPORT_TIMEOUT;
use vhost_remap::device::DeviceIndex;
use vhost_remap::device::fault::{FaultOp, FaultRule};
use vhost_remap::units::{Block, Sector, SectorRange, Slot};
use vhost_remap::volume::layout::{Home, Layout, Place};
use vhost_remap::volume::map::{BlockState, Map};
use vhost_remap::volume::table::{Change, Entry, PageSeat, SlotState, Table};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::backend::{self, Backend, Cache, PROGRAM, vhost_remap};
use crate::content::{BLOCK, SECTORS_PER_BLOCK};
use crate::machine::resident;
use crate::options::Options;
use crate::ring::OUT;
use crate::scan::{self, IDLE_PASS};
use crate::session;
use crate::stage::{REMAPS, Stage};
use crate::stats::{Estimate, estimate};

/// No answer takes longer.
const ANSWER_LIMIT: i32 = 30_000;
const SIZES: [u32; 3] = [0, 16_384, 1_048_576];
/// Blocks of the disk whose map is looked up: 16 GiB.
const MAP_BLOCKS: u64 = 1 << 22;
/// Failing writes whose time is taken, one after the other.
const FAILING: usize = 200;
/// Failing writes whose flushes are counted, for each device.
const COUNTED: usize = 6;
/// Delay of a flush that is to be counted.
const DELAY: Duration = Duration::from_millis(50);

/// One figure.
#[derive(Debug, Serialize)]
pub(crate) struct Single {
    pub(crate) name: String,
    pub(crate) unit: &'static str,
    pub(crate) figure: Option<Estimate>,
    /// How it was measured, or why not.
    pub(crate) note: String,
    /// Whether something was wrong.
    pub(crate) failed: bool,
}

impl Single {
    fn new(name: String, unit: &'static str, measured: Result<Vec<f64>, String>, note: &str) -> Single {
        match measured {
            Ok(figures) => Single { name, unit, figure: estimate(&figures), note: note.into(), failed: false },
            Err(why) => Single { name, unit, figure: None, note: why, failed: true },
        }
    }
}

/// All of them.
pub(crate) fn measure(stage: &Stage, options: &Options) -> Vec<Single> {
    let mut singles = Vec::new();
    for size in SIZES {
        let name = format!("map lookup with {} remaps", grouped(size));
        singles.push(Single::new(name, "ns", Ok(lookup(size)), "random blocks of 16 GiB, remaps scattered"));
    }
    for size in SIZES {
        let (times, memory) = opened(stage, size, options.rounds.max(5)).map_or_else(
            |why| (Err(why.clone()), Err(why)),
            |figures| {
                let (times, memory): (Vec<f64>, Vec<f64>) = figures.into_iter().unzip();
                (Ok(times), Ok(memory))
            },
        );
        let note = "from the start of the program until it listens";
        singles.push(Single::new(format!("opening with {} remaps", grouped(size)), "ms", times, note));
        let note = "resident after opening, its program's text included";
        singles.push(Single::new(format!("memory with {} remaps", grouped(size)), "MiB", memory, note));
    }
    let note = "O_DIRECT file of 1 GiB; fio: 1 MiB reads, four at a time; from a twentieth of the pass to its end";
    singles.push(Single::new(IDLE_PASS.into(), "x", scan::idle(stage.dir(), options), note));
    singles.push(stripped(stage));
    let [times, primary, spare] = failing(stage.dir())
        .map_or_else(|why| [(); 3].map(|()| Err(why.clone())), |figures| figures.map(Ok::<Vec<f64>, String>));
    let note = "O_DIRECT file, one at a time, tried again in place, failing again, moved";
    singles.push(Single::new("a failed write until its answer".into(), "us", times, note));
    let note = "of the attempt in place; by how long it takes when each takes 50 ms more";
    singles.push(Single::new("flushes of the primary until a failed write is answered".into(), "", primary, note));
    let note = "of the move; counted likewise";
    singles.push(Single::new("flushes of the spare until a failed write is answered".into(), "", spare, note));
    for (name, dir, cache) in
        [("tmpfs", stage.fast_dir(), Cache::Writeback), ("O_DIRECT file", stage.dir(), Cache::None)]
    {
        let storms: Result<Vec<f64>, String> = (0..options.rounds).map(|_| storm(dir, cache)).collect();
        let name = format!("storm of 16,384 failing writes, {name}");
        singles.push(Single::new(name, "writes/s", storms, "QD 128, each block moves"));
    }
    singles
}

fn grouped(number: u32) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> = digits.as_bytes().rchunks(3).map(|part| str::from_utf8(part).expect("digits")).collect();
    groups.into_iter().rev().collect::<Vec<_>>().join(",")
}

/// Distinct blocks all over the disk of [`MAP_BLOCKS`]: an odd factor permutes them.
fn scattered(slot: u32) -> Block {
    Block(u64::from(slot).wrapping_mul(2_654_435_761) % MAP_BLOCKS)
}

/// Nanoseconds of a lookup, several times.
fn lookup(remaps: u32) -> Vec<f64> {
    let mut map = Map::new(MAP_BLOCKS);
    for slot in 0..remaps {
        map.set(scattered(slot), BlockState { slot: Some(Slot(slot)), ..BlockState::default() });
    }
    let mut random = 88_172_645_463_325_252_u64;
    let blocks: Vec<Block> = (0..1 << 16)
        .map(|_| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            Block(random % MAP_BLOCKS)
        })
        .collect();
    let once = || {
        let start = Instant::now();
        let found = blocks.iter().filter(|block| black_box(&map).get(**block).slot.is_some()).count();
        black_box(found);
        start.elapsed().as_nanos() as f64 / blocks.len() as f64
    };
    once();
    (0..31).map(|_| once()).collect()
}

/// A new volume on a sparse primary.
fn volume(parent: &Path, primary_len: u64, max_remaps: u32) -> Result<TempDir, String> {
    let dir = tempfile::tempdir_in(parent).map_err(|error| error.to_string())?;
    let [primary, spare] = ["disk.img", "disk.spare"].map(|name| dir.path().join(name).display().to_string());
    File::create(&primary).and_then(|file| file.set_len(primary_len)).map_err(|error| error.to_string())?;
    let max_remaps = max_remaps.to_string();
    vhost_remap(&["adopt", "--primary", &primary, "--spare", &spare, "--max-remaps", &max_remaps])?;
    Ok(dir)
}

pub(crate) fn serve(dir: &Path, cache: Cache) -> Result<Backend, String> {
    let options = ["--fault-injection".to_owned()];
    backend::serve(dir, &dir.join("disk.img"), Some(&dir.join("disk.spare")), cache, 1, &options)
}

pub(crate) fn status(backend: &Backend) -> Result<Value, String> {
    backend.control().get("/v1/status", REPORT_TIMEOUT).map_err(|error| error.to_string())
}

/// Milliseconds that opening takes, and resident MiB afterwards.
fn opened(stage: &Stage, remaps: u32, times: usize) -> Result<Vec<(f64, f64)>, String> {
    let max_remaps = remaps.max(16_384);
    let dir = volume(stage.dir(), MAP_BLOCKS * BLOCK as u64, max_remaps)?;
    if remaps > 0 {
        let server = serve(dir.path(), Cache::None)?;
        let volume = status(&server)?["volume"].as_str().unwrap_or_default().to_owned();
        server.stop()?;
        let set = volume.parse().map_err(|error| format!("volume {volume:?}: {error}"))?;
        fill_table(&dir.path().join("disk.spare"), set, max_remaps, remaps)?;
    }
    let once = || {
        let server = serve(dir.path(), Cache::None)?;
        let found = status(&server)?["blocks"]["remapped"].as_u64();
        if found != Some(remaps.into()) {
            return Err(format!("{found:?} remaps in place of {remaps}"));
        }
        let memory = resident(server.pid()).ok_or("no memory is reported")?;
        let time = server.opened_in.as_secs_f64() * 1e3;
        server.stop()?;
        Ok((time, memory as f64 / f64::from(1 << 20)))
    };
    (0..times).map(|_| once()).collect()
}

/// Write remaps into a volume's table, where moving as many blocks would take hours: each page with a higher sequence
/// than it has, in all of its homes.
fn fill_table(spare: &Path, set: Uuid, max_remaps: u32, remaps: u32) -> Result<(), String> {
    let file = File::options().write(true).open(spare).map_err(|error| error.to_string())?;
    let len = file.metadata().map_err(|error| error.to_string())?.len();
    let layout = Layout::new(len, max_remaps).map_err(|error| error.to_string())?;
    let mut table = Table::new(max_remaps);
    for slot in 0..remaps {
        let entry = Entry { block: scattered(slot), state: SlotState::Live, ..Entry::FREE };
        table.set(Change { slot: Slot(slot), entry });
    }
    for number in 0..table.pages() {
        let page = table.page_with(number, 1000, &[]);
        for (place, home) in Place::ALL.iter().flat_map(|place| Home::ALL.iter().map(move |home| (*place, *home))) {
            let bytes = page.encode(set, number, PageSeat::Spare(place, home));
            file.write_all_at(&bytes, layout.table(place, home, number)).map_err(|error| error.to_string())?;
        }
    }
    file.sync_all().map_err(|error| error.to_string())
}

fn stripped(stage: &Stage) -> Single {
    let copy = stage.dir().join("stripped");
    let output = Command::new("strip").arg("-o").arg(&copy).arg(PROGRAM).output();
    let (name, unit) = ("the program, stripped".to_owned(), "MiB");
    match output {
        Ok(output) if output.status.success() => {
            let len = fs::metadata(&copy).map(|data| data.len() as f64 / f64::from(1 << 20));
            Single::new(name, unit, len.map(|len| vec![len]).map_err(|error| error.to_string()), "of the file")
        }
        _ => Single { name, unit, figure: None, note: "no strip(1)".into(), failed: false },
    }
}

/// Have writes of blocks `first..first + count` fail on the primary.
fn break_blocks(backend: &Backend, first: usize, count: usize) -> Result<(), String> {
    let [start, count] = [first, count].map(|blocks| (blocks * SECTORS_PER_BLOCK) as u64);
    let range = Some(SectorRange { start: Sector(start), count });
    let errno = Some(vhost_remap::device::Errno(libc::EIO));
    add_rule(backend, &FaultRule { range, errno, ..FaultRule::new(DeviceIndex::PRIMARY, &[FaultOp::Write]) })
}

fn add_rule(backend: &Backend, rule: &FaultRule) -> Result<(), String> {
    backend.order("/v1/faults", &serde_json::to_value(rule).expect("plain data")).map(drop)
}

/// Write each of some blocks once, so many at a time; how long each took, and all together.
fn write_each(
    backend: &Backend,
    first: usize,
    count: usize,
    depth: usize,
) -> Result<(Vec<Duration>, Duration), String> {
    let (_session, mut rings) = session::connect(&backend.socket, 1, depth, BLOCK, false)?;
    let ring = &mut rings[0];
    let called = Epoll::new().map_err(|error| error.to_string())?;
    let readable = EpollEvent::new(EventSet::IN, 0);
    called.ctl(ControlOperation::Add, ring.call.as_raw_fd(), readable).map_err(|error| error.to_string())?;
    let (mut next, mut times) = (0, Vec::with_capacity(count));
    let mut free: Vec<usize> = (0..depth).collect();
    let begin = Instant::now();
    let mut starts = vec![begin; depth];
    while times.len() < count {
        while let (true, Some(slot)) = (next < count, free.pop()) {
            let sector = ((first + next) * SECTORS_PER_BLOCK) as u64;
            ring.stamp(slot, sector, |_| 1);
            ring.put(slot, OUT, sector);
            starts[slot] = Instant::now();
            next += 1;
        }
        ring.kick();
        if ring.arm() && called.wait(ANSWER_LIMIT, &mut [EpollEvent::default()]).is_ok_and(|ready| ready == 0) {
            return Err("a write has no answer within 30 s".into());
        }
        let _ = ring.call.read();
        while let Some((slot, status)) = ring.take()? {
            if status != 0 {
                return Err(format!("a write ended with status {status}"));
            }
            times.push(starts[slot].elapsed());
            free.push(slot);
        }
    }
    Ok((times, begin.elapsed()))
}

/// Microseconds from a write that fails to its answer, and the flushes of primary and spare in between.
fn failing(parent: &Path) -> Result<[Vec<f64>; 3], String> {
    let dir = volume(parent, 64 << 20, 16_384)?;
    let server = serve(dir.path(), Cache::None)?;
    break_blocks(&server, 0, 2 * FAILING)?;
    let (times, _) = write_each(&server, 0, FAILING, 1)?;
    let seconds: Vec<f64> = times.iter().map(Duration::as_secs_f64).collect();
    let without = estimate(&seconds).expect("some were written").median;
    let mut first = FAILING;
    let mut flushes_of = |device| {
        server.control().delete::<Value>("/v1/faults", REPORT_TIMEOUT).map_err(|error| error.to_string())?;
        break_blocks(&server, 0, 2 * FAILING)?;
        let delay_ms = u64::try_from(DELAY.as_millis()).expect("short");
        add_rule(&server, &FaultRule { errno: None, delay_ms, ..FaultRule::new(device, &[FaultOp::Flush]) })?;
        let counted = (0..COUNTED).map(|_| {
            // What the one before left to be done is no part of this one's time.
            std::thread::sleep(8 * DELAY);
            first += 1;
            let (slow, _) = write_each(&server, first - 1, 1, 1)?;
            Ok(((slow[0].as_secs_f64() - without) / DELAY.as_secs_f64()).round())
        });
        counted.collect::<Result<Vec<f64>, String>>()
    };
    let (primary, spare) = (flushes_of(DeviceIndex::PRIMARY)?, flushes_of(DeviceIndex::SPARE)?);
    let moved = status(&server)?["blocks"]["remapped"].as_u64();
    if moved != Some((FAILING + 2 * COUNTED) as u64) {
        return Err(format!("{moved:?} blocks moved in place of {}", FAILING + 2 * COUNTED));
    }
    server.stop()?;
    Ok([seconds.iter().map(|time| time * 1e6).collect(), primary, spare])
}

/// Failing writes a second.
fn storm(parent: &Path, cache: Cache) -> Result<f64, String> {
    let dir = volume(parent, 256 << 20, 16_384)?;
    let server = serve(dir.path(), cache)?;
    break_blocks(&server, 0, REMAPS)?;
    let (times, elapsed) = write_each(&server, 0, REMAPS, 128)?;
    let moved = status(&server)?["blocks"]["remapped"].as_u64();
    if moved != Some(REMAPS as u64) {
        return Err(format!("{moved:?} blocks moved in place of {REMAPS}"));
    }
    server.stop()?;
    Ok(times.len() as f64 / elapsed.as_secs_f64())
}
