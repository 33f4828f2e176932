//! Opening a volume: find its superblocks, check the devices, take the newest of every page, repair.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::create::{CreateParams, new_superblock};
use super::degraded::open_degraded;
use super::event::{Event, Severity};
use super::healer::{Healer, HealerParams, Opened, Tally};
use super::io::Io;
use super::script::Script;
use super::view::Geometry;
use crate::device::{Completion, DeviceIndex, Errno, Op};
use crate::units::{SECTOR_SIZE, SECTORS_PER_BLOCK, SectorRange, Time};
use crate::volume::layout::{Home, LabelLayout, Layout, LayoutError, PAGE, PAGE_SIZE, Place, REGION_ALIGN, REMAPS_MAX};
use crate::volume::map::{BlockState, Map};
use crate::volume::sidecar::{Poison, SavedCounters};
use crate::volume::superblock::{
    COMPAT_KNOWN, INCOMPAT_KNOWN, RO_COMPAT_KNOWN, Seat, Superblock, SuperblockError, VERSION,
};
use crate::volume::table::{Page, PageSeat, Table};

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
    #[error("the spare has format version {0} and this program knows version {VERSION}; use a newer program")]
    Version(u32),
    /// Features this program does not know.
    #[error("the volume uses incompatible features {0:#x} that this program does not know; use a newer program")]
    Features(u64),
    /// Superblocks of several volumes on one spare.
    #[error("the spare's superblocks belong to two volumes, {0} and {1}; it was overwritten in part")]
    Mixed(Uuid, Uuid),
    /// A device is smaller than it was.
    #[error("the {device} has {found} bytes and the volume was made with {expected}; it shrank or is the wrong one")]
    Shrunk {
        /// The device.
        device: DeviceIndex,
        /// Bytes now.
        found: u64,
        /// Bytes recorded.
        expected: u64,
    },
    /// The primary is larger than it was.
    #[error("the primary has {found} bytes and the volume was made with {expected}; shrink it back")]
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
    #[error("the primary is not the one that was adopted into volume {0}: its identity and its sampled blocks differ")]
    NotAdopted(Uuid),
    /// The spare is from before the label's last stamp.
    #[error(
        "the spare is of generation {spare} and the primary has seen generation {primary}: an older copy of the spare was put back"
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
    /// A device's logical block has grown.
    #[error("the {device} has logical blocks of {found} bytes and the volume was made for {expected}")]
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
    #[error("the table maps block {0}, and the volume has {1}")]
    BeyondEnd(u64, u64),
    /// The layout is impossible.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The primary is too small for what was asked.
    #[error("the primary has {size} bytes, too few for {capacity} sectors and the label ({needed} bytes in all)")]
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
    #[error("{device}: {what}: {errno}")]
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
        let opened = passthrough(primary, serial, read_only);
        Opening(Script::start(|_| async move { Ok(opened) }))
    }

    /// A volume whose spare is lost: read-only, by what its primary's label says.
    pub fn degraded(primary: DeviceFacts) -> Opening {
        Opening(Script::start(|io| async move { open_degraded(&io, &primary).await }))
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
    kind: &'static str,
    device: DeviceIndex,
    cause: String,
    action: &str,
) {
    let (time, range) = (Time(0), SectorRange::default());
    events.push(Event { time, severity, kind, device: Some(device), range, cause, action: action.into() });
}

/// A superblock as found: where, and whether it is whole.
struct Found {
    place: Place,
    offset: u64,
    result: Result<Superblock, String>,
    ours: bool,
}

async fn read_superblock(io: &Io, place: Place, offset: u64, copy: u8) -> Result<Found, OpenError> {
    let (page, _) = io.read(DeviceIndex::SPARE, offset, PAGE).await;
    let (result, ours) = match page {
        Err(errno) => (Err(errno.to_string()), true),
        Ok(page) => match Superblock::decode(&page, Seat::Spare(place), copy) {
            Ok(superblock) => (Ok(superblock), true),
            Err(SuperblockError::Version(version)) => return Err(OpenError::Version(version)),
            Err(error) => {
                let ours = error != SuperblockError::NotOurs;
                (Err(error.to_string()), ours)
            }
        },
    };
    Ok(Found { place, offset, result, ours })
}

/// All superblocks of the spare. Where the head has none, the tail place is looked for at every start
/// its size allows.
async fn find_superblocks(io: &Io, spare_size: u64) -> Result<Vec<Found>, OpenError> {
    let mut found = Vec::new();
    for copy in 0..2 {
        found.push(read_superblock(io, Place::Head, u64::from(copy) * PAGE_SIZE, copy).await?);
    }
    let known = found.iter().filter_map(|f| f.result.as_ref().ok()).max_by_key(|s| s.generation);
    if let Some(known) = known {
        if spare_size < known.spare_size {
            let (device, expected) = (DeviceIndex::SPARE, known.spare_size);
            return Err(OpenError::Shrunk { device, found: spare_size, expected });
        }
        let start = Layout::new(known.spare_size, known.max_remaps)?.place_start(Place::Tail);
        for copy in 0..2 {
            found.push(read_superblock(io, Place::Tail, start + u64::from(copy) * PAGE_SIZE, copy).await?);
        }
        return Ok(found);
    }
    let smallest = Layout::new(u64::MAX / 2, crate::volume::layout::REMAPS_MIN)?.place_len();
    let largest = Layout::new(u64::MAX / 2, REMAPS_MAX)?.place_len();
    let end = spare_size / REGION_ALIGN * REGION_ALIGN;
    let mut len = smallest;
    while len <= largest && len <= end {
        for copy in 0..2 {
            let at = read_superblock(io, Place::Tail, end - len + u64::from(copy) * PAGE_SIZE, copy).await?;
            if at.result.is_ok() {
                found.push(at);
            }
        }
        len += REGION_ALIGN;
    }
    Ok(found)
}

fn choose(found: &[Found]) -> Result<Superblock, OpenError> {
    let valid: Vec<&Superblock> = found.iter().filter_map(|f| f.result.as_ref().ok()).collect();
    let Some(newest) = valid.iter().max_by_key(|superblock| superblock.generation) else {
        if found.iter().all(|f| !f.ours) {
            return Err(OpenError::NotAVolume);
        }
        let causes: Vec<String> = found
            .iter()
            .filter_map(|f| Some(format!("{} at byte {}: {}", f.place.name(), f.offset, f.result.as_ref().err()?)))
            .collect();
        return Err(OpenError::NoSuperblock(causes.join("; ")));
    };
    if let Some(other) = valid.iter().find(|superblock| superblock.set != newest.set) {
        return Err(OpenError::Mixed(newest.set, other.set));
    }
    Ok((*newest).clone())
}

fn check_devices(superblock: &Superblock, params: &OpenParams) -> Result<(), OpenError> {
    let unknown = superblock.features[2] & !INCOMPAT_KNOWN;
    if unknown != 0 {
        return Err(OpenError::Features(unknown));
    }
    let (found, expected) = (params.primary.size, superblock.primary_size);
    if found < expected {
        return Err(OpenError::Shrunk { device: DeviceIndex::PRIMARY, found, expected });
    }
    if found > expected {
        return Err(OpenError::Grown { found, expected });
    }
    for (device, facts) in [(DeviceIndex::PRIMARY, &params.primary), (DeviceIndex::SPARE, &params.spare)] {
        if facts.logical_block > superblock.logical_block {
            let (found, expected) = (facts.logical_block, superblock.logical_block);
            return Err(OpenError::LogicalBlock { device, found, expected });
        }
    }
    Ok(())
}

/// What was found where the primary's label belongs.
#[derive(Default)]
struct LabelFound {
    /// No copy of its superblock can be used.
    lost: bool,
    /// When its table was stamped; 0 where that is not known.
    stamped: u64,
}

/// Whether the primary is the one the volume was made with.
async fn check_primary(
    io: &Io,
    superblock: &Superblock,
    label: Option<LabelLayout>,
    params: &OpenParams,
    live: usize,
) -> Result<LabelFound, OpenError> {
    let facts = &params.primary;
    let same_device = (superblock.primary_inode, superblock.primary_wwn.as_str()) == (facts.inode, facts.wwn.as_str());
    let mut sampled = None;
    let mut label_found = LabelFound::default();
    if let Some(label) = label {
        let mut newest: Option<Superblock> = None;
        for copy in 0..2 {
            let (page, _) = io.read(DeviceIndex::PRIMARY, label.superblock(copy), PAGE).await;
            let found = page.ok().and_then(|page| Superblock::decode(&page, Seat::Label, copy).ok());
            if found.as_ref().map(|s| s.generation) > newest.as_ref().map(|s| s.generation) {
                newest = found;
            }
        }
        match newest {
            Some(found) if found.set != superblock.set => {
                return Err(OpenError::WrongPrimary { found: found.set, expected: superblock.set });
            }
            Some(found) if found.generation > superblock.generation => {
                return Err(OpenError::OldSpare { spare: superblock.generation, primary: found.generation });
            }
            Some(found) => label_found.stamped = found.stamped,
            // A creation that ended before its last step, or a label on bad sectors.
            None if same_device => label_found.lost = true,
            None => return Err(OpenError::NoLabel(superblock.set)),
        }
    } else if !same_device && !params.accept_external {
        let found = sample(io, superblock.capacity, superblock.logical_block, superblock.sampled).await;
        sampled = Some(found);
        if superblock.stamp.is_none_or(|stamp| (stamp.sample_crc, superblock.sampled) != found) {
            return Err(OpenError::NotAdopted(superblock.set));
        }
    }
    if let Some(stamp) = superblock.stamp.filter(|_| superblock.clean && live > 0 && !params.accept_external) {
        if stamp.size != facts.size {
            return Err(OpenError::External("its size differs", live));
        }
        if stamp.mtime_ns != 0 && same_device && stamp.mtime_ns != facts.mtime_ns {
            return Err(OpenError::External("its modification time differs", live));
        }
        let (crc, readable) = match sampled {
            Some(found) => found,
            None => sample(io, superblock.capacity, superblock.logical_block, superblock.sampled).await,
        };
        // Where a sample has become unreadable since, nothing can be said.
        if readable == superblock.sampled && stamp.sample_crc != crc {
            return Err(OpenError::External("sampled blocks differ", live));
        }
    }
    Ok(label_found)
}

/// The homes of all table pages of one place and home, as read; `None` where a page is not valid.
async fn read_homes(io: &Io, layout: &Layout, set: Uuid, place: Place, home: Home) -> Vec<Option<Page>> {
    const PAGES_AT_ONCE: u32 = 256;
    let mut pages = Vec::new();
    let mut first = 0;
    while first < layout.table_pages {
        let count = PAGES_AT_ONCE.min(layout.table_pages - first);
        let len = usize::try_from(u64::from(count) * PAGE_SIZE).expect("1 MiB");
        let (bulk, _) = io.read(DeviceIndex::SPARE, layout.table(place, home, first), len).await;
        for number in first..first + count {
            let seat = PageSeat::Spare(place, home);
            let page = match &bulk {
                Ok(bulk) => {
                    let at = usize::try_from(u64::from(number - first) * PAGE_SIZE).expect("within 1 MiB");
                    Page::decode(&bulk[at..at + PAGE], set, number, seat)
                }
                Err(_) => {
                    let (page, _) = io.read(DeviceIndex::SPARE, layout.table(place, home, number), PAGE).await;
                    page.ok().and_then(|page| Page::decode(&page, set, number, seat))
                }
            };
            pages.push(page);
        }
        first += count;
    }
    pages
}

/// The table from the newest valid homes, with the homes that lack their page's newest.
type Repairs = Vec<(Place, Home, u32)>;

async fn load_table(io: &Io, layout: &Layout, superblock: &Superblock) -> Result<(Table, Repairs), OpenError> {
    let places: Vec<Place> = Place::ALL.into_iter().filter(|place| !superblock.is_retired(*place)).collect();
    let mut homes = BTreeMap::new();
    for (place, home) in places.iter().flat_map(|place| Home::ALL.map(|home| (*place, home))) {
        let pages = read_homes(io, layout, superblock.set, place, home).await;
        homes.insert((place, home.number()), (home, pages));
    }
    let mut table = Table::new(superblock.max_remaps);
    let mut repairs = Vec::new();
    for number in 0..layout.table_pages {
        let index = number as usize;
        let newest = homes
            .values()
            .filter_map(|(home, pages)| Some((*home, pages[index].as_ref()?)))
            .max_by_key(|(_, page)| page.sequence);
        let (anchor, page) = newest.ok_or(OpenError::TablePage(number))?;
        for ((place, _), (home, pages)) in &homes {
            if pages[index].as_ref() != Some(page) {
                repairs.push((*place, *home, number));
            }
        }
        table.load_page(number, page, anchor);
    }
    Ok((table, repairs))
}

async fn load_sidecars(
    io: &Io,
    layout: &Layout,
    superblock: &Superblock,
    label: Option<LabelLayout>,
) -> (Poison, SavedCounters) {
    let mut poisons = Vec::new();
    let mut counters = Vec::new();
    // Retired places too: a poison may have found no other that took it.
    for place in Place::ALL {
        let seat = Seat::Spare(place);
        let page = io.read_page(DeviceIndex::SPARE, layout.poison(place)).await;
        poisons.extend(page.ok().and_then(|page| Poison::decode(&page, superblock.set, seat)));
        let (page, _) = io.read(DeviceIndex::SPARE, layout.counters(place), PAGE).await;
        counters.extend(page.ok().and_then(|page| SavedCounters::decode(&page, superblock.set, seat)));
    }
    if let Some(label) = label {
        let page = io.read_page(DeviceIndex::PRIMARY, label.poison()).await;
        poisons.extend(page.ok().and_then(|page| Poison::decode(&page, superblock.set, Seat::Label)));
    }
    let saved = counters.into_iter().max_by_key(|saved| saved.sequence).unwrap_or_default();
    let poison = poisons.into_iter().max_by_key(|poison| poison.sequence);
    (poison.unwrap_or_else(unknown_poison), saved)
}

/// What to go by where no valid page is found: nobody knows that all is well, so nobody may say so.
pub(super) fn unknown_poison() -> Poison {
    Poison { poisoned: true, device: DeviceIndex::SPARE.0, errno: libc::EUCLEAN, ..Poison::default() }
}

pub(super) fn build_map(table: &Table, capacity: u64) -> Result<(Map, Vec<crate::units::Slot>), OpenError> {
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

async fn open(io: &Io, params: &OpenParams) -> Result<Opened, OpenError> {
    let found = find_superblocks(io, params.spare.size).await?;
    let mut superblock = choose(&found)?;
    check_devices(&superblock, params)?;
    let layout = Layout::new(superblock.spare_size, superblock.max_remaps)?;
    let label =
        if superblock.labelled { LabelLayout::new(superblock.primary_size, superblock.max_remaps) } else { None };
    let (table, repairs) = load_table(io, &layout, &superblock).await?;
    let (map, superseded) = build_map(&table, superblock.capacity)?;
    let label_found = check_primary(io, &superblock, label, params, table.live()).await?;
    let (poison, saved) = load_sidecars(io, &layout, &superblock, label).await;
    let unknown = superblock.features[1] & !RO_COMPAT_KNOWN;
    debug_assert_eq!(COMPAT_KNOWN, 0, "unknown compatible features are ignored");
    let read_only = params.read_only || unknown != 0;
    let mut tally = Tally::default();
    let mut events = Vec::new();
    let spare = DeviceIndex::SPARE;
    for bad in found.iter().filter(|f| !superblock.is_retired(f.place)) {
        if let (Err(cause), true) = (&bad.result, bad.ours) {
            let cause = format!("superblock at byte {}: {cause}", bad.offset);
            event(&mut events, Severity::Warn, "metadata-repaired", spare, cause, "another copy is used");
        }
    }
    if unknown != 0 {
        let cause = format!("read-only compatible features {unknown:#x} are not known here");
        event(&mut events, Severity::Warn, "read-only", spare, cause, "opened read-only");
    }
    if label_found.lost {
        let cause = "no copy of the label can be read".to_owned();
        event(&mut events, Severity::Warn, "metadata-repaired", DeviceIndex::PRIMARY, cause, "written anew");
    }
    if !read_only {
        for (place, home, number) in &repairs {
            let cause = format!("table page {number} at the {}, home {home:?}", place.name());
            event(&mut events, Severity::Warn, "metadata-repaired", spare, cause, "rewritten from the newest copy");
        }
        tally.metadata_repairs = repairs.len() as u64 + u64::from(label_found.lost);
        let take_over = TakeOver { io, layout: &layout, label, table: &table, poison: &poison };
        // Until the label is stamped again its list is as old as it was.
        superblock.stamped = label_found.stamped;
        superblock = take_over.run(&superblock, &repairs, &mut events).await?;
    }
    let slots_start = layout.slots_start;
    let geometry = Geometry {
        capacity: superblock.capacity,
        logical_block: superblock.logical_block,
        slots_start,
        slots: superblock.max_remaps,
    };
    let (saved, saved_sequence) = (saved.values, saved.sequence);
    Ok(Opened {
        label,
        superseded,
        poison,
        saved,
        saved_sequence,
        read_only,
        tally,
        events,
        ..Opened::new(geometry, layout, superblock, table, map)
    })
}

fn passthrough(primary: &DeviceFacts, serial: [u8; 20], read_only: bool) -> Opened {
    let layout = Layout::new(u64::MAX / 2, crate::volume::layout::REMAPS_MIN).expect("a spare that large holds it");
    let params = CreateParams {
        primary: primary.clone(),
        spare: primary.clone(),
        capacity: primary.size / SECTOR_SIZE,
        labelled: false,
        max_remaps: layout.max_remaps,
        set: Uuid::nil(),
        devices: [Uuid::nil(); 2],
        serial,
        now: 0,
    };
    let (capacity, logical_block) = (params.capacity, primary.logical_block);
    let geometry = Geometry { capacity, logical_block, slots_start: 0, slots: 0 };
    let superblock = new_superblock(&params, &layout, None);
    let (table, map) = (Table::new(layout.max_remaps), Map::new(capacity.div_ceil(SECTORS_PER_BLOCK)));
    Opened { read_only, ..Opened::new(geometry, layout, superblock, table, map) }
}

/// What taking over works with.
struct TakeOver<'a> {
    io: &'a Io,
    layout: &'a Layout,
    label: Option<LabelLayout>,
    table: &'a Table,
    poison: &'a Poison,
}

impl TakeOver<'_> {
    /// Bring every live place to the newest state, flush, and only then begin a new generation, the spare
    /// first. A place that does not take a write is retired while there is another; one that was retired is
    /// written in full and counts again if it takes that.
    async fn run(
        &self,
        superblock: &Superblock,
        repairs: &Repairs,
        events: &mut Vec<Event>,
    ) -> Result<Superblock, OpenError> {
        // What a killed process left in the device's cache may be the newest there is: before anything is
        // overwritten for its sake it must be durable. The slots' last writes are waiting there too.
        self.flush(superblock).await?;
        let mut next = superblock.next_generation();
        next.clean = false;
        (next.stamp, next.sampled) = (None, 0);
        self.repair(superblock, repairs, &mut next, events).await?;
        for place in Place::ALL.into_iter().filter(|place| superblock.is_retired(*place)) {
            if restore_place(self.io, self.layout, superblock, self.table, place).await.is_ok() {
                self.flush(superblock).await?;
                next.retired &= !(1 << place.number());
            }
        }
        let copy = self.begin(&mut next, events).await?;
        self.flush(superblock).await?;
        if let Some(label) = self.label {
            // Not a place: a label that cannot be written costs only the degraded mode.
            let bytes = next.encode(Seat::Label, copy);
            let _ = self.io.write(DeviceIndex::PRIMARY, label.superblock(copy), &bytes).await;
        }
        Ok(next)
    }

    /// Rewrite the homes that lack their page's newest: first those of the same name in other places, so
    /// that the only home that has it is never the only one whole for long.
    async fn repair(
        &self,
        superblock: &Superblock,
        repairs: &Repairs,
        next: &mut Superblock,
        events: &mut Vec<Event>,
    ) -> Result<(), OpenError> {
        for anchors in [true, false] {
            let mut written = false;
            for (place, home, number) in repairs {
                if (*home == self.table.page(*number).anchor) != anchors || next.is_retired(*place) {
                    continue;
                }
                written = true;
                let seat = (*place, *home, *number);
                if let Err(errno) = write_page(self.io, self.layout, superblock, self.table, seat).await {
                    retire(next, *place, errno, "rewriting damaged metadata", events)?;
                }
            }
            if written {
                self.flush(superblock).await?;
            }
        }
        Ok(())
    }

    /// Write the new generation's superblock to every live place; the copy it went to.
    async fn begin(&self, next: &mut Superblock, events: &mut Vec<Event>) -> Result<u8, OpenError> {
        'again: loop {
            let copy = Superblock::copy_for(next.generation);
            for place in Place::ALL.into_iter().filter(|place| !next.is_retired(*place)) {
                let bytes = next.encode(Seat::Spare(place), copy);
                let written = self.io.write(DeviceIndex::SPARE, self.layout.superblock(place, copy), &bytes).await;
                if let Err(errno) = written {
                    retire(next, place, errno, "writing the superblock", events)?;
                    // No two superblocks of one generation may differ; the older copy stays as it is.
                    next.generation += 2;
                    continue 'again;
                }
            }
            return Ok(copy);
        }
    }

    /// Flush the spare. A failure is noted wherever that is possible: who opens next must not take the
    /// next flush's success for the last one's (F2).
    async fn flush(&self, superblock: &Superblock) -> Result<(), OpenError> {
        let Err(errno) = self.io.flush(DeviceIndex::SPARE).await else { return Ok(()) };
        let failed = io_error(DeviceIndex::SPARE, "flushing its metadata")(errno);
        if superblock.clean {
            // Nothing of the guest's was waiting for it.
            return Err(failed);
        }
        let note = Poison {
            sequence: self.poison.sequence + 1,
            poisoned: true,
            device: DeviceIndex::SPARE.0,
            errno: errno.0,
            ..Poison::default()
        };
        for place in Place::ALL {
            let bytes = note.encode(superblock.set, Seat::Spare(place));
            let _ = self.io.write(DeviceIndex::SPARE, self.layout.poison(place), &bytes).await;
        }
        let _ = self.io.flush(DeviceIndex::SPARE).await;
        if let Some(label) = self.label {
            let bytes = note.encode(superblock.set, Seat::Label);
            let _ = self.io.write(DeviceIndex::PRIMARY, label.poison(), &bytes).await;
            let _ = self.io.flush(DeviceIndex::PRIMARY).await;
        }
        Err(failed)
    }
}

/// Count `place` no longer, unless it is the last.
fn retire(
    superblock: &mut Superblock,
    place: Place,
    errno: Errno,
    what: &'static str,
    events: &mut Vec<Event>,
) -> Result<(), OpenError> {
    superblock.retired |= 1 << place.number();
    if Place::ALL.into_iter().all(|place| superblock.is_retired(place)) {
        return Err(io_error(DeviceIndex::SPARE, what)(errno));
    }
    let cause = format!("{what} at the spare's {}: {errno}", place.name());
    event(
        events,
        Severity::Error,
        "place-retired",
        DeviceIndex::SPARE,
        cause,
        "retired; the other place goes on alone",
    );
    Ok(())
}

async fn write_page(
    io: &Io,
    layout: &Layout,
    superblock: &Superblock,
    table: &Table,
    (place, home, number): (Place, Home, u32),
) -> Result<(), Errno> {
    let page = table.page_with(number, table.page(number).sequence, &[]);
    let bytes = page.encode(superblock.set, number, PageSeat::Spare(place, home));
    io.write(DeviceIndex::SPARE, layout.table(place, home, number), &bytes).await
}

async fn restore_place(
    io: &Io,
    layout: &Layout,
    superblock: &Superblock,
    table: &Table,
    place: Place,
) -> Result<(), Errno> {
    for home in Home::ALL {
        for number in 0..layout.table_pages {
            write_page(io, layout, superblock, table, (place, home, number)).await?;
        }
    }
    Ok(())
}
