//! What the machine says: processor time of ours and of others, memory, where threads may run.

use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::Serialize;

/// Of a process in proc(5)'s `flags`: it is a thread of the kernel.
const PF_KTHREAD: u64 = 0x0020_0000;

/// Processors this program may use.
pub(crate) fn cpus() -> Vec<usize> {
    let set = sched_getaffinity(None).expect("our own affinity");
    (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect()
}

/// Keep the calling thread, and what it starts, on these processors.
pub(crate) fn pin(cpus: &[usize]) {
    let mut set = CpuSet::new();
    cpus.iter().for_each(|cpu| set.set(*cpu));
    sched_setaffinity(None, &set).expect("processors that were ours before");
}

/// Which processors serve the driver's queues and which the backend: the backend has those that no queue has, or
/// all where there is none left.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Placement {
    pub(crate) queues: Vec<usize>,
    pub(crate) backend: Vec<usize>,
}

impl Placement {
    pub(crate) fn of(queues: usize) -> Placement {
        let cpus = cpus();
        let taken: Vec<usize> = (0..queues).map(|queue| cpus[queue % cpus.len()]).collect();
        let free: Vec<usize> = cpus.iter().copied().filter(|cpu| !taken.contains(cpu)).collect();
        Placement { queues: taken, backend: if free.is_empty() { cpus } else { free } }
    }

    /// Start a process on the backend's processors.
    pub(crate) fn spawn(&self, command: &mut Command) -> io::Result<std::process::Child> {
        let ours = cpus();
        pin(&self.backend);
        let child = command.spawn();
        pin(&ours);
        child
    }
}

/// Processor time of all threads of a process there were, those of the kernel that work for it included.
pub(crate) fn process_time(pid: u32) -> Option<Duration> {
    let pid = libc::pid_t::try_from(pid).ok()?;
    let (mut clock, mut time) = (0, libc::timespec { tv_sec: 0, tv_nsec: 0 });
    // SAFETY: both calls write to one variable of ours, and keep no pointer.
    let done = unsafe {
        libc::clock_getcpuclockid(pid, &raw mut clock) == 0 && libc::clock_gettime(clock, &raw mut time) == 0
    };
    let (seconds, nanos) = (u64::try_from(time.tv_sec).ok()?, u32::try_from(time.tv_nsec).ok()?);
    done.then(|| Duration::new(seconds, nanos))
}

/// Resident memory of a process, in bytes.
pub(crate) fn resident(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(kib.trim().trim_end_matches(" kB").parse::<u64>().ok()? << 10)
}

/// The fields of a `stat` of proc(5) after the command's name, the state first.
fn stat_fields(text: &str) -> Vec<u64> {
    let rest = text.rsplit_once(") ").map_or("", |(_, rest)| rest);
    rest.split(' ').map(|field| field.trim().parse().unwrap_or(0)).collect()
}

/// Processor time in seconds that others have used, and that the host has kept from this machine.
struct Times {
    at: Instant,
    others: f64,
    stolen: f64,
}

impl Times {
    fn now() -> Times {
        let ticks = rustix::param::clock_ticks_per_second() as f64;
        let text = fs::read_to_string("/proc/stat").unwrap_or_default();
        let stolen = text.lines().next().and_then(|line| line.split_whitespace().nth(8)?.parse::<f64>().ok());
        Times { at: Instant::now(), others: others() as f64 / ticks, stolen: stolen.unwrap_or(0.0) / ticks }
    }
}

/// Ticks that processes of others have used, with those of their children that have ended: the sum does not change
/// when a process ends and its parent inherits what it has used. Neither we nor what we have started count, nor
/// threads of the kernel, which flush what our runs have written. (The totals of `/proc/stat` would have processes
/// of other containers, too, but are sampled a hundred times a second, which says nothing about a run of a second.)
fn others() -> u64 {
    let Ok(entries) = fs::read_dir("/proc") else { return 0 };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u64>().ok());
    let us = u64::from(std::process::id());
    let used = pids.filter(|pid| *pid != us).filter_map(|pid| {
        let fields = stat_fields(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?);
        let (parent, flags, times) = (*fields.get(1)?, *fields.get(6)?, fields.get(11..15)?);
        (parent != us && flags & PF_KTHREAD == 0).then(|| times.iter().sum::<u64>())
    });
    used.sum()
}

/// Looks for what others do while something is measured.
pub(crate) struct Watch(Times);

impl Watch {
    /// Begin.
    pub(crate) fn start() -> Watch {
        Watch(Times::now())
    }

    /// Processor time that others took meanwhile, or that the host took from this machine, in percent of one
    /// processor. Interrupts are nobody's.
    pub(crate) fn disturbance(&self) -> f64 {
        let (before, now) = (&self.0, Times::now());
        let taken = (now.others - before.others).max(0.0) + now.stolen - before.stolen;
        100.0 * taken / (now.at - before.at).as_secs_f64()
    }
}

/// The file system a path lies on, as its number's name.
pub(crate) fn file_system(path: &Path) -> String {
    match rustix::fs::statfs(path).map(|stat| stat.f_type) {
        Ok(0xef53) => "ext4".into(),
        Ok(0x0102_1994) => "tmpfs".into(),
        Ok(0x5846_5342) => "xfs".into(),
        Ok(0x9123_683e) => "btrfs".into(),
        Ok(other) => format!("{other:#x}"),
        Err(error) => error.to_string(),
    }
}

/// What runs where, for those who read the figures.
#[derive(Serialize)]
pub(crate) struct Machine {
    pub(crate) processor: String,
    pub(crate) cpus: usize,
    pub(crate) kernel: String,
    pub(crate) memory_mib: u64,
    pub(crate) programs: Vec<String>,
}

impl Machine {
    pub(crate) fn here() -> Machine {
        let field = |path: &str, name: &str| {
            let text = fs::read_to_string(path).unwrap_or_default();
            let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
            line.split_once(':').map_or(String::new(), |(_, value)| value.trim().to_owned())
        };
        let uname = rustix::system::uname();
        let memory = field("/proc/meminfo", "MemTotal");
        let version = |program: &str| {
            let output = Command::new(program).arg("--version").output().ok()?;
            Some(String::from_utf8_lossy(&output.stdout).lines().next()?.to_owned())
        };
        let programs = [env!("CARGO_BIN_EXE_vhost-remap"), "qemu-storage-daemon", "fio", "perf"];
        Machine {
            processor: field("/proc/cpuinfo", "model name"),
            cpus: cpus().len(),
            kernel: uname.release().to_string_lossy().into_owned(),
            memory_mib: memory.trim_end_matches(" kB").parse::<u64>().unwrap_or(0) >> 10,
            programs: programs.into_iter().filter_map(version).collect(),
        }
    }
}
