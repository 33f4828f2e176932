//! What can be typed.

use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Parser, Subcommand};

use super::fault::{self, FaultErrno};
use super::logging::LogFormat;
use super::parse;
use super::report_args::{HealthArgs, StatsArgs, StatusOutputArgs, SurfaceArgs, TopArgs};
use super::scan_args::{ScanCommand, ScanServeArgs};
use crate::device::DeviceIndex;
use crate::device::fault::{DELAY_MS_MAX, FaultOp};
use crate::runtime::options::{Cache, FailOrHold, IoEngine, Transport};
use crate::runtime::report::ListFilter;
use crate::units::SectorRange;

/// Serve a self-healing virtual disk over vhost-user: blocks that go bad move to a spare under a running VM.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, subcommand_required = true, arg_required_else_help = true)]
#[command(after_help = "Without a subcommand, options are taken as those of `serve`.\n\
Exit status: 0 done, 1 failed, 2 wrong usage.")]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a volume on an empty primary.
    Create(CreateArgs),
    /// Make a volume around an existing raw image or device, which is not changed by a byte.
    Adopt(AdoptArgs),
    /// Serve a volume to a VM until SIGTERM or SIGINT.
    Serve(Box<ServeArgs>),
    /// Show the state of a running volume.
    Status(StatusArgs),
    /// Show requests and device operations in numbers, and how long they took.
    Stats(StatsArgs),
    /// List remapped and pending blocks and lost sectors.
    List(ListArgs),
    /// Show what happened.
    Events(EventsArgs),
    /// Make devices fail on purpose (only where the server was started with --fault-injection).
    #[command(subcommand)]
    Fault(FaultCommand),
    /// Lift the poison of a failed flush and close tripped breakers.
    #[command(after_help = "Example:\n  vhost-remap clear --control-path /run/vm1.sock.ctl")]
    Clear(ControlArgs),
    /// Move blocks to the spare by hand.
    #[command(
        alias = "add_remap",
        after_help = "Example:\n  vhost-remap remap --control-path /run/vm1.sock.ctl 2048-2055 4096"
    )]
    Remap(SectorsArgs),
    /// Show which slots sectors live in.
    #[command(after_help = "Example:\n  vhost-remap verify --control-path /run/vm1.sock.ctl 2048-2055 4096")]
    Verify(SectorsArgs),
    /// Copy remapped blocks back to the primary and free their slots.
    #[command(
        alias = "remove_remap",
        after_help = "Example:\n  vhost-remap release --control-path /run/vm1.sock.ctl 2048-2055"
    )]
    Release(SectorsArgs),
    /// Write counters and the primary's copy of the table now.
    #[command(alias = "sync", after_help = "Example:\n  vhost-remap save --control-path /run/vm1.sock.ctl")]
    Save(ControlArgs),
    /// Grow the disk, under the running guest.
    Resize(ResizeArgs),
    /// Read the whole volume, or a part, to meet trouble while it can be helped.
    #[command(
        subcommand,
        alias = "scrub",
        after_help = "Example:\n  vhost-remap scan start --control-path \
/run/vm1.sock.ctl --wait"
    )]
    Scan(ScanCommand),
    /// Ask whether the server is there.
    #[command(after_help = "Example:\n  vhost-remap ping --control-path /run/vm1.sock.ctl")]
    Ping(ControlArgs),
    /// Change how much the running server logs: 0 warnings, 1 information, 2 debugging, 3 everything.
    #[command(after_help = "Example:\n  vhost-remap log-level --control-path /run/vm1.sock.ctl 2")]
    LogLevel(LogLevelArgs),
    /// Show how volume and devices are, by rule, and how long the spare will last.
    Health(HealthArgs),
    /// Show where on the disk trouble lies.
    Surface(SurfaceArgs),
    /// Watch a volume on the terminal: load, latency, devices, blocks, surface, scanner and events.
    Top(TopArgs),
    /// Begin the counters anew; those of the lifetime go on.
    #[command(
        alias = "clear_stats",
        after_help = "Example:\n  vhost-remap clear-stats --control-path /run/vm1.sock.ctl"
    )]
    ClearStats(ControlArgs),
}

/// Which server to ask, and how to print its answer.
#[derive(Debug, clap::Args)]
pub struct ControlArgs {
    /// Control socket of the server (by default its --socket-path with `.ctl` appended).
    #[arg(long, value_name = "CTL")]
    pub control_path: PathBuf,
    /// Name or UUID of the volume, where the server has several.
    #[arg(long, value_name = "NAME")]
    pub volume: Option<String>,
    /// Print JSON, one document a line.
    #[arg(long)]
    pub json: bool,
}

/// Layout of a new volume.
#[derive(Debug, clap::Args)]
pub struct ShapeArgs {
    /// The most blocks that can be remapped, 16 to 4194304 [default: 16384].
    #[arg(long, alias = "max_remaps", value_name = "N", value_parser = parse::number(16_u32, 4_194_304))]
    pub max_remaps: Option<u32>,
    /// Serial number the guest sees, at most 20 characters [default: made up].
    #[arg(long, value_name = "ID", value_parser = parse::serial)]
    pub serial: Option<String>,
}

/// Options of `create`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  vhost-remap create --primary /srv/disk.img --size 10G\n  \
vhost-remap create --primary /dev/sdb --spare /dev/sdc1 --size 1T --max-remaps 65536")]
pub struct CreateArgs {
    /// Device or file that will hold guest data; it must be empty.
    #[arg(long, value_name = "P")]
    pub primary: PathBuf,
    /// Size of the disk: bytes, or with K, M, G, T (powers of 1024).
    #[arg(long, value_name = "SIZE", value_parser = parse::size)]
    pub size: u64,
    /// Device or file that will hold metadata and slots [default: P.spare where P is a file].
    #[arg(long, value_name = "S")]
    pub spare: Option<PathBuf>,
    /// Layout.
    #[command(flatten)]
    pub shape: ShapeArgs,
    /// Use the spare even if it carries the signature of a file system.
    #[arg(long)]
    pub force: bool,
}

/// Options of `adopt`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  vhost-remap adopt --primary /srv/old-disk.raw --spare /srv/old-disk.spare")]
pub struct AdoptArgs {
    /// Raw image or device that holds guest data.
    #[arg(long, value_name = "P")]
    pub primary: PathBuf,
    /// Device or file that will hold metadata and slots [default: P.spare where P is a file].
    #[arg(long, value_name = "S")]
    pub spare: Option<PathBuf>,
    /// Layout.
    #[command(flatten)]
    pub shape: ShapeArgs,
    /// Use the spare even if it carries the signature of a file system, and the primary even if it belongs to a
    /// volume, which is lost.
    #[arg(long)]
    pub force: bool,
}

/// Options of `serve`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  vhost-remap serve --primary /srv/disk.img --socket-path /run/vm1.sock\n  \
vhost-remap serve --primary /srv/disk.img --socket-path /run/vm1.sock --create --size 10G")]
#[command(group = clap::ArgGroup::new("listen").required(true))]
pub struct ServeArgs {
    /// Device or file that holds guest data.
    #[arg(long, visible_alias = "blk-file", value_name = "P")]
    pub primary: PathBuf,
    /// Device or file that holds metadata and slots [default: P.spare where P is a file].
    #[arg(long, value_name = "S")]
    pub spare: Option<PathBuf>,
    /// Listen for the VM's front-end at this path.
    #[arg(long, value_name = "SOCK", group = "listen")]
    pub socket_path: Option<PathBuf>,
    /// Serve on this inherited socket, listening or connected.
    #[arg(long, value_name = "N", group = "listen", value_parser = parse::number(3, RawFd::MAX))]
    pub fd: Option<RawFd>,
    /// Listen for operators at this path [default: SOCK.ctl; none with --fd].
    #[arg(long, value_name = "CTL")]
    pub control_path: Option<PathBuf>,
    /// Let members of this group (a name in /etc/group, or a number) ask for reports on the control socket. They give
    /// no orders.
    #[arg(long, value_name = "GROUP")]
    pub control_group: Option<String>,
    /// Answer browsers and scrapers at this port of 127.0.0.1, or at this address and port. Everybody who reaches it
    /// may read all reports, and do nothing else.
    #[arg(long, value_name = "[ADDRESS:]PORT", value_parser = parse::http_listen)]
    pub http_listen: Option<SocketAddr>,
    /// Queues offered to the guest.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = parse::number(1_u16, 64))]
    pub num_queues: u16,
    /// Worker threads [default: as many as queues, at most one a core].
    #[arg(long, value_name = "N", value_parser = parse::number(1_u16, 64))]
    pub workers: Option<u16>,
    /// Let each worker look at its rings for up to so many microseconds before it sleeps, 0 to 1000: shorter latency
    /// for processor time [default: 32 if each worker and a virtual processor can have a core of their own, else 0].
    #[arg(long, value_name = "US", value_parser = parse::number(0_u32, 1000))]
    pub poll_us: Option<u32>,
    /// What speaks vhost-user: this program, or rust-vmm's daemon, to compare the two.
    #[arg(long, hide = true, default_value = "own", value_parser = one_of::<Transport>(&["own", "framework"]))]
    pub transport: Transport,
    /// Await a guest that is migrated here from another server of the volume: show the disk, and open it when that
    /// server has let go.
    #[arg(long, conflicts_with_all = ["create", "degraded"])]
    pub incoming: bool,
    /// Serve a disk that only takes reads, and write nothing to either device.
    #[arg(long, conflicts_with = "create")]
    pub read_only: bool,
    /// Make the volume first if primary and spare are both absent.
    #[arg(long, requires = "size")]
    pub create: bool,
    /// With --create: size of the disk, in bytes or with K, M, G, T (powers of 1024).
    #[arg(long, value_name = "SIZE", requires = "create", value_parser = parse::size)]
    pub size: Option<u64>,
    /// With --create: the most blocks that can be remapped, 16 to 4194304 [default: 16384].
    #[arg(long, alias = "max_remaps", value_name = "N", requires = "create",
        value_parser = parse::number(16_u32, 4_194_304))]
    pub max_remaps: Option<u32>,
    /// With --create: serial number the guest sees, at most 20 characters [default: made up].
    #[arg(long, value_name = "ID", requires = "create", value_parser = parse::serial)]
    pub serial: Option<String>,
    /// Way of device I/O.
    #[arg(long, value_name = "ENGINE", default_value = "auto", value_parser = one_of::<IoEngine>(&["auto", "io_uring", "threads"]))]
    pub io_engine: IoEngine,
    /// Page cache of the host: `writeback` shows write errors only at flush.
    #[arg(long, value_name = "MODE", default_value = "none", value_parser = one_of::<Cache>(&["none", "writeback"]))]
    pub cache: Cache,
    /// Allow `vhost-remap fault` on this server.
    #[arg(long)]
    pub fault_injection: bool,
    /// Take the primary as it is although another program has changed it since the last clean close.
    #[arg(long)]
    pub accept_external: bool,
    /// Pass requests straight to the primary: no spare, no metadata, no remaps.
    #[arg(long, conflicts_with_all = ["spare", "create"])]
    pub passthrough: bool,
    /// The spare is lost: serve what the primary holds, read-only. Blocks that its label lists as remapped
    /// fail; those that were remapped after the list was written may read as old data.
    #[arg(long, conflicts_with_all = ["spare", "create", "passthrough", "accept_external"])]
    pub degraded: bool,
    /// While a device is gone: `fail` requests, or `hold` them, for at most so many seconds.
    #[arg(long, value_name = "fail|hold[=SECONDS]", default_value = "fail")]
    pub on_device_loss: FailOrHold,
    /// Where a write needs a slot and none is free: `fail` it, or `hold` it, for at most so many seconds.
    #[arg(long, value_name = "fail|hold[=SECONDS]", default_value = "fail")]
    pub on_spare_full: FailOrHold,
    /// The scanner.
    #[command(flatten)]
    pub scan: ScanServeArgs,
    /// How much to log: 0 warnings, 1 information, 2 debugging, 3 everything.
    #[arg(long, aliases = ["dm_remap_debug", "debug_level"], value_name = "0..3", default_value_t = 1,
        value_parser = parse::number(0_u8, 3))]
    pub log_level: u8,
    /// How log lines look.
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t)]
    pub log_format: LogFormat,
    /// How long to wait for another process to let go of the devices.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = parse::number(0_u64, u64::from(u32::MAX)))]
    pub lock_wait: u64,
    /// Print what this backend can do, as management layers ask it, and exit.
    #[arg(long)]
    pub print_capabilities: bool,
}

/// Options of `status`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  vhost-remap status --control-path /run/vm1.sock.ctl")]
pub struct StatusArgs {
    /// Server.
    #[command(flatten)]
    pub control: ControlArgs,
    /// Print dm-remap's /proc text.
    #[arg(long, conflicts_with_all = ["json", "volume", "format", "line"])]
    pub proc: bool,
    /// How to print it.
    #[command(flatten)]
    pub output: StatusOutputArgs,
}

/// Options of `list`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  vhost-remap list --control-path /run/vm1.sock.ctl --lost")]
pub struct ListArgs {
    /// Server.
    #[command(flatten)]
    pub control: ControlArgs,
    /// Only blocks with lost sectors.
    #[arg(long, conflicts_with = "pending")]
    pub lost: bool,
    /// Only pending blocks.
    #[arg(long)]
    pub pending: bool,
}

impl ListArgs {
    /// Which blocks are wanted.
    pub fn filter(&self) -> ListFilter {
        match (self.lost, self.pending) {
            (true, _) => ListFilter::Lost,
            (_, true) => ListFilter::Pending,
            _ => ListFilter::All,
        }
    }
}

/// Options of `events`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  vhost-remap events --control-path /run/vm1.sock.ctl --follow\n  \
vhost-remap events --control-path /run/vm1.sock.ctl --follow --on health,lost,exhausted --exec ./mail-me")]
pub struct EventsArgs {
    /// Server.
    #[command(flatten)]
    pub control: ControlArgs,
    /// Go on printing as things happen, also when the server is restarted meanwhile.
    #[arg(long)]
    pub follow: bool,
    /// Only events of these kinds, or `health` (a device became better or worse, is gone or back), `lost` (sectors),
    /// `exhausted` (the spare fills or is full), `errors` (of devices, which the guest may have met or not).
    #[arg(long, value_name = "KIND,…", value_delimiter = ',', value_parser = super::follow::parse_kind)]
    pub on: Vec<String>,
    /// Run this command by /bin/sh for each event, one after the other. It gets the event as JSON on its input, and in
    /// variables VHOST_REMAP_EVENT, _VOLUME, _SEVERITY, _DEVICE, _SECTOR, _SECTORS, _CAUSE, _ACTION and _SEQ. If it
    /// fails, that is reported. With --follow it is run for what happens from now on.
    #[arg(long, value_name = "COMMAND")]
    pub exec: Option<String>,
}

/// What to do with fault rules.
#[derive(Debug, Subcommand)]
pub enum FaultCommand {
    /// Add a rule: matching operations fail or are delayed.
    Add(FaultAddArgs),
    /// List the rules.
    #[command(after_help = "Example:\n  vhost-remap fault list --control-path /run/vm1.sock.ctl")]
    List(ControlArgs),
    /// Remove one rule, or all.
    Clear(FaultClearArgs),
}

/// Options of `fault add`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
vhost-remap fault add --control-path /run/vm1.sock.ctl --ops read,write --sectors 2048-2055\n  \
vhost-remap fault add --control-path /run/vm1.sock.ctl --ops read --sectors 4096 --until-rewritten\n  \
vhost-remap fault add --control-path /run/vm1.sock.ctl --ops flush --count 1\n  \
vhost-remap fault add --control-path /run/vm1.sock.ctl --delay 200 --probability 0.01 --seed 7")]
pub struct FaultAddArgs {
    /// Server.
    #[command(flatten)]
    pub control: ControlArgs,
    /// Which device fails.
    #[arg(long, default_value = "primary", value_parser = PossibleValuesParser::new(["primary", "spare"]).try_map(|name| fault::device(&name)))]
    pub device: DeviceIndex,
    /// Which operations.
    #[arg(long, value_name = "OP,…", value_delimiter = ',', default_value = "read,write",
        value_parser = PossibleValuesParser::new(["read", "write", "flush", "discard", "identify"]).try_map(|name| fault::op(&name)))]
    pub ops: Vec<FaultOp>,
    /// Only operations that touch these sectors of the device [default: all]. May be repeated: each
    /// range becomes a rule of its own.
    #[arg(long, value_name = "A-B", value_parser = parse::sectors)]
    pub sectors: Vec<SectorRange>,
    /// The error, by name or number; `none` only delays [default: EIO; none with --delay].
    #[arg(long, value_name = "ERRNO")]
    pub errno: Option<FaultErrno>,
    /// Fail only so many operations.
    #[arg(long, value_name = "N", value_parser = parse::number(1, u64::MAX))]
    pub count: Option<u64>,
    /// A sector is good again once it was written.
    #[arg(long)]
    pub until_rewritten: bool,
    /// Delay matching operations.
    #[arg(long, value_name = "MS", value_parser = parse::number(0_u64, DELAY_MS_MAX))]
    pub delay: Option<u64>,
    /// Match with this probability only.
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = probability, hide_default_value = true)]
    pub probability: f64,
    /// Seed of the dice for --probability: the same operations meet the same fate.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = parse::number(0, u64::MAX))]
    pub seed: u64,
    /// A failing write still writes the sectors outside of --sectors, as real disks do.
    #[arg(long)]
    pub partial: bool,
}

/// Options of `fault clear`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  vhost-remap fault clear --control-path /run/vm1.sock.ctl\n  \
vhost-remap fault clear --control-path /run/vm1.sock.ctl 3")]
pub struct FaultClearArgs {
    /// Server.
    #[command(flatten)]
    pub control: ControlArgs,
    /// Number of the rule [default: all].
    #[arg(value_name = "ID", value_parser = parse::number(1, u64::MAX))]
    pub id: Option<u64>,
}

/// Options of `remap`, `verify` and `release`.
#[derive(Debug, clap::Args)]
pub struct SectorsArgs {
    /// Server.
    #[command(flatten)]
    pub control: ControlArgs,
    /// Sectors, 512 bytes each: `17`, or `8-15` with both ends included.
    #[arg(required = true, value_name = "SECTOR", value_parser = parse::sectors)]
    pub sectors: Vec<SectorRange>,
}

/// Options of `resize`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  vhost-remap resize --control-path /run/vm1.sock.ctl --size 20G")]
pub struct ResizeArgs {
    /// Server.
    #[command(flatten)]
    pub control: ControlArgs,
    /// Size of the disk: bytes, or with K, M, G, T (powers of 1024). A primary that is a file is extended; a block
    /// device must have been [default: all that the primary has room for].
    #[arg(long, value_name = "SIZE", value_parser = parse::size)]
    pub size: Option<u64>,
}

/// Options of `log-level`.
#[derive(Debug, clap::Args)]
pub struct LogLevelArgs {
    /// Server.
    #[command(flatten)]
    pub control: ControlArgs,
    /// The level.
    #[arg(value_name = "0..3", value_parser = parse::number(0_u8, 3))]
    pub level: u8,
}

/// A value with one of these names.
pub(super) fn one_of<T>(names: &'static [&'static str]) -> impl TypedValueParser<Value = T>
where
    T: std::str::FromStr<Err = String> + Clone + Send + Sync + 'static,
{
    PossibleValuesParser::new(names).try_map(|name| name.parse::<T>())
}

fn probability(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(p) if p > 0.0 && p <= 1.0 => Ok(p),
        _ => Err(format!("{text:?} is no probability above 0 and up to 1")),
    }
}
