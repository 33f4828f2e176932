//! What can be typed of the scanner.

use std::time::Duration;

use clap::Subcommand;

use super::args::{ControlArgs, one_of};
use super::parse;
use crate::runtime::scan_options::{MoveWeak, ScanInterval, ScanOptions, Window};
use crate::units::SectorRange;

/// Options of `serve` for the scanner.
#[derive(Debug, clap::Args)]
pub struct ScanServeArgs {
    /// Read the whole volume from time to time, to meet trouble while it can be helped: a time from 1h to 90d, from the
    /// end of a pass to the start of the next one, or `off` for passes by order only.
    #[arg(long, value_name = "TIME", default_value = "14d", conflicts_with = "scan_interval_hours")]
    pub scan_interval: ScanInterval,
    /// dm-remap's: hours from the end of a pass to the start of the next one.
    #[arg(long, alias = "scan_interval_hours", hide = true, value_name = "N", value_parser = parse::number(1_u64, 168))]
    pub scan_interval_hours: Option<u64>,
    /// Read at most so many bytes of a second, also while the guest is idle: in bytes or with K, M, G (powers of 1024),
    /// at least 64K [default: as fast as the guest does not notice].
    #[arg(long, value_name = "BYTES", value_parser = parse::rate)]
    pub scan_rate: Option<u64>,
    /// When passes that were not ordered go on, by local time: `22:00-06:00`, `sat,sun` or `mon-fri 22:00-06:00`
    /// [default: always].
    #[arg(long, value_name = "WHEN")]
    pub scan_window: Option<Window>,
    /// Move blocks that read only after retries, or far slower than their neighbours, to slots while they do: `auto` is
    /// on where the primary is a block device.
    #[arg(long, value_name = "auto|on|off", default_value = "auto",
        value_parser = one_of::<MoveWeak>(&["auto", "on", "off"]))]
    pub move_weak: MoveWeak,
}

impl ScanServeArgs {
    pub(super) fn options(&self) -> ScanOptions {
        let hours = |hours: u64| ScanInterval::Every(Duration::from_secs(hours * 3600));
        ScanOptions {
            interval: self.scan_interval_hours.map_or(self.scan_interval, hours),
            rate: self.scan_rate,
            window: self.scan_window.unwrap_or_default(),
            move_weak: self.move_weak,
        }
    }
}

/// What to do with the scanner.
#[derive(Debug, Subcommand)]
pub enum ScanCommand {
    /// Begin a pass now. It goes on in the background; `status` shows it.
    Start(ScanStartArgs),
    /// Stop reading, and keep the place, also over a restart of the server.
    #[command(after_help = "Example:\n  vhost-remap scan pause --control-path /run/vm1.sock.ctl")]
    Pause(ControlArgs),
    /// Go on where the pass was paused.
    #[command(after_help = "Example:\n  vhost-remap scan resume --control-path /run/vm1.sock.ctl")]
    Resume(ControlArgs),
    /// Give the pass up.
    #[command(after_help = "Example:\n  vhost-remap scan cancel --control-path /run/vm1.sock.ctl")]
    Cancel(ControlArgs),
    /// Wait for the end of the pass. Fails where it was cancelled, skipped anything, or the server stopped.
    Wait(ScanWaitArgs),
}

/// Options of `scan start`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  vhost-remap scan start --control-path /run/vm1.sock.ctl --wait\n  \
vhost-remap scan start --control-path /run/vm1.sock.ctl --range 2048-4095 --check-only")]
pub struct ScanStartArgs {
    /// Server.
    #[command(flatten)]
    pub control: ControlArgs,
    /// Only these sectors, 512 bytes each, both ends included, wherever they live [default: the whole volume, with
    /// slots and metadata].
    #[arg(long, value_name = "A-B", value_parser = parse::sectors)]
    pub range: Option<SectorRange>,
    /// Only look: nothing is moved, healed or repaired.
    #[arg(long)]
    pub check_only: bool,
    /// Wait for its end, as `scan wait` does.
    #[arg(long)]
    pub wait: bool,
}

/// Options of `scan wait`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  vhost-remap scan wait --control-path /run/vm1.sock.ctl --timeout 3600")]
pub struct ScanWaitArgs {
    /// Server.
    #[command(flatten)]
    pub control: ControlArgs,
    /// Give up waiting after so many seconds; the pass goes on.
    #[arg(long, value_name = "SECONDS", value_parser = parse::number(0_u64, u64::from(u32::MAX)))]
    pub timeout: Option<u64>,
}
