//! What the program was told to do, as plain data: the command line fills it, the runtime acts on it.

use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use super::scan_options::ScanOptions;

/// Remaps a volume has room for unless told otherwise.
pub const MAX_REMAPS_DEFAULT: u32 = 16_384;

/// How a new volume is laid out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeShape {
    /// The most blocks that can be remapped.
    pub max_remaps: u32,
    /// The guest's answer to GET_ID, at most 20 bytes (virtio 1.3 §5.2.6); one is made up where absent.
    pub serial: Option<String>,
}

/// `create`: a volume on an empty primary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Device or file that will hold guest data.
    pub primary: PathBuf,
    /// Device or file that will hold metadata and slots.
    pub spare: PathBuf,
    /// Size of the disk in bytes, a multiple of 512.
    pub size: u64,
    /// Layout.
    pub shape: VolumeShape,
    /// Whether a spare that carries another file system's signature may be used.
    pub force: bool,
}

/// `adopt`: a volume around an existing raw image or device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdoptOptions {
    /// Device or file that holds guest data.
    pub primary: PathBuf,
    /// Device or file that will hold metadata and slots.
    pub spare: PathBuf,
    /// Layout.
    pub shape: VolumeShape,
    /// Whether a spare that carries another file system's signature may be used, and a primary that belongs to a
    /// volume.
    pub force: bool,
}

/// `serve --create`: what to make where primary and spare are both absent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateIfAbsent {
    /// Size of the disk in bytes, a multiple of 512.
    pub size: u64,
    /// Layout.
    pub shape: VolumeShape,
}

/// Where front-ends come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// A socket to be made at this path.
    Path(PathBuf),
    /// An inherited socket, listening or already connected (`SO_ACCEPTCONN` tells which).
    Fd(RawFd),
}

/// Way of device I/O.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoEngine {
    /// io_uring where the host allows it, else threads.
    #[default]
    Auto,
    /// io_uring or nothing.
    IoUring,
    /// A thread pool.
    Threads,
}

/// Whether the host's page cache is in the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// O_DIRECT: errors arrive where they happen.
    #[default]
    None,
    /// Buffered: write errors are only seen at flush.
    Writeback,
}

impl Cache {
    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Cache::None => "none",
            Cache::Writeback => "writeback",
        }
    }
}

/// What speaks vhost-user and serves the rings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// This crate.
    #[default]
    Own,
    /// rust-vmm's daemon, for comparison.
    Framework,
}

impl Transport {
    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Transport::Own => "own",
            Transport::Framework => "framework",
        }
    }
}

/// What becomes of requests that cannot be carried out now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FailOrHold {
    /// The guest gets an error.
    #[default]
    Fail,
    /// They wait, at most that long where a time is given.
    Hold(Option<Duration>),
}

/// `serve`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServeOptions {
    /// Device or file that holds guest data.
    pub primary: PathBuf,
    /// Device or file that holds metadata and slots; absent only with `passthrough` and `degraded`.
    pub spare: Option<PathBuf>,
    /// Where front-ends come from.
    pub listen: Listen,
    /// The control socket's path; no control socket where absent.
    pub control_path: Option<PathBuf>,
    /// Queues offered.
    pub num_queues: u16,
    /// What speaks vhost-user and serves the rings.
    pub transport: Transport,
    /// Worker threads; min(queues, cores) where absent.
    pub workers: Option<u16>,
    /// Microseconds that a worker looks at its rings before it sleeps; see [`ServeOptions::polling_us`].
    pub poll_us: Option<u32>,
    /// Whether a migrated guest is awaited, and the volume opened only when it comes.
    pub incoming: bool,
    /// Whether the disk only takes reads and neither device is written.
    pub read_only: bool,
    /// Make the volume first where primary and spare are both absent.
    pub create: Option<CreateIfAbsent>,
    /// Way of device I/O.
    pub io_engine: IoEngine,
    /// Page cache or not.
    pub cache: Cache,
    /// Whether the operator may make devices fail.
    pub fault_injection: bool,
    /// Take the primary as it is although another program has changed it since the last clean close.
    pub accept_external: bool,
    /// Whether requests go straight to the primary, without metadata or remaps.
    pub passthrough: bool,
    /// Whether the spare is lost: the primary is only read, by what its label says.
    pub degraded: bool,
    /// While a device is gone.
    pub on_device_loss: FailOrHold,
    /// While a write needs a slot and none is free.
    pub on_spare_full: FailOrHold,
    /// How long to wait for another process to let go of the devices.
    pub lock_wait: Duration,
    /// The group that may read on the control socket, where there is one.
    pub control_group: Option<String>,
    /// Where everybody may read, where there is such a place.
    pub http_listen: Option<SocketAddr>,
    /// The scanner.
    pub scan: ScanOptions,
}

impl ServeOptions {
    /// Time from the end of a pass of the scanner to the start of the next one, where passes begin by themselves: not
    /// where there is no metadata, or none may be written.
    pub fn scan_interval(&self) -> Option<Duration> {
        let keeps_no_metadata = self.passthrough || self.degraded || self.read_only;
        self.scan.interval.time().filter(|_| !keeps_no_metadata)
    }

    /// Microseconds that each of so many workers looks at its rings before it sleeps. Where nobody says: 32 (as QEMU's
    /// I/O threads) if every worker and a virtual processor for it can have a core of their own and one is
    /// left for the host; else not at all, as a worker that looks on would keep the others from theirs.
    pub fn polling_us(&self, workers: u32) -> u32 {
        self.poll_us.unwrap_or_else(|| {
            let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
            if cores as u64 > 2 * u64::from(workers) { 32 } else { 0 }
        })
    }
}

impl FromStr for IoEngine {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(IoEngine::Auto),
            "io_uring" => Ok(IoEngine::IoUring),
            "threads" => Ok(IoEngine::Threads),
            _ => Err(format!("{text:?} is none of auto, io_uring, threads")),
        }
    }
}

impl FromStr for Cache {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Cache::None),
            "writeback" => Ok(Cache::Writeback),
            _ => Err(format!("{text:?} is none of none, writeback")),
        }
    }
}

impl FromStr for Transport {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Transport::Own, Transport::Framework];
        all.into_iter().find(|it| it.name() == text).ok_or_else(|| format!("{text:?} is none of own, framework"))
    }
}

impl FromStr for FailOrHold {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is none of fail, hold, hold=SECONDS");
        match text.split_once('=') {
            None if text == "fail" => Ok(FailOrHold::Fail),
            None if text == "hold" => Ok(FailOrHold::Hold(None)),
            Some(("hold", seconds)) => {
                let seconds = seconds.parse().map_err(|_| wrong())?;
                Ok(FailOrHold::Hold(Some(Duration::from_secs(seconds))))
            }
            _ => Err(wrong()),
        }
    }
}
