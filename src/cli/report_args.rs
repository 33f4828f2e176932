//! What can be typed of reports: formats, repetition, health, surface.

use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;

use super::args::ControlArgs;
use super::parse;
use crate::runtime::surface::CELLS_MAX;

/// How a status is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StatusFormat {
    /// For people.
    Human,
    /// One document a line.
    Json,
    /// A head and a row, dm-remap's columns first.
    Csv,
    /// One line of names and values.
    Compact,
    /// dm-remap's 31 fields.
    Raw,
}

/// How `status` prints, and how often.
#[derive(Debug, clap::Args)]
pub struct StatusOutputArgs {
    /// How to print it; `raw` is dm-remap's line of 31 fields.
    #[arg(long, short, value_name = "FORMAT", conflicts_with = "json")]
    pub format: Option<StatusFormat>,
    /// Print dm-remap's line of 31 fields.
    #[arg(long, conflicts_with_all = ["json", "format"])]
    pub line: bool,
    /// How often.
    #[command(flatten)]
    pub watch: WatchArgs,
}

/// How often to print.
#[derive(Debug, clap::Args)]
pub struct WatchArgs {
    /// Print it again every so many seconds, until the server ends: on a terminal in the same place, else one after the
    /// other.
    #[arg(long, short, value_name = "SECONDS", value_parser = parse::number(1_u64, 86_400))]
    pub watch: Option<u64>,
}

/// How health and statistics are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AnswerFormat {
    /// For people.
    Human,
    /// One document a line.
    Json,
    /// One line of names and values, dm-remap's first.
    Compact,
}

impl AnswerFormat {
    /// What was asked for.
    pub fn of(given: Option<AnswerFormat>, control: &ControlArgs) -> AnswerFormat {
        given.unwrap_or(if control.json { AnswerFormat::Json } else { AnswerFormat::Human })
    }
}

/// Options of `stats`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  vhost-remap stats --control-path /run/vm1.sock.ctl\n  \
vhost-remap stats --control-path /run/vm1.sock.ctl --format compact --watch 5")]
pub struct StatsArgs {
    /// Server.
    #[command(flatten)]
    pub control: ControlArgs,
    /// How to print it.
    #[arg(long, short, value_name = "FORMAT", conflicts_with = "json")]
    pub format: Option<AnswerFormat>,
    /// How often.
    #[command(flatten)]
    pub watch: WatchArgs,
}

/// Options of `health`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  vhost-remap health --control-path /run/vm1.sock.ctl\n  \
vhost-remap health --control-path /run/vm1.sock.ctl --smart\n\n\
The score is 100 less points for each of these, and at most 94 for WATCH, 79 for AT_RISK and 39 for REPLACE:\n  \
requests in 10,000 that met an error of a device: 5 from 2 on, 20 from 11 on, 50 from 101 on\n  \
requests that met an error of a device, and blocks that a pass found bad, within 600 s: 15 from 6 on, 30 from 10 on\n  \
pending blocks: 5 from 1 on, 10 from 11 on, 25 from 21 on\n  \
percent of the slots used: half of them\n  \
lost sectors: 20 from 1 on")]
pub struct HealthArgs {
    /// Server.
    #[command(flatten)]
    pub control: ControlArgs,
    /// How to print it.
    #[arg(long, short, value_name = "FORMAT", conflicts_with = "json")]
    pub format: Option<AnswerFormat>,
    /// Ask the drives under primary and spare too, with `smartctl` of smartmontools, which this command runs (as root).
    #[arg(long)]
    pub smart: bool,
    /// Ask these drives, where they cannot be found by themselves (behind RAID or LVM); may be repeated.
    #[arg(long, value_name = "DEVICE")]
    pub smart_device: Vec<PathBuf>,
    /// How often.
    #[command(flatten)]
    pub watch: WatchArgs,
}

/// Options of `surface`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  vhost-remap surface --control-path /run/vm1.sock.ctl --width 100\n  \
vhost-remap surface --control-path /run/vm1.sock.ctl --svg disk.svg")]
pub struct SurfaceArgs {
    /// Server.
    #[command(flatten)]
    pub control: ControlArgs,
    /// Cells in a row.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = parse::number(1_u64, 1024))]
    pub width: u64,
    /// Cells in all [default: 16 rows of them].
    #[arg(long, value_name = "N", value_parser = parse::number(1_u64, CELLS_MAX))]
    pub cells: Option<u64>,
    /// Write the map as a picture to this file.
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    pub svg: Option<PathBuf>,
    /// Letters only, also on a terminal (as with NO_COLOR in the environment).
    #[arg(long, short)]
    pub no_color: bool,
}

/// Options of `top`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  vhost-remap top --control-path /run/vm1.sock.ctl\n  \
vhost-remap top --control-path /run/vm1.sock.ctl --interval 500ms\n\n\
Keys: q ends, p pauses, + and - change the interval, arrows scroll the events, Tab shows another volume, ? helps.")]
pub struct TopArgs {
    /// Control socket of the server (by default its --socket-path with `.ctl` appended).
    #[arg(long, value_name = "CTL")]
    pub control_path: PathBuf,
    /// Name or UUID of the volume shown first, where the server has several.
    #[arg(long, value_name = "NAME")]
    pub volume: Option<String>,
    /// How often to ask the server: 1s, 500ms, or a number of seconds; 100 ms to 1 h.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse::interval)]
    pub interval: Duration,
}
