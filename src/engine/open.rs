//! Opening a volume: find its superblocks, check the devices, take the newest of every page, repair.

mod check;
mod degraded;
mod label;
mod look;
mod pages;
mod passthrough;
mod repair;
mod superblocks;
mod take_over;

use uuid::Uuid;

use super::event::{Event, EventKind, Severity};
use super::healer::{Healer, HealerParams, Opened, Tally};
use super::io::Io;
use super::script::Script;
use super::view::Geometry;
use crate::device::{Completion, DeviceIndex, Errno, Op};
use crate::units::{SECTOR_SIZE, SECTORS_PER_BLOCK, SectorRange, Slot, Time};
use crate::volume::layout::{Layout, LayoutError, PAGE};
use crate::volume::map::{BlockState, Map};
use crate::volume::superblock::{COMPAT_KNOWN, VERSION};
use crate::volume::table::Table;
use check::{check_content, check_devices, check_grown};
pub use label::{LabelSearch, OldLabel};
pub use look::Look;
use repair::{Newest, Repair};
use superblocks::Label;
pub(super) use superblocks::tail_starts;
use take_over::TakeOver;

/// What the caller knows of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFacts {
    /// Bytes.
    pub size: u64,
    /// Logical block, bytes.
    pub logical_block: u32,
    /// Inode; 0 for a block device.
    pub inode: u64,
    /// WWN or serial; empty for a file.
    pub wwn: String,
    /// Last change, nanoseconds since the epoch; 0 for a block device.
    pub mtime_ns: u64,
}

/// How to open a volume.
#[derive(Clone, Debug)]
pub struct OpenParams {
    /// The primary.
    pub primary: DeviceFacts,
    /// The spare.
    pub spare: DeviceFacts,
    /// Write nothing to either device.
    pub read_only: bool,
    /// Take the primary as it is although somebody else changed it.
    pub accept_external: bool,
}

/// Why a volume does not open.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The spare has no superblock of ours.
    #[error("the spare holds no vhost-remap volume; make one with `create` or `adopt`, or name the right spare")]
    NotAVolume,
    /// It has, but none can be used.
    #[error("no superblock of the spare can be used: {0}; put back a copy of the spare")]
    NoSuperblock(String),
    /// Made by a later program.
    #[error("the {device} has format version {found} and this program knows version {VERSION}; use a newer program")]
    Version {
        /// The device.
        device: DeviceIndex,
        /// Its version.
        found: u32,
    },
    /// Features this program does not know.
    #[error(
        "the {device} names incompatible features {unknown:#x} that this program does not know; use a newer program"
    )]
    Features {
        /// The device.
        device: DeviceIndex,
        /// A bit each.
        unknown: u64,
    },
    /// Superblocks of several volumes on one spare.
    #[error(
        "the spare's superblocks belong to two volumes, {0} and {1}: it was overwritten in part; put back a copy of it"
    )]
    Mixed(Uuid, Uuid),
    /// A device is smaller than it was.
    #[error(
        "the {device} has {found} bytes and the volume was made with {expected}; extend it back, or name the right one"
    )]
    Shrunk {
        /// The device.
        device: DeviceIndex,
        /// Bytes now.
        found: u64,
        /// Bytes recorded.
        expected: u64,
    },
    /// The primary is larger than it was, and its label is not where it was.
    #[error(
        "the primary has {found} bytes and the volume was made with {expected}, and no label lies where it did; shrink it back, or name the right one"
    )]
    Grown {
        /// Bytes now.
        found: u64,
        /// Bytes recorded.
        expected: u64,
    },
    /// The primary's label names another volume.
    #[error(
        "the primary belongs to volume {found} and the spare to volume {expected}; name the pair that belongs together"
    )]
    WrongPrimary {
        /// By the label.
        found: Uuid,
        /// By the spare.
        expected: Uuid,
    },
    /// The primary has no label where it should, and is not the one that had it.
    #[error(
        "the primary carries no label of volume {0} and is not the file or device the spare knows; name the right one"
    )]
    NoLabel(Uuid),
    /// Not the adopted primary.
    #[error(
        "the primary is not the one that was adopted into volume {0}: its identity and its sampled blocks differ; name the right one, or serve it with --accept-external if it is a changed copy"
    )]
    NotAdopted(Uuid),
    /// The spare is from before the label's last stamp.
    #[error(
        "the spare is of generation {spare} and the primary has seen generation {primary}: an older copy of the spare was put back; put back the newest"
    )]
    OldSpare {
        /// The spare's.
        spare: u64,
        /// The label's.
        primary: u64,
    },
    /// Somebody else wrote to the primary.
    #[error(
        "the primary was changed by another program since the last clean close ({0}) and {1} blocks are remapped; serve it with --accept-external if that was wanted"
    )]
    External(&'static str, usize),
    /// Somebody else changed the size of the primary.
    #[error(
        "the primary has {found} bytes and had {expected} at the last clean close, and {live} blocks are remapped; serve it with --accept-external if that was wanted"
    )]
    OtherSize {
        /// Bytes now.
        found: u64,
        /// Bytes then.
        expected: u64,
        /// Blocks that are remapped.
        live: usize,
    },
    /// A device's logical block has grown.
    #[error(
        "the {device} has logical blocks of {found} bytes and the volume was made for {expected}; use a device with blocks no larger"
    )]
    LogicalBlock {
        /// The device.
        device: DeviceIndex,
        /// Bytes.
        found: u32,
        /// Bytes.
        expected: u32,
    },
    /// There is no label to serve the primary by without its spare.
    #[error(
        "the primary carries no label to go by ({0}): an adopted volume, or one whose label is lost, needs its spare"
    )]
    NoLabelToGoBy(String),
    /// The power went while the label was being written.
    #[error(
        "the label's list of remapped blocks is half written: which of them have moved is not known; bring the spare back"
    )]
    LabelHalfWritten,
    /// A page of the label's table is not valid.
    #[error(
        "page {0} of the label's list of remapped blocks is damaged: which have moved is not known; bring the spare back"
    )]
    LabelPage(u32),
    /// No home of a table page can be used.
    #[error("table page {0} has no valid copy in any of its homes; restore the spare from a dump")]
    TablePage(u32),
    /// The table speaks of blocks the volume does not have.
    #[error("the table maps block {0}, and the volume has {1}; put back a copy of the spare")]
    BeyondEnd(u64, u64),
    /// The layout is impossible.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The primary is too small for what was asked.
    #[error(
        "the primary has {size} bytes, too few for {capacity} sectors and the label ({needed} bytes in all); choose a smaller --size"
    )]
    PrimarySmall {
        /// Bytes.
        size: u64,
        /// Sectors asked for.
        capacity: u64,
        /// Bytes needed.
        needed: u64,
    },
    /// The spare's logical block does not divide the disk.
    #[error(
        "the spare has logical blocks of {unit} bytes and the primary ends within one ({size} bytes): use a spare with blocks of 512, or extend the primary"
    )]
    Ragged {
        /// Bytes in a logical block.
        unit: u32,
        /// Bytes of the disk.
        size: u64,
    },
    /// An operation failed.
    #[error("{device}: {what}: {errno}; see the kernel's log, and check the device")]
    Io {
        /// The device.
        device: DeviceIndex,
        /// What was being done.
        what: &'static str,
        /// The error number.
        errno: Errno,
    },
}

pub(super) fn io_error(device: DeviceIndex, what: &'static str) -> impl Fn(Errno) -> OpenError {
    move |errno| OpenError::Io { device, what, errno }
}

/// A volume being opened.
pub struct Opening(Script<Opened>);

impl Opening {
    /// Begin; nothing is done before the first [`Opening::step`].
    pub fn new(params: OpenParams) -> Opening {
        Opening(Script::start(|io| async move { open(&io, &params).await }))
    }

    /// A primary served as it is, without spare or metadata: nothing is ever remapped. To be opened with
    /// [`super::healer::Policy::passthrough`].
    pub fn passthrough(primary: &DeviceFacts, serial: [u8; 20], read_only: bool) -> Opening {
        let opened = passthrough::opened(primary, serial, read_only);
        Opening(Script::start(|_| async move { Ok(opened) }))
    }

    /// A volume whose spare is lost: read-only, by what its primary's label says.
    pub fn degraded(primary: DeviceFacts) -> Opening {
        Opening(Script::start(|io| async move { degraded::open(&io, &primary).await }))
    }

    /// Report what has completed, and get the operations to submit. Finished when [`Opening::is_done`].
    pub fn step(&mut self, now: Time, completions: &[Completion], ops: &mut Vec<Op>) {
        self.0.step(now, completions, ops);
    }

    /// Whether the result is there.
    pub fn is_done(&self) -> bool {
        self.0.outcome.borrow().is_some()
    }

    /// The healer of the open volume, with what the guest is told of it.
    ///
    /// # Errors
    /// When the volume was refused.
    ///
    /// # Panics
    /// Before [`Opening::is_done`].
    pub fn finish(self, params: &HealerParams) -> Result<(Healer, VolumeFacts), OpenError> {
        let opened = self.0.outcome.borrow_mut().take().expect("called once, when done")?;
        let superblock = &opened.superblock;
        let facts = VolumeFacts {
            set: superblock.set,
            serial: superblock.serial,
            created: superblock.created,
            read_only: opened.read_only,
            labelled: superblock.labelled,
            max_remaps: superblock.max_remaps,
            degraded: opened.stamped,
            found_generation: opened.found_generation,
            closed_write_through: opened.closed_write_through,
        };
        Ok((Healer::new(self.0.executor, self.0.io, opened, params), facts))
    }
}

/// What does not change while a volume is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeFacts {
    /// The volume's name.
    pub set: Uuid,
    /// GET_ID.
    pub serial: [u8; 20],
    /// Seconds since the epoch.
    pub created: u64,
    /// Nothing is written.
    pub read_only: bool,
    /// The primary has a label.
    pub labelled: bool,
    /// Slots.
    pub max_remaps: u32,
    /// Served without its spare: when the list of remapped blocks was written, seconds since the epoch.
    pub degraded: Option<u64>,
    /// The generation it had before it was opened; an opening for writing begins another.
    pub found_generation: u64,
    /// Whether the guest that was served last had switched its cache to write-through; nobody knows after an
    /// unclean close.
    pub closed_write_through: Option<bool>,
}

/// Every sample there can be; see [`sample`].
pub(super) const ALL_SAMPLES: u16 = u16::MAX;

/// A checksum over 16 blocks spread over the primary, or over those of them that `wanted` names (a bit
/// each), and which of them could be read: a bad sector is no sign of somebody else's writing.
pub(super) async fn sample(io: &Io, capacity: u64, logical_block: u32, wanted: u16) -> (u32, u16) {
    const SAMPLES: u64 = 16;
    let unit = u64::from(logical_block) / SECTOR_SIZE;
    let blocks = capacity / SECTORS_PER_BLOCK;
    let (mut crc, mut readable) = (0, 0);
    for i in (0..SAMPLES.min(blocks)).filter(|i| wanted >> i & 1 == 1) {
        let sector = blocks * i / SAMPLES * SECTORS_PER_BLOCK / unit * unit;
        let (read, _) = io.read(DeviceIndex::PRIMARY, sector * SECTOR_SIZE, PAGE).await;
        if let Ok(data) = read {
            crc = crc32c::crc32c_append(crc, &data);
            readable |= 1 << i;
        }
    }
    (crc, readable)
}

fn event(
    events: &mut Vec<Event>,
    severity: Severity,
    kind: EventKind,
    device: DeviceIndex,
    cause: String,
    action: &str,
) {
    let (time, range) = (Time(0), SectorRange::default());
    events.push(Event { time, severity, kind, device: Some(device), range, cause, action: action.into() });
}

fn build_map(table: &Table, capacity: u64) -> Result<(Map, Vec<Slot>), OpenError> {
    let blocks = capacity.div_ceil(SECTORS_PER_BLOCK);
    let (live, superseded) = table.resolve(u64::MAX);
    let mut map = Map::new(blocks);
    for (block, (slot, entry)) in live {
        if block.0 >= blocks {
            return Err(OpenError::BeyondEnd(block.0, blocks));
        }
        let state = BlockState {
            slot: Some(slot),
            lost: entry.lost,
            primary_stale: entry.primary_stale,
            ..BlockState::default()
        };
        map.set(block, state);
    }
    Ok((map, superseded))
}

/// What the operator has to know of the volume as it was found: features that are not known here, and that
/// nobody can say whether a flush had failed.
fn first_events(unknown: u64, poison_unknown: Option<&'static str>) -> Vec<Event> {
    let mut events = Vec::new();
    if unknown != 0 {
        let cause = format!("read-only compatible features {unknown:#x} are not known here");
        event(&mut events, Severity::Warn, EventKind::ReadOnly, DeviceIndex::SPARE, cause, "opened read-only");
    }
    if let Some(cause) = poison_unknown.map(str::to_owned) {
        let action = "writes and flushes fail until `clear`";
        event(&mut events, Severity::Error, EventKind::Poisoned, DeviceIndex::SPARE, cause, action);
    }
    events
}

async fn open(io: &Io, params: &OpenParams) -> Result<Opened, OpenError> {
    let found = superblocks::find(io, params.spare.size).await?;
    let mut superblock = superblocks::choose(&found)?;
    let mut unknown = superblocks::check_features(&superblock, DeviceIndex::SPARE)?;
    check_devices(&superblock, &params.primary, &params.spare)?;
    let label = superblocks::read_label(io, &superblock).await?;
    check_grown(io, &superblock, label.as_ref(), params).await?;
    if let Some(label) = &label {
        superblock = label.compare(&found, superblock, &params.primary)?;
        if let Some(newest) = label.newest() {
            unknown |= superblocks::check_features(newest, DeviceIndex::PRIMARY)?;
        }
    }
    // Until the label is stamped again its list is as old as it was, or nobody knows how old.
    let stamped = match &label {
        Some(label) => label.newest().map_or(0, |newest| newest.stamped),
        None => superblock.stamped,
    };
    let layout = Layout::new(superblock.spare_size, superblock.max_remaps)?;
    let label_layout = label.as_ref().map(|label| label.layout);
    let (mut table, page_repairs) = pages::load_table(io, &layout, &superblock).await?;
    let (map, superseded) = build_map(&table, superblock.capacity)?;
    check_content(io, &superblock, label.is_some(), params, table.live()).await?;
    let read_only = params.read_only || unknown != 0;
    let (found_generation, closed_write_through) = (superblock.generation, superblock.closed_write_through());
    let sidecars = pages::load_sidecars(io, &layout, &superblock, label_layout, read_only).await;
    let mut repairs = superblocks::repairs(&found, &superblock);
    repairs.extend(page_repairs);
    repairs.extend(sidecars.repairs);
    repairs.extend(label.iter().flat_map(Label::repairs));
    debug_assert_eq!(COMPAT_KNOWN, 0, "unknown compatible features are ignored");
    let mut events = first_events(unknown, sidecars.poison_unknown);
    if params.primary.size > superblock.primary_size {
        let cause = format!("it has {} bytes, and had {}", params.primary.size, superblock.primary_size);
        event(
            &mut events,
            Severity::Info,
            EventKind::PrimaryGrown,
            DeviceIndex::PRIMARY,
            cause,
            "`resize` uses the rest",
        );
    }
    let mut tally = Tally::default();
    let (poison, saved) = (sidecars.poison, sidecars.counters);
    if read_only {
        superblock.stamped = stamped;
        for Repair { what, cause, .. } in repairs {
            let action = "another copy is used; nothing is written to a read-only volume";
            event(&mut events, Severity::Warn, EventKind::MetadataDamaged, what.device(), cause, action);
        }
    } else {
        let newest = Newest {
            layout: &layout,
            label: label_layout,
            superblock: &superblock,
            stamped,
            table: &table,
            poison: &poison,
            counters: &saved,
        };
        let taken = TakeOver::new(io, newest, &repairs, &mut events).run().await?;
        taken.renewed.into_iter().for_each(|(number, state)| table.set_page(number, state));
        (superblock, tally.metadata_repairs) = (taken.superblock, taken.repaired);
    }
    let geometry = Geometry {
        capacity: superblock.capacity,
        logical_block: superblock.logical_block,
        slots_start: layout.slots_start,
        slots: superblock.max_remaps,
    };
    Ok(Opened {
        label: label_layout,
        primary_size: params.primary.size,
        superseded,
        poison,
        saved_sequence: saved.sequence,
        saved: saved.values,
        read_only,
        found_generation,
        closed_write_through,
        tally,
        events,
        ..Opened::new(geometry, layout, superblock, table, map)
    })
}
